"""Which code a run is of, so that it does not resume with another without a word.

A copy of a script with another advantage is another experiment, even where all settings agree. So a
run's directory records the module that ran, its commit, and a hash of every module that it imports,
directly or not. Hashes are of the parsed code: comments, docstrings and layout do not count.
"""

from __future__ import annotations

import ast
import functools
import hashlib
import os
import subprocess
import sys
import sysconfig
import textwrap
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import rl_llm

_LIBRARY = Path(rl_llm.__file__).parent.parent
_STANDARD = sysconfig.get_paths()["stdlib"]
_OF_LIBRARY = "rl_llm", "experiments"  # Also imported from elsewhere; all else is a dependency.


class Program(NamedTuple):
  """The code of an experiment.

  Attributes:
    module: its dotted name, such as "experiments.grpo".
    commit: first 12 digits, of the repository that holds it; "" outside of one.
    uncommitted: whether a file that git tracks there differs from that commit.
    own: {module: hash} of what defines the experiment.
    imported: {module: hash} of what that imports, directly or not, from its directory or from this
      library. Dependencies are not listed.
  """

  module: str
  commit: str
  uncommitted: bool
  own: dict[str, str]
  imported: dict[str, str]


def program(config: Any) -> Program:
  """The program that trains with this config: the module that defines it, and what that imports.

  The module that runs, if it merely imports the config's class, is the program all the same.
  """
  module, path = experiment(type(config))
  if path is None:
    return Program(module, "", False, {}, {})
  found = {name: digest(file) for name, file in sources(path, module).items()}
  names = {module, _module_name(type(config).__module__)} & found.keys()
  return Program(
    module,
    *_commit(path.parent),
    {name: found.pop(name) for name in sorted(names)},
    dict(sorted(found.items())),
  )


def experiment(config_class: type) -> tuple[str, Path | None]:
  """The name and the file of the module that runs with this config; None without a file.

  >>> from rl_llm.tasks import CopyOptions
  >>> experiment(CopyOptions)[0]
  'rl_llm.tasks.copy_text'
  """
  main = sys.modules["__main__"]
  runs = getattr(main, "__spec__", None) is not None and config_class in vars(main).values()
  name = "__main__" if runs else config_class.__module__
  file = getattr(sys.modules[name], "__file__", None)
  return _module_name(name), Path(file).resolve() if file else None


def _module_name(name: str) -> str:
  """A module's dotted name, of the one that runs too: as given to `python -m`, or by its path."""
  module = sys.modules[name]
  if name != "__main__":
    return name
  if module.__spec__ is not None:
    return module.__spec__.name
  file = getattr(module, "__file__", None)
  if file is None:
    return name
  path = Path(file).resolve()
  return ".".join(path.with_suffix("").relative_to(_root(path)).parts)


def digest(path: Path) -> str:
  """A hash of a file's parsed code.

  >>> import tempfile
  >>> def of(text):
  ...   path = Path(tempfile.mkdtemp(), "reward.py")
  ...   path.write_text(text)
  ...   return digest(path)
  >>> twice = of("def reward(x):\\n  return 2 * x")
  >>> twice == of("def reward(x):\\n  'Twice.'\\n  return (2*x)  # doubled")
  True
  >>> twice == of("def reward(x):\\n  return 3 * x")
  False

  A file that does not parse has the hash of its bytes: whoever runs it will say what is wrong.
  """
  return _read(path, *_version(path))[0]


def digest_of_text(text: str) -> str:
  """As `digest`, of a piece of source, which may be indented; of its text if it does not parse."""
  try:
    tree = ast.parse(textwrap.dedent(text))
  except (SyntaxError, ValueError):
    return hashlib.sha256(text.encode("utf-8", "backslashreplace")).hexdigest()
  return _digest_of_tree(tree)[0]


def digest_of_file(path: Path) -> str:
  """As `digest`, also of the modules that the file imports from its directory."""
  found = sources(path.resolve())
  own = [name for name in found if name.partition(".")[0] not in _OF_LIBRARY]
  return hashlib.sha256(" ".join(digest(found[name]) for name in sorted(own)).encode()).hexdigest()


def differences(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
  """The modules whose code is not the same in two programs, as inputs.json has them.

  >>> old = {"own": {"experiments.grpo": "a"}, "imported": {"rl_llm.kl": "b"}}
  >>> differences(old, old | {"imported": {"rl_llm.kl": "c", "rl_llm.files": "d"}})
  ['rl_llm.files', 'rl_llm.kl']
  """
  before, now = (program["own"] | program["imported"] for program in (old, new))
  return sorted(name for name in before | now if before.get(name) != now.get(name))


def _version(path: Path) -> tuple[int, int]:
  found = path.stat()
  return found.st_mtime_ns, found.st_size


@functools.cache
def _read(path: Path, *_: int) -> tuple[str, tuple[tuple[int, str, tuple[str, ...]], ...]]:
  """A file's hash, and its imports: (level, module, names)."""
  content = path.read_bytes()
  try:
    tree = ast.parse(content)
  except (SyntaxError, ValueError):
    return hashlib.sha256(content).hexdigest(), ()
  digest, nodes = _digest_of_tree(tree)
  imports: list[tuple[int, str, tuple[str, ...]]] = []
  for node in nodes:
    if isinstance(node, ast.Import):
      imports += [(0, alias.name, ()) for alias in node.names]
    else:
      imports.append((node.level, node.module or "", tuple(alias.name for alias in node.names)))
  return digest, tuple(imports)


_Import = ast.Import | ast.ImportFrom


def _digest_of_tree(tree: ast.Module) -> tuple[str, list[_Import]]:
  """The hash of a syntax tree, and the imports in it."""
  parts: list[str] = []
  imports: list[_Import] = []
  _spell(tree, parts, imports)
  text = "\n".join(parts).encode("utf-8", "backslashreplace")
  return hashlib.sha256(text).hexdigest(), imports


def _spell(node: Any, parts: list[str], imports: list[_Import]) -> None:
  """Appends a syntax tree's words, without docstrings, places, and whatever a field leaves empty,
  so that Python versions that add fields agree; and its imports."""
  if isinstance(node, list):
    parts.append("[")
    for item in node:
      _spell(item, parts, imports)
    parts.append("]")
  elif isinstance(node, ast.AST):
    parts.append(type(node).__name__)
    if isinstance(node, _Import):
      imports.append(node)
    for name in node._fields:
      value = getattr(node, name, None)
      if name == "body" and isinstance(node, _DOCUMENTED) and _has_docstring(value):
        value = value[1:]
      if value is not None and value != []:
        parts.append(name)
        _spell(value, parts, imports)
    parts.append(";")
  else:
    parts.append(repr(node))


_DOCUMENTED = ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef


def _has_docstring(body: list[ast.stmt]) -> bool:
  first = body[0].value if body and isinstance(body[0], ast.Expr) else None
  return isinstance(first, ast.Constant) and isinstance(first.value, str)


def sources(path: Path, module: str = "") -> dict[str, Path]:
  """{module: file} of a file and of all that it imports, directly or not.

  Only what lies below the directory that the file is imported from, and this library, is followed:
  other packages have versions.

  Args:
    path: the file.
    module: its dotted name; "": as its directories have it.
  """
  root = _root(path)
  module = module or ".".join(path.with_suffix("").relative_to(root).parts)
  found, left, seen = {module: path}, [(module, path)], set()
  while left:
    imported = set(_imports(*left.pop()))
    wanted = {name for whole in imported for name in _and_packages(whole)} - seen
    seen |= wanted
    for name in sorted(wanted):
      place = _file(name, root)
      if place is not None and name not in found and place != path:
        found[name] = place
        left.append((name, place))
  return found


def _root(path: Path) -> Path:
  """The directory from which a file's package is imported."""
  directory = path.parent
  while (directory / "__init__.py").exists():
    directory = directory.parent
  return directory


def _imports(name: str, file: Path) -> Iterator[str]:
  """Dotted names that a module imports; of `from a import b` both a and a.b, which may be one."""
  package = name.split(".") if file.name == "__init__.py" else name.split(".")[:-1]
  for level, module, names in _read(file, *_version(file))[1]:
    above = package[: len(package) - level + 1] if level else []
    base = ".".join([*above, *filter(None, [module])])
    yield from (base, *(f"{base}.{name}" for name in names))


def _and_packages(name: str) -> Iterator[str]:
  """A module's dotted name, and those of the packages around it."""
  parts = name.split(".")
  return (".".join(parts[:count]) for count in range(1, len(parts) + 1))


def _file(name: str, root: Path) -> Path | None:
  """The file of a module, if it is ours."""
  parts = name.split(".")
  foreign = "site-packages" in root.parts or root.is_relative_to(_STANDARD)
  roots = [] if foreign else [root]
  roots += [_LIBRARY] if parts[0] in _OF_LIBRARY else []
  for place in (str(folder.joinpath(*parts)) for folder in roots):
    for file in (f"{place}/__init__.py", f"{place}.py"):
      if os.path.isfile(file):
        return Path(file).resolve()
  return None


def _commit(directory: Path) -> tuple[str, bool]:
  """The commit that a directory is at, and whether what git tracks there has changed since."""

  def git(*arguments: str) -> str:
    command = ["git", "-C", str(directory), *arguments]
    try:
      done = subprocess.run(command, capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
      return ""
    return done.stdout if done.returncode == 0 else ""

  return git("rev-parse", "HEAD")[:12], bool(git("status", "-s", "-uno"))
