"""`make faults`: every row of the fault table, with its number of trials, and what became of it.

  python -m tests.faults                      all rows, up to two hours on two cores
  python -m tests.faults --rows=F1,F8         these alone
  python -m tests.faults --short --rows=F8    with the few trials of `make test-slow`
  python -m tests.faults --trials=10          at most so many kills in F1 and F3

Each row is a process of pytest. After each one, docs/results/faults.json and faults.md have its
line anew; the lines of other rows stay, with the date and the machine that they were made on.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import re
import signal
import subprocess
import sys
import tempfile
import time
import xml.etree.ElementTree as ElementTree
from pathlib import Path
from typing import Any, NamedTuple

from tests.faults.rows import ROWS, Row
from tests.test_eight_devices import PATIENCE as PATIENT_COLLECTIVES

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "docs" / "results"
LONGEST = 7200  # seconds of a row; one that would never end is ended


class Counted(NamedTuple):
  """What became of a row: how many trials ran, how many were survived, what did not, and why."""

  trials: int
  survived: int
  skipped: tuple[str, ...] = ()
  failed: tuple[str, ...] = ()


def counted(row: str, junit: str) -> Counted:
  """The trials of a row in pytest's report.

  A test is one trial, or as many as it recorded for this row. What it recorded before it failed was
  survived.

  >>> case = '<testcase name="a"><property name="F8" value="{}"/>{}</testcase>'.format
  >>> report = case(200, "") + case(3, "<failure/>") + '<testcase name="b"/>'
  >>> counted("F8", f"<testsuite>{report}</testsuite>")
  Counted(trials=205, survived=204, skipped=(), failed=('a',))
  """
  trials = survived = 0
  skipped, failed = [], []
  for case in ElementTree.fromstring(junit).iter("testcase"):
    found = [p.get("value") for p in case.iter("property") if p.get("name") == row]
    done = sum(map(int, found)) if found else None
    if (skip := case.find("skipped")) is not None:
      skipped.append(skip.get("message") or "no reason given")
    elif case.find("failure") is not None or case.find("error") is not None:
      failed.append(case.get("name"))
      trials, survived = trials + (done or 0) + 1, survived + (done or 0)
    else:
      trials, survived = trials + (done or 1), survived + (done or 1)
  return Counted(trials, survived, tuple(dict.fromkeys(skipped)), tuple(failed))


def run(row: Row, *, short: bool, trials: int = 0) -> dict[str, Any]:
  """Runs a row's tests in a process of their own; the entry of faults.json."""
  environment = dict(os.environ, PYTHONPATH=str(ROOT), JAX_PLATFORMS="cpu")
  environment |= {} if short else {"RL_LLM_FULL": "1"}
  environment |= {"RL_LLM_TRIALS": str(trials)} if trials else {}
  if row.devices > 1:
    environment |= {"JAX_NUM_CPU_DEVICES": str(row.devices), "XLA_FLAGS": PATIENT_COLLECTIVES}
  cache = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
  cache = Path(cache).expanduser() / "rl_llm" / "tests"
  environment.setdefault("JAX_COMPILATION_CACHE_DIR", str(cache))
  with tempfile.TemporaryDirectory() as directory:
    report = Path(directory) / "report.xml"
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider"]
    command += [f"--junitxml={report}", f"--basetemp={directory}/tests"]
    command += ["-k", row.only] if row.only else []
    started = time.monotonic()
    process = subprocess.Popen(
      [*command, *(f"tests/{test}" for test in row.tests)],
      cwd=ROOT,
      env=environment,
      start_new_session=True,
      stdout=subprocess.PIPE,
      stderr=subprocess.STDOUT,
      text=True,
    )
    try:
      output, _ = process.communicate(timeout=LONGEST)
    except BaseException as error:
      os.killpg(process.pid, signal.SIGKILL)
      output, _ = process.communicate()
      if not isinstance(error, subprocess.TimeoutExpired):
        raise
    seconds = time.monotonic() - started
    found = counted(row.name, report.read_text()) if report.exists() else Counted(1, 0)
  if found.survived < found.trials or not (found.trials or found.skipped):
    print(output[-6000:], file=sys.stderr)
  made = {"seconds": round(seconds, 1), "date": datetime.date.today().isoformat()}
  return {**found._asdict(), **made, "short": short, "machine": machine()}


def machine() -> str:
  """The processor, the number of cores that this process may use, and the system."""
  model = re.search(r"model name\s*:\s*(.+)", read("/proc/cpuinfo"))
  name = model[1].strip() if model else platform.machine()
  cores = len(os.sched_getaffinity(0))
  system = f"{platform.system()} {'.'.join(platform.release().split('.')[:2])}"
  counted = f"{cores} core{'s' * (cores > 1)}"
  return f"{name}, {counted}, {system}, Python {platform.python_version()}"


def read(path: str) -> str:
  """A file of the system, "" where there is none."""
  try:
    return Path(path).read_text()
  except OSError:
    return ""


def line(row: Row, found: dict[str, Any] | None) -> tuple[str, str, str]:
  """A row's cells: trials, survived, seconds."""
  if found is None:
    return f"none yet of {row.asked}", "", ""
  if not found["trials"]:
    return f"cannot run here: {'; '.join(found['skipped'])}", "", ""
  asked = "" if found["trials"] >= row.asked else f" of {row.asked}"
  return f"{found['trials']}{asked}", str(found["survived"]), f"{found['seconds']:.0f}"


PAGE = """# Faults

`make faults` does these things to runs, checkpoints, graders, files, processes and sweeps, and says
what became of them; `make faults ROWS=F1,F8` does some of them again. `tests/faults/rows.py` names
the tests of each row. "50 of 200": fewer trials ran than a full table has. `make test` and
`make test-slow` run the same tests with few trials.

| row | what is done | survived means | trials | survived | seconds | date |
|---|---|---|--:|--:|--:|---|
{table}

{summary} Machine{plural}: {machines}.
{notes}"""


def page(found: dict[str, dict[str, Any]]) -> str:
  """The table as a page of the site."""
  lines, notes = [], []
  for row in ROWS:
    own = found.get(row.name)
    cells = (row.name, row.fault, row.survived, *line(row, own), own["date"] if own else "")
    lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    if own and own["trials"] and own["skipped"]:
      notes.append(f"- {row.name} in part: {'; '.join(own['skipped'])}")
    if own and own["failed"]:
      notes.append(f"- {row.name} failed: {', '.join(own['failed'])}")
  ran = [own for own in found.values() if own["trials"]]
  good = sum(own["survived"] == own["trials"] for own in ran)
  machines = sorted({own["machine"] for own in found.values()})
  summary = (
    f"{good} of {len(ROWS)} rows survived all their trials, {len(found) - len(ran)} cannot run "
    f"here, {sum(own['trials'] for own in ran):,} trials, {sum(o['seconds'] for o in ran):,.0f} s."
  )
  remarks = "\nWhat did not run, or failed:\n\n" + "\n".join(notes) + "\n" if notes else ""
  return PAGE.format(
    table="\n".join(lines),
    summary=summary,
    plural="s" * (len(machines) > 1),
    machines="; ".join(machines),
    notes=remarks,
  )


def write(path: Path, found: dict[str, dict[str, Any]]) -> None:
  """faults.json and faults.md, with one row newly made."""
  path.mkdir(parents=True, exist_ok=True)
  order = [row.name for row in ROWS if row.name in found]
  text = json.dumps({name: found[name] for name in order}, indent=1)
  (path / "faults.json").write_text(text + "\n", encoding="utf-8")
  (path / "faults.md").write_text(page(found), encoding="utf-8")


def main(arguments: list[str] | None = None) -> int:
  """The exit code: 0 if every row that ran was survived."""
  parser = argparse.ArgumentParser(prog="python -m tests.faults", description=__doc__)
  parser.formatter_class = argparse.RawDescriptionHelpFormatter
  parser.add_argument("--rows", default="", help="such as F1,F8; none: all")
  parser.add_argument("--short", action="store_true", help="few trials, as in make test-slow")
  parser.add_argument("--trials", type=int, default=0, help="at most so many kills; 0: all")
  parser.add_argument("--out", type=Path, default=RESULTS, help="directory of faults.json and .md")
  given = parser.parse_args(arguments)
  names = [name.strip().upper() for name in given.rows.split(",") if name.strip()]
  known = [row.name for row in ROWS]
  if unknown := [name for name in names if name not in known]:
    print(f"error: --rows={','.join(unknown)}: must be of F1 to F{len(ROWS)}", file=sys.stderr)
    return 2
  path = given.out / "faults.json"
  found = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
  print(f"{'row':<4} {'trials':>12} {'survived':>8} {'seconds':>7}  what is done", flush=True)
  good = True
  for row in ROWS:
    if names and row.name not in names:
      continue
    own = found[row.name] = run(row, short=given.short, trials=given.trials)
    write(given.out, found)
    good &= own["survived"] == own["trials"] and bool(own["trials"] or own["skipped"])
    trials, survived, seconds = line(row, own)
    print(f"{row.name:<4} {trials:>12} {survived:>8} {seconds:>7}  {row.fault}", flush=True)
  return 0 if good else 1


if __name__ == "__main__":
  sys.exit(main())
