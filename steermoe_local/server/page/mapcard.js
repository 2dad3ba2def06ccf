// The card with the map: what the heat map shows, its legend, the choice of an answer's experts, the list, the dialog.

import { byId, el, plural, signed } from "./dom.js";
import { drawRamp } from "./drawing.js";
import { effectMeaning } from "./effects.js";
import { Heatmap } from "./heatmap.js";

const LISTED = 200; // experts in the list
const SHOWN = { rd: "RD", promote: "promote", suppress: "suppress" };
const SIGNS = { 1: "promoted", "-1": "suppressed", 0: "" };

export class MapCard {
  #table = null;
  #used = null; // the answer whose experts are laid over the map
  #turn = null; // and its turn
  #name = "";
  #entry = null;
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
    this.#entry = entry;
    this.#heatmap.setTable(table);
    if (!table) return;
    this.#describe();
    for (const mark of ["mark-promoted", "mark-suppressed"]) byId(mark).hidden = !table.signs;
    this.#offerShown();
    this.#lay();
  }

  /** Says what the colours are. */
  #describe() {
    const [table, entry] = [this.#table, this.#entry];
    const what = entry ? `Map of ${entry.name}` : "The model's experts";
    const { most, shown } = this.#heatmap;
    const effect = shown === "rd" ? "" : `, effects of the action ${shown}`;
    byId("heatmap").setAttribute("aria-label", `${what}: ${plural(table.n_layer, "layer")} of ${plural(table.n_expert, "expert")}${effect}`);
    byId("scale-legend").hidden = !table.rd;
    byId("legend-low").textContent = signed(-most, 2);
    byId("legend-high").textContent = signed(most, 2);
    drawRamp(byId("ramp"));
    byId("meaning").textContent = this.#meaning(entry);
  }

  /** The choice between RD and the effects, where the map has any. */
  #offerShown() {
    const box = byId("shown");
    const { choices, shown } = this.#heatmap;
    box.hidden = choices.length < 2;
    const focused = box.contains(document.activeElement) ? document.activeElement.value : null;
    const show = (what) => {
      this.#heatmap.show(what);
      this.#describe();
      this.#list();
    };
    box.replaceChildren(
      el("legend", {}, "Colour"),
      ...choices.map((what) => {
        const radio = el("input", { type: "radio", name: "shown", value: what, checked: what === shown, onchange: () => show(what) });
        const effect = what === "rd" ? null : el("span", { class: "hidden" }, "effect of the action ");
        return el("label", {}, radio, el("span", {}, effect, SHOWN[what]));
      }),
    );
    if (focused) box.querySelector(`input[value="${CSS.escape(focused)}"]`)?.focus();
  }

  #meaning(entry) {
    if (!entry) return "Rows are layers, columns experts. No map is chosen, so there is no RD.";
    if (entry.kind === "plan") return "Rows are layers, columns experts. A plan has steerings of its own for its rules.";
    if (!this.#table.rd) return "Rows are layers, columns experts. A bias file holds the choice of experts, but no RD.";
    const { shown } = this.#heatmap;
    if (shown !== "rd") return effectMeaning(shown, this.#table.effects, entry);
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
    const actions = this.#heatmap.choices.filter((what) => what !== "rd");
    for (const action of ["promote", "suppress"]) byId(`column-${action}`).hidden = !actions.includes(action);
    if (!table || !byId("experts").open) return;
    const found = [];
    for (let layer = 0; layer < table.n_layer; layer++) {
      for (let expert = 0; expert < table.n_expert; expert++) {
        const about = this.#heatmap.describe(layer, expert);
        if (about.sign || (!table.signs && about.used?.tokens)) found.push(about);
      }
    }
    const weight = (about) => (about.rd === null ? (about.used?.share ?? 0) : Math.abs(about.value));
    found.sort((a, b) => weight(b) - weight(a));
    for (const { layer, expert, rd, effects, sign, used } of found.slice(0, LISTED)) {
      const tried = actions.map((action) => effects.find((row) => row.action === action));
      const told = tried.map((row) => (row ? `${signed(row.effect)}${row.significant ? "*" : ""}` : ""));
      const cells = [layer, expert, rd === null ? "" : signed(rd), ...told, SIGNS[sign], used ? `${Math.round(100 * used.share)}%` : ""];
      rows.append(el("tr", {}, ...cells.map((text) => el("td", {}, String(text)))));
    }
    const columns = 5 + actions.length;
    const rest = found.length - LISTED;
    if (rest > 0) rows.append(el("tr", {}, el("td", { colspan: columns }, `and ${rest} more`)));
    if (!found.length) rows.append(el("tr", {}, el("td", { colspan: columns }, "none")));
  }
}
