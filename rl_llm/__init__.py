"""Reinforcement learning of language models in JAX: pure losses, stateless rollouts and updates.

Nothing is imported here, so that `import rl_llm.losses` loads jax, numpy and chex and nothing else.
"""
