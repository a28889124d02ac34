"""The page at `/`, in headless Chromium and by what it is made of."""

from __future__ import annotations

import base64
import hashlib
import re
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from arriero.runtimes.server.page import FILE
from arriero.runtimes.session import Session
from tests.runtimes.gate import Gate
from tests.runtimes.server.conftest import Serve, Served, let_say

KEY = "sesame"


def test_the_page_is_one_file_that_names_no_other(served: Served) -> None:
    text = FILE.read_text(encoding="utf-8")
    with served.web() as web:
        answer = web.get("/")
    assert answer.text == text
    assert not re.search(r"https?:|//[a-z]|@import|url\(|<iframe|<object|\son\w+=|\sstyle=|javascript:|innerHTML", text)
    assert set(re.findall(r'\b(?:src|href)="([^"]*)"', text)) == {"data:,"}
    policy = dict(part.split(" ", 1) for part in answer.headers["content-security-policy"].split("; "))
    assert policy["default-src"] == policy["base-uri"] == policy["frame-ancestors"] == "'none'"
    for tag in ("script", "style"):
        (content,) = re.findall(f"<{tag}>(.*?)</{tag}>", answer.text, re.S)
        digest = base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()
        assert policy[f"{tag}-src"] == f"'sha256-{digest}'"


def test_the_key_may_be_a_browsers_password(serve: Serve, toy_session: Session) -> None:
    served = serve({"toy": toy_session}, api_key=KEY)
    with served.web() as web:
        for auth in (None, ("any", "wrong"), (KEY, "")):
            answer = web.get("/", auth=auth)
            assert (answer.status_code, answer.headers["www-authenticate"].split()[0]) == (401, "Basic")
            answer = web.get("/v1/models", auth=auth)
            assert (answer.status_code, answer.headers["www-authenticate"]) == (401, "Bearer")
        for header in ("Basic", "Basic !", "Basic c2VzYW1l"):
            assert web.get("/", headers={"Authorization": header}).status_code == 401
        for path in ("/", "/v1/models"):
            assert web.get(path, auth=("any", KEY)).status_code == 200


# --- in a browser


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    playwright = pytest.importorskip("playwright.sync_api", reason="needs playwright")
    path = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if path is None:
        pytest.skip("needs Chromium: apt install chromium")
    with playwright.sync_playwright() as driver:
        chromium = driver.chromium.launch(executable_path=path, args=["--no-sandbox"])
        yield chromium
        chromium.close()


class Page:
    """The page in a browser, which keeps what went wrong there and where it asked."""

    def __init__(self, browser: Any, served: Served, **options: Any) -> None:
        self.context = browser.new_context(**options)
        self.context.set_default_timeout(20_000)
        self.page = self.context.new_page()
        self.asked: list[str] = []
        self.wrong: list[str] = []
        self.page.on("request", lambda request: self.asked.append(request.url))
        self.page.on("console", lambda message: self.wrong.append(message.text) if message.type == "error" else None)
        self.page.on("pageerror", lambda error: self.wrong.append(str(error)))
        self.page.goto(served.url)
        self.page.wait_for_selector("#model option", state="attached")
        self.served = served

    def set(self, **settings: str) -> None:
        if self.page.is_hidden("#settings"):
            self.page.click("#open")
        for name, value in settings.items():
            self.page.fill(f"#{name}", value)

    def say(self, text: str) -> None:
        self.page.fill("#prompt", text)
        self.page.press("#prompt", "Enter")

    def until(self, condition: str) -> None:
        """Wait for `condition`; the page's policy lets nothing wait inside of it."""
        for _ in range(1000):
            if self.page.evaluate(condition):
                return
            time.sleep(0.02)
        raise AssertionError(condition)

    def wait(self, answers: int) -> tuple[str, str]:
        """The last answer's words and the note below it, once so many have come."""
        self.until(
            f"document.querySelectorAll('article.assistant').length == {answers} && at('send').textContent == 'Send'"
        )
        last = self.page.locator("article.assistant").last
        return last.locator("p").text_content(), last.locator("small").text_content()

    def close(self) -> None:
        assert self.wrong == []
        assert all(url.startswith((self.served.url, "data:")) for url in self.asked)
        self.context.close()


def test_a_conversation_with_a_picture(browser: Any, serve: Serve, toy_session: Session, tmp_path: Path) -> None:
    """Behind a key: what the page shows is the session's own answers to the whole conversation."""
    served = serve({"toy": toy_session}, api_key=KEY)
    page = Page(browser, served, http_credentials={"username": "any", "password": KEY})
    assert page.page.locator("#model option").all_text_contents() == ["toy", "toy:pirate"]
    page.set(temperature="0", max_tokens="12", system="Be brief.")
    talk: list[Any] = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hello\nthere"}]
    page.page.fill("#prompt", "Hello\nthere")
    page.page.click("#send")
    words, note = page.wait(1)
    assert words == toy_session.generate(talk, max_tokens=12).text
    assert re.search(r"12 tokens, [\d.]+ tokens/s, first after [\d.]+ s, prompt \d+ \(\d+ read before\), cut at", note)
    shade = np.full((40, 60, 3), 30, np.uint8)
    Image.fromarray(shade).save(tmp_path / "grey.png")
    page.page.set_input_files("#files", [tmp_path / "grey.png"] * 2)
    page.until("document.querySelectorAll('#shown img').length == 2")
    page.page.locator("#shown img").first.click()  # the same picture twice goes as one
    page.page.set_input_files("#files", tmp_path / "grey.png")
    page.page.wait_for_selector("#shown img")
    page.until("pictures.length == 1")
    page.say("What is it?")
    shown = [{"type": "image"}, {"type": "text", "text": "What is it?"}]
    talk += [{"role": "assistant", "content": words}, {"role": "user", "content": shown}]
    assert page.wait(2)[0] == toy_session.generate(talk, [Image.fromarray(shade)], max_tokens=12).text
    assert page.page.locator("article.user img").count() == 1
    page.page.click("#again")
    page.say("Hello\nthere")
    assert page.wait(1)[0] == words
    page.close()


def test_what_is_said_is_text_and_errors_are_sentences(
    browser: Any, served: Served, toy_session: Session, toy: Any
) -> None:
    page = Page(browser, served)
    page.set(temperature="0", max_tokens="4000")
    page.say("x")
    assert "exceed the context" in page.wait(1)[1]
    page.wrong.clear()  # where the browser tells of the status
    text = "<img src=x onerror=alert(1)><b>bold</b>"
    page.page.click("#again")
    let_say(toy, toy_session, len(toy_session.encode([{"role": "user", "content": text}]).input_ids), text)
    page.set(max_tokens="60")
    page.say(text)
    assert page.wait(1)[0] == text
    assert page.page.locator("article img, article b").count() == 0
    page.close()


def test_an_answer_is_stopped(browser: Any, served: Served, toy_session: Session, toy: Any) -> None:
    gate = Gate(toy)
    gate.open(12)
    page = Page(browser, served)
    page.set(temperature="0", max_tokens="300")
    page.say("Hello")
    page.until("document.querySelector('article.assistant p').textContent.length > 3")
    page.page.click("#send")
    words, note = page.wait(1)
    assert words
    assert note.endswith(", stopped")
    gate.open_while(lambda: toy_session.stats().running)
    assert toy_session.stats().generated_tokens < 30
    gate.open(10_000)
    page.close()


def test_settings_stay_and_dark_is_dark(browser: Any, served: Served) -> None:
    page = Page(browser, served, color_scheme="light")
    back = "getComputedStyle(document.body).backgroundColor"
    light = page.page.evaluate(back)
    page.page.click("#theme")
    dark = page.page.evaluate(back)
    assert sum(map(int, re.findall(r"\d+", dark))) < 120 < 600 < sum(map(int, re.findall(r"\d+", light)))
    page.set(temperature="0.3", system="Be brief.")
    page.page.select_option("#model", "toy:pirate")
    page.page.reload()
    page.page.wait_for_selector("#model option", state="attached")
    assert page.page.evaluate(back) == dark
    assert [page.page.input_value(f"#{name}") for name in ("temperature", "system", "model")] == [
        *("0.3", "Be brief."),
        "toy:pirate",
    ]
    page.page.click("#theme")
    assert page.page.evaluate(back) == light
    page.close()
