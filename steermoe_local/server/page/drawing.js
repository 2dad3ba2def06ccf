// Drawing the map of experts on a canvas: RD, or an effect, as colour, the chosen experts framed, those that an answer used as dots.

export const LEFT = 26; // CSS pixels for the layers' numbers
export const TOP = 15; // and for the experts'

/** Least |RD|, or |effect|, of the full colour, as LEAST_RD of maps/colours.py: below it differences are noise. */
export const LEAST = 0.02;

const SMALLEST_FRAME = 9; // pixels, of a chosen expert

const SHADES = 64; // of a colour, on each side of 0

/** How strong a colour is for a value: the root, so that small differences are seen next to large ones. */
const strength = (value, most) => Math.sqrt(Math.min(1, Math.abs(value) / most));

/** [red, green, blue] of #rrggbb, which is how the style sheets write the colours. */
const rgb = (hex) => [1, 3, 5].map((at) => parseInt(hex.slice(at, at + 2), 16));

/** Shades from one colour to another. */
function shades(from, to) {
  const [a, b] = [rgb(from), rgb(to)];
  return Array.from({ length: SHADES + 1 }, (_, i) => {
    const mixed = a.map((part, channel) => Math.round(part + ((b[channel] - part) * i) / SHADES));
    return `rgb(${mixed.join(" ")})`;
  });
}

/** The colours that the style sheets give an element now. */
function colours(element) {
  const style = getComputedStyle(element);
  const of = (name) => style.getPropertyValue(name).trim();
  const none = of("--cell");
  return { ink: of("--ink"), faint: of("--faint"), none, empty: of("--cell-empty"), up: shades(none, of("--up")), down: shades(none, of("--down")) };
}

/**
 * Draws a map with cells of `cell` pixels. `table` is {n_layer, n_expert, values, signs}: values [layers][experts] are
 * the colours, null for a small grey cell; both may be null; `most` is the |value| of the full colour; `use` is {counts, tokens} or
 * null, selections [layers][experts] and tokens [layers].
 */
export function drawMap(canvas, table, use, cell, most) {
  const [width, height] = [LEFT + table.n_expert * cell + 1, TOP + table.n_layer * cell + 1];
  const ratio = devicePixelRatio || 1;
  canvas.width = Math.round(width * ratio);
  canvas.height = Math.round(height * ratio);
  canvas.style.width = `${width}px`;
  canvas.style.height = `${height}px`;
  const pen = canvas.getContext("2d");
  pen.scale(ratio, ratio);
  const look = colours(canvas);
  drawCells(pen, table, cell, most, look);
  if (table.signs) drawChosen(pen, table.signs, cell, look);
  if (use) drawUse(pen, use, cell, look);
  drawNumbers(pen, table, cell, look);
}

const gap = (cell) => (cell >= 10 ? 1 : 0.5);

function drawCells(pen, { n_layer: layers, n_expert: experts, values }, cell, most, look) {
  const size = cell - gap(cell);
  for (let layer = 0; layer < layers; layer++) {
    for (let expert = 0; expert < experts; expert++) {
      const value = values ? values[layer][expert] : null;
      pen.fillStyle = value === null ? look.empty : (value < 0 ? look.down : look.up)[Math.round(SHADES * strength(value, most))];
      const inset = values && value === null ? 0.3 * size : 0; // not the colour of 0, which is a value
      pen.fillRect(LEFT + expert * cell + inset, TOP + layer * cell + inset, size - 2 * inset, size - 2 * inset);
    }
  }
}

/**
 * Frames, and a corner filled: the upper right one of promoted, the lower left one of suppressed experts. A frame is
 * larger than a cell that is too small for it.
 */
function drawChosen(pen, signs, cell, look) {
  const line = cell >= 18 ? 1.5 : 1.2;
  const size = Math.max(SMALLEST_FRAME, cell - gap(cell));
  const over = Math.max(0, (size - cell) / 2);
  const wedge = Math.max(3, size * 0.42);
  const frames = new Path2D();
  const corners = new Path2D();
  signs.forEach((row, layer) =>
    row.forEach((sign, expert) => {
      if (!sign) return;
      const [x, y] = [LEFT + expert * cell - over, TOP + layer * cell - over];
      frames.rect(x + line / 2, y + line / 2, size - line, size - line);
      const [cornerX, cornerY, inwards] = sign > 0 ? [x + size, y, 1] : [x, y + size, -1];
      corners.moveTo(cornerX, cornerY);
      corners.lineTo(cornerX - inwards * wedge, cornerY);
      corners.lineTo(cornerX, cornerY + inwards * wedge);
      corners.closePath();
    }),
  );
  pen.strokeStyle = pen.fillStyle = look.ink;
  pen.lineWidth = line;
  if (over) {
    pen.fillStyle = look.none; // the colours below are those of neighbours
    pen.fill(frames);
    pen.fillStyle = look.ink;
  }
  pen.stroke(frames);
  pen.fill(corners);
}

/** Dots whose area is the share of tokens. */
function drawUse(pen, { counts, tokens }, cell, look) {
  const largest = Math.max(1.6, cell * 0.28);
  const dots = new Path2D();
  counts.forEach((row, layer) =>
    row.forEach((count, expert) => {
      if (!count) return;
      const radius = Math.max(0.7, largest * Math.sqrt(Math.min(1, count / tokens[layer])));
      const [x, y] = [LEFT + (expert + 0.5) * cell - 0.5, TOP + (layer + 0.5) * cell - 0.5];
      dots.moveTo(x + radius, y);
      dots.arc(x, y, radius, 0, 2 * Math.PI);
    }),
  );
  pen.fillStyle = look.ink;
  pen.strokeStyle = look.none;
  pen.lineWidth = 1;
  if (cell >= 10) pen.stroke(dots); // so that a dot is visible on a dark cell
  pen.fill(dots);
}

function drawNumbers(pen, { n_layer: layers, n_expert: experts }, cell, look) {
  pen.fillStyle = look.faint;
  pen.font = "10px system-ui, sans-serif";
  pen.textBaseline = "middle";
  pen.textAlign = "right";
  const every = Math.ceil(11 / cell);
  for (let layer = 0; layer < layers; layer += every) pen.fillText(String(layer), LEFT - 6, TOP + (layer + 0.5) * cell);
  pen.textAlign = "center";
  const step = [1, 2, 4, 8, 16, 32, 64].find((n) => n * cell >= 26) ?? 128;
  for (let expert = 0; expert < experts; expert += step) pen.fillText(String(expert), LEFT + (expert + 0.5) * cell, TOP / 2);
}

/** Draws the legend's ramp of colours, from the largest negative value to the largest positive one. */
export function drawRamp(canvas) {
  const pen = canvas.getContext("2d");
  const look = colours(canvas);
  for (let x = 0; x < canvas.width; x++) {
    const value = (2 * x) / (canvas.width - 1) - 1;
    pen.fillStyle = (value < 0 ? look.down : look.up)[Math.round(SHADES * strength(value, 1))];
    pen.fillRect(x, 0, 1, canvas.height);
  }
}
