/** Does anything need me? */

import { get, post, runs } from "../api.js";
import { bar, parts } from "../charts/parts.js";
import { runColour } from "../colours.js";
import { coded, dialog, el, empty, glyph, notice, put, svg, word } from "../dom.js";
import { DASH, ago, bytes, clock, compact, duration, loss, middle, percent, unitWords, whole } from "../format.js";
import { announce, calmly, fresh, listen } from "../live.js";
import { go, runAddress } from "../router.js";
import { needs, titled } from "../shell.js";

/** Problems that are shown before the rest is asked for. */
const MOST = 8;
const EVERY = 30_000; // disks and ages change without a run's changing
/** Devices of a machine that are shown as boxes of their own; more are a bar. */
const BOXES = 16;

export function open(outlet) {
  return new Now(outlet);
}

class Now {
  constructor(outlet) {
    this.active = -1;
    this.title = el("h1", {}, "Now");
    this.wrong = el("div");
    this.left = el("div");
    this.right = el("aside", { "aria-label": "Ended, time and disks" });
    outlet.append(el("div", { class: "now-page" }, el("div", { class: "two" }, el("div", {}, el("div", { class: "title-row" }, this.title, el("div", { class: "space" }), el("a", { href: "/plan" }, "Plan a run ›")), this.wrong, this.left), this.right)));
    const soon = calmly(() => this.refresh(), 400);
    this.unlisten = listen(soon);
    this.timer = setInterval(soon, EVERY);
    titled("Now", [["j k", "move"], ["↵", "open"], ["g r", "runs"], ["g p", "plan"], ["/", "find"]]);
    this.refresh();
  }

  close() {
    this.closed = true;
    this.unlisten();
    clearInterval(this.timer);
  }

  async refresh() {
    try {
      const [found] = await Promise.all([get("/api/now"), runs.refresh()]);
      if (this.closed) return;
      put(this.wrong);
      fresh();
      this.show(found);
    } catch (error) {
      if (!this.closed && !this.found) put(this.wrong, notice("failed", el("b", {}, "Nothing can be shown: "), error.message, "."));
    }
  }

  show(found) {
    this.found = found;
    const { problems, running, waiting, jobs, cluster, machines, ended, goodput, disks } = found;
    const failed = problems.filter(({ level }) => level === "failed").length, warned = problems.length - failed;
    needs(problems);
    const count = (number, one, more) => `${number} ${number === 1 ? one : more}`;
    const needed = failed ? `${count(failed, "run needs", "runs need")} you${warned ? `, ${count(warned, "warning", "warnings")}` : ""}. ` : warned ? `${count(warned, "warning", "warnings")}. ` : found.left ? "Nothing needs you so far. " : "Nothing needs you. ";
    const lines = [running.length ? `${running.length} running` : "Nothing runs", waiting.length > 0 && `${waiting.length} waiting`, busy(machines)];
    put(this.title, needed, el("span", { class: "rest" }, `${lines.filter(Boolean).join(", ")}. `));
    announce(needed);
    const focused = document.activeElement?.dataset?.problem;
    put(this.left,
      !runs.count && !found.left && !waiting.length && !jobs.length && empty("No run yet", "The first one shows here as soon as it makes a step.", "muster train quickstart"),
      problems.length > 0 && el("ul", { class: "problems" }, problems.slice(0, this.all ? problems.length : MOST).map((problem, index) => this.problem(problem, index)),
        !this.all && problems.length > MOST && el("li", {}, el("button", { type: "button", class: "bare", on: { click: () => ((this.all = true), this.show(this.found)) } }, `${problems.length - MOST} more`))),
      runs.count > 0 && el("section", { class: "running" }, el("h2", {}, "Running", el("small", {}, running.length || "")), running.length ? this.running(running) : el("p", { class: "quiet" }, "No run makes steps now. ", el("code", {}, "muster train PRESET"), " starts one.")),
      waiting.length > 0 && el("section", { class: "waiting" }, el("h2", {}, "Waiting", el("small", {}, `${waiting.length}, in the order they start`)), this.waiting(waiting)),
      jobs.length > 0 && el("section", { class: "jobs" }, el("h2", {}, "Jobs", el("small", {}, "running, or ended in the last day and can be retried")), this.jobs(jobs)));
    put(this.right,
      cluster && el("section", { class: "machines" }, el("h2", {}, "Machines", el("small", {}, cluster.reachable ? machines.length : "as last seen")), machines.length ? this.machines(machines, jobs) : el("p", { class: "quiet" }, cluster.reachable ? "None has joined." : "Ray does not answer.")),
      ended.length > 0 && el("section", {}, el("h2", {}, "Ended in the last day", el("small", {}, "held-out loss")), el("table", { class: "plain ended" }, ended.map((row) => el("tr", {},
        el("td", { class: "shape" }, glyph(word(row.status), true)), el("td", {}, el("a", { href: runAddress(row.id), title: row.name }, middle(row.name, 28))),
        el("td", { class: "number" }, row.status === "FAILED" && row.eval_loss === null ? el("span", { class: "failed" }, row.step ? `step ${whole(row.step)}` : "before step 1") : loss(row.eval_loss)), el("td", { class: "number quiet" }, clock(row.updated)))))),
      goodput.seconds > 0 && el("section", {}, el("h2", {}, "Time of these runs", el("small", {}, `${duration(goodput.seconds)}, goodput ${percent((goodput.parts.find(([name]) => name === "in steps")?.[1] ?? 0) / goodput.seconds)}%`)), bar(goodput.parts, null, "Time of these runs"), parts(goodput.parts, { seconds: false })),
      disks.length > 0 && el("section", {}, el("h2", {}, "Disks", el("small", {}, "free")), el("table", { class: "plain" }, disks.map(({ path, free, total }) => el("tr", {},
        el("td", { class: "mono", title: path }, middle(path, 30)), el("td", { class: free < 0.05 * total ? "number warning" : "number" }, bytes(free)), el("td", { class: "number quiet" }, `of ${bytes(total)}`))))));
    this.paint();
    if (focused) this.left.querySelector(`[data-problem="${CSS.escape(focused)}"]`)?.focus();
  }

  problem({ level, run, what, why, then, since }, index) {
    const known = run !== null && runs.places.has(run), name = known ? runs.row(run).name : run;
    return el("li", { class: `problem ${level}`, "data-index": index, "data-run": known ? run : undefined },
      glyph(level, true),
      el("div", { class: "who" }, name !== null && el("b", {}, known && el("span", { class: "swatch", style: { "--own": `var(${runColour(run)})` } }), known ? el("a", { href: runAddress(run), title: name }, middle(name, 23)) : name), el("div", { class: level }, what)),
      el("div", { class: "why" }, el("div", {}, why), el("div", { class: "quiet" }, coded(then))),
      el("div", { class: "since quiet number" }, since ? ago(since) : ""),
      el("div", { class: "do" }, known && el("button", { type: "button", "data-problem": `${run} ${what}`, "aria-label": `Log of ${name}`, on: { click: () => go(`${runAddress(run)}?tab=logs`) } }, "Log")));
  }

  running(rows) {
    const tokens = rows.every(({ unit }) => unit === "tokens");
    return el("div", { class: "live-rows", role: "table", "aria-label": "Running", style: { "--rate": tokens ? "60px" : "96px" } },
      el("div", { role: "row", class: "live-row heads" }, ["run", "step", tokens ? "loss, nats per token" : "loss", "loss", tokens ? "tokens/s" : "per second", "MFU", "goodput", "last checkpoint", "time left"].map((name, index) => el("span", { role: "columnheader", class: index > 2 ? "number" : "" }, index === 3 ? el("span", { class: "for-readers" }, name) : name))),
      rows.map((row) => {
        const share = row.steps ? Math.min(1, row.step / row.steps) : null, own = `var(${runColour(row.id)})`;
        const of = (value) => (value === null || value === undefined ? DASH : [percent(value), el("span", { class: "unit" }, "%")]);
        return el("div", { role: "row", class: "live-row", "data-run": row.id },
          el("div", { role: "cell", class: "who" }, el("span", { class: "swatch", style: { "--own": own } }), el("div", {}, el("a", { href: runAddress(row.id), title: row.name }, el("b", {}, middle(row.name, 26))), el("div", { class: "quiet small" }, [row.family, row.attempts > 1 && `attempt ${row.attempts}`, /stop/.test(row.reason ?? "") && "stopping"].filter(Boolean).join(", ")))),
          el("div", { role: "cell", class: "progress" }, whole(row.step), el("span", { class: "quiet" }, row.steps ? ` / ${whole(row.steps)}` : ""), share !== null && el("div", { class: "track" }, el("span", { style: { width: `${100 * share}%`, background: own } }))),
          el("div", { role: "cell", class: "spark" }, spark(row.spark, own)),
          el("div", { role: "cell", class: "number" }, el("b", {}, loss(row.loss))),
          el("div", { role: "cell", class: "number" }, compact(row.rate), !tokens && row.rate !== null && el("span", { class: "unit" }, unitWords(row.unit))),
          el("div", { role: "cell", class: "number" }, of(row.mfu)),
          el("div", { role: "cell", class: "number" }, of(row.goodput)),
          el("div", { role: "cell", class: "number quiet", title: row.checkpoint ? `step ${whole(row.checkpoint.step)}` : undefined }, row.checkpoint ? ago(row.checkpoint.time) : DASH),
          el("div", { role: "cell", class: "number" }, duration(row.left)));
      }));
  }

  waiting(rows) {
    return el("table", { class: "plain queue" },
      el("thead", {}, el("tr", {}, ["", "run", "needs", "priority", "why it waits", "starts about", ""].map((name, index) => el("th", { class: index === 2 || index === 3 || index === 5 ? "number" : "", scope: "col" }, name || el("span", { class: "for-readers" }, index ? "do" : "place"))))),
      el("tbody", {}, rows.map((job, index) => el("tr", { "data-job": job.id },
        el("td", { class: "quiet" }, index + 1),
        el("td", {}, this.job(job)),
        el("td", { class: "number" }, job.gang),
        el("td", { class: "number" }, job.priority),
        el("td", { class: "why" }, job.why),
        el("td", { class: "number" }, job.starts ? clock(job.starts) : "not known"),
        el("td", { class: "do" }, el("button", { type: "button", class: "bare", "aria-label": `Priority of ${job.id}`, on: { click: () => this.priority(job) } }, "Priority"), el("button", { type: "button", class: "bare", "aria-label": `Cancel ${job.id}`, on: { click: () => this.stop(job) } }, "Cancel"))))));
  }

  jobs(rows) {
    const active = (job) => job.state === "RUNNING" || job.state === "STOPPING";
    return el("table", { class: "plain queue" },
      el("thead", {}, el("tr", {}, ["run", "state", "", "since", ""].map((name, index) => el("th", { class: index === 3 ? "number" : "", scope: "col" }, name || el("span", { class: "for-readers" }, index === 4 ? "do" : "why"))))),
      el("tbody", {}, rows.map((job) => el("tr", { "data-job": job.id },
        el("td", {}, this.job(job)),
        el("td", {}, job.state.toLowerCase()),
        el("td", { class: "why" }, job.why || (active(job) && job.step !== null ? `${whole(job.step)} / ${whole(job.steps)}${job.left === null ? "" : `, ${duration(job.left)} left`}` : "")),
        el("td", { class: "number quiet" }, ago(job.since)),
        el("td", { class: "do" }, active(job)
          ? el("button", { type: "button", class: "bare", disabled: job.state === "STOPPING", "aria-label": `Stop ${job.id}`, on: { click: () => this.stop(job) } }, "Stop")
          : el("button", { type: "button", class: "bare", "aria-label": `Retry ${job.id}`, on: { click: () => this.retry(job) } }, "Retry"))))));
  }

  /** A job by its run's name, and by its id. */
  job({ id, run, run_id, state }) {
    const kind = { QUEUED: "waiting", RUNNING: "running", STOPPING: "running", LOST: "lost", FAILED: "failed", STOPPED: "stopped" }[state];
    const name = run_id !== null && runs.places.has(run_id) ? el("a", { href: runAddress(run_id), title: run }, middle(run, 26)) : el("span", { title: run }, middle(run, 26));
    return el("div", { class: "of-job" }, glyph(kind ?? "not started", true), el("div", {}, name, el("div", { class: "quiet small mono", title: id }, middle(id, 30))));
  }

  machines(rows, jobs) {
    const names = new Map(jobs.map((job) => [job.id, job.run]));
    const gpus = rows.some((machine) => machine.gpus > 0);
    return el("table", { class: "plain" }, rows.map((machine) => {
      const total = gpus ? machine.gpus : machine.cpus, free = gpus ? machine.gpus_free : machine.cpus_free, unit = gpus ? "GPUs" : "CPUs";
      const by = machine.uses.map((use) => names.get(use.by) ?? use.by);
      const said = `${whole(total - free)} of ${whole(total)} ${unit} busy`;
      return el("tr", {},
        el("td", { class: "mono", title: machine.address }, middle(machine.name || machine.address, 20)),
        el("td", {}, total <= BOXES
          ? el("div", { class: "boxes", role: "img", "aria-label": said }, Array.from({ length: Math.round(total) }, (_, index) => el("span", { class: index < Math.round(total - free) ? "full" : "" })))
          : el("div", { class: "track", role: "img", "aria-label": said }, el("span", { style: { width: `${(100 * (total - free)) / total}%` } }))),
        el("td", { class: "number quiet", title: by.join(", ") }, by.length ? middle(by.length > 1 ? `${by.length} users` : by[0], 22) : free < total ? said : "free"));
    }));
  }

  stop(job) {
    const runs = job.state !== "QUEUED";
    this.confirm(runs ? `Stop ${job.run} after a checkpoint?` : `Cancel ${job.run}?`,
      runs ? "It finishes the current step, writes a checkpoint and ends. A retry resumes from there." : "It has not started yet. A retry queues it again.",
      runs ? "Keep it running" : "Keep it waiting", runs ? "Stop after a checkpoint" : "Cancel the job", () => post(jobPath(job.id, "/stop"), { now: false }));
  }

  retry(job) {
    const id = `job-${job.id.slice(4).replace(/-[0-9a-f]{6}$/, "")}-${[...crypto.getRandomValues(new Uint8Array(3))].map((byte) => byte.toString(16).padStart(2, "0")).join("")}`;
    this.confirm(`Retry ${job.run}?`, "It is queued again as it was sent, and resumes from the run's last checkpoint.", "Leave it", "Retry", () => post(jobPath(job.id, "/retry"), { new: id }));
  }

  priority(job) {
    const input = el("input", { type: "number", step: 1, value: job.priority, "aria-label": "Priority", class: "priority" });
    this.confirm(`Priority of ${job.run}`, ["Higher starts first; among equals, the older. ", input], "Leave it", "Set priority", () => {
      if (!input.value.trim() || !Number.isInteger(Number(input.value))) throw new Error("A priority is a whole number.");
      return post(jobPath(job.id, "/priority"), { priority: Number(input.value) });
    });
  }

  /** Asks before it does something, and says why it could not be done. */
  confirm(title, text, leave, label, act) {
    const wrong = el("div");
    const asked = dialog(title, el("p", {}, text), wrong,
      el("div", { class: "buttons" },
        el("button", { type: "button", class: "bare", autofocus: true, on: { click: () => asked.close() } }, leave, el("kbd", {}, "esc")),
        el("button", { type: "button", class: "filled", on: { click: async () => {
          try {
            await act();
            asked.close();
            await this.refresh();
          } catch (error) {
            put(wrong, notice("failed", error.message));
          }
        } } }, label)));
  }

  places() {
    return [...this.left.querySelectorAll("[data-run]")].filter((node) => node.matches(".problem, .live-row"));
  }

  paint() {
    this.places().forEach((node, index) => node.classList.toggle("active", index === this.active));
  }

  key(key) {
    const places = this.places();
    if (key === "j" || key === "k") {
      this.active = Math.max(0, Math.min(places.length - 1, this.active + (key === "j" ? 1 : -1)));
      this.paint();
      places[this.active]?.scrollIntoView({ block: "nearest" });
    } else if (key === "Enter" && places[this.active]) go(runAddress(places[this.active].dataset.run));
    else return false;
    return true;
  }
}

const jobPath = (id, rest = "") => `/api/jobs/${encodeURIComponent(id)}${rest}`;

/** How many devices are busy, in words; false: nothing is known. */
function busy(machines) {
  const [kind, unit] = machines.some(({ gpus }) => gpus > 0) ? ["gpus", "GPUs"] : ["cpus", "CPUs"];
  const total = machines.reduce((sum, machine) => sum + machine[kind], 0), free = machines.reduce((sum, machine) => sum + machine[`${kind}_free`], 0);
  return total > 0 && `${whole(total - free)} of ${whole(total)} ${unit} busy`;
}

/** A small curve without axes. */
function spark(values, own) {
  const there = values.filter((value) => value !== null);
  if (there.length < 2) return "";
  const low = Math.min(...there), high = Math.max(...there), x = (index) => 2 + (92 * index) / (values.length - 1), y = (value) => (high > low ? 3 + (18 * (high - value)) / (high - low) : 12);
  let drawing = false;
  const path = values.map((value, index) => {
    if (value === null) return (drawing = false), "";
    const point = `${drawing ? "L" : "M"}${x(index).toFixed(1)} ${y(value).toFixed(1)}`;
    drawing = true;
    return point;
  }).join("");
  const last = values.findLastIndex((value) => value !== null);
  return svg("svg", { viewBox: "0 0 100 24", role: "img", "aria-label": `from ${loss(there[0])} to ${loss(there.at(-1))}` }, svg("path", { d: path, fill: "none", stroke: own, "stroke-width": 1.5 }), svg("circle", { cx: x(last), cy: y(values[last]), r: 2.2, fill: own }));
}
