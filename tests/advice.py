"""What the sources say to a person who has to put something right, and which commands can say it.

An error is worth its advice: a flag that the command does not have, a package that no extra holds
or a keyword where there is no Python to write it in is worse than none. The sources are read as
trees. Every text of a function is one that it may show; a command may show those of all functions
that its `__main__` leads to, by the names that stand in them. That is more than it really calls,
never less, unless a function is found by a name made at run time.
"""

from __future__ import annotations

import ast
import functools
import importlib
import inspect
import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

import pytest

from rl_llm.runs.config import flatten

ROOT = Path(__file__).parent.parent
PACKAGES = ("rl_llm", "experiments", "launch")
HOLE = "\0"  # In the place of what a text is filled with.

Node = tuple[str, str]  # a module, and a name at its top


class Text(NamedTuple):
  """One text in the sources."""

  node: Node
  line: int
  text: str  # with `HOLE`s
  raised: bool  # whether it stands in a `raise`
  shown: bool  # whether it is printed in passing, and stops nothing

  @property
  def where(self) -> str:
    return f"{self.node[0]}:{self.line}"


@functools.cache
def trees() -> dict[str, ast.Module]:
  """Every module's tree by its dotted name; a package's by its own."""
  found = {}
  for package in PACKAGES:
    for path in sorted((ROOT / package).rglob("*.py")):
      name = ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
      found[name] = ast.parse(path.read_text())
  return found


@functools.cache
def defined(module: str) -> dict[str, list[ast.stmt]]:
  """The statements that make each name at the top of a module; "" those that run it."""
  found: dict[str, list[ast.stmt]] = {}
  for statement in trees()[module].body:
    names = []
    if isinstance(statement, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
      names = [statement.name]
    elif isinstance(statement, ast.Assign | ast.AnnAssign):
      targets = statement.targets if isinstance(statement, ast.Assign) else [statement.target]
      names = [n.id for target in targets for n in ast.walk(target) if isinstance(n, ast.Name)]
    elif isinstance(statement, ast.If) and "__main__" in ast.unparse(statement.test):
      names = [""]
    for name in names:
      found.setdefault(name, []).append(statement)
  return found


@functools.cache
def imported(module: str) -> dict[str, tuple[str, str]]:
  """{name: (module, name in it or "")} of what a module imports of ours, inside functions too."""
  found = {}
  for node in ast.walk(trees()[module]):
    if isinstance(node, ast.Import):
      for alias in node.names:
        if alias.name in trees():
          found[alias.asname or alias.name.partition(".")[0]] = (
            (alias.name, "") if alias.asname else (alias.name.partition(".")[0], "")
          )
    elif isinstance(node, ast.ImportFrom) and node.module in trees():
      for alias in node.names:
        inner = f"{node.module}.{alias.name}"
        own = (inner, "") if inner in trees() else (node.module, alias.name)
        found[alias.asname or alias.name] = own
  return found


def resolve(module: str, names: list[str]) -> Node | None:
  """What `a.b.c` in a module is of ours, followed through what packages pass on."""
  first, *rest = names
  if first in defined(module):
    return module, first
  if first not in imported(module):
    return None
  target, name = imported(module)[first]
  if name:
    return resolve(target, [name, *rest]) if target != module else None
  while rest and f"{target}.{rest[0]}" in trees():
    target, rest = f"{target}.{rest[0]}", rest[1:]
  return resolve(target, rest) if rest else None


@functools.cache
def mentioned(node: Node) -> frozenset[Node]:
  """What of ours the definition of a name names."""
  module, name = node
  found = set()
  for statement in defined(module)[name]:
    for part in ast.walk(statement):
      names = []
      while isinstance(part, ast.Attribute):
        names.insert(0, part.attr)
        part = part.value
      if isinstance(part, ast.Name) and (target := resolve(module, [part.id, *names])):
        found.add(target)
  return frozenset(found - {node})


@functools.cache
def reached(module: str) -> frozenset[Node]:
  """All that a command leads to: `python -m MODULE`."""
  found, waiting = set(), [(module, "")]
  while waiting:
    node = waiting.pop()
    if node not in found:
      found.add(node)
      waiting += mentioned(node)
  return frozenset(found)


@functools.cache
def commands() -> dict[str, frozenset[str]]:
  """{module: its flags} of all that are run with flags; a group may be given by its name."""
  found = {}
  for module in trees():
    if module.partition(".")[0] != "rl_llm" and "" in defined(module):
      paths = flatten(importlib.import_module(module).Config()).keys()
      short = {path.removesuffix(".name").removesuffix(".on") for path in paths}
      found[module] = frozenset(paths | short)
  return found


def text_of(node: ast.expr) -> str | None:
  """The text that an expression is, with holes; None where it is none."""
  if isinstance(node, ast.Constant):
    return node.value if isinstance(node.value, str) else None
  if isinstance(node, ast.JoinedStr):
    return "".join(p.value if isinstance(p, ast.Constant) else HOLE for p in node.values)
  if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
    both = text_of(node.left), text_of(node.right)
    return None if both == (None, None) else "".join(HOLE if x is None else x for x in both)
  return None


@functools.cache
def texts() -> tuple[Text, ...]:
  """All texts of all definitions, without docstrings and the help of flags."""
  found = []
  for module in trees():
    for name, statements in defined(module).items():
      for statement in statements:
        found += _texts((module, name), statement, raised=False, shown=False)
  return tuple(found)


def _texts(node: Node, tree: ast.AST, *, raised: bool, shown: bool) -> Iterator[Text]:
  raised = raised or isinstance(tree, ast.Raise)
  shown = shown or isinstance(tree, ast.Call) and ast.unparse(tree.func).endswith(("say", "print"))
  for child in ast.iter_child_nodes(tree):
    if isinstance(child, ast.Expr) and isinstance(child.value, ast.Constant):
      continue  # A docstring.
    if isinstance(child, ast.Call) and ast.unparse(child.func).endswith(("option", "field")):
      continue  # The help of a flag, which speaks of all commands that have it.
    text = text_of(child) if isinstance(child, ast.expr) else None
    if text is not None:
      yield Text(node, child.lineno, text, raised, shown)
    else:
      yield from _texts(node, child, raised=raised, shown=shown)


def arguments(node: Node) -> set[str]:
  """The arguments of a definition's functions."""
  module, name = node
  return {
    argument.arg
    for statement in defined(module)[name]
    for part in ast.walk(statement)
    if isinstance(part, ast.arguments)
    for argument in (*part.posonlyargs, *part.args, *part.kwonlyargs)
  }


def flags_in(text: str) -> list[str]:
  """The flags that a text names, with holes where parts of a name are filled in."""
  found = re.findall(rf"(?<![\w-])--([a-z{HOLE}][\w.{HOLE}-]*)", text)
  return [name.rstrip(".-") for name in found]


def is_flag(name: str, flags: frozenset[str]) -> bool:
  """Whether a name is one of the flags; a hole stands for any part of one."""
  pattern = re.compile("[\\w.]+".join(map(re.escape, name.split(HOLE))))
  return any(pattern.fullmatch(flag) for flag in flags)


_CURE = re.compile(
  r"(?:[;:.]|, or)\s*(?:\w+ )?(?:add|apply|ask|check|choose|convert|copy|cut|download|drop|free"
  r"|give|hold|install|leave|load|lower|make|name|pass|pick|pip|put|raise|remove|rename|restore"
  r"|resume|run|see|set|split|start|stop|take|try|use|wait|write)\b",
  re.IGNORECASE,
)


def cures() -> tuple[Text, ...]:
  """The texts of errors that say what to do and name no flag."""
  return tuple(
    text
    for text in texts()
    if text.raised and len(text.text) > 30 and _CURE.search(text.text) and not flags_in(text.text)
  )


def unsaid(found: tuple[Text, ...], said: list[str]) -> list[str]:
  """Those of the texts that no error in `said` has, as "where: text"."""
  lines = [" ".join(line.split()) for line in said]
  left = []
  for text in found:
    pattern = ".*".join(map(re.escape, re.sub(r"\s+", " ", text.text).split(HOLE)))
    if not any(re.search(pattern, line) for line in lines):
      left.append(f"{text.where}: {text.text}")
  return left


def follow(
  cases: Mapping[str, Callable], directory: Callable[[str], Path]
) -> tuple[list[str], dict[str, BaseException]]:
  """Runs cases that provoke errors and do what they say.

  Args:
    cases: name -> (said, path) or (said, path, monkeypatch); the texts of errors go to `said`.
    directory: (name) -> an empty directory.

  Returns:
    All that was said, and by case what went wrong.
  """
  said, failed = [], {}
  for name, case in cases.items():
    with pytest.MonkeyPatch.context() as patch:
      further = [patch] if "monkeypatch" in inspect.signature(case).parameters else []
      try:
        case(said, directory(name), *further)
      except (Exception, pytest.fail.Exception) as error:
        failed[name] = error
  return said, failed
