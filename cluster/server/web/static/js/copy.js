/** A command that can be copied. */

import { el } from "./dom.js";
import { polite } from "./live.js";

/** The command with its button; `name`: what it is, for those who do not see it. */
export function command(text, name = "the command") {
  const code = el("code", {}, text), button = el("button", { type: "button", "aria-label": `Copy ${name}`, on: { click: () => copy(text, code, button) } }, "Copy");
  return el("div", { class: "command" }, code, button);
}

export async function copy(text, shown, button) {
  try {
    await navigator.clipboard.writeText(text);
  } catch { // over plain HTTP there is no clipboard: it is selected, and the browser's own copying takes it
    getSelection().selectAllChildren(shown);
    if (!document.execCommand("copy")) return void told(button, "Selected: press Ctrl-C");
  }
  told(button, "Copied");
}

function told(button, text) {
  const before = button.textContent;
  button.textContent = polite.textContent = text;
  setTimeout(() => (button.textContent = before), 2000);
}
