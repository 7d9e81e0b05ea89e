/** Where the ranks stood when a run hung: equal stacks together, the odd one out last. */

import { get, runPath } from "../api.js";
import { el, notice, put } from "../dom.js";
import { clock, whole } from "../format.js";

const NAMED = 24;

export class Stacks {
  constructor(id, node) {
    Object.assign(this, { id, node });
  }

  async show({ files, row }) {
    const saved = files.some(({ name, bytes }) => bytes > 0 && /^stacks\/attempt-\d+-rank-\d+\.txt$/.test(name));
    if (!saved) return void put(this.node);
    if (this.attempts === row.attempts) return;
    try {
      const { attempt, reason, time, ranks } = await get(runPath(this.id, "/stacks"));
      this.attempts = row.attempts;
      put(this.node, el("h2", {}, "Stacks", el("small", {}, `attempt ${attempt}${time ? `, ${clock(time)}` : ""}: equal stacks together, the odd one out last`)), reason && el("p", { class: "quiet" }, reason), groups(ranks));
    } catch (error) {
      put(this.node, notice("warning", el("b", {}, "The stacks cannot be read: "), error.message, "."));
    }
  }
}

function groups(ranks) {
  const found = new Map();
  for (const rank of ranks) {
    const same = JSON.stringify([rank.frames, rank.suspect, rank.step, rank.phase]);
    if (!found.has(same)) found.set(same, []);
    found.get(same).push(rank);
  }
  const all = [...found.values()].sort((a, b) => a[0].suspect - b[0].suspect || b.length - a.length);
  return el("div", { class: "stacks" }, all.map((some) => {
    const { frames, suspect, waits, host, step, phase } = some[0], [where, ...outer] = frames;
    const names = some.slice(0, NAMED).map(({ rank }) => rank).join(" ") + (some.length > NAMED ? " …" : "");
    const [place, name] = (where ?? "").split(" in ");
    const doing = suspect ? `on ${host ?? "an unknown machine"}${step === null ? "" : `, step ${whole(step)} (${phase})`}` : waits ? "waits for others" : step === null ? "" : `step ${whole(step)} (${phase})`;
    return el("details", { class: suspect ? "stack odd" : "stack" },
      el("summary", {}, el("b", {}, `${some.length} ${some.length === 1 ? "rank" : "ranks"}`), el("span", { class: "mono quiet" }, names), el("span", { class: "mono where" }, where ? [el("b", {}, name), ` ${place}`] : "did not say where it stood"), el("span", { class: suspect ? "failed" : "quiet" }, doing)),
      outer.length > 0 && el("pre", { tabindex: "0" }, frames.join("\n")));
  }));
}
