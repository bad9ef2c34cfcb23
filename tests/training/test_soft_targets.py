from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from moviola.training.soft_targets import soft_cross_entropy
from moviola.types import UsageError


def unit(count, *widths):
    return torch.cat([F.normalize(torch.randn(count, w, dtype=torch.float64), dim=1) for w in widths], dim=1)


def plain(image, text, scale, teacher_image, teacher_text, widths, average, teacher_scale):
    """The same loss with whole matrices."""
    if average:
        parts = zip(teacher_image.split(widths, 1), teacher_text.split(widths, 1), strict=True)
        logits = [teacher_scale * a @ b.T for a, b in parts]
        rows = torch.stack([x.softmax(1) for x in logits]).mean(0)
        columns = torch.stack([x.T.softmax(1) for x in logits]).mean(0)
    else:
        whole = teacher_scale * teacher_image @ teacher_text.T
        rows, columns = whole.softmax(1), whole.T.softmax(1)
    student = scale * image @ text.T
    there = -(rows * student.log_softmax(1)).sum(1).mean()
    back = -(columns * student.T.log_softmax(1)).sum(1).mean()
    return (there + back) / 2


@settings(max_examples=25, deadline=None)
@given(
    count=st.integers(1, 9),
    widths=st.lists(st.integers(1, 5), min_size=1, max_size=3),
    average=st.booleans(),
    chunk=st.integers(1, 10),
    seed=st.integers(0, 1000),
)
def test_bands_equal_whole_matrices_in_value_and_gradient(count, widths, average, chunk, seed):
    torch.manual_seed(seed)
    made = [unit(count, 4).requires_grad_(), unit(count, 4).requires_grad_(), torch.tensor(12.0).double()]
    made[2].requires_grad_()
    teachers = unit(count, *widths), unit(count, *widths)
    options = {"teacher_scale": 9.0, "teacher_dims": widths, "average_after_softmax": average, "chunk": chunk}
    got = soft_cross_entropy(*made, *teachers, **options)
    want = plain(*made, *teachers, widths, average, 9.0)
    torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-10)
    pairs = zip(torch.autograd.grad(got, made), torch.autograd.grad(want, made), strict=True)
    for a, b in pairs:
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-10)


def test_float32_is_close_to_double_at_the_authors_scales():
    torch.manual_seed(0)
    image, text, teachers = unit(300, 32), unit(300, 32), (unit(300, 16, 16), unit(300, 16, 16))
    scale = torch.tensor(100.0)
    want = plain(image, text, scale.double(), *teachers, (16, 16), True, 100.0)
    got = soft_cross_entropy(
        image.float(), text.float(), scale, *(t.half() for t in teachers), teacher_dims=(16, 16), chunk=64
    )
    assert got.dtype == torch.float32
    assert abs(got.item() - want.item()) < 0.01 * want.item()  # the teachers are stored in half precision


def test_autocast_does_not_reach_in():
    torch.manual_seed(0)
    vectors = (
        unit(8, 6).float(),
        unit(8, 6).float(),
        torch.tensor(50.0),
        unit(8, 5).float(),
        unit(8, 5).float(),
    )
    want = soft_cross_entropy(*vectors)
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(soft_cross_entropy(*vectors), want, rtol=1e-6, atol=1e-6)


def test_no_square_matrix_is_held():
    """Nothing of N x N survives the forward pass: what is saved for backward is of the vectors' size."""
    torch.manual_seed(0)
    count, sizes = 512, []

    def note(tensor):
        sizes.append(tensor.numel())
        return tensor

    image, text = unit(count, 8).requires_grad_(), unit(count, 8).requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(note, lambda x: x):
        soft_cross_entropy(image, text, torch.tensor(10.0).double(), unit(count, 8), unit(count, 8), chunk=64)
    assert sizes
    assert max(sizes) <= count * 8


def test_rows_that_do_not_belong_together():
    with pytest.raises(UsageError, match=r"of 4 pictures and texts, got \(3, 5\)"):
        soft_cross_entropy(unit(4, 6), unit(4, 6), 1.0, unit(3, 5), unit(3, 5))
    with pytest.raises(UsageError, match="one text per picture"):
        soft_cross_entropy(unit(4, 6), unit(3, 6), 1.0, unit(4, 5), unit(4, 5))
