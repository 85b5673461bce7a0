"""Runs the cache tests of diffusers and cache-dit as they are and accelerated: every test that passes must still pass.

    python .ci/peer_tests.py                                   # the installed versions
    python .ci/peer_tests.py --release diffusers==0.41.0 --release cache-dit==newest

The tests are those of each release's tag, from its repository. `--checkout diffusers=PATH` takes those that are there.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parents[1]
BUILD = ROOT / "build" / "peers"
PEERS = ROOT / ".ci" / "peers"

# Tests that pass, but not when accelerated, each with the reason.
EXPECTED: dict[str, str] = {}


class Peer(NamedTuple):
    repository: str
    folders: tuple[str, ...]  # of the repository
    directory: str  # in which the tests run
    files: str  # pattern of the files with tests, in there
    about: str  # what such a file speaks of
    names: str  # of the tests; an expression for pytest


KNOWN = {
    "diffusers": Peer(
        "https://github.com/huggingface/diffusers",
        ("tests",),
        ".",
        "tests/**/test_*.py",
        r"FirstBlockCache|TaylorSeer|MagCache|FasterCache|HookRegistry",
        "cache or TestHooks",
    ),
    "cache-dit": Peer(
        "https://github.com/vipshop/cache-dit", ("tests", "examples/configs"), "tests", "api/test_*.py", "", ""
    ),
}


def run(*command: str | Path, **options: Any) -> subprocess.CompletedProcess[str]:
    print("+", *command, flush=True)
    return subprocess.run([str(part) for part in command], text=True, **options)


def install(package: str, version: str) -> Path:
    """A folder with that release alone, which comes before what is installed."""
    folder = BUILD / f"{package}-{version}"
    if version == "newest" or not folder.exists():
        shutil.rmtree(folder, ignore_errors=True)
        wanted = package if version == "newest" else f"{package}=={version}"
        pip = (sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", folder)
        run(*pip, wanted, check=True)
    return folder


def fetch_tests(package: str, version: str) -> Path:
    """The tests of a release, from its tag."""
    folder = BUILD / f"{package}-{version}-tests"
    if not folder.exists():
        clone = ("--quiet", "--no-checkout", "--depth", "1", "--filter=blob:none", "--branch", f"v{version}")
        run("git", "clone", *clone, KNOWN[package].repository, folder, check=True)
        wanted = (f"/{name}/" for name in KNOWN[package].folders)
        run("git", "-C", folder, "sparse-checkout", "set", "--no-cone", *wanted, check=True)
        run("git", "-C", folder, "checkout", "--quiet", check=True)
    return folder


class Trial(NamedTuple):
    """The tests of one release, and what they run with."""

    package: str
    tests: Path
    path: list[Path]
    workers: str
    names: str  # an expression for pytest
    files: str  # pattern

    def outcomes(self, *selected: str, accelerated: bool) -> dict[str, dict[str, Any]]:
        """What became of each test: of all that concern caches, or of the ones selected."""
        peer, written = KNOWN[self.package], BUILD / "outcomes.json"
        directory = self.tests / peer.directory
        files = [
            file for file in sorted(directory.glob(self.files or peer.files)) if re.search(peer.about, file.read_text())
        ]
        names = self.names or peer.names
        only = ("-k", names) if names and not selected else ()
        environment = os.environ | {
            "PYTHONPATH": os.pathsep.join(map(str, [*self.path, PEERS, ROOT])),
            "PEER_PACKAGE": self.package if accelerated else "",
            "PEER_OUTCOMES": str(written),
            "HF_HUB_OFFLINE": "1",
            "OMP_NUM_THREADS": "1",
        }
        pytest = (sys.executable, "-m", "pytest", "-p", "plugin", "-p", "no:cacheprovider", "-W", "ignore", "-q")
        options = ("--tb=line", "--no-header", "--continue-on-collection-errors", "-n", self.workers)
        written.unlink(missing_ok=True)
        chosen = selected or [str(file.relative_to(directory)) for file in files]
        with (BUILD / "pytest.log").open("w+") as log:
            run(*pytest, *options, *only, *chosen, cwd=directory, env=environment, stdout=log, stderr=log)
            if not written.exists():
                log.seek(0)
                sys.exit("the tests did not run:\n" + log.read()[-4000:])
        return json.loads(written.read_text())


def compared(trial: Trial) -> dict[str, Any]:
    without, with_ours = (trial.outcomes(accelerated=accelerated) for accelerated in (False, True))
    passed = [test for test, found in without.items() if found["outcome"] == "passed"]
    differing = [test for test in passed if with_ours.get(test, {}).get("outcome") != "passed"]
    if differing:  # once more, in case that chance decided
        again = [trial.outcomes(*differing, accelerated=accelerated) for accelerated in (False, True)]
        passing = [{test for test, found in part.items() if found["outcome"] == "passed"} for part in again]
        differing = [test for test in differing if test in passing[0] - passing[1]]
    return {
        "tests": len(without),
        "pass": len(passed),
        "pass_accelerated": sum(found["outcome"] == "passed" for found in with_ours.values()),
        "reach_our_ops": sum(found.get("calls", 0) > 0 for found in with_ours.values()),
        "differ": {test: with_ours.get(test, {}).get("message", "not run") for test in differing},
        "fail_without": sorted(test for test, found in without.items() if found["outcome"] == "failed"),
    }


def tried(package: str, version: str, checkout: str | None, options: argparse.Namespace) -> dict[str, Any]:
    path = [install(package, version)] if version else []
    installed = next(iter(importlib.metadata.distributions(name=package, path=[*map(str, path), *sys.path]))).version
    tests = Path(checkout) if checkout else fetch_tests(package, installed)
    if package == "diffusers":
        shutil.copy(PEERS / "every_model.py", tests / "tests" / "models" / "transformers" / "test_every_model.py")
        path.append(install("parameterized", "0.9.0"))
        run(sys.executable, PEERS / "hub_files.py", tests, check=True)
    commit = run("git", "-C", tests, "log", "-1", "--format=%h of %cs", check=True, stdout=subprocess.PIPE).stdout
    found = {"package": package, "version": installed, "tests_of": commit.strip()}
    found |= {"names": options.k, "files": options.files}
    return found | compared(Trial(package, tests, path, options.workers, options.k, options.files))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--release", action="append", metavar="PACKAGE==VERSION", help="'newest' is a version too")
    parser.add_argument("--checkout", action="append", default=[], metavar="PACKAGE=PATH", help="tests that are there")
    parser.add_argument(
        "-k", default="", metavar="NAMES", help="of tests, as pytest takes them; by default all of caches"
    )
    parser.add_argument(
        "--files", default="", metavar="PATTERN", help="of the files with tests; by default all of caches"
    )
    parser.add_argument("--workers", default="0", help="processes, or auto")
    parser.add_argument("-o", "--output", type=Path, help="file for the results, in JSON")
    options = parser.parse_args()
    BUILD.mkdir(parents=True, exist_ok=True)
    checkouts = dict(given.split("=", 1) for given in options.checkout)
    results = []
    for release in options.release or KNOWN:
        package, _, version = release.partition("==")
        results.append(tried(package, version, checkouts.get(package), options))
        print(json.dumps(results[-1], indent=1))
    if options.output:
        options.output.write_text(json.dumps(results, indent=1) + "\n")
    if idle := [result["package"] for result in results if not result["reach_our_ops"]]:
        sys.exit(f"no test of {' and '.join(idle)} reaches an accelerated function: the comparison says nothing")
    unexpected = [test for result in results for test in result["differ"] if test not in EXPECTED]
    if unexpected:
        sys.exit(f"{len(unexpected)} tests pass, but not when accelerated:\n" + "\n".join(unexpected))


if __name__ == "__main__":
    main()
