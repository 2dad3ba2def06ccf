// On a narrow screen one part of the page is shown at a time.

import { byId } from "./dom.js";

const PARTS = ["chat", "panel"];

/** Shows the chat or the panel. */
export function view(name) {
  document.body.dataset.view = name;
  for (const part of PARTS) byId(`view-${part}`).setAttribute("aria-pressed", String(part === name));
}

for (const part of PARTS) byId(`view-${part}`).addEventListener("click", () => view(part));
