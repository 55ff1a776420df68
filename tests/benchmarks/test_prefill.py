"""The benchmark of chunked prefill: its rows and what they count."""

from benchmarks import prefill


def test_chunks_are_heads_by_sizes():
    chunks = list(prefill.chunks())
    assert len(chunks) == len(set(chunks)) == len(prefill.HEADS) * len(prefill.SIZES)
    assert all(chunk.num_heads % chunk.num_heads_k == 0 and chunk.queries <= chunk.keys for chunk in chunks)


def test_flops_count_the_keys_that_each_query_sees():
    chunk = prefill.Chunk(num_heads=2, num_heads_k=1, queries=3, keys=5)
    keys_seen = 3 + 4 + 5
    assert chunk.flops == 2 * 2 * 128 * 2 * keys_seen
