import math

import pytest
import torch
import torch.nn.functional as F

from moviola.training.repeats import text_numbers
from moviola.training.unit_vectors import check_unit_rows
from moviola.types import UsageError

UNIT = F.normalize(torch.randn(5, 16), dim=-1)


def test_unit_rows_pass_in_any_precision_and_so_does_what_is_no_number():
    check_unit_rows(UNIT, UNIT.bfloat16(), F.normalize(UNIT.double(), dim=-1), least=5)
    broken = UNIT.clone()
    broken[2] = math.nan
    check_unit_rows(UNIT, broken)


@pytest.mark.parametrize(
    ("sets", "least", "said"),
    [
        ((UNIT, 1.1 * UNIT), 1, "length 1.1"),
        ((UNIT, torch.zeros(5, 16)), 1, "length 0"),
        ((UNIT, UNIT[:4]), 1, r"\(5, 16\), \(4, 16\)"),
        ((UNIT[0], UNIT[0]), 1, "one width"),
        ((UNIT,), 6, "at least 6, got 5"),
    ],
)
def test_the_rest_is_refused(sets, least, said):
    with pytest.raises(UsageError, match=said):
        check_unit_rows(*sets, least=least)


def test_captions_are_told_apart_by_their_tokens_and_not_by_padding():
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(1, 49408, (20_000, 12), generator=generator)
    tokens[1] = tokens[0].flip(0)
    tokens[3] = tokens[2]
    numbers = text_numbers(tokens)
    assert len(numbers.unique()) == len(tokens.unique(dim=0)) < 20_000
    assert numbers[2] == numbers[3]
    assert torch.equal(numbers, text_numbers(F.pad(tokens, (0, 5))))
