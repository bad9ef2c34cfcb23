"""Naming the class of a clip among texts: targets, mixing, what trains and how fast, what is encoded once."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moviola.clip.config import ClipConfig, TextConfig, VitConfig
from moviola.clip.model import CLIP
from moviola.training.caching import compute
from moviola.training.recognition import Recognition, hold_last_frames, mix_clips, soft_targets
from moviola.types import ClipBatch, LabelField, Needs, UsageError, VideoField

CONFIG = ClipConfig(
    16,
    VitConfig(image_size=16, patch_size=8, width=16, layers=1, heads=2),
    TextConfig(context_length=6, vocab_size=20, width=16, layers=1, heads=2),
)
TOKENS_CL = torch.tensor([[18, 3, 19, 0, 0, 0], [18, 4, 5, 19, 0, 0], [18, 6, 19, 0, 0, 0]])


def model() -> CLIP:
    torch.manual_seed(0)
    return CLIP(CONFIG)


def batch(rows: int = 4, frames: int = 3) -> dict:
    torch.manual_seed(1)
    mask_BT = torch.ones(rows, frames, dtype=torch.bool)
    clip = ClipBatch(torch.randn(rows, frames, 3, 16, 16), mask_BT.float(), mask_BT)
    return {"clip": clip, "label": torch.arange(rows) % 3}


# --------------------------------------------------------------------------------------------------
# Targets
# --------------------------------------------------------------------------------------------------


def test_soft_targets_are_torchs_label_smoothing() -> None:
    label_B = torch.tensor([2, 0, 1])
    target_BC = soft_targets(label_B, 5, 0.1)
    torch.testing.assert_close(target_BC.sum(1), torch.ones(3))
    torch.testing.assert_close(target_BC[0], torch.tensor([0.02, 0.02, 0.92, 0.02, 0.02]))
    logits_BC = torch.randn(3, 5, generator=torch.Generator().manual_seed(0))
    wanted = F.cross_entropy(logits_BC, label_B, label_smoothing=0.1)
    torch.testing.assert_close(F.cross_entropy(logits_BC, target_BC), wanted)
    assert torch.equal(soft_targets(label_B, 5, 0), F.one_hot(label_B, 5).float())


# --------------------------------------------------------------------------------------------------
# Mixing: clip b is painted with the value b, so pixels tell whose they are
# --------------------------------------------------------------------------------------------------


def painted(count: int = 4) -> tuple[Tensor, Tensor]:
    frames_BTCHW = torch.arange(count).float()[:, None, None, None, None].expand(-1, 2, 3, 10, 14)
    return frames_BTCHW.contiguous(), torch.eye(count)


def share_of_own(mixed_BTCHW: Tensor) -> Tensor:
    """From pixels alone: how much of each clip is its own. Clip b is opposite 3 - b."""
    own_B = torch.arange(4).float()
    other_B = 3 - own_B
    mean_B = mixed_BTCHW.mean((1, 2, 3, 4))
    return (mean_B - other_B) / (own_B - other_B)


@pytest.mark.parametrize(("mixup", "cutmix"), [(0.8, 0.0), (0.0, 1.0), (0.8, 1.0)])
def test_targets_weigh_what_the_pixels_show(mixup: float, cutmix: float) -> None:
    seen = set()
    for seed in range(30):
        torch.manual_seed(seed)
        frames_BTCHW, target_BC = painted()
        mixed_BTCHW, mixed_BC = mix_clips(frames_BTCHW, target_BC, mixup=mixup, cutmix=cutmix)
        share_B = share_of_own(mixed_BTCHW)
        torch.testing.assert_close(mixed_BC.diagonal(), share_B, atol=1e-5, rtol=0)
        torch.testing.assert_close(mixed_BC.flip(1).diagonal(), 1 - share_B, atol=1e-5, rtol=0)
        torch.testing.assert_close(mixed_BC.sum(1), torch.ones(4))
        assert torch.equal(mixed_BTCHW[:, 0], mixed_BTCHW[:, 1])  # frames of a clip alike
        cut = mixed_BTCHW[0].unique().numel() > 1
        seen.add("cut" if cut else "blend")
        assert torch.equal(frames_BTCHW, painted()[0])  # the batch itself stays
    if not cutmix:
        assert seen == {"blend"}
    elif mixup:
        assert seen == {"cut", "blend"}
    else:
        assert "cut" in seen


def test_cut_boxes_at_the_edge_count_what_they_cover() -> None:
    """Of many boxes some are clipped; the drawn ratio would then be wrong, the true one is not."""
    shares = []
    for seed in range(60):
        torch.manual_seed(seed)
        mixed_BTCHW, mixed_BC = mix_clips(*painted(), mixup=0, cutmix=1.0)
        covered = (mixed_BTCHW[0, 0, 0] == 3).float().mean()
        shares.append(float(covered))
        assert mixed_BC[0, 3].item() == pytest.approx(float(covered), abs=1e-6)
    assert min(shares) < 0.1
    assert max(shares) > 0.4


def test_nothing_to_mix() -> None:
    frames_BTCHW, target_BC = painted()
    for kept in (
        mix_clips(frames_BTCHW, target_BC, mixup=0, cutmix=0),
        mix_clips(frames_BTCHW[:1], target_BC[:1], mixup=0.8, cutmix=1),
    ):
        assert torch.equal(kept[0], frames_BTCHW[: len(kept[0])])
        assert torch.equal(kept[1], target_BC[: len(kept[1])])
    with pytest.raises(UsageError, match="must not be negative"):
        mix_clips(frames_BTCHW, target_BC, mixup=-1, cutmix=0)


def test_the_middle_clip_of_an_odd_batch_stays_itself() -> None:
    torch.manual_seed(0)
    frames_BTCHW, target_BC = painted(3)
    mixed_BTCHW, mixed_BC = mix_clips(frames_BTCHW, target_BC, mixup=0.8, cutmix=0)
    torch.testing.assert_close(mixed_BTCHW[1], frames_BTCHW[1])
    torch.testing.assert_close(mixed_BC[1], target_BC[1])


def test_a_shorter_clip_is_not_mixed_as_grey() -> None:
    frames_BTCHW = torch.arange(1.0, 9).view(2, 4, 1, 1, 1).repeat(1, 1, 3, 2, 2)
    mask_BT = torch.tensor([[True, True, False, False], [True, True, True, False]])
    frames_BTCHW = frames_BTCHW * mask_BT[..., None, None, None]
    held = hold_last_frames(ClipBatch(frames_BTCHW, mask_BT.float(), mask_BT))
    assert held.frames_BTCHW[:, :, 0, 0, 0].tolist() == [[1, 2, 2, 0], [5, 6, 7, 0]]
    assert held.mask_BT.tolist() == [[True, True, True, False]] * 2
    whole = ClipBatch(frames_BTCHW, mask_BT.float(), torch.ones_like(mask_BT))
    assert hold_last_frames(whole) is whole


def test_a_batch_of_clips_and_pictures_trains() -> None:
    """A picture beside a clip, mixed: the same as the picture shown as long as the clip."""
    made = batch(2)
    clip = made["clip"]
    mask_BT = torch.tensor([[True, True, True], [True, False, False]])
    short = ClipBatch(clip.frames_BTCHW * mask_BT[..., None, None, None], mask_BT.float(), mask_BT)
    still_BTCHW = clip.frames_BTCHW.clone()
    still_BTCHW[1] = still_BTCHW[1, :1]
    losses = []
    for one in (short, ClipBatch(still_BTCHW, mask_BT.float(), torch.ones_like(mask_BT))):
        torch.manual_seed(5)
        net = model()
        torch.manual_seed(7)
        losses.append(Recognition(net, TOKENS_CL)(net, {**made, "clip": one})["class"])
    torch.testing.assert_close(losses[0], losses[1])


# --------------------------------------------------------------------------------------------------
# The loss and what trains
# --------------------------------------------------------------------------------------------------


def test_the_loss_is_the_cross_entropy_of_the_models_scores() -> None:
    net, made = model(), batch()
    objective = Recognition(net, TOKENS_CL, label_smoothing=0, mixup=0, cutmix=0)
    assert objective.needs == Needs((VideoField(), LabelField()))
    got = objective(net, made)
    clip = made["clip"]
    logits_BC = net.score(net.encode_text(TOKENS_CL), net.encode_video(clip)).T
    torch.testing.assert_close(got["class"], F.cross_entropy(logits_BC, made["label"]))
    assert set(got) == {"class"}


def test_groups_have_their_rates_and_every_parameter_once() -> None:
    net = model()
    objective = Recognition(
        net, TOKENS_CL, lr_scales={"visual.": 10.0, "visual": 3.0, "ln_final": 0.5}, weight_decay=0.2
    )
    groups = list(objective.param_groups(net))
    at = {id(p): group for group in groups for p in group["params"]}
    assert len(at) == sum(len(group["params"]) for group in groups) == len(list(net.parameters()))
    for name, parameter in net.named_parameters():
        group = at[id(parameter)]
        scale = 10.0 if name.startswith("visual.") else 0.5 if "ln_final" in name else 1.0
        assert group["lr_scale"] == scale, name
        plain = parameter.ndim < 2 or name.endswith("positional_embedding")
        assert group["weight_decay"] == (0.0 if plain else 0.2), name


@pytest.mark.parametrize("train", [("visual.",), "visual.", ["visual.transformer", "visual.proj"]])
def test_only_what_is_named_trains(train: object) -> None:
    net = model()
    objective = Recognition(net, TOKENS_CL, train=train)  # type: ignore[arg-type]
    words = (train,) if isinstance(train, str) else train
    compute(net, objective, batch(), seed=0)
    for name, parameter in net.named_parameters():
        assert parameter.requires_grad == any(word in name for word in words), name  # type: ignore[union-attr]
        assert (parameter.grad is not None) == parameter.requires_grad, name
    grouped = sum(len(group["params"]) for group in objective.param_groups(net))
    assert grouped == sum(p.requires_grad for p in net.parameters())


def counted(net: CLIP) -> Callable[[], int]:
    seen = []
    encode = net.encode_text
    net.encode_text = lambda tokens: seen.append(len(tokens)) or encode(tokens)  # type: ignore[method-assign]
    return lambda: len(seen)


def test_a_frozen_text_tower_encodes_the_classes_once() -> None:
    net = model()
    count = counted(net)
    objective = Recognition(net, TOKENS_CL, train=("visual.",), mixup=0, cutmix=0)
    losses = [objective(net, batch())["class"] for _ in range(3)]
    assert count() == 1
    assert losses[0] == losses[2]
    trained = Recognition(net, TOKENS_CL, mixup=0, cutmix=0)
    again = [trained(net, batch())["class"] for _ in range(2)]
    assert count() == 3
    torch.testing.assert_close(again[0], losses[0])  # cached or not, the same loss
    for name in ("token_embedding", "text_projection", "ln_final", "transformer.resblocks"):
        assert not Recognition(net, TOKENS_CL, train=(name, "visual.")).frozen_text, name


def test_micro_batches_average_to_the_batch() -> None:
    whole, parts = model(), model()
    options = {"mixup": 0.0, "cutmix": 0.0}
    one = compute(whole, Recognition(whole, TOKENS_CL, **options), batch(), seed=0)  # type: ignore[arg-type]
    two = compute(parts, Recognition(parts, TOKENS_CL, **options), batch(), micro_batch=2, seed=0)  # type: ignore[arg-type]
    torch.testing.assert_close(one["class"], two["class"])
    for a, b in zip(whole.parameters(), parts.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad)


def test_it_learns_clips_of_three_colours() -> None:
    net = model()
    made = batch(6)
    for row in range(6):
        made["clip"].frames_BTCHW[row] += 2 * F.one_hot(torch.tensor(row % 3), 3)[None, :, None, None]
    made["label"] = torch.arange(6) % 3
    objective = Recognition(net, TOKENS_CL, mixup=0, cutmix=0, label_smoothing=0)
    optimizer = torch.optim.AdamW([dict(g) for g in objective.param_groups(net)], lr=1e-3)
    losses = []
    for _ in range(25):
        loss = objective(net, made)["class"]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.2 * losses[0]


# --------------------------------------------------------------------------------------------------
# Bad input
# --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("label", [3, -1])
def test_labels_outside_the_classes(label: int) -> None:
    net, made = model(), batch()
    made["label"][1] = label
    with pytest.raises(UsageError, match=r"class numbers in 0\.\.2"):
        Recognition(net, TOKENS_CL)(net, made)


def test_bad_settings() -> None:
    net: nn.Module = model()
    with pytest.raises(UsageError, match="two classes or more, got 1"):
        Recognition(net, TOKENS_CL[:1])
    with pytest.raises(UsageError, match="label_smoothing"):
        Recognition(net, TOKENS_CL, label_smoothing=1)
    with pytest.raises(UsageError, match=r"No parameter's name holds any of mit, prompts"):
        Recognition(net, TOKENS_CL, train=("mit", "prompts"))
