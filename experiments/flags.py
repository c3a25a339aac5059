"""Groups of flags that several experiments share; an experiment may change their defaults.

Groups declared in a `Config` as `inline(...)` have no prefix: `--seed`, `--task`. Each group checks
itself: `rl_llm.runs.config.check(config)` calls its `check` before anything is loaded.
"""

from __future__ import annotations

import dataclasses
from typing import Any, Literal

import numpy as np

from experiments import agents, terms
from rl_llm import losses, presets
from rl_llm.advantages.group import GROUP_ADVANTAGES
from rl_llm.data.formats import COLUMNS
from rl_llm.data.jsonl import MAX_ROWS
from rl_llm.errors import ConfigError
from rl_llm.policy.attention import AttentionName
from rl_llm.rewards import terms as terms_of
from rl_llm.rollout import shaping
from rl_llm.runs import bucket, tracking
from rl_llm.runs.config import check_divides, inline, option, or_function
from rl_llm.runs.keywords import arrays, chosen, keyword_group
from rl_llm.tasks import FORMS, TASKS, task_family
from rl_llm.training import control, objective

ATTENTION_HELP = "kernel for rows of many keys: cudnn on a GPU, splash on a TPU, xla for none"
KL_ESTIMATORS = Literal["k1", "k2", "k3"]
WEIGHTINGS = (
  *("token_mean", "sequence_mean", "sequence_sum", "constant_length", "prompt_mean"),
  "length_power",
)
TOKEN_WEIGHTINGS = Literal["token_mean", "sequence_mean", "sequence_sum", "prompt_mean"]
Agents, Environments, of_episodes = agents.Agents, agents.Environments, agents.overrides
PRESETS = Literal["none", *presets.SOURCES, *presets.REFUSED]

# What every run has.


@dataclasses.dataclass(frozen=True)
class Checkpoint:
  """What survives a crash."""

  VOLATILE = True

  every: int = option(10, "steps between checkpoints; the last one is always written", min=1)
  keep: int = option(
    2, "checkpoints kept; with two, a run whose newest one is damaged resumes from the other", min=1
  )
  best: bool = option(
    False, "keep the checkpoint of the best held-out accuracy too; it is saved as it is evaluated"
  )
  copy_to: str = option(
    "",
    "gs://BUCKET/PATH or s3://BUCKET/PATH: each checkpoint is copied there; a run whose directory "
    "has none begins with the newest copy",
  )
  keep_at_end: int | None = option(
    None,
    "checkpoints kept of a finished run: none = all of keep, 0 = nothing, so that it has only its "
    "record and what --export writes",
    min=0,
  )

  def check(self, config: Any) -> None:
    """Refuses to keep the best of what is never evaluated, and addresses of no bucket."""
    if self.copy_to and not bucket.is_address(self.copy_to):
      allowed = "gs://BUCKET/PATH or s3://BUCKET/PATH"
      raise ConfigError("checkpoint.copy_to", self.copy_to, allowed)
    if self.best and not config.eval.every:
      raise ConfigError("checkpoint.best", "true", "left out with --eval.every=0")


@dataclasses.dataclass(frozen=True)
class Distributed:
  """Several processes, on one host or many, train one model; each is started with this command."""

  VOLATILE = True

  on: bool = option(
    False, "--distributed for short: join the others, found by Slurm, Open MPI, GKE or the TPU VM"
  )
  coordinator: str = option(
    "", "HOST:PORT of process 0; empty = as Slurm, Open MPI, GKE or the TPU VM says"
  )
  processes: int = option(
    0, "number of processes; 0 = as Slurm, Open MPI, GKE or the TPU VM says", min=0
  )
  process_id: int = option(
    -1, "number of this process, from 0; -1 = as Slurm, Open MPI, GKE or the TPU VM says", min=-1
  )
  bind: str = option(
    "",
    "address on which process 0 listens; empty = that of the coordinator, where it is this "
    "machine's, else all",
  )
  heartbeat: int = option(
    100, "seconds without a sign of life after which a process is lost, and the others end", min=1
  )
  wait: int = option(
    600,
    "seconds that processes wait for one that is late, at most: at the start, at a step, for "
    "grades, at a checkpoint",
    min=1,
  )

  def joined(self) -> dict[str, Any] | None:
    """The keywords of `rl_llm.parallel.hosts.initialize`; None for a process that trains alone.

    Raises:
      ConfigError: other processes are described, and not to be joined.
    """
    keywords = dataclasses.asdict(self)
    if keywords.pop("on"):
      return keywords
    for name in ("coordinator", "processes", "process_id"):
      if keywords[name] != getattr(Distributed(), name):
        raise ConfigError(f"distributed.{name}", keywords[name], "left out without --distributed")
    return None


@dataclasses.dataclass(frozen=True)
class Record:
  """The run: its directory, its seed, the processes that share it."""

  workdir: str = option(
    "",
    "its directory; empty = runs/<experiment>-<model>-<task or data>-seed<seed>, and what differs "
    "from the defaults",
    volatile=True,
  )
  code: Literal["same", "changed"] = option(
    "same",
    "changed = resume although the experiment's own module, or a Python file that a setting "
    "names, is not what the run began with",
    volatile=True,
  )
  seed: int = option(0, "random seed; the tiny model's weights depend on it too", min=0)
  compile_cache: str = option(
    "auto",
    "directory that keeps compiled programs for later runs; auto = in your own cache "
    "directory, none = nowhere",
    volatile=True,
  )
  distributed: Distributed = Distributed()

  def check(self, config: Any) -> None:
    """Refuses the address of a bucket as the run's directory."""
    if "://" in self.workdir:
      raise ConfigError("workdir", self.workdir, bucket.NO_DIRECTORY, "give --workdir=DIR")


@dataclasses.dataclass(frozen=True)
class Run(Record):
  """The run: how long, where, and what it leaves."""

  steps: int = option(
    16,
    "training steps; each takes a batch and updates the weights with it",
    min=1,
    # A falling learning rate depends on where it is to end.
    volatile=lambda config: config.optimizer.schedule == "constant",
  )
  profile: int = option(
    0,
    "steps to trace with jax.profiler, from the second of this start on, since the first "
    "compiles; written to WORKDIR/profile; 0 = none",
    min=0,
    volatile=True,
  )
  checkpoint: Checkpoint = Checkpoint()
  track: tuple[str, ...] = option(
    (),
    "trackers that get every row of metrics.jsonl and some samples too, each with its package",
    choices=tracking.TRACKERS,
    volatile=True,
  )
  init_from: str = option(
    "", "begin with the weights of RUN or RUN@STEP, a run's directory and a step it has kept"
  )
  init_moments: bool = option(
    False, "with --init_from: begin with the optimizer's moments of that run too"
  )

  def check(self, config: Any) -> None:
    """Refuses moments of no run, or of adapters that are merged, and a tracker without package."""
    if bucket.is_address(self.workdir):
      fix = f"give --workdir=DIR --checkpoint.copy_to={self.workdir}"
      raise ConfigError("workdir", self.workdir, bucket.NO_DIRECTORY, fix)
    super().check(config)
    tracking.check_installed(self.track)
    if self.init_moments and not self.init_from:
      raise ConfigError("init_moments", "true", "left out without --init_from=RUN")
    if self.init_moments and config.model.lora.rank:
      fix = "its adapters begin anew, on top of the run's weights"
      raise ConfigError("init_moments", "true", "left out with --lora.rank", fix)


@dataclasses.dataclass(frozen=True)
class ExportedRun(Run):
  """The run: how long it trains, and what it leaves."""

  export: bool = option(
    False,
    "write the trained model as a Hugging Face directory, WORKDIR/model; with --lora.rank "
    "the adapters alone too, WORKDIR/adapter",
    volatile=True,
  )


@dataclasses.dataclass(frozen=True)
class SampledRun(ExportedRun):
  """The run: how long it trains, what it shows and leaves."""

  samples_every: int = option(
    5, "steps between sample tables, where it samples", min=1, volatile=True
  )


@dataclasses.dataclass(frozen=True)
class Optimizer:
  """The optimiser."""

  NOTED = ("learning_rate",)

  name: Literal["adamw", "adafactor", "muon", "sgd"] = option(
    "adamw", "direction of an update; muon = Adam for embeddings and vectors, sgd = momentum b1"
  )
  learning_rate: float = option(1.5e-5, "learning rate after the warm-up", above=0)
  schedule: Literal["constant", "linear", "cosine"] = option(
    "constant", "how the learning rate falls to 0 by the last step; constant = it does not"
  )
  warmup_steps: int = option(0, "steps over which the learning rate rises from 0", min=0)
  b1: float = option(0.9, "Adam's decay rate of the mean gradient", min=0, below=1)
  b2: float = option(0.95, "Adam's decay rate of the mean squared gradient", min=0, below=1)
  eps: float = option(1e-8, "added to the root of the mean squared gradient", above=0)
  weight_decay: float = option(0.0, "decoupled weight decay", min=0)
  decayed: Literal["matrices", "layers", "all"] = option(
    "matrices", "what decays; layers = matrices without embeddings"
  )
  max_grad_norm: float = option(1.0, "gradients of a larger norm are scaled down; 0 = never", min=0)
  mu_dtype: Literal["float32", "bfloat16"] = option("float32", "dtype of Adam's mean gradient")
  max_skipped: int = option(3, "updates in a row with NaN or infinity after which to stop", min=1)
  spike_window: int = option(
    0,
    "skip updates whose gradient's norm is above mean + spike_sigma * std of this many before; "
    "0 = never",
    min=0,
  )
  spike_sigma: float = option(6.0, "standard deviations; see spike_window", above=0)

  def check(self, config: Any) -> None:
    """Refuses a warm-up that never ends, and numbers that the optimiser does not have."""
    if self.spike_window == 1:
      raise ConfigError("optimizer.spike_window", 1, "0, or at least 2")
    if not self.spike_window and self.spike_sigma != Optimizer().spike_sigma:
      allowed = "left out without --optimizer.spike_window"
      raise ConfigError("optimizer.spike_sigma", self.spike_sigma, allowed)
    unused = {"adafactor": ("b1", "b2", "eps", "mu_dtype"), "sgd": ("b2", "eps")}
    for name in unused.get(self.name, ()):
      if (value := getattr(self, name)) != getattr(Optimizer(), name):
        raise ConfigError(f"optimizer.{name}", value, f"left out with --optimizer={self.name}")
    if self.decayed != "matrices" and not self.weight_decay:
      allowed = "left out without --optimizer.weight_decay"
      raise ConfigError("optimizer.decayed", self.decayed, allowed)
    steps = config.run.steps
    if self.schedule != "constant" and self.warmup_steps >= steps:
      raise ConfigError("optimizer.warmup_steps", self.warmup_steps, f"less than steps ({steps})")


# The model and its devices.


@dataclasses.dataclass(frozen=True)
class Lora:
  """Train thin matrices next to the weights instead of the weights."""

  rank: int = option(0, "rank of the adapters; 0 trains all weights instead", min=0)
  alpha: float = option(32.0, "the change is multiplied by alpha / rank", above=0)
  targets: str = option("attention|mlp", "pattern found in the paths of the weights to adapt")
  adapter: str = option(
    "",
    "begin with the adapters of this directory, such as a run's WORKDIR/adapter or one that "
    "PEFT wrote, of this rank, alpha and targets; empty = new ones",
  )


@dataclasses.dataclass(frozen=True)
class Weights:
  """The model."""

  model: str = option(
    "smollm2",
    "smollm2, tiny, a Hugging Face directory, a .gguf file, OWNER/NAME on the Hugging Face Hub, or "
    "RUN or RUN@STEP: a run's directory, and which of its checkpoints",
  )
  fetch: bool = option(
    False,
    "download --model=OWNER/NAME from huggingface.co where this machine does not have it",
    volatile=True,
  )
  dtype: Literal["float32", "bfloat16"] = option(
    "float32", "dtype of the arithmetic; weights, their gradients' sum and log-probs stay float32"
  )
  matmul_precision: Literal["auto", "default", "high", "highest"] = option(
    "auto",
    "float32 products: highest = float32, default = what the device does fastest, TF32 "
    "on a GPU and bfloat16 on a TPU, high = between them; auto = highest with --dtype=float32",
  )


@dataclasses.dataclass(frozen=True)
class Model(Weights):
  """The model and its arithmetic."""

  remat: bool = option(False, "compute activations twice instead of holding them")
  scan_layers: bool = option(False, "compile one layer and loop over all: compiles sooner")
  attention: AttentionName = option("auto", ATTENTION_HELP)
  lora: Lora = Lora()


@dataclasses.dataclass(frozen=True)
class MeshSizes:
  """How the devices share the work; -1 = the devices that the other axes leave, one axis only."""

  # A run resumes on whatever devices it finds: they change what is computed by rounding alone.
  VOLATILE = True

  data: int = option(-1, "copies of the weights, each with other rows of the batch", min=-1)
  fsdp: int = option(1, "the same, but each matrix is cut over these devices", min=-1)
  tensor: int = option(1, "devices that share the heads and the MLP of the same rows", min=-1)


@dataclasses.dataclass(frozen=True)
class SamplingMesh(MeshSizes):
  """How the devices share the work; -1 = the devices that the other axes leave, one axis only."""

  gather: Literal["step", "token"] = option(
    "step",
    "when sampling gathers the matrices that fsdp cuts: all at once, if a device can hold "
    "them (divided by tensor), or at every token, which takes longer",
  )


# Problems, prompts and responses.

_Families = dataclasses.make_dataclass(
  "Families", [(name, kind, kind()) for name, (kind, _) in TASKS.items()], frozen=True
)


@dataclasses.dataclass(frozen=True)
class Task:
  """The task, and its grader."""

  task: str = or_function(
    option("arithmetic", f"{', '.join(FORMS)}; none, where an experiment has --data, is no task")
  )
  reward_deadline: float = option(5.0, "seconds that a call of a grader may take", above=0)
  reward_isolation: Literal["auto", "sample", "group", "batch"] = option(
    "auto", "responses of one call of a grader; auto = group for a reward file, else sample"
  )
  reward_files: tuple[str, ...] = option(
    (),
    "paths that a reward file reads while it grades; modules it imports at first need no mention",
  )
  reward_sandbox: Literal["full", "weak"] = option(
    "full",
    "full refuses a grader that runs responses where network or files are open to it; weak runs it",
    volatile=True,
  )
  reward_workers: int = option(2, "grader processes", min=1, volatile=True)
  families: _Families = inline(_Families())

  def check(self, config: Any) -> None:
    """Refuses a task that there is not."""
    given = getattr(config, "agents", Environments()).given
    if not (given and self.task == agents.OWN_TASK) and (
      self.task != "none" or not hasattr(config, "data")
    ):
      task_family(self.task)


@dataclasses.dataclass(frozen=True)
class Overlong:
  """DAPO's soft penalty for length, added to the rewards that are trained on."""

  cache: float = option(
    0.0,
    "tokens before the limit over which the penalty grows from 0 to 1, or below 1 a share of the "
    "limit; 0 = no penalty",
    min=0,
  )
  limit: int = option(
    0, "tokens from which a response has the full penalty; 0 = max_new_tokens", min=0
  )
  coef: float = option(1.0, "factor of the penalty, in units of reward", above=0)

  def check(self, config: Any) -> None:
    """Refuses a penalty that begins before the first token."""
    limit = self.limit or config.prompts.max_new_tokens
    if self.cache > limit:
      raise ConfigError("overlong.cache", f"{self.cache:g}", f"at most the limit ({limit} tokens)")
    for name in ("limit", "coef"):
      if not self.cache and getattr(self, name) != getattr(Overlong(), name):
        allowed = "left out without --overlong.cache"
        raise ConfigError(f"overlong.{name}", getattr(self, name), allowed)

  def penalty(self, config: Any) -> shaping.Overlong | None:
    """The penalty, with its limit in tokens; None if there is none."""
    limit = self.limit or config.prompts.max_new_tokens
    cache = self.cache if self.cache >= 1 else self.cache * limit
    return shaping.Overlong(limit, cache, self.coef) if cache else None


@dataclasses.dataclass(frozen=True)
class Dynamic:
  """Dynamic sampling: which groups of responses a step is made of."""

  groups: Literal["any", "drop", "informative"] = option(
    "any",
    "drop = leave out groups whose responses do not differ in reward; informative = sample more "
    "problems in their place",
  )
  max_rounds: int = option(
    4, "rounds of prompts_per_step problems that informative samples, at most", min=1
  )


@dataclasses.dataclass(frozen=True)
class TrainedTask(Task):
  """The task, and its grader."""

  laps: bool = option(
    False, "take the rows of a task's file in turn, each once a lap; else each step draws from all"
  )

  def check(self, config: Any) -> None:
    """Refuses laps of a file whose rows come in turn anyway, and such as would skip rows."""
    super().check(config)
    data = getattr(getattr(config, "data", None), "data", "task")
    if self.laps and data not in ("task", "on_policy"):
      allowed = "left out with a file of examples, whose rows always come in turn"
      raise ConfigError("laps", "true", allowed)
    for name, value, allowed in (
      ("dynamic.groups", getattr(self, "dynamic", Dynamic()).groups, ("any", "drop")),
      ("overlong_prompt", config.prompts.overlong_prompt, ("error", "truncate_left")),
    ):
      if self.laps and value not in allowed:
        why = "rows would be skipped, or come twice"
        raise ConfigError(name, value, f"{' or '.join(allowed)} with --laps", why)


@dataclasses.dataclass(frozen=True)
class JudgedTask(TrainedTask):
  """The task, and the reward that training uses."""

  reward: str = or_function(
    option(
      "task",
      "reward that training uses: task = the grader's, model:<dir> = a reward model's score, "
      "FILE.py:<function> = that function's, in the place of the grader; several, added: "
      "task,FILE.py:<function>*0.2",
    )
  )


@dataclasses.dataclass(frozen=True)
class RewardedTask(JudgedTask):
  """The task, and the reward that training uses."""

  overlong: Overlong = Overlong()
  dynamic: Dynamic = Dynamic()


@dataclasses.dataclass(frozen=True)
class Layout:
  """How a conversation becomes tokens."""

  prompt_format: Literal["auto", "chat", "plain"] = option(
    "auto",
    "chat = the model's own chat template, plain = bare text; auto = chat if it has one, "
    "and plain for a file of bare texts",
  )
  system_prompt: str | None = option(
    None, "system message of every prompt; none = what the chat template writes without one"
  )


@dataclasses.dataclass(frozen=True)
class Prompts:
  """Limits of prompts and responses."""

  max_prompt_tokens: int = option(512, "tokens a prompt may have", min=1)
  overlong_prompt: Literal["error", "drop", "truncate_left"] = option(
    "error", "what to do with longer prompts"
  )
  max_new_tokens: int = option(16, "tokens a response may have, at most", min=1)
  layout: Layout = inline(Layout())


@dataclasses.dataclass(frozen=True)
class Evaluation:
  """Accuracy on problems that training never draws."""

  NOTED = "every", "problems", "samples"  # They change no weight.

  every: int = option(
    16, "steps between evaluations, first and last included; 0 = a run without evaluation", min=0
  )
  problems: int = option(0, "held-out problems to evaluate on; 0 = all", min=0)
  samples: int = option(7, "responses a problem at temperature 1, and one greedy one", min=1)


@dataclasses.dataclass(frozen=True)
class Drawing:
  """How responses are drawn."""

  temperature: float = option(1.0, "sampling temperature; training uses the same", above=0)
  top_k: int = option(0, "keep the k likeliest tokens, 0 = all", min=0)
  top_p: float = option(1.0, "keep the likeliest tokens that reach p", above=0, max=1)
  slots: int = option(
    0, "responses decoded at once; the next takes the place of one that has ended; 0 = all", min=0
  )


@dataclasses.dataclass(frozen=True)
class Responses(Drawing):
  """How responses are sampled. Nothing is trained on them."""

  prompts_per_batch: int = option(16, "problems sampled at once, at most", min=1)


@dataclasses.dataclass(frozen=True)
class Sampling(Drawing):
  """How responses are drawn."""

  min_new_tokens: int = option(0, "no end of sequence before this many tokens", min=0)
  parts: int = option(
    1,
    "parts of a step's problems: one is graded, or its tools run, while another is sampled; for "
    "slow graders and tools",
    min=1,
  )
  allow_truncated: bool = option(
    False, "train on top-k or top-p samples although they come from another distribution"
  )

  def check(self, config: Any) -> None:
    """Refuses what cannot be sampled, or would train on another distribution unasked."""
    groups = "updates", "batches", "pairs"
    problems = next(getattr(config, name) for name in groups if hasattr(config, name)).per_step
    longest, fix = config.prompts.max_new_tokens, "--sampling.allow_truncated does it all the same"
    off = "off while training: it samples from another distribution than the one that is trained"
    for name, refused, allowed, further in (
      ("parts", problems % self.parts, f"a divisor of the {problems} problems of a step", ""),
      ("min_new_tokens", self.min_new_tokens > longest, f"at most max_new_tokens ({longest})", ""),
      ("top_k", self.top_k != 0 and not self.allow_truncated, off, fix),
      ("top_p", self.top_p != 1 and not self.allow_truncated, off, fix),
    ):
      if refused:
        raise ConfigError(f"sampling.{name}", getattr(self, name), allowed, further)


@dataclasses.dataclass(frozen=True)
class Batches:
  """What a step samples, and how many updates it makes of it."""

  prompts_per_step: int = option(16, "P, problems a step", min=1)
  responses_per_prompt: int = option(8, "G, responses a problem", min=1)
  epochs: int = option(1, "passes over a step's responses", min=1)
  minibatches: int = option(1, "optimiser updates a pass; divides prompts_per_step", min=1)
  microbatch_prompts: int = option(
    2,
    "problems whose responses' activations are held at once; divides prompts_per_step / "
    "minibatches, or is more than that",
    min=1,
  )

  @property
  def per_step(self) -> int:
    return self.prompts_per_step

  @property
  def count(self) -> int:
    """Of a step."""
    return self.epochs * self.minibatches

  @property
  def microbatches(self) -> int:
    """Of an update."""
    return max(1, self.prompts_per_step // self.minibatches // self.microbatch_prompts)

  def check(self, config: Any) -> None:
    """Refuses sizes that do not divide."""
    prompts, count = self.prompts_per_step, self.minibatches
    if prompts % count:
      raise ConfigError("minibatches", count, f"a divisor of prompts_per_step ({prompts})")
    update = prompts // count
    of = f"the {update} problems of an update (prompts_per_step / minibatches)"
    check_divides("microbatch_prompts", update, self.microbatch_prompts, of)


@dataclasses.dataclass(frozen=True)
class Updates(Batches):
  """How a step's responses become updates."""

  target_kl: float = option(
    0.0,
    "end a step's updates after the first that finds the policy further than this from the old "
    "one, in nats a token; 0 = never",
    min=0,
  )
  positive_nll_coef: float = option(
    0.0, "factor of the likelihood of right answers; VAPO has 0.1; 0 = no such term", min=0
  )
  correction: terms.Correction = terms.Correction()
  llds: terms.Llds = terms.Llds()
  entropy: terms.Entropy = terms.Entropy()
  clip: terms.Clip = terms.Clip()

  def check(self, config: Any) -> None:
    """Refuses, too, several updates by a loss that assumes every sample is the policy's own."""
    loss = config.loss.name
    if loss == "reinforce_loss" and self.count > 1:
      allowed = "a loss with a ratio where a step has several updates (epochs * minibatches > 1)"
      fix = "after the first the samples are another policy's: try --loss=ppo_loss"
      raise ConfigError("loss.name", loss, allowed, fix)
    of_selection = {"selected": COVARIANCE_LOSSES}
    of_selection |= dict.fromkeys(("covariance_low", "covariance_high"), COVARIANCE_LOSSES[:1])
    for name, having in of_selection.items():
      value, names = getattr(config.loss, name), [each.__name__ for each in having]
      if value is not None and loss not in names:
        raise ConfigError(f"loss.{name}", value, f"left out with --loss={loss}", f"see {names[0]}")
    if self.target_kl and self.count < 2:
      allowed = "0 with one update a step, which ends after it"
      raise ConfigError("target_kl", self.target_kl, allowed, "try --epochs=2")
    super().check(config)


# Files of examples.


@dataclasses.dataclass(frozen=True)
class Data:
  """The data, and how much of it is kept for evaluation."""

  data: str = option("", "a file of examples, JSONL (plain or gzip) or Parquet; see above")
  data_format: str = option(
    "auto",
    "format of the rows of --data, where their columns allow several; other formats' columns "
    "are then your own",
    choices=("auto", *COLUMNS),
  )
  data_errors: Literal["strict", "lenient"] = option(
    "strict", "the first broken row of --data stops, or broken rows are dropped and counted"
  )
  max_rows: int = option(MAX_ROWS, "most rows of --data; a file with more is refused", min=1)
  held_out_fraction: float = option(0.1, "share of prompts kept for evaluation", min=0, below=1)
  max_tokens: int = option(512, "tokens a row of --data may have, prompt included", min=2)
  overlong: Literal["error", "drop", "truncate_left", "truncate_right"] = option(
    "error", "what to do with longer sequences"
  )
  packing: int = option(
    0, "tokens of a row that several sequences share; 0 = each has a row of its own", min=0
  )

  def check_fits(self, longest: int) -> None:
    """Refuses rows that the longest sequence does not fit into."""
    if 0 < self.packing < longest:
      allowed = f"0, or at least a sequence's limit ({longest})"
      raise ConfigError("packing", self.packing, allowed)

  def check_measured(self, config: Any, own: str = "") -> None:
    """Refuses a run with nothing to learn, or to evaluate on; `own` is the task's own --data."""
    task = config.task.task if hasattr(config, "task") else "none"
    if task == "none" and self.data == own:
      raise ConfigError("data", own, "a file where there is no task", "or name one with --task")
    if task == "none" and not self.held_out_fraction and config.eval.every:
      allowed = "above 0, where nothing else says what was learned"
      raise ConfigError("held_out_fraction", 0, allowed, "--eval.every=0 does without")


def reference_cache() -> Any:
  """A setting of scripts that compare with a reference on a file's rows."""
  return option(
    "",
    "where the reference's log-probs are kept, by a hash of weights and rows; empty = workdir",
    volatile=True,
  )


@dataclasses.dataclass(frozen=True)
class Pairs:
  """How many pairs make an update."""

  pairs_per_step: int = option(
    16, "pairs an update; on policy, the problems of which each gives at most one pair", min=1
  )
  microbatch_pairs: int = option(
    4,
    "pairs whose activations are held at once; divides pairs_per_step, or is more than that",
    min=1,
  )

  @property
  def per_step(self) -> int:
    return self.pairs_per_step

  @property
  def microbatches(self) -> int:
    return max(1, self.pairs_per_step // self.microbatch_pairs)

  def check(self, config: Any) -> None:
    """Refuses sizes that do not divide."""
    of = f"pairs_per_step ({self.pairs_per_step})"
    check_divides("microbatch_pairs", self.pairs_per_step, self.microbatch_pairs, of)


@dataclasses.dataclass(frozen=True)
class Duels:
  """How many duels make an update."""

  prompts_per_step: int = option(16, "P, problems a step", min=1)
  responses_per_prompt: int = option(
    4, "G, duels a problem: responses of the policy, and as many of its opponent", min=1
  )
  microbatch_prompts: int = option(
    2,
    "problems whose responses' activations are held at once; divides prompts_per_step, or is more "
    "than that",
    min=1,
  )

  @property
  def per_step(self) -> int:
    return self.prompts_per_step

  @property
  def microbatches(self) -> int:
    return max(1, self.prompts_per_step // self.microbatch_prompts)

  def check(self, config: Any) -> None:
    """Refuses sizes that do not divide."""
    of = f"prompts_per_step ({self.prompts_per_step})"
    check_divides("microbatch_prompts", self.prompts_per_step, self.microbatch_prompts, of)


# The objective.


def _refresh() -> Any:
  """The option of a reference that follows the policy."""
  return option(0, "steps between refreshes of the reference, from the policy; 0 = never", min=0)


def _keep() -> Any:
  """The option that makes such a reference follow slowly."""
  return option(
    0.0,
    "share of the old reference that a refresh keeps; 0 = it becomes the policy",
    min=0,
    below=1,
  )


@dataclasses.dataclass(frozen=True)
class Reference:
  """What DPO's policy is compared with; in TR-DPO a refresh keeps 0.4 of it."""

  refresh: int = _refresh()
  keep: float = _keep()


Baseline = terms.Baseline  # of REINFORCE
Gae = terms.Gae  # of PPO


@dataclasses.dataclass(frozen=True)
class Weighting:
  """How much each token counts."""

  name: Literal[WEIGHTINGS] = option("token_mean", "a function of rl_llm.weighting")
  length: int = option(0, "the length that constant_length divides by; 0 = max_new_tokens", min=0)
  power: float = option(0.5, "power of length_power: 0 = sequence_mean, 1 = token_mean", min=0)
  top_entropy: float = option(
    1.0, "share of tokens that the surrogate counts, those of the highest entropy", above=0, max=1
  )
  shared_tokens: float | None = option(
    None,
    "GTPO: tokens with which good and bad responses of a group both begin, or end, count 0 in the "
    "bad and this much in the good; none = like any other",
    min=0,
  )
  truncated: Literal["keep", "zero", "drop"] = option(
    "keep",
    "responses cut off at the limit: zero = weight 0, but in the denominator like any "
    "other; drop = the mean is over the others alone",
  )
  drop_truncated: bool = option(False, "the old name of --weighting.truncated=zero")

  def check(self, config: Any) -> None:
    """Refuses two answers to one question."""
    if self.drop_truncated and self.truncated == "drop":
      raise ConfigError("weighting.truncated", "drop", "left out with --weighting.drop_truncated")


@dataclasses.dataclass(frozen=True)
class KL:
  """The price of leaving the model that training began with."""

  coef: float = option(0.0, "0 keeps no reference model", min=0)
  refresh: int = _refresh()
  keep: float = _keep()
  place: Literal["loss", "reward"] = option(
    "loss", "a term of the loss, or taken off the reward of each token"
  )
  value: KL_ESTIMATORS = option("k3", "the estimator that is reported, and priced in the reward")
  gradient: KL_ESTIMATORS = option("k2", "the estimator that is differentiated, in the loss")
  weighting: Literal["loss", *WEIGHTINGS] = option(
    "loss", "how much each token counts in this term of the loss; loss = as --weighting.name has it"
  )

  @property
  def fixed_reference(self) -> bool:
    """Whether the model that training began with is kept: a refreshed one is part of the state."""
    return self.coef > 0 and not self.refresh

  def check(self, config: Any) -> None:
    """Refuses settings of a term, or of a reference, where there is none."""
    if self.refresh and not self.coef:
      raise ConfigError("kl.refresh", self.refresh, "0 without --kl.coef")
    if self.keep and not self.refresh:
      raise ConfigError("kl.keep", self.keep, "left out without --kl.refresh")
    for name in ("gradient", "weighting"):
      if self.place == "reward" and getattr(self, name) != getattr(KL(), name):
        allowed = "left out with --kl.place=reward"
        raise ConfigError(f"kl.{name}", getattr(self, name), allowed)


def moving_reference(config: Any) -> Any:
  """The settings by which the reference follows the policy; None where it does not."""
  found = getattr(config, "kl", None) or getattr(config, "reference", None)
  return found if found and found.refresh else None


def _of_tokens(config: Any, name: str) -> np.ndarray:
  """One token's array, as a loss takes it."""
  return np.zeros((1, 1), bool if name == "selected" else np.float32)


# They select tokens first: `rl_llm.training.objective.select_tokens`.
COVARIANCE_LOSSES = (losses.clip_cov_loss, losses.kl_cov_loss)
_SELECTED = " [clip_cov_loss, kl_cov_loss]"
_FURTHER = {
  "entropy_coef": (float, option(0.0, "entropy bonus per nat, with any loss")),
  "selected": (
    float | None,
    option(None, f"share of a step's tokens to hold back{_SELECTED}", above=0, max=1),
  ),
  "covariance_low": (
    float | None,
    option(None, "least covariance of a token to hold back [clip_cov_loss]"),
  ),
  "covariance_high": (
    float | None,
    option(None, "greatest covariance of a token to hold back [clip_cov_loss]"),
  ),
}
_SURROGATE = "The surrogate, and its keywords; none = the default of the loss."
_SURROGATES = (*losses.POLICY_LOSSES, *COVARIANCE_LOSSES)
PolicyLoss = keyword_group("loss", _SURROGATE, _SURROGATES, shape=_of_tokens, further=_FURTHER)
# With those on the whole responses to a problem: `rl_llm.training.objective.group_loss`.
GroupLoss = keyword_group(
  "loss", _SURROGATE, (*_SURROGATES, losses.tpo_loss), shape=_of_tokens, further=_FURTHER
)


def _of_groups(config: Any, name: str) -> np.ndarray:
  """An advantage's array: of two problems, and of the responses that a step has to each."""
  separate = separate_rewards(config)
  if name == "weights":
    return separate
  several = () if separate is None or name != "rewards" else separate.shape
  responses = () if name == "greedy_rewards" else (config.updates.responses_per_prompt,)
  return np.zeros((2, *responses, *several))


def separate_rewards(config: Any) -> np.ndarray | None:
  """[K] the weights of several rewards, where the advantage takes them one by one; else None.

  Raises:
    ConfigError: it takes several, and there is one.
  """
  if config.advantage.name != "gdpo":
    return None
  weights = [term.weight for term in terms_of(config.task.reward)]
  if not weights:
    allowed = "another where there is one reward"
    fix = "give several: --reward=task,FILE.py:function*0.2"
    raise ConfigError("advantage", "gdpo", allowed, fix)
  if config.task.overlong.cache:
    allowed = "0 with --advantage=gdpo, which would not normalise the penalty"
    raise ConfigError("overlong.cache", config.task.overlong.cache, allowed)
  return np.asarray(weights, np.float32)


GroupAdvantage = keyword_group(
  "advantage",
  "How a response compares with the others to its prompt.",
  GROUP_ADVANTAGES,
  shape=_of_groups,
  unset=False,
  agreed=("scale",),
)


def preset(parts: str) -> Any:
  return option("none", f"a published recipe for {parts}; flags given explicitly win")


def recipe(name: str, *parts: str) -> dict[str, Any]:
  """What a published recipe changes in these groups: dotted path -> value.

  The part "kl" includes a KL in the reward, and "sampling" is which groups are trained on, and the
  penalty for length.

  Raises:
    ConfigError: it is a recipe by name that these groups cannot express; the message says why.
  """
  if name == "none":
    return {}
  if name in presets.REFUSED:
    raise ConfigError("preset", name, "another", presets.REFUSED[name])
  recipe = presets.grpo(name)
  groups = {part: getattr(recipe, part) for part in parts if part != "sampling"}
  if "loss" in groups:  # An entropy term is a setting of any surrogate.
    groups["loss"] |= {"entropy_coef": recipe.entropy["coef"]}
  if "kl" in groups and recipe.reward_kl:
    groups["kl"] = recipe.reward_kl | {"place": "reward"}
  found = {f"{part}.{key}": value for part, own in groups.items() for key, value in own.items()}
  if "sampling" in parts:
    found |= {"dynamic.groups": recipe.groups, "overlong.cache": recipe.overlong}
  return found


def shape_of(config: Any) -> shaping.Shape:
  """What is added to a step's experience once it is graded."""
  overlong = getattr(config.task, "overlong", None)
  advantage = getattr(config, "advantage", None)
  greedy = hasattr(advantage, "functions") and "greedy_rewards" in arrays(advantage)
  drop = getattr(config.task, "dynamic", Dynamic()).groups == "drop"
  return shaping.Shape(overlong and overlong.penalty(config), drop, greedy)


def objective_terms(config: Any) -> objective.Terms:
  """The terms of the objective, by the groups `loss`, `kl`, `correction` and `llds`."""
  kl, llds, size = config.kl, config.updates.llds, config.updates
  kinds = {"value": kl.value, "gradient": kl.gradient}
  return objective.Terms(
    kl=kinds if kl.place == "loss" else None,
    llds={"level": llds.level} if llds.coef else None,
    positive_nll=size.positive_nll_coef > 0,
    off_policy=size.correction.off_policy_mask,
    moved=size.target_kl > 0,
  )


def needs_old(config: Any) -> bool:
  """Whether a step needs the log-probs before its updates, by a pass of their own."""
  size, selects = config.updates, chosen(config.loss) in COVARIANCE_LOSSES
  return size.count > 1 or bool(size.correction.factors) or selects


def policy_term_only(config: Any) -> bool:
  """Whether a response with advantage 0 adds nothing: DRO's loss has a term left, TPO's holds its
  group to the old policy, and one of a person's own may have."""
  size, name = config.updates, config.loss.name
  left = name in ("dro_loss", "tpo_loss") or name not in config.loss.functions
  further = size.llds.coef or size.positive_nll_coef or config.loss.entropy_coef
  # A group's advantage does not have the KL in it yet.
  kl = config.kl.coef and (config.kl.place == "loss" or hasattr(config.advantage, "functions"))
  return not (further or left or kl or size.entropy.controller != "constant")


def steering(config: Any) -> control.Steering:
  """The controllers of the run, by the groups `entropy` and `clip`; none where it has neither."""
  if not hasattr(config, "updates"):
    return control.Steering()
  entropy, clip = config.updates.entropy, config.updates.clip
  numbers = {name: getattr(entropy, name) for name in ("target", "delta", "low", "high")}
  bounds = {name: getattr(clip, name) for name in ("target", "delta", "high")}
  return control.Steering(
    entropy=numbers if entropy.controller in ("target", "lagged") else None,
    lagged=entropy.controller == "lagged",
    clip=bounds if clip.controller == "adaptive" else None,
    scheduled=entropy.controller == "linear",
  )
