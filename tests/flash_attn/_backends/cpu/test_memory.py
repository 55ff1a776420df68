"""Memory of the CPU backend grows linearly with the sequence length."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[4]
MEASURE = """
import resource, sys, torch
from flash_attn import flash_attn_func
torch.set_num_threads(1)
seqlen, grad = int(sys.argv[1]), sys.argv[2] == "backward"
def run(n):
    q, k, v = (torch.randn(1, n, 4, 16, requires_grad=grad) for _ in range(3))
    out = flash_attn_func(q, k, v, causal=True, dropout_p=float(sys.argv[3]))
    if grad:
        out.sum().backward()
run(256)
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
run(seqlen)
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="ru_maxrss is in kilobytes on Linux only")
@pytest.mark.parametrize("direction, dropout_p", [("forward", 0.0), ("backward", 0.0), ("forward", 0.1)])
def test_peak_memory(direction, dropout_p):
    """Scores of this call would take 1 GB in fp32; the tensors themselves take 2 MB each."""
    command = [sys.executable, "-c", MEASURE, "8192", direction, str(dropout_p)]
    kilobytes = int(subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout)
    assert kilobytes < 200 * 1024
