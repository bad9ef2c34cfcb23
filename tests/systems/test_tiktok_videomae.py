from __future__ import annotations

import json
import math
import warnings
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

import moviola
from moviola import media
from moviola.clip.config import ClipConfig, TextConfig, VitConfig
from moviola.clip.loaded import Model
from moviola.clip.model import CLIP
from moviola.data.rows import PairData, open_rows
from moviola.parts.backbones.video_mae import (
    StackConfig,
    pixel_targets,
    positions,
)
from moviola.parts.video_masks import kept, running_cell_mask, take, tube_mask
from moviola.systems.registry import all_systems
from moviola.systems.video.tiktok_videomae import (
    KEYS,
    PRESETS,
    RECOGNITION,
    TRAINING,
    TUNED_KEYS,
    Config,
    DualMasking,
    VideoMae,
    example,
    run_claim,
    tiny,
)
from moviola.training.caching import compute
from moviola.training.config import TrainConfig
from moviola.training.objectives import decay_groups
from moviola.types import (
    CheckpointError,
    ClipBatch,
    PairObjective,
    Recipe,
    Refusal,
    UsageError,
)
from moviola.types import (
    Encoder as EncoderProtocol,
)

# --------------------------------------------------------------------------------------------------
# Parity
# --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def oracle(oracles_dir):
    folder = oracles_dir / "56-tiktok-videomae"
    return json.loads((folder / "a.json").read_text()), load_file(folder / "a.safetensors")


def part(data, prefix):
    return {k.removeprefix(prefix): v for k, v in data.items() if k.startswith(prefix)}


def oracle_config(meta):
    c = meta["config"]
    return Config(
        StackConfig(c["enc_width"], c["enc_layers"], c["enc_heads"], c["mlp_ratio"], c["qkv_bias"]),
        StackConfig(c["dec_width"], c["dec_layers"], c["dec_heads"], c["mlp_ratio"], c["qkv_bias"]),
        image_size=c["image"], patch=c["patch"], frames=c["frames"], tubelet=c["tubelet"],
    )  # fmt: skip


def clip_of(frames_BTCPP):
    mask_BT = torch.ones(frames_BTCPP.shape[:2], dtype=torch.bool)
    return ClipBatch(frames_BTCPP, mask_BT.float().cumsum(1), mask_BT)


def test_parity_of_every_output_and_gradient(oracle):
    meta, data = oracle
    model = VideoMae.from_official(part(data, "param/pretrain."), oracle_config(meta))
    assert model.recipe.mean == tuple(meta["config"]["image_mean"])
    assert model.recipe.std == tuple(meta["config"]["image_std"])
    frames = data["in/video"].transpose(1, 2)
    hidden, skipped = (data[f"in/{name}_mask"].bool() for name in ("encoder", "decoder"))
    objective = DualMasking(model, normalise=meta["config"]["normalize_target"])
    encoder, seen, patches = model.encoder, kept(hidden), model.encoder.patches(frames)
    got = {
        "encoder_block0_in": encoder.embed(frames, seen),
        "encoder_block0_out": encoder.blocks[0](encoder.embed(frames, seen)),
        "encoder": encoder(frames, seen),
        "pos_encoder": positions(64, meta["config"]["enc_width"], torch.device("cpu")),
        "pos_decoder": positions(64, meta["config"]["dec_width"], torch.device("cpu")),
    }
    grads = {}
    for mode, mask in (("dual", skipped), ("nodecmask", ~hidden)):
        said = kept(mask)
        decoder_in = model.decoder_input(got["encoder"], seen, said)
        got |= {
            f"{mode}/decoder_in": decoder_in,
            f"{mode}/decoder_block0": model.decoder.blocks[0](decoder_in),
            f"{mode}/pred": model.reconstruct(patches, seen, said),
            f"{mode}/target": pixel_targets(take(patches, said), model.recipe.mean, model.recipe.std),
        }
        model.zero_grad()
        loss = objective.loss(model, objective.errors(model, frames, hidden, mask))["pixels"]
        loss.backward()
        got[f"{mode}/loss"] = loss
        official = KEYS.to_official({k: p.grad.clone() for k, p in model.named_parameters()})
        grads |= {f"{mode}/{name}": grad for name, grad in official.items()}
    for ratio in meta["config"]["cell_ratios"]:
        mask = running_cell_mask(4, encoder.grid, ratio, phase_B=torch.arange(4))
        got[f"running_cell_{ratio}"] = mask.unflatten(1, (4, 16)).long()
    tuned_config = replace(oracle_config(meta), decoder=None, classes=meta["config"]["classes"])
    tuned = VideoMae.from_official(part(data, "param/finetune."), tuned_config)
    got["finetune_features"] = tuned.encode_video(clip_of(frames))
    got["finetune_logits"] = tuned.classify_video(clip_of(frames))
    assert set(got) == set(part(data, "out/"))
    assert set(part(data, "grad/")) <= set(grads)
    wanted = part(data, "out/") | {f"grad of {k}": v for k, v in part(data, "grad/").items()}
    got |= {f"grad of {k}": grads[k] for k in part(data, "grad/")}
    for name, reference in wanted.items():
        assert got[name].shape == reference.shape, name
        worst = ((got[name].detach() - reference).abs() / (1 + reference.abs())).max()
        assert worst <= meta["tolerance"], f"{name}: {worst:.2e}"


def official_names(layers, decoder_layers):
    """The published files' names, from the card, of a pre-trained model."""
    parts = ["norm1.weight", "norm1.bias", "attn.qkv.weight", "attn.q_bias", "attn.v_bias"]
    parts += ["attn.proj.weight", "attn.proj.bias", "norm2.weight", "norm2.bias"]
    parts += [f"mlp.{name}.{kind}" for name in ("fc1", "fc2") for kind in ("weight", "bias")]
    encoder = [f"blocks.{n}.{p}" for n in range(layers) for p in parts]
    encoder += ["patch_embed.proj.weight", "patch_embed.proj.bias"]
    decoder = [f"decoder.blocks.{n}.{p}" for n in range(decoder_layers) for p in parts]
    decoder += [f"decoder.{name}.{kind}" for name in ("norm", "head") for kind in ("weight", "bias")]
    ends = ["encoder.norm.weight", "encoder.norm.bias", "encoder_to_decoder.weight", "mask_token"]
    tuned = [f"{name}.{kind}" for name in ("fc_norm", "head") for kind in ("weight", "bias")]
    return [*(f"encoder.{name}" for name in encoder), *decoder, *ends], [*encoder, *tuned]


@pytest.mark.parametrize("preset", ["vmae-s", "vmae-b", "vmae-l", "vmae-h", "vmae-g"])
def test_keys_know_every_official_name_at_paper_size(preset):
    config = PRESETS[preset]()
    with torch.device("meta"):
        model = VideoMae(config)
        official = KEYS.to_official(model.state_dict())
        model.set_classes(400)
        tuned = TUNED_KEYS.to_official(model.state_dict())
    names, tuned_names = official_names(config.encoder.layers, 4)
    assert sorted(official) == sorted(names)
    assert sorted(tuned) == sorted(tuned_names)
    assert set(TUNED_KEYS.from_official(tuned)) == set(model.state_dict())
    patch, width = config.patch, config.encoder.width
    assert official["encoder.patch_embed.proj.weight"].shape == (width, 3, 2, patch, patch)
    assert official["decoder.head.weight"].shape == (6 * patch**2, config.decoder.width)
    assert official["mask_token"].shape == (1, 1, config.decoder.width)
    if preset == "vmae-g":
        assert official["decoder.head.weight"].shape[0] == 1176
        assert tuned["blocks.0.mlp.fc1.weight"].shape == (6144, 1408)
    # sizes follow from these shapes
    read = VideoMae.from_official(official)
    assert read.config == config
    again = VideoMae.from_official({f"module.{k}": v for k, v in tuned.items()})
    assert again.config == replace(config, decoder=None, classes=400)


# --------------------------------------------------------------------------------------------------
# The towers and masks
# --------------------------------------------------------------------------------------------------


def model_of(config=None, seed=0):
    torch.manual_seed(seed)
    return VideoMae(config or tiny()).eval()


def pixels(count, frames=8, side=16, seed=0):
    return torch.randn(count, frames, 3, side, side, generator=torch.Generator().manual_seed(seed))


def masks(model, count, seed=0, ratio=0.75):
    made = torch.Generator().manual_seed(seed)
    grid = model.encoder.grid
    return tube_mask(count, grid, ratio, generator=made), running_cell_mask(count, grid, generator=made)


def test_the_loss_counts_what_the_encoder_did_not_see():
    model, frames = model_of(), pixels(2)
    hidden, skipped = masks(model, 2)
    objective = DualMasking(model)
    found = objective.errors(model, frames, hidden, skipped)
    counts = hidden & ~skipped
    assert found["counted"].tolist() == counts.sum(1).tolist()
    said = kept(skipped)
    said_BKX = model.reconstruct(model.encoder.patches(frames), kept(hidden), said)
    target_BKX = pixel_targets(take(model.encoder.patches(frames), said), model.recipe.mean, model.recipe.std)
    error = (said_BKX - target_BKX).square().mean(-1)
    wanted = error[hidden.gather(1, said)].mean()  # pooled over the batch
    torch.testing.assert_close(objective.loss(model, found)["pixels"], wanted)


def test_without_a_decoder_mask_all_that_is_hidden_is_said():
    model, frames = model_of(), pixels(2)
    objective = DualMasking(model, mask_ratio=0.75, decoder_ratio=0)
    hidden, skipped = objective.masks(model.encoder.grid, 2)
    assert torch.equal(skipped, ~hidden)
    found = objective.errors(model, frames, hidden, skipped)
    assert found["counted"].tolist() == [48, 48]
    assert objective.scope == "local"


# --------------------------------------------------------------------------------------------------
# The encoder
# --------------------------------------------------------------------------------------------------


def test_it_is_an_encoder_without_words():
    model = model_of()
    assert isinstance(model, EncoderProtocol)
    assert isinstance(DualMasking(model), PairObjective)
    assert model.frame_spec.count == 8
    assert (model.frame_spec.sampler, model.frame_spec.stride) == ("consecutive", 4)
    assert VideoMae.from_config(json.loads(json.dumps(model.config.to_json()))).config == model.config
    frames = pixels(2)
    torch.testing.assert_close(model.encode_video(clip_of(frames)), model.encoder(frames).mean(1))
    still = frames[:, :1].expand(-1, 8, -1, -1, -1)
    torch.testing.assert_close(model.encode_image(frames[:, 0]), model.encode_video(clip_of(still)))
    video = model.encode_video(clip_of(frames))
    torch.testing.assert_close(model.score(video, video).diagonal(), torch.ones(2))
    with pytest.raises(Refusal, match="knows no words"):
        model.encode_text(torch.zeros(1, 4, dtype=torch.int64))


def test_a_classifier_replaces_the_decoder():
    model = model_of()
    weight = model.encoder.blocks[0].mlp.fc1.weight
    assert model.adaptation == "none"
    model.set_classes(3)
    assert model.adaptation == "classifier"
    assert model.config.decoder is None
    assert not any(
        "decoder" in k or k == "mask_token" or k.startswith("encoder.norm") for k in model.state_dict()
    )
    assert model.encoder.blocks[0].mlp.fc1.weight is weight
    assert model.classify_image(pixels(2)[:, 0]).shape == (2, 3)
    head, norm = model.head, model.fc_norm
    model.set_classes(3)
    assert model.head is head
    model.set_classes(5)
    assert model.fc_norm is norm
    assert model.classify_video(clip_of(pixels(2))).shape == (2, 5)
    again = VideoMae.from_config(model.config.to_json())
    again.load_state_dict(model.state_dict())
    torch.testing.assert_close(
        again.eval().classify_video(clip_of(pixels(2))), model.classify_video(clip_of(pixels(2)))
    )


def loaded(module):
    config, recipe = module.config.to_json(), module.recipe
    return Model(module, config=config, recipe=recipe, system="tiktok-videomae", device="cpu")


def moving(path, frames=40, rate=20, shade=255):
    film = np.zeros((frames, 32, 32, 3), np.uint8)
    for t in range(frames):
        film[t, 8:24, (t // 2) % 24 : (t // 2) % 24 + 8] = shade
    return media.write_video(path, film, rate=rate)


def test_the_models_recipe():
    model = loaded(model_of())
    assert model.recipe.size == (16, 16)
    assert model.recipe.mean == (0.485, 0.456, 0.406)
    assert model.tokenizer is None
    assert not model.has_text
    assert isinstance(model.recipe, Recipe)


def test_a_clip_that_is_too_short_stays_on_its_last_frame(tmp_path):
    from moviola.data.rows.clips import clip_batch, read_clip

    module = model_of()
    read = [
        read_clip(moving(tmp_path / f"{n}.mp4", frames=n), None, module.frame_spec, loaded(module).preprocess)
        for n in (20, 32)
    ]
    clip = clip_batch(read)
    assert clip.mask_BT.sum(1).tolist() == [5, 8]  # every fourth frame
    held = module.held_frames(clip)
    assert torch.equal(held[0, :5], clip.frames_BTCHW[0, :5])
    assert torch.equal(held[0, 5:], held[0, 4:5].expand(3, -1, -1, -1))
    assert torch.equal(held[1], clip.frames_BTCHW[1])
    objective = DualMasking(module)
    with pytest.warns(UserWarning, match="too few frames"):
        objective(module, {"clip": clip})
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        objective(module, {"clip": clip_of(held)})


@pytest.fixture
def registered():
    if "tiktok-videomae" not in {system.slug for system in all_systems()}:
        pytest.skip("tiktok-videomae is not registered yet")


def test_load_tells_the_authors_files(tmp_path, registered):
    module = model_of(Config(StackConfig(64, 2, 1), StackConfig(64, 1, 1)))
    save_file(KEYS.to_official(module.state_dict()), tmp_path / "pre.safetensors")
    model = moviola.load(tmp_path / "pre.safetensors")
    assert model.system == "tiktok-videomae"
    assert model.module.config == module.config
    module.set_classes(4)
    torch.save({"model": TUNED_KEYS.to_official(module.state_dict())}, tmp_path / "tuned.pth")
    assert moviola.load(tmp_path / "tuned.pth").module.config == module.config


def test_an_index_of_videos_is_searched_by_example(tmp_path, registered):
    (tmp_path / "films").mkdir()
    moving(tmp_path / "films" / "a.mp4")
    moving(tmp_path / "films" / "b.mp4", shade=120)
    loaded(model_of()).save(tmp_path / "model")
    moviola.index(tmp_path / "films", to=tmp_path / "index", model=tmp_path / "model")
    found = moviola.search(tmp_path / "index", image=Image.new("RGB", (32, 32), "white"))
    assert {hit.file.rpartition("/")[2] for hit in found} == {"a.mp4", "b.mp4"}
    with pytest.raises(Refusal):
        moviola.search(tmp_path / "index", "a ball")


# --------------------------------------------------------------------------------------------------
# Training
# --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("frames", [8, 4])
def test_gradients_do_not_depend_on_the_micro_batch(frames):
    """With 8 frames cells run round, so parts are averaged; with 4 they do not, so outputs are pooled."""
    model = model_of(replace(tiny(), frames=frames))
    objective = DualMasking(model, mask_ratio=0.5, samples=2, crops=False)
    assert objective.scope == ("local" if frames == 8 else "pair")
    drawn = [masks(model, 2, seed, 0.5) for seed in range(4)]
    calls = []

    def given(grid, count):
        """Row n's two masks, whichever part of the batch it comes in."""
        start = sum(calls) % 4
        calls.append(count // 2)
        rows = drawn[start : start + count // 2]
        return tuple(torch.cat([row[k] for row in rows]) for k in (0, 1))

    objective.masks = given
    batch, grads, totals = {"clip": clip_of(pixels(4, frames))}, [], []
    for size in (None, 1):
        model.zero_grad()
        calls.clear()
        totals.append(compute(model, objective, batch, micro_batch=size)["pixels"])
        grads.append({k: p.grad.clone() for k, p in model.named_parameters()})
    torch.testing.assert_close(totals[0], totals[1])
    for name, grad in grads[0].items():
        torch.testing.assert_close(grads[1][name], grad, rtol=1e-4, atol=1e-5, msg=name)


def test_samples_are_masks_of_the_same_clip():
    model = model_of()
    objective, frames = DualMasking(model, samples=3, crops=False), pixels(2)
    seen = []
    errors = objective.errors
    objective.errors = lambda m, x, h, s: seen.append((x, h)) or errors(m, x, h, s)
    found = objective.outputs(model, {"clip": clip_of(frames)})
    ((rows, hidden),) = seen
    assert torch.equal(rows, frames.repeat_interleave(3, 0))
    assert len({tuple(row) for row in hidden.tolist()}) == 6
    assert found["error"].shape == found["counted"].shape == (2,)


def test_crops_are_made_while_training_alone():
    model, clip = model_of(), clip_of(pixels(2))
    objective = DualMasking(model, samples=1)
    seen = []
    errors = objective.errors
    objective.errors = lambda m, x, h, s: seen.append(x) or errors(m, x, h, s)
    objective.train().outputs(model, {"clip": clip})
    objective.eval().outputs(model, {"clip": clip})
    assert not torch.equal(seen[0], clip.frames_BTCHW)
    assert torch.equal(seen[1], clip.frames_BTCHW)


def test_a_few_steps_lower_the_loss():
    model, clip = model_of(), clip_of(pixels(4).cumsum(1) / 3)
    objective = DualMasking(model, mask_ratio=0.5, samples=2)
    optimizer = torch.optim.AdamW(objective.param_groups(model), lr=3e-3)
    losses = []
    torch.manual_seed(0)
    for _ in range(40):
        loss = objective(model, {"clip": clip})["pixels"]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        objective.after_step(model)
        losses.append(float(loss.detach()))
    assert np.mean(losses[-5:]) < 0.9 * np.mean(losses[:5])


def test_neither_vectors_nor_the_mask_token_nor_factors_decay():
    config = replace(tiny(), encoder=StackConfig(32, 2, 2, cosine=True))
    model = model_of(config)
    decaying, spared = DualMasking(model, weight_decay=0.3).param_groups(model)
    assert (decaying["weight_decay"], spared["weight_decay"]) == (0.3, 0)
    names = {id(p): name for name, p in model.named_parameters()}
    assert len(decaying["params"]) + len(spared["params"]) == len(names)
    told = {names[id(p)] for p in decaying["params"]}
    assert "mask_token" not in told
    assert not any(name.endswith((".scale", "bias", "norm1.weight")) for name in told)
    assert "encoder.patch_embed.proj.weight" in told
    assert len(decay_groups(model, 0.3)[0]["params"]) > len(told)  # the usual rule would decay these


def test_videos_without_words_become_batches(tmp_path):
    (tmp_path / "films").mkdir()
    for n in range(3):
        moving(tmp_path / "films" / f"{n}.mp4", shade=80 + 70 * n)
    (tmp_path / "films" / "broken.mp4").write_bytes(b"no video")
    module = model_of(replace(tiny(), stride=2))
    model = loaded(module)
    objective = DualMasking(module, samples=2)
    source = open_rows([tmp_path / "films"])
    data = PairData(source, objective.needs, recipe=model.recipe, tokenizer=None)
    batch = data.batch(np.arange(4), seed=0, epoch=0, step=0)
    assert batch["clip"].frames_BTCHW.shape == (4, 8, 3, 16, 16)  # the broken one gave its place to another
    assert torch.isfinite(objective(module, batch)["pixels"])


def test_training_starts_from_its_own_models_alone():
    model = model_of()
    assert TRAINING.start(model) is model
    clip = CLIP(ClipConfig(16, VitConfig(16, 8, 16, 1, 2), TextConfig(8, 32, width=16, layers=1, heads=2)))
    with pytest.raises(Refusal, match="cannot start from a CLIP"):
        TRAINING.start(clip)
    assert not hasattr(VideoMae, "from_clip")
    TrainConfig(steps=1, **TRAINING.recipe)
    TrainConfig(steps=1, **{k: v for k, v in RECOGNITION.recipe.items() if k != "epochs"})
    for preset in PRESETS.values():
        assert Config.from_json(json.loads(json.dumps(preset().to_json()))) == preset()
        with torch.device("meta"):
            DualMasking(VideoMae(preset()))


def test_the_example_has_gradients_everywhere():
    made = example(0)
    outputs = made.run(**made.inputs)
    outputs["loss"].backward()
    assert all(p.grad is not None for p in made.module.parameters())
    assert {k: tuple(v.shape) for k, v in outputs.items()} == dict(made.shapes)


def test_making_an_objective_leaves_the_callers_randomness_alone():
    model = model_of()
    torch.manual_seed(5)
    before = torch.get_rng_state()
    DualMasking(model)
    example(1)
    assert torch.equal(torch.get_rng_state(), before)


# --------------------------------------------------------------------------------------------------
# Bad input
# --------------------------------------------------------------------------------------------------


def official(**changes):
    state = KEYS.to_official(model_of(Config(StackConfig(64, 2, 1), StackConfig(64, 1, 1))).state_dict())
    for name, tensor in changes.items():
        state.pop(name) if tensor is None else state.update({name: tensor})
    return state


def unequal():
    model = model_of()
    hidden, skipped = masks(model, 2)
    hidden[0, 0] = ~hidden[0, 0]
    return DualMasking(model).errors(model, pixels(2), hidden, skipped)


def tuned_model():
    model = model_of()
    model.set_classes(2)
    return model


BAD = {
    "frames that do not divide": (lambda: VideoMae(replace(tiny(), frames=7)), UsageError, "7 of 16 x 16"),
    "pixels that do not divide": (lambda: VideoMae(replace(tiny(), image_size=18)), UsageError, "18 x 18"),
    "another number of frames": (
        lambda: model_of().encode_video(clip_of(pixels(1, 6))), UsageError, "clips of 8 frames"
    ),
    "another size": (
        lambda: model_of().encode_video(clip_of(pixels(1, side=24))), UsageError, r"\(B, 8, 3, 16, 16\)"
    ),
    "another size, masked": (
        lambda: DualMasking(model_of(), crops=False)(model_of(), {"clip": clip_of(pixels(1, side=24))}),
        UsageError, r"\(B, 8, 3, 16, 16\)",
    ),
    "odd grid": (
        lambda: DualMasking(model_of(replace(tiny(), image_size=20))), UsageError, "got 5 x 5"
    ),
    "unequal visible counts": (unequal, UsageError, "equally many tokens, got 1[56] to 1[67]"),
    "mask ratio": (lambda: DualMasking(model_of(), mask_ratio=1.0), UsageError, "between 0 and 1, got 1.0"),
    "negative mask ratio": (lambda: DualMasking(model_of(), mask_ratio=-0.1), UsageError, "got -0.1"),
    "decoder ratio": (lambda: DualMasking(model_of(), decoder_ratio=0.1), UsageError, "got 0.1"),
    "samples": (lambda: DualMasking(model_of(), samples=0), UsageError, "samples=0"),
    "no decoder": (lambda: DualMasking(tuned_model()), Refusal, "no decoder"),
    "no classifier": (lambda: model_of().classify_video(clip_of(pixels(1))), Refusal, "no classifier"),
    "no classes": (lambda: model_of().set_classes(0), UsageError, "at least one class"),
    "classes and a decoder": (lambda: replace(tiny(), classes=2), UsageError, "no decoder"),
    "sampler": (lambda: replace(tiny(), sampler="any"), UsageError, "got 'any'"),
    "stride": (lambda: replace(tiny(), stride=0), UsageError, "got 0, 0"),
    "decoder of other outputs": (
        lambda: VideoMae.from_official(official(**{"decoder.head.weight": torch.zeros(100, 64)})),
        CheckpointError, "says 100 numbers of a tubelet, which has 1536",
    ),
    "a name missing": (
        lambda: VideoMae.from_official(official(**{"encoder.blocks.1.attn.v_bias": None})),
        CheckpointError, r"1 missing: encoder\.blocks\.1\.attn\.v_bias",
    ),
    "a name too many": (
        lambda: VideoMae.from_official(official(pos_embed=torch.zeros(1, 1568, 64))),
        CheckpointError, "1 unexpected: pos_embed",
    ),
    "another model": (
        lambda: VideoMae.from_official({"visual.proj": torch.zeros(2, 2)}), CheckpointError, "patch_embed"
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_bad_input(name):
    call, error, said = BAD[name]
    with pytest.raises(error, match=said):
        call()


@pytest.mark.slow
@pytest.mark.parametrize("arm", ["from scratch", "pre-trained on shuffled frames", "pre-trained"])
def test_the_claim_runs(arm):
    """What comes out is the claim's to say, at full length; here that a short run gives its figures."""
    figures = run_claim(arm, 7, clips=32, first=12, second=12, test=16)
    assert set(figures) == {"action, top-1", "pair accuracy", "kind of action, top-1"}
    assert all(0 <= value <= 100 and math.isfinite(value) for value in figures.values())
