"""M2-CLIP: clips a second beside plain CLIP and the adapter as released, and what training costs.

ViT-B/32 with random weights, all arms on the same clips in one run; they take turns, and times are CPU
seconds. "As released" are the same weights through the convolutions of PyTorch, with their transpositions,
and texts over the whole context, each clip's own one too. Memory is what is kept for the backward pass,
weights not counted, and what AdamW holds for the weights that train (`benchmarks/dist.py`).

    python benchmarks/m2_clip.py [--json] [--clips 2] [--classes 10] [--rounds 3] [--threads N]
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
import time
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dist import kept_mb, trained_mb
from moviola.clip.model import CLIP
from moviola.data.order_clips import clip_batch
from moviola.parts.ted_adapter import TedAdapter
from moviola.systems.video.m2_clip import M2Clip, M2Recognition, b_32
from turns import in_turns


class Released(TedAdapter):
    """The adapter as the paper's figure and the authors' code have it."""

    def forward(self, x_FLD: Tensor) -> Tensor:
        x_BTLD = x_FLD.unflatten(0, (-1, self.frames))
        lines = self.fc1(x_BTLD).permute(0, 2, 3, 1).flatten(0, 1)
        found = nn.Conv1d.forward(self.conv, lines).unflatten(0, (len(x_BTLD), -1)).permute(0, 3, 1, 2)
        patches, inner = x_BTLD[:, :, 1:], self.offset_adapter
        change = patches - torch.cat([patches[:, :1], patches[:, :-1]], dim=1)
        side = round(patches.shape[2] ** 0.5)
        cube = inner.fc1(change).unflatten(2, (side, side)).permute(0, 4, 1, 2, 3)
        moved = inner.fc2(nn.Conv3d.forward(inner.conv, cube).permute(0, 2, 3, 4, 1).flatten(2, 3))
        return (x_BTLD + self.fc2(found) + F.pad(moved, (0, 0, 1, 0))).flatten(0, 1)


def as_released(model: M2Clip) -> M2Clip:
    made = copy.deepcopy(model)
    for part in made.modules():
        if isinstance(part, TedAdapter):
            part.__class__ = Released
    return made


def measure(clips: int, classes: int, rounds: int) -> dict[str, Any]:
    torch.manual_seed(0)
    plain = CLIP(b_32()).eval()
    model = M2Clip.from_clip(plain, text_adapters=2)  # as B/16: an adapter in the way of texts
    for name, parameter in model.named_parameters():
        if ".conv." in name:
            nn.init.normal_(parameter, std=0.1)
    released = as_released(model)
    batch = clip_batch(torch.randn(clips, 8, 3, 224, 224))
    tokens_CL = torch.zeros(classes, 77, dtype=torch.int64)
    for row, text_L in enumerate(tokens_CL):
        text_L[:8] = torch.tensor([49406, 320, 1455, 539, 1000 + row, 2000 + row, 3000, 49407])
    label_B = torch.arange(clips) % classes
    objective = M2Recognition(model, tokens_CL, mask_chance=0)
    for name, parameter in released.named_parameters():
        parameter.requires_grad_("adapter" in name and not name.startswith("mlm_adapter"))

    def frozen(module: CLIP) -> Any:
        def call() -> Tensor:
            with torch.inference_mode():
                return module.encode_video(batch)

        return call

    def ours() -> Tensor:
        return torch.stack(list(objective(model, {"clip": batch, "label": label_B}).values())).sum()

    def theirs() -> Tensor:
        released.set_classes(classes)
        seen = released.look(batch)
        text_CE, text_BE = (released.forward_text(t).vector_BD for t in (tokens_CL, tokens_CL[label_B]))
        logits_BB, logits_BC = (released.score(t, seen.video_BE).T for t in (text_BE, text_CE))
        head = F.cross_entropy(released.class_logits(seen), label_B)
        return head + F.cross_entropy(logits_BC, label_B) + F.cross_entropy(logits_BB, label_B.argsort())

    fine = copy.deepcopy(plain).requires_grad_(True)

    def all_of_clip() -> Tensor:
        scores_CB = fine.score(fine.encode_text(tokens_CL), fine.encode_video(batch))
        return F.cross_entropy(scores_CB.T, label_B)

    def step(loss: Any) -> Any:
        return lambda: cast(Tensor, loss()).backward()

    losses = {"m2-clip": ours, "as released": theirs, "all of clip": all_of_clip}
    calls = {
        "clip": frozen(plain),
        "m2-clip": frozen(model),
        "as released": frozen(released),
        **{f"step, {name}": step(loss) for name, loss in losses.items()},
    }
    times = in_turns(calls, rounds, clock=time.process_time)
    modules = {"m2-clip": model, "as released": released, "all of clip": fine}
    return {
        "CPU seconds": {name: round(statistics.median(found), 3) for name, found in times.items()},
        "kept MB": {name: round(kept_mb(loss, modules[name])) for name, loss in losses.items()},
        "optimizer MB": {name: round(trained_mb(module)) for name, module in modules.items()},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", action="store_true")
    for name, default in (("clips", 2), ("classes", 10), ("rounds", 3), ("threads", 0)):
        parser.add_argument(f"--{name}", type=int, default=default)
    asked = parser.parse_args()
    if asked.threads:
        torch.set_num_threads(asked.threads)
    found = measure(asked.clips, asked.classes, asked.rounds)
    if asked.json:
        print(json.dumps(found))
        return
    for kind, figures in found.items():
        for name, value in figures.items():
            print(f"{kind:13s} {name:18s} {value}")


if __name__ == "__main__":
    main()
