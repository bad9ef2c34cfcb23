"""Pictures and frames to the pixels a checkpoint was trained on, by its recipe.

`picture` follows OpenAI's transform exactly: Pillow's antialiased resize so that the short side fits
(the long side is rounded down), a centre crop whose offsets round halves to even, and only then the
conversion to RGB, so alpha is weighed while scaling. One deliberate difference: palette and one-bit
pictures are converted first, because Pillow can only scale those by picking the nearest pixel.
(transformers rounds crop offsets down: where OpenAI's is n + 1/2 with n odd, its crop lies a pixel before.)

`frames` is the fast path for video: a whole batch of uint8 frames scaled in torch. Measured against
`picture` on noise and on smooth frames from 64 x 64 to 1080 x 1920: at most 2 grey levels apart in any
pixel; on average 0.01 with bicubic, 0.05 with bilinear (tests/clip/test_preprocess.py holds it to that);
5 to 10 times as fast. One grey level is 0.0142 to 0.0150 after OpenAI's normalisation. Frames about twice
as tall as wide, or more, are further apart (noise scaled to 32: up to 12 levels, 0.3 on average), because
Pillow 13 then scales rows before columns and torch does not.

Axis letters: N pictures, T frames, C channels, H height, W width.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from moviola.types import CheckpointError, Recipe, UsageError

FILTERS = {"bicubic": Image.Resampling.BICUBIC, "bilinear": Image.Resampling.BILINEAR}


class Preprocess:
    """Prepares pixels by one recipe."""

    def __init__(self, recipe: Recipe) -> None:
        if recipe.resize == "shortest" and recipe.crop == "none":
            raise CheckpointError(
                "The recipe scales the short side and does not crop: pictures would differ in size, "
                "and the tower takes one size only."
            )
        self._target = recipe.resize_size or recipe.size
        if recipe.crop == "none" and self._target != recipe.size:
            raise CheckpointError(
                f"The recipe scales to {self._target} and does not crop, but the tower takes {recipe.size}."
            )
        if self._target[0] < recipe.size[0] or self._target[1] < recipe.size[1]:
            raise CheckpointError(
                f"The recipe scales to {self._target}, which is too small to crop {recipe.size} from it."
            )
        if recipe.interpolation not in FILTERS:
            raise CheckpointError(
                f"The recipe asks for {recipe.interpolation!r} interpolation; known are bicubic and bilinear."
            )
        self.recipe = recipe
        self._mean_C11 = torch.tensor(recipe.mean).view(3, 1, 1)
        self._std_C11 = torch.tensor(recipe.std).view(3, 1, 1)
        self._scale_C11 = 1 / (255 * self._std_C11)
        self._shift_C11 = -self._mean_C11 / self._std_C11

    @property
    def decode_hint(self) -> int:
        """Short side, in pixels, that frames may be scaled to while they are decoded."""
        return max(self._target)

    def picture(self, image: Image.Image) -> Tensor:
        """One picture, in any Pillow mode, to pixels_CHW (float32)."""
        if min(image.size) < 1:
            raise UsageError(f"A picture needs at least one pixel, got {image.size[0]} x {image.size[1]}.")
        image = scalable(image)
        height, width = self._scaled(image.height, image.width)
        if (width, height) != image.size:
            image = image.resize((width, height), FILTERS[self.recipe.interpolation])
        top, left = self._offsets(height, width)
        rows, columns = self.recipe.size
        if (rows, columns) != (height, width):
            image = image.crop((left, top, left + columns, top + rows))
        pixels_HWC = np.array(image.convert("RGB"))
        pixels_CHW = torch.from_numpy(pixels_HWC).permute(2, 0, 1).contiguous().float().div_(255)
        return pixels_CHW.sub_(self._mean_C11).div_(self._std_C11)

    def pictures(self, images: Sequence[Image.Image]) -> Tensor:
        """pixels_NCHW (float32) of several pictures."""
        if not images:
            return torch.empty(0, 3, *self.recipe.size)
        return torch.stack([self.picture(image) for image in images])

    def frames(self, frames_THWC: np.ndarray, device: Any = None) -> Tensor:
        """uint8 RGB frames of one size to pixels_TCHW (float32), scaled in torch, on `device`."""
        if frames_THWC.ndim != 4 or frames_THWC.shape[3] != 3 or frames_THWC.dtype != np.uint8:
            raise UsageError(
                "Frames must be uint8 RGB of shape (T, H, W, 3), "
                f"got {frames_THWC.dtype} of shape {frames_THWC.shape}."
            )
        if 0 in frames_THWC.shape[1:3]:
            raise UsageError(f"Frames need at least one pixel, got shape {frames_THWC.shape}.")
        if not frames_THWC.flags.writeable or any(s < 0 for s in frames_THWC.strides):
            frames_THWC = frames_THWC.copy()
        if len(frames_THWC) == 0:
            return torch.empty(0, 3, *self.recipe.size, device=device)
        pixels_TCHW = torch.from_numpy(frames_THWC).to(device).permute(0, 3, 1, 2)
        given = (pixels_TCHW.shape[2], pixels_TCHW.shape[3])
        scaled = self._scaled(*given)
        if scaled != given:
            pixels_TCHW = self._scale(pixels_TCHW, scaled)
        top, left = self._offsets(*scaled)
        rows, columns = self.recipe.size
        pixels_TCHW = pixels_TCHW[:, :, top : top + rows, left : left + columns].float()
        scale_C11, shift_C11 = (t.to(pixels_TCHW.device) for t in (self._scale_C11, self._shift_C11))
        return torch.addcmul(shift_C11, pixels_TCHW, scale_C11)

    def _scale(self, pixels_TCHW: Tensor, size: tuple[int, int]) -> Tensor:
        # On the CPU torch scales uint8 as Pillow does, in integers; elsewhere it needs floats.
        if pixels_TCHW.device.type == "cpu":
            return F.interpolate(pixels_TCHW, size, mode=self.recipe.interpolation, antialias=True)
        scaled = F.interpolate(pixels_TCHW.float(), size, mode=self.recipe.interpolation, antialias=True)
        return scaled.round().clamp_(0, 255)

    def _scaled(self, height: int, width: int) -> tuple[int, int]:
        """(height, width) after scaling and before the crop."""
        rows, columns = self._target
        if self.recipe.resize == "squash":
            return rows, columns
        if rows == columns:  # integer arithmetic: no rounding error for any size
            short = min(height, width)
            return height * rows // short, width * rows // short
        ratio = min(height / rows, width / columns)
        return max(rows, round(height / ratio)), max(columns, round(width / ratio))

    def _offsets(self, height: int, width: int) -> tuple[int, int]:
        """Top and left of the centre crop; Python's `round` sends halves to the even number."""
        rows, columns = self.recipe.size
        return round((height - rows) / 2), round((width - columns) / 2)


def scalable(image: Image.Image) -> Image.Image:
    """The picture in a mode that Pillow scales with a filter and converts to RGB without clipping."""
    if image.mode in ("P", "PA"):
        return image.convert("RGBA" if "transparency" in image.info or image.mode == "PA" else "RGB")
    if image.mode == "1":
        return image.convert("L")
    if image.mode.startswith("I;16"):
        return Image.fromarray((np.asarray(image).astype(np.float32) / 257).round().astype(np.uint8))
    return image
