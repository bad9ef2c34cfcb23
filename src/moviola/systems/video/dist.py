"""DiST: a small network beside a frozen image tower learns what happens between the frames.

The image tower is not trained and no gradient passes through it: it looks at every alpha-th frame and hands
over its tokens after every layer. Beside it, a narrow temporal stream sees all frames from their pixels, and
an integration stream joins both, layer by layer: it takes the tower's tokens and what the temporal stream
found, and tells the temporal stream what it has. At the end a learned token gathers each frame, another one
the clip. Training therefore costs the memory of the side network alone, and the tower's tokens may be stored.

Qing, Zhang, Huang, Zhang, Gao, Zhao, Sang: "Disentangling Spatial and Temporal Learning for Efficient
Image-to-Video Transfer Learning", ICCV 2023, arXiv 2309.07911. Official code: alibaba-mmai-research/DiST (no
licence found for it; its CLIP part is MIT).

Symbols: C_i is `integration_dim`, C_t `temporal_dim`, alpha `alpha`; the temporal stem and nets, the fusions
and the pooling layers are in `parts.side_network`, their order in `SideNetwork.forward`.

Known differences
- Errors instead of silent mistakes: officially clips of another length are mixed where their frames still
  divide by T, and patches are laid out by the integer root of their number; other grids work here.
- The released ViT-L/14 configurations say stem patches of 16 pixels, whose 14 x 14 do not fit that tower's
  16 x 16: the stem takes the tower's patch size, and another one is an error.
- The last layer's fusion into the temporal stream leads nowhere; its weights are kept for checkpoints, are
  not used and do not train. Officially it is computed.
- The released optimizer file does not run (it indexes lists by whole parameter groups), lists the biases of
  the pooling layers twice and the other biases never: here all train, without decay.
- The tower sees the frames it keeps (officially all are embedded, and those between are then dropped), and a
  picture passes it once: equal results.
- Colour augmentation is left out; mixed precision is an option of the training loop.

Axis letters: B clips, T dense frames, t = T / alpha sparse frames, F = B * t, L tokens of a frame (class
token first), D width of the tower, C channels of a stream (or classes), H, W patches (or pixels), E embedding
width, N texts, M videos.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from functools import lru_cache
from typing import Any, Literal, cast

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moviola.clip.blocks import TowerOutput
from moviola.clip.config import ClipConfig, TextConfig, VitConfig, vit_l_14
from moviola.clip.formats.common import scalar_logit_scale
from moviola.clip.formats.openai import infer_config
from moviola.clip.keys import Keys, Rule
from moviola.clip.model import CLIP, mean_of_frames
from moviola.clip.native import assign
from moviola.clip.weights import strip_prefix
from moviola.data import order_clips as world
from moviola.metrics.classification import topk_accuracy
from moviola.parts import side_network as blocks
from moviola.parts.fixed_frames import FixedFrames
from moviola.parts.side_network import DistConfig, side_sizes
from moviola.training.recognition import Recognition
from moviola.types import Claim, ClipBatch, Example, Training

Config = DistConfig


def b_16() -> DistConfig:
    return DistConfig()


def l_14() -> DistConfig:
    """The paper's largest: 32 of 64 frames; four pooling layers as on Kinetics (on SSv2 two)."""
    return DistConfig(vit_l_14(), frames=64, pool_layers=4)


class SideNetwork(nn.Module):
    """Dense frames and the tower's tokens of the sparse ones -> video_BE, not normalised."""

    def __init__(self, config: DistConfig) -> None:
        super().__init__()
        self.config = config
        wide, narrow, width = config.integration_dim, config.temporal_dim, config.vision.width
        time, side, count = config.stem_kernel, config.patch, range(len(config.selected))
        self.temporal_stem = nn.Conv3d(
            3, narrow, (time, side, side), stride=(1, side, side), padding=(time // 2, 0, 0)
        )
        self.temporal_nets = nn.ModuleList(
            blocks.TemporalNet(narrow, config.temporal_ratio, config.kernel) for _ in count
        )
        self.input_linears = nn.ModuleList(nn.Linear(width, wide) for _ in count)
        self.integration2temporal_nets = nn.ModuleList(blocks.ToTemporal(wide, narrow) for _ in count)
        self.temporal2integration_nets = nn.ModuleList(
            blocks.ToIntegration(narrow, wide, config.alpha, config.sparse) for _ in count
        )
        self.integration_nets = nn.ModuleList(
            blocks.Integration(
                wide, config.integration_ratio, config.integration_temporal_ratio, config.kernel
            )
            for _ in count
        )
        self.aggregated_cls_token = blocks.token(1, 1, wide)
        self.aggregated_spatial_cls_token = blocks.token(1, 1, wide)
        self.adapooling_nets = nn.ModuleList(
            blocks.AdaPooling(wide, config.heads, config.sparse) for _ in range(config.pool_layers)
        )
        self.proj_spatial_cls_token = nn.Linear(width, wide)
        self.ln_post = nn.LayerNorm(wide)
        self.proj = nn.Parameter(wide**-0.5 * torch.randn(wide, config.clip.embed_dim))
        blocks.start_small(self)
        self.unused.requires_grad_(False)

    @property
    def unused(self) -> nn.Module:
        """The last layer's way into the temporal stream, which nothing reads."""
        return self.integration2temporal_nets[-1]

    def forward(self, frames_BTCHW: Tensor, taps: Mapping[int, Tensor]) -> Tensor:
        """`taps`: tokens_FLD after each selected layer, the t frames of a clip together and in order."""
        grid = torch.Size(side // self.config.patch for side in frames_BTCHW.shape[-2:])
        blocks.check_taps(self.config, frames_BTCHW, taps, 1 + grid.numel())
        x_BTHWC = self.temporal_stem(frames_BTCHW.transpose(1, 2)).movedim(1, -1)
        found: Tensor | float = 0.0
        for n, layer in enumerate(self.config.selected):
            tokens_BtLD = taps[layer].unflatten(0, (-1, self.config.sparse))
            x_BTHWC = self.temporal_nets[n](x_BTHWC)
            taken_BtLC = self.input_linears[n](tokens_BtLD) + found
            joined_BtLC = taken_BtLC + self.temporal2integration_nets[n](x_BTHWC)
            found = self.integration_nets[n](joined_BtLC)
            if n + 1 < len(self.temporal_nets):  # the same for a sparse frame and those skipped after it
                told_Bt1HWC = self.integration2temporal_nets[n](taken_BtLC).unflatten(2, grid).unsqueeze(2)
                x_BTHWC = (x_BTHWC.unflatten(1, (-1, self.config.alpha)) + told_Bt1HWC).flatten(1, 2)
        feature_BtLC = found + joined_BtLC
        top_BC = self.aggregated_cls_token[0].expand(len(frames_BTCHW), -1)
        spatial_BtC = self.aggregated_spatial_cls_token.expand(*feature_BtLC.shape[:2], -1)
        for pool in self.adapooling_nets:
            top_BC, spatial_BtC = pool(feature_BtLC, top_BC, spatial_BtC)
        cls_BD = tokens_BtLD[:, :, 0].mean(dim=1)
        return self.ln_post(top_BC + self.proj_spatial_cls_token(cls_BD)) @ self.proj


class DiST(FixedFrames, nn.Module):
    """A frozen CLIP for words and frames, and the network beside it for clips: an `Encoder`, separable.

    The vectors mean something once the side network is trained. `with_clip` averages scores with those of the
    frame mean of plain CLIP, when not in training; it may be set on the model.
    """

    has_text = True
    separable = True
    adaptation: Literal["none"] = "none"

    def __init__(self, config: DistConfig) -> None:
        super().__init__()
        self.config, self.frames, self.with_clip = config, config.frames, config.with_clip
        self.clip = CLIP(config.clip)
        self.dim, self.context_length = self.clip.dim, self.clip.context_length
        self.dist_net = SideNetwork(config)
        self.freeze()

    @classmethod
    def from_config(cls, data: Mapping[str, Any]) -> DiST:
        """Untrained, from the JSON form of its configuration."""
        return cls(DistConfig.from_json(data))

    @classmethod
    def from_clip(cls, clip: CLIP, **options: Any) -> DiST:
        """This CLIP with a new side network; `options` are fields of the configuration."""
        made = cls(DistConfig.over(clip.config, **options))
        made.clip.load_state_dict(clip.state_dict())
        return made.eval()

    @classmethod
    def from_official(cls, state: Mapping[str, Tensor], layers: Sequence[int] = ()) -> DiST:
        """The authors' checkpoint; sizes follow from its shapes, `layers` is all unless said."""
        state = strip_prefix(strip_prefix(dict(state), "module."), OFFICIAL_PREFIX)
        side = {n.removeprefix("dist_net."): t for n, t in state.items() if n.startswith("dist_net.")}
        plain = scalar_logit_scale({n: t for n, t in state.items() if not n.startswith("dist_net.")})
        clip = infer_config(plain, source="The DiST checkpoint")
        with torch.device("meta"):
            made = cls(DistConfig(clip, layers=tuple(layers), **side_sizes(side)))
        assign(made, KEYS.from_official({**state, **plain}), source="DiST checkpoint")
        return made.eval()

    def to_clip(self) -> CLIP:
        """The plain CLIP inside."""
        return self.clip

    def freeze(self) -> None:
        """Nothing of CLIP trains, nor what the side network holds but does not use."""
        self.clip.requires_grad_(False)
        self.dist_net.unused.requires_grad_(False)

    def train(self, mode: bool = True) -> DiST:
        """The tower stays in eval mode: its norms must not move with what passes."""
        super().train(mode)
        self.clip.eval()
        return self

    def encode_text(self, tokens_NL: Tensor) -> Tensor:
        return self.clip.encode_text(tokens_NL)

    def look(self, frames_BTCHW: Tensor) -> TowerOutput:
        """What the frozen tower makes of every alpha-th frame; no gradient."""
        with torch.no_grad():
            return self.clip.visual(
                frames_BTCHW[:, :: self.config.alpha].flatten(0, 1), taps=self.config.selected
            )

    def taps(self, frames_BTCHW: Tensor) -> dict[int, Tensor]:
        """tokens_FLD of the selected layers. They never change, so they may be stored and used again."""
        return self.look(frames_BTCHW).layers

    def side(self, frames_BTCHW: Tensor, taps: Mapping[int, Tensor]) -> Tensor:
        """video_BE from all frames and the tokens of some, as `taps` gave them for these clips."""
        return self.dist_net(frames_BTCHW, taps)

    def encode_video(self, batch: ClipBatch) -> Tensor:
        """ClipBatch of T frames -> video_BE, not normalised; with `with_clip` a mean of unit vectors."""
        frames_BTCHW = self.frames_of(batch)
        seen = self.look(frames_BTCHW)
        return self._mixed(self.side(frames_BTCHW, seen.layers), seen.vector_BD)

    def encode_image(self, pixels_BCHW: Tensor) -> Tensor:
        """A picture as a clip of T equal frames, which pass the tower as one: video_BE, not normalised."""
        seen, times = self.look(pixels_BCHW[:, None]), self.config.sparse
        taps = {n: tokens.repeat_interleave(times, dim=0) for n, tokens in seen.layers.items()}
        video_BE = self.side(self.still(pixels_BCHW).frames_BTCHW, taps)
        return self._mixed(video_BE, seen.vector_BD.repeat_interleave(times, dim=0))

    @property
    def _mixes(self) -> bool:
        return self.with_clip > 0 and not self.training

    def _mixed(self, video_BE: Tensor, frames_FE: Tensor) -> Tensor:
        if not self._mixes:
            return video_BE
        plain_BE = mean_of_frames(frames_FE.unflatten(0, (len(video_BE), -1)))
        return torch.lerp(F.normalize(video_BE, dim=-1), plain_BE, self.with_clip)

    def pool(self, video: Tensor, mask_BT: Tensor | None = None) -> Tensor:
        return video

    def score(self, text_ND: Tensor, video: Tensor, mask_MT: Tensor | None = None) -> Tensor:
        """Logit scale times the cosine, (N, M); with `with_clip` the mean of both models'."""
        if self._mixes:
            return self.clip.logit_scale.exp() * F.normalize(text_ND, dim=-1) @ video.T
        return self.clip.score(text_ND, video)


OFFICIAL_PREFIX = "backbone.base_encoder."
KEYS = Keys(Rule("dist_net.{rest}", "dist_net.{rest}"), Rule("clip.{rest}", "{rest}"))
"""The authors' names without `OFFICIAL_PREFIX`: OpenAI's at the root, the side network below `dist_net.`."""


class DistRecognition(Recognition):
    """The paper's training: the side network alone, at `lr_scale` times the run's rate."""

    def __init__(
        self,
        model: DiST,
        tokens_CL: Tensor,
        *,
        lr_scale: float = 10.0,
        weight_decay: float = 1e-4,
        **options: Any,
    ) -> None:
        super().__init__(model, tokens_CL, train="dist_net.", weight_decay=weight_decay, **options)
        model.freeze()
        self.lr_scale = lr_scale

    def param_groups(self, model: nn.Module) -> Iterable[dict[str, Any]]:
        kinds: tuple[list[nn.Parameter], list[nn.Parameter]] = ([], [])
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                spared = parameter.ndim < 2 or name.endswith(("cls_token", "positional_embedding"))
                kinds[spared].append(parameter)
        for parameters, decay in zip(kinds, (self.weight_decay, 0.0), strict=True):
            yield {"params": parameters, "weight_decay": decay, "lr_scale": self.lr_scale}


RECOGNITION = Training(
    DistRecognition,
    start=lambda module: module if isinstance(module, DiST) else DiST.from_clip(cast(CLIP, module)),
    presets={"b-16": b_16, "l-14": l_14},
    recipe={
        "lr": 3.2e-5,
        "batch_size": 256,
        "betas": (0.9, 0.999),
        "eps": 1e-8,
        "lr_floor": 0.0025,
        "epochs": 36,
        "crop_area": (0.4, 1.0),
    },
)


def tiny() -> DistConfig:
    vision = VitConfig(image_size=16, patch_size=8, width=16, layers=2, heads=2)
    clip = ClipConfig(16, vision, TextConfig(context_length=8, vocab_size=32, width=16, layers=1, heads=2))
    return DistConfig(clip, frames=4, integration_dim=16, temporal_dim=8, pool_heads=2)


def example(seed: int) -> Example:
    generator = torch.Generator().manual_seed(seed)
    tokens_CL = torch.tensor([[30, n, n + 7, 31, 0, 0, 0, 0] for n in range(1, 6)])
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = DiST(tiny()).eval()
    objective = DistRecognition(model, tokens_CL, mixup=0, cutmix=0)

    def run(frames_BTCHW: Tensor, label_B: Tensor) -> dict[str, Tensor]:
        mask_BT = torch.ones(frames_BTCHW.shape[:2], dtype=torch.bool)
        clip = ClipBatch(frames_BTCHW, torch.arange(4.0).expand(mask_BT.shape), mask_BT)
        video_BE, text_CE = model.encode_video(clip), model.encode_text(tokens_CL)
        return {
            "text": text_CE,
            "video": video_BE,
            "logits": model.score(text_CE, video_BE).T,
            "loss": objective(model, {"clip": clip, "label": label_B})["class"],
        }

    inputs = {
        "frames_BTCHW": torch.randn(4, 4, 3, 16, 16, generator=generator),
        "label_B": torch.randint(5, (4,), generator=generator),
    }
    shapes = {"text": (5, 16), "video": (4, 16), "logits": (4, 5), "loss": ()}
    return Example(run, inputs, shapes, model, ("frames_BTCHW", "label_B", "video", "logits"), "loss")


# --------------------------------------------------------------------------------------------------
# The claim
# --------------------------------------------------------------------------------------------------


@lru_cache(maxsize=4)
def _stored(clip: CLIP, seed: int, count: int, split: world.Split, shuffle: bool) -> dict[str, Tensor]:
    """Clips, what the frozen tower says of them (`taps`, a row a layer) and the mean of their frames."""
    clips = world.order_clips(seed, count, split=split)
    clips = clips.shuffled(seed + (split == "test")) if shuffle else clips
    frames_NTCHW, taps, means = clips.pixels(), [], []
    with torch.no_grad():
        for part in frames_NTCHW.split(200):
            layers = clip.visual(part[:, ::2].flatten(0, 1), taps=(0, 1)).layers
            taps.append(torch.stack(list(layers.values()), dim=1).unflatten(0, (len(part), -1)))
            means.append(clip.encode_video(world.clip_batch(part)))
    label_N = torch.from_numpy(clips.label_N)
    return {"frames": frames_NTCHW, "label": label_N, "taps": torch.cat(taps), "mean": torch.cat(means)}


def run_claim(
    arm: str, seed: int, *, steps: int = 300, start: int = 300, clips: tuple[int, int] = (1600, 800)
) -> dict[str, float]:
    """Train one arm to name eight actions; measure it on things and speeds that it has not met.

    The tower, of 4 of 8 frames, is frozen in all arms and its tokens stored, so clips are not mixed. "frame
    mean" is a linear classifier on the mean of all 8 frames' vectors; "sparse frames alone" is DiST whose
    temporal stream sees nothing but grey. "Kind" is which pair of actions it is.
    """
    clip, shuffle = world.image_clip(seed, steps=start), arm == "shuffled frames"
    train, test = (_stored(clip, seed, n, s, shuffle) for n, s in zip(clips, ("train", "test"), strict=True))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        head = nn.Linear(clip.dim, len(world.ACTIONS))
        model = DiST.from_clip(clip, frames=world.FRAMES)
    text_CE = model.encode_text(world.tokens(world.ACTIONS)).detach()

    def logits(data: dict[str, Tensor], rows: Tensor) -> Tensor:
        if arm == "frame mean":
            return head(data["mean"][rows] * 10)
        frames_BTCHW = data["frames"][rows] * (arm != "sparse frames alone")
        taps = dict(enumerate(data["taps"][rows].flatten(0, 1).unbind(1)))
        return model.score(text_CE, model.side(frames_BTCHW, taps)).T

    trained = head if arm == "frame mean" else model.dist_net
    parameters = [p for p in trained.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, weight_decay=1e-4)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, total_steps=steps, pct_start=0.1)
    rng = np.random.default_rng([seed, 3])
    for _ in range(steps):
        rows = torch.from_numpy(rng.integers(len(train["label"]), size=32))
        F.cross_entropy(logits(train, rows), train["label"][rows], label_smoothing=0.1).backward()
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
    with torch.inference_mode():
        scores_NC = torch.cat([logits(test, rows) for rows in torch.arange(len(test["label"])).split(50)])
    label_N, kinds_NC = test["label"].numpy(), scores_NC.unflatten(1, (-1, 2)).logsumexp(-1)
    return {
        "pair accuracy": world.pair_accuracy(scores_NC, label_N),
        "action, top-1": topk_accuracy(scores_NC, label_N, (1,))["top1"],
        "kind of action, top-1": topk_accuracy(kinds_NC, label_N // 2, (1,))["top1"],
    }


CLAIM = Claim(
    statement="A small network beside a frozen image model learns the order of frames that their mean loses.",
    data="order clips: eight actions in pairs that are each other backwards, 8 frames; new things and speeds",
    metric="pair accuracy",
    arms=("frame mean", "shuffled frames", "sparse frames alone", "dist"),
    ours="dist",
    baseline="frame mean",
    run=run_claim,
)
