from dataclasses import replace

import pytest

from codegen import CodegenError, axes, targets, units
from codegen.compilation import selection
from codegen.tiles import TileError

FULL = units.list_units(targets.full_selection())


def test_the_full_matrix():
    masks = sum(len(axes.masks_of(direction)) for direction in axes.DIRECTIONS)
    assert len(FULL) == 3 * len(axes.HEAD_DIMS) * len(axes.DTYPES) * masks
    assert len({unit.key for unit in FULL}) == len({unit.path for unit in FULL}) == len(FULL)
    assert len({unit.config for unit in FULL}) == len(FULL)


def test_names():
    unit = next(u for u in FULL if u.key == "forward_sm80_bf16_d128_causal")
    assert unit.path == "sm80/forward_bf16_d128_causal.cu"
    assert unit.config == "ForwardSm80Bf16D128Causal"
    assert unit.smem_bytes == unit.tile.smem_bytes(128)


def test_a_family_can_use_the_kernels_of_another():
    unit = next(u for u in FULL if u.family == "sm86")
    assert unit.path.startswith("sm86/")
    assert unit.design == "mma"


def test_hopper_has_a_forward_kernel_of_its_own():
    hopper = {unit.direction: unit.design for unit in FULL if unit.family == "sm90"}
    assert hopper == {"forward": "wgmma", "backward": "mma", "split": "wgmma"}
    assert [family.name for family in axes.built_families() if family.draws_tiles] == ["sm90"]


def test_one_kernel_with_split_keys_serves_every_mask():
    split = [unit for unit in FULL if unit.direction == "split"]
    assert {unit.mask for unit in split} == {"windowed"}
    for unit in split:
        rows, more = ["rows16", "rows64", "rows128"], {"sm90": ["wgmma"]}.get(unit.family, [])
        assert list(unit.tiles) == rows + more
        assert (unit.tiles["rows128"] is None) == (unit.family == "sm86")
        assert unit.designs == ["mma", *more]


def test_a_trimmed_selection():
    chosen = selection.from_environment(
        {"FLASH_ATTN_ARCHS": "80;90", "FLASH_ATTN_HEAD_DIMS": "128", "FLASH_ATTN_DTYPES": "bf16"}
    )
    keys = [unit.key for unit in units.list_units(chosen)]
    assert keys == [
        f"{direction}_{family}_bf16_d128_{mask}"
        for family in ("sm80", "sm90")
        for direction in axes.DIRECTIONS
        for mask in axes.masks_of(direction)
    ]


def test_a_unit_names_the_tiles_for_which_its_launcher_asks():
    unit = next(u for u in FULL if u.key == "forward_sm90_bf16_d192_full")
    assert list(unit.tiles) == ["default", "short", "narrow"]
    assert unit.tiles["short"] is None and unit.tile is unit.tiles["default"]
    assert unit.designs == ["wgmma"]


def test_a_unit_without_a_tile_for_all_calls():
    unit = next(u for u in FULL if u.key == "split_sm80_bf16_d64_windowed")
    few_rows = replace(unit, tiles={"rows16": unit.tiles["rows16"], "rows64": None})
    with pytest.raises(TileError, match=f"{unit.key} has no tile default, rows128 or rows64"):
        _ = few_rows.tile


def test_nothing_selected():
    assert units.list_units(selection.from_environment({"FLASH_ATTN_ARCHS": "none"})) == []


@pytest.mark.parametrize("count", [1, 2, 3, 4, 5, 7, 72, 100])
def test_shards_are_disjoint_complete_and_even(count):
    shards = [units.shard(FULL, f"{i}/{count}") for i in range(1, count + 1)]
    assert sorted(u.key for part in shards for u in part) == sorted(u.key for u in FULL)
    sizes = [len(part) for part in shards]
    assert max(sizes) - min(sizes) <= 1
    if count <= 7:
        cost = [sum(u.head_dim for u in part) / len(part) for part in shards]
        backward = [sum(u.direction == "backward" for u in part) / len(part) for part in shards]
        assert max(backward) < 1.2 * min(backward)
        assert max(cost) < 1.2 * min(cost)


@pytest.mark.parametrize("text", ["0/4", "5/4", "4", "a/b", "1/0", "1/2/3"])
def test_wrong_shards(text):
    with pytest.raises(CodegenError, match="--shard"):
        units.shard(FULL, text)
