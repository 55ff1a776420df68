"""``python -m ci test``: a wheel in a fresh environment beside a given torch, and the record of it."""

import json
import platform
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from ci import CiError
from ci.matrix import Pair
from ci.proof import Outcome, Record
from ci.wheel import Wheel

CHECKS = Path(__file__).with_name("checks.py")


@dataclass(frozen=True)
class Request:
    """A wheel, the torch to put beside it (a version such as 2.13.0), and the pair.

    ``python`` is the interpreter of the new environment; ``indexes`` are further indexes for pip.
    """

    wheel: Wheel
    torch: str
    pair: Pair
    python: str = sys.executable
    indexes: tuple[str, ...] = ()


def run(request: Request) -> Record:
    """Install and test in a temporary environment; raises CiError if the installation fails."""
    check(request)
    start = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        python = environment(request, Path(folder))
        answer = run_checks(python, Path(folder))
        doctor = run_doctor(python, Path(folder))
    return record(request, answer, doctor, time.monotonic() - start)


def check(request: Request) -> None:
    """Raise CiError for a wheel that cannot serve the pair, or not here."""
    wheel, pair = request.wheel, request.pair
    if wheel.build != pair.build.digits:
        raise CiError(
            f"{wheel.name}: the pair is served by build {pair.build.digits}, not {wheel.build or 'none'}"
        )
    if wheel.arch != platform.machine():
        raise CiError(f"{wheel.name}: cannot be tested on {platform.machine()}")


def environment(request: Request, folder: Path) -> str:
    """Make a fresh environment with torch, then the wheel; returns its interpreter."""
    venv = folder / "venv"
    python = str(venv / "bin" / "python")
    _step("no environment could be made", request.python, "-m", "venv", str(venv))
    indexes = [f"--extra-index-url={index}" for index in request.indexes]
    pip = (python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", *indexes)
    torch = f"torch=={request.torch}"
    _step(f"{torch} could not be installed", *pip, torch, "numpy")
    before = _version_of_torch(python, folder)
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
    return Record(
        series=str(request.pair.torch),
        cuda=str(request.pair.cuda),
        torch=answer.get("torch", request.torch),
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
