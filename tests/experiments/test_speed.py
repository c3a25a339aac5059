"""What a step costs: the rates in a run's record are the work that its samples say, by the seconds
that it says; tokens go to the devices once, and metrics come back once.
"""

from __future__ import annotations

import itertools
import json
import re

import jax
import numpy as np
import pytest

from experiments import distill, dpo, grpo, kto, online_dpo, ppo, reinforce, reward_model, sft
from rl_llm.runs.config import replace, volatile
from rl_llm.runs.flops import forward_flops, text_flops, trunk_flops
from rl_llm.runs.metrics import read
from tests.experiments import helpers, once
from tests.experiments.helpers import settings
from tests.representatives import mostly_slow

EXPERIMENTS = [distill, dpo, grpo, kto, online_dpo, ppo, reinforce, reward_model, sft]


@pytest.fixture(autouse=True, scope="module")
def own_programs():
  """What these runs say of the seconds that they compiled is looked at."""
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(once, "PROGRAMS", {})
    yield


def first_step(experiment, workdir, changes):
  """The row of step 0, and its responses in their order."""
  experiment.train(replace(experiment.Config(), {**changes, "steps": 1}), str(workdir))
  row, _ = read(workdir / "metrics.jsonl")
  samples = [row for row in read(workdir / "samples.jsonl") if row["split"] == "train"]
  return row, samples


def work(row):
  """The work itself: the rates times their seconds."""
  return {
    key.removeprefix("speed/").removesuffix("_per_second"): value * row[f"time/{phase}"]
    for key, phase in (
      ("speed/generated_tokens_per_second", "rollout"),
      ("speed/rollout_flops_per_second", "rollout"),
      ("speed/trained_tokens_per_second", "update"),
      ("speed/update_flops_per_second", "update"),
    )
    if (value := row.get(key)) is not None
  }


def groups(samples):
  """(prompt's tokens, rewards, lengths) by problem."""
  return [
    (len(key[1]), [row["reward"] for row in rows], [row["length"] for row in rows])
    for key, rows in (
      (key, list(rows))
      for key, rows in itertools.groupby(samples, lambda row: (row["problem"], row["prompt"]))
    )
  ]


def forward(shape, found):
  return forward_flops(shape, [p for p, _, _ in found], np.concatenate([x for _, _, x in found]))


def trunk(shape, found):
  return trunk_flops(shape, [p for p, _, _ in found], np.concatenate([x for _, _, x in found]))


@pytest.mark.parametrize(
  "experiment, changes",
  [
    (grpo, {"loss.entropy_coef": 0.1, "epochs": 2, "minibatches": 2}),
    pytest.param(reinforce, {"loss.entropy_coef": 0.1}, marks=pytest.mark.slow),
    pytest.param(ppo, {"value.trunk": "own"}, marks=pytest.mark.slow),
    pytest.param(ppo, {"value.trunk": "shared"}, marks=pytest.mark.slow),
    pytest.param(distill, {"teacher": "another", "epochs": 2}, marks=pytest.mark.slow),
  ],
  ids=["grpo", "reinforce", "ppo own", "ppo shared", "distill"],
)
def test_all_responses_are_sampled_once_and_trained_on_in_each_epoch(
  tmp_path, small, files, experiment, changes
):
  row, samples = first_step(experiment, tmp_path / "run", settings(files) | changes)
  found, epochs = groups(samples), changes.get("epochs", 1)
  assert len(found) == 4
  tokens, once = sum(sum(lengths) for _, _, lengths in found), forward(small.config, found)
  tower = trunk(small.config, found) if changes.get("value.trunk") == "own" else 0
  assert work(row) == pytest.approx(
    {
      "generated_tokens": tokens,
      "rollout_flops": once,
      "trained_tokens": epochs * tokens,
      "update_flops": 3 * epochs * (once + tower),
    }
  )
  assert row["speed/mfu"] * row["speed/peak_flops"] == pytest.approx(
    row["speed/update_flops_per_second"]
  )
  assert row["speed/peak_measured"] is True
  assert 0 < row["speed/compile_seconds"] < row["time/step"]


@pytest.mark.parametrize("experiment", mostly_slow([grpo, reinforce], quick=[0]))
def test_groups_that_teach_nothing_and_responses_without_a_reward_are_not_trained_on(
  tmp_path, small, files, experiment
):
  changes = {"jsonl.reward_function": "spread_for_some"}
  row, samples = first_step(experiment, tmp_path / "some", settings(files) | changes)
  spread = [group for group in groups(samples) if len(set(group[1])) > 1]
  assert 0 < len(spread) < 4
  assert work(row)["trained_tokens"] == pytest.approx(sum(sum(x) for _, _, x in spread))
  assert work(row)["update_flops"] == pytest.approx(3 * forward(small.config, spread))

  changes = {"jsonl.reward_function": "lonely", "loss.entropy_coef": 0.1}
  row, samples = first_step(experiment, tmp_path / "lonely", settings(files) | changes)
  graded = [
    (prompt, rewards, [x * (r is not None) for x, r in zip(lengths, rewards, strict=True)])
    for prompt, rewards, lengths in groups(samples)
  ]
  trained = sum(sum(x) for _, _, x in graded)
  assert 0 < trained < work(row)["generated_tokens"]
  assert work(row)["trained_tokens"] == pytest.approx(trained)
  assert work(row)["update_flops"] == pytest.approx(3 * forward(small.config, graded))


def given(experiment, tmp_path):
  """Settings of a run on texts that are all of one length: 3 tokens, then 5 and the end's."""
  path = tmp_path / "data.jsonl"
  # No letter that Chatty takes for an end: such a text would be taken for one that has its own.
  answers = {"chosen": "c" * 5, "rejected": "s" * 5}
  if experiment is sft:
    answers = {"completion": "c" * 5}
  rows = [{"prompt": f"{chr(97 + n)}??"} | answers for n in range(20)]
  path.write_text("".join(json.dumps(row) + "\n" for row in rows))
  found = {"model": "tiny", "data": str(path), "prompt_format": "plain", "held_out_fraction": 0.2}
  if experiment is sft:
    return found | {"task": "none", "examples_per_step": 8, "microbatch_rows": 4}
  found |= {"pairs_per_step": 4, "microbatch_pairs": 2}
  return found | ({"task": "none"} if experiment is dpo else {})


@pytest.mark.parametrize(
  ("experiment", "changes"),
  mostly_slow(
    itertools.product([sft, dpo, reward_model], [{}, {"packing": 64}, {"lora.rank": 2}]), quick=[4]
  ),
)
def test_whole_texts_are_read_once_and_their_answers_trained_on(
  tmp_path, small, experiment, changes
):
  config = given(experiment, tmp_path) | changes | {"max_tokens": 16}
  row, _ = first_step(experiment, tmp_path / "run", config)
  predicted = 0 if experiment is reward_model else 8 * 6
  assert work(row) == pytest.approx(
    {
      "trained_tokens": 8 * 6,
      "update_flops": (2 if "lora.rank" in changes else 3)
      * text_flops(small.config, [3 + 6] * 8, predicted=predicted),
    }
  )


def test_pairs_of_the_models_own_answers_are_sampled_first(tmp_path, small, files):
  changes = settings(files)
  changes["pairs_per_step"] = changes.pop("prompts_per_step")
  changes["microbatch_pairs"] = changes.pop("microbatch_prompts")
  row, samples = first_step(dpo, tmp_path / "run", changes)
  found = groups(samples)
  chosen = [
    (prompt, length)
    for prompt, rewards, lengths in found
    for which in (max, min)
    for length in [lengths[rewards.index(which(rewards))]]
    if max(rewards) > min(rewards)
  ]
  trained = sum(length for _, length in chosen)
  assert len(chosen) == 2 * row["pairs"] > 0
  assert work(row) == pytest.approx(
    {
      "generated_tokens": sum(sum(lengths) for _, _, lengths in found),
      "rollout_flops": forward(small.config, found),
      "trained_tokens": trained,
      "update_flops": 3 * text_flops(small.config, [p + n for p, n in chosen], predicted=trained),
    }
  )


@pytest.mark.slow
def test_both_answers_of_a_duel_are_sampled_and_trained_on(tmp_path, small, files, monkeypatch):
  drawn = []

  def wrap(sample):
    def noting(state, step, clock):
      drawn.append(sample(state, step, clock))
      return drawn[-1]

    return noting

  helpers.wrap_seams(monkeypatch, sample=wrap)
  row, samples = first_step(online_dpo, tmp_path / "run", settings(files))
  own, other = groups(samples), drawn[0].other.rollout.mask.sum(axis=1).reshape(4, 4)
  # The update reads a prompt once for both sides; each side's sampling reads it too.
  sides = own, [(p, r, list(n)) for (p, r, _), n in zip(own, other, strict=True)]
  both = [(p, r, [*one, *two]) for (p, r, one), (_, _, two) in zip(*sides, strict=True)]
  tokens = sum(sum(x) for _, _, x in both)
  assert tokens > sum(sum(x) for _, _, x in own)
  assert work(row) == pytest.approx(
    {
      "generated_tokens": tokens,
      "rollout_flops": sum(forward(small.config, side) for side in sides),
      "trained_tokens": tokens,
      "update_flops": 3 * forward(small.config, both),
    }
  )


# Four updates in each of two steps, with all that is compared with.
UPDATES = {"epochs": 2, "minibatches": 2, "microbatch_prompts": 1}
MANY = UPDATES | {"kl.coef": 0.1}
SAMPLING = {
  "grpo": (grpo, MANY),
  "reinforce": (reinforce, MANY | {"loss.name": "ppo_loss"}),
  "ppo": (ppo, MANY | {"kl.controller": "adaptive"}),
  "distill": (distill, UPDATES | {"teacher": "another", "eval.every": 0}),
}
NAMES = ["grpo", *(pytest.param(x, marks=pytest.mark.slow) for x in list(SAMPLING)[1:])]


@pytest.mark.parametrize("name", NAMES)
def test_the_tokens_of_a_rollout_go_to_the_devices_once_a_step(tmp_path, small, files, capfd, name):
  """Every transfer, asked for or implied by a call, leaves a line that says what it moves."""
  experiment, changes = SAMPLING[name]
  with jax.transfer_guard_host_to_device("log_explicit"):
    helpers.run(experiment, tmp_path, settings(files, **changes))
  said = capfd.readouterr().err
  moved = re.findall(r"host-to-device transfer: aval=ShapedArray\((\w+\[[\d,]*\])", said)
  assert moved.count("int32[16,8]") == 2  # 16 responses of up to 8 tokens, in two steps
  assert moved.count("float32[16,8]") == 2  # the sampler's log-probs


class Unread:
  """A metric that is added to others, and fails whoever looks at it."""

  def __init__(self, value):
    self.value = value

  def __add__(self, other):
    return Unread(self.value + (other.value if isinstance(other, Unread) else other))

  __radd__ = __add__

  def __getattr__(self, name):
    raise AssertionError(f"{name} of a metric was read while updates were made")


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_metrics_stay_on_the_devices_until_all_updates_are_made_and_are_fetched_once(
  tmp_path, small, files, monkeypatch, name
):
  experiment, changes = SAMPLING[name]
  updates, fetched, original = [], [], jax.device_get

  def wrap_update(update):
    def update_unread(*args):
      state, found = update(*args)
      updates.append(found)
      return state, jax.tree.map(Unread, found)

    return update_unread

  def wrap_learn(learn):
    def learn_unread(state, drawn, step, clock):
      state, learned = learn(state, drawn, step, clock)
      metrics = {
        name: jax.tree.map(lambda x: x.value if isinstance(x, Unread) else x, metric)
        for name, metric in learned.metrics.items()
      }
      assert all(isinstance(x, jax.Array) for key in updates[-1] for x in metrics.get(key, ()))
      assert len(fetched) == step
      return state, learned._replace(metrics=metrics)

    return learn_unread

  def device_get(tree):
    if isinstance(tree, dict) and "grad_norm" in tree:
      fetched.append(tree)
    return original(tree)

  helpers.wrap_updates(monkeypatch, experiment, wrap_update)
  helpers.wrap_seams(monkeypatch, learn=wrap_learn)
  monkeypatch.setattr(jax, "device_get", device_get)
  found = helpers.run(experiment, tmp_path, settings(files, **changes))
  assert len(updates) == 2 * 4 * (2 if experiment is ppo else 1)
  assert len(fetched) == 2
  assert all(row["grad_norm"] > 0 for row in found.metrics[:2])


@pytest.mark.parametrize("experiment", EXPERIMENTS)
def test_a_run_may_go_on_with_another_profile(experiment):
  config = experiment.Config()
  assert config.run.profile == 0 and "profile" in volatile(config)


@pytest.mark.slow
def test_a_trace_is_written_and_changes_nothing(tmp_path, small, capsys):
  config = given(sft, tmp_path) | {"max_tokens": 16, "steps": 3}
  rows = []
  for profile in (0, 1):
    workdir = tmp_path / str(profile)
    sft.train(replace(sft.Config(), config | {"profile": profile}), str(workdir))
    rows.append([row["loss"] for row in read(workdir / "metrics.jsonl")[:-1]])
    assert (workdir / "profile").exists() == bool(profile)
  assert rows[0] == rows[1]
  assert "trace of step 1: open" in capsys.readouterr().out
  sft.train(replace(sft.Config(), config | {"profile": 5, "steps": 4}), str(workdir))
  assert "begins with the second step of a start" in capsys.readouterr().out
