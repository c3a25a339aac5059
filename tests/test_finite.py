"""Padding is never read, ids beyond the embedding are refused, and NaN stops whoever meets it."""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rl_llm.data.batches import sequence_batch
from rl_llm.data.encoding import Encoded, Pair
from rl_llm.data.prompts import PromptBatch, pad_prompts
from rl_llm.evaluation import graded_responses
from rl_llm.policy import make_policy, normal_head, tiny_config, with_head
from rl_llm.policy.load import LanguageModel
from rl_llm.rewards import RewardError
from rl_llm.rollout import ResponseBatch, Rollout, generate, response_logprobs, row_keys
from rl_llm.rollout.collect import Sampler, answer, make_generate
from rl_llm.rollout.drawing import Drawn
from rl_llm.rollout.judge import make_judge
from rl_llm.rollout.reward_model import response_rewards, score_pairs
from rl_llm.rollout.sampling import SamplingConfig
from rl_llm.rollout.teacher_forcing import teacher_forced_logprobs
from rl_llm.runs.finite import NotFiniteError, cause_in, check_finite, nonfinite_weights
from rl_llm.runs.metrics import PhaseClock
from rl_llm.tasks import Problem
from rl_llm.text.tokenizers import ByteTokenizer, TokenizerError, fit_embedding, from_gguf
from rl_llm.training.reference_cache import compute_logprobs
from tests.representatives import mostly_slow
from tests.test_tokenizers import TOKENS, write_gguf

ROWS = 24
CONFIG = dataclasses.replace(tiny_config(ROWS), n_layers=1, width=16, n_heads=2, n_kv_heads=1)
POLICY = make_policy(CONFIG)
PROMPTS = [[5, 6, 7], [8], [9, 10]]
# One beyond the embedding, as an added "[PAD]" is, and far off.
beyond = pytest.mark.parametrize("beyond", mostly_slow([ROWS, 10**6], quick=[0]))


@pytest.fixture(scope="module")
def params():
  return jax.jit(POLICY.init)(jax.random.key(0))


def with_number(params, value, path="layers_0/mlp/up/weight"):
  """The weights with one entry of one leaf replaced."""
  *parents, leaf = path.split("/")
  changed = node = jax.tree.map(lambda x: x, params)
  for parent in parents:
    node = node[parent]
  node[leaf] = node[leaf].at[0, 0].set(value)
  return changed


sample = functools.partial(
  generate, policy=POLICY, responses_per_prompt=2, max_new_tokens=12, eos_ids=(0, 1, 2)
)


def roll(params, pad_id, **settings):
  batch = pad_prompts(PROMPTS, pad_id=pad_id)
  keys = row_keys(jax.random.key(0), len(PROMPTS), 2)
  return batch, sample(params, *batch, keys, SamplingConfig(), pad_id=pad_id, **settings)


def same(one, other):
  for x, y in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True):
    np.testing.assert_array_equal(x, y)


# Padding.


@beyond
@pytest.mark.parametrize("slots", mostly_slow([0, 2], quick=[0]))
def test_a_rollout_does_not_depend_on_what_pads_it(params, slots, beyond):
  _, wanted = roll(params, 3, slots=slots)
  assert not wanted.mask.all() and np.isfinite(wanted.sampler_logprobs).all()
  _, found = roll(params, beyond, slots=slots)
  same(found._replace(tokens=0), wanted._replace(tokens=0))
  same(np.where(found.mask, found.tokens, -1), np.where(wanted.mask, wanted.tokens, -1))


@beyond
def test_losses_and_gradients_do_not_depend_on_padding(params, beyond):
  """Of responses, of texts by themselves, and of a reward model: all that reads ids."""
  head = with_head(params, normal_head(CONFIG.width, jax.random.key(1)))
  texts = [Encoded(row, [False] + [True] * (len(row) - 1), 1) for row in ([5, 6, 7, 8], [9, 10])]

  @jax.jit
  def all_of(params, batch, sequences):
    def total(params):
      return (
        jnp.sum(response_logprobs(params, batch, policy=POLICY)[0])
        + jnp.sum(teacher_forced_logprobs(params, *sequences, policy=POLICY)[0])
        + jnp.sum(response_rewards(params, batch, policy=POLICY))
      )

    return jax.value_and_grad(total)(params)

  found = []
  for pad_id in (3, beyond):
    prompts, rollout = roll(params, pad_id)
    batch = ResponseBatch(*prompts, rollout.tokens, rollout.mask, rollout.mask)
    found.append(all_of(head, batch, sequence_batch(texts, pad_id=pad_id, rows=3)))
  assert np.isfinite(found[0][0])
  same(found[1], found[0])


def test_a_tokenizer_is_fitted_to_the_embedding(tmp_path):
  pytest.importorskip("tokenizers")
  last = len(TOKENS) - 1  # "<think>".
  tokenizer = from_gguf(write_gguf(tmp_path, padding_token_id=last))
  assert fit_embedding(tokenizer, last + 1).pad_id == last
  fitted = fit_embedding(tokenizer, last)
  assert fitted.pad_id == fitted.eos_ids[0] == 2  # Never read, and in an export it has a row.
  assert fitted.encode("hello<|im_end|>") == tokenizer.encode("hello<|im_end|>")
  with pytest.raises(TokenizerError, match=f"'<think>' has id {last}, .* has {last} rows"):
    fitted.encode("a<think>b")
  for named in ("eos_token_id", "bos_token_id"):
    tokenizer = from_gguf(write_gguf(tmp_path, **{named: last}))
    with pytest.raises(TokenizerError, match=rf"has id {last}, .* \(ids 0 to {last - 1}\)"):
      fit_embedding(tokenizer, last)
  with pytest.raises(TokenizerError, match="'<eos>' has id 258, and .* has 258 rows"):
    fit_embedding(ByteTokenizer(), 258)


# Numbers that are not finite.


@pytest.mark.parametrize("value", [np.inf, -np.inf, np.nan])
@pytest.mark.parametrize("path", ["embed/embedding", "layers_0/attention/query/weight"])
def test_decoding_ends_where_logits_are_no_numbers_and_the_weights_are_named(params, value, path):
  broken = with_number(params, value, path)
  assert nonfinite_weights(broken) == [path]
  _, rollout = roll(broken, 0, eos_ids=())
  assert rollout.lengths.max() <= 2  # Not 12 tokens of something.
  with pytest.raises(NotFiniteError, match=rf"sampled tokens are not finite: .* namely {path};"):
    sampler = named_sampler(lambda *_: rollout)
    answer(sampler, broken, drawn(), keys(), PhaseClock(), responses=2, sampling=SamplingConfig())


def drawn():
  return Drawn([Problem("x", {}, str(i)) for i in range(len(PROMPTS))], PROMPTS, 0)


def keys():
  return row_keys(jax.random.key(0), len(PROMPTS), 2)


class Byteish(ByteTokenizer):
  vocab_size, pad_id, bos_id, eos_ids = ROWS, 3, None, (0, 1, 2)


def named_sampler(generate):
  return Sampler(None, Byteish(), None, generate, None)


def test_evaluation_stops_too(params):
  broken = with_number(params, np.inf)
  generate = make_generate(POLICY, Byteish(), max_new_tokens=4, say=lambda line: None)
  settings = keys(), SamplingConfig(jnp.ones(6))
  with pytest.raises(NotFiniteError, match="namely layers_0/mlp/up/weight; load"):
    graded_responses(
      named_sampler(generate), broken, drawn().problems, PROMPTS, *settings, group_size=2
    )
  text = Encoded([5, 6, 7], [False, True, True], 1)
  statics = {"policy": POLICY, "pad_id": 0}
  with pytest.raises(NotFiniteError, match="given texts are not finite.*layers_0/mlp/up/weight"):
    compute_logprobs(broken, [text], rows_per_batch=1, **statics)
  head = with_head(broken, normal_head(CONFIG.width, jax.random.key(1)))
  with pytest.raises(NotFiniteError, match="rewards of pairs are not finite.*mlp/up/weight"):
    score_pairs(head, [Pair(text, text)], pairs_per_batch=1, **statics)


def test_the_cause_is_named_shortly_and_an_overflow_as_such(params):
  broken = jax.tree.map(lambda x: x * np.nan, params)
  assert "namely embed/embedding, final_norm/scale, layers_0/" in cause_in(broken)
  assert f"and {len(jax.tree.leaves(params)) - 3} more; load" in cause_in(broken)
  assert "the arithmetic overflows" in cause_in(params) and "--dtype=float32" in cause_in(params)
  check_finite(np.ones(3), broken, what="these")  # Only the values decide.
  with pytest.raises(NotFiniteError, match="these are not finite: weights hold NaN"):
    check_finite(np.array([1.0, np.inf]), None, what="these")


def test_a_reward_model_says_which_of_its_weights_and_which_id(params, monkeypatch):
  judged = with_head(params, normal_head(CONFIG.width, jax.random.key(1)))
  prompts, rollout = roll(params, 0)

  def judge(params):
    model = LanguageModel(POLICY, params, Byteish())
    monkeypatch.setattr("rl_llm.rollout.judge.load_reward_model", lambda directory: model)
    return make_judge("model:some/directory", Byteish(), rows_per_batch=6)

  assert np.isfinite(judge(judged)(prompts, rollout)).all()
  with pytest.raises(RewardError, match="6 of 6 rewards .* namely layers_0/mlp/up/weight"):
    judge(with_number(judged, np.nan))(prompts, rollout)
  # The policy's embedding has more rows than its tokenizer has ids, and it sampled one of them.
  rows = Rollout(*map(np.array, rollout))
  rows.tokens[0, 0] = ROWS + 2
  with pytest.raises(RewardError, match=f"sampled id {ROWS + 2}, .* has {ROWS} rows"):
    judge(judged)(PromptBatch(*prompts), rows)
