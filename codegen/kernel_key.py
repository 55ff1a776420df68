"""The name of a kernel everywhere: launcher, dispatch table, build log, error messages."""

import re
from dataclasses import dataclass

_TEXT = re.compile(r"([a-z]+)_(sm\d+)_([a-z]+\d+)_d([1-9]\d*)_([a-z]+)", re.ASCII)


@dataclass(frozen=True)
class KernelKey:
    """A kernel's place on the axes; as text such as ``forward_sm80_bf16_d128_causal``."""

    direction: str
    family: str
    dtype: str
    head_dim: int
    mask: str

    def __str__(self) -> str:
        return f"{self.direction}_{self.family}_{self.dtype}_d{self.head_dim}_{self.mask}"

    @classmethod
    def parse(cls, text: str) -> "KernelKey | None":
        """The key of which ``text`` is the str; None for any other text."""
        match = _TEXT.fullmatch(text)
        return cls(match[1], match[2], match[3], int(match[4]), match[5]) if match else None
