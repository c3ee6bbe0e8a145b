"""A run that is stopped, killed or runs out of disk goes on from its checkpoint and ends as if nothing had been, bit for bit."""

import contextlib
import errno
import itertools
import json
import math
import os
import shutil
import signal
import stat
import threading
from pathlib import Path

import datasets
import pytest
import torch
from checkpoints import ascii_tokenizer, tiny_llama
from sealed_files import read, resealed
from whole_profiles import assert_same, some_texts

from fastheads import HeadProfile
from fastheads.corpus.opening import open_source
from fastheads.corpus.sources import held_texts
from fastheads.corpus.token_batches import as_batch
from fastheads.corpus.windows import Corpus
from fastheads.errors import CheckpointError, DataError, ProfileInterrupted
from fastheads.results import files
from fastheads.run import signals
from fastheads.run.api import profile
from fastheads.run.batches import GivenFeed, WindowFeed
from fastheads.run.checkpoint import Checkpoint
from fastheads.run.job import Job, RankInfo
from fastheads.run.stability import deciding_metric
from fastheads.stats.confidence import StableRule, judge
from fastheads.stats.moments import COUNT, M2, MAX, MEAN, MIN, NONFINITE


@pytest.fixture(scope="module")
def model():
    return tiny_llama()


@pytest.fixture(scope="module")
def tokenizer():
    return ascii_tokenizer()


def corpus_of(texts, tokenizer, **options):
    options = {"seq_len": 48, "window_characters": 500, "workers": 0} | options
    return Corpus(held_texts(texts), tokenizer, **options)


class Stop(Exception):
    """What a test breaks a run off with."""


def stopped(model, data, path, after: int, how=signal.SIGTERM, **options) -> ProfileInterrupted:
    """A run that a signal stops after that many batches."""
    batches = 0

    def progress(done, total):
        nonlocal batches
        batches += 1
        if batches == after + 1:
            os.kill(os.getpid(), how)

    with pytest.raises(ProfileInterrupted) as interrupted:
        profile(model, data, checkpoint=path, progress=progress, **options)
    return interrupted.value


@pytest.mark.parametrize("how", [signal.SIGTERM, signal.SIGINT])
def test_a_stopped_run_goes_on_where_it_stood(model, tokenizer, tmp_path, how):
    path = tmp_path / "c"
    texts = some_texts()
    options = {"batch_tokens": 200, "token_agg": "token", "kv_groups": True}
    want = profile(model, corpus_of(texts, tokenizer), **options)
    handlers = [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)]
    for after in (1, 2, 3, 5, 8):  # in the middle of a window and between two
        stop = stopped(model, corpus_of(texts, tokenizer), path, after, how, resume=True, **options)
        assert (stop.number, stop.checkpoint) == (how, path)
        assert stop.profile.metadata["data"]["complete"] is False
    calls = []
    found = profile(
        model,
        corpus_of(texts, tokenizer),
        checkpoint=path,
        resume=True,
        progress=lambda *c: calls.append(c),
        output=tmp_path / "p.safetensors",
        **options,
    )
    assert calls[0][0] == stop.profile.metadata["data"]["tokens"]
    assert calls[-1] == (found.metadata["data"]["tokens"],) * 2
    assert_same(found, want)
    assert_same(HeadProfile.load(tmp_path / "p.safetensors"), want)
    assert os.listdir(tmp_path) == ["p.safetensors"]
    assert [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)] == handlers


STREAMS = {
    "plain": lambda rows: rows,
    "map": lambda rows: rows.map(lambda row: {"text": row["text"] + "!"}),
    "map in batches": lambda rows: rows.map(lambda rows: rows, batched=True, batch_size=7),
    "filter": lambda rows: rows.filter(lambda row: len(row["text"]) % 3 > 0),
    "map and filter": lambda rows: rows.map(lambda row: row).filter(lambda row: len(row["text"]) % 3 > 0),
    "skip and take": lambda rows: rows.skip(3).take(50),
    "concatenated": lambda rows: datasets.concatenate_datasets([rows, rows.map(lambda row: row)]),
}


@pytest.mark.parametrize("chain", STREAMS)
@pytest.mark.parametrize("shards", [1, 3])
def test_a_stream_that_is_stopped_again_and_again_loses_and_repeats_no_row(
    model, tokenizer, tmp_path, chain, shards
):
    path = tmp_path / "c"

    def data():  # made anew, as in a process of its own
        rows = datasets.Dataset.from_dict({"text": some_texts()}).to_iterable_dataset(num_shards=shards)
        options = {"seq_len": 48, "window_characters": 300, "workers": 0}
        return Corpus(open_source(STREAMS[chain](rows)), tokenizer, **options)

    options = {"batch_tokens": 200, "token_agg": "token"}
    want = profile(model, data(), **options)
    tokens = []
    for after in (4, 5, 3):
        stop = stopped(model, data(), path, after, resume=True, **options)
        tokens.append(stop.profile.metadata["data"]["tokens"])
    assert tokens == sorted(set(tokens))
    assert_same(profile(model, data(), checkpoint=path, resume=True, **options), want)


@pytest.mark.parametrize("kind", ["jsonl", "txt"])
def test_several_files_go_on_inside_any_of_them(model, tokenizer, tmp_path, kind):
    path, texts = tmp_path / "c", some_texts(90)
    for number in range(3):
        part = texts[30 * number : 30 * number + 30]
        lines = [json.dumps({"text": text}) if kind == "jsonl" else text for text in part]
        (tmp_path / f"{number}.{kind}").write_text("\n".join(lines) + "\n")

    def data():
        options = {"seq_len": 48, "window_characters": 300, "workers": 0}
        return Corpus(open_source(str(tmp_path / f"*.{kind}")), tokenizer, **options)

    options = {"batch_tokens": 200, "token_agg": "token"}
    want = profile(model, data(), **options)
    for after in (4, 5, 6, 4):
        stopped(model, data(), path, after, resume=True, **options)
    assert_same(profile(model, data(), checkpoint=path, resume=True, **options), want)
    (tmp_path / f"3.{kind}").write_text(json.dumps({"text": "more"}))
    stopped(model, data(), path, 2, **options)
    (tmp_path / f"3.{kind}").unlink()
    with pytest.raises(CheckpointError, match="data source is not what it was"):
        profile(model, data(), checkpoint=path, resume=True, **options)


def test_token_batches_go_on_too(model, tmp_path):
    path = tmp_path / "c"
    torch.manual_seed(0)
    batches = [torch.randint(0, 130, (3, n)) for n in (7, 9, 5, 7, 8)]
    want = profile(model, batches, max_tokens=100)
    stopped(model, batches, path, 2, max_tokens=100)
    found = profile(model, (b for b in batches), checkpoint=path, resume=True, max_tokens=100)
    assert_same(found, want)

    stopped(model, batches, path, 2)
    with pytest.raises(CheckpointError, match="the token batches are not those of the checkpoint$"):
        profile(model, [batches[0] + 0, batches[1].flip(0)], checkpoint=path, resume=True)
    with pytest.raises(CheckpointError, match="there are fewer"):
        profile(model, batches[:1], checkpoint=path, resume=True)


def test_token_batches_are_told_by_all_that_is_in_them(model, tmp_path):
    path = tmp_path / "c"

    def batches(positions=0, mask=1, dtype=torch.long):
        ids = torch.ones(2, 4, dtype=torch.long)
        masks = torch.ones_like(ids)
        masks[0, 0] = mask
        given = {"position_ids": torch.arange(4).expand(2, 4) + positions, "attention_mask": masks}
        return [{"input_ids": ids.to(dtype), **given}] * 3

    def resume(data):
        profile(model, data, checkpoint=path, resume=True)

    stopped(model, batches(), path, 1)
    for other in (batches(positions=1), batches(mask=0), batches(dtype=torch.int32)):
        with pytest.raises(CheckpointError, match="the token batches are not those of the checkpoint$"):
            resume(other)
    without = [{k: v for k, v in batch.items() if k != "position_ids"} for batch in batches()]
    with pytest.raises(CheckpointError, match="the token batches are not those of the checkpoint$"):
        resume(without)
    good = path.read_bytes()
    for keys, value in (
        (["spans"], None),
        (["spans"], [1]),
        (["row"], 1),
        (["rows"], -1),
        (["batches"], -1),
    ):
        path.write_bytes(good)
        path.write_bytes(edited(path, lambda document, k=keys, v=value: set_in(document["position"], k, v)))
        with pytest.raises(CheckpointError, match="no position in token batches"):
            resume(batches())
    path.write_bytes(good)
    inside = {"row": 1, "spans": [2]}  # of batches of two rows
    path.write_bytes(edited(path, lambda document: document["position"].update(inside)))
    with pytest.raises(CheckpointError, match="the token batches are not those of the checkpoint$"):
        resume(batches())
    path.write_bytes(good)
    resume(batches())


@pytest.mark.parametrize(
    ("one", "two"),
    [
        (
            {"input_ids": torch.ones(2, 6, dtype=torch.long)},
            {"input_ids": torch.ones(3, 4, dtype=torch.long)},
        ),
        (
            {"attention_mask": torch.ones(2, 4, dtype=torch.uint8)},
            {"attention_mask": torch.ones(2, 4).bool()},
        ),
        ({"output_attentions": False}, {"output_attentions": True}),
        ({"output_attentions": False}, {"output_attentions": None}),
        ({"scale": 1}, {"scale": 1.0}),
        ({"scale": 1}, {"scale": "1"}),
    ],
)
def test_token_batches_differ_by_shapes_types_and_what_is_no_tensor(one, two):
    ids = {"input_ids": torch.ones(2, 4, dtype=torch.long)}

    def digest(batch):
        feed = GivenFeed([ids | batch], max_tokens=None, digested=True)
        feed.next()
        return feed.position()["digest"]

    assert digest(one) == digest(dict(one))
    assert digest(one) != digest(two)


def want_batches(model, corpus, **options) -> int:
    """The number of batches of a run."""
    calls = []
    profile(model, corpus, progress=lambda *_: calls.append(1), **options)
    return len(calls) - 1


def test_a_run_until_stable_ends_at_the_same_window(model, tokenizer, tmp_path):
    path = tmp_path / "c"
    texts = some_texts(400)
    options = {"batch_tokens": 400, "until_stable": StableRule(tolerance=0.3)}
    want = profile(model, corpus_of(texts, tokenizer), **options)
    data = want.metadata["data"]
    assert data["until_stable"]["settled"]
    assert 100 <= data["sequences"] < 400
    # After every batch, so at the end of each window too: no look is left out or done twice.
    for _ in range(want_batches(model, corpus_of(texts, tokenizer), **options) - 1):
        stopped(model, corpus_of(texts, tokenizer), path, 1, resume=True, **options)
    found = profile(model, corpus_of(texts, tokenizer), checkpoint=path, resume=True, **options)
    assert_same(found, want)
    never = options | {"until_stable": StableRule(tolerance=0.0)}
    with pytest.warns(RuntimeWarning, match="has not settled by the end of the data: .* heads undecided"):
        data = profile(model, corpus_of(texts[:150], tokenizer), **never).metadata["data"]
    assert data["sequences"] == sum(-(-len(text) // 48) for text in texts[:150])
    assert not data["until_stable"]["settled"]
    with pytest.raises(ValueError, match="until_stable cannot be used with token_agg 'token'"):
        profile(model, texts, tokenizer=tokenizer, token_agg="token", until_stable=True)


def test_a_look_that_is_broken_off_is_made_again(model, tokenizer, tmp_path):
    path = tmp_path / "c"
    texts = some_texts(400)
    options = {"batch_tokens": 400, "until_stable": StableRule(tolerance=0.3)}
    want = profile(model, corpus_of(texts, tokenizer), **options)

    class Stopping(Job):
        """Stopped while the samples of all are merged for the look that settles it."""

        def merged(self, moments):
            if judge(moments[deciding_metric(moments)], options["until_stable"]).settled:
                os.kill(os.getpid(), signal.SIGTERM)
            return super().merged(moments)

    with pytest.raises(ProfileInterrupted) as interrupted:
        profile(model, corpus_of(texts, tokenizer), checkpoint=path, job=Stopping(), **options)
    assert not interrupted.value.profile.metadata["data"]["until_stable"]["settled"]
    found = profile(model, corpus_of(texts, tokenizer), checkpoint=path, resume=True, **options)
    assert_same(found, want)


def test_a_look_follows_each_window(model, tokenizer):
    """A rule that needs no more than a number of samples ends the run with the first window that brings them."""
    corpus = corpus_of(some_texts(300), tokenizer, window_characters=3000)
    ends = list(itertools.accumulate(len(window.sequences) for window in corpus.windows()))
    assert len(ends) > 3
    for before, end in itertools.pairwise((1, *ends)):
        for needed in {before + 1, end}:
            rule = StableRule(alpha=0.99, tolerance=1e9, min_samples=needed)
            found = profile(model, corpus, batch_tokens=800, until_stable=rule)
            assert found.metadata["data"]["sequences"] == end


def test_what_other_processes_found_before_a_stop_is_not_asked_again(model, tokenizer):
    """One was stopped before it heard that the ranking had settled with the second look."""

    class Behind(Job):
        def check_entered(self):
            pass

        def all_gather_object(self, document):
            return [document, [2, True, True]] if isinstance(document, list) else [document]

        def all_gather(self, tensor):
            return [tensor]

        def barrier(self, number):
            pytest.fail("it waits for the others, who have looked already")

    texts = some_texts(60)
    options = {"batch_tokens": 200, "until_stable": True}
    found = profile(model, corpus_of(texts, tokenizer), job=Behind(place=RankInfo(0, 2)), **options)
    windows = corpus_of(texts, tokenizer, shard=(0, 2)).windows()
    two = sum(len(window.sequences) for window in itertools.islice(windows, 2))
    assert found.metadata["data"]["sequences"] == two
    assert found.metadata["data"]["until_stable"]["settled"]


def test_where_nothing_is_to_be_resumed_the_run_starts(model, tmp_path):
    found = profile(model, torch.ones(2, 4, dtype=torch.long), checkpoint=tmp_path / "c", resume=True)
    assert found.metadata["data"]["tokens"] == 8
    assert os.listdir(tmp_path) == []


def test_a_run_by_another_number_of_processes_does_not_start_afresh_unasked(model, tmp_path):
    def checkpoint(rank, world):
        return Checkpoint(tmp_path / "c[1]", rank, world)

    checkpoint(1, 3).save({}, {})
    assert checkpoint(0, 3).load() is None  # was ended before it wrote one
    for rank, world in ((0, 1), (1, 2)):
        with pytest.raises(CheckpointError, match=r"c\[1\]-2-of-3 from another number of processes\. Start"):
            checkpoint(rank, world).load()
    checkpoint(0, 1).save({}, {})
    with pytest.raises(CheckpointError, match=r"c\[1\], c\[1\]-2-of-3 from another number of processes"):
        checkpoint(0, 2).load()
    assert checkpoint(0, 1).load() is not None
    data = torch.ones(2, 4, dtype=torch.long)
    (tmp_path / "c[1]").unlink()
    with pytest.raises(CheckpointError, match="Start as many processes"):
        profile(model, data, checkpoint=tmp_path / "c[1]", resume=True)
    assert profile(model, data, checkpoint=tmp_path / "c[1]").metadata["data"]["tokens"] == 8


def test_without_resume_an_old_checkpoint_is_no_matter(model, tokenizer, tmp_path):
    texts = some_texts(20)
    options = {"batch_tokens": 200}
    stopped(model, corpus_of(texts, tokenizer), tmp_path / "c", 3, **options)
    found = profile(model, corpus_of(texts, tokenizer), checkpoint=tmp_path / "c", **options)
    assert_same(found, profile(model, corpus_of(texts, tokenizer), **options))
    assert os.listdir(tmp_path) == []


def test_another_model_data_or_option_is_refused(model, tokenizer, tmp_path):
    path = tmp_path / "c"
    texts = some_texts(20)
    options = {"batch_tokens": 200}
    stopped(model, corpus_of(texts, tokenizer), path, 3, **options)
    before = path.read_bytes()
    changed = tiny_llama()
    with torch.no_grad():
        changed.model.layers[1].mlp.up_proj.weight.mul_(2)
    rotary = tiny_llama()
    rotary.config.rope_parameters["rope_theta"] = 77.0
    same = corpus_of(texts, tokenizer)
    for what, other, data, more in (
        ("model weights", changed, same, {}),
        ("model configuration", rotary, same, {}),
        ("data sha256", model, corpus_of([*texts[:-1], "x"], tokenizer), {}),
        ("data seq len", model, corpus_of(texts, tokenizer, seq_len=47), {}),
        ("data max tokens", model, corpus_of(texts, tokenizer, max_tokens=300), {}),
        ("data shard", model, corpus_of(texts, tokenizer, shard=(0, 2)), {}),
        ("data cut", model, corpus_of(texts, tokenizer, cut="stream"), {}),
        ("data source", model, torch.ones(1, 4, dtype=torch.long), {}),
        ("token agg", model, same, {"token_agg": "last"}),
        ("skip first", model, same, {"skip_first": 1}),
        ("layers", model, same, {"layers": [0]}),
        ("backend", model, same, {"backend": "loop"}),
        ("kv groups", model, same, {"kv_groups": True}),
        ("batch size", model, same, {"batch_size": 2}),
        ("batch tokens", model, same, {"batch_tokens": 100}),
    ):
        with pytest.raises(CheckpointError, match=f"cannot resume from .*: {what} is not what it was") as no:
            profile(other, data, checkpoint=path, resume=True, **{**options, **more})
        assert "\n" not in str(no.value)
    assert path.read_bytes() == before


def edited(path: Path, edit) -> bytes:
    """The file with its JSON changed by `edit`, and a digest that fits."""
    return resealed(path.read_bytes(), "fastheads_checkpoint", edit)


def set_in(document, keys, value):
    for key in keys[:-1]:
        document = document[key]
    document[keys[-1]] = value


def test_damaged_and_hostile_checkpoints_are_refused(model, tokenizer, tmp_path):
    path = tmp_path / "c"
    texts = some_texts(20)

    def resume():
        profile(model, corpus_of(texts, tokenizer), checkpoint=path, resume=True, batch_tokens=200)

    stopped(model, corpus_of(texts, tokenizer), path, 2, batch_tokens=200)
    good = path.read_bytes()
    assert edited(path, lambda document: None) == good
    bad = [b"", b"hello", good[:-1], good[:100], good + b"\0", bytes([*good[:-1], good[-1] ^ 1])]
    for keys, value in (
        (["format"], 99),
        (["configuration"], None),
        (["configuration"], []),
        (["tokens"], "1"),
        (["tokens"], -1),
        (["tokens"], 2**63),
        (["seconds"], -1.0),
        (["batches"], True),
        (["seconds"], None),
        (["notes"], {}),
        (["notes"], {"used": [[]] * 9, "missed": []}),
        (["notes", "used"], [5]),
        (["notes", "used"], [[5]]),
        (["notes", "missed"], ["x"]),
        (["notes", "missed"], [-1]),
        (["position"], None),
        (["position"], {}),
        (["position", "budget"], 0),
        (["position", "todo"], [[0], "x"]),
        (["position", "todo"], [[]]),
        (["position", "todo"], [[0, 0]]),
        (["position", "todo"], [[-1]]),
        (["position", "todo"], [[10**6]]),
        (["position", "tokens"], 1.5),
        (["position", "windows"], None),
        (["position", "window"], 3),
        (["position", "window"], {}),
    ):
        bad.append(edited(path, lambda document, k=keys, v=value: set_in(document, k, v)))
    HeadProfile.merge([profile(model, torch.ones(1, 4, dtype=torch.long))]).save(tmp_path / "p.safetensors")
    bad.append((tmp_path / "p.safetensors").read_bytes())
    bad.append(good.replace(b"state/0/0", b"state/1/0"))
    bad.append(edited(path, lambda document: None).replace(b'"F64"', b'"I64"'))
    path.write_bytes(good)
    buffer = torch.from_numpy(read(good, "fastheads_checkpoint")[0]["state/0/0"])

    def with_moments(changed):
        return resealed(
            good, "fastheads_checkpoint", change=lambda arrays: arrays.update({"state/0/0": changed.numpy()})
        )

    for plane, value in (
        *((plane, -1) for plane in (COUNT, NONFINITE, M2)),
        *((plane, 2**62) for plane in (COUNT, NONFINITE)),
        (MEAN, 1e9),
        (M2, 1e9),
        (MIN, -1.0),
        *((plane, math.nan) for plane in (MEAN, M2, MIN, MAX)),
        *((plane, math.inf) for plane in (MEAN, M2, MIN)),
        (MAX, -1.0),
    ):
        changed = buffer.clone()
        if plane in (COUNT, NONFINITE):
            changed.view(torch.int64)[plane, 0, 0, 0] = value
        else:
            changed[plane, 0, 0, 0] = value
        bad.append(with_moments(changed))
    changed = buffer.clone()  # without samples, but with a mean
    changed.view(torch.int64)[COUNT, 0, 0, 0] = 0
    changed[MEAN, 0, 0, 0] = math.nan
    for shaped in (
        changed,
        buffer[0],
        buffer[:, :3],
        buffer[..., None],
        buffer.view(torch.int64),
        buffer.flatten(),
    ):
        bad.append(with_moments(shaped.contiguous()))
    for content in bad:
        path.write_bytes(content)
        with pytest.raises((CheckpointError, DataError)) as no:
            resume()
        assert "\n" not in str(no.value)
        assert path.read_bytes() == content
    path.unlink()
    path.mkdir()
    with pytest.raises(IsADirectoryError) as no:
        resume()
    assert os.fspath(no.value.filename) == str(path)
    path.rmdir()
    path.write_bytes(good)
    resume()


@contextlib.contextmanager
def memory_for(module, tokens: int):
    """A model that runs out of memory with larger batches."""

    def hook(module, args, kwargs):
        ids = kwargs["input_ids"]
        if ids.numel() > tokens:
            raise torch.OutOfMemoryError("out of memory")

    handle = module.register_forward_pre_hook(hook, with_kwargs=True)
    yield
    handle.remove()


def test_a_run_that_halved_its_batches_goes_on_with_them(model, tokenizer, tmp_path):
    path = tmp_path / "c"
    # Of one length, for full batches: the windows that were planned ahead must be planned anew.
    texts = [(text * 40)[:40] for text in some_texts()]
    with memory_for(model.model, 130):
        want = profile(model, corpus_of(texts, tokenizer), batch_tokens=400, token_agg="token")
        for after in (1, 4):
            options = {"resume": True, "batch_tokens": 400, "token_agg": "token"}
            stopped(model, corpus_of(texts, tokenizer), path, after, **options)
        found = profile(model, corpus_of(texts, tokenizer), checkpoint=path, **options)
    assert_same(found, want)
    assert int(want.moments["head_output_norm"].count.max()) == sum(map(len, texts))


@pytest.mark.parametrize("kind", ["windows", "given"])
def test_wherever_a_run_stops_it_goes_on_with_the_batches_that_were_left(tokenizer, kind):
    """Also between two halvings; the memory gets less on the way."""
    texts = [(text * 40)[: 20 + 4 * (n % 5)] for n, text in enumerate(some_texts(90))]
    given = [torch.full((rows, 3), rows) for rows in (20, 7, 1, 13)]

    def feed(position):
        if kind == "given":
            return GivenFeed(map(as_batch, given), max_tokens=None, digested=True, position=position)
        return WindowFeed(
            corpus_of(texts, tokenizer),
            **{"budget": 400, "max_rows": None, "pad_token_id": 0, "with_mask": False},
            **{"pinned": False, "embeddings": None, "position": position},
        )

    def batches(feed, tokens, positions=None, last=None):
        shapes = []
        try:
            while True:
                position = json.loads(json.dumps(feed.position()))
                if positions is not None:
                    positions.append((position, tokens, len(shapes)))
                batch = feed.next()
                if batch is None:
                    return shapes
                most = (100 if tokens < 1000 else 60) if kind == "windows" else (15 if tokens < 15 else 6)
                if batch.area > most:
                    assert feed.halve()
                    continue
                if last is not None:
                    last.append(position)
                feed.done()
                tokens += batch.tokens
                shapes.append(batch.arguments["input_ids"].tolist())
        finally:
            feed.close()

    positions, last = [], []
    want = batches(feed(None), 0, positions, last)
    for position, tokens, done in positions:
        assert batches(feed(position), tokens) == want[done:]
    # Where there is more memory than before it is the batch that was found to fit, and no larger one.
    for position, ids in zip(last, want, strict=True):
        again = feed(position)
        assert again.next().arguments["input_ids"].tolist() == ids
        again.close()


def test_a_second_ctrl_c_breaks_into_a_forward(model, tokenizer, tmp_path, monkeypatch):
    """The batch may or may not have counted: no checkpoint is written then, and the one before stays."""
    monkeypatch.setattr(signals, "AGAIN", -1.0)
    path = tmp_path / "c"
    texts = some_texts()
    want = profile(model, corpus_of(texts, tokenizer), batch_tokens=200)
    stopped(model, corpus_of(texts, tokenizer), path, 3, batch_tokens=200)
    before = path.read_bytes()
    calls = 0

    def hook(*_):
        nonlocal calls
        calls += 1
        if calls == 3:
            os.kill(os.getpid(), signal.SIGINT)
            os.kill(os.getpid(), signal.SIGINT)
            threading.Event().wait(1)

    handle = model.model.layers[1].register_forward_pre_hook(hook)
    options = {"checkpoint": path, "resume": True, "batch_tokens": 200}
    with pytest.raises(ProfileInterrupted) as interrupted:
        profile(model, corpus_of(texts, tokenizer), **options)
    handle.remove()
    assert interrupted.value.checkpoint == path
    assert path.read_bytes() == before
    assert_same(profile(model, corpus_of(texts, tokenizer), **options), want)


def test_elsewhere_than_in_the_main_thread_signals_are_left_alone(model, tmp_path):
    found = []
    data = torch.ones(2, 4, dtype=torch.long)
    thread = threading.Thread(target=lambda: found.append(profile(model, data, checkpoint=tmp_path / "c")))
    thread.start()
    thread.join()
    assert found[0].metadata["data"]["tokens"] == 8


def test_signals_that_the_caller_ignores_are_ignored(model, tmp_path):
    """As SIGINT is in what a shell script leaves in the background."""
    path = tmp_path / "c"
    seen = []

    def progress(done, total):
        os.kill(os.getpid(), signal.SIGINT)
        seen.append(signal.getsignal(signal.SIGINT))

    data = torch.ones(2, 4, dtype=torch.long)
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        found = profile(model, data, checkpoint=path, progress=progress)
        assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, before)
    assert set(seen) == {signal.SIG_IGN}
    assert found.metadata["data"]["tokens"] == 8


def test_a_folder_that_cannot_be_synced_is_no_matter(tmp_path, monkeypatch):
    sync = os.fsync

    def fsync(descriptor):
        if stat.S_ISDIR(os.fstat(descriptor).st_mode):
            raise OSError(errno.EINVAL, "Invalid argument")
        sync(descriptor)

    monkeypatch.setattr(os, "fsync", fsync)
    files.write_atomic(tmp_path / "a", b"content")
    assert (tmp_path / "a").read_bytes() == b"content"


def test_a_folder_that_another_process_has_taken_into_use_stays(tmp_path, monkeypatch):
    """Between the making of the folder and its removal."""

    def used(dir):
        (tmp_path / "a" / "b" / "file").touch()
        return contextlib.nullcontext()

    monkeypatch.setattr(files.tempfile, "TemporaryFile", used)
    files.check_writable(tmp_path / "a" / "b" / "c")
    assert (tmp_path / "a" / "b" / "file").exists()
    monkeypatch.setattr(
        files.tempfile, "TemporaryFile", lambda dir: contextlib.nullcontext(shutil.rmtree(tmp_path / "x"))
    )
    files.check_writable(tmp_path / "x" / "y" / "c")


def test_an_error_keeps_the_checkpoint(model, tokenizer, tmp_path):
    path = tmp_path / "c"
    texts = some_texts()

    def progress(done, total):
        if done > 1500:
            raise Stop

    with pytest.raises(Stop):
        profile(
            model,
            corpus_of(texts, tokenizer),
            checkpoint=path,
            checkpoint_every=1e-9,
            progress=progress,
            batch_tokens=200,
        )
    options = {"checkpoint": path, "resume": True, "batch_tokens": 200}
    found = profile(model, corpus_of(texts, tokenizer), **options)
    assert_same(found, profile(model, corpus_of(texts, tokenizer), batch_tokens=200))


def test_what_a_killed_writer_left_is_swept_up(tmp_path):
    checkpoint = Checkpoint(tmp_path / "a[1].checkpoint")
    (tmp_path / ".a[1].checkpoint.x7.tmp").touch()
    (tmp_path / ".a1.checkpoint.x7.tmp").touch()
    checkpoint.save({}, {})
    checkpoint.remove()
    assert os.listdir(tmp_path) == [".a1.checkpoint.x7.tmp"]


def saved(folder: Path, name: str) -> HeadProfile:
    assert not list(folder.glob(f"*{name}.checkpoint*"))
    return HeadProfile.load(folder / f"{name}.safetensors")


@pytest.mark.slow
def test_sigkill_at_ten_moments_loses_an_interval_each_and_nothing_at_the_end(happened):
    found, folder = happened("killed")
    assert found["kills"] == 10
    assert_same(saved(folder, "killed"), saved(folder, "one"))
    tracks = [track for track in found["tracks"] if track]
    assert tracks[-1][0][1] > 0  # it did not start afresh
    for before, after in itertools.pairwise(tracks):
        resumed = after[0][1]
        assert resumed <= before[-1][1]
        # A batch and the writing of a checkpoint take their time on a busy machine.
        late = before[-1][0] - found["every"] - 0.5
        assert all(tokens <= resumed for at, tokens in before if at < late)


@pytest.mark.slow
def test_a_full_disk_keeps_the_checkpoint_before_and_says_so_once(happened):
    found, folder = happened("full_disk")
    assert found["code"] == -signal.SIGKILL  # it went on until then
    assert found["kept"]
    assert found["said"].splitlines() == [
        "fastheads: warning: cannot write the checkpoint full.checkpoint: File too large; the previous one is kept, "
        "and the run continues"
    ]
    assert_same(saved(folder, "full"), saved(folder, "one"))


@pytest.mark.slow
def test_a_full_file_system_keeps_the_checkpoint_before_and_says_so_once(happened):
    """A real one, of 64 KiB, where this machine lets its users mount; the test above does without."""
    found, folder = happened("tiny_disk")
    if "no" in found:
        pytest.skip(found["no"])
    warning, error, kept = found["said"].splitlines()
    assert warning == (
        "fastheads: warning: cannot write the checkpoint disk/tiny.checkpoint: No space left on device; the previous one is "
        "kept, and the run continues"
    )
    assert json.loads(error) == [errno.ENOSPC, "disk/tiny.safetensors"]
    assert json.loads(kept) == [True, ["filler", "tiny.checkpoint"]]
    assert (found["later"], found["left"]) == ("", ["tiny.safetensors"])
    assert_same(HeadProfile.load(folder / "tiny.safetensors"), HeadProfile.load(folder / "one.safetensors"))


@pytest.mark.slow
def test_sigterm_writes_a_checkpoint_and_hands_over_what_there_is(happened):
    found, folder = happened("ended")
    assert found["code"] == 43
    number, tokens = json.loads(found["said"])
    assert number == signal.SIGTERM
    assert 20_000 < tokens < 21_000
    assert_same(saved(folder, "ended"), saved(folder, "one"))
