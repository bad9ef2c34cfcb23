"""MetaCLIP: choose image-text pairs by balancing what their texts speak of.

A pool of pairs from the web is mostly about few things. MetaCLIP asks of every text which entries of
a list of concepts (the metadata) it holds, counts each entry over the whole pool, and keeps a pair
with a probability that is 1 when any of its entries is rare (the tail) and falls with the count when
all are frequent (the head). Texts that hold no entry go. No model and no pixels take part.

Xu, Xie, Tan, Huang, Howes, Sharma, Li, Ghosh, Zettlemoyer, Feichtenhofer: "Demystifying CLIP Data",
ICLR 2024, arXiv 2309.16671. Several languages and one text per picture: Chuang et al., "Meta CLIP 2",
arXiv 2507.22062. Official code: facebookresearch/MetaCLIP.

Symbols: t is `threshold`; the share p of the tail is `tail_share`; entry_count is count_E;
entry_prob is prob_E.

Known differences
- Matching runs over whole batches of texts (`data.matching`); the match sets are the same.
- The draw: one uniform per text, a hash of (seed, id), against 1 - prod(1 - p). The first version of
  the official code draws once per match and keeps the text if any draw succeeds: the same probability,
  and `keep_by_match` does it from given draws. Ours is the same on any number of workers, and a pair
  that stays at one threshold stays at every higher one.
- A picture with several texts gives one row. The official first version can append it several times.
- The official matcher keeps the first metadata list it sees in a global and ignores the next; the
  official demo overwrites the counts it is given. Neither happens here.
- `threshold_of_share` takes the first of equally near counts, as the official code does.
- Where a threshold comes from a tail share that falls on a count of 0, it is 1: the official code
  would divide by zero.
- Equation numbers are not cited: this file was written from the official code, not from the paper.

Axis letters: E entries, U texts, M matches.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any, Literal, TypeVar

import numpy as np

from moviola.clip.keys import Keys
from moviola.data.hashing import hash_uniform, permutation
from moviola.data.matching import Matcher, Matches
from moviola.types import Claim, Example, UsageError

if TYPE_CHECKING:
    import torch

    from moviola.data.long_tail import LongTail

Row = TypeVar("Row")


@dataclass(frozen=True)
class MetaClipConfig:
    """How a pool is balanced. The defaults are the paper's 400M set.

    threshold   an entry's matches that are kept on average before texts are united
    tail_share  instead of a threshold: the share of all matches that lies in the tail
    texts       of a picture's several matched texts keep `one`, drawn at random, or draw `all` of them
    languages   MetaCLIP 2's rule for entries: no spaces asked for beside scripts that have none
    seed        of the draws
    """

    threshold: float = 20_000
    tail_share: float | None = None
    texts: Literal["one", "all"] = "one"
    languages: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        check_threshold(self.threshold)
        if self.tail_share is not None and not 0 < self.tail_share < 1:
            raise UsageError(f"The tail share lies between 0 and 1, got {self.tail_share}.")
        if self.texts not in ("one", "all"):
            raise UsageError(f"texts is 'one' or 'all', got {self.texts!r}.")

    def to_json(self) -> dict[str, Any]:
        """As JSON knows it: an infinite threshold is the string "inf"."""
        return asdict(self) | ({"threshold": "inf"} if self.threshold == np.inf else {})

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> MetaClipConfig:
        return cls(**{**data, "threshold": float(data.get("threshold", cls.threshold))})


Config = MetaClipConfig


def metaclip_400m() -> MetaClipConfig:
    """The set of 400 million pairs."""
    return MetaClipConfig()


def metaclip_2_5b() -> MetaClipConfig:
    """The set of 2.5 billion pairs: about the same share of matches in the tail."""
    return MetaClipConfig(threshold=170_000)


# --------------------------------------------------------------------------------------------------
# The method, as functions of arrays
# --------------------------------------------------------------------------------------------------


def count(matches: Matches, entries: int) -> np.ndarray:
    """Texts that hold each entry: count_E, uint64. Counts of parts of a pool add up."""
    check_entry_numbers(matches, entries)
    return np.bincount(matches.entry_M, minlength=entries).astype(np.uint64)


def probabilities(count_E: np.ndarray, threshold: float) -> np.ndarray:
    """prob_E = t / max(count, t), float64: 1 in the tail, t / count in the head."""
    check_threshold(threshold)
    if np.isinf(threshold):
        return np.ones(len(count_E))
    return threshold / np.maximum(np.asarray(count_E, np.float64), threshold)


def tail_share(count_E: np.ndarray, threshold: float) -> float:
    """The share of all matches whose entry counts less than the threshold."""
    check_threshold(threshold)
    count_E = check_counts(count_E)
    return float(count_E[count_E < threshold].sum() / count_E.sum())


def threshold_of_share(count_E: np.ndarray, share: float) -> int:
    """The count at which the tail holds about this share of all matches (`tail_share`'s inverse)."""
    if not 0 < share < 1:
        raise UsageError(f"The tail share lies between 0 and 1, got {share}.")
    rising_E = np.sort(check_counts(count_E))
    share_E = np.cumsum(rising_E) / rising_E.sum()
    return max(1, int(rising_E[np.abs(share_E - share).argmin()]))


def thresholds(
    counts: Mapping[str, np.ndarray], config: MetaClipConfig, *, reference: str = "en"
) -> dict[str, float]:
    """One threshold per language, all with the reference language's tail share (MetaCLIP 2).

    A single language takes the configured threshold or share as it is.
    """
    share = config.tail_share
    if share is None and len(counts) > 1:
        if reference not in counts:
            raise UsageError(
                f"Thresholds of several languages follow {reference!r}, which is not among "
                f"{', '.join(sorted(counts))}.",
                hint="Give --tail-share, or name the reference language.",
            )
        share = tail_share(counts[reference], config.threshold)
    found: dict[str, float] = {}
    for language, count_E in counts.items():
        given = config.tail_share is None and (language == reference or len(counts) == 1)
        if given:
            found[language] = config.threshold
        elif not count_E.any():
            found[language] = np.inf  # nothing of this language matched, so nothing is drawn
        elif not share:
            found[language] = 1  # the reference has no tail
        else:
            found[language] = threshold_of_share(count_E, share) if share < 1 else np.inf
    return found


def keep_probability(matches: Matches, prob_E: np.ndarray) -> np.ndarray:
    """1 - prod(1 - p) over each text's entries, (U,); 0 for a text that holds none."""
    check_entry_numbers(matches, len(prob_E))
    offsets_U = matches.offsets()[:-1]
    some_U = matches.per_text() > 0
    kept_U = np.zeros(matches.texts)
    if some_U.any():
        kept_U[some_U] = 1 - np.multiply.reduceat(1 - prob_E[matches.entry_M], offsets_U[some_U])
    return kept_U


def keep(keep_U: np.ndarray, ids: np.ndarray | Sequence[int], *, seed: int) -> np.ndarray:
    """Which texts stay: a uniform hashed from (seed, id) below the probability, bool (U,).

    Raising a probability never drops a text, so sets of rising thresholds are nested.
    """
    return hash_uniform(seed, np.asarray(ids), _STREAM_KEEP) < keep_U


def keep_by_match(matches: Matches, prob_E: np.ndarray, uniform_M: np.ndarray) -> np.ndarray:
    """The texts, rising, of which any match's own draw is below its entry's probability."""
    check_entry_numbers(matches, len(prob_E))
    return np.unique(matches.text_M[uniform_M < prob_E[matches.entry_M]])


def choose_texts(row_U: np.ndarray, matched_U: np.ndarray, ids_U: np.ndarray, *, seed: int) -> np.ndarray:
    """One matched text for each row that has any, drawn evenly: places in U, rising.

    row_U: which row each text is of, rising; ids_U: the hash of the row's id, equal for its texts.
    """
    candidates = np.flatnonzero(matched_U)
    _, first, size = np.unique(row_U[candidates], return_index=True, return_counts=True)
    draw = hash_uniform(seed, ids_U[candidates[first]], _STREAM_TEXT)
    return candidates[first + np.minimum((draw * size).astype(np.int64), size - 1)]


_STREAM_KEEP, _STREAM_TEXT = 1, 2


def check_threshold(threshold: float) -> None:
    if not threshold > 0:  # also NaN
        raise UsageError(
            f"The threshold must be above 0, got {threshold}.", hint="The paper's 400M set has 20000."
        )


def check_counts(count_E: np.ndarray) -> np.ndarray:
    """As int64; refuses counts that nothing matched in, which have no shares."""
    counts = np.asarray(count_E)
    if not len(counts) or not counts.any():
        raise UsageError("No entry was ever matched: there is no share of matches to speak of.")
    if (counts < 0).any():
        raise UsageError(f"Counts cannot be negative, got {counts.min()}.")
    return counts.astype(np.int64)


def check_entry_numbers(matches: Matches, entries: int) -> None:
    if len(matches) and int(matches.entry_M.max()) >= entries:
        raise UsageError(
            f"A match names entry {int(matches.entry_M.max())}, but there are {entries} entries.",
            hint="Counts, probabilities and matches must come from the same metadata.",
        )


# --------------------------------------------------------------------------------------------------
# The same in a data loader
# --------------------------------------------------------------------------------------------------


class MetaClip:
    """A metadata list with its counts, which balances streams of pairs on the fly.

    `MetaClip(entries).fit(texts)` counts a pool; `balance(rows)` then lets through what is drawn.
    """

    def __init__(self, entries: Sequence[str], config: MetaClipConfig | None = None) -> None:
        self.config = config or MetaClipConfig()
        self.matcher = Matcher(entries, languages=self.config.languages)
        self.entries = self.matcher.entries
        self.count_E = np.zeros(len(self.entries), np.uint64)

    def fit(self, batches: Iterable[Sequence[str]]) -> MetaClip:
        """Count the entries over batches of texts; can be called again with more of the pool."""
        for texts in batches:
            self.count_E += count(self.matcher(texts), len(self.entries))
        return self

    def probabilities(self) -> np.ndarray:
        share = self.config.tail_share
        limit = self.config.threshold if share is None else threshold_of_share(self.count_E, share)
        return probabilities(self.count_E, limit)

    def keep_probability(self, texts: Sequence[str]) -> np.ndarray:
        """The chance of each text to stay, (U,)."""
        return keep_probability(self.matcher(texts), self.probabilities())

    def balance(
        self,
        rows: Iterable[Row],
        *,
        text: Callable[[Row], str],
        id: Callable[[Row], int],
        epoch: int = 0,
        batch: int = 4096,
    ) -> Iterator[Row]:
        """The rows that are drawn, in their order, as a stream for a data loader.

        `id` gives each row's own integer; another `epoch` draws another part of the head.
        """
        check_counts(self.count_E)
        prob_E = self.probabilities()
        waiting: list[Row] = []

        def drawn() -> Iterator[Row]:
            keep_U = keep_probability(self.matcher([text(row) for row in waiting]), prob_E)
            ids_U = np.array([id(row) for row in waiting], np.uint64)
            kept_U = keep(keep_U, ids_U, seed=self.config.seed + epoch)
            yield from (row for row, kept in zip(waiting, kept_U, strict=True) if kept)

        for row in rows:
            waiting.append(row)
            if len(waiting) == batch:
                yield from drawn()
                waiting = []
        if waiting:
            yield from drawn()


KEYS = Keys()
"""Nothing is learned: there are no weights to name."""


def example(seed: int) -> Example:
    import torch

    words = ["dog", "hot dog", "red", "car", "0", "street"]
    draws = hash_uniform(seed, np.arange(64, dtype=np.uint64)).reshape(8, 8)
    texts = [" ".join(words[int(x * len(words))] for x in row[: 1 + n]) for n, row in enumerate(draws)]
    balancer = MetaClip(words, MetaClipConfig(threshold=2, seed=seed)).fit([texts])

    def run(texts: Sequence[str], ids_U: torch.Tensor) -> dict[str, torch.Tensor]:
        keep_U = balancer.keep_probability(texts)
        return {
            "matches": torch.from_numpy(balancer.matcher(texts).per_text()),
            "keep_probability": torch.from_numpy(keep_U),
            "kept": torch.from_numpy(keep(keep_U, ids_U.numpy(), seed=seed)),
        }

    inputs = {"texts": texts, "ids_U": torch.arange(8)}
    shapes = {"matches": (8,), "keep_probability": (8,), "kept": (8,)}
    return Example(run, inputs, shapes, batched=("texts", "ids_U", *shapes))


@lru_cache(maxsize=3)
def _claim_pool(seed: int, count: int) -> LongTail:
    from moviola.data.long_tail import long_tail

    return long_tail(seed, count)


def claim_rows(arm: str, pool: LongTail, seed: int) -> np.ndarray:
    """The rows of the pool that an arm trains on, rising.

    "matched only", filtering without balancing, can be run too but is no arm of the claim.
    """
    from moviola.data.long_tail import metadata

    if arm == "raw pool":
        return np.arange(len(pool))
    entries = metadata()
    matches = Matcher(entries)(pool.texts)
    if arm == "matched only":
        return np.flatnonzero(matches.per_text())
    count_E = count(matches, len(entries))
    # about the share of matches that the paper's thresholds leave in the tail, as remembered
    prob_E = probabilities(count_E, threshold_of_share(count_E, 0.06))
    rows = np.flatnonzero(keep(keep_probability(matches, prob_E), np.arange(len(pool)), seed=seed))
    return rows if arm == "balanced" else np.sort(permutation(seed, 0, len(pool))[: len(rows)])


def run_claim(
    arm: str, seed: int, *, pairs: int = 20_000, steps: int = 950, batch: int = 128, per_class: int = 16
) -> dict[str, float]:
    """Train the same small CLIP on one arm's part of the pool, `steps` x `batch` pairs in every arm.

    Then new pictures, as many of each class, are named by prompt alone. Head and tail are the 20 classes
    that the pool shows most and least often. The learning rate was chosen on the raw pool of another seed.
    """
    import tempfile
    from pathlib import Path

    import torch

    from moviola.clip.config import ClipConfig, TextConfig, VitConfig
    from moviola.clip.model import CLIP
    from moviola.data import long_tail as world
    from moviola.metrics.classification import per_class_accuracy
    from moviola.training.loop import TrainConfig, train
    from moviola.training.objectives import Contrastive

    pool = _claim_pool(seed, pairs)
    data = world.PairBatches(pool, claim_rows(arm, pool, seed))
    torch.manual_seed(seed)
    vision = VitConfig(world.SIDE, 8, width=48, layers=1, heads=2, stem=((16, 0), (32, 0), (48, 0)))
    text = TextConfig(world.CONTEXT_LENGTH, world.vocabulary_size(), width=32, layers=1, heads=2)
    model = CLIP(ClipConfig(32, vision, text))
    config = TrainConfig(steps, batch, lr=2e-3, warmup=50, seed=seed, save_every=steps, log_every=steps)
    with tempfile.TemporaryDirectory() as folder:
        train(model, Contrastive(), data, config, Path(folder))
    pixels_NSS3, class_N = world.even_pictures(seed, per_class)
    with torch.no_grad():
        prompts_CD = model.encode_text(torch.from_numpy(world.tokens(world.prompts())))
        scores_CN = model.score(prompts_CD, model.encode_image(world.pixels(pixels_NSS3)))
    accuracy_C = per_class_accuracy(scores_CN.T.numpy(), class_N)[pool.order_C]
    return {
        "mean per-class accuracy": float(accuracy_C.mean()),
        "head": float(accuracy_C[:20].mean()),
        "tail": float(accuracy_C[-20:].mean()),
        "pairs": len(data),
    }


CLAIM = Claim(
    statement="A balanced part of a long-tailed pool teaches more than the pool, for the same pairs seen.",
    data="made web: 20,000 pictures with texts, half noise, 80 classes by a Zipf law; new pictures to name",
    metric="mean per-class accuracy",
    arms=("raw pool", "random subset", "balanced"),
    ours="balanced",
    baseline="raw pool",
    run=run_claim,
)
