from __future__ import annotations

import json
import math

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import nn

from moviola.clip.config import ClipConfig, TextConfig, VitConfig
from moviola.clip.loaded import Model
from moviola.clip.model import CLIP
from moviola.clip.tokenizer import Tokenizer
from moviola.data import noisy_pairs as world
from moviola.data.noisy_pairs import batches, labelled, noisy_pairs, reinforce
from moviola.parts.backbones.fastvit import FastVitConfig
from moviola.parts.backbones.mobile_config import infer_config
from moviola.parts.backbones.mobile_transformer import MobileText, MobileTextConfig, MobileVitConfig
from moviola.systems.pretraining.mobileclip import (
    CLAIM,
    KEYS,
    PRESETS,
    TRAINING,
    MobileClip,
    MobileClipConfig,
    ReinforcedObjective,
    create,
    reparameterize,
    run_claim,
    tiny,
)
from moviola.training.nce import info_nce
from moviola.types import CheckpointError, ClipBatch, Encoder, PairObjective, UsageError

CASE = "a"
IMAGE, TEXT = "image_encoder.model.", "text_encoder."


@pytest.fixture(scope="module")
def oracle(oracles_dir):
    folder = oracles_dir / "54-mobileclip"
    return json.loads((folder / f"{CASE}.json").read_text()), load_file(folder / f"{CASE}.safetensors")


def config_of(meta, tower):
    """The oracle's configuration, with the text tower of that number."""
    image, text = meta["config"]["image"], meta["config"]["text"][tower]
    stages = len(image["layers"])
    return MobileClipConfig(
        text["proj"],
        FastVitConfig(
            tuple(image["layers"]),
            tuple(image["dims"]),
            (float(image["mlp_ratio"]),) * stages,
            tuple(image["token_mixers"]),
        ),
        MobileTextConfig(
            text["model_name"],
            text["causal_masking"],
            text["context_length"],
            text["vocab_size"],
            text["dim"],
            text["n_transformer_layers"],
            text["n_heads_per_layer"],
            text["ffn_multiplier_per_layer"],
        ),
    )


def official(data, tower):
    """The parts of an official state dict, put together: the image tower fits the first text tower only."""
    state = {"logit_scale": torch.tensor(math.log(1 / 0.07))}
    for name, tensor in data.items():
        if name.startswith("param/image/"):
            state[IMAGE + name.removeprefix("param/image/")] = tensor
        if name.startswith(f"param/text{tower}/"):
            state[TEXT + name.removeprefix(f"param/text{tower}/")] = tensor
    return state


def close(got, want, tolerance, name=""):
    assert got.shape == want.shape, name
    worst = ((got.double() - want.double()).abs() / (1 + want.double().abs())).max()
    assert worst <= tolerance, f"{name}: {worst:.2e}"


@torch.no_grad()
def test_every_output_and_gradient_of_the_oracle(oracle):
    meta, data = oracle
    got = {}
    model = MobileClip.from_official(official(data, 0), config_of(meta, 0))
    x_BCHW = model.visual.patch_embed(data["in/pixels"])
    got["stem"] = x_BCHW
    for n, part in enumerate(model.visual.network):
        x_BCHW = part(x_BCHW)
        got[f"network{n}"] = x_BCHW
    got["conv_exp"] = model.visual.conv_exp(x_BCHW)
    got["image"] = model.encode_image(data["in/pixels"])
    folded = reparameterize(model)
    got["image_folded"] = folded.encode_image(data["in/pixels"])
    names = KEYS.to_official(folded.state_dict())
    got |= {f"folded/{k.removeprefix(IMAGE)}": v for k, v in names.items() if k.startswith(IMAGE)}
    folded_keys = [k.removeprefix(IMAGE) for k in names if k.startswith(IMAGE)]
    assert sorted(folded_keys) == sorted(meta["folded_state_keys"])

    for tower in range(len(meta["config"]["text"])):
        config = config_of(meta, tower)
        text = MobileText(config.text, config.embed_dim).eval()
        prefix = f"param/text{tower}/"
        text.load_state_dict({k.removeprefix(prefix): v for k, v in data.items() if k.startswith(prefix)})
        tokens_NL = data[f"in/text{tower}_tokens"]
        got[f"text{tower}"] = text.encode(tokens_NL)
        whole = text(tokens_NL)
        got[f"text{tower}_all_tokens"] = whole.tokens_BLD
        torch.testing.assert_close(whole.vector_BD, got[f"text{tower}"], rtol=0, atol=2e-6)
        if f"out/text{tower}_folded" in data:
            whole_model = MobileClip(config)
            whole_model.text = text
            got[f"text{tower}_folded"] = reparameterize(whole_model.eval()).encode_text(tokens_NL)

    for setting, average in (("avg_after_softmax", True), ("concat", False)):
        got |= loss_outputs(meta, data, setting, average)
    wanted = {name.removeprefix("out/") for name in data if name.startswith("out/")}
    wanted |= {name for name in data if name.startswith("grad/")}
    assert wanted <= set(got), wanted - set(got)
    for name in wanted:
        close(got[name], data[name if name in data else f"out/{name}"], meta["tolerance"], name)


@torch.enable_grad()
def loss_outputs(meta, data, setting, average):
    """The losses of one setting under the oracle's names, and their gradients."""
    config = meta["config"]["loss"]
    clip, distil = config["weights_contrastive_distill"]
    options = {
        "teacher_dims": config["teacher_dims"],
        "contrastive_weight": clip,
        "distill_weight": distil,
        "teacher_scale": config["dist_logit_scale"],
        "average_after_softmax": average,
    }
    leaves = {
        n: data[f"in/loss_{n}"].clone().requires_grad_() for n in ("image", "text", "syn", "logit_scale")
    }
    outputs = {
        "image": leaves["image"],
        "text": leaves["text"],
        "synthetic": leaves["syn"],
        "teacher_image": data["in/loss_t_image"],
        "teacher_text": data["in/loss_t_text"],
        "teacher_synthetic": data["in/loss_t_syn"],
        "logit_scale": leaves["logit_scale"].log(),
    }
    both = ReinforcedObjective(**options).loss(nn.Module(), outputs)
    real = ReinforcedObjective(**options, synthetic=False).loss(nn.Module(), outputs)
    total = both["contrastive"] + both["distill"]
    total.backward()
    made = {f"loss_{setting}_total": total.detach()}
    made |= {f"loss_{setting}_{k}": v.detach() for k, v in both.items()}
    made |= {f"loss_{setting}_{k}_real_only": v.detach() for k, v in real.items()}
    return made | {f"grad/loss_{setting}_{k}": v.grad for k, v in leaves.items()}


# --------------------------------------------------------------------------------------------------
# Names and sizes
# --------------------------------------------------------------------------------------------------

BN = ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")


def norm(at):
    return [f"{at}.{kind}" for kind in BN]


def mobile_one(at, folded, *branches, squeeze=()):
    """Official names of a MobileOne block with these branches."""
    names = [f"{at}.se.{part}.{kind}" for part in squeeze for kind in ("weight", "bias")]
    if folded:
        return [*names, f"{at}.reparam_conv.weight", f"{at}.reparam_conv.bias"]
    for branch in branches:
        inside = branch != "rbr_skip"
        names += [f"{at}.{branch}.conv.weight"] if inside else []
        names += norm(f"{at}.{branch}.bn" if inside else f"{at}.{branch}")
    return names


def mixer_block(at, folded, *, scale):
    mixer = ("rbr_skip", "rbr_conv.0", "rbr_scale") if scale else ("rbr_skip", "rbr_conv.0")
    names = [f"{at}.layer_scale", *conv_ffn(at)]
    if folded:
        return [*names, f"{at}.token_mixer.reparam_conv.weight", f"{at}.token_mixer.reparam_conv.bias"]
    names += [f"{at}.token_mixer.layer_scale", *mobile_one(f"{at}.token_mixer.mixer", False, *mixer)]
    return names + mobile_one(f"{at}.token_mixer.norm", False, "rbr_skip")


def conv_ffn(at):
    plain = [f"{at}.convffn.fc{n}.{kind}" for n in (1, 2) for kind in ("weight", "bias")]
    return [f"{at}.convffn.conv.conv.weight", *norm(f"{at}.convffn.conv.bn"), *plain]


def transformer_layer(at):
    parts = ("pre_norm_mha.0", "pre_norm_mha.1.qkv_proj", "pre_norm_mha.1.out_proj")
    parts += ("pre_norm_ffn.0", "pre_norm_ffn.1", "pre_norm_ffn.4")
    return [f"{at}.{part}.{kind}" for part in parts for kind in ("weight", "bias")]


def official_s0(folded, layers=(2, 6, 10, 2)):
    """Every name of the authors' mobileclip_s0 (mci0 and the mct text tower)."""
    conv, scale, skip = "rbr_conv.0", "rbr_scale", "rbr_skip"
    image = mobile_one("patch_embed.0", folded, conv, scale) + mobile_one(
        "patch_embed.1", folded, conv, scale
    )
    image += mobile_one("patch_embed.2", folded, conv, skip)
    for stage in range(3):
        for n in range(layers[stage]):
            image += mixer_block(f"network.{2 * stage}.{n}", folded, scale=True)
        down = f"network.{2 * stage + 1}.proj"
        if stage > 0:
            image += [f"{down}.0.se.{fc}.{kind}" for fc in ("fc1", "fc2") for kind in ("weight", "bias")]
        if folded:
            image += [f"{down}.0.lkb_reparam.weight", f"{down}.0.lkb_reparam.bias"]
        else:
            for branch in ("lkb_origin", "small_conv"):
                image += [f"{down}.0.{branch}.conv.weight", *norm(f"{down}.0.{branch}.bn")]
        image += mobile_one(f"{down}.1", folded, conv, skip)
    place = "reparam_conv" if folded else "pe"
    image += [f"network.6.{place}.weight", f"network.6.{place}.bias"]
    for n in range(layers[3]):
        at = f"network.7.{n}"
        image += [f"{at}.layer_scale_1", f"{at}.layer_scale_2", *norm(f"{at}.norm"), *conv_ffn(at)]
        image += [f"{at}.token_mixer.{p}" for p in ("qkv.weight", "proj.weight", "proj.bias")]
    image += [*mobile_one("conv_exp", folded, conv, scale, squeeze=("reduce", "expand")), "head.proj"]
    text = ["embedding_layer.weight", "positional_embedding.pos_embed.pos_embed", "projection_layer"]
    text += ["final_layer_norm.weight", "final_layer_norm.bias"]
    text += mixer_block("transformer.0", folded, scale=False) + mixer_block(
        "transformer.5", folded, scale=False
    )
    for n in range(1, 5):
        text += transformer_layer(f"transformer.{n}")
    return ["logit_scale", *(IMAGE + name for name in image), *(TEXT + name for name in text)]


def on_meta(name, folded=False):
    config = PRESETS[name]()
    with torch.device("meta"):
        return MobileClip(MobileClipConfig(config.embed_dim, config.vision, config.text, folded))


@pytest.mark.parametrize(("folded", "count"), [(False, 893), (True, None)])
def test_keys_are_the_full_official_list_of_s0(folded, count):
    names = official_s0(folded)
    assert len(names) == len(set(names))
    assert count is None or len(names) == count
    ours = on_meta("mobileclip_s0", folded).state_dict()
    assert set(KEYS.official_names(ours)) == set(names)
    assert set(KEYS.from_official(KEYS.to_official(ours))) == set(ours)


def test_keys_of_b():
    names = ["logit_scale", f"{IMAGE}cls_token", f"{IMAGE}pos_embed.pos_embed.pos_embed"]
    names += [f"{IMAGE}classifier.proj"]
    for n, part in enumerate((("weight",), ("weight",), ("weight", "bias"))):
        names += [f"{IMAGE}patch_emb.{n}.block.conv.{kind}" for kind in part]
        names += norm(f"{IMAGE}patch_emb.{n}.block.norm") if n < 2 else []
    names += [f"{IMAGE}post_transformer_norm.{kind}" for kind in ("weight", "bias")]
    for tower in (IMAGE, TEXT):
        for n in range(12):
            names += transformer_layer(f"{tower}transformer.{n}")
    names += [f"{TEXT}{part}" for part in ("embedding_layer.weight", "projection_layer")]
    names += [f"{TEXT}positional_embedding.pos_embed.pos_embed"]
    names += [f"{TEXT}final_layer_norm.{kind}" for kind in ("weight", "bias")]
    assert set(KEYS.official_names(on_meta("mobileclip_b").state_dict())) == set(names)


SIZES = {  # counted on the authors' code; their table says 11.4, 21.5, 35.7 and 86.3 + 42.4 or 63.4 million
    "mobileclip_s0": (11_406_464, 42_441_216),
    "mobileclip_s1": (21_541_120, 63_428_096),
    "mobileclip_s2": (35_814_720, 63_428_096),
    "mobileclip_b": (86_348_544, 63_428_096),
}


@pytest.mark.parametrize("name", SIZES)
def test_parameter_counts_are_the_authors(name):
    model = on_meta(name)
    counts = tuple(sum(p.numel() for p in tower.parameters()) for tower in (model.visual, model.text))
    assert counts == SIZES[name]


@pytest.mark.parametrize("name", SIZES)
@pytest.mark.parametrize("folded", [False, True])
def test_a_checkpoint_says_its_own_configuration(name, folded):
    folded &= name != "mobileclip_b"  # nothing folds there
    model = on_meta(name, folded)
    assert infer_config(KEYS.to_official(model.state_dict())) == model.config


def test_configurations_survive_json_and_unknown_fields_are_named():
    for made in (*(preset() for preset in PRESETS.values()), tiny()):
        data = json.loads(json.dumps(made.to_json()))
        assert MobileClipConfig.from_json(data) == made
        data["vision"]["colour"] = 1
        with pytest.raises(CheckpointError, match="colour"):
            MobileClipConfig.from_json(data)


# --------------------------------------------------------------------------------------------------
# Folding
# --------------------------------------------------------------------------------------------------


def lively(config, seed=0):
    """A model whose BatchNorms and layer scales all say something, in eval mode."""
    torch.manual_seed(seed)
    model = MobileClip(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "layer_scale" in name:
                parameter.uniform_(0.2, 0.6)
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.running_mean.normal_(0, 0.3)
                module.running_var.uniform_(0.5, 2)
                module.weight.uniform_(0.5, 1.5)
                module.bias.normal_(0, 0.2)
    return model.eval()


def tokens(count=3, length=8):
    made_NL = torch.randint(1, 30, (count, length))
    made_NL[:, length // 2] = 31
    made_NL[:, length // 2 + 1 :] = 0
    return made_NL


@torch.no_grad()
def test_folding_changes_no_vector_and_leaves_the_model_alone():
    model = lively(tiny())
    before = {k: v.clone() for k, v in model.state_dict().items()}
    folded = reparameterize(model)
    pixels_BCHW, texts_NL = torch.rand(3, 3, 40, 24), tokens()
    torch.testing.assert_close(
        folded.encode_image(pixels_BCHW), model.encode_image(pixels_BCHW), rtol=1e-4, atol=1e-5
    )
    torch.testing.assert_close(
        folded.encode_text(texts_NL), model.encode_text(texts_NL), rtol=1e-4, atol=1e-5
    )
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())
    assert (folded.config.folded, model.config.folded, folded.training) == (True, False, False)
    assert not any("rbr_" in name or "lkb_origin" in name for name in folded.state_dict())
    again = reparameterize(folded)
    assert torch.equal(again.encode_image(pixels_BCHW), folded.encode_image(pixels_BCHW))
    rebuilt = MobileClip.from_config(json.loads(json.dumps(folded.config.to_json())))
    rebuilt.load_state_dict(folded.state_dict())
    assert torch.equal(rebuilt.eval().encode_image(pixels_BCHW), folded.encode_image(pixels_BCHW))


def test_folding_is_exact_in_double_precision_and_for_other_shapes():
    vision = FastVitConfig(
        (1, 2), (8, 24), (2.5, 1.5), ("repmixer", "repmixer"), (False, True), (True, False),
        kernel_size=5, patch_size=5, position_size=3, expansion=3.0, layer_scale=0.3,
    )  # fmt: skip
    text = MobileTextConfig("mct", True, 6, 32, 8, 2, (2, 4), (1.0, 3.0), 5, 2.0)
    model = lively(MobileClipConfig(6, vision, text)).double()
    with torch.no_grad():
        pixels_BCHW = torch.rand(2, 3, 32, 32).double()
        want, got = model.encode_image(pixels_BCHW), reparameterize(model).encode_image(pixels_BCHW)
    torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)
    state = KEYS.to_official(model.state_dict())
    read = infer_config(state)
    assert read.text.ffn_multipliers == (2.0, 4.0)  # rounded up to 16 channels, as the authors do
    assert (read.vision.kernel_size, read.vision.patch_size, read.vision.position_size) == (5, 5, 3)
    assert (read.vision.layers, read.vision.dims, read.vision.expansion) == ((1, 2), (8, 24), 3.0)


def test_folding_in_train_mode_is_refused():
    model = lively(tiny())
    model.visual.conv_exp.train()
    with pytest.raises(UsageError, match=r"model\.eval\(\)"):
        reparameterize(model)


def readable():
    """A small model whose head counts are the ones that `infer_config` takes."""
    vision = FastVitConfig((1, 1, 1, 1), (8, 16, 32, 64), layer_scale=0.3)
    return lively(MobileClipConfig(24, vision, MobileTextConfig("mct", False, 8, 32, 64, 1, 1)))


@pytest.mark.parametrize("folded", [False, True])
def test_a_checkpoint_of_the_authors_loads_folded_or_not(folded):
    model = readable()
    model = reparameterize(model) if folded else model
    state = {k: v.half().clone() if v.is_floating_point() else v for k, v in model.state_dict().items()}
    loaded = MobileClip.from_official(KEYS.to_official(state))
    assert loaded.config.folded is folded
    assert not loaded.training
    assert all(v.dtype != torch.float16 for v in loaded.state_dict().values())
    with torch.no_grad():
        pixels_BCHW, texts_NL = torch.rand(2, 3, 64, 64), tokens(2)
        want, got = model.encode_image(pixels_BCHW), loaded.encode_image(pixels_BCHW)
        assert F.cosine_similarity(want, got).min() > 0.999
        assert F.cosine_similarity(model.encode_text(texts_NL), loaded.encode_text(texts_NL)).min() > 0.999


def test_a_checkpoint_that_is_not_whole_is_named():
    state = KEYS.to_official(readable().state_dict())
    for name, said in (
        ("text_encoder.projection_layer", "lacks text_encoder.projection_layer"),
        ("image_encoder.model.network.0.0.convffn.fc1.bias", r"missing.*convffn\.fc1\.bias"),
    ):
        with pytest.raises(CheckpointError, match=said):
            MobileClip.from_official({k: v for k, v in state.items() if k != name})
    with pytest.raises(CheckpointError, match="unexpected"):
        MobileClip.from_official(state | {f"{IMAGE}more": torch.zeros(1)})


# --------------------------------------------------------------------------------------------------
# The encoder
# --------------------------------------------------------------------------------------------------


def test_is_an_encoder_of_separable_videos():
    model = lively(tiny())
    assert isinstance(model, Encoder)
    assert (model.has_text, model.separable, model.adaptation) == (True, True, "none")
    assert (model.dim, model.context_length) == (16, 8)
    with torch.no_grad():
        text_ND = model.encode_text(tokens())
        frames_BTCHW = torch.rand(2, 3, 3, 32, 32)
        mask_BT = torch.tensor([[True, True, True], [True, False, False]])
        frames_BTCHW[1, 1:] = 0
        batch = ClipBatch(frames_BTCHW, torch.arange(3.0).expand(2, 3), mask_BT)
        video_MD = model.encode_video(batch)
        assert torch.equal(model.pool(video_MD), video_MD)
        one = F.normalize(model.encode_image(frames_BTCHW[1, :1]), dim=-1)
        torch.testing.assert_close(video_MD[1:], one)
        scores_NM = model.score(text_ND, video_MD)
        cosine_NM = F.normalize(text_ND, dim=-1) @ F.normalize(video_MD, dim=-1).T
        torch.testing.assert_close(scores_NM, cosine_NM / 0.07, rtol=1e-5, atol=1e-5)
        model.logit_scale.fill_(9.0)
        torch.testing.assert_close(model.score(text_ND, video_MD), 100 * cosine_NM, rtol=1e-5, atol=1e-4)


def test_the_recipe_is_the_authors():
    for name, side in (("mobileclip_s0", 256), ("mobileclip_s2", 256), ("mobileclip_b", 224)):
        recipe = on_meta(name).recipe
        assert (recipe.size, recipe.interpolation, recipe.resize) == ((side, side), "bilinear", "shortest")
        assert (recipe.mean, recipe.std, recipe.context_length) == ((0, 0, 0), (1, 1, 1), 77)


def test_embeds_through_a_loaded_model_in_channels_last():
    import numpy as np
    from PIL import Image

    tokenizer = Tokenizer.train(["a red circle", "a blue square"], vocab_size=600, context_length=8)
    config = tiny()
    text = MobileTextConfig("mct", False, 8, tokenizer.size, 16, 1, 2, 2.0, 3, 2.0)
    module = lively(MobileClipConfig(16, config.vision, text))
    model = Model(
        module, config=module.config.to_json(), recipe=module.recipe, tokenizer=tokenizer, device="cpu"
    )
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (48, 64, 3), dtype=np.uint8))
    vectors_ND = model.embed_pictures([picture])
    texts_ND = model.embed_texts(["a red circle", "blue"])
    assert vectors_ND.shape == (1, 16)
    with torch.no_grad():
        pixels_BCHW = model.preprocess.pictures([picture])
        want = F.normalize(lively(module.config).encode_image(pixels_BCHW), dim=-1)
    torch.testing.assert_close(torch.from_numpy(vectors_ND), want, rtol=1e-4, atol=1e-5)
    assert texts_ND.shape == (2, 16)


@pytest.mark.parametrize("scale", ["OpenAI's", "-1 to 1", "0 to 255"])
def test_pixels_prepared_by_habit_are_refused(scale):
    raw_BCHW = torch.rand(2, 3, 32, 32)
    mean, std = torch.tensor([0.481, 0.458, 0.408]), torch.tensor([0.269, 0.261, 0.276])
    wrong = {
        "OpenAI's": (raw_BCHW - mean.view(3, 1, 1)) / std.view(3, 1, 1),
        "-1 to 1": 2 * raw_BCHW - 1,
        "0 to 255": 255 * raw_BCHW,
    }
    model = lively(tiny())
    with pytest.raises(UsageError, match="pixels from 0 to 1"):
        model.encode_image(wrong[scale])
    assert model.encode_image(raw_BCHW).shape == (2, 16)
    assert model.encode_image(raw_BCHW[:0]).shape == (0, 16)


def test_unknown_names_and_impossible_sizes():
    with pytest.raises(UsageError, match="mobileclip_s0, mobileclip_s1"):
        create("mobileclip_s9")
    with pytest.raises(UsageError, match="one value a stage"):
        FastVitConfig(layers=(1, 2))
    with pytest.raises(UsageError, match="multiple of 32"):
        FastVitConfig(dims=(64, 128, 256, 500))
    with pytest.raises(UsageError, match="no text tower 'mtc'"):
        MobileTextConfig("mtc")
    with pytest.raises(UsageError, match="2 heads"):
        MobileTextConfig(layers=3, heads=(8, 8))
    with pytest.raises(UsageError, match="divide by 5 heads"):
        MobileTextConfig(heads=5)
    with pytest.raises(UsageError, match="divide by 7 heads"):
        MobileVitConfig(heads=7)


@torch.no_grad()
def test_padding_counts_in_the_towers_that_look_both_ways_only():
    torch.manual_seed(0)
    for causal in (False, True):
        text = MobileText(MobileTextConfig("base", causal, 8, 32, 16, 2, 2), 8).eval()
        first, second = tokens(1), tokens(1)
        second[:, :5] = first[:, :5]
        second[:, 5:] = 7
        assert torch.allclose(text.encode(first), text.encode(second), atol=1e-6) is causal


# --------------------------------------------------------------------------------------------------
# The objective
# --------------------------------------------------------------------------------------------------


def small_clip(seed=0):
    torch.manual_seed(seed)
    vision = VitConfig(image_size=16, patch_size=8, width=16, layers=1, heads=2)
    return CLIP(
        ClipConfig(16, vision, TextConfig(context_length=8, vocab_size=32, width=16, layers=1, heads=2))
    )


def reinforced_batch(count=6, side=16, widths=(5, 7), seed=1):
    generator = torch.Generator().manual_seed(seed)

    def unit():
        parts = [F.normalize(torch.randn(count, w, generator=generator), dim=1) for w in widths]
        return torch.cat(parts, dim=1)

    return {
        "image": torch.rand(count, 3, side, side, generator=generator),
        "text": tokens(count),
        "synthetic": tokens(count),
        "teacher_image": unit(),
        "teacher_text": unit(),
        "teacher_synthetic": unit(),
    }


@pytest.mark.parametrize("student", ["clip", "mobileclip"])
def test_trains_any_student(student):
    model = small_clip() if student == "clip" else MobileClip(tiny())
    side = 16 if student == "clip" else 32
    objective = TRAINING.objective(model, teacher_dims="5,7", contrastive_weight=0.25)
    assert isinstance(objective, PairObjective)
    assert (TRAINING.start, set(TRAINING.presets)) == (None, set(SIZES))
    batch = reinforced_batch(side=side)
    optimizer = torch.optim.AdamW(objective.param_groups(model), lr=3e-3)
    losses = []
    for _ in range(30):
        named = objective(model, batch)
        assert set(named) == {"contrastive", "distill"}
        total = named["contrastive"] + named["distill"]
        total.backward()
        optimizer.step()
        optimizer.zero_grad()
        objective.after_step(model)
        losses.append(total.item())
    assert losses[-1] < losses[0] - 0.3
    assert all(p.grad is None or torch.isfinite(p.grad).all() for p in model.parameters())


@pytest.mark.parametrize("student", ["clip", "mobileclip in eval mode"])
def test_outputs_in_two_parts_give_the_same_losses_and_gradients(student):
    model = small_clip() if student == "clip" else lively(tiny())
    objective = ReinforcedObjective(teacher_dims=(5, 7), contrastive_weight=0.5, distill_weight=0.5)
    batch = reinforced_batch(side=16 if student == "clip" else 32)

    def grads(outputs):
        model.zero_grad()
        losses = objective.loss(model, outputs)
        (losses["contrastive"] + losses["distill"]).backward()
        return losses, {k: p.grad.clone() for k, p in model.named_parameters()}

    parts = [
        objective.outputs(model, {k: v[rows] for k, v in batch.items()})
        for rows in (slice(0, 2), slice(2, 6))
    ]
    joined = {k: v if v.ndim == 0 else torch.cat([part[k] for part in parts]) for k, v in parts[0].items()}
    assert joined["logit_scale"] is model.logit_scale
    one, two = grads(objective.outputs(model, batch)), grads(joined)
    for name, loss in one[0].items():
        torch.testing.assert_close(two[0][name], loss, rtol=1e-5, atol=1e-5)
    for name, grad in one[1].items():
        torch.testing.assert_close(two[1][name], grad, rtol=1e-5, atol=1e-5)


def features(count=7, width=10, widths=(4, 6), seed=0):
    torch.manual_seed(seed)
    unit = lambda w: F.normalize(torch.randn(count, w, dtype=torch.float64), dim=1)  # noqa: E731
    vectors = {name: unit(width) for name in ("image", "text", "synthetic")}
    teachers = {f"teacher_{n}": torch.cat([unit(w) for w in widths], 1) for n in vectors}
    return {**vectors, **teachers, "logit_scale": torch.tensor(2.0, dtype=torch.float64)}


def test_without_distillation_it_is_clips_loss():
    outputs = features()
    objective = ReinforcedObjective(contrastive_weight=1.0, distill_weight=0.0, synthetic=False)
    want = info_nce(outputs["image"], outputs["text"], outputs["logit_scale"].exp())
    assert objective.loss(nn.Module(), outputs) == {"contrastive": want}


def test_a_student_that_is_the_teacher_has_nothing_to_learn():
    outputs = features(width=9)
    for name in ("image", "text", "synthetic"):
        outputs[name].requires_grad_()
        outputs[f"teacher_{name}"] = outputs[name].detach().clone()
    outputs["logit_scale"] = torch.tensor(math.log(30.0), dtype=torch.float64, requires_grad=True)
    loss = ReinforcedObjective(teacher_scale=30.0).loss(nn.Module(), outputs)["distill"]
    leaves = [outputs[name] for name in ("image", "text", "synthetic", "logit_scale")]
    assert loss > 0  # the teacher's own entropy remains
    for grad in torch.autograd.grad(loss, leaves):
        assert grad.abs().max() < 1e-12


def test_one_teacher_averages_to_itself_and_two_do_not():
    one, two = features(widths=(8,)), features(widths=(4, 4))

    def distil(outputs, **options):
        return ReinforcedObjective(**options).loss(nn.Module(), outputs)["distill"]

    torch.testing.assert_close(distil(one), distil(one, average_after_softmax=False), rtol=1e-12, atol=0)
    joined = distil(two, teacher_dims=(4, 4), average_after_softmax=False)
    assert abs(distil(two, teacher_dims=(4, 4)) - joined) > 1e-3


BAD = {
    "dims that do not sum": ({"teacher_dims": (4, 5)}, "sum to 9, but the teachers' vectors have 10"),
    "one teacher said, two stored": ({}, "lengths from 1.41 to 1.41"),
    "dims in another order": ({"teacher_dims": (6, 4)}, "each teacher's must be 1"),
}


@pytest.mark.parametrize("name", BAD)
def test_teachers_that_do_not_fit(name):
    options, said = BAD[name]
    with pytest.raises(UsageError, match=said):
        ReinforcedObjective(**options).loss(nn.Module(), features())


def test_a_batch_that_is_not_reinforced_and_options_out_of_range():
    model, batch = small_clip(), reinforced_batch()
    del batch["teacher_text"]
    with pytest.raises(UsageError, match=r"teacher_text .*moviola reinforce"):
        ReinforcedObjective()(model, batch)
    for options, said in (
        ({"contrastive_weight": -1.0}, "must not be negative"),
        ({"distill_weight": 0.0}, "not both 0"),
        ({"teacher_scale": 0.0}, "teacher_scale must be positive"),
        ({"teacher_dims": "768,many"}, "widths such as 768,768"),
        ({"teacher_dims": ()}, "widths such as 768,768"),
        ({"teacher_dims": -3}, "widths such as 768,768"),
    ):
        with pytest.raises(UsageError, match=said):
            ReinforcedObjective(**options)
    assert ReinforcedObjective(teacher_dims=768).teacher_dims == (768,)
    assert ReinforcedObjective(teacher_dims="768, 768").teacher_dims == (768, 768)
    assert ReinforcedObjective(teacher_dims=[512, 768]).teacher_dims == (512, 768)


# --------------------------------------------------------------------------------------------------
# The claim
# --------------------------------------------------------------------------------------------------


def test_the_noisy_world_is_seeded_and_as_noisy_as_it_says():
    a, b = noisy_pairs(3, 200, mismatched=0.5, views=2), noisy_pairs(3, 200, mismatched=0.5, views=2)
    assert torch.equal(a.views_NA3SS, b.views_NA3SS)
    assert torch.equal(a.text_NL, b.text_NL)
    assert not torch.equal(a.views_NA3SS[:, 0], a.views_NA3SS[:, 1])
    clean = noisy_pairs(3, 200, mismatched=0.0, views=2)
    assert torch.equal(a.views_NA3SS, clean.views_NA3SS)
    changed = (a.text_NL != clean.text_NL).any(1).double().mean()
    assert 0.4 < changed <= 0.5
    pixels_NCHW, label_N, prompts_CL = labelled(3, 2)
    assert (len(pixels_NCHW), len(prompts_CL)) == (2 * len(world.CLASSES), len(world.CLASSES))
    assert torch.equal(label_N.bincount(), torch.full((len(world.CLASSES),), 2))


def test_a_reinforced_world_stores_what_the_teacher_says_and_asks_it_no_more():
    pairs = noisy_pairs(1, 60, mismatched=0.5, views=2)
    calls = []

    def encode_image(x):
        calls.append("image")
        return x.flatten(1)[:, :12]

    def encode_text(x):
        calls.append("text")
        return F.one_hot(x, world.SIZES[2]).sum(1).float()[:, :12] + 0.1

    added = reinforce(pairs, encode_image, encode_text)
    asked = len(calls)
    steps = list(batches(pairs, added, seed=0, size=16, steps=3))
    assert len(calls) == asked
    for batch, plain in zip(steps, batches(pairs, None, seed=0, size=16, steps=3), strict=True):
        assert torch.equal(batch["image"], plain["image"])
        assert torch.equal(batch["text"], plain["text"])
        want = F.normalize(encode_image(batch["image"]), dim=-1)
        torch.testing.assert_close(batch["teacher_image"], want)
        for name in ("text", "synthetic"):
            want = F.normalize(encode_text(batch[name]), dim=-1)
            torch.testing.assert_close(batch[f"teacher_{name}"], want)


@pytest.mark.slow
def test_the_claim_shows_in_one_run():
    plain, ours = run_claim("clip", 0), run_claim(CLAIM.ours, 0)
    assert plain[CLAIM.metric] > 5  # chance is 3.3
    assert ours[CLAIM.metric] > plain[CLAIM.metric]
