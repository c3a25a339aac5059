"""A notebook next to the clone trains with a function of its own and shows the report."""

from __future__ import annotations

import json

import pytest

pytestmark = pytest.mark.slow

CELLS = (
  "from experiments import grpo\nfrom rl_llm.runs import reading",
  '''def reward(prompts, completions, answer, **columns):
  """The share of right letters, in their places."""
  pairs = zip(completions, answer)
  return [sum(a == b for a, b in zip(said, right)) / len(right) for said, right in pairs]''',
  """small = dict(prompts_per_step=8, responses_per_prompt=4, microbatch_prompts=8, steps=2)
config = grpo.Config(model="tiny", task="copy", reward=reward, **small)
result = grpo.train(config, "runs/mine")
result["steps"]""",
  'reading.metrics("runs/mine")["reward_mean"].tolist()',
  'from IPython.display import HTML\nHTML(filename="runs/mine/report.html")',
)


def test_a_notebook_trains_with_its_own_reward_and_shows_the_report(tmp_path):
  nbformat, nbclient = pytest.importorskip("nbformat"), pytest.importorskip("nbclient")
  notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(text) for text in CELLS])
  where = {"metadata": {"path": tmp_path}}
  client = nbclient.NotebookClient(notebook, timeout=900, resources=where)
  client.execute()
  _, _, trained, figures, shown = (cell.outputs for cell in notebook.cells)
  progress = "".join(output.get("text", "") for output in trained)
  assert "rewards come from a function in this process" in progress
  # One line that is replaced, not one for each step.
  (bar,) = [output["data"]["text/html"] for output in trained if "<progress" in str(output)]
  assert "step 1/2 reward" in bar and 'value="0.5000"' in bar and "step 0/2" not in progress
  assert trained[-1]["data"]["text/plain"] == "2"
  rows = [json.loads(line) for line in (tmp_path / "runs/mine/metrics.jsonl").open()]
  rewards = json.loads(figures[-1]["data"]["text/plain"].replace("nan", "NaN"))
  assert rewards[:2] == [row["reward_mean"] for row in rows[:2]] and max(rewards[:2]) <= 1
  assert "<svg" in shown[-1]["data"]["text/html"]
  recorded = json.loads((tmp_path / "runs/mine/config.json").read_text())
  assert recorded["reward"].startswith("python:__main__.reward@")
