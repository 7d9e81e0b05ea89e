/** Asks the server. Every answer is JSON; an error is one sentence. */

export class ApiError extends Error {
  constructor(message, status) {
    super(message);
    this.status = status;
  }
}

/** Whether nothing can be changed from here, as in a page that is a file. */
export const readOnly = false;

/** `/api/...` with parameters; a list becomes a parameter for each of its values, null is left out. */
export function address(path, parameters = {}) {
  const query = new URLSearchParams();
  for (const [name, value] of Object.entries(parameters)) {
    for (const each of Array.isArray(value) ? value : [value]) if (each !== null && each !== undefined) query.append(name, each);
  }
  const text = query.toString();
  return text ? `${path}?${text}` : path;
}

export const runPath = (id, rest = "") => `/api/runs/${encodeURIComponent(id)}${rest}`;

async function ask(path, options) {
  let answer;
  try {
    answer = await fetch(path, { credentials: "same-origin", cache: "no-store", ...options });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new ApiError("the server does not answer", 0);
  }
  if (answer.status === 401) {
    location.reload(); // the server answers with its login page
    throw new ApiError("not logged in", 401);
  }
  if (answer.status === 304) return { status: 304 };
  let body;
  try {
    body = await answer.json();
  } catch {
    throw new ApiError(`the server's answer cannot be read (${answer.status})`, answer.status);
  }
  if (!answer.ok) throw new ApiError(body.error ?? `the server answers ${answer.status}`, answer.status);
  return { status: answer.status, body, etag: answer.headers.get("etag") };
}

/** GET; returns the body. */
export async function get(path, parameters, signal) {
  return (await ask(address(path, parameters), { signal })).body;
}

export async function post(path, body = {}) {
  const options = { method: "POST", headers: { "content-type": "application/json" }, body: JSON.stringify(body) };
  return (await ask(path, options)).body;
}

/** A table whose rows `changed` stand at `places`, and around them the others, which are as they were. */
function merged(columns, changed, places, gone, count) {
  const not = new Set([...changed.id, ...gone]);
  const kept = columns.id.flatMap((id, place) => (not.has(id) ? [] : [place]));
  const from = new Int32Array(count).fill(-1);
  places.forEach((place, number) => (from[place] = -2 - number));
  let next = 0;
  for (let place = 0; place < count; place++) if (from[place] === -1) from[place] = kept[next++];
  return Object.fromEntries(Object.keys(changed).map((name) => [name, Array.from(from, (place) => (place < 0 ? changed[name][-2 - place] : columns[name][place]))]));
}

/** All runs by column; kept, and asked for again only if they have changed. */
export const runs = {
  count: 0,
  left: 0,
  columns: { id: [], name: [], status: [] },
  places: new Map(),
  etag: null,
  /** Called after each answer. */
  heard() {},

  /** Asks for what has changed since the last answer. */
  async refresh() {
    const since = this.etag?.slice(1, -1);
    const answer = await ask(address("/api/runs", { since }), { headers: this.etag ? { "if-none-match": this.etag } : {} });
    if (answer.status === 304) return false;
    const { count, left, version, places, gone } = answer.body;
    const columns = places ? merged(this.columns, answer.body.columns, places, gone, count) : answer.body.columns;
    Object.assign(this, { count, left: left ?? 0, columns, etag: `"${version}"` });
    this.places = new Map(columns.id.map((id, place) => [id, place]));
    this.heard();
    return true;
  },

  /** One run's row, or undefined. */
  row(id) {
    const place = this.places.get(id);
    if (place === undefined) return undefined;
    return Object.fromEntries(Object.entries(this.columns).map(([name, values]) => [name, values[place]]));
  },
};
