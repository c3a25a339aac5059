"""What runs in the processes of an environment; `rl_llm.rewards.worker` loads it by its path.

The server imports the class and the functions once; each episode is a fork of it, confined as a
grader's worker is, with one instance. It gets one frame for each thing to do, and answers each:

    {"do": "reset", "columns": {...}, "seed": int}   {"text": str or null, "done": bool}
    {"do": "call", "name": str, "arguments": {...}}  {"text": str, "failed": bool, "done": bool,
                                                      "reward": number or null}
    {"do": "finish"}                                 {"values": [reward]} or {"raised": why}, with
                                                     "state": JSON text of public attributes

Each frame has a number `n`, which the answer repeats: what a tool has written there is no answer.
Standard library only.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import inspect
import json
import os
import random
import resource
import socket
import sys
import types
from collections.abc import Callable
from typing import Any

MAX_TEXT = 1 << 16  # characters of an answer that leave the process
MAX_STATE = 1 << 16  # of the public attributes
MAX_FRAME = 12 * MAX_TEXT + MAX_STATE * 12 + (1 << 12)  # a character is 12 bytes of JSON at most
OWN = ("reset", "get_reward", "get_turn_reward")  # methods that are no tools


def _beside(name: str) -> types.ModuleType:
  """A module next to this one, without its package, which would import much more."""
  path = os.path.join(os.path.dirname(os.path.abspath(__file__)), name + ".py")
  found = sys.modules.get("_rl_llm_" + name)
  if found is not None:
    return found
  spec = importlib.util.spec_from_file_location("_rl_llm_" + name, path)
  module = importlib.util.module_from_spec(spec)
  sys.modules["_rl_llm_" + name] = module
  spec.loader.exec_module(module)
  return module


def tools_of(made: type | None, functions: list[Callable]) -> dict[str, str | Callable]:
  """The tools by name: of a class the name of each public method, and functions.

  Raises:
    TypeError: two have one name, or there is none.
  """
  found: dict[str, str | Callable] = {}
  for name, value in inspect.getmembers(made) if made else ():
    if not name.startswith("_") and name not in OWN and inspect.isroutine(value):
      found[name] = name
  for function in functions:
    if function.__name__ in found:
      raise TypeError(f"two tools are called {function.__name__!r}; rename one")
    found[function.__name__] = function
  if not found:
    raise TypeError("no tool in it; write a public method with type hints and a docstring")
  return found


def _named(path: str, name: str) -> Any:
  """What a file defines under a name."""
  worker = sys.modules["__main__"]
  module = _loaded(worker, path)
  found = getattr(module, name, None)
  if not callable(found):
    known = sorted(
      key
      for key, value in vars(module).items()
      if callable(value) and getattr(value, "__module__", "") == module.__name__
    )
    shown = ", ".join(key for key in known if not key.startswith("_")) or "none"
    raise AttributeError(f"nothing called {name!r} in {path}; it has: {shown}")
  return found


@functools.cache
def _loaded(worker: types.ModuleType, path: str) -> types.ModuleType:
  stem = os.path.splitext(os.path.basename(path))[0]
  return worker.load_file(path, f"environment_{stem}")


def prepare(config: dict) -> tuple[dict, Callable]:
  """Imports the class and the functions; gives what they are, and what an episode's process does.

  Args:
    config: of the server; "location" and "class" (or ""), "functions": pairs of file and name,
      "argument": what the class's `_prepare` gets once, if it has one.
  """
  schema = _beside("schema")
  sys.setrecursionlimit(1000)
  made = _named(config["location"], config["class"]) if config["class"] else None
  functions = [_named(path, name) for path, name in config["functions"]]
  if made is not None and not inspect.isclass(made):
    raise TypeError(f"{config['class']} is no class; name tools that are functions with --tools")
  if made is not None and not callable(getattr(made, "reset", None)):
    raise TypeError(f"{config['class']} has no method reset; write reset(self, **columns)")
  if hasattr(made, "_prepare"):
    made._prepare(config["argument"])
  tools = tools_of(made, functions)
  instance = None if made is None else made()
  described = [
    schema.tool_schema(getattr(instance, tool) if isinstance(tool, str) else tool, name)
    for name, tool in tools.items()
  ]
  reply = {"tools": described, "owns_reward": hasattr(made, "get_reward")}
  return reply, functools.partial(live, made, tools, config)


def live(
  made: type | None,
  tools: dict[str, str | Callable],
  config: dict,
  connection: socket.socket,
  confined: Any,
) -> None:
  """One episode: a fresh instance, and one thing to do after another."""
  worker = sys.modules["__main__"]
  worker.sandbox.limit_processes(confined.processes)
  if not confined.alone:
    worker.seccomp.refuse_signals()
  seconds = int(config["episode_deadline"]) + 10
  resource.setrlimit(resource.RLIMIT_CPU, (seconds, seconds))
  connection.set_inheritable(False)  # a program that a tool starts must not hold it
  episode, own = Episode(made, tools), os.getpid()
  while (request := worker.read_frame(connection.recv)) is not None:
    reply = {"n": request["n"]} | episode.answer(request)
    if os.getpid() != own:  # a fork that a tool has made and that came back from it
      os._exit(0)
    worker.write_frame(connection.sendall, reply)


class Episode:
  """An instance of the environment, and what it is asked."""

  def __init__(self, made: type | None, tools: dict[str, str | Callable]):
    self._made, self._tools, self._instance = made, tools, None

  def answer(self, request: dict) -> dict:
    """What an instance does and says."""
    if request["do"] == "reset":
      return self._reset(request)
    return self._call(request) if request["do"] == "call" else self._finish()

  def _reset(self, request: dict) -> dict:
    random.seed(request["seed"])
    if "numpy" in sys.modules:
      sys.modules["numpy"].random.seed(request["seed"] % 2**32)
    try:
      self._instance = None if self._made is None else self._made()
      text = None
      if self._instance is not None:
        given = accepted(self._instance.reset, request["columns"])
        text = _awaited(self._instance.reset(**given))
      if text is not None and not isinstance(text, str):
        raise TypeError(f"reset returned {type(text).__name__}, must return text or None")
      return {"text": text and text[:MAX_TEXT], "failed": False, "done": self._is_done()}
    except BaseException as error:
      return {"text": _why(error), "failed": True, "done": True}

  def _call(self, request: dict) -> dict:
    tool = self._tools[request["name"]]
    failed = False
    try:
      function = getattr(self._instance, tool) if isinstance(tool, str) else tool
      text = _as_text(_awaited(function(**request["arguments"])))
    except BaseException as error:  # SystemExit too; what cannot be caught ends the process
      text, failed = f"error: {_why(error)}", True
    reward = None
    try:
      if hasattr(self._instance, "get_turn_reward"):
        reward = float(_awaited(self._instance.get_turn_reward()))
    except BaseException as error:
      text, failed = f"error: get_turn_reward: {_why(error)}", True
    return {"text": text, "failed": failed, "done": self._is_done(), "reward": reward}

  def _finish(self) -> dict:
    try:
      reply: dict = {"state": public_state(self._instance)}
      if hasattr(self._instance, "get_reward"):
        value = _awaited(self._instance.get_reward())
        reply["values"] = [None if value is None else float(value)]
      return reply
    except BaseException as error:
      return {"raised": _why(error), "state": "{}"}

  def _is_done(self) -> bool:
    done = getattr(self._instance, "done", False)
    return done is True


def accepted(function: Callable, columns: dict) -> dict:
  """Those columns that a function takes: all with `**columns`, else those that it names.

  >>> accepted(lambda answer: None, {"answer": "4", "question": "2+2"})
  {'answer': '4'}
  """
  parameters = inspect.signature(function).parameters
  if any(each.kind is each.VAR_KEYWORD for each in parameters.values()):
    return columns
  return {name: value for name, value in columns.items() if name in parameters}


def public_state(instance: object) -> str:
  """JSON text of the attributes of JSON types whose names do not begin with an underscore."""
  kept = {}
  for name, value in list(getattr(instance, "__dict__", {}).items()):
    try:
      text = json.dumps(value)
    except (TypeError, ValueError, RecursionError):
      continue
    if not name.startswith("_") and len(text) <= MAX_STATE // 4:
      kept[name] = value
  text = json.dumps(kept)
  return text if len(text) <= MAX_STATE else "{}"


def _as_text(value: object) -> str:
  """An answer as the model reads it: text as it is, JSON types as JSON, else what `str` says."""
  if not isinstance(value, str):
    try:
      value = json.dumps(value, ensure_ascii=False)
    except (TypeError, ValueError, RecursionError):
      value = str(value)
  return str.__str__(value)[:MAX_TEXT]


def _awaited(value: Any) -> Any:
  if not hasattr(value, "__await__"):
    return value
  import asyncio  # where it is needed: most tools are not asynchronous

  async def wait():
    return await value

  return asyncio.run(wait())


def _why(error: BaseException) -> str:
  try:
    said = str(error)
  except BaseException:
    said = "its text cannot be read"
  return f"{type(error).__name__}: {said}"[:2000].rstrip(": ")
