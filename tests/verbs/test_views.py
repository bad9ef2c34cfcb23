"""Multi-view testing: which frames and crops the views are, and that their probabilities are averaged."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from moviola.clip.loaded import Model
from moviola.data.classes import read_classes
from moviola.media import write_video
from moviola.metrics.classification import topk_accuracy
from moviola.types import Clip, FrameSpec, MediaError, Recipe, TimeSpan, UsageError
from moviola.verbs.classify import ClassScorer
from moviola.verbs.common import look_at
from moviola.verbs.evaluate import evaluate_zero_shot
from moviola.verbs.set_reader import NothingEvaluated
from moviola.verbs.views import Views, clip_views, side_by_side, view_scores
from tests.verbs.colour_clip import TOKENIZER, ColourClip, colour_model, picture, video

CLASSES = ("black", "blue", "green", "red", "white")


def grey(path: Path, frames: int = 20) -> Path:
    levels = 10 + 11 * np.arange(frames)
    pixels = np.broadcast_to(levels[:, None, None, None], (frames, 32, 48, 3)).astype(np.uint8)
    return write_video(path, pixels, 10, crf=1)


def numbers(seen: tuple[np.ndarray, np.ndarray]) -> list[int]:
    return np.rint((seen[0].mean((1, 2, 3)) - 10) / 11).astype(int).tolist()


def scorer(model: Model, templates: tuple[str, ...] = ("{}",)) -> ClassScorer:
    return ClassScorer(model, CLASSES, templates, batch_size=32, frames=None)


# --------------------------------------------------------------------------------------------------
# Clips
# --------------------------------------------------------------------------------------------------


def test_spread_views_share_the_intervals(tmp_path: Path) -> None:
    clip = Clip(grey(tmp_path / "v.mp4"))
    model = colour_model(spec=FrameSpec(2, "middle"))
    assert [numbers(one) for one in clip_views(clip, model, 1)] == [[5, 15]]
    assert [numbers(one) for one in clip_views(clip, model, 5)] == [[n, n + 10] for n in (1, 3, 5, 7, 9)]
    part = Clip(clip.path, TimeSpan(1.0, 2.0))
    assert [numbers(one) for one in clip_views(part, model, 5)] == [
        [10, 15], [11, 16], [12, 17], [13, 18], [14, 19]
    ]  # fmt: skip


@pytest.mark.parametrize("spec", [FrameSpec(4, "consecutive", stride=2), FrameSpec(4, "rate", rate=5)])
def test_runs_are_evenly_placed(spec: FrameSpec, tmp_path: Path) -> None:
    seen = [numbers(one) for one in clip_views(Clip(grey(tmp_path / "v.mp4")), colour_model(spec=spec), 3)]
    assert len(seen) == 3
    first = [run[0] for run in seen]
    assert first == sorted(set(first))
    assert abs(first[0] - (13 - (first[-1] % 13 or 13))) <= 2  # as far from the start as from the end
    if spec.sampler == "rate":
        assert all(run == [run[0], run[0] + 2, run[0] + 4, run[0] + 6] for run in seen)


def test_one_view_is_what_evaluation_sees(tmp_path: Path) -> None:
    clip = Clip(grey(tmp_path / "v.mp4"))
    for spec in (
        FrameSpec(3),
        FrameSpec(3, "uniform"),
        FrameSpec(3, "consecutive"),
        FrameSpec(3, "rate", rate=2),
    ):
        model = colour_model(spec=spec)
        (one,) = clip_views(clip, model, 1)
        wanted = look_at(clip, model).clip
        assert np.array_equal(one[0], wanted[0])
        assert np.array_equal(one[1], wanted[1])


def test_where_more_views_would_be_the_same(tmp_path: Path) -> None:
    clip = Clip(grey(tmp_path / "v.mp4", 5))
    assert len(clip_views(clip, colour_model(spec=FrameSpec(8, "consecutive")), 4)) == 1
    assert len(clip_views(clip, colour_model(spec=FrameSpec(None, "rate", rate=2)), 4)) == 1
    assert len(clip_views(Clip(picture(tmp_path / "p.png", "red")), colour_model(), 4)) == 1


def test_a_short_clip_is_padded_as_the_model_wants(tmp_path: Path) -> None:
    clip = Clip(grey(tmp_path / "v.mp4", 1))
    seen = clip_views(clip, colour_model(spec=FrameSpec(4, "middle", "repeat-last")), 3)
    assert [numbers(one) for one in seen] == [[0]] * 3
    with pytest.raises(MediaError, match="needs 4 frames"):
        clip_views(clip, colour_model(spec=FrameSpec(4, "middle", "refuse")), 3)


# --------------------------------------------------------------------------------------------------
# Crops
# --------------------------------------------------------------------------------------------------


def test_crops_lie_side_by_side() -> None:
    frames_THWC = np.zeros((2, 32, 64, 3), np.uint8)
    frames_THWC[:, :, :, 0] = np.arange(64)
    clip = (frames_THWC, np.arange(2.0))

    def left(recipe: Recipe, crops: int, frames: np.ndarray = frames_THWC) -> list[tuple[int, int, int]]:
        parts = side_by_side((frames, clip[1]), recipe, crops)
        assert all(np.shares_memory(part, frames) for part, _ in parts)
        return [(int(part[0, 0, 0, 0]), *part.shape[1:3]) for part, _ in parts]

    square = Recipe(size=(16, 16))
    assert left(square, 1) == [(0, 32, 64)]
    assert left(square, 3) == [(0, 32, 32), (16, 32, 32), (32, 32, 32)]
    assert left(square, 2) == [(0, 32, 32), (32, 32, 32)]
    assert left(Recipe(size=(16, 32)), 3) == [(0, 32, 64)]  # of the frame's shape: there is one crop
    assert left(Recipe(size=(16, 16), resize="squash", crop="none"), 3) == [(0, 32, 64)]
    tall = np.ascontiguousarray(frames_THWC.transpose(0, 2, 1, 3))
    assert left(square, 3, tall) == [(0, 32, 32), (16, 32, 32), (32, 32, 32)]


def test_three_crops_see_what_one_does_not(tmp_path: Path) -> None:
    """Red at the left, blue at the right, white between: the centre crop knows of white alone."""
    picture(tmp_path / "set" / "red" / "p.png", "red", "white", "blue", size=(24, 72))
    data, model = read_classes(tmp_path / "set"), colour_model()
    data.classes = CLASSES
    one = dict(zip(CLASSES, view_scores(scorer(model), data, [0], (1, 1))[1][0], strict=True))
    three = dict(zip(CLASSES, view_scores(scorer(model), data, [0], (1, 3))[1][0], strict=True))
    assert one["white"] > 0.99
    assert three["white"] == pytest.approx(1 / 3, abs=0.01)
    assert three["red"] == pytest.approx(three["blue"], abs=1e-6)
    margin = Recipe(size=(16, 16), resize_size=(24, 24), mean=(0, 0, 0), std=(1, 1, 1), context_length=32)
    module = ColourClip()
    wide = Model(module, config={}, recipe=margin, tokenizer=TOKENIZER, name="wide", device="cpu")
    view_scores(scorer(wide), data, [0], (1, 3))
    assert wide.preprocess.decode_hint == 24  # the caller's model is as it was


# --------------------------------------------------------------------------------------------------
# Scores
# --------------------------------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for n, name in enumerate(CLASSES):
        video(tmp_path / "set" / name / "a.mp4", (name, 1.0), (CLASSES[n - 1], 0.5))
        video(tmp_path / "set" / name / "b.mp4", (CLASSES[n - 2], 0.4), (name, 1.0))
        picture(tmp_path / "set" / name / "c.png", name)
    return tmp_path / "set"


@pytest.mark.parametrize("separable", [True, False])
def test_one_view_gives_the_accuracy_of_evaluation(separable: bool, folder: Path) -> None:
    data, model = read_classes(folder), colour_model(separable=separable)
    templates = ("a photo of a {}", "a picture showing {}")
    index_N, mean_NC = view_scores(scorer(model, templates), data, range(len(data)), (1, 1))
    assert index_N.tolist() == list(range(15))
    np.testing.assert_allclose(mean_NC.sum(1), 1)
    wanted = evaluate_zero_shot(model, data, templates=templates)
    assert topk_accuracy(mean_NC, data.labels_N, (1,))["top1"] == pytest.approx(wanted.top1)


def test_probabilities_of_views_are_averaged(folder: Path) -> None:
    data, model = read_classes(folder), colour_model(spec=FrameSpec(2))
    made = scorer(model)
    got = view_scores(made, data, [0], (3, 1))[1][0]
    ((_, _, media),) = data.stream([0])
    one_by_one = []
    for one in clip_views(media, model, 3):
        logits_C = model.logit_scale * model.embed_clips([one])[0] @ made.text_ND.T
        one_by_one.append(torch.from_numpy(logits_C).double().softmax(0))
    np.testing.assert_allclose(got, torch.stack(one_by_one).mean(0).numpy(), atol=1e-6)
    assert not np.allclose(one_by_one[0], one_by_one[2])


@pytest.mark.parametrize("batch_size", [1, 7, 1000])
def test_batches_change_nothing(batch_size: int, folder: Path) -> None:
    data, model = read_classes(folder), colour_model()
    done = []
    index_N, got = view_scores(
        scorer(model), data, [0, 1, 2, 7, 14], (2, 3), batch_size=batch_size,
        on_progress=lambda *told: done.append(told[:2]),
    )  # fmt: skip
    assert index_N.tolist() == [0, 1, 2, 7, 14]
    np.testing.assert_allclose(got, view_scores(scorer(model), data, [0, 1, 2, 7, 14], (2, 3))[1], atol=1e-6)
    assert done == [(n, 5) for n in range(1, 6)]


def test_what_cannot_be_read_is_left_out(folder: Path) -> None:
    (folder / "blue" / "a.mp4").write_bytes(b"no video")
    data, failed = read_classes(folder), []
    index_N, _ = view_scores(scorer(colour_model(broken="green")), data, [3, 4, 8, 10], (2, 1), failed=failed)
    assert index_N.tolist() == [4, 10]
    assert {Path(one.path).name: one.reason for one in failed} == {
        "a.mp4": "expected a video, got a text file.",
        "c.png": "the model gave no finite score for it",
    }
    with pytest.raises(NothingEvaluated, match="Not one of 1 items"):
        view_scores(scorer(colour_model()), data, [3], (2, 1))


def test_bad_views() -> None:
    for bad in ((0, 1), (4, 0)):
        with pytest.raises(UsageError, match="at least one clip and one crop"):
            Views(*bad)
