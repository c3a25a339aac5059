r"""Data sets in the formats people already have: which columns there are, and what is in them.

The names are TRL's, which most published data sets follow. Text is plain or conversational (a list
of `{"role", "content"}` messages), the same throughout a row.

    prompt_only          prompt
    prompt_completion    prompt, completion
    preference           prompt, chosen, rejected
    implicit_preference  chosen, rejected, which begin with the same prompt
    unpaired             prompt, completion, label (true or 1: wanted, false or 0: unwanted)
    text, messages       text or messages: language modelling, every assistant's turn is trained on

What else a row or a message may hold, such as tools and weights, is in `rl_llm.text.messages`.

Plain text that begins with "\n\nHuman:" is a transcript in the style of Anthropic's HH data, and
becomes messages. A column `text` next to an answer is the same example, rendered already: the
answer is what counts, as in TRL. All other columns of a row are kept, for the reward function.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any, Literal, NamedTuple

from rl_llm.data.hh_transcripts import transcripts_to_messages
from rl_llm.data.jsonl import MAX_ROWS, DataError
from rl_llm.data.parquet import read_table
from rl_llm.text.messages import (
  MessageError,
  check_messages,
  check_prompt_ends,
  template_names,
  weight_of,
)

Content = str | list[dict[str, Any]]
Format = Literal[
  "prompt_only",
  "prompt_completion",
  "preference",
  "implicit_preference",
  "unpaired",
  "text",
  "messages",
]

COLUMNS = {
  "prompt_only": ("prompt",),
  "prompt_completion": ("prompt", "completion"),
  "preference": ("prompt", "chosen", "rejected"),
  "implicit_preference": ("chosen", "rejected"),
  "unpaired": ("prompt", "completion", "label"),
  "text": ("text",),
  "messages": ("messages",),
}
_CONTENT = {name for names in COLUMNS.values() for name in names} - {"label"}


class Prompt(NamedTuple):
  """Something to answer; the columns go to the reward function by name."""

  prompt: Content
  columns: dict[str, Any]


class Demonstration(NamedTuple):
  """An answer to imitate. In language modelling the prompt is empty, "" or []."""

  prompt: Content
  completion: Content
  columns: dict[str, Any]


class Preference(NamedTuple):
  """Two answers to one prompt; the first is the better one."""

  prompt: Content
  chosen: Content
  rejected: Content
  columns: dict[str, Any]


class Unpaired(NamedTuple):
  """An answer, and whether it is wanted."""

  prompt: Content
  completion: Content
  label: bool
  columns: dict[str, Any]


Example = Prompt | Demonstration | Preference | Unpaired


class Dataset(NamedTuple):
  """The good rows of a file.

  Attributes:
    format: what the file is, a key of `COLUMNS`.
    examples: one per good row; all of the type that belongs to the format.
    lines: the line (in Parquet: row) number of each, from 1.
    errors: one message `path:line: what; fix` per dropped row; always empty in strict reading.
  """

  format: Format
  examples: tuple[Example, ...]
  lines: tuple[int, ...]
  errors: tuple[str, ...]


def read_dataset(
  path: str, *, format: Format | None = None, strict: bool = True, max_rows: int = MAX_ROWS
) -> Dataset:
  """Reads JSONL (plain or gzip) or Parquet in any of the formats above.

  A row has a format if it has all of that format's columns and no other column with a meaning here.
  Without `format`, most of the rows decide, so a broken first row cannot turn pairs into prompts.

  >>> import tempfile
  >>> with tempfile.NamedTemporaryFile("w", suffix=".jsonl") as file:
  ...   _ = file.write('{"chosen": "2+2? 4", "rejected": "2+2? 5", "level": 1}\\n'); file.flush()
  ...   found = read_dataset(file.name)
  >>> found.format
  'implicit_preference'
  >>> found.examples[0]
  Preference(prompt='2+2?', chosen=' 4', rejected=' 5', columns={'level': 1})

  Args:
    path: the file; its first bytes say what kind it is.
    format: a key of `COLUMNS` where the columns leave a choice: other columns are then the user's
      own. None recognises it.
    strict: whether the first broken row is an error; otherwise broken rows are dropped, each with
      its message (`count_reasons` adds them up).
    max_rows: the most rows.

  Returns:
    The examples, their line numbers, and the messages of the rows dropped.

  Raises:
    DataError: no such file, a damaged one, no good row in it, columns of no format or of several,
      or (strict) a broken row.
  """
  if format is not None and format not in COLUMNS:
    raise DataError(f"format={format!r}: must be one of {', '.join(COLUMNS)}")
  exact = format is None
  chosen = _recognise_file(path, max_rows) if format is None else format

  def check(row: dict[str, Any]) -> str:
    try:
      if exact and (problem := _misfit(row, chosen)):
        return problem
      _example(row, chosen)
    except (DataError, MessageError) as error:
      return str(error)
    return ""

  rows = read_table(path, check=check, strict=strict, max_rows=max_rows)
  examples = tuple(_example(row, chosen) for row in rows.rows)
  return Dataset(chosen, examples, rows.lines, rows.errors)


def labelled(dataset: Dataset) -> Dataset:
  """Single answers, each with its label among its columns: of a pair, the better one is wanted.

  >>> pair = Preference("2+2=", "4", "5", {"level": 1})
  >>> for row in labelled(Dataset("preference", (pair,), (1,), ())).examples:
  ...   print(row.completion, row.columns)
  4 {'level': 1, 'label': True}
  5 {'level': 1, 'label': False}

  Args:
    dataset: of the format unpaired, preference or implicit_preference.

  Returns:
    Of the format unpaired; both answers of a pair have the pair's line.
  """
  rows, lines = [], []
  for example, line in zip(dataset.examples, dataset.lines, strict=True):
    if isinstance(example, Unpaired):
      answers = [(example.completion, example.label)]
    else:
      answers = [(example.chosen, True), (example.rejected, False)]
    for completion, label in answers:
      columns = example.columns | {"label": label}
      rows.append(Unpaired(example.prompt, completion, label, columns))
      lines.append(line)
  return Dataset("unpaired", tuple(rows), tuple(lines), dataset.errors)


def recognise(columns: Iterable[str]) -> Format:
  """The format that has these columns.

  >>> recognise(["prompt", "chosen", "rejected", "source"])
  'preference'
  >>> recognise(["prompt", "completion", "text"])  # The text is the other two, rendered.
  'prompt_completion'

  Raises:
    DataError: they fit none, or more than one.
  """
  columns = set(columns)
  present = (columns & _CONTENT) | ({"label"} & columns if "completion" in columns else set())
  if present - {"text"} in (set(COLUMNS["prompt_completion"]), set(COLUMNS["messages"])):
    present -= {"text"}  # The same example, rendered already.
  for name, needed in COLUMNS.items():
    if set(needed) == present:
      return name
  listed = ", ".join(map(repr, sorted(present or columns)))
  fits = [name for name, needed in COLUMNS.items() if set(needed) <= present]
  if fits:
    raise DataError(
      f"ambiguous columns {listed}: could be {' or '.join(fits)} with columns of your own; say "
      "which with --data_format, or rename those that are yours"
    )
  known = "; ".join(f"{name}: {', '.join(needed)}" for name, needed in COLUMNS.items())
  raise DataError(f"columns {listed} are of no known format; rename or add some ({known})")


def count_reasons(errors: Iterable[str]) -> dict[str, int]:
  """How many rows were dropped for which reason, the most frequent first; they add up to all.

  >>> count_reasons(["a.jsonl:3: not JSON: cut short at column 9; write ...",
  ...                "a.jsonl:7: not JSON: cut short at column 2; write ...",
  ...                "a.jsonl:8: 'prompt' is null; write it"])
  {'not JSON': 2, "'prompt' is null": 1}

  Args:
    errors: `errors` of a `Dataset` or of `Rows`.
  """

  def reason(message: str) -> str:
    text = re.sub(r"^.*?:\d+: ", "", message, count=1)
    return re.sub(r"\d+", "N", re.split(r"[:;(]", text, maxsplit=1)[0]).strip()

  return dict(Counter(map(reason, errors)).most_common())


def _recognise_file(path: str, max_rows: int) -> Format:
  """The format of most rows; the first error message if no row has a format."""
  found, first = Counter(), ""
  rows = read_table(path, strict=False, max_rows=max_rows)
  for row, line in zip(rows.rows, rows.lines, strict=True):
    try:
      found[recognise(row)] += 1
    except DataError as error:
      first = first or f"{path}:{line}: {error}"
  if not found:
    raise DataError(first)
  return found.most_common(1)[0][0]


def _misfit(row: Mapping[str, Any], format: Format) -> str:
  """Why a row is not of the format that most rows of its file have."""
  missing = [name for name in COLUMNS[format] if name not in row]
  if missing:
    return _missing(row, missing[0])
  other = recognise(row)
  if other != format:
    return (
      f"columns of {other} among rows of {format}; give all rows the same, or let "
      f"--data_format={format} take the others for your own"
    )
  return ""


def _missing(row: Mapping[str, Any], name: str) -> str:
  return f"no key {name!r}; add it to {', '.join(map(repr, row)) or 'the empty row'}"


def _example(row: Mapping[str, Any], format: Format) -> Example:
  """The example in a row; raises DataError with what is wrong with it."""
  names = COLUMNS[format]
  for name in names:
    if name not in row:
      raise DataError(_missing(row, name))
    if row[name] is None:
      raise DataError(f"{name!r} is null; write it or remove the row")
  texts = {name: row[name] for name in names if name != "label"}
  for name, content in texts.items():
    _check_content(name, content)
  if len({type(content) for content in texts.values()}) > 1:
    fix = "write them in one form"
    if format == "preference" and row["chosen"][:1] == row["rejected"][:1]:
      fix += "; or, as both answers begin with the prompt, --data_format=implicit_preference"
    listed = " and ".join(map(repr, texts))
    raise DataError(f"{listed} are neither all text nor all messages; {fix}")
  columns = {name: value for name, value in row.items() if name not in names}
  template_names(columns)
  if "label" in names and row["label"] not in (0, 1):
    raise DataError(
      f"'label' is {row['label']!r:.40}; write true or false, or, if it is a column of your own, "
      "let --data_format=prompt_completion leave it alone"
    )
  texts = transcripts_to_messages(texts)
  if format == "implicit_preference":
    texts = _split_common_prompt(texts["chosen"], texts["rejected"])
  for name, content in texts.items():
    if isinstance(content, list):
      _check_turns(name, content)
  if format == "prompt_only":
    return Prompt(texts["prompt"], columns)
  if format in ("text", "messages"):
    content = texts[format]
    return Demonstration(content[:0], content, columns)
  if format == "prompt_completion":
    return Demonstration(**texts, columns=columns)
  if format == "unpaired":
    return Unpaired(**texts, label=bool(row["label"]), columns=columns)
  return Preference(**texts, columns=columns)


def _check_content(name: str, content: Any) -> None:
  if isinstance(content, str):
    if name == "messages":
      raise DataError("'messages' is text; write a list of messages, or name the column 'text'")
    if not content.strip():
      raise DataError(f"{name!r} is empty; write it or remove the row")
    return
  if not isinstance(content, list):
    raise DataError(
      f"{name!r} is of type {type(content).__name__}; write text or a list of messages"
    )
  if name == "text":
    raise DataError("'text' is a list; write text, or name the column 'messages'")
  check_messages(name, content, trained=name != "prompt")


def _check_turns(name: str, messages: list[dict[str, Any]]) -> None:
  """Refuses messages that do not begin or end as the column requires."""
  trained = [weight_of(name, m) is not False for m in messages if m["role"] == "assistant"]
  if name == "prompt":  # Once more, for one that was taken off two answers.
    check_messages(name, messages, trained=False)
    check_prompt_ends(name, messages)
  elif name in ("text", "messages"):
    trained = trained[messages[0]["role"] == "assistant" :]  # To begin with is to answer nothing.
  elif messages[0]["role"] != "assistant":
    raise DataError(
      f"{name!r} begins with the message of {messages[0]['role']!r}; begin it with the "
      "assistant's, and put what comes before into 'prompt'"
    )
  if name in ("chosen", "rejected") and not all(trained):
    raise DataError(
      f"{name!r} has a turn of weight 0, but answers are compared whole; remove the weight"
    )
  if name != "prompt" and not any(trained):
    raise DataError(
      f"{name!r} has no answer of the assistant that is trained on; add one, or remove the row"
    )


def _split_common_prompt(chosen: Content, rejected: Content) -> dict[str, Content]:
  """Removes the prompt from two answers that both begin with it: their longest common prefix.

  In text, a partly shared word is not part of the prompt ("It" and "Is" share an I, which TRL would
  leave there), and a space before the answers belongs to them, as in vocabularies (" 4").
  """
  size = 0
  for one, other in zip(chosen, rejected, strict=False):
    if one != other:
      break
    size += 1
  if isinstance(chosen, str):
    if chosen[size : size + 1].isalnum() or rejected[size : size + 1].isalnum():
      while size and chosen[size - 1].isalnum():
        size -= 1
    if chosen[size:] and rejected[size:]:
      size = len(chosen[:size].rstrip(" "))
  if not size:
    raise DataError("'chosen' and 'rejected' share no prompt; add the column 'prompt'")
  if size == min(len(chosen), len(rejected)):
    raise DataError(
      "'chosen' and 'rejected' are the same, or one is the beginning of the other; where the "
      "prompt ends cannot be told, add the column 'prompt'"
    )
  return {"prompt": chosen[:size], "chosen": chosen[size:], "rejected": rejected[size:]}
