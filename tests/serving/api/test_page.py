"""The page in headless Chromium: answers about pictures, drawings that grow, errors, and no requests to elsewhere."""

# ruff: noqa: F811  (fixtures are imported)

import base64
import contextlib
import io
import os
import pathlib
import shutil
import time

import numpy as np
import pytest
from PIL import Image

from janus_jax.serving.engine import Engine
from tests.library.tiny_janus import QUESTION, folder, janus, nearly_equal  # noqa: F401
from tests.serving.api.on_loopback import on_loopback

for name in ("fastapi", "uvicorn", "prometheus_client"):
    pytest.importorskip(name)
playwright = pytest.importorskip("playwright.sync_api")
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")

from janus_jax.serving.api.app import make_app  # noqa: E402
from janus_jax.serving.api.served import Served  # noqa: E402

pytestmark = [pytest.mark.slow, pytest.mark.skipif(CHROMIUM is None, reason="there is no Chromium")]
DESKTOP, PHONE = {"width": 1200, "height": 800}, {"width": 390, "height": 844}
PROMPT = "A red circle."
# Of a file that is dropped: there is no other way to make a DataTransfer with it.
DROP = """([selector, name, type, data]) => {
  const bytes = Uint8Array.from(atob(data), (x) => x.charCodeAt(0));
  const dropped = new DataTransfer();
  dropped.items.add(new File([bytes], name, { type }));
  const target = document.querySelector(selector);
  for (const kind of ["dragover", "drop"])
    target.dispatchEvent(new DragEvent(kind, { dataTransfer: dropped, bubbles: true, cancelable: true }));
}"""
PASTE = """([name, type, data]) => {
  const bytes = Uint8Array.from(atob(data), (x) => x.charCodeAt(0));
  const pasted = new DataTransfer();
  pasted.items.add(new File([bytes], name, { type }));
  document.dispatchEvent(new ClipboardEvent("paste", { clipboardData: pasted, bubbles: true, cancelable: true }));
}"""


@pytest.fixture(scope="module")
def engine(janus):
    with Engine(janus, slots=6, max_queue=40) as engine:
        engine.warm_up()
        yield engine


@pytest.fixture(scope="module")
def port(engine):
    with on_loopback(make_app(Served(engine, {"tiny": None}))) as port:
        yield port


@pytest.fixture(scope="module")
def browser():
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def picture() -> Image.Image:
    return Image.fromarray(np.random.default_rng(4).integers(0, 100, (40, 60, 3), np.uint8))


@contextlib.contextmanager
def opened(browser, port: int, expected_errors: int | None = 0, **how):
    """The page; afterwards it has talked to its own server alone, and complained of nothing but refused requests.

    None expects some of them: how often a full queue is met depends on the time.
    """
    page = browser.new_page(**{"viewport": DESKTOP, "accept_downloads": True} | how)
    page.set_default_timeout(60_000)
    asked, complaints = [], []
    page.on("request", lambda request: asked.append(request.url))
    page.on("console", lambda message: complaints.append(message.text) if message.type != "log" else None)
    page.on("pageerror", lambda error: complaints.append(str(error)))
    page.goto(f"http://127.0.0.1:{port}/")
    yield page
    page.close()
    refused = [text for text in complaints if text.startswith("Failed to load resource: the server responded")]
    assert len(refused) == len(complaints), complaints
    assert len(refused) == expected_errors if expected_errors is not None else refused
    assert asked and all(url.startswith((f"http://127.0.0.1:{port}/", "data:")) for url in asked), asked


def data_of(picture: Image.Image) -> str:
    file = io.BytesIO()
    picture.save(file, "PNG")
    return base64.b64encode(file.getvalue()).decode()


def shot(page, name: str):
    """Keeps a screenshot where JANUS_JAX_SCREENSHOTS says."""
    if folder := os.environ.get("JANUS_JAX_SCREENSHOTS"):
        page.screenshot(path=pathlib.Path(folder) / f"{name}.png")


def set_slider(page, label: str, value: float):
    page.get_by_role("slider", name=label, exact=True).fill(str(value))


def alert(page) -> str:
    return page.locator("[role=alert]:visible").inner_text()


def test_a_question_about_a_dropped_picture(browser, port, janus, picture):
    """The answer is `chat`'s with the page's settings; the next question is about the same conversation."""
    with opened(browser, port) as page:
        page.evaluate(DROP, ["#log", "dropped.png", "image/png", data_of(picture)])
        page.get_by_alt_text("Picture 1", exact=True).wait_for()
        page.get_by_label("Tokens at most").fill("20")
        page.get_by_label("Question", exact=True).fill(QUESTION)
        page.keyboard.press("Enter")
        answer = page.locator(".turn.assistant:not(.busy) p")
        answer.wait_for()
        said = janus.chat(QUESTION, [picture], 20, 0.1, top_p=0.95, seed=42)
        assert answer.inner_text() == said
        assert page.get_by_alt_text("Picture 1 of the question").is_visible()
        shot(page, "chat")

        page.get_by_label("Question", exact=True).fill("Hi")
        set_slider(page, "Temperature", 0)
        page.get_by_role("button", name="Ask", exact=True).click()
        page.locator(".turn.assistant:not(.busy) >> nth=1").wait_for()
        turns = [
            {"role": "user", "content": f"<image_placeholder>\n{QUESTION}", "images": [picture]},
            {"role": "assistant", "content": said},
            {"role": "user", "content": "Hi"},
        ]
        assert page.locator(".turn.assistant p").nth(1).inner_text() == janus.chat(turns, (), 20)


def test_a_drawing_grows(browser, port, janus):
    """Each image is that of its own seed, by which it can be drawn again; partial images come before it."""
    with opened(browser, port) as page:
        page.get_by_role("tab", name="Draw").click()
        page.get_by_label("Prompt", exact=True).fill(PROMPT)
        set_slider(page, "Images", 2)
        set_slider(page, "CFG weight", 3)
        # What images are shown on the way.
        page.evaluate("""() => {
          window.shown = [];
          new MutationObserver((changes) => changes.forEach(({ target }) => shown.push([target.alt, target.src])))
            .observe(document.getElementById("gallery"), { subtree: true, attributeFilter: ["src"] });
        }""")
        page.keyboard.press("Tab")
        page.get_by_role("button", name="Draw", exact=True).press("Enter")
        page.get_by_text("2 of 2 drawn").wait_for()
        shown = page.evaluate("window.shown")
        finals = {page.get_by_alt_text(PROMPT, exact=True).nth(i).get_attribute("src") for i in range(2)}
        assert len(finals) == 2 and len({src for _, src in shown} - finals) >= 2, "the images grew"
        shot(page, "draw")
        for seed in (12345, 12346):
            with page.expect_download() as download:
                page.get_by_label(f"Download the image of seed {seed}").click()
            assert download.value.suggested_filename == f"janus-{seed}.png"
            (expected,) = janus.generate_images(PROMPT, 1, cfg_weight=3.0, seed=seed)
            assert nearly_equal(Image.open(download.value.path()).convert("RGB"), expected)
        page.get_by_label("Use seed 12346").click()
        assert page.get_by_label("Seed (blank: random)").locator("visible=true").input_value() == "12346"
        page.get_by_label("Ask about the image of seed 12346").click()
        assert page.locator("#pictures img").count() == 1 and page.get_by_label("Question", exact=True).is_visible()


def test_errors_are_shown_where_they_belong(browser, port, picture):
    with opened(browser, port, expected_errors=2) as page:
        page.evaluate(DROP, ["body", "notes.txt", "text/plain", base64.b64encode(b"hello").decode()])
        page.get_by_text("notes.txt is not a picture").wait_for()
        page.evaluate(PASTE, ["pasted.png", "image/png", data_of(picture)])
        page.get_by_alt_text("Picture 1", exact=True).wait_for()
        page.get_by_label("Question", exact=True).fill(QUESTION)
        page.get_by_label("Tokens at most").fill("100000")
        page.get_by_role("button", name="Ask", exact=True).click()
        page.get_by_text("exceeds the model's").wait_for()
        shot(page, "error")
        # The question is there to be asked again.
        assert page.get_by_label("Question", exact=True).input_value() == QUESTION
        assert page.locator("#pictures img").count() == 1 and page.locator(".turn").count() == 0
        page.get_by_label("Tokens at most").fill("5")
        page.get_by_role("button", name="Ask", exact=True).click()
        page.locator(".turn.assistant:not(.busy)").wait_for()
        assert page.locator("[role=alert]:visible").count() == 0

        page.get_by_role("tab", name="Draw").click()
        page.get_by_label("Prompt", exact=True).fill("A red circle. " * 300)
        set_slider(page, "Images", 1)
        page.get_by_role("button", name="Draw", exact=True).click()
        page.locator("#draw-error").wait_for()
        assert "exceeds the model's" in alert(page) and page.locator("figure").count() == 0


def test_what_is_stopped_frees_the_server(browser, port, engine, monkeypatch):
    """An answer that was stopped stays as far as it came; a new conversation drops the one under way."""
    turn = engine._turn
    # A browser that gets little of the machine would see the answer only once it is whole.
    monkeypatch.setattr(engine, "_turn", lambda: (time.sleep(0.05), turn()))
    with opened(browser, port) as page:
        page.get_by_label("Tokens at most").fill("400")
        # In this order, since a stopped answer stays in the conversation, which may leave no room for another.
        for name, turns in (("New conversation", 0), ("Stop", 2)):
            page.get_by_label("Question", exact=True).fill(QUESTION)
            page.keyboard.press("Enter")
            page.locator(".turn.busy p:not(:empty)").wait_for()
            page.get_by_role("button", name=name).click()
            page.locator(".turn.busy").wait_for(state="detached")
            assert page.locator(".turn").count() == turns
            page.locator("#ask:enabled").wait_for()
            deadline = time.monotonic() + 30
            while not engine.idle and time.monotonic() < deadline:
                time.sleep(0.01)
            assert engine.idle
        assert page.get_by_label("Question", exact=True).input_value() == ""


def test_a_full_queue_is_waited_for(browser, port, engine, janus, monkeypatch):
    """The page says how long, and asks again by itself, unless it is stopped."""
    with opened(browser, port, expected_errors=None) as page:
        monkeypatch.setattr(engine, "max_queue", 0)
        page.get_by_label("Tokens at most").fill("5")
        set_slider(page, "Temperature", 0)
        page.get_by_label("Question", exact=True).fill(QUESTION)
        page.keyboard.press("Enter")
        page.get_by_text("The server is busy. Asking again in 1 s.").wait_for()
        shot(page, "busy")
        page.get_by_role("button", name="Stop").click()
        page.get_by_text("Stopped.").wait_for()
        assert page.get_by_label("Question", exact=True).input_value() == QUESTION
        page.get_by_role("button", name="Ask", exact=True).click()
        page.get_by_text("The server is busy.").wait_for()
        monkeypatch.undo()
        answer = page.locator(".turn.assistant:not(.busy) p")
        answer.wait_for()
        assert answer.inner_text() == janus.chat(QUESTION, (), 5)
        assert page.locator("[role=alert]:visible").count() == 0

        monkeypatch.setattr(engine, "max_queue", 0)
        page.get_by_role("tab", name="Draw").click()
        page.get_by_label("Prompt", exact=True).fill(PROMPT)
        set_slider(page, "Images", 1)
        page.get_by_role("button", name="Draw", exact=True).click()
        page.get_by_text("Drawing: 0 of 1 done. The server is busy. Asking again in 1 s.").wait_for()
        monkeypatch.undo()
        page.get_by_text("1 of 1 drawn").wait_for()


def test_a_large_picture_is_sent_smaller(browser, port):
    with opened(browser, port) as page:
        noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (1100, 2500, 3), np.uint8))
        page.evaluate(DROP, ["#log", "large.png", "image/png", data_of(noise)])
        picture = page.get_by_alt_text("Picture 1", exact=True)
        kind, _, data = picture.get_attribute("src").partition(";base64,")
        assert kind == "data:image/jpeg" and Image.open(io.BytesIO(base64.b64decode(data))).size == (2048, 901)


def test_a_key_is_asked_for(browser, engine):
    with (
        on_loopback(make_app(Served(engine, {"tiny": None, "other": None}, api_key="secret"))) as port,
        opened(browser, port, expected_errors=2) as page,
    ):
        page.get_by_label("API key").fill("wrong")
        page.keyboard.press("Enter")
        page.get_by_text("does not take this key").wait_for()
        page.get_by_label("API key").fill("secret")
        page.keyboard.press("Enter")
        page.get_by_label("Model").wait_for()
        assert page.get_by_label("Model").locator("option").all_inner_texts() == ["tiny", "other"]
        assert not page.get_by_label("API key").is_visible()


def test_a_phone_and_the_dark(browser, port):
    """Nothing is wider than the screen; colors follow the system."""
    how = {"viewport": PHONE, "is_mobile": True, "has_touch": True, "color_scheme": "dark"}
    with opened(browser, port, **how) as page:
        for tab in ("Chat", "Draw"):
            page.get_by_role("tab", name=tab).tap()
            assert page.evaluate("document.documentElement.scrollWidth") <= PHONE["width"]
            shot(page, f"phone_{tab.lower()}")
        assert page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(20, 22, 28)"


def test_the_keyboard_reaches_everything(browser, port):
    with opened(browser, port) as page:
        page.get_by_role("tab", name="Chat").focus()
        for tab in ("draw", "chat"):
            page.keyboard.press("ArrowRight")
            assert page.locator(f"#{tab}").is_visible()
        for tab in ("chat", "draw"):
            wanted = set(
                page.evaluate(f"""[...document.querySelectorAll("#{tab} :is(input, button, textarea, select)")]
              .filter((x) => x.checkVisibility()).map((x) => x.id)""")
            )
            reached = set()
            page.locator(f"#tab-{tab}").focus()
            for _ in range(len(wanted) + 2):
                page.keyboard.press("Tab")
                reached.add(page.evaluate("document.activeElement.id"))
            assert wanted <= reached
            unnamed = page.evaluate("""[...document.querySelectorAll("input, select, textarea, button")]
              .filter((x) => !(x.labels?.length || x.ariaLabel || x.textContent.trim())).length""")
            assert unnamed == 0
            page.locator(f"#tab-{tab}").press("ArrowRight")
