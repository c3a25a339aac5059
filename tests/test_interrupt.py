"""A signal is remembered and acted on at a check; the second one is as if we were not there."""

from __future__ import annotations

import os
import signal

import pytest

from rl_llm.runs.signals import Interrupted, StopSignals

BOTH = [signal.SIGINT, signal.SIGTERM]


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
