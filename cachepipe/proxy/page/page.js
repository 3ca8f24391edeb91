// Shows the view that the address names, and asks for the token if the proxy requires one.

import { get, NeedsToken, token } from "./api.js";
import { el, line } from "./dom.js";
import { overview } from "./overview.js";
import { question } from "./question.js";
import { requests } from "./requests.js";

const main = document.getElementById("main");
const about = document.getElementById("about");
const forget = document.getElementById("forget");
let leaving = new AbortController();
let first = true;

function view(path) {
  const parts = path.split("/").filter(Boolean);
  if (parts[0] !== "requests") return ["overview", overview];
  return ["requests", parts.length > 1 ? (signal, query) => question(signal, query, decodeURIComponent(parts[1])) : requests];
}

function put(title, ...nodes) {
  main.replaceChildren(...nodes.filter(Boolean));
  main.removeAttribute("aria-busy");
  document.title = `${title} · cachepipe`;
  if (!first) {
    main.querySelector("h1")?.focus();
    scrollTo(0, 0);
  }
  first = false;
}

function login(wrong) {
  const input = el("input", { id: "token", type: "password", autocomplete: "current-password", required: true });
  const form = el(
    "form",
    { class: "login" },
    el("label", { for: "token" }, "Token of this proxy"),
    input,
    el("button", { type: "submit" }, "Open"),
    el("p", { class: "problem", role: "alert" }, wrong),
  );
  form.addEventListener("submit", (event) => {
    event.preventDefault();
    token.set(input.value);
    show();
  });
  forget.hidden = true;
  about.replaceChildren();
  put("Token", el("h1", { tabindex: "-1" }, "Token"), form);
  input.focus();
}

async function tellAbout(signal) {
  const { cachepipe, cache, mode } = await get("status", {}, signal);
  about.replaceChildren(...line(`${mode} · ${cache} · ${cachepipe}`, 160));
}

async function show() {
  leaving.abort();
  leaving = new AbortController();
  const { signal } = leaving;
  const [path, query = ""] = location.hash.slice(1).split(/\?(.*)/s);
  main.setAttribute("aria-busy", "true");
  try {
    const [name, made] = view(path);
    for (const link of document.querySelectorAll("[data-view]")) {
      if (link.dataset.view === name) link.setAttribute("aria-current", "page");
      else link.removeAttribute("aria-current");
    }
    const [{ title, nodes }] = await Promise.all([made(signal, new URLSearchParams(query)), tellAbout(signal)]);
    if (signal.aborted) return;
    forget.hidden = token.get() === null;
    put(title, ...nodes);
  } catch (error) {
    if (signal.aborted) return;
    leaving.abort();
    if (error instanceof NeedsToken) {
      const wrong = token.get() === null ? "" : error.message;
      token.forget();
      login(wrong);
    } else {
      const again = el("button", { type: "button", onclick: show }, "Try again");
      put("Error", el("h1", { tabindex: "-1" }, "This view cannot be shown"), el("p", { class: "problem", role: "alert" }, line(error.message, 500)), again);
    }
  }
}

document.getElementById("skip").addEventListener("click", (event) => {
  event.preventDefault(); // the hash of an address selects a view
  main.focus();
});
forget.addEventListener("click", () => {
  token.forget();
  show();
});
addEventListener("hashchange", show);
show();
