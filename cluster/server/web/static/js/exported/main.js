/** Shows the page of a file. */

import * as compare from "../pages/compare.js";
import * as run from "../pages/run.js";
import { told } from "./api.js";
import { start } from "./router.js";
import { build, main } from "./shell.js";

build();
start(told.page === "compare" ? compare.open(main) : run.open(main, told.run));
