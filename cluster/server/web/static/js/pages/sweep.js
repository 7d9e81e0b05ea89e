/** Best model for the budget; was the prediction right? */

import { get, readOnly, runs } from "../api.js";
import { choice, el, empty, glyph, notice, put } from "../dom.js";
import { DASH, ago, clock, compact, duration, loss, middle, number, percent, plain, whole } from "../format.js";
import { announce, calmly, fresh, listen } from "../live.js";
import { change, go, linked, runAddress, state } from "../router.js";
import { titled } from "../shell.js";
import { Table } from "../table.js";
import { Axes } from "./sweep_axes.js";
import { Law, flops, nats, short, told } from "./sweep_law.js";

const KINDS = { finished: "finished", running: "running", waiting: "waiting", stopped: "stopped", failed: "failed", diverged: "failed" };
const KEYS = [["t", "trials"], ["p", "predict at"], ["j k", "down, up"], ["↵", "open trial"], ["esc", "back"]];
const ROW = 28, SHOWN = 16;
/** Milliseconds between two questions for a law that is being worked out. */
const AGAIN = 1500;

export const sweepAddress = (id) => `/sweep/${encodeURIComponent(id)}`;

export function open(outlet, id) {
  return id ? new Sweep(outlet, id) : new Sweeps(outlet);
}

class Sweeps {
  constructor(outlet) {
    this.title = el("h1", {}, "Sweeps");
    this.body = el("div", { class: "wide" });
    outlet.append(el("div", { class: "sweep" }, el("div", { class: "title-row" }, this.title), this.body));
    this.unlisten = listen(calmly(() => this.refresh(), 1000));
    titled("Sweeps", []);
    this.refresh();
  }

  close() {
    this.closed = true;
    this.unlisten();
  }

  async refresh() {
    let found;
    try {
      [{ sweeps: found }] = await Promise.all([get("/api/sweeps"), runs.refresh()]);
    } catch (error) {
      if (!this.closed) put(this.body, notice("warning", error.message));
      return;
    }
    if (this.closed) return;
    fresh();
    const running = found.filter((sweep) => sweep.running).length;
    put(this.title, found.length === 1 ? "1 sweep. " : `${found.length} sweeps. `, el("span", { class: "rest" }, found.length ? (running ? `${running} ${running === 1 ? "is" : "are"} training.` : "None is training.") : ""));
    put(this.body, found.length ? el("table", { class: "plain sweeps" },
      el("thead", {}, el("tr", {}, ["sweep", "finished", "running", "failed", "best held-out loss", "last step"].map((name, index) => el("th", { class: index ? "number" : "" }, name)))),
      el("tbody", {}, found.map((sweep) => el("tr", {},
        el("td", {}, el("a", { href: sweepAddress(sweep.id) }, el("b", {}, sweep.id))),
        el("td", { class: "number" }, whole(sweep.finished), el("span", { class: "unit" }, ` of ${whole(sweep.begun)} begun`)),
        el("td", { class: "number" }, sweep.running || ""), el("td", { class: `number${sweep.failed ? " failed" : ""}` }, sweep.failed || ""),
        el("td", { class: "number" }, loss(sweep.best)), el("td", { class: "number quiet" }, sweep.updated ? `${ago(sweep.updated)} ago` : DASH)))))
      : runs.left ? empty("No sweep so far", "One shows here as soon as a trial of it is read.")
      : empty("No sweep yet", "One shows here with its first trial.", "muster sweep run sweep.yaml"));
  }
}

class Sweep {
  constructor(outlet, id) {
    Object.assign(this, { id, found: null, law: null });
    this.title = el("h1", {}, id);
    this.others = el("label", { class: "quiet other-sweeps", hidden: true });
    this.progress = el("div", { class: "toolbar sweep-bar" });
    this.wrong = el("div");
    this.lawNode = el("div");
    this.trialsHead = el("h2", { id: "trials", tabindex: "-1" }, "Trials");
    this.table = new Table({ label: "Trials", opened: (row) => this.enter(row), chosen: () => {}, sorted: (key) => change({ sort: key }), height: ROW });
    this.tableBox = el("div", { class: "trials-table" }, this.table.node);
    this.axesNode = el("div");
    outlet.append(el("div", { class: "sweep" }, el("div", { class: "title-row" }, this.title, el("div", { class: "space" }), this.others), this.progress, this.wrong, this.lawNode, this.axesNode, (this.trials = el("section", { hidden: true }, this.trialsHead, this.tableBox))));
    this.soon = calmly(() => this.refresh(), 1000);
    this.unlisten = listen((ids) => (!ids.size || [...ids].some((run) => run.startsWith(`${id}:`))) && this.soon());
    this.timer = setInterval(() => this.found?.status === "RUNNING" && this.soon(), 10_000); // the sweep's own record is no run's
    titled(id, KEYS);
    this.refresh();
  }

  close() {
    this.closed = true;
    this.unlisten();
    clearInterval(this.timer);
    clearTimeout(this.waiting);
    this.table.close();
    this.drawn?.close();
    this.axes?.close();
  }

  update() {
    this.show();
    this.askLaw();
  }

  get budget() {
    const asked = Number(state().get("at"));
    return asked > 0 && asked <= 1e30 ? asked : null;
  }

  get most() {
    const asked = Number(state().get("max"));
    return asked > 0 && asked <= 1e30 ? asked : null;
  }

  async refresh() {
    try {
      const [found, all] = await Promise.all([get(`/api/sweeps/${encodeURIComponent(this.id)}`), get("/api/sweeps"), runs.refresh()]);
      if (this.closed) return;
      Object.assign(this, { found, all: all.sweeps });
    } catch (error) {
      if (this.closed || (this.found && error.status !== 404)) return;
      put(this.wrong, error.status === 404 ? empty(this.found ? "This sweep is gone" : "There is no such sweep", error.message, "muster sweep run sweep.yaml", el("p", {}, el("a", { href: "/sweep" }, "All sweeps")))
        : notice("failed", el("b", {}, "It cannot be shown: "), error.message));
      return;
    }
    fresh();
    this.show();
    this.askLaw();
    announce(`${this.found.name}: ${this.found.counts.finished} of ${this.found.trials.length} trials finished`);
  }

  async askLaw() {
    clearTimeout(this.waiting);
    if (!this.found || this.closed) return;
    const { budget, most } = this, turn = (this.turn = (this.turn ?? 0) + 1);
    let answer;
    try {
      answer = await get(`/api/sweeps/${encodeURIComponent(this.id)}/law`, { budget, max_budget: most });
    } catch (error) {
      answer = { working: false, computed: null, law: { error: error.message } };
    }
    if (turn !== this.turn || this.closed) return;
    if (answer.working) this.waiting = setTimeout(() => this.askLaw(), AGAIN);
    const before = JSON.stringify([this.law?.computed, this.law?.working, this.asked]);
    if (answer.law || !this.law) this.law = answer;
    else this.law = { ...this.law, working: answer.working };
    this.asked = [budget, most];
    if (before !== JSON.stringify([this.law.computed, this.law.working, this.asked])) this.show();
  }

  /** Its trials differ in size, so that there is a law to look for. */
  get bySize() {
    return ["isoflop", "ladder", null].includes(this.found.design);
  }

  /** What is asked was worked out, or is all that there is. */
  get known() {
    return this.law?.law && !this.law.law.error ? this.law.law : null;
  }

  show() {
    const { found } = this;
    if (!found) return;
    this.variants = [...new Set(found.trials.map(({ variant }) => variant))];
    this.colours = new Map(this.variants.map((variant, index) => [variant, `var(--run${(index % 6) + 1})`]));
    this.byName = new Map(found.trials.map((trial) => [trial.name, trial]));
    this.say();
    this.sayProgress();
    const { law } = this, error = law?.law?.error;
    put(this.wrong,
      found.problem && notice("warning", el("b", {}, "Its definition cannot be read. "), found.problem),
      error && this.bySize && notice("warning", el("b", {}, "Its law cannot be told. "), error));
    if (found.axes.length || found.design === "grid") {
      this.axes ??= new Axes(this.axesNode);
      this.axes.show(found, this.colours);
    }
    if (this.known && (this.bySize || this.known.chosen)) {
      this.drawn ??= new Law(this.lawNode);
      this.drawn.show(this.known, { byName: this.byName, colours: this.colours, unit: found.unit });
    }
    this.showTrials();
  }

  say() {
    const { found, known } = this, done = found.counts.finished, of = found.trials.length + found.open;
    const line = (main, rest) => put(this.title, `${main} `, el("span", { class: "rest" }, rest));
    const finished = found.trials.filter((trial) => trial.state === "finished" && trial.eval_loss !== null);
    if (known?.prediction && this.bySize) {
      const { prediction, budget } = known, { value, low, high } = prediction.n, came = known.score.predicted?.scores.find((each) => each.loss !== null && each.status === "FINISHED" && Math.abs(Math.log(each.budget / budget)) < 0.03);
      const kind = prediction.kind === "runs" ? "" : `${short(prediction.kind)}, `;
      line(`Best for ${flops(budget)} FLOPs: ${kind}${value === null ? `${compact(low)} to ${compact(high)}` : compact(value)} parameters.`, `Predicted ${loss(prediction.run_loss.value)} (${loss(prediction.run_loss.low)} to ${loss(prediction.run_loss.high)})${came ? `; it came to ${loss(came.loss)}` : ""}.`);
    } else if (found.axes.length && finished.length) {
      const best = finished.reduce((a, b) => (a.eval_loss <= b.eval_loss ? a : b));
      const where = found.axes.map((key) => `${key.split(".").at(-1)} ${plain(best.values[key])}`).join(", ");
      line(`Best: ${where}.`, `Held-out loss ${loss(best.eval_loss)}, of ${done} finished trial${done === 1 ? "" : "s"}.`);
    } else {
      const why = known?.missing && this.bySize ? `${told(known.missing)}.` : this.law && !this.law.law && this.bySize ? "Its law is being worked out." : known?.no_prediction ? `${told(known.no_prediction)}.` : "";
      line(`${whole(done)} of ${whole(of)} trials finished.`, why);
    }
    this.others.hidden = (this.all?.length ?? 0) < 2;
    put(this.others, el("span", { class: "for-readers" }, "Another sweep "), el("select", { "aria-label": "Another sweep", on: { change: (event) => go(sweepAddress(event.target.value)) } }, (this.all ?? []).map(({ id }) => el("option", { value: id, selected: id === this.id }, middle(id, 40)))));
  }

  sayProgress() {
    const { found, known, law } = this, { counts } = found, of = found.trials.length;
    const parts = [
      counts.running && `${counts.running} running`, counts.waiting && `${counts.waiting} waiting`, counts.stopped && `${counts.stopped} stopped`,
      found.open && `${found.open} to be chosen`, found.status === "RUNNING" && found.eta !== null && `${duration(found.eta)} left`,
    ].filter(Boolean).join(", ");
    const failed = counts.failed + counts.diverged, time = known?.time;
    const spent = time?.total ? `${percent(time.seconds.step / time.total)}% of ${compact(time.total)} ${time.device}-seconds in steps` : "";
    const kind = found.status === "RUNNING" ? "running" : counts.finished === of && !found.open ? "finished" : failed ? "failed" : "stopped";
    const levels = known?.budgets ?? [];
    const focused = document.activeElement?.id === "predict-at";
    if (focused && this.field?.value !== this.field?.defaultValue) return; // somebody writes there
    put(this.progress,
      el("span", { class: "sweep-count" }, glyph(kind, true), ` ${whole(counts.finished)} of ${whole(of)} trials`), this.cells(),
      el("span", { class: "quiet" }, [parts, spent].filter(Boolean).join("; ")), failed > 0 && el("span", { class: "failed" }, `${failed} failed`),
      el("div", { class: "space" }),
      law && this.bySize && el("span", { class: "quiet" }, law.working ? (law.law ? `law of ${clock(law.computed)}; a newer one is being worked out` : "the law is being worked out") : law.computed ? `law of ${clock(law.computed)}` : ""),
      !readOnly && this.bySize && levels.length > 3 && el("span", { class: "quiet fit-on" }, "Fit on budgets to ", choice("Fit on budgets to", levels.slice(2).slice(-4).map((level) => [level, flops(level)]), this.chosenLevel(levels), (level) => change({ max: level === levels.at(-1) ? null : Number(level.toPrecision(4)), at: null }, { push: true }))),
      !readOnly && this.bySize && known?.budget && el("label", { class: "quiet predict-at" }, "Predict at ", (this.field = el("input", { type: "text", id: "predict-at", class: "number", inputmode: "decimal", value: flops(this.budget ?? known.budget), "aria-label": "Predict at, training FLOPs", on: { change: (event) => this.ask(event.target) } })), el("span", { class: "unit" }, "FLOPs")));
    if (this.field) this.field.defaultValue = this.field.value;
    if (focused) this.field?.focus();
  }

  chosenLevel(levels) {
    return this.most ? levels.findLast((level) => level <= this.most * 1.01) ?? levels.at(-1) : levels.at(-1);
  }

  ask(field) {
    const value = Number(field.value.replace(/[, ]/g, ""));
    const right = value > 0 && value <= 1e30;
    field.toggleAttribute("aria-invalid", !right);
    field.title = right ? "" : "A number of FLOPs, such as 1.6e20";
    field.defaultValue = field.value;
    if (right) change({ at: value.toExponential().replace("e+", "e") }, { push: true });
  }

  /** A square for each trial. */
  cells() {
    const trials = this.found.trials.slice(0, 240);
    const groups = this.variants.slice(0, 4).map((variant) => trials.filter((trial) => trial.variant === variant));
    return el("div", { class: "cells", role: "img", "aria-label": `${this.found.counts.finished} of ${this.found.trials.length} finished` }, groups.map((own) => el("div", {}, own.map((trial) => el("span", { class: `square ${trial.state}`, title: `${trial.name}: ${trial.state}`, style: { "--own": this.colours.get(trial.variant) } })))));
  }

  showTrials() {
    this.trials.hidden = false;
    const { found } = this, several = this.variants.length > 1, count = (trial) => trial.parameters[found.count] ?? null;
    const values = {
      name: (trial) => trial.name, n: count, tokens: (trial) => trial.tokens, step: (trial) => trial.step / trial.steps, loss: (trial) => trial.loss, eval_loss: (trial) => trial.eval_loss, budget: (trial) => trial.budget ?? trial.flops, state: (trial) => Object.keys(KINDS).indexOf(trial.state),
      ...Object.fromEntries(found.axes.map((key) => [key, (trial) => trial.values[key]])),
    };
    const columns = [
      { key: "name", label: "trial", width: "minmax(200px, 2fr)", class: "name", sortable: true, cell: (trial) => [el("span", { class: "state" }, glyph(KINDS[trial.state] ?? "not started", true)), several && el("span", { class: "swatch", style: { "--own": this.colours.get(trial.variant), "margin-right": "7px" } }), linked(trial.run, { title: trial.name, "data-focus": "name" }, middle(trial.name, 34))] },
      ...found.axes.map((key) => ({ key, label: key.split(".").at(-1), title: key, width: "minmax(64px, 1fr)", class: "number", sortable: true, cell: (trial) => cell(trial.values[key]) })),
      { key: "budget", label: "FLOPs", width: "72px", class: "number", sortable: true, cell: (trial) => flops(trial.budget ?? trial.flops) },
      { key: "n", label: `N, ${found.count.replaceAll("_", " ")}`, width: "minmax(80px, 0.7fr)", class: "number", sortable: true, cell: (trial) => compact(count(trial)) },
      { key: "tokens", label: found.unit, width: "72px", class: "number", sortable: true, cell: (trial) => compact(trial.tokens) },
      { key: "step", label: "step", width: "minmax(110px, 0.8fr)", class: "number", sortable: true, cell: (trial) => (trial.step ? [whole(trial.step), el("span", { class: "unit" }, ` of ${whole(trial.steps)}`)] : el("span", { class: "missing" }, `of ${whole(trial.steps)}`)) },
      { key: "loss", label: "train loss", width: "76px", class: "number quiet", sortable: true, cell: (trial) => loss(trial.loss) },
      { key: "eval_loss", label: "held-out loss", width: "minmax(96px, 2fr)", class: "result", sortable: true, cell: (trial) => this.result(trial) },
    ];
    const few = innerWidth < 640 ? columns.filter((column) => ["name", "step", "eval_loss"].includes(column.key)) : columns;
    if (few !== columns) Object.assign(few[0], { width: "minmax(150px, 1fr)" }), Object.assign(few[1], { width: "104px" }), Object.assign(few[2], { width: "88px" });
    const asked = state().get("sort") ?? "", descending = asked.startsWith("-"), key = asked.replace(/^-/, "");
    let rows = found.trials;
    if (values[key]) {
      const of = values[key], sign = descending ? -1 : 1;
      rows = rows.toSorted((a, b) => compared(of(a), of(b), sign));
    }
    const settings = JSON.stringify([asked, found.axes, found.count, found.unit, several, few === columns]);
    if (this.settings !== settings) this.table.setColumns(few, asked);
    else this.table.columns = few;
    this.settings = settings;
    this.tableBox.style.height = `${Math.min(rows.length, SHOWN) * ROW + 44}px`;
    this.table.setRows(rows, (trial) => trial.name);
    put(this.trialsHead, "Trials", el("small", {}, `${whole(rows.length)}, on held-out data${nats(found.unit)}`));
  }

  enter(trial) {
    const address = trial?.run && runAddress(trial.run);
    if (address) go(address);
  }

  result(trial) {
    if (trial.state === "failed" || trial.state === "diverged") return el("span", { class: "failed", title: trial.reason }, `${trial.state}: ${trial.reason || "no reason is recorded"}`);
    if (trial.state === "stopped") return el("span", { class: "quiet", title: trial.reason }, "stopped; the next `muster sweep run` goes on");
    return trial.eval_loss === null ? el("span", { class: "missing" }, trial.state === "running" ? "running" : DASH) : el("b", {}, loss(trial.eval_loss));
  }

  key(key) {
    if (key === "t") {
      this.trialsHead.scrollIntoView({ block: "start" });
      this.table.node.focus({ preventScroll: true });
    } else if (key === "p" && this.field) {
      this.field.focus();
      this.field.select();
    } else if (key === "j" || key === "k") this.table.move(key === "j" ? 1 : -1);
    else if (key === "Enter") this.enter(this.table.rows[this.table.active]);
    else if (key === "Escape" && !readOnly) go("/sweep");
    else return false;
    return true;
  }
}

const cell = (value) => (value === null || value === undefined ? el("span", { class: "missing" }, DASH) : typeof value === "number" ? number(value) : middle(plain(value), 20));

/** What is missing is last, whichever way. */
function compared(a, b, sign) {
  const none = (value) => value === null || value === undefined;
  if (none(a) || none(b)) return none(a) - none(b);
  return sign * (typeof a === "number" && typeof b === "number" ? a - b : String(a).localeCompare(String(b), "en", { numeric: true }));
}
