/** Starts the pages. */

import { runs } from "./api.js";
import { el, notice } from "./dom.js";
import { connect, fresh } from "./live.js";
import * as compare from "./pages/compare.js";
import * as now from "./pages/now.js";
import * as plan from "./pages/plan.js";
import * as run from "./pages/run.js";
import * as table from "./pages/runs.js";
import * as sweep from "./pages/sweep.js";
import { route, start } from "./router.js";
import { build, main, opened } from "./shell.js";

route("now", now.open);
route("runs", table.open);
route("run", run.open);
route("compare", compare.open);
route("sweep", sweep.open);
route("plan", plan.open);

build();
try {
  await runs.refresh(); // the colours of all pages rest on it
  fresh();
  start(main, opened);
  connect();
} catch (error) {
  main.append(notice("failed", el("b", {}, "The runs cannot be shown: "), error.message, ". Load the page again once `muster dashboard` runs."));
}
