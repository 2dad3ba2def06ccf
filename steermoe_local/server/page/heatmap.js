// The map of a model's experts, layers x experts: what it shows of which, and the pointer's and the keyboard's way
// through it. drawing.js draws it.

import { signed } from "./dom.js";
import { LEAST, LEFT, TOP, drawMap } from "./drawing.js";
import { effectLine, effectTables } from "./effects.js";

const SMALLEST = 2; // pixels of a cell: 128 experts fit the panel; a map that is wider still scrolls
const LARGEST = 34;
const NEAR = 130; // pixels

export class Heatmap {
  #canvas;
  #cursor;
  #tooltip;
  #live;
  #scroll;
  #table = null; // {n_layer, n_expert, n_expert_used, rd, signs, effects}
  #effects = {}; // their tables, by action
  #shown = "rd"; // or an action, whose effects are the colours
  #values = null; // [layers][experts], the colours
  #use = null; // {counts, tokens}: selections [layers][experts], tokens [layers]
  #cell = 12;
  #at = { layer: 0, expert: 0 };
  #byKeyboard = false;
  #most = 1;

  /** `parts`: canvas, cursor, tooltip, live and scroll, elements of index.html. */
  constructor(parts) {
    this.#canvas = parts.canvas;
    this.#cursor = parts.cursor;
    this.#tooltip = parts.tooltip;
    this.#live = parts.live;
    this.#scroll = parts.scroll;
    const canvas = this.#canvas;
    for (const name of ["pointermove", "pointerdown"]) {
      canvas.addEventListener(name, (event) => {
        const found = this.#cellAt(event.offsetX, event.offsetY);
        if (found) this.#point(found, false);
        else this.#hide();
      });
    }
    canvas.addEventListener("pointerleave", () => this.#hide());
    canvas.addEventListener("blur", () => this.#hide());
    canvas.addEventListener("focus", () => {
      if (canvas.matches(":focus-visible")) this.#point(this.#at, true);
    });
    canvas.addEventListener("keydown", (event) => this.#key(event));
    // whatever scrolls: the tooltip stands at a place of the window
    document.addEventListener("scroll", () => this.#scrolled(), { capture: true, passive: true });
    new ResizeObserver(() => this.#fit()).observe(this.#scroll);
    matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => this.draw());
  }

  /** The largest |RD|, or |effect|, which has the full colour. */
  get most() {
    return this.#most;
  }

  /** What can be shown as colour: "rd" where the map has it, and the actions whose effects it has. */
  get choices() {
    return [...(this.#table?.rd ? ["rd"] : []), ...Object.keys(this.#effects)];
  }

  /** What is shown as colour. */
  get shown() {
    return this.#shown;
  }

  /** Shows another map; `rd`, `signs` and `effects` may be null. */
  setTable(table) {
    this.#table = table;
    this.#effects = effectTables(table);
    this.#colour(this.#shown);
    if (table) {
      this.#at.layer = Math.min(this.#at.layer, table.n_layer - 1);
      this.#at.expert = Math.min(this.#at.expert, table.n_expert - 1);
    }
    this.#hide();
    this.#fit(true);
  }

  /** Shows RD, or the effects of an action, as colour. */
  show(what) {
    this.#colour(what);
    this.#hide();
    this.draw();
  }

  #colour(what) {
    this.#shown = what in this.#effects ? what : "rd";
    const effects = this.#effects[this.#shown];
    this.#values = effects ? effects.map((row) => row.map((cell) => cell && cell.effect)) : (this.#table?.rd ?? null);
    const all = (this.#values ?? []).flat().map(Math.abs); // |null| is 0
    this.#most = all.reduce((most, value) => Math.max(most, value), LEAST);
  }

  /** Lays the experts that an answer used over the map; null takes them away. A table of another shape is left out. */
  setUse(routing) {
    const table = this.#table;
    const fits = table && routing?.length === table.n_layer && routing.every((row) => row.length === table.n_expert);
    this.#use = fits ? { counts: routing, tokens: routing.map((row) => row.reduce((sum, n) => sum + n, 0) / table.n_expert_used) } : null;
    this.#hide();
    this.draw();
    return Boolean(fits);
  }

  /** What is known of an expert. */
  describe(layer, expert) {
    const { rd, signs } = this.#table;
    const tokens = this.#use?.tokens[layer] ?? 0;
    return {
      layer,
      expert,
      rd: rd ? rd[layer][expert] : null,
      value: this.#values ? this.#values[layer][expert] : null, // what its colour shows
      effects: Object.values(this.#effects).map((rows) => rows[layer][expert]).filter(Boolean),
      sign: signs ? Math.sign(signs[layer][expert]) : 0,
      used: tokens > 0 ? { tokens: this.#use.counts[layer][expert], of: tokens, share: this.#use.counts[layer][expert] / tokens } : null,
    };
  }

  /** Its lines in the tooltip. */
  lines(layer, expert) {
    const about = this.describe(layer, expert);
    const lines = [`Layer ${layer}, expert ${expert}`];
    if (about.rd !== null) lines.push(`RD ${signed(about.rd)}`);
    lines.push(...about.effects.map(effectLine));
    if (about.sign) lines.push(about.sign > 0 ? "promoted" : "suppressed");
    if (about.used?.of === 1) lines.push(about.used.tokens ? "used for this token" : "not used for this token");
    else if (about.used) {
      lines.push(`used for ${Math.round(100 * about.used.share)}% of tokens (${about.used.tokens} of ${Math.round(about.used.of)})`);
    }
    return lines;
  }

  #fit(redraw = false) {
    const table = this.#table;
    if (!table) return;
    const room = this.#scroll.clientWidth - LEFT - 1;
    if (room <= 0) return; // not shown
    const tall = Math.max(300, 0.55 * innerHeight);
    const cell = Math.max(SMALLEST, Math.min(LARGEST, Math.floor(Math.min(room / table.n_expert, tall / table.n_layer))));
    if (cell === this.#cell && !redraw) return;
    this.#cell = cell;
    this.draw();
  }

  /** Draws everything anew. */
  draw() {
    if (!this.#table) return;
    const [canvas, table, cell] = [this.#canvas, this.#table, this.#cell];
    Object.assign(canvas.dataset, { layers: table.n_layer, experts: table.n_expert, cell, left: LEFT, top: TOP });
    drawMap(canvas, { ...table, values: this.#values }, this.#use, cell, this.#most);
  }

  #cellAt(x, y) {
    const table = this.#table;
    if (!table) return null;
    const [layer, expert] = [Math.floor((y - TOP) / this.#cell), Math.floor((x - LEFT) / this.#cell)];
    const inside = layer >= 0 && layer < table.n_layer && expert >= 0 && expert < table.n_expert;
    return inside ? { layer, expert } : null;
  }

  #hide() {
    this.#tooltip.hidden = true;
    this.#cursor.hidden = true;
  }

  #point({ layer, expert }, byKeyboard) {
    if (!this.#table) return;
    this.#at = { layer, expert };
    this.#byKeyboard = byKeyboard;
    const cell = this.#cell;
    const [x, y] = [LEFT + expert * cell, TOP + layer * cell];
    if (byKeyboard) {
      const scroll = this.#scroll;
      if (x < scroll.scrollLeft + LEFT) scroll.scrollLeft = x - LEFT;
      if (x + cell > scroll.scrollLeft + scroll.clientWidth) scroll.scrollLeft = x + cell - scroll.clientWidth;
    }
    const lines = this.lines(layer, expert);
    this.#tooltip.replaceChildren(...lines.map((line) => Object.assign(document.createElement("div"), { textContent: line })));
    if (byKeyboard) this.#live.textContent = lines.join(", "); // the pointer would flood a screen reader
    Object.assign(this.#cursor.style, { width: `${cell}px`, height: `${cell}px`, transform: `translate(${x}px, ${y}px)` });
    this.#cursor.hidden = false;
    this.#tooltip.hidden = false;
    this.#place(x, y);
  }

  #scrolled() {
    if (this.#tooltip.hidden) return;
    if (this.#byKeyboard) this.#place(LEFT + this.#at.expert * this.#cell, TOP + this.#at.layer * this.#cell);
    else this.#hide();
  }

  /** Puts the tooltip beside the cell at (x, y) of the canvas, within the window. */
  #place(x, y) {
    const cell = this.#cell;
    const at = this.#canvas.getBoundingClientRect();
    const size = this.#tooltip.getBoundingClientRect();
    const left = Math.max(4, Math.min(at.left + x + cell + 8, document.documentElement.clientWidth - size.width - 4));
    // above the whole map where that is near, so that it hides no other experts
    const above = at.top + (y < NEAR ? 0 : y) - size.height - 4;
    const top = above >= 4 ? above : at.top + y + cell + 6;
    this.#tooltip.style.transform = `translate(${Math.round(left)}px, ${Math.round(top)}px)`;
  }

  #key(event) {
    const table = this.#table;
    if (!table || event.ctrlKey || event.metaKey || event.altKey) return;
    const { layer, expert } = this.#at;
    const moves = {
      ArrowLeft: [layer, expert - 1],
      ArrowRight: [layer, expert + 1],
      ArrowUp: [layer - 1, expert],
      ArrowDown: [layer + 1, expert],
      Home: [layer, 0],
      End: [layer, table.n_expert - 1],
      PageUp: [0, expert],
      PageDown: [table.n_layer - 1, expert],
    };
    let to = moves[event.key];
    if (event.key === "Escape") this.#hide();
    if (event.key === "n" || event.key === "p") to = this.#nextChosen(event.key === "n" ? 1 : -1);
    if (!to) return;
    event.preventDefault();
    const [row, column] = to;
    this.#point({ layer: Math.max(0, Math.min(table.n_layer - 1, row)), expert: Math.max(0, Math.min(table.n_expert - 1, column)) }, true);
  }

  #nextChosen(step) {
    const { n_layer, n_expert, signs } = this.#table;
    const all = n_layer * n_expert;
    const here = this.#at.layer * n_expert + this.#at.expert;
    for (let i = 1; i <= all && signs; i++) {
      const place = (((here + step * i) % all) + all) % all;
      const [layer, expert] = [Math.floor(place / n_expert), place % n_expert];
      if (signs[layer][expert]) return [layer, expert];
    }
    return [this.#at.layer, this.#at.expert];
  }
}
