/** Views of the table of runs: each is an address, and this browser keeps names for some. */

import { choice, dialog, el, notice, put } from "../dom.js";
import { change, state } from "../router.js";

const KEPT = "muster-views", PARTS = ["q", "columns", "group", "sort"], MOST = 20;

function views() {
  try {
    const found = JSON.parse(localStorage.getItem(KEPT) ?? "{}");
    return Object.entries(found).filter(([, query]) => typeof query === "string").slice(0, MOST);
  } catch {
    return [];
  }
}

function keep(all) {
  localStorage.setItem(KEPT, JSON.stringify(Object.fromEntries(all)));
}

/** What of the present address is a view. */
function present() {
  const query = state(), found = new URLSearchParams();
  for (const name of PARTS) if (query.get(name)) found.set(name, query.get(name));
  return found.toString();
}

function go(query) {
  const wanted = new URLSearchParams(query);
  change(Object.fromEntries(PARTS.map((name) => [name, wanted.get(name)])), { push: true });
}

export function showViews(node) {
  const all = views(), now = present(), names = [["", "All"], ...all.map(([name, query]) => [query, name])];
  const said = JSON.stringify([names, now]);
  if (node.dataset.said === said) return;
  node.dataset.said = said;
  put(node, el("span", { class: "quiet" }, "View"), choice("View", names, now, go),
    el("button", { type: "button", class: "bare", "aria-label": "Save or remove views", title: "Save or remove views", on: { click: () => edit(node) } }, "+"));
}

function edit(node) {
  const wrong = el("div"), list = el("div");
  const name = el("input", { type: "text", maxlength: 40, "aria-label": "Name of the view", placeholder: "Name" });
  const draw = () => put(list, views().map(([known]) => el("div", { class: "check" }, known, el("span", { class: "space" }), el("button", { type: "button", class: "bare", "aria-label": `Remove ${known}`, on: { click: () => {
    keep(views().filter(([each]) => each !== known));
    draw();
    showViews(node);
  } } }, "×"))));
  const save = () => {
    const wanted = name.value.trim();
    if (!wanted) return void name.focus();
    if (views().length >= MOST) return void put(wrong, notice("warning", `${MOST} views are kept: remove one.`));
    try {
      keep([...views().filter(([each]) => each !== wanted), [wanted, present()]]);
    } catch {
      return void put(wrong, notice("warning", "This browser keeps nothing for the page: bookmark its address instead."));
    }
    shown.close();
    showViews(node);
  };
  name.addEventListener("keydown", (event) => event.key === "Enter" && save());
  draw();
  const shown = dialog("Save this view", el("p", { class: "quiet" }, "Filter, columns, group and order are in the page's address; a name for them is kept by this browser."), name, wrong, list,
    el("div", { class: "buttons" }, el("button", { type: "button", class: "bare", on: { click: () => shown.close() } }, "Leave it", el("kbd", {}, "esc")), el("button", { type: "button", class: "filled", on: { click: save } }, "Save")));
  name.focus();
}
