"""Demonstrations from a task: its own right answers, for supervised training before or beside RL.

A grader needs to know what is right, so most tasks can show it. What they show is in a column of
the problem, where the user of a file puts it too.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from rl_llm.data import DataError, Demonstration
from rl_llm.data.encoding import Encoded, Overlong, PromptFormat, limit_sequences
from rl_llm.rollout.experience import prompt_text
from rl_llm.tasks import Problem, TaskError

COLUMNS = ("completion", "answer")


def demonstrations(
  problems: Sequence[Problem], *, prompt_format: PromptFormat = "chat"
) -> list[Demonstration]:
  """The right answer to each problem, as a response that the task's grader pays in full.

  It is the problem's column "completion" or else its "answer": for arithmetic the number, for copy
  the text, for GSM8K the worked solution of the file, for a puzzle the package's answer.

  >>> from rl_llm.tasks import load_task
  >>> problem = load_task("arithmetic").sample(0, 0, 1)[0]
  >>> [example] = demonstrations([problem])
  >>> example.completion == problem.columns["answer"]
  True

  That a grader of your own pays in full for what the column holds is yours to see to: it may want
  the answer in a form that the column does not have.

  Args:
    problems: of a task's `sample` or `held_out`.
    prompt_format: "chat", or "plain": a conversation then becomes text, as `encode_problems` does.

  Returns:
    A `Demonstration` each, in their order.

  Raises:
    TaskError: a problem has no answer; the message names it and the columns.
  """
  examples = []
  for problem in problems:
    answer = next((problem.columns[name] for name in COLUMNS if name in problem.columns), None)
    if answer is None or isinstance(answer, list | dict) or not str(answer).strip():
      raise TaskError(
        f"problem {problem.key!r}: no answer to learn from; give its row a column 'completion' or "
        "'answer' with text, or choose a task that has answers"
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
) -> list[Encoded]:
  """The right answers to problems as tokens, without those that are dropped as too long.

  Args:
    problems: as for `demonstrations`.
    encode: `rl_llm.data.encoding.encode` with its settings, as a `functools.partial`.
    limit: tokens that a prompt with its answer may have.
    overlong: "error", "drop", "truncate_left" or "truncate_right".

  Raises:
    DataError: an answer is too long under "error", or all are.
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
  return kept
