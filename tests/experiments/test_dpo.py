"""DPO: its objective against plain Python, pairs from files and from samples, interruptions."""

from __future__ import annotations

import math
import signal

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments import dpo, sft
from rl_llm import losses, weighting
from rl_llm.data import DataError
from rl_llm.data.batches import SequenceBatch
from rl_llm.data.encoding import Encoded, Pair, flat
from rl_llm.errors import ConfigError
from rl_llm.runs.config import replace
from rl_llm.runs.signals import Interrupted
from rl_llm.training import pairs as pairs_lib
from rl_llm.training import reference_cache
from rl_llm.training.pairs import PairBatch
from tests.experiments.helpers import FULL, equal, run, settings
from tests.experiments.test_sft import nll, stopped, write
from tests.representatives import mostly_slow


@pytest.fixture
def data(tmp_path):
  """20 prompts, each with another letter; to each, y again and again is better than n."""
  rows = []
  for n in range(20):
    prompt = f"{chr(97 + n)}{'?' * (n % 4 + 1)}"
    rows.append({"prompt": prompt, "chosen": "y" * (n % 5 + 3), "rejected": "n" * (n % 3 + 2)})
  return write(tmp_path / "pairs.jsonl", rows)


def offline(data, **changes):
  return {
    "model": "tiny",
    "data": str(data),
    "task": "none",
    "prompt_format": "plain",
    "held_out_fraction": 0.2,
    "steps": 2,
    "pairs_per_step": 4,
    "max_tokens": 16,
    "microbatch_pairs": 4,
    "optimizer.learning_rate": 0.01,
  } | changes


def online(files, **changes):
  """The settings of experiments that sample, in this one's words."""
  base = settings(files)
  base["pairs_per_step"] = base.pop("prompts_per_step")
  base["microbatch_pairs"] = base.pop("microbatch_prompts")
  return base | {"optimizer.learning_rate": 0.01} | changes


# The objective.


def log_sigmoid(x):
  return -math.log1p(math.exp(-x))


def sigmoid(x):
  return 1 / (1 + math.exp(-x))


def log_odds(p):
  return p - math.log(1 - math.exp(p))


# Of a pair: log-ratios c and r to the reference, log-probs pc and pr, with each loss's default
# numbers. Those of PER_TOKEN get averages, the others sums.
FORMULAS = {
  "dpo_loss": lambda c, r, pc, pr: -log_sigmoid(0.1 * (c - r)),
  "robust_dpo_loss": lambda c, r, pc, pr: (
    (-0.9 * log_sigmoid(0.1 * (c - r)) + 0.1 * log_sigmoid(-0.1 * (c - r))) / 0.8
  ),
  "hinge_dpo_loss": lambda c, r, pc, pr: max(0, 1 - 0.1 * (c - r)),
  "ipo_loss": lambda c, r, pc, pr: (c - r - 5) ** 2,
  "exo_loss": lambda c, r, pc, pr: sum(
    q * (math.log(q) - math.log(label))
    for q, label in ((sigmoid(0.1 * (c - r)), 0.999), (sigmoid(0.1 * (r - c)), 0.001))
  ),
  "nca_loss": lambda c, r, pc, pr: (
    -log_sigmoid(0.1 * c) - 0.5 * (log_sigmoid(-0.1 * c) + log_sigmoid(-0.1 * r))
  ),
  "bco_loss": lambda c, r, pc, pr: -log_sigmoid(0.1 * c) - log_sigmoid(-0.1 * r),
  "sppo_loss": lambda c, r, pc, pr: (c - 5) ** 2 + (r + 5) ** 2,
  "apo_zero_loss": lambda c, r, pc, pr: 1 - sigmoid(0.1 * c) + sigmoid(0.1 * r),
  "apo_down_loss": lambda c, r, pc, pr: sigmoid(0.1 * c) + 1 - sigmoid(0.1 * (c - r)),
  "discopop_loss": lambda c, r, pc, pr: (
    (1 - sigmoid(0.1 * (c - r) / 0.05)) * -log_sigmoid(0.1 * (c - r))
    + sigmoid(0.1 * (c - r) / 0.05) * math.exp(-0.1 * (c - r))
  ),
  "simpo_loss": lambda c, r, pc, pr: -log_sigmoid(2 * (pc - pr) - 1),
  "alphapo_loss": lambda c, r, pc, pr: (
    -log_sigmoid(2.5 * (math.exp(-pr / 4) - math.exp(-pc / 4)) / 0.25 - 0.1)
  ),
  "cpo_loss": lambda c, r, pc, pr: -log_sigmoid(0.1 * (pc - pr)) - pc,
  "orpo_loss": lambda c, r, pc, pr: -pc - 0.1 * log_sigmoid(log_odds(pc) - log_odds(pr)),
}


def test_the_formulas_are_of_all_losses_that_can_be_chosen():
  from typing import get_type_hints

  names = set(get_type_hints(dpo.Loss)["name"].__args__)
  assert names == {*FORMULAS, "aot_loss"}
  assert {name for name in names if not dpo.needs_reference(dpo.Loss(name=name))} == {
    "alphapo_loss",
    "simpo_loss",
    "cpo_loss",
    "orpo_loss",
  }


def ready(config, batch, ref_logprobs):
  """The batch with the reference's log-probs, and the numbers that its loss reads."""
  batch, given = dpo.with_constants(config.loss, batch, ref_logprobs, None)
  return batch, {"loss": given, "sft_coef": jnp.float32(config.loss.sft_coef)}


def objective(changes, monkeypatch, *, halved=False):
  """Loss, metrics, the gradient in each log-prob, and what went in: 3 pairs and a free place."""
  rng = np.random.default_rng(0)
  mask = np.arange(6) < rng.integers(2, 6, size=(8, 1))
  logprobs = np.where(mask, -rng.uniform(0.1, 2.0, size=mask.shape), 0).astype(np.float32)
  ref = [row[m] + rng.normal(0, 0.3, m.sum()) for row, m in zip(logprobs, mask, strict=True)][:6]
  name = "rl_llm.training.pairs.teacher_forced_logprobs"
  monkeypatch.setattr(name, lambda params, *_, **__: (params, 0))
  config = replace(dpo.Config(), changes)
  weights = np.array([1 / 3, 1 / 3, 1 / 3, 0], np.float32)
  is_chosen = np.arange(8)[:, None] % 2 == 0
  batch = dpo.Batch(
    PairBatch(SequenceBatch(None, mask, None, None), None, weights),
    np.asarray(weighting.token_mean(mask & is_chosen)),
  )
  batch, hparams = ready(config, batch, ref)
  loss_fn = dpo.make_loss(config, None)
  value_and_grad = jax.value_and_grad(loss_fn, has_aux=True)
  (loss, metrics), gradient = value_and_grad(jnp.array(logprobs), batch, hparams)
  if halved:  # Two microbatches add up to the whole.
    halves = [jax.tree.map(lambda x, i=i: np.split(x, 2)[i], (logprobs, batch)) for i in (0, 1)]
    parts = [float(loss_fn(jnp.array(of), part, hparams)[0]) for of, part in halves]
    assert sum(parts) == pytest.approx(float(loss), rel=1e-5) and all(parts)
  return loss, metrics, np.asarray(gradient), (logprobs, ref, mask)


@pytest.mark.parametrize("name", FORMULAS)
def test_each_loss_sees_the_right_answers_on_the_right_side(name, monkeypatch):
  changes = {"loss.name": name, "loss.sft_coef": 0.5}
  loss, metrics, _, (logprobs, ref, mask) = objective(changes, monkeypatch, halved=True)
  wanted, gaps = 0.0, []
  for pair in range(3):
    own, refs, sums = [], [], []
    for row in (2 * pair, 2 * pair + 1):
      size = int(mask[row].sum())
      per = size if name in dpo.PER_TOKEN else 1
      own.append(sum(map(float, logprobs[row][mask[row]])) / per)
      refs.append(sum(map(float, ref[row])) / per)
      sums.append(sum(map(float, logprobs[row][mask[row]])))
    gaps.append(sums)
    wanted += FORMULAS[name](own[0] - refs[0], own[1] - refs[1], *own) / 3
  chosen = [-value for row in (0, 2, 4, 6) for value in logprobs[row][mask[row]]]
  wanted += 0.5 * sum(chosen) / len(chosen)
  assert float(loss) == pytest.approx(wanted, rel=1e-4)
  for side, key in enumerate(("chosen_logprobs", "rejected_logprobs")):
    assert float(metrics[key][0]) == pytest.approx(sum(both[side] for both in gaps), rel=1e-5)
    assert int(metrics[key][1]) == 3
  assert {"pair_accuracy", "margin", "chosen_reward", "rejected_reward"} <= metrics.keys()


def test_tokens_past_the_shorter_answer_count_as_told(monkeypatch):
  """LD-DPO, in the log-probs of both the policy and the reference."""
  changes = {"loss.name": "dpo_loss", "loss.tail_weight": 0.25}
  loss, _, gradient, (logprobs, ref, mask) = objective(changes, monkeypatch)
  wanted, tails = 0.0, 0
  for pair in range(3):
    sizes = [int(mask[row].sum()) for row in (2 * pair, 2 * pair + 1)]
    sides = []
    for row in (2 * pair, 2 * pair + 1):
      change = logprobs[row][mask[row]] - ref[row]
      sides.append(change[: min(sizes)].sum() + 0.25 * change[min(sizes) :].sum())
    wanted -= log_sigmoid(0.1 * (sides[0] - sides[1])) / 3
    longer = 2 * pair + int(np.argmax(sizes))
    head, tail = gradient[longer][0], gradient[longer][max(sizes) - 1]
    assert sizes[0] == sizes[1] or tail == pytest.approx(0.25 * head, rel=1e-4)
    tails += sizes[0] != sizes[1]
  assert tails and float(loss) == pytest.approx(wanted, rel=1e-4)


def test_the_objective_is_the_formula_from_the_logits_on(small):
  """Through the model, with the likelihood of the chosen answers (RPO)."""
  pairs = [
    Pair(
      Encoded([97, 98, 99, 258], [False, False, True, True], 2),
      Encoded([97, 98, 258], [False, False, True], 2),
    ),
    Pair(
      Encoded([120, 122, 258], [False, True, True], 1),
      Encoded([120, 104, 105, 106, 258], [False, True, True, True, True], 1),
    ),
  ]
  params, reference = (jax.jit(small.init)(jax.random.key(seed)) for seed in (0, 1))
  params["embed"] = jax.tree.map(lambda x: 3 * x, params["embed"])
  config = replace(dpo.Config(), {"loss.beta": 0.5, "loss.sft_coef": 0.25})
  batch, _ = dpo.make_batch(pairs, rows=3, pad_id=0)
  known = [
    np.concatenate([np.zeros(s.prompt_length), -np.array(nll(small, reference, s))])
    for s in flat(pairs)
  ]
  batch, hparams = ready(config, batch, known)
  loss, metrics = jax.jit(dpo.make_loss(config, small))(params, batch, hparams)

  each = [[nll(small, params, s) for s in pair] for pair in pairs]
  of_reference = [[nll(small, reference, s) for s in pair] for pair in pairs]
  wanted, chosen_tokens, margins = 0.0, [], []
  for pair, refs in zip(each, of_reference, strict=True):
    c, r = (sum(ref) - sum(own) for own, ref in zip(pair, refs, strict=True))
    margins.append(0.5 * (c - r))
    wanted += -log_sigmoid(margins[-1]) / 2
    chosen_tokens += pair[0]
  wanted += 0.25 * sum(chosen_tokens) / len(chosen_tokens)
  assert float(loss) == pytest.approx(wanted, abs=2e-5)
  assert float(metrics["margin"][0] / metrics["margin"][1]) == pytest.approx(
    sum(margins) / 2, abs=1e-4
  )


# Pairs of a file.


@pytest.mark.slow
def test_the_first_loss_is_log_2_and_then_margins_rise(tmp_path, small, data):
  found = run(dpo, tmp_path / "run", offline(data, steps=12, **{"loss.beta": 0.5}))
  steps = found.metrics[:-1]
  assert abs(steps[0]["loss"] - math.log(2)) < 1e-5
  assert abs(steps[0]["margin"]) < 1e-4
  assert steps[-1]["margin"] > 1 and steps[-1]["loss"] < 0.5
  assert steps[-1]["pair_accuracy"] == 1
  assert steps[-1]["chosen_reward"] - steps[-1]["rejected_reward"] == pytest.approx(
    steps[-1]["margin"], abs=1e-4
  )
  first, last = found.metrics[0], found.metrics[-1]
  assert abs(first["eval/pair_loss"] - math.log(2)) < 1e-5
  assert last["eval/pair_loss"] < first["eval/pair_loss"]
  assert last["eval/margin"] > 0.5 and last["eval/pair_accuracy"] == 1
  gaps = [row["eval/chosen_logprobs"] - row["eval/rejected_logprobs"] for row in (first, last)]
  assert 0.5 * (gaps[1] - gaps[0]) == pytest.approx(last["eval/margin"], abs=1e-3)


LOSS_FLAGS = [
  {},
  {"loss.beta": 0.3},
  {"loss.label_smoothing": 0.3},
  {"loss.divergence": "forward_kl"},
  {"loss.divergence": "js"},
  {"loss.divergence": "alpha"},
  {"loss.divergence": "alpha", "loss.alpha": 0.3},
  {"loss.logprobs": "mean"},
  {"loss.sft_coef": 1.0},
  {"loss.name": "ipo_loss", "loss.logprobs": "sum"},
  {"loss.name": "discopop_loss", "loss.temperature": 0.5},
  {"loss.name": "simpo_loss", "loss.gamma": 0.1},
  {"loss.name": "cpo_loss", "loss.nll_coef": 0.1},
  {"loss.name": "aot_loss"},
  *({"loss.name": name} for name in FORMULAS if name != "dpo_loss"),
]


def test_every_flag_of_the_loss_changes_the_gradient(monkeypatch):
  found = []
  for changes in LOSS_FLAGS:
    found.append(objective(changes, monkeypatch)[2].tobytes())
    assert found.count(found[-1]) == 1, (changes, LOSS_FLAGS[found.index(found[-1])])


FLAGS = [
  {"dtype": "bfloat16"},
  {"seed": 1},
  {"pairs_per_step": 8},
  {"held_out_fraction": 0.5},
  {"max_tokens": 11, "overlong": "drop"},
  {"max_tokens": 11, "overlong": "truncate_left"},
  {"max_tokens": 11, "overlong": "truncate_right"},
  {"prompt_format": "chat"},
  {"prompt_format": "chat", "system_prompt": "Be brief."},
  {"sampling.temperature": 0.7},
  {"loss.sft_coef": 1.0},
]


@pytest.mark.skipif(not FULL, reason="a run for each flag: RL_LLM_FULL=1")
def test_every_other_flag_changes_the_weights_that_come_out(tmp_path, small, data):
  base = offline(data, max_tokens=64, steps=4)  # an epoch, so that each pair is met
  weights = [run(dpo, tmp_path / "base", base).params]
  for number, changes in enumerate(FLAGS):
    changes = {"microbatch_pairs": 8} | changes
    weights.append(run(dpo, tmp_path / str(number), base | changes).params)
    same = [i for i, earlier in enumerate(weights[:-1]) if equal(earlier, weights[-1])]
    assert not same, (changes, ["base", *FLAGS][same[0]])


@pytest.mark.slow
@pytest.mark.parametrize(
  "changes", [{}, {"loss.name": "bco_loss", "loss.shift": "batch", "loss.sft_coef": 0.5}]
)
def test_microbatches_change_nothing(tmp_path, small, data, changes):
  # An eps that is not tiny: Adam else turns rounding of a gradient near 0 into a whole step.
  base = offline(data) | {"optimizer.eps": 1e-2} | changes
  whole = run(dpo, tmp_path / "whole", base).params
  parts = run(dpo, tmp_path / "parts", base | {"microbatch_pairs": 1}).params
  for name, leaf in whole.items():
    np.testing.assert_allclose(leaf, parts[name], rtol=0, atol=1e-5)


def test_the_shift_of_bco_is_that_of_the_whole_batch(tmp_path, small, data, monkeypatch):
  original, shifts = losses.bco_shift, []

  def bco_shift(answers, ref_answers, desirable, *, beta=0.1, where):
    found = original(answers, ref_answers, desirable, beta=beta, where=where)
    rewards = float(beta) * (np.asarray(answers) - np.asarray(ref_answers))[where]
    means = rewards[0::2].mean(), rewards[1::2].mean()
    shifts.append((float(found), sum(means) / 2, len(rewards), float(beta)))
    return found

  monkeypatch.setattr(losses, "bco_shift", bco_shift)
  changes = {"loss.name": "bco_loss", "loss.shift": "batch", "loss.beta": 0.5}
  run(dpo, tmp_path / "run", offline(data, steps=3, microbatch_pairs=1, **changes))
  in_training = [shift for shift in shifts if shift[2] == 8]
  assert len(in_training) >= 3 and {shift[3] for shift in shifts} == {0.5}
  for found, wanted, _, _ in shifts:
    assert found == pytest.approx(wanted, abs=1e-5)
  assert abs(in_training[-1][0]) > 1e-3


@pytest.mark.slow
def test_the_reference_is_scored_once_and_kept(tmp_path, small, data, monkeypatch):
  cache = tmp_path / "cache"
  base = offline(data, reference_cache=str(cache))
  first = run(dpo, tmp_path / "first", base)
  assert len(list(cache.iterdir())) == 1
  assert not list((tmp_path / "first").glob("*.npz"))

  original = reference_cache.cached_logprobs

  def compute():
    raise AssertionError("computed again")

  monkeypatch.setattr(
    reference_cache, "cached_logprobs", lambda path, key, _: original(path, key, compute)
  )
  assert equal(run(dpo, tmp_path / "second", base).state, first.state)  # another run shares it
  run(dpo, tmp_path / "free", offline(data, **{"loss.name": "simpo_loss"}))  # and this needs none
  with pytest.raises(AssertionError, match="computed again"):
    run(dpo, tmp_path / "other", base | {"seed": 1})  # other weights are another reference


def margins(found):
  return np.array([abs(row["margin"]) for row in found.metrics if "margin" in row])


@pytest.mark.parametrize("source", mostly_slow(["file", "on policy"], quick=[0]))
def test_a_refreshed_reference_is_the_policy_of_that_step(tmp_path, small, data, files, source):
  """The margin of a policy over itself is 0; held-out pairs are compared with the first weights."""
  base = offline(data) if source == "file" else online(files, **{"eval.every": 0})
  found = run(dpo, tmp_path / "run", base | {"steps": 4, "reference.refresh": 2})
  assert max(margins(found)[0::2]) < 1e-5 < min(margins(found)[1::2])
  if source == "file":
    assert found.metrics[0]["eval/margin"] == 0 != found.metrics[-1]["eval/margin"]
    # Of the same pairs, most of which the policy would hardly have written, WPO learns less.
    wpo = run(dpo, tmp_path / "wpo", base | {"steps": 1, "loss.wpo": True})
    assert 0 < wpo.metrics[0]["grad_norm"] < found.metrics[0]["grad_norm"]


@pytest.mark.slow
def test_a_reference_goes_part_of_the_way(tmp_path, small, data):
  never, half = (
    margins(run(dpo, tmp_path / str(n), offline(data, steps=3, **changes)))
    for n, changes in enumerate([{}, {"reference.refresh": 2, "reference.keep": 0.5}])
  )
  np.testing.assert_allclose(half[:2], never[:2], atol=1e-6)
  assert 1e-5 < half[2] < never[2]


def test_conversations_and_pairs_that_begin_alike(tmp_path, small):
  def talk(answer):
    return [{"role": "user", "content": "2+2?"}, {"role": "assistant", "content": answer}]

  # All of 17 to 24 tokens: a program for each width would take most of the time.
  start = "\n\nHuman: {n} and 0?\n\nAssistant: ".format
  rows = {
    "messages": [
      {
        "prompt": [{"role": "user", "content": f"{n} and 0?"}],
        "chosen": talk("4")[1:],
        "rejected": talk("5" * (n % 3 + 1))[1:],
      }
      for n in range(1, 25)
    ],
    "implicit": [{"chosen": f"{n} and 0= {n}", "rejected": f"{n} and 0= x"} for n in range(1, 25)],
    "transcripts": [
      {"chosen": start(n=n) + "yes", "rejected": start(n=n) + "no"} for n in range(1, 25)
    ],
  }
  for name, lines in rows.items():
    path = write(tmp_path / f"{name}.jsonl", lines)
    found = run(dpo, tmp_path / name, offline(path, prompt_format="auto", max_tokens=64, steps=1))
    assert abs(found.metrics[0]["loss"] - math.log(2)) < 1e-5, name
    assert found.metrics[0]["chosen_length"] > 1


BROKEN = ["{", '{"prompt": "a", "chosen": "b"}', '{"prompt": "a", "chosen": 1, "rejected": "c"}']


def test_a_broken_row_stops_with_its_line_or_is_dropped_and_counted(tmp_path, small, data):
  lines = data.read_text().splitlines()
  data.write_text("\n".join([*lines[:5], *BROKEN, *lines[5:]]) + "\n")
  with pytest.raises(DataError, match=r"pairs\.jsonl:6: not JSON"):
    run(dpo, tmp_path / "strict", offline(data))
  found = run(dpo, tmp_path / "lenient", offline(data, data_errors="lenient"))
  assert found.metrics[0]["data_broken"] == len(BROKEN)
  rows = write(tmp_path / "rows.jsonl", [{"prompt": "a", "completion": "b"}] * 3)
  with pytest.raises(DataError, match="rows of the format prompt_completion, .*preference"):
    run(dpo, tmp_path / "rows", offline(rows))


# Pairs of the model's own responses.


def test_on_policy_pairs_are_the_best_against_the_worst(tmp_path, small, files, monkeypatch):
  original, batches = dpo.make_batch, []

  def make_batch(pairs, **keywords):
    batches.append(pairs)
    return original(pairs, **keywords)

  monkeypatch.setattr(dpo, "make_batch", make_batch)
  changes = {"jsonl.reward_function": "spread_for_some", "sampling.temperature": 0.7}
  found = run(dpo, tmp_path / "run", online(files, steps=3, **changes))
  assert abs(found.metrics[0]["loss"] - math.log(2)) < 1e-5  # at that temperature too
  assert {row["pairs"] for row in found.metrics[:-1]} - {0, 4}
  given = iter(batches)
  for step in range(3):
    rows = [r for r in found.samples if r["step"] == step and r["split"] == "train"]
    pairs = []
    for group in (rows[i : i + 4] for i in range(0, 16, 4)):
      rewards = [row["reward"] for row in group]
      signs = [row["advantage"] for row in group]
      if min(rewards) == max(rewards):
        assert signs == [0] * 4
        continue
      assert sorted(signs) == [-1, 0, 0, 1]
      assert rewards[signs.index(1)] == max(rewards) and rewards[signs.index(-1)] == min(rewards)
      pairs.append((group[signs.index(1)], group[signs.index(-1)]))
    assert found.metrics[step]["pairs"] == len(pairs)
    for pair, sides in zip(next(given) if pairs else [], pairs, strict=True):
      for sequence, row in zip(pair, sides, strict=True):
        assert bytes(sequence.tokens[: sequence.prompt_length]).decode() == row["prompt"]
        assert sum(sequence.mask) == row["length"]
        assert len(sequence.tokens) == sequence.prompt_length + row["length"]


@pytest.mark.slow
def test_where_all_grades_are_equal_nothing_is_learned(tmp_path, small, files):
  changes = {"jsonl.reward_function": "lonely"}  # 1, or no grade at all
  found = run(dpo, tmp_path / "run", online(files, **changes))
  assert [row["pairs"] for row in found.metrics[:-1]] == [0, 0]
  assert all("loss" not in row for row in found.metrics)
  other = run(dpo, tmp_path / "other", online(files, steps=1, **changes))
  assert equal(found.params, other.params)


@pytest.mark.skipif(not FULL, reason="a run for each flag: RL_LLM_FULL=1")
def test_flags_of_sampling_change_the_weights(tmp_path, small, files):
  base = online(files)
  weights = [run(dpo, tmp_path / "base", base).params]
  for number, changes in enumerate(
    (
      {"responses_per_prompt": 3},
      {"sampling.temperature": 0.7},
      {"overlong_prompt": "truncate_left", "max_prompt_tokens": 12},
    )
  ):
    weights.append(run(dpo, tmp_path / str(number), base | changes).params)
    assert not any(equal(earlier, weights[-1]) for earlier in weights[:-1]), changes


# What does not fit, and interruptions.


@pytest.mark.parametrize(
  ("changes", "message"),
  [
    ({"data": "on_policy"}, r"--data=on_policy: must be a file where there is no task"),
    ({"held_out_fraction": 0.0}, r"--held_out_fraction=0: must be above 0, where nothing else"),
    ({"microbatch_pairs": 3}, r"--microbatch_pairs=3: must be a divisor.*--microbatch_pairs=2"),
    (
      {"loss.gamma": 1.0},
      r"--loss\.gamma=1\.0: must be left out with --loss=dpo_loss; which has "
      "beta, label_smoothing, divergence, alpha",
    ),
    ({"loss.shift": "batch"}, r"--loss\.shift=batch: must be left out with --loss=dpo_loss"),
    ({"loss.alpha": 0.5}, r"--loss\.alpha=0\.5: must be left out without .*divergence=alpha"),
    (
      {"loss.name": "robust_dpo_loss", "loss.label_smoothing": 0.6},
      r"--loss\.label_smoothing=0\.6: must be at least 0 and below 0\.5, from which on a label",
    ),
    (
      {"loss.name": "aot_loss", "microbatch_pairs": 2},
      r"--microbatch_pairs=2: must be at least pairs_per_step \(4\) with --loss=aot_loss",
    ),
    ({"sampling.top_k": 3}, r"--sampling\.top_k=3"),
    ({"reference.keep": 0.5}, "--reference.keep=0.5: must be left out without --reference.refresh"),
    ({"reference.refresh": 2, "loss.name": "simpo_loss"}, "0 with --loss=simpo_loss, which has no"),
  ],
)
def test_settings_that_do_not_fit(data, changes, message):
  with pytest.raises(ConfigError, match=message):
    dpo.check(replace(dpo.Config(), offline(data) | changes))


@pytest.mark.parametrize(
  ("changes", "name"),
  [
    ({"data": "some/pairs.jsonl.gz"}, "smollm2-pairs.jsonl.gz-seed0"),
    ({"model": "runs/other/model", "data": "x.parquet", "seed": 3}, "model-x.parquet-seed3"),
    ({"task": "gsm8k:some/train.jsonl"}, "smollm2-gsm8k_some_train.jsonl-seed0"),
    ({}, "smollm2-arithmetic-seed0"),
  ],
)
@pytest.mark.parametrize("experiment", [dpo, sft], ids=["dpo", "sft"])
def test_a_run_is_named_after_its_file_or_its_task(experiment, changes, name, monkeypatch):
  named = []
  monkeypatch.setattr(experiment, "train", lambda config, workdir: named.append(workdir))
  assert experiment.main(replace(experiment.Config(), changes)) == 0
  kind = experiment.__name__.rpartition(".")[2]
  assert named == [f"runs/{kind}-{name}"]


# Asked to stop, it saves; killed, it falls back to the last checkpoint.
STOPS = [
  (1, Interrupted(signal.SIGINT)),
  (4, RuntimeError("killed")),
  (5, Interrupted(signal.SIGTERM)),
]


@pytest.mark.slow
@pytest.mark.parametrize("source", ["file", "file, moving reference", "on_policy"])
def test_a_run_stopped_three_times_ends_as_one_that_was_not(
  tmp_path, small, data, files, monkeypatch, source
):
  changes = online(files) if source == "on_policy" else offline(data)
  if source == "file, moving reference":
    changes |= {"reference.refresh": 2, "reference.keep": 0.4}
  changes |= {"steps": 7, "microbatch_pairs": 2, "checkpoint.every": 3, "eval.every": 3}
  straight = run(dpo, tmp_path / "straight", changes)
  cut = stopped(monkeypatch, dpo, tmp_path / "cut", changes, STOPS)
  assert [row["step"] for row in cut.metrics] == list(range(8))
  assert cut.metrics == straight.metrics
  assert cut.samples == straight.samples
  assert equal(cut.state, straight.state)


def test_wpo_weighs_pairs_by_how_likely_the_policy_writes_them():
  """From whole distributions of three tokens: log p(token) - log sum_v p(v)^2, mean per token."""
  rng = np.random.default_rng(0)
  lengths, temperature = [2, 1, 3, 2], 0.7
  mask = np.arange(3) < np.array([*lengths, 0, 0])[:, None]
  logits = [rng.normal(size=(size, 3)) * 2 for size in lengths]
  logprobs = lambda t: [jax.nn.log_softmax(x / t)[:, 0] for x in logits]  # noqa: E731
  weights = np.float32([0.5, 0.5, 0])
  made = PairBatch(SequenceBatch(None, mask, None, None), None, weights)
  both = (logprobs(temperature), logprobs(temperature / 2))
  found = pairs_lib.policy_weighted(made, *(list(map(np.asarray, each)) for each in both)).weights
  means = []
  for x in logits:
    p = np.exp(x / temperature) / np.exp(x / temperature).sum(1, keepdims=True)
    means.append(np.mean(np.log(p[:, 0]) - np.log((p**2).sum(1))))
  wanted = [0.5 * min(1, np.exp(means[i] + means[i + 1])) for i in (0, 2)]
  np.testing.assert_allclose(found, [*wanted, 0], rtol=1e-5)
