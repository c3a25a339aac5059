"""Environments of agents: what a model's calls of tools do, and what it is told."""

from rl_llm.tasks.environments.environment import FORMS, Environment, EnvironmentError, Kind, load
from rl_llm.tasks.environments.episodes import Episodes
from rl_llm.tasks.environments.observations import STATUSES, Observation

__all__ = [
  "FORMS",
  "STATUSES",
  "Environment",
  "EnvironmentError",
  "Episodes",
  "Kind",
  "Observation",
  "load",
]
