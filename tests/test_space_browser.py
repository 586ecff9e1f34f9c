"""The Space in a real headless Chromium: what a visitor sees and presses. Skipped where no Chromium is found."""

import re
import shutil
from collections.abc import Iterator

import pytest

pytest.importorskip("gradio", reason="the Space needs the `space` extra")
sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed: it is in the `dev` extra")

from fake_writer import CREATIVE, FACTUAL, FakeWriter  # noqa: E402
from space_visitor import POOR_CONTRAST, Visitor  # noqa: E402

from duet_moe.space.app import build_app, launch_options  # noqa: E402

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "chrome"))), None)
pytestmark = [
    pytest.mark.browser,
    pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on PATH (Debian: apt-get install chromium)"),
    # Gradio 6.31 counts its queue with calls that pandas 3 calls old.
    pytest.mark.filterwarnings("ignore:.*(no_silent_downcasting|copy keyword)"),
]

DESKTOP, PHONE = {"width": 1280, "height": 800}, {"width": 390, "height": 844}
BOXES = (
    "(selector) => [...document.querySelectorAll(selector)].map((element) => element.getBoundingClientRect().toJSON())"
)
HOSTILE = "<img src=x onerror=\"document.title='owned'\"> {{value}} ${1+1} <b>bold</b> `tick`"


@pytest.fixture(scope="module")
def served() -> Iterator[tuple[str, FakeWriter]]:
    writer = FakeWriter()
    app = build_app(writer)
    _, url, _ = app.launch(server_name="127.0.0.1", prevent_thread_lock=True, quiet=True, **launch_options())
    yield url, writer
    app.close()


@pytest.fixture(scope="module")
def browser() -> Iterator[sync_api.Browser]:
    with sync_api.sync_playwright() as playwright:
        flags = ["--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"]
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=flags)
        yield browser
        browser.close()


@pytest.fixture
def visitor(served: tuple[str, FakeWriter], browser: sync_api.Browser) -> Iterator[Visitor]:
    url, writer = served
    writer.__init__(delay=0.05)
    context = browser.new_context(viewport=DESKTOP, permissions=["clipboard-read", "clipboard-write"])
    yield Visitor(context.new_page(), url, writer)
    context.close()


def test_both_panels_stream_in_step_and_finish(visitor: Visitor) -> None:
    visitor.ask("What is the capital of Portugal?")
    counts = "['left', 'right'].map((side) => document.querySelectorAll(`#panel-${side} .w`).length)"
    seen: set[tuple[int, int]] = set()
    while visitor.page.locator("#panel-right .status strong").text_content() != "Finished":
        seen.add(tuple(visitor.page.evaluate(counts)))
    visitor.wait_until_finished()
    running = [(left, right) for left, right in seen if 0 < left < len(FACTUAL.split())]
    assert len(running) >= 3, f"too few partial texts were seen: {seen}"
    assert all(left == right for left, right in running), running
    assert (visitor.text("left"), visitor.text("right")) == (FACTUAL, CREATIVE)
    status = visitor.page.locator("#panel-left .status").text_content()
    assert re.search(r"38 tokens/s.*first token 0\.12 s.*seed 7.*heads differ on \d+ of 12 tokens", status)


def test_page_asks_nothing_of_the_outside_and_logs_no_error(visitor: Visitor) -> None:
    visitor.ask("Hello")
    visitor.wait_until_finished()
    outside = [url for url in visitor.requests if not url.startswith((visitor.url, "data:", "blob:"))]
    # The event stream of a finished queue is closed by the page itself.
    problems = [problem for problem in visitor.problems if "/queue/data" not in problem]
    assert outside == [] and problems == []


def test_stop_ends_generation_and_keeps_what_was_written(visitor: Visitor) -> None:
    visitor.writer.texts["creative"] = "word " * 400
    visitor.ask("Go on and on")
    sync_api.expect(visitor.page.locator("#panel-right .w").nth(5)).to_be_visible(timeout=15000)
    sync_api.expect(visitor.page.locator("#write")).to_be_disabled()
    visitor.page.click("#stop")
    assert visitor.writer.closed.wait(5), "the writer's stream was not closed"
    steps = visitor.writer.steps
    assert steps < 150
    visitor.wait_for_state("right", "Stopped")
    written = visitor.text("right")
    visitor.page.wait_for_timeout(300)
    assert visitor.writer.steps == steps and visitor.text("right") == written and 5 < len(written.split()) <= steps
    sync_api.expect(visitor.page.locator("#write")).to_be_enabled()
    sync_api.expect(visitor.page.locator("#stop")).to_be_disabled()
    visitor.writer.texts["creative"] = CREATIVE
    visitor.ask("And again")
    visitor.wait_until_finished()
    assert visitor.text("right") == CREATIVE


def test_second_visitor_waits_in_words_and_may_stop_waiting(visitor: Visitor, browser: sync_api.Browser) -> None:
    visitor.writer.texts["creative"] = "word " * 400
    visitor.ask("Go on and on")
    sync_api.expect(visitor.page.locator("#panel-right .w").nth(1)).to_be_visible(timeout=15000)
    with browser.new_context(viewport=DESKTOP) as context:
        second = Visitor(context.new_page(), visitor.url, visitor.writer)
        second.ask("My turn")
        second.wait_for_state("left", "Waiting for the model")
        second.page.click("#stop")
        second.wait_for_state("left", "Ready")
        sync_api.expect(second.page.locator("#write")).to_be_enabled()
    visitor.page.click("#stop")
    visitor.wait_for_state("right", "Stopped")
    assert [asked["prompt"] for asked in visitor.writer.asked] == ["Go on and on"]


def test_keyboard_alone_reaches_write_examples_settings_and_switch(visitor: Visitor) -> None:
    visitor.page.focus("#prompt textarea")
    reached = []
    for _ in range(13):
        visitor.page.keyboard.press("Tab")
        reached.append(visitor.page.evaluate("document.activeElement.id || document.activeElement.textContent.trim()"))
    labels = "; ".join(reached)
    assert (
        labels.startswith("write; What is the capital of Portugal?")
        and "Settings" in labels
        and "copy-right" in labels
    )


def test_leaving_the_page_ends_generation(visitor: Visitor) -> None:
    visitor.writer.texts["creative"] = "word " * 400
    visitor.ask("Go on and on")
    sync_api.expect(visitor.page.locator("#panel-right .w").nth(3)).to_be_visible(timeout=15000)
    visitor.page.close()
    assert visitor.writer.closed.wait(8) and visitor.writer.steps < 390


def test_shift_enter_starts_a_new_line_and_write_button_submits(visitor: Visitor) -> None:
    visitor.page.fill("#prompt textarea", "one")
    visitor.page.press("#prompt textarea", "Shift+Enter")
    visitor.page.keyboard.type("two")
    assert visitor.page.input_value("#prompt textarea") == "one\ntwo" and visitor.writer.asked == []
    visitor.page.click("#write")
    visitor.wait_until_finished()
    assert [asked["prompt"] for asked in visitor.writer.asked] == ["one\ntwo"]


def test_model_text_is_never_markup(visitor: Visitor) -> None:
    visitor.writer.texts["factual"] = HOSTILE
    visitor.ask(HOSTILE)
    visitor.wait_until_finished()
    assert visitor.text("left") == HOSTILE
    assert visitor.page.title() == "Duet-MoE" and visitor.page.locator("#panel-left .text :is(img, b)").count() == 0


def test_words_are_marked_by_tint_and_underline_and_the_switch_takes_both_off(visitor: Visitor) -> None:
    visitor.ask("Hello")
    visitor.wait_until_finished()
    strong = visitor.page.locator("#panel-left .w.d3").first
    looks = "word => [getComputedStyle(word).backgroundColor, getComputedStyle(word).textDecorationLine]"
    assert strong.evaluate(looks)[1] == "underline" and strong.evaluate(looks)[0] != "rgba(0, 0, 0, 0)"
    assert re.fullmatch(r"differ strongly \(0\.\d\d bit\); chosen by .+", strong.get_attribute("title"))
    assert visitor.page.locator(".legend").text_content().endswith("heads agreediffer a littledifferdiffer strongly")
    visitor.page.click("#colour-words input")
    assert strong.evaluate(looks) == ["rgba(0, 0, 0, 0)", "none"]


def test_copy_puts_the_plain_text_on_the_clipboard(visitor: Visitor) -> None:
    visitor.ask("Hello")
    visitor.wait_until_finished()
    visitor.page.click("#copy-right")
    sync_api.expect(visitor.page.locator("#copy-right")).to_have_text("Copied")
    assert visitor.page.evaluate("navigator.clipboard.readText()") == CREATIVE
    sync_api.expect(visitor.page.locator("#copy-right")).to_have_text("Copy")


def test_problems_become_toasts_that_say_what_to_do(visitor: Visitor) -> None:
    visitor.page.click("#write")
    toasts = visitor.page.locator(".toast-body")
    sync_api.expect(toasts.filter(has_text="The prompt is empty: type a question")).to_have_count(1)
    sync_api.expect(visitor.page.locator("#write")).to_be_enabled()
    visitor.page.click(".toast-close")
    visitor.writer.notes = ("prompt cut to its last 2000 tokens",)
    visitor.ask("A long one")
    sync_api.expect(toasts.filter(has_text="prompt cut to its last 2000 tokens")).to_have_count(1)
    visitor.wait_until_finished()


def test_example_fills_the_prompt(visitor: Visitor) -> None:
    visitor.page.get_by_role("button", name="Write a tagline for a small bakery.").click()
    sync_api.expect(visitor.page.locator("#prompt textarea")).to_have_value("Write a tagline for a small bakery.")


def test_settings_reach_the_writer_and_reset(visitor: Visitor) -> None:
    page = visitor.page
    page.get_by_role("button", name="Settings").first.click()
    page.fill("#temperature input, #temperature textarea", "0,4")
    page.fill("#num_experts_per_tok input, #num_experts_per_tok textarea", "6")
    page.fill("#seed input, #seed textarea", "11")
    page.click("#left-mode input")
    page.get_by_role("option", name="Hybrid").click()
    sync_api.expect(page.locator("#panel-left h2")).to_have_text("Hybrid")
    visitor.ask("Hello")
    visitor.wait_until_finished()
    asked = visitor.writer.asked[-1]
    left, right = asked["modes"]
    assert asked["seed"] == 11 and (left.name, left.temperature) == ("hybrid", 0.4)
    assert (right.name, right.temperature, right.num_experts_per_tok) == ("creative", 0.4, 6)
    page.click("#reset")
    sync_api.expect(page.locator("#panel-left h2")).to_have_text("Factual")
    sync_api.expect(page.locator("#seed input, #seed textarea")).to_have_value("")


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("size", [DESKTOP, PHONE], ids=["desktop", "phone"])
def test_page_fits_and_reads_in_every_size_and_scheme(
    served: tuple[str, FakeWriter], browser: sync_api.Browser, scheme: str, size: dict[str, int]
) -> None:
    url, writer = served
    writer.__init__({"creative": f"{CREATIVE} " * 6})
    with browser.new_context(viewport=size, color_scheme=scheme) as context:
        visitor = Visitor(context.new_page(), url, writer)
        visitor.ask("Hello")
        visitor.wait_until_finished()
        visitor.page.get_by_role("button", name="Settings").first.click()
        assert visitor.page.evaluate("document.documentElement.scrollWidth") <= size["width"]
        left, right = visitor.page.evaluate(BOXES, "#panel-left, #panel-right")
        if size is DESKTOP:
            assert abs(left["y"] - right["y"]) < 2 and right["x"] > left["x"] + left["width"]
            texts = visitor.page.evaluate(BOXES, "#panel-left .text, #panel-right .text")
            assert abs(texts[0]["y"] - texts[1]["y"]) < 2, "the shorter text hangs lower than the longer one"
        else:
            assert abs(left["x"] - right["x"]) < 2 and right["y"] >= left["y"] + left["height"]
        poor = visitor.page.evaluate(POOR_CONTRAST)
        assert poor == [], f"contrast below 4.5: {poor}"
