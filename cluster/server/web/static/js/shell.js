/** What is around every page: the top bar, finding, the keys, the theme. */

import { get, runs } from "./api.js";
import { forget, runColour } from "./colours.js";
import { dialog, el, glyph, put, word } from "./dom.js";
import { whole } from "./format.js";
import { listen, polite, status } from "./live.js";
import { current, go, runAddress } from "./router.js";

const PAGES = [["now", "Now", "n"], ["runs", "Runs", "r"], ["compare", "Compare", "c"], ["sweep", "Sweep", "s"], ["plan", "Plan", "p"]];
const KEYS = {
  Anywhere: [["/", "find, or filter"], ["?", "these keys"], ["g n", "Now"], ["g r", "Runs"], ["g c", "Compare"], ["g s", "Sweep"], ["g p", "Plan"], ["d", "light or dark"], ["esc", "back"]],
  Lists: [["j k", "down, up"], ["x", "select"], ["↵", "open"], ["space", "peek"], ["c", "compare"], ["t", "tag"], ["n", "note"]],
  Charts: [["drag", "zoom in x"], ["dbl", "zoom out"], ["x", "unit of the x axis"], ["l", "linear, log"], ["[ ]", "previous, next run"], ["m", "find a metric"], ["e", "export"]],
};

const badge = el("span", { class: "badge", hidden: true });
const links = new Map(PAGES.map(([page, label]) => [page, el("a", { href: `/${page}` }, label, page === "now" && badge)]));
const reading = el("div", { class: "reading", hidden: true });
const keyline = el("footer", { class: "keyline" });
export const main = el("main", { tabindex: "-1", id: "main" });
const input = el("input", {
  type: "search", placeholder: "Find a run or action", "aria-label": "Find a run or action", role: "combobox",
  "aria-expanded": "false", "aria-controls": "found", autocomplete: "off", spellcheck: "false",
});
const options = el("ul", { class: "options", role: "listbox", id: "found", "aria-label": "Found", hidden: true });

export function build() {
  const theme = el("button", { class: "bare theme", type: "button", title: "Light or dark (d)", "aria-label": "Light or dark", on: { click: flip } }, "◐");
  document.body.append(
    el("a", { class: "skip", href: "#main" }, "To the content"),
    el("header", { class: "top" },
      el("a", { class: "brand", href: "/now" }, "muster"),
      el("nav", { class: "tabs", "aria-label": "Pages" }, [...links.values()]),
      el("div", { class: "space" }),
      el("div", { class: "find with-key" }, input, el("kbd", { "aria-hidden": "true" }, "/"), options),
      status, theme),
    reading, main, keyline, polite);
  document.querySelector(".skip").addEventListener("click", (event) => {
    event.preventDefault();
    main.focus();
  });
  finding();
  keys();
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", repaint);
  count();
  listen(count);
  runs.heard = showReading;
}

/** How far the server is that reads many runs for the first time. */
function showReading() {
  const { count, left } = runs;
  reading.hidden = !left;
  if (left) put(reading, el("progress", { max: count + left, value: count, "aria-label": "Runs read" }), `${whole(count)} of ${whole(count + left)} runs are read, the newest first. The others follow by themselves.`);
}

let counting = 0;
async function count() {
  if (location.pathname === "/now" || Date.now() - counting < 10_000) return; // Now itself tells what it has found
  counting = Date.now();
  try {
    needs((await get("/api/now")).problems);
  } catch {
    // The line at the top says that the server does not answer.
  }
}

/** How many runs need a person. */
export function needs(problems) {
  const failed = problems.filter((problem) => problem.level === "failed").length;
  badge.hidden = !failed;
  badge.textContent = String(failed);
  badge.setAttribute("aria-label", `${failed} need you`);
}

/** Called for each page: its tab, title and keys. */
export function opened(page) {
  for (const [name, link] of links) {
    if (name === page || (name === "runs" && page === "run")) link.setAttribute("aria-current", "page");
    else link.removeAttribute("aria-current");
  }
}

export function titled(text, shown = []) {
  document.title = `${text} · muster`;
  put(keyline, shown.map(([names, label]) => el("span", {}, names.split(" ").map((name) => el("kbd", {}, name)), label)),
    el("span", {}, el("kbd", {}, "?"), "all keys"), el("span", { class: "where" }, location.host));
}

function flip() {
  const root = document.documentElement;
  const dark = root.dataset.theme ? root.dataset.theme === "dark" : matchMedia("(prefers-color-scheme: dark)").matches;
  root.dataset.theme = dark ? "light" : "dark";
  try {
    localStorage.setItem("muster-theme", root.dataset.theme);
  } catch {
    // It holds for this page then.
  }
  repaint();
}

function repaint() {
  forget();
  current()?.repaint?.();
}

function finding() {
  let found = [], at = 0;
  const close = () => {
    options.hidden = true;
    input.setAttribute("aria-expanded", "false");
    input.removeAttribute("aria-activedescendant");
  };
  const choose = (index) => {
    const [, action] = found[index] ?? [];
    input.value = "";
    close();
    input.blur();
    action?.();
  };
  const mark = () => {
    [...options.children].forEach((node, index) => node.setAttribute("aria-selected", String(index === at)));
    options.children[at]?.scrollIntoView({ block: "nearest" });
    if (found.length) input.setAttribute("aria-activedescendant", `found-${at}`);
  };
  const look = () => {
    const wanted = input.value.trim().toLowerCase();
    const own = [
      ...PAGES.map(([page, label]) => [label, () => go(`/${page}`), "page"]),
      ["Light or dark", flip, "action"],
      ["All keys", help, "action"],
    ].filter(([label]) => label.toLowerCase().includes(wanted)).map(([label, action, kind]) => [[el("span", {}, label), el("span", { class: "sub" }, kind)], action]);
    const { id, name, status: states } = runs.columns;
    const some = [];
    for (let place = id.length - 1; place >= 0 && some.length < 12; place--) {
      if (!name[place].toLowerCase().includes(wanted)) continue;
      const kind = word(states[place]);
      some.push([[el("span", { class: "swatch", style: { "--own": `var(${runColour(id[place])})` } }), el("span", {}, name[place]), el("span", { class: "sub" }, glyph(kind), ` ${kind}`)], () => go(runAddress(id[place]))]);
    }
    found = wanted ? [...some, ...own] : [...own, ...some];
    at = 0;
    put(options, found.length
      ? found.map(([content], index) => el("li", { role: "option", id: `found-${index}`, on: { mousedown: (event) => (event.preventDefault(), choose(index)) } }, content))
      : el("li", {}, "No run or action has that in its name"));
    options.hidden = false;
    input.setAttribute("aria-expanded", "true");
    mark();
  };
  input.addEventListener("input", look);
  input.addEventListener("focus", look);
  input.addEventListener("blur", close);
  input.addEventListener("keydown", (event) => {
    if (event.key === "ArrowDown" || event.key === "ArrowUp") {
      event.preventDefault();
      at = (at + (event.key === "ArrowDown" ? 1 : -1) + found.length) % Math.max(found.length, 1);
      mark();
    } else if (event.key === "Enter") choose(at);
    else if (event.key === "Escape") {
      input.value = "";
      input.blur();
    }
  });
}

export function help() {
  dialog("Keys", el("div", { class: "keys" }, Object.entries(KEYS).map(([group, rows]) =>
    el("dl", {}, el("h3", {}, group), rows.map(([names, does]) => [el("dt", {}, names.split(" ").map((name) => el("kbd", {}, name))), el("dd", {}, does)])))));
}

function keys() {
  let going = 0;
  addEventListener("keydown", (event) => {
    if (event.ctrlKey || event.metaKey || event.altKey) {
      if (event.key === "k" && (event.ctrlKey || event.metaKey)) {
        event.preventDefault();
        input.focus();
      }
      return;
    }
    const typing = event.target.closest?.("input:not([type=checkbox]):not([type=range]), textarea, select, dialog");
    if (typing) {
      if (event.key === "Escape" && event.target.closest("input")) event.target.blur();
      return;
    }
    const onButton = event.target.closest?.("button, a, summary, input");
    if (onButton && (event.key === "Enter" || event.key === " ")) return;
    if (Date.now() - going < 1500) {
      const page = PAGES.find(([, , letter]) => letter === event.key);
      going = 0;
      if (page) return void (event.preventDefault(), go(`/${page[0]}`));
    }
    if (event.key === "g") return void (going = Date.now());
    if (current()?.key?.(event.key, event)) return void event.preventDefault();
    if (event.key === "/") (event.preventDefault(), input.focus());
    else if (event.key === "?") help();
    else if (event.key === "d") flip();
    else if (event.key === "Escape" && location.pathname.startsWith("/run/")) history.length > 1 ? history.back() : go("/runs");
  });
}
