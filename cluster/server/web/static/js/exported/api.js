/** What a page that is a file is told: the answers that were written into it. */

export const readOnly = true;
export const told = JSON.parse(document.getElementById("told").textContent);

export class ApiError extends Error {
  status = 400;
}

export const runPath = (id, rest = "") => `/api/runs/${encodeURIComponent(id)}${rest}`;

/** As the server answers `path`, from what the file has. */
export async function get(path, parameters = {}) {
  if (path === "/api/compare") return compared(parameters);
  if (path === "/api/keys") return told.keys;
  if (path === "/api/sweeps") return { sweeps: told.sweeps };
  if (path.startsWith("/api/sweeps/")) return path.endsWith("/law") ? told.law : told.sweep;
  const [, name, part] = /^\/api\/runs\/([^/]+)\/?(.*)$/.exec(path) ?? [];
  const id = decodeURIComponent(name ?? ""), run = told.each[id];
  if (!run) throw new ApiError("it is not in this file");
  if (part === "") return run.details;
  if (part === "series") return { metrics: Object.fromEntries([parameters.metric].flat().map((metric) => [metric, line(run, metric, parameters)])), x: parameters.x };
  if (part === "experts") return run.experts[parameters.layer] ?? { steps: [], load: [] };
  if (part === "log") return log(run, parameters);
  if (part in (run.more ?? {})) return run.more[part];
  throw new ApiError("it is not in this file");
}

export async function post() {
  throw new ApiError("this page is a file: nothing can be changed from it");
}

/** The runs of this file by column, as the server's table has them. */
export const runs = {
  ...told.runs,
  left: 0,
  places: new Map(told.runs.columns.id.map((id, place) => [id, place])),
  etag: null,

  async refresh() {
    return false;
  },

  row(id) {
    const place = this.places.get(id);
    if (place === undefined) return undefined;
    return Object.fromEntries(Object.entries(this.columns).map(([name, values]) => [name, values[place]]));
  },
};

/** A metric's points over an axis, those between `from` and `to`. */
function line(run, metric, { x: axis = "step", from = -Infinity, to = Infinity }) {
  const { x: steps, y, infinite } = Object.hasOwn(run.series, metric) ? run.series[metric] : { x: [], y: [], infinite: [] }, place = placed(run, axis);
  const at = steps.map(place), kept = at.map((_, index) => index).filter((index) => at[index] >= (from ?? -Infinity) && at[index] <= (to ?? Infinity));
  const end = kept.findLast((index) => y[index] !== null);
  return { x: kept.map((index) => at[index]), y: kept.map((index) => y[index]), infinite: infinite.map(([step, sign]) => [place(step), sign]), last: end === undefined ? null : [at[end], y[end]], n: kept.length };
}

/** From a step to its place on an axis. */
function placed({ axes }, axis) {
  if (axis === "step") return (step) => step;
  const { step: steps, [axis]: places } = axes;
  if (!places) throw new ApiError(`this run's record does not say how many ${axis === "flops" ? "FLOPs" : axis} a step takes`);
  return (step) => {
    let low = 0, high = steps.length - 1;
    if (step <= steps[0]) return places[0];
    if (step >= steps[high]) return places[high];
    while (high - low > 1) {
      const middle = (low + high) >> 1;
      if (steps[middle] <= step) low = middle;
      else high = middle;
    }
    return places[low] + ((step - steps[low]) / (steps[high] - steps[low])) * (places[high] - places[low]);
  };
}

function compared({ run, metric, ...parameters }) {
  const ids = [run].flat(), lines = {}, without = [];
  for (const id of ids) {
    try {
      lines[id] = line(told.each[id], metric, parameters);
    } catch {
      without.push(id);
    }
  }
  const places = ids.map((id) => told.compared.indexOf(id));
  const differs = told.differs.map(({ key, values }) => ({ key, values: places.map((place) => values[place]) }))
    .filter(({ values }) => values.some((value) => JSON.stringify(value) !== JSON.stringify(values[0])));
  return { runs: lines, without, x: parameters.x, metric, differs };
}

function log(run, { rank, search = "" }) {
  const found = run.logs[rank] ?? { text: "", truncated: false, attempt: null };
  if (!search) return found;
  const wanted = search.toLowerCase();
  return { ...found, text: found.text.split("\n").filter((each) => each.toLowerCase().includes(wanted)).join("\n") };
}
