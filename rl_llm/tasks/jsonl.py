"""Problems from a file, graded by a user's function: `jsonl:<path>`."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from rl_llm.data import read_table
from rl_llm.data.held_out import content_key, is_held_out
from rl_llm.data.jsonl import MAX_ROWS
from rl_llm.rewards import RewardSource, graders
from rl_llm.tasks.problem import Problem, Task, TaskError, check_option, number_text, rng_for
from rl_llm.text.messages import (
  COLUMNS,
  MessageError,
  check_messages,
  check_prompt_ends,
  template_names,
)

# Of a row's columns, by our own graders and by `rl_llm.rollout.demonstrations`.
READ_BY_GRADERS = ("answer", "completion")
# What a reward function is given in addition to a row's columns.
ARGUMENTS = ("prompts", "completions", "completion_ids", "trainer_state", "log_extra", "log_metric")


@dataclass(frozen=True)
class JsonlOptions:
  """`--task=jsonl:FILE`: problems of your own, a JSON object a line."""

  prompt_column: str = field(
    default="prompt",
    metadata={"help": "the key of the prompt: text, or messages with role and content"},
  )
  instruction: str = field(
    default="", metadata={"help": "text put after each prompt that is text, on a line of its own"}
  )
  reward_file: str = field(
    default="",
    metadata={"help": "Python file with reward(prompts, completions, **columns) -> list"},
  )
  reward_function: str = field(
    default="reward",
    metadata={
      "help": "the function's name in reward_file; without a file: gsm8k, exact_match or "
      "math_verify"
    },
  )
  max_reward: float = field(
    default=1.0, metadata={"help": "a response counts as correct if its reward is at least this"}
  )
  held_out_file: str = field(
    default="", metadata={"help": "JSONL file of problems for evaluation; else a fraction is taken"}
  )
  held_out_fraction: float = field(
    default=0.1, metadata={"help": "fraction of the rows kept for evaluation; a row's hash decides"}
  )
  lenient: bool = field(
    default=False, metadata={"help": "drop and count broken rows instead of stopping at the first"}
  )
  max_rows: int = field(
    default=MAX_ROWS, metadata={"help": "most rows of a file; one with more is refused"}
  )

  def __post_init__(self):
    name = "jsonl."
    check_option(
      name + "held_out_fraction",
      self.held_out_fraction,
      0 <= self.held_out_fraction < 1,
      "at least 0 and below 1",
    )
    check_option(name + "max_rows", self.max_rows, self.max_rows >= 1, "at least 1")
    check_option(
      name + "prompt_column", self.prompt_column, bool(self.prompt_column), "a key of the rows"
    )
    check_option(
      name + "prompt_column",
      self.prompt_column,
      self.prompt_column not in ARGUMENTS,
      f"none of the reward function's own arguments, {', '.join(ARGUMENTS)}",
    )


def _source(options: JsonlOptions) -> RewardSource:
  if options.reward_file:
    check_option(
      "jsonl.reward_file",
      options.reward_file,
      options.reward_file.endswith(".py"),
      "the path of a Python file ending in .py",
    )
    return RewardSource(options.reward_file, options.reward_function)
  if options.reward_function == "math_verify":
    if importlib.util.find_spec("math_verify") is None:
      raise TaskError(
        "jsonl.reward_function='math_verify' needs the package math-verify: pip install math-verify"
      )
    return RewardSource("rl_llm.rewards.math_answers", "math_verify", True, own_grader=True)
  if options.reward_function not in graders.FUNCTIONS:
    names = ", ".join((*graders.FUNCTIONS, "math_verify"))
    raise TaskError(
      f"jsonl.reward_function={options.reward_function!r} without jsonl.reward_file: must be "
      f"one of {names}; or give a file with --jsonl.reward_file=FILE.py"
    )
  return RewardSource("rl_llm.rewards.graders", options.reward_function, own_grader=True)


def _answer_of(options: JsonlOptions) -> Callable[[Problem, str], str | None] | None:
  """What a completion commits to, if the grader is one of ours; unknown for other graders."""
  if options.reward_file or options.reward_function == "math_verify":
    return None
  if options.reward_function == "exact_match":
    return lambda problem, text: text.strip()
  return lambda problem, text: number_text(graders.final_answer(text))


def _check_row(row: dict[str, Any], prompt_column: str, missing: str) -> str:
  """What is wrong with a row, for `read_rows`; `missing` is what to do about a missing prompt."""
  if prompt_column not in row:
    return f"no key {prompt_column!r} (it has {', '.join(map(repr, row))}); {missing}"
  for name in ARGUMENTS:
    if name in row:
      return f"a key {name!r}, which is an argument of the reward function; rename it"
  prompt = row[prompt_column]
  if not isinstance(prompt, str | list):
    return (
      f"{prompt_column!r} is of type {type(prompt).__name__}; must be text or a list of messages"
    )
  if isinstance(prompt, str) and not prompt.strip():
    return f"{prompt_column!r} is empty; write a prompt"
  try:
    if isinstance(prompt, list):
      check_messages(prompt_column, prompt, trained=False)
      check_prompt_ends(prompt_column, prompt)
    template_names(row)
  except MessageError as error:
    return str(error)
  return ""


def _problem(row: dict[str, Any], options: JsonlOptions) -> Problem:
  prompt = row[options.prompt_column]
  key = content_key(prompt)
  if options.instruction and isinstance(prompt, str):
    prompt = f"{prompt}\n{options.instruction}"
  columns = {name: value for name, value in row.items() if name != options.prompt_column}
  return Problem(prompt, columns, key)


def _unread(source: RewardSource, problems: Sequence[Problem]) -> str:
  """The columns that nothing reads, for the note; what a user's grader reads is unknown."""
  if not source.own_grader:
    return ""
  names = {name for problem in problems for name in problem.columns}
  names -= {*READ_BY_GRADERS, *COLUMNS}
  return f"; columns that nothing reads: {', '.join(sorted(names))}" if names else ""


def jsonl_task(
  path: str,
  options: JsonlOptions,
  *,
  name: str = "jsonl",
  check: Callable[[dict[str, Any]], str] = lambda row: "",
) -> Task:
  """Problems from the rows of a file: `{"prompt": text or messages, ...columns}`, plain or gzip.

  A Parquet file with the same columns works as well.

  All other keys of a row go to the reward function by name. Each step draws rows without repeating
  one within the step; over many steps every row comes up equally often on average. Rows are held
  out by a hash of their prompt, so equal prompts are on the same side, and adding rows moves none.
  With a held-out file, training rows with a prompt in it are left out, and `note` says how many.

  Args:
    path: the training rows.
    options: keys, reward function and split.
    name: the task's, for logs and for the flags named in errors.
    check: what else is wrong with a row, "" if nothing, as for `read_rows`.

  Raises:
    DataError: a file is missing or a row broken, as `path:line: what; fix`.
    TaskError: an option does not fit, or all rows are held out. That none is held out only matters
      to evaluation: see `rl_llm.tasks.check_held_out`.
  """
  source, missing = _source(options), "add it"
  if name == "jsonl":
    missing += ", or name the prompt's own key with --jsonl.prompt_column"

  def read(file: str) -> tuple[list[Problem], int]:
    found = read_table(
      file,
      check=lambda row: _check_row(row, options.prompt_column, missing) or check(row),
      strict=not options.lenient,
      max_rows=options.max_rows,
    )
    return [_problem(row, options) for row in found.rows], len(found.errors)

  problems, dropped = read(path)
  if options.held_out_file:
    held_out, dropped_there = read(options.held_out_file)
    dropped += dropped_there
  else:
    fraction = options.held_out_fraction
    held_out = [problem for problem in problems if is_held_out(problem.key, fraction=fraction)]
  keys = {problem.key for problem in held_out}
  training = [problem for problem in problems if problem.key not in keys]
  if not training:
    fix = f"lower --{name}.held_out_fraction"
    if options.held_out_file:
      fix = f"leave the prompts of {path} out of --{name}.held_out_file"
    count = len(problems)
    raise TaskError(f"{path}: all {count} rows are held out, none is left to train on; {fix}")

  overlap = len(problems) - len(training) - (0 if options.held_out_file else len(held_out))

  def sample(seed: int, step: int, count: int) -> list[Problem]:
    order: list[int] = []
    lap = 0
    while len(order) < count:
      order.extend(rng_for(seed, step, lap).permutation(len(training)).tolist())
      lap += 1
    return [training[index] for index in order[:count]]

  return Task(
    name=name,
    sample=sample,
    held_out=tuple(held_out),
    reward=source,
    max_reward=options.max_reward,
    note=(
      f"{len(training)} rows to train on, {len(held_out)} held out, {dropped} broken dropped, "
      f"{overlap} left out of training as held out{_unread(source, problems)}"
    ),
    answer_of=_answer_of(options),
    rows=tuple(training),
  )
