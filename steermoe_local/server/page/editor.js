// A text of the conversation that is changed where it stands.

import { el } from "./dom.js";

/**
 * Puts a field with `text` in the place of an element until it is saved or given up; then `button` has the focus again.
 * `save(text)` returns false if it cannot be done now: the field stays. `lines`: Enter breaks lines, Ctrl+Enter saves.
 */
export function edit(element, button, text, { label, action, lines }, save) {
  const field = el("textarea", { "aria-label": label, rows: Math.min(12, text.split("\n").length + 1) });
  const help = el("span", { class: "faint" }, lines ? "Ctrl+Enter saves, Esc gives up" : "Enter sends, Esc gives up");
  const form = el(
    "form",
    { class: "editor" },
    field,
    el("div", { class: "card-actions" }, help, el("button", { type: "button", class: "quiet", onclick: () => close() }, "Cancel"), el("button", { type: "submit", class: "primary" }, action)),
  );
  const close = () => {
    form.remove();
    element.hidden = button.hidden = false;
    if (button.isConnected) button.focus();
  };
  form.addEventListener("submit", (event) => {
    event.preventDefault();
    if (!field.value.trim()) return field.focus();
    if (save(field.value) !== false) close();
  });
  field.addEventListener("keydown", (event) => {
    if (event.key === "Escape") {
      event.stopPropagation(); // it would stop an answer
      close();
    } else if (event.key === "Enter" && !event.isComposing && (lines ? event.ctrlKey || event.metaKey : !event.shiftKey)) {
      event.preventDefault();
      form.requestSubmit();
    }
  });
  field.value = text;
  element.hidden = button.hidden = true;
  element.after(form);
  field.focus();
}
