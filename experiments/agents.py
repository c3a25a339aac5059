"""Flags of agents, and what plays their episodes: tools and environments that a model writes to."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from collections.abc import Callable, Iterator
from typing import Any, Literal

from rl_llm.errors import ConfigError
from rl_llm.rollout import episodes, turns
from rl_llm.runs import functions
from rl_llm.runs.config import option
from rl_llm.tasks import Problem, environments
from rl_llm.tasks.environments import turn_text
from rl_llm.tasks.environments.problems import owned_by_environment
from rl_llm.text.tokenizers import Tokenizer

OWN_TASK = "env"  # --task: the problems that an environment brings


@dataclasses.dataclass(frozen=True)
class Environments:
  """What a model may call, and how long an episode may be."""

  env: str = option(
    "",
    f"the environment of each response, {', '.join(environments.FORMS)}; several: a comma between "
    "them, and the column environment chooses; empty = none, a response is one turn",
  )
  tools: str = option("", "FILE.py:<function>,...: functions that the model may call")
  max_turns: int = option(8, "turns of the model in an episode, of max_new_tokens each", min=1)
  episode_tokens: int = option(
    512, "tokens of an episode: the model's, and those of what its environment says", min=2
  )
  env_network: Literal["off", "allow"] = option(
    "off", "allow = speak to the servers that --env=openenv:URL names; they are not confined"
  )
  tool_protocol: Literal["auto", "hermes", "llama3", "text"] = option(
    "auto",
    "how calls are written: hermes = <tool_call>{json}</tool_call>, llama3 = {json}, text = call "
    "NAME: ARGUMENT; auto = as the model's chat template says, else text",
  )
  tool_deadline: float = option(10.0, "seconds that a call of a tool may take", above=0)
  tool_answer_chars: int = option(
    2000, "characters of an answer that the model is given to read; the rest is cut", min=1
  )
  episode_deadline: float = option(
    60.0, "seconds that all calls of an episode may take together", above=0
  )
  episode_memory_mb: int = option(1024, "MB that the processes of an episode may hold", min=256)

  @property
  def given(self) -> bool:
    """Whether responses are episodes."""
    return bool(self.env or self.tools)

  def check(self, config: Any) -> None:
    """Refuses settings of episodes where there are none, and what episodes do not have."""
    for field in dataclasses.fields(self):
      value = getattr(self, field.name)
      if not self.given and value != field.default:
        raise ConfigError(field.name, value, "left out without --env or --tools")
    if not self.given:
      return
    if self.episode_tokens < (least := config.prompts.max_new_tokens):
      raise ConfigError("episode_tokens", self.episode_tokens, f"at least max_new_tokens ({least})")
    drawing = getattr(config, "sampling", None) or config.responses
    task, allowed = config.task, "left out with --env"
    dynamic, overlong = getattr(task, "dynamic", None), getattr(task, "overlong", None)
    for name, value, default in (
      ("sampling.slots", drawing.slots, 0),
      ("dynamic.groups", dynamic.groups if dynamic else "any", ("any", "drop")),
      ("overlong.cache", overlong.cache if overlong else 0, 0),
      ("reward", getattr(task, "reward", "task"), ()),
    ):
      if name == "reward" and str(value).startswith("model:"):
        raise ConfigError(name, value, allowed, "a reward model reads one turn")
      if name != "reward" and value not in (default if isinstance(default, tuple) else (default,)):
        raise ConfigError(name, value, allowed)


@dataclasses.dataclass(frozen=True)
class Agents(Environments):
  """What a model may call, how long an episode may be, and what its turns are worth."""

  credit: Literal["trajectory", "turn"] = option(
    "trajectory",
    "what an advantage compares: whole episodes by the sum of their rewards, or turns of the same "
    "number by the rewards from then on",
  )

  def check(self, config: Any) -> None:
    """Refuses credit by turn with what has one number a response."""
    super().check(config)
    of_groups = hasattr(config.advantage, "functions")
    if self.credit == "turn" and of_groups and config.kl.coef and config.kl.place == "reward":
      allowed = "trajectory with --kl.place=reward"
      raise ConfigError("credit", "turn", allowed, "try --kl.place=loss")
    if self.credit == "turn" and not of_groups and config.advantage.alpha is not None:
      allowed = "trajectory with --advantage.alpha"
      raise ConfigError("credit", "turn", allowed, "its lambda is by tokens")
    if self.given and getattr(config.advantage, "name", "") == "remax":
      allowed = "another with --env: its greedy responses are single turns"
      raise ConfigError("advantage", "remax", allowed, "try --advantage=group_relative")


def overrides(config: Any) -> dict[str, Any]:
  """What episodes change, unless the command line says otherwise: problems, and room for a call."""
  return {"task": OWN_TASK, "max_new_tokens": 32} if config.agents.given else {}


def data_name(config: Any) -> str:
  """What a run is named after: its task, or the environment that brings its problems."""
  own = config.task.task == OWN_TASK and hasattr(config, "agents")
  return config.agents.env or "tools" if own else config.task.task


def reward_instead(config: Any) -> str:
  """The grader of rows that need none, since their environments give the rewards; else "task"."""
  options = getattr(config, "agents", None)
  if options is None or not options.given or not load(options).owns_reward:
    return "task"
  return functions.Function.of("reward", owned_by_environment)


@functools.cache
def load(options: Environments) -> environments.Environment:
  """The environment that the flags name, imported once to describe its tools."""
  how = {"protocol": options.tool_protocol, "network": options.env_network == "allow"}
  return environments.load(options.env, options.tools, **how)


@contextlib.contextmanager
def opened(
  options: Environments | None,
  tokenizer: Tokenizer,
  make_begin: Callable[..., turns.Begin],
  *,
  prompt_format: str,
  weak: bool,
) -> Iterator[episodes.Episodic | None]:
  """What a sampler plays episodes with, and the processes of their environments, while a `with`
  lasts; None where responses are one turn.

  Args:
    options: None, of a script without environments.
    tokenizer: the model's.
    make_begin: `rl_llm.rollout.turns.make_begin` but for `episode_tokens`.
    prompt_format: as `--prompt_format`.
    weak: run a model's programs even where files or network stay open to them.
  """
  if options is None or not options.given:
    yield None
    return
  turn_text.check_prefix(tokenizer, layout=prompt_format)
  environment = load(options)
  protocol = turn_text.choose_protocol(environment.protocol, tokenizer, layout=prompt_format)
  environment = environment._replace(protocol=protocol)
  begin = make_begin(episode_tokens=options.episode_tokens)

  def opening(problem: Problem, said: str) -> tuple[Any, dict[str, Any]]:
    tools = environment.kind_of(problem.columns).tools
    how = {"protocol": protocol, "layout": prompt_format}
    return turn_text.opening(problem.prompt, said, tools, tokenizer, **how)

  def observation_ids(observation: environments.Observation) -> list[int]:
    return turn_text.observation_ids(tokenizer, observation.answers, layout=prompt_format)

  decode = functools.partial(turn_text.decode_turn, tokenizer)
  with environments.Episodes(
    environment,
    deadline=options.tool_deadline,
    episode_deadline=options.episode_deadline,
    memory_mb=options.episode_memory_mb,
    answer_chars=options.tool_answer_chars,
    allow_weak_sandbox=weak,
  ) as processes:
    yield episodes.Episodic(begin, processes, opening, decode, observation_ids, options.max_turns)
