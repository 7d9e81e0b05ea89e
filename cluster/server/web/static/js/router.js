/** Pages by address. What a page shows is in its address, so that it can be sent and gone back to. */

import { el } from "./dom.js";

const routes = [];
let outlet = null, now = null, before = () => {};

/** `open(outlet, rest, state)` shows a page and returns {update(state), close(), keys, title}. */
export function route(prefix, open) {
  routes.push([prefix, open]);
}

/** The present address's parameters. */
export const state = () => new URLSearchParams(location.search);

/** Changes parameters of the address: null or "" leaves one out, a list repeats it. */
export function change(parameters, { push = false } = {}) {
  const query = state();
  for (const [name, value] of Object.entries(parameters)) {
    query.delete(name);
    for (const each of Array.isArray(value) ? value : [value]) if (each !== null && each !== undefined && each !== "") query.append(name, each);
  }
  const text = query.toString();
  const address = location.pathname + (text ? `?${text}` : "");
  if (address === location.pathname + location.search) return;
  history[push ? "pushState" : "replaceState"](null, "", address);
  now?.page?.update?.(state());
}

export function go(address) {
  if (address === location.pathname + location.search) return;
  history.pushState(null, "", address);
  show();
}

function show() {
  if (!outlet) return; // a key was pressed before the first answer came: `start` shows what the address says by then
  const path = location.pathname.replace(/^\/$/, "/now");
  const [, prefix, ...rest] = path.split("/");
  const name = rest.map(safelyDecoded).join("/");
  if (now && now.prefix === prefix && now.name === name) return now.page?.update?.(state());
  now?.page?.close?.();
  const found = routes.find(([each]) => each === prefix);
  outlet.replaceChildren();
  now = { prefix, name, page: null };
  before(prefix);
  now.page = (found ?? routes[0])[1](outlet, name, state());
  scrollTo(0, 0);
}

function safelyDecoded(text) {
  try {
    return decodeURIComponent(text);
  } catch {
    return text;
  }
}

/** Where the page that is open shows something else, as an address. */
export const here = (query) => `${location.pathname}?${query}`;

/** The page that is open. */
export const current = () => now?.page;

export function start(node, changed) {
  outlet = node;
  before = changed;
  addEventListener("popstate", show);
  document.addEventListener("click", (event) => {
    const link = event.target.closest?.("a[href]");
    if (!link || event.defaultPrevented || event.button || event.metaKey || event.ctrlKey || event.shiftKey) return;
    if (link.origin !== location.origin || link.hasAttribute("download") || link.target || link.pathname.startsWith("/api/")) return;
    event.preventDefault();
    go(link.pathname + link.search);
  });
  show();
}

export const runAddress = (id) => `/run/${encodeURIComponent(id)}`;

/** A link to a run, by its id; without one, a text. */
export const linked = (id, props, text) => (id ? el("a", { ...props, href: runAddress(id) }, text) : el("span", { ...props, class: "quiet" }, text));
