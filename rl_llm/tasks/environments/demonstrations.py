"""Episodes that a program plays, as data for `experiments.sft`: how a model first learns to call.

A reward teaches nothing to a model that never calls a tool. A few hundred demonstrations show it
the form; what to do with the form is then learnt from the rewards. Each is played against the
environment itself, so its answers are those that training will give.
"""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Callable, Generator, Mapping, Sequence
from pathlib import Path
from typing import Any

from rl_llm.files import write_atomically
from rl_llm.tasks.environments import turn_text
from rl_llm.tasks.environments.builtin.wordle import WORDS, marks
from rl_llm.tasks.environments.environment import EnvironmentError, load
from rl_llm.tasks.environments.episodes import Episodes
from rl_llm.tasks.environments.problems import default_task
from rl_llm.tasks.problem import Problem
from rl_llm.text.tokenizers import Tokenizer, load_tokenizer

# What a program writes: a call as (tool, arguments), or its final answer.
Move = tuple[str, dict[str, Any]] | str
Expert = Generator[Move, str, None]


def write_call(name: str, arguments: Mapping[str, Any], protocol: str) -> str:
  """A call as a model writes it.

  >>> write_call("inc", {"a": 1}, "text"), write_call("inc", {"a": 1}, "llama3")
  ('call inc: 1', '{"name": "inc", "parameters": {"a": 1}}')

  Args:
    name: of the tool.
    arguments: by name.
    protocol: of `calls.PROTOCOLS`.
  """
  if protocol == "text":
    single = len(arguments) == 1
    value = next(iter(arguments.values())) if single else json.dumps(dict(arguments))
    return f"call {name}: {value}".rstrip()
  key = "arguments" if protocol == "hermes" else "parameters"
  text = json.dumps({"name": name, key: dict(arguments)}, ensure_ascii=False)
  return f"<tool_call>\n{text}\n</tool_call>" if protocol == "hermes" else text


def _calculator(columns: Mapping[str, Any]) -> Expert:
  yield (yield "calculate", {"expression": columns["expression"].replace(" ", "")})


def _python(columns: Mapping[str, Any]) -> Expert:
  yield (yield "python", {"code": f"print({columns['expression']})"})


def _search(columns: Mapping[str, Any], question: str) -> Expert:
  town = question.partition("mayor of ")[2].partition(" born")[0]
  first = yield "search", {"query": f"mayor of {town}"}
  mayor = re.search(rf"The mayor of {town} is ([\w ]+)\.", first)
  second = yield "search", {"query": mayor[1] if mayor else town}
  born = re.search(r"was born in (\d+)", second)
  yield born[1] if born else "I do not know."


def _guess(columns: Mapping[str, Any]) -> Expert:
  low, high = 1, columns["highest"]
  while low <= high:
    middle = (low + high) // 2
    hint = yield "guess", {"number": middle}
    low, high = (middle + 1, high) if hint.startswith("higher") else (low, middle - 1)


def _wordle(columns: Mapping[str, Any]) -> Expert:
  left, guess = list(WORDS), "stare"
  while True:
    said = (yield "guess", {"word": guess}).partition(",")[0]
    left = [word for word in left if word != guess and marks(guess, word) == said]
    guess = left[0] if left else guess


_EXPERTS: dict[str, Callable[..., Expert]] = {
  "calculator": _calculator,
  "python": _python,
  "search": _search,
  "guess": _guess,
  "wordle": _wordle,
}


def demonstrate(
  env: str,
  tokenizer: Tokenizer,
  *,
  count: int,
  seed: int = 0,
  step: int = 0,
  protocol: str = "auto",
) -> list[dict[str, Any]]:
  """Episodes of an environment that ships, played by a program: one row each for `--data`.

  Args:
    env: its name; reasoning_gym has no program that plays it.
    tokenizer: the model's, whose chat template says how calls are written.
    count: how many.
    seed: of the problems.
    step: of the problems; those that training will see first are of step 0.
    protocol: how calls are written, as `--tool_protocol` in training.

  Returns:
    Rows with `messages` (and `tools`, where the template shows them). None is of a held-out
    problem.

  Raises:
    EnvironmentError: no program plays it, or the model has no chat template.
  """
  expert = _EXPERTS.get(env.partition(":")[0])
  if expert is None:
    known = ", ".join(name if name != "search" else "search:demo" for name in _EXPERTS)
    raise EnvironmentError(f"env={env}: no program plays it; must be one of {known}")
  if tokenizer.chat_template is None:
    raise EnvironmentError(
      "demonstrations have several turns, and this model has no chat template; use a model that "
      "has, such as --model=smollm2"
    )
  turn_text.check_prefix(tokenizer)
  environment = load(env, protocol=protocol)
  protocol = turn_text.choose_protocol(environment.protocol, tokenizer)
  environment = environment._replace(protocol=protocol)
  problems = default_task(environment).sample(seed, step, count)
  with Episodes(environment) as episodes:
    return _played(episodes, expert, problems, tokenizer)


def _played(
  episodes: Episodes, expert: Callable[..., Expert], problems: Sequence[Problem], tokenizer: Any
) -> list[dict[str, Any]]:
  protocol, tools = episodes.environment.protocol, episodes.environment.tools
  begun = episodes.start([problem.columns for problem in problems])
  rows, players = [], []
  for problem, said in zip(problems, begun, strict=True):
    prompt, names = turn_text.opening(
      problem.prompt, said.text, tools, tokenizer, protocol=protocol
    )
    given = (problem.prompt[-1]["content"],) if expert is _search else ()
    players.append(expert(problem.columns, *given))
    rows.append({"messages": list(prompt)} | names)
  role = turn_text.environment_role(tokenizer)
  moves = {index: next(player) for index, player in enumerate(players)}
  while moves:
    texts = {
      index: move if isinstance(move, str) else write_call(*move, protocol)
      for index, move in moves.items()
    }
    seen, moves = episodes.turn(texts), {}
    for index, said in seen.items():
      rows[index]["messages"].append({"role": "assistant", "content": texts[index]})
      if not said.done:
        rows[index]["messages"] += [{"role": role, "content": each} for each in said.answers]
        moves[index] = players[index].send(said.text)
  return rows


def add_demonstrations(parser: argparse.ArgumentParser) -> None:
  """The arguments of `python -m rl_llm demonstrations`."""
  parser.add_argument("--env", required=True, help="an environment that ships, such as calculator")
  parser.add_argument("--model", default="smollm2", help="whose chat template lays out the calls")
  parser.add_argument("--rows", type=int, default=500, help="how many episodes")
  parser.add_argument("--seed", type=int, default=0, help="random seed of the problems")
  parser.add_argument(
    "--tool_protocol", default="auto", help="how calls are written, as in training"
  )
  parser.add_argument("--out", type=Path, required=True, metavar="FILE", help="a .jsonl file")


def write_demonstrations(given: argparse.Namespace) -> str:
  """Writes the file; gives a line that says so."""
  tokenizer = load_tokenizer(given.model)
  how = {"seed": given.seed, "protocol": given.tool_protocol}
  rows = demonstrate(given.env, tokenizer, count=given.rows, **how)
  text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
  write_atomically(given.out, text.encode())
  return f"demonstrations: {given.out}, {len(rows)} episodes of {given.env}"
