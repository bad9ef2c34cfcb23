"""Where a picture shows what a phrase says, by the model's own patches: boxes without a detector.

The image tower's tokens are projected into the space that pictures and texts share, each is compared with
the phrase, and the region above a threshold around the best patch becomes the box. Nothing is
trained. Two ways to a patch's vector:

    values   the last attention's values alone, so that every patch speaks for itself (Zhou et al.:
             "Extract Free Dense Labels from CLIP", ECCV 2022, arXiv 2112.01071)
    tokens   the last layer's own tokens through the tower's head

Values are the default: on pictures of the made world the built-in model's best patch lay on the right thing
37 times in 100 by values and 4 times by tokens, which hold what the whole picture is about wherever there is
room. A residual tower's attention pool is that last attention, and both ways are the same there.

Coarse: a box is a whole number of patches (7 x 7 of them in a ViT-B/32), and lies within the crop that the
tower sees.

Axis letters: N pictures, R rows and C columns of patches, L tokens, D width, E embedding width.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Literal, cast

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from moviola.clip.blocks import ResidualBlock
from moviola.clip.resnet import ModifiedResNet
from moviola.clip.vit import VisionTransformer
from moviola.parts.regions import Box
from moviola.types import Recipe, Refusal, UsageError

if TYPE_CHECKING:
    from PIL import Image

    from moviola.clip.loaded import Model

Path = Literal["values", "tokens"]


class PatchRegions:
    """Boxes for phrases from a model's own patches.

    threshold   the share of the way from a map's mean to its peak that a patch of the region must reach
    path        `values` or `tokens`, see above
    """

    def __init__(
        self, model: Model, *, threshold: float = 0.5, path: Path = "values", batch_size: int = 32
    ) -> None:
        if not 0 < threshold < 1:
            raise UsageError(f"The threshold of a region lies between 0 and 1, got {threshold}.")
        if path not in ("values", "tokens"):
            raise UsageError(f"path is 'values' or 'tokens', got {path!r}.")
        self.model, self.threshold, self.path, self.batch_size = model, threshold, path, batch_size
        self.tower = patch_tower(model)
        self._texts: dict[str, Tensor] = {}

    def __call__(
        self, pictures: Sequence[Image.Image], phrases: Sequence[Mapping[str, str]]
    ) -> list[dict[str, list[Box | None]]]:
        """`phrases` of each picture by name; by the same names one box, or none where nothing stands out."""
        if len(pictures) != len(phrases):
            raise UsageError(f"Got {len(pictures)} pictures and phrases for {len(phrases)}.")
        asked_of_all = dict.fromkeys(phrase for asked in phrases for phrase in asked.values())
        new = [phrase for phrase in asked_of_all if phrase not in self._texts]
        if new:
            self._texts.update(zip(new, torch.from_numpy(self.model.embed_texts(new)), strict=True))
        found: list[dict[str, list[Box | None]]] = []
        for start in range(0, len(pictures), self.batch_size):
            part = slice(start, start + self.batch_size)
            for picture, asked, patches_RCE in zip(
                pictures[part], phrases[part], self.patches(pictures[part]), strict=True
            ):
                found.append(self._boxes(picture, asked, patches_RCE))
        return found

    @torch.inference_mode()
    def patches(self, pictures: Sequence[Image.Image]) -> Tensor:
        """patches_NRCE: unit vectors in the joint space."""
        pixels_NCHW = self.model.preprocess.pictures(list(pictures))
        pixels_NCHW = pixels_NCHW.to(self.model.device, self.model.dtype)
        return patch_vectors(self.tower, pixels_NCHW, self.path).float().cpu()

    def _boxes(
        self, picture: Image.Image, phrases: Mapping[str, str], patches_RCE: Tensor
    ) -> dict[str, list[Box | None]]:
        found: dict[str, list[Box | None]] = {}
        for name, phrase in phrases.items():
            map_RC = (patches_RCE @ self._texts[phrase]).numpy()
            cells = region(map_RC, self.threshold)
            recipe = self.model.recipe
            found[name] = [] if cells is None else [to_picture(cells, map_RC.shape, picture.size, recipe)]
        return found


def patch_tower(model: Model) -> VisionTransformer | ModifiedResNet:
    """The model's image tower, if its tokens can be brought into the joint space; else `Refusal`."""
    tower = getattr(model.module, "visual", None)
    if isinstance(tower, VisionTransformer | ModifiedResNet) and model.has_text and model.separable:
        return tower
    raise Refusal(
        f"The model '{model.name}' does not compare its patches with words, so it cannot find regions.",
        hint="Give boxes (--regions boxes.json), or use a plain CLIP.",
    )


def patch_vectors(
    tower: VisionTransformer | ModifiedResNet, pixels_NCHW: Tensor, path: Path = "values"
) -> Tensor:
    """patches_NRCE, unit vectors of every patch in the joint space."""
    if isinstance(tower, ModifiedResNet):
        pool = tower.attnpool
        out = tower(pixels_NCHW, taps=(3,))
        rows, columns = out.layers[3].shape[-2:]
        patches_NLE = pool.c_proj(pool.v_proj(out.tokens_BLD[:, 1:]))
    else:
        patch = tower.config.patch_size
        rows, columns = (side // patch for side in pixels_NCHW.shape[-2:])
        last = len(tower.transformer.resblocks) - 1
        block = tower.transformer.resblocks[last]
        if path == "values" and isinstance(block, ResidualBlock):
            x_NLD = (
                tower(pixels_NCHW, taps=(last - 1,)).layers[last - 1] if last else tower.embed(pixels_NCHW)
            )
            attention, width = block.attn, x_NLD.shape[-1]
            weight, bias = attention.in_proj_weight[2 * width :], attention.in_proj_bias[2 * width :]
            tokens_NLD = tower.ln_post(attention.out_proj(F.linear(block.ln_1(x_NLD), weight, bias)))
        else:
            tokens_NLD = tower(pixels_NCHW).tokens_BLD
        patches_NLE = tokens_NLD[:, 1:] @ tower.proj
    return F.normalize(patches_NLE, dim=-1).reshape(len(patches_NLE), rows, columns, -1)


def region(map_RC: np.ndarray, threshold: float) -> tuple[int, int, int, int] | None:
    """First row, first column, last row, last column of the connected cells around the peak.

    A cell belongs if it reaches `threshold` of the way from the mean to the peak and touches the region by
    a side. None for a flat or non-finite map.
    """
    mean, peak = float(map_RC.mean()), float(map_RC.max())
    if not peak - mean > 1e-6:  # also for NaN
        return None
    high_RC = map_RC >= mean + threshold * (peak - mean)
    rows, columns = map_RC.shape
    first = divmod(int(map_RC.argmax()), columns)
    seen, stack = {first}, [first]
    while stack:
        row, column = stack.pop()
        for near in ((row - 1, column), (row + 1, column), (row, column - 1), (row, column + 1)):
            inside = 0 <= near[0] < rows and 0 <= near[1] < columns
            if inside and near not in seen and high_RC[near]:
                seen.add(near)
                stack.append(near)
    at_N2 = np.array(sorted(seen))
    return cast("tuple[int, int, int, int]", (*at_N2.min(0).tolist(), *at_N2.max(0).tolist()))


def to_picture(
    cells: tuple[int, int, int, int], grid: tuple[int, ...], size: tuple[int, int], recipe: Recipe
) -> Box:
    """Cells of the grid as a box in the picture of `size` (width, height), through the recipe's crop."""
    width, height = size
    rows, columns = recipe.resize_size or recipe.size
    if recipe.resize == "squash":
        down, across = height / rows, width / columns
    else:
        down = across = min(height / rows, width / columns)
    high, wide = recipe.size[0] * down, recipe.size[1] * across
    top, left = (height - high) / 2, (width - wide) / 2
    first_row, first_column, last_row, last_column = cells
    cell_high, cell_wide = high / grid[0], wide / grid[1]
    return (
        max(0.0, left + first_column * cell_wide),
        max(0.0, top + first_row * cell_high),
        min(width - 1.0, left + (last_column + 1) * cell_wide - 1),
        min(height - 1.0, top + (last_row + 1) * cell_high - 1),
    )
