// A small part of Markdown, as DOM nodes: fenced code, headings, lists, `code`, **bold**, *italic*. No links, images
// or HTML: whatever else stands in a text is shown as it stands. Nothing here parses markup.

import { el } from "./dom.js";
import { Marker } from "./marks.js";

// None of these takes more than linear time, whatever a model writes.
const FENCE = /^ {0,3}(`{3,}|~{3,})(.*)$/;
const HEADING = /^ {0,3}(#{1,4})[ \t]+(\S.*)$/;
const ITEM = /^( {0,12})([-*+]|\d{1,9}[.)])[ \t]+(\S.*)$/;
const INLINE = /(?<!`)(`+)([^`]|[^`][^]*?[^`])\1(?!`)|\*\*(?=\S)((?:[^*]|\*(?!\*))+?)\*\*|(?<![\w*])\*(?=[^\s*])([^*\n]+?)\*(?![\w*])/g;

/** The lines of a text, and where in it each begins. */
function linesOf(text) {
  const [lines, starts] = [[], []];
  let start = 0;
  for (const { index, 0: { length } } of text.matchAll(/\r\n|\r|\n/g)) {
    lines.push(text.slice(start, index));
    starts.push(start);
    start = index + length;
  }
  return [[...lines, text.slice(start)], [...starts, start]];
}

/** The blocks of a text, each {kind, parts, ...}; parts are its lines, each [text, where in the whole text it begins]. */
function blocks(text) {
  const found = [];
  let paragraph = [];
  const end = () => {
    while (paragraph.length && !paragraph.at(-1)[0].trim()) paragraph.pop();
    if (paragraph.length) found.push({ kind: "text", parts: paragraph });
    paragraph = [];
  };
  const [lines, starts] = linesOf(text);
  for (let i = 0; i < lines.length; i++) {
    const line = lines[i];
    const at = starts[i];
    let match;
    if ((match = FENCE.exec(line)) && !(match[1][0] === "`" && match[2].includes("`"))) {
      end();
      const closing = new RegExp(`^ {0,3}${match[1][0]}{${match[1].length},}\\s*$`);
      const code = [];
      while (++i < lines.length && !closing.test(lines[i])) code.push([lines[i], starts[i]]);
      found.push({ kind: "code", language: match[2].trim().split(/\s/, 1)[0], parts: code });
    } else if ((match = HEADING.exec(line))) {
      end();
      found.push({ kind: "heading", level: match[1].length, parts: [[match[2].trimEnd(), at + line.length - match[2].length]] });
    } else if ((match = ITEM.exec(line))) {
      end();
      const ordered = /\d/.test(match[2]);
      const item = { depth: Math.min(3, Math.floor(match[1].length / 2)), mark: ordered ? match[2] : "\u2022", parts: [[match[3], at + line.length - match[3].length]] };
      const last = found.at(-1);
      if (last?.kind === "list") last.items.push(item);
      else found.push({ kind: "list", items: [item] });
    } else if (!line.trim()) {
      end();
    } else if (!paragraph.length && found.at(-1)?.kind === "list" && /^ {2,}\S/.test(line) && lines[i - 1].trim()) {
      found.at(-1).items.at(-1).parts.push([line.trim(), at + line.length - line.trimStart().length]); // goes on in the item
    } else {
      paragraph.push([line, at]);
    }
  }
  end();
  return found;
}

/** Lines as one text, and the spans that `marker` finds in them, moved to where they are in it. */
function joined(parts, marker) {
  const spans = [];
  let length = 0;
  for (const [line, at] of parts) {
    for (const { start, end, rule } of marker.within(at, at + line.length)) {
      const last = spans.at(-1);
      const moved = { start: length + start - at, end: length + end - at, rule };
      if (last?.end === moved.start - 1 && start === at && last.rule === rule) last.end = moved.end; // over the line's end
      else spans.push(moved);
    }
    length += line.length + 1;
  }
  return { text: parts.map(([line]) => line).join("\n"), spans };
}

/** A block without places of the whole text, which change when the text before it does. */
function laid({ parts, items, ...block }, marker) {
  if (items) return { ...block, items: items.map((item) => laid(item, marker)) };
  return { ...block, ...joined(parts, marker) };
}

/** Text nodes and elements of one run of text; `leaf(text, at)` gives those of a part without further markup. */
function inline(text, leaf, at = 0) {
  const nodes = [];
  const add = (more) => more.forEach((one) => nodes.push(one)); // spread as arguments, many of them would be too many
  let behind = 0;
  for (const match of text.matchAll(INLINE)) {
    const here = at + match.index;
    if (match.index > behind) add(leaf(text.slice(behind, match.index), at + behind));
    if (match[2] !== undefined) nodes.push(el("code", {}, leaf(match[2], here + match[1].length)));
    else if (match[3] !== undefined) nodes.push(el("strong", {}, inline(match[3], leaf, here + 2)));
    else nodes.push(el("em", {}, inline(match[4], leaf, here + 1)));
    behind = match.index + match[0].length;
  }
  if (behind < text.length) add(leaf(text.slice(behind), at + behind));
  return nodes;
}

function node(block, title) {
  const leafOf = ({ spans }) => {
    const marker = new Marker(spans);
    return spans.length ? (text, at) => marker.nodes(text, at, title) : (text) => [text];
  };
  const run = (part) => inline(part.text, leafOf(part));
  switch (block.kind) {
    case "code":
      return el("pre", { class: "code", tabindex: "0", "data-language": block.language || null }, el("code", {}, leafOf(block)(block.text, 0)));
    case "heading":
      return el("p", { class: `heading level-${block.level}` }, run(block));
    case "list":
      return el(
        "ul",
        { class: "list" },
        block.items.map((item) =>
          el("li", { class: `depth-${item.depth}` }, el("span", { class: "bullet" }, item.mark), el("span", {}, run(item))),
        ),
      );
    default:
      return el("p", {}, run(block));
  }
}

/**
 * Shows a text that grows: blocks that did not change keep their elements, so that a long answer costs no more per
 * frame than its last block, and a selection in it stays.
 */
export class Rendered {
  #into;
  #shown = [];

  constructor(into) {
    this.#into = into;
  }

  /** `spans` of the text are marked as steered; `title(rule)` says by what. */
  show(text, spans = [], title = () => "") {
    const marker = new Marker(spans);
    const wanted = blocks(text).map((block) => laid(block, marker)).map((block) => ({ key: JSON.stringify(block), block }));
    let same = 0;
    while (same < wanted.length && same < this.#shown.length && wanted[same].key === this.#shown[same].key) same++;
    for (const old of this.#shown.splice(same)) old.element.remove();
    for (const { key, block } of wanted.slice(same)) {
      const element = node(block, title);
      this.#into.append(element);
      this.#shown.push({ key, element });
    }
  }
}
