/** The one page of a file. What it shows is behind the # of its address. */

import { told } from "./api.js";
import { el } from "../dom.js";

let page = null;

export function state() {
  const query = new URLSearchParams(location.hash.slice(1));
  if (told.page === "compare" && !query.has("run")) for (const id of told.compared) query.append("run", id);
  return query;
}

export function change(parameters) {
  const query = state();
  for (const [name, value] of Object.entries(parameters)) {
    query.delete(name);
    for (const each of Array.isArray(value) ? value : [value]) if (each !== null && each !== undefined && each !== "") query.append(name, each);
  }
  if (String(query) === String(state())) return;
  history.replaceState(null, "", `#${query}`);
  page?.update?.(state());
}

export const go = (address) => void (location.href = address);
export const here = (query) => `#${query}`;
export const current = () => page;
/** Of a run that was exported beside it; others have none. */
export const runAddress = (id) => told.files[id];
export const linked = (id, props, text) => (told.files[id] ? el("a", { ...props, href: told.files[id] }, text) : el("span", { ...props, class: "quiet" }, text));

export function start(shown) {
  page = shown;
  addEventListener("hashchange", () => page.update?.(state()));
}
