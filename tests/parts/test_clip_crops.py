from __future__ import annotations

import pytest
import torch

from moviola.parts.clip_crops import scaled_crops
from moviola.types import UsageError


def test_crops_are_parts_of_the_clip_and_alike_in_all_frames():
    rows = torch.linspace(-1, 1, 32)
    frames = torch.stack([rows[:, None].expand(32, 32), rows.expand(32, 32), torch.zeros(32, 32)])
    frames = frames.expand(16, 4, 3, 32, 32)
    torch.manual_seed(0)
    made = scaled_crops(frames)
    assert made.shape == frames.shape
    assert torch.equal(made[:, :1].expand(-1, 4, -1, -1, -1), made)
    heights = (made[:, 0, 0, 20, 5] - made[:, 0, 0, 10, 5]) / (rows[20] - rows[10])
    widths = (made[:, 0, 1, 5, 20] - made[:, 0, 1, 5, 10]) / (rows[20] - rows[10])
    scales = torch.tensor([1.0, 0.875, 0.75, 0.66])
    for shares in (heights, widths):
        assert (shares[:, None] - scales).abs().min(1).values.max() < 1e-4
    assert len({round(float(x), 3) for x in heights}) > 1
    torch.testing.assert_close(scaled_crops(frames, (1.0,)), frames, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("scales", [(1.5,), (0.0,), ()])
def test_bad_input(scales):
    with pytest.raises(UsageError, match="up to 1"):
        scaled_crops(torch.zeros(1, 2, 3, 8, 8), scales)
