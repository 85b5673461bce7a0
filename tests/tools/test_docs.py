"""What the documents say of the repository: links, paths, names, commands, versions and figures that are there."""

from __future__ import annotations

import importlib
import json
import pkgutil
import re
import runpy
from collections.abc import Callable
from itertools import accumulate
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import typer

from layercache.tools.cli.app import app

ROOT = Path(__file__).parents[2]
FOLDERS = [
    ROOT / name
    for name in (
        "",
        "docs",
        "docs/guides",
        "examples",
        "examples/deep_model",
        "examples/service",
        "integrations/comfyui",
        "integrations/demo",
        "integrations/demo/layercache_demo",
        ".github",
    )
]
DOCUMENTS = sorted(path for folder in FOLDERS for path in folder.glob("*.md"))
CURRENT = [path for path in DOCUMENTS if path.name != "CHANGELOG.md"]  # which also says what was
WORDS = "coach coaching rehearsal contestant contestants workshop hunt told trip sight stand-in alike".split()
METHODS = ROOT / "docs" / "methods.md"
CODE = ("layercache", "kernels", "csrc", "bench", "examples", "tests")
SOURCES = (".py", ".pyi", ".cpp", ".h", ".hpp")
README = (ROOT / "README.md").read_text()


def prose(path: Path) -> str:
    return re.sub(r"^```.*?^```", "", path.read_text(), flags=re.DOTALL | re.MULTILINE)


def name_of(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def anchors(path: Path) -> set[str]:
    titles = re.findall(r"^#+ (.+)$", prose(path), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


@pytest.mark.parametrize("path", DOCUMENTS, ids=name_of)
def test_links_lead_somewhere(path: Path) -> None:
    for target in re.findall(r"\]\(\s*([^)\s]+)\s*\)", prose(path)):
        if target.startswith(("http://", "https://")):
            continue
        name, _, anchor = target.partition("#")
        found = (path.parent / name).resolve() if name else path
        assert found.exists(), target
        assert not anchor or anchor in anchors(found), target


@pytest.mark.parametrize("path", CURRENT, ids=name_of)
def test_files_and_names_in_backticks_exist(path: Path) -> None:
    text = prose(path)
    for name in re.findall(r"`((?:layercache|kernels|csrc|tests|bench|docs|examples)/[\w./]*)", text):
        assert (ROOT / name).exists(), name
    for name in re.findall(r"`(layercache(?:\.\w+)+)", text):
        pkgutil.resolve_name(name)


@pytest.mark.parametrize("path", CURRENT, ids=name_of)
def test_commands_have_these_options(path: Path) -> None:
    commands = typer.main.get_command(app).commands
    for line in re.findall(r"(?:^    |`)layercache ((?:[a-z]|-[a-z])[^`\n]*)", path.read_text(), re.MULTILINE):
        first, *rest = line.partition("  #")[0].split()
        command = commands[first]
        if first == "bench" and rest:
            command = command.commands[rest[0]]
        known = {option for one in command.params for option in (*one.opts, *one.secondary_opts)} | {"--help"}
        assert {word for word in rest if re.match(r"--?[a-z]", word)} <= known, line


@pytest.mark.parametrize("path", DOCUMENTS, ids=name_of)
def test_words_of_the_field(path: Path) -> None:
    found = re.findall(rf"\b(?:{'|'.join(WORDS)})\b", path.read_text(), re.IGNORECASE)
    assert not found


def test_citations_of_the_methods_page_name_its_headings() -> None:
    """``docs/methods.md, Heading`` in docstrings and comments, also across lines; the ops it lists are there."""
    headings = re.findall(r"^##+ (.+)$", prose(METHODS), re.MULTILINE)
    cited = re.compile(r"methods\.md(?:, (?:" + "|".join(map(re.escape, headings)) + r")(?![ \w]))?")
    found = 0
    for path in sorted(path for name in CODE for path in (ROOT / name).rglob("*") if path.suffix in SOURCES):
        if path == Path(__file__):
            continue
        text = re.sub(r"\n\s*(?://|#|\*)?\s*", " ", path.read_text())
        for citation in cited.finditer(text):
            around = text[citation.start() - 5 : citation.end() + 40]
            assert around.startswith("docs/methods.md, ") and "," in citation.group(), f"{name_of(path)}: {around}"
            found += 1
        assert "\N{SECTION SIGN}" not in text, name_of(path)
        for page in re.findall(r"(?<![\w/.])docs/[\w/-]+\.(?:md|ipynb)", text):
            assert (ROOT / page).exists(), f"{name_of(path)}: {page}"
    assert found > 60
    ops = prose(METHODS).partition("### Formulas of the ops")[2].partition("## Papers")[0]
    for cell in re.findall(r"^\| (`.+?) \|", ops, re.MULTILINE):
        for name in cell.replace("`", "").split(", "):
            pkgutil.resolve_name(f"layercache.ops.{name}")


def test_readme_is_short_and_names_the_commands_that_check_it() -> None:
    assert len(README.splitlines()) <= 120
    assert "    make demo " in README and "    make test " in README and "make demo TORCH_ARGS=" in README


def test_the_first_route_shown_is_the_one_that_gives_most() -> None:
    """A search; a profile is measured faster and gives less."""
    for text in (README, (ROOT / "docs" / "planning.md").read_text()):
        assert 0 < text.index("layercache.search(") < text.index("layercache.plan(")
        assert text.index("layercache.search(") < text.index("profile")


def test_the_demo_gave_what_readme_says() -> None:
    runs = json.loads((ROOT / "bench" / "results" / "demo-cpu.json").read_text())["methods"]
    table = [[cell.strip() for cell in line.strip("|").split("|")] for line in README.splitlines() if line[:2] == "| "]
    said = [row[1:] for row in table if len(row) == 7 and row[3] and row[2].endswith("x")]
    assert said == [
        [f"{run['used']:.3f}", f"{run['speedup']:.2f}x"]
        + [f"{run['psnr'][name]:.2f}" for name in ("mean", "median", "quantile10")]
        + [f"{run['ssim']['mean']:.4f}"]
        for run in runs
        if run["psnr"]
    ]


def test_the_page_of_timestep_tables_has_the_figures_of_its_result_file() -> None:
    page = (ROOT / "docs" / "guides" / "timestep-tables.md").read_text()
    models = json.loads((ROOT / "bench" / "results" / "timestep-tables.json").read_text())["models"]
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in page.splitlines() if line[:2] == "| "]
    said = {row[0]: row[1:] for row in rows if len(row) == 5}
    for one in models:
        if one["projections"]:
            sizes = [f"{one[name] / 1e9:,.2f} GB" for name in ("bytes", "weights", "tables")]
            assert said.pop(one["model"]) == [sizes[0], str(one["projections"]), *sizes[1:]]
        else:
            (why,) = one["kept"]
            assert f"| {one['model']} | {why.replace('also depend on ', '')} |" in page
    assert set(said) == {"model"}


def test_versions_agree() -> None:
    pinned = dict(line.split("==") for line in (ROOT / "constraints.txt").read_text().splitlines() if "==" in line)
    hooks = (ROOT / ".pre-commit-config.yaml").read_text()
    assert re.search(r"ruff-pre-commit\s+rev: v(\S+)", hooks)[1] == pinned["ruff"]  # type: ignore[index]
    project = (ROOT / "pyproject.toml").read_text()
    supported = re.findall(r"Python :: (3\.\d+)", project)
    assert f'requires-python = ">={supported[0]}"' in project
    workflow = (ROOT / ".github" / "workflows" / "ci.yml").read_text()
    assert re.findall(r'"(3\.\d+)"', workflow) == supported
    assert f"Python {supported[0]} to {supported[-1]}" in README
    prepared = re.search(r"^## (\S+) - ", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)[1]  # type: ignore[index]
    assert f'fallback_version = "{prepared}.dev0"' in project
    assert f"version: {prepared}\n" in (ROOT / "CITATION.cff").read_text()


@pytest.fixture
def site(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], ModuleType]:
    """Modules of what builds the site."""
    monkeypatch.syspath_prepend(ROOT / ".ci")
    return importlib.import_module


def test_the_site_has_every_page_and_every_public_name(site: Callable[[str], ModuleType], tmp_path: Path) -> None:
    api, results = site("site_api"), site("site_results")
    written = {*site("docs").SITE_OF.values(), "gallery.md", "measured/index.md", "api/index.md"}
    written |= {f"measured/{page.name}.md" for page in results.PAGES} | {f"api/{page.name}.md" for page in api.PAGES}
    nav = re.findall(r": ([\w/-]+\.md)$", (ROOT / ".ci" / "mkdocs.yml").read_text(), re.MULTILINE)
    pages = {path.relative_to(ROOT / "docs") for end in ("md", "ipynb") for path in (ROOT / "docs").rglob(f"*.{end}")}
    assert sorted(nav) == sorted({path.with_suffix(".md").as_posix() for path in pages} | written)
    for module in api.MODULES:
        public = getattr(importlib.import_module(module), "__all__", None)
        assert public is None or set(api.public_names(module)) == set(public) - {"__version__"}
    for home in (home for page in api.PAGES for home in api.names_of(page).values()):
        pkgutil.resolve_name(home)
    api.write_pages(tmp_path / "api")  # raises where a name has no docstring
    results.write_pages(tmp_path / "measured", "https://example.org")  # and where a result file is on no page


def test_the_site_shows_every_name_that_documents_give(site: Callable[[str], ModuleType]) -> None:
    """What a reader is shown to import or call is public, so that its page says what it takes."""
    api = site("site_api")
    shown = {name for page in api.PAGES for one in api.names_of(page).items() for name in one}
    shown |= {module for name in shown for module in accumulate(name.split("."), "{}.{}".format)}
    for path in CURRENT:
        text = path.read_text()
        named = set(re.findall(r"layercache(?:\.[a-z_]\w*)+\.[A-Z]\w*|`(layercache(?:\.\w+){2,})\(", text)) - {""}
        for module, names in re.findall(r"^from (layercache[\w.]*) import ([\w, ]+?)(?:  #.*)?$", text, re.MULTILINE):
            named |= {f"{module}.{name}" for name in names.split(", ")}
        assert {re.sub(r"(\.[A-Z]\w*)\..*", r"\1", name) for name in named} <= shown, name_of(path)


def test_notebooks_are_stored_without_outputs(site: Callable[[str], ModuleType]) -> None:
    notebooks = site("site_notebooks")
    stored = {path.name: notebooks.stored_outputs(path) for path in notebooks.NOTEBOOKS.glob("*.ipynb")}
    assert stored and not any(stored.values())


@pytest.mark.parametrize(
    ("ref", "at"),
    [({"TYPE": "tag", "NAME": "v9.1.2"}, "v9.1.2"), ({"TYPE": "branch", "NAME": "a/b"}, "0dd1ce"), (None, "")],
    ids=["tag", "branch", "here"],
)
def test_links_of_the_readme_are_absolute_in_an_index(
    ref: dict[str, str] | None, at: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """To the tag that is built, else to the commit; outside of a workflow the repository's address is not known."""
    given: dict[str, Any] = {}
    monkeypatch.setattr("setuptools.setup", given.update)
    for name in ("GITHUB_REPOSITORY", "GITHUB_SERVER_URL"):
        monkeypatch.delenv(name, raising=False)
    if ref:
        values = {"REPOSITORY": "somebody/layercache", "SHA": "0dd1ce", **{f"REF_{k}": v for k, v in ref.items()}}
        for name, value in values.items():
            monkeypatch.setenv(f"GITHUB_{name}", value)
    monkeypatch.chdir(ROOT)
    runpy.run_path("setup.py")
    text, home = given["long_description"], "https://github.com/somebody/layercache"
    if ref is None:
        assert (text, given["project_urls"]) == (README, {})
        return
    links = re.findall(r"\]\(([^)#][^)]*)\)", text)
    assert links and all(link.startswith("https://") for link in links)
    assert f"]({home}/raw/{at}/docs/demo.png)" in text and f"]({home}/blob/{at}/docs/guide.md)" in text
    assert given["project_urls"]["Issues"] == f"{home}/issues"
