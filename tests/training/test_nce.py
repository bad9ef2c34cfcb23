"""The banded losses equal the plain ones, values and gradients."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from moviola.training.nce import (
    cross_entropy,
    info_nce,
    log_sum_exp,
    paired_cross_entropy,
    sigmoid_loss,
)
from moviola.types import UsageError


def leaves(count=13, width=6, dtype=torch.float64):
    torch.manual_seed(count)
    vectors = [F.normalize(torch.randn(count, width, dtype=dtype), dim=-1) for _ in range(2)]
    scale, bias = torch.tensor(7.5, dtype=dtype), torch.tensor(-2.0, dtype=dtype)
    return [x.requires_grad_() for x in (*vectors, scale, bias)]


def same(ours, plain, chunk):
    a, b = leaves(), leaves()
    wanted, got = plain(*b), ours(*a, chunk)
    torch.testing.assert_close(got, wanted, rtol=1e-12, atol=1e-12)
    wanted.backward()
    got.backward()
    for x, y in zip(a, b, strict=True):
        assert (x.grad is None) == (y.grad is None)
        if x.grad is not None:
            torch.testing.assert_close(x.grad, y.grad, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("chunk", [1, 4, 13, 64])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_info_nce(chunk, smoothing):
    def plain(image, text, scale, bias):
        logits, own = scale * image @ text.T, torch.arange(len(image))
        return sum(F.cross_entropy(x, own, label_smoothing=smoothing) for x in (logits, logits.T)) / 2

    same(lambda i, t, s, b, c: info_nce(i, t, s, smoothing=smoothing, chunk=c), plain, chunk)


@pytest.mark.parametrize("chunk", [1, 5, 64])
def test_weighted_rows_and_columns(chunk):
    weight = torch.rand(13, dtype=torch.float64)

    def plain(image, text, scale, bias):
        logits, own = scale * image @ text.T, torch.arange(len(image))
        rows, columns = (F.cross_entropy(x, own, reduction="none") for x in (logits, logits.T))
        return (weight * rows + 2 * columns).sum()

    def ours(image, text, scale, bias, chunk):
        rows, columns = paired_cross_entropy(image, text, scale, chunk=chunk)
        return (weight * rows + 2 * columns).sum()

    same(ours, plain, chunk)


@pytest.mark.parametrize("chunk", [1, 4, 64])
def test_leaving_the_own_pair_out(chunk):
    def plain(image, text, scale, bias):
        logits = (scale * image @ text.T).masked_fill(torch.eye(13, dtype=torch.bool), -torch.inf)
        return logits.logsumexp(1).mean() + 3 * logits.logsumexp(0).mean()

    def ours(image, text, scale, bias, chunk):
        rows, columns = log_sum_exp(image, text, scale, leave_out=True, chunk=chunk)
        return rows.mean() + 3 * columns.mean()

    same(ours, plain, chunk)


@pytest.mark.parametrize("chunk", [1, 4, 64])
def test_sigmoid_loss(chunk):
    def plain(image, text, scale, bias):
        sign = 2 * torch.eye(len(image), dtype=torch.float64) - 1
        return -F.logsigmoid(sign * (scale * image @ text.T + bias)).sum() / len(image)

    same(lambda i, t, s, b, c: sigmoid_loss(i, t, s, b, chunk=c), plain, chunk)


@pytest.mark.parametrize("chunk", [1, 4, 64])
def test_cross_entropy_over_other_keys(chunk):
    target = torch.tensor([2, 0, 2, 5])

    def plain(image, text, scale, bias):
        return F.cross_entropy(scale * image[:4] @ text[:9].T, target)

    def ours(image, text, scale, bias, chunk):
        return cross_entropy(image[:4], text[:9], target, scale, chunk=chunk).mean()

    same(ours, plain, chunk)


def test_autocast_does_not_coarsen_it():
    image, text, scale, _ = leaves(dtype=torch.float32)
    wanted = info_nce(image, text, scale)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(info_nce(image, text, scale), wanted)


def test_bad_input():
    image, text, scale, _ = leaves()
    with pytest.raises(UsageError, match="one text per picture"):
        info_nce(image, text[:5], scale)
    with pytest.raises(UsageError, match="at least 2"):
        log_sum_exp(image[:1], text[:1], scale, leave_out=True)
    with pytest.raises(UsageError, match="one width"):
        log_sum_exp(image, text[:, :3], scale)
