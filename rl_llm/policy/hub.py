"""Models by their name on the Hugging Face Hub, such as Qwen/Qwen2.5-0.5B-Instruct.

A name is looked up in the cache in which `hf download`, transformers and others keep what they have
fetched. Nothing is fetched unasked: a model is gigabytes.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from typing import Any

from rl_llm.policy.model_files import WeightsError

# What a model is read from; no pickles.
_FILES = ("*.json", "*.safetensors", "*.jinja", "*.txt", "*.model")
_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")


def local_model(name: str, *, fetch: bool = False, say: Callable[[str], Any] = print) -> str:
  """The directory of a model that is given by its name on the Hub; any other name stays.

  >>> local_model("smollm2"), local_model("./mine")
  ('smollm2', './mine')

  Args:
    name: as for `load_model`.
    fetch: whether to download a model that this machine does not have.
    say: called with a line about a download.

  Raises:
    WeightsError: the model is not on this machine, or cannot be fetched; the message has the
      command that does.
  """
  if os.path.exists(name) or not _NAME.fullmatch(name) or name.endswith(".gguf"):
    return name
  by_hand = f"hf download {name} fetches it, and so does --fetch"
  try:
    import huggingface_hub
  except ImportError:
    raise WeightsError(
      f"{name}: no such directory, and a model of the Hub needs the package huggingface_hub: "
      f"pip install huggingface_hub; then {by_hand}"
    ) from None
  try:
    return huggingface_hub.snapshot_download(name, local_files_only=True, allow_patterns=_FILES)
  except Exception as error:
    if not fetch:
      raise WeightsError(f"{name}: not on this machine; {by_hand}") from error
  say(f"fetching {name} from huggingface.co")
  try:
    return huggingface_hub.snapshot_download(name, allow_patterns=_FILES)
  except Exception as error:
    reason = str(error).strip().splitlines()[0][:200]
    raise WeightsError(
      f"{name}: cannot be fetched ({type(error).__name__}: {reason}); check its name and the "
      "network, and for a gated model hf auth login"
    ) from error
