"""What every test may rely on."""

import jax
import pytest
from hypothesis import settings

# A machine that is busy, or compiles on a first call, is not a failing test.
settings.register_profile("no_deadline", deadline=None)
settings.load_profile("no_deadline")


@pytest.fixture(scope="module")
def quick_compilation():
  """For tests that compile large programs and run each once: compiled with less care, they take
  little more than half the time."""
  jax.config.update("jax_disable_most_optimizations", True)
  yield
  jax.config.update("jax_disable_most_optimizations", False)
