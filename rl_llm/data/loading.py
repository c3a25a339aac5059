"""Loads a data file as token lists for training and evaluation; every error names its line."""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import Any, Literal, NamedTuple

from rl_llm.data.encoding import Encoded, Limited, Overlong, Pair
from rl_llm.data.formats import COLUMNS, Dataset, Example, Format, count_reasons, read_dataset
from rl_llm.data.held_out import split_held_out
from rl_llm.data.jsonl import MAX_ROWS, DataError
from rl_llm.text import messages
from rl_llm.text.chat_template import ChatTemplateError
from rl_llm.text.tokenizers import TokenizerError


class Loaded(NamedTuple):
  """The result of loading a file.

  Attributes:
    training: `Encoded` or `Pair`, in the file's order.
    held_out: the same, of other prompts.
    counts: how many sequences or pairs, "rows", the file has, how many of its rows are "broken",
      how many sequences are "overlong", and how many of those were "dropped".
    note: the counts in words, for a person.
    training_columns: the other columns of each training example's row, by name.
    held_out_columns: the same of each held-out one.
  """

  training: list
  held_out: list
  counts: dict[str, int]
  note: str
  training_columns: list[dict[str, Any]]
  held_out_columns: list[dict[str, Any]]


def read_examples(
  path: str,
  *,
  formats: Collection[Format],
  format: Format | Literal["auto"] = "auto",
  strict: bool = True,
  max_rows: int = MAX_ROWS,
) -> Dataset:
  """`read_dataset`, of the formats that an experiment can train on.

  Args:
    path: the file.
    formats: keys of `rl_llm.data.formats.COLUMNS`.
    format: one of these, or "auto": the file's columns say which.
    strict: whether the first broken row is an error; else broken rows are dropped and counted.
    max_rows: the most rows.

  Raises:
    DataError: as `read_dataset`, or the file is of another format.
  """
  known = None if format == "auto" else format
  dataset = read_dataset(path, format=known, strict=strict, max_rows=max_rows)
  found = dataset.format
  if found not in formats:
    present = {*COLUMNS[found], *dataset.examples[0].columns}
    fits = [f"--data_format={name}" for name in formats if present >= {*COLUMNS[name]}]
    fix = f"{' or '.join(fits)} leaves the others alone" if fits else "rename columns to these"
    if found == "unpaired" and fits:  # Otherwise they would be learned like the wanted ones.
      fix = f"take out the rows whose label is false, and {fix}"
    trained = "; ".join(f"{name}: {', '.join(COLUMNS[name])}" for name in formats)
    raise DataError(
      f"{path}: rows of the format {found}, and what is trained here has other columns ({trained})"
      f"; {fix}"
    )
  return dataset


def unread_note(dataset: Dataset, *, read: Collection[str] = ()) -> str:
  """The columns of a data set that go nowhere, in words that continue a `Loaded`'s note.

  >>> from rl_llm.data.formats import Demonstration
  >>> row = Demonstration("2+2=", "4", {"level": 1, "tools": [], "margin": 2})
  >>> unread_note(Dataset("prompt_completion", (row,), (1,), ()), read=["margin"])
  '; columns that nothing reads: level'

  Args:
    dataset: from `read_examples`.
    read: columns that the experiment reads, in addition to those that every encoder does.
  """
  names = {name for example in dataset.examples for name in example.columns}
  names -= {*read, *COLUMNS[dataset.format], *messages.COLUMNS}
  return f"; columns that nothing reads: {', '.join(sorted(names))}" if names else ""


def load_sequences(
  path: str,
  dataset: Dataset,
  *,
  encode: Callable[[Example], Encoded | Pair],
  limit_all: Callable[..., Limited],
  limit: int,
  overlong: Overlong,
  strict: bool = True,
  held_out_fraction: float,
  check: Callable[[], None] = lambda: None,
) -> Loaded:
  """Encodes a data set, applies the policy for long sequences, and splits it by prompts.

  Args:
    path: of the file, for messages.
    dataset: from `read_examples`.
    encode: an example's tokens: `rl_llm.data.encoding.encode` or `encode_pair`, with its settings.
    limit_all: `limit_sequences` or `limit_pairs`.
    limit: tokens a sequence may have.
    overlong: "error", "drop", "truncate_left" or "truncate_right".
    strict: whether a row that cannot be laid out, as the chat template refuses it, is an error;
      else it is dropped and counted.
    held_out_fraction: of the prompts, as for `split_held_out`.
    check: called before each example; raises to stop.

  Returns:
    A `Loaded`.

  Raises:
    DataError: a sequence is too long under "error", (strict) cannot be laid out, or none is left;
      the message begins with `path:line:` where there is one.
  """
  sides = split_held_out(dataset.examples, fraction=held_out_fraction)
  lines = dict(zip(map(id, dataset.examples), dataset.lines, strict=True))
  errors = list(dataset.errors)
  counts = {"overlong": 0, "dropped": 0}

  def tokens_of(example: Any) -> Encoded | Pair | None:
    check()
    where = f"{path}:{lines[id(example)]}"
    try:
      encoded = encode(example)
    except (TokenizerError, ChatTemplateError, messages.MessageError) as error:
      if strict:
        raise DataError(f"{where}: {error}") from None
      errors.append(f"{where}: {error}")
      return None
    sequences = encoded if isinstance(encoded, Pair) else [encoded]
    longest = max(len(sequence.tokens) for sequence in sequences)
    if longest > limit and overlong == "error":
      raise DataError(
        f"{where}: {longest} tokens, over --max_tokens={limit}; raise it, or choose "
        "--overlong=drop, truncate_left or truncate_right"
      )
    limited = limit_all([encoded], limit=limit, overlong=overlong)
    counts["overlong"] += limited.overlong
    counts["dropped"] += limited.dropped
    return limited.kept[0]

  kept = [
    [(tokens, example.columns) for example in side if (tokens := tokens_of(example)) is not None]
    for side in sides
  ]
  training, held_out = ([tokens for tokens, _ in side] for side in kept)
  note = f"{len(training)} to train on, {len(held_out)} held out"
  if errors:
    reasons = "; ".join(f"{count} {reason}" for reason, count in count_reasons(errors).items())
    note += f"; {len(errors)} broken rows dropped ({reasons})"
  if counts["overlong"]:
    note += f"; {counts['overlong']} over {limit} tokens, {counts['dropped']} of them dropped"
  for kind, side, wanted in (
    ("train on", training, True),
    ("evaluate on", held_out, held_out_fraction > 0),
  ):
    if wanted and not side:
      raise DataError(
        f"{path}: nothing is left to {kind} ({note})" + (f"; {errors[0]}" if errors else "")
      )
  columns = ([columns for _, columns in side] for side in kept)
  rows = len(training) + len(held_out) + counts["dropped"]
  counts = {"rows": rows, "broken": len(errors), **counts}
  return Loaded(training, held_out, counts, note, *columns)
