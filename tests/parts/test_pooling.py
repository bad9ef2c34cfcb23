from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from moviola.parts.pooling import (
    PoolerWeights,
    cosine_scores,
    fold_videos,
    folded_scores,
    frame_weights,
    pooler_scores,
    softmax_pool,
    softmax_pool_scores,
    topk_pool,
)
from moviola.types import UsageError


def pooler(width, heads, seed, dtype=torch.float64, spread=1.0):
    """A pooler whose every number is random, LayerNorms and biases too."""
    torch.manual_seed(seed)
    norms = [nn.LayerNorm(width, eps=eps) for eps in (1e-5, 1e-3, 1e-6)]
    linears = [nn.Linear(width, width) for _ in range(5)]
    for module in (*norms, *linears):
        for parameter in module.parameters():
            nn.init.normal_(parameter, std=spread * (width**-0.5 if parameter.ndim == 2 else 0.5))
        module.to(dtype).requires_grad_(False)
    q, k, v, o, r = linears
    return PoolerWeights(norms[0], q, k, v, o, norms[1], r, norms[2], heads)


def written_out(text_ND, frames_MTD, w, mask_MT=None):
    """The pooler as the paper writes it, one video at a time."""
    rows = []
    for m, frames_TD in enumerate(frames_MTD):
        if mask_MT is not None:
            frames_TD = frames_TD[mask_MT[m]]
        q = w.query(w.norm_in(text_ND)).unflatten(-1, (w.heads, -1))
        k = w.key(w.norm_in(frames_TD)).unflatten(-1, (w.heads, -1))
        v = w.value(w.norm_in(frames_TD)).unflatten(-1, (w.heads, -1))
        attention = (torch.einsum("nhk,thk->nht", q, k) / math.sqrt(q.shape[-1])).softmax(-1)
        a = w.norm_mid(w.out(torch.einsum("nht,thk->nhk", attention, v).flatten(1)))
        pooled_ND = w.norm_out(a + w.residual(a))
        rows.append(F.cosine_similarity(text_ND, pooled_ND, dim=-1))
    return torch.stack(rows, dim=1)


@settings(deadline=None, max_examples=60)
@given(
    seed=st.integers(0, 10**6),
    texts=st.integers(1, 5),
    videos=st.integers(1, 5),
    frames=st.integers(1, 6),
    heads=st.sampled_from([1, 2, 4]),
    masked=st.booleans(),
    memory=st.sampled_from([1, 2**28]),
)
def test_fast_form_equals_the_written_out_form(seed, texts, videos, frames, heads, masked, memory):
    weights = pooler(16, heads, seed)
    text_ND = torch.randn(texts, 16, dtype=torch.float64)
    frames_MTD = torch.randn(videos, frames, 16, dtype=torch.float64) * 3
    mask_MT = None
    if masked:
        mask_MT = torch.rand(videos, frames) < 0.6
        mask_MT[torch.arange(videos), torch.randint(frames, (videos,))] = True
        frames_MTD[~mask_MT] = math.nan  # what a masked frame holds must not matter
    got = pooler_scores(text_ND, frames_MTD, weights, mask_MT, memory=memory)
    torch.testing.assert_close(got, written_out(text_ND, frames_MTD, weights, mask_MT), rtol=0, atol=1e-12)


@pytest.mark.parametrize("heads", [1, 8])
def test_single_precision_at_paper_width(heads):
    weights = pooler(512, heads, 3, torch.float32)
    text_ND, frames_MTD = torch.randn(20, 512), torch.randn(15, 12, 512)
    exact = written_out(text_ND.double(), frames_MTD.double(), pooler(512, heads, 3))
    got, plain = pooler_scores(text_ND, frames_MTD, weights), written_out(text_ND, frames_MTD, weights)
    assert (got - exact).abs().max() < 1e-6
    assert (got - exact).abs().max() < 4 * (plain - exact).abs().max() + 1e-7


def test_frames_that_nearly_cancel_keep_their_precision():
    """The attended vector is 1e-3 of its parts: a Gram matrix in single precision would lose it."""
    weights = pooler(64, 1, 5, torch.float32)
    weights.norm_in.bias.zero_()
    weights.value.bias.zero_()
    weights.out.bias.zero_()
    weights.query.weight.mul_(1e-4), weights.query.bias.zero_()
    one = torch.randn(6, 1, 64)
    frames_MTD = torch.cat([one, -one + 1e-3 * torch.randn(6, 1, 64)], dim=1)
    double = [m.double() if isinstance(m, nn.Module) else m for m in copy_of(weights)]
    exact = written_out(torch.eye(4, 64).double(), frames_MTD.double(), PoolerWeights(*double))
    plain = written_out(torch.eye(4, 64), frames_MTD, weights)
    got = pooler_scores(torch.eye(4, 64), frames_MTD, weights)
    assert (got - exact).abs().max() < 3 * (plain - exact).abs().max() + 1e-6


def copy_of(weights):
    import copy

    return [copy.deepcopy(getattr(weights, name)) for name in weights.__dataclass_fields__]


def test_layer_norm_epsilon_is_exact_where_it_rules():
    """Tiny attended vectors: the variance is far below eps in one LayerNorm and the shift in the other."""
    weights = pooler(16, 2, 7)
    for linear in (weights.value, weights.out):
        linear.weight.mul_(1e-3), linear.bias.mul_(1e-3)
    text_ND = torch.randn(3, 16, dtype=torch.float64)
    frames_MTD = torch.randn(4, 5, 16, dtype=torch.float64)
    got = pooler_scores(text_ND, frames_MTD, weights)
    torch.testing.assert_close(got, written_out(text_ND, frames_MTD, weights), rtol=0, atol=1e-12)


def test_folded_videos_serve_any_number_of_queries():
    weights = pooler(16, 2, 1)
    text_ND = torch.randn(7, 16, dtype=torch.float64)
    frames_MTD = torch.randn(4, 5, 16, dtype=torch.float64)
    folded = fold_videos(frames_MTD, weights)
    one_by_one = torch.cat([folded_scores(text_ND[n : n + 1], folded, weights) for n in range(7)])
    torch.testing.assert_close(one_by_one, pooler_scores(text_ND, frames_MTD, weights), rtol=0, atol=1e-12)


def test_zero_vectors_score_zero_and_never_nan():
    weights = pooler(16, 1, 4)
    for norm in (weights.norm_in, weights.norm_mid, weights.norm_out):
        norm.bias.zero_()
    for linear in (weights.value, weights.out, weights.residual):
        linear.bias.zero_()
    text_ND = torch.randn(3, 16, dtype=torch.float64)
    text_ND[1] = 0
    frames_MTD = torch.randn(2, 4, 16, dtype=torch.float64)
    frames_MTD[1] = 0
    for scores_NM in (
        pooler_scores(text_ND, frames_MTD, weights),
        softmax_pool_scores(text_ND, frames_MTD, 0.01),
    ):
        assert torch.isfinite(scores_NM).all()
        assert (scores_NM[1] == 0).all()
        assert (scores_NM[:, 1] == 0).all()
        assert (scores_NM[0, 0] != 0).all()


@settings(deadline=None, max_examples=40)
@given(seed=st.integers(0, 10**6), masked=st.booleans(), memory=st.sampled_from([1, 2**28]))
def test_softmax_pooling_fast_equals_written_out(seed, masked, memory):
    torch.manual_seed(seed)
    text_ND = F.normalize(torch.randn(5, 16, dtype=torch.float64), dim=-1)
    frames_MTD = F.normalize(torch.randn(4, 6, 16, dtype=torch.float64), dim=-1)
    mask_MT = None
    if masked:
        mask_MT = torch.rand(4, 6) < 0.6
        mask_MT[:, 2] = True
        frames_MTD[~mask_MT] = math.nan
    wanted = cosine_scores(text_ND, softmax_pool(text_ND, frames_MTD, 0.05, mask_MT))
    assert torch.isfinite(wanted).all()
    got = softmax_pool_scores(text_ND, frames_MTD, 0.05, mask_MT, memory=memory)
    torch.testing.assert_close(got, wanted, rtol=0, atol=1e-12)


def test_topk_pooling_sums_the_nearest_frames():
    text_ND = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    frames_MTD = torch.tensor([[[3.0, 0.0], [2.0, 1.0], [0.0, 5.0]]])
    assert topk_pool(text_ND, frames_MTD, 2).tolist() == [[[5.0, 1.0], [2.0, 6.0]]]
    assert torch.equal(topk_pool(text_ND, frames_MTD, 3), frames_MTD.sum(1, keepdim=True).expand(1, 2, 2))
    mask_MT = torch.tensor([[True, False, False]])
    assert topk_pool(text_ND, frames_MTD, 2, mask_MT).tolist() == [[[3.0, 0.0], [3.0, 0.0]]]
    with pytest.raises(UsageError, match="between 1 and the 3"):
        topk_pool(text_ND, frames_MTD, 4)


def test_frame_weights_are_the_attention():
    weights = pooler(16, 4, 9)
    text_ND, frames_MTD = torch.randn(3, 16).double(), torch.randn(2, 5, 16).double()
    mask_MT = torch.tensor([[True] * 5, [True, True, False, False, False]])
    got = frame_weights(text_ND, frames_MTD, weights, mask_MT)
    assert got.shape == (3, 2, 5)
    torch.testing.assert_close(got.sum(-1), torch.ones(3, 2).double())
    assert (got[:, 1, 2:] == 0).all()


BAD = {
    "widths differ": (torch.ones(2, 8), torch.ones(3, 4, 16), None, "same width"),
    "frames not 3-D": (torch.ones(2, 16), torch.ones(3, 16), None, "same width"),
    "no frames": (torch.ones(2, 16), torch.ones(3, 0, 16), None, "at least one frame"),
    "NaN text": (torch.full((2, 16), math.nan), torch.ones(3, 4, 16), None, "NaN"),
    "NaN frame": (torch.ones(2, 16), torch.full((3, 4, 16), math.nan), None, "NaN"),
    "mask shape": (torch.ones(2, 16), torch.ones(3, 4, 16), torch.ones(3, 5).bool(), "mask must be bool"),
    "all masked": (
        torch.ones(2, 16),
        torch.ones(3, 4, 16),
        torch.zeros(3, 4).bool(),
        "3 videos have no real",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input(name):
    text, frames, mask, said = BAD[name]
    with pytest.raises(UsageError, match=said):
        pooler_scores(text, frames, pooler(16, 1, 0, torch.float32), mask)
    with pytest.raises(UsageError, match=said):
        softmax_pool_scores(text, frames, 0.01, mask)


def test_no_texts_or_no_videos_give_an_empty_matrix():
    weights = pooler(16, 1, 0, torch.float32)
    assert pooler_scores(torch.ones(0, 16), torch.ones(3, 4, 16), weights).shape == (0, 3)
    assert pooler_scores(torch.ones(2, 16), torch.ones(0, 4, 16), weights).shape == (2, 0)
