"""Pages in Chromium: a browser for all tests, and pages whose errors are kept.

Chromium is $POSJAX_CHROMIUM, or the first of chromium, chromium-browser and google-chrome on the path, or playwright's own.
"""

import os
import shutil
from pathlib import Path

import pytest

FOLDER = Path(__file__).parent
WIDTHS = (1280, 390)


def pytest_collection_modifyitems(items):
    for item in items:
        if FOLDER in item.path.parents:
            item.add_marker(pytest.mark.browser)


@pytest.fixture(scope="session")
def browser():
    sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is missing: pip install 'posjax[browser]'")
    names = ("chromium", "chromium-browser", "google-chrome")
    path = os.environ.get("POSJAX_CHROMIUM") or next(filter(None, map(shutil.which, names)), None)
    with sync_api.sync_playwright() as playwright:
        path = path or (playwright.chromium.executable_path if Path(playwright.chromium.executable_path).exists() else None)
        if path is None:
            pytest.skip("Chromium is missing: apt-get install chromium, or set POSJAX_CHROMIUM to its path")
        browser = playwright.chromium.launch(executable_path=path, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture
def open_page(browser):
    """Opens an address; ``page.errors`` and ``page.requests`` are its errors and the addresses that it asked for."""
    pages = []

    def open_page(address, width=1280, height=900):
        page = browser.new_page(viewport={"width": width, "height": height})
        pages.append(page)
        page.errors, page.requests = [], []
        page.on("console", lambda message: page.errors.append(message.text) if message.type == "error" else None)
        page.on("pageerror", lambda error: page.errors.append(str(error)))
        page.on("request", lambda request: page.requests.append(request.url))
        page.goto(address)
        return page

    yield open_page
    for page in pages:
        page.close()


def serious_violations(page, context=None):
    """The serious and critical violations that axe-core finds: (rule, number of elements, the first)."""
    axe = pytest.importorskip(
        "axe_playwright_python.sync_playwright", reason="axe-playwright-python is missing: pip install 'posjax[browser]'"
    )
    found = axe.Axe().run(page, context=context).response["violations"]
    return [
        (one["id"], len(one["nodes"]), one["nodes"][0]["html"][:200]) for one in found if one["impact"] in ("serious", "critical")
    ]


def overflow(page):
    """Pixels by which a page is wider than its window."""
    return page.evaluate("document.documentElement.scrollWidth - document.documentElement.clientWidth")
