"""Admitting wheels to a site: only those that a passed test record proves for a pair of the matrix."""

import shutil
from pathlib import Path

from ci import CiError
from ci.index import RECORDS, WHEELS, Offer, offers
from ci.matrix import Matrix
from ci.proof import Record, read_records
from ci.wheel import Wheel, distinct, open_folder, open_wheel


def publish(
    matrix: Matrix, wheels: Path, records: Path, site: Path, accept_cpu_torch: bool = False
) -> list[Offer]:
    """Copy the proven wheels and their records into the site; raises CiError, then nothing is written."""
    admitted = offers(matrix, open_folder(wheels), read_records(records), accept_cpu_torch)
    if not admitted:
        raise CiError(f"no wheel in {wheels} is proven for a pair of the matrix by a record in {records}")
    proven = sorted({wheel for offer in admitted for wheel in offer.wheels}, key=lambda wheel: wheel.name)
    fresh = new_wheels(proven, published(site))
    for folder in (WHEELS, RECORDS):
        (site / folder).mkdir(parents=True, exist_ok=True)
    for wheel in fresh:
        shutil.copy2(wheel.path, site / WHEELS)
    for record in {record for offer in admitted for record in offer.records}:
        write_record(record, site / RECORDS)
    return admitted


def published(site: Path) -> list[Wheel]:
    """The wheels that the site holds already."""
    return [open_wheel(path) for path in sorted((site / WHEELS).glob("*.whl"))]


def new_wheels(wheels: list[Wheel], present: list[Wheel]) -> list[Wheel]:
    """The wheels that are not there yet; raises CiError for one that is there with another content."""
    hashes = {wheel.name: wheel.sha256 for wheel in present}
    for wheel in wheels:
        if hashes.get(wheel.name, wheel.sha256) != wheel.sha256:
            raise CiError(f"{wheel.name} is published already with another content")
    fresh = [wheel for wheel in wheels if wheel.name not in hashes]
    distinct([*present, *fresh])
    return fresh


def write_record(record: Record, folder: Path) -> Path:
    """Write a record under its own name; returns its path."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / record.file_name
    path.write_text(record.to_json())
    return path
