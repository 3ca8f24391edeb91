// Makes elements. Text from the cache is untrusted: it becomes text nodes, never markup.

/** Return an element; children are nodes or texts, and null children are ignored. */
export function el(name, attributes = {}, ...children) {
  const made = document.createElement(name);
  for (const [key, value] of Object.entries(attributes)) {
    if (key === "onclick") made.addEventListener("click", value);
    else if (value === true) made.setAttribute(key, "");
    else if (value != null && value !== false) made.setAttribute(key, value);
  }
  made.append(...children.flat().filter((child) => child != null));
  return made;
}

// Control characters, marks that reorder text, characters without width, tags, private use, noncharacters.
// Joiners (U+200C, U+200D) stay: scripts and emoji need them.
const ODD =
  /(?:\r(?!\n)|[\0-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\xad\u034f\u061c\u115f\u1160\u17b4\u17b5\u180e\u200b\u200e\u200f\u2028-\u202e\u2060-\u206f\u3164\ufeff\uffa0\ufff0-\uffff\ud800-\udfff]|[\u{e0000}-\u{e0fff}]|[\ue000-\uf8ff])/u;
const EACH = new RegExp(ODD.source, "gu");
const MOST_MARKS = 500;

const code = (character) => `U+${character.codePointAt(0).toString(16).toUpperCase().padStart(4, "0")}`;

/** Return a text as nodes; characters that deceive or are invisible are replaced by their codes. */
export function visible(text) {
  const nodes = [];
  let from = 0;
  for (const found of text.matchAll(EACH)) {
    if (nodes.length > 2 * MOST_MARKS) break;
    nodes.push(text.slice(from, found.index), el("span", { class: "odd" }, code(found[0])));
    from = found.index + found[0].length;
  }
  nodes.push(text.slice(from).replace(EACH, (character) => `⟨${code(character)}⟩`));
  return nodes;
}

/** Return the beginning of a text on one line, for listings and headings. */
export const line = (text, most = 200) => visible(cut(text.replace(/\s+/gu, " ").trim(), most));

function cut(text, most) {
  if (text.length <= most) return text;
  const end = /[\ud800-\udbff]/.test(text[most - 1]) ? most - 1 : most; // do not cut a character in half
  return `${text.slice(0, end)}…`;
}

const PIECE = 2000; // the time that browsers take to break a word grows with the square of its length

/** Return a text as blocks. Browsers lay out only visible blocks; one block of a megabyte would stop them. */
function pieces(text) {
  const made = [];
  for (let from = 0; from < text.length; ) {
    let to = Math.min(from + PIECE, text.length);
    if (to < text.length) {
      const piece = text.slice(from, to);
      const end = piece.lastIndexOf("\n") + 1 || piece.lastIndexOf(" ") + 1; // at the end of a line or a word
      if (end) to = from + end;
      else if (/[\ud800-\udbff]$/.test(piece)) to -= 1;
    }
    made.push(el("div", { class: "piece", dir: "auto" }, visible(text.slice(from, to))));
    from = to;
  }
  return made;
}

/** Return a text of any length; only its beginning is shown until the reader asks for all of it. */
export function long(text, most = 2000) {
  const shown = el("div", { class: "text" }, pieces(cut(text, most)));
  if (text.length <= most) return shown;
  const more = el("button", { type: "button", "aria-expanded": "false" });
  const tell = (whole) => {
    more.textContent = whole ? "Show less" : `Show all ${number(text.length)} characters`;
    more.setAttribute("aria-expanded", String(whole));
  };
  tell(false);
  more.addEventListener("click", () => {
    const whole = more.getAttribute("aria-expanded") === "false";
    shown.replaceChildren(...pieces(whole ? text : cut(text, most)));
    tell(whole);
  });
  return el("div", {}, shown, more);
}

/** Return a JSON value that is rendered only when the reader opens it. */
export function raw(title, value) {
  const details = el("details", {}, el("summary", {}, title));
  details.addEventListener(
    "toggle",
    () => {
      const shown = long(JSON.stringify(value, null, 2), 20_000);
      (shown.matches(".text") ? shown : shown.firstChild).classList.add("code");
      details.append(shown);
    },
    { once: true },
  );
  return details;
}

const count = new Intl.NumberFormat("en");
const dollars = new Intl.NumberFormat("en", { style: "currency", currency: "USD", maximumSignificantDigits: 3 });
const cents = new Intl.NumberFormat("en", { style: "currency", currency: "USD" });
export const number = (value) => count.format(value ?? 0);
export const plural = (value, one, many = `${one}s`) => `${number(value)} ${value === 1 ? one : many}`;
export const money = (value) => (value > 0 && value < 1 ? dollars : cents).format(value);
export const share = (part, whole) => (whole ? `${Math.floor((100 * part) / whole)} %` : "–");

/** Return a time (seconds since 1970) in the reader's time zone. */
export function when(seconds) {
  if (!Number.isFinite(seconds) || Math.abs(seconds) > 8e12) return null;
  const at = new Date(seconds * 1000);
  const two = (value) => String(value).padStart(2, "0");
  const day = `${at.getFullYear()}-${two(at.getMonth() + 1)}-${two(at.getDate())}`;
  const time = `${two(at.getHours())}:${two(at.getMinutes())}:${two(at.getSeconds())}`;
  return el("time", { datetime: at.toISOString() }, `${day} ${time}`);
}

/** Return the name of a namespace, or "no name". */
export const namespace = (name) => (name === null ? el("em", {}, "no name") : el("span", {}, line(name, 80)));

/** Return a link into the listing of requests. */
export function listing(options, ...children) {
  const query = new URLSearchParams(Object.entries(options).filter(([, value]) => value != null));
  return el("a", { href: `#/requests${query.size ? `?${query}` : ""}` }, ...children);
}

/** Return a table that remains a table for screen readers when narrow screens show it as cards. */
export function table(caption, columns) {
  const body = el("tbody", { role: "rowgroup" });
  const head = el("tr", { role: "row" }, columns.map((name) => el("th", { role: "columnheader", scope: "col" }, name)));
  const whole = el(
    "table",
    { role: "table" },
    el("caption", {}, caption),
    el("thead", { role: "rowgroup" }, head),
    body,
  );
  const row = (...cells) => {
    const made = cells.map((cell, place) =>
      place
        ? el("td", { role: "cell", "data-label": columns[place] }, cell)
        : el("th", { role: "rowheader", scope: "row" }, cell),
    );
    const added = el("tr", { role: "row" }, made);
    body.append(added);
    return made;
  };
  return { whole, row };
}
