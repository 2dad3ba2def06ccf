// An answer token by token, with the experts of each: what is asked, and what is read of the answer.

import { Problem } from "./api.js";

/** Experts [tokens, layers, experts of a token], decoded from base64 of little-endian int32, as the server gives them. */
export class Routed {
  #numbers;

  /** Raises Problem for what is no such table. */
  constructor(base64, nLayer, nUsed) {
    let bytes;
    try {
      bytes = atob(base64);
    } catch {
      throw unreadable("it is not base64");
    }
    const row = nLayer * nUsed;
    if (!(row > 0) || bytes.length % (4 * row)) throw unreadable(`${bytes.length} bytes are no whole tokens of ${nLayer} layers with ${nUsed} experts`);
    const view = new DataView(new ArrayBuffer(bytes.length));
    for (let i = 0; i < bytes.length; i++) view.setUint8(i, bytes.charCodeAt(i));
    this.#numbers = new Int32Array(bytes.length / 4);
    for (let i = 0; i < this.#numbers.length; i++) this.#numbers[i] = view.getInt32(4 * i, true);
    Object.assign(this, { nTokens: this.#numbers.length / row, nLayer, nUsed });
  }

  /** The experts that a token selected in a layer; none where the layer has no router. */
  experts(token, layer) {
    const at = (token * this.nLayer + layer) * this.nUsed;
    return [...this.#numbers.subarray(at, at + this.nUsed)].filter((expert) => expert >= 0);
  }

  /** One token's selections as a table [layers][experts] of 0 and 1, as the heat map has those of an answer. */
  counts(token, nExpert) {
    return Array.from({ length: this.nLayer }, (_, layer) => {
      const row = Array(nExpert).fill(0);
      for (const expert of this.experts(token, layer)) if (expert < nExpert) row[expert] = 1;
      return row;
    });
  }
}

function unreadable(why) {
  return new Problem("server", "The experts of each token cannot be read.", why);
}

/**
 * The request that gives an answer again with its tokens: the same messages, seed and steering, up to as many tokens.
 * Asking once more when someone wants to look costs least: recorded with every answer, each of them would have to compute
 * its whole prompt anew, and carry 4 bytes for each expert of each token, 1.5 KB a token at 48 layers of 8.
 */
export function traceRequest(answer, turn, messages) {
  const { temperature } = turn.options;
  const { prompt } = answer.facts;
  return {
    messages,
    steering: answer.asked,
    seed: answer.facts.seed ?? turn.seed,
    ...(temperature === undefined ? {} : { temperature }),
    max_tokens: answer.facts.tokens,
    logprobs: true,
    return_tokens: true,
    return_routed_experts: true,
    routed_experts_start_len: Number.isSafeInteger(prompt) && prompt > 0 ? prompt - 1 : 0, // the row that draws the first token
    return_steered: true,
  };
}

const text = (value) => (typeof value === "string" ? value : "");

/**
 * What the answer to a `request` says of its tokens: {text, reasoning, applied, routed, tokens}; tokens are {id, text,
 * probability, rule, row}, row that in `routed` which drew the token, the one of the token before it; rule is undefined where
 * the server does not say. `shape` is the model's. Raises Problem when the experts are missing or fit neither the tokens nor
 * the model.
 */
export function traceOf(body, shape, request) {
  const choice = body?.choices?.[0];
  const encoded = body?.sglext?.routed_experts;
  if (typeof encoded !== "string" || !Array.isArray(choice?.tokens)) throw new Problem("server", "This server does not give the experts of each token.");
  const routed = new Routed(encoded, shape.n_layer, shape.n_expert_used);
  const ids = choice.tokens;
  const first = body.usage?.prompt_tokens - 1 - request.routed_experts_start_len; // NaN where the server does not say
  if (!(first >= 0) || routed.nTokens < first + ids.length) {
    throw unreadable(`experts of ${routed.nTokens} tokens came, from the one before token ${1 - first} of ${ids.length} on`);
  }
  const entries = choice.logprobs?.content ?? [];
  const tokens = ids.map((id, i) => ({
    id,
    text: text(entries[i]?.token),
    probability: Number.isFinite(entries[i]?.logprob) ? Math.exp(entries[i].logprob) : null,
    rule: choice.token_rules?.[i],
    row: first + i,
  }));
  return { text: text(choice.message?.content), reasoning: text(choice.message?.reasoning_content), applied: body.steering ?? null, routed, tokens };
}

/** A token's text so that all of it can be seen; `spoken` for those who hear it. */
export function shownToken({ id, text }, spoken = false) {
  if (!text) return spoken ? `number ${id}` : `#${id}`;
  const signs = spoken ? { "\n": " line break ", "\t": " tab ", "\r": " return " } : { "\n": "\u21b5\n", "\t": "\u2192\t", "\r": "\u240d" };
  // what has no shape of its own, or would turn the text around it
  return text.replace(/[\p{Cc}\p{Cf}\p{Co}\p{Cn}\u2028\u2029]/gu, (sign) => signs[sign] ?? `\\u{${sign.codePointAt(0).toString(16)}}`);
}
