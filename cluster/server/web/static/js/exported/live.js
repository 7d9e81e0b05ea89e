/** Nothing changes in a page that is a file. */

import { calmly as soon } from "../live.js";

export const calmly = soon;
export const listen = () => () => {};
export const fresh = () => {};
export const announce = () => {};
