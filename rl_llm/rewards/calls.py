"""How responses become calls of a reward function: where it is, and how many it sees at once."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from rl_llm.rewards import worker as protocol
from rl_llm.rewards.results import RewardError

ISOLATION = ("auto", "sample", "group", "batch")

Prompt = str | list[dict[str, Any]]


class RewardSource(NamedTuple):
  """Where a worker finds a reward function, and how it is called.

  Its signature is TRL's: `f(prompts, completions, **columns) -> list[float | None]`. It is
  called by keyword, may be asynchronous, and is also given `completion_ids`, `trainer_state`,
  `log_extra` and `log_metric` if it takes them.

  A function may compare the responses that it is called with, so calls are isolated from each other
  rather than responses: each call has a fresh process, and if that raises, dies or times out, all
  of its responses get that status. Graded one by one they could have other rewards.

  Attributes:
    location: the path of a file ending in `.py`, or an importable module such as
      `"rl_llm.tasks.arithmetic"`.
    function: the function's name in it.
    runs_text: whether the function runs parts of a completion as a program. Then a pool refuses to
      start where the kernel offers no barrier to files and network, and each response is a call.
    own_grader: whether it is one of this library's, which grade each response separately. Text that
      it cannot read is a wrong answer. Unless it runs the text, it also needs no fresh process,
      which would take most of the time of grading a short answer.
    files: paths that the function reads while it grades, e.g. a word list. It sees no files but
      these, Python, system libraries, its own file and the modules imported before any text came.
    isolation: which responses make up a call: "sample", one; "group", all to a prompt; "batch", all
      that this process grades at once; "auto", all to a prompt, but one for this library's graders.
  """

  location: str
  function: str = "reward"
  runs_text: bool = False
  own_grader: bool = False
  isolation: str = "auto"
  files: tuple[str, ...] = ()

  @property
  def shares_process(self) -> bool:
    """Whether calls need no fresh process."""
    return self.own_grader and not self.runs_text and self.isolation in ("auto", "batch")

  @property
  def unit(self) -> str:
    """Which responses are a call: "sample", "group" or "batch"."""
    if self.own_grader or self.runs_text:
      return "sample"
    return "group" if self.isolation == "auto" else self.isolation


def isolated(source: RewardSource, isolation: str) -> RewardSource:
  """The source with another isolation.

  Raises:
    RewardError: there is no such isolation, or none for this function.
  """
  name = f"{source.function} of {source.location}"
  allowed, why = ISOLATION, "how many responses share a process"
  if source.runs_text:
    allowed, why = ("auto", "sample"), f"{name} runs a response as a program"
  elif source.own_grader:
    allowed, why = ("auto", "sample", "batch"), f"{name} grades each response on its own"
  if isolation not in allowed:
    raise RewardError(f"reward_isolation={isolation}: must be {' or '.join(allowed)}: {why}")
  return source._replace(isolation=isolation)


class Call(NamedTuple):
  """Responses that a worker is sent together."""

  count: int
  frame: bytes  # what it is sent
  apart: tuple[Call, ...] = ()  # the same responses in calls of their own, where they may be


_PACKED = 16  # responses in a frame


def packed(calls: Sequence[Call]) -> list[Call]:
  """Calls that share a process anyway, sixteen in a frame: to send one takes as long as to grade.

  A worker still makes one call after another. If it ends on the way, each is sent on its own.
  """
  found = []
  for first in range(0, len(calls), _PACKED):
    own = tuple(calls[first : first + _PACKED])
    body = b'{"each": [' + b", ".join(call.frame[4:] for call in own) + b"]}"
    frame = len(body).to_bytes(4, "big") + body
    found.append(Call(sum(call.count for call in own), frame, own) if len(own) > 1 else own[0])
  return found


def responses_per_call(
  unit: str,
  prompts: Sequence[Prompt],
  completions: Sequence[str],
  columns: Sequence[dict[str, Any]],
  completion_ids: Sequence[Sequence[int]] | None,
  *,
  group_size: int,
) -> int:
  """How many responses of a batch one call grades.

  >>> responses_per_call("group", ["q"] * 4, ["a"] * 4, [{}] * 4, None, group_size=2)
  2

  Args:
    unit: "sample", "group" or "batch".
    prompts, completions, columns, completion_ids: as `RewardPool.score` takes them.
    group_size: responses to each prompt.

  Raises:
    ValueError: there are not as many of each, or a group is not whole.
  """
  given = {"prompts": prompts, "completions": completions, "columns": columns}
  if completion_ids is not None:
    given["completion_ids"] = completion_ids
  if len({len(values) for values in given.values()}) > 1:
    found = ", ".join(f"{len(values)} {name}" for name, values in given.items())
    raise ValueError(f"{found}: must be as many of each")
  if len(prompts) % group_size:
    raise ValueError(f"{len(prompts)} prompts: must be whole groups of group_size={group_size}")
  return {"sample": 1, "group": group_size, "batch": len(prompts)}[unit]


def make_requests(
  prompts: Sequence[Prompt],
  completions: Sequence[str],
  columns: Sequence[dict[str, Any]],
  completion_ids: Sequence[Sequence[int]] | None,
  *,
  responses: int,
  step: int,
  steps: int,
) -> Iterator[dict[str, Any]]:
  """What a reward function is called with, for `responses` at a time.

  As in TRL, the completion of a prompt given as messages is a message, and columns that a row lacks
  are None.
  """
  for first in range(0, len(prompts), max(responses, 1)):
    own = slice(first, first + responses)
    names = dict.fromkeys(name for row in columns[own] for name in row)
    yield {
      "prompts": list(prompts[own]),
      "completions": [
        text if isinstance(prompt, str) else [{"role": "assistant", "content": text}]
        for prompt, text in zip(prompts[own], completions[own], strict=True)
      ],
      "columns": {name: [row.get(name) for row in columns[own]] for name in names},
      "completion_ids": completion_ids and [list(ids) for ids in completion_ids[own]],
      "step": step,
      "steps": steps,
    }


def make_calls(*batch: Any, responses: int, **numbers: int) -> list[Call]:
  """The calls of a batch, as `make_requests` describes them.

  Raises:
    ValueError: a prompt or a column is not of JSON types.
  """
  calls = []
  for number, request in enumerate(make_requests(*batch, responses=responses, **numbers)):
    frame, first = bytearray(), number * responses
    try:
      protocol.write_frame(frame.extend, request)
    except (TypeError, ValueError) as error:
      where = f"sample {first}" if responses == 1 else f"the call from sample {first} on"
      raise ValueError(f"{where}: its prompt or columns are not of JSON types: {error}") from None
    calls.append(Call(len(request["prompts"]), bytes(frame)))
  return calls


def completion_text(completion: str | list[dict[str, Any]]) -> str:
  """What the model wrote, in either form in which a reward function gets it.

  >>> completion_text([{"role": "assistant", "content": "12"}]), completion_text("12")
  ('12', '12')
  """
  return completion if isinstance(completion, str) else completion[-1]["content"]
