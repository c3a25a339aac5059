"""Measures how good a model is at a task: accuracy, pass@k and majority@k, with intervals."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from rl_llm.data.prompts import PromptTooLong, pad_prompts
from rl_llm.errors import ConfigError
from rl_llm.evaluation.statistics import (
  accuracy_interval,
  estimate_interval,
  majority_at_k,
  natural_order,
  over_opinions,
  pass_at_k,
)
from rl_llm.parallel import hosts
from rl_llm.parallel.sharding import row_shards
from rl_llm.rewards import FAILED
from rl_llm.rollout import Rollout, row_keys
from rl_llm.rollout.collect import Sampler
from rl_llm.rollout.drawing import Drawn, assert_same_data
from rl_llm.rollout.episodes import episode_rows, play
from rl_llm.rollout.generation import checked, response_ids, response_texts, trim
from rl_llm.rollout.grading import owners_of, sample_rows, score
from rl_llm.rollout.sampling import SamplingConfig
from rl_llm.runs.checkpoint import fingerprint
from rl_llm.runs.metrics import MetricsWriter, PhaseClock, read
from rl_llm.runs.run_directory import Run
from rl_llm.runs.signals import Interrupted
from rl_llm.tasks import Problem


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
  All batches share it too: each is as wide as the longest prompt.
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
  temperature = np.tile(np.array([0.0] + [1.0] * samples, np.float32), prompts_per_batch)
  columns = max(map(len, drawn.prompts), default=0)
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
      columns=columns,
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
  if sampler.episodic is not None:
    filled = [*problems, *[problems[0]] * missing]
    how = {"group": group_size, "columns": columns, "step": step}
    played = play(sampler, params, filled, keys, sampling, **how)
    lines = episode_rows(played, split="eval", max_reward=sampler.task.max_reward)
    return lines[: len(problems) * group_size]
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
  tiled = np.tile(np.array(temperatures, np.float32), size)
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
