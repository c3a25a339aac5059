"""Episodes of several turns: what is sampled is what is trained on, token for token."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rl_llm.policy import TransformerConfig, make_policy
from rl_llm.policy.load import load_model
from rl_llm.rollout import ResponseBatch, generate, response_logprobs, row_keys, turns
from rl_llm.rollout.decoding import Decoding, requests_of
from rl_llm.rollout.sampling import SamplingConfig
from rl_llm.runs.flops import forward_flops, prediction_flops

score = jax.jit(response_logprobs, static_argnames="policy")
PAD = 256
# Every third id ends a turn, so that about one token in three does.
EOS = tuple(range(0, 259, 3))
PROMPTS = ([72, 101, 108, 108, 111], [97], [49, 43, 50])
GROUP, COLUMNS = 4, 6
ROWS = GROUP * len(PROMPTS)


@pytest.fixture(scope="module")
def tiny():
  """The tiny model with an embedding 15 times as large: some tokens are likely, most are not."""
  policy, params, _ = load_model("tiny")
  return policy, params | {"embed": jax.tree.map(lambda x: 15 * x, params["embed"])}


def prompts():
  tokens = np.full((len(PROMPTS), COLUMNS), PAD, np.int32)
  for row, prompt in zip(tokens, PROMPTS, strict=True):
    row[COLUMNS - len(prompt) :] = prompt
  return tokens, np.array([len(prompt) for prompt in PROMPTS], np.int32)


def settings_for(policy, *, tokens, turn_tokens, eos_ids=EOS):
  decoding = Decoding(policy, GROUP, tokens, eos_ids, ROWS)
  return turns.TurnDecoding(decoding, turn_tokens, PAD)


def begin(model, settings, *, seed=0, temperature=1.0, min_new_tokens=0):
  """(the state after the first turn, the requests)."""
  policy, params = model
  sampling = SamplingConfig(temperature, min_new_tokens=min_new_tokens)
  keys = row_keys(jax.random.key(seed), len(PROMPTS), GROUP)
  requests = requests_of(prompts()[1], keys, sampling, GROUP)
  state = turns.start(params, *prompts(), requests, settings=settings)
  return turns.decode_turns(params, state, requests, settings=settings), requests


def episode(model, settings, answers, *, width, **how):
  """Plays whole episodes: `answers(rng, rows)` gives, turn by turn, each row's ids or None.

  Gives the state on the host, and what the environment wrote: {(row, first column): ids}.
  """
  params = model[1]
  state, requests = begin(model, settings, **how)
  written = {}
  for of_turn in answers:
    lengths = np.asarray(state.length)
    observations, sizes = np.full((ROWS, width), PAD, np.int32), np.zeros(ROWS, np.int32)
    continues = np.zeros(ROWS, bool)
    for row, ids in enumerate(of_turn):
      if ids is None or not state.ended[row] or lengths[row] + len(ids) >= state.tokens.shape[1]:
        continue
      written[row, int(lengths[row])] = list(ids)
      observations[row, : len(ids)], sizes[row], continues[row] = ids, len(ids), True
    state = turns.append(params, state, requests, observations, sizes, continues, settings=settings)
    state = turns.decode_turns(params, state, requests, settings=settings)
  return jax.device_get(state._replace(cache=None)), written


def random_answers(seed, *, rounds, width):
  rng = np.random.default_rng(seed)
  for _ in range(rounds):
    sizes = rng.integers(0, width, size=ROWS, endpoint=True)
    yield [
      rng.integers(0, 256, size=size).tolist() if rng.random() < 0.9 else None for size in sizes
    ]


def batch_of(state):
  attended = np.arange(state.tokens.shape[1]) < state.length[:, None]
  return ResponseBatch(*prompts(), state.tokens, attended, state.mask)


@pytest.mark.parametrize("temperature", [0.7, 0.0])
def test_an_episode_of_one_turn_is_a_response(tiny, temperature):
  policy, params = tiny
  settings = settings_for(policy, tokens=8, turn_tokens=8)
  state, requests = begin(tiny, settings, temperature=temperature, min_new_tokens=2)
  found = generate(
    params,
    *prompts(),
    requests.keys,
    requests.sampling,
    policy=policy,
    responses_per_prompt=GROUP,
    max_new_tokens=8,
    eos_ids=EOS,
    pad_id=PAD,
  )
  assert not temperature or len(set(found.lengths.tolist())) >= 3
  np.testing.assert_array_equal(state.tokens, found.tokens)
  np.testing.assert_array_equal(state.mask, found.mask)
  np.testing.assert_array_equal(state.length, found.lengths)
  np.testing.assert_array_equal(state.ended, found.stop_reason == 0)
  np.testing.assert_array_equal(state.logprobs, found.sampler_logprobs)
  np.testing.assert_array_equal(state.entropies, found.entropies)


@pytest.mark.parametrize("seed", range(4))
def test_the_trainer_scores_what_was_sampled(tiny, seed):
  policy, params = tiny
  settings = settings_for(policy, tokens=48, turn_tokens=6)
  answers = random_answers(seed, rounds=5, width=7)
  state, written = episode(tiny, settings, answers, width=8, seed=seed)
  assert state.turn.max() >= 3 and len(set(state.length.tolist())) >= 4
  assert {0} < {len(ids) for ids in written.values()}  # empty ones and others
  logprobs, entropies = score(params, batch_of(state), policy=policy)
  np.testing.assert_allclose(state.logprobs, logprobs, rtol=0, atol=1e-5)
  np.testing.assert_allclose(state.entropies, entropies, rtol=0, atol=1e-5)
  assert np.ptp(state.logprobs[state.mask]) > 1  # likely and unlikely tokens


def test_what_the_environment_wrote_lies_where_it_said_it_and_is_not_sampled(tiny):
  settings = settings_for(tiny[0], tokens=48, turn_tokens=6)
  answers = random_answers(9, rounds=5, width=7)
  state, written = episode(tiny, settings, answers, width=8)
  expected = np.arange(48) < state.length[:, None]
  for (row, column), ids in written.items():
    assert state.tokens[row, column : column + len(ids)].tolist() == ids
    expected[row, column : column + len(ids)] = False
  np.testing.assert_array_equal(state.mask, expected)
  assert (state.tokens[np.arange(48) >= state.length[:, None]] == PAD).all()
  assert (state.turns[~state.mask] == turns.NO_TURN).all()
  for row in range(ROWS):
    own = state.turns[row, state.mask[row]]
    begins = np.flatnonzero(state.turns[row] != np.append(-2, state.turns[row])[:-1])
    numbers = [state.turns[row, column] for column in begins if state.mask[row, column]]
    assert numbers == list(range(state.turn[row] + 1))  # also where nothing lies between two
    assert np.bincount(own)[-1] == state.written[row]
    assert np.bincount(own).max() <= 6


def test_a_row_does_not_see_the_others_wait(tiny):
  """A row that goes on alone, after the others, draws what it draws among them."""
  policy, params = tiny
  settings = settings_for(policy, tokens=48, turn_tokens=6)
  said = [[65, 66], [67], [], [68, 69, 70], [71], [72]] * 2
  together, _ = episode(tiny, settings, [said], width=8)
  first = [ids if row % 2 else None for row, ids in enumerate(said)]
  later = [None if row % 2 else ids for row, ids in enumerate(said)]
  apart, _ = episode(tiny, settings, [first, later], width=8)
  for row in range(0, ROWS, 2):  # Those that waited while the others had a turn of their own.
    np.testing.assert_array_equal(apart.tokens[row], together.tokens[row])
    np.testing.assert_allclose(apart.logprobs[row], together.logprobs[row], rtol=0, atol=1e-5)


def test_limits_end_a_turn_without_its_end(tiny):
  settings = settings_for(tiny[0], tokens=10, turn_tokens=4, eos_ids=())
  state, _ = begin(tiny, settings)
  assert state.length.tolist() == [4] * ROWS and not state.ended.any()
  full = settings_for(tiny[0], tokens=10, turn_tokens=20, eos_ids=())
  state, _ = begin(tiny, full)
  assert state.length.tolist() == [10] * ROWS and not state.ended.any()


def test_a_minimum_length_counts_in_each_turn(tiny):
  settings = settings_for(tiny[0], tokens=48, turn_tokens=6)
  answers = random_answers(3, rounds=3, width=3)
  state, _ = episode(tiny, settings, answers, width=8, min_new_tokens=3)
  assert state.turn.max() >= 2
  for row in range(ROWS):
    assert np.bincount(state.turns[row, state.mask[row]]).min() >= 4


@pytest.mark.slow  # test_episodes.py counts the programs of two steps.
def test_programs_compile_once_a_shape(tiny):
  programs = turns.start, turns.decode_turns, turns.append
  settings = settings_for(tiny[0], tokens=41, turn_tokens=5)  # A length that no other test has.
  before = [program._cache_size() for program in programs]
  for seed in range(3):
    for width in (4, 8):
      episode(tiny, settings, random_answers(seed, rounds=3, width=3), width=width, seed=seed)
  # `decode_turns` once for the state of `start` and that of `append`; `append` once a width.
  grown = [program._cache_size() - size for program, size in zip(programs, before, strict=True)]
  assert grown == [1, 1, 2]


def test_a_turn_costs_its_own_tokens(tiny):
  """Two layers of SmolLM2's shape, 96 tokens in the cache, a turn of 31 tokens read and 32 written:
  by the compiled programs' own count of operations, next to the formula for these tokens alone."""
  rows, columns, tokens, before, read, written = 8, 64, 192, 96, 31, 32
  config = TransformerConfig(
    vocab_size=49152, width=576, n_layers=2, n_heads=9, n_kv_heads=3, head_dim=64, mlp_width=1536
  )
  policy = make_policy(config)
  params = jax.eval_shape(policy.init, jax.random.key(0))
  settings = turns.TurnDecoding(Decoding(policy, 1, tokens, EOS, rows), written, PAD)
  keys = row_keys(jax.random.key(0), rows, 1)
  requests = requests_of(np.full(rows, columns), keys, SamplingConfig(1.0), 1)
  batch = jnp.zeros((rows, columns), jnp.int32), jnp.full((rows,), columns)
  state = jax.eval_shape(
    functools.partial(turns.start, settings=settings), params, *batch, requests
  )
  observations = jnp.zeros((rows, read), jnp.int32), jnp.full((rows,), read), jnp.ones(rows, bool)

  def count(program, *arrays):
    return program.lower(params, state, requests, *arrays, settings=settings).cost_analysis()

  reads = count(turns.append, *observations)["flops"]  # with the first token's draw
  writes = count(turns.decode_turns)["flops"]  # the loop's body, once
  turn = (reads + (written - 1) * writes) / rows
  longer, shorter = ([columns], [before + read + written]), ([columns], [before])
  own = forward_flops(config, *longer) - forward_flops(config, *shorter)
  own -= prediction_flops(config, read)
  print(f"{turn / own:.3f} times the work of its own tokens")
  assert 1 <= turn / own <= 1.3
