/** Nothing changes in a page that is a file. */

import { calmly as soon, polite as said } from "../live.js";

export const calmly = soon;
export const polite = said;
export const listen = () => () => {};
export const fresh = () => {};
export const announce = () => {};
