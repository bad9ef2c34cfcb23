from __future__ import annotations

import json
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import nn

from moviola.clip.blocks import Attention, ResidualBlock
from moviola.clip.config import ClipConfig, ResNetConfig, TextConfig, VitConfig
from moviola.clip.loaded import Model
from moviola.clip.model import CLIP
from moviola.data import order_clips as world
from moviola.systems.video import x_clip
from moviola.systems.video.x_clip import (
    CLAIM,
    KEYS,
    RECOGNITION,
    ClipVideoConfig,
    XClip,
    XClipRecognition,
    b_32,
    l_14_336,
    tiny,
)
from moviola.types import CheckpointError, ClipBatch, Encoder, Objective, UsageError


@pytest.fixture(scope="module")
def oracle(oracles_dir):
    folder = oracles_dir / "09-x-clip"
    return json.loads((folder / "a.json").read_text()), load_file(folder / "a.safetensors")


def clip_of(frames_BTCHW):
    mask_BT = torch.ones(frames_BTCHW.shape[:2], dtype=torch.bool)
    return ClipBatch(frames_BTCHW, mask_BT.float(), mask_BT)


def draw(*shape, seed=1):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def built(config, seed=0):
    """A model whose every parameter is drawn: no bias, norm or alpha is where it starts."""
    torch.manual_seed(seed)
    model = XClip(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn(parameter.shape))
    return model.eval()


@pytest.fixture
def model():
    return built(tiny())


@pytest.fixture
def tokens():
    return torch.tensor([[30, n, n + 7, 31, 0, 0, 0, 0] for n in range(1, 6)])


# --------------------------------------------------------------------------------------------------
# Parity
# --------------------------------------------------------------------------------------------------


@torch.no_grad()
def test_parity_of_every_output(oracle):
    meta, data = oracle
    c = meta["config"]
    clip = ClipConfig(
        c["embed_dim"],
        VitConfig(c["image"], c["patch"], c["vwidth"], c["vlayers"], c["vision_heads"]),
        TextConfig(c["ctx"], c["vocab"], c["twidth"], c["tlayers"], c["theads"]),
    )
    made = {name: c[name] for name in ("mit_layers", "mit_heads", "prompt_heads")}
    config = ClipVideoConfig.over(clip, frames=c["T"], prompt_layers=c["prompts_layers"], **made)
    model = XClip(config).eval()
    KEYS.load(model, {k.removeprefix("param/"): v for k, v in data.items() if k.startswith("param/")})

    frames, shape = data["in/video"].flatten(0, 1), data["in/video"].shape[:2]
    vectors, patches = model.frame_features(frames)
    video, text = model.encode_video(clip_of(data["in/video"])), model.encode_text(data["in/text"])
    got = {
        "cct_block0": model.visual.transformer.resblocks[0](model.visual.embed(frames)).transpose(0, 1),
        "frame_features": vectors.unflatten(0, shape),
        "patch_tokens": patches,
        "video_features": video[:, 0],
        "context": video[:, 1:],
        "text_features": text,
        "prompt": model.prompts_generator(text, video[:, 1:]),
        "logits": model.score(text, video).T,
    }
    assert {f"out/{name}" for name in got} == {k for k in data if k.startswith(("out/", "grad/"))}
    for name, value in got.items():
        wanted = data[f"out/{name}"].double()
        assert value.shape == wanted.shape, name
        worst = ((value.double() - wanted).abs() / (1 + wanted.abs())).max()
        assert worst <= meta["tolerance"], f"{name}: {worst:.2e}"


def torch_attention(ours, width):
    made = nn.MultiheadAttention(width, ours.heads)
    made.load_state_dict(ours.state_dict())
    return lambda x_LFD: made(x_LFD, x_LFD, x_LFD, need_weights=False)[0]


def written_out(model, frames_BTCHW, tokens_CL):
    """Frame vectors, v and logits as the paper's figures have it, token axis first, on torch's attention."""
    count, frames = frames_BTCHW.shape[:2]
    width, dim = model.config.vision.width, model.dim
    x_LBTD = model.visual.embed(frames_BTCHW.flatten(0, 1)).transpose(0, 1).unflatten(1, (count, frames))
    for block in model.visual.transformer.resblocks:
        m_TBD = block.message_fc(x_LBTD[0]).transpose(0, 1)
        m_TBD = m_TBD + torch_attention(block.message_attn, width)(block.message_ln(m_TBD))
        y_LFD = torch.cat([x_LBTD, m_TBD.transpose(0, 1)[None]]).flatten(1, 2)
        y_LFD = (y_LFD + torch_attention(block.attn, width)(block.ln_1(y_LFD)))[:-1]
        x_LBTD = (y_LFD + block.mlp(block.ln_2(y_LFD))).unflatten(1, (count, frames))
    vectors_BTE = model.visual.ln_post(x_LBTD[0]) @ model.visual.proj
    y_TBE = (vectors_BTE + model.mit.positional_embedding).transpose(0, 1)
    for block in model.mit.resblocks:
        y_TBE = y_TBE + torch_attention(block.attn, dim)(block.ln_1(y_TBE))
        y_TBE = y_TBE + block.mlp(block.ln_2(y_TBE))
    video_BE = (y_TBE.transpose(0, 1) + vectors_BTE).mean(1)
    context = (model.prompts_visual_ln(x_LBTD[1:]) @ model.prompts_visual_proj).mean(2).transpose(0, 1)
    text = model.encode_text(tokens_CL).expand(count, -1, -1)
    text = text + model.prompts_generator(text[0], context)
    logits = torch.einsum("be,bce->bc", F.normalize(video_BE, dim=-1), F.normalize(text, dim=-1))
    return vectors_BTE, video_BE, model.logit_scale.exp() * logits


@pytest.mark.parametrize("frames", [1, 8])
@torch.no_grad()
def test_one_frame_and_eight_are_the_written_out_formula(frames, tokens):
    """The oracle has four frames; these lengths are compared with the formula on torch's own attention."""
    config = ClipVideoConfig.over(tiny(), frames=frames, mit_heads=2, prompt_heads=2)
    model, clips = built(config), draw(2, frames, 3, 16, 16)
    vectors, video, logits = written_out(model, clips, tokens)
    got = model.encode_video(clip_of(clips))
    close = {"rtol": 1e-4, "atol": 1e-4}
    torch.testing.assert_close(model.frame_features(clips.flatten(0, 1))[0], vectors.flatten(0, 1), **close)
    torch.testing.assert_close(got[:, 0], video, **close)
    torch.testing.assert_close(model.score(model.encode_text(tokens), got).T, logits, **close)


# --------------------------------------------------------------------------------------------------
# Names, sizes, checkpoints
# --------------------------------------------------------------------------------------------------


def official_names(config):
    """Every name in a checkpoint of the authors', from the specification."""
    attention = ("in_proj_weight", "in_proj_bias", "out_proj.weight", "out_proj.bias")
    pair = ("weight", "bias")
    plain = [f"attn.{a}" for a in attention] + [f"{n}.{p}" for n in ("ln_1", "ln_2") for p in pair]
    plain += [f"mlp.{n}.{p}" for n in ("c_fc", "c_proj") for p in pair]
    message = [f"message_attn.{a}" for a in attention]
    message += [f"{n}.{p}" for n in ("message_fc", "message_ln") for p in pair]
    names = ["text_projection", "positional_embedding", "token_embedding.weight", "logit_scale"]
    names += [f"ln_final.{p}" for p in pair]
    names += [f"transformer.resblocks.{n}.{k}" for n in range(config.text.layers) for k in plain]
    blocks = range(config.vision.layers)
    names += [f"visual.transformer.resblocks.{n}.{k}" for n in blocks for k in (*plain, *message)]
    names += [f"visual.{k}" for k in ("conv1.weight", "class_embedding", "positional_embedding", "proj")]
    names += [f"visual.{n}.{p}" for n in ("ln_pre", "ln_post") for p in pair]
    names += ["mit.positional_embedding", *(f"mit.resblocks.{n}.{k}" for n in range(1) for k in plain)]
    layer = [f"cross_attn.{n}.weight" for n in ("q_proj", "k_proj", "v_proj", "proj")] + [
        "cross_attn.proj.bias"
    ]
    layer += [f"{n}.{p}" for n in ("norm1", "norm3", "mlp.0", "mlp.3") for p in pair]
    names += [f"prompts_generator.decoder.{n}.{k}" for n in range(2) for k in layer]
    names += ["prompts_generator.alpha", *(f"prompts_generator.norm.{p}" for p in pair)]
    return [*names, "prompts_visual_proj", *(f"prompts_visual_ln.{p}" for p in pair)]


@pytest.mark.parametrize("config", [b_32(), l_14_336()], ids=["b-32", "l-14-336"])
def test_keys_name_every_parameter_at_paper_size(config):
    with torch.device("meta"):
        model = XClip(config)
    assert sorted(KEYS.official_names(model.state_dict())) == sorted(official_names(config))
    heads = model.visual.transformer.resblocks[0].message_attn.heads
    assert heads == config.vision.heads == config.vision.width // 64
    assert model.mit.positional_embedding.shape == (1, config.frames, config.embed_dim)


def wide():
    clip = ClipConfig(128, VitConfig(32, 16, 128, 2, 2), TextConfig(8, 32, 64, 1, 1))
    return ClipVideoConfig.over(clip, frames=4, prompt_layers=1)


def test_reads_the_authors_file(tokens):
    """Sizes from the shapes, heads of 64, also from under the `module.` of their training."""
    model, clips = built(wide()), draw(2, 4, 3, 32, 32)
    state = {f"module.{k}": v for k, v in KEYS.to_official(model.state_dict()).items()}
    made = XClip.from_official(state)
    assert made.config == model.config
    video = made.encode_video(clip_of(clips))
    assert torch.equal(video, model.encode_video(clip_of(clips)))
    assert torch.equal(
        made.score(made.encode_text(tokens), video), model.score(model.encode_text(tokens), video)
    )


def test_a_file_that_does_not_fit_is_refused():
    state = KEYS.to_official(built(wide()).state_dict())
    lacking = {k: v for k, v in state.items() if "message_fc" not in k}
    with pytest.raises(CheckpointError, match=r"4 missing: visual\.transformer\.resblocks\.0\.message_fc"):
        XClip.from_official(lacking)
    with pytest.raises(CheckpointError, match=r"1 unexpected: extra"):
        XClip.from_official({**state, "extra": torch.zeros(1)})
    with pytest.raises(CheckpointError, match=r"no mit\.positional_embedding"):
        XClip.from_official({k: v for k, v in state.items() if not k.startswith("mit.")})


def test_another_number_of_frames_than_the_checkpoints_is_refused():
    eight = XClip(ClipVideoConfig.over(wide(), frames=8))
    with pytest.raises(CheckpointError, match=r"expected \(1, 8, 128\), got \(1, 4, 128\)"):
        KEYS.load(eight, KEYS.to_official(built(wide()).state_dict()))


def test_starts_from_clip_but_not_as_clip():
    torch.manual_seed(0)
    clip = CLIP(ClipConfig(16, VitConfig(16, 8, 24, 2, 2), TextConfig(8, 32, 16, 1, 2))).eval()
    model = XClip.from_clip(clip)
    assert isinstance(model, Encoder)
    assert not model.training
    assert (model.frame_spec.count, model.frame_spec.padding) == (8, "repeat-last")
    assert all(torch.equal(model.state_dict()[k], v) for k, v in clip.state_dict().items())
    assert torch.all(model.prompts_generator.alpha == 0.1)
    frames = draw(8, 3, 16, 16)
    assert (model.frame_features(frames)[0] - clip.encode_image(frames)).abs().max() > 1e-3
    assert XClip.from_clip(clip, frames=4, mit_layers=2).config.mit_layers == 2


def test_resnets_are_refused():
    clip = CLIP(ClipConfig(16, ResNetConfig(32, 8, (1, 1, 1, 1), 2), TextConfig(8, 32, 16, 1, 2)))
    with pytest.raises(UsageError, match="XClip needs a CLIP with a vision transformer"):
        XClip.from_clip(clip)


# --------------------------------------------------------------------------------------------------
# Messages
# --------------------------------------------------------------------------------------------------


def test_a_block_that_does_not_look_at_messages_is_clips(monkeypatch):
    block = built(tiny()).visual.transformer.resblocks[0]
    plain = ResidualBlock(16, 2, 4.0, "quick_gelu", causal=False)
    plain.load_state_dict({k: v for k, v in block.state_dict().items() if not k.startswith("message")})
    x = draw(6, 5, 16)
    assert (block(x) - plain(x)).abs().max() > 1e-3
    mask = torch.ones(6, 6, dtype=torch.bool)
    mask[:, -1] = False
    monkeypatch.setattr(block.attn, "forward", lambda y: Attention.forward(block.attn, y, mask_LL=mask))
    torch.testing.assert_close(block(x), plain(x))


def test_a_message_is_written_from_the_raw_class_token(model):
    """No norm comes before `message_fc`, so twice the token gives twice the message but for its bias."""
    block = model.visual.transformer.resblocks[0]
    nn.init.zeros_(block.message_attn.out_proj.weight)
    nn.init.zeros_(block.message_attn.out_proj.bias)
    cls = draw(2, 3, 16)
    bias = block.message_fc.bias
    torch.testing.assert_close(block.messages(2 * cls) - bias, 2 * (block.messages(cls) - bias))


def test_a_frame_hears_of_another_one_after_the_second_block(model):
    """Class tokens know nothing of their frame before the first block, so its messages are all alike."""
    frames = draw(3, 3, 16, 16)
    edited = frames.clone()
    edited[2] += 1
    first, second = model.visual.transformer.resblocks
    after = [first(model.visual.embed(f)) for f in (frames, edited)]
    assert torch.equal(after[0][:2], after[1][:2])
    after = [second(x) for x in after]
    assert (after[0][:2, 0] - after[1][:2, 0]).abs().max() > 1e-5
    # another video hears nothing
    both = [model.frame_features(torch.cat([frames, f]))[0][:3] for f in (frames, edited)]
    torch.testing.assert_close(both[0], both[1])


def test_messages_know_no_order_and_the_mit_does(model):
    frames = draw(3, 3, 16, 16)
    order = torch.tensor([2, 0, 1])
    vectors, moved = model.frame_features(frames)[0], model.frame_features(frames[order])[0]
    torch.testing.assert_close(moved, vectors[order], rtol=1e-4, atol=1e-4)
    videos = model.encode_video(clip_of(torch.stack([frames, frames[order]])))
    assert (videos[0, 0] - videos[1, 0]).abs().max() > 1e-3
    torch.testing.assert_close(videos[0, 1:], videos[1, 1:], rtol=1e-4, atol=1e-4)  # the context has none


def test_a_picture_is_a_still_clip(model):
    pictures = draw(4, 3, 16, 16)
    got = model.encode_image(pictures)
    still = model.pool(model.encode_video(model.still(pictures)))
    torch.testing.assert_close(got, still, rtol=1e-4, atol=1e-5)
    assert (got[0] - got[1]).abs().max() > 0.01


# --------------------------------------------------------------------------------------------------
# Scores
# --------------------------------------------------------------------------------------------------


def test_another_class_does_not_change_the_others(model, tokens):
    video = model.encode_video(clip_of(draw(3, 3, 3, 16, 16)))
    some, all_ = (model.score(model.encode_text(tokens[:n]), video) for n in (3, 5))
    torch.testing.assert_close(all_[:3], some, rtol=1e-5, atol=1e-5)


def test_the_same_class_has_another_vector_for_every_video(model, tokens):
    video = model.encode_video(clip_of(draw(2, 3, 3, 16, 16)))
    added = model.prompts_generator(model.encode_text(tokens), video[:, 1:])
    assert (added[0] - added[1]).abs().max() > 1e-3
    nn.init.zeros_(model.prompts_generator.alpha)
    text = model.encode_text(tokens)
    torch.testing.assert_close(model.score(text, video), CLIP.score(model, text, model.pool(video)))


def test_new_class_names_are_heard_and_the_mode_stays(model, tokens):
    """Officially the first call's texts answer for ever, and each call leaves the model in training mode."""
    video = model.encode_video(clip_of(draw(2, 3, 3, 16, 16)))
    first, other = (model.score(model.encode_text(t), video) for t in (tokens[:2], tokens[2:4]))
    assert (first - other).abs().max() > 1e-3
    assert not any(module.training for module in model.modules())


@pytest.mark.parametrize("shape", [(2, 6, 3, 16, 16), (2, 2, 3, 16, 16), (6, 3, 16, 16)])
def test_clips_of_another_length_are_refused(model, shape):
    """Also of twice the length, which would pass as twice as many videos."""
    with pytest.raises(UsageError, match="takes clips of 3 frames"):
        model.encode_video(ClipBatch(torch.zeros(shape), torch.zeros(1, 1), torch.ones(1, 1)))


# --------------------------------------------------------------------------------------------------
# Training
# --------------------------------------------------------------------------------------------------


def test_training_leaves_the_text_tower_and_the_scale(model, tokens):
    objective = XClipRecognition(model, tokens)
    assert isinstance(objective, Objective)
    before = {k: v.clone() for k, v in model.named_parameters()}
    optimizer = torch.optim.AdamW(objective.param_groups(model), lr=1e-3)
    batch = {"clip": clip_of(draw(6, 3, 3, 16, 16)), "label": torch.tensor([0, 1, 2, 3, 4, 0])}
    model.train()
    for _ in range(2):
        loss = objective(model, batch)["class"]
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    moved = {k for k, v in model.named_parameters() if not torch.equal(v, before[k])}
    trained = {k for k in before if k.startswith(("visual.", "mit.", "prompts_"))}
    assert moved == trained
    assert {k for k in before if k not in trained} >= {
        "logit_scale",
        "text_projection",
        "token_embedding.weight",
    }


def test_groups_are_the_papers(model, tokens):
    """New parts at ten times the rate; no decay on vectors and tables of positions."""
    names = {id(p): name for name, p in model.named_parameters()}
    seen = {}
    for group in XClipRecognition(model, tokens).param_groups(model):
        for parameter in group["params"]:
            seen[names[id(parameter)]] = (group["lr_scale"], group["weight_decay"])
    assert set(seen) == {k for k in names.values() if k.startswith(("visual.", "mit.", "prompts_"))}
    for name, (scale, decay) in seen.items():
        new = "message_" in name or not name.startswith("visual.")
        assert scale == (10 if new else 1), name
        parameter = model.get_parameter(name)
        assert decay == (0 if parameter.ndim < 2 or "positional_embedding" in name else 0.001), name


def test_labels_beyond_the_classes_are_refused(model, tokens):
    batch = {"clip": clip_of(draw(2, 3, 3, 16, 16)), "label": torch.tensor([0, 5])}
    with pytest.raises(UsageError, match=r"class numbers in 0\.\.4"):
        XClipRecognition(model, tokens)(model, batch)


def test_what_training_starts_from(model):
    assert RECOGNITION.start(model) is model
    torch.manual_seed(0)
    clip = CLIP(ClipConfig(16, VitConfig(16, 8, 24, 2, 2), TextConfig(8, 32, 16, 1, 2)))
    assert RECOGNITION.start(clip).frames == 8
    assert RECOGNITION.presets["l-14-336"]().frames == 16


# --------------------------------------------------------------------------------------------------
# The claim, and the verbs
# --------------------------------------------------------------------------------------------------


@pytest.fixture
def new_clip(monkeypatch):
    """An untrained image model in the place of the one that takes seconds to train."""

    def made(seed):
        torch.manual_seed(seed)
        return CLIP(world.clip_config(width=32, layers=2)).eval()

    monkeypatch.setattr(world, "image_clip", made)


@pytest.mark.parametrize("arm", CLAIM.arms)
def test_every_arm_of_the_claim_runs(new_clip, arm):
    torch.manual_seed(5)
    before = torch.get_rng_state()
    figures = x_clip.run_claim(arm, 0, steps=2, clips=96)
    assert torch.equal(torch.get_rng_state(), before)
    assert all(math.isfinite(v) for v in figures.values())
    assert CLAIM.metric in figures
    assert figures["text moved by"] == 0


@pytest.mark.parametrize("arm", ["frame mean", "messages, no mit"])
def test_arms_without_positions_cannot_tell_order(new_clip, arm):
    """Exactly: the same clips seen backwards score the same."""
    model = x_clip._start(arm, world.image_clip(0))
    clips = draw(3, 4, 3, 32, 32)
    text = model.encode_text(world.tokens(world.ACTIONS))
    with torch.no_grad():
        a, b = (model.score(text, model.encode_video(clip_of(c))) for c in (clips, clips.flip(1)))
    torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


def test_the_builtin_model_becomes_a_video_model():
    from moviola.verbs.load import load

    base = load("builtin", device="cpu")
    module = XClip.from_clip(base.module)
    loaded = Model(
        module, config=module.config.to_json(), recipe=base.recipe, tokenizer=base.tokenizer, device="cpu"
    )
    rng = np.random.default_rng(0)
    clips = [(rng.integers(0, 255, (n, 64, 64, 3), np.uint8), np.arange(n) / 2) for n in (12, 3)]
    video, mask = loaded.encode_clips(clips)
    assert video.shape == (2, 65, 256)
    assert mask.all()
    scores = loaded.score(["a dog", "a car", "two people"], video, mask)
    assert scores.shape == (3, 2)
    assert np.isfinite(scores).all()
    np.testing.assert_allclose(loaded.embed_clips(clips, normalize=False), video[:, 0], rtol=1e-4, atol=1e-5)


def test_a_model_folder_restores_it(tmp_path, model):
    save_file(model.state_dict(), tmp_path / "w.safetensors")
    made = XClip.from_config(json.loads(json.dumps(model.config.to_json()))).eval()
    made.load_state_dict(load_file(tmp_path / "w.safetensors"))
    clips = clip_of(draw(2, 3, 3, 16, 16))
    assert torch.equal(made.encode_video(clips), model.encode_video(clips))
