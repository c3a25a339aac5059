"""The report while a run trains, and the last line of its terminal."""

import io
import json

import pytest

from rl_llm.evaluation import Evaluation
from rl_llm.runs.console import Console
from rl_llm.runs.metrics import PhaseClock
from rl_llm.runs.run_directory import Run
from rl_llm.training import loop


def run_in(directory):
  return Run(directory, Console(io.StringIO(), total_steps=40), stop=None)


def evaluated(number, accuracy):
  ends = dict.fromkeys(("accuracy", "low", "high"), accuracy)
  metrics = {f"eval/greedy_{end}": value for end, value in ends.items()}
  return loop.Step(number, PhaseClock(), Evaluation(metrics, []))


def report_of(directory):
  return (directory / "report.html").read_text(encoding="utf-8")


def test_each_evaluation_writes_the_page_anew_and_the_end_makes_it_final(tmp_path, monkeypatch):
  monkeypatch.setattr(loop, "MAY_TAKE", 1e9)  # However slow this machine is.
  with loop.open_record(run_in(tmp_path), 0, samples_every=0, max_skipped=3) as record:
    for number, accuracy in ((0, 0.125), (20, 0.5)):
      record(evaluated(number, accuracy))
      page = report_of(tmp_path)
      assert 'http-equiv="refresh"' in page and f"at step {number}" in page
      assert f"{100 * accuracy:.0f}%" in page
    record(loop.Step(21, PhaseClock()))
    assert "at step 20" in report_of(tmp_path), "a step without an evaluation writes no page"
  assert 'http-equiv="refresh"' not in report_of(tmp_path)


def test_a_run_that_breaks_off_leaves_a_final_page(tmp_path):
  with pytest.raises(loop.Interrupted):
    with loop.open_record(run_in(tmp_path), 0, samples_every=0, max_skipped=3) as record:
      record(evaluated(0, 0.1))
      raise loop.Interrupted(15)
  assert 'http-equiv="refresh"' not in report_of(tmp_path)


def test_a_run_that_ends_before_its_first_line_writes_no_page(tmp_path):
  with loop.open_record(run_in(tmp_path), 0, samples_every=0, max_skipped=3):
    pass
  assert not (tmp_path / "report.html").exists()


def test_a_slow_report_is_left_out_until_enough_time_has_passed(tmp_path, monkeypatch):
  """One second of writing is allowed after 20 seconds of training."""
  now, written = [0.0], []

  def write(directory, *, live):
    written.append((now[0], live))
    now[0] += 1.0

  (tmp_path / "metrics.jsonl").write_text('{"step": 0}\n')
  monkeypatch.setattr(loop.time, "monotonic", lambda: now[0])
  monkeypatch.setattr(loop, "write_report", write)
  report = loop.reporter(run_in(tmp_path))
  for at in (0.0, 10.0, 20.0, 21.5):
    now[0] = at
    report(live=True)
  assert written == [(0.0, True), (21.5, True)]
  report(live=False)
  assert written[-1] == (22.5, False), "the final one is always written"


def finished(directory, reward):
  """A record of 40 steps, and what the terminal shows at its end."""
  (directory / "config.json").write_text(json.dumps({"steps": 40, "task": "copy"}))
  rows = [
    {"step": step, "reward_mean": reward(step), "frac_zero_std": float(reward(39) == 0)}
    | {"accuracy": reward(step), "time/step": 1.0}
    for step in range(40)
  ]
  (directory / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
  (directory / "samples.jsonl").write_text("")
  run = run_in(directory)
  loop.show_result(run.console, directory, loop.summary(rows))
  return run.console._stream.getvalue().splitlines()


def test_the_line_after_the_report_is_what_the_run_says_or_what_to_do_next(tmp_path):
  for name in ("good", "bad"):
    (tmp_path / name).mkdir()
  good = finished(tmp_path / "good", lambda step: step / 40)
  assert good[-2] == f"report: {tmp_path / 'good' / 'report.html'}"
  assert good[-1].startswith("next: python -m rl_llm report ")
  bad = finished(tmp_path / "bad", lambda step: 0.0)
  assert bad[-2] == f"report: {tmp_path / 'bad' / 'report.html'}"
  assert bad[-1].startswith("No response was ever rewarded") and "--task=copy" in bad[-1]
