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

from moviola.clip.config import ClipConfig, ResNetConfig, TextConfig, VitConfig
from moviola.clip.model import CLIP
from moviola.systems.pretraining.cloob import (
    INV_TAU,
    KEYS,
    KEYS_ROOT,
    TRAINING,
    Cloob,
    CloobObjective,
    cloob_loss,
    cloob_terms,
    cosine_restarts,
    info_loob,
    keys_for,
    recall,
    recall_all,
    run_claim,
    tiny,
)
from moviola.training.nce import info_nce
from moviola.types import CheckpointError, Encoder, PairObjective, UsageError


@pytest.fixture(scope="module")
def oracle(oracles_dir):
    folder = oracles_dir / "58-cloob"
    return json.loads((folder / "a.json").read_text()), load_file(folder / "a.safetensors")


def same(got, data, name, tolerance):
    wanted = data[name].double()
    assert got.shape == wanted.shape, name
    worst = ((got.double() - wanted).abs() / (1 + wanted.abs())).max()
    assert worst <= tolerance, f"{name}: {worst:.2e}"


def test_parity_of_every_output_and_gradient(oracle):
    meta, data = oracle
    inv_tau, beta = meta["config"]["inv_tau"], meta["config"]["beta"]
    image, text = (data[f"in/{name}"].clone().requires_grad_() for name in ("image", "text"))
    recalled = recall_all(image, text, beta)
    terms = cloob_terms(image, text, inv_tau=inv_tau, beta=beta)
    loss = cloob_loss(image, text, inv_tau=inv_tau, beta=beta)
    loss.backward()
    got = {f"out/{n}": v for n, v in zip(("U_x", "U_y", "V_y", "V_x"), recalled, strict=True)}
    got |= {"out/loss": loss, "out/loss_image_term": terms[0], "out/loss_text_term": terms[1]}
    got |= {"grad/image": image.grad, "grad/text": text.grad}

    plain_image, plain_text = (data[f"in/{name}"].clone().requires_grad_() for name in ("image", "text"))
    plain = info_loob(plain_image, plain_text, inv_tau)
    plain.backward()
    got["out/infoloob_without_retrieval_image_rows"] = plain
    got |= {
        "grad/infoloob_plain_image": plain_image.grad,
        "grad/infoloob_plain_text": plain_text.grad,
        "out/clip_loss": info_nce(image, text, inv_tau),
        "out/infonce_on_U": info_nce(recalled.u_x_ND, recalled.u_y_ND, inv_tau),
    }
    assert set(got) == {name for name in data if name.startswith(("out/", "grad/"))}
    for name, value in got.items():
        same(value.detach(), data, name, meta["tolerance"])


def rows(count=6, dim=12, seed=0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    return tuple(
        F.normalize(torch.randn(count, dim, generator=generator, dtype=dtype), dim=-1) for _ in range(2)
    )


# --------------------------------------------------------------------------------------------------
# Retrieval
# --------------------------------------------------------------------------------------------------


def test_recall_is_the_softmax_formula_also_with_other_numbers_of_states():
    image, text = rows(9)
    state = text[:5]
    mixed = (8.0 * state @ image.T).softmax(-1) @ image
    torch.testing.assert_close(recall(state, image, 8.0), F.normalize(mixed, dim=-1), rtol=0, atol=1e-14)


def test_recalled_rows_have_length_one_and_move_with_their_states_only():
    image, text = rows(8)
    recalled = recall_all(image, text)
    for part in recalled:
        torch.testing.assert_close(part.norm(dim=-1), torch.ones(8).double())
    order = torch.randperm(8, generator=torch.Generator().manual_seed(0))
    moved = recall_all(image[order], text[order])
    for a, b in zip(moved, recalled, strict=True):
        torch.testing.assert_close(a, b[order], rtol=0, atol=1e-12)
    # the order of what is stored does not matter
    torch.testing.assert_close(recall(text, image[order]), recall(text, image), rtol=0, atol=1e-12)
    torch.testing.assert_close(
        cloob_loss(image[order], text[order]), cloob_loss(image, text), rtol=0, atol=1e-12
    )


def test_beta_between_its_limits():
    image, text = rows(8)
    sharp = recall_all(image, text, 1e6)
    torch.testing.assert_close(sharp.u_x_ND, image, rtol=0, atol=1e-9)
    nearest = image[(text @ image.T).argmax(1)]
    torch.testing.assert_close(sharp.u_y_ND, nearest, rtol=0, atol=1e-9)
    flat = recall_all(image, text, 1e-9)
    mean = F.normalize(image.mean(0), dim=-1).expand_as(image)
    torch.testing.assert_close(flat.u_x_ND, mean, rtol=0, atol=1e-6)
    torch.testing.assert_close(flat.u_y_ND, mean, rtol=0, atol=1e-6)


def test_texts_recall_from_pictures_alone():
    """U_y lies in the span of the pictures, and other pictures change it whatever the texts are."""
    image, text = rows(4, 12)
    u_y = recall_all(image, text).u_y_ND
    solved = torch.linalg.lstsq(image.T, u_y.T).solution
    torch.testing.assert_close(image.T @ solved, u_y.T, rtol=0, atol=1e-10)
    assert (solved >= -1e-12).all()
    residual = text.T - image.T @ torch.linalg.lstsq(image.T, text.T).solution
    assert residual.norm() > 0.5  # the texts themselves do not lie there


def test_nothing_as_large_as_the_batch_squared_is_kept_for_the_backward_pass():
    image, text = (x.float().requires_grad_() for x in rows(1500, 16))
    largest = 0

    def note(tensor):
        nonlocal largest
        largest = max(largest, tensor.numel())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        loss = cloob_loss(image, text)
    assert largest <= 1500 * 16
    loss.backward()
    assert torch.isfinite(image.grad).all()


# --------------------------------------------------------------------------------------------------
# InfoLOOB
# --------------------------------------------------------------------------------------------------


def test_with_the_positive_put_back_and_without_tau_it_is_infonce():
    image, text = rows(7)
    k = 20.0 * image @ text.T
    own = k.diagonal()
    others = (20.0 * info_loob(image, text, 20.0) + own.mean()).item()  # mean log sum over j != i
    masked = k.masked_fill(torch.eye(7, dtype=torch.bool), -math.inf)
    assert others == pytest.approx(masked.logsumexp(1).mean().item(), abs=1e-12)
    put_back = torch.logaddexp(masked.logsumexp(1), own) - own
    torch.testing.assert_close(put_back.mean(), F.cross_entropy(k, torch.arange(7)))


def test_it_has_no_bound_at_zero():
    eye = torch.eye(6).double()
    assert info_loob(eye, eye, INV_TAU).item() == pytest.approx(-1 + math.log(5) / INV_TAU)
    assert cloob_loss(eye, eye).item() < 0


@settings(max_examples=30, deadline=None)
@given(st.floats(0.5, 0.999))
def test_the_pull_of_the_positive_does_not_fade(cosine):
    """As the positive pair comes together, InfoNCE lets go of it; InfoLOOB pulls as at the start."""
    image = torch.eye(6, 12).double()
    partner = torch.eye(6, 12, dtype=torch.float64).roll(6, 1)
    text = (cosine * image + math.sqrt(1 - cosine**2) * partner).requires_grad_()
    pull = torch.autograd.grad(info_loob(image, text, INV_TAU), text)[0]
    along = (pull * image).sum(-1)
    torch.testing.assert_close(along, torch.full((6,), -1 / 6).double(), rtol=0, atol=0.04)
    weak = torch.autograd.grad(info_nce(image, text, INV_TAU), text)[0] / INV_TAU
    assert ((weak * image).sum(-1).abs() < 1e-4).all()


def test_masking_with_minus_1000_as_officially_is_equal():
    image, text = (x.float() for x in rows(16, 8, seed=3))
    k = 100.0 * image @ text.T
    eye = torch.eye(16)
    officially = ((k * (1 - eye) - 1000 * eye).logsumexp(1) - k.diagonal()).mean() / 100
    torch.testing.assert_close(info_loob(image, text, 100.0), officially)


# --------------------------------------------------------------------------------------------------
# The objective
# --------------------------------------------------------------------------------------------------


def batch_of(count=6, seed=0):
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(1, 30, (count, 8), generator=generator)
    tokens[:, -1] = 31
    return {"image": torch.randn(count, 3, 16, 16, generator=generator), "text": tokens}


def model_of(cls=CLIP, seed=0):
    torch.manual_seed(seed)
    return cls(tiny())


ARMS = {
    "cloob": {},
    "learned temperature": {"learnable_inv_tau": True},
    "the model's temperature": {"inv_tau": None, "learnable_inv_tau": True},
    "infonce on recalled": {"contrast": "infonce"},
    "infoloob alone": {"retrieval": False},
    "clip": {"retrieval": False, "contrast": "infonce"},
}


@pytest.mark.parametrize("name", ARMS)
def test_parts_of_a_batch_give_the_whole_batchs_loss_and_gradients(name):
    batch, grads, values = batch_of(), [], []
    for cuts in ([(0, 6)], [(0, 2), (2, 6)]):
        model = model_of()
        objective = CloobObjective(model, **ARMS[name])
        parts = [objective.outputs(model, {k: v[a:b] for k, v in batch.items()}) for a, b in cuts]
        outputs = {k: v if v.ndim == 0 else torch.cat([p[k] for p in parts]) for k, v in parts[0].items()}
        total = sum(objective.loss(model, outputs).values())
        total.backward()
        values.append(total.detach())
        grads.append({k: p.grad for k, p in model.named_parameters() if p.requires_grad})
    torch.testing.assert_close(values[0], values[1], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(grads[0], grads[1], rtol=1e-5, atol=1e-5)
    assert all(grad is not None for grad in grads[0].values())


def test_the_objectives_losses_are_the_pure_ones():
    batch, model = batch_of(), model_of()
    image, text = model.encode_image(batch["image"]), model.encode_text(batch["text"])
    unit = F.normalize(image, dim=-1), F.normalize(text, dim=-1)

    def total(**options):
        return sum(CloobObjective(**options)(model, batch).values())

    recalled = recall_all(*unit)
    torch.testing.assert_close(total(), cloob_loss(*unit))
    torch.testing.assert_close(total(inv_tau=5.0, beta=2.0), cloob_loss(*unit, inv_tau=5.0, beta=2.0))
    scale = model.logit_scale.exp()
    torch.testing.assert_close(total(inv_tau=None), cloob_loss(*unit, inv_tau=scale))
    torch.testing.assert_close(
        total(retrieval=False), info_loob(*unit, INV_TAU) + info_loob(*unit[::-1], INV_TAU)
    )
    torch.testing.assert_close(total(retrieval=False, contrast="infonce"), info_nce(*unit, INV_TAU))
    both = info_nce(recalled.u_x_ND, recalled.u_y_ND, INV_TAU) + info_nce(*recalled[2:], INV_TAU)
    torch.testing.assert_close(total(contrast="infonce"), both / 2)


@pytest.mark.parametrize("cls", [CLIP, Cloob])
def test_the_temperature_is_fixed_unless_asked(cls):
    model = model_of(cls)
    fixed = CloobObjective(model)
    assert model.logit_scale.exp().item() == pytest.approx(30)
    grouped = [p for group in fixed.param_groups(model) for p in group["params"]]
    assert all(p is not model.logit_scale for p in grouped)
    assert len(grouped) == len(list(model.parameters())) - 1
    learned = CloobObjective(model, inv_tau=14.3, learnable_inv_tau=True)
    assert model.logit_scale.exp().item() == pytest.approx(14.3)
    assert sum(len(group["params"]) for group in learned.param_groups(model)) == len(grouped) + 1
    sum(learned(model, batch_of()).values()).backward()
    assert model.logit_scale.grad.abs() > 0
    with torch.no_grad():
        model.logit_scale.fill_(9.0)
    learned.after_step(model)
    assert model.logit_scale.item() == pytest.approx(math.log(100))
    sum(learned(model, batch_of()).values()).backward()  # exp(ln 100) is within the range


@pytest.mark.parametrize("name", ARMS)
def test_every_arm_trains(name):
    model = model_of()
    objective = TRAINING.objective(model, **ARMS[name])
    assert isinstance(objective, PairObjective)
    groups = list(objective.param_groups(model))
    assert [group["weight_decay"] for group in groups] == [0.1, 0.0]
    optimizer = torch.optim.AdamW(groups, lr=3e-3)
    losses = []
    for step in range(40):
        total = sum(objective(model, batch_of(seed=step % 2)).values())
        total.backward()
        optimizer.step()
        optimizer.zero_grad()
        objective.after_step(model)
        losses.append(total.item())
    assert sum(losses[-4:]) < sum(losses[:4]) - 0.2


def test_half_precision_around_it_does_not_reach_the_loss():
    image, text = (x.float() for x in rows(32, 16))
    wanted = cloob_loss(image, text)
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(cloob_loss(image, text), wanted)


def test_repeated_captions_give_one_warning():
    model = model_of()
    objective, batch = CloobObjective(model), batch_of()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        objective(model, batch)
    assert objective.outputs(model, batch)["caption"].shape == (6,)
    batch["text"][3] = batch["text"][0]
    batch["text"][4] = batch["text"][0]
    with pytest.warns(UserWarning, match="2 of the 6 captions"):
        objective(model, batch)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        objective(model, batch)


def test_warm_up_and_restarts():
    at = [cosine_restarts(s, steps=110, warmup=10, cycles=2) for s in range(111)]
    assert at[0] == 0
    assert at[5] == pytest.approx(0.5)
    assert at[10] == at[60] == 1
    assert at[35] == pytest.approx(0.5)
    assert at[59] < 0.01
    assert at[110] == 0
    model = model_of()
    assert CloobObjective(model).lr_factors(3, 100) is None
    factors = CloobObjective(model, cycles=2, warmup_share=10 / 110).lr_factors(35, 110)
    assert factors == [pytest.approx(0.5)] * 2


# --------------------------------------------------------------------------------------------------
# The model and its checkpoints
# --------------------------------------------------------------------------------------------------

BLOCK = [
    "attn.in_proj_weight", "attn.in_proj_bias", "attn.out_proj.weight", "attn.out_proj.bias",
    "ln_1.weight", "ln_1.bias", "ln_2.weight", "ln_2.bias",
    "mlp.c_fc.weight", "mlp.c_fc.bias", "mlp.c_proj.weight", "mlp.c_proj.bias",
]  # fmt: skip


def official_names(tower, text="transformer."):
    """CLIPGeneral's parameters and buffers: RN50 or ViT-B/32 with the text transformer."""
    names = ["token_embedding.weight", "positional_embedding", "text_projection"]
    names += ["ln_final.weight", "ln_final.bias"]
    names += [f"transformer.resblocks.{n}.{part}" for n in range(12) for part in BLOCK]
    names = [text + name for name in names] + ["logit_inv_tau"]
    if tower == "vit-b-32":
        names += [f"visual.{n}" for n in ("class_embedding", "positional_embedding", "proj", "conv1.weight")]
        names += [f"visual.ln_{place}.{kind}" for place in ("pre", "post") for kind in ("weight", "bias")]
        names += [f"visual.transformer.resblocks.{n}.{part}" for n in range(12) for part in BLOCK]
        return set(names)

    def norm(prefix):
        kinds = ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")
        return [f"{prefix}.{kind}" for kind in kinds]

    for n in (1, 2, 3):
        names += [f"visual.conv{n}.weight", *norm(f"visual.bn{n}")]
    for stage, blocks in enumerate((3, 4, 6, 3), start=1):
        for block in range(blocks):
            at = f"visual.layer{stage}.{block}"
            for n in (1, 2, 3):
                names += [f"{at}.conv{n}.weight", *norm(f"{at}.bn{n}")]
            if block == 0:
                names += [f"{at}.downsample.0.weight", *norm(f"{at}.downsample.1")]
    names.append("visual.attnpool.positional_embedding")
    names += [f"visual.attnpool.{p}_proj.{kind}" for p in "qkvc" for kind in ("weight", "bias")]
    return set(names)


@pytest.mark.parametrize("preset", ["rn50", "vit-b-32"])
def test_keys_read_the_full_official_list(preset):
    with torch.device("meta"):
        state = Cloob(TRAINING.presets[preset]()).state_dict()
    official = KEYS.to_official(state)
    assert set(official) == official_names(preset)
    assert keys_for(official) is KEYS
    assert set(KEYS.from_official(official)) == set(state)
    root = KEYS_ROOT.to_official(state)
    assert set(root) == official_names(preset, text="")
    assert keys_for(root) is KEYS_ROOT


def test_presets_are_the_official_sizes():
    heads = {"rn50": 32, "rn101": 32, "rn50x4": 40, "rn50x16": 48}
    sizes = {"rn50": (224, 1024), "rn101": (224, 512), "rn50x4": (288, 640), "rn50x16": (384, 768)}
    for name, make in TRAINING.presets.items():
        config = make()
        assert config.activation == "quick_gelu"
        if name in heads:
            assert config.vision.heads == heads[name] == config.vision.width * 32 // 64
            assert (config.vision.image_size, config.embed_dim) == sizes[name]
    assert TRAINING.presets["rn50x4"]().text == TextConfig(width=640, heads=10)


@pytest.mark.parametrize("keys", [KEYS, KEYS_ROOT], ids=["general", "root"])
@pytest.mark.parametrize("prefix", ["", "module."])
@pytest.mark.parametrize("tower", ["vit", "resnet"])
def test_an_official_checkpoint_loads(keys, prefix, tower):
    vision = VitConfig(image_size=32, patch_size=16, width=128, layers=1, heads=2)
    if tower == "resnet":
        vision = ResNetConfig(image_size=32, width=8, layers=(1, 1, 1, 1), heads=4)
    text = TextConfig(context_length=8, vocab_size=32, width=64, layers=2, heads=1)
    source = Cloob(ClipConfig(24, vision, text)).eval()
    with torch.no_grad():
        source.logit_scale.fill_(math.log(14.3))
    official = {prefix + k: v for k, v in keys.to_official(source.state_dict()).items()}
    loaded = Cloob.from_official(official)
    assert loaded.config == source.config
    assert loaded.logit_inv_tau.exp().item() == pytest.approx(14.3)
    assert not loaded.logit_scale.requires_grad
    assert not loaded.training
    pixels, tokens = torch.randn(2, 3, 32, 32), torch.randint(1, 31, (2, 8))
    torch.testing.assert_close(loaded(pixels, tokens), source(pixels, tokens))


def test_keys_that_do_not_fit_are_listed():
    state = KEYS.to_official(Cloob(tiny()).state_dict())
    del state["transformer.ln_final.bias"]
    with pytest.raises(CheckpointError, match=r"ln_final\.bias"):
        Cloob.from_official(state)
    with pytest.raises(CheckpointError, match="image_encoder"):
        Cloob.from_official({"logit_inv_tau": torch.zeros(()), "image_encoder.weight": torch.zeros(3)})


def test_starts_from_a_clip_and_from_a_stored_configuration():
    clip = model_of()
    started = Cloob.from_clip(clip)
    assert isinstance(started, Encoder)
    assert started.logit_scale.exp().item() == pytest.approx(30)
    for name, tensor in clip.state_dict().items():
        assert name == "logit_scale" or torch.equal(started.state_dict()[name], tensor), name
    with torch.no_grad():
        started.ln_final.bias.fill_(7.0)
    assert clip.ln_final.bias.abs().max() < 7
    assert Cloob.from_config(json.loads(json.dumps(started.config.to_json()))).config == started.config


IMAGE, TEXT = rows(4, 8)
BAD = {
    "batch of one": (lambda: cloob_loss(IMAGE[:1], TEXT[:1]), "at least 2, got 1"),
    "batch of one, trained": (lambda: CloobObjective()(CLIP(tiny()), batch_of(1)), "at least 2, got 1"),
    "batch of one, no retrieval": (
        lambda: CloobObjective(retrieval=False, contrast="infonce")(CLIP(tiny()), batch_of(1)),
        "at least 2",
    ),
    "not normalised": (lambda: cloob_loss(IMAGE, 2 * TEXT), "length one"),
    "other counts": (lambda: cloob_loss(IMAGE, TEXT[:3]), "as many vectors"),
    "other widths": (lambda: recall_all(IMAGE, TEXT[:, :4]), "one width"),
    "beta of zero": (lambda: recall(IMAGE, TEXT, 0.0), "beta"),
    "beta, objective": (lambda: CloobObjective(beta=-1.0), "beta"),
    "inv_tau of zero": (lambda: cloob_loss(IMAGE, TEXT, inv_tau=0.0), "inv_tau"),
    "inv_tau above 100": (lambda: cloob_loss(IMAGE, TEXT, inv_tau=101.0), "inv_tau"),
    "inv_tau, objective": (lambda: CloobObjective(inv_tau=500.0), "inv_tau"),
    "contrast": (lambda: CloobObjective(contrast="triplet"), "triplet"),
    "cycles": (lambda: CloobObjective(cycles=-1), "cycles"),
    "warm-up": (lambda: CloobObjective(warmup_share=1.0), "warmup_share"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input(name):
    call, said = BAD[name]
    with pytest.raises(UsageError, match=said):
        call()


def test_vectors_that_are_not_numbers_reach_the_loss():
    image = IMAGE.clone()
    image[1] = math.nan
    assert not torch.isfinite(cloob_loss(image, TEXT))  # the training loop stops and names the rows


@pytest.mark.slow
def test_the_claim_runs_and_both_arms_learn():
    """Which is better is the claim's to say: three seeds of the full length, in docs/reproduction.md."""
    plain, ours = (run_claim(arm, 7, start=100, steps=100, pairs=4000) for arm in ("clip", "cloob"))
    for figures in (plain, ours):
        assert figures["faint features, top-1"] > 2 * 100 / 6  # twice chance
        assert figures["thing, top-1"] > 2 * 100 / 80
    assert plain["recalled at the start"] == ours["recalled at the start"]
