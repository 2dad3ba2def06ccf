// Choosing what steers the next answers: the name, the numbers of experts, the rule, the layers.

import { isFitted, requestOf, ruleOf } from "./choice.js";
import { byId, copy, debounced, el, plural } from "./dom.js";
import { WherePicker, steeringAt, whereOf, whereWords } from "./where.js";

const SOFT = 4; // logits, when the soft rule is chosen
const CAP = 4; // logits, when the capped rule is chosen: the server's default, too
const RANKS = { rd: "RD", "log-odds": "log-odds", logit: "router logit", weight: "routed weight", effect: "measured effect", efficiency: "effect for its cost" };
const WEIGHTS = ["log-odds", "logit", "weight", "effect"];
const SOURCES = { ships: "ships with the model", folder: "from the maps folder", "command line": "given at the start", request: "registered by a program" };

const whole = (value, most) => Math.max(0, Math.min(most, Math.round(Number(value)) || 0));

/** The numbers that a map without numbers starts with: its model's in the paper, where one preset fits it, else none. */
export function startOf(entry) {
  const fitting = Object.values(entry.presets ?? {});
  return fitting.length === 1 ? fitting[0] : { activate: 0, deactivate: 0 };
}

/** What a map recommends was measured to do, in words; "" where nothing was. */
export function measuredWords({ recommended }) {
  if (typeof recommended?.unsteered !== "number" || typeof recommended.steered !== "number") return "";
  const share = (value) => `${Math.round(100 * value)}%`;
  const n = recommended.n_items ? ` of ${plural(recommended.n_items, "held-out item")}` : "";
  return `recommended: ${share(recommended.unsteered)} \u2192 ${share(recommended.steered)}${n}`;
}

/** "fitted values of 14 experts", of a map that steers by such in place of numbers. */
const fittedWords = ({ fitted }) => `fitted values of ${plural(fitted, "expert")}`;

export class Panel {
  #server;
  #state;
  #entries = new Map();
  #info = null;
  #reasoning; // what the server says of the model's
  #picker = new WherePicker((where) => this.#keep({ where }));
  #fetching = null;
  #onTable;
  #onChange;
  #fetchSoon = debounced(() => this.#fetchTable(), 70);

  /** `state` is what store.js keeps; `onTable(table, entry)` draws a map, `onChange()` follows every change. */
  constructor(server, state, onTable, onChange) {
    this.#server = server;
    this.#state = state;
    this.#onTable = onTable;
    this.#onChange = onChange;
    byId("steering").addEventListener("change", (event) => {
      this.#state.steering = event.target.value;
      this.#show();
    });
    for (const name of ["activate", "deactivate"]) {
      const [range, number] = [byId(`${name}-range`), byId(name)];
      range.addEventListener("input", () => this.#set({ [name]: whole(range.value, this.#experts) }));
      number.addEventListener("change", () => this.#set({ [name]: whole(number.value, this.#experts) }));
    }
    for (const id of ["scale-range", "scale"]) {
      byId(id).addEventListener(id === "scale" ? "change" : "input", (event) => {
        this.#set({ scale: Math.max(0, Math.min(1000, Number(event.target.value) || 0)) });
      });
    }
    byId("direction").addEventListener("change", () => this.#set({ reverse: byId("reverse").checked }));
    for (const id of ["cap-range", "cap"]) {
      byId(id).addEventListener(id === "cap" ? "change" : "input", (event) => {
        this.#set({ cap: Math.max(0.25, Math.min(1000, Number(event.target.value) || CAP)) });
      });
    }
    byId("rule").addEventListener("change", () => {
      const { scale, weights, cap } = this.entry;
      const soft = byId("soft").checked;
      this.#set({ scale: soft ? (scale ?? SOFT) : null, weights: soft ? (weights ?? null) : null, cap: byId("capped").checked ? (cap ?? CAP) : null });
    });
    byId("rank").addEventListener("change", (event) => this.#set({ rank: event.target.value }));
    byId("weights").addEventListener("change", (event) => this.#set({ weights: event.target.value || null }));
    byId("layers").addEventListener("input", (event) => this.#set({ layers: event.target.value.replace(/\s+/g, "") }, false));
    byId("reset").addEventListener("click", () => {
      delete this.#state.choices[this.entry.name];
      this.#show();
      byId("steering").focus(); // the button goes away
    });
    byId("copy-snippet").addEventListener("click", (event) => copy(byId("snippet").textContent, event.target));
    byId("base").textContent = server.base;
  }

  /** What the server has registered came; `model` is what it says of its model. */
  load(info, model) {
    this.#info = info;
    this.#reasoning = model?.meta?.reasoning;
    this.#entries = new Map(info.data.map((entry) => [entry.name, entry]));
    const select = byId("steering");
    select.replaceChildren(
      el("option", { value: "" }, "none"),
      ...info.data.map((entry) => el("option", { value: entry.name }, entry.name + (entry.name === info.default ? " (default)" : ""))),
    );
    select.disabled = !info.model;
    this.#choose();
  }

  /** Shows what the state has chosen, or the server's default. */
  #choose() {
    const [state, info] = [this.#state, this.#info];
    if (state.steering === null || (state.steering && !this.#entries.has(state.steering))) state.steering = info.default ?? "";
    this.#show();
  }

  /** Another chat is shown, with a state of its own. */
  use(state) {
    this.#state = state;
    if (this.#info) this.#choose();
  }

  /** The registered steering that is chosen, if one is. */
  get entry() {
    return this.#entries.get(this.#state.steering) ?? null;
  }

  get #experts() {
    const model = this.#info?.model;
    return model ? model.n_layer * model.n_expert : 0;
  }

  /** The numbers of the chosen map, as they were left or as it is registered. */
  get choice() {
    const entry = this.entry;
    if (entry?.kind !== "map") return null;
    const own = { activate: entry.activate, deactivate: entry.deactivate, reverse: entry.reverse, layers: entry.layers ?? "", scale: entry.scale };
    if (!entry.usable_by_name) Object.assign(own, startOf(entry));
    const left = this.#state.choices[entry.name] ?? {};
    const of = (field) => (left[field] === undefined ? (entry[field] ?? null) : left[field]);
    const cap = of("cap") === "inf" || of("cap") > 0 ? of("cap") : null;
    const scale = cap === null && Number.isFinite(of("scale")) ? of("scale") : null;
    const ranks = entry.ranks ?? ["rd"];
    const weights = scale !== null && WEIGHTS.includes(of("weights")) && ranks.includes(of("weights")) ? of("weights") : null;
    return {
      activate: whole(left.activate ?? own.activate, this.#experts),
      deactivate: whole(left.deactivate ?? own.deactivate, this.#experts),
      reverse: typeof left.reverse === "boolean" ? left.reverse : own.reverse,
      layers: typeof left.layers === "string" ? left.layers : own.layers,
      scale,
      weights,
      cap,
      rank: [left.rank, entry.rank].find((rank) => ranks.includes(rank)) ?? "rd",
    };
  }

  /** Where the chosen steering is in force; null for plans, which say so themselves, and for nothing. */
  get where() {
    const entry = this.entry;
    return entry && entry.kind !== "plan" ? whereOf(this.#state.choices[entry.name]?.where) : null;
  }

  /** The field `steering` of the next request. */
  request() {
    const steering = this.#everywhere();
    return this.where ? steeringAt(steering, this.where) : steering;
  }

  /** The same for all tokens. */
  #everywhere() {
    return requestOf(this.entry, this.choice, this.#info?.model?.n_layer ?? 0);
  }

  /** A few words for it. */
  get label() {
    const [entry, choice] = [this.entry, this.choice];
    if (!entry) return "unsteered";
    const place = this.where && whereWords(this.where);
    if (!choice) return place ? `${entry.name} \u00b7 ${place}` : entry.name;
    if (this.request() === null) return `${entry.name}: no experts chosen`;
    const parts = [entry.name, isFitted(entry, choice) ? fittedWords(entry) : `+${choice.activate} \u2212${choice.deactivate}`];
    if (choice.reverse) parts.push("reversed");
    if (choice.rank !== "rd") parts.push(`by ${choice.rank}`);
    if (choice.scale !== null) parts.push(`soft ${choice.scale}${choice.weights ? ` by ${choice.weights}` : ""}`);
    if (choice.cap !== null) parts.push(`cap ${choice.cap}`);
    if (choice.layers) parts.push(`layers ${choice.layers}`);
    if (place) parts.push(place);
    return parts.join(" \u00b7 ");
  }

  #set(changes, fill = true) {
    if (this.choice) this.#keep({ ...this.choice, ...changes }, fill);
  }

  #keep(changes, fill = true) {
    const { choices } = this.#state;
    const { name } = this.entry;
    choices[name] = { ...choices[name], ...changes };
    this.#show(fill);
  }

  #show(fill = true) {
    const [entry, choice] = [this.entry, this.choice];
    byId("steering").value = entry?.name ?? "";
    byId("choice").hidden = !choice;
    byId("about").textContent = this.#about(entry);
    byId("program").hidden = !this.#info?.model;
    if (choice) this.#fill(entry, choice, fill);
    this.#picker.show(this.where, this.#reasoning);
    this.#showPlan(entry);
    byId("reset").hidden = !this.where || this.#state.choices[entry.name] === undefined;
    byId("snippet").textContent = `"steering": ${JSON.stringify(this.request(), null, 1).replace(/\n */g, " ")}`;
    if (this.where) {
      this.#fetchSoon();
    } else {
      this.#fetching?.abort();
      this.#fetching = null;
      byId("chosen").textContent = "";
      byId("chosen").classList.remove("wrong");
      const model = this.#info?.model;
      this.#onTable(model ? { ...model, rd: null, signs: null } : null, entry);
    }
    this.#onChange();
  }

  /** The rules of a plan, as they are written. */
  #showPlan(entry) {
    const rules = entry?.kind === "plan" && Array.isArray(entry.rules) ? entry.rules : [];
    byId("plan").hidden = !rules.length;
    byId("plan-rules").replaceChildren(...rules.map((rule) => el("li", {}, el("code", {}, String(rule)))));
  }

  #about(entry) {
    if (!this.#info) return "";
    if (!this.#info.model) return "This model has no experts, so nothing can steer it.";
    if (!entry) return this.#entries.size ? "The model answers as it is." : "The server has no maps; start it with --maps DIR.";
    const facts = [];
    if (entry.kind === "plan") facts.push("a plan");
    else if (entry.kind !== "map") facts.push(`a bias file: ${entry.n_active} promoted, ${entry.n_inactive} suppressed, ${entry.mode} rule`);
    else if (entry.positive && entry.negative) facts.push(`${entry.positive} \u2194 ${entry.negative}`);
    if (entry.kind === "map") facts.push(entry.n_pairs ? plural(entry.n_pairs, "pair") : "unknown number of pairs");
    facts.push(SOURCES[entry.source] ?? entry.source);
    if (entry.fitted) facts.push(fittedWords(entry));
    if (measuredWords(entry)) facts.push(measuredWords(entry));
    return facts.join(" \u00b7 ");
  }

  #fill(entry, choice, texts) {
    byId("positive").textContent = entry.positive || "the behaviour";
    byId("negative").textContent = entry.negative || "its opposite";
    byId(choice.reverse ? "reverse" : "forward").checked = true;
    const model = this.#info.model;
    for (const name of ["activate", "deactivate"]) {
      const most = Math.max(choice[name], Math.min(this.#experts, model.n_layer * model.n_expert_used));
      Object.assign(byId(`${name}-range`), { max: most, value: choice[name] });
      Object.assign(byId(name), { max: this.#experts, value: choice[name] });
    }
    this.#fillPresets(entry);
    const rule = ruleOf(choice);
    byId(rule).checked = true;
    byId("strength").hidden = byId("weighting").hidden = rule !== "soft";
    byId("limit").hidden = rule !== "capped";
    this.#fillScores(entry, choice);
    if (rule === "capped") {
      const bounded = choice.cap !== "inf";
      Object.assign(byId("cap-range"), { max: bounded ? Math.max(16, choice.cap) : 16, value: bounded ? choice.cap : 16 });
      byId("cap").value = bounded ? choice.cap : "";
    }
    if (rule === "soft") {
      Object.assign(byId("scale-range"), { max: Math.max(16, choice.scale), value: choice.scale });
      byId("scale").value = choice.scale;
    }
    if (texts) byId("layers").value = choice.layers;
  }

  /** The scores that the map has: those to choose by, and those to weight by. */
  #fillScores(entry, choice) {
    const ranks = (entry.ranks ?? ["rd"]).filter((rank) => rank in RANKS);
    const weights = WEIGHTS.filter((name) => ranks.includes(name));
    byId("scoring").hidden = ranks.length < 2;
    if (!weights.length) byId("weighting").hidden = true;
    if (byId("rank").dataset.of !== String(ranks)) { // a list that is open stays as it is
      const options = (names) => names.map((name) => el("option", { value: name }, RANKS[name]));
      byId("rank").dataset.of = String(ranks);
      byId("rank").replaceChildren(...options(ranks));
      byId("weights").replaceChildren(el("option", { value: "" }, "all alike"), ...options(weights));
    }
    byId("rank").value = choice.rank;
    byId("weights").value = choice.weights ?? "";
  }

  /** A button for each preset that fits the map and its model: the paper's numbers, on the map's positive side. */
  #fillPresets(entry) {
    const presets = Object.entries(entry.presets ?? {});
    byId("presets").hidden = presets.length === 0;
    if (byId("presets").contains(document.activeElement)) return; // the focus would go with the button
    byId("preset-buttons").replaceChildren(
      ...presets.map(([name, { activate, deactivate }]) => {
        const text = `${name} +${activate} \u2212${deactivate}`;
        const onclick = () => this.#set({ activate, deactivate, reverse: false, rank: "rd", weights: null, cap: null });
        return el("button", { type: "button", class: "quiet", title: "The paper's numbers for this model", onclick }, text);
      }),
    );
  }

  /** Asks the server which experts the numbers come to: it chooses for the answers, too. */
  async #fetchTable() {
    const [entry, choice] = [this.entry, this.choice];
    if (!this.where) return;
    this.#fetching?.abort();
    const fetching = (this.#fetching = new AbortController());
    const told = byId("chosen");
    try {
      const request = this.#everywhere();
      const numbers = request === null ? choice && { activate: 0, deactivate: 0 } : typeof request === "object" ? request : null;
      const table = await this.#server.table(entry.name, numbers, fetching.signal);
      if (fetching.signal.aborted) return;
      told.textContent = choice ? this.#counted(table, choice) : "";
      told.classList.remove("wrong");
      this.#onTable(table, entry);
    } catch (problem) {
      if (problem.name === "AbortError") return;
      told.textContent = problem.detail || problem.title;
      told.classList.add("wrong");
    }
  }

  #counted(table, choice) {
    if (!choice.activate && !choice.deactivate && !this.entry.recommended) {
      return "This map recommends no numbers of experts: say how many to promote and to suppress.";
    }
    if (isFitted(this.entry, choice)) return `${fittedWords(this.entry)}: ${table.n_active} promoted, ${table.n_inactive} suppressed of ${this.#experts}`;
    const count = (n, asked, word) => `${n} ${word}${n < asked ? ` (${asked} asked for)` : ""}`;
    const of = `${count(table.n_active, choice.activate, "promoted")}, ${count(table.n_inactive, choice.deactivate, "suppressed")}`;
    return `${of} of ${this.#experts}`;
  }
}
