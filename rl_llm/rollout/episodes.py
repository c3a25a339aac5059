"""The host's loop of episodes: the model writes a turn, the environment answers, and so on.

A step's problems are divided into parts. While the tools of one part run on the host, another part
decodes on the device, so slow tools hold back the rows of their own part alone. What an episode
becomes depends on its problem, its key and its environment, and on no other row, so the number of
parts changes nothing but the time.
"""

from __future__ import annotations

import collections
import dataclasses
from collections.abc import Callable, Generator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from rl_llm.data.prompts import PromptBatch, PromptTooLong, pad_prompts
from rl_llm.errors import UserError
from rl_llm.parallel import hosts
from rl_llm.parallel.sharding import gather_to_host
from rl_llm.rewards import RewardResult
from rl_llm.rollout import turns
from rl_llm.rollout.collect import Experience, Sampler, experience_metrics, step_keys
from rl_llm.rollout.drawing import Drawn, draw_problems
from rl_llm.rollout.generation import STOP_EOS, STOP_LENGTH, Rollout, trim
from rl_llm.rollout.grading import as_scores, grade, owners_of, sample_rows
from rl_llm.rollout.sampling import SamplingConfig
from rl_llm.runs.finite import check_finite
from rl_llm.runs.metrics import PhaseClock
from rl_llm.tasks import Problem
from rl_llm.tasks.environments import Observation


class EpisodeError(UserError, RuntimeError):
  """An environment cannot be trained with as it is; the message names the fix."""


class Episodic(NamedTuple):
  """What a sampler plays episodes with: functions and statics, bound once."""

  begin: turns.Begin  # from `rl_llm.rollout.turns.make_begin`
  # the processes of all episodes at once, `rl_llm.tasks.environments.Episodes`
  environments: Any
  # (problem, what its environment said first) -> the prompt with it, names for its template
  opening: Callable[[Problem, str], tuple[Any, dict[str, Any]]]
  # (a turn's ids) -> its text, as calls are found in it
  decode: Callable[[Sequence[int]], str]
  # (observation) -> the ids of what the environment says, and nothing else
  observation_ids: Callable[[Any], list[int]]
  max_turns: int


class Said(NamedTuple):
  """One turn of an episode: what the model wrote, and what came of it."""

  text: str
  ids: list[int]
  observation: Observation | None  # None: a turn that was cut off
  read: int  # tokens of the observation that the model was given to read


class Played(NamedTuple):
  """B = P * G whole episodes."""

  problems: list[Problem]  # P, as their environments began them
  prompts: PromptBatch  # [P, L]
  rollout: Rollout  # on the host; its lengths count the environment's tokens too
  turn_ids: np.ndarray  # [B, T] int32, as `TurnState.turns`
  said: list[list[Said]]  # [B]
  results: list[RewardResult]  # [B], of whole episodes
  turn_rewards: np.ndarray  # [B, max_turns] float32; a row's sum is its result


def play(
  sampler: Sampler,
  params: Any,
  problems: Sequence[Problem],
  keys: jax.Array,
  sampling: SamplingConfig,
  *,
  group: int,
  parts: int = 1,
  columns: int = 0,
  step: int = 0,
) -> Played:
  """Plays G episodes of each of P problems to their ends, and grades them.

  Args:
    sampler: with an `Episodic`.
    params: the policy's weights.
    problems: P problems.
    keys: [P * G] typed keys.
    sampling: its temperature [P * G].
    group: G.
    parts: how many parts the problems are played in; divides P.
    columns: the least number of prompt columns.
    step: of the run, passed to reward functions.

  Raises:
    EpisodeError: the episodes of a problem did not begin with the same text.
    PromptTooLong: a prompt is over the limit with what its environment adds.
    Whatever `sampler.check` raises.
  """
  size, episodic = len(problems) // parts, sampler.episodic
  rows = size * group
  owners = np.tile(owners_of(sampler.mesh, rows), parts)
  own = np.flatnonzero(owners == hosts.index()).tolist()
  of_row = [problems[row // group] for row in range(parts * rows)]
  begun = episodic.environments.start([of_row[row].columns for row in own])
  begun = dict(zip(own, begun, strict=True))
  first = [*_of_all("the environments' first words", begun, Observation).values()]
  problems, prompts = _as_begun(sampler, problems, first, group)
  batch = pad_prompts(prompts, pad_id=sampler.tokenizer.pad_id, columns=columns)
  begin = episodic.begin(params)

  def of_part(part: int, pool: ThreadPoolExecutor) -> Generator:
    chosen, of_rows = slice(part * size, (part + 1) * size), slice(part * rows, (part + 1) * rows)
    temperature = jnp.asarray(sampling.temperature)[of_rows]
    own_sampling = dataclasses.replace(sampling, temperature=temperature)
    own_prompts = PromptBatch(batch.tokens[chosen], batch.lengths[chosen])
    running = begin(own_prompts, keys[of_rows], own_sampling, group)
    places = {row - of_rows.start: number for number, row in enumerate(own)}
    return _episodes(episodic, running, places, pool)

  pool = ThreadPoolExecutor(parts)
  try:
    ended = _in_turn([of_part(part, pool) for part in range(parts)], sampler.check)
  finally:
    pool.shutdown(wait=False, cancel_futures=True)
  said = [row for _, of_part in ended for row in of_part]
  state = jax.tree.map(lambda *x: np.concatenate(x), *[state for state, _ in ended])
  check_finite(state.logprobs, params, what="the log-probs of the sampled tokens")
  finished = episodic.environments.finish(range(len(own)))
  finished = dict(zip(own, finished, strict=True))
  found = [*_of_all("the environments' rewards", finished, RewardResult).values()]
  states = episodic.environments.attributes(range(len(own)))
  how = {"group_size": group, "owners": owners, "step": step, "steps": sampler.steps}
  how["environments"] = dict(zip(own, states, strict=True))
  results, turn_rewards = _rewards(sampler, problems, said, found, how)
  rollout = Rollout(
    tokens=state.tokens,
    mask=state.mask,
    sampler_logprobs=state.logprobs,
    entropies=state.entropies,
    lengths=state.length,
    stop_reason=np.array([STOP_EOS if _is_over(row) else STOP_LENGTH for row in said], np.int32),
  )
  return Played(problems, batch, rollout, state.turns, said, results, turn_rewards)


def _episodes(
  episodic: Episodic, running: turns.Running, places: Mapping[int, int], pool: ThreadPoolExecutor
) -> Generator[Future | None, None, tuple[turns.TurnState, list[list[Said]]]]:
  """A part's episodes to their ends: (the state on the host, without the cache; what was said).

  Yields None while the device decodes a turn, and the tools' future while they run. `places` is
  which of this process's environments a row has; rows of other processes are not in it.
  """
  state, resume = running
  active = range(len(state.length))
  said: list[list[Said]] = [[] for _ in active]
  rows = {number: row for row, number in places.items()}
  while True:
    yield None
    on_host = gather_to_host(state._replace(cache=None))
    texts = {}
    for row in active:
      length, written = int(on_host.length[row]), int(on_host.written[row])
      ids = on_host.tokens[row, length - written : length].tolist()
      said[row].append(Said(episodic.decode(ids), ids, None, 0))
      if on_host.ended[row]:
        texts[row] = said[row][-1].text
    asked = {places[row]: text for row, text in texts.items() if row in places}
    tools = pool.submit(episodic.environments.turn, asked)
    yield tools
    answers = {rows[number]: observation for number, observation in tools.result().items()}
    read = {}
    for row, observation in _of_all("what the environments said", answers, Observation).items():
      said[row][-1] = said[row][-1]._replace(observation=observation)
      if observation.done or len(said[row]) == episodic.max_turns:
        continue
      ids = episodic.observation_ids(observation)
      if int(on_host.length[row]) + len(ids) < on_host.tokens.shape[1]:
        read[row] = ids
        said[row][-1] = said[row][-1]._replace(read=len(ids))
    if not read:
      return on_host, said
    active, state = sorted(read), resume(state, read)


def _in_turn(parts: list[Generator], check: Callable[[], None]) -> list[Any]:
  """Runs the parts to their ends: whichever has its tools' answers, or else its turn, is next."""
  returned: dict[int, Any] = {}
  waiting: collections.deque = collections.deque()

  def advance(number: int) -> None:
    try:
      waiting.append((number, next(parts[number])))
    except StopIteration as end:
      returned[number] = end.value

  for number in range(len(parts)):
    advance(number)
  while waiting:
    check()
    decoding = [n for n, (_, tools) in enumerate(waiting) if tools is None]
    if not decoding and hosts.count() == 1:
      wait([tools for _, tools in waiting], return_when=FIRST_COMPLETED)
    ready = [n for n, (_, tools) in enumerate(waiting) if tools is not None and tools.done()]
    # Several processes must keep to one order, since they compute and exchange answers together.
    chosen = 0 if hosts.count() > 1 else [*ready, *decoding][0]
    number, _ = waiting[chosen]
    del waiting[chosen]
    advance(number)
  return [returned[number] for number in range(len(parts))]


def _of_all(what: str, own: Mapping[int, Any], kind: type) -> dict[int, Any]:
  """Every row's named tuple of this kind, or None, in the rows' order; `own` are this process's.

  Processes exchange JSON, which knows neither numbers as keys nor named tuples.
  """
  found = dict(own)
  if hosts.count() > 1:
    gathered = hosts.all_gather(what, list(own.items()))
    pairs = [pair for of_one in gathered for pair in of_one]
    found = {row: None if fields is None else kind(*fields) for row, fields in pairs}
  return dict(sorted(found.items()))


def _as_begun(
  sampler: Sampler, problems: Sequence[Problem], first: Sequence[Any], group: int
) -> tuple[list[Problem], list[Sequence[int]]]:
  """The problems and their prompts, with their tools and what their environments said first.

  An episode that could not begin leaves its group, and has the prompt of those that could.
  """
  lost = [observation for observation in first if observation.status != "ok"]
  if 2 * len(lost) > len(first):
    raise EpisodeError(
      f"reset failed in {len(lost)} of {len(first)} episodes, of the first by "
      f"{lost[0].status}: {' '.join(lost[0].answers)}; mend it, or sample fewer episodes at once"
    )
  said_first = []
  for number, problem in enumerate(problems):
    of_group = first[number * group : (number + 1) * group]
    texts = {observation.text for observation in of_group if observation.status == "ok"}
    said_first.append(next(iter(texts), ""))
    if len(texts) > 1:
      raise EpisodeError(
        f"the environment began problem {problem.key!r} in {len(texts)} ways; its episodes are "
        "compared, so reset must return the same text for the same columns"
      )
  opened = [
    (problem, *sampler.episodic.opening(problem, said))
    for problem, said in zip(problems, said_first, strict=True)
  ]
  drawn = sampler.encode(
    [
      problem._replace(prompt=prompt, columns=problem.columns | names)
      for problem, prompt, names in opened
    ]
  )
  if len(drawn.problems) < len(problems):
    raise PromptTooLong(
      f"{drawn.overlong} prompts are over --max_prompt_tokens with what their environments add; "
      "raise it"
    )
  return [problem._replace(prompt=prompt) for problem, prompt, _ in opened], drawn.prompts


def _is_over(said: Sequence[Said]) -> bool:
  """Whether an episode came to its own end, and not to a limit."""
  last = said[-1].observation
  return last is not None and bool(last.done)


def _rewards(
  sampler: Sampler,
  problems: Sequence[Problem],
  said: Sequence[Sequence[Said]],
  found: Sequence[RewardResult | None],
  how: Mapping[str, Any],
) -> tuple[list[RewardResult], np.ndarray]:
  """Each episode's result, and its turns' rewards [B, max_turns], the final one on the last turn.

  Where the environments own no reward, the task's grader reads the last turn.
  """
  results = list(found)
  if any(result is None for result in results):
    last = [row[-1] for row in said]
    texts, ids = [turn.text for turn in last], [turn.ids for turn in last]
    graded = grade(sampler.pool, problems, texts, ids, **how)
    results = [graded[row] if result is None else result for row, result in enumerate(results)]
  rewards = np.zeros((len(said), sampler.episodic.max_turns), np.float32)
  for row, episode in enumerate(said):
    if results[row].value is None:
      continue
    for turn, (*_, observation, _) in enumerate(episode):
      rewards[row, turn] = (observation and observation.reward) or 0.0
    rewards[row, len(episode) - 1] += results[row].value
    results[row] = results[row]._replace(value=float(rewards[row].sum()))
  return results, rewards


def collect_episodes(
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
  """`rl_llm.rollout.collect.collect` of whole episodes: a group has one problem's, from one reset.

  Like it, a function of (params, seed, step) where the environments are functions of their columns
  and of what they are told; so a run that is killed in the middle of an episode plays it again.

  Args:
    sampler, params, seed, step, clock, prompts, responses, sampling, parts: as for `collect`.
  """
  with clock("rollout"):
    drawn = draw_problems(sampler.task, seed, step, prompts, sampler.encode)
    keys = step_keys(seed, step, prompts, responses)
    sampling = sampling.per_row(prompts * responses)
    how = {"group": responses, "parts": parts, "step": step}
    played = play(sampler, params, drawn.problems, keys, sampling, **how)
  rollout = trim(played.rollout)
  scores, last = as_scores(played.results, group_size=responses), [row[-1] for row in played.said]
  lengths = played.prompts.lengths.tolist()
  ids = [
    row[len(row) - n :].tolist() for row, n in zip(played.prompts.tokens, lengths, strict=True)
  ]
  width, best = rollout.tokens.shape[1], sampler.task.max_reward
  found = Experience(
    Drawn(played.problems, ids, drawn.overlong),
    played.prompts,
    rollout,
    [turn.text for turn in last],
    scores,
    scores,
    metrics={},
    samples=episode_rows(played, split="train", max_reward=best),
    turns=turns.Turns(played.turn_ids[:, :width], played.turn_rewards),
  )
  return found._replace(
    metrics=experience_metrics(found, max_reward=best) | episode_metrics(played)
  )


def episode_metrics(played: Played) -> dict[str, float]:
  """What a step's row says about its episodes."""
  said = [turn for row in played.said for turn in row]
  heard = [turn.observation for turn in said if turn.observation is not None]
  count = len(played.said)
  return {
    "episode/turns": len(said) / count,
    "episode/tool_calls": sum(observation.calls for observation in heard) / count,
    "episode/malformed": sum(observation.malformed for observation in heard) / count,
    "episode/tool_errors": sum(observation.errors for observation in heard) / count,
    "episode/environment_tokens": sum(turn.read for turn in said) / count,
    "speed/environment_seconds": sum(observation.seconds for observation in heard),
  }


def episode_rows(played: Played, *, split: str, max_reward: float) -> list[dict[str, Any]]:
  """One dict per episode, for samples.jsonl: `sample_rows` of its last turn, with all its turns.

  Args:
    played: whole episodes.
    split: "train" or "eval".
    max_reward: an episode with at least this reward is correct.
  """
  texts = [said[-1].text for said in played.said]
  scores = as_scores(played.results, group_size=len(texts) // len(played.problems))
  rows = sample_rows(
    played.problems, texts, played.rollout, scores, split=split, max_reward=max_reward
  )
  return [
    row | {"turns": [_turn_row(turn) for turn in said]}
    for row, said in zip(rows, played.said, strict=True)
  ]


def _turn_row(turn: Said) -> dict[str, Any]:
  """What the model wrote in a turn, and what came of it."""
  row = {"text": turn.text, "tokens": len(turn.ids)}
  if (observation := turn.observation) is not None:
    names = ("status", "calls", "reward")
    row |= {"observation": observation.text, "read": turn.read}
    row |= {name: getattr(observation, name) for name in names}
  return row
