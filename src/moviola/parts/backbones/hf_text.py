"""A text tower around a transformer of the `transformers` library: XLM-RoBERTa, masked pooling, projection.

It computes and names its parameters as OpenCLIP's `HFTextEncoder` does: `transformer.*` by the
library's names, `proj.*`. Needs the extra `hf`.

Axis letters: N texts, L tokens, D width, E embedding width.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from moviola.clip.config import build_config
from moviola.clip.model import length_groups
from moviola.types import MissingExtra, UsageError

Pooling = Literal["mean", "max", "first"]
Projection = Literal["mlp", "linear", "none"]


@dataclass(frozen=True)
class HfTextConfig:
    """XLM-RoBERTa-base by default.

    `pooling` over the tokens that are not padding, start and end included: their mean, their maximum,
    or the first token. `projection`: `mlp` is two linear maps with GELU between, its hidden width
    the mean of both ends; `linear` is one; `none` needs a width that is the embedding's already. No biases.
    """

    vocab_size: int = 250002
    width: int = 768
    layers: int = 12
    heads: int = 12
    hidden: int = 3072
    positions: int = 514
    types: int = 1
    pad_id: int = 1
    norm_eps: float = 1e-5
    dropout: float = 0.1
    context_length: int = 77
    pooling: Pooling = "mean"
    projection: Projection = "mlp"

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> HfTextConfig:
        return build_config(cls, data)


class HfTextTower(nn.Module):
    """tokens_NL (int64, filled up with `pad_id`) -> text_NE, not normalised.

    Positions count from `pad_id + 1` over the tokens that are not padding, so at most `positions -
    pad_id - 1` tokens fit.
    """

    def __init__(self, config: HfTextConfig, embed_dim: int) -> None:
        super().__init__()
        try:
            from transformers import XLMRobertaConfig, XLMRobertaModel
        except ImportError as error:
            raise MissingExtra("transformers", "hf") from error
        if config.context_length > config.positions - config.pad_id - 1:
            raise UsageError(
                f"A context of {config.context_length} tokens needs {config.context_length} positions, the "
                f"text tower has {config.positions - config.pad_id - 1}."
            )
        if config.projection == "none" and config.width != embed_dim:
            raise UsageError(
                f"Without a projection the text tower's width ({config.width}) must be the embedding's "
                f"({embed_dim})."
            )
        self.config = config
        self.transformer = XLMRobertaModel(
            XLMRobertaConfig(
                vocab_size=config.vocab_size,
                hidden_size=config.width,
                num_hidden_layers=config.layers,
                num_attention_heads=config.heads,
                intermediate_size=config.hidden,
                max_position_embeddings=config.positions,
                type_vocab_size=config.types,
                pad_token_id=config.pad_id,
                layer_norm_eps=config.norm_eps,
                hidden_dropout_prob=config.dropout,
                attention_probs_dropout_prob=config.dropout,
            ),
            add_pooling_layer=False,
        )
        middle = (config.width + embed_dim) // 2
        self.proj: nn.Module = nn.Identity()
        if config.projection == "linear":
            self.proj = nn.Linear(config.width, embed_dim, bias=False)
        elif config.projection == "mlp":
            self.proj = nn.Sequential(
                nn.Linear(config.width, middle, bias=False),
                nn.GELU(),
                nn.Linear(middle, embed_dim, bias=False),
            )

    @property
    def token_embedding(self) -> nn.Embedding:
        return self.transformer.embeddings.word_embeddings

    def hidden_states(self, tokens_NL: Tensor) -> Tensor:
        """The last layer: x_NLD. What stands at padding means nothing."""
        mask_NL = (tokens_NL != self.config.pad_id).long()
        return self.transformer(input_ids=tokens_NL, attention_mask=mask_NL).last_hidden_state

    def pool(self, x_NLD: Tensor, tokens_NL: Tensor) -> Tensor:
        """x_NLD -> pooled_ND by the configuration's `pooling`; padding has no say."""
        if self.config.pooling == "first":
            return x_NLD[:, 0]
        real_NL1 = (tokens_NL != self.config.pad_id).unsqueeze(-1)
        if self.config.pooling == "max":
            return x_NLD.masked_fill(~real_NL1, -torch.inf).amax(1)
        return x_NLD.masked_fill(~real_NL1, 0).sum(1) / real_NL1.sum(1)

    def forward(self, tokens_NL: Tensor) -> Tensor:
        """Texts of like length run together, cut to the longest of them: padding is masked, so exact."""
        if not len(tokens_NL):
            return self.proj(self.token_embedding.weight.new_zeros(0, self.config.width))
        lengths = self._lengths(tokens_NL)
        groups = length_groups(lengths)
        if len(groups) == 1:
            return self._embed(tokens_NL[:, : max(lengths)])
        rows = [torch.tensor(group, device=tokens_NL.device) for group in groups]
        parts = [
            self._embed(tokens_NL[r, : max(lengths[n] for n in group)])
            for r, group in zip(rows, groups, strict=True)
        ]
        return torch.cat(parts)[torch.cat(rows).argsort()]

    def _embed(self, tokens_NL: Tensor) -> Tensor:
        return self.proj(self.pool(self.hidden_states(tokens_NL), tokens_NL))

    def _lengths(self, tokens_NL: Tensor) -> list[int]:
        """One more than the place of each text's last token."""
        length = tokens_NL.shape[1]
        if length > self.config.context_length:
            raise UsageError(
                f"The text tower takes at most {self.config.context_length} tokens, got {length}."
            )
        places_L = torch.arange(1, length + 1, device=tokens_NL.device)
        lengths = ((tokens_NL != self.config.pad_id) * places_L).amax(1).tolist()
        empty = [row for row, count in enumerate(lengths) if count == 0]
        if empty:
            raise UsageError(
                f"{len(empty)} of {len(lengths)} texts have no token at all (first: row {empty[0]}), so "
                "their vector would be a mean of nothing.",
                hint="Tokenize with start and end marks, and leave rows without a caption out.",
            )
        return lengths
