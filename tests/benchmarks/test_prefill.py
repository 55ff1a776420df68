"""The benchmark of chunked prefill: its rows and what they count."""

from benchmarks import prefill
from benchmarks.providers import OURS, TORCH_FA2


def test_chunks_are_heads_by_sizes():
    chunks = list(prefill.chunks())
    assert len(chunks) == len(set(chunks)) == len(prefill.HEADS) * len(prefill.SIZES)
    assert all(chunk.num_heads % chunk.num_heads_k == 0 and chunk.queries <= chunk.keys for chunk in chunks)


def test_flops_count_the_keys_that_each_query_sees():
    chunk = prefill.Chunk(num_heads=2, num_heads_k=1, queries=3, keys=5)
    keys_seen = 3 + 4 + 5
    assert chunk.flops == 2 * 2 * 128 * 2 * keys_seen


def test_a_row_has_our_speed_and_the_time_of_others_over_ours():
    sizes = {"num_heads": 32, "num_heads_k": 8, "queries": 2048, "keys": 32768}
    row = prefill.cells({**sizes, "us": {OURS: 1000.0, TORCH_FA2: 1500.0}})
    flops = prefill.Chunk(**sizes).flops
    assert list(row.values()) == ["32/8", "2048", "32768", "1000.0", f"{flops / 1e9:.0f}", "1.50"]
