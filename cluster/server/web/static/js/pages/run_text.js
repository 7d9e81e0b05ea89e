/** A run's texts: config, logs, files. All of it is shown as text and as nothing else. */

import { get, readOnly, runPath, runs } from "../api.js";
import { el, empty, put } from "../dom.js";
import { DASH, bytes, loss, plain, whole } from "../format.js";
import { calmly } from "../live.js";

export class Config {
  constructor(id, node) {
    this.id = id;
    this.search = el("input", { type: "search", class: "mono", placeholder: "Key or value", "aria-label": "Find a key", on: { input: () => this.draw() } });
    this.other = el("input", { type: "search", list: "other-runs", placeholder: "Another run", "aria-label": "Difference from another run", on: { change: () => this.compare() } });
    this.list = el("datalist", { id: "other-runs" }, runs.columns.id.slice(-500).reverse().filter((each) => each !== id).map((each) => el("option", { value: each })));
    this.count = el("small");
    this.rows = el("div");
    put(node, el("div", { class: "toolbar" }, el("h2", {}, "Config", this.count), el("div", { class: "space" }), !readOnly && [el("label", { class: "quiet" }, "differs from ", this.other), this.list], this.search), this.rows);
  }

  show(details) {
    this.details = details;
    this.draw();
  }

  async compare() {
    this.differs = null;
    this.wrong = "";
    const other = this.other.value.trim();
    if (other) {
      try {
        const { differs } = await get("/api/compare", { run: [this.id, other], metric: "loss", points: 2 });
        this.differs = new Map(differs.map(({ key, values }) => [key, values[1]]));
      } catch (error) {
        this.wrong = error.message;
      }
    }
    this.draw();
  }

  draw() {
    const { config, header } = this.details, wanted = this.search.value.trim().toLowerCase();
    const because = new Map(header.derived.map((line) => /^([\w.]+)=.*?: (.*)$/.exec(line)).filter(Boolean).map(([, key, reason]) => [key, reason]));
    const keys = [...new Set([...Object.keys(config), ...(this.differs?.keys() ?? [])])].filter((key) => (this.differs ? this.differs.has(key) : true) && (key.toLowerCase().includes(wanted) || plain(config[key]).toLowerCase().includes(wanted)));
    put(this.count, this.differs ? `${keys.length} keys differ` : `${keys.length} of ${Object.keys(config).length} keys`);
    if (this.wrong) return void put(this.rows, el("p", { class: "wrong" }, this.wrong));
    if (!keys.length) return void put(this.rows, el("p", { class: "quiet" }, this.differs ? "No key differs." : Object.keys(config).length ? "No key or value has that in it." : "Its config.yaml cannot be read or is empty."));
    put(this.rows, el("table", { class: "plain config" },
      el("thead", {}, el("tr", {}, el("th", {}, "key"), el("th", {}, "value"), this.differs && el("th", {}, this.other.value), el("th", {}, "why"))),
      el("tbody", {}, keys.map((key) => el("tr", {}, el("td", { class: "mono" }, key), el("td", { class: "mono" }, plain(config[key])), this.differs && el("td", { class: "mono" }, plain(this.differs.get(key))), el("td", { class: "quiet" }, because.get(key) ?? "")))))); 
  }
}

export class Logs {
  constructor(id, node) {
    this.id = id;
    this.rank = 0;
    this.attempt = null; // the newest
    this.select = el("select", { "aria-label": "Rank", on: { change: () => ((this.rank = Number(this.select.value)), this.load()) } });
    this.attempts = el("select", { "aria-label": "Attempt", on: { change: () => ((this.attempt = Number(this.attempts.value) || null), this.load()) } });
    this.search = el("input", { type: "search", class: "mono", placeholder: "Find in the log", "aria-label": "Find in the log", on: { input: calmly(() => this.load(), 250) } });
    this.said = el("small");
    this.text = el("pre", { class: "log", tabindex: "0", "aria-label": "Log" });
    this.node = node;
    put(node, el("div", { class: "toolbar" }, el("h2", {}, "Logs", this.said), el("div", { class: "space" }), this.attempts, this.select, this.search), this.text);
  }

  show({ ranks, row, attempts }) {
    if (!ranks.length) return void put(this.node, empty("No logs", "A run's output is kept once it has started.", null));
    if (this.ranks !== ranks.join()) {
      this.ranks = ranks.join();
      put(this.select, ranks.map((rank) => el("option", { value: rank, selected: rank === this.rank }, `rank ${rank}`)));
      if (!ranks.includes(this.rank)) this.rank = ranks[0];
    }
    const numbers = readOnly ? [] : attempts.map(({ n }) => n).reverse(); // a file has the newest alone
    this.attempts.hidden = numbers.length < 2;
    if (this.numbers !== numbers.join()) {
      this.numbers = numbers.join();
      put(this.attempts, numbers.map((n, index) => el("option", { value: index ? n : 0, selected: n === this.attempt }, `attempt ${n}`)));
    }
    this.running = row.status === "RUNNING" && !this.attempt;
    this.load();
  }

  async load() {
    const turn = (this.turn = (this.turn ?? 0) + 1), wanted = this.search.value.trim();
    try {
      const { text, truncated, attempt } = await get(runPath(this.id, "/log"), { rank: this.rank, tail: 131072, search: wanted, attempt: this.attempt });
      if (turn !== this.turn) return;
      const end = this.text.scrollTop + this.text.clientHeight >= this.text.scrollHeight - 40;
      const lines = text.split("\n");
      const found = wanted ? lines.filter(Boolean).length : 0;
      put(this.said, [wanted ? `${found} lines have it` : `attempt ${attempt ?? DASH}`, truncated && "the end of it", this.running && "live"].filter(Boolean).join(", "));
      put(this.text, text ? lines.map((line) => el("div", { class: /error|traceback|exception/i.test(line) ? "failed" : /warning/i.test(line) ? "warning" : undefined }, wanted ? marked(line, wanted) : line || " ")) : wanted ? "No line has that." : "It is empty.");
      if (end || this.first === undefined) this.text.scrollTop = this.text.scrollHeight;
      this.first = false;
    } catch (error) {
      if (turn === this.turn) put(this.text, error.message);
    }
  }

  key(key) {
    if (key !== "/") return false;
    this.search.select();
    return true;
  }
}

function marked(line, wanted) {
  const parts = [], low = line.toLowerCase(), looked = wanted.toLowerCase();
  let from = 0;
  for (let at = low.indexOf(looked); at >= 0 && low.length === line.length; at = low.indexOf(looked, from)) {
    parts.push(line.slice(from, at), el("mark", {}, line.slice(at, at + looked.length)));
    from = at + looked.length;
  }
  return [...parts, line.slice(from)];
}

const outside = (address) => el("a", { href: address, target: "_blank", rel: "noreferrer" }, address);

export function files({ files: all, tracking, header, row }, node) {
  const facts = [
    ["command", header.command], ["host", header.host], ["commit", header.commit && `${header.commit}${header.dirty ? " with changes" : ""}`],
    ...Object.entries(header.versions ?? {}), ["MLflow", tracking.mlflow && outside(tracking.mlflow)], ["Ray", tracking.ray && outside(tracking.ray)],
    ["MLflow is behind", tracking.behind], ["held-out loss", row.eval_loss === null ? null : loss(row.eval_loss)],
  ].filter(([, value]) => value);
  put(node, el("div", { class: "two" },
    el("section", {}, el("h2", {}, "Files", el("small", {}, "in the run's folder")),
      all.length ? el("table", { class: "plain" }, el("thead", {}, el("tr", {}, el("th", {}, "file"), el("th", { class: "number" }, "size"))), el("tbody", {}, all.map(({ name, bytes: size }) => el("tr", {}, el("td", { class: "mono" }, name), el("td", { class: "number" }, bytes(size)))))) : el("p", { class: "quiet" }, "None can be read.")),
    el("section", {}, el("h2", {}, "How it was made"), el("table", { class: "plain facts" }, facts.map(([name, value]) => el("tr", {}, el("td", { class: "quiet" }, name), el("td", { class: "mono" }, value)))))));
}
