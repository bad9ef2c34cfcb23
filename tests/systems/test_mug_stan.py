from __future__ import annotations

import json
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import nn

from moviola.clip.config import ClipConfig, ResNetConfig, TextConfig, VitConfig
from moviola.clip.loaded import Model
from moviola.clip.model import CLIP
from moviola.data import order_clips as world
from moviola.parts import stan
from moviola.parts.mug import mug_scores
from moviola.systems.video import mug_stan
from moviola.systems.video.mug_stan import (
    CLAIM,
    KEYS,
    RECOGNITION,
    TRAINING,
    MugStan,
    MugStanConfig,
    MugStanObjective,
    MugStanRecognition,
    b_16,
    b_32,
    tiny,
)
from moviola.training.caching import compute
from moviola.training.video_text import norm_softmax_loss
from moviola.types import CheckpointError, ClipBatch, Encoder, Objective, PairObjective, Refusal, UsageError


@pytest.fixture(scope="module")
def oracle(oracles_dir):
    folder = oracles_dir / "07-mug-stan"
    return json.loads((folder / "a.json").read_text()), load_file(folder / "a.safetensors")


def clip_of(frames_BTCHW, mask_BT=None):
    mask_BT = torch.ones(frames_BTCHW.shape[:2], dtype=torch.bool) if mask_BT is None else mask_BT
    return ClipBatch(frames_BTCHW, mask_BT.float(), mask_BT)


def draw(*shape, seed=1):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def plain(layers=3):
    torch.manual_seed(0)
    return CLIP(ClipConfig(16, VitConfig(16, 8, 16, layers, 2), TextConfig(8, 32, 16, 1, 2))).eval()


def built(config=None, seed=0):
    """A model whose every parameter is drawn: time attention is not silent."""
    torch.manual_seed(seed)
    model = MugStan(config or tiny())
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn(parameter.shape))
    return model.eval()


@pytest.fixture
def model():
    return built()


@pytest.fixture
def tokens():
    return torch.tensor([[30, n, 0, n + 7, 31, 0, 0, 0] for n in range(1, 6)])


# --------------------------------------------------------------------------------------------------
# Parity
# --------------------------------------------------------------------------------------------------


def official_branch(model, batch):
    """Inputs of the branch's levels and what its layers give, whole and in the authors' order of patches."""
    seen = {}

    def note(name, value):
        cls_BD, patches_BTPD = value
        seen[name] = torch.cat([cls_BD[:, None], patches_BTPD.transpose(1, 2).flatten(1, 2)], dim=1)

    handles = []
    for level, space in enumerate(model.stan.space):

        def after(module, given, out, level=level):
            cls_BD, patches_BTPD, mask_BT = given
            note(f"stan_t{level}", (cls_BD, patches_BTPD))
            note(f"stan_s{level}", stan.SpaceLayer.forward(module, cls_BD, patches_BTPD, mask_BT))

        def before(_, given, level=level):
            note(f"stan_in{level}", (torch.zeros(len(given[0]), given[0].shape[-1]), given[0]))

        handles += [space.register_forward_hook(after)]
        handles += [model.stan.time[level].register_forward_pre_hook(before)]
    model.encode_video(batch)
    for handle in handles:
        handle.remove()
    for level in range(len(model.stan.space)):  # time layers are not given the class token: it passes
        seen[f"stan_in{level}"][:, 0] = seen[f"stan_t{level}"][:, 0]
    return seen


def tokens_of_masked_texts(model, tokens_NL, kept_NL):
    """Every projected token, those behind the end too: the reference lets none look at padding."""
    x_NLD = model.embed_tokens(tokens_NL)
    allowed = (
        torch.ones(tokens_NL.shape[1], tokens_NL.shape[1], dtype=torch.bool).tril() & kept_NL[:, None, None]
    )
    for block in model.transformer.resblocks:
        x_NLD = x_NLD + block.attn(block.ln_1(x_NLD), mask_LL=allowed)
        x_NLD = x_NLD + block.mlp(block.ln_2(x_NLD))
    return model.ln_final(x_NLD) @ model.text_projection


def test_parity_of_every_output_and_gradient(oracle):
    meta, data = oracle
    c = meta["config"]
    clip = ClipConfig(
        c["proj"],
        VitConfig(c["image"], c["patch"], c["vwidth"], c["vlayers"], c["vheads"]),
        TextConfig(c["ctx"], c["vocab"], c["twidth"], c["tlayers"], c["theads"]),
    )
    config = MugStanConfig.over(
        clip, depth=c["depth"], head="mug", tau=c["tau"], most_frames=c["time_embed_rows"]
    )
    model = MugStan(config).eval()
    official = {k.removeprefix("param/"): v for k, v in data.items() if k.startswith("param/")}
    KEYS.load(model, {k: v for k, v in official.items() if not k.startswith("drl.")})

    clips, token_ids = clip_of(data["in/video"]), data["in/token_ids"]
    with torch.no_grad():
        got = official_branch(model, clips)
        last = len(model.visual.transformer.resblocks) - 1
        pixels = data["in/video"].flatten(0, 1)
        got["clip_last_tokens"] = model.visual(pixels, taps=[last]).layers[last]
        kept = data["in/text_mask"].bool()
        words = tokens_of_masked_texts(model, token_ids, kept)
        got["text_tokens"], got["text_cls"] = words, model.encode_text(token_ids)
        expected = words.masked_fill(~kept.unsqueeze(-1), 0)
        torch.testing.assert_close(model.encode_words(token_ids), expected, rtol=1e-4, atol=1e-5)
    got["video"] = model.encode_video(clips)
    scores = model.score_tokens(token_ids, got["video"])
    got["mug_on_model"] = scores * config.temperature
    got["loss"] = MugStanObjective(model)(model, {"clip": clips, "text": token_ids})["contrastive"]
    sim = data["in/sim"].clone().requires_grad_()
    got["loss_sim"] = norm_softmax_loss(sim, 0.01)
    got["loss"].backward()
    got["loss_sim"].backward()
    alone = ("mug_frame", "drl_wti")  # the head by itself: tests/parts/test_mug.py
    listed = {k.removeprefix("out/") for k in data if k.startswith("out/")}
    assert set(got) == {name for name in listed if not name.startswith(alone)}
    got = {f"out/{name}": value for name, value in got.items()} | {"grad/sim": sim.grad}
    grads = KEYS.to_official({n: p.grad for n, p in model.named_parameters() if p.grad is not None})
    wanted = {k for k in data if k.startswith("grad/") and "mug_" not in k}
    got |= {name: grads[name.removeprefix("grad/")] for name in wanted - {"grad/sim"}}
    assert wanted <= set(got)
    for name, value in got.items():
        ref = data[name].double()
        assert value.shape == ref.shape, name
        worst = ((value.double() - ref).abs() / (1 + ref.abs())).max()
        assert worst <= meta["tolerance"], f"{name}: {worst:.2e}"


def layer_names(prefix, parts):
    return [f"{prefix}.{part}.{p}" for part in parts for p in ("weight", "bias")]


def official_names(config):
    """Every parameter of the authors' model, written out."""
    attention = [f"self_attn.{m}_proj" for m in ("q", "k", "v", "out")]
    layer = [*attention, "layer_norm1", "layer_norm2", "mlp.fc1", "mlp.fc2"]
    names = [
        f"backbone.{n}" for n in ("class_embedding", "patch_embedding.weight", "position_embedding.weight")
    ]
    names += [f"backbone.{n}.{p}" for n in ("pre_layrnorm", "post_layernorm") for p in ("weight", "bias")]
    names += ["backbone.visual_projection.weight", "backbone.STAN_time_embed.weight"]
    for n in range(config.vision.layers):
        names += layer_names(f"backbone.layers.{n}", layer)
    for n in range(config.depth):
        names += layer_names(f"backbone.STAN_S_layers.{n}", layer)
        names += layer_names(f"backbone.STAN_T_layers.{n}", [*attention, "layer_norm1", "temporal_fc"])
    text = "text_backbone.text_model"
    names += [f"{text}.embeddings.{n}_embedding.weight" for n in ("token", "position")]
    names += [f"{text}.final_layer_norm.{p}" for p in ("weight", "bias")]
    for n in range(config.text.layers):
        names += layer_names(f"{text}.encoder.layers.{n}", layer)
    return [*names, "text_backbone.text_projection.weight"]


@pytest.mark.parametrize("config", [b_32(), b_16()], ids=["b-32", "b-16"])
def test_keys_name_every_parameter_at_paper_size(config):
    with torch.device("meta"):
        model = MugStan(config)
    assert sorted(KEYS.official_names(model.state_dict())) == sorted(official_names(config))
    assert model.stan.time_embedding.shape == (64, 768)
    assert (config.depth, config.frames, config.temperature) == (4, 12, 0.01)


def wide():
    clip = ClipConfig(64, VitConfig(32, 16, 128, 3, 2), TextConfig(8, 32, 64, 1, 1))
    return MugStanConfig.over(clip, depth=2, most_frames=10, frames=10)


def test_reads_the_authors_file(tokens):
    """Sizes from the shapes, heads of 64, also from under a `module.`; no file says which head it is for."""
    model, clips = built(wide()), clip_of(draw(2, 4, 3, 32, 32))
    state = {f"module.{k}": v for k, v in KEYS.to_official(model.state_dict()).items()}
    state["module.text_backbone.text_model.embeddings.position_ids"] = torch.arange(8)[None]
    made = MugStan.from_official(state)
    assert made.config == model.config
    assert torch.equal(made.encode_video(clips), model.encode_video(clips))
    scores = [m.use_head("mug").score_tokens(tokens, m.encode_video(clips)) for m in (made, model)]
    assert torch.equal(*scores)


def test_a_file_that_does_not_fit_is_refused():
    state = KEYS.to_official(built(wide()).state_dict())
    lacking = {k: v for k, v in state.items() if "temporal_fc.bias" not in k}
    with pytest.raises(CheckpointError, match=r"2 missing: stan\.time\.0\.temporal_fc\.bias"):
        MugStan.from_official(lacking)
    with pytest.raises(CheckpointError, match=r"1 unexpected: extra"):
        MugStan.from_official({**state, "extra": torch.zeros(1)})
    with pytest.raises(CheckpointError, match="no branch is in it"):
        MugStan.from_official({k: v for k, v in state.items() if "STAN" not in k})


# --------------------------------------------------------------------------------------------------
# The branch
# --------------------------------------------------------------------------------------------------


def test_starts_as_a_silent_copy_of_clips_last_layers():
    clip = plain()
    model = MugStan.from_clip(clip, depth=2, head="mug")
    assert isinstance(model, Encoder)
    assert not model.training
    assert (model.frame_spec.count, model.frame_spec.padding, model.separable) == (12, "mask", False)
    assert all(
        torch.equal(model.state_dict()[k], v) for k, v in clip.state_dict().items() if k != "logit_scale"
    )
    for space, block in zip(model.stan.space, clip.visual.transformer.resblocks[1:], strict=True):
        assert all(torch.equal(space.state_dict()[k], v) for k, v in block.state_dict().items())
    patches = draw(2, 3, 4, 16)
    for time in model.stan.time:
        assert torch.equal(time(patches), patches)
    assert MugStan.from_clip(plain(2)).config.depth == 2  # a shallower tower than the paper's 4


def test_without_the_branchs_token_frames_are_clips(monkeypatch):
    """And CLIP's own layers never see the branch."""
    clip = plain()
    model = MugStan.from_clip(clip, depth=2, head="mug")
    frames = draw(2, 3, 3, 16, 16)
    wanted = clip.encode_image(frames.flatten(0, 1)).unflatten(0, (2, 3))
    assert (model.encode_video(clip_of(frames)) - wanted).abs().max() > 1e-3
    seen = {}
    handles = [
        block.register_forward_hook(lambda _, __, out, n=n: seen.__setitem__(n, out))
        for n, block in enumerate(model.visual.transformer.resblocks)
    ]
    model.encode_video(clip_of(frames))
    [handle.remove() for handle in handles]
    plainly = clip.visual(frames.flatten(0, 1), taps=range(3)).layers
    assert all(torch.equal(seen[n], plainly[n]) for n in range(3))
    monkeypatch.setattr(model.stan, "forward", lambda layers, *_: torch.zeros(2, 16))
    assert torch.equal(model.encode_video(clip_of(frames)), wanted)


def test_every_frame_of_a_video_gets_the_same_token(model):
    frames = draw(2, 3, 3, 16, 16)
    given = []
    handle = model.visual.ln_post.register_forward_pre_hook(lambda _, inputs: given.append(inputs[0]))
    model.encode_video(clip_of(frames))
    handle.remove()
    own = model.visual.transformer(model.visual.embed(frames.flatten(0, 1)))[0][:, 0].unflatten(0, (2, 3))
    added = given[0] - own
    torch.testing.assert_close(added, added[:, :1].expand_as(added), rtol=1e-4, atol=1e-5)
    assert (added[0, 0] - added[1, 0]).abs().max() > 1e-2


def test_order_is_seen_through_the_time_embedding_alone(model):
    frames = draw(1, 3, 3, 16, 16)
    moved = frames[:, [2, 0, 1]]

    def vectors(m):
        m.use_head("mean")
        return [m.encode_video(clip_of(x)) for x in (frames, moved)]

    a, b = vectors(model)
    assert (a - b).abs().max() > 1e-3
    nn.init.zeros_(model.stan.time_embedding)
    torch.testing.assert_close(*vectors(model), rtol=1e-4, atol=1e-5)
    clip = plain()
    torch.testing.assert_close(*(clip.encode_video(clip_of(x)) for x in (frames, moved)))


@pytest.mark.parametrize("depth", [1, 3])
def test_the_last_levels_class_token_alone_is_exact(depth):
    """Also its gradients; the whole layer is what the authors compute."""
    model, batch = built(replace(tiny(), depth=depth)), clip_of(draw(2, 3, 3, 16, 16))

    def run():
        model.zero_grad()
        out = model.encode_video(batch)
        out.square().sum().backward()
        return out, {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}

    fast = run()
    last = model.stan.space[-1]
    last.forward = lambda *given, class_only: stan.SpaceLayer.forward(last, *given)
    whole = run()
    torch.testing.assert_close(fast[0], whole[0], rtol=1e-4, atol=1e-5)
    assert set(fast[1]) == set(whole[1])
    for name, grad in whole[1].items():
        torch.testing.assert_close(fast[1][name], grad, rtol=1e-3, atol=1e-3, msg=name)


def test_a_masked_frame_is_as_if_it_were_not_there(model):
    frames, mask = draw(2, 5, 3, 16, 16), torch.arange(5) < torch.tensor([[3], [5]])
    padded = model.encode_video(clip_of(frames * mask[..., None, None, None], mask))
    alone = model.encode_video(clip_of(frames[:1, :3]))
    torch.testing.assert_close(padded[:1, :3], alone, rtol=1e-4, atol=1e-5)
    other = torch.where(mask[..., None, None, None], frames, 9.0)
    torch.testing.assert_close(
        model.encode_video(clip_of(other, mask))[mask], padded[mask], rtol=1e-4, atol=1e-5
    )
    shortlist = model.pool(padded, mask)
    torch.testing.assert_close(shortlist[0], alone[0].mean(0), rtol=1e-4, atol=1e-5)
    model.use_head("mean")
    torch.testing.assert_close(model.encode_video(clip_of(frames, mask)), shortlist, rtol=1e-4, atol=1e-5)


def test_a_picture_is_a_clip_of_one_frame(model):
    pictures = draw(3, 3, 16, 16)
    assert torch.equal(model.encode_image(pictures), model.encode_video(clip_of(pictures[:, None]))[:, 0])


def test_three_frames_are_not_taken_for_colours(model):
    """(B, 3, 3, H, W): the official code would read the first axis of 3 as colours."""
    frames = draw(1, 3, 3, 16, 16)
    alike = torch.cat([frames[:, :2], frames[:, 2:] + 1], 1)  # another last frame: the first two stay
    a, b = (model.visual.embed(x.flatten(0, 1)) for x in (frames, alike))
    assert torch.equal(a[:2], b[:2])
    assert model.encode_video(clip_of(frames)).shape == (1, 3, 16)


# --------------------------------------------------------------------------------------------------
# Scores
# --------------------------------------------------------------------------------------------------


def test_the_mean_is_cosine_over_the_temperature(model, tokens):
    model.use_head("mean")
    video, text = model.encode_video(clip_of(draw(3, 3, 3, 16, 16))), model.encode_text(tokens)
    wanted = 100 * F.cosine_similarity(text[:, None], video[None], dim=-1)
    torch.testing.assert_close(model.score(text, video), wanted)
    torch.testing.assert_close(model.score_tokens(tokens, video), wanted)
    assert torch.equal(model.pool(video), video)
    assert model.logit_scale.exp() == pytest.approx(100)


@pytest.mark.parametrize("head", ["mug", "mug-full"])
def test_words_meet_frames(model, tokens, head):
    """Words end with the end token; an id 0 inside a text is a word, which the official code masks."""
    model.use_head(head)
    frames, words = model.encode_video(clip_of(draw(3, 3, 3, 16, 16))), model.encode_words(tokens)
    mask = torch.arange(8).expand(5, -1) <= 4
    assert torch.equal(words.ne(0).any(-1), mask)
    wanted = 100 * mug_scores(words, frames, mask, full=head == "mug-full")
    torch.testing.assert_close(model.score_tokens(tokens, frames), wanted)
    torch.testing.assert_close(words[:, 4], model.encode_text(tokens), rtol=1e-4, atol=1e-5)


def test_a_text_of_one_vector_is_scored_with_the_frames_it_fits(model, tokens):
    """What index and search ask for: `encode_text` and `score`."""
    frames, text = model.encode_video(clip_of(draw(3, 3, 3, 16, 16))), model.encode_text(tokens)
    cosine = torch.einsum("ne,mte->nmt", F.normalize(text, dim=-1), F.normalize(frames, dim=-1))
    wanted = 100 * ((100 * cosine).softmax(-1) * cosine).sum(-1)
    torch.testing.assert_close(model.score(text, frames), wanted, rtol=1e-4, atol=1e-3)


def test_heads_share_weights_and_say_what_they_are(model):
    assert not model.separable
    state = {k: v.clone() for k, v in model.state_dict().items()}
    assert model.use_head("mean").separable
    assert all(torch.equal(state[k], v) for k, v in model.state_dict().items())
    with pytest.raises(UsageError, match="The head is mean, mug, mug-full"):
        model.use_head("max")


# --------------------------------------------------------------------------------------------------
# Bad input
# --------------------------------------------------------------------------------------------------


def test_clips_that_cannot_be_meant_are_refused(model):
    with pytest.raises(UsageError, match="tells apart 1 to 6 frames, got 7"):
        model.encode_video(clip_of(torch.zeros(1, 7, 3, 16, 16)))
    with pytest.raises(UsageError, match="must be unflattened"):
        model.encode_video(ClipBatch(torch.zeros(6, 3, 16, 16), torch.zeros(2, 3), torch.ones(2, 3).bool()))
    with pytest.raises(UsageError, match=r"Clips are \(B, T, 3, H, W\)"):
        model.encode_video(clip_of(torch.zeros(1, 3, 4, 16, 16)))
    with pytest.raises(UsageError, match="mask all False"):
        model.encode_video(
            clip_of(torch.zeros(2, 2, 3, 16, 16), torch.tensor([[True, False], [False, False]]))
        )


def test_scores_that_cannot_be_meant_are_refused(model, tokens):
    frames = model.encode_video(clip_of(draw(2, 3, 3, 16, 16)))
    with pytest.raises(UsageError, match="of one width"):
        model.score(torch.zeros(2, 5, 12), frames)
    with pytest.raises(UsageError, match="Every text needs a word"):
        model.score(torch.zeros(2, 5, 16), frames)
    with pytest.raises(UsageError, match="compares a vector a text with a vector a video"):
        model.use_head("mean").score_tokens(tokens, frames)


def test_resnets_are_refused():
    clip = CLIP(ClipConfig(16, ResNetConfig(32, 8, (1, 1, 1, 1), 2), TextConfig(8, 32, 16, 1, 2)))
    with pytest.raises(Refusal, match="vision transformer"):
        MugStan.from_clip(clip)


# --------------------------------------------------------------------------------------------------
# Training
# --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("head", ["mean", "mug"])
def test_the_loss_is_both_cross_entropies_added(model, tokens, head):
    objective = MugStanObjective(model, head=head)
    assert isinstance(objective, PairObjective)
    assert model.config.head == head
    clips = clip_of(draw(5, 3, 3, 16, 16))
    scores = model.score_tokens(tokens, model.encode_video(clips))
    wanted = -scores.log_softmax(1).diagonal().mean() - scores.log_softmax(0).diagonal().mean()
    torch.testing.assert_close(objective(model, {"clip": clips, "text": tokens})["contrastive"], wanted)


def test_gradients_do_not_depend_on_parts_of_a_batch(model, tokens):
    """Texts of different length in different parts, as gradient caching makes them."""
    tokens[3:, 2:] = torch.tensor([5, 6, 7, 8, 9, 31])
    batch = {"clip": clip_of(draw(5, 3, 3, 16, 16)), "text": tokens}
    objective = MugStanObjective(model)
    grads = []
    for size in (None, 2):
        model.zero_grad()
        compute(model, objective, batch, micro_batch=size)
        grads.append({n: p.grad.clone() for n, p in model.named_parameters()})
    for name, grad in grads[0].items():
        torch.testing.assert_close(grads[1][name], grad, rtol=1e-3, atol=1e-4, msg=name)


def test_the_branch_learns_ten_times_as_fast(model):
    names = {id(p): name for name, p in model.named_parameters()}
    groups = list(MugStanObjective(model).param_groups(model))
    assert {names[id(p)] for g in groups for p in g["params"]} == set(names.values())
    for group in groups:
        for parameter in group["params"]:
            name = names[id(parameter)]
            assert group["lr_scale"] == (10 if name.startswith("stan.") else 1), name
            spared = parameter.ndim < 2 or "positional_embedding" in name
            assert group["weight_decay"] == (0 if spared else 0.02), name


def test_the_branch_alone_can_train(model, tokens):
    objective = MugStanObjective(model, freeze_clip=True)
    before = {k: v.clone() for k, v in model.named_parameters()}
    optimizer = torch.optim.AdamW(objective.param_groups(model), lr=1e-2)
    objective(model, {"clip": clip_of(draw(5, 3, 3, 16, 16)), "text": tokens})["contrastive"].backward()
    optimizer.step()
    moved = {k for k, v in model.named_parameters() if not torch.equal(v, before[k])}
    assert moved
    assert all(name.startswith("stan.") for name in moved)


@pytest.mark.parametrize("head", ["mean", "mug"])
def test_recognition_trains_the_image_side(model, tokens, head):
    objective = MugStanRecognition(model.use_head(head), tokens)
    assert isinstance(objective, Objective)
    assert (objective.mixup, objective.cutmix, objective.label_smoothing) == (0, 0, 0)
    batch = {"clip": clip_of(draw(4, 3, 3, 16, 16)), "label": torch.tensor([0, 1, 4, 2])}
    loss = objective(model, batch)["class"]
    video = model.encode_video(batch["clip"])
    scores = model.score(model.encode_text(tokens), video)
    torch.testing.assert_close(loss, F.cross_entropy(scores.T, batch["label"]))
    loss.backward()
    trained = {n for n, p in model.named_parameters() if p.grad is not None}
    assert trained == {n for n, _ in model.named_parameters() if n.startswith(("visual.", "stan."))}


def test_what_training_starts_from(model):
    for training in (TRAINING, RECOGNITION):
        assert training.start(model) is model
        assert training.start(plain()).config.depth == 3
    assert TRAINING.presets["mug-stan-b-16"]().head == "mug"
    assert not MugStan.from_config(json.loads(json.dumps(model.config.to_json()))).separable


# --------------------------------------------------------------------------------------------------
# The claim, and the verbs
# --------------------------------------------------------------------------------------------------


@pytest.fixture
def new_clip(monkeypatch):
    """An untrained image model in the place of the one that takes seconds to train."""

    def made(seed):
        torch.manual_seed(seed)
        return CLIP(world.clip_config(width=32, layers=2)).eval()

    monkeypatch.setattr(world, "image_clip", made)


@pytest.mark.parametrize("arm", CLAIM.arms)
def test_every_arm_of_the_claim_runs(new_clip, arm):
    torch.manual_seed(5)
    before = torch.get_rng_state()
    figures = mug_stan.run_claim(arm, 0, steps=2, clips=96)
    assert torch.equal(torch.get_rng_state(), before)
    assert figures
    assert all(math.isfinite(v) for v in figures.values())
    assert CLAIM.metric in figures


def from_builtin(**options):
    from moviola.verbs.load import load

    base = load("builtin", device="cpu")
    module = MugStan.from_clip(base.module, **options)
    return Model(
        module, config=module.config.to_json(), recipe=base.recipe, tokenizer=base.tokenizer, device="cpu"
    )


def test_the_builtin_model_becomes_a_video_model():
    loaded = from_builtin()
    assert loaded.separable
    assert (loaded.module.config.depth, loaded.recipe.sampler.count) == (4, 12)
    rng = np.random.default_rng(0)
    clips = [(rng.integers(0, 255, (n, 64, 64, 3), np.uint8), np.arange(n) / 2) for n in (15, 3)]
    vectors = loaded.embed_clips(clips)
    assert vectors.shape == (2, 256)
    loaded.module.use_head("mug")
    video, mask = loaded.encode_clips(clips)
    assert video.shape == (2, 12, 256)
    assert mask.sum(1).tolist() == [12, 3]
    np.testing.assert_allclose(loaded.embed_clips(clips), vectors, rtol=1e-3, atol=1e-4)
    tokens = torch.from_numpy(loaded.tokenizer(["a dog", "a car on a road", "two people"]))
    by_words = loaded.module.score_tokens(tokens, torch.from_numpy(video), torch.from_numpy(mask))
    scores = loaded.score(["a dog", "a car on a road", "two people"], video, mask)
    assert by_words.shape == scores.shape == (3, 2)
    np.testing.assert_allclose(by_words.detach().numpy(), scores, rtol=1e-4)  # the verbs compare words
    text_ND = loaded.module.encode_text(tokens)
    whole = loaded.module.score(text_ND, torch.from_numpy(video), torch.from_numpy(mask))
    assert (whole.detach().numpy() - scores).std() > 1e-3
