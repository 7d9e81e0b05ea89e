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

/** All runs by column; kept, and asked for again only if they have changed. */
export const runs = {
  count: 0,
  left: 0,
  columns: { id: [], name: [], status: [] },
  places: new Map(),
  etag: null,

  async refresh() {
    const answer = await ask("/api/runs", { headers: this.etag ? { "if-none-match": this.etag } : {} });
    if (answer.status === 304) return false;
    const { count, left, columns } = answer.body;
    Object.assign(this, { count, left: left ?? 0, columns, etag: answer.etag });
    this.places = new Map(columns.id.map((id, place) => [id, place]));
    return true;
  },

  /** One run's row, or undefined. */
  row(id) {
    const place = this.places.get(id);
    if (place === undefined) return undefined;
    return Object.fromEntries(Object.entries(this.columns).map(([name, values]) => [name, values[place]]));
  },
};
