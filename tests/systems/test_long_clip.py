"""Long-CLIP against what the authors' code computes, and what must hold for any CLIP."""

from __future__ import annotations

import json
import math
import warnings

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

import moviola.systems.pretraining as room
from moviola import load
from moviola.clip.config import ClipConfig, ResNetConfig, TextConfig, VitConfig, vit_b_16, vit_l_14
from moviola.clip.model import CLIP
from moviola.data import framed
from moviola.parts.projection import primary_components
from moviola.systems.pretraining import long_clip
from moviola.systems.pretraining.long_clip import (
    KEYS,
    TRAINING,
    LongClip,
    LongClipConfig,
    LongClipObjective,
    example,
    long_clip_b_16,
    long_clip_l_14,
    run_claim,
    stretch_positions,
    stretched_length,
    tiny,
)
from moviola.types import CheckpointError, Encoder, PairObjective, System, UsageError


@pytest.fixture(scope="module")
def oracle(oracles_dir):
    folder = oracles_dir / "05-long-clip"
    return json.loads((folder / "a.json").read_text()), load_file(folder / "a.safetensors")


@pytest.fixture
def model(oracle):
    meta, data = oracle
    c = meta["config"]
    vision = VitConfig(
        c["image_resolution"],
        c["vision_patch_size"],
        c["vision_width"],
        c["vision_layers"],
        c["vision_heads"],
    )
    text = TextConfig(
        c["context_length"], c["vocab_size"], c["transformer_width"], c["transformer_layers"],
        c["transformer_heads"],
    )  # fmt: skip
    made = LongClip(LongClipConfig(c["embed_dim"], vision, text, keep=c["keep"]))
    KEYS.load(made, {k.removeprefix("param/"): v for k, v in data.items() if k.startswith("param/")})
    return made.eval()


def same(got, data, name, tolerance):
    """The oracle's own rule: against the largest number of the tensor."""
    wanted = data[name]
    assert got.shape == wanted.shape, name
    worst = (got.double() - wanted.double()).abs().max()
    assert worst <= tolerance * wanted.abs().max() + 1e-7, f"{name}: {worst:.2e}"


def run_losses(model, data):
    objective = LongClipObjective()
    batch = {
        "image": data["in/image"],
        "text": data["in/text_long"],
        "text_short": data["in/text_short"],
    }
    outputs = objective.outputs(model, batch)
    return outputs, objective.loss(model, outputs)


def test_parity_of_every_output(oracle, model):
    meta, data = oracle
    outputs, losses = run_losses(model, data)
    table = data["in/pos77"]
    got = {
        "loss_long": losses["long"],
        "loss_short": losses["short"],
        "loss_total": losses["long"] + losses["short"],
        "image_features": model.encode_image(data["in/image"]),
        "text_features_long": model.encode_text(data["in/text_long"]),
        "text_features_short": model.encode_text(data["in/text_short"]),
        "image_features_pcm32": primary_components(outputs["image"], 32),
        "text_full_first": model.forward_text(data["in/text_short"][:1]).tokens_BLD,
        "pca_small": primary_components(data["in/pca_x"], meta["config"]["pca_dim"]),
        "pos248_float32": stretch_positions(table),
        "pos248_official_fp16_load": stretch_positions(table.half()).float(),
    }
    assert set(got) == {name.removeprefix("out/") for name in data if name.startswith("out/")}
    for name, value in got.items():
        same(value, data, f"out/{name}", meta["tolerance"])
    for name in ("pos248_float32", "pos248_official_fp16_load"):
        assert torch.equal(got[name], data[f"out/{name}"]), name  # bit for bit


def test_parity_of_every_gradient(oracle, model):
    meta, data = oracle
    compared = set()
    for which in ("long", "short", "total"):
        model.zero_grad()
        _, losses = run_losses(model, data)
        (sum(losses.values()) if which == "total" else losses[which]).backward()
        for name in [n for n in data if n.startswith(f"grad/loss_{which}/")]:
            got = model.get_parameter(name.removeprefix(f"grad/loss_{which}/")).grad
            same(got, data, name, meta["tolerance_grad"])
            compared.add(name)
        assert model.positional_embedding.grad is None
        assert not model.positional_embedding_res.grad[:20].any()
    assert compared == {name for name in data if name.startswith("grad/")}
    assert len(compared) == 5


# ------------------------------------------------------------------------------------ the tables


def clip_of(vision=None, *, length=77, seed=0, **text):
    torch.manual_seed(seed)
    vision = vision or VitConfig(16, 8, 16, 1, 2)
    made = CLIP(ClipConfig(16, vision, TextConfig(length, 32, 16, 2, 2, **text)))
    torch.nn.init.normal_(made.positional_embedding, std=0.3)
    return made.eval()


def ids(count, length, width, *, start=30, end=31):
    made = torch.zeros(count, width, dtype=torch.int64)
    made[:, :length] = torch.randint(1, 30, (count, length))
    made[:, 0], made[:, length - 1] = start, end
    return made


@given(length=st.integers(2, 90), keep=st.integers(0, 89), ratio=st.integers(1, 5))
@settings(max_examples=60, deadline=None)
def test_the_stretched_table_row_by_row(length, keep, ratio):
    keep = min(keep, length - 1)
    table = torch.randn(length, 3, dtype=torch.float64)
    new = stretch_positions(table, keep=keep, ratio=ratio)
    assert len(new) == stretched_length(length, keep=keep, ratio=ratio) == keep + ratio * (length - keep)
    assert torch.equal(new[:keep], table[:keep])
    assert torch.equal(new[keep::ratio], table[keep:])
    for i in range(keep, length):
        step = table[i + 1] - table[i] if i + 1 < length else table[i] - table[i - 1]
        for r in range(ratio):
            torch.testing.assert_close(new[keep + ratio * (i - keep) + r], table[i] + r / ratio * step)


@pytest.mark.parametrize("vision", [None, ResNetConfig(32, 8, (1, 1, 1, 1), 4)], ids=["vit", "resnet"])
def test_a_converted_clip_reads_short_texts_and_pictures_as_before(vision):
    clip = clip_of(vision)
    long = LongClip.from_clip(clip)
    assert (long.context_length, long.config.keep, long.training) == (248, 20, False)
    assert isinstance(long, Encoder)
    size = 16 if vision is None else 32
    with torch.inference_mode():
        pixels = torch.randn(3, 3, size, size)
        assert torch.equal(long.encode_image(pixels), clip.encode_image(pixels))
        short = ids(4, 20, 77)
        torch.testing.assert_close(long.encode_text(short), clip.encode_text(short), rtol=0, atol=1e-6)
        longer = ids(4, 40, 77)
        assert (long.encode_text(longer) - clip.encode_text(longer)).abs().max() > 1e-4
    with torch.no_grad():
        long.logit_scale.fill_(0)
    assert clip.logit_scale.item() != 0  # a copy


def test_ids_of_any_width_give_the_same_vector():
    long = LongClip.from_clip(clip_of())
    wide = ids(3, 30, 248)
    with torch.inference_mode():
        wanted = long.encode_text(wide)
        for width in (30, 77, 100):
            torch.testing.assert_close(long.encode_text(wide[:, :width]), wanted, rtol=0, atol=1e-6)
        whole = long.forward_text(wide).vector_BD
        torch.testing.assert_close(whole, wanted, rtol=0, atol=1e-6)
        assert long.encode_text(ids(3, 248, 248)).shape == (3, 16)
    with pytest.raises(UsageError, match="at most 248 tokens, got 249"):
        long.encode_text(ids(1, 249, 249))


def test_an_end_id_in_the_middle_of_the_vocabulary_is_kept():
    clip = clip_of(eot_id=7)
    long = LongClip.from_clip(clip)
    short = ids(4, 12, 77, end=7)
    short[short == 31] = 30
    torch.testing.assert_close(long.encode_text(short), clip.encode_text(short), rtol=0, atol=1e-6)


def test_half_precision_rounds_as_the_authors_conversion(oracle):
    _, data = oracle
    clip = clip_of()
    clip.positional_embedding = torch.nn.Parameter(data["in/pos77"][:, :16].contiguous())
    exact = LongClip.from_clip(clip)
    rounded = LongClip.from_clip(clip, half_precision_table=True)
    for table in (rounded.positional_embedding, rounded.positional_embedding_res):
        assert torch.equal(table, data["out/pos248_official_fp16_load"][:, :16])
        assert table.dtype == torch.float32
    assert torch.equal(exact.positional_embedding_res, data["out/pos248_float32"][:, :16])


def test_the_first_positions_never_move_and_the_others_do():
    long = LongClip.from_clip(clip_of(length=12), keep=4, ratio=3).train()
    assert long.context_length == 28
    long.requires_grad_(True)  # even where somebody thaws everything
    before = long.positions(28).detach().clone()
    optimizer = torch.optim.AdamW(long.parameters(), lr=1e-2, weight_decay=0.1)
    for _ in range(3):
        long.encode_text(ids(4, 28, 28)).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    after = long.positions(28).detach()
    assert torch.equal(after[:4], before[:4])
    assert ((after[4:] - before[4:]).abs().amax(1) > 0).all()


def test_a_batch_of_short_texts_still_reaches_the_second_table():
    """With zeros: processes must agree on which parameters have a gradient."""
    long = LongClip.from_clip(clip_of())
    long.encode_text(ids(3, 6, 77)).sum().backward()
    assert long.positional_embedding_res.grad is not None
    assert not long.positional_embedding_res.grad.any()


def test_a_plain_clip_again():
    long = LongClip.from_clip(clip_of())
    with torch.no_grad():
        long.positional_embedding_res.add_(torch.randn_like(long.positional_embedding_res))
    plain = long.to_clip()
    assert type(plain) is CLIP
    assert type(plain.config) is ClipConfig
    texts = ids(4, 100, 248)
    torch.testing.assert_close(plain.encode_text(texts), long.encode_text(texts))
    with pytest.raises(UsageError, match="stretched already, to 248"):
        LongClip.from_clip(plain)


def test_what_cannot_be_stretched():
    clip = clip_of()
    with pytest.raises(UsageError, match="stretched already, to 248"):
        LongClip.from_clip(LongClip.from_clip(clip))
    with pytest.raises(UsageError, match="starts from a CLIP, got Linear"):
        LongClip.from_clip(torch.nn.Linear(2, 2))
    for options in ({"keep": 77}, {"keep": -1}, {"ratio": 0}):
        with pytest.raises(UsageError, match="cannot keep"):
            LongClip.from_clip(clip, **options)
    with pytest.raises(UsageError, match="cannot keep"):
        LongClip.from_clip(clip_of(length=16))
    with pytest.raises(UsageError, match="cannot keep"):
        LongClipConfig(keep=248)


# ---------------------------------------------------------------------------------- as a checkpoint

SYSTEM = System(
    5, "long-clip", "Long-CLIP", "https://arxiv.org/abs/2403.15378", "",
    "moviola.systems.pretraining.long_clip:LongClip", marks=("positional_embedding_res",),
)  # fmt: skip


@pytest.fixture
def registered(monkeypatch):
    if all(system.slug != "long-clip" for system in room.SYSTEMS):
        monkeypatch.setattr(room, "SYSTEMS", (*room.SYSTEMS, SYSTEM))


def test_the_users_call_stretches_the_built_in_model_and_saves_it(registered, tmp_path):
    model = load("long-clip", init="builtin", device="cpu")
    base = load(device="cpu")
    assert (model.tokenizer.context_length, model.recipe.context_length) == (248, 248)
    text = " ".join(["a red ball on the grass beside a small dog"] * 12)
    needed = len(base.tokenizer.encode(text)) + 2
    assert 77 < needed <= 248
    with pytest.raises(UsageError, match="context holds 77"):
        base.embed_texts(text)
    other = f"{text} and a blue car"
    vectors = model.embed_texts([text, other, "a dog"])
    assert np.abs(vectors[0] - vectors[1]).max() > 1e-4  # what is said last counts
    np.testing.assert_allclose(vectors[2], base.embed_texts("a dog")[0], atol=1e-6)
    with pytest.raises(UsageError, match="context holds 248"):
        model.embed_texts(" ".join(["dog"] * 300))
    with pytest.warns(UserWarning, match="It was cut"):
        model.embed_texts(" ".join(["dog"] * 300), truncate=True)

    again = load(model.save(tmp_path / "long"), device="cpu")
    assert again.hash == model.hash
    assert (again.system, again.recipe.context_length) == ("long-clip", 248)
    assert again.module.config == model.module.config
    assert not again.module.positional_embedding.requires_grad
    np.testing.assert_array_equal(again.embed_texts([text, other, "a dog"]), vectors)
    with pytest.raises(UsageError, match="stretched already"):
        load("long-clip", init=again, device="cpu")


def openai_names(layers):
    block = [
        "attn.in_proj_weight", "attn.in_proj_bias", "attn.out_proj.weight", "attn.out_proj.bias",
        "ln_1.weight", "ln_1.bias", "ln_2.weight", "ln_2.bias",
        "mlp.c_fc.weight", "mlp.c_fc.bias", "mlp.c_proj.weight", "mlp.c_proj.bias",
    ]  # fmt: skip
    names = ["positional_embedding", "text_projection", "logit_scale", "token_embedding.weight"]
    names += ["ln_final.weight", "ln_final.bias", "visual.class_embedding", "visual.positional_embedding"]
    names += ["visual.proj", "visual.conv1.weight", "visual.ln_pre.weight", "visual.ln_pre.bias"]
    names += ["visual.ln_post.weight", "visual.ln_post.bias", "positional_embedding_res"]
    for tower, count in (("", 12), ("visual.", layers)):
        names += [f"{tower}transformer.resblocks.{n}.{part}" for n in range(count) for part in block]
    return names


@pytest.mark.parametrize(
    ("preset", "base", "layers"), [(long_clip_b_16, vit_b_16, 12), (long_clip_l_14, vit_l_14, 24)]
)
def test_keys_read_the_full_official_list(preset, base, layers):
    config = preset()
    assert config.plain().vision == base().vision
    assert (config.text.context_length, config.keep) == (248, 20)
    with torch.device("meta"):
        state = LongClip(config).state_dict()
    official = KEYS.to_official(state)
    assert set(official) == set(openai_names(layers))
    extra = {name: torch.zeros(()) for name in ("input_resolution", "context_length", "vocab_size")}
    got = KEYS.from_official(official | extra)
    assert {k: v.shape for k, v in got.items()} == {k: v.shape for k, v in state.items()}
    width = config.text.width
    assert got["positional_embedding_res"].shape == (248, width)


def test_the_authors_checkpoint_loads_by_its_shapes():
    torch.manual_seed(0)
    config = LongClipConfig(32, VitConfig(32, 16, 64, 2, 1), TextConfig(248, 50, 64, 2, 1))
    source = LongClip(config).eval()
    with torch.no_grad():
        source.positional_embedding_res.add_(0.1)
    state = {f"module.{k}": v.half() for k, v in source.state_dict().items()}
    made = LongClip.from_official(state)
    assert made.config == config
    assert not made.positional_embedding.requires_grad
    assert made.positional_embedding_res.requires_grad
    for name, tensor in source.state_dict().items():
        assert torch.equal(made.state_dict()[name], tensor.half().float()), name
    del state["module.positional_embedding_res"]
    with pytest.raises(CheckpointError, match="1 missing: positional_embedding_res"):
        LongClip.from_official(state)
    state = dict(source.state_dict()) | {"stranger": torch.zeros(1)}
    with pytest.raises(CheckpointError, match="stranger"):
        LongClip.from_official(state)


def test_the_configuration_survives_json():
    for config in (tiny(), long_clip_l_14(), LongClipConfig(vision=ResNetConfig(), keep=3)):
        assert LongClipConfig.from_json(json.loads(json.dumps(config.to_json()))) == config


# ------------------------------------------------------------------------------------ the objective


def batch(count=8, *, seed=0, length=12):
    torch.manual_seed(seed)
    long = ids(count, length, length)
    short = long.clone()
    short[:, 4], short[:, 5:] = 31, 0
    return {"image": torch.randn(count, 3, 16, 16), "text": long, "text_short": short}


def tiny_model(seed=0):
    torch.manual_seed(seed)
    return LongClip(tiny())


def test_it_trains_by_the_authors_recipe():
    model = tiny_model()
    objective = TRAINING.objective(model, components=3)
    assert isinstance(objective, PairObjective)
    assert model.logit_scale.item() == pytest.approx(math.log(100))
    assert TRAINING.recipe == {"lr": 1e-6, "betas": (0.9, 0.999), "eps": 1e-8, "warmup": 200}
    groups = list(objective.param_groups(model))
    assert [g["weight_decay"] for g in groups] == [0.01, 0.0]
    assert any(p is model.positional_embedding_res for p in groups[1]["params"])
    listed = [id(p) for g in groups for p in g["params"]]
    assert sorted(listed) == sorted(id(p) for p in model.parameters() if p.requires_grad)
    assert {f.name for f in objective.needs.fields} == {"image", "text", "text_short"}
    assert objective.needs.fields[2].cut == "first-sentence"
    optimizer = torch.optim.AdamW(groups, lr=3e-3)
    losses, data = [], batch()
    frozen = model.positional_embedding.clone()
    for _ in range(40):
        loss = sum(objective(model, data).values())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        objective.after_step(model)
        losses.append(loss.item())
    assert min(losses[-5:]) < 0.6 * losses[0]
    assert torch.equal(model.positional_embedding, frozen)


def test_two_slices_give_the_gradients_of_the_whole():
    model, objective, data = tiny_model(), LongClipObjective(components=3), batch()
    whole = objective(model, data)
    sum(whole.values()).backward()
    wanted = {k: p.grad.clone() for k, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    slices = [{k: v[part] for k, v in data.items()} for part in (slice(0, 3), slice(3, 8))]
    parts = [objective.outputs(model, some) for some in slices]
    joined = {k: torch.cat([p[k] for p in parts]) if v.ndim else v for k, v in parts[0].items()}
    got = objective.loss(model, joined)
    for name in whole:
        torch.testing.assert_close(got[name], whole[name], rtol=1e-5, atol=1e-6)
    sum(got.values()).backward()
    for name, grad in wanted.items():
        torch.testing.assert_close(model.get_parameter(name).grad, grad, rtol=1e-5, atol=1e-5)


def test_the_running_state_is_empty():
    assert not LongClipObjective(tiny_model()).state_dict()


def test_components_of_each_process_by_itself():
    model, data = tiny_model(), batch(12)
    objective = LongClipObjective(components=2, official_distributed=True)
    outputs = objective.outputs(model, data)
    assert outputs["process"].dtype == torch.int64
    assert not outputs["process"].any()
    together = LongClipObjective(components=2).loss(
        model, {k: v for k, v in outputs.items() if k != "process"}
    )
    torch.testing.assert_close(objective.loss(model, outputs), together)
    outputs["process"] = torch.tensor([0, 1] * 6)
    apart = objective.loss(model, outputs)
    torch.testing.assert_close(apart["long"], together["long"])
    matched = torch.empty_like(outputs["image"])
    for rank in (0, 1):
        matched[rank::2] = primary_components(outputs["image"][rank::2], 2)
    logits = model.logit_scale.exp() * matched @ outputs["text_short"].T
    target = torch.arange(12)
    wanted = sum(F.cross_entropy(x, target, label_smoothing=0.1) for x in (logits, logits.T)) / 2
    torch.testing.assert_close(apart["short"], wanted)


def test_small_batches_are_matched_whole_and_say_so_once():
    model, objective, data = tiny_model(), LongClipObjective(components=7), batch()
    with pytest.warns(UserWarning, match="8 pictures of 16 numbers have no more than 7 components"):
        losses = objective(model, data)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        objective(model, data)
        plain = LongClipObjective(components=0)(model, data)
    torch.testing.assert_close(losses["short"], plain["short"])


def test_bad_input_of_the_objective():
    model, objective, data = tiny_model(), LongClipObjective(components=3), batch()
    with pytest.raises(UsageError, match="8 pictures, 8 long and 7 short"):
        objective(model, data | {"text_short": data["text_short"][:7]})
    with pytest.raises(UsageError, match="at least two pairs"):
        objective(model, {k: v[:1] for k, v in data.items()})
    for options in ({"components": -1}, {"smoothing": 1.0}, {"short_weight": -1}, {"weight_decay": -1}):
        with pytest.raises(UsageError, match="must not be negative"):
            LongClipObjective(**options)
    with pytest.raises(UsageError, match="between 1 and"):
        LongClipObjective(logit_scale=200.0)
    data["image"][2] = math.nan  # the loop names the step and the rows
    assert all(not torch.isfinite(v) for v in objective(model, data).values())


def test_pictures_and_captions_all_the_same_give_finite_gradients():
    model, objective, data = tiny_model(), LongClipObjective(components=3), batch()
    same_rows = {k: v[:1].expand_as(v).clone() for k, v in data.items()}
    losses = objective(model, same_rows)
    assert losses["long"].item() == pytest.approx(math.log(8), abs=1e-4)
    sum(losses.values()).backward()
    assert all(torch.isfinite(p.grad).all() for p in model.parameters() if p.grad is not None)


# ------------------------------------------------------------------------------------- the contract


def test_the_example_is_whole():
    made = example(0)
    outputs = made.run(**made.inputs)
    assert {k: tuple(v.shape) for k, v in outputs.items()} == dict(made.shapes)
    outputs[made.loss].backward()
    trained = {k: p for k, p in made.module.named_parameters() if p.requires_grad}
    assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in trained.values())
    assert sum(p.grad.abs().max() > 0 for p in trained.values()) > 0.9 * len(trained)
    part = made.run(**{k: v.flip(0) for k, v in made.inputs.items()})
    for name in ("image", "text", "text_short"):
        torch.testing.assert_close(part[name], outputs[name].flip(0), rtol=1e-5, atol=1e-5)


def test_the_claims_captions_tell_last_what_is_asked():
    made, again = framed.framed(3, 40), framed.framed(3, 40)
    assert np.array_equal(made.pixels_NSS3, again.pixels_NSS3)
    captions, shorts = made.long_captions(), made.short_captions()
    assert all(
        long.startswith(f"{short}. ") and long.count(". ") == 2 for long, short in zip(captions, shorts)
    )
    for n, colour in enumerate(made.late_colours().tolist()):
        assert captions[n].endswith(f"the frame is {framed.HALVES[made.late_N[n]]}-{framed.COLOURS[colour]}")
        assert made.long_captions(last=colour)[n] == captions[n]
    tokens = framed.tokens(captions, 64)
    # the second half is told beyond the claim's short context, so a truncated text cannot tell them
    assert (tokens != 0).sum(1).max() <= long_clip.stretched_length(16, keep=10)
    swapped = framed.tokens(made.long_captions(last=0), 16)
    assert np.array_equal(swapped, framed.tokens(captions, 16))
    with pytest.raises(UsageError, match="no word 'zebra'"):
        framed.tokens(["a zebra"], 8)


@pytest.mark.slow
def test_the_claim_shows_in_one_run():
    truncated, ours = run_claim("truncated", 0), run_claim("long-clip", 0)
    assert ours["late attribute, %"] > truncated["late attribute, %"] + 10
