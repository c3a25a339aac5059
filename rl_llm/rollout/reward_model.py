"""Reward models: a network that scores answers, on disk, on the device, and against held-out pairs.

`transformers` reads a directory that `save_reward_model` wrote as
`AutoModelForSequenceClassification` with one label, and such models from elsewhere load here.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np

from rl_llm.data.batches import PackedShares, pair_batch
from rl_llm.data.encoding import Pair
from rl_llm.data.packing import unpack
from rl_llm.parallel.sharding import gather_to_host, shard_rows
from rl_llm.policy import Params, Policy, TransformerConfig, WeightsError, config_to_hf, make_policy
from rl_llm.policy.hf import leaf_shapes, read_config, read_weights, write_directory
from rl_llm.policy.load import LanguageModel
from rl_llm.policy.scalar_head import apply_head
from rl_llm.rollout.scoring import ResponseBatch, response_hidden, take_prompts
from rl_llm.runs.finite import check_finite
from rl_llm.runs.metrics import proportion_interval
from rl_llm.text.tokenizers import (
  ModelTokenizer,
  Tokenizer,
  fit_embedding,
  load_tokenizer,
  save_tokenizer,
  token_ids,
)

_CLASSIFIER = "ForSequenceClassification"


def response_rewards(params: Any, batch: ResponseBatch, *, policy: Policy) -> chex.Array:
  """Scores sampled responses: the head's number at the response's last token.

  An answer is judged as a whole, so the head reads the state after its last token, which is the
  end-of-sequence token if there is one; a value network's last state is one position before. An
  answer that was cut off at the limit is judged where it stops. Each prompt is read once.

  Args:
    params: a reward model's, with its "head".
    batch: prompts, prompt_lengths, tokens and `attended` are read from it.
    policy: the pure functions of the trunk, a `rl_llm.policy.Policy`.

  Returns:
    rewards [B], float32; for a row without tokens, the prompt's own score.

  Raises:
    ValueError: B is not a multiple of P.
  """
  # The state that would predict one more token has read all tokens.
  after = ((0, 0), (0, 1))
  longer = batch._replace(
    tokens=jnp.pad(batch.tokens, after), attended=jnp.pad(batch.attended, after)
  )
  hidden = response_hidden(params, longer, policy=policy)
  return apply_head(params["head"], _at(hidden, _last(batch.attended) + 1))


def sequence_rewards(
  params: Any,
  tokens: chex.Array,
  mask: chex.Array,
  positions: chex.Array,
  segment_ids: chex.Array,
  *,
  policy: Policy,
) -> chex.Array:
  """Scores whole sequences, one per row, at the last token of the answer: for preference pairs.

  That is the last token of `mask`, not of the row. A chat template writes a line break after the
  end-of-sequence token, the sampler never does, and the score of a text must not depend on which of
  them wrote it. Padding may be on either side.

  Args:
    params: a reward model's, with its "head".
    tokens: [B, T] int32.
    mask: [B, T] bool, True = the answer's tokens (`rl_llm.data.encoding.Encoded.mask`).
    positions: [B, T] int32, from 0 in each sequence.
    segment_ids: [B, T] int32, -1 = padding.
    policy: the pure functions of the trunk.

  Returns:
    rewards [B], float32.
  """
  hidden, _ = policy.hidden(params, tokens, positions, segment_ids)
  return apply_head(params["head"], _at(hidden, _last(mask)))


def packed_rewards(params: Any, sequences: PackedShares, *, policy: Policy) -> chex.Array:
  """`sequence_rewards` of sequences that share rows.

  Args:
    params: a reward model's, with its "head".
    sequences: N sequences from `rl_llm.data.batches.packed_shares`, or one share of them.
    policy: the pure functions of the trunk.

  Returns:
    rewards [N], float32; meaningless for places without a sequence.
  """
  tokens, mask, positions, segment_ids = sequences.packed
  hidden, _ = policy.hidden(params, tokens, positions, segment_ids)
  rows = sequences.rows % len(tokens)  # Row numbers count over all shares.
  own = unpack(mask, rows, sequences.starts, sequences.lengths, width=tokens.shape[1])
  return apply_head(params["head"], hidden[rows, sequences.starts + _last(own)])


def _last(mask: chex.Array) -> chex.Array:
  """[B] the last column of the mask; -1 in a row without one."""
  return jnp.max(jnp.where(mask, jnp.arange(mask.shape[1]), -1), axis=1)


def _at(hidden: chex.Array, column: chex.Array) -> chex.Array:
  return jnp.take_along_axis(hidden, column[:, None, None], axis=1)[:, 0]


_jitted_rewards = jax.jit(response_rewards, static_argnames="policy")


def score_responses(
  params: Any,
  batch: ResponseBatch,
  *,
  policy: Policy,
  rows_per_batch: int,
  mesh: jax.sharding.Mesh | None = None,
) -> np.ndarray:
  """`response_rewards` of a rollout of any size, in batches of one shape, so that it compiles once.

  A batch holds whole prompts with all their responses; the last batch is filled up with prompts
  from the beginning.

  Args:
    params: a reward model's. It reads the rollout's ids, so its tokenizer must be the policy's.
    batch: P prompts and B = P * G responses, on the host.
    policy: the pure functions of the trunk.
    rows_per_batch: the most responses to score at once, at least G.
    mesh: the devices over which the weights lie; None: the first.

  Returns:
    rewards [B], float32, on the host.

  Raises:
    ValueError: B is not a multiple of P, or a prompt's responses do not fit into a batch.
  """
  n_prompts, rows = len(batch.prompt_lengths), len(batch.tokens)
  if rows % n_prompts:
    raise ValueError(f"tokens: {rows} rows are not a multiple of the {n_prompts} rows of prompts")
  group = rows // n_prompts
  if rows_per_batch < group:
    raise ValueError(
      f"rows_per_batch: {rows_per_batch} rows do not hold the {group} responses of one prompt; "
      f"allow at least {group}"
    )
  size = min(rows_per_batch // group, n_prompts)
  rewards = []
  for start in range(0, n_prompts, size):
    part = take_prompts(batch, np.arange(start, start + size) % n_prompts)
    found = _jitted_rewards(params, shard_rows(part, mesh), policy=policy)
    rewards.append(np.asarray(gather_to_host(found)))
  return np.concatenate(rewards)[:rows]


_jitted_sequence_rewards = jax.jit(sequence_rewards, static_argnames="policy")


def score_pairs(
  params: Any,
  pairs: Sequence[Pair],
  *,
  policy: Policy,
  pairs_per_batch: int,
  pad_id: int,
  mesh: jax.sharding.Mesh | None = None,
  check: Callable[[], None] = lambda: None,
) -> np.ndarray:
  """`sequence_rewards` of both answers of any number of pairs, with one program for each width.

  Args:
    params: a reward model's.
    pairs: from `rl_llm.data.encoding.encode_pair`.
    policy: the pure functions of the trunk.
    pairs_per_batch: pairs to score at once; pairs of similar length share a batch.
    pad_id: as for `rl_llm.data.batches.pair_batch`.
    mesh: the devices over which the weights lie; None: the first.
    check: called before each batch; raises to stop.

  Returns:
    [N, 2] float32, on the host: the rewards of the chosen and of the rejected answers.

  Raises:
    NotFiniteError: a reward is not finite; the message says which weights are not.
  """
  rewards = np.zeros((len(pairs), 2), np.float32)
  order = sorted(range(len(pairs)), key=lambda index: -max(len(s.tokens) for s in pairs[index]))
  for first in range(0, len(order), pairs_per_batch):
    check()
    chosen = order[first : first + pairs_per_batch]
    batch = pair_batch([pairs[i] for i in chosen], pad_id=pad_id, rows=2 * pairs_per_batch)
    found = _jitted_sequence_rewards(params, *shard_rows(batch, mesh), policy=policy)
    rewards[chosen] = gather_to_host(found).reshape(-1, 2)[: len(chosen)]
    check_finite(rewards[chosen], params, what="the rewards of pairs")
  return rewards


class PairStatistics(NamedTuple):
  """The result of `pair_statistics`."""

  accuracy: float  # share of pairs whose chosen answer has the larger reward; a tie counts half
  low: float  # bounds of its 95 % interval
  high: float
  margin: float  # mean of chosen - rejected
  calibration_error: float  # expected, in probability: 0 is calibrated, 0.5 the worst


def pair_statistics(
  chosen_rewards: np.ndarray, rejected_rewards: np.ndarray, *, bins: int = 10
) -> PairStatistics:
  """How often a reward model is right about held-out pairs, and whether it knows how often.

      margin     = chosen - rejected
      correct    = 1 if margin > 0, 1/2 if margin = 0, else 0
      confidence = sigmoid(|margin|)
      error      = sum over bins: |mean(correct) - mean(confidence)| * (share of the pairs)

  Bradley-Terry gives the probability that the preferred answer wins. A calibrated model that is 3/4
  sure is right three times in four. Margins of +-log 3 mean 3/4 sure; a model that is right twice
  in four is then 1/4 too sure:

  >>> found = pair_statistics(np.log([3.0, 3.0, 1.0, 1.0]), np.log([1.0, 1.0, 3.0, 3.0]))
  >>> found.accuracy, round(found.calibration_error, 3), round(found.margin, 3)
  (0.5, 0.25, 0.0)

  A misconception is that sigmoid(margin) itself can be binned against "chosen won". The chosen
  answer always won, so every bin would have accuracy 1, and the error would measure how unsure the
  model is. Only the model's preference can be right or wrong, so confidence starts at 1/2.

  Args:
    chosen_rewards: [N] float, of the better answers.
    rejected_rewards: [N] float, of the worse ones.
    bins: the number of equal bins from 1/2 to 1.

  Returns:
    A `PairStatistics`; the interval is that of `proportion_interval`.

  Raises:
    ValueError: no pairs, shapes differ, or a reward is not finite.

  Reference: Guo et al., 2017, On Calibration of Modern Neural Networks,
    https://arxiv.org/abs/1706.04599
  """
  chosen, rejected = (np.asarray(x, np.float64) for x in (chosen_rewards, rejected_rewards))
  if chosen.ndim != 1 or not chosen.size or rejected.shape != chosen.shape:
    raise ValueError(
      f"chosen_rewards has shape {chosen.shape} and rejected_rewards {rejected.shape}; both must "
      "be [N] with N at least 1"
    )
  margin = chosen - rejected
  if not np.isfinite(margin).all():
    pair = int(np.argmin(np.isfinite(margin)))
    raise ValueError(
      f"rewards of pair {pair} are {chosen[pair]} and {rejected[pair]}; they must be finite: look "
      "at the reward model's training"
    )
  halves = np.sign(margin).astype(int) + 1  # 2 right, 1 tied, 0 wrong
  confidence = 1 / (1 + np.exp(-np.abs(margin)))
  place = np.minimum(((confidence - 0.5) * 2 * bins).astype(int), bins - 1)
  surplus = np.bincount(place, weights=halves / 2 - confidence, minlength=bins)
  return PairStatistics(
    *proportion_interval(halves, 2),
    margin=float(margin.mean()),
    calibration_error=float(np.abs(surplus).sum() / chosen.size),
  )


def save_reward_model(
  directory: str | os.PathLike,
  config: TransformerConfig,
  params: Params,
  tokenizer: Tokenizer,
  *,
  center: float = 0.0,
  max_shard_bytes: int = 5_000_000_000,
) -> None:
  """Writes a directory for `load_reward_model`, `transformers` and what is built on it.

  Pairs teach only differences, so the rewards' mean is arbitrary. `load_reward_model` subtracts
  `center`, usually the mean over training answers. (The head of `transformers` has no bias, so its
  scores are those without the subtraction.)

  Args:
    directory: must not exist yet, or be empty.
    config: the trunk's shape.
    params: the trunk and its "head".
    tokenizer: of the trunk.
    center: the reward that counts as 0.
    max_shard_bytes: a file larger than this is split.

  Raises:
    WeightsError: the directory is not empty, or the weights do not fit the config.
  """
  head = params["head"]
  if "bias" in head:
    center = center - float(head["bias"][0])
  language_model = config_to_hf(config)
  [architecture] = language_model["architectures"]
  # Gemma3ForSequenceClassification reads images too.
  architecture = architecture.replace("Gemma3For", "Gemma3TextFor")
  pad_id = _padding(tokenizer)
  entries = (
    language_model
    | token_ids(tokenizer)
    | {
      "architectures": [architecture.replace("ForCausalLM", _CLASSIFIER)],
      "id2label": {"0": "LABEL_0"},
      "label2id": {"LABEL_0": 0},
      "pad_token_id": pad_id,
      "reward_center": float(center),
    }
  )
  params = params | {"head": {"weight": head["weight"]}}
  write_directory(
    directory, config, entries, _leaf_shapes(config), params, max_shard_bytes=max_shard_bytes
  )
  if isinstance(tokenizer, ModelTokenizer):
    pad_id = tokenizer.pad_id if pad_id is None else pad_id
    tokenizer = dataclasses.replace(tokenizer, pad_id=pad_id)
  save_tokenizer(directory, tokenizer)


def load_reward_model(
  directory: str | os.PathLike, *, dtype: Any = jnp.float32, remat: bool = False
) -> LanguageModel:
  """Reads a reward model: from `save_reward_model`, or a sequence classifier with one label.

  Args:
    directory: a Hugging Face directory.
    dtype: of the arithmetic; weights and rewards stay float32.
    remat: recompute activations in the backward pass instead of keeping them.

  Returns:
    (policy, params, tokenizer): `response_rewards(params, ..., policy=policy)` scores.

  Raises:
    WeightsError: no such directory, a language model without a head, or unusable files.
    TokenizerError: the tokenizer cannot be used.
  """
  directory = Path(directory)
  config, entries = read_config(directory)
  architectures = entries.get("architectures")
  if not isinstance(architectures, list) or not str(architectures[:1]).endswith(f"{_CLASSIFIER}']"):
    raise WeightsError(
      f"{directory}: has no reward head (config.json: architectures is {architectures}); give a "
      f"directory that save_reward_model wrote, or a ...{_CLASSIFIER} with one label"
    )
  center = entries.get("reward_center", 0.0)
  if not isinstance(center, int | float):
    raise WeightsError(
      f"{directory / 'config.json'}: reward_center is {center!r}, must be a number; restore it"
    )
  params = read_weights(directory, config, _leaf_shapes(config))
  params["head"]["bias"] = jnp.full((1,), -center, jnp.float32)
  policy = make_policy(config, dtype=dtype, remat=remat)
  tokenizer = fit_embedding(load_tokenizer(directory), config.vocab_size)
  return LanguageModel(policy, params, tokenizer)


def _leaf_shapes(config: TransformerConfig) -> dict[str, tuple[int, ...]]:
  trunk = leaf_shapes(config)
  trunk.pop("unembed/embedding", None)
  return trunk | {"head/weight": (1, config.width)}


def _padding(tokenizer: Tokenizer) -> int | None:
  """An id to pad with that ends no response, or None if there is none.

  `transformers` decides by ids: it scores the last token that is not padding. If the
  end-of-sequence token were also the padding, as in many chat models, it would score the token
  before.
  """
  spoken = {*tokenizer.eos_ids, tokenizer.bos_id}
  candidates = (tokenizer.pad_id, *sorted(tokenizer.special_tokens.values()))
  return next((i for i in candidates if i not in spoken), None)
