"""A conversation in the terminal: what `generate` samples, piece by piece."""

from __future__ import annotations

import io
import sys

import jax
import jax.numpy as jnp
import pytest

from experiments import chat
from rl_llm.data.prompts import pad_prompts
from rl_llm.rollout import generate
from rl_llm.rollout.sampling import SamplingConfig
from rl_llm.rollout.streaming import stream
from rl_llm.text.tokenizers import ByteTokenizer
from tests.representatives import mostly_slow


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("limit", mostly_slow([1, 24], quick=[1]))
def test_the_tokens_are_those_of_a_rollout(small, temperature, limit):
  tokenizer, sampling = ByteTokenizer(), SamplingConfig(temperature, top_k=50)
  params = jax.jit(small.init)(jax.random.key(0))
  params["embed"] = jax.tree.map(lambda x: 10 * x, params["embed"])
  for number, prompt in enumerate(([7, 8, 9], list(range(30)))):
    key = jax.random.fold_in(jax.random.key(1), number)
    streamed = list(
      stream(params, prompt, key, sampling, policy=small, tokenizer=tokenizer, max_new_tokens=limit)
    )
    padded = pad_prompts([prompt], pad_id=tokenizer.pad_id)
    whole = generate(
      params,
      jnp.asarray(padded.tokens),
      jnp.asarray(padded.lengths),
      key[None],
      sampling,
      policy=small,
      responses_per_prompt=1,
      max_new_tokens=limit,
      eos_ids=tuple(tokenizer.eos_ids),
      pad_id=tokenizer.pad_id,
    )
    assert streamed == whole.tokens[0, : int(whole.lengths[0])].tolist()


def test_a_character_is_shown_once_it_is_whole():
  text = "né ✓!"
  pieces = list(chat.pieces(text.encode(), ByteTokenizer()))
  assert "".join(pieces) == text and "\ufffd" not in "".join(pieces)
  assert pieces[0] == "n"  # At once, not at the end.


def test_every_answer_is_to_the_whole_conversation():
  asked, written = [], []

  def answer(messages, turn):
    asked.append(([message["content"] for message in messages], turn))
    yield "a"
    if turn == 1:
      raise KeyboardInterrupt
    yield "b"

  chat.talk(answer, ["one", "two", " ", "/new", "three"], written.append)
  assert asked == [(["one"], 0), (["one", "ab", "two"], 1), (["three"], 4)]
  assert "".join(written) == "ab\na ...\na new conversation\nab\n"


def test_a_line_of_input_is_a_turn(small, monkeypatch, capsys):
  monkeypatch.setattr(sys, "stdin", io.StringIO("hello\nagain\n"))
  assert chat.main(chat.Config(model="tiny", max_new_tokens=4, temperature=0.0)) == 0
  first, second = capsys.readouterr().out.split("\n")[:2]
  answer = chat.open_model(chat.Config(model="tiny", max_new_tokens=4, temperature=0.0), print)
  conversation = [{"role": "user", "content": "hello"}]
  assert "".join(answer(conversation, 0)) == first
