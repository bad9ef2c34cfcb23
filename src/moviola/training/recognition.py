"""Training video (or image) encoders to name the class of a clip among texts.

The recipe that X-CLIP, ViFi-CLIP, ILA and DiST share: every class is a text, the scores of a clip against
all of them are logits, targets are smoothed and mixed (Zhang et al. 2018, mixup; Yun et al. 2019, CutMix).

Axis letters: B clips of a batch, T frames, C classes (or channels), H height, W width, L tokens, D width.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any, Literal, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moviola.parts.fixed_frames import hold_last_frame
from moviola.training.objectives import BaseObjective, decay_groups
from moviola.types import Batch, ClipBatch, LabelField, Needs, UsageError, VideoField


def soft_targets(label_B: Tensor, classes: int, smoothing: float) -> Tensor:
    """target_BC: 1 - smoothing on the class, and smoothing spread over all classes."""
    target_BC = torch.full((len(label_B), classes), smoothing / classes, device=label_B.device)
    return target_BC.scatter_(1, label_B[:, None], 1 - smoothing + smoothing / classes)


def mix_clips(
    frames_BTCHW: Tensor, target_BC: Tensor, *, mixup: float, cutmix: float, switch: float = 0.5
) -> tuple[Tensor, Tensor]:
    """Each clip blended with (mixup) or partly covered by (CutMix) the one opposite it in the batch.

    One ratio a batch, drawn from Beta(a, a) with a = `mixup` or `cutmix`; `switch` is the chance of CutMix
    where both are above 0. All frames of a clip are mixed alike; the covered box's true share weighs the
    targets. Draws come from torch's global generator.
    """
    if mixup < 0 or cutmix < 0:
        raise UsageError(f"mixup and cutmix must not be negative, got {mixup} and {cutmix}.")
    if not (mixup or cutmix) or len(frames_BTCHW) < 2:
        return frames_BTCHW, target_BC
    cut = cutmix > 0 and (mixup == 0 or float(torch.rand(())) < switch)
    alpha = cutmix if cut else mixup
    share = float(torch.distributions.Beta(alpha, alpha).sample())
    other_BTCHW, other_BC = frames_BTCHW.flip(0), target_BC.flip(0)
    if cut:
        height, width = frames_BTCHW.shape[-2:]
        side = (1 - share) ** 0.5
        centre_y, centre_x = float(torch.rand(())) * height, float(torch.rand(())) * width
        top, bottom = (min(max(round(centre_y + s * side * height / 2), 0), height) for s in (-1, 1))
        left, right = (min(max(round(centre_x + s * side * width / 2), 0), width) for s in (-1, 1))
        frames_BTCHW = frames_BTCHW.clone()
        frames_BTCHW[..., top:bottom, left:right] = other_BTCHW[..., top:bottom, left:right]
        share = 1 - (bottom - top) * (right - left) / (height * width)
    else:
        frames_BTCHW = share * frames_BTCHW + (1 - share) * other_BTCHW
    return frames_BTCHW, share * target_BC + (1 - share) * other_BC


def hold_last_frames(clip: ClipBatch) -> ClipBatch:
    """A clip that is shorter than the one opposite it stays on its last frame for as long.

    Mixed with padding instead, the longer one would fade to grey where the other has ended.
    """
    mask_BT = clip.mask_BT
    if bool(mask_BT.all()):
        return clip
    both_BT = mask_BT | mask_BT.flip(0)
    frames_BTCHW = hold_last_frame(clip.frames_BTCHW, mask_BT) * both_BT[..., None, None, None]
    return replace(clip, frames_BTCHW=frames_BTCHW, mask_BT=both_BT)


class Recognition(BaseObjective):
    """Cross-entropy of a clip's scores against the texts of all classes.

    tokens_CL     the class texts. Where the text tower is frozen they are encoded once
    train         which parameters train: `all`, or those whose name holds one of these words
    lr_scales     a factor of the learning rate for names that hold a word; the first that fits

    A system with further losses overrides `losses`; one whose class texts depend on the clip needs nothing
    else, since the model's own `score` decides. Videos come as `clip`, labels as `label`.
    """

    needs: Needs = Needs((VideoField(), LabelField()))
    scope: Literal["pair", "token", "local"] = "local"
    words = True  # whether the model must read the classes' names

    def __init__(
        self,
        model: nn.Module,
        tokens_CL: Tensor,
        *,
        train: str | Sequence[str] = "all",
        lr_scales: Mapping[str, float] | None = None,
        label_smoothing: float = 0.1,
        mixup: float = 0.8,
        cutmix: float = 1.0,
        switch: float = 0.5,
        weight_decay: float = 0.001,
    ) -> None:
        super().__init__()
        if not 0 <= label_smoothing < 1:
            raise UsageError(f"label_smoothing lies in [0, 1), got {label_smoothing}.")
        if len(tokens_CL) < 2:
            raise UsageError(f"Recognition needs two classes or more, got {len(tokens_CL)}.")
        self.register_buffer("tokens_CL", tokens_CL, persistent=False)
        self.label_smoothing, self.mixup, self.cutmix, self.switch = label_smoothing, mixup, cutmix, switch
        self.weight_decay, self.lr_scales = weight_decay, dict(lr_scales or {})
        train = (train,) if isinstance(train, str) and train != "all" else train
        names = [name for name, _ in model.named_parameters()]
        chosen = names if train == "all" else [n for n in names if any(word in n for word in train)]
        if not chosen:
            raise UsageError(f"No parameter's name holds any of {', '.join(train)}.")
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(name in chosen)
        text = ("token_embedding", "transformer.", "ln_final", "text_projection", "positional_embedding")
        self.frozen_text = train != "all" and not any(n.startswith(text) for n in chosen)
        self._text_CD: Tensor | None = None

    def text(self, model: Any) -> Tensor:
        """text_CD of the classes; kept where the text tower does not train."""
        tokens_CL = self.get_buffer("tokens_CL")
        if not self.frozen_text:
            return model.encode_text(tokens_CL)
        if self._text_CD is None or self._text_CD.device != tokens_CL.device:
            with torch.no_grad():
                self._text_CD = model.encode_text(tokens_CL).clone()
        return self._text_CD

    def losses(self, model: Any, clip: ClipBatch, target_BC: Tensor) -> dict[str, Tensor]:
        """Named losses of mixed clips and their targets."""
        scores_CB = model.score(self.text(model), model.encode_video(clip), clip.mask_BT)
        return {"class": F.cross_entropy(scores_CB.T.float(), target_BC)}

    def forward(self, model: nn.Module, batch: Batch) -> dict[str, Tensor]:
        clip, label_B = cast(ClipBatch, batch["clip"]), cast(Tensor, batch["label"])
        classes = len(self.get_buffer("tokens_CL"))
        if int(label_B.max()) >= classes or int(label_B.min()) < 0:
            raise UsageError(f"Labels must be class numbers in 0..{classes - 1}, got {label_B.tolist()}.")
        target_BC = soft_targets(label_B, classes, self.label_smoothing)
        if self.mixup or self.cutmix:
            clip = hold_last_frames(clip)
        frames_BTCHW, target_BC = mix_clips(
            clip.frames_BTCHW, target_BC, mixup=self.mixup, cutmix=self.cutmix, switch=self.switch
        )
        return self.losses(model, replace(clip, frames_BTCHW=frames_BTCHW), target_BC)

    def param_groups(self, model: nn.Module) -> Iterable[dict[str, Any]]:
        """Groups by learning-rate factor, each split by whether weights decay."""
        by_scale: dict[float, dict[str, nn.Parameter]] = {}
        for name, parameter in model.named_parameters():
            scale = next((s for word, s in self.lr_scales.items() if word in name), 1.0)
            by_scale.setdefault(scale, {})[name.replace(".", "/")] = parameter
        for scale, named in by_scale.items():
            holder = nn.ParameterDict(named)
            for group in decay_groups(holder, self.weight_decay):
                if group["params"]:
                    yield {**group, "lr_scale": scale}


class HeadRecognition(Recognition):
    """The same losses on the logits of the model's own classifier, for encoders without words.

    The model has `set_classes(count)`, which gives it a new head, and `classify_video`. tokens_CL only
    says how many classes there are. Every weight trains by default.
    """

    words = False

    def __init__(self, model: Any, tokens_CL: Tensor, **options: Any) -> None:
        model.set_classes(len(tokens_CL))
        super().__init__(model, tokens_CL, **options)

    def losses(self, model: Any, clip: ClipBatch, target_BC: Tensor) -> dict[str, Tensor]:
        return {"class": F.cross_entropy(model.classify_video(clip).float(), target_BC)}
