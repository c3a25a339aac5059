"""The committed table: what is in it, and that a row is kept as soon as it is there."""

from __future__ import annotations

import json
import pathlib

import pytest
from absl import flags

from benchmarks import plan_table
from launch import estimate
from launch.models import find_model
from launch.plan import Program, by_formula
from launch.plan_flags import Config
from rl_llm.runs.config import define_flags, from_flags

RESULTS = pathlib.Path(__file__).parent.parent / "docs" / "results"
FIRST, SECOND, *REST = plan_table.ROWS
FIGURES = {
  "programs": [
    Program("update", 1e9, 2e9, 0.0, {}, 197e12, 0.0, 60.0)._asdict(),
    Program("rollout", 1e9, 12e9, 0.0, {}, 0.0, 0.82e12 * 3, 61.0, 4e9)._asdict(),
  ]
}


def test_a_row_is_kept_as_soon_as_it_is_compiled_and_the_rest_is_done_later(tmp_path, monkeypatch):
  compiled = []

  def compile_row(row, *, seconds):
    compiled.append(row)
    if len(compiled) == 2:
      raise KeyboardInterrupt
    return FIGURES

  monkeypatch.setattr(plan_table, "compile_row", compile_row)
  with pytest.raises(KeyboardInterrupt):
    plan_table.main(plan_table.Config(out=str(tmp_path)))
  kept = json.loads((tmp_path / "plan.json").read_text())
  assert list(kept) == [plan_table.command(*FIRST)] == compiled[:1]
  page = (tmp_path / "plan.md").read_text()
  assert page.count("not compiled") == len(plan_table.ROWS) - 1
  plan_table.main(plan_table.Config(out=str(tmp_path), limit=1))
  assert compiled[2] == plan_table.command(*SECOND)
  assert (tmp_path / "plan.md").read_text().count("not compiled") == len(REST)


def test_the_committed_page_is_what_the_program_writes():
  found = json.loads((RESULTS / "plan.json").read_text())
  assert (RESULTS / "plan.md").read_text() == plan_table.page(found)


def test_a_line_says_what_binds_and_whether_it_fits():
  lines = plan_table.row_lines(("m", "v5e:4x4", "--mesh.fsdp=4 --remat"), FIGURES)
  assert lines == [
    "| m | v5e:4x4 | fsdp=4 | update | 1.00 | 2.00 | 0.00 | 3.0 of 16 | compute, 1.00 s "
    "| 60 s | yes |",
    "| m | v5e:4x4 | fsdp=4 | rollout | 1.00 | 12.00 | 4.00 | 17.0 of 16 | HBM, 3.00 s "
    "| 61 s | no |",
  ]


def test_a_row_without_figures_is_not_kept(tmp_path, monkeypatch):
  monkeypatch.setattr(plan_table, "compile_row", lambda *_, **__: None)
  plan_table.main(plan_table.Config(out=str(tmp_path), limit=1))
  assert not (tmp_path / "plan.json").exists()
  assert "| not compiled |" in (tmp_path / "plan.md").read_text()


@pytest.mark.parametrize("row", plan_table.ROWS, ids=lambda row: f"{row[0]}-{row[1]}")
def test_the_formula_is_within_30_percent_of_the_compiler(row):
  command = plan_table.command(*row)
  values = flags.FlagValues()
  define_flags(Config, flag_values=values)
  values(command.split()[2:])
  config = estimate.settled(from_flags(Config, flag_values=values))
  shape = find_model(config.model, vocab_size=config.vocab_size)
  found = json.loads((RESULTS / "plan.json").read_text())[command]["programs"]
  compiled = {fields["name"]: Program(**fields).peak for fields in found}
  for program in by_formula(config, shape):
    assert program.peak == pytest.approx(compiled[program.name], rel=0.3), program.name
