"""Which of the settings that a run has changed are said to be why it does badly."""

import doctest
import json
import math

import pytest

from experiments import distill, dpo, grpo, kto, online_dpo, ppo, reinforce, reward_model, sft
from rl_llm.runs import verdicts_suspects
from rl_llm.runs.config import flatten, overrides_of, replace, write_config
from rl_llm.runs.evidence import Evidence
from rl_llm.runs.report import read_changed
from rl_llm.runs.verdicts import verdicts
from rl_llm.runs.verdicts_ordinary import DEFAULT, ORDINARY, SWITCHED
from rl_llm.runs.verdicts_suspects import suspects
from tests.test_verdicts import CONFIG, FAULTS, flat, record
from tests.test_verdicts_examples import CONFIG as OF_EXAMPLES
from tests.test_verdicts_examples import evaluated, examples, sampled

EXPERIMENTS = (distill, dpo, grpo, kto, online_dpo, ppo, reinforce, reward_model, sft)
STANDS = record(accuracy=flat, entropy=1.2)
OWN = {"task": "copy", "jsonl.reward_file": ""}


def said(rows=STANDS, *, config=CONFIG, **changed):
  """The first verdict of a run with these settings; each is (value, default)."""
  values = {path: value for path, (value, _) in changed.items()}
  found = verdicts(rows, config | OWN | values, {path: d for path, (_, d) in changed.items()})
  return found[0] if found else None


def test_a_changed_setting_is_suspected_before_the_stock_advice():
  found = said(**{"loss.beta": (50.0, 0.1)})
  assert found.name == "unmoved" and found.says.endswith(
    "within its noise; the likeliest cause is --loss.beta=50 (default 0.1), which is steep, so "
    "that pairs soon have no gradient and the policy stays near."
  )
  assert found.advice == (
    "Try --loss.beta=0.1. Failing that, try --optimizer.learning_rate=0.0001, or more steps"
  )


def test_a_setting_that_the_stock_advice_names_is_put_back_and_not_changed_further():
  """1e-9 is 1e-4 of the default: ten times it would still be nothing."""
  found = said(**{"optimizer.learning_rate": (1e-9, 1e-5)})
  assert found.advice == "Try --optimizer.learning_rate=1e-5. Failing that, try more steps"
  assert "which makes updates small" in found.says
  found = said(**{"optimizer.learning_rate": (2e-5, 1e-5)})  # No unusual one.
  assert found.advice == "Try --optimizer.learning_rate=0.0002, or more steps"


def test_stock_advice_of_which_nothing_is_left_is_left_out():
  fell = said(record(accuracy=lambda s: 0.5 - 0.4 * s), **{"optimizer.learning_rate": (1.0, 1e-5)})
  assert (fell.name, fell.advice) == ("fell", "Try --optimizer.learning_rate=1e-5")


def test_what_can_be_the_cause_of_a_symptom_comes_first():
  """A reward stands still where updates are small, and falls where they are large."""
  both = {"optimizer.eps": (1.0, 1e-8), "optimizer.weight_decay": (0.25, 0.0)}
  stands = said(**both)
  assert stands.advice.startswith("Try --optimizer.eps=1e-8, or --optimizer.weight_decay=0.")
  fell = said(record(accuracy=lambda s: 0.5 - 0.4 * s), **both)
  assert fell.name == "fell"
  assert fell.advice.startswith("Try --optimizer.weight_decay=0, or --optimizer.eps=1e-8.")
  assert "cause is --optimizer.weight_decay=0.25 (default 0), which takes" in fell.says
  assert ", or --optimizer.eps=1 (default 1e-8), which makes" in fell.says


def test_the_value_that_is_further_outside_comes_first():
  """Twice and ten thousand times the bound, both of which hold the policy."""
  found = said(**{"kl.coef": (0.2, 0.0), "optimizer.eps": (0.1, 1e-8)})
  assert found.advice.startswith("Try --optimizer.eps=1e-8, or --kl.coef=0.")


def test_a_switch_is_named_after_the_values_outside_the_ordinary_ones():
  changed = {"loss.name": ("sapo_loss", "grpo_loss"), "optimizer.eps": (1.0, 1e-8)}
  found = said(**changed)
  assert found.advice.startswith("Try --optimizer.eps=1e-8, or --loss.name=grpo_loss.")
  assert found.says.endswith(
    "; it also differs from the defaults in --loss.name=sapo_loss (default grpo_loss)."
  )
  alone = said(**{"loss.name": ("sapo_loss", "grpo_loss"), "loss.tau_negative": (9.0, None)})
  assert alone.says.endswith(
    "noise; it differs from the defaults in --loss.name=sapo_loss (default grpo_loss) and "
    "--loss.tau_negative=9 (default none)."
  )
  assert alone.advice.startswith("Try --loss.name=grpo_loss, or --loss.tau_negative=none. Failing")


def test_no_more_than_three_are_named_and_no_long_value():
  four = ("loss.name", "preset", "system_prompt", "kl.place")
  found = said(**{path: ("x" * 60, None) for path in four})
  assert found.says.count("(default none)") == 3 and "x" * 37 + "... " in found.says
  assert "x" * 38 not in found.says


@pytest.mark.parametrize(
  "path",
  ["steps", "seed", "eval.every", "microbatch_prompts", "task", "held_out_examples", "model"],
)
def test_what_only_says_what_is_trained_and_measured_is_never_suspected(path):
  assert said(**{path: (7, 3)}).advice == "Try --optimizer.learning_rate=0.0001, or more steps"


def bounds():
  """(setting, a value outside, one inside, default, what the value does) of the table."""
  for path, row in ORDINARY.items():
    default = 0.01 if row.of == DEFAULT else None
    unit = {DEFAULT: default, 1: 1}.get(row.of, 16)
    for effect, bound, factor in ((row.under, row.low, 0.9), (row.over, row.high, 1.1)):
      if effect:
        outside = bound * unit * factor or factor - 1
        yield path, outside, bound * unit, default, effect
      elif path not in ("steps",) and math.isfinite(bound):
        yield path, None, bound * unit, default, None


@pytest.mark.parametrize(("path", "outside", "inside", "default", "effect"), [*bounds()])
def test_each_bound_of_the_table(path, outside, inside, default, effect):
  of = {"steps": 16, "max_new_tokens": 16}
  suspect = Evidence([], [], of | {path: inside}, {path: default})
  assert suspects(suspect) == []
  if effect:
    (found,) = suspects(suspect._replace(config=of | {path: outside}))
    assert found.effect == effect and found.outside > 0


@pytest.mark.parametrize(("path", "value"), SWITCHED)
def test_each_switch_of_the_table(path, value):
  (found,) = suspects(Evidence([], [], {path: value}, {path: "another"}))
  assert found.effect == SWITCHED[path, value]


def test_the_table_names_settings_that_there_are_and_no_default_is_outside_it():
  """With the values that the tiny model has in the place of SmolLM2's."""
  known = set()
  for module in EXPERIMENTS:
    usual = flatten(module.Config())
    known |= {*usual}
    tiny = replace(module.Config(), {"model": "tiny"})
    for values in (usual, usual | dict(overrides_of(module.Config)(tiny))):
      for path, value in values.items():
        assert (path, value) not in SWITCHED
        of_run = Evidence([], [], values)
        row = verdicts_suspects._ordinary(of_run, path, value)
        if row and type(value) in (int, float):
          how = verdicts_suspects._compared(of_run, row, value, value)
          assert how == (None, 0.0), (module.__name__, path, value)
  assert {*ORDINARY, *(path for path, _ in SWITCHED)} <= known


def test_a_setting_that_0_turns_off():
  """Gradients that nothing clips are not small ones; a discount of 0 is one."""
  for path, paths in (("optimizer.max_grad_norm", []), ("advantage.discount", ["advantage.disc"])):
    one = Evidence([], [], {path: 0.0}, {path: 1.0})
    assert [suspect.path[:14] for suspect in suspects(one)] == paths


def test_a_limit_cuts_nothing_where_what_is_longer_is_an_error():
  for overlong, paths in (("error", []), ("truncate_right", ["max_tokens"])):
    one = Evidence([], [], {"max_tokens": 5, "overlong": overlong}, {"max_tokens": 512})
    assert [suspect.path for suspect in suspects(one)] == paths


def test_a_price_that_is_not_there_by_default():
  """A default of 0 counts as 0.01: ten times that is ordinary, more, or less than 0, is not."""
  for coefficient, names in ((0.1, []), (0.11, ["loss.entropy_coef"]), (1e-4, [])):
    one = Evidence([], [], {"loss.entropy_coef": coefficient}, {"loss.entropy_coef": 0.0})
    assert [suspect.path for suspect in suspects(one)] == names
  below = Evidence([], [], {"loss.entropy_coef": -0.1}, {"loss.entropy_coef": 0.0})
  assert suspects(below)[0].outside == 3.0
  off = Evidence([], [], {"loss.entropy_coef": 0.0}, {"loss.entropy_coef": 0.1})
  assert suspects(off)[0].effect.says == "lets the policy become certain too early"


def test_rewards_that_no_update_has_changed_are_not_blamed_on_updates():
  never = {"reward_mean": 0.0, "accuracy": lambda s: 0.0, "frac_zero_std": 1.0}
  changed = {
    "optimizer.eps": (1.0, 1e-8),
    "loss.name": ("sapo_loss", "grpo_loss"),
    "sampling.top_k": (1, 0),
    "system_prompt": ("Write nothing.", None),
  }
  found = said(record(**never), **changed)
  assert found.name == "never_rewarded"
  assert found.advice.startswith("Try --sampling.top_k=0, or --system_prompt=none. Check that the")


def test_a_verdict_that_knows_the_cause_stays():
  """The price of the KL is over 0.5: that it holds the policy is known of it alone."""
  one = {"kl.coef": (100.0, 0.0), "optimizer.eps": (1.0, 1e-8)}
  assert said(**one).name == "held_back"
  assert said(**one).advice == "Try --kl.coef=0.01"
  found = said(record(rewards_raised=32), **{"optimizer.eps": (1.0, 1e-8)})
  assert found.name == "grader_failed" and "eps" not in found.says + found.advice


def test_a_cause_at_its_default_stands_behind_a_setting_that_was_changed():
  far = record(explained_variance=-3.0, accuracy=flat, entropy=1.2)
  of_values = {"value.learning_rate": 1e-4}
  found = said(far, config=CONFIG | of_values, **{"advantage.discount": (0.5, 1.0)})
  assert found.name == "misled" and found.advice == (
    "Try --advantage.discount=1. Failing that, try --value.learning_rate=1e-5"
  )
  found = said(far, config=CONFIG | of_values)
  assert found.advice == "Try --value.learning_rate=1e-5"


def test_a_grader_of_one_s_own_is_suspected_where_no_setting_is():
  own = {"reward": "mine.py:pays", "task": "copy", "jsonl.reward_file": ""}
  (found,) = verdicts(STANDS, CONFIG | own, {"reward": "task"})
  check = "Check that the grader pays more for a better response (--reward=mine.py:pays)"
  assert found.advice == f"{check}. Try --optimizer.learning_rate=0.0001, or more steps"
  both = {"reward": "task", "optimizer.eps": 1e-8}
  (found,) = verdicts(STANDS, CONFIG | own | {"optimizer.eps": 1.0}, both)
  assert found.advice.startswith(f"Try --optimizer.eps=1e-8. {check}. Failing that, try --optim")


def test_a_file_of_examples_is_suspected_where_no_setting_is():
  still = {"loss": lambda s: 2 - 0.001 * s, "eval/token_loss": lambda s: 2 - 0.001 * s}
  rows = examples(right=lambda s: 0.1, **still)
  check = "Check that the examples are right and whole (--data=mine.jsonl)"
  assert verdicts(rows, OF_EXAMPLES, {"data": "task"})[0].advice.startswith(check)
  assert verdicts(rows, OF_EXAMPLES)[0].advice.startswith("Try --optimizer")
  odd = OF_EXAMPLES | {"loss.label_smoothing": 0.4}
  (found,) = verdicts(rows, odd, {"loss.label_smoothing": None, "data": "task"})
  assert found.advice.startswith(f"Try --loss.label_smoothing=none. {check}. Failing that, try")


def test_problems_by_heart_are_a_setting_s_doing_only_if_its_value_is_unusual():
  rows = evaluated(sampled(right=lambda s: min(1.0, 0.1 + 2 * s)), 0.3)
  assert said(rows, **{"loss.name": ("sapo_loss", "grpo_loss")}).advice == (
    "Try more problems, or fewer steps"
  )
  found = said(rows, **{"sampling.min_new_tokens": (16, 0)})
  assert found.name == "by_heart"
  assert found.advice.startswith("Try --sampling.min_new_tokens=0. Failing that, try more problems")


def test_a_grader_with_a_hole_is_a_setting_s_doing_only_if_it_says_what_is_right():
  rows = record(accuracy=lambda s: 0.0, reward_mean=lambda s: min(s, 0.5))
  rows = [row | {key: 0.0 for key in row if "accuracy" in key or "_high" in key} for row in rows]
  config = CONFIG | {"jsonl.max_reward": 2.0, "optimizer.eps": 1.0}
  (found,) = verdicts(rows, config, {"jsonl.max_reward": 1.0, "optimizer.eps": 1e-8})
  assert found.name == "overlooked"
  assert found.advice.startswith("Try --jsonl.max_reward=1. Check what it pays for")
  assert "eps" not in found.says + found.advice
  of_own = {"jsonl.max_reward": 1.0, "jsonl.reward_file": ""}  # Who grades is no cause as yet.
  assert verdicts(rows, config, of_own)[0].advice.startswith("Try --jsonl.max_reward=1. Check")


def test_a_limit_that_cuts_is_raised_and_the_problems_are_left():
  """Of what the problems are made of only what makes them hard, or few, is suspected."""
  rows = record(accuracy=lambda s: 0.03, truncated_fraction=0.9)
  made_of = {"copy.alphabet": ("ab", "abcd"), "loss.name": ("sapo_loss", "grpo_loss")}
  assert said(rows, **made_of).advice == "Try --max_new_tokens=32"
  found = said(rows, **made_of, **{"max_new_tokens": (4, 16)})
  assert found.advice == "Try --max_new_tokens=16"


def test_a_limit_that_cuts_nothing_is_no_suspect():
  assert suspects(Evidence(record(), [], {"max_new_tokens": 4}, {"max_new_tokens": 16})) == []
  cut = record(truncated_fraction=0.5)
  (found,) = suspects(Evidence(cut, [], {"max_new_tokens": 4}, {"max_new_tokens": 16}))
  assert found.path == "max_new_tokens" and found.effect
  unknown = [{k: v for k, v in row.items() if k != "truncated_fraction"} for row in record()]
  assert suspects(Evidence(unknown, [], {"max_new_tokens": 4}, {"max_new_tokens": 16}))


def test_a_setting_of_several_values_is_a_suspect_as_any():
  """They are lists in a config.json, which have no hash."""
  (found,) = suspects(Evidence(record(), [], {"mine.ends": ["a", "b"]}, {"mine.ends": ["a"]}))
  assert (found.path, found.effect) == ("mine.ends", None)
  assert "--mine.ends=a,b (default a)" in said(**{"mine.ends": (["a", "b"], ["a"])}).says


def test_the_whole_reward_is_no_suspect_where_the_grader_pays_more_than_the_default():
  whole = {"jsonl.max_reward": 10.0}, {"jsonl.max_reward": 1.0}
  for paid, count in ((0.9, 1), (1.5, 0)):
    assert len(suspects(Evidence([{"reward_mean": paid}], [], *whole))) == count


def test_examples_of_one_s_own_that_teach_something_else_come_before_settings():
  """They are learned: what they say is doubted first. Problems are not what is learned."""
  losses = {"eval/pair_loss": lambda s: 0.69 - 0.4 * s, "pair_accuracy": 0.9}
  rows = examples(right=lambda s: 0.4 - 0.4 * s, loss=lambda s: 0.69 - 0.4 * min(s, 0.7), **losses)
  odd = {"optimizer.learning_rate": (1.0, 1e-5), "copy.held_out": (100, 20)}
  own = {"data": ("pairs.jsonl", "on_policy")}
  found = said(rows, config=OF_EXAMPLES, **odd, **own)
  assert found.name == "taught_else" and found.advice.startswith("Check that the chosen answers")
  assert found.advice.endswith("Failing that, try --optimizer.learning_rate=1e-5")
  assert "likeliest" not in found.says
  found = said(rows, config=OF_EXAMPLES, **odd)
  assert found.name == "taught_else" and "; the likeliest cause is --" in found.says
  assert "--optimizer.learning_rate=1 (" in found.says and "--copy.held_out=100 (" in found.says


def test_a_run_that_does_well_is_not_asked_what_it_changed():
  odd = {path: 1e9 for path in {*ORDINARY} - {"loss.entropy_coef"}}  # It has a rule of its own.
  rows = record()
  for count in range(1, len(rows) + 1):
    assert verdicts(rows[:count], CONFIG | odd, {path: 1.0 for path in odd}) == []


def slow(rise):
  """A run of which each rule is silent: its reward rises by so little to the end."""
  return record(accuracy=lambda s: 0.1 + rise * s)


def test_a_run_that_ended_with_little_learned_and_an_unusual_setting():
  odd = {"optimizer.eps": (1e-3, 1e-8)}
  found = said(slow(0.2), **odd)
  assert found.name == "short_of" and found.advice == "Try --optimizer.eps=1e-8"
  assert found.says.startswith("At the end 25% of the answers are right, after 10% in the begin")
  assert said(slow(0.2)) is None
  assert said(slow(0.2), **{"loss.name": ("sapo_loss", "grpo_loss")}) is None
  assert said(slow(0.4), **odd) is None  # At step 45 of 59, by 0.305.
  assert said(slow(0.2), config=CONFIG | {"steps": 100}, **odd) is None  # It is not over.
  assert said(slow(0.2)[:9], config=CONFIG | {"steps": 9}, **odd) is None  # Too short to say.
  high = record(accuracy=lambda s: 0.55 + 0.1 * s)
  assert said(high, **odd) is None


def test_pairs_in_order_are_compared_with_a_coin():
  """0.55 of the pairs in order is a tenth of the way from a coin's half to all."""

  def rows(share):
    pairs = {"eval/pair_accuracy": lambda s: 0.5 + share * s, "eval/token_loss": None}
    kept = examples(right=lambda s: 0.1, **pairs)
    return [{k: v for k, v in row.items() if "sampled" not in k} for row in kept]

  odd = {"center_coef": (9.0, 0.01)}
  assert said(rows(0.05), config=OF_EXAMPLES, **odd).name == "short_of"
  assert "10% of the answers" in said(rows(0.05), config=OF_EXAMPLES, **odd).says
  assert said(rows(0.4), config=OF_EXAMPLES, **odd) is None


def test_an_old_run_whose_defaults_nobody_knows_gets_the_stock_advice():
  for rows, _ in FAULTS.values():
    assert verdicts(rows, CONFIG | {"optimizer.eps": 1.0}, {}) == verdicts(rows, CONFIG)


def test_rewards_that_lie_far_from_zero_and_nothing_that_is_taken_off():
  """The mean of 100 rewards varies by 0.04 from step to step: a reward by 0.4."""
  by_turns = {"reward_mean": 10.2, "rewards_ok": 100, "entropy": lambda s: 1.2 - 0.4 * s}
  rows = record(accuracy=flat, **by_turns)

  def around(mean, spread):
    """Steps whose means have this standard deviation: by turns above and below."""
    by = [spread * ((14 / 15) ** 0.5) * (-1) ** row["step"] for row in rows]  # Of 15, n - 1 is 14.
    return [row | {"reward_mean": mean + each} for row, each in zip(rows, by, strict=True)]

  plain = CONFIG | {"advantage.name": "plain"}
  (found,) = verdicts(around(10.2, 0.04), plain, {"advantage.name": "leave_one_out"})
  assert found.name == "no_baseline" and "Rewards are 10 with a spread of 0.4" in found.says
  assert found.advice.startswith("Try --advantage.name=leave_one_out; or have the grader give")
  assert "blamed" in verdicts(around(-10.2, 0.04), plain)[0].says
  right = [row | {"accuracy": 1.0} for row in around(10.2, 0.04)]
  assert verdicts(right, plain)[0].name == "no_baseline"  # 10.2 is over a right answer's 1 as well.
  most = [row | {"accuracy": 0.96} for row in around(0.96, 0.02)]
  assert verdicts(most, plain) == []
  near = around(10.2, 0.26)  # 10.2 is less than 4 times 2.6.
  for others, config in (
    (near, plain),
    (around(10.2, 0.04), CONFIG | {"advantage.name": "leave_one_out"}),
  ):
    assert "no_baseline" not in [verdict.name for verdict in verdicts(others, config)]


@pytest.mark.parametrize(
  ("overlong", "part"), [("truncate_right", "end"), ("truncate_left", "beginning")]
)
def test_examples_that_are_not_whole(overlong, part):
  rows = examples(right=lambda s: 0.0, data_rows=50, data_overlong=30)
  config = OF_EXAMPLES | {"max_tokens": 5, "overlong": overlong}
  (found,) = verdicts(rows, config)
  assert found.name == "answers_cut" and found.advice == "Try --max_tokens=20"
  assert found.says.startswith(
    f"60% of the examples are longer than 5 tokens and have lost their {part}"
  )
  whole = config | {"overlong": "error"}
  fewer = [row | {"data_overlong": 9} for row in rows]  # 18 %.
  right = examples(right=lambda s: 0.6 * s, data_rows=50, data_overlong=30)
  for others, settings in ((rows, whole), (fewer, config), (right, config)):
    assert verdicts(others, settings) == []


def test_examples_of_no_task_are_not_whole():
  """Nothing says how well it does: told where most are cut, since long chats are cut on purpose."""
  rows = examples(data_rows=50, data_overlong=30)
  rows = [{key: row[key] for key in row if "sampled" not in key} for row in rows]
  config = OF_EXAMPLES | {"max_tokens": 5, "overlong": "drop"}
  assert [verdict.name for verdict in verdicts(rows, config)] == ["answers_cut"]
  assert verdicts([row | {"data_overlong": 24} for row in rows], config) == []


def test_an_old_run_has_changed_what_its_experiment_has_not_by_default(tmp_path):
  """Its directory has no changed.json: the experiment that its inputs name knows."""
  config = grpo.Config(model="tiny", task="copy", **{"optimizer.eps": 1.0})
  write_config(config, tmp_path)
  changed = {"model": "smollm2", "task": "arithmetic", "optimizer.eps": 1e-8}
  assert read_changed(tmp_path) == changed
  (tmp_path / "changed.json").unlink()
  assert read_changed(tmp_path) == {}
  for module, found in (
    ("experiments.grpo", changed),
    ("experiments.flags", {}),
    ("experiments.gone", {}),
    ("os", {}),
    (None, {}),
  ):
    (tmp_path / "inputs.json").write_text(json.dumps({"program": {"module": module}}))
    assert read_changed(tmp_path) == found
  (tmp_path / "inputs.json").write_text(json.dumps({"program": {"module": "experiments.sft"}}))
  assert read_changed(tmp_path) == {}  # It has none of these settings.


def test_doctests():
  assert doctest.testmod(verdicts_suspects).failed == 0
