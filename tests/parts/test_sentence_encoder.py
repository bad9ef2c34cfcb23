"""Sentence encoders from folders, against `transformers` itself; the models are made on the spot."""

from __future__ import annotations

import json
import sys

import numpy as np
import pytest
import torch

from moviola.parts.sentence_encoder import SentenceEncoder, is_text_model
from moviola.types import CheckpointError, MissingExtra, UsageError

transformers = pytest.importorskip("transformers")
WORDS = ["a", "man", "rides", "the", "horse", "swims", "."]
TEXTS = ["a man rides the horse .", "a man swims", "the horse"]


def tiny_bert(folder, words):
    """A random BERT of these words, saved as `transformers` does."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors

    known = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", *words]
    config = transformers.BertConfig(
        vocab_size=len(known),
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=32,
        max_position_embeddings=12,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        transformers.BertModel(config).save_pretrained(folder)
    numbers = {word: n for n, word in enumerate(known)}
    made = Tokenizer(models.WordLevel(numbers, unk_token="[UNK]"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    made.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    fast = transformers.PreTrainedTokenizerFast(
        tokenizer_object=made, pad_token="[PAD]", unk_token="[UNK]", cls_token="[CLS]", sep_token="[SEP]"
    )
    fast.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny_bert(tmp_path_factory.mktemp("bert"), WORDS)


def with_parts(folder, tmp_path, pooling, *, normalize=False, most=None, extra=None):
    """The folder with the files of sentence-transformers around it."""
    made = tmp_path / "model"
    made.mkdir()
    for path in folder.iterdir():
        (made / path.name).symlink_to(path)
    parts = [("", "Transformer"), ("1_Pooling", "Pooling")]
    parts += [("2_Normalize", "Normalize")] * normalize + ([("3_More", extra)] if extra else [])
    named = [{"path": path, "type": f"sentence_transformers.models.{kind}"} for path, kind in parts]
    (made / "modules.json").write_text(json.dumps(named))
    (made / "1_Pooling").mkdir()
    (made / "1_Pooling" / "config.json").write_text(json.dumps(pooling))
    if most is not None:
        (made / "sentence_bert_config.json").write_text(json.dumps({"max_seq_length": most}))
    return made


def reference(folder, text):
    """hidden_LD of one text by the library, without padding."""
    model = transformers.AutoModel.from_pretrained(folder).eval()
    tokens = transformers.AutoTokenizer.from_pretrained(folder)(text, return_tensors="pt")
    with torch.inference_mode():
        return model(**tokens).last_hidden_state[0].numpy()


def test_the_mean_over_tokens_without_padding(folder):
    vector_ND = SentenceEncoder(folder)(TEXTS)
    assert vector_ND.dtype == np.float32
    for text, vector_D in zip(TEXTS, vector_ND):
        np.testing.assert_allclose(vector_D, reference(folder, text).mean(0), atol=1e-6)
    np.testing.assert_allclose(SentenceEncoder(folder, batch_size=1)(TEXTS), vector_ND, atol=1e-6)
    assert SentenceEncoder(folder)([]).shape == (0, 16)


@pytest.mark.parametrize(
    ("mode", "pooled"),
    [
        ("cls_token", lambda x_LD: x_LD[0]),
        ("max_tokens", lambda x_LD: x_LD.max(0)),
        ("mean_sqrt_len_tokens", lambda x_LD: x_LD.sum(0) / np.sqrt(len(x_LD))),
    ],
)
def test_the_folder_names_the_pooling(folder, tmp_path, mode, pooled):
    asked = {f"pooling_mode_{mode}": True, "pooling_mode_mean_tokens": False, "word_embedding_dimension": 16}
    vector_ND = SentenceEncoder(with_parts(folder, tmp_path, asked))(TEXTS)
    for text, vector_D in zip(TEXTS, vector_ND):
        np.testing.assert_allclose(vector_D, pooled(reference(folder, text)), atol=1e-6)


def test_several_poolings_and_unit_vectors(folder, tmp_path):
    asked = {"pooling_mode_cls_token": True, "pooling_mode_mean_tokens": True}
    vector_ND = SentenceEncoder(with_parts(folder, tmp_path, asked, normalize=True))(TEXTS)
    x_LD = reference(folder, TEXTS[0])
    wanted_D = np.concatenate([x_LD[0], x_LD.mean(0)])
    np.testing.assert_allclose(vector_ND[0], wanted_D / np.linalg.norm(wanted_D), atol=1e-6)


def test_long_texts_are_cut_and_said(folder, tmp_path):
    made = with_parts(folder, tmp_path, {"pooling_mode_mean_tokens": True}, most=5)
    with pytest.warns(UserWarning, match="8 tokens, the sentence encoder takes 5: 'a man rides.* It was cut"):
        long = SentenceEncoder(made)(TEXTS[:1])
    np.testing.assert_allclose(long, SentenceEncoder(made)(["a man rides"]), atol=1e-6)
    assert SentenceEncoder(folder).most_tokens == 12


def test_what_is_a_text_model(folder, tmp_path):
    assert is_text_model(folder)
    assert not is_text_model(tmp_path / "none")
    (tmp_path / "config.json").write_text('{"model_type": "clip", "vision_config": {}}')
    assert not is_text_model(tmp_path)
    (tmp_path / "moviola.json").write_text("{}")
    (tmp_path / "modules.json").write_text("[]")
    assert not is_text_model(tmp_path)


def test_randomness_is_left_alone(folder):
    torch.manual_seed(3)
    before = torch.get_rng_state()
    SentenceEncoder(folder)(TEXTS)
    assert torch.equal(torch.get_rng_state(), before)


def test_bad_folders(folder, tmp_path, monkeypatch):
    from safetensors.torch import load_file, save_file

    with pytest.raises(CheckpointError, match="part 'Dense' behind"):
        SentenceEncoder(with_parts(folder, tmp_path, {"pooling_mode_mean_tokens": True}, extra="Dense"))
    other = tmp_path / "other"
    other.mkdir()
    with pytest.raises(CheckpointError, match="asks for pooling_mode_lasttoken"):
        SentenceEncoder(with_parts(folder, other, {"pooling_mode_lasttoken": True}))
    bare = tmp_path / "bare"
    bare.mkdir()
    (bare / "config.json").write_text((folder / "config.json").read_text())
    with pytest.raises(CheckpointError, match=r"no weights in safetensors.*save_pretrained"):
        SentenceEncoder(bare)
    state = load_file(folder / "model.safetensors")
    state.pop("encoder.layer.0.attention.self.query.weight")
    save_file(state, bare / "model.safetensors", metadata={"format": "pt"})
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (bare / name).write_text((folder / name).read_text())
    with pytest.raises(CheckpointError, match=r"lacks 1 of the model's weights: encoder\.layer\.0"):
        SentenceEncoder(bare)
    (bare / "config.json").write_text('{"model_type": "nothing known"}')
    with pytest.raises(CheckpointError, match="no text model that transformers reads"):
        SentenceEncoder(bare)
    with pytest.raises(UsageError, match="batch size"):
        SentenceEncoder(folder, batch_size=0)
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(MissingExtra, match="'transformers'"):
        SentenceEncoder(folder)
