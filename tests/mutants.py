"""Break lines of the package one by one, and count the mutants that the tests of `make test` notice.

    make mutants SEED=3         or  python tests/mutants.py --seed 3

Lines of functions are drawn by the seed, in turn from the solvers, the packers, the kernels in Python, the
journal, the cache of keys and values, the reader and the writer. Each gets one syntactic mutation: a comparison
or a condition is negated, an operator swapped, a constant changed, a statement dropped. The tests that cover the
line run until the first failure, which notices the mutant. All of this happens in a copy of the tree in a
temporary folder.

Which test covers which line is measured once (the slow half) and kept in build/mutants/. Where a file has
changed since, the tests that cover the enclosing function are taken. Results are kept as well: the same command
continues a run that was interrupted. At most `--tests` tests run per mutant, one of each test function in turn,
the fastest first, that take at most `--seconds` of CPU time without the mutation. Five times as long counts as an
endless loop, which is noticed; a mutant that no test notices has survived, equivalent to the original or not.
"""

from __future__ import annotations

import argparse
import compileall
import hashlib
import importlib
import itertools
import json
import os
import pkgutil
import py_compile
import random
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

from helpers.mutations import Mutant, first_line, functions_of, mutations_of

ROOT = Path(__file__).parents[1]
BUILD = ROOT / "build" / "mutants"
AREAS = {
    "solvers": ["solvers/*.py"],
    "packers": ["numerics/packing.py", "formats/*.py"],
    "kernels": ["runtime/kernels/*.py"],
    "journal": ["checkpoint/journal.py"],
    "cache": ["kv/*.py"],
    "reader": ["checkpoint/reader.py"],
    "writer": ["checkpoint/writer.py"],
}
LINES = 40
ENDLESS, WALL_S = "endless", 1200
# Lines that run in processes of their own, which coverage does not see.
IN_PROCESSES = {
    "src/bitmill/runtime/kernels/triton.py": "tests/runtime/triton/test_triton.py::test_interpreter_or_gpu"
}


def draw(tree: Path, seed: int, count: int) -> list[Mutant]:
    """Return `count` mutants, drawn in turn from the areas, each of another line."""
    rng = random.Random(seed)
    pools: dict[str, list[list[Mutant]]] = {}
    for area, patterns in AREAS.items():
        files = sorted({f for pattern in patterns for f in (tree / "src" / "bitmill").glob(pattern)})
        lines = [
            choices for file in files for choices in mutations_of(file, str(file.relative_to(tree)), area).values()
        ]
        rng.shuffle(lines)
        pools[area] = lines
    drawn: list[Mutant] = []
    while len(drawn) < count and any(pools.values()):
        for lines in pools.values():
            if lines and len(drawn) < count:
                drawn.append(rng.choice(lines.pop()))
    return drawn


# -- the copy -----------------------------------------------------------------------------------------------------


def copy_tree(folder: Path) -> None:
    """Copy the files that git has, and the compiled kernels, to `folder`."""
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, check=True).stdout
    names = [name for name in listed.decode().split("\0") if name]
    names += [str(f.relative_to(ROOT)) for f in (ROOT / "src/bitmill").glob("_native*.so")]
    for name in names:
        if (ROOT / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, folder / name)
    compileall.compile_dir(folder / "src", quiet=2, invalidation_mode=py_compile.PycInvalidationMode.CHECKED_HASH)


# -- which test covers which line ------------------------------------------------------------------------------


class Recorder:
    """A plugin of pytest: coverage in the context of each test, and the CPU seconds of those that passed."""

    def __init__(self, coverage) -> None:
        self.coverage, self.seconds, self.started = coverage, dict[str, float](), 0.0

    def pytest_runtest_logstart(self, nodeid: str) -> None:
        self.coverage.switch_context(nodeid)
        self.started = time.process_time()

    def pytest_runtest_logreport(self, report) -> None:
        if report.when == "call" and report.passed:
            self.seconds[report.nodeid] = round(time.process_time() - self.started, 4)


def measure(tree: Path, tests: list[Path], folder: Path, jobs: int) -> None:
    """Write which lines each test covers to `folder`, one file per file of tests, each measured in a fork."""
    folder.mkdir(parents=True, exist_ok=True)
    pid = os.fork()
    if pid:
        os.waitpid(pid, 0)
        return
    enter(tree)
    for module in pkgutil.walk_packages(importlib.import_module("bitmill").__path__, "bitmill."):
        if not any(part in module.name for part in ("_native", "vllm.")):
            importlib.import_module(module.name)
    running: set[int] = set()
    for number, test in enumerate(tests, 1):
        if len(running) == jobs:
            running.discard(os.wait()[0])
        print(f"measuring {number} of {len(tests)}: {test}", flush=True)
        child = os.fork()
        if child == 0:
            try:
                quiet(tree / f"output-{os.getpid()}")
                map_file(folder, test).write_text(json.dumps(measure_file(tree, test)))
            finally:
                os._exit(0)
        running.add(child)
    while running:
        running.discard(os.wait()[0])
    os._exit(0)


def map_file(folder: Path, test: Path) -> Path:
    return folder / f"{'.'.join(test.with_suffix('').parts[1:])}.json"


def measure_file(tree: Path, test: Path) -> dict:
    """Return the seconds of the tests in a file, and of each source file the tests that cover its lines."""
    import coverage
    import pytest

    include = [str(tree / "src/bitmill" / pattern) for patterns in AREAS.values() for pattern in patterns]
    data_file = str(tree / f"coverage-{os.getpid()}")
    tracer = coverage.Coverage(data_file=data_file, include=include, config_file=False, concurrency=["thread"])
    recorder = Recorder(tracer)
    tracer.start()
    pytest.main(["-p", "no:cacheprovider", str(test)], plugins=[recorder])
    tracer.stop()
    data, files = tracer.get_data(), {}
    for measured in sorted(data.measured_files()):
        source = Path(measured).read_bytes()
        lines = {
            line: sorted(recorder.seconds.keys() & set(contexts))
            for line, contexts in data.contexts_by_lineno(measured).items()
        }
        files[str(Path(measured).relative_to(tree))] = {
            "digest": hashlib.sha256(source).hexdigest(),
            "lines": {line: tests for line, tests in lines.items() if tests},
            "functions": functions_of(source),
        }
    return {"seconds": recorder.seconds, "files": files}


class CoverageMap:
    """The tests that cover a line, from what `measure` wrote."""

    def __init__(self, folder: Path, tree: Path) -> None:
        self.tree = tree
        self.measured = [json.loads(path.read_text()) for path in sorted(folder.glob("*.json"))]
        self.seconds = {name: s for part in self.measured for name, s in part["seconds"].items()}

    def covering(self, mutant: Mutant) -> list[str]:
        """Return the tests of the line, or of its function if the file has changed, in the order of `_in_turn`."""
        source, chosen = (self.tree / mutant.file).read_bytes(), set()
        digest, statement = hashlib.sha256(source).hexdigest(), first_line(source, mutant.line)
        for file in (file for part in self.measured for file in self._files(part, mutant)):
            first, last = statement, mutant.line
            if digest != file["digest"]:
                first, last = file["functions"].get(mutant.function, (0, -1))
            chosen |= {t for line, tests in file["lines"].items() if first <= int(line) <= last for t in tests}
        here = {name for name in chosen if name in self.seconds and (self.tree / name.partition("::")[0]).exists()}
        return self._in_turn(here)

    @staticmethod
    def _files(part: dict, mutant: Mutant) -> list[dict]:
        """Return the file of the mutant, or files with a function of its name if it has been renamed since."""
        if mutant.file in part["files"]:
            return [part["files"][mutant.file]]
        return [file for file in part["files"].values() if mutant.function in file["functions"]]

    def cpu_seconds(self, tests: list[str]) -> float:
        return sum(self.seconds.get(name, 120.0) for name in tests)

    def within(self, tests: list[str], cpu_s: float) -> list[str]:
        """Return as many of the first tests as take at most `cpu_s` together, but one at least."""
        while len(tests) > 1 and self.cpu_seconds(tests) > cpu_s:
            tests = tests[:-1]
        return tests

    def _in_turn(self, chosen: set[str]) -> list[str]:
        """One test of each test function in turn, the fastest first."""
        by_function: dict[str, list[str]] = defaultdict(list)
        for test in sorted(chosen, key=lambda t: (self.seconds[t], t)):
            by_function[test.partition("[")[0]].append(test)
        turns = itertools.zip_longest(*by_function.values())
        return [test for turn in turns for test in turn if test]


# -- the run ------------------------------------------------------------------------------------------------------


def preload() -> None:
    """Import what every run needs and no mutation touches, so that each run is a fork that starts at once."""
    os.environ.update(OMP_NUM_THREADS="1", OMP_WAIT_POLICY="passive", BITMILL_FULL_TESTS="0")
    for name in ("hypothesis", "pytest", "torch", "transformers"):
        importlib.import_module(name)
    for name in ("llama", "gpt2", "bert", "gemma2", "qwen2", "opt"):
        importlib.import_module(f"transformers.models.{name}.modeling_{name}")
    assert "bitmill" not in sys.modules, "bitmill must not be imported before it is broken"


def enter(tree: Path) -> None:
    """Work in the tree from here on."""
    for name in [name for name in sys.modules if name.partition(".")[0] == "helpers"]:
        del sys.modules[name]
    os.chdir(tree)
    paths = [str(tree / "src"), str(tree / "tests")]
    os.environ["PYTHONPATH"] = os.pathsep.join(paths)
    os.environ["PYTHONDONTWRITEBYTECODE"] = "1"
    sys.dont_write_bytecode = True
    sys.path[:0] = paths
    found = importlib.import_module("bitmill").__file__
    assert Path(str(found)).is_relative_to(tree), f"{found} is not the copy"


def quiet(path: Path) -> None:
    """Send what this process prints to a file."""
    output = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(output, 1)
    os.dup2(output, 2)


class Chosen:
    """A plugin of pytest that runs the chosen tests in their order, and writes the name of the first failure."""

    def __init__(self, tests: list[str], path: Path) -> None:
        self.order, self.path = {name: number for number, name in enumerate(tests)}, path

    def pytest_collection_modifyitems(self, items: list) -> None:
        items[:] = sorted((i for i in items if i.nodeid in self.order), key=lambda i: self.order[i.nodeid])

    def pytest_runtest_logreport(self, report) -> None:
        if report.failed and not self.path.exists():
            self.path.write_text(report.nodeid)

    def pytest_collectreport(self, report) -> None:
        if report.failed and not self.path.exists():
            self.path.write_text(f"{report.nodeid} (collection)")


def run_tests(tree: Path, tests: list[str], cpu_s: float) -> str | None:
    """Return the first of `tests` that fails in the tree, ENDLESS if they take more CPU seconds, or None."""
    noted = tree / "first-failure"
    noted.unlink(missing_ok=True)
    child = os.fork()
    if child == 0:
        status = 70
        try:
            os.setsid()
            resource.setrlimit(resource.RLIMIT_CPU, (int(cpu_s), int(cpu_s) + 5))
            status = _in_child(tree, tests, noted)
        finally:
            os._exit(status)
    deadline = time.monotonic() + WALL_S
    while time.monotonic() < deadline:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            if noted.exists():
                return noted.read_text()
            code = os.waitstatus_to_exitcode(status)
            if code in (-signal.SIGXCPU, -signal.SIGKILL):
                return ENDLESS
            return None if code in (0, 5) else "the process died"
        time.sleep(0.05)
    os.killpg(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return noted.read_text() if noted.exists() else None


def _in_child(tree: Path, tests: list[str], noted: Path) -> int:
    import pytest

    quiet(tree / "output")
    enter(tree)
    files = dict.fromkeys(name.partition("::")[0] for name in tests)
    return int(pytest.main(["-x", "-p", "no:cacheprovider", *files], plugins=[Chosen(tests, noted)]))


def judge(mutant: Mutant, tree: Path, coverage: CoverageMap, options: argparse.Namespace) -> None:
    """Break the line in the tree, run the tests that cover it, restore it, and note the outcome in the mutant."""
    tests = coverage.within(coverage.covering(mutant)[: options.tests], options.seconds)
    tests += [IN_PROCESSES[mutant.file]] if mutant.file in IN_PROCESSES else []
    mutant.tests = len(tests)
    if not tests:
        mutant.status = "uncovered"
        return
    file, started = tree / mutant.file, time.monotonic()
    source = file.read_bytes()
    file.write_bytes(source[: mutant.start] + mutant.text.encode() + source[mutant.end :])
    try:
        failed = run_tests(tree, tests, 30 + 5 * coverage.cpu_seconds(tests))
    finally:
        file.write_bytes(source)
    mutant.seconds = round(time.monotonic() - started, 1)
    mutant.status, mutant.by = ("noticed", failed) if failed else ("survived", "")


def judge_all(
    mutants: list[Mutant], tree: Path, coverage: CoverageMap, options: argparse.Namespace
) -> Iterator[int]:
    """Judge the mutants that have no outcome; yield the number of each when it is done.

    In the end the tests that noticed run once without a mutation. Where they fail even so, the mutants are judged
    again without them.
    """
    while True:
        for number, mutant in enumerate(mutants):
            if not mutant.status:
                judge(mutant, tree, coverage, options)
            yield number
        tests = sorted({m.by for m in mutants if m.by in coverage.seconds})
        failing = set()
        while tests and (failed := run_tests(tree, tests, WALL_S)) in tests:
            failing.add(failed)
            tests.remove(failed)
        if not failing:
            return
        coverage.seconds = {name: s for name, s in coverage.seconds.items() if name not in failing}
        for mutant in mutants:
            if mutant.by in failing:
                mutant.status = mutant.by = ""


def table(mutants: list[Mutant], commit: str, options: argparse.Namespace) -> str:
    """Return the page of results."""
    done = [m for m in mutants if m.status]
    noticed = sum(m.status == "noticed" for m in done)
    rows = []
    for index, m in enumerate(done, 1):
        place = f"`{m.file.removeprefix('src/bitmill/')}:{m.line}`"
        by = f"`{m.by.removeprefix('tests/')}`" if m.by else ""
        cells = [str(index), m.area, place, m.change, m.status, by, f"{m.seconds:.0f}"]
        rows.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    head = f"""# Mutants

`make mutants SEED={options.seed}` broke {len(done)} of {len(mutants)} lines at commit
`{commit}`, one by one; the tests of `make test` noticed {noticed}.
At most {options.tests} of the tests that cover a line ran, of at most {options.seconds:.0f} CPU seconds; the first
failure ends a run. A mutant that computes the same numbers as the original counts as survived.

| | area | line | change | outcome | first failure | s |
|---|---|---|---|---|---|---|
"""
    return head + "\n".join(rows) + "\n"


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--lines", type=int, default=LINES, help="lines to break")
    parser.add_argument("--tests", type=int, default=60, help="tests per mutant, at most")
    parser.add_argument("--seconds", type=float, default=30.0, help="CPU seconds of tests per mutant, at most")
    parser.add_argument("--measure", nargs="*", metavar="FILE", help="files of tests to measure, in place of all")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="files of tests measured at a time")
    parser.add_argument("--only-map", action="store_true", help="only measure which test covers which line")
    parser.add_argument("--fresh-map", action="store_true", help="measure it again")
    parser.add_argument("--output", type=Path, default=ROOT / "docs" / "mutants.md")
    return parser.parse_args(arguments)


def main() -> None:
    options = parse()
    folder, results = BUILD / "map", BUILD / f"seed-{options.seed}.json"
    if options.fresh_map:
        shutil.rmtree(folder, ignore_errors=True)
    preload()
    with tempfile.TemporaryDirectory() as temporary:
        tree = Path(temporary).resolve() / "tree"
        copy_tree(tree)
        command = ["git", "rev-parse", "--short=12", "HEAD"]
        commit = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()
        tests = [file.relative_to(ROOT) for file in sorted((ROOT / "tests").rglob("test_*.py"))]
        if options.measure is not None:
            tests = [Path(name) for name in options.measure]
        measure(tree, [test for test in tests if not map_file(folder, test).exists()], folder, options.jobs)
        if options.only_map:
            return
        mutants = draw(tree, options.seed, options.lines)
        if results.exists():
            kept = {(m["file"], m["line"], m["start"], m["text"]): m for m in json.loads(results.read_text())}
            mutants = [Mutant(**kept.get((m.file, m.line, m.start, m.text), asdict(m))) for m in mutants]
        coverage = CoverageMap(folder, tree)
        for number in judge_all(mutants, tree, coverage, options):
            results.write_text(json.dumps([asdict(m) for m in mutants], indent=1))
            m = mutants[number]
            print(f"{number + 1:2} {m.status:9} {m.file}:{m.line} {m.change} {m.by}", flush=True)
    options.output.write_text(table(mutants, commit, options), encoding="utf-8")


if __name__ == "__main__":
    main()
