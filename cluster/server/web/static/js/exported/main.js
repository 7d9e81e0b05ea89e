/** Shows the page of a file. */

import * as compare from "../pages/compare.js";
import * as run from "../pages/run.js";
import * as sweep from "../pages/sweep.js";
import { told } from "./api.js";
import { start } from "./router.js";
import { build, main } from "./shell.js";

build();
const open = { compare: () => compare.open(main), run: () => run.open(main, told.run), sweep: () => sweep.open(main, told.sweep.id) };
start(open[told.page]());
