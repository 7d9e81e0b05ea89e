/** What the server says has changed. A message only says that; what is true now is asked for. */

import { runs } from "./api.js";
import { el } from "./dom.js";

const listeners = new Set();
let last = Date.now(), connected = false, source = null, lostAt = null;

export const status = el("div", { class: "live" }, el("span", {}, "connecting"), el("span", { class: "age" }));
export const polite = el("div", { class: "for-readers", "aria-live": "polite" });

/** Calls `heard(ids)` when runs have changed (a Set; empty: any); returns a function that ends it. */
export function listen(heard) {
  listeners.add(heard);
  return () => listeners.delete(heard);
}

/** Something new is on the page. */
export function fresh() {
  last = Date.now();
  show();
}

function show() {
  const [said, age] = status.children;
  const lost = !connected && lostAt !== null && Date.now() - lostAt > 3000;
  status.classList.toggle("lost", lost);
  said.textContent = lost ? "no answer" : connected || lostAt === null ? "live" : "connecting";
  const seconds = Math.round((Date.now() - last) / 1000);
  age.textContent = seconds < 60 ? `, ${seconds} s ago` : `, ${Math.round(seconds / 60)} min ago`;
  status.title = lost
    ? "The server does not answer. Runs go on without this page; it shows their last known state and tries again."
    : "Changes come by themselves.";
}

export function connect() {
  source = new EventSource("/api/changes");
  source.addEventListener("open", () => {
    const again = lostAt !== null;
    connected = true;
    lostAt = null;
    fresh();
    if (again) for (const heard of listeners) heard(new Set());
  });
  source.addEventListener("version", (event) => {
    if (runs.etag !== `"${event.data}"`) for (const heard of listeners) heard(new Set());
  });
  source.addEventListener("changed", (event) => {
    connected = true;
    const { runs } = JSON.parse(event.data);
    for (const heard of listeners) heard(new Set(runs));
  });
  source.addEventListener("error", () => {
    connected = false;
    lostAt ??= Date.now();
    if (source.readyState === EventSource.CLOSED) setTimeout(connect, 5000);
    show();
  });
  addEventListener("pagehide", () => source.close());
  setInterval(show, 1000);
}

let said = 0;
/** Tells a screen reader, once a minute at most. */
export function announce(text) {
  if (Date.now() - said < 60_000) return;
  said = Date.now();
  polite.textContent = text;
}

/** Calls `work` once after `wait` ms however often it is asked, and never twice at a time. */
export function calmly(work, wait = 200) {
  let timer = null, running = false, again = false;
  async function go() {
    timer = null;
    if (running) return void (again = true);
    running = true;
    try {
      await work();
    } finally {
      running = false;
      if (again) ask();
      again = false;
    }
  }
  function ask() {
    timer ??= setTimeout(go, wait);
  }
  return ask;
}
