"""One random case: what is drawn, the tensors with their surroundings, and the checks."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Sequence
from itertools import accumulate
from typing import Any

import torch
from layouts import LAYOUTS, PLAIN, WRITABLE, Placed, place
from oracle import Options, gradients, shift_by_rounding
from torch import Tensor

HALF = (torch.float16, torch.bfloat16)
EDGES = (
    1,
    2,
    3,
    7,
    8,
    15,
    16,
    17,
    31,
    33,
    63,
    64,
    65,
    79,
    81,
    96,
    97,
    127,
    128,
    129,
    191,
    193,
    255,
    257,
    300,
)
GROUPS = ((1, 1), (2, 1), (1, 2), (2, 2), (1, 4), (2, 3), (1, 7))
PATTERN = -7.0
"""What stands beside a cache: calls over one read negative views without their sign."""

HUGE = (2**31 - 2, 2**31 - 1, 2**31, 2**40)


class Wrong(AssertionError):
    """A result that is not what it must be."""


def need(true: object, text: str) -> None:
    if not true:
        raise Wrong(text)


def same_bits(x: Tensor, y: Tensor) -> bool:
    kind = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[x.element_size()]
    return x.dtype == y.dtype and torch.equal(x.contiguous().view(kind), y.contiguous().view(kind))


class Case:
    """Random choices from a seed, on a device; `kernels` says that the CUDA path serves it."""

    def __init__(self, seed: int, device: str, kernels: bool) -> None:
        self.seed, self.rng, self.device, self.kernels = seed, random.Random(seed), device, kernels
        self.generator = torch.Generator(device=device).manual_seed(seed)
        self.dtype = self.rng.choice(HALF if kernels else (*HALF, torch.float32, torch.float64))
        self.longest = 300 if device == "cuda" else 130
        self.scores = 2**22 if device == "cuda" else 2**16
        self.inputs: list[tuple[Tensor, Tensor]] = []
        self.outputs: list[Placed] = []
        self.notes: dict[str, Any] = {"dtype": str(self.dtype)[6:]}

    # choices
    def pick(self, *choices: Any) -> Any:
        return self.rng.choice(choices)

    def chance(self, p: float) -> bool:
        return self.rng.random() < p

    def note(self, **fields: Any) -> None:
        self.notes |= fields

    def length(self, most: int | None = None) -> int:
        most = self.longest if most is None else most
        if self.chance(0.05):
            return 0
        return self.rng.randint(0, most) if self.chance(0.4) else min(self.pick(*EDGES), most)

    def head_dims(self) -> tuple[int, int]:
        head_dim = self.rng.randint(1, 256) if self.chance(0.6) else 8 * self.rng.randint(1, 32)
        head_dim_v = head_dim if self.chance(0.7) else self.rng.randint(1, 256)
        self.note(head_dims=(head_dim, head_dim_v))
        return head_dim, head_dim_v

    def heads(self) -> tuple[int, int]:
        heads_k, group = self.pick(*GROUPS)
        self.note(heads=(heads_k * group, heads_k))
        return heads_k * group, heads_k

    def lengths(self, batch: int, heads: int) -> tuple[list[int], list[int]]:
        """Draw lengths of q and k, some empty, of not too many scores together."""
        most = math.isqrt(self.scores // max(batch * heads, 1)) * 2
        found = [[min(self.length(), most) for _ in range(batch)] for _ in "qk"]
        if self.chance(0.3):
            found[1] = list(found[0])
        self.note(lengths=found)
        return found[0], found[1]

    def options(self, heads: int, batch: int, longest: tuple[int, int], plain: bool = False) -> Options:
        """Draw how scores are formed, without dropout where `plain`."""
        window = -1, -1
        if self.chance(0.5):
            near = (-1, 0, 1, 5, 30, 100, longest[1] - 1, longest[1], longest[0], longest[0] + 1, *HUGE, -4)
            window = self.pick(*near), self.pick(*near)
        dropout_p = 0.0 if plain or self.chance(0.8) else self.pick(0.1, 0.5)
        slopes = None
        if self.chance(0.25):
            shape = self.pick((heads,), (batch, heads))
            slopes = torch.rand(shape, generator=self.generator, device=self.device)
            slopes = slopes.repeat_interleave(2, -1)[..., ::2] if self.chance(0.3) else slopes
        sinks = None
        if not dropout_p and self.chance(0.2):
            sinks = torch.randn(heads, generator=self.generator, device=self.device) * 3
        found = Options(
            causal=self.chance(0.4), window_size=window, softmax_scale=self.pick(None, None, 0.3, -0.2, 0.0),
            softcap=0.0 if dropout_p else self.pick(0.0, 0.0, 0.0, 2.0, 30.0), alibi_slopes=slopes,
            dropout_p=dropout_p, sinks=sinks,
        )  # fmt: skip
        given = {name: x for name, x in found.arguments().items() if not isinstance(x, Tensor)}
        self.note(**given, slopes=None if slopes is None else tuple(slopes.shape), sinks=sinks is not None)
        return found

    # tensors
    def placed(self, shape: Sequence[int], layout: str, fill: float | None = None) -> Placed:
        self.notes.setdefault("layouts", []).append(layout)
        return place(shape, layout, self.dtype, self.generator, self.device, fill)

    def tensor(self, *shape: int, layouts: Sequence[str] = tuple(LAYOUTS)) -> Tensor:
        """Return random values in a random layout; they and what surrounds them must stay as they are."""
        found = self.placed(shape, self.pick(*layouts, "contiguous", "contiguous"))
        self.inputs.append((found.buffer, found.buffer.clone()))
        return found.view

    def output(self, *shape: int) -> Tensor:
        """Return NaN to be overwritten, among a pattern that must stay."""
        found = self.placed(shape, self.pick(*WRITABLE))
        found.buffer.copy_(torch.where(found.touched, math.nan, PATTERN))
        self.outputs.append(found)
        return found.view

    def cache(self, *shape: int) -> Placed:
        """Return a cache, which kernels read where it lies."""
        return self.placed(shape, self.pick(*PLAIN))

    def index(self, values: Sequence[int] | Sequence[Sequence[int]]) -> Tensor:
        x = torch.tensor(values, dtype=torch.int32, device=self.device)
        return x.repeat_interleave(2, -1)[..., ::2] if self.chance(0.2) else x

    def bounds(self, lengths: list[int]) -> Tensor:
        return self.index([0, *accumulate(lengths)])

    # checks
    def poison(self) -> None:
        """Leave NaN in memory that the next allocations may get."""
        for size in (2**10, 2**14, 2**18):
            torch.full((size,), math.nan, device=self.device)

    def run(self, call: Callable[[], Any]) -> Any:
        """Call; now and then call again, for the same bits."""
        self.poison()
        found = call()
        if self.chance(0.2):
            first = [x.clone() for x in found if isinstance(x, Tensor)]
            again = [x for x in call() if isinstance(x, Tensor)]
            pairs = zip(first, again, strict=True)
            need(all(same_bits(x.detach(), y.detach()) for x, y in pairs), "a second call gave other bits")
        return found

    def check_memory(self) -> None:
        for buffer, before in self.inputs:
            need(same_bits(buffer, before), "an input, or memory beside it, was written to")
        for x in self.outputs:
            need((x.buffer[~x.touched] == PATTERN).all(), "memory beside an output was written to")

    def close(
        self, name: str, actual: Tensor, truth: Tensor, rough: Tensor, factor: float, also: float = 0.0
    ) -> None:
        """Check against `factor` times the largest of the errors of `rough`, of rounding, and `also`."""
        need(actual.shape == truth.shape, f"{name} has shape {tuple(actual.shape)}, not {tuple(truth.shape)}")
        if not actual.numel():
            return
        actual, rough, largest = actual.double(), rough.double(), truth.abs().max().item()
        need(actual.isfinite().all(), f"{name} is not finite")
        rounding = torch.finfo(self.dtype).eps / 2 * largest
        base = max((rough - truth).abs().max().item(), rounding, also)
        error = (actual - truth).abs().max().item()
        # In fp32 sums are no more exact than the result, and P comes from an LSE that is rounded as well.
        allowed = factor * base * (8 if self.dtype == torch.float32 else 1) + 1e-5
        need(error <= allowed, f"{name} is off by {error:.3g}, allowed are {allowed:.3g}")

    def check_lse(self, actual: Tensor, truth: Tensor) -> None:
        need(actual.shape == truth.shape, f"lse has shape {tuple(actual.shape)}, not {tuple(truth.shape)}")
        need(torch.equal(actual.isinf(), truth.isinf()), "lse is infinite in other rows")
        error = ((actual.double() - truth).abs() / truth.abs().clamp(min=1.0)).nan_to_num(0.0, 0.0)
        need(not error.numel() or error.max().item() <= 1e-3, "lse is off")

    def check_forward(self, reference: Callable[..., tuple[Tensor, Tensor]], leaves: Sequence[Tensor],
                      out: Tensor, lse: Tensor | None) -> None:  # fmt: skip
        """Compare with `reference(*leaves, dtype)` = (out, lse)."""
        truth, truth_lse = (x.detach() for x in reference(*leaves, torch.float64))
        self.close("out", out.detach(), truth, reference(*leaves, self.dtype)[0].detach(), 2.0)
        if lse is not None:
            self.check_lse(lse.detach(), truth_lse)

    def check_gradients(
        self, reference: Callable[..., tuple[Tensor, Tensor]], leaves: Sequence[Tensor], dout: Tensor,
        found: Sequence[Tensor | None],
    ) -> None:  # fmt: skip
        """Compare gradients, those that are not None."""
        plain = tuple(x.detach() for x in leaves)
        exact, rough = (
            gradients(lambda *x, d=d: reference(*x, d)[0], plain, dout, d)
            for d in (torch.float64, self.dtype)
        )
        shifts = shift_by_rounding(reference, plain, dout)
        rows = zip(found, exact, rough, shifts, leaves, strict=True)
        # dP - D cancels where a row sees one key: what is left are the errors of sums in fp32, over rows too.
        eps = torch.finfo(torch.promote_types(self.dtype, torch.float32)).eps
        summed = eps * math.sqrt(dout.numel())
        for i, (gradient, truth, yardstick, shift, leaf) in enumerate(rows):
            if gradient is not None:
                need(gradient.dtype == leaf.dtype, f"gradient {i} has dtype {gradient.dtype}")
                off = max(shift.abs().max().item() if shift.numel() else 0.0, summed)
                self.close(f"gradient {i}", gradient, truth, yardstick, 3.0, off)
