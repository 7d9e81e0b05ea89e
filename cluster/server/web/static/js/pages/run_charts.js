/** A run's curves: its loss, and every other metric in a grid that finds them by name. */

import { get, runPath } from "../api.js";
import { Chart } from "../charts/chart.js";
import { curve } from "../charts/curves.js";
import { saveCsv } from "../charts/export.js";
import { runColour } from "../colours.js";
import { choice, el, empty, folded, notice, put } from "../dom.js";
import { compact, duration, loss, number, tick, unitWords, whole } from "../format.js";
import { calmly } from "../live.js";
import { change, state } from "../router.js";

export const AXES = [["step", "step"], ["examples", "examples"], ["tokens", "tokens"], ["flops", "FLOPs"], ["time", "time"]];
/** The same of runs that count something else: images and nodes are examples, masked tokens are not. */
export const axesOf = (unit) => AXES.filter(([axis]) => axis !== "examples" || /tokens$|^seen$/.test(unit)).map(([axis, label]) => [axis, axis === "tokens" ? unitWords(unit) : label]);
/** That which comes after one; null: step. */
export function nextAxis(axis, unit) {
  const all = axesOf(unit).map(([each]) => each), next = all[(all.indexOf(axis) + 1) % all.length];
  return next === "step" ? null : next;
}
export const axisLabel = (axis, unit) => (axis === "tokens" ? unitWords(unit) : AXES.find(([each]) => each === axis)[1]);
export const SCALES = [["", "lin"], ["y", "log"], ["x", "log x"], ["xy", "log-log"]];
const FIRST = ["grad_norm", "lr", "tokens_per_second", "step_time", "mfu", "memory_gb", "data_wait", "aux_loss", "z_loss", "router_entropy.mean", "expert_maxvio.max", "tflops"];
/** Numbers of a record that have no chart of their own: the loss has the large one, and counts only grow. */
const hidden = (name, unit) => ["loss", "eval_loss", "tokens", "sequences", "examples", "pairs", "time", "step", "attempt", unit, `eval_${unit}`].includes(name);
/** A score of a task, as training or an evaluation says it, and not of averaged weights. */
const isScore = (name, all) => (name.startsWith("eval_") ? !name.endsWith("_ema") : all.has(`eval_${name}`));
const UNITS = { memory_gb: "GB", data_wait: "s", step_time: "s", tflops: "TFLOP/s" };
const TIMES = new Set(["data_wait", "step_time"]);
const POINTS = 800, SMALL_POINTS = 300, AT_ONCE = 24;

export const xFormats = { step: (value) => number(value, 4), examples: (value) => compact(value), tokens: (value) => compact(value), flops: (value) => (value === 0 ? "0" : value.toExponential(2).replace(/\.?0+e/, "e").replace("e+", "e")), time: (value) => (value === 0 ? "0" : duration(value)) };

export class Charts {
  constructor(id, node, controls) {
    Object.assign(this, { id, controls, small: new Map() });
    this.wrong = el("div");
    this.unread = el("div");
    this.big = el("div", { class: "big-chart" });
    this.grid = el("div", { class: "grid" });
    this.more = el("p", { class: "quiet" });
    node.append(this.wrong, this.unread, this.big, this.grid, this.more);
    this.seen = new IntersectionObserver((entries) => {
      for (const { target, isIntersecting } of entries) target.near = isIntersecting;
      this.load();
    }, { rootMargin: "300px" });
    this.load = calmly(() => this.fetchSmall(), 30);
    this.find = el("input", { type: "search", placeholder: "Metric or /regex/", "aria-label": "Find a metric", autocomplete: "off", value: state().get("metric") ?? "", on: { input: calmly(() => change({ metric: this.find.value.trim() }), 150) } });
    this.smooth = el("input", { type: "range", min: 0, max: 20, step: 1, "aria-label": "Smoothing", on: { input: () => change({ smooth: this.smooth.value === "6" ? null : this.smooth.value }) } });
  }

  close() {
    this.closed = true;
    this.seen.disconnect();
    this.chart?.destroy();
    for (const { chart } of this.small.values()) chart?.destroy();
  }

  repaint() {
    this.chart?.redraw();
    for (const { chart } of this.small.values()) chart?.redraw();
  }

  /** Share of the shown range over which curves are smoothed. */
  get share() {
    const level = Number(state().get("smooth") ?? 6);
    return level > 0 ? 0.002 * 1.28 ** (level * 1.5) : 0;
  }

  get axis() {
    const asked = state().get("x") ?? "step";
    return AXES.some(([axis]) => axis === asked) ? asked : "step";
  }

  get axisName() {
    return this.axis === "tokens" ? unitWords(this.details.row.unit) : this.axis;
  }

  /** Which axes are logarithmic: "", x, y or xy. */
  get scale() {
    return scaleOf(state());
  }

  get zoom() {
    const query = state(), from = query.get("from"), to = query.get("to");
    return from !== null && to !== null && Number(from) < Number(to) ? [Number(from), Number(to)] : null;
  }

  show(details) {
    this.details = details;
    const query = state(), { axis, scale } = this;
    put(this.controls, folded(el("span", { class: "quiet" }, "x"), choice("x axis", axesOf(this.details.row.unit), axis, (x) => change({ x: x === "step" ? null : x, from: null, to: null })),
      choice("scale", SCALES, scale, (value) => change({ log: value })),
      el("label", { class: "smooth quiet" }, "smooth", this.smooth)),
      el("div", { class: "find-metric with-key" }, this.find, el("kbd", { "aria-hidden": "true" }, "m")),
      this.zoom && el("button", { type: "button", on: { click: () => change({ from: null, to: null }) } }, "All"));
    this.smooth.value = query.get("smooth") ?? "6";
    if (document.activeElement !== this.find) this.find.value = query.get("metric") ?? "";
    this.layOut(query.get("metric") ?? "");
    const settings = [axis, scale, this.share, this.zoom, details.row.updated, details.row.attempts].join();
    if (settings === this.settings) return;
    this.settings = settings;
    for (const each of this.small.values()) each.stale = true;
    this.fetchBig();
    this.load();
  }

  /** Which small charts there are: those whose name is looked for. */
  layOut(wanted) {
    let test = (name) => name.toLowerCase().includes(wanted.toLowerCase());
    put(this.wrong);
    const regex = /^\/(.*)\/?$/.exec(wanted);
    if (regex) {
      try {
        const found = new RegExp(regex[1].replace(/\/$/, ""), "i");
        test = (name) => found.test(name);
      } catch (error) {
        put(this.wrong, el("p", { class: "wrong" }, error.message));
        return;
      }
    }
    const { unit } = this.details.row, all = this.details.metrics.filter((name) => !hidden(name, unit)), known = new Set(all);
    const like = (name) => (name === `${unit}_per_second` ? "tokens_per_second" : name); // each in the place that the decoder's has
    const rank = (name) => (isScore(name, known) ? -1 : FIRST.includes(like(name)) ? FIRST.indexOf(like(name)) : FIRST.length);
    const base = (name) => name.replace(/^eval_/, "");
    const names = all.filter(test).sort((a, b) => rank(a) - rank(b) || base(a).localeCompare(base(b), "en", { numeric: true }) || a.localeCompare(b, "en"));
    const drawn = wanted ? names : names.filter((name) => rank(name) < FIRST.length || !/\.(mean|max|min)$/.test(name));
    const lists = drawn.filter((name) => !drawn.includes(base(name)) || name === base(name)); // held-out scores are drawn into their own in training
    const said = lists.join("\n");
    put(this.more, !names.length && wanted ? `No metric of this run has ${wanted} in its name; it has ${all.length}.` : drawn.length < names.length ? `${names.length - drawn.length} more by layer or expert: find them by name.` : "");
    if (said === this.laidOut) return;
    this.laidOut = said;
    for (const [name, { chart, node }] of this.small) {
      if (lists.includes(name)) continue;
      chart?.destroy();
      this.seen.unobserve(node);
      this.small.delete(name);
    }
    for (const name of lists) {
      if (this.small.has(name)) continue;
      const node = el("div", { class: "cell" });
      this.small.set(name, { node, stale: true });
      this.seen.observe(node);
    }
    put(this.grid, lists.map((name) => this.small.get(name).node));
  }

  parameters(points) {
    const { axis, zoom, scale } = this;
    return { x: axis, points, from: zoom?.[0], to: zoom?.[1], log: scale.includes("x") || null };
  }

  /** Places of steps on the present axis, as far as the loss's points tell. */
  place() {
    if (this.axis === "step") return (step) => step;
    const { steps, at } = this;
    if (!steps?.length || steps.length !== at.length) return () => null;
    return (step) => {
      let low = 0, high = steps.length - 1;
      if (step < steps[0] || step > steps[high]) return null;
      while (high - low > 1) {
        const middle = (low + high) >> 1;
        if (steps[middle] <= step) low = middle;
        else high = middle;
      }
      const share = steps[high] > steps[low] ? (step - steps[low]) / (steps[high] - steps[low]) : 0;
      return at[low] + share * (at[high] - at[low]);
    };
  }

  async fetchBig() {
    const turn = (this.turn = (this.turn ?? 0) + 1), { axis, zoom, details } = this, { row } = details;
    const log = this.scale.includes("y"), logX = this.scale.includes("x");
    let found;
    try {
      found = (await get(runPath(this.id, "/series"), { metric: ["loss", "eval_loss"], ...this.parameters(POINTS) })).metrics;
      if (axis !== "step") {
        // Marks are told by step: two curves of the same points, one by step, say where they lie.
        const [by, over] = await Promise.all(["step", axis].map((x) => get(runPath(this.id, "/series"), { metric: "loss", x, points: 5000 })));
        this.steps = by.metrics.loss?.x;
        this.at = over.metrics.loss?.x;
      }
    } catch (error) {
      if (turn !== this.turn || this.closed) return;
      put(this.unread, notice("warning", el("b", {}, "The curves cannot be read: "), error.message, "."));
      if (passes(error)) this.again(() => this.fetchBig());
      return;
    }
    if (turn !== this.turn || this.closed) return;
    put(this.unread);
    const { loss: train, eval_loss: held } = found;
    if (!train?.n && !held?.n) {
      put(this.big, row.status === "NEW" || !row.step ? empty("No step yet", "Its curves begin with its first step.", details.header.command ?? `muster train`) : empty("Nothing in this range", "Zoom out to see the whole run.", null, el("button", { type: "button", on: { click: () => change({ from: null, to: null }) } }, "All")));
      this.chart?.destroy();
      this.chart = null;
      return;
    }
    if (!this.chart || this.chart.options.xName !== this.axisName) {
      this.chart?.destroy();
      put(this.big);
      this.chart = new Chart(this.big, {
        name: "loss", unit: `${row.unit === "tokens" ? "nats per token, " : ""}by ${axisLabel(axis, row.unit)}`, height: Math.max(220, Math.min(440, innerHeight * 0.3)), sync: "run", zero: false, tip: true,
        xName: this.axisName, xFormat: xFormats[axis], xExact: axis === "step" ? whole : xFormats[axis], format: (value, digits = 4) => number(value, digits), zoomed: (from, to) => change({ from, to }),
      });
    }
    const own = runColour(this.id), place = this.place();
    const end = axis === "step" && row.status === "RUNNING" && row.steps ? row.steps : null;
    const all = [...(train?.x ?? []), ...(held?.x ?? [])];
    const range = zoom ?? [Math.min(0, ...all.slice(0, 1)), Math.max(end ?? 0, train?.x.at(-1) ?? 0, held?.x.at(-1) ?? 0)];
    const lines = train?.n ? curve(train, { colour: own, share: this.share, label: "train", span: range[1] - range[0], logX }) : [];
    const last = lines.at(-1);
    if (last) {
      last.end ??= last.last;
      last.said = last.end && `train ${loss(last.end[1])}`;
    }
    if (held?.n) lines.push({ ...held, kind: "ring", colour: "--ink1", label: "held-out", end: held.last, said: held.last && `held-out ${loss(held.last[1])}` });
    this.chart.set({
      series: lines, range, log, logX,
      attempts: attemptsAt(details, place),
      reference: details.references.unigram_entropy ? { y: details.references.unigram_entropy, label: `unigram entropy ${details.references.unigram_entropy.toFixed(2)}` } : null,
      marks: [...details.marks.filter(({ kind }) => kind !== "evaluation"), ...unsaid(details)].map((mark) => ({ ...mark, x: place(mark.step) })).filter(({ x }) => x !== null),
    });
    this.range = range;
    this.load();
  }

  async fetchSmall() {
    const names = [...this.small].filter(([, each]) => each.stale && each.node.near).map(([name]) => name).slice(0, AT_ONCE);
    if (!names.length || this.closed) return;
    const { axis, zoom, settings } = this;
    let found;
    try {
      const held = names.map(heldOut).filter((name) => this.details.metrics.includes(name) && !this.small.has(name));
      found = (await get(runPath(this.id, "/series"), { metric: [...names, ...held], ...this.parameters(SMALL_POINTS) })).metrics;
    } catch (error) {
      if (this.closed || settings !== this.settings) return;
      for (const name of names) this.say(name, error.message);
      if (passes(error)) this.again(this.load);
      return;
    }
    this.failures = 0;
    if (this.closed || settings !== this.settings) return this.load();
    const place = this.place(), own = runColour(this.id), log = this.scale.includes("y"), logX = this.scale.includes("x");
    for (const name of names) {
      const each = this.small.get(name), line = found[name];
      if (!each || !line) continue;
      each.stale = false;
      each.said?.remove();
      each.said = null;
      if (each.chart?.options.xName !== this.axisName) {
        each.chart?.destroy();
        const format = TIMES.has(name) ? (value, digits) => (value === 0 ? "0" : duration(value, digits)) : tick;
        each.chart = new Chart(each.node, {
          name, unit: TIMES.has(name) ? "" : UNITS[name] ?? "", height: 104, small: true, sync: "run", format,
          xName: this.axisName, xFormat: xFormats[axis], xExact: axis === "step" ? whole : xFormats[axis], zoomed: (from, to) => change({ from, to }),
        });
      }
      const range = zoom ?? this.range ?? [Math.min(0, line.x[0] ?? 0), line.x.at(-1) ?? 1];
      const series = curve(line, { colour: own, share: this.share, label: name, span: range[1] - range[0], logX }).map((part) => ({ ...part, end: part.kind === "line" ? part.end ?? part.last : null }));
      const held = !this.small.has(heldOut(name)) && found[heldOut(name)];
      if (held?.n) series.push({ ...held, kind: "ring", colour: "--ink1", label: "held-out" });
      each.chart.set({ series, range, log, logX, attempts: attemptsAt(this.details, place) });
    }
    if ([...this.small.values()].some((each) => each.stale && each.node.near)) this.load();
  }

  /** Why a small chart is not there, or not as it should be. */
  say(name, why) {
    const each = this.small.get(name);
    if (!each) return;
    each.said ??= el("p", { class: "quiet why" });
    put(each.said, !each.chart && el("b", {}, `${name}: `), `${why}.`);
    if (!each.said.isConnected) each.node.append(each.said);
  }

  /** Asks once more, after a while that grows. */
  again(ask) {
    this.failures = Math.min((this.failures ?? 0) + 1, 6);
    setTimeout(() => !this.closed && ask(), 500 * 2 ** this.failures);
  }

  key(key) {
    if (key === "x") change({ x: nextAxis(this.axis, this.details.row.unit), from: null, to: null });
    else if (key === "l") change({ log: toggled(this.scale) });
    else if (key === "m") this.find.select();
    else if (key === "e" && this.chart) saveCsv({ xName: this.axisName, series: this.chart.shown.series }, `${this.id.replace(/[^\w.-]/g, "_")}-loss`);
    else if (key === "Escape" && this.zoom) change({ from: null, to: null });
    else return false;
    return true;
  }
}

const heldOut = (name) => `eval_${name}`;

/** The axes that an address says are logarithmic; 1, as it once was, is y. */
export const scaleOf = (query) => ({ 1: "y", x: "x", y: "y", xy: "xy" })[query.get("log")] ?? "";
/** With y logarithmic where it was not, and linear where it was. */
export const toggled = (scale) => (scale.includes("y") ? scale.replace("y", "") : `${scale}y`);

/** Whether an error may be none the next time: the server did not answer, or could not. */
const passes = ({ status }) => status === 0 || status >= 500;

/** Failures of attempts that ended without a word, and so without an event. */
function unsaid({ attempts, marks }) {
  const told = marks.filter(({ kind }) => kind === "failure");
  return attempts.filter(({ status, began, ended }) => status === "FAILED" && !told.some(({ time }) => time >= began && time <= ended + 1))
    .map(({ to_step: step, reason }) => ({ kind: "failure", step, text: reason })).filter(({ step }) => step !== null);
}

/** Where each attempt but the first begins. */
function attemptsAt({ attempts }, place) {
  return attempts.slice(1).map(({ n, from_step: step }) => ({ x: place(step), label: `attempt ${n}` })).filter(({ x }) => x !== null);
}
