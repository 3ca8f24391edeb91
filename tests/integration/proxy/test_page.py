"""The page for people, in headless Chromium: live, walked by keyboard, and unmoved by what models answered.

The browser comes from npm as ``browser/package-lock.json`` names it, once per machine (70 MB, about ten
seconds), because it needs neither a download of its own nor the rights of an administrator.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import subprocess
import tempfile
from pathlib import Path
from urllib.parse import urlsplit

import httpx2
import pytest
from playwright.sync_api import expect, sync_playwright
from profiles import sized

from cachepipe.accounting import Account, Usage
from cachepipe.proxy import page as page_files
from cachepipe.proxy.counters import Prices
from cachepipe.proxy.settings import Upstream

PARTS = Path(__file__).with_name("browser")
WIDE, PHONE = {"width": 1280, "height": 800}, {"width": 390, "height": 844}
WATCH = """
window.seen = [];
document.addEventListener("securitypolicyviolation", (event) => seen.push(event.violatedDirective));
for (const name of ["alert", "confirm", "prompt", "open"]) window[name] = () => seen.push(name);
"""


def _install(folder):
    """Put the browser and axe into a folder, whole or not at all."""
    folder.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent) as made:
        for part in PARTS.iterdir():
            shutil.copy(part, made)
        subprocess.run(
            ["npm", "ci", "--ignore-scripts", "--no-audit", "--no-fund", "--silent"],
            cwd=made, check=True, capture_output=True, timeout=100,
        )  # fmt: skip
        # As on the machines that the package is made for: with the libraries that those lack.
        environment = {**os.environ, "TMPDIR": made, "AWS_EXECUTION_ENV": "AWS_Lambda_nodejs22.x"}
        subprocess.run(["node", "unpack.mjs"], cwd=made, env=environment, check=True, timeout=60)
        try:
            Path(made).rename(folder)
        except OSError:
            if not (folder / "chromium").exists():  # else another process was faster
                raise
        Path(made).mkdir(exist_ok=True)


@pytest.fixture(scope="module")
def parts():
    """The folder with the browser and axe."""
    if shutil.which("npm") is None and not os.environ.get("CI"):
        pytest.skip("needs node and npm, which the machine of the continuous integration has")
    version = hashlib.sha256((PARTS / "package-lock.json").read_bytes()).hexdigest()[:12]
    folder = Path.home() / ".cache" / "cachepipe-tests" / f"browser-{version}"
    if not (folder / "chromium").exists():
        _install(folder)
    return folder


@pytest.fixture(scope="module")
def browser(parts):
    """Chromium without a window; only this module's tests have its event loop in their thread."""
    binary = parts / "chromium"
    needed = subprocess.run(["ldd", binary], capture_output=True, text=True, check=True).stdout
    environment = dict(os.environ)
    if "not found" in needed:
        environment["LD_LIBRARY_PATH"] = str(parts / "al2023" / "lib")
    expect.set_options(timeout=15_000)
    with sync_playwright() as playwright:
        started = playwright.chromium.launch(executable_path=binary, env=environment)
        yield started
        started.close()


@pytest.fixture
def visit(browser, proxy):
    """Open a page of a proxy; at the end nothing must have run, broken a rule, or left the server."""
    opened, wrong = [], []

    def go(fragment="", server=proxy, viewport=WIDE, **options):
        context = browser.new_context(viewport=viewport, **options)
        context.set_default_timeout(15_000)
        page = context.new_page()
        opened.append((context, page))
        host = urlsplit(server.url).netloc

        def asked(request):
            if urlsplit(request.url).netloc != host:
                wrong.append(f"left for {request.url[:100]}")

        page.add_init_script(WATCH)
        page.on("request", asked)
        page.on("dialog", lambda dialog: (wrong.append(f"dialog {dialog.message}"), dialog.dismiss()))
        page.on("pageerror", lambda error: wrong.append(f"error {error}"))
        page.on("popup", lambda _: wrong.append("popup"))
        page.on("download", lambda _: wrong.append("download"))
        page.on("console", lambda message: wrong.append(message.text) if _is_wrong(message.text) else None)
        page.goto(f"{server.url}/{fragment}")
        expect(page.locator("h1")).to_be_visible()
        return page

    yield go
    for context, page in opened:
        wrong += page.evaluate("window.seen")
        context.close()
    assert wrong == []


def _is_wrong(text):
    return not re.match("Failed to load resource: the server responded with a status of 4", text)


@pytest.fixture
def ask(proxy, http, helpers):
    """Ask something in a namespace and return the key of the question."""

    def asking(text, namespace, n=1, server=proxy, **headers):
        body = {"model": "m", "temperature": 0.5, "n": n, "messages": [{"role": "user", "content": text}]}
        answer = http.post(
            helpers.chat_url(server), json=body, headers={"x-cachepipe-namespace": namespace, **headers}
        )
        assert answer.status_code == 200, answer.text
        return answer.headers["x-cachepipe-key"]

    return asking


@pytest.fixture
def axe(parts):
    """Return what axe finds wrong with a page."""
    source = (parts / "node_modules" / "axe-core" / "axe.min.js").read_text()

    def check(page):
        page.evaluate(source)
        found = page.evaluate("axe.run(document, {resultTypes: ['violations']})")
        assert len(found["passes"]) > 10
        return [(each["id"], [node["target"] for node in each["nodes"]]) for each in found["violations"]]

    return check


def test_the_files_come_with_strict_rules(proxy):
    assert {"/", *(f"/cachepipe/page/{name}" for name in ("page.js", "page.css"))} <= {*page_files.FILES}
    for path, (kind, content) in page_files.FILES.items():
        answer = httpx2.get(f"{proxy.url}{path}")
        assert (answer.status_code, answer.content) == (200, content)
        assert answer.headers["content-type"].encode() == kind
        assert answer.headers["x-content-type-options"] == "nosniff"
        assert answer.headers["referrer-policy"] == "no-referrer"
        rules = dict(rule.split(" ", 1) for rule in answer.headers["content-security-policy"].split("; "))
        for name in ("default-src", "frame-ancestors", "base-uri", "form-action"):
            assert rules[name] == "'none'"
        for name in ("script-src", "style-src", "connect-src"):
            assert rules[name] == "'self'"
        assert httpx2.post(f"{proxy.url}{path}").status_code == 405
        assert not re.search(rb"innerHTML|outerHTML|insertAdjacentHTML|document\.write|\beval\b", content)
    assert httpx2.get(f"{proxy.url}/cachepipe/page/__init__.py").status_code == 404
    assert httpx2.get(f"{proxy.url}/cachepipe/page/%2e%2e/access.py").status_code == 400


@pytest.mark.parametrize("path", ["/", "/cachepipe/page/page.js", "/cachepipe/api/keys"])
def test_other_names_for_this_machine_are_refused(proxy, path):
    """A page whose name was turned to this machine learns nothing."""
    answer = httpx2.get(f"{proxy.url}{path}", headers={"host": "rebound.example:80"})
    assert (answer.status_code, answer.json()["error"]["code"]) == (403, "bad_host")


def test_counters_rise_while_calls_are_made(visit, ask):
    page = visit()
    expect(page.locator("#count-hits")).to_have_text("0")
    expect(page.get_by_text("No requests yet.")).to_be_visible()
    ask("How many?", "a", 3)
    ask("How many?", "b", 2)
    expect(page.locator("#count-hits")).to_have_text("2")
    expect(page.locator("#count-misses")).to_have_text("3")
    expect(page.locator("#count-spent")).not_to_have_text("0")
    row = page.get_by_role("row").filter(has=page.get_by_role("link", name="b", exact=True)).first
    assert row.get_by_role("cell").all_text_contents()[:3] == ["2", "0", "100 %"]
    expect(page.get_by_text("No requests yet.")).to_be_hidden()
    expect(page.locator("[aria-live=polite]")).to_have_text(re.compile(r"hits?, .* misses\."))
    row.get_by_role("link").focus()
    ask("How many?", "b", 2)
    expect(page.locator("#count-hits")).to_have_text("3")  # one sample was left, one is generated
    assert page.evaluate("document.activeElement.textContent") == "b"


def test_a_paused_page_asks_nothing_until_it_goes_on(visit, ask):
    page = visit()
    button = page.get_by_role("button", name="Pause")
    with page.expect_response(re.compile("/counters")):
        button.click()
        button.click()  # going on looks at once
    button.click()
    expect(button).to_have_attribute("aria-pressed", "true")
    ask("How many?", "a")
    expect(page.locator("#count-misses")).to_have_text("0")
    button.click()
    expect(page.locator("#count-misses")).to_have_text("1")


def test_the_way_to_a_sample_needs_only_the_keyboard(visit, ask):
    ask("Of pears", "a", 3)
    ask("Of apples", "a", 2)
    ask("Of apples", "b", 3)
    page = visit()

    def focused():
        return page.evaluate(
            """() => {
                const at = document.activeElement, style = getComputedStyle(at);
                const seen = style.outlineStyle !== "none" && parseFloat(style.outlineWidth) >= 2;
                return [at.id || at.textContent.trim(), seen];
            }"""
        )

    def walk(to, most=25):
        for _ in range(most):
            page.keyboard.press("Tab")
            name, seen = focused()
            assert seen, f"the focus on {name!r} is not visible"
            if name == to:
                return
        raise AssertionError(f"{to!r} was not reached; the last one was {name!r}")

    walk("skip", 1)
    page.keyboard.press("Enter")
    assert focused()[0] == "main"
    page.keyboard.press("Shift+Tab")
    assert focused()[0] == "Requests"
    page.keyboard.press("Enter")
    expect(page).to_have_title("Requests · cachepipe")
    assert focused()[0] == "Requests"  # the heading
    assert page.evaluate("document.activeElement.tagName") == "H1"
    walk("q-search")
    page.keyboard.type("APPLES")
    page.keyboard.press("Enter")
    expect(page.locator("#found")).to_have_text("1 request, newest first.")
    walk("Of apples")
    page.keyboard.press("Enter")
    expect(page).to_have_title("Request · cachepipe")
    expect(page.get_by_role("article")).to_have_count(3)
    walk("Stored form")
    page.keyboard.press("Enter")
    expect(page.locator("details[open]")).to_contain_text('"temperature": 0.5')
    walk("2")  # a sample of a draw in the ledger's table
    page.keyboard.press("Enter")
    assert focused() == ["sample-2", True]
    page.go_back()
    expect(page.locator("#q-search")).to_have_value("APPLES")


def test_samples_tell_who_drew_them(visit, ask, proxy, upstream):
    ask("Of apples", "first", 2)
    told = {"x-cachepipe-request-id": "item-1", "x-cachepipe-replicate": "7"}
    key = ask("Of apples", "second", 3, **told)
    page = visit(f"#/requests/{key}")
    whose = [
        article.locator(".drawn li").all_text_contents() for article in page.get_by_role("article").all()
    ]
    assert whose == [
        ["firstgenerated", "second item-1 replicate 7cached"],
        ["firstgenerated", "second item-1 replicate 7cached"],
        ["second item-1 replicate 7generated"],
    ]
    sample = page.get_by_role("article").first
    stored = httpx2.get(f"{proxy.url}/cachepipe/api/keys/{key}/samples").json()
    assert sample.locator(".text").text_content() == stored["items"][0]["summary"]["text"]
    facts = sample.locator(".settings").text_content()
    assert f"{stored['items'][0]['summary']['completion_tokens']} completion" in facts
    boxes = [article.bounding_box() for article in page.get_by_role("article").all()]
    assert len({box["y"] for box in boxes}) == 1  # side by side
    assert upstream.stats.samples_generated == 3


def test_requests_are_found_by_text_key_and_namespace_page_by_page(visit, ask):
    keys = [ask(f"Question {number}", "many" if number else "few") for number in range(52)]
    page = visit("#/requests")
    links = page.locator(".requests a")
    expect(links).to_have_count(50)
    page.get_by_role("link", name="More").click()
    expect(links).to_have_text(["Question 1", "Question 0"])
    page.get_by_role("link", name="Newest").click()
    expect(links).to_have_count(50)
    page.get_by_label("Namespace").select_option(label="few")
    page.get_by_role("button", name="Search").click()
    expect(links).to_have_text(["Question 0"])
    page.get_by_label("Namespace").select_option(label="any")
    page.get_by_label("Key begins with").fill(keys[7][:14])
    page.keyboard.press("Enter")
    expect(links).to_have_text(["Question 7"])
    page.get_by_label("Key begins with").fill("k2-none")
    page.keyboard.press("Enter")
    expect(page.locator("#found")).to_have_text("No requests match.")


HOSTILE = [
    "<img src=x onerror=alert(1)><svg onload=alert(2)>",
    "</script><script>alert(3)</script></div></main>",
    '[click](javascript:alert(4)) <a href="javascript:alert(5)">x</a> "><iframe srcdoc="<script>alert(6)//">',
    "user\u202eexe.txt\u2066 \u200bhidden \u0000\u0007\u001b[31mred \ufeff \U000e0041 \ufffe",
    "{{constructor.constructor('alert(7)')()}} ${alert(8)} <style>*{display:none}</style>",
    "<base href=https://elsewhere.example/><meta http-equiv=refresh content='0;url=https://elsewhere.example'>",
    "A" * 1_000_000 + "<img src=https://elsewhere.example/x.png>",
    "\u202e" * 100_000,
    "Z\u0334\u0335\u0336" * 3000,
]


def test_what_models_answered_does_nothing(visit, serve, recorder, http, helpers):
    proxy = serve(upstreams=(Upstream.of("recorder", recorder.base_url),))
    template = {"id": "x", "object": "chat.completion", "created": 1, "model": {"toString": HOSTILE[0]}}
    usage = {"prompt_tokens": 1, "completion_tokens": 1, "total_tokens": 2}
    choices = [
        {"index": place, "message": {"role": "assistant", "content": text}, "finish_reason": "<b>stop"}
        for place, text in enumerate(HOSTILE)
    ]
    content = json.dumps({**template, "choices": choices, "usage": usage}).encode()
    recorder.answers.append((200, [("content-type", "application/json")], [content]))
    body = {
        "model": HOSTILE[0],
        "messages": [
            {"role": HOSTILE[0], "content": " ".join(HOSTILE[:6])},
            {"role": {"toString": 1}, "content": "x"},
            {"role": "user", "content": HOSTILE[1]},
        ],
        HOSTILE[1]: HOSTILE[2],
        "n": len(HOSTILE),
    }  # fmt: skip
    headers = {
        "x-cachepipe-namespace": HOSTILE[0].encode(),
        "x-cachepipe-request-id": "javascript:alert(9) \u202e<img src=x onerror=alert(1)>".encode(),
    }
    answer = http.post(helpers.chat_url(proxy), json=body, headers=headers)
    assert answer.status_code == 200, answer.text
    key = answer.headers["x-cachepipe-key"]
    page = visit(server=proxy, viewport=PHONE)
    nothing_of_it = (
        "document.querySelectorAll('main :is(img, svg, iframe, script, style, base, meta)').length"
    )
    for fragment, heading in (
        ("#/", "Overview"),
        (f"#/requests?search={HOSTILE[0][:9]}", "Requests"),
        (f"#/requests/{key}", "Request"),
    ):
        page.goto(f"{proxy.url}/{fragment}")
        expect(page.get_by_role("heading", level=1)).to_have_text(heading)
        expect(
            page.locator("main :not(option)", has_text="<img src=x onerror=alert(1)").first
        ).to_be_visible()
        assert page.evaluate(nothing_of_it) == 0
        assert page.evaluate("document.documentElement.scrollWidth") <= PHONE["width"]
    hrefs = page.evaluate("[...document.querySelectorAll('a')].map((link) => link.getAttribute('href'))")
    assert all(href.startswith("#") for href in hrefs)
    texts = [article.locator(".text").first for article in page.get_by_role("article").all()]
    assert len(texts) == len(HOSTILE)
    for place in (0, 1, 2, 4, 5):
        assert texts[place].text_content() == HOSTILE[place]
    shown = texts[3].text_content()
    assert shown == ("userU+202Eexe.txtU+2066 U+200Bhidden U+0000U+0007U+001B[31mred U+FEFF U+E0041 U+FFFE")
    assert len(texts[6].text_content()) == 2001
    page.get_by_role("button", name="Show all 1,000,041 characters").click()
    assert texts[6].text_content() == HOSTILE[6]
    lengths = "[...document.querySelectorAll('.piece')].map((piece) => piece.textContent.length)"
    assert max(page.evaluate(lengths)) <= 2000 * len("<U+202E>")  # else browsers stop
    page.get_by_role("button", name="Show less").click()
    assert len(texts[6].text_content()) == 2001
    page.get_by_role("button", name="Show all 100,000 characters").click()
    assert "\u202e" not in texts[7].text_content()
    for closed in page.get_by_text("Stored form").all():
        closed.click()
    assert page.evaluate(nothing_of_it) == 0
    for fragment in (
        f"#/requests/{HOSTILE[0]}",
        "#/requests/%",
        "#/<img src=x onerror=alert(1)>",
        "#/requests?after=x",
    ):
        page.goto(f"{proxy.url}/{fragment}")
        expect(page.locator("main[aria-busy]")).to_have_count(0)
    assert page.evaluate(nothing_of_it) == 0


@pytest.mark.parametrize(
    ("viewport", "scheme"),
    [(PHONE, "dark"), (WIDE, "light"), *sized([], [(PHONE, "light"), (WIDE, "dark")])],
    ids=lambda part: part if isinstance(part, str) else f"{part['width']}",
)
def test_axe_finds_nothing_wrong(visit, ask, axe, scheme, viewport):
    ask("How many\u202e?", "a", 2)
    key = ask("How many\u202e?", "b", 3)
    page = visit(viewport=viewport, color_scheme=scheme, reduced_motion="reduce")
    for fragment, title in (
        ("#/", "Overview"),
        ("#/requests", "Requests"),
        (f"#/requests/{key}", "Request"),
        ("#/requests/none", "Error"),
    ):
        page.evaluate("(fragment) => { location.hash = fragment }", fragment)
        expect(page).to_have_title(f"{title} · cachepipe")
        assert axe(page) == []
        assert page.evaluate("document.documentElement.scrollWidth") <= viewport["width"]
        durations = (
            "[...document.querySelectorAll('*')].map((each) => getComputedStyle(each).transitionDuration)"
        )
        assert {*page.evaluate(durations)} == {"0s"}


def test_the_token_is_asked_for_and_stays_in_the_tab(visit, serve, axe):
    proxy = serve(token="t0ken-ä")
    page = visit(server=proxy)
    sent = []
    page.on("request", lambda request: sent.append((request.url, request.headers.get("x-cachepipe-token"))))
    field = page.get_by_label("Token of this proxy")
    expect(field).to_be_focused()
    assert axe(page) == []
    page.keyboard.type("wrong")
    page.keyboard.press("Enter")
    expect(page.get_by_role("alert")).to_have_text("The token is wrong.")
    page.get_by_label("Token of this proxy").fill("t0ken-ä")
    page.keyboard.press("Enter")
    expect(page.locator("#count-hits")).to_have_text("0")
    page.reload()
    expect(page.locator("#count-hits")).to_have_text("0")
    assert not any("t0ken" in url for url, _ in sent)
    assert "t0ken" not in page.url
    assert page.context.cookies() == []
    assert page.evaluate("localStorage.length") == 0
    page.get_by_role("button", name="Forget the token").click()
    expect(page.get_by_label("Token of this proxy")).to_be_visible()
    assert page.evaluate("sessionStorage.length") == 0
    assert page.get_by_text("read-write").count() == 0


def test_what_tokens_cost_is_shown_where_it_is_known(visit, ask, proxy, monkeypatch):
    def cost_of(counts, model, url):
        assert (model, urlsplit(url).path) == ("m", "/v1/chat/completions")
        return (counts.get("prompt_tokens", 0) * 2 + counts.get("completion_tokens", 0) * 4) / 1000

    monkeypatch.setattr("cachepipe.prices.cost_of", cost_of)
    ask("How many?", "a")
    ask("How many?", "b")
    page = visit()
    counters = httpx2.get(f"{proxy.url}/cachepipe/api/counters").json()
    spent = counters["total"]["spent"]
    assert spent["cost"] == pytest.approx(
        (spent["prompt_tokens"] * 2 + spent["completion_tokens"] * 4) / 1000
    )
    assert counters["total"]["saved"]["cost"] == pytest.approx(spent["cost"])
    assert page.locator("#note-spent").text_content().startswith("$")


def test_c6_tables_show_what_each_model_and_namespace_has_cost_and_wasted(visit, ask, proxy):
    ask("How many?", "a", 2)
    ask("How many?", "b")
    page = visit()
    counters = httpx2.get(f"{proxy.url}/cachepipe/api/counters").json()
    stats = httpx2.get(f"{proxy.url}/cachepipe/api/stats").json()
    models = page.get_by_role("table", name="By model, since the start").get_by_role("row").nth(1)
    [model] = counters["total"]["models"]
    shown = [str(model[kind]["total_tokens"]) for kind in ("spent", "billed", "saved")]
    expect(models.get_by_role("cell")).to_have_text([re.compile(f"^{each}( |$)") for each in shown])
    assert models.get_by_role("rowheader").text_content() == "m"
    whole = page.get_by_role("table", name="The whole cache")
    for sums in stats["namespaces"]:
        row = whole.get_by_role("row").filter(
            has=page.get_by_role("link", name=sums["namespace"], exact=True)
        )
        shown = [str(sums[kind]["total_tokens"]) for kind in ("spent", "saved", "wasted")]
        for place, each in enumerate(shown, start=4):
            expect(row.get_by_role("cell").nth(place)).to_have_text(re.compile(f"^{each}( |$)"))
    assert [sums["namespace"] for sums in stats["namespaces"]] == ["a", "b"]


def test_prices_are_of_the_provider_and_unknown_is_not_nothing():
    known = Prices()
    seller = known.seller("gpt-4o-mini", "https://api.openai.com/v1/chat/completions")
    other = known.seller("made-up", "http://127.0.0.1/v1/chat/completions")
    account = Account()
    prompt, completion = {"prompt_tokens": 2_000_000, "cached_tokens": 1_000_000}, 1_000_000
    whole = {"completion_tokens": completion, "total_tokens": 3_000_000, "reasoning_tokens": 0}
    for model, url in (seller, other):
        account.add(Usage(model, {**prompt, **whole}, first=True), url, prompt=True)
    assert account.cost(known.cost) == (None, 2)
    known.learn()
    cost = pytest.approx(0.15 + 0.075 + 0.60)  # list prices of a million tokens each
    assert account.cost(known.cost) == (cost, 1)
