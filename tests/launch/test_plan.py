"""The plan: its shapes, what it reads off a compiled program, what it says to a person."""

from __future__ import annotations

import dataclasses
import functools
import json
import os
import subprocess
import sys
from types import SimpleNamespace

import jax
import numpy as np
import pytest

from experiments import grpo
from experiments.flags import Lora, SamplingMesh
from launch import chips, estimate, own_flags, plan, quiet
from launch.chips import NETWORK_CARD, find_chip
from launch.hlo import collectives
from launch.models import MODELS, find_model
from launch.programs import Lowering
from rl_llm import rollout
from rl_llm.errors import ConfigError, UserError
from rl_llm.parallel.sharding import ShardingError
from rl_llm.policy import make_policy
from rl_llm.rollout import teacher_forcing
from rl_llm.runs.chips import DEVICE_KINDS, GPUS, TPUS, Chip
from rl_llm.training.train_state import parameter_count

SMALL = plan.Config(
  topology="cpu:1",
  model="tiny",
  prompts_per_step=4,
  responses_per_prompt=2,
  microbatch_prompts=2,
  prompt_tokens=8,
  max_new_tokens=6,
  dtype="float32",
  mesh=SamplingMesh(),
)
TINY = find_model("tiny")


planned = functools.cache(plan.plan)


@functools.cache
def count():
  return parameter_count(jax.eval_shape(make_policy(TINY).init, jax.random.key(0)))


def by_name(config):
  return {program.name: program for program in planned(config)}


@pytest.mark.parametrize(
  ("name", "billions"),
  [
    ("qwen2.5-0.5b", 0.494),
    ("qwen2.5-1.5b", 1.54),
    ("qwen2.5-7b", 7.62),
    ("qwen2.5-32b", 32.8),
    ("qwen2.5-72b", 72.7),
    ("llama-3.1-8b", 8.03),
    ("llama-3.1-70b", 70.6),
  ],
)  # As their model cards count them.
def test_models_have_as_many_parameters_as_they_say(name, billions):
  assert estimate.count_parameters(MODELS[name])[0] / 1e9 == pytest.approx(billions, rel=0.005)


def test_parameters_are_counted_of_one_layer_for_all():
  assert estimate.count_parameters(TINY)[0] == count()
  sliding = dataclasses.replace(
    TINY, n_layers=3, layer_types=("sliding", "full", "sliding"), sliding_window=2
  )
  shapes = jax.eval_shape(make_policy(sliding).init, jax.random.key(0))
  assert estimate.count_parameters(sliding) == (
    parameter_count(shapes),
    parameter_count(shapes["layers_2"]),
  )


def test_collectives_in_loops_count_as_often_as_these_run():
  text = """
%inner (p: bf16[4,8]) -> bf16[4,8] {
  ROOT %s = (bf16[1,8]{1,0}, bf16[4,8]{1,0:T(8,128)}) all-gather-start(bf16[1,8]{1,0} %p)
}
%fused (p: f32[8]) -> f32[8] {
  %q = f32[16]{0:T(16)} parameter(0)
  %x = f32[2]{0} reduce-scatter(f32[8]{0} %p), dimensions={0}
  %y = f32[4]{0} reduce-scatter(%q), dimensions={0}
}
%outer (p: f32[8]) -> f32[8] {
  %w = f32[8]{0} while(f32[8]{0} %p), body=%inner, backend_config={"known_trip_count":{"n":"5"}}
  %f = f32[8]{0} fusion(f32[8]{0} %w), kind=kLoop, calls=%fused
  %d = bf16[4,8]{1,0} all-gather-done(%s)
}
ENTRY %main.7 (x: f32[8]) -> f32[8] {
  %v = (f32[8]{0}, s32[]) while((f32[8]{0}, s32[]) %t), condition=%c, body=%outer
  %a = (f32[8]{0}, f32[3]{0}) all-reduce(f32[8]{0} %v, f32[3]{0} %u), to_apply=%sum
}
"""
  assert collectives(text, loop=3) == {
    "all-gather": (15, 15 * 64.0),
    "all-reduce": (1, 2 * 44.0),
    "reduce-scatter": (6, 3 * (32.0 + 64.0)),
  }


# The programs of each experiment.


def test_grpo_holds_weights_moments_and_a_batch(capsys):
  """On one device nothing is communicated, and moments stay where they are during a rollout."""
  programs = by_name(SMALL)
  assert list(programs) == ["update", "rollout"]
  update, rollout = programs.values()
  weights = 4 * count()
  assert not update.collectives and not rollout.collectives
  assert 3 * weights < update.arguments < 3 * weights + 4000
  assert weights < rollout.arguments < weights + 1000
  assert update.resident == 0 and 0 <= rollout.resident - 2 * weights < 100  # A few counters.
  assert update.temporaries > weights  # The gradient.
  print(*plan.table(SMALL, planned(SMALL), None), sep="\n")
  assert "tiny: 0.00B parameters on cpu:1" in capsys.readouterr().out


@pytest.mark.slow
def test_a_kl_holds_a_reference_and_reads_it():
  programs = by_name(dataclasses.replace(SMALL, kl_coef=0.1))
  weights = 4 * count()
  assert list(programs) == ["update", "rollout", "log-probs"]
  assert programs["update"].resident == weights
  assert weights < programs["log-probs"].arguments < weights + 1000
  assert 0 <= programs["log-probs"].resident - 3 * weights < 100
  assert programs["log-probs"].calls == 1


@pytest.mark.slow
def test_ppo_has_two_networks_or_two_heads():
  own = by_name(dataclasses.replace(SMALL, experiment="ppo"))
  assert list(own) == ["update", "value update", "values", "rollout"]
  weights, head = 4 * count(), 4 * (TINY.width + 1)
  assert own["update"].calls == 2  # Two minibatches a step, as experiments.ppo has it.
  for name in ("update", "value update"):
    total = own[name].arguments + own[name].resident
    assert 0 < total - 3 * (2 * weights + head) < 3000
  assert 2 * weights < own["values"].arguments < 2 * weights + head + 1000
  shared = by_name(dataclasses.replace(SMALL, experiment="ppo", value_trunk="shared"))
  assert list(shared) == ["update", "values", "rollout"]
  assert 0 < shared["update"].arguments - 3 * (weights + head) < 3000


@pytest.mark.slow
def test_reinforce_and_dpo_have_their_own():
  reinforce = by_name(dataclasses.replace(SMALL, experiment="reinforce"))
  assert list(reinforce) == ["update", "rollout"]
  dpo = by_name(dataclasses.replace(SMALL, experiment="dpo"))
  assert list(dpo) == ["update", "reference"]
  assert dpo["reference"].resident > 3 * 4 * count()
  assert dpo["update"].flops == pytest.approx(4 * dpo["reference"].flops)  # F, twice B, remat.


@pytest.mark.slow
def test_adapters_have_moments_and_weights_do_not():
  update, rollout = planned(dataclasses.replace(SMALL, lora=Lora(rank=1), kl_coef=0.1))[:2]
  assert update.arguments + update.resident < 1.2 * 4 * count()  # Nor is there a second reference.
  assert rollout.arguments + rollout.resident < 1.2 * 4 * count()


def test_the_formula_of_the_rollout_reads_weights_at_every_token():
  """Float32, one device: T tokens read all weights, and half of the cache on average."""
  keys = TINY.n_layers * TINY.n_kv_heads * TINY.head_dim * 8 * (8 + 3)
  np.testing.assert_allclose(by_name(SMALL)["rollout"].moved, 6 * 4 * (count() + 2 * keys))


def test_a_program_that_the_compiler_gives_up_does_not_fit(capsys):
  """libtpu raises where it has no room for temporaries; other errors are not about room."""

  def lower(said):
    def compile():
      raise jax.errors.JaxRuntimeError(said)

    return SimpleNamespace(compile=compile)

  def compiled(said):
    lowering = Lowering("gather", lambda: lower(said), 1, 1, 1.0, 2.0, 3e9)
    chips = np.array([SimpleNamespace(platform="tpu")])
    return plan.compile_program(lowering, SimpleNamespace(size=64, devices=chips))

  full = "RESOURCE_EXHAUSTED: Ran out of memory on HBM, the total memory required for HLO "
  program = compiled(full + "temporaries (120.02G) exceeds available HBM (95.74G).")
  assert program.temporaries == 120.02 * 2**30 and not plan.fits([program], TPUS["v5p"])
  said = capsys.readouterr().err
  assert "Ran out of memory on HBM" in said and "for 64 devices, about 2 min of CPU time" in said
  assert compiled("RESOURCE_EXHAUSTED: no room").temporaries == float("inf")
  with pytest.raises(jax.errors.JaxRuntimeError, match="INTERNAL"):
    compiled("INTERNAL: RET_CHECK failure")


# What a person is told.

CHIP = Chip(hbm=10e9, flops=1e12, bandwidth=1e9, network=1e8)
FITS = plan.Program("update", 2e9, 3e9, 0.0, {"all-gather": (4, 3e8)}, 1e12, 2e9, 1.0)


def test_the_limit_that_binds_is_named_and_so_is_what_to_change():
  assert FITS.times(CHIP) == {"compute": 1.0, "HBM": 2.0, "network": 3.0}
  lines = plan.table(SMALL, [FITS], CHIP)
  assert "update: at least 3.00 s, bound by network" in lines[-4]
  assert lines[-1] == "fits: 5.0 of 10 GB a chip (update)"
  lines = plan.table(SMALL, [FITS, FITS._replace(name="rollout", temporaries=9e9)], CHIP)
  assert "does NOT fit: the rollout needs 11.0 of 10 GB a chip" in lines[-2]
  assert "--prompts_per_step" in lines[-1]
  sliced = dataclasses.replace(SMALL, mesh=SamplingMesh(1, 8, 1))
  lines = plan.table(sliced, [FITS._replace(name="gather", output=9e9)], CHIP)
  assert "--mesh.gather=token" in lines[-1]
  lines = plan.table(SMALL, [FITS._replace(resident=7e9)], CHIP)
  assert lines[-1] == "try more devices along --mesh.fsdp, or --lora.rank=16"


def test_tokens_a_second_follow_from_the_bounds_and_the_assumption():
  """Two calls of 3 s and one of 4 s at half of the bound are 20 s for 4 x 2 x 6 tokens."""
  slow = FITS._replace(name="rollout", flops=4e12)
  config = dataclasses.replace(SMALL, efficiency=0.5)
  said = plan.throughput(config, [FITS._replace(calls=2), slow], CHIP)
  assert said == (
    "a step: at least 10.0 s; assuming 50% of the bounds, 20 s, 2 tokens sampled and trained on a "
    "second"
  )


def test_the_command_of_a_plan_gives_the_plan():
  config = dataclasses.replace(
    SMALL, remat=False, mesh=SamplingMesh(2, 4, 1), lora=Lora(rank=3), minibatches=1
  )
  command = plan.flags(config)
  for said in (
    "--topology=cpu:1",
    "--remat=false",
    "--mesh.data=2",
    "--mesh.fsdp=4",
    "--lora.rank=3",
    "--prompt_tokens=8",
    "--minibatches=1",
  ):
    assert said in command.split()
  assert plan.flags(plan.Config()) == "python -m launch.plan"


def test_figures_are_written_for_other_programs(tmp_path):
  path = tmp_path / "figures.json"
  plan.write_json(path, SMALL, [FITS])
  found = json.loads(path.read_text())
  assert found["programs"][0]["temporaries"] == 3e9 and "--model=tiny" in found["command"]


@pytest.mark.parametrize(
  ("changes", "said"),
  [
    ({"topology": "v9:4"}, "--topology=v9:4: must be one of v4, v5e, v5p, v6e with a shape"),
    ({"topology": "h100:2x4"}, "--topology=h100:2x4: must be one of"),
    ({"topology": "cpu:99"}, "--topology=cpu:99: must be as many devices as JAX sees"),
    ({"model": "gpt5"}, "--model=gpt5: must be a directory with a config.json, tiny, or qwen2.5"),
    ({"microbatch_prompts": 3}, "--microbatch_prompts=3: must be a divisor of prompts_per_step"),
    ({"lora": Lora(rank=2, targets="conv")}, "--lora.targets=conv: must be a pattern of weights'"),
  ],
)
def test_what_cannot_be_planned_is_refused(changes, said):
  with pytest.raises(ConfigError) as refused:
    plan.plan(dataclasses.replace(SMALL, **changes))
  assert said in str(refused.value)


def test_a_person_is_told_in_one_line():
  found = subprocess.run(
    [sys.executable, "-m", "launch.plan", "--topology=v9:4"], capture_output=True, text=True
  )
  assert found.returncode == 2 and "Traceback" not in found.stderr
  assert "--topology=v9:4: must be one of" in found.stderr


# By formula, and the search.

POD = dataclasses.replace(
  plan.Config(), topology="h100:8", prompts_per_step=64, microbatch_prompts=8, model="qwen2.5-1.5b"
)


@pytest.fixture
def no_cuda_plugin(monkeypatch):
  monkeypatch.setattr(chips, "_cuda_plugin", lambda: False)


def test_gpus_without_their_compiler_are_planned_by_formula_and_it_says_so(no_cuda_plugin):
  chip, number = find_chip("h100:8")
  assert chip == GPUS["h100"] and number == 8
  assert find_chip("h100:16")[0].network == NETWORK_CARD  # Two boxes.
  found = plan.plan(POD)
  assert [program.name for program in found] == ["update", "rollout"]
  parameters, _ = estimate.count_parameters(MODELS[POD.model])
  update, rollout = found
  assert update.arguments == pytest.approx(12 * parameters / 8)
  assert rollout.arguments == pytest.approx(2 * parameters)  # Gathered, in bfloat16.
  assert rollout.resident == pytest.approx(update.arguments)
  assert rollout.collectives == {"all-gather": (1, 2 * parameters)}
  by_token = dataclasses.replace(POD, mesh=SamplingMesh(1, 8, 1, gather="token"))
  _, rollout = plan.plan(by_token)
  assert rollout.arguments + rollout.resident == pytest.approx(update.arguments)
  assert rollout.collectives == {"all-gather": (1, POD.max_new_tokens * 2 * parameters)}
  lines = plan.table(POD, found, chip)
  assert lines[1].startswith("by formula, not compiled") and " - " in lines[3]
  with pytest.raises(ShardingError, match="fsdp=3 x tensor=1: does not divide 8 devices"):
    plan.plan(dataclasses.replace(POD, mesh=SamplingMesh(1, 3, 1)))


@pytest.mark.skipif(not chips._cuda_plugin(), reason="needs jax[cuda12]")
def test_gpus_are_compiled_for_where_there_is_a_compiler(tmp_path):
  """Two of them halve what each holds, and a fused kernel holds no scores."""

  def programs(attention):
    path = tmp_path / attention
    flags = [
      "--topology=h100:2",
      "--model=tiny",
      "--prompts_per_step=4",
      "--responses_per_prompt=2",
      "--microbatch_prompts=2",
      "--max_new_tokens=512",
      "--mesh.fsdp=2",
      f"--json={path}",
      f"--attention={attention}",
    ]
    subprocess.run([sys.executable, "-m", "launch.plan", *flags], check=True)
    found = [SimpleNamespace(**each) for each in json.loads(path.read_text())["programs"]]
    return {program.name: program for program in found}

  found, plain = programs("auto"), programs("xla")
  assert list(found) == ["update", "gather", "rollout"]
  assert found["update"].arguments == pytest.approx(12 * count() / 2, rel=0.2)
  assert found["update"].collectives and found["gather"].collectives
  assert found["update"].temporaries < plain["update"].temporaries


def test_a_gpu_is_described_to_the_compiler_as_the_table_of_limits_has_it():
  for kind, die in chips.DIES.items():
    limits = GPUS[kind]
    assert die.bandwidth == pytest.approx(limits.bandwidth, rel=0.05)
    assert die.memory == pytest.approx(limits.hbm, rel=0.08)
    assert die.name in DEVICE_KINDS and f"core_count: {die.cores} " in chips.target_config(die)


def test_part_of_a_box_beside_whole_ones_is_refused():
  with pytest.raises(ConfigError, match="--topology=h100:12: must be fewer than 8 GPUs or a mult"):
    chips.find_devices("h100:12")


def test_the_formula_halves_what_is_halved():
  """Twice the slices: half of weights and moments. Half the rows: half of what remat keeps."""
  shape = MODELS[POD.model]

  def update(fsdp, **changes):
    config = dataclasses.replace(POD, **changes)
    return estimate.estimate(config, shape, estimate.Sizes(1, fsdp, 1))[0]

  assert update(8).arguments == pytest.approx(update(4).arguments / 2)
  assert update(8).flops == pytest.approx(update(4).flops / 2)
  one, two = update(8, microbatch_prompts=8), update(8, microbatch_prompts=16)
  four = update(8, microbatch_prompts=32)
  assert four.temporaries - two.temporaries == pytest.approx(
    2 * (two.temporaries - one.temporaries)
  )
  assert update(8, lora=Lora(rank=8)).arguments == pytest.approx(update(8).arguments / 3)
  assert update(1).collectives["all-gather"] == (0, 0.0)


@pytest.mark.parametrize(
  ("experiment", "chunk"), [("grpo", rollout.CHUNK_SIZE), ("dpo", teacher_forcing.CHUNK_SIZE)]
)
def test_the_formula_counts_the_logits_that_the_update_of_the_experiment_holds(experiment, chunk):
  """Of a larger vocabulary it holds larger logits, three times, in addition to the cast weights."""
  config = dataclasses.replace(SMALL, experiment=experiment, lora=Lora(rank=2))
  small, large = (
    dataclasses.replace(TINY, vocab_size=size) for size in (TINY.vocab_size, TINY.vocab_size + 1000)
  )
  added = estimate.count_parameters(large)[0] - estimate.count_parameters(small)[0]
  found = [
    estimate.estimate(config, shape, estimate.Sizes(1, 1, 1))[0].temporaries
    for shape in (small, large)
  ]
  assert found[1] - found[0] == pytest.approx(4 * added + 3 * 4 * chunk * 1000)


@pytest.mark.slow
def test_a_search_orders_by_time_what_fits_and_compiles_a_few(monkeypatch, capsys):
  config = dataclasses.replace(POD, topology="v5e:4x4", candidates=2)
  chip = TPUS["v5e"]
  trials, tried = plan.candidates(config, chip)
  assert 2 < len(trials) < tried  # Some do not fit.
  seconds = [plan.step_seconds(plan.by_formula(t, MODELS[t.model]), chip) for t in trials]
  assert seconds == sorted(seconds)
  compiled = []

  def compile_it(trial):
    compiled.append(trial)
    return [FITS._replace(arguments=20e9 if len(compiled) == 1 else 2e9)]

  monkeypatch.setattr(plan, "plan", compile_it)
  found = plan.search(config, chip)
  assert compiled == trials[:2]
  assert [trial for trial, _ in found] == trials[1::-1]  # The first did not fit after all.
  said = capsys.readouterr().err
  assert f"{tried} meshes and microbatches, {len(trials)} fit by formula; compiling the best 2" in (
    said
  )
  with pytest.raises(ConfigError, match="by formula no mesh and no microbatch fits"):
    plan.search(dataclasses.replace(config, model="llama-3.1-70b"), chip)


# The microbatch, the command, an experiment's own flags, and the compiler's noise.


def test_the_default_microbatch_is_the_largest_that_fits_by_formula(capsys):
  config = plan.Config(topology="v5e:4x4", model="qwen2.5-1.5b")
  chosen = estimate.settled(config)
  chip, _ = find_chip("v5e:4x4")

  def update(size):
    each = dataclasses.replace(config, microbatch_prompts=size)
    return plan.by_formula(each, find_model("qwen2.5-1.5b"))[0].peak

  assert update(chosen.microbatch_prompts) <= chip.hbm < update(2 * chosen.microbatch_prompts)
  assert f"--microbatch_prompts={chosen.microbatch_prompts}, the most" in capsys.readouterr().err
  assert estimate.settled(chosen) == chosen
  small = estimate.settled(dataclasses.replace(SMALL, microbatch_prompts=0))
  assert small.microbatch_prompts == SMALL.prompts_per_step, "a CPU has no limit here"


def test_a_plan_that_fits_says_what_to_set():
  lines = plan.table(SMALL, [FITS], Chip(1e12, 1e12, 1e12, 1e12))
  (said,) = [line for line in lines if line.startswith("set: python -m experiments.grpo")]
  for flag in ("--microbatch_prompts=2", "--prompts_per_step=4", "--remat=true"):
    assert flag in said.split()
  config = grpo.Config(**{"microbatch_prompts": 2, "prompts_per_step": 4, "max_new_tokens": 6})
  assert config.updates.microbatches == 2


def test_an_experiment_s_own_flags_are_taken(tmp_path, capsys):
  lines = ["--task=copy", "--kl.coef=0.1", "--remat=false", "--max_prompt_tokens=64", "--seed=3"]
  (tmp_path / "flags.txt").write_text("\n".join(lines) + "\n")
  words = ["plan", f"--flagfile={tmp_path}/flags.txt", "--topology=v5e:2x2", "--nosuch=1"]
  assert own_flags.translated(words) == [
    "plan",
    "--kl_coef=0.1",
    "--remat=false",
    "--prompt_tokens=64",
    "--topology=v5e:2x2",
    "--nosuch=1",
  ]
  assert capsys.readouterr().err == "of no use to a plan: --task, --seed\n"
  pairs = ["plan", "--experiment=dpo", "--pairs_per_step=8", "--noscan_layers"]
  assert own_flags.translated(pairs)[2:] == ["--prompts_per_step=8", "--noscan_layers"]
  with pytest.raises(UserError, match="--flagfile=nowhere: no such file"):
    own_flags.translated(["plan", "--flagfile=nowhere"])


def test_the_compiler_s_noise_goes_to_a_file(capfd):
  with quiet.noise_in("v5e:2x2"):
    os.write(2, b"W0000 no such chip\n")
    print("compiling", file=sys.stderr)
  said = capfd.readouterr().err
  assert "no such chip" not in said and said.startswith("compiling\n")
  log = said.strip().rpartition(" ")[2]
  with open(log) as file:
    assert file.read() == "W0000 no such chip\n"
  os.unlink(log)
  with quiet.noise_in("v5e:2x2"):
    pass
  with quiet.noise_in("h100:8"):
    os.write(2, b"seen\n")
  os.write(2, b"and after\n")
  assert capfd.readouterr().err == "seen\nand after\n"


def test_a_failure_within_it_is_still_told(capfd):
  with pytest.raises(ValueError):
    with quiet.noise_in("v5e:2x2"):
      raise ValueError
  print("here", file=sys.stderr)
  assert capfd.readouterr().err == "here\n"
