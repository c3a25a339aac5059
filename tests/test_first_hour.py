"""The notebook runs from top to bottom, with trainings of one step."""

import json
import re

import pytest

from tests.test_markdown import ROOT

NOTEBOOK = ROOT / "docs" / "guide" / "first_hour.ipynb"


def test_no_output_is_committed():
  cells = json.loads(NOTEBOOK.read_text(encoding="utf-8"))["cells"]
  code = [cell for cell in cells if cell["cell_type"] == "code"]
  assert code and all(not cell["outputs"] and cell["execution_count"] is None for cell in code)


@pytest.mark.slow
def test_every_cell_runs(tmp_path, monkeypatch):
  nbformat = pytest.importorskip("nbformat")
  nbclient = pytest.importorskip("nbclient")
  monkeypatch.setenv("FIRST_HOUR_STEPS", "1")
  monkeypatch.setenv("FIRST_HOUR_RUNS", str(tmp_path))
  notebook = nbformat.read(NOTEBOOK, as_version=4)
  nbclient.NotebookClient(notebook, timeout=600, resources={"metadata": {"path": ROOT}}).execute()
  said = "".join(
    output.get("text", "")
    for cell in notebook.cells
    if cell.cell_type == "code"
    for output in cell.outputs
  )
  # One draw of A: x moves by 1.5 * 3/4, from log 1/3.
  assert "x moved by 1.125, p is 0.507" in said
  path = [float(p) for p in re.search(r"\[(0\.[\d., ]+)\]", said)[1].split(",")]
  assert path == sorted(path) and path[-1] > 0.9
  for name in ("as it is", "no entropy bonus", "groups of two", "learning rate 1e-2"):
    assert re.search(rf"(?m)^{name} +\d\.\d\d", said)
