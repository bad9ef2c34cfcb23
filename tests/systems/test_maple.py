from __future__ import annotations

import copy
import json
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file

from moviola.clip.blocks import set_checkpointing
from moviola.clip.config import ClipConfig, ResNetConfig, TextConfig, VitConfig, vit_b_16
from moviola.clip.formats import BUILTIN_FOLDER
from moviola.clip.loaded import Model
from moviola.clip.loaded import load as load_clip
from moviola.clip.model import CLIP
from moviola.parts.prompting import embed_with_context, text_from_embeddings
from moviola.systems.adaptation.maple import (
    ADAPTATION,
    KEYS,
    LR,
    WARMUP_LR,
    Config,
    Maple,
    MapleObjective,
    example,
    run_claim,
    start,
)
from moviola.training.caching import compute
from moviola.training.config import TrainConfig
from moviola.types import CheckpointError, ClipBatch, Encoder, LabelField, PairObjective, Refusal, UsageError

NAMES = ["cat", "big_dog", "red fire truck", "sea otter"]

# --------------------------------------------------------------------------------------------------
# Parity
# --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def oracle(oracles_dir):
    folder = oracles_dir / "46-maple"
    return json.loads((folder / "a.json").read_text()), load_file(folder / "a.safetensors")


@pytest.fixture
def official(oracle):
    """Our module with the oracle's weights, built through KEYS."""
    meta, data = oracle
    sizes = meta["config"]
    vision = VitConfig(
        sizes["image_resolution"],
        sizes["vision_patch_size"],
        sizes["vision_width"],
        sizes["vision_layers"],
        sizes["vision_heads"],
    )
    text = TextConfig(
        sizes["context_length"],
        sizes["vocab_size"],
        sizes["transformer_width"],
        sizes["transformer_layers"],
        sizes["transformer_heads"],
    )
    config = Config(sizes["n_ctx"], sizes["prompt_depth"], sizes["ctx_init"])
    clip = CLIP(ClipConfig(sizes["embed_dim"], vision, text))
    with torch.no_grad():
        clip.token_embedding.weight.copy_(data["in/token_embedding.weight"])
    module = Maple(clip, config, data["in/tokenized_prompts"])
    torch.testing.assert_close(module.ctx.detach(), data["in/ctx_init_vectors"], rtol=0, atol=0)
    params = {k.removeprefix("param/"): v for k, v in data.items() if k.startswith("param/")}
    state = KEYS.from_official(params) | {"base.token_embedding.weight": data["in/token_embedding.weight"]}
    module.load_state_dict(state)
    return module.eval()


def same(got, data, name, tolerance):
    """The oracle's own rule."""
    wanted = data[name]
    assert got.shape == wanted.shape, name
    worst = (got - wanted).abs().max().item()
    assert worst <= tolerance * wanted.abs().max().item() + 1e-7, f"{name}: {worst:.2e}"


def block_output(transformer, number, call):
    seen = []
    handle = transformer.resblocks[number].register_forward_hook(lambda *args: seen.append(args[2].detach()))
    call()
    handle.remove()
    return seen[0]


def test_parity_of_every_output_and_gradient(oracle, official):
    meta, data = oracle
    clip, tokens = official.base, data["in/tokenized_prompts"]
    first, *deep = official.text_prompts()
    prompts = embed_with_context(clip, tokens, first)
    ends = clip.eot_positions(tokens)
    losses = MapleObjective(official)(official, {"image": data["in/image"], "label": data["in/label"]})
    losses["cross-entropy"].backward()
    shallow, *coupled = official.vision_prompts()
    got = {
        "class_prompts": prompts,
        "text_block1": block_output(
            clip.transformer, 1, lambda: text_from_embeddings(clip, prompts, ends, deep=deep)
        ),
        "text_features": official.encode_text(tokens),
        "visual_block1": block_output(
            clip.visual.transformer, 1, lambda: official.encode_image(data["in/image"])
        ),
        "image_features": official.encode_image(data["in/image"]),
        "logits": official.classify_image(data["in/image"]),
        "vision_shallow_prompt": shallow,
        "loss": losses["cross-entropy"],
    }
    got |= {f"vision_deep_prompt_{n}": prompt for n, prompt in enumerate(coupled)}
    grads = KEYS.to_official({k: p.grad for k, p in official.named_parameters() if p.requires_grad})
    assert {f"out/{k}" for k in got} == {k for k in data if k.startswith("out/")}
    assert {f"grad/{k}" for k in grads} == {k for k in data if k.startswith("grad/")}
    for name, value in got.items():
        same(value.detach(), data, f"out/{name}", meta["tolerance"])
    for name, value in grads.items():
        same(value, data, f"grad/{name}", meta["tolerance_grad"])


# --------------------------------------------------------------------------------------------------
# The method
# --------------------------------------------------------------------------------------------------

PHRASE = [30, 4, 5, 6, 4]  # start, "a photo of a"


def tower(text_layers=3, vision_layers=3, seed=0):
    vision = VitConfig(16, 8, width=16, layers=vision_layers, heads=2)
    text = TextConfig(context_length=12, vocab_size=32, width=8, layers=text_layers, heads=2)
    torch.manual_seed(seed)
    return CLIP(ClipConfig(16, vision, text)).eval()


def texts(*rows):
    made = torch.zeros(len(rows), 12, dtype=torch.int64)
    for row, ids in zip(made, rows, strict=True):
        row[: len(ids)] = torch.tensor(ids)
    return made


CLASSES = texts([*PHRASE, 7, 31], [*PHRASE, 8, 9, 31], [*PHRASE, 10, 31])
PIXELS = torch.randn(5, 3, 16, 16, generator=torch.Generator().manual_seed(1))


def adapted(clip=None, tokens=CLASSES, **options):
    torch.manual_seed(3)
    return Maple(clip or tower(), Config(**{"depth": 3, **options}), tokens).eval()


def batch(count=5):
    return {"image": PIXELS[:count], "label": torch.arange(count) % 3}


def test_is_an_encoder_and_an_embedding_adaptation():
    model = adapted()
    assert isinstance(model, Encoder)
    assert model.adaptation == "embedding"
    assert isinstance(MapleObjective(model), PairObjective)


def test_depth_one_is_shallow_prompting():
    """The formula written out: prompts at the inputs, then the towers as they are."""
    model = adapted(depth=1)
    clip, n = model.base, 2
    x = clip.token_embedding(CLASSES)
    x = torch.cat([x[:, :1], model.ctx.expand(3, -1, -1), x[:, 1 + n :]], 1) + clip.positional_embedding
    x = clip.ln_final(clip.transformer(x)[0])
    text = x[torch.arange(3), clip.eot_positions(CLASSES)] @ clip.text_projection
    torch.testing.assert_close(model.encode_text(CLASSES), text)

    visual = clip.visual
    patches = visual.conv1(PIXELS).flatten(2).transpose(1, 2)
    x = torch.cat([visual.class_embedding.expand(5, 1, -1), patches], 1) + visual.positional_embedding
    x = visual.ln_pre(torch.cat([x, model.proj(model.ctx).expand(5, -1, -1)], 1))
    image = visual.ln_post(visual.transformer(x)[0][:, 0]) @ visual.proj
    torch.testing.assert_close(model.encode_image(PIXELS), image)
    assert [name for name, p in model.named_parameters() if p.requires_grad] == [
        "ctx",
        "proj.weight",
        "proj.bias",
    ]


def test_gradients_reach_all_prompts_and_couplings_and_no_weight_of_the_clip():
    model = adapted()
    assert not any(p.requires_grad for p in model.base.parameters())
    before = copy.deepcopy(model.base.state_dict())
    objective = MapleObjective(model)
    optimizer = torch.optim.SGD(list(objective.param_groups(model)), lr=0.1, momentum=0.9)
    model.train()
    assert not model.base.training
    for _ in range(3):
        objective(model, batch())["cross-entropy"].backward()
        assert all(p.grad.abs().max() > 0 for p in model.parameters() if p.requires_grad)
        assert all(p.grad is None for p in model.base.parameters())
        optimizer.step()
        optimizer.zero_grad()
        objective.after_step(model)
    assert all(torch.equal(before[k], v) for k, v in model.base.state_dict().items())


@pytest.mark.parametrize("name", ["ctx", "compound_prompts_text.0", "compound_prompts_text.1"])
def test_image_features_move_with_the_text_prompts(name):
    """The coupling: no parameter of the image tower's prompts is free."""
    model = adapted()
    own = set(model.own_state())
    assert {k for k in own if "proj" not in k} == {
        "ctx",
        "compound_prompts_text.0",
        "compound_prompts_text.1",
    }
    image, text = model.encode_image(PIXELS), model.encode_text(CLASSES)
    with torch.no_grad():
        model.get_parameter(name).add_(torch.randn(2, 8))
    assert (model.encode_image(PIXELS) - image).abs().max() > 1e-4
    assert (model.encode_text(CLASSES) - text).abs().max() > 1e-4


def test_lengths_stay_at_all_depths():
    model = adapted()
    for transformer, call, length in (
        (model.base.transformer, lambda: model.encode_text(CLASSES), 8),  # cut after the longest text
        (model.base.visual.transformer, lambda: model.encode_image(PIXELS), 1 + 4 + 2),
    ):
        for number in range(3):
            assert block_output(transformer, number, call).shape[1] == length


def test_deep_prompts_are_put_in_place_of_what_a_block_made_of_the_last_ones():
    """With every deep prompt replaced, the shallow one acts through the first block only."""
    model = adapted()
    seen = []
    for block in model.base.visual.transformer.resblocks:
        block.register_forward_pre_hook(lambda block, args: seen.append(args[0][:, -2:].detach()))
    model.encode_image(PIXELS)
    for given, prompt in zip(seen[1:], model.vision_prompts()[1:], strict=True):
        torch.testing.assert_close(given, prompt.detach().expand(5, -1, -1), rtol=0, atol=0)


def test_one_sided_prompts_leave_the_other_tower_alone():
    clip = tower()
    text, vision = (adapted(clip, sides=side) for side in ("text", "vision"))
    assert torch.equal(text.encode_image(PIXELS), clip.encode_image(PIXELS))
    assert torch.equal(vision.encode_text(CLASSES), clip.encode_text(CLASSES))
    assert vision.context_length == 12
    assert (vision.encode_image(PIXELS) - clip.encode_image(PIXELS)).abs().max() > 1e-5
    assert not any("proj" in name for name in text.own_state())
    for model in (text, vision):
        MapleObjective(model)(model, batch())["cross-entropy"].backward()
        assert all(p.grad.abs().max() > 0 for p in model.parameters() if p.requires_grad)


# --------------------------------------------------------------------------------------------------
# Any text
# --------------------------------------------------------------------------------------------------


def test_other_texts_get_the_prompts_inserted():
    model = adapted()
    other = texts([30, 11, 12, 31])
    as_inserted = texts([30, 4, 5, 11, 12, 31])  # the placeholders, then the text
    assert torch.equal(model.encode_text(other), model.encode_text(as_inserted))
    assert (model.encode_text(other) - model.base.encode_text(other)).abs().max() > 1e-4
    mixed = torch.cat([CLASSES[:1], other, CLASSES[1:2], texts([30, 31])])
    alone = torch.cat([model.encode_text(row[None]) for row in mixed])
    torch.testing.assert_close(model.encode_text(mixed), alone)
    assert model.encode_text(mixed[:0]).shape == (0, 16)


def test_texts_longer_than_the_context_leaves_room_for():
    model = adapted()
    assert model.context_length == 10
    model.encode_text(texts([30, *[11] * 8, 31]))
    model.encode_text(texts([30, 4, 5, *[11] * 8, 31]))  # has the places
    with pytest.raises(UsageError, match="11 tokens and 2 prompt tokens do not fit the context of 12"):
        model.encode_text(texts([30, *[11] * 9, 31]))


def test_checkpointing_changes_nothing():
    model = adapted()
    grads = []
    for on in (False, True):
        set_checkpointing(model, on)
        MapleObjective(model)(model, batch())["cross-entropy"].backward()
        grads.append({k: p.grad.clone() for k, p in model.named_parameters() if p.requires_grad})
        model.zero_grad()
    for name, grad in grads[0].items():
        torch.testing.assert_close(grads[1][name], grad)


def test_class_vectors_are_kept_until_something_changes(monkeypatch):
    model, calls = adapted(), []
    encode = Maple.encode_text
    monkeypatch.setattr(Maple, "encode_text", lambda self, tokens: calls.append(1) or encode(self, tokens))

    def fresh():
        with torch.no_grad():
            before = len(calls)
            kept = model.class_vectors()
            made = len(calls) - before
            torch.testing.assert_close(kept, F.normalize(encode(model, model.tokens_CL), dim=-1))
        return made

    assert [fresh(), fresh()] == [1, 0]
    with torch.no_grad():
        model.ctx.add_(1)
    assert [fresh(), fresh()] == [1, 0]
    model.load_own(adapted().own_state(), source="test")
    assert [fresh(), fresh()] == [1, 0]
    model.tokens_CL = CLASSES[1:]
    assert [fresh(), fresh()] == [1, 0]
    model.class_vectors()
    assert model.class_vectors().requires_grad


def test_a_video_is_the_mean_of_its_prompted_frames():
    model = adapted()
    mask = torch.tensor([[True, True, True], [True, True, False]])
    clips = ClipBatch(PIXELS[torch.tensor([[0, 1, 2], [3, 4, 4]])], torch.zeros(2, 3), mask)
    unit = F.normalize(model.encode_image(PIXELS), dim=-1)
    wanted = torch.stack([unit[:3].mean(0), unit[3:].mean(0)])
    torch.testing.assert_close(model.encode_video(clips), wanted)


# --------------------------------------------------------------------------------------------------
# The authors' files, and ours
# --------------------------------------------------------------------------------------------------


def test_trainable_size_and_names_at_paper_size():
    config = vit_b_16()
    with torch.device("meta"):
        clip = CLIP(ClipConfig(config.embed_dim, config.vision, config.text))
    clip.token_embedding = torch.nn.Embedding(16, 512)  # all that the prompts start from
    model = Maple(clip, Config(), texts([2, 3, 4, 5, 3, 6, 15]))
    trained = [p for p in model.parameters() if p.requires_grad]
    assert sum(p.numel() for p in trained) == 3_555_072
    names = {"ctx", "proj.weight", "proj.bias"} | {f"compound_prompts_text.{n}" for n in range(8)}
    names |= {f"compound_prompt_projections.{n}.{kind}" for n in range(8) for kind in ("weight", "bias")}
    block = ["attn.in_proj_weight", "attn.in_proj_bias", "attn.out_proj.weight", "attn.out_proj.bias"]
    block += [f"{part}.{kind}" for part in ("ln_1", "ln_2") for kind in ("weight", "bias")]
    block += [f"mlp.{part}.{kind}" for part in ("c_fc", "c_proj") for kind in ("weight", "bias")]
    blocks = [f"transformer.resblocks.{n}.{part}" for n in range(12) for part in block]
    image = ["class_embedding", "positional_embedding", "proj", "conv1.weight", *blocks]
    image += [f"ln_{place}.{kind}" for place in ("pre", "post") for kind in ("weight", "bias")]
    text = ["positional_embedding", "text_projection", "ln_final.weight", "ln_final.bias", *blocks]
    official = {f"prompt_learner.{name}" for name in names} | {"logit_scale"}
    official |= {f"image_encoder.{name}" for name in image} | {f"text_encoder.{name}" for name in text}
    state = {k: v for k, v in model.state_dict().items() if k != "base.token_embedding.weight"}
    assert set(KEYS.to_official(state)) == official
    buffers = {f"prompt_learner.token_{part}": torch.zeros(1) for part in ("prefix", "suffix")}
    assert set(KEYS.from_official(dict.fromkeys(official, torch.zeros(1)) | buffers)) == set(state)


@pytest.fixture(scope="module")
def builtin():
    return load_clip(BUILTIN_FOLDER, device="cpu")


def inside(model):
    """The model with a module of its own, as `adapt` freezes it."""
    made = copy.copy(model)
    made.module = copy.deepcopy(model.module)
    return made


def trained(model, classes=NAMES, **options):
    """Prompts that are no longer as they started."""
    torch.manual_seed(0)
    made = start(inside(model), classes, **options)
    with torch.no_grad():
        for parameter in made.parameters():
            if parameter.requires_grad:
                parameter.add_(0.05 * torch.randn_like(parameter))
    return made.eval()


def test_starts_from_the_built_in_model_with_its_stem(builtin):
    made = start(inside(builtin), NAMES)
    layers = len(builtin.module.transformer.resblocks)
    assert made.config == Config(depth=min(9, layers))
    words = builtin.tokenizer("a photo")[0, 1:3]
    assert torch.equal(made.ctx.detach(), builtin.module.token_embedding.weight[words].detach())
    assert made.encode_image(torch.randn(2, 3, 64, 64)).shape == (2, builtin.dim)
    deep = made.compound_prompt_projections
    assert torch.equal(deep[0].weight, deep[1].weight)  # copies of one
    assert start(inside(builtin), NAMES, ctx_init="", n_ctx=3).ctx.abs().max() < 0.2


def test_a_class_prompt_is_the_text_of_that_name_and_other_texts_work(builtin):
    made = trained(builtin)
    model = Model(
        made,
        config=made.config.to_json(),
        recipe=builtin.recipe,
        tokenizer=builtin.tokenizer,
        system="maple",
        device="cpu",
    )
    assert model.tokenizer.context_length == made.context_length == builtin.module.context_length - 2
    names = [name.replace("_", " ") for name in NAMES]
    with torch.no_grad():
        kept = made.class_vectors().numpy()
    assert np.allclose(model.embed_prompts(names), kept, atol=1e-5)
    assert (
        np.abs(model.embed_texts("a dog on a beach") - builtin.embed_texts("a dog on a beach")).max() > 1e-3
    )
    with pytest.warns(UserWarning, match="It was cut"):
        model.embed_texts("dog " * 300, truncate=True)


def test_own_tensors_go_to_a_folder_and_back_for_other_classes(builtin, tmp_path):
    made = trained(builtin)
    save_file(made.own_state(), tmp_path / "own.safetensors")
    torch.manual_seed(11)
    before = torch.get_rng_state()
    config = json.loads(json.dumps(made.config.to_json()))
    again = Maple.from_base(inside(builtin), config, ["ship", "aeroplane"])
    assert torch.equal(torch.get_rng_state(), before)
    again.load_own(load_file(tmp_path / "own.safetensors"), source="test")
    own = {k: v.clone() for k, v in made.own_state().items()}
    assert not any("token" in name for name in own)
    pixels = torch.randn(2, 3, 64, 64)
    assert torch.equal(again.encode_image(pixels), made.encode_image(pixels))
    made.set_classes(builtin.tokenizer, ["ship", "aeroplane"])
    assert torch.equal(again.classify_image(pixels), made.classify_image(pixels))
    assert again.classify_image(pixels).shape == (2, 2)
    assert all(torch.equal(own[k], v) for k, v in made.own_state().items())


def test_the_authors_checkpoint_loads_for_any_classes(builtin):
    source = trained(builtin, depth=3)
    state = KEYS.to_official(source.state_dict())
    del state["text_encoder.token_embedding.weight"]
    state = {f"module.{k}": v.half() for k, v in state.items()}
    state["module.prompt_learner.token_prefix"] = torch.zeros(4, 1, 192)
    state["module.prompt_learner.token_suffix"] = torch.zeros(4, 74, 192)
    made = Maple.from_official(state, inside(builtin), ["ship", "car", "train"])
    assert made.config == source.config
    for name, tensor in source.own_state().items():
        assert torch.equal(made.own_state()[name], tensor.half().float()), name
    assert len(made.tokens_CL) == 3

    other = dict(state)
    other["module.image_encoder.proj"] = other["module.image_encoder.proj"] + 1
    with pytest.raises(CheckpointError, match=r"another model than 'builtin'.*visual\.proj"):
        Maple.from_official(other, inside(builtin), NAMES)
    del state["module.prompt_learner.compound_prompt_projections.1.bias"]
    with pytest.raises(CheckpointError, match=r"compound_prompt_projections\.1\.bias"):
        Maple.from_official(state, inside(builtin), NAMES)
    with pytest.raises(CheckpointError, match=r"no prompt_learner\.ctx"):
        Maple.from_official({"logit_scale": torch.zeros(())}, inside(builtin), NAMES)


# --------------------------------------------------------------------------------------------------
# Training
# --------------------------------------------------------------------------------------------------


def test_the_recipe_and_the_schedule():
    recipe = dict(ADAPTATION.recipe)
    assert recipe.pop("epochs") == 5
    config = TrainConfig(steps=10, warmup=0, **recipe)
    assert (config.optimizer, config.lr, config.momentum, config.batch_size) == ("sgd", 0.0035, 0.9, 4)
    model = adapted()
    objective = MapleObjective(model)
    assert objective.needs.fields[1] == LabelField()
    (group,) = objective.param_groups(model)
    assert group["weight_decay"] == 5e-4
    assert len(group["params"]) == len(model.own_state())
    at = [objective.lr_factors(step, 100)[0] for step in range(101)]
    assert at[:20] == [WARMUP_LR / LR] * 20
    assert at[20] == pytest.approx(
        0.5 * (1 + math.cos(0.2 * math.pi))
    )  # as the authors' second epoch of five
    assert at[50] == pytest.approx(0.5)
    assert at[100] == pytest.approx(0)


def test_gradients_do_not_depend_on_the_parts_of_a_batch():
    model = adapted()
    grads = []
    for size in (None, 2):
        compute(model, MapleObjective(model), {"id": list("abcde"), **batch()}, micro_batch=size)
        grads.append({k: p.grad.clone() for k, p in model.named_parameters() if p.requires_grad})
        model.zero_grad()
    for name, grad in grads[0].items():
        torch.testing.assert_close(grads[1][name], grad)


def test_every_class_runs_through_the_text_tower_once_a_step(monkeypatch):
    model, rows = adapted(), []
    handle = model.base.transformer.resblocks[0].register_forward_hook(
        lambda block, args, out: rows.append(len(out))
    )
    MapleObjective(model)(model, batch())
    handle.remove()
    assert rows == [3]


def test_learns():
    model = adapted(depth=2)
    objective = MapleObjective(model)
    optimizer = torch.optim.SGD(list(objective.param_groups(model)), lr=0.05, momentum=0.9)
    losses = []
    for _ in range(60):
        losses.append(objective(model, batch(3))["cross-entropy"])
        losses[-1].backward()
        optimizer.step()
        optimizer.zero_grad()
    assert losses[-1] < losses[0] - 0.5


def test_towers_of_unlike_depth_are_prompted_to_the_shallower_ones():
    """Two text layers, three vision layers: both towers get prompts in the first two blocks."""
    clip = tower(text_layers=2, vision_layers=3)
    made = adapted(clip, depth=2)
    assert len(made.text_prompts()) == len(made.vision_prompts()) == 2
    assert torch.isfinite(made.classify_image(PIXELS)).all()
    with pytest.raises(UsageError, match="depth 3 is more than the 2 blocks"):
        adapted(clip, depth=3)
    assert adapted(clip, depth=3, sides="vision").encode_image(PIXELS).shape == (5, 16)
    with pytest.raises(UsageError, match="depth 3 is more than the 2 blocks"):
        adapted(clip, depth=3, sides="text")


def test_half_precision():
    model = adapted().bfloat16()
    with torch.no_grad():
        made = model.classify_image(PIXELS.bfloat16())
    assert made.dtype == torch.bfloat16
    torch.testing.assert_close(made.float(), adapted().classify_image(PIXELS).detach(), rtol=0.1, atol=0.5)


def resnet():
    vision = ResNetConfig(image_size=32, width=8, layers=(1, 1, 1, 1), heads=4)
    return CLIP(ClipConfig(16, vision, TextConfig(12, 32, width=8, layers=1, heads=2)))


BAD = {
    "depth 0": (lambda b: start(b, NAMES, depth=0), UsageError, "depth must be at least 1"),
    "depth above the blocks": (lambda b: start(b, NAMES, depth=13), UsageError, "depth 13 is more than"),
    "no prompts": (lambda b: start(b, NAMES, n_ctx=0), UsageError, "n_ctx"),
    "sides": (lambda b: start(b, NAMES, sides="all"), UsageError, "'all'"),
    "short phrase": (lambda b: start(b, NAMES, n_ctx=6), UsageError, "4 tokens, fewer than n_ctx = 6"),
    "repeated names": (lambda b: start(b, ["cat", "dog", "cat"]), UsageError, "more than one class: cat"),
    "empty name": (lambda b: start(b, ["cat", " "]), UsageError, "none that is empty"),
    "no names": (lambda b: start(b, []), UsageError, "need class names"),
    "long name": (lambda b: start(b, ["cat", "dog " * 80]), UsageError, "the model's context holds 77"),
    "picture size": (
        lambda b: start(b, NAMES).encode_image(torch.zeros(1, 3, 32, 32)),
        UsageError,
        "pictures of 64 pixels",
    ),
    "ResNet": (lambda b: adapted(resnet(), depth=1), Refusal, "ResNet"),
    "not a CLIP": (lambda b: adapted(torch.nn.Linear(2, 2), depth=1), Refusal, "is a Linear"),
    "labels": (
        lambda b: MapleObjective(adapted())(adapted(), {"image": PIXELS, "label": torch.full((5,), 3)}),
        UsageError,
        "from 0 to 2, got 3 to 3",
    ),
    "warm-up": (lambda b: MapleObjective(None, warmup_share=1.0), UsageError, "warmup_share"),
    "prompts without common places": (
        lambda b: adapted(tokens=texts([*PHRASE, 7, 31], [30, 9, 5, 6, 4, 8, 31])),
        UsageError,
        "share their tokens 1 to 2",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input(name, builtin):
    call, error, said = BAD[name]
    with pytest.raises(error, match=said):
        call(inside(builtin))


def test_the_example():
    made = example(0)
    assert {k: tuple(v.shape) for k, v in made.run(**made.inputs).items()} == dict(made.shapes)


@pytest.mark.slow
def test_a_short_claim():
    """Seeded, and it leaves the caller's randomness alone."""
    state = torch.get_rng_state()
    short = {"start": 60, "shots": 4, "epochs": 1}
    figures = {arm: run_claim(arm, 5, **short) for arm in ("zero-shot", "maple")}
    assert torch.equal(torch.get_rng_state(), state)
    assert set(figures["maple"]) == {"harmonic mean", "base", "new"}
    assert figures["maple"] != figures["zero-shot"]
    assert figures["maple"] == run_claim("maple", 5, **short)
