// The settings of a chat: system prompt, temperature, seed, the limit of tokens.

import { byId } from "./dom.js";

const FIELDS = { system: "system", temperature: "temperature", seed: "seed", maxTokens: "max-tokens" };

/** `onChange(name, text)` follows what is typed. */
export function listen(onChange) {
  for (const [name, id] of Object.entries(FIELDS)) byId(id).addEventListener("input", () => onChange(name, byId(id).value));
}

/** Shows the settings of a chat. */
export function fill(settings) {
  for (const [name, id] of Object.entries(FIELDS)) byId(id).value = settings[name] ?? "";
  byId("settings").open = Object.values(settings).some(Boolean);
}

/** The numbers among them as a request has them; null if one cannot be sent, after `refuse(message, field)`. */
export function numbers(refuse) {
  const found = {};
  for (const [id, field, step] of [["temperature", "temperature", "any"], ["seed", "seed", "1"], ["max-tokens", "max_tokens", "1"]]) {
    const input = byId(id);
    input.step = step; // coarser ones are for the arrows
    if (!input.checkValidity()) {
      const label = document.querySelector(`label[for="${id}"]`).textContent;
      refuse(`${label}: give a ${step === "1" ? "whole " : ""}number from ${input.min} to ${input.max}, or nothing.`, input);
      return null;
    }
    if (input.value !== "") found[field] = Number(input.value);
  }
  return found;
}
