// Where a steering is in force: a phase of the text and a window of its tokens, and the controls that choose them.

import { byId } from "./dom.js";

const PHASES = ["all", "prompt", "thinking", "answer"];
const MOST = 2 ** 31;
const HELP = {
  all: "",
  prompt: "What comes before the answer, earlier answers included. Its last token is the answer's: it draws the first one. Negative numbers count from the end.",
  thinking: "What the model thinks before its answer.",
  answer: "What comes behind the thinking, from its first token on.",
};
const THINKING = {
  separated: "",
  unknown: " How this model marks its thinking is not known, so it counts as answer.",
  none: " This model's template has no thinking.",
};

/** {phase, start, stop}, made whole: tokens from `start` up to `stop`, which is not one of them; null: to the end. */
export function whereOf(kept) {
  const phase = PHASES.includes(kept?.phase) ? kept.phase : "all";
  const least = phase === "prompt" ? -MOST : 0;
  const number = (value, otherwise) => (Number.isSafeInteger(value) && value >= least && value <= MOST ? value : otherwise);
  return { phase, start: number(kept?.start, 0), stop: number(kept?.stop, null) };
}

/** Whether a window has no token in it. */
export function isEmpty({ phase, start, stop }) {
  return phase !== "all" && stop !== null && (stop === 0 || (stop <= start && (stop < 0) === (start < 0)));
}

/** A steering as a request names it where it is in force: one rule of a plan; itself for all tokens. */
export function steeringAt(steering, { phase, start, stop }) {
  if (steering === null || phase === "all") return steering;
  const what = typeof steering === "string" ? { map: steering } : steering;
  return { rules: [start === 0 && stop === null ? { phase, ...what } : { phase, tokens: [start, stop], ...what }] };
}

/** The steering of a request, wherever it is in force: [name, choice or null]; null for plans of several rules. */
export function chosenIn(steering) {
  if (typeof steering === "string") return [steering, null];
  const one = steering?.rules?.length === 1 ? steering.rules[0] : steering;
  if (typeof one?.map !== "string") return null;
  const { phase, tokens, map, ...choice } = one;
  return [map, Object.keys(choice).length ? choice : null];
}

/** A few words for it, as rules of plans are written; "" for all tokens. */
export function whereWords({ phase, start, stop }) {
  if (phase === "all") return "";
  return start === 0 && stop === null ? phase : `${phase}[${start}:${stop ?? ""}]`;
}

/** The controls of the panel. */
export class WherePicker {
  /** `onChange(where)` follows what is chosen. */
  constructor(onChange) {
    const [start, stop] = [byId("window-start"), byId("window-stop")];
    const number = (input) => (input.value === "" ? null : Math.trunc(Number(input.value)));
    const read = () => {
      const phase = document.querySelector('input[name="phase"]:checked').value;
      onChange(whereOf({ phase, start: number(start) ?? 0, stop: number(stop) }));
    };
    for (const part of [byId("phase"), start, stop]) part.addEventListener("change", read);
  }

  /** Shows what is chosen; null hides it. `reasoning` is what the server says of the model's: "separated", "unknown", null. */
  show(where, reasoning) {
    byId("where").hidden = !where;
    if (!where) return;
    const { phase, start, stop } = where;
    byId(`phase-${phase}`).checked = true;
    byId("window").hidden = phase === "all";
    const empty = isEmpty(where);
    for (const [id, value] of [["window-start", start || ""], ["window-stop", stop ?? ""]]) {
      Object.assign(byId(id), { min: phase === "prompt" ? -MOST : 0, value });
      byId(id).setAttribute("aria-invalid", String(empty));
    }
    const thinking = phase === "thinking" && reasoning !== undefined ? THINKING[reasoning ?? "none"] : "";
    byId("where-help").textContent = empty ? `No token is in ${whereWords(where)}: the second number is the window's end.` : HELP[phase] + (thinking ?? "");
    byId("where-help").classList.toggle("wrong", empty);
  }
}
