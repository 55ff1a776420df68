"""Cross entropy against torch's, with smoothing, scale, z-loss, ignored rows and a split vocabulary."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from flash_attn.losses.cross_entropy import CrossEntropyLoss
from flash_attn.ops.triton import cross_entropy
from flash_attn.ops.triton.cross_entropy import cross_entropy_loss

ROWS, CLASSES = 37, 101


def make(dtype=torch.float32):
    labels = torch.randint(0, CLASSES, (ROWS,))
    labels[::5] = -100
    return (torch.randn(ROWS, CLASSES) * 3).to(dtype).requires_grad_(), labels


def reference(logits, labels, smoothing=0.0, scale=1.0, z=0.0):
    x = logits.double() * scale
    losses = F.cross_entropy(x, labels, label_smoothing=smoothing, reduction="none")
    z_losses = z * x.logsumexp(-1).square() * (labels != -100)
    return losses + z_losses, z_losses


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("scale", [1.0, 0.7])
@pytest.mark.parametrize("z", [0.0, 0.01])
@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("blocks", [None, 3 * CLASSES])
def test_losses_and_gradients(monkeypatch, smoothing, scale, z, inplace, blocks):
    if blocks:
        monkeypatch.setattr(cross_entropy, "LOGITS_AT_ONCE", blocks)
    logits, labels = make()
    expected, expected_z = reference(logits, labels, smoothing, scale, z)
    weight = torch.randn(ROWS)
    (truth,) = torch.autograd.grad((expected * weight).sum(), logits)
    losses, z_losses = cross_entropy_loss(
        logits,
        labels,
        label_smoothing=smoothing,
        logit_scale=scale,
        lse_square_scale=z,
        inplace_backward=inplace,
    )
    assert losses.dtype == torch.float32 and not z_losses.requires_grad
    torch.testing.assert_close(losses.double(), expected, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(z_losses.double(), expected_z, atol=1e-5, rtol=1e-5)
    (actual,) = torch.autograd.grad((losses * weight).sum(), logits)
    torch.testing.assert_close(actual, truth, atol=1e-5, rtol=1e-5)
    assert (actual.data_ptr() == logits.data_ptr()) == inplace


def test_bf16():
    logits, labels = make(torch.bfloat16)
    losses, _ = cross_entropy_loss(logits, labels)
    assert losses.dtype == torch.float32
    torch.testing.assert_close(losses.double(), reference(logits, labels)[0], atol=1e-5, rtol=1e-5)
    losses.sum().backward()
    assert logits.grad.dtype == torch.bfloat16


def test_a_second_derivative_is_an_error():
    logits, labels = make()
    losses, _ = cross_entropy_loss(logits, labels)
    (gradient,) = torch.autograd.grad(losses.square().sum(), logits, create_graph=True)
    with pytest.raises(RuntimeError, match="differentiate twice"):
        gradient.square().sum().backward()


def test_precomputed_lse_is_not_computed_again():
    logits, labels = make()
    lse = logits.detach().logsumexp(-1)
    expected, _ = cross_entropy_loss(logits, labels)
    assert torch.allclose(
        cross_entropy_loss(logits, labels, lse + 1.0)[0], (expected + 1.0) * (labels != -100)
    )
    with torch.profiler.profile() as profile:
        cross_entropy_loss(logits, labels, lse)
    assert not any("logsumexp" in event.name for event in profile.events())


def test_precomputed_lse():
    logits, labels = make()
    lse = logits.detach().logsumexp(-1)
    assert torch.allclose(cross_entropy_loss(logits, labels, lse)[0], cross_entropy_loss(logits, labels)[0])


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_module(reduction):
    logits, labels = make()
    expected = F.cross_entropy(logits, labels, reduction=reduction)
    torch.testing.assert_close(CrossEntropyLoss(reduction=reduction)(logits, labels), expected)
    loss, z_loss = CrossEntropyLoss(reduction=reduction, lse_square_scale=0.1, return_z_loss=True)(
        logits, labels
    )
    torch.testing.assert_close(loss - z_loss, expected, atol=1e-4, rtol=1e-4)


def test_no_rows():
    losses, _ = cross_entropy_loss(torch.zeros(0, 5), torch.zeros(0, dtype=torch.long))
    assert losses.shape == (0,)


def test_bad_input():
    with pytest.raises(ValueError, match=r"^reduction must be one of"):
        CrossEntropyLoss(reduction="median")
    with pytest.raises(ValueError, match=r"^logits must be"):
        cross_entropy_loss(torch.zeros(3, 5), torch.zeros(4, dtype=torch.long))


def worker(rank, path, logits, labels, results):
    torch.distributed.init_process_group("gloo", init_method=f"file://{path}", rank=rank, world_size=2)
    part = logits.chunk(2, dim=1)[rank].clone().requires_grad_()
    group = torch.distributed.group.WORLD
    losses, _ = cross_entropy_loss(
        part, labels, label_smoothing=0.1, lse_square_scale=0.01, process_group=group
    )
    losses.sum().backward()
    results[rank] = losses.detach(), part.grad
    torch.distributed.destroy_process_group()


@pytest.mark.skipif(not torch.distributed.is_available(), reason="torch without distributed")
def test_split_vocabulary(tmp_path):
    # Not fork: a child of a process whose thread pools are at work, as after other tests, may hang.
    context = torch.multiprocessing.get_context("spawn")
    logits, labels = torch.randn(ROWS, 100), torch.randint(0, 100, (ROWS,))
    labels[3] = -100
    whole = logits.clone().requires_grad_()
    losses, _ = cross_entropy_loss(whole, labels, label_smoothing=0.1, lse_square_scale=0.01)
    losses.sum().backward()
    with context.Manager() as manager:
        results = manager.dict()
        arguments = (tmp_path / "store", logits, labels, results)
        processes = [context.Process(target=worker, args=(rank, *arguments)) for rank in range(2)]
        for process in processes:
            process.start()
        for process in processes:
            process.join(60)
            assert process.exitcode == 0
        parts = [results[rank] for rank in range(2)]
    for part_losses, _ in parts:
        torch.testing.assert_close(part_losses, losses.detach())
    torch.testing.assert_close(torch.cat([grad for _, grad in parts], dim=1), whole.grad)
