/** A chart: uPlot with this page's look, labels at the ends of lines, a lane of marks, and a table that says the same. */

import uPlot from "../../vendor/uPlot.js";
import { colour } from "../colours.js";
import { dialog, el, put, svg } from "../dom.js";
import { number } from "../format.js";
import { valueAt, yRange } from "./curves.js";

const FONT = '11px "Inter", system-ui, sans-serif';
const MARKS = {
  checkpoint: ["M-3-3h6v6h-6z", "--ink3"], spike: ["M0-4.5L4.5 3.5h-9z", "--warning-glyph"], failure: ["M-3.5-3.5l7 7m0-7l-7 7", "--failed", true],
  config: ["M0-4a4 4 0 1 0 .01 0M0-4v8", "--ink2", true], rollback: ["M3.5-3.5l-7 3.5 7 3.5z", "--warning-glyph"],
  infinite: ["M0-4L3.5 3h-7z", "--warning-glyph"], nan: ["M-3-3l6 6m0-6l-6 6", "--warning-glyph", true],
  straggler: ["M-4 0l4-4 4 4-4 4z", "--warning-glyph"], experts: ["M-4 0a4 4 0 0 1 8 0z", "--warning-glyph"],
};
/** A canvas draws in another font until these are here, and is not drawn again by itself. */
let inFont = false;
const loaded = Promise.all([FONT, `600 ${FONT}`].map((font) => document.fonts.load(font))).then(() => (inFont = true), () => {});
/** Of more there is a line instead. */
const MOST_RINGS = 60;
/** Pixels between two marks of a kind. */
const APART = 9;
const SAID = { config: "config changed", straggler: "slow rank", experts: "dead experts", nan: "no number" };

export class Chart {
  /**
   * `name`, `unit`: the heading; `height`: of the plot in pixels; `small`: no labels at ends, fewer ticks;
   * `sync`: charts of one name share a crosshair; `zoomed(from, to)`: a part was chosen, or (null) all;
   * `format`, `xFormat`, `xExact`: how values, those of x on the axis and one of them are written; `tip`: the crosshair shows all values beside it; `zero`: may begin at 0.
   */
  constructor(host, options) {
    this.options = { xName: "step", xFormat: (value) => number(value), format: (value) => number(value), ...options };
    this.value = el("span", { class: "value" });
    this.unit = el("span", { class: "unit" }, options.unit ?? "");
    this.legend = el("span", { class: "legend" });
    this.plot = el("div", { class: "plot", role: "img", tabindex: options.small ? undefined : "0" });
    this.lane = svg("svg", { class: "lane", "aria-hidden": "true" });
    this.tip = el("div", { class: "tip", hidden: true });
    const table = el("button", { type: "button", class: "bare as-table", title: "As a table", "aria-label": `${options.name} as a table`, on: { click: () => this.table() } }, "▤");
    const head = el("div", { class: "chart-head" }, el("h2", {}, options.name), this.unit, el("span", { class: "space" }), this.legend, table, this.value);
    this.node = el("figure", { class: options.small ? "chart small" : "chart" }, options.head === false ? null : head, this.plot, this.lane);
    host.append(this.node);
    this.plot.append(this.tip);
    this.watch = new ResizeObserver(() => this.fit());
    this.watch.observe(this.plot);
    this.plot.addEventListener("keydown", (event) => this.step(event));
    if (!inFont) loaded.then(() => this.node.isConnected && this.redraw());
  }

  destroy() {
    this.watch.disconnect();
    this.u?.destroy();
    this.u = null;
    this.node.remove();
  }

  /**
   * `series`: [{x, y, kind: raw|line|ring|edge, colour, dash, label, end: [x, y], said, bare}], where an edge that is `upper`
   * and the one after it bound a band; `range`: of x, or what there is;
   * `attempts`: [{x, label}]; `reference`: {y, label}; `marks`: [{kind, x, text}]; `log`.
   */
  set(shown) {
    this.shown = shown;
    const { series, log = false, logX = false } = shown;
    const lines = series.filter(({ x }) => x.length);
    this.xs = shown.range ?? [Math.min(...lines.map(({ x }) => x[0])), Math.max(...lines.map(({ x }) => x.at(-1)))];
    if (!(this.xs[0] < this.xs[1])) this.xs = Number.isFinite(this.xs[0]) ? [this.xs[0] - 0.5, this.xs[0] + 0.5] : [0, 1];
    const positive = lines.flatMap(({ x }) => x.find((value) => value > 0) ?? []);
    this.logX = logX && positive.length > 0 && this.xs[1] > 0;
    if (this.logX) this.xs = [Math.max(this.xs[0], Math.min(...positive)), this.xs[1]];
    if (this.logX && this.xs[0] >= this.xs[1]) this.xs[0] = this.xs[1] / 2;
    this.ys = yRange(series, { zero: this.options.zero ?? true, log });
    if (shown.reference && !log) this.ys = [Math.min(this.ys[0], shown.reference.y), Math.max(this.ys[1], shown.reference.y)];
    const built = JSON.stringify([log, this.logX, series.map(({ kind, colour: name, dash, x }) => [kind, name, dash, x.length < 3]), this.padding()]);
    const data = lines.length ? uPlot.join(series.map(({ x, y }) => [x, y])) : [[], ...series.map(() => [])];
    if (this.u && this.built === built) this.u.setData(data);
    else this.build(data, built);
    this.describe();
    this.tell(null);
  }

  redraw() {
    this.built = null;
    if (this.shown) this.set(this.shown);
  }

  build(data, built) {
    this.u?.destroy();
    this.built = built;
    const { series, log = false } = this.shown, { small, sync, zoomed, format, xFormat } = this.options;
    const fonts = { font: FONT, stroke: () => colour("--ink3"), ticks: { show: false } };
    // uPlot's own ticks of a logarithmic axis never end where it begins below 1 and at no power of ten.
    const logarithmic = { splits: (u, axis, low, high) => logTicks(low, high), filter: (u, splits) => splits };
    this.u = new uPlot({
      width: Math.max(this.plot.clientWidth, 60), height: this.options.height, padding: [8, this.padding(), 0, 0], legend: { show: false },
      cursor: {
        sync: sync ? { key: sync, setSeries: false, scales: ["x", null] } : undefined,
        drag: { x: Boolean(zoomed), y: false, setScale: false }, y: false,
        points: { show: false },
        bind: { dblclick: () => () => (zoomed?.(null, null), null) },
      },
      select: { show: Boolean(zoomed) },
      scales: { x: { time: false, range: () => this.xs, distr: this.logX ? 3 : 1 }, y: { range: () => this.ys, distr: log ? 3 : 1 } },
      axes: [
        { ...fonts, ...(this.logX ? logarithmic : {}), size: 22, gap: 4, space: small ? 64 : 90, grid: { show: false }, border: { show: true, stroke: () => colour("--line2"), width: 1 }, values: (u, splits) => splits.map((value) => (value === null ? null : xFormat(value))) },
        { ...fonts, ...(log ? logarithmic : {}), size: (u, texts) => Math.max(small ? 38 : 46, ...(texts ?? []).map((text) => 14 + textWidth(text ?? ""))), gap: 6, space: Math.max(26, this.options.height / 6.5), grid: { stroke: () => colour("--line"), width: 1 }, values: (u, splits) => distinct(splits, format) },
      ],
      series: [{}, ...series.map((each) => drawn(each))],
      bands: series.flatMap((each, index) => (each.upper ? { series: [index + 1, index + 2], fill: colour(each.colour, 0.16) } : [])),
      hooks: {
        drawClear: [() => this.behind()],
        draw: [() => this.over()],
        setCursor: [(u) => this.tell(u.cursor.left >= 0 ? u.posToVal(u.cursor.left, "x") : null)],
        setSelect: [(u) => {
          const { left, width } = u.select;
          if (width > 4) zoomed?.(u.posToVal(left, "x"), u.posToVal(left + width, "x"));
          if (width) u.setSelect({ left: 0, width: 0, top: 0, height: 0 }, false);
        }],
      },
    }, data, this.plot);
  }

  fit() {
    const width = this.plot.clientWidth;
    if (!this.u || !width || width === this.u.width) return;
    this.u.setSize({ width, height: this.options.height });
    const padding = this.padding();
    if (Math.abs(padding - this.u.padding[1]) > 1) this.redraw();
  }

  labels() {
    return this.shown.series.filter(({ end, said }) => end && said);
  }

  /** Room at the right for the labels at the ends of lines. */
  padding() {
    const labels = this.options.small ? [] : this.labels();
    if (!labels.length) return Math.max(10, this.options.atLeast ?? 0);
    const inside = Math.max(this.plot.clientWidth - 46, 100);
    return Math.round(Math.max(10, this.options.atLeast ?? 0, ...labels.map(({ end, said }) => {
      const at = (x) => (this.logX ? Math.log(x) : x), [from, to] = this.xs.map(at);
      const share = Math.max(0.05, (at(end[0]) - from) / (to - from));
      return inside - (inside - 18 - textWidth(said)) / share;
    })));
  }

  /** Attempts and a reference, behind the lines. */
  behind() {
    const { u } = this, { attempts = [], reference } = this.shown, { ctx } = u, ratio = devicePixelRatio;
    const { left, top, width, height } = u.bbox;
    ctx.save();
    ctx.font = FONT.replace("11px", `${11 * ratio}px`);
    ctx.lineWidth = ratio;
    ctx.strokeStyle = colour("--ink3", 0.8);
    ctx.fillStyle = colour("--ink3");
    ctx.setLineDash([2 * ratio, 3 * ratio]);
    let free = -Infinity;
    for (const { x, label } of attempts) {
      const at = Math.round(u.valToPos(x, "x", true)) + 0.5;
      if (at < left || at > left + width) continue;
      line(ctx, at, top, at, top + height);
      const wide = ctx.measureText(label).width;
      if (!this.options.small && at > free && at + wide < left + width) {
        ctx.fillText(label, at + 5 * ratio, top + 10 * ratio);
        free = at + wide + 12 * ratio;
      }
    }
    if (reference) {
      const at = Math.round(u.valToPos(reference.y, "y", true)) + 0.5;
      line(ctx, left, at, left + width, at);
      ctx.textAlign = "right";
      ctx.fillText(reference.label, left + width, at - 5 * ratio);
    }
    ctx.restore();
  }

  /** The dots and labels at the ends of lines, and the marks under the axis. */
  over() {
    const { u } = this, { ctx } = u, ratio = devicePixelRatio;
    ctx.save();
    const ends = this.shown.series.filter(({ end }) => end && end[0] >= this.xs[0] && end[0] <= this.xs[1]).map((each) => ({
      ...each, px: u.valToPos(each.end[0], "x", true), py: Math.min(u.bbox.top + u.bbox.height, Math.max(u.bbox.top, u.valToPos(each.end[1], "y", true))),
    }));
    for (const { px, py, colour: name, kind } of ends) {
      if (kind !== "line") continue;
      ctx.fillStyle = colour(name);
      ctx.beginPath();
      ctx.arc(px, py, 2.5 * ratio, 0, 7);
      ctx.fill();
    }
    if (!this.options.small) {
      const told = ends.filter(({ said }) => said).sort((a, b) => a.py - b.py);
      const step = 14 * ratio, bottom = u.bbox.top + u.bbox.height;
      told.forEach((each, index) => (each.at = Math.max(each.py, index ? told[index - 1].at + step : u.bbox.top + 4 * ratio)));
      for (let index = told.length - 1; index >= 0; index--) told[index].at = Math.min(told[index].at, index === told.length - 1 ? bottom : told[index + 1].at - step);
      ctx.textBaseline = "middle";
      ctx.textAlign = "left";
      ctx.font = FONT.replace("11px", `600 ${11 * ratio}px`);
      ctx.lineWidth = ratio;
      for (const { px, py, at, said, colour: name } of told) {
        ctx.strokeStyle = colour(name, 0.6);
        if (Math.abs(at - py) > 3 * ratio) line(ctx, px + 3 * ratio, py, px + 9 * ratio, at);
        ctx.lineWidth = 3 * ratio;
        ctx.strokeStyle = colour("--page");
        ctx.strokeText(said, px + 11 * ratio, at); // what lies behind does not strike it through
        ctx.lineWidth = ratio;
        ctx.fillStyle = colour(name);
        ctx.fillText(said, px + 11 * ratio, at);
      }
    }
    ctx.restore();
    this.unfinite();
    this.mark();
  }

  /** Where a line is infinite, a triangle at that end of the plot; where it has no number, a cross at the bottom. */
  unfinite() {
    const { ctx, bbox } = this.u, ratio = devicePixelRatio, half = 3.5 * ratio;
    ctx.save();
    ctx.lineWidth = 1.5 * ratio;
    for (const { x, sign } of this.breaks()) {
      const at = this.u.valToPos(x, "x", true);
      if (at < bbox.left - 1 || at > bbox.left + bbox.width + 1) continue;
      const edge = sign > 0 ? bbox.top : bbox.top + bbox.height, way = sign > 0 ? 1 : -1;
      ctx.fillStyle = ctx.strokeStyle = colour("--warning-glyph");
      if (sign) {
        ctx.beginPath();
        ctx.moveTo(at, edge);
        ctx.lineTo(at - half, edge + 2 * way * half);
        ctx.lineTo(at + half, edge + 2 * way * half);
        ctx.fill();
      } else {
        line(ctx, at - half, edge - 2 * half - ratio, at + half, edge - ratio);
        line(ctx, at - half, edge - ratio, at + half, edge - 2 * half - ratio);
      }
    }
    ctx.restore();
  }

  breaks() {
    return this.shown.series.flatMap(({ kind, breaks = [] }, index, all) => (kind === "line" && all[index - 1]?.kind === "raw" ? [] : breaks.map(([x, sign]) => ({ x, sign }))));
  }

  mark() {
    const marks = this.shown.marks ?? [], known = marks.filter(({ kind }) => MARKS[kind]);
    const kinds = [...new Set(known.map(({ kind }) => kind))];
    this.lane.toggleAttribute("hidden", !known.length);
    const signs = this.options.small ? [] : this.breaks().map(({ sign }) => Math.abs(sign));
    const legend = [...(signs.includes(1) ? ["infinite"] : []), ...(signs.includes(0) ? ["nan"] : []), ...kinds];
    put(this.legend, legend.map((kind) => el("span", {}, svg("svg", { viewBox: "-6 -6 12 12", "aria-hidden": "true" }, shape(kind)), SAID[kind] ?? kind)));
    if (!known.length) return;
    const { u } = this, left = u.bbox.left / devicePixelRatio, wide = u.bbox.width / devicePixelRatio, last = new Map(), taken = [];
    put(this.lane, svg("path", { d: `M${left} 9H${left + wide}`, stroke: "var(--line)" }), known.map(({ kind, x, text }) => {
      if (x < this.xs[0] || x > this.xs[1]) return null;
      let at = left + u.valToPos(x, "x");
      if (at - (last.get(kind) ?? -99) < APART) return null;
      last.set(kind, at);
      while (taken.some((other) => Math.abs(other - at) < APART)) at += APART; // of another kind, at the same step
      taken.push(at);
      return svg("g", { transform: `translate(${at.toFixed(1)} 9)` }, svg("title", {}, `${SAID[kind] ?? kind} at step ${x}${text ? `: ${text}` : ""}`), shape(kind));
    }));
  }

  /** What the crosshair at x says; null: it is elsewhere, the latest values stand. */
  tell(x) {
    const { series } = this.shown, { format, xFormat, xExact = xFormat, xName, tip } = this.options;
    const main = series.find(({ kind }) => kind === "raw") ?? series[0];
    if (!main) return;
    const value = x === null ? main.last?.[1] : valueAt(main.x, main.y, x);
    this.value.textContent = this.options.small ? format(value) : "";
    this.tip.hidden = x === null || !tip;
    if (this.tip.hidden) return;
    const rows = series.filter(({ kind, label }) => label && kind !== "raw").map((each) => [each, valueAt(each.x, each.y, x)]);
    const own = rows.filter(([, each]) => each !== null).sort((a, b) => a[1] - b[1]);
    put(this.tip, el("div", { class: "quiet" }, `${xName} ${xExact(x)}`), own.map(([each, at]) =>
      el("div", { class: "tip-row" }, el("span", { class: each.kind === "ring" ? "swatch ring" : "swatch", style: { "--own": `var(${each.colour})` } }), el("span", {}, each.label), el("b", { class: "number" }, format(at)), this.options.beside && el("span", { class: "number quiet" }, this.options.beside(each, x, at)))));
    const at = this.u.cursor.left + this.u.bbox.left / devicePixelRatio, room = this.plot.clientWidth;
    this.tip.style.left = `${at + this.tip.offsetWidth + 24 > room ? Math.max(0, at - this.tip.offsetWidth - 12) : at + 12}px`;
  }

  /** Moves the crosshair by keys. */
  step(event) {
    const by = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
    if (!by || !this.u) return;
    event.preventDefault();
    const wide = this.u.bbox.width / devicePixelRatio, from = this.u.cursor.left >= 0 ? this.u.cursor.left : wide / 2;
    this.u.setCursor({ left: Math.max(0, Math.min(wide, from + by * (event.shiftKey ? 50 : 8))), top: 20 });
  }

  describe() {
    const { name, xName, format, xFormat, xExact = xFormat } = this.options;
    const told = this.shown.series.filter(({ kind, x }) => kind !== "raw" && kind !== "edge" && x.length).map(({ label, last, x, y }) => {
      const values = y.filter((value) => value !== null);
      const end = last ?? [x.at(-1), y.at(-1)];
      return `${label ?? name} ${format(end[1])} at ${xName} ${xExact(end[0])}${values.length > 1 ? `, between ${format(values.reduce((a, b) => Math.min(a, b)))} and ${format(values.reduce((a, b) => Math.max(a, b)))}` : ""}`;
    });
    const breaks = this.breaks(), infinite = breaks.filter(({ sign }) => sign).length, gaps = breaks.length - infinite;
    if (infinite) told.push(`infinite at ${infinite}${infinite < 100 ? "" : " or more"} of its points, first at ${xName} ${xExact(breaks.find(({ sign }) => sign).x)}`);
    if (gaps) told.push(`no number from ${xName} ${xExact(breaks.find(({ sign }) => !sign).x)}${gaps > 1 ? ` and in ${gaps - 1} more gap${gaps > 2 ? "s" : ""}` : ""}`);
    this.plot.setAttribute("aria-label", `${name} by ${xName}: ${told.join("; ") || "nothing yet"}`);
  }

  /** The same as a table, of at most 200 rows. */
  table() {
    const { name, xName, format, xFormat, xExact = xFormat } = this.options;
    const lines = this.shown.series.filter(({ kind, label }, index, all) => kind !== "edge" && (kind !== "line" || !all.some((other) => other.kind === "raw" && other.label === label)));
    const all = [...new Set(lines.flatMap(({ x }) => x))].sort((a, b) => a - b), every = Math.max(1, Math.ceil(all.length / 200));
    const kept = all.filter((_, index) => index % every === 0 || index === all.length - 1);
    const shown = dialog(name, el("table", { class: "plain" },
      el("thead", {}, el("tr", {}, el("th", { class: "number" }, xName), lines.map(({ label }) => el("th", { class: "number" }, label ?? name)))),
      el("tbody", {}, kept.map((x) => el("tr", {}, el("td", { class: "number" }, xExact(x)), lines.map((each) => {
        const at = each.x.indexOf(x);
        return el("td", { class: "number" }, at < 0 || each.y[at] === null ? "" : format(each.y[at]));
      }))))),
      every > 1 && el("p", { class: "quiet" }, `${kept.length} of ${all.length} points.`),
      el("div", { class: "buttons" }, el("span"), el("button", { type: "button", on: { click: () => shown.close() } }, "Close", el("kbd", {}, "esc"))));
  }
}

function drawn({ kind, colour: name, dash, x, bare }) {
  if (kind === "edge") return { stroke: "transparent", width: 0, points: { show: false } };
  if (kind === "raw") return { stroke: () => colour(name, 0.28), width: 1, points: { show: false } };
  if (kind === "ring" && x.length > MOST_RINGS) return { stroke: () => colour("--ink2"), width: 1.25, points: { show: false } };
  if (kind === "ring") {
    return { stroke: () => colour("--ink3", 0.7), width: 1, points: { show: true, size: 7, width: 1.5, stroke: () => colour("--ink1"), fill: () => colour("--page") } };
  }
  return { stroke: () => colour(name), width: 1.75, dash, points: { show: !bare && x.length < 3, size: 6, fill: () => colour(name) } };
}

function shape(kind) {
  const [path, name, open] = MARKS[kind];
  return svg("path", open ? { d: path, fill: "none", stroke: `var(${name})`, "stroke-width": 1.6 } : { d: path, fill: `var(${name})` });
}

/** At most some six round numbers from `low` to `high`, both above 0. */
export function logTicks(low, high) {
  const first = Math.floor(Math.log10(low)), last = Math.ceil(Math.log10(high)), found = [];
  const every = Math.max(1, Math.ceil((last - first) / 5)), parts = last - first > 3 ? [1] : last - first > 2 ? [1, 3] : [1, 2, 5];
  for (let power = first; power <= last; power += every) for (const part of parts) found.push(Number(`${part}e${power}`));
  const inside = found.filter((value) => value >= low && value <= high);
  if (inside.length > 2) return inside;
  const step = 10 ** Math.floor(Math.log10((high - low) / 2)), wide = step * (high - low > 8 * step ? 5 : high - low > 4 * step ? 2 : 1);
  return Array.from({ length: Math.floor(high / wide) - Math.ceil(low / wide) + 1 }, (_, index) => Number(((Math.ceil(low / wide) + index) * wide).toPrecision(12)));
}

/** Texts of an axis's ticks, of as many digits as tell them apart. */
function distinct(values, format) {
  let texts = [];
  for (let digits = 3; digits < 8; digits++) {
    texts = values.map((value) => (value === null ? null : digits === 3 ? format(value) : format(value, digits)));
    const shown = texts.filter((text) => text !== null);
    if (new Set(shown).size === shown.length) return texts;
  }
  return texts.map((text, index) => (text === texts[index - 1] ? null : text));
}

function line(ctx, x0, y0, x1, y1) {
  ctx.beginPath();
  ctx.moveTo(x0, y0);
  ctx.lineTo(x1, y1);
  ctx.stroke();
}

let measuring = null;
function textWidth(text) {
  measuring ??= document.createElement("canvas").getContext("2d");
  measuring.font = `600 ${FONT}`;
  return measuring.measureText(text).width;
}
