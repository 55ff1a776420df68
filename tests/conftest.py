"""Fixtures of all tests: the device that a semantic test runs on, and what the library can run there."""

from __future__ import annotations

import io
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import ExitStack, redirect_stderr
from functools import cache
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    import torch


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Of a test's simulated runs, keep as many as give each value of each parameter.

    They take as long as those on CPU. Those that differ in every parameter come first.
    """
    simulated = [item for item in items if _parameters(item).get("device") == "simulated"]
    kept, seen = set(), defaultdict(set)
    for enough in (all, any):
        for item in simulated:
            values = {(name, repr(value)) for name, value in _parameters(item).items() if name != "device"}
            known = seen[item.nodeid.partition("[")[0]]
            new = [x not in known for x in values] or [item not in kept]
            if enough(new) and not item.get_closest_marker("not_simulated"):
                known |= values
                kept.add(item)
    dropped = set(simulated) - kept
    config.hook.pytest_deselected(items=list(dropped))
    items[:] = [item for item in items if item not in dropped]


def _parameters(item: pytest.Item) -> dict[str, Any]:
    return item.callspec.params if hasattr(item, "callspec") else {}


@cache
def kernels() -> tuple[str, ...]:
    """Return the keys of the kernels that this build holds."""
    import flash_attn

    return tuple(flash_attn.build_info()["kernels"])


@cache
def cuda_problem() -> str | None:
    """Return why CUDA tests cannot run here, None if they can."""
    import torch

    if not torch.cuda.is_available():
        return "no CUDA GPU"
    return None if kernels() else "no kernels are built"


@pytest.fixture(params=["cpu", "simulated", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request: pytest.FixtureRequest, install: Callable[..., None]) -> str:
    """The device of the test's tensors: cpu, and cuda where there is a GPU and a library with kernels.

    "simulated" is cpu again, but down the CUDA path, to a stand-in for a Hopper GPU's library.
    """
    if request.param == "cuda" and cuda_problem():
        pytest.skip(cuda_problem())
    if request.param == "simulated":
        from standin import StandIn

        install(StandIn(hopper=True))
        return "cpu"
    return request.param


@pytest.fixture
def default_device(device: str) -> Iterator[str]:
    """Make every tensor of a test on its device."""
    import torch

    with torch.device(device):
        yield device


def has_kernel(dtype: torch.dtype, head_dim: int, direction: str = "forward") -> bool:
    """Return whether this build, which may be trimmed, has kernels for a dtype, head dim and direction."""
    import torch

    from flash_attn._backends.cuda.library import kernel_head_dim
    from flash_attn._kernel_key import KernelKey

    name = {torch.float16: "fp16", torch.bfloat16: "bf16"}[dtype]
    wanted = (direction, name, kernel_head_dim(head_dim))
    keys = filter(None, map(KernelKey.parse, kernels()))
    return any((key.direction, key.dtype, key.head_dim) == wanted for key in keys)


def uses_kernels(device: str) -> bool:
    """Return whether tensors of a device go down the CUDA path, simulated ones included."""
    import torch

    from flash_attn import _device

    return _device.on_cuda(torch.empty(0, device=device))


def _require(direction: str, device: str, dtype: torch.dtype, *head_dims: int) -> None:
    if dtype.itemsize > 2 and uses_kernels(device):
        pytest.skip(f"{dtype} is for the CPU")
    if device == "cuda" and not has_kernel(dtype, max(head_dims), direction):
        pytest.skip(f"this build has no {direction} kernel for {dtype}, head dim {max(head_dims)}")


@pytest.fixture
def require_kernel() -> Callable[..., None]:
    """Skip the test where there is no forward kernel for a CUDA device, dtype and head dims."""
    return lambda *arguments: _require("forward", *arguments)


@pytest.fixture
def require_backward() -> Callable[..., None]:
    """Skip the test where there is no backward kernel, or no forward one, for device, dtype and head dims."""

    def require(*arguments: Any) -> None:
        for direction in ("forward", "backward"):
            _require(direction, *arguments)

    return require


@pytest.fixture
def require_split() -> Callable[..., None]:
    """Skip the test where there is no kernel over a KV cache for a CUDA device, dtype and head dims."""
    return lambda *arguments: _require("split", *arguments)


@pytest.fixture
def install() -> Iterator[Callable[..., None]]:
    """Send CPU tensors down the CUDA path, to the given library, with the arguments of `gpu.stand_in`."""
    from flash_attn._backends.cuda import gpu

    with ExitStack() as stack:
        yield lambda *library, **options: stack.enter_context(gpu.stand_in(*library, **options))


@pytest.fixture
def terminal() -> redirect_stderr[io.StringIO]:
    """A context in which stderr, where progress is shown, is a terminal; it gives what was written there."""

    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    return redirect_stderr(Terminal())


@pytest.fixture(autouse=True)
def seeded() -> None:
    """Give every test the same random numbers."""
    import torch

    torch.manual_seed(0)
