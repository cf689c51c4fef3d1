"""The quick start in Python runs from top to bottom in a real kernel, learns and generates."""

import re
from pathlib import Path
from typing import Any

import nbclient
import nbformat
import pytest

NOTEBOOK = Path(__file__).parents[3] / "examples" / "quickstart.ipynb"


def _code_cells(notebook: Any) -> list[Any]:
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def test_the_notebook_is_kept_without_outputs() -> None:
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    nbformat.validate(notebook)
    assert all(cell.execution_count is None and not cell.outputs for cell in _code_cells(notebook))


@pytest.mark.filterwarnings("default")  # the kernel's client has deprecations of its own
def test_the_notebook_prepares_data_trains_draws_and_generates(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TMPDIR", str(tmp_path))  # where the notebook writes
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    where = {"metadata": {"path": str(NOTEBOOK.parent)}}
    nbclient.NotebookClient(notebook, timeout=240, kernel_name="python3", resources=where).execute()
    *_, training, picture, generation = [cell.outputs for cell in _code_cells(notebook)]
    printed = "".join(output.get("text", "") for output in training)
    first, *_, last = [float(loss) for loss in re.findall(r"^step .* lm loss ([\d.]+)", printed, re.M)]
    assert last < first - 0.5
    assert training[-1]["data"]["text/plain"] == "0", "the exit code"
    assert picture[-1]["data"]["image/svg+xml"].count("lm loss validation") >= 1
    text = "".join(output.get("text", "") for output in generation)
    assert text.startswith("The function returns") and len(text) > len("The function returns") + 16
