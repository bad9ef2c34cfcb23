from __future__ import annotations

import copy

import pytest
import torch

from moviola.clip.blocks import set_checkpointing
from moviola.clip.config import ClipConfig, ResNetConfig, TextConfig, VitConfig
from moviola.clip.formats import BUILTIN_FOLDER
from moviola.clip.loaded import load
from moviola.clip.model import CLIP
from moviola.parts.prompting import (
    check_same_base,
    class_prompts,
    cut_texts,
    embed_with_context,
    image_with_prompts,
    most_depth,
    places,
    prompt_template,
    promptable,
    run_with_prompts,
    text_from_embeddings,
    tokenizer_of,
    with_places,
    with_prompts,
)
from moviola.systems.adaptation.maple import Config, Maple
from moviola.systems.pretraining.long_clip import LongClip
from moviola.types import CheckpointError, Refusal, UsageError


@pytest.fixture(scope="module")
def model():
    return load(BUILTIN_FOLDER, device="cpu")


@pytest.fixture(scope="module")
def clip():
    vision = VitConfig(16, 8, width=16, layers=2, heads=2)
    text = TextConfig(context_length=12, vocab_size=32, width=8, layers=3, heads=2)
    torch.manual_seed(0)
    return CLIP(ClipConfig(16, vision, text)).eval().requires_grad_(False)


TOKENS = torch.tensor([[30, 4, 5, 7, 31, 0, 0, 0], [30, 4, 5, 8, 9, 10, 31, 0]])


def test_class_prompts_are_the_sentences_and_share_their_placeholders(model):
    tokens = class_prompts(model.tokenizer, ["cat", "big_dog"])
    assert torch.equal(
        tokens, torch.from_numpy(model.tokenizer(["a photo of a cat.", "a photo of a big dog."]))
    )
    assert torch.equal(places(tokens, 2), tokens[1, 1:3])
    random = class_prompts(model.tokenizer, ["cat", "dog"], ctx_init="", n_ctx=3)
    assert model.tokenizer.decode(random[0, 1:4].tolist()) == "x x x "
    assert prompt_template(model.tokenizer, "a_photo  of", 1) == "a photo of {}."


def test_bad_class_prompts(model):
    for given, said in (
        ({"n_ctx": 0}, "at least 1, got 0"),
        ({"n_ctx": 5}, "4 tokens, fewer than n_ctx = 5"),
        ({"ctx_init": "a {} of"}, "without braces"),
    ):
        with pytest.raises(UsageError, match=said):
            class_prompts(model.tokenizer, ["cat"], **given)
    for names, said in (
        (["big_dog", "big dog"], "more than one class: big dog"),
        (["cat", ""], "none that is empty"),
        ([], "need class names"),
        (["dog " * 90], "the model's context holds 77"),
    ):
        with pytest.raises(UsageError, match=said):
            class_prompts(model.tokenizer, names)
    with pytest.raises(UsageError, match=r"of 6 tokens or more, got \(2, 5\)"):
        places(TOKENS[:, :5], 4)
    with pytest.raises(UsageError, match="share their tokens 1 to 3"):
        places(TOKENS, 3)


def test_context_stands_at_the_places_of_every_text(clip):
    plain = clip.token_embedding(TOKENS)
    shared = embed_with_context(clip, TOKENS, torch.full((2, 8), 9.0))
    assert (shared[:, 1:3] == 9).all()
    assert torch.equal(shared[:, :1], plain[:, :1])
    assert torch.equal(shared[:, 3:], plain[:, 3:])
    per_picture = torch.randn(5, 1, 2, 8)
    made = embed_with_context(clip, TOKENS, per_picture)
    assert made.shape == (5, 2, 8, 8)
    for one, context in zip(made, per_picture[:, 0], strict=True):
        assert torch.equal(one, embed_with_context(clip, TOKENS, context))
    per_class = torch.randn(2, 2, 8)
    assert torch.equal(embed_with_context(clip, TOKENS, per_class)[:, 1:3], per_class)
    with pytest.raises(UsageError, match="no room for 7 prompt tokens"):
        embed_with_context(clip, TOKENS, torch.zeros(7, 8))


def test_text_from_embeddings_is_the_text_tower(clip):
    ends = clip.eot_positions(TOKENS)
    wanted = clip.encode_text(TOKENS)
    torch.testing.assert_close(text_from_embeddings(clip, clip.token_embedding(TOKENS), ends), wanted)
    cut, ends = cut_texts(clip, TOKENS)
    assert cut.shape == (2, 7)
    torch.testing.assert_close(text_from_embeddings(clip, clip.token_embedding(cut), ends), wanted)
    with pytest.raises(UsageError, match="at most 12 tokens, got 13"):
        text_from_embeddings(clip, torch.zeros(1, 13, 8), ends[:1])


def test_text_from_embeddings_knows_the_two_tables_of_long_clip(clip):
    wide = ClipConfig(16, clip.config.vision, TextConfig(77, 32, width=8, layers=1, heads=2))
    long = LongClip.from_clip(CLIP(wide)).eval()
    torch.nn.init.normal_(long.positional_embedding_res)
    tokens = torch.cat([torch.full((1, 60), 3), torch.tensor([[31]])], dim=1)
    made = text_from_embeddings(long, long.token_embedding(tokens), torch.tensor([60]))
    torch.testing.assert_close(made, long.encode_text(tokens))


def test_deep_prompts_replace_tokens_before_their_block(clip):
    x, deep = torch.randn(2, 7, 8), [torch.randn(2, 8), torch.randn(2, 8)]
    for first, at in ((1, slice(1, 3)), (-2, slice(5, 7))):
        wanted = clip.transformer.resblocks[0](x)
        for block, prompt in zip(clip.transformer.resblocks[1:], deep, strict=True):
            wanted = wanted.clone()
            wanted[:, at] = prompt
            wanted = block(wanted)
        torch.testing.assert_close(run_with_prompts(clip.transformer, x, deep, first), wanted)
    assert torch.equal(with_prompts(x, deep[0], -2)[:, 5:], deep[0].expand(2, 2, 8))
    torch.testing.assert_close(run_with_prompts(clip.transformer, x, [], 1), clip.transformer(x)[0])
    with pytest.raises(UsageError, match="3 blocks has no place for 3 deep prompts"):
        run_with_prompts(clip.transformer, x, [*deep, deep[0]], 1)


def test_checkpointing_is_respected(clip):
    x, prompt = torch.randn(2, 7, 8), torch.randn(2, 8, requires_grad=True)
    grads, calls = [], []
    handle = clip.transformer.resblocks[2].register_forward_pre_hook(lambda *args: calls.append(1))
    for on in (False, True):
        set_checkpointing(clip.transformer, on)
        run_with_prompts(clip.transformer, x, [prompt], 1).square().sum().backward()
        grads.append(prompt.grad.clone())
        prompt.grad = None
    set_checkpointing(clip.transformer, False)
    handle.remove()
    assert len(calls) == 3  # once plain, and twice with checkpoints
    torch.testing.assert_close(*grads)


def test_places_are_inserted_where_they_are_not(clip):
    place = torch.tensor([4, 5])
    same, ends = with_places(clip, TOKENS, place)
    assert torch.equal(same, TOKENS[:, :7])
    assert ends.tolist() == [4, 6]
    other = torch.tensor([[30, 7, 31, 0, 0, 0, 0, 0], [30, 31, 0, 0, 0, 0, 0, 0]])
    made, ends = with_places(clip, torch.cat([TOKENS[:1], other]), place)
    assert made.tolist() == [[30, 4, 5, 7, 31], [30, 4, 5, 7, 31], [30, 4, 5, 31, 0]]
    assert ends.tolist() == [4, 4, 3]
    with pytest.raises(UsageError, match="11 tokens and 2 prompt tokens do not fit the context of 12"):
        with_places(clip, torch.tensor([[30, *[7] * 9, 31]]), place)


def test_what_can_be_prompted(clip, model):
    assert promptable(clip) == (clip, clip.visual)
    assert [most_depth(clip, sides) for sides in ("both", "text", "vision")] == [2, 3, 2]
    resnet = ResNetConfig(image_size=32, width=8, layers=(1, 1, 1, 1), heads=4)
    with pytest.raises(Refusal, match="ResNet"):
        promptable(CLIP(ClipConfig(16, resnet, clip.config.text)))
    with pytest.raises(Refusal, match="this model is a Linear"):
        promptable(torch.nn.Linear(2, 2))
    assert tokenizer_of(model) is model.tokenizer
    silent = copy.copy(model)
    silent.tokenizer = None
    with pytest.raises(CheckpointError, match="without a tokenizer"):
        tokenizer_of(silent)


def test_the_same_base_but_for_rounding(model):
    state = {k: v.half() for k, v in model.module.state_dict().items() if k.startswith("ln_final")}
    check_same_base(model, state, source="checkpoint")
    for changed in ({"ln_final.bias": state["ln_final.bias"] + 1}, {"foreign": torch.zeros(1)}):
        with pytest.raises(CheckpointError, match="1 of the tensors that it carries differ"):
            check_same_base(model, state | changed, source="checkpoint")


def test_image_with_prompts_is_what_maple_does(clip):
    torch.manual_seed(1)
    maple = Maple(clip, Config(depth=2), TOKENS)
    pixels = torch.randn(3, 3, 16, 16)
    got = image_with_prompts(clip.visual, pixels, maple.vision_prompts())
    torch.testing.assert_close(got, maple.encode_image(pixels))
    assert (got - clip.encode_image(pixels)).abs().max() > 1e-4
