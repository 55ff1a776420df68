"""Families beside attention: rotation, padding, the loss."""

from __future__ import annotations

from itertools import accumulate

import torch
from oracle import rotated

from flash_attn import bert_padding
from flash_attn.layers.rotary import apply_rotary_emb, apply_rotary_emb_kv_, apply_rotary_emb_qkv_
from flash_attn.losses.cross_entropy import CrossEntropyLoss

from .case import Case, need, same_bits

HELD = ("contiguous", "offset by an element", "odd rows", "sliced", "heads first")


def rotary(case: Case) -> None:
    """layers.rotary: fixed length, packed sequences, q, k and v in one; in place or not; gradients."""
    batch, heads, kind = case.pick(1, 2, 4), case.pick(1, 2, 5), case.pick("plain", "varlen", "qkv", "kv")
    d = case.rng.randint(2, 256) if case.chance(0.5) else 8 * case.rng.randint(1, 32)
    half = case.rng.randint(1, d // 2) if case.chance(0.4) else max(1, d // 16 * 8)
    lengths = [case.rng.randint(0, 40) for _ in range(batch)]
    lengths = lengths if kind == "varlen" else [max(lengths)] * batch
    starts = [case.rng.randint(0, 9) for _ in range(batch)]
    offset = case.index(starts) if case.chance(0.4) else starts[0]
    starts = starts if isinstance(offset, torch.Tensor) else [offset] * batch
    angles = torch.rand((64, half), generator=case.generator, device=case.device) * 6
    kind_of_table = case.pick(case.dtype, torch.float32) if case.dtype.itemsize == 2 else case.dtype
    cos, sin = angles.cos().to(kind_of_table), angles.sin().to(kind_of_table)
    interleaved, inplace = case.chance(0.5), case.chance(0.4)
    case.note(kind=kind, lengths=lengths, heads=heads, d=d, half=half, starts=starts, interleaved=interleaved,
              inplace=inplace, tables=str(kind_of_table), as_int=isinstance(offset, int))  # fmt: skip

    def turned(x: torch.Tensor, back: bool = False) -> torch.Tensor:
        parts = x.split(lengths) if kind == "varlen" else x
        pairs = zip(parts, lengths, starts, strict=True)
        found = [
            rotated(part, cos, -sin if back else sin, start + torch.arange(n, device=x.device), interleaved)
            for part, n, start in pairs
        ]
        return torch.cat(found) if kind == "varlen" else torch.stack(found)

    def check(name: str, x: torch.Tensor, exact: torch.Tensor) -> None:
        need(x.shape == exact.shape and x.dtype == case.dtype, f"{name} is a tensor of another kind")
        summed = torch.finfo(torch.promote_types(case.dtype, torch.float32)).eps
        allowed = torch.finfo(case.dtype).eps * exact.abs() + summed * 8  # of values below 8
        need(((x.double() - exact).abs() <= allowed).all(), f"{name} is off")

    if kind in ("qkv", "kv"):
        x = case.placed((batch, lengths[0], 3 if kind == "qkv" else 2, heads, d), "contiguous").view
        before, last = x.clone(), 2 if kind == "qkv" else 1
        function = apply_rotary_emb_qkv_ if kind == "qkv" else apply_rotary_emb_kv_
        out = function(x, cos, sin, interleaved=interleaved, seqlen_offsets=offset)
        for j in range(last):
            check("rotated", out[:, :, j], turned(before[:, :, j]))
        need(same_bits(out[:, :, last], before[:, :, last]), "v has changed")
        return
    shape = (sum(lengths), heads, d) if kind == "varlen" else (batch, lengths[0], heads, d)
    named = {}
    if kind == "varlen":
        named = {"cu_seqlens": case.index([0, *accumulate(lengths)]), "max_seqlen": max(lengths)}
    placed = case.placed(shape, case.pick(*HELD))
    before = placed.view.clone()
    surroundings = placed.buffer.clone()
    leaf = placed.view.detach() if inplace else placed.view.detach().requires_grad_()
    out = apply_rotary_emb(leaf, cos, sin, interleaved, inplace, offset, **named)
    check("rotated", out.detach(), turned(before))
    if inplace:
        need(out.data_ptr() == placed.view.data_ptr(), "the result is not in place")
        placed.like(surroundings).copy_(out)
    else:
        dout = torch.randn(shape, generator=case.generator, device=case.device).to(case.dtype)
        check("gradient", torch.autograd.grad(out, leaf, dout)[0], turned(dout, back=True))
    need(same_bits(placed.buffer, surroundings), "memory beside what is rotated was written to")


def padding(case: Case) -> None:
    """bert_padding: what is unpadded and padded again, and gradients."""
    batch, seqlen, n = case.pick(1, 2, 5), case.rng.randint(1, 40), case.rng.randint(1, 9)
    x = torch.randn((batch, seqlen, n), generator=case.generator, device=case.device).to(case.dtype)
    x.requires_grad_()
    mask = torch.rand(batch, seqlen, generator=case.generator, device=case.device) < case.pick(0.0, 0.4, 1.0)
    case.note(batch=batch, seqlen=seqlen, n=n)
    hidden, indices, bounds, longest, used = bert_padding.unpad_input(
        x, mask.to(case.pick(torch.bool, torch.int))
    )
    lengths = mask.sum(-1).tolist()
    need(torch.equal(hidden, x.flatten(0, 1)[mask.flatten()]), "unpad_input takes other rows")
    need(bounds.tolist() == [0, *accumulate(lengths)] and used.tolist() == lengths, "lengths are wrong")
    need(longest == max(lengths), "max_seqlen is wrong")
    again = bert_padding.pad_input(hidden, indices, batch, seqlen)
    need(torch.equal(again, x * mask[..., None]), "pad_input does not undo unpad_input")
    (gradient,) = torch.autograd.grad(again, x, torch.ones_like(again))
    need(torch.equal(gradient, mask[..., None].expand_as(x).to(x.dtype)), "the gradient of padding is wrong")


def loss(case: Case) -> None:
    """losses.cross_entropy against its formula in fp64."""
    rows, classes = case.rng.randint(1, 40), case.pick(1, 2, 17, 1000)
    smoothing, scale, of_lse = case.pick(0.0, 0.1), case.pick(1.0, 0.5), case.pick(0.0, 1e-2)
    reduction = case.pick("mean", "sum", "none")
    case.note(
        rows=rows, classes=classes, smoothing=smoothing, scale=scale, of_lse=of_lse, reduction=reduction
    )
    x = (torch.randn((rows, classes), generator=case.generator, device=case.device) * 3).to(case.dtype)
    labels = torch.randint(0, classes, (rows,), generator=case.generator, device=case.device)
    labels[torch.rand(rows, generator=case.generator, device=case.device) < 0.2] = -100
    labels[0] = classes - 1
    exact = x.double().requires_grad_()
    scores, counted = exact * scale, labels != -100
    lse, chosen = scores.logsumexp(-1), scores.gather(1, labels.clamp(min=0)[:, None])[:, 0]
    each = lse - (1 - smoothing) * chosen - smoothing * scores.mean(-1) + of_lse * lse.square()
    each = torch.where(counted, each, 0.0)
    truth = {"none": each, "sum": each.sum(), "mean": each.sum() / counted.sum()}[reduction]
    x.requires_grad_()
    function = CrossEntropyLoss(
        reduction=reduction, label_smoothing=smoothing, logit_scale=scale, lse_square_scale=of_lse,
        inplace_backward=case.chance(0.3),
    )  # fmt: skip
    found = function(x, labels)
    need(torch.allclose(found.double(), truth, atol=1e-4, rtol=1e-4), "the loss is off")
    dloss = torch.randn(found.shape, generator=case.generator, device=case.device).to(found.dtype)
    (expected,) = torch.autograd.grad(truth, exact, dloss.double())
    (gradient,) = torch.autograd.grad(found, x, dloss)
    eps = torch.finfo(case.dtype).eps
    error = (gradient.double() - expected).abs()
    need((error <= eps * expected.abs() + 1e-5 * (1 + expected.abs().max())).all(), "the gradient is off")
