"""What `python -m flash_attn` finds out: the machine, the kernels of this build, one checked attention.

Everything here returns plain dictionaries; `__main__` prints them.
"""

from __future__ import annotations

import codecs
import contextlib
import io
import math
import platform
import shutil
import subprocess
import time
from collections.abc import Callable, Iterable
from itertools import product
from statistics import median
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import flash_attn
from flash_attn import _abi
from flash_attn._backends.cuda.library import build_command, load
from flash_attn._kernel_key import KernelKey
from flash_attn._version import PROJECT_VERSION

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
MASK_WINDOWS = {"full": (-1, -1), "causal": (-1, 0), "windowed": (64, 64)}
BATCHES = 9
MODEL_DIM = 2048
CPU_PROBLEM = ("fp32", 64)
CPU_HEADS = 8
CPU_SEQLEN = 1024
GPU_SEQLEN = 4096


def _nvidia_smi() -> list[dict[str, str]]:
    """One entry per GPU of the machine, whatever torch sees; empty without GPU or driver."""
    command = shutil.which("nvidia-smi")
    if command is None:
        return []
    fields = ("name", "compute_cap", "driver_version")
    query = [command, f"--query-gpu={','.join(fields)}", "--format=csv,noheader"]
    try:
        output = subprocess.run(query, capture_output=True, text=True, timeout=20, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return []
    rows = [[cell.strip() for cell in line.split(",")] for line in output.splitlines()]
    return [dict(zip(fields, row, strict=True)) for row in rows if len(row) == len(fields)]


def driver_version() -> str | None:
    """Version of the NVIDIA driver, None where there is none."""
    gpus = _nvidia_smi()
    return gpus[0]["driver_version"] if gpus else None


def _torch_gpus() -> list[dict[str, str]]:
    """The GPUs that torch can use, in its own numbering."""
    found = []
    for index in range(torch.cuda.device_count()):
        major, minor = torch.cuda.get_device_capability(index)
        found.append({"name": torch.cuda.get_device_name(index), "compute_cap": f"{major}.{minor}"})
    return found


def machine() -> dict[str, Any]:
    """GPUs, driver, torch, CUDA of torch, Python."""
    present = _nvidia_smi()
    usable = _torch_gpus() if torch.cuda.is_available() else []
    return {
        "gpus": usable or [{"name": gpu["name"], "compute_cap": gpu["compute_cap"]} for gpu in present],
        "gpus_usable": len(usable),
        "driver": present[0]["driver_version"] if present else None,
        "torch": torch.__version__,
        "torch_cuda": torch.version.cuda,
        "python": platform.python_version(),
        "platform": platform.platform(),
    }


def kernels_by_family(keys: Iterable[str], targets: Iterable[str]) -> list[dict[str, Any]]:
    """Kernel keys such as forward_sm80_bf16_d128_causal as one entry per direction and family.

    Each entry lists what occurs on each axis and counts the kernels; a count below the product of the axes
    means that some combinations are missing. `targets` are "FAMILY:CC" or "FAMILY:CC+ptx".
    """
    groups: dict[tuple[str, str], list[KernelKey]] = {}
    for key in filter(None, map(KernelKey.parse, keys)):
        groups.setdefault((key.direction, key.family), []).append(key)
    compiled = [target.split(":") for target in targets]
    return [
        {
            "direction": direction,
            "family": family,
            "dtypes": _distinct(key.dtype for key in group),
            "head_dims": sorted({key.head_dim for key in group}),
            "masks": _distinct(key.mask for key in group),
            "targets": [f"sm_{capability}" for name, capability in compiled if name == family],
            "count": len(group),
        }
        for (direction, family), group in groups.items()
    ]


def _distinct(values: Iterable[str]) -> list[str]:
    """The values without repetition, in order of first appearance."""
    return list(dict.fromkeys(values))


def build() -> tuple[dict[str, Any], list[str]]:
    """`flash_attn.build_info()`, and why the library cannot be used where that is so."""
    try:
        return flash_attn.build_info(), []
    except (RuntimeError, ValueError) as error:
        versions = {"version": flash_attn.__version__, "project_version": PROJECT_VERSION, "commit": None}
        return {**versions, "library": None, "kernels": [], "targets": []}, [str(error)]


def kernels_that_run(device: int) -> list[str]:
    """Keys of the forward kernels that calls on this CUDA device run, over dtypes, head dims and masks."""
    library = load()
    keys = []
    for dtype, head_dim, mask in product(_abi.Dtype, _abi.HEAD_DIMS, MASK_WINDOWS):
        window_left, window_right = MASK_WINDOWS[mask]
        params = _abi.ForwardParams(
            head_dim=head_dim,
            head_dim_v=head_dim,
            window_left=window_left,
            window_right=window_right,
            dtype=dtype,
            device=device,
            family=library.family,
        )
        if key := library.forward_kernel(bytes(params)):
            keys.append(key.decode())
    return keys


def gpu_notes(found: dict[str, Any], built: dict[str, Any], running: list[str]) -> list[str]:
    """Sentences on what happens on the GPU, with the command that builds what is missing."""
    if not found["gpus_usable"]:
        return ["torch finds no GPU: attention runs on the CPU"]
    if not built["library"]:
        return [f"no kernels are built, so the GPU is idle; build them: {build_command()}"]
    if not running:
        return [f"none of them runs on this GPU; build those that do: {build_command()}"]
    families = [f"{group['family']} ({group['count']})" for group in kernels_by_family(running, ())]
    return [f"run on this GPU: {', '.join(families)}"]


def gpu_problem(running: Iterable[str]) -> tuple[str, int] | None:
    """Dtype and head dim for a causal run on the GPU, bf16 and 128 if possible; None without a kernel."""
    keys = filter(None, map(KernelKey.parse, running))
    choices = [(key.dtype, key.head_dim) for key in keys if key.mask == "causal"]
    return min(choices, key=lambda choice: (choice[0] != "bf16", abs(choice[1] - 128)), default=None)


def examine(device: str = "auto", seqlen: int | None = None) -> dict[str, Any]:
    """Everything: `machine`, `build`, `families` (kernels by family), `notes` (sentences), `attention`.

    `device` is "auto" (the GPU if a kernel runs on it), "cpu" or "cuda". `attention` is None if it failed.
    """
    found = machine()
    built, errors = build()
    running = kernels_that_run(0) if found["gpus_usable"] and built["library"] else []
    notes = errors or gpu_notes(found, built, running)
    problem = gpu_problem(running) if device != "cpu" else None
    result = None
    try:
        if problem:
            num_heads = MODEL_DIM // problem[1]
            result = attend(torch.device("cuda", 0), *problem, num_heads, seqlen or GPU_SEQLEN)
        elif device != "cuda":
            result = attend(torch.device("cpu"), *CPU_PROBLEM, CPU_HEADS, seqlen or CPU_SEQLEN)
        else:
            notes.append("attention was asked for on the GPU, where it cannot run")
    except RuntimeError as error:
        notes.append(f"attention failed: {error}")
    families = kernels_by_family(built["kernels"], built["targets"])
    return {"machine": found, "build": built, "families": families, "notes": notes, "attention": result}


def text(length: int) -> str:
    """At least `length` bytes of English that every Python carries: its language reference, else its Zen."""
    try:
        from pydoc_data.topics import topics

        prose = "\n".join(topics[name] for name in sorted(topics))
    except ImportError:
        with contextlib.redirect_stdout(io.StringIO()):
            import this
        prose = codecs.decode(this.s, "rot13")
    return prose * math.ceil(length / len(prose))


def text_to_qkv(prose: str, seqlen: int, num_heads: int, head_dim: int) -> tuple[Tensor, Tensor, Tensor]:
    """fp32 q, k, v of shape (1, seqlen, num_heads, head_dim) from the text's first `seqlen` bytes.

    A transformer's first layer with fixed random weights: an embedding of each byte plus the sinusoidal
    position encoding of "Attention Is All You Need" (section 3.5), normalised, then one projection each.
    """
    generator = torch.Generator().manual_seed(0)
    width = num_heads * head_dim
    tokens = torch.tensor(list(prose.encode()[:seqlen]))
    embedding = torch.randn(256, width, generator=generator)[tokens]
    frequencies = 10000.0 ** (-torch.arange(0, width, 2) / width)
    angles = torch.arange(seqlen)[:, None] * frequencies
    hidden = F.layer_norm(embedding + torch.cat([angles.sin(), angles.cos()], dim=-1), (width,))
    q, k, v = (
        (hidden @ torch.randn(width, width, generator=generator) / math.sqrt(width)).view(
            1, seqlen, num_heads, head_dim
        )
        for _ in range(3)
    )
    return q, k, v


def dense_attention(q: Tensor, k: Tensor, v: Tensor, dtype: torch.dtype) -> Tensor:
    """Causal attention by the formula, computed in `dtype`, head by head. Shapes as in `text_to_qkv`."""
    hidden = torch.ones(q.shape[1], k.shape[1], dtype=torch.bool, device=q.device).triu(1)
    heads = []
    for head in range(q.shape[2]):
        qh, kh, vh = (x[0, :, head].to(dtype) for x in (q, k, v))
        scores = (qh @ kh.T / math.sqrt(q.shape[-1])).masked_fill_(hidden, float("-inf"))
        heads.append(scores.softmax(-1) @ vh)
    return torch.stack(heads, dim=1)[None]


def median_milliseconds(runs: dict[str, Callable[[], object]], device: torch.device) -> dict[str, float]:
    """Median time of one call of each, over `BATCHES` batches after one that warms up.

    They take turns, a batch each, so that clocks and temperature are the same for all.
    """
    on_gpu = device.type == "cuda"
    wait: Callable[[], None] = torch.cuda.synchronize if on_gpu else lambda: None
    calls = 10 if on_gpu else 1
    times: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(BATCHES + 1):
        for name, run in runs.items():
            wait()
            start = time.perf_counter()
            for _ in range(calls):
                run()
            wait()
            times[name].append((time.perf_counter() - start) / calls * 1e3)
    return {name: median(samples[1:]) for name, samples in times.items()}


def attend(
    device: torch.device, dtype_name: str, head_dim: int, num_heads: int, seqlen: int
) -> dict[str, Any]:
    """Causal attention on a text by flash_attn and by torch's SDPA: error against fp64, and time, of each.

    `allowed` is twice the worst error of the plain formula computed in the same dtype, plus 1e-5.
    """
    dtype = DTYPES[dtype_name]
    prose = text(seqlen)
    q, k, v = (x.to(device, dtype) for x in text_to_qkv(prose, seqlen, num_heads, head_dim))
    qt, kt, vt = (x.transpose(1, 2) for x in (q, k, v))
    reference = dense_attention(q, k, v, torch.float64)

    def worst_error(out: Tensor) -> float:
        return (out.double() - reference).abs().max().item()

    def ours() -> Any:
        return flash_attn.flash_attn_func(q, k, v, causal=True)

    def sdpa() -> Tensor:
        return F.scaled_dot_product_attention(qt, kt, vt, is_causal=True).transpose(1, 2)

    allowed = 2 * worst_error(dense_attention(q, k, v, dtype)) + 1e-5
    errors = {"flash_attn": worst_error(ours()), "torch_sdpa": worst_error(sdpa())}
    times = median_milliseconds({"flash_attn": ours, "torch_sdpa": sdpa}, device)
    return {
        "device": str(device),
        "dtype": dtype_name,
        "seqlen": seqlen,
        "num_heads": num_heads,
        "head_dim": head_dim,
        "text": prose.splitlines()[0],
        "allowed": allowed,
        "right": errors["flash_attn"] <= allowed,
        **{name: {"error": errors[name], "milliseconds": times[name]} for name in errors},
    }
