/** Does anything need me? */

import { get, runs } from "../api.js";
import { bar, parts } from "../charts/parts.js";
import { runColour } from "../colours.js";
import { el, empty, glyph, notice, put, svg, word } from "../dom.js";
import { DASH, ago, bytes, clock, compact, duration, loss, middle, percent, whole } from "../format.js";
import { announce, calmly, fresh, listen } from "../live.js";
import { go, runAddress } from "../router.js";
import { needs, titled } from "../shell.js";

/** Problems that are shown before the rest is asked for. */
const MOST = 8;
const EVERY = 30_000; // disks and ages change without a run's changing

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
    outlet.append(el("div", { class: "now-page" }, el("div", { class: "two" }, el("div", {}, this.title, this.wrong, this.left), this.right)));
    const soon = calmly(() => this.refresh(), 400);
    this.unlisten = listen(soon);
    this.timer = setInterval(soon, EVERY);
    titled("Now", [["j k", "move"], ["↵", "open"], ["g r", "runs"], ["/", "find"]]);
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
    const { problems, running, waiting, ended, goodput, disks } = found;
    const failed = problems.filter(({ level }) => level === "failed").length, warned = problems.length - failed;
    needs(problems);
    const count = (number, one, more) => `${number} ${number === 1 ? one : more}`;
    const needed = failed ? `${count(failed, "run needs", "runs need")} you${warned ? `, ${count(warned, "warning", "warnings")}` : ""}. ` : warned ? `${count(warned, "warning", "warnings")}. ` : "Nothing needs you. ";
    put(this.title, needed, el("span", { class: "rest" }, running.length ? `${running.length} running${waiting.length ? `, ${waiting.length} waiting` : ""}. ` : "Nothing runs. ", found.left ? `${whole(found.left)} runs are still being read.` : ""));
    announce(needed);
    const focused = document.activeElement?.dataset?.problem;
    put(this.left,
      !runs.count && !found.left && empty("No run yet", "The first one shows here as soon as it makes a step.", "muster train quickstart"),
      problems.length > 0 && el("ul", { class: "problems" }, problems.slice(0, this.all ? problems.length : MOST).map((problem, index) => this.problem(problem, index)),
        !this.all && problems.length > MOST && el("li", {}, el("button", { type: "button", class: "bare", on: { click: () => ((this.all = true), this.show(this.found)) } }, `${problems.length - MOST} more`))),
      runs.count > 0 && el("section", { class: "running" }, el("h2", {}, "Running", el("small", {}, running.length || "")), running.length ? this.running(running) : el("p", { class: "quiet" }, "No run makes steps now. ", el("code", {}, "muster train PRESET"), " starts one.")));
    put(this.right,
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
      el("div", { class: "why" }, el("div", {}, why), el("div", { class: "quiet" }, then.split("`").map((part, at) => (at % 2 ? el("code", {}, part) : part)))),
      el("div", { class: "since quiet number" }, since ? ago(since) : ""),
      el("div", { class: "do" }, known && el("button", { type: "button", "data-problem": `${run} ${what}`, "aria-label": `Log of ${name}`, on: { click: () => go(`${runAddress(run)}?tab=logs`) } }, "Log")));
  }

  running(rows) {
    return el("div", { class: "live-rows", role: "table", "aria-label": "Running" },
      el("div", { role: "row", class: "live-row heads" }, ["run", "step", "loss, nats per token", "loss", "tokens/s", "MFU", "goodput", "last checkpoint", "time left"].map((name, index) => el("span", { role: "columnheader", class: index > 2 ? "number" : "" }, index === 3 ? el("span", { class: "for-readers" }, name) : name))),
      rows.map((row) => {
        const share = row.steps ? Math.min(1, row.step / row.steps) : null, own = `var(${runColour(row.id)})`;
        const of = (value) => (value === null || value === undefined ? DASH : [percent(value), el("span", { class: "unit" }, "%")]);
        return el("div", { role: "row", class: "live-row", "data-run": row.id },
          el("div", { role: "cell", class: "who" }, el("span", { class: "swatch", style: { "--own": own } }), el("div", {}, el("a", { href: runAddress(row.id), title: row.name }, el("b", {}, middle(row.name, 26))), el("div", { class: "quiet small" }, [row.family, row.attempts > 1 && `attempt ${row.attempts}`, /stop/.test(row.reason ?? "") && "stopping"].filter(Boolean).join(", ")))),
          el("div", { role: "cell", class: "progress" }, whole(row.step), el("span", { class: "quiet" }, row.steps ? ` / ${whole(row.steps)}` : ""), share !== null && el("div", { class: "track" }, el("span", { style: { width: `${100 * share}%`, background: own } }))),
          el("div", { role: "cell", class: "spark" }, spark(row.spark, own)),
          el("div", { role: "cell", class: "number" }, el("b", {}, loss(row.loss))),
          el("div", { role: "cell", class: "number" }, compact(row.tokens_per_second)),
          el("div", { role: "cell", class: "number" }, of(row.mfu)),
          el("div", { role: "cell", class: "number" }, of(row.goodput)),
          el("div", { role: "cell", class: "number quiet", title: row.checkpoint ? `step ${whole(row.checkpoint.step)}` : undefined }, row.checkpoint ? ago(row.checkpoint.time) : DASH),
          el("div", { role: "cell", class: "number" }, duration(row.left)));
      }));
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
