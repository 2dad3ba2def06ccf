// The page: a chat with the served model, steered and side by side, and the map of its experts.

import { Server } from "./api.js";
import { Replacement, changeAnswer, follow, messagesOf, turnAt, turnOf } from "./asking.js";
import { Chats } from "./chats.js";
import { Connection } from "./connection.js";
import { Conversation } from "./conversation.js";
import { byId, debounced, el, plural } from "./dom.js";
import { MapCard } from "./mapcard.js";
import { Reader } from "./markdown.js";
import { Panel } from "./panel.js";
import { fill, listen, numbers } from "./settings.js";
import { Steps } from "./steps.js";
import { Teach } from "./teach.js";
import { view } from "./view.js";

const SEEDS = 2 ** 31;
// What the embedded model can be asked; others answer what they like.
const EXAMPLES = {
  tiny: ["Count from three to nine.", "Which number comes after three?", "Document: The metal of Kelava is lead. Question: Name the metal of Kelava."],
};

const server = new Server();
const chats = new Chats({
  onOpen: show,
  onRemove(chat) {
    if (asked === chat) running?.abort();
  },
  mayTake: () => !running && !dirty && !message.value.trim(),
});
let state = chats.current;
const message = byId("message");
const compare = byId("compare");
let running = null; // AbortController of the answers that come
let asked = null; // the chat that they are of
let early = false; // a message was to be sent before the server answered

//
// keeping, and saying so
//

const soon = debounced(keep, 500);
let dirty = false; // the chat that is shown has changes that are not kept
let full = false;
let leaving = false;

function keepSoon() {
  dirty = true;
  soon();
}

/** Keeps the chat that is shown, or another one. */
function keep(chat = state) {
  if (leaving) return; // what breaks off now breaks off because of that
  if (chat === state) {
    state.draft = message.value;
    dirty = false;
  }
  const kept = chats.keep(chat);
  if (!kept && !full) say("This browser has no room to keep the chat over a reload. Export it, or delete other chats.");
  full = !kept;
}

addEventListener("pagehide", () => {
  if (dirty) keep(); // if not, another tab may have changed it since
  if (asked && asked !== state) keep(asked);
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

//
// the parts
//

const teach = new Teach(server, {
  asked: (answer) => turnAt(state.turns, answer)[1],
  redraw: () => conversation.redraw(),
  say,
  reload: () => connection.connect(),
  taken: (name) => Boolean(connection.info?.data.some((entry) => entry.name === name)),
  choose: (name) => (state.steering = name),
});
const reader = new Reader(server);
const conversation = new Conversation({
  reader,
  rating: (answer) => teach.rating(answer),
  rate: (answer, up) => teach.rate(answer, up),
  again: askAgain,
  askInstead(turn, text) {
    const at = state.turns.indexOf(turn);
    if (at < 0 || running || !connection.info || chosenNumbers() === null) return false;
    ask(text.trim(), at);
    return true;
  },
  edited(answer, after) {
    const at = state.turns.findIndex((turn) => turn.answers.includes(answer));
    if (at < 0 || answer.text === after) return;
    changeAnswer(answer, state.turns[at], state.turns.slice(0, at), after);
    conversation.ended(answer);
    state.changed = Date.now();
    keep();
  },
  use(answer) {
    const turn = state.turns.find((one) => one.answers.includes(answer));
    map.use(answer === map.used ? null : answer, turn);
    if (map.used) view("panel");
  },
  steps(answer) {
    const [turn, messages] = turnAt(state.turns, answer);
    steps.open(answer, turn, messages, connection.info?.model ?? null);
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

listen((name, text) => {
  state.settings[name] = text;
  keepSoon();
});

/** The numbers among the settings; null, with the message shown, if one cannot be sent. */
const chosenNumbers = () => numbers((text, input) => {
  say(text);
  byId("settings").open = true;
  view("panel");
  input.focus();
});

//
// asking
//

/** Asks a question behind the first `at` turns. Those after them give way when an answer has begun, not before. */
async function ask(text, at = state.turns.length) {
  const chosen = chosenNumbers();
  if (chosen === null || running) return;
  say("");
  view("chat");
  const chat = state;
  const steering = panel.request();
  const sides = compare.checked ? [null, steering] : [steering];
  const { seed = Math.floor(Math.random() * SEEDS), ...others } = chosen;
  const messages = messagesOf(chat.settings.system, chat.turns.slice(0, at), text);
  const turn = turnOf(text, seed, sides, { system: chat.settings.system ?? "", ...(others.temperature === undefined ? {} : { temperature: others.temperature }) });
  const replacement = new Replacement(chat, turn, at);
  const begin = () => {
    if (replacement.begin() && state === chat && !conversation.has(turn)) showTurns();
  };
  byId("welcome").hidden = true;
  conversation.added(turn, at);
  if (!replacement.loses) begin();
  [running, asked] = [new AbortController(), chat];
  showRunning();
  if (replacement.begun) keepSoon();
  const { signal } = running;
  const body = { messages, seed, ...others, routing: true, return_steered: true, stream_options: { include_usage: true } };
  const one = async (answer, side) => {
    const problem = await follow(server, answer, { ...body, steering: side }, signal, () => {
      if (answer.text || answer.reasoning) begin();
      conversation.touched(answer);
      if (state === chat) keepSoon();
    });
    conversation.ended(answer);
    if (answer.state !== "stopped") connection.met(problem);
  };
  await Promise.all(turn.answers.map((answer, i) => one(answer, sides[i])));
  running = asked = null;
  showRunning();
  if (turn.answers.some((answer) => answer.state === "done")) begin();
  if (!replacement.begun) {
    if (state === chat) showTurns();
    const problem = turn.answers.find((answer) => answer.problem)?.problem;
    if (problem) say(`${problem.title} ${problem.detail} The earlier answer stays.`, ["Try again", () => ask(text, at)]);
  } else if (replacement.words) {
    say(replacement.words, ["Undo", () => {
      replacement.undo();
      if (state === chat) showTurns();
      keep(chat);
    }]);
  }
  if (state === chat && chat.turns.includes(turn)) map.use(turn.answers.findLast((answer) => answer.routing) ?? null, turn);
  keep(chat);
}

/** Asks the last question again, under what is chosen now. */
function askAgain() {
  if (running || chosenNumbers() === null || !state.turns.length) return;
  message.focus();
  ask(state.turns.at(-1).user, state.turns.length - 1);
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
  if (chosenNumbers() === null) return;
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
  if (asked === state) running?.abort();
  const chat = state;
  const { turns } = chat;
  chat.turns = [];
  showTurns();
  keep();
  message.focus();
  if (!turns.length) return say("");
  say("Chat cleared.", ["Undo", () => {
    chat.turns = [...turns, ...chat.turns];
    if (state === chat) showTurns();
    keep(chat);
  }]);
});

function showTurns() {
  conversation.show(state.turns);
  byId("welcome").hidden = state.turns.length > 0;
  const last = state.turns.at(-1) ?? null;
  map.use(last?.answers.findLast((answer) => answer.routing) ?? null, last);
}

/** Shows another chat, with its steering and settings; an answer that comes in the one before it goes on. */
function show(chat) {
  if (dirty && chat !== state && state.id !== chat.id) keep();
  state = chat;
  dirty = false;
  fill(state.settings);
  message.value = state.draft;
  say("");
  view("chat");
  panel.use(state);
  grow();
  showTurns();
  message.focus();
}

show(state);
connection.connect();
