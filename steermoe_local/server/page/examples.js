// Examples of how answers are wanted: from marks and edits of answers, and typed ones. Kept in this browser's localStorage.

import { byId, el } from "./dom.js";

const PLACE = "steermoe.examples";
const VERSION = 1;
const MOST = 400; // of marks, and of pairs; older ones give way
const MOST_TEXT = 16_000; // characters; longer texts give no example

const isObject = (value) => typeof value === "object" && value !== null && !Array.isArray(value);
const isText = (value) => typeof value === "string" && value.trim() !== "" && value.length <= MOST_TEXT;
const isTalk = (value) => Array.isArray(value) && value.length > 0 && value.length <= 64
  && value.every((one) => isObject(one) && ["system", "user", "assistant"].includes(one.role) && isText(one.content))
  && value.at(-1).role === "user";
const plain = (talk) => talk.map(({ role, content }) => ({ role, content }));
const keyOf = (talk) => JSON.stringify(plain(talk));

const markOf = (value) => (isObject(value) && isTalk(value.messages) && isText(value.text) && typeof value.up === "boolean"
  ? { messages: plain(value.messages), text: value.text, up: value.up } : null);
const pairOf = (value) => (isObject(value) && isTalk(value.prompt) && isText(value.like) && isText(value.unlike) && value.like.trim() !== value.unlike.trim()
  ? { prompt: plain(value.prompt), like: value.like, unlike: value.unlike } : null);

/** What was kept, made whole; whatever is not as it should be is left out. */
export function parsedExamples(json) {
  let kept = null;
  try {
    kept = JSON.parse(json ?? "null");
  } catch {
    // another program's text
  }
  const list = (name, one) => (isObject(kept) && kept.version === VERSION && Array.isArray(kept[name]) ? kept[name].map(one).filter(Boolean).slice(-MOST) : []);
  return { marks: list("marks", markOf), given: list("given", pairOf) };
}

/** Pairs of answers to the same question, one marked as wanted and one as not wanted. */
export function pairsOf(marks) {
  const asked = new Map();
  for (const mark of marks) {
    const key = keyOf(mark.messages);
    if (!asked.has(key)) asked.set(key, { prompt: mark.messages, up: [], down: [] });
    asked.get(key)[mark.up ? "up" : "down"].push(mark.text);
  }
  return [...asked.values()].flatMap(({ prompt, up, down }) => up.slice(0, down.length).map((like, i) => ({ prompt, like, unlike: down[i] })));
}

/** A line of a file of pairs, as `steermoe learn --pairs` reads it. */
export function lineOf({ prompt, like, unlike }) {
  const side = (content) => [...prompt, { role: "assistant", content: content.trim() }];
  return JSON.stringify({ positive: side(like), negative: side(unlike), positive_target: like.trim(), negative_target: unlike.trim() });
}

export class Examples {
  #marks = [];
  #given = []; // edits, and what was typed
  #onChange;

  /** `onChange()` is called when there are other examples. Edited answers come as events `steermoe:edited`. */
  constructor(onChange) {
    this.#onChange = onChange;
    this.#load();
    addEventListener("storage", (event) => {
      if (event.key !== PLACE && event.key !== null) return;
      this.#load();
      onChange();
    });
    document.addEventListener("steermoe:edited", ({ detail }) => {
      if (isObject(detail)) this.#edited(detail);
    });
  }

  /** An answer edited once more goes on from what it was at first. */
  #edited({ messages, before, after }) {
    const first = isTalk(messages) && this.#given.find((one) => one.like === before && keyOf(one.prompt) === keyOf(messages));
    this.add({ prompt: messages, like: after, unlike: first ? first.unlike : before });
  }

  /** true for an answer that is marked as wanted, false for one that is not wanted, null without a mark; `asked()` is its conversation. */
  rating(asked, text) {
    const alike = this.#marks.filter((mark) => mark.text === text);
    if (!alike.length) return null;
    const key = keyOf(asked());
    return alike.find((mark) => keyOf(mark.messages) === key)?.up ?? null;
  }

  /** Marks an answer to a conversation; the mark that it has already is taken away. Returns whether that can be done. */
  rate(messages, text, up) {
    const mark = markOf({ messages, text, up });
    if (!mark) return false;
    const had = this.rating(() => messages, text);
    const key = keyOf(messages);
    this.#marks = this.#marks.filter((one) => one.text !== text || keyOf(one.messages) !== key);
    if (had !== up) this.#marks.push(mark);
    this.#changed();
    return true;
  }

  /** Adds {prompt, like, unlike}; the prompt is a conversation. Returns whether it is an example. */
  add(pair) {
    const found = pairOf(pair);
    if (!found) return false;
    const key = keyOf(found.prompt);
    this.#given = this.#given.filter((one) => one.unlike !== found.unlike || keyOf(one.prompt) !== key); // edited once more
    this.#given.push(found);
    this.#changed();
    return true;
  }

  /** Takes a pair away, with the marks that it came from. */
  remove({ prompt, like, unlike }) {
    const key = keyOf(prompt);
    this.#given = this.#given.filter((one) => one.like !== like || one.unlike !== unlike || keyOf(one.prompt) !== key);
    this.#marks = this.#marks.filter((one) => (one.text !== like && one.text !== unlike) || keyOf(one.messages) !== key);
    this.#changed();
  }

  clear() {
    this.#marks = [];
    this.#given = [];
    this.#changed();
  }

  /** All pairs. */
  get pairs() {
    return [...pairsOf(this.#marks), ...this.#given];
  }

  /** Marks that have no counterpart yet. */
  get single() {
    return this.#marks.length - 2 * pairsOf(this.#marks).length;
  }

  #load() {
    let json = null;
    try {
      json = localStorage.getItem(PLACE);
    } catch {
      // the browser keeps nothing for this page
    }
    ({ marks: this.#marks, given: this.#given } = parsedExamples(json));
  }

  #changed() {
    this.#marks = this.#marks.slice(-MOST);
    this.#given = this.#given.slice(-MOST);
    try {
      localStorage.setItem(PLACE, JSON.stringify({ version: VERSION, marks: this.#marks, given: this.#given }));
    } catch {
      // they are there until the page is left
    }
    this.#onChange();
  }
}

/** A thumb, up or down: drawn (index.html), because few fonts have the sign. */
function hand(up) {
  const svg = byId("hand").content.firstElementChild.cloneNode(true);
  if (!up) svg.firstElementChild.setAttribute("transform", "rotate(180 10 10)");
  return svg;
}

/** The two buttons of an answer: `rating()` is its mark, `rate(up)` changes it. `update(shown)` shows both as they are. */
export function thumbs(rating, rate) {
  const made = [[true, "Wanted: more like this"], [false, "Not wanted: less like this"]].map(([up, title]) =>
    [up, el("button", { type: "button", class: "quiet", title, "aria-label": title, "aria-pressed": "false", onclick: () => rate(up) }, hand(up))]);
  const update = (shown) => {
    const mark = shown ? rating() : null;
    for (const [up, button] of made) {
      button.hidden = !shown;
      button.setAttribute("aria-pressed", String(mark === up));
    }
  };
  return { buttons: made.map(([, button]) => button), update };
}
