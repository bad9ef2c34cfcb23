"""ProtoCLIP against what the authors' code computes, and what its card says must hold."""

from __future__ import annotations

import json
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file

from moviola.clip.config import ClipConfig, ResNetConfig, TextConfig, VitConfig
from moviola.clip.loaded import Model
from moviola.clip.model import CLIP
from moviola.metrics.classification import topk_accuracy
from moviola.parts.clip_heads import projection_head
from moviola.systems.pretraining import protoclip as system
from moviola.systems.pretraining.protoclip import (
    KEYS,
    TRAINING,
    ProtoClip,
    ProtoClipConfig,
    ProtoClipObjective,
    back_translate,
    example,
    mean_targets,
    prototypical_loss,
    run_claim,
    tiny,
)
from moviola.training.caching import compute
from moviola.training.config import TrainConfig
from moviola.training.episodes import RowsToCome
from moviola.training.loop import train
from moviola.training.nce import info_nce
from moviola.training.processes import Processes
from moviola.training.schedule import warmup_cosine, windowed_cosine
from moviola.types import CheckpointError, Encoder, PairObjective, Refusal, UsageError, VectorField


@pytest.fixture(scope="module")
def oracle(oracles_dir):
    folder = oracles_dir / "48-protoclip"
    return json.loads((folder / "a.json").read_text()), load_file(folder / "a.safetensors")


def config_of(meta):
    c = meta["config"]
    return replace(
        tiny(),
        embed_dim=c["embed_dim"],
        head_layers=c["projection_n_layers"],
        head_width=c["projection_hidden_dim"],
        head_dim=c["projection_dim"],
    )


@pytest.fixture
def model(oracle):
    meta, data = oracle
    made = ProtoClip(config_of(meta))
    heads = {k.removeprefix("param/"): v for k, v in data.items() if k.startswith("param/")}
    KEYS.load(made, made.state_dict() | heads)
    return made


@pytest.fixture
def objective(oracle):
    """The oracle's episode: its 60 rows are numbered 0 to 59."""
    _, data = oracle
    made = ProtoClipObjective(external_teacher=True)
    tables = {"rows": torch.arange(60)}
    for name, short in (("image", "img"), ("text", "text"), ("external", "ext")):
        tables[f"{name}_centroids"] = data[f"in/centroids_{short}"]
        tables[f"{name}_labels"] = data[f"in/{name}_labels"]
    made.set_clusters(tables, data["in/episode_image_features"], data["in/episode_text_features"])
    made.index, made.count = 1, 3
    return made


def same(got, data, name, tolerance=1e-5):
    wanted = data[name].double()
    got = torch.as_tensor(got, dtype=torch.float64)
    assert got.shape == wanted.shape, name
    worst = ((got - wanted).abs() / (1 + wanted.abs())).max()
    assert worst <= tolerance, f"{name}: {worst:.2e}"


def outputs_of(data, image, text):
    return {
        "image": image,
        "text": text,
        "row": data["in/batch_index"],
        "logit_scale": data["in/logit_scale"].log(),
        "logit_scale_proto": data["in/logit_scale_proto"].log(),
    }


def test_parity_of_every_output(oracle, model, objective):
    """All out/* tensors of the authors' code, and nothing left uncompared."""
    meta, data = oracle
    image, text = data["in/image_tower"], data["in/text_tower"]
    got = {}
    got["eval_image_projected"], got["eval_text_projected"] = model.eval().project(image, text)
    model.train()
    got["train_image_projected"], got["train_text_projected"] = model.project(image, text)
    tables = objective.tables
    for ours, theirs in (("image", "img"), ("text", "text")):
        got[f"pbt_{theirs}_from_ext"] = tables[f"{ours}_from_external"]
    got["pbt_img_from_text"], got["pbt_text_from_img"] = tables["image_from_text"], tables["text_from_image"]
    losses = objective.loss(model, outputs_of(data, image, text))
    got["L_clip"], got["L_proto"] = losses["contrastive"], losses["prototypical"]
    got["L_ext"], got["total"] = losses["external"], sum(losses.values())
    row = data["in/batch_index"]
    z = got["train_image_projected"], got["train_text_projected"]
    terms = objective.terms(*z, row, data["in/logit_scale_proto"])
    percent = []
    for student, teacher, features in objective._pairs(*z):
        short = [{"image": "img", "external": "ext"}.get(name, name) for name in (student, teacher)]
        got[f"L_proto_{short[0]}2{short[1]}"] = terms[f"{student}_to_{teacher}"]
        scores = (features @ tables[f"{student}_from_{teacher}"].T).detach().numpy()
        labels = tables[f"{teacher}_labels"][row].numpy()
        percent.append(topk_accuracy(scores, labels, (1,))["top1"])
    got["accuracies"] = torch.tensor(percent, dtype=torch.float64)

    c = meta["config"]["scheduler"]
    rates = [
        [
            c["visual_base_lr"] * windowed_cosine(s, start=0, end=c["visual_steps"], warmup=c["warmup"]),
            c["text_base_lr"]
            * windowed_cosine(s, start=c["text_start_step"], end=c["text_end_step"], warmup=c["warmup"]),
        ]
        for s in range(c["total_steps"] + 2)
    ]
    got["lr_visual_text"] = torch.tensor(rates, dtype=torch.float64)
    plain = [warmup_cosine(s, steps=c["total_steps"], warmup=c["warmup"]) for s in range(c["total_steps"])]
    got["lr_plain_cosine"] = c["visual_base_lr"] * torch.tensor(plain, dtype=torch.float64)

    assert set(got) == {name.removeprefix("out/") for name in data if name.startswith("out/")}
    for name, value in got.items():
        tolerance = 1e-12 if name.startswith("lr_") else meta["tolerance"]
        same(value, data, f"out/{name}", tolerance)


def test_the_order_of_accuracies_is_the_oracles(objective):
    z = torch.zeros(1, 16)
    order = [f"{student}2{teacher}" for student, teacher, _ in objective._pairs(z, z)]
    assert order == ["image2text", "text2image", "image2external", "text2external"]


def test_parity_of_every_gradient(oracle, model, objective):
    meta, data = oracle
    image, text = (data[f"in/{name}_tower"].clone().requires_grad_() for name in ("image", "text"))
    model.train()
    sum(objective.loss(model, outputs_of(data, image, text)).values()).backward()
    got = {k: p.grad for k, p in model.named_parameters() if p.grad is not None}
    got = KEYS.to_official(got) | {"image_tower": image.grad, "text_tower": text.grad}
    wanted = [name for name in data if name.startswith("grad/")]
    assert set(got) == {name.removeprefix("grad/") for name in wanted}
    for name in wanted:
        same(got[name.removeprefix("grad/")], data, name, meta["tolerance"])


def test_the_schedule_of_the_objective_is_the_oracles(oracle):
    """60 steps in 4 episodes of 15, 6 of them warm-up: the image tower's cosine ends at 45."""
    meta, data = oracle
    c, objective = meta["config"]["scheduler"], ProtoClipObjective(warmup_share=0.1)
    rates = data["out/lr_visual_text"]
    for step in range(60):
        objective.index, objective.count = step // 15, 4
        factors = objective.lr_factors(step, 60)
        assert factors[:2] == pytest.approx([rates[step, 0].item() / c["visual_base_lr"]] * 2, abs=1e-12)
        assert factors[2:] == pytest.approx([rates[step, 1].item() / c["text_base_lr"]] * 2, abs=1e-12)
    objective.index = 3
    assert objective.lr_factors(44, 60)[0] == 0  # whatever the length of an episode, the last one is locked
    unlocked = ProtoClipObjective(lock_image=False)
    unlocked.index, unlocked.count = 3, 4
    assert unlocked.lr_factors(50, 60)[0] == unlocked.lr_factors(50, 60)[2] > 0
    assert windowed_cosine(3, start=5, end=9, warmup=2) == 0
    assert windowed_cosine(10, start=5, end=9, warmup=2) == 0


# ------------------------------------------------------------------------------------- invariants


def clustered(rows=40, clusters=6, dim=8, seed=0):
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(clusters - 1, (rows,), generator=generator)  # the last one is empty
    student = F.normalize(torch.randn(rows, dim, generator=generator), dim=1)
    return labels, student, torch.randn(clusters, dim, generator=generator)


def test_a_translated_prototype_is_the_mean_of_its_members():
    labels, student, _ = clustered()
    got = back_translate(labels, student, 6)
    for k in range(5):
        torch.testing.assert_close(got[k], student[labels == k].mean(0))
    assert not got[5].any()
    with pytest.raises(UsageError, match="from 0 to 5"):
        back_translate(labels + 2, student, 6)


def loss_of(labels, student, teacher, temperature, translate=True):
    prototypes = back_translate(labels, student, len(teacher)) if translate else teacher
    targets = mean_targets(prototypes, teacher, temperature)
    return prototypical_loss(student[:9], prototypes, targets, labels[:9], torch.tensor(5.0))


def test_the_loss_is_the_soft_cross_entropy_written_out():
    labels, student, teacher = clustered()
    prototypes = back_translate(labels, student, 6)
    logits = 5 * student[:9] @ prototypes.T
    for temperature in (0.01, 0.5):
        soft = (teacher[labels[:9]] @ teacher.T / temperature).softmax(1)
        wanted = -(soft * logits.log_softmax(1)).sum(1).mean()
        torch.testing.assert_close(loss_of(labels, student, teacher, temperature), wanted)
    torch.testing.assert_close(loss_of(labels, student, teacher, 0.0), F.cross_entropy(logits, labels[:9]))


def test_the_teachers_space_does_not_matter_with_hard_labels():
    """A made modality gap: the teacher turned, stretched and moved away. Its partition stays."""
    labels, student, teacher = clustered()
    turn, _ = torch.linalg.qr(torch.randn(8, 8, generator=torch.Generator().manual_seed(1)))
    gapped = 3 * teacher @ turn + 7
    kept = loss_of(labels, student, teacher, 0.0)
    assert torch.equal(loss_of(labels, student, gapped, 0.0), kept)
    other = torch.randn(6, 31)  # not even as wide
    assert torch.equal(loss_of(labels, student, other, 0.0), kept)
    plain = loss_of(labels, student, teacher, 0.0, translate=False)
    assert (loss_of(labels, student, gapped, 0.0, translate=False) - plain).abs() > 0.1


def test_a_soft_target_becomes_hard_as_its_temperature_falls():
    labels, student, teacher = clustered()
    teacher = F.normalize(teacher, dim=1)
    prototypes = back_translate(labels, student, 6)
    gaps = [(mean_targets(prototypes, teacher, t) - prototypes).abs().max() for t in (1.0, 0.1, 0.01, 1e-3)]
    assert gaps == sorted(gaps, reverse=True)
    assert gaps[-1] < 1e-6


def test_bands_change_neither_loss_nor_gradients(monkeypatch):
    labels, student, teacher = clustered()
    results = []
    for logits in (1 << 24, 20):
        monkeypatch.setattr("moviola.training.clusters._LOGITS", logits)
        z, scale = student.clone().requires_grad_(), torch.tensor(4.0, requires_grad=True)
        prototypes = back_translate(labels, student, 6)
        targets = mean_targets(prototypes, teacher, 0.1)
        loss = prototypical_loss(z, prototypes, targets, labels, scale)
        loss.backward()
        results.append((loss.detach(), z.grad, scale.grad))
    for whole, banded in zip(*results, strict=True):
        torch.testing.assert_close(whole, banded)


def test_prototypes_carry_no_gradient_and_towers_are_reached_through_the_heads(oracle, model, objective):
    _, data = oracle
    for name in ("image_from_text", "image_from_text_target", "text_from_image"):
        objective.tables[name].requires_grad_()
    image, text = (data[f"in/{name}_tower"].clone().requires_grad_() for name in ("image", "text"))
    model.train()
    losses = objective.loss(model, outputs_of(data, image, text))
    losses["prototypical"].backward(retain_graph=True)
    assert all(objective.tables[n].grad is None for n in ("image_from_text", "image_from_text_target"))
    assert image.grad.abs().max() > 0
    cut = [p for head in (model.image_projection_head, model.text_projection_head) for p in head.parameters()]
    with torch.no_grad():
        for parameter in cut:
            parameter.mul_(0)
    image.grad = text.grad = None
    objective.loss(model, outputs_of(data, image, text))["prototypical"].backward()
    assert not image.grad.any()  # nothing passes beside the heads
    assert not text.grad.any()


# ------------------------------------------------------------------------------------ checkpoints

BLOCK = [
    "attn.in_proj_weight", "attn.in_proj_bias", "attn.out_proj.weight", "attn.out_proj.bias",
    "ln_1.weight", "ln_1.bias", "ln_2.weight", "ln_2.bias",
    "mlp.c_fc.weight", "mlp.c_fc.bias", "mlp.c_proj.weight", "mlp.c_proj.bias",
]  # fmt: skip


def norm(prefix):
    kinds = ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")
    return {f"{prefix}.{kind}" for kind in kinds}


def official_names():
    """A ProtoCLIP of RN50: OpenCLIP 1.2.1's names and the heads' (README's settings)."""
    names = {"logit_scale", "logit_scale_proto", "text_projection", "positional_embedding"}
    names |= {"token_embedding.weight", "ln_final.weight", "ln_final.bias"}
    names |= {f"transformer.resblocks.{n}.{part}" for n in range(12) for part in BLOCK}
    for n in (1, 2, 3):
        names |= {f"visual.conv{n}.weight"} | norm(f"visual.bn{n}")
    for layer, count in enumerate((3, 4, 6, 3), start=1):
        for block in range(count):
            for n in (1, 2, 3):
                names |= {f"visual.layer{layer}.{block}.conv{n}.weight"}
                names |= norm(f"visual.layer{layer}.{block}.bn{n}")
        names |= {f"visual.layer{layer}.0.downsample.0.weight"} | norm(f"visual.layer{layer}.0.downsample.1")
    names.add("visual.attnpool.positional_embedding")
    for part in ("q_proj", "k_proj", "v_proj", "c_proj"):
        names |= {f"visual.attnpool.{part}.{kind}" for kind in ("weight", "bias")}
    for head in ("text_projection_head", "image_projection_head"):
        names |= {f"{head}.{n}.{kind}" for n in (0, 3) for kind in ("weight", "bias")} | norm(f"{head}.1")
    return names


def test_keys_read_the_full_official_list_of_rn50():
    with torch.device("meta"):
        model = ProtoClip(TRAINING.presets["rn50"]())
    state = model.state_dict()
    assert set(KEYS.to_official(state)) == official_names()
    assert set(KEYS.from_official(state)) == set(state)
    assert state["text_projection_head.0.weight"].shape == (2048, 1024)
    assert state["image_projection_head.3.weight"].shape == (128, 2048)


TOWERS = {
    "vit": VitConfig(image_size=32, patch_size=16, width=64, layers=1, heads=1),
    "resnet": ResNetConfig(image_size=64, width=8, layers=(1, 1, 1, 1), heads=4),
}


def small(tower="vit", **heads):
    text = TextConfig(context_length=8, vocab_size=32, width=64, layers=1, heads=1)
    return ProtoClipConfig(16, TOWERS[tower], text, **{"head_width": 12, "head_dim": 8, **heads})


@pytest.mark.parametrize("tower", ["vit", "resnet"])
@pytest.mark.parametrize("layers", [0, 1, 2])
def test_official_checkpoints_load(tower, layers):
    torch.manual_seed(0)
    config = small(tower, head_layers=layers, **({} if layers else {"head_width": 2048}))
    wanted = ProtoClip(config).eval()
    state = {f"module.{k}": v for k, v in wanted.state_dict().items()}  # as DistributedDataParallel saves
    got = ProtoClip.from_official(state)
    assert got.config == config
    assert not got.training
    pixels = torch.randn(2, 3, *(2 * [config.vision.image_size]))
    tokens = torch.tensor([[1, 5, 31, 0, 0, 0, 0, 0]] * 2)
    for a, b in ((got.encode_image(pixels), wanted.encode_image(pixels)),
                 (got.encode_text(tokens), wanted.encode_text(tokens))):  # fmt: skip
        assert torch.equal(a, b)
    assert all(map(torch.equal, got.project(a, b), wanted.project(a, b)))


def test_checkpoints_that_are_no_protoclip():
    state = ProtoClip(small()).state_dict()
    bare = {k: v for k, v in state.items() if "projection_head" not in k and k != "logit_scale_proto"}
    with pytest.raises(CheckpointError, match="no projection heads"):
        ProtoClip.from_official(bare)
    with pytest.raises(CheckpointError, match=r"missing: image_projection_head\.0\.bias"):
        ProtoClip.from_official({k: v for k, v in state.items() if k != "image_projection_head.0.bias"})
    with pytest.raises(CheckpointError, match="1 unexpected: extra"):
        ProtoClip.from_official(state | {"extra": torch.zeros(1)})
    with pytest.raises(CheckpointError, match="lacks text_projection"):
        ProtoClip.from_official({k: v for k, v in state.items() if k != "text_projection"})


def plain_clip(tower="vit"):
    torch.manual_seed(3)
    config = small(tower)
    return CLIP(ClipConfig(config.embed_dim, config.vision, config.text, config.activation)).eval()


@pytest.mark.parametrize("tower", ["vit", "resnet"])
def test_from_a_clip_and_back(tower):
    clip = plain_clip(tower)
    torch.manual_seed(11)
    before = torch.get_rng_state()
    made = ProtoClip.from_clip(clip)
    assert torch.equal(torch.get_rng_state(), before)
    assert isinstance(made, Encoder)
    assert made.config.head_width == 2048
    again = ProtoClip.from_clip(clip)
    assert all(map(torch.equal, made.state_dict().values(), again.state_dict().values()))
    heads = made.text_projection_head.state_dict(), made.image_projection_head.state_dict()
    assert all(torch.equal(heads[0][k], heads[1][k]) for k in heads[0])
    assert made.image_projection_head[0].weight is not made.text_projection_head[0].weight
    back = made.to_clip()
    assert type(back) is CLIP
    assert set(back.state_dict()) == set(clip.state_dict())
    assert all(torch.equal(v, clip.state_dict()[k]) for k, v in back.state_dict().items())
    assert TRAINING.start(made) is made
    assert isinstance(TRAINING.start(clip), ProtoClip)
    with pytest.raises(Refusal, match="starts from a CLIP, got a Linear"):
        ProtoClip.from_clip(torch.nn.Linear(2, 2))


def test_a_model_folder_of_its_own(tmp_path):
    """It embeds as the CLIP it is, from a folder too."""
    clip = plain_clip()
    made = ProtoClip.from_clip(clip)
    model = Model(made, config=made.config.to_json(), system="protoclip", device="cpu")
    plain = Model(clip, config=clip.config.to_json(), device="cpu")
    frames = np.random.default_rng(0).integers(0, 255, (2, 40, 50, 3), np.uint8)
    np.testing.assert_array_equal(model.embed_frames(frames), plain.embed_frames(frames))
    assert model.recipe.size == (32, 32)
    config = json.loads(json.dumps(made.config.to_json()))
    assert ProtoClip.from_config(config).config == made.config


def test_heads_of_every_depth():
    for layers in (0, 1, 3):
        head = projection_head(6, replace(tiny(), head_layers=layers, head_width=5, head_dim=4))
        assert len(head) == 3 * layers + 1
        assert head(torch.randn(7, 6)).shape == (7, 4)


# ----------------------------------------------------------------------------------------- training


class Things:
    """Pairs of one of four kinds; the token and the picture's channel say which."""

    def __init__(self, count=64, broken=(), teacher=True):
        rng = np.random.default_rng(0)
        self.kind = rng.integers(4, size=count)
        shade = np.eye(4)[self.kind][:, :3].astype(np.float32)
        self.image = torch.from_numpy(
            shade[..., None, None] + 0.3 * rng.standard_normal((count, 3, 16, 16)).astype(np.float32)
        )
        for row in broken:
            self.image[row] = math.nan
        self.text = torch.zeros(count, 8, dtype=torch.int64)
        self.text[:, 0] = torch.from_numpy(self.kind + 1)
        self.text[:, 1], self.text[:, 2] = torch.from_numpy(rng.integers(5, 30, count)), 31
        self.teacher = torch.from_numpy(
            (np.eye(4)[self.kind] @ rng.standard_normal((4, 5))).astype(np.float32)
        )

    def __len__(self):
        return len(self.image)

    def batch(self, rows, *, seed, epoch, step):
        rows = torch.as_tensor(rows)
        return {
            "row": rows,
            "image": self.image[rows],
            "text": self.text[rows],
            "external_teacher": self.teacher[rows],
        }


def make(seed=0, **options):
    torch.manual_seed(seed)
    model = ProtoClip(tiny())
    return model, ProtoClipObjective(model, prototypes=4, weight_decay=0.1, **options)


def episode(model, data, rows, index=1, count=3):
    def load(rows):
        return data.batch(rows, seed=0, epoch=0, step=0)

    return RowsToCome(index, count, rows, model, load, Processes(), 16)


CONFIG = TrainConfig(steps=24, batch_size=8, lr=3e-3, episode_steps=4, save_every=6, log_every=1, warmup=2)


def losses(folder):
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    names = ("contrastive", "prototypical", "external")
    return {line["step"]: [line[n] for n in names if n in line] for line in lines}


def test_keeps_the_protocols():
    _, objective = make()
    assert isinstance(objective, PairObjective)
    assert [f.name for f in objective.needs.fields] == ["image", "text"]
    fields = ProtoClipObjective(external_teacher=True).needs.fields
    assert fields[2] == VectorField("external_teacher", "teacher")
    assert {"lr", "betas", "eps", "clip_grad", "batch_size"} <= set(TRAINING.recipe)
    TrainConfig(steps=1, **TRAINING.recipe)


@pytest.mark.parametrize("options", [{}, {"back_translation": False}, {"external_teacher": True},
                                     {"target_temperature": -1.0}])  # fmt: skip
def test_training_learns(tmp_path, options):
    model, objective = make(**options)
    config = replace(CONFIG, steps=60, episode_steps=10, log_every=1)
    train(model, objective, Things(), config, tmp_path)
    got = losses(tmp_path)
    contrastive, prototypical = (np.array([got[s][n] for s in range(1, 61)]) for n in (0, 1))
    assert contrastive[45:].mean() < 0.9 * contrastive[:5].mean()
    assert not prototypical[:10].any()  # the first episode is CLIP's loss alone, and so is the last
    assert not prototypical[50:].any()
    assert prototypical[40:50].mean() < 0.8 * prototypical[10:15].mean()
    if "external_teacher" in options:
        assert got[45][2] < got[12][2]


def test_the_clusters_of_an_episode_are_the_kinds():
    model, objective = make()
    data = Things()
    with torch.no_grad():  # texts that are their kind alone are easy to cluster
        data.text[:, 1] = 5
    objective.on_episode(model, episode(model, data, list(range(63, -1, -1))))
    tables = objective.tables
    assert tables["rows"].tolist() == list(range(64))
    labels = tables["text_labels"].numpy()
    assert len(set(zip(labels.tolist(), data.kind.tolist(), strict=True))) == 4
    with torch.no_grad():
        image, _ = model.eval().project(model.encode_image(data.image), model.encode_text(data.text))
    for kind in range(4):
        mine = torch.from_numpy(np.flatnonzero(data.kind == kind))
        label = int(labels[mine[0]])
        torch.testing.assert_close(tables["image_from_text"][label], image[mine].mean(0), atol=1e-5, rtol=0)


def test_the_order_of_an_episodes_rows_does_not_matter():
    model, objective = make()
    data, tables = Things(), []
    for rows in (range(64), np.random.default_rng(1).permutation(64).tolist()):
        objective.on_episode(model, episode(model, data, rows))
        tables.append(objective.tables)
    for name in tables[0]:
        torch.testing.assert_close(tables[0][name], tables[1][name], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("stop", [6, 11, 14])
def test_a_run_killed_inside_an_episode_resumes_with_its_clusters(tmp_path, stop):
    """Saves are at 6, 12, ...: inside episodes of 4 steps, whose clusters are of older weights."""
    options = {"external_teacher": True}
    whole, objective = make(**options)
    train(whole, objective, Things(), CONFIG, tmp_path / "whole")
    killed, objective = make(**options)
    train(killed, objective, Things(), CONFIG, tmp_path / "killed", stop_at=stop)
    resumed, objective = make(seed=1, **options)
    train(resumed, objective, Things(), CONFIG, tmp_path / "killed")
    assert losses(tmp_path / "whole") == losses(tmp_path / "killed")
    for a, b in zip(whole.state_dict().values(), resumed.state_dict().values(), strict=True):
        assert torch.equal(a, b)


def test_running_state_round_trip():
    model, objective = make()
    data = Things()
    objective.on_episode(model, episode(model, data, range(64)))
    other = ProtoClipObjective(prototypes=4)
    other.load_state_dict(objective.state_dict())
    assert (other.index, other.count, other.stage) == (1, 3, "prototypes")
    batch = data.batch(np.arange(8), seed=0, epoch=0, step=0)
    model.eval()
    for name, value in objective(model, batch).items():
        assert torch.equal(value, other(model, batch)[name])


@pytest.mark.parametrize("tower", ["vit", "resnet"])
def test_parts_of_a_batch_give_the_whole_batchs_gradients(tower):
    """Gradient caching: heads and their BatchNorm see the whole batch. A ResNet is compared in eval mode."""
    torch.manual_seed(0)
    config = replace(small(tower), vision=replace(TOWERS[tower], image_size=64 if tower == "resnet" else 32))
    model = ProtoClip(config).train()
    if tower == "resnet":
        model.visual.eval()  # its own BatchNorm would see parts
    size = config.vision.image_size
    torch.manual_seed(1)
    batch = {"row": torch.arange(12), "image": torch.randn(12, 3, size, size),
             "text": torch.randint(1, 31, (12, 8))}  # fmt: skip
    objective = ProtoClipObjective(model, prototypes=3)

    def load(rows):
        return {k: v[rows] for k, v in batch.items()}

    objective.on_episode(model, RowsToCome(1, 3, range(12), model, load, Processes(), 5))
    if tower == "resnet":
        model.visual.eval()
    state, results = {k: v.clone() for k, v in model.state_dict().items()}, []
    for micro in (None, 6, 5):
        model.load_state_dict(state)
        model.zero_grad()
        made = compute(model, objective, batch, micro_batch=micro)
        grads = {k: p.grad.clone() for k, p in model.named_parameters()}
        running = {k: v.clone() for k, v in model.state_dict().items() if "running" in k and "head" in k}
        results.append({**{k: v.detach() for k, v in made.items()}, **grads, **running})
    for part in results[1:]:
        for name, value in results[0].items():
            torch.testing.assert_close(part[name], value, rtol=1e-5, atol=1e-5, msg=name)


def test_groups_of_parameters_and_the_locked_tower():
    model, objective = make()
    groups = objective.param_groups(model)
    assert [g["weight_decay"] for g in groups] == [0.0, 0.1, 0.0, 0.1]
    ids = [{id(p) for p in g["params"]} for g in groups]
    assert sum(map(len, ids)) == len(list(model.parameters()))
    for name, parameter in model.named_parameters():
        exempt = parameter.ndim < 2 or "projection_head" in name
        place = 2 * (not name.startswith("visual.")) + (not exempt)
        assert id(parameter) in ids[place], name
    assert len(objective.lr_factors(0, 10)) == 4
    model.visual.requires_grad_(False)
    assert not objective.param_groups(model)[0]["params"]


def test_the_image_tower_rests_in_the_last_episode(tmp_path):
    model, objective = make()
    train(model, objective, Things(), CONFIG, tmp_path, stop_at=20)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    model, objective = make()
    train(model, objective, Things(), CONFIG, tmp_path, stop_at=24)
    after = model.state_dict()
    moved = {k for k, v in before.items() if not torch.equal(v, after[k])}
    assert not [k for k in moved if k.startswith("visual.")]
    assert "text_projection" in moved


def test_both_temperatures_are_clamped():
    model, objective = make()
    with torch.no_grad():
        model.logit_scale.fill_(9)
        model.logit_scale_proto.fill_(-1)
    objective.after_step(model)
    assert model.logit_scale.item() == pytest.approx(math.log(100))
    assert model.logit_scale_proto.item() == 0


def test_warm_up_is_clips_loss_and_sets_the_heads_statistics():
    model, objective = make(external_teacher=True)
    data = Things()
    objective.on_episode(model, episode(model, data, range(64), index=0))
    assert objective.stage == "warm-up"
    assert not objective.tables
    model.train()
    batch = data.batch(np.arange(8), seed=0, epoch=0, step=0)
    got = objective(model, batch)
    image, text = model.encode_image(batch["image"]), model.encode_text(batch["text"])
    wanted = info_nce(F.normalize(image, dim=1), F.normalize(text, dim=1), model.logit_scale.exp())
    torch.testing.assert_close(got["contrastive"], wanted)
    assert got["prototypical"] == got["external"] == 0
    assert model.image_projection_head[1].running_mean.abs().max() > 0


def test_weights_of_the_terms(oracle, model, objective):
    _, data = oracle
    model.train()
    outputs = outputs_of(data, data["in/image_tower"], data["in/text_tower"])
    plain = objective.loss(model, outputs)
    objective.w_clip, objective.w_proto, objective.w_external = 2.0, 0.5, 0.0
    weighed = objective.loss(model, outputs)
    for name, weight in (("contrastive", 2), ("prototypical", 0.5), ("external", 0)):
        torch.testing.assert_close(weighed[name], weight * plain[name])


def test_half_precision_keeps_the_losses_in_float32(oracle, model, objective):
    _, data = oracle
    model.train()
    outputs = outputs_of(data, data["in/image_tower"], data["in/text_tower"])
    plain = objective.loss(model, outputs)
    with torch.autocast("cpu", torch.bfloat16):
        half = objective.loss(model, outputs)
    for name, value in plain.items():
        assert half[name].dtype == torch.float32
        torch.testing.assert_close(half[name], value)


# ---------------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"external_teacher": True, "back_translation": False}, "need back_translation=True"),
        ({"prototypes": 1}, "two prototypes or more"),
        ({"warmup_share": 1.0}, "warmup_share is in"),
        ({"w_proto": -1.0}, "must not be negative"),
        ({"weight_decay": -0.1}, "weight_decay must not be negative"),
    ],
)
def test_options_out_of_range(options, said):
    with pytest.raises(UsageError, match=said):
        ProtoClipObjective(**options)


def test_an_objective_for_a_clip_without_heads_is_refused():
    with pytest.raises(UsageError, match=r"got a CLIP.*ProtoClip\.from_clip"):
        ProtoClipObjective(plain_clip())


def test_more_prototypes_than_rows():
    model, objective = make()
    objective.prototypes = 65
    with pytest.raises(UsageError, match="64 rows cannot make 65 prototypes"):
        objective.on_episode(model, episode(model, Things(), range(64)))
    objective.prototypes = None
    with pytest.raises(UsageError, match="12 rows cannot make 1 prototypes"):
        objective.on_episode(model, episode(model, Things(), range(12)))
    objective.on_episode(model, episode(model, Things(), range(64)))
    assert len(objective.tables["image_from_text"]) == 6


def test_nan_features_are_reported_with_their_rows():
    model, objective = make()
    with pytest.raises(UsageError, match=r"image features of 2 of 64 rows are NaN.*rows \[7, 20\]"):
        objective.on_episode(model, episode(model, Things(broken=(7, 20)), range(64)))


def test_nan_in_the_teacher():
    model, objective = make(external_teacher=True)
    data = Things()
    data.teacher[30, 1] = math.inf
    with pytest.raises(UsageError, match=r"external features of 1 of 64 rows.*rows \[30\]"):
        objective.on_episode(model, episode(model, data, range(64)))


def test_a_teacher_of_another_length():
    model, objective = make(external_teacher=True)
    data = Things()

    class Short(RowsToCome):
        def extract(self, function):
            found = dict(super().extract(function))
            return found | {"external": found["external"][:50]}

    short = episode(model, data, range(64))
    short.__class__ = Short
    with pytest.raises(UsageError, match=r"external features are \(50, 5\) for 64 rows"):
        objective.on_episode(model, short)


def test_rows_of_another_episode():
    model, objective = make()
    data = Things()
    objective.on_episode(model, episode(model, data, range(32)))
    with pytest.raises(UsageError, match=r"2 of the batch's 3 rows are not in this episode.*\[40, 41\]"):
        objective(model, data.batch(np.array([1, 40, 41]), seed=0, epoch=0, step=0))


def test_labels_outside_the_clusters(objective):
    tables = objective.tables | {"text_labels": torch.full((60,), 7)}
    with pytest.raises(UsageError, match="from 0 to 6, got 7"):
        objective.set_clusters(tables, torch.zeros(60, 16), torch.zeros(60, 16))
    objective.external_teacher, objective.back_translation = False, False
    with pytest.raises(UsageError, match="from 0 to 6, got 7"):
        objective.set_clusters(tables, torch.zeros(60, 16), torch.zeros(60, 16))


def test_a_batch_of_one_and_a_run_without_episodes(tmp_path):
    model, objective = make()
    data = Things()
    objective.index, objective.count = 0, 3
    with pytest.raises(UsageError, match="at least 2 pairs"):
        objective(model, data.batch(np.array([1]), seed=0, epoch=0, step=0))
    model, objective = make()
    with pytest.raises(UsageError, match="--episode-steps"):
        train(model, objective, data, replace(CONFIG, episode_steps=0), tmp_path)


def test_too_few_episodes(tmp_path):
    model, objective = make()
    with pytest.raises(UsageError, match="Of 2 episodes 1 warm up and 1 locks"):
        train(model, objective, Things(), replace(CONFIG, episode_steps=12), tmp_path)


def test_the_example_trains_every_parameter():
    made = example(0)
    got = made.run(**made.inputs)
    assert {k: tuple(v.shape) for k, v in got.items()} == dict(made.shapes)
    got["loss"].backward()
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in made.module.parameters())


@pytest.mark.slow
@pytest.mark.parametrize("arm", system.CLAIM.arms)
def test_the_claims_arms_run(arm):
    figures = run_claim(arm, 0, steps=40)
    assert figures["linear probe top-1"] > 3  # chance is 1.25
    assert set(figures) == {"linear probe top-1", "ARI of clusters", "purity of clusters"}
