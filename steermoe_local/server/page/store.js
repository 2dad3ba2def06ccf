// What a reload keeps: chats, each with its choices and settings, in this browser's localStorage, one entry for each.

import { spansOf } from "./marks.js";

const OLD = "steermoe.chat"; // the only chat, of earlier versions
const PLACES = "steermoe.chat.";
const CURRENT = "steermoe.current"; // of a tab
const VERSION = 1;
export const MOST_OF_TITLE = 200;
const WITH_ROUTING = 20; // of the latest answers; a table of a large model has thousands of numbers

const isObject = (value) => typeof value === "object" && value !== null && !Array.isArray(value);
const text = (value, otherwise = "") => (typeof value === "string" ? value : otherwise);
const STATES = ["done", "stopped", "error"];

/** A name for a new chat's entry; randomUUID is there only at https and on this machine. */
function newId() {
  return `${Date.now().toString(36)}-${Math.random().toString(36).slice(2, 10)}`;
}

/** A chat with nothing in it. `changed` is when it was, in milliseconds; `title` is empty until somebody gives it one. */
export function empty(id = newId()) {
  return { id, title: "", changed: 0, turns: [], steering: null, choices: {}, compare: false, marks: true, settings: {}, draft: "" };
}

function answerOf(value) {
  if (!isObject(value)) return null;
  const answer = {
    side: value.side === "unsteered" ? "unsteered" : "steered",
    text: text(value.text),
    reasoning: text(value.reasoning),
    state: STATES.includes(value.state) ? value.state : "stopped", // it was being written when the page went away
    applied: isObject(value.applied) ? value.applied : null,
    facts: isObject(value.facts) ? value.facts : {},
    problem: isObject(value.problem) ? { title: text(value.problem.title), detail: text(value.problem.detail) } : null,
    routing: null,
    steered: isObject(value.steered) ? { answer: spansOf(value.steered.answer), reasoning: spansOf(value.steered.reasoning) } : null,
  };
  if (value.asked === null || typeof value.asked === "string" || isObject(value.asked)) answer.asked = value.asked; // else it is not known
  if (typeof value.original === "string") answer.original = value.original; // what it was before it was edited
  const rows = value.routing;
  if (Array.isArray(rows) && rows.every((row) => Array.isArray(row) && row.every(Number.isFinite))) answer.routing = rows;
  return answer;
}

/** What was kept, made whole; whatever is not as it should be is left out. */
export function parsed(json, id) {
  const state = empty(id);
  let kept = null;
  try {
    kept = JSON.parse(json ?? "null");
  } catch {
    return state;
  }
  if (!isObject(kept) || kept.version !== VERSION) return state;
  for (const turn of Array.isArray(kept.turns) ? kept.turns : []) {
    if (!isObject(turn) || typeof turn.user !== "string" || !Array.isArray(turn.answers)) continue;
    const answers = turn.answers.slice(0, 2).map(answerOf).filter(Boolean);
    const options = { system: text(turn.options?.system) };
    if (Number.isFinite(turn.options?.temperature)) options.temperature = turn.options.temperature;
    if (answers.length) state.turns.push({ user: turn.user, seed: Number.isSafeInteger(turn.seed) ? turn.seed : 0, options, answers });
  }
  state.title = text(kept.title).slice(0, MOST_OF_TITLE);
  state.changed = Number.isFinite(kept.changed) ? kept.changed : 0;
  state.steering = typeof kept.steering === "string" ? kept.steering : null;
  state.compare = kept.compare === true;
  state.marks = kept.marks !== false;
  state.draft = text(kept.draft);
  if (isObject(kept.choices)) {
    for (const [name, choice] of Object.entries(kept.choices)) if (isObject(choice)) state.choices[name] = choice;
  }
  if (isObject(kept.settings)) {
    for (const name of ["system", "temperature", "seed", "maxTokens"]) {
      if (typeof kept.settings[name] === "string") state.settings[name] = kept.settings[name];
    }
  }
  return state;
}

/** The id of the chat that an entry of localStorage is of; null for other entries. */
export function idOf(place) {
  return place?.startsWith(PLACES) ? place.slice(PLACES.length) : null;
}

/** All chats that were kept, by their ids; the one of an earlier version is taken over. */
export function loadAll() {
  const found = new Map();
  try {
    takeOver();
    for (const place of Object.keys(localStorage)) {
      const id = idOf(place);
      if (id) found.set(id, parsed(localStorage.getItem(place), id));
    }
  } catch {
    // the browser keeps nothing for this page
  }
  return found;
}

/** Moves the chat of an earlier version to where chats are, and shows it; if there is no room for it, it stays where it is. */
function takeOver() {
  const old = localStorage.getItem(OLD);
  if (old === null) return;
  const chat = parsed(old);
  if (!chat.turns.length && chat.steering === null && !chat.draft) return; // nothing that can be read
  localStorage.removeItem(OLD); // there is not room for two, perhaps
  if (save({ ...chat, changed: Date.now() })) saveCurrent(chat.id);
  else localStorage.setItem(OLD, old);
}

/** The chat that this tab showed last. */
export function currentId() {
  try {
    return sessionStorage.getItem(CURRENT);
  } catch {
    return null;
  }
}

/** Keeps the chat; false if the browser has no room for it: what was kept of it before stays then. */
export function save(chat) {
  const { id, ...state } = chat;
  for (const n of [WITH_ROUTING, 0]) {
    let left = n;
    const turns = state.turns.toReversed().map((turn) => ({
      ...turn,
      answers: turn.answers.map((answer) => ({ ...answer, routing: left-- > 0 ? answer.routing : null, steered: n ? answer.steered : null })),
    }));
    try {
      localStorage.setItem(PLACES + id, JSON.stringify({ ...state, version: VERSION, turns: turns.reverse() }));
      return true;
    } catch {
      continue; // full: once more without the routing and the marks
    }
  }
  return false;
}

/** Notes which chat this tab shows. */
export function saveCurrent(id) {
  try {
    sessionStorage.setItem(CURRENT, id);
  } catch {
    // the next reload shows the chat that changed last
  }
}

/** Forgets a chat. */
export function forget(id) {
  try {
    localStorage.removeItem(PLACES + id);
  } catch {
    // it was not kept
  }
}
