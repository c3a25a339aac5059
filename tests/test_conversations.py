"""Whole texts as ids: borders, marks, rendered text, and messages that imitate a template."""

from __future__ import annotations

import dataclasses
import random

import pytest

pytest.importorskip("tokenizers")
pytest.importorskip("jinja2")

from rl_llm.data import Demonstration, Preference
from rl_llm.data.encoding import encode, encode_pair
from rl_llm.text import chat_template
from rl_llm.text.chat_template import ChatTemplateError
from rl_llm.text.control_tokens import MARK, Unspeakable
from rl_llm.text.conversations import encode_whole, format_prompts, render
from rl_llm.text.tokenizers import TokenizerError
from tests.test_tokenizer_families import chats, loaded
from tests.tokenizer_families import CONTROLS, PAIRS, assistant, user


def rendered(tokenizer, messages, generation):
  return chat_template.render(
    tokenizer.chat_template,
    messages,
    add_generation_prompt=generation,
    bos_token=tokenizer.bos_token,
    eos_token=tokenizer.eos_token,
  )


def trained(encoded):
  return [i for i, m in zip(encoded.tokens, encoded.mask, strict=True) if m]


# Borders.


@pytest.mark.parametrize("pair", PAIRS)
def test_a_prompt_begins_its_row_whatever_the_messages_hold(pair):
  """Also the earlier turns' prompts, unless a token lay over the end of one of them."""
  tokenizer, rng = loaded(pair), random.Random(0)
  parts = ["answer", " ", "  ", "\n", "\n\n", "4", "12", "é", "e\u0301", "日", "<", "|", ">", "/s",
           "<b>", "?", "The", " the", "\t", CONTROLS[pair], "\ufdd0"]  # fmt: skip
  controls = {tokenizer.backend.token_to_id(name) for name in tokenizer.structural_tokens}
  straddled = 0
  for _ in range(25):
    said = ["".join(rng.choices(parts, k=rng.randrange(1, 8))) for _ in range(3)]
    answers = [text.replace(CONTROLS[pair], "") + "." for text in said[1:2] + ["\nend"]]
    prompt = [user(said[0]), assistant(answers[0]), user(said[2])]
    row = encode(Demonstration(prompt, [assistant(answers[1])], {}), tokenizer)
    assert [row.tokens[: row.prompt_length]] == format_prompts([prompt], tokenizer)
    assert row.tokens[row.mask.index(True) - 1 :] == row.tokens[row.prompt_length - 1 :]
    clean = [user("a"), assistant("."), user("b"), assistant(".")]
    [text] = render([[*prompt, assistant(answers[1])]], tokenizer, add_generation_prompt=False)
    straddled += tokenizer.encode(text) != row.tokens
    [template] = render([clean], tokenizer, add_generation_prompt=False)
    assert [i for i in row.tokens if i in controls] == [
      i for i in tokenizer.encode(template) if i in controls
    ]
  assert straddled == (25 if pair == "qwen chatml" else 0)


def test_the_prompts_ids_stand_where_a_token_would_lie_over_their_end():
  tokenizer = loaded("qwen chatml")
  talk = [user("a"), assistant("\nBlue"), user("b"), assistant("\n\nGreen")]
  row = encode(Demonstration([], talk, {}), tokenizer)
  whole = tokenizer.encode(rendered(tokenizer, talk, False))
  assert row.tokens != whole and tokenizer.decode(row.tokens) == tokenizer.decode(whole)
  [prompt] = format_prompts([talk[:1]], tokenizer)
  assert row.tokens[: len(prompt)] == prompt and row.mask.index(True) == len(prompt)
  # As if the first answer had been sampled, and the rest written after it.
  end = tokenizer.backend.token_to_id("<|im_end|>")
  assert trained(row) == [
    *tokenizer.encode("\nBlue"), end, *tokenizer.encode("\n\nGreen"), end
  ]  # fmt: skip


@pytest.mark.parametrize("pair", ["llama 2", "mistral"])
def test_a_text_that_follows_another_gets_no_space(pair):
  tokenizer = loaded(pair)
  found = encode_whole("What is the answer?", [len("What is the ans")], tokenizer)
  head = tokenizer.encode("What is the ans")
  assert found.ids[: found.starts[0]] == head
  assert tokenizer.encode("What is the answer?")[: len(head)] != head  # It has " answer" in one.
  assert tokenizer.decode(found.ids) == "What is the answer?"
  # A control token in it is one as ever.
  follows, places = tokenizer.encode_with_places("wer?</s>4", follows=True)
  assert follows[follows.index(2) - 1] == tokenizer.backend.token_to_id("?")
  assert places[0] == 0 and places[follows.index(2)] == 4


@pytest.mark.parametrize("pair", ["llama 2", "mistral", "llama 3", "gemma 3"])
def test_several_tokens_that_would_lie_over_a_border(pair):
  tokenizer = loaded(pair)
  parts = [f"{tokenizer.bos_token}What is the ans", "wer? The num", "ber."]
  text = "".join(parts)
  starts = [len(parts[0]), len(parts[0] + parts[1])]
  found = encode_whole(text, starts, tokenizer)
  assert found.ids == [
    *tokenizer.encode(parts[0]),
    *(i for part in parts[1:] for i in tokenizer.encode_with_places(part, follows=True)[0]),
  ]
  before = encode_whole(text[: starts[1]], starts[:1], tokenizer)
  assert found.ids[: found.starts[1]] == before.ids and found.places == sorted(found.places)
  whole = tokenizer.encode(text)
  assert tokenizer.decode(found.ids) == tokenizer.decode(whole) == text[len(tokenizer.bos_token) :]
  assert len(found.ids) > len(whole)


def test_what_comes_before_is_nothing_to_a_tokenizer_that_writes_no_first_space():
  for pair in ("llama 3", "qwen chatml", "gemma 2"):
    tokenizer = loaded(pair)
    for text in ("'s", " 's", "answer", "\n\n4"):
      assert tokenizer.encode_with_places(text, follows=True)[0] == tokenizer.encode(text)
  assert len(loaded("llama 3").encode("'s")) == 1


def test_both_answers_of_a_pair_follow_the_same_ids():
  tokenizer = loaded("llama 2")
  pair = encode_pair(
    Preference("What is the ans", "wer?", " 4", {}), tokenizer, prompt_format="plain"
  )
  [prompt] = format_prompts(["What is the ans"], tokenizer, prompt_format="plain")
  for side in pair:
    assert side.prompt_length == len(prompt) and side.tokens[: len(prompt)] == prompt
  assert [tokenizer.decode([*prompt[-2:], *trained(side)]) for side in pair] == ["answer?", "ans 4"]


# Ends.


def test_a_turn_ends_where_a_sampler_stops_and_not_behind_it():
  """Phi-3's template writes EOS behind a conversation, after the token that ended the turn."""
  tokenizer = loaded("qwen chatml")
  phi3 = tokenizer.chat_template.replace(
    "{% if add", "{% if not add_generation_prompt %}{{ eos_token }}{% endif %}{% if add"
  )
  tokenizer = dataclasses.replace(tokenizer, chat_template=phi3)
  talk = [user("a"), assistant("one"), user("b"), assistant("two\n")]
  row = encode(Demonstration([], talk, {}), tokenizer)
  assert row.tokens == tokenizer.encode(rendered(tokenizer, talk, False))
  assert tokenizer.decode(trained(row), skip_special=False) == "one<|im_end|>two\n<|im_end|>"
  # Nor behind an end that the answer brings itself.
  ended = Demonstration("a", "one<|im_end|>\n", {})
  assert tokenizer.decode(trained(encode(ended, tokenizer)), skip_special=False) == "one<|im_end|>"
  inside = Demonstration("a", "one<|im_end|>two", {})
  assert len(trained(encode(inside, tokenizer))) > 4


# Text that is already rendered.


@pytest.mark.parametrize("pair", PAIRS)
def test_rendered_text_keeps_its_one_bos_and_eos(pair):
  tokenizer = loaded(pair)
  for messages, golden in chats(pair):
    if not golden["row"] or golden["straddles"]:
      continue
    before, after = rendered(tokenizer, messages[:-1], True), rendered(tokenizer, messages, False)
    # These templates write no BOS, so the text gets the one that the tokenizer writes.
    bos = [1] if pair in ("zephyr", "phi 3") else []
    assert format_prompts([before], tokenizer, prompt_format="plain") == [bos + golden["prompt"]]
    text = encode(Demonstration("", after, {}), tokenizer, prompt_format="plain")
    assert text.tokens == bos + golden["row"] and text.prompt_length == 0
    # All of it is language to model, but for what comes before all and behind the end.
    begin, end = (len(bos) + place for place in golden["spans"][-1])
    end = len(text.tokens) if pair == "phi 3" else end  # It ends in EOS.
    assert text.mask == [0 < place < end for place in range(len(text.tokens))]
    halves = Demonstration(before, after[len(before) :], {})
    row = encode(halves, tokenizer, prompt_format="plain")
    assert row.tokens == text.tokens and row.prompt_length == begin
    assert row.mask == [begin <= place < end for place in range(len(text.tokens))]


@pytest.mark.parametrize("pair", PAIRS)
def test_text_that_is_rendered_already_is_not_rendered_again(pair):
  tokenizer = loaded(pair)
  texts = [rendered(tokenizer, [user(text)], True) for text in ("2+2?", "3+3?")]
  if pair == "zephyr":  # Its headers are ordinary text: nobody can tell.
    assert format_prompts(texts, tokenizer)
    return
  for call in (
    lambda: format_prompts(texts, tokenizer),
    lambda: encode(Demonstration(texts[0], "4", {}), tokenizer),
  ):
    with pytest.raises(TokenizerError, match="as the chat template does.*--prompt_format=plain"):
      call()
  # A user may write about control tokens all the same: among others, and in a message.
  assert format_prompts([texts[0], "2+2?"], tokenizer)
  assert format_prompts([[user(texts[0])]], tokenizer)
  assert encode(Demonstration([user(texts[0])], [assistant("4")], {}), tokenizer)
  assert format_prompts([f"What is {texts[0]}?"], tokenizer)
  if "qwen3" in pair:
    assert format_prompts(["</think> ends it", "<tool_call> begins it"], tokenizer)


def test_an_end_within_a_text_is_not_its_end():
  tokenizer = loaded("mistral")
  for text in ("one</s>two", "one</s>two ", "</s> ."):
    row = encode(Demonstration("", text, {}), tokenizer, prompt_format="plain")
    assert row.tokens[0] == 1 and row.tokens[-1] == 2 and row.mask[-1]
    assert row.tokens.count(2) == 2 and row.tokens.count(1) == 1
  # The end of the prompt is not that of an answer.
  row = encode(Demonstration("one</s>", " ", {}), tokenizer, prompt_format="plain")
  assert row.tokens[-1] == 2 and row.mask[-1] and row.tokens.count(2) == 2


# Control tokens.


def test_which_tokens_only_a_template_writes():
  qwen, gemma = loaded("qwen3 thinking"), loaded("gemma 2")
  assert {"<|im_end|>", "</think>", "<tool_call>", "<tool_response>", "<|fim_prefix|>"} <= (
    qwen.structural_tokens
  )
  assert "</think>" not in loaded("qwen chatml").structural_tokens  # Text to this template.
  assert {"<bos>", "<end_of_turn>"} <= gemma.structural_tokens
  assert not {"\n\n", "<table>", "<b>", "▁▁"} & gemma.structural_tokens


def test_reasoning_and_tool_calls_are_the_assistants_to_write():
  tokenizer = loaded("qwen3 thinking")

  def count(ids, name):
    return ids.count(tokenizer.backend.token_to_id(name))

  call = {"type": "function", "function": {"name": "sum", "arguments": {"a": "<tool_call>"}}}
  talk = [
    user("Use <tool_call> and </think>."),
    assistant("<think>\nSum.\n</think>\n\n") | {"tool_calls": [call]},
    {"role": "tool", "content": "4</tool_response><|im_end|>"},
    assistant("<think>\nSo it is 4.\n</think>\n\nFour."),
  ]
  row = encode(Demonstration(talk[:3], talk[3:], {}), tokenizer)
  assert count(row.tokens, "</think>") == 2 and count(row.tokens, "</tool_response>") == 1
  assert count(row.tokens, "<tool_call>") == 2 and count(row.tokens, "<|im_end|>") == 4
  assert count(trained(row), "</think>") == 1
  text = tokenizer.decode(row.tokens, skip_special=False)
  assert text == rendered(tokenizer, talk, False)


def test_a_message_that_the_template_takes_for_its_own_is_refused():
  tokenizer = loaded("qwen3 thinking")
  talk = [user("2+2?"), assistant("<think>\nTwo.\n</think>\n\n4"), user("<tool_response>5")]
  said = "a message holds '<tool_response>', which the chat template takes for its own"
  with pytest.raises(ChatTemplateError, match=said) as caught:
    format_prompts([talk], tokenizer)
  assert MARK[1:5] not in str(caught.value)
  assert format_prompts([[*talk[:2], user("a <tool_response>5")]], tokenizer)  # As it says.


def test_a_refusal_of_the_template_shows_no_mark():
  tokenizer = loaded("mistral")
  refuses = dataclasses.replace(
    tokenizer, chat_template="{{ raise_exception(messages[0].content) }}"
  )
  with pytest.raises(ChatTemplateError, match="these messages: a</s>b$"):
    format_prompts(["a</s>b"], refuses)


def test_a_vocabulary_whose_model_could_write_control_tokens_by_itself():
  """Unigram and a token that is one character: neither can be kept apart by spelling alone."""
  import tokenizers

  pieces = ["<unk>", "</s>", "▁", *"a</s>§"]
  model = tokenizers.models.Unigram([(piece, -1.0) for piece in pieces], unk_id=0)
  backend = tokenizers.Tokenizer(model)
  backend.pre_tokenizer = tokenizers.pre_tokenizers.Metaspace()
  backend.add_special_tokens(["<unk>", "</s>", "§"])
  found = Unspeakable(backend, frozenset({"</s>", "§"}))
  ids, places = found.encode(f"a<{MARK}/s></s>§{MARK}§")
  assert [pieces[i] for i in ids if i != 2] == [*"a</s>", "</s>", "<unk>", "§"]
  assert places[-1] == len(f"a<{MARK}/s></s>§{MARK}")
