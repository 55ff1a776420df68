"""The package index as static files: PEP 503 pages, PEP 691 JSON, PEP 658 metadata, and a page for persons.

Folders of a site: ``wheels/`` and ``records/`` are what ``publish`` admitted; all else follows from them.

- ``flash-attn/``: the wheel that serves every driver, the same as on PyPI
- ``cu130/flash-attn/``: what is proven for some torch of that CUDA
- ``cu130/torch2.13/flash-attn/``: what is proven for that pair
"""

import json
from collections.abc import Iterable
from dataclasses import dataclass
from html import escape
from pathlib import Path
from string import Template

from ci import CiError
from ci.matrix import Matrix, Pair
from ci.proof import Record, proofs, read_records
from ci.wheel import Wheel, open_folder, serves
from codegen import PROJECT

WHEELS, RECORDS = "wheels", "records"
PAGE = Path(__file__).with_name("page.html")


@dataclass(frozen=True)
class Offer:
    """A pair with the wheels that are proven for it, one per architecture, and the records that say so."""

    pair: Pair
    wheels: tuple[Wheel, ...]
    records: tuple[Record, ...]


def offers(
    matrix: Matrix, wheels: Iterable[Wheel], records: Iterable[Record], accept_cpu_torch: bool = False
) -> list[Offer]:
    """The pairs that at least one wheel is proven for."""
    wheels, records = list(wheels), list(records)
    found = []
    for pair in matrix.pairs:
        proven = {
            wheel: proofs(records, pair, wheel, accept_cpu_torch)
            for wheel in wheels
            if serves(wheel, pair.build)
        }
        offered = tuple(wheel for wheel, reasons in proven.items() if reasons)
        if offered:
            found.append(Offer(pair, offered, tuple(r for reasons in proven.values() for r in reasons)))
    return found


def write(site: Path, matrix: Matrix, accept_cpu_torch: bool = False) -> list[Offer]:
    """Write the index of a site's wheels and records; removes pages of what is no longer offered."""
    if not site.is_dir():
        raise CiError(f"{site}: no such folder")
    offered = offers(matrix, open_folder(site / WHEELS), read_records(site / RECORDS), accept_cpu_torch)
    if not offered:
        raise CiError(f"{site}: no wheel is proven for a pair of the matrix by a record")
    files = pages(matrix, offered)
    for stale in [*site.glob("cu*/**/index.*"), *site.glob(f"{PROJECT}/index.*")]:
        if str(stale.relative_to(site)) not in files:
            stale.unlink()
    for name, content in files.items():
        (site / name).parent.mkdir(parents=True, exist_ok=True)
        (site / name).write_bytes(content)
    return offered


def pages(matrix: Matrix, offered: list[Offer]) -> dict[str, bytes]:
    """Path and content of every file of the index."""
    everywhere = next(build.cuda for build in matrix.builds if build.pypi)
    proven = _unique(wheel for offer in offered for wheel in offer.wheels)
    folders: dict[str, list[Wheel]] = {"": [wheel for wheel in proven if serves(wheel, everywhere)]}
    for offer in offered:
        per_cuda = folders.setdefault(f"cu{offer.pair.cuda.digits}/", [])
        per_cuda[:] = _unique([*per_cuda, *offer.wheels])
        folders[f"{offer.pair.folder}/"] = list(offer.wheels)
    files = {f"{WHEELS}/{wheel.name}.metadata": wheel.metadata for wheel in proven}
    for folder, wheels in folders.items():
        up = "../" * (folder.count("/") + 1)
        if folder:
            files[f"{folder}index.html"] = _html("Simple index", [f'<a href="{PROJECT}/">{PROJECT}</a>'])
        files[f"{folder}{PROJECT}/index.html"] = project_html(wheels, up)
        files[f"{folder}{PROJECT}/index.json"] = project_json(wheels, up)
    files["index.html"] = chooser(matrix, offered)
    return files


def project_html(wheels: Iterable[Wheel], up: str) -> bytes:
    """The PEP 503 page of the project; ``up`` leads to the site's root."""
    return _html(
        f"Links for {PROJECT}",
        [
            f'<a href="{up}{WHEELS}/{wheel.name}#sha256={wheel.sha256}"'
            f' data-requires-python="{escape(wheel.requires_python)}"'
            f' data-core-metadata="sha256={wheel.metadata_sha256}"'
            f' data-dist-info-metadata="sha256={wheel.metadata_sha256}">{wheel.name}</a>'
            for wheel in wheels
        ],
    )


def project_json(wheels: Iterable[Wheel], up: str) -> bytes:
    """The PEP 691 answer for the project, with the sizes of PEP 700."""
    wheels = list(wheels)
    answer = {
        "meta": {"api-version": "1.1"},
        "name": PROJECT,
        "versions": sorted({wheel.version for wheel in wheels}),
        "files": [
            {
                "filename": wheel.name,
                "url": f"{up}{WHEELS}/{wheel.name}",
                "hashes": {"sha256": wheel.sha256},
                "requires-python": wheel.requires_python,
                "size": wheel.size,
                "core-metadata": {"sha256": wheel.metadata_sha256},
                "dist-info-metadata": {"sha256": wheel.metadata_sha256},
            }
            for wheel in wheels
        ],
    }
    return (json.dumps(answer, indent=1) + "\n").encode()


def chooser(matrix: Matrix, offered: list[Offer]) -> bytes:
    """The page where a person picks torch, CUDA and Python and reads the command that installs the wheel."""
    choices = [
        {
            "torch": str(offer.pair.torch),
            "cuda": str(offer.pair.cuda),
            "pythons": [str(python) for python in offer.pair.pythons],
            "folder": offer.pair.folder,
            "version": offer.wheels[0].version,
            "archs": sorted(wheel.arch for wheel in offer.wheels),
        }
        for offer in reversed(offered)
    ]
    data = json.dumps(choices).replace("</", "<\\/")
    return Template(PAGE.read_text()).substitute(choices=data, project=PROJECT).encode()


def _html(title: str, links: Iterable[str]) -> bytes:
    body = "".join(f"{link}<br>\n" for link in links)
    return (
        f'<!DOCTYPE html>\n<html lang="en">\n<head><meta charset="utf-8">'
        f'<meta name="pypi:repository-version" content="1.1"><title>{title}</title></head>\n'
        f"<body>\n{body}</body>\n</html>\n"
    ).encode()


def _unique(wheels: Iterable[Wheel]) -> list[Wheel]:
    return sorted(set(wheels), key=lambda wheel: wheel.name)
