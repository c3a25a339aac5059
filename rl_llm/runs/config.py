"""Frozen dataclasses as the only source of defaults, and the command line derived from them.

A default that is written twice soon differs, so an experiment writes each setting in one place,
with its help text and allowed range. Everything else (flags, `--help`, checks, the record in the
run's directory) is derived from the dataclass:

    @dataclasses.dataclass(frozen=True)
    class Loss:
      '''The policy term.'''
      clip_high: float = option(0.2, "how far above 1 the ratio may matter", above=0)

    @dataclasses.dataclass(frozen=True)
    class Config:
      batch: int = option(8, "problems per step", min=1)
      system_prompt: str | None = option(None, "text put before every prompt")
      loss: Loss = Loss()

    if __name__ == "__main__":
      config.run(main, Config)        # --batch=4 --loss.clip_high=0.28 --system_prompt=none --help

A group that has a `name` can be set by it: `--loss=ppo_loss` is `--loss.name=ppo_loss`. A group
declared as `inline(Group())` has no prefix, so that several experiments share fields such as
`--seed` and each keeps its own defaults. A group may have a method `check(self, config)`, which
`check` calls with the whole config.
Fields may be int, float, str, bool, Literal of strings, tuple[int | float | str, ...], any of these
`| None`, or a nested frozen dataclass. Library functions receive fields, never the config.
"""

from __future__ import annotations

import dataclasses
import difflib
import functools
import json
import logging
import math
import operator
import os
import re
import shutil
import sys
import textwrap
import types
import typing
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, Literal, NamedTuple, NoReturn

from absl import app, flags

from rl_llm.errors import ConfigError, UserError, one_line, redact
from rl_llm.files import write_atomically
from rl_llm.runs import peer_names
from rl_llm.runs.functions import Function, is_spec

_METADATA = frozenset({"help", "min", "above", "max", "below", "choices", "volatile", "functions"})
_KIND_NAMES = {int: "an integer", float: "a finite number", str: "text", bool: "true or false"}
_PLURALS = {int: "integers", float: "finite numbers", str: "texts"}


def check_divides(name: str, whole: int, part: int, of: str) -> None:
  """Refuses a microbatch that does not divide its whole, unless it is larger than the whole."""
  if whole > part and whole % part:
    divisors = [size for size in range(1, whole + 1) if whole % size == 0]
    nearest = min(divisors, key=lambda size: abs(size - part))
    fix = f"try --{name}={nearest}"
    raise ConfigError(name, part, f"a divisor of {of}", fix)


def option(
  default: Any,
  help: str,
  *,
  min: float | None = None,
  above: float | None = None,
  max: float | None = None,
  below: float | None = None,
  choices: Iterable[Any] | None = None,
  volatile: bool | Callable[[Any], bool] = False,
) -> Any:
  """A dataclass field with its help and bounds, so that the range stands next to the default.

  >>> @dataclasses.dataclass(frozen=True)
  ... class Config:
  ...   learning_rate: float = option(1e-5, "AdamW's step size", above=0)
  >>> replace(Config(), {"learning_rate": -1.0})
  Traceback (most recent call last):
  rl_llm.errors.ConfigError: --learning_rate=-1.0: must be a finite number > 0

  Args:
    default: the value when nothing is given.
    help: one sentence for `--help`; units belong here.
    min: smallest value allowed; in a tuple, for each item.
    above: value to stay strictly above.
    max: largest value allowed.
    below: value to stay strictly below.
    choices: the only values allowed, if they are computed and a `Literal` cannot list them.
    volatile: whether a run may resume with another value because the field does not change what is
      computed; or a function of the config that returns this. `VOLATILE = True` in a class makes
      all of its fields volatile.

  Returns:
    A `dataclasses.field` whose metadata holds what was given.
  """
  given = {"min": min, "above": above, "max": max, "below": below}
  metadata = {"help": help} | {name: bound for name, bound in given.items() if bound is not None}
  if choices is not None:
    metadata["choices"] = tuple(choices)
  if volatile:
    metadata["volatile"] = volatile
  return dataclasses.field(default=default, metadata=metadata)


def or_function(field: Any) -> Any:
  """Lets a text also be a Python function, as `functions.Function`, or FILE.py:function.

  Args:
    field: from `option`.
  """
  return dataclasses.field(default=field.default, metadata={**field.metadata, "functions": True})


def inline(default: Any) -> Any:
  """A group whose fields are flags without a prefix, as if they stood in the config itself.

  >>> @dataclasses.dataclass(frozen=True)
  ... class Run:
  ...   steps: int = option(24, "updates")
  >>> group = ("run", Run, inline(Run(steps=32)))
  >>> Config = dataclasses.make_dataclass("Config", [group], frozen=True)
  >>> flatten(Config())
  {'steps': 32}

  Args:
    default: an instance of the group's class, with the defaults to use here.
  """
  return dataclasses.field(default=default, metadata={"inline": True})


class _Leaf(NamedTuple):
  """One field that holds a value, with its path from the root: all that its flag needs."""

  path: str
  kind: type  # int, float, str or bool; of each item where `is_tuple`
  is_tuple: bool
  optional: bool
  choices: tuple[Any, ...]  # () where any value of the kind will do
  bounds: Mapping[str, float]
  help: str
  default: Any
  group: str  # first docstring line of the dataclass that holds it
  volatile: bool | Callable[[Any], bool]
  noted: bool
  functions: bool


def _leaves(config_class: type, default: Any = None) -> list[_Leaf]:
  """Every leaf of a config class, in order of definition; refuses what flags cannot represent."""
  described = _described(config_class)
  default = config_class() if default is None else default
  leaves = []
  for leaf, names in described:
    value = functools.reduce(getattr, names, default)
    _check(leaf, value)
    leaves.append(leaf._replace(default=value))
  return leaves


@functools.cache  # A run asks for its leaves dozens of times, and only the values differ.
def _described(config_class: type, prefix: str = "") -> list[tuple[_Leaf, tuple[str, ...]]]:
  """`_leaves` without their defaults, each with the names that lead to its value."""
  where = config_class.__qualname__
  if not (dataclasses.is_dataclass(config_class) and config_class.__dataclass_params__.frozen):
    raise TypeError(
      f"{where} must be a frozen dataclass: write @dataclasses.dataclass(frozen=True)"
    )
  for field in dataclasses.fields(config_class):
    if field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING:
      raise TypeError(f"{where}.{field.name} needs a default, since defaults live here alone")
  hints = _hints(config_class)
  found: list[tuple[_Leaf, tuple[str, ...]]] = []
  for field in dataclasses.fields(config_class):
    hint = hints[field.name]
    if dataclasses.is_dataclass(hint):
      inner = _described(hint, _prefix(field, prefix))
      found += [(leaf, (field.name, *names)) for leaf, names in inner]
    else:
      leaf = _leaf(prefix + field.name, hint, field.metadata, config_class)
      found.append((leaf, (field.name,)))
  return found


@functools.cache  # Each hint is a text to evaluate.
def _hints(config_class: type) -> dict[str, Any]:
  """The types of a config class's fields, by name."""
  return typing.get_type_hints(config_class)


def _prefix(field: dataclasses.Field, prefix: str) -> str:
  """The prefix of the paths of a group's fields."""
  return prefix if field.metadata.get("inline") else f"{prefix}{field.name}."


def _leaf(path: str, hint: Any, metadata: Mapping, config_class: type) -> _Leaf:
  """Its default is left out."""
  where = f"{config_class.__qualname__}.{path.rpartition('.')[2]}"
  if not metadata.get("help"):
    raise TypeError(f"{where} needs a help text: write option(default, 'help') for its field")
  if set(metadata) - _METADATA:
    raise TypeError(
      f"{where} has metadata {sorted(set(metadata) - _METADATA)}; known are {sorted(_METADATA)}"
    )
  if path in ("flagfile", "undefok", "help", "h"):
    raise TypeError(f"{where}: --{path} is taken by absl; choose another name")
  unsupported = TypeError(
    f"{where} has the type {hint}; a field may be int, float, str, bool, a Literal of strings, "
    "tuple[int, ...], tuple[float, ...], tuple[str, ...], one of these | None, or a dataclass"
  )
  optional = False
  if typing.get_origin(hint) in (typing.Union, types.UnionType):
    members = [member for member in typing.get_args(hint) if member is not types.NoneType]
    optional = len(members) < len(typing.get_args(hint))
    if len(members) != 1 or not optional:
      raise unsupported
    hint = members[0]
  is_tuple = typing.get_origin(hint) is tuple
  if is_tuple:
    hint, *rest = typing.get_args(hint)
    if rest != [...] or hint not in (int, float, str):
      raise unsupported
  choices = tuple(metadata.get("choices", ()))
  if typing.get_origin(hint) is Literal:
    hint, choices = str, typing.get_args(hint)
  if hint not in _KIND_NAMES or any(type(choice) is not hint for choice in choices):
    raise unsupported
  bounds = {name: metadata[name] for name in ("min", "above", "max", "below") if name in metadata}
  return _Leaf(
    path,
    hint,
    is_tuple,
    optional,
    choices,
    bounds,
    metadata["help"],
    None,
    _summary(config_class),
    metadata.get("volatile", getattr(config_class, "VOLATILE", False)),
    path.rpartition(".")[2] in getattr(config_class, "NOTED", ()),
    metadata.get("functions", False),
  )


def _summary(config_class: type) -> str:
  """The first line of a group's docstring; "" if `dataclasses` generated it."""
  line = (config_class.__doc__ or "").strip().split("\n")[0]
  return "" if line.startswith(config_class.__name__ + "(") else line


def _allowed(leaf: _Leaf) -> str:
  """What the leaf accepts, in words: the end of "must be ..." and the note in `--help`."""
  if leaf.choices:
    text = "one of " + ", ".join(map(str, leaf.choices))
    text = f"a comma list, each {text}" if leaf.is_tuple else text
  else:
    text = f"a comma list of {_PLURALS[leaf.kind]}" if leaf.is_tuple else _KIND_NAMES[leaf.kind]
  signs = {"min": ">=", "above": ">", "max": "<=", "below": "<"}
  text += "".join(
    f" {'and ' if i else ''}{signs[name]} {bound}"
    for i, (name, bound) in enumerate(leaf.bounds.items())
  )
  return text + (", or none" if leaf.optional else "")


_INSIDE = {"min": operator.ge, "above": operator.gt, "max": operator.le, "below": operator.lt}


def _check(leaf: _Leaf, value: Any) -> Any:
  """The value as its field stores it (a list as a tuple, an int as a float), or a ConfigError."""
  if value is None and leaf.optional:
    return None
  if leaf.functions and callable(value):
    value = Function.of(leaf.path, value)
  if leaf.functions and (isinstance(value, Function) or is_spec(value)):
    return value
  items = list(value) if leaf.is_tuple and isinstance(value, (tuple, list)) else [value]
  if leaf.is_tuple and not isinstance(value, (tuple, list)):
    raise ConfigError(leaf.path, value, _allowed(leaf))
  items = [float(item) if leaf.kind is float and type(item) is int else item for item in items]
  for item in items:
    fits = (
      type(item) is leaf.kind
      and (leaf.kind is not float or math.isfinite(item))
      and (leaf.kind is not str or "\0" not in item)  # No path and no argument can hold it.
      and (not leaf.choices or item in leaf.choices)
      and all(_INSIDE[name](item, bound) for name, bound in leaf.bounds.items())
    )
    if not fits:
      near = difflib.get_close_matches(str(item), map(str, leaf.choices), n=1)
      elsewhere = peer_names.CHOICES.get(str(item).lower())
      near = [elsewhere] if elsewhere in leaf.choices else near
      note = f"did you mean {near[0]}?" if near else ""
      note = "it holds a NUL character" if type(item) is str and "\0" in item else note
      raise ConfigError(leaf.path, value, _allowed(leaf), note)
  return tuple(items) if leaf.is_tuple else items[0]


def _parse(leaf: _Leaf, text: str) -> Any:
  """The value that a flag's text stands for; its bounds are not checked yet."""
  if leaf.optional and text.strip().lower() in ("", "none"):
    return None
  try:
    if not leaf.is_tuple:
      return _parse_item(leaf.kind, text)
    if text.lstrip().startswith("["):
      return tuple(json.loads(text))
    return tuple(_parse_item(leaf.kind, item) for item in text.split(",")) if text.strip() else ()
  except (ValueError, OverflowError, RecursionError):
    raise ConfigError(leaf.path, text, _allowed(leaf)) from None


def _parse_item(kind: type, text: str) -> Any:
  if kind is bool:
    return {"true": True, "t": True, "1": True, "false": False, "f": False, "0": False}.get(
      text.lower(), text
    )
  if kind is str and text.startswith('"'):
    try:
      return json.loads(text)
    except ValueError:
      return text  # not JSON: it merely begins with a quotation mark
  return kind(text)


def _text(leaf: _Leaf, value: Any) -> str:
  """The flag text that `_parse` reads back as `value`; ASCII on one line, whatever the value."""
  if value is None:
    return "none"
  if leaf.is_tuple:
    texts = [str(item) if leaf.kind is str else repr(item) for item in value]
    plain = texts and all(
      _is_plain(text) and text and not text.startswith("[") and "," not in text for text in texts
    )
    return ",".join(texts) if plain else json.dumps(list(value))
  if leaf.kind is bool:
    return str(value).lower()
  if leaf.kind is not str:
    return repr(value)
  clears = leaf.optional and value.strip().lower() in ("", "none")
  return value if _is_plain(value) and not clears else json.dumps(value)


def _is_plain(text: str) -> bool:
  """Whether a flagfile preserves the text: absl strips lines and reads in the locale's encoding."""
  return text.isascii() and text.isprintable() and text == text.strip() and not text.startswith('"')


class _LeafParser(flags.ArgumentParser):
  def __init__(self, leaf: _Leaf):
    self.leaf = leaf
    self.syntactic_help = _allowed(leaf)

  def parse(self, argument: Any) -> Any:
    value = _parse(self.leaf, argument) if isinstance(argument, str) else argument
    return _check(self.leaf, value)


class _LeafSerializer(flags.ArgumentSerializer):
  def __init__(self, leaf: _Leaf):
    self.leaf = leaf

  def serialize(self, value: Any) -> str:
    return _text(self.leaf, value)


def define_flags(config_class: type, *, flag_values: flags.FlagValues = flags.FLAGS) -> None:
  """Defines one absl flag per field, nested ones dotted: `--loss.clip_high`.

  Args:
    config_class: a frozen dataclass; every field has a default and a help text.
    flag_values: where to define; absl's global FLAGS unless a test brings its own.

  Raises:
    TypeError: the class is not frozen, or a field lacks a help text or a default, or has a type no
      flag can hold.
    ConfigError: a default is outside its own bounds.
    flags.DuplicateFlagError: a name is already a flag.
  """
  for leaf in _leaves(config_class):
    flag = flags.Flag(
      _LeafParser(leaf=leaf),
      _LeafSerializer(leaf),
      leaf.path,
      None if leaf.default is None else _text(leaf, leaf.default),
      leaf.help,
      boolean=leaf.kind is bool and not leaf.is_tuple and not leaf.optional,
    )
    flags.DEFINE_flag(flag, flag_values, module_name=config_class.__module__)


def from_flags(
  config_class: type,
  *,
  overrides: Mapping[str, Any] | None = None,
  flag_values: flags.FlagValues = flags.FLAGS,
) -> Any:
  """The frozen config that the parsed flags describe.

  A preset is a dictionary of overrides. It changes the defaults, so what the user typed wins.

  Args:
    config_class: the class whose flags were defined.
    overrides: dotted path -> value, applied to the flags that the command line (or its flagfile)
      did not give.
    flag_values: parsed flags.

  Returns:
    An instance of `config_class`, checked.

  Raises:
    ConfigError: an override names no field, or a value is outside its bounds.
  """
  leaves = _leaves(config_class)
  overrides = dict(overrides or {})
  _refuse_unknown(config_class, leaves, overrides)
  values = {}
  for leaf in leaves:
    flag = flag_values[leaf.path]
    preset = leaf.path in overrides and not flag.present
    values[leaf.path] = _check(leaf, overrides[leaf.path] if preset else flag.value)
  return _build(config_class, values)


def flatten(config: Any) -> dict[str, Any]:
  """The config as one flat dictionary, dotted path -> value, in the order of the fields.

  Args:
    config: an instance of a frozen dataclass.

  Returns:
    A new dictionary; tuples stay tuples. `replace(type(config)(), flatten(config)) == config`.
  """
  return {leaf.path: leaf.default for leaf in _leaves(type(config), default=config)}


def replace(config: Any, changes: Mapping[str, Any]) -> Any:
  """A copy of the config with some fields changed, as a preset or a trial of a sweep names them.

  Args:
    config: an instance of a frozen dataclass.
    changes: dotted path -> value; a list is accepted for a tuple, and an int for a float.

  Returns:
    A new config of the same class, checked.

  Raises:
    ConfigError: a path names no field (with the nearest one), or a value has the wrong type or is
      outside its bounds.
  """
  leaves = _leaves(type(config), default=config)
  _refuse_unknown(type(config), leaves, changes)
  values = {leaf.path: _check(leaf, changes.get(leaf.path, leaf.default)) for leaf in leaves}
  return _build(type(config), values)


def resolve(
  config_class: type,
  settings: Mapping[str, Any],
  *,
  overrides: Callable[[Any], Mapping[str, Any]] | None = None,
) -> tuple[Any, dict[str, Any]]:
  """The config that a command line with these settings would run, for a trial of a sweep.

  Args:
    config_class: a frozen dataclass.
    settings: dotted path -> value, as for `replace`; a group that has a `name` can be set by it.
    overrides: as for `run`.

  Returns:
    The config, and the given settings by their full paths, with the values their fields store.

  Raises:
    ConfigError: as for `replace`, or a setting is given twice.
  """
  paths = {leaf.path for leaf in _leaves(config_class)}
  given: dict[str, Any] = {}
  for path, value in settings.items():
    full = f"{path}.name" if f"{path}.name" in paths else path
    if full in given:
      raise ConfigError(path, value, f"given once, as {path} or as {full}")
    given[full] = value
  config = replace(config_class(), given)
  if overrides is not None:
    config = replace(config_class(), {**overrides(config), **given})
  values = flatten(config)
  return config, {path: values[path] for path in given}


def experiment(made: type) -> type:
  """Lets a config be made of settings in Python, as its command line makes it.

  The keywords are the flags' names. What is not given is what `overrides(config)`, a function next
  to the class, says of it, such as a preset's recipe; else the default. In a whole group, values
  that are the defaults count as not given. With every field given, as by `dataclasses.replace`,
  nothing is changed.

  >>> @experiment
  ... @dataclasses.dataclass(frozen=True)
  ... class Config:
  ...   preset: str = option("none", "a recipe")
  ...   clip: float = option(0.2, "how far")
  >>> Config.overrides = lambda config: {"clip": 0.3} if config.preset == "wide" else {}
  >>> Config(preset="wide").clip, Config(preset="wide", clip=0.2).clip
  (0.3, 0.2)

  Args:
    made: a frozen dataclass.

  Returns:
    The same class, with another `__init__`.
  """
  plain, names = made.__init__, {field.name for field in dataclasses.fields(made)}

  def __init__(self: Any, **settings: Any) -> None:
    if not settings or names <= settings.keys():
      plain(self, **settings)
      return
    groups = {name: value for name, value in settings.items() if dataclasses.is_dataclass(value)}
    plain(self, **groups)
    defaults = flatten(made())
    given = {path: value for path, value in flatten(self).items() if value != defaults[path]}
    given |= {name: value for name, value in settings.items() if name not in groups}
    config, _ = resolve(made, given, overrides=overrides_of(made))
    plain(self, **{name: getattr(config, name) for name in names})

  made.__init__ = __init__
  return made


def volatile(config: Any) -> set[str]:
  """The paths of the fields that may have other values when a run resumes: see `option`."""
  leaves = _leaves(type(config), default=config)
  return {
    leaf.path
    for leaf in leaves
    if (leaf.volatile(config) if callable(leaf.volatile) else leaf.volatile)
  }


def noted(config: Any) -> set[str]:
  """The paths of the fields that may change while a run lasts, each change with a note."""
  return {leaf.path for leaf in _leaves(type(config)) if leaf.noted}


def overrides_of(config_class: type) -> Callable[[Any], Mapping[str, Any]]:
  """What changes the defaults of a config once some of it is known, such as a preset: the function
  `overrides(config)` of the class, or next to it, if there is one."""
  module = sys.modules[config_class.__module__]
  return getattr(config_class, "overrides", getattr(module, "overrides", lambda config: {}))


def changed(config: Any) -> dict[str, str]:
  """The settings that are not what this model and preset make of the defaults, as flags have them.

  Volatile ones are left out: they do not change what is computed.

  >>> @dataclasses.dataclass(frozen=True)
  ... class Config:
  ...   batch: int = option(8, "problems a step")
  ...   rate: float = option(1e-5, "step size")
  ...   parts: tuple[int, ...] = option((1,), "some")
  >>> changed(replace(Config(), {"rate": 3e-4, "parts": (1, 2)}))
  {'rate': '0.0003', 'parts': '1,2'}
  """
  defaults = flatten(_usual(config))
  leaves, hidden = _leaves(type(config), default=config), volatile(config)
  return {
    leaf.path: _text(leaf, leaf.default)
    for leaf in leaves
    if leaf.path not in hidden and leaf.default != defaults[leaf.path]
  }


def usual_of_changed(config: Any) -> dict[str, Any]:
  """The settings in `changed` -> what this model and preset make of their defaults."""
  usual = flatten(_usual(config))
  return {path: usual[path] for path in changed(config)}


def _usual(config: Any) -> Any:
  """What this model and preset make of the defaults."""
  return replace(type(config)(), overrides_of(type(config))(config))


def check(config: Any) -> None:
  """Calls the `check(config)` of every group that has one, to refuse settings that do not fit.

  Raises:
    ConfigError: from the first check that fails.
  """

  def visit(group: Any) -> None:
    for field in dataclasses.fields(group):
      value = getattr(group, field.name)
      if dataclasses.is_dataclass(value):
        visit(value)
        if hasattr(value, "check"):
          value.check(config)

  visit(config)


def to_flags(config: Any, paths: Iterable[str]) -> list[str]:
  """These fields of the config as command-line arguments; credentials are not redacted.

  Args:
    config: an instance of a frozen dataclass.
    paths: dotted paths of fields.

  Returns:
    One `--path=value` per path, in the order of `paths`.
  """
  leaves = {leaf.path: leaf for leaf in _leaves(type(config), default=config)}
  return [f"--{path}={_text(leaves[path], leaves[path].default)}" for path in paths]


def _build(config_class: type, values: Mapping[str, Any], prefix: str = "") -> Any:
  hints = _hints(config_class)
  return config_class(
    **{
      field.name: _build(hints[field.name], values, _prefix(field, prefix))
      if dataclasses.is_dataclass(hints[field.name])
      else values[prefix + field.name]
      for field in dataclasses.fields(config_class)
    }
  )


def _refuse_unknown(config_class: type, leaves: list[_Leaf], changes: Mapping[str, Any]) -> None:
  paths = [leaf.path for leaf in leaves]
  for path, value in changes.items():
    if path not in paths:
      raise ConfigError(
        path, value, f"a field of {config_class.__qualname__}", _did_you_mean(path, paths)
      )


def _did_you_mean(name: str, names: Iterable[str], dashes: str = "") -> str:
  """A question that names the nearest of `names`; "" if none is near."""
  names = sorted(names)
  if known := peer_names.ours(name, names):
    return f"did you mean {dashes}{known}?"
  instead = peer_names.INSTEAD.get(name, "")
  if instead and set(re.findall(r"--([a-z][\w.]*\w)", instead)) <= set(names):
    return instead
  last = name.rpartition(".")[2]
  near = [known for known in names if known.rpartition(".")[2] == last]
  near = near or difflib.get_close_matches(name, names, n=1)
  near = near or [
    known for known in names if difflib.get_close_matches(last, [known.rpartition(".")[2]])
  ]
  return f"did you mean {dashes}{near[0]}?" if near else ""


def to_flagfile(config: Any) -> str:
  """The config as the text of a flagfile: `--flagfile=<path>` gives an equal config again.

  It lists every field, so the file means the same after a default has changed.

  Strings that a flagfile would damage (line ends, outer spaces, non-ASCII) are written as JSON
  strings, and lists of such strings as JSON lists; the flags read both. Only credentials do not
  come back: they are written as "[redacted]".

  Args:
    config: an instance of a frozen dataclass.

  Returns:
    One `--path=value` line per field, ASCII.
  """
  leaves = _leaves(type(config), default=config)
  return "".join(f"--{leaf.path}={_text(leaf, _redacted(leaf.default))}\n" for leaf in leaves)


def _redacted(value: Any) -> Any:
  if isinstance(value, tuple):
    return tuple(_redacted(item) for item in value)
  return redact(value) if isinstance(value, str) else value


def write_config(config: Any, run_dir: str | os.PathLike) -> None:
  """Writes a run's config into its directory.

  Flat dictionaries, for programs, are config.json, defaults.json and changed.json: the settings
  that are not what the model and the preset make of the defaults, with what these would be.
  flags.txt reruns the config.

  Args:
    config: an instance of a frozen dataclass.
    run_dir: the run's directory, which exists.
  """
  run_dir = Path(run_dir)
  # Written first: a config.json without a flags.txt next to it is a model's, not a run's.
  write_atomically(run_dir / "flags.txt", to_flagfile(config).encode("ascii"))
  for name, values in (
    ("config.json", flatten(config)),
    ("defaults.json", flatten(type(config)())),
    ("changed.json", usual_of_changed(config)),
  ):
    values = {path: _redacted(value) for path, value in values.items()}
    write_atomically(run_dir / name, (json.dumps(values, indent=2) + "\n").encode("ascii"))


def run(
  main: Callable[[Any], Any],
  config_class: type,
  *,
  overrides: Callable[[Any], Mapping[str, Any]] | None = None,
  argv: list[str] | None = None,
) -> NoReturn:
  """Runs an experiment from the command line, with one clear line for whatever the user got wrong.

  A wrong flag fails within a second, not with a traceback after a minute of compilation: an unknown
  flag (the message suggests the nearest one), a wrong type, a value outside its bounds or a stray
  argument prints `error: ...` to stderr and exits with code 2. So does any `UserError` from `main`.
  `--help` prints the module's docstring and every field. absl's own flags work as usual.

  Args:
    main: called with the config; its return value is the exit code.
    config_class: a frozen dataclass.
    overrides: maps the config as typed to a preset's `overrides` for `from_flags`.
    argv: the command line, with the program's name first; sys.argv if None.
  """
  define_flags(config_class)

  def parse(args: list[str]) -> list[str]:
    flags.DEFINE_flag(_HelpFlag(config_class))
    try:
      rest = flags.FLAGS([_in_full(arg, config_class) for arg in args])
    except flags.UnrecognizedFlagError as error:
      tip = _did_you_mean(error.flagname, flags.FLAGS, "--") or "--help lists them all"
      _fail(f"unknown flag --{error.flagname}; {tip}")
    except (flags.Error, ValueError) as error:
      cause = error.__context__  # absl wraps what a flag's parser raised
      _fail(cause if isinstance(cause, ConfigError) else str(error).removeprefix("ERROR:: "))
    if len(rest) > 1:
      _fail(f"unexpected argument {rest[1]!r}; write every setting as --name=value")
    return rest

  def with_config(_: list[str]) -> Any:
    # JAX logs at INFO which platforms it did not find; a missing TPU is no news.
    logging.getLogger("jax._src.xla_bridge").setLevel(logging.WARNING)
    try:
      config = from_flags(config_class)
      if overrides is not None:
        config = from_flags(config_class, overrides=overrides(config))
      return main(config)
    except UserError as error:
      _fail(error)

  app.run(with_config, sys.argv if argv is None else argv, flags_parser=parse)


def _in_full(argument: str, config_class: type) -> str:
  """Expands a group's flag to its field `name` or `on`: --loss=ppo_loss to --loss.name=ppo_loss,
  --distributed to --distributed.on. Everything else stays unchanged."""
  flag, equals, value = argument.partition("=")
  names = {f"--{leaf.path}" for leaf in _leaves(config_class)}
  field = next((field for field in ("name", "on") if f"{flag}.{field}" in names), None)
  return f"{flag}.{field}{equals}{value}" if field else argument


def _fail(error: object) -> NoReturn:
  sys.stdout.flush()
  sys.stderr.write(f"error: {one_line(redact(str(error)))}\n")
  sys.exit(2)


class _HelpFlag(flags.BooleanFlag):
  """absl's --help shows one module's flags and exits with 1; ours shows the config and exits 0."""

  def __init__(self, config_class: type):
    super().__init__("help", False, "show this help", short_name="h", allow_override=True)
    self.config_class = config_class

  def parse(self, argument: Any) -> None:
    if self._parse(argument):
      sys.stdout.write(_help_text(self.config_class, min(shutil.get_terminal_size().columns, 100)))
      sys.exit(0)


def _help_text(config_class: type, width: int) -> str:
  """The docstring of the class's module, then its fields: flag with default, help, allowed."""
  lines = [
    (sys.modules[config_class.__module__].__doc__ or "").strip(),
    "",
    "Flags, with their defaults:",
  ]
  shown = "", _summary(config_class)
  for leaf in _leaves(config_class):
    group = leaf.path.rpartition(".")[0], leaf.group
    if group != shown:
      shown = group
      own = group[1] == _summary(config_class)
      lines += ["", "More:" if own else ": ".join(filter(None, group))]
    lines.append(f"  --{leaf.path}={_text(leaf, leaf.default)}")
    note = f"{leaf.help} ({_allowed(leaf)})"
    lines += textwrap.wrap(note, width, initial_indent=" " * 6, subsequent_indent=" " * 6)
  lines += [
    "",
    "--flagfile=FILE reads flags from a file; --helpfull lists absl's own flags too.",
    "",
  ]
  return "\n".join(lines).lstrip("\n")
