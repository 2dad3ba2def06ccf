// Teaching: what is to be learnt, the jobs of the server that learn it, and the examples that answers were marked with.

import { Problem } from "./api.js";
import { byId, el, plural } from "./dom.js";
import { Examples, lineOf } from "./examples.js";
import { download } from "./export.js";

const OFTEN = 1000; // milliseconds between two looks at jobs that run
const FEWEST = 3; // examples
const STEPS = { answers: "asking the model", detect: "finding experts", attribute: "trying experts", tune: "choosing how many", confirm: "checking on held-out questions", report: "writing the report" };
const SOURCES = ["instructions", "behaviour", "examples"];
const NAMES = "Give it a name of small letters, digits, '.', '_' and '-', a letter or digit first.";
const NAME = /^[a-z0-9][a-z0-9._-]{0,63}$/;

/** A name made of the first words of a text. */
export function nameOf(text) {
  const words = text.toLowerCase().normalize("NFKD").replace(/\p{M}/gu, "").replace(/[^a-z0-9]+/g, " ").trim().split(" ");
  return words.slice(0, 4).join("-").slice(0, 40).replace(/-+$/, "");
}

/** "about 3 min left" of a job. */
export function leftWords({ elapsed, expected }) {
  if (!(expected > 0)) return "";
  const left = expected - elapsed;
  if (left <= 0) return "longer than expected";
  if (left < 60) return "less than a minute left";
  return left < 5400 ? `about ${Math.round(left / 60)} min left` : `about ${Math.round(left / 3600)} h left`;
}

/** How far a job is, 0 to 1; null if it does not say. */
export function shareOf({ elapsed, expected, done, total }) {
  if (expected > 0) return Math.min(0.99, elapsed / expected);
  return total > 0 ? Math.min(0.99, done / total) : null;
}

/** Words for the state of a job. */
export function jobWords(job) {
  if (job.state === "queued") return job.position > 1 ? `waits, ${job.position - 1} before it` : "waits";
  if (job.state === "cancelled") return "cancelled; teach it again, and it goes on where it was";
  if (job.state === "failed") return job.error || "failed";
  if (job.state === "done") return job.verdict || "";
  const parts = [STEPS[job.step] ?? job.step ?? "starting", leftWords(job)];
  if (job.paused) parts.push("waits for answers");
  return parts.filter(Boolean).join(" \u00b7 ");
}

export class Teach {
  #server;
  #examples;
  #actions;
  #jobs = new Map(); // id: {job, element, ...}
  #behaviours = [];
  #timer = 0;
  #named = false; // by the user
  #sending = false;

  /**
   * `actions`: asked(answer) is the conversation that an answer answers, redraw() shows its marks, say(text) tells what is
   * wrong; taken(name) is whether there is such a steering, reload() reads what there is, choose(name) chooses one.
   */
  constructor(server, actions) {
    this.#server = server;
    this.#actions = actions;
    this.#examples = new Examples(() => {
      actions.redraw();
      this.examplesChanged();
    });
    byId("teach-form").addEventListener("submit", (event) => {
      event.preventDefault();
      this.#start(false);
    });
    byId("teach-from").addEventListener("change", () => this.#changed());
    byId("teach-like").addEventListener("input", () => this.#suggest());
    byId("teach-behaviours").addEventListener("change", () => this.#changed());
    byId("teach-name").addEventListener("input", () => (this.#named = byId("teach-name").value !== ""));
    byId("teach-again").addEventListener("click", () => this.#start(true));
    byId("teach-add").addEventListener("click", () => this.#add());
    byId("teach-export").addEventListener("click", () => this.#export());
    byId("teach-clear").addEventListener("click", () => this.#examples.clear());
    this.examplesChanged();
  }

  /** The server answers: asks what it can learn, and what it learns now. */
  async load() {
    try {
      const { data } = await this.#server.get("v1/behaviours");
      this.#behaviours = Array.isArray(data) ? data : [];
    } catch (problem) {
      if (!(problem instanceof Problem)) throw problem;
      this.#behaviours = []; // an older server
    }
    const select = byId("teach-behaviours");
    const chosen = select.value;
    select.replaceChildren(...this.#behaviours.map((one) => el("option", { value: one.name }, one.title || one.name)));
    if (this.#behaviours.some((one) => one.name === chosen)) select.value = chosen;
    byId("teach-behaviour").disabled = !this.#behaviours.length;
    this.#show();
    await this.#look();
  }

  /** The mark of an answer: true, false, or null for none. */
  rating(answer) {
    return this.#examples.rating(() => this.#actions.asked(answer), answer.text);
  }

  /** Marks an answer as wanted or not wanted. */
  rate(answer, up) {
    if (!this.#examples.rate(this.#actions.asked(answer), answer.text, up)) this.#actions.say("This answer or its conversation is too long for an example.");
  }

  /** There are other examples than before. */
  examplesChanged() {
    const { pairs, single } = this.#examples;
    const waiting = single ? `; ${plural(single, "mark")} without a counterpart: mark another answer to the same question the other way` : "";
    byId("teach-marks").textContent = `${plural(pairs.length, "example")} from your marks, edits and texts${waiting}.`;
    byId("teach-list").hidden = byId("teach-export").hidden = !pairs.length;
    byId("teach-clear").hidden = !pairs.length && !single;
    byId("teach-pairs").replaceChildren(
      ...pairs.map((pair) => {
        const remove = el("button", { type: "button", class: "quiet", onclick: () => this.#examples.remove(pair) }, "Remove");
        const line = (sign, words, text) => el("p", {}, el("span", { "aria-label": words }, sign), ` ${text}`);
        return el("li", {}, el("p", { class: "faint" }, pair.prompt.at(-1).content), line("\u{1f44d}", "wanted", pair.like), line("\u{1f44e}", "not wanted", pair.unlike), remove);
      }),
    );
  }

  get #source() {
    return SOURCES.find((source) => byId(`teach-${source}`).checked) ?? SOURCES[0];
  }

  #show() {
    const source = this.#source;
    for (const one of SOURCES) byId(`teach-by-${one}`).hidden = one !== source;
    const behaviour = this.#behaviours.find((one) => one.name === byId("teach-behaviours").value);
    byId("teach-about").textContent = behaviour?.about ?? "";
  }

  #changed() {
    this.#show();
    this.#suggest();
    this.#tell("");
  }

  #suggest() {
    if (this.#named) return;
    const name = { instructions: nameOf(byId("teach-like").value), behaviour: byId("teach-behaviours").value, examples: "" }[this.#source];
    byId("teach-name").value = this.#actions.taken(name) ? `${name}-2` : name;
  }

  #tell(text, again = false) {
    byId("teach-problem").textContent = text;
    byId("teach-problem").hidden = !text;
    byId("teach-again").hidden = !again;
  }

  /** The body of the request, or a sentence that says what is missing. */
  #wanted() {
    const name = byId("teach-name").value.trim();
    const [like, unlike] = ["teach-like", "teach-unlike"].map((id) => byId(id).value.trim());
    const source = this.#source;
    if (source === "behaviour") {
      const behaviour = byId("teach-behaviours").value;
      if (!behaviour) return "Choose a behaviour.";
      return NAME.test(name) ? { name, behaviour } : NAMES;
    }
    if (source === "instructions" && (!like || !unlike)) return "Write both instructions: one that brings the behaviour about, and one for its opposite.";
    if (source === "instructions" && like === unlike) return "Both instructions are the same text.";
    const { pairs } = this.#examples;
    if (source === "examples" && pairs.length < FEWEST) return `At least ${FEWEST} examples are needed; there ${pairs.length === 1 ? "is 1" : `are ${pairs.length}`}.`;
    if (!NAME.test(name)) return NAMES;
    return source === "instructions" ? { name, like, unlike } : { name, pairs };
  }

  async #start(again) {
    const wanted = this.#wanted();
    if (typeof wanted === "string") return this.#tell(wanted);
    if (this.#sending) return;
    this.#sending = byId("teach-start").disabled = true;
    this.#tell("");
    try {
      const job = await this.#server.get("v1/learn", undefined, again ? { ...wanted, replace: true } : wanted);
      this.#take(job);
      this.#lookSoon();
    } catch (problem) {
      if (!(problem instanceof Problem)) throw problem;
      if (problem.code === "learnt_already") this.#tell("There is a steering of this name already. Choose another name, or teach it anew.", true);
      else this.#tell([problem.title, problem.detail].filter(Boolean).join(" "));
    } finally {
      this.#sending = byId("teach-start").disabled = false;
    }
  }

  #add() {
    const [question, like, unlike] = ["teach-question", "teach-wanted", "teach-unwanted"].map((id) => byId(id).value.trim());
    if (!question || !like || !unlike) return this.#tell("An example is a question, an answer as you want it, and one as you do not.");
    if (!this.#examples.add({ prompt: [{ role: "user", content: question }], like, unlike })) return this.#tell("Both answers are the same, or a text is too long.");
    for (const id of ["teach-question", "teach-wanted", "teach-unwanted"]) byId(id).value = "";
    this.#tell("");
    byId("teach-question").focus();
  }

  #export() {
    const text = this.#examples.pairs.map((pair) => `${lineOf(pair)}\n`).join("");
    download("pairs.jsonl", "application/jsonl", text);
  }

  //
  // the jobs
  //

  #lookSoon() {
    clearTimeout(this.#timer);
    this.#timer = setTimeout(() => this.#look(), OFTEN);
  }

  async #look() {
    let found;
    try {
      found = await this.#server.get("v1/learn");
    } catch (problem) {
      if (!(problem instanceof Problem)) throw problem;
      if (problem.kind === "gone" || problem.kind === "busy") this.#lookSoon(); // it may be back
      else found = { enabled: false, data: [] }; // an older server
    }
    if (!found) return;
    byId("teach-off").hidden = found.enabled;
    byId("teach-start").disabled = this.#sending || !found.enabled;
    const there = new Set(found.data.map((job) => job.id));
    for (const [id, { element }] of this.#jobs) {
      if (there.has(id)) continue;
      element.remove();
      this.#jobs.delete(id);
    }
    for (const job of found.data.toReversed()) this.#take(job);
    if (found.data.some((job) => ["queued", "running"].includes(job.state))) this.#lookSoon();
  }

  /** Shows a job as it is now. */
  #take(job) {
    let shown = this.#jobs.get(job.id);
    if (!shown) {
      shown = this.#made(job);
      this.#jobs.set(job.id, shown);
      byId("teach-jobs").prepend(shown.element);
    }
    const runs = ["queued", "running"].includes(job.state);
    const share = shareOf(job);
    shown.element.dataset.state = job.state;
    shown.element.dataset.outcome = job.outcome ?? "";
    if (share === null) shown.bar.removeAttribute("value");
    else shown.bar.value = share;
    shown.bar.hidden = job.state !== "running";
    const words = jobWords(job);
    if (shown.words.textContent !== words) shown.words.textContent = words; // it is read out
    shown.cancel.hidden = !runs;
    shown.use.hidden = !job.steering;
    if (job.state === "failed" && job.error?.includes("replace: true") && shown.seen && shown.job.state !== "failed") {
      this.#tell(`${job.name} was begun otherwise. Choose another name, or teach it anew.`, true);
    }
    if (job.steering && shown.job.state !== "done" && shown.seen) this.#actions.reload();
    Object.assign(shown, { job, seen: true });
  }

  #made(job) {
    const bar = el("progress", { max: "1", "aria-label": `Learning ${job.name}` });
    const words = el("p", { role: "status" });
    const use = el("button", { type: "button", hidden: true, onclick: () => this.#use(job.name) }, "Use it");
    const cancel = el("button", { type: "button", class: "quiet", onclick: () => this.#cancel(job.id) }, "Cancel");
    const element = el("li", {}, el("strong", {}, job.name), bar, words, el("div", { class: "card-actions" }, cancel, use));
    return { job, element, bar, words, use, cancel, seen: false };
  }

  #use(name) {
    this.#actions.choose(name);
    this.#actions.reload();
    byId("steering").focus();
  }

  async #cancel(id) {
    try {
      this.#take(await this.#server.remove(`v1/learn/${encodeURIComponent(id)}`));
    } catch (problem) {
      if (!(problem instanceof Problem)) throw problem;
      this.#tell([problem.title, problem.detail].filter(Boolean).join(" "));
    }
  }
}
