"""API pages of the documentation site, read from the source: every public name is on one of them."""

from __future__ import annotations

import ast
import re
import zlib
from dataclasses import dataclass
from functools import cache
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


@dataclass(frozen=True)
class Page:
    """A page of the site: the public names of modules, then names of other modules.

    Attributes:
        inherits: classes are shown with what they inherit from bases that have no page.
    """

    name: str
    title: str
    about: str
    modules: tuple[str, ...] = ()
    more: tuple[str, ...] = ()
    inherits: bool = False


PAGES = (
    Page("layercache", "layercache", "Search, plan, enable, measure, compare.", ("layercache",), inherits=True),
    Page(
        "given-back",
        "What they give back",
        "What the functions of `layercache` return: caches, reports, points of a front, measurements, tables.",
        more=(
            "layercache.runtime.cache.Cache",
            "layercache.runtime.requests.ScheduleCache",
            "layercache.runtime.planned.PlannedRouter",
            "layercache.runtime.dynamic.DynamicRouter",
            "layercache.runtime.whole_step.StepRouter",
            "layercache.runtime.rows.RowRouter",
            "layercache.runtime.modules.ModuleScheduleRouter",
            "layercache.planning.learn.LearningCache",
            "layercache.runtime.report.CacheReport",
            "layercache.runtime.timestep_tables.TimestepTables",
            "layercache.runtime.timestep_tables.TimestepReport",
            "layercache.planning.front.Point",
            "layercache.tools.compare.measure.Measurement",
            "layercache.tools.compare.table.ComparisonTable",
            "layercache.tools.compare.rows.Row",
            "layercache._utils.metrics.Summary",
            "layercache.backend.patching.Acceleration",
        ),
    ),
    Page("methods", "layercache.methods", "Published methods, a frozen config each.", ("layercache.methods",)),
    Page(
        "fits",
        "Fits of methods",
        "How settings of methods are found that follow from a model or its full runs.",
        more=(
            "layercache.methods.dpcache.path_costs",
            "layercache.methods.dpcache.plan_steps",
            "layercache.methods.ertacache.fit",
            "layercache.methods.ertacache.reuse_statistics",
            "layercache.methods.meancache.plan_steps",
            "layercache.methods.meancache.stability_deviation",
            "layercache.methods.procache.sample_intervals",
            "layercache.methods.sencache.fit",
            "layercache.methods.teacache.fit",
        ),
    ),
    Page(
        "policy",
        "layercache.methods.policy",
        "What a method of your own is made of.",
        ("layercache.methods.policy",),
    ),
    Page(
        "schedule",
        "layercache.schedule",
        "Schedules, what they hold for, and functions of them.",
        ("layercache.schedule",),
        (
            "layercache.schedule.forecast.reforecast",
            "layercache.schedule.staging_plan.staged_bytes",
            "layercache.schedule.step_mask.StepMask",
        ),
        inherits=True,
    ),
    Page("models", "layercache.models", "Descriptions of transformers.", ("layercache.models",)),
    Page(
        "planning",
        "layercache.planning",
        "What searches and plans are made of, for those who look into them or add to them.",
        more=(
            "layercache.planning.search.SearchConfig",
            "layercache.planning.search.search_cost",
            "layercache.planning.plan.PlanConfig",
            "layercache.planning.fit.Forecast",
            "layercache.planning.rollout.Rollouts",
            "layercache.planning.rollout.Rollout",
            "layercache.planning.sampler.LinearSampler",
            "layercache.parallel.crew.Crew",
            "layercache.parallel.crew.crew_of_environment",
            "layercache.tools.compare.model.CalibratedModel",
        ),
    ),
    Page(
        "batch",
        "layercache.tools.batch",
        "Many prompts, kept as they come, from Python.",
        more=(
            "layercache.tools.batch.run.generate_all",
            "layercache.tools.batch.run.Batch",
            "layercache.tools.batch.entries.Entry",
            "layercache.tools.batch.entries.numbered",
        ),
    ),
    Page("ops", "layercache.ops", "The ops of a cached step.", ("layercache.ops",), ("layercache.ops.plans.ignored",)),
    Page("backend", "layercache.backend", "The ops for authors of other caches.", ("layercache.backend",)),
    Page("metrics", "layercache.metrics", "Counts for Prometheus.", ("layercache.metrics",)),
    Page(
        "demo",
        "layercache.demo",
        "The bundled model as a pipeline of diffusers.",
        ("layercache.demo.pipeline",),
    ),
    Page("errors", "layercache.errors", "Every error and warning of the library.", ("layercache.errors",)),
)
MODULES = tuple(module for page in PAGES for module in page.modules)


def _file_of(module: str) -> Path:
    folder = ROOT / Path(*module.split("."))
    return folder / "__init__.py" if folder.is_dir() else folder.with_suffix(".py")


@cache
def _body_of(module: str) -> list[ast.stmt]:
    return ast.parse(_file_of(module).read_text()).body


def _defined(node: ast.stmt) -> str:
    """The name that a statement of a module defines, or nothing."""
    if isinstance(node, ast.FunctionDef | ast.ClassDef):
        return node.name
    target = node.targets[0] if isinstance(node, ast.Assign) else getattr(node, "target", None)
    return target.id if isinstance(target, ast.Name) else ""


def public_names(module: str) -> dict[str, str]:
    """Public names of a module and where they are defined, read from its source.

    They are those of ``__all__``, else of imports ``as`` the same name, else the classes and functions that it defines.
    """
    body = _body_of(module)
    listed: set[str] = set()
    for node in body:
        if isinstance(node, ast.Assign) and _defined(node) == "__all__":
            listed |= {one.value for one in ast.walk(node.value) if isinstance(one, ast.Constant)}
        if isinstance(node, ast.Assign) and _defined(node) == "_HOMES" and isinstance(node.value, ast.Dict):
            listed |= {key.value for key in node.value.keys if isinstance(key, ast.Constant)}
    imports = [node for one in body for node in ast.walk(one) if isinstance(node, ast.ImportFrom) and node.module]
    homes = {alias.asname or alias.name: f"{node.module}.{alias.name}" for node in imports for alias in node.names}
    own = {_defined(node): node for node in body if _defined(node)}
    homes |= {name: f"{module}.{name}" for name in own if name not in homes}
    if not listed:
        passed_on = {alias.name for node in imports for alias in node.names if alias.asname == alias.name}
        listed = passed_on or {name for name, node in own.items() if isinstance(node, ast.FunctionDef | ast.ClassDef)}
    return {name: _home(homes[name]) for name in sorted(listed, key=str.lower) if not name.startswith("_")}


def _home(name: str) -> str:
    """Where a name is defined that a module may only pass on."""
    module, _, last = name.rpartition(".")
    for node in _body_of(module):
        if isinstance(node, ast.ImportFrom) and last in {one.asname or one.name for one in node.names}:
            return _home(f"{node.module}.{last}")
    return name


def names_of(page: Page) -> dict[str, str]:
    """Names of a page, as they are imported, and where each is defined."""
    found = {f"{module}.{name}": home for module in page.modules for name, home in public_names(module).items()}
    return found | {home: home for home in page.more}


def summary_of(home: str) -> str:
    """The first sentence of a name's docstring; its value, of a constant.

    Raises:
        ValueError: it is not defined there, or a function or class without a docstring.
    """
    module, _, name = home.rpartition(".")
    for node in reversed(_body_of(module)):  # the last definition of an overloaded function is its own
        if _defined(node) != name:
            continue
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            text = ast.get_docstring(node)
            if not text:
                raise ValueError(f"{home} is public and has no docstring")
            return re.sub(r"``([^`]+)``", r"`\1`", " ".join(text.partition("\n\n")[0].split()).replace("|", "\\|"))
        value = ast.unparse(node.value) if isinstance(node, ast.Assign) else ""
        return f"`{value}`" if len(value) < 60 else "a constant"
    raise ValueError(f"{home} is not defined in {_file_of(module).relative_to(ROOT)}")


def write_pages(folder: Path) -> None:
    """Writes a page per module and one that lists them all; a name has one page, the first that lists it."""
    folder.mkdir(parents=True)
    pages: dict[str, str] = {}
    contents = ["# API", "", "Every public name, from its docstring.", ""]
    for page in PAGES:
        parts = [f"# {page.title}", "", page.about, ""]
        contents += [f"## [{page.title}]({page.name}.md)", "", page.about, "", "| name | |", "|---|---|"]
        for name, home in names_of(page).items():
            where = pages.setdefault(home, page.name)
            short = ".".join(name.split(".")[-2:]) if page.name == "fits" else name.rpartition(".")[2]
            contents.append(f"| [`{short}`]({where}.md#{home}) | {summary_of(home)} |")
            if where == page.name:
                parts += [
                    f"::: {home}",
                    *(["    options:", "      inherited_members: true"] if page.inherits else []),
                    "",
                ]
            else:
                parts += [f"## `{short}`", "", f"See [`{short}`]({where}.md#{home}).", ""]
        contents.append("")
        (folder / f"{page.name}.md").write_text("\n".join(parts))
    (folder / "index.md").write_text("\n".join(contents))


def missing_names(site: Path) -> list[str]:
    """Public names that no page of a built site shows, by its inventory of objects."""
    data = (site / "objects.inv").read_bytes().split(b"\n", 4)[4]
    shown = {line.split(" ", 1)[0] for line in zlib.decompress(data).decode().splitlines()}
    return sorted({home for page in PAGES for home in names_of(page).values()} - shown)
