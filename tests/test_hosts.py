"""What several processes do apart from their devices, in real ones that compute next to nothing."""

from __future__ import annotations

import dataclasses
import signal
import time

import jax
import numpy as np
import pytest

from experiments import grpo
from experiments.flags import Distributed
from rl_llm.errors import ConfigError
from rl_llm.parallel import binding, hosts, sharding, stderr_filter
from rl_llm.runs.config import replace, run, volatile
from rl_llm.runs.run_directory import started_with
from tests import processes
from tests.representatives import mostly_slow

# A program of two processes: joins, runs the body, and ends as an experiment does.
PROGRAM = """
import functools, os, signal, sys, time
import jax, jax.numpy as jnp, numpy as np
from rl_llm.parallel import hosts, sharding
from rl_llm.errors import ConfigError
from rl_llm.runs.signals import StopSignals
from rl_llm.training.loop import exit_code

def body(me):
{body}

me = int(sys.argv[1])
keywords = dict(coordinator="localhost:" + sys.argv[2], processes=2, process_id=me)
keywords |= dict(heartbeat={heartbeat}, wait={wait})
print("process", me, "starts", flush=True)
sys.exit(exit_code(functools.partial(body, me), distributed=keywords))
"""


def begin(body, *, heartbeat=100, wait=600, devices=1):
  body = "\n".join(f"  {line}" for line in body.strip().splitlines())
  program = PROGRAM.format(body=body, heartbeat=heartbeat, wait=wait)
  port = processes.free_port()
  return [processes.start(["-c", program, me, port], devices=devices) for me in (0, 1)]


def ends(body, **settings):
  return [processes.ended(process) for process in begin(body, **settings)]


def test_one_process_is_as_if_there_were_no_others():
  assert (hosts.count(), hosts.index(), hosts.is_main()) == (1, 0, True)
  assert hosts.all_gather("a test", value := {"a": (1, 2)})[0] is value
  assert hosts.broadcast("a test", value) is value
  hosts.barrier("a test")
  hosts.assert_equal("a test", {"seed": 0})


def test_what_is_exchanged_is_seen_by_all_and_the_first_alone_speaks():
  found = ends(
    """
print("hello from", me)
assert hosts.all_gather("a", [me, "x" * me]) == [[0, ""], [1, "x"]]
assert hosts.all_gather("a", -me) == [0, -1]  # The same name again.
assert hosts.broadcast("b", me + 7) == 7
hosts.assert_equal("c", {"--seed": 3})
mesh = sharding.make_mesh()
assert mesh.size == 4
assert sharding.row_owners(mesh, 8).tolist() == [0, 0, 0, 0, 1, 1, 1, 1]
rows = np.arange(24.0).reshape(8, 3)
keys = jax.random.split(jax.random.key(3), 8)
placed, placed_keys, scalar = sharding.shard_rows((rows, keys, np.float32(2)), mesh)
assert not placed.is_fully_addressable
mine = sorted(shard.index[0].start for shard in placed.addressable_shards)
assert mine == [4 * me, 4 * me + 2], mine
double = jax.jit(lambda x, s: {"rows": s * x, "sum": x.sum()})(placed, scalar)
back = sharding.gather_to_host({**double, "number": 5})
np.testing.assert_array_equal(back["rows"], 2 * rows)
assert back["sum"] == rows.sum() and back["number"] == 5
data = sharding.gather_to_host(jax.random.key_data(placed_keys))
np.testing.assert_array_equal(data, jax.random.key_data(keys))
""",
    devices=2,
  )
  assert [process.code for process in found] == [0, 0], found
  assert "hello from 0" in found[0].out and "hello" not in found[1].out
  assert not any("Gloo" in process.out for process in found)
  assert [process.errors for process in found] == [[], []]


@pytest.mark.slow
def test_each_grades_the_rows_that_its_devices_hold():
  """Rows that tensor parallelism lays on both are graded by one; all get all rewards."""
  found = ends(
    """
from rl_llm.rollout.grading import owners_of, score
from rl_llm.rewards import RewardResult
from rl_llm.tasks import Problem
seen = []
class Pool:
  def score(self, prompts, texts, columns, ids, *, group_size, step, steps):
    assert len(texts) % group_size == 0 and [len(x) for x in texts] == ids, "whole groups"
    seen.extend(texts)
    return [RewardResult(len(text) / 8, "ok", extra={"seen": text}) if text
            else RewardResult(None, "raised", "no text") for text in texts]
problems = [Problem("?", {}, str(p)) for p in range(4)]
texts = ["x" * b for b in range(8)]
for sizes, mine in ((dict(data=4), slice(4 * me, 4 * me + 4)),
                    (dict(data=2, fsdp=2), slice(4 * me, 4 * me + 4)),
                    (dict(data=1, tensor=4), slice(0, 8 - 8 * me))):
  seen.clear()
  owners = owners_of(sharding.make_mesh(**sizes), 8)
  scores = score(Pool(), problems, texts, [*range(8)], group_size=2, owners=owners)
  assert seen == texts[mine], (sizes, seen)
  assert scores.rewards.tolist() == [[0, 1/8], [2/8, 3/8], [4/8, 5/8], [6/8, 7/8]]
  assert scores.ok.tolist() == [[False, True]] + [[True, True]] * 3
  assert scores.results[0] == RewardResult(None, "raised", "no text")
  assert scores.results[7] == RewardResult(7 / 8, "ok", extra={"seen": texts[7]})
try:
  sharding.make_mesh(data=2)
except sharding.ShardingError as error:
  assert "takes 2 of the 4 devices of 2 processes" in str(error)
  raise
""",
    devices=2,
  )
  assert [process.code for process in found] == [2, 2], found


@pytest.mark.slow
@pytest.mark.parametrize(
  ("program", "message"),
  [
    (
      'hosts.assert_equal("the settings", {"--steps": 5, "--seed": me})',
      ("--seed is 1 in process 1 (", "0 in process 0 ("),
    ),
    (
      "from rl_llm.rollout.drawing import assert_same_data\n"
      "assert_same_data([[1, 2], [3]][:: 1 - 2 * me])",
      ("the order of the data is ", " in process 1 ("),
    ),
  ],
  ids=["settings", "data"],
)
def test_processes_that_differ_are_refused_alike(program, message):
  found = ends(program)
  for process in found:
    (line,) = process.errors
    assert all(part in line for part in message), line
    assert process.code == 2
  assert found[0].errors == found[1].errors


def test_a_run_compares_settings_files_and_code(tmp_path):
  (tmp_path / "rows.jsonl").write_text("{}")
  config = replace(grpo.Config(), {"task": f"jsonl:{tmp_path / 'rows.jsonl'}"})
  found = started_with(config, volatile=volatile(config))
  named = {"--seed", "--task", "the file of --task", "the module rl_llm.kl", "JAX's version"}
  assert named <= found.keys()
  assert not {"--workdir", "--distributed.process_id", "--mesh.data"} & found.keys()


@pytest.mark.slow
def test_who_is_late_is_named():
  found = ends("hosts._here.wait = 5\ntime.sleep(30 * me)\nhosts.barrier('the test')")
  assert [process.code for process in found] == [1, 1], found
  for process in found:
    (line,) = process.errors
    assert "process 1 (" in line and "late: not at 'the test' within 5 s" in line


@pytest.mark.slow
def test_an_error_of_one_ends_all_and_is_told_by_all():
  """Long before any bound: the others hear of it."""
  started = time.monotonic()
  found = ends(
    """
if me == 1:
  raise ConfigError("data", "no.jsonl", "a file")
jax.jit(lambda x: x.sum())(sharding.shard_rows(np.ones(2), sharding.make_mesh()))
hosts.barrier("the test")
"""
  )
  assert [process.code for process in found] == [2, 2], found
  assert found[1].errors == ["error: --data=no.jsonl: must be a file"]
  assert found[0].errors[0].startswith("error: process 1 (") or found[0].errors == found[1].errors
  assert time.monotonic() - started < 300  # And not 600.


@pytest.mark.parametrize("killed", [0, 1])
@pytest.mark.slow
def test_the_death_of_one_ends_the_other_which_names_it(killed):
  """While it waits for a computation of both."""
  started = begin(
    """
mesh = sharding.make_mesh()
rows = sharding.shard_rows(np.ones(2), mesh)
total = jax.jit(lambda x: x.sum())
for step in range(10**6):
  total(rows).block_until_ready()
  if step == 3:
    os.write(2, b"computing\\n")
    time.sleep(1)
""",
    heartbeat=10,
  )
  for process in started:
    assert process.stderr.readline() == "computing\n"
  started[killed].kill()
  at = time.monotonic()
  survivor = processes.ended(started[1 - killed])
  seconds = time.monotonic() - at
  processes.ended(started[killed])
  assert survivor.code not in (0, None)
  (line,) = survivor.errors
  assert f"process {killed} (" in line and "lost" in line, line
  assert "Check failure stack trace" not in survivor.err, survivor.err
  print(f"{seconds:.1f} s: {line}")
  assert seconds < 60  # The bound, JAX's way of counting it, and a machine that is busy.


@pytest.mark.slow
def test_a_first_process_that_is_stopped_is_named():
  """It is there and takes connections, and never answers."""
  started = begin(
    """
for step in range(10**6):
  hosts.barrier(f"step {step}")
  if step == 3:
    os.write(2, b"computing\\n")
  time.sleep(0.1)
""",
    heartbeat=10,
    wait=15,
  )
  for process in started:
    assert process.stderr.readline() == "computing\n"
  started[0].send_signal(signal.SIGSTOP)
  survivor = processes.ended(started[1])
  started[0].kill()
  processes.ended(started[0])
  assert survivor.code not in (0, None)
  (line,) = survivor.errors
  assert line.startswith("error: process 0 (") and len(line) < 250, line


LISTENING = """
import os
inodes = {}
for table in ("tcp", "tcp6"):
  for line in open(f"/proc/self/net/{table}").read().splitlines()[1:]:
    address, state, inode = (line.split()[i] for i in (1, 3, 9))
    if state == "0A":
      inodes[f"socket:[{inode}]"] = address
places = [f"/proc/self/fd/{fd}" for fd in os.listdir("/proc/self/fd")]
own = [os.path.realpath(place).rpartition("/")[2] for place in places]
print(sorted(inodes[link] for link in own if link in inodes))
"""
LOOPBACK, ALL = "0" * 16 + "FFFF0000" + "0100007F", "0" * 32  # As IPv6 has them: gRPC's sockets.


@pytest.mark.parametrize(
  "coordinator, bind, address, said",
  mostly_slow(
    [
      ("127.0.0.1", "", LOOPBACK, False),
      ("192.0.2.1", "", ALL, True),
      ("192.0.2.1", "127.0.0.1", LOOPBACK, False),
    ],
    quick=[1, 2],
  ),
)
def test_the_first_process_listens_where_it_says(coordinator, bind, address, said):
  """One process alone: it meets itself at the address that it listens on."""
  port = processes.free_port()
  program = "\n".join(
    [
      "import jax",
      "from rl_llm.parallel import hosts",
      "kept = jax.distributed.initialize",
      # The address of others' networks leads nowhere here: it meets itself on loopback.
      f"jax.distributed.initialize = lambda at, *a, **k: kept('127.0.0.1:{port}', *a, **k)",
      f"hosts.initialize(coordinator='{coordinator}:{port}', processes=1, process_id=0,",
      f"                 bind='{bind}', wait=60)",
      LISTENING,
    ]
  )
  found = processes.ended(processes.start(["-c", program]))
  assert found.code == 0, found.err
  assert found.out.split("'")[1::2] == [f"{address}:{port:04X}"]
  line = f"{coordinator}:{port} is not an address of this machine: listening on all interfaces"
  assert (line in found.err) == said


def test_addresses_to_listen_on_are_checked():
  for coordinator in ("localhost", ":1234", "localhost:http", "localhost:0", "localhost:99999"):
    with pytest.raises(ConfigError, match="distributed.coordinator=.*HOST:PORT of process 0"):
      binding.bind_address(coordinator, "")
  with pytest.raises(ConfigError, match="distributed.bind=192.0.2.1: must be an address of this"):
    binding.bind_address("localhost:1234", "192.0.2.1")
  with pytest.raises(ConfigError, match="distributed.bind=.*given with --distributed.coordinator"):
    hosts.initialize(bind="127.0.0.1")
  assert binding.bind_address("[::1]:1234", "") in ("[::1]:1234", "[::]:1234")


@pytest.mark.slow
def test_a_process_that_never_comes_is_waited_for_no_longer_than_allowed():
  at = time.monotonic()
  program = PROGRAM.format(body="  pass", heartbeat=10, wait=4)
  alone = processes.ended(processes.start(["-c", program, 0, processes.free_port()]))
  assert alone.code != 0
  (line,) = alone.errors
  assert line.startswith("error: process 0 waited 4 s for all 2 processes at localhost:"), line
  assert "stack trace" not in alone.err
  assert time.monotonic() - at < 300


@pytest.mark.slow
def test_a_signal_to_one_stops_all_at_the_same_step():
  found = ends(
    """
with StopSignals() as stop:
  for step in range(100):
    print("step", step, flush=True)
    if me == 1 and step == 3:
      os.kill(os.getpid(), signal.SIGTERM)
      stop.check()  # Alone it continues.
    stop.check_together(f"step {step}")
"""
  )
  assert [process.code for process in found] == [128 + signal.SIGTERM] * 2, found
  assert found[0].out.splitlines()[-1] == "step 3"


@pytest.mark.slow
def test_slurm_says_who_belongs_together():
  """The five variables of an srun step, and no Slurm."""
  program = """
import sys
from rl_llm.parallel import hosts
hosts.initialize(heartbeat=20, wait=300)
sys.stderr.write(f"{hosts.all_gather('a test', hosts.index())} of {hosts.count()}\\n")
"""
  started = [
    processes.start(
      ["-c", program],
      SLURM_JOB_ID=str(processes.free_port()),
      SLURM_STEP_NODELIST="localhost",
      SLURM_NTASKS="2",
      SLURM_PROCID=str(me),
      SLURM_LOCALID=str(me),
      JAX_COORDINATOR_PORT=str(port),
    )
    for port in [processes.free_port()]
    for me in (0, 1)
  ]
  for process in map(processes.ended, started):
    assert process.code == 0, process
    assert "[0, 1] of 2" in process.err


def test_who_belongs_together_must_be_known():
  alone = processes.ended(
    processes.start(["-m", "experiments.grpo", "--model=tiny", "--task=copy", "--distributed"])
  )
  assert alone.code == 2
  (line,) = alone.errors
  assert line.startswith("error: --distributed.coordinator=: must be HOST:PORT of process 0"), line


@pytest.mark.parametrize(
  ("given", "message"),
  [
    ({"coordinator": "a:1"}, "--distributed.processes=0: must be given where the other two are"),
    ({"processes": 2}, "--distributed.process_id=-1: must be given"),
    ({"processes": 2, "process_id": 2, "coordinator": "a:1"}, "process_id=2: must be below"),
  ],
)
def test_half_of_the_flags_are_refused(given, message):
  with pytest.raises(ConfigError, match=message):
    hosts.initialize(**given)


def test_flags_without_the_switch_are_refused():
  assert Distributed().joined() is None
  assert Distributed(on=True).joined()["heartbeat"] == 100
  with pytest.raises(ConfigError, match="--distributed.processes=2: must be left out without"):
    Distributed(processes=2).joined()


def test_the_group_is_a_switch(capsys):
  """--distributed is --distributed.on."""

  @dataclasses.dataclass(frozen=True)
  class Config:
    distributed: Distributed = Distributed()

  with pytest.raises(SystemExit) as exit:
    run(lambda config: 10 + config.distributed.on, Config, argv=["x", "--distributed"])
  assert exit.value.code == 11


def test_last_words_pass_on_all_that_is_not_jax_s():
  """A line of JAX's that was not its last is shown after all."""
  complaint = "W1122 23:48:33.449304   24548 preemption_sync_manager.cc:147] Failed to retrieve\n"
  code = f"""
import subprocess, sys, time
command = [sys.executable, "-I", "-S", {stderr_filter.__file__!r}, '{{"process": 0}}']
child = subprocess.Popen(command, stdin=subprocess.PIPE)
for part in ("one\\ntw", "o\\n", {complaint!r}, "more of it\\n"):
  child.stdin.write(part.encode()); child.stdin.flush(); time.sleep(0.2)
time.sleep(3)
child.stdin.write(b"three, without an end"); child.stdin.close(); child.wait()
"""
  found = processes.ended(processes.start(["-c", code]))
  assert found.out == f"one\ntwo\n{complaint}more of it\nthree, without an end"


def test_last_words_that_come_slowly_are_one_line_all_the_same():
  """A machine that is busy may take seconds between two halves of JAX's last line."""
  fatal = "F1122 23:48:33.449304   24548 client.h:88] Terminating process because the JAX distribut"
  rest = "ed service detected: RegisterTask\n*** Check failure stack trace: ***\n    @ 0x7f8d95e4\n"
  code = f"""
import subprocess, sys, time
known = '{{"process": 1, "processes": 2, "wait": 5, "coordinator": "here:1"}}'
child = subprocess.Popen([sys.executable, "-I", "-S", {stderr_filter.__file__!r}, known],
                         stdin=subprocess.PIPE)
for part in ("working\\n", {fatal!r}, {rest!r}):
  child.stdin.write(part.encode()); child.stdin.flush(); time.sleep(2.5)
child.stdin.close(); child.wait()
"""
  found = processes.ended(processes.start(["-c", code]))
  lines = found.out.splitlines()
  assert lines, found.err
  assert lines[0] == "working" and len(lines) == 2
  assert lines[1].startswith("error: process 1 waited 5 s for all 2 processes at here:1")


def test_fetch_gives_what_it_was_given():
  tree = {"a": jax.numpy.arange(3), "b": np.ones(2), "c": None, "d": 1.5}
  found = sharding.gather_to_host(tree)
  assert isinstance(found["a"], np.ndarray) and found["a"].tolist() == [0, 1, 2]
  assert found["c"] is None and found["d"] == 1.5
