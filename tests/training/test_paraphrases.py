"""Encoders that learn from paraphrases."""

from __future__ import annotations

import numpy as np
import torch

from moviola.training.paraphrases import Paraphrases, WordVectors, embed_told, told_encoder


def test_averaged_word_vectors_know_no_order():
    encoder = told_encoder("word vectors", 0, 2, 20, 4)
    first, second = embed_told(encoder, ["a star grows, then it blinks", "it blinks, then a star grows"])
    np.testing.assert_allclose(first, second, atol=1e-6)


def test_a_transformer_does():
    encoder = told_encoder("transformer", 0, 2, 20, 4)
    first, second = embed_told(encoder, ["a star grows, then it blinks", "it blinks, then a star grows"])
    assert np.abs(first - second).max() > 1e-4


def test_the_loss_is_least_where_paraphrases_agree():
    """Four rows told by the same words right and left, against right rows turned round."""
    encoder = WordVectors(12, 8, 8)
    torch.nn.init.normal_(encoder.token_embedding.weight, generator=torch.Generator().manual_seed(0))
    tokens_SRL = torch.tensor([[[1, 2, 11], [3, 4, 11]], [[5, 6, 11], [7, 8, 11]]])
    objective = Paraphrases()
    with torch.no_grad():
        right = objective(encoder, {"left": tokens_SRL, "right": tokens_SRL})["paraphrases"]
        wrong = objective(encoder, {"left": tokens_SRL, "right": tokens_SRL.flip(1)})["paraphrases"]
    assert right < wrong
