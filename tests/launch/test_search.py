"""Search by Optuna: what it is told, that nothing is run twice, that a killed search resumes."""

from __future__ import annotations

import json
import random
import re
import statistics
import sys

import pytest

from launch import run, state
from launch.search import Search, Study
from launch.sweep import SweepError
from rl_llm.errors import ConfigError
from rl_llm.files import locked
from rl_llm.runs.config import replace
from tests.launch.test_local import ROOT, Sweep, wait_for

optuna = pytest.importorskip("optuna")

METRIC = "eval/sampled_accuracy"
RATE = '{"optimizer.learning_rate": trial.suggest_float("rate", 0.01, 1.0)}'


def spec(path, returned=RATE):
  """A file whose trials of the stand-in have these flags besides."""
  file = path / "mine.py"
  file.write_text(
    'EXPERIMENT = "tests.launch.standin"\n'
    f"def search(trial):\n  return {returned} | {{'journal': {str(path / 'journal')!r}}}\n"
  )
  return str(file)


class Killed(Exception):
  pass


class Machine:
  """Runs trials one at a time by writing what `value` says of their settings; None is a failure."""

  def __init__(self, workdir, value):
    self.workdir, self.value, self.started, self.kill_at = workdir, value, [], None

  def __call__(self, trials, *, names, more, hopeless):
    verdicts, waiting = {}, list(trials)
    while waiting := waiting or more(verdicts):
      trial = waiting.pop(0)
      assert trial.id in names
      if not (self.workdir / trial.id / "result.json").exists():
        if len(self.started) == self.kill_at:
          raise Killed
        self.started.append(trial.id)
      verdicts[trial.id] = self.result(trial)
    return verdicts

  def result(self, trial):
    value = self.value(trial.config["optimizer.learning_rate"])
    (self.workdir / trial.id).mkdir(exist_ok=True)
    if value is None:
      return "failed"
    result = {"steps": trial.steps, "after": {METRIC: value}}
    state.write_json(self.workdir / trial.id / "result.json", result)
    return "done"


def square(rate):
  return -((rate - 0.3) ** 2)


def asked(workdir):
  """The values that were asked for, in order."""
  return [each["params"] for each in state.read_json(workdir / "search.json")["asked"]]


def search(tmp_path, value, **options):
  """A whole search, and the machine that ran it."""
  workdir = tmp_path / "work"
  machine = Machine(workdir, value)
  verdicts = Study(Search(**options), spec(tmp_path), workdir).run(machine)
  return workdir, machine, verdicts


@pytest.mark.parametrize("lowest", [False, True])
def test_it_asks_for_what_optuna_would_ask_for(tmp_path, lowest):
  """The same as a loop without files, failures and all; and it finds the peak."""

  def value(rate):
    return None if rate > 0.9 else -square(rate) if lowest else square(rate)

  workdir, _, verdicts = search(tmp_path, value, trials=30, seed=5, lowest=lowest)
  study = optuna.create_study(direction="minimize" if lowest else "maximize")
  rates = []
  for number in range(30):
    study.sampler = optuna.samplers.TPESampler(seed=random.Random(f"5/{number}").getrandbits(32))
    trial = study.ask()
    rates.append(trial.suggest_float("rate", 0.01, 1.0))
    found = value(rates[-1])
    failed = optuna.trial.TrialState.PRUNED if found is None else None
    study.tell(trial, found, state=failed)
  assert asked(workdir) == [{"rate": rate} for rate in rates]
  assert sorted(verdicts.values()).count("failed") == sum(rate > 0.9 for rate in rates) > 0

  distances = [abs(rate - 0.3) for rate in rates]
  assert statistics.fmean(distances[10:]) < 0.6 * statistics.fmean(distances[:10])  # 10 at random
  assert sum(rate > 0.9 for rate in rates[10:]) <= 1, "it went on to ask for what fails"


def test_a_search_killed_again_and_again_asks_for_the_same(tmp_path):
  straight = search(tmp_path, square, trials=14)[0]
  (tmp_path / "killed").mkdir()
  workdir = tmp_path / "killed" / "work"
  machine = Machine(workdir, square)
  for kill_at in (0, 1, 2, 7, 12, 13, None):
    machine.kill_at = kill_at
    study = Study(Search(trials=14), spec(tmp_path), workdir)
    try:
      study.run(machine)
    except Killed:
      assert len(asked(workdir)) == kill_at + 1
  assert asked(workdir) == asked(straight)
  assert len(machine.started) == len(set(machine.started)) == 14
  # More trials continue it, and do not change what there was.
  Study(Search(trials=16), spec(tmp_path), workdir).run(machine)
  assert asked(workdir)[:14] == asked(straight) and len(machine.started) == 16


def test_what_is_asked_for_twice_is_run_once(tmp_path):
  file = spec(tmp_path, '{"optimizer.learning_rate": trial.suggest_categorical("x", [0.2, 0.4])}')
  machine = Machine(tmp_path / "work", square)
  verdicts = Study(Search(trials=8), file, tmp_path / "work").run(machine)
  assert len(asked(tmp_path / "work")) == 8 and len(machine.started) == 2
  assert set(verdicts.values()) == {"done"}


def test_what_is_hopeless_against_a_loop(tmp_path):
  """The best so far is below the median of what the finished ones had at this step."""
  outcomes = []
  for seed in range(20):
    (tmp_path / str(seed)).mkdir()
    judged, expected = hopeless_or_not(tmp_path / str(seed), seed)
    assert judged == {"hopeless": expected, "again": expected}, seed
    outcomes.append(expected)
  assert 3 < sum(outcomes) < 17, "both must occur, or nothing was tested"


def hopeless_or_not(path, seed):
  """What a search says of a trial that runs next to finished ones, and what a loop says."""
  draws = random.Random(seed)
  lowest = seed % 2 == 1
  finished, reached, begin = draws.randint(3, 9), draws.randint(0, 4), draws.randint(0, 2)
  curves = [[draws.random() for _ in range(5)] for _ in range(finished)]
  handicap = draws.choice([0, 0.8]) * (1 if lowest else -1)  # Or the best so far is seldom poor.
  curves.append([draws.random() + handicap for _ in range(reached + 1)])
  workdir = path / "work"

  def drive(trials, *, names, more, hopeless):
    verdicts = {}
    for curve in curves:
      (trial,) = trials or more(verdicts)
      trials = []
      (workdir / trial.id).mkdir()
      rows = [{"step": step, METRIC: y, "loss": 1.0} for step, y in enumerate(curve)]
      rows.append({"step": len(curve), "loss": 1.0})  # Not each row has it.
      record = "".join(json.dumps(row) + "\n" for row in rows)
      (workdir / trial.id / "metrics.jsonl").write_text(record + '{"step": 9, "eva')
      if curve is curves[-1]:
        return {"hopeless": hopeless(trial), "again": hopeless(trial)}
      state.write_json(
        workdir / trial.id / "result.json", {"steps": trial.steps, "after": {METRIC: curve[-1]}}
      )
      verdicts[trial.id] = "done"

  options = Search(trials=20, prune_from=begin, lowest=lowest)
  judged = Study(options, spec(path), workdir).run(drive)
  sign = -1 if lowest else 1
  median = statistics.median(curve[reached] for curve in curves[:-1])
  worse = max(sign * y for y in curves[-1]) < sign * median
  return judged, bool(begin) and finished >= 5 and reached >= begin and worse


@pytest.mark.slow
def test_a_search_that_prunes_killed_in_the_middle(tmp_path):
  """Five good trials that are quick, a bad one that is slow, and a good one."""
  sweep = Sweep(tmp_path)
  (tmp_path / "spec.py").write_text(
    'EXPERIMENT = "tests.launch.standin"\n'
    "def search(trial):\n"
    "  rate = trial.suggest_float('rate', 0.1, 0.9)\n"
    "  bad = trial.number == 5\n"
    "  return {'optimizer.learning_rate': 0.01 if bad else rate, 'steps': 60,\n"
    f"          'seconds': 0.5 if bad else 0.0, 'journal': {str(sweep.journal)!r}}}\n"
  )
  flags = ("--search.trials=7", "--search.prune_from=2", "--parallel=2")

  def bad():
    found = [
      path
      for path in sweep.workdir.glob("*/trial.json")
      if json.loads(path.read_text())["settings"]["optimizer.learning_rate"] == 0.01
    ]
    return found[0].parent if found else tmp_path

  launcher = sweep.start(*flags)
  wait_for(lambda: state.last_row(bad()) or launcher.poll() is not None, "the bad one to begin")
  assert launcher.poll() is None, sweep.output()
  launcher.kill()
  launcher.wait()
  begun = asked(sweep.workdir)
  assert not (bad() / "result.json").exists() and len(begun) >= 6

  code, said = sweep.run(*flags)
  assert code == 0 and "7 trials: 6 done, 1 pruned" in said, said
  assert asked(sweep.workdir)[: len(begun)] == begun
  assert state.read_json(bad() / "status.json")["status"] == "pruned"
  assert not (bad() / "result.json").exists() and state.last_row(bad())["step"] < 59
  for trial, lines in sweep.events().items():
    if trial != bad().name:
      steps = [number for _, event, number in lines if event == "step"]
      assert steps == list(range(60)) or len(steps) > 60 and sorted(set(steps)) == list(range(60))
      assert [event for _, event, _ in lines].count("done") == 1
  assert {row["status"] for row in sweep.table()} == {"done", "pruned"}

  lines = sweep.lines()
  code, said = sweep.run(*flags)
  assert code == 0 and "7 trials: 6 done, 1 pruned" in said and sweep.lines() == lines


def test_the_example_of_the_guide(tmp_path):
  text = (ROOT / "launch" / "README.md").read_text()
  (program,) = re.findall(r"```python\n# mine_search.py\n(.*?)```", text, flags=re.DOTALL)
  (tmp_path / "mine_search.py").write_text(program)
  study = Study(Search(trials=20), str(tmp_path / "mine_search.py"), tmp_path / "work")
  (trial,) = study.trials.values()
  assert trial.config["model"] == "tiny" and 0.05 <= trial.config["loss.clip_high"] <= 0.5


def test_what_cannot_be(tmp_path, monkeypatch):
  file = spec(tmp_path)

  def check(changes, says):
    with pytest.raises(ConfigError, match=says):
      run.check(replace(run.Config(), {"sweep": file, "search.trials": 3} | changes))

  check({"only": ["a"]}, "--only=a: must be left out with --search.trials=3")
  check({"halving.steps": [1, 2]}, "--halving.steps=1,2: must be left out with --search.trials")
  check({"backend": "slurm"}, "--search.trials=3: must be left out with --backend=slurm")
  check({"backend": "tpu", "search.prune_from": 5}, "--search.prune_from=5: must be left out with")

  workdir = tmp_path / "work"
  study = Study(Search(trials=3), file, workdir)
  workdir.mkdir()
  with locked(workdir / ".search.lock"):
    with pytest.raises(ConfigError, match="of a search that no other launcher leads"):
      study.run(Machine(workdir, square))
  study.run(Machine(workdir, square))
  spec(tmp_path, RATE.replace("rate", "rate") + ' | {"seed": 7}')
  with pytest.raises(ConfigError, match="of {'rate': .*} it now makes another trial"):
    Study(Search(trials=3), file, workdir)
  spec(tmp_path, RATE.replace("optimizer.l", "optimizer.L"))
  with pytest.raises(SweepError, match="mine.py, trial 1: .*did you mean optimizer.learning_rate"):
    Study(Search(trials=3), file, tmp_path / "new")
  (tmp_path / "mine.py").write_text('EXPERIMENT = "tests.launch.standin"\n')
  with pytest.raises(SweepError, match="must have a function search()"):
    Study(Search(trials=3), file, tmp_path / "new")
  monkeypatch.setitem(sys.modules, "optuna", None)
  with pytest.raises(ConfigError, match=r"search.trials.*pip install 'rl_llm\[optuna\]'"):
    Study(Search(trials=3), file, tmp_path / "new")
