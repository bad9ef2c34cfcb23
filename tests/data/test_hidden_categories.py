from __future__ import annotations

import numpy as np
import torch

from moviola.data.hidden_categories import (
    CATEGORIES,
    CONTEXT_LENGTH,
    SIDE,
    VOCABULARY,
    hidden_pairs,
    linear_probe,
    probe,
)


def test_the_seed_decides_and_new_pictures_are_new():
    a, b, c = hidden_pairs(3, 300), hidden_pairs(3, 300), hidden_pairs(4, 300)
    batch = [made.data.batch(np.arange(300), seed=0, epoch=0, step=0) for made in (a, b, c)]
    for name, value in batch[0].items():
        assert torch.equal(value, batch[1][name])
    assert not torch.equal(batch[0]["image"], batch[2]["image"])
    assert batch[0]["image"].shape == (300, 3, SIDE, SIDE)
    assert batch[0]["text"].shape == (300, CONTEXT_LENGTH)
    assert not torch.equal(a.fit[0], a.test[0])
    assert np.bincount(a.test[1]).tolist() == [20] * len(CATEGORIES)


def test_texts_end_with_the_largest_id():
    tokens = hidden_pairs(0, 500).data.tokens_NL
    assert tokens.max() == VOCABULARY - 1
    assert ((tokens == VOCABULARY - 1).sum(1) == 1).all()
    ends = tokens.argmax(1)
    assert all(not row[end + 1 :].any() and row[:end].all() for row, end in zip(tokens, ends, strict=True))


def test_noise_deals_captions_to_other_pictures():
    """With the same seed the pictures are drawn alike; about 40 % of the captions' hues differ."""
    clean, noisy = hidden_pairs(1, 2000, noise=0.0), hidden_pairs(1, 2000, noise=1.0)
    table = clean.data.tokens_NL[:, 1]
    assert (table != noisy.data.tokens_NL[:, 1]).float().mean() > 0.7


def test_the_teacher_knows_synonyms():
    data = hidden_pairs(0, 2000, noise=0.0).data
    both = ((data.tokens_NL > 0).sum(1) == 6) & (data.tokens_NL[:, 2] < data.tokens_NL[:, 4])  # spot first
    tokens, vectors = data.tokens_NL[both], data.teacher_ND[both]
    torch.testing.assert_close(vectors.norm(dim=1), torch.ones(len(vectors)))
    hues = (tokens[:, [1, 3]] - 1) // 3
    same = (hues[:, None] == hues[None]).all(-1)
    words = (tokens[:, None] == tokens[None]).all(-1)
    cosine = vectors @ vectors.T
    assert cosine[same & ~words].mean() > 0.7
    assert cosine[~same].mean() < 0.3


class Mean(torch.nn.Module):
    def encode_image(self, pixels):
        return torch.cat([pixels.mean((2, 3)), pixels[:, :, ::8, ::8].flatten(1)], 1)


class Nothing(torch.nn.Module):
    """Numbers that have nothing to do with the picture."""

    def __init__(self):
        super().__init__()
        self.generator = torch.Generator().manual_seed(0)

    def encode_image(self, pixels):
        return torch.rand(len(pixels), 8, generator=self.generator)


def test_the_probe_is_chance_for_chance_and_better_for_colours():
    made = hidden_pairs(0, 100)
    nothing, mean = probe(Nothing(), made), probe(Mean(), made)
    assert nothing["linear probe top-1"] < 4  # chance is 1.8
    assert abs(nothing["ARI of clusters"]) < 1
    assert mean["linear probe top-1"] > 12
    assert mean["ARI of clusters"] > 3


def test_a_linear_probe_separates_what_is_separable():
    rng = np.random.default_rng(0)
    label = rng.integers(3, size=200)
    x = np.eye(3)[label] @ rng.standard_normal((3, 6)) + 0.01 * rng.standard_normal((200, 6))
    got = linear_probe(x[:100], label[:100], x[100:], ridge=1e-3).argmax(1)
    assert (got == label[100:]).all()
