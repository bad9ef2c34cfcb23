"""What the built-in model is trained on: Tiny ImageNet photos with words from WordNet, and made scenes."""

from __future__ import annotations

import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor
from wordnet import hypernyms, read_nouns

from moviola.clip.tokenizer import Tokenizer
from moviola.data.hashing import hash_uint64, hash_uniform
from moviola.data.world_clip import WorldConfig, clip
from moviola.data.world_scene import picture
from moviola.training.augment import random_resized_crop

SIZE = 64
MEAN = (0.48, 0.45, 0.40)
STD = (0.27, 0.26, 0.27)
TEMPLATES = (
    "a photo of a {}.",
    "a photo of a {}.",
    "{}",
    "a {}",
    "a picture of a {}",
    "a blurry photo of a {}.",
    "a small photo of the {}",
    "a close-up photo of a {}.",
    "the {} in a photo",
    "an image of the {}",
    "a video of a {}",
    "there is a {} here",
)
TYPE_TEMPLATES = ("a photo of a {name}, a type of {kind}.", "a {name}, a kind of {kind}", "{kind}: {name}")


def prepare_photos(shared: Path, out: Path) -> None:
    """Decode the training photos once into one memory-mapped array, with labels and class words."""
    if (out / "classes.json").exists():
        return
    tables = [pq.read_table(shared / f"tiny_imagenet_train_{n}.parquet") for n in (0, 1)]
    count = sum(table.num_rows for table in tables)
    pixels = np.lib.format.open_memmap(out / "photos.npy", "w+", np.uint8, (count, SIZE, SIZE, 3))
    wnids: list[str] = []
    names: dict[str, tuple[str, str]] = {}
    row = 0
    for table in tables:
        for record in table.to_pylist():
            pixels[row] = np.asarray(Image.open(io.BytesIO(record["image"])).convert("RGB"))
            wnids.append(record["wnid"])
            names[record["wnid"]] = (record["name"], record["synonyms"])
            row += 1
    order = sorted(names)
    index = {wnid: i for i, wnid in enumerate(order)}
    np.save(out / "labels.npy", np.array([index[w] for w in wnids], np.int64))
    classes = [
        {"wnid": w, "name": names[w][0], "synonyms": [s.strip() for s in names[w][1].split(",")]}
        for w in order
    ]
    (out / "classes.json").write_text(json.dumps(classes, indent=1))


def add_hypernyms(out: Path, wordnet: Path) -> None:
    """Class words plus the words above them in WordNet, for captions of the kind 'a photo of a dog'."""
    synsets = read_nouns(wordnet)
    classes = json.loads((out / "classes.json").read_text())
    for entry in classes:
        entry["hypernyms"] = list(hypernyms(synsets, entry["wnid"][1:]))
    (out / "classes.json").write_text(json.dumps(classes, indent=1))
    glosses = [synset.gloss for synset in synsets.values()]
    (out / "glosses.json").write_text(json.dumps(glosses))


def prepare_world(out: Path, count: int, seed: int = 1) -> None:
    """Made still scenes, a third of them with photos as objects or grounds, and three captions each."""
    if (out / "world.json").exists():
        return
    photos = np.load(out / "photos.npy", mmap_mode="r")
    labels = np.load(out / "labels.npy")
    classes = json.loads((out / "classes.json").read_text())
    pixels = np.lib.format.open_memmap(out / "world.npy", "w+", np.uint8, (count, SIZE, SIZE, 3))
    captions = []
    for i in range(count):
        lent = None
        if i % 3 == 0:
            rows = hash_uint64(seed, np.array([4 * i + k for k in range(4)], np.uint64)) % np.uint64(
                len(photos)
            )
            lent = [(np.array(photos[int(r)]), classes[labels[int(r)]]["name"]) for r in rows]
        scene = picture(seed, i, size=SIZE, photos=lent)
        pixels[i] = scene.pixels_HWC
        captions.append(list(scene.captions))
    (out / "world.json").write_text(json.dumps(captions))


def prepare_clips(out: Path, count: int, seed: int = 2, frames: int = 4) -> None:
    """A few frames of made clips with one event each, captioned with what happens in the clip."""
    if (out / "clips.json").exists():
        return
    config = WorldConfig(size=SIZE, event_mix=(1, 0, 0), sound=0, subtitles=0)
    pixels = np.lib.format.open_memmap(out / "clips.npy", "w+", np.uint8, (count * frames, SIZE, SIZE, 3))
    captions = []
    for i in range(count):
        made = clip(seed, i, config=config)
        span = made.events[0].span
        inside = np.flatnonzero((made.times_T >= span.start) & (made.times_T < span.end))
        chosen = inside[np.linspace(0, len(inside) - 1, frames).round().astype(int)]
        pixels[i * frames : (i + 1) * frames] = made.frames_THWC[chosen]
        captions += [list(made.short)] * frames
    (out / "clips.json").write_text(json.dumps(captions))


def train_tokenizer(out: Path, vocab_size: int = 8192) -> Tokenizer:
    """Byte-pair merges from every caption and, for words no caption holds, WordNet's glosses."""
    classes = json.loads((out / "classes.json").read_text())
    words = [w for c in classes for w in (*c["synonyms"], *c["hypernyms"])]
    texts = [t.format(w) for w in words for t in TEMPLATES]
    texts += [c for captions in json.loads((out / "world.json").read_text()) for c in captions]
    texts += json.loads((out / "glosses.json").read_text())
    return Tokenizer.train(texts, vocab_size=vocab_size, context_length=77)


def normalise(images_BCHW: Tensor) -> Tensor:
    """uint8 or float pixels 0..255 to the model's range."""
    mean = torch.tensor(MEAN).view(1, 3, 1, 1)
    std = torch.tensor(STD).view(1, 3, 1, 1)
    return ((images_BCHW.float() / 255 - mean) / std).contiguous(memory_format=torch.channels_last)


class Photos:
    """Cropped photos with their class number, growing while training: the first rows for the stem.

    Small pictures cost a quarter as much and teach most of what large ones do, so a run starts with
    them (`sizes`: share of the steps, side in pixels).
    """

    def __init__(self, folder: Path, *, steps: int, sizes: Sequence[tuple[float, int]]) -> None:
        self.photos = np.load(folder / "photos.npy", mmap_mode="r")
        self.labels = np.load(folder / "labels.npy")
        self.steps, self.sizes = steps, sizes

    def __len__(self) -> int:
        return len(self.photos)

    def batch(self, rows: np.ndarray, *, seed: int, epoch: int, step: int) -> dict[str, Any]:
        size = next(size for until, size in self.sizes if step < until * self.steps)
        pixels = random_resized_crop(
            torch.from_numpy(self.photos[rows]).permute(0, 3, 1, 2),
            rows,
            seed=seed + 1000 * epoch,
            size=size,
            area=(0.35, 1.0),
        )
        return {"id": rows, "image": normalise(pixels), "label": torch.from_numpy(self.labels[rows])}


class BuiltinData:
    """Photos, made scenes and frames of made clips as training rows. Implements `TrainingData`.

    Every step sees one caption for each of the 200 classes (a name, a synonym or a word above it in
    WordNet), so all classes are negatives of every photo; a word that fits several classes is a
    positive of all of them. Made pictures bring their own captions.
    """

    def __init__(
        self,
        folder: Path,
        tokenizer: Tokenizer,
        *,
        size: int,
        made: Sequence[str] = ("world",),
        kinds: float = 0.2,
        smallest_crop: float = 0.35,
        coarse: float = 0.0,
    ) -> None:
        """`kinds`: share of captions with a general word; `coarse`: of photos seen at half resolution."""
        self.kinds, self.smallest_crop, self.coarse = kinds, smallest_crop, coarse
        self.size = size
        self.tokenizer = tokenizer
        self.photos = np.load(folder / "photos.npy", mmap_mode="r")
        self.labels = np.load(folder / "labels.npy")
        self.classes: list[dict[str, Any]] = json.loads((folder / "classes.json").read_text())
        self.made = [np.load(folder / f"{name}.npy", mmap_mode="r") for name in made]
        self.captions: list[list[str]] = []
        for name in made:
            self.captions += json.loads((folder / f"{name}.json").read_text())
        self.starts = np.cumsum([len(self.photos), *(len(m) for m in self.made)])
        self.fits: dict[str, set[int]] = {}
        for i, entry in enumerate(self.classes):
            for word in {w.lower() for w in (*entry["synonyms"], *entry["hypernyms"])}:
                self.fits.setdefault(word, set()).add(i)

    def __len__(self) -> int:
        return int(self.starts[-1])

    def _class_captions(self, seed: int, step: int) -> tuple[list[str], np.ndarray, np.ndarray]:
        """One caption per class, fits_CU (which classes each caption fits) and own_C (whose is whose)."""
        ids = np.arange(len(self.classes), dtype=np.uint64) + np.uint64(step * len(self.classes))
        style, which, form = (hash_uniform(seed, ids, stream) for stream in (11, 12, 13))
        texts: dict[str, set[int]] = {}
        chosen: list[str] = []
        for i, entry in enumerate(self.classes):
            names, kinds = entry["synonyms"], entry["hypernyms"]
            if style[i] < self.kinds and kinds:
                words = kinds[min(int(which[i] ** 1.5 * len(kinds)), len(kinds) - 1)]
                fits = self.fits[words.lower()]
                text = TEMPLATES[int(form[i] * len(TEMPLATES))].format(words)
            elif style[i] < self.kinds + 0.1 and kinds:
                kind = kinds[int(which[i] * len(kinds))]
                text = TYPE_TEMPLATES[int(form[i] * len(TYPE_TEMPLATES))].format(
                    name=entry["name"], kind=kind
                )
                fits = {i}
            else:
                first = which[i] < 0.6 or len(names) == 1
                words = entry["name"] if first else names[int((which[i] - 0.6) / 0.4 * len(names))]
                fits = self.fits[words.lower()]
                text = TEMPLATES[int(form[i] * len(TEMPLATES))].format(words)
            texts.setdefault(text, set()).update(fits)
            chosen.append(text)
        fits_CU = np.zeros((len(self.classes), len(texts)), bool)
        for u, fitting in enumerate(texts.values()):
            fits_CU[list(fitting), u] = True
        place = {text: u for u, text in enumerate(texts)}
        return list(texts), fits_CU, np.array([place[text] for text in chosen])

    def batch(self, rows: np.ndarray, *, seed: int, epoch: int, step: int) -> dict[str, Any]:
        pixels = np.empty((len(rows), SIZE, SIZE, 3), np.uint8)
        is_photo = rows < self.starts[0]
        pixels[is_photo] = self.photos[rows[is_photo]]
        for k, made in enumerate(self.made):
            here = (rows >= self.starts[k]) & (rows < self.starts[k + 1])
            pixels[here] = made[rows[here] - self.starts[k]]
        texts, fits_CU, own_C = self._class_captions(seed, step)
        made_texts: dict[str, int] = {}
        draws = hash_uniform(seed, rows, stream=21 + epoch)
        own = np.full(len(rows), -1)
        for b in np.flatnonzero(~is_photo):
            captions = self.captions[rows[b] - self.starts[0]]
            own[b] = made_texts.setdefault(captions[int(draws[b] * len(captions))], len(made_texts))
        positives = np.zeros((len(rows), len(texts) + len(made_texts)), bool)
        positives[is_photo, : len(texts)] = fits_CU[self.labels[rows[is_photo]]]
        made_rows = np.flatnonzero(~is_photo)
        positives[made_rows, len(texts) + own[made_rows]] = True
        own[made_rows] += len(texts)
        own[is_photo] = own_C[self.labels[rows[is_photo]]]
        images = torch.from_numpy(pixels).permute(0, 3, 1, 2)
        photo_crop = {"area": (self.smallest_crop, 1.0), "aspect": (3 / 4, 4 / 3)}
        made_crop = {"area": (0.85, 1.0), "aspect": (0.95, 1.05)}
        out = torch.empty(len(rows), 3, self.size, self.size)
        for chosen, crop, flip in ((is_photo, photo_crop, 0.5), (~is_photo, made_crop, 0.0)):
            where = torch.from_numpy(np.flatnonzero(chosen))
            if len(where):
                out[where] = random_resized_crop(
                    images[where], rows[chosen], seed=seed + 1000 * epoch, size=self.size, flip=flip, **crop
                )
        draw = hash_uniform(seed + 1000 * epoch, rows, 31)
        blurred = torch.from_numpy(np.flatnonzero(is_photo & (draw < self.coarse)))
        if len(blurred):  # small pictures from elsewhere come enlarged
            half = F.avg_pool2d(out[blurred], 2)
            out[blurred] = F.interpolate(half, self.size, mode="bicubic", align_corners=False).clamp(0, 255)
        return {
            "id": rows,
            "image": normalise(out),
            "text": torch.from_numpy(self.tokenizer([*texts, *made_texts], truncate=True)),
            "positives": torch.from_numpy(positives),
            "own": torch.from_numpy(own),
        }
