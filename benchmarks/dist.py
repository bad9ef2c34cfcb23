"""DiST: memory and time of training the side network against fine-tuning the tower, and clips a second.

ViT-B/16 with random weights, all arms on the same clips in one run; they take turns, so that load on the
machine hits them alike. Memory is what is kept for the backward pass, weights not counted, and optimizer
state (gradient and two moments of AdamW, float32) of what trains. Texts are not part of it.

    python benchmarks/dist.py [--json] [--clips 1] [--frames 16] [--rounds 3] [--threads N]
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moviola.clip.config import TextConfig
from moviola.systems.video.dist import DiST, b_16
from turns import in_turns, ratio


def kept_mb(loss: Callable[[], Tensor], module: nn.Module) -> float:
    """MB of tensors kept for the backward pass; storages are counted once, parameters not."""
    own = {parameter.untyped_storage().data_ptr() for parameter in module.parameters()}
    held: dict[int, Tensor] = {}

    def note(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            held[storage.data_ptr()] = tensor  # held, so that no address is used twice
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        loss()
    return sum(tensor.untyped_storage().nbytes() for tensor in held.values()) / 2**20


def trained_mb(module: nn.Module) -> float:
    """MB of gradients and of AdamW's two moments."""
    return 3 * 4 * sum(p.numel() for p in module.parameters() if p.requires_grad) / 2**20


def measure(clips: int, frames: int, rounds: int) -> dict[str, dict[str, float]]:
    torch.manual_seed(0)
    small_text = TextConfig(context_length=8, vocab_size=64, width=64, layers=1, heads=1)
    config = replace(b_16(), frames=frames, clip=replace(b_16().clip, text=small_text))
    model = DiST(config)
    tower = model.clip.visual
    frames_BTCHW = torch.randn(clips, frames, 3, 224, 224)
    taps = model.taps(frames_BTCHW)

    def side() -> Tensor:
        return model.side(frames_BTCHW, model.taps(frames_BTCHW)).square().sum()

    def stored() -> Tensor:
        return model.side(frames_BTCHW, taps).square().sum()

    def through(step: int) -> Tensor:
        return tower(frames_BTCHW[:, ::step].flatten(0, 1)).vector_BD.square().sum()

    losses: dict[str, Callable[[], Tensor]] = {
        "DiST": side,
        "DiST, tokens stored": stored,
        "tower, sparse frames": lambda: through(config.alpha),
        "tower, all frames": lambda: through(1),
    }

    def step(name: str) -> Callable[[], None]:
        def run() -> None:
            model.clip.requires_grad_(name.startswith("tower"))
            losses[name]().backward()
            model.zero_grad(set_to_none=True)

        return run

    rows: dict[str, dict[str, float]] = {}
    for name, loss in losses.items():
        trains = tower if name.startswith("tower") else model.dist_net
        tower.requires_grad_(trains is tower)
        rows[name] = {
            "kept for backward, MB": kept_mb(loss, model),
            "gradients and moments, MB": trained_mb(trains),
        }
    tower.requires_grad_(False)
    steps = in_turns({name: step(name) for name in losses}, rounds)
    tower.requires_grad_(False)
    with torch.inference_mode():
        forward = in_turns(dict(losses), rounds)
    for name in losses:
        rows[name] |= {
            "training, s a clip": statistics.median(steps[name]) / clips,
            "forward, clips/s": clips / statistics.median(forward[name]),
        }
    full = "tower, sparse frames"
    rows["ratios"] = {
        "memory, tower on the same frames / DiST": sum(list(rows[full].values())[:2])
        / sum(list(rows["DiST"].values())[:2]),
        "kept for backward, tower on the same frames / DiST": rows[full]["kept for backward, MB"]
        / rows["DiST"]["kept for backward, MB"],
        "training time, tower on the same frames / DiST": ratio(steps, full, "DiST"),
        "training time, tower on all frames / DiST": ratio(steps, "tower, all frames", "DiST"),
        "training time, tower on the same frames / DiST, tokens stored": ratio(
            steps, full, "DiST, tokens stored"
        ),
        "forward clips/s, DiST / tower on the same frames": ratio(forward, full, "DiST"),
        "forward clips/s, DiST / tower on all frames": ratio(forward, "tower, all frames", "DiST"),
    }
    rows["ratios"] |= against_formula(model, frames_BTCHW, taps, rounds)
    return rows


def against_formula(
    model: DiST, frames_BTCHW: Tensor, taps: dict[int, Tensor], rounds: int
) -> dict[str, float]:
    """Our forms of the blocks against convolutions and `nn.MultiheadAttention` of the same weights."""
    net: Any = model.dist_net
    config = model.config
    fuse, inner = net.temporal2integration_nets[0], net.integration_nets[0]
    pool, wide = net.adapooling_nets[0].spatial_transformer, config.integration_dim
    theirs = nn.MultiheadAttention(wide, config.heads, batch_first=True)
    theirs.load_state_dict(pool.attn.state_dict())
    x_BCTHW = net.temporal_stem(frames_BTCHW.transpose(1, 2)).detach()
    feature_FLC = net.input_linears[0](taps[config.selected[0]]).detach()
    feature_BtLC = feature_FLC.unflatten(0, (-1, config.sparse))
    query_FC = torch.randn(len(feature_FLC), wide)
    mlp = inner.temporal_ffn

    def mlp_of_convolutions() -> Tensor:
        y_BCtL1 = mlp.c_fc2(mlp.c_fc1(feature_BtLC.permute(0, 3, 1, 2)[..., None]))
        return mlp.c_proj(mlp.act(y_BCtL1)).squeeze(-1).permute(0, 2, 3, 1).contiguous()

    cases: dict[str, tuple[Callable[[], object], Callable[[], object]]] = {
        "MLP over time": (lambda: mlp(feature_BtLC), mlp_of_convolutions),
        "fusion of alpha frames": (
            lambda: fuse(x_BCTHW.movedim(1, -1)),
            lambda: F.pad(fuse.linear_fuse(x_BCTHW).flatten(3).permute(0, 2, 3, 1), (0, 0, 1, 0)),
        ),
        "attention of one query": (
            lambda: pool.attn(query_FC, feature_FLC),
            lambda: theirs(query_FC[:, None], feature_FLC, feature_FLC, need_weights=False),
        ),
    }
    found = {}
    with torch.inference_mode():
        for name, (ours, formula) in cases.items():
            times = in_turns({"ours": ours, "formula": formula}, 5 * rounds)
            found[f"{name}, formula / ours"] = ratio(times, "formula", "ours")
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--clips", type=int, default=1)
    parser.add_argument("--frames", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    rows = measure(options.clips, options.frames, options.rounds)
    about = {"torch": torch.__version__, **{k: v for k, v in vars(options).items() if k != "json"}}
    if options.json:
        print(json.dumps({**about, "rows": rows}, indent=2))
        return
    print(f"ViT-B/16, random weights, {about}")
    for name, figures in rows.items():
        print(f"\n{name}")
        for what, value in figures.items():
            print(f"  {what:62} {value:10.3f}")


if __name__ == "__main__":
    main()
