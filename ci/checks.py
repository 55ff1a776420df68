"""What ``python -m ci test`` runs in the fresh environment: the installed package against attention in fp64.

Prints one JSON object. Of the source tree only the tests' oracle is imported, which shares no code with it.
"""

import json
import platform
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch

sys.path.append(str(Path(__file__).resolve().parent.parent / "tests"))

from oracle import Options, attention  # type: ignore[import-not-found]

import flash_attn

Arguments = dict[str, Any]

CASES: dict[str, tuple[tuple[int, int, int, int, int], Arguments]] = {
    "full": ((2, 33, 65, 4, 4), {}),
    "causal": ((2, 40, 40, 4, 4), {"causal": True}),
    "fewer heads of k and v": ((1, 17, 64, 6, 2), {"causal": True}),
    "window": ((1, 70, 70, 2, 2), {"window_size": (9, 3)}),
    "softcap": ((1, 32, 48, 2, 2), {"softcap": 5.0}),
}
"""Batch, seqlen_q, seqlen_k, num_heads, num_heads_k; and arguments."""

HEAD_DIM = 128

ALLOWANCE = {"out": 2, "dq": 3, "dk": 3, "dv": 3}
"""Times the error of the plain formula in bf16 that ours may reach."""


def compare(device: str, sizes: tuple[int, int, int, int, int], arguments: Arguments) -> str:
    """Worst errors of the result and its gradients in bf16; AssertionError if too large."""
    batch, seqlen_q, seqlen_k, num_heads, num_heads_k = sizes
    generator = torch.Generator().manual_seed(0)
    shapes = [(seqlen_q, num_heads), (seqlen_k, num_heads_k), (seqlen_k, num_heads_k)]
    inputs = [
        torch.randn(batch, seqlen, heads, HEAD_DIM, generator=generator).to(device, torch.bfloat16)
        for seqlen, heads in shapes
    ]
    options = Options(**arguments)
    exact = _results(lambda *x: attention(*x, options)[0], inputs, torch.float64)
    plain = _results(lambda *x: attention(*x, options, torch.bfloat16)[0], inputs, torch.bfloat16)
    ours = _results(partial(flash_attn.flash_attn_func, **arguments), inputs, torch.bfloat16)
    figures = []
    for (name, factor), x, y, z in zip(ALLOWANCE.items(), ours, plain, exact, strict=False):
        error, allowed = (float((a.double() - z).abs().max()) for a in (x, y))
        allowed = factor * allowed + 1e-5
        assert error <= allowed, f"{name}: error {error:.2e} above {allowed:.2e}"
        figures.append(f"{name} {error:.1e} of {allowed:.1e}")
    return ", ".join(figures)


def _results(
    function: Callable[..., Any], inputs: list[torch.Tensor], dtype: torch.dtype
) -> list[torch.Tensor]:
    """The function's result and, where there are kernels for them, its gradients for a fixed upstream one."""
    leaves = [x.detach().to(dtype).requires_grad_(has_backward(x)) for x in inputs]
    out = function(*leaves)
    if not out.requires_grad:
        return [out]
    upstream = torch.linspace(-1, 1, out.numel(), device=out.device).view(out.shape).to(dtype)
    return [out.detach(), *torch.autograd.grad(out, leaves, upstream)]


def has_backward(x: torch.Tensor) -> bool:
    """Whether this build, which may be trimmed, has gradients where ``x`` is."""
    return x.device.type == "cpu" or "backward" in flash_attn.build_info()["directions"]


def library() -> str:
    """Load the kernels; returns how many there are."""
    info = flash_attn.build_info()
    assert info["library"] and info["kernels"], "the wheel holds no kernels"
    return f"{len(info['kernels'])} kernels for {', '.join(info['targets'])}"


def outside_the_sources() -> str:
    """That the installed package is tested, not the source tree's."""
    folder = Path(flash_attn.__file__).resolve().parent
    assert "site-packages" in folder.parts, f"flash_attn was imported from {folder}"
    return f"flash_attn {flash_attn.__version__}"


def attempt(name: str, test: Callable[[], str]) -> dict[str, Any]:
    """A test's name, whether it passed, and what it said."""
    try:
        return {"name": name, "passed": True, "detail": test()}
    except Exception as error:
        return {"name": name, "passed": False, "detail": f"{type(error).__name__}: {error}"}


def main() -> None:
    """Run everything; the result is in what is printed."""
    devices = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
    tests = [attempt("import", outside_the_sources), attempt("library", library)]
    for device in devices:
        for name, (sizes, arguments) in CASES.items():
            tests.append(attempt(f"{name} on {device}", partial(compare, device, sizes, arguments)))
    print(
        json.dumps(
            {
                "torch": torch.__version__,
                "torch_cuda": torch.version.cuda,
                "python": platform.python_version(),
                "devices": devices,
                "tests": tests,
            }
        )
    )


if __name__ == "__main__":
    main()
