"""Random valid calls of every public function against the fp64 oracle.

    python -m tests.fuzz --seconds 60                     on CPU, or with --device cuda on a GPU
    python -m tests.fuzz --device sim                     CPU tensors down the CUDA path, to the stand-in
    python -m tests.fuzz --device sim --repro func:1234   one case again, as a failure names it

A result may be off by twice the error of the formula in the input's dtype, gradients by three times. All
else is exact: what lies around each tensor, inputs, appended keys, bits of a second call. Exit status 1 on a
failure.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import random
import sys
import time
import traceback
from collections.abc import Iterator

import torch
from standin import StandIn

from flash_attn._backends.cuda import gpu

from . import attention, caches, others
from .case import Case, Wrong

FAMILIES = {
    "func": (attention.func, 6), "varlen": (attention.varlen, 6), "used_keys": (attention.used_keys, 2),
    "entries": (attention.entries, 3), "paged": (caches.paged, 3), "kvcache": (caches.kvcache, 6),
    "rotary": (others.rotary, 2), "padding": (others.padding, 0.3), "loss": (others.loss, 0.5),
}  # fmt: skip
"""Functions and how often each is drawn."""

LOST = ("CUDA error", "illegal memory access", "misaligned address", "launch failure", "device-side assert")
"""Parts of messages after which a process cannot use its GPU any more."""


@contextlib.contextmanager
def path(device: str, seed: int) -> Iterator[None]:
    """Choose the library's stand-in and its GPU, where it is simulated."""
    if device != "sim":
        yield
        return
    rng = random.Random(seed)
    with gpu.stand_in(StandIn(hopper=rng.random() < 0.5)):
        yield


def run_case(family: str, seed: int, device: str, verbose: bool = False) -> str | None:
    """Run one case; return what is wrong."""
    case = Case(seed, "cuda" if device == "cuda" else "cpu", device != "cpu")
    try:
        with path(device, seed):
            FAMILIES[family][0](case)
            if device == "cuda":
                torch.cuda.synchronize()
        return None
    except Exception as error:
        if verbose:
            traceback.print_exc()
        text = str(error) if isinstance(error, Wrong) else f"{type(error).__name__}: {error}"
        return f"{text} | {case.notes}"


def fuzz(device: str, seconds: float, seed: int, families: list[str]) -> int:
    """Run cases until the time is over; print failures, and return their number."""
    rng, counts, failures, end = random.Random(seed), collections.Counter(), 0, time.monotonic() + seconds
    weights = [FAMILIES[name][1] for name in families]
    while time.monotonic() < end:
        family, case_seed = rng.choices(families, weights)[0], rng.randrange(2**40)
        found = run_case(family, case_seed, device)
        counts[family] += 1
        if found:
            failures += 1
            print(f"FAIL {family}:{case_seed} on {device}: {found}", flush=True)
        if found and device == "cuda" and any(text in found for text in LOST):
            print("the GPU cannot be used any more: no further cases")
            break
    told = ", ".join(f"{name} {n}" for name, n in counts.items())
    print(f"{device}, seed {seed}: {counts.total()} cases ({told}), {failures} failures")
    return failures


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m tests.fuzz", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seconds", type=float, default=60.0, help="how long to go on")
    parser.add_argument("--device", choices=("cpu", "sim", "cuda"), default="cpu")
    parser.add_argument("--seed", type=int, default=0, help="of the sequence of cases")
    parser.add_argument("--family", action="append", choices=FAMILIES, help="only these")
    parser.add_argument("--repro", action="append", default=[], metavar="FAMILY:SEED", help="one case again")
    chosen = parser.parse_args(arguments)
    failures = 0
    for name in chosen.repro:
        family, _, seed = name.partition(":")
        if family not in FAMILIES or not seed.isdecimal():
            parser.error(f"--repro must be FAMILY:SEED, FAMILY one of {', '.join(FAMILIES)}, got {name}")
        found = run_case(family, int(seed), chosen.device, verbose=True)
        failures += found is not None
        print(f"{name} on {chosen.device}: {found or 'passes'}")
    if not chosen.repro:
        failures = fuzz(chosen.device, chosen.seconds, chosen.seed, chosen.family or list(FAMILIES))
    return int(failures > 0)


if __name__ == "__main__":
    torch.set_num_threads(1)  # of small tensors, more threads wait for one another
    sys.exit(main())
