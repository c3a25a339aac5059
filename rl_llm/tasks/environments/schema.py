"""JSON schemas of tools, from type hints and Google-style docstrings.

A tool is described to the model by what its author wrote anyway, in the form that chat templates
print: `{"type": "function", "function": {"name", "description", "parameters"}}`. Standard library
only: it runs in the process of an environment.
"""

from __future__ import annotations

import inspect
import json
import re
import types
import typing
from collections.abc import Callable
from typing import Any

_SCALARS = {
  str: "string", int: "integer", float: "number", bool: "boolean", type(None): "null"
}  # fmt: skip
_SECTION = re.compile(r"^ *(Args|Arguments|Parameters|Returns|Return|Raises|Yields|Examples?):\s*$")
_ARGUMENT = re.compile(r"^\*{0,2}(\w+)\s*(?:\([^)]*\))?\s*:\s*(.*)$")
_CHOICES = re.compile(r"\(choices:\s*(.*?)\)\s*$", re.DOTALL | re.IGNORECASE)


def tool_schema(function: Callable, name: str) -> dict[str, Any]:
  r"""The JSON schema of a function or a bound method.

  >>> def add(a: int, b: int = 0) -> str:
  ...   '''Adds.
  ...
  ...   Args:
  ...     a: The first.
  ...     b: The second.
  ...   '''
  >>> schema = tool_schema(add, "add")["function"]
  >>> schema["description"], schema["parameters"]["required"]
  ('Adds.', ['a'])
  >>> schema["parameters"]["properties"]["b"]
  {'type': 'integer', 'description': 'The second.'}

  Args:
    function: each of its arguments has a type hint and a line under `Args:`.
    name: for messages, e.g. "mine.py:Class.add".

  Raises:
    TypeError: a type hint or a description is missing; the message says what to write.
  """
  description, described = read_docstring(function)
  if not description:
    raise TypeError(f"{name}: no docstring; write one, it tells the model what the tool does")
  try:
    hints = typing.get_type_hints(function)
  except Exception as error:
    raise TypeError(f"{name}: its type hints cannot be read: {error}") from None
  properties, required = {}, []
  for key, parameter in inspect.signature(function).parameters.items():
    if parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD):
      raise TypeError(f"{name}: takes {parameter}; name each argument, a model calls by name")
    if key not in hints:
      raise TypeError(f"{name}: the argument {key} has no type hint; write {key}: str")
    if key not in described:
      raise TypeError(f"{name}: the docstring has no line for {key} under 'Args:'; write one")
    properties[key] = type_schema(hints[key]) | _described(described[key], f"{name}, {key}")
    if parameter.default is parameter.empty:
      required.append(key)
  parameters = {"type": "object", "properties": properties}
  if required:
    parameters["required"] = required
  named = {"name": function.__name__, "description": description, "parameters": parameters}
  return {"type": "function", "function": named}


def _described(text: str, name: str) -> dict[str, Any]:
  """A description, and what may be chosen where it ends with (choices: ["a", "b"])."""
  found = _CHOICES.search(text)
  if not found:
    return {"description": text}
  try:
    choices = json.loads(found[1])
  except ValueError:
    raise TypeError(f'{name}: {found[0]!r} is no JSON list; write (choices: ["a", "b"])') from None
  return {"enum": choices, "description": text[: found.start()].strip()}


def type_schema(hint: Any) -> dict[str, Any]:
  """The JSON schema of a type hint; {} for a type that JSON does not know.

  >>> type_schema(list[int])
  {'type': 'array', 'items': {'type': 'integer'}}
  >>> type_schema(int | None)
  {'type': 'integer', 'nullable': True}
  """
  if hint in _SCALARS:
    return {"type": _SCALARS[hint]}
  origin, inner = typing.get_origin(hint), typing.get_args(hint)
  if origin in (typing.Union, types.UnionType):
    return _union([each for each in inner if each is not type(None)], type(None) in inner)
  if origin is typing.Literal:
    kinds = {_SCALARS.get(type(each), "string") for each in inner}
    return {"type": kinds.pop() if len(kinds) == 1 else sorted(kinds), "enum": list(inner)}
  if hint is list or origin is list:
    return {"type": "array"} | ({"items": type_schema(inner[0])} if inner else {})
  if hint is tuple or origin is tuple:
    if Ellipsis in inner or not inner:
      return {"type": "array"} | ({"items": type_schema(inner[0])} if inner else {})
    return {"type": "array", "prefixItems": [type_schema(each) for each in inner]}
  if hint is dict or origin is dict:
    more = {"additionalProperties": type_schema(inner[1])} if len(inner) == 2 else {}
    return {"type": "object"} | more
  return {}


def _union(members: list[Any], nullable: bool) -> dict[str, Any]:
  found = [type_schema(each) for each in members]
  if len(found) == 1:
    schema = found[0]
  elif all(list(each) == ["type"] and isinstance(each["type"], str) for each in found):
    schema = {"type": sorted(each["type"] for each in found)}
  else:
    schema = {"anyOf": found}
  return schema | ({"nullable": True} if nullable else {})


def read_docstring(function: Callable) -> tuple[str, dict[str, str]]:
  """What a Google-style docstring says: of the function, and of each argument."""
  lines = (inspect.getdoc(function) or "").splitlines()
  section, said, arguments, name = "", [], {}, ""
  indent = None
  for line in lines:
    if found := _SECTION.match(line):
      section, name, indent = found[1], "", None
    elif not section:
      said.append(line)
    elif section in ("Args", "Arguments", "Parameters") and line.strip():
      depth = len(line) - len(line.lstrip())
      indent = depth if indent is None else indent
      found = _ARGUMENT.match(line.strip()) if depth <= indent else None
      if found:
        name, arguments[found[1]] = found[1], found[2].strip()
      elif name:
        arguments[name] = f"{arguments[name]} {line.strip()}".strip()
  return "\n".join(said).strip(), arguments


_READS = {
  "string": (str,), "integer": (int,), "number": (int, float), "boolean": (bool,),
  "array": (list,), "object": (dict,), "null": (type(None),),
}  # fmt: skip


def argument_faults(schema: dict[str, Any], arguments: dict[str, Any]) -> str:
  """What is wrong with a call's arguments, for the model to read; "" where they fit.

  >>> schema = {"properties": {"a": {"type": "integer"}}, "required": ["a"]}
  >>> argument_faults(schema, {"b": 1})
  "unknown argument 'b'; missing argument 'a'"
  >>> argument_faults(schema, {"a": "x"})
  "argument 'a' must be of type integer"

  Args:
    schema: "parameters" of a tool.
    arguments: of a call, by name.
  """
  known, faults = schema.get("properties", {}), []
  faults += [f"unknown argument {name!r}" for name in arguments if name not in known]
  faults += [f"missing argument {n!r}" for n in schema.get("required", ()) if n not in arguments]
  for name, value in arguments.items():
    own = known.get(name, {})
    wanted = own.get("type")
    wanted = [wanted] if isinstance(wanted, str) else wanted
    allowed = tuple(kind for each in wanted or () for kind in _READS.get(each, (object,)))
    if value is None and own.get("nullable"):
      continue
    is_bool = isinstance(value, bool) and "boolean" not in (wanted or ())
    if wanted and (is_bool or not isinstance(value, allowed)):
      faults.append(f"argument {name!r} must be of type {' or '.join(wanted)}")
    elif "enum" in own and value not in own["enum"]:
      faults.append(f"argument {name!r} must be one of {json.dumps(own['enum'])}")
  return "; ".join(faults)
