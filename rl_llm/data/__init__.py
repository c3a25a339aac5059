"""Reading data sets: plain functions that name the file and line of what they refuse."""

from rl_llm.data.jsonl import DataError, Rows, read_rows

__all__ = ["DataError", "Rows", "read_rows"]
