"""The text tower's groups by length: the same vectors, fewer padded tokens."""

import torch
from hypothesis import given
from hypothesis import strategies as st

from moviola.clip.config import TextConfig
from moviola.clip.model import TextTower, length_groups


def test_texts_of_mixed_length_run_in_groups_and_give_the_same_vectors() -> None:
    torch.manual_seed(0)
    tower = TextTower(TextConfig(context_length=40, vocab_size=50, width=16, layers=2, heads=2), 8, "gelu")
    lengths = torch.randint(2, 8, (130,))
    lengths[7] = 40
    tokens_NL = torch.zeros(130, 40, dtype=torch.int64)
    for row, length in zip(tokens_NL, lengths.tolist(), strict=True):
        row[:length] = torch.randint(1, 48, (length,))
        row[length - 1] = 49
    assert len(length_groups(lengths.tolist())) == 4
    whole = tower.forward_text(tokens_NL).vector_BD
    torch.testing.assert_close(tower.encode_text(tokens_NL), whole, atol=1e-5, rtol=1e-5)
    assert tower.encode_text(tokens_NL[:0]).shape == (0, 8)


@given(st.lists(st.integers(1, 77), max_size=300))
def test_every_row_is_in_exactly_one_group(lengths: list[int]) -> None:
    groups = length_groups(lengths)
    assert sorted(row for group in groups for row in group) == list(range(len(lengths)))
    assert all(groups) or not lengths
