"""Looks at every page of the built documentation site in a browser, at the width of a desk and of a phone.

    python .ci/site_browser.py                    # of build/docs/site
    python .ci/site_browser.py --pictures FOLDER  # also writes a picture of each

A page must load without an error in the console or a missing file of the site, and not be wider than the screen. The
site is served as it is published: below the name of a version, beside the list of versions.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import http.server
import json
import shutil
import sys
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

SITE = Path(__file__).resolve().parents[1] / "build" / "docs" / "site"
BROWSERS = ("chromium", "chromium-browser", "google-chrome")
WIDTHS = {"desktop": (1280, 900), "phone": (390, 844)}
# How far the page can be moved to the side; tables and code may be moved inside it.
OVERFLOW = "document.documentElement.scrollWidth - document.documentElement.clientWidth"
NOT_DRAWN = "[...document.images].filter(one => one.complete && !one.naturalWidth).map(one => one.src)"
WIDEST = """[...document.querySelectorAll('article *')].filter(one => one.getBoundingClientRect().right > innerWidth + 1
    && !one.closest('.md-typeset__scrollwrap, pre, .highlight, .arithmatex')).slice(0, 3)
    .map(one => one.tagName + ' ' + one.textContent.slice(0, 40))"""


class _Silent(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *_: object) -> None:
        pass


@contextlib.contextmanager
def served(site: Path) -> Iterator[str]:
    """Serves a site below the name of a version, as mike publishes it; gives its address."""
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "dev").symlink_to(site)
        versions = [{"version": "dev", "title": "dev", "aliases": []}]
        (Path(folder) / "versions.json").write_text(json.dumps(versions))
        handler = functools.partial(_Silent, directory=folder)
        with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
            thread = threading.Thread(target=server.serve_forever, daemon=True)
            thread.start()
            yield f"http://127.0.0.1:{server.server_port}/dev/"
            server.shutdown()


def pages_of(site: Path) -> list[str]:
    """Addresses of the pages, relative to the site's."""
    found = [path.parent.relative_to(site).as_posix() for path in site.rglob("index.html")]
    return sorted("" if one == "." else f"{one}/" for one in found)


def look(context: Any, address: str, page: str, picture: Path | None) -> list[str]:
    """What is wrong with a page."""
    tab = context.new_page()
    problems: list[str] = []
    tab.on("console", lambda line: problems.append(line.text) if line.type == "error" else None)
    tab.on("pageerror", lambda error: problems.append(str(error)))
    tab.on("response", lambda one: problems.append(f"{one.status} {one.url}") if one.status >= 400 else None)
    tab.goto(address + page)  # until everything has loaded
    problems += [f"not drawn: {one}" for one in tab.evaluate(NOT_DRAWN)]
    over = tab.evaluate(OVERFLOW)
    if over > 0:
        problems.append(f"{over} pixels wider than the screen: {tab.evaluate(WIDEST)}")
    if picture:
        tab.screenshot(path=picture)
    if not page:
        problems += search(tab)
    tab.close()
    return problems


def search(tab: Any) -> list[str]:
    """Searches for a name of the API, as a reader would, where the page is wide enough to show the field."""
    field = tab.locator("input.md-search__input")
    if not field.is_visible():
        return []
    field.fill("fold_timesteps")
    try:
        tab.locator("li.md-search-result__item").first.wait_for(timeout=10_000)
    except Exception as error:  # of the driver, which is imported where it is needed
        return [f"the search found nothing: {error}"]
    return []


def check(site: Path = SITE, pictures: Path | None = None) -> list[str]:
    """What is wrong with the pages of a site, at every width.

    Raises:
        FileNotFoundError: there is no browser.
    """
    from playwright.sync_api import sync_playwright

    browser = next(filter(None, map(shutil.which, BROWSERS)), None)
    if browser is None:
        raise FileNotFoundError(f"no browser: none of {', '.join(BROWSERS)} is installed")
    problems = []
    with sync_playwright() as playwright, served(site) as address:
        started = playwright.chromium.launch(executable_path=browser, args=["--no-sandbox", "--disable-gpu"])
        for name, (width, height) in WIDTHS.items():
            context = started.new_context(viewport={"width": width, "height": height}, has_touch=width < 500)
            context.route(lambda url: "//127.0.0.1:" not in url, lambda route: route.abort())
            for page in pages_of(site):
                picture = pictures / f"{name}-{page.strip('/').replace('/', '-') or 'start'}.png" if pictures else None
                problems += [f"{page or 'start'} ({name}): {one}" for one in look(context, address, page, picture)]
            context.close()
        started.close()
    return problems


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pictures", type=Path)
    pictures = parser.parse_args().pictures
    if pictures:
        pictures.mkdir(parents=True, exist_ok=True)
    problems = check(pictures=pictures)
    print("\n".join(problems) or f"{len(pages_of(SITE))} pages, nothing wrong")
    return bool(problems)


if __name__ == "__main__":
    sys.exit(main())
