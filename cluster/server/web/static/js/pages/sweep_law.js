/** What a sweep's finished trials say of larger ones: isoFLOP curves, frontier, score, laws, the next trial. */

import { Plane } from "../charts/plane.js";
import { command } from "../copy.js";
import { dialog, el, put, svg } from "../dom.js";
import { DASH, compact, loss, middle, number, percent, plain } from "../format.js";
import { linked } from "../router.js";

/** Of models whose experts are as wide as the dense layer that is not worth a word. */
export const short = (kind) => kind.replace(/, G = 1$/, "");
const LAWS = { approach1: "Approach 1", approach2: "Approach 2", approach3: "Approach 3", kaplan: "Kaplan", overtraining: "Gadre", data_constrained: "Muennighoff", ludziejewski: "Ludziejewski", abnar: "Abnar", krajewski: "Krajewski", crossed: "Crossed" };
/** Kinds of models that have a chart of their own; of more one chooses. */
const CURVES = 2;

/** 1.6e12 */
export const flops = (value, digits = 1) => (Number.isFinite(value) && value > 0 ? value.toExponential(digits).replace(/\.?0+e/, "e").replace("e+", "e") : DASH);
/** The first line of a message, as a sentence's beginning. */
export const told = (message) => {
  const line = message.split("\n")[0].replace(/:$/, "");
  return line[0].toUpperCase() + line.slice(1);
};
const nameOf = (law) => LAWS[law] ?? (law[0].toUpperCase() + law.slice(1)).replace("_", ", ").replaceAll("_", " ");
/** Why a law is refused, without what the heading says. */
const refusal = ({ name, refused }) => (refused.replace(`${name}: `, "").replace(/^approach [12]: /, "").replace(/^(.+) at the edge of what is allowed; the data do not determine it$/, (_, names) => `${names.replaceAll(" and ", ", ")} not determined`).replace(/ needs the column /, " needs ")).split("\n")[0];

export class Law {
  constructor(node) {
    Object.assign(this, { node, curves: [] });
    this.left = el("div", { class: "curves" });
    this.right = el("div", { class: "frontier" });
    this.score = el("section");
    this.laws = el("section");
    this.next = el("section");
    this.charts = el("div", { class: "law-charts" }, el("section", {}, (this.leftHead = el("h2")), this.left), el("section", {}, (this.rightHead = el("h2")), this.right));
    this.tables = el("div", { class: "law-tables" }, this.score, this.laws, this.next);
    put(node, this.charts, this.tables);
  }

  close() {
    for (const { plane } of this.curves) plane.destroy();
    this.frontier?.destroy();
  }

  show(law, { byName, colours, unit }) {
    Object.assign(this, { law, byName, colours, unit });
    const kinds = law.kinds ?? [];
    this.charts.hidden = !kinds.length;
    if (!this.charts.hidden) {
      this.showCurves(kinds);
      this.showFrontier(kinds);
    }
    this.showScore();
    this.showLaws();
    this.showNext();
  }

  /** Colour of a kind of models: that of its trials' variant. */
  colourOf(kind, index) {
    const trial = this.byName.get(kind.budgets[0]?.runs[0]?.run);
    return this.colours.get(trial?.variant) ?? `var(--run${(index % 6) + 1})`;
  }

  swatch(run) {
    const trial = this.byName.get(run);
    return trial ? el("span", { class: "swatch", style: { "--own": this.colours.get(trial.variant) } }) : el("span", { class: "swatch blank" });
  }

  showCurves(kinds) {
    const curved = kinds.map((kind, index) => ({ ...kind, colour: this.colourOf(kind, index) })).filter((kind) => kind.budgets.some(({ runs }) => runs.length > 2)).slice(0, this.all ? 12 : CURVES);
    const left = kinds.length - curved.length;
    put(this.leftHead, "Loss by size, one curve a budget", el("small", {}, `held-out${nats(this.unit)}, by ${this.law.convention.replaceAll("_", " ")} parameters; ◆ lowest point`, left > 0 && !this.all && kinds.length > CURVES ? el("button", { type: "button", class: "bare", on: { click: () => ((this.all = true), this.show(this.law, this)) } }, `${left} more`) : ""));
    const key = JSON.stringify(curved.map(({ name, colour }) => [name, colour]));
    if (this.drawnKinds !== key) {
      for (const { plane } of this.curves) plane.destroy();
      this.curves = curved.map((kind) => ({ plane: new Plane(this.left, { name: kind.name === "runs" ? "All trials" : short(kind.name), swatch: kind.colour, height: 300, x: { name: "parameters", log: true, format: (value) => compact(value) }, y: { name: "held-out loss", log: true, format: (value) => number(value, 3) } }) }));
      this.drawnKinds = key;
    }
    const ys = ends(curved.flatMap((kind) => kind.budgets.flatMap(({ runs, y }) => [...runs.map((run) => run.loss), ...y])));
    curved.forEach((kind, place) => {
      const many = kind.budgets.length, tone = (index) => `color-mix(in srgb, ${kind.colour} ${Math.round(58 + (42 * (index + 1)) / many)}%, var(--page))`;
      const lows = kind.budgets.map(({ low }) => low).filter(Boolean);
      this.curves[place].plane.set({
        ys,
        points: [
          ...kind.budgets.flatMap(({ runs, budget, low }, index) => runs.map((run) => ({ x: run.n, y: run.loss, colour: tone(index), shape: low ? "dot" : "ring", text: [run.run, `held-out loss ${loss(run.loss)}`, `N ${compact(run.n)}, D ${compact(run.d)}, ${flops(budget)} FLOPs`] }))),
          ...kind.budgets.filter(({ low }) => low).map(({ low, budget }) => ({ x: low.n, y: low.loss, colour: "var(--ink1)", shape: "diamond", text: [`lowest of ${flops(budget)} FLOPs`, `N ${compact(low.n)}, D ${compact(low.d)}`, `loss ${loss(low.loss)}${low.std ? `, ln N ± ${number(low.std, 2)}` : ""}`] })),
        ],
        lines: [
          { x: lows.map(({ n }) => n), y: lows.map((low) => low.loss), colour: "var(--ink2)", dash: "2 3", thin: true },
          ...kind.budgets.map(({ x, y, budget, runs, low }, index) => (low ? { x, y, colour: tone(index), said: flops(budget), ink: "var(--ink2)" } : { x: runs.map(({ n }) => n).slice(-1), y: runs.map((run) => run.loss).slice(-1), colour: "transparent", said: `${flops(budget)}: no optimum`, ink: "var(--ink2)" })),
        ],
      });
    });
  }

  showFrontier(kinds) {
    const { law } = this, lines = law.frontier ?? [], colours = kinds.map((kind, index) => this.colourOf(kind, index));
    const predictions = (law.score.predicted?.scores ?? []).filter(({ status }) => status !== "AFTERWARDS");
    put(this.rightHead, "Frontier", el("small", {}, lines.length ? `lowest loss by training FLOPs, by ${nameOf(law.chosen)}; band 95%` : "all trials by training FLOPs; no law holds"));
    this.frontier ??= new Plane(this.right, { name: "Loss by FLOPs", bare: true, height: 300, x: { name: "training FLOPs", log: true, format: (value) => flops(value) }, y: { name: "held-out loss", log: true, format: (value) => number(value, 3) } });
    const trained = law.max_budget ?? law.budgets.at(-1), asked = law.prediction;
    const marks = predictions.flatMap((each) => [
      { x: each.budget, y: each.predicted, colour: "var(--ink1)", text: [each.run, `predicted ${loss(each.predicted)} (${loss(each.low)} to ${loss(each.high)})`] },
      ...(each.loss === null ? [] : [{ x: each.budget, y: each.loss, colour: each.inside ? "var(--ink1)" : "var(--failed)", shape: each.inside ? "ring" : "cross", text: [each.run, `came to ${loss(each.loss)}`, each.inside ? "inside the interval" : "outside of the interval"] }]),
    ]);
    const notes = predictions.slice(-1).flatMap((each) => [{ x: each.budget, y: each.high, text: `predicted ${loss(each.predicted)}`, colour: "var(--ink1)", above: true }, ...(each.loss === null ? [] : [{ x: each.budget, y: each.loss, text: `came to ${loss(each.loss)}`, colour: each.inside ? "var(--ink1)" : "var(--failed)" }])]);
    if (asked && !predictions.some((each) => Math.abs(Math.log(each.budget / law.budget)) < 0.03)) {
      marks.push({ x: law.budget, y: asked.loss.value, colour: "var(--ink1)", shape: "diamond", text: [`predicted for ${flops(law.budget)} FLOPs`, `one run ${loss(asked.run_loss.value)} (${loss(asked.run_loss.low)} to ${loss(asked.run_loss.high)})`, `by ${asked.form}`] });
      notes.push({ x: law.budget, y: asked.run_loss.high, text: `predicted ${loss(asked.run_loss.value)}`, colour: "var(--ink1)", above: true });
    }
    this.frontier.set({
      points: [...kinds.flatMap((kind, index) => kind.budgets.flatMap(({ runs }) => runs.map((run) => ({ x: run.c, y: run.loss, colour: colours[index], text: [run.run, `held-out loss ${loss(run.loss)}`, `N ${compact(run.n)}, D ${compact(run.d)}`] })))), ...marks],
      lines: lines.map(({ c, loss: y, name }) => ({ x: c, y, name, colour: colours[kinds.findIndex((kind) => kind.name === name)], said: lines.length > 1 ? name.split(",")[0] : "" })),
      bands: lines.filter(({ low }) => low).map(({ c, low, high, name }) => ({ x: c, low, high, colour: colours[kinds.findIndex((kind) => kind.name === name)] })),
      bars: [...predictions.map(({ budget, low, high }) => ({ x: budget, low, high, colour: "var(--ink1)" })), ...(marks.at(-1)?.shape === "diamond" ? [{ x: law.budget, low: asked.run_loss.low, high: asked.run_loss.high, colour: "var(--ink1)" }] : [])],
      notes, beyond: { x: trained * 1.03, said: ["trained", "predicted"] },
    });
  }

  showScore() {
    const { held_back: held, predicted, why } = this.law.score, node = this.score;
    const rows = [...(predicted?.scores ?? []).map((each) => ({ ...each, next: true })), ...(held?.scores ?? [])];
    if (!rows.length) return void put(node, why && [el("h2", {}, "Score"), el("p", { class: "quiet" }, told(why))]);
    const losses = rows.flatMap((each) => [each.low, each.high, each.loss ?? each.predicted]);
    const [low, high] = [Math.min(...losses), Math.max(...losses)], x = (value) => 3 + (154 * (value - low)) / (high - low || 1);
    const about = [
      held?.finished && `runs over ${flops(held.until)} FLOPs, foreseen from those below: ${held.inside} of ${held.finished} inside, mean error ${percent(held.mean_absolute_error, 1)}%`,
      predicted?.finished && `${predicted.inside} of ${predicted.finished} predicted runs inside`,
    ].filter(Boolean).join("; ");
    put(node, el("h2", {}, "Score", el("small", {}, about)), el("div", { class: "wide" }, el("table", { class: "plain score" },
      el("thead", {}, el("tr", {}, el("th", {}, "trial"), el("th", { class: "number" }, "predicted"), el("th", {}, el("span", { class: "for-readers" }, "interval and what came, drawn"), el("span", { class: "scale", "aria-hidden": "true" }, el("span", {}, number(low)), el("span", {}, number(high)))), el("th", { class: "number" }, "came to"), el("th", { class: "number" }, "off"))),
      el("tbody", {}, rows.slice(0, 40).map((each) => {
        const trial = this.byName.get(each.run), miss = each.inside === false, off = each.error;
        const said = each.status === "AFTERWARDS" ? "predicted afterwards" : each.loss === null ? { RUNNING: "running", NEW: "not begun", FAILED: "failed", STOPPED: "stopped" }[each.status] ?? each.status : null;
        return el("tr", {},
          el("td", {}, this.swatch(each.run), linked(trial?.run, {}, middle(each.run, 26)), each.next && el("span", { class: "tag" }, "next")),
          el("td", { class: "number" }, loss(each.predicted)),
          el("td", {}, svg("svg", { class: "interval", viewBox: "0 0 160 14", role: "img", "aria-label": `${loss(each.low)} to ${loss(each.high)}` },
            svg("rect", { x: x(each.low), y: 4.5, width: Math.max(1, x(each.high) - x(each.low)), height: 5, rx: 2.5, fill: "var(--line2)" }), svg("path", { d: `M${x(each.predicted)} 2v10`, stroke: "var(--ink2)", "stroke-width": 1.4 }),
            each.loss !== null && (miss ? svg("path", { d: `M${x(each.loss) - 3.5} 3.5l7 7m0-7l-7 7`, stroke: "var(--failed)", "stroke-width": 1.7, fill: "none" }) : svg("circle", { cx: x(each.loss), cy: 7, r: 3, fill: "var(--ink1)" })))),
          el("td", { class: "number" }, each.loss === null ? el("span", { class: "missing" }, said) : loss(each.loss)),
          el("td", { class: `number ${miss ? "failed" : "quiet"}` }, off === null ? "" : [`${off < 0 ? "−" : "+"}${percent(Math.abs(off), 1)}`, el("span", { class: "unit" }, "%"), miss && el("span", { class: "for-readers" }, " outside of the interval")]));
      })))), why && el("p", { class: "quiet" }, told(why)), held?.excluded.length > 0 && el("p", { class: "quiet" }, `Not predicted: ${held.excluded.map(({ run, why: reason }) => `${run} (${reason})`).slice(0, 3).join("; ")}`));
  }

  showLaws() {
    const { laws = [], chosen, no_law: none, missing, notes, excluded } = this.law;
    if (!laws.length) return void put(this.laws, missing && [el("h2", {}, "Law"), el("p", { class: "quiet" }, `${told(missing)}.`)], this.leftOut(excluded));
    const errors = laws.map(({ error }) => error).filter((error) => error !== null), most = Math.max(...errors, 1e-9), least = Math.min(...errors);
    const why = (law) => (law.refused ? `refused: ${refusal(law)}` : law.name !== chosen ? "" : law.error === null ? "chosen by Schwarz’ criterion" : law.error <= least ? "chosen: least error" : "chosen: simplest near the least error");
    put(this.laws, el("h2", {}, "Law", el("small", {}, "error on held-back budgets")), el("table", { class: "plain laws" },
      el("thead", { class: "for-readers" }, el("tr", {}, ["law", "error, drawn", "error", "why"].map((name) => el("th", {}, name)))),
      el("tbody", {}, laws.map((law) => el("tr", { class: law.refused ? "quiet" : "" },
        el("td", {}, law.coefficients.length ? el("button", { type: "button", class: "bare law-name", on: { click: () => this.coefficients(law) } }, law.name === chosen ? el("b", {}, nameOf(law.name)) : nameOf(law.name)) : el("span", { class: "law-name" }, nameOf(law.name))),
        el("td", { class: "error-bar" }, law.error !== null && el("span", { style: { width: `${Math.max(2, (100 * Math.min(law.error, most)) / most)}%`, background: law.name === chosen ? "var(--ink1)" : "var(--line2)" } })),
        el("td", { class: "number" }, law.error !== null && [percent(law.error, 1), el("span", { class: "unit" }, "%")]),
        el("td", { class: "law-why" }, why(law)))))),
      none && el("p", { class: "quiet" }, `${told(none)}.`), notes.map((note) => el("p", { class: "quiet" }, told(note))), this.leftOut(excluded));
  }

  leftOut(excluded = []) {
    if (!excluded.length) return null;
    return el("details", {}, el("summary", {}, `${excluded.length} trial${excluded.length === 1 ? " is" : "s are"} left out`), el("table", { class: "plain facts" }, el("tbody", {}, excluded.slice(0, 100).map(({ run, why }) => el("tr", {}, el("td", {}, middle(run, 30)), el("td", { class: "quiet" }, why))))));
  }

  coefficients(law) {
    const shown = dialog(nameOf(law.name), el("p", { class: "quiet" }, law.source), el("table", { class: "plain" },
      el("thead", {}, el("tr", {}, el("th", {}, "coefficient"), el("th", { class: "number" }, "value"), el("th", { class: "number" }, "95%, bootstrap"))),
      el("tbody", {}, law.coefficients.map(({ name, value, interval }) => el("tr", {}, el("td", { class: "mono" }, name), el("td", { class: "number" }, number(value, 4, 1e-3)), el("td", { class: "number quiet" }, interval ? `${number(interval[0], 3, 1e-3)} – ${number(interval[1], 3, 1e-3)}` : DASH))))),
      law.residual !== null && el("p", { class: "quiet" }, `Residual ${percent(law.residual, 2)}% of the loss.`),
      el("div", { class: "buttons" }, el("span"), el("button", { type: "button", on: { click: () => shown.close() } }, "Close", el("kbd", {}, "esc"))));
  }

  showNext() {
    const { next, prediction, no_prediction: none, budget } = this.law;
    if (!prediction) return void put(this.next, none && [el("h2", {}, "Next trial"), none.split("\n").map((line) => el("p", { class: "quiet" }, line.trim()))]);
    const range = ({ low, high }, write) => `${write(low)} – ${write(high)}`, config = next?.config;
    const rows = [
      ["model", prediction.kind === "runs" ? null : short(prediction.kind)], ["parameters", compact(prediction.n.value), prediction.n.low < prediction.n.high && range(prediction.n, (value) => compact(value))],
      [this.unit, compact(prediction.d.value), prediction.d.low < prediction.d.high && range(prediction.d, (value) => compact(value))], ["loss of one run", loss(prediction.run_loss.value), range(prediction.run_loss, loss)],
      ...Object.entries(config ?? {}).filter(([key]) => key !== "run.name").map(([key, value]) => [key, plain(typeof value === "number" ? Number(value.toPrecision(4)) : value), null, true]),
    ].filter(([, value]) => value !== null);
    const warnings = [...prediction.warnings, ...(next?.notes ?? []), ...(next?.why ? [next.why] : [])];
    put(this.next, el("h2", {}, "Next trial", el("small", {}, `by ${prediction.form}`)), el("p", { class: "headline" }, flops(budget, 2), el("span", { class: "unit" }, "FLOPs")),
      el("table", { class: "plain" }, el("tbody", {}, rows.map(([name, value, interval, key]) => el("tr", {}, el("td", { class: key ? "mono" : "" }, name), el("td", { class: "number quiet" }, interval || ""), el("td", { class: "number" }, value))))),
      prediction.rivals.length > 0 && el("p", { class: "quiet" }, `Cannot be told from it: ${prediction.rivals.map((rival) => `${short(rival.kind)} of ${compact(rival.n.value)}, loss ${loss(rival.loss.value)}`).join("; ")}.`),
      warnings.map((text) => el("p", { class: "quiet" }, `${told(text)}.`)), next && command(next.command, "the command that writes its config"));
  }
}

/** The unit of losses, after a comma; of what is no text none is known. */
export const nats = (unit) => (unit === "tokens" ? ", nats per token" : "");

/** Of values on a logarithmic axis, with some room. */
function ends(values) {
  const there = values.filter((value) => value > 0);
  const low = Math.min(...there), high = Math.max(...there), room = Math.max(0.05 * Math.log(high / low), 0.01);
  return there.length ? [low / Math.exp(room), high * Math.exp(room)] : [1, 10];
}
