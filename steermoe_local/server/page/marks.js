// The text of an answer that was steered: spans {start, end, rule} of it, in order, in JavaScript's characters.

import { el } from "./dom.js";

/** Adds `added` characters behind `length` others; `rule` steered them, null: none did. */
export function addSpan(spans, length, added, rule) {
  if (rule === null || !added) return;
  const last = spans.at(-1);
  if (last?.end === length && last.rule === rule) last.end += added;
  else spans.push({ start: length, end: length + added, rule });
}

/** Spans that were kept, without those that are none. */
export function spansOf(kept) {
  let end = 0;
  const found = [];
  for (const span of Array.isArray(kept) ? kept : []) {
    const numbers = [span?.start, span?.end, span?.rule];
    if (!numbers.every(Number.isSafeInteger) || span.start < end || span.end <= span.start || span.rule < 0) continue;
    end = span.end;
    found.push({ start: span.start, end, rule: span.rule });
  }
  return found;
}

/**
 * Looks spans up from left to right, so that all look-ups together cost as much as there are spans: each asks for a part
 * of the text that begins no further left than the one before.
 */
export class Marker {
  #spans;
  #next = 0;

  constructor(spans) {
    this.#spans = spans;
  }

  /** The parts of spans within a part of the text. */
  within(start, end) {
    const spans = this.#spans;
    while (this.#next < spans.length && spans[this.#next].end <= start) this.#next++;
    const found = [];
    for (let i = this.#next; i < spans.length && spans[i].start < end; i++) {
      found.push({ ...spans[i], start: Math.max(start, spans[i].start), end: Math.min(end, spans[i].end) });
    }
    return found;
  }

  /** Text that begins at `at`, with what was steered as elements; `title(rule)` says what steered it. */
  nodes(text, at, title) {
    const nodes = [];
    let behind = 0;
    for (const { start, end, rule } of this.within(at, at + text.length)) {
      if (start - at > behind) nodes.push(text.slice(behind, start - at));
      behind = end - at;
      nodes.push(el("mark", { class: "steered", title: title(rule) }, text.slice(start - at, behind)));
    }
    if (behind < text.length) nodes.push(text.slice(behind));
    return nodes;
  }
}

/** Whether the text of an answer is worth marking: it was answered under a plan, or not all of it was steered. */
export function isMarked({ steered, applied, text, reasoning }) {
  if (!steered) return false;
  if (Array.isArray(applied?.rules)) return true;
  const marked = [...steered.answer, ...steered.reasoning].reduce((sum, { start, end }) => sum + end - start, 0);
  return marked > 0 && marked < text.length + reasoning.length;
}

/** What steered a text: "Steered by rule 2: answer[0:32]: careful +0 -20". `applied` is what the server says of an answer. */
export function ruleTitle(applied, rule) {
  const rules = Array.isArray(applied?.rules) ? applied.rules : [];
  if (typeof rules[rule] !== "string") return "Steered";
  return rules.length === 1 ? `Steered by ${rules[0]}` : `Steered by rule ${rule + 1}: ${rules[rule]}`;
}
