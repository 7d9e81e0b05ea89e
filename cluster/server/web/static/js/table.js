/** A table of which only the rows in sight are in the page: 10,000 rows scroll as 30 do. */

import { el, put } from "./dom.js";

const ROW = 28, MORE = 8;

/**
 * `columns`: [{key, label, width, class, cell(row, place) -> node or text, head() -> node, sortable}].
 * `rows`: anything; `paint(row, node)` may mark a row. `chosen(index)` is told when a row becomes the active one.
 */
export class Table {
  constructor({ label, opened, chosen, sorted, paint, height = ROW }) {
    Object.assign(this, { opened, chosen, sorted, paint, height, rows: [], columns: [], active: -1, hovered: false, nodes: new Map() });
    this.head = el("div", { class: "row head", role: "row" });
    this.body = el("div", { class: "rows", role: "rowgroup" });
    this.node = el("div", { class: "table", role: "grid", "aria-label": label, tabindex: "0" }, el("div", { role: "rowgroup", class: "heads" }, this.head), this.body);
    this.node.addEventListener("scroll", () => this.draw(), { passive: true });
    this.node.addEventListener("pointerenter", () => (this.hovered = true));
    this.node.addEventListener("pointerleave", () => {
      this.hovered = false;
      this.left?.();
    });
    this.body.addEventListener("click", (event) => {
      const row = event.target.closest(".row");
      if (!row || event.target.closest("input, a, button")) return;
      this.activate(Number(row.dataset.index));
    });
    this.body.addEventListener("dblclick", (event) => {
      const row = event.target.closest(".row");
      if (row && !event.target.closest("input, button")) this.opened?.(this.rows[Number(row.dataset.index)]);
    });
    this.watch = new ResizeObserver(() => this.draw());
    this.watch.observe(this.node);
  }

  close() {
    this.watch.disconnect();
  }

  /** Its rows are drawn with them by `setRows` or `draw(true)`: those that it has may be of other data. */
  setColumns(columns, sort) {
    this.columns = columns;
    this.node.style.setProperty("--columns", columns.map((column) => column.width).join(" "));
    this.node.setAttribute("aria-colcount", columns.length);
    put(this.head, columns.map((column) => {
      const descending = sort === `-${column.key}`, sorts = descending || sort === column.key;
      const order = sorts ? (descending ? "descending" : "ascending") : column.sortable ? "none" : undefined;
      const label = column.sortable
        ? el("button", { class: "bare", type: "button", tabindex: "-1", title: column.title, on: { click: () => this.sorted(sorts && !descending ? `-${column.key}` : column.key) } }, column.label, sorts && el("span", { "aria-hidden": "true" }, descending ? " ↓" : " ↑"))
        : el("span", {}, column.label);
      return el("div", { role: "columnheader", class: column.class ?? "", "aria-sort": order, "data-key": column.key }, column.head?.(), label);
    }));
  }

  setRows(rows, keep) {
    const was = this.rows[this.active];
    this.rows = rows;
    if (was && keep) this.active = rows.findIndex((row) => keep(row) === keep(was));
    if (this.active >= rows.length) this.active = rows.length - 1;
    this.node.setAttribute("aria-rowcount", rows.length + 1);
    this.body.style.height = `${rows.length * this.height}px`;
    this.draw(true);
  }

  /** Moves the active row by so many, and keeps it in sight. */
  move(by) {
    if (!this.rows.length) return;
    this.activate(Math.max(0, Math.min(this.rows.length - 1, this.active < 0 ? 0 : this.active + by)));
  }

  activate(index) {
    this.active = index;
    const top = index * this.height, heads = this.head.offsetHeight, space = this.node.clientHeight - heads;
    if (top < this.node.scrollTop) this.node.scrollTop = top;
    else if (top + this.height > this.node.scrollTop + space) this.node.scrollTop = top + this.height - space;
    this.draw(true);
    this.chosen?.(this.rows[index]);
  }

  draw(anew = false) {
    const first = Math.max(0, Math.floor(this.node.scrollTop / this.height) - MORE);
    const last = Math.min(this.rows.length, Math.ceil((this.node.scrollTop + this.node.clientHeight) / this.height) + MORE);
    if (!anew && first === this.first && last === this.last) return;
    Object.assign(this, { first, last });
    const nodes = [];
    const known = anew ? new Map() : this.nodes;
    this.nodes = new Map();
    for (let index = first; index < last; index++) {
      if (known.has(index)) {
        nodes.push(known.get(index));
        this.nodes.set(index, known.get(index));
        continue;
      }
      const row = this.rows[index];
      const cells = this.columns.map((column) => {
        const content = column.cell(row, index);
        return el("div", { role: "gridcell", class: column.class ?? "" }, content);
      });
      const node = el("div", { role: "row", class: "row", id: `row-${index}`, "data-index": index, "aria-rowindex": index + 2, "aria-selected": String(index === this.active), style: { transform: `translateY(${index * this.height}px)` } }, cells);
      this.paint?.(row, node);
      nodes.push(node);
      this.nodes.set(index, node);
    }
    const focused = document.activeElement?.closest?.(".row")?.dataset.index, own = document.activeElement?.dataset?.focus;
    put(this.body, nodes);
    if (focused !== undefined && own) this.body.querySelector(`[data-index="${focused}"] [data-focus="${own}"]`)?.focus();
    if (this.active >= first && this.active < last) this.node.setAttribute("aria-activedescendant", `row-${this.active}`);
    else this.node.removeAttribute("aria-activedescendant");
  }
}
