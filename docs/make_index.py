"""Fills the tables of docs/algorithms.md from docstrings of losses and advantages: `make docs`.

Each public function of `rl_llm.losses` and `rl_llm.advantages` says what it needs besides the
policy's own forward and backward pass, in one line of its docstring:

    Needs: samples, advantages, old policy.

The words are the keys of NEEDS, in its order. First line, first formula and reference come from the
docstring too. Only `ALGORITHMS`, which functions make up a published method, is written here; the
page's prose is written in the page.
"""

from __future__ import annotations

import functools
import importlib
import inspect
import pathlib
import re
import sys
import textwrap
from typing import NamedTuple

from rl_llm import advantages, controllers, logprobs, losses, masked, weighting
from rl_llm.runs.config import _leaves as leaves

ROOT = pathlib.Path(__file__).parents[1]
PAGE = ROOT / "docs" / "algorithms.md"

# word -> (what it is, what it costs in each update beyond the policy's forward and backward pass)
NEEDS = {
  "demonstrations": ("answers to imitate", ""),
  "pairs": ("two answers to a prompt, and which one is better", "two answers a row"),
  "labels": ("answers, each known to be good or bad", ""),
  "samples": ("responses that the policy writes during training", "sampling"),
  "advantages": ("what one of the estimators below returns", ""),
  "reward": ("a number for each response: from a grader, or from a reward model", "grading"),
  "several responses": (
    "G responses to each prompt, to compare with each other",
    "G responses a prompt",
  ),
  "greedy response": (
    "the response at temperature 0, and its reward",
    "one more response a prompt",
  ),
  "value network": (
    "a second network, trained to expect the reward at each token",
    "a second network's forward and backward pass",
  ),
  "old policy": (
    "log-probs of the policy before this batch's updates",
    "a forward pass of the old policy",
  ),
  "sampler": ("the log-probs that the sampler reported", ""),
  "reference": (
    "log-probs of a frozen policy, mostly the one training began with",
    "a forward pass of the reference",
  ),
  "reference responses": (
    "responses that the frozen reference writes",
    "sampling from the reference",
  ),
  "mismatched answers": (
    "each prompt with an answer to another one",
    "passes of policy and reference over mismatched answers",
  ),
  "judge": ("who says which of two sampled answers is better", "judging"),
  "teacher": (
    "log-probs, or logits, of another model of the same vocabulary",
    "a forward pass of the teacher",
  ),
  "vocabulary": (
    "all V probabilities at each token, not only that of the sampled one",
    "a sum over the vocabulary",
  ),
  "unsplit batch": ("all rows at once, as they are sorted against each other", "no microbatches"),
}

# The methods that everyone meets first, and when to use which.
FOUR = {
  "REINFORCE": "fewest parts; one update a batch. Take a baseline with it, such as RLOO's.",
  "PPO": (
    "several updates a batch; rewards on single tokens or turns, which a value network can assign "
    "to what earned them."
  ),
  "DPO": (
    "preferences are all there is: no grader, no sampling. It learns from the answers it is given "
    "and finds no new ones."
  ),
  "GRPO": (
    "a grader that can be trusted (mathematics, programs, tools) and several tries a prompt. It "
    "learns only where the tries differ."
  ),
}


class Algorithm(NamedTuple):
  """A published method: its name and the functions it consists of, as they are called.

  Fields:
    name: as in the paper.
    functions: calls, in the order of the data; arguments where they make the difference.
    also: needs that no function shows, such as the KL that is put into the reward.
    paper: the function whose reference it is, or an address; the last loss if empty.
  """

  name: str
  functions: str
  also: str = ""
  paper: str = ""


ALGORITHMS = {
  "Reinforcement learning": [
    Algorithm("REINFORCE", "discounted_returns() reinforce_loss()"),
    Algorithm("PPO", "token_rewards(kl=k1) gae() ppo_loss() value_loss()", "reference"),
    Algorithm(
      "GRPO",
      "group_relative() sequence_mean() grpo_loss() kl_loss(gradient='k3')",
      paper="group_relative",
    ),
    Algorithm("RLOO", "leave_one_out() sequence_sum() reinforce_loss()", paper="leave_one_out"),
    Algorithm("ReMax", "remax() reinforce_loss()", paper="remax"),
    Algorithm(
      "REINFORCE++",
      "token_rewards(kl=k1) reinforce_plus_plus() ppo_loss()",
      "reference",
      "reinforce_plus_plus",
    ),
    Algorithm(
      "REINFORCE++-baseline",
      "reinforce_plus_plus_baseline() ppo_loss() kl_loss()",
      paper="reinforce_plus_plus",
    ),
    Algorithm(
      "Dr. GRPO",
      "group_relative(scale='none') constant_length() grpo_loss()",
      paper="constant_length",
    ),
    Algorithm(
      "DAPO",
      "overlong_penalty() informative_groups() group_relative() token_mean() "
      "grpo_loss(clip_high=0.28)",
      paper="overlong_penalty",
    ),
    Algorithm(
      "VAPO",
      "length_adaptive_lambda() gae() token_mean() ppo_loss(clip_high=0.28) value_loss() "
      "positive_nll_loss()",
    ),
    Algorithm("GSPO", "group_relative() sequence_mean() gspo_loss()"),
    Algorithm("GSPO-token", "group_relative() sequence_mean() gspo_token_loss()"),
    Algorithm(
      "LUSPO",
      "group_relative() sequence_sum() gspo_loss()",
      paper="https://arxiv.org/abs/2602.05261",
    ),
    Algorithm("GMPO", "group_relative() sequence_mean() gmpo_loss()"),
    Algorithm("VESPO", "group_relative() vespo_loss()"),
    Algorithm("CISPO", "group_relative() token_mean() cispo_loss()"),
    Algorithm("SAPO", "group_relative() sequence_mean() sapo_loss()"),
    Algorithm("DPPO-TV", "group_relative() dppo_tv_loss()"),
    Algorithm("DPPO-KL", "group_relative() dppo_kl_loss()"),
    Algorithm("DRO", "group_relative(scale='none') dro_loss()"),
    Algorithm("SPO (simple)", "group_relative(scale='none') spo_loss()"),
    Algorithm("DRPO", "group_relative(scale='none') constant_length() drpo_loss()"),
    Algorithm("TPO (target policy)", "group_relative(ddof=0) sequence_logprobs() tpo_loss()"),
    Algorithm("A*-PO", "optimal_advantage() sequence_logprobs() astar_po_loss()"),
    Algorithm("SPO (single stream)", "track_values() whiten() ppo_loss()", paper="track_values"),
    Algorithm("RAE", "role_baseline() reinforce_loss()", paper="role_baseline"),
    Algorithm("OPO", "opo() reinforce_loss()", paper="opo"),
    Algorithm("GPG", "gpg() reinforce_loss()", paper="gpg"),
    Algorithm("MaxRL", "maxrl() reinforce_loss()", paper="maxrl"),
    Algorithm("pass@k", "pass_at_k() reinforce_loss()", paper="pass_at_k"),
    Algorithm("GDPO", "gdpo() grpo_loss()", paper="gdpo"),
    Algorithm(
      "optimal token baseline",
      "discounted_returns() optimal_token_baseline() reinforce_loss()",
      paper="optimal_token_baseline",
    ),
    Algorithm("Clip-Cov", "group_relative() token_covariance() clip_cov_mask() clip_cov_loss()"),
    Algorithm("KL-Cov", "group_relative() token_covariance() kl_cov_mask() kl_cov_loss()"),
    Algorithm(
      "entropy bonus",
      "group_relative() grpo_loss() entropy_loss() adaptive_entropy()",
      paper="adaptive_entropy",
    ),
    Algorithm(
      "80/20 rule", "group_relative() top_entropy() grpo_loss()", "vocabulary", "top_entropy"
    ),
    Algorithm(
      "TIS, IcePop",
      "group_relative() truncated_importance() grpo_loss()",
      "sampler",
      "truncated_importance",
    ),
    Algorithm(
      "decoupled PPO",
      "group_relative() truncated_importance(high=5) ppo_loss()",
      "sampler",
      "https://arxiv.org/abs/2505.24298",
    ),
    Algorithm(
      "A-3PO",
      "group_relative() proximal_logprobs() truncated_importance(high=5) ppo_loss()",
      "sampler",
      "proximal_logprobs",
    ),
    Algorithm(
      "M2PO",
      "group_relative() token_mean() second_moment_mask() ppo_loss()",
      "sampler",
      "second_moment_mask",
    ),
    Algorithm(
      "Trust Region Masking",
      "group_relative() trust_region_mask() ppo_loss()",
      "sampler",
      "trust_region_mask",
    ),
    Algorithm("GTPO", "group_relative() shared_tokens() grpo_loss()", paper="shared_tokens"),
    Algorithm("LLDS", "group_relative() grpo_loss() llds_weights() llds_loss()"),
  ],
  "Preferences": [
    Algorithm("DPO", "dpo_loss()"),
    Algorithm(
      "conservative DPO", "dpo_loss(label_smoothing=0.1)", paper="https://ericmitchell.ai/cdpo.pdf"
    ),
    Algorithm("robust DPO", "robust_dpo_loss()"),
    Algorithm("f-DPO", "dpo_loss(divergence='js')", paper="https://arxiv.org/abs/2309.16240"),
    Algorithm("LD-DPO", "sequence_logprobs(tail_weight=0.5) dpo_loss()", paper="sequence_logprobs"),
    Algorithm("WPO", "wpo_weights() dpo_loss()", paper="wpo_weights"),
    Algorithm("RPO", "dpo_loss() sft_loss()", paper="https://arxiv.org/abs/2404.19733"),
    Algorithm("IPO", "ipo_loss()"),
    Algorithm("SLiC, RSO", "hinge_dpo_loss()"),
    Algorithm("EXO", "exo_loss()"),
    Algorithm("NCA", "nca_loss()"),
    Algorithm("SPPO", "sppo_loss()"),
    Algorithm("APO-zero", "apo_zero_loss()"),
    Algorithm("APO-down", "apo_down_loss()"),
    Algorithm("DiscoPOP", "discopop_loss()"),
    Algorithm("AOT, paired", "aot_loss()"),
    Algorithm("AOT, unpaired", "aot_unpaired_loss()"),
    Algorithm("KTO", "kto_baseline() kto_loss()"),
    Algorithm("BCO, paired", "bco_loss()"),
    Algorithm("BCO", "bco_shift() bco_unpaired_loss()"),
    Algorithm("ORPO", "orpo_loss()"),
    Algorithm("SimPO", "simpo_loss()"),
    Algorithm("AlphaPO", "alphapo_loss()"),
    Algorithm("CPO", "cpo_loss()"),
    Algorithm("online DPO", "dpo_loss()", "samples, judge", "https://arxiv.org/abs/2402.04792"),
    Algorithm("XPO", "dpo_loss() xpo_loss()", "samples, judge"),
    Algorithm("Nash-MD", "nash_md_loss()"),
    Algorithm("reward model", "reward_model_loss()"),
  ],
  "Imitation and distillation": [
    Algorithm("SFT", "sft_loss()"),
    Algorithm("DFT", "dft_loss()"),
    Algorithm("GKD", "gkd_loss() chunked_gkd_loss()"),
    Algorithm(
      "self-distillation (SDFT; the teacher is the policy, shown the answer)",
      "gkd_loss(beta=1.0)",
      "samples",
      "https://arxiv.org/abs/2601.19897",
    ),
    Algorithm("MiniLLM", "minillm_advantages() reinforce_loss()", paper="minillm_advantages"),
    Algorithm("on-policy distillation", "on_policy_distillation_loss()"),
  ],
}

COLUMNS = ("reward", "value network", "reference", "several responses")

# Functions that no flag's choices name, or that need a further flag, and the commands that call
# them. The others are derived.
CALLED = {
  "bco_shift": ["kto --loss=bco_unpaired_loss", "dpo --loss=bco_loss --loss.shift=batch"],
  "chunked_gkd_loss": ["distill"],
  "clip_cov_mask": ["grpo --loss=clip_cov_loss"],
  "discounted_returns": ["reinforce --advantage=plain"],
  "entropy_loss": ["grpo --loss.entropy_coef=0.01"],
  "gae": ["ppo"],
  "gdpo": ["grpo --advantage=gdpo --reward=task,FILE.py:f*0.2"],
  "informative_groups": ["grpo --dynamic.groups=informative"],
  "kto_baseline": ["kto"],
  "kl_cov_mask": ["grpo --loss=kl_cov_loss"],
  "kl_loss": ["grpo --kl.coef=0.04", "reinforce --kl.coef=0.04 --kl.place=loss"],
  "length_adaptive_lambda": ["ppo --advantage.alpha=0.05"],
  "llds_loss": ["grpo --epochs=2 --llds.coef=0.2"],
  "llds_weights": ["grpo --epochs=2 --llds.coef=0.2"],
  "optimal_advantage": ["online_dpo --loss=astar_po_loss"],
  "overlong_penalty": ["grpo --overlong.cache=4"],
  "positive_nll_loss": ["grpo --positive_nll_coef=0.1"],
  "reward_model_loss": ["reward_model"],
  "second_moment_mask": ["grpo --correction.second_moment_mask=0.04"],
  "sequence_logprobs": ["dpo"],
  "shared_tokens": ["grpo --weighting.shared_tokens=2"],
  "sft_loss": ["dpo --loss.sft_coef=1"],
  "token_covariance": ["grpo --loss=clip_cov_loss", "grpo --loss=kl_cov_loss"],
  "token_rewards": ["ppo --kl.coef=0.05", "reinforce --kl.coef=0.05"],
  "top_entropy": ["grpo --weighting.top_entropy=0.2"],
  "truncated_importance": ["grpo --correction=token"],
  "trust_region_mask": ["grpo --correction.trust_region_mask=0.1"],
  "value_loss": ["ppo"],
  "wpo_weights": ["dpo --loss.wpo=true"],
}
# The groups of flags that have a function's keywords, where it is not chosen by the group itself.
GROUPS = {"kl_loss": "kl", "truncated_importance": "correction", "sequence_logprobs": "loss"}
SCRIPTS = ("grpo", "reinforce", "ppo", "sft", "dpo", "reward_model", "kto", "online_dpo", "distill")


def needs(function):
  """The words of a function's `Needs:` line."""
  found = re.search(r"^Needs: (.*)\.$", inspect.getdoc(function), flags=re.MULTILINE)
  if not found:
    raise ValueError(f"{function.__name__} has no line 'Needs: ....' in its docstring.")
  words = found[1].split(", ")
  if words != ordered(words):
    raise ValueError(
      f"{function.__name__} needs {words}; the known of them in order are {ordered(words)}."
    )
  return words


def ordered(words):
  """The known words among `words`, each once, in the order of NEEDS."""
  return [word for word in NEEDS if word in words]


def summary(function):
  return inspect.getdoc(function).partition("\n")[0]


def formula(function):
  """The first indented block, and the sentence after it that says what its letters are."""
  head = inspect.getdoc(function).partition("\nArgs:")[0]
  paragraphs = head.split("\n\n")
  for block, following in zip(paragraphs, [*paragraphs[1:], ""], strict=True):
    if block.startswith("    "):
      following = " ".join(following.split())
      return block, following.partition(". ")[0] if following.startswith("with ") else ""
  return "", ""


def reference(function):
  found = re.search(r"^Reference: (.*)", inspect.getdoc(function), flags=re.MULTILINE | re.DOTALL)
  return " ".join(found[1].split()) if found else ""


def public():
  """name -> function: all of the losses and the advantages."""
  modules = (advantages, losses)
  named = {name: getattr(module, name) for module in modules for name in module.__all__}
  return {name: function for name, function in named.items() if callable(function)}


def calls(algorithm):
  """(name, arguments) of each function of an algorithm."""
  return re.findall(r"(\w+)\((.*?)\)", algorithm.functions)


def find(name):
  """The function of that name, wherever an algorithm may take it from."""
  modules = (losses, advantages, weighting, logprobs, controllers, masked)
  return next(getattr(module, name) for module in modules if hasattr(module, name))


def needs_of(algorithm):
  """What all its functions need, and what it needs also."""
  known = public()
  words = set(algorithm.also.split(", "))
  for name, _ in calls(algorithm):
    words |= set(needs(known[name])) if name in known else set()
  covered = {"advantages"} | ({"demonstrations"} if "pairs" in words else set())
  return ordered(words - covered)


def paper(algorithm):
  """A link to the algorithm's paper."""
  address = algorithm.paper
  if not address.startswith("http"):
    name = address or [name for name, _ in calls(algorithm) if name.endswith("_loss")][-1]
    address = re.search(r"https?://[^\s;]+", reference(find(name)))[0]
  return f"[{address.removeprefix('https://arxiv.org/abs/').removeprefix('https://')}]({address})"


@functools.cache
def flags(script):
  """{flag: its default} of an experiment, and {function: its flag}, where choices name it."""
  sys.path.insert(0, str(ROOT))
  found = leaves(importlib.import_module(f"experiments.{script}").Config)
  chosen = {"advantage.name", "loss.name", "loss", "weighting.name", "weighting"}
  named = {name: leaf.path for leaf in found if leaf.path in chosen for name in leaf.choices}
  return {leaf.path: leaf.default for leaf in found}, named


@functools.cache
def commands(name):
  """The commands that reach a function, each an experiment and its flags."""
  found = []
  for script in SCRIPTS:
    defaults, named = flags(script)
    if path := named.get(name):
      flag = [] if defaults[path] == name else [f"--{path.removesuffix('.name')}={name}"]
      found.append(" ".join([script, *flag]))
  more = CALLED.get(name, [])
  return [each for each in found if not any(m.startswith(f"{each} ") for m in more)] + more


def reached_by(name):
  """The command that reaches a function, and which other experiments do."""
  if not commands(name):
    return "none: call it from Python"
  first, *others = commands(name)
  scripts = dict.fromkeys(each.split()[0] for each in others)
  also = [script for script in scripts if script != first.split()[0]]
  return f"`python -m experiments.{first}`" + f"; also {', '.join(also)}" * bool(also)


def keyword_flags(script, name, arguments):
  """An algorithm's keywords of a function as flags of an experiment, as far as it has them."""
  defaults, named = flags(script)
  group = GROUPS.get(name) or named.get(name, "").removesuffix(".name")
  pairs = re.findall(r"(\w+)='?([\w.]+)'?", arguments)
  paths = [(f"{group}.{key}", value) for key, value in pairs]
  known = [(path, value) for path, value in paths if path in defaults]
  return [f"--{path}={value}" for path, value in known if str(defaults[path]) != value]


def command(algorithm):
  """The first command that reaches all functions of an algorithm; nothing where none does."""
  for script in SCRIPTS:
    ways = [
      [each.split()[1:] for each in commands(name) if each.split()[0] == script]
      for name, _ in calls(algorithm)
    ]
    if all(ways):
      only = [flag for way in ways if len(way) == 1 for flag in way[0]]
      free = [way[0] for way in ways if not any(set(each) <= set(only) for each in way)]
      keywords = [keyword_flags(script, *each) for each in calls(algorithm)]
      return f"`{' '.join(dict.fromkeys([script, *only, *sum(free + keywords, [])]))}`"
  return ""


def costs(words):
  return ", ".join(NEEDS[word][1] for word in words if NEEDS[word][1]) or "none"


def networks(words):
  trained = ["**policy**"] + ["**value network**"] * ("value network" in words)
  frozen = ["reference"] * ("reference" in words) + ["perhaps a reward model"] * ("reward" in words)
  return ", ".join(trained + frozen)


def linked(algorithm):
  known = public()
  shown = []
  for name, arguments in calls(algorithm):
    text = f"`{name}({arguments})`" if arguments else f"`{name}`"
    shown.append(f"[{text}](#{name})" if name in known else text)
  return ", ".join(shown)


def table(header, rows):
  lines = [header, ["---"] * len(header), *rows]
  return "".join("| " + " | ".join(line) + " |\n" for line in lines)


def four_methods():
  known = {algorithm.name: algorithm for family in ALGORITHMS.values() for algorithm in family}
  rows = []
  for name, use in FOUR.items():
    words = needs_of(known[name])
    rows.append([name, ", ".join(words), networks(words), costs(words), use])
  return table(["method", "needs", "networks (**trained**)", "cost", "when to use it"], rows)


def algorithms():
  text = ""
  for family, members in ALGORITHMS.items():
    rows = []
    for each in members:
      words = needs_of(each)
      besides = ", ".join(word for word in words if word not in COLUMNS)
      marks = ["yes" if word in words else "" for word in COLUMNS]
      cells = [each.name, linked(each), command(each), *marks, besides, costs(words), paper(each)]
      rows.append(cells)
    header = ["algorithm", "functions", "command", *COLUMNS, "besides", "cost", "paper"]
    text += f"### {family}\n\n" + table(header, rows) + "\n"
  return text.rstrip("\n") + "\n"


def item(text):
  """An item of a list, wrapped."""
  options = {"break_long_words": False, "break_on_hyphens": False}
  return textwrap.fill(text, 100, initial_indent="- ", subsequent_indent="  ", **options)


def entry(name, function):
  block, letters = formula(function)
  words = needs(function)
  lines = [f"\n#### `{name}`\n", f"{summary(function)}\n"]
  lines += [f"{block}\n"] * bool(block) + [f"{letters}.\n"] * bool(letters)
  lines += [item(f"needs: {', '.join(words)}"), item(f"cost: {costs(words)}")]
  lines += [item(f"command: {reached_by(name)}")]
  lines += [item(f"paper: {reference(function)}")] * bool(reference(function))
  return "\n".join(lines) + "\n"


def functions():
  """All public functions by the file they are in, with its first line as heading."""
  files = {}
  for name, function in public().items():
    files.setdefault(inspect.getmodule(function), []).append((name, function))
  text = ""
  for module, members in files.items():
    heading = module.__doc__.partition("\n")[0].removesuffix(".")
    text += f"### {heading}\n"
    text += "".join(entry(name, function) for name, function in sorted(members)) + "\n"
  return text.rstrip("\n") + "\n"


def parts():
  """name -> text of each generated part of the page."""
  words = [[word, what, cost or "none"] for word, (what, cost) in NEEDS.items()]
  return {
    "four methods": four_methods(),
    "words": table(["word", "what it is", "cost"], words),
    "algorithms": algorithms(),
    "functions": functions(),
  }


def filled(text):
  """The page with each part, from `<!-- made: name -->` to the next `<!-- end -->`, made anew."""
  for name, part in parts().items():
    start, end = f"<!-- made: {name} -->\n", "\n<!-- end -->"
    before, found, after = text.partition(start)
    if not found:
      raise ValueError(f"{PAGE.name} has no line {start.strip()!r}.")
    text = before + start + "\n" + part + end + after.partition(end)[2]
  return text


if __name__ == "__main__":
  PAGE.write_text(filled(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
  print(f"wrote {PAGE}")
