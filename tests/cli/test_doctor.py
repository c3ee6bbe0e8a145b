"""`fastheads doctor`: what it shows of a model, and one line for what is wrong."""

import families
import pytest
import torch
from checkpoints import save_checkpoint
from tiny_models import acts_as, build
from transformers.modeling_utils import AttentionInterface

from fastheads.capture.verify import EXACT, UNSEEN, VerificationError
from fastheads.cli.commands import main
from fastheads.cli.doctor import diagnose

SEEN = EXACT if hasattr(AttentionInterface, "get_interface") else UNSEEN


@pytest.fixture
def doctor(capsys, monkeypatch):
    """Run the command: (exit status, stdout, stderr less what is said of loading)."""

    def doctor(*arguments):
        capsys.readouterr()
        with pytest.raises(SystemExit) as exit_:
            main(["doctor", *map(str, arguments)])
        said = capsys.readouterr()
        return (
            exit_.value.code,
            said.out,
            [line for line in said.err.splitlines() if not line.startswith("loading")],
        )

    monkeypatch.delenv("COLUMNS", raising=False)
    return doctor


def rows(out):
    """The cells of the table's rows."""
    return [line.split() for line in out.splitlines() if " factored " in line]


def test_a_sound_model(doctor, tmp_path):
    code, out, err = doctor(save_checkpoint(tmp_path))
    assert (code, err) == (0, [])
    assert out.startswith("LlamaForCausalLM: 3 sites, 12 heads\nmodel.layers.*.self_attn.o_proj")
    (row,) = rows(out)
    layers, heads, head_dim, kind, dtype, device, backend, error, geometry = row
    assert (layers, heads, head_dim) == ("0-2", "4", "8")
    assert (kind, dtype, device, backend, geometry) == ("Linear", "float32", "cpu", "factored", SEEN)
    assert 0 < float(error) < 1e-5
    assert f"fastheads profile {tmp_path}" in out


def test_options(doctor, tmp_path):
    code, out, _ = doctor(save_checkpoint(tmp_path), "--backend", "loop", "--dtype", "bfloat16")
    assert code == 0 and " bfloat16 " in out and " loop " in out
    code, out, err = doctor(tmp_path, "--backend", "slow")
    assert (code, out) == (2, "") and err[0].startswith("fastheads: unknown backend 'slow'")


@pytest.mark.filterwarnings("ignore")
def test_ragged_heads_and_what_is_included(doctor, tmp_path):
    families.build("gemma3").save_pretrained(tmp_path / "gemma3")
    families.build("qwen3_next").save_pretrained(tmp_path / "qwen")
    code, out, _ = doctor(tmp_path / "qwen", "--include", "*.linear_attn")
    assert code == 0
    assert [row[:3] for row in rows(out)] == [["0,2", "4", "16"], ["1,3", "4", "24"]]
    code, out, err = doctor(tmp_path / "qwen", "--include", "*.vision")
    assert (code, out, len(err)) == (1, "", 1) and "'*.vision'" in err[0]
    code, out, err = doctor(tmp_path / "gemma3", "--include", "*.vision_tower.*")
    assert code == 1 and "did not run in every forward" in err[-1] and len(err) == 1
    assert [row[:3] for row in rows(out)] == [["0-3", "4", "16"], ["0-3", "4", "24"]]


def test_profile_takes_include_too(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "text.txt").write_text("a text")
    arguments = ["profile", str(save_checkpoint(tmp_path / "model")), "--data", "text.txt"]
    for pattern, code in (("*.self_attn", 0), ("*.vision", 1)):
        with pytest.raises(SystemExit) as exit_:
            main([*arguments, "--include", pattern])
        assert exit_.value.code == code
    assert "matches include='*.vision'" in capsys.readouterr().err.splitlines()[-1]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("family", "said"), [("mamba", "no softmax attention"), ("xlnet", "no module")])
def test_a_model_that_cannot_be_profiled(doctor, tmp_path, family, said):
    families.build(family).save_pretrained(tmp_path)
    code, out, err = doctor(tmp_path)
    assert (code, out, len(err)) == (1, "", 1)
    assert err[0].startswith("fastheads: ") and said in err[0]


def test_a_weight_that_cannot_be_had_is_shown_in_its_place():
    model = build()
    model.model.layers[1].self_attn.o_proj.to("meta")
    found, problem = diagnose(model)
    assert "layers.1.self_attn.o_proj" in str(problem)
    assert [d.backend for d in found] == ["factored", "-", "factored"]


def test_a_model_that_fails_its_check(monkeypatch):
    model = build()
    projection = model.model.layers[1].self_attn.o_proj
    acts_as(monkeypatch, projection, lambda x: torch.nn.functional.linear(x, 2 * projection.weight))
    found, problem = diagnose(model)
    assert isinstance(problem, VerificationError) and "layers.1" in str(problem)
    assert [d.finding is None for d in found] == [False, True, True]


def test_a_model_that_cannot_run():
    model = build()
    model.model.layers[2].forward = lambda *_, **__: 1 / 0
    found, problem = diagnose(model)
    assert isinstance(problem, ZeroDivisionError) and len(found) == 3
