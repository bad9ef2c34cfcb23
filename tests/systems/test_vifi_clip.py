from __future__ import annotations

import json
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file

from moviola.clip.config import ClipConfig, TextConfig, VitConfig, vit_b_16
from moviola.clip.loaded import Model
from moviola.clip.model import CLIP
from moviola.data import order_clips as world
from moviola.data.order_clips import clip_batch
from moviola.parts.prompted_clip import PromptedConfig
from moviola.parts.prompting import embed_with_context
from moviola.systems.video import vifi_clip
from moviola.systems.video.vifi_clip import CLAIM, KEYS, RECOGNITION, VifiClip, VifiRecognition, b_16
from moviola.types import CheckpointError, ClipBatch, Encoder, Objective, UsageError

# --------------------------------------------------------------------------------------------------
# Parity
# --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def oracle(oracles_dir):
    folder = oracles_dir / "08-vifi-clip"
    return json.loads((folder / "a.json").read_text()), load_file(folder / "a.safetensors")


@pytest.fixture
def base(oracle):
    """The CLIP that the authors' models began with, of which they keep no table of tokens."""
    meta, data = oracle
    c = meta["config"]
    vision = VitConfig(c["image"], c["patch"], c["vwidth"], c["vlayers"], c["vision_heads"])
    text = TextConfig(c["ctx"], c["vocab"], c["twidth"], c["tlayers"], c["theads"])
    clip = CLIP(ClipConfig(c["embed_dim"], vision, text))
    clip.load_state_dict({"token_embedding.weight": data["in/token_embedding.weight"]}, strict=False)
    return clip.eval()


def official(data, *, prompts=True):
    state = {k.removeprefix("param/"): v for k, v in data.items() if k.startswith("param/")}
    if prompts:
        return state
    kept = {k: v for k, v in state.items() if "VPT" not in k and "prompt_learner" not in k}
    return kept | {"prompt_learner.complete_text_embeddings": torch.zeros(4, 14, 32)}


def check(got, wanted, name, tolerance):
    assert got.shape == wanted.shape, name
    worst = ((got.double() - wanted.double()).abs() / (1 + wanted.double().abs())).max()
    assert worst <= tolerance, f"{name}: {worst:.2e}"


def test_parity_of_every_output_and_gradient_in_both_stages(oracle, base):
    meta, data = oracle
    tolerance, batch = meta["tolerance"], {"clip": clip_batch(data["in/video"]), "label": data["in/labels"]}
    options = {"mixup": 0, "cutmix": 0, "label_smoothing": 0}
    left = {k for k in data if k.startswith(("out/", "grad/", "grad_plain/"))}

    def same(name, value, tol=tolerance):
        check(value.detach(), data[name], name, tol)
        left.remove(name)

    for stage, mark in (("prompt", ""), ("bridge", "plain_")):
        tokens = data[f"in/{mark}tokenized_prompts"]
        place = tokens[0, 1 : 1 + meta["config"]["n_text"]].tolist() if stage == "prompt" else ()
        model = VifiClip.from_official(official(data, prompts=stage == "prompt"), base, place=place)
        loss = VifiRecognition(model, tokens, stage=stage, **options)(model, batch)["class"]
        loss.backward()
        text = model.encode_text(tokens)
        same(f"out/{mark}loss", loss)
        same(f"out/{mark}text_features", text)
        same(f"out/{mark}frame_features", model.encode_frames(batch["clip"]))
        same(f"out/{mark}logits", model.score(text, model.encode_video(batch["clip"])).T)
        grads = KEYS.to_official({k: p.grad for k, p in model.named_parameters() if p.grad is not None})
        if stage == "prompt":
            same("out/prompt_embeddings", embed_with_context(model, tokens, model.ctx))
            for name, grad in grads.items():
                if "VPT" not in name:
                    same(f"grad/{name}", grad)
                    continue
                wanted = data[f"grad/{name}"]  # rounded to half precision: relative to the largest
                assert (grad - wanted).abs().max() <= 2e-3 * wanted.abs().max(), name
                left.remove(f"grad/{name}")
        else:
            for name in [k for k in data if k.startswith("grad_plain/")]:
                same(name, grads[name.removeprefix("grad_plain/")])
    assert not left


def test_names_at_paper_size():
    """Every name of an official checkpoint of either stage, from the specification."""
    block = ["attn.in_proj_weight", "attn.in_proj_bias", "attn.out_proj.weight", "attn.out_proj.bias"]
    block += [f"{part}.{kind}" for part in ("ln_1", "ln_2") for kind in ("weight", "bias")]
    block += [f"mlp.{part}.{kind}" for part in ("c_fc", "c_proj") for kind in ("weight", "bias")]
    blocks = [f"transformer.resblocks.{n}.{part}" for n in range(12) for part in block]
    image = ["class_embedding", "positional_embedding", "proj", "conv1.weight", *blocks]
    image += [f"ln_{place}.{kind}" for place in ("pre", "post") for kind in ("weight", "bias")]
    text = ["positional_embedding", "text_projection", "ln_final.weight", "ln_final.bias", *blocks]
    plain = {f"image_encoder.{name}" for name in image} | {f"text_encoder.{name}" for name in text}
    plain |= {"logit_scale"}
    deep = {f"transformer.resblocks.{n}.VPT_shallow" for n in range(1, 9)}
    prompts = {"prompt_learner.ctx", "image_encoder.VPT"}
    prompts |= {f"{side}_encoder.{name}" for side in ("image", "text") for name in deep}
    buffers = ({"complete_text_embeddings"}, {"token_prefix", "token_suffix"})
    sixteen = {"n_vision": 16, "n_text": 16, "depth_vision": 9, "depth_text": 9}
    for options, names, kept in (({}, plain, buffers[0]), (sixteen, plain | prompts, buffers[1])):
        with torch.device("meta"):
            model = VifiClip(PromptedConfig.over(vit_b_16(), **options))
        own = [name for name in model.state_dict() if name != "token_embedding.weight"]
        assert set(KEYS.official_names(own)) == names
        state = dict.fromkeys(names | {f"prompt_learner.{name}" for name in kept}, torch.zeros(1))
        assert set(KEYS.from_official(state)) == set(own)
        if options:
            added = sum(p.numel() for name, p in model.named_parameters() if "VPT" in name or name == "ctx")
            assert added == 9 * (16 * 768 + 16 * 512)


def test_authors_files(oracle, base):
    _, data = oracle
    state = official(data)
    under = VifiClip.from_official({f"module.{k}": v for k, v in state.items()}, base)
    counts = {"n_vision": 3, "n_text": 4, "depth_vision": 3, "depth_text": 2}
    assert {name: getattr(under.config, name) for name in counts} == counts
    # prompts learned with other class names serve any: without a place they are inserted before a name
    named = data["in/tokenized_prompts"]
    bare = F.pad(torch.cat([named[:, :1], named[:, 5:]], 1), (0, 4))
    placed = VifiClip.from_official(state, base, place=named[0, 1:5].tolist())
    torch.testing.assert_close(under.encode_text(bare), placed.encode_text(named))
    third = state["image_encoder.VPT"] + 1 / 3
    rounded = VifiClip.from_official({**state, "image_encoder.VPT": third}, base)
    assert torch.equal(rounded.visual.VPT, third.half().float())
    with pytest.raises(UsageError, match="lack the table of tokens"):
        VifiClip.from_official(state)
    with pytest.raises(CheckpointError, match=r"1 missing: visual\.proj"):
        VifiClip.from_official({k: v for k, v in state.items() if k != "image_encoder.proj"}, base)
    with pytest.raises(UsageError, match="4 prompts cannot take the place of 3 words"):
        VifiClip.from_official(state, base, place=(1, 2, 3))


# --------------------------------------------------------------------------------------------------
# The video
# --------------------------------------------------------------------------------------------------


def draw(*shape, seed=1):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def tower():
    torch.manual_seed(0)
    vision = VitConfig(16, 8, width=16, layers=3, heads=2, stem=((8, 0),))
    return CLIP(ClipConfig(16, vision, TextConfig(12, 32, 16, 2, 2))).eval()


TOKENS = torch.zeros(5, 12, dtype=torch.int64)
TOKENS[:, :6] = torch.tensor([[30, 4, 5, n, n + 7, 31] for n in range(1, 6)])


def built(**options):
    return VifiClip.from_clip(tower(), **options)


@pytest.fixture(params=[{}, {"n_vision": 3, "n_text": 2, "std": 0.5}], ids=["bridge", "prompt"])
def model(request):
    return built(**request.param)


def test_starts_exactly_as_the_clip_and_differs_in_the_mean_alone():
    clip, clips = tower(), clip_batch(draw(3, 4, 3, 16, 16))
    model = VifiClip.from_clip(clip)
    assert isinstance(model, Encoder)
    assert model.separable
    assert torch.equal(model.encode_frames(clips), clip.encode_frames(clips))
    assert torch.equal(model.encode_text(TOKENS), clip.encode_text(TOKENS))
    frames = clip.encode_frames(clips)
    torch.testing.assert_close(model.encode_video(clips), frames.mean(1))
    torch.testing.assert_close(clip.encode_video(clips), F.normalize(frames, dim=-1).mean(1))
    logits = model.logit_scale.exp() * F.normalize(frames.mean(1), dim=-1)
    got = model.score(model.encode_text(TOKENS), model.encode_video(clips))
    torch.testing.assert_close(got.T, logits @ F.normalize(model.encode_text(TOKENS), dim=-1).T)


@torch.no_grad()
def test_the_order_of_frames_and_copies_of_them_change_nothing(model):
    frames = draw(2, 5, 3, 16, 16)
    video = model.encode_video(clip_batch(frames))
    close = {"rtol": 1e-5, "atol": 1e-5}
    torch.testing.assert_close(model.encode_video(clip_batch(frames[:, [3, 1, 4, 0, 2]])), video, **close)
    torch.testing.assert_close(
        model.encode_video(clip_batch(frames.repeat_interleave(2, dim=1))), video, **close
    )
    still = frames[:, :1].expand(-1, 7, -1, -1, -1)
    torch.testing.assert_close(
        model.encode_video(clip_batch(still)), model.encode_image(frames[:, 0]), **close
    )
    mask = torch.tensor([[True] * 5, [True, True, False, False, False]])
    padded = model.encode_video(ClipBatch(frames, mask.float(), mask))
    torch.testing.assert_close(padded[1], model.encode_video(clip_batch(frames[1:, :2]))[0], **close)


@pytest.mark.parametrize("shape", [(4, 3, 16, 16), (2, 0, 3, 16, 16)])
def test_what_is_no_clip_is_refused(model, shape):
    with pytest.raises(UsageError, match=r"Clips are \(B, T, 3, H, W\) with one frame or more"):
        model.encode_video(ClipBatch(torch.zeros(shape), torch.zeros(1, 1), torch.ones(1, 1)))


# --------------------------------------------------------------------------------------------------
# Training
# --------------------------------------------------------------------------------------------------


def batch(count=6):
    return {"clip": clip_batch(draw(count, 3, 3, 16, 16)), "label": torch.arange(count) % 5}


def moved_by_training(model, objective, count=6):
    before = {k: v.clone() for k, v in model.state_dict().items()}
    optimizer = torch.optim.AdamW(objective.param_groups(model), lr=1e-3)
    model.train()
    for _ in range(2):
        objective(model, batch(count))["class"].backward()
        optimizer.step()
        optimizer.zero_grad()
    return {k for k, v in model.state_dict().items() if not torch.equal(v, before[k])}


@pytest.mark.parametrize("use", ["both", "image", "text"])
def test_the_bridge_trains_the_towers_it_names(use):
    model = built()
    objective = VifiRecognition(model, TOKENS, use=use)
    assert isinstance(objective, Objective)
    names = set(model.state_dict())
    image = {k for k in names if k.startswith("visual.")}
    text = names - image - {"logit_scale", "token_embedding.weight"}
    wanted = {"both": image | text | {"logit_scale"}, "image": image, "text": text}[use]
    assert moved_by_training(model, objective, 5) == wanted  # an odd batch is mixed too
    assert objective.frozen_text == (use == "image")


def test_a_word_of_train_narrows_what_a_stage_trains():
    model = built()
    objective = VifiRecognition(model, TOKENS, train="visual.transformer")
    assert all(k.startswith("visual.transformer") for k in moved_by_training(model, objective))


@pytest.mark.parametrize("depths", [(1, 1), (3, 2)])
def test_the_prompt_stage_trains_the_prompts_alone(depths):
    model = built()
    options = {"n_vision": 3, "n_text": 2, "depth_vision": depths[0], "depth_text": depths[1]}
    objective = VifiRecognition(model, TOKENS, stage="prompt", **options)
    prompts = {k for k in model.state_dict() if "VPT" in k or k == "ctx"}
    assert len(prompts) == sum(depths)
    assert model.config.place == (4, 5)  # the words that all texts share
    rates = {group["lr_scale"] for group in objective.param_groups(model)}
    assert rates == {1000.0}
    assert moved_by_training(model, objective) == prompts
    assert not objective.frozen_text
    # it goes on with the prompts that are there
    again = VifiRecognition(model, TOKENS[:4], stage="prompt")
    assert moved_by_training(model, again, 4) == prompts


def test_prompts_in_the_image_alone_leave_the_texts_as_they_are():
    model = built()
    objective = VifiRecognition(model, TOKENS, stage="prompt", n_text=0, n_vision=2)
    assert objective.frozen_text
    assert objective.text(model) is objective.text(model)
    assert moved_by_training(model, objective) == {k for k in model.state_dict() if "VPT" in k}


@pytest.mark.parametrize(
    ("n_text", "words", "place"), [(2, True, (4, 5)), (2, False, ()), (3, True, ()), (5, True, ())]
)
def test_when_prompts_take_the_place_of_words(n_text, words, place):
    """Only those that all texts share, and by the official rule no more than four."""
    model = built()
    VifiRecognition(model, TOKENS, stage="prompt", n_text=n_text, words=words)
    assert model.config.place == place
    same = TOKENS.clone()
    same[:, 1:8] = torch.tensor([[4, 5, 6, 7, 8, n, 31] for n in range(10, 15)])
    model = built()
    VifiRecognition(model, same, stage="prompt", n_text=5)
    assert model.config.place == ()


def test_other_class_names_after_training():
    model = built(n_vision=3, n_text=2, place=(4, 5), std=0.5)
    clips = clip_batch(draw(2, 3, 3, 16, 16))
    other = TOKENS.clone()
    other[:, 3] += 10
    first, second = (model.score(model.encode_text(t), model.encode_video(clips)) for t in (TOKENS, other))
    assert (first - second).abs().max() > 1e-3
    both = model.score(model.encode_text(torch.cat([TOKENS, other])), model.encode_video(clips))
    torch.testing.assert_close(both, torch.cat([first, second]))


def test_bad_input_of_training():
    with pytest.raises(UsageError, match="Two classes have the same text"):
        VifiRecognition(built(), TOKENS[[0, 1, 0]])
    with pytest.raises(UsageError, match="stage is bridge or prompt"):
        VifiRecognition(built(), TOKENS, stage="both")
    with pytest.raises(UsageError, match="use both, image or text"):
        VifiRecognition(built(), TOKENS, use="video")
    with pytest.raises(UsageError, match="the bridge comes before"):
        VifiRecognition(built(n_text=2), TOKENS)
    with pytest.raises(UsageError, match="depth_text are both 0, or both 1 or more"):
        VifiRecognition(built(), TOKENS, stage="prompt", n_text=2, depth_text=0)
    with pytest.raises(UsageError, match="the depth at most 3"):
        VifiRecognition(built(), TOKENS, stage="prompt", n_text=2, depth_vision=4)
    model = built()
    objective = VifiRecognition(model, TOKENS, stage="prompt", n_text=8)
    with pytest.raises(UsageError, match="6 tokens and 8 prompt tokens do not fit the context of 12"):
        objective(model, batch())
    with pytest.raises(UsageError, match=r"class numbers in 0\.\.4"):
        VifiRecognition(built(), TOKENS)(model, {**batch(), "label": torch.full((6,), 5)})


def test_what_training_starts_from():
    model = RECOGNITION.start(tower())
    assert RECOGNITION.start(model) is model
    assert RECOGNITION.presets["b-16"]() == b_16()
    assert RECOGNITION.recipe["lr"] * 1000 == pytest.approx(8e-3)  # the paper's for prompts, few shots


# --------------------------------------------------------------------------------------------------
# The claim, and the verbs
# --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("arm", CLAIM.arms)
def test_every_arm_of_the_claim_runs(monkeypatch, arm):
    def new(seed, *, steps):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            return CLIP(world.clip_config(width=32, layers=2)).eval()

    monkeypatch.setattr(world, "image_clip", new)
    torch.manual_seed(5)
    before = torch.get_rng_state()
    figures = vifi_clip.run_claim(arm, 0, steps=2, prompt_steps=2, clips=160)
    assert torch.equal(torch.get_rng_state(), before)
    assert all(math.isfinite(v) for v in figures.values())
    assert CLAIM.metric in figures


def test_the_claims_classes():
    """Every colour and shape is in both halves, and no thing is."""
    things = [vifi_clip._THINGS[n].split() for n in vifi_clip._BASE]
    assert len({*vifi_clip._BASE.tolist(), *vifi_clip._NEW.tolist()}) == 16
    assert {c for c, _ in things} == set(world.SEEN["colours"]["train"])
    assert {s for _, s in things} == set(world.SEEN["shapes"]["train"])


@pytest.mark.parametrize("options", [{}, {"n_vision": 4, "n_text": 4}], ids=["bridge", "prompt"])
def test_the_builtin_model_becomes_one(tmp_path, options):
    from moviola.verbs.load import load

    base = load("builtin", device="cpu")
    if options:
        options["place"] = tuple(base.tokenizer("a photo of a")[0, 1:5].tolist())
    module = VifiClip.from_clip(base.module, **options)
    loaded = Model(
        module, config=module.config.to_json(), recipe=base.recipe, tokenizer=base.tokenizer, device="cpu"
    )
    assert loaded.tokenizer.context_length == base.tokenizer.context_length - module.config.n_text
    rng = np.random.default_rng(0)
    clips = [(rng.integers(0, 255, (n, 64, 64, 3), np.uint8), np.arange(n) / 2) for n in (6, 3)]
    video, mask = loaded.encode_clips(clips)
    assert video.shape == (2, 256)
    scores = loaded.score(["a photo of a dog.", "a car"], video, mask)
    assert np.isfinite(scores).all()
