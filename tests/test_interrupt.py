"""A signal is remembered and acted on at a check; the second one is as if we were not there."""

from __future__ import annotations

import os
import signal
import sys

import pytest

from rl_llm.runs.signals import Interrupted, StopSignals

BOTH = [signal.SIGINT, signal.SIGTERM, signal.SIGHUP]


@pytest.fixture(autouse=True)
def earlier():
  """Handlers that were there before, and the signals that reach them."""
  received = []
  before = {signum: signal.signal(signum, lambda s, _: received.append(s)) for signum in BOTH}
  yield received
  for signum, handler in before.items():
    signal.signal(signum, handler)


@pytest.mark.parametrize("signum", BOTH)
def test_a_signal_waits_for_the_next_check(earlier, signum):
  with StopSignals() as stop:
    stop.check()
    os.kill(os.getpid(), signum)  # nothing is raised here
    with pytest.raises(Interrupted, match=signum.name) as caught:
      stop.check()
    assert caught.value.signum == signum
  assert earlier == []


@pytest.mark.parametrize("second", BOTH)
@pytest.mark.parametrize("first", BOTH)
def test_a_second_signal_does_what_it_did_before(earlier, first, second):
  with StopSignals() as stop:
    os.kill(os.getpid(), first)
    os.kill(os.getpid(), second)
    assert earlier == [second]
    with pytest.raises(Interrupted, match=first.name):
      stop.check()


@pytest.mark.parametrize("signum", BOTH)
def test_handlers_are_put_back_also_after_an_error(earlier, signum):
  with pytest.raises(KeyError), StopSignals():
    raise KeyError
  os.kill(os.getpid(), signum)
  assert earlier == [signum]


def test_a_context_can_be_entered_again(earlier):
  for _ in range(2):
    with StopSignals() as stop:
      stop.check()
      os.kill(os.getpid(), signal.SIGTERM)
      with pytest.raises(Interrupted):
        stop.check()
  assert earlier == []


def test_a_hangup_that_nohup_ignores_stays_ignored():
  signal.signal(signal.SIGHUP, signal.SIG_IGN)
  with StopSignals() as stop:
    os.kill(os.getpid(), signal.SIGHUP)
    stop.check()
  assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN


HUNG_UP = """
import pathlib, sys, time
from rl_llm.runs.signals import Interrupted, StopSignals
with StopSignals() as stop:
  try:
    while True:
      print("step", flush=True)
      stop.check()
      time.sleep(0.02)
  except Interrupted as interruption:
    print("saving", flush=True)
    print("saved", file=sys.stderr, flush=True)
    pathlib.Path(sys.argv[1]).write_text(str(interruption.signum))
"""


def test_a_terminal_that_closes_lets_a_run_save(tmp_path):
  """What it prints then goes nowhere, and is no error before the save."""
  pid, terminal = os.forkpty()
  if not pid:
    os.execv(sys.executable, [sys.executable, "-c", HUNG_UP, str(tmp_path / "saved")])
  seen = b""
  while b"step" not in seen:
    seen += os.read(terminal, 100)
  os.close(terminal)
  assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
  assert (tmp_path / "saved").read_text() == str(int(signal.SIGHUP))
