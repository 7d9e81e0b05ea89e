/** What is around the page of a file: what it is, when it was made, the theme. */

import { forget } from "../colours.js";
import { el, put } from "../dom.js";
import { clock } from "../format.js";
import { told } from "./api.js";
import { current } from "./router.js";

const keyline = el("footer", { class: "keyline" });
export const main = el("main", { tabindex: "-1", id: "main" });

export function build() {
  const theme = el("button", { class: "bare theme", type: "button", title: "Light or dark (d)", "aria-label": "Light or dark", on: { click: flip } }, "◐");
  document.body.append(
    el("header", { class: "top" }, el("span", { class: "brand" }, "muster"), el("span", { class: "quiet" }, `saved ${clock(told.time)}`), el("div", { class: "space" }), theme),
    main, keyline);
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", repaint);
  addEventListener("keydown", (event) => {
    if (event.ctrlKey || event.metaKey || event.altKey || event.target.closest?.("input:not([type=range]), textarea, select, dialog")) return;
    if (event.target.closest?.("button, a, summary") && (event.key === "Enter" || event.key === " ")) return;
    if (current()?.key?.(event.key, event)) event.preventDefault();
    else if (event.key === "d") flip();
  });
}

export function titled(text, shown = []) {
  put(keyline, shown.filter(([names]) => names !== "esc" && names !== "[ ]").map(([names, label]) => el("span", {}, names.split(" ").map((name) => el("kbd", {}, name)), label)), el("span", {}, el("kbd", {}, "d"), "light or dark"));
}

function flip() {
  const root = document.documentElement;
  const dark = root.dataset.theme ? root.dataset.theme === "dark" : matchMedia("(prefers-color-scheme: dark)").matches;
  root.dataset.theme = dark ? "light" : "dark";
  repaint();
}

function repaint() {
  forget();
  current()?.repaint?.();
}
