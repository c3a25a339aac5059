"""Where the parts of a split GGUF file are."""

from __future__ import annotations

import pathlib
import re


def part_paths(path: pathlib.Path) -> list[pathlib.Path]:
  """All parts of the file that this path belongs to, by its name; the first has the metadata.

  llama.cpp's gguf-split numbers the parts in their names, and reads no other names:

  >>> [part.name for part in part_paths(pathlib.Path("llama-00002-of-00003.gguf"))]
  ['llama-00001-of-00003.gguf', 'llama-00002-of-00003.gguf', 'llama-00003-of-00003.gguf']
  >>> part_paths(pathlib.Path("llama.gguf"))
  [PosixPath('llama.gguf')]
  """
  match = re.fullmatch(r"(.+)-\d{5}-of-(\d{5})\.gguf", path.name)
  if not match:
    return [path]
  stem, count = match[1], int(match[2])
  return [path.with_name(f"{stem}-{n:05d}-of-{count:05d}.gguf") for n in range(1, count + 1)]
