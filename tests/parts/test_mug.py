from __future__ import annotations

import json
import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from moviola.parts import mug
from moviola.parts.mug import best_match_scores, mug_scores
from moviola.types import UsageError

INF = math.inf


@pytest.fixture(scope="module")
def oracle(oracles_dir):
    folder = oracles_dir / "07-mug-stan"
    return json.loads((folder / "a.json").read_text()), load_file(folder / "a.safetensors")


def same(got, wanted, tolerance, name):
    assert got.shape == wanted.shape, name
    worst = ((got - wanted).abs() / (1 + wanted.abs())).max()
    assert worst <= tolerance, f"{name}: {worst:.2e}"


def test_parity_of_every_mode_and_gradient(oracle):
    meta, data = oracle
    words, frames = (data[f"in/mug_{side}_feat"].clone().requires_grad_() for side in ("text", "video"))
    mask = data["in/mug_text_mask"].bool()
    ends = mask.sum(1) - 1
    whole = words[torch.arange(len(words)), ends].unsqueeze(1)  # the last word stands for the text
    got = {}
    for tau in (5, 100):
        got[f"mug_frame_token_simple_tau{tau}"] = mug_scores(words, frames, mask, tau=tau)
        full = mug_scores(words, frames, mask, tau=tau, full=True, official_padding=True)
        got[f"mug_frame_token_tau{tau}"] = full
        got[f"mug_frame_text_tau{tau}"] = mug_scores(whole, frames, tau=tau)

    def weights(side, x):
        names = (f"param/drl.{side}_weight_fc.{p}" for p in ("weight", "bias"))
        return F.linear(x, *(data[name] for name in names)).squeeze(-1)

    word_weight = weights("text", words).masked_fill(~mask, -INF).softmax(-1)
    frame_weight = weights("video", frames).softmax(-1)
    best = best_match_scores(words, frames, word_weight, frame_weight, mask, official_padding=True)
    got["drl_wti"] = best
    listed = {k.removeprefix("out/") for k in data if k.startswith(("out/mug_frame", "out/drl"))}
    assert set(got) == listed
    for name, value in got.items():
        same(value.detach(), data[f"out/{name}"], meta["tolerance"], name)
    got["mug_frame_token_simple_tau5"].square().sum().backward()
    for side, x in (("text", words), ("video", frames)):
        same(x.grad, data[f"grad/mug_{side}_feat"], meta["tolerance"], side)


# --------------------------------------------------------------------------------------------------
# Against the formulas, one pair at a time
# --------------------------------------------------------------------------------------------------


def drawn(seed, texts=4, videos=5, length=6, count=3, width=7):
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    def some(rows, columns):
        mask = torch.rand(rows, columns, generator=generator) < 0.6
        mask[torch.arange(rows), torch.randint(columns, (rows,), generator=generator)] = True
        return mask

    return draw(texts, length, width), draw(videos, count, width), some(texts, length), some(videos, count)


def written_out(words, frames, mask_NL, mask_MT, tau, full):
    """The formulas of the paper on the real words and frames of each pair, with their vectors."""
    rows = []
    for words_LD, kept_L in zip(words, mask_NL, strict=True):
        row = []
        for frames_TD, kept_T in zip(frames, mask_MT, strict=True):
            w, v = F.normalize(words_LD[kept_L], dim=-1), F.normalize(frames_TD[kept_T], dim=-1)
            alpha, beta = (tau * w @ v.T).softmax(1), (tau * w @ v.T).softmax(0)
            r = ((alpha @ v) * w).sum(1)
            q = ((beta.T @ w) * v).sum(1)
            over_words, over_frames = (tau * r).softmax(0), (tau * q).softmax(0)
            if full:
                row.append((over_words @ w) @ (over_frames @ v))
            else:
                row.append((over_words @ r + over_frames @ q) / 2)
        rows.append(torch.stack(row))
    return torch.stack(rows)


@settings(deadline=None, max_examples=40)
@given(
    seed=st.integers(0, 10**6),
    texts=st.integers(1, 6),
    videos=st.integers(1, 6),
    length=st.integers(1, 7),
    count=st.integers(1, 5),
    tau=st.sampled_from([1.0, 20.0, 100.0]),
    full=st.booleans(),
    numbers=st.sampled_from([1, 60, 10**6]),
)
def test_blocks_are_the_formula(seed, texts, videos, length, count, tau, full, numbers):
    made = drawn(seed, texts, videos, length, count)
    got = mug_scores(*made, tau=tau, full=full, numbers=numbers)
    torch.testing.assert_close(got, written_out(*made, tau, full), rtol=0, atol=1e-12)


@pytest.mark.parametrize("full", [False, True])
def test_blocks_give_the_same_gradients_and_keep_no_similarities(full):
    words, frames, mask_NL, mask_MT = drawn(1, 12, 10, 8, 4)

    def run(numbers):
        sides = [x.clone().requires_grad_() for x in (words, frames)]
        sizes = []

        def note(tensor):
            sizes.append(tensor.numel())
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
            scores = mug_scores(*sides, mask_NL, mask_MT, tau=20, full=full, numbers=numbers)
        scores.square().sum().backward()
        return [x.grad for x in sides], max(sizes)

    (wanted, whole), (got, parts) = run(10**6), run(200)
    for a, b in zip(got, wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-12)
    assert whole >= 12 * 10 * 8 * 4
    assert parts <= max(words.numel(), frames.numel())


def test_no_block_is_larger_than_asked(monkeypatch):
    sizes = []
    true = mug._similarity

    def noted(words, frames):
        made = true(words, frames)
        sizes.append(made.numel())
        return made

    monkeypatch.setattr(mug, "_similarity", noted)
    words, frames, *masks = drawn(2, 30, 40, 8, 4)
    mug_scores(words, frames, *masks, numbers=500)
    assert max(sizes) <= 500
    assert len(sizes) < 8 * 30 * 40 * 8 * 4 / 500  # and blocks are not tiny either


# --------------------------------------------------------------------------------------------------
# Properties
# --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("full", [False, True])
def test_what_is_masked_does_not_matter(full):
    words, frames, mask_NL, mask_MT = drawn(3)
    clean = mug_scores(words, frames, mask_NL, mask_MT, full=full)
    words, frames = (
        x.masked_fill(~m.unsqueeze(-1), math.nan) for x, m in ((words, mask_NL), (frames, mask_MT))
    )
    torch.testing.assert_close(mug_scores(words, frames, mask_NL, mask_MT, full=full), clean)
    longer = F.pad(words, (0, 0, 0, 3), value=9.0), F.pad(mask_NL, (0, 3))
    torch.testing.assert_close(mug_scores(longer[0], frames, longer[1], mask_MT, full=full), clean)


def test_padding_leaks_in_the_official_full_mode_only():
    words, frames, mask_NL, _ = drawn(4)
    mask_NL[:, -1] = False
    other = words.masked_scatter(~mask_NL.unsqueeze(-1), drawn(5)[0])
    scores = [mug_scores(x, frames, mask_NL, full=True, official_padding=True) for x in (words, other)]
    assert (scores[0] - scores[1]).abs().max() > 1e-3
    for full in (False, True):
        a, b = (mug_scores(x, frames, mask_NL, full=full) for x in (words, other))
        torch.testing.assert_close(a, b)


def test_a_cosine_of_exactly_zero_is_a_word_like_any_other():
    """The official code takes it for padding; by the mask it counts, here in the softmax over words."""
    words = torch.tensor([[[1.0, 0.0, 0.0], [0.0, 0.0, 1.0]]])
    frames = torch.tensor([[[0.6, 0.8, 0.0]]])
    with_it, without = (mug_scores(words, frames, m, tau=1) for m in (None, torch.tensor([[True, False]])))
    assert with_it < without - 0.1


@pytest.mark.parametrize("full", [False, True])
def test_an_unrelated_frame_or_word_changes_little(full):
    """Next to what it does to the cosine of both means."""
    generator = torch.Generator().manual_seed(0)
    matched = F.normalize(torch.randn(1, 4, 64, generator=generator), dim=-1)
    words, frames = matched, matched + 0.02 * torch.randn(1, 4, 64, generator=generator)
    stray = torch.randn(1, 4, 64, generator=generator)

    def cosine(words, frames):
        return F.cosine_similarity(words.mean(1), frames.mean(1))

    for changed in ((words, torch.cat([frames, stray], 1)), (torch.cat([words, stray], 1), frames)):
        by_mug = (mug_scores(*changed, full=full) - mug_scores(words, frames, full=full)).abs()
        by_mean = (cosine(*changed) - cosine(words, frames)).abs()
        assert by_mean > 0.15
        assert by_mug < by_mean / 5


def test_a_large_tau_takes_the_best_match():
    words, frames, mask_NL, mask_MT = drawn(6)
    got = mug_scores(words, frames, mask_NL, mask_MT, tau=1e6)
    sim = torch.einsum("nld,mtd->nlmt", F.normalize(words, dim=-1), F.normalize(frames, dim=-1))
    sim = sim.masked_fill(~mask_NL[..., None, None], -INF).masked_fill(~mask_MT, -INF)
    torch.testing.assert_close(got, sim.amax((1, 3)), rtol=0, atol=1e-5)
    # and a small one the mean of all pairs
    flat = mug_scores(words, frames, tau=1e-9)
    every = torch.einsum("nld,mtd->nlmt", F.normalize(words, dim=-1), F.normalize(frames, dim=-1))
    torch.testing.assert_close(flat, every.mean((1, 3)), rtol=0, atol=1e-7)


def test_best_matches_are_those_of_the_formula():
    words, frames, mask_NL, mask_MT = drawn(7)
    weights = [m.double() / m.sum(1, keepdim=True) for m in (mask_NL, mask_MT)]
    got = best_match_scores(words, frames, *weights, mask_NL, mask_MT, numbers=50)
    for n, kept_L in enumerate(mask_NL):
        for m, kept_T in enumerate(mask_MT):
            w, v = F.normalize(words[n][kept_L], dim=-1), F.normalize(frames[m][kept_T], dim=-1)
            sim = w @ v.T
            wanted = (sim.amax(1).mean() + sim.amax(0).mean()) / 2
            torch.testing.assert_close(got[n, m], wanted)


def test_half_precision_is_scored_in_single():
    words, frames, *masks = drawn(11)
    words, frames = words.bfloat16(), frames.bfloat16()
    wanted = mug_scores(words.float(), frames.float(), *masks)
    assert torch.equal(mug_scores(words, frames, *masks), wanted)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(mug_scores(words, frames, *masks), wanted)


def test_words_and_frames_have_no_order():
    words, frames, mask_NL, mask_MT = drawn(8)
    there = mug_scores(words, frames, mask_NL, mask_MT)
    back = mug_scores(words.flip(1), frames.flip(1), mask_NL.flip(1), mask_MT.flip(1))
    torch.testing.assert_close(there, back)


# --------------------------------------------------------------------------------------------------
# Bad input
# --------------------------------------------------------------------------------------------------


def test_texts_without_words_and_videos_without_frames_are_refused():
    words, frames, mask_NL, mask_MT = drawn(9)
    mask_NL[1], mask_MT[:2] = False, False
    with pytest.raises(UsageError, match="Every text needs a word: 1 of 4"):
        mug_scores(words, frames, mask_NL)
    with pytest.raises(UsageError, match="Every video needs a frame: 2 of 5"):
        mug_scores(words, frames, None, mask_MT)
    with pytest.raises(UsageError, match="Every video needs a frame"):
        mug_scores(words, frames[:, :0])


def test_what_does_not_fit_is_refused():
    words, frames, mask_NL, _ = drawn(10)
    with pytest.raises(UsageError, match="of one width"):
        mug_scores(words[..., :5], frames)
    with pytest.raises(UsageError, match="of one width"):
        mug_scores(words[:, 0], frames)
    for bad in (mask_NL[:, :2], mask_NL.int()):
        with pytest.raises(UsageError, match="mask of words must be bool"):
            mug_scores(words, frames, bad)
    with pytest.raises(UsageError, match="tau must be positive"):
        mug_scores(words, frames, tau=0)
