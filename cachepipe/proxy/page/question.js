// One question: what it asks, its samples side by side, and the draws that got them.

import { get } from "./api.js";
import { el, line, listing, long, namespace, number, plural, raw, table, when } from "./dom.js";

const SAMPLES = 12; // on one page
const MOST_DRAWS = 1000; // that are read to find out which draws have a sample

const said = (value) => (typeof value === "string" ? value : JSON.stringify(value, null, 2));

/** Return the content of a message: its text, and other parts as JSON. */
function content(value) {
  if (!Array.isArray(value)) return said(value ?? "");
  return value.map((part) => (typeof part?.text === "string" ? part.text : said(part))).join("\n");
}

function message(role, text) {
  return el("div", { class: "message" }, el("p", { class: "role" }, line(said(role), 40)), long(text, 1500));
}

function asked(document) {
  const fields = document?.body ?? document?.fields;
  if (fields === null || typeof fields !== "object") return [raw("Stored form", document)];
  const { messages, prompt, input, system, instructions, ...others } = fields;
  const shown = [];
  for (const text of [system, instructions]) if (text != null) shown.push(message("system", content(text)));
  for (const text of [prompt, input, messages]) {
    if (text == null) continue;
    const list = Array.isArray(text) ? text : [text];
    for (const item of list) {
      const { role, content: words, ...rest } = item !== null && typeof item === "object" ? item : { content: item };
      const more = Object.keys(rest).length ? `${words == null ? "" : "\n"}${said(rest)}` : "";
      shown.push(message(role ?? "prompt", `${words == null ? "" : content(words)}${more}`));
    }
  }
  const settings = Object.entries(others).map(([name, value]) =>
    el("div", {}, el("dt", {}, line(name, 60)), el("dd", {}, line(said(value), 300))),
  );
  return [...shown, el("dl", { class: "settings" }, settings), raw("Stored form", document)];
}

/**
 * Return a function that lists the draws of a sample, and whether it was generated for them.
 *
 * The ledger stores how many samples were generated for a draw, not which. A sample is generated for one draw
 * only, so the numbers usually determine it: each conclusion about one draw is applied to the others, until no
 * new conclusion follows.
 */
function drawn(draws) {
  const sets = draws.map((draw) => new Map([...new Set(draw.indices)].map((index) => [index, null])));
  const having = new Map();
  for (const told of sets) for (const index of told.keys()) having.set(index, [...(having.get(index) ?? []), told]);
  for (let news = true; news; ) {
    news = false;
    for (const [place, told] of sets.entries()) {
      const unknown = [...told.keys()].filter((index) => told.get(index) === null);
      const left = draws[place].generated - [...told.values()].filter((how) => how === "generated").length;
      if (!unknown.length || (left > 0 && left < unknown.length)) continue;
      news = true;
      for (const index of unknown) {
        told.set(index, left > 0 ? "generated" : "cached");
        if (left <= 0) continue;
        for (const other of having.get(index)) if (other !== told) other.set(index, "cached");
      }
    }
  }
  return (index) =>
    draws.map((draw, place) => ({ draw, how: sets[place].get(index) })).filter(({ how }) => how !== undefined);
}

function who({ draw, how }) {
  return el(
    "li",
    {},
    draw.shared ? el("em", {}, "all namespaces") : listing({ namespace: draw.namespace ?? "" }, namespace(draw.namespace)),
    draw.request_id ? el("span", {}, " ", line(draw.request_id, 60)) : null,
    draw.replicate === null ? null : el("span", {}, " replicate ", line(draw.replicate, 60)),
    draw.occurrence ? ` #${number(draw.occurrence + 1)}` : null,
    how === null ? null : el("span", { class: `tag ${how}` }, how),
  );
}

const FACTS = [
  ["prompt_tokens", "prompt"],
  ["completion_tokens", "completion"],
  ["cached_tokens", "cached by the provider"],
  ["reasoning_tokens", "reasoning"],
];

const took = (seconds) => (seconds < 1 ? `${Math.ceil(seconds * 1000)} ms` : `${seconds.toFixed(1)} s`);

function sample(item, drawers) {
  const { summary, meta, value } = item;
  const text = typeof summary?.text === "string" && summary.text ? summary.text : said(value);
  const usage = FACTS.filter(([name]) => Number.isFinite(summary?.[name]) && summary[name] > 0);
  const facts = [
    ["Model", summary?.model && line(said(summary.model), 80)],
    ["Ended by", summary?.finish_reason && line(said(summary.finish_reason), 40)],
    ["Tokens", usage.map(([name, label]) => `${number(summary[name])} ${label}`).join(", ")],
    ["Stored", Number.isFinite(meta?.stamp) ? when(meta.stamp / 1e6) : null],
    ["Took", Number.isFinite(meta?.seconds) ? took(meta.seconds) : null],
  ].filter(([, fact]) => fact && fact.length !== 0);
  const whose = drawers(item.index).map(who);
  const title = `sample-${item.index}`;
  return el(
    "article",
    { class: "sample", "aria-labelledby": title },
    el("h3", { id: title, tabindex: "-1" }, `Sample ${item.index}`),
    long(text),
    el("dl", { class: "settings" }, facts.map(([name, fact]) => el("div", {}, el("dt", {}, name), el("dd", {}, fact)))),
    whose.length ? el("p", { class: "label" }, "Drawn by") : el("p", { class: "quiet" }, "No draw has this sample yet."),
    whose.length ? el("ul", { class: "drawn" }, whose) : null,
    raw("Stored form", value),
  );
}

async function drawsOf(place, signal) {
  const draws = [];
  let after = 0;
  while (after !== null && draws.length < MOST_DRAWS) {
    const page = await get(`${place}/draws`, { after, limit: 200 }, signal);
    draws.push(...page.items);
    after = page.next;
  }
  return { draws, whole: after === null };
}

export async function question(signal, query, key) {
  const place = `keys/${encodeURIComponent(key)}`;
  const from = query.get("from");
  const [info, { draws, whole }, page] = await Promise.all([
    get(place, {}, signal),
    drawsOf(place, signal),
    get(`${place}/samples`, { from, limit: SAMPLES }, signal),
  ]);
  const drawers = drawn(draws);
  const here = new Set(page.items.map((item) => item.index));
  const list = table("Draws in the ledger", ["Namespace", "Request id", "Replicate", "Occurrence", "Samples", "Generated for it", "Time"]);
  for (const draw of draws.slice(0, 200)) {
    const indices = draw.indices.slice(0, 50).flatMap((index, position) => [
      position ? ", " : "",
      here.has(index)
        ? el("button", { type: "button", class: "link", "aria-label": `Sample ${index}`, onclick: () => document.getElementById(`sample-${index}`).focus() }, String(index))
        : String(index),
    ]);
    if (draw.indices.length > 50) indices.push(" …");
    const name = draw.shared ? el("em", {}, "all namespaces") : namespace(draw.namespace);
    const id = draw.request_id ? el("span", {}, line(draw.request_id, 80)) : "–";
    const replicate = draw.replicate === null ? "–" : el("span", {}, line(draw.replicate, 80));
    const made = `${number(draw.generated)} of ${number(draw.indices.length)}`;
    list.row(name, id, replicate, String(draw.occurrence), el("span", {}, indices), made, when(draw.at) ?? "");
  }
  const left = draws.length > 200 || !whole ? "Only the first draws are shown." : null;
  const self = `#/requests/${encodeURIComponent(key)}`;
  return {
    title: "Request",
    nodes: [
      el("h1", { tabindex: "-1" }, "Request"),
      el(
        "p",
        { class: "facts" },
        el("span", {}, plural(info.samples, "sample")),
        el("span", {}, plural(info.namespaces, "namespace")),
        el("span", {}, "first asked ", when(info.at) ?? ""),
        info.scope ? el("span", {}, line(info.scope, 200)) : null,
      ),
      el("p", { class: "facts" }, el("code", { class: "key" }, line(info.key, 200))),
      el("section", { "aria-labelledby": "asked" }, el("h2", { id: "asked" }, "Asked"), asked(info.document)),
      el(
        "section",
        { "aria-labelledby": "samples" },
        el("h2", { id: "samples" }, "Samples"),
        page.items.length ? null : el("p", { class: "quiet" }, "No samples on this page."),
        el("div", { class: "samples" }, page.items.map((item) => sample(item, drawers))),
        el(
          "nav",
          { class: "pages", "aria-label": "Pages of samples" },
          from ? el("a", { href: self }, "First samples") : null,
          page.next === null ? null : el("a", { href: `${self}?from=${page.next}` }, "More samples"),
        ),
      ),
      draws.length ? list.whole : null,
      left && el("p", { class: "quiet" }, left),
    ],
  };
}
