from __future__ import annotations

import json
import math
import warnings
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import load_file, save_file

import moviola
from moviola import media
from moviola.clip.config import ClipConfig, TextConfig, VitConfig
from moviola.clip.foreign_tokenizer import LibraryTokenizer
from moviola.clip.loaded import Model
from moviola.clip.model import CLIP
from moviola.parts.backbones.hf_text import distilbert
from moviola.parts.backbones.space_time_vit import divided_attention, grown_table
from moviola.systems.registry import all_systems
from moviola.systems.video.frozen_in_time import (
    KEYS,
    TRAINING,
    Config,
    FrozenInTime,
    b_16_8f,
    example,
    grow_frames,
    run_claim,
    small,
    tiny,
)
from moviola.training.caching import compute
from moviola.training.config import TrainConfig
from moviola.training.video_text import (
    VideoText,
    fewer_frames,
    max_margin_loss,
    norm_softmax_loss,
    similarity,
)
from moviola.types import CheckpointError, ClipBatch, Encoder, PairObjective, Refusal, UsageError

# --------------------------------------------------------------------------------------------------
# Parity
# --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def oracle(oracles_dir):
    folder = oracles_dir / "15-frozen-in-time"
    return json.loads((folder / "a.json").read_text()), load_file(folder / "a.safetensors")


def part(data, prefix):
    return {k.removeprefix(prefix): v for k, v in data.items() if k.startswith(prefix)}


def oracle_config(meta):
    c = meta["config"]
    text = replace(
        distilbert(), vocab_size=c["vocab"], width=c["twidth"], layers=c["tlayers"], heads=c["theads"],
        hidden=4 * c["twidth"], positions=c["ctx"], context_length=c["ctx"],
    )  # fmt: skip
    vision = VitConfig(c["image"], c["patch"], c["vwidth"], c["vlayers"], c["vheads"], c["mlp_ratio"])
    return Config(vision, text, c["num_frames"], c["proj"])


def clip_of(frames_BTCHW, real=None):
    mask_BT = torch.ones(frames_BTCHW.shape[:2], dtype=torch.bool)
    if real is not None:
        mask_BT = torch.arange(frames_BTCHW.shape[1]) < torch.tensor(real)[:, None]
    return ClipBatch(frames_BTCHW, mask_BT.float().cumsum(1), mask_BT)


def test_parity_of_every_output_and_gradient(oracle):
    meta, data = oracle
    state = {f"module.{name}": tensor for name, tensor in part(data, "param/").items()}
    model = FrozenInTime.from_official(state, oracle_config(meta))
    got = {}
    for frames in meta["config"]["clip_lengths"]:
        video = data["in/video"][:, :frames]
        seen = model.video_model.embed(video)
        block = model.video_model.transformer.resblocks[0]
        time = divided_attention(block.time_attn, block.ln_time(seen), block.patches, "time")
        got |= {
            f"block0_time_F{frames}": time,
            f"block0_F{frames}": block(seen),
            f"cls_F{frames}": model.video_model.vector(video),
            f"video_F{frames}": model.encode_frames(video),
        }
    assert torch.equal(data["in/input_ids"] != 0, data["in/attention_mask"].bool())
    got["text"] = model.encode_text(data["in/input_ids"])
    got["sim"] = similarity(got["text"], got[f"video_F{meta['config']['num_frames']}"])
    got["loss"] = VideoText(model)(model, {"clip": clip_of(data["in/video"]), "text": data["in/input_ids"]})[
        "contrastive"
    ]
    got["loss"].backward()
    grads = KEYS.to_official({k: p.grad for k, p in model.named_parameters()})
    for mode in ("zeros", "interp", "bilinear"):
        for frames in (2, 7):
            table = grown_table(model.video_model.temporal_embedding, frames, mode)
            got[f"inflate_{mode}_{frames}"] = table[None]
    for name, loss in {
        "norm_softmax_0.05": norm_softmax_loss,
        "norm_softmax_0.2": lambda x: norm_softmax_loss(x, 0.2),
        "max_margin_fix": max_margin_loss,
        "max_margin_nofix": lambda x: max_margin_loss(x, own_pairs=True),
    }.items():
        scores = data["in/sims"].clone().requires_grad_()
        got[f"loss_{name}"] = loss(scores)
        (grads[f"sims_{name}"],) = torch.autograd.grad(got[f"loss_{name}"], scores)
    assert set(got) == set(part(data, "out/"))
    assert set(part(data, "grad/")) <= set(grads)
    wanted = part(data, "out/") | {f"grad of {k}": v for k, v in part(data, "grad/").items()}
    got |= {f"grad of {k}": grads[k] for k in part(data, "grad/")}
    for name, reference in wanted.items():
        assert got[name].shape == reference.shape, name
        worst = ((got[name].detach() - reference).abs() / (1 + reference.abs())).max()
        assert worst <= meta["tolerance"], f"{name}: {worst:.2e}"


def official_names(layers=12, text_layers=6):
    """The published files' names, from the card and the library, at paper size."""
    names = ["cls_token", "pos_embed", "temporal_embed", "norm.weight", "norm.bias"]
    names += ["patch_embed.proj.weight", "patch_embed.proj.bias"]
    parts = ["norm1", "norm2", "norm3", "attn.qkv", "attn.proj", "timeattn.qkv", "timeattn.proj"]
    parts += ["mlp.fc1", "mlp.fc2"]
    names += [f"blocks.{n}.{p}.{kind}" for n in range(layers) for p in parts for kind in ("weight", "bias")]
    names = [f"video_model.{name}" for name in names]
    embeddings = [
        "word_embeddings.weight",
        "position_embeddings.weight",
        "LayerNorm.weight",
        "LayerNorm.bias",
    ]
    names += [f"text_model.embeddings.{name}" for name in embeddings]
    parts = [f"attention.{p}" for p in ("q_lin", "k_lin", "v_lin", "out_lin")]
    parts += ["sa_layer_norm", "ffn.lin1", "ffn.lin2", "output_layer_norm"]
    names += [
        f"text_model.transformer.layer.{n}.{p}.{kind}"
        for n in range(text_layers)
        for p in parts
        for kind in ("weight", "bias")
    ]
    return [*names, "txt_proj.1.weight", "txt_proj.1.bias", "vid_proj.0.weight", "vid_proj.0.bias"]


@pytest.mark.parametrize("config", [Config(), b_16_8f()])
def test_keys_know_every_official_name_at_paper_size(config):
    with torch.device("meta"):
        model = FrozenInTime(config)
    official = KEYS.to_official(model.state_dict())
    assert sorted(official) == sorted(official_names())
    assert official["video_model.temporal_embed"].shape == (1, config.frames, 768)
    assert official["video_model.cls_token"].shape == (1, 1, 768)
    assert official["video_model.pos_embed"].shape == (1, 197, 768)
    assert set(KEYS.from_official(official)) == set(model.state_dict())


# --------------------------------------------------------------------------------------------------
# The model
# --------------------------------------------------------------------------------------------------


def model_of(config=None, *, seed=0, learnt=True):
    torch.manual_seed(seed)
    made = FrozenInTime(config or tiny())
    if learnt:
        for name, parameter in made.named_parameters():
            if "time_attn" in name or "temporal" in name:
                torch.nn.init.normal_(parameter, std=0.3)
    return made.eval()


def pixels(*shape, seed=0):
    return torch.randn(*shape, 3, 16, 16, generator=torch.Generator().manual_seed(seed))


def words(count, seed=0):
    made = torch.randint(1, 32, (count, 8), generator=torch.Generator().manual_seed(seed))
    made[::2, 5:] = 0
    return made


def test_it_is_an_encoder_and_its_objective_a_pair_objective():
    model = model_of()
    assert isinstance(model, Encoder)
    assert isinstance(VideoText(model), PairObjective)
    assert FrozenInTime.from_config(json.loads(json.dumps(model.config.to_json()))).config == model.config


def test_a_picture_is_a_clip_of_one_frame_and_short_clips_are_what_their_mask_says():
    model, frames = model_of(), pixels(5, 3)
    got = model.encode_video(clip_of(frames, [3, 1, 2, 1, 3]))
    torch.testing.assert_close(got[[1, 3]], model.encode_image(frames[[1, 3], 0]))
    torch.testing.assert_close(got[2:3], model.encode_frames(frames[2:3, :2]))
    torch.testing.assert_close(got[[0, 4]], model.encode_frames(frames[[0, 4]]))
    changed = frames.clone()
    changed[1, 1:] = 7.0  # what the mask hides
    torch.testing.assert_close(model.encode_video(clip_of(changed, [3, 1, 2, 1, 3])), got)
    assert model.encode_video(clip_of(frames[:0])).shape == (0, 12)


@pytest.mark.parametrize("mode", ["zeros", "interp", "bilinear"])
def test_growing_keeps_one_frame_bit_for_bit(mode):
    one = model_of(replace(tiny(), frames=1))
    grown = grow_frames(one, 4, mode)
    assert grown.config.frames == grown.frame_spec.count == 4
    still = pixels(3, 1)
    assert torch.equal(one.encode_frames(still), grown.encode_frames(still))
    assert torch.equal(grown.video_model.temporal_embedding[:1], one.video_model.temporal_embedding)
    with torch.no_grad():
        grown.vid_proj[0].bias.add_(1)
    assert not torch.equal(one.vid_proj[0].bias, grown.vid_proj[0].bias)  # a copy


def test_growing_by_zeros_keeps_clips_and_shrinking_undoes_it():
    model = model_of()
    grown, clip = grow_frames(model, 8), pixels(2, 3)
    assert torch.equal(model.encode_frames(clip), grown.encode_frames(clip))
    for name, tensor in grow_frames(grown, 3).state_dict().items():
        assert torch.equal(tensor, model.state_dict()[name]), name


def test_score_is_cosine_over_temperature():
    model = model_of()
    text, video = model.encode_text(words(4)), model.encode_frames(pixels(3, 2))
    wanted = 20 * F.normalize(text, dim=-1) @ F.normalize(video, dim=-1).T
    torch.testing.assert_close(model.score(text, video), wanted)
    assert float(model.logit_scale.exp()) == pytest.approx(20)


def test_without_projections_towers_meet_as_they_are():
    config = replace(tiny(), embed_dim=16, projection="none")
    model = model_of(config)
    assert torch.equal(model.encode_frames(pixels(2, 2)), model.video_model.vector(pixels(2, 2)))
    state = KEYS.to_official(model.state_dict())
    assert not any(name.startswith(("txt_proj", "vid_proj")) for name in state)
    assert torch.equal(
        FrozenInTime.from_official(state, config).encode_text(words(2)), model.encode_text(words(2))
    )


# --------------------------------------------------------------------------------------------------
# Checkpoints
# --------------------------------------------------------------------------------------------------


def wide():
    """Heads are 64 wide, so that sizes can be read from the shapes."""
    text = replace(distilbert(), vocab_size=40, width=128, layers=2, heads=2, hidden=64, positions=9)
    return Config(VitConfig(32, 8, 128, 3, 2, 2.0), replace(text, context_length=9), 2, 24)


@pytest.mark.parametrize("config", [wide(), replace(wide(), embed_dim=128, projection="none")])
def test_sizes_follow_from_the_shapes(config):
    model = model_of(config)
    state = {f"module.{k}": v for k, v in KEYS.to_official(model.state_dict()).items()}
    state["module.text_model.embeddings.position_ids"] = torch.arange(9)[None]
    read = FrozenInTime.from_official(state)
    assert read.config == config
    for name, tensor in read.state_dict().items():
        assert torch.equal(tensor, model.state_dict()[name]), name


def test_the_papers_start_is_the_image_vit_and_the_text_tower_it_is_given():
    source = model_of(wide())
    official = KEYS.to_official(source.state_dict())
    image = {
        k: v
        for k, v in part(official, "video_model.").items()
        if "timeattn" not in k and "norm3" not in k and k != "temporal_embed"
    }
    image |= {
        "head.weight": torch.zeros(5, 128),
        "head.bias": torch.zeros(5),
        "pre_logits.fc.bias": torch.zeros(1),
    }
    text = {f"distilbert.{k}": v for k, v in part(official, "text_model.").items()}
    text["vocab_projector.bias"] = torch.zeros(40)
    made = FrozenInTime.from_towers(image, text, wide())
    assert torch.equal(made.text_model(words(2)), source.text_model(words(2)))
    assert torch.equal(made.video_model.positional_embedding, source.video_model.positional_embedding)
    assert not made.video_model.temporal_embedding.any()
    assert not made.video_model.transformer.resblocks[0].time_attn.in_proj_weight.any()
    del image["blocks.1.attn.qkv.bias"]
    with pytest.raises(CheckpointError, match=r"1 missing: .*1\.attn\.in_proj_bias"):
        FrozenInTime.from_towers(image, text, wide())


def word_tokenizer(names):
    """A WordPiece file as BERT's: lower case, [CLS] and [SEP] around, [PAD] is 0."""
    from tokenizers import Tokenizer, normalizers, pre_tokenizers, processors
    from tokenizers.models import WordPiece

    ids = {name: n for n, name in enumerate(["[PAD]", "[UNK]", "[CLS]", "[SEP]", *names])}
    made = Tokenizer(WordPiece(ids, unk_token="[UNK]"))
    made.normalizer = normalizers.BertNormalizer(lowercase=True)
    made.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    made.post_processor = processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    return LibraryTokenizer(json.loads(made.to_str()))


def loaded(module, **options):
    return Model(module, config=module.config.to_json(), system="frozen-in-time", device="cpu", **options)


def test_bert_words_through_the_houses_tokenizer():
    module = model_of()
    model = loaded(module, recipe=module.recipe, tokenizer=word_tokenizer(["red", "ring", "moves"]))
    assert model.recipe.context_length == 8
    assert model.recipe.mean == (0.485, 0.456, 0.406)
    assert model.recipe.sampler.padding == "mask"
    got = model.embed_texts(["Red RING moves", "red"], normalize=False)
    tokens = torch.tensor([[2, 4, 5, 6, 3], [2, 4, 3, 0, 0]])
    with torch.no_grad():
        np.testing.assert_allclose(got, module.encode_text(tokens).numpy(), atol=1e-5)
    with pytest.raises(UsageError):
        model.embed_texts("red " * 20)


@pytest.fixture
def registered():
    if "frozen-in-time" not in {system.slug for system in all_systems()}:
        pytest.skip("frozen-in-time is not registered yet")


def test_load_tells_the_authors_files_and_refuses_a_clip(tmp_path, registered):
    source = model_of(wide())
    state = {f"module.{k}": v for k, v in KEYS.to_official(source.state_dict()).items()}
    torch.save({"state_dict": state, "epoch": 3}, tmp_path / "authors.pth")
    save_file({k.removeprefix("module."): v for k, v in state.items()}, tmp_path / "authors.safetensors")
    for name in ("authors.pth", "authors.safetensors"):
        model = moviola.load(tmp_path / name)
        assert model.system == "frozen-in-time"
        assert model.recipe.interpolation == "bilinear"
        pixels_BCHW = torch.ones(1, 3, 32, 32)
        torch.testing.assert_close(model.module.encode_image(pixels_BCHW), source.encode_image(pixels_BCHW))
    with pytest.raises(Refusal, match="does not start from a CLIP"):
        moviola.load("frozen-in-time", init="builtin")


def test_an_index_of_videos_is_searched_with_words(tmp_path, registered):
    (tmp_path / "films").mkdir()
    shade = np.linspace(0, 255, 20)[:, None, None, None]
    media.write_video(
        tmp_path / "films" / "ramp.mp4", np.tile(shade, (1, 32, 32, 3)).astype(np.uint8), rate=10
    )
    Image.new("RGB", (32, 32), "red").save(tmp_path / "films" / "still.png")
    module = model_of()
    model = loaded(module, recipe=module.recipe, tokenizer=word_tokenizer(["red", "ring", "moves"]))
    model.save(tmp_path / "model")
    moviola.index(tmp_path / "films", to=tmp_path / "index", model=tmp_path / "model")
    found = moviola.search(tmp_path / "index", "red ring")
    assert {hit.file.rpartition("/")[2] for hit in found} == {"ramp.mp4", "still.png"}


# --------------------------------------------------------------------------------------------------
# Training
# --------------------------------------------------------------------------------------------------


def test_the_loss_is_the_hand_formula_and_tends_to_zero():
    scores = torch.tensor([[0.9, 0.1, -0.2], [0.3, 0.4, 0.0], [0.1, 0.6, 0.8]])
    wanted = 0.0
    for matrix in (scores.tolist(), scores.T.tolist()):
        for i, row in enumerate(matrix):
            wanted += (math.log(sum(math.exp(x / 0.05) for x in row)) - row[i] / 0.05) / 3
    assert float(norm_softmax_loss(scores)) == pytest.approx(wanted, rel=1e-5)
    assert float(norm_softmax_loss(2 * torch.eye(6) - 1)) < 1e-12
    assert float(max_margin_loss(torch.eye(6))) == 0


def test_pictures_and_clips_are_contrasted_apart():
    model = model_of()
    objective, frames, tokens = VideoText(model), pixels(5, 3), words(5)
    real = [3, 1, 2, 1, 1]
    both = objective(model, {"clip": clip_of(frames, real), "text": tokens})["contrastive"]
    parts = []
    for rows in ([0, 2], [1, 3, 4]):
        clip = clip_of(frames[rows], [real[r] for r in rows])
        parts.append(objective(model, {"clip": clip, "text": tokens[rows]})["contrastive"])
    torch.testing.assert_close(both, 0.4 * parts[0] + 0.6 * parts[1])


@pytest.mark.parametrize("frames", [None, 1])
def test_gradients_do_not_depend_on_the_micro_batch(frames):
    model, tokens = model_of(), words(6)
    objective = VideoText(model, frames=frames).eval()  # the middle frame, not one that each part draws
    batch = {"clip": clip_of(pixels(6, 3), [3, 1, 2, 3, 1, 3]), "text": tokens}
    grads = []
    for size in (None, 2):
        model.zero_grad()
        compute(model, objective, batch, micro_batch=size)
        grads.append({k: p.grad.clone() for k, p in model.named_parameters()})
    for name, grad in grads[0].items():
        torch.testing.assert_close(grads[1][name], grad, rtol=1e-4, atol=1e-4, msg=name)


def test_fewer_frames_are_the_middles_of_equal_parts_or_drawn_within_them():
    frames = torch.arange(8.0)[None, :, None, None, None].expand(4, 8, 1, 1, 1)
    clip = clip_of(frames, [8, 1, 2, 7])
    picked = fewer_frames(clip, 2, draw=False)
    assert picked.frames_BTCHW[:, :, 0, 0, 0].tolist() == [[2, 6], [0, 1], [0, 1], [1, 5]]
    assert picked.mask_BT.tolist() == [[True, True], [True, False], [True, True], [True, True]]
    assert fewer_frames(clip, 20, draw=True).mask_BT.equal(clip.mask_BT)
    torch.manual_seed(0)
    drawn = torch.stack(
        [fewer_frames(clip, 2, draw=True).frames_BTCHW[[0, 3], :, 0, 0, 0] for _ in range(200)]
    )
    assert set(drawn[:, 0, 0].tolist()) == {0, 1, 2, 3}
    assert set(drawn[:, 0, 1].tolist()) == {4, 5, 6, 7}
    assert set(drawn[:, 1].flatten().tolist()) == {0, 1, 2, 3, 4, 5, 6}


def test_a_model_for_four_frames_trains_on_one():
    model = model_of(replace(tiny(), frames=4), learnt=False)
    objective = VideoText(model, frames=1)
    objective(model, {"clip": clip_of(pixels(4, 4)), "text": words(4)})["contrastive"].backward()
    table = model.video_model.temporal_embedding.grad
    assert table[0].any()
    assert not table[1:].any()


def test_repeated_texts_warn_once():
    model = model_of()
    objective, batch = VideoText(model), {"clip": clip_of(pixels(4, 2)), "text": words(4)[[0, 1, 0, 3]]}
    with pytest.warns(UserWarning, match="1 of the 4 texts"):
        objective(model, batch)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        objective(model, batch)


def test_training_starts_from_its_own_models_alone():
    model = model_of()
    assert TRAINING.start(model) is model
    vision, text = (
        VitConfig(16, 8, width=16, layers=1, heads=2),
        TextConfig(8, 32, width=16, layers=1, heads=2),
    )
    with pytest.raises(Refusal, match="cannot start from a CLIP"):
        TRAINING.start(CLIP(ClipConfig(16, vision, text)))
    assert not hasattr(FrozenInTime, "from_clip")
    TrainConfig(steps=1, **TRAINING.recipe)
    for preset in TRAINING.presets.values():
        assert Config.from_json(json.loads(json.dumps(preset().to_json()))) == preset()
    assert small().text.context_length == 77


def test_the_example_has_gradients_everywhere():
    made = example(0)
    made.run(**made.inputs)["loss"].backward()
    assert all(p.grad is not None for p in made.module.parameters())


# --------------------------------------------------------------------------------------------------
# Bad input
# --------------------------------------------------------------------------------------------------


def without(name):
    state = KEYS.to_official(model_of(wide()).state_dict())
    del state[name]
    return state


def other_patches():
    state = KEYS.to_official(model_of(wide()).state_dict())
    return FrozenInTime.from_official(state, replace(wide(), vision=replace(wide().vision, image_size=64)))


BAD = {
    "too many frames": (
        lambda: model_of().encode_video(clip_of(pixels(2, 4))), UsageError, "1 to 3 frames, got 4"
    ),
    "a picture as a clip": (lambda: model_of().encode_frames(pixels(2)), UsageError, "a clip of one frame"),
    "another size": (
        lambda: model_of().encode_image(torch.zeros(2, 3, 24, 16)), UsageError, r"\(B, T, 3, 16, 16\)"
    ),
    "nothing but padding": (
        lambda: model_of().encode_video(clip_of(pixels(2, 3), [2, 0])), UsageError, "without a real frame"
    ),
    "scores not square": (lambda: norm_softmax_loss(torch.zeros(3, 4)), UsageError, "N x N"),
    "margins not square": (lambda: max_margin_loss(torch.zeros(3, 4)), UsageError, "N x N"),
    "other counts": (
        lambda: VideoText()(model_of(), {"clip": clip_of(pixels(3, 2)), "text": words(2)}),
        UsageError, "2 texts and 3 clips",
    ),
    "loss": (lambda: VideoText(loss="triplet"), UsageError, "triplet"),
    "margin": (lambda: VideoText(margin=0), UsageError, "margin above 0"),
    "frames": (lambda: VideoText(frames=0), UsageError, "at least one frame"),
    "projection": (lambda: Config(projection="linear"), UsageError, "minimal or none, got 'linear'"),
    "widths": (lambda: replace(tiny(), projection="none"), UsageError, "one width"),
    "temperature": (lambda: Config(temperature=0.0), UsageError, "temperature"),
    "growth": (lambda: grow_frames(model_of(), 4, "cubic"), UsageError, "cubic"),
    "growth to nothing": (lambda: grow_frames(model_of(), 0), UsageError, "at least one frame"),
    "too long a text": (
        lambda: model_of().encode_text(torch.ones(1, 9, dtype=torch.int64)), UsageError, "at most 8 tokens"
    ),
    "other patches": (other_patches, CheckpointError, "positional_embedding: expected"),
    "a name missing": (
        lambda: FrozenInTime.from_official(without("video_model.blocks.1.norm3.bias")),
        CheckpointError, "ln_time.bias",
    ),
    "no table of times": (
        lambda: FrozenInTime.from_official(without("video_model.temporal_embed")),
        CheckpointError, "temporal_embed",
    ),
    "a BERT": (
        lambda: FrozenInTime.from_official({"text_model.pooler.dense.weight": torch.zeros(1)}),
        CheckpointError, "only DistilBERT",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_bad_input(name):
    call, error, said = BAD[name]
    with pytest.raises(error, match=said):
        call()


@pytest.mark.slow
@pytest.mark.parametrize("arm", ["1 frame, videos only", "curriculum"])
def test_the_claim_runs(arm):
    """What comes out is the claim's to say, at full length; here that a short run trains on what it says."""
    figures = run_claim(arm, 7, first=2, second=3)
    assert 0 <= figures["pair accuracy"] <= 100
    assert 0 <= figures["new things in clips, top-1"] <= 100
    if arm == "curriculum":
        assert 64 * (2 + 3) < 1000 * figures["thousand frames trained on"] < 64 * (2 + 3 * 4)
    else:
        assert figures["thousand frames trained on"] == pytest.approx(64 * 5 / 1000)
