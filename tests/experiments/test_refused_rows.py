"""Rows that cannot be used are refused with their file and line before a model is loaded."""

from __future__ import annotations

import json

import pytest

from experiments import (
  distill,
  dpo,
  evaluate,
  grpo,
  kto,
  make_preferences,
  online_dpo,
  ppo,
  reinforce,
  reward_model,
  sft,
)
from rl_llm.data import DataError
from rl_llm.runs.config import replace

ASKED, ANSWERED = {"role": "user", "content": "2+2?"}, {"role": "assistant", "content": "4"}
OTHER = {"role": "assistant", "content": "5"}
GOOD = {
  "task": {"prompt": [ASKED], "answer": "4"},
  "pairs": {"prompt": [ASKED], "chosen": [ANSWERED], "rejected": [OTHER]},
  "answers": {"prompt": [ASKED], "completion": [ANSWERED]},
}
# What is wrong with the prompt of a second row, in all three.
PROMPTS = {
  "ends with the assistant's message": [ASKED, ANSWERED],
  "holds an empty message of 'user'": [{"role": "user", "content": ""}],
  "gives a turn the weight 1": [ASKED, ANSWERED | {"weight": 1}, ASKED],
}


@pytest.mark.parametrize("said", PROMPTS)
@pytest.mark.parametrize(
  ("experiment", "kind"),
  [
    *[(script, "task") for script in (distill, grpo, online_dpo, ppo, reinforce)],
    *[(script, "task") for script in (evaluate, make_preferences)],
    (dpo, "pairs"), (reward_model, "pairs"), (sft, "answers"), (kto, "pairs"),
  ],
)  # fmt: skip
def test_a_prompt_that_cannot_be_asked(tmp_path, monkeypatch, experiment, kind, said):
  monkeypatch.setattr("rl_llm.policy.load.load_model", None)
  file = tmp_path / "rows.jsonl"
  rows = [GOOD[kind], GOOD[kind] | {"prompt": PROMPTS[said]}]
  file.write_text("".join(json.dumps(row) + "\n" for row in rows))
  changes = {"model": "tiny", "data": str(file), "task": "none"}
  if kind == "task":
    changes = {"model": "tiny", "task": f"jsonl:{file}", "jsonl.reward_function": "gsm8k"}
  if experiment is reward_model:
    del changes["task"]
  if experiment is distill:
    changes["teacher"] = "tiny"
  config = replace(experiment.Config(), changes)
  names = ("train", "measure", "make")
  start = next(getattr(experiment, name) for name in names if hasattr(experiment, name))
  with pytest.raises(DataError, match=f"rows.jsonl:2: 'prompt' {said}"):
    start(config, str(tmp_path / "run"))
