"""Python functions as settings: given in Python, or named as FILE.py:function."""

from __future__ import annotations

import functools
import importlib.util
import inspect
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from rl_llm.errors import ConfigError
from rl_llm.runs import code


class Function(str):
  """A function as a setting's value: as text its name and a hash of its source, for the record.

  A run that was given a function does not resume with another one: its text differs.
  """

  function: Callable

  @classmethod
  def of(cls, setting: str, function: Callable) -> Function:
    """The value for a function.

    Raises:
      ConfigError: its source cannot be found, so a change of it would go unseen.
    """
    name = f"{function.__module__}.{getattr(function, '__qualname__', type(function).__name__)}"
    try:
      source = inspect.getsource(function)
    except (OSError, TypeError):
      allowed = "a function whose source can be read, of a file or a notebook's cell"
      raise ConfigError(setting, name, allowed) from None
    made = cls(f"python:{name}@{code.digest_of_text(source)[:12]}")
    made.function = function
    return made


def is_spec(value: Any) -> bool:
  """Whether a text has the form FILE.py:function.

  >>> is_spec("mine.py:loss"), is_spec("ppo_loss"), is_spec("mine.py")
  (True, False, False)
  """
  return isinstance(value, str) and value.rpartition(":")[0].endswith(".py")


def named(setting: str, value: str) -> Callable | None:
  """The function that a setting holds or names as FILE.py:function; None where it is another text.

  Raises:
    ConfigError: there is no such file or function, or the file raises when it is run.
  """
  if isinstance(value, Function):
    return value.function
  path, _, name = value.rpartition(":")
  return from_file(setting, path, name) if is_spec(value) else None


@functools.cache
def from_file(setting: str, path: str, name: str) -> Callable:
  """A function of a Python file, which is run in this process; modules next to it can be imported.

  Args:
    setting: which names it, for messages.
    path: the file.
    name: the function.
  """
  spec, own = f"{path}:{name}", str(Path(path).resolve().parent)
  if not Path(path).is_file():
    raise ConfigError(setting, spec, "FILE.py:function with a file that exists")
  found = importlib.util.spec_from_file_location(Path(path).stem, path)
  module = importlib.util.module_from_spec(found)
  if own not in sys.path:
    sys.path.append(own)
  try:
    found.loader.exec_module(module)
  except Exception as error:
    raise ConfigError(setting, spec, "a file that Python can run", _where(error, path)) from error
  function = getattr(module, name, None)
  if not callable(function):
    own = (key for key, value in vars(module).items() if inspect.isfunction(value))
    known = ", ".join(key for key in own if not key.startswith("_")) or "none"
    raise ConfigError(setting, spec, f"a function of {path}", f"it has {known}")
  return function


def _where(error: Exception, path: str) -> str:
  """An error with the last line of the file that it came from."""
  line = getattr(error, "lineno", 0) if isinstance(error, SyntaxError) else 0
  trace: Any = error.__traceback__
  while trace is not None:
    line = trace.tb_lineno if trace.tb_frame.f_code.co_filename == path else line
    trace = trace.tb_next
  return f"{path}:{line}: {type(error).__name__}: {error}"
