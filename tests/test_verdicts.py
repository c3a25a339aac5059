"""What a record says: each known fault gets its sentence, and a run that goes well gets none."""

import doctest
import math
import random
import re

import pytest

from rl_llm.runs import evidence
from rl_llm.runs import verdicts as verdicts_lib
from rl_llm.runs.verdicts import verdicts

CONFIG = {
  "steps": 60,
  "task": "jsonl:train.jsonl",
  "jsonl.reward_file": "mine.py",
  "responses_per_prompt": 8,
  "max_new_tokens": 16,
  "optimizer.learning_rate": 1e-5,
  "optimizer.max_grad_norm": 1.0,
  "loss.entropy_coef": 0.0,
  "kl.coef": 0.0,
  "reward_deadline": 5.0,
  "epochs": 4,
  "sampling.temperature": 1.0,
}


def record(steps=60, *, accuracy=lambda share: 0.2 + 0.7 * share, **changed):
  """A run that learns; `changed` has key=value, or key=function of the share of steps done."""
  rng = random.Random(0)
  rows = []
  for step in range(steps):
    share = step / (steps - 1)
    right = accuracy(share)
    row = {
      "reward_mean": right + rng.gauss(0, 0.03),
      "accuracy": min(1.0, max(0.0, right + rng.gauss(0, 0.03))),
      "entropy": 1.2 * (1 - 0.8 * share),
      "frac_zero_std": 0.3 + 0.3 * share,
      "truncated_fraction": 0.3 * (1 - share),
      "grad_norm": 1 + abs(rng.gauss(0, 0.3)),
      "approx_kl": 1e-3,
      "kl_ref": 0.2 * share,
      "loss": rng.gauss(0, 0.02),
      "updates_skipped": 0,
      "rewards_ok": 128,
    }
    if step % 15 == 0:
      held_out = {"low": right - 0.05, "accuracy": right, "high": right + 0.05}
      row |= {f"eval/sampled_{end}": value for end, value in held_out.items()}
    row |= {key: value(share) if callable(value) else value for key, value in changed.items()}
    rows.append({"step": step} | row)
  return rows


def flat(share):
  return 0.2


def few(share):
  return 0.03


FAULTS = {
  "not_finite": (record(updates_skipped=lambda s: int(40 * s)), "--optimizer.learning_rate=1e-6"),
  "grader_failed": (record(rewards_raised=32), "--jsonl.reward_file=mine.py"),
  "never_rewarded": (
    record(reward_mean=0.0, accuracy=flat, frac_zero_std=1.0),
    "--responses_per_prompt=16",
  ),
  "always_rewarded": (record(reward_mean=1.0, frac_zero_std=1.0), "--jsonl.reward_file=mine.py"),
  "first_updates": (
    record(
      accuracy=lambda s: 0.4 if s < 0.03 else 0.1, entropy=lambda s: 1.2 if s < 0.03 else 0.001
    ),
    "--optimizer.learning_rate=1e-6",
  ),
  "cut_short": (record(accuracy=few, truncated_fraction=0.9), "--max_new_tokens=32"),
  "entropy_gone": (
    record(accuracy=flat, entropy=lambda s: 1.2 * math.exp(-12 * s)),
    "--loss.entropy_coef=0.01",
  ),
  "groups_agree": (
    record(accuracy=flat, frac_zero_std=lambda s: 0.4 if s < 0.5 else 0.97),
    "--responses_per_prompt=16",
  ),
  "overlooked": (record(accuracy=flat, reward_mean=lambda s: 0.2 + min(s, 0.5)), "--kl.coef=0.05"),
  "unmoved": (record(accuracy=flat), "--optimizer.learning_rate=0.0001"),
  "exploding": (
    record(grad_norm=lambda s: math.exp(8 * s), accuracy=lambda s: 0.2 + 0.2 * s),
    "--optimizer.learning_rate=1e-6",
  ),
  "step_kl": (record(approx_kl=0.5, accuracy=lambda s: 0.2 + 0.2 * s), "--epochs"),
  "far": (
    record(kl_ref=lambda s: 4 * s, accuracy=lambda s: 0.2 + 0.2 * min(s, 0.5)),
    "--kl.coef=0.05",
  ),
}


@pytest.mark.parametrize("name", FAULTS)
def test_each_fault_gets_its_sentence_and_a_flag(name):
  rows, flag = FAULTS[name]
  found = verdicts(rows, CONFIG)
  assert [verdict.name for verdict in found] == [name]
  assert flag in found[0].advice
  assert found[0].says.endswith(".") and not found[0].says[0].islower()


def test_a_run_that_goes_well_gets_none_at_any_step():
  rows = record()
  for count in range(1, len(rows) + 1):
    assert verdicts(rows[:count], CONFIG) == []


@pytest.mark.parametrize(
  "changed",
  [
    {"frac_zero_std": lambda s: 0.3 + 0.7 * s},
    {"entropy": lambda s: 1.2 * math.exp(-12 * s)},
    {"truncated_fraction": 0.9},  # The grader reads an answer that never ends.
    {"kl_ref": lambda s: 4 * s},
    {"approx_kl": 0.5},
  ],
)
def test_what_follows_from_success_is_no_fault(changed):
  """Groups agree also where all responses are right."""
  rows = record(accuracy=lambda s: min(1.0, 0.2 + 1.2 * s), **changed)
  assert verdicts(rows, CONFIG) == []


def test_the_bonus_that_outweighs_the_reward():
  """3 x 1.2 nats = 3.6 is over the advantages' scale, 1; 0.1 x 1.2 = 0.12 is not."""
  rows = record(accuracy=flat, entropy=1.2)
  (found,) = verdicts(rows, CONFIG | {"loss.entropy_coef": 3.0})
  assert found.name == "bonus_outweighs" and found.advice == "Try --loss.entropy_coef=0.1"
  (found,) = verdicts(rows, CONFIG | {"loss.entropy_coef": 0.1})
  assert found.name == "unmoved"


def test_samples_that_are_cold_by_choice_are_to_be_warmer():
  rows = record(accuracy=flat, entropy=1e-3)
  (found,) = verdicts(rows, CONFIG | {"sampling.temperature": 0.1})
  assert found.name == "entropy_gone" and found.advice == "Try --sampling.temperature=1"


def test_samples_that_are_cold_from_the_start_are_the_cause_of_no_reward():
  nothing = {"reward_mean": 0.0, "accuracy": lambda s: 0.0, "frac_zero_std": 1.0, "entropy": 1e-3}
  rows = record(**nothing)
  (found,) = verdicts(rows, CONFIG | {"sampling.temperature": 0.01})
  assert found.name == "cold" and found.advice == "Try --sampling.temperature=1"
  assert verdicts(rows, CONFIG)[0].name == "never_rewarded"


def test_samples_that_are_cold_where_nothing_tells_how_groups_agree():
  """PPO compares no group: that its rewards differ is not to be taken from a missing key."""
  zero = {"reward_mean": 0.0, "accuracy": lambda s: 0.0, "grad_norm": lambda s: float(s < 0.1)}
  rows = record(**zero, entropy=lambda s: 0.3 if s < 0.02 else 1e-9)
  rows[0]["reward_mean"] = 0.01  # Then the reward is not the same in all steps.
  rows = [{key: row[key] for key in row if key != "frac_zero_std"} for row in rows]
  (found,) = verdicts(rows, CONFIG | {"sampling.temperature": 0.01})
  assert found.name == "cold"
  assert [verdict.name for verdict in verdicts(rows, CONFIG)] == ["entropy_gone"]


def test_a_task_learned_from_cold_samples_is_no_fault():
  rows = record(accuracy=lambda s: min(1.0, 0.2 + 1.2 * s), frac_zero_std=1.0, entropy=1e-3)
  assert verdicts(rows, CONFIG | {"sampling.temperature": 0.2}) == []


def test_what_never_ends_is_told_of_the_setting_that_keeps_it_from_ending():
  rows = record(truncated_fraction=1.0, accuracy=lambda s: 0.0, reward_mean=lambda s: 0.1 + s)
  rows = [row | {"accuracy": 0.0} for row in rows]
  (found,) = verdicts(rows, CONFIG | {"sampling.min_new_tokens": 16})
  assert found.name == "cut_short" and found.says.startswith("No response ever ended")
  assert found.advice.startswith("Try --sampling.min_new_tokens=0;")
  (found,) = verdicts(rows, CONFIG)
  assert found.advice.startswith("Try --max_new_tokens=32;")
  right = record(truncated_fraction=1.0)  # The grader reads an answer that never ends.
  assert verdicts(right, CONFIG) == []


def test_a_reward_that_rises_while_nothing_is_ever_right_is_one_for_something_else():
  rows = record(accuracy=lambda s: 0.0, reward_mean=lambda s: -0.3 + min(s, 0.3))
  for row in rows:
    row.update({key: 0.0 for key in row if key.startswith("eval/")}, accuracy=0.0)
  (found,) = verdicts(rows, CONFIG)
  assert found.name == "overlooked" and "not one response was ever right" in found.says
  assert "its sign (--jsonl.reward_file=mine.py)" in found.advice


@pytest.mark.parametrize(
  ("changes", "name", "advice"),
  [
    ({"kl.coef": 100.0}, "held_back", "Try --kl.coef=0.01"),
    ({"kl.coef": 0.05}, "unmoved", "Try --optimizer.learning_rate=0.0001, or more steps"),
    ({"sampling.temperature": 5.0}, "hot", "Try --sampling.temperature=1"),
    ({"optimizer.warmup_steps": 6000}, "warming_up", "Try --optimizer.warmup_steps=6"),
    (
      {"optimizer.warmup_steps": 10},
      "unmoved",
      "Try --optimizer.learning_rate=0.0001, or more steps",
    ),
    ({}, "unmoved", "Try --optimizer.learning_rate=0.0001, or more steps"),
  ],
)
def test_what_keeps_a_reward_where_it_is(changes, name, advice):
  rows = record(accuracy=flat, entropy=1.2)
  (found,) = verdicts(rows, CONFIG | changes)
  assert (found.name, found.advice) == (name, advice)


def test_a_reward_that_the_policy_has_no_part_in_is_the_grader_s():
  rows = record(accuracy=flat, frac_zero_std=0.0, entropy=lambda s: 1.2 - 0.4 * s)
  (found,) = verdicts(rows, CONFIG)
  assert found.name == "unlearnable" and "--jsonl.reward_file=mine.py" in found.advice


def flipped(chances, steps=40, problems=32, responses=8):
  """Steps in which responses to each problem are right with a probability drawn from `chances`."""
  rng = random.Random(1)
  rows = []
  for step in range(steps):
    drawn = [rng.choice(chances) for _ in range(problems)]
    groups = [sum(rng.random() < chance for _ in range(responses)) for chance in drawn]
    right = sum(groups) / (problems * responses)
    agree = sum(count in (0, responses) for count in groups) / problems
    row = {"reward_mean": right, "accuracy": right, "frac_zero_std": agree, "entropy": 5.5}
    rows.append({"step": step, "rewards_ok": problems * responses} | row)
  return rows


def test_a_grader_that_flips_a_coin_is_told_from_one_whose_problems_differ():
  """By chance 2 * 0.5^8 = 0.8 % of groups agree; half of them do at 0.05 and 0.95."""
  config = CONFIG | {"steps": 40}
  (found,) = verdicts(flipped([0.5]), config)
  assert found.name == "unlearnable" and "a chance of 5" in found.says
  assert "--jsonl.reward_file=mine.py" in found.advice
  for chances in ([0.05, 0.95], [0.2, 0.5, 0.8]):
    (found,) = verdicts(flipped(chances), config)
    assert found.name == "unmoved"
  unknown = [{key: row[key] for key in row if key != "frac_zero_std"} for row in flipped([0.5])]
  few_groups = flipped([0.5], problems=16)
  assert [verdicts(rows, config)[0].name for rows in (unknown, few_groups)] == ["unmoved"] * 2


NARROW = ({"sampling.temperature": 0.4}, {"sampling.top_p": 0.4}, {"sampling.top_k": 3})


def alike(**changed):
  """Steps of 16 groups whose eight responses have one reward each, half of the groups a right one.

  A response has 4 tokens of 1.1 nats: two of its samples are hardly ever the same.
  """
  rows = record(20, accuracy=lambda share: 0.5, frac_zero_std=1.0, entropy=1.1, **changed)
  return [{"response_length_mean": 4.0} | row for row in rows]


def test_a_grader_that_looks_at_the_problem_alone_is_told_from_a_policy_that_says_one_thing():
  for count in (10, 20):  # 160 groups, and 320.
    (found,) = verdicts(alike()[:count], CONFIG)
    assert found.name == "graded_alike" and "4.4 nats a response" in found.says
    assert found.advice.endswith("(--jsonl.reward_file=mine.py)")
  held_out = {"eval/sampled_low": 0.95, "eval/sampled_accuracy": 1.0, "eval/sampled_high": 1.0}
  (found,) = verdicts([row | held_out for row in alike()], CONFIG)  # By the same grader.
  assert found.name == "graded_alike"
  others = [
    verdicts(alike(response_length_mean=0.2), CONFIG),  # 0.22 nats: it always says the same.
    *(verdicts(alike(), CONFIG | narrow) for narrow in NARROW),
    verdicts(alike(), CONFIG | {"responses_per_prompt": 3}),
    verdicts(alike()[:3], CONFIG),  # 48 groups.
    verdicts([*alike()[:19], alike()[19] | {"frac_zero_std": 0.99}], CONFIG),
    *(verdicts([row | {"accuracy": r} for row in alike()], CONFIG) for r in (0.05, 0.95)),
  ]
  assert "graded_alike" not in [verdict.name for found in others for verdict in found]


def test_a_policy_that_is_thrown_about_is_not_blamed_on_the_grader():
  """Entropy moves in either case; only updates that are too large move it 1.5 nats in one step."""
  calm = record(accuracy=flat, frac_zero_std=0.1, entropy=lambda s: 5.5 - s)
  thrown = record(accuracy=flat, frac_zero_std=0.1, entropy=lambda s: 5.5 if s < 0.03 else 4.0 - s)
  (found,) = verdicts([calm[0] | {"reward_mean": 0.0}, *thrown[1:]], CONFIG)
  assert found.name == "first_updates" and "1.5 nats" in found.says
  assert found.advice == "Try --optimizer.learning_rate=1e-6"
  assert [verdict.name for verdict in verdicts(calm, CONFIG)] == ["unlearnable"]


def test_a_reward_that_falls_is_said_with_what_undoes_it():
  rows = record(accuracy=lambda s: 0.5 - 0.4 * s)
  (found,) = verdicts(rows, CONFIG)
  assert found.name == "fell" and found.advice == "Try --optimizer.learning_rate=1e-6"
  (found,) = verdicts(rows, CONFIG | {"optimizer.weight_decay": 100.0})
  assert found.advice == "Try --optimizer.weight_decay=0.01"
  recovers = record(accuracy=lambda s: 0.5 - 0.4 * math.sin(math.pi * s) + 0.3 * s)
  assert verdicts(recovers, CONFIG) == []


def test_groups_of_two_are_told_to_be_larger():
  rows = record(accuracy=lambda s: 0.05 + 0.2 * s, frac_zero_std=0.75)
  (found,) = verdicts(rows, CONFIG | {"responses_per_prompt": 2})
  assert found.name == "small_groups" and found.advice == "Try --responses_per_prompt=8"
  assert verdicts(rows, CONFIG) == []


def test_a_gradient_of_zero_tells_a_broken_network_from_a_slow_one():
  norms = {"grad_norm": lambda s: 0.2 if s < 0.01 else 0.0, "entropy": 5.5}
  (found,) = verdicts(record(accuracy=flat, **norms), CONFIG | {"optimizer.learning_rate": 1000.0})
  assert found.name == "first_updates" and "0 since step 1" in found.says
  assert found.advice == "Try --optimizer.learning_rate=0.001"
  # Without any spread of rewards there is no gradient either, and the updates are not at fault.
  agree = record(accuracy=flat, frac_zero_std=1.0, **norms)
  assert [verdict.name for verdict in verdicts(agree, CONFIG)] == ["groups_agree"]


def test_a_jump_from_which_the_reward_recovers_is_no_fault():
  jump = {"entropy": lambda s: 1.2 if s < 0.03 else 3.0}
  assert verdicts(record(**jump), CONFIG) == []
  lost = record(accuracy=lambda s: 0.4 if s < 0.03 else 0.1, **jump)
  assert [verdict.name for verdict in verdicts(lost, CONFIG)] == ["first_updates"]


def test_no_flag_is_advised_that_the_command_lacks():
  few_flags = {"steps": 60, "optimizer.learning_rate": 1e-5}
  for rows, _ in FAULTS.values():
    for verdict in verdicts(rows, few_flags):
      assert {*re.findall("--([a-z_.]+)", verdict.advice)} <= {*few_flags}


def test_a_short_record_says_only_what_is_broken():
  rows = record(accuracy=flat, truncated_fraction=1.0, frac_zero_std=0.95)
  assert verdicts(rows[:5], CONFIG) == [] and verdicts([], CONFIG) == []
  assert [v.name for v in verdicts(record(rewards_timed_out=99)[:3], CONFIG)] == ["grader_failed"]


def test_a_grader_that_is_late_gets_more_time():
  (found,) = verdicts(record(rewards_timed_out=99), CONFIG)
  assert found.advice.startswith("Try --reward_deadline=20") and "44%" in found.says


def test_no_opinion_is_no_failure():
  assert verdicts(record(rewards_not_applicable=500, rewards_unreadable=100), CONFIG) == []


def test_a_model_of_noise_is_not_said_to_be_cut():
  """Random weights hardly ever write an end: that they are cut says nothing of the limit."""
  rows = record(accuracy=flat, truncated_fraction=0.98, entropy=5.0)
  assert [verdict.name for verdict in verdicts(rows, CONFIG)] == ["unmoved"]
  nothing = {"reward_mean": 0.0, "accuracy": lambda s: 0.0, "frac_zero_std": 1.0}
  none = record(truncated_fraction=1.0, **nothing)
  none = [row | {"accuracy": 0.0} for row in none]
  noise = [row | {"entropy": 5.0} for row in none]
  some = [row | {"truncated_fraction": 0.98} for row in noise]
  found = [verdicts(rows, CONFIG)[0].name for rows in (none, noise, some)]
  assert found == ["cut_short", "cut_short", "never_rewarded"]
  few_responses = [row | {"rewards_ok": 8} for row in noise]
  assert verdicts(few_responses, CONFIG)[0].name == "never_rewarded"


def test_responses_that_are_cut_before_any_answer_are_the_cause_of_a_collapse():
  """If some were right all the same, the limit lets answers through."""
  gone = {"entropy": lambda s: 1.2 * math.exp(-12 * s), "truncated_fraction": 1.0}
  rows = record(accuracy=flat, **gone)
  assert [verdict.name for verdict in verdicts(rows, CONFIG)] == ["entropy_gone"]
  never = [row | {"accuracy": 0.0} for row in rows]
  assert [verdict.name for verdict in verdicts(never, CONFIG)] == ["cut_short"]


def test_problems_learned_by_heart_are_told_from_a_grader_with_a_hole():
  """Training problems become right and held-out ones do not; nobody found a way around a grader."""
  held_out = {"low": 0.0, "accuracy": 0.1, "high": 0.3}
  held_out = {f"eval/sampled_{end}": value for end, value in held_out.items()}
  rows = record(accuracy=lambda s: min(0.8, 0.1 + 1.6 * s))
  rows = [row | held_out if "eval/sampled_low" in row else row for row in rows]
  (found,) = verdicts(rows, CONFIG)
  assert found.name == "by_heart" and "80%" in found.says and "fewer steps" in found.advice
  wide = [row | {"eval/sampled_high": 0.9} if "eval/sampled_low" in row else row for row in rows]
  assert verdicts(wide, CONFIG) == []  # Few held-out problems cannot tell.


# Every fourth step of two runs of the tiny model on `copy`, 32 prompts a step, 60 steps:
# (reward, entropy, share cut); not one response was right.
ONE_TOKEN = (  # --max_new_tokens=1
  (0.0008, 5.544, 0.996),
  (0.0014, 5.55, 0.996),
  (0.0012, 5.544, 0.996),
  (0.0034, 5.531, 0.992),
  (0.0033, 5.506, 0.996),
  (0.0048, 5.454, 0.992),
  (0.007, 5.36, 1.0),
  (0.0164, 5.156, 1.0),
  (0.0169, 4.851, 1.0),
  (0.0371, 4.469, 1.0),
  (0.0548, 4.007, 1.0),
  (0.0654, 3.414, 0.996),
  (0.0867, 3.197, 1.0),
  (0.1012, 2.465, 0.992),
  (0.1237, 1.845, 1.0),
)
NEGATIVE_BONUS = (  # --loss.entropy_coef=-0.5
  (0.0028, 5.544, 0.988),
  (0.0049, 5.529, 0.992),
  (0.0055, 5.491, 0.988),
  (0.0088, 5.396, 0.992),
  (0.0132, 5.224, 1.0),
  (0.0146, 4.946, 1.0),
  (0.0176, 4.559, 1.0),
  (0.0244, 4.106, 1.0),
  (0.0236, 3.664, 1.0),
  (0.0381, 3.303, 1.0),
  (0.0516, 3.04, 1.0),
  (0.0677, 2.787, 1.0),
  (0.0869, 2.477, 1.0),
  (0.1068, 2.09, 1.0),
  (0.1196, 1.65, 1.0),
)


def recorded(steps):
  """Rows of a run in which nothing was right."""
  keys = ("reward_mean", "entropy", "truncated_fraction")
  rows = [dict(zip(keys, values, strict=True)) for values in steps]
  fixed = {"accuracy": 0.0, "frac_zero_std": 0.2, "rewards_ok": 128, "updates_skipped": 0}
  return [{"step": 4 * i} | fixed | row for i, row in enumerate(rows)]


# Every sixth step of two runs of the tiny model on `copy` with the defaults, 150 steps:
# (step, reward, share right, entropy, groups that agree, share cut, gradient norm).
CUT_AT_TWO = (  # --max_new_tokens=2
  (0, 0.00208, 0.0, 5.54, 0.828, 0.992, 0.236),
  (6, 0.00319, 0.0, 5.53, 0.781, 0.992, 0.178),
  (12, 0.0128, 0.0, 5.48, 0.5, 0.998, 0.328),
  (18, 0.018, 0.0, 5.34, 0.344, 0.99, 0.49),
  (24, 0.0365, 0.0, 4.94, 0.0938, 0.998, 0.565),
  (30, 0.0625, 0.0, 4.2, 0.0, 0.99, 0.666),
  (36, 0.0937, 0.0, 3.72, 0.0, 0.996, 0.415),
  (42, 0.114, 0.0, 3.67, 0.0, 1.0, 0.599),
  (48, 0.176, 0.0, 2.7, 0.0312, 0.998, 0.697),
  (54, 0.224, 0.0, 2.59, 0.0156, 0.998, 0.774),
  (60, 0.289, 0.0, 1.8, 0.0156, 1.0, 0.904),
  (66, 0.325, 0.0, 1.27, 0.0625, 1.0, 0.693),
  (72, 0.369, 0.0, 0.65, 0.25, 1.0, 0.478),
  (78, 0.384, 0.0, 0.381, 0.531, 0.998, 0.277),
  (84, 0.395, 0.0, 0.219, 0.812, 1.0, 0.122),
  (90, 0.396, 0.0, 0.147, 0.859, 1.0, 0.0867),
  (96, 0.396, 0.0, 0.104, 0.875, 1.0, 0.308),
  (102, 0.397, 0.0, 0.0737, 0.875, 1.0, 0.0986),
  (108, 0.396, 0.0, 0.0588, 0.859, 1.0, 0.112),
  (114, 0.399, 0.0, 0.0448, 0.969, 1.0, 0.0536),
  (120, 0.398, 0.0, 0.0342, 0.953, 1.0, 0.069),
  (126, 0.399, 0.0, 0.0322, 0.969, 1.0, 0.0423),
  (132, 0.399, 0.0, 0.0285, 0.969, 1.0, 0.0455),
  (138, 0.4, 0.0, 0.0278, 0.984, 1.0, 0.0311),
  (144, 0.4, 0.0, 0.0252, 0.984, 1.0, 0.0469),
)
LEARNS = (  # as it is
  (0, 0.00229, 0.0, 5.54, 0.781, 0.984, 0.229),
  (6, 0.00233, 0.0, 5.53, 0.734, 0.992, 0.124),
  (12, 0.00781, 0.0, 5.5, 0.406, 0.994, 0.252),
  (18, 0.0155, 0.0, 5.42, 0.297, 0.988, 0.215),
  (24, 0.0289, 0.0, 5.22, 0.0938, 0.99, 0.286),
  (30, 0.0466, 0.0, 4.89, 0.0156, 0.998, 0.244),
  (36, 0.0798, 0.0, 4.55, 0.0, 0.996, 0.271),
  (42, 0.0941, 0.00195, 4.55, 0.0, 0.994, 0.385),
  (48, 0.136, 0.0, 4.12, 0.0156, 0.994, 0.377),
  (54, 0.166, 0.00195, 4.03, 0.0, 0.998, 0.492),
  (60, 0.262, 0.00391, 3.34, 0.0156, 1.0, 0.391),
  (66, 0.317, 0.00781, 2.94, 0.0, 0.994, 0.455),
  (72, 0.356, 0.00977, 2.51, 0.0, 0.988, 0.4),
  (78, 0.404, 0.0254, 2.17, 0.0781, 0.973, 0.314),
  (84, 0.441, 0.0449, 1.82, 0.0938, 0.951, 0.276),
  (90, 0.517, 0.156, 1.55, 0.0625, 0.836, 0.488),
  (96, 0.609, 0.307, 1.28, 0.0, 0.68, 0.622),
  (102, 0.747, 0.551, 0.851, 0.0156, 0.408, 0.561),
  (108, 0.884, 0.795, 0.448, 0.156, 0.18, 0.404),
  (114, 0.946, 0.906, 0.231, 0.422, 0.0723, 0.188),
  (120, 0.978, 0.961, 0.143, 0.719, 0.0488, 0.12),
  (126, 0.987, 0.977, 0.11, 0.828, 0.0371, 0.0688),
  (132, 0.991, 0.984, 0.1, 0.875, 0.0508, 0.0536),
  (138, 0.983, 0.971, 0.149, 0.797, 0.131, 0.0876),
  (144, 0.992, 0.986, 0.248, 0.891, 0.451, 0.0654),
)

KEYS = (
  "step",
  "reward_mean",
  "accuracy",
  "entropy",
  "frac_zero_std",
  "truncated_fraction",
  "grad_norm",
)


def test_a_recorded_run_that_learns_gets_no_sentence_at_any_step():
  rows = [dict(zip(KEYS, values, strict=True)) for values in LEARNS]
  config = CONFIG | {"steps": 150, "max_new_tokens": 4, "loss.entropy_coef": 0.1}
  assert [verdicts(rows[:count], config) for count in range(1, len(rows) + 1)] == [[]] * len(rows)


def test_a_recorded_run_of_cut_answers_gets_its_sentence_once_it_is_decided():
  """All are cut from the first step on, as they are in a run that learns: noise never ends."""
  rows = [dict(zip(KEYS, values, strict=True)) for values in CUT_AT_TWO]
  config = CONFIG | {"steps": 150, "max_new_tokens": 2, "loss.entropy_coef": 0.1}
  assert verdicts(rows[:10], config) == []
  (found,) = verdicts(rows, config)
  assert found.name == "cut_short" and found.advice == "Try --max_new_tokens=4"


def test_a_run_that_ended_before_anything_was_right_is_told_to_go_further():
  """One token of three: at this entropy, 2.5 nats, nothing tells it from a run that will learn."""
  config = CONFIG | {"steps": 57, "max_new_tokens": 1}
  (found,) = verdicts(recorded(ONE_TOKEN), config)
  assert found.name == "unfinished" and found.advice == "Try --steps=114"
  assert verdicts(recorded(ONE_TOKEN), config | {"steps": 200}) == []  # It is still running.
  assert verdicts(record(accuracy=lambda s: 0.4 * s), CONFIG) == []  # Much is right already.


def test_parts_of_answers_do_not_excuse_a_limit_that_cuts_all():
  """Once the policy is decided, below 1.5 nats, it is the limit that keeps answers from ending."""
  decided = [row | {"entropy": row["entropy"] / 4} for row in recorded(ONE_TOKEN)]
  (found,) = verdicts(decided, CONFIG | {"max_new_tokens": 1})
  assert found.name == "cut_short" and found.advice == "Try --max_new_tokens=2"
  some = [row | {"accuracy": 0.01 * i} for i, row in enumerate(decided)]
  assert verdicts(some, CONFIG | {"max_new_tokens": 1}) == []


def test_a_bonus_for_certainty_is_said_from_the_tenth_step():
  """0.5 x 5.5 nats = 2.8 is over the advantages' scale; 0.1 x 5.5 = 0.55 is not."""
  rows = recorded(NEGATIVE_BONUS)
  (found,) = verdicts(rows[:10], CONFIG | {"loss.entropy_coef": -0.5})
  assert found.name == "bonus_negative" and "0.5 x 5.5 nats" in found.says
  assert found.advice == "Try --loss.entropy_coef=0.017"
  assert verdicts(rows[:10], CONFIG | {"loss.entropy_coef": -0.1}) == []


def test_a_weight_decay_that_takes_more_than_it_leaves():
  """60 steps at 1e-2 * 2: 0.98^60 = 30 % is left. At 1e-2 * 0.1 it is 0.999^60 = 94 %."""
  rows = record(accuracy=lambda s: 0.2 + 0.2 * s, learning_rate=1e-2)
  (found,) = verdicts(rows, CONFIG | {"optimizer.weight_decay": 2.0})
  assert found.name == "decayed" and "left 30% of" in found.says
  assert found.advice == "Try --optimizer.weight_decay=0.01"
  assert verdicts(rows, CONFIG | {"optimizer.weight_decay": 0.1}) == []
  assert verdicts(record(learning_rate=1e-2), CONFIG | {"optimizer.weight_decay": 2.0}) == []


def test_a_policy_far_from_its_reference_is_no_fault_while_its_reward_still_rises():
  """The tiny model begins with noise: whatever it learns is far from that."""
  rows = record(accuracy=lambda s: 0.6 * s**4, kl_ref=lambda s: 4 * s)
  assert verdicts(rows, CONFIG) == []


def test_examples_that_became_certain_are_not_called_samples():
  """Where answers are given, a low entropy means that they are known, and none was sampled."""
  known = [
    {"step": step, "loss": 5 * math.exp(-step / 8), "entropy": 5 * math.exp(-step / 8)}
    | ({"eval/token_loss": 1 + abs(step - 20) / 40} if step % 10 == 0 else {})
    for step in range(61)
  ]
  assert [verdict.name for verdict in verdicts(known, {})] == ["memorised"]


def test_examples_learned_by_heart():
  def rows(turned):
    return [
      {"step": step, "loss": 2 - step / 60}
      | ({"eval/token_loss": 1 + turned * abs(step - 20) / 40} if step % 10 == 0 else {})
      for step in range(61)
    ]

  (found,) = verdicts(rows(1.0), {"optimizer.learning_rate": 1e-4, "steps": 61})
  assert found.name == "memorised" and found.advice.startswith("Try --steps=20")
  assert verdicts(rows(0.01), {}) == []


def test_cut_responses_that_are_right_do_not_need_more_tokens():
  rows = record(accuracy=lambda s: 0.3 + 0.2 * s, truncated_fraction=0.9)
  assert verdicts(rows, CONFIG) == []


def test_nothing_known_of_the_config_is_no_fault():
  for name, (rows, _) in FAULTS.items():
    assert [verdict.name for verdict in verdicts(rows, {})] == [name]


def test_doctests():
  assert doctest.testmod(verdicts_lib).failed == doctest.testmod(evidence).failed == 0
