"""What a person sees: literal, whole, 80 columns wide, there after an interruption."""

from __future__ import annotations

import doctest
import io
import os
import pty
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.cells import cell_len

from rl_llm.runs import console as console_lib
from rl_llm.runs import formatting
from rl_llm.runs.console import Console, telling
from rl_llm.runs.formatting import printable
from tests.processes import PATIENCE

ROOT = str(Path(console_lib.__file__).parents[1])


class Terminal(io.StringIO):
  encoding = "utf-8"

  def isatty(self):
    return True


def shown(show, *, stream=None, total_steps=10):
  stream = io.StringIO() if stream is None else stream
  with Console(stream, total_steps=total_steps) as console:
    show(console)
  return stream.getvalue()


def sample(**changes):
  row = {
    "prompt": "What is 2 + 2?",
    "response": "4",
    "reward": 1.0,
    "advantage": 0.5,
    "status": "ok",
  }
  return row | changes


METRICS = {
  "reward_mean": 0.5312,
  "accuracy": 0.61,
  "response_length_mean": 7.25,
  "entropy": 0.312,
  "time/step": 2.0,
}


def test_doctests():
  assert doctest.testmod(formatting).failed == doctest.testmod(console_lib).failed == 0


def test_a_step_is_one_plain_line_where_there_is_no_terminal():
  out = shown(lambda c: c.step(3, METRICS))
  assert out == "step 3/10 reward 0.53 accuracy 0.61 length 7.25 entropy 0.31 2s/step ETA 14s\n"


def test_figures_a_step_lacks_are_left_out():
  assert (
    shown(lambda c: c.step(3, {"entropy": None, "reward_mean": "nan"})) == "step 3/10 reward nan\n"
  )


def test_a_step_of_a_long_run_fits_80_columns():
  metrics = METRICS | {"response_length_mean": 123.4, "time/step": 12.34}
  out = shown(lambda c: c.step(123, metrics), total_steps=999)
  assert max(map(len, out.splitlines())) <= 80


def test_the_time_left_follows_the_last_ten_steps():
  def show(console):
    for step in range(1, 21):
      console.step(step, {"time/step": 100.0 if step <= 10 else 3.0})

  assert shown(show, total_steps=40).splitlines()[-1] == "step 20/40 3s/step ETA 60s"


def test_an_evaluated_step_says_its_accuracies_with_their_intervals():
  metrics = {"eval/sampled_accuracy": 0.81, "eval/sampled_low": 0.771, "eval/sampled_high": 0.85}
  out = shown(lambda c: c.evaluation(0, metrics))
  assert out.startswith("step 0 held-out accuracy, sampled: 0.81 (95% 0.77 to 0.85)\n")
  assert "greedy" not in out


HOSTILE = [
  "[red]bold[/red]",
  "[link=file:///etc/passwd]x[/link]",
  ":smile: `a` **b**",
  "\x1b[2J\x1b]0;title\x07",
  "\x9b31m",
  "\u202egnirts\u200b",
  "a\r\nb\tc\x00",
  "\ud800",
]


@pytest.mark.parametrize("terminal", [False, True])
@pytest.mark.parametrize("text", HOSTILE)
def test_model_text_is_shown_literally_and_acts_on_nothing(text, terminal):
  out = shown(
    lambda c: (c.samples(1, [sample(response=text)]), c.say(text)),
    stream=Terminal() if terminal else None,
  )
  expected = {
    "\x1b[2J\x1b]0;title\x07": r"\x1b[2J\x1b]0;title\x07",
    "\x9b31m": r"\x9b31m",
    "\u202egnirts\u200b": r"\u202egnirts\u200b",
    "a\r\nb\tc\x00": r"a\r\nb\tc\x00",
    "\ud800": r"\ud800",
  }.get(text, text)
  assert expected.split("\\n")[0] in out
  # Whatever remains of terminal control is what the display itself sends: colours, lines, cursor.
  rest = re.sub(r"\x1b\[(\?25[lh]|[0-9;]*[mAK])", "", out) if terminal else out
  assert not re.search(r"[\x00-\x09\x0b\x0c\x0e-\x1f\x7f-\x9f\u202e\u200b\ud800]", rest)
  rest.encode("utf-8")


@settings(max_examples=25, deadline=None)
@given(
  text=st.text(st.characters(exclude_categories=()), max_size=400), prompt=st.text(max_size=100)
)
def test_no_text_makes_a_table_wider_than_80_columns(text, prompt):
  rows = [sample(response=text, prompt=prompt), sample(reward=None, status="timed out")]
  out = shown(lambda c: c.samples(1, rows))
  assert max(cell_len(line) for line in out.split("\n")) <= 80
  assert "timed out" in out


def test_a_long_text_loses_its_middle():
  text = "question " + "x" * 5000 + " answer"
  cut = printable(text, limit=60)
  assert (
    len(cut) == 60 and cut.startswith("question") and cut.endswith(" answer") and " ... " in cut
  )
  assert len(shown(lambda c: c.samples(1, [sample(prompt=text, response=text)]))) < 3000


def test_samples_show_at_most_the_count_asked_for():
  out = shown(lambda c: c.samples(7, [sample(response=f"answer{i}") for i in range(9)], count=2))
  assert "samples of step 7" in out and "answer1" in out and "answer2" not in out


def test_samples_show_the_group_whose_rewards_differ_by_its_best_and_its_worst():
  def group(problem, rewards):
    rows = [{"problem": problem, "response": f"{problem}{i}"} for i in range(len(rewards))]
    return [row | {"reward": reward} for row, reward in zip(rows, rewards, strict=True)]

  rows = [*group("a", [0, 0, 0, 0]), *group("b", [1, None, 0, 0.5, 1]), *group("c", [0, 1])]

  def named(count):
    return [row["response"] for row in telling(rows, count=count)]

  assert named(4) == ["b0", "b1", "b2", "b4"]  # 1, failed, 0 and 1; in their order.
  assert named(1) == ["b0"] and named(0) == []
  assert named(7) == ["b0", "b1", "b2", "b3", "b4", "c0", "c1"]
  assert named(9) == [*named(7), "a0", "a1"]
  assert named(99) == [*named(7), "a0", "a1", "a2", "a3"]
  out = shown(lambda c: c.samples(1, [sample(prompt="p", **row) for row in rows]))
  assert "b0" in out and "a0" not in out


def test_credentials_are_redacted():
  secret = "hf_" + "a1B2" * 8
  out = shown(
    lambda c: (c.say(secret), c.samples(1, [sample(response=secret)]), c.sizes({secret: 1}))
  )
  assert secret not in out and out.count("[redacted]") == 3


def test_sizes_align():
  out = shown(lambda c: c.sizes({"problems per step": 8, "microbatch": 16}))
  assert out == "  problems per step  8\n  microbatch         16\n"


def test_a_stream_that_is_not_utf8_gets_escapes_instead_of_an_error():
  raw = io.BytesIO()
  stream = io.TextIOWrapper(raw, encoding="ascii")
  with Console(stream, total_steps=3) as console:
    console.say("naïve")
    console.samples(1, [sample(response="日本")])
    console.step(1, METRICS)
  text = raw.getvalue().decode("ascii")
  assert r"na\xefve" in text and r"\u65e5\u672c" in text


def test_a_terminal_shows_a_bar_with_the_latest_figures_and_gets_its_cursor_back():
  stream = Terminal()
  with pytest.raises(KeyboardInterrupt):
    with Console(stream, total_steps=10) as console:
      console.say("compiling")
      console.step(4, METRICS)
      raise KeyboardInterrupt
  out = re.sub(r"\x1b\[[0-9;]*m", "", stream.getvalue())
  assert "compiling" in out and "step 4/10" in out.rsplit("step 0/10")[-1]
  assert "reward 0.53" in out and out.rindex("\x1b[?25h") > out.rindex("\x1b[?25l")


PROGRAM = """
import os, signal, sys
from rl_llm.runs.console import Console, telling
with Console(total_steps=5) as console:
  for step in range(1, 4):
    console.step(step, {"reward_mean": 0.5})
  console.say("last words")
  os.kill(os.getpid(), int(sys.argv[1]))
"""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL])
def test_nothing_is_lost_when_the_run_is_stopped(number):
  args = [sys.executable, "-c", PROGRAM, str(int(number))]
  done = subprocess.run(
    args, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": ROOT}
  )
  assert done.stdout.splitlines() == [f"step {i}/5 reward 0.5" for i in (1, 2, 3)] + ["last words"]


def test_nothing_is_lost_on_a_real_terminal_either():
  main, other = pty.openpty()
  args = [sys.executable, "-c", PROGRAM, str(int(signal.SIGINT))]
  env = {**os.environ, "PYTHONPATH": ROOT, "TERM": "xterm", "COLUMNS": "80", "LINES": "24"}
  process = subprocess.Popen(args, stdout=other, stderr=subprocess.DEVNULL, env=env)
  os.close(other)
  out = b""
  while True:
    try:
      chunk = os.read(main, 4096)
    except OSError:  # what reading a terminal gives once its last writer is gone
      break
    if not chunk:
      break
    out += chunk
  os.close(main)
  process.wait()
  text = re.sub(r"\x1b\[[0-9;]*m", "", out.decode())
  assert "last words" in text and "step 3/5" in text and "reward 0.5" in text
  assert text.rindex("\x1b[?25h") > text.rindex("\x1b[?25l")


def test_a_compilation_says_how_long_it_has_taken_so_far():
  stream = io.StringIO()
  with Console(stream, total_steps=5) as console:
    with console.timed("compiling", every=0.05):
      until = time.monotonic() + PATIENCE
      while stream.getvalue().count("\n") < 3 and time.monotonic() < until:
        time.sleep(0.01)
    before = stream.getvalue()
    with console.timed("compiling", every=0.05):
      time.sleep(0.15)
  first, *others = before.splitlines()
  assert first == "compiling" and len(others) >= 2
  assert all(re.fullmatch(r"compiling: \d+s so far", line) for line in others)
  assert stream.getvalue() == before, "once: it is not compiled again"


def test_on_a_terminal_the_time_counts_up_while_it_compiles(monkeypatch):
  stream, now = Terminal(), [100.0]
  monkeypatch.setattr("rl_llm.runs.console.time.monotonic", lambda: now[0])
  with Console(stream, total_steps=5) as console:
    console.step(1, {"reward_mean": 0.25})
    with console.timed("compiling [x]"):
      now[0] += 41
      console._live.refresh()
    during = len(stream.getvalue())
    console._live.refresh()
  assert "compiling [x]: 41s" in stream.getvalue()[:during]
  assert "reward 0.25" in stream.getvalue()[during:], "the figures are back"


def test_what_fails_while_it_is_timed_ends_the_clock():
  stream = io.StringIO()
  with Console(stream, total_steps=5) as console:
    with pytest.raises(ValueError):
      with console.timed("compiling", every=0.02):
        raise ValueError
    said = stream.getvalue()
    time.sleep(0.1)
  assert stream.getvalue() == said
