"""One process or many: where tensors meet. The only module that knows Accelerate.

`torchrun --nproc-per-node N -m moviola train ...` starts the processes; each holds a whole copy of the
model and its share of every batch. Gradients are summed in one pass after the backward passes of a step
instead of by hooks during them: gradient caching runs several backward passes, and hooks would reduce
each. Losses see the global batch, so the result does not depend on the number of processes.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from moviola.types import MissingExtra, UsageError

_BUCKET = 16 << 20  # gradients summed at a time, in numbers


class Processes:
    """This process alone. `several()` gives the one for `torchrun`, where it was used."""

    rank = 0
    count = 1
    device: torch.device | None = None  # None: wherever the model is

    @property
    def main(self) -> bool:
        return self.rank == 0

    def gather(self, rows: Tensor) -> Tensor:
        """The rows of all processes, in the order of their ranks. No gradient passes."""
        return rows

    def gather_objects(self, value: Any) -> list[Any]:
        """One value from every process."""
        return [value]

    def sum_gradients(self, parameters: Iterable[Tensor]) -> None:
        """Add up each parameter's gradient over the processes."""

    def from_main(self, value: Any) -> Any:
        """The first process's value, everywhere."""
        return value

    def wait(self) -> None:
        """Until all processes are here."""

    def close(self) -> None:
        """The last call: the processes part. Without it an exit can abort on open connections."""

    def require_same(self, identity: Mapping[str, str]) -> None:
        """Raise `UsageError` in every process unless all came with the same values."""
        all_given = self.gather_objects(dict(identity))
        for rank, given in enumerate(all_given):
            differing = sorted(k for k in identity if given.get(k) != all_given[0].get(k))
            if differing:
                name = differing[0]
                raise UsageError(
                    f"Process {rank} runs with another {name} than process 0: {given.get(name)} and "
                    f"{all_given[0].get(name)}.",
                    hint="Start all processes with the same command and the same files.",
                )


class _Accelerated(Processes):
    def __init__(self, *, cpu: bool) -> None:
        try:
            from accelerate import Accelerator
        except ImportError as error:
            raise MissingExtra("accelerate", "train") from error
        self._accelerator = Accelerator(cpu=cpu)
        self.rank = self._accelerator.process_index
        self.count = self._accelerator.num_processes
        self.device = self._accelerator.device

    def gather(self, rows: Tensor) -> Tensor:
        return self._accelerator.gather(rows.contiguous())

    def gather_objects(self, value: Any) -> list[Any]:
        from accelerate.utils import gather_object

        return gather_object([value])

    def sum_gradients(self, parameters: Iterable[Tensor]) -> None:
        held = list(parameters)
        if not held:
            return
        has = torch.tensor([p.grad is not None for p in held], device=held[0].device, dtype=torch.int32)
        anywhere = self._accelerator.reduce(has, "sum").tolist()
        waiting = [p for p, count in zip(held, anywhere, strict=True) if count]
        while waiting:
            bucket: list[Tensor] = []
            size = 0
            while waiting and (not bucket or size + waiting[0].numel() <= _BUCKET):
                if bucket and waiting[0].dtype != bucket[0].dtype:
                    break
                bucket.append(waiting.pop(0))
                size += bucket[-1].numel()
            flat = torch.cat([(torch.zeros_like(p) if p.grad is None else p.grad).flatten() for p in bucket])
            summed = self._accelerator.reduce(flat, "sum").split([p.numel() for p in bucket])
            for parameter, gradient in zip(bucket, summed, strict=True):
                parameter.grad = gradient.view_as(parameter)

    def from_main(self, value: Any) -> Any:
        from accelerate.utils import broadcast_object_list

        return broadcast_object_list([value if self.main else None])[0]

    def wait(self) -> None:
        self._accelerator.wait_for_everyone()

    def close(self) -> None:
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()


def several(*, cpu: bool = False) -> Processes:
    """The processes `torchrun` started, or this one alone. `cpu` keeps them off the GPUs."""
    return _Accelerated(cpu=cpu) if int(os.environ.get("WORLD_SIZE", "1")) > 1 else Processes()


def as_arrays(tensors: Mapping[str, Tensor]) -> dict[str, np.ndarray]:
    """Tensors as NumPy arrays on the CPU; bfloat16 becomes float32."""
    return {
        name: (t.float() if t.dtype == torch.bfloat16 else t).detach().cpu().numpy()
        for name, t in tensors.items()
    }
