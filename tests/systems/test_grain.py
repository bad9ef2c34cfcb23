from __future__ import annotations

import copy
import json
import math
from dataclasses import replace
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file

from moviola.clip.config import ClipConfig, ResNetConfig, TextConfig, VitConfig
from moviola.clip.model import CLIP
from moviola.data import described as world
from moviola.parts.boxes import cxcywh_to_xyxy, match_boxes, paired_giou, shares_of_picture
from moviola.systems.pretraining.grain import (
    KEYS,
    TRAINING,
    Grain,
    GrainConfig,
    GrainObjective,
    run_claim,
    tiny,
    vit_l_14,
    vit_s_16,
)
from moviola.types import CheckpointError, ClipBatch, Encoder, PairObjective, Refusal, RegionField, UsageError


def cases(folder):
    return sorted(path.stem for path in folder.glob("*.json"))


@pytest.fixture(scope="module")
def oracles(oracles_dir):
    folder = oracles_dir / "61-grain"
    return {
        name: (json.loads((folder / f"{name}.json").read_text()), load_file(folder / f"{name}.safetensors"))
        for name in cases(folder)
    }


def parameters(data):
    return {k.removeprefix("param/"): v for k, v in data.items() if k.startswith("param/")}


def oracle_model(meta, data):
    c = meta["config"]
    ratio = len(data["param/clip.visual.blocks.0.mlp.fc1.weight"]) / c["vw"]
    vision = VitConfig(c["img"], c["patch"], c["vw"], c["vdepth"], c["vheads"], mlp_ratio=ratio)
    text = TextConfig(c["ctx"], c["vocab"], c["tw"], c["tlayers"], c["theads"])
    embed_dim = data["param/decoder.img_proj"].shape[1]
    sizes = {"layers": c["dec"], "heads": c["heads"], "hidden": c["ffn"]}
    config = GrainConfig(ClipConfig(embed_dim, vision, text), regions=c["queries"], width=c["d"], **sizes)
    inferred = Grain.from_official(parameters(data)).config  # all but head counts that are not the authors'
    heads = replace(inferred.clip, text=replace(inferred.clip.text, heads=c["theads"]))
    assert replace(inferred, heads=c["heads"], clip=heads) == config
    return Grain.from_official(parameters(data), config)


def oracle_batch(meta, data):
    scale = meta["config"]["img"] / 224  # its boxes are pixels of a picture of 224
    return {
        "image": data["in/image"].clone().requires_grad_(),
        "text": data["in/text"],
        "boxes": data["in/boxes"] * scale,
        "region_text": data["in/desc"],
        "region_mask": data["in/available"] > 0,
    }


def oracle_objective(meta):
    c = meta["config"]
    return GrainObjective(box_weight=c["w_bbox"], giou_weight=c["w_giou"], region_weight=c["w_word"])


def same(got, wanted, name, tolerance):
    assert tuple(got.shape) == tuple(wanted.shape), name
    worst = ((got.double() - wanted.double()).abs() / (1 + wanted.double().abs())).max()
    assert worst <= tolerance, f"{name}: {worst:.2e}"


def test_parity_of_every_output(oracles):
    """All out/* tensors of the authors' code, and nothing left uncompared."""
    assert oracles
    for meta, data in oracles.values():
        model, objective, batch = oracle_model(meta, data), oracle_objective(meta), oracle_batch(meta, data)
        outputs = objective.outputs(model, batch)
        losses = objective.loss(model, outputs)
        tokens = model.clip.visual(batch["image"]).tokens_BLD
        states = model.decoder.states(tokens)
        decoded = model.decoder(tokens)
        theirs = parameters(data)
        scale = model.logit_scale.exp()
        valid = outputs["valid_BM"]
        matched = match_boxes(decoded.boxes_BR4, outputs["boxes_BM4"], valid, epsilon=1e-4)
        available = outputs["available_BM"]
        got = {
            "tokens": tokens,
            "region_embed": decoded.regions_BRE,
            "image_query_embed": model.encode_image(batch["image"]),
            "text_embed": model.encode_text(batch["text"]),
            "desc_embed": model.encode_text(batch["region_text"][available]),
            "pred_boxes": decoded.boxes_BR4,
            "pred_logits": F.linear(
                states[-1][:, :-1], theirs["decoder.class_embed.weight"], theirs["decoder.class_embed.bias"]
            ),
            "loss_clip": losses["contrastive"],
            "loss_box_total": losses["box"],
            "loss_word": losses["region"] / meta["config"]["w_word"],
            "loss_total": sum(losses.values()),
            "clip_acc": 100
            * ((outputs["image"] @ outputs["text"].T).argmax(1) == torch.arange(len(tokens))).float().mean(),
        }
        for n in range(len(states) - 1):
            got[f"aux{n}_pred_boxes"] = model.decoder.boxes(states[n])
        only = {"l1": GrainObjective(giou_weight=0), "giou": GrainObjective(box_weight=0)}
        got["loss_bbox"] = only["l1"].loss(model, outputs)["box"] / 1.5
        got["loss_giou"] = only["giou"].loss(model, outputs)["box"] / 1.5
        rows, right = [], []
        for b, row in enumerate(matched):
            boxes = valid[b].nonzero()[:, 0]
            pairs = sorted((int(row[m]), place) for place, m in enumerate(boxes.tolist()) if row[m] >= 0)
            got[f"match_{b}"] = torch.tensor(pairs).reshape(-1, 2).T
            for query, place in pairs:
                rows.append(outputs["regions_BRE"][b, query])
                right.append(int(available[:b].sum() + available[b, : boxes[place]].sum()))
        said = (torch.stack(rows) @ outputs["described_BME"][available].T * scale).argmax(1)
        got["word_acc"] = 100 * (said == torch.tensor(right)).float().mean()
        assert set(got) == {name.removeprefix("out/") for name in data if name.startswith("out/")}
        for name, value in got.items():
            same(value, data[f"out/{name}"], name, meta["tolerance"])


def test_parity_of_every_gradient(oracles):
    for meta, data in oracles.values():
        model, batch = oracle_model(meta, data), oracle_batch(meta, data)
        sum(oracle_objective(meta)(model, batch).values()).backward()
        grads = KEYS.to_official({k: p.grad for k, p in model.named_parameters() if p.grad is not None})
        grads["image"] = batch["image"].grad
        wanted = [name for name in data if name.startswith("grad/")]
        assert wanted
        for name in wanted:
            same(grads[name.removeprefix("grad/")], data[name], name, meta["tolerance"])


# --------------------------------------------------------------------------------------------------
# Names
# --------------------------------------------------------------------------------------------------


def official_names(layers):
    clip = ["positional_embedding", "image_projection", "text_projection", "logit_scale"]
    clip += ["token_embedding.weight", "ln_final.weight", "ln_final.bias", "visual.cls_token"]
    clip += ["visual.pos_embed", "visual.patch_embed.proj.weight", "visual.patch_embed.proj.bias"]
    clip += ["visual.norm.weight", "visual.norm.bias"]
    both = ("weight", "bias")
    text = ["attn.in_proj_weight", "attn.in_proj_bias"]
    text += [f"{p}.{k}" for p in ("attn.out_proj", "ln_1", "ln_2", "mlp.c_fc", "mlp.c_proj") for k in both]
    clip += [f"transformer.resblocks.{n}.{part}" for n in range(12) for part in text]
    parts = ("norm1", "norm2", "attn.qkv", "attn.proj", "attn.q_norm", "attn.k_norm", "mlp.fc1", "mlp.fc2")
    clip += [f"visual.blocks.{n}.{p}.{k}" for n in range(layers) for p in parts for k in both]
    decoder = ["proj.weight", "query_embed.weight", "obj_proj", "img_proj", "pos_embed", "temporal_embed"]
    decoder += [f"{p}.{k}" for p in ("class_embed", "transformer.pre_norm") for k in both]
    decoder += [f"transformer.decoder.norm.{k}" for k in both]
    decoder += [f"bbox_embed.layers.{n}.{k}" for n in range(3) for k in both]
    parts = ("linear1", "linear2", "norm1", "norm2", "norm3", "self_attn.out_proj", "multihead_attn.out_proj")
    for n in range(6):
        layer = f"transformer.decoder.layers.{n}."
        decoder += [f"{layer}{p}.{k}" for p in parts for k in both]
        decoder += [f"{layer}{a}.in_proj_{k}" for a in ("self_attn", "multihead_attn") for k in both]
    return {f"clip.{name}" for name in clip} | {f"decoder.{name}" for name in decoder}


def on_meta(config):
    with torch.device("meta"):
        return Grain(config)


@pytest.mark.parametrize(("config", "layers"), [(GrainConfig(), 12), (vit_s_16(), 12), (vit_l_14(), 24)])
def test_keys_read_the_full_official_list(config, layers):
    model = on_meta(config)
    parts = model.to_official()
    official = {f"clip.{k}": v for k, v in parts["backbone_state_dict"].items()}
    official |= {f"decoder.{k}": v for k, v in parts["state_dict"].items()}
    assert set(official) == official_names(layers)
    assert official["decoder.class_embed.weight"].shape == (22047 + 1, 512)
    assert official["clip.visual.cls_token"].shape == (1, 1, config.clip.vision.width)
    ours = model.state_dict()
    assert {k: v.shape for k, v in KEYS.from_official(official).items()} == {
        k: v.shape for k, v in ours.items()
    }


def test_a_checkpoint_in_two_parts_is_read_and_written():
    config = replace(tiny(), heads=8, width=16)
    text = replace(config.clip.text, width=64, heads=1)
    source = Grain(replace(config, clip=replace(config.clip, text=text))).eval()
    parts = source.to_official()
    for place in parts:  # as DDP saves it
        parts[place] = {f"module.{k}": v for k, v in parts[place].items()}
    again = Grain.from_official({**parts, "epoch": 3, "optimizer": {}})
    assert again.config == source.config
    for name, tensor in source.state_dict().items():
        assert torch.equal(again.state_dict()[name], tensor), name
    half = {"backbone_state_dict": parts["backbone_state_dict"]}
    with pytest.raises(CheckpointError, match="no state_dict"):
        Grain.from_official(half)
    with pytest.raises(CheckpointError, match=r"no decoder\.query_embed\.weight"):
        Grain.from_official({"clip.logit_scale": torch.zeros(())})
    with pytest.raises(Refusal, match="no place"):
        Grain.from_clip(CLIP(tiny().clip)).to_official()


@pytest.mark.parametrize("change", ["missing", "unexpected"])
def test_keys_that_do_not_fit_are_listed(change):
    model = Grain(tiny())
    state = KEYS.to_official(model.state_dict())
    if change == "missing":
        del state["decoder.img_proj"]
    else:
        state["decoder.query_index.weight"] = torch.zeros(10, 16)
    with pytest.raises(CheckpointError, match="image_proj" if change == "missing" else "query_index"):
        KEYS.load(model, state)


def test_presets_are_the_papers():
    made = on_meta(GrainConfig())
    assert (made.config.regions, made.config.width, made.config.layers, made.dim) == (5, 512, 6, 512)
    assert set(TRAINING.presets) == {"vit-s-16", "vit-b-16", "vit-l-14"}
    assert TRAINING.presets["vit-s-16"]().clip.vision.heads == 12
    tower = made.clip.visual.transformer.resblocks[3]
    assert (tower.ln_1.eps, tower.attn.q_norm.eps, tower.attn.q_norm.normalized_shape) == (1e-6, 1e-6, (64,))
    assert (made.recipe.resize, made.recipe.crop, made.recipe.mean[0]) == ("squash", "none", 0.485)
    assert GrainConfig.from_json(json.loads(json.dumps(tiny().to_json()))) == tiny()


# --------------------------------------------------------------------------------------------------
# The model
# --------------------------------------------------------------------------------------------------


def tokens(*shape):
    made = torch.randint(1, 30, (*shape, 8))
    made[..., -1] = 31
    return made


def make_batch(count=4, most=3, seed=0):
    torch.manual_seed(seed)
    low = torch.rand(count, most, 2) * 8
    return {
        "image": torch.randn(count, 3, 16, 16),
        "text": tokens(count),
        "boxes": torch.cat([low, low + 2 + torch.rand(count, most, 2) * 6], -1),
        "region_text": tokens(count, most),
        "region_mask": torch.arange(most) < torch.tensor([3, 1, 0, 2, 3, 2, 0, 1])[:count, None],
    }


def make_model(seed=0, config=None):
    torch.manual_seed(seed)
    return Grain(config or tiny()).eval()


def test_is_an_encoder_that_also_grounds():
    model = make_model()
    assert isinstance(model, Encoder)
    pixels = torch.randn(2, 3, 16, 16)
    boxes, regions = model.ground(pixels)
    assert (boxes.shape, regions.shape) == ((2, 3, 4), (2, 3, 16))
    assert (boxes >= 0).all()
    assert (boxes <= 16).all()
    assert (boxes[..., 2:] >= boxes[..., :2]).all()
    frames = ClipBatch(torch.randn(2, 3, 3, 16, 16), torch.zeros(2, 3), torch.ones(2, 3, dtype=torch.bool))
    assert model.encode_video(frames).shape == (2, 16)
    scores = model.score(model.encode_text(tokens(5)), model.encode_image(pixels))
    assert scores.shape == (5, 2)
    assert not model.clip.visual.proj.requires_grad  # the tower's own vector serves nothing


def test_pictures_that_are_not_square():
    base = tiny()
    vision = replace(base.clip.vision, image_size=(16, 32))
    model = make_model(config=replace(base, clip=replace(base.clip, vision=vision)))
    assert model.recipe.size == (16, 32)
    boxes = torch.tensor([[[8.0, 4.0, 24.0, 12.0]]])
    shares, valid = shares_of_picture(boxes, (16, 32))
    assert valid.all()
    assert torch.equal(shares, torch.tensor([[[0.5, 0.5, 0.5, 0.5]]]))
    with torch.no_grad():  # a decoder that answers with that box is told that it is right
        for layer in model.decoder.box_head.layers:
            layer.weight.zero_()
            layer.bias.zero_()
    found, _ = model.ground(torch.randn(1, 3, 16, 32))
    torch.testing.assert_close(found[:, :1], boxes)


VIT = VitConfig(image_size=16, patch_size=8, width=128, layers=1, heads=2, stem=((8, 1),))
RESNET = ResNetConfig(image_size=32, width=8, layers=(1, 1, 1, 1), heads=4)


@pytest.mark.parametrize(("vision", "width"), [(VIT, 128), (RESNET, 256), (tiny().clip.vision, 16)])
def test_starts_from_any_clip(vision, width):
    text = TextConfig(context_length=8, vocab_size=32, width=16, layers=1, heads=2)
    clip = CLIP(ClipConfig(16, vision, text)).eval()
    model = TRAINING.start(clip)
    assert TRAINING.start(model) is model
    assert (model.config.width, model.config.qk_norm, model.training) == (width, False, False)
    texts = tokens(4)
    with torch.inference_mode():
        assert torch.equal(model.encode_text(texts), clip.encode_text(texts))
    restored = Grain.from_config(json.loads(json.dumps(model.config.to_json())))
    restored.load_state_dict(model.state_dict())
    size = 32 if vision is RESNET else 16
    batch = make_batch() | {"image": torch.randn(4, 3, size, size)}
    model.train()
    sum(GrainObjective()(model, batch).values()).backward()
    missing = [k for k, p in model.named_parameters() if p.requires_grad and p.grad is None]
    assert not missing
    assert clip.logit_scale.grad is None  # a copy


def test_what_it_does_not_start_from():
    with pytest.raises(UsageError, match="not from Linear"):
        Grain.from_clip(torch.nn.Linear(2, 2))
    with pytest.raises(UsageError, match="qk_norm"):
        Grain(replace(tiny(), clip=replace(tiny().clip, vision=RESNET)))
    with pytest.raises(UsageError, match="at least one region"):
        Grain(replace(tiny(), regions=0))
    with pytest.raises(UsageError, match="divides by its heads"):
        Grain(replace(tiny(), heads=3))


# --------------------------------------------------------------------------------------------------
# The losses
# --------------------------------------------------------------------------------------------------


def numbers(losses):
    return {name: float(value.detach()) for name, value in losses.items()}


def test_perfect_boxes_cost_nothing_and_worse_boxes_more():
    model, batch = make_model(), make_batch()
    exact, official = GrainObjective(iou_epsilon=0), GrainObjective()
    outputs = exact.outputs(model, batch)
    assert numbers(exact.loss(model, outputs))["box"] > 0.1
    perfect = outputs | {"predicted_BR4": outputs["boxes_BM4"].flip(1)}
    assert numbers(exact.loss(model, perfect))["box"] == pytest.approx(0, abs=1e-6)
    areas = outputs["boxes_BM4"][outputs["valid_BM"]][:, 2:].prod(-1)
    bound = 1.5 * (1e-4 / areas).mean()
    assert 0 < numbers(official.loss(model, perfect))["box"] <= bound


def test_shuffling_boxes_with_their_descriptions_changes_nothing():
    model, batch, objective = make_model(), make_batch(), GrainObjective()
    order = torch.tensor([2, 0, 1])
    shuffled = batch | {name: batch[name][:, order] for name in ("boxes", "region_text", "region_mask")}
    assert numbers(objective(model, shuffled)) == pytest.approx(numbers(objective(model, batch)), rel=1e-5)
    crossed = batch | {"boxes": batch["boxes"][:, order]}
    crossed["region_mask"] = batch["region_mask"] | True
    straight = batch | {"region_mask": crossed["region_mask"]}
    a, b = numbers(objective(model, crossed)), numbers(objective(model, straight))
    assert a["box"] == pytest.approx(b["box"], rel=1e-5)
    assert a["region"] != pytest.approx(b["region"], rel=1e-4)


def test_pictures_without_boxes_contribute_their_caption_only():
    model, batch, objective = make_model(), make_batch(), GrainObjective()
    with_one = numbers(objective(model, batch))  # row 2 has none
    kept = torch.tensor([0, 1, 3])
    without = numbers(objective(model, {name: value[kept] for name, value in batch.items()}))
    assert with_one["box"] == pytest.approx(without["box"], rel=1e-5)
    assert with_one["region"] == pytest.approx(without["region"], rel=1e-5)
    assert with_one["contrastive"] != pytest.approx(without["contrastive"], rel=1e-3)
    none = batch | {"region_mask": torch.zeros(4, 3, dtype=torch.bool)}
    losses = objective(model, none)
    assert numbers(losses) == {**numbers(losses), "box": 0, "region": 0}
    sum(losses.values()).backward()
    grads = [p.grad for p in model.parameters() if p.grad is not None]
    assert all(torch.isfinite(grad).all() for grad in grads)
    assert all(torch.equal(p.grad, torch.zeros_like(p)) for p in model.decoder.box_head.parameters())


@pytest.mark.parametrize("bad", ["empty", "outside", "inside out", "NaN"])
def test_a_box_without_area_is_dropped_and_the_others_keep_their_descriptions(bad):
    model, objective = make_model(), GrainObjective()
    batch = make_batch(count=2) | {"region_mask": torch.ones(2, 3, dtype=torch.bool)}
    boxes = batch["boxes"].clone()
    boxes[0, 1] = {
        "empty": boxes[0, 1, [0, 1, 0, 1]],
        "outside": torch.tensor([17.0, 2, 22, 9]),
        "inside out": boxes[0, 1, [2, 3, 0, 1]],
        "NaN": torch.full((4,), math.nan),
    }[bad]
    outputs = objective.outputs(model, batch | {"boxes": boxes})
    got = numbers(objective.loss(model, outputs))
    assert outputs["valid_BM"].tolist() == [[True, False, True], [True] * 3]
    # the same by hand: five pairs, each with the description of its own box among all six
    matched = match_boxes(outputs["predicted_BR4"], outputs["boxes_BM4"], outputs["valid_BM"], epsilon=1e-4)
    texts = F.normalize(model.encode_text(batch["region_text"].flatten(0, 1)), dim=-1)
    pairs = [(b, m, int(matched[b, m])) for b in range(2) for m in range(3) if (b, m) != (0, 1)]
    regions = torch.stack([outputs["regions_BRE"][b, r] for b, _, r in pairs])
    target = torch.tensor([3 * b + m for b, m, _ in pairs])
    word = F.cross_entropy(model.logit_scale.exp() * regions @ texts.T, target)
    found = torch.stack([outputs["predicted_BR4"][b, r] for b, _, r in pairs])
    true = torch.stack([outputs["boxes_BM4"][b, m] for b, m, _ in pairs])
    giou = 1 - paired_giou(cxcywh_to_xyxy(found), cxcywh_to_xyxy(true), epsilon=1e-4)
    box = 1.5 * ((found - true).abs().sum(-1) + giou).mean()
    assert got["region"] == pytest.approx(word.item(), rel=1e-5)
    assert got["box"] == pytest.approx(box.item(), rel=1e-5)


def test_boxes_that_reach_over_the_edge_are_cut_there():
    model, objective, batch = make_model(), GrainObjective(), make_batch()
    over = batch["boxes"].clone()
    over[0, 0] = torch.tensor([-5.0, -3.0, 9.0, 30.0])
    cut = over.clone()
    cut[0, 0] = torch.tensor([0.0, 0.0, 9.0, 16.0])
    a, b = (numbers(objective(model, batch | {"boxes": boxes})) for boxes in (over, cut))
    assert a == b


def test_more_boxes_than_region_queries():
    model, objective = make_model(), GrainObjective(most=6)
    assert objective.needs.fields[-1] == RegionField(6)
    batch = make_batch(most=6) | {"region_mask": torch.ones(4, 6, dtype=torch.bool)}
    outputs = objective.outputs(model, batch)
    matched = match_boxes(outputs["predicted_BR4"], outputs["boxes_BM4"], outputs["valid_BM"])
    assert ((matched >= 0).sum(1) == 3).all()  # as many as there are queries
    assert all(math.isfinite(v) for v in numbers(objective.loss(model, outputs)).values())


def test_only_described_boxes_are_encoded_and_padding_is_never_read():
    model, objective, batch = make_model(), GrainObjective(), make_batch()
    seen = []
    original = model.encode_text
    model.encode_text = lambda tokens_NL: seen.append(len(tokens_NL)) or original(tokens_NL)
    wanted = numbers(objective(model, batch))
    assert sorted(seen) == [4, 6]
    other = {name: batch[name].clone() for name in ("boxes", "region_text")}
    other["boxes"][~batch["region_mask"]] = 3
    other["region_text"][~batch["region_mask"]] = tokens(6)
    assert numbers(objective(model, batch | other)) == wanted


BAD = {
    "a description fewer": {"region_text": tokens(4, 2)},
    "boxes of three numbers": {"boxes": torch.zeros(4, 3, 3)},
    "a mask of another size": {"region_mask": torch.ones(4, 2, dtype=torch.bool)},
    "boxes for fewer pictures": {k: v[:3] for k, v in make_batch().items() if k not in ("image", "text")},
}


@pytest.mark.parametrize("name", BAD)
def test_boxes_and_descriptions_that_do_not_fit(name):
    with pytest.raises(UsageError, match=r"region_text \(B, M, L\)|4 pictures and boxes for 3"):
        GrainObjective().outputs(make_model(), make_batch() | BAD[name])


@pytest.mark.parametrize("options", [{"most": 0}, {"box_weight": -1.0}, {"weight_decay": -0.1}])
def test_options_out_of_range(options):
    with pytest.raises(UsageError, match="negative"):
        GrainObjective(**options)


def test_a_batch_of_one_and_one_without_regions():
    model = make_model()
    one = {name: value[:1] for name, value in make_batch().items()}
    assert numbers(GrainObjective()(model, one))["contrastive"] == pytest.approx(0, abs=1e-6)
    plain = GrainObjective(box_weight=0, giou_weight=0, region_weight=0)
    assert not any(isinstance(wanted, RegionField) for wanted in plain.needs.fields)
    bare = {name: value for name, value in make_batch().items() if name in ("image", "text")}
    assert set(plain(model, bare)) == {"contrastive"}
    both = GrainObjective(region_weight=0)(model, make_batch())
    assert set(both) == {"contrastive", "box"}


def test_each_process_by_itself_on_request():
    model, batch = make_model(), make_batch(count=8)
    objective = GrainObjective(official_distributed=True)
    outputs = objective.outputs(model, batch)
    assert torch.equal(outputs["process"], torch.zeros(8, dtype=torch.int64))
    plain = GrainObjective()
    assert numbers(objective.loss(model, outputs)) == numbers(plain.loss(model, plain.outputs(model, batch)))
    two = numbers(objective.loss(model, outputs | {"process": torch.tensor([0] * 4 + [1] * 4)}))
    halves = [
        numbers(plain(model, {name: value[part] for name, value in batch.items()}))
        for part in (slice(0, 4), slice(4, 8))
    ]
    for name in ("box", "region"):
        assert two[name] == pytest.approx(sum(half[name] for half in halves) / 2, rel=1e-5)


def test_two_slices_give_the_loss_and_gradients_of_the_whole():
    whole, cut = make_model().double(), make_model().double()
    batch = make_batch(count=8) | {"image": torch.randn(8, 3, 16, 16).double()}
    objective = GrainObjective()
    assert isinstance(objective, PairObjective)
    losses = objective(whole, batch)
    sum(losses.values()).backward()
    parts = [{k: v[s] for k, v in batch.items()} for s in (slice(0, 2), slice(2, 3), slice(3, 8))]
    made = [objective.outputs(cut, part) for part in parts]  # the second has no box at all
    joined = {k: v if v.ndim == 0 else torch.cat([m[k] for m in made]) for k, v in made[0].items()}
    again = objective.loss(cut, joined)
    sum(again.values()).backward()
    assert numbers(again) == pytest.approx(numbers(losses), rel=1e-5)
    for (name, a), b in zip(whole.named_parameters(), cut.parameters(), strict=True):
        if a.grad is not None:
            torch.testing.assert_close(b.grad, a.grad, rtol=1e-5, atol=1e-5, msg=name)


def test_training_lowers_every_loss_and_finds_the_boxes():
    model, batch = make_model(), make_batch()
    objective = TRAINING.objective(model)
    model.train()
    optimizer = torch.optim.AdamW(objective.param_groups(model), lr=3e-3)
    made = []
    for _ in range(120):
        losses = objective(model, batch)
        sum(losses.values()).backward()
        optimizer.step()
        optimizer.zero_grad()
        objective.after_step(model)
        made.append(numbers(losses))
    for name in made[0]:
        assert min(step[name] for step in made[-20:]) < 0.6 * made[0][name], name
    assert model.logit_scale.item() <= math.log(100) + 1e-6


def test_dropout_acts_in_training_only():
    model, pixels = make_model(), torch.randn(2, 3, 16, 16)
    assert torch.equal(model.encode_image(pixels), model.encode_image(pixels))
    model.train()
    assert not torch.equal(model.encode_image(pixels), model.encode_image(pixels))


def test_bfloat16_towers_have_float32_losses():
    model, batch, objective = make_model(), make_batch(), GrainObjective()
    wanted = numbers(objective(model, batch))
    with torch.autocast("cpu", torch.bfloat16):
        losses = objective(model, batch)
    assert all(value.dtype == torch.float32 for value in losses.values())
    assert numbers(losses) == pytest.approx(wanted, rel=0.1)


def test_the_state_of_a_run_is_the_models_alone():
    assert GrainObjective(make_model()).state_dict() == {}
    model, objective = make_model(), GrainObjective()
    other = copy.deepcopy(model)
    for m in (model, other):
        step = partial(torch.optim.SGD, lr=0.1)(objective.param_groups(m))
        m.train()
        torch.manual_seed(3)
        sum(objective(m, make_batch(seed=5)).values()).backward()
        step.step()
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), other.parameters(), strict=True))


@pytest.mark.slow
def test_grounding_is_learned_in_one_short_run():
    """Which arm tells badges better is the claim's to say; both must learn something."""
    plain, ours = run_claim("clip", 0, steps=60), run_claim("grain", 0, steps=60)
    chance = 100 / 12
    assert plain["badge top-1"] > 1.2 * chance
    assert ours["badge top-1"] > 1.2 * chance
    assert world.vocabulary_size() < 40
