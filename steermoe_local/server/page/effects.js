// Effects of interventions on single experts: the tables that the heat map can show in place of RD, and words.

import { signed } from "./dom.js";

const WORDS = { promote: "promoting", suppress: "suppressing" };

/** The rows of a map's effects as tables [layers][experts], by action; null where not tried. {} for a map without any. */
export function effectTables(table) {
  const found = {};
  for (const action of Object.keys(WORDS)) {
    const rows = (table?.effects?.rows ?? []).filter((row) => row.action === action);
    if (!rows.length) continue;
    found[action] = Array.from({ length: table.n_layer }, () => Array(table.n_expert).fill(null));
    for (const row of rows) found[action][row.layer][row.expert] = row;
  }
  return found;
}

/** One row as a line: "promoting +0.512 ± 0.125 nats, cost 0.250". */
export function effectLine({ action, effect, effect_se: error, cost, significant, control }) {
  const parts = [`${WORDS[action]} ${signed(effect)} ± ${error.toFixed(3)} nats`];
  if (cost !== undefined) parts.push(`cost ${cost < 0 ? signed(cost) : cost.toFixed(3)}`);
  if (!significant) parts.push("not significant");
  if (control) parts.push("random control");
  return parts.join(", ");
}

/** What the colours mean while the effects of an action are shown. `entry` is the registered map. */
export function effectMeaning(action, { attribution }, entry) {
  const named = entry.positive && entry.negative;
  const margin = named ? `${entry.positive} over ${entry.negative}` : "the behaviour over its opposite";
  const items = attribution.response === "pairs" ? "pairs" : `items of ${attribution.response}`;
  const how = `estimated by interventions on ${attribution.n_items} ${items}, R2 ${attribution.r2[action].toFixed(2)}`;
  return `Effect: what ${WORDS[action]} an expert does to the margin of ${margin}, in nats a token; ${how}. Small and grey: not tried. Rows are layers.`;
}
