// The requests in the cache, newest first, with search, filters and pages.

import { get } from "./api.js";
import { el, line, listing, namespace, number, plural, when } from "./dom.js";

const LIMIT = 50;

function field(label, name, value, attributes = {}) {
  const input = el("input", { id: `q-${name}`, name, value, autocomplete: "off", spellcheck: "false", ...attributes });
  return el("div", { class: "field" }, el("label", { for: input.id }, label), input);
}

function form(asked, namespaces) {
  const names = new Set([...namespaces, ...(asked.namespace == null ? [] : [asked.namespace || null])]);
  const any = el("option", { value: "any" }, "any");
  const choice = el("select", { id: "q-namespace" }, any);
  for (const name of names) {
    const option = el("option", { value: `=${name ?? ""}` }, namespace(name).textContent);
    option.selected = asked.namespace != null && (name ?? "") === asked.namespace;
    choice.append(option);
  }
  const made = el(
    "form",
    { role: "search", class: "search" },
    field("Text in the question", "search", asked.search, { type: "search" }),
    field("Key begins with", "prefix", asked.prefix, { type: "search", class: "code" }),
    el("div", { class: "field" }, el("label", { for: choice.id }, "Namespace"), choice),
    el("button", { type: "submit" }, "Search"),
  );
  made.addEventListener("submit", (event) => {
    event.preventDefault();
    const wanted = {
      search: made.elements.search.value.trim() || null,
      prefix: made.elements.prefix.value.trim() || null,
      namespace: choice.value === "any" ? null : choice.value.slice(1),
    };
    const { hash } = listing(wanted);
    if (hash === location.hash) dispatchEvent(new HashChangeEvent("hashchange"));
    else location.hash = hash;
  });
  return made;
}

function entry(item) {
  const facts = [
    item.model && line(item.model, 60),
    plural(item.samples, "sample"),
    item.pending ? `${number(item.pending)} being generated` : null,
    plural(item.namespaces, "namespace"),
    when(item.at),
    el("code", {}, item.key.slice(0, 12)),
  ];
  return el(
    "li",
    {},
    el(
      "a",
      { href: `#/requests/${encodeURIComponent(item.key)}`, class: "prompt", dir: "auto" },
      item.prompt.trim() ? line(item.prompt) : "(no text)",
    ),
    el("p", { class: "facts" }, facts.filter(Boolean).map((fact) => el("span", {}, fact))),
  );
}

export async function requests(signal, query) {
  const asked = Object.fromEntries(
    ["search", "prefix", "namespace", "after"].map((name) => [name, query.get(name)]),
  );
  const namespaces = (await get("namespaces", {}, signal)).items.map((info) => info.namespace);
  let page = { items: [], next: asked.after };
  do {
    // The server stops a long search. If nothing was found so far, continue it.
    page = await get("keys", { ...asked, after: page.next, limit: LIMIT }, signal);
  } while (!page.items.length && page.next !== null);
  const found = page.items.length
    ? `${plural(page.items.length, asked.after ? "more request" : "request")}, newest first.`
    : "No requests match.";
  return {
    title: "Requests",
    nodes: [
      el("h1", { tabindex: "-1" }, "Requests"),
      form(asked, namespaces),
      el("p", { class: "quiet", role: "status", id: "found" }, found),
      el("ol", { class: "requests" }, page.items.map(entry)),
      el(
        "nav",
        { class: "pages", "aria-label": "Pages" },
        asked.after ? listing({ ...asked, after: null }, "Newest") : null,
        page.next === null ? null : listing({ ...asked, after: page.next }, "More"),
      ),
    ],
  };
}
