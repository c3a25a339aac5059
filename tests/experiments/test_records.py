"""What runs record, held to what they recorded: every key and its type, every leaf, first values.

Reports, sweeps and people's own scripts read metrics.jsonl and samples.jsonl by the names of their
keys, and a checkpoint is resumed by the paths of its leaves. So none may go or change its type
unnoticed, and a new key is listed in ADDED. goldens/records.json was written at commit 10a5d9f:

  python -m tests.experiments.test_records

The values are compared too, as long as the responses are those of the golden: another processor
rounds differently, and now and then another token is drawn.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import pytest

from experiments import dpo, grpo, ppo, reinforce, reward_model, sft
from rl_llm.runs.metrics import read
from tests.experiments.helpers import run, settings, write_examples
from tests.representatives import mostly_slow

GOLDENS = Path(__file__).parent / "goldens" / "records.json"
WRITING = "RL_LLM_WRITE_RECORDS"  # A variable of the environment: write the goldens.

# Keys that came after the goldens, by file.
ADDED = {
  "metrics.jsonl": {
    "rewards_unreadable",
    "timed_out_fraction",
    "eval/no_opinion",
    "eval/timed_out_fraction",
    "eval/unreadable",
    "data_rows",
  },
  "samples.jsonl": set(),
}

# Adam divides by the root of a mean square plus eps: with the usual one a gradient near 0 that is
# rounded differently would move the weights by a whole step.
STEADY = {"optimizer.eps": 1e-2, "optimizer.learning_rate": 0.01}


def sampling(files, **changes):
  return settings(files) | STEADY | {"kl.coef": 0.1} | changes


def on_policy(files, **changes):
  base = settings(files) | STEADY
  base["pairs_per_step"] = base.pop("prompts_per_step")
  base["microbatch_pairs"] = base.pop("microbatch_prompts")
  return base | changes


def on_file(path, **changes):
  common = {"model": "tiny", "data": str(path), "prompt_format": "plain", "steps": 2}
  return common | STEADY | {"held_out_fraction": 0.3} | changes


RUNS = {
  "grpo": lambda files, data: (grpo, sampling(files, epochs=2)),
  "grpo, adapters": lambda files, data: (grpo, sampling(files, **{"lora.rank": 2, "kl.coef": 0})),
  "reinforce": lambda files, data: (
    reinforce,
    sampling(files, **{"advantage.name": "moving_average"}),
  ),
  "ppo": lambda files, data: (ppo, sampling(files, **{"kl.controller": "adaptive"})),
  "ppo, shared trunk": lambda files, data: (
    ppo,
    sampling(files, minibatches=1, **{"value.trunk": "shared"}),
  ),
  "dpo": lambda files, data: (
    dpo,
    on_file(data / "pairs.jsonl", task="none", pairs_per_step=4, microbatch_pairs=2),
  ),
  "dpo, on policy": lambda files, data: (dpo, on_policy(files)),
  "sft": lambda files, data: (
    sft,
    on_file(
      data / "demonstrations.jsonl",
      task="copy",
      packing=16,
      max_tokens=16,
      examples_per_step=4,
      microbatch_rows=2,
      **{"eval.problems": 1, "eval.samples": 3},
    ),
  ),
  "reward_model": lambda files, data: (
    reward_model,
    on_file(data / "pairs.jsonl", pairs_per_step=4, microbatch_pairs=2),
  ),
}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
  """Files of preference pairs and of demonstrations, ragged."""
  return write_examples(tmp_path_factory.mktemp("data"), count=40)


def types(rows):
  """{key: the types of its values}, as in "float null"."""
  found = {}
  for row in rows:
    for key, value in row.items():
      found.setdefault(key, set()).add("null" if value is None else type(value).__name__)
  return {key: " ".join(sorted(names)) for key, names in sorted(found.items())}


def described(workdir, outcome):
  """What a golden holds of a run; its keys are the parts that are compared."""
  metrics, samples = read(workdir / "metrics.jsonl"), read(workdir / "samples.jsonl")
  by_kind = {}
  for row in samples:
    by_kind.setdefault(f"{row['split']}, step {row['step']}", []).append(row)
  return {
    "metrics.jsonl": {f"step {row['step']}": types([row]) for row in metrics},
    "samples.jsonl": {kind: types(rows) for kind, rows in by_kind.items()},
    "state": {path: f"{x.dtype}{list(x.shape)}" for path, x in sorted(outcome.state.items())},
    "texts of step 0": [row["response"] for row in samples if row["step"] == 0],
    "values of step 0": {key: outcome.metrics[0][key] for key in sorted(outcome.metrics[0])},
    "later texts": [row["response"] for row in samples if row["step"] > 0],
    "later values": [dict(sorted(row.items())) for row in outcome.metrics[1:]],
  }


QUICK = ("grpo", "ppo", "dpo", "sft")  # One of each kind of script.


@pytest.mark.parametrize(
  "name", mostly_slow(RUNS, quick=[i for i, name in enumerate(RUNS) if name in QUICK])
)
def test_a_record_is_what_it_was(name, tmp_path, small, files, data):
  experiment, changes = RUNS[name](files, data)
  found = described(tmp_path, run(experiment, tmp_path, changes))
  if os.environ.get(WRITING):
    known = json.loads(GOLDENS.read_text()) if GOLDENS.exists() else {}
    GOLDENS.write_text(json.dumps(known | {name: found}, indent=1) + "\n")
    return
  wanted = json.loads(GOLDENS.read_text())[name]
  for file, added in ADDED.items():
    assert found[file].keys() == wanted[file].keys(), file
    for where, keys in wanted[file].items():
      ours = found[file][where]
      assert {key: ours.get(key) for key in keys} == keys, (file, where)
      assert ours.keys() - keys.keys() <= added, (file, where)
  assert found["state"] == wanted["state"]
  texts = "texts of step 0"
  if found[texts] != wanted[texts]:
    pytest.skip("names and types are right; the values are not compared: another token was drawn")
  # Before DPO's first update policy and reference are equal: rounding decides the better answer.
  tied = ("pair_accuracy", "eval/pair_a", "eval/pair_l", "eval/pair_h") if "dpo" in name else ()
  # Of responses that are not on record an evaluation says how many were right, and no more.
  for key, value in wanted["values of step 0"].items():
    if not key.startswith(tied) and not (found[texts] and key.startswith("eval/sampled")):
      assert found["values of step 0"][key] == pytest.approx(value, rel=1e-5, abs=1e-6), key
  if found["later texts"] != wanted["later texts"]:
    pytest.skip("step 0 is right; later values are not compared: another token was drawn")
  for ours, theirs in zip(found["later values"], wanted["later values"], strict=True):
    for key, value in theirs.items():
      if not key.startswith("eval/sampled") and key in ours:
        assert ours[key] == pytest.approx(value, rel=1e-5, abs=1e-6), (key, theirs["step"])


def write_goldens():
  """Runs the runs, and writes what they leave instead of comparing it."""
  os.environ[WRITING] = "1"
  GOLDENS.parent.mkdir(exist_ok=True)
  GOLDENS.unlink(missing_ok=True)
  return pytest.main([__file__, "-q", "-p", "no:cacheprovider", "-p", "no:xdist"])


if __name__ == "__main__":
  sys.exit(write_goldens())
