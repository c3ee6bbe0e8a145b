"""The options of the command line that several commands have, and the values that options take."""

from enum import StrEnum
from typing import Annotated

import typer


def number_or_all(text: str | int) -> int | None:
    """What N|all stands for: None for all."""
    if str(text).strip().lower() == "all":
        return None
    try:
        return int(text)
    except ValueError:
        raise typer.BadParameter(f"{text!r} is neither a whole number nor all") from None


# Options that several commands have.
Include = Annotated[
    list[str] | None,
    typer.Option(
        help="Profile these attention modules too, though they are left out by default: a pattern for their names, "
        "such as '*.linear_attn'. May be given several times.",
        show_default=False,
    ),
]
Backend = Annotated[str, typer.Option(help="auto, loop, einsum, factored or triton.")]
Dtype = Annotated[str, typer.Option(help="Of the model: auto, float32, bfloat16 or float16.")]
Device = Annotated[str, typer.Option(help="auto (a GPU if there is one), cpu, cuda, ...")]
TrustRemoteCode = Annotated[
    bool, typer.Option("--trust-remote-code", help="Run code that comes with the model.")
]
Metric = Annotated[
    str | None,
    typer.Option(
        help="Which metric of those in the file, such as head_output_norm.",
        show_default="relative_head_residual_contribution_norm",
    ),
]
Heads = Annotated[
    int | None,
    typer.Option(
        parser=number_or_all,
        metavar="N|all",
        help="So many of the highest heads, and of the lowest; all: the whole ranking.",
    ),
]


class Cut(StrEnum):
    documents = "documents"
    stream = "stream"


class TokenAgg(StrEnum):
    last = "last"
    all = "all"
    token = "token"
