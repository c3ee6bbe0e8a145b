"""Profiles of any shape with made-up moments, for what shows them."""

import numpy as np

from fastheads import HeadProfile
from fastheads.stats.arrays import MomentArrays
from fastheads.stats.names import KV_METRIC, METRICS, RATIO_METRIC, RATIO_SQUARE_METRIC, UPDATE_METRIC

ALL = (*METRICS, UPDATE_METRIC, KV_METRIC, RATIO_METRIC, RATIO_SQUARE_METRIC)
HOSTILE = '<img src=x onerror="document.title=1"></script><script>document.title=1</script>\x00\x1b[31m\u202e<!--{{DATA}}'


def made_up(rows, heads, *, kv=1, widths=None, layers=None, metrics=ALL, nan=False, seed=0, **metadata):
    """A profile of `rows` x `heads`, `kv` KV heads a layer; `widths`: the heads of each row; `nan`: no sample is finite."""
    rng = np.random.default_rng(seed)
    widths, layers = widths or [heads] * rows, layers or list(range(rows))
    moments = {}
    for metric in metrics:
        there = (
            np.arange(heads) < np.array([kv if metric == KV_METRIC else width for width in widths])[:, None]
        )
        some = there & (not nan)
        mean = np.exp(rng.normal(0, 0.7, (rows, heads)))
        if "ratio" in metric:
            mean *= 0.05
        elif metric.startswith("relative"):
            mean /= np.where(there, mean, 0).sum(1, keepdims=True) / there.sum(1, keepdims=True)
        else:
            mean *= np.linspace(1, 60, rows)[:, None]
        spread = mean * rng.uniform(
            0.1, 0.6, (rows, heads)
        )  # half of the samples are that much below, half above
        moments[metric] = MomentArrays(
            count=np.where(some, 40, 0),
            nonfinite=np.where(there & nan, 40, 0),
            mean=np.where(some, mean, 0.0),
            m2=np.where(some, 40 * spread**2, 0.0),
            min=np.where(some, mean - spread, np.inf),
            max=np.where(some, mean + spread, -np.inf),
        )
    sites = [
        {"name": f"model.layers.{layer}.self_attn.o_proj", "layer": layer, "num_heads": width, "head_dim": 64}
        for layer, width in zip(layers, widths, strict=True)
    ]
    data = {"source": "corpus.jsonl", "tokens": 12345, "sequences": 40, "complete": True}
    base = {"model": "some/model", "sites": sites, "token_agg": "all", "skip_first": 0, "data": data}
    return HeadProfile(moments, base | metadata)


def shapes():
    """Named profiles: usual shapes, and odd ones."""
    return {
        "30x9": made_up(30, 9, kv=3),
        "32x32": made_up(32, 32, kv=8),
        "126x128": made_up(126, 128, kv=8),
        "ragged": made_up(6, 16, kv=2, widths=[16, 8, 4, 16, 2, 12], layers=[0, 3, 4, 7, 8, 8]),
        "one": made_up(1, 1),
        "nan": made_up(8, 8, kv=2, nan=True),
        "hostile": made_up(
            4, 4, model=HOSTILE, data={"source": HOSTILE, "tokens": 3, HOSTILE: HOSTILE}, note=[HOSTILE]
        ),
    }
