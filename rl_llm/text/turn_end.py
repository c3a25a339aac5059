"""Finds the token that ends an assistant's turn from the output of the chat template.

A base model's files may name `<|endoftext|>` as EOS while their ChatML template ends turns with
`<|im_end|>`. Training then teaches the model to write a token that the sampler does not stop at,
and every response runs to the limit. So every loader finds the token by rendering a conversation,
and the token counts as an end of responses whatever else the files name.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import Any

from rl_llm.text import chat_template as chat

_ANSWER = "seven"
_PROBE = ({"role": "user", "content": "3 + 4?"}, {"role": "assistant", "content": _ANSWER})


def written_end(template: str, *, bos_token: str | None, eos_token: str | None) -> str:
  """What a chat template writes after the assistant's words.

  >>> chatml = "{% for m in messages %}<|im_start|>{{ m.role }}\\n{{ m.content }}<|im_end|>\\n"
  >>> written_end(chatml + "{% endfor %}", bos_token=None, eos_token="<|endoftext|>")
  '<|im_end|>\\n'

  Args:
    template: Jinja text.
    bos_token: as for `rl_llm.text.chat_template.render`.
    eos_token: the same.

  Raises:
    ChatTemplateError: the template fails, or leaves the assistant's words out.
  """
  text = chat.render(
    template, _PROBE, add_generation_prompt=False, bos_token=bos_token, eos_token=eos_token
  )
  _, found, end = text.rpartition(_ANSWER)
  if not found:
    raise chat.ChatTemplateError("the chat template leaves out what the assistant says")
  return end


def find_turn_end(
  template: str | None,
  encode: Callable[[str], list[int]],
  candidates: Collection[int],
  *,
  bos_token: str | None,
  eos_token: str | None,
) -> int | None:
  """The id with which a chat template ends an assistant's turn, None if it writes none.

  That is the first control token after the assistant's words: sampling it completes the response.
  What comes after it (a line break, or the `<|endoftext|>` that Phi-3's template writes after a
  conversation) is never sampled.

  >>> template = "{% for m in messages %}{{ m.content }}!\\n{% endfor %}"
  >>> find_turn_end(
  ...   template, lambda text: [ord(c) for c in text], {33}, bos_token=None, eos_token=None)
  33

  Args:
    template: Jinja text; None: there is no template.
    encode: text to ids, control tokens recognised.
    candidates: ids that may end a turn: all added tokens, flagged special or not.
    bos_token: as for `rl_llm.text.chat_template.render`.
    eos_token: the same.

  Raises:
    ChatTemplateError: as for `written_end`.
  """
  if template is None:
    return None
  end = written_end(template, bos_token=bos_token, eos_token=eos_token)
  return next((i for i in encode(end) if i in candidates), None)


def check_turn_end(tokenizer: Any) -> None:
  """Refuses a chat template whose turns end with a text that does not end a response.

  A template made for other tokens does that: its `<|im_end|>` is six ordinary tokens here, and the
  sampler does not stop. A template that writes nothing, or blanks, after the assistant's words says
  nothing about how a model stops: sampling uses the model's own EOS, and training refuses it.

  Args:
    tokenizer: a `rl_llm.text.tokenizers.Tokenizer` with a chat template.

  Raises:
    ChatTemplateError: the template and EOS do not agree; the message names both. Or as for
      `written_end`.
  """
  end = _end_of(tokenizer)
  if end.strip() and set(tokenizer.encode(end)).isdisjoint(tokenizer.eos_ids):
    raise no_turn_end(tokenizer)


def no_turn_end(tokenizer: Any) -> chat.ChatTemplateError:
  """The error for a template that ends an assistant's turn with none of `eos_ids`: names both."""
  eos = repr(tokenizer.eos_token) if tokenizer.eos_token else f"id {tokenizer.eos_ids[0]}"
  return chat.ChatTemplateError(
    f"the chat template ends an assistant's turn with {_end_of(tokenizer)!r}, in which no token "
    f"ends a response (EOS is {eos}), so a model could not stop there; write {{{{ eos_token }}}} "
    "behind the assistant's words in the template, or use --prompt_format=plain"
  )


def _end_of(tokenizer: Any) -> str:
  return written_end(
    tokenizer.chat_template, bos_token=tokenizer.bos_token, eos_token=tokenizer.eos_token
  )
