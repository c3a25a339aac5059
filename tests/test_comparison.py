"""Runs on one page: their differences, with intervals that hold what they promise."""

import itertools
import json
import math
import re
import shutil

import pytest

from rl_llm.__main__ import main
from rl_llm.errors import UserError
from rl_llm.runs.comparison import paired_difference, unpaired_difference, write_comparison
from rl_llm.runs.metrics import proportion_interval
from tests.test_report import Checker, fake_run, figures


def test_newcombe_is_as_published():
  """His example: 56 of 70 against 48 of 80, method 10: 0.0524 to 0.3339."""
  ends = [proportion_interval([1] * k + [0] * (n - k), 1) for k, n in ((48, 80), (56, 70))]
  found = unpaired_difference(*ends)
  assert found == pytest.approx((0.2, 0.0524, 0.3339), abs=1e-4)


@pytest.mark.parametrize("b, c", [(0.05, 0.05), (0.3, 0.1), (0.02, 0.0), (0.5, 0.0)])
def test_the_paired_interval_holds_the_truth_often_enough(b, c):
  """Exactly, over all outcomes of 25 problems: b is solved by the second alone, c by the first."""
  n, held = 25, 0.0
  for gained, lost in itertools.product(range(n + 1), repeat=2):
    if gained + lost <= n:
      rest = n - gained - lost
      ways = math.factorial(n) // (
        math.factorial(gained) * math.factorial(lost) * math.factorial(rest)
      )
      before, after = [0] * gained + [1] * lost + [1] * rest, [1] * gained + [0] * lost + [1] * rest
      difference, low, high = paired_difference(before, after)
      assert low <= difference <= high and difference == (gained - lost) / n
      held += ways * b**gained * c**lost * (1 - b - c) ** rest * (low <= b - c <= high)
  assert 0.93 <= held <= 1


def test_the_same_answers_are_no_difference_and_not_a_certain_one():
  difference, low, high = paired_difference([1, 0, 1], [1, 0, 1])
  assert difference == 0 and low < 0 < high
  with pytest.raises(ValueError, match="at least one problem"):
    paired_difference([], [])


def change(folder, **settings):
  config = json.loads((folder / "config.json").read_text())
  (folder / "config.json").write_text(json.dumps(config | settings))


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
  root = tmp_path_factory.mktemp("runs")
  folders = [fake_run(root / name, steps=12, every=6) for name in ("a", "b<i>", "c")]
  change(folders[1], learning_rate=3e-4, workdir="elsewhere")
  change(folders[2], model="other")
  return folders


def test_curves_lie_over_one_another_with_a_legend(runs):
  page = write_comparison(runs).read_text(encoding="utf-8")
  Checker(page)
  drawn = figures(page)
  assert {"Held-out accuracy: sampled", "Reward: reward", "Entropy"} <= {*drawn}
  assert len(list(drawn["Entropy"].iter("polyline"))) == 3
  assert [key.text for key in drawn["Entropy"].iter("span")] == ["a", "b<i>", "c"]
  assert "MFU of the update" not in drawn  # It changes in no run.


def test_a_curve_under_another_one_shows_between_its_dashes(runs, tmp_path):
  shutil.copytree(runs[0], tmp_path / "again")
  page = write_comparison([runs[0], tmp_path / "again"], tmp_path / "x.html").read_text()
  lines = list(figures(page)["Entropy"].iter("polyline"))
  assert [line.get("class") for line in lines] == ["line s0", "line dashed s1"]


def test_the_table_of_settings_has_those_that_differ_and_no_other(runs):
  page = write_comparison(runs).read_text(encoding="utf-8")
  (section,) = re.findall("<h2>Settings that differ</h2>.*?</section>", page, re.S)
  lines = [re.findall("<td>(.*?)</td>", line) for line in re.findall("<tr>(.*?)</tr>", section)]
  assert lines[1:] == [
    ["model", "smollm2", "smollm2", "other"],
    ["learning_rate", "0.0001", "0.0003", "0.0001"],
  ]


def test_a_setting_that_only_some_runs_know_is_named_and_is_no_difference(tmp_path):
  """A run of an older version has no such setting, and it may be at the default elsewhere."""
  paths = [answers(tmp_path / name, [1, 0]) for name in "ab"]
  for path, more in zip(paths, ({"env": "", "data": ""}, {"data": "x.jsonl"}), strict=True):
    (path / "config.json").write_text(json.dumps({"seed": 0} | more))
  page = write_comparison(paths).read_text(encoding="utf-8")
  (section,) = re.findall("<h2>Settings that differ</h2>.*?</section>", page, re.S)
  assert re.findall("<td>(.*?)</td>", section) == ["data", "(empty)", "x.jsonl"]
  assert "Not every run knows these settings" in section and "wrote it: env.</p>" in section


def answers(folder, correct, step=9):
  """A run whose newest greedy answers are these."""
  folder.mkdir()
  mean, low, high = proportion_interval(correct, 1)
  ends = {"accuracy": mean, "low": low, "high": high}
  row = {f"eval/{how}_{end}": x for how in ("sampled", "greedy") for end, x in ends.items()}
  lines = [
    {"step": s, "split": "eval", "problem": i, "prompt": "", "response": "", "correct": bool(x)}
    for s, found in ((0, [0] * len(correct)), (step, correct))
    for i, x in enumerate(found)
  ]
  (folder / "metrics.jsonl").write_text(json.dumps({"step": step} | row) + "\n")
  (folder / "samples.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
  return folder


def difference_of(page):
  (section,) = re.findall("<h2>Differences of held-out accuracy</h2>.*?</section>", page, re.S)
  lines = [re.findall("<td>(.*?)</td>", line) for line in re.findall("<tr>(.*?)</tr>", section)]
  return {line[1]: line[2:] for line in lines[1:]}


def test_greedy_answers_are_paired_and_sampled_ones_are_not(tmp_path):
  """Six problems that only the second solves: clear of 0 paired, and not from two intervals."""
  first, second = [1] * 10 + [0] * 20, [1] * 10 + [1] * 6 + [0] * 14
  folders = [answers(tmp_path / name, x) for name, x in (("a", first), ("b", second))]
  found = difference_of(write_comparison(folders).read_text(encoding="utf-8"))
  low, high = paired_difference(first, second)[1:]
  assert found["greedy"][0] == f"+0.20 ({low:+.2f} to {high:+.2f})" and low > 0
  assert found["greedy"][1:] == ["yes", "the same 30 problems, paired"]
  assert found["sampled"][1:] == ["no", "the two intervals, not paired"]


def test_runs_on_other_problems_are_not_paired(tmp_path):
  folders = [answers(tmp_path / "a", [1] * 10), answers(tmp_path / "b", [1] * 12)]
  found = difference_of(write_comparison(folders).read_text(encoding="utf-8"))
  assert found["greedy"][2] == "the two intervals, not paired"


def test_the_command_writes_the_page_where_it_says(runs, tmp_path, capsys):
  assert main(["report", *map(str, runs)]) == 0
  said = capsys.readouterr().out.splitlines()
  assert said[-1] == f"comparison: {runs[0].parent / 'comparison.html'}" and len(said) == 4
  other = tmp_path / "page.html"
  assert main(["report", *map(str, runs), f"--output={other}"]) == 0 and other.exists()
  assert main(["report", str(runs[0]), f"--output={other}"]) == 2
  assert "give several" in capsys.readouterr().err
  assert main(["report", str(runs[0]), str(runs[0])]) == 2
  assert "given twice" in capsys.readouterr().err


def test_names_tell_runs_apart(tmp_path):
  folders = [answers(tmp_path / name, [1, 0]) for name in ("x", "y")]
  inner = [folder / "run" for folder in folders]
  for folder, new in zip(folders, inner, strict=True):
    new.mkdir()
    for name in ("metrics.jsonl", "samples.jsonl"):
      (folder / name).rename(new / name)
  page = write_comparison(inner).read_text(encoding="utf-8")
  assert "<td>x/run</td>" in page and "minus x/run" in page
  with pytest.raises(UserError, match="twice"):
    write_comparison([inner[0], inner[0]])
