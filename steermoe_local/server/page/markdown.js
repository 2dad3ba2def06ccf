// Markdown of an answer as DOM nodes. The server reads it and answers a tree of elements; here they are made one by one,
// of the kinds below and no others. Text that was not read yet, or cannot be, stands behind them as it is.

import { copy, el } from "./dom.js";
import { Marker } from "./marks.js";

const MOST = 65536; // characters that the server reads at once
const PAUSE = 120; // milliseconds between two readings of a text that grows
const AGAIN = 3000; // milliseconds after which a server that failed is asked again
// One line that means itself, which most short answers are; "4." alone, too, and no list.
const PLAIN = /^(?!\d+[.)]\s+\S)(?!.*:\/\/)[\p{L}\p{N}"'(][\p{L}\p{N} ,;:?!."'()%/]*$/u;
const SAME = new Set(["p", "ul", "li", "blockquote", "thead", "tbody", "tr", "strong", "em", "s", "code", "hr"]);
const LINKS = new Set(["http", "https", "mailto"]);

/** An address that a link may have; null for others. */
export function linkOf(href) {
  try {
    return LINKS.has(new URL(href).protocol.slice(0, -1)) ? href : null;
  } catch {
    return null;
  }
}

function textOf(tree) {
  return tree.text ?? tree.children.map(textOf).join("");
}

/** The nodes of a part of a tree; `leaf(text, at)` gives those of a text. */
function nodes(tree, leaf) {
  if (typeof tree.text === "string") return leaf(tree.text, tree.at);
  const { tag } = tree;
  const inner = () => tree.children.flatMap((child) => nodes(child, leaf));
  if (SAME.has(tag)) return [el(tag, {}, inner())];
  if (/^h[1-6]$/.test(tag)) {
    const level = Number(tag[1]); // the page's own headings are above
    return [el("p", { class: `heading level-${level}`, role: "heading", "aria-level": Math.min(6, level + 2) }, inner())];
  }
  if (tag === "ol") return [el("ol", { start: Number.isSafeInteger(tree.start) ? tree.start : null }, inner())];
  if (tag === "a") {
    const href = linkOf(tree.href);
    return [href === null ? el("span", {}, inner()) : el("a", { href, title: href, target: "_blank", rel: "noopener noreferrer" }, inner())];
  }
  if (tag === "th" || tag === "td") {
    const align = ["left", "center", "right"].includes(tree.align) ? `to-${tree.align}` : null;
    return [el(tag, { class: align, scope: tag === "th" ? "col" : null }, inner())];
  }
  if (tag === "table") return [el("div", { class: "wide-table", tabindex: "0", role: "region", "aria-label": "Table" }, el("table", {}, inner()))];
  if (tag === "pre") {
    const button = el("button", { type: "button", class: "quiet", "aria-label": "Copy this code", onclick: (event) => copy(textOf(tree), event.currentTarget) }, "Copy");
    const language = typeof tree.language === "string" ? tree.language : "";
    const head = el("div", { class: "code-head", "data-language": language }, button);
    return [el("div", { class: "code" }, head, el("pre", { tabindex: "0", "aria-label": `Code ${language}`.trim() }, el("code", {}, inner())))];
  }
  return [el("span", {}, inner())]; // an element that this page does not know
}

/** Has the server read the texts that want it, one after the other. */
export class Reader {
  #server;
  #waiting = new Set();
  #works = false;
  #on = false;

  constructor(server) {
    this.#server = server;
  }

  /** The server answers: from now on it is asked. */
  start() {
    this.#on = true;
    this.#work();
  }

  /** Nothing that waits is wanted any more. */
  clear() {
    this.#waiting.clear();
  }

  want(rendered) {
    this.#waiting.add(rendered);
    this.#work();
  }

  async #work() {
    if (this.#works) return;
    this.#works = true;
    while (this.#on && this.#waiting.size) {
      const now = performance.now();
      const waiting = [...this.#waiting];
      const next = waiting.findLast((one) => one.ready <= now); // the end of a conversation is what is looked at
      if (!next) {
        const soonest = Math.min(...waiting.slice(0, 100).map((one) => one.ready));
        await new Promise((done) => setTimeout(done, soonest - now + 1));
        continue;
      }
      this.#waiting.delete(next);
      const problem = await next.read((text) => this.#server.markdown(text));
      if (problem === null) continue;
      this.#waiting.add(next);
      this.#on = false;
      if (problem.kind !== "key") setTimeout(() => this.start(), AGAIN);
    }
    this.#works = false;
  }
}

/**
 * Shows a text that grows: blocks that did not change keep their elements, so that a long answer costs no more per
 * frame than its last block, and a selection in it stays. Of a text that grew, only what may have changed is read again.
 */
export class Rendered {
  #into;
  #reader;
  #drawn;
  #text = "";
  #spans = [];
  #title = String;
  #blocks = []; // {from, tree, made, key, element}
  #seen = ""; // the beginning of the text that they show
  #stuck = false; // the server reads no more of it
  #tail = el("span", { class: "tail" });

  /** From when on it may be read again, as of performance.now(). */
  ready = 0;

  /** `drawn()` is called after what is shown has changed by itself. */
  constructor(into, reader, drawn = () => {}) {
    this.#into = into;
    this.#reader = reader;
    this.#drawn = drawn;
  }

  /** `spans` of the text are marked as steered; `title(rule)` says by what. */
  show(text, spans = [], title = () => "") {
    if (!text.startsWith(this.#seen)) {
      this.#into.replaceChildren();
      this.ready = 0;
      [this.#blocks, this.#seen, this.#stuck] = [[], "", false];
    }
    [this.#text, this.#spans, this.#title] = [text, spans, title];
    if (this.#blocks.length < 2 && text !== this.#seen && PLAIN.test(text)) {
      this.#take(0, [{ tag: "p", from: 0, children: [{ text, at: 0 }] }], text);
    }
    this.#draw();
    if (this.#unread) this.#reader.want(this);
  }

  get #unread() {
    return !this.#stuck && this.#seen.length < this.#text.length;
  }

  /** Reads on, by `ask(text)`; a Problem if the server did not answer. */
  async read(ask) {
    if (!this.#unread) return null;
    // a line that is not complete can still turn what it begins into a part of the block before it
    const line = this.#seen.lastIndexOf("\n") + 1;
    const kept = Math.max(0, this.#blocks.findLastIndex(({ from }) => from < line));
    const from = this.#blocks[kept]?.from ?? 0;
    const part = this.#text.slice(from, from + MOST);
    const seen = this.#text.slice(0, from) + part;
    let found;
    try {
      found = (await ask(part)).blocks;
    } catch (problem) {
      if (problem.kind !== "refused") return problem;
      found = null;
    }
    this.ready = performance.now() + PAUSE;
    if (!this.#text.startsWith(seen)) {
      this.#reader.want(this); // it is another text by now
      return null;
    }
    this.#stuck = found === null || (part.length === MOST && seen === this.#seen);
    if (found !== null) this.#take(kept, found.map((block) => ({ ...block, from: from + block.from })), seen, from);
    this.#draw();
    if (this.#unread) this.#reader.want(this);
    this.#drawn();
    return null;
  }

  /** These trees take the place of the blocks from `kept` on; they were read from `base` on. */
  #take(kept, trees, seen, base = 0) {
    const old = this.#blocks.splice(kept);
    for (const { from, ...tree } of trees) {
      const made = JSON.stringify([base - from, tree]); // places are counted from `base`
      const same = old[0]?.from === from && old[0].made === made ? old.shift() : null;
      this.#blocks.push(same ?? { from, base, tree, made, key: null, element: null });
    }
    for (const { element } of old) element?.remove();
    this.#seen = seen;
  }

  #draw() {
    const [spans, seen] = [this.#spans, this.#seen.length];
    const [marker, second] = [new Marker(spans), new Marker(spans)];
    this.#tail.remove();
    this.#blocks.forEach((block, i) => {
      const to = this.#blocks[i + 1]?.from ?? seen;
      const key = JSON.stringify(marker.within(block.from, to).map(({ start, end, rule }) => [start - block.from, end - start, rule]));
      if (key === block.key) return;
      const leaf = (text, at) => (Number.isSafeInteger(at) ? second.nodes(text, block.base + at, this.#title) : [text]);
      const [element] = nodes(block.tree, leaf);
      if (block.element) block.element.replaceWith(element);
      else this.#into.append(element);
      Object.assign(block, { key, element });
    });
    const rest = this.#text.slice(seen);
    if (rest.trim()) {
      const blank = this.#blocks.length ? 0 : rest.length - rest.trimStart().length; // as it will be when it is read
      this.#tail.replaceChildren(...marker.nodes(rest.slice(blank), seen + blank, this.#title));
      (this.#open() ?? this.#into).append(this.#tail);
    }
    this.#into.dataset.read = String(!this.#unread);
  }

  /** The element in which the text goes on, if it probably does. */
  #open() {
    const last = this.#blocks.at(-1);
    if (!last?.element || this.#text.startsWith("\n\n", this.#seen.length)) return null;
    if (last.tree.tag === "pre") return last.element.querySelector("code");
    if (!["p", "ul", "ol", "blockquote"].includes(last.tree.tag)) return null;
    let found = last.element;
    while (found.lastElementChild?.matches("p, ul, ol, li, blockquote")) found = found.lastElementChild;
    return found;
  }
}
