"""The host's part of a step: from problems to token arrays, from tokens to texts and rewards."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from rl_llm.data.encoding import Encoded, Pair
from rl_llm.data.prompts import (
  Overlong,
  PromptBatch,
  PromptTooLong,
  bucket,
  limit_length,
  pad_prompts,
)
from rl_llm.errors import ConfigError
from rl_llm.parallel import hosts
from rl_llm.parallel.sharding import fetch, place, place_rows, row_owners, whole_along_fsdp
from rl_llm.policy import Policy
from rl_llm.rewards import RewardError, RewardPool, RewardResult, failure_share, to_arrays
from rl_llm.rollout.generation import (
  STOP_EOS,
  STOP_LENGTH,
  ResponseBatch,
  Rollout,
  gather_weights,
  generate,
  row_keys,
)
from rl_llm.rollout.reward_model import load_reward_model, score_responses
from rl_llm.rollout.sampling import SamplingConfig
from rl_llm.runs.finite import cause_in, check_finite
from rl_llm.runs.metrics import PhaseClock
from rl_llm.tasks import Problem, Task, check_held_out
from rl_llm.text.conversations import check_no_names, format_prompts, resolve_format
from rl_llm.text.messages import template_names
from rl_llm.text.tokenizers import ModelTokenizer, Tokenizer
from rl_llm.text.turn_end import check_turn_end


class Drawn(NamedTuple):
  """Problems that fit the length limit, with their tokens, and how many were over it."""

  problems: list[Problem]
  prompts: list[list[int]]
  overlong: int


# (params, prompts, keys, sampling, responses_per_prompt) -> Rollout
Generate = Callable[[Any, PromptBatch, jax.Array, SamplingConfig, int], Rollout]


# (prompts, rollout) -> rewards [B]
Judge = Callable[[PromptBatch, Rollout], np.ndarray]


class Scores(NamedTuple):
  """The rewards of P * G responses; a failed grade is masked out, never counted as zero."""

  rewards: np.ndarray  # [P, G] float32, 0 if there is no reward
  ok: np.ndarray  # [P, G] bool, True = there is a reward
  counts: dict[str, int]  # how many results have each status
  results: list[RewardResult]  # [P * G]


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


def encode_problems(
  problems: Sequence[Problem],
  tokenizer: Tokenizer,
  *,
  prompt_format: str,
  system_prompt: str | None = None,
  max_prompt_tokens: int,
  overlong: Overlong = "error",
) -> Drawn:
  """Formats and tokenizes prompts, and treats those that are too long as `overlong` says.

  Args:
    problems: what to ask; under "plain" a conversation becomes its messages' texts, a line each.
    tokenizer: the model's.
    prompt_format: "chat" or "plain", as for `format_prompts`.
    system_prompt: as for `format_prompts`.
    max_prompt_tokens: the limit.
    overlong: "error", "drop" or "truncate_left".

  Raises:
    PromptTooLong: a prompt is over the limit and `overlong` is "error".
    TokenizerError: the prompts do not fit the format.
  """
  prompts = [problem.prompt for problem in problems]
  if prompt_format == "plain":
    for prompt in prompts:
      calls = isinstance(prompt, list) and any(m.get("tool_calls") for m in prompt)
      check_no_names({"tool_calls": True} if calls else {})
    prompts = [prompt_text(prompt) for prompt in prompts]
  layout = {"prompt_format": prompt_format, "system_prompt": system_prompt}
  names = [template_names(problem.columns) for problem in problems]
  encoded = format_prompts(prompts, tokenizer, names=names, **layout)
  limited, count = limit_length(encoded, limit=max_prompt_tokens, overlong=overlong)
  kept = [pair for pair in zip(problems, limited, strict=True) if pair[1] is not None]
  return Drawn([problem for problem, _ in kept], [prompt for _, prompt in kept], count)


def draw_problems(
  task: Task, seed: int, step: int, count: int, encode: Callable[[Sequence[Problem]], Drawn]
) -> Drawn:
  """The step's problems, a function of (seed, step) alone; dropped ones are replaced.

  Args:
    task: where problems come from.
    seed: of the run.
    step: of the run.
    count: P, how many problems to return.
    encode: `encode_problems` with its settings.

  Raises:
    PromptTooLong: hardly any problem fits.
  """
  for drawn in (count, 4 * count, 64 * count):
    problems, prompts, overlong = encode(task.sample(seed, step, drawn))
    if len(problems) >= count:
      return Drawn(problems[:count], prompts[:count], overlong)
  raise PromptTooLong(
    f"{overlong} of {drawn} prompts are over --max_prompt_tokens, so no {count} could be found; "
    "raise it, or choose --overlong_prompt=truncate_left"
  )


def make_encode(
  tokenizer: Tokenizer, *, prompt_format: str = "auto", **settings: Any
) -> Callable[[Sequence[Problem]], Drawn]:
  """`encode_problems` for one model; "auto" uses the chat format if the model has a template.

  Args:
    tokenizer: the model's.
    prompt_format: "auto", "chat" or "plain".
    **settings: the other keywords of `encode_problems`.

  Raises:
    ChatTemplateError: under the model's chat template, no response would ever end.
  """
  prompt_format = resolve_format(prompt_format, tokenizer)
  if prompt_format == "chat" and tokenizer.chat_template:
    check_turn_end(tokenizer)
  return functools.partial(
    encode_problems, tokenizer=tokenizer, prompt_format=prompt_format, **settings
  )


def held_out_problems(
  task: Task, encode: Callable[[Sequence[Problem]], Drawn], *, limit: int = 0
) -> Drawn:
  """The task's held-out problems, or the first `limit` of them, encoded.

  Raises:
    TaskError: there are no held-out problems.
    PromptTooLong: none of them fits.
  """
  check_held_out(task, otherwise="--eval.every=0")
  drawn = encode(task.held_out[:limit] if limit else task.held_out)
  if drawn.overlong and not drawn.problems:
    raise PromptTooLong(
      f"all {drawn.overlong} held-out prompts are over --max_prompt_tokens; raise it, or choose "
      "--overlong_prompt=truncate_left"
    )
  return drawn


def agree_on_data(sequences: Iterable[Sequence[int]]) -> None:
  """Checks that all processes have the same data in the same order.

  Each process draws all of a step's rows from (seed, step) and gives its devices their part. If the
  order differed in another process, rewards would silently go to the wrong responses.

  Args:
    sequences: tokens of the first step, or of all that is trained on.

  Raises:
    HostsDiffer: they differ.
  """
  if hosts.count() > 1:
    digest = hashlib.sha256()
    for tokens in sequences:
      digest.update(np.asarray([len(tokens), *tokens], np.int64).tobytes())
    hosts.agree("the data", {"the order of the data": digest.hexdigest()})


def make_generate(
  policy: Policy,
  tokenizer: Tokenizer,
  *,
  max_new_tokens: int,
  slots: int = 0,
  say: Callable[[str], None],
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
    mesh: the devices for the weights and the rows; None: the first device.
    gather: when a device gathers the weights that the mesh's `fsdp` cuts. "step": all before the
      first token, and keeps them; "token": each matrix at every token.
  """
  announce = functools.cache(say)
  whole = gather == "step" and mesh is not None and mesh.shape["fsdp"] > 1
  if whole:
    mesh = whole_along_fsdp(mesh)
    policy = policy.over(mesh)

  def generate_responses(params, prompts, keys, sampling, group):
    rows, columns = prompts.tokens.shape
    announce(f"compiling the rollout: {rows} prompts of up to {columns} tokens x {group} responses")
    if beyond := policy.config.length_note(int(max(prompts.lengths)) + max_new_tokens):
      announce(beyond)
    if whole:
      params = gather_weights(params, dtype=policy.dtype, mesh=mesh)
    return generate(
      params,
      *place_rows((prompts.tokens, prompts.lengths, keys, sampling), mesh),
      policy=policy,
      responses_per_prompt=group,
      max_new_tokens=max_new_tokens,
      eos_ids=tokenizer.eos_ids,
      pad_id=tokenizer.pad_id,
      slots=slots,
    )

  return generate_responses


def make_judge(
  reward: str, tokenizer: Tokenizer, *, rows_per_batch: int, mesh: jax.sharding.Mesh | None = None
) -> Judge | None:
  """The source of the rewards that are trained on: a reward model, or None for the task's grader.

  The grader still grades every response: only a comparison of both figures shows a policy that
  exploits what its reward model overlooks.

  Args:
    reward: "task", or "model:" and a directory for `rl_llm.rollout.reward_model.load_reward_model`.
    tokenizer: the policy's.
    rows_per_batch: responses scored at once on the devices, at least those to one prompt.
    mesh: the devices to lay the reward model over; None: the first device.

  Returns:
    (prompts, rollout) -> rewards [B], or None. The function raises a `RewardError` for rewards that
    are not finite.

  Raises:
    ConfigError: `reward` is neither form, or the reward model's token ids differ from the policy's.
    WeightsError: there is no such directory, or no reward model in it.
    TokenizerError: its tokenizer cannot be used.
  """
  kind, _, directory = reward.partition(":")
  if reward == "task":
    return None
  if kind != "model" or not directory:
    raise ConfigError("reward", reward, "task, or model:DIR with a reward model in DIR")
  model = load_reward_model(directory)
  params = model.params if mesh is None else place(model.params, mesh)
  if _vocabulary(model.tokenizer) != _vocabulary(tokenizer):
    raise ConfigError(
      "reward",
      reward,
      "a reward model over the policy's vocabulary, since it reads the ids that the policy samples",
      "train one from the same --model",
    )

  rows = model.policy.config.vocab_size

  def judge(prompts: PromptBatch, rollout: Rollout) -> np.ndarray:
    largest = int(np.max(rollout.tokens, where=rollout.mask, initial=0))
    if largest >= rows:  # The policy's embedding may be larger than its tokenizer.
      raise RewardError(
        f"the policy sampled id {largest}, and the embedding of {directory} has {rows} rows (ids 0 "
        f"to {rows - 1}); train a reward model from the same --model"
      )
    rewards = score_responses(
      params,
      ResponseBatch(*prompts, rollout.tokens, rollout.mask, rollout.mask),
      policy=model.policy,
      rows_per_batch=rows_per_batch,
      mesh=mesh,
    )
    bad = np.count_nonzero(~np.isfinite(rewards))
    if bad:
      raise RewardError(
        f"{bad} of {rewards.size} rewards of {directory} are not finite: {cause_in(params)}"
      )
    return rewards

  return judge


def _vocabulary(tokenizer: Tokenizer) -> dict[str, int]:
  """The id of each text in a model's tokenizer; all byte tokenizers have the same ids."""
  return tokenizer.backend.get_vocab() if isinstance(tokenizer, ModelTokenizer) else {}


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
  # The type must be that of evaluation, or the same shape compiles twice.
  temperature = jnp.full(rows, sampling.temperature, jnp.float32)
  sampling = dataclasses.replace(sampling, temperature=temperature)
  grading = {"group_size": responses, "owners": owners_of(sampler.mesh, rows), "step": step}

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
      results += grade(sampler, problems, said, response_ids(sampled[-1]), **grading)
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
  rollout = experience.rollout
  return ResponseBatch(
    prompts=experience.prompts.tokens,
    prompt_lengths=experience.prompts.lengths,
    tokens=rollout.tokens,
    attended=rollout.mask,
    mask=rollout.mask & experience.scores.ok.reshape(-1, 1),
    sampler_logprobs=rollout.sampler_logprobs,
    truncated=rollout.stop_reason == STOP_LENGTH,
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
  row |= logged_metrics(grades.results)
  return row | {
    "reward_mean": _mean(scores.rewards, scores.ok),
    "accuracy": _mean(grades.rewards >= max_reward, grades.ok),
    "entropy": _mean(rollout.entropies, mask),
    "response_length_mean": float(np.mean(rollout.lengths)),
    "truncated_fraction": float(np.mean(rollout.stop_reason == STOP_LENGTH)),
    "overlong_prompts": experience.drawn.overlong,
    **{f"rewards_{status}": count for status, count in grades.counts.items()},
    "timed_out_fraction": failure_share(grades.results, "timed_out"),
  }


def logged_metrics(results: Sequence[RewardResult]) -> dict[str, float]:
  """The mean over responses of the values passed to `log_metric`, as "reward/NAME"."""
  found: dict[str, list[float]] = {}
  for result in results:
    for name, value in (result.metrics or {}).items():
      found.setdefault(f"reward/{name}", []).append(value)
  return {name: float(np.mean(values)) for name, values in found.items()}


def minibatches(
  seed: int, step: int, *, prompts: int, epochs: int, count: int, matters: np.ndarray | None = None
) -> Iterator[tuple[np.ndarray, int]]:
  """The problems of each update, with `count` updates per epoch; every epoch reshuffles them.

  >>> [(chosen.size, used) for chosen, used in minibatches(0, 0, prompts=6, epochs=1, count=3)]
  [(2, 2), (2, 2), (2, 2)]

  Args:
    seed: of the run.
    step: of the run.
    prompts: P.
    epochs: passes over all problems.
    count: updates in each pass; divides P.
    matters: [P] bool, False = its responses add nothing to the loss; None: all matter.

  Yields:
    The chosen problems, those that matter first, and how many of them matter.
  """
  for epoch in range(epochs):
    rng = np.random.default_rng(np.random.SeedSequence([seed, step, epoch]))
    for chosen in np.split(rng.permutation(prompts), count):
      used = np.ones(len(chosen), bool) if matters is None else matters[chosen]
      yield chosen[np.argsort(~used, kind="stable")], int(np.count_nonzero(used))


def _mean(values: np.ndarray, where: np.ndarray) -> float | None:
  """The mean of the values where `where` is True; None if there are none."""
  return float(np.mean(values[where])) if where.any() else None


def to_host(rollout: Rollout) -> Rollout:
  """The whole rollout as NumPy arrays; waits until the devices have finished it."""
  return Rollout(*(np.asarray(x) for x in fetch(rollout)))


def checked(rollout: Rollout, params: Any) -> Rollout:
  """`to_host` of a rollout, after checking that its log-probs are finite.

  Args:
    rollout: sampled with `params`.
    params: the policy's weights, to name the cause in the error; None: not known.

  Raises:
    NotFiniteError: a sampled token's log-prob is not finite.
  """
  rollout = to_host(rollout)
  check_finite(rollout.sampler_logprobs, params, what="the log-probs of the sampled tokens")
  return rollout


def trim(rollout: Rollout) -> Rollout:
  """Brings a rollout to the host, without the columns that no response reached.

  The width is rounded up to a bucket, so an update compiles for few widths, and short responses do
  not cost as much as the longest response allowed.
  """
  rollout = to_host(rollout)
  width = min(bucket(int(rollout.lengths.max())), rollout.tokens.shape[1])
  return rollout._replace(
    tokens=rollout.tokens[:, :width],
    mask=rollout.mask[:, :width],
    sampler_logprobs=rollout.sampler_logprobs[:, :width],
    entropies=rollout.entropies[:, :width],
  )


def response_texts(rollout: Rollout, tokenizer: Tokenizer) -> list[str]:
  """The responses as text, without special tokens; lengths come from the sampler."""
  return [tokenizer.decode(tokens) for tokens in response_ids(rollout)]


def response_ids(rollout: Rollout) -> list[list[int]]:
  """The responses' tokens as they were sampled, including the token that ended them."""
  return [
    tokens[:length].tolist() for tokens, length in zip(rollout.tokens, rollout.lengths, strict=True)
  ]


def owners_of(mesh: jax.sharding.Mesh | None, rows: int) -> np.ndarray:
  """[rows] which process grades each response: the process whose devices hold it."""
  if mesh is None or hosts.count() == 1:
    return np.full(rows, hosts.index())
  return row_owners(mesh, rows)


def grade(
  sampler: Sampler,
  problems: Sequence[Problem],
  texts: Sequence[str],
  ids: Sequence[Sequence[int]],
  *,
  group_size: int,
  owners: np.ndarray | None = None,
  step: int = 0,
) -> list[RewardResult]:
  """Grades P * G responses; row p * G + g answers problem p.

  Args:
    sampler: its pool, the workers of this process, grades.
    problems: P problems.
    texts: P * G responses.
    ids: P * G, their tokens.
    group_size: G.
    owners: [P * G] which process grades each response, from `owners_of`; the same for all of a
      group. Every process gets all results. None: this process grades all.
    step: of the run, passed to reward functions.
  """
  repeated = [problem for problem in problems for _ in range(group_size)]
  shared = hosts.count() > 1 and owners is not None
  own = np.flatnonzero(owners == hosts.index()) if shared else range(len(texts))
  results = sampler.pool.score(
    [repeated[row].prompt for row in own],
    [texts[row] for row in own],
    [repeated[row].columns for row in own],
    [ids[row] for row in own],
    group_size=group_size,
    step=step,
    steps=sampler.steps,
  )
  if not shared:
    return results
  # Also if one process has all rows, as in a last batch that is almost empty.
  graded = hosts.exchange("the grades", results)
  by_owner = [iter(of_one) for of_one in graded]
  return [RewardResult(*next(by_owner[owner])) for owner in owners]


def as_scores(results: list[RewardResult], *, group_size: int) -> Scores:
  """The [P * G] results as arrays [P, G]."""
  rewards, ok, counts = to_arrays(results)
  shape = (-1, group_size)
  return Scores(rewards.reshape(shape), ok.reshape(shape), counts, results)


def score(
  sampler: Sampler,
  problems: Sequence[Problem],
  texts: Sequence[str],
  ids: Sequence[Sequence[int]],
  *,
  group_size: int,
  **how: Any,
) -> Scores:
  """The results of `grade` as arrays; takes the same arguments."""
  results = grade(sampler, problems, texts, ids, group_size=group_size, **how)
  return as_scores(results, group_size=group_size)


def prompt_text(prompt: str | list[dict[str, str]]) -> str:
  """A prompt for a person to read: the text, or the messages' texts, a line each.

  >>> prompt_text([{"role": "user", "content": "What is 7 + 5?"}])
  'What is 7 + 5?'
  """
  if isinstance(prompt, str):
    return prompt
  said = ([m.get("content"), *map(json.dumps, m.get("tool_calls") or ())] for m in prompt)
  return "\n".join(text for texts in said for text in texts if text is not None)


def is_correct(grade: RewardResult, max_reward: float) -> bool | None:
  """Whether a response is right: False if its grade failed, None if the grader has no opinion.

  >>> [is_correct(grade, 1.0) for grade in (RewardResult(1.0, "ok"), RewardResult(None, "raised"),
  ...                                       RewardResult(None, "not_applicable"))]
  [True, False, None]
  """
  if grade.status == "not_applicable":
    return None
  return grade.value is not None and grade.value >= max_reward


def sample_rows(
  problems: Sequence[Problem],
  texts: Sequence[str],
  rollout: Rollout,
  scores: Scores,
  *,
  split: str,
  max_reward: float,
  grades: Scores | None = None,
) -> list[dict[str, Any]]:
  """One dict per response, for samples.jsonl: what the model wrote, and its grade and reward.

  Args:
    problems: P problems.
    texts: P * G responses.
    rollout: their tokens.
    scores: their rewards.
    split: "train" or "eval".
    max_reward: a response with at least this grade is correct.
    grades: the grader's, if `scores` are a reward model's.
  """
  graded = (grades or scores).results
  group_size = len(texts) // len(problems)
  rows = []
  for index, (text, reward, grade) in enumerate(zip(texts, scores.results, graded, strict=True)):
    problem = problems[index // group_size]
    row = {
      "split": split,
      "problem": problem.key,
      "prompt": prompt_text(problem.prompt),
      "response": text,
      "reward": reward.value,
      "status": grade.status,
      "advantage": None,  # Known only after the step's updates.
      "stop_reason": "eos" if rollout.stop_reason[index] == STOP_EOS else "length",
      "length": int(rollout.lengths[index]),
      "correct": is_correct(grade, max_reward),
    }
    if grade.detail:
      row["detail"] = grade.detail
    if grade.unreadable:
      row["unreadable"] = True
    row |= {f"extra/{name}": value for name, value in (grade.extra or {}).items()}
    rows.append(row)
  return rows
