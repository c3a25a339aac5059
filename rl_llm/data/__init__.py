"""Reading data sets: plain functions that name the file and line of what they refuse.

`rl_llm.data.encoding`, `rl_llm.data.packing` and `rl_llm.data.prompts` deal with tokens.
"""

from rl_llm.data.formats import (
  Dataset,
  Demonstration,
  Preference,
  Prompt,
  Unpaired,
  count_reasons,
  read_dataset,
  recognise,
)
from rl_llm.data.hh_transcripts import transcript_messages
from rl_llm.data.jsonl import DataError, Rows, read_rows
from rl_llm.data.parquet import read_parquet, read_table

__all__ = [
  "DataError",
  "Dataset",
  "Demonstration",
  "Preference",
  "Prompt",
  "Rows",
  "Unpaired",
  "count_reasons",
  "read_dataset",
  "read_parquet",
  "read_rows",
  "read_table",
  "recognise",
  "transcript_messages",
]
