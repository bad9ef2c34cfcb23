"""Augmentations of whole batches: one affine resampling per batch instead of one call per picture."""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from moviola.data.hashing import hash_uniform


def random_resized_crop(
    images_BCHW: Tensor,
    ids: np.ndarray,
    *,
    seed: int,
    size: int,
    area: tuple[float, float] = (0.4, 1.0),
    aspect: tuple[float, float] = (3 / 4, 4 / 3),
    flip: np.ndarray | float = 0.5,
) -> Tensor:
    """Crop a random box, resize it to `size` (bilinear) and maybe mirror it: float (B, C, size, size).

    Every draw is a hash of (seed, id), so a row looks the same whatever batch it comes in. `flip` is
    the chance of mirroring, one number or one per row (0 where captions say left and right).
    """
    count = len(images_BCHW)
    draws = [hash_uniform(seed, ids, stream) for stream in range(5)]
    scale = area[0] + (area[1] - area[0]) * draws[0]
    ratio = np.exp(np.log(aspect[0]) + (np.log(aspect[1]) - np.log(aspect[0])) * draws[1])
    width = np.minimum(np.sqrt(scale * ratio), 1.0)
    height = np.minimum(np.sqrt(scale / ratio), 1.0)
    theta = np.zeros((count, 2, 3), np.float32)
    theta[:, 0, 0] = width * np.where(draws[4] < flip, -1, 1)
    theta[:, 1, 1] = height
    theta[:, 0, 2] = (2 * draws[2] - 1) * (1 - width)
    theta[:, 1, 2] = (2 * draws[3] - 1) * (1 - height)
    shape = [count, images_BCHW.shape[1], size, size]
    grid = F.affine_grid(torch.from_numpy(theta), shape, align_corners=False)
    return F.grid_sample(images_BCHW.float(), grid, padding_mode="reflection", align_corners=False)
