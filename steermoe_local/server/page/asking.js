// A question and the answers to it: what is sent, and what is kept of what comes.

import { Problem } from "./api.js";
import { plural } from "./dom.js";
import { addSpan } from "./marks.js";

/**
 * A turn of the conversation, with one answer for each of `sides`: values of the field `steering`. `options` are what else
 * was asked with: {system, temperature}.
 */
export function turnOf(user, seed, sides, options = {}) {
  const answers = sides.map((steering) => ({
    side: steering === null ? "unsteered" : "steered",
    asked: steering,
    text: "",
    reasoning: "",
    steered: null, // {answer, reasoning}: spans of the texts, once the server says what was steered
    state: "running",
    applied: null,
    facts: { seed },
    problem: null,
    routing: null,
  }));
  return { user, seed, options, answers };
}

/**
 * The messages of a request. Where two answers stand side by side, the steered one is what the conversation goes on with;
 * both sides read the same conversation. A question without an answer is left out.
 */
export function messagesOf(system, turns, question) {
  const found = [];
  if (system?.trim()) found.push({ role: "system", content: system });
  for (const turn of turns) {
    const answer = turn.answers.find((one) => one.side === "steered") ?? turn.answers[0];
    if (answer.text) found.push({ role: "user", content: turn.user }, { role: "assistant", content: answer.text });
  }
  return [...found, { role: "user", content: question }];
}

/** The turn of an answer, and the messages that it answers. */
export function turnAt(turns, answer) {
  const at = turns.findIndex((turn) => turn.answers.includes(answer));
  const turn = turns[at];
  return [turn, messagesOf(turn.options.system, turns.slice(0, at), turn.user)];
}

/** Adds a chunk of the stream to an answer. */
export function take(answer, chunk) {
  const choice = chunk.choices?.[0];
  const [content, thought] = [choice?.delta?.content ?? "", choice?.delta?.reasoning_content ?? ""];
  if (choice?.rule === null || Number.isSafeInteger(choice?.rule)) {
    answer.steered ??= { answer: [], reasoning: [] };
    addSpan(answer.steered.answer, answer.text.length, content.length, choice.rule);
    addSpan(answer.steered.reasoning, answer.reasoning.length, thought.length, choice.rule);
  }
  answer.text += content;
  answer.reasoning += thought;
  if (chunk.steering !== undefined) answer.applied = chunk.steering;
  if (chunk.routing) answer.routing = chunk.routing;
  const { facts } = answer;
  if (choice?.finish_reason) facts.finish = choice.finish_reason;
  if (Number.isFinite(choice?.seed)) facts.seed = choice.seed;
  if (chunk.timings) Object.assign(facts, { tokens: chunk.timings.predicted_n, milliseconds: chunk.timings.predicted_ms });
  if (chunk.usage) {
    const { prompt_tokens, completion_tokens, prompt_tokens_details } = chunk.usage;
    Object.assign(facts, { tokens: completion_tokens, prompt: prompt_tokens, cached: prompt_tokens_details?.cached_tokens ?? 0 });
  }
}

/**
 * Follows an answer to its end; `touched()` is called for each chunk. Returns null, or the Problem that ended it, which
 * the answer has too.
 */
export async function follow(server, answer, body, signal, touched) {
  try {
    for await (const chunk of server.chat(body, signal)) {
      take(answer, chunk);
      touched();
    }
    answer.state = "done";
    return null;
  } catch (error) {
    if (error.name === "AbortError") {
      answer.state = "stopped";
      return null;
    }
    const known = error instanceof Problem;
    const problem = known ? error : new Problem("page", "The page failed.", String(error?.message ?? error));
    answer.state = "error";
    answer.problem = { title: problem.title, detail: problem.detail };
    if (!known) console.error(error);
    return problem;
  }
}

/** A turn that takes the place of those behind the first `at` of a chat: not before an answer of it has begun. */
export class Replacement {
  #chat;
  #turn;
  #at;
  #old;

  begun = false;

  constructor(chat, turn, at) {
    [this.#chat, this.#turn, this.#at, this.#old] = [chat, turn, at, chat.turns.slice(at)];
  }

  /** Would something be lost? */
  get loses() {
    return this.#old.some((turn) => turn.answers.some((answer) => answer.text));
  }

  /** Puts the turn there; true if it was not there yet. */
  begin() {
    if (this.begun) return false;
    this.begun = true;
    this.#chat.turns.splice(this.#at, this.#old.length, this.#turn);
    this.#chat.changed = Date.now();
    return true;
  }

  /** Words for what is gone, "" if it was the same question. */
  get words() {
    if (!this.begun || !this.#old.length || (this.#old.length === 1 && this.#old[0].user === this.#turn.user)) return "";
    return this.#old.length > 1 ? `${plural(this.#old.length, "question")} and their answers were replaced.` : "The question and its answer were replaced.";
  }

  undo() {
    this.#chat.turns.splice(this.#at, Infinity, ...this.#old);
  }
}

/** Changes the text of an answer, and tells listeners to `steermoe:edited`: {messages, before, after}. */
export function changeAnswer(answer, turn, before, after) {
  const detail = { messages: messagesOf(turn.options.system, before, turn.user), before: answer.text, after };
  Object.assign(answer, { text: after, steered: null, original: answer.original ?? answer.text });
  document.dispatchEvent(new CustomEvent("steermoe:edited", { detail }));
}
