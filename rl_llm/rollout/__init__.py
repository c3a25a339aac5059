"""From prompts to responses that are sampled, scored and graded, before anything is learned."""

from rl_llm.rollout.decoding import (
  DecodeState,
  Decoding,
  Prefilled,
  Requests,
  admit,
  decode_step,
  first_state,
  prefill,
  prompt_layout,
)
from rl_llm.rollout.generation import (
  STOP_EOS,
  STOP_LENGTH,
  Rollout,
  gather_weights,
  generate,
  row_keys,
)
from rl_llm.rollout.scoring import (
  CHUNK_SIZE,
  ResponseBatch,
  logprobs_of_hidden,
  response_hidden,
  response_logprobs,
  take_prompts,
)

__all__ = [
  "CHUNK_SIZE",
  "DecodeState",
  "Decoding",
  "Prefilled",
  "Requests",
  "ResponseBatch",
  "Rollout",
  "STOP_EOS",
  "STOP_LENGTH",
  "admit",
  "decode_step",
  "first_state",
  "gather_weights",
  "generate",
  "logprobs_of_hidden",
  "prefill",
  "prompt_layout",
  "response_hidden",
  "response_logprobs",
  "row_keys",
  "take_prompts",
]
