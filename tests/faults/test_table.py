"""The fault table itself: its rows have tests, and its figures are those of the tests that ran."""

from __future__ import annotations

import ast
import doctest
import json
from pathlib import Path

import pytest

from tests.faults import __main__ as suite
from tests.faults import rows

TESTS = Path(__file__).parents[1]


def test_forty_rows_in_order():
  assert [row.name for row in rows.ROWS] == [f"F{n}" for n in range(1, 41)]


@pytest.mark.parametrize("row", rows.ROWS, ids=lambda row: row.name)
def test_the_tests_of_a_row_exist(row):
  assert row.tests and row.asked > 0
  for node in row.tests:
    path, _, name = node.partition("::")
    tree = ast.parse((TESTS / path).read_text(encoding="utf-8"))
    assert name in {x.name for x in tree.body if isinstance(x, ast.FunctionDef)}, node


def test_doctests():
  assert doctest.testmod(suite).failed == 0


def test_a_skipped_test_is_no_trial_and_says_why():
  report = '<testsuite><testcase name="a"><skipped message="no namespaces"/></testcase></testsuite>'
  assert suite.counted("F1", report) == suite.Counted(0, 0, ("no namespaces",))


def entry(**changes):
  made = {"trials": 50, "survived": 50, "skipped": [], "failed": [], "seconds": 9.6}
  return made | {"date": "2026-11-30", "short": False, "machine": "a machine"} | changes


def test_the_page_says_how_many_of_how_many():
  found = {
    "F1": entry(),
    "F8": entry(trials=40, survived=39, failed=["test_x[3]"]),
    "F11": entry(trials=0, survived=0, skipped=["no private tmpfs"]),
  }
  lines = {line.split(" | ")[0][2:]: line for line in suite.page(found).splitlines()}
  assert lines["F1"].endswith("| 50 | 50 | 10 | 2026-11-30 |")
  assert "| 40 of 200 | 39 |" in lines["F8"]
  assert "| cannot run here: no private tmpfs |" in lines["F11"]
  assert "| none yet of 30 |" in lines["F2"]
  assert "- F8 failed: test_x[3]" in suite.page(found)
  assert "1 of 40 rows survived all their trials, 1 cannot run here, 90 trials" in suite.page(found)


@pytest.mark.slow
def test_one_row_is_made_anew_and_the_others_stay(tmp_path, capsys):
  """Through pytest: a row that takes a second."""
  suite.write(tmp_path, {"F1": entry()})
  assert suite.main(["--rows=f31", "--short", f"--out={tmp_path}"]) == 0
  found = json.loads((tmp_path / "faults.json").read_text())
  assert list(found) == ["F1", "F31"] and found["F1"] == entry()
  own = found["F31"]
  assert own["trials"] == own["survived"] > 10 and own["short"]
  assert "| F31 | pickles" in (tmp_path / "faults.md").read_text()
  assert capsys.readouterr().out.splitlines()[1].startswith("F31 ")


def test_a_row_that_is_none_is_one_line(capsys):
  assert suite.main(["--rows=F1,F41"]) == 2
  assert capsys.readouterr().err == "error: --rows=F41: must be of F1 to F40\n"
