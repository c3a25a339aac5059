"""Render a model's own chat template, which is a program that came with the weights.

A chat model is trained on one exact layout of roles and markers, written as Jinja text in its
tokenizer files. That text is downloaded code: it has opened shells in several serving stacks.
Jinja's sandbox stops reads of Python internals, but not `range(100000)` inside `range(100000)` or
`'a' * 10**10`. So a template is only ever rendered in a child process with an empty environment,
limits on memory and processor time, a deadline and a bound on the output; text goes in and out as
JSON. The child is started once (about 0.2 s) and kept, so a prompt costs well under a millisecond;
it ends with its parent.

This file is also the child's program (`python -I chat_template.py`), so it only imports the
standard library at the top.
"""

from __future__ import annotations

import atexit
import functools
import importlib.metadata
import importlib.util
import json
import os
import pathlib
import re
import selectors
import subprocess
import sys
import threading
import time
import types
from collections.abc import Mapping, Sequence
from typing import Any

from rl_llm.errors import UserError

Messages = Sequence[Mapping[str, Any]]

_MEMORY_BYTES = 512 * 2**20
_START_SECONDS = 60.0
_JINJA = 'pip install "jinja2>=3.1.6"'

# Two turns, the first with reasoning that some templates drop once it is history.
_PROBE = (
  {"role": "user", "content": "What is 1 + 1?"},
  {"role": "assistant", "content": "<think>\nOne and one.\n</think>\n\n2"},
  {"role": "user", "content": "And 2 + 2?"},
  {"role": "assistant", "content": "<think>\nTwo and two.\n</think>\n\n4"},
)


class ChatTemplateError(UserError, ValueError):
  """A template was refused, failed, or exceeded its limits; one line says which."""


def render(
  template: str,
  messages: Messages,
  *,
  add_generation_prompt: bool = True,
  bos_token: str | None,
  eos_token: str | None,
  tools: Sequence[Mapping[str, Any]] | None = None,
  names: Mapping[str, Any] = types.MappingProxyType({}),
  timeout: float = 2.0,
  max_chars: int = 1_000_000,
) -> str:
  """The text a chat model expects for a conversation, from the template in its own files.

  The layout is the model's, not ours: SmolLM2 wants `<|im_start|>user`, Llama 3
  `<|start_header_id|>user<|end_header_id|>`. A hand-written layout that is nearly right lowers
  accuracy without any error.

  >>> render("{% for m in messages %}[{{ m.role }}] {{ m.content }}\\n{% endfor %}"
  ...        "{% if add_generation_prompt %}[assistant] {% endif %}",
  ...        [{"role": "user", "content": "3+4?"}], bos_token=None, eos_token=None)
  '[user] 3+4?\\n[assistant] '

  Args:
    template: Jinja text. May use loop controls, `{% generation %}` (rendered as if it were absent),
      `raise_exception`, `tojson` and `strftime_now` (today's date: such a prompt differs from one
      day to the next).
    messages: one conversation, a list of `{"role": str, "content": str, ...}`; plain JSON data.
    add_generation_prompt: end with the header of the assistant's next turn.
    bos_token: text of the tokenizer's BOS, which some templates print; None if it has none.
    eos_token: the same for EOS.
    tools: JSON schemas of tools, for templates that print them.
    names: what else the template may read, such as {"enable_thinking": False}; plain JSON data.
    timeout: seconds this conversation may take, > 0.
    max_chars: characters the result may have, > 0.

  Returns:
    The rendered text. Encode it without adding another BOS.

  Raises:
    ChatTemplateError: the template is wrong, refuses the messages, reaches for what the sandbox
      forbids, takes longer than `timeout` or gives more than `max_chars`; or jinja2 is missing.
  """
  return render_many(
    template,
    [messages],
    add_generation_prompt=add_generation_prompt,
    bos_token=bos_token,
    eos_token=eos_token,
    tools=tools,
    names=names,
    timeout=timeout,
    max_chars=max_chars,
  )[0]


def render_many(
  template: str,
  conversations: Sequence[Messages],
  *,
  add_generation_prompt: bool = True,
  bos_token: str | None,
  eos_token: str | None,
  tools: Sequence[Mapping[str, Any]] | None = None,
  names: Mapping[str, Any] = types.MappingProxyType({}),
  timeout: float = 2.0,
  max_chars: int = 1_000_000,
) -> list[str]:
  """`render` for each conversation; `timeout` and `max_chars` bound each one of them.

  >>> render_many("{{ messages[0].content }}{{ eos_token }}",
  ...             [[{"role": "user", "content": text}] for text in ("a", "b")],
  ...             bos_token=None, eos_token="<end>")
  ['a<end>', 'b<end>']
  """
  if not isinstance(template, str):
    raise ChatTemplateError(f"template must be Jinja text, got {type(template).__name__}")
  if not timeout > 0:
    raise ChatTemplateError(f"timeout must be > 0 seconds, got {timeout}")
  if max_chars < 1:
    raise ChatTemplateError(f"max_chars must be at least 1, got {max_chars}")
  texts = []
  for index, messages in enumerate(conversations):
    _check_messages(messages, index)
    context = {
      **names,
      "messages": list(messages),
      "add_generation_prompt": bool(add_generation_prompt),
      "bos_token": bos_token or "",
      "eos_token": eos_token or "",
      "tools": None if tools is None else list(tools),
    }
    request = {"template": template, "context": context, "timeout": timeout, "max_chars": max_chars}
    try:
      line = json.dumps(request).encode() + b"\n"
    except (TypeError, ValueError, RecursionError) as error:
      raise ChatTemplateError(
        f"conversation {index}: messages and tools must be plain JSON data (str, numbers, lists, "
        f"dicts): {error}"
      ) from None
    texts.append(_ask(line, timeout, max_chars))
  return texts


def is_prefix_preserving(
  template: str, messages: Messages = _PROBE, *, bos_token: str | None, eos_token: str | None
) -> bool:
  """Whether adding a turn leaves the text of the earlier turns as it was.

  In a conversation of several turns the policy continues the text it saw. If a template rewrites
  history (Qwen3's removes the reasoning of earlier turns), the final transcript differs from the
  text that was sampled, so log-probs computed on it belong to tokens in a context that the policy
  never saw.

  >>> keeps = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}"
  >>> keeps += "{% if add_generation_prompt %}<assistant>{% endif %}"
  >>> is_prefix_preserving(keeps, bos_token=None, eos_token=None)
  True
  >>> last_only = "m.content if loop.last else m.content.split('</think>')[-1]"
  >>> drops = keeps.replace("m.content", last_only)
  >>> is_prefix_preserving(drops, bos_token=None, eos_token=None)
  False

  Args:
    template: Jinja text.
    messages: the conversation to try; the default has two turns with reasoning in them.
    bos_token: as in `render`.
    eos_token: as in `render`.

  Returns:
    True if, for every k, the text of the first k + 1 messages starts with that of the first k, and
    the header of an assistant's turn is the one that `add_generation_prompt` writes.

  Raises:
    ChatTemplateError: as in `render`.
  """

  def text(count: int, generation: bool) -> str:
    return render(
      template,
      messages[:count],
      add_generation_prompt=generation,
      bos_token=bos_token,
      eos_token=eos_token,
    )

  return all(
    text(k + 1, False).startswith(text(k, messages[k]["role"] == "assistant"))
    for k in range(1, len(messages))
  )


def _check_messages(messages: Messages, index: int) -> None:
  if isinstance(messages, str | Mapping) or not isinstance(messages, Sequence) or not messages:
    raise ChatTemplateError(
      f"conversation {index}: messages must be a non-empty list of "
      f'{{"role": ..., "content": ...}}, got {_one_line(repr(messages), 80)}'
    )
  for position, message in enumerate(messages):
    if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
      raise ChatTemplateError(
        f"conversation {index}: messages[{position}] must be a dict with a str 'role', got "
        f"{_one_line(repr(message), 80)}"
      )


def _one_line(text: str, limit: int = 300) -> str:
  """Text from a template or a dataset, safe to print: no line breaks or control characters."""
  text = "".join(c if c.isprintable() else " " for c in text[: 4 * limit])
  text = re.sub(" +", " ", text).strip()
  return text if len(text) <= limit else text[: limit - 3] + "..."


# The parent's side of the child.


class _Renderer:
  """A child process that renders; one request line in, one reply line out."""

  def __init__(self):
    self.process = subprocess.Popen(
      [sys.executable, "-I", os.path.abspath(__file__), _jinja_root()],
      stdin=subprocess.PIPE,
      stdout=subprocess.PIPE,
      stderr=subprocess.DEVNULL,
      bufsize=0,
      cwd="/",
      # No secrets: only what the interpreter may need to start, and the time zone.
      env={k: os.environ[k] for k in ("LD_LIBRARY_PATH", "TZ") if k in os.environ},
      start_new_session=True,  # Ctrl-C in the terminal is for the parent.
    )
    try:
      self.read_line(_START_SECONDS, 1000)
    except (TimeoutError, OSError) as error:
      self.kill()
      raise ChatTemplateError(
        f"the chat template renderer did not start: {error or 'no answer'}"
      ) from None

  def alive(self) -> bool:
    return self.process.poll() is None

  def kill(self) -> None:
    self.process.kill()
    self.process.wait()
    self.process.stdin.close()
    self.process.stdout.close()

  def ask(self, line: bytes, timeout: float, max_bytes: int) -> dict[str, str]:
    view = memoryview(line)
    while view:
      view = view[self.process.stdin.write(view) :]
    return json.loads(self.read_line(timeout, max_bytes))

  def read_line(self, timeout: float, max_bytes: int) -> bytes:
    deadline = time.monotonic() + timeout
    received = bytearray()
    with selectors.DefaultSelector() as selector:
      selector.register(self.process.stdout, selectors.EVENT_READ)
      while not received.endswith(b"\n"):
        if not selector.select(max(0.0, deadline - time.monotonic())):
          raise TimeoutError
        piece = os.read(self.process.stdout.fileno(), 2**16)
        if not piece:
          raise BrokenPipeError("the process ended")
        received += piece
        if len(received) > max_bytes:
          raise BrokenPipeError("the reply was longer than allowed")
    return bytes(received)


_lock = threading.Lock()
_renderer: _Renderer | None = None


def _ask(line: bytes, timeout: float, max_chars: int) -> str:
  """Send one request to the kept child, starting it if need be; a child that fails is killed."""
  global _renderer
  with _lock:
    if _renderer is None or not _renderer.alive():
      _renderer = _Renderer()
    try:
      # A character is at most 12 bytes of JSON.
      reply = _renderer.ask(line, timeout, 12 * max_chars + 10_000)
    except BaseException as error:
      _renderer.kill()
      _renderer = None
      if isinstance(error, TimeoutError):
        raise ChatTemplateError(
          f"the chat template took longer than {timeout:g} s and was stopped"
        ) from None
      if isinstance(error, OSError | ValueError):
        raise ChatTemplateError(f"the chat template renderer was lost: {error}") from None
      raise
  if "error" in reply:
    raise ChatTemplateError(_one_line(reply["error"]))
  return reply["text"]


def _jinja_root() -> str:
  """The directory jinja2 is installed in, which the isolated child may not find on its own."""
  spec = importlib.util.find_spec("jinja2")
  if spec is None or spec.origin is None:
    raise ChatTemplateError(f"chat templates need jinja2 (the extra hf): {_JINJA}")
  version = importlib.metadata.version("jinja2")
  if [int(part) for part in re.findall(r"\d+", version)[:3]] < [3, 1, 6]:
    raise ChatTemplateError(
      f"jinja2 {version} has known ways out of its sandbox, 3.1.6 or newer is needed: {_JINJA}"
    )
  return str(pathlib.Path(spec.origin).parent.parent)


@atexit.register
def _close() -> None:
  global _renderer
  if _renderer is not None:
    _renderer.kill()
    _renderer = None


def _forget() -> None:
  """After a fork the child process must not use its parent's pipes."""
  global _renderer, _lock
  _renderer, _lock = None, threading.Lock()


os.register_at_fork(after_in_child=_forget)


# The child's side.


def _serve(jinja_root: str) -> None:
  """Render until stdin closes. Limits are set before the first template is read."""
  import resource

  sys.path.append(jinja_root)
  import jinja2  # noqa: F401  (loaded while files may still be opened freely)

  limits = {"RLIMIT_AS": _MEMORY_BYTES, "RLIMIT_FSIZE": 0, "RLIMIT_CORE": 0, "RLIMIT_NPROC": 0}
  for name, value in limits.items():
    try:
      resource.setrlimit(getattr(resource, name), (value, value))
    except (AttributeError, ValueError, OSError):
      pass  # Not every system has every limit; the parent's deadline and bound hold everywhere.
  _send({"ready": "yes"})
  for line in sys.stdin.buffer:
    request = json.loads(line)
    # If the parent is gone, only the processor limit enforces the deadline, in whole seconds.
    used = resource.getrusage(resource.RUSAGE_SELF)
    seconds = int(used.ru_utime + used.ru_stime + request["timeout"]) + 2
    hard = resource.getrlimit(resource.RLIMIT_CPU)[1]
    try:
      resource.setrlimit(resource.RLIMIT_CPU, (seconds, hard))
    except (ValueError, OSError):
      pass
    _send(_reply(request["template"], request["context"], request["max_chars"]))


def _send(reply: dict[str, str]) -> None:
  sys.stdout.buffer.write(json.dumps(reply).encode() + b"\n")
  sys.stdout.buffer.flush()


def _reply(template: str, context: dict[str, Any], max_chars: int) -> dict[str, str]:
  import jinja2

  pieces, size = [], 0
  try:
    for piece in _compile(template).generate(context):
      size += len(piece)
      if size > max_chars:
        return {"error": f"the chat template gave more than {max_chars:,} characters"}
      pieces.append(piece)
  except _Refused as error:
    return {"error": f"the chat template refuses these messages: {error}"}
  except jinja2.TemplateSyntaxError as error:
    return {"error": f"the chat template is not valid Jinja: {error.message}, line {error.lineno}"}
  except MemoryError:
    return {"error": f"the chat template needs more than {_MEMORY_BYTES // 2**20} MB of memory"}
  except Exception as error:  # Whatever a foreign program raises is that program's failure.
    return {"error": f"the chat template failed: {type(error).__name__}: {error}"}
  return {"text": "".join(pieces)}


class _Refused(Exception):
  """`raise_exception` was called by the template."""


@functools.lru_cache(maxsize=8)
def _compile(template: str):
  """The template, compiled in the environment that model hubs' templates are written for."""
  import datetime

  import jinja2
  import jinja2.ext
  import jinja2.sandbox

  class Generation(jinja2.ext.Extension):
    """`{% generation %}` marks what the assistant wrote; the text is the same without it."""

    tags = {"generation"}

    def parse(self, parser):
      lineno = next(parser.stream).lineno
      body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
      return jinja2.nodes.Scope(body).set_lineno(lineno)

  def raise_exception(message):
    raise _Refused(message)

  def strftime_now(form):
    return datetime.datetime.now().strftime(form)

  def tojson(value, ensure_ascii=False, indent=None, separators=None, sort_keys=False):
    # Jinja's own filter escapes HTML characters, which the models were not trained on.
    return json.dumps(
      value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )

  environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
    trim_blocks=True, lstrip_blocks=True, extensions=[Generation, jinja2.ext.loopcontrols]
  )
  environment.filters["tojson"] = tojson
  environment.globals.update(raise_exception=raise_exception, strftime_now=strftime_now)
  return environment.from_string(template)


if __name__ == "__main__":
  _serve(sys.argv[1])
