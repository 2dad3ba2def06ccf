// The conversation on the page: questions, and answers that grow while they come.

import { PerFrame, byId, copy, el, plural } from "./dom.js";
import { edit } from "./editor.js";
import { thumbs } from "./examples.js";
import { Rendered } from "./markdown.js";
import { Marker, isMarked, ruleTitle } from "./marks.js";
import { chosenIn } from "./where.js";

const NEAR = 60; // pixels from the end within which the page follows an answer

function ruleWords({ mode, scale, weights, cap }) {
  if (mode === "soft" && Number.isFinite(scale)) return `soft rule, ${scale} logits${weights ? ` by ${weights}` : ""}`;
  if (mode === "capped" && (cap ?? null) !== null) return `capped rule, ${cap} logits`;
  return `${mode} rule`;
}

/** Words for what was applied to an answer. */
export function appliedWords(applied, nTokens) {
  if (!applied) return ["unsteered"];
  if (Array.isArray(applied.rules)) {
    const what = applied.rules.length === 1 ? String(applied.rules[0]) : plural(applied.rules.length, "rule");
    return Number.isFinite(applied.n_steered) && nTokens > 0 ? [what, `${applied.n_steered} of ${plural(nTokens, "token")} steered`] : [what];
  }
  const words = [];
  if (applied.n_active || applied.n_inactive) words.push(`${applied.n_active} promoted`, `${applied.n_inactive} suppressed`);
  else words.push("no experts chosen");
  if (applied.rank && applied.rank !== "rd") words.push(`by ${applied.rank}`);
  if (applied.mode) words.push(ruleWords(applied));
  if (applied.layers) words.push(`layers ${applied.layers}`);
  return words;
}

/** Words for the figures of an answer. */
export function figures(facts) {
  const words = [];
  if (Number.isFinite(facts.tokens)) words.push(plural(facts.tokens, "token"));
  if (facts.milliseconds > 0 && facts.tokens > 0) words.push(`${((1000 * facts.tokens) / facts.milliseconds).toFixed(facts.tokens * 1000 < 10 * facts.milliseconds ? 1 : 0)} tokens/s`);
  if (Number.isFinite(facts.seed)) words.push(`seed ${facts.seed}`);
  if (facts.cached > 0) words.push(`${facts.cached} of ${facts.prompt} prompt tokens reused`);
  if (facts.finish === "length") words.push("cut off at the limit of tokens");
  return words;
}

const NAMES = { unsteered: "Unsteered", steered: "Steered" };

class AnswerView {
  #answer;
  #actions;
  #body;
  #state;
  #reasoning;
  #rendered;
  #meta;
  #details;
  #problem;
  #use;
  #steps;
  #marks;
  #legend;
  #thumbs;
  #thoughts = ""; // what is shown of the reasoning, and how
  #again;
  #edit;

  /** `drawn()` is called when its text was drawn anew by itself. */
  constructor(answer, actions, drawn) {
    this.#answer = answer;
    this.#actions = actions;
    this.#body = el("div", { class: "text" });
    this.#rendered = new Rendered(this.#body, actions.reader, drawn);
    this.#state = el("span", { class: "faint" });
    this.#reasoning = el("details", { class: "reasoning", hidden: true }, el("summary", {}, "Reasoning"), el("div", { class: "thoughts" }));
    this.#meta = el("p", { class: "meta" });
    this.#details = el("details", { class: "details", hidden: true }, el("summary", {}, "Applied"), el("pre", { tabindex: "0" }));
    this.#problem = el("div", { class: "problem", role: "alert", hidden: true });
    this.#use = el("button", { type: "button", class: "quiet", "aria-pressed": "false", onclick: () => actions.use(answer) }, "Experts used");
    this.#steps = el("button", { type: "button", class: "quiet", "aria-haspopup": "dialog", onclick: () => actions.steps(answer) }, "Tokens");
    this.#marks = el("button", { type: "button", class: "quiet", onclick: () => actions.toggleMarks() }, "Steered text");
    this.#legend = el("p", { class: "legend", hidden: true }, el("span", {}, el("mark", { class: "steered" }, "Underlined"), " text was drawn under the steering."));
    this.#again = el("button", { type: "button", class: "quiet", hidden: true, onclick: () => actions.again() }, "Ask again");
    this.#thumbs = thumbs(() => actions.rating(answer), (up) => actions.rate(answer, up));
    const copyButton = el("button", { type: "button", class: "quiet", onclick: (event) => copy(answer.text, event.currentTarget) }, "Copy");
    this.#edit = el("button", { type: "button", class: "quiet", onclick: () => this.#change() }, "Edit");
    this.title = el("h2", {});
    this.element = el(
      "article",
      { class: `answer ${answer.side}` },
      el("header", {}, this.title, this.#state),
      this.#reasoning,
      this.#body,
      this.#problem,
      this.#legend,
      el("footer", {}, this.#meta, el("div", { class: "answer-actions" }, ...this.#thumbs.buttons, copyButton, this.#edit, this.#marks, this.#use, this.#steps, this.#again), this.#details),
    );
    this.update();
  }

  update() {
    const answer = this.#answer;
    const running = answer.state === "running";
    const { element } = this;
    element.dataset.state = answer.state;
    element.setAttribute("aria-busy", String(running));
    const name = answer.applied?.name && (chosenIn(answer.asked)?.[0] ?? answer.applied.name); // rules have none of their own
    this.title.textContent = name ? `Steered: ${name}${answer.applied.side ? ` \u2192 ${answer.applied.side}` : ""}` : NAMES[answer.side];
    this.#state.textContent = { stopped: "stopped", error: answer.text ? "not complete" : "" }[answer.state] ?? (running && !answer.text ? "waiting" : "");
    const marked = isMarked(answer);
    const spans = marked && this.#actions.marks() ? answer.steered : { answer: [], reasoning: [] };
    const title = (rule) => ruleTitle(answer.applied, rule);
    this.#marks.hidden = !marked;
    this.#marks.setAttribute("aria-pressed", String(marked && this.#actions.marks()));
    this.#legend.hidden = !spans.answer.length && !spans.reasoning.length;
    this.#rendered.show(answer.text, spans.answer, title);
    if (answer.reasoning) {
      this.#reasoning.hidden = false;
      const thoughts = `${answer.reasoning.length} ${spans.reasoning.length}`;
      if (thoughts !== this.#thoughts) this.#reasoning.lastChild.replaceChildren(el("span", {}, new Marker(spans.reasoning).nodes(answer.reasoning, 0, title)));
      this.#thoughts = thoughts;
      this.#reasoning.firstChild.textContent = running && !answer.text ? "Reasoning \u2026" : "Reasoning";
    }
    this.#meta.replaceChildren(...(running ? [] : [...appliedWords(answer.applied, answer.facts.tokens), ...figures(answer.facts), ...(answer.original === undefined ? [] : ["edited"])].map((word) => el("span", {}, word))));
    this.#details.hidden = !answer.applied;
    this.#details.lastChild.textContent = answer.applied ? JSON.stringify(answer.applied, null, 1) : "";
    const nothing = answer.state === "error" && !answer.text;
    this.#body.hidden = nothing;
    element.querySelector("footer").hidden = running || nothing;
    this.#use.hidden = !answer.routing;
    this.#thumbs.update(!running && Boolean(answer.text));
    this.#steps.hidden = answer.state !== "done" || answer.original !== undefined || answer.asked === undefined || !(answer.facts.tokens > 0);
    const problem = answer.problem;
    this.#problem.hidden = !problem;
    if (problem && this.#problem.dataset.title !== problem.title) {
      this.#problem.dataset.title = problem.title;
      this.#problem.replaceChildren(
        el("strong", {}, problem.title),
        el("span", {}, problem.detail),
        el("button", { type: "button", class: "quiet retry", onclick: () => this.#actions.again() }, "Try again"),
      );
    }
  }

  #change() {
    const answer = this.#answer;
    edit(this.#body, this.#edit, answer.text, { label: "The answer", action: "Save", lines: true }, (text) => this.#actions.edited(answer, text));
  }

  /** Only the last question can be asked again. */
  setLast(last) {
    this.#again.hidden = !last;
    const retry = this.#problem.querySelector(".retry");
    if (retry) retry.hidden = !last;
  }

  setUsed(used) {
    this.#use.setAttribute("aria-pressed", String(used));
  }
}

export class Conversation {
  #log = byId("log");
  #scroll = byId("scroll");
  #latest = byId("latest");
  #views = new Map();
  #turns = [];
  #actions;
  #follow = true;
  #frames = new PerFrame((answers) => {
    for (const answer of answers) this.#views.get(answer)?.update();
    this.#keepUp();
  });

  /**
   * `actions`: again() asks the last question again, use(answer) lays its experts over the map, steps(answer) goes through
   * its tokens; askInstead(turn, text) asks another question in the place of a turn, false if it cannot; edited(answer, text)
   * changes an answer; marks() is whether steered text is marked, toggleMarks() changes that; rating(answer) is
   * the user's mark, rate(answer, up) changes it; `reader` reads Markdown.
   */
  constructor(actions) {
    this.#actions = actions;
    this.#scroll.addEventListener("scroll", () => {
      this.#follow = this.#scroll.scrollHeight - this.#scroll.scrollTop - this.#scroll.clientHeight < NEAR;
      this.#latest.hidden = this.#follow;
    }, { passive: true });
    this.#latest.addEventListener("click", () => this.toEnd());
    new ResizeObserver(() => this.#keepUp()).observe(this.#scroll);
  }

  /** Shows these turns, and nothing else. */
  show(turns) {
    this.#turns = [...turns];
    this.#views.clear();
    this.#actions.reader.clear();
    this.#log.replaceChildren(...turns.map((turn) => this.#element(turn)));
    this.#lastOnes();
    this.toEnd();
  }

  /** Shows one more turn, behind the first `at` of them. */
  added(turn, at = this.#turns.length) {
    for (const old of this.#turns.splice(at)) for (const answer of old.answers) this.#views.delete(answer);
    while (this.#log.children.length > at) this.#log.lastChild.remove();
    this.#turns.push(turn);
    this.#log.append(this.#element(turn));
    this.#lastOnes();
    this.toEnd();
  }

  /** An answer has more; it is drawn with the next frame. */
  touched(answer) {
    this.#frames.add(answer);
  }

  /** An answer ended: draws it now. */
  ended(answer) {
    this.#frames.add(answer);
    this.#frames.flush();
    this.#lastOnes();
  }

  /** Draws all answers anew. */
  redraw() {
    for (const view of this.#views.values()) view.update();
  }

  /** Is this turn shown? */
  has(turn) {
    return this.#turns.includes(turn);
  }

  markUsed(answer) {
    for (const [shown, view] of this.#views) view.setUsed(shown === answer);
  }

  toEnd() {
    this.#follow = true;
    this.#keepUp();
  }

  #element(turn) {
    const views = turn.answers.map((answer) => {
      const view = new AnswerView(answer, this.#actions, () => this.#keepUp());
      this.#views.set(answer, view);
      return view.element;
    });
    const question = el("div", { class: "question" }, el("span", { class: "hidden" }, "You: "), turn.user);
    const asking = { label: "Your message", action: "Ask", lines: false };
    const onclick = (event) => edit(question, event.currentTarget, turn.user, asking, (text) => this.#actions.askInstead(turn, text));
    return el(
      "section",
      { class: "turn", "aria-label": "Question and answer" },
      el("div", { class: "question-row" }, question, el("button", { type: "button", class: "quiet", "aria-label": "Edit this message", onclick }, "Edit")),
      el("div", { class: views.length > 1 ? "answers two" : "answers" }, ...views),
    );
  }

  #lastOnes() {
    const last = this.#turns.at(-1);
    for (const turn of this.#turns) for (const answer of turn.answers) this.#views.get(answer)?.setLast(turn === last);
  }

  #keepUp() {
    if (this.#follow) this.#scroll.scrollTop = this.#scroll.scrollHeight;
    this.#latest.hidden = this.#follow;
  }
}
