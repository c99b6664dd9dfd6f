"""A page in a real browser: how wide it is, and how well its text stands out."""

import json
import re
import shutil
import subprocess
from dataclasses import dataclass
from html import unescape
from pathlib import Path

import pytest

_NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
_MEASURE = """
<script>
addEventListener("load", () => {
  const numbers = (text) => (text.match(/[\\d.]+/g) || []).map(Number);
  const light = ([r, g, b]) => [r, g, b].map((c) => c / 255)
    .map((c) => (c <= 0.04045 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4))
    .reduce((sum, c, i) => sum + c * [0.2126, 0.7152, 0.0722][i], 0);
  const ratio = (a, b) => {
    const [x, y] = [light(a), light(b)].sort((p, q) => q - p);
    return (x + 0.05) / (y + 0.05);
  };
  const style = (element) => getComputedStyle(element);
  const solid = (text) => {
    const n = numbers(text);
    return n.length >= 3 && (n.length < 4 || n[3] > 0) ? n : null;
  };
  const behind = (element) => {
    if (element.closest("svg")) {
      const badge = element.classList.contains("badge") && element.previousElementSibling;
      const box = badge || (element.closest("g.party") || document.createElement("i")).querySelector("rect");
      if (box) return solid(style(box).fill);
    }
    for (let one = element; one; one = one.parentElement) {
      const found = !one.closest("svg") && solid(style(one).backgroundColor);
      if (found) return found;
    }
    return [255, 255, 255];
  };
  const low = []; let texts = 0;
  const walk = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  while (walk.nextNode()) {
    const owner = walk.currentNode.parentElement;
    if (!walk.currentNode.data.trim() || ["SCRIPT", "STYLE", "title"].includes(owner.tagName)) continue;
    const css = style(owner), colour = numbers(owner.closest("svg") ? css.fill : css.color);
    const size = parseFloat(css.fontSize), bold = Number(css.fontWeight) >= 700;
    const least = size >= 24 || (bold && size >= 18.66) ? 3 : 4.5, found = ratio(colour, behind(owner));
    texts += 1;
    if (found < least) low.push(`${found.toFixed(2)} ${walk.currentNode.data.trim().slice(0, 40)}`);
  }
  const root = document.documentElement, out = [];
  for (const one of document.body.querySelectorAll("*")) {
    if (one.closest(".scroll") && !one.matches(".scroll")) continue;
    const box = one.getBoundingClientRect();
    const wide = box.right > root.clientWidth + 0.5 || box.left < -0.5;
    if (box.width && wide) out.push(one.outerHTML.slice(0, 60));
  }
  for (const label of document.querySelectorAll("svg.trust text")) {
    const box = label.getBoundingClientRect(), inside = label.closest("svg").getBoundingClientRect();
    if (box.right > inside.right + 0.5) out.push(label.textContent);
    const party = label.closest("g.party");
    const edge = party && party.querySelector("rect").getBoundingClientRect().right;
    if (party && box.right > edge) out.push(label.textContent);
  }
  const pictures = [...document.images].filter((one) => !one.complete || !one.naturalWidth).length;
  const page = style(document.body).backgroundColor;
  const result = { width: root.clientWidth, scroll: root.scrollWidth, page,
    texts, low, out, pictures, height: root.scrollHeight };
  const pre = document.createElement("pre"); pre.id = "measured"; pre.textContent = JSON.stringify(result);
  document.body.append(pre);
});
</script>
"""


@dataclass(frozen=True)
class Measured:
    """What the browser says of a page.

    Attributes:
        width: of the page's viewport; ``scroll`` is the width of what is in it.
        page: colour behind everything, as CSS spells it.
        texts: how many pieces of text were looked at; ``low`` are those with too little contrast (WCAG AA).
        out: what sticks out of the page, or of its box in a drawing.
        pictures: how many could not be shown.
        height: of the whole page.
    """

    width: int
    scroll: int
    page: str
    texts: int
    low: list[str]
    out: list[str]
    pictures: int
    height: int


def chromium() -> str:
    """The browser's command; skips where there is none."""
    found = next((path for name in _NAMES if (path := shutil.which(name))), None)
    if found is None:
        pytest.skip(f"no Chromium on this machine: none of {', '.join(_NAMES)} is installed")
    return found


def measure(page: Path, scratch: Path, *, width: int, dark: bool) -> Measured:
    """Open a copy of ``page`` that measures itself."""
    copy = scratch / "measured.html"
    copy.write_text(page.read_text().replace("</body>", f"{_MEASURE}</body>"))
    # The window is the frame's: a headless one is never narrower than 500, a frame in it may be.
    frame = scratch / "frame.html"
    frame.write_text(_FRAME.format(width=width, page=copy.name))
    command = [chromium(), "--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars"]
    command += ["--allow-file-access-from-files", f"--user-data-dir={scratch / 'profile'}"]
    command += ["--window-size=1500,2000"]
    command += [f"--blink-settings=preferredColorScheme={0 if dark else 1}", "--dump-dom", frame.as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240, check=False)
    found = re.search(r'<pre id="measured">(.*?)</pre>', done.stdout, re.DOTALL)
    assert found, f"the page did not run: {done.stderr[-500:]}"
    return Measured(**json.loads(unescape(found[1])))


_FRAME = """<!doctype html><meta charset="utf-8"><meta name="color-scheme" content="light dark">
<iframe id="page" src="{page}" style="width: {width}px; height: 2000px; border: 0"></iframe>
<script>
addEventListener("load", () => {{
  const found = document.getElementById("page").contentDocument.getElementById("measured");
  document.body.append(document.importNode(found, true));
}});
</script>
"""
