"""These tests need eight devices; tests/test_eight_devices.py gives them to them."""

import jax
import pytest

collect_ignore_glob = ["test_*.py"] if jax.device_count() != 8 else []


@pytest.fixture(autouse=True)
def compile_fast(quick_compilation):
  """Compiling is nearly all of the time of programs this small."""
