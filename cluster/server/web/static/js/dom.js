/** Makes elements. Text is only ever set as text: nothing that is read from a run is parsed as HTML. */

/** An element. `props`: `on` {event: handler}, `style` {property: value}, true or false for bare attributes, the rest attributes. */
export function el(tag, props, ...children) {
  return fill(document.createElement(tag), props, children);
}

export function svg(tag, props, ...children) {
  return fill(document.createElementNS("http://www.w3.org/2000/svg", tag), props, children);
}

function fill(node, props, children) {
  for (const [name, value] of Object.entries(props ?? {})) {
    if (value === undefined || value === null || value === false) continue;
    if (name === "on") for (const [event, handler] of Object.entries(value)) node.addEventListener(event, handler);
    else if (name === "style") for (const [key, each] of Object.entries(value)) node.style.setProperty(key, each);
    else if (name === "value") node.value = value;
    else node.setAttribute(name, value === true ? "" : value);
  }
  node.append(...children.flat(Infinity).filter((child) => child !== null && child !== undefined && child !== false));
  return node;
}

/** Replaces what a node holds. */
export function put(node, ...children) {
  node.replaceChildren(...children.flat(Infinity).filter((child) => child !== null && child !== undefined && child !== false));
  return node;
}

const SHAPES = {
  failed: () => [
    svg("rect", { x: 1, y: 1, width: 12, height: 12, rx: 2.5, fill: "var(--failed)" }),
    svg("path", { d: "M4.5 4.5l5 5m0-5l-5 5", stroke: "var(--page)", "stroke-width": 1.7, "stroke-linecap": "round" }),
  ],
  warning: () => [
    svg("path", { d: "M7 1.5L13.2 12.5H.8z", fill: "var(--warning-glyph)", "stroke-linejoin": "round" }),
    svg("path", { d: "M7 5.5v3.200m0 1.600v.4", stroke: "var(--page)", "stroke-width": 1.5, "stroke-linecap": "round" }),
  ],
  running: () => [
    svg("circle", { cx: 7, cy: 7, r: 5.8, fill: "none", stroke: "var(--line2)", "stroke-width": 1.4 }),
    svg("circle", { cx: 7, cy: 7, r: 3.8, fill: "var(--ink1)" }),
  ],
  lost: () => [
    svg("circle", { cx: 7, cy: 7, r: 4.8, fill: "none", stroke: "var(--warning-glyph)", "stroke-width": 1.6 }),
    svg("path", { d: "M3.6 10.4l6.8-6.8", stroke: "var(--warning-glyph)", "stroke-width": 1.6 }),
  ],
  waiting: () => [svg("circle", { cx: 7, cy: 7, r: 4.6, fill: "none", stroke: "var(--ink2)", "stroke-width": 1.6, "stroke-dasharray": "2.2 2" })],
  stopped: () => [svg("rect", { x: 3, y: 3, width: 8, height: 8, rx: 1, fill: "var(--ink3)" })],
  finished: () => [svg("path", { d: "M2.5 7.5l3 3 6-7", fill: "none", stroke: "var(--ink2)", "stroke-width": 1.6, "stroke-linecap": "round", "stroke-linejoin": "round" })],
  "not started": () => [svg("path", { d: "M3 7h8", stroke: "var(--ink3)", "stroke-width": 1.6 })],
};
const WORDS = { RUNNING: "running", FINISHED: "finished", FAILED: "failed", STOPPED: "stopped", NEW: "not started", UNREADABLE: "lost" };

/** The word for a status of the API. */
export const word = (status) => WORDS[status] ?? String(status).toLowerCase();

/** A status as a shape; `said`: the word is not beside it. */
export function glyph(kind, said = false) {
  const props = said ? { role: "img", "aria-label": kind } : { "aria-hidden": "true" };
  return svg("svg", { class: "glyph", viewBox: "0 0 14 14", ...props }, (SHAPES[kind] ?? SHAPES["not started"])());
}

/** A set of buttons of which one is chosen. */
export function choice(name, options, chosen, choose) {
  const buttons = options.map(([value, label]) =>
    el("button", { type: "button", "aria-pressed": String(value === chosen), on: { click: () => choose(value) } }, label));
  return el("div", { class: "choice", role: "group", "aria-label": name }, buttons);
}

let unfolded = false;
/** Controls of the axes; on a narrow page they are behind a button until it is pressed. */
export function folded(...controls) {
  const inner = el("div", { class: unfolded ? "axis-controls" : "axis-controls folded" }, ...controls);
  const button = el("button", { type: "button", class: "bare unfold", "aria-expanded": String(unfolded), on: { click: () => {
    unfolded = !unfolded;
    inner.classList.toggle("folded", !unfolded);
    button.setAttribute("aria-expanded", String(unfolded));
  } } }, "axes ▾");
  return [button, inner];
}

/** What stands where there is nothing: why, and the command that fills it. */
export function empty(title, text, command, ...more) {
  return el("div", { class: "empty" }, el("h2", {}, title), text && el("p", {}, text), command && el("div", { class: "command" }, el("code", {}, command)), ...more);
}

export function notice(kind, ...text) {
  return el("div", { class: kind === "failed" ? "notice failed" : "notice", role: "note" }, glyph(kind), el("div", {}, ...text));
}

/** Text in which what stands between backquotes is code. */
export const coded = (text) => text.split("`").map((part, at) => (at % 2 ? el("code", {}, part) : part));

/** A dialog that is open until it is closed; returns it. `Escape` closes it. */
export function dialog(title, ...content) {
  const node = el("dialog", { "aria-label": typeof title === "string" ? title : undefined, on: { close: () => node.remove() } }, el("h2", {}, title), ...content);
  node.addEventListener("click", (event) => event.target === node && node.close());
  document.body.append(node);
  node.showModal();
  return node;
}

/** A panel under a button, that closes by itself. */
export function popover(anchor, ...content) {
  const node = el("div", { popover: "auto", on: { toggle: (event) => event.newState === "closed" && node.remove() } }, ...content);
  document.body.append(node);
  node.showPopover();
  const at = anchor.getBoundingClientRect();
  node.style.top = `${at.bottom + 4}px`;
  node.style.left = `${Math.max(8, Math.min(at.left, innerWidth - node.offsetWidth - 8))}px`;
  return node;
}
