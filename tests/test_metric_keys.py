"""The page that explains metrics.jsonl: whole, and true to what is written."""

import doctest
import pathlib
import re
import runpy

import pytest

from rl_llm.losses import POLICY_LOSSES, PREFERENCE_LOSSES
from rl_llm.runs import metric_keys, report_plots
from rl_llm.runs.metric_keys import KEYS, explained
from tests.losses import battery

ROOT = pathlib.Path(__file__).parent.parent


def test_the_page_is_what_the_table_makes():
  made = runpy.run_path(str(ROOT / "docs" / "make_metrics.py"))
  assert made["PAGE"].read_text(encoding="utf-8") == made["made"](), "run `make docs`"


def test_every_key_stands_once_and_says_something():
  names = [key.name for keys in KEYS.values() for key in keys]
  assert len({*names}) == len(names)
  for keys in KEYS.values():
    for key in keys:
      assert key.meaning[0].isupper() and key.meaning.endswith(".") and len(key.meaning) > 6


@pytest.mark.parametrize("name", sorted(battery.PUBLIC))
def test_every_metric_of_a_loss_is_explained(name):
  _, metrics = battery.PUBLIC[name](**battery.arguments(name))
  renamed = {"accuracy": "pair_accuracy"}  # Of pairs, in records: theirs is no grader's.
  missing = {key for key in metrics if not explained(renamed.get(key, key))}
  assert not missing


def test_the_losses_that_flags_know_are_among_these():
  known = {loss.__name__ for loss in (*POLICY_LOSSES, *PREFERENCE_LOSSES)}
  assert known <= {*battery.PUBLIC}


def test_every_curve_of_a_report_is_explained():
  drawn = {key for plot in report_plots.PLOTS for key, _ in plot.curves}
  assert not {key for key in drawn if not explained(key)}


def test_verdicts_read_no_key_that_is_not_explained():
  folder = ROOT / "rl_llm" / "runs"
  text = "".join(
    (folder / name).read_text()
    for name in ("verdicts.py", "verdicts_settings.py", "verdicts_updates.py", "evidence.py")
  )
  read = set(re.findall(r'(?:series|mean|late|row\.get)\(f?"([a-z_/]+)"', text))
  assert len(read) > 8 and not {key for key in read if not explained(key)}


def test_doctests():
  assert doctest.testmod(metric_keys).failed == 0
