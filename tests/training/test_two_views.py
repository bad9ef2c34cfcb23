from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from moviola.training.two_views import sim_clr
from moviola.types import UsageError


def views(count: int = 5, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    a, b = torch.randn(2, count, 8, generator=generator)
    return a.requires_grad_(), b.requires_grad_()


def formula(a: torch.Tensor, b: torch.Tensor, temperature: float) -> torch.Tensor:
    """The whole matrices, the own similarities masked."""
    a, b = F.normalize(a, dim=-1), F.normalize(b, dim=-1)
    mask = 1e9 * torch.eye(len(a))
    target = torch.arange(len(a))
    ab, aa, bb = a @ b.T / temperature, a @ a.T / temperature - mask, b @ b.T / temperature - mask
    one = F.cross_entropy(torch.cat([ab, aa], 1), target)
    return (one + F.cross_entropy(torch.cat([ab.T, bb], 1), target)) / 2


@pytest.mark.parametrize("temperature", [0.1, 0.5, 1.0])
def test_it_is_the_formula(temperature: float) -> None:
    a, b = views()
    ours, wanted = sim_clr(a, b, temperature), formula(a, b, temperature)
    torch.testing.assert_close(ours, wanted, rtol=1e-5, atol=1e-6)
    for got, grad in zip(torch.autograd.grad(ours, (a, b)), torch.autograd.grad(wanted, (a, b)), strict=True):
        torch.testing.assert_close(got, grad, rtol=1e-4, atol=1e-6)


def test_lengths_do_not_matter_and_order_neither() -> None:
    a, b = views()
    order = torch.tensor([3, 1, 4, 0, 2])
    torch.testing.assert_close(sim_clr(7 * a, b / 3), sim_clr(a, b))
    torch.testing.assert_close(sim_clr(b[order], a[order]), sim_clr(a, b))


def test_equal_views_that_differ_from_others_cost_least() -> None:
    eye = torch.eye(4)
    assert sim_clr(eye, eye) < 1e-3 < sim_clr(eye, eye.roll(1, 0))


@pytest.mark.parametrize(("a", "b"), [((1, 8), (1, 8)), ((3, 8), (2, 8)), ((3, 8), (3, 4))])
def test_too_few_or_unequal(a: tuple[int, int], b: tuple[int, int]) -> None:
    with pytest.raises(UsageError, match="at least 2"):
        sim_clr(torch.ones(a), torch.ones(b))
