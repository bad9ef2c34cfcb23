"""Episodes: an objective looks at the rows to come before it trains on them (ProtoCLIP clusters them)."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np
import torch
from torch import Tensor, nn

from moviola.training.processes import Processes, as_arrays
from moviola.types import Batch


class RowsToCome:
    """The rows of the next steps. Implements `moviola.types.Episode`.

    `load(rows)` gives the batch of some rows as it will be trained on, or without augmentation, as the
    run decides.
    """

    def __init__(
        self,
        index: int,
        count: int,
        row_ids: Sequence[int],
        model: nn.Module,
        load: Callable[[np.ndarray], Batch],
        processes: Processes,
        batch_size: int,
        precision: torch.dtype | None = None,
    ) -> None:
        self.index, self.count, self.row_ids = index, count, row_ids
        self._model, self._load, self._processes = model, load, processes
        self._batch_size, self._precision = batch_size, precision

    def extract(self, function: Callable[[Batch], Mapping[str, Tensor]]) -> Mapping[str, np.ndarray]:
        """Run `function` over the rows in eval mode without gradients; stacked in the order of `row_ids`."""
        processes, rows = self._processes, np.asarray(self.row_ids, np.int64)
        share = -(-len(rows) // processes.count)
        own = rows[processes.rank * share : (processes.rank + 1) * share]
        device = next(self._model.parameters()).device
        modes = [(module, module.training) for module in self._model.modules()]
        self._model.eval()
        parts: list[dict[str, np.ndarray]] = []
        try:
            with (
                torch.no_grad(),
                torch.autocast(
                    device.type, self._precision or torch.bfloat16, enabled=self._precision is not None
                ),
            ):
                for start in range(0, len(own), self._batch_size):
                    batch = self._load(own[start : start + self._batch_size])
                    parts.append(as_arrays(dict(function(batch))))
        finally:
            for module, training in modes:
                module.training = training
        everywhere = [part for given in processes.gather_objects(parts) for part in given]
        return {name: np.concatenate([part[name] for part in everywhere]) for name in everywhere[0]}

    def once(self, function: Callable[[], Mapping[str, np.ndarray]]) -> Mapping[str, np.ndarray]:
        """What `function` gives in the first process, handed to all."""
        return self._processes.from_main(dict(function()) if self._processes.main else None)
