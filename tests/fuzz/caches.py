"""Families of attention over KV caches and pages."""

from __future__ import annotations

from dataclasses import replace

import torch
from layouts import Placed
from oracle import Options, attention, rotated, varlen_attention
from torch import Tensor

import flash_attn

from .case import Case, need, same_bits

GARBAGE = (-1, 10**6, -(2**31), 2**31 - 1)


def caches(case: Case, shape: tuple[int, ...], head_dims: tuple[int, int]) -> list[Placed]:
    return [case.cache(*shape, d) for d in head_dims]


def pages(case: Case, needed: list[int], page_size: int) -> tuple[list[list[int]], int]:
    """Return a block table with room for so many keys of each sequence, and the number of pages.

    What it has no need of is garbage.
    """
    counts = [-(-n // page_size) for n in needed]
    width, count = max(counts) + case.pick(0, 0, 2), sum(counts) + case.pick(0, 1, 4)
    free = list(range(max(count, 1)))
    case.rng.shuffle(free)
    table = [[free.pop() for _ in range(n)] + [case.pick(*GARBAGE) for _ in range(width - n)] for n in counts]
    return table, max(count, 1)


def places(table: list[list[int]] | None, page_size: int, entry: int, i: int, keys: range) -> tuple:
    """Return entry and row of a sequence's keys."""
    if table is None:
        return [entry] * len(keys), list(keys)
    return [table[i][key // page_size] for key in keys], [key % page_size for key in keys]


def blot(case: Case, cache: Placed, used: list[tuple]) -> None:
    """Fill what no sequence uses with NaN."""
    keep = torch.zeros(cache.view.shape[:2], dtype=torch.bool, device=case.device)
    for entries, rows in used:
        keep[entries, rows] = True
    cache.view.masked_fill_(~keep[..., None, None], torch.nan)


def paged(case: Case) -> None:
    """flash_attn_varlen_func over pages, with seqused_k or without."""
    batch, (heads, heads_k), (d, dv) = case.pick(1, 2, 4), case.heads(), case.head_dims()
    lengths_q, lengths_k = case.lengths(batch, heads)
    used = [case.rng.randint(0, n) for n in lengths_k] if case.chance(0.5) else None
    page_size = case.pick(16, 16, 32, 48, 64)
    table, count = pages(case, lengths_k, page_size)
    if not table[0]:
        return
    longest, tail = (max(lengths_q), max(lengths_k)), case.pick(0, 0, 3)
    options = case.options(heads, batch, longest, plain=True)
    case.note(batch=batch, page_size=page_size, used=used, tail=tail)
    where = [
        places(table, page_size, 0, i, range(n)) for i, n in enumerate(lengths_k if used is None else used)
    ]
    stores = caches(case, (count, page_size, heads_k), (d, dv))
    for x in stores:
        blot(case, x, where)
        case.inputs.append((x.buffer, x.buffer.clone()))
    q, bounds = (
        case.tensor(sum(lengths_q) + tail, heads, d),
        (case.bounds(lengths_q), case.bounds(lengths_k)),
    )
    named = options.arguments() | {"s_aux": options.sinks, "return_attn_probs": True}
    if used is not None:
        named["seqused_k"] = case.index(used)
    if case.chance(0.3):
        named["out"] = case.output(*q.shape[:-1], dv)
    block_table = case.index(table)
    out, lse, *_ = case.run(
        lambda: flash_attn.flash_attn_varlen_func(
            q, *(x.view for x in stores), *bounds, *longest, block_table=block_table, **named
        )
    )
    packed = [torch.cat([x.view[at] for at in where]) for x in stores]
    lengths = lengths_k if used is None else used
    case.check_forward(
        lambda *x: varlen_attention(*x[:3], lengths_q, lengths, options, x[3]), (q, *packed), out, lse
    )
    case.check_memory()


def rotary_tables(case: Case, rows: int, d: int) -> tuple[Tensor, Tensor, bool]:
    """Return cos and sin (rows, rotary_dim / 2) and whether pairs are interleaved."""
    half, interleaved = 8 * case.rng.randint(1, d // 16), case.chance(0.5)
    case.note(rotary=(2 * half, interleaved))
    angles = torch.rand((rows, half), generator=case.generator, device=case.device) * 6
    return angles.cos().to(case.dtype), angles.sin().to(case.dtype), interleaved


def kvcache(case: Case) -> None:
    """flash_attn_with_kvcache: appending, rotation, pages, rows by index, padding, split keys."""
    batch, (heads, heads_k), (d, dv) = case.pick(1, 1, 2, 3), case.heads(), case.head_dims()
    sq, room = case.pick(0, 1, 1, 1, 2, 5, 17, 64, 70, 100), case.pick(1, 16, 17, 64, 100, 129, 200)
    new = min(case.pick(0, 1, 1, 3, 17), room) if case.chance(0.6) else None
    page_size = case.pick(16, 32, 48) if case.chance(0.45) else 0
    lengths = [case.pick(0, room - (new or 0), case.rng.randint(0, room - (new or 0))) for _ in range(batch)]
    if as_int := case.chance(0.2):
        lengths = [lengths[0]] * batch
    ends = [n + (new or 0) for n in lengths]
    table = index = pads = None
    if page_size:
        table, count = pages(case, [max(n, 1) for n in ends], page_size)
        shape = count, page_size, heads_k
    else:
        shape = batch + case.pick(0, 2), room, heads_k
        index = case.rng.sample(range(shape[0]), batch) if case.chance(0.3) else None
        pads = [case.rng.randint(0, n) for n in lengths] if case.chance(0.25) else None
    options = case.options(heads, batch, (sq, room), plain=True)
    splits = case.pick(0, 0, 1, 2, 7, 128)
    case.note(
        batch=batch, sq=sq, room=room, new=new, page_size=page_size, kv_lengths=lengths, as_int=as_int,
        index=index, pads=pads, splits=splits,
    )  # fmt: skip
    entries = index or list(range(batch))
    where = [
        places(table, page_size, entries[i], i, range(pads[i] if pads else 0, n)) for i, n in enumerate(ends)
    ]
    stores = caches(case, shape, (d, dv))
    for x in stores:
        blot(case, x, where)
    q = case.tensor(batch, sq, heads, d)
    named = options.arguments() | {"s_aux": options.sinks}
    del named["dropout_p"]
    news = [] if new is None else [case.tensor(batch, new, heads_k, n) for n in (d, dv)]
    tables = rotary_tables(case, max(ends) + sq + 1, d) if news and d >= 16 and case.chance(0.5) else None
    if tables:
        named |= dict(zip(("rotary_cos", "rotary_sin", "rotary_interleaved"), tables, strict=True))
    if case.chance(0.3):
        named["out"] = case.output(batch, sq, heads, dv)
    for name, x in (("cache_batch_idx", index), ("cache_leftpad", pads), ("block_table", table)):
        named[name] = None if x is None else case.index(x)
    seqlens = lengths[0] if as_int else case.index(lengths)
    before = [x.buffer.clone() for x in stores]
    out, lse = case.run(
        lambda: flash_attn.flash_attn_with_kvcache(
            q, *(x.view for x in stores), *news, cache_seqlens=seqlens, num_splits=splits,
            return_softmax_lse=True, **named,
        )
    )  # fmt: skip
    check_appended(case, stores, before, news, tables, lengths, lambda i, keys: places(
        table, page_size, entries[i], i, keys
    ))  # fmt: skip
    check_cache_result(case, q, stores, where, tables, lengths, options, out, lse)
    case.check_memory()


def check_appended(case: Case, stores, before, news, tables, lengths, at) -> None:
    """Check that the caches hold what was appended, and everywhere else the bits that they had."""
    names = zip(stores, before, news or (None, None), (tables, None), strict=True)
    for x, buffer, new, turned in names:
        expected = x.like(buffer)
        for i, n in enumerate(lengths if new is not None else ()):
            keys, cells = range(n, n + new.shape[1]), at(i, range(n, n + new.shape[1]))
            found = x.view[cells]
            if turned is None:
                need(same_bits(found, new[i].resolve_neg()), "what was appended is not what was given")
            else:
                exact = turn(new[i], turned, torch.tensor(keys, device=case.device))
                error, eps = (found.double() - exact).abs(), torch.finfo(case.dtype).eps
                need((error <= eps * exact.abs() + 1e-5).all(), "appended keys are not rotated right")
            expected[cells] = found
        need(same_bits(x.buffer, buffer), "the cache was written to where nothing is appended")


def turn(x: Tensor, tables: tuple, positions: Tensor) -> Tensor:
    return rotated(x, *tables[:2], positions.long(), tables[2])


def check_cache_result(case: Case, q, stores, where, tables, lengths, options: Options, out, lse) -> None:
    """Compare each sequence with attention over its cells; rotated queries are rounded as a kernel does."""
    moves = options.causal or max(options.window_size) >= 0
    for i, cells in enumerate(where):
        mine, queries = options, q[i]
        if tables is not None:
            steps = torch.arange(len(queries), device=case.device) * moves
            queries = turn(queries, tables, lengths[i] + steps).to(case.dtype)
        if options.alibi_slopes is not None and options.alibi_slopes.dim() == 2:
            mine = replace(mine, alibi_slopes=options.alibi_slopes[i])
        parts = queries[None], *(x.view[cells][None] for x in stores)

        def reference(*x: Tensor, mine: Options = mine) -> tuple[Tensor, Tensor]:
            return attention(*x[:3], mine, x[3])

        case.check_forward(reference, parts, out[i : i + 1], lse[i : i + 1])
