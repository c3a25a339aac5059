"""Reinforcement learning for language models in JAX: pure losses, stateless rollouts and updates.

Nothing is imported here, so that `import rl_llm.losses` loads jax, numpy and chex and nothing else.
"""

__version__ = "0.1.0"
