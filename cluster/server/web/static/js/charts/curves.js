/** From a metric's points to what is drawn: raw values pale, their centred smoothing over them. */

/**
 * A centred Gaussian mean over x: it lags behind nothing. Gaps stay gaps.
 * `width`: the standard deviation, in units of x.
 */
export function smoothed(x, y, width) {
  const out = new Array(x.length).fill(null), reach = 3 * width;
  let from = 0;
  for (let at = 0; at < x.length; at++) {
    if (y[at] === null) continue;
    while (x[at] - x[from] > reach) from++;
    let sum = 0, weights = 0;
    for (let other = from; other < x.length && x[other] - x[at] <= reach; other++) {
      if (y[other] === null) continue;
      const weight = Math.exp(-0.5 * ((x[other] - x[at]) / width) ** 2);
      sum += weight * y[other];
      weights += weight;
    }
    out[at] = sum / weights;
  }
  return out;
}

/** Series of one metric: `share` of the shown range over which it is smoothed, on a logarithmic axis of its logarithm; 0: not at all. */
export function curve(line, { colour, dash, share = 0.02, label, span, logX = false }) {
  const base = { x: line.x, y: line.y, colour, dash, label, last: line.last, breaks: breaks(line) };
  const least = logX ? line.x.find((value) => value > 0) : undefined;
  const along = least ? line.x.map((value) => Math.log(Math.max(value, least))) : line.x;
  const range = (least ? undefined : span) ?? (along.at(-1) ?? 0) - (along[0] ?? 0);
  if (share <= 0 || line.x.length < 16 || !(range > 0) || steady(line.y)) return [{ ...base, kind: "line" }];
  const smooth = smoothed(along, line.y, Math.max(share * range, 1e-12));
  const at = smooth.findLastIndex((value) => value !== null);
  return [{ ...base, kind: "raw" }, { ...base, y: smooth, kind: "line", end: at < 0 ? null : [line.x[at], smooth[at]] }];
}

/** Where a line has no finite number: [x, 1 or -1 where it is infinite, 0 where a gap begins]. */
function breaks({ x, y, infinite = [] }) {
  const at = new Set(infinite.map(([place]) => place));
  const gaps = x.filter((place, index) => y[index] === null && !at.has(place) && (index === 0 || y[index - 1] !== null || at.has(x[index - 1])));
  return [...infinite, ...gaps.map((place) => [place, 0])];
}

/** Whether values hardly turn, as a learning rate does: there is nothing to smooth. */
function steady(values) {
  let turns = 0, before = 0, last = null;
  for (const value of values) {
    if (value === null) continue;
    const direction = last === null ? 0 : Math.sign(value - last);
    if (direction && before && direction !== before) turns++;
    if (direction) before = direction;
    last = value;
  }
  return turns < 0.04 * values.length;
}

/** The value at x of points that ascend, between its neighbours; null outside and in gaps. */
export function valueAt(x, y, at) {
  let low = 0, high = x.length - 1;
  if (high < 0 || at < x[0] || at > x[high]) return null;
  while (high - low > 1) {
    const middle = (low + high) >> 1;
    if (x[middle] <= at) low = middle;
    else high = middle;
  }
  if (y[low] === null || y[high] === null || x[high] === x[low]) return y[low] ?? y[high];
  return y[low] + ((y[high] - y[low]) * (at - x[low])) / (x[high] - x[low]);
}

/** Least and greatest of what should be seen: of raw values the utmost hundredth may leave the picture. */
export function yRange(series, { zero = true, log = false } = {}) {
  let low = Infinity, high = -Infinity;
  for (const { y, kind } of series) {
    const values = y.filter((value) => value !== null && Number.isFinite(value) && (!log || value > 0));
    if (!values.length) continue;
    values.sort((a, b) => a - b);
    const cut = kind === "raw" && values.length > 60 ? Math.floor(values.length / 100) : 0;
    low = Math.min(low, values[cut]);
    high = Math.max(high, values[values.length - 1 - cut]);
  }
  if (low > high) return log ? [0.1, 1] : [0, 1];
  if (log) return low === high ? [low / 2, high * 2] : [low / 1.05, high * 1.05];
  if (zero && low >= 0 && low < 0.4 * high) low = 0;
  if (low === high) return low === 0 ? [0, 1] : [low - Math.abs(low) * 0.1, high + Math.abs(high) * 0.1];
  const least = 0.002 * Math.abs(high); // or what hardly changes would look as if it jumped
  if (high - low < least) return [(low + high - least) / 2, (low + high + least) / 2];
  const room = 0.06 * (high - low);
  return [low === 0 ? 0 : low - room, high + room];
}
