"""Calls of tools in what a model wrote: three small languages, and what to answer to a bad call.

    hermes   <tool_call>{"name": "add", "arguments": {"a": 1}}</tool_call>   Qwen, Hermes
    llama3   {"name": "add", "parameters": {"a": 1}}                          the whole turn
    text     call add: 1                                                      a line of its own

`text` is for models that were never taught to call tools. What follows the colon is the argument,
as it stands, where the tool has one; else a JSON object. A call whose line is empty there takes the
block in ``` fences below it, so that a program may have several lines.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from typing import Any, NamedTuple

from rl_llm.tasks.environments.schema import argument_faults

PROTOCOLS = ("hermes", "llama3", "text")
MAX_CALLS = 8  # in one turn

_HERMES = re.compile(r"<tool_call>(.*?)(</tool_call>|(?=<tool_call>)|\Z)", re.DOTALL)
_TEXT = re.compile(r"^[ \t]*call[ \t]+([^\s:]{1,64})[ \t]*:[ \t]*(.*)$", re.MULTILINE)
_FENCED = re.compile(r"\s*```[^\n]*\n(.*?)(?:\n```|\Z)", re.DOTALL)
_LLAMA_TAGS = re.compile(r"<\|(?:python_tag|eom_id|eot_id)\|>")


class Call(NamedTuple):
  """A call in a model's turn.

  Attributes:
    name: of the tool.
    arguments: by name.
    fault: what is wrong with the call, for the model to read; "" where it can be made.
  """

  name: str
  arguments: dict[str, Any]
  fault: str = ""


def parse_calls(
  text: str, tools: Sequence[dict[str, Any]], *, protocol: str = "hermes"
) -> list[Call]:
  r"""The calls in a turn, in order; none: the turn is the model's final answer.

  >>> properties = {"a": {"type": "integer", "description": "A number."}}
  >>> parameters = {"type": "object", "properties": properties, "required": ["a"]}
  >>> tools = [{"type": "function", "function": {"name": "inc", "parameters": parameters}}]
  >>> parse_calls('<tool_call>{"name": "inc", "arguments": {"a": 1}}</tool_call>', tools)
  [Call(name='inc', arguments={'a': 1}, fault='')]
  >>> parse_calls("I add one.\ncall inc: 1", tools, protocol="text")
  [Call(name='inc', arguments={'a': 1}, fault='')]
  >>> parse_calls("<tool_call>inc(1)</tool_call>", tools)[0].fault
  'not a call: write <tool_call>{"name": ..., "arguments": {...}}</tool_call>'
  >>> parse_calls("It is 2.", tools)
  []

  Args:
    text: what the model wrote. Calls within <think>...</think> are no calls.
    tools: JSON schemas.
    protocol: one of `PROTOCOLS`.
  """
  text = text.rpartition("</think>")[2]
  parameters = {each["function"]["name"]: each["function"]["parameters"] for each in tools}
  read = {"hermes": _hermes, "llama3": _llama3, "text": _text}[protocol]
  return [_checked(call, parameters) for call in read(text, parameters)]


def _checked(call: Call, parameters: dict[str, dict]) -> Call:
  """The call with what is wrong with it."""
  if call.fault:
    return call
  if call.name not in parameters:
    known = ", ".join(parameters)
    return call._replace(fault=f"no tool {call.name[:64]!r}; there is {known}")
  fault = argument_faults(parameters[call.name], call.arguments)
  return call._replace(fault=f"{call.name}: {fault}") if fault else call


def _hermes(text: str, parameters: dict[str, dict]) -> list[Call]:
  form = 'write <tool_call>{"name": ..., "arguments": {...}}</tool_call>'
  found = []
  for match in _HERMES.finditer(text):
    call = _from_json(match[1], "arguments", form)
    found.append(call if match[2] else call._replace(fault=f"a call without its end: {form}"))
  return found


def _llama3(text: str, parameters: dict[str, dict]) -> list[Call]:
  tagged = "<|python_tag|>" in text
  text = _LLAMA_TAGS.sub("", text).strip()
  if not tagged and not text.startswith("{"):
    return []
  form = 'write {"name": ..., "parameters": {...}}'
  decoder, found, at = json.JSONDecoder(), [], 0
  while at < len(text) and len(found) <= MAX_CALLS:
    try:
      _, end = decoder.raw_decode(text, at)
    except (ValueError, RecursionError):
      return [*found, Call("", {}, f"not a call: {form}")]
    found.append(_from_json(text[at:end], "parameters", form))
    at = end
    while at < len(text) and text[at] in "; \t\n\r":
      at += 1
  return found


def _from_json(text: str, key: str, form: str) -> Call:
  """A call as a JSON object with a name and arguments, which may be JSON text themselves."""
  value = _json(text)
  if not isinstance(value, dict) or not isinstance(value.get("name"), str):
    return Call("", {}, f"not a call: {form}")
  arguments = value.get(key, value.get("arguments", {}))
  arguments = _json(arguments) if isinstance(arguments, str) else arguments
  if not isinstance(arguments, dict):
    return Call(value["name"], {}, f"its {key} are no object: {form}")
  return Call(value["name"], arguments)


def _text(text: str, parameters: dict[str, dict]) -> list[Call]:
  found = []
  for match in _TEXT.finditer(text):
    name, written = match[1], match[2].strip()
    if not written and (block := _FENCED.match(text, match.end())):
      written = block[1]
    properties = parameters.get(name, {}).get("properties", {})
    value = _json(written) if written.startswith("{") else None
    if isinstance(value, dict) or name not in parameters:
      found.append(Call(name, value or {}))
    elif len(properties) == 1:
      [(key, schema)] = properties.items()
      found.append(Call(name, {key: _argument(written, schema)}))
    elif not properties and not written:
      found.append(Call(name, {}))
    else:
      names = ", ".join(f'"{key}": ...' for key in properties)
      found.append(Call(name, {}, f"not a call: write call {name[:64]}: {{{names}}}"))
  return found


def _argument(written: str, schema: dict[str, Any]) -> Any:
  """One argument as it is written: as it stands if it is text, else read as JSON."""
  if schema.get("type") == "string":
    return written
  value = _json(written)
  return written if value is None else value


def _json(text: str) -> Any:
  """JSON text parsed; None where it is none, or holds a number that is none."""
  try:
    return json.loads(text, parse_constant=_refuse)
  except (ValueError, RecursionError):
    return None


def _refuse(name: str) -> Any:
  raise ValueError(name)
