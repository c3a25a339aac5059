"""Reinforcement learning for language models in JAX: pure losses, stateless rollouts and updates.

Nothing is imported here, so `import rl_llm.losses` loads only jax, numpy and chex.
"""

__version__ = "0.1.0"
