"""One step's losses and gradients, whatever the batch, the memory and the number of processes.

A pair objective's loss needs every row's outputs but no row's activations. With gradient caching (Gao
et al. 2021, arXiv 2101.06983) the towers run over the batch in parts without gradients, the loss gives
the gradient of each output, and the towers run again part by part to carry it back: memory is that of
one part, gradients are those of the whole batch. Several processes gather outputs between the halves.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import Tensor, nn

from moviola.training.processes import Processes
from moviola.types import Batch, ClipBatch, Objective, PairObjective, UsageError


def compute(
    model: nn.Module,
    objective: Objective,
    batch: Batch,
    *,
    micro_batch: int | None = None,
    processes: Processes | None = None,
    precision: torch.dtype | None = None,
    seed: int = 0,
) -> dict[str, Tensor]:
    """The named losses of a step, with gradients left in the parameters' `grad`.

    `batch` holds this process's rows, `micro_batch` of them pass through the towers at a time (None:
    all). Pair objectives give the loss and gradients of the global batch. Others are averaged over
    their parts and processes, each with its own negatives. Dropout is seeded by (seed, process, part).
    BatchNorm in the towers uses the statistics of a part.
    """
    processes = processes or Processes()
    count = batch_rows(batch)
    size = count if micro_batch is None else min(micro_batch, count)
    parts: list[Batch] = [batch]
    if size < count:
        parts = [rows_of(batch, start, min(start + size, count)) for start in range(0, count, size)]
    device = next(model.parameters()).device
    if objective.scope != "pair" or not isinstance(objective, PairObjective):
        losses = _averaged(model, objective, parts, precision, seed, processes, device)
    elif len(parts) == 1 and processes.count == 1:
        torch.manual_seed(seed)
        with _autocast(device, precision):
            losses = objective.forward(model, batch)
        _total(losses).backward()
        return losses
    else:
        losses = _cached(model, objective, parts, precision, seed, processes, device)
    if processes.count > 1:
        processes.sum_gradients(_trained(model, objective))
    return losses


def _averaged(
    model: nn.Module,
    objective: Objective,
    parts: list[Batch],
    precision: torch.dtype | None,
    seed: int,
    processes: Processes,
    device: torch.device,
) -> dict[str, Tensor]:
    sums: dict[str, Tensor] = {}
    rows = processes.count * sum(batch_rows(part) for part in parts)
    for n, part in enumerate(parts):
        torch.manual_seed(_part_seed(seed, processes.rank, n))
        with _autocast(device, precision):
            losses = objective.forward(model, part)
        share = batch_rows(part) / rows
        (_total(losses) * share).backward()
        for name, loss in losses.items():
            sums[name] = sums.get(name, torch.zeros_like(loss)) + loss.detach() * share
    names = sorted(sums)
    gathered = processes.gather(torch.stack([sums[name].float() for name in names])[None])
    return dict(zip(names, gathered.sum(0), strict=True))


def _cached(
    model: nn.Module,
    objective: PairObjective,
    parts: list[Batch],
    precision: torch.dtype | None,
    seed: int,
    processes: Processes,
    device: torch.device,
) -> dict[str, Tensor]:
    once = len(parts) == 1  # nothing to save by a second pass: its graph is kept

    def outputs(n: int, grad: bool) -> dict[str, Tensor]:
        torch.manual_seed(_part_seed(seed, processes.rank, n))
        with torch.set_grad_enabled(grad), _autocast(device, precision):
            return objective.outputs(model, parts[n])

    with _still_statistics(model, still=not once):
        first = [outputs(n, grad=once) for n in range(len(parts))]
    leaves: dict[str, Tensor] = {}
    for name, value in first[0].items():
        if value.ndim == 0:
            leaves[name] = value  # a parameter of the loss
            continue
        rows = torch.cat([part[name].detach() for part in first])
        gathered = processes.gather(rows)
        leaves[name] = gathered.requires_grad_() if gathered.is_floating_point() else gathered
    torch.manual_seed(seed)  # the same in every process
    with _autocast(device, precision):
        losses = objective.loss(model, leaves)
    _total(losses).backward()
    if processes.count > 1:  # what the loss itself taught is alike everywhere, and will be summed
        for parameter in _trained(model, objective):
            if parameter.grad is not None:
                parameter.grad /= processes.count
    start = processes.rank * sum(batch_rows(part) for part in parts)
    for n, part in enumerate(parts):
        again = first[0] if once else outputs(n, grad=True)
        stop = start + batch_rows(part)
        taught = [
            (value, cast(Tensor, leaves[name].grad)[start:stop])
            for name, value in again.items()
            if value.ndim and value.requires_grad and leaves[name].grad is not None
        ]
        if taught:
            torch.autograd.backward([value for value, _ in taught], [grad for _, grad in taught])
        start = stop
    return losses


def _total(losses: Mapping[str, Tensor]) -> Tensor:
    return torch.stack([loss.float() for loss in losses.values()]).sum()


def _trained(model: nn.Module, objective: Objective) -> list[Tensor]:
    """Every parameter that takes gradients, in an order that all processes share."""
    own = objective.parameters() if isinstance(objective, nn.Module) else ()
    seen: dict[int, Tensor] = {id(p): p for p in (*model.parameters(), *own) if p.requires_grad}
    return list(seen.values())


def _autocast(device: torch.device, precision: torch.dtype | None) -> torch.autocast:
    return torch.autocast(device.type, precision or torch.bfloat16, enabled=precision is not None)


def _part_seed(seed: int, rank: int, part: int) -> int:
    return (seed + 0x9E3779B9 * (rank + 1) + 0x85EBCA6B * part) & 0x7FFFFFFFFFFFFFFF


@contextmanager
def _still_statistics(model: nn.Module, *, still: bool) -> Iterator[None]:
    """BatchNorm's running statistics do not move: the second pass will move them."""
    norms = [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)] if still else []
    kept = [(m.momentum, m.num_batches_tracked) for m in norms]
    for module in norms:
        module.momentum, module.num_batches_tracked = 0.0, None
    try:
        yield
    finally:
        for module, (momentum, tracked) in zip(norms, kept, strict=True):
            module.momentum, module.num_batches_tracked = momentum, tracked


def batch_rows(batch: Batch) -> int:
    """How many rows a batch has."""
    for name in ("image", "clip", *batch):
        length = _length(batch[name]) if name in batch and name != "skipped" else None
        if length is not None:
            return length
    raise UsageError(f"The batch has no field with rows: {', '.join(batch) or 'it is empty'}.")


def _length(value: Any) -> int | None:
    if isinstance(value, ClipBatch):
        return len(value.frames_BTCHW)
    if isinstance(value, Tensor):
        return len(value) if value.ndim else None
    return len(value) if isinstance(value, list) else None


def rows_of(batch: Batch, start: int, stop: int) -> dict[str, Any]:
    """Rows [start, stop) of every field."""
    count, made = batch_rows(batch), {}
    for name, value in batch.items():
        length = _length(value)
        if length is None or name == "skipped":
            made[name] = value
        elif length != count:
            raise UsageError(
                f"A batch of {count} rows with {length} of {name!r} cannot be cut into parts.",
                hint="Use as large a micro_batch as the batch, and one process.",
            )
        elif isinstance(value, ClipBatch):
            made[name] = ClipBatch(
                value.frames_BTCHW[start:stop],
                value.times_BT[start:stop],
                value.mask_BT[start:stop],
                None if value.sound_BS is None else value.sound_BS[start:stop],
                None if value.text is None else value.text[start:stop],
            )
        else:
            made[name] = value[start:stop]
    return made
