import pytest

from codegen import axes, tile_shapes, tiles
from codegen.tile_shapes import BackwardTile, ForwardTile, HopperTile
from codegen.tiles import TileError

SM80, SM86, SM90 = (axes.FAMILIES[name] for name in ("sm80", "sm86", "sm90"))


def test_every_tile_of_the_table_fits():
    for family in axes.built_families():
        for direction in family.directions:
            for head_dim in axes.HEAD_DIMS:
                for mask in axes.MASKS:
                    tile = tiles.find_tile(direction, family.name, head_dim, mask)
                    assert tile.smem_bytes(head_dim) <= family.smem_per_block


def test_the_table_holds_no_row_that_nothing_reads():
    assert tuple(tiles.TABLES) == axes.DIRECTIONS
    for table in tiles.TABLES.values():
        assert set(table) == {family.name for family in axes.built_families()}
        for rows in table.values():
            assert set(rows) == set(axes.HEAD_DIMS)
            for row in rows.values():
                assert set(row) <= {"default", *tiles.VARIANTS, *axes.MASKS}


def test_arithmetic():
    tile = ForwardTile(block_m=128, block_n=64, warps=4, min_blocks=2)
    assert tile.rows_per_warp == 32
    assert tile.smem_bytes(128) == 2 * (128 * 128 + 2 * 64 * 128) == 65536
    assert tile.register_floor(128) == (32 * 128 + 32 * 64) // 32 + 40 == 232


def test_pairs_of_warps_halve_the_columns_and_exchange_through_shared_memory():
    alone, pairs = ForwardTile(64, 64, 4, 1), ForwardTile(64, 64, 4, 1, warps_per_row=2)
    assert pairs.rows_per_warp == 2 * alone.rows_per_warp
    assert pairs.register_floor(256) == alone.register_floor(256)
    assert pairs.smem_bytes(256) - alone.smem_bytes(256) == 64 * 64 * 2 + 64 * 2 * 4


def refusal(tile, family, head_dim):
    with pytest.raises(TileError) as error:
        tiles.check_tile(tile, family, head_dim, "causal")
    return str(error.value)


def test_too_much_shared_memory_per_block():
    text = refusal(ForwardTile(128, 128, 8, 1), SM86, 256)
    assert "2 * (128 * 256 + 2 * 128 * 256) = 196608 > 101376 bytes" in text
    assert "sm86" in text and "head_dim 256" in text and "causal" in text


def test_too_much_shared_memory_per_sm():
    text = refusal(ForwardTile(128, 64, 4, 2), SM86, 128)
    assert "2 * (65536 + 1024) = 133120 > 102400 bytes" in text
    assert "per block" not in text


def test_too_many_registers():
    text = refusal(ForwardTile(128, 64, 4, 2), SM80, 192)
    assert "= 32 * (192 + 64) / 1 / 32 + 40 = 296 > min(255, 65536 / (2 * 4 * 32)) = 255" in text


def test_register_limit_follows_residency():
    text = refusal(ForwardTile(128, 128, 8, 2), SM80, 64)
    assert "16 * (64 + 128) / 1 / 32 + 40 = 136 > min(255, 65536 / (2 * 8 * 32)) = 128" in text


@pytest.mark.parametrize(
    ("tile", "words"),
    [
        (ForwardTile(96, 64, 4, 1), "96 * 1 / 4 = 24, not a multiple of 16"),
        (ForwardTile(64, 40, 4, 1), "40 / 1 = 40, not a multiple of 16"),
        (ForwardTile(64, 48, 4, 1, 2), "48 / 2 = 24, not a multiple of 16"),
        (ForwardTile(64, 64, 4, 1, 3), "warps_per_row = 3"),
        (ForwardTile(64, 64, 4, 1, 2), "64 / 2 = 32, not a multiple of 64"),
        (ForwardTile(128, 16, 8, 1), "block_n = 16, not a multiple of the 32 rows that 8 warps copy at once"),
    ],
)
def test_wrong_shapes(tile, words):
    assert words in refusal(tile, SM80, 64)


def test_every_problem_is_listed_at_once():
    text = refusal(ForwardTile(256, 256, 4, 2), SM86, 256)
    assert text.count("\n") == 3


def test_missing_row(monkeypatch):
    monkeypatch.delitem(tiles.FORWARD_TILES["sm80"], 96)
    with pytest.raises(TileError, match="family sm80, head_dim 96, mask full: add it to FORWARD_TILES"):
        tiles.find_tile("forward", "sm80", 96, "full")
    assert tiles.find_tile("backward", "sm80", 96, "full")


def test_mask_override(monkeypatch):
    special = ForwardTile(64, 64, 4, 1)
    monkeypatch.setitem(tiles.FORWARD_TILES["sm80"][64], "windowed", special)
    assert tiles.find_tile("forward", "sm80", 64, "windowed") == special
    assert tiles.find_tile("forward", "sm80", 64, "full") == tiles.FORWARD_TILES["sm80"][64]["default"]


def test_a_roomy_tile_may_need_more_of_a_multiprocessor_than_the_family_has(monkeypatch):
    roomy = ForwardTile(64, 64, 4, 2, 2)
    assert "per SM" in refusal(roomy, SM80, 256)
    monkeypatch.setitem(tiles.FORWARD_TILES["sm80"][256], "roomy", roomy)
    assert tiles.tile_variants("forward", "sm80", 256) == {"roomy": roomy}
    assert tiles.tile_variants("forward", "sm80", 32) == {}


def test_a_roomy_tile_must_fit_a_block(monkeypatch):
    monkeypatch.setitem(tiles.FORWARD_TILES["sm86"][256], "roomy", ForwardTile(128, 64, 8, 1))
    with pytest.raises(TileError, match="shared memory per block"):
        tiles.tile_variants("forward", "sm86", 256)


def test_backward_arithmetic():
    tile = BackwardTile(block_m=64, block_n=128, warps=8, min_blocks=1, score_stages=2)
    assert tile.keys_per_warp == 32 and tile.queries_at_once == 64
    assert tile.smem_bytes(128) == 2 * (2 * 128 * 128 + 4 * 64 * 128 + 2 * 64 * 128) + 2 * 2 * 64 * 4
    assert tile.register_floor(128) == 32 * 128 // 32 + 32 * 64 // 32 + 40
    narrow = BackwardTile(block_m=64, block_n=128, warps=4, min_blocks=1, score_stages=1)
    assert narrow.keys_per_warp == 64 and narrow.queries_at_once == 32


@pytest.mark.parametrize(
    ("tile", "words"),
    [
        (BackwardTile(64, 96, 3, 1, 2), "warps = 3, not pairs"),
        (BackwardTile(48, 64, 4, 1, 2), "block_m = 48, not 16, 32, 64 or 128"),
        (BackwardTile(64, 96, 4, 1, 2), "96 / 2 = 48, not 16, 32 or 64"),
        (BackwardTile(64, 32, 8, 1, 2), "32 / 4 = 8, not 16, 32 or 64"),
        (BackwardTile(64, 64, 4, 1, 3), "score_stages = 3, not 1 or 2"),
        (BackwardTile(128, 512, 16, 1, 1), "barriers: 1 + pairs * block_m / queries_at_once = 33"),
        (BackwardTile(16, 64, 8, 1, 2), "block_m = 16, not a multiple of the 32 rows that 8 warps copy"),
        (BackwardTile(64, 128, 8, 2, 2), "2 * (164864 + 1024) = 331776 > 167936 bytes"),
        (BackwardTile(64, 128, 8, 2, 2), "32 * (128 + 64) / 32 + 40 = 232 > min(255, 65536 / (2 * 8 * 32))"),
        (BackwardTile(128, 128, 8, 1, 2), "+ 16 * 128 = 264192 > 166912 bytes"),
    ],
)
def test_wrong_backward_tiles(tile, words):
    assert words in refusal(tile, SM80, 128)


def test_hopper_arithmetic():
    tile = HopperTile(block_m=128, block_n=80, stages=2, query_stages=1)
    assert tile.smem_bytes(256) == 2 * (128 * 256 + 4 * 80 * 256) + tile.BARRIER_BYTES
    assert tile.smem_bytes(96) == tile.smem_bytes(128)
    assert tile.register_floor(256) == 128 + 40 + 20 + tile_shapes.HOPPER_REGISTER_OVERHEAD
    narrow = HopperTile(block_m=128, block_n=80, stages=2, query_stages=1, head_dim_v=64)
    assert tile.smem_bytes(256) - narrow.smem_bytes(256) == 2 * 80 * 192 * 2


@pytest.mark.parametrize(
    ("tile", "words"),
    [
        (HopperTile(160, 64, 2, 1), "block_m = 160, not 128 or 192"),
        (HopperTile(256, 64, 2, 1), "block_m = 256, not 128 or 192"),
        (HopperTile(128, 72, 2, 1), "block_n = 72, not a multiple of 16 up to 256"),
        (HopperTile(128, 64, 1, 1), "stages = 1: the next V is waited for before this one is released"),
        (HopperTile(192, 112, 2, 1), "(dv + block_n) / 2 + block_n / 4 + overhead = 172 > 160"),
        (HopperTile(128, 128, 4, 1), "Q, K and V stages and barriers = 295168 > 232448 bytes"),
    ],
)
def test_wrong_hopper_tiles(tile, words):
    assert words in refusal(tile, SM90, 128)


def test_every_width_of_wgmma_has_an_instruction():
    widths = tiles.wgmma_columns()
    assert set(axes.HEAD_DIMS) <= set(widths)
    assert all(n % 8 == 0 and 8 <= n <= 256 for n in widths)
