// A small part of Markdown, as DOM nodes: fenced code, headings, lists, `code`, **bold**, *italic*. No links, images
// or HTML: whatever else stands in a text is shown as it stands. Nothing here parses markup.

import { el } from "./dom.js";

// None of these takes more than linear time, whatever a model writes.
const FENCE = /^ {0,3}(`{3,}|~{3,})(.*)$/;
const HEADING = /^ {0,3}(#{1,4})[ \t]+(\S.*)$/;
const ITEM = /^( {0,12})([-*+]|\d{1,9}[.)])[ \t]+(\S.*)$/;
const INLINE = /(?<!`)(`+)([^`]|[^`][^]*?[^`])\1(?!`)|\*\*(?=\S)((?:[^*]|\*(?!\*))+?)\*\*|(?<![\w*])\*(?=[^\s*])([^*\n]+?)\*(?![\w*])/g;

/** The blocks of a text, each {kind, ...} with plain strings. */
export function blocks(text) {
  const found = [];
  let paragraph = [];
  const end = () => {
    while (paragraph.length && !paragraph.at(-1).trim()) paragraph.pop();
    if (paragraph.length) found.push({ kind: "text", text: paragraph.join("\n") });
    paragraph = [];
  };
  const lines = text.split(/\r\n|\r|\n/);
  for (let i = 0; i < lines.length; i++) {
    const line = lines[i];
    let match;
    if ((match = FENCE.exec(line)) && !(match[1][0] === "`" && match[2].includes("`"))) {
      end();
      const closing = new RegExp(`^ {0,3}${match[1][0]}{${match[1].length},}\\s*$`);
      const code = [];
      while (++i < lines.length && !closing.test(lines[i])) code.push(lines[i]);
      found.push({ kind: "code", language: match[2].trim().split(/\s/, 1)[0], text: code.join("\n") });
    } else if ((match = HEADING.exec(line))) {
      end();
      found.push({ kind: "heading", level: match[1].length, text: match[2].trimEnd() });
    } else if ((match = ITEM.exec(line))) {
      end();
      const ordered = /\d/.test(match[2]);
      const item = { depth: Math.min(3, Math.floor(match[1].length / 2)), mark: ordered ? match[2] : "\u2022", text: match[3] };
      const last = found.at(-1);
      if (last?.kind === "list") last.items.push(item);
      else found.push({ kind: "list", items: [item] });
    } else if (!line.trim()) {
      end();
    } else if (!paragraph.length && found.at(-1)?.kind === "list" && /^ {2,}\S/.test(line) && lines[i - 1].trim()) {
      found.at(-1).items.at(-1).text += `\n${line.trim()}`; // goes on in the item
    } else {
      paragraph.push(line);
    }
  }
  end();
  return found;
}

/** Text nodes and elements of one run of text. */
export function inline(text) {
  const nodes = [];
  let behind = 0;
  for (const match of text.matchAll(INLINE)) {
    if (match.index > behind) nodes.push(text.slice(behind, match.index));
    if (match[2] !== undefined) nodes.push(el("code", {}, match[2]));
    else if (match[3] !== undefined) nodes.push(el("strong", {}, ...inline(match[3])));
    else nodes.push(el("em", {}, ...inline(match[4])));
    behind = match.index + match[0].length;
  }
  if (behind < text.length) nodes.push(text.slice(behind));
  return nodes;
}

function node(block) {
  switch (block.kind) {
    case "code":
      return el("pre", { class: "code", tabindex: "0", "data-language": block.language || null }, el("code", {}, block.text));
    case "heading":
      return el("p", { class: `heading level-${block.level}` }, ...inline(block.text));
    case "list":
      return el(
        "ul",
        { class: "list" },
        ...block.items.map((item) =>
          el("li", { class: `depth-${item.depth}` }, el("span", { class: "bullet" }, item.mark), el("span", {}, ...inline(item.text))),
        ),
      );
    default:
      return el("p", {}, ...inline(block.text));
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

  show(text) {
    const wanted = blocks(text).map((block) => ({ key: JSON.stringify(block), block }));
    let same = 0;
    while (same < wanted.length && same < this.#shown.length && wanted[same].key === this.#shown[same].key) same++;
    for (const old of this.#shown.splice(same)) old.element.remove();
    for (const { key, block } of wanted.slice(same)) {
      const element = node(block);
      this.#into.append(element);
      this.#shown.push({ key, element });
    }
  }
}
