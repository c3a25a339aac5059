"""Tools that do what a tool must not: each is contained, and counted under its status."""

import collections
import os
import re
import socket
import time

import pytest

from rl_llm.rewards import memory
from rl_llm.tasks.environments import Episodes, load

ERROR, OVER, DIED, OK = "tool_error", "timed_out", "died", "ok"

# name: (its body, the statuses that it may have; where the kernel decides there are several)
HOSTILE = {
  "fork_bomb": ("while True: os.fork()", {ERROR, OVER, DIED}),
  "forks_and_returns": ("os.fork(); return 'twice'", {OK}),
  "endless_answer": ("return 'x' * 10**7", {OK}),  # 150 times what leaves the process
  "endless_number": ("return 10 ** 10**7", {ERROR, OVER}),
  "endless_iterator": ("return list(iter(int, 1))", {ERROR, OVER, DIED}),
  "endless_print": ("while True: print('x' * 10**6)", {OVER}),
  "endless_file": ("f = open('/tmp/f', 'wb')\nwhile True: f.write(b'x' * 10**6)", {ERROR}),
  "many_files": ("for i in range(10**6): open(f'f{i}', 'w').close()", {ERROR, OVER}),
  "reads_passwords": ("return open('/etc/passwd').read()", {ERROR}),
  "reads_the_run": ("return open(SECRET).read()", {ERROR}),
  "writes_its_own_file": ("open(__file__, 'a').write('# owned')", {ERROR}),
  "deletes_everything": ("shutil.rmtree('/usr')", {ERROR}),
  "sleeps": ("time.sleep(100)", {OVER}),
  "loops": ("while True:\n  try:\n    while True: pass\n  except BaseException: pass", {OVER}),
  "backtracks": ("return re.match('(a+)+$', 'a' * 40 + 'b')", {OVER}),
  "kills_itself": ("os.kill(os.getpid(), signal.SIGKILL)", {OK, DIED, ERROR}),
  "kills_all": ("os.kill(-1, signal.SIGKILL)", {OK, DIED, ERROR}),
  "kills_its_parent": ("os.kill(os.getppid(), signal.SIGKILL)", {OK, DIED, ERROR}),
  "exits": ("sys.exit(0)", {ERROR}),
  "exits_at_once": ("os._exit(0)", {DIED}),
  "interrupts": ("raise KeyboardInterrupt", {ERROR}),
  "aborts": ("os.abort()", {DIED}),
  "crashes": ("ctypes.string_at(0)", {DIED}),
  "becomes_a_shell": ("os.execv('/bin/sh', ['sh', '-c', 'sleep 100'])", {DIED, OVER, ERROR}),
  "connects": ("socket.create_connection(('127.0.0.1', PORT), 1)", {ERROR}),
  "sends": ("socket.socket(socket.AF_INET, socket.SOCK_DGRAM).sendto(b'x', ('127.0.0.1', PORT))",
            {ERROR}),
  "looks_up_a_name": ("return socket.gethostbyname('localhost.example')", {ERROR}),
  "recurses": ("f = lambda: f()\nreturn f()", {ERROR}),
  "recurses_without_limit": ("sys.setrecursionlimit(10**9)\nf = lambda: f()\nreturn f()",
                             {ERROR, OVER, DIED}),
  "answers_a_lock": ("return threading.Lock()", {OK}),
  "answers_nothing_readable": ("class A:\n  def __str__(self): raise OSError('no')\nreturn A()",
                               {ERROR}),
  "answers_no_text": ("return '\\ud800\\x00' * 10", {OK}),
  "answers_a_deep_list": ("a = []\nfor _ in range(10**5): a = [a]\nreturn a", {ERROR, DIED}),
  "takes_memory": ("return len(bytearray(10**10))", {ERROR}),
  "takes_memory_in_forks": (
    "for _ in range(12):\n  if not os.fork():\n    a = bytearray(b'x') * (60 << 20)\n"
    "    time.sleep(100)\ntime.sleep(100)", {OVER}),
  "starts_threads": ("for _ in range(10**5): threading.Thread(target=time.sleep, args=[9]).start()",
                     {ERROR, OVER}),
  "leaves_processes": ("if not os.fork():\n  os.setsid()\n  if not os.fork():\n    time.sleep(100)",
                       {OK}),
  "closes_all": ("os.closerange(0, 256)", {DIED}),
  "answers_by_itself": ("for n in range(3, 20):\n  try: os.write(n, b'\\xff' * 99)\n"
                        "  except OSError: pass", {DIED}),
  "breaks_python": ("json.dumps = len = None\nimport builtins\nbuiltins.str = None", {DIED, ERROR}),
}  # fmt: skip

HEAD = """
import ctypes, json, os, re, shutil, signal, socket, sys, threading, time
SECRET, PORT = {secret!r}, {port}

class Hostile:
  def reset(self, **columns):
    pass

  def innocent(self) -> str:
    '''Answers.'''
    return "here"
"""


@pytest.fixture(scope="module")
def attacked(tmp_path_factory):
  """A batch in which every episode but the last calls another hostile tool, and what came of it."""
  folder = tmp_path_factory.mktemp("hostile")
  secret = folder / "secret"
  secret.write_text("the secret")
  with socket.create_server(("127.0.0.1", 0)) as server:
    server.settimeout(0.0)
    source = HEAD.format(secret=str(secret), port=server.getsockname()[1])
    for name, (body, _) in HOSTILE.items():
      lines = "".join(f"    {line}\n" for line in body.splitlines())
      source += f"\n  def {name}(self):\n    '''Does harm.'''\n{lines}"
    path = folder / "tools.py"
    path.write_text(source)
    environment = load(f"{path}:Hostile", protocol="text")
    limits = {"deadline": 4.0, "memory_mb": 512}
    with Episodes(environment, **limits) as episodes:
      count = len(HOSTILE) + 1
      episodes.start([{}] * count)
      texts = [f"call {name}:" for name in HOSTILE] + ["call innocent:"]
      begun = time.monotonic()
      first = episodes.turn(dict(enumerate(texts)))
      seconds = time.monotonic() - begun
      second = episodes.turn({index: "call innocent:" for index in range(count)})
      rewards = episodes.finish(range(count))
      pids = [each.pid for each in episodes._servers.values()]
      deadline = time.monotonic() + 10
      while (left := memory.descendants(pids[0])) and time.monotonic() < deadline:
        time.sleep(0.05)
      # The same processes serve a next batch.
      episodes.start([{}] * 4)
      after = episodes.turn({index: "call innocent:" for index in range(4)})
    connected = True
    try:
      server.accept()
    except BlockingIOError:
      connected = False
    yield {
      "first": dict(zip([*HOSTILE, "innocent"], first.values(), strict=True)),
      "second": dict(zip([*HOSTILE, "innocent"], second.values(), strict=True)),
      "rewards": rewards, "seconds": seconds, "left": left, "after": after,
      "connected": connected, "source": source, "written": path.read_text(),
    }  # fmt: skip


def test_there_are_thirty_of_them():
  assert len(HOSTILE) >= 30


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_tool_is_a_status_and_a_short_text(attacked, name):
  seen = attacked["first"][name]
  assert seen.status in HOSTILE[name][1], seen
  assert len(seen.text) < 2100 and seen.calls == 1
  assert seen.done == (seen.status in (OVER, DIED))
  seen.text.encode()  # it is text


def test_the_others_never_notice(attacked):
  assert attacked["first"]["innocent"].text == attacked["second"]["innocent"].text == "here"
  assert attacked["seconds"] < 60
  assert [each.text for each in attacked["after"].values()] == ["here"] * 4


def test_an_episode_is_asked_again_only_where_it_can_answer(attacked):
  for name, before in attacked["first"].items():
    after = attacked["second"][name]
    if before.done:
      assert after.done and after.status == before.status, name
    elif name not in ("fork_bomb", "kills_all", "kills_its_parent"):
      assert (after.text, after.status) == ("here", "ok"), name


def test_each_is_counted_under_its_status(attacked):
  found = collections.Counter(result.status for result in attacked["rewards"] if result is not None)
  statuses = collections.Counter(each.status for each in attacked["second"].values())
  assert found["timed_out"] == statuses["timed_out"] >= 5
  assert found["died"] == statuses["died"] >= 4


def test_nothing_got_out_and_nothing_is_left(attacked):
  assert not attacked["connected"] and attacked["source"] == attacked["written"]
  assert attacked["left"] == []
  assert not re.search("the secret|root:", str(attacked["first"]))
  assert os.path.isdir("/usr")


RESETS = '''
import os, time
class Bad:
  def reset(self, do, **columns):
    if do == "raise":
      raise ValueError("no such row")
    if do == "exit":
      os._exit(3)
    if do == "number":
      return 3
    return "ready"

  def tool(self) -> str:
    """Answers."""
    return "here"

  def get_reward(self) -> float:
    return {"nan": float("nan"), "text": "a", "none": None}.get(self.do, 1.0)
'''


def test_a_reset_that_fails_is_an_episode_that_has_ended(tmp_path):
  path = tmp_path / "bad.py"
  path.write_text(RESETS.replace("    if do ==", "    self.do = do\n    if do ==", 1))
  with Episodes(load(f"{path}:Bad", protocol="text")) as episodes:
    rows = [{"do": do} for do in ("raise", "exit", "number", "nan", "text", "none", "fine")]
    begun = episodes.start(rows)
    assert [each.status for each in begun[:4]] == ["tool_error", "died", "tool_error", "ok"]
    assert [each.done for each in begun] == [True] * 3 + [False] * 4
    seen = episodes.turn({0: "call tool:", 6: "call tool:"})
    assert seen[0].done and "no such row" in seen[0].text and seen[6].text == "here"
    statuses = [result.status for result in episodes.finish(range(7))]
    assert statuses == ["raised", "died", "raised", "invalid", "raised", "not_applicable", "ok"]


def test_an_episode_has_a_deadline_of_its_own(tmp_path):
  path = tmp_path / "slow.py"
  body = '  """Waits.\n\n  Args:\n    s: Seconds.\n  """\n  time.sleep(s)\n'
  path.write_text(f"import time\ndef wait(s: int):\n{body}")
  with Episodes(load("", f"{path}:wait", protocol="text"), episode_deadline=3.0) as episodes:
    episodes.start([{}])
    first = episodes.turn({0: "call wait: 1"})[0]
    begun = time.monotonic()
    last = episodes.turn({0: "call wait: 100"})[0]
    assert [first.status, last.status] == ["ok", "timed_out"]
    assert "all its calls took over 3 s" in last.text and last.done
    assert time.monotonic() - begun < 3.0, "what the first took is counted"
