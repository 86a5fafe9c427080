"""The playground in a real browser, over real servers."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import httpx
import pytest
from browser import READY, Visit, chromium, visit
from exposition import samples_of, total
from live_app import live
from sabotage import STEPS
from scripted_server import ScriptedServer
from server_process import ServerProcess, running_server

from runtime.server.auth import ApiKeys
from runtime.server.catalog import Phase
from runtime.text.tokenizer import Tokenizer

if TYPE_CHECKING:
    from playwright.sync_api import Browser

KEY = "sesame"
PROMPT = "The capital of France is"  # the bundled models agree for a while on what comes next


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with chromium() as browser:
        yield browser


@pytest.fixture(scope="module")
def pair() -> Iterator[ServerProcess]:
    """The bundled models, slow enough for a browser to keep up with on a busy machine."""
    with running_server("demo", "demo-16bit", "--engine", "reference", before=STEPS.format(seconds=0.01)) as server:
        yield server
        assert server.stop() == 0


@pytest.fixture(scope="module")
def slow(chat_checkpoint: Path, checkpoint: Path) -> Iterator[ServerProcess]:
    """A chat model and one without a template, 20 tokens a second, behind a key; the page is open."""
    models, options = (f"chatty={chat_checkpoint}", f"mute={checkpoint}"), ("--engine", "reference")
    access, before = ("--playground", "open"), STEPS.format(seconds=0.05)
    with running_server(*models, *options, *access, before=before, OSP_API_KEY=KEY) as server:
        yield server


@pytest.fixture(scope="module")
def scripted(tokenizer: Tokenizer) -> Iterator[str]:
    """The address of a server that answers "hello"."""
    with live(ScriptedServer(tokenizer, "hello").app) as port:
        yield f"http://127.0.0.1:{port}"


def direct(url: str, **body: Any) -> dict[str, Any]:
    """The same request without a browser and without a stream."""
    answer: dict[str, Any] = httpx.post(f"{url}/v1/completions", json=body, timeout=60).json()
    return answer


def test_a_typed_prompt_is_answered_token_by_token(browser: Browser, pair: ServerProcess) -> None:
    with visit(browser, pair.url) as tab:
        tab.wait(READY)
        # How long the text was at each change, while the answer was not complete.
        tab.page.evaluate("""() => {
            window.lengths = [];
            const [output, stop] = ["output", "stop"].map((name) => document.querySelector(`.${name}, #${name}`));
            const note = () => stop.disabled || window.lengths.push(output.textContent.length);
            new MutationObserver(note).observe(output, { childList: true, characterData: true, subtree: true });
        }""")
        tab.page.fill("#prompt", "")
        tab.page.type("#prompt", PROMPT)
        tab.run(temperature=0, max_tokens=20)
        lengths = [length for length in tab.page.evaluate("window.lengths") if length > len(PROMPT)]
        answer = direct(pair.url, model="demo", prompt=PROMPT, temperature=0, max_tokens=20)
        assert tab.text(".output") == PROMPT + answer["choices"][0]["text"]
        assert len(set(lengths)) > 2, "the text has come in pieces"
        assert min(lengths) < len(tab.text(".output")) / 2
        assert tab.text("[data-figure=tokens]") == str(answer["usage"]["completion_tokens"])
        assert tab.text("[data-figure=prompt]").split(",")[0] == str(answer["usage"]["prompt_tokens"])
        assert float(tab.text("[data-figure=ttft]").removesuffix(" ms")) > 0
        assert tab.faults == []
        assert tab.origins == {pair.url}


def test_two_models_answer_the_same_prompt(browser: Browser, pair: ServerProcess) -> None:
    with visit(browser, pair.url) as tab:
        tab.wait(READY)
        tab.page.check("#compare")
        assert tab.texts(".pane select option") == ["demo", "demo-16bit"] * 2
        tab.run(prompt=PROMPT, temperature=0, max_tokens=12)
        answers = [
            direct(pair.url, model=model, prompt=PROMPT, temperature=0, max_tokens=12)["choices"][0]["text"]
            for model in ("demo", "demo-16bit")
        ]
        assert tab.texts(".output") == [PROMPT + answer for answer in answers]
        shared = os.path.commonprefix(answers)  # noqa: RUF071 - by characters it shall be
        assert shared
        assert tab.texts(".shared") == [shared, shared]
        assert f"agree for {len(shared)} characters" in tab.text("#comparison")
        assert tab.faults == []
        assert tab.origins == {pair.url}


@pytest.mark.parametrize("in_turn", [False, True])
def test_the_two_run_at_once_or_in_turn(browser: Browser, pair: ServerProcess, in_turn: bool) -> None:
    seen: list[str] = []
    with visit(browser, pair.url) as tab:
        tab.page.on("request", lambda request: request.method == "POST" and seen.append("begins"))
        tab.page.on("requestfinished", lambda request: request.method == "POST" and seen.append("ends"))
        tab.wait(READY)
        tab.page.check("#compare")
        tab.page.set_checked("#in-turn", in_turn)
        tab.run(max_tokens=4)
        for _ in range(100):  # the driver may tell of the end later than the page
            if seen.count("ends") < 2:
                tab.page.wait_for_timeout(50)
    assert seen == (["begins", "ends"] * 2 if in_turn else ["begins"] * 2 + ["ends"] * 2)


def test_a_model_is_picked_and_described(browser: Browser, pair: ServerProcess) -> None:
    cards = httpx.get(f"{pair.url}/v1/models").json()["data"]
    with visit(browser, pair.url) as tab:
        tab.wait(READY)
        for card in cards:
            tab.page.select_option(".pane select", card["id"])
            assert card["precision"] in tab.text(".facts")
            quality = card["quality"]
            assert f"{quality.get('perplexity', quality['perplexity_16bit']):.2f}" in tab.text(".quality")
            assert tab.page.is_visible(".scheme") is (card["scheme"] is not None)
            tab.run(prompt=PROMPT, temperature=0, max_tokens=3)
            text = direct(pair.url, model=card["id"], prompt=PROMPT, temperature=0, max_tokens=3)["choices"][0]["text"]
            assert tab.text(".output") == PROMPT + text
        assert tab.page.is_disabled("input[value=chat]")
        assert tab.faults == []


def test_parameters_reach_the_server(browser: Browser, scripted: str) -> None:
    sent: list[Any] = []
    with visit(browser, scripted) as tab:
        tab.page.on("request", lambda request: request.post_data and sent.append(request.post_data_json))
        tab.wait(READY)
        tab.run(prompt="x", temperature=0.3, top_p=0.9, max_tokens=4, seed=7, stop_strings="end\n\\n\\n\n")
        tab.run(prompt="x", temperature="", top_p="", max_tokens=4, seed="", stop_strings="")
    full, bare = ({name: value for name, value in body.items() if "stream" not in name} for body in sent)
    wanted = {"temperature": 0.3, "top_p": 0.9, "max_tokens": 4, "seed": 7, "stop": ["end", "\n\n"]}
    assert full == {"model": "scripted", "prompt": "x", **wanted}
    assert bare == {"model": "scripted", "prompt": "x", "max_tokens": 4}


def test_a_refusal_is_shown_in_the_server_s_words(browser: Browser, scripted: str) -> None:
    good = {"temperature": 1, "max_tokens": 1, "seed": 1}
    with visit(browser, scripted) as tab:
        tab.wait(READY)
        for field, typed in (("temperature", 3), ("max_tokens", 4000), ("seed", "9" * 20), ("seed", "x")):
            said = direct(scripted, **{"prompt": PROMPT, **good, field: typed})
            tab.run(**{"prompt": PROMPT, **good, field: typed})
            assert tab.text(".status.error") == said["error"]["message"]
        tab.run(**good)
        assert tab.texts(".status.error") == []


def metric(server: ServerProcess, name: str, **labels: str) -> float:
    page = httpx.get(f"{server.url}/metrics", headers={"authorization": f"Bearer {KEY}"}).text
    return total(samples_of(page), name, **labels)


def unlock(tab: Visit) -> None:
    tab.fill(key=KEY)
    tab.page.press("#key", "Enter")
    tab.wait(READY)


def test_stop_ends_the_answer_and_the_generation(browser: Browser, slow: ServerProcess) -> None:
    aborted = {"name": "osp_request_success_total", "finished_reason": "abort", "model_name": "mute"}
    before = metric(slow, **aborted)
    with visit(browser, slow.url) as tab:
        unlock(tab)
        tab.page.select_option(".pane select", "mute")
        tab.fill(prompt="x", max_tokens=60, seed=1)
        for how in (lambda: tab.page.click("#stop"), lambda: tab.page.keyboard.press("Escape")):
            tab.page.press("#prompt", "Control+Enter")
            tab.wait("[data-figure=tokens]", "3")
            how()
            tab.wait(READY)
            assert tab.text(".status") == "stopped"
            assert 2 < int(tab.text("[data-figure=tokens]")) < 60
    deadline = time.monotonic() + 20
    while metric(slow, "osp_num_requests_running", model_name="mute"):
        assert time.monotonic() < deadline
        time.sleep(0.02)
    assert metric(slow, **aborted) == before + 2


def test_the_load_of_the_model_is_shown(browser: Browser, slow: ServerProcess) -> None:
    with visit(browser, slow.url) as tab:
        unlock(tab)
        tab.fill(prompt="x", max_tokens=200, seed=1)
        tab.page.press("#prompt", "Control+Enter")
        tab.wait("[data-gauge=running]", "1")
        usage = metric(slow, "osp_kv_cache_usage_perc", model_name="chatty")
        assert usage > 0
        assert tab.text("[data-gauge=waiting]") == "0"
        assert float(tab.text("[data-gauge=kv]").removesuffix(" %")) == pytest.approx(100 * usage, abs=1)
        tab.page.keyboard.press("Escape")


def test_a_conversation(browser: Browser, slow: ServerProcess) -> None:
    sent: list[Any] = []
    with visit(browser, slow.url) as tab:
        unlock(tab)
        tab.page.on("request", lambda request: request.post_data and sent.append(request.post_data_json["messages"]))
        tab.page.check("input[value=chat]", force=True)
        tab.run(system="Be brief.", prompt="Hello", max_tokens=5, temperature=0)
        (first,) = tab.texts(".turn.assistant")
        tab.run(prompt="And then?", max_tokens=5)
        system, hello = {"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hello"}
        assert sent[0] == [system, hello]
        answered = {"role": "assistant", "content": first}
        assert sent[1] == [system, hello, answered, {"role": "user", "content": "And then?"}]
        assert tab.texts(".turn")[:3] == ["Hello", first, "And then?"]
        tab.page.click("#restart")
        assert tab.texts(".turn") == []
        tab.page.check("#compare")  # the second model has no template
        assert tab.page.is_disabled("input[value=chat]")
        assert "mute" in tab.text("#chat-note")


def test_the_open_page_asks_for_the_key_and_keeps_it_in_its_tab(browser: Browser, slow: ServerProcess) -> None:
    with visit(browser, slow.url) as tab:
        tab.page.wait_for_selector("#key")
        assert "API key" in tab.text("#connection")
        assert tab.page.is_disabled("#run")
        tab.fill(key="wrong")
        tab.page.click("#use-key")
        tab.wait("#connection", "not known")
        unlock(tab)
        tab.page.reload()
        tab.wait(READY)
        stored = "[localStorage.length, document.cookie, Object.values(sessionStorage)]"
        assert tab.page.evaluate(stored) == [0, "", [KEY]]
    with visit(browser, slow.url) as other:
        other.page.wait_for_selector("#key")


def test_a_keyed_page_opens_with_the_browser_s_own_password(browser: Browser, tokenizer: Tokenizer) -> None:
    scripted = ScriptedServer(tokenizer, "hello", keys=ApiKeys([KEY]))
    with live(scripted.app) as port:
        url = f"http://127.0.0.1:{port}"
        with visit(browser, url, http_credentials={"username": "me", "password": KEY}) as tab:
            tab.wait(READY)
            assert tab.page.is_hidden("#key")
            tab.run(max_tokens=5)
            assert tab.text(".output").endswith("hello")
        assert httpx.get(url).status_code == 401


def test_text_of_a_model_is_no_markup(browser: Browser, tokenizer: Tokenizer) -> None:
    text = "<img src=x onerror=alert(1)><b>bold</b>"
    with live(ScriptedServer(tokenizer, text).app) as port, visit(browser, f"http://127.0.0.1:{port}") as tab:
        tab.wait(READY)
        tab.run(prompt="<i>p</i>", max_tokens=len(text))
        assert tab.text(".output") == "<i>p</i>" + text
        assert tab.page.locator(".output img, .output b, .output i").count() == 0
        assert tab.faults == []


def test_what_goes_wrong_midway_is_said_below_what_had_come(browser: Browser, tokenizer: Tokenizer) -> None:
    scripted = ScriptedServer(tokenizer, "hello world")
    scripted.engine.dies_after = 5
    with live(scripted.app) as port, visit(browser, f"http://127.0.0.1:{port}") as tab:
        tab.wait(READY)
        tab.run(prompt="x", max_tokens=11)
        assert tab.text(".output") == "xhello"
        assert tab.text(".status.error") == "the engine has died of a test"


def test_a_server_that_still_loads_is_waited_for(browser: Browser, tokenizer: Tokenizer) -> None:
    server = ScriptedServer(tokenizer, "hello")
    catalog = server.app.state.context.catalog
    catalog.phase = Phase.LOADING
    with live(server.app) as port, visit(browser, f"http://127.0.0.1:{port}") as tab:
        tab.wait("#connection", "the server is still loading its models")
        assert tab.page.is_disabled("#run")
        catalog.phase = Phase.SERVING
        tab.wait(READY)
        tab.wait("#connection", "1 model")
        assert tab.page.is_hidden("#compare")
