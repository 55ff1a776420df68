"""The matrix for persons and for workflows: a table, JSON, and the outputs of a GitHub job."""

import json
from typing import Any

from ci.matrix import Matrix


def table(matrix: Matrix) -> str:
    """The pairs as aligned text."""
    rows = [("torch", "CUDA", "build", "Python", "index")]
    for pair in matrix.pairs:
        pythons = f"{pair.pythons[0]}-{pair.pythons[-1]}"
        rows.append((str(pair.torch), str(pair.cuda), pair.build.digits, pythons, pair.folder))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["  ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)).rstrip() for row in rows]
    builds = [
        f"build {build.cuda.digits}: CUDA {build.cuda}, {' '.join(build.archs)}{', for PyPI' * build.pypi}"
        for build in matrix.builds
    ]
    return "\n".join([*lines, "", *builds, f"platforms: {', '.join(matrix.platforms)}"]) + "\n"


def builds(matrix: Matrix) -> list[dict[str, Any]]:
    """One entry per build and platform."""
    return [
        {
            "cuda": str(build.cuda),
            "tag": build.cuda.digits,
            "archs": list(build.archs),
            "pypi": build.pypi,
            "platform": name,
            "runner": platform.runner,
            "image": platform.image,
        }
        for build in matrix.builds
        for name, platform in matrix.platforms.items()
    ]


def pairs(matrix: Matrix) -> list[dict[str, Any]]:
    """One entry per pair and platform; ``python`` is the newest that this torch has."""
    return [
        {
            "torch": str(pair.torch),
            "cuda": str(pair.cuda),
            "variant": f"cu{pair.cuda.digits}",
            "tag": pair.build.digits,
            "python": str(pair.pythons[-1]),
            "platform": name,
            "runner": platform.runner,
        }
        for pair in matrix.pairs
        for name, platform in matrix.platforms.items()
    ]


def as_json(matrix: Matrix) -> str:
    """Builds and pairs as one JSON object."""
    return json.dumps({"builds": builds(matrix), "pairs": pairs(matrix)}, indent=1) + "\n"


def github(matrix: Matrix, shards: int) -> str:
    """Lines for GITHUB_OUTPUT: ``shards``, ``builds`` and ``pairs``, each a matrix for ``fromJSON``."""
    parts = [
        {**build, "shard": f"{i}/{shards}", "part": i}
        for build in builds(matrix)
        for i in range(1, shards + 1)
    ]
    outputs = {"shards": parts, "builds": builds(matrix), "pairs": pairs(matrix)}
    return "".join(f"{name}={json.dumps({'include': rows})}\n" for name, rows in outputs.items())
