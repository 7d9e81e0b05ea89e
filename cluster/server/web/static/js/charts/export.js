/** Saves what a chart shows. */

import { colour } from "../colours.js";
import { svg } from "../dom.js";

function save(blob, name) {
  const link = document.createElement("a");
  link.href = URL.createObjectURL(blob);
  link.download = name;
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 10_000);
}

/** A cell that no spreadsheet reads as a formula. */
function cell(text) {
  const safe = /^[=+\-@\t\r]/.test(text) ? `'${text}` : text;
  return /[",\n\r]/.test(safe) ? `"${safe.replaceAll('"', '""')}"` : safe;
}

/** The points that are shown: x, and a column for each line. */
export function saveCsv({ xName, series }, name) {
  const rows = new Map();
  series.forEach(({ x, y }, column) => x.forEach((at, index) => {
    if (!rows.has(at)) rows.set(at, new Array(series.length).fill(""));
    rows.get(at)[column] = y[index] ?? "";
  }));
  const heads = series.map(({ label, kind, name: own }, index) => {
    if (kind === "edge") return cell(own);
    const raw = kind === "raw" || !series.some((other, at) => at !== index && other.label === label);
    return cell(raw ? label : `${label} (smoothed)`);
  });
  const lines = [[cell(xName), ...heads], ...[...rows].sort(([a], [b]) => a - b).map(([x, values]) => [x, ...values])];
  save(new Blob([lines.map((line) => line.join(",")).join("\n") + "\n"], { type: "text/csv" }), `${name}.csv`);
}

/** The charts as they are drawn, one under the other. */
export function savePng(charts, name) {
  const ratio = devicePixelRatio, head = 28 * ratio, sources = charts.map(({ u }) => u.ctx.canvas);
  const canvas = document.createElement("canvas"), ctx = canvas.getContext("2d");
  canvas.width = Math.max(...sources.map(({ width }) => width)) + 24 * ratio;
  canvas.height = sources.reduce((sum, { height }) => sum + height + head, 12 * ratio);
  ctx.fillStyle = colour("--page");
  ctx.fillRect(0, 0, canvas.width, canvas.height);
  let top = 0;
  charts.forEach(({ options }, index) => {
    ctx.fillStyle = colour("--ink1");
    ctx.font = `600 ${13 * ratio}px Inter, sans-serif`;
    ctx.fillText(`${options.name}  ${options.unit ?? ""}`, 12 * ratio, top + 19 * ratio);
    ctx.drawImage(sources[index], 12 * ratio, top + head);
    top += head + sources[index].height;
  });
  canvas.toBlob((blob) => save(blob, `${name}.png`));
}

/** One chart as lines and text. */
export function saveSvg(chart, name) {
  const { u, shown, options, xs, ys } = chart, wide = u.width, tall = u.height + 28, ratio = devicePixelRatio;
  const box = { left: u.bbox.left / ratio, top: u.bbox.top / ratio + 28, width: u.bbox.width / ratio, height: u.bbox.height / ratio };
  const x = (value) => box.left + u.valToPos(value, "x"), y = (value) => box.top + u.valToPos(value, "y");
  const text = (at, down, said, more = {}) => svg("text", { x: at.toFixed(1), y: down.toFixed(1), fill: colour("--ink3"), "font-size": 11, ...more }, said);
  const ticks = (axis) => (u.axes[axis]._splits ?? []).filter((value) => value !== null);
  const clip = svg("clipPath", { id: "plot" }, svg("rect", { x: box.left, y: box.top, width: box.width, height: box.height }));
  const node = svg("svg", { xmlns: "http://www.w3.org/2000/svg", viewBox: `0 0 ${wide} ${tall}`, width: wide, height: tall, "font-family": "Inter, system-ui, sans-serif" },
    svg("defs", {}, clip), svg("rect", { width: wide, height: tall, fill: colour("--page") }),
    text(8, 18, `${options.name} ${options.unit ?? ""}`, { fill: colour("--ink1"), "font-size": 13 }),
    ticks(1).filter((value) => value >= ys[0] && value <= ys[1]).map((value) => [svg("path", { d: `M${box.left} ${y(value)}h${box.width}`, stroke: colour("--line") }), text(box.left - 6, y(value) + 4, options.format(value), { "text-anchor": "end" })]),
    ticks(0).filter((value) => value >= xs[0] && value <= xs[1]).map((value) => text(x(value), box.top + box.height + 16, options.xFormat(value), { "text-anchor": "middle" })),
    svg("g", { "clip-path": "url(#plot)", fill: "none" }, shown.series.map((each, index) => (each.kind === "edge" ? each.upper && band(each, shown.series[index + 1], x, y) : svg("path", { d: path(each, x, y), stroke: colour(each.colour), "stroke-width": each.kind === "raw" ? 1 : 1.75, "stroke-opacity": each.kind === "raw" ? 0.28 : 1, "stroke-dasharray": each.dash?.join(" ") })))),
    shown.series.filter(({ end, said }) => end && said).map(({ end, said, colour: own }) => text(x(end[0]) + 8, y(end[1]) + 4, said, { fill: colour(own), "font-weight": 600 })));
  save(new Blob([new XMLSerializer().serializeToString(node)], { type: "image/svg+xml" }), `${name}.svg`);
}

/** Between two edges, each unbroken piece by itself. */
function band(edge, other, x, y) {
  const pieces = [[]];
  edge.x.forEach((at, index) => (edge.y[index] === null ? pieces.push([]) : pieces.at(-1).push(index)));
  const point = (line, index) => `${x(line.x[index]).toFixed(1)} ${y(line.y[index]).toFixed(1)}`;
  const drawn = pieces.filter((piece) => piece.length > 1).map((piece) => `M${[...piece.map((index) => point(edge, index)), ...piece.toReversed().map((index) => point(other, index))].join("L")}Z`);
  return svg("path", { d: drawn.join(""), fill: colour(edge.colour), "fill-opacity": 0.16 });
}

function path({ x: xs, y: ys }, x, y) {
  let drawing = false;
  return xs.map((at, index) => {
    if (ys[index] === null) {
      drawing = false;
      return "";
    }
    const point = `${drawing ? "L" : "M"}${x(at).toFixed(1)} ${y(ys[index]).toFixed(1)}`;
    drawing = true;
    return point;
  }).join("");
}
