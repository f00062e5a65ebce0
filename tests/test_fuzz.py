"""The fuzzers of fuzz.py: a few hundred cases each time, many when asked for (pytest -m slow)."""
import fuzz
import pytest


def test_damaged_images_are_rejected_or_taken(tmp_path, capfd):
    outcomes = fuzz.run(range(200), tmp_path)
    assert 20 < outcomes["taken"] < 150 and len(outcomes) > 20  # neither harmless nor always the same
    out, err = capfd.readouterr()
    assert out == "" and fuzz.NAME not in err


@pytest.mark.slow
def test_many_damaged_images_are_rejected_or_taken(tmp_path):
    fuzz.run(range(1000, 16000), tmp_path)
