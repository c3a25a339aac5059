r"""Mathematical answers, compared as mathematics by the package math-verify: 1/2 is \frac{2}{4}.

It reads what a model wrote with SymPy, which evaluates text as Python. So its responses are graded
as programs are: each in a process of its own, behind the whole sandbox.
"""

from __future__ import annotations

from typing import Any

from math_verify import LatexExtractionConfig, parse, verify

from rl_llm.rewards.calls import completion_text

# Seconds of reading a text and of one comparison, which math-verify ends by itself: both together
# are less than --reward_deadline, after which a grade has failed instead of being wrong.
_LIMIT = 2

REWARD_RANGE = (0.0, 1.0)


def math_verify(prompts, completions, answer, **columns) -> list[float | None]:
  r"""1 if the completion's answer equals `answer`, else 0; None if that is no mathematics.

  >>> texts = [r"It is $\frac{2}{4}$.", r"\boxed{0.5}", r"$\frac{1}{3}$"]
  >>> math_verify(["?"] * 3, texts, answer=["1/2", r"\frac12", "1/2"])
  [1.0, 1.0, 0.0]

  Args:
    prompts: unused.
    completions: N texts or messages.
    answer: N right answers: LaTeX with or without its dollars, or a number.
  """
  return [
    _grade(completion_text(text), right) for text, right in zip(completions, answer, strict=True)
  ]


def _grade(text: str, right: Any) -> float | None:
  bare = not isinstance(right, str) or not any(mark in right for mark in ("$", "\\boxed", "\\("))
  latex = [LatexExtractionConfig()]
  gold = parse(f"${right}$", latex, parsing_timeout=_LIMIT) if bare else []
  gold = gold or parse(str(right), parsing_timeout=_LIMIT)
  if not gold:
    return None
  # A text that cannot be read in time, or at all, is an error here, and a wrong answer in the end.
  said = parse(text, parsing_timeout=_LIMIT, raise_on_error=True)
  return float(verify(gold, said, timeout_seconds=_LIMIT))
