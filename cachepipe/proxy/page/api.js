// Reads the proxy's JSON. The token, where one is wanted, stays in this tab and goes only into a header.

const PLACE = "cachepipe-token";

export class NeedsToken extends Error {}

export const token = {
  get: () => sessionStorage.getItem(PLACE),
  set: (text) => sessionStorage.setItem(PLACE, text),
  forget: () => sessionStorage.removeItem(PLACE),
};

/** Return the JSON at a path below /cachepipe/api; options that are null are left out. */
export async function get(path, options = {}, signal = undefined) {
  const query = new URLSearchParams(Object.entries(options).filter(([, value]) => value != null));
  const headers = {};
  const shown = token.get();
  if (shown !== null) {
    // Headers are bytes: UTF-8, as the server compares them.
    headers["x-cachepipe-token"] = String.fromCharCode(...new TextEncoder().encode(shown));
  }
  const answer = await fetch(`/cachepipe/api/${path}${query.size ? `?${query}` : ""}`, {
    headers,
    signal,
    credentials: "omit", // no cookies, and no dialog of the browser's own for a password
    cache: "no-store",
    redirect: "error",
  });
  if (answer.status === 401) throw new NeedsToken("The token is not the proxy's.");
  const value = await answer.json();
  if (!answer.ok) throw new Error(value?.error?.message ?? `The proxy answered with ${answer.status}.`);
  return value;
}
