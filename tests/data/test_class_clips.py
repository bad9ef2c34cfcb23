"""Clips by class as the loop reads them: which frames, one crop for all, what is broken.

Frame n of a made video has the grey 10 + 11 n, so pixels tell which frames a clip shows.
"""

from __future__ import annotations

import pickle
import tracemalloc
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from moviola.clip.preprocess import Preprocess
from moviola.data import class_clips
from moviola.data.class_clips import ClassClips, ClipView, unreadable
from moviola.data.classes import ClassSet, read_classes
from moviola.data.media_set import file_stream
from moviola.data.rows.clips import read_clip
from moviola.media import Video, write_video
from moviola.types import (
    Clip,
    ClipBatch,
    FrameSpec,
    LabelField,
    MediaError,
    Needs,
    PictureField,
    Recipe,
    TimeSpan,
    UsageError,
    VideoField,
)

RECIPE = Recipe(size=(16, 16), mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0))
NEEDS = Needs((VideoField(), LabelField()))
MIDDLE = FrameSpec(4, "middle", "repeat-last")
RATE = 10


def grey(path: Path, frames: int = 20, start: int = 0) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    levels = 10 + 11 * (start + np.arange(frames))
    pixels = np.broadcast_to(levels[:, None, None, None], (frames, 32, 48, 3)).astype(np.uint8)
    return write_video(path, pixels, RATE, crf=1)


def ramp(path: Path, frames: int = 4) -> Path:
    """All frames alike, brighter to the right and to the bottom."""
    path.parent.mkdir(parents=True, exist_ok=True)
    y_HW, x_HW = np.mgrid[0:64, 0:96]
    picture = np.stack([2 * x_HW + 20, 3 * y_HW + 20, 0 * x_HW + 90], axis=2).astype(np.uint8)
    return write_video(path, np.repeat(picture[None], frames, axis=0), RATE, crf=1)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name in ("jump", "run", "sit"):
        for n in range(3):
            grey(tmp_path / "set" / name / f"{n}.mp4")
    return tmp_path / "set"


def clips(data: ClassSet | Path, spec: FrameSpec = MIDDLE, **options: object) -> ClassClips:
    found = read_classes(data) if isinstance(data, Path) else data
    given = {"crop_area": (1, 1), "flip": 0.0, **options}
    rows = given.pop("rows", range(len(found)))
    return ClassClips(found, list(rows), NEEDS, recipe=RECIPE, frame_spec=spec, **given)  # type: ignore[arg-type, call-overload]


def one_set(*parts: Path | Clip, labels: Sequence[int] | None = None) -> ClassSet:
    media = [Clip(part) if isinstance(part, Path) else part for part in parts]
    ids = [str(n) for n in range(len(media))]
    return ClassSet(
        Path("made"),
        ids,
        file_stream(media, ids),
        [one.path for one in media],
        classes=["a", "b"],
        labels=labels or [0] * len(media),
        split=None,
        skipped=[],
    )


def batch(made: ClassClips, rows: list[int], seed: int = 0, epoch: int = 0, step: int = 0) -> dict:
    return made.batch(np.array(rows), seed=seed, epoch=epoch, step=step)


def shown(clip: ClipBatch) -> list[list[int]]:
    """The numbers of the frames by their grey."""
    level_BT = clip.frames_BTCHW.mean((2, 3, 4)) * 255
    number_BT = ((level_BT - 10) / 11).round().int()
    return [row[mask].tolist() for row, mask in zip(number_BT, clip.mask_BT, strict=True)]


# --------------------------------------------------------------------------------------------------
# Batches and draws
# --------------------------------------------------------------------------------------------------


def test_a_batch_has_what_was_asked_for(folder: Path) -> None:
    got = batch(clips(folder), [4, 0, 8])
    assert set(got) == {"id", "row", "clip", "label"}
    assert got["label"].tolist() == [1, 0, 2]
    assert got["row"].tolist() == [4, 0, 8]
    assert [Path(name).parent.name for name in got["id"]] == ["run", "jump", "sit"]
    assert got["clip"].frames_BTCHW.shape == (3, 4, 3, 16, 16)
    assert got["clip"].frames_BTCHW.dtype == torch.float32
    assert got["clip"].mask_BT.all()


@pytest.mark.parametrize("sampler", ["middle", "uniform"])
def test_one_random_frame_of_each_segment(sampler: str, tmp_path: Path) -> None:
    made = clips(one_set(*[grey(tmp_path / "v.mp4")] * 40), FrameSpec(4, sampler))  # type: ignore[arg-type]
    got = batch(made, list(range(40)))
    frames = np.array(shown(got["clip"]))
    for segment, seen in enumerate(frames.T):  # 20 frames in 4 segments
        assert set(seen) == set(range(5 * segment, 5 * segment + 5))
    np.testing.assert_allclose(got["clip"].times_BT.numpy(), frames / RATE, atol=1e-4)


def test_runs_of_frames_begin_anywhere(tmp_path: Path) -> None:
    made = clips(one_set(*[grey(tmp_path / "v.mp4")] * 60), FrameSpec(4, "consecutive", stride=2))
    starts = set()
    for first, *rest in shown(batch(made, list(range(60)))["clip"]):
        assert rest == [first + 2, first + 4, first + 6]
        starts.add(first)
    assert starts >= {0, 1, 5, 10}
    assert max(starts) == 13


def test_runs_at_a_rate(tmp_path: Path) -> None:
    made = clips(one_set(*[grey(tmp_path / "v.mp4")] * 40), FrameSpec(3, "rate", rate=5))
    runs = shown(batch(made, list(range(40)))["clip"])
    assert all(run == [run[0], run[0] + 2, run[0] + 4] for run in runs)
    assert len({run[0] for run in runs}) > 8
    whole = clips(one_set(grey(tmp_path / "v.mp4")), FrameSpec(None, "rate", rate=5))
    assert len(shown(batch(whole, [0])["clip"])[0]) == 10


def test_a_model_that_takes_any_number_gets_as_many_as_said(folder: Path) -> None:
    spec = FrameSpec(None, "middle", "mask")
    assert batch(clips(folder, spec), [0])["clip"].frames_BTCHW.shape[1] == class_clips.FRAMES
    assert batch(clips(folder, spec, frames=5), [0])["clip"].frames_BTCHW.shape[1] == 5
    with pytest.raises(UsageError, match="frames=0"):
        clips(folder, spec, frames=0)


def test_only_the_part_that_a_span_names(tmp_path: Path) -> None:
    clip = Clip(grey(tmp_path / "v.mp4"), TimeSpan(0.5, 1.3))
    for spec in (MIDDLE, FrameSpec(4, "consecutive"), FrameSpec(4, "rate", rate=10)):
        seen = shown(batch(clips(one_set(*[clip] * 20), spec), list(range(20)))["clip"])
        assert {number for run in seen for number in run} <= set(range(5, 13)), spec
        assert len({tuple(run) for run in seen}) > 1


def test_draws_are_of_seed_epoch_and_row_alone(folder: Path) -> None:
    options = {"crop_area": (0.3, 0.9), "flip": 0.5}
    made = clips(folder, **options)
    first = batch(made, [2, 5, 7])["clip"]
    again = batch(clips(folder, **options), [7, 2], step=99)["clip"]  # other order, company, step, object
    assert torch.equal(again.frames_BTCHW[0], first.frames_BTCHW[2])
    assert torch.equal(again.frames_BTCHW[1], first.frames_BTCHW[0])
    for other in (batch(made, [2, 5, 7], epoch=1), batch(made, [2, 5, 7], seed=1)):
        assert all(not torch.equal(a, b) for a, b in zip(first.times_BT, other["clip"].times_BT, strict=True))
    assert not torch.equal(first.times_BT[0], first.times_BT[1])


# --------------------------------------------------------------------------------------------------
# Crops
# --------------------------------------------------------------------------------------------------


def test_frames_of_a_clip_share_crop_and_mirroring(tmp_path: Path) -> None:
    made = clips(one_set(*[ramp(tmp_path / "v.mp4")] * 20), crop_area=(0.2, 0.6), flip=0.5)
    frames_BTCHW = batch(made, list(range(20)))["clip"].frames_BTCHW
    for t in range(1, 4):
        torch.testing.assert_close(frames_BTCHW[:, t], frames_BTCHW[:, 0], atol=0.02, rtol=0)
    across_B = (frames_BTCHW[:, 0, 0, :, -1] - frames_BTCHW[:, 0, 0, :, 0]).mean(1)
    assert (across_B > 0).any()
    assert (across_B < 0).any()  # red grows to the right: some are mirrored
    assert (frames_BTCHW[:, 0, 1, -1] > frames_BTCHW[:, 0, 1, 0]).all()  # never upside down
    assert frames_BTCHW[:, 0, 0].mean((1, 2)).std() > 0.03  # the crop's place differs between clips


def test_a_crop_shows_the_part_that_was_drawn(tmp_path: Path) -> None:
    """Decoded smaller or not, the crop's middle has the colour that the ramp has there."""
    view = ClipView(RECIPE, size=None, area=(0.3, 0.3), flip=0)
    draws = [0.5, 0.5, 0.25, 0.75, 0.9]
    side = view.decode_side(draws)
    assert side == int(np.ceil(16 / 0.3**0.5))
    made = clips(one_set(ramp(tmp_path / "v.mp4")), crop_area=(0.3, 0.3))
    frames_THWC, _ = made._frames(Video(tmp_path / "v.mp4"), None, [0.5] * 4, side)
    got = view.cut(frames_THWC, draws).float().mean((0, 2, 3))
    left, top, wide, tall = view.box(64, 96, draws)
    wanted = torch.tensor([2 * (left + wide / 2) + 20, 3 * (top + tall / 2) + 20])
    torch.testing.assert_close(got[:2], wanted, atol=6, rtol=0)  # a pixel of the small frame is 5.6 levels


def test_whole_frames_are_as_for_encoding(folder: Path) -> None:
    """Without crop, with frames that are all taken, a clip is what evaluation reads."""
    path = ramp(folder / "run" / "0.mp4")
    got = batch(clips(one_set(path)), [0])["clip"].frames_BTCHW[0]
    wanted = read_clip(path, None, MIDDLE, Preprocess(RECIPE))[0]
    torch.testing.assert_close(got, wanted, atol=1 / 255 + 1e-6, rtol=0)
    mirrored = batch(clips(one_set(path), flip=1.0), [0])["clip"].frames_BTCHW[0]
    torch.testing.assert_close(mirrored, got.flip(-1))


def test_a_tall_recipe(tmp_path: Path) -> None:
    recipe = Recipe(size=(24, 16))
    made = ClassClips(
        one_set(ramp(tmp_path / "v.mp4")), [0], NEEDS, recipe=recipe, frame_spec=MIDDLE, crop_area=(0.5, 1)
    )
    assert batch(made, [0])["clip"].frames_BTCHW.shape == (1, 4, 3, 24, 16)


# --------------------------------------------------------------------------------------------------
# Short clips and pictures
# --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("padding", "wanted"), [("repeat-last", [0, 1, 1, 1]), ("loop", [0, 1, 0, 1]), ("mask", [0, 1])]
)
def test_a_clip_shorter_than_the_window(padding: str, wanted: list[int], tmp_path: Path) -> None:
    for sampler in ("middle", "consecutive"):
        made = clips(one_set(grey(tmp_path / "v.mp4", 2)), FrameSpec(4, sampler, padding))  # type: ignore[arg-type]
        clip = batch(made, [0])["clip"]
        assert shown(clip) == [wanted], sampler
        assert clip.frames_BTCHW.shape[1] == 4
        assert not clip.frames_BTCHW[~clip.mask_BT].any()


def test_a_clip_of_one_frame_and_a_picture(tmp_path: Path) -> None:
    Image.new("RGB", (40, 30), (32, 32, 32)).save(tmp_path / "p.png")
    data = one_set(grey(tmp_path / "v.mp4", 1), tmp_path / "p.png", grey(tmp_path / "w.mp4"))
    assert shown(batch(clips(data), [0, 1])["clip"]) == [[0] * 4, [2] * 4]
    mixed = batch(clips(data, FrameSpec(None, "middle", "mask"), frames=6), [0, 1, 2])["clip"]
    assert mixed.mask_BT.sum(1).tolist() == [1, 1, 6]
    assert shown(mixed)[:2] == [[0], [2]]


def test_what_is_too_short_for_a_strict_model_is_found_at_the_start(tmp_path: Path) -> None:
    Image.new("RGB", (40, 30)).save(tmp_path / "p.png")
    data = one_set(grey(tmp_path / "v.mp4", 3), tmp_path / "p.png", grey(tmp_path / "w.mp4", 8))
    made = clips(data, FrameSpec(8, "middle", "refuse"))
    assert made.rows_N.tolist() == [2]
    assert {row: why for row, (_, why) in made.skipped.items()} == {
        0: "the model needs 8 frames of each clip, this one has about 3.",
        1: "the model needs 8 frames of each clip, this one has 1.",
    }


def test_frames_drawn_twice_in_a_long_enough_clip_stay(tmp_path: Path) -> None:
    """Ten frames, eight segments: two instants may hit one frame, which is no reason to pad."""
    made = clips(one_set(*[grey(tmp_path / "v.mp4", 10)] * 30), FrameSpec(8, "middle", "mask"))
    clip = batch(made, list(range(30)))["clip"]
    assert clip.mask_BT.all()
    assert any(len(set(run)) < 8 for run in shown(clip))


# --------------------------------------------------------------------------------------------------
# What cannot be read
# --------------------------------------------------------------------------------------------------


def test_damaged_clips_are_found_at_the_start(folder: Path) -> None:
    (folder / "run" / "1.mp4").write_bytes(b"no video at all")
    (folder / "sit" / "0.mp4").write_bytes(b"")
    made = clips(folder)
    assert made.rows_N.tolist() == [0, 1, 2, 3, 5, 7, 8]
    assert made.labels_N.tolist() == [0, 0, 0, 1, 1, 2, 2]
    told = {"/".join(Path(name).parts[-2:]): why for name, why in made.skipped.values()}
    assert set(told) == {"run/1.mp4", "sit/0.mp4"}
    assert "empty" in told["sit/0.mp4"]
    assert "skipped" not in batch(made, list(range(7)))


def test_a_span_behind_the_end(tmp_path: Path) -> None:
    data = one_set(Clip(grey(tmp_path / "v.mp4"), TimeSpan(5, 6)))
    assert "starts at 5 s, but the video ends at 2 s" in unreadable(data, [0], MIDDLE)[0][1]


def test_a_clip_that_breaks_later_is_replaced_and_told(folder: Path) -> None:
    made = clips(folder)
    (folder / "run" / "1.mp4").unlink()
    got = batch(made, [4, 0])
    assert got["skipped"] == [(4, "there is no such file.")]
    assert Path(got["id"][0]).parent.name == "run"
    assert Path(got["id"][0]).name in ("0.mp4", "2.mp4")
    assert got["label"].tolist() == [1, 0]
    again = batch(made, [4])
    assert again["id"] == got["id"][:1]
    assert torch.equal(again["clip"].frames_BTCHW[0], got["clip"].frames_BTCHW[0])
    used = {batch(made, [4], epoch=epoch)["id"][0] for epoch in range(12)}
    assert len(used) == 2  # drawn anew in every epoch
    for n in (0, 2):
        (folder / "run" / f"{n}.mp4").unlink()
    with pytest.raises(MediaError, match="no such file"):
        batch(made, [4])


def test_large_sets_are_only_looked_for(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(class_clips, "MOST_OPENED", 3)
    data = read_classes(folder)
    (folder / "run" / "1.mp4").write_bytes(b"no video at all")
    (folder / "sit" / "0.mp4").unlink()
    made = clips(data)
    assert list(made.skipped) == [6]
    got = batch(made, [4])
    assert "text file" in got["skipped"][0][1]
    assert got["label"].tolist() == [1]


def test_fields_that_clips_do_not_have(folder: Path) -> None:
    with pytest.raises(UsageError, match="no PictureField"):
        ClassClips(read_classes(folder), [0], Needs((PictureField(),)), recipe=RECIPE, frame_spec=MIDDLE)


def test_a_long_video_is_never_in_memory_whole(tmp_path: Path) -> None:
    frame = np.random.default_rng(0).integers(0, 256, (1, 96, 128, 3), dtype=np.uint8)
    path = write_video(tmp_path / "v.mp4", (np.roll(frame, n, axis=2) for n in range(400)), 25)
    for spec in (MIDDLE, FrameSpec(4, "consecutive"), FrameSpec(4, "rate", rate=2)):
        made = clips(one_set(path), spec, crop_area=(0.5, 1.0))
        tracemalloc.start()
        batch(made, [0])
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert peak < 400 * frame.nbytes / 10, spec


# --------------------------------------------------------------------------------------------------
# For the loop
# --------------------------------------------------------------------------------------------------


def test_the_fingerprint_tells_rows_looks_and_frames_apart(folder: Path) -> None:
    made = [
        clips(folder),
        clips(folder, rows=[0, 1]),
        clips(folder, flip=0.5),
        clips(folder, crop_area=(0.5, 1)),
        clips(folder, FrameSpec(5, "middle")),
        clips(folder, FrameSpec(None, "middle"), frames=4),
    ]
    assert len({one.fingerprint for one in made}) == len(made)
    assert clips(folder).fingerprint == made[0].fingerprint


def test_it_can_be_sent_to_a_process(folder: Path) -> None:
    made = clips(folder)
    sent = pickle.loads(pickle.dumps(made))  # noqa: S301 (our own)
    assert torch.equal(batch(sent, [3])["clip"].frames_BTCHW, batch(made, [3])["clip"].frames_BTCHW)
