"""A text tower around a transformer of the `transformers` library: XLM-RoBERTa, masked pooling, projection.

It computes and names its parameters as OpenCLIP's `HFTextEncoder` does: `transformer.*` by the
library's names, `proj.*`. `DistilBertTower` has DistilBERT in XLM-RoBERTa's place. Needs the extra `hf`.

Axis letters: N texts, L tokens, D width, E embedding width.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor, nn

from moviola.clip.config import build_config
from moviola.clip.model import length_groups
from moviola.parts.timm_vit import Shapes
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
    pad_id - 1` tokens fit. A subclass may hold another transformer of the library (`library_model`).
    """

    def __init__(self, config: HfTextConfig, embed_dim: int) -> None:
        super().__init__()
        most = config.positions - self.first_position(config)
        if config.context_length > most:
            raise UsageError(
                f"A context of {config.context_length} tokens needs {config.context_length} positions, the "
                f"text tower has {most}."
            )
        if config.projection == "none" and config.width != embed_dim:
            raise UsageError(
                f"Without a projection the text tower's width ({config.width}) must be the embedding's "
                f"({embed_dim})."
            )
        self.config = config
        self.transformer = self.library_model(config)
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

    @staticmethod
    def first_position(config: HfTextConfig) -> int:
        """The row of the position table that a text's first token reads."""
        return config.pad_id + 1

    @staticmethod
    def library_model(config: HfTextConfig) -> Any:
        """The untrained transformer; `MissingExtra` without the library."""
        try:
            from transformers import XLMRobertaConfig, XLMRobertaModel
        except ImportError as error:
            raise MissingExtra("transformers", "hf") from error
        made = XLMRobertaConfig(
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
        )
        return XLMRobertaModel(made, add_pooling_layer=False)

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


def distilbert() -> HfTextConfig:
    """DistilBERT-base, of which the first token's vector is taken as it is."""
    return HfTextConfig(
        vocab_size=30522,
        layers=6,
        positions=512,
        types=0,
        pad_id=0,
        norm_eps=1e-12,
        context_length=512,
        pooling="first",
        projection="none",
    )


def distilbert_of(shapes: Shapes, prefix: str) -> HfTextConfig:
    """The sizes of a checkpoint's DistilBERT; heads are 64 wide."""
    vocabulary, width = shapes(prefix + "embeddings.word_embeddings.weight")
    positions = shapes(prefix + "embeddings.position_embeddings.weight")[0]
    return replace(
        distilbert(),
        vocab_size=vocabulary,
        width=width,
        layers=shapes.count(prefix + "transformer.layer.{n}.ffn.lin1.weight"),
        heads=max(1, width // 64),
        hidden=shapes(prefix + "transformer.layer.0.ffn.lin1.weight")[0],
        positions=positions,
        context_length=positions,
    )


class DistilBertTower(HfTextTower):
    """DistilBERT in XLM-RoBERTa's place: positions count from 0.

    The library fixes what the configuration's `types` (none) and `norm_eps` (1e-12) would say.
    """

    @staticmethod
    def first_position(config: HfTextConfig) -> int:
        return 0

    @staticmethod
    def library_model(config: HfTextConfig) -> Any:
        try:
            from transformers import DistilBertConfig, DistilBertModel
        except ImportError as error:
            raise MissingExtra("transformers", "hf") from error
        made = DistilBertConfig(
            vocab_size=config.vocab_size,
            dim=config.width,
            n_layers=config.layers,
            n_heads=config.heads,
            hidden_dim=config.hidden,
            max_position_embeddings=config.positions,
            pad_token_id=config.pad_id,
            dropout=config.dropout,
            attention_dropout=config.dropout,
        )
        return DistilBertModel(made)
