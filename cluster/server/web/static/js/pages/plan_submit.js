/** Asks before a run is queued: under which name, where, and how urgent it is. */

import { post } from "../api.js";
import { dialog, el, glyph, notice, put } from "../dom.js";
import { go } from "../router.js";

/**
 * `sent`: the form that was planned; `told`: its plan; `roots`: folders that the server lets a page submit to;
 * `doubt`: a warning, or false; `typed`: the same on a command line; `title`: what the plan says.
 */
export function queueing({ sent, told, roots, doubt, typed, title }) {
  const own = (key) => told.overrides.findLast((each) => each.startsWith(`${key}=`))?.slice(key.length + 1);
  const name = el("input", { type: "text", class: "mono", value: told.run, spellcheck: "false", autocomplete: "off" });
  const root = el("select", {}, roots.map((each) => el("option", { value: each, selected: each === own("run.root") }, each)));
  const priority = el("input", { type: "number", step: 1, value: 0, class: "priority number" });
  const patient = el("input", { type: "checkbox", on: { change: () => ask() } });
  const needs = el("div", { class: "needs", role: "status" });
  const wrong = el("div", { role: "alert" });
  let asking = 0;
  const field = (label, input) => el("label", { class: "field" }, el("span", {}, label), input);
  const submit = el("button", { type: "button", class: "filled", on: { click: () => send() } }, "Submit");
  const body = el("div", {},
    el("p", {}, title), doubt, needs,
    field("run.name", name), field("run.root", root), field("priority", priority),
    el("label", { class: "check" }, patient, "Queue it even if the cluster is too small now"),
    el("p", { class: "quiet" }, "It is trained by the muster that the cluster has installed. A page sends the config alone: no file and no plugin."),
    el("details", {}, el("summary", {}, "On a command line"), typed), wrong,
    el("div", { class: "buttons" }, el("button", { type: "button", class: "bare", autofocus: true, on: { click: () => shown.close() } }, "Do not submit", el("kbd", {}, "esc")), submit));
  const shown = dialog("Submit this run?", body);
  root.addEventListener("change", () => ask());
  ask();

  /** The run as it is asked for. */
  function wanted() {
    const others = told.overrides.filter((each) => !each.startsWith("run.name=") && !each.startsWith("run.root="));
    return { preset: sent.preset, text: sent.text, priority: Number(priority.value), queue: patient.checked, overrides: [...others, `run.name=${name.value.trim()}`, `run.root=${root.value}`] };
  }

  /** Says what it will reserve on this cluster, or why it would be refused. */
  async function ask() {
    const turn = (asking += 1);
    let said;
    try {
      const { gang, why } = await post("/api/submit/needs", { ...wanted(), priority: 0 });
      said = gang ? ["It asks the cluster for ", el("b", {}, gang), "."] : notice("warning", "It would be refused: ", why);
    } catch (error) {
      said = notice("warning", error.message);
    }
    if (turn === asking) put(needs, said);
  }

  async function send() {
    if (!/^-?\d+$/.test(priority.value.trim())) return void put(wrong, notice("failed", "A priority is a whole number."));
    submit.disabled = true; // once is enough
    try {
      const job = await post("/api/submit", wanted());
      put(body, el("p", {}, glyph("waiting"), " ", el("b", { class: "mono" }, job.id), job.ahead ? ` is queued behind ${job.ahead}.` : " is next in the queue."),
        job.outlook.why && el("p", { class: "quiet" }, job.outlook.why),
        el("div", { class: "buttons" }, el("button", { type: "button", class: "bare", on: { click: () => shown.close() } }, "Close", el("kbd", {}, "esc")),
          el("button", { type: "button", class: "filled", autofocus: true, on: { click: () => (shown.close(), go("/now")) } }, "To the queue")));
      body.querySelector(".filled").focus();
    } catch (error) {
      put(wrong, notice("failed", error.message));
      submit.disabled = false;
    }
  }
}
