"A short dose of tests/chaos; the long ones are run by hand: `python -m tests.chaos.fuzz --help`."
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1]))

from tests.chaos.fuzz import LOADERS, fuzz, make_kit
from tests.chaos.kill import kill

@pytest.mark.parametrize('what', LOADERS)
def test_what_nobody_has_spoilt_opens(what, tmp_path):
    "Else the fuzzer would be content with a refusal that has another reason."
    LOADERS[what](make_kit(tmp_path))

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
