// Reads the proxy's JSON. The token, if required, stays in this tab and is sent only in a header.

const PLACE = "cachepipe-token";

export class NeedsToken extends Error {}

export const token = {
  get: () => sessionStorage.getItem(PLACE),
  set: (text) => sessionStorage.setItem(PLACE, text),
  forget: () => sessionStorage.removeItem(PLACE),
};

/** Return the JSON at a path below /cachepipe/api; options that are null are omitted. */
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
    credentials: "omit", // no cookies, and no password dialog of the browser
    cache: "no-store",
    redirect: "error",
  });
  if (answer.status === 401) throw new NeedsToken("The token is wrong.");
  const value = await answer.json();
  if (!answer.ok) throw new Error(value?.error?.message ?? `The proxy answered with ${answer.status}.`);
  return value;
}
