// What the proxy has done since its start, live; and the content of the cache.

import { get } from "./api.js";
import { el, line, listing, money, namespace, number, plural, share, table, when } from "./dom.js";

const EVERY = 2000; // milliseconds between two requests for the counters
const QUIET = 10_000; // milliseconds between two announcements to screen readers
let paused = false;

const MODELS = ["Model", "Tokens spent", "Tokens billed", "Tokens saved"];
const COLUMNS = ["Namespace", "Hits", "Misses", "From the cache", "Tokens billed", "Tokens saved", "Last request"];

function figure(label, kind) {
  const value = el("dd", { class: "value", id: `count-${kind}` }, "0");
  const note = el("dd", { class: "note", id: `note-${kind}` });
  return { whole: el("div", { class: `figure ${kind}` }, el("dt", {}, label), value, note), value, note };
}

/** Replace the text of a node, unless it has not changed. */
function put(node, text) {
  if (node.textContent !== text) node.textContent = text;
}

function cost(counted) {
  if (counted.cost === null) return "";
  return `${money(counted.cost)}${counted.unpriced ? ` and ${plural(counted.unpriced, "sample")} without a known price` : ""}`;
}

const tokens = (counted) => number(counted.total_tokens) + (counted.cost === null ? "" : ` (${money(counted.cost)})`);

export async function overview(signal) {
  const figures = {
    hits: figure("Samples: hits", "hits"),
    misses: figure("Samples: misses", "misses"),
    spent: figure("Tokens spent", "spent"),
    saved: figure("Tokens saved", "saved"),
  };
  const since = el("p", { class: "quiet" });
  const said = el("p", { class: "unseen", "aria-live": "polite", id: "announced" });
  const problem = el("p", { class: "problem", role: "status" });
  const bar = el("div", { class: "bar", "aria-hidden": "true" }, el("span", {}));
  const pause = el("button", { type: "button", "aria-pressed": String(paused) }, "Pause");
  const each = table("By namespace, since the start", COLUMNS);
  const models = table("By model, since the start", MODELS);
  const byModel = new Map();
  const none = el("p", { class: "quiet" }, "No requests yet. Use this server's address as the base URL of a tool.");
  const rows = new Map();
  let announced = -Infinity;

  function show(counters) {
    const { total } = counters;
    put(figures.hits.value, number(total.hits));
    put(figures.hits.note, `${share(total.hits, total.hits + total.misses)} of samples`);
    put(figures.misses.value, number(total.misses));
    put(figures.misses.note, `in ${plural(counters.upstreams.reduce((sum, { calls }) => sum + calls, 0), "call")}`);
    put(figures.spent.value, number(total.spent.total_tokens));
    put(figures.spent.note, cost(total.spent));
    put(figures.saved.value, number(total.saved.total_tokens));
    put(figures.saved.note, cost(total.saved));
    const drawn = total.hits + total.misses;
    bar.firstChild.style.setProperty("inline-size", `${drawn ? (100 * total.hits) / drawn : 0}%`);
    bar.classList.toggle("empty", !drawn);
    put(since.firstChild ?? since.appendChild(el("span")), "Since ");
    if (since.childNodes.length < 2) since.append(when(counters.started), el("span"));
    const running = counters.upstreams.reduce((sum, { in_flight }) => sum + in_flight, 0);
    put(since.lastChild, ` · ${plural(running, "upstream call")} in flight`);
    for (const counts of counters.namespaces) {
      const id = JSON.stringify(counts.namespace);
      if (!rows.has(id)) {
        const link = listing({ namespace: counts.namespace ?? "" }, namespace(counts.namespace));
        rows.set(id, each.row(link, "", "", "", "", "", "").slice(1));
      }
      const cells = rows.get(id);
      put(cells[0], number(counts.hits));
      put(cells[1], number(counts.misses));
      put(cells[2], share(counts.hits, counts.hits + counts.misses));
      put(cells[3], tokens(counts.billed));
      put(cells[4], tokens(counts.saved));
      put(cells[5], when(counts.last)?.textContent ?? "");
    }
    for (const sums of total.models) {
      const id = JSON.stringify([sums.model, sums.url]);
      if (!byModel.has(id)) {
        const name = el("span", { title: sums.url }, sums.model === null ? el("em", {}, "no name") : line(sums.model, 80));
        byModel.set(id, models.row(name, "", "", "").slice(1));
      }
      ["spent", "billed", "saved"].forEach((kind, place) => put(byModel.get(id)[place], tokens(sums[kind])));
    }
    models.whole.hidden = byModel.size === 0;
    none.hidden = rows.size > 0;
    each.whole.hidden = rows.size === 0;
    const news = `${plural(total.hits, "hit")}, ${plural(total.misses, "miss", "misses")}.`;
    if (performance.now() - announced > QUIET && said.textContent !== news) {
      said.textContent = news;
      announced = performance.now();
    }
  }

  async function look() {
    try {
      show(await get("counters", {}, signal));
      put(problem, "");
    } catch (error) {
      if (signal.aborted) return;
      put(problem, `The proxy did not answer: ${error.message}`);
    }
  }

  let timer;
  const again = () => {
    clearTimeout(timer);
    if (signal.aborted || paused || document.hidden) return;
    timer = setTimeout(() => look().then(again), EVERY);
  };
  const resume = () => void (document.hidden || paused || look().then(again));
  document.addEventListener("visibilitychange", resume, { signal });
  signal.addEventListener("abort", () => clearTimeout(timer));
  pause.addEventListener("click", () => {
    paused = !paused;
    pause.setAttribute("aria-pressed", String(paused));
    resume();
  });

  show(await get("counters", {}, signal)); // an error here is shown instead of the view
  again();
  const stored = (await get("namespaces", {}, signal)).items;
  const held = table("The whole cache", [
    "Namespace", "Draws", "Samples drawn", "Generated for it", "Reused", "Tokens spent", "Tokens saved", "Tokens wasted",
  ]);
  const costs = new Map();
  for (const info of stored) {
    const link = listing({ namespace: info.namespace ?? "" }, namespace(info.namespace));
    const reused = info.samples - info.generated;
    const cells = [number(info.draws), number(info.samples), number(info.generated), share(reused, info.samples)];
    costs.set(info.namespace, held.row(link, ...cells, "…", "…", "…").slice(5));
  }
  const priced = (sums) =>
    ["spent", "saved", "wasted"].forEach((kind, place) => put(costs.get(sums.namespace)?.[place], tokens(sums[kind])));
  get("stats", {}, signal) // it reads each sample of the cache
    .then((stats) => stats.namespaces.filter((sums) => costs.has(sums.namespace)).forEach(priced))
    .catch(() => costs.forEach((cells) => cells.forEach((cell) => put(cell, "–"))));
  return {
    title: "Overview",
    nodes: [
      el("div", { class: "head" }, el("h1", { tabindex: "-1" }, "Overview"), pause),
      since,
      problem,
      el("dl", { class: "figures" }, Object.values(figures).map(({ whole }) => whole)),
      bar,
      said,
      none,
      each.whole,
      models.whole,
      stored.length ? held.whole : null,
    ],
  };
}
