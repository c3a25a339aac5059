"""These tests need eight devices; tests/test_eight_devices.py gives them to them."""

import jax

collect_ignore_glob = ["test_*.py"] if jax.device_count() != 8 else []
