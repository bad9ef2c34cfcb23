from __future__ import annotations

import pytest

from moviola.systems.pretraining.clip import CLAIM, run_claim


@pytest.mark.slow
def test_an_untrained_model_does_not_know_and_the_run_is_seeded():
    assert run_claim("untrained", 0) == run_claim("untrained", 0)
    assert run_claim("untrained", 0)[CLAIM.metric] < 20


@pytest.mark.slow
def test_the_claim_shows_in_one_short_run():
    trained, shuffled = run_claim("clip", 0), run_claim("shuffled", 0)
    assert trained[CLAIM.metric] > shuffled[CLAIM.metric] + 5
