/** Points, lines and bands on two axes, each linear or logarithmic, as SVG; and a table that says the same. */

import { dialog, el, put, svg } from "../dom.js";
import { number } from "../format.js";

const SHAPES = {
  dot: "M-3.2 0a3.2 3.2 0 1 0 6.4 0a3.2 3.2 0 1 0-6.4 0z", diamond: "M0-4.6L4.6 0 0 4.6-4.6 0z",
  cross: "M-3.6-3.6l7.2 7.2m0-7.2l-7.2 7.2", ring: "M-3 0a3 3 0 1 0 6 0a3 3 0 1 0-6 0z",
};
const OPEN = new Set(["cross", "ring"]);
/** Pixels between two labels, and from a point within which it is pointed at. */
const APART = 14, NEAR = 24;

export class Plane {
  /**
   * `name`, `unit`: the heading, which stands elsewhere if `bare`; `x`, `y`: {name, log, format, ticks, values: texts in place of numbers}; `height`: of the drawing.
   */
  constructor(host, options) {
    this.options = { height: 300, ...options };
    this.x = { format: (value) => number(value), ...options.x };
    this.y = { format: (value) => number(value, 4), ...options.y };
    this.plot = el("div", { class: "plot plane", role: "img", tabindex: "0" });
    this.tip = el("div", { class: "tip", hidden: true });
    const table = el("button", { type: "button", class: "bare as-table", title: "As a table", "aria-label": `${options.name} as a table`, on: { click: () => this.table() } }, "▤");
    const head = el("div", { class: "chart-head" }, options.swatch && el("span", { class: "swatch", style: { "--own": options.swatch } }), el("h3", { class: options.bare ? "for-readers" : undefined }, options.name), el("span", { class: "unit" }, options.unit ?? ""), el("span", { class: "space" }), table);
    this.node = el("figure", { class: "chart plane-chart" }, head, this.plot);
    host.append(this.node);
    this.watch = new ResizeObserver(() => this.draw());
    this.watch.observe(this.plot);
    this.plot.addEventListener("pointermove", (event) => this.point(event));
    this.plot.addEventListener("pointerleave", () => this.tell(null));
    this.plot.addEventListener("blur", () => this.tell(null));
    this.plot.addEventListener("keydown", (event) => this.step(event));
  }

  destroy() {
    this.watch.disconnect();
    this.node.remove();
  }

  /**
   * `points`: [{x, y, colour, shape, text: [lines], open}]; `lines`: [{x, y, colour, dash, thin, said}]; `bands`: [{x, low, high, colour}];
   * `bars`: [{x, low, high, colour}]; `beyond`: {x, said: [before, after]}: a sunk ground from there on; `notes`: [{x, y, text, colour, side}].
   */
  set(shown) {
    this.shown = { points: [], lines: [], bands: [], bars: [], notes: [], ...shown };
    this.ends();
    this.draw();
    this.describe();
  }

  ends() {
    const { points, lines, bands, bars } = this.shown;
    const xs = [...points.map(({ x }) => x), ...lines.flatMap(({ x }) => x), ...bars.map(({ x }) => x)];
    const ys = [...points.map(({ y }) => y), ...lines.flatMap(({ y }) => y), ...bars.flatMap(({ low, high }) => [low, high]), ...bands.flatMap(({ low, high }) => [...low, ...high])];
    this.xs = widened(xs, this.x.log, this.shown.xs);
    this.ys = widened(ys, this.y.log, this.shown.ys);
  }

  draw() {
    const wide = this.plot.clientWidth, tall = this.options.height;
    if (!wide || !this.shown) return;
    const { points, lines, bands, bars, notes, beyond } = this.shown;
    const yTicks = ticks(...this.ys, this.y, 5), yTexts = yTicks.map((value) => this.y.format(value));
    const left = 12 + Math.max(20, ...yTexts.map((text) => text.length * 6.4)), labels = lines.filter(({ said }) => said);
    const right = 12 + Math.max(0, ...labels.map((line) => this.overhang(line, wide - left)));
    const box = (this.box = { left, top: 10, right: Math.max(left + 60, wide - right), bottom: tall - 24 });
    const px = (this.px = scale(this.xs, box.left, box.right, this.x.log)), py = (this.py = scale(this.ys, box.bottom, box.top, this.y.log));
    const xTicks = ticks(...this.xs, this.x, Math.max(2, Math.min(6, Math.floor((box.right - box.left) / 62))));
    const at = beyond && Math.min(Math.max(px(beyond.x), box.left), box.right);
    const text = (x, y, said, more = {}) => svg("text", { x: x.toFixed(1), y: y.toFixed(1), ...more }, said);
    const drawing = svg("svg", { width: wide, height: tall, viewBox: `0 0 ${wide} ${tall}`, "aria-hidden": "true" },
      beyond && [svg("rect", { x: at, y: box.top, width: box.right - at, height: box.bottom - box.top, class: "beyond" }),
        at - box.left > 60 && text(at - 6, box.top + 11, beyond.said[0], { class: "small-text", "text-anchor": "end" }), box.right - at > 60 && text(at + 6, box.top + 11, beyond.said[1], { class: "small-text" })],
      yTicks.map((value, index) => [svg("path", { d: `M${box.left} ${(py(value)).toFixed(1)}H${box.right}`, class: "grid-line" }), text(box.left - 7, py(value) + 4, yTexts[index], { "text-anchor": "end", class: "small-text" })]),
      svg("path", { d: `M${box.left} ${box.bottom + 0.5}H${box.right}`, class: "axis-line" }),
      xTicks.map((value) => text(px(value), box.bottom + 17, this.x.values?.[value] ?? this.x.format(value), { "text-anchor": "middle", class: "small-text" })),
      bands.map((band) => styled(svg("path", { d: area(band, px, py), class: "band" }), { fill: band.colour })),
      lines.map((line) => styled(svg("path", { d: path(line, px, py), class: "curve", "stroke-dasharray": line.dash, "stroke-width": line.thin ? 1 : 1.75 }), { stroke: line.colour })),
      bars.map((bar) => styled(svg("path", { d: `M${px(bar.x)} ${py(bar.low)}V${py(bar.high)}m-4 0h8M${px(bar.x) - 4} ${py(bar.low)}h8`, class: "curve", "stroke-width": 1.5 }), { stroke: bar.colour })),
      points.map((each) => {
        const open = OPEN.has(each.shape);
        return styled(svg("path", { d: SHAPES[each.shape ?? "dot"], transform: `translate(${px(each.x).toFixed(1)} ${py(each.y).toFixed(1)})`, class: open ? "mark open" : "mark" }), open ? { stroke: each.colour } : { fill: each.colour });
      }),
      apart(labels.map((line) => ({ ...line, at: py(line.y.at(-1)) })), box).map((line) => styled(text(px(line.x.at(-1)) + 7, line.at + 4, line.said, { class: "end-text" }), { fill: line.ink ?? line.colour })),
      notes.map((note) => this.noted(note, px, py, box, text)));
    this.cursor = svg("path", { d: SHAPES.ring, class: "cursor", visibility: "hidden" });
    drawing.append(this.cursor);
    put(this.plot, drawing, this.tip);
  }

  noted({ x, y, text: said, colour, above }, px, py, box, text) {
    const wide = said.length * 6.2, end = px(x) + wide + 10 > box.right + 12;
    return styled(text(px(x) + (end ? -9 : 9), py(y) + (above ? -7 : 4), said, { class: "end-text", "text-anchor": end ? "end" : "start" }), { fill: colour });
  }

  /** Room that the label at a line's end needs at the right of the box. */
  overhang({ x, said }, wide) {
    const share = scale(this.xs, 0, 1, this.x.log)(x.at(-1));
    return Math.max(0, said.length * 6.4 + 12 - (1 - share) * wide);
  }

  /** The points in the order in which keys go through them. */
  get order() {
    return this.shown.points.filter(({ text }) => text).toSorted((a, b) => a.x - b.x || a.y - b.y);
  }

  point(event) {
    if (!this.px) return;
    const at = this.plot.getBoundingClientRect(), x = event.clientX - at.left, y = event.clientY - at.top;
    let near = null, least = NEAR;
    for (const each of this.order) {
      const away = Math.hypot(this.px(each.x) - x, this.py(each.y) - y);
      if (away < least) [near, least] = [each, away];
    }
    this.tell(near);
  }

  step(event) {
    const by = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
    if (!by || !this.shown?.points.length) return;
    event.preventDefault();
    const all = this.order, from = all.indexOf(this.told);
    this.tell(all[Math.max(0, Math.min(all.length - 1, from < 0 ? 0 : from + by))]);
  }

  tell(point) {
    this.told = point;
    this.tip.hidden = !point;
    this.cursor?.setAttribute("visibility", point ? "visible" : "hidden");
    if (!point) return;
    this.cursor.setAttribute("transform", `translate(${this.px(point.x)} ${this.py(point.y)}) scale(2)`);
    put(this.tip, el("b", {}, point.text[0]), point.text.slice(1).map((line) => el("div", { class: "quiet" }, line)));
    const x = this.px(point.x), room = this.plot.clientWidth;
    this.tip.style.left = `${x + this.tip.offsetWidth + 16 > room ? Math.max(0, x - this.tip.offsetWidth - 12) : x + 12}px`;
    this.tip.style.top = `${Math.max(0, this.py(point.y) - this.tip.offsetHeight - 6)}px`;
    this.plot.setAttribute("aria-description", point.text.join(", "));
  }

  describe() {
    const { points, lines } = this.shown, counted = points.length === 1 ? "1 point" : `${points.length} points`;
    const lowest = points.length ? points.reduce((a, b) => (a.y <= b.y ? a : b)) : null;
    const told = lowest ? `; lowest ${this.y.format(lowest.y)} at ${this.x.values?.[lowest.x] ?? this.x.format(lowest.x)}` : "";
    this.plot.setAttribute("aria-label", `${this.options.name}: ${this.y.name} by ${this.x.name}, ${counted}${told}${lines.length ? `, ${lines.length} lines` : ""}`);
  }

  table() {
    const rows = this.order.slice(0, 500);
    const shown = dialog(this.options.name, el("table", { class: "plain" },
      el("thead", {}, el("tr", {}, el("th", {}, "point"), el("th", { class: "number" }, this.x.name), el("th", { class: "number" }, this.y.name))),
      el("tbody", {}, rows.map((each) => el("tr", {}, el("td", {}, each.text[0]), el("td", { class: "number" }, this.x.values?.[each.x] ?? this.x.format(each.x)), el("td", { class: "number" }, this.y.format(each.y)))))),
      el("div", { class: "buttons" }, el("span"), el("button", { type: "button", on: { click: () => shown.close() } }, "Close", el("kbd", {}, "esc"))));
  }
}

function styled(node, style) {
  for (const [key, value] of Object.entries(style)) node.style.setProperty(key, value);
  return node;
}

function scale([low, high], from, to, log) {
  const of = log ? Math.log : (value) => value, begin = of(low), span = of(high) - begin || 1;
  return (value) => from + ((of(value) - begin) / span) * (to - from);
}

function widened(values, log, given) {
  if (given) return given;
  const there = values.filter((value) => Number.isFinite(value) && (!log || value > 0));
  if (!there.length) return log ? [1, 10] : [0, 1];
  let low = Math.min(...there), high = Math.max(...there);
  if (log) {
    const room = Math.max(0.05 * Math.log(high / low), 0.02);
    return [low / Math.exp(room), high * Math.exp(room)];
  }
  if (low === high) [low, high] = [low - 0.5, high + 0.5];
  const room = 0.05 * (high - low);
  return [low - room, high + room];
}

/** At most so many round values between two ends. */
function ticks(low, high, { log, values, ticks: given }, most) {
  if (given) return given.filter((_, index) => index % Math.ceil(given.length / most) === 0);
  if (values) return values.map((_, index) => index).filter((index) => index % Math.ceil(values.length / most) === 0);
  if (log && high / low > 8) {
    const first = Math.floor(Math.log10(low)), last = Math.ceil(Math.log10(high));
    for (const within of [[1, 2, 5], [1, 3], [1]]) {
      const found = [];
      for (let power = first; power <= last; power++) found.push(...within.map((each) => each * 10 ** power));
      const inside = found.filter((value) => value >= low && value <= high);
      if (inside.length <= most) return inside;
      if (within.length === 1) return inside.filter((_, index) => index % Math.ceil(inside.length / most) === 0);
    }
  }
  const rough = (high - low) / most, unit = 10 ** Math.floor(Math.log10(rough));
  const step = [1, 2, 2.5, 5, 10].map((each) => each * unit).find((each) => each >= rough);
  const found = [];
  for (let value = Math.ceil(low / step) * step; value <= high; value += step) found.push(Number(value.toPrecision(12)));
  return found;
}

function path({ x, y }, px, py) {
  return x.map((at, index) => `${index ? "L" : "M"}${px(at).toFixed(1)} ${py(y[index]).toFixed(1)}`).join("");
}

function area({ x, low, high }, px, py) {
  const up = x.map((at, index) => `${index ? "L" : "M"}${px(at).toFixed(1)} ${py(high[index]).toFixed(1)}`).join("");
  return `${up}${x.map((_, index) => x.length - 1 - index).map((index) => `L${px(x[index]).toFixed(1)} ${py(low[index]).toFixed(1)}`).join("")}Z`;
}

/** Labels pushed apart, within the box. */
function apart(labels, { top, bottom }) {
  labels.sort((a, b) => a.at - b.at);
  labels.forEach((each, index) => (each.at = Math.max(each.at, index ? labels[index - 1].at + APART : top)));
  for (let index = labels.length - 1; index >= 0; index--) labels[index].at = Math.min(labels[index].at, index === labels.length - 1 ? bottom : labels[index + 1].at - APART);
  return labels;
}
