"""Checkpoints from the Hugging Face hub: only the files needed, into the usual cache, resumable.

`HF_HOME` and `HF_HUB_CACHE` say where the cache lies; `HF_HUB_OFFLINE=1` or `MOVIOLA_OFFLINE=1` keep
off the network and use what the cache holds.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from pathlib import Path

from moviola.types import CheckpointError

PREFIX = "hf-hub:"
_ID = re.compile(r"\w[\w.-]{0,95}/\w[\w.-]{0,95}")
_SMALL = (
    "README.md",
    "preprocessor_config.json",
    "processor_config.json",
    "tokenizer_config.json",
    "tokenizer.json",
)
_OPENCLIP_WEIGHTS = ("open_clip_model.safetensors", "open_clip_pytorch_model.bin")
_HF_WEIGHTS = (
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)
OPENAI_TOKENIZER = "openai/clip-vit-base-patch32"
"""Where the tokenizer of a checkpoint with OpenAI's 49408 tokens lies, when its own folder has none."""


def hub_id(source: str) -> str | None:
    """The `owner/name` in a source such as `owner/name` or `hf-hub:owner/name`; None if it is none."""
    name = source.removeprefix(PREFIX)
    return name if _ID.fullmatch(name) and ".." not in name else None


def offline() -> bool:
    """Whether the network is switched off."""
    return any(
        os.environ.get(name, "").strip().upper() in ("1", "ON", "YES", "TRUE")
        for name in ("MOVIOLA_OFFLINE", "HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE")
    )


def fetch(repo: str, revision: str | None = None, *, check: Callable[[Path], None]) -> Path:
    """The snapshot folder of a hub checkpoint, with its configuration, tokenizer and one set of weights.

    `check` sees the configuration file first and raises for a family that is not read, so that no
    gigabytes are downloaded for nothing.
    """
    openclip = _get(repo, "open_clip_config.json", revision)
    if openclip is not None:
        check(openclip)
    weights = _first(repo, _OPENCLIP_WEIGHTS, revision) if openclip else None
    if weights is None:
        native = _get(repo, "moviola.json", revision)
        config = native or _get(repo, "config.json", revision) or openclip
        if config is None:
            raise _not_there(repo, "a config.json, open_clip_config.json or moviola.json")
        check(config)
        weights = _first(repo, ("model.safetensors",) if native else _HF_WEIGHTS, revision)
    if weights is None:
        raise _not_there(repo, "weights in safetensors or .bin")
    if weights.name.endswith(".index.json"):
        from moviola.clip.native import read_json

        places = read_json(weights).get("weight_map", {})
        for shard in sorted(set(places.values())):
            if _get(repo, str(shard), revision) is None:
                raise _not_there(repo, f"the shard {shard}")
    for name in _SMALL:
        _get(repo, name, revision)
    if _get(repo, "tokenizer.json", revision) is None and _get(repo, "vocab.json", revision):
        _get(repo, "merges.txt", revision)
    return weights.parent


def fetch_tokenizer(repo: str = OPENAI_TOKENIZER) -> Path | None:
    """The tokenizer.json of another checkpoint of the hub."""
    return _get(repo, "tokenizer.json", None)


def _first(repo: str, names: tuple[str, ...], revision: str | None) -> Path | None:
    for name in names:
        found = _get(repo, name, revision)
        if found is not None:
            return found
    return None


def _get(repo: str, name: str, revision: str | None) -> Path | None:
    """One file of a hub repository, None where the repository (offline: the cache) has none."""
    import huggingface_hub
    from huggingface_hub import errors

    quiet = offline()
    try:
        path = huggingface_hub.hf_hub_download(repo, name, revision=revision, local_files_only=quiet)
    except errors.LocalEntryNotFoundError as error:
        if quiet:
            return None
        raise CheckpointError(
            f"The hub cannot be reached, and the cache has no {name} of '{repo}'.", hint=_folder_hint(repo)
        ) from error
    except errors.EntryNotFoundError:
        return None
    except errors.GatedRepoError as error:
        raise CheckpointError(
            f"'{repo}' asks for an agreement before it is downloaded.",
            hint=f"Accept it at https://huggingface.co/{repo}, then type: hf auth login",
        ) from error
    except errors.RevisionNotFoundError as error:
        raise CheckpointError(f"'{repo}' has no revision {revision!r}.") from error
    except (errors.RepositoryNotFoundError, errors.HFValidationError) as error:
        raise CheckpointError(
            f"There is no model '{repo}' on the hub, nor a file or folder of that name here."
        ) from error
    except (errors.HfHubHTTPError, errors.OfflineModeIsEnabled, OSError) as error:
        raise CheckpointError(
            f"'{repo}' could not be downloaded ({type(error).__name__}).", hint=_folder_hint(repo)
        ) from error
    return Path(path)


def _not_there(repo: str, what: str) -> CheckpointError:
    if offline():
        return CheckpointError(
            f"The network is switched off and the cache does not hold {what} of '{repo}'.",
            hint=f"Unset MOVIOLA_OFFLINE and HF_HUB_OFFLINE to download it. {_folder_hint(repo)}",
        )
    return CheckpointError(
        f"'{repo}' on the hub has not got {what}; it is not a checkpoint this version reads."
    )


def _folder_hint(repo: str) -> str:
    return (
        f"Or copy a downloaded folder of '{repo}' here and give its path instead "
        "(made elsewhere with: hf download)."
    )
