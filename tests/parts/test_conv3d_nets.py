from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from moviola.parts.backbones.conv3d_nets import (
    ConvNetConfig,
    FactoredConv,
    FullConv,
    conv_net,
    conv_net_config,
)
from moviola.types import CheckpointError, UsageError

NETS = ("c3d", "r3d", "r21d")


def made(kind, **options):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return conv_net(ConvNetConfig(kind, (4, 6, 8, 10), **options)).eval()


@pytest.mark.parametrize("kind", NETS)
def test_any_length_and_size_gives_a_vector(kind):
    net = made(kind)
    for frames, height, width in ((8, 16, 16), (9, 24, 32), (16, 32, 16)):
        assert net(torch.randn(2, 3, frames, height, width)).shape == (2, 10)


@pytest.mark.parametrize("kind", NETS)
def test_memory_order_does_not_matter(kind):
    net, clips = made(kind), torch.randn(2, 3, 8, 24, 24)
    turned = clips.contiguous(memory_format=torch.channels_last_3d)
    torch.testing.assert_close(net(turned), net(clips), rtol=1e-4, atol=1e-5)


def test_stages_halve_but_the_first():
    net = made("r3d", layers=(2, 1, 1, 3))
    seen = {}
    for n in range(1, 6):
        getattr(net, f"conv{n}").register_forward_hook(
            lambda _, given, result, n=n: seen.__setitem__(n, result.shape)
        )
    net(torch.randn(1, 3, 8, 32, 32))
    assert {n: tuple(shape[1:]) for n, shape in seen.items()} == {
        1: (4, 8, 16, 16),
        2: (4, 8, 16, 16),
        3: (6, 4, 8, 8),
        4: (8, 2, 4, 4),
        5: (10, 1, 2, 2),
    }


def test_a_factored_convolution_has_as_many_weights_as_the_full_one():
    full = sum(p.numel() for p in FullConv(64, 128, (3, 3, 3), (1, 1, 1)).parameters())
    factored = FactoredConv(64, 128, (3, 3, 3), (1, 1, 1))
    assert factored.spatial_conv.out_channels == 230  # 3 * 9 * 64 * 128 / (9 * 64 + 3 * 128), rounded down
    convs = factored.spatial_conv.weight.numel() + factored.temporal_conv.weight.numel()
    assert 0.99 < convs / full <= 1
    stem = FactoredConv(3, 64, (3, 7, 7), (1, 2, 2))
    assert stem.spatial_conv.out_channels == 83


@pytest.mark.parametrize("stride", [(1, 1, 1), (1, 2, 2), (2, 2, 2)])
def test_a_factored_convolution_is_its_two_convolutions(stride):
    conv = FactoredConv(4, 6, (3, 3, 3), stride).double()
    x_BCTHW = torch.randn(2, 4, 5, 8, 8, dtype=torch.float64)
    wanted = conv.temporal_conv(F.relu(conv.bn(conv.spatial_conv(x_BCTHW))))
    torch.testing.assert_close(conv(x_BCTHW), wanted, rtol=0, atol=1e-12)


def test_a_block_adds_what_it_was_given():
    block = made("r3d").conv2.block1
    nn.init.zeros_(block.bn2.weight)
    x = torch.randn(2, 4, 4, 8, 8)
    assert torch.equal(block(x), F.relu(x))


@pytest.mark.parametrize("kind", NETS)
def test_the_configuration_follows_from_the_weights(kind):
    layers = (1, 1, 1, 1) if kind == "c3d" else (2, 1, 3, 1)
    net = made(kind, layers=layers)
    assert conv_net_config(net.state_dict()) == ConvNetConfig(kind, (4, 6, 8, 10), layers)
    with pytest.raises(CheckpointError, match="no weights of C3D"):
        conv_net_config({n: t for n, t in net.state_dict().items() if not n.startswith("conv4")})


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kind": "s3d"}, "c3d, r3d, r21d, got 's3d'"),
        ({"widths": (1, 2, 3)}, "four widths"),
        ({"layers": (1, 0, 1, 1)}, "four numbers of blocks"),
    ],
)
def test_bad_configurations(options, message):
    with pytest.raises(UsageError, match=message):
        ConvNetConfig(**options)
