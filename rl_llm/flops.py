"""How much work a step is, by formula: what measured and planned times are compared with."""

from __future__ import annotations


def forward_flops(
  *,
  vocab_size: int,
  width: int,
  n_layers: int,
  n_heads: int,
  n_kv_heads: int,
  head_dim: int,
  mlp_width: int,
  prompts: int,
  responses: int,
  prompt_tokens: int,
  new_tokens: int,
) -> int:
  """Operations of the matrix products that read all prompts and responses once, 2 a multiply-add.

      token      = 2 layers (2 D N H + 2 D K H + 3 D F)     for every token read
      attention  = 4 layers N H                             for every key that a token sees
      prediction = 2 D V                                    for every token written

  A prompt is read once for all its responses, and the last token of a response by nobody. One layer
  of width 1 with one head of size 1, an MLP of width 1, a vocabulary of 1, a prompt of one token
  and a response of one: the prompt's token meets 7 weights and one key, 14 + 4, and the prediction
  makes 2.

  >>> ones = dict.fromkeys(("vocab_size", "width", "n_layers", "n_heads", "n_kv_heads", "head_dim",
  ...   "mlp_width", "prompts", "responses", "prompt_tokens", "new_tokens"), 1)
  >>> forward_flops(**ones)
  20

  Args:
    vocab_size: V.
    width: D.
    n_layers: layers.
    n_heads: N.
    n_kv_heads: K.
    head_dim: H.
    mlp_width: F.
    prompts: P.
    responses: G, per prompt.
    prompt_tokens: L, tokens of each prompt.
    new_tokens: T, tokens of each response.

  Returns:
    What generation costs; an update costs three times as much, since its backward pass has two
    products for each of the forward one.
  """
  projections = 2 * width * (n_heads + n_kv_heads) * head_dim
  token = 2 * n_layers * (projections + 3 * width * mlp_width)
  attention = 4 * n_layers * n_heads * head_dim
  prediction = 2 * width * vocab_size

  def read(tokens: int) -> int:
    """A row's first tokens; each sees itself and those before it."""
    return tokens * token + attention * tokens * (tokens + 1) // 2

  response = read(prompt_tokens + new_tokens - 1) - read(prompt_tokens) + new_tokens * prediction
  return prompts * (read(prompt_tokens) + responses * response)
