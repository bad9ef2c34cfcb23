from __future__ import annotations

import json

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from moviola.clip.blocks import ResidualBlock
from moviola.clip.config import ClipConfig, ResNetConfig, TextConfig, VitConfig, vit_b_16, vit_l_14
from moviola.clip.model import CLIP
from moviola.parts.clip_video import (
    HEAD_KEYS,
    ClipVideo,
    ClipVideoConfig,
    MultiframeIntegration,
    VideoPrompts,
    head_sizes,
)
from moviola.types import CheckpointError, ClipBatch, Encoder, UsageError


def small(**options):
    clip = ClipConfig(16, VitConfig(16, 8, 24, 2, 2), TextConfig(8, 32, 16, 1, 2))
    return ClipVideoConfig.over(clip, **{"frames": 3, "mit_heads": 2, "prompt_heads": 2, **options})


def randomised(module, seed=0):
    """Every parameter drawn anew, so that no bias, scale or alpha is where it started."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(0.5 * torch.randn(parameter.shape, generator=generator))
    return module.eval()


def draw(*shape, seed=1):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def clip_of(frames_BTCHW):
    mask_BT = torch.ones(frames_BTCHW.shape[:2], dtype=torch.bool)
    return ClipBatch(frames_BTCHW, mask_BT.float(), mask_BT)


# --------------------------------------------------------------------------------------------------
# MIT
# --------------------------------------------------------------------------------------------------


def test_the_skip_of_mit_goes_around_the_positions():
    mit = randomised(MultiframeIntegration(4, 16, layers=2, heads=2))
    x = draw(3, 4, 16)
    y = x + mit.positional_embedding
    for block in mit.resblocks:
        y = block(y)
    torch.testing.assert_close(mit(x), (y + x).mean(1))


def test_with_one_frame_mit_is_a_plain_residual_block():
    mit = randomised(MultiframeIntegration(1, 16, heads=2))
    x = draw(3, 1, 16)
    block = ResidualBlock(16, 2, 4.0, "quick_gelu", causal=False)
    block.load_state_dict(mit.resblocks[0].state_dict())
    torch.testing.assert_close(mit(x), block(x + mit.positional_embedding)[:, 0] + x[:, 0])


def test_mit_knows_the_order_by_its_positions_alone():
    mit = randomised(MultiframeIntegration(4, 16, heads=2))
    x = draw(2, 4, 16)
    assert (mit(x.flip(1)) - mit(x)).abs().max() > 1e-3
    nn.init.zeros_(mit.positional_embedding)
    torch.testing.assert_close(mit(x.flip(1)), mit(x))


def test_mit_starts_as_the_authors_do():
    torch.manual_seed(0)
    mit = MultiframeIntegration(8, 256)
    for tensor in (
        mit.positional_embedding,
        mit.resblocks[0].mlp.c_fc.weight,
        mit.resblocks[0].attn.out_proj.weight,
    ):
        assert 0.018 < tensor.detach().std() < 0.022
    assert not mit.resblocks[0].mlp.c_proj.bias.any()


# --------------------------------------------------------------------------------------------------
# Prompts
# --------------------------------------------------------------------------------------------------


def written_out(prompts, text_CE, context_MPE):
    """The M x C x E form: texts repeated for every video, heads by hand."""
    context = prompts.norm(context_MPE)
    x = text_CE.expand(len(context), -1, -1)
    for layer in prompts.decoder:
        attn = layer.cross_attn
        query = attn.q_proj(layer.norm1(x))
        heads = []
        for q, k, v in zip(
            *(t.chunk(attn.heads, -1) for t in (query, attn.k_proj(context), attn.v_proj(context))),
            strict=True,
        ):
            heads.append((q @ k.mT / q.shape[-1] ** 0.5).softmax(-1) @ v)
        x = x + attn.proj(torch.cat(heads, -1))
        x = x + layer.mlp(layer.norm3(x))
    return prompts.alpha * x


@pytest.fixture
def prompts():
    return randomised(VideoPrompts(16, layers=2, heads=4))


def test_prompts_are_their_formula(prompts):
    text, context = draw(5, 16), draw(3, 7, 16, seed=2)
    torch.testing.assert_close(
        prompts(text, context), written_out(prompts, text, context), rtol=1e-4, atol=1e-4
    )


@pytest.mark.parametrize("numbers", [1, 64, 200, 1000, 1 << 24])
def test_cosines_do_not_depend_on_how_many_pairs_are_done_at_a_time(prompts, numbers):
    text, video, context = draw(5, 16), draw(3, 16, seed=3), draw(3, 7, 16, seed=2)
    prompted = F.normalize(text + written_out(prompts, text, context), dim=-1)
    wanted = torch.einsum("mce,me->cm", prompted, F.normalize(video, dim=-1))
    torch.testing.assert_close(
        prompts.cosines(text, video, context, numbers=numbers), wanted, rtol=0, atol=1e-5
    )


def test_gradients_of_both_forms_agree(prompts):
    text, video, context = draw(5, 16), draw(3, 16, seed=3), draw(3, 7, 16, seed=2)
    prompts.double()
    text, video, context = text.double(), video.double(), context.double()
    weight = draw(5, 3, seed=4).double()
    (prompts.cosines(text, video, context, numbers=200) * weight).sum().backward()
    got = {name: p.grad.clone() for name, p in prompts.named_parameters()}
    prompts.zero_grad()
    prompted = F.normalize(text + written_out(prompts, text, context), dim=-1)
    (torch.einsum("mce,me->cm", prompted, F.normalize(video, dim=-1)) * weight).sum().backward()
    for name, parameter in prompts.named_parameters():
        torch.testing.assert_close(got[name], parameter.grad, rtol=1e-8, atol=1e-10, msg=name)


def test_no_texts_and_no_videos(prompts):
    assert prompts.cosines(draw(0, 16), draw(3, 16), draw(3, 7, 16)).shape == (0, 3)
    assert prompts.cosines(draw(5, 16), draw(0, 16), draw(0, 7, 16)).shape == (5, 0)


def test_with_alpha_zero_texts_stay_as_they_are(prompts):
    nn.init.zeros_(prompts.alpha)
    text, video, context = draw(5, 16), draw(3, 16, seed=3), draw(3, 7, 16, seed=2)
    assert not prompts(text, context).any()
    plain = F.normalize(text, dim=-1) @ F.normalize(video, dim=-1).T
    torch.testing.assert_close(prompts.cosines(text, video, context), plain)


def test_what_is_added_contains_the_text():
    """With all maps at zero the stream is the text, so alpha times it is added."""
    prompts = VideoPrompts(16, heads=2, alpha=0.25)
    with torch.no_grad():
        for part in prompts.modules():
            if isinstance(part, nn.Linear):
                part.weight.zero_()
    text = draw(4, 16)
    torch.testing.assert_close(prompts(text, draw(2, 3, 16)), 0.25 * text.expand(2, -1, -1))


def test_classes_do_not_see_each_other(prompts):
    text, video, context = draw(5, 16), draw(3, 16, seed=3), draw(3, 7, 16, seed=2)
    whole, part = prompts.cosines(text, video, context), prompts.cosines(text[1:3], video, context)
    torch.testing.assert_close(part, whole[1:3])


# --------------------------------------------------------------------------------------------------
# The model
# --------------------------------------------------------------------------------------------------


@pytest.fixture
def model():
    return randomised(ClipVideo(small(), block=ResidualBlock))


def test_is_an_encoder_that_is_not_separable(model):
    assert isinstance(model, Encoder)
    assert not model.separable
    assert (model.frame_spec.count, model.dim, model.context_length) == (3, 16, 8)


def test_an_encoded_video_is_its_vector_and_its_context(model):
    frames = draw(2, 3, 3, 16, 16)
    video = model.encode_video(clip_of(frames))
    assert video.shape == (2, 1 + 4, 16)
    vectors, patches = model.frame_features(frames.flatten(0, 1))
    torch.testing.assert_close(vectors, CLIP.encode_image(model, frames.flatten(0, 1)))
    torch.testing.assert_close(video[:, 0], model.mit(vectors.unflatten(0, (2, 3))))
    mapped = model.prompts_visual_ln(patches) @ model.prompts_visual_proj  # the order of the paper
    torch.testing.assert_close(video[:, 1:], mapped.unflatten(0, (2, 3)).mean(1), rtol=1e-4, atol=1e-4)
    assert torch.equal(model.pool(video), video[:, 0])


def test_a_mask_of_frames_changes_nothing(model):
    video = model.encode_video(clip_of(draw(2, 3, 3, 16, 16)))
    text = draw(4, 16)
    mask = torch.tensor([[True, False, True], [True, True, True]])
    assert torch.equal(model.score(text, video, mask), model.score(text, video))


def test_scores_are_cosines_times_the_scale(model):
    with torch.no_grad():
        model.logit_scale.fill_(1.5)
    video, text = model.encode_video(clip_of(draw(2, 3, 3, 16, 16))), draw(4, 16)
    cosine = model.prompts_generator.cosines(text, video[:, 0], video[:, 1:])
    torch.testing.assert_close(model.score(text, video), cosine * torch.e**1.5)
    assert cosine.abs().max() <= 1 + 1e-5


@pytest.mark.parametrize("shape", [(2, 16), (2, 3, 16), (2, 5, 8)])
def test_vectors_of_frames_cannot_be_scored(model, shape):
    with pytest.raises(UsageError, match=r"\(M, 5, 16\): a vector and 4 patches"):
        model.score(draw(4, 16), torch.zeros(shape))


def test_starts_from_a_clip(model):
    torch.manual_seed(3)
    clip = CLIP(
        ClipConfig.from_json(
            {k: v for k, v in small().to_json().items() if k in ClipConfig.__dataclass_fields__}
        )
    )
    before = model.mit.positional_embedding.clone()
    model.start_from(clip)
    for name, tensor in clip.state_dict().items():
        assert torch.equal(model.state_dict()[name], tensor), name
    assert torch.equal(model.mit.positional_embedding, before)
    other = CLIP(ClipConfig(16, VitConfig(16, 8, 32, 2, 2), TextConfig(8, 32, 16, 1, 2)))
    with pytest.raises(CheckpointError, match="do not fit"):
        model.start_from(other)


def test_bad_configurations():
    resnet = ClipVideoConfig.over(
        ClipConfig(16, ResNetConfig(32, 8, (1, 1, 1, 1), 2), TextConfig(8, 32, 16, 1, 2))
    )
    with pytest.raises(UsageError, match="vision transformer, got a ResNet"):
        ClipVideo(resnet, block=ResidualBlock)
    with pytest.raises(UsageError, match="one frame or more"):
        ClipVideo(small(frames=0), block=ResidualBlock)
    with pytest.raises(UsageError, match="width 16 and 3 heads"):
        ClipVideo(small(prompt_heads=3), block=ResidualBlock)


def test_configurations_through_json():
    config = small(alpha=0.3, mit_layers=2)
    assert ClipVideoConfig.from_json(json.loads(json.dumps(config.to_json()))) == config
    with pytest.raises(CheckpointError, match="does not know: colour"):
        ClipVideoConfig.from_json({**config.to_json(), "colour": 1})
    assert ClipVideoConfig.over(vit_b_16()).mit_heads == 8
    assert ClipVideoConfig.over(vit_l_14()).prompt_heads == 12


def test_names_and_sizes_of_official_states():
    with torch.device("meta"):
        state = ClipVideo(small(mit_layers=2, prompt_layers=3), block=ResidualBlock).state_dict()
    ours = {k: v for k, v in state.items() if k.startswith("prompts_generator.decoder.0.mlp")}
    assert HEAD_KEYS.official_names(ours) == [
        f"prompts_generator.decoder.0.mlp.{n}.{kind}" for n in (0, 3) for kind in ("weight", "bias")
    ]
    assert head_sizes(state) == {"frames": 3, "mit_layers": 2, "prompt_layers": 3}
    del state["mit.positional_embedding"]
    with pytest.raises(CheckpointError, match=r"no mit\.positional_embedding"):
        head_sizes(state)
