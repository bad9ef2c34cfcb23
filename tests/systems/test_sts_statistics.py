from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from moviola.clip.model import CLIP
from moviola.clip.preprocess import Preprocess
from moviola.data.clip_statistics import labels_of
from moviola.data.placed_clips import placed_clips
from moviola.media.flow import optical_flow
from moviola.parts.backbones.conv3d_nets import ConvNetConfig
from moviola.systems.video.sts_statistics import (
    KEYS,
    RECOGNITION,
    STS,
    TRAINING,
    Config,
    Statistics,
    run_claim,
    small,
)
from moviola.types import CheckpointError, ClipBatch, Encoder, Refusal, UsageError

PAPER = {name: ConvNetConfig(name) for name in ("c3d", "r3d", "r21d")}


def made(kind="r21d", seed=0, **options):
    config = Config(ConvNetConfig(kind, (4, 4, 6, 8)), **{"frames": 8, "image_size": 40, **options})
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return STS(config).eval()


def clip_of(frames_BTCHW):
    mask_BT = torch.ones(frames_BTCHW.shape[:2], dtype=torch.bool)
    return ClipBatch(frames_BTCHW, mask_BT.float(), mask_BT)


@pytest.fixture(scope="module")
def clips():
    return placed_clips(0, 6)


# --------------------------------------------------------------------------------------------------
# Parity
# --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def oracle(oracles_dir):
    folder = oracles_dir / "43-sts-statistics"
    return json.loads((folder / "net.json").read_text()), load_file(folder / "net.safetensors")


def test_parity_of_every_output_and_gradient(oracle):
    meta, data = oracle
    got = {}

    def keep(name):
        return lambda _, given, result: got.__setitem__(name, result)

    for net, layers in meta["config"]["nets"].items():
        prefix = f"param/{net}."
        state = {n.removeprefix(prefix): t for n, t in data.items() if n.startswith(prefix)}
        model = STS.from_official(state)
        assert model.config.net == ConvNetConfig(net, (4, 8, 16, 32), tuple(layers))

        model.trunk.conv1.register_forward_hook(keep(f"out/{net}/conv1"))
        # the oracle's channels are BGR already
        pooled = model.encode_frames(data["in/clip"].flip(1).transpose(1, 2))
        motion, appearance = model.statistics(pooled)
        got |= {f"out/{net}/pooled": pooled, f"out/{net}/motion": motion, f"out/{net}/appearance": appearance}
        labels = torch.cat([data["in/motion_labels"], data["in/appearance_labels"]], dim=1)
        losses = Statistics(model).losses(model, data["in/clip"].flip(1).transpose(1, 2), labels)
        got[f"out/{net}/loss"] = losses["motion"] + losses["appearance"]
        got[f"out/{net}/loss"].backward()
        official = KEYS.to_official({n: p.grad for n, p in model.named_parameters()})
        got |= {f"grad/{net}.{n}": official[n] for n in official if f"grad/{net}.{n}" in data}

    assert set(got) == {name for name in data if name.startswith(("out/", "grad/"))}
    for name, value in got.items():
        assert value.shape == data[name].shape, name
        worst = ((value - data[name]).abs() / (1 + data[name].abs())).max().item()
        assert worst <= meta["tolerance"], f"{name}: {worst:.2e}"


def norm(name):
    return [f"{name}.{n}" for n in ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")]


def official_names(kind):
    """The names in the authors' files at their size, from the modules of their code."""
    names = [f"{head}.{n}" for head in ("motion_linear", "app_linear") for n in ("weight", "bias")]
    if kind == "c3d":
        for part in ("1", "2", "3a", "3b", "4a", "4b", "5a", "5b"):
            names += [f"conv{part}.weight", f"conv{part}.bias", *norm(f"bn{part}")]
        return names

    def conv(name):
        if kind == "r3d":
            return [f"{name}.temporal_spatial_conv.weight"]
        return [f"{name}.spatial_conv.weight", *norm(f"{name}.bn"), f"{name}.temporal_conv.weight"]

    names += conv("conv1") + norm("bn1")
    for stage in range(2, 6):
        block = f"conv{stage}.block1."
        names += conv(f"{block}conv1") + norm(f"{block}bn1") + conv(f"{block}conv2") + norm(f"{block}bn2")
        if stage > 2:
            names += conv(f"{block}downsampleconv") + norm(f"{block}downsamplebn")
    return names


@pytest.mark.parametrize("kind", PAPER)
def test_keys_cover_the_official_list_at_paper_size(kind):
    with torch.device("meta"):
        state = STS(Config(PAPER[kind])).state_dict()
    official = KEYS.to_official(state)
    assert sorted(official) == sorted(official_names(kind))
    assert set(KEYS.from_official(official)) == set(state)
    assert official["motion_linear.weight"].shape == (14, 512)
    assert official["app_linear.weight"].shape == (13, 512)


def test_paper_sizes():
    with torch.device("meta"):
        counts = {kind: sum(p.numel() for p in STS(Config(net)).parameters()) for kind, net in PAPER.items()}
    # convolutions 27,655,936 with biases, norms 5,504, heads 13,851
    assert counts["c3d"] == 27_675_291
    assert abs(counts["r21d"] / counts["r3d"] - 1) < 0.001
    assert TRAINING.presets["sts-r21d"]() == Config(PAPER["r21d"])


@pytest.mark.parametrize("kind", PAPER)
def test_an_official_checkpoint_gives_the_same_model_back(kind, clips):
    model = made(kind)
    official = {f"module.{n}": t for n, t in KEYS.to_official(model.state_dict()).items()}
    back = STS.from_official(official)
    assert back.config == Config(model.config.net)  # the paper's clips; the weights fit any
    frames = clips.pixels()
    assert torch.equal(back.encode_frames(frames), model.encode_frames(frames))
    with pytest.raises(CheckpointError, match="missing"):
        STS.from_official({n: t for n, t in official.items() if "app_linear" not in n})
    with pytest.raises(CheckpointError, match=r"1 unexpected: trunk\.conv9"):
        STS.from_official(official | {"module.conv9": torch.zeros(1)})
    with pytest.raises(CheckpointError, match="no weights of C3D"):
        STS.from_official({"motion_linear.weight": torch.zeros(14, 8)})


# --------------------------------------------------------------------------------------------------
# The encoder
# --------------------------------------------------------------------------------------------------


def test_it_is_an_encoder_without_words(clips):
    model = made()
    assert isinstance(model, Encoder)
    assert (model.has_text, model.separable, model.adaptation, model.dim) == (False, True, "none", 8)
    assert (model.frame_spec.count, model.frame_spec.sampler) == (8, "consecutive")
    video = model.encode_video(clip_of(clips.pixels()))
    assert video.shape == (6, 8)
    assert model.pool(video) is video
    assert torch.allclose(model.score(video, video).diag(), torch.ones(6))
    still = model.encode_image(clips.pixels()[:, 0])
    wanted = model.encode_video(clip_of(clips.pixels()[:, :1].expand(-1, 8, -1, -1, -1)))
    assert torch.equal(still, wanted)
    with pytest.raises(Refusal, match="knows no words"):
        model.encode_text(torch.zeros(1, 1, dtype=torch.int64))
    with pytest.raises(UsageError, match="clips of 8 frames"):
        model.encode_video(clip_of(clips.pixels()[:, :6]))


def test_the_network_sees_blue_green_and_red():
    model = made("c3d", image_size=16)
    seen = []
    model.trunk.register_forward_pre_hook(lambda _, given: seen.append(given[0]))
    red = torch.tensor([255.0, 0, 0])[:, None, None].expand(1, 8, 3, 16, 16)
    model.encode_video(clip_of(red))
    assert seen[0].shape == (1, 3, 8, 16, 16)
    assert seen[0].mean(dim=(0, 2, 3, 4)).tolist() == [0, 0, 255]


def test_its_recipe_leaves_pixels_as_they_are():
    recipe = made(image_size=112).recipe
    assert (recipe.size, recipe.resize_size, recipe.resize) == ((112, 112), (128, 171), "squash")
    frames = np.random.default_rng(0).integers(0, 256, (2, 128, 171, 3), np.uint8)
    pixels = Preprocess(recipe).frames(frames)
    wanted = torch.from_numpy(frames[:, 8:120, 30:142]).permute(0, 3, 1, 2).float()
    torch.testing.assert_close(pixels, wanted, rtol=0, atol=1e-4)
    assert made(image_size=64).recipe.resize_size == (73, 98)


def test_a_classifier_of_its_own(clips):
    model = made()
    with pytest.raises(Refusal, match="no classifier"):
        model.classify_video(clip_of(clips.pixels()))
    model.set_classes(3)
    head = model.classifier
    model.set_classes(3)
    assert model.classifier is head
    assert (model.adaptation, model.config.classes) == ("classifier", 3)
    assert model.classify_video(clip_of(clips.pixels())).shape == (6, 3)
    assert model.classify_image(clips.pixels()[:, 0]).shape == (6, 3)
    again = STS.from_config(json.loads(json.dumps(model.config.to_json())))
    again.load_state_dict(model.state_dict())
    assert again.config == model.config
    model.set_classes(0)
    assert (model.adaptation, model.classifier) == ("none", None)


def test_recognition_gives_it_a_classifier_and_trains(clips):
    model = RECOGNITION.start(made())
    objective = RECOGNITION.objective(model, torch.zeros(16, 1, dtype=torch.int64), mixup=0, cutmix=0)
    batch = {"clip": clip_of(clips.pixels()), "label": torch.from_numpy(clips.label_N)}
    model.train()
    optimizer = torch.optim.SGD(objective.param_groups(model), lr=0.05, momentum=0.9)
    losses = []
    for _ in range(15):
        loss = objective(model, batch)["class"]
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.5


# --------------------------------------------------------------------------------------------------
# The objective
# --------------------------------------------------------------------------------------------------


def test_the_objective_makes_its_own_labels(clips):
    pytest.importorskip("cv2")
    model = made()
    objective = Statistics(model, flip=0.0)
    flow = np.stack([optical_flow(clip) for clip in clips.frames_NTSSC])
    labels = torch.from_numpy(labels_of(clips.frames_NTSSC, flow))
    wanted = objective.losses(model, clips.pixels(), labels)
    batch = {"clip": clip_of(clips.pixels() + 1e-4), "row": torch.arange(6)}
    got = objective(model, batch)
    assert set(got) == {"motion", "appearance"}
    for name, loss in got.items():
        torch.testing.assert_close(loss, wanted[name])
    motion, appearance = model.statistics(model.encode_frames(clips.pixels()))
    torch.testing.assert_close(got["motion"], (motion - labels[:, :14]).square().mean())
    torch.testing.assert_close(got["appearance"], 0.1 * (appearance - labels[:, 14:]).square().mean())
    weighed = Statistics(model, flip=0.0, motion=0.5, appearance=1.0)(model, batch)
    torch.testing.assert_close(weighed["motion"], 0.5 * got["motion"])
    torch.testing.assert_close(weighed["appearance"], 10 * got["appearance"])


def test_the_network_sees_the_view_that_is_labelled(clips):
    pytest.importorskip("cv2")
    model = made()
    seen = []
    model.trunk.register_forward_pre_hook(lambda _, given: seen.append(given[0]))
    objective = Statistics(model, crop=32, flip=1.0)
    torch.manual_seed(3)
    objective(model, {"clip": clip_of(clips.pixels())})
    torch.manual_seed(3)
    rgb, _ = objective.label(clips.frames_NTSSC)
    assert rgb.shape == (6, 8, 32, 32, 3)
    assert torch.equal(seen[0], torch.from_numpy(rgb).float().permute(0, 4, 1, 2, 3).flip(1))


def test_it_trains_as_the_authors_do():
    model = made()
    model.set_classes(2)
    objective = Statistics(model)
    weights, biases = objective.param_groups(model)
    assert (weights["lr_scale"], biases["lr_scale"]) == (1.0, 2.0)
    assert weights["weight_decay"] == biases["weight_decay"] == 0.005
    own = [p for n, p in model.named_parameters() if not n.startswith("classifier")]
    assert {id(p) for p in weights["params"] + biases["params"]} == {id(p) for p in own}
    assert all(p.ndim == 1 for p in biases["params"])
    factors = [objective.lr_factors(step, 18) for step in range(18)]
    assert all(len(f) == 2 and f[0] == f[1] for f in factors)
    assert np.allclose([f[0] for f in factors], np.repeat([1, 0.1, 0.01], 6))
    assert (TRAINING.recipe["lr"], TRAINING.recipe["momentum"], TRAINING.recipe["batch_size"]) == (
        5e-4,
        0.9,
        30,
    )


def test_training_lowers_the_loss(clips):
    pytest.importorskip("cv2")
    model = made("r3d").train()
    objective = TRAINING.objective(model, flip=0.0, cache=6)
    batch = {"clip": clip_of(clips.pixels()), "row": torch.arange(6)}
    groups = [{**g, "lr": 0.02 * g.pop("lr_scale")} for g in objective.param_groups(model)]
    optimizer = torch.optim.SGD(groups, momentum=0.9)
    losses = []
    for _ in range(12):
        loss = sum(objective(model, batch).values())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0] / 2


def test_what_the_objective_refuses(clips):
    pytest.importorskip("cv2")
    model = made()
    with pytest.raises(Refusal, match="not a CLIP"):
        TRAINING.start(object.__new__(CLIP))
    assert TRAINING.start(model) is model
    for options, message in (
        ({"flow": "tvl1"}, "dis or farneback"),
        ({"stages": 0}, "stages is 1 or more"),
        ({"decay": 0}, "decay in"),
        ({"crop": 30}, "divides by 8"),
        ({"flip": 2}, "flip in"),
    ):
        with pytest.raises(UsageError, match=message):
            Statistics(model, **options)
    with pytest.raises(UsageError, match="from 0 to 255"):
        Statistics(model)(model, {"clip": clip_of(clips.pixels() / 127.5 - 1.6)})
    with pytest.raises(UsageError, match="48 pixels cannot be cut"):
        Statistics(model, crop=48)(model, {"clip": clip_of(clips.pixels())})
    with pytest.raises(UsageError, match="clips of 8 frames"):
        Statistics(model)(model, {"clip": clip_of(clips.pixels()[:, :7])})


def test_bad_configurations():
    with pytest.raises(UsageError, match="c3d takes clips of 8 frames or more and 16 pixels or more"):
        Config(frames=4)
    with pytest.raises(UsageError, match="got 16, 112 and -1"):
        Config(classes=-1)
    with pytest.raises(CheckpointError, match="fields this version does not know"):
        Config.from_json(Config().to_json() | {"colour": 1})
    assert Config.from_json(small().to_json()) == small()
    assert replace(small(), classes=4).classes == 4


# --------------------------------------------------------------------------------------------------
# The claim, and the verbs
# --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("arm", ["statistics", "random weights"])
def test_the_claim_runs(arm):
    pytest.importorskip("cv2")
    state = torch.get_rng_state()
    found = run_claim(arm, 0, steps=2, clips=(32, 32))
    assert set(found) == {"linear probe, top-1", "retrieval, top-1", "probe, place", "probe, way"}
    assert torch.equal(torch.get_rng_state(), state)


@pytest.fixture
def registered():
    from moviola.systems.registry import all_systems

    if "sts-statistics" not in {system.slug for system in all_systems()}:
        pytest.skip("sts-statistics is not registered yet")


def test_load_reads_the_authors_file(registered, tmp_path, clips):
    import moviola

    model = made("c3d")
    state = {f"module.{n}": t for n, t in KEYS.to_official(model.state_dict()).items()}
    torch.save({"epoch": 17, "state_dict": state, "opt_dict": {"state": {}}}, tmp_path / "C3D.pth.tar")
    loaded = moviola.load(tmp_path / "C3D.pth.tar", device="cpu")
    assert (loaded.system, loaded.recipe.size, loaded.has_text) == ("sts-statistics", (112, 112), False)
    assert torch.equal(loaded.module.encode_frames(clips.pixels()), model.encode_frames(clips.pixels()))


def test_train_then_index_and_search_by_picture(registered, tmp_path, clips):
    pytest.importorskip("cv2")
    import moviola
    from moviola.media import write_video

    folder = tmp_path / "videos"
    folder.mkdir()
    for n, frames in enumerate(clips.frames_NTSSC.repeat(3, axis=2).repeat(3, axis=3)):
        write_video(folder / f"{n}.mp4", np.concatenate([frames] * 3), 8)
    options = {"objective": "sts-statistics", "model": "sts-small", "device": "cpu"}
    moviola.train(folder, tmp_path / "run", steps=2, batch_size=3, **options)
    model = moviola.load(tmp_path / "run", device="cpu")
    assert (model.system, model.has_text) == ("sts-statistics", False)
    moviola.index(folder, model=model, to=tmp_path / "index")
    found = moviola.search(tmp_path / "index", image=Image.fromarray(clips.frames_NTSSC[0, 0]), model=model)
    assert found
    with pytest.raises(Refusal, match="no text"):
        moviola.search(tmp_path / "index", "a red ring", model=model)
