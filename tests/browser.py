"""Chromium for tests of pages, and what a page is asked there. Without Chromium or Playwright such tests skip."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)

# Elements that stand out of the page on the right, and out of every region of it that scrolls.
TOO_WIDE = """() => {
  const width = document.documentElement.clientWidth, found = [];
  const scrolls = (element) => ["auto", "scroll"].includes(getComputedStyle(element).overflowX);
  for (const element of document.querySelectorAll("body *")) {
    if (!element.checkVisibility({visibilityProperty: true}) || element.closest("dialog, .sr-only, .visually-hidden"))
      continue;
    const box = element.getBoundingClientRect();
    if (box.width === 0 || box.right <= width + 1) continue;
    let region = element.parentElement;
    while (region !== document.body && !scrolls(region)) region = region.parentElement;
    if (region === document.body || region.getBoundingClientRect().right > width + 1)
      found.push([element.tagName, element.className.baseVal ?? element.className, element.textContent.slice(0, 40)]);
  }
  return found;
}"""

# Text that does not stand out from what lies behind it: WCAG 2.2, 1.4.3, asks for a ratio of 4.5.
TOO_FAINT = """() => {
  const canvas = document.createElement("canvas").getContext("2d", {willReadFrequently: true});
  const parts = (colour) => {
    canvas.clearRect(0, 0, 1, 1);
    canvas.fillStyle = colour;
    canvas.fillRect(0, 0, 1, 1);
    return [...canvas.getImageData(0, 0, 1, 1).data];
  };
  const light = (colour) => {
    const [r, g, b] = parts(colour).slice(0, 3).map((c) => c / 255)
      .map((c) => (c <= 0.04045 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4));
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  const behind = (element) => {
    for (; element; element = element.parentElement) {
      const colour = getComputedStyle(element).backgroundColor;
      if (parts(colour)[3] > 128) return colour;
    }
    return "white";
  };
  const found = [];
  for (const element of document.querySelectorAll("body *")) {
    const own = [...element.childNodes].some((node) => node.nodeType === 3 && node.textContent.trim());
    const hidden = element.closest("script, style, title") || !element.checkVisibility({visibilityProperty: true});
    if (!own || hidden) continue;
    const style = getComputedStyle(element);
    const text = light(element.closest("svg") ? style.fill : style.color), back = light(behind(element));
    const ratio = (Math.max(text, back) + 0.05) / (Math.min(text, back) + 0.05);
    const name = element.className.baseVal ?? element.className;
    if (ratio < 4.5) found.push([element.tagName, name, element.textContent.slice(0, 40), ratio]);
  }
  return found;
}"""

# What a reader of the screen would miss: a name, a heading, a language.
UNNAMED = """() => {
  const found = [];
  const named = (e) => (e.getAttribute("aria-label") || e.getAttribute("title") || e.innerText || "").trim()
    || e.labels?.length || [...e.querySelectorAll("img[alt]")].some((i) => i.alt);
  for (const element of document.querySelectorAll("a[href], button, input, select"))
    if (element.checkVisibility({visibilityProperty: true}) && !named(element))
      found.push(element.outerHTML.slice(0, 120));
  for (const image of document.querySelectorAll("img:not([alt])")) found.push(image.outerHTML.slice(0, 120));
  const levels = [...document.querySelectorAll("main h1, main h2, main h3, main h4")].map((h) => Number(h.tagName[1]));
  if (levels.filter((level) => level === 1).length !== 1 || levels[0] !== 1) found.push("headings " + levels);
  levels.forEach((level, i) => { if (i && level > levels[i - 1] + 1) found.push("headings " + levels); });
  if (!document.documentElement.lang || !document.title) found.push("no language or title");
  return found;
}"""


@contextmanager
def chromium() -> Iterator[Any]:
    """The browser, or a skip."""
    api = pytest.importorskip("playwright.sync_api", reason="playwright, which drives the browser, is not installed")
    if CHROMIUM is None:
        pytest.skip("no Chromium: apt-get install chromium")
    with api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()
