"""The CPU backend: torch operations, which tensors of other devices can be given as well."""

from flash_attn._backends.cpu.attention import forward
from flash_attn._backends.cpu.attention_backward import backward
from flash_attn._backends.cpu.kvcache import forward_kvcache, num_key_parts
from flash_attn._backends.cpu.rotary import rotate

__all__ = ["backward", "forward", "forward_kvcache", "num_key_parts", "rotate"]
