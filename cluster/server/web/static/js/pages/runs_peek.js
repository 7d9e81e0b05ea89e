/** The panel beside the table: one run at a glance, its note and tags. */

import { get, post, runPath, runs } from "../api.js";
import { Chart } from "../charts/chart.js";
import { curve } from "../charts/curves.js";
import { runColour } from "../colours.js";
import { dialog, el, glyph, notice, put, word } from "../dom.js";
import { clock, compact, duration, loss, plain, unitWords, whole } from "../format.js";
import { runAddress } from "../router.js";

const SHOWN = ["optim.lr", "train.global_batch", "train.steps", "model.num_layers", "model.hidden_size", "model.num_experts", "run.seed"];

export class Peek {
  constructor(changed) {
    this.changed = changed;
    this.node = el("aside", { class: "peek", "aria-label": "The run at a glance", hidden: true });
  }

  get shown() {
    return !this.node.hidden;
  }

  hide() {
    this.node.hidden = true;
    this.id = null;
    this.drop();
  }

  close() {
    this.drop();
  }

  drop() {
    this.chart?.destroy();
    this.chart = null;
  }

  repaint() {
    this.chart?.redraw();
  }

  async show(id) {
    const row = runs.row(id), same = this.id === id && this.updated === row.updated && this.hue === runColour(id);
    this.node.hidden = false;
    if (same && this.noted === row.note + row.tags) return;
    Object.assign(this, { id, hue: runColour(id), updated: row.updated, noted: row.note + row.tags });
    const kind = word(row.status);
    const place = el("div", { class: "peek-chart" });
    const config = el("div");
    put(this.node,
      el("div", { class: "peek-head" }, el("span", { class: "swatch", style: { "--own": `var(${runColour(id)})` } }), el("h2", {}, row.name), el("a", { class: "open", href: runAddress(id), "aria-label": `Open ${row.name}` }, el("kbd", {}, "↵"))),
      el("p", { class: `state-line ${kind === "failed" ? "failed" : ""}` }, glyph(kind), ` ${kind} at step ${whole(row.step)}, ${clock(row.updated)}`),
      row.reason && el("p", { class: kind === "failed" ? "failed" : "quiet" }, row.reason),
      place,
      el("h2", {}, "Results"),
      el("table", { class: "plain" }, [
        ["held-out loss", loss(row.eval_loss)], ["train loss", loss(row.loss)], [unitWords(row.unit), compact(row.weight)], [`${unitWords(row.unit)}/s`, compact(row.rate)], ["took", duration(row.wall_time)],
      ].map(([name, value]) => el("tr", {}, el("td", {}, name), el("td", { class: "number" }, value)))),
      config,
      el("h2", {}, "Note", el("small", {}, el("kbd", {}, "n"))),
      el("p", { class: row.note ? "note" : "quiet" }, row.note || "None yet."),
      row.tags?.length > 0 && el("p", { class: "tags" }, row.tags.map((tag) => el("span", { class: "tag" }, tag))));
    this.drop();
    try {
      const [series, { columns }] = await Promise.all([
        get(runPath(id, "/series"), { metric: ["loss", "eval_loss"], points: 240 }),
        get("/api/columns", { key: SHOWN, run: id }),
      ]);
      if (this.id !== id || !this.node.isConnected) return;
      const { loss: train, eval_loss: held } = series.metrics;
      if (train?.n) {
        this.chart = new Chart(place, { name: "loss", height: 150, small: true, zero: false });
        this.chart.set({ series: [...curve(train, { colour: runColour(id), share: 0.03, label: "train" }), ...(held?.n ? [{ ...held, kind: "ring", colour: runColour(id), label: "held-out" }] : [])] });
      }
      const keys = SHOWN.filter((key) => columns[key][0] !== null && columns[key][0] !== undefined);
      if (keys.length) put(config, el("h2", {}, "Config"), el("table", { class: "plain" }, keys.map((key) => el("tr", {}, el("td", { class: "mono" }, key), el("td", { class: "mono number" }, plain(columns[key][0]))))));
    } catch (error) {
      if (this.id === id) put(place, el("p", { class: "quiet" }, `Its curve cannot be read: ${error.message}.`));
    }
  }

  edit(id, what) {
    edit(runs.row(id), what, this.changed);
  }
}

/** Asks for a run's note or tags and writes them. */
export function edit(row, what, done) {
  const text = what === "note" ? row.note : (row.tags ?? []).join("\n");
  const field = el("textarea", { rows: what === "note" ? 6 : 4, "aria-label": what === "note" ? "Note" : "Tags, one a line", value: text });
  const wrong = el("div");
  const save = async () => {
    try {
      if (what === "note") await post(runPath(row.id, "/note"), { note: field.value.trim() });
      else await post(runPath(row.id, "/tags"), { tags: field.value.split("\n").map((tag) => tag.trim()).filter(Boolean) });
      shown.close();
      await done?.();
    } catch (error) {
      put(wrong, notice("failed", error.message));
    }
  };
  field.addEventListener("keydown", (event) => event.key === "Enter" && (event.ctrlKey || event.metaKey) && save());
  const shown = dialog(
    [el("span", { class: "swatch", style: { "--own": `var(${runColour(row.id)})` } }), what === "note" ? `Note on ${row.name}` : `Tags of ${row.name}`],
    el("p", { class: "quiet" }, what === "note" ? "It is kept in the run's folder." : "One a line: key=value, or a key alone."),
    field, wrong,
    el("div", { class: "buttons" }, el("button", { type: "button", class: "bare", on: { click: () => shown.close() } }, "Leave it", el("kbd", {}, "esc")), el("button", { type: "button", class: "filled", on: { click: save } }, "Save")));
  field.focus();
}
