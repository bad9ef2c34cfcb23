"""Made clips: what is said happens, when it is said to, and single frames do not give it away."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moviola.data.world import (
    ACTIONS,
    ANOMALIES,
    COLOURS,
    SHAPES,
    SOUND_RATE,
    MadeClip,
    WorldConfig,
    clip,
    long_video,
    picture,
    truths,
    write,
)
from moviola.data.world_actions import ACTION_WORDS, Track, animate
from moviola.data.world_shapes import Dice
from moviola.data.world_text import SHAPE_WORDS
from moviola.types import UsageError

PLAIN = WorldConfig(grounds=("plain",), bystanders=0, drift=0, event_mix=(1, 0, 0), sound=0, subtitles=0)
BUSY = WorldConfig(anomalies=0.3, sound=0.8, subtitles=0.8)
SEEDS = st.integers(0, 2**63)


def same(first: MadeClip, second: MadeClip) -> bool:
    return (
        first.frames_THWC.tobytes() == second.frames_THWC.tobytes()
        and first.masks_KTHW.tobytes() == second.masks_KTHW.tobytes()
        and truths(first) == truths(second)
        and (first.sound is None) == (second.sound is None)
        and (first.sound is None or second.sound is None or first.sound.tobytes() == second.sound.tobytes())
    )


def centres(made: MadeClip, k: int) -> np.ndarray:
    """(T, 2) centroids of a mask, NaN where it is empty."""
    masks = made.masks_KTHW[k].astype(float)
    area = masks.sum((1, 2))
    grid = np.arange(made.frames_THWC.shape[1]) + 0.5
    with np.errstate(invalid="ignore"):
        return np.stack([(masks.sum(1) @ grid) / area, (masks.sum(2) @ grid) / area], axis=1)


def test_same_bytes_alone_or_in_any_order() -> None:
    forward = [clip(3, i, config=BUSY) for i in range(8)]
    backward = [clip(3, i, config=BUSY) for i in reversed(range(8))][::-1]
    assert all(same(a, b) for a, b in zip(forward, backward))
    assert not same(forward[0], forward[1])
    assert not same(forward[0], clip(4, 0, config=BUSY))
    assert same(long_video(1, 1, duration=25, events=2), long_video(1, 1, duration=25, events=2))


@settings(max_examples=60, deadline=None)
@given(SEEDS, SEEDS)
def test_every_clip_holds_together(seed: int, index: int) -> None:
    made = clip(seed, index, config=BUSY)
    count, frames = len(made.objects), len(made.frames_THWC)
    assert made.frames_THWC.shape == (16, 64, 64, 3)
    assert made.frames_THWC.dtype == np.uint8
    assert made.masks_KTHW.shape == (count, frames, 64, 64)
    assert made.masks_KTHW.sum(0).max() <= 1
    assert np.allclose(made.times_T, np.arange(frames) / 8)
    for mask_THW, box_T4 in zip(made.masks_KTHW, made.boxes_KT4):
        for mask, box in zip(mask_THW, box_T4):
            if not mask.any():
                assert np.isnan(box).all()
                continue
            rows, columns = np.nonzero(mask)
            assert box.tolist() == [columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]
    assert len({(t.shape, t.colour) for t in made.objects}) == count
    assert all(0 <= e.span.start < e.span.end <= made.duration for e in made.events)
    assert [e.span.start for e in made.events] == sorted(e.span.start for e in made.events)
    assert 100 < len(made.long.split()) < 400
    assert len(made.short) == len(made.held_out) == 4
    assert all(0 <= line.span.start < line.span.end <= made.duration for line in made.subtitles)
    if made.sound is not None:
        assert made.sound.dtype == np.float32
        assert made.sound.shape == (2 * SOUND_RATE,)
        assert np.abs(made.sound).max() <= 1
    else:
        assert not made.heard
    for event in made.events:
        thing = made.objects[event.objects[0]]
        nouns = SHAPE_WORDS.get(thing.shape, (thing.shape,))
        for caption in event.captions + event.held_out:
            assert any(noun in caption for noun in nouns), caption
            named = {"gray" if w == "grey" else w for w in caption.split()} & set(COLOURS)
            true = (
                {t.colour for t in made.objects}
                | set(made.shots[0].ground.colours)
                | set(event.colours or ())
            )
            assert named <= true | {"green", "blue", "red", "yellow"}  # the last: natural grounds
            if event.colours is None:
                assert thing.colour.replace("gray", "gr") in caption
            else:
                assert set(event.colours) <= named
    json.dumps(truths(made), allow_nan=False)


@pytest.mark.parametrize("action", ACTIONS)
def test_the_action_happens_in_its_span_and_only_there(action: str) -> None:
    """Measured on the masks: what should change changes from start to end, and rests outside."""
    config = replace(PLAIN, actions=(action,), duration=3.0)
    for index in range(12):
        made = clip(17, index, config=config)
        event = made.events[0]
        assert event.action == action
        start, end = round(event.span.start * 8), round(event.span.end * 8)
        k = event.objects[0]
        place, area = centres(made, k), made.masks_KTHW[k].sum((1, 2)).astype(float)
        inside = slice(start, end + 1)
        for quiet in (slice(0, start + 1), slice(end, None)):
            assert (made.masks_KTHW[k, quiet] == made.masks_KTHW[k, quiet][:1]).all(), (
                "rests outside its span"
            )
        if action.startswith("moves"):
            axis, sign = {"left": (0, -1), "right": (0, 1), "up": (1, -1), "down": (1, 1)}[action.split()[1]]
            steps = np.diff(place[inside], axis=0) * sign
            assert (steps[:, axis] > 0).mean() > 0.6
            assert steps[:, axis].sum() > 5
            assert np.abs(steps[:, 1 - axis].sum()) < 2
        elif action in ("grows", "shrinks"):
            ratio = area[end] / area[start]
            assert ratio > 2 if action == "grows" else ratio < 0.5
        elif action in ("appears", "disappears"):
            before, after = area[start] > 0, area[end] > 0
            assert (before, after) == ((False, True) if action == "appears" else (True, False))
        elif action in ("approaches", "parts"):
            apart = np.hypot(*(place - centres(made, event.objects[1])).T)
            assert (apart[end] < apart[start] - 3) == (action == "approaches")
        elif action == "blinks":
            assert (area[inside] == 0).any()
            assert area[start] == area[end] > 0
        elif action in ("bounces", "shakes", "pulses"):
            assert np.allclose(place[start], place[end], atol=0.2)
            assert area[inside].max() > 1.25 * area[start] or np.ptp(place[inside], axis=0).max() > 2
        elif action == "changes colour":
            assert event.colours is not None
            for t, name in ((start, event.colours[0]), (end, event.colours[1])):
                middle = np.median(made.frames_THWC[t][made.masks_KTHW[k, t]].astype(float), axis=0)
                other = event.colours[0] if name == event.colours[1] else event.colours[1]
                to = {c: np.linalg.norm(middle - COLOURS[c]) for c in (name, other)}
                assert to[name] < to[other]


@pytest.mark.parametrize("sense", [1, -1])
def test_clockwise_turns_clockwise_on_screen(sense: int) -> None:
    """An arrow that points right points down after a quarter turn clockwise."""
    track = Track.still(10)
    name = "rotates clockwise" if sense > 0 else "rotates anticlockwise"
    animate(track, name, 0, 9, 9.0, 90.0, Dice(0, 0))
    assert track.angle_T[-1] == pytest.approx(sense * 90)
    from PIL import Image

    from moviola.data.world_draw import Look, paint

    canvas = Image.new("RGB", (64, 64))
    paint(canvas, Look("arrow", (255, 255, 255), (0, 0, 0)), 32, 32, 20, float(track.angle_T[-1]))
    rows = np.asarray(canvas)[:, :, 0].astype(float).sum(1)
    wide = int(rows.argmax())  # the arrow's head is its widest part
    assert (wide > 32) == (sense > 0)


PAIRS = [(n, a.backwards) for n, a in ACTIONS.items() if n < a.backwards]


@pytest.mark.parametrize(("first", "second"), PAIRS)
def test_pairs_are_each_other_seen_backwards(first: str, second: str) -> None:
    """The reversed curve of an action is exactly a curve of its partner, for the same dice."""
    assert ACTIONS[second].backwards == first
    if ACTIONS[first].bodies == 2:
        return
    frames = 20
    tracks = []
    for name, start, end in ((first, 4, 13), (second, frames - 1 - 13, frames - 1 - 4)):
        track = Track.still(frames)
        animate(track, name, start, end, 8.0, 0.3, Dice(5, 5))
        tracks.append(track)
    forward, backward = tracks
    for field in ("x_T", "y_T", "scale_T", "angle_T", "opacity_T"):
        one, two = getattr(forward, field), getattr(backward, field)[::-1]
        if field in ("x_T", "y_T", "angle_T"):  # up to where it starts, which is chosen afterwards
            one, two = one - one[0], two - two[0]
        assert np.allclose(one, two), field


def test_closed_actions_are_their_own_reverse_and_end_as_they_began() -> None:
    for name, action in ACTIONS.items():
        if action.closed:
            assert action.backwards == name
            track = Track.still(20)
            animate(track, name, 3, 16, 8.0, 0.0, Dice(1, 1))
            for field in ("x_T", "y_T", "scale_T", "opacity_T"):
                curve = getattr(track, field)
                assert np.allclose(curve[[0, -1]], curve[[3, 16]])
                assert curve[3] == pytest.approx(curve[16])


def features(made: MadeClip) -> np.ndarray:
    """What a bag of frames knows: the mean picture, its spread over time, and where the object was."""
    frames = made.frames_THWC.reshape(len(made.frames_THWC), 8, 4, 8, 4, 3).mean((2, 4)) / 255
    places = centres(made, made.events[0].objects[0]) / 32
    areas = made.masks_KTHW[made.events[0].objects[0]].mean((1, 2))
    return np.concatenate(
        [
            frames.mean(0).ravel(),
            np.nanmean(places, 0),
            np.nanmin(places, 0),
            np.nanmax(places, 0),
            [areas.mean(), areas.min(), areas.max()],
        ]
    )


def accuracy(one: np.ndarray, two: np.ndarray) -> float:
    """Held-out accuracy of a ridge classifier between two sets of feature rows, 10 folds."""
    rows = np.concatenate([one, two])
    target = np.concatenate([np.ones(len(one)), -np.ones(len(two))])
    rows = (rows - rows.mean(0)) / (rows.std(0) + 1e-6)
    fold = np.random.default_rng(0).permutation(len(rows)) % 10
    right = 0
    for f in range(10):
        x, y = rows[fold != f], target[fold != f]
        weight = np.linalg.solve(x.T @ x + 30 * np.eye(x.shape[1]), x.T @ y)
        right += int((np.sign(rows[fold == f] @ weight) == target[fold == f]).sum())
    return right / len(rows)


@pytest.mark.slow
@pytest.mark.parametrize(("first", "second"), PAIRS)
def test_a_bag_of_frames_cannot_tell_the_direction(first: str, second: str) -> None:
    """700 clips of each: a linear classifier on order-free features stays within 5 points of chance."""
    config = replace(PLAIN, shapes=("star", "cross", "heart"), captions=0, size=32)
    sets = [
        np.stack([features(clip(s, i, config=replace(config, actions=(name,)))) for i in range(700)])
        for s, name in enumerate((first, second))
    ]
    assert abs(accuracy(*sets) - 0.5) < 0.05


@pytest.mark.slow
def test_a_bag_of_frames_cannot_tell_which_colour_came_first() -> None:
    config = replace(
        PLAIN, colours=("red", "blue", "white"), actions=("changes colour",), captions=0, size=32
    )
    rows: dict[tuple[str, str], list[np.ndarray]] = {("red", "blue"): [], ("blue", "red"): []}
    for index in range(4000):
        made = clip(3, index, config=config)
        assert made.events[0].colours is not None
        if made.events[0].colours in rows:
            rows[made.events[0].colours].append(features(made))
    one, two = (np.stack(found) for found in rows.values())
    assert min(len(one), len(two)) > 400
    assert abs(accuracy(one, two) - 0.5) < 0.05


def test_the_classifier_of_these_tests_can_learn() -> None:
    """First frames alone do tell left from right apart, so chance above is not the classifier's weakness."""
    config = replace(PLAIN, shapes=("star",), captions=0, size=32, speeds=("medium",))
    sets = []
    for s, way in enumerate(("left", "right")):
        made = (clip(s, i, config=replace(config, actions=(f"moves {way}",))) for i in range(200))
        sets.append(np.stack([centres(c, 0)[0] for c in made]))
    assert accuracy(*sets) > 0.65


def test_positions_over_time_are_mirrored() -> None:
    """Left and right: the same histogram of centroids, and each frame's is the other's mirror in time."""
    made = {}
    for s, way in enumerate(("left", "right")):
        config = replace(PLAIN, actions=(f"moves {way}",), captions=0, size=32)
        made[way] = np.stack([centres(c, 0)[:, 0] for c in (clip(s, i, config=config) for i in range(400))])
    bins = np.linspace(0, 32, 9)
    left, right = (np.histogram(made[w], bins)[0] / made[w].size for w in ("left", "right"))
    assert np.abs(left - right).sum() / 2 < 0.06
    gap = made["left"].mean(0) - made["right"].mean(0)[::-1]
    assert np.abs(gap).max() < 1.5  # pixels; four standard errors of a mean of 400
    assert made["left"][:, 0].mean() - made["left"][:, -1].mean() > 5


def test_order_clips_show_the_same_pictures_either_way() -> None:
    """Closed actions of different objects: first and last frame have every object in the same place."""
    config = replace(PLAIN, event_mix=(0, 1, 0), order=1.0)
    for index in range(30):
        made = clip(2, index, config=config)
        assert len(made.events) == 2
        assert made.events[0].objects != made.events[1].objects
        assert made.events[0].span.end < made.events[1].span.start
        assert np.array_equal(made.masks_KTHW[:, 0], made.masks_KTHW[:, -1])


@settings(max_examples=40, deadline=None)
@given(SEEDS)
def test_opposites_differ_in_direction_or_order_only(seed: int) -> None:
    made = clip(seed, 0, config=WorldConfig(event_mix=(0.5, 0.5, 0), sound=0, subtitles=0))
    for true, false in zip(made.short, made.opposites):
        assert true != false
        if len(made.events) == 1 and made.events[0].action.startswith("moves"):
            changed = [(a, b) for a, b in zip(true.split(), false.split()) if a != b]
            assert len(true.split()) == len(false.split())
            assert len(changed) == 1
        elif len(made.events) == 2 and made.events[0].objects[0] != made.events[1].objects[0]:
            assert sorted(true.replace(",", "").split()) == sorted(false.replace(",", "").split())
    if made.events[0].action in ("bounces", "pulses", "blinks", "shakes") and len(made.events) == 1:
        assert not made.opposites


def test_held_out_words_are_all_known_and_sentences_all_new() -> None:
    config = WorldConfig(sound=0, subtitles=0, captions=8, event_mix=(0.5, 0.3, 0.2), size=32)
    clips = [clip(0, i, config=config) for i in range(300)]
    train = {c for made in clips for c in made.short}
    train |= {c for made in clips for e in made.events for c in e.captions}
    held_out = {c for made in clips for c in made.held_out}
    held_out |= {c for made in clips for e in made.events for c in e.held_out}
    assert not train & held_out
    known = {w for c in train for w in c.replace(",", "").split()}
    known |= {w for i in range(400) for c in picture(0, i).captions for w in c.replace(",", "").split()}
    assert {w for c in held_out for w in c.replace(",", "").split()} <= known
    for ours, theirs in ACTION_WORDS.values():
        assert not set(ours) & set(theirs)


def test_sounds_are_loud_where_they_are_said_to_be() -> None:
    config = WorldConfig(sound=1.0, duration=4.0)
    checked = 0
    for index in range(30):
        made = clip(9, index, config=config)
        assert made.sound is not None
        heard = np.zeros(len(made.sound), bool)
        for span, _ in made.heard:
            heard[math.floor(span.start * SOUND_RATE) : math.ceil(span.end * SOUND_RATE) + 1] = True
        if heard.any() and not heard.all():
            assert np.sqrt((made.sound[heard] ** 2).mean()) > 3 * np.sqrt((made.sound[~heard] ** 2).mean())
            checked += 1
        for event in made.events:
            assert event.sound is None or f"hears a {event.sound}" in made.long
    assert checked > 15


def test_subtitles_are_shifted_and_some_are_wrong() -> None:
    config = WorldConfig(subtitles=1.0, duration=4.0, event_mix=(1, 0, 0), size=32)
    shifts, wrong, total = [], 0, 0
    for index in range(120):
        made = clip(5, index, config=config)
        told = [line for line in made.subtitles if any(t in line.text for t in ("gr", *COLOURS))]
        if made.opposites and told:
            shifts.append(told[0].span.start - made.events[0].span.start)
            total += 1
            words = set(" ".join(made.events[0].captions + made.short).split())
            wrong += bool(set(told[0].text.split()[-2:]) - words)
    assert np.std(shifts) > 0.3
    assert 0 < wrong < 0.5 * total


def test_anomalies_are_where_they_are_said_to_be() -> None:
    kinds = set()
    for index in range(60):
        with_, without = (clip(6, index, config=replace(PLAIN, anomalies=p)) for p in (1.0, 0.0))
        assert with_.anomalies
        assert not without.anomalies
        changed = (with_.frames_THWC.astype(int) - without.frames_THWC).any((1, 2, 3))
        faulty = np.zeros(len(changed), bool)
        for anomaly in with_.anomalies:
            kinds.add(anomaly.kind)
            faulty[round(anomaly.span.start * 8) : round(anomaly.span.end * 8)] = True
            if anomaly.kind in ("blackout", "flash", "static"):
                assert not with_.masks_KTHW[:, faulty].any()
        assert not (changed & ~faulty).any()
        assert changed[faulty].mean() > 0.5
    assert kinds == set(ANOMALIES)


def test_apart_shares_nothing() -> None:
    train, test = WorldConfig().apart(colours=4, shapes=5, speeds=1)
    assert not set(train.colours) & set(test.colours)
    assert not set(train.shapes) & set(test.shapes)
    assert not set(train.speeds) & set(test.speeds)
    assert len(train.colours) + len(test.colours) == len(COLOURS)
    seen = [{t.shape for i in range(60) for t in clip(0, i, config=c).objects} for c in (train, test)]
    assert not seen[0] & seen[1]
    shown = [{t.colour for i in range(60) for t in clip(0, i, config=c).objects} for c in (train, test)]
    assert not shown[0] & shown[1]
    kept, both = WorldConfig().apart(colours=0, shapes=0)
    assert kept.shapes == both.shapes == SHAPES


@pytest.mark.parametrize(
    ("bad", "words"),
    [
        ({"actions": ("explodes",)}, "explodes"),
        ({"speeds": ()}, "no speed"),
        ({"colours": ("red", "blue")}, "three colours"),
        ({"duration": 0.2}, "6 frames"),
    ],
)
def test_impossible_configs_are_errors(bad: dict, words: str) -> None:
    with pytest.raises(UsageError, match=words):
        WorldConfig(**bad)


def test_shapes_that_cannot_be_seen_to_turn_are_an_error() -> None:
    with pytest.raises(UsageError, match="seen to rotate"):
        clip(0, 0, config=replace(PLAIN, shapes=("circle", "ring"), actions=("rotates clockwise",)))


def test_photos_take_part() -> None:
    rng = np.random.default_rng(0)
    photos = [(rng.integers(0, 255, (40, 60, 3), dtype=np.uint8), name) for name in ("goldfish", "teapot")]
    clips = [clip(0, i, photos=photos) for i in range(60)]
    named = [t.photo for c in clips for t in c.objects if t.photo]
    assert set(named) == {"goldfish", "teapot"}
    assert any(s.ground.photo for c in clips for s in c.shots)
    acting = [c for c in clips if c.objects[c.events[0].objects[0]].photo]
    assert acting
    for made in acting:
        assert made.objects[made.events[0].objects[0]].photo in made.events[0].captions[0]


@settings(max_examples=12, deadline=None)
@given(SEEDS)
def test_moments_of_long_videos(seed: int) -> None:
    made = long_video(seed, 0, duration=45, events=3)
    assert len(made.frames_THWC) == 180
    assert len(made.events) == 3
    cuts = [shot.span.start for shot in made.shots]
    assert cuts[0] == 0
    assert made.shots[-1].span.end == 45
    assert all(a.span.end == b.span.start for a, b in zip(made.shots, made.shots[1:]))
    stars = [(made.objects[k].shape, made.objects[k].colour) for k in range(3)]
    everyone = [(thing.shape, thing.colour) for thing in made.objects]
    for event, star in zip(made.events, stars):
        assert everyone.count(star) == 1
        assert 2.9 <= event.span.duration <= 8.1
        assert not any(event.span.start < cut < event.span.end for cut in cuts)
        visible = np.flatnonzero(made.masks_KTHW[event.objects[0]].any((1, 2))) / made.rate
        assert visible.min() >= event.span.start
        assert visible.max() < event.span.end
        if event.action != "blinks":
            assert visible.size == pytest.approx(event.span.duration * made.rate, abs=1)
    for first, second in zip(made.events, made.events[1:]):
        assert second.span.start - first.span.end >= 2
    assert len(made.long.split()) > 100


def test_moments_that_do_not_fit_are_an_error() -> None:
    with pytest.raises(UsageError, match="do not fit"):
        long_video(0, 0, duration=10, events=5)
    with pytest.raises(UsageError, match="event or more"):
        long_video(0, 0, config=WorldConfig(rate=4, actions=("appears",)))


def test_round_trip_through_mp4(tmp_path: Path) -> None:
    made = clip(0, 7, config=WorldConfig(sound=1.0, subtitles=1.0))
    path = write(made, tmp_path / "seven.mp4")
    assert path.stat().st_size > 1000
    told = json.loads(path.with_suffix(".json").read_text())
    assert told["short"] == list(made.short)
    assert [e["action"] for e in told["events"]] == [e.action for e in made.events]
    from moviola.media.video import Video

    with Video(path) as video:
        assert video.duration == pytest.approx(made.duration, abs=0.15)
        assert video.rate == pytest.approx(8)
        frames = np.concatenate([np.asarray(batch.frames_THWC) for batch in video.stream()])
    assert frames.shape == made.frames_THWC.shape
    assert np.abs(frames.astype(float) - made.frames_THWC).mean() < 12
