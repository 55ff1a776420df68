"""The CUDA backend: packs what a call is told into a struct of the C ABI and calls the compiled library."""

from flash_attn._backends.cuda.attention import forward
from flash_attn._backends.cuda.attention_backward import backward
from flash_attn._backends.cuda.kvcache import forward_kvcache, num_key_parts
from flash_attn._backends.cuda.rotary import rotate

__all__ = ["backward", "forward", "forward_kvcache", "num_key_parts", "rotate"]
