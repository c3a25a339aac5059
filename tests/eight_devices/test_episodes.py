"""Episodes over a mesh: the same as on one device, token for token."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rl_llm.data.prompts import pad_prompts
from rl_llm.parallel.sharding import gather_to_host, make_mesh, shard
from rl_llm.policy import make_policy, tiny_config
from rl_llm.rollout import row_keys
from rl_llm.rollout.sampling import SamplingConfig
from rl_llm.rollout.turns import make_begin
from rl_llm.text.tokenizers import ByteTokenizer

PROMPTS, GROUP = 8, 2


class Tokenizer(ByteTokenizer):
  """Bytes, of which every third ends a turn: random weights then write short turns."""

  eos_ids = tuple(range(0, 259, 3))


def played(mesh):
  """Four turns of each row, with answers of 0 to 6 tokens, and rows that end early."""
  policy = make_policy(tiny_config(264), mesh=mesh)  # A vocabulary that eight devices can share.
  params = jax.jit(policy.init)(jax.random.key(0))
  params = params | {"embed": jax.tree.map(lambda x: 15 * x, params["embed"])}
  params = params if mesh is None else shard(params, mesh)
  begin = make_begin(
    policy, Tokenizer(), turn_tokens=6, episode_tokens=40, say=lambda line: None, mesh=mesh
  )
  prompts = pad_prompts([[65 + i] * (1 + i % 5) for i in range(PROMPTS)], pad_id=256)
  keys = row_keys(jax.random.key(3), PROMPTS, GROUP)
  sampling = SamplingConfig(jnp.ones(PROMPTS * GROUP))
  state, resume = begin(params)(prompts, keys, sampling, GROUP)
  rng = np.random.default_rng(0)
  for turn in range(3):
    answers = [rng.integers(0, 256, size=rng.integers(0, 7)).tolist() for _ in keys]
    said = {row: ids for row, ids in enumerate(answers) if row % 4 >= turn}
    state = resume(state, said)
  return gather_to_host(state._replace(cache=None))


@pytest.mark.parametrize("sizes", [{}, {"fsdp": 2, "tensor": 2}, {"fsdp": 8}], ids=str)
def test_episodes_are_those_of_one_device(sizes):
  alone, together = played(None), played(make_mesh(**sizes))
  assert alone.turn.max() == 3 and len(set(alone.length.tolist())) > 4
  for name in ("tokens", "mask", "turns", "length", "ended", "written"):
    np.testing.assert_array_equal(getattr(together, name), getattr(alone, name), err_msg=name)
  np.testing.assert_allclose(together.logprobs, alone.logprobs, rtol=0, atol=1e-5)
