"""Demonstrations from a task: its own right answers, for supervised training before or during RL.

A grader needs to know the right answer, so most tasks can show it. It is in a column of the
problem, and users put it into the same column of their own files.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from rl_llm.data import DataError, Demonstration
from rl_llm.data.encoding import Encoded, Limited, Overlong, PromptFormat, limit_sequences
from rl_llm.rollout.drawing import prompt_text
from rl_llm.tasks import Problem, TaskError

COLUMNS = ("completion", "answer")


def demonstrations(
  problems: Sequence[Problem], *, prompt_format: PromptFormat = "chat"
) -> list[Demonstration]:
  """The right answer to each problem, as a response that gets the task grader's full reward.

  It is the problem's column "completion", or else its column "answer": for arithmetic the number,
  for copy the text, for GSM8K the worked solution in the file, for a puzzle the package's answer.

  >>> from rl_llm.tasks import load_task
  >>> problem = load_task("arithmetic").sample(0, 0, 1)[0]
  >>> [example] = demonstrations([problem])
  >>> example.completion == problem.columns["answer"]
  True

  If the grader is your own, make sure that it gives the full reward for the column's text: it may
  want the answer in another form.

  Args:
    problems: from a task's `sample` or `held_out`.
    prompt_format: "chat", or "plain", which turns a conversation into text as `encode_problems`
      does.

  Returns:
    A `Demonstration` for each problem, in the same order.

  Raises:
    TaskError: a problem has no answer; the message names it and the columns.
  """
  examples = []
  for problem in problems:
    answer = next((problem.columns[name] for name in COLUMNS if name in problem.columns), None)
    if answer is None or isinstance(answer, list | dict) or not str(answer).strip():
      raise TaskError(
        f"problem {problem.key!r}: no answer to learn from; give its row text in the column "
        "'completion' or, without that one, 'answer', or choose a task that has answers"
      )
    prompt = problem.prompt if prompt_format == "chat" else prompt_text(problem.prompt)
    examples.append(Demonstration(prompt, str(answer), problem.columns))
  return examples


def encode_answers(
  problems: Sequence[Problem],
  *,
  encode: Callable[[Demonstration], Encoded],
  limit: int,
  overlong: Overlong,
) -> Limited:
  """The right answers to problems as tokens, without those dropped as too long, and their counts.

  Args:
    problems: as for `demonstrations`.
    encode: `rl_llm.data.encoding.encode` with its settings, as a `functools.partial`.
    limit: the most tokens that a prompt with its answer may have.
    overlong: "error", "drop", "truncate_left" or "truncate_right".

  Returns:
    `Limited`, without a None in the place of one that was dropped.

  Raises:
    DataError: an answer is too long and `overlong` is "error", or all answers are too long.
    TaskError: as for `demonstrations`.
  """
  examples = demonstrations(problems, prompt_format=encode.keywords["prompt_format"])
  encoded = [encode(example) for example in examples]
  for problem, sequence in zip(problems, encoded, strict=True):
    if len(sequence.tokens) > limit and overlong == "error":
      raise DataError(
        f"problem {problem.key!r:.60}: {len(sequence.tokens)} tokens with its answer, over "
        f"--max_tokens={limit}; raise it, or choose --overlong=drop, truncate_left or "
        "truncate_right"
      )
  limited = limit_sequences(encoded, limit=limit, overlong=overlong)
  kept = [sequence for sequence in limited.kept if sequence is not None]
  if problems and not kept:
    raise DataError(f"all {len(problems)} examples are over --max_tokens={limit}; raise it")
  return limited._replace(kept=kept)
