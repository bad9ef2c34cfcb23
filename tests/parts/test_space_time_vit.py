from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from moviola.clip.blocks import Attention, set_checkpointing
from moviola.clip.config import VitConfig
from moviola.clip.vit import VisionTransformer
from moviola.parts.backbones.space_time_vit import SpaceTimeVit, divided_attention, grown_table
from moviola.parts.timm_vit import PlainBlock, as_timm
from moviola.types import UsageError

CONFIG = VitConfig(image_size=(16, 24), patch_size=8, width=32, layers=3, heads=4)  # 2 x 3 patches


def tower(frames=4, seed=0, *, learnt=True, config=CONFIG):
    torch.manual_seed(seed)
    made = SpaceTimeVit(config, frames)
    if learnt:
        for name, parameter in made.named_parameters():
            if "time_attn" in name or "temporal" in name:
                nn.init.normal_(parameter, std=0.3)
    return made.eval()


def clips(count=2, frames=4, seed=1):
    return torch.randn(count, frames, 3, 16, 24, generator=torch.Generator().manual_seed(seed))


def masked_attention(attention, x_BLD, patches, along):
    """The same by one attention over all tokens with a mask: what attends to what, written out."""
    length = x_BLD.shape[1]
    token = torch.arange(length - 1)
    group = token // patches if along == "space" else token % patches
    mask = torch.zeros(length, length, dtype=torch.bool)
    mask[0] = mask[:, 0] = True
    mask[1:, 1:] = group[:, None] == group[None]
    return attention(x_BLD, mask_LL=mask)


@pytest.mark.parametrize("along", ["space", "time"])
@pytest.mark.parametrize("frames", [1, 2, 5])
def test_divided_attention_is_attention_with_a_mask(along, frames):
    torch.manual_seed(0)
    attention, x = Attention(32, 4), torch.randn(3, 1 + 6 * frames, 32)
    wanted = masked_attention(attention, x, 6, along)
    torch.testing.assert_close(divided_attention(attention, x, 6, along), wanted, rtol=1e-5, atol=1e-6)
    only = divided_attention(attention, x, 6, along, class_only=True)
    torch.testing.assert_close(only, wanted[:, :1], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("frames", [1, 3])
def test_the_vector_alone_is_the_vector_of_the_whole_tower_and_so_are_its_gradients(frames):
    whole, alone = tower(), tower()
    x = clips(frames=frames)
    one, other = whole(x).vector_BD, alone.vector(x)
    torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)
    one[:, :9].square().sum().backward()  # of all: the last norm makes it a constant
    other[:, :9].square().sum().backward()
    for (name, a), b in zip(whole.named_parameters(), alone.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-4, atol=1e-4, msg=name)


def test_checkpointing_changes_no_gradient():
    plain, saving = tower(), tower()
    set_checkpointing(saving, True)
    x = clips()
    plain.vector(x)[:, 0].sum().backward()
    saving.vector(x)[:, 0].sum().backward()
    for (name, a), b in zip(plain.named_parameters(), saving.named_parameters(), strict=True):
        torch.testing.assert_close(a.grad, b[1].grad, rtol=1e-5, atol=1e-6, msg=name)


def test_one_frame_is_an_image_vit_when_time_attention_is_new():
    new = tower(learnt=False)
    plain = VisionTransformer(CONFIG, 32, "gelu", block=PlainBlock)
    as_timm(plain)
    state = {k: v for k, v in new.state_dict().items() if k in plain.state_dict()}
    plain.load_state_dict(state | {"proj": torch.eye(32)})
    x = clips(frames=1)
    torch.testing.assert_close(new.vector(x), plain.eval()(x[:, 0]).vector_BD, rtol=1e-5, atol=1e-5)


def test_the_order_of_frames_counts_once_positions_in_time_are_learnt():
    x, order = clips(), torch.tensor([2, 0, 3, 1])
    learnt = tower()
    with torch.no_grad():
        assert (learnt.vector(x) - learnt.vector(x[:, order])).abs().max() > 0.01
        learnt.temporal_embedding.zero_()
        torch.testing.assert_close(learnt.vector(x), learnt.vector(x[:, order]), rtol=1e-5, atol=1e-5)
        # a clip of equal frames is not the picture: the class token sees each patch four times, itself once
        still = x[:, :1]
        assert (learnt.vector(still.expand(-1, 4, -1, -1, -1)) - learnt.vector(still)).abs().max() > 1e-3


def test_shorter_clips_take_the_first_rows():
    long, short = tower(4), tower(2)
    state = long.state_dict()
    short.load_state_dict(state | {"temporal_embedding": state["temporal_embedding"][:2]})
    x = clips(frames=2)
    assert torch.equal(long.vector(x), short.vector(x))


@pytest.mark.parametrize("ones", [True, False])
def test_new_time_attention_has_gradients_which_an_output_map_of_ones_takes_away(ones):
    new = tower(learnt=False)
    nn.init.normal_(new.temporal_embedding)
    for block in new.transformer.resblocks:
        assert not block.time_attn.in_proj_weight.any()
        if ones:
            nn.init.ones_(block.time_attn.out_proj.weight)
    new.vector(clips())[:, :5].square().sum().backward()
    for block in new.transformer.resblocks:
        ratio = block.time_attn.in_proj_weight.grad.abs().max() / block.attn.in_proj_weight.grad.abs().max()
        assert ratio < 1e-5 if ones else ratio > 1e-2


def test_taps_and_tokens():
    made, x = tower(), clips()
    out = made(x, taps=[0, -1])
    assert out.tokens_BLD.shape == (2, 1 + 4 * 6, 32)
    torch.testing.assert_close(made.ln_post(out.layers[2]), out.tokens_BLD)
    assert set(out.layers) == {0, 2}


def test_a_table_grows_and_shrinks():
    table = torch.randn(3, 5, generator=torch.Generator().manual_seed(0))
    assert torch.equal(grown_table(table, 5, "zeros"), torch.cat([table, torch.zeros(2, 5)]))
    assert torch.equal(grown_table(table, 6, "interp"), table.repeat_interleave(2, 0))
    halves = grown_table(table, 6, "bilinear")
    torch.testing.assert_close(halves[1], 0.75 * table[0] + 0.25 * table[1])
    torch.testing.assert_close(halves[0], table[0])
    for mode in ("zeros", "interp", "bilinear"):
        assert torch.equal(grown_table(table, 2, mode), table[:2])


BAD = {
    "too many frames": (lambda: tower(2).vector(clips(frames=3)), "1 to 2 frames, got 3"),
    "no frame": (lambda: tower(2).vector(clips()[:, :0]), "1 to 2 frames, got 0"),
    "no axis of frames": (lambda: tower().vector(clips()[:, 0]), "a picture a clip of one frame"),
    "another size": (lambda: tower().vector(clips()[..., :16]), r"\(B, T, 3, 16, 24\)"),
    "a tower without frames": (lambda: SpaceTimeVit(CONFIG, 0), "at least one frame"),
    "unknown growth": (lambda: grown_table(torch.zeros(2, 3), 4, "cubic"), "cubic"),
    "growth to nothing": (lambda: grown_table(torch.zeros(2, 3), 0), "got 'zeros' and 0"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input(name):
    call, said = BAD[name]
    with pytest.raises(UsageError, match=said):
        call()


def test_a_stem_of_convolutions_fits():
    config = VitConfig(16, 8, width=32, layers=1, heads=2, stem=((8, 0),))
    made = tower(config=config)
    x = torch.randn(2, 3, 3, 16, 16)
    assert made.vector(x).shape == (2, 32)
    assert F.cosine_similarity(made.vector(x), made.vector(x.flip(1))).max() < 1
