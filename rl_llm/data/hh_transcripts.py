r"""Conversations written as one text, in the style of Anthropic's HH data, as messages.

Published preferences often come as such transcripts, whose turns begin with "\n\nHuman:" and
"\n\nAssistant:". A chat template needs messages, so transcripts are taken apart before anything is
encoded.
"""

from __future__ import annotations

import re
from typing import Any

from rl_llm.data.jsonl import DataError

_TURN = re.compile(r"(?:^|\n\n)(Human|Assistant):")
_ROLES = {"Human": "user", "Assistant": "assistant"}


def transcript_messages(text: str) -> list[dict[str, str]]:
  r"""The messages of an HH-style transcript; a last turn that is only "Assistant:" is left out.

  >>> transcript_messages("\n\nHuman: 2+2?\n\nAssistant: 4")
  [{'role': 'user', 'content': '2+2?'}, {'role': 'assistant', 'content': '4'}]

  Raises:
    DataError: the text does not begin with "Human:" or "Assistant:" (after line breaks).
  """
  text = "\n\n" + text.lstrip("\n")
  start, *pieces = _TURN.split(text)
  if start or not pieces:
    raise DataError("a transcript that does not begin with a turn; begin with '\\n\\nHuman: '")
  messages = [
    {"role": _ROLES[name], "content": content.strip()}
    for name, content in zip(pieces[::2], pieces[1::2], strict=True)
  ]
  if messages[-1] == {"role": "assistant", "content": ""}:
    messages.pop()
  return messages


def transcripts_to_messages(texts: dict[str, Any]) -> dict[str, Any]:
  r"""Replaces HH-style text by messages. A completion continues where its prompt ends.

  >>> transcripts_to_messages({"prompt": "\n\nHuman: 2+2?\n\nAssistant:", "completion": " 4"})
  ...   # doctest: +NORMALIZE_WHITESPACE
  {'prompt': [{'role': 'user', 'content': '2+2?'}],
   'completion': [{'role': 'assistant', 'content': '4'}]}

  Args:
    texts: column name -> content. Where no column begins with "\n\nHuman:" it is returned as it is.

  Raises:
    DataError: as for `transcript_messages`.
  """
  if not any(isinstance(text, str) and text.startswith("\n\nHuman:") for text in texts.values()):
    return texts
  if "prompt" not in texts:
    return {name: transcript_messages(text) for name, text in texts.items()}
  start = texts["prompt"].rstrip()
  prompt = transcript_messages(start)
  if not start.endswith("\n\nAssistant:"):
    start += "\n\nAssistant:"
  result = {"prompt": prompt}
  for name, text in texts.items():
    if name != "prompt":
      text = text.lstrip().removeprefix("Assistant:")
      result[name] = transcript_messages(f"{start} {text}")[len(prompt) :]
  return result
