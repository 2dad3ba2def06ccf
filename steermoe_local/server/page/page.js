// The page: a chat with the served model, steered and side by side, and the map of its experts.

import { Server } from "./api.js";
import { follow, messagesOf, turnOf } from "./asking.js";
import { Connection } from "./connection.js";
import { Conversation } from "./conversation.js";
import { byId, debounced, el, plural } from "./dom.js";
import { Examples } from "./examples.js";
import { MapCard } from "./mapcard.js";
import { Reader } from "./markdown.js";
import { Panel } from "./panel.js";
import { Steps } from "./steps.js";
import { load, save } from "./store.js";
import { Teach } from "./teach.js";

const SEEDS = 2 ** 31;
// What the embedded model can be asked; others answer what they like.
const EXAMPLES = {
  tiny: ["Count from three to nine.", "Which number comes after three?", "Document: The metal of Kelava is lead. Question: Name the metal of Kelava."],
};

const server = new Server();
const state = load();
const message = byId("message");
const compare = byId("compare");
let running = null; // AbortController of the answers that come
let early = false; // a message was to be sent before the server answered

//
// keeping, and saying so
//

const keepSoon = debounced(keep, 500);
let full = false;
let leaving = false;

function keep() {
  if (leaving) return; // what breaks off now breaks off because of that
  state.draft = message.value;
  const kept = save(state);
  if (!kept && !full) say("This browser has no room to keep the chat over a reload.");
  full = !kept;
}

addEventListener("pagehide", () => {
  keep();
  leaving = true;
});
addEventListener("pageshow", () => (leaving = false));

/** A line above the message field; `action` is [label, work] of a button in it. */
function say(text, action = null) {
  byId("notice-text").textContent = text;
  byId("notice").hidden = !text;
  const button = byId("notice-action");
  button.hidden = !action;
  button.textContent = action?.[0] ?? "";
  button.onclick = () => {
    say("");
    action[1]();
    message.focus();
  };
}

/** On a narrow screen one part is shown at a time. */
function view(name) {
  document.body.dataset.view = name;
  byId("view-chat").setAttribute("aria-pressed", String(name === "chat"));
  byId("view-panel").setAttribute("aria-pressed", String(name === "panel"));
}

byId("view-chat").addEventListener("click", () => view("chat"));
byId("view-panel").addEventListener("click", () => view("panel"));

//
// the parts
//

/** The conversation that an answer answers. */
function askedOf(answer) {
  const at = state.turns.findIndex((turn) => turn.answers.includes(answer));
  const turn = state.turns[at];
  return messagesOf(turn.options.system, state.turns.slice(0, at), turn.user);
}

const examples = new Examples(() => {
  conversation.redraw();
  teach.examplesChanged();
});
const teach = new Teach(server, examples, {
  learnt: () => connection.connect(),
  taken: (name) => Boolean(connection.info?.data.some((entry) => entry.name === name)),
  use(name) {
    state.steering = name;
    connection.connect();
    byId("steering").focus();
  },
});
const reader = new Reader(server);
const conversation = new Conversation({
  reader,
  rating: (answer) => examples.rating(() => askedOf(answer), answer.text),
  rate(answer, up) {
    if (!examples.rate(askedOf(answer), answer.text, up)) say("This answer or its conversation is too long for an example.");
  },
  again: askAgain,
  use(answer) {
    const turn = state.turns.find((one) => one.answers.includes(answer));
    map.use(answer === map.used ? null : answer, turn);
    if (map.used) view("panel");
  },
  steps(answer) {
    const at = state.turns.findIndex((turn) => turn.answers.includes(answer));
    const turn = state.turns[at];
    steps.open(answer, turn, messagesOf(turn.options.system, state.turns.slice(0, at), turn.user), connection.info?.model ?? null);
  },
  marks: () => state.marks,
  toggleMarks() {
    state.marks = !state.marks;
    conversation.redraw();
    keepSoon();
  },
});
const steps = new Steps(server);
const map = new MapCard((answer) => conversation.markUsed(answer));
const panel = new Panel(server, state, (table, entry) => map.show(table, entry), () => {
  byId("chip").textContent = panel.label;
  byId("chip").dataset.on = String(panel.request() !== null);
  // two equal answers are no comparison
  compare.disabled = panel.request() === null;
  compare.checked = state.compare && !compare.disabled;
  keepSoon();
});
const connection = new Connection(server, (info, model) => {
  const shape = info.model;
  const facts = shape ? `${shape.architecture}, ${plural(shape.n_layer, "layer")} of ${plural(shape.n_expert, "expert")}, ${shape.n_expert_used} a token` : "no experts";
  byId("model").replaceChildren(el("strong", {}, model.id), ` ${facts}`);
  document.title = `${model.id} \u00b7 steermoe`;
  message.placeholder = `Ask ${model.id}`;
  const examples = EXAMPLES[model.id] ?? [];
  byId("examples-title").hidden = !examples.length;
  byId("examples").replaceChildren(...examples.map((text) => el("li", {}, el("button", { type: "button", onclick: () => ask(text) }, text))));
  panel.load(info, model);
  teach.load();
  reader.start();
  if (early) say("");
  early = false;
});

compare.addEventListener("change", () => {
  state.compare = compare.checked;
  keepSoon();
});
byId("chip").addEventListener("click", () => {
  view("panel");
  byId("steering").focus();
});

//
// settings
//

const SETTINGS = { system: "system", temperature: "temperature", seed: "seed", maxTokens: "max-tokens" };
for (const [name, id] of Object.entries(SETTINGS)) {
  byId(id).value = state.settings[name] ?? "";
  byId(id).addEventListener("input", () => {
    state.settings[name] = byId(id).value;
    keepSoon();
  });
}
byId("settings").open = Object.values(state.settings).some(Boolean);

/** The numbers among the settings as a request has them; null and a message if one cannot be sent. */
function numbers() {
  const found = {};
  for (const [id, field, step] of [["temperature", "temperature", "any"], ["seed", "seed", "1"], ["max-tokens", "max_tokens", "1"]]) {
    const input = byId(id);
    input.step = step; // coarser ones are for the arrows
    if (!input.checkValidity()) {
      const label = document.querySelector(`label[for="${id}"]`).textContent;
      say(`${label}: give a ${step === "1" ? "whole " : ""}number from ${input.min} to ${input.max}, or nothing.`);
      byId("settings").open = true;
      view("panel");
      input.focus();
      return null;
    }
    if (input.value !== "") found[field] = Number(input.value);
  }
  return found;
}

//
// asking
//

async function ask(text) {
  const chosen = numbers();
  if (chosen === null || running) return;
  say("");
  view("chat");
  const steering = panel.request();
  const sides = compare.checked ? [null, steering] : [steering];
  const { seed = Math.floor(Math.random() * SEEDS), ...others } = chosen;
  const messages = messagesOf(state.settings.system, state.turns, text);
  const turn = turnOf(text, seed, sides, { system: state.settings.system ?? "", ...(others.temperature === undefined ? {} : { temperature: others.temperature }) });
  const { turns } = state; // Clear puts others in their place
  turns.push(turn);
  byId("welcome").hidden = true;
  conversation.added(turn);
  running = new AbortController();
  showRunning();
  keepSoon();
  const { signal } = running;
  const body = { messages, seed, ...others, routing: true, return_steered: true, stream_options: { include_usage: true } };
  const one = async (answer, side) => {
    const problem = await follow(server, answer, { ...body, steering: side }, signal, () => {
      conversation.touched(answer);
      keepSoon();
    });
    conversation.ended(answer);
    if (answer.state !== "stopped") connection.met(problem);
  };
  await Promise.all(turn.answers.map((answer, i) => one(answer, sides[i])));
  running = null;
  showRunning();
  if (state.turns === turns) map.use(turn.answers.findLast((answer) => answer.routing) ?? null, turn);
  keep();
}

/** Asks the last question again, under what is chosen now. */
function askAgain() {
  if (running || numbers() === null || !state.turns.length) return;
  const { user } = state.turns.pop();
  conversation.show(state.turns);
  message.focus();
  ask(user);
}

function showRunning() {
  const hadFocus = [byId("stop"), byId("send")].includes(document.activeElement);
  byId("stop").hidden = !running;
  byId("send").hidden = Boolean(running);
  if (hadFocus) message.focus(); // the button under it is gone
}

function grow() {
  message.style.height = "auto";
  message.style.height = `${Math.min(message.scrollHeight + 2, Math.max(120, innerHeight * 0.35))}px`;
}

byId("composer").addEventListener("submit", (event) => {
  event.preventDefault();
  const text = message.value.trim();
  if (!text || running) return;
  if (!connection.info) {
    early = true;
    return say("The server does not answer yet; the message stays here.");
  }
  if (numbers() === null) return;
  message.value = "";
  grow();
  ask(text);
});
message.addEventListener("keydown", (event) => {
  if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
  event.preventDefault();
  byId("composer").requestSubmit();
});
message.addEventListener("input", () => {
  grow();
  keepSoon();
});
byId("stop").addEventListener("click", () => running?.abort());
document.addEventListener("keydown", (event) => {
  if (event.key === "Escape" && !document.querySelector("dialog[open]")) running?.abort();
});

byId("clear").addEventListener("click", () => {
  running?.abort();
  const { turns } = state;
  state.turns = [];
  showTurns();
  keep();
  message.focus();
  if (!turns.length) return say("");
  say("Chat cleared.", ["Undo", () => {
    state.turns = [...turns, ...state.turns];
    showTurns();
    keep();
  }]);
});

function showTurns() {
  conversation.show(state.turns);
  byId("welcome").hidden = state.turns.length > 0;
  const last = state.turns.at(-1) ?? null;
  map.use(last?.answers.findLast((answer) => answer.routing) ?? null, last);
}

message.value = state.draft;
grow();
showTurns();
message.focus();
connection.connect();
