"""Writes the pages of the documentation site to build/docs/pages and builds it, strictly: `make docs`.

The pages are README, CHANGELOG and docs/ as they are, but for links out of docs/, which lead to the repository's host;
the API page lists the public names, and the page of measurements is made from bench/results. Nothing is imported.
"""

from __future__ import annotations

import ast
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
PAGES = ROOT / "build" / "docs" / "pages"
SITE_OF = {"README.md": "index.md", "CHANGELOG.md": "changes.md"}
PACKAGES = ("layercache", "layercache.ops", "layercache.backend", "layercache.schedule", "layercache.models")
PACKAGES += ("layercache.methods",)
REPOSITORY = os.environ.get("GITHUB_REPOSITORY", "layercache/layercache")
HOST = f"{os.environ.get('GITHUB_SERVER_URL', 'https://github.com')}/{REPOSITORY}"


def page_of(path: Path) -> Path | None:
    """The place of a file of the repository in the site, if it has one."""
    name = path.relative_to(ROOT).as_posix()
    if name in SITE_OF:
        return Path(SITE_OF[name])
    return Path(name).relative_to("docs") if name.startswith("docs/") and path.is_file() else None


def with_links(text: str, source: Path, page: Path) -> str:
    """A page's text with its relative links as the site has them."""

    def moved(match: re.Match[str]) -> str:
        name, mark, anchor = match[1].partition("#")
        if not name or re.match(r"[a-z]+:", name):
            return match[0]
        target = (source.parent / name).resolve()
        found = page_of(target)
        if found is None:
            kind = "tree" if target.is_dir() else "blob"
            return f"]({HOST}/{kind}/main/{target.relative_to(ROOT).as_posix()}{mark}{anchor})"
        return f"]({Path(os.path.relpath(found, page.parent)).as_posix()}{mark}{anchor})"

    return re.sub(r"\]\(\s*([^)\s]+)\s*\)", moved, text)


def public_names(package: str) -> dict[str, str]:
    """Public names of a package and where they are defined, read from its imports."""
    folder = ROOT / Path(*package.split("."))
    tree = ast.parse((folder / "__init__.py").read_text())
    listed: set[str] = set()
    for node in tree.body:
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
            if node.targets[0].id == "__all__":
                listed |= {one.value for one in ast.walk(node.value) if isinstance(one, ast.Constant)}
            if node.targets[0].id == "_HOMES" and isinstance(node.value, ast.Dict):
                listed |= {key.value for key in node.value.keys if isinstance(key, ast.Constant)}
    imports = [node for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) and node.module]
    homes = {alias.name: f"{node.module}.{alias.name}" for node in imports for alias in node.names}
    for node in tree.body:  # those that the package itself defines
        target = node.targets[0] if isinstance(node, ast.Assign) else None
        name = node.name if isinstance(node, ast.FunctionDef) else getattr(target, "id", "")
        homes.setdefault(name, f"{package}.{name}")
    return {name: homes[name] for name in sorted(listed - {"__version__"}) if name in homes}


def api_page() -> str:
    parts = ["# API", ""]
    seen: set[str] = set()
    for package in PACKAGES:
        parts += [f"## `{package}`", ""]
        for home in public_names(package).values():
            if home not in seen:
                parts += [f"::: {home}", ""]
            seen.add(home)
    return "\n".join(parts)


def flat(row: dict[str, Any], prefix: str = "") -> dict[str, str]:
    """The numbers, texts and flags of a row, those of dicts in it under both names."""
    cells: dict[str, str] = {}
    for name, value in row.items():
        if isinstance(value, dict):
            cells |= flat(value, f"{prefix}{name} ")
        elif isinstance(value, float):
            cells[prefix + name] = f"{value:.4g}"
        elif isinstance(value, list) and value and all(isinstance(one, float) for one in value):
            cells[f"{prefix}{name} mean"] = f"{sum(value) / len(value):.4g}"
        elif isinstance(value, (str, int)):
            cells[prefix + name] = str(value).replace("|", "/")
    return cells


def measured_page() -> str:
    parts = [
        "# Result files",
        "",
        "Made from the files in `bench/results`, where the settings of each are; no figure is typed.",
    ]
    parts += ["PSNR in dB.", ""]
    for path in sorted((ROOT / "bench" / "results").glob("*.json")):
        content = json.loads(path.read_text())
        rows = content.get("methods") or content.get("rows") or []
        if not rows or not all(isinstance(row, dict) and "used" in row for row in rows):
            continue
        cells = [flat(row) for row in rows]
        columns = [name for name in dict.fromkeys(name for row in cells for name in row) if name != "digest"][:12]
        parts += [f"## {path.stem}", "", f"| {' | '.join(columns)} |", "|---" * len(columns) + "|"]
        parts += [f"| {' | '.join(row.get(name, '') for name in columns)} |" for row in cells]
        parts.append("")
    return "\n".join(parts)


def write_pages() -> None:
    shutil.rmtree(PAGES, ignore_errors=True)
    shutil.copytree(ROOT / "docs", PAGES)
    for source in [ROOT / name for name in SITE_OF] + sorted((ROOT / "docs").rglob("*.md")):
        page = page_of(source)
        assert page is not None
        (PAGES / page).write_text(with_links(source.read_text(), source, page))
    (PAGES / "api.md").write_text(api_page())
    (PAGES / "measured.md").write_text(measured_page())


if __name__ == "__main__":
    write_pages()
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--config-file", ".ci/mkdocs.yml"]
    sys.exit(subprocess.run(command, cwd=ROOT, env={**os.environ, "NO_MKDOCS_2_WARNING": "1"}).returncode)
