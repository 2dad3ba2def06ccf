// The chats: which there are, which one is shown, and the dialog that lists them.

import { byId, el, plural } from "./dom.js";
import { chatOf, download, fileName, jsonOf, markdownOf, titleOf } from "./export.js";
import { MOST_OF_TITLE, currentId, empty, forget, idOf, loadAll, parsed, save, saveCurrent } from "./store.js";

export class Chats {
  #all = loadAll();
  #onOpen;
  #onRemove;
  #mayTake;
  #dialog = byId("chats");
  #list = byId("chat-list");

  /** The chat that is shown; its object stays the same while it is. */
  current;

  /**
   * `onOpen(chat)` shows another chat, or the same one as another tab changed it, if `mayTake()` says that nothing of
   * this tab is lost by that; `onRemove(chat)` follows a deletion.
   */
  constructor({ onOpen, onRemove, mayTake }) {
    [this.#onOpen, this.#onRemove, this.#mayTake] = [onOpen, onRemove, mayTake];
    this.current = this.#all.get(currentId()) ?? this.#sorted()[0] ?? empty();
    this.#all.set(this.current.id, this.current);
    saveCurrent(this.current.id);
    byId("open-chats").addEventListener("click", () => {
      this.#say("");
      this.#draw();
      this.#dialog.showModal();
      this.#list.querySelector("[aria-current]")?.focus();
    });
    byId("chats-close").addEventListener("click", () => this.#dialog.close());
    for (const id of ["new-chat", "chats-new"]) byId(id).addEventListener("click", () => this.add());
    byId("chats-import").addEventListener("click", () => byId("chats-file").click());
    byId("chats-file").addEventListener("change", () => this.#import());
    addEventListener("storage", (event) => this.#changedElsewhere(event));
  }

  /** Keeps a chat; false if there is no room. Deleted ones are not kept. */
  keep(chat) {
    return !this.#all.has(chat.id) || save(chat);
  }

  /** Opens a new chat, with the steering and the settings of the one that is shown; that one, if nothing is in it. */
  add() {
    const { turns, title, steering, choices, compare, marks, settings } = this.current;
    if (!turns.length && !title) return this.#open(this.current);
    const copied = structuredClone({ steering, choices, compare, marks, settings });
    this.#open({ ...empty(), ...copied, changed: Date.now() });
  }

  #sorted() {
    return [...this.#all.values()].sort((one, other) => other.changed - one.changed);
  }

  #open(chat) {
    this.#all.set(chat.id, chat);
    this.current = chat;
    saveCurrent(chat.id);
    this.#dialog.close();
    this.#onOpen(chat);
  }

  #say(text, action = null) {
    const place = byId("chats-state");
    const button = action && el("button", { type: "button", class: "link", onclick: action[1] }, action[0]);
    place.replaceChildren(text, ...(button ? [" ", button] : []));
    button?.focus();
  }

  #draw() {
    this.#list.replaceChildren(...this.#sorted().map((chat) => this.#row(chat)));
  }

  #row(chat) {
    const title = titleOf(chat);
    const facts = [plural(chat.turns.length, "question"), chat.changed ? new Date(chat.changed).toLocaleString([], { dateStyle: "medium", timeStyle: "short" }) : ""];
    const open = el(
      "button",
      { type: "button", class: "chat-name", "aria-current": chat === this.current ? "true" : null, onclick: () => this.#open(chat) },
      el("span", { class: "chat-title" }, title),
      el("span", { class: "faint" }, facts.filter(Boolean).join(" \u00b7 ")),
    );
    const button = (text, work) => el("button", { type: "button", class: "quiet", "aria-label": `${text}: ${title}`, onclick: work }, text);
    const row = el("li", { "data-id": chat.id }, open);
    row.append(
      el(
        "div",
        { class: "chat-actions" },
        button("Rename", () => this.#rename(chat, row)),
        button("Markdown", () => download(fileName(chat, "md"), "text/markdown", markdownOf(chat))),
        button("JSON", () => download(fileName(chat, "json"), "application/json", jsonOf(chat))),
        button("Delete", () => this.#remove(chat)),
      ),
    );
    return row;
  }

  #rename(chat, row) {
    const field = el("input", { type: "text", maxlength: MOST_OF_TITLE, "aria-label": "Title of the chat", value: chat.title || titleOf(chat) });
    const end = () => {
      this.#draw();
      this.#list.querySelector(`[data-id="${CSS.escape(chat.id)}"] .chat-name`)?.focus();
    };
    field.addEventListener("keydown", (event) => {
      if (event.key !== "Escape" && event.key !== "Enter") return;
      event.preventDefault(); // the dialog stays open
      if (event.key === "Enter" && !event.isComposing) {
        chat.title = field.value.trim();
        if (!this.keep(chat)) this.#say("This browser has no room to keep the new title over a reload.");
      }
      end();
    });
    row.replaceChildren(field);
    field.select();
  }

  #remove(chat) {
    this.#all.delete(chat.id);
    forget(chat.id);
    const shown = chat === this.current;
    if (shown) {
      this.current = this.#sorted()[0] ?? empty();
      this.#all.set(this.current.id, this.current);
      saveCurrent(this.current.id);
    }
    this.#onRemove(chat);
    if (shown) this.#onOpen(this.current);
    this.#draw();
    this.#say(`Deleted: ${titleOf(chat)}.`, ["Undo", () => {
      this.#all.set(chat.id, chat);
      this.#say(save(chat) ? "" : "The chat is back, but this browser has no room to keep it over a reload.");
      this.#draw();
      this.#list.querySelector(`[data-id="${CSS.escape(chat.id)}"] .chat-name`)?.focus();
    }]);
  }

  async #import() {
    const input = byId("chats-file");
    const [file] = input.files;
    input.value = ""; // so that the same file can be chosen again
    if (!file) return;
    try {
      const chat = await chatOf(file);
      this.#all.set(chat.id, chat);
      this.#say(save(chat) ? `Imported: ${titleOf(chat)}.` : "This browser has no room to keep the imported chat over a reload.");
      this.#draw();
      this.#list.querySelector(`[data-id="${CSS.escape(chat.id)}"] .chat-name`)?.focus();
    } catch (error) {
      this.#say(error.message);
    }
  }

  /** Another tab changed a chat. */
  #changedElsewhere({ key, newValue }) {
    const id = idOf(key);
    if (!id) return;
    const shown = id === this.current.id;
    if (newValue === null) {
      if (!shown) this.#all.delete(id); // what is shown here is kept again with its next change
    } else if (!shown || this.#mayTake()) {
      const chat = parsed(newValue, id);
      this.#all.set(id, chat);
      if (shown) {
        this.current = chat;
        this.#onOpen(chat);
      }
    }
    if (this.#dialog.open && !this.#list.contains(document.activeElement)) this.#draw();
  }
}
