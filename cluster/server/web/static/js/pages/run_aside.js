/** Beside a run's curves: where its time went, what was planned, how its experts are loaded. */

import { get, runPath } from "../api.js";
import { HeatMap, scale } from "../charts/heatmap.js";
import { bar, parts } from "../charts/parts.js";
import { el, empty, put, svg } from "../dom.js";
import { bytes, compact, duration, percent, whole } from "../format.js";

const FORMATS = { bytes, seconds: (value) => duration(value, 3), "tokens/s": compact };
const BESIDE = 4;

export function aside(id, node) {
  const time = el("section"), plan = el("section"), map = el("section");
  node.append(time, plan, map);
  const experts = new Experts(id, map, false);
  return {
    show(details) {
      showTime(details, time);
      showPlan(details, plan);
      if (details.experts) experts.show(details);
    },
    close: () => experts.close(),
    repaint: () => experts.repaint(),
  };
}

function showTime({ goodput, attempts }, node) {
  if (!goodput.parts.length) return void put(node);
  const wholes = goodput.by_attempt.map(({ parts: own }) => own.reduce((sum, [, seconds]) => sum + seconds, 0)), most = Math.max(...wholes);
  const why = new Map(attempts.map(({ n, reason }) => [n, reason]));
  put(node,
    el("h2", {}, "Where the time went", el("small", {}, `goodput ${percent(goodput.fraction)}%`)),
    bar(goodput.parts, null, "Where the time went"),
    parts(goodput.parts),
    goodput.by_attempt.length > 1 && el("table", { class: "attempts" }, goodput.by_attempt.slice(-6).map(({ attempt, parts: own, reason }) => el("tr", {},
      el("td", { class: "quiet" }, attempt), el("td", {}, bar(own, most, `Attempt ${attempt}`)), el("td", { class: "quiet", title: reason ?? why.get(attempt) }, reason ?? why.get(attempt) ?? "")))));
}

function showPlan({ planned }, node) {
  if (!planned.length) return void put(node);
  const predicted = planned.some((row) => row.planned !== null); // the planner has formulas for decoders alone
  const off = ({ planned: was, measured }) => (was && measured !== null ? measured / was - 1 : null);
  const write = (value, unit) => (FORMATS[unit] ?? compact)(value);
  put(node, el("h2", {}, predicted ? "Planned and measured" : "Measured"), el("table", { class: "plain" },
    predicted && el("thead", {}, el("tr", {}, el("th", {}, "what"), el("th", { class: "number" }, "planned"), el("th", { class: "number" }, "measured"), el("th", {}, el("span", { class: "for-readers" }, "off, drawn")), el("th", { class: "number" }, "off"))),
    el("tbody", {}, planned.map((row) => {
      const share = off(row), wide = Math.min(20, Math.abs(share ?? 0) * 80);
      return el("tr", {}, el("td", {}, row.what), predicted && el("td", { class: "number quiet" }, write(row.planned, row.unit)), el("td", { class: "number" }, write(row.measured, row.unit)), predicted && [
        el("td", { class: "off" }, share !== null && svg("svg", { viewBox: "0 0 44 12", "aria-hidden": "true" }, svg("path", { d: "M22 0v12", stroke: "var(--line2)" }), svg("rect", { x: share < 0 ? 22 - wide : 22, y: 3, width: wide, height: 6, fill: "var(--ink3)" }))),
        el("td", { class: "number quiet" }, share === null ? "" : `${share < 0 ? "−" : "+"}${percent(Math.abs(share))}%`)]);
    }))));
}

/** Heat maps of layers; `all`: of each layer, else of some. */
export class Experts {
  constructor(id, node, all) {
    Object.assign(this, { id, node, all, maps: [] });
  }

  close() {
    this.closed = true;
    for (const { map } of this.maps) map.close();
  }

  repaint() {
    for (const { map } of this.maps) map.draw();
  }

  async show(details) {
    const { experts, row } = details;
    if (!experts) return void put(this.node, empty("No experts", "This run's model is dense.", null));
    if (this.updated === row.updated) return;
    this.updated = row.updated;
    const every = this.all ? 1 : Math.max(1, (experts.layers - 1) / (BESIDE - 1));
    const layers = [...new Set(Array.from({ length: Math.min(this.all ? 128 : BESIDE, experts.layers) }, (_, index) => Math.round(index * every)))];
    if (!this.maps.length) {
      this.maps = layers.map((layer) => {
        const map = new HeatMap({ label: `Layer ${layer}`, height: this.all ? 96 : 72 }), said = el("span", { class: "warning" });
        return { layer, map, said, node: el("figure", { class: "layer" }, el("figcaption", {}, el("b", {}, `layer ${layer}`), el("span", { class: "quiet" }, ` ${experts.experts} experts`), el("span", { class: "space" }), said), map.canvas) };
      });
      put(this.node, el("div", { class: "chart-head" }, el("h2", {}, "Experts", el("small", {}, "load by step; an even share is neutral")), el("span", { class: "space" }), scale()), el("div", { class: this.all ? "layers all" : "layers" }, this.maps.map((each) => each.node)),
        layers.length < experts.layers && el("p", { class: "quiet" }, `${layers.length} of ${whole(experts.layers)} layers.`));
    }
    for (const { layer, map, said } of this.maps) {
      try {
        const { steps, load } = await get(runPath(this.id, "/experts"), { layer, points: 200 });
        if (this.closed) return;
        if (!steps.length) continue;
        const dead = map.set(load, steps, row.status === "RUNNING" ? row.steps : null);
        put(said, dead.length ? `expert${dead.length > 1 ? "s" : ""} ${dead.slice(0, 3).join(", ")}${dead.length > 3 ? " …" : ""} starve${dead.length > 1 ? "" : "s"}` : "");
      } catch (error) {
        put(said, error.message);
      }
    }
  }
}
