// Whether the server answers, and the key it may ask for.

import { Problem } from "./api.js";
import { byId } from "./dom.js";

const AGAIN = 2; // seconds
const ABOUT = "The key the server was started with. It is kept in this tab only, until the tab is closed.";

export class Connection {
  #server;
  #onInfo;
  #timer = 0;
  #dialog = byId("key-dialog");

  /** What GET v1/steering said last; null until it did. */
  info = null;

  /** `onInfo(info, model)` is called with what the server has, each time it is read. */
  constructor(server, onInfo) {
    this.#server = server;
    this.#onInfo = onInfo;
    byId("open-key").addEventListener("click", () => this.#askForKey(ABOUT));
    byId("key-cancel").addEventListener("click", () => this.#dialog.close());
    byId("key-form").addEventListener("submit", (event) => {
      event.preventDefault();
      const key = byId("key").value.trim();
      if (!/^[\x20-\x7e]*$/.test(key)) {
        byId("key-text").textContent = "A key has letters, digits and signs of ASCII only; this one has others.";
        return;
      }
      server.key = key;
      this.#dialog.close();
      this.connect();
    });
  }

  /** Reads what the server has; if it does not answer, again and again until it does. */
  async connect() {
    clearTimeout(this.#timer);
    this.#timer = 0;
    try {
      const info = await this.#server.steerings();
      const models = await this.#server.get("v1/models");
      this.info = info;
      this.#show("ok", "ready");
      this.#onInfo(info, models.data[0]);
    } catch (error) {
      if (!(error instanceof Problem)) throw error;
      this.met(error);
    }
  }

  /** An answer came, or ended in a problem: shows the state, and does what helps. */
  met(problem) {
    if (problem === null) return this.#show("ok", "ready");
    if (problem.kind === "key") {
      this.#show("key", "key needed");
      this.#askForKey(problem.title);
    } else if (problem.kind === "gone" || problem.kind === "loading") {
      this.#show(problem.kind, problem.kind === "gone" ? "no answer" : "loading the model");
      this.#timer ||= setTimeout(() => this.connect(), 1000 * (problem.retryAfter ?? AGAIN));
    } else if (problem.kind === "steering") {
      this.connect(); // the list of steerings is another one, perhaps
    }
  }

  #show(state, words) {
    const shown = byId("state");
    if (shown.textContent === words) return; // it is read out
    shown.dataset.state = state;
    shown.textContent = words;
  }

  #askForKey(text) {
    byId("key-text").textContent = text;
    byId("key").value = this.#server.key;
    if (!this.#dialog.open) this.#dialog.showModal();
    byId("key").select();
  }
}
