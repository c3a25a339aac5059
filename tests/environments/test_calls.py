"""Parsers of calls: what is one, what is not, and what the model is told."""

import json

import pytest

from rl_llm.tasks.environments.calls import MAX_CALLS, Call, parse_calls


def tool(name, required=("a",), **types):
  properties = {key: {"type": kind, "description": key} for key, kind in types.items()}
  parameters = {"type": "object", "properties": properties, "required": list(required)}
  return {"type": "function", "function": {"name": name, "parameters": parameters}}


TOOLS = [tool("inc", a="integer"), tool("say", a="string", b="integer"), tool("run", a="string")]


def hermes(name, arguments):
  return f"<tool_call>\n{json.dumps({'name': name, 'arguments': arguments})}\n</tool_call>"


def test_several_calls_in_order_with_words_around_them():
  text = f"First. {hermes('inc', {'a': 1})} then {hermes('say', {'a': 'é', 'b': 2})} done"
  found = [Call("inc", {"a": 1}), Call("say", {"a": "é", "b": 2})]
  assert parse_calls(text, TOOLS, protocol="hermes") == found


def test_arguments_may_be_json_text():
  assert parse_calls(hermes("inc", '{"a": 1}'), TOOLS) == [Call("inc", {"a": 1})]


def test_a_call_in_a_thought_is_none():
  text = f"<think>{hermes('inc', {'a': 1})}</think>It is 2."
  assert parse_calls(text, TOOLS) == []


@pytest.mark.parametrize(
  ("text", "fault"),
  [
    ("<tool_call>inc(1)</tool_call>", "not a call: write <tool_call>"),
    ('<tool_call>{"name": "inc", "arguments": {"a": 1}}', "without its end"),
    ("<tool_call>[1]</tool_call>", "not a call"),
    ("<tool_call>" + "[" * 100_000 + "</tool_call>", "not a call"),
    ('<tool_call>{"name": "inc", "arguments": {"a": NaN}}</tool_call>', "not a call"),
    (hermes("inc", [1]), "are no object"),
    (hermes("dec", {"a": 1}), "no tool 'dec'; there is inc, say, run"),
    (hermes("inc", {}), "inc: missing argument 'a'"),
    (hermes("inc", {"a": "1"}), "must be of type integer"),
    (hermes("inc", {"a": True}), "must be of type integer"),
    (hermes("inc", {"a": 1, "z": 1}), "unknown argument 'z'"),
  ],
)
def test_a_malformed_call_says_what_to_write(text, fault):
  [call] = parse_calls(text, TOOLS)
  assert fault in call.fault


def test_llama3_takes_the_whole_turn():
  text = '<|python_tag|>{"name": "inc", "parameters": {"a": 3}}<|eom_id|>'
  assert parse_calls(text, TOOLS, protocol="llama3") == [Call("inc", {"a": 3})]
  two = '{"name": "inc", "parameters": {"a": 3}}; {"name": "inc", "parameters": {"a": 4}}'
  assert [call.arguments["a"] for call in parse_calls(two, TOOLS, protocol="llama3")] == [3, 4]
  assert parse_calls("The set {1, 2}", TOOLS, protocol="llama3") == []
  [bad] = parse_calls('{"name": "inc", ', TOOLS, protocol="llama3")
  assert "write {" in bad.fault


@pytest.mark.parametrize(
  ("text", "calls"),
  [
    ("call inc: 3", [Call("inc", {"a": 3})]),
    ("I add.\n  call inc :3\nthen wait", [Call("inc", {"a": 3})]),
    ("call run: x = '1'  ", [Call("run", {"a": "x = '1'"})]),
    ("call run:\n```python\nx = 1\nprint(x)\n```\n", [Call("run", {"a": "x = 1\nprint(x)"})]),
    ('call say: {"a": "x", "b": 2}', [Call("say", {"a": "x", "b": 2})]),
    ("please call inc: 3", []),
    ("call me", []),
  ],
)
def test_plain_text_calls(text, calls):
  assert parse_calls(text, TOOLS, protocol="text") == calls


@pytest.mark.parametrize(
  ("text", "fault"),
  [
    ("call inc: three", "inc: argument 'a' must be of type integer"),
    ("call say: hello", 'write call say: {"a": ..., "b": ...}'),
    ("call none: 1", "no tool 'none'"),
  ],
)
def test_plain_text_calls_that_cannot_be_made(text, fault):
  [call] = parse_calls(text, TOOLS, protocol="text")
  assert fault in call.fault


def test_a_flood_of_llama3_calls_is_cut():
  text = '{"name": "inc", "parameters": {"a": 3}}' * 1000
  assert len(parse_calls(text, TOOLS, protocol="llama3")) == MAX_CALLS + 1
