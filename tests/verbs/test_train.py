"""`train` from files on disk: every objective, kills, bad input, what lies in the run's folder."""

from __future__ import annotations

import io
import json
import os
import signal
import socket
import subprocess
import sys
import time

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

import moviola
from moviola.clip.config import ClipConfig, TextConfig, VitConfig
from moviola.data.world import picture
from moviola.systems.registry import all_systems, entry_module
from moviola.training.checkpoint import read_metrics
from moviola.types import CheckpointError, Refusal, UsageError
from moviola.verbs.train_run import TrainRun, read_run

SIDE = 32


def small() -> ClipConfig:
    vision = VitConfig(image_size=SIDE, patch_size=8, width=32, layers=1, heads=2)
    return ClipConfig(32, vision, TextConfig(width=32, layers=1, heads=2))


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A table with every column that some objective wants, a tiny configuration, labelled pictures."""
    folder = tmp_path_factory.mktemp("pairs")
    rng = np.random.default_rng(0)
    rows = []
    for n in range(120):
        scene, data = picture(0, n, size=48), io.BytesIO()
        Image.fromarray(scene.pixels_HWC).save(data, "PNG")
        caption = scene.captions[0]
        rows.append(
            {
                "id": f"p{n}",
                "image": data.getvalue(),
                "caption": f"{caption}. There is more to say about number {n}.",
                "synthetic_caption": None if n % 7 == 0 else f"a made picture of {caption}",
                "caption_xx": caption[::-1],
                "teacher": rng.standard_normal(6).astype(np.float32).tolist(),
                "boxes": [[2.0, 3.0, 20.0, 30.0], [10.0, 10.0, 44.0, 40.0]][: n % 3],
                "regions": ["the left thing", "the large thing"][: n % 3],
            }
        )
    pq.write_table(pa.Table.from_pylist(rows), folder / "pairs.parquet", row_group_size=32)
    (folder / "small.json").write_text(json.dumps(small().to_json()))
    for name in ("red", "blue"):
        (folder / "labelled" / name).mkdir(parents=True)
        for n in range(3):
            colour = (200, n, 0) if name == "red" else (0, n, 200)
            Image.new("RGB", (40, 40), colour).save(folder / "labelled" / name / f"{n}.png")
    return folder


SETTINGS = {"steps": 8, "batch_size": 16, "lr": 1e-3, "save_every": 3, "log_every": 1, "hold_out": 0}


def command(files, to, objective, data, extra=()):
    made = [sys.executable, "-m", "moviola", "train", str(data), "--to", str(to)]
    made += ["--objective", objective, "--model", str(files / "small.json"), "--quiet"]
    for name, value in SETTINGS.items():
        made += [f"--{name.replace('_', '-')}", str(value)]
    return [*made, *extra]


def losses(folder):
    timed = ("rows_per_second",)
    return [{k: v for k, v in line.items() if k not in timed} for line in read_metrics(folder)]


TRAINABLE = ["clip", "siglip"] + [
    s.slug
    for s in all_systems()
    if s.room == "pretraining" and s.number and hasattr(entry_module(s), "TRAINING")
]


def own_settings(objective):
    """Small heads and short episodes for the objectives that have them: (keyword settings, --set options)."""
    options = {
        "protoclip": ({"episode_steps": 2}, {"prototypes": 4}),
        "rs-m-clip": ({}, {"prototypes": 16, "local_crops": 2}),
    }
    return options.get(objective, ({}, {}))


@pytest.fixture(scope="module")
def reinforced(files, tmp_path_factory):
    from moviola.verbs.reinforce import reinforce

    folder = tmp_path_factory.mktemp("reinforced") / "set"
    reinforce(files / "pairs.parquet", folder, teachers=["builtin"], augmentations=2)
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("objective", TRAINABLE)
def test_killed_and_resumed_in_mid_epoch(objective, files, tmp_path, request):
    data = request.getfixturevalue("reinforced") if objective == "mobileclip" else files / "pairs.parquet"
    settings, options = own_settings(objective)
    same = {"objective": objective, "model": files / "small.json", "options": options, **SETTINGS, **settings}
    extra = [part for k, v in settings.items() for part in (f"--{k.replace('_', '-')}", str(v))]
    extra += [part for k, v in options.items() for part in ("--set", f"{k}={v}")]
    killed = tmp_path / "killed"
    environment = {**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads())}
    process = subprocess.Popen(
        command(files, killed, objective, data, extra), env=environment, stderr=subprocess.PIPE
    )
    until = time.monotonic() + 120
    while process.poll() is None and time.monotonic() < until:
        if (killed / "checkpoint.pt").exists() and len(losses(killed)) >= 4:
            process.send_signal(signal.SIGKILL)
            break
        time.sleep(0.005)
    told = process.stderr.read().decode()
    process.wait()
    assert process.returncode == -signal.SIGKILL, f"not killed: {process.returncode} {told[-2000:]}"
    assert not (killed / "model").exists()
    moviola.train(data, killed, **same)
    whole = tmp_path / "whole"
    report = moviola.train(data, whole, **same)
    wanted, got = losses(whole), losses(killed)
    assert [line["step"] for line in got] == [line["step"] for line in wanted] == list(range(1, 9))
    for a, b in zip(wanted, got, strict=True):
        assert b == pytest.approx(a, rel=1e-6, abs=1e-9)
    model = moviola.load(report.model)
    assert model.embed_texts(["a red circle"]).shape == (1, model.dim)
    again = moviola.load(killed / "model").embed_texts(["a red circle"])
    np.testing.assert_allclose(again, model.embed_texts(["a red circle"]), atol=1e-4)


def quick(files, to, **settings):
    return moviola.train(
        files / "pairs.parquet", to, **{"model": files / "small.json", **SETTINGS, "steps": 2, **settings}
    )


def test_what_a_run_leaves(files, tmp_path):
    pytest.importorskip("matplotlib")
    told = []
    report = quick(
        files,
        tmp_path / "run",
        hold_out=20,
        probe=files / "labelled",
        on_progress=lambda done, total, note="": told.append((done, total, note)),
    )
    there = {path.name for path in (tmp_path / "run").iterdir()}
    assert there == {"checkpoint.pt", "losses.png", "metrics.jsonl", "model", "run.json"}
    assert (report.pairs, report.held_out, report.steps) == (100, 20, 2)
    assert set(report.before) == set(report.after)
    assert len(report.before) == 3
    assert report.before["zero-shot top-1"] in (0.0, 100 / 6, 200 / 6, 50.0, 400 / 6, 500 / 6, 100.0)
    assert told[-1][:2] == (2, 2)
    assert "pairs/s" in told[-1][2]
    assert json.loads(json.dumps(report.to_json()))["steps"] == 2
    assert "Model:" in str(report)
    about = json.loads((tmp_path / "run" / "run.json").read_text())
    assert set(about["identity"]) == {"objective", "model", "data"}
    with Image.open(tmp_path / "run" / "losses.png") as drawn:
        assert drawn.size[0] > 500


def test_objectives_add_up_with_weights(files, tmp_path):
    alone = quick(files, tmp_path / "a", steps=1)
    both = quick(files, tmp_path / "b", steps=1, objective=("clip", "siglip=0.5"))
    assert set(both.losses) == {"clip.contrastive", "siglip.sigmoid"}
    assert both.losses["clip.contrastive"] == pytest.approx(alone.losses["contrastive"], rel=1e-5)
    sig = quick(files, tmp_path / "c", steps=1, objective="siglip")
    assert both.losses["siglip.sigmoid"] == pytest.approx(sig.losses["sigmoid"] / 2, rel=1e-5)


def test_micro_batches_and_activation_checkpoints_change_nothing(files, tmp_path):
    plain = quick(files, tmp_path / "a")
    for name, settings in {"b": {"micro_batch": 5}, "c": {"checkpoint_activations": True}}.items():
        other = quick(files, tmp_path / name, **settings)
        assert other.losses == pytest.approx(plain.losses, rel=1e-4)


def test_workers_change_nothing(files, tmp_path):
    plain = quick(files, tmp_path / "a")
    assert quick(files, tmp_path / "b", workers=1).losses == plain.losses


def test_a_fine_tune_averages_its_weights(files, tmp_path):
    first = quick(files, tmp_path / "first")
    report = quick(
        files, tmp_path / "second", model=None, init=first.model, average=0.25, hold_out=20, lr=1e-2
    )
    before, after = moviola.load(first.model), moviola.load(report.model)
    between = moviola.load(report.averaged)
    assert set(report.averages) == {"0", "0.25", "0.5", "0.75", "1"}
    for name, tensor in between.module.state_dict().items():
        a, b = before.module.state_dict()[name], after.module.state_dict()[name]
        np.testing.assert_allclose(tensor, 0.75 * a + 0.25 * b, atol=1e-6)
    assert after.base == {"name": before.name, "hash": before.hash}
    assert any("--probe" in note for note in report.notes)


def test_a_python_file_holds_the_configuration(files, tmp_path):
    path = tmp_path / "config.py"
    path.write_text("import moviola\nconfig = moviola.TrainRun(objective='siglip', steps=3, batch_size=8)\n")
    assert read_run(path) == TrainRun(objective="siglip", steps=3, batch_size=8)
    path.write_text("config = 5\n")
    with pytest.raises(UsageError, match="TrainRun"):
        read_run(path)


BAD = {
    "a batch of one": ({"batch_size": 1}, UsageError, "batch of one"),
    "fewer pairs than a batch": ({"batch_size": 500}, UsageError, "fewer than one batch of 500"),
    "all held out": ({"hold_out": 120}, UsageError, "leaves none"),
    "no such objective": ({"objective": "clop"}, UsageError, "Did you mean clip"),
    "no training": ({"objective": "metaclip"}, Refusal, "no training objective"),
    "no such option": ({"options": {"temprature": 1}}, UsageError, "no option temprature"),
    "no such preset": ({"model": "vit-z"}, UsageError, "Presets: tiny"),
    "no such setting": ({"learning_rate": 1}, UsageError, "no setting learning_rate"),
    "learning rate": ({"lr": 50.0}, UsageError, "cannot be meant"),
    "negative learning rate": ({"lr": -1.0}, UsageError, "lr must be positive"),
    "temperature": ({"options": {"max_logit_scale": 0.5}}, UsageError, "max_logit_scale at least 1"),
    "steps and epochs": ({"epochs": 2}, UsageError, "not both"),
    "weight": ({"objective": ("clip=0",)}, UsageError, "must be positive"),
    "crop": ({"crop_area": (0.5, 2.0)}, UsageError, "two shares"),
    "average of a new model": ({"average": 0.5}, UsageError, "go on from"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_settings(name, files, tmp_path):
    settings, error, said = BAD[name]
    with pytest.raises(error, match=said):
        quick(files, tmp_path / "run", **settings)
    assert not (tmp_path / "run").exists()


def test_another_run_in_the_folder(files, tmp_path):
    quick(files, tmp_path / "run")
    for changes, said in (
        ({"objective": "siglip"}, "objective: clip"),
        ({"model": "tiny"}, "model: clip"),
        ({"lr": 5e-4}, "lr: 0.001 then, 0.0005 now"),
    ):
        with pytest.raises(UsageError, match=said):
            quick(files, tmp_path / "run", **changes)
    table = pq.read_table(files / "pairs.parquet")
    changed = tmp_path / "changed.parquet"
    pq.write_table(table.slice(0, 119), changed)
    with pytest.raises(UsageError, match="data: "):
        moviola.train(changed, tmp_path / "run", **{**SETTINGS, "steps": 2, "model": files / "small.json"})
    (tmp_path / "run" / "checkpoint.pt").write_bytes(b"no checkpoint")
    with pytest.raises(CheckpointError, match="is no checkpoint"):
        quick(files, tmp_path / "run")
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "notes.txt").write_text("mine")
    with pytest.raises(UsageError, match="no run's folder"):
        quick(files, tmp_path / "other")


def test_rows_that_cannot_be_used(files, tmp_path):
    rows = pq.read_table(files / "pairs.parquet").to_pylist()
    rows[3]["image"] = b"not a picture"
    rows[5]["image"] = None
    rows[8]["caption"] = None
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "some.parquet")
    report = moviola.train(
        tmp_path / "some.parquet",
        tmp_path / "run",
        **{**SETTINGS, "steps": 7, "model": files / "small.json"},
    )
    told = [json.loads(line) for line in (tmp_path / "run" / "skipped.jsonl").read_text().splitlines()]
    assert report.skipped == len(told)
    assert {line["row"] for line in told} <= {3, 5, 8}
    assert told
    same = [{**row, "caption": "the same"} for row in rows]
    pq.write_table(pa.Table.from_pylist(same), tmp_path / "same.parquet")
    with pytest.raises(UsageError, match="captions looked at are the same"):
        moviola.train(tmp_path / "same.parquet", tmp_path / "b", **SETTINGS)


@pytest.mark.slow
@pytest.mark.parametrize("objective", ["clip", "protoclip"])
def test_two_processes_train_as_one(objective, files, tmp_path):
    pytest.importorskip("accelerate")
    settings, options = own_settings(objective)
    whole = moviola.train(
        files / "pairs.parquet",
        tmp_path / "one",
        objective=objective,
        model=files / "small.json",
        device="cpu",
        options=options,
        **{**SETTINGS, **settings},
    )
    extra = ["--device", "cpu"]
    extra += [part for k, v in settings.items() for part in (f"--{k.replace('_', '-')}", str(v))]
    extra += [part for k, v in options.items() for part in ("--set", f"{k}={v}")]
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
    environment |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    started = [
        subprocess.Popen(
            command(files, tmp_path / "two", objective, files / "pairs.parquet", extra),
            env=environment | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    for process in started:
        _, told = process.communicate(timeout=200)
        assert process.returncode == 0, told[-2000:]
    for a, b in zip(losses(tmp_path / "one"), losses(tmp_path / "two"), strict=True):
        assert b == pytest.approx(a, rel=1e-3, abs=1e-6)
    text = ["a red circle"]
    one, two = (moviola.load(tmp_path / name / "model").embed_texts(text) for name in ("one", "two"))
    np.testing.assert_allclose(one, two, atol=1e-3)
    assert whole.steps == SETTINGS["steps"]


def test_what_a_system_freezes_stays_frozen(files, tmp_path):
    from moviola.verbs.train_start import start

    for objective in ("clip", "long-clip"):
        begun = start(TrainRun(objective=objective, model=files / "small.json"))
        frozen = {n for n, p in begun.model.module.named_parameters() if not p.requires_grad}
        assert frozen == ({"positional_embedding"} if objective == "long-clip" else set())
    begun = start(TrainRun(init="builtin"))
    assert all(p.requires_grad for p in begun.model.module.parameters())


def test_a_fine_tune_that_forgets_is_told_of_averaging(files, tmp_path, monkeypatch):
    from moviola.verbs import train as verb

    seen = iter([90.0, 40.0, 40.0])
    figures = type("Figures", (), {})

    def fewer_every_time(*arguments, **options):
        made = figures()
        made.top1 = next(seen)
        return made

    first = quick(files, tmp_path / "first")
    monkeypatch.setattr(verb, "evaluate_zero_shot", fewer_every_time)
    report = quick(
        files, tmp_path / "second", model=None, init=first.model, probe=files / "labelled", probe_every=2
    )
    assert (report.before["zero-shot top-1"], report.after["zero-shot top-1"]) == (90.0, 40.0)
    assert any("--average 0.5" in note for note in report.notes)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("objective", "preset"),
    [
        ("mobileclip", "mobileclip_s0"),
        ("protoclip", "vit-b-32"),
        ("grain", "vit-s-16"),
        ("long-clip", "long-clip-b-16"),
        ("cloob", "tiny"),
        ("xpool", "msvd"),
    ],
)
def test_new_models_of_a_systems_presets(objective, preset):
    from moviola.verbs.train_start import start

    begun = start(TrainRun(objective=objective, model=preset))
    assert begun.new
    assert begun.model.system == ("clip" if objective == "cloob" else objective)
    assert begun.model.tokenizer is not None
    assert begun.model.tokenizer.context_length == begun.model.recipe.context_length
    if objective == "long-clip":
        assert begun.model.recipe.context_length == 248


@pytest.mark.slow
def test_a_tokenizer_that_does_not_fit_is_told():
    from moviola.verbs.train_start import start

    with pytest.raises(CheckpointError, match="padding"):
        start(TrainRun(objective="rs-m-clip", model="vit-b-32-xlm-roberta-base"))


def test_a_video_system_trains_on_videos(files, tmp_path):
    from moviola.media import write_video

    lines = ["video,caption"]
    for number, shade in enumerate((40, 120, 200, 250)):
        frames = np.full((12, 48, 48, 3), shade, np.uint8)
        frames[number * 3 : number * 3 + 3, :24] = 255 - shade
        write_video(tmp_path / f"{number}.mp4", frames, 6)
        lines.append(f"{number}.mp4,video {number} of shade {shade}")
    (tmp_path / "videos.csv").write_text("\n".join(lines) + "\n")
    settings = {**SETTINGS, "steps": 2, "batch_size": 2}
    report = moviola.train(tmp_path / "videos.csv", tmp_path / "run", objective="xpool", **settings)
    assert set(report.losses) == {"contrastive"}
    assert moviola.load(report.model).system == "xpool"
