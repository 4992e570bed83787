"""Look at a page in headless Chromium: what it loads, what it says on its console, how it looks.

    python -m tests.support.browser page.html [picture.png]

Chromium is no requirement of the tests; where none is installed, `find_chromium` gives None.
"""

from __future__ import annotations

import json
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path

PROBE = """() => ({
  overflow: document.documentElement.scrollWidth - document.documentElement.clientWidth,
  panels: [...document.querySelectorAll('.tabs')].map(t => [...t.querySelectorAll('.panel')]
      .filter(p => p.offsetHeight > 0).length),
  drawings: [...document.querySelectorAll('figure svg')].filter(s => s.getBoundingClientRect().height > 40).length,
  images: document.querySelectorAll('image').length,
  unnamed: [...document.querySelectorAll('[role=img]')].filter(s => !s.getAttribute('aria-label')).length,
})"""
DECODED = """async () => Promise.all([...document.querySelectorAll('image')].map(async i => {
  const p = new Image(); p.src = i.getAttribute('href'); await p.decode(); return [p.naturalWidth, p.naturalHeight];
}))"""


@dataclass(frozen=True)
class Seen:
    """What a browser saw.

    Attributes:
        console: what was written on the console, errors among it.
        requests: addresses that were asked for, the page itself left out.
        pictures: width and height of every embedded picture, decoded.
        probes: `PROBE` by width of the window and colour scheme.
        tabs: after a click on each second tab: whether the panel that is shown changed.
    """

    console: list[str]
    requests: list[str]
    pictures: list[list[int]]
    probes: dict[str, dict[str, object]]
    tabs: list[bool]


def find_chromium() -> str | None:
    """The path of a Chromium, or None."""
    return next(
        (found for name in ("chromium", "chromium-browser", "google-chrome") if (found := shutil.which(name))), None
    )


def look(page: Path, picture: Path | None = None, *, chromium: str | None = None) -> Seen:
    """Open a page at 1280 and 400 px, light and dark; a screenshot of the first goes to `picture`."""
    from playwright.sync_api import sync_playwright

    console: list[str] = []
    requests: list[str] = []
    probes: dict[str, dict[str, object]] = {}
    pictures: list[list[int]] = []
    tabs: list[bool] = []
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium or find_chromium(), args=["--no-sandbox"])
        for width in (1280, 400):
            for scheme in ("light", "dark"):
                tab = browser.new_page(viewport={"width": width, "height": 900}, color_scheme=scheme)
                tab.on("console", lambda said: console.append(f"{said.type}: {said.text}"))
                tab.on("pageerror", lambda error: console.append(f"error: {error}"))
                tab.on("request", lambda asked: requests.append(asked.url))
                tab.goto(page.resolve().as_uri())
                probes[f"{width} {scheme}"] = tab.evaluate(PROBE)
                if picture is not None:
                    name = picture.with_name(f"{picture.stem}-{width}-{scheme}{picture.suffix}")
                    tab.screenshot(path=str(name), full_page=True)
                if (width, scheme) == (1280, "light"):
                    pictures = tab.evaluate(DECODED)
                    for group in tab.query_selector_all(".tabs"):
                        labels = group.query_selector_all("label")
                        if len(labels) > 1:
                            before = [p.is_visible() for p in group.query_selector_all(".panel")]
                            labels[1].click()
                            after = [p.is_visible() for p in group.query_selector_all(".panel")]
                            tabs.append(before != after and sum(after) == 1)
                tab.close()
        browser.close()
    own = page.resolve().as_uri()
    return Seen(console, [u for u in requests if u != own and not u.startswith("data:")], pictures, probes, tabs)


if __name__ == "__main__":
    seen = look(Path(sys.argv[1]), Path(sys.argv[2]) if len(sys.argv) > 2 else None)
    print(json.dumps(seen.__dict__, indent=1))
