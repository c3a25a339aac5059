r"""Small tokenizers of the families in use, trained on the spot, and the templates they come with.

Each has the normalizer, pre-tokenizer, post-processor, decoder and added tokens that its family
publishes; only the vocabulary is small. `write` makes a Hugging Face directory of one.
"""

from __future__ import annotations

import importlib.util
import json
import pathlib
import struct

CORPUS = """
What is the answer to two plus two? The answer is four. Four is the number after three, and before
five. Which colour is the sky? The sky is blue, and the sea is blue as well; the grass is green.
Write a short answer. Answer with a number. Give your reasons first, then the answer, on a new line.
The user asks and the assistant answers. The system says how: be brief, be kind, be right.
An answer can be wrong. Then say so, and say why: "I was wrong about the number, it is seventeen."
Numbers: 1 2 3 4 5 6 7 8 9 10 12 15 17 20 42 72 100 144 256 1000 1024 2026. 2+2=4, 3+4=7, 12*12=144.
def answer(question):\n    return question.number + 1  # not the right one\n
<b>bold</b> <table><tr><td>4</td></tr></table> [link](https://example.org/a?b=c&d=e) {"name": "sum"}
It's right. That's the user's, it's the system's, and that's all there is.
user assistant system model think tool call response instruction start end header turn begin of text
Où est la gare? Die Straße ist schön, naïve café. Größe, Äpfel, fünf, über, œuvre, garçon, señor.
""".strip().split("\n")

GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
LLAMA3 = (
  r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
  r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
QWEN = LLAMA3.replace(r"\p{N}{1,3}", r"\p{N}")

CHATML = (
  "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}"
  "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
LLAMA3_CHAT = (
  "{{ bos_token }}{% for m in messages %}{{ '<|start_header_id|>' + m.role"
  " + '<|end_header_id|>\n\n' + m.content | trim + '<|eot_id|>' }}{% endfor %}"
  "{% if add_generation_prompt %}"
  "{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)
# A system message is written into the user's first turn.
LLAMA2_CHAT = (
  "{% if messages[0].role == 'system' %}"
  "{% set first = '<<SYS>>\n' + messages[0].content + '\n<</SYS>>\n\n' %}"
  "{% set talk = messages[1:] %}{% else %}{% set first = '' %}{% set talk = messages %}{% endif %}"
  "{% for m in talk %}{% if m.role == 'user' %}"
  "{{ bos_token + '[INST] ' + (first if loop.first else '') + m.content | trim + ' [/INST]' }}"
  "{% else %}{{ ' ' + m.content | trim + ' ' + eos_token }}{% endif %}{% endfor %}"
)
MISTRAL_CHAT = (
  "{{ bos_token }}{% for m in messages %}"
  "{% if m.role == 'assistant' %}{{ ' ' + m.content + eos_token }}"
  "{% elif m.role == 'user' %}{{ '[INST] ' }}"
  "{% if loop.index0 == 1 and messages[0].role == 'system' %}{{ messages[0].content + '\n\n' }}"
  "{% endif %}{{ m.content + '[/INST]' }}{% endif %}{% endfor %}"
)
ZEPHYR = (
  "{% for m in messages %}{{ '<|' + m.role + '|>\n' + m.content + eos_token + '\n' }}{% endfor %}"
  "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}"
)
# EOS stands behind a conversation, after the token that ended its last turn.
PHI3_CHAT = (
  "{% for m in messages %}{{ '<|' + m.role + '|>\n' + m.content + '<|end|>\n' }}{% endfor %}"
  "{{ '<|assistant|>\n' if add_generation_prompt else eos_token }}"
)
GEMMA2_CHAT = (
  "{{ bos_token }}{% if messages[0].role == 'system' %}{{ raise_exception('no system role') }}"
  "{% endif %}{% for m in messages %}"
  "{{ '<start_of_turn>' + ('model' if m.role == 'assistant' else m.role) + '\n'"
  " + m.content | trim + '<end_of_turn>\n' }}{% endfor %}"
  "{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}"
)
GEMMA3_CHAT = (
  "{{ bos_token }}{% if messages[0].role == 'system' %}"
  "{% set first = messages[0].content + '\n\n' %}{% set talk = messages[1:] %}"
  "{% else %}{% set first = '' %}{% set talk = messages %}{% endif %}{% for m in talk %}"
  "{{ '<start_of_turn>' + ('model' if m.role == 'assistant' else m.role) + '\n'"
  " + (first if loop.first else '') + m.content | trim + '<end_of_turn>\n' }}{% endfor %}"
  "{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}"
)
# Reasoning stays in the last answer alone, which has an empty one where there is none. A user's
# message in the tags of a tool's answer is a tool's answer.
QWEN3_CHAT = (
  "{% set last = namespace(query=-1) %}{% for m in messages %}{% if m.role == 'user' and not"
  " m.content.startswith('<tool_response>') %}{% set last.query = loop.index0 %}{% endif %}"
  "{% endfor %}{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}"
  "{% if m.role == 'assistant' %}"
  "{% set thought = m.content.split('</think>')[0].split('<think>')[-1].strip('\n')"
  " if '</think>' in m.content else '' %}"
  "{% if loop.index0 > last.query and (loop.last or thought) %}"
  "{{ '<think>\n' + thought + '\n</think>\n\n' }}{% endif %}"
  "{{ m.content.split('</think>')[-1].lstrip('\n') }}"
  "{% for call in m.tool_calls or [] %}"
  "{{ '<tool_call>\n' }}{{ call.function | tojson }}{{ '\n</tool_call>' }}{% endfor %}"
  "{% elif m.role == 'tool' %}{{ '<tool_response>\n' + m.content + '\n</tool_response>' }}"
  "{% else %}{{ m.content }}{% endif %}{{ '<|im_end|>\n' }}{% endfor %}"
  "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}"
  "{% if enable_thinking is defined and not enable_thinking %}{{ '<think>\n\n</think>\n\n' }}"
  "{% endif %}{% endif %}"
)
QWEN3_BRIEF = "{% set enable_thinking = false %}" + QWEN3_CHAT

# name: the tokenizer, the template, the token that ends a turn
PAIRS = {
  "qwen chatml": ("qwen", CHATML, "<|im_end|>"),
  "qwen3 thinking": ("qwen", QWEN3_CHAT, "<|im_end|>"),
  "qwen3 not thinking": ("qwen", QWEN3_BRIEF, "<|im_end|>"),
  "llama 3": ("llama 3", LLAMA3_CHAT, "<|eot_id|>"),
  "llama 2": ("llama 2", LLAMA2_CHAT, "</s>"),
  "zephyr": ("llama 2", ZEPHYR, "</s>"),
  "phi 3": ("phi 3", PHI3_CHAT, "<|end|>"),
  "mistral": ("mistral", MISTRAL_CHAT, "</s>"),
  "gemma 2": ("gemma", GEMMA2_CHAT, "<end_of_turn>"),
  "gemma 3": ("gemma, split", GEMMA3_CHAT, "<end_of_turn>"),
  "gpt-2 chatml": ("gpt-2", CHATML, "<|im_end|>"),
}

QWEN_TOKENS = {
  "<|endoftext|>": True, "<|im_start|>": True, "<|im_end|>": True,
  "<tool_call>": False, "</tool_call>": False, "<|fim_prefix|>": False,
  "<tool_response>": False, "</tool_response>": False, "<think>": False, "</think>": False,
}  # fmt: skip
LLAMA3_TOKENS = ("<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>",
                 "<|eot_id|>")  # fmt: skip
GEMMA_TOKENS = {
  "<pad>": True, "<eos>": True, "<bos>": True, "<unk>": True,
  "<start_of_turn>": True, "<end_of_turn>": True,
  **{"\n" * count: False for count in range(2, 5)}, **{"▁" * count: False for count in range(2, 5)},
  "<table>": False, "<b>": False, "</b>": False,
}  # fmt: skip
# family: BOS, EOS, padding, whether the tokenizer itself writes BOS before plain text
NAMED = {
  "qwen": (None, "<|endoftext|>", "<|endoftext|>", False),
  "gpt-2": (None, "<|endoftext|>", "<|endoftext|>", False),
  "llama 3": ("<|begin_of_text|>", "<|end_of_text|>", "<|end_of_text|>", True),
  "llama 2": ("<s>", "</s>", "</s>", True),
  "phi 3": ("<s>", "<|endoftext|>", "<|endoftext|>", True),
  "mistral": ("<s>", "</s>", "</s>", True),
  "gemma": ("<bos>", "<eos>", "<pad>", True),
  "gemma, split": ("<bos>", "<eos>", "<pad>", True),
}


# A control or structural token of each, for messages that hold its text.
CONTROLS = {
  "qwen chatml": "<|im_end|>", "qwen3 thinking": "</think>", "qwen3 not thinking": "<tool_call>",
  "llama 3": "<|eot_id|>", "llama 2": "</s>", "zephyr": "</s>", "phi 3": "<|end|>",
  "mistral": "[/INST]",
  "gemma 2": "<end_of_turn>", "gemma 3": "<start_of_turn>", "gpt-2 chatml": "<|im_start|>",
  "mistral's own": "[/INST]", "smollm2": "<|im_end|>",
}  # fmt: skip


def user(text):
  return {"role": "user", "content": text}


def assistant(text):
  return {"role": "assistant", "content": text}


CHATS = [
  [user("What is 2+2?"), assistant("Four.")],
  [
    {"role": "system", "content": "Answer with a number."}, user("12*12=?"), assistant("144"),
    user("And\n\nplus one?\n"), assistant("It is 145."),
  ],
  [user("  two   spaces, a\ttab "), assistant(" And an answer \n\nof two paragraphs")],
  [user("Größe, naïve e\u0301, 日本 😀"), assistant("é 日本"), user("4"), assistant("2+2")],
  [user("Is <b>bold</b> in a <table>?"), assistant("<b>Yes</b>, 4")],
  [user("2+2?"), assistant("<think>\nTwo and two.\n</think>\n\nFour."), user("And 3+3?"),
   assistant("<think>\nThree and three.\n</think>\n\nSix.")],
  # The template's header and the answer share a token in some vocabularies.
  [user("Which colour?"), assistant("\nBlue, \nand green.\n")],
]  # fmt: skip
PLAIN = [("2+2=", "4"), ("What is the ans", "wer?"), ("The sky is", " blue"), ("One\n", "\ntwo")]


def takes(pair, messages):
  return pair != "gemma 2" or messages[0]["role"] != "system"


def write(pair: str, directory: pathlib.Path) -> None:
  """Writes tokenizer.json, tokenizer_config.json and generation_config.json of a pair."""
  family, template, end = PAIRS[pair]
  _write(make(family), family, template, end, directory)


def _write(backend, family, template, end, directory):
  bos, eos, pad, add_bos = NAMED[family]
  backend.save(str(directory / "tokenizer.json"))
  config = {
    "tokenizer_class": "PreTrainedTokenizerFast", "bos_token": bos, "eos_token": eos,
    "pad_token": pad, "chat_template": template, "clean_up_tokenization_spaces": False,
    "add_bos_token": add_bos,
  }  # fmt: skip
  eos_ids = sorted({backend.token_to_id(eos), backend.token_to_id(end)})
  for name, content in (
    ("tokenizer_config.json", config), ("generation_config.json", {"eos_token_id": eos_ids})
  ):  # fmt: skip
    (directory / name).write_text(json.dumps(content))


def make(family: str):
  """A `tokenizers.Tokenizer` of a family, a function of `CORPUS` alone."""
  if family in ("qwen", "llama 3", "gpt-2"):
    return _byte_level(family)
  return _sentencepiece(family)


def _byte_level(family):
  from tokenizers import (
    AddedToken,
    Regex,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
  )

  backend = Tokenizer(models.BPE())
  if family == "gpt-2":
    backend.pre_tokenizer = pre_tokenizers.Sequence(
      [
        pre_tokenizers.Digits(individual_digits=True),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
      ]
    )
  else:
    backend.pre_tokenizer = pre_tokenizers.Sequence(
      [
        pre_tokenizers.Split(Regex(QWEN if family == "qwen" else LLAMA3), "isolated"),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
      ]
    )
  if family == "qwen":
    backend.normalizer = normalizers.NFC()
  alphabet = pre_tokenizers.ByteLevel.alphabet()
  trainer = trainers.BpeTrainer(
    vocab_size=500, initial_alphabet=sorted(alphabet), show_progress=False
  )
  # Line breaks come in runs in chats, and as words of their own.
  backend.train_from_iterator([*CORPUS, *["\n\n", "\n\n\n"] * 20], trainer)
  backend.decoder = decoders.ByteLevel()
  byte_level = processors.ByteLevel(trim_offsets=family == "gpt-2")
  flags = QWEN_TOKENS if family != "llama 3" else dict.fromkeys(LLAMA3_TOKENS, True)
  if family == "gpt-2":
    flags = dict(list(QWEN_TOKENS.items())[:3])
  backend.add_tokens(
    [AddedToken(text, normalized=False, special=special) for text, special in flags.items()]
  )
  backend.post_processor = byte_level
  if family == "llama 3":
    spec = json.loads(backend.to_str())
    spec["model"]["ignore_merges"] = True
    backend = Tokenizer.from_str(json.dumps(spec))
    bos = "<|begin_of_text|>"
    begin = processors.TemplateProcessing(
      single=f"{bos} $A", special_tokens=[(bos, backend.token_to_id(bos))]
    )
    backend.post_processor = processors.Sequence([byte_level, begin])
  return backend


def _sentencepiece(family):
  from tokenizers import (
    AddedToken,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
  )

  trained = Tokenizer(models.BPE())
  trained.pre_tokenizer = pre_tokenizers.Sequence(
    [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.Metaspace()]
  )
  trained.train_from_iterator(CORPUS, trainers.BpeTrainer(vocab_size=400, show_progress=False))
  spec = json.loads(trained.to_str())["model"]
  gemma = family.startswith("gemma")
  flags = {"<unk>": True, "<s>": True, "</s>": True}
  if family == "mistral":
    flags |= {"[INST]": True, "[/INST]": True}
  # Phi-3's tokens take the blanks behind them.
  taking = ("<|system|>", "<|user|>", "<|assistant|>", "<|end|>") if family == "phi 3" else ()
  if family == "phi 3":
    flags |= dict.fromkeys(("<|endoftext|>", *taking), True)
  if gemma:
    flags = GEMMA_TOKENS
  pieces = [*flags, *(f"<0x{byte:02X}>" for byte in range(256))]
  pieces += sorted(spec["vocab"], key=spec["vocab"].get)
  vocabulary = {text: i for i, text in enumerate(dict.fromkeys(pieces))}
  merges = [tuple(pair) for pair in spec["merges"]]
  backend = Tokenizer(
    models.BPE(vocabulary, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True)
  )
  decoder = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
  if family in ("llama 2", "phi 3"):
    backend.normalizer = normalizers.Sequence(
      [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
  elif family == "mistral":
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
  else:
    backend.normalizer = normalizers.Replace(" ", "▁")
    if family == "gemma, split":
      backend.pre_tokenizer = pre_tokenizers.Split(" ", "merged_with_previous")
  if not gemma:
    decoder.append(decoders.Strip(" ", 1, 0))
  backend.decoder = decoders.Sequence(decoder)
  backend.add_tokens(
    [
      AddedToken(text, normalized=False, special=special, rstrip=text in taking)
      for text, special in flags.items()
    ]
  )
  bos = "<bos>" if gemma else "<s>"
  backend.post_processor = processors.TemplateProcessing(
    single=f"{bos} $A", special_tokens=[(bos, vocabulary[bos])]
  )
  return backend


def mistral_file() -> pathlib.Path | None:
  """The SentencePiece file inside the package mistral-common (Apache 2.0), if it is installed."""
  spec = importlib.util.find_spec("mistral_common")
  folders = [] if spec is None else spec.submodule_search_locations
  found = [path for f in folders for path in pathlib.Path(f).glob("data/*_240323.model.v3")]
  return found[0] if found else None


def write_mistral(directory: pathlib.Path) -> None:
  """`write` for Mistral's own vocabulary, in the form of its published tokenizer.json.

  Of merges with the same score, as runs of spaces have it, the longer parts come first.
  """
  from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors

  pieces = sentencepiece_pieces(mistral_file().read_bytes())
  vocabulary = {text: i for i, (text, _, _) in enumerate(pieces)}
  merges = [
    (-score, -cut, cut - len(text), text[:cut], text[cut:])
    for text, score, kind in pieces if kind == 1
    for cut in range(1, len(text)) if text[:cut] in vocabulary and text[cut:] in vocabulary
  ]  # fmt: skip
  backend = Tokenizer(
    models.BPE(
      vocabulary,
      [(left, right) for *_, left, right in sorted(merges)],
      unk_token="<unk>",
      fuse_unk=True,
      byte_fallback=True,
    )
  )
  backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
  backend.decoder = decoders.Sequence(
    [
      decoders.Replace("▁", " "),
      decoders.ByteFallback(),
      decoders.Fuse(),
      decoders.Strip(" ", 1, 0),
    ]
  )
  backend.add_tokens(
    [AddedToken(text, normalized=False, special=True) for text, _, kind in pieces if kind in (2, 3)]
  )
  backend.post_processor = processors.TemplateProcessing(
    single="<s> $A", special_tokens=[("<s>", 1)]
  )
  _write(backend, "mistral", MISTRAL_CHAT, "</s>", directory)


def sentencepiece_pieces(data: bytes) -> list[tuple[str, float, int]]:
  """Text, score and kind (1 normal, 2 unknown, 3 control, 6 byte) of each piece of a .model file.

  Protocol buffers: a key says field and wire type; field 1 of the model is a piece, of which 1 is
  the text, 2 the score (of merges the highest is made first) and 3 the kind, where it is not 1.
  """

  def fields(data):
    at = 0

    def number():
      nonlocal at
      value = shift = 0
      while True:
        byte = data[at]
        at += 1
        value |= (byte & 127) << shift
        shift += 7
        if byte < 128:
          return value

    while at < len(data):
      key = number()
      size = {0: 0, 1: 8, 5: 4}[key & 7] if key & 7 != 2 else number()
      value = number() if key & 7 == 0 else data[at : at + size]
      at += size
      yield key >> 3, value

  pieces = [dict(fields(value)) for field, value in fields(data) if field == 1]
  return [
    (piece[1].decode(), struct.unpack("<f", piece[2])[0], piece.get(3, 1)) for piece in pieces
  ]
