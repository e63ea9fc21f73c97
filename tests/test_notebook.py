"""The notebook runs from its first cell to its last, in a kernel of its own, on a tiny model and data."""

from __future__ import annotations

from pathlib import Path

import nbclient
import nbformat
import pytest

from peft_autoqra import BitRankPlan
from tests.conftest import TinyLlamaFactory
from tests.tiny_folder import make_tiny_folder

REPOSITORY = Path(__file__).parent.parent
NOTEBOOK = REPOSITORY / "examples" / "quickstart.ipynb"


@pytest.fixture
def notebook() -> nbformat.NotebookNode:
    return nbformat.read(NOTEBOOK, as_version=4)


def test_saved_without_outputs(notebook: nbformat.NotebookNode) -> None:
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert [cell.outputs for cell in code] == [[]] * len(code)
    assert {cell.execution_count for cell in code} == {None}


def insert_parameters(notebook: nbformat.NotebookNode, values: dict[str, object]) -> None:
    """After the cell of the parameters, each of which has to be there, as papermill does."""
    (position,) = [i for i, cell in enumerate(notebook.cells) if "parameters" in cell.metadata.get("tags", ())]
    defaults: dict[str, object] = {}
    exec(notebook.cells[position].source, defaults)
    assert values.keys() <= defaults.keys()
    source = "\n".join(f"{name} = {value!r}" for name, value in values.items())
    notebook.cells.insert(position + 1, nbformat.v4.new_code_cell(source))


def test_runs(
    notebook: nbformat.NotebookNode,
    tiny_llama: TinyLlamaFactory,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    tiny = make_tiny_folder(tmp_path / "tiny", tiny_llama())
    monkeypatch.setenv("PYTHONPATH", str(REPOSITORY))
    for variable in ("IPYTHONDIR", "JUPYTER_RUNTIME_DIR", "HF_DATASETS_CACHE"):
        monkeypatch.setenv(variable, str(tmp_path / variable.lower()))
    values = {
        "model_id": str(tiny.model),
        "data_file": str(tiny.data / "train.jsonl"),
        "max_steps": 2,
        "max_length": 16,
        "bit_choices": [2, 4, 8],
        "rank_choices": [0, 4],
        "max_cost": 1000.0,
        "max_trials": 6,
    }
    insert_parameters(notebook, values)
    client = nbclient.NotebookClient(notebook, timeout=120, resources={"metadata": {"path": str(tmp_path)}})
    client.execute()
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", ())]
    printed = "".join(output.text for output in outputs if output.get("name") == "stdout")
    assert "stored" in printed
    assert "winner" in printed
    assert "held-out loss" in printed
    assert any("image/png" in output.get("data", {}) for output in outputs)
    plan = BitRankPlan.from_pretrained(tmp_path / "search-out" / "plan")
    assert BitRankPlan.from_pretrained(tmp_path / "search-out" / "adapter") == plan.replace(initialization="zero")
