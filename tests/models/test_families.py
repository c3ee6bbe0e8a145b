"""Every causal-LM family of the installed transformers: its sites, their geometry and its moments, against its own attention.

The truth about the heads is taken where the heads are made: from the output of transformers' attention interface, or where a
family does not use it, from the softmax. A table says which families are not covered and why; it is checked both ways.
"""

import copy
import sys
from contextlib import ExitStack, contextmanager
from pathlib import Path

import families
import pytest
import torch
from oracle import expected
from torch.overrides import TorchFunctionMode
from transformers.modeling_utils import AttentionInterface

import fastheads
from fastheads.capture.verify import CHANGED, EXACT, UNSEEN
from fastheads.models.weights import dense_weight

PAGE = Path(__file__).parents[2] / "docs" / "models.md"
MASK = [[0, 0, 1, 1, 1, 1, 1], [1] * 7]
SILENCED = 1  # the head that is silenced: not the first, so that a shift would show
RTOL = 5e-6  # float32 products of up to 128 terms; the metric itself asks for it

COVERED = [f for f in families.FAMILIES if f not in families.REFUSED and families.why_missing(f) is None]


class Attending(TorchFunctionMode):
    """Records, in order, the heads that attention modules make and what the projections are given.

    `made`: (module, number of heads, head_dim or None, output `[B, S, heads, head_dim]` or None), each once its projection ran;
    `given`: for each of these the row of the projection and its input. `silence` names heads to set to zero where they are made.
    """

    def __init__(self, model, projections, silence=lambda heads: ()):
        super().__init__()
        self.made, self.given, self.outputs = [], [], []
        self._model, self._projections, self._silence = model, projections, silence
        self._running, self.by_interface = [], set()
        self._stack = ExitStack()

    def __enter__(self):
        for module in self._model.modules():
            self._hook(module.register_forward_pre_hook(lambda m, _: self._running.append(m)))
            self._hook(module.register_forward_hook(self._left))
        for row, projection in enumerate(self._projections):
            self._hook(projection.register_forward_hook(self._projected(row)))
        for name in {type(m).__module__ for m in self._model.modules()}:
            if hasattr(sys.modules[name], "eager_attention_forward"):
                self._stack.enter_context(self._spying(sys.modules[name]))
        return super().__enter__()

    def __exit__(self, *error):
        self._stack.close()
        return super().__exit__(*error)

    def _hook(self, handle):
        self._stack.callback(handle.remove)

    def _left(self, *_):
        self._running.pop()

    def _projected(self, row):
        def hook(_module, args, output):
            self.given.append((row, args[0].clone(), len(self.made)))
            self.outputs.append(output.clone())

        return hook

    @contextmanager
    def _spying(self, module):
        eager = module.eager_attention_forward

        def spy(owner, *args, **kwargs):
            self.by_interface.add(owner)
            output, *rest = eager(owner, *args, **kwargs)
            output = self._silenced(output, 2)
            self.made.append((owner, output.shape[2], output.shape[3], output.clone()))
            return output, *rest

        module.eager_attention_forward = spy
        try:
            yield
        finally:
            module.eager_attention_forward = eager

    def __torch_function__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        name = getattr(function, "__name__", "")
        owner = self._running[-1] if self._running else None
        if owner in self.by_interface or type(owner).__name__ in families.NOT_OVER_TOKENS:
            return result
        if name == "scaled_dot_product_attention":  # [B, heads, S, head_dim]
            result = self._silenced(result, 1)
            self.made.append((owner, result.shape[1], result.shape[3], result.transpose(1, 2).clone()))
        if "softmax" not in name or result.shape[-1] < len(MASK[0]):  # a router's
            return result
        if result.dim() == 3:  # [B·heads, S, keys]
            weights = self._silenced(result.view(len(MASK), -1, *result.shape[1:]), 1)
            self.made.append((owner, weights.shape[1], None, None))
            return weights.view_as(result)
        if result.dim() == 4:  # [B, heads, S, keys]
            result = self._silenced(result, 1)
            self.made.append((owner, result.shape[1], None, None))
        return result

    def _silenced(self, tensor, dim):
        silent = self._silence(tensor.shape[dim])
        tensor = tensor.clone() if silent else tensor
        for head in silent:
            tensor.select(dim, head).zero_()
        return tensor


def test_the_tables_name_every_family_and_no_other():
    """A family that is new in transformers is tested at once; one that is gone shows where the release is the one written for."""
    tables = [families.REFUSED, families.NOT_BUILT, families.BUILT_FROM, families.PART, families.ROWS]
    named = set().union(*tables, families.OWN, families.BEFORE_PROJECTION, families.HEADS_PER_UNIT)
    assert set(families.REFUSED).isdisjoint(families.NOT_BUILT)
    if families.RELEASE == families.WRITTEN_FOR:
        assert named <= set(families.FAMILIES)
        served = len(families.FAMILIES) - len(families.REFUSED) - len(families.NOT_BUILT)
        assert f"{served} of the {len(families.FAMILIES)} causal-LM families" in PAGE.read_text()
    assert len(COVERED) >= 110


@pytest.mark.parametrize("family", [f for f in families.FAMILIES if f in families.REFUSED])
@pytest.mark.filterwarnings("ignore")
def test_refused(family):
    with pytest.raises(fastheads.NoSitesError, match=families.REFUSED[family]):
        fastheads.HookManager(families.build(family))


@pytest.mark.parametrize("family", [f for f in families.NOT_BUILT if f in families.FAMILIES])
@pytest.mark.filterwarnings("ignore")
def test_not_built(family):
    """One that can be built and run has to leave the table."""
    if families.why_missing(family) is None:
        pytest.skip("what is missing elsewhere is here: it is tested as all others are")
    with pytest.raises(Exception), torch.no_grad():  # noqa: B017  # whatever transformers says
        families.build(family)(**families.batch(family, MASK))


@pytest.mark.parametrize("family", COVERED)
@pytest.mark.filterwarnings("ignore")  # transformers' own, of models that are built in an unusual way
def test_family(family):
    model = families.build(family)
    batch = families.batch(family, MASK)
    sites = fastheads.find_sites(model)
    projections = [site.module for site in sites]
    hooks = fastheads.HookManager(model, "all", verify=True, allow_skipped=family in families.SKIPS)
    with hooks, torch.no_grad(), Attending(model, projections) as attending:
        model(**batch)
        results = hooks.get_results()
    assert all(model.get_submodule(site.name) is site.module for site in sites)
    assert geometry(families.build(family, implementation=None)) == geometry(model)
    check_geometry(family, sites, attending)
    check_findings(family, sites, attending, hooks.findings)
    check_heads_fall_silent(family, model, batch, sites)
    for row, site in enumerate(sites):
        inputs = [x for r, x, _ in attending.given if r == row]
        outputs = [out for (r, _, _), out in zip(attending.given, attending.outputs, strict=True) if r == row]
        weight = check_sum(site, inputs, outputs)
        check_moments(results, row, site, inputs, weight)


def geometry(model):
    return [(s.name, s.layer, s.num_heads, s.head_dim) for s in fastheads.find_sites(model)]


def check_findings(family, sites, attending, findings):
    """The self-check sees the heads where the model uses the attention interface, and whether they were changed."""
    assert list(findings) == [sites[row].name for row in dict.fromkeys(row for row, *_ in attending.given)]
    seen = {finding.geometry for finding in findings.values()}
    if families.RELEASE < families.WRITTEN_FOR and seen == {UNSEEN}:
        return  # some families of older releases call their attention in other ways
    if attending.by_interface and hasattr(AttentionInterface, "get_interface"):
        assert seen == {CHANGED if family in families.BEFORE_PROJECTION else EXACT}
    else:
        assert seen == {UNSEEN}


def check_geometry(family, sites, attending):
    """Every attention that ran has a site, and the heads of the site are those it made."""
    unit = families.HEADS_PER_UNIT.get(family, 1)
    taken, same = 0, []
    for row, x, made in attending.given:
        site = sites[row]
        assert made > taken, f"{site.name} ran without attention before it"
        of_this = attending.made[taken:made]
        taken = made
        owner, heads, head_dim, output = of_this[-1]
        assert len(of_this) == 1 or {m[0] for m in of_this} == {owner}, (
            f"attention without a site: {of_this[0][0]}"
        )
        assert (site.num_heads, x.shape[-1]) == (heads // unit, site.num_heads * site.head_dim)
        assert x.shape[1] == len(MASK[0])
        if head_dim is not None:
            assert site.head_dim == head_dim * unit
            same.append(output.numel() == x.numel() and torch.equal(output.flatten(2), x))
    assert taken == len(attending.made), f"attention without a site: {attending.made[taken][0]}"
    assert not same or all(same) != (family in families.BEFORE_PROJECTION)


def check_heads_fall_silent(family, model, batch, sites):
    """A head that is set to zero where it is made is zero in its own columns at the projection, and no other is."""
    unit = families.HEADS_PER_UNIT.get(family, 1)
    with (
        torch.no_grad(),
        Attending(
            model, [s.module for s in sites], lambda heads: range(SILENCED, heads, heads // unit)
        ) as attending,
    ):
        model(**batch)
    for row, x, _ in attending.given:
        z = x.view(*x.shape[:2], sites[row].num_heads, sites[row].head_dim)[-1]  # a row without padding
        silent = z.abs().amax(dim=(0, 2)) == 0
        assert silent.nonzero().tolist() == [[SILENCED]], sites[row].name


def check_sum(site, inputs, outputs):
    """Heads and bias sum to what the projection gives, in float64; returns the weight `[out, in]`, found by an identity."""
    exact = copy.deepcopy(site.module).double()
    with torch.no_grad():
        bias = exact(torch.zeros(1, 1, site.num_heads * site.head_dim, dtype=torch.float64))[0, 0]
        identity = torch.eye(site.num_heads * site.head_dim, dtype=torch.float64)
        weight = (exact(identity[None])[0] - bias).T
        torch.testing.assert_close(dense_weight(site).double(), weight, rtol=1e-12, atol=1e-12)
        by_head = weight.view(-1, site.num_heads, site.head_dim)
        for x, output in zip(inputs, outputs, strict=True):
            z = x.double().view(*x.shape[:2], site.num_heads, site.head_dim)
            total = torch.einsum("bshd,ohd->bsho", z, by_head).sum(2) + bias
            torch.testing.assert_close(total, exact(x.double()), rtol=1e-12, atol=1e-12, equal_nan=True)
            torch.testing.assert_close(total.float(), output, rtol=1e-4, atol=1e-5, equal_nan=True)
    return weight


def check_moments(results, row, site, inputs, weight):
    """The moments are those of dense float64 algebra; a projection that ran n times gave n samples a sequence."""
    want = expected(inputs, weight, site.num_heads, [MASK] * len(inputs), "all") if inputs else {}
    count = results["head_output_norm"]["count"][row]
    assert count.tolist() == [len(MASK) * len(inputs)] * site.num_heads + [0] * (len(count) - site.num_heads)
    for metric in want:
        for statistic in ("mean", "min", "max", "count", "nonfinite"):
            got = results[metric][statistic][row, : site.num_heads]
            value = torch.from_numpy(want[metric][statistic]).to(got.dtype)
            torch.testing.assert_close(got, value, rtol=RTOL, atol=0)
