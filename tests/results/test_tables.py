"""Tables of a profile: CSV, Parquet, one metric by name."""

import csv
import io
import sys

import numpy as np
import pandas as pd
import pytest
from drawn_profiles import made_up

from fastheads.errors import MissingExtraError, OptionError
from fastheads.stats.names import METRICS, RATIO_METRIC

PROFILE = made_up(4, 6, kv=2, widths=[6, 2, 4, 6])


def test_csv_and_parquet_hold_the_same_table(tmp_path):
    wanted = PROFILE.to_pandas()
    PROFILE.to_csv(tmp_path / "new" / "t.csv")
    PROFILE.to_parquet(tmp_path / "t.parquet")
    with (tmp_path / "new" / "t.csv").open() as file:
        found = list(csv.DictReader(file))
    assert list(found[0]) == list(wanted.columns)
    for row, other in zip(found, wanted.to_dict("records"), strict=True):
        assert {name: type(other[name])(cell) for name, cell in row.items()} == other
    pd.testing.assert_frame_equal(pd.read_parquet(tmp_path / "t.parquet"), wanted, check_exact=True)


def test_what_is_unknown_is_empty(tmp_path):
    one = made_up(1, 2, metrics=[RATIO_METRIC])
    planes = one.arrays[RATIO_METRIC]
    planes.count[:], planes.m2[:] = 1, 0
    one.to_csv(tmp_path / "t.csv")
    text = (tmp_path / "t.csv").read_text()
    assert "nan" not in text and text.startswith(
        "layer,head,metric,mean,var,std,sem,min,max,count,nonfinite\n"
    )
    assert pd.read_csv(io.StringIO(text))["sem"].isna().all()
    made_up(1, 2, nan=True, metrics=["head_output_norm"]).to_csv(tmp_path / "t.csv")
    assert len((tmp_path / "t.csv").read_text().splitlines()) == 3  # samples, though none is finite


def test_a_metric_by_its_name():
    np.testing.assert_array_equal(PROFILE[METRICS[0]]["mean"], PROFILE.statistics(METRICS[0])["mean"])
    with pytest.raises(OptionError, match="no metric 'size' in this profile; it has head_output_norm, "):
        PROFILE["size"]


def test_without_pyarrow_the_error_names_the_extra(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(MissingExtraError, match=r"pip install 'fastheads\[corpus\]'"):
        PROFILE.to_parquet(tmp_path / "t.parquet")
    assert not list(tmp_path.iterdir())
