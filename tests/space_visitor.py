"""A visitor of the Space in a browser, for `test_space_browser.py`."""

from fake_writer import FakeWriter
from playwright import sync_api

# Every element with text of its own: its colour against the backgrounds under it, blended (WCAG 2 formula).
POOR_CONTRAST = """() => {
  const rgba = (text) => { const n = text.match(/[0-9.]+/g).map(Number); return [n[0], n[1], n[2], n[3] ?? 1]; };
  const over = (top, under) => top.slice(0, 3).map((c, i) => c * top[3] + under[i] * (1 - top[3]));
  const light = (rgb) => {
    const [r, g, b] = rgb.map((c) => (c /= 255) <= 0.03928 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4);
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  const ground = (element) => {
    const layers = [];
    for (let e = element; e; e = e.parentElement) layers.push(rgba(getComputedStyle(e).backgroundColor));
    return layers.reverse().reduce((under, top) => over(top, under), [255, 255, 255]);
  };
  const poor = [];
  for (const element of document.querySelectorAll("#intro *, #compare *")) {
    const own = [...element.childNodes].some((node) => node.nodeType === 3 && node.data.trim());
    if (!own || element.closest(":disabled") || !element.checkVisibility()) continue;
    const under = ground(element), ink = over(rgba(getComputedStyle(element).color), under);
    const [low, high] = [light(ink), light(under)].sort((a, b) => a - b);
    const ratio = (high + 0.05) / (low + 0.05);
    if (ratio < 4.5) poor.push([element.textContent.trim().slice(0, 40), Math.round(ratio * 100) / 100]);
  }
  return poor;
}"""


class Visitor:
    """A page of the Space with its writer; knows the elements and what went wrong in the console and the network."""

    def __init__(self, page: sync_api.Page, url: str, writer: FakeWriter):
        self.page, self.url, self.writer = page, url, writer
        self.problems: list[str] = []
        self.requests: list[str] = []
        page.on("console", lambda message: self.problems.append(message.text) if message.type == "error" else None)
        page.on("pageerror", lambda error: self.problems.append(str(error)))
        page.on("requestfailed", lambda request: self.problems.append(f"failed {request.url}"))
        page.on("request", lambda request: self.requests.append(request.url))
        page.goto(url)
        page.wait_for_selector("#write")

    def ask(self, prompt: str) -> None:
        self.page.fill("#prompt textarea", prompt)
        self.page.press("#prompt textarea", "Enter")

    def text(self, side: str) -> str:
        return self.page.locator(f"#panel-{side} .text").text_content(timeout=5000) or ""

    def wait_for_state(self, side: str, state: str) -> None:
        sync_api.expect(self.page.locator(f"#panel-{side} .status strong")).to_have_text(state, timeout=15000)

    def wait_until_finished(self) -> None:
        for side in ("left", "right"):
            self.wait_for_state(side, "Finished")
