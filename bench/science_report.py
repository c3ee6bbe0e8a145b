"""Show a report of `bench/science.py`: as tables, and drawn.

python bench/science_report.py science.json --plot science.png
"""

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np

TRUTHS = ("zero_ce", "zero_kl", "mean_ce", "mean_kl")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("report", type=Path)
    parser.add_argument("--plot", type=Path)
    options = parser.parse_args()
    report = json.loads(options.report.read_text())
    print(table(report))
    if options.plot:
        draw(report, options.plot)


def table(report: dict[str, Any]) -> str:
    """Format the correlations and the curves for a terminal."""
    lines = [f"\n{report['model']}: {report['layers']} layers, {report['heads']} heads", ""]
    lines.append(
        f"Spearman with {len(report['single_heads'])} single heads silenced"
        + " " * 6
        + "".join(f"{t:>22}" for t in TRUTHS)
    )
    by_zero = sorted(report["correlations"].items(), key=lambda item: -(item[1]["zero_kl"]["rho"] or 0))
    for name, of in by_zero:
        lines.append(
            f"{name:42}"
            + "".join(f"{of[t]['rho']:8.2f} ({of[t]['low']:5.2f} {of[t]['high']:5.2f})" for t in TRUTHS)
        )
    lines.append(
        f"{'(split-half reliability)':42}"
        + "".join(f"{report['reliability'][t]:8.2f}{'':14}" for t in TRUTHS)
    )
    for text, curves in report["curves"].items():
        lines += [
            "",
            f"rise in loss on {text} (base {curves['base']['mean']:.3f}), mean (median), lowest heads zeroed",
        ]
        points = curves["points"]
        lines.append(" " * 42 + "".join(f"{point['fraction']:>16.0%}" for point in points))
        for name in points[0]["scores"]:
            found = [point["scores"][name] for point in points]
            lines.append(f"{name:42}" + "".join(f"{f['mean']:8.3f} ({f['median']:5.3f})" for f in found))
        for name in ("random", "same_layers"):
            means = [[draw["mean"] for draw in point[name]["draws"]] for point in points]
            lines.append(
                f"{name + ': mean (least) of ' + str(len(means[0])):42}"
                + "".join(f"{np.mean(m):8.3f} ({min(m):5.3f})" for m in means)
            )
            below = [sum(more["mean"] <= 0 for more in point[name]["more_than_ratio"]) for point in points]
            lines.append(f"{'  draws no worse than the ratio':42}" + "".join(f"{n:16}" for n in below))
    return "\n".join(lines)


def rounded(value: Any) -> Any:
    """Round numbers to six digits, and make NaN null."""
    if isinstance(value, dict):
        return {key: rounded(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [rounded(item) for item in value]
    if isinstance(value, float):
        return float(f"{value:.6g}") if np.isfinite(value) else None
    return value


def draw(report: dict[str, Any], path: Path) -> None:
    """Draw the curves on both texts, and the correlations."""
    import matplotlib as mpl
    from matplotlib.figure import Figure

    colors = mpl.colormaps["tab10"].colors  # type: ignore[attr-defined]
    figure = Figure(figsize=(15, 5), layout="constrained")
    axes = figure.subplots(1, 3)
    for plot, (text, curves) in zip(axes, report["curves"].items(), strict=False):
        points = curves["points"]
        x = [100 * point["fraction"] for point in points]
        for name, color, label in (
            ("random", "0.75", "random heads"),
            ("same_layers", "tab:olive", "random, same layers as the ratio's"),
        ):
            means = np.array([[one["mean"] for one in point[name]["draws"]] for point in points])
            plot.fill_between(
                x,
                means.min(1),
                means.max(1),
                color=color,
                alpha=0.35,
                lw=0,
                label=f"{label}: {means.shape[1]} draws",
            )
        for number, name in enumerate(points[0]["scores"]):
            found = [point["scores"][name] for point in points]
            mean = np.array([f["mean"] for f in found])
            error = np.abs(np.array([[f["low"], f["high"]] for f in found]).T - mean)
            plot.errorbar(
                x, mean, error, color=colors[number % 10], marker="o", ms=3, capsize=2, lw=1.4, label=name
            )
        plot.set(
            xlabel="heads zeroed, lowest first, %",
            ylabel="rise in loss, nats per token",
            title=f"{text}: {report['model']}",
        )
        plot.set_yscale("symlog", linthresh=0.05)  # linear near 0, since some rises are negative
    axes[0].legend(fontsize=6.5)
    names = sorted(report["correlations"], key=lambda name: report["correlations"][name]["zero_kl"]["rho"])
    for offset, truth, color in ((0.2, "zero_kl", "tab:blue"), (-0.2, "mean_kl", "tab:orange")):
        found = [report["correlations"][name][truth] for name in names]
        rho = np.array([f["rho"] for f in found])
        error = np.abs(np.array([[f["low"], f["high"]] for f in found]).T - rho)
        axes[2].barh(
            np.arange(len(names)) + offset,
            rho,
            0.4,
            xerr=error,
            color=color,
            label=truth,
            error_kw={"lw": 0.8},
        )
    axes[2].set_yticks(range(len(names)), names, fontsize=7)
    axes[2].axvline(0, color="0.3", lw=0.8)
    axes[2].set(title="Spearman with single heads silenced", xlabel="95 % intervals over heads and sequences")
    axes[2].legend(fontsize=7, loc="lower right")
    figure.savefig(path, dpi=110)


if __name__ == "__main__":
    main()
