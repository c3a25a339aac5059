"""What a row says in addition to text: a message's calls and weight, tools, a template's names.

Conversation files come from many sources, each with its own names. A name that is not read fails
silently: the tools are missing from the prompt, or a turn marked as bad is learned. So known names
are either honoured here or refused:

    a message's tool_calls           arguments as an object, or as the JSON text of one (OpenAI)
    its weight, train, training      1 or 0: whether an assistant's turn is trained on
      or loss_mask
    a row's tools                    JSON schemas, or the JSON text of a list of them
    a row's chat_template_kwargs     names for the model's chat template, such as enable_thinking
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

from rl_llm.errors import UserError

WEIGHTS = ("weight", "train", "training", "loss_mask")
COLUMNS = ("tools", "chat_template_kwargs")
# What `rl_llm.text.chat_template.render` says itself.
_OWN_NAMES = ("messages", "tools", "add_generation_prompt", "bos_token", "eos_token")


class MessageError(UserError, ValueError):
  """A message, or a column next to it, cannot be used; the message says what to write."""


def check_messages(name: str, messages: Any, *, trained: bool) -> None:
  """Refuses messages that no template can lay out, or whose training marks would not be honoured.

  >>> check_messages("p", [{"role": "user", "content": " "}], trained=False)
  Traceback (most recent call last):
  rl_llm.text.messages.MessageError: 'p' holds an empty message of 'user'; write it or remove it

  Args:
    name: of the column, for messages.
    messages: what should be a list of messages.
    trained: whether assistants' turns in it are trained on.

  Raises:
    MessageError: the first fault, as "what; fix".
  """
  if not messages:
    raise MessageError(f"{name!r} has no message; write one or remove the row")
  for message in messages:
    if not isinstance(message, dict) or not isinstance(message.get("role"), str):
      raise MessageError(f"{name!r} holds a message without a role; write role and content as text")
    role, content, calls = message["role"], message.get("content"), message.get("tool_calls")
    if message.get("function_call"):
      raise MessageError(f"{name!r} holds a function_call; write it into a list, tool_calls")
    if not isinstance(content, str) and (content is not None or not calls):
      raise MessageError(
        f"{name!r} holds a message without content; write role and content as text"
      )
    # A system message may be empty on purpose, and a tool may return nothing.
    said = calls or content.strip() or message.get("reasoning_content")
    if role in ("user", "assistant") and not said:
      raise MessageError(f"{name!r} holds an empty message of {role!r}; write it or remove it")
    for call in calls or ():
      _arguments(name, call)
    weight = weight_of(name, message)
    if weight and role != "assistant":
      raise MessageError(
        f"{name!r} gives a message of {role!r} a weight; the assistant's turns alone are trained "
        "on, remove it or set it to 0"
      )
    if weight and not trained:
      raise MessageError(
        f"{name!r} gives a turn the weight 1, and is not trained on; remove the weight, or put the "
        "turn into 'completion'"
      )


def check_prompt_ends(name: str, messages: Sequence[Mapping[str, Any]]) -> None:
  """Refuses a prompt that leaves nothing to answer.

  Raises:
    MessageError: its last message is the assistant's.
  """
  if messages[-1]["role"] == "assistant":
    raise MessageError(
      f"{name!r} ends with the assistant's message, so nothing is left to answer; remove that "
      "message"
    )


def weight_of(name: str, message: Mapping[str, Any]) -> bool | None:
  """Whether a message says that it is trained on, or not; None where it says nothing.

  >>> weight_of("messages", {"weight": 0}), weight_of("messages", {"loss_mask": True})
  (False, True)

  Args:
    name: of the column, for errors.
    message: may have one of `WEIGHTS`; null says nothing.

  Raises:
    MessageError: a value other than 1, 0, true or false, or two that differ.
  """
  given = {key: message[key] for key in WEIGHTS if message.get(key) is not None}
  for key, value in given.items():
    if not isinstance(value, bool | int | float) or value not in (0, 1):
      raise MessageError(
        f"{name!r} holds a message with {key}={value!r}; write 1 (trained on) or 0 (not)"
      )
  if len(set(given.values())) > 1:
    raise MessageError(f"{name!r} holds a message with {_listed(given)}, which differ; keep one")
  return bool(next(iter(given.values()))) if given else None


def for_template(
  messages: Sequence[Mapping[str, Any]], *, calls_as_text: bool = False
) -> list[dict[str, Any]]:
  """The messages as chat templates expect them.

  Most templates write a call's arguments with `tojson`, which would quote JSON text a second time.
  They print a null content as "None". And keys that only control training are not part of a
  message.

  >>> call = {"function": {"name": "add", "arguments": '{"a": 2}'}}
  >>> turn = {"role": "assistant", "content": None, "tool_calls": [call], "weight": 1}
  >>> found = for_template([turn])[0]
  >>> found["tool_calls"], found["content"], "weight" in found
  ([{'function': {'name': 'add', 'arguments': {'a': 2}}}], '', False)

  Args:
    messages: a conversation.
    calls_as_text: arguments as JSON text, for the few templates that join them to text.

  Raises:
    MessageError: arguments that are neither an object nor the JSON text of one.
  """
  found = []
  for message in messages:
    message = {key: value for key, value in message.items() if key not in WEIGHTS}
    if message.get("tool_calls"):
      message["content"] = message.get("content") or ""
      message["tool_calls"] = [_with_arguments(c, calls_as_text) for c in message["tool_calls"]]
    found.append(message)
  return found


def template_names(columns: Mapping[str, Any]) -> dict[str, Any]:
  """What a row passes to the chat template in addition to its messages: tools and other names.

  >>> template_names({"tools": '[{"name": "add"}]', "chat_template_kwargs": {"enable_thinking": 0}})
  {'tools': [{'name': 'add'}], 'enable_thinking': 0}
  >>> template_names({"tools": None, "answer": "4"})
  {}

  Args:
    columns: of a row, by name; null says nothing, and so does an empty list or object.

  Raises:
    MessageError: they do not have the expected form.
  """
  tools, names = (_parsed(columns.get(name)) for name in COLUMNS)
  if tools:
    tools = [_parsed(tool) for tool in tools] if isinstance(tools, list) else [None]
    if not all(isinstance(tool, dict) for tool in tools):
      raise MessageError(
        "'tools' is no list of JSON schemas, nor the text of one; write one, or rename the column"
      )
  if names and not isinstance(names, dict):
    raise MessageError(
      "'chat_template_kwargs' is no object; write one such as {\"enable_thinking\": false}"
    )
  own = [name for name in names or () if name in _OWN_NAMES]
  if own:
    raise MessageError(f"'chat_template_kwargs' sets {own[0]}, which is not its own; remove it")
  return ({"tools": tools} if tools else {}) | (names or {})


def check_read(
  template: str, messages: Sequence[Mapping[str, Any]], names: Mapping[str, Any]
) -> None:
  """Refuses what a chat template would silently leave out.

  >>> try:
  ...   check_read("{{ messages[0].content }}", [], {"tools": [{"name": "add"}]})
  ... except MessageError as error:
  ...   print(str(error).partition(";")[0])
  the chat template never reads 'tools'

  Args:
    template: Jinja text.
    messages: what it lays out.
    names: from `template_names`.

  Raises:
    MessageError: the template does not mention one of `names`, or the tool_calls of a message.
  """
  wanted = list(names) + ["tool_calls"] * any(message.get("tool_calls") for message in messages)
  wanted += ["reasoning_content"] * any(message.get("reasoning_content") for message in messages)
  for name in wanted:
    if not re.search(rf"\b{re.escape(name)}\b", template):
      raise MessageError(
        f"the chat template never reads {name!r}; remove it from the row, or use a model whose "
        "template does"
      )


def _with_arguments(call: Mapping[str, Any], as_text: bool) -> dict[str, Any]:
  """The call with its arguments as an object, or as JSON text."""
  arguments = _arguments("tool_calls", call)
  arguments = json.dumps(arguments, ensure_ascii=False) if as_text else arguments
  if "function" in call:
    return {**call, "function": {**call["function"], "arguments": arguments}}
  return {**call, "arguments": arguments}


def _arguments(name: str, call: Any) -> dict[str, Any]:
  function = call.get("function", call) if isinstance(call, Mapping) else None
  if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
    raise MessageError(
      f"{name!r} holds a call without the name of a function; write "
      '{"type": "function", "function": {"name": ..., "arguments": {...}}}'
    )
  arguments = _parsed(function.get("arguments", {}))
  if not isinstance(arguments, dict):
    raise MessageError(
      f"{name!r} calls {function['name']} with arguments that are no object, nor the JSON text of "
      "one; write one"
    )
  return arguments


def _parsed(value: Any) -> Any:
  """JSON text parsed, anything else unchanged."""
  if not isinstance(value, str):
    return value
  try:
    found = json.loads(value)
    json.dumps(found, allow_nan=False)  # Python takes NaN, and reads 1e400 as infinity.
    return found
  except (ValueError, RecursionError):
    return value


def _listed(values: Mapping[str, Any]) -> str:
  return " and ".join(f"{key}={value!r}" for key, value in values.items())
