"""Turns examples into token lists, with a mask on the tokens to train on: the assistant's.

Training on the user's words teaches a model to ask; leaving out the token that ends a turn teaches
it never to stop. So the mask is True only on what the policy would have to sample itself: the
assistant's text and the token that ends it.
"""

from __future__ import annotations

import bisect
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple, get_args

from rl_llm.data.formats import Content, Demonstration, Preference, Unpaired
from rl_llm.text.chat_template import ChatTemplateError
from rl_llm.text.conversations import (
  check_no_names,
  check_not_rendered,
  encode_whole,
  render,
  with_bos,
)
from rl_llm.text.messages import template_names, weight_of
from rl_llm.text.tokenizers import Tokenizer, TokenizerError
from rl_llm.text.turn_end import no_turn_end

Message = dict[str, Any]
PromptFormat = Literal["chat", "plain"]
Overlong = Literal["error", "drop", "truncate_left", "truncate_right"]


class Encoded(NamedTuple):
  """One sequence.

  Attributes:
    tokens: T ids.
    mask: T bools, True = trained on. The first is False: nothing predicts it.
    prompt_length: how many tokens there are before the completion.
  """

  tokens: list[int]
  mask: list[bool]
  prompt_length: int


class Pair(NamedTuple):
  """Two answers to one prompt: both begin with the same `prompt_length` tokens."""

  chosen: Encoded
  rejected: Encoded


def flat(examples: Sequence[Encoded | Pair]) -> list[Encoded]:
  """The sequences of examples, in the order of a batch's rows: two for a pair.

  >>> answer = Encoded([1, 2], [False, True], 1)
  >>> len(flat([Pair(answer, answer), answer]))
  3
  """
  return [
    sequence
    for example in examples
    for sequence in (example if isinstance(example, Pair) else [example])
  ]


class Limited(NamedTuple):
  """What is left after applying the policy for overlong sequences.

  Attributes:
    kept: the sequences or pairs, None in the place of a dropped one.
    overlong: how many were over the limit.
    dropped: how many of those were dropped; the others were cut.
  """

  kept: list
  overlong: int
  dropped: int


class SequenceTooLong(ValueError):
  """A sequence is longer than the limit, and the policy for such sequences is to stop."""


def encode(
  example: Demonstration | Unpaired,
  tokenizer: Tokenizer,
  *,
  prompt_format: PromptFormat = "chat",
  system_prompt: str | None = None,
) -> Encoded:
  """Tokens and mask of a prompt and its completion.

  A row's tools, its template names and turns of weight 0 count as `rl_llm.text.messages` says.

  With "chat", a text prompt is a user's message and a text completion the assistant's. The mask is
  found by rendering the conversation up to each of the assistant's turns, with the header that a
  sampler would be given, and again up to its end: the difference is the turn. That works with any
  template that never rewrites what it wrote before, which is checked. A turn ends with the token at
  which a sampler stops; what the template writes after that (usually a line break) is never sampled
  and so not trained on.

  The text is encoded as a whole, and begins with the ids of the prompt as a sampler is given it
  (`rl_llm.text.conversations.encode_whole`).

  >>> from rl_llm.text.tokenizers import ByteTokenizer
  >>> encoded = encode(Demonstration("2+2=", "4", {}), ByteTokenizer(), prompt_format="plain")
  >>> encoded.tokens, [int(m) for m in encoded.mask], encoded.prompt_length
  ([50, 43, 50, 61, 52, 258], [0, 0, 0, 0, 1, 1], 4)

  Args:
    example: an empty prompt trains on every turn of the assistant's, or on all of a text.
    tokenizer: the model's.
    prompt_format: "chat" renders the tokenizer's template; "plain" puts text after text, BOS before
      if the model expects one, EOS after. Text that is already rendered keeps its own: it gets no
      second BOS or EOS, and blanks after its EOS are not trained on.
    system_prompt: as for `format_prompts`.

  Returns:
    Tokens, mask and where the completion begins.

  Raises:
    TokenizerError: no chat template, or messages with "plain".
    ChatTemplateError: the template fails, refuses the messages, or changes earlier turns.
    MessageError: the template does not read what the row says to it.
  """
  names = template_names(example.columns)
  if prompt_format == "plain":
    check_no_names(names)
    return _encode_plain(example.prompt, example.completion, tokenizer, system_prompt)
  if prompt_format != "chat":
    raise TokenizerError(f"prompt_format must be 'chat' or 'plain', got {prompt_format!r}")
  if tokenizer.chat_template is None:
    raise TokenizerError(
      "this model's files have no chat template (a base model?): use prompt_format='plain'"
    )
  if isinstance(example.prompt, str):
    check_not_rendered([example.prompt], tokenizer)
  prompt = _messages(example.prompt, "user")
  messages = prompt + _messages(example.completion, "assistant")
  turns = [
    place
    for place, m in enumerate(messages)
    if m["role"] == "assistant" and place >= len(prompt) and weight_of("messages", m) is not False
  ]
  if not turns or turns[0] == 0:
    raise TokenizerError(
      "a conversation needs a message to answer and an answer of the assistant; text alone is "
      "encoded with prompt_format='plain'"
    )
  if system_prompt is not None and messages[0]["role"] != "system":
    messages.insert(0, {"role": "system", "content": system_prompt})
    turns = [turn + 1 for turn in turns]
  return _encode_chat(messages, bool(prompt), turns, tokenizer, names)


def encode_pair(
  example: Preference,
  tokenizer: Tokenizer,
  *,
  prompt_format: PromptFormat = "chat",
  system_prompt: str | None = None,
) -> Pair:
  """`encode` of the prompt with each of its two answers.

  >>> from rl_llm.text.tokenizers import ByteTokenizer
  >>> example = Preference("2+2=", "4", "5", {})
  >>> pair = encode_pair(example, ByteTokenizer(), prompt_format="plain")
  >>> pair.chosen.tokens[4:], pair.rejected.tokens[4:]
  ([52, 258], [53, 258])
  """
  return Pair(
    *(
      encode(
        Demonstration(example.prompt, completion, example.columns),
        tokenizer,
        prompt_format=prompt_format,
        system_prompt=system_prompt,
      )
      for completion in (example.chosen, example.rejected)
    )
  )


def limit_sequences(sequences: Sequence[Encoded], *, limit: int, overlong: Overlong) -> Limited:
  """Applies the policy for sequences longer than `limit`; counts them.

  >>> long = Encoded([5, 6, 7, 8], [False, False, True, True], 2)
  >>> limit_sequences([long], limit=3, overlong="truncate_left").kept
  [Encoded(tokens=[6, 7, 8], mask=[False, True, True], prompt_length=1)]
  >>> limit_sequences([long], limit=2, overlong="truncate_right")
  Limited(kept=[None], overlong=1, dropped=1)

  Args:
    sequences: from `encode`.
    limit: tokens allowed, >= 1.
    overlong: "error" stops; "drop" drops; "truncate_left" cuts the start, so the answer keeps its
      end; "truncate_right" cuts the end, so the model never sees how the answer stops. A sequence
      is dropped if the cut leaves no prompt or nothing to train on.

  Raises:
    SequenceTooLong: under "error"; the message gives the number, the length and the ways out.
    ValueError: limit or overlong is none of those allowed.
  """
  limited = _limit([(sequence,) for sequence in sequences], "sequence", limit, overlong)
  return limited._replace(kept=[group and group[0] for group in limited.kept])


def limit_pairs(pairs: Sequence[Pair], *, limit: int, overlong: Overlong) -> Limited:
  """`limit_sequences` for pairs, which stay comparable: both lose the same part of their prompt.

  Under "truncate_left" the longer answer decides what both lose. Under "truncate_right" each loses
  its own end. A pair is dropped where either of its sequences would be.

  >>> short = Encoded([5, 6, 7], [False, False, True], 2)
  >>> long = Encoded([5, 6, 8, 9], [False, False, True, True], 2)
  >>> [pair] = limit_pairs([Pair(short, long)], limit=3, overlong="truncate_left").kept
  >>> pair.chosen.tokens, pair.rejected.tokens
  ([6, 7], [6, 8, 9])
  """
  limited = _limit(pairs, "pair", limit, overlong)
  return limited._replace(kept=[group and Pair(*group) for group in limited.kept])


def _limit(
  groups: Sequence[tuple[Encoded, ...]], name: str, limit: int, overlong: Overlong
) -> Limited:
  if limit < 1:
    raise ValueError(f"limit={limit}: must be at least 1 token")
  if overlong not in get_args(Overlong):
    raise ValueError(f"overlong={overlong!r}: must be one of {', '.join(get_args(Overlong))}")
  kept: list[tuple[Encoded, ...] | None] = []
  count = 0
  for index, group in enumerate(groups):
    longest = max(len(sequence.tokens) for sequence in group)
    if longest <= limit:
      kept.append(group)
      continue
    count += 1
    if overlong == "error":
      raise SequenceTooLong(
        f"{name} {index} has {longest} tokens, over the limit of {limit}; raise the limit, or "
        "choose drop, truncate_left or truncate_right"
      )
    if overlong == "truncate_left":
      group = tuple(_cut_start(sequence, longest - limit) for sequence in group)
    if overlong == "truncate_right":
      group = tuple(_cut_end(sequence, limit) for sequence in group)
    usable = overlong != "drop" and all(any(sequence.mask) for sequence in group)
    kept.append(group if usable else None)
  return Limited(kept, count, sum(group is None for group in kept))


def _cut_start(sequence: Encoded, count: int) -> Encoded:
  tokens, mask = sequence.tokens[count:], sequence.mask[count:]
  if 0 < sequence.prompt_length <= count:  # An answer to nothing.
    mask = [False] * len(mask)
  return Encoded(tokens, [False, *mask[1:]], max(sequence.prompt_length - count, 0))


def _cut_end(sequence: Encoded, limit: int) -> Encoded:
  return Encoded(sequence.tokens[:limit], sequence.mask[:limit], min(sequence.prompt_length, limit))


def _messages(content: Content, role: str) -> list[Message]:
  if isinstance(content, str):
    return [{"role": role, "content": content}] if content else []
  return list(content)


def _encode_plain(
  prompt: Content, completion: Content, tokenizer: Tokenizer, system_prompt: str | None
) -> Encoded:
  if not isinstance(prompt, str) or not isinstance(completion, str):
    raise TokenizerError("prompt_format='plain' needs text: use 'chat' for messages")
  if system_prompt is not None:
    raise TokenizerError("a system prompt needs a chat layout: leave it out or use 'chat'")
  text = prompt + completion
  whole = encode_whole(text, [len(prompt)] if prompt else [], tokenizer)
  start = whole.starts[0] if prompt else 0
  end = bisect.bisect_left(whole.places, len(text.rstrip()))
  if end > start and whole.ids[end - 1] in tokenizer.eos_ids:  # Rendered already.
    ids = whole.ids
  else:
    ids = [*whole.ids, tokenizer.eos_ids[0]]
    end = len(ids)
  tokens = with_bos(ids, tokenizer)
  added = len(tokens) - len(ids)
  start, end = start + added if prompt else 0, end + added
  mask = [start <= place < end for place in range(len(tokens))]
  return Encoded(tokens, [False, *mask[1:]], start)


def _encode_chat(
  messages: list[Message],
  has_prompt: bool,
  turns: list[int],
  tokenizer: Tokenizer,
  names: dict[str, Any],
) -> Encoded:
  """Encodes messages up to the last of `turns`, the places of the assistant's trained ones."""
  all_names = [names] * len(turns)
  befores = render([messages[:turn] for turn in turns], tokenizer, names=all_names)
  afters = render(
    [messages[: turn + 1] for turn in turns],
    tokenizer,
    names=all_names,
    add_generation_prompt=False,
  )
  behind: list[int] = []  # Each turn.
  for turn, before, after, done in zip(turns, befores, afters, ["", *afters], strict=False):
    if not before.startswith(done):
      done = _ended(done, tokenizer)
      behind[-1] = len(done)
    if not before.startswith(done):
      raise ChatTemplateError(
        f"the chat template writes the messages before messages[{turn}] otherwise than when they "
        "came last (some drop earlier reasoning), so the model would be trained on a text that it "
        "never sees; give each answer a row of its own, with all before it as 'prompt', or use a "
        "template that keeps history"
      )
    if not after.startswith(before):
      raise ChatTemplateError(
        f"the chat template does not begin messages[{turn}] with the header it gives for sampling "
        "(add_generation_prompt); write into the message what the header holds, or use a template "
        "that begins the same way"
      )
    behind.append(len(after))
  text = afters[-1]
  whole = encode_whole(text, [len(before) for before in befores], tokenizer)
  mask = [False] * len(whole.ids)
  for start, place in zip(whole.starts, behind, strict=True):
    stop = bisect.bisect_left(whole.places, place)
    end = _end_of_turn(whole.ids[start:stop], [*whole.places[start:stop], place], text, tokenizer)
    mask[start : start + end] = [True] * end
  return Encoded(whole.ids, [False, *mask[1:]], whole.starts[0] if has_prompt else 0)


def _ended(text: str, tokenizer: Tokenizer) -> str:
  """The text up to the end of its last turn."""
  ids, places = tokenizer.encode_with_places(text, follows=False)
  places.append(len(text))
  return text[: places[_end_of_turn(ids, places, text, tokenizer)]]


def _end_of_turn(ids: list[int], places: list[int], text: str, tokenizer: Tokenizer) -> int:
  """How many of the tokens, from an answer's first on, a sampler would have given.

  The last is the first token at the answer's end that ends a response. What the template writes
  after it is never sampled: usually a line break, and for Phi-3's also `<|endoftext|>`.

  Args:
    ids: the answer's and those that the template writes after it.
    places: where in `text` each begins, and where the last one ends.
    text: the whole.
    tokenizer: the model's.
  """
  end = 0
  for index in reversed(range(len(ids))):
    if ids[index] in tokenizer.eos_ids:
      end = index + 1
    elif end and text[places[index] : places[index + 1]].strip():
      break
  if not end:
    raise no_turn_end(tokenizer)
  return end
