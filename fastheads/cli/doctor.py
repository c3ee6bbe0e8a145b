"""`fastheads doctor`: list the sites of a model and how each would be measured, and check them on one batch."""

import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from rich import box
from rich.console import Console
from rich.table import Table
from torch import nn

from fastheads.backends.registry import backend_for
from fastheads.capture.manager import HookManager
from fastheads.capture.verify import GEOMETRY, Finding
from fastheads.models.sites import HeadSite, decoder_of, find_sites
from fastheads.models.weights import dense_weight

ROWS, TOKENS = 2, 32  # of the batch; the last half of its last row is padding


@dataclass(frozen=True)
class Diagnosis:
    """The diagnosis of one site."""

    site: HeadSite
    weight: str = "-"
    backend: str = "-"
    finding: Finding | None = None
    problem: Exception | None = None

    def looks(self) -> tuple[Any, ...]:
        """The values that sites must share to be listed in one row."""
        geometry = None if self.finding is None else self.finding.geometry
        return self.site.num_heads, self.site.head_dim, self.weight, self.backend, geometry, str(self.problem)


def diagnose(
    model: nn.Module, *, include: str | Iterable[str] = (), backend: str = "auto"
) -> tuple[list[Diagnosis], Exception | None]:
    """Diagnose every site of `model`; return the diagnoses and the first problem, or None.

    Runs one batch of random tokens under `HookManager(model, verify=True)`, unless a weight or the backend is unsupported. Raises
    as `find_sites`.
    """
    sites = find_sites(model, include)
    found = [_weight_and_backend(site, backend) for site in sites]
    problem = next((d.problem for d in found if d.problem is not None), None)
    if problem is not None:
        return found, problem
    findings: dict[str, Finding] = {}
    try:
        with HookManager(model, "all", include=include, backend=backend, verify=True) as hooks:
            findings = hooks.findings
            with torch.inference_mode():
                decoder_of(model)(**_batch(model))
            hooks.get_results()
    except Exception as error:  # also from the model's own code: the table is still worth showing
        problem = error
    return [Diagnosis(d.site, d.weight, d.backend, findings.get(d.site.name)) for d in found], problem


def _weight_and_backend(site: HeadSite, backend: str) -> Diagnosis:
    try:
        weight = dense_weight(site)
        chosen = backend_for(backend, weight.device, weight.dtype, site.head_dim).name
    except (ValueError, RuntimeError) as error:
        return Diagnosis(site, type(site.module).__name__, problem=error)
    dtype = str(weight.dtype).removeprefix("torch.")
    return Diagnosis(site, f"{type(site.module).__name__} {dtype} {weight.device}", chosen)


def _batch(model: nn.Module) -> dict[str, torch.Tensor]:
    embedding: Any = model.get_input_embeddings()  # type: ignore[operator]
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, embedding.weight.shape[0], (ROWS, TOKENS), generator=generator)
    mask = torch.ones_like(ids)
    mask[-1, TOKENS // 2 :] = 0
    device = embedding.weight.device
    return {"input_ids": ids.to(device), "attention_mask": mask.to(device)}


def show(model: nn.Module, found: list[Diagnosis], console: Console) -> None:
    """Print the sites, equal ones in one row, and the meaning of the last column's words."""
    heads = sum(d.site.num_heads for d in found)
    console.print(f"{type(model).__name__}: {len(found)} sites, {heads} heads", soft_wrap=True)
    by_name: dict[str, dict[tuple[Any, ...], list[Diagnosis]]] = {}
    for d in found:
        by_name.setdefault(re.sub(r"\d+", "*", d.site.name), {}).setdefault(d.looks(), []).append(d)
    for name, groups in by_name.items():
        table = Table(
            title=name, title_justify="left", title_style="bold", box=box.SIMPLE_HEAD, pad_edge=False
        )
        table.add_column("layers", overflow="fold")
        for column in ("heads", "head_dim"):
            table.add_column(column, justify="right", no_wrap=True)
        for column in ("projection", "backend", "sum", "geometry"):
            table.add_column(column, overflow="fold")
        for alike in groups.values():
            site, finding = alike[0].site, alike[0].finding
            errors = [d.finding.error for d in alike if d.finding is not None]
            table.add_row(
                _ranges(d.site.layer for d in alike),
                str(site.num_heads),
                str(site.head_dim),
                alike[0].weight,
                alike[0].backend,
                f"{max(errors):.0e}" if errors else "-",
                "-" if finding is None else finding.geometry,
            )
        console.print(table)
    console.print("sum: the relative error of heads + bias against the projection's output", soft_wrap=True)
    for geometry in sorted({d.finding.geometry for d in found if d.finding is not None}):
        console.print(f"{geometry}: {GEOMETRY[geometry]}", soft_wrap=True)


def _ranges(numbers: Iterable[int]) -> str:
    """Format numbers as in 0-3,5."""
    runs: list[list[int]] = []
    for n in sorted(set(numbers)):
        if runs and n == runs[-1][1] + 1:
            runs[-1][1] = n
        else:
            runs.append([n, n])
    return ",".join(str(first) if first == last else f"{first}-{last}" for first, last in runs)
