from __future__ import annotations

import json

import pytest
import torch

from moviola.clip.blocks import set_checkpointing
from moviola.clip.config import ClipConfig, ResNetConfig, TextConfig, VitConfig
from moviola.clip.model import CLIP
from moviola.parts.prompted_clip import PromptedClip, PromptedConfig
from moviola.types import CheckpointError, Refusal, UsageError

PLAIN = ClipConfig(16, VitConfig(16, 8, 16, 3, 2, stem=((8, 0),)), TextConfig(12, 32, 8, 3, 2))
PIXELS = torch.randn(5, 3, 16, 16, generator=torch.Generator().manual_seed(1))


def texts(*rows):
    made = torch.zeros(len(rows), 12, dtype=torch.int64)
    for row, ids in zip(made, rows, strict=True):
        row[: len(ids)] = torch.tensor(ids)
    return made


CLASSES = texts([30, 4, 5, 7, 31], [30, 4, 5, 8, 9, 31])


@pytest.fixture
def clip():
    torch.manual_seed(0)
    return CLIP(PLAIN).eval()


def prompted(clip, **options):
    """Prompts so large that they matter."""
    torch.manual_seed(3)
    return PromptedClip.from_clip(clip, **{"n_vision": 3, "n_text": 2, "std": 0.5, **options})


def test_without_prompts_it_is_the_clip(clip):
    made = PromptedClip.from_clip(clip)
    assert not made.prompted
    assert torch.equal(made.encode_image(PIXELS), clip.encode_image(PIXELS))
    assert torch.equal(made.encode_text(CLASSES), clip.encode_text(CLASSES))
    assert made.context_length == 12
    back = made.to_clip()
    assert type(back) is CLIP
    assert back.config == clip.config
    assert all(torch.equal(back.state_dict()[k], v) for k, v in clip.state_dict().items())


@torch.no_grad()
def test_prompts_of_every_depth_are_the_formula_written_out(clip):
    """[start | ctx | words] and [class | patches | VPT]; blocks below the depth replace what came of them."""
    for depth_vision, depth_text in ((1, 1), (2, 3), (3, 2)):
        made = prompted(clip, depth_vision=depth_vision, depth_text=depth_text, place=(4, 5))
        visual, tower = made.visual, made.transformer
        x = visual.conv1(visual.stem(PIXELS)).flatten(2).transpose(1, 2)
        x = torch.cat([visual.class_embedding.expand(5, 1, -1), x], 1) + visual.positional_embedding
        x = visual.ln_pre(torch.cat([x, visual.VPT.expand(5, -1, -1)], 1))
        for number, block in enumerate(visual.transformer.resblocks):
            if 0 < number < depth_vision:
                x = torch.cat([x[:, :-3], block.VPT_shallow.expand(5, -1, -1)], 1)
            x = block(x)
        torch.testing.assert_close(made.encode_image(PIXELS), visual.ln_post(x[:, 0]) @ visual.proj)

        y = made.token_embedding(CLASSES)
        y = torch.cat([y[:, :1], made.ctx.expand(2, -1, -1), y[:, 3:]], 1) + made.positional_embedding
        for number, block in enumerate(tower.resblocks):
            if 0 < number < depth_text:
                y = torch.cat([y[:, :1], block.VPT_shallow.expand(2, -1, -1), y[:, 3:]], 1)
            y = block(y)
        y = made.ln_final(y)[torch.arange(2), CLASSES.argmax(-1)] @ made.text_projection
        torch.testing.assert_close(made.encode_text(CLASSES), y)
        deep = sorted(name for name in made.state_dict() if "VPT" in name or name == "ctx")
        assert len(deep) == depth_vision + depth_text


def test_a_depth_of_none_is_all_blocks_and_one_side_may_stay_alone(clip):
    assert prompted(clip).config.depth_vision == prompted(clip).config.depth_text == 3
    text, vision = prompted(clip, n_vision=0), prompted(clip, n_text=0)
    assert torch.equal(text.encode_image(PIXELS), clip.encode_image(PIXELS))
    assert torch.equal(vision.encode_text(CLASSES), clip.encode_text(CLASSES))
    assert (text.config.depth_vision, vision.config.depth_text) == (0, 0)
    assert (text.encode_text(CLASSES) - clip.encode_text(CLASSES)).abs().max() > 1e-3
    assert (vision.encode_image(PIXELS) - clip.encode_image(PIXELS)).abs().max() > 1e-3


def test_words_give_way_or_prompts_are_inserted(clip):
    replaced, inserted = prompted(clip, place=(4, 5)), prompted(clip)
    assert torch.equal(replaced.ctx, clip.token_embedding.weight[[4, 5]])
    assert inserted.ctx.abs().max() < 3
    with torch.no_grad():
        replaced.ctx.copy_(inserted.ctx)
    words = texts([30, 7, 31], [30, 8, 9, 31])
    assert torch.equal(replaced.encode_text(CLASSES), replaced.encode_text(words))
    torch.testing.assert_close(inserted.encode_text(words), replaced.encode_text(words))
    assert (inserted.encode_text(CLASSES) - replaced.encode_text(CLASSES)).abs().max() > 1e-3
    assert inserted.encode_text(words[:0]).shape == (0, 16)
    # what fits without prompts need not fit with them
    assert inserted.context_length == 10
    with pytest.raises(UsageError, match="11 tokens and 2 prompt tokens do not fit the context of 12"):
        inserted.encode_text(texts([30, *[7] * 9, 31]))


def test_it_comes_back_from_its_configuration(clip):
    made = prompted(clip, place=(4, 5), depth_text=2)
    again = PromptedClip.from_config(json.loads(json.dumps(made.config.to_json()))).eval()
    assert again.config == made.config
    again.load_state_dict(made.state_dict())
    assert torch.equal(again.encode_text(CLASSES), made.encode_text(CLASSES))
    assert torch.equal(again.encode_image(PIXELS), made.encode_image(PIXELS))


def test_a_frozen_image_tower_keeps_its_batch_statistics(clip):
    made = prompted(clip)
    made.train()
    assert made.visual.stem.training
    made.requires_grad_(False)
    made.train()
    assert not made.visual.stem.training
    before = made.visual.stem[0].bn.running_mean.clone()
    made.encode_image(PIXELS)
    assert torch.equal(made.visual.stem[0].bn.running_mean, before)


def test_checkpointing_changes_nothing(clip):
    made, grads = prompted(clip), []
    for on in (False, True):
        set_checkpointing(made, on)
        (made.encode_image(PIXELS).sum() + made.encode_text(CLASSES).sum()).backward()
        grads.append(torch.cat([p.grad.flatten() for n, p in made.named_parameters() if "VPT" in n]))
        made.zero_grad()
    torch.testing.assert_close(*grads)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"n_vision": 2}, "n_vision and depth_vision are both 0, or both 1 or more"),
        ({"n_text": 2, "depth_text": 0}, "n_text and depth_text are both 0, or both 1 or more"),
        ({"n_text": 0, "depth_text": 2}, "n_text and depth_text are both 0"),
        ({"n_text": 2, "depth_text": 4}, "the depth at most 3"),
        ({"n_vision": -1, "depth_vision": -1}, "got -1 and -1"),
        ({"n_text": 2, "depth_text": 1, "place": (4, 5, 6)}, "2 prompts cannot take the place of 3 words"),
        ({"n_text": 10, "depth_text": 1}, "10 prompts leave no room for words in 12 tokens"),
    ],
)
def test_prompts_that_cannot_be(options, said):
    with pytest.raises(UsageError, match=said):
        PromptedConfig.over(PLAIN, **options)


def test_what_cannot_have_them(clip):
    made = prompted(clip)
    with pytest.raises(UsageError, match="has prompts already"):
        made.add_prompts(n_text=2)
    with pytest.raises(Refusal, match="no plain CLIP"):
        made.to_clip()
    with pytest.raises(CheckpointError, match="names do not fit"):
        PromptedClip.from_clip(made)
    with pytest.raises(Refusal, match="starts from a CLIP; this model is a Linear"):
        PromptedClip.from_clip(torch.nn.Linear(2, 2))
    resnet = CLIP(ClipConfig(16, ResNetConfig(32, 8, (1, 1, 1, 1), 2), TextConfig(12, 32, 8, 3, 2))).eval()
    assert torch.equal(
        PromptedClip.from_clip(resnet, n_text=2).encode_image(torch.ones(1, 3, 32, 32)),
        resnet.encode_image(torch.ones(1, 3, 32, 32)),
    )
    with pytest.raises(Refusal, match="no tokens to put prompts among"):
        PromptedClip.from_clip(resnet, n_vision=2)
