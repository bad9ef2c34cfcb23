from __future__ import annotations

import json
import math
import sys
from itertools import pairwise

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import nn

import moviola
from moviola.clip.blocks import TowerOutput
from moviola.clip.config import ClipConfig, ResNetConfig, TextConfig, VitConfig
from moviola.clip.foreign_tokenizer import LibraryTokenizer
from moviola.clip.keys import Keys, Rule
from moviola.clip.loaded import Model
from moviola.clip.model import CLIP
from moviola.clip.native import read_native
from moviola.clip.vit import VisionTransformer
from moviola.data import tongues
from moviola.data.languages import LANGUAGES, language_columns
from moviola.parts.backbones.hf_text import HfTextConfig, HfTextTower
from moviola.parts.distillation import (
    DinoHead,
    cosine_ramp,
    encode_crops,
    linear_ramp,
    move_towards,
    moved_centre,
    self_distillation,
)
from moviola.systems.pretraining.rs_m_clip import (
    KEYS,
    TRAINING,
    Config,
    RsMClip,
    RsMClipObjective,
    run_claim,
    tiny,
    vit_b_32_xlm_r,
)
from moviola.training.objectives import Contrastive
from moviola.types import (
    CheckpointError,
    ClipBatch,
    Encoder,
    MissingExtra,
    PairObjective,
    PictureField,
    UsageError,
)

SMALL = {"local_crops": 3, "prototypes": 12, "hidden": 10, "bottleneck": 6}


@pytest.fixture(scope="module")
def oracle(oracles_dir):
    folder = oracles_dir / "27-rs-m-clip"
    return json.loads((folder / "a.json").read_text()), load_file(folder / "a.safetensors")


def part(data, prefix):
    return {k.removeprefix(prefix): v for k, v in data.items() if k.startswith(prefix)}


def same(got, wanted, name, tolerance):
    got, wanted = torch.as_tensor(got).double(), wanted.double()
    assert got.shape == wanted.shape, name
    worst = ((got - wanted).abs() / (1 + wanted.abs())).max()
    assert worst <= tolerance, f"{name}: {worst:.2e}"


def oracle_head(meta, data, whose):
    c = meta["config"]
    head = DinoHead(
        c["in_dim"], c["out_dim"], hidden=c["hidden"], bottleneck=c["bottleneck"], layers=c["nlayers"],
        batch_norm=c["use_bn"], fixed_norm=c["norm_last_layer"],
    )  # fmt: skip
    head.load_state_dict(part(data, f"param/{whose}_head."))
    return head.train(c["train_mode"])


DINO_KEYS = Keys(
    Rule("positional_embedding", "pos_embed"),
    Rule("class_embedding", "cls_token"),
    Rule("conv1.{rest}", "patch_embed.proj.{rest}"),
    Rule("transformer.resblocks.{n}.ln_1.{rest}", "blocks.{n}.norm1.{rest}"),
    Rule("transformer.resblocks.{n}.ln_2.{rest}", "blocks.{n}.norm2.{rest}"),
    Rule("transformer.resblocks.{n}.attn.in_proj_weight", "blocks.{n}.attn.qkv.weight"),
    Rule("transformer.resblocks.{n}.attn.in_proj_bias", "blocks.{n}.attn.qkv.bias"),
    Rule("transformer.resblocks.{n}.attn.out_proj.{rest}", "blocks.{n}.attn.proj.{rest}"),
    Rule("transformer.resblocks.{n}.mlp.c_fc.{rest}", "blocks.{n}.mlp.fc1.{rest}"),
    Rule("transformer.resblocks.{n}.mlp.c_proj.{rest}", "blocks.{n}.mlp.fc2.{rest}"),
    Rule("ln_post.{rest}", "norm.{rest}"),
)


def dino_tower(meta, data):
    """Our tower with DINO's differences: a bias on the patches, no norm before the blocks, no projection."""
    c, width = meta["config"]["vit"], meta["config"]["in_dim"]
    hidden = len(data["param/backbone.blocks.0.mlp.fc1.bias"])
    tower = VisionTransformer(
        VitConfig(c["img"], c["patch"], width, c["depth"], c["heads"], hidden / width), width, "gelu"
    )
    tower.conv1 = nn.Conv2d(3, width, c["patch"], c["patch"])
    tower.ln_pre = nn.Identity()
    state = DINO_KEYS.from_official(part(data, "param/backbone."))
    state["positional_embedding"] = state["positional_embedding"][0]
    state["class_embedding"] = state["class_embedding"].flatten()
    tower.load_state_dict(state | {"proj": torch.eye(width)})
    tower.resize_positions, tower.position_resizing = True, "dino"
    return tower.eval()


def text_tower(meta, data):
    c = meta["config"]["text"]
    positions = len(data["param/text_encoder.transformer.embeddings.position_embeddings.weight"])
    config = HfTextConfig(
        vocab_size=c["vocab"], width=c["width"], layers=c["layers"], heads=c["heads"], hidden=c["ffn"],
        positions=positions, context_length=c["len"], projection=c["proj"],
    )  # fmt: skip
    tower = HfTextTower(config, c["out"])
    tower.load_state_dict(part(data, "param/text_encoder."))
    return tower.eval()


def test_parity_of_every_output_and_gradient(oracle):
    """Head, loss, centre, schedules, crops and text tower against DINO and OpenCLIP; nothing left out."""
    meta, data = oracle
    c, tolerance = meta["config"], meta["tolerance"]
    student, teacher = oracle_head(meta, data, "student"), oracle_head(meta, data, "teacher")
    objective = DistillationOnly(meta, student, teacher, data["in/center0"])
    got, grads = {}, {}
    temperatures = [
        linear_ramp(e, c["warm_epochs"], c["warm_t"], c["teacher_temp"]) for e in range(c["nepochs"])
    ]
    got["teacher_temp_schedule"] = torch.tensor(temperatures, dtype=torch.float64)
    for k, epoch in enumerate(c["epochs"]):
        seen = data[f"in/step{k}_student_vectors"].clone().requires_grad_()
        shown = data[f"in/step{k}_teacher_vectors"]
        logits_K, target_K = student(seen), teacher(shown)
        got |= {f"step{k}_student_logits": logits_K.detach(), f"step{k}_teacher_logits": target_K.detach()}
        plain = self_distillation(
            logits_K.unflatten(0, (c["ncrops"], -1)), target_K.unflatten(0, (2, -1)), objective.centre,
            student_temperature=c["student_temp"], teacher_temperature=temperatures[epoch],
        ).mean()  # fmt: skip
        by_hand = moved_centre(objective.centre, target_K.detach(), c["center_momentum"])
        objective.step.fill_(epoch)
        views_BVD = seen.unflatten(0, (c["ncrops"], -1)).transpose(0, 1)
        loss = objective.distillation(views_BVD, shown.unflatten(0, (2, -1)).transpose(0, 1))
        torch.testing.assert_close(loss, plain)
        torch.testing.assert_close(by_hand, objective.centre)
        student.zero_grad()
        loss.backward()
        got |= {f"step{k}_loss": loss.detach(), f"step{k}_center_after": objective.centre}
        grads[f"step{k}_student_vectors"] = seen.grad
        if k == 0:
            grads |= {
                f"head.{n}": p.grad.clone() for n, p in student.named_parameters() if p.grad is not None
            }
    with torch.no_grad():
        tower = dino_tower(meta, data)
        views = (data["in/global_views"], data["in/local_views"])
        cls = [encode_crops(lambda x: tower(x).vector_BD, v.transpose(0, 1)).transpose(0, 1) for v in views]
        got["multicrop_cls"] = torch.cat(cls).flatten(0, 1)
        got["multicrop_logits"] = teacher(got["multicrop_cls"])
        text = text_tower(meta, data)
        tokens_NL = data["in/text_tokens"]
        real = (tokens_NL != 1).unsqueeze(-1)
        hidden = text.hidden_states(tokens_NL)
        got["text_pooled"], got["text_embed"] = text.pool(hidden, tokens_NL), text(tokens_NL)
        got["text_hidden"] = torch.where(real, hidden, data["out/text_hidden"])  # padding means nothing
        assert real.all(1).sum() < len(real)
    base, last, epochs, per_epoch = c["momentum_schedule_args(base,final,epochs,iters_per_epoch)"]
    steps = epochs * per_epoch
    momenta = [cosine_ramp(n, steps, base, last) for n in range(steps)]
    (peak, floor, epochs, per_epoch), more = c["lr_schedule_args"]
    warmup = more["warmup_epochs"] * per_epoch
    rates = [
        cosine_ramp(n, epochs * per_epoch, peak, floor, warmup=warmup) for n in range(epochs * per_epoch)
    ]
    got["momentum_schedule"] = torch.tensor(momenta, dtype=torch.float64)
    got["lr_schedule"] = torch.tensor(rates, dtype=torch.float64)

    assert set(got) == set(part(data, "out/"))
    assert set(grads) == set(part(data, "grad/"))
    for name, value in got.items():
        same(value, data[f"out/{name}"], name, 1e-12 if name.endswith("schedule") else tolerance)
    for name, value in grads.items():
        same(value, data[f"grad/{name}"], name, tolerance)


class DistillationOnly(RsMClipObjective):
    """The objective around given heads."""

    def __init__(self, meta, student, teacher, centre_1K):
        c = meta["config"]
        super().__init__(
            CLIP(clip_config()), centre_momentum=c["center_momentum"], student_temperature=c["student_temp"],
            teacher_temperature=c["teacher_temp"], teacher_temperature_start=c["warm_t"],
            teacher_warmup=c["warm_epochs"],
        )  # fmt: skip
        self.head, self.teacher_head, self.centre = student, teacher, centre_1K.clone()


# ------------------------------------------------------------------------------------------ blocks


@pytest.mark.parametrize(
    ("options", "names"),
    [
        ({}, {f"mlp.{n}.{k}" for n in (0, 2, 4) for k in ("weight", "bias")}),
        ({"layers": 1}, {"mlp.weight", "mlp.bias"}),
        ({"layers": 2}, {f"mlp.{n}.{k}" for n in (0, 2) for k in ("weight", "bias")}),
        (
            {"batch_norm": True},
            {f"mlp.{n}.{k}" for n in (0, 1, 3, 4, 6) for k in ("weight", "bias")}
            | {
                f"mlp.{n}.{k}" for n in (1, 4) for k in ("running_mean", "running_var", "num_batches_tracked")
            },
        ),
    ],
)
def test_heads_have_dinos_names(options, names):
    head = DinoHead(8, 20, hidden=12, bottleneck=6, **options)
    assert set(head.state_dict()) == names | {"last_layer.weight_g", "last_layer.weight_v"}
    assert head(torch.randn(5, 8)).abs().max() <= 1 + 1e-6  # cosines
    assert not head.last_layer.weight_g.requires_grad
    assert DinoHead(8, 20, fixed_norm=False).last_layer.weight_g.requires_grad


def test_the_loss_equals_its_pairs_written_out():
    torch.manual_seed(0)
    student, teacher, centre = torch.randn(5, 3, 11), torch.randn(2, 3, 11), torch.randn(11)
    got = self_distillation(student, teacher, centre, student_temperature=0.2, teacher_temperature=0.3)
    terms = [
        -(((teacher[q] - centre) / 0.3).softmax(-1) * (student[v] / 0.2).log_softmax(-1)).sum(-1)
        for q in range(2)
        for v in range(5)
        if v != q
    ]
    assert len(terms) == 2 * (3 + 1)  # two large views and three small: 2 * (L + 1)
    torch.testing.assert_close(got, torch.stack(terms).mean(0))


def test_schedules_at_their_ends():
    assert [linear_ramp(n, 3, 0.0, 1.0) for n in range(5)] == [0, 0.5, 1, 1, 1]
    assert (linear_ramp(0, 1, 0.2, 1.0), linear_ramp(1, 1, 0.2, 1.0), linear_ramp(0, 0, 0.2, 1.0)) == (
        0.2,
        1,
        1,
    )
    assert cosine_ramp(0, 10, 0.9, 1.0) == pytest.approx(0.9)
    assert cosine_ramp(10, 10, 0.9, 1.0) == cosine_ramp(99, 10, 0.9, 1.0) == 1.0


def test_a_moving_average_moves_weights_and_statistics():
    a, b = (
        nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4)),
        nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4)),
    )
    b(torch.randn(6, 3))
    before = {k: v.clone() for k, v in a.state_dict().items()}
    move_towards(a, b, 0.7, buffers=False)
    assert torch.equal(a[1].running_mean, before["1.running_mean"])
    torch.testing.assert_close(a[0].weight, 0.7 * before["0.weight"] + 0.3 * b[0].weight)
    move_towards(a, b, 0.7)
    torch.testing.assert_close(a[1].running_mean, 0.7 * before["1.running_mean"] + 0.3 * b[1].running_mean)
    assert a[1].num_batches_tracked == 1
    with pytest.raises(CheckpointError, match=r"2\.weight"):
        move_towards(nn.Sequential(*a, nn.Linear(4, 4)), b, 0.5)
    with pytest.raises(CheckpointError, match=r"0\.weight"):
        move_towards(nn.Sequential(nn.Linear(5, 4), a[1]), b, 0.5)
    with pytest.raises(UsageError, match=r"1\.5"):
        move_towards(a, b, 1.5)


# -------------------------------------------------------------------------------------- text tower


def text_config(**changes):
    return HfTextConfig(
        **{"vocab_size": 40, "width": 16, "layers": 2, "heads": 2, "hidden": 24, "positions": 82, **changes}
    )


def test_padding_does_not_change_a_text():
    torch.manual_seed(0)
    tower = HfTextTower(text_config(), 12).eval()
    lengths = [3, 60, 5, 77, *([4, 30] * 40)]
    tokens_NL = torch.full((len(lengths), 77), 1)
    for row_L, length in zip(tokens_NL, lengths, strict=True):
        row_L[:length] = torch.randint(3, 40, (length,))
    with torch.no_grad():
        together = tower(tokens_NL)
        for row, length in enumerate(lengths[:6]):
            alone = tower(tokens_NL[row : row + 1, :length])[0]
            torch.testing.assert_close(together[row], alone, rtol=1e-5, atol=1e-5)
    assert tower(tokens_NL[:0]).shape == (0, 12)


@pytest.mark.parametrize("pooling", ["mean", "max", "first"])
@pytest.mark.parametrize("projection", ["mlp", "linear", "none"])
def test_poolings_and_projections(pooling, projection):
    tower = HfTextTower(text_config(pooling=pooling, projection=projection), 16).eval()
    tokens_NL = torch.tensor([[0, 7, 9, 2, 1, 1]])
    with torch.no_grad():
        x_1LD = tower.hidden_states(tokens_NL)
        wanted = {"mean": x_1LD[:, :4].mean(1), "max": x_1LD[:, :4].amax(1), "first": x_1LD[:, 0]}[pooling]
        torch.testing.assert_close(tower.pool(x_1LD, tokens_NL), wanted)
        torch.testing.assert_close(tower(tokens_NL), tower.proj(wanted), rtol=1e-5, atol=1e-5)
    names = {n for n in tower.state_dict() if n.startswith("proj")}
    assert (
        names
        == {"mlp": {"proj.0.weight", "proj.2.weight"}, "linear": {"proj.weight"}, "none": set()}[projection]
    )


def test_without_the_library_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(MissingExtra, match=r"moviola\[hf\]"):
        HfTextTower(text_config(), 12)


def test_bad_texts_are_refused():
    tower = HfTextTower(text_config(), 12)
    with pytest.raises(UsageError, match="row 1"):
        tower(torch.tensor([[0, 5, 2], [1, 1, 1]]))
    with pytest.raises(UsageError, match="at most 77"):
        tower(torch.zeros(1, 78, dtype=torch.long))
    with pytest.raises(UsageError, match="81 tokens"):
        HfTextTower(text_config(context_length=81), 12)
    with pytest.raises(UsageError, match="16"):
        HfTextTower(text_config(projection="none"), 12)


# ------------------------------------------------------------------------------------------- model


def official_names():
    block = [
        "attn.in_proj_weight", "attn.in_proj_bias", "attn.out_proj.weight", "attn.out_proj.bias",
        "ln_1.weight", "ln_1.bias", "ln_2.weight", "ln_2.bias",
        "mlp.c_fc.weight", "mlp.c_fc.bias", "mlp.c_proj.weight", "mlp.c_proj.bias",
    ]  # fmt: skip
    names = {"logit_scale", "visual.class_embedding", "visual.positional_embedding", "visual.proj"}
    names |= {"visual.conv1.weight", "text.proj.0.weight", "text.proj.2.weight"}
    names |= {f"visual.{norm}.{k}" for norm in ("ln_pre", "ln_post") for k in ("weight", "bias")}
    names |= {f"visual.transformer.resblocks.{n}.{p}" for n in range(12) for p in block}
    text = "text.transformer.embeddings."
    names |= {f"{text}{kind}_embeddings.weight" for kind in ("word", "position", "token_type")}
    names |= {f"{text}LayerNorm.{k}" for k in ("weight", "bias")}
    parts = [f"attention.self.{p}" for p in ("query", "key", "value")]
    parts += ["attention.output.dense", "attention.output.LayerNorm", "intermediate.dense"]
    parts += ["output.dense", "output.LayerNorm"]
    layers = [f"text.transformer.encoder.layer.{n}.{p}" for n in range(12) for p in parts]
    return names | {f"{layer}.{k}" for layer in layers for k in ("weight", "bias")}


def test_keys_read_the_full_official_list():
    with torch.device("meta"):
        model = RsMClip(vit_b_32_xlm_r())
    state = model.state_dict()
    official = KEYS.to_official(state)
    assert set(official) == official_names()
    shapes = {k: tuple(v.shape) for k, v in official.items()}
    assert shapes["text.transformer.embeddings.word_embeddings.weight"] == (250002, 768)
    assert shapes["text.transformer.embeddings.position_embeddings.weight"] == (514, 768)
    assert (shapes["text.proj.0.weight"], shapes["text.proj.2.weight"]) == ((640, 768), (512, 640))
    assert shapes["visual.positional_embedding"] == (50, 768)
    old = {name: torch.zeros(1) for name in ("embeddings.position_ids", "pooler.dense.weight")}
    back = KEYS.from_official(official | {f"text.transformer.{k}": v for k, v in old.items()})
    assert set(back) == set(state)
    assert sum(v.numel() for v in state.values()) == pytest.approx(366e6, rel=0.01)


@pytest.mark.parametrize("projection", ["mlp", "linear", "none"])
def test_reads_official_checkpoints_by_their_shapes(projection):
    embed = 64 if projection == "none" else 48
    text = text_config(width=64, heads=1, projection=projection)
    config = Config(embed, VitConfig(24, 8, 64, 2, 1), text)
    source = RsMClip(config).eval()
    state = KEYS.to_official(source.state_dict())
    state["logit_scale"] = state["logit_scale"].reshape(1)
    got = RsMClip.from_official(state | {"text.transformer.embeddings.position_ids": torch.arange(9)})
    assert isinstance(got, RsMClip)
    assert got.config == config
    assert not got.training
    for name, tensor in source.state_dict().items():
        assert torch.equal(got.state_dict()[name], tensor), name
    with pytest.raises(CheckpointError, match=r"visual\.proj"):
        RsMClip.from_official({k: v for k, v in state.items() if k != "visual.proj"})
    with pytest.raises(CheckpointError, match=r"ln_post\.bias"):
        RsMClip.from_official({k: v for k, v in state.items() if k != "visual.ln_post.bias"})
    with pytest.raises(CheckpointError, match=r"visual\.extra"):
        RsMClip.from_official({**state, "visual.extra": torch.zeros(1)})


def word_tokenizer(context_length=8):
    """A tiny Unigram tokenizer.json of XLM-R's make."""
    pieces = [("<s>", 0.0), ("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -3.0)]
    pieces += [(f"▁{w}", -2.0) for w in ("a", "plane", "avião", "um", "Ship", "here")]
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    specials = [{"id": n, "content": name, **flags} for n, (name, _) in enumerate(pieces[:4])]
    marks = {name: {"id": name, "ids": [n], "tokens": [name]} for name, n in (("<s>", 0), ("</s>", 2))}
    template = [{"SpecialToken": {"id": "<s>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}]
    template.append({"SpecialToken": {"id": "</s>", "type_id": 0}})
    space = {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "always", "split": True}
    post = {"type": "TemplateProcessing", "single": template, "pair": template, "special_tokens": marks}
    model = {"type": "Unigram", "unk_id": 3, "vocab": [list(p) for p in pieces], "byte_fallback": False}
    content = {"version": "1.0", "truncation": None, "padding": None, "added_tokens": specials}
    content |= {"normalizer": None, "pre_tokenizer": space, "post_processor": post, "decoder": space}
    return LibraryTokenizer(content | {"model": model}, context_length=context_length)


def test_is_an_encoder_and_keeps_its_tokenizer_in_its_folder(tmp_path):
    torch.manual_seed(0)
    module = RsMClip(tiny()).eval()
    assert isinstance(module, Encoder)
    tokenizer = word_tokenizer()
    config = module.config.to_json()
    model = Model(
        module, config=config, recipe=module.recipe, tokenizer=tokenizer, system="rs-m-clip", device="cpu"
    )
    texts = ["um avião", "a plane here", "a Ship"] * 30
    vectors = model.embed_texts(texts)
    assert vectors.shape == (90, 16)
    np.testing.assert_allclose(vectors[1], model.embed_texts(texts[1])[0], atol=1e-5)
    native = read_native(model.save(tmp_path / "model"))
    assert isinstance(native.tokenizer, LibraryTokenizer)
    assert (native.tokenizer.hash, native.tokenizer.pad_id) == (tokenizer.hash, 1)
    assert native.recipe.context_length == 8
    np.testing.assert_array_equal(native.tokenizer(texts), tokenizer(texts))
    again = RsMClip.from_config(json.loads(json.dumps(native.config)))
    again.load_state_dict(native.state)
    assert again.config == module.config
    frames = torch.randn(2, 3, 3, 16, 16)
    mask = torch.tensor([[True, True, False], [True, True, True]])
    video = module.encode_video(ClipBatch(frames, torch.zeros(2, 3), mask))
    wanted = F.normalize(module.encode_image(frames[0, :2]), dim=-1).mean(0)
    torch.testing.assert_close(video[0], wanted)
    assert module.recipe.size == (16, 16)


def test_load_knows_the_official_file_by_its_names(tmp_path):
    source = RsMClip(
        Config(
            48, VitConfig(24, 8, 64, 2, 1), text_config(width=64, heads=1, positions=40, context_length=38)
        )
    )
    weights = tmp_path / "open_clip_model.safetensors"
    save_file(KEYS.to_official(source.state_dict()), weights)
    word_tokenizer().save(tmp_path)
    model = moviola.load(weights, tokenizer=tmp_path / "tokenizer.json", device="cpu")
    assert (model.system, model.recipe.size, model.recipe.context_length) == ("rs-m-clip", (24, 24), 38)
    source.eval()
    with torch.no_grad():
        wanted = F.normalize(source.encode_text(torch.tensor([[0, 5, 6, 2]])), dim=-1)
    torch.testing.assert_close(torch.from_numpy(model.embed_texts("a plane")), wanted, rtol=0, atol=1e-5)
    about = {"model_cfg": {"vision_cfg": {}, "text_cfg": {"hf_model_name": "xlm-roberta-base"}}}
    (tmp_path / "open_clip_config.json").write_text(json.dumps(about))
    assert moviola.load(tmp_path, device="cpu").hash == model.hash  # the folder as the hub has it


def test_a_tokenizer_with_another_padding_is_refused():
    module = RsMClip(tiny())
    clip = CLIP(clip_config())
    with pytest.raises(CheckpointError, match="padding"):
        Model(clip, config=clip.config.to_json(), tokenizer=word_tokenizer(), device="cpu")
    small = RsMClip(
        Config(16, module.config.vision, text_config(vocab_size=5, positions=12, context_length=8))
    )
    with pytest.raises(CheckpointError, match="knows 5 tokens"):
        Model(small, config={}, recipe=small.recipe, tokenizer=word_tokenizer(), device="cpu")


# --------------------------------------------------------------------------------------- objective


def clip_config():
    return ClipConfig(
        16, VitConfig(image_size=16, patch_size=4, width=16, layers=1, heads=2),
        TextConfig(context_length=8, vocab_size=32, width=16, layers=1, heads=2),
    )  # fmt: skip


def batch_for(objective, count=6, seed=0, pad=1):
    generator = torch.Generator().manual_seed(seed)
    made = {"row": torch.arange(count), "id": [str(n) for n in range(count)]}
    for f in objective.needs.fields:
        if isinstance(f, PictureField):
            height, width = f.size or (16, 16)
            made[f.name] = torch.randn(count, f.count, 3, height, width, generator=generator)
    tokens_BL = torch.randint(3, 31, (count, 8), generator=generator)
    tokens_BL[:, 5] = 31
    tokens_BL[:, 6:] = pad
    return made | {"text": tokens_BL}


MODELS = {"clip": lambda: CLIP(clip_config()), "rs-m-clip": lambda: RsMClip(tiny())}


def made(kind, seed=0, **options):
    torch.manual_seed(seed)
    model = MODELS[kind]()
    return model, TRAINING.objective(model, **{**SMALL, **options})


def optimizer_for(model, objective):
    return torch.optim.AdamW(list(objective.param_groups(model)), lr=3e-3)


def step(model, objective, optimizer, batch):
    losses = objective(model, batch)
    torch.stack(list(losses.values())).sum().backward()
    optimizer.step()
    optimizer.zero_grad()
    objective.after_step(model)
    return {k: v.item() for k, v in losses.items()}


def test_asks_for_its_crops_and_captions():
    _, objective = made("clip")
    assert isinstance(objective, PairObjective)
    large, small, text = objective.needs.fields
    assert (large.name, large.count, large.size, large.area) == ("image", 2, None, (0.4, 1.0))
    assert (small.name, small.count, small.size, small.area) == ("local", 3, (8, 8), (0.05, 0.4))
    assert text.columns == ("caption*", "text")
    with torch.device("meta"):
        b32 = nn.Module()
        b32.visual = VisionTransformer(VitConfig(), 512, "gelu")
        b32.dim = 512
    assert RsMClipObjective(b32).needs.fields[1].size == (96, 96)  # DINO's 96 of 224


@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize(
    "options", [{}, {"batch_norm": True}, {"local_crops": 0}, {"global_crops_contrasted": 1}]
)
def test_trains(kind, options):
    model, objective = made(kind, **options)
    objective.train()
    batch = batch_for(objective, pad=model.pad_id if kind == "rs-m-clip" else 0)
    optimizer = optimizer_for(model, objective)
    losses = [step(model, objective, optimizer, batch) for _ in range(40)]
    assert losses[-1]["contrastive"] < 0.5 * losses[0]["contrastive"]
    # a new head starts with one answer for all; its loss rises while the centre undoes that, then falls
    taught = [loss["distillation"] for loss in losses]
    assert taught[-1] < 0.9 * max(taught)
    assert objective.step == 40
    assert objective.centre.abs().max() > 0


@pytest.mark.parametrize("kind", MODELS)
def test_two_halves_of_a_batch_give_the_whole(kind):
    """What gradient caching relies on: values and gradients of outputs in parts, then one loss."""
    results = []
    for cuts in ((0, 6), (0, 2, 6)):
        model, objective = made(kind, batch_norm=True)
        model.eval(), objective.train()
        batch = batch_for(objective)
        parts = [objective.outputs(model, {k: v[a:b] for k, v in batch.items()}) for a, b in pairwise(cuts)]
        whole = {k: torch.cat([p[k] for p in parts]) if v.ndim else v for k, v in parts[0].items()}
        losses = objective.loss(model, whole)
        torch.stack(list(losses.values())).sum().backward()
        named = dict(nn.ModuleDict({"model": model, "objective": objective}).named_parameters())
        grads = {k: p.grad for k, p in named.items() if p.grad is not None}
        results.append((losses, grads, objective.centre))
    (a, grad_a, centre_a), (b, grad_b, centre_b) = results
    for name in a:
        torch.testing.assert_close(a[name], b[name], rtol=1e-5, atol=1e-5)
    assert set(grad_a) == set(grad_b)
    for name in grad_a:
        torch.testing.assert_close(grad_a[name], grad_b[name], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(centre_a, centre_b)
    assert whole["teacher"].grad_fn is None


def test_prototypes_in_parts_equal_the_whole(monkeypatch):
    results = []
    for size in (1 << 26, 1):
        monkeypatch.setattr("moviola.systems.pretraining.rs_m_clip._PART", size)
        model, objective = made("clip")
        losses = objective(model, batch_for(objective))
        losses["distillation"].backward()
        results.append(
            (losses["distillation"], objective.centre, [p.grad for p in objective.head.parameters()])
        )
    (a, centre_a, grads_a), (b, centre_b, grads_b) = results
    torch.testing.assert_close(a, b)
    torch.testing.assert_close(centre_a, centre_b)
    for x, y in zip(grads_a, grads_b, strict=True):
        torch.testing.assert_close(x, y)


def test_the_teacher_follows_and_gets_no_gradient():
    model, objective = made("clip", momentum=0.7)
    grouped = {id(p) for group in objective.param_groups(model) for p in group["params"]}
    frozen = [*objective.teacher.parameters(), *objective.teacher_head.parameters()]
    assert frozen
    assert not grouped & {id(p) for p in frozen}
    assert {id(p) for p in objective.head.mlp.parameters()} <= grouped
    before = [p.clone() for p in frozen]
    optimizer = optimizer_for(model, objective)
    step(model, objective, optimizer, batch_for(objective))
    assert all(p.grad is None for p in frozen)
    students = [*model.visual.parameters(), *objective.head.parameters()]
    for old, new, student in zip(before, frozen, students, strict=True):
        torch.testing.assert_close(new, 0.7 * old + 0.3 * student)


def test_the_distillation_never_reaches_the_text_tower():
    model, objective = made("rs-m-clip")
    objective(model, batch_for(objective))["distillation"].backward()
    assert all(p.grad is None for p in model.text.parameters())
    assert model.logit_scale.grad is None
    assert all(p.grad is not None for p in model.visual.parameters())


def test_without_distillation_it_is_plain_clip():
    model, objective = made("clip", distillation_weight=0.0, global_crops_contrasted=1)
    assert [f.name for f in objective.needs.fields] == ["image", "text"]
    plain, contrastive = made("clip")[0], Contrastive()
    a, b = (
        torch.optim.SGD(list(o.param_groups(m)), lr=0.1)
        for m, o in ((model, objective), (plain, contrastive))
    )
    for seed in range(3):
        batch = batch_for(objective, seed=seed, pad=0)
        step(model, objective, a, batch)
        step(plain, contrastive, b, {**batch, "image": batch["image"][:, 0]})
    for name, tensor in plain.state_dict().items():
        torch.testing.assert_close(model.state_dict()[name], tensor, rtol=0, atol=1e-6)


def test_momentum_and_temperature_schedules():
    _, objective = made("clip", momentum=0.9, momentum_end=1.0, momentum_steps=10)
    assert objective.momentum_at(5) == pytest.approx(0.95)
    assert made("clip")[1].momentum_at(7) == 0.996
    model, objective = made("clip", momentum_end=1.0)
    with pytest.raises(UsageError, match="momentum_steps"):
        objective.after_step(model)
    assert objective.lr_factors(0, 20) is None
    objective.after_step(model)
    assert objective.momentum_at(20) == 1.0


def test_a_killed_run_goes_on_alike():
    """The teacher, the centre and the step are in the objective's state."""
    options = {
        "momentum_end": 1.0,
        "momentum_steps": 9,
        "teacher_temperature_start": 0.09,
        "teacher_warmup": 5,
    }
    model, objective = made("clip", batch_norm=True, **options)
    optimizer = optimizer_for(model, objective)
    for n in range(3):
        step(model, objective, optimizer, batch_for(objective, seed=n))
    kept = [{k: v.clone() for k, v in m.state_dict().items()} for m in (model, objective)]
    moments = json.loads(json.dumps(optimizer.state_dict()["param_groups"])), optimizer.state_dict()["state"]
    moments = {
        "param_groups": moments[0],
        "state": {k: {n: t.clone() for n, t in s.items()} for k, s in moments[1].items()},
    }
    wanted = [step(model, objective, optimizer, batch_for(objective, seed=n)) for n in range(3, 6)]
    again, other = made("clip", seed=9, batch_norm=True, **options)
    again.load_state_dict(kept[0])
    other.load_state_dict(kept[1])
    optimizer = optimizer_for(again, other)
    optimizer.load_state_dict(moments)
    got = [step(again, other, optimizer, batch_for(other, seed=n)) for n in range(3, 6)]
    assert got == wanted
    assert torch.equal(other.centre, objective.centre)


class Colours(nn.Module):
    """A tower that sees nothing but the mean colour."""

    config = VitConfig(image_size=16, patch_size=4)

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(3, 16)

    def forward(self, x_BCHW):
        vector_BD = self.linear(x_BCHW.mean((2, 3)))
        return TowerOutput(vector_BD, vector_BD[:, None])


def teacher_after(centre_momentum, steps=200):
    """The teacher on flat pictures of four colours: entropy of its mean answer, and of each, over log K."""
    torch.manual_seed(1)
    model = CLIP(clip_config())
    model.visual = Colours()
    sizes = {"local_crops": 2, "prototypes": 16, "hidden": 32, "bottleneck": 8}
    objective = RsMClipObjective(model, momentum=0.99, centre_momentum=centre_momentum, **sizes)
    flat = torch.tensor([[1.0, -1, -1], [-1, 1, -1], [-1, -1, 1], [1, 1, 1]]).repeat(4, 1)[
        :, None, :, None, None
    ]
    optimizer = torch.optim.AdamW([*model.visual.parameters(), *objective.head.parameters()], lr=1e-2)
    for seed in range(steps):
        batch = batch_for(objective, count=16, seed=seed)
        batch |= {k: flat + 0.1 * batch[k] for k in ("image", "local")}
        made = objective.outputs(model, batch)
        views_BVD = torch.cat([made["image"], made["local"]], 1)
        objective.distillation(views_BVD, made["teacher"]).backward()
        optimizer.step()
        optimizer.zero_grad()
        objective.after_step(model)
    with torch.no_grad():
        logits = objective.teacher_head(made["teacher"].flatten(0, 1))
        answers = ((logits - objective.centre) / 0.04).softmax(-1)

    def entropy(p):
        return float(-(p * p.clamp_min(1e-12).log()).sum(-1).mean() / math.log(16))

    return entropy(answers.mean(0)), entropy(answers)


def test_without_centring_all_pictures_get_one_answer():
    """The collapse that the centre guards against: the mean answer has no entropy left."""
    mean, each = teacher_after(1.0)  # the centre stays at 0
    assert mean < 0.05
    mean, each = teacher_after(0.9)
    assert mean > 0.5
    assert each < 0.7 * mean  # and what is left tells pictures apart


def test_a_residual_tower_works_without_small_crops():
    torch.manual_seed(0)
    model = CLIP(ClipConfig(16, ResNetConfig(32, 8, (1, 1, 1, 1), 4), clip_config().text))
    objective = RsMClipObjective(model, **{**SMALL, "local_crops": 0})
    batch = batch_for(objective, pad=0)
    batch["image"] = torch.randn(6, 2, 3, 32, 32)
    model.train(), objective.train()
    optimizer = optimizer_for(model, objective)
    before = objective.teacher.bn1.running_mean.clone()
    step(model, objective, optimizer, batch)
    assert not objective.teacher.training
    moved = 0.996 * before + 0.004 * model.visual.bn1.running_mean
    torch.testing.assert_close(objective.teacher.bn1.running_mean, moved)


BAD = {
    "size": ({"local_size": 6}, "patch of 4, got 6"),
    "momentum": ({"momentum": 1.2}, r"momentum from 0 to 1, got 1\.2"),
    "end": ({"momentum_end": -0.1}, "momentum_end"),
    "centre": ({"centre_momentum": 2}, "centre_momentum"),
    "student temperature": ({"student_temperature": 0}, "student_temperature .* got 0"),
    "teacher temperature": ({"teacher_temperature": -1}, "teacher_temperature .* got -1"),
    "weight": ({"distillation_weight": -1}, "distillation_weight .* got -1"),
    "contrasted": ({"global_crops_contrasted": 3}, "global_crops_contrasted from 1 to 2"),
    "crops": ({"local_crops": -1}, "local_crops.* got -1"),
    "prototypes": ({"prototypes": 1}, "at least 2 prototypes"),
    "layers": ({"head_layers": 0}, "0 layers"),
    "decay": ({"weight_decay": -1}, "weight_decay"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_options(name):
    options, said = BAD[name]
    with pytest.raises(UsageError, match=said):
        RsMClipObjective(CLIP(clip_config()), **options)


def test_bad_models_and_batches():
    with pytest.raises(UsageError, match="visual"):
        RsMClipObjective(nn.Linear(2, 2))
    with pytest.raises(UsageError, match="visual"):
        RsMClipObjective()
    model, objective = made("clip")
    batch = batch_for(objective)
    with pytest.raises(UsageError, match="two large crops"):
        objective(model, {**batch, "image": batch["image"][:, 0]})
    with pytest.raises(UsageError, match="twice in one batch"):
        objective(model, {**batch, "row": torch.tensor([0, 1, 2, 3, 4, 1])})
    with pytest.raises(UsageError, match="at least two student views"):
        self_distillation(torch.zeros(1, 2, 4), torch.zeros(1, 2, 4), torch.zeros(4))


# ------------------------------------------------------------------------------ captions and claim


def test_captions_of_many_languages_become_columns():
    columns = language_columns({"en": ["a plane", "a ship"], "pt": ["um avião", "um navio"]})
    assert columns == {"caption": ["a plane", "a ship"], "caption_pt": ["um avião", "um navio"]}
    assert len(LANGUAGES) == 10
    for bad, said in (
        ({"en": ["a", "b"], "fr": ["c"]}, "'fr': 1"),
        ({"xx": ["a"]}, "xx"),
        ({}, "none"),
        ({"en": ["a"], "de": [" "]}, "'de' are empty, the first in row 0"),
    ):
        with pytest.raises(UsageError, match=said):
            language_columns(bad)


def test_the_made_languages_are_consistent():
    scenes = tongues.two_things(3, 40)
    again = tongues.two_things(3, 40)
    assert np.array_equal(scenes.pixels_NSS3, again.pixels_NSS3)
    assert not np.array_equal(scenes.thing_NT, tongues.two_things(3, 40, split=1).thing_NT)
    english = [text.split() for text in tongues.captions(scenes, "en")]
    own = [text.split() for text in tongues.captions(scenes, "la")]
    words = {}
    for a, b in zip(english, own, strict=True):
        c0, s0, c1, s1 = a[1], a[2], a[5], a[6]
        for source, target in zip((a[0], s0, c0, a[3], a[4], s1, c1, a[7], a[8]), b, strict=True):
            assert words.setdefault(source, target) == target
    assert 0 < sum(a == b for a, b in words.items()) < len(words) / 2
    assert tongues.tokens(tongues.captions(scenes, "lc")).max() == tongues.vocabulary_size() - 1
    distinct = tongues.two_things(0, 500, distinct=True)
    shown = {
        (*sorted(pair), g)
        for pair, g in zip(distinct.thing_NT.tolist(), distinct.ground_N.tolist(), strict=True)
    }
    assert len(shown) == 500
    with pytest.raises(UsageError, match="zz"):
        tongues.captions(scenes, "zz")


@pytest.mark.slow
def test_the_claim_shows_in_one_short_run():
    english, ours = run_claim("clip", 0), run_claim("rs-m-clip", 0)
    assert ours["R@1, other languages"] > english["R@1, other languages"] + 20
    assert ours["R@1, English"] > 20
