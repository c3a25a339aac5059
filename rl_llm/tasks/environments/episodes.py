"""Episodes of an environment: one confined process each, with deadlines and a status per turn.

A tool runs on what a model wrote, so it may hang, crash, fork or flood. Each episode has a process
of its own, confined as a grader's worker is (no network, own file system, limits on memory and
processes). A call that exceeds its deadline ends its episode, with a status and a short text; the
others never notice, and a training step is never lost.
"""

from __future__ import annotations

import contextlib
import errno
import json
import math
import selectors
import socket
import threading
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from rl_llm.data.held_out import hashed
from rl_llm.rewards import RewardResult, layers
from rl_llm.rewards import worker as protocol
from rl_llm.rewards.results import read_reply
from rl_llm.rewards.server import Server, receive, taken
from rl_llm.tasks.environments import process
from rl_llm.tasks.environments.calls import MAX_CALLS, Call, parse_calls
from rl_llm.tasks.environments.environment import Environment, EnvironmentError, Kind
from rl_llm.tasks.environments.observations import Observation, Turn

_START_SECONDS = 60.0


@dataclass(eq=False)
class _Episode:
  """One episode, seen from the trainer."""

  kind: Kind
  number: int
  connection: socket.socket | None
  received: bytearray = field(default_factory=bytearray)
  ready: bool = False
  asked: int = 0
  spent: float = 0.0
  status: str = "ok"  # "timed_out", "died" or "raised" once it cannot be asked any more
  detail: str = ""
  state: dict[str, Any] = field(default_factory=dict)


class _Asked(NamedTuple):
  """What became of one request: an answer, or why there is none."""

  reply: dict[str, Any] | None
  seconds: float
  status: str = "ok"
  detail: str = ""


class Episodes:
  """The processes of all episodes of a batch. Use it as a context manager, or call `close`.

  Its methods may be called from several threads for different episodes.

  Args:
    environment: from `load`.
    deadline: seconds that a call may take.
    episode_deadline: seconds that all calls of an episode may take.
    memory_mb: what an episode's processes may hold.
    answer_chars: characters of an answer that are kept; the rest is cut, and said to be.
    allow_weak_sandbox: run a model's programs even where files or network stay open to them.
  """

  def __init__(
    self,
    environment: Environment,
    *,
    deadline: float = 10.0,
    episode_deadline: float = 60.0,
    memory_mb: int = 1024,
    answer_chars: int = 2000,
    allow_weak_sandbox: bool = False,
  ):
    self.environment = environment
    self._deadline, self._episode_deadline = deadline, episode_deadline
    self._answer_chars = answer_chars
    self._limits = {"memory_mb": memory_mb, "together": 1024, "episode_deadline": episode_deadline}
    self._held = contextlib.ExitStack()
    self._servers: dict[str, Server] = {}
    self._episodes: list[_Episode] = []
    self._lock, self._next_number = threading.Lock(), 0
    self.layers: tuple[str, ...] = ()  # of its processes, as `RewardPool.active_layers`
    self._allow_weak = allow_weak_sandbox
    for kind in environment.kinds:
      self._server_of(kind)

  def __enter__(self) -> Episodes:
    return self

  def __exit__(self, *unused: object) -> None:
    self.close()

  def close(self) -> None:
    """Ends all processes."""
    self._end(self._episodes)
    self._held.close()

  def start(self, rows: Sequence[Mapping[str, Any]]) -> list[Observation]:
    """Ends the episodes there are, and begins one for each row.

    Args:
      rows: N dicts of columns, which `reset` gets, of JSON types. Rows with equal columns get the
        same random numbers from Python's `random`.

    Returns:
      N observations: `text` goes to the end of the last user message; of one whose `status` is not
      "ok", `answers` says why.

    Raises:
      EnvironmentError: a row names no environment, or one would run a model's programs without the
        barriers that needs; or there are more episodes than this process may have open files.
      TypeError: a column is not of JSON types.
    """
    self._end(self._episodes)
    kinds = [self.environment.kind_of(row) for row in rows]
    self._episodes = []
    for kind in kinds:
      self._episodes.append(self._forked(kind))
    requests = {}
    for index, row in enumerate(rows):
      seed = hashed(json.dumps(row, sort_keys=True))
      requests[index] = {"do": "reset", "columns": dict(row), "seed": seed}
    asked = self._ask(requests, _START_SECONDS)
    self._check_barriers(kinds)
    found = []
    for index, episode in enumerate(self._episodes):
      text, seconds = self._reset_text(episode, asked[index]), asked[index].seconds
      done = episode.status != "ok" or bool((asked[index].reply or {}).get("done"))
      status = {"raised": "tool_error"}.get(episode.status, episode.status)
      said = (episode.detail,) if episode.detail else ()
      found.append(Observation(text, done, status, 0, seconds, answers=said))
    return found

  def _check_barriers(self, kinds: Sequence[Kind]) -> None:
    """Refuses to run a model's programs where they could reach files or the network."""
    missing = layers.missing(self.layers)
    running = next((kind.name for kind in kinds if kind.runs_text), None)
    if running and missing and not self._allow_weak:
      raise EnvironmentError(
        f"environment {running} runs a model's programs, and this system cannot bar them from "
        f"{' and '.join(missing)}; run on Linux 5.13+ with user namespaces, or give "
        "--reward_sandbox=weak where there is nothing to protect"
      )

  def _reset_text(self, episode: _Episode, asked: _Asked) -> str:
    if asked.reply is None:
      return ""
    text = asked.reply.get("text")
    if asked.reply.get("failed"):
      episode.status, episode.detail = "raised", f"reset: {text}"
      return ""
    return self._cut(text) if isinstance(text, str) else ""

  def turn(self, texts: Mapping[int, str]) -> dict[int, Observation]:
    """Makes the calls in what the models wrote, all episodes at once.

    Args:
      texts: by episode the decoded turn.

    Returns:
      By episode what the environment says to it.
    """
    turns = {index: Turn(self._calls(index, text)) for index, text in texts.items()}
    while True:
      requests = {}
      for index, turn in turns.items():
        while (call := turn.next_call()) is not None and call.fault:
          turn.answer(f"error: {call.fault}", "malformed")
        if call is not None and self._episodes[index].status != "ok":
          turn.stop(self._lost(self._episodes[index]), self._episodes[index].status)
        elif call is not None:
          requests[index] = {"do": "call", "name": call.name, "arguments": call.arguments}
      if not requests:
        return {index: turn.observation() for index, turn in turns.items()}
      for index, asked in self._ask(requests, self._deadline).items():
        self._take(self._episodes[index], turns[index], asked)

  def _calls(self, index: int, text: str) -> list[Call]:
    episode = self._episodes[index]
    calls = parse_calls(text, episode.kind.tools, protocol=self.environment.protocol)
    if len(calls) > MAX_CALLS:
      fault = f"{len(calls)} calls in one turn; at most {MAX_CALLS} are made"
      calls = [*calls[:MAX_CALLS], Call("", {}, fault)]
    return calls

  def _take(self, episode: _Episode, turn: Turn, asked: _Asked) -> None:
    """Notes what a tool answered."""
    turn.seconds += asked.seconds
    if asked.reply is None:
      turn.stop(self._lost(episode), asked.status)
      return
    text, failed = asked.reply.get("text"), asked.reply.get("failed")
    turn.answer(self._cut(str(text)), "tool_error" if failed else "ok")
    reward = asked.reply.get("reward")
    if isinstance(reward, float) and math.isfinite(reward):
      turn.reward = (turn.reward or 0.0) + reward
    turn.done = turn.done or asked.reply.get("done") is True

  def _lost(self, episode: _Episode) -> str:
    """What stands where a tool did not answer."""
    return f"error: the episode has ended: {episode.detail}"

  def finish(self, indices: Iterable[int]) -> list[RewardResult | None]:
    """Asks for the reward of episodes that have ended, and ends their processes.

    Returns:
      The reward of each, with its status; None where reward functions own it. `attributes` then
      has what they read.
    """
    indices = list(indices)
    alive = {i: {"do": "finish"} for i in indices if self._episodes[i].status == "ok"}
    asked = self._ask(alive, self._deadline)
    found = [self._result(self._episodes[index], asked.get(index)) for index in indices]
    self._end(self._episodes[index] for index in indices)
    return found

  def attributes(self, indices: Iterable[int]) -> list[dict[str, Any]]:
    """The public attributes of finished episodes, of JSON types: what `environments=` shows."""
    return [self._episodes[index].state for index in indices]

  def _result(self, episode: _Episode, asked: _Asked | None) -> RewardResult | None:
    if asked is None or asked.reply is None:
      result = RewardResult(None, episode.status, episode.detail)
      return result if episode.kind.owns_reward or episode.status != "ok" else None
    with contextlib.suppress(ValueError, RecursionError, TypeError):
      state = json.loads(asked.reply.get("state", "{}"))
      episode.state = state if isinstance(state, dict) else {}
    if not episode.kind.owns_reward:
      return None
    limit = protocol.grading.MAX_ABSOLUTE
    [result] = read_reply(asked.reply, 1, (-limit, limit))
    return result

  def _cut(self, text: str) -> str:
    """An answer within its bound, as text that has an encoding."""
    text = text.encode("utf-8", "replace").decode("utf-8")
    if len(text) <= self._answer_chars:
      return text
    return f"{text[: self._answer_chars]}\n[{len(text) - self._answer_chars} more characters]"

  def _server_of(self, kind: Kind) -> Server:
    """The server of a kind; a new one where it has ended."""
    with self._lock:
      server = self._servers.get(kind.name)
      if server is None or server.poll() is not None:
        server = self._held.enter_context(kind.server(**self._limits))
        self._servers[kind.name] = server
      return server

  def _forked(self, kind: Kind) -> _Episode:
    server = self._server_of(kind)
    with self._lock:
      number, self._next_number = self._next_number, self._next_number + 1
      try:
        return _Episode(kind, number, server.start(number))
      except OSError as error:
        if error.errno != errno.EMFILE:
          raise
        raise EnvironmentError(
          f"{len(self._episodes) + 1} episodes are more than this process may have open files; "
          "raise that with ulimit -n 8192, or sample fewer at once"
        ) from None

  def _end(self, episodes: Iterable[_Episode]) -> None:
    for episode in episodes:
      if episode.connection is not None:
        episode.connection.close()
        episode.connection = None
        with self._lock:
          self._servers[episode.kind.name].end(episode.number)

  def _ask(self, requests: Mapping[int, dict], deadline: float) -> dict[int, _Asked]:
    """Sends each episode one request, and waits for all answers or their deadlines."""
    found: dict[int, _Asked] = {}
    begun = time.monotonic()
    with selectors.DefaultSelector() as selector:
      ends = {}
      for index, request in requests.items():
        episode = self._episodes[index]
        left = self._episode_deadline - episode.spent
        ends[index] = begun + (deadline if request["do"] == "finish" else min(deadline, left))
        _send(episode, request, ends[index])
        selector.register(episode.connection, selectors.EVENT_READ, index)
      while len(found) < len(requests):
        waiting = [index for index in requests if index not in found]
        patience = min(ends[index] for index in waiting) - time.monotonic()
        for key, _ in selector.select(max(0.0, patience) + 0.001):
          episode = self._episodes[key.data]
          reply, ended = self._received(episode)
          if reply is not None or ended:
            selector.unregister(key.fileobj)
            seconds = time.monotonic() - begun
            found[key.data] = _Asked(reply, seconds)
            if reply is None:
              detail = "its process ended: it ended itself, or took too much memory"
              found[key.data] = self._failed(episode, "died", detail, seconds)
        now = time.monotonic()
        for index in [index for index in waiting if index not in found and now > ends[index]]:
          selector.unregister(self._episodes[index].connection)
          seconds, own = now - begun, self._episodes[index]
          whole = own.spent + seconds >= self._episode_deadline
          what = f"all its calls took over {self._episode_deadline:g} s" if whole else (
            f"a call took over {deadline:g} s and was ended"
          )  # fmt: skip
          found[index] = self._failed(own, "timed_out", what, seconds)
    for index, asked in found.items():
      self._episodes[index].spent += asked.seconds
    return found

  def _failed(self, episode: _Episode, status: str, detail: str, seconds: float) -> _Asked:
    """Ends an episode that cannot be asked any more."""
    episode.status, episode.detail = status, detail
    self._end([episode])
    return _Asked(None, seconds, status, detail)

  def _received(self, episode: _Episode) -> tuple[dict[str, Any] | None, bool]:
    """The answer to the last request, if it is complete; and whether the process has ended.

    What breaks the format is the end of it as well: something has gone wrong inside.
    """
    ended = receive(episode.connection, episode.received)
    for reply in taken(episode.received, limit=process.MAX_FRAME):
      if reply is None:
        return None, True
      if not episode.ready and "layers" in reply:
        episode.ready, self.layers = True, tuple(map(str, reply["layers"]))
      elif reply.get("n") == episode.asked:
        return reply, False
      else:
        return None, True
    return None, ended


def _send(episode: _Episode, request: dict, end: float) -> None:
  """Sends a request; a process that does not read it is found by the deadline."""
  episode.asked += 1
  episode.connection.settimeout(max(0.01, end - time.monotonic()))
  try:
    protocol.write_frame(episode.connection.sendall, {"n": episode.asked} | request)
  except OSError:
    pass  # it has ended, which the next read reports
  episode.connection.setblocking(False)
