"""The command line: what it prints, what it writes, and one clear line for every bad input."""

import gc
import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile

import pytest
import torch
from checkpoints import TEXT
from transformers import AutoModelForCausalLM

from fastheads import HeadProfile, __version__
from fastheads.cli.commands import main
from fastheads.results.ranking import displayed_metric
from fastheads.run import loading

PROGRAM = [sys.executable, "-c", "from fastheads.cli.commands import main; main()"]


def files(folder) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*")}


def test_a_profile_is_measured_saved_drawn_and_shown(run, here, model):
    arguments = [
        "--data",
        "text.txt",
        "-o",
        "new/p.safetensors",
        "--plot",
        "pictures/p.png",
        "--seq-len",
        "32",
    ]
    code, out, err = run("profile", model, *arguments)
    assert code == 0, err
    found = HeadProfile.load(here / "new" / "p.safetensors")
    data = found.metadata["data"]
    assert (data["source"], data["tokens"], data["complete"]) == ("text.txt", 225, True)
    assert data["seq_len"] == 32
    assert found.metadata["model"] == model
    assert (here / "pictures" / "p.png").read_bytes().startswith(b"\x89PNG")
    assert files(here) == {"text.txt", "new", "new/p.safetensors", "pictures", "pictures/p.png"}

    for said in ("225 tokens in 8 sequences", "12 heads, highest first", "pictures/p.png"):
        assert said in out
    rows = re.findall(r"^ +(\d+) +(\d+) +([\d.]+) +±([\d.]+)[ \d.~]*$", out, re.MULTILINE)
    metric = displayed_metric(found.metrics)
    assert re.search(rf"metric +{metric} ", out)
    assert [(int(row[0]), int(row[1])) for row in rows] == found.rank(metric, descending=True)
    highest, first = found.rank(metric)[-1], rows[0]
    stats = found.results()[metric]
    places = len(first[2].partition(".")[2])
    assert first[2] == f"{stats['mean'][highest]:.{places}f}"  # rows are layers here
    assert first[3] == f"{stats['sem'][highest]:.{places}f}"
    assert {len(cell.partition(".")[2]) for row in rows for cell in row[2:]} == {places}

    code, again, err = run("show", "new/p.safetensors")
    assert (code, err) == (0, "")
    assert again.strip() == out[: out.index("\nsaved new/p.safetensors")].strip()


def test_another_metric_can_be_shown(run, here, model):
    run("profile", model, "--data", "text.txt")
    code, out, _ = run("show", "head_profile.safetensors", "--metric", "head_output_norm")
    assert code == 0
    assert re.search(r"metric +head_output_norm", out)
    assert "1 is the layer's" not in out
    code, out, err = run("show", "head_profile.safetensors", "--metric", "size")
    assert (code, out) == (2, "")
    assert err.startswith("fastheads: no metric 'size' in this profile; it has head_output_norm, ")


def test_as_many_heads_are_listed_as_are_asked_for(run, here, model):
    run("profile", model, "--data", "text.txt")
    metric = "relative_head_residual_contribution_norm"
    found = HeadProfile.load("head_profile.safetensors").rank(metric)
    code, out, _ = run("show", "head_profile.safetensors", "--heads", "2", "--metric", metric)
    assert code == 0
    rows = re.findall(r"^ +(\d+) +(\d+) .* (\d+) +(\d+) +[\d.]+ +±[\d.]+[ ~]*$", out, re.MULTILINE)
    assert [tuple(map(int, row)) for row in rows] == [found[-1] + found[0], found[-2] + found[1]]
    assert "2 highest heads" in out and "2 lowest heads" in out
    assert "12 heads, highest first" in run("show", "head_profile.safetensors", "--heads", "all")[1]


def test_profiles_are_merged_and_shown(run, here, model):
    (here / "more.txt").write_text(TEXT[::-1])
    for name in ("text", "more"):
        assert run("profile", model, "--data", f"{name}.txt", "-o", f"{name}.safetensors")[0] == 0
    code, out, err = run("merge", "text.safetensors", "more.safetensors", "-o", "new/both.safetensors")
    assert (code, err) == (0, "")
    one, two, both = (HeadProfile.load(f"{n}.safetensors") for n in ("text", "more", "new/both"))
    counts = [int(p.moments["head_output_norm"].count[0, 0]) for p in (one, two, both)]
    assert counts[0] + counts[1] == counts[2]
    assert both.metadata["data"]["source"] == "text.txt + more.txt"
    assert re.search(r"data +text.txt \+ more.txt", out)
    assert out.endswith(
        "merged 2 profiles into new/both.safetensors; see it again with: fastheads show new/both.safetensors\n"
    )


def test_a_copy_of_the_model_merges_and_another_model_does_not(run, here, model, tmp_path_factory):
    shutil.copytree(model, here / "copy")
    torch.manual_seed(1)
    other = tmp_path_factory.mktemp("other")
    changed = AutoModelForCausalLM.from_pretrained(model)
    with torch.no_grad():
        changed.model.layers[0].mlp.up_proj.weight.mul_(1.001)
    shutil.copytree(model, other, dirs_exist_ok=True)
    changed.save_pretrained(other)
    (here / "more.txt").write_text(TEXT[::-1])
    for source, data, name in ((model, "text", "a"), ("copy", "more", "b"), (str(other), "more", "c")):
        assert run("profile", source, "--data", f"{data}.txt", "-o", f"{name}.safetensors")[0] == 0
    assert run("merge", "a.safetensors", "b.safetensors", "-o", "ab.safetensors")[0] == 0
    code, out, err = run("merge", "a.safetensors", "c.safetensors", "-o", "ac.safetensors")
    assert (code, out) == (1, "")
    assert err == (
        f"fastheads: cannot merge a.safetensors and c.safetensors: they differ in model: {model!r} and {str(other)!r} "
        "(weights: names and shapes are the same, the numbers are not)\n"
    )
    assert not (here / "ac.safetensors").exists()


def test_data_that_are_repeated_are_merged_only_if_that_is_said(run, here, model):
    for name, tokens in (("a", "100"), ("b", "200")):
        run("profile", model, "--data", "text.txt", "--max-tokens", tokens, "-o", f"{name}.safetensors")
    arguments = ("merge", "a.safetensors", "b.safetensors", "-o", "ab.safetensors")
    code, out, err = run(*arguments)
    assert (code, out) == (1, "")
    assert err.startswith("fastheads: cannot merge a.safetensors and b.safetensors: both hold 'text.txt', ")
    assert err.count("\n") == 1 and "--allow-repeated" in err
    assert run(*arguments, "--allow-repeated")[0] == 0
    assert HeadProfile.load("ab.safetensors").metadata["data"]["tokens"] == 300


def test_merging_leaves_other_files_alone(run, here, model):
    run("profile", model, "--data", "text.txt", "-o", "a.safetensors")
    (here / "b.safetensors").write_bytes(b"no profile")
    code, out, err = run("merge", "a.safetensors", "b.safetensors", "-o", "new.safetensors")
    assert (code, out) == (1, "")
    assert err.startswith("fastheads: b.safetensors is not a head profile")
    code, out, err = run("merge", "a.safetensors", "a.safetensors", "-o", "b.safetensors", "--allow-repeated")
    assert (code, out) == (1, "")
    assert (
        err
        == "fastheads: b.safetensors exists and is no head profile: it is not overwritten, choose another name\n"
    )
    assert (here / "b.safetensors").read_bytes() == b"no profile"
    assert not (here / "new.safetensors").exists()


@pytest.mark.filterwarnings("default:the ranking has not settled")
def test_until_stable_takes_all_the_data_unless_it_is_told(run, here, model):
    code, _, err = run("profile", model, "--data", "text.txt", "--until-stable")
    assert code == 0
    assert "fastheads: warning: the ranking has not settled by the end of the data: 12 of 12 heads und" in err
    found = HeadProfile.load("head_profile.safetensors").metadata["data"]
    assert (found["max_tokens"], found["until_stable"]["settled"]) == (None, False)
    code, _, err = run("profile", model, "--data", "text.txt", "--until-stable", "--max-tokens", "40")
    assert code == 0
    assert "fastheads: warning: the ranking has not settled by max_tokens=40: 12 of 12 heads undecided" in err
    found = HeadProfile.load("head_profile.safetensors").metadata["data"]
    assert f"(by {found['until_stable']['metric']})" in err
    assert (found["tokens"], found["complete"], found["until_stable"]["settled"]) == (40, False, False)
    code, out, err = run("profile", model, "--until-stable", "--token-agg", "token")
    assert (code, out) == (2, "")
    assert err.startswith("fastheads: until_stable cannot be used with token_agg 'token': ")


@pytest.mark.parametrize("limit", [[], ["--max-tokens", "all"]])
def test_all_the_data_are_profiled_unless_a_limit_is_given(run, here, model, limit):
    (here / "long.txt").write_text(TEXT * 200)  # more than is taken of Python's text
    assert run("profile", model, "--data", "long.txt", *limit, "--layers", "0")[0] == 0
    found = HeadProfile.load("head_profile.safetensors").metadata["data"]
    assert (found["tokens"], found["max_tokens"], found["complete"]) == (len(TEXT) * 200, None, True)


def test_python_s_own_text_is_cut_and_that_is_said(run, here, model):
    code, out, err = run("profile", model, "--layers", "0")
    assert code == 0
    assert "fastheads: no --data: using the first 32,768 tokens of Python's own English text" in err
    assert "(incomplete)" in out
    found = HeadProfile.load("head_profile.safetensors").metadata["data"]
    assert (found["tokens"], found["complete"]) == (32_768, False)
    assert "no --data" not in run("profile", model, "--layers", "0", "--max-tokens", "50")[2]


@pytest.mark.parametrize(
    ("limit", "complete"), [("224", False), ("225", True), ("226", True)]
)  # of 225 tokens
@pytest.mark.parametrize("cut", ["stream", "documents"])
def test_only_a_profile_of_all_the_data_is_complete(run, here, model, limit, complete, cut):
    if cut == "documents":
        limit = str(int(limit) - 5)  # less the ends of the lines
    assert run("profile", model, "--data", "text.txt", "--cut", cut, "--max-tokens", limit)[0] == 0
    assert HeadProfile.load("head_profile.safetensors").metadata["data"]["complete"] is complete


def lines(*texts):
    return "".join(json.dumps({"text": text}) + "\n" for text in texts)


def test_several_files_patterns_and_folders_are_one_corpus(run, here, model):
    (here / "d").mkdir()
    (here / "d/a.jsonl").write_text(lines("one", "two"))
    (here / "d/b.jsonl").write_text(lines("three"))
    (here / "all.jsonl").write_text(lines("one", "two", "three"))
    assert run("profile", model, "--data", "all.jsonl", "-o", "all.safetensors")[0] == 0
    whole = HeadProfile.load("all.safetensors")
    for data in (["d/a.jsonl", "d/b.jsonl"], ["d/*.jsonl"], ["d"], ["d/"], ["d/a*", "d/b*"]):
        options = [word for name in data for word in ("--data", name)]
        assert run("profile", model, *options, "-o", "some.safetensors")[0] == 0
        found = HeadProfile.load("some.safetensors")
        assert found.metadata["data"]["source"] == "d/a.jsonl + d/b.jsonl"
        assert found.metadata["data"]["complete"] is True
        assert all(
            torch.equal(a, b)
            for m in whole.metrics
            for a, b in zip(found.moments[m], whole.moments[m], strict=True)
        )
    # One of the files again is the same data again.
    for name in ("d/a.jsonl", "d/b.jsonl"):
        assert run("profile", model, "--data", name, "-o", "part.safetensors")[0] == 0
        code, _, err = run("merge", "some.safetensors", "part.safetensors", "-o", "merged.safetensors")
        assert (code, "would count twice" in err) == (1, True)
    assert run("profile", model, "--data", "text.txt", "-o", "part.safetensors")[0] == 0
    assert run("merge", "some.safetensors", "part.safetensors", "-o", "merged.safetensors")[0] == 0


@pytest.mark.parametrize(
    ("data", "code", "says"),
    [
        (["no*.jsonl"], 1, "no data file matches 'no\\*.jsonl'"),
        (["text.txt", "./text.txt"], 1, "the data file text.txt is given twice: .*"),
        (["text.txt", "t*.txt"], 1, "the data file text.txt is given twice: .*"),
        (["text.txt", "d.jsonl"], 2, "text.txt \\+ d.jsonl: text files .*cut='documents'.*"),
        (["text.txt", "-"], 2, "--data - must be the only --data: .*"),
        (["owner/name", "text.txt"], 2, "--data owner/name must be the only --data: .*"),
        (["empty"], 1, "the data folder empty holds no files"),
        (["odd"], 1, "the data folder odd holds README beside other kinds of files: .*'odd/\\*.jsonl'"),
    ],
)
def test_data_that_cannot_be_one_corpus_are_refused(run, here, model, data, code, says):
    (here / "d.jsonl").write_text(lines("one"))
    (here / "empty").mkdir()
    (here / "odd").mkdir()
    (here / "odd/README").write_text("what this is")
    (here / "odd/d.jsonl").write_text(lines("one"))
    options = [word for name in data for word in ("--data", name)]
    found, _, err = run("profile", model, *options)
    assert found == code
    assert re.fullmatch("fastheads: " + says, err.splitlines()[-1])


class Stdin:
    def __init__(self, content):
        self.buffer = io.BytesIO(content)


@pytest.mark.parametrize("kind", ["text", "lines"])
def test_standard_input_is_data(run, here, model, monkeypatch, kind):
    content = TEXT if kind == "text" else lines("one", "two")
    file = here / ("a.txt" if kind == "text" else "a.jsonl")
    file.write_text(content)
    assert run("profile", model, "--data", str(file), "-o", "file.safetensors")[0] == 0
    monkeypatch.setattr(sys, "stdin", Stdin(content.encode()))
    before = set(os.listdir(tempfile.gettempdir()))
    code, _, err = run("profile", model, "--data", "-", "-o", "stdin.safetensors")
    assert code == 0
    assert "fastheads: standard input cannot be resumed: no checkpoints are written" in err
    gc.collect()
    left = set(os.listdir(tempfile.gettempdir())) - before
    assert not [name for name in left if name.startswith("fastheads")]
    want, found = HeadProfile.load("file.safetensors"), HeadProfile.load("stdin.safetensors")
    assert found.metadata["data"]["source"] == "standard input"
    for key in ("sha256", "head_sha256", "tokens", "sequences", "complete"):
        assert found.metadata["data"][key] == want.metadata["data"][key]
    assert all(torch.equal(found.moments[m].mean, want.moments[m].mean) for m in want.metrics)


def test_standard_input_is_refused_where_it_would_be_read_again(run, here, model, monkeypatch):
    monkeypatch.setattr(sys, "stdin", Stdin(b""))
    code, _, err = run("profile", model, "--data", "-")
    assert (code, err.splitlines()[-1]) == (1, "fastheads: standard input is empty")
    code, _, err = run("profile", model, "--data", "-", "--resume")
    assert (code, "standard input cannot be resumed" in err) == (2, True)


def test_resume_says_what_it_does_and_replaces_no_finished_profile(run, here, model, monkeypatch):
    arguments = ["profile", model, "--data", "text.txt", "--seq-len", "8", "--batch-tokens", "24"]
    code, _, err = run(*arguments, "-o", "p.safetensors", "--resume")
    assert code == 0
    checkpoint = "p.safetensors.checkpoint"
    assert f"fastheads: nothing to resume: there is no checkpoint {checkpoint}, so the run sta" in err
    before = (here / "p.safetensors").read_bytes()
    code, _, err = run(*arguments, "-o", "p.safetensors", "--resume")
    assert code == 1
    assert err.splitlines()[-1] == (
        f"fastheads: nothing to resume: there is no checkpoint {checkpoint}, and p.safetensors is a finished profile. Leave out "
        "--resume to replace it"
    )
    assert (here / "p.safetensors").read_bytes() == before
    code, _, err = run(*arguments, "-o", "p.safetensors")
    assert (code, "fastheads: p.safetensors exists: it is replaced" in err) == (0, True)


def test_options_reach_the_profile(run, here, model):
    (here / "d.jsonl").write_text('{"body": "one"}\n{"body": "three"}\n')
    code, _, err = run(
        *(
            "profile",
            model,
            "--data",
            "d.jsonl",
            "--field",
            "body",
            "--token-agg",
            "token",
            "--layers",
            "0,2-2",
        ),
        *(
            "--backend",
            "loop",
            "--skip-first",
            "1",
            "--max-tokens",
            "7",
            "--batch-size",
            "1",
            "--dtype",
            "bfloat16",
        ),
    )
    assert code == 0, err
    found = HeadProfile.load("head_profile.safetensors")
    assert found.results()["head_output_norm"]["count"].tolist() == [[5] * 4, [0] * 4, [5] * 4]
    metadata = found.metadata
    assert (metadata["backend"], metadata["token_agg"], metadata["skip_first"]) == ("loop", "token", 1)
    assert metadata["data"]["tokens"] == 7


def test_a_profile_may_be_written_again_but_no_other_file(run, here, model):
    arguments = ("profile", model, "--data", "text.txt", "-o", "p.safetensors")
    assert run(*arguments)[0] == run(*arguments)[0] == 0
    (here / "p.safetensors").write_bytes(b"the weights of a model")
    code, _, err = run(*arguments)
    assert (code, err.splitlines()[-1]) == (
        1,
        "fastheads: p.safetensors exists and is no head profile: it is not overwritten, choose another name",
    )
    assert (here / "p.safetensors").read_bytes() == b"the weights of a model"


def write_latin(here):
    (here / "latin.txt").write_bytes("zwölf".encode("latin-1"))


def write_broken_lines(here):
    (here / "broken.jsonl").write_text('{"text": "fine"}\n{"text": \n')


# Options that are wrong in themselves, or for the model: exit status 2. What is missing, damaged or not to be had here: 1.
WRONG_USAGE = {
    "max_tokens must be at least 1, not 0: nothing would be measured",
    "seq_len must be at least 1 token, not 0",
    "seq_len 65 is more than the model's max_position_embeddings, 64",
    "batch_size must be at least 1 sequence, not 0",
    "skip_first must be 0 tokens or more, not -1",
    "unknown backend 'magic': choose one of auto, loop, .*",
    "unknown precision 'high': choose one of exact, fast",
    "unknown dtype 'int3': choose one of .*",
    "--layers '1-': expected numbers and ranges, as in 0-3,8",
    "--layers '2-1': expected numbers and ranges, as in 0-3,8",
    "--data is empty: name a file, or leave out --data",
    "field is for JSON lines, .*: the text text.txt has .*",
    "chat is for JSON lines, .*: the text text.txt has .*",
    "chat is for JSON lines, .*: the cells of cells.csv are .*",
    "field is for JSON lines, .*: the text of Python has no fields",
    "--split is for data sets of the Hub, owner/name",
    "--streaming is for data sets of the Hub, owner/name",
    "layers must name some of the layers 0 to 2 that have a site, not .*",
    "the output's name must end in .safetensors, not 'p.pt'",
    "the output's name must end in .safetensors, not ''",
    "a picture's name must end in one of .png, .pdf, .svg, not 'p.bmp'",
}


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["{model}", "--data", "none.txt"], "cannot read the data file none.txt: No such file or directory"),
        (["{model}", "--data", "empty.txt"], "the data file empty.txt is empty"),
        (["{model}", "--data", "latin.txt"], "latin.txt is not UTF-8 text: .*"),
        (["{model}", "--data", "broken.jsonl"], "broken.jsonl, line 2 is not JSON: .*"),
        (["{model}", "--data", "lines.jsonl"], "lines.jsonl, line 1 has no field 'text' .*"),
        (["{model}", "--data", "."], "the data file empty.txt is empty"),
        (
            ["{model}", "--data", "/dev/zero"],
            r"the data file /dev/zero is not a regular file \(- reads standard input\)",
        ),
        (
            ["{model}", "--data", "no/such.txt"],
            "cannot read the data file no/such.txt: No such file or directory",
        ),
        (
            ["{model}", "--data", "/no/such/text"],
            "cannot read the data file /no/such/text: No such file or .*",
        ),
        (["{model}", "--data", ""], "--data is empty: name a file, or leave out --data"),
        (
            ["{model}", "--data", "text.txt", "--field", "a"],
            "field is for JSON lines, .*: the text text.txt has .*",
        ),
        (["{model}", "--data", "text.txt", "--chat"], "chat is for JSON lines, .*: the text text.txt has .*"),
        (
            ["{model}", "--data", "cells.csv", "--chat"],
            "chat is for JSON lines, .*: the cells of cells.csv are .*",
        ),
        (["{model}", "--field", "a"], "field is for JSON lines, .*: the text of Python has no fields"),
        (
            ["{model}", "--data", "text.txt", "--split", "train"],
            "--split is for data sets of the Hub, owner/name",
        ),
        (["{model}", "--streaming"], "--streaming is for data sets of the Hub, owner/name"),
        (
            ["{model}", "-o", "taken.safetensors"],
            "taken.safetensors.checkpoint: it is a folder; name a file in it",
        ),
        (["{model}", "--max-tokens", "0"], "max_tokens must be at least 1, not 0: nothing would be measured"),
        (["{model}", "--seq-len", "0"], "seq_len must be at least 1 token, not 0"),
        (["{model}", "--seq-len", "65"], "seq_len 65 is more than the model's max_position_embeddings, 64"),
        (["{model}", "--batch-size", "0"], "batch_size must be at least 1 sequence, not 0"),
        (["{model}", "--skip-first", "-1"], "skip_first must be 0 tokens or more, not -1"),
        (["{model}", "--backend", "magic"], "unknown backend 'magic': choose one of auto, loop, .*"),
        (["{model}", "--precision", "high"], "unknown precision 'high': choose one of exact, fast"),
        (["{model}", "--dtype", "int3"], "unknown dtype 'int3': choose one of .*"),
        (["{model}", "--device", "quantum"], "no device 'quantum' on this machine: .*"),
        (["{model}", "--layers", "1-"], "--layers '1-': expected numbers and ranges, as in 0-3,8"),
        (["{model}", "--layers", "2-1"], "--layers '2-1': expected numbers and ranges, as in 0-3,8"),
        (
            ["{model}", "--layers", "99"],
            "layers must name some of the layers 0 to 2 that have a site, not .*",
        ),
        (["{model}", "-o", "p.pt"], "the output's name must end in .safetensors, not 'p.pt'"),
        (["{model}", "-o", ""], "the output's name must end in .safetensors, not ''"),
        (["{model}", "-o", "text.txt/p.safetensors"], "cannot write to the folder text.txt: it is a file"),
        (["{model}", "-o", "text.txt/a/p.safetensors"], "cannot write to the folder text.txt/a: .*"),
        (["{model}", "--plot", "p.bmp"], "a picture's name must end in one of .png, .pdf, .svg, not 'p.bmp'"),
        (["{model}", "--plot", "text.txt/p.png"], "cannot write to the folder text.txt: it is a file"),
        (["./none"], "no model './none': there is no such folder or GGUF file, and it is no Hub id"),
        (["nobody/nothing"], "no model 'nobody/nothing': .* HF_HUB_OFFLINE turns the Hub off"),
        (["text.txt"], "text.txt is not a GGUF file; name a folder, a GGUF file or a Hub id"),
        (["."], "the folder . holds no model: it has no config.json"),
    ],
)
def test_bad_input_is_one_line_and_leaves_nothing(run, here, model, monkeypatch, arguments, says):
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    (here / "empty.txt").touch()
    (here / "cells.csv").write_text("text\na\n")
    (here / "taken.safetensors.checkpoint").mkdir()
    (here / "lines.jsonl").write_text('{"body": "x"}\n')
    write_latin(here)
    write_broken_lines(here)
    before = files(here)
    code, out, err = run("profile", *[model if argument == "{model}" else argument for argument in arguments])
    assert code == (2 if says in WRONG_USAGE else 1)
    assert out == ""
    *notes, line = err.splitlines()
    assert re.fullmatch("fastheads: " + says, line)
    assert all(note.startswith(("loading ", "fastheads: no --data: ")) for note in notes)
    assert files(here) == before


def test_a_folder_that_cannot_be_written_is_found_before_the_work(run, here, model, monkeypatch):
    def denied(**_):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(tempfile, "TemporaryFile", denied)
    monkeypatch.setattr(loading, "load_model", lambda *_, **__: pytest.fail("loaded"))
    code, _, err = run("profile", model, "-o", "new/deep/p.safetensors")
    assert code == 1
    assert err.splitlines()[-1] == "fastheads: cannot write to the folder new/deep: Permission denied"
    assert files(here) == {"text.txt"}


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["profile", "--token-agg", "some"], "Invalid value for '--token-agg'"),
        (["profile", "--max-tokens", "many"], "Invalid value for '--max-tokens'"),
        (["profile", "--colour"], "No such option"),
        (["profile", "a", "b"], "unexpected extra argument"),
        (["profile", "--heads", "3"], "No such option"),
        (["prof"], "No such command"),
        (["show", "a", "--heads", "few"], "'few' is neither a whole number nor all"),
        (["show", "a", "--heads", "0"], "--heads must be at least 1, or all, not 0"),
        (["merge", "a", "b"], "Missing option '--output'"),
        (["merge", "a", "-o", "c.safetensors"], "merge needs two or more files"),
        (["merge", "a", "b", "-o", "c.pt"], "the output's name must end in .safetensors, not 'c.pt'"),
        (["show"], "Missing argument"),
    ],
)
def test_wrong_usage_is_one_line(run, here, arguments, says):
    code, out, err = run(*arguments)
    assert code == 2
    assert out == ""
    assert err.startswith("fastheads: ")
    assert says in err
    assert err.count("\n") == 1


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (None, "No such file or directory"),
        (b"hello", "is not a head profile"),
        (b"", "is not a head profile"),
    ],
)
def test_show_refuses_what_is_no_profile(run, here, content, says):
    if content is not None:
        (here / "f").write_bytes(content)
    code, out, err = run("show", "f")
    assert (code, out) == (1, "")
    assert err.startswith("fastheads: f")
    assert says in err
    assert err.count("\n") == 1


def test_a_file_cannot_steer_the_terminal(run, here, model):
    run("profile", model, "--data", "text.txt")
    found = HeadProfile.load("head_profile.safetensors")
    found.metadata["model"] = "[red]\x1b[2J\x1b]0;owned\x07name"
    found.metadata["data"]["source"] = "a\rb[/]"
    found.save("head_profile.safetensors")
    code, out, _ = run("show", "head_profile.safetensors")
    assert code == 0
    assert "[red]?[2J?]0;owned?name" in out
    assert "a?b[/]" in out
    assert not set(out) & {"\x1b", "\x07", "\r"}


def test_version_and_help(run):
    assert run("--version") == (0, f"fastheads {__version__}\n", "")
    for arguments in ([], ["--help"]):
        code, out, err = run(*arguments)
        assert (code, err) == (0, "")
        assert "profile" in out
        assert "show" in out


@pytest.mark.parametrize("arguments", [["--help"], ["profile", "--help"], ["--version"]])
def test_help_imports_no_heavy_library(arguments):
    code = (
        "import sys, importlib.util, types\n"
        # the package's own __init__ may import what it likes; the command line by itself must not
        "package = types.ModuleType('fastheads'); "
        "package.__path__ = importlib.util.find_spec('fastheads').submodule_search_locations\n"
        "sys.modules['fastheads'] = package\n"
        "from fastheads.cli.commands import main\n"
        "try: main(sys.argv[1:])\n"
        "finally: print({'torch', 'transformers', 'pandas', 'matplotlib'} & sys.modules.keys(), file=sys.stderr)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments], capture_output=True, text=True, check=True
    )
    assert done.stderr.strip() == "set()"


def interrupted(model: str, when: str, *arguments: str) -> tuple[int, str]:
    """Ctrl-C at the first line of stderr that holds `when`: the exit status and all of stderr."""
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "PYTHONWARNINGS": "default", "NO_COLOR": "1"}
    process = subprocess.Popen(
        [*PROGRAM, "profile", model, *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment,
        # A job in the background is born deaf to Ctrl-C, and with it all its children.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # noqa: PLW1509
    )
    said = ""
    for line in process.stderr:
        said += line
        if when in line:
            process.send_signal(signal.SIGINT)
            break
    _, rest = process.communicate(timeout=60)
    return process.returncode, said + rest


def test_ctrl_c_while_measuring_saves_what_there_is_and_says_so(here, model):
    code, err = interrupted(
        model, "tokens/s", "--max-tokens", "1000000", "--batch-size", "1", "--plot", "p.png"
    )
    assert code == 130
    found = HeadProfile.load(here / "head_profile.safetensors")
    data = found.metadata["data"]
    assert data["complete"] is False
    assert 1_000 <= data["tokens"] < 1_000_000
    assert found.results()["head_output_norm"]["count"].unique().tolist() == [data["sequences"]]
    assert err.splitlines()[-1] == (
        f"fastheads: interrupted: the results of {data['tokens']:,} tokens are saved in head_profile.safetensors; "
        "--resume continues from head_profile.safetensors.checkpoint"
    )
    assert "Traceback" not in err
    assert files(here) == {
        "text.txt",
        "head_profile.safetensors",
        "p.png",
        "head_profile.safetensors.checkpoint",
    }


def test_ctrl_c_while_loading_leaves_nothing(here, model):
    code, err = interrupted(model, "loading")
    assert code == 130
    assert err.splitlines()[-1] == "fastheads: interrupted before anything was measured; nothing is saved"
    assert "Traceback" not in err
    assert files(here) == {"text.txt"}


class Interrupted(io.RawIOBase):
    """A stream at which Ctrl-C comes, whatever is read or written."""

    encoding = "utf-8"

    def readinto(self, into):
        raise KeyboardInterrupt

    def write(self, content):
        raise KeyboardInterrupt


def test_ctrl_c_while_starting_leaves_nothing(run, here, model, monkeypatch):
    stdin = Stdin(b"")
    stdin.buffer = Interrupted()
    monkeypatch.setattr(sys, "stdin", stdin)
    code, out, err = run("profile", model, "--data", "-")
    assert (code, out) == (130, "")
    assert err.splitlines() == ["fastheads: interrupted before anything was measured; nothing is saved"]
    assert files(here) == {"text.txt"}


def test_ctrl_c_in_the_first_batch_saves_nothing(run, here, model, monkeypatch):
    load_model = loading.load_model

    def load(*arguments, **options):
        loaded = load_model(*arguments, **options)

        def interrupt(*_):
            raise KeyboardInterrupt

        loaded.model.layers[1].register_forward_pre_hook(interrupt)
        return loaded

    monkeypatch.setattr(loading, "load_model", load)
    code, out, err = run("profile", model, "--data", "text.txt")
    assert (code, out) == (130, "")
    assert err.splitlines()[-1] == "fastheads: interrupted before anything was measured; nothing is saved"
    assert files(here) == {"text.txt"}


def test_ctrl_c_while_the_table_is_printed_says_where_the_profile_is(run, here, model, monkeypatch):
    monkeypatch.setattr(sys, "stdout", Interrupted())
    code, out, err = run("profile", model, "--data", "text.txt", "-o", "p.safetensors")
    assert (code, out) == (130, "")
    assert err.splitlines()[-1] == "fastheads: interrupted; the profile is saved in p.safetensors"
    assert HeadProfile.load("p.safetensors").metadata["data"]["complete"]


def test_ctrl_c_twice_does_not_say_that_nothing_is_saved_where_a_checkpoint_is(run, here, model, monkeypatch):
    """The second comes while the profile is saved; the first, and any while the checkpoint is written, are heeded in order."""
    load_model, sync = loading.load_model, os.fsync
    stopped = False

    def load(*arguments, **options):
        loaded = load_model(*arguments, **options)

        def stop(*_):
            nonlocal stopped
            if not stopped:
                stopped = True
                os.kill(os.getpid(), signal.SIGINT)

        loaded.model.layers[1].register_forward_pre_hook(stop)
        return loaded

    def impatient(descriptor):
        if stopped:
            os.kill(os.getpid(), signal.SIGINT)
        sync(descriptor)

    monkeypatch.setattr(loading, "load_model", load)
    monkeypatch.setattr(os, "fsync", impatient)
    arguments = ["--data", "text.txt", "--seq-len", "8", "--batch-tokens", "24"]
    code, out, err = run("profile", model, *arguments, "-o", "p.safetensors")
    assert (code, out) == (130, "")
    assert err.splitlines()[-1] == "fastheads: interrupted; --resume continues from p.safetensors.checkpoint"
    assert files(here) == {"text.txt", "p.safetensors.checkpoint"}


def test_an_error_of_the_system_is_told_without_its_number(run, here, monkeypatch):
    def full(_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(HeadProfile, "load", full)
    assert run("show", "p.safetensors") == (1, "", "fastheads: No space left on device\n")


def test_warnings_are_lines_of_their_own(run, here, model, monkeypatch):
    import warnings

    load_model = loading.load_model

    def load(*arguments, **options):
        warnings.simplefilter("always")
        loaded = load_model(*arguments, **options)
        with torch.no_grad():
            loaded.model.layers[1].self_attn.o_proj.weight.fill_(0)
        return loaded

    monkeypatch.setattr(loading, "load_model", load)
    relative = "relative_head_residual_contribution_norm"
    code, out, err = run("profile", model, "--data", "text.txt", "--metrics", relative)
    assert code == 0
    assert re.search(r"^fastheads: warning: \d+ samples were NaN or infinite", err, re.MULTILINE)
    assert "samples were NaN or infinite and are not included" in out


def test_a_bug_is_not_hidden(here, model, monkeypatch):
    def broken(*_, **__):
        raise AttributeError("a bug")

    monkeypatch.setattr(loading, "load_model", broken)
    with pytest.raises(AttributeError, match="a bug"):
        main(["profile", model, "--data", "text.txt"])


@pytest.mark.slow
def test_the_demonstration_model_knows_paris_and_is_profiled(here):
    source = loading.find_model()
    loaded, tokenizer = loading.load_model(source), loading.load_tokenizer(source)
    ids = tokenizer("The capital of France is", return_tensors="pt")["input_ids"]
    with torch.inference_mode():
        assert tokenizer.decode(loaded(ids).logits[0, -1].argmax()).strip() == "Paris"
    del loaded
    done = subprocess.run(
        [*PROGRAM, "profile", "--max-tokens", "600"], capture_output=True, text=True, check=True
    )
    found = HeadProfile.load(here / "head_profile.safetensors")
    assert found.shape == (30, 9)
    assert found.metadata["model"] == "SmolLM2-135M-Instruct.Q4_1"
    assert "pydoc_data.topics" in done.stdout
    assert "600 tokens in 2 sequences" in done.stdout
    notes = done.stderr.splitlines()
    assert notes[0] == "loading SmolLM2-135M-Instruct.Q4_1"  # and no bars of the libraries
    assert all("of 600 tokens" in note for note in notes[1:])


def test_a_stopped_run_is_resumed_and_a_completed_one_leaves_no_checkpoint(run, here, model, monkeypatch):
    arguments = ["profile", model, "--data", "text.txt", "--seq-len", "8", "--batch-tokens", "24"]
    assert run(*arguments, "-o", "whole.safetensors")[0] == 0
    load_model = loading.load_model
    calls = 0

    def load(*given, **options):
        loaded = load_model(*given, **options)

        def stop(*_):
            nonlocal calls
            calls += 1
            if calls == 4:
                os.kill(os.getpid(), signal.SIGTERM)

        loaded.model.layers[1].mlp.register_forward_pre_hook(stop)
        return loaded

    monkeypatch.setattr(loading, "load_model", load)
    code, _, err = run(*arguments, "-o", "p.safetensors")
    assert code == 128 + signal.SIGTERM
    assert err.splitlines()[-1] == (
        "fastheads: ended by SIGTERM: the results of 96 tokens are saved in p.safetensors; "
        "--resume continues from p.safetensors.checkpoint"
    )
    code, _, err = run(*arguments, "-o", "p.safetensors", "--resume", "--token-agg", "last")
    assert code == 1
    assert err.splitlines()[-1] == (
        'fastheads: cannot resume from p.safetensors.checkpoint: token agg is not what it was: "all" then and "last" now. '
        "Leave out --resume to start from the beginning"
    )
    monkeypatch.setattr(loading, "load_model", load_model)
    code, _, err = run(*arguments, "-o", "p.safetensors", "--resume")
    assert (code, "fastheads: resuming from p.safetensors.checkpoint at 96 tokens" in err) == (0, True)
    found, whole = (HeadProfile.load(f"{name}.safetensors") for name in ("p", "whole"))
    for metric in whole.metrics:
        assert all(
            torch.equal(a, b) for a, b in zip(found.moments[metric], whole.moments[metric], strict=True)
        )
    assert files(here) == {"text.txt", "p.safetensors", "whole.safetensors"}


def test_parts_of_the_data(run, here, model):
    (here / "d.jsonl").write_text("".join(f'{{"text": "The quick brown fox {n}"}}\n' for n in range(9_000)))
    arguments = ["profile", model, "--data", "d.jsonl", "--max-tokens", "1000000", "--layers", "0"]
    names = [f"{part}.safetensors" for part in (1, 2, 3)]
    for part, name in enumerate(names, start=1):
        code, _, err = run(*arguments, "--shard", f"{part}/3", "-o", name)
        assert code == 0, err
    parts = [HeadProfile.load(name) for name in names]
    assert sum(part.metadata["data"]["sequences"] for part in parts) == 9_000
    assert len({part.metadata["data"]["sequences"] for part in parts}) > 1
    merged = HeadProfile.merge(parts)
    assert int(merged.moments["head_output_norm"].count.max()) == 9_000
    for wrong in ("0/3", "4/3", "1", "1/0", "x/y"):
        code, _, err = run(*arguments, "--shard", wrong)
        assert (code, err) == (
            2,
            f"fastheads: --shard {wrong!r}: expected I/N with I from 1 to N, as in 1/4\n",
        )


@pytest.mark.slow
@pytest.mark.skipif(not torch.distributed.is_available(), reason="this torch has no distributed package")
def test_torchrun_shares_the_data_out(run, here, model):
    arguments = ["profile", model, "--max-tokens", "30000", "--checkpoint-every", "0.05"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    done = subprocess.run(  # noqa: PLW1510
        [*command, "-m", "fastheads", *arguments, "-o", "two.safetensors"],
        **{"capture_output": True, "text": True, "env": environment, "timeout": 120, "check": False},
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("saved two.safetensors") == 1
    assert done.stderr.count("loading") == 1
    assert files(here) == {"text.txt", "two.safetensors"}
    run(*arguments, "-o", "one.safetensors")
    one, two = (HeadProfile.load(f"{name}.safetensors") for name in ("one", "two"))
    assert two.metadata["data"]["processes"] == 2
    assert two.metadata["data"]["tokens"] == 30_000
    for metric in one.metrics:
        for plane, value in one.moments[metric]._asdict().items():
            torch.testing.assert_close(getattr(two.moments[metric], plane), value, rtol=1e-12, atol=0)


def test_of_several_processes_the_first_alone_tries_whether_the_file_can_be_written(
    run, here, model, monkeypatch
):
    monkeypatch.setenv("WORLD_SIZE", "2")
    for rank, says in (
        ("1", "cannot read the data file none.txt"),
        ("0", "cannot write to the folder text.txt: it is a file"),
    ):
        monkeypatch.setenv("RANK", rank)
        code, _, err = run("profile", model, "--data", "none.txt", "-o", "text.txt/p.safetensors")
        assert code == 1
        assert says in err
