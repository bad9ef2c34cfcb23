"""MetaCLIP's claim, cut down: what each arm trains on, and that a run is seeded and learns."""

from __future__ import annotations

import numpy as np
import pytest

from moviola.data.long_tail import CLASSES, long_tail
from moviola.systems.curation.metaclip import CLAIM, claim_rows, run_claim


@pytest.fixture(scope="module")
def pool():
    return long_tail(0, 8000)


@pytest.fixture(scope="module")
def rows(pool):
    return {arm: claim_rows(arm, pool, 0) for arm in (*CLAIM.arms, "matched only")}


def test_arms_are_parts_of_one_pool(pool, rows):
    for found in rows.values():
        assert len(np.unique(found)) == len(found)
        assert found.min() >= 0
        assert found.max() < len(pool)
    assert len(rows["raw pool"]) == len(pool)
    assert len(rows["random subset"]) == len(rows["balanced"]) < len(rows["matched only"]) < len(pool)
    assert set(rows["balanced"]) < set(rows["matched only"])
    assert not np.array_equal(rows["balanced"], claim_rows("balanced", pool, 1))
    assert not np.array_equal(rows["random subset"], claim_rows("random subset", pool, 1))


def test_noise_goes_where_texts_are_matched_and_only_there(pool, rows):
    noise = {arm: float((pool.class_N[found] < 0).mean()) for arm, found in rows.items()}
    assert noise["matched only"] == noise["balanced"] == 0
    assert noise["raw pool"] == 0.5
    assert noise["random subset"] == pytest.approx(0.5, abs=0.05)


def test_balancing_thins_the_head_and_spares_the_tail(pool, rows):
    def shown(arm):
        class_N = pool.class_N[rows[arm]]
        return np.bincount(class_N[class_N >= 0], minlength=len(CLASSES))[pool.order_C]

    matched_C, balanced_C, random_C = shown("matched only"), shown("balanced"), shown("random subset")
    kept_C = balanced_C / matched_C
    assert kept_C[0] < 0.5
    assert kept_C[-40:].mean() > 0.75
    tail = slice(-40, None)
    assert balanced_C[tail].sum() / balanced_C.sum() > 1.2 * matched_C[tail].sum() / matched_C.sum()
    assert random_C[tail].sum() / random_C.sum() < 1.15 * matched_C[tail].sum() / matched_C.sum()


def test_a_cut_down_run_is_seeded_and_reports_the_arm():
    small = {"pairs": 1500, "steps": 8, "batch": 32, "per_class": 1}
    first = run_claim("balanced", 0, **small)
    assert first == run_claim("balanced", 0, **small)
    assert set(first) == {CLAIM.metric, "head", "tail", "pairs"}
    assert first["pairs"] == run_claim("random subset", 0, **small)["pairs"] < 750
    assert run_claim("raw pool", 0, **small)["pairs"] == 1500


@pytest.mark.slow
def test_both_arms_learn_in_a_short_run():
    """Which one is better is the claim's to say, with three seeds and longer runs."""
    chance = 100 / len(CLASSES)
    for arm in (CLAIM.ours, CLAIM.baseline):
        assert run_claim(arm, 0, steps=300)[CLAIM.metric] > 6 * chance, arm
