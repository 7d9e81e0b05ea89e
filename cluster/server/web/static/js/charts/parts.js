/** Where time went: one bar, its parts in words. */

import { el } from "../dom.js";
import { duration, percent } from "../format.js";

const KNOWN = [
  [/in steps/, "--part1"], [/done again|lost/, "--warning-glyph"], [/hang|down|restart|fail/, "--failed"], [/evaluat/, "--part3"], [/start|compil/, "--part2"],
];

const hue = (name) => KNOWN.find(([test]) => test.test(name))?.[1] ?? "--part4";

/** `parts`: [name, seconds]; `whole`: seconds of the full width. */
export function bar(parts, whole, label) {
  const sum = whole ?? parts.reduce((total, [, seconds]) => total + seconds, 0);
  return el("div", { class: "part-bar", role: "img", "aria-label": `${label}: ${parts.map(([name, seconds]) => `${name} ${duration(seconds)}`).join(", ")}` },
    parts.filter(([, seconds]) => seconds > 0.001 * sum).map(([name, seconds]) => el("span", { title: `${name}: ${duration(seconds)}`, style: { width: `${(100 * seconds) / sum}%`, background: `var(${hue(name)})` } })));
}

export function parts(all, { seconds: withSeconds = true } = {}) {
  const sum = all.reduce((total, [, seconds]) => total + seconds, 0);
  return el("table", { class: "parts" }, all.slice().sort((a, b) => b[1] - a[1]).map(([name, seconds]) => el("tr", {},
    el("td", {}, el("span", { class: "swatch", style: { "--own": `var(${hue(name)})` } }), name),
    withSeconds && el("td", { class: "number quiet" }, duration(seconds)), el("td", { class: "number" }, percent(sum ? seconds / sum : 0, 1), el("span", { class: "unit" }, "%")))));
}
