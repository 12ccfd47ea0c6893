"""The built site in Chromium: pages fit wide and narrow windows, search finds words, and axe-core finds nothing serious.

    POSJAX_SITE=docs/_build/html pytest -m browser -n 0 tests/browser/test_site.py

Without POSJAX_SITE, the site is built first, its notebooks not executed.
"""

import functools
import http.server
import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from tests.browser.conftest import WIDTHS, overflow, serious_violations

ROOT = Path(__file__).resolve().parents[2]
PAGES = (
    "index.html",
    "choose.html",
    "glossary.html",
    "start/index.html",
    "start/install.html",
    "learn/index.html",
    "how_to/index.html",
    "how_to/explore.html",
    "reference/index.html",
    "reference/command_line.html",
    "reference/support.html",
    "gallery/index.html",
    "contribute/index.html",
)
# Errors of the browser about addresses outside the site, which a machine without a network cannot open.
OUTSIDE = ("net::ERR_", "Failed to load resource")


class Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *_):
        pass


@pytest.fixture(scope="session")
def site(tmp_path_factory):
    """The address of the site, without a slash at its end; search needs a server."""
    folder = os.environ.get("POSJAX_SITE")
    if folder is None:
        pytest.importorskip("sphinx_book_theme", reason="sphinx is missing: pip install 'posjax[docs]', or set POSJAX_SITE")
        folder = tmp_path_factory.mktemp("site")
        options = ("-W", "--keep-going", "-q", "-D", "nb_execution_mode=off", "-b", "html")
        subprocess.run([sys.executable, "-m", "sphinx", *options, ROOT / "docs", folder], check=True, cwd=ROOT)
    assert (Path(folder) / "index.html").is_file(), f"POSJAX_SITE must be the folder of the built site, got {folder}"
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Quiet, directory=str(folder)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()


@pytest.fixture
def open_site(open_page, site, browser):
    """Opens a page of the site; requests to other hosts are refused at once, as without a network."""

    def open_site(path, width=1280):
        page = open_page("about:blank", width)
        page.route(lambda address: not address.startswith((site, "data:", "blob:")), lambda route: route.abort())
        page.goto(f"{site}/{path}")
        return page

    return open_site


def own_errors(page):
    return [error for error in page.errors if not any(words in error for words in OUTSIDE)]


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("path", PAGES)
def test_a_page_fits_and_has_no_faults(open_site, site, path, width):
    page = open_site(path, width)
    assert page.locator("h1").count() >= 1 and overflow(page) <= 0
    assert own_errors(page) == [] and serious_violations(page) == []


def test_every_page_fits_a_narrow_window(open_site, site):
    folder = os.environ.get("POSJAX_SITE")
    if folder is None:
        pytest.skip("POSJAX_SITE is missing: the folder of the built site, all of whose pages this test opens")
    wide = {}
    for path in sorted(Path(folder).rglob("*.html")):
        name = path.relative_to(folder).as_posix()
        if name.startswith(("_static", "_modules", "genindex", "search", "py-modindex")):
            continue
        page = open_site(name, 390)
        if overflow(page) > 0 or own_errors(page):
            wide[name] = (overflow(page), own_errors(page))
        page.close()
    assert wide == {}


@pytest.mark.parametrize("words", ["YaRN", "untied"])
def test_search_finds(open_site, words):
    page = open_site(f"search.html?q={words}")
    page.wait_for_selector("#search-results li a")
    page.wait_for_function("!document.querySelector('#search-results .search-summary')?.textContent.includes('Searching')")
    results = page.locator("#search-results li a")
    assert results.count() >= 1
    found = results.evaluate_all("all => all.map((one) => one.closest('li').textContent.toLowerCase())")
    assert any(words.lower() in text for text in found), found
    assert own_errors(page) == []


def test_the_explorer_in_the_site_works(open_site):
    page = open_site("how_to/explore.html")
    frame = page.frame_locator("iframe")
    frame.locator('[data-token="8"]').first.click()
    frame.locator('#status:has-text("Token 8,")').wait_for()
    assert own_errors(page) == []
