"""Options of the wrong type: one line that says what is wanted, whichever it is."""

import pytest
from tiny_models import build, tokens

import fastheads
from fastheads.errors import LoadError, OptionError


@pytest.fixture(scope="module")
def model():
    return build(num_hidden_layers=1)


@pytest.mark.parametrize(
    "wrong, wanted",
    [
        (dict(layers=1), "layers must be whole numbers in a list, not 1"),
        (dict(layers="0-3"), "layers must be whole numbers in a list, not '0-3'"),
        (dict(layers=[0.5]), "layers must be whole numbers"),
        (dict(include=3), "include must be a name or a list of names, not 3"),
        (dict(include=[None]), "include must be a name or a list of names"),
        (dict(metrics=3), "metrics must be a name or a list of names, not 3"),
        (dict(metrics=[3]), "metrics must be a name or a list of names"),
        (dict(skip_first="1"), "skip_first must be a whole number"),
        (dict(kv_groups="yes"), "kv_groups must be True or False, not 'yes'"),
        (dict(allow_skipped=1), "allow_skipped must be True or False"),
        (dict(vectors=None), "vectors must be True or False, not None"),
        (dict(token_agg=["all"]), "unknown token_agg"),
        (dict(precision=3), "unknown precision"),
        (dict(backend=3), "backend"),
    ],
)
def test_of_a_measurement(model, wrong, wanted):
    for call in (
        lambda: fastheads.HookManager(model, **wrong),
        lambda: fastheads.profile(model, tokens(1, 4), **wrong),
    ):
        with pytest.raises(OptionError, match=wanted):
            call()


@pytest.mark.parametrize(
    "wrong, wanted",
    [
        (dict(batch_size="8"), "batch_size must be a whole number, not '8'"),
        (dict(batch_size=True), "batch_size must be a whole number, not True"),
        (dict(batch_tokens=1.5), "batch_tokens must be a whole number, not 1.5"),
        (dict(max_tokens="all"), "max_tokens must be a whole number, not 'all'"),
        (dict(seq_len=[512]), r"seq_len must be a whole number, not \[512\]"),
        (dict(checkpoint_every="soon"), "checkpoint_every must be a number of seconds, not 'soon'"),
        (dict(shard=3), r"shard must be \(i, n\), two whole numbers, not 3"),
        (dict(shard="1/4"), r"shard must be \(i, n\)"),
        (dict(until_stable="yes"), "until_stable must be True, False or a StableRule, not 'yes'"),
        (dict(compile="reduce-overhead"), "compile must be True or False, not 'reduce-overhead'"),
        (dict(resume=1), "resume must be True or False, not 1"),
    ],
)
def test_of_a_run(model, wrong, wanted):
    with pytest.raises(OptionError, match=wanted):
        fastheads.profile(model, tokens(1, 4), **wrong)


def test_a_model_that_is_neither_a_module_nor_a_name(model):
    with pytest.raises(OptionError, match=r"model must be a torch\.nn\.Module, not a dict"):
        fastheads.profile({}, tokens(1, 4))
    with pytest.raises(LoadError, match="no model"):
        fastheads.profile("not/a/name/of/a/model", tokens(1, 4))
