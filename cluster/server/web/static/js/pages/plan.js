/** Does it fit, how long, how much? */

import { get, post } from "../api.js";
import { command, copy } from "../copy.js";
import { coded, dialog, el, notice, put } from "../dom.js";
import { bytes, compact, whole } from "../format.js";
import { announce, calmly } from "../live.js";
import { change, state } from "../router.js";
import { titled } from "../shell.js";
import { Results, days } from "./plan_results.js";
import { queueing } from "./plan_submit.js";

/** In place of a preset's name. */
const OWN = "own", FIRST = "moe-8x7b";
/** Keys with a field of their own: [key, label]; the others are written as `KEY=VALUE`. */
const SIZE = [["train.global_batch", "global_batch"], ["train.seq_len", "seq_len"], ["train.steps", "steps"]];
const DEGREES = [["parallel.dp", "dp"], ["parallel.tp", "tp"], ["parallel.pp", "pp"], ["parallel.ep", "ep"], ["parallel.sp", "sp"], ["parallel.zero_stage", "ZeRO"]];
const MICRO = ["train.micro_batch", "micro_batch"], REDO = "train.activation_checkpointing";
/** What a search chooses by itself. */
const SEARCHED = new Set([...DEGREES.map(([key]) => key), "parallel.pp_schedule", MICRO[0], REDO]);
const FIELDS = new Set([...SIZE, ...DEGREES, MICRO].map(([key]) => key)).add(REDO);
const OPTIONS = { "--gpus": "gpus", "--gpu": "gpu", "--usd-per-gpu-hour": "price" };
/** Characters of a config that an address holds. */
const MOST_IN_ADDRESS = 6000;
const KEYS = [["j k", "topology"], ["↵", "take it"], ["q", "the quickest"], ["y", "copy the command"], ["s", "submit"]];

export function open(outlet) {
  return new Plan(outlet);
}

class Plan {
  constructor(outlet) {
    Object.assign(this, { text: state().get("yaml") ?? "", fields: new Map() }); // a text that is too long for the address is here alone
    this.title = el("h1", {}, "Plan");
    this.buttons = el("div", { class: "buttons" });
    this.form = el("form", { class: "plan-form", "aria-label": "What is planned", on: { submit: (event) => event.preventDefault() } });
    this.results = new Results({ take: (choice) => this.take(choice), set: (text) => this.set(...parted(text)) });
    outlet.append(el("div", { class: "planner" }, el("div", { class: "title-row" }, this.title, el("div", { class: "space" }), this.buttons), el("div", { class: "plan-two" }, this.form, el("div", { class: "plan-results" }, this.results.node))));
    this.ask = calmly(() => this.load(), 120);
    titled("Plan", KEYS);
    this.begin();
  }

  close() {
    this.closed = true;
    clearTimeout(this.waiting);
  }

  async begin() {
    try {
      this.options = await get("/api/plan");
    } catch (error) {
      if (!this.closed) put(this.results.node, notice("failed", el("b", {}, "It cannot be planned: "), error.message));
      return;
    }
    if (this.closed) return;
    this.build();
    this.ask();
  }

  update() {
    this.text = state().get("yaml") ?? this.text;
    if (this.options) this.ask();
  }

  get preset() {
    const asked = state().get("preset");
    if (asked === OWN) return OWN;
    return this.options.presets.includes(asked) ? asked : this.options.presets.includes(FIRST) ? FIRST : this.options.presets[0];
  }

  /** The text as an address holds it. */
  get short() {
    return this.text.length <= MOST_IN_ADDRESS ? this.text : null;
  }

  get overrides() {
    return state().getAll("set");
  }

  get asked() {
    const query = state(), own = this.preset === OWN, gpus = query.get("gpus"), price = query.get("price");
    return {
      preset: own ? "" : this.preset, text: own ? this.text || "{}" : "", overrides: this.overrides, gpu: query.get("gpu") ?? "h100",
      gpus: gpus ? Number(gpus) : query.size ? null : 64, usd_per_gpu_hour: price ? Number(price) : null,
    };
  }

  /** Sets one key, or takes it out. */
  set(key, value) {
    const others = this.overrides.filter((each) => parted(each)[0] !== key);
    const known = { preset: this.preset, gpus: this.asked.gpus };
    if (key === "parallel.dp" && value) known.gpus = null; // it follows from the other
    change({ ...known, set: value === "" ? others : [...others, `${key}=${value}`] }, { push: true });
  }

  option(name, value) {
    const set = name === "gpus" ? this.overrides.filter((each) => parted(each)[0] !== "parallel.dp") : this.overrides;
    change({ preset: this.preset, gpus: this.asked.gpus, set, [name]: value }, { push: true });
  }

  take(choice) {
    const topology = choice.overrides.filter((each) => parted(each)[0] !== "parallel.dp");
    change({ preset: this.preset, gpus: choice.devices, set: [...this.overrides.filter((each) => !SEARCHED.has(parted(each)[0])), ...topology] }, { push: true });
  }

  build() {
    const { presets, devices } = this.options;
    const preset = el("select", { on: { change: (event) => change({ preset: event.target.value, set: null, gpus: this.asked.gpus, yaml: event.target.value === OWN ? this.short : null }, { push: true }) } }, presets.map((name) => el("option", { value: name }, name)), el("option", { value: OWN }, "my own YAML"));
    this.yaml = el("textarea", { rows: 8, spellcheck: "false", placeholder: "base: quickstart\nmodel: {num_layers: 8}", on: { change: () => this.paste() } });
    const kinds = el("select", { on: { change: (event) => this.option("gpu", event.target.value) } }, devices.map(({ name, memory }) => el("option", { value: name }, memory ? `${name.toUpperCase()}, ${bytes(memory)}` : "CPU core")));
    const redo = el("select", { on: { change: (event) => this.set(REDO, event.target.value) } }, ["none", "selective", "full"].map((each) => el("option", { value: each }, each)));
    this.others = el("textarea", { rows: 3, spellcheck: "false", placeholder: "optim.lr=3e-4", on: { change: () => this.setOthers() } });
    put(this.form,
      el("fieldset", {}, el("legend", {}, "Model"), this.field("preset", "preset", preset), (this.ownText = this.field("yaml", "config", this.yaml, "tall")), SIZE.map((each) => this.keyField(each))),
      el("fieldset", {}, el("legend", {}, "Cluster"), this.field("gpu", "device", kinds), this.field("gpus", "number", this.numeric((value) => this.option("gpus", value))), this.field("price", "USD an hour", this.numeric((value) => this.option("price", value)))),
      el("fieldset", {}, el("legend", {}, "Topology", el("small", {}, "or from the table")), el("div", { class: "thirds" }, DEGREES.map((each) => this.keyField(each))), this.keyField(MICRO), this.field(REDO, "recompute", redo)),
      el("fieldset", {}, el("legend", {}, "Keys", el("small", {}, "anything else, one a line")), this.field("others", "KEY=VALUE", this.others, "tall")));
  }

  numeric(changed) {
    const input = el("input", { type: "text", inputmode: "decimal", class: "number", on: { change: () => {
      const text = input.value.replace(/[, ]/g, "");
      changed(text === "" || Number.isFinite(Number(text)) ? text : input.value);
    } } });
    return input;
  }

  keyField([key, label]) {
    return this.field(key, label, this.numeric((value) => this.set(key, value)));
  }

  field(name, label, input, more = "") {
    const wrong = el("div", { class: "wrong", id: `wrong-${name}`, role: "alert" }), help = el("div", { class: "help" });
    input.id = `field-${name}`;
    const node = el("div", { class: `field ${more}` }, el("label", { for: input.id, class: more && "for-readers", title: name }, label), input, help, wrong);
    this.fields.set(name, { node, input, wrong, help });
    return node;
  }

  paste() {
    this.text = this.yaml.value;
    change({ preset: OWN, yaml: this.short }, { push: true });
    this.ask();
  }

  setOthers() {
    const own = this.overrides.filter((each) => FIELDS.has(parted(each)[0]));
    const others = this.others.value.split("\n").map((line) => line.trim()).filter(Boolean);
    change({ preset: this.preset, gpus: this.asked.gpus, set: [...own, ...others] }, { push: true });
  }

  async load() {
    const { asked } = this, turn = (this.turn = (this.turn ?? 0) + 1);
    this.wants = JSON.stringify({ ...asked, overrides: asked.overrides.filter((each) => !SEARCHED.has(parted(each)[0])) });
    let told;
    try {
      told = await post("/api/plan", asked);
    } catch (error) {
      told = { error: error.message, key: null };
    }
    if (turn !== this.turn || this.closed) return;
    this.told = told;
    this.fill();
    this.show();
    if (this.searched !== this.wants) this.search();
  }

  /** Asks for the topologies until they are known. */
  async search() {
    clearTimeout(this.waiting);
    const wanted = this.wants;
    let told;
    try {
      told = await post("/api/plan/topologies", JSON.parse(wanted));
    } catch (error) {
      told = { working: false, error: error.message, found: null };
    }
    if (wanted !== this.wants || this.closed) return;
    this.topologies = told;
    if (told.working) this.waiting = setTimeout(() => this.search(), 700);
    else this.searched = wanted;
    this.show();
  }

  /** The form as the address and the plan have it. */
  fill() {
    const { told, asked } = this, own = this.preset === OWN, given = new Map(asked.overrides.map(parted));
    const write = (name, value, strong = false) => {
      const { input } = this.fields.get(name);
      if (document.activeElement !== input || input.tagName === "SELECT") input.value = value ?? "";
      input.classList.toggle("given", strong);
    };
    write("preset", this.preset);
    this.ownText.hidden = !own;
    write("yaml", this.text);
    write("gpu", asked.gpu);
    write("gpus", asked.gpus ?? told.plan?.devices ?? "");
    write("price", asked.usd_per_gpu_hour);
    for (const key of FIELDS) write(key, separated(given.get(key) ?? told.used?.[key] ?? this.used?.[key]), given.has(key));
    write("others", asked.overrides.filter((each) => !FIELDS.has(parted(each)[0])).join("\n"));
    if (told.used && told.plan) this.used = told.used;
    const { plan } = told;
    this.fields.get("preset").help.textContent = plan ? `${compact(plan.parameters)} parameters${plan.active_parameters < plan.parameters ? `, ${compact(plan.active_parameters)} active` : ""}, ${compact(plan.flops_per_token)}FLOPs a token in training`.replace("BFLOPs", " GFLOPs").replace("MFLOPs", " MFLOPs").replace("TFLOPs", " TFLOPs") : "";
    this.fields.get("train.steps").help.textContent = plan ? `${compact(plan.tokens_per_step)} tokens a step, ${compact(plan.tokens_per_step * told.used["train.steps"])} in all` : "";
    this.fields.get("yaml").help.textContent = own && this.text.length > MOST_IN_ADDRESS ? "It is too long for the address: a link to this page does not hold it." : "";
    this.mark();
  }

  /** The message, at the field that it names. */
  mark() {
    const { error, key } = this.told, own = this.preset === OWN;
    const others = this.overrides.some((each) => parted(each)[0] === key) ? "others" : null;
    const at = error ? OPTIONS[key] ?? (FIELDS.has(key) ? key : others ?? (own ? "yaml" : "others")) : null;
    for (const [name, { wrong, input }] of this.fields) {
      wrong.textContent = name === at ? error : "";
      input.toggleAttribute("aria-invalid", name === at);
      if (name === at) input.setAttribute("aria-describedby", wrong.id);
      else input.removeAttribute("aria-describedby");
    }
  }

  show() {
    const { told, topologies } = this, { plan, error } = told, found = topologies?.found, best = found?.choices[0];
    const devices = this.asked.gpus ?? plan?.devices, price = plan?.usd === undefined ? "" : `, ${whole(plan.usd)} USD`;
    const least = found?.least_memory_of_too_large;
    const rest = topologies?.working || !topologies ? "The topologies are being compared." : topologies.error ? "" : best ? `The quickest of ${found.choices.length} topolog${found.choices.length === 1 ? "y" : "ies"} that fit takes ${days(best.hours)}.` : `No topology of ${whole(devices)} fits${least ? `; the smallest needs ${bytes(least)}` : ""}.`;
    const main = error ? "It cannot run." : plan.fits ? `It fits: ${days(plan.hours)}${price}.` : `It does not fit: ${bytes(plan.memory.peak)} of ${bytes(plan.memory_of_device)}.`;
    put(this.title, main, " ", el("span", { class: "rest" }, rest));
    const { commands } = told;
    put(this.buttons,
      el("button", { type: "button", disabled: !commands, on: { click: (event) => this.copy(event.currentTarget) } }, "Copy the command", el("kbd", {}, "y")),
      el("button", { type: "button", disabled: !best, on: { click: () => this.take(best) } }, "Take the quickest", el("kbd", {}, "q")),
      el("button", { type: "button", class: "filled", disabled: !commands, on: { click: () => this.submit() } }, "Submit this"));
    this.results.show(told, topologies, this.options.devices.find(({ name }) => name === this.asked.gpu)?.memory);
    announce(`${main} ${rest}`);
  }

  copy(button) {
    copy(this.told.commands.plan, el("code", {}), button);
  }

  submit() {
    const { commands, plan } = this.told, own = this.preset === OWN, { roots } = this.options;
    const typed = [
      el("p", { class: "quiet" }, `${own ? "Save the config as config.yaml. " : ""}To a cluster’s queue, from a machine that has its address:`), command(commands.submit, "the command that submits it"),
      el("p", { class: "quiet" }, "Or here, on this machine’s devices:"), command(commands.train, "the command that trains it"),
    ];
    const doubt = !plan.fits && notice("warning", "The plan says that it does not fit.");
    if (roots?.length) return void queueing({ sent: this.asked, told: this.told, roots, doubt, typed, title: this.title.firstChild.textContent });
    const why = roots ? "This server shows no folder of runs yet, which a page submits to: `muster cluster up --root /shared/runs` names one." : "This server has no queue. The dashboard of a cluster, `muster cluster up`, submits from this page.";
    const shown = dialog("Submit this run", doubt, el("p", {}, coded(why)), typed,
      el("div", { class: "buttons" }, el("button", { type: "button", autofocus: true, on: { click: () => shown.close() } }, "Close", el("kbd", {}, "esc"))));
  }

  key(key) {
    if (key === "y" && this.told?.commands) this.copy(this.buttons.firstChild);
    else if (key === "s" && this.told?.commands) this.submit();
    else if (key === "q" && this.topologies?.found?.choices[0]) this.take(this.topologies.found.choices[0]);
    else return this.results.key(key);
    return true;
  }
}

/** 250,000 */
const separated = (value) => (/^\d{5,}$/.test(value ?? "") ? Number(value).toLocaleString("en-US") : value);

/** Key and value of `KEY=VALUE`. */
function parted(text) {
  const at = text.indexOf("=");
  return at < 0 ? [text, ""] : [text.slice(0, at), text.slice(at + 1)];
}
