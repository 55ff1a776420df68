"""Cross entropy against torch's, with smoothing, scale, z-loss, ignored rows and a split vocabulary."""

from __future__ import annotations

import pytest
import torch
from refusals import raises
from torch.nn import functional as F

from flash_attn.losses.cross_entropy import CrossEntropyLoss
from flash_attn.ops.triton import cross_entropy
from flash_attn.ops.triton.cross_entropy import cross_entropy_loss

ROWS, CLASSES = 37, 101


def make(dtype=torch.float32, rows=ROWS, classes=CLASSES):
    labels = torch.randint(0, classes, (rows,))
    labels[::5] = -100
    return (torch.randn(rows, classes) * 3).to(dtype).requires_grad_(), labels


def reference(logits, labels, smoothing=0.0, scale=1.0, z=0.0):
    x = logits.double() * scale
    losses = F.cross_entropy(x, labels, label_smoothing=smoothing, reduction="none")
    z_losses = z * x.logsumexp(-1).square() * (labels != -100)
    return losses + z_losses, z_losses


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("scale", [1.0, 0.7])
@pytest.mark.parametrize("z", [0.0, 0.01])
@pytest.mark.parametrize("inplace", [False, True])
def test_losses_and_gradients(smoothing, scale, z, inplace):
    check(*make(), smoothing, scale, z, inplace)


@pytest.mark.parametrize("inplace", [False, True])
def test_more_logits_than_are_taken_at_once(inplace):
    check(*make(rows=90, classes=50_000), 0.1, 0.7, 0.01, inplace)


def check(logits, labels, smoothing, scale, z, inplace):
    expected, expected_z = reference(logits, labels, smoothing, scale, z)
    weight = torch.randn(len(labels))
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


@pytest.mark.parametrize("inplace", [False, True])
def test_a_second_derivative_is_an_error(inplace):
    """Also where the incoming gradient requires none, and where it is one of several terms."""
    logits, labels = make()
    losses, _ = cross_entropy_loss(logits * 1, labels, inplace_backward=inplace)
    (gradient,) = torch.autograd.grad(losses.sum(), logits, create_graph=True)
    message = "twice cross_entropy_loss"
    with pytest.raises(NotImplementedError, match=message):
        (losses.sum() + gradient.square().sum()).backward()
    losses, _ = cross_entropy_loss(logits * 1, labels, inplace_backward=inplace)
    (gradient,) = torch.autograd.grad(losses.square().sum(), logits, create_graph=True)
    with pytest.raises(NotImplementedError, match=message):
        torch.autograd.grad(gradient.square().sum(), logits)


@pytest.mark.parametrize("backend", ["aot_eager"])
def test_under_a_compiler(backend):
    logits, labels = make()
    losses, _ = cross_entropy_loss(logits, labels)
    compiled = torch.compile(cross_entropy_loss, backend=backend, fullgraph=True)
    actual, _ = compiled(logits, labels)
    torch.testing.assert_close(actual, losses)
    (truth,) = torch.autograd.grad(losses.sum(), logits)
    torch.testing.assert_close(torch.autograd.grad(actual.sum(), logits)[0], truth)


@pytest.mark.parametrize("dtype", [torch.int32, torch.uint8, torch.int16])
def test_kinds_of_labels(dtype):
    logits, labels = make()
    labels = labels.clamp(min=0)
    assert torch.equal(cross_entropy_loss(logits, labels.to(dtype))[0], cross_entropy_loss(logits, labels)[0])


@pytest.mark.parametrize("name", ["label_smoothing", "logit_scale", "lse_square_scale"])
def test_numbers_get_no_gradient(name):
    trained = torch.tensor(0.5, requires_grad=True)
    with pytest.raises(NotImplementedError, match=f"^{name} "):
        cross_entropy_loss(*make(), **{name: trained})
    with torch.no_grad():
        expected = cross_entropy_loss(*make(), **{name: 0.5})[0]
        assert cross_entropy_loss(*make(), **{name: trained})[0].shape == expected.shape


def test_labels_that_cannot_be_read_give_nan(monkeypatch):
    """As on CUDA: no class must not look like a loss."""
    monkeypatch.setattr(cross_entropy, "are_entries_known", lambda labels: False)
    logits, labels = make()
    labels[1:3] = torch.tensor([-1, CLASSES])
    losses, _ = cross_entropy_loss(logits, labels)
    assert losses.isnan().nonzero().flatten().tolist() == [1, 2]


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
    logits, labels = make()

    def refuses(kind, name, **named):
        raises(kind, name, cross_entropy_loss, **{"logits": logits, "labels": labels} | named)

    refuses(ValueError, "logits", labels=labels[1:])
    refuses(ValueError, "logits", logits=torch.zeros(ROWS, 0))
    refuses(ValueError, "logits", logits=logits[None])
    refuses(TypeError, "logits", logits=logits.tolist())
    refuses(TypeError, "logits", logits=logits.long())
    refuses(TypeError, "logits", logits=logits * 1j)
    refuses(TypeError, "labels", labels=labels.float())
    refuses(TypeError, "labels", labels=labels.tolist())
    refuses(ValueError, "labels", labels=labels.to("meta"))
    refuses(ValueError, "labels", labels=torch.full((ROWS,), CLASSES))
    refuses(ValueError, "labels", ignore_index=-1)
    refuses(TypeError, "ignore_index", ignore_index=1.5)
    for smoothing in (-0.1, 1.1):
        refuses(ValueError, "label_smoothing", label_smoothing=smoothing)
    refuses(TypeError, "label_smoothing", label_smoothing="0.1")
    refuses(ValueError, "logit_scale", logit_scale=torch.inf)
    refuses(TypeError, "lse_square_scale", lse_square_scale=None)
    refuses(TypeError, "inplace_backward", inplace_backward="no")
    lse = torch.zeros(ROWS)
    for smoothing in (0.0, 0.1):
        refuses(ValueError, "precomputed_lse", precomputed_lse=lse[:, None], label_smoothing=smoothing)
        refuses(ValueError, "precomputed_lse", precomputed_lse=lse[:1], label_smoothing=smoothing)
        refuses(ValueError, "precomputed_lse", precomputed_lse=lse.to("meta"), label_smoothing=smoothing)
        refuses(TypeError, "precomputed_lse", precomputed_lse="lse", label_smoothing=smoothing)
        refuses(TypeError, "precomputed_lse", precomputed_lse=lse.long(), label_smoothing=smoothing)


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
