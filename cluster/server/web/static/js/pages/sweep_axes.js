/** Of a sweep over config keys: held-out loss by each key's value. */

import { Plane } from "../charts/plane.js";
import { el, put } from "../dom.js";
import { loss, number, plain } from "../format.js";

export class Axes {
  constructor(node) {
    Object.assign(this, { node, planes: new Map() });
    this.grid = el("div", { class: "axes" });
  }

  close() {
    for (const plane of this.planes.values()) plane.destroy();
  }

  show({ axes, trials }, colours) {
    if (!this.grid.isConnected) put(this.node, el("section", {}, el("h2", {}, "Held-out loss by key", el("small", {}, "one dot a finished trial; a cross: failed, at the top")), this.grid));
    const done = trials.filter((trial) => trial.state === "finished" && trial.eval_loss !== null), failed = trials.filter(({ state }) => state === "failed" || state === "diverged");
    for (const key of axes) {
      const known = [...done, ...failed].filter((trial) => trial.values[key] !== undefined && trial.values[key] !== null);
      const numbers = known.length > 0 && known.every((trial) => typeof trial.values[key] === "number");
      const values = numbers ? undefined : [...new Set(known.map((trial) => plain(trial.values[key])))].sort();
      const all = known.map((trial) => trial.values[key]), log = numbers && Math.min(...all) > 0 && Math.max(...all) / Math.min(...all) >= 8;
      const distinct = numbers ? [...new Set(all)].sort((a, b) => a - b) : [], ticks = distinct.length && distinct.length < 7 ? distinct : undefined;
      const settings = JSON.stringify([values, log, ticks]);
      if (this.planes.get(key)?.settings !== settings) {
        this.planes.get(key)?.destroy();
        const made = new Plane(this.grid, { name: key, height: 190, x: { name: key, log, values, ticks, format: (value) => number(value) }, y: { name: "held-out loss", format: (value) => number(value, 4) } });
        made.settings = settings;
        this.planes.set(key, made);
      }
      const x = (trial) => (numbers ? trial.values[key] : values.indexOf(plain(trial.values[key])));
      const top = done.length ? Math.max(...done.map((trial) => trial.eval_loss)) : 1;
      this.planes.get(key).set({ points: known.map((trial) => {
        const lost = trial.state !== "finished";
        return { x: x(trial), y: lost ? top : trial.eval_loss, colour: lost ? "var(--failed)" : colours.get(trial.variant), shape: lost ? "cross" : "dot", text: [trial.name, lost ? `${trial.state}: ${trial.reason}`.slice(0, 80) : `held-out loss ${loss(trial.eval_loss)}`, ...Object.entries(trial.values).map(([name, value]) => `${name}=${plain(value)}`)] };
      }), xs: values && [-0.5, values.length - 0.5] });
    }
  }
}
