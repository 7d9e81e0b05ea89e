/** Runs of one setting as one curve: their mean, and a band of one standard deviation. */

import { valueAt } from "../charts/curves.js";
import { plain } from "../format.js";

/** In place of a key: runs whose configs are otherwise equal. */
const SEEDS = "seeds";
const SEED_KEYS = new Set(["run.seed", "data.seed"]);

/** What a grouping is called: [value, label]. */
export const groupName = (by) => [by, by === SEEDS ? "over seeds" : `by ${by}`];

/** What runs can be grouped by: [value, label]. */
export function groupings(differs) {
  const keys = differs.map(({ key }) => key);
  return [["", "no groups"], ...(keys.some((key) => SEED_KEYS.has(key)) ? [groupName(SEEDS)] : []), ...keys.filter((key) => !SEED_KEYS.has(key)).map(groupName)];
}

/**
 * Groups of runs in the order of their first, [{label, ids}], by a key or SEEDS; null: they are not grouped.
 * `differs`: [{key, values}], the values in the order of `ids`.
 */
export function grouped(ids, differs, by) {
  if (!by) return null;
  const telling = differs.filter(({ key }) => (by === SEEDS ? !SEED_KEYS.has(key) : key === by));
  const found = new Map();
  ids.forEach((id, place) => {
    const label = telling.map(({ key, values }) => `${key.split(".").at(-1)} ${plain(values[place])}`).join(", ") || "all";
    const signature = JSON.stringify(telling.map(({ values }) => values[place]));
    if (!found.has(signature)) found.set(signature, { label, ids: [] });
    found.get(signature).ids.push(id);
  });
  return [...found.values()];
}

/** Mean and standard deviation of numbers; null of none. */
export function spread(values) {
  if (!values.length) return null;
  const mean = values.reduce((sum, value) => sum + value, 0) / values.length;
  const deviation = values.length > 1 ? Math.sqrt(values.reduce((sum, value) => sum + (value - mean) ** 2, 0) / (values.length - 1)) : 0;
  return { n: values.length, mean, deviation };
}

/** Series of the mean of lines and, before it, the two edges of its band; where all of them have a value. */
export function meanOf(lines, { colour, dash, label }) {
  const from = Math.max(...lines.map(({ x }) => x[0])), to = Math.min(...lines.map(({ x }) => x.at(-1)));
  const x = lines[0].x.filter((at) => at >= from && at <= to);
  const at = x.map((place) => {
    const values = lines.map((line) => valueAt(line.x, line.y, place));
    return values.includes(null) ? null : spread(values);
  });
  const y = at.map((each) => each && each.mean), last = y.findLastIndex((value) => value !== null);
  const end = last < 0 ? null : [x[last], y[last]];
  const edge = (sign, name) => ({ x, y: at.map((each) => each && each.mean + sign * each.deviation), kind: "edge", upper: sign > 0, colour, name: `${label} (mean ${name} standard deviation)` });
  return [edge(1, "+"), edge(-1, "−"), { x, y, kind: "line", colour, dash, label, last: end, end }];
}
