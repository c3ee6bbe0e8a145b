"""profile(): every number against a float64 oracle, every kind of data, and what it leaves behind."""

import contextlib
import copy
import json
import os
import random
import re
import subprocess
import sys

import pytest
import torch
from checkpoints import LAYERS, POSITIONS, ascii_tokenizer, save_checkpoint, tiny_llama
from oracle import METRICS, assert_results, captured_inputs
from whole_profiles import some_texts

import fastheads
from fastheads import HeadProfile, find_sites
from fastheads.corpus import sources
from fastheads.corpus.sources import held_texts, text_file
from fastheads.corpus.windows import Corpus
from fastheads.errors import DataError, LoadError, OptionError, ProfileInterrupted
from fastheads.run import overhead, terminal
from fastheads.run.api import profile
from fastheads.run.batches import WindowFeed
from fastheads.run.job import Job, RankInfo

TEXT = "The quick brown fox jumps over the lazy dog.\n" * 3  # 135 tokens


@pytest.fixture
def model():
    return tiny_llama()


@pytest.fixture
def tokenizer():
    return ascii_tokenizer()


def ids_of(text: str) -> list[int]:
    return [ord(c) + 1 for c in text]


def assert_agrees(
    found: HeadProfile, model, sequences: list[list[int]], token_agg: str = "all", skip_first: int = 0
) -> None:
    """Every statistic equals that of `sequences` run one at a time."""
    sites = find_sites(model)
    with captured_inputs([site.module for site in sites]) as inputs, torch.no_grad():
        for sequence in sequences:
            model(input_ids=torch.tensor([sequence]))
    # 5e-6: float32 activations, batched here and alone there
    assert_results(found.results(), sites, inputs, [None] * len(sequences), token_agg, 5e-6, skip_first)


@pytest.mark.parametrize("token_agg", ["last", "all", "token"])
def test_a_text_file_is_profiled_as_contiguous_blocks(model, tokenizer, tmp_path, token_agg):
    path = tmp_path / "a.txt"
    path.write_text(TEXT)
    ids = ids_of(TEXT)
    found = profile(model, path, tokenizer=tokenizer, token_agg=token_agg, seq_len=20, batch_size=3)
    assert_agrees(found, model, [ids[i : i + 20] for i in range(0, len(ids), 20)], token_agg)
    assert found.metadata["token_agg"] == token_agg


def test_documents_are_padded_and_padding_changes_nothing(model, tokenizer, tmp_path):
    texts = ["one", "a much longer document than that", "", "two"]
    documents = [ids_of(text) for text in texts if text]
    sequences = [d[i : i + 16] for d in documents for i in range(0, len(d), 16)]
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps({"body": text}) + "\n" for text in texts))
    for data, field in ((texts, None), (iter(texts), None), (str(path), "body")):
        found = profile(model, data, tokenizer=tokenizer, seq_len=16, batch_size=3, field=field)
        assert_agrees(found, model, sequences)
        assert found.metadata["data"]["sequences"] == 4
        assert found.metadata["data"]["tokens"] == 38


def test_token_batches_run_as_they_are(model):
    first, second = ids_of("abcdefgh"), ids_of("hij")
    left = {
        "input_ids": torch.tensor([[0] * 5 + second, first]),
        "attention_mask": torch.tensor([[0] * 5 + [1] * 3, [1] * 8]),
    }
    whole = model, [second, first]
    assert_agrees(profile(model, left), *whole)
    assert_agrees(profile(model, [torch.tensor(second), {"input_ids": torch.tensor([first])}]), *whole)
    assert_agrees(profile(model, (torch.tensor([row]) for row in (first, second))), model, [first, second])
    assert profile(model, left).metadata["data"]["tokens"] == 11


def test_the_budget_is_met_exactly(model, tokenizer):
    ids = ids_of(TEXT)
    found = profile(
        model, [TEXT], tokenizer=tokenizer, seq_len=16, batch_size=2, max_tokens=37, token_agg="token"
    )
    assert_agrees(found, model, [ids[:16], ids[16:32], ids[32:37]], "token")
    assert (found.results()[METRICS[0]]["count"] == 37).all()
    assert found.metadata["data"]["tokens"] == 37

    rows = torch.tensor(ids[:32]).view(4, 8)
    found = profile(model, [rows, rows], max_tokens=13, token_agg="token")
    assert_agrees(found, model, [ids[:8], ids[8:13]], "token")
    assert found.metadata["data"] | {"seconds": 0} == {
        "source": "token batches",
        "sha256": None,
        "max_tokens": 13,
        "tokens": 13,
        "sequences": 2,
        "seconds": 0,
        "padding": 0.1875,
        "complete": False,
    }


def test_options_reach_the_hooks(model, tokenizer):
    found = profile(
        model,
        ["abcdefgh"],
        tokenizer=tokenizer,
        layers=[1],
        skip_first=2,
        backend="einsum",
        token_agg="token",
    )
    counts = found.results()[METRICS[0]]["count"]
    assert counts.tolist() == [[0] * 4, [6] * 4, [0] * 4]
    assert found.metadata["backend"] == "einsum"
    assert found.metadata["skip_first"] == 2


def test_the_default_data_is_the_text_of_every_python(model, tokenizer):
    found = profile(model, tokenizer=tokenizer, max_tokens=100)
    data = found.metadata["data"]
    assert data["source"].startswith("pydoc_data.topics of Python")
    assert len(data["sha256"]) == 64
    assert data["seq_len"] == POSITIONS  # the model has no more
    assert (data["tokens"], data["sequences"], data["max_tokens"]) == (100, 2, 100)


def test_a_name_is_loaded_and_names_the_profile(tmp_path, model):
    folder = save_checkpoint(tmp_path / "tiny")
    found = profile(str(folder), ["abc"], device="cpu")
    assert found.metadata["model"] == str(folder)
    assert_agrees(found, model, [ids_of("abc")])
    assert profile(folder, torch.tensor([[3, 4]])).metadata["data"]["tokens"] == 2


def test_the_model_is_left_as_it_was(model, tokenizer):
    model.train()
    model.model.layers[1].eval()
    modes = {name: module.training for name, module in model.named_modules()}
    seen = []

    def look(module, args, kwargs, output):
        seen.append(
            (module.training, torch.is_inference_mode_enabled(), kwargs["use_cache"], output.past_key_values)
        )

    handle = model.model.register_forward_hook(look, with_kwargs=True)
    head = model.lm_head.register_forward_pre_hook(lambda *_: pytest.fail("the head ran"))
    profile(model, [TEXT], tokenizer=tokenizer)
    handle.remove()
    head.remove()
    assert set(seen) == {(False, True, False, None)}
    assert {name: module.training for name, module in model.named_modules()} == modes
    assert all(not m._forward_pre_hooks and not m._forward_hooks for m in model.modules())
    assert model.config.use_cache


def test_an_error_on_the_way_leaves_the_model_as_it_was_too(model):
    model.train()
    with pytest.raises(IndexError):
        profile(model, torch.tensor([[10_000]]))
    assert all(m.training and not m._forward_pre_hooks for m in model.modules())


def test_progress_is_reported_in_real_tokens(model, tokenizer):
    calls = []
    profile(
        model, ["abc", "defgh", "i"], tokenizer=tokenizer, batch_size=2, progress=lambda *c: calls.append(c)
    )
    assert calls == [(0, 9), (8, 9), (9, 9)]
    calls.clear()
    profile(model, torch.tensor([[1, 2]]), progress=lambda *c: calls.append(c))
    assert calls == [(0, None), (2, None)]


def test_nothing_is_written_to_the_terminal_unless_asked_for(model, tokenizer, capfd):
    profile(model, [TEXT], tokenizer=tokenizer)
    assert capfd.readouterr() == ("", "")


@contextlib.contextmanager
def interrupt_at(module, firing: int):
    """Ctrl-C in the middle of that forward."""
    count = 0

    def hook(*_):
        nonlocal count
        count += 1
        if count == firing:
            raise KeyboardInterrupt

    handle = module.register_forward_pre_hook(hook)
    yield
    handle.remove()


def test_ctrl_c_hands_over_what_the_finished_batches_gave(model, tokenizer):
    ids = ids_of(TEXT)
    model.train()
    middle = model.model.layers[1].mlp  # layers 0 and 1 have already seen the batch
    with interrupt_at(middle, 3), pytest.raises(ProfileInterrupted) as interrupted:
        profile(model, [TEXT], tokenizer=tokenizer, seq_len=10, batch_size=2)
    found = interrupted.value.profile
    model.eval()
    assert_agrees(found, model, [ids[i : i + 10] for i in range(0, 40, 10)])
    data = found.metadata["data"]
    assert (data["tokens"], data["sequences"], data["complete"]) == (40, 4, False)
    assert isinstance(interrupted.value, KeyboardInterrupt)
    assert all(not m._forward_pre_hooks for m in model.modules())


def test_ctrl_c_in_the_first_batch_hands_over_an_empty_profile(model, tokenizer):
    with interrupt_at(model.model.layers[1].mlp, 1), pytest.raises(ProfileInterrupted) as interrupted:
        profile(model, [TEXT], tokenizer=tokenizer)
    assert interrupted.value.profile.metadata["data"]["tokens"] == 0
    assert interrupted.value.profile.rank("relative_head_output_norm") == []


@pytest.mark.parametrize(
    ("data", "says"),
    [
        ("no-such-file.txt", "no data file 'no-such-file.txt'; to profile a text itself, pass it in a list"),
        ("many\nlines", "no data file"),
        ([], "no data"),
        (iter(()), "no data"),
        ([""], "no tokens in texts"),
        (["text", 3], "text 1 of the data is not a text"),
        (3, "not int"),
        ([3], "not int"),
        ([torch.ones(2, 2)], "whole numbers"),
        (torch.empty(2, 0, dtype=torch.long), "no tokens"),
    ],
)
def test_bad_data_are_refused_in_one_line(model, tokenizer, data, says):
    with pytest.raises(DataError, match=says) as error:
        profile(model, data, tokenizer=tokenizer)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"max_tokens": 0}, "max_tokens must be at least 1"),
        ({"seq_len": 0}, "seq_len must be at least 1"),
        ({"seq_len": POSITIONS + 1}, f"max_position_embeddings, {POSITIONS}"),
        ({"batch_size": 0}, "batch_size must be at least 1"),
        ({"backend": "magic"}, "unknown backend 'magic'"),
        ({"token_agg": "some"}, "unknown token_agg 'some'"),
        ({"tokenizer": None}, "tokenizer="),
        ({"layers": [LAYERS]}, "layers"),
    ],
)
def test_bad_options_are_refused(model, tokenizer, options, says):
    with pytest.raises(OptionError, match=says):
        profile(model, [TEXT], **{"tokenizer": tokenizer, **options})


def test_a_tokenizer_of_another_model_is_refused(tokenizer):
    model = tiny_llama()
    model.resize_token_embeddings(100)
    with pytest.raises(
        ValueError, match="the tokenizer is not the model's: it gave token 122, the model has 100"
    ):
        profile(model, ["y"], tokenizer=tokenizer)


def test_an_unknown_model_is_refused():
    with pytest.raises(LoadError, match="no model './none'"):
        profile("./none", ["abc"])


def test_profile_is_a_public_name():
    assert fastheads.profile is profile


def test_an_encoder_decoder_is_refused():
    from transformers import MoonshineConfig, MoonshineForConditionalGeneration

    config = MoonshineConfig(
        vocab_size=130,
        hidden_size=32,
        intermediate_size=32,
        encoder_num_hidden_layers=1,
        decoder_num_hidden_layers=1,
        encoder_num_attention_heads=2,
        decoder_num_attention_heads=2,
    )
    with pytest.raises(ValueError, match="has an encoder"):
        profile(MoonshineForConditionalGeneration(config), torch.ones(1, 4, dtype=torch.long))


def test_layers_that_are_skipped_by_design(model):
    model = copy.deepcopy(model)
    model.model.layers[1].forward = lambda hidden, **_: hidden
    ids = torch.ones(1, 4, dtype=torch.long)
    with pytest.raises(RuntimeError, match="allow_skipped=True"):
        profile(model, ids)
    found = profile(model, ids, allow_skipped=True)
    assert found.moments["head_output_norm"].count[:, 0].tolist() == [1, 0, 1]


def test_a_skip_that_leaves_nothing_is_an_error(model, tokenizer):
    with pytest.raises(DataError, match="skip_first=20 leaves none of the 9 tokens in 2 sequences"):
        profile(model, ["abcde", "abcd"], tokenizer=tokenizer, skip_first=20)


def corpus_of(texts, tokenizer, **options):
    options = {"seq_len": 48, "window_characters": 600, "workers": 0} | options
    return Corpus(held_texts(texts), tokenizer, **options)


def test_rows_of_about_equal_length_share_a_batch_under_the_budget(model, tokenizer, monkeypatch):
    monkeypatch.setattr(overhead, "FIRST", 10**6)  # no batch is run twice
    shapes = []
    handle = model.model.register_forward_pre_hook(
        lambda module, args, kwargs: shapes.append((kwargs["input_ids"].shape, "attention_mask" in kwargs)),
        with_kwargs=True,
    )
    texts = some_texts(80)
    found = profile(model, corpus_of(texts, tokenizer), batch_tokens=200)
    handle.remove()
    sequences = [ids_of(text)[i : i + 48] for text in texts for i in range(0, len(text), 48)]
    assert_agrees(found, model, sequences)
    area = sum(shape.numel() for shape, _ in shapes)
    assert all(shape.numel() <= 200 for shape, _ in shapes)
    assert found.metadata["data"]["padding"] == pytest.approx(1 - sum(map(len, sequences)) / area, abs=1e-6)
    # Attention is causal: padding on the right needs no mask.
    assert not any(masked for _, masked in shapes)


def test_padding_has_a_mask_where_attention_looks_ahead(model, tokenizer):
    masks = []
    handle = model.model.register_forward_pre_hook(
        lambda module, args, kwargs: masks.append(kwargs["attention_mask"].sum(1).tolist()), with_kwargs=True
    )
    model.model.layers[1].self_attn.is_causal = False
    profile(model, ["abc", "abcdef"], tokenizer=tokenizer)
    handle.remove()
    assert masks == [[6, 3]]


@pytest.mark.parametrize("layers", [None, [0, 1], [1]])
def test_nothing_behind_the_last_profiled_projection_is_computed(model, tokenizer, layers):
    """Counted by a function and not by a hook: where others have hooks, forwards run to their end."""
    ran = []
    modules = {f"mlp {n}": layer.mlp for n, layer in enumerate(model.model.layers)} | {
        "norm": model.model.norm
    }
    for name, module in modules.items():

        def counted(*args, forward=module.forward, name=name, **kwargs):
            ran.append(name)
            return forward(*args, **kwargs)

        module.forward = counted
    options = {"tokenizer": tokenizer, "seq_len": 10, "batch_size": 2, "layers": layers, "token_agg": "token"}
    found = profile(model, [TEXT], **options)
    last = 2 if layers is None else layers[-1]
    batches = 7
    for name in modules:
        runs = batches if name.startswith("mlp") and int(name[-1]) < last else 1  # the first shows the order
        assert ran.count(name) == runs, name
    model.model.norm.register_forward_hook(lambda *_: None)
    whole = profile(model, [TEXT], **options)
    assert ran.count("norm") == 1 + batches
    for metric in found.metrics:
        for a, b in zip(found.moments[metric], whole.moments[metric], strict=True):
            assert torch.equal(a, b)
    assert not any(m._forward_hooks for m in model.modules() if m is not model.model.norm)


def test_skipped_and_repeated_layers_run_to_the_end(model, tokenizer):
    """Where the projections do not each run once, which is the last cannot be said."""
    layer = model.model.layers[1]
    model.model.layers.append(layer)
    model.config.num_hidden_layers += 1
    model.config.layer_types = None
    ids = torch.ones(1, 4, dtype=torch.long)
    found = profile(model, [ids] * 5, token_agg="last")
    assert found.moments["head_output_norm"].count.tolist() == [[5] * 4, [10] * 4, [5] * 4]


@contextlib.contextmanager
def memory_for(module, tokens: int):
    """A model that runs out of memory in the middle of larger batches."""

    def hook(module, args):
        if args[0].shape[0] * args[0].shape[1] > tokens:
            raise torch.OutOfMemoryError("CUDA out of memory")

    handle = module.register_forward_pre_hook(hook)
    yield
    handle.remove()


@pytest.mark.parametrize("token_agg", ["all", "token"])
def test_batches_are_halved_where_memory_runs_out(model, tokenizer, token_agg):
    texts = some_texts(60)
    shapes = []
    handle = model.model.register_forward_pre_hook(
        lambda module, args, kwargs: shapes.append(kwargs["input_ids"].numel()), with_kwargs=True
    )
    with memory_for(model.model.layers[2].mlp, 110):
        found = profile(model, corpus_of(texts, tokenizer), batch_tokens=800, token_agg=token_agg)
        batches = [torch.tensor([ids_of("abcdefghij")] * 20), torch.tensor([ids_of("xyz")] * 30)]
        given = profile(model, batches, token_agg=token_agg)
    handle.remove()
    sequences = [ids_of(text)[i : i + 48] for text in texts for i in range(0, len(text), 48)]
    assert_agrees(found, model, sequences, token_agg)
    assert found.metadata["data"]["sequences"] == len(sequences)
    # One try each on the way down, not one a batch.
    assert len([n for n in shapes if n > 110]) <= 8
    assert_agrees(given, model, [ids_of("abcdefghij")] * 20 + [ids_of("xyz")] * 30, token_agg)


def test_a_sequence_that_does_not_fit_is_an_error(model, tokenizer):
    with memory_for(model.model.layers[2].mlp, 20):
        with pytest.raises(RuntimeError, match="out of memory with one sequence of 48 tokens"):
            profile(model, corpus_of(some_texts(20), tokenizer), batch_tokens=200)
        with pytest.raises(RuntimeError, match="out of memory with one sequence of 30 tokens"):
            profile(model, torch.ones(4, 30, dtype=torch.long))


def test_what_profiling_costs_is_measured_on_some_batches(model, tokenizer, monkeypatch):
    monkeypatch.setattr(overhead, "FIRST", 2)
    monkeypatch.setattr(overhead, "EVERY", 3)
    options = {"tokenizer": tokenizer, "seq_len": 10, "batch_size": 2, "token_agg": "token"}
    forwards = []
    model.model.embed_tokens.register_forward_hook(lambda *_: forwards.append(1))
    found = profile(model, [TEXT], **options)
    assert len(forwards) == 7 + 2  # batches 2 and 5 once more
    assert isinstance(found.metadata["data"]["overhead"], float)
    assert (found.moments["head_output_norm"].count == len(TEXT)).all()


def test_shards_are_disjoint_and_merge_to_everything(model, tokenizer):
    texts = some_texts(80)
    options = {"batch_tokens": 200}
    whole = profile(model, corpus_of(texts, tokenizer), **options)
    parts = [
        profile(model, corpus_of(texts, tokenizer, shard=(i, 3)), shard=(i, 3), **options) for i in range(3)
    ]
    merged = HeadProfile.merge(parts)
    for metric in whole.metrics:
        for plane, value in whole.moments[metric]._asdict().items():
            torch.testing.assert_close(getattr(merged.moments[metric], plane), value, rtol=1e-12, atol=0)
    with pytest.raises(ValueError, match="cannot merge"):
        HeadProfile.merge([parts[0], parts[0]])


class OneOf(Job):
    """One process of a job, without the others: it gets its own part of the profile."""

    def check_entered(self):
        pass

    def all_gather_object(self, document):
        return [document]

    def all_gather(self, tensor):
        return [tensor]


def test_a_corpus_is_shared_out_between_the_processes_of_a_job(model, tokenizer):
    texts = some_texts(80)
    options = {"batch_tokens": 200, "token_agg": "token"}

    def count(corpus, **more):
        found = profile(model, corpus, **options, **more)
        return int(found.moments["head_output_norm"].count[0, 0]), found.metadata["data"]["shard"]

    whole, shard = count(corpus_of(texts, tokenizer))
    assert (whole, shard) == (sum(map(len, texts)), [0, 1])
    jobs = [OneOf(place=RankInfo(rank, 2)) for rank in range(2)]
    corpus = corpus_of(texts, tokenizer)
    shares = [count(corpus, job=job)[0] for job in jobs]
    assert sum(shares) == whole
    assert all(shares)
    assert (corpus.shard, corpus.identity["shard"]) == ((0, 1), [0, 1])
    assert [
        count(corpus_of(texts, tokenizer, shard=(rank, 2)), job=jobs[rank])[0] for rank in range(2)
    ] == shares
    quarter = [count(corpus, shard=(1, 2), job=job) for job in jobs]
    assert quarter == [
        (count(corpus_of(texts, tokenizer, shard=(1 + 2 * rank, 4)))[0], [1, 2]) for rank in range(2)
    ]
    # Alone, a corpus has what it has, and the profile says so.
    assert count(corpus_of(texts, tokenizer, shard=(1, 2))) == (shares[1], [1, 2])
    assert count(corpus, shard=(1, 2)) == (shares[1], [1, 2])
    for other, more, expected in (
        (corpus_of(texts, tokenizer, shard=(1, 2)), {"job": jobs[0]}, (0, 2)),
        (corpus_of(texts, tokenizer, shard=(0, 2)), {"shard": (1, 2)}, (1, 2)),
        (corpus_of(texts, tokenizer, shard=(1, 2)), {"shard": (1, 2), "job": jobs[0]}, (1, 4)),
    ):
        with pytest.raises(OptionError, match=re.escape(f"make {expected}: pass Corpus(...) that shard")):
            count(other, **more)


def test_processes_with_other_models_data_or_options_are_refused(model, tokenizer, tmp_path):
    changed = copy.deepcopy(model)
    with torch.no_grad():
        changed.model.layers[1].mlp.up_proj.weight.mul_(2)
    texts = some_texts(20)
    told = []

    class First(OneOf):
        def all_gather_object(self, document):
            told.append(document)
            raise StopIteration

    class Second(OneOf):
        def all_gather_object(self, document):
            return [told[-1], document]

    def both(what, *, module=model, data=texts, **options):
        for job, model_of, data_of, more in (
            (First(place=RankInfo(0, 2)), model, texts, {}),
            (Second(place=RankInfo(1, 2)), module, data, options),
        ):
            corpus = data_of if isinstance(data_of, Corpus) else corpus_of(data_of, tokenizer)
            given = {"batch_tokens": 200, "job": job} | more
            if isinstance(job, First):
                with pytest.raises(StopIteration):
                    profile(model_of, corpus, **given)
            else:
                with pytest.raises(
                    OptionError, match=f"ranks 0 and 1 were given different options: {what} is"
                ):
                    profile(model_of, corpus, **given)

    both("model weights", module=changed)
    both("data sha256", data=[*texts[:-1], "other"])
    both("data seq len", data=corpus_of(texts, tokenizer, seq_len=47))
    both("token agg", token_agg="last")
    both("batch tokens", batch_tokens=100)
    both("shard", shard=(1, 2))
    both("checkpoints", checkpoint=tmp_path / "c")
    both("until stable", until_stable=True)


def test_processes_may_have_their_own_copies_of_the_data(model, tokenizer, tmp_path, monkeypatch):
    """Each host its own, by another path and with another time; and each process has another shard of it."""
    monkeypatch.setattr(sources, "HASHED_BYTES", 10)
    first = []

    class Both(OneOf):
        said = 0

        def all_gather_object(self, document):
            if self.place.rank == 0:
                first.append(document)
            self.said += 1
            return [first[self.said - 1], document]

    for rank in range(2):
        path = tmp_path / str(rank) / "a.jsonl"
        path.parent.mkdir()
        path.write_text("".join(json.dumps({"text": text}) + "\n" for text in some_texts(20)))
        os.utime(path, ns=(rank, rank))
        corpus = Corpus(text_file(path), tokenizer, seq_len=48, shard=(rank, 2), window_characters=200)
        assert corpus.identity["modified_ns"] == rank
        profile(model, corpus, job=Both(place=RankInfo(rank, 2)))
    assert len(first) > 1


def test_a_profile_begins_a_run_of_the_job_before_it_says_anything(model, tokenizer):
    """Else the others would take what it says for news of the run before."""

    class Strict(OneOf):
        begun = False
        stages = ()

        def begin(self):
            self.begun = True

        def all_gather_object(self, document):
            assert self.begun
            return [document]

        def finish(self, stage):
            assert self.begun
            self.stages += (stage,)

    job = Strict(place=RankInfo(0, 2))
    for _ in range(2):
        job.begun, job.stages = False, ()
        profile(model, corpus_of(["abc"], tokenizer), job=job)
        assert job.begun
        assert job.stages == ("measured",)


def test_the_end_of_a_corpus_with_a_limit_is_expected_at_it(model, tokenizer, monkeypatch, capsys):
    monkeypatch.setattr(terminal, "SOON", 0.0)  # a line for each batch
    monkeypatch.setattr(terminal, "A_MINUTE", 0.0)
    corpus = corpus_of(some_texts(400), tokenizer, max_tokens=2000)
    profile(model, corpus, batch_tokens=100, progress=True)
    expected = re.findall(r" of (?:about )?([\d,]+) tokens", capsys.readouterr().err)
    assert len(expected) > 10
    assert set(expected) == {"2,000"}


@pytest.mark.parametrize(
    "given", [{"seq_len": 8}, {"cut": "stream"}, {"max_tokens": 9}, {"field": "text"}, {"tokenizer": len}]
)
def test_options_that_a_corpus_has_already_are_refused(model, tokenizer, given):
    for data in (["abc"], iter(["abc"]), torch.ones(1, 4, dtype=torch.long)):
        with pytest.raises(OptionError, match="^field is for JSON lines, tables and data sets"):
            profile(model, data, tokenizer=tokenizer, field="text")
    with pytest.raises(OptionError, match=f"{next(iter(given))} belongs to the Corpus"):
        profile(model, corpus_of(["abc"], tokenizer), **given)
    with pytest.raises(OptionError, match="max_position_embeddings"):
        profile(model, corpus_of(["abc"], tokenizer, seq_len=POSITIONS + 1))
    with pytest.raises(OptionError, match="shard= is for texts"):
        profile(model, torch.ones(1, 4, dtype=torch.long), shard=(0, 2))


@pytest.mark.slow
def test_a_compiled_decoder_gives_the_same(model, tokenizer, monkeypatch):
    compiler = torch.compile
    masks = []

    def compile(*arguments, **options):
        compiled = compiler(*arguments, **options, backend="aot_eager")
        return lambda real, given: masks.append(real) or compiled(real, given)

    monkeypatch.setattr(torch, "compile", compile)
    # Batches of six widths, every other one padded.
    texts = [TEXT[: 20 + n // 4 - (n % 8 == 1)] for n in range(24)]
    want = profile(model, corpus_of(texts, tokenizer), batch_size=4)
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    found = profile(model, corpus_of(texts, tokenizer), batch_size=4, compile=True)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] <= 2
    assert all(
        mask is not None for mask in masks
    )  # else there would be a graph more for batches without padding
    assert {bool(mask.all()) for mask in masks} == {True, False}
    for metric in want.metrics:
        assert torch.equal(found.moments[metric].count, want.moments[metric].count)
        torch.testing.assert_close(found.moments[metric].mean, want.moments[metric].mean, rtol=2e-5, atol=0)


@pytest.mark.slow
def test_memory_does_not_grow_with_the_corpus(tmp_path):
    """Resident memory after 100 batches and after 2,000, in a process of its own; lengths as different as in real corpora."""
    save_checkpoint(tmp_path / "tiny", positions=512)
    chance = random.Random(0)
    lengths = (min(int(chance.lognormvariate(4.0, 1.0)), 2_000) + 1 for _ in range(9_000))
    texts = (json.dumps({"text": "".join(chance.choices("abc defgh ijk", k=length))}) for length in lengths)
    (tmp_path / "a.jsonl").write_text("\n".join(texts))
    code = (
        "import fastheads, torch; torch.set_num_threads(1)\n"
        "from fastheads.corpus.windows import Corpus; from fastheads.corpus.sources import text_file\n"
        "from fastheads.run.loading import find_model, load_tokenizer\n"
        "calls, rss = 0, []\n"
        "def seen(done, total):\n"
        "    global calls; calls += 1\n"
        "    if calls in (101, 2001): rss.append(int(open('/proc/self/statm').read().split()[1]))\n"
        "tokenizer = load_tokenizer(find_model('tiny'))\n"
        "corpus = Corpus(text_file('a.jsonl'), tokenizer, seq_len=320, window_characters=2**15)\n"
        "fastheads.profile('tiny', corpus, batch_tokens=320, device='cpu', progress=seen, checkpoint='c', checkpoint_every=0.2)\n"
        "print(*rss)"
    )
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True
    )
    early, late = map(int, done.stdout.split())
    assert late < 1.02 * early


@pytest.mark.parametrize("each_window", [False, True])
def test_small_windows_make_batches_together_but_where_each_is_looked_at(each_window):
    texts = ["wor " * 30] * 3_400  # 408,000 characters: seven windows of the smallest size
    corpus = Corpus(held_texts(texts), ascii_tokenizer(), seq_len=128)
    windows = len(list(corpus.windows()))
    feed = WindowFeed(
        corpus,
        budget=2**20,
        max_rows=None,
        pad_token_id=0,
        with_mask=False,
        pinned=False,
        embeddings=None,
        each_window=each_window,
    )
    batches = 0
    while feed.next() is not None:
        feed.done()
        batches += 1
    feed.close()
    assert windows > 1 and batches == (windows if each_window else 1)
