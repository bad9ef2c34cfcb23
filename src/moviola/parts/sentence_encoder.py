"""Sentence encoders of the `transformers` library, from a folder on the disk: texts to vectors.

The folder is a sentence-transformers model (`modules.json`, `1_Pooling`) or a plain text transformer
(`config.json`, weights in safetensors, a tokenizer), of which the mean over tokens is taken. Needs the
extra `hf`; nothing is downloaded and no code of the folder is run.

Axis letters: N texts, L tokens, D width.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from moviola.clip.native import read_json
from moviola.types import CheckpointError, MissingExtra, UsageError, printable

_POOLINGS = {
    "pooling_mode_cls_token": "first",
    "pooling_mode_mean_tokens": "mean",
    "pooling_mode_max_tokens": "max",
    "pooling_mode_mean_sqrt_len_tokens": "mean_sqrt",
}
_MOST_TOKENS = 512


def is_text_model(folder: str | Path) -> bool:
    """Whether the folder holds a text model of `transformers`, rather than a model of pictures and texts."""
    folder = Path(folder)
    if any((folder / name).is_file() for name in ("moviola.json", "open_clip_config.json")):
        return False
    if (folder / "modules.json").is_file():
        return True
    if not (folder / "config.json").is_file():
        return False
    config = read_json(folder / "config.json")
    return "vision_config" not in config and "clip" not in str(config.get("model_type"))


@contextmanager
def quiet_loading() -> Iterator[None]:
    """Inside, `transformers` shows no progress of reading weights."""
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()


class SentenceEncoder:
    """Texts to vectors_ND, float32, by a text transformer and the pooling that its folder names.

    Texts of more tokens than the model takes are cut, with a warning for each. `MissingExtra` without
    `transformers`; `CheckpointError` where files are missing, of another kind, or do not hold all weights.
    """

    def __init__(self, folder: str | Path, *, device: str = "cpu", batch_size: int = 64) -> None:
        try:
            from transformers import AutoModel, AutoTokenizer
        except ImportError as error:
            raise MissingExtra("transformers", "hf") from error
        if batch_size < 1:
            raise UsageError(f"The batch size must be at least 1, got {batch_size}.")
        self.folder, self.batch_size = Path(folder), batch_size
        self.name = self.folder.resolve().name
        inner, self.poolings, self.normalize, limit = _modules(self.folder)
        if not any(inner.glob("*.safetensors")):
            raise CheckpointError(
                f"{printable(inner)} has no weights in safetensors.",
                hint="Save it once more by save_pretrained; other formats could run code and are not read.",
            )
        local: dict[str, Any] = {"local_files_only": True, "trust_remote_code": False}
        try:
            # the library draws weights that the file lacks before it says so
            with quiet_loading(), torch.random.fork_rng(devices=[]):
                model, report = AutoModel.from_pretrained(
                    inner, use_safetensors=True, output_loading_info=True, dtype=torch.float32, **local
                )
            self.tokenizer: Any = AutoTokenizer.from_pretrained(inner, **local)
        except (OSError, ValueError, KeyError, RuntimeError) as error:
            raise CheckpointError(
                f"{printable(inner)} is no text model that transformers reads ({error})."
            ) from error
        # the library's own pooling head is not used here
        missing = sorted(name for name in report["missing_keys"] if "pooler." not in name)
        if missing:
            raise CheckpointError(
                f"{printable(inner)} lacks {len(missing)} of the model's weights: {', '.join(missing[:5])}."
            )
        self.model = model.to(device).eval()
        self.device = torch.device(device)
        positions = int(getattr(model.config, "max_position_embeddings", 0) or _MOST_TOKENS)
        most = positions - _positions_taken(model.config)
        self.most_tokens = min(limit or most, most)

    @torch.inference_mode()
    def __call__(self, texts: Sequence[str]) -> np.ndarray:
        """vectors_ND of any number of texts; those of like length run together."""
        texts = list(texts)
        rows: list[list[int]] = self.tokenizer(texts, verbose=False)["input_ids"] if texts else []
        for text, row in zip(texts, rows, strict=True):
            if len(row) > self.most_tokens:
                said = f"{len(row)} tokens, the sentence encoder takes {self.most_tokens}: {text[:60]!r}..."
                warnings.warn(f"A text has {said}. It was cut.", stacklevel=2)
        order_N = np.argsort([len(row) for row in rows], kind="stable")
        vector_ND = np.zeros((len(texts), self.width), np.float32)
        for start in range(0, len(texts), self.batch_size):
            some = order_N[start : start + self.batch_size]
            tokens = self.tokenizer(
                [texts[n] for n in some],
                padding=True,
                truncation=True,
                max_length=self.most_tokens,
                return_tensors="pt",
            ).to(self.device)
            hidden_NLD = self.model(**tokens).last_hidden_state.float()
            vector_ND[some] = self._pool(hidden_NLD, tokens["attention_mask"]).cpu().numpy()
        return vector_ND

    @property
    def width(self) -> int:
        return int(self.model.config.hidden_size) * len(self.poolings)

    def _pool(self, x_NLD: Tensor, mask_NL: Tensor) -> Tensor:
        real_NL1 = mask_NL.unsqueeze(-1).bool()
        count_N1 = real_NL1.sum(1).clamp(min=1)
        sum_ND = x_NLD.masked_fill(~real_NL1, 0).sum(1)
        ways = {
            "first": lambda: x_NLD[:, 0],
            "mean": lambda: sum_ND / count_N1,
            "max": lambda: x_NLD.masked_fill(~real_NL1, -torch.inf).amax(1),
            "mean_sqrt": lambda: sum_ND / count_N1.sqrt(),
        }
        pooled_ND = torch.cat([ways[pooling]() for pooling in self.poolings], dim=-1)
        return torch.nn.functional.normalize(pooled_ND, dim=-1) if self.normalize else pooled_ND


def _positions_taken(config: Any) -> int:
    """Rows of the position table before a text's first: RoBERTa's kind counts from behind the padding's."""
    kinds = ("roberta", "xlm-roberta", "camembert", "mpnet", "longformer")
    return int(config.pad_token_id) + 1 if config.model_type in kinds else 0


def _modules(folder: Path) -> tuple[Path, tuple[str, ...], bool, int | None]:
    """Of a folder: where the transformer lies, poolings, whether vectors are made unit, the most tokens."""
    inner, normalize = folder, False
    poolings: tuple[str, ...] = ("mean",)
    if (folder / "modules.json").is_file():
        modules = read_json(folder / "modules.json")
        if not isinstance(modules, list) or not all({"type", "path"} <= set(one) for one in modules):
            raise CheckpointError(f"{printable(folder / 'modules.json')} does not list a model's parts.")
        for module in modules:
            kind, place = str(module["type"]).rpartition(".")[2], folder / str(module["path"])
            if kind == "Transformer":
                inner = place
            elif kind == "Pooling":
                poolings = _poolings(place / "config.json")
            elif kind == "Normalize":
                normalize = True
            else:
                raise CheckpointError(
                    f"{printable(folder)} has a part {kind!r} behind its transformer, which is not read.",
                    hint="Use a sentence encoder of a transformer, pooling and normalisation.",
                )
    elif (folder / "1_Pooling" / "config.json").is_file():
        poolings = _poolings(folder / "1_Pooling" / "config.json")
    limits = inner / "sentence_bert_config.json"
    most = read_json(limits).get("max_seq_length") if limits.is_file() else None
    return inner, poolings, normalize, None if most is None else int(most)


def _poolings(path: Path) -> tuple[str, ...]:
    asked = [key for key, value in read_json(path).items() if key.startswith("pooling_mode_") and value]
    unknown = [key for key in asked if key not in _POOLINGS]
    if unknown or not asked:
        raise CheckpointError(
            f"{printable(path)} asks for {', '.join(unknown) or 'no pooling'}, expected one of "
            f"{', '.join(_POOLINGS)}."
        )
    return tuple(_POOLINGS[key] for key in _POOLINGS if key in asked)
