"""Ways against forgetting that VR-LwF is compared with, each written here after its paper.

    Imm    weights between before and after each task: Lee et al., arXiv 1703.08475 (mean-IMM)
    GeoDl  vectors held along the geodesic between old and new subspaces: Simon et al., arXiv 2104.08572
    AGem   gradients that would harm earlier tasks' pictures are projected: Chaudhry et al., arXiv 1812.00420
    Rkr    low-rank rectifications and scales of frozen weights: Singh et al., arXiv 2103.16597

Where the authors of VR-LwF ran them otherwise than their papers, the class says what is done here.

Axis letters: B pictures, S classes, N vectors, D width, K dimensions of a subspace, O and I outputs and
inputs of a layer, R rank.
"""

from __future__ import annotations

from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrize

from moviola.training.averaging import interpolate
from moviola.training.continual import (
    FineTune,
    Part,
    Task,
    Taught,
    image_vectors,
    scale_of,
    text_vectors,
)
from moviola.types import Batch, UsageError


class Imm(FineTune):
    """Fine-tuning, then the mean of the weights before and after each task.

    share  of the trained weights in the mean. Training goes on from it; the authors of VR-LwF measure the
           mean and go on from the trained weights.
    """

    def __init__(
        self,
        model: nn.Module,
        task: Task,
        *,
        share: float = 0.5,
        part: Part = "both",
        above: int | None = None,
    ) -> None:
        super().__init__(model, task, part=part, above=above)
        if not 0 < share <= 1:
            raise UsageError(f"share lies above 0 and is at most 1, got {share}.")
        self.share = share
        self._before = {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}

    def finish(self, model: nn.Module) -> None:
        model.load_state_dict(interpolate(self._before, model.state_dict(), self.share))


# --------------------------------------------------------------------------------------------------
# GeoDL
# --------------------------------------------------------------------------------------------------


def subspace(vectors_ND: Tensor, most: int) -> Tensor:
    """An orthonormal basis_DK of the centred rows' directions, the largest first; K is at most `most`."""
    centred_ND = vectors_ND - vectors_ND.mean(0)
    _, length_K, basis_KD = torch.linalg.svd(centred_ND, full_matrices=False)
    kept = int((length_K > 1e-6 * length_K[0].clamp_min(1e-12)).sum())
    return basis_KD[: min(most, kept)].T


def geodesic_flow_kernel(old_DK: Tensor, new_DK: Tensor) -> Tensor:
    """The kernel_DD that sums projections onto all subspaces on the geodesic between two (Gong et al. 2012).

    Orthonormal columns. With principal angles a, the flow is P cos(t a) + Q sin(t a), t from 0 to 1, where P
    and Q are the matching directions of the old subspace and across it; the kernel is its integral.
    """
    if old_DK.shape != new_DK.shape:
        raise UsageError(f"Two subspaces of one size are needed, got {old_DK.shape} and {new_DK.shape}.")
    old_KK, cosine_K, new_KK = torch.linalg.svd(old_DK.T @ new_DK)
    along_DK = old_DK @ old_KK
    across_DK = new_DK @ new_KK.T - along_DK * cosine_K
    sine_K = across_DK.norm(dim=0)
    across_DK = across_DK / sine_K.clamp_min(1e-12)
    angle_K = torch.atan2(sine_K, cosine_K)
    # the integrals of cos^2, cos sin and sin^2 of t a; `sinc` is sin(pi x) / (pi x), 1 at 0
    turn_K = torch.sinc(2 * angle_K / torch.pi)
    mixed_K = torch.where(angle_K > 1e-6, torch.sin(angle_K) ** 2 / (2 * angle_K.clamp_min(1e-6)), 0.0)
    cross_DD = (along_DK * mixed_K) @ across_DK.T
    return (
        (along_DK * (1 + turn_K) / 2) @ along_DK.T
        + cross_DD
        + cross_DD.T
        + (across_DK * (1 - turn_K) / 2) @ across_DK.T
    )


def geodesic_distance(new_ND: Tensor, old_ND: Tensor) -> Tensor:
    """The mean of (new - old)^T G (new - old); G, the kernel of their subspaces, takes no gradient.

    Zero where there are too few rows for a subspace (fewer than three).
    """
    if len(new_ND) < 3:
        return new_ND.sum() * 0
    with torch.no_grad():
        most = min(len(new_ND) - 2, new_ND.shape[1] // 2)
        old_DK, now_DK = subspace(old_ND, most), subspace(new_ND, most)
        size = min(old_DK.shape[1], now_DK.shape[1])
        kernel_DD = geodesic_flow_kernel(old_DK[:, :size], now_DK[:, :size])
    change_ND = new_ND - old_ND
    return ((change_ND @ kernel_DD) * change_ND).sum(1).mean()


class GeoDl(Taught):
    """Fine-tuning, with the change of pictures' and class names' vectors measured along the geodesic.

    As the authors of VR-LwF have it: the squared change of unit vectors under the kernel, once for the
    batch's pictures and once for the classes seen so far, each weighed by alpha (GeoDL's paper takes one
    less a cosine under the kernel). Subspaces have at most half the width of the vectors.
    """

    def __init__(
        self,
        model: nn.Module,
        task: Task,
        teacher: nn.Module | None = None,
        *,
        alpha: float = 0.5,
        part: Part = "both",
        above: int | None = None,
    ) -> None:
        super().__init__(model, task, teacher, alpha=alpha, part=part, above=above)
        with torch.no_grad():
            taught_SD = text_vectors(self.teacher, self.tokens_SKL)[0]
        self.register_buffer("_taught_SD", taught_SD, persistent=False)

    def competing(self) -> tuple[int, ...]:
        return self.task.seen

    def losses(self, model: nn.Module, batch: Batch) -> dict[str, Tensor]:
        text_SD, _ = text_vectors(model, self.tokens_SKL)
        image_BD = image_vectors(model, batch["image"])
        with torch.no_grad():
            taught_BD = image_vectors(self.teacher, batch["image"])
        logits_BS = scale_of(model) * image_BD @ text_SD.T
        return {
            "cross_entropy": self.cross_entropy(logits_BS, batch["label"]),
            "geodesic_image": self.alpha * geodesic_distance(image_BD, taught_BD),
            "geodesic_text": self.alpha * geodesic_distance(text_SD, cast(Tensor, self._taught_SD)),
        }


# --------------------------------------------------------------------------------------------------
# A-GEM
# --------------------------------------------------------------------------------------------------


class AGem(FineTune):
    """Fine-tuning with a small memory of earlier tasks' pictures, whose loss no step may raise.

    memory        pictures of each earlier class that are kept
    memory_batch  of them at a step

    Where the step's gradient g points against r, that of the memory's cross-entropy over all classes seen,
    it becomes g - (g.r / r.r) r. The authors of VR-LwF also remember pictures and texts of the web.
    """

    def __init__(
        self,
        model: nn.Module,
        task: Task,
        *,
        memory: int = 20,
        memory_batch: int = 32,
        part: Part = "both",
        above: int | None = None,
    ) -> None:
        super().__init__(model, task, part=part, above=above)
        if memory < 1 or memory_batch < 1:
            raise UsageError(f"memory and memory_batch are at least 1, got {memory} and {memory_batch}.")
        self.memory, self.memory_batch = memory, memory_batch
        place_C = torch.full((len(task.tokens_CKL),), -1)
        place_C[list(task.seen)] = torch.arange(len(task.seen))
        device = self.tokens_SKL.device
        self.register_buffer("_seen_SKL", task.tokens_CKL[list(task.seen)].to(device), persistent=False)
        self.register_buffer("_seen_place_C", place_C.to(device), persistent=False)

    def remembered(self, model: nn.Module, batch: Batch) -> Tensor:
        """The loss of earlier tasks' pictures over all classes seen."""
        text_SD, _ = text_vectors(model, cast(Tensor, self._seen_SKL))
        logits_BS = scale_of(model) * image_vectors(model, batch["image"]) @ text_SD.T
        return F.cross_entropy(logits_BS, cast(Tensor, self._seen_place_C)[batch["label"]])

    def before_step(self, model: nn.Module) -> None:
        if self.task.earlier is None:
            return
        batch = self.task.earlier(self.memory, self.memory_batch, int(self.steps_done))
        device = self.tokens_SKL.device
        batch = {name: batch[name].to(device) for name in ("image", "label")}
        known = dict(model.named_parameters())
        taught = [known[name] for name in self.trained if known[name].grad is not None]
        reference = torch.autograd.grad(self.remembered(model, batch), taught, allow_unused=True)
        pairs = [(p.grad, r) for p, r in zip(taught, reference, strict=True) if r is not None]
        project([g for g, _ in pairs if g is not None], [r for _, r in pairs])


@torch.no_grad()
def project(gradients: list[Tensor], reference: list[Tensor]) -> None:
    """Take out of `gradients`, in place, what points against `reference`; all tensors as one vector."""
    along = torch.stack([(g * r).sum() for g, r in zip(gradients, reference, strict=True)]).sum()
    length = torch.stack([(r * r).sum() for r in reference]).sum()
    if float(along) < 0 and float(length) > 0:
        for gradient, other in zip(gradients, reference, strict=True):
            gradient.sub_(other * (along / length))


# --------------------------------------------------------------------------------------------------
# RKR
# --------------------------------------------------------------------------------------------------


class _Rectified(nn.Module):
    """weight_OI -> scale_O (weight_OI + up_OR down_RI)."""

    def __init__(self, weight_OI: Tensor, rank: int) -> None:
        super().__init__()
        outputs, inputs = weight_OI.shape
        self.scale_O = nn.Parameter(weight_OI.new_ones(outputs))
        self.up_OR = nn.Parameter(weight_OI.new_zeros(outputs, rank))
        self.down_RI = nn.Parameter(nn.init.normal_(weight_OI.new_empty(rank, inputs), std=1 / rank))

    def forward(self, weight_OI: Tensor) -> Tensor:
        return self.scale_O.unsqueeze(1) * (weight_OI + self.up_OR @ self.down_RI)


class _Scaled(nn.Module):
    """bias_O -> scale_O bias_O, with the scale of the layer's weight."""

    def __init__(self, rectified: _Rectified) -> None:
        super().__init__()
        self._rectified = (rectified,)  # a tuple: its parameters belong to the weight

    def forward(self, bias_O: Tensor) -> Tensor:
        return self._rectified[0].scale_O * bias_O


class Rkr(FineTune):
    """Only small rectifications train: each linear layer in the blocks is frozen, and becomes
    scale * (W x + b + up down x) with a low `rank`. After the task they are merged into the weights, which
    is exact, so that the result is a plain model and the next task rectifies that anew.
    """

    def __init__(
        self,
        model: nn.Module,
        task: Task,
        *,
        rank: int = 4,
        part: Part = "both",
        above: int | None = None,
    ) -> None:
        super().__init__(model, task, part=part, above=above)
        if rank < 1:
            raise UsageError(f"rank must be at least 1, got {rank}.")
        allowed = {name.rpartition(".")[0] for name in self.trained}
        self._layers = [
            layer
            for name, layer in model.named_modules()
            if isinstance(layer, nn.Linear) and ".resblocks." in f".{name}" and name in allowed
        ]
        if not self._layers:
            raise UsageError("The part of the model that trains has no linear layers in blocks to rectify.")
        model.requires_grad_(False)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(task.seed)
            for layer in self._layers:
                rectified = _Rectified(layer.weight.detach(), min(rank, *layer.weight.shape))
                parametrize.register_parametrization(layer, "weight", rectified)
                if layer.bias is not None:
                    parametrize.register_parametrization(layer, "bias", _Scaled(rectified))
        self.trained = [name for name, parameter in model.named_parameters() if parameter.requires_grad]

    def finish(self, model: nn.Module) -> None:
        for layer in self._layers:
            for name in list(cast(Any, layer).parametrizations):
                parametrize.remove_parametrizations(layer, name, leave_parametrized=True)
        model.requires_grad_(True)
