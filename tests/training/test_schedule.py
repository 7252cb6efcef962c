"""Learning rates over the steps."""

import math

import pytest

from sellarec.config import Dense
from sellarec.training.schedule import learning_rate_factor


def factors(steps: int, **settings) -> list[float]:
    return [learning_rate_factor(Dense(**settings), step, steps) for step in range(steps)]


@pytest.mark.parametrize("schedule", ["cosine", "constant", "wsd"])
def test_every_schedule_rises_over_its_warm_up(schedule):
    assert factors(20, schedule=schedule, warmup=0.2)[:5] == pytest.approx([0.25, 0.5, 0.75, 1, 1])


def test_a_cosine_goes_to_0_and_a_constant_stays():
    assert factors(12, schedule="cosine", warmup=0.1)[1:] == pytest.approx(
        [0.5 * (1 + math.cos(math.pi * step / 11)) for step in range(11)]
    )
    assert factors(12, schedule="constant", warmup=0.1)[1:] == [1.0] * 11


def test_wsd_is_constant_until_its_decay_and_then_a_line_to_0():
    """The step after the last one would have a rate of 0, as with the cosine."""
    found = factors(20, schedule="wsd", warmup=0.1, decay=0.25)
    assert found == pytest.approx([0.5, 1] + [1] * 13 + [1, 0.8, 0.6, 0.4, 0.2])
    assert factors(4, schedule="wsd", warmup=0.5, decay=0.5) == pytest.approx([0.5, 1, 1, 0.5])


def test_wsd_of_a_longer_training_is_the_same_until_the_shorter_one_decays():
    short, long = (factors(steps, schedule="wsd", warmup=4 / steps, decay=0.2) for steps in (20, 40))
    assert short[:17] == long[:17]
