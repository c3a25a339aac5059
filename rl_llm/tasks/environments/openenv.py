"""Environments behind an OpenEnv server: `--env=openenv:http://HOST:PORT --env_network=allow`.

Such a server holds one instance for each WebSocket connection to its path /ws, and answers JSON:

    {"type": "reset", "data": {...}}   {"type": "observation", "data": {"observation": {...},
    {"type": "step", "data": action}      "reward": number or null, "done": bool}}
    {"type": "close"}                  {"type": "error", "data": {"message": ..., "code": ...}}

GET /schema has the JSON schema of an action. (Its POST /reset and /step make an instance for each
request, so an episode of several turns cannot be played over them.) A server of MCP tools says on
{"type": "list_tools"} which there are, and takes calls of them as actions.

`Remote` stands where `rl_llm.rewards.server.Server` does: a connection to it is one to an episode
that speaks as `rl_llm.tasks.environments.process` does, so deadlines and statuses are the same. But
no process of ours runs the environment, and nothing is confined: a thread passes on what is said.
"""

from __future__ import annotations

import contextlib
import functools
import json
import logging
import socket
import threading
import time
import urllib.parse
import urllib.request
from collections.abc import Callable, Mapping
from typing import Any

from rl_llm.rewards import RewardError
from rl_llm.rewards import worker as protocol

SECONDS = 10.0  # that connecting, and each answer about the tools, may take
_CLOSING = 2.0  # seconds that a server may take to end a session
_MAX_BYTES = 1 << 20  # of one answer
_OWN = ("done", "reward", "metadata")  # fields of each observation that say nothing to a model
_LOCAL = ("localhost", "127.0.0.1", "::1")
_QUIET = logging.getLogger(__name__)  # What goes wrong is in the status of an episode.
_QUIET.disabled = True


class _Refused(Exception):
  """What the server answered in place of an observation."""


class Remote:
  """An OpenEnv server, seen from the trainer.

  Args:
    url: http://HOST:PORT or https://HOST.

  Raises:
    RewardError: the package is missing, or nothing there speaks OpenEnv; the message says what to
      do.
  """

  def __init__(self, url: str):
    self._url, self._sessions, self._threads = url.rstrip("/"), {}, []
    self.name = f"OpenEnv server {self._url}"
    try:
      from websockets.sync.client import connect
    except ImportError:
      raise RewardError(
        f"{self.name}: needs the package websockets: pip install 'rl_llm[openenv]' (or pip install "
        "websockets)"
      ) from None
    how = {"ping_interval": None, "open_timeout": SECONDS, "close_timeout": _CLOSING}
    how |= {"max_size": _MAX_BYTES, "logger": _QUIET}
    how |= {"proxy": None} if _is_local(url) else {}
    self._connect = functools.partial(connect, f"ws{self._url[4:]}/ws", **how)
    try:
      action = json.loads(_read(f"{self._url}/schema"))["action"]
      listed = self._listed() if {"tool_name", "arguments"} <= {*action["properties"]} else None
    except (OSError, ValueError, KeyError, TypeError, AttributeError, _Refused) as error:
      raise RewardError(
        f"{self.name}: does not answer as one ({_why(error)}); start it, and give its address as "
        "a browser would open it"
      ) from None
    tools = [_step_tool(action)] if listed is None else [_tool(each) for each in listed]
    self._write = _an_action if listed is None else _a_call
    self.reply = {"tools": tools, "owns_reward": True}

  def _listed(self) -> list[dict[str, Any]]:
    session = Session(self._connect, _a_call)
    try:
      session.result("reset", {}, SECONDS)
      found = session.result("step", {"type": "list_tools"}, SECONDS)["observation"]["tools"]
    finally:
      session.leave()
    if not found:
      raise ValueError("it lists no tools")
    return found

  def poll(self) -> int | None:
    """None, as of a server that runs."""
    return None

  def start(self, number: int) -> socket.socket:
    """A connection to an episode of its own, known by this number."""
    ours, theirs = socket.socketpair()
    session = self._sessions[number] = Session(self._connect, self._write)
    thread = threading.Thread(target=_pass_on, args=(session, theirs), daemon=True)
    thread.start()
    self._threads = [*filter(threading.Thread.is_alive, self._threads), thread]
    ours.setblocking(False)
    return ours

  def end(self, number: int) -> None:
    """Ends an episode, also one that waits for an answer."""
    if session := self._sessions.pop(number, None):
      session.end()

  def close(self) -> None:
    """Ends all episodes."""
    for number in list(self._sessions):
      self.end(number)
    until = time.monotonic() + _CLOSING
    for thread in self._threads:  # A server that does not say goodbye is left without.
      thread.join(max(0.0, until - time.monotonic()))


class Session:
  """One instance of the environment on the server.

  Args:
    connect: opens a connection; retried for a while where the server is full.
    write: (tool, arguments) -> the action.
  """

  def __init__(self, connect: Callable[[], Any], write: Callable[[str, dict], dict]):
    self._connect, self._write = connect, write
    self._held, self._socket = contextlib.ExitStack(), None
    self._waits, self._ended = False, False
    self._lost, self._over, self._paid = "", False, False

  def answer(self, request: Mapping[str, Any]) -> dict[str, Any]:
    """What `rl_llm.tasks.environments.process` would answer."""
    if request["do"] == "finish":
      if self._lost or self._over and not self._paid:
        why = self._lost or "the server ended the episode and gave no reward"
        return {"raised": why, "state": "{}"}
      return {"values": [0.0], "state": "{}"}  # What was earned came with the steps.
    try:
      if request["do"] == "reset":
        found = self._begun({"seed": request["seed"] % 2**31} | request["columns"])
      else:
        found = self.result("step", self._write(request["name"], request["arguments"]))
      return self._reply(found)
    except _Refused as error:
      return {"text": f"error: {error}", "failed": True, "done": False, "reward": None}
    except Exception as error:  # of the network, or of an answer in another form
      self._lost = f"the server no longer answers as one: {_why(error)}"
      return {"text": f"error: {self._lost}", "failed": True, "done": True, "reward": None}

  def _begun(self, columns: dict[str, Any]) -> dict[str, Any]:
    """The answer to `reset`; a server that is full is asked again, while others end."""
    until = time.monotonic() + SECONDS
    while True:
      try:
        return self.result("reset", columns)
      except _Refused as error:
        if "CAPACITY" not in str(error) or time.monotonic() > until:
          raise
        self.leave()
        time.sleep(0.2)

  def _reply(self, found: Mapping[str, Any]) -> dict[str, Any]:
    text, failed = text_of(found["observation"])
    reward = found.get("reward")
    reward = None if reward is None else float(reward)
    self._paid = self._paid or reward is not None
    self._over = self._over or found.get("done") is True
    return {"text": text, "failed": failed, "done": self._over, "reward": reward}

  def result(
    self, kind: str, data: Mapping[str, Any], seconds: float | None = None
  ) -> dict[str, Any]:
    """Asks for one thing; without `seconds` whoever waits for the answer ends the wait."""
    if self._socket is None:
      self._socket = self._held.enter_context(self._connect())
    self._waits = True
    if self._ended:
      raise ConnectionAbortedError("the episode has ended")
    message = json.dumps({"type": kind, "data": dict(data)})
    with contextlib.suppress(Exception):  # It may have closed, after it has said why.
      self._socket.send(message)
    reply = json.loads(self._socket.recv(timeout=seconds))
    self._waits = False
    if reply["type"] == "error":
      raise _Refused(f"{reply['data'].get('code', 'error')}: {reply['data'].get('message', '')}")
    return reply["data"]

  def leave(self) -> None:
    """Says that the session is over, and waits a moment for the server to say so too."""
    if self._socket is not None:
      with contextlib.suppress(Exception):  # It may have gone already.
        self._socket.send('{"type": "close"}')
        self._socket.recv(timeout=_CLOSING)  # Raises once the server has closed.
    with contextlib.suppress(Exception):
      self._held.close()
    self._socket = None

  def end(self) -> None:
    """Ends a wait for the server, from another thread; whoever waits then leaves it."""
    self._ended = True
    if self._waits:
      with contextlib.suppress(Exception):
        self._socket.socket.shutdown(socket.SHUT_RDWR)


def _pass_on(session: Session, connection: socket.socket) -> None:
  """Answers what an episode is asked, until nobody asks any more."""
  with connection, contextlib.suppress(OSError):
    while (request := protocol.read_frame(connection.recv)) is not None:
      protocol.write_frame(connection.sendall, {"n": request["n"]} | session.answer(request))
  session.leave()


def text_of(observation: Mapping[str, Any]) -> tuple[str, bool]:
  """What a model reads of an observation, and whether a tool failed.

  >>> text_of({"echoed": "Hello", "done": False, "reward": 0.5, "metadata": {}})
  ('Hello', False)
  >>> text_of({"board": [1, 0], "turn": 3})
  ('{"board": [1, 0], "turn": 3}', False)
  >>> text_of({"tool_name": "add", "result": {"data": 5}, "error": None})
  ('5', False)

  Args:
    observation: of the server: of one field that is text this, of several JSON; of a call of an MCP
      tool what the tool returned.
  """
  if "tool_name" in observation and ("result" in observation or "error" in observation):
    if error := observation.get("error"):
      return f"error: {error.get('message', error) if isinstance(error, dict) else error}", True
    return _as_text(_returned(observation.get("result"))), False
  shown = {k: v for k, v in observation.items() if k not in _OWN and v is not None}
  if len(shown) == 1 and isinstance(only := next(iter(shown.values())), str):
    return only, False
  return _as_text(shown) if shown else "", False


def _returned(result: Any) -> Any:
  """What an MCP tool returned: its data, or the texts of its content."""
  if not isinstance(result, dict) or not ({"data", "content"} & {*result}):
    return result
  if result.get("data") is not None:
    return result["data"]
  return "\n".join(str(part.get("text", "")) for part in result.get("content") or ())


def _as_text(value: Any) -> str:
  return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def _an_action(name: str, arguments: dict[str, Any]) -> dict[str, Any]:
  return arguments


def _a_call(name: str, arguments: dict[str, Any]) -> dict[str, Any]:
  return {"type": "call_tool", "tool_name": name, "arguments": arguments}


def _step_tool(action: Mapping[str, Any]) -> dict[str, Any]:
  """The one tool of a server whose actions are its own."""
  described = action.get("description") or f"Takes a step: {action.get('title', 'an action')}."
  return _tool({"name": "step", "description": described, "input_schema": action})


def _tool(listed: Mapping[str, Any]) -> dict[str, Any]:
  """A tool as chat templates show it."""
  schema = listed.get("input_schema") or listed.get("inputSchema") or {}
  properties = {
    name: {"description": ""} | {key: value for key, value in each.items() if key != "title"}
    for name, each in schema.get("properties", {}).items()
    if name != "metadata"
  }
  parameters = {"type": "object", "properties": properties}
  if required := [name for name in schema.get("required", ()) if name in properties]:
    parameters["required"] = required
  named = {"name": listed["name"], "description": listed.get("description") or listed["name"]}
  return {"type": "function", "function": named | {"parameters": parameters}}


def _read(url: str) -> bytes:
  handlers = [urllib.request.ProxyHandler({})] if _is_local(url) else []
  with urllib.request.build_opener(*handlers).open(url, timeout=SECONDS) as response:
    return response.read(_MAX_BYTES)


def _is_local(url: str) -> bool:
  return urllib.parse.urlsplit(url).hostname in _LOCAL


def _why(error: Exception) -> str:
  return f"{type(error).__name__}: {error}"[:200].rstrip(": ").replace("\n", " ")
