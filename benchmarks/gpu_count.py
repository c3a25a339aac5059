"""What an update and a token move and multiply on a GPU that is not there, by kind of kernel.

  python -m benchmarks.gpu_count --out=DIR               compiles what is not in DIR, and counts it
  python -m benchmarks.gpu_count --out=DIR --before=OLD  next to what an older version compiled
  python -m benchmarks.gpu_count --text=FILE             counts one compiled program

Needs NVIDIA's compiler (pip install ".[cuda]") and no GPU. Three programs, each of 2 and of 3
layers; what the third layer adds is taken once for each further layer of the model:

  update      of GRPO, as `benchmarks.gpu` times it: one microbatch
  microbatch  one of the four of a larger update
  decode      a token of --rows rows, halfway between the two rollouts that `benchmarks.gpu` times

An update multiplies with cuBLAS, as an H200 did, and decoding with Triton. Without a GPU to try
both on, the compiler would take Triton for all.

DIR holds the programs' texts, each as soon as it is compiled, so an interruption loses one. An
older commit is compiled by its own code:

  git worktree add ../old COMMIT
  cp benchmarks/gpu_count.py benchmarks/gpu_hlo.py ../old/benchmarks/
  (cd ../old && python -m benchmarks.gpu_count --out=/tmp/old)
  python -m benchmarks.gpu_count --out=/tmp/new --before=/tmp/old
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from pathlib import Path

from benchmarks import gpu
from benchmarks.gpu_hlo import Tally, count
from launch.models import MODELS, find_model
from rl_llm.errors import ConfigError
from rl_llm.files import write_atomically
from rl_llm.policy import TransformerConfig
from rl_llm.runs.chips import GPUS
from rl_llm.runs.config import option, run
from rl_llm.runs.flops import forward_flops

PROGRAMS = ("update", "microbatch", "decode")
LAYERS = (2, 3)  # of the models that are compiled
MICROBATCHES = 4


@dataclasses.dataclass(frozen=True)
class Config:
  """What is counted, and where its text is."""

  out: str = option("", "directory of the compiled texts")
  before: str = option("", "directory of an older version's texts; empty = none")
  text: str = option("", "file of one compiled program, counted as it stands; empty = none")
  predict: str = option("h200", f"the GPU to compile for: {', '.join(GPUS)}")
  model: str = option("qwen2.5-1.5b", "a name of launch.models, or a directory")
  rows: int = option(64, "decoded at once", min=gpu.GROUP)
  programs: tuple[str, ...] = option(PROGRAMS, f"which of {', '.join(PROGRAMS)}")


def settings(config: Config, model: str = "") -> gpu.Config:
  return gpu.Config(predict=config.predict, model=model or config.model, rows=(config.rows,))


def decoded_tokens() -> int:
  """Halfway between the lengths of the two rollouts that are timed."""
  return (gpu.SHORT + gpu.LONG) // 2


def compile_text(config: Config, program: str, layers: int) -> str:
  """The text of one of `PROGRAMS`, of a model of so many layers."""
  shape, model = find_model(config.model), f"{config.model}, {layers} layers"
  MODELS[model] = dataclasses.replace(
    shape, n_layers=layers, layer_types=shape.layer_types[:layers]
  )
  devices, _ = gpu.find_gpu(settings(config))
  if program == "decode":
    sizes = {"prompts": config.rows // gpu.GROUP, "new_tokens": decoded_tokens()}
    step = gpu.planned(settings(config), **sizes, model=model, rank=0)
  else:
    step = gpu.update_step(settings(config, model))
  if program == "microbatch":
    step = dataclasses.replace(step, prompts_per_step=MICROBATCHES * step.microbatch_prompts)
  lowered = gpu.lowerings(step, devices)["rollout" if program == "decode" else "update"].lower()
  triton = {"xla_gpu_enable_triton_gemm": program == "decode"}
  return lowered.compile(triton if devices[0].platform != "cpu" else None).as_text()


def file_of(directory: str, config: Config, program: str, layers: int) -> Path:
  """
  >>> file_of("texts", Config(), "decode", 2).name, file_of("texts", Config(), "update", 3).name
  ('decode-64-2.txt', 'update-3.txt')
  """
  rows = f"-{config.rows}" if program == "decode" else ""
  return Path(directory, f"{program}{rows}-{layers}.txt")


def of_all_layers(
  found: tuple[Mapping[str, Tally], Mapping[str, Tally]], layers: int
) -> dict[str, Tally]:
  """Of a model's layers, by those of the models that were compiled.

  A loss of 1 kernel and layers of 5:

  >>> two, three = {"products": Tally(1 + 2 * 5)}, {"products": Tally(1 + 3 * 5)}
  >>> of_all_layers((two, three), 28)["products"].kernels == 1 + 28 * 5
  True
  """
  two, three = found
  further = layers - LAYERS[0]
  return {
    kind: two.get(kind, Tally())
    .plus(three.get(kind, Tally()), times=further)
    .plus(two.get(kind, Tally()), times=-further)
    for kind in {**two, **three}
  }


def counted(directory: str, config: Config, program: str) -> dict[str, Tally]:
  """By the texts in a directory."""
  shape = find_model(config.model)
  texts = [file_of(directory, config, program, layers).read_text() for layers in LAYERS]
  two, three = (count(text, vocabulary=shape.vocab_size) for text in texts)
  return of_all_layers((two, three), shape.n_layers)


def formula(config: Config, program: str, shape: TransformerConfig) -> float:
  """Operations that a program must do: of real tokens, each once (`rl_llm.runs.flops`)."""
  if program != "decode":
    return gpu.update_flops(settings(config), shape)
  seen = [settings(config).prompt_tokens + decoded_tokens()] * config.rows
  one, two = (forward_flops(shape, seen, [tokens] * config.rows) for tokens in (1, 2))
  return two - one


def table(now: Mapping[str, Tally], before: Mapping[str, Tally] | None = None) -> list[str]:
  """Markdown, a line a kind, the one that moves most first.

  >>> old, new = {"casts": Tally(3.0, 2e9, 1e9)}, {"casts": Tally(1.0, 1e9, 1e9)}
  >>> print(table(new, old)[2])
  | casts | 3 → 1 | 2.00 → 1.00 | 1.00 | 0.00 |
  """

  def cells(tally: Tally) -> list[str]:
    rest = (tally.read / 1e9, tally.written / 1e9, tally.flops / 1e12)
    return [f"{tally.kernels:,.0f}", *(f"{each:.2f}" for each in rest)]

  def line(name: str, new: Tally, old: Tally) -> str:
    pairs = zip(cells(old), cells(new), strict=True)
    return f"| {name} | {' | '.join(a if a == b else f'{a} → {b}' for a, b in pairs)} |"

  def total(found: Mapping[str, Tally]) -> Tally:
    return Tally(*map(sum, zip(*found.values(), strict=True)))

  before = now if before is None else before
  most = {**before, **now}
  kinds = sorted(most, key=lambda kind: -(most[kind].read + most[kind].written))
  lines = [line(kind, now.get(kind, Tally()), before.get(kind, Tally())) for kind in kinds]
  lines.append(line("all", total(now), total(before)))
  return ["| kernels | number | GB read | GB written | TFLOP |", "|---|---|---|---|---|", *lines]


def report(config: Config) -> Iterator[str]:
  """A table a program; compiles what is missing."""
  shape = find_model(config.model)
  for program in config.programs:
    for layers in LAYERS:
      path = file_of(config.out, config, program, layers)
      if not path.exists():
        write_atomically(path, compile_text(config, program, layers).encode())
    before = counted(config.before, config, program) if config.before else None
    work = formula(config, program, shape) / 1e12
    yield f"{program}, {config.model}, {config.predict}; by formula {work:.2f} TFLOP"
    yield from ["", *table(counted(config.out, config, program), before), ""]


def main(config: Config) -> None:
  if config.text:
    found = count(Path(config.text).read_text(), vocabulary=find_model(config.model).vocab_size)
    print("\n".join(table(found)))
    return
  if not config.out:
    raise ConfigError("out", config.out, "a directory")
  for program in config.programs:
    if program not in PROGRAMS:
      raise ConfigError("programs", program, f"some of {', '.join(PROGRAMS)}")
  if config.rows % gpu.GROUP:
    raise ConfigError("rows", config.rows, f"a multiple of {gpu.GROUP}")
  Path(config.out).mkdir(parents=True, exist_ok=True)
  for line in report(config):
    print(line, flush=True)


if __name__ == "__main__":
  run(main, Config)
