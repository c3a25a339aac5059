"""A run's result and metrics, as a notebook reads them."""

from __future__ import annotations

import numpy as np
import pytest

from rl_llm.errors import UserError
from rl_llm.runs import reading
from rl_llm.runs.metrics import MetricsWriter
from rl_llm.runs.run_directory import write_result


def test_metrics_are_arrays_of_what_was_written(tmp_path):
  rows = [{"loss": 0.5, "kl": float("inf"), "ok": True}, {"loss": 0.25, "failure": "why"}]
  with MetricsWriter(tmp_path / "metrics.jsonl") as writer:
    for step, row in enumerate(rows):
      writer.write(step, row)
  with open(tmp_path / "metrics.jsonl", "a") as file:
    file.write('{"step": 2, "loss"')  # The run is writing it.
  found = reading.metrics(tmp_path)
  assert found.keys() == {"step", "loss", "kl", "ok"}
  assert found["step"].dtype == np.int64 and found["step"].tolist() == [0, 1]
  assert found["loss"].dtype == np.float64 and found["loss"].tolist() == [0.5, 0.25]
  assert found["kl"][0] == np.inf and np.isnan(found["kl"][1]) and found["ok"][0] == 1


def test_a_result_is_that_of_a_finished_run(tmp_path):
  with pytest.raises(UserError, match="no result.json: no run has finished there"):
    reading.result(tmp_path)
  write_result(tmp_path, {"steps": 3})
  assert reading.result(tmp_path) == {"steps": 3}
