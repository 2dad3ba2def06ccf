// The card with the map: what the heat map shows, its legend, the choice of an answer's experts, the list, the dialog.

import { byId, el, plural, signed } from "./dom.js";
import { drawRamp } from "./drawing.js";
import { Heatmap } from "./heatmap.js";

const LISTED = 200; // experts in the list
const SIGNS = { 1: "promoted", "-1": "suppressed", 0: "" };

export class MapCard {
  #table = null;
  #used = null; // the answer whose experts are laid over the map
  #turn = null; // and its turn
  #name = "";
  #onUse;
  #heatmap = new Heatmap({
    canvas: byId("heatmap"),
    cursor: byId("map-cursor"),
    tooltip: byId("tooltip"),
    live: byId("map-live"),
    scroll: byId("map-scroll"),
  });

  /** `onUse(answer)` follows whose experts are shown; null is nobody's. */
  constructor(onUse) {
    this.#onUse = onUse;
    byId("experts").addEventListener("toggle", () => this.#list());
    const dialog = byId("map-dialog");
    byId("enlarge").addEventListener("click", () => {
      byId("map-dialog-title").textContent = this.#name ? `Experts: ${this.#name}` : "Experts";
      byId("map-dialog-place").append(byId("map"));
      dialog.showModal();
    });
    byId("map-close").addEventListener("click", () => dialog.close());
    dialog.addEventListener("close", () => byId("map-place").append(byId("map")));
    matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => drawRamp(byId("ramp")));
  }

  /** The answer whose experts are shown. */
  get used() {
    return this.#used;
  }

  /** Shows a map; `entry` is the registered steering behind it, null for the bare experts of the model. */
  show(table, entry) {
    this.#table = table;
    this.#name = entry?.name ?? "";
    byId("map-card").hidden = !table;
    this.#heatmap.setTable(table);
    if (!table) return;
    const what = entry ? `Map of ${entry.name}` : "The model's experts";
    byId("heatmap").setAttribute("aria-label", `${what}: ${plural(table.n_layer, "layer")} of ${plural(table.n_expert, "expert")}`);
    const { most } = this.#heatmap;
    byId("scale-legend").hidden = !table.rd;
    byId("legend-low").textContent = signed(-most, 2);
    byId("legend-high").textContent = signed(most, 2);
    drawRamp(byId("ramp"));
    for (const mark of ["mark-promoted", "mark-suppressed"]) byId(mark).hidden = !table.signs;
    byId("meaning").textContent = this.#meaning(entry);
    this.#lay();
  }

  #meaning(entry) {
    if (!entry) return "Rows are layers, columns experts. No map is chosen, so there is no RD.";
    if (!this.#table.rd) return "Rows are layers, columns experts. A bias file holds the choice of experts, but no RD.";
    const named = entry.positive && entry.negative;
    const sides = named ? `for ${entry.positive} than for ${entry.negative}` : "for the behaviour than for its opposite";
    return `RD, the risk difference: how much more often an expert is selected ${sides}. Rows are layers.`;
  }

  /** Lays the experts of an answer over the map; `turn` is the question it belongs to. Null: nobody's. */
  use(answer, turn = this.#turn) {
    this.#used = answer;
    this.#turn = turn;
    this.#lay();
  }

  #lay() {
    const fits = this.#heatmap.setUse(this.#used?.routing ?? null);
    byId("mark-used").hidden = !fits;
    this.#onUse(fits ? this.#used : null);
    this.#offer(fits ? this.#used : null);
    this.#list();
  }

  /** The choice between nobody and the answers of the turn. */
  #offer(shown) {
    const box = byId("use");
    const offered = (this.#turn?.answers ?? []).filter((answer) => answer.routing);
    const one = this.#turn?.answers.length === 1;
    box.hidden = !this.#table || !offered.length;
    const focused = box.contains(document.activeElement) ? document.activeElement.value : null;
    box.replaceChildren(
      el("legend", {}, "Used by"),
      ...[null, ...offered].map((answer) => {
        const name = answer === null ? "nobody" : one ? "the answer" : answer.side;
        const radio = el("input", { type: "radio", name: "use", value: name, checked: answer === shown, onchange: () => this.use(answer) });
        return el("label", {}, radio, el("span", {}, name));
      }),
    );
    if (focused) box.querySelector(`input[value="${CSS.escape(focused)}"]`)?.focus();
  }

  /** The chosen experts as rows; where none are chosen, those that the answer used. */
  #list() {
    const rows = byId("expert-rows");
    rows.replaceChildren();
    const table = this.#table;
    if (!table || !byId("experts").open) return;
    const found = [];
    for (let layer = 0; layer < table.n_layer; layer++) {
      for (let expert = 0; expert < table.n_expert; expert++) {
        const about = this.#heatmap.describe(layer, expert);
        if (about.sign || (!table.signs && about.used?.tokens)) found.push(about);
      }
    }
    const weight = (about) => (about.rd === null ? (about.used?.share ?? 0) : Math.abs(about.rd));
    found.sort((a, b) => weight(b) - weight(a));
    for (const { layer, expert, rd, sign, used } of found.slice(0, LISTED)) {
      const cells = [layer, expert, rd === null ? "" : signed(rd), SIGNS[sign], used ? `${Math.round(100 * used.share)}%` : ""];
      rows.append(el("tr", {}, ...cells.map((text) => el("td", {}, String(text)))));
    }
    const rest = found.length - LISTED;
    if (rest > 0) rows.append(el("tr", {}, el("td", { colspan: 5 }, `and ${rest} more`)));
    if (!found.length) rows.append(el("tr", {}, el("td", { colspan: 5 }, "none")));
  }
}
