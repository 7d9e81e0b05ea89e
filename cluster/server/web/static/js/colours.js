/** Colours as the present theme has them, and those of runs. */

import { runs } from "./api.js";

let known = new Map();
const probe = document.createElement("span");
probe.hidden = true;

/** What a custom property such as `--ink1` comes to, as `rgb(...)`; a canvas needs it. */
export function colour(name, alpha = 1) {
  const key = `${name}/${alpha}`;
  if (!known.has(key)) {
    if (!probe.isConnected) document.body.append(probe);
    probe.style.color = `var(${name})`;
    const found = getComputedStyle(probe).color;
    known.set(key, alpha === 1 ? found : found.replace(/^rgb\((.*)\)$/, `rgba($1, ${alpha})`));
  }
  return known.get(key);
}

/** Red, green and blue of a colour, 0 to 255. */
export const channels = (name) => colour(name).match(/[\d.]+/g).slice(0, 3).map(Number);

/** The theme has changed. */
export const forget = () => (known = new Map());

/** A run's colour, which it has for ever: the server keeps it in the run's folder. */
export function runColour(id) {
  return `--run${runs.columns.colour?.[runs.places.get(id)] || 1}`;
}

/** Colours and dashes of runs that are shown together: of two with the same hue the second is dashed. */
export function together(ids) {
  const seen = new Map();
  return ids.map((id) => {
    const name = runColour(id), times = seen.get(name) ?? 0;
    seen.set(name, times + 1);
    return { name, dash: times === 0 ? undefined : times === 1 ? [6, 4] : [2, 3] };
  });
}
