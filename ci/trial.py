"""``python -m ci test``: a wheel in a fresh environment beside a given torch, and the record of it."""

import json
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from tqdm import tqdm

from ci import CiError
from ci.matrix import Matrix, Pair
from ci.proof import Outcome, Record
from ci.wheel import Wheel
from codegen import PROJECT

CHECKS = Path(__file__).with_name("checks.py")
NEWEST = "newest"
STEPS = 5
"""Environment, torch, wheel, tests, ``python -m flash_attn``."""
PIP = ("-I", "-m", "pip", "--quiet", "--disable-pip-version-check")
"""Isolated from ``PYTHONPATH``: pip would take a source folder that is on it for the installed package."""


@dataclass(frozen=True)
class Request:
    """A wheel and the torch to put beside it: 2.13.0, 2.13 for its newest patch, or ``NEWEST``.

    ``pair`` is what a passed test proves; for the newest torch, None: the pair is what that turns out to be.
    ``python`` is the interpreter of the new environment; ``indexes`` are further indexes for pip.
    """

    wheel: Wheel
    torch: str
    pair: Pair | None
    python: str = sys.executable
    indexes: tuple[str, ...] = ()

    @property
    def requirement(self) -> str:
        """The torch as pip wants it."""
        if self.torch == NEWEST:
            return "torch"
        return f"torch=={self.torch}{'.*' if self.torch.count('.') == 1 else ''}"


def run(request: Request, matrix: Matrix) -> Record:
    """Install and test in a temporary environment; raises CiError if the installation fails."""
    check(request, matrix)
    start = time.monotonic()
    with tempfile.TemporaryDirectory() as name, steps() as begin:
        folder = Path(name)
        python = environment(request, folder, begin)
        begin("tests")
        answer = run_checks(python, folder)
        begin("python -m flash_attn")
        doctor = run_doctor(python, folder)
    return record(request, answer, doctor, time.monotonic() - start)


@contextmanager
def steps() -> Iterator[Callable[[str], None]]:
    """What is to be called with the name of each step of a trial, which it shows on a terminal."""
    form = "ci test: {desc} ({n_fmt} of {total_fmt})"
    with tqdm(total=STEPS, bar_format=form, leave=False, disable=None) as bar:

        def begin(step: str) -> None:
            bar.update()
            bar.set_description_str(step)

        yield begin


def download(folder: Path, indexes: tuple[str, ...]) -> Path:
    """The released wheel, as pip finds it; raises CiError."""
    finding = [f"--extra-index-url={index}" for index in indexes]
    binary = ("--no-deps", "--only-binary", PROJECT)
    _step(
        f"no released wheel of {PROJECT}",
        *(sys.executable, *PIP, "download", *binary, *finding, "--dest", str(folder), PROJECT),
    )
    return next(folder.glob("*.whl"))


def check(request: Request, matrix: Matrix) -> None:
    """Raise CiError for a wheel that cannot serve the pair, or not here; PyPI's wheel may serve any."""
    wheel, pair = request.wheel, request.pair
    everywhere = wheel.build in {build.cuda.digits for build in matrix.builds if build.pypi}
    if pair and not everywhere and wheel.build != pair.build.digits:
        raise CiError(
            f"{wheel.name}: the pair is served by build {pair.build.digits}, not {wheel.build or 'none'}"
        )
    if wheel.arch != platform.machine():
        raise CiError(f"{wheel.name}: cannot be tested on {platform.machine()}")


def environment(request: Request, folder: Path, begin: Callable[[str], None] = lambda step: None) -> str:
    """Make a fresh environment with torch, then the wheel; returns its interpreter.

    ``begin`` is told the name of each step.
    """
    venv = folder / "venv"
    python = str(venv / "bin" / "python")
    begin("a fresh environment")
    _step("no environment could be made", request.python, "-m", "venv", str(venv))
    indexes = [f"--extra-index-url={index}" for index in request.indexes]
    pip = (python, *PIP, "install", *indexes)
    begin(f"installing {request.requirement}")
    _step(f"{request.requirement} could not be installed", *pip, request.requirement, "numpy")
    before = _version_of_torch(python, folder)
    begin(f"installing {request.wheel.name}")
    _step(f"{request.wheel.name} could not be installed", *pip, str(request.wheel.path.resolve()))
    after = _version_of_torch(python, folder)
    if before != after:
        raise CiError(f"installing {request.wheel.name} replaced torch {before} by {after}")
    return python


def _version_of_torch(python: str, folder: Path) -> str:
    code = "import importlib.metadata as m; print(m.version('torch'))"
    return subprocess.run(
        [python, "-I", "-c", code], cwd=folder, capture_output=True, text=True, check=True
    ).stdout.strip()


def run_checks(python: str, folder: Path) -> dict[str, Any]:
    """The answer of ``checks.py``; a crash is one failed test."""
    done = subprocess.run(
        [python, "-I", str(CHECKS)], cwd=folder, capture_output=True, text=True, check=False
    )
    if done.returncode:
        return {"tests": [Outcome("import", False, _last_line(done.stderr)).__dict__]}
    answer: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return answer


def run_doctor(python: str, folder: Path) -> Outcome:
    """``python -m flash_attn`` as a test."""
    done = subprocess.run(
        [python, "-I", "-m", "flash_attn", "--json"], cwd=folder, capture_output=True, text=True, check=False
    )
    if done.returncode:
        return Outcome("python -m flash_attn", False, _last_line(done.stderr or done.stdout))
    attention = json.loads(done.stdout)["attention"]
    error, allowed = attention["flash_attn"]["error"], attention["allowed"]
    return Outcome(
        "python -m flash_attn", True, f"error {error:.1e} of {allowed:.1e} on {attention['device']}"
    )


def record(request: Request, answer: dict[str, Any], doctor: Outcome, seconds: float) -> Record:
    """What was tested and how it ended."""
    tests = (*(Outcome(**test) for test in answer["tests"]), doctor)
    torch, pair = answer.get("torch", request.torch), request.pair
    return Record(
        series=str(pair.torch) if pair else ".".join(torch.split(".")[:2]),
        cuda=str(pair.cuda) if pair else answer.get("torch_cuda") or "none",
        torch=torch,
        torch_cuda=answer.get("torch_cuda"),
        python=answer.get("python", "unknown"),
        platform=f"linux_{request.wheel.arch}",
        devices=tuple(answer.get("devices", ())),
        wheel=request.wheel.name,
        sha256=request.wheel.sha256,
        date=datetime.now(timezone.utc).isoformat(timespec="seconds"),
        seconds=round(seconds, 1),
        tests=tests,
    )


def _step(failure: str, *command: str) -> None:
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    except OSError as error:
        raise CiError(f"{failure}: {error}") from None
    if done.returncode:
        raise CiError(f"{failure}: {_last_line(done.stderr or done.stdout)}")


def _last_line(text: str) -> str:
    return ([line.strip() for line in text.splitlines() if line.strip()] or ["no output"])[-1]
