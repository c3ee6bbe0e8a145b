"""Text about profiles, and numbers in columns."""

import numpy as np
import pytest
from drawn_profiles import made_up

from fastheads.results.text import about_samples, aligned, clean, ranges, samples_of
from fastheads.stats.names import RATIO_METRIC


def test_text_cannot_steer_what_shows_it():
    assert clean("a\x1b[31mé\u202e\x00\ud800") == "a?[31mé???"


@pytest.mark.parametrize(
    ("values", "errors", "shown"),
    [
        ([0.3229, 0.0166], None, ["0.32290", "0.01660"]),
        ([1234.5, 12.345], None, ["1234.50", "12.35"]),
        ([1.5, 2.5], [0.00004, 0.00004], ["1.50000", "2.50000"]),
        ([1e-12, 1.0], None, ["1.000e-12", "1.000e+00"]),
        ([1.0, 3e7], None, ["1.000e+00", "3.000e+07"]),
        ([0.0, np.nan], None, ["0", "nan"]),
    ],
)
def test_a_column_has_as_many_decimals_as_its_numbers_need(values, errors, shown):
    number = aligned(np.array(values), None if errors is None else np.array(errors))
    assert [number(value) for value in values] == shown


def test_whole_numbers_in_a_row_are_a_range():
    assert ranges([0, 1, 2, 3, 8]) == "0-3, 8"
    assert ranges([5]) == "5"
    assert ranges([]) == ""


def test_samples_are_told_with_their_unit():
    profile = made_up(2, 3, metrics=[RATIO_METRIC], skip_first=1)
    assert (
        about_samples(profile, RATIO_METRIC)
        == "40 sequences a head, token_agg all, skip_first 1, 12,345 tokens"
    )
    profile.arrays[RATIO_METRIC].count[0, 0] = 7
    profile.metadata["token_agg"] = "token"
    assert samples_of(profile, RATIO_METRIC) == "7 to 40 tokens a head"
    assert samples_of(made_up(2, 3, nan=True), RATIO_METRIC) == "0 sequences a head"
