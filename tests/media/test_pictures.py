"""Pictures as Pillow reads them, upright; and what is no picture."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from moviola.media import jpeg, on_white, read_picture
from moviola.types import MediaError, UsageError


def quarters(width: int = 40, height: int = 30) -> Image.Image:
    pixels = np.zeros((height, width, 3), np.uint8)
    pixels[: height // 2, : width // 2] = (255, 0, 0)
    pixels[height // 2 :, width // 2 :] = (0, 0, 255)
    return Image.fromarray(pixels)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_rotation(tmp_path: Path, orientation: int) -> None:
    """A picture stored turned or mirrored, with the tag that undoes it, reads as the upright one."""
    undo = {
        2: Image.Transpose.FLIP_LEFT_RIGHT,
        3: Image.Transpose.ROTATE_180,
        4: Image.Transpose.FLIP_TOP_BOTTOM,
        5: Image.Transpose.TRANSPOSE,
        6: Image.Transpose.ROTATE_90,
        7: Image.Transpose.TRANSVERSE,
        8: Image.Transpose.ROTATE_270,
    }
    upright = quarters()
    stored = upright if orientation == 1 else upright.transpose(undo[orientation])
    exif = Image.Exif()
    exif[0x0112] = orientation
    stored.save(tmp_path / "p.png", exif=exif)
    read = read_picture(tmp_path / "p.png")
    assert read.size == upright.size
    assert np.array_equal(np.asarray(read), np.asarray(upright))
    assert read_picture((tmp_path / "p.png").read_bytes()).size == upright.size


@pytest.mark.parametrize("mode", ["1", "L", "P", "LA", "RGBA", "CMYK", "I;16"])
def test_modes_stay_and_become_rgb(tmp_path: Path, mode: str) -> None:
    grey = quarters().convert("L")
    image = (
        Image.fromarray(np.asarray(grey).astype(np.uint16) * 257) if mode == "I;16" else grey.convert(mode)
    )
    path = tmp_path / ("p.tif" if mode == "CMYK" else "p.png")
    image.save(path)
    read = read_picture(path)
    assert read.mode == mode
    rgb = on_white(read)
    assert rgb.mode == "RGB"
    if mode not in ("1", "P"):
        assert np.abs(np.asarray(rgb).astype(int)[..., 0] - np.asarray(grey)).max() <= 2


def test_transparency_is_white() -> None:
    image = Image.new("RGBA", (4, 4), (255, 0, 0, 0))
    assert on_white(image).getpixel((0, 0)) == (255, 255, 255)
    assert Image.open(io.BytesIO(jpeg(image))).convert("RGB").getpixel((0, 0)) == (255, 255, 255)


def test_animation_gives_its_first_frame(tmp_path: Path) -> None:
    frames = [Image.new("RGB", (8, 8), colour) for colour in ((250, 0, 0), (0, 250, 0))]
    frames[0].save(tmp_path / "a.gif", save_all=True, append_images=frames[1:])
    assert read_picture(tmp_path / "a.gif").convert("RGB").getpixel((0, 0))[0] > 200


def test_bad_pictures(tmp_path: Path) -> None:
    path = tmp_path / "p.jpg"
    for content, says in (
        (b"", "empty"),
        (b"words", "no known picture"),
        (b"\xff\xd8\xff\xe0" + b"\0" * 90, "picture"),
    ):
        path.write_bytes(content)
        with pytest.raises(MediaError, match=says) as caught:
            read_picture(path)
        assert "p.jpg" in str(caught.value)
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 255, (200, 200, 3), np.uint8))
    for ending in ("jpg", "png", "webp", "gif"):
        path = tmp_path / f"whole.{ending}"
        noise.save(path)
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
        with pytest.raises(MediaError, match=r"cannot be decoded|no known"):
            read_picture(path)
    with pytest.raises(MediaError, match="no such file"):
        read_picture(tmp_path / "none.png")
    with pytest.raises(MediaError, match="folder"):
        read_picture(tmp_path)
    with pytest.raises(MediaError, match="memory"):
        read_picture(b"nonsense")


@pytest.mark.parametrize("side", [13_400, 19_000])
def test_decompression_bomb(tmp_path: Path, side: int, recwarn: pytest.WarningsRecorder) -> None:
    Image.new("1", (side, side)).save(tmp_path / "bomb.png")
    with pytest.raises(MediaError, match="too large"):
        read_picture(tmp_path / "bomb.png")
    assert not [w for w in recwarn if "ecompression" in str(w.message)]


def test_jpeg() -> None:
    wide = Image.open(io.BytesIO(jpeg(quarters(400, 300), height=90)))
    assert (wide.format, wide.size) == ("JPEG", (120, 90))
    assert Image.open(io.BytesIO(jpeg(quarters(40, 30), height=90))).size == (40, 30)
    assert Image.open(io.BytesIO(jpeg(np.zeros((20, 10, 3), np.uint8), height=10))).size == (5, 10)
    for wrong in (np.zeros((5, 5), np.uint8), np.zeros((5, 5, 3), np.float32)):
        with pytest.raises(UsageError):
            jpeg(wrong)
    with pytest.raises(UsageError):
        jpeg(quarters(), height=0)
