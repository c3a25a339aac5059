"""What an explanation is: numbers, sentences about them in two languages, and a figure."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from rl_llm.checks import check_choice
from rl_llm.errors import ConfigError

LANGUAGES = ("en", "ja")


class Text(NamedTuple):
  """One sentence in each language; `{name}` stands for a number of the explanation."""

  en: str
  ja: str


class Curve(NamedTuple):
  """A line of a figure: `y` over `x`."""

  name: Text
  x: Sequence[float]
  y: Sequence[float]


class Figure(NamedTuple):
  """Curves over one axis.

  Fields:
    x_label: what the horizontal axis shows.
    curves: drawn in this order.
    points: (x, y) of the example itself, marked.
    stepped: whether the curves are values of numbered items, drawn as dots joined by lines.
  """

  x_label: Text
  curves: Sequence[Curve]
  points: Sequence[tuple[float, float]]
  stepped: bool = False


class TokenRow(NamedTuple):
  """A row of tokens, and what is true of each.

  Fields:
    parts: (who wrote them, the tokens), in the order of the row.
    marks: (what may be true of a token, whether it is true of each of the row).
  """

  parts: Sequence[tuple[Text, Sequence[str]]]
  marks: Sequence[tuple[Text, Sequence[bool]]]


class Explanation(NamedTuple):
  """A worked example.

  Fields:
    title: what is computed.
    values: the numbers by name, each an argument or what a function of the library returned; a
      tuple where there is one for each response, token or outcome.
    lines: the computation, a line a step; the last says in words what it will do.
    figure: makes the figure, most often of how the numbers depend on one of them.
  """

  title: Text
  values: Mapping[str, Any]
  lines: Sequence[Text]
  figure: Callable[[], Figure | TokenRow]


def render(explanation: Explanation, *, lang: str = "en") -> str:
  """The explanation as text, with its numbers to five digits.

  >>> title = Text("A sum", "和")
  >>> lines = (Text("sum = {sum}", "和 = {sum}"),)
  >>> example = Explanation(title, {"sum": 1 / 3}, lines, figure=lambda: Figure(title, (), ()))
  >>> print(render(example, lang="ja"))
  和
  <BLANKLINE>
  和 = 0.33333

  Args:
    explanation: of one of the topics.
    lang: "en" or "ja".

  Returns:
    The title, an empty line, and the lines.

  Raises:
    ValueError: `lang` is neither.
  """
  check_choice("lang", lang, LANGUAGES)
  shown = {name: _shown(value) for name, value in explanation.values.items()}
  lines = [getattr(text, lang).format(**shown) for text in explanation.lines]
  return "\n".join([getattr(explanation.title, lang), "", *lines])


def _shown(value: Any) -> str:
  if isinstance(value, tuple):
    return ", ".join(_shown(each) for each in value)
  return value if isinstance(value, str) else f"{value + 0.0:.5g}"


def check_probability(name: str, value: float) -> None:
  """Raises unless 0 < value < 1."""
  if not 0 < value < 1:
    raise ConfigError(name, value, "a probability above 0 and below 1", f"try --{name}=0.5")


def check_distribution(name: str, values: Sequence[float], example: str) -> None:
  """Raises unless there are two or more positive numbers that add up to 1."""
  if len(values) < 2 or min(values) <= 0 or abs(sum(values) - 1) > 1e-6:
    shown = ",".join(f"{value:g}" for value in values)
    allowed = "two or more positive probabilities that add up to 1"
    raise ConfigError(name, shown, allowed, f"try --{name}={example}")
