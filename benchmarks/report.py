"""What the benchmarks leave behind: text tables, JSON with the circumstances, plots, the README's table."""

from __future__ import annotations

import datetime
import json
import math
import re
import shutil
import subprocess
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypeVar

from tabulate import tabulate
from tqdm import tqdm

from benchmarks.settings import Setting

Case = TypeVar("Case")
Result = TypeVar("Result")
Cells = dict[str, str]
"""A row of a table: text by the title of its column."""
DIRECTIONS = {"forward": "Forward", "backward": "Backward", "both": "Forward and backward"}


@dataclass(frozen=True)
class Row:
    """TFLOP/s by provider for one setting; a provider that cannot run it is missing."""

    setting: Setting
    tflops: Mapping[str, float]

    def ratio(self, name: str, peer: str) -> float | None:
        """Speed of `name` over that of `peer`, None where one of them is missing."""
        if name in self.tflops and peer in self.tflops:
            return self.tflops[name] / self.tflops[peer]
        return None

    def as_record(self) -> dict[str, Any]:
        return {**asdict(self.setting), "tflops": {n: round(t, 1) for n, t in self.tflops.items()}}


def geometric_mean(values: Iterable[float]) -> float:
    """exp(mean(log(values))). ValueError for no values or for one that is not positive."""
    logs = []
    for value in values:
        if value <= 0:
            raise ValueError(f"a geometric mean needs positive values, got {value}")
        logs.append(math.log(value))
    if not logs:
        raise ValueError("a geometric mean needs at least one value")
    return math.exp(sum(logs) / len(logs))


def ratios(rows: Iterable[Row], name: str, peer: str) -> list[float]:
    """The ratios of all rows that have both providers."""
    return [ratio for row in rows if (ratio := row.ratio(name, peer)) is not None]


def table(rows: Sequence[Cells], form: str = "simple") -> str:
    """The rows as a table, in a form of tabulate, such as "github"; a dash is in columns that a row lacks."""
    if not rows:
        return ""
    return tabulate(
        rows,
        headers="keys",
        tablefmt=form,
        stralign="right",
        colalign=["left"],
        missingval="-",
        disable_numparse=True,
    )


def measured(
    cases: Iterable[Case], measure: Callable[[Case], Result], cells: Callable[[Result], Cells]
) -> list[Result]:
    """What `measure` gives of each case; prints the rows that `cells` makes of it as a table.

    On a terminal a bar shows the newest row. The table comes once its widths are known: at the end, which may
    be an error or Ctrl-C.
    """
    results: list[Result] = []
    try:
        with tqdm(list(cases), unit="row", disable=None) as bar:
            for case in bar:
                results.append(measure(case))
                bar.set_postfix(cells(results[-1]))
    finally:
        if results:
            print(table([cells(result) for result in results]), flush=True)
    return results


def cells(row: Row, names: Sequence[str]) -> Cells:
    """A row of the table of speeds: setting, TFLOP/s by provider, ratio of the first to each peer."""
    setting = row.setting
    against = {peer: row.ratio(names[0], peer) for peer in names[1:]}
    return {
        "d": str(setting.head_dim),
        "mask": setting.mask,
        "s": str(setting.seqlen),
        **{name: f"{row.tflops[name]:.0f}" if name in row.tflops else "-" for name in names},
        **{f"vs {peer}": "-" if ratio is None else f"{ratio:.2f}" for peer, ratio in against.items()},
    }


def summary(rows: Sequence[Row], names: Sequence[str]) -> list[str]:
    """One sentence per peer: geometric mean, worst and number of settings won."""
    sentences = []
    for peer in names[1:]:
        values = ratios(rows, names[0], peer)
        if not values:
            sentences.append(f"{peer}: does not run here")
            continue
        won = sum(value >= 1 for value in values)
        sentences.append(
            f"{names[0]} / {peer}: geometric mean {geometric_mean(values):.3f}, "
            f"worst {min(values):.3f}, at least 1 in {won} of {len(values)} settings"
        )
    return sentences


def _where(facts: Mapping[str, Any]) -> str:
    return f"{facts['device']}, torch {facts['torch']}"


def short_commit(commit: str) -> str:
    """Ten digits of a commit, and whether the tree differed from it."""
    return commit[:10] + ("-dirty" if commit.endswith("-dirty") else "")


def markdown(rows: Sequence[Row], names: Sequence[str], facts: Mapping[str, Any]) -> str:
    """The table of speeds with its circumstances, for the README: by head dim and mask, then seqlen.

    A cell has our TFLOP/s and in brackets the ratio to each peer.
    """
    empty = {str(seqlen): "-" for seqlen in sorted({row.setting.seqlen for row in rows})}
    lines: dict[str, Cells] = {}
    for row in rows:
        setting, ratios = row.setting, [row.ratio(names[0], peer) for peer in names[1:]]
        texts = ["-" if ratio is None else f"{ratio:.2f}" for ratio in ratios]
        title = f"{setting.head_dim}, {setting.mask}"
        line = lines.setdefault(title, {"head dim, mask": title, **empty})
        line[str(setting.seqlen)] = f"{row.tflops[names[0]]:.0f} ({', '.join(texts)})"
    parts = [
        f"{facts['device']}, driver {facts['driver']}, torch {facts['torch']}, {facts['dtype']}, "
        f"kernel family {facts['family']}, {facts['date']}, commit {short_commit(facts['commit'])}. "
        f"{DIRECTIONS[facts['direction']]}, TFLOP/s by sequence length, in brackets our speed over that of "
        f"{' and '.join(names[1:])}:",
        "",
        table(list(lines.values()), "github"),
        "",
        *(f"- {sentence}" for sentence in summary(rows, names)),
    ]
    return "\n".join(parts)


def replace_between_markers(text: str, name: str, replacement: str) -> str:
    """`text` with what stands between `<!-- benchmark:name -->` and `<!-- /benchmark:name -->` replaced.

    ValueError unless the pair of markers occurs exactly once.
    """
    opening, closing = f"<!-- benchmark:{name} -->", f"<!-- /benchmark:{name} -->"
    pattern = re.compile(f"({re.escape(opening)}).*?({re.escape(closing)})", re.DOTALL)
    if len(pattern.findall(text)) != 1 or text.count(opening) != 1 or text.count(closing) != 1:
        raise ValueError(f"expected the markers {opening} and {closing} exactly once, in this order")
    return pattern.sub(lambda match: f"{match[1]}\n{replacement}\n{match[2]}", text)


def driver_version() -> str:
    """Version of the NVIDIA driver, "unknown" without nvidia-smi or an answer from it."""
    program = shutil.which("nvidia-smi")
    if program is None:
        return "unknown"
    query = [program, "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        done = subprocess.run(query, capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError):
        return "unknown"
    return done.stdout.partition("\n")[0].strip() or "unknown"


def machine() -> dict[str, str]:
    """Device, driver, versions of torch and cuDNN, date: facts that need no package flash_attn."""
    import torch

    return {
        "device": torch.cuda.get_device_name(),
        "driver": driver_version(),
        "torch": torch.__version__,
        "cudnn": str(torch.backends.cudnn.version()),
        "date": datetime.date.today().isoformat(),
    }


def environment() -> dict[str, str]:
    """The machine, and version and commit of the package: what a figure means nothing without."""
    from flash_attn import build_info

    info = build_info()
    package = {"project_version": info["project_version"], "commit": info["commit"] or "unknown"}
    return {**machine(), **package}


def choices(family: str | None, dtype: str) -> dict[str, str]:
    """The dtype of what was measured, and the kernel family, forced or not."""
    return {"dtype": dtype, "family": family or "chosen by the library"}


def circumstances(family: str | None, dtype: str) -> dict[str, str]:
    """The environment and the choices."""
    return {**environment(), **choices(family, dtype)}


def write_json(path: Path, facts: Mapping[str, Any], records: Sequence[Mapping[str, Any]]) -> None:
    """One object with the circumstances and the rows; makes the folder."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({**facts, "rows": list(records)}, indent=1) + "\n")
    print(f"wrote {path}")


def _plot_panel(speed: Any, ratio: Any, rows: Sequence[Row], names: Sequence[str]) -> None:
    """TFLOP/s of every provider by sequence length, and below it the first one's ratio to its peers.

    `rows` are those of one head dim and mask, at least one.
    """
    for index, name in enumerate(names):
        known = [row for row in rows if name in row.tflops]
        seqlens = [row.setting.seqlen for row in known]
        speed.plot(seqlens, [row.tflops[name] for row in known], marker="o", color=f"C{index}", label=name)
        if index:
            quotients = [row.ratio(names[0], name) or float("nan") for row in known]
            ratio.plot(seqlens, quotients, marker=".", color=f"C{index}")
    setting = rows[0].setting
    speed.set(title=f"head_dim {setting.head_dim}, {setting.mask}", ylabel="TFLOP/s", ylim=(0, None))
    ratio.axhline(1, color="gray", linewidth=0.8)
    ratio.set(ylabel="ours / peer", xlabel="seqlen")
    ratio.set_xscale("log", base=2)
    ticks = [row.setting.seqlen for row in rows]
    ratio.set_xticks(ticks, [str(tick) for tick in ticks])


def _pyplot() -> Any:
    """matplotlib's pyplot for files; None, and a line that says so, where it is not installed."""
    try:
        import matplotlib
    except ImportError:
        print("matplotlib is not installed: no plot")
        return None
    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot


def _save(figure: Any, path: Path, pyplot: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
    pyplot.close(figure)
    print(f"wrote {path}")


def plot_speed(path: Path, rows: Sequence[Row], names: Sequence[str], facts: Mapping[str, Any]) -> None:
    """A PNG with one panel per mask (down) and head dim (across). Without matplotlib: says so and returns."""
    pyplot = _pyplot()
    if pyplot is None:
        return
    head_dims = sorted({row.setting.head_dim for row in rows})
    masks = list(dict.fromkeys(row.setting.mask for row in rows))
    figure, axes = pyplot.subplots(
        2 * len(masks), len(head_dims), sharex=True, squeeze=False, layout="constrained",
        figsize=(4.5 * len(head_dims), 4.5 * len(masks)), height_ratios=[3, 1] * len(masks),
    )  # fmt: skip
    for i, mask in enumerate(masks):
        for j, head_dim in enumerate(head_dims):
            panel = [row for row in rows if (row.setting.mask, row.setting.head_dim) == (mask, head_dim)]
            if panel:
                _plot_panel(axes[2 * i][j], axes[2 * i + 1][j], panel, names)
    axes[0][0].legend()
    figure.suptitle(f"{DIRECTIONS[facts['direction']]}, {facts['dtype']}, {_where(facts)}")
    _save(figure, path, pyplot)


def plot_memory(path: Path, records: Sequence[Mapping[str, Any]], facts: Mapping[str, Any]) -> None:
    """A PNG with one panel per direction: peak MiB by sequence length. Without matplotlib as above.

    A record has `seqlen` and for each direction the bytes by name, None where there was no room.
    """
    pyplot = _pyplot()
    if pyplot is None:
        return
    directions = [key for key in records[0] if key in DIRECTIONS]
    figure, axes = pyplot.subplots(
        1,
        len(directions),
        sharey=True,
        squeeze=False,
        layout="constrained",
        figsize=(5 * len(directions), 4.5),
    )
    for axis, direction in zip(axes[0], directions, strict=True):
        for name in records[0][direction]:
            known = [(r["seqlen"], r[direction][name]) for r in records if r[direction][name] is not None]
            style = {"linestyle": "--", "color": "gray"} if name == "needed" else {"marker": "o"}
            axis.plot([n for n, _ in known], [size / 2**20 for _, size in known], label=name, **style)
        axis.set(title=DIRECTIONS[direction], xlabel="seqlen", xscale="log", yscale="log")
        ticks = [record["seqlen"] for record in records]
        axis.set_xticks(ticks, [str(tick) for tick in ticks])
        axis.minorticks_off()
    axes[0][0].set_ylabel("peak MiB")
    axes[0][0].legend()
    figure.suptitle(f"Peak memory, {_where(facts)}")
    _save(figure, path, pyplot)
