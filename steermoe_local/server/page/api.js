// The server's API: JSON, streams of server-sent events, and what goes wrong, in plain words.

const KEY = "steermoe.key";

const CHAT = "v1/chat/completions";

/** What went wrong: `title` for everyone, `detail` from the server, `kind` for the page; `field` of the request is to blame. */
export class Problem extends Error {
  field = "";
  code = ""; // the server's

  constructor(kind, title, detail = "", retryAfter = null) {
    super(title);
    Object.assign(this, { kind, title, detail, retryAfter });
  }
}

function gone() {
  return new Problem("gone", "The server does not answer.", "Is steermoe serve still running? The page goes on when it is back.");
}

const REFUSED_STEERING = ["impossible_choice", "no_numbers", "steering_not_found", "model_mismatch"];

/** The problem behind an error of the server: an answer's status, or 0 for one that came within a stream. */
export function problemOf(status, error, retryAfter, hasKey) {
  const detail = typeof error?.message === "string" ? error.message : "";
  const code = error?.code;
  if (status === 401) {
    return new Problem("key", hasKey ? "The server does not accept this API key." : "The server asks for its API key.");
  }
  if (status === 429) {
    const when = retryAfter ? `Try again in ${retryAfter} s.` : "Try again in a moment.";
    return new Problem("busy", "The server is busy: too many requests wait.", when, retryAfter);
  }
  if (code === "timeout") return new Problem("server", "The answer took too long.", detail);
  if (code === "loading") return new Problem("loading", "The model is still being loaded.", "", 1);
  if (status === 503 || code === "stopping") return new Problem("gone", "The server cannot answer now.", detail, retryAfter);
  if (code === "unknown_host") return new Problem("refused", "The server does not know this host name.", detail);
  if (REFUSED_STEERING.includes(code) || String(error?.param ?? "").startsWith("steering")) {
    return new Problem("steering", "The server refuses this steering.", detail);
  }
  if (code === "context_length_exceeded") return new Problem("refused", "The conversation is too long for the model.", detail);
  if (status >= 500 || status === 0) return new Problem("server", "The server failed.", detail);
  return new Problem("refused", "The server refuses this request.", detail || `status ${status}`);
}

/** Events of a stream: the text of each one's data. Raises Problem when it breaks off before [DONE]. */
export async function* events(stream) {
  const reader = stream.getReader();
  const decoder = new TextDecoder();
  let waiting = "";
  try {
    for (;;) {
      let part;
      try {
        part = await reader.read();
      } catch (error) {
        if (error.name === "AbortError") throw error;
        part = { done: true };
      }
      if (part.done) throw new Problem("gone", "The connection broke off.", "The answer is not complete.");
      waiting += decoder.decode(part.value, { stream: true });
      const whole = waiting.split(/\r?\n\r?\n/);
      waiting = whole.pop();
      for (const event of whole) {
        const lines = event.split(/\r?\n/).filter((line) => line.startsWith("data:"));
        const data = lines.map((line) => line.slice(5).replace(/^ /, "")).join("\n");
        if (data === "[DONE]") return;
        if (data) yield data;
      }
    }
  } finally {
    reader.cancel().catch(() => {});
  }
}

/** The server behind this page. Addresses are relative, so that the page also works behind a proxy's path. */
export class Server {
  #key = ""; // for browsers that keep nothing for a page
  #tellsSteered = true; // until it refuses the field

  get key() {
    try {
      return sessionStorage.getItem(KEY) ?? this.#key;
    } catch {
      return this.#key;
    }
  }

  set key(value) {
    this.#key = value;
    try {
      sessionStorage.setItem(KEY, value);
    } catch {
      // it is known until the page is left
    }
  }

  /** The base URL that programs are given. */
  get base() {
    return new URL("v1", document.baseURI).href;
  }

  async #fetch(path, { body, signal, method = body === undefined ? "GET" : "POST" } = {}) {
    const headers = {};
    const key = this.key;
    if (key) headers.Authorization = `Bearer ${key}`;
    if (body !== undefined) headers["Content-Type"] = "application/json";
    let response;
    try {
      response = await fetch(path, { method, headers, signal, body: body && JSON.stringify(body), cache: "no-store", credentials: "omit" });
    } catch (error) {
      if (error.name === "AbortError") throw error;
      throw gone();
    }
    if (response.ok) return response;
    const told = await response.json().catch(() => null);
    const problem = problemOf(response.status, told?.error, Number(response.headers.get("Retry-After")) || null, Boolean(key));
    throw Object.assign(problem, { field: String(told?.error?.param ?? ""), code: String(told?.error?.code ?? "") });
  }

  /** The JSON answer to a DELETE. Raises Problem. */
  remove(path) {
    return this.get(path, undefined, undefined, "DELETE");
  }

  /** A JSON answer; of a GET, unless there is a body. Raises Problem, and AbortError. */
  async get(path, signal, body, method) {
    const response = await this.#fetch(path, { signal, body, method });
    try {
      return await response.json();
    } catch (error) {
      if (error.name === "AbortError") throw error;
      throw gone();
    }
  }

  /** Registered steerings, the default and the model's shape. */
  steerings(signal) {
    return this.get("v1/steering", signal);
  }

  /** RD and signs of a map under a choice. */
  table(name, choice, signal) {
    const query = new URLSearchParams();
    for (const [field, value] of Object.entries(choice ?? {})) {
      if (field !== "map" && value !== null && value !== undefined) query.set(field, String(value));
    }
    const path = `v1/steering/${encodeURIComponent(name)}/map`;
    return this.get(query.size ? `${path}?${query}` : path, signal);
  }

  /** The tree of a Markdown text, {blocks}. Raises Problem. */
  markdown(text) {
    return this.get("page/markdown", undefined, { text: text.toWellFormed?.() ?? text });
  }

  /** A whole answer. Raises Problem, and AbortError. */
  answer(body, signal) {
    return this.get(CHAT, signal, body);
  }

  /** Chunks of an answer; servers that cannot say what was steered are not asked to. Raises Problem, and AbortError. */
  async *chat(body, signal) {
    const { return_steered: _, ...less } = body;
    const ask = (asked) => this.#fetch(CHAT, { body: { ...asked, stream: true }, signal });
    let response;
    try {
      response = await ask(this.#tellsSteered ? body : less);
    } catch (problem) {
      if (problem.field !== "return_steered") throw problem;
      this.#tellsSteered = false;
      response = await ask(less);
    }
    for await (const data of events(response.body)) {
      const chunk = JSON.parse(data);
      if (chunk.error) throw problemOf(0, chunk.error, null, true);
      yield chunk;
    }
  }
}
