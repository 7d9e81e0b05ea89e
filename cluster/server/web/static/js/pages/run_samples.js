/** What a run's model has shown at its evaluations, over time: texts side by side, pictures and tables by step. */

import { runPath } from "../api.js";
import { dialog, el, empty, put } from "../dom.js";
import { whole } from "../format.js";

const SIDE_BY_SIDE = 3;
/** Between one prompt and the next. */
const RULE = /\n-{40,}\n/;

export function samples(id, { samples: all, config }, node) {
  if (!all.length) {
    const command = config["model.family"] === "decoder" ? "muster train RUN train.eval_every=100" : null;
    return void put(node, empty("No samples", "What its model makes is kept at each evaluation.", command));
  }
  const said = JSON.stringify(all.map(({ step, kind, wrong }) => [step, kind, wrong]));
  if (node.dataset.samples === said) return;
  node.dataset.samples = said;
  const shown = all.slice(-SIDE_BY_SIDE), older = all.slice(0, -SIDE_BY_SIDE).reverse();
  const one = (sample) => el("article", { class: "sample" }, el("h3", {}, `step ${whole(sample.step)}`, sample.more && el("small", {}, `its first ${sample.rows.length} rows`)), sample.wrong ? el("p", { class: "wrong" }, sample.wrong) : KINDS[sample.kind](sample, id));
  put(node, el("h2", {}, "Samples", el("small", {}, all.length > shown.length ? `the newest ${shown.length} of ${all.length}` : "at each evaluation")), el("div", { class: "samples" }, shown.map(one)),
    older.length > 0 && el("details", {}, el("summary", {}, `${older.length} older`), el("div", { class: "samples older" }, older.map(one))));
}

const KINDS = {
  text: ({ text }) => text.split(RULE).map((part) => el("pre", { tabindex: "0" }, part)),
  table: ({ columns, rows }) => el("div", { class: "wide", tabindex: "0" }, el("table", { class: "plain" },
    el("thead", {}, el("tr", {}, columns.map((name, at) => el("th", { class: numbers(rows, at) ? "number" : undefined }, name)))),
    el("tbody", {}, rows.map((row) => el("tr", {}, row.map((cell, at) => el("td", { class: numbers(rows, at) ? "number" : cell.length <= SHORT ? "short" : undefined }, isNumber(cell) ? String(Number(Number(cell).toPrecision(5))) : cell))))))),
  picture: (sample, id) => el("button", { type: "button", class: "picture", "aria-label": `Enlarge step ${sample.step}`, on: { click: () => enlarge(sample, id) } }, picture(sample, id)),
};

const isNumber = (text) => text.trim() !== "" && Number.isFinite(Number(text));
/** Whether a column has numbers alone. */
const numbers = (rows, at) => rows.some((row) => row[at]) && rows.every((row) => !row[at] || isNumber(row[at]));
/** Pictures below this width are drawn larger, each of their pixels as a square of whole pixels. */
const SMALL = 400, WIDE = 288;
/** Characters of a cell that stay in one line. */
const SHORT = 24;

function picture({ step, width, height, data }, id, wide = WIDE) {
  const times = width && width < SMALL ? Math.max(1, Math.floor(wide / width)) : 1;
  return el("img", { src: data ?? runPath(id, `/samples/${step}.png`), width: width * times, height: height * times, alt: `What the model made at step ${step}`, loading: "lazy", class: width < SMALL ? "pixels" : undefined });
}

function enlarge(sample, id) {
  const shown = dialog(`Step ${whole(sample.step)}`, el("div", { class: "enlarged" }, picture(sample, id, Math.min(640, innerWidth - 68, innerHeight * 0.64))),
    el("div", { class: "buttons" }, el("span", { class: "quiet" }, `${sample.width} × ${sample.height} pixels`), el("button", { type: "button", on: { click: () => shown.close() } }, "Close", el("kbd", {}, "esc"))));
}
