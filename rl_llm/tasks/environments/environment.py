"""Which environments and tools a run was given: `--env=FILE.py:Class`, `--tools=FILE.py:function`.

The contract is that of TRL's `environment_factory`: a class without constructor arguments, with
`reset(**columns) -> str | None`, whose other public methods are tools. `get_reward() -> float`, if
there is one, owns the reward; else reward functions get `environments=`, with the attributes of
each. Two more names are optional: the attribute `done` ends an episode, and `get_turn_reward()` is
the reward of a turn.
"""

from __future__ import annotations

import difflib
import os
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple

from rl_llm.errors import UserError
from rl_llm.rewards import RewardError, RewardSource
from rl_llm.rewards.directories import scratch
from rl_llm.rewards.paths import import_path, readable_paths
from rl_llm.rewards.server import Server
from rl_llm.tasks.environments import process
from rl_llm.tasks.environments.calls import PROTOCOLS
from rl_llm.tasks.environments.openenv import Remote

_BUILTIN = os.path.join(os.path.dirname(os.path.abspath(__file__)), "builtin")

# name -> (file of `builtin`, class); one with a part after a colon, as in "search:DIR", names it.
BUILTIN = {
  "calculator": ("calculator", "Calculator"),
  "python": ("python", "Python"),
  "search": ("search", "Search"),
  "guess": ("guess", "Guess"),
  "wordle": ("wordle", "Wordle"),
  "reasoning_gym": ("reasoning_gym", "ReasoningGym"),
}
_RUN_TEXT = ("python", "reasoning_gym")  # Some of that package's scorers run the answer.
_REST = {"search": "DIR", "reasoning_gym": "name"}
_OPENENV = "openenv:"
FORMS = (*(f"{n}:<{_REST[n]}>" if n in _REST else n for n in BUILTIN), "FILE.py:<Class>")
FORMS += ("openenv:<URL>",)


class EnvironmentError(UserError, ValueError):
  """An environment or a tool cannot be used; the message names it and the fix."""


class Kind(NamedTuple):
  """One class of environments, with the functions that are its tools as well.

  Attributes:
    name: as it was given; what a row's column `environment` names.
    location: the file of the class; "" where there are functions alone.
    made: the class's name in it.
    functions: pairs of a file and a function's name.
    argument: what follows the name of a built-in one, such as a directory.
    tools: JSON schemas.
    owns_reward: whether the class has `get_reward`.
    runs_text: whether it runs what a model wrote as a program.
    url: of the OpenEnv server that it is; "" where it runs here.
  """

  name: str
  location: str
  made: str
  functions: tuple[tuple[str, str], ...]
  argument: str = ""
  tools: tuple[dict[str, Any], ...] = ()
  owns_reward: bool = False
  runs_text: bool = False
  url: str = ""

  @contextmanager
  def server(self, **limits: Any) -> Iterator[Server | Remote]:
    """The server of its processes, which has imported it, or the OpenEnv server that it is."""
    if self.url:
      remote = _reached(Remote, self.url)
      try:
        yield remote
      finally:
        remote.close()
      return
    first = self.location or self.functions[0][0]
    source = RewardSource(first, self.made)
    paths = import_path(source) + [os.path.dirname(path) for path, _ in self.functions]
    with scratch("rl_llm_environment_") as directory:
      config = {
        "program": process.__file__,
        "location": self.location or first,
        "class": self.made,
        "functions": self.functions,
        "argument": self.argument,
        "sys_path": paths,
        "readable": readable_paths(source),
        "directory": str(directory),
        "file_mb": 16,
        "shared": False,
        "start_deadline": 60,
        "memory_mb": 2048,
        "processes": 64,
        "together": 1,
        "idle_period": 0.25,
        "episode_deadline": 60.0,
      } | limits
      server = _reached(
        Server,
        f"environment {self.name}",
        config,
        directory=str(directory),
        start_deadline=config["start_deadline"],
      )
      try:
        yield server
      finally:
        server.close()


def _reached(make: Callable[..., Any], *args: Any, **how: Any) -> Any:
  """A server that was started or found."""
  try:
    return make(*args, **how)
  except RewardError as error:
    raise EnvironmentError(str(error)) from None


class Environment(NamedTuple):
  """What `--env` and `--tools` name.

  Attributes:
    kinds: one or several, of which a row's column `environment` chooses.
    protocol: how calls are written, of `calls.PROTOCOLS`, or "auto": as the model's template says.
  """

  kinds: tuple[Kind, ...]
  protocol: str = "auto"

  @property
  def tools(self) -> list[dict[str, Any]]:
    """JSON schemas of the first kind's tools."""
    return list(self.kinds[0].tools)

  @property
  def owns_reward(self) -> bool:
    """Whether the reward is the environment's, and no reward function's."""
    return self.kinds[0].owns_reward

  def kind_of(self, columns: Mapping[str, Any]) -> Kind:
    """The kind of a row.

    Raises:
      EnvironmentError: there are several, and the column `environment` names none of them.
    """
    if len(self.kinds) == 1:
      return self.kinds[0]
    name = columns.get("environment")
    for kind in self.kinds:
      if name and name in (kind.name, kind.made):
        return kind
    known = ", ".join(kind.made or kind.name for kind in self.kinds)
    raise EnvironmentError(
      f"a row's column environment is {name!r}; with several in --env it must name one of {known}"
    )


def load(
  env: str, tools: str = "", *, protocol: str = "auto", network: bool = False
) -> Environment:
  """What `--env` and `--tools` name, imported once in a process of its own to describe its tools.

  >>> environment = load("calculator")
  >>> environment.tools[0]["function"]["name"], environment.owns_reward
  ('calculate', False)

  Args:
    env: names of `BUILTIN`, or FILE.py:Class; several are separated by commas. "": tools alone.
    tools: FILE.py:function; several are separated by commas.
    protocol: how calls are written, of `calls.PROTOCOLS`; "auto" leaves it to the template.
    network: whether this process may speak to the OpenEnv servers that `env` names.

  Raises:
    EnvironmentError: there is no such file, class, function or name, a tool has no type hints or
      docstring, or some of several own the reward; the message says what to write.
  """
  if protocol not in ("auto", *PROTOCOLS):
    raise EnvironmentError(f"protocol={protocol}: must be one of auto, {', '.join(PROTOCOLS)}")
  functions = tuple(_file_and_name("tools", each) for each in _listed(tools))
  kinds = [_kind(each, functions) for each in _listed(env)]
  if not kinds and not functions:
    raise EnvironmentError(f"env={env!r}: must be one of {', '.join(FORMS)}")
  kinds = kinds or [Kind(tools, "", "", functions)]
  for kind in kinds:
    if kind.url and not network:
      raise EnvironmentError(
        f"env={kind.name}: speaks to a server, and no network is allowed; allow it with "
        "--env_network=allow"
      )
    if kind.url and functions:
      raise EnvironmentError(
        f"tools={tools}: {kind.name} has the tools of its server; leave --tools out"
      )
  described = []
  for kind in kinds:
    with kind.server() as server:
      reply = server.reply
    described.append(
      kind._replace(tools=tuple(reply["tools"]), owns_reward=bool(reply["owns_reward"]))
    )
  if len({kind.owns_reward for kind in described}) > 1:
    with_it = next(kind.name for kind in described if kind.owns_reward)
    raise EnvironmentError(
      f"env={env}: {with_it} has get_reward and another has not; give it to all or to none"
    )
  return Environment(tuple(described), protocol)


def _listed(text: str) -> list[str]:
  return [part.strip() for part in text.split(",") if part.strip()]


def _kind(text: str, functions: tuple[tuple[str, str], ...]) -> Kind:
  """What one name of `--env` means."""
  if text.startswith(_OPENENV):
    url = text.removeprefix(_OPENENV)
    if not re.fullmatch(r"https?://[^\s/?#]+(/[^\s?#]*)?", url):
      raise EnvironmentError(
        f"env={text!r}: must be openenv:http://HOST:PORT or openenv:https://HOST"
      )
    return Kind(text, "", "", functions, url=url)
  if ".py" in text.rpartition(":")[0] or text.endswith(".py"):
    path, name = _file_and_name("env", text)
    return Kind(text, path, name, functions)
  name, colon, rest = text.partition(":")
  if name not in BUILTIN:
    near = difflib.get_close_matches(name, BUILTIN, n=1)
    guess = f" did you mean {near[0]}?" if near else ""
    raise EnvironmentError(
      f"env={text!r}: no such environment;{guess} must be one of {', '.join(FORMS)}"
    )
  if bool(rest) != (name in _REST) or bool(colon) != bool(rest):
    form = FORMS[list(BUILTIN).index(name)]
    raise EnvironmentError(f"env={text!r}: must be written {form}")
  file, made = BUILTIN[name]
  path = os.path.join(_BUILTIN, f"{file}.py")
  return Kind(text, path, made, functions, rest, runs_text=name in _RUN_TEXT)


def _file_and_name(flag: str, text: str) -> tuple[str, str]:
  path, _, name = text.rpartition(":")
  if not path.endswith(".py") or not name.isidentifier():
    what = "Class" if flag == "env" else "function"
    raise EnvironmentError(f"{flag}={text!r}: must be FILE.py:{what}")
  if not os.path.isfile(path):
    raise EnvironmentError(f"{flag}={text}: {path}: no such file; give the path of a Python file")
  return os.path.abspath(path), name
