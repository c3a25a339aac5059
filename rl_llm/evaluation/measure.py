"""Measures how good a model is at a task: accuracy, pass@k and majority@k, with intervals."""

from __future__ import annotations

import dataclasses
import math
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from rl_llm.data.prompts import PromptTooLong, pad_prompts
from rl_llm.errors import ConfigError
from rl_llm.parallel import hosts
from rl_llm.parallel.sharding import row_shards
from rl_llm.rewards import FAILED
from rl_llm.rollout import Rollout, row_keys
from rl_llm.rollout.collect import Sampler, checked, response_ids, response_texts, trim
from rl_llm.rollout.drawing import Drawn, assert_same_data
from rl_llm.rollout.grading import owners_of, sample_rows, score
from rl_llm.rollout.sampling import SamplingConfig
from rl_llm.runs.checkpoint import fingerprint
from rl_llm.runs.metrics import MetricsWriter, PhaseClock, proportion_interval, read
from rl_llm.runs.run_directory import Run
from rl_llm.runs.signals import Interrupted
from rl_llm.tasks import Problem, Task

# (mean, low, high), or (None, None, None) if there is nothing to judge by
Interval = tuple[float | None, float | None, float | None]


class Evaluation(NamedTuple):
  """The result of `evaluate`."""

  metrics: dict[str, float]  # "eval/sampled_accuracy", "eval/greedy_low", ...
  rows: list[dict[str, Any]]  # the greedy response to each problem, for samples.jsonl


def evaluate(
  sampler: Sampler,
  params: Any,
  drawn: Drawn,
  *,
  samples: int,
  prompts_per_batch: int,
  step: int = 0,
) -> Evaluation:
  """Answers every problem once greedily and `samples` times at temperature 1, and grades it all.

  Both kinds share one compiled program: the temperature is an argument, and it may differ by row.
  The random keys are the same in every call, so two evaluations differ only by the weights. A
  response whose grade failed counts as not correct; `eval/failed_grades` says how many there are,
  and `eval/timed_out_fraction` says what share of the grades timed out. A response on which the
  grader has no opinion (it returned None) counts in no figure; `eval/no_opinion` says how many
  there are.

  Args:
    sampler: what to sample and grade with; its `check` is called between batches.
    params: the weights to evaluate.
    drawn: the held-out problems, encoded.
    samples: sampled responses per problem, >= 1.
    prompts_per_batch: problems per rollout.
    step: of the run, passed to reward functions.

  Returns:
    An `Evaluation`; accuracies come with 95 % intervals from `proportion_interval`, and are None if
    the grader has no opinion on any response.
  """
  group = samples + 1
  temperature = jnp.tile(jnp.array([0.0] + [1.0] * samples), prompts_per_batch)
  graded: list[dict[str, Any]] = []
  for start in range(0, len(drawn.problems), prompts_per_batch):
    sampler.check()
    graded += graded_responses(
      sampler,
      params,
      drawn.problems[start : start + prompts_per_batch],
      drawn.prompts[start : start + prompts_per_batch],
      row_keys(jax.random.fold_in(jax.random.key(0), start), prompts_per_batch, group),
      SamplingConfig(temperature),
      group_size=group,
      step=step,
    )
  correct = correctness(graded, group)
  metrics = {f"eval/{name}": count for name, count in grade_counts(graded).items()}
  for name, columns in (("greedy", correct[:, :1]), ("sampled", correct[:, 1:])):
    ends = zip(("accuracy", "low", "high"), accuracy_interval(columns), strict=True)
    metrics |= {f"eval/{name}_{end}": value for end, value in ends}
  return Evaluation(metrics, graded[::group])


def correctness(rows: Sequence[dict[str, Any]], size: int) -> np.ndarray:
  """[N, S] float64 from rows of samples.jsonl: 1 right, 0 not right, NaN without an opinion."""
  known = [None if row["status"] == "not_applicable" else row["correct"] for row in rows]
  return np.array(known, float).reshape(-1, size)


def grade_counts(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
  """The counts of grades in rows of samples.jsonl that are needed to interpret their figures."""
  found = Counter(row["status"] for row in rows)
  opinions = len(rows) - found["not_applicable"]
  return {
    "failed_grades": sum(found[status] for status in FAILED),
    "no_opinion": found["not_applicable"],
    "timed_out_fraction": found["timed_out"] / opinions if opinions else None,
    "unreadable": sum(row.get("unreadable", False) for row in rows),
  }


def over_opinions(
  estimate: Callable[..., np.ndarray], correct: np.ndarray, *further: np.ndarray, k: int
) -> tuple[np.ndarray, np.ndarray]:
  """An estimate for each problem, from its responses on which the grader has an opinion.

  >>> correct = np.array([[1, np.nan, 1], [0, np.nan, np.nan]])
  >>> values, opinions = over_opinions(pass_at_k, correct, k=2)
  >>> values.tolist(), opinions.tolist()
  ([1.0], [2])

  Args:
    estimate: `pass_at_k` or `majority_at_k`.
    correct: [N, S] float, NaN where there is no opinion.
    *further: [N, S], further arguments of `estimate`.
    k: of the estimate.

  Returns:
    [M] the estimates of the M problems with at least k opinions, and [M] each one's opinion count.
  """
  opinions = np.count_nonzero(~np.isnan(correct), axis=1)
  values = []
  for row in np.flatnonzero(opinions >= k):
    known = ~np.isnan(correct[row])
    values.append(estimate(*(x[row][known][None] for x in (correct, *further)), k=k)[0])
  return np.array(values), opinions[opinions >= k]


def accuracy_interval(correct: np.ndarray) -> Interval:
  """`proportion_interval` of [N, S] float, NaN where there is no opinion.

  A response without an opinion counts as not sampled, and so does a problem without any opinion:

  >>> accuracy_interval(np.array([[1, np.nan], [1, 1], [np.nan, np.nan]]))[0]
  1.0
  """
  opinions = np.count_nonzero(~np.isnan(correct), axis=1)
  known = opinions > 0
  if not known.any():
    return None, None, None
  return proportion_interval(np.nansum(correct[known], axis=1), opinions[known])


def graded_responses(
  sampler: Sampler,
  params: Any,
  problems: Sequence[Problem],
  prompts: Sequence[Sequence[int]],
  keys: jax.Array,
  sampling: SamplingConfig,
  *,
  group_size: int,
  columns: int = 0,
  step: int = 0,
) -> list[dict[str, Any]]:
  """Samples and grades a batch: one dict per response, as `sample_rows` returns them.

  The keys set the batch's size P. If there are fewer problems, as in a last batch, the batch is
  filled up and the excess thrown away, so that all batches have one shape.

  Args:
    sampler: what to sample and grade with.
    params: the weights to evaluate.
    problems: at most P problems.
    prompts: their tokens.
    keys: [P * G] typed keys.
    sampling: how tokens are chosen; a temperature [P * G] may differ by row.
    group_size: G, responses per problem.
    columns: the least number of prompt columns, so that ragged batches also have one width.
    step: of the run, passed to reward functions.

  Returns:
    `len(problems) * G` rows, problem by problem.
  """
  missing = len(keys) // group_size - len(problems)
  batch = pad_prompts(
    [*prompts, *[prompts[0]] * missing], pad_id=sampler.tokenizer.pad_id, columns=columns
  )
  rollout = trim(checked(sampler.generate(params, batch, keys, sampling, group_size), params))
  rollout = Rollout(*(x[: len(problems) * group_size] for x in rollout))
  texts = response_texts(rollout, sampler.tokenizer)
  owners = owners_of(sampler.mesh, len(keys))[: len(texts)]
  how = {"group_size": group_size, "owners": owners, "step": step, "steps": sampler.steps}
  scores = score(sampler.pool, problems, texts, response_ids(rollout), **how)
  max_reward = sampler.task.max_reward
  return sample_rows(problems, texts, rollout, scores, split="eval", max_reward=max_reward)


def record_responses(
  run: Run,
  sampler: Sampler,
  params: Any,
  drawn: Drawn,
  sampling: SamplingConfig,
  *,
  seed: int,
  prompts_per_batch: int,
  describe: Callable[[Problem, int, dict[str, Any]], dict[str, Any]],
) -> None:
  """Samples and grades responses to every problem into samples.jsonl, a batch at a time.

  A batch with its line in metrics.jsonl is whole and is not repeated: after a kill and a rerun, the
  files are the same as without the kill. Each key depends on problem and sample only, so neither
  the batch size nor further samples change a response's key.

  Args:
    run: its own directory, its console, and the signals that stop it.
    sampler: what to sample and grade with.
    params: the weights to sample from; weights that differ from those on record are refused.
    drawn: the problems, encoded.
    sampling: its temperatures [G] are one per response to each problem; 0 is greedy and does not
      count towards accuracy.
    seed: of the responses.
    prompts_per_batch: the most problems per batch; they are divided evenly. A multiple of
      `rl_llm.parallel.sharding.row_shards`, as each batch is.
    describe: (problem, number of the sample, row) -> what to add to its line.

  Raises:
    PromptTooLong: no problem is left.
    ConfigError: the record was begun with other weights, or on devices that need other batches.
    Interrupted: a signal arrived; finished batches are on record.
  """
  if not drawn.problems:
    limit = sampler.encode.keywords["max_prompt_tokens"]
    raise PromptTooLong(
      f"all {drawn.overlong} prompts are over --max_prompt_tokens={limit}; raise it, or choose "
      "another --overlong_prompt"
    )
  assert_same_data(drawn.prompts)
  # One shape: problems are divided evenly, and every batch is as wide as the longest prompt.
  workdir, console, temperatures = run.workdir, run.console, np.asarray(sampling.temperature)
  count, group = len(drawn.problems), len(temperatures)
  batches = -(-count // prompts_per_batch)
  parts = 1 if sampler.mesh is None else row_shards(sampler.mesh)
  size = -(-count // (batches * parts)) * parts
  columns = max(map(len, drawn.prompts))
  keys = row_keys(jax.random.key(seed), batches * size, group)
  tiled = jnp.tile(jnp.array(temperatures, jnp.float32), size)
  sampling = dataclasses.replace(sampling, temperature=tiled)

  weights = fingerprint(params)[:16]
  recorded = workdir / "metrics.jsonl"
  rows = read(recorded) if hosts.is_main() and recorded.exists() else []
  rows = hosts.broadcast("the record", rows)
  done = len(rows)
  if rows and rows[0]["weights"] != weights:
    raise ConfigError(
      "workdir",
      str(workdir),
      "another directory: it was begun with other weights of --model, which have changed since",
    )
  if rows and rows[0].get("batch", size) != size:
    raise ConfigError(
      "workdir",
      str(workdir),
      f"another directory: it was begun with batches of {rows[0]['batch']} problems, and {parts} "
      f"devices would now take {size}",
      "or resume with as many devices as before",
    )
  if rows:
    console.say(f"{done} of {batches} batches are on record in {workdir}")
  files = [workdir / "samples.jsonl", recorded] if hosts.is_main() else [None, None]
  samples_file, metrics_file = (MetricsWriter(path, resume_step=done - 1) for path in files)
  with samples_file, metrics_file:
    for batch in range(done, batches):
      clock = PhaseClock()
      try:
        run.stop.check_together(f"batch {batch}")
      except Interrupted as interruption:
        console.say(
          f"{interruption}: {batch} of {batches} batches are on record; the same command resumes "
          "after them"
        )
        raise
      chosen = slice(batch * size, (batch + 1) * size)
      problems = drawn.problems[chosen]
      lines = graded_responses(
        sampler,
        params,
        problems,
        drawn.prompts[chosen],
        keys[batch * size * group : (batch + 1) * size * group],
        sampling,
        group_size=group,
        columns=columns,
      )
      for index, line in enumerate(lines):
        line |= describe(problems[index // group], index % group, line)
      counted = [line for index, line in enumerate(lines) if temperatures[index % group]]
      row = {
        "weights": weights,
        "batch": size,
        "accuracy": accuracy(counted or lines),
        "response_length_mean": float(np.mean([line["length"] for line in lines])),
      }
      row |= grade_counts(lines)
      samples_file.write(batch, *lines)
      row |= clock.metrics()
      metrics_file.write(batch, row)  # Written last: a batch with this line is whole.
      console.step(batch + 1, row)


def summarize(
  samples: Sequence[dict[str, Any]],
  batches: Sequence[dict[str, Any]],
  *,
  ks: Sequence[int],
  votes: bool,
) -> dict[str, Any]:
  """The figures of a record: pass@k and majority@k with intervals, overall and by difficulty.

  Args:
    samples: the lines that `record_responses` wrote, each with "sample", "greedy", "answer" and
      "difficulty" added.
    batches: the lines of its metrics.jsonl.
    ks: the values of k for pass@k and majority@k.
    votes: whether responses have answers that can be counted.

  Returns:
    "all" and "by_difficulty" map names such as "pass@4" to {"value", "low", "high"}, over the
    problems with at least k responses on which the grader has an opinion. In addition "weights",
    "responses", "seconds", and the `grade_counts`.
  """
  sampled = [row for row in samples if not row["greedy"]]
  size = 1 + max(row["sample"] for row in sampled)

  def table(key: str) -> np.ndarray:
    return np.array([row[key] for row in sampled], object).reshape(-1, size)

  correct, answers, levels = correctness(sampled, size), table("answer"), table("difficulty")[:, 0]
  greedy = correctness([row for row in samples if row["greedy"]], 1)

  def figures(chosen: np.ndarray) -> dict[str, Any]:
    right, said = correct[chosen], answers[chosen]
    found = {"problems": int(chosen.sum())}
    estimates = {f"pass@{k}": (pass_at_k, k, right) for k in ks}
    if votes:  # majority@1 is pass@1.
      estimates |= {f"majority@{k}": (majority_at_k, k, right, said) for k in ks if k > 1}
    if len(greedy):
      estimates["greedy"] = (pass_at_k, 1, greedy[chosen])
    for name, (estimate, k, *tables) in estimates.items():
      values, sizes = over_opinions(estimate, *tables, k=k)
      ends = estimate_interval(values, samples=sizes, k=k) if len(values) else [None] * 3
      found[name] = dict(zip(("value", "low", "high"), ends, strict=True))
    return found

  return {
    "weights": batches[0]["weights"],
    "responses": len(samples),
    **grade_counts(samples),
    "seconds": sum(row["time/step"] for row in batches),
    "all": figures(np.ones(len(levels), bool)),
    "by_difficulty": {
      level: figures(levels == level) for level in sorted(set(levels) - {None}, key=natural_order)
    },
  }


def accuracy(rows: Sequence[dict[str, Any]]) -> float | None:
  """The share of right responses among those on which the grader has an opinion."""
  known = [row["correct"] for row in rows if row["correct"] is not None]
  return float(np.mean(known)) if known else None


def natural_order(text: str) -> list[tuple[bool, int, str]]:
  """A sort key that puts "2 steps" before "10 steps"."""
  return [
    (not part.isdecimal(), int(part) if part.isdecimal() else 0, part)
    for part in re.split(r"([0-9]+)", text)
    if part
  ]


def pass_at_k(correct: Any, *, k: int) -> np.ndarray:
  """How likely at least one of k responses to a problem is right, from S >= k sampled responses.

  If answers can be checked, it is enough that one of several is right. With c of the S responses
  right, this is the share of the C(S, k) subsets of k that hold a right response:

      pass@k = 1 - C(S - c, k) / C(S, k) = 1 - prod_{i < k} (S - c - i) / (S - i)

  A misconception is that 1 - (1 - c / S)^k does as well: it draws with replacement, and is too low
  on average. With one right response of 4 and k = 2, 3 of the 6 pairs have no right response:

  >>> pass_at_k([[True, False, False, False]], k=2).tolist()
  [0.5]
  >>> 1 - (1 - 1 / 4) ** 2
  0.4375

  Args:
    correct: [N, S] bool, which of the S responses to each problem are right.
    k: the number of responses in a subset, 1 to S.

  Returns:
    [N] float64, the unbiased estimate for each problem; `estimate_interval` gives their mean.

  Raises:
    ValueError: `correct` is not [N, S], or k is not between 1 and S.

  Reference: Chen et al., 2021, Evaluating Large Language Models Trained on Code,
  https://arxiv.org/abs/2107.03374
  """
  correct = _checked_correct(correct, k)
  samples = correct.shape[1]
  wrong = samples - correct.sum(axis=1, keepdims=True)
  drawn = np.arange(k)
  return 1 - np.prod(np.maximum(wrong - drawn, 0) / (samples - drawn), axis=1)


def majority_at_k(correct: Any, answers: Any, *, k: int) -> np.ndarray:
  """How likely the most frequent of k answers to a problem is right, from S >= k sampled answers.

  Pass@k needs someone who knows which response is right. A vote does not: wrong answers scatter,
  and the right answer tends to recur. Over all C(S, k) subsets of k responses,

      majority@k = mean over subsets of  sum_{a wins} right(a) / (number of answers that win)

  where a wins if no answer is more frequent in the subset, and right(a) is the share of the
  responses with answer a that are right: 0 or 1, unless a grade failed. A response without an
  answer does not vote; if no response votes, nothing is right.

  Take the answers 12 (right), 12 and 11. Of all three, 12 wins. Of two, 12 wins once, and ties with
  11 twice:

  >>> correct, answers = [[True, True, False]], [["12", "12", "11"]]
  >>> majority_at_k(correct, answers, k=3).tolist()
  [1.0]
  >>> majority_at_k(correct, answers, k=2).round(3).tolist()  # (1 + 1/2 + 1/2) / 3
  [0.667]

  A misconception is that voting always helps. It hurts if the right answer is the rarer one: with
  one right response of three and the wrong ones agreeing, pass@1 is 1/3 and majority@3 is 0.

  Args:
    correct: [N, S] bool, which of the S responses to each problem are right.
    answers: [N, S] strings, the answer of each response; None if it commits to no answer.
    k: the number of responses that vote, 1 to S.

  Returns:
    [N] float64, exact; `estimate_interval` gives their mean.

  Raises:
    ValueError: a shape is not [N, S], or k is not between 1 and S.

  Reference: Wang et al., 2022, Self-Consistency Improves Chain of Thought Reasoning in Language
  Models, https://arxiv.org/abs/2203.11171
  """
  correct = _checked_correct(correct, k)
  if np.shape(answers) != correct.shape:
    raise ValueError(
      f"answers has shape {np.shape(answers)}; it must have the shape of correct, {correct.shape}"
    )
  return np.array([_majority(*row, k) for row in zip(correct, answers, strict=True)])


def estimate_interval(estimates: Any, *, samples: Any, k: int) -> tuple[float, float, float]:
  """The mean of per-problem estimates of pass@k or majority@k, with a 95 % interval.

  Problems are the independent units, as in `rl_llm.runs.metrics.proportion_interval`; for k = 1 the
  two are equal. An estimate over all subsets of k of S responses is worth at least S / k draws of k
  (those that do not overlap), so the same interval holds with a share e_i of each problem's S / k
  draws right.

  If all 8 responses to all 4 problems are right, this says as much as 4 answers, for k = 1 or 8:

  >>> [round(x, 2) for x in estimate_interval([1, 1, 1, 1], samples=8, k=8)]
  [1.0, 0.51, 1.0]

  Args:
    estimates: [N] floats in [0, 1].
    samples: S, responses to each problem, or [N] numbers if they differ.
    k: of the estimates, 1 to S.

  Returns:
    (mean, low, high), each in [0, 1].

  Raises:
    ValueError: there are no estimates, or one is outside [0, 1].

  Reference: Hoeffding, 1948, A class of statistics with asymptotically normal distribution (the
  variance of a mean over all subsets is at most that of S / k independent draws).
  """
  draws = samples / k
  return proportion_interval(np.asarray(estimates) * draws, draws)


def _checked_correct(correct: Any, k: int) -> np.ndarray:
  correct = np.asarray(correct, dtype=bool)
  if correct.ndim != 2:
    raise ValueError(f"correct has shape {correct.shape}; it must be [N, S], with 2 axes")
  if not 1 <= k <= correct.shape[1]:
    samples = correct.shape[1]
    raise ValueError(f"k is {k}; it must be within the samples of a problem, 1 to {samples}")
  return correct


def _majority(correct: Sequence[bool], answers: Sequence[str | None], k: int) -> float:
  """One problem's majority@k.

  For each vote count j of the winner, this counts subsets answer by answer: `ways[n, t]` is the
  number of subsets of n responses in which t answers have j votes and none has more, and
  `right[n, t]` is the sum over them of how many of the t answers are right.
  """
  votes: dict[str, int] = defaultdict(int)
  rights: dict[str, int] = defaultdict(int)
  for flag, answer in zip(correct, answers, strict=True):
    if answer is not None:
      votes[answer] += 1
      rights[answer] += bool(flag)
  total = 0.0
  for height in range(1, min(k, max(votes.values(), default=0)) + 1):
    able = [answer for answer in votes if votes[answer] >= height]
    left = sum(votes[answer] for answer in able)
    others = len(answers) - left  # No answer, or too rare to win: any may be in the subset.
    ways = {(n, 0): math.comb(others, n) for n in range(max(k - left, 0), min(k, others) + 1)}
    right: dict[tuple[int, int], float] = defaultdict(float)
    for answer in able:
      left -= votes[answer]
      value = rights[answer] / votes[answer]
      more_ways, more_right = defaultdict(int), defaultdict(float)
      for (n, tied), count in ways.items():
        for given in range(max(k - left - n, 0), min(height, k - n) + 1):
          choices, wins = math.comb(votes[answer], given), given == height
          more_ways[n + given, tied + wins] += choices * count
          more_right[n + given, tied + wins] += choices * (right[n, tied] + wins * value * count)
      ways, right = more_ways, more_right
    total += sum(value / tied for (_, tied), value in right.items() if tied)
  return min(total / math.comb(len(answers), k), 1.0)  # Rounding may exceed 1.


def difficulty_of(
  task: Task, problems: Sequence[Problem], column: str
) -> Callable[[Problem], str] | None:
  """The difficulty of a problem: the column of that name, or for "" the task's own measure."""
  if not column:
    return task.difficulty
  shared = set.intersection(*(set(problem.columns) for problem in problems))
  if column not in shared:
    allowed = f"a column that all problems have: {', '.join(sorted(shared))}"
    raise ConfigError("difficulty_column", column, allowed)
  return lambda problem: str(problem.columns[column])


def show_result(run: Run, result: dict[str, Any]) -> None:
  """Shows the result of an evaluation: tables, and what a reader must know to interpret them."""
  say, names = run.console.say, [name for name in result["all"] if name != "problems"]
  run.console.table(
    f"{result['model']} on {result['problems']} problems of {result['task']}, "
    f"{result['samples']} samples each",
    ("", "value", "95 % from", "to"),
    [(name, *result["all"][name].values()) for name in names],
  )
  if len(result["by_difficulty"]) > 1:
    run.console.table(
      "by difficulty (intervals are in result.json)",
      ("", "problems", *names),
      [
        (level, found["problems"], *(found[name]["value"] for name in names))
        for level, found in result["by_difficulty"].items()
      ],
    )
  if not any(name.startswith("majority@") for name in names) and result["samples"] > 1:
    say(f"no majority@k: the grader of {result['task']} does not say what a response's answer is")
  say_grades(result, say)
  if result["overlong_prompts"]:
    say(f"{result['overlong_prompts']} prompts are over --max_prompt_tokens")
  say(f"{result['seconds']:.0f} s; {run.workdir / 'samples.jsonl'} has every response")


def say_grades(result: dict[str, Any], say: Callable[[str], None]) -> None:
  """Says how many responses have no grade, or grade 0 because the grader could not read them."""
  grades = result["responses"] - result["no_opinion"]
  if result["failed_grades"]:
    say(
      f"{result['failed_grades']} of {grades} grades failed and count as not correct "
      f"({result['timed_out_fraction']:.1%} timed out); samples.jsonl says why"
    )
  if result["no_opinion"]:
    say(
      f"the grader has no opinion on {result['no_opinion']} of {result['responses']} responses; "
      "no figure counts them"
    )
  if result["unreadable"]:
    say(f"{result['unreadable']} of {grades} responses could not be read and count as not correct")
