"""What a tile costs, as a number and as the arithmetic that shows where it comes from."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from math import prod


@dataclass(frozen=True)
class Term:
    """A product of named numbers, divided by others, and what it is for."""

    name: str
    factors: Mapping[str, int]
    divisors: Mapping[str, int] = field(default_factory=dict)

    @property
    def quotient(self) -> float:
        return prod(self.factors.values()) / prod(self.divisors.values())

    @property
    def value(self) -> int:
        """The quotient, rounded down."""
        return prod(self.factors.values()) // prod(self.divisors.values())

    def __str__(self) -> str:
        """Such as ``bytes 2 * block_m 128 * head_dim 64 [Q]``."""
        product = " * ".join(f"{name} {value}" for name, value in self.factors.items())
        return (
            product
            + "".join(f" / {name} {value}" for name, value in self.divisors.items())
            + f" [{self.name}]"
        )


@dataclass(frozen=True)
class Sum:
    """Terms that add up; as text, with the result."""

    terms: tuple[Term, ...]

    @property
    def value(self) -> int:
        return sum(term.value for term in self.terms)

    def __str__(self) -> str:
        return f"{' + '.join(map(str, self.terms))} = {self.value}"
