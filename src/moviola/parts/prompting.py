"""Learned prompts in CLIP's text tower: vectors that stand where words stood.

A class prompt is the sentence "a photo of a {class}." as ids. Its positions 1 to n, after the start token,
are placeholders: the words there only mark the place, vectors are put in their stead, and everything else
("of a cat ." and the end token) keeps its frozen embedding. The tower then runs from embeddings; deep prompts
throw away what a block made at those positions and put vectors of the next block's own there.

Zhou, Yang, Loy, Liu: "Learning to Prompt for Vision-Language Models", IJCV 2022, arXiv 2109.01134 (shallow
prompts, the words); Jia et al.: "Visual Prompt Tuning", ECCV 2022, arXiv 2203.12119 (deep ones).

Axis letters: C classes, N texts, L tokens, n prompt tokens, D width, E embedding width.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from moviola.clip.blocks import Transformer
from moviola.clip.foreign_tokenizer import AnyTokenizer
from moviola.clip.model import CLIP, TextTower
from moviola.clip.vit import VisionTransformer
from moviola.types import CheckpointError, Refusal, UsageError

if TYPE_CHECKING:
    from moviola.clip.loaded import Model

Sides = Literal["both", "text", "vision"]
FILLER = "X"
"""The word that marks places where no phrase is given."""


def promptable(base: nn.Module) -> tuple[CLIP, VisionTransformer]:
    """The CLIP and its image tower; `Refusal` where there are no tokens to put prompts among."""
    if not isinstance(base, CLIP):
        raise Refusal(
            f"Prompts are learned in a CLIP's own two towers; this model is a {type(base).__name__}.",
            hint="Adapt a plain CLIP, or use gda-clip or linear-probe, which need vectors only.",
        )
    if not isinstance(base.visual, VisionTransformer):
        raise Refusal(
            "This CLIP's image tower is a ResNet: it has no tokens to put prompts among.",
            hint="Use a CLIP with a vision transformer (ViT-B/16), or gda-clip or linear-probe.",
        )
    return base, base.visual


def most_depth(clip: CLIP, sides: Sides = "both") -> int:
    """Blocks that can have prompts: those of the shallower tower, or of the one tower with prompts."""
    towers = {"text": clip.transformer, "vision": promptable(clip)[1].transformer}
    return min(len(tower.resblocks) for side, tower in towers.items() if sides in (side, "both"))


def check_same_base(base: Model, carried: Mapping[str, Tensor], *, source: str) -> None:
    """Raise `CheckpointError` unless the base's weights in a checkpoint are `base`'s, to half precision."""
    own = base.module.state_dict()

    def same(name: str, tensor: Tensor) -> bool:
        if name not in own or own[name].shape != tensor.shape:
            return False
        return torch.allclose(own[name].float().cpu(), tensor.float().cpu(), rtol=1e-2, atol=1e-3)

    other = [name for name, tensor in carried.items() if not same(name, tensor)]
    if other:
        raise CheckpointError(
            f"The {source} was trained on another model than '{base.name}': {len(other)} of the tensors that "
            f"it carries differ, first {other[0]}.",
            hint="Load the model it was trained on as base.",
        )


def tokenizer_of(model: Model) -> AnyTokenizer:
    """The model's tokenizer; `CheckpointError` where it came without one."""
    if model.tokenizer is None:
        raise CheckpointError(
            f"The model '{model.name}' came without a tokenizer, which class prompts need.",
            hint="Load it with tokenizer=PATH (--tokenizer PATH).",
        )
    return model.tokenizer


def prompt_template(tokenizer: AnyTokenizer, ctx_init: str, n_ctx: int) -> str:
    """The sentence that class names stand in: `ctx_init` and the name, or `n_ctx` times "X" and the name.

    Raises `UsageError` where the phrase has fewer tokens than there are places.
    """
    if n_ctx < 1:
        raise UsageError(f"n_ctx, the number of prompt tokens, must be at least 1, got {n_ctx}.")
    words = " ".join(ctx_init.replace("_", " ").split()) or " ".join([FILLER] * n_ctx)
    if "{" in words:
        raise UsageError(f"ctx_init is a phrase before the class name, without braces, got {ctx_init!r}.")
    count = len(tokenizer.encode(words))
    if count < n_ctx:
        raise UsageError(
            f"The phrase {ctx_init!r} has {count} tokens, fewer than n_ctx = {n_ctx}.",
            hint='Give a longer phrase, fewer prompt tokens, or ctx_init="" to start from random vectors.',
        )
    return words + " {}."


def class_prompts(
    tokenizer: AnyTokenizer, classes: Sequence[str], *, ctx_init: str = "a photo of a", n_ctx: int = 2
) -> Tensor:
    """The prompts of class names as ids: tokens_CL, with the same placeholders at positions 1..n_ctx of each.

    Underscores in names are spaces. Raises `UsageError` for empty or repeated names, for prompts longer than
    the context, and as `prompt_template` does.
    """
    template = prompt_template(tokenizer, ctx_init, n_ctx)
    names = [" ".join(name.replace("_", " ").split()) for name in classes]
    if not names or not all(names):
        raise UsageError(
            "Prompts need class names, and none that is empty.", hint=f"Got: {list(classes)[:5]}."
        )
    twice = [name for name, count in Counter(names).items() if count > 1]
    if twice:
        raise UsageError(
            f"{len(twice)} names are given to more than one class: {', '.join(twice[:5])}.",
            hint="Give each class its own name.",
        )
    return torch.from_numpy(tokenizer([template.replace("{}", name) for name in names]))


def places(tokens_CL: Tensor, n_ctx: int) -> Tensor:
    """The placeholder ids that all class prompts share: (n,). `UsageError` where they do not."""
    if tokens_CL.ndim != 2 or not len(tokens_CL) or tokens_CL.shape[1] < n_ctx + 2:
        raise UsageError(
            f"Expected class prompts (C, L) of {n_ctx + 2} tokens or more, got {tuple(tokens_CL.shape)}."
        )
    place_n = tokens_CL[0, 1 : 1 + n_ctx]
    if (tokens_CL[:, 1 : 1 + n_ctx] != place_n).any():
        raise UsageError(f"Class prompts must share their tokens 1 to {n_ctx}, the places of the prompts.")
    return place_n


def embed_with_context(tower: TextTower, tokens_CL: Tensor, context: Tensor) -> Tensor:
    """Token embeddings, without positions, in which `context` stands at positions 1..n: x_CLD.

    `context` is (n, D) for all texts; or (..., 1, n, D) or (..., C, n, D), for a result (..., C, L, D).
    """
    x_CLD = tower.token_embedding(tokens_CL)
    n = context.shape[-2]
    if tokens_CL.shape[-1] < n + 2:
        raise UsageError(f"Texts of {tokens_CL.shape[-1]} tokens have no room for {n} prompt tokens.")
    context = context.to(x_CLD.dtype)
    if context.ndim > 2:
        lead = torch.broadcast_shapes(context.shape[:-2], x_CLD.shape[:-2])
        x_CLD = x_CLD.expand(*lead, *x_CLD.shape[-2:])
    return with_prompts(x_CLD, context, 1)


def with_prompts(x_NLD: Tensor, prompt_nD: Tensor, first: int) -> Tensor:
    """`prompt_nD`, or (..., n, D), in place of the n tokens from `first` on, which may be negative."""
    n = prompt_nD.shape[-2]
    first %= x_NLD.shape[-2]
    prompt = prompt_nD.to(x_NLD.dtype).expand(*x_NLD.shape[:-2], n, x_NLD.shape[-1])
    return torch.cat([x_NLD[..., :first, :], prompt, x_NLD[..., first + n :, :]], dim=-2)


def run_with_prompts(transformer: Transformer, x_NLD: Tensor, deep: Sequence[Tensor], first: int) -> Tensor:
    """A tower's blocks, `deep[i - 1]` put at the tokens from `first` on before block i = 1, 2, ...

    Shallow prompts are in x already; after the last deep prompt the tokens flow on.
    """
    if len(deep) >= len(transformer.resblocks):
        raise UsageError(
            f"A tower of {len(transformer.resblocks)} blocks has no place for {len(deep)} deep prompts."
        )
    saving = transformer.checkpointing and torch.is_grad_enabled()
    for number, block in enumerate(transformer.resblocks):
        if 0 < number <= len(deep):
            x_NLD = with_prompts(x_NLD, deep[number - 1], first)
        x_NLD = checkpoint(block, x_NLD, use_reentrant=False) if saving else block(x_NLD)
    return x_NLD


def image_with_prompts(visual: VisionTransformer, pixels_BCHW: Tensor, prompts: Sequence[Tensor]) -> Tensor:
    """Pictures to image_BE, not normalised, with prompts (n, D) for the first blocks behind the patches.

    They get no positions. `prompts` holds one for each block, first the one at the input.
    """
    first_nD, *deep = prompts
    x_BLD = visual.embed(pixels_BCHW)
    # the norm before the blocks sees one token at a time: it may as well come before joining
    prompt_BnD = visual.ln_pre(first_nD.to(x_BLD.dtype)).expand(len(x_BLD), -1, -1)
    x_BLD = torch.cat([x_BLD, prompt_BnD], dim=1)
    x_BLD = run_with_prompts(visual.transformer, x_BLD, deep, -len(first_nD))
    return visual.ln_post(x_BLD[:, 0]) @ visual.proj


def text_from_embeddings(
    tower: TextTower, x_NLD: Tensor, eot_N: Tensor, *, deep: Sequence[Tensor] = (), first: int = 1
) -> Tensor:
    """Texts as token embeddings without positions to text_NE, not normalised; `eot_N` says where they end.

    Runs over all L tokens it is given: cut what follows the last end token before (`cut_texts`). `deep` are
    prompts for the blocks after the first, at the tokens from `first` on.
    """
    position_LD = text_positions(tower, x_NLD.shape[1]).to(x_NLD.dtype)
    x_NLD = run_with_prompts(tower.transformer, x_NLD + position_LD, deep, first)
    rows_N = torch.arange(len(x_NLD), device=x_NLD.device)
    return tower.ln_final(x_NLD[rows_N, eot_N]) @ tower.text_projection


def text_positions(tower: TextTower, length: int) -> Tensor:
    """What the tower adds to the embeddings of its first `length` tokens: position_LD."""
    positions = getattr(tower, "positions", None)  # Long-CLIP's, made of two tables
    position_LD: Tensor = positions(length) if callable(positions) else tower.positional_embedding[:length]
    if length > len(position_LD):
        raise UsageError(f"The text tower takes at most {len(position_LD)} tokens, got {length}.")
    return position_LD


def cut_texts(tower: TextTower, tokens_NL: Tensor) -> tuple[Tensor, Tensor]:
    """Texts without what follows the last end token among them, and where each ends: tokens_NL, eot_N.

    Attention is causal, so no vector changes.
    """
    eot_N = tower.eot_positions(tokens_NL)
    return tokens_NL[:, : int(eot_N.max()) + 1], eot_N


def with_places(tower: TextTower, tokens_NL: Tensor, place_n: Tensor) -> tuple[Tensor, Tensor]:
    """Texts with the placeholder ids `place_n` at positions 1..n, cut as by `cut_texts`: tokens_NL, eot_N.

    A text that has them there stays as it is; others get them inserted after the start token. `UsageError`
    where that does not fit the context.
    """
    n, most = len(place_n), tower.text_config.context_length
    tokens_NL, eot_N = cut_texts(tower, tokens_NL)
    marked_N = (F.pad(tokens_NL, (0, n), value=-1)[:, 1 : 1 + n] == place_n).all(1)
    if marked_N.all():
        return tokens_NL, eot_N
    inserted_NL = torch.cat([tokens_NL[:, :1], place_n.expand(len(tokens_NL), n), tokens_NL[:, 1:]], 1)
    tokens_NL = torch.where(marked_N[:, None], F.pad(tokens_NL, (0, n)), inserted_NL)
    eot_N = torch.where(marked_N, eot_N, eot_N + n)
    longest = int(eot_N.max()) + 1
    if longest > most:
        raise UsageError(
            f"A text of {longest - n} tokens and {n} prompt tokens do not fit the context of {most}.",
            hint=f"Shorten it to {most - n} tokens, start and end among them.",
        )
    return tokens_NL[:, :longest], eot_N
