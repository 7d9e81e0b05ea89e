/** Is it well, how far, when does it end? */

import { get, post, readOnly, runPath, runs } from "../api.js";
import { runColour } from "../colours.js";
import { dialog, el, empty, glyph, notice, put, word } from "../dom.js";
import { DASH, ago, clock, compact, duration, loss, number, percent, unitWords, whole } from "../format.js";
import { announce, calmly, fresh, listen } from "../live.js";
import { change, go, here, runAddress, state } from "../router.js";
import { titled } from "../shell.js";
import { Charts } from "./run_charts.js";
import { aside, Experts } from "./run_aside.js";
import { samples } from "./run_samples.js";
import { Stacks } from "./run_stacks.js";
import { Config, files, Logs } from "./run_text.js";
import { edit } from "./runs_peek.js";

const TABS = ["charts", "experts", "samples", "config", "logs", "files"];
/** What keys do in single sections. */
const KEYS = { charts: [["x", "axis"], ["l", "log"], ["m", "find a metric"], ["drag", "zoom"], ["e", "export"]], logs: [["/", "find in the log"]] };

/** With a full stop at its end. */
const sentence = (text) => (/[.!?]$/.test(text) ? text : `${text}.`);

export function open(outlet, id) {
  return new Run(outlet, id);
}

class Run {
  constructor(outlet, id) {
    this.id = id;
    this.head = el("div", { class: "run-head" });
    this.tabs = el("div", { class: "sections", role: "tablist", "aria-label": "Sections" });
    this.controls = el("div", { class: "controls" });
    this.body = el("div", { class: "section-body", role: "tabpanel", id: "section" });
    outlet.append(el("div", { class: "run" }, this.head, (this.bar = el("div", { class: "section-bar", hidden: true }, this.tabs, el("div", { class: "space" }), this.controls)), this.body));
    const soon = calmly(() => this.refresh(), 400);
    this.unlisten = listen((ids) => (!ids.size || ids.has(id)) && soon());
    this.timer = setInterval(() => this.details && this.sayNumbers(), 1000);
    titled(id, [["esc", "back"]]); // the others once it is known which sections there are
    this.refresh();
  }

  close() {
    this.closed = true;
    this.unlisten();
    clearInterval(this.timer);
    this.part?.close?.();
  }

  repaint() {
    this.part?.repaint?.();
  }

  async refresh() {
    try {
      const [found] = await Promise.all([get(runPath(this.id)), runs.refresh()]);
      if (this.closed) return;
      this.details = found;
      fresh();
      this.show();
      announce(`${found.row.name}: ${word(found.row.status)}, step ${found.row.step}`);
      if (!found.goodput.later) return;
      const goodput = await get(runPath(this.id, "/goodput"));
      if (this.closed || this.details !== found) return;
      found.goodput = goodput;
      this.show();
    } catch (error) {
      if (error.status === undefined) throw error;
      if (this.closed || (this.details && error.status !== 404)) return;
      put(this.head, error.status === 404
        ? empty(this.details ? "This run is gone" : "There is no such run", error.message, "muster runs", el("p", {}, el("a", { href: "/runs" }, "All runs")))
        : notice("failed", el("b", {}, "It cannot be shown: "), error.message, "."));
    }
  }

  update() {
    this.show();
  }

  get tab() {
    const asked = state().get("tab") ?? "charts";
    return TABS.includes(asked) ? asked : "charts";
  }

  show() {
    const { details } = this;
    if (!details) return;
    this.bar.hidden = false;
    this.showHead(details);
    const { tab } = this, shown = TABS.filter((name) => name !== "experts" || details.experts);
    const counts = { samples: details.samples.length, files: details.files.length };
    put(this.tabs, shown.map((name) => el("a", {
      role: "tab", href: here(`tab=${name}`), "aria-selected": String(name === tab), "aria-controls": "section",
      on: { click: (event) => (event.preventDefault(), change({ tab: name === "charts" ? null : name }, { push: true })) },
    }, name[0].toUpperCase() + name.slice(1), counts[name] ? el("small", {}, counts[name]) : null)));
    if (this.shownTab !== tab) {
      this.part?.close?.();
      put(this.body);
      put(this.controls);
      this.shownTab = tab;
      titled(this.id, [["[ ]", "previous, next run"], [`1 – ${shown.length}`, "sections"], ...(KEYS[tab] ?? []), ["esc", "back"]]);
      this.part = this.openPart(tab);
    }
    this.part?.show(details);
  }

  openPart(tab) {
    const { id, body, controls } = this;
    if (tab === "charts") {
      const left = el("div"), right = el("aside", { "aria-label": "Time, plan and experts" });
      body.append(el("div", { class: "two run-two" }, left, right));
      const charts = new Charts(id, left, controls), side = aside(id, right);
      return {
        show: (details) => (charts.show(details), side.show(details)),
        close: () => (charts.close(), side.close()),
        repaint: () => (charts.repaint(), side.repaint()),
        key: (key) => charts.key(key),
      };
    }
    if (tab === "experts") return new Experts(id, body, true);
    if (tab === "samples") return { show: (details) => samples(id, details, body) };
    if (tab === "config") return new Config(id, body);
    if (tab === "logs") {
      const above = el("section"), below = el("section");
      body.append(above, below);
      const stacks = new Stacks(id, above), logs = new Logs(id, below);
      return { show: (details) => (stacks.show(details), logs.show(details)), key: (key) => logs.key(key) };
    }
    return { show: (details) => files(details, body) };
  }

  showHead({ row, header, problems, notable = [], attempts }) {
    const kind = word(row.status), running = row.status === "RUNNING";
    const stopping = running && /stop/.test(row.reason ?? "");
    const about = [
      header.family && `${header.family}`, header.parameters && `${compact(header.parameters)} parameters`,
      header.active && header.active !== header.parameters && `${compact(header.active)} active`,
      header.world_size && `on ${header.world_size} ${header.world_size === 1 ? "process" : "processes"}${header.device ? ` of ${header.device}` : ""}`,
    ].filter(Boolean).join(", ");
    const warned = running ? notable.filter((each) => ["experts_collapsed", "straggler"].includes(each.kind) && each.attempt === row.attempts) : [];
    put(this.head,
      el("div", { class: "title-row" },
        !readOnly && el("a", { class: "back", href: "/runs" }, "‹ Runs"),
        el("span", { class: "swatch big", style: { "--own": `var(${runColour(row.id)})` } }),
        el("h1", {}, row.sweep ? `${row.sweep}/${row.name}` : row.name),
        el("span", { class: `now ${kind === "failed" ? "failed" : kind === "lost" ? "warning" : ""}` }, glyph(kind), ` ${stopping ? "stopping after a checkpoint" : kind}${row.attempts > 1 ? `, attempt ${row.attempts}` : ""}`),
        warned.slice(-1).map((each) => el("span", { class: "now warning", title: each.text }, glyph("warning"), ` ${each.kind === "straggler" ? "slow rank" : "dead expert"}`)),
        (row.tags ?? []).map((tag) => el("span", { class: "tag" }, tag)),
        el("div", { class: "space" }),
        !readOnly && el("div", { class: "buttons" },
          el("button", { type: "button", on: { click: () => this.edit("note") } }, "Note", el("kbd", {}, "n")),
          el("button", { type: "button", on: { click: () => this.edit("tags") } }, "Tags", el("kbd", {}, "t")),
          el("button", { type: "button", on: { click: () => this.compare() } }, "Compare", el("kbd", {}, "c")),
          running && el("button", { type: "button", disabled: stopping, on: { click: () => this.stop() } }, "Stop after a checkpoint", el("kbd", {}, "s")))),
      el("p", { class: "about" }, about && `${about}. `, el("span", { class: "quiet" }, header.commit && `${header.commit.slice(0, 7)}${header.dirty ? ", changed" : ""}, `, row.started && `${header.commit ? "started" : "Started"} ${clock(row.started)}.`)),
      row.note && el("p", { class: "note quiet" }, row.note),
      kind === "failed" && notice("failed", el("b", {}, `${row.step ? `Failed at step ${whole(row.step)}` : "Failed before step 1"}. `), sentence(row.reason ?? "No reason is recorded"), ` ${attempts.length > 1 ? `After ${attempts.length} attempts. ` : ""}`, el("a", { href: here("tab=logs") }, "Its logs"), " say more."),
      problems.map((problem) => notice("warning", el("b", {}, "Not all can be read. "), problem)),
      (this.numbers = el("dl", { class: "numbers" })));
    this.sayNumbers();
  }

  sayNumbers() {
    const { row, goodput, marks, attempts, scores = [] } = this.details, running = row.status === "RUNNING";
    const saved = marks.findLast((mark) => mark.kind === "checkpoint");
    const evaluated = marks.findLast((mark) => mark.kind === "evaluation");
    const rate = row.rate && row.weight && row.step ? row.rate / (row.weight / row.step) : null;
    const left = running && row.steps && rate ? Math.max(0, (row.steps - row.step) / rate) : null;
    const mean = row.weight && row.wall_time ? `${compact(row.weight / row.wall_time)} mean` : "";
    const age = saved ? ago(saved.time) : DASH;
    const all = [
      ["held-out loss", loss(row.eval_loss), evaluated && row.eval_loss !== null ? `step ${whole(evaluated.step)}` : ""],
      row.eval_loss === null ? ["train loss", loss(row.loss), ""] : null,
      ...scores.map(([name, value]) => [`held-out ${unitWords(name)}`, number(value), ""]),
      ["step", whole(row.step), row.steps ? `of ${whole(row.steps)}` : ""],
      [`${unitWords(row.unit)}/s`, compact(row.rate), mean],
      ["goodput", goodput.fraction === null ? DASH : `${percent(goodput.fraction)}%`, `${attempts.length} attempt${attempts.length === 1 ? "" : "s"}`],
      running ? ["last checkpoint", age, saved ? `step ${whole(saved.step)}` : ""] : ["checkpoint at step", saved ? whole(saved.step) : DASH, ""],
      running ? ["time left", duration(left), left === null ? "" : `ends ${clock(Date.now() / 1000 + left)}`] : ["took", duration(row.wall_time), row.updated ? `ended ${clock(row.updated)}` : ""],
    ].filter(Boolean);
    put(this.numbers, all.map(([name, value, more]) => el("div", {}, el("dt", {}, name), el("dd", {}, value, more && el("small", {}, more)))));
  }

  edit(what) {
    edit(this.details.row, what, () => this.refresh());
  }

  compare() {
    go(`/compare?${new URLSearchParams([["run", this.id]])}`);
  }

  stop() {
    const { row } = this.details;
    const wrong = el("div");
    const asked = dialog(
      ["Stop ", el("span", { class: "swatch", style: { "--own": `var(${runColour(row.id)})` } }), `${row.name} after a checkpoint?`],
      el("p", {}, `It finishes the step it is in, writes a checkpoint and ends. Nothing is lost. `),
      el("p", { class: "quiet" }, "The command that began it goes on from there."), wrong,
      el("div", { class: "buttons" },
        el("button", { type: "button", class: "bare", autofocus: true, on: { click: () => asked.close() } }, "Keep it running", el("kbd", {}, "esc")),
        el("button", { type: "button", class: "filled", on: { click: async () => {
          try {
            await post(runPath(this.id, "/stop"));
            asked.close();
            await this.refresh();
          } catch (error) {
            put(wrong, notice("failed", error.message));
          }
        } } }, "Stop after a checkpoint")));
  }

  beside(by) {
    const place = runs.places.get(this.id), other = runs.columns.id[place + by];
    if (other !== undefined) go(runAddress(other) + location.search);
  }

  key(key) {
    if (!this.details) return false;
    const shown = TABS.filter((name) => name !== "experts" || this.details.experts);
    if (this.part?.key?.(key)) return true;
    if (readOnly && "ntcs[]".includes(key)) return false;
    if (key === "n") this.edit("note");
    else if (key === "t") this.edit("tags");
    else if (key === "c") this.compare();
    else if (key === "s" && this.details.row.status === "RUNNING") this.stop();
    else if (key === "[") this.beside(-1);
    else if (key === "]") this.beside(1);
    else if (shown[Number(key) - 1]) change({ tab: key === "1" ? null : shown[Number(key) - 1] }, { push: true });
    else return false;
    return true;
  }
}
