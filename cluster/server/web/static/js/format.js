/** Numbers, times and names as a person reads them. What is missing is a dash. */

export const DASH = "–";
const there = (value) => typeof value === "number" && Number.isFinite(value);

/** 4.026, 0.00123, 1e-7: so many significant digits, and for losses always the same decimals. */
export function loss(value) {
  if (!there(value)) return DASH;
  return Math.abs(value) >= 1e4 || (value !== 0 && Math.abs(value) < 5e-4) ? value.toExponential(2) : value.toFixed(3);
}

/** So many significant digits; below `least` as 4.7e-4. */
export function number(value, digits = 3, least = 1e-4) {
  if (!there(value)) return DASH;
  if (value === 0) return "0";
  const size = Math.abs(value);
  if (size >= 1e15 || size < least) return value.toExponential(digits - 1).replace(/\.?0+e/, "e").replace("e+", "e");
  if (size >= 1e4) return compact(value, digits);
  return String(Number(value.toPrecision(digits)));
}

/** 214k, 5.51M, 1.3B */
export function compact(value, digits = 3) {
  if (!there(value)) return DASH;
  if (Math.abs(value) >= 1e15) return number(value, digits);
  for (const [size, letter] of [[1e12, "T"], [1e9, "B"], [1e6, "M"], [1e3, "k"]]) {
    if (Math.abs(value) >= size * 0.9995) return Number((value / size).toPrecision(digits)) + letter;
  }
  return String(Number(value.toPrecision(digits)));
}

/** On an axis there is little room. */
export const tick = (value, digits = 3) => (Math.abs(value) >= 1000 ? compact(value, digits) : number(value, digits, 1e-3));

export const whole = (value) => (there(value) ? Math.round(value).toLocaleString("en-US") : DASH);
export const percent = (share, digits = 0) => (there(share) ? (100 * share).toFixed(digits) : DASH);

/** 0.3 s, 58 s, 1.8 min, 3 h 20 min, 19 d 4 h; `digits`: more of what is below 10 s */
export function duration(seconds, digits = 2) {
  if (!there(seconds)) return DASH;
  if (seconds === 0) return "0 s";
  if (seconds < 0.0995) return seconds < 1e-3 ? `${Number((seconds * 1e6).toPrecision(digits))} µs` : `${Number((seconds * 1e3).toPrecision(digits))} ms`;
  if (seconds < 9.95) return `${Number(digits > 2 ? seconds.toPrecision(digits) : seconds.toFixed(1))} s`;
  if (seconds < 59.5) return `${Math.round(seconds)} s`;
  if (seconds < 600) return `${(seconds / 60).toFixed(1)} min`;
  if (seconds < 3570) return `${Math.round(seconds / 60)} min`;
  const minutes = Math.round(seconds / 60);
  if (minutes < 1440) return `${Math.floor(minutes / 60)} h${minutes % 60 ? ` ${minutes % 60} min` : ""}`;
  const hours = Math.round(seconds / 3600);
  return hours < 24 * 100 ? `${Math.floor(hours / 24)} d${hours % 24 ? ` ${hours % 24} h` : ""}` : `${Math.round(hours / 24)} d`;
}

/** What a run counts, in words: tokens, images, masked tokens. */
export const unitWords = (unit) => unit.replaceAll("_", " ");

/** How long ago, in one unit. */
export function ago(time, now = Date.now() / 1000) {
  const seconds = Math.max(0, now - time);
  if (!there(seconds)) return DASH;
  if (seconds < 90) return `${Math.round(seconds)} s`;
  if (seconds < 5400) return `${Math.round(seconds / 60)} min`;
  if (seconds < 129600) return `${Math.round(seconds / 3600)} h`;
  return `${Math.round(seconds / 86400)} d`;
}

/** 13:09 today, 26 Nov 13:09 this year. */
export function clock(time) {
  if (!there(time)) return DASH;
  const date = new Date(time * 1000), now = new Date();
  const hours = date.toLocaleTimeString("en-GB", { hour: "2-digit", minute: "2-digit" });
  if (date.toDateString() === now.toDateString()) return hours;
  const day = date.toLocaleDateString("en-GB", { day: "numeric", month: "short" });
  return date.getFullYear() === now.getFullYear() ? `${day} ${hours}` : `${day} ${date.getFullYear()}`;
}

export function bytes(value) {
  if (!there(value)) return DASH;
  for (const [size, unit] of [[1e12, "TB"], [1e9, "GB"], [1e6, "MB"], [1e3, "kB"]]) {
    if (value >= size) return `${Number((value / size).toPrecision(3))} ${unit}`;
  }
  return `${value} B`;
}

/** A name cut in its middle: what tells seeds apart stands at the end. */
export function middle(name, most) {
  if (name.length <= most) return name;
  const end = Math.ceil((most - 1) * 0.6);
  return `${name.slice(0, most - 1 - end)}…${name.slice(-end)}`;
}

/** A value of a config in one line. */
export function plain(value) {
  if (value === null || value === undefined) return DASH;
  if (typeof value === "string") return value;
  return typeof value === "object" ? JSON.stringify(value) : String(value);
}

/** What all names begin with, up to a separator, if something is left of each. */
export function sharedPrefix(names) {
  if (names.length < 2) return "";
  let prefix = names[0];
  for (const name of names) while (!name.startsWith(prefix)) prefix = prefix.slice(0, -1);
  prefix = prefix.slice(0, Math.max(prefix.lastIndexOf("-"), prefix.lastIndexOf("_"), prefix.lastIndexOf("/")) + 1);
  return names.every((name) => name.length > prefix.length) ? prefix : "";
}
