"""Who may import whom, read from the source: importers of the losses must inherit nothing."""

import ast
import pathlib
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parent.parent
PACKAGE = ROOT / "rl_llm"

# The entries of rl_llm/: each row may import itself and the rows above it.
ROWS = (
  {"errors", "files", "checks"},
  {"masked", "weighting", "logprobs", "kl", "controllers", "presets", "advantages", "losses"},
  {"parallel", "text"},
  {"data", "rewards"},
  {"policy"},
  {"tasks", "runs", "explain"},
  {"rollout"},
  {"evaluation"},
  {"training"},
  {"__main__"},
)
ARRAYS_ONLY = {"jax", "numpy", "chex"}
UNSAFE_MODULES = {"pickle", "cPickle", "_pickle", "cloudpickle", "dill", "shelve", "marshal"}


def row(name):
  return next(number for number, names in enumerate(ROWS) if name in names)


def sources(*folders):
  return sorted(path for folder in folders for path in (ROOT / folder).rglob("*.py"))


def imports(tree):
  """The dotted names of all imported modules, lazy ones included; `from a import b` gives a.b."""
  for node in ast.walk(tree):
    if isinstance(node, ast.Import):
      yield from (alias.name for alias in node.names)
    elif isinstance(node, ast.ImportFrom):
      assert node.level == 0, "imports are absolute"
      yield from (f"{node.module}.{alias.name}" for alias in node.names)


def wrong_imports(name, tree):
  """What a module of rl_llm, known by its top-level name, imports but must not."""
  mine = row(name)
  for module in imports(tree):
    top, *rest = module.split(".")
    if top == "rl_llm":
      if rest and row(rest[0]) > mine:
        yield module
    elif top in ("experiments", "launch", "tests", "benchmarks"):
      yield module
    elif mine <= 1 and top not in ARRAYS_ONLY | sys.stdlib_module_names:
      yield module
    elif top == "flax" and name != "policy":
      yield module


def unsafe(tree):
  """Calls and imports that can run what a loaded file says."""
  for module in imports(tree):
    if module.split(".")[0] in UNSAFE_MODULES:
      yield module
  for node in ast.walk(tree):
    if isinstance(node, ast.Call):
      if isinstance(node.func, ast.Name) and node.func.id in ("eval", "exec"):
        yield node.func.id
      for keyword in node.keywords:
        if keyword.arg == "allow_pickle" and getattr(keyword.value, "value", None) is not False:
          yield "allow_pickle"


def test_a_lower_layer_never_imports_a_higher_one():
  for path in sources("rl_llm"):
    name = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
    tree = ast.parse(path.read_text())
    if name == "__init__":
      assert not list(imports(tree)), "rl_llm itself imports nothing"
    else:
      assert not list(wrong_imports(name, tree)), path


def test_nothing_loaded_is_run(record_property):
  paths = list(sources("rl_llm", "launch"))
  for path in paths:
    assert not list(unsafe(ast.parse(path.read_text()))), path
  record_property("F31", len(paths))


@pytest.mark.parametrize(
  "name, source, found",
  [
    ("masked", "from rl_llm import weighting", False),
    ("masked", "from rl_llm.policy import make_policy", True),
    ("losses", "import jax.numpy\nfrom rl_llm.masked import whiten\nimport functools", False),
    ("losses", "def f():\n  import optax", True),
    ("training", "import optax", False),
    ("training", "from flax import linen", True),
    ("policy", "from flax import linen", False),
    ("rewards", "from rl_llm.rollout import generate", True),
    ("runs", "from rl_llm.rewards import pool", False),
    ("runs", "import experiments.grpo", True),
    ("parallel", "from rl_llm.errors import UserError", False),
    ("errors", "from rl_llm.runs import config", True),
    ("evaluation", "from rl_llm.training import loop", True),
    ("training", "from rl_llm import evaluation", False),
  ],
)
def test_the_layer_rule_itself(name, source, found):
  assert bool(list(wrong_imports(name, ast.parse(source)))) == found


@pytest.mark.parametrize(
  "source, found",
  [
    ("import pickle", True),
    ("eval(x)", True),
    ("exec(x)", True),
    ("from dill import loads", True),
    ("np.load(f, allow_pickle=True)", True),
    ("np.load(f, allow_pickle=False)", False),
    ("loader.exec_module(m)", False),
    ("model.eval()", False),
  ],
)
def test_the_safety_rule_itself(source, found):
  assert bool(list(unsafe(ast.parse(source)))) == found


def test_importing_the_losses_loads_arrays_alone():
  program = (
    "import sys, rl_llm.losses, rl_llm.weighting, rl_llm.logprobs;"
    "import rl_llm.advantages, rl_llm.controllers, rl_llm.kl, rl_llm.presets;"
    "heavy = {'flax', 'optax', 'orbax', 'grain', 'rich'} & set(sys.modules);"
    "sys.exit(f'loaded {sorted(heavy)}' if heavy else 0)"
  )
  done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True)
  assert done.returncode == 0, done.stderr


def test_every_entry_has_a_row():
  entries = {path.stem for path in PACKAGE.iterdir() if path.suffix == ".py" or path.is_dir()}
  assert entries - {"__init__", "__pycache__"} == set().union(*ROWS)
