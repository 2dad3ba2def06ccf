// The dialog that goes through an answer token by token, and shows the experts that drew each.

import { Problem } from "./api.js";
import { PerFrame, byId, el } from "./dom.js";
import { Heatmap } from "./heatmap.js";
import { ruleTitle } from "./marks.js";
import { shownToken, traceOf, traceRequest } from "./trace.js";
import { chosenIn } from "./where.js";

const PAGE = 10; // tokens
const FIELDS = ["return_routed_experts", "return_steered"]; // which older servers refuse
const SIGNS = { 1: " promoted", "-1": " suppressed", 0: "" };

export class Steps {
  #server;
  #dialog = byId("steps");
  #list = byId("tokens");
  #known = new WeakMap(); // what was shown of an answer, which is not asked for twice
  #asking = null;
  #shown = null; // {trace, table}
  #at = 0;
  #cells = []; // elements [layers][experts of a token]
  #heatmap = new Heatmap({
    canvas: byId("step-map"),
    cursor: byId("step-cursor"),
    tooltip: byId("step-tooltip"),
    live: byId("step-live"),
    scroll: byId("step-scroll"),
  });
  #frames = new PerFrame(() => this.#draw()); // keys that are held down come faster than frames

  constructor(server) {
    this.#server = server;
    byId("steps-close").addEventListener("click", () => this.#dialog.close());
    this.#dialog.addEventListener("close", () => this.#asking?.abort());
    byId("step-back").addEventListener("click", () => this.#go(this.#at - 1));
    byId("step-on").addEventListener("click", () => this.#go(this.#at + 1));
    for (const part of [this.#list, byId("step-back"), byId("step-on")]) part.addEventListener("keydown", (event) => this.#key(event));
    this.#list.addEventListener("click", (event) => {
      const token = event.target.closest("[role=option]");
      if (token) this.#go(Number(token.dataset.at));
    });
  }

  /** Opens the dialog for an answer to these messages; `shape` is what the server says of its model's experts. */
  async open(answer, turn, messages, shape) {
    const asking = (this.#asking = new AbortController());
    byId("steps-body").hidden = true;
    this.#say("Asking for the same answer again, with the experts of each token\u2026");
    this.#dialog.showModal();
    try {
      if (!shape) throw new Problem("server", "This model has no experts.");
      const shown = this.#known.get(answer) ?? (await this.#ask(answer, turn, messages, shape, asking.signal));
      if (asking.signal.aborted) return;
      this.#known.set(answer, shown);
      this.#show(shown, answer);
    } catch (error) {
      if (error.name === "AbortError") return;
      const problem = error instanceof Problem ? error : new Problem("page", "The page failed.", String(error?.message ?? error));
      if (problem !== error) console.error(error);
      const old = FIELDS.includes(problem.field);
      this.#say(old ? "This server does not give the experts of each token." : `${problem.title} ${problem.detail}`, true);
    }
  }

  async #ask(answer, turn, messages, shape, signal) {
    const bare = { ...shape, rd: null, signs: null };
    const isPlan = typeof answer.asked === "string" && Array.isArray(answer.applied?.rules); // which has no table
    const chosen = isPlan ? null : chosenIn(answer.asked);
    const table = chosen && this.#server.table(...chosen, signal).catch(() => null); // its steering may be gone
    const request = traceRequest(answer, turn, messages);
    const trace = traceOf(await this.#server.answer(request, signal), shape, request);
    const found = await table;
    return { trace, table: found?.n_layer === shape.n_layer && found.n_expert === shape.n_expert ? found : bare };
  }

  #say(text, wrong = false) {
    byId("steps-state").textContent = text;
    byId("steps-state").classList.toggle("wrong", wrong);
  }

  #show(shown, answer) {
    this.#shown = shown;
    const { trace, table } = shown;
    const { tokens, routed, applied } = trace;
    const same = trace.text === answer.text && trace.reasoning === answer.reasoning;
    this.#say(same ? "" : "Asked again, the answer came out differently; these are the tokens of the new one.", !same);
    byId("steps-body").hidden = false;
    this.#list.replaceChildren();
    tokens.forEach((token, i) => {
      const steered = Number.isSafeInteger(token.rule);
      const name = `${shownToken(token, true)}${steered ? ", steered" : ""}`;
      const title = steered ? ruleTitle(applied, token.rule) : null;
      const look = { class: steered ? "token steered" : "token", title, "data-at": i };
      this.#list.append(el("span", { role: "option", id: `token-${i}`, "aria-selected": "false", "aria-label": name, ...look }, shownToken(token)));
    });
    this.#cells = Array.from({ length: routed.nLayer }, () => Array.from({ length: routed.nUsed }, () => el("span", { class: "expert" }, "", el("span", { class: "hidden" }))));
    byId("step-rows").replaceChildren(...this.#cells.map((cells, layer) => el("tr", {}, el("th", { scope: "row" }, String(layer)), el("td", {}, ...cells))));
    byId("step-meaning").textContent = table.signs
      ? "Dots and list are the experts that drew the token. Framed experts are promoted (corner above right, \u25b2 in the list) or suppressed (below left, \u25bc)."
      : "Dots and list are the experts that drew the token; no single map says which are promoted.";
    byId("step-map").setAttribute("aria-label", `Experts of the token: ${table.n_layer} layers of ${table.n_expert} experts`);
    this.#heatmap.setTable(table);
    this.#at = 0;
    this.#go(0);
    this.#list.focus();
  }

  #key(event) {
    if (event.ctrlKey || event.metaKey || event.altKey) return;
    const last = (this.#shown?.trace.tokens.length ?? 1) - 1;
    const to = {
      ArrowLeft: this.#at - 1,
      ArrowUp: this.#at - 1,
      ArrowRight: this.#at + 1,
      ArrowDown: this.#at + 1,
      PageUp: this.#at - PAGE,
      PageDown: this.#at + PAGE,
      Home: 0,
      End: last,
    }[event.key];
    if (to === undefined) return;
    event.preventDefault();
    this.#go(to);
  }

  #go(to) {
    const last = this.#shown.trace.tokens.length - 1;
    const at = Math.max(0, Math.min(last, to));
    const [from, here] = [this.#at, at].map((i) => byId(`token-${i}`));
    this.#at = at;
    from.setAttribute("aria-selected", "false");
    here.setAttribute("aria-selected", "true");
    this.#list.setAttribute("aria-activedescendant", here.id);
    here.scrollIntoView({ block: "nearest" });
    byId("step-back").setAttribute("aria-disabled", String(at === 0));
    byId("step-on").setAttribute("aria-disabled", String(at === last));
    this.#frames.add("token");
  }

  #draw() {
    const { trace, table } = this.#shown;
    const token = trace.tokens[this.#at];
    const words = [`Token ${this.#at + 1} of ${trace.tokens.length}: \u201c${shownToken(token).trimEnd()}\u201d, number ${token.id}`];
    if (token.probability !== null) words.push(`probability ${(100 * token.probability).toFixed(token.probability < 0.1 ? 1 : 0)}%`);
    if (token.rule !== undefined) words.push(token.rule === null ? "unsteered" : ruleTitle(trace.applied, token.rule).replace("Steered", "steered"));
    byId("step-about").textContent = words.join(", ");
    this.#heatmap.setUse(trace.routed.counts(token.row, table.n_expert));
    this.#cells.forEach((cells, layer) => {
      const experts = trace.routed.experts(token.row, layer);
      cells.forEach((cell, i) => {
        const sign = i < experts.length && table.signs ? Math.sign(table.signs[layer][experts[i]] ?? 0) : 0;
        cell.firstChild.data = i < experts.length ? String(experts[i]) : "";
        cell.lastChild.textContent = SIGNS[sign];
        cell.dataset.sign = sign;
      });
    });
  }
}
