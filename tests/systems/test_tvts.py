from __future__ import annotations

import json
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import load_file

import moviola
from moviola import media
from moviola.clip.config import ClipConfig, TextConfig, VitConfig
from moviola.clip.loaded import Model
from moviola.clip.model import CLIP
from moviola.parts.backbones.hf_text import distilbert
from moviola.parts.backbones.tubelet_vit import TubeletPatches, TubeletViT
from moviola.systems.registry import all_systems
from moviola.systems.video.tvts import KEYS, TRAINING, Config, SortHead, Tvts, example, run_claim, small, tiny
from moviola.training.caching import compute
from moviola.training.config import TrainConfig
from moviola.training.loop import train
from moviola.training.script_sorting import ScriptSorting
from moviola.training.video_text import norm_softmax_loss, similarity
from moviola.types import (
    CheckpointError,
    ClipBatch,
    Encoder,
    PairObjective,
    Refusal,
    ScriptField,
    UsageError,
)

# --------------------------------------------------------------------------------------------------
# Parity
# --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def oracle(oracles_dir):
    folder = oracles_dir / "35-tvts"
    return json.loads((folder / "a.json").read_text()), load_file(folder / "a.safetensors")


def part(data, prefix):
    return {k.removeprefix(prefix): v for k, v in data.items() if k.startswith(prefix)}


def oracle_config(meta):
    c = meta["config"]
    text = replace(
        distilbert(), vocab_size=c["vocab"], width=c["width"], layers=c["tlayers"], heads=c["theads"],
        hidden=4 * c["width"], positions=c["ctx"], context_length=c["ctx"],
    )  # fmt: skip
    vision = VitConfig(c["image"], c["patch"], c["width"], c["vlayers"], c["vheads"], c["mlp_ratio"])
    return Config(
        vision, text, c["num_frames"], c["tubelet"], c["proj"], c["n_trans"], c["sort_layers"],
        c["sort_heads"], c["temperature"],
    )  # fmt: skip


def clip_of(frames_BTCHW):
    mask_BT = torch.ones(frames_BTCHW.shape[:2], dtype=torch.bool)
    return ClipBatch(frames_BTCHW, mask_BT.float().cumsum(1), mask_BT)


class Kept(ScriptSorting):
    """With given patches instead of drawn ones."""

    def __init__(self, model, keep_BUK, **options):
        super().__init__(model, **options)
        self.keep_BUK = keep_BUK

    def outputs(self, model, batch):
        draw, model.video_model.draw_keep = model.video_model.draw_keep, lambda *_: self.keep_BUK
        try:
            return super().outputs(model, batch)
        finally:
            model.video_model.draw_keep = draw


def grads_of(model):
    named = {k: torch.zeros_like(p) if p.grad is None else p.grad for k, p in model.named_parameters()}
    return KEYS.to_official(named)


def test_parity_of_every_output_and_gradient(oracle):
    meta, data = oracle
    state = {f"module.{name}": tensor for name, tensor in part(data, "param/").items()}
    model = Tvts.from_official(state, oracle_config(meta))
    tower, video, keep = model.video_model, data["in/video"], data["in/keep_ind"]
    count, segments = data["in/sort_labels"].shape
    got = {"block0_in": tower.embed(video, keep)}
    got["block0_out"] = tower.transformer.resblocks[0](got["block0_in"])
    tokens = got["video_tokens"] = tower(video, keep_BUK=keep).tokens_BLD
    assert torch.equal(data["in/input_ids"] != 0, data["in/attention_mask"].bool())
    script_BSL = data["in/input_ids"].unflatten(0, (segments, count)).transpose(0, 1)
    features = model.text_model(script_BSL.flatten(0, 1)).unflatten(0, (count, segments)).detach()
    got["transcript_features"] = features
    got["sort_logits"] = model.pred_model(tokens, features)
    got["sort_logits_reversed_transcripts"] = model.pred_model(tokens, features.flip(1))
    every = torch.arange(16).expand(count, 4, 16)
    got["all_patches_tokens"] = tower(video, keep_BUK=every).tokens_BLD
    got["half_clip_tokens"] = tower(video[:, :4], keep_BUK=every).tokens_BLD
    objective = Kept(model, keep)
    assert torch.equal(data["in/sort_labels"], torch.arange(segments).expand(count, -1))
    made = objective.outputs(model, {"clip": clip_of(video), "script": script_BSL})
    got |= {"text_embed": made["text"], "video_embed": made["video"]}
    got["sim"] = similarity(made["text"], made["video"]).T  # a row is a video
    losses = objective.loss(model, made)
    got |= {"loss_contrastive": losses["contrastive"], "loss_sort_times2": losses["sort"]}
    got["total"] = losses["contrastive"] + losses["sort"]
    got["total"].backward()
    grads = {f"grad of {k}": g for k, g in grads_of(model).items()}
    model.zero_grad()
    (objective(model, {"clip": clip_of(video), "script": script_BSL})["sort"] / 2).backward()
    sort_only = grads_of(model)
    assert not any(sort_only[k].any() for k in sort_only if k.startswith(("text_model", "txt_", "vid_")))
    grads["sort of video_model.cls_token"] = sort_only["video_model.cls_token"]
    wanted = part(data, "out/") | {f"grad of {k}": v for k, v in part(data, "grad/").items()}
    wanted |= {f"sort of {k}": v for k, v in part(data, "grad_sort_only/").items()}
    assert set(got) == set(part(data, "out/"))
    got |= {k: g for k, g in grads.items() if k in wanted}
    assert set(got) == set(wanted)
    for name, reference in wanted.items():
        assert got[name].shape == reference.shape, name
        worst = ((got[name].detach() - reference).abs() / (1 + reference.abs())).max()
        assert worst <= meta["tolerance"], f"{name}: {worst:.2e}"


def official_names(layers=12, text_layers=6, sort_layers=2):
    """The published files' names, from the card and the library, at paper size."""
    kinds = ("weight", "bias")
    block = ["norm1", "norm2", "attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2"]
    names = [f"video_model.{n}" for n in ("cls_token", "pos_embed", "temporal_embed")]
    names += [f"video_model.{n}.{kind}" for n in ("norm", "patch_embed.proj") for kind in kinds]
    names += [f"video_model.blocks.{n}.{p}.{kind}" for n in range(layers) for p in block for kind in kinds]
    names += ["pred_model.type_embed"]
    names += [f"pred_model.{n}.{kind}" for n in ("norm", "head") for kind in kinds]
    names += [
        f"pred_model.blocks.{n}.{p}.{kind}" for n in range(sort_layers) for p in block for kind in kinds
    ]
    for name in (
        "word_embeddings.weight",
        "position_embeddings.weight",
        "LayerNorm.weight",
        "LayerNorm.bias",
    ):
        names.append(f"text_model.embeddings.{name}")
    parts = [f"attention.{p}" for p in ("q_lin", "k_lin", "v_lin", "out_lin")]
    parts += ["sa_layer_norm", "ffn.lin1", "ffn.lin2", "output_layer_norm"]
    names += [
        f"text_model.transformer.layer.{n}.{p}.{kind}"
        for n in range(text_layers)
        for p in parts
        for kind in kinds
    ]
    return [*names, *(f"{n}.{kind}" for n in ("txt_proj.1", "vid_proj.0") for kind in kinds)]


def test_keys_know_every_official_name_at_paper_size():
    with torch.device("meta"):
        model = Tvts(Config())
    official = KEYS.to_official(model.state_dict())
    assert sorted(official) == sorted(official_names())
    assert official["video_model.temporal_embed"].shape == (1, 8, 768)
    assert official["video_model.pos_embed"].shape == (1, 197, 768)
    assert official["video_model.cls_token"].shape == (1, 1, 768)
    assert official["video_model.patch_embed.proj.weight"].shape == (768, 3, 2, 16, 16)
    assert official["pred_model.type_embed"].shape == (1, 2, 768)
    assert official["pred_model.head.weight"].shape == (4, 768)
    assert set(KEYS.from_official(official)) == set(model.state_dict())
    assert model.video_model.draw_keep(1, 16, 0.25).shape == (1, 8, 49)


# --------------------------------------------------------------------------------------------------
# The tower
# --------------------------------------------------------------------------------------------------


def model_of(config=None, *, seed=0, learnt=True):
    torch.manual_seed(seed)
    made = Tvts(config or tiny())
    if learnt:
        torch.nn.init.normal_(made.video_model.temporal_embedding, std=0.5)
        torch.nn.init.normal_(made.pred_model.type_embed, std=0.5)
    return made.eval()


def pixels(*shape, seed=0):
    return torch.randn(*shape, 3, 16, 16, generator=torch.Generator().manual_seed(seed))


def words(*shape, seed=0):
    return torch.randint(1, 32, (*shape, 8), generator=torch.Generator().manual_seed(seed))


def test_tubelets_are_a_linear_map_of_blocks():
    patches = TubeletPatches(3, 5, 4, tubelet=2)
    clip = torch.randn(2, 4, 3, 8, 12)
    got = patches(clip)
    assert got.shape == (2, 2, 6, 5)
    block = clip[1, 2:4, :, 4:8, 8:12].transpose(0, 1)  # the second tube, second row, third column
    wanted = (patches.weight * block).sum((1, 2, 3, 4)) + patches.bias
    torch.testing.assert_close(got[1, 1, 5], wanted)
    plain = torch.nn.Conv3d.forward(patches, clip.transpose(1, 2))
    torch.testing.assert_close(got, plain.flatten(3).permute(0, 2, 3, 1))


def test_keeping_all_patches_is_dropping_none_and_dropped_ones_do_not_matter():
    tower, clip = model_of().video_model, pixels(2, 4)
    every = torch.arange(4).expand(2, 2, 4)
    assert torch.equal(tower(clip, keep_BUK=every).tokens_BLD, tower(clip).tokens_BLD)
    keep = torch.tensor([[[2, 0], [1, 3]], [[0, 1], [3, 2]]])
    kept = tower(clip, keep_BUK=keep).tokens_BLD
    assert kept.shape == (2, 5, 16)
    changed = clip.clone()
    changed[0, :2, :, :8, 8:] = 9  # patch 1 of the first tube of the first clip, which is dropped
    assert torch.equal(tower(changed, keep_BUK=keep).tokens_BLD, kept)
    assert not torch.equal(tower(changed).tokens_BLD[0], tower(clip).tokens_BLD[0])


def test_kept_patches_are_drawn_for_every_tube():
    tower = TubeletViT(VitConfig(16, 4, width=16, layers=1, heads=2), 8)
    keep = tower.draw_keep(50, 8, 0.25)
    assert keep.shape == (50, 4, 4)
    assert all(len(set(row)) == 4 for row in keep.flatten(0, 1).tolist())
    assert sorted(set(keep.flatten().tolist())) == list(range(16))
    assert not torch.equal(keep[:, 0].sort().values, keep[:, 1].sort().values)


def test_the_vector_alone_is_the_whole_towers():
    tower, clip = model_of().video_model, pixels(3, 4)
    torch.testing.assert_close(tower.vector(clip), tower(clip).vector_BD)
    keep = tower.draw_keep(3, 4, 0.5)
    torch.testing.assert_close(tower.vector(clip, keep), tower(clip, keep_BUK=keep).vector_BD)


def test_a_still_clip_of_a_started_tower_sees_the_image_vits_patches_twice():
    source = model_of(wide())
    official = KEYS.to_official(source.state_dict())
    image = part(official, "video_model.")
    kernel = 0.1 * torch.randn(128, 3, 8, 8)
    del image["temporal_embed"]
    image |= {"patch_embed.proj.weight": kernel, "head.weight": torch.zeros(5, 128)}
    text = {f"distilbert.{k}": v for k, v in part(official, "text_model.").items()}
    text["vocab_projector.bias"] = torch.zeros(40)
    made = Tvts.from_towers(image, text, wide())
    assert torch.equal(made.text_model(words(2)), source.text_model(words(2)))
    assert not made.video_model.temporal_embedding.any()
    assert not made.pred_model.type_embed.any()
    picture = torch.randn(1, 3, 32, 32)
    got = made.video_model.conv1(picture.expand(2, -1, -1, -1)[None])[0, 0]
    wanted = 2 * F.conv2d(picture, kernel, stride=8).flatten(2)[0].T + made.video_model.conv1.bias
    torch.testing.assert_close(got, wanted, atol=1e-4, rtol=1e-4)
    del image["blocks.1.attn.qkv.bias"]
    with pytest.raises(CheckpointError, match=r"1 missing: .*1\.attn\.in_proj_bias"):
        Tvts.from_towers(image, text, wide())


# --------------------------------------------------------------------------------------------------
# The encoder
# --------------------------------------------------------------------------------------------------


def test_it_is_an_encoder_and_its_objective_a_pair_objective():
    model = model_of()
    assert isinstance(model, Encoder)
    assert isinstance(ScriptSorting(model), PairObjective)
    assert Tvts.from_config(json.loads(json.dumps(model.config.to_json()))).config == model.config
    assert model.frame_spec.count == 8
    assert model.context_length == 8


def test_pictures_videos_and_texts_have_vectors_of_one_space():
    model, clip = model_of(), pixels(3, 8)
    video = model.encode_video(clip_of(clip))
    torch.testing.assert_close(video, model.vid_proj(model.video_model(clip).vector_BD))
    still = clip[:, :1]
    torch.testing.assert_close(
        model.encode_image(still[:, 0]), model.encode_video(clip_of(still.expand(-1, 2, -1, -1, -1)))
    )
    text = model.encode_text(words(4))
    assert model.pool(video) is video
    torch.testing.assert_close(
        model.score(text, video), 20 * F.normalize(text, dim=-1) @ F.normalize(video, dim=-1).T
    )


def test_the_order_of_frames_matters_by_the_table_of_times_alone():
    """Without it a tower of stills cannot tell a clip of equal pairs of frames from its reverse."""
    pairs = pixels(2, 4).repeat_interleave(2, 1)  # each tube is two equal frames
    for learnt in (False, True):
        model = model_of(learnt=learnt)
        forward, backward = (model.encode_video(clip_of(x)) for x in (pairs, pairs.flip(1)))
        assert torch.allclose(forward, backward, atol=1e-5) is not learnt


def wide():
    """Heads are 64 wide, so that sizes can be read from the shapes."""
    text = replace(distilbert(), vocab_size=40, width=128, layers=2, heads=2, hidden=64, positions=9)
    return Config(
        VitConfig(32, 8, 128, 3, 2, 2.0), replace(text, context_length=9), 6, 2, 24, 3, sort_layers=1,
        sort_heads=2,
    )  # fmt: skip


def test_sizes_follow_from_the_shapes():
    model = model_of(wide())
    state = {f"module.{k}": v for k, v in KEYS.to_official(model.state_dict()).items()}
    state["module.text_model.embeddings.position_ids"] = torch.arange(9)[None]
    read = Tvts.from_official(state)
    assert read.config == wide()
    for name, tensor in read.state_dict().items():
        assert torch.equal(tensor, model.state_dict()[name]), name


@pytest.fixture
def registered():
    if "tvts" not in {system.slug for system in all_systems()}:
        pytest.skip("tvts is not registered yet")


def test_load_tells_the_authors_files_and_refuses_a_clip(tmp_path, registered):
    source = model_of(wide())
    state = {f"module.{k}": v for k, v in KEYS.to_official(source.state_dict()).items()}
    torch.save({"state_dict": state, "epoch": 3}, tmp_path / "authors.pth")
    model = moviola.load(tmp_path / "authors.pth")
    assert model.system == "tvts"
    pixels_BCHW = torch.ones(1, 3, 32, 32)
    torch.testing.assert_close(model.module.encode_image(pixels_BCHW), source.encode_image(pixels_BCHW))
    with pytest.raises(Refusal, match="does not start from a CLIP"):
        moviola.load("tvts", init="builtin")


# --------------------------------------------------------------------------------------------------
# Sorting
# --------------------------------------------------------------------------------------------------


def test_permuted_transcripts_permute_the_logits():
    model = model_of()
    tokens, features = model.video_model(pixels(3, 8)).tokens_BLD, torch.randn(3, 4, 16)
    order = [2, 0, 3, 1]
    torch.testing.assert_close(
        model.pred_model(tokens, features[:, order]), model.pred_model(tokens, features)[:, order]
    )


def test_an_untrained_head_guesses():
    torch.manual_seed(0)
    head = SortHead(64, 2, 2, 4)
    logits = head(torch.randn(200, 9, 64), torch.randn(200, 4, 64))
    loss = F.cross_entropy(logits.flatten(0, 1), torch.arange(4).repeat(200))
    assert float(loss.detach()) == pytest.approx(math.log(4), abs=0.25)


def batch_of(rows=5, seed=0):
    return {"clip": clip_of(pixels(rows, 8, seed=seed)), "script": words(rows, 4, seed=seed)}


def test_the_losses_are_the_hand_formulas():
    model, batch = model_of(), batch_of()
    objective = ScriptSorting(model).eval()  # every patch
    losses = objective(model, batch)
    tower = model.video_model(batch["clip"].frames_BTCHW)
    features = model.text_model(batch["script"].flatten(0, 1)).unflatten(0, (5, 4))
    text = torch.stack([model.txt_proj(f).mean(0) for f in features])
    scores = similarity(text, model.vid_proj(tower.vector_BD))
    torch.testing.assert_close(losses["contrastive"], norm_softmax_loss(scores, 0.05))
    logits = model.pred_model(tower.tokens_BLD, features)
    own = torch.stack([logits[:, s].log_softmax(-1)[:, s] for s in range(4)])
    torch.testing.assert_close(losses["sort"], -2 * own.mean())
    assert set(ScriptSorting(model, sort_weight=0)(model, batch)) == {"contrastive"}


def test_the_sort_term_teaches_video_and_head_but_no_text():
    model, batch = model_of(), batch_of()
    ScriptSorting(model)(model, batch)["sort"].backward()
    taught = {name for name, p in model.named_parameters() if p.grad is not None and p.grad.any()}
    assert not any(name.startswith(("text_model", "txt_proj", "vid_proj")) for name in taught)
    whole = {n for n, _ in model.named_parameters() if n.startswith(("video_model", "pred_model"))}
    assert taught == whole


def test_captions_train_without_the_sort_term():
    model, batch = model_of(), batch_of(6)
    objective = ScriptSorting(model).eval()
    mask = torch.ones(6, 4, dtype=torch.bool)
    mask[4:, 1:] = False
    both = objective(model, {**batch, "script_mask": mask})
    made = objective.outputs(model, {**batch, "script_mask": mask})
    torch.testing.assert_close(made["text"][4:], model.encode_text(batch["script"][4:, 0]))
    first = {"clip": clip_of(batch["clip"].frames_BTCHW[:4]), "script": batch["script"][:4]}
    torch.testing.assert_close(both["sort"], objective(model, first)["sort"] * 4 / 6)
    mask[:, 1:] = False
    assert not objective(model, {**batch, "script_mask": mask})["sort"].any()


def test_patches_are_dropped_in_training_alone(monkeypatch):
    model, batch = model_of(), batch_of()
    objective, lengths = ScriptSorting(model, keep=0.5), []
    forward = model.pred_model.forward
    monkeypatch.setattr(model.pred_model, "forward", lambda x, t: lengths.append(x.shape[1]) or forward(x, t))
    objective.train()(model, batch)
    objective.eval()(model, batch)
    ScriptSorting(model, keep=0.5, frames=4).train()(model, batch)
    assert lengths == [1 + 4 * 2, 1 + 4 * 4, 1 + 2 * 2]


def test_gradients_do_not_depend_on_the_micro_batch():
    model, batch = model_of(), batch_of(6)
    objective = ScriptSorting(model).eval()
    batch["script_mask"] = torch.ones(6, 4, dtype=torch.bool)
    batch["script_mask"][2, 1:] = False
    grads = []
    for size in (None, 2):
        model.zero_grad()
        compute(model, objective, batch, micro_batch=size)
        grads.append({k: p.grad.clone() for k, p in model.named_parameters()})
    for name, grad in grads[0].items():
        torch.testing.assert_close(grads[1][name], grad, rtol=1e-4, atol=1e-4, msg=name)


def test_reversed_frames_turn_the_predicted_order():
    """A model that has learned one video, told forwards and backwards: what it says turns with the frames."""
    torch.manual_seed(0)
    model = Tvts(replace(tiny(), sort_layers=1))
    torch.nn.init.normal_(model.video_model.temporal_embedding, std=0.5)
    torch.nn.init.normal_(model.text_model.token_embedding.weight)
    scene, texts = 2 * torch.randn(4, 3, 16, 16), words(4, seed=3)
    order_BS = torch.tensor([[0, 1, 2, 3], [3, 2, 1, 0]] * 4)
    batch = {"clip": clip_of(scene[order_BS].repeat_interleave(2, 1)), "script": texts[order_BS]}
    objective = ScriptSorting(model).eval()
    objective._warned = True  # the same texts, by design
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _ in range(100):
        losses = objective(model, batch)
        losses["sort"].backward()
        optimizer.step()
        optimizer.zero_grad()
    clip = scene.repeat_interleave(2, 0)[None]
    features = model.text_model(texts)[None]
    with torch.no_grad():
        for frames, wanted in ((clip, [0, 1, 2, 3]), (clip.flip(1), [3, 2, 1, 0])):
            logits = model.pred_model(model.video_model(frames).tokens_BLD, features)
            assert logits[0].argmax(-1).tolist() == wanted


# --------------------------------------------------------------------------------------------------
# Training and search
# --------------------------------------------------------------------------------------------------


def films(folder, count=6):
    """Videos of four shades in turn, each named in the subtitles while it is shown."""
    folder.mkdir()
    shades = {"black": 10, "grey": 90, "silver": 170, "white": 245}
    rng = np.random.default_rng(0)
    for n in range(count):
        names = rng.permutation(list(shades)).tolist()
        frames = np.repeat([shades[name] for name in names], 10).astype(np.uint8)[:, None, None, None]
        media.write_video(folder / f"{n}.mp4", np.broadcast_to(frames, (40, 64, 64, 3)).copy(), rate=10)
        cues = (
            f"{s + 1}\n00:00:0{s},000 --> 00:00:0{s + 1},000\nnow it is {name}\n"
            for s, name in enumerate(names)
        )
        (folder / f"{n}.srt").write_text("\n".join(cues))
    return folder


@pytest.mark.slow
def test_it_trains_on_videos_with_subtitles_and_their_index_is_searched(tmp_path, registered):
    films(tmp_path / "films")
    report = moviola.train(
        tmp_path / "films", to=tmp_path / "run", objective="tvts", model="tvts-small", steps=3, batch_size=4,
        workers=0, options={"shortest": 0.7, "longest": 0.8, "gap": 0.1},
    )  # fmt: skip
    assert report.steps == 3
    assert {"contrastive", "sort"} <= set(report.losses)
    Image.new("RGB", (64, 64), "red").save(tmp_path / "films" / "still.png")
    moviola.index(tmp_path / "films", to=tmp_path / "index", model=tmp_path / "run" / "model")
    found = moviola.search(tmp_path / "index", "now it is grey")
    assert {hit.file.rpartition("/")[2] for hit in found} >= {"still.png"}


def test_videos_with_subtitles_train_the_small_model_in_the_loop(tmp_path):
    from moviola.data.rows import PairData, open_rows

    tokenizer = moviola.load("builtin", device="cpu").tokenizer
    model = Tvts(replace(small(), vision=replace(small().vision, layers=1), frames=8))
    objective = ScriptSorting(model, shortest=0.7, longest=0.8, gap=0.1)
    rows = PairData(
        open_rows([films(tmp_path / "films")]),
        objective.needs,
        recipe=model.recipe,
        tokenizer=tokenizer,
        frame_spec=model.frame_spec,
    )
    config = TrainConfig(steps=2, **{**TRAINING.recipe, "batch_size": 4})
    before = model.pred_model.head.weight.clone()
    train(model, objective, rows, config, tmp_path / "run")
    assert not torch.equal(before, model.pred_model.head.weight)
    assert (rows.batch(np.arange(6), seed=0, epoch=0, step=0)["script_mask"]).all()


def test_a_saved_model_encodes_videos_with_the_builtin_words(tmp_path):
    films(tmp_path / "films", 1)
    module = model_of(replace(small(), frames=4))
    model = Model(
        module, config=module.config.to_json(), system="tvts", device="cpu", recipe=module.recipe,
        tokenizer=moviola.load("builtin", device="cpu").tokenizer,
    )  # fmt: skip
    text = model.embed_texts(["now it is grey"])
    assert text.shape == (1, 128)
    assert np.linalg.norm(text) == pytest.approx(1, abs=1e-5)


def test_training_starts_from_its_own_models_alone():
    model = model_of()
    assert TRAINING.start(model) is model
    vision, text = (
        VitConfig(16, 8, width=16, layers=1, heads=2),
        TextConfig(8, 32, width=16, layers=1, heads=2),
    )
    with pytest.raises(Refusal, match="cannot start from a CLIP"):
        TRAINING.start(CLIP(ClipConfig(16, vision, text)))
    assert not hasattr(Tvts, "from_clip")
    TrainConfig(steps=1, **TRAINING.recipe)
    for preset in TRAINING.presets.values():
        assert Config.from_json(json.loads(json.dumps(preset().to_json()))) == preset()
    assert ScriptSorting(model, captions=True).needs.fields == (
        ScriptField(4, (3.0, 5.0), 1.0, optional=True),
    )


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


def sorted_with(**changes):
    model = model_of()
    return ScriptSorting(model)(model, {**batch_of(), **changes})


def empty_transcript():
    mask_BS = torch.ones(5, 4, dtype=torch.bool)
    mask_BS[3, 2] = False
    return sorted_with(script_mask=mask_BS)


def kept(keep_BUK):
    return model_of().video_model(pixels(2, 4), keep_BUK=torch.as_tensor(keep_BUK))


BAD = {
    "frames not whole tubelets": (
        lambda: model_of().encode_video(clip_of(pixels(2, 7))), UsageError, "tubelets of 2, got 7 frames"
    ),
    "one frame": (lambda: model_of().encode_video(clip_of(pixels(2, 1))), UsageError, "2 to 8 frames"),
    "too many frames": (
        lambda: model_of().encode_video(clip_of(pixels(2, 10))), UsageError, "2 to 8 frames .* got 10"
    ),
    "another size": (
        lambda: model_of().encode_image(torch.zeros(2, 3, 24, 16)), UsageError, r"\(B, T, 3, 16, 16\)"
    ),
    "a model of odd frames": (lambda: Tvts(replace(tiny(), frames=7)), UsageError, "whole tubelets, got 7"),
    "tubelets of odd clips": (
        lambda: TubeletPatches(3, 4, 8)(torch.zeros(1, 3, 3, 16, 16)), UsageError, "multiple of 2, not 3"
    ),
    "tubelets of odd sides": (
        lambda: TubeletPatches(3, 4, 8)(torch.zeros(1, 2, 3, 16, 12)), UsageError, r"8 x 8; \(16, 12\)"
    ),
    "tubelets of pictures": (
        lambda: TubeletPatches(3, 4, 8)(torch.zeros(2, 3, 16, 16)), UsageError, r"\(B, T, 3, H, W\)"
    ),
    "patches out of range": (lambda: kept([[[0, 4], [0, 1]]] * 2), UsageError, "0 to 3, .* keep 0 to 4"),
    "patches below zero": (lambda: kept([[[-1, 1], [0, 1]]] * 2), UsageError, "keep -1 to 1"),
    "fewer tubes": (lambda: kept([[[0, 1]]] * 2), UsageError, r"2 tubes, got \(2, 1, 2\)"),
    "patches of other clips": (lambda: kept([[[0, 1], [0, 1]]] * 3), UsageError, "for 2 clips"),
    "three transcripts": (lambda: sorted_with(script=words(5, 3)), UsageError, r"sorts 4 .*\(5, 3, 16\)"),
    "no segments": (lambda: sorted_with(script=words(5)), UsageError, r"\(B, segments, L\)"),
    "an empty transcript": (empty_transcript, UsageError, "transcripts are empty"),
    "nothing but padding": (
        lambda: sorted_with(script=words(5, 4) * 0), UsageError, "no token at all"
    ),
    "keep": (lambda: ScriptSorting(keep=0.0), UsageError, r"keep lies in \(0, 1\]"),
    "weight": (lambda: ScriptSorting(sort_weight=-1.0), UsageError, "not negative"),
    "widths": (
        lambda: replace(tiny(), text=replace(tiny().text, width=32)), UsageError, "one width; got 16 and 32"
    ),
    "segments": (lambda: replace(tiny(), segments=1), UsageError, "two or more segments"),
    "temperature": (lambda: replace(tiny(), temperature=0.0), UsageError, "positive temperature"),
    "a name missing": (
        lambda: Tvts.from_official(without("pred_model.blocks.0.norm1.bias")), CheckpointError, "ln_1.bias"
    ),
    "no table of times": (
        lambda: Tvts.from_official(without("video_model.temporal_embed")), CheckpointError, "temporal_embed"
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_bad_input(name):
    call, error, said = BAD[name]
    with pytest.raises(error, match=said):
        call()


@pytest.mark.slow
@pytest.mark.parametrize("arm", ["contrastive", "shuffled frames"])
def test_the_claim_runs(arm):
    """What comes out is the claim's to say, at full length; here that a short run gives figures."""
    figures = run_claim(arm, 7, steps=2)
    assert 20 < figures["pair accuracy"] < 80
    assert 0 <= figures["actions, top-1"] <= 100
