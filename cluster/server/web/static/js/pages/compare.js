/** Which is better, by how much, which keys differ? */

import { get, readOnly, runs } from "../api.js";
import { Chart } from "../charts/chart.js";
import { curve, valueAt } from "../charts/curves.js";
import { saveCsv, savePng, saveSvg } from "../charts/export.js";
import { together } from "../colours.js";
import { choice, el, empty, folded, notice, popover, put } from "../dom.js";
import { DASH, compact, loss, middle, number, plain, sharedPrefix, unitWords, whole } from "../format.js";
import { calmly, fresh, listen } from "../live.js";
import { change, runAddress, state } from "../router.js";
import { titled } from "../shell.js";
import { groupName, grouped, groupings, meanOf, spread } from "./compare_groups.js";
import { AXES, SCALES, axesOf, axisLabel, nextAxis, scaleOf, toggled, xFormats } from "./run_charts.js";

const METRICS = [["loss", "loss"], ["eval_loss", "held-out"], ["grad_norm", "grad_norm"]];
const MOST = 20;
/** What runs that count different things have seen. */
const SEEN = "seen";

export function open(outlet) {
  return new Compare(outlet);
}

class Compare {
  constructor(outlet) {
    this.title = el("h1", {}, "Compare");
    this.exports = el("div", { class: "buttons" }, [["CSV", "Export CSV"], ["PNG", "PNG"], ["SVG", "SVG"]].map(([kind, label]) => el("button", { type: "button", "data-kind": kind, on: { click: () => this.save(kind) } }, label)));
    this.bar = el("div", { class: "toolbar compare-bar" });
    this.absent = el("div"); // it stays where the others are drawn
    this.wrong = el("div");
    this.overlay = el("div");
    this.difference = el("div");
    this.list = el("section");
    this.keysNode = el("section");
    outlet.append(el("div", { class: "compare" }, el("div", { class: "title-row" }, this.title, el("div", { class: "space" }), this.exports), this.bar, this.absent, this.wrong,
      el("div", { class: "two compare-two" }, el("div", {}, this.overlay, this.difference), el("aside", { "aria-label": "Runs and keys that differ" }, this.list, this.keysNode))));
    this.unlisten = listen((ids) => (!ids.size || runs.left || this.asked.some((id) => ids.has(id))) && this.again());
    this.again = calmly(async () => {
      const before = this.ids.length;
      await runs.refresh();
      if (this.closed) return;
      if (this.ids.length === before && !this.missing) await this.load();
      else this.show();
    }, 800);
    titled("Compare", [["x", "axis"], ["l", "log"], ["b", "next baseline"], ["m", "metric"], ["e", "export"], ["drag", "zoom"]]);
    this.show();
  }

  close() {
    this.closed = true;
    this.unlisten();
    this.chart?.destroy();
    this.differences?.destroy();
  }

  repaint() {
    this.chart?.redraw();
    this.differences?.redraw();
  }

  update() {
    this.show();
  }

  get asked() {
    return [...new Set(state().getAll("run"))];
  }

  get ids() {
    return this.asked.filter((id) => runs.places.has(id)).slice(0, MOST);
  }

  get axis() {
    const asked = state().get("x") ?? "step";
    return AXES.some(([axis]) => axis === asked) ? asked : "step";
  }

  get metric() {
    return state().get("metric") || "loss";
  }

  get baseline() {
    const asked = state().get("base");
    return this.ids.includes(asked) ? asked : this.ids[0];
  }

  /** What these runs count; null: not the same. */
  get unit() {
    const units = new Set(this.ids.map((id) => runs.row(id).unit));
    return units.size === 1 ? [...units][0] : null;
  }

  /** A key, or what stands for all but the seeds; null: each run is a line. */
  get by() {
    return state().get("group");
  }

  get zoom() {
    const query = state(), from = query.get("from"), to = query.get("to");
    return from !== null && to !== null && Number(from) < Number(to) ? [Number(from), Number(to)] : null;
  }

  name(id) {
    const row = runs.row(id);
    return row.sweep ? `${row.sweep}/${row.name}` : row.name;
  }

  show() {
    const { ids, axis, metric } = this;
    const gone = this.asked.filter((id) => !runs.places.has(id));
    this.missing = gone.length > 0;
    put(this.absent, this.missing && notice("warning", `${runs.left ? "Not read yet" : "Not here"}: ${gone.join(", ")}.`));
    for (const button of this.exports.children) button.disabled = !ids.length;
    if (!ids.length) {
      put(this.wrong);
      put(this.title, "Compare ", el("span", { class: "rest" }, "runs over steps, examples, tokens, FLOPs or time"));
      this.chart?.destroy();
      this.differences?.destroy();
      this.chart = this.differences = null;
      put(this.bar, this.adding());
      put(this.overlay, !this.missing && empty("No run is chosen", "Choose runs with x in Runs, then press c; or add one by name.", null, el("p", {}, el("a", { href: "/runs" }, "To the runs"))));
      for (const node of [this.difference, this.list, this.keysNode]) put(node);
      return;
    }
    const { unit } = this, usual = unit ? [...METRICS, [`${unit}_per_second`, `${unitWords(unit)}/s`]] : METRICS;
    const metrics = usual.some(([name]) => name === metric) ? usual : [...usual, [metric, metric]];
    put(this.bar, folded(
      el("span", { class: "quiet" }, "x"), choice("x axis", axesOf(unit ?? SEEN), axis, (x) => change({ x: x === "step" ? null : x, from: null, to: null })),
      choice("scale", SCALES, scaleOf(state()), (value) => change({ log: value })),
      el("span", { class: "quiet" }, "metric"), choice("metric", metrics, metric, (name) => change({ metric: name === "loss" ? null : name })),
      (this.more = el("button", { type: "button", "aria-label": "Another metric", "aria-haspopup": "true", on: { click: () => this.chooseMetric() } }, "+")),
      el("label", { class: "smooth quiet" }, "smooth", el("input", { type: "range", min: 0, max: 20, "aria-label": "Smoothing", value: state().get("smooth") ?? 6, on: { change: (event) => change({ smooth: event.target.value === "6" ? null : event.target.value }) } }))),
      this.zoom && el("button", { type: "button", on: { click: () => change({ from: null, to: null }) } }, "All"),
      el("div", { class: "space" }), this.adding(),
      ids.length > 1 && (this.groupSelect = el("select", { class: "group-by", "aria-label": "Group", on: { change: (event) => change({ group: event.target.value }) } })),
      el("label", { class: "quiet baseline" }, "Baseline ", el("select", { on: { change: (event) => change({ base: event.target.value }) } }, ids.map((id) => el("option", { value: id, selected: id === this.baseline }, this.name(id))))));
    this.offerGroups();
    this.load();
  }

  /** The keys by which these runs can be grouped, as far as they are known. */
  offerGroups() {
    if (!this.groupSelect) return;
    const known = groupings(this.found?.differs ?? []), by = this.by ?? "";
    const options = known.some(([each]) => each === by) ? known : [...known, groupName(by)];
    put(this.groupSelect, options.map(([value, label]) => el("option", { value, selected: value === by }, label)));
  }

  adding() {
    if (readOnly) return null;
    const field = el("input", { type: "search", list: "runs-to-add", placeholder: "Add a run", "aria-label": "Add a run", class: "add-run", on: { change: () => {
      const wanted = field.value.trim(), id = runs.places.has(wanted) ? wanted : runs.columns.id[runs.columns.name.indexOf(wanted)];
      if (id) change({ run: [...this.ids, id] });
    } } });
    return [field, el("datalist", { id: "runs-to-add" }, runs.columns.id.slice(-500).reverse().map((id) => el("option", { value: id })))];
  }

  async chooseMetric() {
    const { metrics } = await get("/api/keys");
    const list = el("div"), search = el("input", { type: "search", class: "mono", placeholder: "Metric", "aria-label": "Find a metric", on: { input: () => draw() } });
    const panel = popover(this.more, search, list);
    const draw = () => put(list, metrics.filter((name) => name.toLowerCase().includes(search.value.trim().toLowerCase())).slice(0, 40).map((name) => el("div", {}, el("button", { type: "button", class: "bare mono", on: { click: () => (panel.hidePopover(), change({ metric: name })) } }, name))));
    draw();
    search.focus();
  }

  async load() {
    const { ids, axis, metric, zoom, baseline } = this;
    if (!ids.length) return;
    const turn = (this.turn = (this.turn ?? 0) + 1);
    let found;
    try {
      found = await get("/api/compare", { run: ids, metric, x: axis, points: this.by ? 2000 : 800, from: zoom?.[0], to: zoom?.[1], log: scaleOf(state()).includes("x") || null });
    } catch (error) {
      if (turn === this.turn && !this.closed) put(this.wrong, notice("warning", error.message));
      return;
    }
    if (turn !== this.turn || this.closed) return;
    fresh();
    const without = ids.filter((id) => !found.runs[id]?.n);
    put(this.wrong, without.length > 0 && notice("warning", `${without.map((id) => this.name(id)).join(", ")}: nothing of ${metric} by ${axis} is recorded.`));
    this.found = found;
    this.groups = grouped(ids, found.differs, this.by);
    this.offerGroups();
    this.say(ids, axis);
    this.draw(ids, found.runs);
    this.tables(ids, baseline, found.differs);
  }

  say(ids, axis) {
    const rows = ids.map((id) => runs.row(id)).filter((row) => row.eval_loss !== null).sort((a, b) => a.eval_loss - b.eval_loss);
    const data = new Set(ids.map((id) => runs.row(id).data));
    const by = axisLabel(axis, this.unit ?? SEEN), tasks = new Set(ids.map((id) => runs.row(id).task));
    const apart = data.size > 1 ? "They have different data: their losses do not compare." : tasks.size > 1 ? "They have different tasks: their losses do not compare." : "";
    if (this.groups) {
      const means = this.groups.map(({ label, ids: own }) => ({ label, ...this.ends(own) })).filter(({ n }) => n).sort((a, b) => a.mean - b.mean);
      const lowest = means.length > 1 ? `${means[0].label} ends lowest: ${band(means[0])}.` : means.length ? `They end at ${band(means[0])}.` : "";
      put(this.title, `${ids.length} runs in ${this.groups.length} group${this.groups.length === 1 ? "" : "s"} by ${by === "step" ? "steps" : by}. `, el("span", { class: "rest" }, apart || lowest));
      return;
    }
    const start = ids.length === 1 ? "1 run. " : `${ids.length} runs by ${by === "step" ? "steps" : by}. `;
    const [first, next] = rows, unequal = next && first.weight !== next.weight; // a longer run is lower anyway
    const after = unequal ? `, after ${compact(first.weight)} ${unitWords(first.unit)} against ${compact(next.weight)}` : "";
    const best = next ? `${this.name(first.id)} ends lowest: ${loss(first.eval_loss)}, ${(next.eval_loss - first.eval_loss).toFixed(3)} below the next${after}.` : ids.length === 1 ? "Add another to compare it with." : "";
    put(this.title, start, el("span", { class: "rest" }, apart || best));
  }

  /** Held-out losses at the end of runs: how many, their mean and standard deviation. */
  ends(ids) {
    return spread(ids.map((id) => runs.row(id).eval_loss).filter((value) => value !== null));
  }

  draw(ids, lines) {
    const { axis, metric, zoom, baseline } = this, scale = scaleOf(state()), log = scale.includes("y"), logX = scale.includes("x"), level = Number(state().get("smooth") ?? 6);
    const share = level > 0 ? 0.002 * 1.28 ** (level * 1.5) : 0;
    const looks = together(ids), prefix = sharedPrefix(ids.map((id) => this.name(id))), short = (id) => middle(this.name(id).slice(prefix.length), 24);
    const shown = ids.map((id, index) => [id, looks[index], lines[id]]).filter(([, , line]) => line?.n);
    const range = zoom ?? [Math.min(0, ...shown.map(([, , { x }]) => x[0])), Math.max(0, ...shown.map(([, , { x }]) => x.at(-1)))];
    const alone = ([id, { name, dash }, line], label) => curve(line, { colour: name, dash, share, label, span: range[1] - range[0], logX });
    const all = !this.groups ? shown.map((each) => ({ ids: [each[0]], label: short(each[0]), series: alone(each, short(each[0])) })) : this.groups.flatMap(({ label, ids: own }) => {
      const members = shown.filter(([id]) => own.includes(id)), [first] = members;
      if (!first) return [];
      const named = `${label}${own.length > 1 ? ` (${own.length})` : ""}`, of = (member) => alone(member, named).at(-1);
      return { ids: own, label: named, series: members.length > 1 ? meanOf(members.map(of), { colour: first[1].name, dash: first[1].dash, label: named }) : alone(first, named) };
    });
    const axisName = axisLabel(axis, this.unit ?? SEEN);
    const isLoss = (metric === "loss" || metric === "eval_loss") && ids.every((id) => runs.row(id).unit === "tokens");
    const unit = `${isLoss ? "nats per token, " : ""}by ${axisName}${this.groups ? "; mean and standard deviation" : prefix ? `; all are ${prefix}…` : ""}`;
    const base = all.find(({ ids: own }) => own.includes(baseline))?.series.at(-1);
    const settings = [axis, metric, unit, innerWidth < 640].join();
    if (this.settings !== settings) {
      this.settings = settings;
      this.chart?.destroy();
      this.differences?.destroy();
      put(this.overlay);
      put(this.difference);
      const tall = Math.max(240, Math.min(600, innerHeight * 0.43)), zoomed = (from, to) => change({ from, to });
      const options = { sync: "compare", xName: axisName, xFormat: xFormats[axis], xExact: axis === "step" ? whole : xFormats[axis], zoomed };
      this.chart = new Chart(this.overlay, { ...options, name: metric, unit, height: tall, zero: !isLoss, tip: true, format: (value, digits = 4) => (Math.abs(value) >= 1000 ? compact(value, digits) : number(value, digits)), beside: (each, x, value) => this.beside(each, x, value) });
      this.differences = new Chart(this.difference, { ...options, name: "Difference from the baseline", unit: isLoss ? "nats per token; below zero is better" : "", height: tall * 0.5, zero: false, format: signed });
    }
    for (const { label, series } of all) {
      const main = series.at(-1);
      Object.assign(main, { end: main.end ?? main.last, said: middle(label, 32) });
    }
    this.base = base;
    this.chart.set({ series: [...all.flatMap(({ series }) => series.slice(0, -1)), ...all.map(({ series }) => series.at(-1))], range, log, logX });
    const others = base ? all.filter(({ series }) => series.at(-1) !== base).map(({ series }) => {
      const { x, y, colour, dash, label } = series.at(-1);
      const differs = y.map((value, at) => {
        const other = valueAt(base.x, base.y, x[at]);
        return value === null || other === null ? null : value - other;
      });
      const at = differs.findLastIndex((value) => value !== null), end = at < 0 ? null : [x[at], differs[at]];
      return { x, y: differs, kind: "line", colour, dash, label, end, last: end, said: end && (isLoss ? decimals : signed)(end[1]) };
    }) : [];
    this.difference.hidden = !others.length;
    if (others.length) {
      const zero = { x: range, y: [0, 0], kind: "line", bare: true, colour: base.colour, dash: base.dash, label: `${base.label} (baseline)`, end: base.end && [base.end[0], 0], last: [range[1], 0], said: "baseline" };
      this.differences.options.atLeast = this.chart.padding(); // one crosshair through both
      this.differences.set({ series: [zero, ...others], range, logX });
    }
    this.shown = { name: metric, xName: axisName, series: this.chart.shown.series };
  }

  beside(each, x, value) {
    if (!this.base || each === this.base) return "baseline";
    const other = valueAt(this.base.x, this.base.y, x);
    return other === null ? "" : signed(value - other);
  }

  tables(ids, baseline, differs) {
    const looks = together(ids), rows = ids.map((id) => runs.row(id)), own = rows.find(({ id }) => id === baseline);
    const prefix = sharedPrefix(ids.map((id) => this.name(id)));
    put(this.list, el("h2", {}, "Runs", el("small", {}, "held-out loss at the end")), el("div", { class: "wide", tabindex: "0", role: "region", "aria-label": "Runs and their losses" }, el("table", { class: "plain compare-runs" },
      el("thead", {}, el("tr", {}, ["run", "loss", "difference", unitWords(this.unit ?? SEEN), "leave out"].map((name, index) => el("th", { class: index ? "number" : "" }, index === 4 ? el("span", { class: "for-readers" }, name) : name)))),
      (this.groups ?? [{ ids }]).map(({ label, ids: members }) => el("tbody", {}, label && this.groupRow(label, members, baseline, looks[ids.indexOf(members[0])]), rows.map((row, index) => members.includes(row.id) && el("tr", {},
        el("td", { class: label ? "member" : "" }, swatch(label ? looks[ids.indexOf(members[0])] : looks[index]), el("a", { href: runAddress(row.id), title: this.name(row.id) }, middle(this.name(row.id), 30)), row.id === baseline && el("span", { class: "tag" }, "baseline")),
        el("td", { class: "number" }, el("b", {}, loss(row.eval_loss))),
        el("td", { class: "number quiet" }, row.id === baseline || row.eval_loss === null || own.eval_loss === null ? "" : decimals(row.eval_loss - own.eval_loss)),
        el("td", { class: "number quiet" }, compact(row.weight), !this.unit && row.weight !== null && el("span", { class: "unit" }, unitWords(row.unit))),
        el("td", { class: "number" }, el("button", { type: "button", class: "bare take", "aria-label": `Leave out ${row.name}`, on: { click: () => change({ run: ids.filter((id) => id !== row.id) }) } }, "×")))))))));
    if (ids.length < 2) return void put(this.keysNode);
    put(this.keysNode, el("h2", {}, "Keys that differ", el("small", {}, differs.length)), differs.length
      ? el("div", { class: "wide", tabindex: "0", role: "region", "aria-label": "Keys that differ" }, el("table", { class: "plain keys-table" },
        el("thead", {}, el("tr", {}, el("th", {}, el("span", { class: "for-readers" }, "key")), ids.map((id, index) => el("th", { class: "number", title: this.name(id) }, swatch(looks[index]), ids.length > 2 ? el("span", { class: "for-readers" }, this.name(id)) : middle(this.name(id).slice(prefix.length), 14))))),
        el("tbody", {}, differs.map(({ key, values }) => el("tr", {}, el("td", { class: "mono" }, key), values.map((value) => {
          const text = value === null ? DASH : plain(value);
          return el("td", { class: `mono number${value === null ? " missing" : ""}`, title: text }, middle(text, ids.length > 2 ? 8 : 22));
        })))))) : el("p", { class: "quiet" }, "None: their configs are the same."));
  }

  groupRow(label, ids, baseline, look) {
    const ends = this.ends(ids), base = !ids.includes(baseline) && this.ends(this.groups.find((each) => each.ids.includes(baseline)).ids);
    return el("tr", {}, el("td", { title: label }, swatch(look), el("b", {}, middle(label, 30)), ` ${ids.length} run${ids.length === 1 ? "" : "s"}`),
      el("td", { class: "number" }, ends ? [el("b", {}, loss(ends.mean)), ends.n > 1 && el("span", { class: "unit" }, `±${loss(ends.deviation)}`)] : DASH),
      el("td", { class: "number quiet" }, ends && base ? decimals(ends.mean - base.mean) : ""), el("td"), el("td"));
  }

  save(kind) {
    if (!this.shown) return;
    const name = `compare-${this.metric.replace(/[^\w.-]/g, "_")}`;
    if (kind === "CSV") saveCsv(this.shown, name);
    else if (kind === "PNG") savePng([this.chart, ...(this.difference.hidden ? [] : [this.differences])], name);
    else saveSvg(this.chart, name);
  }

  key(key) {
    const { ids } = this;
    if (!ids.length) return false;
    if (key === "x") change({ x: nextAxis(this.axis, this.unit ?? SEEN), from: null, to: null });
    else if (key === "l") change({ log: toggled(scaleOf(state())) });
    else if (key === "b") change({ base: ids[(ids.indexOf(this.baseline) + 1) % ids.length] });
    else if (key === "m") this.chooseMetric();
    else if (key === "e") this.save("CSV");
    else if (key === "Escape" && this.zoom) change({ from: null, to: null });
    else return false;
    return true;
  }
}

const swatch = ({ name, dash }) => el("span", { class: dash ? "swatch dashed" : "swatch", style: { "--own": `var(${name})` } });
const band = ({ n, mean, deviation }) => (n > 1 ? `${loss(mean)} ± ${loss(deviation)}` : loss(mean));
const signed = (value) => (value === 0 ? "0" : `${value > 0 ? "+" : "−"}${number(Math.abs(value), 3)}`);
/** A difference of losses, of as many decimals as losses have. */
const decimals = (value) => (Math.abs(value) < 5e-4 ? "0.000" : `${value > 0 ? "+" : "−"}${loss(Math.abs(value))}`);
