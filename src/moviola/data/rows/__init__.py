"""Training rows by number, from files: what a run reads, in an order that is a hash.

source = open_rows(["pairs/*.parquet"], columns={"text": "my_caption"})
data = PairData(source, objective.needs, recipe=recipe, tokenizer=tokenizer)
for batch in feed(data, steps, seed=0, workers=4): ...
"""

from __future__ import annotations

from moviola.data.rows.checks import check, held_out
from moviola.data.rows.feed import feed
from moviola.data.rows.find import open_rows
from moviola.data.rows.pairs import PairData
from moviola.data.rows.source import RowSource, Window

__all__ = ["PairData", "RowSource", "Window", "check", "feed", "held_out", "open_rows"]
