"""The same answer has the same score, whoever wrote it and wherever it is stored."""

from __future__ import annotations

import dataclasses
import json
import math
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rl_llm.data.encoding import Encoded
from rl_llm.policy import WeightsError, make_policy, save_hf, tiny_config
from rl_llm.policy.scalar_head import normal_head, with_head
from rl_llm.rollout import ResponseBatch, reward_model, take_prompts
from rl_llm.rollout.reward_model import (
  load_reward_model,
  pair_statistics,
  response_rewards,
  save_reward_model,
  score_responses,
  sequence_rewards,
)
from rl_llm.runs.metrics import proportion_interval
from rl_llm.text.tokenizers import ByteTokenizer, ModelTokenizer

CONFIG = dataclasses.replace(tiny_config(259), n_layers=1, tie_embeddings=False)
POLICY = make_policy(CONFIG)
EOS = 258
PROMPTS = ([3, 1, 4], [5])
PADDED, LENGTHS = np.array([[0, 3, 1, 4], [0, 0, 0, 5]]), np.array([3, 1])
# Cut off at the limit, ended at once, ended, ended with the last column.
RESPONSES = ([7, 8, 9], [EOS], [6, EOS], [9, 9, EOS])
TOKENS = np.array([row + [0] * (3 - len(row)) for row in RESPONSES])
MASK = np.array([[t < len(row) for t in range(3)] for row in RESPONSES])
BATCH = ResponseBatch(PADDED, LENGTHS, TOKENS, MASK, MASK)


@pytest.fixture(scope="module")
def params():
  trunk = jax.jit(POLICY.init)(jax.random.key(0))
  trunk = {**trunk, "embed": jax.tree.map(lambda x: 15 * x, trunk["embed"])}
  return with_head(trunk, normal_head(CONFIG.width, jax.random.key(1)))


@pytest.fixture(scope="module")
def wanted(params):
  """One response at a time, no cache, no padding, the head written out."""
  hidden_of = jax.jit(lambda p, ids: POLICY.hidden(p, ids, jnp.arange(6)[None])[0])
  weight = np.asarray(params["head"]["weight"], np.float64)[0]
  rewards = []
  for b, response in enumerate(RESPONSES):
    ids = [*PROMPTS[b // 2], *response]
    states = hidden_of(params, np.array([ids + [0] * (6 - len(ids))]))[0]
    rewards.append(np.asarray(states, np.float64)[len(ids) - 1] @ weight)
  assert np.ptp(rewards) > 0.1
  return np.array(rewards)


# Scores.


def test_a_response_is_scored_at_its_last_token(params, wanted):
  rewards = jax.jit(response_rewards, static_argnames="policy")(params, BATCH, policy=POLICY)
  assert rewards.dtype == jnp.float32
  np.testing.assert_allclose(rewards, wanted, rtol=0, atol=1e-5)


def test_what_is_scored_is_what_stands_there_and_not_what_is_trained_on(params, wanted):
  """A response whose grade failed is not trained on, and has a reward all the same."""
  untrained = BATCH._replace(mask=np.zeros_like(MASK))
  rewards = score_responses(params, untrained, policy=POLICY, rows_per_batch=4)
  np.testing.assert_allclose(rewards, wanted, rtol=0, atol=1e-5)


@pytest.mark.parametrize("side", ["left", "right"])
def test_a_pairs_sequence_has_the_score_of_the_sampled_response(params, wanted, side):
  """Also where the template writes a line break behind the end."""
  columns, newline = 8, 10
  arrays = np.zeros((4, 4, columns), int)  # tokens, mask, positions, segment_ids of each row
  arrays[:, 3] = -1
  for b, response in enumerate(RESPONSES):
    prompt = PROMPTS[b // 2]
    tokens = [*prompt, *response, newline]
    mask = [False] * len(prompt) + [True] * len(response) + [False]
    row = Encoded(tokens, mask, len(prompt))
    start = columns - len(tokens) if side == "left" else 0
    place = slice(start, start + len(tokens))
    arrays[b][:, place] = row.tokens, row.mask, range(len(tokens)), [1] * len(tokens)
  tokens, mask, positions, segment_ids = arrays.transpose(1, 0, 2)
  score = jax.jit(lambda *args: sequence_rewards(*args, policy=POLICY))
  rewards = score(params, tokens, mask.astype(bool), positions, segment_ids)
  np.testing.assert_allclose(rewards, wanted, rtol=0, atol=1e-5)


def test_batches_of_any_size_give_the_same_scores_and_one_program(params, wanted):
  """Three prompts in batches of two: the last batch is filled up."""
  chosen = np.array([1, 0, 1])
  rows = np.array([2, 3, 0, 1, 2, 3])
  batch = take_prompts(BATCH, chosen)
  score_responses(params, BATCH, policy=POLICY, rows_per_batch=4)
  programs = reward_model._jitted_rewards._cache_size()
  rewards = score_responses(params, batch, policy=POLICY, rows_per_batch=5)
  assert isinstance(rewards, np.ndarray) and rewards.dtype == np.float32
  np.testing.assert_allclose(rewards, wanted[rows], rtol=0, atol=1e-5)
  # Weights are arguments: others are used at once, in the same program.
  doubled = params | {"head": jax.tree.map(lambda x: 2 * x, params["head"])}
  other = score_responses(doubled, batch, policy=POLICY, rows_per_batch=4)
  np.testing.assert_allclose(other, 2 * wanted[rows], rtol=0, atol=2e-5)
  assert reward_model._jitted_rewards._cache_size() == programs


def test_batches_that_cannot_be(params):
  with pytest.raises(ValueError, match="rows_per_batch: 1 rows do not hold the 2 responses"):
    score_responses(params, BATCH, policy=POLICY, rows_per_batch=1)
  three = BATCH._replace(tokens=TOKENS[:3], attended=MASK[:3], mask=MASK[:3])
  with pytest.raises(ValueError, match="tokens: 3 rows are not a multiple of the 2 rows"):
    score_responses(params, three, policy=POLICY, rows_per_batch=8)


# Held-out pairs.


def test_pair_statistics_by_loops():
  rng = np.random.default_rng(0)
  chosen, rejected = rng.normal(scale=2, size=(2, 300))
  chosen[:20] = rejected[:20]
  right, bins = 0.0, {}
  for better, worse in zip(chosen, rejected, strict=True):
    correct = 1.0 if better > worse else 0.5 if better == worse else 0.0
    p = math.exp(max(better, worse)) / (math.exp(better) + math.exp(worse))
    right += correct
    for k in range(10):
      if 0.5 + 0.05 * k <= p < 0.5 + 0.05 * (k + 1):
        bins.setdefault(k, []).append((correct, p))
  error = 0.0
  for members in bins.values():
    gap = np.mean([c for c, _ in members]) - np.mean([p for _, p in members])
    error += abs(gap) * len(members) / 300
  found = pair_statistics(chosen, rejected)
  assert found.accuracy == pytest.approx(right / 300)
  assert found.margin == pytest.approx(np.mean(chosen - rejected))
  assert found.calibration_error == pytest.approx(error) and error > 0.1
  assert found.low < found.accuracy < found.high
  assert pair_statistics(chosen + 5, rejected + 5).calibration_error == pytest.approx(error)


def test_a_calibrated_model_has_no_error_and_a_sure_one_may():
  log3 = math.log(3)
  three_of_four = np.array([log3, log3, log3, -log3])
  assert pair_statistics(three_of_four, np.zeros(4)).calibration_error == pytest.approx(0)
  sure_and_right = pair_statistics(np.full(4, 50.0), np.zeros(4))
  assert sure_and_right.accuracy == 1 and sure_and_right.calibration_error < 1e-12
  sure_and_wrong = pair_statistics(np.full(4, -50.0), np.zeros(4))
  assert sure_and_wrong.accuracy == 0 and sure_and_wrong.calibration_error == pytest.approx(1)
  ties = pair_statistics(np.zeros(4), np.zeros(4))
  assert ties.accuracy == 0.5 and ties.calibration_error == 0


def test_without_ties_the_interval_is_that_of_single_answers():
  margins = np.array([1.0] * 30 + [-1.0] * 10)
  found = pair_statistics(margins, np.zeros(40))
  single = proportion_interval(np.array([1] * 30 + [0] * 10), 1)
  np.testing.assert_allclose(found[:3], single, rtol=0, atol=0.002)


@pytest.mark.parametrize(
  "chosen, rejected, message",
  [
    ([], [], r"shape \(0,\) .* N at least 1"),
    ([1.0, 2.0], [1.0], r"chosen_rewards has shape \(2,\) and rejected_rewards \(1,\)"),
    ([1.0, np.nan], [0.0, 0.0], "rewards of pair 1 are nan and 0.0"),
  ],
)
def test_pairs_that_cannot_be(chosen, rejected, message):
  with pytest.raises(ValueError, match=message):
    pair_statistics(np.array(chosen), np.array(rejected))


# On disk.


def test_what_was_saved_scores_the_same_less_the_center(tmp_path, params, wanted):
  pytest.importorskip("safetensors")
  save_reward_model(tmp_path / "model", CONFIG, params, ByteTokenizer(), center=0.75)
  policy, loaded, tokenizer = load_reward_model(tmp_path / "model")
  assert policy.config == CONFIG and isinstance(tokenizer, ByteTokenizer)
  jax.tree.map(np.testing.assert_array_equal, loaded | {"head": params["head"]}, params)
  np.testing.assert_array_equal(loaded["head"]["weight"], params["head"]["weight"])
  rewards = score_responses(loaded, BATCH, policy=policy, rows_per_batch=4)
  np.testing.assert_allclose(rewards, wanted - 0.75, rtol=0, atol=1e-5)
  # Saved again, nothing is taken off twice; a further center adds.
  save_reward_model(tmp_path / "again", policy.config, loaded, tokenizer, center=0.25)
  assert load_reward_model(tmp_path / "again").params["head"]["bias"].tolist() == [-1.0]


def test_the_files_are_those_of_a_sequence_classifier(tmp_path, params):
  """Names, layout and entries as transformers has them; it scores the last token != pad."""
  safetensors_numpy = pytest.importorskip("safetensors.numpy")
  save_reward_model(tmp_path / "model", CONFIG, params, ByteTokenizer())
  tensors = safetensors_numpy.load_file(tmp_path / "model/model.safetensors")
  np.testing.assert_array_equal(tensors["score.weight"], params["head"]["weight"])
  assert "lm_head.weight" not in tensors and "score.bias" not in tensors
  entries = json.loads((tmp_path / "model/config.json").read_text())
  assert entries["architectures"] == ["LlamaForSequenceClassification"]
  assert entries["id2label"] == {"0": "LABEL_0"} and entries["label2id"] == {"LABEL_0": 0}
  assert entries["pad_token_id"] == 256


def edit_config(directory, **changes):
  """Changes entries; None takes one out."""
  path = directory / "config.json"
  entries = json.loads(path.read_text()) | changes
  path.write_text(json.dumps({key: x for key, x in entries.items() if x is not None}))


def test_a_classifier_of_others_loads(tmp_path, params):
  """It has no center."""
  pytest.importorskip("safetensors")
  save_reward_model(tmp_path / "model", CONFIG, params, ByteTokenizer(), center=3.0)
  edit_config(tmp_path / "model", reward_center=None)
  assert load_reward_model(tmp_path / "model").params["head"]["bias"].tolist() == [0.0]


def test_every_bad_directory_gives_one_line(tmp_path, params):
  safetensors_numpy = pytest.importorskip("safetensors.numpy")
  with pytest.raises(WeightsError, match="nowhere: no such model directory"):
    load_reward_model(tmp_path / "nowhere")
  trunk = {name: leaf for name, leaf in params.items() if name != "head"}
  unembed = {"unembed": params["embed"]}
  save_hf(tmp_path / "policy", CONFIG, trunk | unembed)
  with pytest.raises(WeightsError, match=r"policy: has no reward head .*\['LlamaForCausalLM'\]"):
    load_reward_model(tmp_path / "policy")
  edit_config(tmp_path / "policy", architectures=["LlamaForSequenceClassification"])
  with pytest.raises(WeightsError, match="tensor 'score.weight' is missing"):
    load_reward_model(tmp_path / "policy")
  model = tmp_path / "model"
  save_reward_model(model, CONFIG, params, ByteTokenizer())
  with pytest.raises(WeightsError, match="already exists"):
    save_reward_model(model, CONFIG, params, ByteTokenizer())
  with pytest.raises(WeightsError, match="leaf 'embed/embedding' has shape"):
    save_reward_model(tmp_path / "other", tiny_config(33), params, ByteTokenizer())
  file = model / "model.safetensors"
  tensors = safetensors_numpy.load_file(file)
  two = tensors | {"score.weight": np.zeros((2, CONFIG.width), np.float32)}
  safetensors_numpy.save_file(two, file)
  with pytest.raises(WeightsError, match=r"'score.weight'\) has shape \(2, 64\).* \(1, 64\)"):
    load_reward_model(model)
  edit_config(model, reward_center="high")
  with pytest.raises(WeightsError, match="reward_center is 'high', must be a number"):
    load_reward_model(model)
  for nothing in (None, [], "LlamaForSequenceClassification", [None]):
    edit_config(model, architectures=nothing)
    with pytest.raises(WeightsError, match="has no reward head"):
      load_reward_model(model)


@pytest.mark.parametrize(
  "pad, special, wanted",
  [(5, {}, 5), (2, {"a": 1, "b": 2, "c": 3, "d": 4}, 4), (2, {"b": 2}, None)],
)
def test_padding_never_ends_a_response(pad, special, wanted):
  """transformers scores the last token that is not padding: it must not skip the end."""
  tokenizer = types.SimpleNamespace(pad_id=pad, eos_ids=(2, 3), bos_id=1, special_tokens=special)
  assert reward_model._padding(tokenizer) == wanted


def test_a_models_tokenizer_comes_along(tmp_path, params):
  tokenizers = pytest.importorskip("tokenizers")
  pytest.importorskip("safetensors")
  backend = tokenizers.Tokenizer(tokenizers.models.WordLevel({"<end>": 0, "<x>": 1, "a": 2}, "a"))
  special = {"<end>": 0, "<x>": 1}
  backend.add_special_tokens(list(special))
  tokenizer = ModelTokenizer(backend, 3, (0,), 0, None, False, None, "<end>", special, None)
  save_reward_model(tmp_path / "model", CONFIG, params, tokenizer)
  loaded = load_reward_model(tmp_path / "model").tokenizer
  assert loaded.encode("a<end>") == tokenizer.encode("a<end>") == [2, 0]
  assert (loaded.eos_ids, loaded.pad_id) == ((0,), 1)  # padding is another token than the end
