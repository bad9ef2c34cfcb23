from __future__ import annotations

import pytest
import torch

from moviola.clip.config import ResNetConfig, VitConfig
from moviola.clip.resnet import ModifiedResNet
from moviola.clip.vit import VisionTransformer
from moviola.parts.decoder import Decoder, Perceptron, RegionDecoder, tokens_only
from moviola.types import UsageError


def make(dropout=0.0):
    torch.manual_seed(0)
    return Decoder(16, 3, 4, 24, dropout).double().eval()


def test_states_of_every_layer_and_the_norm():
    decoder = make()
    states = decoder(torch.randn(2, 7, 16).double(), torch.randn(5, 16).double())
    assert states.shape == (3, 2, 5, 16)
    torch.testing.assert_close(states.mean(-1), torch.zeros(3, 2, 5).double(), atol=1e-6, rtol=0)
    assert not torch.allclose(states[0], states[1])


def test_one_layer_written_out():
    """Pre-norm, positions on queries and on self-attention's keys only, none on the memory."""
    layer = make().layers[0]
    x, memory, places = torch.randn(5, 16).double(), torch.randn(7, 16).double(), torch.randn(5, 16).double()

    def attend(part, query, key, value):
        weights = part.in_proj_weight.chunk(3)
        biases = part.in_proj_bias.chunk(3)
        q, k, v = (t @ w.T + b for t, w, b in zip((query, key, value), weights, biases, strict=True))
        heads = [
            (q[:, h] @ k[:, h].T / 2).softmax(-1) @ v[:, h]
            for h in (slice(a, a + 4) for a in range(0, 16, 4))
        ]
        return part.out_proj(torch.cat(heads, -1))

    normed = layer.norm1(x)
    y = x + attend(layer.self_attn, normed + places, normed + places, normed)
    y = y + attend(layer.multihead_attn, layer.norm2(y) + places, memory, memory)
    y = y + layer.linear2(layer.linear1(layer.norm3(y)).clamp(0))
    torch.testing.assert_close(layer(x[None], memory[None], places)[0], y)


def test_the_order_of_the_memory_does_not_matter_and_that_of_the_queries_does_not_mix():
    decoder, memory, places = make(), torch.randn(2, 7, 16).double(), torch.randn(5, 16).double()
    states = decoder(memory, places)
    torch.testing.assert_close(decoder(memory[:, torch.randperm(7)], places), states)
    order = torch.randperm(5)
    torch.testing.assert_close(decoder(memory, places[order]), states[:, :, order])


def test_dropout_acts_in_training_only():
    decoder, memory, places = make(0.5), torch.randn(2, 7, 16).double(), torch.randn(5, 16).double()
    assert torch.equal(decoder(memory, places), decoder(memory, places))
    decoder.train()
    assert not torch.equal(decoder(memory, places), decoder(memory, places))


def test_the_region_decoder_takes_its_last_query_for_the_picture():
    torch.manual_seed(0)
    decoder = RegionDecoder(6, 10, regions=3, width=16, layers=2, heads=2, hidden=24, dropout=0).eval()
    tokens = torch.randn(2, 7, 6)
    made, last = decoder(tokens), decoder.states(tokens)[-1]
    assert (made.boxes_BR4.shape, made.regions_BRE.shape, made.image_BE.shape) == (
        (2, 3, 4),
        (2, 3, 10),
        (2, 10),
    )
    assert ((made.boxes_BR4 > 0) & (made.boxes_BR4 < 1)).all()
    torch.testing.assert_close(made.image_BE, last[:, 3] @ decoder.image_proj)
    torch.testing.assert_close(made.regions_BRE[:, 1], last[:, 1] @ decoder.region_proj)


def test_a_perceptron_has_no_activation_at_its_ends():
    net = Perceptron((3, 5, 2))
    x = torch.randn(4, 3)
    first, second = net.layers
    torch.testing.assert_close(net(x), second(first(x).clamp(0)))


@pytest.mark.parametrize(("layers", "heads"), [(0, 2), (1, 3), (1, 0)])
def test_sizes_that_do_not_fit(layers, heads):
    with pytest.raises(UsageError, match="A decoder needs"):
        Decoder(16, layers, heads, 24, 0.0)


def test_towers_give_tokens_of_the_width_they_say():
    vit = VisionTransformer(VitConfig(16, 8, width=16, layers=1, heads=2), 8, "gelu")
    resnet = ModifiedResNet(ResNetConfig(32, width=8, layers=(1, 1, 1, 1), heads=4), 8)
    for tower, pixels in ((vit, torch.randn(2, 3, 16, 16)), (resnet, torch.randn(2, 3, 32, 32))):
        assert tower(pixels).tokens_BLD.shape[-1] == tokens_only(tower)
        tower(pixels).tokens_BLD.square().sum().backward()
        assert all((p.grad is not None) == p.requires_grad for p in tower.parameters())
