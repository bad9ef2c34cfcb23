from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from moviola.clip.blocks import ResidualBlock
from moviola.parts.ted_adapter import (
    AdaptedBlock,
    FrameFilter,
    FusionBlock,
    TedAdapter,
    TemporalAdapter,
    TextAdapter,
    TimeFilter,
    attend,
)
from moviola.types import UsageError


def stirred(module, seed=0):
    torch.manual_seed(seed)
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=0.3)
    return module


def draw(*shape, seed=1):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("frames", [1, 2, 5])
def test_the_filter_along_time_is_the_convolution(frames):
    """Values and gradients, of vectors and of tokens."""
    made = stirred(TimeFilter(6))
    x = draw(2, frames, 3, 6).requires_grad_()
    lines = x.permute(0, 2, 3, 1).flatten(0, 1)
    wanted = nn.Conv1d.forward(made, lines).unflatten(0, (2, 3)).permute(0, 3, 1, 2)
    torch.testing.assert_close(made(x), wanted)
    weight = draw(*wanted.shape, seed=2)
    inputs = (x, made.weight, made.bias)
    ours, theirs = (torch.autograd.grad((y * weight).sum(), inputs) for y in (made(x), wanted))
    torch.testing.assert_close(ours, theirs)
    torch.testing.assert_close(made(x[:, :, 0]), wanted[:, :, 0])


def test_the_filter_of_a_frame_is_the_convolution():
    made = stirred(FrameFilter(6))
    x = draw(4, 3, 3, 6)
    wanted = nn.Conv3d.forward(made, x.permute(3, 0, 1, 2)[None])[0].permute(1, 2, 3, 0)
    torch.testing.assert_close(made(x), wanted)


def written_out(adapter, x_FLD):
    """The adapter as the paper's figure has it, with the difference taken before the linear map."""
    x_BTLD = x_FLD.unflatten(0, (-1, adapter.frames))
    found = adapter.fc1(x_BTLD).permute(0, 2, 3, 1).flatten(0, 1)
    found = nn.Conv1d.forward(adapter.conv, found).unflatten(0, (len(x_BTLD), -1))
    enhanced = adapter.fc2(found.permute(0, 3, 1, 2))
    patches, inner = x_BTLD[:, :, 1:], adapter.offset_adapter
    change = patches - torch.cat([patches[:, :1], patches[:, :-1]], dim=1)
    side = round(patches.shape[2] ** 0.5)
    cube = inner.fc1(change).unflatten(2, (side, side)).permute(0, 4, 1, 2, 3)
    moved = inner.fc2(nn.Conv3d.forward(inner.conv, cube).permute(0, 2, 3, 4, 1).flatten(2, 3))
    return (x_BTLD + enhanced + F.pad(moved, (0, 0, 1, 0))).flatten(0, 1)


@pytest.mark.parametrize("frames", [1, 3])
def test_the_adapter_is_the_written_out_formula(frames):
    adapter = stirred(TedAdapter(8, 4, frames))
    x = draw(2 * frames, 10, 8).requires_grad_()
    weight = draw(2 * frames, 10, 8, seed=2)
    given = x.detach().clone()
    torch.testing.assert_close(adapter(x), written_out(adapter, x), rtol=1e-4, atol=1e-5)
    assert torch.equal(x.detach(), given)  # officially it is edited in place
    inputs = [x, *adapter.parameters()]
    ours, theirs = (
        torch.autograd.grad((y * weight).sum(), inputs) for y in (adapter(x), written_out(adapter, x))
    )
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


def test_a_still_video_has_the_bias_path_for_its_difference():
    inner = stirred(TedAdapter(8, 4, 3)).offset_adapter
    still = draw(1, 1, 10, 8).expand(2, 3, 10, 8)
    torch.testing.assert_close(inner(still), inner(torch.zeros(2, 3, 10, 8)))
    moving = draw(2, 3, 10, 8)
    torch.testing.assert_close(inner(moving)[:, 0], inner(torch.zeros(2, 1, 10, 8))[:, 0])
    assert (inner(moving)[:, 1] - inner(still)[:, 1]).abs().max() > 0.01


def test_adapters_begin_as_the_identity_but_for_the_texts():
    torch.manual_seed(0)
    x = draw(6, 10, 8)
    assert torch.equal(TedAdapter(8, 4, 3)(x), x)
    assert torch.equal(TemporalAdapter(8, 4)(x), x)
    assert (TextAdapter(8, 4)(x) - x).abs().max() > 0.01


def test_a_clip_hears_nothing_of_another():
    adapter, x = stirred(TedAdapter(8, 4, 3)), draw(6, 10, 8)
    torch.testing.assert_close(adapter(x)[:3], adapter(x[:3]))


def test_bad_tokens_are_refused():
    adapter = TedAdapter(8, 4, 3)
    with pytest.raises(UsageError, match="clips of 3 frames; 7 frames do not divide"):
        adapter(draw(7, 10, 8))
    with pytest.raises(UsageError, match="square grid of patches, got 6"):
        adapter(draw(6, 7, 8))


def test_a_block_without_adapters_is_clips():
    made = AdaptedBlock(8, 2, 4.0, "quick_gelu", causal=True)
    plain = ResidualBlock(8, 2, 4.0, "quick_gelu", causal=True)
    plain.load_state_dict(made.state_dict())
    x = draw(2, 5, 8)
    assert torch.equal(made(x), plain(x))


def test_the_fusion_block_lets_texts_pass_and_attends_as_torch_does():
    block = stirred(FusionBlock(8, 2, 4.0, "quick_gelu", causal=False))
    x, frames = draw(2, 5, 8), draw(2, 3, 8, seed=2)
    assert torch.equal(block(x), x)
    theirs = nn.MultiheadAttention(8, 2, batch_first=True)
    theirs.load_state_dict(block.attn.state_dict())
    torch.testing.assert_close(attend(block.attn, x, frames), theirs(x, frames, frames)[0])
    torch.testing.assert_close(attend(block.attn, x, x), block.attn(x))
    one = block.look(x[:, 2:3], frames)  # no token sees another
    torch.testing.assert_close(block.look(x, frames)[:, 2:3], one)
