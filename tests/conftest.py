"""What every test may rely on.

Compiling is most of the suite's time, and most programs here run once or twice. So they are
compiled with less care, here and in the processes that tests start: no result changes by more than
rounding. `JAX_DISABLE_MOST_OPTIMIZATIONS=0 make test` compiles as users do, and takes far longer.
"""

import atexit
import os
import shutil
import tempfile
from importlib.metadata import version

from hypothesis import settings

# Read when JAX is imported, which no test has done yet.
os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")
# XLA's older way to make a loop of a fusion takes less time to compile; later versions lack it.
QUICK_LOOPS = "--xla_cpu_use_fusion_emitters=false"
if os.environ["JAX_DISABLE_MOST_OPTIMIZATIONS"] == "1" and version("jaxlib").startswith("0.10."):
  os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {QUICK_LOOPS}".strip()

# The commands that tests start read what others of this test run have compiled.
if "PYTEST_XDIST_WORKER" not in os.environ:
  os.environ["XDG_CACHE_HOME"] = tempfile.mkdtemp(prefix="rl_llm-")
  atexit.register(shutil.rmtree, os.environ["XDG_CACHE_HOME"], ignore_errors=True)

# A machine that is busy, or compiles on a first call, is not a failing test.
settings.register_profile("no_deadline", deadline=None)
settings.load_profile("no_deadline")
