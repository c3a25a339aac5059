r"""Control tokens come from a chat template, never from the text of a message.

A message can spell a control token: `<|im_end|>` in a user's text would end the user's turn, and
the rest of the text could speak as the system. The tokenizer sees a single text and cannot tell the
difference. So wherever a message spells such a token, `break_up` puts a mark into it before the
template is rendered, and `Unspeakable` encodes the marked text as a tokenizer whose control tokens
have other names would encode it without marks. The text stays whole: if it were encoded in pieces,
a SentencePiece tokenizer would write a space at every seam.
"""

from __future__ import annotations

import functools
import json
import re
import secrets
from collections.abc import Collection, Iterable, Mapping
from typing import Any

# Noncharacters, which text may not hold; the number is there for text that holds them all the same.
_SECRET = secrets.token_hex(8)
MARK = f"\ufdd0{_SECRET}\ufdd1"

_BARRED = re.compile(r"<[|｜].+[|｜]>", re.DOTALL)
_TAG = re.compile(r"[<\[].+[>\]]", re.DOTALL)


def structural_tokens(backend: Any, template: str | None) -> frozenset[str]:
  """The texts that become one control id when a template writes them.

  They are all added tokens that are flagged special, those in bars, and the tags that the template
  mentions: Qwen3 does not flag `</think>` and `<tool_call>`, though they structure a turn. Gemma's
  `<table>` and its runs of line breaks are added tokens too, but of ordinary text.

  Args:
    backend: a `tokenizers.Tokenizer`.
    template: the chat template, or None.
  """
  return frozenset(
    token.content
    for token in backend.get_added_tokens_decoder().values()
    if token.special
    or _BARRED.fullmatch(token.content)
    or (_TAG.fullmatch(token.content) and token.content in (template or ""))
  )


def break_up(value: Any, names: frozenset[str]) -> Any:
  """A message, or any other JSON value, with a mark after the first character of each name.

  >>> break_up({"content": ["a<e>", 1]}, frozenset({"<e>"}))["content"][0].split(MARK)
  ['a<', 'e>']

  Args:
    value: text, lists and dicts of text, whose keys count as well; it is not changed.
    names: texts of control tokens.

  Returns:
    The same value without a mark if it spells no name.
  """
  texts = [text for text in _texts(value) if any(map(text.__contains__, _first_letters(names)))]
  held = [name for name in names if any(name in text for text in texts)]
  if not held:
    return value
  # Looks ahead, so that names that overlap are all broken.
  first = re.compile(f"(?=(?:{'|'.join(map(re.escape, held))}))(.)", re.DOTALL)

  def broken(value: Any) -> Any:
    if isinstance(value, str):
      return first.sub(lambda match: match[1] + MARK, value)
    if isinstance(value, Mapping):
      return {broken(key): broken(item) for key, item in value.items()}
    return [broken(item) for item in value] if isinstance(value, list | tuple) else value

  return broken(value)


@functools.cache
def _first_letters(names: frozenset[str]) -> frozenset[str]:
  """The names' first letters: few even for the 6,000 names of Gemma 3, and most texts hold none."""
  return frozenset(name[0] for name in names)


class Unspeakable:
  """A tokenizer whose control tokens have names that no text spells; otherwise unchanged.

  Attributes:
    backend: a `tokenizers.Tokenizer`; each of `names` is one of its tokens under another name.
  """

  def __init__(self, backend: Any, names: Collection[str]):
    self._private = {
      name: f"\ufdd2{_SECRET}:{index}\ufdd3" for index, name in enumerate(sorted(names))
    }
    # The longest first, as the tokenizer's own search has it. A single character cannot be broken:
    # a mark behind it says the same.
    alone = f"(?!{MARK})"
    spelled = [re.escape(n) + alone * (len(n) == 1) for n in sorted(names, key=len, reverse=True)]
    self._spelled = re.compile("|".join([MARK, *spelled]))
    self.backend = type(backend).from_str(_renamed(backend.to_str(), self._private))

  def encode(self, text: str) -> tuple[list[int], list[int]]:
    """Ids of a text with marks, and the place in it where each begins.

    A name that a mark breaks is ordinary text; one that none breaks was written by the template.
    """
    pieces, places, at = [], [], 0
    for match in self._spelled.finditer(text):
      pieces += [text[at : match.start()], self._private.get(match[0], "")]
      places += [*range(at, match.start()), *[match.start()] * len(pieces[-1])]
      at = match.end()
    pieces.append(text[at:])
    places += range(at, len(text) + 1)
    encoding = self.backend.encode("".join(pieces), add_special_tokens=False)
    return encoding.ids, [places[start] for start, _ in encoding.offsets]


def _renamed(specification: str, names: Mapping[str, str]) -> str:
  """A tokenizer.json whose tokens of these names have others, and the same ids."""
  whole = json.loads(specification)
  for token in whole["added_tokens"]:
    token["content"] = names.get(token["content"], token["content"])
  vocabulary = whole["model"]["vocab"]
  if isinstance(vocabulary, dict):
    vocabulary = {names.get(text, text): i for text, i in vocabulary.items()}
  else:  # Unigram: pairs of text and score.
    vocabulary = [[names.get(text, text), score] for text, score in vocabulary]
  whole["model"]["vocab"] = vocabulary
  if whole["model"].get("unk_token") in names:
    whole["model"]["unk_token"] = names[whole["model"]["unk_token"]]
  whole["post_processor"] = None  # It adds tokens by their names, and none are wanted.
  return json.dumps(whole)


def _texts(value: Any) -> Iterable[str]:
  if isinstance(value, str):
    yield value
  elif isinstance(value, Mapping):
    for key, item in value.items():
      yield from _texts(key)
      yield from _texts(item)
  elif isinstance(value, list | tuple):
    for item in value:
      yield from _texts(item)
