"""Language models as pure functions, and their weights from and to files. The only package that
imports flax."""

from rl_llm.policy.configs import RopeScaling, TransformerConfig, WeightsError, tiny_config
from rl_llm.policy.transformer import Cache, Policy, make_policy

__all__ = [
  "Cache",
  "Policy",
  "RopeScaling",
  "TransformerConfig",
  "WeightsError",
  "make_policy",
  "tiny_config",
]
