"""Flags from functions: the keywords of a family of functions as one group of settings.

A loss's signature says which numbers it takes, and its `Args:` say what they mean. A flag that
repeats either goes stale, so the group is derived from the functions: a new loss in the tuple, or a
new keyword of an existing loss, becomes a flag without another line of code.

    Loss = keyword_group("loss", "The surrogate.", (ppo_loss, grpo_loss), shape=(1, 1))
    call(config.loss, logprobs=..., old_logprobs=..., advantages=..., weights=..., mask=...)
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
import re
import types
import typing
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import jax
import numpy as np

from rl_llm.errors import ConfigError
from rl_llm.runs.config import option, or_function
from rl_llm.runs.functions import named

# (config, name) -> an array such as a family's functions take under that name
Example = Callable[[Any, str], np.ndarray]


def keyword_group(
  prefix: str,
  doc: str,
  functions: Sequence[Callable],
  *,
  shape: tuple[int, ...] | Example,
  unset: bool = True,
  agreed: Sequence[str] = (),
  further: Mapping[str, tuple[Any, Any]] | None = None,
) -> type:
  """A frozen dataclass with `name`, one of the functions, and the keywords of all of them.

  A keyword-only parameter is a setting, and so a flag. It is an array, and not a flag, if its text
  under `Args:` begins with a shape such as [B, T]. Without an annotation, its type is that of its
  default; a default of None means a float.

  >>> from rl_llm.losses import cispo_loss, ppo_loss
  >>> Loss = keyword_group("loss", "The surrogate.", (ppo_loss, cispo_loss), shape=(1, 1))
  >>> [field.name for field in dataclasses.fields(Loss)]
  ['name', 'clip_low', 'clip_high', 'dual_clip', 'delta', 'low', 'high']
  >>> given(Loss(name="cispo_loss", high=3.0))
  {'high': 3.0}

  Args:
    prefix: the group's name in the config, for error messages.
    doc: what the group is, for `--help`.
    functions: their positional parameters are arrays. The first function is the default.
    shape: of the arrays that the functions take, to try settings without computing anything; or
      what makes each of them.
    unset: whether a keyword is None until it is set, so that the function's default applies; else
      it has the default of the first function that has the keyword.
    agreed: keywords that have that default also for functions whose own is another.
    further: settings that belong to none of the functions: name -> (type, `option(...)`).

  Returns:
    The class. Its `functions` maps names to functions; its `check(config)` refuses keywords that
    the chosen function lacks, and values that it does not accept.

  Raises:
    TypeError: two functions have the same keyword with different defaults, and it is not unset.
  """
  table = {function.__name__: function for function in functions}
  names = Literal[tuple(table)]  # type: ignore[valid-type]
  text = "the function, each with keywords below; or FILE.py:<function>"
  fields: dict[str, tuple[Any, Any]] = {
    "name": (names, or_function(option(functions[0].__name__, text)))
  }
  defaults: dict[str, Any] = {}
  for keyword in dict.fromkeys(key for function in functions for key in settings(function)):
    having = [function for function in functions if keyword in settings(function)]
    kind, default = settings(having[0])[keyword]
    differ = any(settings(function)[keyword] != (kind, default) for function in having)
    if not unset and differ and keyword not in agreed:
      raise TypeError(f"{prefix}.{keyword}: {[f.__name__ for f in having]} disagree on its default")
    text = next(filter(None, (described(function, keyword) for function in having)), keyword)
    if len(having) < len(functions):
      text += f" [{', '.join(function.__name__ for function in having)}]"
    defaults[keyword] = None if unset else default
    kind = kind | None if defaults[keyword] is None else kind
    fields[keyword] = (kind, option(defaults[keyword], text))
  fields |= further or {}

  def check(self: Any, config: Any) -> None:
    zeros = lambda config, name: np.zeros(shape, np.float32)  # noqa: E731
    _check(self, prefix, defaults, shape if callable(shape) else zeros, config)

  # The keywords' own values come last: a class attribute is not a field.
  namespace = {
    "functions": table,
    "prefix": prefix,
    "defaults": defaults,
    "check": check,
    "__doc__": doc,
  }
  made = [(name, kind, field) for name, (kind, field) in fields.items()]
  return dataclasses.make_dataclass(prefix.title(), made, frozen=True, namespace=namespace)


def chosen(group: Any) -> Callable:
  """The function that a group names: one of the table, FILE.py:function, or given in Python."""
  return named(group.prefix, group.name) or group.functions[group.name]


def given(group: Any) -> dict[str, Any]:
  """The keywords of the chosen function that have a value."""
  known = settings(chosen(group))
  values = {keyword: getattr(group, keyword) for keyword in group.defaults if keyword in known}
  return {keyword: value for keyword, value in values.items() if value is not None}


def call(group: Any, *, keywords: Mapping[str, Any] | None = None, **arrays: Any) -> Any:
  """Calls the chosen function.

  Args:
    group: an instance of a `keyword_group`.
    keywords: the settings; None: `given(group)`. A caller that traces them passes them explicitly.
    **arrays: by parameter name; those that the function lacks are left out, as REINFORCE has no
      `old_logprobs`.
  """
  function = chosen(group)
  known = inspect.signature(function).parameters
  taken = {name: value for name, value in arrays.items() if name in known}
  return function(**taken, **(given(group) if keywords is None else keywords))


def arrays(group: Any) -> list[str]:
  """The names of the arrays that the chosen function takes by position."""
  parameters = inspect.signature(chosen(group)).parameters.values()
  return [each.name for each in parameters if each.kind is each.POSITIONAL_OR_KEYWORD]


@functools.cache  # Read-only to all callers; a run asks for the same few at every step.
def settings(function: Callable) -> dict[str, tuple[Any, Any]]:
  """The keywords that are settings, not arrays: name -> (type, default)."""
  hints = typing.get_type_hints(function)
  found = {}
  for name, parameter in inspect.signature(function).parameters.items():
    is_setting = parameter.kind is parameter.KEYWORD_ONLY
    if is_setting and not re.match(r"(None, or )?\[", described(function, name, see_others=True)):
      kind = float if parameter.default is None else type(parameter.default)
      hint = hints.get(name, kind)
      members = [each for each in typing.get_args(hint) if each is not type(None)]
      union = typing.get_origin(hint) in (typing.Union, types.UnionType)
      found[name] = members[0] if union else hint, parameter.default
  return found


def described(function: Callable, keyword: str, *, see_others: bool = False) -> str:
  """What `Args:` says about a keyword; "" if it only points to another function.

  >>> from rl_llm.losses import ppo_loss
  >>> described(ppo_loss, "dual_clip")
  "None, or c, > 1: a bad token's loss is at most c * |A|; 3 is usual"
  """
  section = (inspect.getdoc(function) or "").partition("\nArgs:\n")[2].partition("\n\n")[0]
  # `clip_low, clip_high: text` describes both.
  entries = re.finditer(r"(?m)^  ([\w, *]+): ((?:.|\n   )*)", section)
  for entry in entries:
    if keyword in re.split(r",\s*", entry[1]):
      text = " ".join(entry[2].split()).removesuffix(".")
      return "" if text.startswith("as ") and not see_others else text
  return ""


def _check(
  group: Any, prefix: str, defaults: Mapping[str, Any], example: Example, config: Any
) -> None:
  """Refuses keywords that the chosen function lacks, and values that it does not accept."""
  function = chosen(group)
  known = settings(function)
  for keyword, default in defaults.items():
    value = getattr(group, keyword)
    if keyword not in known and value != default:
      has = f"which has {', '.join(known)}" if known else "which has no keywords"
      raise ConfigError(f"{prefix}.{keyword}", value, f"left out with --{prefix}={group.name}", has)
  examples = [example(config, name) for name in arrays(group)]
  try:
    jax.eval_shape(lambda: function(*examples, **given(group)))
  except ValueError as error:
    named = next((key for key in known if str(error).startswith(f"{key} ")), "name")
    value, reason = getattr(group, named), str(error).rstrip(".")
    allowed = reason.partition("it must be ")[2] or "given what it takes"
    fix = "" if allowed in reason and named != "name" else reason
    raise ConfigError(f"{prefix}.{named}", value, allowed, fix) from None
