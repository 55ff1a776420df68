import pytest

from codegen import axes, targets, tiles, units
from codegen.tile_shapes import MmaBackwardTile, MmaCacheTile, MmaForwardTile, WgmmaForwardTile, mma, wgmma
from codegen.tile_shapes.formula import Sum, Term
from codegen.tiles import TileError

SM80, SM86, SM90 = (axes.FAMILIES[name] for name in ("sm80", "sm86", "sm90"))


def test_every_tile_of_the_table_fits():
    for family in axes.built_families():
        for direction in family.directions:
            for head_dim in axes.HEAD_DIMS:
                for mask in axes.MASKS:
                    found = tiles.find_tiles(direction, family.name, head_dim, mask)
                    for tile in filter(None, found.values()):
                        assert tile.smem_bytes(head_dim) <= family.smem_per_block


def test_the_table_holds_no_row_that_nothing_reads():
    assert tuple(tiles.TABLES) == axes.DIRECTIONS
    for direction, table in tiles.TABLES.items():
        assert set(table) == {family.name for family in axes.built_families()}
        for name, rows in table.items():
            members = tiles.MEMBERS[axes.FAMILIES[name].directions[direction], direction]
            masks = axes.MASKS if "default" in members else ()
            assert set(rows) == set(axes.HEAD_DIMS)
            for row in rows.values():
                assert set(row) <= {*members, *masks}


def test_a_sum_says_where_it_comes_from():
    total = Sum((Term("Q", {"bytes": 2, "block_m": 64}), Term("rest", {"a": 9}, {"b": 2, "c": 2})))
    assert str(total) == "bytes 2 * block_m 64 [Q] + a 9 / b 2 / c 2 [rest] = 130"
    assert total.value == 130
    assert total.terms[1].quotient == 2.25


def test_arithmetic():
    tile = MmaForwardTile(block_m=128, block_n=64, warps=4, min_blocks=2)
    assert tile.smem_bytes(128) == 2 * (128 * 128 + 2 * 64 * 128) == 65536
    assert tile.registers(128).value == (32 * 128 + 32 * 64) // 32 + mma.REGISTER_OVERHEAD == 232


def test_pairs_of_warps_halve_the_columns_and_exchange_through_shared_memory():
    alone, pairs = MmaForwardTile(64, 64, 4, 1), MmaForwardTile(64, 64, 4, 1, warps_per_row=2)
    assert pairs.registers(256) == alone.registers(256)
    assert pairs.smem_bytes(256) - alone.smem_bytes(256) == 64 * 64 * 2 + 64 * 2 * 4


def refusal(tile, family, head_dim):
    with pytest.raises(TileError) as error:
        tiles.check_tile(tile, family, head_dim, "causal")
    return str(error.value)


def test_too_much_shared_memory_per_block():
    text = refusal(MmaForwardTile(128, 128, 8, 1), SM86, 256)
    assert (
        "shared memory per block: bytes 2 * block_m 128 * head_dim 256 [Q]"
        " + bytes 2 * tensors 2 * block_n 128 * head_dim 256 [K, V] = 196608 > 101376 bytes"
    ) in text
    assert "sm86" in text and "head_dim 256" in text and "causal" in text


def test_too_much_shared_memory_per_sm():
    text = refusal(MmaForwardTile(128, 64, 4, 2), SM86, 128)
    assert (
        "min_blocks 2 * smem 65536 [the blocks] + min_blocks 2 * reserved 1024 [the system] = 133120" in text
    )
    assert "133120 > 102400 bytes, with smem = bytes 2 * block_m 128" in text
    assert "per block" not in text


def test_too_many_registers():
    text = refusal(MmaForwardTile(128, 64, 4, 2), SM80, 192)
    assert (
        "block_m 128 * head_dim 192 / threads 128 [O] + block_m 128 * block_n 64 / threads 128 [S]"
        " + registers 40 [overhead] = 296"
        " > min(255, registers 65536 / min_blocks 2 / threads 128 [a thread's share]) = 255"
    ) in text


def test_register_limit_follows_residency():
    text = refusal(MmaForwardTile(128, 128, 8, 2), SM80, 64)
    assert "= 136 > min(255, registers 65536 / min_blocks 2 / threads 256 [a thread's share]) = 128" in text


@pytest.mark.parametrize(
    ("tile", "words"),
    [
        (
            MmaForwardTile(96, 64, 4, 1),
            "block_m 96 * warps_per_row 1 / warps 4 [rows per warp] = 24, not a multiple of 16",
        ),
        (
            MmaForwardTile(64, 40, 4, 1),
            "block_n 40 / warps_per_row 1 [keys per warp] = 40, not a multiple of 16",
        ),
        (MmaForwardTile(64, 48, 4, 1, 2), "48 / warps_per_row 2 [keys per warp] = 24, not a multiple of 16"),
        (MmaForwardTile(64, 64, 4, 1, 3), "warps_per_row = 3"),
        (
            MmaForwardTile(64, 64, 4, 1, 2),
            "64 / warps_per_row 2 [columns of O per warp] = 32, not a multiple of 64",
        ),
        (
            MmaForwardTile(128, 16, 8, 1),
            "block_n = 16, not a multiple of the 32 rows that 8 warps copy at once",
        ),
    ],
)
def test_wrong_shapes(tile, words):
    assert words in refusal(tile, SM80, 64)


def test_every_problem_is_listed_at_once():
    text = refusal(MmaForwardTile(256, 256, 4, 2), SM86, 256)
    assert text.count("\n") == 3


def test_missing_row(monkeypatch):
    monkeypatch.delitem(tiles.FORWARD_TILES["sm80"], 96)
    with pytest.raises(TileError, match="family sm80, head_dim 96, mask full: add it to FORWARD_TILES"):
        tiles.find_tiles("forward", "sm80", 96, "full")
    assert tiles.find_tiles("backward", "sm80", 96, "full")


def test_a_design_without_members_for_a_direction(monkeypatch):
    monkeypatch.delitem(tiles.MEMBERS, ("wgmma", "forward"))
    with pytest.raises(TileError, match=r"design wgmma has no members for forward kernels: add .* MEMBERS"):
        tiles.find_tiles("forward", "sm90", 128, "full")
    assert tiles.find_tiles("forward", "sm80", 128, "full")


def test_mask_override(monkeypatch):
    special = MmaForwardTile(64, 64, 4, 1)
    monkeypatch.setitem(tiles.FORWARD_TILES["sm80"][64], "windowed", special)
    assert tiles.find_tiles("forward", "sm80", 64, "windowed")["default"] == special
    default = tiles.FORWARD_TILES["sm80"][64]["default"]
    assert tiles.find_tiles("forward", "sm80", 64, "full")["default"] == default


def test_a_roomy_tile_may_need_more_of_a_multiprocessor_than_the_family_has(monkeypatch):
    roomy = MmaForwardTile(64, 64, 4, 2, 2)
    assert "per SM" in refusal(roomy, SM80, 256)
    monkeypatch.setitem(tiles.FORWARD_TILES["sm80"][256], "roomy", roomy)
    assert tiles.find_tiles("forward", "sm80", 256, "full")["roomy"] == roomy
    assert tiles.find_tiles("forward", "sm80", 32, "full")["roomy"] is None


def test_a_roomy_tile_must_fit_a_block(monkeypatch):
    monkeypatch.setitem(tiles.FORWARD_TILES["sm86"][256], "roomy", MmaForwardTile(128, 64, 8, 1))
    with pytest.raises(TileError, match="shared memory per block"):
        tiles.find_tiles("forward", "sm86", 256, "full")


def test_backward_arithmetic():
    tile = MmaBackwardTile(block_m=64, block_n=128, warps=8, min_blocks=1, score_stages=2)
    assert tile.keys_per_warp.value == 32 and tile.queries_at_once == 64
    assert tile.modified_queries_at_once == 32 and tile.barriers.value == 1 + 4 * 2
    assert tile.smem_bytes(128) == 2 * (2 * 128 * 128 + 4 * 64 * 128 + 2 * 64 * 128) + 2 * 2 * 64 * 4
    assert tile.registers(128).value == 32 * 128 // 32 + 32 * 64 // 32 + mma.REGISTER_OVERHEAD
    narrow = MmaBackwardTile(block_m=64, block_n=128, warps=4, min_blocks=1, score_stages=1)
    assert narrow.keys_per_warp.value == 64 and narrow.queries_at_once == 32
    assert narrow.modified_queries_at_once == 16


@pytest.mark.parametrize(
    ("tile", "words"),
    [
        (MmaBackwardTile(64, 96, 3, 1, 2), "warps = 3, not pairs"),
        (MmaBackwardTile(48, 64, 4, 1, 2), "block_m = 48, not a multiple of 16 that divides 128"),
        (MmaBackwardTile(64, 96, 4, 1, 2), "block_n 96 / pairs 2 [keys per warp] = 48, not 16, 32 or 64"),
        (MmaBackwardTile(64, 32, 8, 1, 2), "32 / pairs 4 [keys per warp] = 8, not 16, 32 or 64"),
        (MmaBackwardTile(64, 64, 4, 1, 3), "score_stages = 3, not 1 or 2"),
        (MmaBackwardTile(64, 96, 6, 1, 2), "block_n = 96, not a multiple of 16 that divides 128"),
        (
            MmaBackwardTile(128, 128, 8, 1, 1),
            "pairs 4 * block_m 128 / modified_queries_at_once 32 [each pair's parts of block_m] = 17",
        ),
        (MmaBackwardTile(16, 64, 8, 1, 2), "block_m = 16, not a multiple of the 32 rows that 8 warps copy"),
        (MmaBackwardTile(64, 128, 8, 2, 2), "= 331776 > 167936 bytes, with smem = "),
        (
            MmaBackwardTile(64, 128, 8, 2, 2),
            "keys_per_warp 32 * queries_at_once 64 / lanes 32 [scores] + registers 40 [overhead] = 232",
        ),
        (
            MmaBackwardTile(128, 64, 8, 1, 2),
            "+ bytes 4 * tensors 2 * stages 2 * block_m 128 [LSE, D] = 198656 > 166912 bytes",
        ),
    ],
)
def test_wrong_backward_tiles(tile, words):
    assert words in refusal(tile, SM80, 128)


def test_split_arithmetic():
    tile = MmaCacheTile(block_m=64, block_n=64, warps_m=4, warps_n=1, stages=2, min_blocks=1)
    assert tile.smem_bytes(128) == 2 * 128 * (64 + 2 * 2 * 64)
    assert tile.registers(128).value == 16 * (128 + 64) // 32 + mma.REGISTER_OVERHEAD
    spread = MmaCacheTile(block_m=64, block_n=64, warps_m=1, warps_n=4, stages=1, min_blocks=1)
    assert spread.smem_bytes(128) == 4 * 64 * (128 + 8 + 2) * 4
    assert spread.registers(128).value == 64 * (128 + 64 // 4) // 32 + mma.REGISTER_OVERHEAD


@pytest.mark.parametrize(
    ("tile", "words"),
    [
        (
            MmaCacheTile(64, 64, 8, 1, 2, 1),
            "block_m 64 / warps_m 8 [rows per warp] = 8, not a multiple of 16",
        ),
        (
            MmaCacheTile(16, 32, 1, 4, 2, 1),
            "block_n 32 / warps_n 4 [keys per warp] = 8, not a multiple of 16",
        ),
        (
            MmaCacheTile(64, 64, 4, 1, 5, 1),
            "stages 5 * block_n 64 * head_dim 128 [K, V] = 180224 > 166912 bytes",
        ),
        (MmaCacheTile(128, 64, 1, 4, 1, 1), "padded_head_dim 136 [O of each warp]"),
    ],
)
def test_wrong_split_tiles(tile, words):
    assert words in refusal(tile, SM80, 128)


def test_hopper_arithmetic():
    tile = WgmmaForwardTile(block_m=128, block_n=80, stages=2, query_stages=1)
    assert tile.smem_bytes(256) == 2 * (128 * 256 + 4 * 80 * 256) + tile.BARRIER_BYTES
    assert tile.smem_bytes(96) == tile.smem_bytes(128)
    assert tile.registers(256).value == 128 + 40 + 20 + wgmma.REGISTER_OVERHEAD
    narrow = WgmmaForwardTile(block_m=128, block_n=80, stages=2, query_stages=1, head_dim_v=64)
    assert tile.smem_bytes(256) - narrow.smem_bytes(256) == 2 * 80 * 192 * 2


@pytest.mark.parametrize(
    ("tile", "words"),
    [
        (WgmmaForwardTile(160, 64, 2, 1), "block_m = 160, not 128 or 192"),
        (WgmmaForwardTile(256, 64, 2, 1), "block_m = 256, not 128 or 192"),
        (WgmmaForwardTile(128, 72, 2, 1), "block_n = 72, not a multiple of 16 up to 256"),
        (WgmmaForwardTile(128, 64, 1, 1), "stages = 1: the next V is waited for before this one is released"),
        (
            WgmmaForwardTile(192, 112, 2, 1),
            "rows 64 * head_dim_v 128 / threads 128 [O] + rows 64 * block_n 112 / threads 128 [S]",
        ),
        (WgmmaForwardTile(192, 112, 2, 1), "/ per_register 2 [P] + registers 24 [overhead] = 172 > 160"),
        (WgmmaForwardTile(128, 128, 4, 1), "columns 128 [V] + bytes 256 [barriers] = 295168 > 232448 bytes"),
    ],
)
def test_wrong_hopper_tiles(tile, words):
    assert words in refusal(tile, SM90, 128)


def test_a_plan_reads_the_tiles_of_each_unit():
    found = {u.key: u.planned_tiles for u in units.list_units(targets.full_selection())}
    assert found["split_sm90_bf16_d256_windowed"] == [[16, 64], [64, 64], [128, 64], [128, 80]]
    assert found["split_sm86_bf16_d64_windowed"] == [[16, 64], [64, 64], [0, 0], [0, 0]]
    assert found["backward_sm80_fp16_d64_causal"] == [128, 64, 4]
    assert found["forward_sm90_bf16_d128_full"] == []


def test_backward_tiles_of_a_kernel_have_equally_many_keys(monkeypatch):
    monkeypatch.setitem(tiles.BACKWARD_TILES["sm80"][64], "roomy", MmaBackwardTile(64, 64, 4, 2, 2))
    found = tiles.find_tiles("backward", "sm80", 64, "full")
    with pytest.raises(TileError, match=r"block_n or warps differ .* head_dim 64: \[\(64, 4\), \(128, 4\)\]"):
        tiles.planned("backward", found, 64)


def test_every_width_of_wgmma_has_an_instruction():
    widths = tiles.wgmma_columns()
    assert set(axes.HEAD_DIMS) <= set(widths)
    assert all(n % 8 == 0 and 8 <= n <= 256 for n in widths)
