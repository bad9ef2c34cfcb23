from __future__ import annotations

import json
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file

from moviola.clip.config import ClipConfig, ResNetConfig, TextConfig, VitConfig, vit_b_16
from moviola.clip.loaded import Model
from moviola.clip.model import CLIP
from moviola.data import order_clips as world
from moviola.systems.registry import all_systems
from moviola.systems.video import m2_clip
from moviola.systems.video.m2_clip import (
    CLAIM,
    KEYS,
    RECOGNITION,
    M2Clip,
    M2ClipConfig,
    M2Recognition,
    b_16,
    b_32,
    contrast_loss,
    example,
    tiny,
)
from moviola.training.masked_words import HiddenWords
from moviola.types import CheckpointError, ClipBatch, Encoder, Objective, Refusal, UsageError

clip_of = world.clip_batch


def draw(*shape, seed=1):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def plain_clip(config=None, seed=0):
    torch.manual_seed(seed)
    return CLIP(config or ClipConfig(16, tiny().vision, tiny().text)).eval()


def stirred(model, seed=0):
    """Every new parameter drawn, so that no filter is zero."""
    torch.manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "adapter" in name:
                parameter.add_(0.2 * torch.randn(parameter.shape))
    return model.eval()


@pytest.fixture
def model():
    return stirred(M2Clip.from_clip(plain_clip(), adapters="24x384", frames=3))


@pytest.fixture
def tokens():
    return torch.tensor([[30, n, n + 7, 31, 0, 0, 0, 0] for n in range(1, 6)])


NEVER_READ = "visual.transformer.resblocks.1.adapter_pre_mlp.offset_adapter"
"""TD of patches behind the last attention: no class token sees it."""


# --------------------------------------------------------------------------------------------------
# Parity
# --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def oracle(oracles_dir):
    folder = oracles_dir / "23-m2-clip"
    return json.loads((folder / "a.json").read_text()), load_file(folder / "a.safetensors")


def oracle_model(meta, data):
    c = meta["config"]
    clip = ClipConfig(
        c["embed_dim"],
        VitConfig(c["image"], c["patch"], c["vwidth"], c["vlayers"], c["vision_heads"]),
        TextConfig(c["ctx"], c["vocab"], c["twidth"], c["text_layers_run"], c["theads"]),
    )
    config = M2ClipConfig.over(
        clip,
        frames=c["T"],
        vision_channels=c["adapter"],
        vision_adapters=c["vadapter_layers"],
        vision_twice=c["pre_attn"],
        text_channels=c["tadapter"],
        text_adapters=c["tadapter_layers"],
        text_twice=c["text_pre_attn"],
        classes=c["classes"],
        words=c["mlm_vocab"],
    )
    model = M2Clip(config).eval()
    KEYS.load(model, {k.removeprefix("param/"): v for k, v in data.items() if k.startswith("param/")})
    return model


def test_parity_of_every_output_and_gradient(oracle):
    meta, data = oracle
    c, model = meta["config"], oracle_model(meta, data)
    label_B, clips = data["in/labels"], clip_of(data["in/video"].transpose(1, 2))
    scale = c["similarity_scale"]
    objective = M2Recognition(model, data["in/class_text"], double_softmax=True, similarity_scale=scale)
    model = oracle_model(meta, data)  # the objective made the other a head for the words of its texts

    block = model.visual.transformer.resblocks[0].adapter_pre_mlp
    heard = {}
    for name, module in (("adapter_in", block), ("t_adapter_in", model.visual.t_adapter)):
        module.register_forward_pre_hook(lambda _, args, name=name: heard.setdefault(name, args[0]))
    seen = model.look(clips)
    given = data["out/adapter_in"].unflatten(0, (-1, c["T"]))
    pooled = seen.frames_BTE.mean(1)
    text = model.forward_text(data["in/text"], taps=(-1,))
    text_tokens = text.layers[c["text_layers_run"]]
    class_text = model.encode_text(data["in/class_text"])
    logits = model.score(text.vector_BD, pooled).T
    similarity = scale * F.normalize(pooled, dim=-1) @ F.normalize(class_text, dim=-1).T
    # every row's own text is given, as the official code feeds it
    hidden = HiddenWords(torch.arange(c["B"]), data["in/text"], data["in/mlm_labels"])
    parts = objective.parts(model, seen, label_B, hidden)
    weights = dict(zip(parts, objective.weights, strict=True))
    total = sum(weights[name] * part for name, part in parts.items())
    total.backward()
    one_way = [contrast_loss(x, label_B, c["contrast_target_scale"]) for x in (logits, logits.T)]
    torch.testing.assert_close(parts["contrast"], sum(one_way) / 2)
    got = {
        "adapter_in": heard["adapter_in"],
        "adapter_out": block(data["out/adapter_in"]),
        "temporal_difference": block.offset_adapter(given).flatten(0, 1),
        "t_adapter_in": heard["t_adapter_in"].flatten(0, 1),
        "t_adapter_out": seen.frames_BTE.flatten(0, 1),
        "frame_features": seen.frames_BTE,
        "image_embedding": F.normalize(pooled, dim=-1),
        "class_logits": model.class_logits(seen),
        "text_tokens": text_tokens,
        "class_text": F.normalize(class_text, dim=-1),
        "cross": model.fusion.look(text_tokens, seen.frames_BTE),
        "mlm_logits": model.word_logits(text_tokens, seen.frames_BTE),
        "logits_per_image": logits,
        "similarity_probs": similarity.softmax(-1),
        "loss_image_kl": one_way[0],
        "loss_text_kl": one_way[1],
        "loss_cross_modal": parts["similarity"],
        "loss_class": parts["class"],
        "loss_mlm": parts["words"],
        "total": total,
    }
    found = {f"out/{name}": value for name, value in got.items()}
    found |= {f"grad/{n}": p.grad for n, p in model.named_parameters() if f"grad/{n}" in data}
    assert set(found) == {k for k in data if k.startswith(("out/", "grad/"))}
    for name, value in found.items():
        wanted = data[name].double()
        assert value.shape == wanted.shape, name
        worst = ((value.double() - wanted).abs() / (1 + wanted.abs())).max()
        assert worst <= meta["tolerance"], f"{name}: {worst:.2e}"


# --------------------------------------------------------------------------------------------------
# Names, sizes, checkpoints
# --------------------------------------------------------------------------------------------------


def adapter_names(*, vision, text, vision_twice=False, text_twice=False):
    """The authors' names of what trains at paper size, from the specification: 12 and 13 blocks."""

    def layers(*names):
        return [f"{name}.{kind}" for name in names for kind in ("weight", "bias")]

    ted = layers("fc1", "conv", "fc2", *(f"offset_adapter.{n}" for n in ("fc1", "conv", "fc2")))
    blocks = {
        "visual.transformer": (range(12 - vision, 12), ted, vision_twice),
        "transformer": (range(13 - text, 13), layers("textad_fc1", "textad_fc2"), text_twice),
    }
    names = [
        f"{tower}.resblocks.{n}.adapter_{place}.{name}"
        for tower, (numbers, inner, twice) in blocks.items()
        for n in numbers
        for place in (("pre_attn", "pre_mlp") if twice else ("pre_mlp",))
        for name in inner
    ]
    names += layers(*(f"visual.t_adapter.{n}" for n in ("fc1", "conv", "fc2")), "visual.adapter_fc")
    names += layers("mlm_adapter.transform.dense", "mlm_adapter.transform.LayerNorm")
    return [*names, "mlm_adapter.decoder.weight", "mlm_adapter.bias"]


@pytest.mark.parametrize(
    ("config", "placed"),
    [
        (b_16(), {"vision": 12, "text": 2}),
        (b_32(), {"vision": 12, "text": 1}),
        (b_16("24x384"), {"vision": 12, "text": 13, "vision_twice": True, "text_twice": True}),
        (b_32("24x384"), {"vision": 12, "text": 13, "vision_twice": True}),
    ],
    ids=["b-16 12x", "b-32 12x", "b-16 24x", "b-32 24x"],
)
def test_keys_name_every_parameter_at_paper_size(config, placed):
    with torch.device("meta"):
        model, clip = M2Clip(config), CLIP(vit_b_16())
        model.set_classes(400)
        model.set_words(520)
    names = KEYS.official_names(model.state_dict())
    fusion = [
        name.replace("resblocks.0.", "resblocks.12.")
        for name in clip.state_dict()
        if name.startswith("transformer.resblocks.0.")
    ]
    assert sorted(names) == sorted([*clip.state_dict(), *fusion, *adapter_names(**placed)])
    assert sorted(n for n in names if "adapter" in n) == sorted(adapter_names(**placed))
    assert config.vision_channels == config.text_channels == 384
    assert model.visual.adapter_fc.weight.shape == (400, 768)
    assert model.mlm_adapter.decoder.weight.shape == (520, 512)


def test_what_trains_is_a_small_share():
    """12x384 on ViT-B/16: TED adapters of 2 (2 D C) weights a block and what is thin."""
    with torch.device("meta"):
        model = M2Clip(b_16())
    counted = sum(p.numel() for p in model.visual.transformer.resblocks[0].adapter_pre_mlp.parameters())
    assert counted == 2 * (2 * 768 * 384 + 384 + 768) + 384 * 4 + 384 * 10
    sizes = {True: 0, False: 0}
    for name, parameter in model.named_parameters():
        sizes["adapter" in name] += parameter.numel()
    assert 0.08 < sizes[True] / sum(sizes.values()) < 0.10


def wide(**options):
    clip = ClipConfig(64, VitConfig(32, 16, 128, 2, 2), TextConfig(8, 32, 64, 2, 1))
    return M2ClipConfig.over(clip, **{"frames": 4, "classes": 5, "words": 7, **options})


@pytest.mark.parametrize("adapters", ["12x384", "24x384"])
def test_reads_the_authors_file(adapters, tokens):
    """It holds what trained; sizes follow from the shapes, names may begin with `module.`."""
    clip = plain_clip(ClipConfig(64, wide().vision, wide().text))
    model = stirred(
        M2Clip.from_clip(clip, adapters=adapters, frames=4, classes=5, words=7, vision_channels=9)
    )
    state = {k: v for k, v in KEYS.to_official(model.state_dict()).items() if "adapter" in k}
    made = M2Clip.from_official({f"module.{k}": v for k, v in state.items()}, clip, frames=4)
    assert made.config == model.config
    clips = clip_of(draw(2, 4, 3, 32, 32))
    assert torch.equal(made.encode_video(clips), model.encode_video(clips))
    assert torch.equal(made.classify_video(clips), model.classify_video(clips))
    assert torch.equal(made.encode_text(tokens), model.encode_text(tokens))
    assert all(torch.equal(v, model.state_dict()[k]) for k, v in made.state_dict().items())


def test_reads_a_whole_state_and_half_precision():
    model = stirred(M2Clip(wide()))
    state = {k: v.half() for k, v in model.state_dict().items()}
    made = M2Clip.from_official(state, frames=4)
    assert made.config == model.config
    assert made.visual.proj.dtype == torch.float32
    assert all(torch.equal(v, state[k].float()) for k, v in made.state_dict().items())


def test_a_file_that_does_not_fit_is_refused():
    clip = plain_clip(ClipConfig(64, wide().vision, wide().text))
    state = {k: v for k, v in stirred(M2Clip(wide())).state_dict().items() if "adapter" in k}
    with pytest.raises(UsageError, match="without the CLIP"):
        M2Clip.from_official(state)
    with pytest.raises(CheckpointError, match=r"2 missing: visual\.t_adapter\.conv\.weight"):
        M2Clip.from_official({k: v for k, v in state.items() if "visual.t_adapter.conv" not in k}, clip)
    with pytest.raises(CheckpointError, match="1 unexpected: extra_adapter"):
        M2Clip.from_official({**state, "extra_adapter": torch.zeros(1)}, clip)


# --------------------------------------------------------------------------------------------------
# The start, and bad input
# --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("frames", [1, 4])
@torch.no_grad()
def test_a_fresh_model_sees_as_clips_mean_does(frames):
    clip, clips = plain_clip(), draw(3, frames, 3, 16, 16)
    model = M2Clip.from_clip(clip, frames=frames)
    assert isinstance(model, Encoder)
    assert not model.training
    assert (model.frame_spec.count, model.separable, model.adaptation) == (frames, True, "none")
    mean = clip.encode_frames(clip_of(clips)).mean(1)
    torch.testing.assert_close(model.encode_video(clip_of(clips)), mean)
    torch.testing.assert_close(model.encode_image(clips[:, 0]), clip.encode_image(clips[:, 0]))
    assert all(torch.equal(model.state_dict()[k], v) for k, v in clip.state_dict().items())
    last, fusion = (model.transformer.resblocks[n].state_dict() for n in (-2, -1))
    assert all(torch.equal(fusion[k], v) for k, v in last.items())


def test_text_adapters_are_drawn_where_they_stand_in_the_way(tokens):
    clip = plain_clip()
    same, other = (M2Clip.from_clip(clip, text_adapters=n) for n in (1, 2))
    assert torch.equal(same.encode_text(tokens), clip.encode_text(tokens))
    assert (other.encode_text(tokens) - clip.encode_text(tokens)).abs().max() > 1e-3


def test_a_picture_is_a_still_clip(model):
    pictures = draw(4, 3, 16, 16)
    model.set_classes(5)
    torch.testing.assert_close(model.encode_image(pictures), model.encode_video(model.still(pictures)))
    torch.testing.assert_close(model.classify_image(pictures), model.classify_video(model.still(pictures)))


def test_order_counts(model):
    clips = draw(2, 3, 3, 16, 16)
    there, back = (model.encode_video(clip_of(c)) for c in (clips, clips.flip(1)))
    assert (there - back).abs().max() > 1e-3


@pytest.mark.parametrize("shape", [(2, 6, 3, 16, 16), (2, 2, 3, 16, 16), (6, 3, 16, 16)])
def test_clips_of_another_length_are_refused(model, shape):
    """Also of twice the length, which would pass as twice as many videos."""
    with pytest.raises(UsageError, match="takes clips of 3 frames"):
        model.encode_video(ClipBatch(torch.zeros(shape), torch.zeros(1, 1), torch.ones(1, 1)))


def test_what_cannot_be_built_is_refused():
    config = tiny()
    with pytest.raises(UsageError, match="square grid"):
        M2Clip(M2ClipConfig.over(ClipConfig(16, VitConfig((16, 24), 8, 16, 2, 2), config.text)))
    with pytest.raises(UsageError, match="vision transformer, got a ResNet"):
        M2Clip.from_clip(CLIP(ClipConfig(16, ResNetConfig(32, 8, (1, 1, 1, 1), 2), config.text)))
    with pytest.raises(UsageError, match="12x384 or 24x384"):
        M2ClipConfig.over(config, adapters="6x384")
    for wrong in ({"frames": 0}, {"vision_adapters": 3}, {"text_adapters": 4}):
        with pytest.raises(UsageError, match=r"at most \(2, 3\) blocks"):
            M2Clip(M2ClipConfig.over(config, **wrong))


def test_a_model_without_heads_says_so(model):
    with pytest.raises(Refusal, match="no class head"):
        model.classify_video(clip_of(draw(1, 3, 3, 16, 16)))
    with pytest.raises(Refusal, match="no head for hidden words"):
        model.word_logits(draw(1, 2, 16), draw(1, 3, 16))


def test_a_longer_text_than_the_context_is_refused(model):
    with pytest.raises(UsageError, match="at most 8 tokens, got 9"):
        model.encode_text(torch.tensor([[30, 1, 2, 3, 4, 5, 6, 7, 31]]))


def test_heads_are_made_once(model):
    model.set_classes(4)
    head = model.visual.adapter_fc
    model.set_classes(4)
    assert model.visual.adapter_fc is head
    model.set_classes(6)
    assert model.config.classes == 6
    made = M2Clip.from_config(json.loads(json.dumps(model.config.to_json())))
    assert made.config == model.config
    assert made.state_dict().keys() == model.state_dict().keys()


# --------------------------------------------------------------------------------------------------
# Losses
# --------------------------------------------------------------------------------------------------


def test_the_contrast_is_the_formula_with_repeated_labels():
    logits, labels = draw(4, 4).double(), torch.tensor([0, 2, 0, 1])
    wanted = 0.0
    for i in range(4):
        norm = sum(math.exp(10.0 * (labels[k] == labels[i]).item()) for k in range(4))
        denominator = sum(math.exp(x) for x in logits[i].tolist())
        for j in range(4):
            target = math.exp(10.0 * (labels[j] == labels[i]).item()) / norm
            wanted += target * (math.log(target) - logits[i, j].item() + math.log(denominator))
    assert contrast_loss(logits, labels).item() == pytest.approx(wanted / 4)


def batch(labels=(0, 1, 2, 3, 4, 0)):
    return {"clip": clip_of(draw(len(labels), 3, 3, 16, 16)), "label": torch.tensor(labels)}


def test_weights_are_the_papers(model, tokens):
    objective = M2Recognition(model, tokens, mask_chance=1)
    assert isinstance(objective, Objective)
    given = batch()
    torch.manual_seed(3)
    weighed = objective(model, given)
    torch.manual_seed(3)
    hidden = objective.hidden.draw(given["label"], 1)
    parts = objective.parts(model, model.look(given["clip"]), given["label"], hidden)
    assert list(parts) == ["contrast", "similarity", "class", "words"]
    for name, weight in zip(parts, (0.5, 0.5, 1, 0.1), strict=True):
        torch.testing.assert_close(weighed[name], weight * parts[name])
        assert parts[name] > 0


def test_the_second_softmax_is_an_option(model, tokens):
    given, losses = batch(), []
    for double in (False, True):
        objective = M2Recognition(model, tokens, mask_chance=0, double_softmax=double)
        losses.append(objective(model, given)["similarity"])
    video, text = (
        F.normalize(x, dim=-1) for x in (model.encode_video(given["clip"]), model.encode_text(tokens))
    )
    cosine = 100 * video @ text.T
    torch.testing.assert_close(losses[0], F.cross_entropy(cosine, given["label"]) / 2)
    torch.testing.assert_close(losses[1], F.cross_entropy(cosine.softmax(-1), given["label"]) / 2)


def test_nothing_hidden_costs_nothing(model, tokens):
    objective = M2Recognition(model, tokens, mask_chance=0)
    losses = objective(model, batch())
    assert losses["words"] == 0
    assert all(bool(v.isfinite()) for v in losses.values())
    none = torch.full((2, 4), -100)  # as the authors' code: texts come along, and hide nothing
    seen, labels = model.look(batch()["clip"]), batch()["label"]
    as_given = HiddenWords(torch.tensor([1, 3]), tokens[[1, 3], :4], none)
    parts = objective.parts(model, seen, labels, as_given)
    assert parts["words"] == 0
    torch.testing.assert_close(0.5 * parts["contrast"], losses["contrast"])


def test_encoding_masked_rows_alone_is_the_whole_form(model, tokens):
    """Every row's own text encoded over the whole context, every token through the fusion block."""
    objective, given = M2Recognition(model, tokens, mask_chance=0.5), batch((0, 1, 2, 3, 4, 0, 1, 2))
    torch.manual_seed(1)
    hidden = objective.hidden.draw(given["label"], 0.5)
    assert 0 < len(hidden.rows_m) < 8
    seen = model.look(given["clip"])
    got = objective.parts(model, seen, given["label"], hidden)
    text_BL, word_BL = tokens[given["label"]].clone(), torch.full((8, 8), -100)
    text_BL[hidden.rows_m, : hidden.tokens_mL.shape[1]] = hidden.tokens_mL
    word_BL[hidden.rows_m, : hidden.word_mL.shape[1]] = hidden.word_mL
    out = model.forward_text(text_BL, taps=(-1,))
    words = F.cross_entropy(
        model.word_logits(next(iter(out.layers.values())), seen.frames_BTE).flatten(0, 1), word_BL.flatten()
    )
    torch.testing.assert_close(got["words"], words)
    logits = model.score(out.vector_BD, seen.video_BE).T
    both = [contrast_loss(x, given["label"]) for x in (logits, logits.T)]
    torch.testing.assert_close(got["contrast"], sum(both) / 2)


@pytest.mark.parametrize("text_adapters", [1, 2])
def test_trains_in_half_precision(text_adapters, tokens):
    """Kept class texts and masked ones meet in one tensor, and weights stay as they are."""
    model = stirred(M2Clip.from_clip(plain_clip(), text_adapters=text_adapters, frames=3))
    objective = M2Recognition(model, tokens, mask_chance=1)
    full = objective(model, batch())
    torch.manual_seed(0)
    with torch.autocast("cpu", torch.bfloat16):
        half = objective(model, batch())
    torch.stack(list(half.values())).sum().backward()
    assert all(value.dtype == torch.float32 for value in half.values())
    torch.testing.assert_close(half["class"], full["class"], rtol=0.05, atol=0.05)


def test_a_batch_of_one_class_warns_and_has_no_contrast(model, tokens):
    with pytest.warns(UserWarning, match="batch of one class"):
        losses = M2Recognition(model, tokens)(model, batch((2, 2, 2)))
    assert losses["contrast"] == 0
    assert losses["class"] > 0


def test_only_adapters_train(model, tokens):
    objective = M2Recognition(model, tokens, mask_chance=1)
    before = {k: v.clone() for k, v in model.named_parameters()}
    optimizer = torch.optim.AdamW(objective.param_groups(model), lr=1e-3)
    model.train()
    for _ in range(2):
        torch.stack(list(objective(model, batch()).values())).sum().backward()
        assert all((p.grad is not None) == ("adapter" in n) for n, p in model.named_parameters())
        optimizer.step()
        optimizer.zero_grad()
    moved = {k for k, v in model.named_parameters() if not torch.equal(v, before[k])}
    adapters = {k for k in before if "adapter" in k}
    assert moved <= adapters
    assert all(k.startswith(f"{NEVER_READ}.") for k in adapters - moved)


def test_groups_are_the_papers(model, tokens):
    objective, seen = M2Recognition(model, tokens), {}
    names = {id(p): name for name, p in model.named_parameters()}
    for group in objective.param_groups(model):
        for parameter in group["params"]:
            seen[names[id(parameter)]] = (group["lr_scale"], group["weight_decay"])
    assert set(seen) == {n for n in names.values() if "adapter" in n}
    for name, (scale, decay) in seen.items():
        assert scale == (0.5 if "textad_" in name else 1), name
        assert decay == (0 if model.get_parameter(name).ndim < 2 else 0.01), name


def test_class_texts_are_kept_where_no_adapter_stands_in_their_way(tokens):
    for count, kept in ((1, True), (2, False)):
        model = M2Clip.from_clip(plain_clip(), text_adapters=count, frames=3)
        objective = M2Recognition(model, tokens)
        assert (objective.text(model) is objective.text(model)) == kept


def test_bad_options_are_refused(model, tokens):
    for wrong in ({"weights": (1, 1, 1)}, {"weights": (1, 1, -1, 1)}, {"mask_chance": 1.5}):
        with pytest.raises(UsageError, match="four weights"):
            M2Recognition(model, tokens, **wrong)
    with pytest.raises(UsageError, match="needs the tokenizer"):
        M2Recognition(model, tokens, vocabulary=["swim"])
    objective = M2Recognition(model, tokens)
    for label in (5, -1):
        with pytest.raises(UsageError, match=r"class numbers in 0\.\.4"):
            objective(model, batch((0, label)))


def test_a_frozen_stem_keeps_its_statistics():
    clip = plain_clip(world.clip_config(width=32))
    model = M2Clip.from_clip(clip, frames=2)
    M2Recognition(model, world.tokens(world.ACTIONS))
    before = {k: v.clone() for k, v in model.named_buffers()}
    model.train().look(clip_of(draw(2, 2, 3, 32, 32)))
    assert before
    assert all(torch.equal(v, before[k]) for k, v in model.named_buffers())


def test_what_training_starts_from(model):
    assert RECOGNITION.start(model) is model
    assert RECOGNITION.start(plain_clip()).frames == 8
    assert RECOGNITION.presets["b-32"]().text_adapters == 1


def test_the_example_is_what_the_contract_asks():
    made = example(0)
    first, again = made.run(**made.inputs), made.run(**made.inputs)
    assert {k: tuple(v.shape) for k, v in first.items()} == dict(made.shapes)
    assert all(torch.equal(v, again[k]) for k, v in first.items())
    first["loss"].backward()
    trained = {n: p for n, p in made.module.named_parameters() if p.requires_grad}
    assert len(trained) == 2 * 2 * 12 + 2 * 3 * 4 + 6 + 2 + 6
    still = {n for n, p in trained.items() if not p.grad.abs().max() > 0}
    assert still == {n for n in trained if n.startswith(f"{NEVER_READ}.")}


# --------------------------------------------------------------------------------------------------
# The claim, and the verbs
# --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("arm", CLAIM.arms)
def test_every_arm_of_the_claim_runs(arm, monkeypatch):
    """On an untrained image model in the place of the one that takes seconds to train."""
    made = plain_clip(world.clip_config(width=32))
    monkeypatch.setattr(world, "image_clip", lambda seed, **_: made)
    torch.manual_seed(5)
    before = torch.get_rng_state()
    figures = m2_clip.run_claim(arm, 0, steps=2, clips=96)
    assert torch.equal(torch.get_rng_state(), before)
    assert all(math.isfinite(v) for v in figures.values())
    assert CLAIM.metric in figures


def test_the_frozen_mean_cannot_tell_order():
    """Exactly: the same clips seen backwards get the same logits before and after its head has trained."""
    model = M2Clip.from_clip(plain_clip(), frames=3)
    M2Recognition(model, torch.tensor([[30, 1, 31], [30, 2, 31]]), train="adapter_fc", mask_chance=0)
    assert {n for n, p in model.named_parameters() if p.requires_grad} == {
        "visual.adapter_fc.weight",
        "visual.adapter_fc.bias",
    }
    clips = draw(3, 3, 3, 16, 16)
    there, back = (model.classify_video(clip_of(c)) for c in (clips, clips.flip(1)))
    torch.testing.assert_close(there, back)


def test_the_builtin_model_becomes_a_video_model():
    """Its texts are narrower than its embedding, and its words are cut by its own tokenizer."""
    from moviola.verbs.load import load

    base = load("builtin", device="cpu")
    module = M2Clip.from_clip(base.module)
    assert module.config.text.width != module.config.embed_dim
    names = ["riding a unicycle", "folding napkins", "swimming"]
    tokens = torch.from_numpy(base.tokenizer([f"A video of {name}" for name in names]))
    objective = M2Recognition(module, tokens, tokenizer=base.tokenizer, mask_chance=1)
    spelled = {base.tokenizer.decode(word).strip() for word in objective.hidden.number}
    assert spelled == {"a", "video", "of", "riding", "unicycle", "folding", "napkins", "swimming"}
    assert module.config.words == 8
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        given = {"clip": clip_of(draw(2, 8, 3, 64, 64)), "label": torch.tensor([0, 2])}
        losses = objective(module.train(), given)
    assert losses["words"] > 0
    listed = sorted(spelled)
    again = M2Recognition(module, tokens, tokenizer=base.tokenizer, vocabulary=listed)
    assert list(again.hidden.number.values()) == list(range(8))
    with pytest.raises(UsageError, match="not in the vocabulary of 7"):
        M2Recognition(module, tokens, tokenizer=base.tokenizer, vocabulary=listed[:-1])

    loaded = Model(
        module.eval(),
        config=module.config.to_json(),
        recipe=base.recipe,
        tokenizer=base.tokenizer,
        device="cpu",
    )
    rng = np.random.default_rng(0)
    clips = [(rng.integers(0, 255, (n, 64, 64, 3), np.uint8), np.arange(n) / 2) for n in (12, 3)]
    video, mask = loaded.encode_clips(clips)
    assert video.shape == (2, 256)
    assert np.isfinite(loaded.score(["a dog", "a car", "two people"], video, mask)).all()


def test_index_and_search_on_a_short_video(tmp_path):
    if not any(system.slug == "m2-clip" for system in all_systems()):
        pytest.skip("m2-clip is not registered yet")
    import moviola
    from moviola.media import write_video

    rng = np.random.default_rng(0)
    scenes = [np.full((20, 64, 64, 3), c, np.uint8) for c in ((200, 30, 30), (30, 200, 30))]
    frames = np.concatenate(scenes) + rng.integers(0, 20, (40, 64, 64, 3), np.uint8)
    (tmp_path / "media").mkdir()
    write_video(tmp_path / "media" / "v.mp4", frames, 4)
    loaded = moviola.load("m2-clip", init="builtin", device="cpu")
    report = moviola.index(tmp_path / "media", tmp_path / "index", model=loaded)
    assert report.ok
    assert report.units
    found = moviola.search(tmp_path / "index", "a red wall", model=loaded, k=3)
    assert found.moments
    assert all(math.isfinite(moment.score) for moment in found)
