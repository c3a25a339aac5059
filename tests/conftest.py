"""What every test may rely on.

Compiling is most of the suite's time, and most programs here run once or twice. So they are
compiled with less care, here and in the processes that tests start: no result changes by more than
rounding. `JAX_DISABLE_MOST_OPTIMIZATIONS=0 make test` compiles as users do, and takes far longer.
"""

import atexit
import gc
import os
import shutil
import tempfile
from importlib.metadata import version

import pytest
from hypothesis import HealthCheck, settings

ON_A_GPU = os.environ.get("RL_LLM_GPU") == "1"  # `make test-gpu`
# Read when JAX is imported, which no test has done yet.
if ON_A_GPU:  # The GPU's own kernels, and bounds that are float32's: TF32 has ten bits.
  os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "0")
  os.environ.setdefault("JAX_DEFAULT_MATMUL_PRECISION", "highest")
  os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")
# XLA's older way to make a loop of a fusion takes less time to compile; later versions lack it. And
# a small program that is cut into 32 parts, for as many threads, takes half as long again.
QUICK_COMPILE = "--xla_cpu_use_fusion_emitters=false --xla_cpu_parallel_codegen_split_count=1"
KNOWN_JAX = version("jaxlib").startswith("0.10.")
if os.environ["JAX_DISABLE_MOST_OPTIMIZATIONS"] == "1" and KNOWN_JAX:
  os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {QUICK_COMPILE}".strip()

# Equal programs are compiled once, by the worker or command of this test run that needs them first.
# With a directory of your own, JAX_COMPILATION_CACHE_DIR=DIR make test, the next test run has them.
if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
  directory = tempfile.mkdtemp(prefix="rl_llm-")
  atexit.register(shutil.rmtree, directory, ignore_errors=True)
  os.environ["JAX_COMPILATION_CACHE_DIR"] = f"{directory}/compiled"
  os.environ["XDG_CACHE_HOME"] = directory
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES", "-1")

# Tracing makes and drops so many objects that looking for garbage among all that JAX holds takes a
# sixth of the time of a test that trains.
gc.set_threshold(100_000, 50, 100)

# A machine that is busy, or compiles on a first call, is not a failing test.
settings.register_profile("patient", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("patient")


def pytest_collection_finish():
  """All of a process's programs are built in one of MLIR's contexts.

  JAX makes one for each: a fifth of the time that a small program takes to compile, and an example
  of a docstring is dozens of these.
  """
  if KNOWN_JAX and not ON_A_GPU:
    from jax._src.interpreters import mlir

    context = mlir.make_ir_context()
    mlir.make_ir_context = lambda: context


def pytest_runtest_setup(item):
  """Skips what is marked for another platform than the one that is here."""
  wanted = {name for name in ("cpu", "gpu") if item.get_closest_marker(name)}
  if wanted or ON_A_GPU:
    import jax  # Here, so that the settings above come first.

    here = jax.default_backend()
    if ON_A_GPU and here != "gpu":
      pytest.skip(f"make test-gpu needs a GPU; here is {here}")
    if wanted and here not in wanted:
      pytest.skip(f"needs a {' or '.join(wanted).upper()}; here is {here}")
