// Making elements and drawing once per frame. Text becomes text nodes, never markup.

/** The element with an id; it is in index.html, or that is a mistake of ours. */
export function byId(id) {
  const found = document.getElementById(id);
  if (!found) throw new Error(`index.html has no element #${id}`);
  return found;
}

/**
 * A new element. `properties` are attributes; a function under "onNAME" listens to the event NAME, null and false are
 * left out. Strings among `children` become text nodes; lists among them may be long.
 */
export function el(tag, properties = {}, ...children) {
  const made = document.createElement(tag);
  for (const [name, value] of Object.entries(properties)) {
    if (typeof value === "function") made.addEventListener(name.replace(/^on/, ""), value);
    else if (value !== null && value !== undefined && value !== false) made.setAttribute(name, value === true ? "" : String(value));
  }
  for (const child of children.flat()) if (child !== null && child !== undefined) made.append(child);
  return made;
}

/** Calls `work` with all that was given since the last frame, at most once a frame, however often `add` is called. */
export class PerFrame {
  #work;
  #waiting = new Set();
  #frame = 0;

  constructor(work) {
    this.#work = work;
  }

  add(item) {
    this.#waiting.add(item);
    // A tab in the background has no frames; what came is drawn when it is looked at, or by flush.
    this.#frame ||= requestAnimationFrame(() => this.flush());
  }

  flush() {
    cancelAnimationFrame(this.#frame);
    this.#frame = 0;
    const items = [...this.#waiting];
    this.#waiting.clear();
    if (items.length) this.#work(items);
  }
}

/** `work`, called `milliseconds` after the last call of what is returned. */
export function debounced(work, milliseconds) {
  let timer = 0;
  return (...given) => {
    clearTimeout(timer);
    timer = setTimeout(() => work(...given), milliseconds);
  };
}

/** A number with its sign, the minus as typeset. */
export function signed(value, digits = 3) {
  const text = Math.abs(value).toFixed(digits);
  if (Number(text) === 0) return text;
  return (value < 0 ? "\u2212" : "+") + text;
}

/** "1 token", "3 tokens". */
export function plural(number, word) {
  return `${number} ${word}${number === 1 ? "" : "s"}`;
}

/** Puts text on the clipboard and says so on the button. */
export async function copy(text, button) {
  const label = button.textContent;
  try {
    await navigator.clipboard.writeText(text); // there only at https and on this machine
    button.textContent = "Copied";
  } catch {
    button.textContent = "Not allowed here";
  }
  setTimeout(() => (button.textContent = label), 1500);
}
