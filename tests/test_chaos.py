"A short dose of tests/chaos; the long ones are run by hand: `python -m tests.chaos.fuzz --help`."
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1]))

from tests.chaos.fuzz import fuzz
from tests.chaos.kill import kill

@pytest.mark.slow
def test_nothing_odd_is_more_than_refused():
    count, findings = fuzz(20, seed=123)
    assert count > 5
    assert not findings

@pytest.mark.slow
def test_a_killed_training_goes_on_to_the_same_bits():
    kills, findings = kill(12, names=('tokenizer',))
    assert kills > 0
    assert not findings
