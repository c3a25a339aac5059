"""Schemas of tools from hints and docstrings, in the documented form."""

import importlib.util
from typing import Any, Literal, Optional, Union

import pytest

from rl_llm.tasks.environments.schema import argument_faults, tool_schema, type_schema


def weather(
  city: str, days: int = 3, unit: Literal["C", "F"] = "C", where: list[float] | None = None
) -> str:
  """Says the weather.

  It knows a few cities,
  no more.

  Args:
    city: Name of the city,
      as it is written there.
    days (int): How many days.
    unit: The unit.
    where: Latitude and longitude.

  Returns:
    A line of text.
  """


def pick(colour: str) -> str:
  """Picks a colour.

  Args:
    colour: The colour (choices: ["red", "blue"])
  """


def many(
  a: list[list[int]],
  b: dict[str, list[bool]],
  c: int | str,
  d: float | None,
  e: Literal[1, 2],
  f: tuple[int, str],
  g: dict = None,
  h: str = "x",
):
  """Takes many types.

  Args:
    a: Lists.
    b: Objects.
    c: Either.
    d: Or null.
    e: One or two.
    f: A pair.
    g: Anything.
    h: Text.
  """


def test_a_documented_function():
  assert tool_schema(weather, "x")["function"] == {
    "name": "weather",
    "description": "Says the weather.\n\nIt knows a few cities,\nno more.",
    "parameters": {
      "type": "object",
      "properties": {
        "city": {"type": "string", "description": "Name of the city, as it is written there."},
        "days": {"type": "integer", "description": "How many days."},
        "unit": {"type": "string", "enum": ["C", "F"], "description": "The unit."},
        "where": {
          "type": "array",
          "items": {"type": "number"},
          "nullable": True,
          "description": "Latitude and longitude.",
        },
      },
      "required": ["city"],
    },
  }


def test_choices_of_a_docstring():
  properties = tool_schema(pick, "x")["function"]["parameters"]["properties"]
  assert properties["colour"] == {
    "type": "string", "enum": ["red", "blue"], "description": "The colour"
  }  # fmt: skip


@pytest.mark.parametrize(
  ("hint", "schema"),
  [
    (bool, {"type": "boolean"}),
    (Any, {}),
    (list, {"type": "array"}),
    (dict[str, int], {"type": "object", "additionalProperties": {"type": "integer"}}),
    (tuple[int, str], {"type": "array", "prefixItems": [{"type": "integer"}, {"type": "string"}]}),
    (Optional[str], {"type": "string", "nullable": True}),  # noqa: UP045
    (Union[int, str], {"type": ["integer", "string"]}),  # noqa: UP007
    (list[int] | str, {"anyOf": [{"type": "array", "items": {"type": "integer"}},
                                 {"type": "string"}]}),
  ],
)  # fmt: skip
def test_types(hint, schema):
  assert type_schema(hint) == schema


@pytest.mark.skipif(importlib.util.find_spec("transformers") is None, reason="no transformers")
@pytest.mark.parametrize("function", [weather, pick, many])
def test_the_schema_is_that_of_transformers(function):
  from transformers.utils import get_json_schema

  theirs = get_json_schema(function)["function"]
  theirs.pop("return", None)
  assert tool_schema(function, "x")["function"] == theirs


def no_docstring(a: int): ...


def no_hint(a):
  """Does.

  Args:
    a: It.
  """


def not_described(a: int):
  """Does."""


def starred(*rest: int):
  """Does.

  Args:
    rest: All.
  """


@pytest.mark.parametrize(
  ("function", "fix"),
  [
    (no_docstring, "no docstring; write one"),
    (no_hint, "the argument a has no type hint; write a: str"),
    (not_described, "no line for a under 'Args:'; write one"),
    (starred, "name each argument"),
  ],
)
def test_what_is_missing_is_named(function, fix):
  with pytest.raises(TypeError, match=fix):
    tool_schema(function, "f")


def test_null_fits_where_it_is_allowed():
  parameters = tool_schema(weather, "x")["function"]["parameters"]
  assert argument_faults(parameters, {"city": "Oslo", "where": None}) == ""
  assert "unit" in argument_faults(parameters, {"city": "Oslo", "unit": "K"})
