"""What the environment says, as token ids: token in, token out.

The ids that a model sampled are never decoded and encoded again. After its turn come only the ids
of what the environment says, with the markers that the model's chat template writes around it, up
to the header of the assistant's next turn. That needs a template which keeps what it wrote: see
`check_prefix`. A model without a template reads plain lines.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from rl_llm.tasks.environments.environment import EnvironmentError
from rl_llm.text import chat_template as chat
from rl_llm.text.conversations import render
from rl_llm.text.tokenizers import Tokenizer
from rl_llm.text.turn_end import check_turn_end

_WORDS = "seventy-seven"
_ASKED = {"role": "user", "content": "What is 7 * 11?"}
_SAID = {"role": "assistant", "content": _WORDS}
_ROLES = ("tool", "ipython", "user")  # The first that the template writes is the environment's.


def choose_protocol(protocol: str, tokenizer: Tokenizer, *, layout: str = "auto") -> str:
  """How a model writes its calls; "auto": as its chat template does, else as plain text.

  >>> from rl_llm.text.tokenizers import ByteTokenizer
  >>> choose_protocol("auto", ByteTokenizer())
  'text'

  Args:
    protocol: of `calls.PROTOCOLS`, or "auto".
    tokenizer: the model's.
    layout: "plain" uses no template.
  """
  template = _template(tokenizer, layout) or ""
  if protocol != "auto":
    return protocol
  if "<tool_call>" in template:
    return "hermes"
  return "llama3" if "<|python_tag|>" in template or "ipython" in template else "text"


def describe_tools(tools: Sequence[Mapping[str, Any]], protocol: str) -> str:
  """What a template that does not show tools leaves unsaid: the tools, and how to call them.

  >>> parameters = {"properties": {"a": {"type": "integer", "description": "A number."}}}
  >>> tool = {"function": {"name": "inc", "description": "Adds 1.", "parameters": parameters}}
  >>> print(describe_tools([tool], "text"))
  You may call a tool: write a line such as
  call inc: ...
  and read the answer.
  inc(a: integer): Adds 1. a: A number.

  Args:
    tools: JSON schemas.
    protocol: of `calls.PROTOCOLS`.
  """
  first = tools[0]["function"]
  names = list(first["parameters"].get("properties", {}))
  arguments = json.dumps({name: "..." for name in names}, ensure_ascii=False)
  plain = "..." if len(names) == 1 else arguments
  form = {
    "text": f"call {first['name']}: {plain}",
    "hermes": f'<tool_call>{{"name": "{first["name"]}", "arguments": {arguments}}}</tool_call>',
    "llama3": f'{{"name": "{first["name"]}", "parameters": {arguments}}}',
  }[protocol]
  lines = ["You may call a tool: write a line such as", form, "and read the answer."]
  for tool in tools:
    function = tool["function"]
    properties = function["parameters"].get("properties", {})
    listed = ", ".join(f"{name}: {each.get('type', 'any')}" for name, each in properties.items())
    said = [f"{name}: {each.get('description', '')}" for name, each in properties.items()]
    lines.append(" ".join([f"{function['name']}({listed}): {function['description']}", *said]))
  return "\n".join(lines)


def opening(
  prompt: str | Sequence[Mapping[str, Any]],
  said: str,
  tools: Sequence[Mapping[str, Any]],
  tokenizer: Tokenizer,
  *,
  protocol: str,
  layout: str = "auto",
) -> tuple[str | list[dict[str, Any]], dict[str, Any]]:
  """A prompt with what the environment says first, and with its tools.

  >>> from rl_llm.text.tokenizers import ByteTokenizer
  >>> opening("Find it.", "You have 7 guesses.", [], ByteTokenizer(), protocol="text")
  ('Find it.\\nYou have 7 guesses.', {})

  Args:
    prompt: of a problem, text or messages.
    said: what `reset` returned.
    tools: JSON schemas. A template that reads `tools` shows them; in another chat they are
      described in the last user's message. A model without a template is shown none.
    tokenizer: the model's.
    protocol: of `calls.PROTOCOLS`.
    layout: "plain" uses no template.

  Returns:
    The prompt, and the names for the chat template, both for
    `rl_llm.text.conversations.format_prompts`.
  """
  template = _template(tokenizer, layout)
  shown = bool(template) and "tools" in template
  describes = describe_tools(tools, protocol) if template and tools and not shown else ""
  names = {"tools": list(tools)} if shown and tools else {}
  if isinstance(prompt, str):
    return "\n".join(part for part in (describes, prompt, said) if part), names
  messages = [dict(message) for message in prompt]
  last = max(
    (i for i, message in enumerate(messages) if message["role"] == "user"),
    default=len(messages) - 1,
  )
  parts = (describes, messages[last]["content"], said)
  messages[last]["content"] = "\n".join(part for part in parts if part)
  return messages, names


def _template(tokenizer: Tokenizer, layout: str) -> str | None:
  """The chat template, if it is used."""
  return None if layout == "plain" else tokenizer.chat_template


def decode_turn(tokenizer: Tokenizer, ids: Sequence[int]) -> str:
  """A model's turn as the parser reads it: control tokens shown, the end of the turn left out.

  >>> from rl_llm.text.tokenizers import ByteTokenizer
  >>> decode_turn(ByteTokenizer(), [51, 52, 258])
  '34'

  Args:
    tokenizer: the model's.
    ids: that it sampled, possibly with an EOS at the end.
  """
  ids = list(ids)
  while ids and ids[-1] in tokenizer.eos_ids:
    ids.pop()
  return tokenizer.decode(ids, skip_special=False)


def observation_ids(
  tokenizer: Tokenizer, answers: Sequence[str], *, ended: bool = True, layout: str = "auto"
) -> list[int]:
  r"""The ids that follow a model's turn: what the environment says, and the next turn's header.

  >>> from rl_llm.text.tokenizers import ByteTokenizer
  >>> tokenizer = ByteTokenizer()
  >>> tokenizer.decode(observation_ids(tokenizer, ["408"]))
  '\nanswer: 408\n'

  In a chat a control token in an answer is spelled as text: a tool cannot end its turn and speak
  as the user.

  Args:
    tokenizer: the model's; `check_prefix` has accepted it.
    answers: of an `Observation`, one a call.
    ended: whether the turn's last id is one that ends turns. If it is not (the turn was cut), the
      template's end of a turn comes first.
    layout: "chat" or "plain", or "auto": a chat where the model has a template.

  Raises:
    ChatTemplateError: the template fails.
  """
  if _template(tokenizer, layout) is None:
    lines = "".join(f"answer: {answer}\n" for answer in answers)
    return tokenizer.encode_with_places(f"\n{lines}", follows=True)[0]
  frame = _frame(tokenizer)
  messages = [{"role": frame.role, "content": answer} for answer in answers]
  text = _after_a_turn(tokenizer, messages)
  text = text.removeprefix(frame.end) if ended else text
  return tokenizer.encode_with_places(text, follows=True)[0]


def environment_role(tokenizer: Tokenizer) -> str:
  """The role in which the chat template shows an answer: "tool" where it knows that.

  Raises:
    ChatTemplateError: the template knows none.
  """
  return _frame(tokenizer).role


def check_prefix(tokenizer: Tokenizer, *, layout: str = "auto") -> None:
  """Refuses a chat template with which the trained tokens could not be the sampled ones.

  A dialogue grows by the model's turn and by what the environment says. So the text of the longer
  dialogue must begin with that of the shorter one, as sampled; and what the environment says must
  be the same text whatever was said before. A template that rewrites history (Qwen3's drops the
  reasoning of earlier turns) would show later tokens a context that is not the one they were
  sampled in.

  Args:
    tokenizer: the model's. One without a template passes.
    layout: "chat", "plain" or "auto".

  Raises:
    EnvironmentError: the template is not like that; the message says where it first differs.
  """
  if _template(tokenizer, layout) is None:
    return
  try:
    check_turn_end(tokenizer)
    answer = {"role": _frame(tokenizer).role, "content": "77"}
    suffix = _after_a_turn(tokenizer, [answer])
    before = [_ASKED]
    text = _rendered(tokenizer, before, generation=True)
    for words in (_WORDS, "<think>\nSeven elevens.\n</think>\n\nI add 1.", _WORDS):
      before = [*before, {"role": "assistant", "content": words}, answer]
      whole = _rendered(tokenizer, before, generation=True)
      # Some templates write the space that a SentencePiece model samples first.
      space = " " if whole.startswith(f"{text} {words}") else ""
      grown = text + space + words + suffix
      if whole != grown:
        raise EnvironmentError(
          "the chat template does not keep a dialogue as it was sampled: after a turn of the "
          f"environment it writes {_difference(whole, grown)}; use a model whose template does, or "
          "--prompt_format=plain"
        )
      text = whole
  except chat.ChatTemplateError as error:
    raise EnvironmentError(
      f"the chat template cannot lay out an answer of a tool: {error}; use a model whose template "
      "can, or --prompt_format=plain"
    ) from None


def _difference(found: str, wanted: str) -> str:
  """Where two texts begin to differ, for a message."""
  at = next((i for i, (a, b) in enumerate(zip(found, wanted, strict=False)) if a != b), None)
  at = min(len(found), len(wanted)) if at is None else at
  return f"{found[at : at + 40]!r} where {wanted[at : at + 40]!r} was sampled"


def _after_a_turn(tokenizer: Tokenizer, messages: Sequence[Mapping[str, Any]]) -> str:
  """What the template writes after the assistant's words when these messages follow."""
  before = [_ASKED, _SAID, *messages]
  _, found, text = _rendered(tokenizer, before, generation=True).partition(_WORDS)
  if not found:
    raise chat.ChatTemplateError("the chat template leaves out what the assistant says")
  return text


def _rendered(tokenizer: Tokenizer, messages: Any, *, generation: bool) -> str:
  return render([messages], tokenizer, add_generation_prompt=generation)[0]


class _Frame(NamedTuple):
  """What a template writes around an answer.

  Attributes:
    role: "tool" where the template knows it, else one that it does know.
    end: the text from the assistant's last word to the token that ends its turn.
  """

  role: str
  end: str


_FRAMES: dict[tuple[Any, ...], _Frame] = {}


def _frame(tokenizer: Tokenizer) -> _Frame:
  """The frame of a tokenizer's template, found by trying it.

  Raises:
    ChatTemplateError: the template leaves out or refuses all roles.
  """
  key = tokenizer.chat_template, tokenizer.bos_token, tokenizer.eos_token, tokenizer.eos_ids
  if key not in _FRAMES:
    _FRAMES[key] = _find_frame(tokenizer)
  return _FRAMES[key]


def _find_frame(tokenizer: Tokenizer) -> _Frame:
  refused: chat.ChatTemplateError | None = None
  for role in _ROLES:
    try:
      text = _after_a_turn(tokenizer, [{"role": role, "content": "4711"}])
    except chat.ChatTemplateError as error:
      refused = refused or error
      continue
    ids, places = tokenizer.encode_with_places(text, follows=True)
    at = next((n for n, i in enumerate(ids) if i in tokenizer.eos_ids), None)
    if at is None:
      raise chat.ChatTemplateError("no token ends a turn before a tool's answer")
    # A template that does not know a role may lay it out as the assistant's own words.
    if "4711" in text and text != _after_a_turn(tokenizer, [_SAID | {"content": "4711"}]):
      return _Frame(role, text[: places[at + 1] if at + 1 < len(places) else len(text)])
  raise refused or chat.ChatTemplateError("it leaves out what a tool answers")
