"""Still pictures as Pillow reads them, upright, and small JPEG previews."""

from __future__ import annotations

import io
import warnings
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from moviola.types import MediaError, UsageError

MOST_PIXELS = 178_956_970
"""A picture with more pixels is refused before it is decoded (Pillow's own error limit)."""


def read_picture(source: str | Path | bytes) -> Image.Image:
    """A picture in the mode Pillow gives it, EXIF rotation applied; the first frame of animations.

    `source` is a path or the file's bytes. `MediaError` for what is missing, empty, damaged, cut
    off, or unreasonably large (over 179 million pixels, a decompression bomb).
    """
    name: str | Path = "picture in memory" if isinstance(source, bytes) else source
    try:
        with warnings.catch_warnings():
            # Pillow warns from half its limit on; the check below is ours.
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            with Image.open(io.BytesIO(source) if isinstance(source, bytes) else source) as image:
                width, height = image.size
                if width * height > MOST_PIXELS:
                    raise MediaError(name, _too_large(width, height), hint="Make it smaller first.")
                image.load()
                # exif_transpose gives a copy, also where there is nothing to turn.
                return ImageOps.exif_transpose(image)
    except Image.DecompressionBombError as error:
        raise MediaError(
            name, f"the picture is too large ({error}).", hint="Make it smaller first."
        ) from error
    except UnidentifiedImageError:
        raise MediaError(name, _unknown(source), hint="Check the file, or copy it again.") from None
    except FileNotFoundError:
        raise MediaError(name, "there is no such file.", hint="Check the path.") from None
    except IsADirectoryError:
        raise MediaError(
            name, "expected a picture, got a folder.", hint="Name the files inside it."
        ) from None
    except (OSError, SyntaxError, ValueError, EOFError, OverflowError, MemoryError) as error:
        # Pillow's plugins raise any of these for damaged files (SyntaxError for a broken PNG).
        what = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        raise MediaError(name, f"the picture cannot be decoded ({what}).", hint="Copy it again.") from error


def _too_large(width: int, height: int) -> str:
    return f"the picture is too large ({width}x{height}, at most {MOST_PIXELS // 1_000_000} million pixels)."


def _unknown(source: str | Path | bytes) -> str:
    size = len(source) if isinstance(source, bytes) else Path(source).stat().st_size
    if size == 0:
        return "the file is empty (0 bytes)."
    return f"expected a picture, got {size} bytes that no known picture format explains."


def jpeg(image: Image.Image | np.ndarray, *, height: int = 180, quality: int = 80) -> bytes:
    """A small JPEG: `height` rows at most (never enlarged), proportions kept, transparency on white.

    `image` is a Pillow picture or uint8 RGB pixels (H, W, 3).
    """
    if height < 1:
        raise UsageError(f"A thumbnail needs at least one row, got height={height}.")
    if isinstance(image, np.ndarray):
        if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3:
            raise UsageError(f"Expected uint8 pixels (H, W, 3), got {image.dtype} {image.shape}.")
        picture = Image.fromarray(image)
    else:
        picture = on_white(image)
    if picture.height > height:
        width = max(1, round(picture.width * height / picture.height))
        picture = picture.resize((width, height), Image.Resampling.BICUBIC, reducing_gap=2.0)
    out = io.BytesIO()
    picture.save(out, "JPEG", quality=quality)
    return out.getvalue()


def on_white(image: Image.Image) -> Image.Image:
    """The picture as RGB, transparent parts on white."""
    if image.mode == "RGB":
        return image
    if image.mode in ("I;16", "I;16B", "I;16L", "I", "F"):
        # 16 bits and more: convert() would clip at 255.
        values = np.asarray(image, dtype=np.float64)
        top = 65535.0 if image.mode.startswith("I;16") or values.max(initial=0) > 255 else 255.0
        return Image.fromarray((values.clip(0, top) * (255.0 / top)).astype(np.uint8)).convert("RGB")
    if image.has_transparency_data:
        layer = image.convert("RGBA")
        ground = Image.new("RGBA", layer.size, (255, 255, 255, 255))
        return Image.alpha_composite(ground, layer).convert("RGB")
    return image.convert("RGB")
