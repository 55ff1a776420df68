"""What dropout did to P, as a matrix."""

from codegen.abi import forward
from codegen.abi.limits import PROBS_BLOCK
from codegen.abi.parts import launcher

LAUNCHER = launcher(
    "dropout_probs",
    forward.PARAMS,
    "Writes probs (sign bit = dropped) from q, k, softmax_lse, rng_state",
    "probs is contiguous, (batch, num_heads, seqlen_q, seqlen_k), both lengths rounded up to a multiple"
    f" of {PROBS_BLOCK}.",
)
