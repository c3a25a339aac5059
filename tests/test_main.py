"""`python -m rl_llm` lists the commands and writes reports."""

import json
import pathlib
import re
import subprocess
import sys

import rl_llm
from rl_llm.__main__ import main, overview

ROOT = pathlib.Path(__file__).parent.parent


def test_every_command_is_listed(capsys):
  assert main([]) == 0
  said = capsys.readouterr().out
  assert said == overview() + "\n"
  listed = set(re.findall(r"python -m ((?:experiments|launch|benchmarks)\.\w+)", said))
  wanted = {
    f"{package}.{path.stem}"
    for package in ("experiments", "launch", "benchmarks")
    for path in (ROOT / package).glob("*.py")
    if '__name__ == "__main__"' in path.read_text()
  }
  assert listed == wanted and {"experiments.grpo", "launch.run"} <= listed
  lines = [line for line in said.splitlines() if line.startswith("  python")]
  assert all(re.fullmatch(r"  python -m .+?  +\S.*[.:;,)\w]", line) for line in lines)


def test_the_version_is_that_of_the_package():
  done = subprocess.run(
    [sys.executable, "-m", "rl_llm", "--version"], cwd=ROOT, capture_output=True, text=True
  )
  assert done.stdout.strip() == rl_llm.__version__
  assert f'version="{rl_llm.__version__}"' not in (ROOT / "setup.py").read_text()


def test_reports_are_written_anew(tmp_path, capsys):
  for name in ("a", "b"):
    (tmp_path / name).mkdir()
    row = {"step": 0, "loss": 1.0, "time/step": 1.0}
    (tmp_path / name / "metrics.jsonl").write_text(json.dumps(row) + "\n")
  assert main(["report", str(tmp_path / "a"), str(tmp_path / "b")]) == 0
  assert capsys.readouterr().out.count("report.html") == 2
  assert "Curves" in (tmp_path / "b" / "report.html").read_text()


def test_what_is_no_run_is_one_line(tmp_path, capsys):
  assert main(["report", str(tmp_path)]) == 2
  said = capsys.readouterr().err
  assert said.startswith("error: ") and said.count("\n") == 1 and "metrics.jsonl" in said
