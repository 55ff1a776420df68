"""Test records: what was tested with what, and which pair of the matrix that proves."""

import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ci import CiError
from ci.matrix import Pair
from ci.wheel import Wheel


@dataclass(frozen=True)
class Outcome:
    """How one test ended: its name, whether it passed, and the figures or the error."""

    name: str
    passed: bool
    detail: str = ""


@dataclass(frozen=True)
class Record:
    """A wheel tested beside a torch for a pair.

    ``torch`` is torch's full version ("2.13.0+cpu"), ``torch_cuda`` the CUDA it was built with, None for a
    build for CPUs; ``date`` is UTC in ISO 8601; ``devices`` are those that attention ran on.
    """

    series: str
    cuda: str
    torch: str
    torch_cuda: str | None
    python: str
    platform: str
    devices: tuple[str, ...]
    wheel: str
    sha256: str
    date: str
    seconds: float
    tests: tuple[Outcome, ...]

    @property
    def passed(self) -> bool:
        """Whether there are tests and all of them passed."""
        return bool(self.tests) and all(test.passed for test in self.tests)

    @property
    def file_name(self) -> str:
        """A name that differs for records that say different things."""
        python = "".join(self.python.split(".")[:2])
        torch = self.torch.replace("+", "-")
        return (
            f"torch{torch}-cu{self.cuda.replace('.', '')}-py{python}-{self.platform}-{self.sha256[:12]}.json"
        )

    def to_json(self) -> str:
        return json.dumps(asdict(self), indent=1) + "\n"


def from_json(text: str) -> Record:
    """A record as ``to_json`` wrote it; raises CiError."""
    try:
        fields: dict[str, Any] = json.loads(text)
        tests = tuple(Outcome(**test) for test in fields.pop("tests"))
        return Record(**{**fields, "devices": tuple(fields["devices"])}, tests=tests)
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise CiError(f"not a test record: {error!r}") from None


def read_records(folder: Path) -> list[Record]:
    """The records in a folder, by file name; raises CiError."""
    if not folder.is_dir():
        raise CiError(f"{folder}: no such folder")
    records = []
    for path in sorted(folder.glob("*.json")):
        try:
            records.append(from_json(path.read_text()))
        except CiError as error:
            raise CiError(f"{path.name}: {error}") from None
    return records


def proofs(
    records: Iterable[Record], pair: Pair, wheel: Wheel, accept_cpu_torch: bool = False
) -> list[Record]:
    """The records that prove that this very wheel works for the pair.

    A build of torch for CPUs tells of the pair's torch series but not of its CUDA: it counts only with
    ``accept_cpu_torch``.
    """
    cudas = {str(pair.cuda), None} if accept_cpu_torch else {str(pair.cuda)}
    return [
        record
        for record in records
        if record.passed
        and record.sha256 == wheel.sha256
        and (record.series, record.cuda) == (str(pair.torch), str(pair.cuda))
        and record.torch_cuda in cudas
    ]
