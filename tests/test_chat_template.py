"""Chat templates: the exact text of layouts in use; hostile templates must not get anywhere."""

from __future__ import annotations

import doctest
import io
import json
import os
import re
import subprocess
import sys
import threading
import time
import types

import pytest

pytest.importorskip("jinja2")

from rl_llm.text import chat_template
from rl_llm.text.chat_template import ChatTemplateError, is_prefix_preserving, render, render_many
from tests.processes import PATIENCE

CHATML = (
  "{% for message in messages %}"
  "{% if loop.first and messages[0]['role'] != 'system' %}"
  "{{ '<|im_start|>system\nBe brief.<|im_end|>\n' }}{% endif %}"
  "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}"
  "{% endfor %}"
  "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
USER = [{"role": "user", "content": "3 + 4?"}]
TALK = [
  {"role": "system", "content": ""},
  {"role": "user", "content": "3 + 4?"},
  {"role": "assistant", "content": "7"},
  {"role": "user", "content": "Grüße & <b>"},
]


def draw(template, messages=USER, **options):
  return render(template, messages, **({"bos_token": "<s>", "eos_token": "</s>"} | options))


def chatml(messages, generation):
  """The ChatML layout written out by hand."""
  if messages[0]["role"] != "system":
    messages = [{"role": "system", "content": "Be brief."}, *messages]
  text = "".join(f"<|im_start|>{m['role']}\n{m['content']}<|im_end|>\n" for m in messages)
  return text + ("<|im_start|>assistant\n" if generation else "")


@pytest.mark.parametrize("messages", [USER, TALK])
@pytest.mark.parametrize("generation", [True, False])
def test_chatml(messages, generation):
  assert draw(CHATML, messages, add_generation_prompt=generation) == chatml(messages, generation)


def test_llama3_layout():
  template = (
    "{{ bos_token }}{% for message in messages %}"
    "{{ '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n'"
    " + message['content'] | trim + '<|eot_id|>' }}{% endfor %}"
    "{% if add_generation_prompt %}"
    "{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
  )
  expected = (
    "<s><|start_header_id|>user<|end_header_id|>\n\n3 + 4?<|eot_id|>"
    "<|start_header_id|>assistant<|end_header_id|>\n\n"
  )
  assert draw(template) == expected


def test_gemma_layout_with_block_whitespace_loop_controls_and_refusal():
  template = """{{ bos_token }}
{% if messages[0]['role'] == 'system' %}
    {{ raise_exception('System role not supported') }}
{% endif %}
{% for message in messages %}
    {% if message['role'] == 'tool' %}
        {% continue %}
    {% endif %}
    {% set role = 'model' if message['role'] == 'assistant' else message['role'] %}
{{ '<start_of_turn>' + role + '\n' + message['content'] + '<end_of_turn>\n' }}
{% endfor %}
"""
  # trim_blocks removes the newline after a block tag, lstrip_blocks the indentation before one; the
  # newline after an expression stays, and Jinja drops the one that ends the template.
  talk = [*USER, {"role": "tool", "content": "x"}, {"role": "assistant", "content": "7"}]
  assert draw(template, talk) == (
    "<s>\n<start_of_turn>user\n3 + 4?<end_of_turn>\n\n<start_of_turn>model\n7<end_of_turn>\n\n"
  )
  with pytest.raises(ChatTemplateError, match="refuses these messages: System role not supported"):
    draw(template, TALK)


def test_generation_tag_is_transparent_and_scoped_and_tools_and_tojson_work():
  template = (
    "{% set x = 1 %}{% generation %}{% set x = 2 %}{{ messages[0].content }}{% endgeneration %}"
    "{{ x }}{{ tools | tojson }}{{ tools | tojson(indent=1) }}{{ strftime_now('%%') }}"
  )
  tools = [{"name": "é<&>'"}]
  expected = """3 + 4?1[{"name": "é<&>'"}][\n {\n  "name": "é<&>'"\n }\n]%"""
  assert draw(template, tools=tools) == expected
  assert draw("{{ tools is none }}") == "True"


def test_bos_and_eos_may_be_absent():
  assert render("[{{ bos_token }}{{ eos_token }}]", USER, bos_token=None, eos_token=None) == "[]"


def test_render_many_keeps_order_and_any_text_survives():
  texts = [
    "a",
    "",
    "\x00\x1b[31m\r\n\t",
    "\u2028 日本 😀 \ud800",
    "{{ bos_token }}{% for %}",
    '"\\',
  ]
  rendered = render_many(
    "{{ messages[0].content }}",
    [[{"role": "user", "content": text}] for text in texts],
    bos_token=None,
    eos_token=None,
  )
  assert rendered == texts  # Text in a message is data: the Jinja in it is not run.


@pytest.mark.parametrize(
  "reason, keep",
  [
    ("everything stays", "{{ m.content }}"),
    ("earlier reasoning is dropped", "{{ m.content if loop.last else m.content.split('>')[-1] }}"),
    ("the first turn counts the turns", "{{ messages | length }}{{ m.content }}"),
  ],
)
def test_prefix_preserving(reason, keep):
  template = (
    "{% for m in messages %}<{{ m.role }}>" + keep + "{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
  )
  preserved = is_prefix_preserving(template, bos_token=None, eos_token=None)
  assert preserved == (reason == "everything stays")
  # The header promised to the model must be the one that is later in the transcript.
  other_header = template.replace("%}<assistant>", "%}<assistant>!")
  assert not is_prefix_preserving(other_header, bos_token=None, eos_token=None)


HOSTILE = {
  "class attribute": "{{ ''.__class__.__mro__[1].__subclasses__() }}",
  "globals of a built-in": "{{ cycler.__init__.__globals__.os.popen('id').read() }}",
  "attr filter": "{{ ('' | attr('__class__')).__mro__ }}",
  "format string": "{{ '{0.__class__.__mro__}'.format('') }}",
  "undefined's internals": "{{ nothing.__init__.__globals__.__builtins__ }}{{ ''.__len__ }}",
  "changing the messages": "{{ messages.append({'role': 'user', 'content': 'x'}) }}",
  "huge range": "{% for i in range(10**9) %}x{% endfor %}",
  "nested loops": (
    "{% for i in range(100000) %}{% for j in range(100000) %}{% endfor %}{% endfor %}"
  ),
  "nested loops that print": (
    "{% for i in range(100000) %}{% for j in range(100000) %}xxxxxxxxxx{% endfor %}{% endfor %}"
  ),
  "long string": "{{ 'a' * 10**10 }}",
  "string over the bound only": "{{ 'a' * 2000000 }}",
  "padding": "{{ '%999999999d' % 1 }}",
  "doubling": (
    "{% set n = namespace(s='a') %}{% for i in range(60) %}{% set n.s = n.s + n.s %}{% endfor %}"
  ),
  "big integer": "{{ 10 ** (10 ** 10) }}",
  "endless recursion": "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
  "another template": "{% include '/etc/passwd' %}",
  "deep nesting": "{{ " + "(" * 20000 + "1" + ")" * 20000 + " }}",
}


@pytest.mark.parametrize(
  "template",
  [
    "{{ ''.__class__ }}",
    "{{ raise_exception.__globals__ }}",
    "{{ strftime_now.__code__ }}",
    "{{ '{a.__class__}'.format_map({'a': 1}) }}",
    "{{ messages.__class__ }}{{ (messages | map(attribute='__class__') | first) }}",
    "{% set n = namespace(a=1) %}{{ n.__class__ }}{{ n.__init__ }}",
  ],
)
def test_unsafe_attribute_that_is_only_printed_is_nothing(template):
  assert draw(template) == ""  # Jinja's undefined value: it prints nothing and raises when used.


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_template_is_stopped_within_its_limits(name):
  draw("warm")
  start = time.monotonic()
  with pytest.raises(ChatTemplateError) as caught:
    draw(HOSTILE[name], timeout=0.5)
  assert time.monotonic() - start < PATIENCE
  message = str(caught.value)
  assert "\n" not in message and len(message) < 400
  assert "<class" not in message and "root:" not in message
  assert draw("still {{ messages[0].role }}") == "still user"


def test_deadline_is_two_seconds_by_default_and_the_child_is_gone():
  draw("warm")
  process = chat_template._renderer.process
  start = time.monotonic()
  with pytest.raises(ChatTemplateError, match="longer than 2 s"):
    draw(HOSTILE["nested loops"])
  assert 1.9 < time.monotonic() - start < PATIENCE
  assert process.returncode == -9


def test_bound_on_output_is_exact():
  assert draw("{{ 'é' * 1000 }}", max_chars=1000) == "é" * 1000
  with pytest.raises(ChatTemplateError, match="more than 999 characters"):
    draw("{{ 'é' * 1000 }}", max_chars=999)
  assert len(draw("{{ '\U0001f600' * 1000000 }}")) == 1_000_000


def test_the_child_sees_no_environment_and_cannot_write(monkeypatch, tmp_path):
  monkeypatch.setenv("WANDB_API_KEY", "secret-key")
  chat_template._close()
  draw("warm")
  pid = chat_template._renderer.process.pid
  if os.path.exists(f"/proc/{pid}/environ"):
    with open(f"/proc/{pid}/environ", "rb") as file:
      assert b"secret-key" not in file.read()
    with open(f"/proc/{pid}/limits") as file:
      limits = {line[:26].strip(): line[26:].split()[0] for line in file}
    assert limits["Max address space"] == str(512 * 2**20)
    assert limits["Max file size"] == limits["Max core file size"] == limits["Max processes"] == "0"
    assert int(limits["Max cpu time"]) < 10
  assert os.environ["WANDB_API_KEY"] == "secret-key"


def test_many_conversations_are_not_stopped_by_the_processor_limit_of_one():
  chat_template._close()
  slow = "{% for i in range(2000) %}{% for j in range(10) %}{% endfor %}{% endfor %}{{ 'ok' }}"
  assert draw(slow) == "ok"
  child = chat_template._renderer.process.pid
  used = 0.0
  while used < 4.0:  # More processor time than 1 s + 2 s for one request.
    assert draw(slow, timeout=1.0) == "ok"
    assert chat_template._renderer.process.pid == child
    with open(f"/proc/{child}/stat") as file:
      used = sum(map(int, file.read().rpartition(")")[2].split()[11:13]))
    used /= os.sysconf("SC_CLK_TCK")


def test_one_child_is_kept_and_a_dead_one_is_replaced():
  draw("a")
  process = chat_template._renderer.process
  draw("b")
  assert chat_template._renderer.process is process
  process.kill()
  process.wait()
  assert draw("c") == "c"
  assert chat_template._renderer.process is not process


def test_threads_get_their_own_answers():
  wrong = []

  def ask(number):
    for _ in range(50):
      if draw(f"{number}{{{{ messages[0].content }}}}") != f"{number}3 + 4?":
        wrong.append(number)

  threads = [threading.Thread(target=ask, args=(n,)) for n in range(4)]
  for thread in threads:
    thread.start()
  for thread in threads:
    thread.join()
  assert not wrong


def test_a_forked_process_starts_its_own_child():
  draw("a")
  pid = os.fork()
  if pid == 0:
    code = 1
    try:
      code = 0 if chat_template._renderer is None and draw("b") == "b" else 1
      chat_template._close()
    finally:
      os._exit(code)
  assert os.waitpid(pid, 0)[1] == 0
  assert draw("c") == "c"


def test_the_child_ends_with_a_killed_parent():
  program = (
    "import os, signal\n"
    "from rl_llm.text import chat_template as c\n"
    "c.render('x', [{'role': 'user', 'content': ''}], bos_token=None, eos_token=None)\n"
    "print(c._renderer.process.pid, flush=True)\n"
    "os.kill(os.getpid(), signal.SIGKILL)\n"
  )
  done = subprocess.run(
    [sys.executable, "-c", program], capture_output=True, text=True, timeout=PATIENCE
  )
  child = int(done.stdout)
  for _ in range(100):
    try:
      os.kill(child, 0)
      with open(f"/proc/{child}/stat") as file:
        if file.read().rsplit(")", 1)[1].split()[0] == "Z":  # Ended; nobody has reaped it yet.
          return
    except (ProcessLookupError, FileNotFoundError):
      return
    time.sleep(0.05)
  pytest.fail("the renderer outlived its parent by 5 s")


def test_importing_loads_no_jinja():
  program = "import sys, rl_llm.text.chat_template; print('jinja2' in sys.modules)"
  done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
  assert done.stdout == "False\n"


@pytest.mark.parametrize(
  "template, messages, options, match",
  [
    ("{% for %}", USER, {}, "not valid Jinja.*line 1"),
    ("{{ messages[0].content.upper( }}", USER, {}, "not valid Jinja"),
    ("{{ messages[5].role.x }}", USER, {}, "failed: UndefinedError"),
    ("x", [], {}, "conversation 0: messages must be a non-empty list"),
    ("x", "hello", {}, "conversation 0: messages must be a non-empty list.*'hello'"),
    ("x", [{"content": "x"}], {}, r"messages\[0\] must be a dict with a str 'role'"),
    ("x", [{"role": "user", "content": b"x"}], {}, "plain JSON data.*bytes"),
    (None, USER, {}, "template must be Jinja text, got NoneType"),
    ("x", USER, {"timeout": 0}, "timeout must be > 0 seconds, got 0"),
    ("x", USER, {"timeout": float("nan")}, "timeout must be > 0 seconds, got nan"),
    ("x", USER, {"max_chars": 0}, "max_chars must be at least 1, got 0"),
  ],
)
def test_bad_input_is_one_clear_line(template, messages, options, match):
  with pytest.raises(ChatTemplateError, match=match) as caught:
    draw(template, messages, **options)
  assert "\n" not in str(caught.value)


def test_missing_or_old_jinja_names_the_command(monkeypatch):
  chat_template._close()
  with monkeypatch.context() as patch:
    patch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ChatTemplateError, match='pip install "jinja2>=3.1.6"'):
      draw("x")
  with monkeypatch.context() as patch:
    patch.setattr("importlib.metadata.version", lambda name: "3.1.5")
    with pytest.raises(ChatTemplateError, match='jinja2 3.1.5 has known.*pip install "jinja2'):
      draw("x")


def test_error_text_of_a_template_cannot_drive_the_terminal():
  with pytest.raises(ChatTemplateError) as caught:
    draw("{{ raise_exception('a\\x1b[2J\\nb' + 'c' * 10000) }}")
  assert str(caught.value).isprintable() and len(str(caught.value)) <= 300


def test_docstrings():
  result = doctest.testmod(chat_template)
  assert result.attempted > 3 and result.failed == 0


# The child's side, called here.


def served(monkeypatch, *requests):
  """The child's answers to these, and the processor limits that it gave itself."""
  import resource

  limits, given = [], "".join(json.dumps(request) + "\n" for request in requests).encode()
  said = types.SimpleNamespace(buffer=io.BytesIO())
  monkeypatch.setattr(resource, "setrlimit", lambda which, both: limits.append((which, both)))
  monkeypatch.setattr(sys, "stdin", types.SimpleNamespace(buffer=io.BytesIO(given)))
  monkeypatch.setattr(sys, "stdout", said)
  monkeypatch.setattr(sys, "path", list(sys.path))
  chat_template._serve("/nowhere")
  ready, *answers = map(json.loads, said.buffer.getvalue().splitlines())
  assert ready == {"ready": "yes"}
  return answers, [both for which, both in limits if which == resource.RLIMIT_CPU]


def request(template, *, max_chars=100, **context):
  context = {"messages": USER} | context
  return {"template": template, "context": context, "timeout": 3.0, "max_chars": max_chars}


def test_the_child_answers_each_line_with_text_or_an_error(monkeypatch):
  called = "{{ raise_exception('roles must alternate') }}"
  marked = "{% generation %}{{ 'a<' | tojson }}{% endgeneration %}"
  answers, _ = served(
    monkeypatch,
    request("{{ messages[0].role }}{{ bos }}", bos="<s>"),
    request("{{ 'é' * 101 }}"),
    request(called),
    request("{% if %}"),
    request("{{ none.x.y }}"),
    request(marked),
    request("{{ strftime_now('%Y') | length }}"),
  )
  assert answers == [
    {"text": "user<s>"},
    {"error": "the chat template gave more than 100 characters"},
    {"error": "the chat template refuses these messages: roles must alternate"},
    {"error": answers[3]["error"]},
    {"error": "the chat template failed: UndefinedError: 'None' has no attribute 'x'"},
    {"text": '"a<"'},
    {"text": "4"},
  ]
  assert re.fullmatch("the chat template is not valid Jinja: .*, line 1", answers[3]["error"])


def test_the_child_has_seconds_for_each_line_beyond_those_it_has_used(monkeypatch):
  """Its parent may be gone: whole seconds, at least those that the line may take."""
  used = iter([0.4, 7.9])
  import resource

  usage = lambda who: types.SimpleNamespace(ru_utime=next(used), ru_stime=0.2)  # noqa: E731
  monkeypatch.setattr(resource, "getrusage", usage)
  answers, limits = served(monkeypatch, request("a"), request("b"))
  assert answers == [{"text": "a"}, {"text": "b"}]
  hard = resource.getrlimit(resource.RLIMIT_CPU)[1]
  assert limits == [(3 + 2, hard), (8 + 3 + 2, hard)]


def test_too_much_memory_is_an_error_of_the_template(monkeypatch):
  def compile_nothing(template):
    raise MemoryError

  monkeypatch.setattr(chat_template, "_compile", compile_nothing)
  answers, _ = served(monkeypatch, request("a"))
  assert answers == [{"error": "the chat template needs more than 512 MB of memory"}]
