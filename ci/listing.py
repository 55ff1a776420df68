"""The matrix for persons and for workflows: a table, JSON, and the outputs of a GitHub job."""

import json
from typing import Any

from ci.matrix import Matrix


def table(matrix: Matrix) -> str:
    """The pairs as a table, then the builds."""
    from tabulate import tabulate  # a workflow lists the matrix before it installs any package

    columns = ("torch", "CUDA", "build", "Python", "index")
    rows = [
        (p.torch, p.cuda, p.build.digits, f"{p.pythons[0]}-{p.pythons[-1]}", p.folder) for p in matrix.pairs
    ]
    listed = tabulate(rows, columns, tablefmt="plain", disable_numparse=True)
    builds = [
        f"build {build.cuda.digits}: CUDA {build.cuda}, {' '.join(build.archs)}{', for PyPI' * build.pypi}"
        for build in matrix.builds
    ]
    return "\n".join([listed, "", *builds, f"platforms: {', '.join(matrix.platforms)}"]) + "\n"


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
