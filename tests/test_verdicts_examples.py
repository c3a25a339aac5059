"""What a record says of examples, pairs, a teacher, prompts and sums of rewards."""

import doctest
import math
import random

import pytest

from rl_llm.runs import verdicts_settings
from rl_llm.runs.verdicts import verdicts

CONFIG = {
  "steps": 60,
  "task": "copy",
  "data": "mine.jsonl",
  "responses_per_prompt": 8,
  "prompts_per_step": 16,
  "max_prompt_tokens": 100,
  "overlong_prompt": "error",
  "max_new_tokens": 16,
  "optimizer.learning_rate": 1e-5,
  "optimizer.max_grad_norm": 1.0,
  "optimizer.name": "adamw",
  "loss.beta": None,
  "overlong.cache": 0.0,
  "reward": "task",
  "value.learning_rate": 1e-4,
  "sampling.temperature": 1.0,
  "balanced": False,
  "teacher": "runs/teacher",
}


def examples(steps=60, *, right=lambda share: 0.1 + 0.5 * share, **changed):
  """Given examples that are learned; `changed` has key=value or key=function of the share done."""
  rng = random.Random(0)
  rows = []
  for step in range(steps + 1):
    share = step / steps
    row = {"loss": 2 - share + rng.gauss(0, 0.02), "grad_norm": 1.0, "updates_skipped": 0}
    row |= {key: value for key, value in changed.items() if not key.startswith("eval/")}
    if step % 15 == 0:
      held_out = {"low": -0.04, "accuracy": 0, "high": 0.04}
      row |= {f"eval/sampled_{end}": max(0.0, right(share) + by) for end, by in held_out.items()}
      row |= {"eval/token_loss": 2 - 0.8 * share}
      row |= {key: value for key, value in changed.items() if key.startswith("eval/")}
    rows.append({"step": step} | {k: v(share) if callable(v) else v for k, v in row.items()})
  return rows


def sampled(steps=60, *, right=lambda share: 0.2, **changed):
  """Steps that sample; without changes a reward that does not move."""
  rng = random.Random(0)
  fixed = {"frac_zero_std": 0.7, "entropy": 1.2, "rewards_ok": 128, "grad_norm": 1.0, "loss": 0.0}
  rows = []
  for step in range(steps):
    share = step / (steps - 1)
    row = fixed | {"accuracy": right(share), "reward_mean": right(share) + rng.gauss(0, 0.02)}
    row |= changed
    rows.append({"step": step} | {k: v(share) if callable(v) else v for k, v in row.items()})
  return rows


def name_and_advice(rows, **config):
  (found,) = verdicts(rows, CONFIG | config)
  assert found.says.endswith(".") and not found.advice.endswith(".")
  return found.name, found.advice


def test_examples_that_are_learned_get_no_sentence_at_any_evaluation():
  rows = examples()
  assert [verdicts(rows[: count + 1], CONFIG) for count in range(0, 61, 15)] == [[]] * 5


def test_pairs_for_a_model_that_is_never_right():
  """An untrained model tells pairs apart, and cannot write an answer. With a right one it is told
  of the data."""
  losses = {"eval/pair_loss": lambda s: 0.69 - 0.1 * s, "eval/token_loss": None}
  learned = losses | {"loss": lambda s: 0.69 - 0.1 * min(s, 0.5), "pair_accuracy": 0.9}
  name, advice = name_and_advice(examples(right=lambda s: 0.0, **learned), model="tiny")
  assert name == "never_right"
  assert advice.startswith("Try a model that is sometimes right")
  assert "--model=tiny. Check that the chosen answers are the better ones (--data=" in advice
  some = examples(right=lambda s: 0.02 - 0.02 * s, **learned)
  assert name_and_advice(some, model="tiny")[0] == "taught_else"
  answers = examples(right=lambda s: 0.0, loss=lambda s: 2 - min(s, 0.5))
  assert name_and_advice(answers, model="tiny")[0] == "taught_else"


def test_data_that_undoes_the_task():
  """Its loss falls, and held-out accuracy with it, beyond both intervals."""
  name, advice = name_and_advice(examples(right=lambda s: 0.6 - 0.5 * s))
  assert name == "taught_else"
  assert advice.startswith("Check that its answers are those that the task calls right (--data=min")
  assert verdicts(examples(right=lambda s: 0.6 - 0.05 * s), CONFIG) == []  # Intervals overlap.


def test_data_that_is_learned_to_the_end_and_teaches_nothing_of_the_task():
  learned = {"loss": lambda s: 2 - min(2 * s, 0.9)}
  name, advice = name_and_advice(examples(right=lambda s: 0.0, **learned))
  assert name == "taught_else" and "--optimizer" not in advice
  assert verdicts(examples(right=lambda s: 0.0), CONFIG) == []  # The loss is still falling.


def test_updates_that_make_a_held_out_loss_worse():
  rising = {"loss": lambda s: 2 + s, "eval/token_loss": lambda s: 2 + s}
  found = name_and_advice(examples(**rising))
  assert found == ("worse", "Try --optimizer.learning_rate=1e-6")
  back = {"loss": lambda s: 2 - s + (2 if 0.2 < s < 0.3 else 0)}
  back["eval/token_loss"] = back["loss"]
  assert verdicts(examples(**back), CONFIG) == []


def test_a_loss_that_stands_still():
  still = {"loss": lambda s: 2 - 0.001 * s, "eval/token_loss": lambda s: 2 - 0.001 * s}
  found = name_and_advice(examples(right=lambda s: 0.1, **still))
  assert found == ("unmoved", "Try --optimizer.learning_rate=0.0001, or more steps")
  assert verdicts(examples(right=lambda s: 0.1, **still)[:20], CONFIG) == []  # Of 60: too early.


def test_pairs_that_say_nothing_of_other_pairs():
  """The held-out loss rises from the first evaluation on: no number of steps is the better one."""
  name, advice = name_and_advice(examples(**{"eval/token_loss": lambda s: 0.69 + s}))
  assert name == "no_signal" and advice.startswith("Check the labels") and "mine.jsonl" in advice


@pytest.mark.parametrize(
  ("share", "said"), [(0.97, "97% of the answers are wanted"), (0.0, "100%")]
)
def test_labels_of_one_kind(share, said):
  rows = examples(right=lambda s: 0.3, desirable_fraction=share)
  (found,) = verdicts(rows, CONFIG)
  assert found.name == "one_sided" and found.says.startswith(said)
  assert found.advice.endswith("wanted answers in --data=mine.jsonl, or --balanced=true")
  assert verdicts(examples(desirable_fraction=0.9), CONFIG) == []


def test_a_student_that_is_its_teacher_and_no_better():
  near = {"eval/reverse_kl": lambda s: 4 * math.exp(-6 * s), "eval/token_loss": None}
  name, advice = name_and_advice(examples(right=lambda s: 0.1, **near))
  assert name == "like_its_teacher" and advice.endswith("--teacher=runs/teacher")
  assert verdicts(examples(**near), CONFIG) == []
  assert verdicts(examples(right=lambda s: 0.1, **near)[:31], CONFIG) == []


def test_a_student_that_begins_as_its_teacher():
  same = {"eval/reverse_kl": lambda s: 0.005 * s, "eval/token_loss": None}
  assert name_and_advice(examples(right=lambda s: 0.1, **same))[0] == "like_its_teacher"
  far = {"eval/reverse_kl": lambda s: 4 - s, "eval/token_loss": None}
  assert verdicts(examples(right=lambda s: 0.1, **far), CONFIG) == []


def test_pairs_that_are_told_apart_are_not_learned_by_heart():
  """The loss is of how sure a model is; 0.95 of the held-out pairs are in order."""
  turned = {"eval/pair_loss": lambda s: 0.05 + abs(s - 0.3) / 10, "eval/token_loss": None}
  for share, names in ((0.95, []), (0.7, ["memorised"])):
    rows = examples(**turned, **{"eval/pair_accuracy": share})
    assert [verdict.name for verdict in verdicts(rows, CONFIG)] == names


def test_labels_that_a_coin_gave():
  """Recorded at the end of KTO with random labels: AUC 0.522, rewards -0.168 and -0.207."""
  still = {"loss": lambda s: 0.5 - 0.008 * s, "eval/token_loss": None}
  still |= {"eval/answer_loss": still["loss"], "eval/label_auc": lambda s: 0.5 + 0.022 * s}
  moved = {"eval/desirable_reward": lambda s: -0.168 * s}
  name, advice = name_and_advice(examples(right=lambda s: 0.47 - 0.02 * s, **still, **moved))
  assert name == "no_signal" and advice.endswith("(--data=mine.jsonl). Try more data")
  assert name_and_advice(examples(right=lambda s: 0.47, **still))[0] == "unmoved"
  told = moved | {"eval/label_auc": 0.6}
  assert name_and_advice(examples(right=lambda s: 0.47, **still | told))[0] == "unmoved"


def test_passes_after_which_half_of_a_batch_is_clipped():
  """Recorded with 30 passes, in the last quarter of 60 steps: 0.19 above the range, 0.28 below."""
  clipped = {"clip_high_fraction": 0.19, "clip_low_fraction": 0.28}
  rows = sampled(right=lambda s: 0.05 * s, **clipped)
  found = name_and_advice(rows, epochs=30, steps=90)
  assert found == ("clipped_tokens", "Try --epochs=3, or --optimizer.learning_rate=1e-6")
  assert verdicts(rows, CONFIG | {"steps": 90, "epochs": 1}) == []
  fewer = [row | {"clip_low_fraction": 0.1} for row in rows]
  assert verdicts(fewer, CONFIG | {"steps": 90, "epochs": 30}) == []


def test_prompts_that_lost_their_beginning():
  rows = sampled(overlong_prompts=8)
  name, advice = name_and_advice(rows, overlong_prompt="truncate_left")
  assert (name, advice) == ("prompts_cut", "Try --max_prompt_tokens=400")
  assert verdicts(rows, CONFIG)[0].name == "unmoved"
  few = sampled(overlong_prompts=2)  # Of 16 problems a step.
  assert name_and_advice(few, overlong_prompt="truncate_left")[0] == "unmoved"


def test_a_sum_of_rewards_that_rises_by_another_part():
  parts = {"reward_task": lambda s: 0.05, "reward_short": lambda s: s}
  rows = sampled(right=lambda s: 0.05, reward_mean=lambda s: 0.05 + s, **parts)
  found = name_and_advice(rows, reward="task,style.py:short*1")
  assert found == ("other_part", "Try --reward=task,style.py:short*0.1")
  parts |= {"reward_task": lambda s: 0.9 * s}
  rows = sampled(right=lambda s: 0.1 * s, reward_mean=lambda s: 0.05 + s, **parts)
  assert name_and_advice(rows, reward="task,style.py:short*1")[0] == "unfinished"


def test_another_part_that_pays_more_than_half_a_right_answer():
  """It was there from the start, so nothing rises by it; a bonus of 0.2 is none such."""
  for other, names in ((0.9, ["other_part"]), (0.2, ["unmoved"])):
    rows = sampled(right=lambda s: 0.05, reward_task=0.05, reward_mean=0.05 + other)
    rows = [row | {"reward_mean": row["reward_mean"] + row["step"] % 2 / 100} for row in rows]
    found = verdicts(rows, CONFIG | {"reward": "task,style.py:short*1"})
    assert [verdict.name for verdict in found] == names


def test_a_penalty_for_length_that_is_all_that_is_learned():
  rows = sampled(
    right=lambda s: 0.05, reward_mean=lambda s: s - 0.95, overlong_penalty=lambda s: s - 1
  )
  assert name_and_advice(rows) == ("other_part", "Try --overlong.cache=0")


def test_responses_that_the_grader_cannot_read():
  rows = sampled(rewards_unreadable=100)
  config = {"reasoning_gym.instruction": ""}
  name, advice = name_and_advice(rows, **config)
  assert name == "unreadable" and advice.endswith("(--reasoning_gym.instruction)")
  assert name_and_advice(sampled(rewards_unreadable=10), **config)[0] == "unmoved"


@pytest.mark.parametrize(
  ("rows", "config", "found"),
  [
    (
      {},
      {"optimizer.name": "sgd"},
      ("sgd", "Try --optimizer.name=adamw, or --optimizer.learning_"),
    ),
    (
      {},
      {"optimizer.name": "sgd", "optimizer.max_grad_norm": 1e-6},
      ("clipped", "Try --optimizer.max_grad_norm=1"),
    ),
    ({"explained_variance": -3.0}, {}, ("misled", "Try --value.learning_rate=1e-5")),
    ({"explained_variance": 0.0}, {}, ("unmoved", "Try --optimizer.learning_rate=0.0001")),
    ({"rewards_ok": 8}, {"prompts_per_step": 1}, ("noisy", "Try --prompts_per_step=16")),
  ],
)
def test_why_a_reward_does_not_move(rows, config, found):
  name, advice = name_and_advice(sampled(**rows), **config)
  assert name == found[0] and advice.startswith(found[1])


def pausing(share_right):
  """A reward that stands still at 0.385, all responses cut at the limit, few of them right."""
  return sampled(
    right=share_right,
    reward_mean=lambda s: 0.385 * min(1.0, 4 * s),
    entropy=lambda s: 1.2 - s,
    truncated_fraction=1.0,
    rewards_ok=512,
    frac_zero_std=0.3,
    **{f"eval/sampled_{end}": 0.01 for end in ("low", "accuracy", "high")},
  )


def test_a_pause_in_which_first_answers_are_right_is_no_fault_of_a_run_in_progress():
  """0 of 7,680 responses are right in the first quarter, 77 in the last one."""
  rows = pausing(lambda s: 0.01 if s > 0.5 else 0.0)
  assert verdicts(rows, CONFIG | {"steps": 110}) == []
  assert name_and_advice(rows)[0] == "cut_short"  # It is over.
  assert name_and_advice(pausing(lambda s: 0.01), steps=110)[0] == "cut_short"
  whole = [row | {"truncated_fraction": 0.0} for row in rows]
  assert verdicts(whole, CONFIG | {"steps": 110}) == []
  assert name_and_advice(whole)[0] == "overlooked"


def test_a_policy_that_is_certain_and_mostly_right_is_not_lost():
  gone = {"entropy": lambda s: 1.2 * math.exp(-12 * s), "frac_zero_std": 0.5}
  assert verdicts(sampled(right=lambda s: 0.2 + 0.58 * min(1.0, 2 * s), **gone), CONFIG) == []
  assert name_and_advice(sampled(right=lambda s: 0.2 + 0.1 * s, **gone))[0] == "entropy_gone"


def evaluated(rows, accuracy, *, half=0.05):
  """With a last row that evaluates."""
  ends = {"low": max(0.0, accuracy - half), "accuracy": accuracy, "high": min(1.0, accuracy + half)}
  row = {f"eval/sampled_{end}": value for end, value in ends.items()}
  first = {key: 0.0 for key in row} if accuracy < 0.9 else row
  return [rows[0] | first, *rows[1:], {"step": len(rows)} | row]


def test_problems_known_by_heart_are_told_where_all_of_them_are_right():
  """Training is solved: only held-out problems say that nothing else is."""
  rows = sampled(right=lambda s: min(1.0, 0.1 + 2 * s))
  assert name_and_advice(evaluated(rows, 0.3))[0] == "by_heart"
  assert verdicts(evaluated(rows, 0.85), CONFIG) == []
  cold = name_and_advice(evaluated(rows, 0.3), **{"sampling.temperature": 0.6})
  assert cold == ("other_samples", "Try --sampling.temperature=1")
  rows = evaluated(rows, 0.3)
  since = [*rows[:10], rows[10] | rows[-1] | {"step": 10}, *rows[11:-1]]
  assert verdicts(since, CONFIG) == []  # Training has moved on since that evaluation.


def test_a_task_that_the_model_could_do_before():
  rows = sampled(right=lambda s: 0.97)
  assert name_and_advice(evaluated(rows, 0.97, half=0.03)) == (
    "nothing_left",
    "Try harder problems",
  )
  assert verdicts(evaluated(rows, 0.92), CONFIG) == []  # It may have been 0.87.


def test_a_grader_that_calls_everything_right():
  """Few held-out problems leave room for doubt, and 5 steps of right responses none."""
  rows = sampled(right=lambda s: 1.0)
  name, advice = name_and_advice(evaluated(rows, 1.0, half=0.2))
  assert (name, advice) == ("nothing_left", "Try harder problems")
  (found,) = verdicts(evaluated(rows, 1.0), CONFIG | {"reward": "my.py:f"}, {"reward": "task"})
  assert found.advice.startswith("Check that the grader refuses a wrong answer (--reward=my.py:f).")
  once = [row | {"accuracy": 0.99} if row["step"] == 4 else row for row in rows]
  assert verdicts(evaluated(once, 1.0, half=0.2), CONFIG) == []


def test_early_groups_that_agree_are_no_fault_of_a_run_in_progress():
  """Noise hardly ever earns a reward."""
  rows = sampled(right=lambda s: 0.0 if s < 0.4 else s, frac_zero_std=lambda s: 0.97 - 0.7 * s**4)
  config = CONFIG | {"responses_per_prompt": 4}
  assert [verdicts(rows[:count], config) for count in (15, 29, 60)] == [[]] * 3


def test_small_groups_that_agree_since_most_of_them_are_right():
  """Recorded near the end of a run that learned: 0.8 right, 0.7 of the groups of 4 agree."""
  rows = sampled(right=lambda s: 0.3 + 0.5 * s, frac_zero_std=0.7)
  config = CONFIG | {"responses_per_prompt": 4}
  assert verdicts(rows, config) == []
  ends = sampled(right=lambda s: 0.2, frac_zero_std=lambda s: 0.85 if s < 0.9 else 0.4)
  assert "small_groups" not in [verdict.name for verdict in verdicts(ends, config)]
  fewer = sampled(right=lambda s: 0.1 + 0.2 * s, frac_zero_std=0.7)
  assert name_and_advice(fewer, responses_per_prompt=4)[0] == "small_groups"


# Every fifth step of the tiny model's DPO on a file whose chosen answers are the worse ones, 100
# steps: (step, loss, share of pairs in order); (step, held-out loss, low, accuracy, high).
SWAPPED = (
  (0, 0.693, 0.25),
  (5, 0.65, 0.594),
  (10, 0.591, 0.75),
  (15, 0.587, 0.688),
  (20, 0.482, 0.938),
  (25, 0.429, 0.969),
  (30, 0.455, 0.969),
  (35, 0.371, 0.938),
  (40, 0.285, 1.0),
  (45, 0.304, 0.938),
  (50, 0.369, 0.938),
  (55, 0.26, 0.969),
  (60, 0.288, 0.938),
  (65, 0.387, 0.875),
  (70, 0.237, 0.969),
  (75, 0.327, 0.969),
  (80, 0.229, 0.969),
  (85, 0.342, 0.938),
  (90, 0.314, 0.938),
  (95, 0.217, 1.0),
)
SWAPPED_HELD_OUT = (
  (0, 0.693, 0.401, 0.457, 0.513),
  (25, 0.465, 0.0, 0.0, 0.037),
  (50, 0.35, 0.0, 0.0, 0.037),
  (75, 0.33, 0.0, 0.0, 0.037),
  (100, 0.314, 0.0, 0.0, 0.037),
)
# Every fifth step of REINFORCE with --advantage=leave_one_out, 6 letters, 150 steps, which learns
# after a pause at one letter of three: (step, reward, share right, entropy, share cut).
PAUSES = (
  (0, 0.00181, 0.0, 5.54, 0.973),
  (5, 0.00339, 0.0, 5.54, 0.992),
  (10, 0.00814, 0.0, 5.48, 0.977),
  (15, 0.0159, 0.0, 5.34, 0.986),
  (20, 0.0325, 0.0, 4.96, 0.996),
  (25, 0.0637, 0.0, 4.21, 0.994),
  (30, 0.0859, 0.0, 3.68, 0.986),
  (35, 0.137, 0.0, 3.05, 0.996),
  (40, 0.188, 0.0, 2.51, 0.998),
  (45, 0.25, 0.00195, 2.06, 1.0),
  (50, 0.313, 0.00781, 1.32, 1.0),
  (55, 0.351, 0.00977, 0.775, 1.0),
  (60, 0.374, 0.00781, 0.461, 1.0),
  (65, 0.376, 0.00391, 0.275, 1.0),
  (70, 0.398, 0.0117, 0.216, 1.0),
  (75, 0.397, 0.00195, 0.161, 1.0),
  (80, 0.382, 0.0137, 0.22, 0.998),
  (85, 0.438, 0.0977, 0.544, 0.998),
  (90, 0.492, 0.191, 0.626, 1.0),
  (95, 0.466, 0.203, 0.677, 1.0),
  (100, 0.564, 0.324, 0.684, 1.0),
  (105, 0.66, 0.461, 0.453, 1.0),
  (110, 0.717, 0.529, 0.406, 1.0),
  (115, 0.801, 0.67, 0.304, 1.0),
  (120, 0.854, 0.752, 0.198, 1.0),
  (125, 0.864, 0.766, 0.137, 1.0),
  (130, 0.918, 0.861, 0.0916, 1.0),
  (135, 0.904, 0.828, 0.0641, 1.0),
  (140, 0.922, 0.871, 0.0628, 1.0),
  (145, 0.884, 0.805, 0.0949, 1.0),
)
PAUSES_HELD_OUT = (
  (0, 0.0, 0.0, 0.0876),
  (25, 0.0, 0.0, 0.0876),
  (50, 0.00196, 0.00714, 0.0257),
  (75, 0.000629, 0.00357, 0.02),
  (100, 0.12, 0.182, 0.267),
  (125, 0.465, 0.604, 0.727),
  (150, 0.621, 0.761, 0.861),
)
# Every fourth step of the same DPO on pairs in the right order, with 100 times its learning rate:
# (step, loss, share of pairs in order); (step, held-out loss, low, accuracy, high).
TOO_LARGE = (
  (0, 0.693, 0.406),
  (4, 0.69, 0.375),
  (8, 0.539, 0.5),
  (12, 0.845, 0.531),
  (16, 0.642, 0.469),
  (20, 0.776, 0.406),
  (24, 0.594, 0.5),
  (28, 0.627, 0.562),
  (32, 0.73, 0.438),
  (36, 0.697, 0.344),
  (40, 0.529, 0.531),
  (44, 0.48, 0.656),
  (48, 0.655, 0.469),
  (52, 0.637, 0.438),
  (56, 0.795, 0.25),
  (60, 0.594, 0.531),
  (64, 0.639, 0.531),
  (68, 0.729, 0.406),
  (72, 0.714, 0.312),
  (76, 0.789, 0.344),
  (80, 0.653, 0.469),
  (84, 0.641, 0.5),
  (88, 0.626, 0.5),
  (92, 0.675, 0.375),
  (96, 0.569, 0.5),
)
TOO_LARGE_HELD_OUT = (
  (0, 0.693, 0.401, 0.457, 0.513),
  (25, 0.796, 0.0, 0.0, 0.037),
  (50, 0.8, 0.0, 0.0, 0.037),
  (75, 0.809, 0.0, 0.0, 0.037),
  (100, 0.813, 0.0, 0.0, 0.037),
)


def joined(trained, keys, held_out, held_out_keys):
  """The rows of a record, by step."""
  rows = {}
  for kind, names in ((trained, keys), (held_out, held_out_keys)):
    for step, *values in kind:
      rows.setdefault(step, {"step": step}).update(zip(names, values, strict=True))
  return [rows[step] for step in sorted(rows)]


ENDS = ("eval/sampled_low", "eval/sampled_accuracy", "eval/sampled_high")


def test_a_recorded_run_on_swapped_pairs():
  rows = joined(SWAPPED, ("loss", "pair_accuracy"), SWAPPED_HELD_OUT, ("eval/pair_loss", *ENDS))
  name, advice = name_and_advice(rows, steps=100)
  assert name == "taught_else" and "chosen answers are the better ones (--data=" in advice


def test_a_recorded_run_of_too_large_updates_is_not_blamed_on_its_pairs():
  """Of 0.693 the training loss keeps 0.67: not even the training pairs were learned."""
  rows = joined(TOO_LARGE, ("loss", "pair_accuracy"), TOO_LARGE_HELD_OUT, ("eval/pair_loss", *ENDS))
  found = name_and_advice(rows, **{"steps": 100, "optimizer.learning_rate": 3e-2})
  assert found == ("worse", "Try --optimizer.learning_rate=0.001")


def test_a_recorded_run_that_pauses_gets_no_sentence_at_any_evaluation():
  """Once it writes one letter three times, and at the end it is certain, and mostly right."""
  keys = ("reward_mean", "accuracy", "entropy", "truncated_fraction")
  rows = joined(PAUSES, keys, PAUSES_HELD_OUT, ENDS)
  rows = [{"rewards_ok": 512} | row if "reward_mean" in row else row for row in rows]
  config = CONFIG | {"steps": 150, "max_new_tokens": 4}
  found = [verdicts(rows[: i + 1], config) for i, row in enumerate(rows) if ENDS[0] in row]
  assert found == [[]] * 7


def test_doctests():
  assert doctest.testmod(verdicts_settings).failed == 0
