"""The strongest directions of a batch: values and gradients against an SVD, and where an SVD gives none."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moviola.parts.projection import primary_components
from moviola.types import UsageError


def by_svd(x_BM, count):
    mean_1M = x_BM.mean(0, keepdim=True)
    directions = torch.linalg.svd(x_BM - mean_1M, full_matrices=False)[2][:count].T
    return (x_BM - mean_1M) @ directions @ directions.T + mean_1M


@given(rows=st.integers(4, 20), columns=st.integers(3, 20), count=st.integers(1, 6), seed=st.integers(0, 99))
@settings(max_examples=60, deadline=None)
def test_values_and_gradients_are_those_of_an_svd(rows, columns, count, seed):
    generator = torch.Generator().manual_seed(seed)
    x_BM = torch.randn(rows, columns, generator=generator, dtype=torch.float64)
    weight_BM = torch.randn(rows, columns, generator=generator, dtype=torch.float64)
    if count >= min(rows - 1, columns):
        assert torch.equal(primary_components(x_BM, count), x_BM)
        return
    ours, theirs = x_BM.clone().requires_grad_(), x_BM.clone().requires_grad_()
    got, wanted = primary_components(ours, count), by_svd(theirs, count)
    torch.testing.assert_close(got, wanted, rtol=0, atol=1e-10)
    (got * weight_BM).sum().backward()
    (wanted * weight_BM).sum().backward()
    sizes = torch.linalg.svdvals(x_BM - x_BM.mean(0))[: min(rows - 1, columns)]
    if (sizes[:-1] - sizes[1:]).min() > 1e-2:  # an SVD's own gradient needs all of its gaps
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("shape", [(9, 5), (5, 9)])
def test_gradients_are_the_numerical_ones(shape):
    torch.manual_seed(0)
    x_BM = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: primary_components(x, 2), (x_BM,), fast_mode=False)


def with_strengths(strengths, rows=12, columns=8, seed=0):
    """Centred rows whose singular values are these."""
    generator = torch.Generator().manual_seed(seed)
    left = torch.randn(rows, len(strengths), generator=generator, dtype=torch.float64)
    left = torch.linalg.qr(left - left.mean(0))[0]
    right = torch.linalg.qr(torch.randn(columns, len(strengths), generator=generator, dtype=torch.float64))[0]
    return left @ torch.diag(torch.tensor(strengths, dtype=torch.float64)) @ right.T


def test_equal_strengths_among_the_kept_do_no_harm():
    """An SVD divides by zero there; the projection's gradient is the numerical one."""
    x_BM = with_strengths([3.0, 3.0, 3.0, 1.0, 0.5]).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: primary_components(x, 3), (x_BM,), fast_mode=False)
    # and equal ones among the dropped, zeros included
    x_BM = with_strengths([3.0, 2.0, 1.0, 1.0, 1.0]).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: primary_components(x, 2), (x_BM,), fast_mode=False)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_tie_between_kept_and_dropped_stays_finite(dtype):
    x_BM = with_strengths([3.0, 2.0, 2.0, 1.0]).to(dtype).requires_grad_()
    (primary_components(x_BM, 2) * torch.randn(12, 8, dtype=dtype)).sum().backward()
    assert torch.isfinite(x_BM.grad).all()
    exact = torch.zeros(8, 6, dtype=dtype)
    exact[:4, :4], exact[4:, :4] = torch.eye(4), -torch.eye(4)  # four directions, equal to the last bit
    exact.requires_grad_()
    (primary_components(exact, 2) * torch.randn(8, 6, dtype=dtype)).sum().backward()
    assert torch.isfinite(exact.grad).all()


def test_few_directions_come_back_as_they_are():
    for x_BM in (with_strengths([3.0, 2.0]), torch.ones(9, 4), torch.randn(1, 4), torch.randn(3, 9)):
        x_BM = (x_BM.float() + 5).requires_grad_()
        made = primary_components(x_BM, 2)
        torch.testing.assert_close(made, x_BM, rtol=1e-6, atol=1e-6)
        made.sum().backward()
        torch.testing.assert_close(x_BM.grad, torch.ones_like(x_BM))


@given(rows=st.integers(2, 60), seed=st.integers(0, 9))
@settings(max_examples=30, deadline=None)
def test_idempotent_and_of_low_rank(rows, seed):
    x_BM = torch.randn(rows, 12, generator=torch.Generator().manual_seed(seed))
    once = primary_components(x_BM, 4)
    torch.testing.assert_close(primary_components(once, 4), once, rtol=1e-5, atol=1e-5)
    sizes = torch.linalg.svdvals((once - once.mean(0)).double())
    assert (sizes[4:] <= 1e-5 * sizes[0]).all()
    if rows <= 5:
        assert torch.equal(once, x_BM)


def test_half_precision_comes_back_in_its_own_and_autocast_does_not_matter():
    x_BM = torch.randn(40, 12)
    wanted = primary_components(x_BM, 3)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(primary_components(x_BM, 3), wanted)
    half = primary_components(x_BM.bfloat16(), 3)
    assert half.dtype == torch.bfloat16
    torch.testing.assert_close(half.float(), wanted, rtol=0, atol=0.1)


def test_bad_input():
    for x_BM, count in ((torch.ones(3), 1), (torch.ones(3, 2), 0)):
        with pytest.raises(UsageError, match="at least one direction"):
            primary_components(x_BM, count)
    for bad in (math.nan, math.inf):
        with pytest.raises(UsageError, match="NaN or infinity"):
            primary_components(torch.full((9, 4), bad), 2)
