"""Distillation: objectives against whole distributions, training, interruptions, refusals."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments import distill, sft
from rl_llm import rollout
from rl_llm.errors import ConfigError
from rl_llm.policy import make_policy, tiny_config
from rl_llm.runs.config import replace
from rl_llm.text.tokenizers import ByteTokenizer
from tests.experiments import helpers
from tests.experiments.helpers import equal, run, wrap_seams
from tests.experiments.test_sft import KILL_OR_ALL, stopped

P, G, T, V = 2, 2, 5, 16


def settings(files, **changes):
  base = helpers.settings(files) | {"teacher": "another", "responses_per_prompt": 4}
  return base | {"optimizer.learning_rate": 0.01} | changes


def models():
  """Student and teacher: other widths, and a teacher with more rows than the student's."""
  student = make_policy(dataclasses.replace(tiny_config(V), n_layers=1))
  sizes = {"n_layers": 1, "width": 32, "mlp_width": 64}
  teacher = make_policy(dataclasses.replace(tiny_config(V + 4), **sizes))
  pair = enumerate((student, teacher))
  return [(each, jax.jit(each.init)(jax.random.key(n))) for n, each in pair]


def batch():
  rng = np.random.default_rng(0)
  mask = np.arange(T) < np.array([5, 2, 3, 1])[:, None]
  return rollout.ResponseBatch(
    prompts=np.int32([[1, 2, 3], [0, 4, 5]]),
    prompt_lengths=np.int32([3, 2]),
    tokens=rng.integers(0, V, (P * G, T)).astype(np.int32),
    attended=mask,
    mask=mask,
    sampler_logprobs=np.where(mask, -rng.uniform(1, 3, mask.shape), 0).astype(np.float32),
  )


def logits(policy, params, made):
  """[B, T, rows]: what the model says at each place, without sharing prompts or chunks."""
  hidden = jax.jit(rollout.response_hidden, static_argnames="policy")(params, made, policy=policy)
  return np.asarray(hidden @ policy.unembed(params).T, np.float64)


def softmax(x):
  e = np.exp(x - x.max(-1, keepdims=True))
  return e / e.sum(-1, keepdims=True)


@pytest.mark.parametrize("beta", [0.0, 0.3, 1.0])
def test_gkd_compares_the_two_distributions_over_the_student_s_vocabulary(beta):
  (student, params), (teacher, teacher_params) = models()
  config = replace(distill.Config(), {"teacher": "x", "loss.beta": beta})
  programs = distill.make_programs(config, student, teacher, None)
  taken = programs.take(programs.read(teacher_params, batch()), jnp.arange(P))
  hparams = {"loss": {"beta": beta}, "teacher_unembedding": teacher.unembed(teacher_params)[:V]}
  loss_fn = jax.jit(distill.make_loss(config, student, teacher))
  loss, found = loss_fn(params, taken, hparams)
  q = softmax(logits(student, params, batch()))
  p = softmax(logits(teacher, teacher_params, batch())[..., :V])
  m = beta * p + (1 - beta) * q
  kl = lambda a, b: (a * np.log(a / b)).sum(-1)  # noqa: E731
  each = {0.0: kl(p, q), 1.0: kl(q, p)}.get(beta, beta * kl(p, m) + (1 - beta) * kl(q, m))
  assert float(loss) == pytest.approx(each[batch().mask].mean(), rel=1e-4)
  assert int(found["divergence"][1]) == batch().mask.sum()
  if beta == 1.0:  # As two microbatches.
    halves = [jax.tree.map(lambda x, i=i: np.split(x, 2)[i], taken) for i in (0, 1)]
    parts = [float(loss_fn(params, half, hparams)[0]) for half in halves]
    assert sum(parts) == pytest.approx(float(loss), rel=1e-4) and all(parts)
  both = programs.divergence(params, teacher_params, batch())
  for name, value in (("forward", kl(p, q)), ("reverse", kl(q, p))):
    total, count = both[f"eval/{name}_kl"]
    assert float(total / count) == pytest.approx(value[batch().mask].mean(), rel=1e-4)


@pytest.mark.parametrize("discount", [0.0, 0.5])
def test_minillm_charges_each_token_for_what_follows(discount):
  (student, params), (teacher, teacher_params) = models()
  changes = {"teacher": "x", "loss.name": "minillm_advantages", "loss.discount": discount}
  config = replace(distill.Config(), changes)
  read = distill.make_programs(config, student, teacher, None).read(teacher_params, batch())
  assert np.array_equal(read.mask, batch().mask)
  gaps = np.where(batch().mask, np.asarray(read.ref_logprobs) - batch().sampler_logprobs, 0)
  wanted, following = np.zeros_like(gaps), 0
  for t in reversed(range(T)):
    following = wanted[:, t] = gaps[:, t] + discount * following
  np.testing.assert_allclose(np.where(batch().mask, wanted, 0), read.advantages, rtol=1e-4)


def every_text(length):
  """All texts of that length, as answers to one prompt."""
  tokens = np.indices((V,) * length).reshape(length, -1).T.astype(np.int32)
  mask = np.ones(tokens.shape, bool)
  return rollout.ResponseBatch(np.int32([[1, 2, 3]]), np.int32([3]), tokens, mask, mask)


@pytest.mark.parametrize("name", ["on_policy_distillation_loss", "minillm_advantages"])
def test_the_expected_gradient_is_that_of_the_kl(name):
  """Over all texts of two tokens, each as often as the student writes it at this temperature."""
  (student, params), (teacher, teacher_params) = models()
  changes = {"teacher": "x", "loss.name": name, "sampling.temperature": 0.7}
  config, made = replace(distill.Config(), changes), every_text(2)

  def said(policy, params):
    hidden = rollout.response_hidden(params, made, policy=policy)
    rows = jax.nn.log_softmax(hidden @ policy.unembed(params).T / 0.7, axis=-1)
    return jnp.take_along_axis(rows, made.tokens[..., None], axis=-1)[..., 0]

  theirs = said(teacher, teacher_params)

  def kl_of_whole_texts(params):
    own = said(student, params)
    return jnp.sum(jnp.exp(own.sum(1)) * (own - theirs).sum(1))

  def kl_at_each_token(params):
    """The first tokens are what they are: each of them is followed by V others."""
    own = said(student, params)
    first, second = (jnp.exp(own[:, t]) * (own - theirs)[:, t] for t in range(2))
    return jnp.sum(first) / V + jnp.sum(jax.lax.stop_gradient(jnp.exp(own[:, 0])) * second)

  own = said(student, params)
  read = distill.make_programs(config, student, teacher, None).read
  batch = read(teacher_params, made._replace(sampler_logprobs=own))
  batch = batch._replace(weights=jnp.exp(own.sum(1, keepdims=True)) * made.mask)
  loss = distill.make_loss(config, student, teacher)
  found, _ = jax.grad(loss, has_aux=True)(params, batch, {"loss": {}})
  kl = kl_of_whole_texts if name == "minillm_advantages" else kl_at_each_token
  for one, two in zip(*map(jax.tree.leaves, (found, jax.grad(kl)(params))), strict=True):
    np.testing.assert_allclose(one, two, rtol=0, atol=1e-5 * np.abs(two).max())


@pytest.mark.slow
@pytest.mark.parametrize(
  ("name", "share"),
  # One number a token says less than a distribution over all: its student needs more texts.
  [("gkd_loss", 0.5), ("on_policy_distillation_loss", 0.7), ("minillm_advantages", 0.75)],
)
def test_the_held_out_kl_of_a_two_layer_student_falls(name, share, tmp_path):
  """The teacher is the tiny model after SFT on copying; the student, another seed's."""
  taught = {"model": "tiny", "task": "copy", "prompt_format": "plain", "max_new_tokens": 4}
  steps = {"steps": 60, "optimizer.learning_rate": 3e-3, "eval.every": 0}
  steps |= {"examples_per_step": 64, "microbatch_rows": 64}
  run(sft, tmp_path / "teacher", taught | steps)
  changes = {"teacher": str(tmp_path / "teacher"), "seed": 1, "loss.name": name, "steps": 60}
  changes |= {"prompts_per_step": 32, "microbatch_prompts": 32, "responses_per_prompt": 4}
  changes |= {"optimizer.learning_rate": 3e-3, "eval.every": 60, "eval.samples": 3}
  found = run(distill, tmp_path / "student", taught | changes)
  first, last = found.metrics[0], found.metrics[-1]
  assert last["eval/reverse_kl"] < share * first["eval/reverse_kl"]
  if name == "gkd_loss":
    assert last["eval/forward_kl"] < share * first["eval/forward_kl"]


@pytest.mark.parametrize("stops", KILL_OR_ALL, ids=len)
def test_a_killed_run_resumes_bit_for_bit(stops, files, small, tmp_path, monkeypatch):
  """With right answers in about half of the steps."""
  changes = settings(files, steps=6, own_share=0.5, task="copy")
  changes |= {"checkpoint.every": 2, "eval.every": 4, "epochs": 2}
  straight = run(distill, tmp_path / "straight", changes)
  cut = stopped(monkeypatch, distill, tmp_path / "cut", changes, stops)
  assert cut.metrics == straight.metrics and cut.samples == straight.samples
  assert equal(cut.state, straight.state)
  assert {row.get("own_texts") for row in straight.metrics[:-1]} == {0, 1}
  held_out = [row["eval/reverse_kl"] for row in straight.metrics if "eval/reverse_kl" in row]
  assert len(held_out) == 3 and min(held_out) > 0.01  # The teacher is another model.


@pytest.mark.slow
@pytest.mark.parametrize("name", ["gkd_loss", "on_policy_distillation_loss"])
def test_microbatches_add_up_to_the_whole(name, files, small, tmp_path):
  changes = settings(files, **{"loss.name": name, "eval.every": 0})
  whole = run(distill, tmp_path / "whole", changes)
  parts = run(distill, tmp_path / "parts", changes | {"microbatch_prompts": 1})
  for one, two in zip(whole.metrics[:-1], parts.metrics[:-1], strict=True):
    assert one["loss"] == pytest.approx(two["loss"], rel=1e-4, abs=1e-6)


class Sampled(Exception):
  """A step has its texts."""


def test_a_text_without_a_grade_is_learned_from_all_the_same(files, small, tmp_path, monkeypatch):
  masks = []

  def wrap(sample):
    def noting(state, step, clock):
      found = sample(state, step, clock)
      masks.append((found.batch.mask, found.batch.attended, found.metrics))
      raise Sampled

    return noting

  wrap_seams(monkeypatch, sample=wrap)
  changes = {"jsonl.reward_function": "lonely", "reward_isolation": "sample", "eval.every": 0}
  with pytest.raises(Sampled):
    run(distill, tmp_path / "run", settings(files, steps=1, **changes))
  [(mask, attended, found)] = masks
  assert found["rewards_not_applicable"] > 0 and np.array_equal(mask, attended)


def test_another_vocabulary_is_refused_in_one_line(files, small, tmp_path, monkeypatch):
  class Other(ByteTokenizer):
    pass

  known = lambda own: {"a": 0} if isinstance(own, Other) else {}  # noqa: E731
  monkeypatch.setattr("experiments.setup.vocabulary", known)
  original = distill.setup.load_teacher

  def other(config, run, student):
    return original(config, run, student._replace(tokenizer=Other()))

  monkeypatch.setattr(distill.setup, "load_teacher", other)
  with pytest.raises(ConfigError, match="a model with the vocabulary of tiny") as error:
    run(distill, tmp_path / "run", settings(files))
  assert "\n" not in str(error.value)


@pytest.mark.parametrize(
  ("changes", "says"),
  [
    ({"teacher": ""}, "a model to learn from"),
    ({"own_share": 0.5, "loss.name": "minillm_advantages"}, "gkd_loss takes any text"),
    ({"epochs": 2, "loss.name": "minillm_advantages"}, "on_policy_distillation_loss"),
    ({"minibatches": 3}, "minibatches"),
    ({"loss.discount": 0.5}, "loss.discount"),
    ({"loss.beta": 1.5}, "loss.beta"),
  ],
)
def test_refused(changes, says, files):
  with pytest.raises(ConfigError, match=says):
    distill.check(replace(distill.Config(), settings(files) | changes))
