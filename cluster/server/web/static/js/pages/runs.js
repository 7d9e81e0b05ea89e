/** Which runs are there, which is best? */

import { get, runs } from "../api.js";
import { runColour } from "../colours.js";
import { el, empty, glyph, popover, put, word } from "../dom.js";
import { FilterError, compile, names, parse } from "../filter.js";
import { whole } from "../format.js";
import { announce, calmly, fresh, listen } from "../live.js";
import { change, go, runAddress, state } from "../router.js";
import { titled } from "../shell.js";
import { Table } from "../table.js";
import { COLUMNS, MEANED, makeColumn, metricColumns, statistics } from "./runs_columns.js";
import { MoreColumns } from "./runs_more.js";
import { Peek } from "./runs_peek.js";
import { showViews } from "./runs_views.js";

/** The columns that are shown unless somebody chooses others; where not all runs count tokens, each says what it counts. */
const usual = () => ["eval_loss", "strip", "loss", "data", "parameters", "optim.lr", "step", ...(runs.columns.unit.every((unit) => unit === "tokens") ? ["tokens", "tokens_per_second"] : ["weight", "rate"]), "wall_time"];
const NARROW = 640, MIDDLE = 1100;

export function open(outlet) {
  return new Runs(outlet);
}

class Runs {
  constructor(outlet) {
    this.more = new MoreColumns(() => this.show({ calm: true }));
    this.known = null; // {keys, metrics}
    this.unfolded = new Set();
    this.title = el("h1", {}, "Runs");
    this.sub = el("span", { class: "sub" });
    this.input = el("input", { type: "search", class: "mono", id: "filter", "aria-label": "Filter", "aria-describedby": "filter-wrong", placeholder: 'loss < 3 and tag = "x"', autocomplete: "off", spellcheck: "false", value: state().get("q") ?? "" });
    this.wrong = el("div", { class: "wrong", id: "filter-wrong", role: "status" });
    this.groupButton = el("button", { type: "button", "aria-haspopup": "true", on: { click: () => this.chooseGroup() } }, "Group");
    this.columnsButton = el("button", { type: "button", "aria-haspopup": "true", on: { click: () => this.chooseColumns() } }, "Columns");
    this.picked = el("span", { class: "quiet" });
    this.compareButton = el("button", { type: "button", class: "filled", on: { click: () => this.compare() } }, "Compare");
    this.none = el("div", { class: "none" });
    this.table = new Table({
      label: "Runs",
      opened: (row) => this.enter(row),
      chosen: (row) => this.chose(row),
      sorted: (sort) => change({ sort }),
      paint: (row, node) => this.paint(row, node),
    });
    this.table.left = () => this.held && this.show();
    this.peek = new Peek(() => this.refresh());
    this.area = el("div", { class: "runs-area" }, el("div", { class: "table-side" }, this.table.node, this.none), this.peek.node);
    this.views = el("div", { class: "views" });
    outlet.append(el("div", { class: "runs" },
      el("div", { class: "title-row" }, this.title, this.sub, el("div", { class: "space" }), this.views),
      el("div", { class: "toolbar" }, el("div", { class: "filter with-key" }, this.input, el("kbd", { "aria-hidden": "true" }, "/")), this.groupButton, this.columnsButton, el("div", { class: "space" }), this.picked, this.compareButton),
      this.wrong, this.area));
    this.input.addEventListener("input", calmly(() => change({ q: this.input.value.trim() }), 120));
    const soon = calmly(() => this.refresh(), 300);
    this.unlisten = listen(soon);
    this.resized = () => bandOf() !== this.band && this.show();
    addEventListener("resize", this.resized);
    titled("Runs", [["j k", "move"], ["x", "select"], ["c", "compare"], ["↵", "open"], ["space", "peek"], ["/", "filter"], ["t", "tag"], ["n", "note"]]);
    this.show();
    this.refresh();
  }

  close() {
    this.unlisten();
    this.more.close();
    this.table.close();
    this.peek.close();
    removeEventListener("resize", this.resized);
  }

  async refresh() {
    try {
      const changed = await runs.refresh();
      fresh();
      if (!changed) return;
      this.known = null;
      await this.show({ calm: true });
    } catch (error) {
      if (error.status === undefined) throw error;
      // The line at the top says it; what is known stays.
    }
  }

  update() {
    if (document.activeElement !== this.input) this.input.value = state().get("q") ?? "";
    this.show();
  }

  repaint() {
    this.table.draw(true);
    this.peek.repaint();
  }

  get columnKeys() {
    return state().get("columns")?.split(" ").filter(Boolean) ?? usual();
  }

  get selected() {
    return new Set(state().getAll("run").filter((id) => runs.places.has(id)));
  }

  /** Values of one column in the order of all runs. */
  values(key) {
    return runs.columns[key] ?? this.more.values(key) ?? [];
  }

  /** Asks for what is missing of these columns. */
  need(keys) {
    return this.more.need(keys.filter((key) => !(key in runs.columns) && !COLUMNS[key]?.own && key !== "none"));
  }

  /** The test that the filter's text says; throws FilterError. */
  async test(text, others) {
    const tree = parse(text), compared = names(tree);
    const unknown = compared.filter(({ name }) => !(name in runs.columns));
    if (unknown.length) {
      this.known ??= await get("/api/keys");
      const { keys, metrics } = this.known;
      for (const { name, at, end } of unknown) {
        const metric = /^metric:(.+?)(:(last|best|max|mean[1-9]\d{0,3}))?$/.exec(name)?.[1];
        if (metric === undefined ? keys.includes(name) : metrics.includes(metric)) continue;
        throw new FilterError(metrics.includes(name) ? `is a metric: write metric:${name}` : "is no key that a run has", at, end);
      }
    }
    await this.need([...compared.map(({ name }) => name), ...others]);
    return compile(tree, (name) => this.values(name));
  }

  async show({ calm = false } = {}) {
    const turn = (this.turn = (this.turn ?? 0) + 1);
    const query = state(), text = query.get("q") ?? "";
    const group = query.get("group") ?? "sweep", sort = query.get("sort") ?? "eval_loss";
    let test;
    try {
      test = await this.test(text, [...this.columnKeys, sort.replace(/^-/, ""), group]);
    } catch (error) {
      if (turn !== this.turn) return;
      this.input.setAttribute("aria-invalid", "true");
      if (error instanceof FilterError) put(this.wrong, el("code", {}, text.slice(0, error.at), el("mark", {}, text.slice(error.at, error.end) || " "), text.slice(error.end)), " ", error.message);
      else put(this.wrong, error.message);
      return;
    }
    if (turn !== this.turn) return;
    put(this.wrong);
    this.input.removeAttribute("aria-invalid");
    this.held = calm && this.table.hovered && this.table.rows.length > 0 && this.found();
    if (this.held) { // what is under the pointer stays there
      this.setColumns();
      return void this.table.draw(true);
    }
    const places = [];
    for (let place = 0; place < runs.count; place++) if (test(place)) places.push(place);
    this.layOut(places, group, sort);
    this.say(places, text, group);
  }

  layOut(places, group, sort) {
    const key = sort.replace(/^-/, ""), sign = sort.startsWith("-") ? -1 : 1;
    const values = this.values(key), keyed = group === "none" ? [] : this.values(group);
    const none = (value) => value === null || value === undefined || value === "";
    const by = (a, b) => {
      if (none(a) || none(b)) return none(a) - none(b);
      if (typeof a === "number" && typeof b === "number") return sign * (a - b);
      return sign * String(a).localeCompare(String(b), "en", { numeric: true });
    };
    const groups = new Map(), rows = [];
    for (const place of places) {
      const value = keyed[place];
      if (none(value)) rows.push(this.row(place, { value: values[place] }));
      else if (groups.has(String(value))) groups.get(String(value)).places.push(place);
      else groups.set(String(value), { group: String(value), key: group, places: [place] });
    }
    for (const each of groups.values()) {
      each.places.sort((a, b) => by(values[a], values[b]) || b - a);
      this.gather(each);
      const first = key === group ? keyed[each.places[0]] : values[each.places[0]];
      each.value = group === "sweep" || key === group ? first : each.statistics(key).mean ?? first;
      rows.push(each);
    }
    const newest = (row) => row.place ?? row.places.at(-1);
    rows.sort((a, b) => by(a.value, b.value) || newest(b) - newest(a));
    const flat = rows.flatMap((row) => (this.unfolded.has(row.group) ? [row, ...row.places.map((place) => this.row(place, { inner: true }))] : [row]));
    Object.assign(this, { band: bandOf(), shown: { places, ids: places.map((place) => runs.columns.id[place]), group, sort } });
    this.setColumns();
    this.table.setRows(flat, (row) => (row.group !== undefined ? `group ${row.group}` : row.id));
  }

  row(place, more) {
    return { place, id: runs.columns.id[place], ...more };
  }

  /** A group's ids, and what its runs' values come to. */
  gather(group) {
    const found = new Map();
    group.ids = group.places.map((place) => runs.columns.id[place]);
    group.statistics = (column) => {
      if (!found.has(column)) found.set(column, statistics(group.places.map((place) => this.values(column)[place])));
      return found.get(column);
    };
  }

  /** Finds the runs of the rows that are shown among those that there are now; false: one is gone. */
  found() {
    const { rows } = this.table, here = ({ ids, id }) => (ids ?? [id]).every((each) => runs.places.has(each));
    if (!rows.every(here)) return false;
    for (const row of rows) {
      if (row.group === undefined) row.place = runs.places.get(row.id);
      else this.gather(Object.assign(row, { places: row.ids.map((id) => runs.places.get(id)) }));
    }
    this.shown.places = this.shown.ids.map((id) => runs.places.get(id)).filter((place) => place !== undefined);
    return true;
  }

  setColumns() {
    const { places, group, sort } = this.shown;
    const shown = this.columnKeys.filter((each) => each !== "strip" || this.band === 2);
    const keys = this.band === 0 ? ["eval_loss", "step"] : this.band === 1 ? shown.slice(0, 7) : shown;
    this.table.setColumns([this.selecting(), this.naming(group), ...keys.map((each) => makeColumn(each, this, places))], sort);
  }

  say(places, text, group) {
    const data = new Set(places.map((place) => runs.columns.data?.[place]).filter(Boolean));
    const all = runs.count, picked = this.selected, peek = state().get("peek");
    put(this.title, "Runs ", el("span", { class: "rest" }, places.length === all ? whole(all) : `${whole(places.length)} of ${whole(all)}`));
    put(this.sub, data.size > 1 ? `${data.size} data sets: losses compare only within one` : "");
    put(this.groupButton, group === "none" ? "Group" : `Group: ${group}`);
    put(this.columnsButton, `Columns ${this.columnKeys.length}`);
    put(this.picked, picked.size ? `${picked.size} selected` : "");
    this.compareButton.disabled = picked.size < 2;
    this.none.hidden = places.length > 0;
    this.table.node.hidden = !places.length;
    if (!places.length) {
      put(this.none, all
        ? empty(`No run has ${text}`, `${whole(all)} runs are here.`, null, el("button", { type: "button", on: { click: () => ((this.input.value = ""), change({ q: null })) } }, "Clear the filter"))
        : empty("No run yet", "The first one shows here as soon as it makes a step.", "muster train quickstart"));
    }
    showViews(this.views);
    announce(`${places.length} of ${all} runs`);
    if (this.band === 2 && runs.places.has(peek)) this.peek.show(peek);
    else this.peek.hide();
    this.area.classList.toggle("peeking", this.peek.shown);
  }

  selecting() {
    return {
      key: "select", width: "20px", label: el("span", { class: "for-readers" }, "selected"),
      cell: (row) => {
        if (row.group !== undefined) {
          const unfolded = this.unfolded.has(row.group);
          return el("button", { class: "bare fold", type: "button", tabindex: "-1", "data-focus": "fold", "aria-expanded": String(unfolded), "aria-label": `Runs of ${row.group}`, on: { click: () => this.fold(row) } }, unfolded ? "▾" : "▸");
        }
        const id = runs.columns.id[row.place];
        return el("input", { type: "checkbox", tabindex: "-1", "data-focus": "select", "aria-label": `Select ${runs.columns.name[row.place]}`, checked: this.selected.has(id), style: { "--own": `var(${runColour(id)})` }, on: { click: () => this.toggle(row) } });
      },
    };
  }

  naming(group) {
    return {
      key: "name", label: "run", sortable: true, class: "name", width: this.band === 0 ? "minmax(120px, 1fr)" : "minmax(160px, 2.2fr)",
      cell: (row) => {
        if (row.group !== undefined) return [el("b", { class: "cut", title: row.group }, row.group), el("span", { class: "tag" }, group === "sweep" ? `sweep, ${row.places.length} trials` : `${row.places.length} runs`)];
        const { id, name, status, tags, sweep } = runs.columns, place = row.place;
        const own = name[place] ?? "", shown = row.inner || !sweep?.[place] ? own : `${sweep[place]}/${own}`;
        return [
          el("span", { class: row.inner ? "state inner" : "state" }, glyph(word(status[place]), true)),
          el("a", { href: runAddress(id[place]), tabindex: "-1", title: shown, class: "cut" }, cut(shown)),
          this.band > 0 && (tags?.[place] ?? []).slice(0, 3).map((tag) => el("span", { class: "tag" }, tag)),
        ];
      },
    };
  }

  /** A run without results says why in their place. */
  paint(row, node) {
    if (row.group !== undefined) return void node.classList.add("group");
    const { status, reason, eval_loss, loss } = runs.columns, kind = status[row.place];
    if (!["NEW", "FAILED", "UNREADABLE"].includes(kind) || eval_loss[row.place] !== null) return;
    const from = this.table.columns.findIndex(({ key }) => key === "eval_loss"), results = ["eval_loss", "strip"];
    if (from < 0) return;
    if (loss[row.place] === null) results.push("loss");
    if (this.band === 0) results.push("step");
    let to = from;
    while (results.includes(this.table.columns[to]?.key)) to++;
    const text = kind === "NEW" ? "resolved, never started" : reason?.[row.place] || "failed, no reason is recorded";
    const cells = [...node.children].slice(from, to);
    const note = el("div", { role: "gridcell", class: kind === "NEW" ? "why quiet" : "why failed", title: text }, text);
    note.style.gridColumn = `span ${cells.length}`;
    cells[0].before(note);
    for (const cell of cells) cell.remove();
  }

  fold(row) {
    if (!this.unfolded.delete(row.group)) this.unfolded.add(row.group);
    this.show();
  }

  toggle(row) {
    if (!row) return;
    const picked = this.selected, ids = (row.places ?? [row.place]).map((place) => runs.columns.id[place]);
    const all = ids.every((id) => picked.has(id));
    for (const id of ids) all ? picked.delete(id) : picked.add(id);
    change({ run: [...picked] });
  }

  enter(row) {
    if (!row) return;
    if (row.group !== undefined) this.fold(row);
    else go(runAddress(runs.columns.id[row.place]));
  }

  chose(row) {
    if (row?.place !== undefined && this.band === 2) change({ peek: runs.columns.id[row.place] });
  }

  compare() {
    const picked = [...this.selected];
    const by = state().get("group");
    if (picked.length > 1) go(`/compare?${new URLSearchParams([...picked.map((id) => ["run", id]), ...(by?.includes(".") ? [["group", by]] : [])])}`);
  }

  key(key) {
    const row = this.table.rows[this.table.active];
    if (key === "j" || key === "ArrowDown") this.table.move(1);
    else if (key === "k" || key === "ArrowUp") this.table.move(-1);
    else if (key === "PageDown") this.table.move(20);
    else if (key === "PageUp") this.table.move(-20);
    else if (key === "x") this.toggle(row);
    else if (key === "Enter") this.enter(row);
    else if (key === " ") state().get("peek") ? change({ peek: null }) : this.chose(row);
    else if (key === "c") this.compare();
    else if (key === "/") this.input.select();
    else if (key === "Escape" && state().get("peek")) change({ peek: null });
    else if ((key === "n" || key === "t") && row?.place !== undefined) this.peek.edit(runs.columns.id[row.place], key === "n" ? "note" : "tags");
    else return false;
    return true;
  }

  async chooseGroup() {
    this.known ??= await get("/api/keys");
    const now = state().get("group") ?? "sweep";
    pick(this.groupButton, "Group by", () => ["none", "sweep", "family", "data", "status", ...this.known.keys], (key) => key === now, (key, panel) => {
      panel.hidePopover();
      this.unfolded.clear();
      change({ group: key === "sweep" ? null : key });
    }, { single: true });
  }

  async chooseColumns() {
    this.known ??= await get("/api/keys");
    const { keys, metrics } = this.known;
    const chosen = (key) => this.columnKeys.includes(key);
    let n = MEANED;
    const count = el("input", { type: "number", min: 1, max: 9999, value: n, "aria-label": "Records that a mean is of", on: { input: () => {
      n = Math.min(9999, Math.max(1, Math.round(Number(count.value) || MEANED)));
      list.draw();
    } } });
    const all = () => [...this.columnKeys, ...[...Object.keys(COLUMNS), ...keys, ...metrics.flatMap((name) => metricColumns(name, n))].filter((key) => !chosen(key))];
    const list = pick(this.columnsButton, "Columns", all, chosen, (key) => {
      const changed = chosen(key) ? this.columnKeys.filter((each) => each !== key) : [...this.columnKeys, key];
      change({ columns: changed.join(" ") === usual().join(" ") ? null : changed.join(" ") || "eval_loss" });
    }, { more: el("div", { class: "quiet meaned" }, "means are of the last ", count, " records") });
  }
}

const bandOf = () => (innerWidth < NARROW ? 0 : innerWidth < MIDDLE ? 1 : 2);

/** A list of names to choose from, with a field that searches them; `all()` are the names. Returns {draw()}. */
function pick(anchor, label, all, isChosen, choose, { single = false, more = null } = {}) {
  const list = el("div", { role: "group", "aria-label": label });
  const search = el("input", { type: "search", class: "mono", placeholder: "Key or metric", "aria-label": `Search: ${label}`, on: { input: () => draw() } });
  const panel = popover(anchor, search, more, list);
  const named = (key) => COLUMNS[key]?.label || (key === "strip" ? "held-out, as a place" : key);
  function draw() {
    const wanted = search.value.trim().toLowerCase();
    const some = all().filter((key) => named(key).toLowerCase().includes(wanted) || key.toLowerCase().includes(wanted)).slice(0, 60);
    put(list, some.map((key) => el("label", { class: "check" },
      el("input", { type: single ? "radio" : "checkbox", name: "choice", checked: isChosen(key), on: { change: () => choose(key, panel) } }), named(key))),
      !some.length && el("p", { class: "quiet" }, "No key or metric has that in its name."));
  }
  draw();
  search.focus();
  return { draw };
}

/** A name in two halves: the first is cut where there is no room, the end always stays. */
function cut(name) {
  if (name.length < 16) return name;
  const end = Math.min(12, Math.floor(name.length / 2));
  return [el("span", { class: "begin" }, name.slice(0, -end)), el("span", { class: "end" }, name.slice(-end))];
}
