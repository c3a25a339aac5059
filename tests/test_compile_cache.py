"""What is compiled is kept for one user alone, read again, and trusted only while it is whole."""

import os

import jax
import jax.numpy as jnp
import pytest
from jax.experimental.compilation_cache import compilation_cache as jax_cache

from rl_llm.errors import ConfigError
from rl_llm.runs import compile_cache


@pytest.fixture(autouse=True)
def nothing_configured():
  before = jax.config.jax_compilation_cache_dir
  jax.config.update("jax_compilation_cache_dir", None)
  jax_cache.reset_cache()
  yield
  jax.config.update("jax_compilation_cache_dir", before)
  jax_cache.reset_cache()


def compile_once(where, number=1.0):
  """Compiles a program that this process has not compiled before: (its result, read from disk)."""
  hits = []

  def listen(event, **_):
    hits.extend([event] * (event == "/jax/compilation_cache/cache_hits"))

  jax.monitoring.register_event_listener(listen)
  jax.clear_caches()
  with compile_cache.kept(where) as path:
    result = jax.jit(lambda x: jnp.sin(x) * number + x)(jnp.arange(3.0))
  jax.monitoring.unregister_event_listener(listen)
  return path, result.tolist(), len(hits)


def programs(path):
  return sorted(p for p in path.iterdir() if p.name.startswith("jit__lambda"))


def test_a_second_run_reads_what_the_first_compiled(tmp_path):
  path, first, hits = compile_once(str(tmp_path / "kept"))
  assert hits == 0 and path.parent == tmp_path / "kept" and len(programs(path)) == 1
  _, second, hits = compile_once(str(tmp_path / "kept"))
  assert hits > 0 and second == first
  assert jax.config.jax_compilation_cache_dir is None


@pytest.mark.parametrize("harm", ["flip", "cut", "unknown"])
def test_a_broken_entry_is_replaced(tmp_path, harm):
  path, first, _ = compile_once(str(tmp_path))
  _, _, all_read = compile_once(str(tmp_path))
  (entry,) = programs(path)
  whole = entry.read_bytes()
  middle = len(whole) // 2
  if harm == "unknown":  # As after a kill: written, and not noted.
    lines = (path / "sha256sums").read_text().splitlines(keepends=True)
    (path / "sha256sums").write_text("".join(x for x in lines if entry.name not in x))
  elif harm == "cut":
    entry.write_bytes(whole[:middle])
  else:
    entry.write_bytes(whole[:middle] + bytes([whole[middle] ^ 1]) + whole[middle + 1 :])
  harmed = entry.stat().st_ino, entry.read_bytes()
  _, second, hits = compile_once(str(tmp_path))
  assert second == first and hits == all_read - 1
  assert (entry.stat().st_ino, entry.read_bytes()) != harmed
  assert compile_once(str(tmp_path))[1:] == (first, all_read)


def test_another_number_is_another_program(tmp_path):
  assert compile_once(str(tmp_path), 1.0)[1][1] != compile_once(str(tmp_path), 2.0)[1][1]


def test_the_oldest_make_room(tmp_path, monkeypatch):
  path, _, _ = compile_once(str(tmp_path), 1.0)
  (old,) = programs(path)
  for entry in path.iterdir():
    os.utime(entry, (1, 1))
  compile_once(str(tmp_path), 2.0)
  (new,) = set(programs(path)) - {old}
  monkeypatch.setattr(compile_cache, "LIMIT", new.stat().st_size + 10)
  with compile_cache.kept(str(tmp_path)):
    assert programs(path) == [new]


def test_a_directory_of_others_is_refused(tmp_path, monkeypatch):
  path, _, _ = compile_once(str(tmp_path))
  path.chmod(0o777)
  with pytest.raises(ConfigError, match="--compile_cache=.*others may write.*chmod go-w"):
    compile_once(str(tmp_path))
  path.chmod(0o700)
  monkeypatch.setattr(os, "getuid", lambda: path.stat().st_uid + 1)
  with pytest.raises(ConfigError, match="belongs to another user"):
    compile_once(str(tmp_path))
  (tmp_path / "file").touch()
  with pytest.raises(ConfigError, match="Not a directory|File exists"):
    compile_once(str(tmp_path / "file"))


def test_the_users_own_directory_is_the_default(tmp_path, monkeypatch):
  monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
  path, _, _ = compile_once("auto")
  assert path.parent == tmp_path / "rl_llm" / "compiled"
  assert path.stat().st_mode & 0o777 == 0o700
  path.chmod(0o777)
  assert compile_once("auto")[0] is None  # Not worth ending a run for.
  assert compile_once("none")[0] is None


def test_what_jax_was_told_already_stays(tmp_path):
  jax.config.update("jax_compilation_cache_dir", str(tmp_path / "mine"))
  assert compile_once(str(tmp_path / "kept"))[0] is None
  assert not (tmp_path / "kept").exists()
