"""Graders that misbehave in every way we know, against the pool: one failure is one sample's."""

import math
import os
import re
import resource
import signal
import socket
import subprocess
import sys
import time

import numpy as np
import pytest

from rl_llm.rewards import (
  RewardError,
  RewardPool,
  RewardResult,
  RewardSource,
  layers,
  pool,
  server,
  to_arrays,
)
from tests.processes import PATIENCE

GRADER = """
import ctypes, glob, json, os, re, signal, socket, time
import numpy as np

seen = []

def reward(prompts, completions, **columns):
  text, = completions
  print("noise on stdout")
  os.write(1, b"more noise")
  if text.startswith("say "):
    kinds = {
      "nan": float("nan"), "inf": float("inf"), "-inf": float("-inf"), "none": None,
      "string": "1.0", "float32": np.float32(0.5), "int64": np.int64(3), "array": np.ones(()),
      "1e30": 1e30, "true": True, "huge int": 10 ** 400, "list": [1.0], "limit": 1e6}
    return [kinds[text[4:]]]
  if text == "two": return [1.0, 2.0]
  if text == "empty": return []
  if text == "bare": return 1.0
  if text == "text": return "1"
  if text == "vector": return np.array([0.25])
  if text == "raise": raise KeyError("no such " + "thing" * 1000)
  if text == "exit": raise SystemExit(0)
  if text == "loop":
    while True: pass
  if text == "slow": time.sleep(1.2)
  if text == "sleep": time.sleep(1e9)
  if text == "power": return [9 ** 9 ** 9]
  if text == "regex": re.match(r"(a+)+$", "a" * 40 + "b")
  if text == "deaf":
    for number in range(1, 32):
      try: signal.signal(number, signal.SIG_IGN)
      except (OSError, ValueError): pass
    time.sleep(1e9)
  if text == "os exit": os._exit(3)
  if text == "segfault": ctypes.string_at(0)
  if text == "4 GB": return [float(len(bytearray(4 << 30)) > 0)]
  if text == "fork bomb":
    for _ in range(1000):
      if os.fork() == 0: time.sleep(1e9)
  if text == "orphan":
    if os.fork() == 0:
      os.setsid()
      time.sleep(1e9)
  if text == "read": open(columns["path"][0]).read()
  if text == "shadow": open("/etc/shadow").read()
  if text == "trainer env":
    for name in glob.glob("/proc/[0-9]*/environ") or ["/proc/1/environ"]: open(name, "rb").read()
  if text == "environment": raise RuntimeError(" ".join(sorted(os.environ)))
  if text == "connect": socket.create_connection(("127.0.0.1", int(columns["port"][0])), 2)
  if text == "udp":
    socket.socket(type=socket.SOCK_DGRAM).sendto(b"x", ("127.0.0.1", int(columns["port"][0])))
  if text == "write": open(columns["path"][0], "w").write("escaped")
  if text == "kill": os.kill(columns["pid"][0], 9)
  if text == "kill all": os.kill(-1, 9)
  if text == "ptrace":
    libc = ctypes.CDLL(None, use_errno=True)
    for pid in (columns["pid"][0], 1):
      if libc.ptrace(16, pid, 0, 0) == 0: return [666.0]
    raise PermissionError("ptrace")
  if text == "100 MB":
    for _ in range(100): os.write(1, b"x" * (1 << 20))
  if text == "big file": open("big", "wb").write(b"x" * (100 << 20))
  if text == "100k files":
    for number in range(100_000): open(str(number), "w").close()
  if text == "leave":
    seen.append(1)
    open("left", "w").close()
  if text == "look": return [float(len(seen) + os.listdir(".").count("left"))]
  if text == "columns": return [float(columns["answer"] == ["12"] and prompts == ["p"])]
  return [1.0]
"""
DEADLINE = 1.0
# What runs in a bare interpreter.
WORKER_FILES = [
  f"{name}.py" for name in "worker directories grading memory root sandbox seccomp".split()
]


@pytest.fixture(scope="module")
def source(tmp_path_factory):
  path = tmp_path_factory.mktemp("graders") / "grader.py"
  path.write_text(GRADER)
  return RewardSource(str(path))


@pytest.fixture(scope="module")
def graders(source):
  """Their deadline is for a grader that hangs: none of what they are given does."""
  with RewardPool(source, deadline=PATIENCE, max_failure_rate=1.0) as made:
    yield made


def one(graders, text, **columns):
  return graders.score(["p"], [text], [columns])[0]


def needs(graders, *layers):
  missing = [layer for layer in layers if layer not in graders.active_layers()]
  if missing:
    pytest.skip(f"this kernel does not offer {missing}")


@pytest.mark.parametrize(
  "said, value, status",
  [
    ("float32", 0.5, "ok"),
    ("int64", 3.0, "ok"),
    ("array", 1.0, "ok"),
    ("true", 1.0, "ok"),
    ("limit", 1e6, "ok"),
    ("none", None, "not_applicable"),
    ("nan", None, "invalid"),
    ("inf", None, "invalid"),
    ("-inf", None, "invalid"),
    ("1e30", None, "invalid"),
    ("huge int", None, "invalid"),
    ("string", None, "invalid"),
    ("list", None, "invalid"),
  ],
)
def test_rule_for_each_kind_of_reward(graders, said, value, status):
  result = one(graders, f"say {said}")
  assert (result.value, result.status) == (value, status)
  assert bool(result.detail) == (status == "invalid")


@pytest.mark.parametrize(
  "text, said",
  [("two", "2 rewards for 1"), ("empty", "0 rewards for 1"), ("bare", "float"), ("text", "str")],
)
def test_wrong_length_is_an_error_that_names_the_function(graders, text, said):
  with pytest.raises(RewardError, match=f"reward of .*grader.py returned {said}"):
    one(graders, text)
  assert one(graders, "fine").status == "ok"


def test_an_array_of_one_is_a_list_of_one(graders):
  assert one(graders, "vector") == RewardResult(0.25, "ok")


def test_columns_arrive_by_name_as_lists(graders):
  assert one(graders, "columns", answer="12").value == 1.0


def test_an_error_names_the_file_and_the_line(tmp_path):
  path = tmp_path / "bad3.py"
  path.write_text("def reward(prompts, completions, **c):\n\n  return [1 / len(prompts[9:])]\n")
  with RewardPool(RewardSource(str(path)), workers=1, max_failure_rate=1.0) as made:
    assert one(made, "x").detail == "ZeroDivisionError: division by zero (bad3.py:3)"
  for text, place in (("x = 1\n1 / 0\n", "bad3.py:2"), ("x = 1\n\ndef reward(:\n", "bad3.py:3")):
    path.write_text(text)
    with pytest.raises(RewardError, match=re.escape(f"({place})")):
      RewardPool(RewardSource(str(path)), workers=1)


@pytest.mark.parametrize(
  "text, status, detail",
  [
    ("raise", "raised", "KeyError"),
    ("exit", "raised", "SystemExit"),
    ("os exit", "died", "code 3"),
    ("segfault", "died", "SIGSEGV"),
    ("4 GB", "raised", "MemoryError"),
  ],
)
def test_a_failure_has_a_status_and_a_bounded_reason(graders, text, status, detail):
  result = one(graders, text)
  assert (result.value, result.status) == (None, status)
  assert detail in result.detail and len(result.detail) <= 2000
  assert one(graders, "fine").value == 1.0


def test_the_library_s_own_graders_share_a_process_and_keep_every_status(source):
  """Without a fork per sample, state is kept between samples; a death or a hang still costs one."""
  with RewardPool(
    source._replace(own_grader=True), workers=1, spares=0, deadline=DEADLINE, max_failure_rate=1.0
  ) as pool:
    texts = ["fine", "raise", "os exit", "fine", "sleep", "fine", "say none", "leave", "look"]
    results = pool.score(["p"] * len(texts), texts, [{}] * len(texts))
    assert [result.status for result in results] == [
      "ok", "ok", "died", "ok", "timed_out", "ok", "not_applicable", "ok", "ok",
    ]  # fmt: skip
    assert results[-1].value == 2.0, "the file and the list entry that `leave` left are there"
    assert pool.size == 1


def test_hangs_cost_no_other_sample(source, record_property):
  hangs = ["loop", "sleep", "power", "regex", "deaf", "loop", "sleep", "regex"]
  texts = ["fine"] * 64
  for index, hang in enumerate(hangs):
    texts[8 * index + 3] = hang
  with RewardPool(source, deadline=DEADLINE) as graders:
    results = graders.score(["p"] * 64, texts, [{}] * 64)
    assert graders.size == 2
    assert one(graders, "fine").value == 1.0
  assert [r.status for r in results] == ["timed_out" if text in hangs else "ok" for text in texts]
  record_property("F22", len(hangs))


def test_spares_do_not_crowd_out_a_grader_that_is_slow_on_every_sample(source):
  """Each call is slow before the first has ended, but calls in no more spares than workers.

  All 8 at once would have the cores of two, and each would take four times as long.
  """
  at_once = []
  with RewardPool(source, deadline=3.0) as made:
    send = made._send

    def send_and_count(*args):
      send(*args)
      at_once.append(sum(worker.call is not None for worker in made._live))

    made._send = send_and_count
    results = made.score(["p"] * 8, ["slow"] * 8, [{}] * 8)
    assert [r.status for r in results] == ["ok"] * 8
  assert len(at_once) == 8 and max(at_once) <= 4, at_once


def test_with_spares_hangs_cost_one_deadline_and_without_one_after_another(source):
  """Of two workers and eight hangs, which sleep: a busy machine can do that as fast as another."""
  seconds = []
  for settings in ({}, {"spares": 0}):
    with RewardPool(source, deadline=DEADLINE, max_failure_rate=1.0, **settings) as made:
      start = time.monotonic()
      made.score(["p"] * 8, ["sleep"] * 8, [{}] * 8)
      seconds.append(time.monotonic() - start)
  assert seconds[0] < seconds[1] and seconds[1] > 4 * DEADLINE


def test_fork_bomb_and_orphans_end_with_their_sample(graders):
  needs(graders, "processes")
  assert one(graders, "fork bomb").status == "raised"
  assert one(graders, "orphan").status == "ok"
  deadline = time.monotonic() + PATIENCE
  while (left := _descendants(graders._server.pid)) and time.monotonic() < deadline:
    if len(left) == 4:  # a minder and a worker each
      break
    time.sleep(0.05)
  assert len(left) == 4


def test_the_trainer_does_not_grow(graders):
  one(graders, "fine")
  before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
  for text in ("4 GB", "100 MB", "raise"):
    one(graders, text)
  assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 20_000  # KB


def _descendants(pid):
  parents = {}
  for name in filter(str.isdigit, os.listdir("/proc")):
    try:
      with open(f"/proc/{name}/stat") as file:
        parents[int(name)] = int(file.read().rpartition(")")[2].split()[1])
    except OSError:
      pass
  found = {pid}
  while new := {child for child, parent in parents.items() if parent in found} - found:
    found |= new
  return found - {pid}


class TestEscapes:
  """What hostile text could do through a grader that runs it; each ends, if need be by force."""

  @pytest.fixture(autouse=True)
  def in_time(self):
    start = time.monotonic()
    yield
    assert time.monotonic() - start < PATIENCE

  @pytest.mark.parametrize("text", ["shadow", "trainer env"])
  def test_no_files_of_others(self, graders, text):
    needs(graders, "files")
    result = one(graders, text)
    assert result.status == "raised" and "Error" in result.detail

  def test_no_reading_of_what_all_users_may_read(self, graders, tmp_path):
    needs(graders, "files")
    path = tmp_path / "secret"
    path.write_text("key")
    path.chmod(0o644)
    assert one(graders, "read", path=str(path)).status == "raised"
    assert one(graders, "read", path=os.__file__).status == "ok"

  def test_no_writing_outside(self, graders, tmp_path):
    needs(graders, "files")
    tmp_path.chmod(0o777)
    assert one(graders, "write", path=str(tmp_path / "marker")).status == "raised"
    assert one(graders, "write", path="here").status == "ok"
    assert os.listdir(tmp_path) == []

  def test_no_network(self, graders):
    needs(graders, "network")
    with socket.create_server(("127.0.0.1", 0)) as server:
      port = server.getsockname()[1]
      assert one(graders, "connect", port=port).status == "raised"
      server.settimeout(0.2)
      with pytest.raises(TimeoutError):
        server.accept()
    assert one(graders, "udp", port=port).status == "raised"

  def test_one_that_wants_a_network_is_told_that_there_is_none(self, tmp_path):
    path = tmp_path / "asks.py"
    lines = ["import urllib.request", "", "def reward(prompts, completions, **c):"]
    lines += ['  return urllib.request.urlopen("http://127.0.0.1:9/score")', ""]
    path.write_text("\n".join(lines))
    with RewardPool(RewardSource(str(path)), workers=1) as made:
      needs(made, "network")
      with pytest.raises(RewardError, match=r"\(asks.py:4\); a grader has no network: have what"):
        made.score(["p"], ["x"], [{}])

  def test_environment_is_empty(self, graders):
    names = set(one(graders, "environment").detail.partition(": ")[2].partition(" (")[0].split())
    assert names == {"HOME", "LC_ALL", "OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "TMPDIR"}

  def test_no_other_process_is_in_reach(self, graders):
    needs(graders, "processes")
    assert one(graders, "kill", pid=os.getpid()).status == "raised"
    assert one(graders, "ptrace", pid=os.getpid()).status == "raised"
    one(graders, "kill all")
    assert one(graders, "fine").status == "ok"

  def test_output_and_files_are_bounded(self, graders):
    needs(graders, "own file system")
    assert one(graders, "100 MB").status == "ok"
    for text in ("big file", "100k files"):
      result = one(graders, text)
      assert result.status in ("raised", "died") and result.value is None
    assert one(graders, "write", path="room").status == "ok"


def test_no_sample_sees_another(source):
  with RewardPool(source, workers=1) as single:
    results = single.score(["p"] * 3, ["leave", "leave", "look"], [{}] * 3)
  assert results[2] == RewardResult(0.0, "ok")


def test_strange_and_large_text_passes(graders):
  texts = ["\ud800", "\0", "é€😀", "x" * (10 << 20)]
  assert [r.status for r in graders.score(["p"] * 4, texts, [{}] * 4)] == ["ok"] * 4


def processor_seconds(pids):
  """What these processes and the children that they have reaped have used."""
  total = 0
  for pid in pids:
    with open(f"/proc/{pid}/stat") as file:
      total += sum(map(int, file.read().rpartition(")")[2].split()[11:15]))
  return total / os.sysconf("SC_CLK_TCK")


def test_overhead_is_below_10_ms_of_processor_time_a_sample(source):
  """Two cores then grade 200 a second or more. Unlike a rate, it is the same on a busy machine."""
  with RewardPool(source) as made:
    made.score(["p"] * 64, ["fine"] * 64, [{}] * 64)
    pids = {made._server.pid, *_descendants(made._server.pid)}
    before, own = processor_seconds(pids), time.process_time()
    for _ in range(4):
      made.score(["p"] * 64, ["fine"] * 64, [{}] * 64)
    used = processor_seconds(pids) - before + time.process_time() - own
  assert 0 < used < 0.01 * 4 * 64


def test_too_many_failures_stop_the_run(source):
  texts = ["fine", "raise", "fine", "raise"]
  with RewardPool(source, max_failure_rate=0.5) as half:
    assert [r.status for r in half.score(["p"] * 4, texts, [{}] * 4)].count("raised") == 2
    with pytest.raises(
      RewardError, match="failed on 3 of 4 samples.*0.5.*sample 1 raised: KeyError"
    ):
      half.score(["p"] * 4, texts[:2] + ["raise"] * 2, [{}] * 4)
    assert half.score([], [], []) == []


def test_each_worker_has_ipc_objects_of_its_own(tmp_path):
  """As a number of its namespace, of two workers that answer at the same time."""
  (tmp_path / "grader.py").write_text(
    "import os, time\n"
    "def reward(prompts, completions, **columns):\n"
    "  time.sleep(0.5)\n"
    "  return [float(os.stat('/proc/self/ns/ipc').st_ino % 10**6)]\n"
  )
  own = float(os.stat("/proc/self/ns/ipc").st_ino % 10**6)
  with RewardPool(RewardSource(str(tmp_path / "grader.py")), workers=2) as made:
    needs(made, "ipc")
    found = {r.value for r in made.score(["p"] * 4, ["x"] * 4, [{}] * 4)}
  assert None not in found and len(found) >= 2 and own not in found


def test_keys_of_the_session_are_out_of_reach():
  """In a process of its own, on a session keyring of its own."""
  program = f"""
import ctypes, os, sys
sys.path.insert(0, {os.getcwd()!r})
from rl_llm.rewards import sandbox, seccomp
call = ctypes.CDLL(None, use_errno=True).syscall
add, keyctl = (seccomp._NUMBERS[n][os.uname().machine != "x86_64"] for n in ("add_key", "keyctl"))
if not sandbox.own_keyring() or call(add, b"user", b"rl_llm_test", b"x", 1, -3) < 0:
  sys.exit(77)
find = lambda: call(keyctl, 10, -3, b"user", b"rl_llm_test", 0)  # KEYCTL_SEARCH
assert find() > 0
assert sandbox.own_keyring() and find() == -1
"""
  done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
  if done.returncode == 77:
    pytest.skip("this kernel has no keyrings, or they are refused here")
  assert done.returncode == 0, done.stderr


def test_a_killed_server_is_replaced(source):
  with RewardPool(source) as made:
    os.kill(made._server.pid, signal.SIGKILL)
    made._server.wait()
    assert [r.status for r in made.score(["p"] * 3, ["fine"] * 3, [{}] * 3)] == ["ok"] * 3
    assert made.size == 2


def test_close_ends_every_process_and_removes_the_directory(source):
  made = RewardPool(source)
  server, directory = made._server.pid, made._directory
  children = _descendants(server)
  assert len(children) >= 4
  made.close()
  made.close()
  deadline = time.monotonic() + PATIENCE
  while time.monotonic() < deadline and any(os.path.exists(f"/proc/{pid}") for pid in children):
    time.sleep(0.02)
  assert not any(os.path.exists(f"/proc/{pid}") for pid in [server, *children])
  assert not os.path.exists(directory)


@pytest.mark.parametrize(
  "text, function, said",
  [
    (
      "def other(prompts, completions): pass",
      "reward",
      "no function 'reward' in it; it has: other",
    ),
    ("def reward(:", "reward", "SyntaxError"),
    ("import no_such_package", "reward", "No module named 'no_such_package'"),
    ("raise SystemExit(3)", "reward", "SystemExit: 3"),
    ("import os; os._exit(7)", "reward", r"died while importing it \(code 7\)"),
    ("reward = 3", "reward", "no function 'reward'"),
    ("import time; time.sleep(100)", "reward", "took over 1 s"),
  ],
)
def test_what_cannot_be_imported_is_one_line_at_the_start(tmp_path, text, function, said):
  path = tmp_path / "mine.py"
  path.write_text(text)
  with pytest.raises(RewardError, match=f"{function} of .*mine.py: .*{said}") as error:
    RewardPool(RewardSource(str(path), function), start_deadline=1 if "sleep" in text else 30)
  assert "\n" not in str(error.value)


def test_missing_file_and_module(tmp_path):
  with pytest.raises(RewardError, match="absent.py: no such file"):
    RewardPool(RewardSource(str(tmp_path / "absent.py")))
  with pytest.raises(RewardError, match="No module named 'no_such_module'"):
    RewardPool(RewardSource("no_such_module"))


def test_a_file_sees_what_it_imported_at_first_and_what_it_is_given(tmp_path):
  """Its neighbours, imported or read while it grades, are files of its user like any other."""
  (tmp_path / "neighbour.py").write_text("ONE = 1.0")
  (tmp_path / "words.txt").write_text("one")
  path = tmp_path / "mine.py"
  late = "def reward(prompts, completions, **c):\n  import neighbour\n  return [neighbour.ONE]\n"
  reads = "def reads(prompts, completions, **c):\n  return [float(len(open(WORDS).read()))]\n"
  words = f"WORDS = {str(tmp_path / 'words.txt')!r}\n"
  path.write_text(words + late + reads)
  source = RewardSource(str(path))
  reading = source._replace(function="reads")
  with RewardPool(reading, workers=1, max_failure_rate=1.0) as made:
    needs(made, "files")
    assert one(made, "x").status == "raised"
  with pytest.raises(RewardError, match="neighbour.*; it sees .* --reward_files"):
    with RewardPool(source, workers=1) as made:
      one(made, "x")
  given = (str(tmp_path / "neighbour.py"), str(tmp_path / "words.txt"))
  for each, value in ((source, 1.0), (reading, 3.0)):
    with RewardPool(each._replace(files=given), workers=1) as made:
      assert one(made, "x") == RewardResult(value, "ok")
  path.write_text("import neighbour\n" + late)
  with RewardPool(source, workers=1) as made:
    assert one(made, "x") == RewardResult(1.0, "ok")


def test_a_path_given_that_is_not_there_is_an_error_at_the_start(source):
  with pytest.raises(RewardError, match="reward_files=/no/such: no such file or directory; corr"):
    RewardPool(source._replace(files=("/no/such",)))


def test_code_that_runs_text_needs_its_barriers(source, monkeypatch):
  monkeypatch.setattr(layers, "REQUIRED", ("a moat",))
  running = source._replace(runs_text=True)
  with pytest.raises(RewardError, match="cannot bar it from a moat; .*--reward_sandbox=weak"):
    RewardPool(running)
  with RewardPool(running, allow_weak_sandbox=True) as made:
    assert one(made, "fine").status == "ok"
  with RewardPool(source) as made:
    assert one(made, "fine").status == "ok"


@pytest.mark.parametrize(
  "name, value",
  [
    ("workers", 0),
    ("spares", -1),
    ("deadline", 0.0),
    ("deadline", math.nan),
    ("deadline", math.inf),
    ("memory_mb", 1),
    ("max_failure_rate", 1.5),
    ("start_deadline", 0),
  ],
)
def test_arguments_out_of_range(source, name, value):
  with pytest.raises(ValueError, match=f"{name}={value!r}: must be"):
    RewardPool(source, **{name: value})


def test_bad_batches(graders):
  with pytest.raises(ValueError, match="2 prompts, 1 completions, 1 columns: must be as many"):
    graders.score(["p", "q"], ["x"], [{}])
  with pytest.raises(ValueError, match="sample 0: .* not of JSON types"):
    graders.score(["p"], ["x"], [{"answer": {1, 2}}])


def test_memory_limit_is_the_one_asked_for(source):
  text = "def reward(prompts, completions, **c): return [float(len(bytearray(400 << 20)) > 0)]"
  path = os.path.join(os.path.dirname(source.location), "memory.py")
  with open(path, "w") as file:
    file.write(text)
  for memory_mb, status in ((300, "raised"), (2048, "ok")):
    with RewardPool(
      RewardSource(path), workers=1, memory_mb=memory_mb, max_failure_rate=1.0
    ) as made:
      assert one(made, "x").status == status


def test_to_arrays():
  results = [
    RewardResult(0.5, "ok"),
    RewardResult(None, "raised", "KeyError"),
    RewardResult(0.0, "ok"),
    RewardResult(None, "not_applicable"),
  ]
  values, ok, counts = to_arrays(results)
  assert values.dtype == np.float32 and ok.dtype == bool
  assert values.tolist() == [0.5, 0.0, 0.0, 0.0]
  assert ok.tolist() == [True, False, True, False]
  assert counts == {
    "ok": 2, "not_applicable": 1, "raised": 1, "timed_out": 0, "died": 0, "invalid": 0,
    "unreadable": 0,
  }  # fmt: skip
  assert to_arrays([])[0].shape == (0,)


def test_without_the_kernels_help_hangs_still_end(source, tmp_path, monkeypatch):
  """A system that offers none of the barriers: statuses, deadlines and clean ends remain."""
  directory = os.path.dirname(pool.__file__)
  for name in WORKER_FILES:
    with open(os.path.join(directory, name)) as file:
      text = file.read()
    text = re.sub(r"(?m)^_libc = .*", "_libc = None", text)
    (tmp_path / name).write_text(text.replace('sys.platform == "linux"', "False"))
  monkeypatch.setattr(server.protocol, "__file__", str(tmp_path / "worker.py"))
  with RewardPool(source, deadline=DEADLINE, max_failure_rate=1.0) as made:
    assert made.active_layers() == ("limits",)
    texts = ["fine", "loop", "os exit", "4 GB", "sleep", "fine"]
    results = made.score(["p"] * 6, texts, [{}] * 6)
    statuses = ["ok", "timed_out", "died", "raised", "timed_out", "ok"]
    assert [r.status for r in results] == statuses
    one(made, "fine")
  until = time.monotonic() + PATIENCE
  while any(str(tmp_path) in command for command in _commands()):
    assert time.monotonic() < until, "a worker is left"
    time.sleep(0.02)


def _commands():
  for name in filter(str.isdigit, os.listdir("/proc")):
    try:
      with open(f"/proc/{name}/cmdline") as file:
        yield file.read()
    except OSError:
      pass


def test_worker_and_sandbox_need_only_the_standard_library():
  directory = os.path.dirname(pool.__file__)
  for name in WORKER_FILES:
    with open(os.path.join(directory, name)) as file:
      imported = {
        line.split()[1].partition(".")[0] for line in file if line.startswith(("import ", "from "))
      }
    assert imported <= set(sys.stdlib_module_names) | {"__future__", "rl_llm"}
