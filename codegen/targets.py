"""What is built: targets, and selections of them and of values on the axes."""

import re
from collections.abc import Iterable
from dataclasses import dataclass, field

from codegen import axes


@dataclass(frozen=True)
class Target:
    """A family's kernels compiled for a compute capability, as a cubin and, if ``ptx``, as PTX too."""

    family: str
    capability: int
    ptx: bool = False

    def __str__(self) -> str:
        return f"{self.family}:{self.capability}{'+ptx' if self.ptx else ''}"

    @classmethod
    def parse(cls, text: str) -> "Target | None":
        """The target of which ``text`` is the str, as in a manifest; None for any other text."""
        match = re.fullmatch(r"(\w+):(\d+)(\+ptx)?", text)
        return cls(match[1], int(match[2]), match[3] is not None) if match else None

    @property
    def code(self) -> str:
        """What nvcc calls the target, without its prefix: ``80`` of sm_80, ``90a`` of sm_90a."""
        return f"{self.capability}{axes.FAMILIES[self.family].code_suffix}"

    @property
    def arch(self) -> str:
        """The item of FLASH_ATTN_ARCHS that selects this target."""
        default = axes.ARCHS[self.capability].family == self.family
        return str(self).removeprefix(f"{self.family}:") if default else str(self)


@dataclass(frozen=True)
class Selection:
    """Targets and axis values to build; ``notes`` says in one line each what was left out and why."""

    targets: tuple[Target, ...]
    head_dims: tuple[int, ...]
    dtypes: tuple[str, ...]
    directions: tuple[str, ...]
    notes: tuple[str, ...] = field(default=(), compare=False)

    @property
    def summary(self) -> str:
        """One line: what was left out and what is built."""
        targets = ", ".join(str(target) for target in self.targets)
        return "; ".join(
            [*self.notes, f"kernels for {targets}" if targets else "no kernels, CPU backend only"]
        )

    @property
    def families(self) -> tuple[str, ...]:
        chosen = {target.family for target in self.targets}
        return tuple(family for family in axes.FAMILIES if family in chosen)

    @property
    def slug(self) -> str:
        """A short name, stable for equal selections, fit for a folder."""
        parts = [
            ".".join([family, *(_short(t) for t in self.targets if t.family == family)])
            for family in self.families
        ] or ["none"]
        if self.head_dims != axes.HEAD_DIMS:
            parts.append("d" + ".".join(map(str, self.head_dims)))
        if self.dtypes != axes.DTYPES:
            parts.append(".".join(self.dtypes))
        if self.directions != axes.DIRECTIONS:
            parts.append(".".join(self.directions))
        return "-".join(parts)


def _short(target: Target) -> str:
    return f"{target.capability}{'ptx' if target.ptx else ''}"


def full_selection() -> Selection:
    """Everything that can be built: the selection whose sources are committed under ``generated/``."""
    return Selection(all_targets(), axes.HEAD_DIMS, axes.DTYPES, axes.DIRECTIONS)


def all_targets() -> tuple[Target, ...]:
    """Every architecture whose family has kernels, without PTX."""
    return ordered(
        Target(a.family, a.capability) for a in axes.ARCHS.values() if axes.FAMILIES[a.family].directions
    )


def ordered(targets: Iterable[Target]) -> tuple[Target, ...]:
    """Sorted by family and capability; a target named twice keeps its PTX."""
    merged: dict[tuple[str, int], bool] = {}
    for target in targets:
        key = (target.family, target.capability)
        merged[key] = merged.get(key, False) or target.ptx
    return tuple(Target(family, capability, ptx) for (family, capability), ptx in sorted(merged.items()))
