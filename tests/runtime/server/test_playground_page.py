"""The playground's page as such: who gets it, what it may do, and whether everybody can use it."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import TYPE_CHECKING

import httpx
import pytest
from browser import Visit, chromium, visit
from live_app import live
from scripted_server import ScriptedServer

from runtime.server.auth import ApiKeys
from runtime.server.routes.playground import PATHS
from runtime.server.settings import ServerSettings
from runtime.text.tokenizer import Tokenizer

if TYPE_CHECKING:
    from playwright.sync_api import Browser

PHONE = {"viewport": {"width": 390, "height": 844}, "has_touch": True, "is_mobile": True}


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with chromium() as browser:
        yield browser


@pytest.fixture(scope="module")
def url(tokenizer: Tokenizer) -> Iterator[str]:
    with live(ScriptedServer(tokenizer, "hello").app) as port:
        yield f"http://127.0.0.1:{port}"


@pytest.mark.parametrize(
    ("playground", "without_key", "with_key"), [("keyed", 401, 200), ("open", 200, 200), ("off", 401, 404)]
)
def test_who_gets_the_page(tokenizer: Tokenizer, playground: str, without_key: int, with_key: int) -> None:
    settings = ServerSettings.model_validate({"playground": playground})
    with live(ScriptedServer(tokenizer, "hello", settings, ApiKeys(["sesame"])).app) as port:
        for path in PATHS:
            address = f"http://127.0.0.1:{port}{path}"
            assert httpx.get(address).status_code == without_key, path
            assert httpx.get(address, headers={"authorization": "Bearer sesame"}).status_code == with_key, path
        for path in ("/v1/models", "/metrics", "/docs", "/playground/", "/playground/x.js", "/playground", "//"):
            assert httpx.get(f"http://127.0.0.1:{port}{path}").status_code == 401, path


def test_a_browser_is_told_which_password(tokenizer: Tokenizer) -> None:
    with live(ScriptedServer(tokenizer, "hello", keys=ApiKeys(["sesame"])).app) as port:
        refused = httpx.get(f"http://127.0.0.1:{port}/", headers={"accept": "text/html"})
    assert refused.headers["www-authenticate"].startswith("Basic")
    assert "password" in refused.json()["error"]["message"]


def test_the_page_is_made_of_files_of_its_own(url: str) -> None:
    page = httpx.get(url)
    assert page.headers["content-type"] == "text/html; charset=utf-8"
    named = set(re.findall(r'(?:src|href)="([^"]+)"', page.text))
    assert {f"/{name}" for name in named if name.startswith("playground/")} < PATHS
    for name in named:
        assert httpx.get(f"{url}/{name}").status_code == 200, name
    assert httpx.get(f"{url}/playground/index.html").status_code == 404


def test_the_policy_leaves_no_way_in(url: str) -> None:
    policy = dict(part.strip().split(" ", 1) for part in httpx.get(url).headers["content-security-policy"].split(";"))
    assert policy["default-src"] == "'none'"
    assert policy["require-trusted-types-for"] == "'script'"
    assert set(policy.values()) == {"'none'", "'self'", "'script'"}


def test_every_control_has_a_name_and_the_page_an_order(browser: Browser, url: str) -> None:
    with visit(browser, url) as tab:
        tab.wait("#run:enabled")
        nameless = """(controls) => controls.filter((control) =>
            !control.textContent.trim() && ![...control.labels].some((label) => label.textContent.trim())
        ).map((control) => control.outerHTML)"""
        assert tab.page.eval_on_selector_all("input, textarea:not(#prompt), select, button", nameless) == []
        reached = []
        for _ in range(16):
            tab.page.keyboard.press("Tab")
            reached.append(tab.page.evaluate("document.activeElement.id || document.activeElement.className"))
    fields = ["prompt", "run", "temperature", "top_p", "max_tokens", "seed", "stop_strings", "output"]
    assert [name for name in reached if name in fields] == fields


def test_it_is_used_by_keyboard_alone(browser: Browser, url: str) -> None:
    with visit(browser, url) as tab:
        tab.wait("#run:enabled")
        tab.page.focus("#prompt")
        tab.page.keyboard.press("Control+A")
        tab.page.keyboard.type("Well, ")
        tab.page.focus("#max_tokens")
        tab.page.keyboard.press("Control+A")
        tab.page.keyboard.type("5")
        tab.page.keyboard.press("Enter")
        tab.wait(".status", "finished")
        assert tab.text(".output") == "Well, hello"


def test_it_fits_a_phone(browser: Browser, url: str) -> None:
    with visit(browser, url, **PHONE) as tab:
        tab.wait("#run:enabled")
        tab.page.evaluate("document.querySelectorAll('details').forEach((details) => { details.open = true; })")
        assert tab.page.evaluate("document.documentElement.scrollWidth") == 390
        boxes = tab.page.eval_on_selector_all(
            "button, textarea, select, input",
            "(all) => all.map((one) => one.getBoundingClientRect()).filter((box) => box.width)"
            ".map((box) => [box.left, box.right])",
        )
        assert all(left >= 0 and right <= 390 for left, right in boxes)


def luminance(color: str) -> float:
    """Relative luminance, WCAG 2.2."""
    channels = [float(value) / 255 for value in re.findall(r"[\d.]+", color)[:3]]
    linear = [value / 12.92 if value <= 0.04045 else ((value + 0.055) / 1.055) ** 2.4 for value in channels]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def contrasts(tab: Visit) -> dict[str, float]:
    """Contrast ratio of text to what lies behind it, WCAG 2.2, by element."""
    pairs = tab.page.evaluate("""() => [...document.querySelectorAll("body *")]
        .filter((element) => element.checkVisibility() && !element.matches(":disabled, :disabled + *"))
        .filter((element) => [...element.childNodes].some((node) => node.nodeType === 3 && node.data.trim()))
        .map((element) => {
            let behind = element;
            while (getComputedStyle(behind).backgroundColor === "rgba(0, 0, 0, 0)") behind = behind.parentElement;
            const [front, back] = [getComputedStyle(element).color, getComputedStyle(behind).backgroundColor];
            return [element.outerHTML.slice(0, 80), front, back];
        })""")
    found = {}
    for element, front, back in pairs:
        lighter, darker = sorted([luminance(front), luminance(back)], reverse=True)
        found[element] = (lighter + 0.05) / (darker + 0.05)
    return found


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_can_be_read_in_both_schemes(browser: Browser, url: str, scheme: str) -> None:
    with visit(browser, url, color_scheme=scheme) as tab:
        tab.wait("#run:enabled")
        tab.page.fill("#temperature", "9")
        tab.page.press("#prompt", "Control+Enter")
        tab.wait(".status.error")
        background = tab.page.evaluate("getComputedStyle(document.documentElement).backgroundColor")
        assert (luminance(background) < 0.1) is (scheme == "dark")
        ratios = contrasts(tab)
        assert len(ratios) > 20
        assert {element: ratio for element, ratio in ratios.items() if ratio < 4.5} == {}


@pytest.mark.parametrize("motion", ["reduce", "no-preference"])
def test_nothing_moves_where_that_is_not_wanted(browser: Browser, url: str, motion: str) -> None:
    with visit(browser, url, reduced_motion=motion) as tab:
        tab.page.evaluate("document.querySelector('.pane').classList.add('busy')")
        caret = "getComputedStyle(document.querySelector('.output'), '::after').animationName"
        assert (tab.page.evaluate(caret) == "none") is (motion == "reduce")
        speed = "getComputedStyle(document.querySelector('.speed > div')).transitionDuration"
        assert (tab.page.evaluate(speed) == "0s") is (motion == "reduce")
