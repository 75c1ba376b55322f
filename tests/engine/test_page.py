"""The page at / in Chromium, against a running server that asks for no key."""

import json
import re
import shutil
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from browser import Seen, chromium, expect, needs_chromium, open_page
from server_process import Server

# An engine start and a browser; together over half a minute.
pytestmark = [pytest.mark.engine, pytest.mark.slow, needs_chromium]

EXAMPLE = Path(__file__).parents[2] / "examples" / "tiny-llama-2of4"
# So much that a CPU writes for minutes: whatever stops an answer comes before its end.
CONTEXT = 2**17
# Without a rate where a server under load sends all at once.
FIGURES = r"([\d,]+) tokens · (?:[\d.,]+ tokens/s · )?first token [\d.]+ m?s · \d+ in the prompt · "


@pytest.fixture(scope="module")
def endless(tmp_path_factory) -> Path:
    """The example, which writes text, without the token by which it would end an answer."""
    folder = tmp_path_factory.mktemp("page") / "model"
    shutil.copytree(EXAMPLE, folder, ignore=shutil.ignore_patterns("recipe"))
    for name in ("config.json", "generation_config.json", "tokenizer_config.json"):
        file = folder / name
        declared = json.loads(file.read_text())
        declared.pop("eos_token", None)
        if "max_position_embeddings" in declared:
            declared["max_position_embeddings"] = CONTEXT
        if "eos_token_id" in declared:
            declared["eos_token_id"] = None
        file.write_text(json.dumps(declared))
    return folder


@pytest.fixture(scope="module")
def server(endless, tmp_path_factory) -> Iterator[Server]:
    log = tmp_path_factory.mktemp("log") / "server"
    running = Server(endless, log, "--served-model-name", "tiny", "--enforce-eager")
    running.wait_ready()
    yield running
    running.stop(signal.SIGTERM)


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with chromium() as running:
        yield running


@pytest.fixture
def opened(browser, server) -> Iterator[tuple[Any, Seen]]:
    page, seen = open_page(browser, server.url)
    expect(page.locator("#status")).to_have_text("ready")
    yield page, seen
    assert seen.origins == {server.url}
    page.context.close()


@pytest.fixture
def page(opened) -> Iterator[Any]:
    """A page that has nothing to complain about."""
    page, seen = opened
    yield page
    assert seen.console == []


def send(page: Any, text: str, **fields: str) -> None:
    page.locator("details.sampling").evaluate("details => { details.open = true }")
    for name, value in fields.items():
        page.locator(f"[name={name}]").fill(value)
    page.locator("#prompt").fill(text)
    page.keyboard.press("Enter")


def figures(page: Any, answers: int = 1) -> str:
    """The line below the last answer, once there are so many."""
    ended = page.locator(".figures:not(:empty)")
    expect(ended).to_have_count(answers)
    return ended.last.inner_text()


def written(page: Any) -> str:
    """The last answer, with its white space."""
    return page.locator(".answered").last.evaluate("node => node.textContent")


def test_loads(page):
    expect(page).to_have_title("tiny · cast-serve")
    expect(page.locator("#about")).to_have_text("tiny")
    expect(page.locator("#key-dialog")).to_be_hidden()
    expect(page.get_by_label("Message", exact=True)).to_be_focused()


def test_chat(opened, server):
    page, seen = opened
    send(page, "it was", max_tokens="40")
    assert re.fullmatch(FIGURES + "ended at max tokens", figures(page))[1] == "40"
    first = written(page)
    assert first
    send(page, "and then")
    figures(page, 2)
    assert [turn["role"] for turn in seen.posted[1]["messages"]] == ["user", "assistant", "user"]
    assert seen.posted[1]["messages"][1]["content"] == first
    assert seen.console == []


def test_completion_is_the_api_s(page, server):
    page.get_by_label("Completion").check()
    send(page, "it was", max_tokens="30", temperature="0")
    figures(page)
    answer = server.client().completions.create(
        model="tiny", prompt="it was", max_tokens=30, temperature=0
    )
    assert written(page) == answer.choices[0].text
    expect(page.locator(".asked")).to_have_text("it was")


@pytest.mark.parametrize("how", ["Stop", "Escape", "Clear"])
def test_answers_stream_and_stop(page, server, how):
    """Pieces show while the rest is written; stopping ends it in the engine too."""
    limit = CONTEXT - 100
    before = server.metric("vllm:generation_tokens_total")
    send(page, "it was", max_tokens=str(limit))
    expect(page.locator("article[aria-busy] .answered")).not_to_be_empty()
    expect(page.get_by_role("button", name="Send")).to_be_hidden()
    if how == "Escape":
        page.keyboard.press("Escape")
    else:
        page.get_by_role("button", name=how).click()
    if how == "Clear":
        expect(page.locator(".transcript")).to_contain_text("Answers appear here")
        expect(page.locator("article")).to_have_count(0)
    else:
        ended = re.fullmatch(FIGURES + "stopped", figures(page))
        assert ended is not None
        assert int(ended[1].replace(",", "")) < limit
    expect(page.get_by_role("button", name="Send")).to_be_enabled()
    end = time.monotonic() + 60
    while server.metric("vllm:num_requests_running") > 0 and time.monotonic() < end:
        page.wait_for_timeout(100)
    assert server.metric("vllm:num_requests_running") == 0
    assert server.metric("vllm:generation_tokens_total") < before + limit


def test_error_is_the_server_s(opened):
    page, seen = opened
    send(page, "it was", max_tokens=str(2 * CONTEXT))
    fault = page.get_by_role("alert").filter(has_text="max_tokens")
    expect(fault).to_contain_text(str(2 * CONTEXT))
    # What was not answered can be sent again, and is no part of the chat.
    expect(page.get_by_label("Message", exact=True)).to_have_value("it was")
    send(page, "it was", max_tokens="5")
    figures(page)
    assert [turn["content"] for turn in seen.posted[1]["messages"]] == ["it was"]
    # The browser itself says that an answer was 400, and nothing else was said.
    (said,) = seen.console
    assert "status of 400" in said


def test_sampling_is_sent_and_only_what_is_set(opened):
    page, seen = opened
    page.get_by_label("Completion").check()
    send(page, "a", max_tokens="")
    figures(page)
    given = {"temperature": 0.5, "top_p": 0.9, "top_k": 7, "min_p": 0.01, "seed": 3}
    given |= {"max_tokens": 4, "repetition_penalty": 1.5}
    fields = {name: str(value) for name, value in given.items()}
    send(page, "b", stops="one\n two", **fields)
    figures(page, 2)
    always = {
        "model": "tiny",
        "stream": True,
        "stream_options": {"include_usage": True, "continuous_usage_stats": True},
    }
    assert seen.posted[0] == {**always, "prompt": "a"}
    assert seen.posted[1] == {**always, **given, "prompt": "b", "stop": ["one", " two"]}


def test_system_message(opened):
    page, seen = opened
    page.locator("details.sampling summary").click()
    page.get_by_label("System message").fill("be brief")
    send(page, "it was", max_tokens="4")
    figures(page)
    turns = [{"role": "system", "content": "be brief"}, {"role": "user", "content": "it was"}]
    assert seen.posted[0]["messages"] == turns
    page.get_by_label("Completion").check()
    expect(page.get_by_label("System message")).to_be_hidden()


def test_lines_break_and_texts_are_no_markup(page):
    text = "<img src=x onerror=alert(1)>"
    page.get_by_label("Message", exact=True).fill(text)
    page.keyboard.press("Shift+Enter")
    page.keyboard.type("it was")
    page.locator("details.sampling").evaluate("details => { details.open = true }")
    page.locator("[name=max_tokens]").fill("4")
    page.get_by_role("button", name="Send").click()
    figures(page)
    assert page.locator(".asked").evaluate("node => node.textContent") == f"{text}\nit was"
    expect(page.locator("main img")).to_have_count(0)


def test_browser_refuses_other_code(opened):
    """The policy holds in fact: no HTML and no script is made of text."""
    page, _ = opened
    for code in ("body.innerHTML = '<b>x</b>'", "createElement('script').text = 'x'"):
        with pytest.raises(Exception, match=r"This document requires 'Trusted"):
            page.evaluate(f"() => {{ document.{code} }}")
    expect(page.locator("h1")).to_have_text("cast-serve")


def test_model_panel(page, server):
    info = httpx.get(f"{server.url}/v1/cast/info").json()
    panel = page.locator("#model-panel")
    facts = panel.locator(".facts")
    for fact in ("LlamaForCausalLM", "packed, bfloat16", "56 are 2:4, 0 dense", "cpu"):
        expect(facts).to_contain_text(fact)
    weights = info["weights"]
    share = 100 * weights["bytes"] / weights["bytes_if_dense"]
    expect(panel).to_contain_text(f"if all was dense ({share:.0f} %)")
    expect(panel.locator(".strips rect")).to_have_count(len(info["layers"]))
    titles = panel.locator(".strips rect title").all_text_contents()
    assert sorted(titles) == sorted(f"{layer['name']}: 50 %" for layer in info["layers"])
    panel.get_by_text("All 32 layers").click()
    rows = panel.get_by_role("region", name="Layers").locator("tbody tr")
    expect(rows).to_have_count(len(info["layers"]))
    expect(rows.first).to_contain_text("2:4 run dense")
    kernels = panel.get_by_role("region", name="Kernels").locator("tbody tr")
    expect(kernels).to_have_count(len(info["kernels"]))
    expect(kernels.first).to_contain_text("dense")


def test_charts_are_live(page, server):
    """Their words are those of /metrics; their lines have points."""
    charts = page.locator(".charts svg")
    expect(charts).to_have_count(5)
    before = server.metric("vllm:generation_tokens_total")
    send(page, "it was", max_tokens="500")
    rate = page.get_by_label(re.compile(r"Tokens a second, now: written [1-9][\d,.]*, prompt"))
    expect(rate).to_be_visible(timeout=60_000)
    figures(page)
    assert server.metric("vllm:generation_tokens_total") == before + 500
    latency = re.compile(r"Time to first token, now: p50 [\d.]+ m?s, p95 [\d.]+ m?s")
    expect(page.get_by_label(latency)).to_be_visible(timeout=60_000)
    expect(page.get_by_label(re.compile(r"KV cache, now: in use [\d.]+ %"))).to_be_visible()
    expect(page.get_by_label("Requests, now: running 0, waiting 0")).to_be_visible(timeout=60_000)
    assert page.locator(".line-0").first.get_attribute("d").count("L") >= 1


def test_rate_and_first_token(page):
    """Of 2 tokens after 0.5 s, 11 at 1 s and 12 at 2.5 s; and of 3 that came at once."""
    said = page.evaluate(
        """async () => {
            const { Clock } = await import("./ui/clock.js");
            const line = (pieces, finish) => {
                const clock = new Clock(1000);
                for (const [time, tokens] of pieces) clock.note({ time, tokens, promptTokens: 4 });
                return clock.summary(finish);
            };
            const slow = [[1100, 0], [1500, 1], [1500, 2], [2000, 11], [3500, 12], [3600, 12]];
            return [line(slow, "stop"), line([[1020, 3]], "length"), line([], "stopped")];
        }"""
    )
    assert said == [
        "12 tokens · 5 tokens/s · first token 500 ms · 4 in the prompt · stop",
        "3 tokens · first token 20 ms · 4 in the prompt · ended at max tokens",
        "stopped",
    ]


def test_quantiles(page):
    """Against PromQL's rule, worked by hand: linear inside a bucket."""
    found = page.evaluate(
        """async () => {
            const { buckets, between, parse, quantile, sum } = await import("./ui/prometheus.js");
            const labels = String.raw`model_name="a \\"b\\" } ,c"`;
            const text = (...counts) => ["1.0", "2.0", "+Inf"].map((le, i) =>
                `h_bucket{le="${le}",${labels}} ${counts[i]}`).join("\\n");
            const early = buckets(parse(text(10, 10, 10)), "h");
            const late = buckets(parse(text(12, 18, 20) + "\\n" + text(0, 0, 0)), "h");
            const counts = between(early, late);
            return {
                counts: counts.map(([, count]) => count),
                quantiles: [0.1, 0.5, 0.8, 0.95].map((q) => quantile(q, counts)),
                none: quantile(0.5, between(late, late)),
                labels: parse(text(1, 2, 3)).get("h_bucket")[0].labels,
                sum: sum(parse('x{engine="0"} 1.5\\nx{engine="1"} 2e3\\n# x 7'), "x"),
            };
        }"""
    )
    assert found["counts"] == [2, 8, 10]
    # Ranks 1, 5, 8, 9.5 of 10: in the first bucket, in the second, at its end, beyond all bounds.
    assert found["quantiles"] == [0.5, 1.5, 2, 2]
    assert found["none"] is None
    assert found["labels"] == {"le": "1.0", "model_name": 'a "b" } ,c'}
    assert found["sum"] == 2001.5


@pytest.mark.parametrize("width", [320, 1024])
def test_nothing_sticks_out(browser, server, width):
    page, seen = open_page(browser, server.url, viewport={"width": width, "height": 640})
    expect(page.locator("#status")).to_have_text("ready")
    page.get_by_text("All 32 layers").click()
    send(page, "x" * 300, max_tokens="40")
    figures(page)
    assert page.evaluate("() => document.documentElement.scrollWidth") == width
    sticking_out = page.evaluate(
        """() => [...document.querySelectorAll("main *:not(.scroll *, .unseen)")]
            .filter((node) => node.getBoundingClientRect().right > innerWidth + 0.5)
            .map((node) => node.outerHTML.slice(0, 80))"""
    )
    assert sticking_out == []
    assert seen.console == []
    page.context.close()


def test_by_keyboard_alone(page):
    """Tab reaches every control in the order of the page, and each shows that it has the focus."""
    expect(page.get_by_role("region", name="Kernels")).to_be_visible()
    page.get_by_text("Skip to the prompt").focus()
    reached = ["skip"]
    for _ in range(40):
        page.keyboard.press("Tab")
        focused = page.evaluate(
            """() => {
                const node = document.activeElement;
                const shown = node.name === "mode" ? node.nextElementSibling : node;
                const name = node.id || node.name || node.className || node.textContent;
                return [node.tagName, name, getComputedStyle(shown).outlineStyle];
            }"""
        )
        if focused[0] == "BODY":
            break
        assert focused[2] != "none", focused
        reached.append(focused[1])
    wanted = ["skip", "mode", "clear", "transcript", "prompt", "send", "Model and sampling"]
    assert [name for name in reached if name in wanted] == wanted
    assert reached[-1] == "scroll"
    page.keyboard.press("Tab")
    page.keyboard.press("Enter")
    page.keyboard.type("it was")
    page.keyboard.press("Enter")
    expect(page.locator(".answered")).not_to_be_empty()
    figures(page)


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_accessibility(browser, server, scheme):
    """axe-core finds nothing, with an answer, an error and every detail open."""
    from axe_playwright_python.sync_playwright import Axe

    # High enough that nothing is half scrolled away, of which axe would not judge the colours.
    # axe is put into the page as a script, which the page's policy refuses.
    window = {"viewport": {"width": 1280, "height": 1500}, "bypass_csp": True}
    page, _ = open_page(browser, server.url, color_scheme=scheme, **window)
    expect(page.locator("#status")).to_have_text("ready")
    send(page, "it was", max_tokens="20")
    figures(page)
    send(page, "it was", max_tokens=str(2 * CONTEXT))
    expect(page.get_by_role("alert").filter(has_text="max_tokens")).to_be_visible()
    page.get_by_text("All 32 layers").click()
    found = Axe().run(page).response
    assert found["violations"] == []
    undecided = {node["html"] for rule in found["incomplete"] for node in rule["nodes"]}
    # It does not judge the colour of a single character, which a chart's scale may be.
    assert {html for html in undecided if 'class="scale' not in html} == set()
    assert len(found["passes"]) > 20
    page.context.close()


def test_dark_is_dark(browser, server):
    def shade(scheme: str) -> int:
        page, _ = open_page(browser, server.url, color_scheme=scheme)
        colour = page.evaluate("() => getComputedStyle(document.body).backgroundColor")
        page.context.close()
        return sum(map(int, re.findall(r"\d+", colour)[:3]))

    assert shade("dark") < 150 < 600 < shade("light")


def test_server_gone(opened, server):
    """The last test of this file: it ends the server that the others share."""
    page, _ = opened
    server.stop(signal.SIGTERM)
    expect(page.locator("#status")).to_have_text("no answer")
    send(page, "it was")
    expect(page.get_by_role("alert").filter(has_text="fetch")).to_be_visible()
