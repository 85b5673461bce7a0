"""Writes the pages of the documentation site to build/docs/pages and builds it, strictly: `make docs`.

    python .ci/docs.py                # everything
    python .ci/docs.py --browser      # and looks at every page in a browser
    python .ci/docs.py --quick        # without gallery and notebooks, for work on texts: needs no torch
    python .ci/docs.py --pages        # writes the pages alone, for mike

The pages are README, CHANGELOG and docs/ as they are, but for links out of docs/, which lead to the repository's host;
pages of the API are made from docstrings (site_api.py), pages of measurements from bench/results (site_results.py), the
gallery is drawn (site_gallery.py) and the notebooks are run (site_notebooks.py).
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import site_api
import site_notebooks
import site_results

ROOT = Path(__file__).resolve().parents[1]
BUILT = ROOT / "build" / "docs"
PAGES, SITE = BUILT / "pages", BUILT / "site"
SITE_OF = {
    "README.md": "index.md",
    "CHANGELOG.md": "changes.md",
    "CONTRIBUTING.md": "contributing.md",
    "examples/README.md": "examples.md",
    "integrations/comfyui/README.md": "comfyui.md",
}
REPOSITORY = os.environ.get("GITHUB_REPOSITORY")
# Outside of a workflow the repository's address is not known: links to its files lead to example.org.
HOST = (
    f"{os.environ.get('GITHUB_SERVER_URL', 'https://github.com')}/{REPOSITORY}"
    if REPOSITORY
    else "https://example.org/layercache"
)
LEFT_OUT = "# {}\n\nLeft out of this build (`--quick`).\n"


def page_of(path: Path) -> Path | None:
    """The place of a file of the repository in the site, if it has one."""
    name = path.relative_to(ROOT).as_posix()
    if name in SITE_OF:
        return Path(SITE_OF[name])
    if not name.startswith("docs/") or not path.is_file():
        return None
    return Path(name.replace(".ipynb", ".md")).relative_to("docs")


def with_links(text: str, source: Path, page: Path) -> str:
    """A page's text with its relative links as the site has them."""

    def moved(match: re.Match[str]) -> str:
        name, mark, anchor = match[1].partition("#")
        if not name or re.match(r"[a-z]+:", name):
            return match[0]
        target = (source.parent / name).resolve()
        found = page_of(target)
        if found is None and target.suffix == ".png":
            found = Path("pictures") / target.name
            (PAGES / "pictures").mkdir(exist_ok=True)
            shutil.copy(target, PAGES / found)
        if found is None:
            kind = "tree" if target.is_dir() else "blob"
            return f"]({HOST}/{kind}/main/{target.relative_to(ROOT).as_posix()}{mark}{anchor})"
        return f"]({Path(os.path.relpath(found, page.parent)).as_posix()}{mark}{anchor})"

    return re.sub(r"\]\(\s*([^)\s]+)\s*\)", moved, text)


def write_pages(quick: bool = False) -> None:
    """Writes every page of the site; quick: gallery and notebooks say that they were left out."""
    shutil.rmtree(PAGES, ignore_errors=True)
    shutil.copytree(ROOT / "docs", PAGES, ignore=shutil.ignore_patterns("*.ipynb"))
    for source in [ROOT / name for name in SITE_OF] + sorted((ROOT / "docs").rglob("*.md")):
        page = page_of(source)
        assert page is not None
        (PAGES / page).write_text(with_links(source.read_text(), source, page))
    shutil.copy(ROOT / ".ci" / "site.css", PAGES)
    site_api.write_pages(PAGES / "api")
    site_results.write_pages(PAGES / "measured", HOST)
    if quick:
        (PAGES / "gallery.md").write_text(LEFT_OUT.format("Gallery"))
    else:
        import site_gallery

        site_gallery.write_page(PAGES, HOST)
    for notebook in sorted(site_notebooks.NOTEBOOKS.glob("*.ipynb")):
        if quick:
            (PAGES / "notebooks" / f"{notebook.stem}.md").write_text(LEFT_OUT.format(notebook.stem))
        else:
            site_notebooks.write_page(notebook, PAGES)


def build() -> int:
    """Builds the site from its pages; an exit status, 1 where a public name is on no page."""
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--config-file", ".ci/mkdocs.yml"]
    status = subprocess.run(command, cwd=ROOT, env={**os.environ, "NO_MKDOCS_2_WARNING": "1"}).returncode
    missing = site_api.missing_names(SITE) if not status else []
    if missing:
        print("public names that no page shows:", *missing, sep="\n  ", file=sys.stderr)
    return status or bool(missing)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--pages", action="store_true")
    parser.add_argument("--browser", action="store_true")
    asked = parser.parse_args()
    write_pages(asked.quick)
    status = 0 if asked.pages else build()
    if asked.browser and not status:
        import site_browser

        problems = site_browser.check(SITE)
        print(*problems, sep="\n", file=sys.stderr)
        status = bool(problems)
    return int(status)


if __name__ == "__main__":
    sys.exit(main())
