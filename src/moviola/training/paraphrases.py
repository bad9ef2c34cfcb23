"""A sentence encoder learns from paraphrases: of texts in a batch, find the one that says the same.

Two encoders for the told clips (`data.told_clips`), trained alike: a small text transformer, and vectors of
words, averaged, which know no order.

Axis letters: S scenes, R rows of a scene, L tokens, N texts, D width.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moviola.clip.config import TextConfig
from moviola.clip.model import TextTower
from moviola.data import told_clips
from moviola.training.brief import fit
from moviola.training.nce import info_nce
from moviola.training.objectives import BasePairObjective
from moviola.types import Batch


class WordVectors(nn.Module):
    """The mean of a text's word vectors, projected. 0 and the largest number are no words."""

    def __init__(self, words: int, width: int, dim: int) -> None:
        super().__init__()
        self.words = words
        self.token_embedding = nn.Embedding(words, width)
        self.text_projection = nn.Linear(width, dim, bias=False)
        nn.init.normal_(self.token_embedding.weight, std=0.02)

    def encode_text(self, tokens_NL: Tensor) -> Tensor:
        word_NL1 = ((tokens_NL > 0) & (tokens_NL < self.words - 1)).unsqueeze(-1)
        sum_ND = (self.token_embedding(tokens_NL) * word_NL1).sum(1)
        return self.text_projection(sum_ND / word_NL1.sum(1).clamp(min=1))


class Paraphrases(BasePairObjective):
    """InfoNCE between `left` and `right` texts of a batch (S, R, L): R tales of one thing are told apart."""

    def outputs(self, model: nn.Module, batch: Batch) -> dict[str, Tensor]:
        tokens_NL = torch.cat([batch["left"], batch["right"]]).flatten(0, 1)
        tokens_NL = tokens_NL[:, : int(tokens_NL.ne(0).sum(1).max())]
        left_ND, right_ND = F.normalize(model.encode_text(tokens_NL), dim=-1).chunk(2)  # type: ignore[operator]
        return {"left": left_ND, "right": right_ND}

    def loss(self, model: nn.Module, outputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {"paraphrases": info_nce(outputs["left"], outputs["right"], 20.0)}

    def after_step(self, model: nn.Module) -> None:
        return


Kind = Literal["transformer", "word vectors"]


@lru_cache(maxsize=2)
def told_encoder(kind: Kind, seed: int, steps: int, scenes: int, batch: int) -> nn.Module:
    """An encoder of the told clips: both kinds see the same paraphrases in the same steps."""
    left, right = told_clips.paraphrases(seed, scenes)
    rows = {"left": left, "right": right}
    data = {k: torch.from_numpy(told_clips.tokens(v)).unflatten(0, (scenes, -1)) for k, v in rows.items()}
    words = len(told_clips.vocabulary()) + 2
    width, lr = 64, 3e-3 if kind == "transformer" else 1e-2
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        if kind == "transformer":
            text = TextConfig(told_clips.LENGTH, words, width, layers=2, heads=4, mlp_ratio=2.0)
            made: nn.Module = TextTower(text, width, "gelu")
        else:
            made = WordVectors(words, width, width)
        fit(made, Paraphrases(weight_decay=0.01), data, steps=steps, batch=batch, lr=lr, seed=seed)
    return made


@torch.inference_mode()
def embed_told(encoder: nn.Module, texts: list[str]) -> np.ndarray:
    """vectors_ND of texts of the told clips."""
    return encoder.encode_text(torch.from_numpy(told_clips.tokens(texts))).numpy()  # type: ignore[operator]
