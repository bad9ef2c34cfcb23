from __future__ import annotations

import json

import numpy as np
import pytest
from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors, trainers

from moviola.clip.foreign_tokenizer import LibraryTokenizer, read_tokenizer
from moviola.clip.native import read_native, write_native
from moviola.clip.tokenizer import Tokenizer
from moviola.types import CheckpointError, Recipe, UsageError

TEXTS = ["um avião no céu", "a plane in the sky", "a ship at sea, very small", "ein Schiff auf dem Meer"]


def unigram(tmp_path, **pads):
    """XLM-R's make: Unigram pieces, <s> and </s> around, <pad> with id 1."""
    backend = Backend(models.Unigram())
    backend.normalizer = normalizers.Sequence([normalizers.NFKC()])
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    backend.decoder = decoders.Metaspace()
    specials = ["<s>", pads.get("pad", "<pad>"), "</s>", "<unk>"]
    trainer = trainers.UnigramTrainer(vocab_size=60, special_tokens=specials, unk_token="<unk>")
    backend.train_from_iterator(TEXTS * 3, trainer)
    backend.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 0), ("</s>", 2)]
    )
    backend.save(str(tmp_path / "tokenizer.json"))
    return tmp_path / "tokenizer.json"


def test_gives_what_transformers_gives(tmp_path):
    transformers = pytest.importorskip("transformers")
    path = unigram(tmp_path)
    ours = LibraryTokenizer.from_file(path, context_length=24)
    theirs = transformers.PreTrainedTokenizerFast(
        tokenizer_file=str(path), bos_token="<s>", eos_token="</s>", pad_token="<pad>"
    )
    wanted = theirs(TEXTS, padding="max_length", max_length=24)["input_ids"]
    np.testing.assert_array_equal(ours(TEXTS), wanted)
    cut = theirs(TEXTS, padding="max_length", max_length=9, truncation=True)["input_ids"]
    with pytest.warns(UserWarning, match="It was cut"):
        np.testing.assert_array_equal(ours.with_context(9)(TEXTS, truncate=True), cut)


def test_the_interface_of_a_tokenizer(tmp_path):
    tokenizer = LibraryTokenizer.from_file(unigram(tmp_path))
    ids_NL = tokenizer(["a ship", ""])
    assert (ids_NL.dtype, ids_NL.shape) == (np.int64, (2, 77))
    assert (tokenizer.start_id, tokenizer.pad_id, tokenizer.end_id) == (0, 1, 2)
    assert ids_NL[1].tolist() == [0, 2] + [1] * 75
    assert ids_NL[0, 1 : 1 + len(tokenizer.encode("a ship"))].tolist() == tokenizer.encode("a ship")
    assert tokenizer.decode(ids_NL[0]) == "a ship"
    assert tokenizer.size == len(json.loads((tmp_path / "tokenizer.json").read_text())["model"]["vocab"])
    np.testing.assert_array_equal(tokenizer("a &amp;amp;  ship"), tokenizer("a & ship"))  # cleaned, case kept
    assert tokenizer.with_context(77) is tokenizer
    assert tokenizer.with_context(9).hash == tokenizer.hash
    with pytest.raises(UsageError, match=r"context holds 4"):
        tokenizer.with_context(4)("a ship at sea")
    with pytest.raises(UsageError, match="must be a string"):
        tokenizer([3])
    with pytest.raises(UsageError, match="at least 2"):
        tokenizer.with_context(1)


def test_a_file_that_names_its_padding_elsewhere_keeps_it(tmp_path):
    path = unigram(tmp_path, pad="<blank>")
    with pytest.raises(CheckpointError, match="pad_token"):
        LibraryTokenizer.from_file(path)
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"pad_token": {"content": "<blank>"}}))
    tokenizer = LibraryTokenizer.from_file(tmp_path)
    assert tokenizer.pad == "<blank>"
    (tmp_path / "kept").mkdir()
    again = read_tokenizer(tokenizer.save(tmp_path / "kept"))
    assert (again.pad_id, again.hash) == (1, tokenizer.hash)
    np.testing.assert_array_equal(again(TEXTS), tokenizer(TEXTS))


def test_a_model_folder_keeps_it_and_notices_another(tmp_path):
    tokenizer = LibraryTokenizer.from_file(unigram(tmp_path), context_length=9)
    recipe = Recipe(tokenizer=tokenizer.hash, context_length=9)
    write_native(
        tmp_path / "model",
        system="rs-m-clip",
        name="m",
        config={},
        recipe=recipe,
        state={},
        tokenizer=tokenizer,
    )
    assert read_native(tmp_path / "model").tokenizer.hash == tokenizer.hash
    stored = tmp_path / "model" / "tokenizer.json"
    content = json.loads(stored.read_text())
    content["model"]["vocab"][-1][1] -= 1.0
    stored.write_text(json.dumps(content))
    with pytest.raises(CheckpointError, match="another tokenizer"):
        read_native(tmp_path / "model")


def test_clips_own_tokenizers_stay_clips(tmp_path):
    tokenizer = Tokenizer.train(TEXTS, vocab_size=600)
    path = tokenizer.save(tmp_path)
    for where in (path, tmp_path):
        made = read_tokenizer(where, context_length=12)
        assert isinstance(made, Tokenizer)
        assert (made.hash, made.context_length, made.pad_id) == (tokenizer.hash, 12, 0)


def test_wordpiece_with_bert_marks(tmp_path):
    vocab = {w: n for n, w in enumerate(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "a", "ship", "##s"])}
    backend = Backend(models.WordPiece(vocab, unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    backend.post_processor = processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    backend.save(str(tmp_path / "tokenizer.json"))
    made = read_tokenizer(tmp_path, context_length=6)
    assert made("a ships").tolist() == [[2, 4, 5, 6, 3, 0]]


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("[]", "no model"),
        ('{"model": {"type": "Unigram", "vocab": 3}}', "not a file of the tokenizers library"),
        ('{"model": ', "not valid JSON"),
    ],
)
def test_broken_files(tmp_path, content, said):
    (tmp_path / "tokenizer.json").write_text(content)
    with pytest.raises(CheckpointError, match=said):
        LibraryTokenizer.from_file(tmp_path)


def test_files_without_marks_or_not_there(tmp_path):
    path = unigram(tmp_path)
    content = json.loads(path.read_text())
    path.write_text(json.dumps({**content, "post_processor": None}))
    with pytest.raises(CheckpointError, match="open and close"):
        read_tokenizer(path)
    content["post_processor"]["single"][0]["SpecialToken"]["id"] = "<gone>"
    content["post_processor"]["special_tokens"]["<gone>"] = {"id": "<gone>", "ids": [0], "tokens": ["<gone>"]}
    path.write_text(json.dumps(content))
    with pytest.raises(CheckpointError, match="vocabulary lacks"):
        read_tokenizer(path)
    with pytest.raises(CheckpointError, match="no tokenizer file"):
        LibraryTokenizer.from_file(tmp_path / "nothing.json")
