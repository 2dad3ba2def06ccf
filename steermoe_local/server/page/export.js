// Chats as files: Markdown to read, JSON to read back.

import { el } from "./dom.js";
import { parsed } from "./store.js";

const FORMAT = "steermoe-page-chat";
const MOST_BYTES = 32 * 2 ** 20;
const NAMED = 60; // characters

/** The title of a chat: its own, or how its first question begins. */
export function titleOf(chat) {
  const first = chat.turns[0]?.user.replace(/\s+/g, " ").trim() ?? "";
  return chat.title || (first.length > NAMED ? `${first.slice(0, NAMED).trimEnd()}\u2026` : first) || "New chat";
}

/** A name for a file of a chat, of letters, digits and "-" alone, that is no device's on any system. */
export function fileName(chat, ending) {
  const words = titleOf(chat).normalize("NFC").toLowerCase().match(/[\p{L}\p{N}]+/gu) ?? [];
  return `steermoe-${[...words.join("-")].slice(0, NAMED).join("").replace(/-$/, "") || "chat"}.${ending}`;
}

function headingOf(answer) {
  const { applied, side } = answer;
  const name = applied?.name ? `Steered: ${applied.name}${applied.side ? ` \u2192 ${applied.side}` : ""}` : side === "steered" ? "Steered" : "Unsteered";
  const notes = [{ stopped: "stopped", error: "not complete" }[answer.state], answer.original === undefined ? null : "edited"].filter(Boolean);
  return notes.length ? `${name} (${notes.join(", ")})` : name;
}

/** The chat as Markdown: questions as quotes, answers as they came. */
export function markdownOf(chat) {
  const quoted = (text) => text.split(/\r\n|\r|\n/).map((line) => `> ${line}`.trimEnd()).join("\n");
  const parts = [`# ${titleOf(chat)}`];
  for (const turn of chat.turns) {
    parts.push("## You", quoted(turn.user));
    for (const answer of turn.answers) parts.push(`## ${headingOf(answer)}`, answer.text.trimEnd() || "(no answer)");
  }
  return `${parts.join("\n\n")}\n`;
}

/** The chat as JSON, with everything but what is being typed. */
export function jsonOf(chat) {
  const { id: _, draft: __, changed: ___, ...rest } = chat;
  return `${JSON.stringify({ format: FORMAT, version: 1, ...rest, title: titleOf(chat) }, null, 1)}\n`;
}

/** The chat of a file that `jsonOf` wrote. Raises Error with the reason. */
export async function chatOf(file) {
  if (file.size > MOST_BYTES) throw new Error(`The file is larger than ${MOST_BYTES / 2 ** 20} MiB.`);
  const text = await file.text();
  let kept = null;
  try {
    kept = JSON.parse(text);
  } catch {
    throw new Error("The file is not JSON; choose one that this page exported as JSON.");
  }
  if (kept?.format !== FORMAT) throw new Error("The file is no chat of this page; choose one that it exported as JSON.");
  if (kept.version !== 1) throw new Error("The file is of another version of this page.");
  const chat = parsed(text);
  if (!chat.turns.length) throw new Error("There is no question in this file.");
  return { ...chat, draft: "", changed: Date.now() };
}

/** Lets the browser save a text as a file. */
export function download(name, type, text) {
  const href = URL.createObjectURL(new Blob([text], { type: `${type};charset=utf-8` }));
  el("a", { href, download: name }).click();
  setTimeout(() => URL.revokeObjectURL(href), 10_000);
}
