"""A model ready for use: the encoder with its tokenizer, recipe and device. Arrays go in and come out.

Axis letters: N texts or pictures, M videos, T frames, C classes or channels, H height, W width,
D embedding width, L text length.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import Any, Literal, TypeVar, cast

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from moviola.clip.config import ClipConfig
from moviola.clip.foreign_tokenizer import AnyTokenizer
from moviola.clip.model import CLIP, mean_of_frames
from moviola.clip.native import Native, assign, write_native
from moviola.clip.preprocess import Preprocess
from moviola.clip.sample import choose_frames
from moviola.clip.tokenizer import Tokenizer
from moviola.types import CheckpointError, ClipBatch, Dtype, Encoder, FrameSpec, Recipe, Refusal, UsageError

Item = TypeVar("Item")
Device = str | torch.device

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def choose_device(device: Device = "auto") -> torch.device:
    """`auto` takes CUDA, then Apple's MPS, then the CPU; a device that is not there raises."""
    name = str(device)
    if name == "auto":
        if torch.cuda.is_available():
            return torch.device("cuda")
        return torch.device("mps" if torch.backends.mps.is_available() else "cpu")
    kind, _, index = name.partition(":")
    if kind not in ("cpu", "cuda", "mps") or (index and not index.isdigit()):
        raise UsageError(f"There is no device {name!r}.", hint="Use auto, cpu, cuda, cuda:N or mps.")
    if kind == "cuda" and not torch.cuda.is_available():
        raise UsageError("No CUDA device is usable here.", hint="Use --device cpu, or install a CUDA torch.")
    if kind == "cuda" and index and int(index) >= torch.cuda.device_count():
        raise UsageError(f"There is no device {name!r}: {torch.cuda.device_count()} CUDA devices are here.")
    if kind == "mps" and not torch.backends.mps.is_available():
        raise UsageError("Apple's MPS is not usable here.", hint="Use --device cpu.")
    return torch.device(name)


def choose_dtype(dtype: Dtype | torch.dtype | None, device: torch.device) -> torch.dtype:
    """float32 unless told otherwise; half precision on the CPU is refused in favour of bfloat16."""
    chosen = dtype if isinstance(dtype, torch.dtype) else _DTYPES.get(dtype or "float32")
    if chosen not in _DTYPES.values():
        raise UsageError(f"There is no dtype {dtype!r}.", hint="Use float32, bfloat16 or float16.")
    if chosen == torch.float16 and device.type == "cpu":
        raise UsageError(
            "float16 is slow and overflows on the CPU.", hint="Use --dtype bfloat16 or float32 there."
        )
    return cast(torch.dtype, chosen)


def hash_weights(state: Mapping[str, Tensor], config: Mapping[str, Any]) -> str:
    """16 hex digits over the float32 values and the configuration.

    Equal weights give equal hashes whatever format or precision held them; counters are left out.
    """
    digest = hashlib.sha256(json.dumps(config, sort_keys=True).encode())
    for key in sorted(state):
        if key.endswith("num_batches_tracked"):
            continue
        tensor = state[key].detach().cpu().float().contiguous()
        digest.update(f"{key}{tuple(tensor.shape)}".encode())
        digest.update(tensor.numpy().data)
    return digest.hexdigest()[:16]


def to_channels_last(module: nn.Module) -> None:
    """Lay out the weights of 2-D convolutions channels last; others (of clips, say) stay as they are."""
    for parameter in module.parameters():
        if parameter.ndim == 4:
            parameter.data = parameter.data.to(memory_format=torch.channels_last)


class Model:
    """An encoder of any system, ready to embed. No gradients: train `module` itself instead.

    Vectors are float32 rows of length one unless `normalize=False`. `hash` names the weights as they
    were loaded, so it does not change with `dtype`. `source` is what `moviola.load` was asked for.
    """

    source: str | None = None

    def __init__(
        self,
        module: nn.Module,
        *,
        config: Mapping[str, Any],
        recipe: Recipe | None = None,
        tokenizer: AnyTokenizer | None = None,
        name: str = "model",
        system: str = "clip",
        device: Device = "auto",
        dtype: Dtype | torch.dtype | None = None,
        licence: str | None = None,
        base: Mapping[str, Any] | None = None,
        classes: Sequence[str] | None = None,
        hash: str | None = None,
        format: str = "native",
    ) -> None:
        self.name, self.system, self.format = name, system, format
        self.config = dict(config)
        self.licence = licence
        self.base = None if base is None else dict(base)
        self.classes = None if classes is None else list(classes)
        self.device = choose_device(device)
        self.dtype = choose_dtype(dtype, self.device)
        self.hash = hash or hash_weights(module.state_dict(), self.config)
        self.module = module.eval().to(self.device, self.dtype)
        self._encoder = cast(Encoder, module)
        self.tokenizer = self._fit(tokenizer)
        recipe = recipe or _recipe_of(module)
        self.recipe = replace(
            recipe,
            sampler=self._encoder.frame_spec,
            tokenizer=None if self.tokenizer is None else self.tokenizer.hash,
            context_length=self._encoder.context_length,
        )
        self.preprocess = Preprocess(self.recipe)
        visual = getattr(module, "visual", None)
        self._channels_last = any(isinstance(m, nn.BatchNorm2d) for m in (visual or module).modules())
        if self._channels_last:  # RN50 ran 1.08 times as fast so on one core; a plain ViT gains nothing
            to_channels_last(self.module)

    def _fit(self, tokenizer: AnyTokenizer | None) -> AnyTokenizer | None:
        if tokenizer is None or not self._encoder.has_text:
            return None
        tokenizer = tokenizer.with_context(self._encoder.context_length)
        table = getattr(self.module, "token_embedding", None)
        text = getattr(self.module, "text_config", None)
        if isinstance(table, nn.Embedding) and tokenizer.size > table.num_embeddings:
            raise CheckpointError(
                f"The tokenizer has ids up to {tokenizer.size - 1}, "
                f"the text tower knows {table.num_embeddings} tokens.",
                hint="Give the tokenizer that belongs to this checkpoint.",
            )
        pad_id = getattr(self.module, "pad_id", 0)
        if tokenizer.pad_id != pad_id:
            raise CheckpointError(
                f"The tokenizer fills short texts up with id {tokenizer.pad_id}, "
                f"the text tower takes id {pad_id} as padding.",
                hint="Give the tokenizer that belongs to this checkpoint.",
            )
        if text is not None and text.eot_id is None and tokenizer.end_id != tokenizer.size - 1:
            raise CheckpointError(
                f"The text tower pools at the largest id, but the tokenizer's end id is {tokenizer.end_id} "
                f"of {tokenizer.size}.",
                hint="Give the tokenizer that belongs to this checkpoint.",
            )
        if text is not None and text.eot_id is not None and tokenizer.end_id != text.eot_id:
            raise CheckpointError(
                f"The text tower pools at id {text.eot_id}, the tokenizer ends with {tokenizer.end_id}.",
                hint="Give the tokenizer that belongs to this checkpoint.",
            )
        return tokenizer

    def around(self, module: nn.Module, **changes: Any) -> Model:
        """Another module with the recipe, words and origin of this one, on the CPU, but for `changes`."""
        given: dict[str, Any] = {
            "config": cast(Any, module).config.to_json(),
            "recipe": self.recipe,
            "tokenizer": self.tokenizer,
            "name": self.name,
            "system": self.system,
            "device": "cpu",
            "licence": self.licence,
            "base": self.base,
            **changes,
        }
        return Model(module, **given)

    # ------------------------------------------------------------------------- what it delegates

    @property
    def dim(self) -> int:
        return self._encoder.dim

    @property
    def has_text(self) -> bool:
        return self._encoder.has_text

    @property
    def separable(self) -> bool:
        return self._encoder.separable

    @property
    def adaptation(self) -> Literal["none", "embedding", "classifier"]:
        return self._encoder.adaptation

    @property
    def frame_spec(self) -> FrameSpec:
        return self._encoder.frame_spec

    @property
    def logit_scale(self) -> float:
        """The factor from cosine to logit (100 in most released checkpoints); 1 where there is none."""
        scale = getattr(self.module, "logit_scale", None)
        return 1.0 if scale is None else float(scale.detach().float().exp())

    @cached_property
    def parameters(self) -> int:
        return sum(p.numel() for p in self.module.parameters())

    # ----------------------------------------------------------------------------------- pictures

    def embed_pictures(
        self, pictures: Iterable[Image.Image], *, batch_size: int = 32, normalize: bool = True
    ) -> np.ndarray:
        """Pillow pictures of any size and mode to vectors_ND, through the exact preprocessing."""
        return self._gather(
            (
                self._encode_pixels(self.preprocess.pictures(chunk))
                for chunk in _batches(pictures, batch_size)
            ),
            normalize,
        )

    def embed_frames(
        self, frames_THWC: np.ndarray, *, batch_size: int = 32, normalize: bool = True
    ) -> np.ndarray:
        """uint8 RGB frames of one size to vectors_TD, through the fast preprocessing."""
        _check_batch(batch_size)
        frames_THWC = np.asarray(frames_THWC)
        starts = range(0, max(1, len(frames_THWC)), batch_size)
        return self._gather(
            (self._encode_pixels(self._frames(frames_THWC[s : s + batch_size])) for s in starts), normalize
        )

    def _frames(self, frames_THWC: np.ndarray) -> Tensor:
        return self.preprocess.frames(frames_THWC, self.device)

    @torch.inference_mode()
    def _encode_pixels(self, pixels_NCHW: Tensor) -> Tensor:
        if len(pixels_NCHW) == 0:
            return torch.empty(0, self.dim)
        return self._encoder.encode_image(self._place(pixels_NCHW))

    def _place(self, pixels_NCHW: Tensor) -> Tensor:
        layout = torch.channels_last if self._channels_last else torch.contiguous_format
        return pixels_NCHW.to(self.device, self.dtype, memory_format=layout)

    # -------------------------------------------------------------------------------------- clips

    @torch.inference_mode()
    def embed_clips(
        self,
        clips: Iterable[tuple[np.ndarray, np.ndarray]],
        *,
        batch_size: int = 8,
        normalize: bool = True,
    ) -> np.ndarray:
        """Clips, each (uint8 frames_THWC, seconds times_T), to one vector each: vectors_MD.

        The model's `frame_spec` chooses among the frames given. A non-separable model gives its
        query-free vector, good for shortlists; `encode_clips` gives what `score` needs.
        """
        return self._gather(
            (self._encoder.pool(*self._encode_batch(chunk)) for chunk in _batches(clips, batch_size)),
            normalize,
        )

    @torch.inference_mode()
    def encode_clips(
        self, clips: Iterable[tuple[np.ndarray, np.ndarray]], *, batch_size: int = 8
    ) -> tuple[np.ndarray, np.ndarray]:
        """Clips to what `score` takes, not normalised: video_MD or video_MTD, and mask_MT."""
        videos, masks = [], []
        for chunk in _batches(clips, batch_size):
            video, mask_MT = self._encode_batch(chunk)
            videos.append(video.float().cpu().numpy())
            masks.append(mask_MT.cpu().numpy())
        if not videos:
            return np.empty((0, self.dim), np.float32), np.empty((0, 0), bool)
        if videos[0].ndim == 3:
            longest = max(v.shape[1] for v in videos)
            videos = [np.pad(v, ((0, 0), (0, longest - v.shape[1]), (0, 0))) for v in videos]
        longest = max(m.shape[1] for m in masks)
        masks = [np.pad(m, ((0, 0), (0, longest - m.shape[1]))) for m in masks]
        return np.concatenate(videos), np.concatenate(masks)

    def _encode_batch(self, clips: Sequence[tuple[np.ndarray, np.ndarray]]) -> tuple[Tensor, Tensor]:
        batch = self.clip_batch(clips)
        return self._encoder.encode_video(batch), batch.mask_BT

    def clip_batch(self, clips: Sequence[tuple[np.ndarray, np.ndarray]]) -> ClipBatch:
        """Clips as the module takes them, on its device; shorter ones padded with masked zeros."""
        chosen = []
        for frames_THWC, times_T in clips:
            if len(frames_THWC) != len(times_T):
                raise UsageError(f"A clip has {len(frames_THWC)} frames but {len(times_T)} times.")
            index_K, mask_K = choose_frames(self.frame_spec, times_T)
            chosen.append((self._frames(frames_THWC[index_K]), np.asarray(times_T)[index_K], mask_K))
        count = max(len(mask_K) for _, _, mask_K in chosen)
        first = chosen[0][0]
        frames_BTCHW = first.new_zeros(len(chosen), count, *first.shape[1:])
        times_BT = torch.zeros(len(chosen), count)
        mask_BT = torch.zeros(len(chosen), count, dtype=torch.bool)
        for row, (pixels_KCHW, times_K, mask_K) in enumerate(chosen):
            valid_K = torch.from_numpy(mask_K)
            kept = len(mask_K)
            frames_BTCHW[row, :kept] = pixels_KCHW * valid_K.to(pixels_KCHW.device)[:, None, None, None]
            times_BT[row, :kept] = torch.from_numpy(np.asarray(times_K, dtype=np.float32))
            mask_BT[row, :kept] = valid_K
        return ClipBatch(frames_BTCHW, times_BT, mask_BT).to(self.device, self.dtype)

    # --------------------------------------------------------------------------------- classifiers

    @torch.inference_mode()
    def classify_pictures(self, pictures: Iterable[Image.Image], *, batch_size: int = 32) -> np.ndarray:
        """Logits_NC of Pillow pictures over `classes`, by a classifier of the model's own.

        Raises `Refusal` for models that compare with words instead.
        """
        module = self._classifier()
        pixels = (self._place(self.preprocess.pictures(chunk)) for chunk in _batches(pictures, batch_size))
        return self._logits(module.classify_image(pixels_NCHW) for pixels_NCHW in pixels)

    @torch.inference_mode()
    def classify_clips(
        self, clips: Iterable[tuple[np.ndarray, np.ndarray]], *, batch_size: int = 8
    ) -> np.ndarray:
        """Logits_MC of clips, each (uint8 frames_THWC, seconds times_T)."""
        module = self._classifier()
        batches = (self.clip_batch(chunk) for chunk in _batches(clips, batch_size))
        return self._logits(module.classify_video(batch) for batch in batches)

    @property
    def has_head(self) -> bool:
        """Whether it has a classifier of its own, beside words or instead of them."""
        classes = getattr(getattr(self.module, "config", None), "classes", 0)
        return self.adaptation == "classifier" or (classes > 0 and hasattr(self.module, "classify_video"))

    def _classifier(self) -> Any:
        if not self.has_head:
            raise Refusal(
                f"The model '{self.name}' has no classifier of its own: it compares with words.",
                hint="Use moviola.classify, or adapt it: moviola adapt --method gda-clip ...",
            )
        return self.module

    def _logits(self, batches: Iterable[Tensor]) -> np.ndarray:
        rows = [batch.float().cpu().numpy() for batch in batches]
        return np.concatenate(rows) if rows else np.empty((0, len(self.classes or ())), np.float32)

    # -------------------------------------------------------------------------------------- texts

    def embed_texts(
        self,
        texts: str | Sequence[str],
        *,
        normalize: bool = True,
        truncate: bool = False,
        batch_size: int = 256,
    ) -> np.ndarray:
        """Texts to vectors_ND. Too long a text raises `UsageError`, or is cut with a warning."""
        texts = [texts] if isinstance(texts, str) else list(texts)
        tokens_NL = torch.from_numpy(self._tokenize(texts, truncate))
        pad_id = self.tokenizer.pad_id if self.tokenizer else 0
        # texts of like length share a batch, since the tower stops at the batch's longest
        lengths_N = tokens_NL.ne(pad_id).sum(1)
        order_N = torch.argsort(lengths_N, stable=True)
        chunks = order_N.split(_check_batch(batch_size)) if len(texts) else ()
        sorted_ND = self._gather((self._encode_tokens(tokens_NL[rows]) for rows in chunks), normalize)
        vectors_ND = np.empty_like(sorted_ND)
        vectors_ND[order_N.numpy()] = sorted_ND
        return vectors_ND

    @torch.inference_mode()
    def _encode_tokens(self, tokens_NL: Tensor) -> Tensor:
        return self._encoder.encode_text(tokens_NL.to(self.device))

    @torch.inference_mode()
    def embed_queries(
        self, texts: Sequence[str], *, truncate: bool = False, batch_size: int = 256
    ) -> np.ndarray:
        """What the module's own `score` takes of texts, not normalised: text_ND, or of a model that compares
        words (`encode_words`) words_NLD with rows of zeros as padding.
        """
        if self.separable or not hasattr(self.module, "encode_words"):
            return self.embed_texts(texts, normalize=False, truncate=truncate, batch_size=batch_size)
        tokens_NL = torch.from_numpy(self._tokenize(list(texts), truncate)).to(self.device)
        encode: Any = self.module.encode_words
        parts = [encode(chunk).float().cpu().numpy() for chunk in tokens_NL.split(_check_batch(batch_size))]
        longest = max(part.shape[1] for part in parts)
        return np.concatenate([np.pad(p, ((0, 0), (0, longest - p.shape[1]), (0, 0))) for p in parts])

    def _tokenize(self, texts: Sequence[str], truncate: bool) -> np.ndarray:
        if not self.has_text:
            raise Refusal(
                f"The model '{self.name}' has no text tower, so it cannot be asked with words.",
                hint="Search by picture (--image), or use a model with text.",
            )
        if self.tokenizer is None:
            raise CheckpointError(
                f"The model '{self.name}' came without a tokenizer, so words cannot be turned into its ids.",
                hint="Load it with tokenizer=PATH (--tokenizer PATH): a tokenizer.json, or OpenAI's "
                "bpe_simple_vocab_16e6.txt.gz for checkpoints with 49408 tokens.",
            )
        return self.tokenizer(texts, truncate=truncate)

    def embed_prompts(
        self,
        classes: Sequence[str],
        templates: Sequence[str] = ("a photo of a {}.",),
        *,
        truncate: bool = False,
    ) -> np.ndarray:
        """One vector a class, vectors_CD: the mean over templates of its unit text vectors, made unit."""
        if not classes or not templates:
            raise UsageError("Prompts need at least one class and one template.")
        plain = [t for t in templates if "{}" not in t]
        if plain:
            raise UsageError(f"A template needs {{}} where the class goes, got {plain[0]!r}.")
        texts = [t.replace("{}", name) for name in classes for t in templates]
        vectors_CKD = self.embed_texts(texts, truncate=truncate).reshape(len(classes), len(templates), -1)
        return unit(vectors_CKD.mean(axis=1))

    @torch.inference_mode()
    def score(
        self, texts: str | Sequence[str], video: np.ndarray, mask_MT: np.ndarray | None = None
    ) -> np.ndarray:
        """scores_NM of texts against videos through the module's own `score`.

        `video` holds vectors that are NOT normalised: video_MTD per frame with mask_MT (True = real),
        or video_MD of a separable model. A separable model averages frames first.
        """
        texts = [texts] if isinstance(texts, str) else list(texts)
        text_ND = torch.from_numpy(self.embed_queries(texts)).to(self.device, self.dtype)
        given = torch.from_numpy(np.ascontiguousarray(video)).to(self.device, self.dtype)
        mask = None if mask_MT is None else torch.from_numpy(np.asarray(mask_MT, bool)).to(self.device)
        if self.separable and given.ndim == 3:
            given, mask = mean_of_frames(given, mask), None
        return self._encoder.score(text_ND, given, mask).float().cpu().numpy()

    # ------------------------------------------------------------------------------------- saving

    def save(self, folder: str | Path, *, dtype: Dtype | torch.dtype | None = None) -> Path:
        """Write the native folder, whole or not at all. `dtype` stores the weights in that precision.

        An adapted model writes its own tensors only, and finds its base by `base["source"]`.
        """
        stored = dtype if isinstance(dtype, torch.dtype) or dtype is None else _DTYPES.get(dtype)
        if dtype is not None and stored is None:
            raise UsageError(f"There is no dtype {dtype!r}.", hint="Use float32, bfloat16 or float16.")
        own = getattr(self.module, "own_state", None)
        return write_native(
            folder,
            system=self.system,
            name=self.name,
            config=self.config,
            recipe=self.recipe,
            state=self.module.state_dict() if own is None else own(),
            tokenizer=self.tokenizer if own is None else None,
            base=self.base,
            classes=self.classes,
            licence=self.licence,
            dtype=stored,
        )

    def __repr__(self) -> str:
        return (
            f"Model({self.name!r}, system={self.system!r}, dim={self.dim}, "
            f"{self.parameters / 1e6:.1f} M parameters, {self.device}, {str(self.dtype)[6:]})"
        )

    def _gather(self, batches: Iterable[Tensor], normalize: bool) -> np.ndarray:
        # the vectors leave the model in its own precision and are normalised in float32
        rows = [batch.float().cpu().numpy() for batch in batches]
        vectors_ND = np.concatenate(rows) if rows else np.empty((0, self.dim), np.float32)
        return unit(vectors_ND) if normalize else vectors_ND


def from_native(
    native: Native, *, device: Device = "auto", dtype: Dtype | torch.dtype | None = None
) -> Model:
    """A plain CLIP from a native folder already read; other systems build their module themselves."""
    if native.system != "clip":
        raise CheckpointError(
            f"The model '{native.name}' is of the system '{native.system}', not a plain CLIP.",
            hint="Load it with moviola.load(...), which knows every system.",
        )
    config = ClipConfig.from_json(native.config)
    with torch.device("meta"):
        module = CLIP(config)
    assign(module, native.state, source=native.name)
    return Model(
        module,
        config=config.to_json(),
        recipe=native.recipe,
        tokenizer=native.tokenizer,
        name=native.name,
        device=device,
        dtype=dtype,
        licence=native.licence,
        base=native.base,
        classes=native.classes,
    )


def load(
    source: str | Path,
    *,
    device: Device = "auto",
    dtype: Dtype | torch.dtype | None = None,
    tokenizer: str | Path | Tokenizer | None = None,
    revision: str | None = None,
) -> Model:
    """Load a plain CLIP: a native, Hugging Face or OpenCLIP folder, a hub id, or OpenAI's `.pt`."""
    from moviola.clip.formats import load as load_any

    return load_any(source, device=device, dtype=dtype, tokenizer=tokenizer, revision=revision)


def unit(vectors_ND: np.ndarray) -> np.ndarray:
    """Rows scaled to length one; a row of zeros stays zero."""
    lengths_N1 = np.linalg.norm(vectors_ND, axis=-1, keepdims=True)
    return (vectors_ND / np.maximum(lengths_N1, 1e-12)).astype(np.float32)


def _recipe_of(module: nn.Module) -> Recipe:
    """OpenAI's recipe at the size the tower was built for."""
    config = getattr(module, "config", None)
    if not isinstance(config, ClipConfig):
        raise UsageError("A model that is not a plain CLIP must be given its recipe.")
    size = config.vision.image_size
    return Recipe(size=(size, size) if isinstance(size, int) else size)


def _batches(items: Iterable[Item], size: int) -> Iterator[list[Item]]:
    _check_batch(size)
    iterator = iter(items)
    while chunk := list(islice(iterator, size)):
        yield chunk


def _check_batch(size: int) -> int:
    if size < 1:
        raise UsageError(f"The batch size must be at least 1, got {size}.")
    return size
