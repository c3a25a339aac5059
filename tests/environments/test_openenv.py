"""Episodes on an OpenEnv server: one that each test starts on the loopback interface."""

from __future__ import annotations

import contextlib
import http
import json
import re
import socket
import threading
import time

import pytest

from experiments import agents
from rl_llm.rewards import RewardResult
from rl_llm.runs.config import replace
from rl_llm.tasks.environments import EnvironmentError, Episodes, load, openenv
from rl_llm.tasks.environments.openenv import text_of
from rl_llm.tasks.environments.problems import default_task
from rl_llm.text.tokenizers import ByteTokenizer

server = pytest.importorskip("websockets.sync.server")

GUESS = {
  "title": "GuessAction",
  "type": "object",
  "properties": {
    "number": {"title": "Number", "type": "integer", "description": "The guess."},
    "metadata": {"type": "object", "additionalProperties": True},
  },
  "required": ["number"],
}
CALL = {
  "title": "CallToolAction",
  "properties": {"type": {}, "tool_name": {"type": "string"}, "arguments": {"type": "object"}},
}
ADD = {
  "name": "add",
  "description": "Adds.",
  "input_schema": {
    "type": "object",
    "properties": {"a": {"type": "integer"}, "b": {"type": "integer"}},
    "required": ["a", "b"],
  },
}


class Guessing:
  """One session: a number that the seed chooses, or the column `secret`."""

  schema, released = GUESS, threading.Event()

  def reset(self, data):
    self.left, self.secret = 3, data.get("secret", data["seed"] % 100)
    return {"message": f"Find it in {self.left}."}, None, False

  def step(self, action):
    number, self.left = action["number"], self.left - 1
    if number == 13:
      raise ValueError("not this one")
    if number == 14:
      self.released.wait(60)
    if number == 15:
      return {"message": "x" * (2 << 20)}, None, False
    right = number == self.secret
    said = "right" if right else "higher" if number < self.secret else "lower"
    done = right or not self.left
    return {"message": said}, float(right) if done else None, done


class Adding:
  """One session of a server of MCP tools."""

  schema = CALL

  def reset(self, data):
    return {"metadata": {"status": "ready"}}, None, False

  def step(self, action):
    if action["type"] == "list_tools":
      return {"tools": [ADD]}, None, False
    if action["tool_name"] != "add":
      error = {"error_type": "tool_not_found", "message": "no such tool"}
      return {"tool_name": action["tool_name"], "result": None, "error": error}, None, False
    total = action["arguments"]["a"] + action["arguments"]["b"]
    result = {"content": [{"type": "text", "text": str(total)}], "data": total}
    return {"tool_name": "add", "result": result, "error": None}, 0.5, False


class Served:
  """A server of such sessions, as the test sees it."""

  def __init__(self, made, most):
    self.made, self.most, self.open, self.seen = made, most, 0, []
    self.lock = threading.Lock()

  def handle(self, connection):
    with self.lock:
      self.open += 1
      full = self.open > self.most
    try:
      if full:
        self.say(connection, "error", {"message": "all taken", "code": "CAPACITY_REACHED"})
        return
      session = self.made()
      for text in connection:
        message = json.loads(text)
        self.seen.append(message)
        if message["type"] == "close":
          return
        try:
          found = getattr(session, message["type"])(message["data"])
        except Exception as error:
          self.say(connection, "error", {"message": str(error), "code": "EXECUTION_ERROR"})
          continue
        found = dict(zip(("observation", "reward", "done"), found, strict=True))
        self.say(connection, "observation", found)
    finally:
      with self.lock:
        self.open -= 1

  def say(self, connection, kind, data):
    with contextlib.suppress(Exception):
      connection.send(json.dumps({"type": kind, "data": data}))

  def schema(self, connection, request):
    if request.path == "/schema":
      body = json.dumps({"action": self.made.schema, "observation": {}, "state": {}})
      return connection.respond(http.HTTPStatus.OK, body)
    assert request.path == "/ws"


@contextlib.contextmanager
def serving(made, most=100):
  served = Served(made, most)
  with server.serve(served.handle, "127.0.0.1", 0, process_request=served.schema) as running:
    threading.Thread(target=running.serve_forever, daemon=True).start()
    served.url = f"openenv:http://127.0.0.1:{running.socket.getsockname()[1]}"
    try:
      yield served
    finally:
      Guessing.released.set()
      running.shutdown()
      Guessing.released.clear()


def test_an_episode_is_a_session_of_its_own():
  with serving(Guessing) as served:
    environment = load(served.url, protocol="text", network=True)
    [tool] = environment.tools
    assert tool["function"]["name"] == "step" and "GuessAction" in tool["function"]["description"]
    parameters = tool["function"]["parameters"]
    assert parameters["properties"] == {"number": {"type": "integer", "description": "The guess."}}
    assert parameters["required"] == ["number"] and environment.owns_reward
    with Episodes(environment) as episodes:
      begun = episodes.start([{"secret": 5}, {"secret": 9}, {"secret": 5}])
      assert [(seen.text, seen.status, seen.done) for seen in begun] == [
        ("Find it in 3.", "ok", False)
      ] * 3
      seen = episodes.turn({0: "call step: 7", 1: "call step: 7", 2: "call step: x"})
      assert [seen[i].text for i in (0, 1)] == ["lower", "higher"]
      assert seen[2].status == "malformed" and not seen[0].done
      seen = episodes.turn({0: "call step: 5", 1: "call step: 13"})
      assert (seen[0].text, seen[0].done, seen[0].reward) == ("right", True, 1.0)
      assert (seen[1].status, seen[1].done) == ("tool_error", False)
      assert seen[1].text == "error: EXECUTION_ERROR: not this one"
      assert episodes.turn({1: "call step: 9"})[1].reward == 1.0
      assert episodes.finish(range(3)) == [RewardResult(0.0, "ok")] * 3
    assert {message["type"] for message in served.seen} == {"reset", "step", "close"}


def test_equal_rows_have_one_seed_and_columns_go_to_reset():
  with serving(Guessing) as served, Episodes(load(served.url, network=True)) as episodes:
    episodes.start([{"level": 1}, {"level": 1}, {"level": 2}, {"seed": 7}])
    asked = [message["data"] for message in served.seen if message["type"] == "reset"]
  seeds = {json.dumps(data.get("level")): data["seed"] for data in asked}
  assert len(asked) == 4 and len({data["seed"] for data in asked}) == 3 and seeds["null"] == 7
  assert all(0 <= data["seed"] < 2**31 for data in asked)


def test_tools_of_an_mcp_server_are_tools():
  with serving(Adding) as served:
    environment = load(served.url, protocol="hermes", network=True)
    assert [tool["function"]["name"] for tool in environment.tools] == ["add"]
    with Episodes(environment) as episodes:
      assert episodes.start([{}])[0].text == ""
      call = '<tool_call>{"name": "add", "arguments": {"a": 2, "b": 40}}</tool_call>'
      seen = episodes.turn({0: call})[0]
      assert (seen.text, seen.reward, seen.done) == ("42", 0.5, False)
      assert served.seen[-1]["data"] == {
        "type": "call_tool",
        "tool_name": "add",
        "arguments": {"a": 2, "b": 40},
      }
      assert "missing argument 'b'" in episodes.turn({0: call.replace(', "b": 40', "")})[0].text


def test_what_goes_wrong_on_the_server_is_a_status():
  with serving(Guessing) as served:
    environment = load(served.url, protocol="text", network=True)
    with Episodes(environment, deadline=3.0) as episodes:
      episodes.start([{"secret": 5}] * 4)
      seen = episodes.turn({0: "call step: 14", 1: "call step: 15", 2: "call step: 5"})
      assert (seen[0].status, seen[0].done) == ("timed_out", True)
      assert (seen[1].status, seen[1].done) == ("tool_error", True)
      assert "no longer answers as one" in seen[1].text
      assert seen[2].text == "right"
      hung, large, right, none = episodes.finish(range(4))
      assert (hung.status, large.status, right.value, none.value) == (
        "timed_out",
        "raised",
        0.0,
        0.0,
      )
      assert "no longer answers as one" in large.detail


def test_an_end_without_a_reward_is_no_zero():
  class Unpaid(Guessing):
    def step(self, action):
      return {"message": "over"}, None, True

  with serving(Unpaid) as served:
    with Episodes(load(served.url, protocol="text", network=True)) as episodes:
      episodes.start([{}, {}])
      assert episodes.turn({0: "call step: 1"})[0].done
      found, untouched = episodes.finish([0, 1])
  assert found.status == "raised" and "gave no reward" in found.detail
  assert untouched.value == 0.0


def test_a_full_server_is_waited_for_and_then_named(monkeypatch):
  with serving(Guessing, most=2) as served:
    with Episodes(load(served.url, network=True)) as episodes:
      for _ in range(3):  # The sessions of before end, and their places are free again.
        assert [seen.status for seen in episodes.start([{}] * 2)] == ["ok"] * 2
      monkeypatch.setattr(openenv, "SECONDS", 0.5)
      begun = episodes.start([{}] * 3)
      assert sorted(seen.status for seen in begun) == ["ok", "ok", "tool_error"]
      [refused] = [seen for seen in begun if seen.status != "ok"]
      assert refused.answers == ("reset: error: CAPACITY_REACHED: all taken",)


def test_sessions_end_with_their_episodes():
  with serving(Guessing) as served:
    with Episodes(load(served.url, network=True)) as episodes:
      episodes.start([{}] * 5)
      assert served.open == 5
    until = time.monotonic() + 20
    while served.open and time.monotonic() < until:
      time.sleep(0.01)
    assert served.open == 0


def refused(env, tools="", **how):
  with pytest.raises(EnvironmentError) as found:
    load(env, tools, **how)
  assert "\n" not in str(found.value)
  return str(found.value)


def test_no_network_is_used_unless_it_is_allowed(tmp_path):
  with serving(Guessing) as served:
    message = refused(served.url)
    assert served.seen == [] and "no network is allowed" in message
    flag, value = re.search(r"--(\w+)=(\w+)", message).groups()
    options = replace(agents.Environments(), {"env": served.url})
    with pytest.raises(EnvironmentError, match="no network is allowed"):
      agents.load(options)
    assert agents.load(replace(options, {flag: value})).owns_reward
    file = tmp_path / "mine.py"
    file.write_text("def f(): pass\n")
    assert "leave --tools out" in refused(served.url, f"{file}:f", network=True)
    with pytest.raises(EnvironmentError, match="--task=jsonl:FILE"):
      default_task(load(served.url, network=True))
  for form in ("openenv:localhost:8000", "openenv:", "openenv:http://a b", "openenv:ftp://a"):
    assert "must be openenv:http://HOST:PORT" in refused(form, network=True)


def test_what_does_not_answer_as_a_server_is_named():
  with socket.socket() as free:
    free.bind(("127.0.0.1", 0))
    url = f"openenv:http://127.0.0.1:{free.getsockname()[1]}"
  message = refused(url, network=True)
  assert "does not answer as one (URLError" in message and "start it" in message

  class Other(Guessing):
    schema = None

  with serving(Other) as served:
    assert "does not answer as one (TypeError" in refused(served.url, network=True)


def test_a_run_opens_it_as_other_environments():
  with serving(Guessing) as served:
    options = agents.Environments(env=served.url, env_network="allow")
    how = {"make_begin": dict, "prompt_format": "plain", "weak": False}
    with agents.opened(options, ByteTokenizer(), **how) as episodic:
      assert episodic.environments.start([{"secret": 1}])[0].status == "ok"


@pytest.mark.parametrize(
  "observation, text",
  [
    ({}, ("", False)),
    ({"a": "x", "b": None, "done": True, "reward": 1, "metadata": {"m": 1}}, ("x", False)),
    ({"a": 1}, ('{"a": 1}', False)),
    ({"tool_name": "t", "result": "r", "error": None}, ("r", False)),
    ({"tool_name": "t", "result": {"content": [{"text": "a"}, {"text": "b"}]}}, ("a\nb", False)),
    ({"tool_name": "t", "error": {"message": "gone"}}, ("error: gone", True)),
    ({"tool_name": "t", "error": "gone"}, ("error: gone", True)),
  ],
)
def test_what_a_model_reads_of_an_observation(observation, text):
  assert text_of(observation) == text
