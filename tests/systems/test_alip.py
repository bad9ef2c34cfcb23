from __future__ import annotations

import json
import math
import warnings

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from moviola.clip.config import ClipConfig, TextConfig, VitConfig
from moviola.clip.model import CLIP
from moviola.systems.pretraining.alip import (
    KEYS,
    START,
    TRAINING,
    Alip,
    AlipObjective,
    adaptive_loss,
    alip_step,
    gates,
    inspect,
    moved,
    run_claim,
    similarities,
    tiny,
)
from moviola.training.nce import info_nce
from moviola.types import CheckpointError, Encoder, PairObjective, UsageError

ORDER = ("language", "raw", "caption")


@pytest.fixture(scope="module")
def oracle(oracles_dir):
    folder = oracles_dir / "57-alip"
    return json.loads((folder / "a.json").read_text()), load_file(folder / "a.safetensors")


def same(got, data, name, tolerance):
    wanted = data[name].double()
    assert got.shape == wanted.shape, name
    worst = ((got.double() - wanted).abs() / (1 + wanted.abs())).max()
    assert worst <= tolerance, f"{name}: {worst:.2e}"


def official_model(meta, data):
    vision, text = meta["config"]["vision"], meta["config"]["text"]
    config = ClipConfig(
        meta["config"]["embed_dim"],
        VitConfig(
            vision["image_size"],
            vision["patch_size"],
            vision["width"],
            vision["layers"],
            vision["width"] // vision["head_width"],
        ),
        TextConfig(text["context_length"], text["vocab_size"], text["width"], text["layers"], text["heads"]),
        "quick_gelu" if meta["config"]["quick_gelu"] else "gelu",
    )
    model = Alip(config)
    KEYS.load(model, {k.removeprefix("param/"): v for k, v in data.items() if k.startswith("param/")})
    return model.eval()


def test_parity_of_every_output_and_gradient(oracle):
    """Model, gates over several steps and losses; nothing of the oracle is left uncompared."""
    meta, data = oracle
    tolerance = meta["tolerance"]
    made = official_model(meta, data).encode_triples(data["in/image"], data["in/tokens"])
    got = {
        "out/image_features": made["image"],
        "out/text_features_raw": made["text"],
        "out/text_features_caption": made["caption"],
        "out/logit_scale": made["scale"],
    }
    averages_3 = torch.tensor(meta["config"]["ema_init"], dtype=torch.float64)
    for step in range(meta["config"]["gate_steps"]):
        names = ("image", "raw", "caption", "logit_scale")
        leaves = {name: data[f"in/step{step}_{name}"].clone().requires_grad_() for name in names}
        image, raw, caption, scale = leaves.values()
        losses, weights, averages_3 = alip_step(image, raw, caption, scale, averages_3)
        (losses["raw"] + losses["caption"]).backward()
        out = f"out/step{step}"
        got |= {f"{out}_ema_{name}": value for name, value in zip(ORDER, averages_3, strict=True)}
        got |= {
            f"{out}_weight_{kind}": getattr(weights, f"{kind}_N") for kind in ("sample", "raw", "caption")
        }
        got |= {f"{out}_loss_{name}": value for name, value in losses.items()}
        got[f"{out}_loss"] = losses["raw"] + losses["caption"]
        got |= {f"grad/step{step}_{name}": leaf.grad for name, leaf in leaves.items()}
    assert set(got) == {name for name in data if name.startswith(("out/", "grad/"))}
    for name, value in got.items():
        same(value.detach(), data, name, tolerance)


def rows(count=6, dim=12, seed=0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    base = torch.randn(count, dim, generator=generator, dtype=dtype)
    other = [base + torch.randn(count, dim, generator=generator, dtype=dtype) for _ in range(2)]
    return tuple(F.normalize(x, dim=-1) for x in (base, *other))


def test_the_objective_equals_the_step_and_carries_the_averages(oracle):
    """The oracle's steps again, through `loss`: the averages are buffers, moved before they are used."""
    meta, data = oracle
    objective = AlipObjective(start=float(meta["config"]["ema_init"][0])).double().train()
    for step in range(meta["config"]["gate_steps"]):
        given = {name: data[f"in/step{step}_{name}"] for name in ("image", "raw", "caption", "logit_scale")}
        outputs = {
            "image": given["image"],
            "text": given["raw"],
            "caption": given["caption"],
            "has_caption": torch.ones(len(given["image"]), dtype=torch.bool),
            "logit_scale": given["logit_scale"].log(),
        }
        losses = objective.loss(CLIP(tiny()), outputs)
        same(losses["raw"], data, f"out/step{step}_loss_raw", meta["tolerance"])
        same(losses["caption"], data, f"out/step{step}_loss_caption", meta["tolerance"])
        for name, value in zip(ORDER, objective.averages_3, strict=True):
            same(value, data, f"out/step{step}_ema_{name}", meta["tolerance"])


def test_weights_of_one_give_the_sum_of_two_clip_losses():
    image, raw, caption = rows()
    wanted = info_nce(image, raw, 20.0) + info_nce(image, caption, 20.0)
    ones = torch.ones(len(image))
    got = adaptive_loss(image, raw, 20.0, ones) + adaptive_loss(image, caption, 20.0, ones)
    torch.testing.assert_close(got, wanted)
    losses, weights, _ = alip_step(image, raw, caption, 20.0, torch.ones(3).double(), exponent=0.0)
    torch.testing.assert_close(losses["raw"] + losses["caption"], wanted)
    assert all((weight_N == 1).all() for weight_N in weights)


cosines = st.floats(-1, 1)


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.tuples(cosines, cosines, cosines), min_size=1, max_size=8),
    st.tuples(cosines, cosines, cosines),
)
def test_what_the_gates_are(triples_N3, averages):
    cosine_3N = torch.tensor(triples_N3, dtype=torch.float64).T
    averages_3 = torch.tensor(averages, dtype=torch.float64)
    made = gates(cosine_3N, averages_3)
    above_N = torch.exp(2 * (cosine_3N[0] - averages_3[0])) >= 1
    for weight_N in made:
        assert (weight_N[above_N] == 1).all()
        assert (weight_N > 0).all()
    assert (made.sample_N <= 1).all()
    # the other gates hang on the language gate alone, and are not capped
    for place, weight_N in ((1, made.raw_N), (2, made.caption_N)):
        wanted = torch.exp(2 * (cosine_3N[place] - averages_3[place]))[~above_N]
        torch.testing.assert_close(weight_N[~above_N], wanted)


def test_the_sample_gate_rises_with_agreement_and_pair_gates_pass_one():
    s_N = torch.linspace(-1, 1, 50)
    made = gates(torch.stack([s_N, torch.full((50,), 0.9), torch.full((50,), 0.9)]), torch.full((3,), 0.2))
    assert (made.sample_N.diff() >= 0).all()
    assert made.raw_N.max() > 1
    assert made.caption_N.max() > 1


def test_no_gradient_flows_through_weights_or_averages():
    leaves = [x.requires_grad_() for x in rows()]
    losses, weights, averages_3 = alip_step(*leaves, 20.0, torch.full((3,), 0.4).double())
    assert not any(t.requires_grad for t in (*weights, averages_3))
    (losses["raw"] + losses["caption"]).backward()
    fixed = [x.detach().clone().requires_grad_() for x in leaves]
    raw = adaptive_loss(fixed[0], fixed[1], 20.0, weights.sample_N * weights.raw_N)
    (raw + adaptive_loss(fixed[0], fixed[2], 20.0, weights.sample_N * weights.caption_N)).backward()
    for a, b in zip(leaves, fixed, strict=True):
        torch.testing.assert_close(a.grad, b.grad)


def test_the_averages_follow_their_recursion():
    averages_3, h = torch.ones(3).double(), 1.0
    for seed in range(5):
        cosine_3N = similarities(*rows(seed=seed))
        averages_3 = moved(averages_3, cosine_3N)
        h = 0.01 * cosine_3N[0].mean().item() + 0.99 * h
    assert averages_3[0].item() == pytest.approx(h, abs=1e-14)


def test_a_similarity_that_is_not_a_number_enters_no_average():
    cosine_3N = similarities(*rows())
    broken_3N = cosine_3N.clone()
    broken_3N[:, 2] = math.nan
    kept = torch.arange(6) != 2
    start_3 = torch.full((3,), 0.5).double()
    torch.testing.assert_close(moved(start_3, broken_3N), moved(start_3, cosine_3N[:, kept]))
    assert torch.equal(moved(start_3, torch.full((3, 4), math.nan).double()), start_3)


def batch_of(count=6, seed=0, missing=()):
    generator = torch.Generator().manual_seed(seed)
    made = {"image": torch.randn(count, 3, 16, 16, generator=generator)}
    for name in ("text", "caption"):
        made[name] = torch.randint(1, 30, (count, 8), generator=generator)
        made[name][:, -1] = 31
    if missing:
        made["caption_mask"] = torch.tensor([n not in missing for n in range(count)])
    return made


def model_of(seed=0):
    torch.manual_seed(seed)
    return CLIP(tiny())


@pytest.mark.parametrize("missing", [(), (1, 4)])
def test_parts_of_a_batch_give_the_whole_batchs_loss_and_gradients(missing):
    """What gradient caching and several processes do: `outputs` in slices, one `loss`, equal gates."""
    batch = batch_of(missing=missing)
    grads, values, averages = [], [], []
    for cuts in ([(0, 6)], [(0, 2), (2, 6)]):
        model, objective = model_of(), AlipObjective(start=0.2)
        parts = [objective.outputs(model, {k: v[a:b] for k, v in batch.items()}) for a, b in cuts]
        outputs = {k: v if v.ndim == 0 else torch.cat([p[k] for p in parts]) for k, v in parts[0].items()}
        losses = objective.loss(model, outputs)
        (losses["raw"] + losses["caption"]).backward()
        values.append({k: v.detach() for k, v in losses.items()})
        averages.append(objective.averages_3)
        grads.append({k: p.grad for k, p in model.named_parameters()})
    torch.testing.assert_close(values[0], values[1], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(averages[0], averages[1])
    torch.testing.assert_close(grads[0], grads[1], rtol=1e-5, atol=1e-5)


def test_a_row_without_a_caption_is_a_raw_pair_of_weight_one():
    image, raw, caption = rows(8)
    has = torch.arange(8) % 4 != 0
    start_3 = torch.full((3,), 0.9).double()
    losses, weights, averages_3 = alip_step(image, raw, caption, 20.0, start_3, has_caption_N=has)
    assert all((weight_N[~has] == 1).all() for weight_N in weights)
    assert (weights.sample_N[has] < 1).any()
    cosine_3N = similarities(image, raw, caption)
    wanted = 0.01 * torch.stack([cosine_3N[0, has].mean(), cosine_3N[1].mean(), cosine_3N[2, has].mean()])
    torch.testing.assert_close(averages_3, wanted + 0.99 * 0.9)
    kept_N = (weights.sample_N * weights.caption_N)[has]
    alone = adaptive_loss(image[has], caption[has], 20.0, kept_N)
    torch.testing.assert_close(losses["caption"], alone * 6 / 8)  # divided by all rows
    other = caption.clone()
    other[~has] = F.normalize(torch.randn(2, 12).double(), dim=-1)  # empty captions are nobody's negatives
    again, _, _ = alip_step(image, raw, other, 20.0, start_3, has_caption_N=has)
    torch.testing.assert_close(again, losses)
    none, weights, _ = alip_step(
        image, raw, caption, 20.0, start_3, has_caption_N=torch.zeros(8, dtype=torch.bool)
    )
    assert none["caption"] == 0
    torch.testing.assert_close(none["raw"], info_nce(image, raw, 20.0))


def test_no_caption_at_all_gives_one_warning():
    model, objective = model_of(), AlipObjective()
    batch = batch_of(missing=range(6))
    with pytest.warns(UserWarning, match="No row of a batch has a synthetic caption"):
        losses = objective(model, batch)
    assert losses["caption"] == 0
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        objective(model, batch)


def train_steps(model, objective, optimizer, first, last):
    losses = []
    for step in range(first, last):
        made = objective(model, batch_of(seed=step % 3))
        total = made["raw"] + made["caption"]
        total.backward()
        optimizer.step()
        optimizer.zero_grad()
        objective.after_step(model)
        losses.append(total.item())
    return losses


def test_training_goes_on_exactly_after_a_restart(tmp_path):
    def fresh():
        model = model_of()
        objective = TRAINING.objective(model, start=0.5, rate=0.1)
        return model, objective, torch.optim.AdamW(objective.param_groups(model), lr=3e-3)

    whole = train_steps(*fresh(), 0, 12)
    model, objective, optimizer = fresh()
    train_steps(model, objective, optimizer, 0, 6)
    parts = {"model": model, "objective": objective, "optimizer": optimizer}
    torch.save({k: v.state_dict() for k, v in parts.items()}, tmp_path / "run.pt")
    model, objective, optimizer = fresh()
    state = torch.load(tmp_path / "run.pt", weights_only=True)
    assert not torch.equal(state["objective"]["averages_3"], objective.averages_3)
    model.load_state_dict(state["model"])
    objective.load_state_dict(state["objective"])
    optimizer.load_state_dict(state["optimizer"])
    assert train_steps(model, objective, optimizer, 6, 12) == whole[6:]
    with pytest.raises(RuntimeError, match="averages_3"):  # a checkpoint without the averages
        objective.load_state_dict({})


def test_the_objective_trains_by_the_papers_recipe():
    model = model_of()
    objective = AlipObjective(model, start=0.5)
    assert isinstance(objective, PairObjective)
    (group,) = objective.param_groups(model)
    assert group["weight_decay"] == 0.2
    assert len(group["params"]) == len(list(model.parameters()))
    losses = train_steps(model, objective, torch.optim.AdamW([group], lr=3e-3), 0, 40)
    assert sum(losses[-3:]) < 0.7 * sum(losses[:3])
    with torch.no_grad():
        model.logit_scale.fill_(9.0)
    objective.after_step(model)
    assert model.logit_scale.item() == pytest.approx(math.log(100))


def test_the_averages_rest_outside_training():
    model, objective = model_of(), AlipObjective(start=0.5)
    objective.eval()
    objective(model, batch_of())
    assert torch.equal(objective.averages_3, torch.full((3,), 0.5))
    objective.train()
    objective(model, batch_of())
    assert not torch.equal(objective.averages_3, torch.full((3,), 0.5))


def test_weights_to_look_at():
    image, raw, caption = rows(200)
    bad = torch.arange(200) < 50
    raw = torch.where(bad[:, None], raw.roll(7, 0), raw)
    made = inspect(image, raw, caption)
    assert made.sample_N[bad].mean() < made.sample_N[~bad].mean()
    averages_3 = similarities(image, raw, caption).mean(1)
    torch.testing.assert_close(made, inspect(image, raw, caption, averages_3))
    model, objective = model_of(), AlipObjective(start=0.3)
    weights = objective.inspect(model, batch_of(missing=(0,)))
    assert weights.sample_N.shape == (6,)
    assert weights.sample_N[0] == 1
    assert torch.equal(objective.averages_3, torch.full((3,), 0.3))


def openclip_names(layers=12):
    block = [
        "attn.in_proj_weight", "attn.in_proj_bias", "attn.out_proj.weight", "attn.out_proj.bias",
        "ln_1.weight", "ln_1.bias", "ln_2.weight", "ln_2.bias",
        "mlp.c_fc.weight", "mlp.c_fc.bias", "mlp.c_proj.weight", "mlp.c_proj.bias",
    ]  # fmt: skip
    names = ["positional_embedding", "text_projection", "logit_scale", "token_embedding.weight"]
    names += ["ln_final.weight", "ln_final.bias", "visual.class_embedding", "visual.positional_embedding"]
    names += ["visual.proj", "visual.conv1.weight", "visual.ln_pre.weight", "visual.ln_pre.bias"]
    names += ["visual.ln_post.weight", "visual.ln_post.bias"]
    for tower in ("", "visual."):
        names += [f"{tower}transformer.resblocks.{n}.{part}" for n in range(layers) for part in block]
    return set(names)


def test_keys_read_the_full_official_list():
    config = TRAINING.presets["vit-b-32"]()
    with torch.device("meta"):
        state = Alip(config).state_dict()
    assert set(KEYS.to_official(state)) == openclip_names()
    assert set(KEYS.from_official(state | {"attn_mask": torch.zeros(1)})) == set(state)
    assert (config.activation, config.vision.patch_size, config.text.context_length) == ("gelu", 32, 77)


@pytest.mark.parametrize("prefix", ["", "module."])
@pytest.mark.parametrize("tower", ["vit", "resnet"])
def test_an_official_checkpoint_loads_with_gelu(prefix, tower):
    from moviola.clip.config import ResNetConfig

    text = TextConfig(context_length=8, vocab_size=32, width=64, layers=2, heads=1)
    vision = VitConfig(image_size=32, patch_size=16, width=128, layers=1, heads=2)
    if tower == "resnet":
        vision = ResNetConfig(image_size=32, width=8, layers=(1, 1, 1, 1), heads=4)
    source = Alip(ClipConfig(24, vision, text, "gelu")).eval()
    loaded = Alip.from_official({prefix + k: v for k, v in source.state_dict().items()})
    assert loaded.config == source.config
    batch = torch.randn(2, 3, 32, 32), torch.randint(1, 31, (2, 16))
    torch.testing.assert_close(loaded.encode_triples(*batch), source.encode_triples(*batch))


def test_keys_that_do_not_fit_are_listed():
    state = dict(Alip(tiny()).state_dict())
    del state["ln_final.bias"]
    with pytest.raises(CheckpointError, match=r"ln_final\.bias"):
        KEYS.load(Alip(tiny()), state)


def test_starts_from_a_clip_and_from_a_stored_configuration():
    clip = model_of()
    started = Alip.from_clip(clip)
    assert isinstance(started, Encoder)
    for name, tensor in clip.state_dict().items():
        assert torch.equal(started.state_dict()[name], tensor), name
    with torch.no_grad():
        started.logit_scale.fill_(0.0)
    assert clip.logit_scale.item() != 0.0
    assert Alip.from_config(json.loads(json.dumps(started.config.to_json()))).config == started.config


UNIT = F.normalize(torch.randn(4, 8), dim=-1)
BAD = {
    "not normalised": (lambda: alip_step(UNIT, 3 * UNIT, UNIT, 10.0, torch.ones(3)), "length one"),
    "other widths": (lambda: alip_step(UNIT, UNIT[:, :4], UNIT, 10.0, torch.ones(3)), "one width"),
    "other counts": (lambda: inspect(UNIT, UNIT[:3], UNIT), "as many vectors"),
    "batch of one": (lambda: alip_step(UNIT[:1], UNIT[:1], UNIT[:1], 10.0, torch.ones(3)), "at least 2"),
    "weights of another batch": (
        lambda: adaptive_loss(UNIT, UNIT, 10.0, torch.ones(8)),
        "one weight per row",
    ),
    "half the tokens": (
        lambda: Alip(tiny()).encode_triples(torch.zeros(2, 3, 16, 16), torch.ones(2, 8).long()),
        r"\(B, 16\), got \(2, 8\)",
    ),
    "no captions at all": (
        lambda: AlipObjective()(CLIP(tiny()), {k: v for k, v in batch_of().items() if k != "caption"}),
        "synthetic_caption",
    ),
    "rate": (lambda: AlipObjective(rate=0.0), "rate"),
    "start": (lambda: AlipObjective(start=2.0), "start"),
    "exponent": (lambda: AlipObjective(exponent=-1.0), "exponent"),
    "weight decay": (lambda: AlipObjective(weight_decay=-1.0), "weight_decay"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input(name):
    call, said = BAD[name]
    with pytest.raises(UsageError, match=said):
        call()


def test_vectors_that_are_not_numbers_leave_the_averages_whole():
    model, objective = model_of(), AlipObjective(start=0.5, rate=0.5)
    batch = batch_of()
    batch["image"][2] = math.nan
    losses = objective(model, batch)
    assert not torch.isfinite(losses["raw"])  # the training loop stops and names the rows
    assert torch.isfinite(objective.averages_3).all()


def test_the_defaults_are_the_papers():
    objective = AlipObjective()
    assert (objective.rate, objective.exponent, START) == (0.01, 2.0, 1.0)
    assert torch.equal(objective.averages_3, torch.ones(3))
    image, text, caption = objective.needs.fields
    assert (image.name, text.name, caption.name, caption.optional) == ("image", "text", "caption", True)
    assert caption.columns[0] == "synthetic_caption"


@pytest.mark.slow
def test_the_claim_shows_in_one_short_run():
    plain, ours = (run_claim(arm, 7, steps=200, pairs=6000) for arm in ("unweighted sum", "alip"))
    assert ours["W_s, shuffled"] < ours["W_s, clean"]
    assert ours["W_s W_r, shuffled"] < ours["W_s W_r, clean"]
    assert ours["t2i R@1"] + ours["i2t R@1"] > plain["t2i R@1"] + plain["i2t R@1"]
