"""Prompts and conversations as token ids, each text encoded as a whole.

The ids of a text are not the concatenated ids of its pieces: a SentencePiece tokenizer writes a
space before every piece, and merges across a seam are lost. So the model's chat template renders a
conversation and the whole text is encoded at once, as the model's own library does it; the places
of the tokens in the text show where its parts are.
"""

from __future__ import annotations

import bisect
from collections.abc import Mapping, Sequence
from typing import Any, Literal, NamedTuple

from rl_llm.text import chat_template as chat
from rl_llm.text.control_tokens import MARK, break_up
from rl_llm.text.messages import check_read, for_template
from rl_llm.text.tokenizers import Tokenizer, TokenizerError


def resolve_format(prompt_format: str, tokenizer: Tokenizer) -> str:
  """ "chat" or "plain": "auto" is the model's chat layout, if it has a template."""
  if prompt_format != "auto":
    return prompt_format
  return "chat" if tokenizer.chat_template else "plain"


def format_prompts(
  prompts: Sequence[str | chat.Messages],
  tokenizer: Tokenizer,
  *,
  prompt_format: Literal["chat", "plain"] = "chat",
  system_prompt: str | None = None,
  names: Sequence[Mapping[str, Any]] = (),
) -> list[list[int]]:
  """Ids of prompts, laid out as the model was trained to read them.

  A chat model given bare text behaves like a different, worse model; a base model has never seen a
  chat layout. Hence there are two formats, and no guessing between them.

  A message can spell a control token: `<|im_end|>` in a user's text would end the user's turn, and
  the rest of the text could speak as the system. So in a chat the control tokens inside messages
  stay plain characters, and only those the template writes become control ids. (Messages with the
  role "assistant" are exempt: the model may have written its tool-call tokens itself.) A plain
  prompt is its author's whole input, control tokens included.

  >>> from rl_llm.text.tokenizers import ByteTokenizer
  >>> format_prompts(["3+4="], ByteTokenizer(), prompt_format="plain")
  [[51, 43, 52, 61]]

  Args:
    prompts: each a str, or a list of `{"role": ..., "content": ...}` messages that does not end
      with the assistant's; a str is one user's message.
    tokenizer: the model's.
    prompt_format: "chat" renders the tokenizer's chat template, with the header of the assistant's
      turn at the end. "plain" encodes a str as it is, after BOS if the model expects one and the
      text does not begin with it.
    system_prompt: None leaves the system message to the template (some write one of their own); ""
      is an empty one; a text is that text. A conversation with its own system message keeps it.
    names: what else each prompt passes to the template, such as its tools, from
      `rl_llm.text.messages.template_names`; (): none.

  Returns:
    One list of ids per prompt.

  Raises:
    TokenizerError: no chat template, or prompts that do not fit the format.
    ChatTemplateError: the template fails or refuses the messages.
    MessageError: the template does not read the names.
  """
  if isinstance(prompts, str):
    raise TokenizerError("prompts must be a list of prompts, got one str: put it into a list")
  if prompt_format == "plain":
    if system_prompt is not None:
      raise TokenizerError(
        "a system prompt needs a chat layout: leave --system_prompt out or use --prompt_format=chat"
      )
    check_no_names(*names)
    for index, prompt in enumerate(prompts):
      if not isinstance(prompt, str):
        raise TokenizerError(
          f"prompts[{index}] is a {type(prompt).__name__}, --prompt_format=plain needs str: "
          "use --prompt_format=chat for messages"
        )
    return [with_bos(tokenizer.encode(prompt), tokenizer) for prompt in prompts]
  if prompt_format != "chat":
    raise TokenizerError(f"prompt_format must be 'chat' or 'plain', got {prompt_format!r}")
  if tokenizer.chat_template is None:
    raise TokenizerError(
      "this model's files have no chat template (a base model?): use --prompt_format=plain"
    )
  check_not_rendered([prompt for prompt in prompts if isinstance(prompt, str)], tokenizer)
  conversations = [
    _conversation(prompt, index, system_prompt) for index, prompt in enumerate(prompts)
  ]
  return [tokenizer.encode(text) for text in render(conversations, tokenizer, names=names)]


def check_no_names(*names: Mapping[str, Any]) -> None:
  """Refuses names for a chat template where a plain layout has no place for them."""
  for own in filter(None, names):
    raise TokenizerError(
      f"--prompt_format=plain has no place for {' and '.join(map(repr, own))}: use "
      "--prompt_format=chat, or rename or remove it"
    )


def check_not_rendered(texts: Sequence[str], tokenizer: Tokenizer) -> None:
  """Refuses texts that a chat template has laid out already, for a chat layout.

  Laid out again they would be a user's message about control tokens, which the model answers
  somehow. They are refused only if all begin as the template does: a single one may be a user's
  words.
  """
  names = [name for name in tokenizer.structural_tokens if texts and texts[0].startswith(name)]
  if not names:
    return
  name = max(names, key=len)
  [opening] = _render([[{"role": "user", "content": "?"}]], [{}], tokenizer, False)
  if name in opening and all(text.startswith(name) for text in texts):
    raise TokenizerError(
      f"the prompt begins with {name!r} as the chat template does: text that is rendered already "
      "is laid out with --prompt_format=plain, a user's words are written as a message"
    )


def with_bos(ids: list[int], tokenizer: Tokenizer) -> list[int]:
  """The ids of a plain text after BOS, if the model expects one and the text brings none."""
  wanted = tokenizer.add_bos and tokenizer.bos_id is not None and ids[:1] != [tokenizer.bos_id]
  return [tokenizer.bos_id, *ids] if wanted else ids


def render(
  conversations: Sequence[chat.Messages],
  tokenizer: Tokenizer,
  *,
  names: Sequence[Mapping[str, Any]] = (),
  add_generation_prompt: bool = True,
) -> list[str]:
  """Texts of conversations, with a mark wherever a message spells a control token.

  Args:
    conversations: each a list of messages; those of the assistant's are left as they are.
    tokenizer: the model's, with a chat template.
    names: what else each passes to the template, from `rl_llm.text.messages.template_names`; ():
      none.
    add_generation_prompt: end with the header of the assistant's next turn.

  Returns:
    One text per conversation, for `tokenizer.encode` or `encode_whole`, which know the mark.

  Raises:
    ChatTemplateError: as `rl_llm.text.chat_template.render`, or the template takes the text of a
      control token in a message for its own.
    MessageError: the template would silently leave out calls, tools or names.
  """
  names = names or [{}] * len(conversations)
  for messages, own in zip(conversations, names, strict=True):
    check_read(tokenizer.chat_template, messages, own)
  as_objects, as_text = (
    [for_template(messages, calls_as_text=text) for messages in conversations]
    for text in (False, True)
  )
  try:
    return _render(as_objects, names, tokenizer, add_generation_prompt)
  except chat.ChatTemplateError:
    if as_objects == as_text:
      raise
    return _render(as_text, names, tokenizer, add_generation_prompt)


def _render(
  conversations: Sequence[chat.Messages],
  names: Sequence[Mapping[str, Any]],
  tokenizer: Tokenizer,
  add_generation_prompt: bool,
) -> list[str]:
  """`render` of messages as the template expects them."""

  def rendered(messages: chat.Messages, own: Mapping[str, Any]) -> str:
    return chat.render(
      tokenizer.chat_template,
      messages,
      add_generation_prompt=add_generation_prompt,
      bos_token=tokenizer.bos_token,
      eos_token=tokenizer.eos_token,
      tools=own.get("tools"),
      names=own,
    )

  structural, texts = tokenizer.structural_tokens, []
  for k, (messages, own) in enumerate(zip(conversations, names, strict=True)):
    text = rendered(messages, own)
    theirs = [own, *(m for m in messages if m["role"] != "assistant")]
    if break_up(theirs, structural) is not theirs:
      broken = [m if m["role"] == "assistant" else break_up(m, structural) for m in messages]
      marked = rendered(broken, break_up(own, structural))
      if marked.replace(MARK, "") != text:
        held = [repr(name) for name in sorted(structural) if name in str(theirs)]
        raise chat.ChatTemplateError(
          f"conversation {k}: a message holds {' and '.join(held)}, which the chat template takes "
          "for its own; write it otherwise in the message"
        )
      text = marked
    texts.append(text)
  return texts


class Whole(NamedTuple):
  """A text as ids.

  Attributes:
    ids: T ids.
    places: T places in the text, where each token begins.
    starts: how many tokens there are before each of the asked-for starts.
  """

  ids: list[int]
  places: list[int]
  starts: list[int]


def encode_whole(text: str, starts: Sequence[int], tokenizer: Tokenizer) -> Whole:
  """Ids of a whole text, in which answers begin at `starts`.

  What precedes an answer is the prompt that a sampler is given, so the ids must begin with those of
  `text[:start]`. They do unless a token spans the start (a prompt that ends in a line break, an
  answer that begins with one). Then the prompt's ids are kept and what follows is encoded after
  them, as in sampling, where the prompt is encoded before the answer exists.

  >>> from rl_llm.text.tokenizers import ByteTokenizer
  >>> encode_whole("2+2=4", [4], ByteTokenizer())
  Whole(ids=[50, 43, 50, 61, 52], places=[0, 1, 2, 3, 4], starts=[4])

  Args:
    text: from `render`, or plain.
    starts: places in the text, ascending.
    tokenizer: the model's.
  """
  ids, places = tokenizer.encode_with_places(text, follows=False)
  control = set(tokenizer.special_tokens.values())
  counts: list[int] = []
  index, begin = 0, 0  # Of a token before which the ids are settled, and its place.
  for start in starts:
    # Nor does what follows a control token depend on what precedes it.
    for later in reversed(range(index, bisect.bisect_left(places, start))):
      if ids[later] in control:
        index, begin = later, places[later]
        break
    head, at = tokenizer.encode_with_places(text[begin:start], follows=begin > 0)
    settled = index + len(head)
    if ids[index:settled] != head:
      rest, behind = tokenizer.encode_with_places(text[start:], follows=True)
      ids = [*ids[:index], *head, *rest]
      places = [
        *places[:index], *(begin + place for place in at), *(start + place for place in behind)
      ]  # fmt: skip
      index, begin = settled, start
    counts.append(settled)
  return Whole(ids, places, counts)


def _conversation(
  prompt: str | chat.Messages, index: int, system_prompt: str | None
) -> list[Mapping[str, Any]]:
  if isinstance(prompt, str):
    messages = [{"role": "user", "content": prompt}]
  elif isinstance(prompt, Sequence) and prompt and all(isinstance(m, Mapping) for m in prompt):
    messages = list(prompt)
  else:
    raise TokenizerError(
      f"prompts[{index}] must be a str or a non-empty list of messages, got {prompt!r:.80}"
    )
  if messages[-1].get("role") == "assistant":
    raise TokenizerError(
      f"prompts[{index}] ends with the assistant's message: nothing is left to answer, drop it"
    )
  if system_prompt is not None and messages[0].get("role") != "system":
    messages.insert(0, {"role": "system", "content": system_prompt})
  return messages
