"""Write tests/data/smollm2_tokens.json: what transformers makes of SmolLM2's texts and chats.

Needs the extra `parity` (transformers, gguf) and the demo weights. From the repository's root:

    python tests/make_tokenizer_goldens.py SmolLM2-135M-Instruct.Q4_1.gguf [more_texts.jsonl]

Vocabulary, merges, added tokens and chat template come through transformers' own GGUF conversion.
That conversion knows no way of cutting text named "smollm" and falls back to GPT-2's, so the one of
SmolLM2's tokenizer.json is put in its place: each digit alone, then GPT-2's. With a JSONL file of
{"question": ...} rows, this library's ids are also compared with transformers' on those texts, and
the differences counted.
"""

from __future__ import annotations

import json
import pathlib
import sys

TEXTS = [
  "",
  " ",
  "a",
  "Hello, world!",
  "3 + 4 = 7",
  "12345678901234567890",
  "x  5   66    7",
  "0.5 1,000 -3 1e-5 0x1F ½ ² Ⅷ ٣٤ ६ 一二三",
  "tabs\tand\t\ttabs",
  "lines\n\n\nand\r\nlines\n",
  "   leading and trailing   ",
  "\n",
  "it's they're I'VE we'll IT'S can't d'accord",
  "naïve café Ärger ß İ ﬁ",
  "e\u0301 \u00e9",
  "日本語のテキスト。中文文本，标点！",
  "Привет, мир! Γειά σου. שלום مرحبا",
  "हिन्दी ไทย 한국어",
  "emoji 😀 👩‍👩‍👧 🇩🇪 ❤️",
  "\u200b\u200d\ufeff\u00a0\u3000|",
  "control \x00\x01\x04\x06\x7f characters",
  "𝔘𝔫𝔦𝔠𝔬𝔡𝔢 𐍈",
  "<|im_start|>user\nhi<|im_end|>\n",
  "<|endoftext|><|im_start|><|im_end|><repo_name>",
  "<|im_start <|im_end|",
  "def f(x):\n    return x ** 2  # square\n",
  '{"key": [1, 2, {"a": null}]}',
  "$\\frac{1}{2}$ and #### 42",
  "https://example.org/a?b=c&d=%20#e",
  "aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa",
  "!!!???...---***===",
]
CHATS = [
  [{"role": "user", "content": "What is 3 + 14?"}],
  [{"role": "system", "content": ""}, {"role": "user", "content": "What is 3 + 14?"}],
  [
    {"role": "system", "content": "Answer with a number."},
    {"role": "user", "content": "What is  3 + 14?\n"},
    {"role": "assistant", "content": "17"},
    {"role": "user", "content": "And 15 more?"},
  ],
]


def reference(gguf_file):
  """transformers' tokenizer of the file, with SmolLM2's own way of cutting text."""
  from tokenizers import pre_tokenizers
  from transformers import AutoTokenizer

  tokenizer = AutoTokenizer.from_pretrained(str(gguf_file.parent), gguf_file=gguf_file.name)
  tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
    [
      pre_tokenizers.Digits(individual_digits=True),
      pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
    ]
  )
  return tokenizer


def main(gguf_file, *more):
  tokenizer = reference(pathlib.Path(gguf_file))

  def ids(text):
    return tokenizer(text, add_special_tokens=False).input_ids

  texts = [
    {
      "text": text,
      "ids": ids(text),
      "decoded": tokenizer.decode(
        ids(text), skip_special_tokens=True, clean_up_tokenization_spaces=False
      ),
    }
    for text in TEXTS
  ]
  chats = [
    {
      "messages": messages,
      "ids": ids(
        tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
      ),
    }
    for messages in CHATS
  ]
  out = pathlib.Path(__file__).parent / "data" / "smollm2_tokens.json"
  out.parent.mkdir(exist_ok=True)
  lines = [json.dumps(case) for case in texts], [json.dumps(case) for case in chats]
  out.write_text(
    '{"texts": [\n' + ",\n".join(lines[0]) + '\n],\n"chats": [\n' + ",\n".join(lines[1]) + "\n]}\n"
  )
  print(f"{out}: {len(texts)} texts, {len(chats)} chats, {out.stat().st_size} bytes")

  if more:
    sys.path.insert(0, str(pathlib.Path(__file__).parent.parent))
    from rl_llm.text.tokenizers import from_gguf

    ours = from_gguf(gguf_file)
    rows = [json.loads(line)["question"] for line in open(more[0], encoding="utf-8")][:500]
    # Also with the words pulled apart by runs of spaces, where the ways of cutting differ.
    varied = TEXTS + rows + [row.replace(" ", "   ") for row in rows]
    differ = [text for text in varied if ours.encode(text) != ids(text)]
    print(f"{len(varied)} texts, {sum(map(len, varied))} characters: {len(differ)} differ")
    for text in differ[:5]:
      print(repr(text))


if __name__ == "__main__":
  main(*sys.argv[1:])
