"""`fastheads report`: saved profiles as a page for a browser."""

from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated

import typer

from fastheads.cli.messages import note


def report(
    files: Annotated[
        list[Path],
        typer.Argument(help="Profiles that `fastheads profile` wrote.", show_default=False),
    ],
    output: Annotated[Path, typer.Option("--output", "-o", help="The file for the page: .html.")] = Path(
        "report.html"
    ),
    ablation: Annotated[
        Path | None,
        typer.Option(
            help="Also draw the curves of this file, which `fastheads ablate` wrote.", show_default=False
        ),
    ] = None,
) -> None:
    """Write saved profiles as one HTML file that opens in a browser, offline.

    It shows a heatmap and a ranking of any metric, two metrics against each other, and where the numbers come from.
    """
    from fastheads.results.ablation import AblationResult
    from fastheads.results.files import check_writable
    from fastheads.results.head_profile import HeadProfile
    from fastheads.results.report.ablation import curves_of
    from fastheads.results.report.page import check_name, save_page
    from fastheads.results.report.payload import Named

    check_name(output)
    check_writable(output)
    curves = None if ablation is None else curves_of(AblationResult.load(ablation))
    profiles = []
    for file in files:
        profile = HeadProfile.load(file)
        written = datetime.fromtimestamp(file.stat().st_mtime, UTC).strftime("%Y-%m-%d %H:%M UTC")
        profiles.append(Named(str(file), profile, {"name": str(file), "written": written}))
    if output.exists():
        note(f"{output} exists: it is replaced")
    save_page(profiles, output, curves)
    typer.echo(f"wrote {output}; open it in a browser: {output.resolve().as_uri()}")
