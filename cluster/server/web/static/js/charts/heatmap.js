/** Load of experts over steps, on a canvas: blue below an even share, neutral at it, brown above; under 1% ink. */

import { channels } from "../colours.js";
import { el } from "../dom.js";
import { number, whole } from "../format.js";

const DEAD = 0.01, SPAN = 2; // powers of two to either side

/** `load`: [experts][steps], 1 is an even share; `spans`: steps until the end, of a run that goes on. */
export class HeatMap {
  constructor({ label, height }) {
    this.canvas = el("canvas", { class: "heat", role: "img", "aria-label": label });
    this.height = height;
    this.label = label;
    this.canvas.addEventListener("pointermove", (event) => this.point(event));
    this.watch = new ResizeObserver(() => this.draw());
    this.watch.observe(this.canvas);
  }

  close() {
    this.watch.disconnect();
  }

  set(load, steps, end) {
    Object.assign(this, { load, steps, end: Math.max(end ?? 0, steps.at(-1) ?? 1) });
    this.canvas.style.height = `${Math.max(this.height, Math.min(160, load.length * 4))}px`;
    const dead = load.map((row, expert) => [expert, row.findLast((value) => value !== null)]).filter(([, value]) => value !== null && value !== undefined && value < DEAD).map(([expert]) => expert);
    this.canvas.setAttribute("aria-label", `${this.label}: ${load.length} experts over ${whole(steps.at(-1))} steps${dead.length ? `; under 1% now: ${dead.join(", ")}` : "; none is under 1% now"}`);
    this.draw();
    return dead;
  }

  draw() {
    if (!this.load?.length) return;
    const { canvas, load, steps } = this, ratio = devicePixelRatio;
    const wide = (canvas.width = Math.max(1, Math.round(canvas.clientWidth * ratio))), tall = (canvas.height = Math.max(1, Math.round(canvas.clientHeight * ratio)));
    const image = new ImageData(wide, tall), pixels = image.data;
    const stops = ["--heat-low", "--heat-mid", "--heat-high", "--ink1"].map(channels);
    const columns = new Int32Array(wide).fill(-1);
    let at = 0;
    for (let x = 0; x < wide; x++) {
      const step = ((x + 0.5) / wide) * this.end;
      if (step > steps.at(-1)) break;
      while (at < steps.length - 1 && steps[at] < step) at++;
      columns[x] = at;
    }
    for (let expert = 0; expert < load.length; expert++) {
      const from = Math.round((expert * tall) / load.length), to = Math.max(from + 1, Math.round(((expert + 1) * tall) / load.length) - (load.length <= 16 ? 1 : 0));
      for (let x = 0; x < wide; x++) {
        const value = columns[x] < 0 ? null : load[expert][columns[x]];
        if (value === null || value === undefined) continue;
        const [red, green, blue] = shade(value, stops);
        for (let y = from; y < to; y++) {
          const place = 4 * (y * wide + x);
          pixels[place] = red;
          pixels[place + 1] = green;
          pixels[place + 2] = blue;
          pixels[place + 3] = 255;
        }
      }
    }
    canvas.getContext("2d").putImageData(image, 0, 0);
  }

  point(event) {
    const box = this.canvas.getBoundingClientRect();
    const expert = Math.floor(((event.clientY - box.top) / box.height) * this.load.length), step = ((event.clientX - box.left) / box.width) * this.end;
    const at = this.steps.findIndex((each) => each >= step), value = this.load[expert]?.[at];
    this.canvas.title = value === null || value === undefined ? "" : `expert ${expert}, step ${whole(this.steps[at])}: ${number(value)} of an even share`;
  }
}

function shade(value, [low, middle, high, ink]) {
  if (value < DEAD) return ink;
  const place = Math.max(-SPAN, Math.min(SPAN, Math.log2(value))) / SPAN, to = place < 0 ? low : high, share = Math.abs(place);
  return middle.map((each, index) => each + share * (to[index] - each));
}

/** What the colours mean. */
export function scale() {
  return el("span", { class: "legend" }, el("span", {}, el("span", { class: "swatch", style: { "--own": "var(--ink1)" } }), "under 1%"), el("span", {}, "¼", el("span", { class: "heat-scale" }), "4×"));
}
