// What a reload keeps: the conversation, the choices and the settings, in this browser's localStorage.

import { spansOf } from "./marks.js";

const PLACE = "steermoe.chat";
const VERSION = 1;
const WITH_ROUTING = 20; // of the latest answers; a table of a large model has thousands of numbers

const isObject = (value) => typeof value === "object" && value !== null && !Array.isArray(value);
const text = (value, otherwise = "") => (typeof value === "string" ? value : otherwise);
const STATES = ["done", "stopped", "error"];

/** A conversation with nothing in it. */
export function empty() {
  return { turns: [], steering: null, choices: {}, compare: false, marks: true, settings: {}, draft: "" };
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
  const rows = value.routing;
  if (Array.isArray(rows) && rows.every((row) => Array.isArray(row) && row.every(Number.isFinite))) answer.routing = rows;
  return answer;
}

/** What was kept, made whole; whatever is not as it should be is left out. */
export function parsed(json) {
  const state = empty();
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

/** Reads what was kept. */
export function load() {
  try {
    return parsed(localStorage.getItem(PLACE));
  } catch {
    return empty(); // the browser keeps nothing for this page
  }
}

/** Keeps the state; false if the browser has no room for it. */
export function save(state) {
  for (const n of [WITH_ROUTING, 0]) {
    let left = n;
    const turns = state.turns.toReversed().map((turn) => ({
      ...turn,
      answers: turn.answers.map((answer) => ({ ...answer, routing: left-- > 0 ? answer.routing : null, steered: n ? answer.steered : null })),
    }));
    try {
      localStorage.setItem(PLACE, JSON.stringify({ ...state, version: VERSION, turns: turns.reverse() }));
      return true;
    } catch {
      continue; // full: once more without the routing and the marks
    }
  }
  return false;
}
