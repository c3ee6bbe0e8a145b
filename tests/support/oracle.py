"""What the results must be: float64 dense algebra over the captured inputs of o_proj, sharing no code with the library."""

from contextlib import contextmanager

import numpy as np
import torch

METRICS = (
    "head_output_norm",
    "head_residual_contribution_norm",
    "relative_head_output_norm",
    "relative_head_residual_contribution_norm",
)
UPDATE_METRIC = "head_residual_update_norm"
RATIO_METRICS = ("head_residual_ratio", "head_residual_ratio_square")
WITHOUT_RATIO = (
    *METRICS,
    UPDATE_METRIC,
)  # for tests that count the inputs that are kept, and not the residual streams


@contextmanager
def captured_inputs(projections):
    """Yields a list per projection of its inputs, float64 copies, one for each firing."""
    inputs = [[] for _ in projections]
    handles = [
        p.register_forward_pre_hook(lambda _m, args, i=i: inputs[i].append(args[0].detach().double().clone()))
        for i, p in enumerate(projections)
    ]
    try:
        yield inputs
    finally:
        for handle in handles:
            handle.remove()


def dense_norms(x, weight, num_heads):
    """(‖z_h‖, ‖W_h z_h‖), each [batch, seq, heads]; numpy, float64."""
    x, weight = x.double().cpu().numpy(), weight.detach().double().cpu().numpy()
    batch, seq, width = x.shape
    head_dim = width // num_heads
    out, contribution = np.empty((2, batch, seq, num_heads))
    for h in range(num_heads):
        z = x[:, :, h * head_dim : (h + 1) * head_dim]
        out[:, :, h] = np.sqrt((z**2).sum(-1))
        contribution[:, :, h] = np.sqrt(((z @ weight[:, h * head_dim : (h + 1) * head_dim].T) ** 2).sum(-1))
    return out, contribution


def samples(x, weight, num_heads, mask, token_agg, skip_first=0):
    """{metric: [samples, heads]} of one forward; mask: [batch, seq] of 0/1, or None."""
    result = {name: [] for name in METRICS}
    norms = dense_norms(x, weight, num_heads)
    batch, seq = x.shape[:2]
    for b in range(batch):
        real = [s for s in range(seq) if mask is None or mask[b][s]][skip_first:]
        if not real:
            continue
        for name, relative, values in zip(METRICS[:2], METRICS[2:], norms, strict=True):
            rows = values[b, real]
            rows = {"last": rows[-1:], "all": rows.mean(0, keepdims=True), "token": rows}[token_agg]
            result[name].append(rows)
            with np.errstate(invalid="ignore"):
                layer_mean = rows.mean(-1, keepdims=True)
                # the relative samples of a layer whose mean is infinite are no samples
                result[relative].append(np.where(np.isfinite(layer_mean), rows / layer_mean, np.nan))
    return {k: np.concatenate(v) if v else np.empty((0, num_heads)) for k, v in result.items()}


def statistics(values):
    """{statistic: [heads]} of samples [n, heads]."""
    columns = {s: [] for s in ("mean", "var", "std", "sem", "min", "max", "count", "nonfinite")}
    for column in values.T:
        finite = column[np.isfinite(column)]
        n = len(finite)
        var = finite.var(ddof=1) if n > 1 else np.nan
        row = {
            "mean": finite.mean() if n else np.nan,
            "var": var,
            "std": np.sqrt(var),
            "sem": np.sqrt(var / n) if n > 1 else np.nan,
            "min": finite.min() if n else np.nan,
            "max": finite.max() if n else np.nan,
            "count": n,
            "nonfinite": len(column) - n,
        }
        for k, v in row.items():
            columns[k].append(v)
    return {k: np.array(v) for k, v in columns.items()}


def expected(inputs, weight, num_heads, masks, token_agg, skip_first=0):
    """{metric: {statistic: [heads]}} over several forwards of one projection."""
    parts = [
        samples(x, weight, num_heads, mask, token_agg, skip_first)
        for x, mask in zip(inputs, masks, strict=True)
    ]
    return {m: statistics(np.concatenate([p[m] for p in parts])) for m in METRICS}


def assert_results(results, sites, inputs, masks, token_agg, rtol, skip_first=0, weights=None):
    """Every statistic of every metric, row and head; NaN only where the oracle has NaN."""
    for row, site in enumerate(sites):
        weight = site.module.weight if weights is None else weights[row]
        want = expected(inputs[row], weight, site.num_heads, masks, token_agg, skip_first)
        for metric, stats in want.items():
            # A spread is known only as well as the samples that it is the spread of.
            scale = np.abs(np.nan_to_num(stats["mean"]))
            for stat, value in stats.items():
                got = results[metric][stat][row, : site.num_heads].numpy()
                if stat in ("count", "nonfinite"):
                    np.testing.assert_array_equal(got, value, err_msg=f"{metric} {stat} row {row}")
                    continue
                assert (np.isnan(got) == np.isnan(value)).all(), (metric, stat, row, got, value)
                atol = rtol * scale * (1 if stat in ("std", "sem") else 0)
                if stat == "var":
                    error = rtol * scale  # of a sample; of equal ones the spread is theirs alone
                    atol = 2 * error * np.nan_to_num(stats["std"]) + error**2
                bound = rtol * np.abs(value) + atol
                ok = np.isnan(value) | (np.abs(got - value) <= bound)
                assert ok.all(), (metric, stat, row, got, value)


def equal_results(a, b):
    """Bit-identical statistics; NaN equals NaN."""
    return all(
        torch.equal(torch.nan_to_num(a[m][s], nan=-1.0), torch.nan_to_num(b[m][s], nan=-1.0))
        for m in METRICS
        for s in a[m]
    )
