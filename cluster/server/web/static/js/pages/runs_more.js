/** Columns of the table of runs that are asked for by their keys: config values and what metrics come to. */

import { get, runs } from "../api.js";

const TRIES = 5;
/** Milliseconds after which records that could not be read in time are asked for again. */
const LATE = 1000;

export class MoreColumns {
  /** `late()` is called when values that were missing may be there. */
  constructor(late) {
    Object.assign(this, { late, version: null, known: new Map(), arrays: new Map(), turn: Promise.resolve() });
  }

  close() {
    clearTimeout(this.waiting);
    this.closed = true;
  }

  /** A column in the order of all runs; undefined: it was not asked for. */
  values(key) {
    return this.arrays.get(key);
  }

  /** Brings these columns up to the present table of runs; asks for those of the rows that have changed. */
  need(keys) {
    return (this.turn = this.turn.catch(() => {}).then(() => this.bring([...new Set(keys)])));
  }

  async bring(keys) {
    for (const key of this.known.keys()) if (!keys.includes(key)) this.known.delete(key);
    let late = 0;
    for (let tries = 0; tries < TRIES; tries++) {
      const version = runs.etag?.slice(1, -1), old = this.version === version ? [] : [...this.known.keys()], missing = keys.filter((key) => !this.known.has(key));
      const asked = [[old, this.version], [missing, null]].filter(([some]) => some.length);
      const answers = await Promise.all(asked.map(([key, since]) => get("/api/columns", { key, since })));
      if (answers.every((answer) => answer.version === version)) {
        for (const answer of answers) this.take(answer);
        late = answers.reduce((sum, answer) => sum + answer.late, 0);
        this.version = version;
        break;
      }
      await runs.refresh(); // the server has gone on meanwhile
    }
    this.order(keys);
    clearTimeout(this.waiting);
    if (late && !this.closed) this.waiting = setTimeout(() => ((this.version = null), this.late()), LATE);
  }

  take({ ids, gone, columns }) {
    for (const [key, values] of Object.entries(columns)) {
      const known = ids ? this.known.get(key) ?? new Map() : new Map();
      for (const id of gone) known.delete(id);
      (ids ?? runs.columns.id).forEach((id, place) => known.set(id, values[place]));
      this.known.set(key, known);
    }
  }

  order(keys) {
    this.arrays = new Map(keys.map((key) => [key, runs.columns.id.map((id) => this.known.get(key)?.get(id) ?? null)]));
  }
}
