"""Texts behind shared beginnings: equal to whole texts through the whole tower."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from moviola.clip.blocks import ResidualBlock
from moviola.clip.config import TextConfig
from moviola.clip.model import TextTower
from moviola.parts import shared_prefix
from moviola.parts.prompting import embed_with_context, text_from_embeddings
from moviola.parts.shared_prefix import encode_with_beginnings
from moviola.types import Refusal, UsageError

WIDTH, LENGTH, VOCABULARY = 16, 20, 50


def tower(block=ResidualBlock, eot_id: int | None = None) -> TextTower:
    torch.manual_seed(0)
    config = TextConfig(LENGTH, VOCABULARY, width=WIDTH, layers=3, heads=2, eot_id=eot_id)
    made = TextTower(config, 12, "quick_gelu", block=block).double()
    torch.nn.init.normal_(made.positional_embedding, std=0.5)
    return made.requires_grad_(False)


def texts(count: int, first: int = 4, seed: int = 0) -> Tensor:
    """Start token 3, then 1 to 12 tokens behind the first ones, then the end token, then padding."""
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.zeros(count, LENGTH, dtype=torch.int64)
    for row in tokens:
        end = first + int(torch.randint(1, 12, (), generator=generator))
        row[:end] = torch.randint(4, VOCABULARY - 1, (end,), generator=generator)
        row[end] = VOCABULARY - 1
    tokens[:, 0] = 3
    return tokens


def whole(module: TextTower, ctx_BPD: Tensor, tokens_CL: Tensor) -> Tensor:
    x = embed_with_context(module, tokens_CL, ctx_BPD[:, None])
    ends = module.eot_positions(tokens_CL).repeat(len(ctx_BPD))
    return text_from_embeddings(module, x.flatten(0, 1), ends).unflatten(0, (len(ctx_BPD), -1))


def start_of(module: TextTower, ctx_BPD: Tensor) -> Tensor:
    first = module.token_embedding.weight[3].expand(len(ctx_BPD), 1, -1)
    return torch.cat([first, ctx_BPD], 1)


@pytest.mark.parametrize("eot_id", [None, VOCABULARY - 1])
@pytest.mark.parametrize(("count", "most"), [(1, 2048), (7, 2048), (150, 2048), (150, 40), (20, 1)])
def test_values_and_gradients_are_those_of_whole_texts(count: int, most: int, eot_id: int | None) -> None:
    module, tokens = tower(eot_id=eot_id), texts(count)
    generator = torch.Generator().manual_seed(1)
    ctx = torch.randn(3, 3, WIDTH, generator=generator, dtype=torch.float64, requires_grad=True)
    got, wanted = (
        encode_with_beginnings(module, start_of(module, ctx), tokens, most=most),
        whole(module, ctx, tokens),
    )
    torch.testing.assert_close(got, wanted, rtol=1e-10, atol=1e-10)
    weight = torch.randn(got.shape, generator=generator, dtype=torch.float64)
    ours, theirs = (torch.autograd.grad((weight * x).sum(), ctx)[0] for x in (got, wanted))
    torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-9)
    with torch.no_grad():
        torch.testing.assert_close(
            encode_with_beginnings(module, start_of(module, ctx), tokens, most=most), wanted
        )


def test_the_first_ids_are_not_looked_at() -> None:
    module, tokens = tower(), texts(6)
    start = torch.randn(2, 4, WIDTH, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    before = encode_with_beginnings(module, start, tokens)
    tokens[:, :4] = 7
    assert torch.equal(encode_with_beginnings(module, start, tokens), before)


def test_gradients_reach_the_tower_too() -> None:
    module, tokens = tower().requires_grad_(), texts(5)
    ctx = torch.randn(2, 3, WIDTH, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    grads = []
    for encode in (
        lambda: encode_with_beginnings(module, start_of(module, ctx), tokens),
        lambda: whole(module, ctx, tokens),
    ):
        module.zero_grad()
        encode().square().sum().backward()
        grads.append({name: p.grad.clone() for name, p in module.named_parameters()})
    torch.testing.assert_close(grads[0], grads[1], rtol=1e-8, atol=1e-8)


def test_memory_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    """No part holds more texts than allowed, and with gradients each keeps its inputs alone."""
    module, tokens = tower(), texts(64)
    sizes, plain = [], shared_prefix._encode

    def spy(module: TextTower, start: Tensor, tokens: Tensor, ends: Tensor) -> Tensor:
        sizes.append(len(start) * len(tokens))
        return plain(module, start, tokens, ends)

    monkeypatch.setattr(shared_prefix, "_encode", spy)
    start = torch.randn(2, 4, WIDTH, dtype=torch.float64, requires_grad=True)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x.numel()) or x, lambda x: x):
        made = encode_with_beginnings(module, start, tokens, most=16)
    assert max(sizes) <= 16
    assert sum(sizes) == 128
    assert sum(kept) < 20_000  # the activations of 128 texts are a hundred times as many
    made.sum().backward()
    assert sum(sizes) == 256  # each ran once more


class OtherBlock(ResidualBlock):
    pass


def test_other_blocks_are_refused() -> None:
    with pytest.raises(Refusal, match="not CLIP's own"):
        encode_with_beginnings(tower(OtherBlock), torch.zeros(1, 2, WIDTH, dtype=torch.float64), texts(2))


def test_texts_longer_than_the_tower() -> None:
    long = torch.cat([texts(2)[:, :4], texts(2)[:, :4], texts(2)], 1)
    with pytest.raises(UsageError, match="at most 20 tokens"):
        encode_with_beginnings(tower(), torch.zeros(1, 4, WIDTH, dtype=torch.float64), long)
