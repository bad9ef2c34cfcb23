from __future__ import annotations

import json
import math
from functools import partial

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from moviola.clip.blocks import ResidualBlock
from moviola.clip.config import ClipConfig, ResNetConfig, TextConfig, VitConfig
from moviola.clip.loaded import Model
from moviola.clip.model import CLIP
from moviola.data import order_clips as world
from moviola.parts.alignment import AlignmentConfig, ImplicitAlignment, misalignment, pooled, soft_mask
from moviola.systems.video import ila
from moviola.systems.video.ila import (
    CLAIM,
    GROUPS,
    KEYS,
    RECOGNITION,
    AlignedBlock,
    Ila,
    IlaConfig,
    IlaRecognition,
    b_16,
    b_32,
    l_14_336,
    tiny,
)
from moviola.types import CheckpointError, Encoder, Objective, UsageError


@pytest.fixture(scope="module")
def oracle(oracles_dir):
    folder = oracles_dir / "14-ila"
    return json.loads((folder / "a.json").read_text()), load_file(folder / "a.safetensors")


def draw(*shape, seed=1):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def stirred(module, seed=0):
    """Every parameter and average is drawn: nothing is where it starts."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(0.2 * torch.randn(parameter.shape, generator=generator))
        for name, buffer in module.named_buffers():
            if name.endswith("running_mean"):
                buffer.copy_(0.2 * torch.randn(buffer.shape, generator=generator))
            elif name.endswith("running_var"):
                buffer.copy_(0.5 + torch.rand(buffer.shape, generator=generator))
    return module.eval()


def built(config, seed=0):
    torch.manual_seed(seed)
    return stirred(Ila(config), seed)


def small_clip():
    torch.manual_seed(0)
    return CLIP(ClipConfig(16, VitConfig(16, 4, 24, 2, 2), TextConfig(8, 32, 16, 1, 2))).eval()


def jittered(model, on):
    """The masks as in training, every BatchNorm as in use."""
    for block in model.visual.transformer.resblocks:
        block.message_attn.training = on


mask_of = partial(soft_mask, plateau=0.25, slope=1.5)


@pytest.fixture
def model():
    return built(tiny())


@pytest.fixture
def tokens():
    return torch.tensor([[30, n, n + 7, 31, 0, 0, 0, 0] for n in range(1, 6)])


# --------------------------------------------------------------------------------------------------
# Parity
# --------------------------------------------------------------------------------------------------


def test_parity_of_every_output_and_gradient(oracle):
    meta, data = oracle
    c = meta["config"]
    clip = ClipConfig(
        c["embed_dim"],
        VitConfig(c["image"], c["patch"], c["vwidth"], c["vlayers"], c["vision_heads"]),
        TextConfig(c["ctx"], c["vocab"], c["twidth"], c["tlayers"], c["theads"]),
    )
    heads = {name: c[name] for name in ("mit_heads", "prompt_heads")}
    sizes = {"frames": c["T"], "prompt_layers": c["prompts_layers"], "channels": c["align_hidden"]}
    model = Ila(IlaConfig.over(clip, **heads, **sizes, jitter=c["jitter_delta"])).eval()
    KEYS.load(model, {k.removeprefix("param/"): v for k, v in data.items() if k.startswith("param/")})

    frames, block = data["in/video"].flatten(0, 1), model.visual.transformer.resblocks[0]
    x_FLD = model.visual.embed(frames)
    a_BTLD = block.written(x_FLD)
    look = block.message_attn.look(a_BTLD)
    seen = torch.cat([a_BTLD[:, :, :1], block.message_attn.fc(block.message_attn(a_BTLD).seen_BTPC)], dim=2)
    got = {
        "out/block0_input": x_FLD.transpose(0, 1),
        "out/ila0_pre": a_BTLD[:, :-1],
        "out/ila0_cur": a_BTLD[:, 1:],
        "out/ila0_cls": a_BTLD[None, :, :, 0],
        "out/points0": block.message_attn.points(look),
        "out/ila0_interactive": seen.flatten(0, 1).transpose(0, 1),
        "out/masks": mask_of(data["in/mask_points"], c["mask_res"]),
    }
    for mode in ("test", "jitter"):
        jittered(model, mode == "jitter")
        found = block.message_attn(a_BTLD)
        with model.misalignments() as losses:
            video = model.encode_video(world.clip_batch(data["in/video"]))
        logits = model.score(model.encode_text(data["in/text"]), video).T
        got |= {
            f"out/{mode}/ila0_pair": torch.cat(pooled(a_BTLD, found), dim=-1)[None],
            f"out/{mode}/ila0_aligned": block.aligned(a_BTLD, found),
            f"out/{mode}/block0": block(x_FLD).transpose(0, 1),
            f"out/{mode}/cos_losses": torch.stack(losses),
            f"out/{mode}/frame_features": model.frame_features(frames)[0],
            f"out/{mode}/video_features": video[:, 0],
            f"out/{mode}/logits": logits,
        }
    total = F.cross_entropy(logits, data["in/labels"]) + torch.stack(losses).sum()  # of the jittered masks
    got["out/jitter/total_loss"] = total
    total.backward()
    ours = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    gradients = {f"grad/{name}": g for name, g in KEYS.to_official(ours).items()}
    got |= {name: gradients[name] for name in data if name.startswith("grad/")}

    assert set(got) == {k for k in data if k.startswith(("out/", "grad/"))}
    for name, value in got.items():
        wanted = data[name].double()
        assert value.shape == wanted.shape, name
        worst = ((value.detach().double() - wanted).abs() / (1 + wanted.abs())).max()
        assert worst <= meta["tolerance"], f"{name}: {worst:.2e}"


def written_out(module, a_BTLD, jitter):
    """The three outputs pair by pair, as the specification has them: nine masks, maps that are averaged."""
    frames, side = a_BTLD.shape[1], module.side
    grid_W = [2 * n / (side - 1) - 1 for n in range(side)]
    offsets = [(x, y) for x in (-jitter, 0, jitter) for y in (-jitter, 0, jitter)]

    def fall(e):
        return torch.where(e.abs() <= 0.25, torch.ones_like(e), (1 - 1.5 * (e.abs() - 0.25)).clamp(min=0))

    def masked(patches_WWD, point_2):
        masks = [
            torch.stack([fall(y - point_2[1] - dy) for y in torch.tensor(grid_W)])[:, None]
            * torch.stack([fall(x - point_2[0] - dx) for x in torch.tensor(grid_W)])
            for dx, dy in offsets
        ]
        return torch.stack(masks).mean(0)[..., None] * patches_WWD

    aligned, seen, losses = [], [], []
    for a_TLD in a_BTLD:
        cls_TD, patches_TWWD = a_TLD[:, 0], a_TLD[:, 1:].unflatten(1, (side, side))
        kept, saw = [[] for _ in range(frames)], [[] for _ in range(frames)]
        for t in range(frames - 1):
            pair = torch.cat([patches_TWWD[t], patches_TWWD[t + 1]], -1).permute(2, 0, 1)[None]
            features = module.interactive_block(pair)
            point_4 = 0.75 * module.prediction_block(features).flatten()
            halves = features[0].chunk(2)
            sums = []
            for at, point, half in ((t, point_4[:2], halves[0]), (t + 1, point_4[2:], halves[1])):
                kept[at].append(masked(patches_TWWD[at], point))
                saw[at].append(half)
                sums.append(kept[at][-1].sum((0, 1)))
            losses.append(1 - F.cosine_similarity(*sums, dim=0))
        patches = [torch.stack(k).mean(0).flatten(0, 1) for k in kept]
        aligned.append(torch.stack([torch.cat([c[None], p]) for c, p in zip(cls_TD, patches, strict=True)]))
        volume_CTWW = module.conv(torch.stack([torch.stack(s).mean(0) for s in saw], 1)[None])[0]
        tokens_TPD = module.fc(volume_CTWW.permute(1, 2, 3, 0)).flatten(1, 2)
        seen.append(torch.cat([cls_TD[:, None], tokens_TPD], 1))
    return torch.stack(aligned), torch.stack(seen), torch.stack(losses).mean()


@pytest.mark.parametrize("kind", ["separable", "full"])
@pytest.mark.parametrize(("frames", "side"), [(2, 4), (5, 7)])
@pytest.mark.parametrize("jitter", [0.0, 0.2, 0.05])
@torch.no_grad()
def test_the_alignment_and_its_block_are_the_written_out_formula(kind, frames, side, jitter):
    """Also of the kind that the oracle does not have, of one pair, and with the jitter halved twice."""
    vision = VitConfig(4 * side, 4, 16, 1, 2)
    config = IlaConfig.over(
        ClipConfig(16, vision, TextConfig(8, 32, 16, 1, 2)), frames=frames, channels=16, interactive=kind
    )
    block = stirred(AlignedBlock(16, 2, 4.0, "quick_gelu", config=config))
    block.message_attn.training, block.message_attn.jitter = jitter > 0, jitter
    x_FLD = draw(2 * frames, side * side + 1, 16)
    a_BTLD = block.written(x_FLD)
    aligned, seen, loss = written_out(block.message_attn, a_BTLD, jitter)
    found = block.message_attn(a_BTLD)
    close = {"rtol": 1e-4, "atol": 1e-5}
    torch.testing.assert_close(block.aligned(a_BTLD, found), aligned, **close)
    torch.testing.assert_close(misalignment(a_BTLD, found), loss, **close)
    torch.testing.assert_close(block.interaction(a_BTLD, found), block.temporal_skip_fc(seen), **close)
    y_FLD = x_FLD + (block.temporal_skip_align_fc(aligned) + block.temporal_skip_fc(seen)).flatten(0, 1)
    torch.testing.assert_close(block(x_FLD), ResidualBlock.forward(block, y_FLD), rtol=1e-3, atol=1e-4)


# --------------------------------------------------------------------------------------------------
# Names, sizes, checkpoints
# --------------------------------------------------------------------------------------------------


def official_names(config):
    """Every name in a checkpoint of the authors', from the specification."""
    pair = ("weight", "bias")
    norm = (*pair, "running_mean", "running_var", "num_batches_tracked")
    plain = [f"attn.{a}" for a in ("in_proj_weight", "in_proj_bias", "out_proj.weight", "out_proj.bias")]
    plain += [f"{n}.{p}" for n in ("ln_1", "ln_2", "mlp.c_fc", "mlp.c_proj") for p in pair]
    skips = ("message_fc", "message_ln", "temporal_skip_fc", "temporal_skip_align_fc")
    aligned = [f"{n}.{p}" for n in skips for p in pair]
    convs, norms = {
        "separable": (
            ("0.depthwise_conv.0", "0.pointwise_conv.0", "1"),
            ("0.depthwise_conv.1", "0.pointwise_conv.1", "2"),
        ),
        "full": (("0", "3"), ("1", "4")),
    }[config.interactive]
    convs = [f"interactive_block.{n}" for n in convs] + [f"prediction_block.{n}" for n in (0, 4, 10, 12)]
    norms = [f"interactive_block.{n}" for n in norms] + [f"prediction_block.{n}" for n in (1, 5)]
    aligned += [f"message_attn.{n}.{p}" for n in (*convs, "conv", "fc") for p in pair]
    aligned += [f"message_attn.{n}.{p}" for n in norms for p in norm]
    names = ["text_projection", "positional_embedding", "token_embedding.weight", "logit_scale"]
    names += [f"ln_final.{p}" for p in pair]
    names += [f"transformer.resblocks.{n}.{k}" for n in range(config.text.layers) for k in plain]
    blocks = range(config.vision.layers)
    names += [f"visual.transformer.resblocks.{n}.{k}" for n in blocks for k in (*plain, *aligned)]
    names += [f"visual.{k}" for k in ("conv1.weight", "class_embedding", "positional_embedding", "proj")]
    names += [f"visual.{n}.{p}" for n in ("ln_pre", "ln_post") for p in pair]
    names += ["mit.positional_embedding", *(f"mit.resblocks.0.{k}" for k in plain)]
    layer = [f"cross_attn.{n}.weight" for n in ("q_proj", "k_proj", "v_proj", "proj")]
    layer += ["cross_attn.proj.bias"]
    layer += [f"{n}.{p}" for n in ("norm1", "norm3", "mlp.0", "mlp.3") for p in pair]
    names += [f"prompts_generator.decoder.{n}.{k}" for n in range(2) for k in layer]
    names += ["prompts_generator.alpha", *(f"prompts_generator.norm.{p}" for p in pair)]
    return [*names, "prompts_visual_proj", *(f"prompts_visual_ln.{p}" for p in pair)]


@pytest.mark.parametrize("kind", ["separable", "full"])
@pytest.mark.parametrize("preset", [b_32, l_14_336])
def test_keys_name_every_parameter_at_paper_size(preset, kind):
    config = preset()
    config = IlaConfig.over(config, **{**vars(config), "interactive": kind})
    with torch.device("meta"):
        model = Ila(config)
    assert sorted(KEYS.official_names(model.state_dict())) == sorted(official_names(config))
    aligner = model.visual.transformer.resblocks[0].message_attn
    assert aligner.interactive_block[-3].weight.shape == (256, 256, 3, 3)
    assert aligner.prediction_block[12].weight.shape == (4, 32, 1)
    assert aligner.conv.weight.shape == (128, 128, 3, 1, 1)
    assert model.visual.transformer.resblocks[0].attn.heads == config.vision.width // 64


def wide(kind="separable"):
    clip = ClipConfig(128, VitConfig(64, 16, 128, 2, 2), TextConfig(8, 32, 64, 1, 1))
    return IlaConfig.over(clip, frames=4, prompt_layers=1, interactive=kind, channels=32)


@pytest.mark.parametrize("kind", ["separable", "full"])
def test_reads_the_authors_file(tokens, kind):
    """Sizes and the kind of convolution from the shapes, also from under the `module.` of their training."""
    model, clip = built(wide(kind)), world.clip_batch(draw(2, 4, 3, 64, 64))
    state = {f"module.{k}": v for k, v in KEYS.to_official(model.state_dict()).items()}
    made = Ila.from_official(state)
    assert made.config == model.config
    video = made.encode_video(clip)
    assert torch.equal(video, model.encode_video(clip))
    assert torch.equal(
        made.score(made.encode_text(tokens), video), model.score(model.encode_text(tokens), video)
    )


def test_a_file_that_does_not_fit_is_refused():
    state = KEYS.to_official(built(wide()).state_dict())
    lacking = {k: v for k, v in state.items() if "temporal_skip_fc" not in k}
    with pytest.raises(CheckpointError, match=r"4 missing: visual\.transformer\.resblocks\.0\.temporal_skip"):
        Ila.from_official(lacking)
    with pytest.raises(CheckpointError, match=r"1 unexpected: extra"):
        Ila.from_official({**state, "extra": torch.zeros(1)})
    with pytest.raises(CheckpointError, match=r"no prompts_generator\.alpha"):  # a model of SSv2
        Ila.from_official({k: v for k, v in state.items() if "prompts" not in k})
    with pytest.raises(CheckpointError, match=r"expected \(1, 8, 128\), got \(1, 4, 128\)"):
        KEYS.load(Ila(IlaConfig.over(wide(), frames=8, prompt_layers=1, channels=32)), state)


# --------------------------------------------------------------------------------------------------
# The start: CLIP
# --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["separable", "full"])
@pytest.mark.parametrize("training", [False, True])
def test_a_fresh_model_gives_exactly_clips_frame_vectors(kind, training):
    clip = small_clip()
    model = Ila.from_clip(clip, interactive=kind, channels=16)
    assert isinstance(model, Encoder)
    assert not model.training
    assert (model.frame_spec.count, model.frame_spec.padding) == (8, "repeat-last")
    assert all(torch.equal(model.state_dict()[k], v) for k, v in clip.state_dict().items())
    frames = draw(16, 3, 16, 16)
    assert torch.equal(model.train(training).frame_features(frames)[0], clip.encode_image(frames))
    assert torch.equal(model.encode_text(torch.arange(8)[None]), clip.encode_text(torch.arange(8)[None]))


def test_points_start_in_the_centre_and_lie_within_reach():
    torch.manual_seed(0)
    module = ImplicitAlignment(8, (5, 5), 4, AlignmentConfig(channels=16))
    a_BTLD = draw(3, 4, 26, 8)
    assert not module.points(module.look(a_BTLD)).any()
    nn.init.normal_(module.prediction_block[12].weight, std=9)
    point_Bt4 = module.points(module.look(a_BTLD))
    assert point_Bt4.shape == (3, 3, 4)
    assert 0.5 < point_Bt4.abs().max() <= 0.75


def test_the_mask():
    """Symmetric about the point; 1 within 0.25 of it on both axes, 0 from 0.25 + 2/3 on either."""
    mask_WW = mask_of(torch.zeros(2), 25)
    torch.testing.assert_close(mask_WW, mask_WW.flip(0))
    torch.testing.assert_close(mask_WW, mask_WW.T)
    e = torch.linspace(-1, 1, 25).abs()
    assert torch.all(mask_WW[e <= 0.25][:, e <= 0.25] == 1)
    assert torch.all(mask_WW[e >= 0.25 + 2 / 3] == 0)
    assert torch.all(mask_WW[e < 0.25 + 2 / 3][:, e < 0.25 + 2 / 3] > 0)
    moved_WW = mask_of(torch.tensor([0.75, -0.5]), 25)  # x is the column, y the row
    rows, columns = (moved_WW.sum(axis) for axis in (1, 0))
    centre = [float((torch.linspace(-1, 1, 25) * w).sum() / w.sum()) for w in (rows, columns)]
    assert centre[0] < -0.4
    assert centre[1] > 0.5


def test_the_mean_of_nine_masks_is_made_of_three_an_axis():
    points, offsets = draw(4, 2, seed=3).clamp(-0.75, 0.75), (-0.2, 0.0, 0.2)
    nine = [mask_of(points + torch.tensor([x, y]), 7) for x in offsets for y in offsets]
    torch.testing.assert_close(mask_of(points, 7, jitter=0.2), torch.stack(nine).mean(0))


def test_points_follow_a_bright_patch_that_moves():
    """All but the patch is noise of its own in every frame, so masks agree where they are on the patch."""
    generator = torch.Generator().manual_seed(0)
    a_BTWWD = torch.randn(256, 2, 7, 7, 8, generator=generator)
    corner_BT2 = torch.randint(5, (256, 2, 2), generator=generator)
    for clip, corners in zip(a_BTWWD, corner_BT2.tolist(), strict=True):
        for frame, (y, x) in zip(clip, corners, strict=True):
            frame[y : y + 3, x : x + 3] = 6 * torch.eye(8)[0]
    place_B4 = ((corner_BT2.flip(-1) + 1) / 3 - 1).clamp(-0.75, 0.75).flatten(1)
    a_BTLD = F.pad(a_BTWWD.flatten(2, 3), (0, 0, 1, 0))
    torch.manual_seed(0)
    module = ImplicitAlignment(8, (7, 7), 2, AlignmentConfig(channels=16))
    optimizer = torch.optim.AdamW(module.parameters(), lr=5e-3)

    def missed():
        with torch.no_grad():
            point_B4 = module.eval().points(module.look(a_BTLD[192:]))[:, 0]
            loss = misalignment(a_BTLD[192:], module(a_BTLD[192:]))
        module.train()
        return float((point_B4 - place_B4[192:]).abs().mean()), float(loss)

    before = missed()
    for step in range(100):
        rows = torch.arange(32 * step, 32 * step + 32) % 192
        loss = misalignment(a_BTLD[rows], module(a_BTLD[rows]))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    after = missed()
    assert after[0] < 0.85 * before[0]
    assert after[1] < 0.7 * before[1]


# --------------------------------------------------------------------------------------------------
# Frames
# --------------------------------------------------------------------------------------------------


def test_a_block_hears_of_neighbours_and_no_further(model):
    """Pairs reach one frame, and the temporal kernel one more."""
    config = IlaConfig.over(tiny(), frames=6, mit_heads=2, prompt_heads=2, channels=16)
    block = built(config).visual.transformer.resblocks[0]
    x = draw(12, 17, 16)
    edited = x.clone()
    edited[5] += draw(17, 16, seed=2)  # the last frame of the first clip
    moved = (block(edited) - block(x)).abs().amax((1, 2))
    assert torch.all(moved[3:6] > 1e-5)
    assert torch.all(moved[[0, 1, 2, 6, 7, 8, 9, 10, 11]] < 1e-5)


def test_the_alignment_knows_which_frame_is_earlier(model):
    frames = draw(3, 3, 16, 16)
    there, back = model.frame_features(frames)[0], model.frame_features(frames.flip(0))[0].flip(0)
    assert (there - back).abs().max() > 1e-3


def test_a_picture_is_a_still_clip(model):
    pictures = draw(4, 3, 16, 16)
    got = model.encode_image(pictures)
    assert torch.equal(got, model.pool(model.encode_video(model.still(pictures))))
    assert (got[0] - got[1]).abs().max() > 0.01


def test_one_pair_alone_in_a_batch_trains(tokens):
    model = Ila(IlaConfig.over(tiny(), frames=2, mit_heads=2, prompt_heads=2, channels=16)).train()
    objective = IlaRecognition(model, tokens)
    batch = {"clip": world.clip_batch(draw(1, 2, 3, 16, 16)), "label": torch.tensor([3])}
    losses = objective(model, batch)
    assert set(losses) == {"class", "alignment"}
    assert all(loss.ndim == 0 and torch.isfinite(loss) for loss in losses.values())


# --------------------------------------------------------------------------------------------------
# Bad input
# --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"frames": 1}, "2 frames or more are needed, got 1"),
        ({"vision": VitConfig((16, 24), 4, 16, 2, 2)}, "square grid .* got 4 x 6"),
        ({"vision": VitConfig(12, 4, 16, 2, 2)}, "4 x 4 patches or more, got 3 x 3"),
        ({"vision": ResNetConfig(32, 8, (1, 1, 1, 1), 2)}, "Ila needs a CLIP with a vision transformer"),
        ({"channels": 12}, "multiple of 8, got 12"),
    ],
)
def test_models_that_cannot_be_aligned_are_refused(change, told):
    with pytest.raises(UsageError, match=told):
        Ila(IlaConfig(**{**vars(tiny()), **change}))


@pytest.mark.parametrize("shape", [(2, 6, 3, 16, 16), (2, 2, 3, 16, 16), (6, 3, 16, 16)])
def test_clips_of_another_length_are_refused(model, shape):
    """Also of twice the length, which would pass as twice as many videos."""
    clip = world.clip_batch(torch.zeros(2, 3, 3, 16, 16))
    object.__setattr__(clip, "frames_BTCHW", torch.zeros(shape))
    with pytest.raises(UsageError, match="takes clips of 3 frames"):
        model.encode_video(clip)


@pytest.mark.parametrize("shape", [(2, 4, 17, 16), (2, 3, 26, 16), (2, 3, 17, 8)])
def test_tokens_of_another_shape_are_refused(model, shape):
    with pytest.raises(UsageError, match="takes 3 frames of 17 tokens, 16 wide"):
        model.visual.transformer.resblocks[0].message_attn(torch.zeros(shape))


def test_labels_beyond_the_classes_are_refused(model, tokens):
    batch = {"clip": world.clip_batch(draw(2, 3, 3, 16, 16)), "label": torch.tensor([0, 5])}
    with pytest.raises(UsageError, match=r"class numbers in 0\.\.4"):
        IlaRecognition(model, tokens)(model, batch)


# --------------------------------------------------------------------------------------------------
# Training
# --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("prompts", [False, True])
def test_only_the_new_parts_train(model, tokens, prompts):
    objective = IlaRecognition(model, tokens, train_prompts=prompts)
    assert isinstance(objective, Objective)
    before = {k: v.clone() for k, v in model.named_parameters()}
    optimizer = torch.optim.AdamW(objective.param_groups(model), lr=1e-3)
    batch = {"clip": world.clip_batch(draw(6, 3, 3, 16, 16)), "label": torch.tensor([0, 1, 2, 3, 4, 0])}
    model.train()
    for _ in range(2):
        torch.stack(list(objective(model, batch).values())).sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    moved = {k for k, v in model.named_parameters() if not torch.equal(v, before[k])}
    new = ("message_", "temporal_skip", "mit.", *(("prompts_",) if prompts else ()))
    assert moved == {k for k in before if any(word in k for word in new)}


def test_groups_are_the_papers(model, tokens):
    """Rates at the run's 8e-6; no decay on vectors and positions."""
    names = {id(p): name for name, p in model.named_parameters()}
    wanted = {"message_": (5e-4, 1e-2), "temporal_": (8e-5, 1e-3), "mit.": (4e-4, 3e-3)}
    seen = set()
    for group in IlaRecognition(model, tokens).param_groups(model):
        for parameter in group["params"]:
            name = names[id(parameter)]
            assert name not in seen
            seen.add(name)
            (lr, decay), *other = [v for word, v in wanted.items() if word in name]
            assert not other
            assert RECOGNITION.recipe["lr"] * group["lr_scale"] == pytest.approx(lr), name
            vector = parameter.ndim < 2 or "positional_embedding" in name
            assert group["weight_decay"] == pytest.approx(0 if vector else decay), name
    assert seen == {k for k in names.values() if any(word in k for word in GROUPS)}


def test_the_jitter_halves_in_each_epoch_from_the_30th_on(model, tokens):
    """At the start of epoch 30 of 50 and of every later one; a resumed run knows how often."""
    objective, batch = IlaRecognition(model, tokens), {"label": torch.tensor([0])}
    batch["clip"] = world.clip_batch(draw(1, 3, 3, 16, 16))
    halved, aligner = [], model.visual.transformer.resblocks[1].message_attn
    for step in range(200):  # four steps an epoch
        if step % 20 == 18 or step % 20 == 0 or step > 190:
            with torch.no_grad():
                objective(model, batch)
            halved.append((step, round(math.log2(0.2 / aligner.jitter))))
        objective.lr_factors(step, 200)
    assert halved == [(step, max(0, step // 4 - 29)) for step, _ in halved]
    resumed = IlaRecognition(model, tokens)
    resumed.load_state_dict(objective.state_dict())
    model.set_jitter(0.2)
    resumed(model, batch)
    assert aligner.jitter == 0.2 * 0.5**20


def test_the_alignment_is_its_own_loss(model, tokens):
    batch = {"clip": world.clip_batch(draw(4, 3, 3, 16, 16)), "label": torch.tensor([0, 1, 2, 3])}
    options = {"mixup": 0, "cutmix": 0}
    one, half = (IlaRecognition(model, tokens, alignment_weight=w, **options)(model, batch) for w in (1, 0.5))
    assert one["alignment"] > 0.01
    torch.testing.assert_close(half["alignment"], one["alignment"] / 2)
    assert torch.equal(half["class"], one["class"])
    hooks = [block.message_attn._forward_hooks for block in model.visual.transformer.resblocks]
    assert not any(hooks)


def test_training_keeps_the_stems_averages(tokens):
    """The stem is frozen with the rest of the CLIP, and its BatchNorm would drift."""
    torch.manual_seed(0)
    model = Ila.from_clip(CLIP(world.clip_config(32, 2)), frames=2, channels=16)
    before = {k: v.clone() for k, v in model.visual.stem.state_dict().items()}
    model.train().frame_features(draw(4, 3, 32, 32))
    assert all(torch.equal(v, before[k]) for k, v in model.visual.stem.state_dict().items())
    assert model.visual.transformer.resblocks[0].message_attn.interactive_block[2].num_batches_tracked == 1


def test_what_training_starts_from(model):
    assert RECOGNITION.start(model) is model
    assert RECOGNITION.start(small_clip()).frames == 8
    assert RECOGNITION.presets["l-14-336"]().frames == 16


# --------------------------------------------------------------------------------------------------
# Cost
# --------------------------------------------------------------------------------------------------


def block_flops(config):
    """Operations of a block for one clip: ours, and CLIP's over the tokens of all frames at once."""
    vision, frames = config.vision, config.frames
    rows, columns = vision.grid
    with torch.device("meta"):
        x_FLD = torch.zeros(frames, rows * columns + 1, vision.width)
        ours = AlignedBlock(vision.width, vision.heads, 4.0, "quick_gelu", config=config).eval()
        plain = ResidualBlock(vision.width, vision.heads, 4.0, "quick_gelu", causal=False)
        counts = []
        for block, x in ((ours, x_FLD), (plain, x_FLD.flatten(0, 1)[None]), (plain, x_FLD)):
            with FlopCounterMode(display=False) as counter, torch.no_grad():
                block(x)
            counts.append(counter.get_total_flops())
    return counts


def test_long_clips_cost_less_than_attention_over_all_tokens_and_short_ones_do_not():
    """With 8 frames of ViT-B/16 the convolutions cost as much as joint attention would."""
    ours, joint, frame = block_flops(l_14_336())
    assert ours < 0.65 * joint
    assert ours < 1.4 * frame
    ours, joint, _ = block_flops(b_16())
    assert 0.95 < ours / joint < 1.15


# --------------------------------------------------------------------------------------------------
# The claim, and the verbs
# --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("arm", CLAIM.arms)
def test_every_arm_of_the_claim_runs(monkeypatch, arm):
    def new_clip(seed):
        torch.manual_seed(seed)
        return CLIP(world.clip_config(width=32, layers=2)).eval()

    monkeypatch.setattr(world, "image_clip", new_clip)
    torch.manual_seed(5)
    before = torch.get_rng_state()
    figures = ila.run_claim(arm, 0, steps=2, clips=96)
    assert torch.equal(torch.get_rng_state(), before)
    assert all(math.isfinite(v) for v in figures.values())
    assert CLAIM.metric in figures


def test_the_builtin_model_becomes_a_video_model():
    from moviola.verbs.load import load

    base = load("builtin", device="cpu")
    module = Ila.from_clip(base.module)
    loaded = Model(
        module, config=module.config.to_json(), recipe=base.recipe, tokenizer=base.tokenizer, device="cpu"
    )
    rng = np.random.default_rng(0)
    clips = [(rng.integers(0, 255, (n, 64, 64, 3), np.uint8), np.arange(n) / 2) for n in (12, 3)]
    video, mask = loaded.encode_clips(clips)
    assert video.shape == (2, 65, 256)
    scores = loaded.score(["a dog", "a car", "two people"], video, mask)
    assert scores.shape == (3, 2)
    assert np.isfinite(scores).all()


def test_a_model_folder_restores_it(tmp_path, model):
    save_file(model.state_dict(), tmp_path / "w.safetensors")
    made = Ila.from_config(json.loads(json.dumps(model.config.to_json()))).eval()
    made.load_state_dict(load_file(tmp_path / "w.safetensors"))
    clip = world.clip_batch(draw(2, 3, 3, 16, 16))
    assert torch.equal(made.encode_video(clip), model.encode_video(clip))
