from __future__ import annotations

import copy
import json

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from moviola.clip.config import ClipConfig, ResNetConfig, TextConfig, VitConfig
from moviola.clip.model import CLIP
from moviola.metrics.continual import average_accuracy, backward_transfer, task_accuracies, with_phase
from moviola.systems.adaptation.vr_lwf import (
    ADAPTATION,
    KEYS,
    Config,
    VrLwf,
    lwf_kl,
    pseudo_sentences,
    run_claim,
    tiny,
)
from moviola.training.continual import FineTune, Lwf, Task, Words, image_vectors, scale_of, text_vectors
from moviola.types import Objective, UsageError

OPENAI = Words(49408, 49406, 49407)
WORDS = Words(32, 30, 31)


def clip(seed=0):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return CLIP(tiny()).eval()


def task(index=1, current=(3, 4, 5), words=WORDS, seed=0):
    names_CL = pseudo_sentences(6, 5, WORDS, 8, torch.Generator().manual_seed(1))
    return Task(index, current, tuple(range(max(current) + 1)), names_CL.unsqueeze(1), words, seed)


def batch(labels=(3, 4, 5, 4), seed=0):
    pixels = torch.randn(len(labels), 3, 16, 16, generator=torch.Generator().manual_seed(seed))
    return {"image": pixels, "label": torch.tensor(labels)}


def method(model, task, teacher=None, **options):
    return VrLwf(model, task, teacher, **{"n_pseudo": 12, "pseudo_length": 6, **options})


# --------------------------------------------------------------------------------------------------
# Parity
# --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def oracle(oracles_dir):
    folder = oracles_dir / "11-vr-lwf"
    return json.loads((folder / "a.json").read_text()), load_file(folder / "a.safetensors")


def official(meta, data, prefix):
    c = meta["config"]
    sizes = {
        tower: {f: c[f"{tower}_{f}"] for f in ("width", "layers", "heads")}
        for tower in ("vision", "transformer")
    }
    vision = VitConfig(c["image_resolution"], c["vision_patch_size"], **sizes["vision"])
    text = TextConfig(c["context_length"], c["vocab_size"], **sizes["transformer"])
    model = CLIP(ClipConfig(c["embed_dim"], vision, text))
    state = {name.removeprefix(prefix): t for name, t in data.items() if name.startswith(prefix)}
    model.load_state_dict(KEYS.from_official(state))
    return model


def test_parity_of_every_output_and_gradient(oracle):
    meta, data = oracle
    c, got = meta["config"], {}
    words, size = (
        Words(c["vocab_size"], c["vocab_size"] - 2, c["vocab_size"] - 1),
        c["classes"] // c["phases"],
    )
    names_CKL, everything = data["in/class_ids"].unsqueeze(1), tuple(range(c["classes"]))
    current = everything[size * c["phase"] : size * (c["phase"] + 1)]
    tasks = {
        "mst": Task(c["phase"], current, everything[: current[-1] + 1], names_CKL, words),
        "ost": Task(0, everything, everything, names_CKL, words),
    }
    for mode, now in tasks.items():
        student, teacher = (official(meta, data, f"param/{who}.") for who in ("student", "teacher"))
        ours = VrLwf(student, now, teacher, alpha=c["alpha"], n_pseudo=c["n_pseudo"])
        shown = {"image": data["in/image"], "label": data[f"in/target_{mode}"]}
        terms = ours.terms(student, shown, data["in/pseudo_ids"])
        total = terms["cross_entropy"] + c["alpha"] * (terms["replayed"] + terms.get("lwf", 0))
        total.backward()
        norm = torch.stack([p.grad.norm() for p in student.parameters()]).norm()
        got |= {f"out/{mode}/loss_total": total, f"out/{mode}/grad_norm": norm}
        got |= {
            f"out/{mode}/loss_{theirs}": terms[name]
            for name, theirs in (("cross_entropy", "ce"), ("replayed", "vr"), ("lwf", "lwf"))
            if name in terms
        }
        parameters = dict(student.named_parameters())
        names = [name.removeprefix(f"grad/{mode}/") for name in data if name.startswith(f"grad/{mode}/")]
        got |= {f"grad/{mode}/{name}": parameters[name].grad for name in names}
    for who, model in (("student", student), ("teacher", teacher)):
        pseudo_PD = text_vectors(model, names_CKL[:0], data["in/pseudo_ids"])[1]
        got[f"out/{who}_pseudo_logits"] = (
            scale_of(model) * image_vectors(model, data["in/image"]) @ pseudo_PD.T
        )
    logits = data["in/kl_student_logits"], data["in/kl_teacher_logits"]
    got |= {"out/lwf_kl": lwf_kl(*logits), "out/lwf_kl_T2": lwf_kl(*logits, 2.0)}
    groups = np.array_split(np.arange(c["classes"]), c["phases"])
    row = task_accuracies(data["in/class_acc"].numpy(), groups)
    matrix = with_phase(data["in/phase_matrix"].numpy(), c["phase"], row)
    got |= {
        "out/mst/phase_matrix_after": torch.from_numpy(matrix),
        "out/mst/phase_accuracy": torch.tensor(average_accuracy(matrix, c["phase"]), dtype=torch.float64),
        "out/mst/bwt": torch.tensor(backward_transfer(matrix, c["phase"]), dtype=torch.float64),
    }
    assert set(got) == {name for name in data if name.startswith(("out/", "grad/"))}
    for name, value in got.items():
        wanted = data[name].double()
        assert value.shape == wanted.shape, name
        tolerance = meta["tolerance_grad" if name.startswith("grad/") else "tolerance"]
        worst = (value.detach().double() - wanted).abs().max()
        assert worst <= tolerance * wanted.abs().max() + 1e-7, f"{name}: {worst:.2e}"


def test_the_masked_form_of_the_official_code_agrees(oracle):
    """All classes encoded, columns that play no part filled with -1e4: the same losses and gradients."""
    model, other, now, shown = clip(), clip(1), task(1, (2, 3)), batch((2, 3, 3, 2))
    ours = method(model, now, other)
    pseudo = ours.sentences()
    found = ours(model, shown)
    torch.stack(list(found.values())).sum().backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()

    def logits(tower):
        text_ND = F.normalize(tower.encode_text(torch.cat([now.tokens_CKL[:, 0], pseudo])), dim=-1)
        image_BD = F.normalize(tower.encode_image(shown["image"]), dim=-1)
        return (tower.logit_scale.exp() * image_BD @ text_ND.T).split([6, 12], dim=1)

    (mine, mine_p), (taught, taught_p) = logits(model), [x.detach() for x in logits(other)]
    columns = torch.arange(6)
    masked = mine.masked_fill(~torch.isin(columns, torch.tensor(now.current)), -1e4)
    loss = F.cross_entropy(masked, shown["label"])
    for a, b in ((mine_p, taught_p), *[[x.masked_fill(columns > 3, -1e4) for x in (mine, taught)]]):
        loss = loss + 0.5 * F.kl_div(a.log_softmax(1), b.softmax(1), reduction="batchmean")
    loss.backward()
    torch.testing.assert_close(torch.stack(list(found.values())).sum(), loss, rtol=1e-5, atol=1e-6)
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(gradients[name], parameter.grad, rtol=1e-4, atol=1e-6)


# --------------------------------------------------------------------------------------------------
# Pseudo sentences
# --------------------------------------------------------------------------------------------------


def test_the_layout_of_pseudo_sentences():
    drawn = pseudo_sentences(1000, 10, OPENAI, 77, torch.Generator().manual_seed(3))
    assert drawn.shape == (1000, 77)
    assert drawn.dtype == torch.int64
    assert (drawn[:, 0] == 49406).all()
    assert (drawn[:, 9] == 49407).all()
    assert (drawn[:, 10:] == 0).all()
    inner = drawn[:, 1:9]
    assert inner.min() >= 0
    assert inner.max() <= 49406 - 2
    assert (drawn.argmax(1) == 9).all()
    assert len(inner.unique()) > 6000
    # the same numbers as the official draw from the same generator
    torch.manual_seed(3)
    theirs = torch.randint(high=49406 - 1, size=(1000, 10))
    assert torch.equal(theirs[:, 1:9], inner)


@settings(max_examples=60, deadline=None)
@given(st.integers(6, 60), st.data())
def test_any_place_of_start_and_end(size, data):
    start, end, pad = (data.draw(st.integers(0, size - 1)) for _ in range(3))
    if start == end:
        return
    drawn = pseudo_sentences(40, 6, Words(size, start, end, pad), 9, torch.Generator().manual_seed(0))
    inner = drawn[:, 1:5]
    assert not (inner == end).any()
    assert not (inner == start).any()
    assert pad == 0 or not (inner == pad).any()
    assert ((drawn == end).int().argmax(1) == 5).all() or end == start


def test_a_tower_that_pools_at_a_given_id_finds_the_end():
    text = TextConfig(context_length=8, vocab_size=32, width=16, layers=1, heads=2, eot_id=1)
    model = CLIP(ClipConfig(16, tiny().vision, text))
    drawn = pseudo_sentences(50, 6, Words(32, 7, 1), 8, torch.Generator().manual_seed(0))
    assert (model.eot_positions(drawn) == 5).all()
    method(model, task(words=Words(32, 7, 1)))


def test_sentences_are_drawn_anew_at_every_step_and_the_same_after_a_restart():
    model = clip()
    ours, again = method(model, task()), method(model, task())
    first = ours.sentences()
    assert torch.equal(ours.sentences(), first)
    before = torch.get_rng_state()
    ours.after_step(model)
    second = ours.sentences()
    assert torch.equal(torch.get_rng_state(), before)
    assert not torch.equal(second, first)
    again.load_state_dict(ours.state_dict())
    assert torch.equal(again.sentences(), second)
    assert not torch.equal(method(model, task(seed=1)).sentences(), first)
    assert not torch.equal(method(model, task(2, (3, 4, 5))).sentences(), first)


# --------------------------------------------------------------------------------------------------
# The loss
# --------------------------------------------------------------------------------------------------


def test_nothing_is_taught_while_student_and_teacher_are_equal():
    model = clip()
    ours = method(model, task())
    terms = ours.terms(model, batch(), ours.sentences())
    for name in ("replayed", "lwf"):
        model.zero_grad()
        assert terms[name].item() == pytest.approx(0, abs=1e-6)
        terms[name].backward(retain_graph=True)
        assert max(p.grad.abs().max() for p in model.parameters() if p.grad is not None) < 1e-5
    with torch.no_grad():
        model.visual.proj.mul_(torch.linspace(0.5, 1.5, model.visual.proj.shape[1]))
    assert ours.terms(model, batch(), ours.sentences())["replayed"] > 1e-5


def test_the_teacher_is_the_model_at_the_start_of_the_task_and_stays():
    model, shown = clip(), batch()
    first = method(model, task())
    start = {name: t.clone() for name, t in model.state_dict().items()}
    optimizer = torch.optim.AdamW(first.param_groups(model), lr=1e-2)
    for _ in range(3):
        torch.stack(list(first(model, shown).values())).sum().backward()
        optimizer.step()
        optimizer.zero_grad()
        first.after_step(model)
    assert all(torch.equal(t, start[name]) for name, t in first.teacher.state_dict().items())
    assert not first.teacher.training
    assert not any(p.requires_grad for p in first.teacher.parameters())
    assert any(not torch.equal(t, start[name]) for name, t in model.state_dict().items())
    second = method(model, task(2, (3, 4, 5)))
    assert all(torch.equal(t, model.state_dict()[name]) for name, t in second.teacher.state_dict().items())
    assert set(first.state_dict()) == {"steps_done"}  # a checkpoint does not hold the teacher


def test_names_of_other_tasks_get_no_gradient_from_the_cross_entropy():
    model, now = clip(), task(1, (2, 3))
    names = now.tokens_CKL.clone()
    for row in range(6):
        names[row, 0, 1:4] = torch.arange(3) + 3 * row  # no two classes share a word
    now = Task(1, (2, 3), (0, 1, 2, 3), names, WORDS)
    ours = method(model, now)
    ours.terms(model, batch((2, 3)), ours.sentences())["cross_entropy"].backward()
    moved = model.token_embedding.weight.grad.abs().sum(1) > 0
    assert moved[6:12].all()
    assert not moved[:6].any()
    assert not moved[12:18].any()


def test_lwf_is_absent_in_the_first_task_and_when_all_are_learned_at_once():
    model = clip()
    names = {"cross_entropy", "replayed"}
    assert set(method(model, task(0, (0, 1, 2)))(model, batch((0, 1)))) == names
    assert set(method(model, task(0, tuple(range(6))))(model, batch((0, 5)))) == names
    assert set(method(model, task(1))(model, batch())) == names | {"lwf"}


def test_batch_norm_keeps_its_statistics_so_that_student_and_teacher_begin_equal():
    vision = ResNetConfig(image_size=32, width=8, layers=(1, 1, 1, 1), heads=4)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = CLIP(ClipConfig(16, vision, tiny().text)).train()
        with torch.no_grad():
            model.encode_image(3 * torch.randn(8, 3, 32, 32) + 1)
    held = {name: t.clone() for name, t in model.state_dict().items() if "running" in name}
    shown = {**batch(), "image": F.interpolate(batch()["image"], scale_factor=2.0)}
    losses = method(model.train(), task())(model, shown)
    assert losses["replayed"].item() == pytest.approx(0, abs=1e-6)
    assert losses["lwf"].item() == pytest.approx(0, abs=1e-6)
    assert all(torch.equal(t, model.state_dict()[name]) for name, t in held.items())


def test_alpha_weighs_both_distillations():
    model, other = clip(), clip(1)
    ours, heavier = (method(model, task(), other, alpha=alpha) for alpha in (0.5, 2.0))
    a, b = ours(model, batch()), heavier(model, batch())
    for name in a:
        torch.testing.assert_close(b[name], a[name] * (1 if name == "cross_entropy" else 4))


def test_the_rate_falls_only_where_all_classes_are_learned_at_once():
    model = clip()
    whole, one = method(model, task(0, tuple(range(6)))), method(model, task())
    assert [whole.lr_factors(step, 15) for step in (0, 9, 10, 14)] == [[1.0], [1.0], [0.1], [0.1]]
    assert one.lr_factors(14, 15) == [1.0]


def test_parts_and_layers():
    for part, wanted in (("image", "visual."), ("text", "")):
        model = clip()
        ours = method(model, task(), clip(1), part=part)
        torch.stack(list(ours(model, batch()).values())).sum().backward()
        trained = {name for name, p in model.named_parameters() if p.grad is not None}
        assert trained == set(ours.trained)
        assert "logit_scale" in trained
        towers = {name.startswith("visual.") for name in trained - {"logit_scale"}}
        assert towers == {wanted == "visual."}
    vision = VitConfig(image_size=16, patch_size=8, width=16, layers=3, heads=2)
    text = TextConfig(context_length=8, vocab_size=32, width=16, layers=3, heads=2)
    model = CLIP(ClipConfig(16, vision, text))
    trained = method(model, task(), above=1).trained
    assert {"visual.proj", "text_projection", "ln_final.weight", "logit_scale"} <= set(trained)
    assert all(".2." in name for name in trained if "resblocks" in name)
    assert not any("embedding" in name or "conv1" in name or "ln_pre" in name for name in trained)


def test_it_is_an_objective_and_the_authors_values_are_the_defaults():
    model = clip()
    assert isinstance(method(model, task()), Objective)
    assert Config() == Config(100, 10, 0.5, 1.0, "both", None)
    assert Config.from_json(json.loads(json.dumps(Config(above=3).to_json()))) == Config(above=3)
    assert ADAPTATION.recipe["lr"] == 1e-6
    assert set(ADAPTATION.sequence) >= {"vr-lwf", "lwf", "fine-tune", "imm"}


# --------------------------------------------------------------------------------------------------
# Bad input
# --------------------------------------------------------------------------------------------------

BAD = {
    "one sentence": (lambda: method(clip(), task(), n_pseudo=1), "at least 2"),
    "no sentence": (lambda: pseudo_sentences(0, 10, OPENAI), "at least one"),
    "too short": (lambda: method(clip(), task(), pseudo_length=2), "3 to 8 tokens"),
    "too long": (lambda: method(clip(), task(), pseudo_length=9), "3 to 8 tokens"),
    "longer than 77": (lambda: pseudo_sentences(5, 78, OPENAI), "3 to 77 tokens"),
    "start is end": (lambda: pseudo_sentences(5, 10, Words(50, 49, 49)), "two different ids"),
    "no such start": (lambda: pseudo_sentences(5, 10, Words(50, 50, 49)), "two different ids"),
    "end not the largest": (lambda: method(clip(), task(words=Words(32, 31, 30))), "largest id"),
    "no words": (lambda: method(clip(), task(words=None)), "which words"),
    "nothing left to draw": (lambda: pseudo_sentences(5, 4, Words(2, 0, 1)), "none left"),
    "alpha below 0": (lambda: method(clip(), task(), alpha=-0.1), "alpha must not be negative"),
    "alpha nan": (lambda: method(clip(), task(), alpha=float("nan")), "alpha must not be negative"),
    "temperature": (lambda: lwf_kl(torch.ones(2, 3), torch.ones(2, 3), 0.0), "temperature"),
    "other columns": (lambda: lwf_kl(torch.ones(2, 3), torch.ones(2, 4)), "one shape"),
    "part": (lambda: method(clip(), task(), part="wm"), "both, image or text"),
    "above": (lambda: method(clip(), task(), above=1), "no block above"),
    "empty task": (lambda: task(current=(3, 4)).__class__(0, (), (0,), task().tokens_CKL), "no class"),
    "class twice": (lambda: Task(0, (1, 1), (0, 1), task().tokens_CKL), "twice"),
    "class not seen": (lambda: Task(1, (4,), (0, 1), task().tokens_CKL), "among those seen"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input(name):
    call, said = BAD[name]
    with pytest.raises(UsageError, match=said):
        call()


def test_a_label_of_another_task_is_refused_not_a_huge_loss():
    model = clip()
    for made in (FineTune, Lwf, method):
        with pytest.raises(UsageError, match=r"pictures of \[1\]"):
            made(model, task())(model, batch((3, 1)))


def test_a_teacher_that_is_the_model_is_refused():
    model = clip()
    with pytest.raises(UsageError, match="shares its weights"):
        method(model, task(), model)
    method(model, task(), copy.deepcopy(model))


@pytest.mark.slow
def test_the_claim_runs_and_every_arm_learns():
    """Which is better is the claim's to say: three seeds of the full length, in docs/reproduction.md."""
    short = {"start": 60, "steps": 30, "pairs": 2000}
    figures = {arm: run_claim(arm, 7, **short) for arm in ("fine-tune", "vr-lwf")}
    for found in figures.values():
        assert found["tuned, top-1"] > found["tuned before"]
        assert found["untouched before"] == figures["vr-lwf"]["untouched before"]
