"""The cures that errors name without a flag, followed: not those of `ELSEWHERE`.

As in test_followed_advice.py, each `follow_...` brings an error about, does what it says, and sees
that this helps. The last test holds what was said against the texts of the sources.
"""

from __future__ import annotations

import ast
import contextlib
import dataclasses
import functools
import io
import json
import re
import shutil
import subprocess
import sys
import types
from concurrent.futures import ThreadPoolExecutor

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AbstractMesh, Mesh, NamedSharding, PartitionSpec

from experiments import evaluate
from launch import own_flags, report, results, run, state
from launch.backends import population as populations
from rl_llm import __main__, tasks
from rl_llm.losses import action_ids_of
from rl_llm.parallel import hosts, sharding
from rl_llm.policy import make_policy, save_hf, tiny_config
from rl_llm.policy.scalar_head import normal_head, with_head
from rl_llm.rewards import RewardPool, RewardSource, grading, layers, terms
from rl_llm.rollout import demonstrations, generate, row_keys
from rl_llm.rollout.reward_model import load_reward_model, save_reward_model
from rl_llm.rollout.sampling import SamplingConfig
from rl_llm.runs import bucket, checkpoint, comparison, reading, tracking, transcripts
from rl_llm.runs import config as configs
from rl_llm.runs.checkpoint import Checkpointer
from rl_llm.text.tokenizers import ByteTokenizer
from rl_llm.training.train_state import init_state
from rl_llm.training.update import make_update
from tests import advice, object_store
from tests.test_followed_advice import configured, refused, write
from tests.test_sharding import Device

# Modules whose cures other tests follow.
ELSEWHERE = ("rl_llm.policy", "rl_llm.data", "rl_llm.text", "rl_llm.tasks.environments")
# Texts by a part of "where: text": why no test here follows them.
NOT_FOLLOWED: dict[str, str] = {}

# Of Orbax, where a state cannot be read.
pytestmark = pytest.mark.filterwarnings("ignore:coroutine .* was never awaited")

W = {"w": jax.ShapeDtypeStruct((3,), jnp.float32)}


def follow_masks(said, path):
  ones = jnp.array([[0, 1, 1, 0, 1]])
  message = refused(said, action_ids_of, ones)
  wanted = re.search("pass `(.+)`", message)[1]
  assert wanted == "mask != 0"
  assert action_ids_of(ones != 0).tolist() == [[-1, 0, 0, -1, 1]]


def follow_names_that_a_grader_logs(said, path):
  fewer, shorter = grading.Log(1), grading.Log(1)
  for number in range(64):
    fewer.metric(str(number), 1.0)
  message = refused(said, fewer.metric, "64", 1.0)
  refused(said, shorter.metric, "x" * 101, 1.0)
  most, longest = map(int, re.search("at most ([0-9]+) names, of ([0-9]+)", message).groups())
  followed = grading.Log(1)
  for number in range(most):
    followed.metric(str(number).zfill(longest), 1.0)
  assert len(followed.reply()["metrics"]) == most


def follow_several_processes(said, path, monkeypatch):
  """Two processes' values, as `all_gather` brings them together."""
  given = [{"--seed": 3}, {"--seed": 4}]
  monkeypatch.setattr(hosts, "all_gather", lambda what, value: [value, given[1]])
  refused(said, hosts.assert_equal, "settings", given[0])
  given[1] = given[0]
  hosts.assert_equal("settings", given[0])


def follow_meshes(said, path, monkeypatch):
  def sizes(devices=8, slices=1, **given):
    found = [Device(n, slice_index=n % slices) for n in range(devices)]
    return tuple(sharding.make_mesh(devices=found, **given).shape.values())

  refused(said, sizes, data=-1, fsdp=-1)
  assert sizes(data=-1, fsdp=2) == (4, 2, 1)
  for given, cure, wanted in (
    ({"fsdp": 3}, {"fsdp": 4}, (2, 4, 1)),
    ({"fsdp": 4, "tensor": 4}, {"fsdp": 4, "tensor": 2}, (1, 4, 2)),  # Each divides 8, not both.
  ):
    message = refused(said, sizes, **given)
    assert int(re.search(r"product divides (\d+)", message)[1]) % np.prod([*cure.values()]) == 0
    assert sizes(**cure) == wanted
  refused(said, sizes, data=8, fsdp=2)
  assert sizes(data=4, fsdp=2) == (4, 2, 1)
  message = refused(said, sizes, data=1, fsdp=8, slices=2)
  times = int(re.search(r"choose a multiple of (\d+)", message)[1])
  assert sizes(data=times, fsdp=8 // times, slices=2) == (2, 4, 1)
  assert sizes(data=2 * times, fsdp=2, slices=2) == (4, 2, 1)

  def started(processes, **given):
    monkeypatch.setattr(jax, "process_count", lambda: processes)
    monkeypatch.setattr(jax, "devices", lambda: [Device(n, 0) for n in range(4 * processes)])
    return sharding.make_mesh(**given).size

  refused(said, started, 2, data=4)
  assert (started(2, data=8), started(1, data=4)) == (8, 4)


def follow_what_is_cut(said, path, monkeypatch):
  """Of devices that need not be there: what each would hold."""
  weights = {"mlp": {"up": {"weight": jax.ShapeDtypeStruct((4, 6), jnp.float32)}}}

  def parts(fsdp):
    mesh = AbstractMesh((1, fsdp, 1), sharding.AXES)
    placed = sharding.tree_shardings(weights, mesh)["mlp"]["up"]["weight"]
    return placed.shard_shape((4, 6))

  message = refused(said, parts, 4)
  size = int(re.search(r"choose a divisor of (\d+)", message)[1])
  for divisor in (n for n in range(1, size + 1) if size % n == 0):
    assert parts(divisor) == (4, 6 // divisor)
  monkeypatch.setattr(sharding, "_put", lambda x, placed: placed.shard_shape(x.shape))
  four = AbstractMesh((2, 2, 1), sharding.AXES)
  message = refused(said, sharding.shard_rows, {"x": np.zeros((6, 3))}, four)
  times = int(re.search(r"choose a multiple of (\d+)", message)[1])
  for n in (1, 2):
    assert sharding.shard_rows({"x": np.zeros((n * times, 3))}, four) == {"x": (n, 3)}


def follow_reward_files(said, path):
  file = path / "own.py"
  graded = functools.partial(pooled, RewardSource(str(file)), ["a", "bc"])
  refused(said, graded)  # There is no such file yet.
  code = (
    "def reward(completions, log_extra, **columns):\n"
    "  log_extra('length', {values})\n  return [float(len(c)) for c in completions]\n"
  )
  file.write_text(code.format(values="[len(completions)]"))
  assert "log_extra" in refused(said, graded)
  file.write_text(code.format(values="[len(c) for c in completions]"))
  assert [(x.value, x.extra) for x in graded()] == [(1.0, {"length": 1}), (2.0, {"length": 2})]
  go = path / "go"
  slow = f"import os, time\nwhile not os.path.exists({str(go)!r}): time.sleep(0.01)\n"
  file.write_text(slow + file.read_text())
  with ThreadPoolExecutor() as both:  # With a larger deadline it is there after the same second.
    patient = both.submit(graded, start_deadline=60)
    message = refused(said, graded, start_deadline=1)
    assert "give it less to do, or from Python a larger start_deadline" in message
    go.touch()
    assert patient.result()[1].value == 2.0
  go.unlink()  # With what it had to do it would now never end.
  file.write_text(file.read_text().removeprefix(slow))
  assert graded()[1].value == 2.0


def pooled(source, texts, **settings):
  with RewardPool(source, workers=1, **settings) as made:
    return made.score(["p"] * len(texts), texts, [{}] * len(texts), group_size=len(texts))


def follow_barriers(said, path, monkeypatch):
  file = path / "own.py"
  file.write_text("def reward(completions, **columns):\n  return [eval(c) for c in completions]\n")
  source = RewardSource(str(file), runs_text=True)
  with monkeypatch.context() as patch:  # A kernel without what is required.
    patch.setattr(layers, "REQUIRED", ("a moat",))
    refused(said, pooled, source, ["1 + 2"])
    with RewardPool(source, workers=1, allow_weak_sandbox=True) as made:
      assert made.score(["p"], ["1 + 2"], [{}])[0].value == 3
      active = made.active_layers()
  if set(layers.REQUIRED) <= set(active):  # Such a Linux.
    assert pooled(source, ["1 + 2"])[0].value == 3


def follow_answers(said, path):
  """Rows without an answer; with one, in either column; and a task that has answers."""
  (path / "own.py").write_text("def reward(prompts, completions, **columns): return [0]")

  def learned(**columns):
    rows = ({"prompt": f"{n}+1="} | columns for n in range(4))
    spec = f"jsonl:{write(path / 'rows.jsonl', *rows)}"
    task = tasks.load_task(spec, reward_file=str(path / "own.py"), held_out_fraction=0.0)
    return demonstrations.demonstrations(task.sample(0, 0, 1))[0].completion

  for columns, cure, other in (
    ({}, {"completion": "two"}, {"answer": "two"}),
    ({"completion": " "}, {"completion": "two"}, {"answer": "two"}),
    ({"completion": "", "answer": "no"}, {"completion": "two", "answer": "no"}, {"answer": "two"}),
  ):
    message = refused(said, learned, **columns)
    assert "text in the column 'completion' or, without that one, 'answer'" in message
    assert learned(**cure) == "two" == learned(**other)
  [problem] = tasks.load_task("copy").sample(0, 0, 1)
  assert demonstrations.demonstrations([problem])[0].completion == problem.columns["answer"]


def follow_keys(said, path):
  """Traced alone: what is sampled is tested elsewhere."""
  small = small_config()
  tiny = make_policy(small)
  params = jax.eval_shape(tiny.init, jax.random.key(0))
  how = {"responses_per_prompt": 3, "max_new_tokens": 4, "eos_ids": (0,), "pad_id": 1}

  def sampled(keys):
    call = functools.partial(generate, sampling=SamplingConfig(), policy=tiny, **how)
    return jax.eval_shape(call, params, np.ones((2, 5), np.int32), np.array([5, 4], np.int32), keys)

  message = refused(said, sampled, row_keys(jax.random.key(0), 2, 1))
  count, *sizes = re.search(r"pass (\d+), from row_keys\(key, (\d+), (\d+)\)", message).groups()
  keys = row_keys(jax.random.key(0), *map(int, sizes))
  assert len(keys) == int(count)
  assert sampled(keys).tokens.shape == (6, 4)


def small_config():
  small = {"n_layers": 1, "width": 8, "n_heads": 2, "n_kv_heads": 1, "mlp_width": 8}
  return dataclasses.replace(tiny_config(259), tie_embeddings=False, **small)


def follow_reward_models(said, path):
  config = small_config()
  params = jax.jit(make_policy(config).init)(jax.random.key(0))
  save_hf(path / "policy", config, params)
  assert "save_reward_model wrote" in refused(said, load_reward_model, path / "policy")
  trunk = {name: leaf for name, leaf in params.items() if name != "unembed"}
  made = with_head(trunk, normal_head(config.width, jax.random.key(1)))
  save_reward_model(path / "model", config, made, ByteTokenizer(), center=0.75)

  def head():
    found = load_reward_model(path / "model").params["head"]
    np.testing.assert_array_equal(found["weight"], made["head"]["weight"])
    return found["bias"].tolist()

  file = path / "model/config.json"
  whole = file.read_text()
  entries = json.loads(whole)
  assert head() == [-0.75]
  file.write_text(json.dumps(entries | {"reward_center": "high"}))
  assert "restore it" in refused(said, head)
  file.write_text(whole)
  assert head() == [-0.75]
  # One of others: a ...ForSequenceClassification with one label, and no center.
  assert entries["architectures"][0].endswith("ForSequenceClassification")
  assert len(entries["id2label"]) == 1
  file.write_text(json.dumps({key: x for key, x in entries.items() if key != "reward_center"}))
  assert head() == [0.0]


def follow_checkpoint_directories(said, path):
  (path / "file").write_text("x")
  refused(said, Checkpointer, path / "file" / "run")
  empty = Checkpointer(path / "empty")
  refused(said, empty.restore, W)
  refused(said, empty.restore, W, 7)
  with Checkpointer(path / "run") as made:  # A writable path.
    for step in (1, 2):
      made.save(step, {"w": jnp.full(3, float(step))})

  def restored(name, *step):
    found, tree, _ = Checkpointer(path / name).restore(W, *step)
    assert tree["w"].tolist() == [found] * 3
    return found

  empty.save(5, {"w": jnp.full(3, 5.0)})  # From scratch, or with the right path.
  assert (restored("empty"), restored("run")) == (5, 2)
  assert (restored("run", 1), restored("run")) == (1, 2)  # A step that is there, or none.
  shutil.copytree(path / "run", path / "backup")
  for step in (1, 2):
    (path / "run" / str(step) / "manifest.json").write_text("{}")
  latest = Checkpointer(path / "run").latest
  refused(said, latest)
  shutil.rmtree(path / "run" / "1")
  shutil.copytree(path / "backup" / "1", path / "run" / "1")
  assert latest() == 1 == restored("run")
  (path / "run" / "1" / "manifest.json").write_text("{}")
  refused(said, Checkpointer(path / "run").latest)
  shutil.rmtree(path / "run")
  assert Checkpointer(path / "run").latest() is None


def follow_states(said, path):
  """Leaves that are no arrays, and names that clash."""
  one, two = jnp.ones(2), jnp.zeros(2)

  def saved(name, tree, extra=None):
    Checkpointer(path / name).save(1, tree, extra)
    _, found, extra = Checkpointer(path / name).restore(jax.eval_shape(lambda: tree))
    return jax.tree.map(lambda x: x.tolist(), found), extra

  refused(said, saved, "a", {"w": one, "beta": 0.5})
  assert saved("b", {"w": one, "beta": jnp.asarray(0.5)})[0] == {"w": [1, 1], "beta": 0.5}
  assert saved("c", {"w": one}, {"beta": 0.5}) == ({"w": [1, 1]}, {"beta": 0.5})
  refused(said, saved, "a", {"a.b": one, "a": {"b": two}})
  assert saved("d", {"c": one, "a": {"b": two}})[0] == {"c": [1, 1], "a": {"b": [0, 0]}}
  refused(said, saved, "a", {"a/b": one, "a": two})
  assert saved("e", {"a/b": one, "c": two})[0] == {"a/b": [1, 1], "c": [0, 0]}
  assert not list((path / "a").iterdir())


def follow_a_state_that_is_not_finite(said, path):
  """Descent on w^4, whose steps are far too long until the learning rate is lowered."""
  checkpointer = Checkpointer(path)
  checkpointer.save(0, {"w": jnp.arange(3.0)})

  def descend(rate):
    step, tree, _ = checkpointer.restore(W)
    w = tree["w"]
    for _ in range(20):
      w = w - rate * 4 * w**3
    checkpointer.save(step + 20, {"w": w})
    return np.asarray(w)

  refused(said, descend, 1.0)
  assert checkpointer.latest() == 0  # The last checkpoint.
  after = descend(0.01)
  assert checkpointer.latest() == 20 and 0 < after[2] < 1.5


def follow_a_state_that_cannot_be_read(said, path, monkeypatch):
  """No memory, and a layout that does not divide the shape."""
  checkpointer = Checkpointer(path)
  checkpointer.save(1, {"w": jnp.arange(3.0)})

  def read(count):
    mesh = Mesh(np.array(jax.devices()[:1] * count), ("data",))
    placed = NamedSharding(mesh, PartitionSpec("data"))
    wanted = jax.ShapeDtypeStruct((3,), jnp.float32, sharding=placed)
    return checkpointer.restore({"w": wanted})[1]["w"]

  def no_memory(*arguments):
    raise MemoryError("cannot allocate")

  with monkeypatch.context() as patch:
    patch.setattr(checkpoint.ocp, "load", no_memory)
    assert "Check the memory" in refused(said, read, 1)
  assert read(1).tolist() == [0, 1, 2]
  assert "the shardings of abstract_state divide" in refused(said, read, 2)
  assert read(1).tolist() == [0, 1, 2]


def follow_copies_in_buckets(said, path, monkeypatch):
  """In a store on loopback, of which one thing after another is wrong: each is in the message."""
  address, state = "s3://mine/runs/a", {"w": jnp.arange(3.0)}
  monkeypatch.setitem(bucket._RETRIES, "max_retries", 0)
  with object_store.served() as server:
    for name, value in server.environment.items():
      if name.startswith("AWS_"):
        monkeypatch.setenv(name, value)
    message = refused(said, Checkpointer, address)
    cure = re.search(r"give the address of a bucket as (\w+)", message)[1]

    def copied(run, to=address):
      return Checkpointer(path / run, **{cure: to})

    with copied("first") as first:
      first.save(4, state, {"seed": 1})
    assert "runs/a/4/manifest.json" in server.objects
    with monkeypatch.context() as patch:
      server.full = 0  # As for one whose credentials let it read alone.
      upload = functools.partial(first._copies.upload, path / "first", 4)
      messages = [refused(said, upload)]
      server.full = 10**6
      upload()
      messages.append(refused(said, copied, "second", "s3://yours/runs/a"))
      patch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:1")
      messages.append(refused(said, copied, "second"))
    for message in messages:
      assert message.endswith("; check the name, the network and the credentials")
    message = refused(said, copied("second").fetch, {"seed": 2})
    assert message == f"{address}/4 is another run's; give an address of this run alone"
    assert copied("second", "s3://mine/runs/b").fetch({"seed": 2}) is None
    assert copied("third").fetch({"seed": 1}) == 4  # Of the same run.
  assert Checkpointer(path / "third").restore(W)[1]["w"].tolist() == [0, 1, 2]


def follow_configs(said, path):
  def flags(frozen, value):
    made = dataclasses.make_dataclass("Config", [("steps", int, value)], frozen=frozen)
    return configs.flatten(made())

  helped = configs.option(4, "how many")
  assert "@dataclasses.dataclass(frozen=True)" in refused(said, flags, False, helped)
  assert "option(default, 'help')" in refused(said, flags, True, 4)
  assert flags(True, helped) == {"steps": 4}


def follow_tasks_without_held_out_problems(said, path):
  task = tasks.load_task("copy", held_out=0)
  message = refused(said, evaluate.choose_problems, evaluate.Config(), task)
  name = re.search(r"raise --copy\.(\w+)", message)[1]
  found = evaluate.choose_problems(evaluate.Config(), tasks.load_task("copy", **{name: 3}))
  assert len(found) == 3
  split = re.search(r"--(split)=(\w+) with --problems=N", message).groups()
  config = configured(evaluate, {"problems": 2}, [split])
  assert len(evaluate.choose_problems(config, task)) == 2
  own = dataclasses.replace(task, name="own")  # One that was made in Python.
  assert "hold some out" in refused(said, tasks.check_held_out, own, otherwise="another")
  tasks.check_held_out(dataclasses.replace(own, held_out=found), otherwise="another")


def extras():
  """What setup.py asks for, by extra."""
  for statement in ast.parse((advice.ROOT / "setup.py").read_text()).body:
    if isinstance(statement, ast.Assign) and ast.unparse(statement.targets[0]) == "EXTRAS":
      return ast.literal_eval(statement.value)


def follow_puzzles(said, path, monkeypatch):
  """The package is missing; and a kind of puzzle of which there are four, in its place."""
  load = functools.partial(tasks.load_task, "reasoning_gym:few")
  monkeypatch.setitem(sys.modules, "reasoning_gym", None)
  message = refused(said, load, held_out=2)
  extra, package = re.search(r"rl_llm\[(\w+)\]' \(or pip install ([\w-]+)\)", message).groups()
  assert package in [re.split("[><=]", wanted)[0] for wanted in extras()[extra]]

  def create(name, seed, size):
    return [{"question": f"{seed % 4}+1=", "answer": f"{seed % 4 + 1}"}]

  gym = types.SimpleNamespace(create_dataset=create)
  monkeypatch.setitem(sys.modules, "reasoning_gym", gym)
  few = types.SimpleNamespace(DATASETS=["few"])
  monkeypatch.setitem(sys.modules, "reasoning_gym.factory", few)
  assert len(load(held_out=2).held_out) == 2
  refused(said, load(held_out=4).sample, 0, 0, 1)
  task = load(held_out=3)
  [left] = {"0+1=", "1+1=", "2+1=", "3+1="} - {problem.key for problem in task.held_out}
  assert {problem.key for problem in task.sample(0, 0, 5)} == {left}


def follow_microbatches(said, path):
  def loss(params, batch, hparams):
    return jnp.sum(batch * params["w"]), {}

  def gradient(parts):
    update = make_update(loss, optax.identity(), microbatches=parts)
    before = init_state({"w": jnp.zeros(())}, optax.identity())
    after, _ = update(before, jnp.arange(6.0), {"learning_rate": jnp.float32(1)})
    return -float(after.params["w"])

  message = refused(said, gradient, 4)
  rows = int(re.search(r"the batch's (\d+) rows", message)[1])
  assert rows == 6 and [gradient(parts) for parts in (2, 3)] == [15, 15]


def follow_other_launchers(said, path):
  def hold():
    with populations.held([path]):
      return state.holder(state.newest_lease(path))

  with populations.held([path]):
    refused(said, hold)
  assert hold() == "alive"  # We waited.
  with subprocess.Popen(["sleep", "60"]) as other:
    try:
      who = {"pid": other.pid, "started": state._started(other.pid)}
      state.write_json(path / "leases/000009", state.this_process() | who)
      refused(said, hold)
    finally:
      other.kill()
  assert hold() == "alive"  # We stopped it.


def follow_pages_of_runs(said, path):
  """A page that compares runs, and the result of one that has not finished."""
  runs, page = [path / "a", path / "b"], path / "page.html"
  for place in runs:
    place.mkdir()
    (place / "config.json").write_text("{}")
    (place / "metrics.jsonl").write_text('{"step": 0, "reward_mean": 0.5}\n')
  with contextlib.redirect_stderr(io.StringIO()) as error:
    assert __main__.main(["report", str(runs[0]), "--output", str(page)]) == 2
  said.append(error.getvalue().removeprefix("error: ").rstrip())
  refused(said, comparison.write_comparison, [runs[0], runs[0]], page)
  assert __main__.main(["report", *map(str, runs), "--output", str(page)]) == 0 and page.exists()
  refused(said, reading.result, runs[0])
  (runs[0] / "result.json").write_text("{}")
  assert reading.result(runs[0]) == {}


def follow_episodes_of_runs(said, path):
  row = {"step": 3, "prompt": "1+1?", "turns": [{"text": "2", "tokens": 1}]}
  (path / "run").mkdir()
  write(path / "run/samples.jsonl", row)
  assert refused(said, transcripts.find, path).endswith("give a run's directory")
  assert transcripts.find(path / "run") == row


def follow_sweeps(said, path, monkeypatch):
  """A directory without a sweep, and one whose trial.json is broken."""
  (path / "sbatch").write_text("#!/bin/sh\n")
  (path / "sbatch").chmod(0o755)
  monkeypatch.setenv("PATH", str(path), prepend=":")
  file = path / "sweep.py"
  file.write_text(
    "EXPERIMENT = 'experiments.grpo'\n"
    "def sweep():\n  return [{'model': 'tiny', 'seed': n} for n in range(2)]\n"
  )
  workdir = path / "work"
  config = run.Config(sweep=str(file), workdir=str(workdir), backend="slurm", execute=True)
  reported = functools.partial(report.main, report.Config(workdir=str(workdir)))

  def seeds():
    return [row.config["seed"] for row in results.rows_of(results.read_trials(workdir), "")]

  refused(said, reported)
  assert run.main(config) == 0
  assert reported() == 0 and seeds() == [0, 1]
  for cure in ("again", "away"):
    trial = next(file for file in workdir.glob("*/trial.json") if '"seed": 0' in file.read_text())
    trial.write_text(trial.read_text()[:40])
    assert str(trial) in refused(said, reported)
    if cure == "again":
      assert run.main(config) == 0
    else:
      trial.parent.rename(path / "aside")
    assert reported() == 0 and seeds() == ([0, 1] if cure == "again" else [1])


def follow_several_rewards(said, path):
  for text, cure in (("a.py:f,task*much", "a.py:f,task*0.2"), ("task,task*2", "task*2")):
    refused(said, terms, text)
    assert terms(cure)


def follow_trackers(said, path, monkeypatch):
  """Of a tracker whose package is missing, and of one that does not open."""
  (path / "config.json").write_text("{}")
  (path / "metrics.jsonl").write_text("")
  for name, package in tracking.PACKAGES.items():
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    message = refused(said, tracking.check_installed, (name,))
    monkeypatch.undo()
    asked = re.search(r"pip install (\w+)", message)[1]
    assert asked == package == re.split("[><=]", extras()[name][0])[0]

  def opened(*names):
    with tracking.tracking(names, path, say=print) as track:
      track(0, {"loss": 1.0}, ())

  monkeypatch.setitem(tracking.TRACKERS, "wandb", lambda *given: 1 / 0)
  refused(said, opened, "wandb")
  opened()


def follow_flagfiles(said, path):
  refused(said, own_flags.translated, ["plan", f"--flagfile={path}/flags.txt"])
  (path / "flags.txt").write_text("--prompts_per_step=8\n")
  found = own_flags.translated(["plan", f"--flagfile={path}/flags.txt"])
  assert found == ["plan", "--prompts_per_step=8"]


def follow_mathematics(said, path, monkeypatch):
  file = write(path / "rows.jsonl", *({"prompt": f"{n}?", "answer": str(n)} for n in range(9)))
  load = functools.partial(tasks.load_task, f"jsonl:{file}", reward_function="math_verify")
  monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
  message = refused(said, load)
  assert re.search(r"pip install ([\w-]+)", message)[1] in extras()["math"][0]
  monkeypatch.setattr("importlib.util.find_spec", lambda name: True)
  assert load().reward.function == "math_verify"


CASES = {name: case for name, case in list(globals().items()) if name.startswith("follow_")}


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory):
  """What was said in all cases, and by case what went wrong."""
  return advice.follow(CASES, tmp_path_factory.mktemp)


@pytest.mark.parametrize("name", CASES)
def test_what_an_error_says_to_do_helps(outcomes, name):
  if name in outcomes[1]:
    raise outcomes[1][name]


def test_every_cure_was_followed(outcomes):
  texts = tuple(text for text in advice.cures() if not text.node[0].startswith(ELSEWHERE))
  assert len(texts) > 30, "they are found"
  left = advice.unsaid(texts, outcomes[0])
  assert not [text for text in left if not any(part in text for part in NOT_FOLLOWED)]
  assert {part for part in NOT_FOLLOWED if any(part in text for text in left)} == set(NOT_FOLLOWED)
  assert len(NOT_FOLLOWED) <= 1
