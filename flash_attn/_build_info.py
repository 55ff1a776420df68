"""What this installation is: versions, and the kernels that it holds."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from flash_attn._backends.cuda.library import Library, library_path, load
from flash_attn._version import PROJECT_VERSION, __version__


def _manifest() -> dict[str, Any]:
    """Return what the build wrote down about itself, empty for a source tree that was never built."""
    try:
        return json.loads(Path(__file__).with_name("_build.json").read_text())
    except FileNotFoundError:
        return {}


def describe(manifest: dict[str, Any], library: Library | None) -> dict[str, Any]:
    """Return what an installation with this manifest and library is, as `build_info` does."""
    targets = library.targets if library else ()
    return {
        "version": __version__,
        "project_version": PROJECT_VERSION,
        "commit": manifest.get("commit"),
        "library": str(library.path) if library else None,
        "kernels": list(library.kernels) if library else [],
        "targets": list(targets),
        "families": sorted({target.partition(":")[0] for target in targets}),
        "toolchain": manifest.get("nvcc"),
        **{name: manifest.get(name, []) for name in ("archs", "head_dims", "dtypes", "directions")},
    }


def build_info() -> dict[str, Any]:
    """Return what this installation is and holds; loads the kernel library if there is one.

    Keys: `version` (of the API), `project_version`, `commit`, `library` (path, None where no kernels were
    built), `kernels` (keys such as "forward_sm80_bf16_d128_causal"), `targets` ("sm80:90"), `families`
    ("sm80"), `toolchain` (nvcc's version, None without kernels), `archs`, `head_dims`, `dtypes`, `directions`
    (what was selected).

    Raises:
        RuntimeError: the library is there but cannot be used.
    """
    return describe(_manifest(), load() if library_path().exists() else None)
