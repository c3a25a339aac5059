"""The table and the page of a sweep, from directories as the launcher leaves them."""

from __future__ import annotations

import csv
import doctest
import json
import re
import sys
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import pytest

from launch import report, report_page, results, state
from rl_llm.errors import ConfigError, UserError


def trial(workdir, number, *, steps=4, reached=None, value=None, status=None, **config):
  """A trial's directory: its first `reached` steps are on record."""
  directory = workdir / f"{number:012x}"
  directory.mkdir(parents=True)
  config = {"model": "tiny", "seed": 0, "workdir": str(directory)} | config
  state.write_json(
    directory / "trial.json",
    {"id": directory.name, "order": number, "steps": steps, "config": config},
  )
  reached = steps if reached is None else reached
  rows = [
    {"step": step, "eval/sampled_accuracy": value * step / steps, "time/step": 1.0}
    for step in range(reached + 1 if value is not None else 0)
  ]
  if rows:
    (directory / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
  if value is not None and reached == steps:
    after = {"eval/sampled_accuracy": value}
    (directory / "result.json").write_text(json.dumps({"steps": steps, "after": after}))
  state.write_json(directory / "status.json", status or {"seconds": 90.0})
  return directory


@pytest.fixture
def sweep(tmp_path):
  workdir = tmp_path / "rates"
  for number, (rate, seed, value) in enumerate(
    [(1e-3, 0, 0.1), (1e-3, 1, 0.2), (1e-3, 2, 0.3), (3e-3, 0, 0.9), (3e-3, 1, 0.9)]
  ):
    trial(workdir, number, value=value, seed=seed, rate=rate)
  lines = ["<script>alert(1)</script>", "RuntimeError: |"]
  trial(
    workdir,
    5,
    rate=1e-2,
    status={"status": "failed", "failures": 3, "reason": "exit code 1", "lines": lines},
  )
  trial(workdir, 6, rate=1e-2, seed=1, value=0.4, reached=2)
  return workdir


def write(workdir, metric=""):
  return report.write(workdir, metric=metric)


def test_doctests():
  assert doctest.testmod(report).failed == 0


def test_the_table_has_a_line_per_setting_the_best_first(sweep):
  text = write(sweep).splitlines()
  cells = [line.split() for line in text[:4]]
  assert cells[0] == ["rate", "sampled_accuracy", "95", "%", "n", "status", "steps", "time"]
  # Two seeds without spread say nothing of how far a third would be.
  assert cells[1] == ["0.003", "0.9", "-", "2", "done", "4", "90s"]
  # The unfinished one counts as far as it has come, and is called what it is.
  # 0.2 +- 4.303 * 0.1 / sqrt(3)
  assert cells[2][:4] == ["0.01", "0.2", "-", "1"] and "1 failed, 1 stopped" in text[2]
  assert cells[3] == ["0.001", "0.2", "±0.25", "3", "done", "4", "90s"]
  assert "model" not in text[0], "what does not vary is not shown"
  assert text[4].endswith("failed: exit code 1") and text[-1] == "  | RuntimeError: |"


def test_the_files_hold_each_trial_once(sweep):
  write(sweep)
  with open(sweep / "report.csv") as file:
    rows = list(csv.DictReader(file))
  assert len({row["trial"] for row in rows}) == len(rows) == 7
  assert [row["status"] for row in rows] == ["done"] * 5 + ["failed", "stopped"]
  assert rows[6]["step"] == "2" and rows[6]["steps"] == "4" and rows[6]["seed"] == "1"
  assert "RuntimeError" in rows[5]["error"] and rows[3]["eval/sampled_accuracy"] == "0.9"
  markdown = (sweep / "report.md").read_text().splitlines()
  assert markdown[2].startswith("| rate | sampled_accuracy |") and len(markdown[4].split("|")) == 9


def test_the_page_is_whole_shows_every_curve_and_leads_to_every_trial(sweep):
  (sweep / "000000000003" / "report.html").write_text("a run's own")
  write(sweep)
  text = (sweep / "report.html").read_text()
  assert "<script>" not in text and "&lt;script&gt;" in text
  root = ElementTree.fromstring(
    text.partition("<main>")[2].partition("</main>")[0].join(("<main>", "</main>"))
  )
  lines = [x for x in root.iter("polyline") if "line" in x.get("class", "")]
  assert len(lines) == 6 + 3, "a curve per trial that has one, and the mean of each setting"
  assert len([x for x in root.iter("polyline") if x.get("stroke")]) == 3, "a line per setting"
  links = [x.get("href") for x in root.iter("a")]
  assert links and all((sweep / link).exists() for link in links)
  assert "000000000003/report.html" in links
  # Who did not come to an end has no report of its own yet; it gets one.
  assert "000000000006/report.html" in links


def test_the_best_setting_and_the_best_trial_are_marked(sweep):
  write(sweep)
  text = (sweep / "report.html").read_text()
  assert len(re.findall('<tr class="best">', text)) == 2
  assert '<tr class="best"><td>0.003</td><td>0.9</td>' in text
  assert '<tr class="best"><td>★ 000000000003</td>' in text
  assert text.count("<h3>rate=0.003 (best)</h3>") == 1
  assert '<span class="key k0">rate=0.003 (best)</span>' in text


def test_every_small_figure_has_the_same_ticks(sweep):
  write(sweep)
  text = (sweep / "report.html").read_text()
  figures = re.findall("<figure><h3>rate=.*?</figure>", text, re.S)
  ticks = {tuple(re.findall("<text[^>]*>([^<]*)</text>", figure)) for figure in figures}
  assert len(figures) == 3 and len(ticks) == 1 and "4" in ticks.pop()


def test_the_metric_is_chosen_on_the_page(tmp_path):
  for number, (accuracy, reward) in enumerate([(0.2, 0.9), (0.8, 0.1)]):
    directory = trial(tmp_path, number, rate=number)
    row = {"step": 4, "eval/sampled_accuracy": accuracy, "reward_mean": reward, "other": 1}
    (directory / "metrics.jsonl").write_text(json.dumps(row) + "\n")
  write(tmp_path)
  text = (tmp_path / "report.html").read_text()
  radio = '<input type="radio" name="tab" id="(t[0-9])".*?/><label for="(.*?)">(.*?)<'
  labels = re.findall(radio, text)
  assert labels == [("t0", "t0", "sampled_accuracy"), ("t1", "t1", "reward_mean")]
  parts = re.split('<div class="tab t[0-9]">', text)[1:]
  firsts = [re.search('<tr class="best"><td>(.)</td>', part).group(1) for part in parts]
  assert firsts == ["1", "0"] and text.count("checked=") == 1
  assert "#t1:checked ~ .t1 { display: block; }" in text


def test_a_sweep_in_which_nothing_was_right_has_figures_too(tmp_path):
  """All values are 0: the axes that all figures share have no extent of their own."""
  for number in range(2):
    trial(tmp_path, number, value=0.0, rate=number)
  write(tmp_path)
  figures = re.findall("<figure>.*?</figure>", (tmp_path / "report.html").read_text(), re.S)
  labels = [re.findall('text-anchor="end">(.*?)<', figure) for figure in figures[1:]]
  assert labels == 3 * [["0", "0.2", "0.4", "0.6", "0.8", "1"]]


def rows(values, *, half=None, rewards=None):
  rewards = rewards or [None] * len(values)
  return [
    results.Row(str(i), Path(), {"rate": i}, "done", 4, 4, 1.0, value, [], [], half, reward)
    for i, (value, reward) in enumerate(zip(values, rewards, strict=True))
  ]


def test_ties_are_broken_by_reward():
  tied = rows([0.5, 0.5, 0.4], rewards=[0.1, 0.7, 0.9])
  _, groups = results.grouped(tied, "eval/sampled_accuracy")
  assert [group.settings["rate"] for group in groups] == [1, 0, 2]
  view = report_page.View("eval/sampled_accuracy", [], [], groups, tied)
  assert report_page.best_trial(view).id == "1"


def test_few_seeds_make_no_interval_narrower_than_one_evaluation():
  """Two seeds with 18 of 20 right each: as uncertain as one of them, 0.70 to 0.97 by Wilson."""
  assert results.honest(rows([0.9, 0.9], half=0.135)) == (0.9, 0.135)
  assert results.honest(rows([0.9], half=0.135)) == (0.9, 0.135)
  assert results.honest(rows([0.9, 0.9])) == (0.9, None)
  mean, half = results.honest(rows([0.0, 1.0], half=0.135))
  assert half == pytest.approx(12.706 * 0.5)  # Two that differ much: Student's t is wider.


def test_a_trials_own_interval_is_that_of_its_newest_evaluation(tmp_path):
  directory = trial(tmp_path, 0)
  ends = {"eval/sampled_accuracy": 0.9, "eval/sampled_low": 0.7, "eval/sampled_high": 0.98}
  old = ends | {"eval/sampled_low": 0.0}
  lines = [json.dumps({"step": step} | row) for step, row in ((0, old), (4, ends))]
  (directory / "metrics.jsonl").write_text("\n".join(lines) + "\n")
  (row,) = results.rows_of(results.read_trials(tmp_path), "eval/sampled_accuracy")
  assert row.own_half == pytest.approx(0.14)


def test_losses_are_better_when_they_are_smaller(tmp_path):
  for number, loss in enumerate((0.5, 0.1, 0.9)):
    directory = trial(tmp_path, number, rate=number)
    row = {"step": 4, "eval/token_loss": loss}
    (directory / "metrics.jsonl").write_text(json.dumps(row) + "\n")
  lines = write(tmp_path).splitlines()
  assert [line.split()[1] for line in lines[1:4]] == ["0.1", "0.5", "0.9"]


def test_it_may_be_called_before_anything_has_happened(tmp_path):
  trial(tmp_path, 0)
  assert "waiting" in write(tmp_path)
  assert "Nothing has been recorded yet" in (tmp_path / "report.html").read_text()


def test_values_that_are_not_finite_are_left_out(tmp_path):
  directory = trial(tmp_path, 0, value=0.5)
  (directory / "result.json").unlink()
  with open(directory / "metrics.jsonl", "a") as file:
    file.write('{"step": 5, "eval/sampled_accuracy": "nan"}\n')
  assert write(tmp_path).splitlines()[1].split()[0] == "0.5"


def test_no_sweep_and_no_such_metric(tmp_path, sweep):
  with pytest.raises(ConfigError, match="in which launch.run has run a sweep"):
    write(tmp_path / "nowhere")
  with pytest.raises(ConfigError, match="--metric=acuracy: must be one of eval/sampled_accuracy"):
    write(sweep, "acuracy")


@pytest.mark.parametrize(
  ("name", "content", "says"),
  [
    ("trial.json", "{", "trial.json: broken; the launch.run command"),
    ("trial.json", '{"id": "x", "config": []}', "trial.json: config=[] cannot be used"),
    ("status.json", '{"seconds": "long"}', 'status.json: seconds="long" cannot be used'),
    ("result.json", '{"steps": 4, "after": null}', "result.json: after=null cannot be used"),
    ("metrics.jsonl", "{}\n{}\n", "metrics.jsonl:1: must be a JSON object with an int"),
    ("metrics.jsonl", None, "metrics.jsonl: Is a directory"),
    ("samples.jsonl", '[]\n{"step": 1}\n', "samples.jsonl:1: must be a JSON object"),
    ("samples.jsonl", '{"step": 1}\n', "its report cannot be written: a line lacks 'prompt'"),
    ("config.json", "{", "config.json: not JSON"),
  ],
)
def test_a_broken_file_is_told_in_one_line(sweep, name, content, says):
  path = sweep / f"{6:012x}" / name
  path.unlink(missing_ok=True)
  if content is None:
    path.mkdir()
  else:
    path.write_text(content)
  with pytest.raises(UserError) as error:
    report.main(report.Config(workdir=str(sweep)))
  assert says in str(error.value) and path.parent.name in str(error.value)
  assert "\n" not in str(error.value)


def test_figures_that_cannot_be_written_are_told(sweep, tmp_path):
  with pytest.raises(ConfigError, match="--figure=x.pdf: must be a file ending in .svg or .png"):
    report.main(report.Config(workdir=str(sweep), figure="x.pdf"))
  pytest.importorskip("matplotlib")
  with pytest.raises(ConfigError, match="--figure=.*nowhere/x.svg.*No such file"):
    report.main(report.Config(workdir=str(sweep), figure=str(tmp_path / "nowhere" / "x.svg")))


def test_intervals():
  assert results.interval([]) == (None, None) and results.interval([0.5]) == (0.5, None)
  mean, half = results.interval([0.0, 1.0])
  assert (mean, half) == (0.5, pytest.approx(12.706 * 0.5))  # s / sqrt(n) = 0.707 / 1.414
  spread = (0.25 * 40 / 39) ** 0.5
  assert results.interval([0.0, 1.0] * 20)[1] == pytest.approx(1.96 * spread / 40**0.5)


def test_a_figure_of_what_each_setting_does(tmp_path, monkeypatch):
  pytest.importorskip("matplotlib")
  for number, (rate, clip) in enumerate([(0.01, 0.1), (0.001, 0.1), (0.01, 0.3), (0.001, 0.3)]):
    trial(tmp_path / "work", number, value=rate * 10 + clip, rate=rate, clip=clip)
  path = tmp_path / "sweep.svg"
  assert report.main(report.Config(workdir=str(tmp_path / "work"), figure=str(path))) == 0
  first = path.read_bytes()
  assert first.startswith(b"<?xml") and b"Date" not in first
  report.write(tmp_path / "work", metric="", figure=str(path))
  assert path.read_bytes() == first, "the same figures give the same file"

  with pytest.raises(ConfigError, match="--figure=x.svg: must be left out where no setting"):
    report_page.draw([], [], "loss", "x.svg")
  monkeypatch.setitem(sys.modules, "matplotlib", None)
  with pytest.raises(ConfigError, match=r"--figure=x.svg: .*pip install 'rl_llm\[plot\]'"):
    report_page.draw(["a"], [], "loss", "x.svg")


def test_it_is_a_command(sweep):
  assert report.main(report.Config(workdir=str(sweep))) == 0
  assert Path(sweep / "report.html").exists()
