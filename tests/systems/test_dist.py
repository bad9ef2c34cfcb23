from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import nn

from moviola.clip.config import ClipConfig, ResNetConfig, TextConfig, VitConfig, vit_b_16, vit_l_14
from moviola.clip.model import CLIP
from moviola.parts import side_network as blocks
from moviola.parts.side_network import DistConfig
from moviola.systems.video.dist import (
    KEYS,
    OFFICIAL_PREFIX,
    RECOGNITION,
    DiST,
    DistRecognition,
    SideNetwork,
    b_16,
    l_14,
    run_claim,
    tiny,
)
from moviola.types import CheckpointError, ClipBatch, Encoder, UsageError

CLASSES = torch.tensor([[30, n, n + 7, 31, 0, 0, 0, 0] for n in range(1, 6)])


def made(config=None, seed=0):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return DiST(config or tiny()).eval()


def pixels(count=2, frames=4, size=(16, 16), seed=1):
    return torch.randn(count, frames, 3, *size, generator=torch.Generator().manual_seed(seed))


def clip_of(frames_BTCHW):
    mask_BT = torch.ones(frames_BTCHW.shape[:2], dtype=torch.bool)
    return ClipBatch(frames_BTCHW, mask_BT.float(), mask_BT)


# --------------------------------------------------------------------------------------------------
# Parity
# --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def oracle(oracles_dir):
    folder = oracles_dir / "67-dist"
    return json.loads((folder / "a.json").read_text()), load_file(folder / "a.safetensors")


def oracle_network(meta, data):
    c = meta["config"]
    layers = len(c["selected_layers"])
    clip = ClipConfig(c["out_dim"], VitConfig(c["image"], c["patch"], c["clip_width"], layers, 2))
    given = {k.removeprefix("param/"): v for k, v in data.items() if k.startswith("param/")}
    sizes = blocks.side_sizes(given)
    config = DistConfig(clip, layers=tuple(c["selected_layers"]), pool_heads=c["pool_heads"], **sizes)
    stated = {
        "integration_dim": "integration_dim",
        "temporal_dim": "temporal_dim",
        "alpha": "alpha",
        "frames": "T",
        "kernel": "temporal_kernel",
        "stem_kernel": "stem_temporal_kernel",
        "temporal_ratio": "temporal_mlp_ratio",
        "integration_ratio": "integration_mlp_ratio",
        "integration_temporal_ratio": "integration_temporal_mlp_ratio",
        "pool_layers": "ada_pooling_layers",
    }
    assert {ours: getattr(config, ours) for ours in stated} == {o: c[t] for o, t in stated.items()}
    network = SideNetwork(config)
    named = KEYS.from_official({f"dist_net.{name}": value for name, value in given.items()})
    network.load_state_dict({name.removeprefix("dist_net."): value for name, value in named.items()})
    return network


def stream(x_BTHWC):  # ours, channels last, to (B, C, T, h, w)
    return x_BTHWC.permute(0, 4, 1, 2, 3)


def tokens(x_BtLC):  # to (L, B * t, C)
    return x_BtLC.flatten(0, 1).transpose(0, 1)


def test_parity_of_every_output_and_gradient(oracle):
    meta, data = oracle
    network = oracle_network(meta, data)
    clips, alpha, (rows, columns) = meta["config"]["B"], meta["config"]["alpha"], network.config.vision.grid
    got = {}

    def keep(name, turned):
        return lambda _, given, result: got.__setitem__(name, turned(given, result))

    for k in (0, 1):
        network.temporal_nets[k].register_forward_hook(keep(f"out/temporal_nets.{k}", lambda _, y: stream(y)))
        network.integration2temporal_nets[k].register_forward_hook(
            keep(
                f"out/integration2temporal_nets.{k}",
                lambda _, y: stream(y.unflatten(2, (rows, columns)).repeat_interleave(alpha, dim=1)),
            )
        )
        for name in ("temporal2integration_nets", "integration_nets"):
            getattr(network, name)[k].register_forward_hook(keep(f"out/{name}.{k}", lambda _, y: tokens(y)))
        pool = network.adapooling_nets[k]
        pool.register_forward_hook(keep(f"out/ada{k}_top", lambda _, y: y[0][None]))
        pool.register_forward_hook(keep(f"out/ada{k}_spatial", lambda _, y: y[1].flatten(0, 1)[None]))
    first = network.adapooling_nets[0]
    first.register_forward_hook(keep("out/pool_input", lambda given, _: tokens(given[0])))
    network.temporal_stem.register_forward_hook(keep("out/stem", lambda _, y: y))

    frames_BTCHW = data["in/frames"].unflatten(0, (clips, -1))
    taps = {n: data[f"in/clip_tokens.{n}"].transpose(0, 1) for n in meta["config"]["selected_layers"]}
    got["out/video"] = network(frames_BTCHW, taps)
    got["out/mean_square"] = got["out/video"].square().mean()
    got["out/mean_square"].backward()
    parameters = dict(network.named_parameters())
    got |= {n: parameters[n.removeprefix("grad/")].grad for n in data if n.startswith("grad/")}

    assert set(got) == {name for name in data if name.startswith(("out/", "grad/"))}
    for name, value in got.items():
        assert value.shape == data[name].shape, name
        worst = ((value - data[name]).abs() / (1 + data[name].abs())).max().item()
        assert worst <= meta["tolerance"], f"{name}: {worst:.2e}"


def official_names(config):
    """The names in the authors' files, from the modules of their code."""
    linear = ("weight", "bias")
    names = ["logit_scale", "positional_embedding", "text_projection", "token_embedding.weight"]
    names += [f"ln_final.{n}" for n in linear] + ["visual.class_embedding", "visual.positional_embedding"]
    names += ["visual.conv1.weight", "visual.proj"]
    names += [f"visual.{ln}.{n}" for ln in ("ln_pre", "ln_post") for n in linear]
    for tower, depth in (("visual.", config.vision.layers), ("", config.clip.text.layers)):
        parts = ("attn.out_proj", "ln_1", "ln_2", "mlp.c_fc", "mlp.c_proj")
        for layer in range(depth):
            block = f"{tower}transformer.resblocks.{layer}."
            names += [f"{block}attn.in_proj_{n}" for n in linear]
            names += [f"{block}{part}.{n}" for part in parts for n in linear]
    side = ["aggregated_cls_token", "aggregated_spatial_cls_token", "proj"]
    side += [f"{m}.{n}" for m in ("temporal_stem", "proj_spatial_cls_token", "ln_post") for n in linear]
    a_layer = (
        "input_linears.{}",
        "integration2temporal_nets.{}.linear_fuse",
        "temporal2integration_nets.{}.linear_fuse",
        "temporal_nets.{}.ln",
        "temporal_nets.{}.temporal_net.c_fc1",
        "temporal_nets.{}.temporal_net.c_fc2",
        "integration_nets.{}.ln",
        "integration_nets.{}.ln_temporal",
        "integration_nets.{}.ffn.c_fc",
        "integration_nets.{}.ffn.c_proj",
        "integration_nets.{}.temporal_ffn.c_fc1",
        "integration_nets.{}.temporal_ffn.c_fc2",
        "integration_nets.{}.temporal_ffn.c_proj",
    )
    side += [f"{m.format(k)}.{n}" for k in range(config.vision.layers) for m in a_layer for n in linear]
    side += [f"temporal2integration_nets.{k}.cls_token" for k in range(config.vision.layers)]
    for k in range(config.pool_layers):
        pool = f"adapooling_nets.{k}."
        side.append(f"{pool}positional_embedding")
        side += [f"{pool}ln_out_{which}_cls_token.{n}" for which in ("temp", "spat") for n in linear]
        for maps in ("output_map_cls_token", "output_map_spatial_cls_token"):
            side += [f"{pool}{maps}.{m}.{n}" for m in ("c_fc", "c_proj") for n in linear]
        for seen in ("temporal_transformer", "spatial_transformer"):
            side += [f"{pool}{seen}.attn.in_proj_{n}" for n in linear]
            side += [f"{pool}{seen}.{m}.{n}" for m in ("attn.out_proj", "ln_1") for n in linear]
    return names + [f"dist_net.{n}" for n in side]


@pytest.mark.parametrize("config", [b_16(), l_14()], ids=["b-16", "l-14"])
def test_keys_cover_the_official_list_at_paper_size(config):
    with torch.device("meta"):
        state = DiST(config).state_dict()
    assert sorted(KEYS.to_official(state)) == sorted(official_names(config))
    assert set(KEYS.from_official(KEYS.to_official(state))) == set(state)


def test_paper_sizes():
    with torch.device("meta"):
        network = SideNetwork(b_16())
    state = network.state_dict()
    assert state["temporal_stem.weight"].shape == (96, 3, 5, 16, 16)
    assert state["temporal2integration_nets.0.cls_token"].shape == (1, 1, 8, 384)
    assert network.adapooling_nets[0].spatial_transformer.attn.heads == 6
    assert l_14().patch == 14
    over = DistConfig.over(vit_l_14())
    assert (over.integration_dim, over.temporal_dim) == (384, 96)


def official_file(model):
    """The model as in the authors' files."""
    return {OFFICIAL_PREFIX + name: tensor for name, tensor in KEYS.to_official(model.state_dict()).items()}


def wide_config(**options):
    """Heads 64 wide, as a checkpoint's must be to follow from its shapes."""
    text = TextConfig(context_length=8, vocab_size=32, width=64, layers=1, heads=1)
    clip = ClipConfig(16, VitConfig(16, 8, 64, 2, 1), text)
    return DistConfig(clip, **{"frames": 4, "integration_dim": 64, "temporal_dim": 8, **options})


def test_an_official_checkpoint_gives_the_same_model_back():
    model = made(wide_config(alpha=4, kernel=5, pool_layers=1, integration_temporal_ratio=0.3))
    back = DiST.from_official(official_file(model))
    assert back.config == replace(model.config, stem_patch=8, integration_temporal_ratio=19 / 64)
    frames = clip_of(pixels())
    assert torch.equal(back.encode_video(frames), model.encode_video(frames))
    assert [n for n, p in back.named_parameters() if p.requires_grad] == [
        n for n, p in model.named_parameters() if p.requires_grad
    ]


def test_an_official_checkpoint_that_is_not_whole():
    state = official_file(made(wide_config()))
    lacking = {k: v for k, v in state.items() if not k.endswith("ln_temporal.bias")}
    with pytest.raises(CheckpointError, match=r"2 missing: dist_net\.integration_nets\.0\.ln_temporal\.bias"):
        DiST.from_official(lacking)
    with pytest.raises(CheckpointError, match="not DiST's"):
        DiST.from_official({k: v for k, v in state.items() if "temporal_stem" not in k})
    some = made(wide_config(layers=(1,)))
    with pytest.raises(CheckpointError, match="missing"):
        DiST.from_official(official_file(some))
    frames = clip_of(pixels())
    back = DiST.from_official(official_file(some), layers=(1,))
    assert torch.equal(back.encode_video(frames), some.encode_video(frames))


# --------------------------------------------------------------------------------------------------
# Exact faster forms
# --------------------------------------------------------------------------------------------------


def assert_same(got, wanted):
    torch.testing.assert_close(got, wanted, rtol=0, atol=1e-12)


@pytest.mark.parametrize("kernel", [1, 3, 5])
def test_convolutions_over_time_equal_conv3d(kernel):
    torch.manual_seed(0)
    conv = nn.Conv3d(6, 7, (kernel, 1, 1), padding=(kernel // 2, 0, 0)).double()
    x_BTHWC = torch.randn(2, 5, 3, 4, 6).double()
    assert_same(stream(blocks.over_time(x_BTHWC, conv)), conv(stream(x_BTHWC)))
    mlp = blocks.TimeMlp(6, 4, kernel).double()
    assert_same(stream(mlp(x_BTHWC)), mlp.c_proj(mlp.act(mlp.c_fc2(mlp.c_fc1(stream(x_BTHWC))))))


@pytest.mark.parametrize("alpha", [1, 2, 4])
def test_the_fusion_of_frames_equals_conv3d(alpha):
    torch.manual_seed(0)
    fuse = blocks.ToIntegration(6, 8, alpha, 4 // alpha).double()
    x_BTHWC = torch.randn(2, 4, 3, 5, 6).double()
    wanted = fuse.linear_fuse(stream(x_BTHWC)).flatten(3).permute(0, 2, 3, 1)
    assert_same(fuse(x_BTHWC)[:, :, 1:], wanted)
    assert_same(fuse(x_BTHWC)[1, :, 0], fuse.cls_token[0, 0])


def test_one_query_attention_equals_multi_head_attention():
    torch.manual_seed(0)
    ours = blocks.OneQueryAttention(12, 3).double()
    nn.init.normal_(ours.in_proj_bias)
    theirs = nn.MultiheadAttention(12, 3, batch_first=True).double()
    theirs.load_state_dict(ours.state_dict())
    query_FC, seen_FLC = torch.randn(4, 12).double(), torch.randn(4, 9, 12).double()
    wanted = theirs(query_FC[:, None], seen_FLC, seen_FLC)[0][:, 0]
    assert_same(ours(query_FC, seen_FLC), wanted)
    ours(query_FC, seen_FLC).square().sum().backward()
    wanted.square().sum().backward()
    assert_same(ours.in_proj_weight.grad, theirs.in_proj_weight.grad)
    assert_same(ours.in_proj_bias.grad, theirs.in_proj_bias.grad)


def test_a_picture_is_a_still_clip():
    model = made()
    pixels_BCHW = pixels()[:, 0]
    wanted = model.encode_video(model.still(pixels_BCHW))
    torch.testing.assert_close(model.encode_image(pixels_BCHW), wanted, rtol=0, atol=1e-6)


# --------------------------------------------------------------------------------------------------
# What the card lists
# --------------------------------------------------------------------------------------------------


def loss_of(model, frames_BTCHW):
    return model.encode_video(clip_of(frames_BTCHW)).square().sum()


def test_no_gradient_reaches_clip_and_all_else_trains():
    model = made().train()
    frames = pixels().requires_grad_()
    loss_of(model, frames).backward()
    assert not any(p.requires_grad or p.grad is not None for p in model.clip.parameters())
    without = [n for n, p in model.named_parameters() if p.requires_grad and p.grad is None]
    assert not without
    frozen = {n for n, p in model.dist_net.named_parameters() if not p.requires_grad}
    assert frozen == {f"integration2temporal_nets.1.linear_fuse.{n}" for n in ("weight", "bias")}
    assert not any(t.requires_grad for t in model.taps(pixels()).values())


def test_even_a_clip_made_to_train_gets_no_gradient():
    model = made()
    model.clip.requires_grad_(True)
    loss_of(model, pixels()).backward()
    assert all(p.grad is None for p in model.clip.parameters())


def test_stored_tokens_give_the_same_result_and_gradients():
    model = made()
    frames = pixels(3)
    stored = {n: torch.cat([model.taps(one[None])[n] for one in frames]) for n in model.config.selected}
    direct = model.encode_video(clip_of(frames))
    again = model.side(frames, stored)
    torch.testing.assert_close(again, direct, rtol=0, atol=1e-6)
    grads = []
    for video in (direct, again):
        model.zero_grad()
        video.square().sum().backward()
        grads.append({n: p.grad for n, p in model.named_parameters() if p.grad is not None})
    assert grads[0]
    for name, grad in grads[0].items():
        torch.testing.assert_close(grads[1][name], grad, rtol=1e-4, atol=1e-5)


def test_order_counts_and_the_frame_mean_knows_none():
    model = made()
    frames = pixels()
    turned = frames.flip(1)
    assert (model.encode_video(clip_of(turned)) - model.encode_video(clip_of(frames))).abs().max() > 1e-3
    means = [model.clip.encode_video(clip_of(f)) for f in (frames, turned)]
    torch.testing.assert_close(*means, rtol=0, atol=1e-6)


def test_the_tower_sees_every_alpha_th_frame_only():
    model = made()
    frames = pixels()
    other = frames.clone()
    other[:, 1] = 0.0  # skipped with alpha 2
    before, after = model.taps(frames), model.taps(other)
    assert all(torch.equal(before[n], after[n]) for n in before)
    assert before[0].shape == (2 * 2, 5, 16)
    assert not torch.equal(model.encode_video(clip_of(frames)), model.encode_video(clip_of(other)))
    other = frames.clone()
    other[:, 2] = 0.0
    assert not torch.equal(before[0], model.taps(other)[0])


def saved_bytes(function, model):
    """Bytes kept for the backward pass, weights not counted."""
    own = {p.data_ptr() for p in model.parameters()}
    kept = {}

    def note(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = (storage.nbytes(), tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        result = function()
    del result
    return sum(size for size, _ in kept.values())


def test_training_keeps_less_than_through_the_tower():
    clip = ClipConfig(64, VitConfig(64, 16, 128, 4, 2), TextConfig(8, 32, 16, 1, 2))
    model = made(DistConfig.over(clip, frames=8))
    frames = pixels(2, 8, (64, 64))
    ours = saved_bytes(lambda: loss_of(model, frames), model)
    model.clip.requires_grad_(True)
    tower = saved_bytes(lambda: model.clip.encode_image(frames[:, ::2].flatten(0, 1)).square().sum(), model)
    assert 0 < ours < 0.6 * tower  # the same frames through the tower: 8 frames beside, 4 in it


def test_with_clip_averages_the_scores_of_both():
    model = made()
    frames, text = (
        pixels(),
        model.encode_text(torch.tensor([[30, 3, 31, 0, 0, 0, 0, 0], [30, 9, 31] + [0] * 5])),
    )
    ours = model.score(text, model.encode_video(clip_of(frames)))
    unit_FE = F.normalize(model.clip.encode_image(frames[:, ::2].flatten(0, 1)), dim=-1)
    cosine_NF = F.normalize(text, dim=-1) @ unit_FE.T
    plain = model.clip.logit_scale.exp() * cosine_NF.unflatten(1, (2, -1)).mean(-1)
    model.with_clip = 0.5
    video = model.encode_video(clip_of(frames))
    torch.testing.assert_close(model.score(text, video), (ours + plain) / 2, rtol=1e-5, atol=1e-5)
    still = model.encode_image(frames[:, 0])
    torch.testing.assert_close(still, model.encode_video(model.still(frames[:, 0])), rtol=0, atol=1e-6)
    model.train()  # training is the side network's alone
    torch.testing.assert_close(model.score(text, model.encode_video(clip_of(frames))), ours)
    assert made(replace(tiny(), with_clip=0.5)).with_clip == 0.5


def test_it_is_an_encoder_and_gives_its_clip_back():
    model = made()
    assert isinstance(model, Encoder)
    assert model.frame_spec.count == 4
    assert model.to_clip() is model.clip
    video = model.encode_video(clip_of(pixels()))
    assert model.pool(video) is video


def test_training_mode_leaves_the_towers_running_means_alone():
    clip = ClipConfig(16, VitConfig(16, 8, 16, 2, 2, stem=((8, 0),)), tiny().clip.text)
    model = made(replace(tiny(), clip=clip)).train()
    before = {n: b.clone() for n, b in model.clip.named_buffers()}
    loss_of(model, pixels()).backward()
    assert before
    assert all(torch.equal(b, before[n]) for n, b in model.clip.named_buffers())
    assert model.dist_net.training


def test_starting_from_a_clip_takes_its_weights_and_fits_its_size():
    torch.manual_seed(3)
    clip = CLIP(
        ClipConfig(16, VitConfig(32, 8, 192, 4, 3, stem=((8, 0), (16, 1), (24, 0))), tiny().clip.text)
    ).eval()
    model = DiST.from_clip(clip)
    assert (model.config.integration_dim, model.config.temporal_dim, model.frames) == (64, 16, 16)
    assert model.config.selected == (0, 1, 2, 3)
    image = pixels(2, 1, (32, 32))[:, 0]
    assert torch.equal(model.clip.encode_image(image), clip.encode_image(image))
    assert model.encode_video(clip_of(pixels(1, 16, (32, 32)))).shape == (1, 16)
    small = DiST.from_clip(clip, frames=4, integration_dim=128, layers=(1, 3))
    assert small.config.temporal_dim == 32
    assert sorted(small.taps(pixels(1, 4, (32, 32)))) == [1, 3]


# --------------------------------------------------------------------------------------------------
# Bad input
# --------------------------------------------------------------------------------------------------


def test_frames_that_do_not_divide_by_alpha():
    with pytest.raises(UsageError, match="5 frames and alpha 2"):
        replace(tiny(), frames=5)


@pytest.mark.parametrize("frames", [2, 8])
def test_another_number_of_frames(frames):
    model = made()
    with pytest.raises(UsageError, match="clips of 4 frames"):
        model.encode_video(clip_of(pixels(2, frames)))
    with pytest.raises(UsageError, match="clips of 4 frames"):
        model.side(pixels(2, frames), model.taps(pixels()))


def test_a_stem_whose_grid_is_not_the_towers():
    with pytest.raises(UsageError, match=r"16 pixels make a grid of \(14, 14\), the tower's is \(16, 16\)"):
        DistConfig(vit_l_14(), frames=64, stem_patch=16)
    assert DistConfig(vit_b_16(), stem_patch=16).patch == 16


def test_a_grid_that_is_not_square():
    clip = ClipConfig(16, VitConfig((16, 32), 8, 16, 2, 2), tiny().clip.text)
    model = made(replace(tiny(), clip=clip))
    frames = pixels(2, 4, (16, 32))
    video = model.encode_video(clip_of(frames))
    # rows and columns are not mixed up: the same content, seen wide or tall, by weights that are turned
    tall = made(replace(tiny(), clip=replace(clip, vision=replace(clip.vision, image_size=(32, 16)))))
    state = model.state_dict()
    place = torch.arange(8).view(2, 4).T.flatten() + 1
    table = state["clip.visual.positional_embedding"]
    state["clip.visual.positional_embedding"] = torch.cat([table[:1], table[place]])
    sided = ("conv1.weight", "temporal_stem.weight", "net.c_fc2.weight")
    turned = {n: t.transpose(-1, -2) if n.endswith(sided) else t for n, t in state.items()}
    tall.load_state_dict(turned)
    torch.testing.assert_close(tall.encode_video(clip_of(frames.transpose(-1, -2))), video, rtol=0, atol=1e-5)


def test_layers_that_are_not_there():
    for layers in ((0, 2), (-1,), (1, 1)):
        with pytest.raises(UsageError, match="different ones of the tower's 2"):
            replace(tiny(), layers=layers)
    model = made()
    taps = model.taps(pixels())
    with pytest.raises(UsageError, match=r"those of \[1\] are not there"):
        model.side(pixels(), {0: taps[0]})


def test_tokens_of_other_clips():
    model = made()
    with pytest.raises(UsageError, match=r"2 frames of each of 3 clips"):
        model.side(pixels(3), model.taps(pixels(2)))


def test_widths_that_do_not_divide():
    with pytest.raises(UsageError, match="multiple of 64, got 100"):
        DistConfig(integration_dim=100)
    with pytest.raises(UsageError, match="do not divide"):
        DistConfig(integration_dim=100, pool_heads=3)
    with pytest.raises(UsageError, match="odd"):
        DistConfig(kernel=2)
    with pytest.raises(UsageError, match="with_clip"):
        DistConfig(with_clip=1.0)
    with pytest.raises(UsageError, match="pool_layers"):
        DistConfig(pool_layers=0)


def test_a_resnet_is_refused():
    with pytest.raises(UsageError, match="ResNet"):
        DistConfig(ClipConfig(16, ResNetConfig(), tiny().clip.text))
    with pytest.raises(UsageError, match="ResNet"):
        DistConfig.over(ClipConfig(16, ResNetConfig(), tiny().clip.text))


# --------------------------------------------------------------------------------------------------
# Training, the claim, and the verbs
# --------------------------------------------------------------------------------------------------


def test_recognition_trains_the_side_network_alone():
    model = made()
    objective = DistRecognition(model, CLASSES)
    first, second = objective.param_groups(model)
    named = {id(p): n for n, p in model.named_parameters()}
    assert all(named[id(p)].startswith("dist_net.") for group in (first, second) for p in group["params"])
    assert (first["weight_decay"], second["weight_decay"]) == (1e-4, 0.0)
    assert first["lr_scale"] == second["lr_scale"] == 10
    assert not any("token" in named[id(p)].rpartition(".")[2] for p in first["params"])
    assert len(first["params"]) + len(second["params"]) == sum(p.requires_grad for p in model.parameters())
    before = {n: t.clone() for n, t in model.state_dict().items()}
    torch.manual_seed(0)
    optimizer = torch.optim.AdamW(objective.param_groups(model), lr=1e-3)
    batch = {"clip": clip_of(pixels(4)), "label": torch.tensor([0, 1, 2, 3])}
    model.train()
    losses = []
    for _ in range(12):
        loss = objective(model, batch)["class"]
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert np.mean(losses[-4:]) < np.mean(losses[:4])
    moved = {n for n, t in model.state_dict().items() if not torch.equal(t, before[n])}
    assert moved
    assert all(n.startswith("dist_net.") for n in moved)


def test_the_recipe_starts_from_a_clip_and_keeps_a_dist():
    clip = CLIP(tiny().clip)
    model = RECOGNITION.start(clip)
    assert isinstance(model, DiST)
    assert RECOGNITION.start(model) is model


def test_the_claim_runs():
    state = torch.get_rng_state()
    found = run_claim("dist", 0, steps=3, start=5, clips=(64, 40))
    assert set(found) == {"pair accuracy", "action, top-1", "kind of action, top-1"}
    assert torch.equal(torch.get_rng_state(), state)


@pytest.fixture
def registered():
    from moviola.systems.registry import all_systems

    if "dist" not in {system.slug for system in all_systems()}:
        pytest.skip("dist is not registered yet")


def test_load_reads_the_authors_file(registered, tmp_path):
    import moviola

    model = made(wide_config())
    torch.save({"epoch": 36, "model_state": official_file(model)}, tmp_path / "DIST.pyth")
    loaded = moviola.load(tmp_path / "DIST.pyth", device="cpu")
    frames = clip_of(pixels())
    assert (loaded.system, loaded.recipe.size) == ("dist", (16, 16))
    assert torch.equal(loaded.module.encode_video(frames), model.encode_video(frames))
