// A choice of experts as a request names it.

const USUAL = { rank: "rd", weights: null, cap: null };

/** The name of the rule of a choice. */
export function ruleOf(choice) {
  if ((choice.cap ?? null) !== null) return "capped";
  return (choice.scale ?? null) === null ? "hard" : "soft";
}

/** Whether the map's fitted values steer: it is registered with them, and no numbers are chosen in their place. */
export function isFitted(entry, choice) {
  return Boolean(entry?.fitted) && !choice.activate && !choice.deactivate;
}

/** A choice as a request names it; null where nothing would steer. `own` is what the map is registered with. */
export function requestOf(entry, choice, nLayer) {
  if (!entry) return null;
  if (entry.kind !== "map") return entry.name;
  const fitted = isFitted(entry, choice);
  if (!choice.activate && !choice.deactivate && !fitted) return null;
  const [ours, own] = [choice, entry].map((one) => Object.fromEntries(Object.entries(USUAL).map(([field, usual]) => [field, one[field] ?? usual])));
  const same = ["activate", "deactivate", "reverse", "scale"].every((field) => choice[field] === entry[field]);
  const alike = Object.keys(USUAL).every((field) => ours[field] === own[field]);
  if (same && alike && choice.layers === (entry.layers ?? "")) return entry.name;
  const numbers = fitted ? {} : { activate: choice.activate, deactivate: choice.deactivate };
  const asked = { map: entry.name, ...numbers, reverse: choice.reverse };
  if (choice.layers) asked.layers = choice.layers;
  else if (entry.layers) asked.layers = `0-${nLayer - 1}`; // left out, it would be the map's own
  if (ours.rank !== "rd" || own.rank !== "rd") asked.rank = ours.rank;
  asked.mode = ruleOf(choice);
  if (asked.mode === "soft") {
    asked.scale = choice.scale;
    if (ours.weights || own.weights) asked.weights = ours.weights ?? "none";
  }
  if (asked.mode === "capped") asked.cap = ours.cap;
  return asked;
}
