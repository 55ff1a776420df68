import os
from pathlib import Path

import jinja2
import pytest

from codegen import GENERATED, axes, render, tiles, units
from codegen.compilation import selection
from codegen.targets import Selection, Target, full_selection
from codegen.tile_shapes import MmaBackwardTile, MmaCacheTile, MmaForwardTile

GOLDEN = Path(__file__).parent / "golden"
GOLDEN_UNITS = (
    "sm80/forward_bf16_d64_causal.cu",
    "sm80/backward_bf16_d64_causal.cu",
    "sm80/split_bf16_d64_windowed.cu",
)
"""One unit of each pass: what a reviewer sees of a change of the rendering."""


@pytest.fixture
def fixed_tiles(monkeypatch):
    """Tiles that tuning does not change, so that the golden units follow the templates alone."""
    small, roomy = MmaBackwardTile(32, 128, 4, 1, 2), MmaBackwardTile(64, 128, 4, 2, 2)
    few, many = MmaCacheTile(16, 64, 1, 4, 2, 2), MmaCacheTile(64, 64, 4, 1, 1, 2)
    monkeypatch.setitem(tiles.FORWARD_TILES["sm80"], 64, {"default": MmaForwardTile(128, 64, 4, 2)})
    monkeypatch.setitem(tiles.BACKWARD_TILES["sm80"], 64, {"default": small, "roomy": roomy})
    monkeypatch.setitem(tiles.CACHE_TILES["sm80"], 64, {"rows16": few, "rows64": many})


def test_golden_units(fixed_tiles):
    """After a deliberate change: UPDATE_GOLDEN=1 pytest tests/codegen/test_render.py, and review the diff."""
    rendered = render.render_sources(Selection((Target("sm80", 80),), (64,), ("bf16",), axes.DIRECTIONS))
    files = {unit: rendered[unit] for unit in GOLDEN_UNITS}
    if os.environ.get("UPDATE_GOLDEN"):
        render.write_tree(files, GOLDEN)
    assert render.diff_tree(files, GOLDEN) == ""


def test_the_table_of_kernels_has_what_plans_read_of_their_tiles(fixed_tiles):
    rendered = render.render_sources(Selection((Target("sm80", 80),), (64,), ("bf16",), axes.DIRECTIONS))
    for row in (
        ", forward_sm80_bf16_d64_full, {}},",
        ", backward_sm80_bf16_d64_full, {128, 64, 4}},",
        ", split_sm80_bf16_d64_windowed, {{16, 64}, {64, 64}, {0, 0}, {0, 0}}},",
    ):
        assert row in rendered["dispatch.cu"]


def test_the_committed_files_are_current():
    assert render.diff_tree(render.render_sources(full_selection()), GENERATED) == ""


def test_write_touches_only_what_changed_and_deletes_what_is_stale(tmp_path):
    assert sorted(render.write_tree({"a.h": "1\n", "sub/b.cu": "2\n"}, tmp_path)) == ["a.h", "sub/b.cu"]
    os.utime(tmp_path / "a.h", (1, 1))
    assert sorted(render.write_tree({"a.h": "1\n", "sub/c.cu": "3\n"}, tmp_path)) == ["sub/b.cu", "sub/c.cu"]
    assert (tmp_path / "a.h").stat().st_mtime == 1
    assert not (tmp_path / "sub/b.cu").exists()


def test_diff_is_unified_and_names_missing_and_stale_files(tmp_path):
    render.write_tree({"same.h": "0\n", "changed.h": "old\n", "stale.h": "gone\n"}, tmp_path)
    diff = render.diff_tree({"same.h": "0\n", "changed.h": "new\n", "missing.h": "here\n"}, tmp_path)
    for line in ("-old", "+new", "-gone", "+here"):
        assert line in diff.splitlines()
    assert "--- a/" in diff and "+++ b/" in diff and "@@" in diff
    assert "same.h" not in diff


def test_a_name_that_a_template_does_not_get_is_an_error():
    with pytest.raises(jinja2.UndefinedError):
        render._environment().from_string("{{ missing }}").render()


def test_an_empty_selection_still_gives_valid_tables():
    files = render.render_sources(Selection((), axes.HEAD_DIMS, axes.DTYPES, axes.DIRECTIONS))
    assert set(files) == {"abi.h", "dispatch.cu", "manifest.json"}
    assert "kCacheKernels{Direction::kSplit, cache_kernels, 0};" in files["dispatch.cu"]
    assert files["dispatch.cu"].count("{nullptr, ") == 3


def test_a_new_head_dim_is_data(monkeypatch):
    monkeypatch.setattr(axes, "HEAD_DIMS", (*axes.HEAD_DIMS, 160))
    for rows in tiles.FORWARD_TILES.values():
        monkeypatch.setitem(rows, 160, {"default": MmaForwardTile(64, 64, 4, 1)})
    for rows in tiles.BACKWARD_TILES.values():
        monkeypatch.setitem(rows, 160, {"default": MmaBackwardTile(32, 32, 4, 1, 2)})
    for rows in tiles.CACHE_TILES.values():
        monkeypatch.setitem(
            rows, 160, dict.fromkeys(("rows16", "rows64", "wgmma"), MmaCacheTile(64, 64, 4, 1, 1, 1))
        )
    files = render.render_sources(full_selection())
    assert "/*head_dim*/ 160" in files["sm86/forward_fp16_d160_windowed.cu"]
    assert "forward_sm80_bf16_d160_full" in files["dispatch.cu"]
    assert "kNumHeadDims = 7;" in files["dispatch.cu"]
    chosen = selection.from_environment({"FLASH_ATTN_ARCHS": "80", "FLASH_ATTN_HEAD_DIMS": "160"})
    assert len(units.list_units(chosen)) == 14


def test_a_new_family_is_data(monkeypatch):
    family = axes.Family("sm95", ("bf16",), {"forward": "tcgen05"}, 200 * axes.KIB, 201 * axes.KIB)
    monkeypatch.setitem(axes.FAMILIES, "sm95", family)
    monkeypatch.setitem(axes.ARCHS, 95, axes.Arch(95, "sm95", (13, 0)))
    monkeypatch.setitem(tiles.FORWARD_TILES, "sm95", tiles.FORWARD_TILES["sm80"])
    monkeypatch.setitem(tiles.MEMBERS, ("tcgen05", "forward"), ("default",))
    chosen = selection.from_environment({"FLASH_ATTN_ARCHS": "95"})
    files = render.render_sources(chosen)
    assert '#include "tcgen05/forward/launch.cuh"' in files["sm95/forward_bf16_d64_full.cu"]
    assert not any("fp16" in path or "backward" in path for path in files)
    assert '{Family::kSm95, "sm95", 204800, false},' in files["dispatch.cu"]
    assert "{Family::kSm95, 95, false}," in files["dispatch.cu"]
    assert "kSm95 = 95," in files["abi.h"]
    assert "SM95 = 95" in render.render_abi_module()


def test_a_tile_that_does_not_fit_stops_the_generator(monkeypatch):
    monkeypatch.setitem(tiles.FORWARD_TILES["sm86"][256], "default", MmaForwardTile(128, 128, 8, 1))
    with pytest.raises(tiles.TileError, match="shared memory per block"):
        render.render_sources(full_selection())
