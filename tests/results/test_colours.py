"""Colours of values: limits, places on the palette."""

import math

import numpy as np
import pytest

from fastheads.results.colours import Colours, colours_of
from fastheads.stats.names import METRICS, RATIO_METRIC

NORM, RELATIVE = METRICS[0], METRICS[3]


def test_relative_means_diverge_from_one():
    found = colours_of(RELATIVE, np.array([[0.5, 1.0, 4.0]]))
    assert found == Colours("diverging", 0.5, 4.0, 1.0)
    assert [found.position(x) for x in (0.1, 0.5, 0.75, 1.0, 2.5, 4.0, 9.0)] == pytest.approx(
        [0, 0, 0.25, 0.5, 0.75, 1, 1]
    )
    assert colours_of(RELATIVE, np.array([2.0, 3.0])).low == pytest.approx(1.0, abs=1e-5)  # none is below one
    assert colours_of(RELATIVE, np.array([0.1, 0.2]), of_means=False).kind == "linear"


def test_ratios_begin_at_zero():
    found = colours_of(RATIO_METRIC, np.array([0.1, 0.3, np.nan]))
    assert found == Colours("linear", 0.0, 0.3)
    assert [found.position(x) for x in (0.0, 0.15, 0.3)] == pytest.approx([0, 0.5, 1])


def test_norms_that_span_much_are_logarithmic():
    found = colours_of(NORM, np.array([1.0, 10.0, 100.0]))
    assert found == Colours("log", 1.0, 100.0)
    assert [found.position(x) for x in (0.0, 1.0, 10.0, 100.0)] == pytest.approx([0, 0, 0.5, 1])
    assert colours_of(NORM, np.array([1.0, 2.0])) == Colours("linear", 1.0, 2.0)
    assert colours_of("own_metric", np.array([-1.0, 1.0, 1000.0])).kind == "linear"


def test_outliers_are_beyond_the_limits():
    values = np.append(np.linspace(1, 2, 98), [50.0, 90.0])
    found = colours_of("own_metric", values)
    assert found.low > 1 and found.high <= 50 and found.position(90.0) == 1
    few = np.array([1.0, 2.0, 50.0])  # of so few none is an outlier
    assert (colours_of("own_metric", few).low, colours_of("own_metric", few).high) == (1.0, 50.0)


@pytest.mark.parametrize(
    "values", [[], [math.nan], [math.inf, -math.inf], [0.0], [3.0, 3.0], [-2.0], [1e300, -1e300]]
)
@pytest.mark.parametrize("metric", [NORM, RELATIVE, RATIO_METRIC, "own_metric"])
def test_there_are_colours_for_anything(metric, values):
    found = colours_of(metric, np.array(values))
    assert math.isfinite(found.low) and found.low < found.high
    for value in (-1.0, 0.0, 3.0, 1e300):
        assert 0 <= found.position(value) <= 1
