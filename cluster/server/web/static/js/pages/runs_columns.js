/** Columns of the table of runs: how each is shown, alone and for a group. */

import { runs } from "../api.js";
import { runColour } from "../colours.js";
import { el, svg, word } from "../dom.js";
import { DASH, ago, clock, compact, duration, loss, number, plain, unitWords, whole } from "../format.js";

const BINS = 10;
/** Records at the end of a run that a mean is of, unless somebody says otherwise. */
export const MEANED = 10;

/** What a metric's values come to: the last, the least, the greatest, the mean of the last `n`. */
export const metricColumns = (name, n) => ["last", "best", "max", `mean${n}`].map((how) => `metric:${name}:${how}`);

/** `kind` is how a value is written; `own`: made from others, no column of the server. */
export const COLUMNS = {
  eval_loss: { label: "held-out", kind: "loss", width: "84px", strong: true },
  strip: { label: "", kind: "strip", width: "92px", own: true },
  loss: { label: "train", kind: "loss", width: "60px", quiet: true },
  data: { label: "data", kind: "text", width: "minmax(64px, 1fr)" },
  parameters: { label: "parameters", kind: "count", width: "78px" },
  family: { label: "family", kind: "text", width: "80px" },
  task: { label: "task", kind: "text", width: "104px" },
  status: { label: "status", kind: "status", width: "84px" },
  step: { label: "step", kind: "whole", width: "68px" },
  steps: { label: "of steps", kind: "whole", width: "68px" },
  tokens: { label: "tokens", kind: "count", width: "62px" },
  tokens_per_second: { label: "tokens/s", kind: "count", width: "62px" },
  weight: { label: "seen", kind: "counted", width: "96px" },
  rate: { label: "per second", kind: "counted", width: "104px" },
  mfu: { label: "MFU", kind: "number", width: "64px" },
  attempts: { label: "attempts", kind: "whole", width: "76px" },
  wall_time: { label: "took", kind: "duration", width: "72px" },
  started: { label: "started", kind: "time", width: "108px" },
  updated: { label: "changed", kind: "ago", width: "76px" },
  sweep: { label: "sweep", kind: "text", width: "96px" },
  note: { label: "note", kind: "text", width: "minmax(120px, 1.5fr)" },
};
/** Of a run that has not begun, 0 says nothing. */
const BEGUN = new Set(["step", "tokens", "weight", "wall_time", "attempts"]);
const NUMBERS = new Set(["loss", "number", "count", "counted", "whole", "duration"]);
const SHOWN = {
  loss, count: compact, counted: compact, whole, duration, time: clock, number: (value) => number(value), status: word,
  ago: (value) => (value ? `${ago(value)} ago` : DASH),
};

const there = (value) => value !== null && value !== undefined;

/** How many, least, greatest, mean and standard deviation of the numbers among values. */
export function statistics(values) {
  const numbers = values.filter((value) => typeof value === "number"), n = numbers.length;
  if (!n) return { n, values: [...new Set(values.map((value) => plain(value)))] };
  const mean = numbers.reduce((sum, value) => sum + value, 0) / n;
  const deviation = n > 1 ? Math.sqrt(numbers.reduce((sum, value) => sum + (value - mean) ** 2, 0) / (n - 1)) : 0;
  const least = numbers.reduce((a, b) => Math.min(a, b)), greatest = numbers.reduce((a, b) => Math.max(a, b));
  return { n, mean, deviation, least, greatest };
}

/** A column of the table for a key; `page.values(key)` gives its values, `places` those runs that are shown. */
export function makeColumn(key, page, places) {
  const known = COLUMNS[key];
  const values = page.values(key === "strip" ? "eval_loss" : key);
  if (key === "strip") return strip(values, places, page);
  const numeric = known ? NUMBERS.has(known.kind) : !places.some((place) => typeof values[place] === "string" || Array.isArray(values[place]));
  const kind = known?.kind ?? (numeric ? "number" : "text");
  const show = SHOWN[kind] ?? plain;
  const one = (value) => (value === null || value === undefined || value === "" || (value === 0 && BEGUN.has(key)) ? el("span", { class: "missing" }, DASH) : typeof value === "number" || kind === "status" ? show(value) : plain(value));
  const right = numeric || kind === "time" || kind === "ago";
  return {
    key, sortable: true, title: key,
    class: [right ? "number" : "text", known?.strong && "strong", known?.quiet && "quiet"].filter(Boolean).join(" "),
    label: known?.label ?? key.replace(/^metric:/, "").replace(/:last$/, ""),
    width: known?.width ?? (numeric ? "72px" : "minmax(88px, 1fr)"),
    head: () => numeric && histogram(places.map((place) => values[place])),
    cell: (row) => (row.place !== undefined ? [one(values[row.place]), kind === "counted" && there(values[row.place]) && el("span", { class: "unit" }, unitWords(runs.columns.unit[row.place]))] : grouped(row.statistics(key), kind, one, row, known?.strong)),
  };
}

function grouped(found, kind, one, row, strong) {
  if (!found.n) {
    const [first, ...others] = found.values;
    return others.length ? el("span", { class: "missing", title: found.values.slice(0, 20).join(", ") }, `${found.values.length} kinds`) : first === DASH ? one(null) : kind === "status" ? word(first) : first;
  }
  if (kind === "loss" && row.key === "sweep") return [el("span", { class: "unit" }, "best "), one(found.least)];
  if (kind === "loss") return el("span", { title: `mean of ${found.n}, standard deviation ${number(found.deviation)}` }, one(found.mean), strong && found.n > 1 && el("span", { class: "unit" }, `±${found.deviation.toFixed(3)}`));
  if (found.least === found.greatest || kind === "time" || kind === "ago") return one(found.greatest);
  return el("span", { class: "quiet", title: `mean of ${found.n}, from ${number(found.least)} to ${number(found.greatest)}` }, one(found.mean));
}

/** How the values are spread, over the head of their column. */
function histogram(values) {
  const sorted = values.filter((value) => typeof value === "number").sort((a, b) => a - b);
  if (sorted.length < 4) return null;
  const log = sorted[0] > 0 && sorted.at(-1) > 20 * sorted[0];
  const scale = (value) => (log ? Math.log(value) : value);
  const low = scale(sorted[0]), high = scale(sorted.at(-1));
  if (low === high) return null;
  const bins = new Array(BINS).fill(0);
  for (const value of sorted) bins[Math.min(BINS - 1, Math.floor(((scale(value) - low) / (high - low)) * BINS))]++;
  const most = Math.max(...bins), tall = (count) => Math.max(1.5, (13 * count) / most);
  return svg("svg", { class: "histogram", viewBox: "0 0 50 13", "aria-hidden": "true" },
    bins.map((count, index) => count > 0 && svg("rect", { x: index * 5, width: 4, y: 13 - tall(count), height: tall(count) })));
}

/** Where each run's held-out loss lies among all that are shown; of a group its mean and band. */
function strip(values, places, page) {
  const sorted = places.map((place) => values[place]).filter((value) => typeof value === "number").sort((a, b) => a - b);
  const low = sorted[0], high = sorted.at(-1);
  const at = (value) => (high > low ? 4 + 80 * Math.min(1, Math.max(0, (value - low) / (high - low))) : 44);
  const picked = page.selected;
  const drawn = (...shapes) => svg("svg", { viewBox: "0 0 88 14", class: "spot", "aria-hidden": "true" }, svg("path", { d: "M0 7h88", class: "base" }), shapes);
  return {
    key: "strip", class: "strip", width: COLUMNS.strip.width, label: el("span", { class: "for-readers" }, "held-out, as a place"),
    head: () => histogram(sorted),
    cell: (row) => {
      if (row.place === undefined) {
        const { n, mean, deviation } = row.statistics("eval_loss");
        return n ? drawn(svg("path", { d: `M${at(mean - deviation)} 7H${at(mean + deviation)}`, class: "band" }), svg("path", { d: `M${at(mean)} 3v8`, class: "mean" })) : "";
      }
      const value = values[row.place], id = runs.columns.id[row.place];
      if (typeof value !== "number") return "";
      return drawn(svg("circle", { cx: at(value), cy: 7, r: 3.2, fill: picked.has(id) ? `var(${runColour(id)})` : "var(--ink3)" }));
    },
  };
}
