from __future__ import annotations

import json
import math

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import nn

from moviola.clip.config import vit_b_32
from moviola.data.planted import planted_frames
from moviola.metrics.retrieval import retrieval_metrics, unpad_captions
from moviola.parts.pooling import baseline_pool, cosine_scores, pooler_scores, softmax_pool_scores
from moviola.systems.retrieval.xpool import (
    KEYS,
    KEYS_HF,
    Pooler,
    XPool,
    XPoolConfig,
    XPoolObjective,
    keys_for,
    msrvtt_9k,
    msvd,
    pair_loss,
    run_claim,
    tiny,
)
from moviola.types import CheckpointError, ClipBatch, Encoder, PairObjective, UsageError


@pytest.fixture(scope="module")
def oracle(oracles_dir):
    folder = oracles_dir / "44-xpool"
    return json.loads((folder / "a.json").read_text()), load_file(folder / "a.safetensors")


@pytest.fixture
def pooler(oracle):
    meta, data = oracle
    made = nn.Module()
    made.pool_frames = Pooler(meta["config"]["D"], meta["config"]["heads"])
    KEYS.load(made, {k.removeprefix("param/"): v for k, v in data.items() if k.startswith("param/")})
    return made.pool_frames.eval()


def same(got, data, name, tolerance=1e-5):
    wanted = data[name].double()
    assert got.shape == wanted.shape, name
    worst = ((got.double() - wanted).abs() / (1 + wanted.abs())).max()
    assert worst <= tolerance, f"{name}: {worst:.2e}"


def test_parity_of_every_output(oracle, pooler):
    """All out/* tensors of the authors' code, and nothing left uncompared."""
    meta, data = oracle
    text, frames = data["in/text"], data["in/video_frames"]
    scale = data["in/logit_scale_log"].exp()
    videos = len(frames)
    got = {
        "cross_attn": pooler.cross_attn(pooler.layer_norm1(text), pooler.layer_norm1(frames)),
        "pooled": pooler(text, frames),
        "sims": cosine_scores(text, pooler(text, frames)),
        "loss_sims": cosine_scores(text[:videos], pooler(text[:videos], frames)),
    }
    got["loss"] = pair_loss(scale * got["loss_sims"])
    for kind in ("avg", "topk", "attention"):
        pooled = baseline_pool(kind, text, frames, k=meta["config"]["k"], temperature=meta["config"]["temp"])
        got[f"baseline_{kind}"] = pooled
        got[f"baseline_{kind}_sims"] = cosine_scores(text, pooled)

    owner = data["in/text_video_index"]
    count = torch.bincount(owner, minlength=videos)
    padded = torch.zeros(videos, int(count.max()), videos)
    for video in range(videos):
        padded[video, : count[video]] = got["sims"][owner == video]
    got["inference_sims"] = padded
    got["inference_sims_valid"] = (torch.arange(padded.shape[1]) < count[:, None]).long()
    for prefix, sims, counts in (
        ("", padded, count),
        ("metric_", data["in/metric_sims"], data["in/metric_caption_count"]),
    ):
        sims_NM, owner_N = unpad_captions(sims.detach().numpy(), counts.numpy())
        for way, metrics in retrieval_metrics(sims_NM, owner_N, ks=(1, 5, 10, 50, 100)).items():
            got |= {f"{prefix}{way}_{k}": torch.tensor(v, dtype=torch.float64) for k, v in metrics.items()}

    assert set(got) == {name.removeprefix("out/") for name in data if name.startswith("out/")}
    for name, value in got.items():
        same(value, data, f"out/{name}", meta["tolerance"])


def test_parity_of_every_gradient(oracle, pooler):
    meta, data = oracle
    text = data["in/text"].clone().requires_grad_()
    frames = data["in/video_frames"].clone().requires_grad_()
    log_scale = data["in/logit_scale_log"].clone().requires_grad_()
    few = text[: len(frames)]
    pair_loss(log_scale.exp() * cosine_scores(few, pooler(few, frames))).backward()
    got = {"in.text": text.grad, "in.video_frames": frames.grad, "in.logit_scale_log": log_scale.grad}
    grads = {f"pool_frames.{k}": p.grad for k, p in pooler.named_parameters()}
    got |= KEYS.to_official(grads)
    wanted = [name for name in data if name.startswith("grad/")]
    assert len(wanted) == 7
    for name in wanted:
        same(got[name.removeprefix("grad/")], data, name, meta["tolerance"])


def test_fast_ranking_equals_the_oracle(oracle, pooler):
    meta, data = oracle
    text, frames = data["in/text"], data["in/video_frames"]
    same(pooler_scores(text, frames, pooler.weights()), data, "out/sims", 2e-6)
    fast = softmax_pool_scores(text, frames, meta["config"]["temp"])
    same(fast, data, "out/baseline_attention_sims", meta["tolerance"])


def random_pooler(dim, heads, seed=0):
    torch.manual_seed(seed)
    pooler = Pooler(dim, heads).double().eval()
    for parameter in pooler.parameters():
        nn.init.normal_(parameter, std=0.3)
    return pooler


@pytest.mark.parametrize("heads", [1, 2, 4])
def test_fast_ranking_equals_the_module(heads):
    pooler = random_pooler(16, heads)
    text_ND, frames_MTD = torch.randn(9, 16).double(), torch.randn(6, 5, 16).double()
    plain = cosine_scores(text_ND, pooler(text_ND, frames_MTD))
    fast = pooler_scores(text_ND, frames_MTD, pooler.weights())
    torch.testing.assert_close(fast, plain, rtol=0, atol=1e-12)


def test_what_must_not_change_a_pooled_vector():
    pooler = random_pooler(16, 2)
    text_ND, frames_MTD = torch.randn(4, 16).double(), torch.randn(3, 6, 16).double()
    pooled = pooler(text_ND, frames_MTD)
    for other in (frames_MTD[:, torch.randperm(6)], frames_MTD.repeat_interleave(2, dim=1)):
        torch.testing.assert_close(pooler(text_ND, other), pooled, rtol=0, atol=1e-12)
    single = pooler(text_ND, frames_MTD[:, :1])
    torch.testing.assert_close(single, single[:, :1].expand_as(single), rtol=0, atol=1e-12)
    assert (pooled[:, 0] - pooled[:, 1]).abs().max() > 1e-3  # but texts do change it


def test_a_mask_equals_leaving_the_frames_out():
    pooler = random_pooler(16, 2)
    text_ND, frames_MTD = torch.randn(4, 16).double(), torch.randn(3, 6, 16).double()
    mask_MT = torch.tensor([[True] * 4 + [False] * 2] * 3)
    wanted = pooler(text_ND, frames_MTD[:, :4])
    frames_MTD[~mask_MT] = math.nan
    torch.testing.assert_close(pooler(text_ND, frames_MTD, mask_MT), wanted, rtol=0, atol=1e-12)


def test_identity_initialisation_is_plain_attention():
    pooler = Pooler(16, 1).double().eval()
    text_ND, frames_MTD = torch.randn(4, 16).double(), torch.randn(3, 6, 16).double()
    t, f = F.layer_norm(text_ND, (16,)), F.layer_norm(frames_MTD, (16,))
    weights = (torch.einsum("nd,mtd->mnt", t, f) / 4).softmax(-1)
    wanted = F.layer_norm(2 * F.layer_norm(weights @ f, (16,)), (16,))
    torch.testing.assert_close(pooler(text_ND, frames_MTD), wanted, rtol=0, atol=1e-12)


def openai_names(layers=12):
    block = [
        "attn.in_proj_weight", "attn.in_proj_bias", "attn.out_proj.weight", "attn.out_proj.bias",
        "ln_1.weight", "ln_1.bias", "ln_2.weight", "ln_2.bias",
        "mlp.c_fc.weight", "mlp.c_fc.bias", "mlp.c_proj.weight", "mlp.c_proj.bias",
    ]  # fmt: skip
    names = ["positional_embedding", "text_projection", "logit_scale", "token_embedding.weight"]
    names += ["ln_final.weight", "ln_final.bias", "visual.class_embedding", "visual.positional_embedding"]
    names += ["visual.proj", "visual.conv1.weight", "visual.ln_pre.weight", "visual.ln_pre.bias"]
    names += ["visual.ln_post.weight", "visual.ln_post.bias"]
    for tower in ("", "visual."):
        names += [f"{tower}transformer.resblocks.{n}.{part}" for n in range(layers) for part in block]
    return {f"clip.{name}" for name in names}


POOLER_NAMES = {
    f"pool_frames.{part}.{kind}"
    for part in (
        "cross_attn.q_proj", "cross_attn.k_proj", "cross_attn.v_proj", "cross_attn.out_proj",
        "linear_proj", "layer_norm1", "layer_norm2", "layer_norm3",
    )
    for kind in ("weight", "bias")
}  # fmt: skip


def paper_sized():
    with torch.device("meta"):
        return XPool(msrvtt_9k())


def test_keys_read_the_full_official_list_on_openai_clip():
    state = paper_sized().state_dict()
    official = KEYS.to_official(state)
    assert set(official) == openai_names() | POOLER_NAMES
    assert keys_for(official) is KEYS
    assert set(KEYS.from_official(official)) == set(state)


def test_keys_read_the_full_official_list_on_transformers_clip():
    transformers = pytest.importorskip("transformers")
    with torch.device("meta"):
        clip = transformers.CLIPModel(transformers.CLIPConfig(projection_dim=512))
    official = {f"clip.{k}": v for k, v in clip.state_dict().items()}
    ours = paper_sized().state_dict()
    official |= {k: v for k, v in ours.items() if k.startswith("pool_frames.")}
    assert keys_for(official) is KEYS_HF
    got = KEYS_HF.from_official(official | {"clip.text_model.embeddings.position_ids": torch.zeros(1)})
    assert {k: v.shape for k, v in got.items()} == {k: v.shape for k, v in ours.items()}
    assert {k: v.shape for k, v in KEYS_HF.to_official(got).items()} == {
        k: v.shape for k, v in official.items()
    }


def test_both_kinds_of_checkpoint_load_alike():
    source, target = XPool(tiny()).eval(), XPool(tiny()).eval()
    theirs = KEYS_HF.to_official(source.state_dict())
    keys_for(theirs).load(target, theirs)
    for name, tensor in source.state_dict().items():
        assert torch.equal(tensor, target.state_dict()[name]), name


@pytest.mark.parametrize("change", ["missing", "unexpected"])
def test_keys_that_do_not_fit_are_listed(change):
    model = XPool(tiny())
    state = dict(model.state_dict())
    if change == "missing":
        del state["pool_frames.linear_proj.bias"]
    else:
        state["pool_frames.linear_proj2.bias"] = torch.zeros(16)
    with pytest.raises(CheckpointError, match=r"linear_proj2?\.bias"):
        KEYS.load(model, state)


def test_presets_are_the_papers():
    assert (msrvtt_9k().clip, msrvtt_9k().heads, msrvtt_9k().dropout) == (vit_b_32(), 1, 0.3)
    assert (msrvtt_9k().frames, msvd().dropout) == (12, 0.4)
    count = sum(p.numel() for p in paper_sized().pool_frames.parameters())
    assert count == 5 * (512 * 512 + 512) + 3 * 2 * 512
    assert XPoolConfig.from_json(json.loads(json.dumps(tiny().to_json()))) == tiny()


def clips(count=3, frames=3):
    mask_BT = torch.ones(count, frames, dtype=torch.bool)
    times_BT = torch.arange(float(frames)).expand(count, frames)
    return ClipBatch(torch.randn(count, frames, 3, 16, 16), times_BT, mask_BT)


def tokens(count=3):
    return torch.cat([torch.randint(1, 30, (count, 7)), torch.full((count, 1), 31)], dim=1)


def test_is_an_encoder_whose_score_is_fast_and_plain_alike():
    model = XPool(tiny()).eval()
    assert isinstance(model, Encoder)
    assert (model.has_text, model.separable, model.adaptation) == (True, False, "none")
    assert (model.frame_spec.count, model.frame_spec.sampler, model.frame_spec.padding) == (
        3, "middle", "repeat-last",
    )  # fmt: skip
    for parameter in model.pool_frames.parameters():
        nn.init.normal_(parameter, std=0.3)
    text_ND, frames_BTD = model.encode_text(tokens()), model.encode_video(clips())
    assert frames_BTD.shape == (3, 3, 16)
    assert not torch.allclose(frames_BTD.norm(dim=-1), torch.ones(3, 3))
    assert model.pool(frames_BTD).shape == (3, 16)
    with torch.inference_mode():
        fast = model.score(text_ND, frames_BTD)
    assert not fast.requires_grad
    plain = model.score(text_ND, frames_BTD)
    assert plain.requires_grad
    torch.testing.assert_close(fast, plain, rtol=0, atol=1e-5)  # times a logit scale of 14
    torch.testing.assert_close(model.attention(text_ND, frames_BTD).sum(-1), torch.ones(3, 3))


def test_starts_from_a_clip_and_from_a_stored_configuration():
    clip = XPool(tiny()).clip
    started = XPool.from_clip(clip)
    assert started.config.clip == clip.config
    assert (started.config.frames, started.training) == (12, False)
    batch, texts = clips(), tokens()
    with torch.inference_mode():
        assert torch.equal(started.encode_video(batch), clip.encode_frames(batch))
        assert torch.equal(started.encode_text(texts), clip.encode_text(texts))
    assert torch.equal(started.pool_frames.linear_proj.weight, torch.eye(16))
    with torch.no_grad():
        started.clip.logit_scale.fill_(0.0)
    assert clip.logit_scale.item() != 0.0  # a copy: training it leaves the CLIP as it was
    restored = XPool.from_config(json.loads(json.dumps(started.config.to_json())))
    restored.load_state_dict(started.state_dict())


def test_the_objective_trains_by_the_papers_recipe():
    model, objective = XPool(tiny()), XPoolObjective()
    assert isinstance(objective, PairObjective)
    old, new = objective.param_groups(model)
    assert (old["lr_scale"], "lr_scale" in new, old["weight_decay"], new["weight_decay"]) == (
        0.1,
        False,
        0.2,
        0.2,
    )
    assert {id(p) for p in new["params"]} == {id(p) for p in model.pool_frames.parameters()}
    assert len(old["params"]) + len(new["params"]) == len(list(model.parameters()))
    batch = {"clip": clips(), "text": tokens()}
    optimizer = torch.optim.AdamW([old, new], lr=3e-3)
    losses = []
    for _ in range(30):
        loss = objective(model, batch)["contrastive"]
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        objective.after_step(model)
        losses.append(loss.item())
    assert min(losses[-5:]) < 0.5 * losses[0]
    with torch.no_grad():
        model.logit_scale.fill_(9.0)
    objective.after_step(model)
    assert model.logit_scale.item() == pytest.approx(math.log(100))


def test_dropout_acts_in_training_only():
    pooler = Pooler(16, 1, dropout=0.5)
    text_ND, frames_MTD = torch.randn(4, 16), torch.randn(3, 6, 16)
    assert not torch.equal(pooler(text_ND, frames_MTD), pooler(text_ND, frames_MTD))
    pooler.eval()
    assert torch.equal(pooler(text_ND, frames_MTD), pooler(text_ND, frames_MTD))


BAD = {
    "widths differ": (torch.ones(2, 8), torch.ones(3, 4, 16), "same width"),
    "frames not 3-D": (torch.ones(2, 16), torch.ones(3, 16), "same width"),
    "no frames": (torch.ones(2, 16), torch.ones(3, 0, 16), "at least one frame"),
    "NaN": (torch.full((2, 16), math.nan), torch.ones(3, 4, 16), "NaN"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input(name):
    text, frames, said = BAD[name]
    with pytest.raises(UsageError, match=said):
        Pooler(16)(text, frames)


def test_bad_heads_and_unpaired_loss():
    with pytest.raises(UsageError, match="16 and 3 heads"):
        Pooler(16, 3)
    with pytest.raises(UsageError, match="one text per video"):
        pair_loss(torch.zeros(3, 2))


def test_a_zero_vector_has_similarity_zero_in_both_forms():
    pooler = random_pooler(16, 1)
    text_ND, frames_MTD = torch.randn(3, 16).double(), torch.randn(2, 4, 16).double()
    text_ND[1] = 0
    for sims in (
        cosine_scores(text_ND, pooler(text_ND, frames_MTD)),
        pooler_scores(text_ND, frames_MTD, pooler.weights()),
    ):
        assert torch.isfinite(sims).all()
        assert (sims[1] == 0).all()


def test_the_claims_world_is_seeded_and_planted():
    a, b, other = planted_frames(3, 40), planted_frames(3, 40), planted_frames(3, 40, split=1)
    assert all(torch.equal(getattr(a, f), getattr(b, f)) for f in ("text_ND", "frames_NTD", "planted_NT"))
    assert not torch.equal(a.text_ND, other.text_ND)
    assert set(a.planted_NT.sum(1).tolist()) == {1, 2}


@pytest.mark.slow
def test_the_claim_shows_in_one_short_run():
    mean, ours = run_claim("avg", 0, steps=150), run_claim("xpool", 0, steps=150)
    assert ours["t2v R@1"] > mean["t2v R@1"] + 5
    assert ours["attention peak on planted frame, %"] > 60  # by chance: 12.5
