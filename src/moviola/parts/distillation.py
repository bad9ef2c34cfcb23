"""Self-distillation: a student is taught by the slowly moving average of itself (DINO's blocks).

The teacher sees large crops, the student small ones too; both name what they see by soft assignment to
prototypes. A running centre taken from the teacher's logits, and its low temperature, keep it from
giving one answer to everything. Caron et al.: "Emerging Properties in Self-Supervised Vision
Transformers", ICCV 2021, arXiv 2104.14294.

Axis letters: B pictures, V views, G global views (the teacher's), D width, H hidden width,
E bottleneck width, K prototypes, N rows of any kind.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moviola.types import CheckpointError, UsageError

Module = TypeVar("Module", bound=nn.Module)


class WeightNormLinear(nn.Module):
    """A linear map without bias whose rows are `weight_v` made unit, times `weight_g` (one a row)."""

    def __init__(self, width: int, rows: int, *, fixed_norm: bool) -> None:
        super().__init__()
        self.weight_g = nn.Parameter(torch.ones(rows, 1), requires_grad=not fixed_norm)
        self.weight_v = nn.Parameter(nn.init.uniform_(torch.empty(rows, width), -1, 1) / math.sqrt(width))

    def forward(self, x_NE: Tensor) -> Tensor:
        return F.linear(x_NE, self.weight_g * F.normalize(self.weight_v, dim=1))


class DinoHead(nn.Module):
    """Vectors to logits over prototypes: an MLP, a unit vector in the bottleneck, cosines to K prototypes.

    `layers` linear layers with GELU between (and BatchNorm, where asked for); with one layer there is
    no hidden width. `fixed_norm` keeps the prototypes at the length they have. Parameter names are
    DINO's: `mlp.{0,2,4}` (with BatchNorm `mlp.{0,1,3,4,6}`), `last_layer.weight_g` and `weight_v`.
    """

    def __init__(
        self,
        width: int,
        prototypes: int,
        *,
        hidden: int = 2048,
        bottleneck: int = 256,
        layers: int = 3,
        batch_norm: bool = False,
        fixed_norm: bool = True,
    ) -> None:
        super().__init__()
        if min(width, hidden, bottleneck) < 1 or prototypes < 2 or layers < 1:
            raise UsageError(
                "A distillation head needs positive widths, at least 1 layer and at least 2 prototypes, got "
                f"width {width}, hidden {hidden}, bottleneck {bottleneck}, {layers} layers and "
                f"{prototypes} prototypes."
            )
        self.mlp: nn.Module
        if layers == 1:
            self.mlp = nn.Linear(width, bottleneck)
        else:
            parts: list[nn.Module] = []
            for n in range(layers - 1):
                parts.append(nn.Linear(hidden if n else width, hidden))
                if batch_norm:
                    parts.append(nn.BatchNorm1d(hidden))
                parts.append(nn.GELU())
            self.mlp = nn.Sequential(*parts, nn.Linear(hidden, bottleneck))
        for module in self.mlp.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                nn.init.zeros_(module.bias)
        self.last_layer = WeightNormLinear(bottleneck, prototypes, fixed_norm=fixed_norm)

    def bottleneck(self, x_ND: Tensor) -> Tensor:
        """x_ND -> unit vectors x_NE. BatchNorm takes its statistics over all rows given."""
        return F.normalize(self.mlp(x_ND), dim=-1)

    def forward(self, x_ND: Tensor) -> Tensor:
        return self.last_layer(self.bottleneck(x_ND))


def self_distillation(
    student_VBK: Tensor,
    teacher_GBK: Tensor,
    centre_K: Tensor,
    *,
    student_temperature: float = 0.1,
    teacher_temperature: float = 0.04,
) -> Tensor:
    """Cross-entropy of the student's views under the teacher's, a view with itself left out: (B,).

    The student's first G views are those the teacher saw. Teacher softmax((g - centre) / temperature),
    student log-softmax(s / temperature), the mean over the G * (V - 1) pairs of different views. The
    teacher is a constant. float32 whatever came in.
    """
    views, seen = len(student_VBK), len(teacher_GBK)
    if student_VBK.shape[1:] != teacher_GBK.shape[1:] or not 1 <= seen <= views or views < 2:
        raise UsageError(
            "Self-distillation needs at least two student views, the teacher's first among them, got logits "
            f"of {tuple(student_VBK.shape)} for the student and {tuple(teacher_GBK.shape)} for the teacher."
        )
    target_GBK = ((teacher_GBK.detach().float() - centre_K) / teacher_temperature).softmax(-1)
    log_VBK = F.log_softmax(student_VBK.float() / student_temperature, dim=-1)
    every_B = (target_GBK.sum(0) * log_VBK.sum(0)).sum(-1)  # the pairs of all with all, in one product
    own_B = (target_GBK * log_VBK[:seen]).sum((0, 2))
    return (own_B - every_B) / (seen * (views - 1))


def moved_centre(centre_K: Tensor, teacher_NK: Tensor, momentum: float = 0.9) -> Tensor:
    """The centre after a batch: a moving average of the mean of the teacher's raw logits."""
    mean_K = teacher_NK.float().flatten(0, -2).mean(0)
    return centre_K * momentum + mean_K.view_as(centre_K) * (1 - momentum)


def frozen_copy(module: Module) -> Module:
    """A copy that never trains: no gradients, eval mode. `move_towards` moves it."""
    return copy.deepcopy(module).requires_grad_(False).eval()


@torch.no_grad()
def move_towards(teacher: nn.Module, student: nn.Module, momentum: float, *, buffers: bool = True) -> None:
    """teacher = momentum * teacher + (1 - momentum) * student, parameter by parameter.

    With `buffers` the running statistics of BatchNorm move alike and counters are copied; without, the
    teacher keeps its own. Raises `CheckpointError` where the two have different names or shapes.
    """
    if not 0 <= momentum <= 1:
        raise UsageError(f"A momentum lies between 0 and 1, got {momentum}.")
    pairs: list[tuple[dict[str, Tensor], dict[str, Tensor]]]
    pairs = [({**dict(teacher.named_parameters())}, {**dict(student.named_parameters())})]
    if buffers:
        pairs.append((dict(teacher.named_buffers()), dict(student.named_buffers())))
    for own, other in pairs:
        wrong = sorted(own.keys() ^ other.keys()) or sorted(k for k in own if own[k].shape != other[k].shape)
        if wrong:
            raise CheckpointError(
                f"Teacher and student are not the same model: {len(wrong)} names differ or have another "
                f"shape, first {', '.join(wrong[:4])}."
            )
        for name, tensor in own.items():
            if tensor.is_floating_point():
                tensor.lerp_(other[name].to(tensor.dtype), 1 - momentum)
            else:
                tensor.copy_(other[name])


def encode_crops(encode: Callable[[Tensor], Tensor], crops_BVCHW: Tensor) -> Tensor:
    """Views of one size through a tower in one pass: vectors_BVD. A single view may lack its axis."""
    if crops_BVCHW.ndim == 4:
        crops_BVCHW = crops_BVCHW.unsqueeze(1)
    return encode(crops_BVCHW.flatten(0, 1)).unflatten(0, crops_BVCHW.shape[:2])


def cosine_ramp(step: int, steps: int, first: float, last: float, *, warmup: int = 0) -> float:
    """Half a cosine from `first` to `last`, after `warmup` steps that rise from 0 to `first` in a line.

    DINO's schedule of learning rates (`warmup` > 0) and of the teacher's momentum. The line reaches
    `first` at its last step; the cosine never quite reaches `last`: step `steps` would.
    """
    if step < warmup:
        return linear_ramp(step, warmup, 0.0, first)
    done = (min(step, steps) - warmup) / max(1, steps - warmup)
    return last + 0.5 * (first - last) * (1 + math.cos(math.pi * done))


def linear_ramp(step: int, steps: int, first: float, last: float) -> float:
    """From `first` at step 0 in a line to `last` at step `steps - 1`, and `last` from there on."""
    if step >= steps - 1:
        return first if steps == 1 and step == 0 else last
    return first + (last - first) * step / (steps - 1)
