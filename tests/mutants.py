"""Changes the package in the small ways of mutants.txt and prints the changes that no test notices.

python tests/mutants.py [--only losses/output.py weighting.py]

Each change is made in a temporary copy of the package. A fork of this process runs the tests beside the file's name,
until one fails; so torch and fastai are imported once. It is a tool for by hand: all of it takes some hours.
"""

import argparse
import contextlib
import importlib
import json
import os
import shutil
import signal
import sys
import tempfile
import time
import warnings
from pathlib import Path
from typing import Any, NamedTuple

TESTS = Path(__file__).resolve().parent
PACKAGE = TESTS.parent / "fasterai_kd"
LIMIT = 600  # seconds; a mutant that hangs is killed
IMPORTS = [
    "fastai.vision.all",
    "fastai.text.all",
    "fastai.tabular.all",
    "torch._dynamo",
    "timm",
    "hypothesis",
    "pytest",
]
ERROR = 99  # the tests were not those of the changed package


class Mutant(NamedTuple):
    "One replacement in one file, and the tests to run."

    file: str
    old: str
    new: str
    tests: tuple[str, ...]

    def apply(self, source: str) -> str:
        "ValueError where the old text is not found exactly once."
        n = source.count(self.old)
        if n != 1 and self.old != self.new:
            raise ValueError(f"{self.file}: {self.old!r} is found {n} times, expected once")
        return source.replace(self.old, self.new)


def read(path: Path = TESTS / "mutants.txt") -> list[Mutant]:
    "A file's name with its tests, then a line `old => new` for each mutant; \\n is a line break."
    mutants, file, tests = [], "", ()
    for line in path.read_text().splitlines():
        if line.startswith("    "):
            old, new = (part.replace("\\n", "\n") for part in line[4:].split(" => "))
            mutants.append(Mutant(file, old, "" if new == "nothing" else new, tests))
        elif line and not line.startswith("#"):
            file, names = line.split(": ")
            tests = tuple(f"test_{name}.py" for name in names.split())
    return mutants


def is_killed(mutant: Mutant, folder: Path, log: Path) -> tuple[bool, float]:
    "Does a test fail? And the seconds of the processor that this took."
    copy = folder / PACKAGE.name
    shutil.copytree(PACKAGE, copy, dirs_exist_ok=True)
    (copy / mutant.file).write_text(mutant.apply((PACKAGE / mutant.file).read_text()))
    pid = os.fork()
    if pid == 0:
        _run_tests(mutant.tests, folder, log)
    start = time.monotonic()
    while not (ended := os.wait4(pid, os.WNOHANG))[0]:
        if time.monotonic() - start > LIMIT:
            os.kill(pid, signal.SIGKILL)
        time.sleep(0.05)
    if os.waitstatus_to_exitcode(ended[1]) == ERROR:
        raise RuntimeError(f"{mutant.file}: the tests did not run, see {log}")
    return ended[1] != 0, ended[2].ru_utime + ended[2].ru_stime


class QuickestFirst:
    "A pytest plugin: in each file the tests that took least so far come first, those that never ran before them."

    def __init__(self, file: Path):
        self.file = file
        self.seconds: dict[str, float] = json.loads(file.read_text()) if file.exists() else {}

    def pytest_collection_modifyitems(self, items):
        files = list(dict.fromkeys(item.path for item in items))
        items.sort(key=lambda item: (files.index(item.path), self.seconds.get(item.nodeid, 0.0)))

    def pytest_runtest_logreport(self, report):
        if report.when == "call":
            self.seconds[report.nodeid] = report.duration

    def pytest_sessionfinish(self):
        self.file.write_text(json.dumps(self.seconds))


def _run_tests(tests: tuple[str, ...], folder: Path, log: Path) -> None:
    code = ERROR
    with contextlib.suppress(BaseException), log.open("w") as f:
        os.dup2(f.fileno(), 1)
        os.dup2(f.fileno(), 2)
        os.environ["PYTHONPATH"] = str(folder)
        sys.path.insert(0, str(folder))
        pytest: Any = importlib.import_module("pytest")
        options = ["-x", "-q", "-p", "no:cacheprovider", "-W", "ignore::pytest.PytestAssertRewriteWarning"]
        order = QuickestFirst(log.with_suffix(".json"))
        code = int(pytest.main([*options, *(str(TESTS / t) for t in tests)], plugins=[order]))
        package = sys.modules.get(PACKAGE.name)
        if package is not None and not str(package.__file__).startswith(str(folder)):
            code = ERROR
    sys.stdout.flush()
    os._exit(code)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", nargs="*", default=[""], help="files, by the start of their names")
    parser.add_argument("--quick", action="store_true", help="do not look first whether the tests pass as it is")
    parser.add_argument("--log", type=Path, default=Path(tempfile.gettempdir()) / "mutant.log")
    args = parser.parse_args()
    mutants = [m for m in read() if m.file.startswith(tuple(args.only))]
    for m in mutants:
        m.apply((PACKAGE / m.file).read_text())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for name in IMPORTS:
            with contextlib.suppress(ImportError):
                importlib.import_module(name)
    importlib.import_module("torch").set_num_threads(1)
    sys.dont_write_bytecode = False  # the tests are compiled once
    killed = 0
    unchanged = {m.file: m._replace(old="", new="") for m in mutants}
    for m in () if args.quick else unchanged.values():
        with tempfile.TemporaryDirectory() as folder:
            if is_killed(m, Path(folder), args.log)[0]:
                sys.exit(f"{' '.join(m.tests)} fail without any change, see {args.log}")
    for m in mutants:
        with tempfile.TemporaryDirectory() as folder:
            dead, seconds = is_killed(m, Path(folder), args.log)
        killed += dead
        mark = "killed  " if dead else "SURVIVED"
        print(f"{mark} {seconds:4.0f} s  {m.file}: {m.old!r} => {m.new!r}", flush=True)
    print(f"{len(mutants)} mutants, {killed} killed, {len(mutants) - killed} survived")


if __name__ == "__main__":
    main()
