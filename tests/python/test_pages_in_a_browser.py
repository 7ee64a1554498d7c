"""The page of `torchweld bench` in Chromium: sorting, filtering, dark mode, keyboard, a phone's width, contrast."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import bench_rows
from browser import TOO_FAINT, chromium
from torchweld.bench import page

pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("browser")]
TABLE = "#table-all-measurements"


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with chromium() as browser:
        yield browser


def until(tab: Any, expression: str) -> None:
    """Waits until an expression is true. Playwright's own wait compiles it in the page, which the page forbids."""
    for _ in range(100):
        if tab.evaluate(expression):
            return
        tab.wait_for_timeout(50)
    raise AssertionError(f"not true after 5 seconds: {expression}")


@pytest.fixture(scope="module")
def url(tmp_path_factory: pytest.TempPathFactory) -> str:
    path: Path = tmp_path_factory.mktemp("page") / "report.html"
    page.write(bench_rows.rows(), path, ["rows.json"], ["[attention] the cpu kernels do not serve this call"])
    return path.as_uri()


@pytest.fixture
def opened(browser: Any, url: str) -> Iterator[Any]:
    """Opens the page with options of a context, and holds it to no message in the console and no request."""
    contexts, messages, requests = [], [], []

    def open_page(**options: Any) -> Any:
        contexts.append(browser.new_context(**options))
        contexts[-1].set_default_timeout(10_000)
        tab = contexts[-1].new_page()
        tab.on("console", lambda message: messages.append(message.text))
        tab.on("pageerror", lambda error: messages.append(str(error)))
        tab.on("request", lambda request: requests.append(request.url))
        tab.goto(url)
        return tab

    yield open_page
    for context in contexts:
        context.close()
    assert not messages and set(requests) == {url}


def column(tab: Any, number: int) -> list[str]:
    """The texts of a column, from top to bottom, of the rows that are shown."""
    return tab.locator(f"{TABLE} tbody tr:visible > :nth-child({number})").all_inner_texts()


def test_a_heading_sorts_its_column(opened: Any) -> None:
    tab = opened()
    before = column(tab, 6)
    heading = tab.locator(f"{TABLE} thead th", has=tab.get_by_role("button", name="ms", exact=True))
    heading.get_by_role("button").click()
    assert heading.get_attribute("aria-sort") == "ascending"
    rising = [float(text) for text in column(tab, 6)[:-1]]
    assert rising == sorted(rising) and len(rising) == len(before) - 1
    assert column(tab, 6)[-1] == "wrong"  # what has no number stays last
    heading.get_by_role("button").click()
    assert heading.get_attribute("aria-sort") == "descending"
    assert [float(text) for text in column(tab, 6)[:-1]] == rising[::-1] and column(tab, 6)[-1] == "wrong"
    tab.locator(f"{TABLE} thead").get_by_role("button", name="case").click()
    assert heading.get_attribute("aria-sort") is None
    assert column(tab, 3)[0] == "1 x 1" and column(tab, 3)[-1].startswith("8192")  # as people count, not as text


def test_filters_choose_rows(opened: Any) -> None:
    tab = opened()
    count = tab.locator("form.filters output")
    assert count.inner_text() == "73 of 73 rows"
    tab.get_by_label("provider").select_option("torch:flash")
    tab.get_by_label("dtype").select_option("bfloat16")
    assert count.inner_text() == "12 of 73 rows" and set(column(tab, 5)) == {"torch:flash"}
    tab.get_by_label("Words that a row has").fill("WINDOW 256 attention")
    assert count.inner_text() == "2 of 73 rows" and set(column(tab, 1)) == {"attention"}
    tab.get_by_role("button", name="Show all").click()
    assert count.inner_text() == "73 of 73 rows" and len(column(tab, 1)) == 73


def test_dark_mode_follows_the_system_until_it_is_chosen(opened: Any) -> None:
    def shade(tab: Any) -> str:
        return tab.evaluate("getComputedStyle(document.body).backgroundColor")

    tab = opened(color_scheme="dark")
    dark, button = shade(tab), tab.get_by_role("button", name="Dark mode")
    assert button.get_attribute("aria-pressed") == "true"
    tab.emulate_media(color_scheme="light")
    until(tab, "document.documentElement.dataset.theme === 'light'")
    light = shade(tab)
    assert light != dark and button.get_attribute("aria-pressed") == "false"
    button.click()
    assert shade(tab) == dark
    tab.reload()
    assert shade(tab) == dark  # the choice is kept
    button.click()
    assert shade(tab) == light


def test_the_keyboard_reaches_everything(opened: Any) -> None:
    tab = opened()
    tab.keyboard.press("Tab")
    assert tab.evaluate("document.activeElement.className") == "skip"
    tab.keyboard.press("Enter")
    until(tab, "location.hash === '#main'")
    tab.locator(f"{TABLE} thead button").first.focus()
    tab.keyboard.press("Enter")
    assert tab.locator(f"{TABLE} thead th").first.get_attribute("aria-sort") == "ascending"
    assert tab.evaluate("getComputedStyle(document.activeElement).outlineStyle") == "solid"  # the focus can be seen
    region = tab.get_by_role("region", name="All measurements")
    region.focus()
    tab.keyboard.press("End")
    until(tab, "document.activeElement.scrollTop > 0")


@pytest.mark.parametrize("width", [360, 1280])
def test_nothing_is_wider_than_the_window(opened: Any, width: int) -> None:
    tab = opened(viewport={"width": width, "height": 800})
    assert tab.evaluate("document.documentElement.scrollWidth") == width
    assert tab.locator("figure").count() == 3 and tab.locator("figure").first.bounding_box()["width"] <= width


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_stands_out(opened: Any, scheme: str) -> None:
    assert opened(color_scheme=scheme).evaluate(TOO_FAINT) == []


def test_what_is_there_has_a_name(opened: Any) -> None:
    tab = opened()
    nameless = "e => e.filter(x => !(x.labels?.length || x.textContent.trim() || x.ariaLabel)).map(x => x.outerHTML)"
    assert tab.eval_on_selector_all("button, select, input, a, [role=region]", nameless) == []
    assert tab.eval_on_selector_all("svg[role=img]", "e => e.every(x => x.querySelector('title').textContent)")
    assert tab.eval_on_selector_all("table", "e => e.every(x => x.caption.textContent)")
    assert tab.locator("html").get_attribute("lang") == "en" and tab.locator("h1").count() == 1


def test_without_scripts_everything_is_still_there(opened: Any) -> None:
    tab = opened(java_script_enabled=False)
    assert len(column(tab, 1)) == 73 and not tab.locator("form.filters").is_visible()
