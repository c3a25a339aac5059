"""Collects a step's experience: problems, sampled responses, grades."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any, Literal, NamedTuple

import jax
import numpy as np

from rl_llm.data.encoding import Encoded, Pair
from rl_llm.data.prompts import PromptBatch, pad_prompts
from rl_llm.parallel.sharding import shard_rows
from rl_llm.policy import Policy
from rl_llm.rewards import RewardPool, RewardResult, failure_share
from rl_llm.rollout.drawing import Drawn, draw_problems
from rl_llm.rollout.generation import (
  STOP_LENGTH,
  Rollout,
  checked,
  generate,
  response_ids,
  response_texts,
  row_keys,
  sampling_layout,
  trim,
)
from rl_llm.rollout.grading import (
  Scores,
  as_scores,
  grade,
  is_correct,
  logged_metrics,
  owners_of,
  reward_parts,
  sample_rows,
)
from rl_llm.rollout.judge import Judge
from rl_llm.rollout.sampling import SamplingConfig
from rl_llm.rollout.scoring import ResponseBatch
from rl_llm.rollout.turns import Turns
from rl_llm.runs.metrics import PhaseClock
from rl_llm.tasks import Problem, Task
from rl_llm.text.tokenizers import Tokenizer

# (params, prompts, keys, sampling, responses_per_prompt) -> Rollout
Generate = Callable[[Any, PromptBatch, jax.Array, SamplingConfig, int], Rollout]


class Experience(NamedTuple):
  """What a step learns from: P problems, G responses to each, and their grades."""

  drawn: Drawn
  prompts: PromptBatch  # [P, L], left-padded
  rollout: Rollout  # on the host, B = P * G rows
  texts: list[str]  # [P * G]
  scores: Scores  # what is trained on: the grades, or a reward model's rewards
  grades: Scores  # from the task's grader
  metrics: dict[str, Any]  # what the step's row says about it
  samples: list[dict[str, Any]]  # [P * G] its lines of samples.jsonl
  greedy: Scores | None = None  # [P, 1], of a greedy response to each problem; None: none
  turns: Turns | None = None  # of episodes; None: each response is one turn


class Sampler(NamedTuple):
  """All that sampling and grading needs except weights: functions and statics, bound once."""

  task: Task
  tokenizer: Tokenizer
  encode: Callable[[Sequence[Problem]], Drawn]  # from `make_encode`
  generate: Generate  # from `make_generate`
  pool: RewardPool  # the grader's workers
  judge: Judge | None = None  # from `make_judge`: rewards instead of the grades; None: the grades
  mesh: jax.sharding.Mesh | None = None  # the mesh of `generate`
  check: Callable[[], None] = lambda: None  # called between phases; raises to stop
  steps: int = 1  # of the run, passed to reward functions; 1 if nothing is trained
  episodic: Any = None  # `rl_llm.rollout.episodes.Episodic`; None: a response is one turn


def make_generate(
  policy: Policy,
  tokenizer: Tokenizer,
  *,
  max_new_tokens: int,
  slots: int = 0,
  say: Callable[[str], None],
  timed: Callable[[str], AbstractContextManager] = contextlib.nullcontext,
  mesh: jax.sharding.Mesh | None = None,
  gather: Literal["step", "token"] = "step",
) -> Generate:
  """`rollout.generate` for one model; it announces each shape that it compiles for.

  Args:
    policy: the model's functions.
    tokenizer: its tokenizer, which knows what ends a response.
    max_new_tokens: T.
    slots: responses decoded at once; 0: all.
    say: shows a line.
    timed: opens a block in which a line is shown, such as `Console.timed`.
    mesh: the devices for the weights and the rows; None: the first device.
    gather: as for `rl_llm.rollout.generation.sampling_layout`.
  """
  announce = functools.cache(say)
  policy, mesh, before = sampling_layout(policy, mesh, gather=gather)

  def generate_responses(params, prompts, keys, sampling, group):
    rows, columns = prompts.tokens.shape
    if beyond := policy.config.length_note(int(max(prompts.lengths)) + max_new_tokens):
      announce(beyond)
    params = before(params)
    shape = f"{rows} prompts of up to {columns} tokens x {group} responses"
    with timed(f"compiling the rollout: {shape}"):
      return generate(
        params,
        *shard_rows((prompts.tokens, prompts.lengths, keys, sampling), mesh),
        policy=policy,
        responses_per_prompt=group,
        max_new_tokens=max_new_tokens,
        eos_ids=tokenizer.eos_ids,
        pad_id=tokenizer.pad_id,
        slots=slots,
      )

  return generate_responses


def collect(
  sampler: Sampler,
  params: Any,
  seed: int,
  step: int,
  clock: PhaseClock,
  *,
  prompts: int,
  responses: int,
  sampling: SamplingConfig,
  parts: int = 1,
) -> Experience:
  """Collects one step's experience: draws problems, samples responses and grades them.

  It is a function of (params, seed, step): training draws with
  fold_in(fold_in(fold_in(key(seed), step), problem), sample).

  Args:
    sampler: what to sample with.
    params: the policy's weights.
    seed: of the run.
    step: of the run.
    clock: times "rollout" and "reward".
    prompts: P.
    responses: G, to each prompt.
    sampling: its temperature may be a number.
    parts: how many parts to sample the problems in; each is graded while the next is sampled.

  Raises:
    Whatever `sampler.check` raises; nothing has changed that needs saving.
  """
  with clock("rollout"):
    drawn = draw_problems(sampler.task, seed, step, prompts, sampler.encode)
    keys = step_keys(seed, step, prompts, responses)
  sizes = {"responses": responses, "sampling": sampling, "parts": parts, "step": step}
  return answer(sampler, params, drawn, keys, clock, **sizes)


def step_keys(seed: int, step: int, prompts: int, responses: int) -> jax.Array:
  """[P * G] keys, one for each response of a training step."""
  return row_keys(jax.random.fold_in(jax.random.key(seed), step), prompts, responses)


def answer(
  sampler: Sampler,
  params: Any,
  drawn: Drawn,
  keys: jax.Array,
  clock: PhaseClock,
  *,
  responses: int,
  sampling: SamplingConfig,
  parts: int = 1,
  step: int = 0,
) -> Experience:
  """The second half of `collect`: samples and grades responses to problems already drawn.

  The device samples part k + 1 while the host grades part k, so the faster of sampler and graders
  costs time only in the first or last part. The samples are the same for any number of parts, since
  each row has its own key. But each part decodes fewer rows at once, which costs time if grading is
  quick anyway.

  Args:
    sampler, params, clock, responses, sampling, parts, step: as for `collect`; parts divides P.
    drawn: P problems.
    keys: [P * G] typed keys.
  """
  with clock("rollout"):
    prompts = pad_prompts(drawn.prompts, pad_id=sampler.tokenizer.pad_id)
  size = len(drawn.problems) // parts  # Problems per part.
  rows = size * responses
  sampling = sampling.per_row(rows)
  owners = owners_of(sampler.mesh, rows)
  grading = {"group_size": responses, "owners": owners, "step": step, "steps": sampler.steps}

  def start(part: int) -> Rollout:
    """Starts sampling a part; returns before the device has finished."""
    own = slice(part * size, (part + 1) * size)
    return sampler.generate(
      params,
      PromptBatch(prompts.tokens[own], prompts.lengths[own]),
      keys[part * rows : (part + 1) * rows],
      sampling,
      responses,
    )

  sampled: list[Rollout] = []
  texts: list[str] = []
  results: list[RewardResult] = []
  with clock("rollout"):
    under_way = start(0)
  for part in range(parts):
    with clock("rollout"):
      following = start(part + 1) if part + 1 < parts else None
      sampled.append(checked(under_way, params))
      under_way = following
    sampler.check()
    with clock("reward"):
      said = response_texts(sampled[-1], sampler.tokenizer)
      problems = drawn.problems[part * size : (part + 1) * size]
      results += grade(sampler.pool, problems, said, response_ids(sampled[-1]), **grading)
      texts += said
  rollout = trim(Rollout(*map(np.concatenate, zip(*sampled, strict=True))))
  with clock("reward"):
    scores = grades = as_scores(results, group_size=responses)
    if sampler.judge:
      rewards = sampler.judge(prompts, rollout)
      judged = [RewardResult(float(reward), "ok") for reward in rewards]
      scores = as_scores(judged, group_size=responses)
  sampler.check()
  return make_experience(
    drawn, prompts, rollout, texts, scores, grades, max_reward=sampler.task.max_reward
  )


def make_experience(
  drawn: Drawn,
  prompts: PromptBatch,
  rollout: Rollout,
  texts: list[str],
  scores: Scores,
  grades: Scores,
  *,
  max_reward: float,
) -> Experience:
  """The experience, with its metrics and samples; a grade of `max_reward` or more is correct."""
  found = Experience(drawn, prompts, rollout, texts, scores, grades, {}, [])
  return found._replace(
    metrics=experience_metrics(found, max_reward=max_reward),
    samples=sample_rows(
      drawn.problems, texts, rollout, scores, split="train", max_reward=max_reward, grades=grades
    ),
  )


def response_batch(experience: Experience) -> ResponseBatch:
  """The responses as a loss reads them; advantages and weights come later.

  A response without a reward counts as not sampled: none of its tokens is trained on.
  """
  rollout, turns = experience.rollout, experience.turns
  return ResponseBatch(
    prompts=experience.prompts.tokens,
    prompt_lengths=experience.prompts.lengths,
    tokens=rollout.tokens,
    attended=np.arange(rollout.tokens.shape[1]) < np.reshape(rollout.lengths, (-1, 1)),
    mask=rollout.mask & experience.scores.ok.reshape(-1, 1),
    sampler_logprobs=rollout.sampler_logprobs,
    truncated=rollout.stop_reason == STOP_LENGTH,
    turns=None if turns is None else turns.ids,
  )


def sampled_pairs(experience: Experience, chosen: Sequence[tuple[int, int, int]]) -> list[Pair]:
  """Pairs of responses, each after its prompt, with the sampled tokens: no text is re-encoded.

  Args:
    experience: the responses are taken from it.
    chosen: (problem, better response, worse response) of each pair.
  """
  rollout, prompts = experience.rollout, experience.drawn.prompts
  group = rollout.tokens.shape[0] // len(prompts)

  def sequence(p: int, g: int) -> Encoded:
    row, prompt = p * group + g, prompts[p]
    response = rollout.tokens[row, : rollout.lengths[row]].tolist()
    mask = rollout.mask[row, : rollout.lengths[row]].tolist()
    return Encoded(prompt + response, [False] * len(prompt) + mask, len(prompt))

  return [Pair(sequence(p, better), sequence(p, worse)) for p, better, worse in chosen]


def split_experience(
  experience: Experience, drawn: Sequence[Drawn], *, max_reward: float
) -> list[Experience]:
  """Splits an experience that several members sampled together into one for each member.

  Args:
    experience: of all problems: the first member's, then the second's, and so on.
    drawn: each member's problems, the same number for each.
    max_reward: as for `make_experience`.
  """

  def part(x: Any, number: int) -> Any:
    size = len(x) // len(drawn)
    return x[number * size : (number + 1) * size]

  def own_scores(scores: Scores, number: int) -> Scores:
    return as_scores(part(scores.results, number), group_size=scores.rewards.shape[1])

  found = []
  for number, own in enumerate(drawn):
    grades = own_scores(experience.grades, number)
    judged = experience.scores is not experience.grades
    found.append(
      make_experience(
        own,
        PromptBatch(*(part(x, number) for x in experience.prompts)),
        Rollout(*(part(x, number) for x in experience.rollout)),
        part(experience.texts, number),
        own_scores(experience.scores, number) if judged else grades,
        grades,
        max_reward=max_reward,
      )
    )
  return found


def experience_metrics(experience: Experience, *, max_reward: float) -> dict[str, Any]:
  """The metrics of a step's experience, whatever is trained on it.

  Args:
    experience: from `collect`.
    max_reward: a response with at least this grade is correct.
  """
  rollout, scores, grades = experience.rollout, experience.scores, experience.grades
  mask = rollout.mask & scores.ok.reshape(-1, 1)
  row = {"grade_mean": _mean(grades.rewards, grades.ok)} if grades is not scores else {}
  row |= logged_metrics(grades.results) | reward_parts(grades.results)
  right = [is_correct(result, max_reward) for result in grades.results if result.status == "ok"]
  return row | {
    "reward_mean": _mean(scores.rewards, scores.ok),
    "accuracy": float(np.mean(right)) if right else None,
    "entropy": _mean(rollout.entropies, mask),
    "response_length_mean": float(np.mean(rollout.lengths)),
    "truncated_fraction": float(np.mean(rollout.stop_reason == STOP_LENGTH)),
    "overlong_prompts": experience.drawn.overlong,
    **{f"rewards_{status}": count for status, count in grades.counts.items()},
    "timed_out_fraction": failure_share(grades.results, "timed_out"),
  }


def _mean(values: np.ndarray, where: np.ndarray) -> float | None:
  """The mean of the values where `where` is True; None if there are none."""
  return float(np.mean(values[where])) if where.any() else None
