/** What a plan says: numbers, memory by part, a step's time, the topologies that fit and why others do not. */

import { el, glyph, notice, put } from "../dom.js";
import { bytes, compact, duration, number, percent, whole } from "../format.js";

const FIRST = 10;
const GREYS = ["--part2", "--part2", "--part2", "--part4", "--part4", "--part4", "--part1", "--part1", "--part3", "--part3"];

/** 18.25 s, 0.312 s */
const seconds = (value) => (value >= 0.1 && value < 100 ? `${Number(value.toPrecision(value < 10 ? 3 : 4))} s` : duration(value, 3));
/** 52.8 days, 7 h 12 min */
export const days = (hours) => (hours >= 48 ? `${number(hours / 24, 3)} days` : duration(hours * 3600));

export class Results {
  /** `take(choice)`: a topology was chosen; `set(KEY=VALUE)`: a change was. */
  constructor({ take, set }) {
    Object.assign(this, { take, set, all: false, active: -1 });
    this.numbers = el("dl", { class: "numbers plan-numbers" });
    this.memory = el("section");
    this.step = el("section");
    this.table = el("section");
    this.refused = el("section");
    this.notes = el("div");
    this.node = el("div", {}, this.numbers, (this.wrong = el("div")), (this.charts = el("div", { class: "plan-charts" }, this.memory, el("div", {}, this.step, this.refused))), this.table, this.notes);
  }

  /** `memoryOfDevice`: bytes; undefined: a process shares the machine's. */
  show(told, topologies, memoryOfDevice) {
    Object.assign(this, { told, topologies, memoryOfDevice });
    const { plan, error } = told;
    put(this.wrong, error && notice("failed", error));
    this.charts.classList.toggle("alone", !plan);
    if (!plan) for (const node of [this.numbers, this.memory, this.step]) put(node);
    else {
      this.showNumbers(plan, told);
      this.showMemory(plan);
      this.showStep(plan, told);
    }
    this.showTable();
    put(this.notes, told.notes?.length > 0 && el("details", {}, el("summary", {}, `${told.notes.length} value${told.notes.length === 1 ? "" : "s"} followed from others`), told.notes.map((note) => el("p", { class: "quiet" }, note))));
  }

  showNumbers(plan, { device }) {
    const all = [["step", seconds(plan.step_time)], ["MFU", `${percent(plan.mfu)}%`], ["tokens/s", compact(plan.tokens_per_second)], ["tokens a day", compact(plan.tokens_per_day)], [device.name === "cpu" ? "core-hours" : "GPU-hours", plan.device_hours >= 1e5 || plan.device_hours < 10 ? compact(plan.device_hours, 2) : whole(plan.device_hours)], ...(plan.usd === undefined ? [] : [["USD", whole(plan.usd)]])];
    put(this.numbers, all.map(([name, value]) => el("div", {}, el("dt", {}, name), el("dd", {}, value))),
      !device.measured && el("div", {}, el("dt", {}, "doubt"), el("dd", { class: "doubt warning" }, glyph("warning"), ` not measured by muster: data-sheet rates, ${percent(device.attained)}% reached`)));
  }

  showMemory(plan) {
    const { peak } = plan.memory, whole_ = plan.memory_of_device ?? peak * 1.25, wide = Math.max(whole_, peak), share = (size) => `${(100 * size) / wide}%`;
    const most = Math.max(...plan.parts.map(([, size]) => size)), hue = (index) => `var(${GREYS[Math.min(index, GREYS.length - 1)]})`;
    // Not all parts are there at once: the bar ends at the peak.
    let left = peak;
    const shown = plan.parts.map(([name, size], index) => {
      const part = Math.min(size, left);
      left -= part;
      return el("span", { title: `${name}: ${bytes(size)}`, style: { width: share(part), background: plan.fits ? hue(index) : "var(--failed)" } });
    });
    put(this.memory, el("h2", {}, "Memory of a device", el("small", {}, `at the peak: ${plan.peak_at}`)),
      el("div", { class: "memory", role: "img", "aria-label": `Peak ${bytes(peak)}${plan.memory_of_device ? ` of ${bytes(plan.memory_of_device)}, of which ${bytes(plan.limit)} are used at most` : ""}` },
        el("div", { class: "whole" }, shown), el("b", { class: `said${plan.fits ? "" : " failed"}`, style: peak / wide > 0.6 ? { right: `calc(100% - ${share(peak)})` } : { left: 0 } }, `peak ${bytes(peak)}`), plan.memory_of_device && el("span", { class: "said quiet", style: { right: 0 } }, bytes(plan.memory_of_device)),
        plan.limit && el("div", { class: "limit", style: { left: share(plan.limit) } }, peak < 0.6 * plan.limit && el("span", {}, "90%: the limit"))),
      el("table", { class: "bars" }, el("tbody", {}, plan.parts.map(([name, size], index) => el("tr", {}, el("td", {}, name), el("td", { class: "bar" }, el("span", { style: { width: `${(100 * size) / most}%`, background: hue(index) } })), el("td", { class: "number" }, bytes(size)))))),
      plan.host > 0 && el("p", { class: "quiet" }, `Each process keeps ${bytes(plan.host)} more in the host’s memory.`), plan.stage > 0 && el("p", { class: "quiet" }, `Of rank ${plan.stage + 1} of the pipeline, which needs most.`));
  }

  showStep(plan, { without }) {
    const { step_time: step } = plan, parts = [["matrix products", plan.compute_time, "--part2"], ["moving states", plan.memory_time, "--ink3"], ["small operations", plan.launch_time, "--line2"]].filter(([, took]) => took > 0);
    const waits = step - parts.reduce((sum, [, took]) => sum + took, 0), share = (took) => `${(100 * took) / step}%`;
    const sends = Object.entries(plan.traffic), sent = sends.reduce((sum, [, { seconds: took }]) => sum + took, 0), letters = innerWidth < 900 ? innerWidth / 9 : innerWidth / 19;
    const label = (name, took) => {
      const text = `${name} ${seconds(took)}`;
      return text.length < (letters * took) / step ? text : "";
    };
    const inked = { "--line2": "var(--ink1)" };
    put(this.step, el("h2", {}, "A step", el("small", {}, plan.hidden.length ? "sending overlaps computing" : "")),
      el("div", { class: "timeline", role: "img", "aria-label": [...parts, ["waits", waits]].map(([name, took]) => `${name} ${seconds(took)}`).concat(sends.map(([name, { seconds: took }]) => `${name} ${seconds(took)}`)).join(", ") },
        el("span", {}, "compute"), el("div", { class: "lane-of" }, parts.map(([name, took, hue]) => el("span", { title: `${name}: ${seconds(took)}`, style: { width: share(took), background: `var(${hue})`, color: inked[hue] ?? "var(--page)" } }, label(name, took))), waits > 0.002 * step && el("span", { class: "waits", title: `waits: ${seconds(waits)}`, style: { width: share(waits) } }, waits > 0.1 * step ? `waits ${seconds(waits)}` : "")),
        sends.length > 0 && [el("span", {}, "send"), el("div", { class: "lane-of" }, el("span", { style: { width: share(Math.max(0, step - sent)), padding: 0, border: 0 } }), sends.map(([name, { seconds: took, sent: size }], index) => el("span", { title: `${name}: ${seconds(took)}, ${bytes(size)} out of each device`, style: { width: share(Math.min(took, step)), background: `var(${index % 2 ? "--line" : "--line2"})`, color: "var(--ink1)" } }, label(name, took))))],
        el("div", { class: "time-axis" }, el("span", {}, "0"), el("span", {}, seconds(step)))),
      plan.bubble > 0 && el("p", { class: "quiet" }, `Pipeline bubble ${percent(plan.bubble)}% of the step.`),
      sends.length > 0 && el("p", { class: "quiet" }, sends.map(([name, { sent: size }]) => `${name} ${bytes(size)}`).join(", ") + " out of each device."),
      el("p", {}, `With ${without.key}: peak ${bytes(without.peak)}, step ${seconds(without.step_time)}. `, el("button", { type: "button", class: "bare", on: { click: () => this.set(without.key) } }, "Try it")));
  }

  showTable() {
    const { topologies, told } = this, found = topologies?.found;
    if (!found) {
      put(this.table, topologies?.working || !topologies ? el("p", { class: "quiet" }, "The topologies are being compared.") : topologies.error && topologies.error !== told.error && notice("warning", topologies.error));
      return void put(this.refused);
    }
    const { choices } = found, limit = choices[0]?.memory_of_device, used = told.used ?? {}, priced = choices[0]?.usd !== undefined;
    const rows = choices.map((choice) => ({ ...choice, keys: Object.fromEntries(choice.overrides.map((each) => each.split("="))) }));
    const own = rows.findIndex(({ keys }) => Object.entries(keys).every(([key, value]) => String(used[key]) === value));
    const shown = this.all ? [...rows] : rows.slice(0, FIRST);
    if (own >= shown.length) shown.push(rows[own]);
    const { plan } = told, keys = choices[0] && Object.keys(rows[0].keys);
    const now = own < 0 && plan && keys ? { ...plan, keys: Object.fromEntries(keys.map((key) => [key, String(used[key])])) } : rows[own];
    if (own < 0 && now) shown.push(now);
    const degree = (keys, key) => el("td", { class: keys[`parallel.${key}`] === "1" ? "number ones" : "number" }, keys[`parallel.${key}`], key === "pp" && keys["parallel.pp_schedule"] === "dualpipev" ? "v" : "");
    this.shown = shown;
    this.active = Math.min(this.active, shown.length - 1);
    const heads = [["take it", "hide"], ...["dp", "tp", "pp", "ep", "sp", "ZeRO", "micro"].map((name) => [name, "number"]), ["recompute", ""], ["memory", "number"], limit ? [`of ${bytes(limit)}`, ""] : ["memory, drawn", "hide"], ["step", "number"], ["MFU", "number"], ["takes", "number"], ...(priced ? [["USD", "number"]] : [])];
    put(this.table, el("h2", {}, "Topologies that fit", el("small", {}, choices.length ? `${choices.length}, the quickest first; ▸ the one above` : "none")), choices.length > 0 && el("div", { class: "wide" }, el("table", { class: "plain topologies" },
      el("thead", {}, el("tr", {}, heads.map(([name, kind]) => (kind === "hide" ? el("th", {}, el("span", { class: "for-readers" }, name)) : el("th", { class: kind }, name))))),
      el("tbody", {}, shown.map((choice, index) => el("tr", { class: index === this.active ? "active" : "", "aria-selected": String(choice === now), on: { click: () => choice !== now && this.take(choice) } },
        el("td", {}, choice === now ? "▸" : el("button", { type: "button", class: "bare take", title: "Take it", "aria-label": `Take topology ${index + 1}`, on: { click: (event) => (event.stopPropagation(), this.take(choice)) } }, "‣")), ["dp", "tp", "pp", "ep", "sp"].map((key) => degree(choice.keys, key)), el("td", { class: "number" }, choice.keys["parallel.zero_stage"]), el("td", { class: "number" }, choice.keys["train.micro_batch"]), el("td", {}, choice.keys["train.activation_checkpointing"]),
        el("td", { class: "number" }, bytes(choice.memory.peak)), el("td", { class: "mem" }, limit && el("div", {}, el("span", { style: { width: `${(100 * choice.memory.peak) / limit}%` } }))), el("td", { class: "number" }, el("b", {}, seconds(choice.step_time))), el("td", { class: "number" }, percent(choice.mfu), el("span", { class: "unit" }, "%")), el("td", { class: "number" }, days(choice.hours)), priced && el("td", { class: "number" }, choice.usd >= 1e5 ? compact(choice.usd) : whole(choice.usd))))))),
      !this.all && rows.length > FIRST && el("button", { type: "button", class: "bare", on: { click: () => ((this.all = true), this.showTable()) } }, `${rows.length - FIRST} more`));
    const refused = Object.entries(found.refused).sort(([, a], [, b]) => b - a);
    const large = found.too_large > 0 ? [[`memory: with no micro-batch under 90% of ${bytes(limit ?? this.memoryOfDevice)}; the smallest needs ${bytes(found.least_memory_of_too_large)}`, found.too_large]] : [];
    put(this.refused, refused.length + large.length > 0 && [el("h2", {}, "Cannot run", el("small", {}, "one topology may break several rules")), el("table", { class: "plain refused" }, el("tbody", {}, [...refused, ...large].map(([reason, count]) => {
      const at = reason.indexOf(": ");
      return el("tr", {}, el("td", { class: "number" }, whole(count)), el("td", {}, at < 0 ? "" : reason.slice(0, at)), el("td", { class: "quiet" }, at < 0 ? reason : reason.slice(at + 2)));
    })))]);
  }

  key(key) {
    if (!this.shown?.length) return false;
    if (key === "j" || key === "k") {
      this.active = Math.max(0, Math.min(this.shown.length - 1, this.active + (key === "j" ? 1 : -1)));
      this.showTable();
      this.table.querySelector("tr.active")?.scrollIntoView({ block: "nearest" });
    } else if (key === "Enter" && this.shown[this.active]?.overrides) this.take(this.shown[this.active]);
    else return false;
    return true;
  }
}
