/**
 * Expressions over runs: `loss < 3 and tag = "x"`, `not (status = failed) or optim.lr >= 1e-3`, `started >= today`.
 * A word alone is looked for in names. Operators: = != < <= > >= and ~ (contains).
 */

export class FilterError extends Error {
  /** `at`, `end`: where in the text. */
  constructor(message, at, end) {
    super(message);
    this.at = at;
    this.end = end;
  }
}

const TOKEN = /\s*(?:("(?:[^"\\]|\\.)*"|'(?:[^'\\]|\\.)*')|(<=|>=|!=|=|<|>|~|\(|\))|([^\s()<>=!~"']+))/y;
const SIZES = { k: 1e3, m: 1e6, g: 1e9, b: 1e9, t: 1e12 };
const OPERATORS = new Set(["=", "!=", "<", "<=", ">", ">=", "~"]);
/** Short names, as the table shows them. */
const NAMES = { "held-out": "eval_loss", train: "loss", run: "name", tag: "tags", took: "wall_time", "tokens/s": "tokens_per_second", lr: "optim.lr" };
const TIMES = new Set(["started", "updated"]);

function tokens(text) {
  const found = [];
  let at = 0;
  while (at < text.length) {
    TOKEN.lastIndex = at;
    const match = TOKEN.exec(text);
    if (!match) {
      const rest = text.slice(at);
      if (!rest.trim()) break;
      const begin = at + rest.length - rest.trimStart().length;
      throw new FilterError(/["']/.test(text[begin]) ? "this quote is not closed" : "this cannot be read", begin, text.length);
    }
    const end = TOKEN.lastIndex, [, quoted, sign, word] = match;
    const raw = quoted ?? sign ?? word;
    found.push({ kind: quoted ? "text" : sign ? "sign" : "word", raw, value: quoted ? quoted.slice(1, -1).replace(/\\(.)/g, "$1") : raw, at: end - raw.length, end });
    at = end;
  }
  return found;
}

/** A tree of {kind: and|or|not|compare|name}; null for an empty text. Throws FilterError. */
export function parse(text) {
  const all = tokens(text);
  let at = 0;
  const peek = () => all[at];
  const isWord = (token, word) => token?.kind === "word" && token.raw.toLowerCase() === word;
  if (!all.length) return null;

  function either() {
    let left = both();
    while (isWord(peek(), "or")) {
      at++;
      left = { kind: "or", left, right: both() };
    }
    return left;
  }
  function both() {
    let left = single();
    while (peek() && !isWord(peek(), "or") && peek().raw !== ")") {
      if (isWord(peek(), "and")) at++;
      left = { kind: "and", left, right: single() };
    }
    return left;
  }
  function single() {
    const token = peek();
    if (!token) throw new FilterError("something should follow", text.length, text.length);
    if (isWord(token, "not")) {
      at++;
      return { kind: "not", of: single() };
    }
    if (token.kind === "sign") {
      if (token.raw !== "(") throw new FilterError(`a name should stand before ${token.raw}`, token.at, token.end);
      at++;
      const inner = either();
      if (peek()?.raw !== ")" || peek().kind !== "sign") throw new FilterError("this bracket is not closed", token.at, token.end);
      at++;
      return inner;
    }
    if (isWord(token, "and") || isWord(token, "or")) throw new FilterError(`something should stand before ${token.raw}`, token.at, token.end);
    at++;
    const sign = peek();
    if (sign?.kind !== "sign" || !OPERATORS.has(sign.raw)) return { kind: "name", value: token.value.toLowerCase() };
    at++;
    const value = peek();
    if (!value || value.kind === "sign") throw new FilterError(`a value should follow ${sign.raw}`, value?.at ?? text.length, value?.end ?? text.length);
    at++;
    return { kind: "compare", name: NAMES[token.value] ?? token.value, sign: sign.raw, value: valueOf(value, token.value), at: token.at, end: token.end };
  }

  const tree = either();
  if (peek()) throw new FilterError("this bracket was not opened", peek().at, peek().end);
  return tree;
}

function valueOf(token, name) {
  if (TIMES.has(name)) {
    const today = new Date().setHours(0, 0, 0, 0) / 1000;
    if (token.value === "today") return today;
    if (token.value === "yesterday") return today - 86400;
    const time = Date.parse(token.value.length === 10 ? `${token.value}T00:00` : token.value);
    if (Number.isNaN(time)) throw new FilterError("a time is today, yesterday or a date such as 2026-11-27", token.at, token.end);
    return time / 1000;
  }
  if (token.kind === "text") return token.value;
  const number = /^([-+]?(?:\d+\.?\d*|\.\d+)(?:e[-+]?\d+)?)([kmgbt%]?)$/i.exec(token.value.replaceAll(",", "").replaceAll("_", ""));
  if (number) return number[2] === "%" ? Number(number[1]) / 100 : Number(number[1]) * (SIZES[number[2].toLowerCase()] ?? 1);
  return token.value;
}

/** The names that a tree compares, with their places. */
export function names(tree) {
  if (!tree || tree.kind === "name") return [];
  if (tree.kind === "compare") return [tree];
  return tree.kind === "not" ? names(tree.of) : [...names(tree.left), ...names(tree.right)];
}

const STATES = { "not started": "new", lost: "unreadable" };

/** A test of a row's place; `column(name)` gives the values of all rows. */
export function compile(tree, column) {
  if (!tree) return () => true;
  if (tree.kind === "and" || tree.kind === "or") {
    const left = compile(tree.left, column), right = compile(tree.right, column);
    return tree.kind === "and" ? (row) => left(row) && right(row) : (row) => left(row) || right(row);
  }
  if (tree.kind === "not") {
    const inner = compile(tree.of, column);
    return (row) => !inner(row);
  }
  if (tree.kind === "name") {
    const values = column("name");
    return (row) => String(values[row]).toLowerCase().includes(tree.value);
  }
  const values = column(tree.name), { sign } = tree;
  const wanted = tree.name === "status" ? STATES[String(tree.value).toLowerCase()] ?? tree.value : tree.value;
  const one = (value) => compares(value, sign, wanted);
  if (tree.name === "tags") {
    // A tag `key=value` is found by its key too. `!=`: none of them is.
    const each = (tags) => (tags ?? []).flatMap((tag) => [tag, tag.split("=")[0]]);
    if (sign === "!=") return (row) => !each(values[row]).some((tag) => compares(tag, "=", wanted));
    return (row) => each(values[row]).some(one);
  }
  return (row) => one(values[row]);
}

function compares(value, sign, wanted) {
  const missing = value === null || value === undefined || value === "";
  if (sign === "!=") return missing ? wanted !== "" : !compares(value, "=", wanted);
  if (missing) return sign === "=" && (wanted === "" || wanted === "null");
  if (sign === "~") return String(value).toLowerCase().includes(String(wanted).toLowerCase());
  if (typeof value === "number" && typeof wanted === "number") return order(value - wanted, sign);
  const left = String(value).toLowerCase(), right = String(wanted).toLowerCase();
  if (sign === "=") return left === right;
  return typeof value === typeof wanted && order(left < right ? -1 : left > right ? 1 : 0, sign);
}

function order(difference, sign) {
  if (sign === "=") return difference === 0;
  if (sign === "<") return difference < 0;
  if (sign === "<=") return difference <= 0;
  return sign === ">" ? difference > 0 : difference >= 0;
}
