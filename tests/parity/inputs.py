"""The arrays every system is given: ragged, with a tool's tokens, an empty row and zero factors.

Needs numpy only, and makes the same numbers everywhere.
"""

import numpy as np

P, G, T, V, PAIRS = 2, 3, 7, 11, 5
B = P * G
RNG = np.random.default_rng(20250711)


def _logprobs(around=None, scale=0.6):
  x = RNG.uniform(-3.0, -0.05, (B, T)) if around is None else around + RNG.normal(0, scale, (B, T))
  return np.minimum(x, -0.02).astype(np.float32)


LENGTHS = np.array([7, 4, 1, 0, 6, 5])
MASK = np.arange(T) < LENGTHS[:, None]
MASK[0, 3] = False  # written by a tool, inside the response
GROUPS = np.repeat(np.arange(P), G)

OLD = _logprobs()
LOGPROBS = _logprobs(OLD)
REF = _logprobs(OLD)
SAMPLER = _logprobs(OLD, 0.4)
ADVANTAGES = np.array([1.3, -0.8, -1.1, 0.4, 0.9, -1.7], np.float32)
TOKEN_ADVANTAGES = RNG.normal(size=(B, T)).astype(np.float32)
FACTORS = (RNG.uniform(0, 2, (B, T)) * (RNG.uniform(size=(B, T)) > 0.3)).astype(np.float32)
REWARDS = np.array([[1.0, 0.0, 0.5], [0.0, 0.25, 1.0]], np.float32)
MORE_REWARDS = np.array([[0.2, 0.9, 0.4], [0.6, 0.6, -0.3]], np.float32)
GREEDY = np.array([0.5, 0.25], np.float32)
VALUES = RNG.normal(size=(B, T)).astype(np.float32)
OLD_VALUES = (VALUES + RNG.normal(0, 0.4, (B, T))).astype(np.float32)
RETURNS = RNG.normal(size=(B, T)).astype(np.float32)
LOGITS = RNG.normal(0, 2, (B, T, V)).astype(np.float32)
TEACHER_LOGITS = (LOGITS + RNG.normal(0, 1, (B, T, V))).astype(np.float32)
ENTROPIES = RNG.uniform(0.1, 2.5, (B, T)).astype(np.float32)
# Of all probabilities at a token: that of the one sampled, and a share of the rest.
SUM_SQUARES = np.exp(2 * OLD) + (1 - np.exp(OLD)) ** 2 * RNG.uniform(0.2, 0.9, (B, T))
SUM_SQUARES = SUM_SQUARES.astype(np.float32)

# Where the reward of a response is paid: on its last token; nowhere in a row without tokens.
LAST = MASK & (np.cumsum(MASK[:, ::-1], axis=1)[:, ::-1] == 1)
TOKEN_REWARDS = np.where(LAST, REWARDS.reshape(B, 1), 0).astype(np.float32)

# Preference pairs: rows 0..PAIRS are chosen, the rest rejected; each of two tokens or more.
PAIR_MASK = np.arange(T) < np.array([7, 2, 5, 4, 3, 3, 6, 5, 2, 4])[:, None]
PAIR_OLD = RNG.uniform(-2.0, -0.05, (2 * PAIRS, T))
PAIR_REF = np.where(PAIR_MASK, PAIR_OLD, 0).astype(np.float32)
PAIR_LOGPROBS = np.where(PAIR_MASK, PAIR_OLD + RNG.normal(0, 0.4, PAIR_OLD.shape), 0)
PAIR_LOGPROBS = np.minimum(PAIR_LOGPROBS, 0).astype(np.float32)
DESIRABLE = np.array([1, 1, 0, 1, 0, 0, 1, 0, 0, 1], bool)
Z0 = np.float32(0.37)
SCORES = RNG.normal(size=(2, PAIRS)).astype(np.float32)
MARGINS = RNG.uniform(0, 1, PAIRS).astype(np.float32)
