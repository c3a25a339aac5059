"""`--env=search:DIR`: find passages in a directory of text files by their words (BM25).

`--env=search:demo` has a directory of its own: 1,000 towns and their 1,000 mayors, each a text of a
line. Who asks when a town's mayor was born needs two searches.
"""

from __future__ import annotations

import os
import sys
from typing import NamedTuple

_SHOWN = 3  # files per search
_CHARACTERS = 500  # of each
_LARGEST = 1 << 20  # bytes of a file that are read

_TOWNS = "ba co du fe ga hi jo ku le mi".split()
_ENDS = "bridge field ford ham holm mouth port stead ton wick".split()
_FIRST = "Ada Ben Cleo Dan Eva Finn Gus Hana Ivo Jan".split()


class Search:
  """A directory of text files, read and indexed once for all episodes."""

  @classmethod
  def _prepare(cls, directory: str) -> None:
    sys.modules.setdefault("jax", None)  # bm25s would sort with it, in threads no fork has
    try:
      import bm25s
    except ImportError:
      raise ImportError(
        "the environment search needs the package bm25s: pip install 'rl_llm[search]' "
        "(or pip install bm25s)"
      ) from None
    if directory == "demo":
      cls._names = [f"{name}.txt" for town in towns() for name in (town.name, town.mayor)]
      cls._texts = [text for town in towns() for text in town.texts()]
    else:
      cls._names, cls._texts = _files(directory)
    cls._split = staticmethod(lambda texts: bm25s.tokenize(texts, show_progress=False))
    cls._index = bm25s.BM25()
    cls._index.index(cls._split([f"{n} {t}" for n, t in cls._named()]), show_progress=False)

  @classmethod
  def _named(cls) -> list[tuple[str, str]]:
    """Pairs of a file's name, as words, and its text."""
    words = [os.path.splitext(name)[0].replace("_", " ") for name in cls._names]
    return list(zip(words, cls._texts, strict=True))

  def reset(self, **columns) -> str | None:
    self.searches = 0
    return None

  def search(self, query: str) -> str:
    """Finds the passages that share most words with a query.

    Args:
      query: A few words.
    """
    self.searches += 1
    words = self._split([query])
    if not len(words.ids[0]):
      return "nothing found; use other words"
    count = min(_SHOWN, len(self._texts))
    found, scores = self._index.retrieve(
      words, k=count, backend_selection="numpy", show_progress=False
    )
    lines = [
      f"[{self._names[i]}] {self._texts[i][:_CHARACTERS].strip()}"
      for i, score in zip(found[0], scores[0], strict=True)
      if score > 0
    ]
    return "\n".join(lines) or "nothing found; use other words"


class Town(NamedTuple):
  """A town of the demo."""

  name: str
  mayor: str
  born: int

  def texts(self) -> tuple[str, str]:
    """Of the town, and of its mayor; neither says all."""
    return f"The mayor of {self.name} is {self.mayor}.", f"{self.mayor} was born in {self.born}."


def towns() -> list[Town]:
  """The demo's 1,000 towns, always the same.

  >>> towns()[123].texts()
  ('The mayor of Coduham is Cleo Fedu.', 'Cleo Fedu was born in 1930.')
  """
  found = []
  for i in range(1000):
    hundreds, tens, ones = i // 100, i // 10 % 10, i % 10
    name = _TOWNS[hundreds] + _TOWNS[tens] + _ENDS[ones]
    k = (i * 367 + 91) % 1000  # Another order, so that a town's name says nothing of its mayor's.
    mayor = f"{_FIRST[k // 100]} {(_TOWNS[k // 10 % 10] + _TOWNS[k % 10]).capitalize()}"
    found.append(Town(name.capitalize(), mayor, 1930 + (i * 7919 + 13) % 70))
  return found


def _files(directory: str) -> tuple[list[str], list[str]]:
  """The names and the texts of the files of a directory and of those in it."""
  names, texts = [], []
  if not os.path.isdir(directory):
    raise FileNotFoundError(f"{directory}: no such directory; give one of .txt or .md files")
  for folder, folders, files in os.walk(directory):
    folders.sort()
    for name in sorted(files):
      if name.endswith((".txt", ".md")):
        with open(os.path.join(folder, name), encoding="utf-8", errors="replace") as file:
          texts.append(file.read(_LARGEST))
        names.append(os.path.relpath(os.path.join(folder, name), directory))
  if not texts:
    raise FileNotFoundError(f"{directory}: no .txt or .md file in it; put some there")
  return names, texts
