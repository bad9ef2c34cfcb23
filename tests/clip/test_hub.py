"""Hub ids, with the download function replaced: no test reaches the network."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import huggingface_hub
import numpy as np
import pytest
from huggingface_hub import errors

from moviola.clip import hub
from moviola.clip.formats import describe, export
from moviola.clip.loaded import Model, load
from moviola.clip.tokenizer import Tokenizer
from moviola.types import CheckpointError

Make = Callable[..., Model]


class FakeHub:
    """Serves files of local folders by repository; remembers what was asked for."""

    def __init__(self, folders: dict[str, Path], cache: Path) -> None:
        self.folders, self.cache = folders, cache
        self.got: list[str] = []
        self.raises: Exception | None = None
        self.revisions: set[str | None] = set()

    def __call__(
        self, repo: str, name: str, *, revision: str | None = None, local_files_only: bool = False
    ) -> str:
        self.revisions.add(revision)
        target = self.cache / repo.replace("/", "--") / name
        if local_files_only:
            if target.is_file():
                return str(target)
            raise errors.LocalEntryNotFoundError("not in the cache")
        if self.raises is not None:
            raise self.raises
        source = self.folders.get(repo, Path("/nonexistent")) / name
        if not source.is_file():
            raise errors.EntryNotFoundError(f"no {name}")
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(source, target)
        self.got.append(name)
        return str(target)


@pytest.fixture
def served(make_model: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> FakeHub:
    for name in ("MOVIOLA_OFFLINE", "HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE"):
        monkeypatch.delenv(name, raising=False)
    model = make_model("vit")
    folders = {
        "some/hf": export(model, tmp_path / "hf", "hf"),
        "some/openclip": export(model, tmp_path / "openclip", "openclip"),
        "some/native": model.save(tmp_path / "native"),
    }
    for folder in folders.values():
        (folder / "README.md").write_text("---\nlicense: apache-2.0\n---\n")
        (folder / "training_log.txt").write_text("not needed")
        (folder / "pytorch_model.bin").write_bytes(b"not needed")
    fake = FakeHub(folders, tmp_path / "cache")
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", fake)
    return fake


@pytest.mark.parametrize("source", ["some/hf", "some/openclip", "some/native", "hf-hub:some/openclip"])
def test_a_hub_id_loads_with_only_the_files_needed(source: str, served: FakeHub, make_model: Make) -> None:
    model = load(source, device="cpu", revision="v1")
    assert model.hash == make_model("vit").hash
    np.testing.assert_array_equal(model.embed_texts(["a cat"]), make_model("vit").embed_texts(["a cat"]))
    assert served.revisions == {"v1"}
    assert "training_log.txt" not in served.got
    assert "pytorch_model.bin" not in served.got
    if "native" not in source:
        assert model.name == source.removeprefix("hf-hub:")
        assert describe(model)["licence"] == "apache-2.0"


def test_sharded_weights_are_all_fetched(served: FakeHub) -> None:
    from safetensors.torch import load_file, save_file

    folder = served.folders["some/hf"]
    state = load_file(folder / "model.safetensors")
    names = list(state)
    for n in range(3):
        save_file({k: state[k] for k in names[n::3]}, folder / f"model-{n}.safetensors")
    places = {k: f"model-{i % 3}.safetensors" for i, k in enumerate(names)}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": places}))
    (folder / "model.safetensors").unlink()
    load("some/hf", device="cpu")
    assert {f"model-{n}.safetensors" for n in range(3)} <= set(served.got)


def test_another_family_is_refused_before_its_weights_are_downloaded(served: FakeHub, tmp_path: Path) -> None:
    folder = served.folders["some/siglip"] = tmp_path / "siglip"
    folder.mkdir()
    (folder / "config.json").write_text('{"model_type": "siglip"}')
    (folder / "model.safetensors").write_bytes(b"gigabytes")
    with pytest.raises(CheckpointError, match="SigLIP"):
        load("some/siglip")
    assert served.got == ["config.json"]


def test_a_checkpoint_with_openais_tokens_borrows_its_tokenizer(
    served: FakeHub,
    make_model: Make,
    toy_tokenizer: Tokenizer,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    served.folders["some/bare"] = export(make_model(tokenizer=None), tmp_path / "bare", "openclip")
    neighbour = served.folders[hub.OPENAI_TOKENIZER] = tmp_path / "neighbour"
    neighbour.mkdir()
    toy_tokenizer.save(neighbour)
    assert load("some/bare", device="cpu").tokenizer is None  # 620 tokens are not OpenAI's
    monkeypatch.setattr("moviola.clip.formats._OPENAI_TOKENS", toy_tokenizer.size)
    loaded = load("some/bare", device="cpu")
    assert loaded.tokenizer is not None
    assert loaded.tokenizer.hash == toy_tokenizer.hash


@pytest.mark.parametrize("switch", ["MOVIOLA_OFFLINE", "HF_HUB_OFFLINE"])
def test_offline_says_so_at_once_and_uses_the_cache(
    switch: str, served: FakeHub, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(switch, "1")
    with pytest.raises(
        CheckpointError, match=r"network is switched off.*copy a downloaded folder of 'some/hf'"
    ):
        load("some/hf")
    assert served.got == []
    monkeypatch.delenv(switch)
    online = load("some/hf", device="cpu")
    count = len(served.got)
    monkeypatch.setenv(switch, "1")
    assert load("some/hf", device="cpu").hash == online.hash
    assert len(served.got) == count


def test_the_real_client_offline_gives_our_error_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import time

    monkeypatch.setenv("MOVIOLA_OFFLINE", "1")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    start = time.perf_counter()
    with pytest.raises(CheckpointError, match="Unset MOVIOLA_OFFLINE"):
        load("openai/clip-vit-base-patch32")
    assert time.perf_counter() - start < 2


def response_error(kind: type) -> Exception:
    """One of the hub client's errors, without the response it usually carries."""
    error = kind.__new__(kind)
    Exception.__init__(error, "from the hub")
    return error


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        (errors.RepositoryNotFoundError, "no model 'some/hf' on the hub"),
        (errors.GatedRepoError, r"asks for an agreement.*hf auth login"),
        (errors.RevisionNotFoundError, "no revision 'v2'"),
        (errors.LocalEntryNotFoundError, r"cannot be reached.*give its path instead"),
        (errors.HfHubHTTPError, "could not be downloaded"),
        (errors.HFValidationError, "no model 'some/hf'"),
        (ConnectionError, "could not be downloaded"),
    ],
)
def test_hub_errors_become_ours(kind: type, message: str, served: FakeHub) -> None:
    served.raises = response_error(kind)
    with pytest.raises(CheckpointError, match=message):
        load("some/hf", revision="v2")


def test_what_a_repository_lacks_is_named(served: FakeHub, tmp_path: Path) -> None:
    folder = served.folders["some/empty"] = tmp_path / "empty"
    folder.mkdir()
    with pytest.raises(CheckpointError, match=r"has not got a config\.json"):
        load("some/empty")
    (folder / "config.json").write_text('{"model_type": "clip"}')
    with pytest.raises(CheckpointError, match="has not got weights"):
        load("some/empty")


def test_only_owner_slash_name_is_a_hub_id(tmp_path: Path) -> None:
    assert hub.hub_id("openai/clip-vit-base-patch32") == "openai/clip-vit-base-patch32"
    assert hub.hub_id("hf-hub:laion/x") == "laion/x"
    for other in ("clip", "a/b/c", "../x", "/abs/path", "a b/c", "", "./x"):
        assert hub.hub_id(other) is None, other
    with pytest.raises(CheckpointError, match="Give 'builtin', a folder"):
        load(tmp_path / "nothing")
    with pytest.raises(CheckpointError, match="There is no model at clip"):
        load("clip")
