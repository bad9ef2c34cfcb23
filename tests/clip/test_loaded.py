from __future__ import annotations

import json
import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from moviola.clip.config import ClipConfig
from moviola.clip.loaded import Model, choose_device, choose_dtype, from_native, hash_weights, load, unit
from moviola.clip.model import CLIP, mean_of_frames
from moviola.clip.native import MANIFEST, WEIGHTS, assign, read_native
from moviola.clip.sample import choose_frames
from moviola.clip.tokenizer import Tokenizer
from moviola.types import CheckpointError, FrameSpec, Refusal, UsageError

Make = Callable[..., Model]


def frames_of(pictures: list[Image.Image]) -> np.ndarray:
    return np.stack([np.asarray(p.resize((48, 40))) for p in pictures])


@pytest.mark.parametrize("kind", ["vit", "vit-gelu", "resnet", "stem"])
def test_save_and_load_give_the_same_vectors(
    kind: str, make_model: Make, tmp_path: Path, pictures: list[Image.Image], texts: list[str]
) -> None:
    model = make_model(kind, licence="Apache-2.0", classes=["a", "b"], base={"name": "x", "hash": "y"})
    folder = model.save(tmp_path / "made")
    again = load(folder, device="cpu")
    np.testing.assert_array_equal(again.embed_texts(texts), model.embed_texts(texts))
    np.testing.assert_allclose(again.embed_pictures(pictures), model.embed_pictures(pictures), atol=1e-6)
    for name in ("hash", "recipe", "name", "licence", "classes", "base", "logit_scale", "dim", "config"):
        ours, theirs = getattr(model, name), getattr(again, name)
        assert json.dumps(ours, default=str) == json.dumps(theirs, default=str), name
    assert sorted(p.name for p in folder.iterdir()) == [WEIGHTS, MANIFEST, "tokenizer.json"]
    assert [p.name for p in tmp_path.iterdir()] == ["made"]


def test_vectors_are_unit_float32_rows_in_order(
    make_model: Make, pictures: list[Image.Image], texts: list[str]
) -> None:
    model = make_model()
    vectors = model.embed_texts(texts, batch_size=2)
    assert vectors.shape == (4, 24)
    assert vectors.dtype == np.float32
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1, rtol=1e-5)
    for row, text in enumerate(texts):
        np.testing.assert_allclose(model.embed_texts(text)[0], vectors[row], atol=1e-6)
    raw = model.embed_texts(texts, normalize=False)
    np.testing.assert_allclose(unit(raw), vectors, atol=1e-6)
    one_by_one = model.embed_pictures(iter(pictures), batch_size=1)
    np.testing.assert_allclose(one_by_one, model.embed_pictures(pictures), atol=1e-6)
    assert model.embed_pictures([]).shape == (0, 24)
    assert model.embed_texts([]).shape == (0, 24)
    assert model.embed_frames(np.zeros((0, 9, 9, 3), np.uint8)).shape == (0, 24)


def test_frames_are_embedded_like_pictures(make_model: Make, pictures: list[Image.Image]) -> None:
    model, frames = make_model(), frames_of(pictures)
    exact = model.embed_pictures([Image.fromarray(f) for f in frames])
    fast = model.embed_frames(frames, batch_size=2)
    assert (exact * fast).sum(1).min() > 0.9999


def test_prompts_are_the_unit_mean_of_unit_vectors(make_model: Make) -> None:
    model = make_model()
    templates = ["a photo of a {}.", "the {}"]
    vectors = model.embed_prompts(["cat", "{dog}"], templates)
    expected = unit(
        np.stack(
            [model.embed_texts([t.replace("{}", c) for t in templates]).mean(0) for c in ("cat", "{dog}")]
        )
    )
    np.testing.assert_allclose(vectors, expected, atol=1e-6)
    with pytest.raises(UsageError, match=r"needs \{\} where the class goes"):
        model.embed_prompts(["cat"], ["a photo"])
    with pytest.raises(UsageError, match="at least one class"):
        model.embed_prompts([])


def test_clips_are_the_mean_of_their_unit_frames(make_model: Make, pictures: list[Image.Image]) -> None:
    model, frames = make_model(), frames_of(pictures)
    clips = [(frames, np.arange(3.0)), (frames[:1], np.zeros(1))]
    per_frame = model.embed_frames(frames)
    expected = unit(np.stack([per_frame.mean(0), per_frame[0]]))
    np.testing.assert_allclose(model.embed_clips(clips), expected, atol=1e-5)
    np.testing.assert_allclose(model.embed_clips(clips, batch_size=1), expected, atol=1e-5)
    with pytest.raises(UsageError, match="3 frames but 2 times"):
        model.embed_clips([(frames, np.arange(2.0))])
    with pytest.raises(UsageError, match="without frames"):
        model.embed_clips([(frames[:0], np.zeros(0))])


def test_score_is_the_modules_own(make_model: Make, pictures: list[Image.Image], texts: list[str]) -> None:
    model, frames = make_model(), frames_of(pictures)
    raw = model.embed_frames(frames, normalize=False)
    video = np.stack([raw, np.concatenate([raw[:1], np.zeros_like(raw[:2])])])
    mask = np.array([[True] * 3, [True, False, False]])
    scores = model.score(texts, video, mask)
    means = unit(mean_of_frames(torch.from_numpy(video), torch.from_numpy(mask)).numpy())
    np.testing.assert_allclose(
        scores, model.logit_scale * model.embed_texts(texts) @ means.T, rtol=1e-4, atol=1e-4
    )


class PerFrame(CLIP):
    """A non-separable model in miniature: keeps frames, scores by the best one."""

    separable = False
    frame_spec = FrameSpec(count=4, sampler="uniform", padding="mask")

    def encode_video(self, batch):  # type: ignore[no-untyped-def]
        return self.encode_frames(batch)

    def pool(self, video, mask_BT=None):  # type: ignore[no-untyped-def]
        return mean_of_frames(video, mask_BT)

    def score(self, text_ND, video, mask_MT=None):  # type: ignore[no-untyped-def]
        scores_NMT = torch.einsum("nd,mtd->nmt", text_ND, video)
        return scores_NMT.masked_fill(~mask_MT, -torch.inf).amax(-1)


def test_a_non_separable_model_keeps_frames_for_its_score(
    make_model: Make, pictures: list[Image.Image]
) -> None:
    plain, frames = make_model(), frames_of(pictures)
    module = PerFrame(ClipConfig.from_json(plain.config))
    module.load_state_dict(plain.module.state_dict())
    model = Model(module, config=plain.config, tokenizer=plain.tokenizer, system="per-frame", device="cpu")
    clips = [(frames, np.arange(3.0)), (frames[:2], np.arange(2.0))]
    video, mask = model.encode_clips(clips, batch_size=1)
    assert video.shape == (2, 4, 24)
    np.testing.assert_array_equal(mask, [[True] * 3 + [False], [True] * 2 + [False] * 2])
    raw = model.embed_frames(frames, normalize=False)
    np.testing.assert_allclose(video[0, :3], raw, atol=1e-5)
    text = model.embed_texts("a cat", normalize=False)
    np.testing.assert_allclose(
        model.score("a cat", video, mask), [[(raw @ text[0]).max(), (raw[:2] @ text[0]).max()]], atol=1e-4
    )
    np.testing.assert_allclose(model.embed_clips(clips)[0], plain.embed_clips(clips)[0], atol=1e-5)
    assert model.recipe.sampler == PerFrame.frame_spec


def test_a_model_without_tokenizer_says_what_to_type(make_model: Make) -> None:
    model = make_model(tokenizer=None)
    assert model.recipe.tokenizer is None
    with pytest.raises(CheckpointError, match=r"--tokenizer PATH.*bpe_simple_vocab"):
        model.embed_texts("a cat")


def test_a_model_without_text_refuses_words(make_model: Make, toy_tokenizer: Tokenizer) -> None:
    class Blind(CLIP):
        has_text = False

    config = ClipConfig.from_json(make_model().config)
    model = Model(Blind(config), config=config.to_json(), tokenizer=toy_tokenizer, name="blind", device="cpu")
    assert model.tokenizer is None
    with pytest.raises(Refusal, match="'blind' has no text tower"):
        model.embed_texts("a cat")


def test_too_long_a_text_is_never_cut_in_silence(make_model: Make) -> None:
    model = make_model()
    with pytest.raises(UsageError, match="holds 24"):
        model.embed_texts("word " * 40)
    with pytest.warns(UserWarning, match="It was cut"):
        model.embed_texts("word " * 40, truncate=True)


def test_a_tokenizer_that_does_not_fit_is_refused(make_model: Make, toy: dict) -> None:
    wide = Tokenizer.train(toy["strings"] * 3, vocab_size=700)
    with pytest.raises(CheckpointError, match="the text tower knows 620 tokens"):
        make_model(tokenizer=wide)
    vocab = Tokenizer.from_merges([], context_length=24).vocab
    vocab |= {"<|startoftext|>": 515, "<|endoftext|>": 514}
    with pytest.raises(CheckpointError, match="end id is 514 of 516"):
        make_model(tokenizer=Tokenizer(vocab, []))


def test_the_hash_follows_weights_and_config_not_precision(make_model: Make, tmp_path: Path) -> None:
    model = make_model()
    assert make_model(dtype="bfloat16").hash == model.hash
    half = {k: v.half() for k, v in model.module.state_dict().items()}
    assert hash_weights(half, model.config) == hash_weights(
        {k: v.float() for k, v in half.items()}, model.config
    )
    changed = {k: v.clone() for k, v in model.module.state_dict().items()}
    changed["logit_scale"] += 1
    assert hash_weights(changed, model.config) != model.hash
    assert hash_weights(model.module.state_dict(), {**model.config, "activation": "gelu"}) != model.hash


def test_half_precision_storage(make_model: Make, tmp_path: Path, texts: list[str]) -> None:
    model = make_model("stem")
    full, half = model.save(tmp_path / "full"), model.save(tmp_path / "half", dtype="float16")
    assert (half / WEIGHTS).stat().st_size < 0.6 * (full / WEIGHTS).stat().st_size
    again = load(half, device="cpu")
    assert {p.dtype for p in again.module.parameters()} == {torch.float32}
    assert (again.embed_texts(texts) * model.embed_texts(texts)).sum(1).min() > 0.999


def test_bfloat16_stays_near(make_model: Make, pictures: list[Image.Image], texts: list[str]) -> None:
    exact = make_model()
    rough = make_model(dtype="bfloat16")
    assert rough.embed_texts(texts).dtype == np.float32
    assert (rough.embed_texts(texts) * exact.embed_texts(texts)).sum(1).min() > 0.99
    assert (rough.embed_pictures(pictures) * exact.embed_pictures(pictures)).sum(1).min() > 0.99


def test_device_and_dtype_errors_name_the_choices(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    assert choose_device("auto") == torch.device("cpu")
    for name, message in (
        ("gpu", "auto, cpu, cuda"),
        ("cuda:1", "No CUDA"),
        ("mps", "MPS"),
        ("cuda:x", "no device"),
    ):
        with pytest.raises(UsageError, match=message):
            choose_device(name)
    assert choose_dtype(None, torch.device("cpu")) == torch.float32
    with pytest.raises(UsageError, match="float32, bfloat16 or float16"):
        choose_dtype("int8", torch.device("cpu"))  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="bfloat16"):
        choose_dtype("float16", torch.device("cpu"))


def test_saving_replaces_a_model_but_nothing_else(make_model: Make, tmp_path: Path) -> None:
    model = make_model()
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "diary.txt").write_text("mine")
    with pytest.raises(CheckpointError, match="holds other files"):
        model.save(tmp_path / "notes")
    (tmp_path / "file").write_text("mine")
    with pytest.raises(CheckpointError, match="is a file"):
        model.save(tmp_path / "file")
    model.save(tmp_path / "deep" / "made")
    model.name = "second"
    model.save(tmp_path / "deep" / "made")
    assert read_native(tmp_path / "deep" / "made").name == "second"
    assert [p.name for p in (tmp_path / "deep").iterdir()] == ["made"]


def test_a_failed_save_leaves_the_old_model(
    make_model: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = make_model()
    folder = model.save(tmp_path / "made")
    before = {p.name: p.read_bytes() for p in folder.iterdir()}

    def full_disk(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("moviola.clip.native.save_file", full_disk)
    with pytest.raises(OSError, match="No space left"):
        model.save(folder)
    assert {p.name: p.read_bytes() for p in folder.iterdir()} == before
    assert [p.name for p in tmp_path.iterdir()] == ["made"]


def test_broken_native_folders_say_what_is_wrong(make_model: Make, tmp_path: Path) -> None:
    folder = make_model().save(tmp_path / "made")
    manifest = json.loads((folder / MANIFEST).read_text())

    def with_manifest(**changes: object) -> None:
        (folder / MANIFEST).write_text(json.dumps({**manifest, **changes}))

    for changes, message in (
        ({"format": 2}, "reads up to 1"),
        ({"format": None}, "no format"),
        ({"recipe": {**manifest["recipe"], "tokenizer": "0" * 16}}, "another tokenizer"),
        ({"recipe": {**manifest["recipe"], "blur": 1}}, "blur"),
        ({"system": "x-clip"}, "system 'x-clip', not a plain CLIP"),
        ({"config": {**manifest["config"], "embed_dim": 25}}, "other shape"),
    ):
        with_manifest(**changes)
        with pytest.raises(CheckpointError, match=message):
            load(folder)
    with_manifest()
    weights = (folder / WEIGHTS).read_bytes()
    (folder / WEIGHTS).write_bytes(weights[: len(weights) // 2])
    with pytest.raises(CheckpointError, match="not a whole safetensors file"):
        load(folder)
    (folder / WEIGHTS).unlink()
    with pytest.raises(CheckpointError, match="no weights at"):
        load(folder)


def test_loading_does_not_copy_the_weights(make_model: Make, tmp_path: Path) -> None:
    """float32 weights stay in the mapped file: a large model loads in well under twice its size."""
    native = read_native(make_model("resnet").save(tmp_path / "made"))
    with torch.device("meta"):
        module = CLIP(ClipConfig.from_json(native.config))
    assign(module, native.state, source="made")
    for key, parameter in module.named_parameters():
        assert parameter.data_ptr() == native.state[key].data_ptr(), key
        assert parameter.requires_grad


def test_a_loaded_model_can_be_trained_without_touching_its_file(make_model: Make, tmp_path: Path) -> None:
    folder = make_model().save(tmp_path / "made")
    before = (folder / WEIGHTS).read_bytes()
    model = from_native(read_native(folder), device="cpu")
    module = model.module.train()
    optimizer = torch.optim.SGD(module.parameters(), lr=1.0)
    tokens = torch.from_numpy(model.tokenizer(["a cat", "a dog"]))  # type: ignore[misc]
    logits, _ = module(torch.randn(2, 3, 32, 32), tokens)
    logits.square().sum().backward()
    optimizer.step()
    assert (folder / WEIGHTS).read_bytes() == before
    assert load(folder, device="cpu").hash != hash_weights(module.state_dict(), model.config)


def test_no_warnings_while_embedding(make_model: Make, pictures: list[Image.Image], texts: list[str]) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for kind in ("vit", "resnet"):
            model = make_model(kind)
            model.embed_pictures(pictures)
            model.embed_frames(frames_of(pictures))
            model.embed_texts(texts)


# --------------------------------------------------------------------------------------------------
# Which frames of a clip are taken
# --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("spec", "given", "index", "mask"),
    [
        (FrameSpec(None), 3, [0, 1, 2], [1, 1, 1]),
        (FrameSpec(2, "middle"), 8, [2, 6], [1, 1]),
        (FrameSpec(4, "middle"), 4, [0, 1, 2, 3], [1] * 4),
        (FrameSpec(3, "uniform"), 9, [0, 4, 8], [1] * 3),
        (FrameSpec(2, "consecutive", stride=3), 10, [3, 6], [1, 1]),
        (FrameSpec(4, "middle", "repeat-last"), 2, [0, 1, 1, 1], [1] * 4),
        (FrameSpec(5, "middle", "loop"), 2, [0, 1, 0, 1, 0], [1] * 5),
        (FrameSpec(4, "middle", "mask"), 2, [0, 1, 1, 1], [1, 1, 0, 0]),
        (FrameSpec(4, "consecutive", "mask", stride=2), 3, [0, 2, 2, 2], [1, 1, 0, 0]),
    ],
)
def test_frames_are_chosen_as_the_spec_says(
    spec: FrameSpec, given: int, index: list[int], mask: list[int]
) -> None:
    chosen, real = choose_frames(spec, np.arange(given, dtype=float))
    assert chosen.tolist() == index
    assert real.astype(int).tolist() == mask


def test_the_rate_sampler_follows_true_times() -> None:
    times = np.array([0.0, 0.1, 0.2, 1.0, 1.9, 2.0, 2.1])
    index, _ = choose_frames(FrameSpec(None, "rate", rate=1.0), times)
    assert index.tolist() == [0, 3, 5]
    with pytest.raises(UsageError, match="rate above zero"):
        choose_frames(FrameSpec(None, "rate"), times)
    with pytest.raises(UsageError, match="needs 9 frames"):
        choose_frames(FrameSpec(9, "uniform", "refuse"), times)
