"""The guides are held to the code: examples run, and every path, name and flag in them exists."""

import doctest
import importlib
import pathlib
import re
import runpy

import pytest

from rl_llm import explain
from rl_llm.rewards import RewardPool
from rl_llm.runs.config import flatten
from rl_llm.tasks import load_task

ROOT = pathlib.Path(__file__).parent.parent
README = ROOT / "README.md"
LESSONS = sorted((ROOT / "docs" / "guide").glob("*.md"))
# The Japanese lessons have the English ones' examples, which tests/test_guide.py compares. Only the
# first page has one of its own, which prints Japanese.
SHARED = [p for p in LESSONS if p.name.endswith(".ja.md") and p.name != "index.ja.md"]
GUIDES = [README, ROOT / "launch" / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
GUIDES += [path for path in LESSONS if path not in SHARED]
PAGES = [*GUIDES, *SHARED, *sorted((ROOT / "docs" / "results").glob("*.md"))]
# Flags of other programs (pip) and of absl itself, and the mistake that launch/README.md shows.
FOREIGN_FLAGS = {
  "no-deps",
  "help",
  "flagfile",
  "optimizer.learningrate",
  "num_generations",
  "report_to",
}


def name(path):
  return str(path.relative_to(ROOT))


class Parser(doctest.DocTestParser):
  """Reads a page with its fences as blank lines; a closing one would be output that is expected."""

  def parse(self, string, name="<string>"):
    return super().parse(re.sub(r"^ *```.*", "", string, flags=re.MULTILINE), name)


def missing_paths(text):
  """The paths into the repository that a text names and that are not there."""
  directories = "rl_llm|experiments|benchmarks|launch|tests|docs"
  paths = re.findall(rf"(?<![\w/.-])(?:{directories})/[\w./-]*", text)
  return [path for path in paths if not (ROOT / path.rstrip(".")).exists()]


def flags_of(module):
  """An experiment's flags; a group that has a `name`, or is a switch, can be given by it."""
  paths = flatten(module.Config()).keys()
  return paths | {path.removesuffix(".name").removesuffix(".on") for path in paths}


def unknown_flags(text):
  """Flags after `-m experiments.x`, launch.x or benchmarks.x must be x's, others one of theirs."""
  modules = {
    path.stem: importlib.import_module(f"{directory}.{path.stem}")
    for directory in ("experiments", "launch", "benchmarks")
    for path in (ROOT / directory).glob("*.py")
  }
  topics = {topic.__name__: {*topic.__kwdefaults__, "lang", "plot"} for topic in explain.TOPICS}
  experiments = {
    stem: flags_of(module) for stem, module in modules.items() if hasattr(module, "Config")
  }
  anyones = set().union(*experiments.values(), *topics.values())
  unknown = []
  for line in re.sub(r" \\\n *", " ", text).splitlines():  # A command that a \ breaks is one line.
    start = r"-m (?=(?:experiments|launch|benchmarks)\.\w|rl_llm explain \w)"
    before, *commands = re.split(start, line)
    parts = [(before, anyones)]
    for command in commands:  # To the end of the line, or of what stands between backquotes.
      own, _, after = command.partition("`")
      name = re.match(r"(?:rl_llm explain |\w+\.)(\w+)", own)[1]
      parts += [(own, (topics if own.startswith("rl_llm ") else experiments)[name])]
      parts += [(after, anyones)]
    for part, known in parts:
      for flag in re.findall(r"(?<![\w-])--([a-z][\w.-]*\w)", part):
        if flag not in known | FOREIGN_FLAGS:
          unknown.append(flag)
  return unknown


def unknown_names(text):
  """Dotted names below rl_llm and experiments that are neither a module nor something in one."""
  dotted = re.findall(r"\b(?:rl_llm|experiments)(?:\.[A-Za-z_]\w*)+", text)
  return [each for each in dotted if not each.endswith(".py") and not exists(each)]


def exists(dotted):
  try:
    importlib.import_module(dotted)
    return True
  except ImportError:
    parent, _, last = dotted.rpartition(".")
    return bool(parent) and last in vars(importlib.import_module(parent))


def blocks(text):
  """The Python programs of a guide by the file name in their first line."""
  found = re.findall(r"^```python\n# (\w+\.py)\n(.*?)^```", text, flags=re.MULTILINE | re.DOTALL)
  return dict(found)


# Pages whose examples take the longest; what they call has its own examples and tests.
LONG = {f"docs/{page}.md" for page in ("design", "algorithms", "estimators")} | {
  f"docs/guide/{page}.md" for page in ("collapse", "entropy", "ppo")
}


@pytest.mark.parametrize(
  "path",
  [
    pytest.param(path, id=name(path), marks=[pytest.mark.slow] if name(path) in LONG else [])
    for path in GUIDES
  ],
)
def test_examples(path):
  result = doctest.testfile(str(path), module_relative=False, parser=Parser())
  written = re.findall(r"^ *>>>", path.read_text(encoding="utf-8"), flags=re.MULTILINE)
  assert result.attempted == len(written) > 0
  assert result.failed == 0, f"{result.failed} of {result.attempted} examples failed"


@pytest.mark.parametrize("path", PAGES, ids=name)
def test_what_is_named_exists(path):
  text = path.read_text(encoding="utf-8")
  assert not missing_paths(text)
  assert not unknown_flags(text)
  assert not unknown_names(text)


def test_an_example_in_a_fence_is_run_and_has_the_number_of_its_line(tmp_path, capsys):
  page = tmp_path / "page.md"
  page.write_text("# A\n\n```pycon\n>>> 1\n1\n```\n```pycon\n>>> 1 + 1\n3\n```\n3\n")
  result = doctest.testfile(str(page), module_relative=False, parser=Parser())
  assert (result.failed, result.attempted) == (1, 2)
  assert f'File "{page}", line 8' in capsys.readouterr().out


def test_the_rules_themselves():
  text = "`rl_llm/kl.py`, tests/no.py, [a](docs/no.md)."
  assert missing_paths(text) == ["tests/no.py", "docs/no.md"]
  assert unknown_flags("--model=tiny --loss.clip_hi=1 --no-deps a--b") == ["loss.clip_hi"]
  assert unknown_flags("python -m experiments.sft --packing=1 --kl.coef=1") == ["kl.coef"]
  assert unknown_flags("`-m experiments.sft --seed=1`, `--kl.coef=1` and `--x.y`") == ["x.y"]
  assert unknown_flags("-m experiments.sft \\\n  --seed=1 \\\n  --kl.coef=1") == ["kl.coef"]
  assert unknown_flags("-m rl_llm explain ppo --p_new=1 --beta=1") == ["beta"]
  assert unknown_flags("--kl.coef=1: -m benchmarks.rollout --runs=3 --lr=1") == ["lr"]
  assert unknown_names("rl_llm.kl.k3, rl_llm.kl.k4, rl_llm/kl.py") == ["rl_llm.kl.k4"]


def test_the_source_tree_names_every_module():
  tree = README.read_text(encoding="utf-8").partition("## Source tree")[2].partition("\n## ")[0]
  entries = set(tree.replace("rl_llm/", "").split())
  modules = [
    path.name + "/" * path.is_dir()
    for directory in ("rl_llm", "experiments")
    for path in (ROOT / directory).iterdir()
    if not path.name.startswith("_") and (path.suffix == ".py" or (path / "__init__.py").exists())
  ]
  assert [module for module in sorted(modules) if module not in entries] == []
  directories = ("rl_llm", "experiments", "launch", "benchmarks")
  known = {path.name for directory in directories for path in (ROOT / directory).rglob("*.py")}
  files = {entry.rpartition("/")[2] for entry in entries if entry.endswith(".py")}
  assert files - known == set()


def test_the_example_of_own_data(tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  programs = blocks((ROOT / "docs" / "running.md").read_text(encoding="utf-8"))
  for file in ("make_data.py", "reward.py"):
    (tmp_path / file).write_text(programs[file])
  runpy.run_path("make_data.py")
  task = load_task("jsonl:train.jsonl", reward_file="reward.py", held_out_fraction=0.3)
  assert len(task.held_out) == 18, "as the page says"
  problem = next(p for p in task.sample(0, 0, 20) if len(set(p.prompt)) == 4)
  right = problem.prompt[:3][::-1]
  with RewardPool(task.reward, workers=1) as pool:
    results = pool.score(
      [problem.prompt] * 3, [right, right + "x", right[::-1]], [problem.columns] * 3
    )
  # All three places; three of four; only the middle one when all three letters differ.
  assert [result.value for result in results] == [1.0, 3 / 4, 1 / 3]


def test_the_readme_example_of_the_losses(tmp_path):
  (tmp_path / "losses.py").write_text(blocks(README.read_text(encoding="utf-8"))["losses.py"])
  found = runpy.run_path(str(tmp_path / "losses.py"))
  # The first update: every ratio is 1, so the loss is minus the weighted mean advantage. The
  # good response has three of the five tokens, with advantages +-1/sqrt(2).
  assert float(found["loss"]) == pytest.approx(-(3 - 2) / 5 / 2**0.5, rel=1e-5)
