"""A profile in a notebook that is executed: its display, and its plot."""

import json
import sys

import nbformat
import pytest
from drawn_profiles import made_up
from nbclient import NotebookClient

CELLS = [
    "from fastheads import HeadProfile\nhead_profile = HeadProfile.load('p.safetensors')",
    "head_profile",
    "head_profile.plot()",
    "import matplotlib.pyplot as plt\n"
    "figure, axes = plt.subplots(1, 2)\n"
    "drawn = head_profile.plot('head_output_norm', ax=axes[1], cmap='magma')\n"
    "assert drawn is axes[1] and drawn.images[0].cmap.name == 'magma'",
    "import sys\nprint('torch' in sys.modules, repr(head_profile))",
]


@pytest.fixture(scope="module")
def outputs(tmp_path_factory):
    """The outputs of each cell, by a fresh kernel of this Python."""
    folder = tmp_path_factory.mktemp("notebook")
    made_up(12, 8, kv=2).save(folder / "p.safetensors")
    kernel = folder / "kernels" / "here"
    kernel.mkdir(parents=True)
    command = [sys.executable, "-m", "ipykernel_launcher", "-f", "{connection_file}"]
    about = {"argv": command, "display_name": "this Python", "language": "python"}
    (kernel / "kernel.json").write_text(json.dumps(about))
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(cell) for cell in CELLS])
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("JUPYTER_PATH", str(folder))
        patch.setenv("MPLCONFIGDIR", str(folder))
        patch.delenv("MPLBACKEND", raising=False)
        client = NotebookClient(
            notebook, timeout=120, kernel_name="here", resources={"metadata": {"path": str(folder)}}
        )
        client.execute()
    nbformat.validate(notebook)
    return [cell["outputs"] for cell in notebook["cells"]]


def kinds(outputs):
    return [set(output.get("data", {})) for output in outputs]


def test_the_profile_is_shown_as_its_report_and_as_text(outputs):
    (shown,) = outputs[1]
    assert set(shown["data"]) == {"text/html", "text/plain"}
    assert shown["data"]["text/html"].startswith('<iframe title="attention heads" sandbox="allow-scripts"')
    assert shown["data"]["text/plain"].startswith(
        "HeadProfile(some/model: 12 rows x 8 heads, 40 sequences a head; head_output_norm, "
    )


def test_a_plot_is_shown_in_a_fresh_notebook(outputs):
    assert [kind for kind in kinds(outputs[2]) if "image/png" in kind]
    assert "Axes" in outputs[2][0]["data"]["text/plain"]


def test_a_plot_can_be_part_of_a_figure(outputs):
    assert kinds(outputs[3]) == [{"image/png", "text/plain"}]


def test_none_of_it_needs_torch(outputs):
    assert outputs[4][0]["text"].startswith("False HeadProfile(")
