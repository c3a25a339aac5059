"""Every format, as text and as messages, from JSONL, gzip and Parquet; broken rows by the dozen."""

import gzip
import json

import pytest

from rl_llm.data import (
  DataError,
  Demonstration,
  Preference,
  Prompt,
  Unpaired,
  count_reasons,
  read_dataset,
  recognise,
  transcript_messages,
)


def user(text):
  return {"role": "user", "content": text}


def assistant(text):
  return {"role": "assistant", "content": text}


Q, GOOD, BAD = [user("2+2?")], [assistant("4")], [assistant("5")]
MORE = {"level": 1, "tags": ["a", None]}

# format -> (row as text, row as messages, example of the first, example of the second)
FORMATS = {
  "prompt_only": ({"prompt": "2+2?"}, {"prompt": Q}, Prompt("2+2?", MORE), Prompt(Q, MORE)),
  "prompt_completion": (
    {"prompt": "2+2?", "completion": "4"},
    {"prompt": Q, "completion": GOOD},
    Demonstration("2+2?", "4", MORE),
    Demonstration(Q, GOOD, MORE),
  ),
  "preference": (
    {"prompt": "2+2?", "chosen": "4", "rejected": "5"},
    {"prompt": Q, "chosen": GOOD, "rejected": BAD},
    Preference("2+2?", "4", "5", MORE),
    Preference(Q, GOOD, BAD, MORE),
  ),
  "implicit_preference": (
    {"chosen": "2+2? It is 4", "rejected": "2+2? Is it 5"},
    {"chosen": Q + GOOD, "rejected": Q + BAD},
    Preference("2+2?", " It is 4", " Is it 5", MORE),
    Preference(Q, GOOD, BAD, MORE),
  ),
  "unpaired": (
    {"prompt": "2+2?", "completion": "5", "label": False},
    {"prompt": Q, "completion": GOOD, "label": True},
    Unpaired("2+2?", "5", False, MORE),
    Unpaired(Q, GOOD, True, MORE),
  ),
  "text": (
    {"text": "2+2=4"},
    {"text": "6*7"},
    Demonstration("", "2+2=4", MORE),
    Demonstration("", "6*7", MORE),
  ),
  "messages": (
    {"messages": Q + GOOD},
    {"messages": Q + BAD},
    Demonstration([], Q + GOOD, MORE),
    Demonstration([], Q + BAD, MORE),
  ),
}


def jsonl(path, rows):
  path.write_text("".join(json.dumps(row) + "\n" for row in rows))
  return str(path)


def zipped(path, rows):
  path.write_bytes(gzip.compress("".join(json.dumps(row) + "\n" for row in rows).encode()))
  return str(path)


def parquet(path, rows):
  arrow = pytest.importorskip("pyarrow")
  from pyarrow import parquet as pq

  pq.write_table(arrow.Table.from_pylist(rows), path)
  return str(path)


@pytest.mark.parametrize("write", [jsonl, zipped, parquet])
@pytest.mark.parametrize("kind", FORMATS)
def test_formats(tmp_path, write, kind):
  for row, example in zip(FORMATS[kind][:2], FORMATS[kind][2:], strict=True):
    found = read_dataset(write(tmp_path / "rows", [row | MORE] * 2))
    assert found == (kind, (example, example), (1, 2), ())
    assert type(found.examples[0]) is type(example)


def test_a_format_said_makes_the_other_columns_ones_own(tmp_path):
  row = {"prompt": "a", "completion": "b", "label": "easy", "text": "c"}
  path = jsonl(tmp_path / "rows.jsonl", [row])
  with pytest.raises(DataError, match="rows.jsonl:1: ambiguous columns .*prompt_only or "):
    read_dataset(path)
  found = read_dataset(path, format="prompt_completion")
  assert found.examples == (Demonstration("a", "b", {"label": "easy", "text": "c"}),)
  assert read_dataset(path, format="text").examples[0].completion == "c"
  with pytest.raises(DataError, match="rows.jsonl:1: 'label' is 'easy'; .*--data_format=prompt_"):
    read_dataset(path, format="unpaired")
  with pytest.raises(DataError, match="format='dpo': must be one of prompt_only"):
    read_dataset(path, format="dpo")


def test_a_text_next_to_an_answer_is_the_same_example_rendered(tmp_path):
  rows = [
    {"prompt": f"q{n}", "completion": "a", "text": f"<s>[INST] q{n} [/INST] a</s>"} for n in (0, 1)
  ]
  found = read_dataset(jsonl(tmp_path / "rows.jsonl", rows))
  assert found.format == "prompt_completion"
  assert found.examples[1] == Demonstration("q1", "a", {"text": rows[1]["text"]})
  assert recognise(["messages", "text"]) == "messages"
  for columns in (["prompt", "text"], ["chosen", "rejected", "text"]):  # No one knows whose.
    with pytest.raises(DataError, match="ambiguous columns"):
      recognise(columns)


@pytest.mark.parametrize(
  "columns, said",
  [
    ({"prompt", "chosen"}, "ambiguous columns 'chosen', 'prompt': could be prompt_only"),
    ({"messages", "prompt"}, "ambiguous .* prompt_only or messages"),
    ({"chosen"}, "columns 'chosen' are of no known format"),
    ({"question", "answer"}, "columns 'answer', 'question' are of no known format"),
    ({"label"}, "columns 'label' are of no known format"),
  ],
)
def test_columns_of_none_or_several(columns, said):
  with pytest.raises(DataError, match=said):
    recognise(columns)


def test_most_rows_decide_so_that_a_broken_first_one_does_not(tmp_path):
  pair = {"prompt": "p", "chosen": "a", "rejected": "b"}
  rows = [{"prompt": "p"}, pair, {"chosen": "p a", "rejected": "p b"}, pair, pair | {"text": "t"}]
  path = jsonl(tmp_path / "rows.jsonl", rows)
  with pytest.raises(DataError, match="rows.jsonl:1: no key 'chosen'; add it to 'prompt'"):
    read_dataset(path)
  found = read_dataset(path, strict=False)
  assert found.format == "preference" and found.lines == (2, 4)
  assert [error.split(":")[1] for error in found.errors] == ["1", "3", "5"]
  # With two more of the third kind, the prompt is what is too much.
  path = jsonl(tmp_path / "rows.jsonl", [rows[1], rows[2], rows[2]])
  with pytest.raises(DataError, match=":1: columns of preference among rows of implicit"):
    read_dataset(path)


BLANK, CALL = assistant(" "), {"role": "assistant", "content": None}
LEFT_OUT = object()
MARKED, ADD = GOOD[0] | {"weight": 0}, {"name": "add", "arguments": "2"}
PC = {"prompt": "a", "completion": "b"}
# A row, what is said of it, and what changes in it when that is done.
BROKEN = [
  (
    {"prompt": Q, "completion": [assistant("")]},
    "'completion' holds an empty message of 'assist",
    {"completion": GOOD},
  ),
  (
    {"messages": [user(""), *GOOD]},
    "'messages' holds an empty message of 'user'",
    {"messages": Q + GOOD},
  ),
  (
    {"prompt": Q, "chosen": GOOD, "rejected": [BLANK]},
    "'rejected' holds an empty message",
    {"rejected": BAD},
  ),
  (
    {"prompt": Q + GOOD, "completion": GOOD},
    "'prompt' ends with the assistant's message",
    {"prompt": Q},
  ),
  (
    {"prompt": Q + GOOD, "chosen": GOOD, "rejected": BAD},
    "'prompt' ends with the assistant's",
    {"prompt": Q},
  ),
  (
    {"messages": Q + [MARKED]},
    "no answer of the assistant that is trained on",
    {"messages": Q + [MARKED] + Q + GOOD},
  ),
  (
    {"messages": Q + [GOOD[0] | {"weight": 0.5}]},
    "weight=0.5; write 1",
    {"messages": Q + [GOOD[0] | {"weight": 1}]},
  ),
  (
    {"messages": Q + [GOOD[0] | {"weight": 1, "train": False}]},
    "weight=1 and train=False, which",
    {"messages": Q + [GOOD[0] | {"weight": 1}]},
  ),
  (
    {"messages": [Q[0] | {"loss_mask": 1}, *GOOD]},
    "gives a message of 'user' a weight",
    {"messages": [Q[0] | {"loss_mask": 0}, *GOOD]},
  ),
  ({"prompt": Q, "chosen": [MARKED], "rejected": BAD}, "compared whole; remove", {"chosen": GOOD}),
  (
    {"prompt": [Q[0], GOOD[0] | {"train": True}, Q[0]], "completion": GOOD},
    "not trained on",
    {"prompt": Q, "completion": [GOOD[0] | {"train": True}, Q[0], *GOOD]},
  ),
  (
    {"messages": Q + [GOOD[0] | {"tool_calls": [{"function": {}}]}]},
    "a call without the name",
    {"messages": Q + [GOOD[0] | {"tool_calls": [{"function": {"name": "add"}}]}]},
  ),
  (
    {"messages": Q + [CALL | {"tool_calls": [ADD]}]},
    "no object",
    {"messages": Q + [CALL | {"tool_calls": [ADD | {"arguments": '{"a": 2}'}]}]},
  ),
  (
    {"messages": Q + [assistant("4") | {"function_call": {"name": "add"}}]},
    "a function_call; wri",
    {"messages": Q + [assistant("4") | {"tool_calls": [{"name": "add"}]}]},
  ),
  (PC | {"tools": "hammer"}, "'tools' is no list of JSON schemas", {"tools": '[{"name": "add"}]'}),
  (PC | {"tools": "hammer"}, "or rename the column", {"tools": LEFT_OUT, "my_tools": "hammer"}),
  (
    PC | {"chat_template_kwargs": '{"depth": 1e400}'},
    "'chat_template_kwargs' is no object",
    {"chat_template_kwargs": '{"depth": 1e4}'},
  ),
  (
    PC | {"chat_template_kwargs": [1]},
    "'chat_template_kwargs' is no",
    {"chat_template_kwargs": {"enable_thinking": False}},
  ),
  (PC | {"chat_template_kwargs": {"tools": []}}, "sets tools, which", {"chat_template_kwargs": {}}),
  (PC | {"prompt": None}, "'prompt' is null", PC),
  (PC | {"prompt": 3}, "'prompt' is of type int", PC),
  (PC | {"prompt": " "}, "'prompt' is empty", PC),
  ({"prompt": [], "completion": GOOD}, "'prompt' has no message", {"prompt": Q}),
  (
    {"prompt": ["hi"], "completion": GOOD},
    "'prompt' holds a message without a role",
    {"prompt": [user("hi")]},
  ),
  (
    {"prompt": [{"role": "user"}], "completion": GOOD},
    "'prompt' holds a message without content",
    {"prompt": Q},
  ),
  (
    {"prompt": Q, "completion": "4"},
    "'prompt' and 'completion' are neither all text nor all mess",
    {"completion": GOOD},
  ),
  (
    {"prompt": Q, "completion": Q},
    "'completion' begins with the message of 'user'",
    {"completion": GOOD},
  ),
  (PC | {"label": 2}, "'label' is 2; write true or false", {"label": True}),
  (PC | {"label": "good"}, "'label' is 'good'; write true or false", {"label": 1}),
  ({"chosen": "4", "rejected": "5"}, "share no prompt", {"prompt": "2+2?"}),
  (
    {"chosen": "2+2? 4", "rejected": "2+2? 4"},
    "the same, or one is the beginning",
    {"prompt": "2+2?", "chosen": " 4", "rejected": " 5"},
  ),
  (
    {"chosen": "2+2? 4", "rejected": "2+2? 4."},
    "the same, or one is the beginning",
    {"prompt": "2+2?", "chosen": " 4", "rejected": " 4."},
  ),
  (
    {"chosen": Q + GOOD, "rejected": Q},
    "the same, or one is the beginning",
    {"prompt": Q, "chosen": GOOD, "rejected": BAD},
  ),
  (
    {"chosen": Q + [user("a")], "rejected": Q + [user("b")]},
    "'chosen' begins with the message of",
    {"chosen": Q + GOOD, "rejected": Q + BAD},
  ),
  ({"prompt": Q + GOOD}, "'prompt' ends with the assistant's message", {"prompt": Q}),
  ({"messages": "hi"}, "'messages' is text", {"messages": LEFT_OUT, "text": "hi"}),
  ({"messages": Q}, "'messages' has no answer of the assistant", {"messages": Q + GOOD}),
  ({"text": Q}, "'text' is a list", {"text": LEFT_OUT, "messages": Q + GOOD}),
]


@pytest.mark.parametrize("row, said, changes", BROKEN)
def test_broken_rows_and_their_cures(tmp_path, row, said, changes):
  row = row | {"extra": 1}
  with pytest.raises(DataError, match=f"rows.jsonl:1: {'.*'}{said}"):
    read_dataset(jsonl(tmp_path / "rows.jsonl", [row]))
  mended = {name: value for name, value in (row | changes).items() if value is not LEFT_OUT}
  assert len(read_dataset(jsonl(tmp_path / "rows.jsonl", [mended])).examples) == 1


@pytest.mark.parametrize(
  "prompt, chosen, rejected",
  [
    ("2+2=", "4", "5"),
    ("2+2?", " 41", " 42"),
    ("2+2?\n", "  it", "  is"),
    ("Is it so?", " Is", " Isn't"),
    ("2+2?", " 4", " 42"),
  ],
)
def test_where_an_implicit_prompt_ends(tmp_path, prompt, chosen, rejected):
  row = {"chosen": prompt + chosen, "rejected": prompt + rejected}
  path = jsonl(tmp_path / "rows.jsonl", [row])
  [found] = read_dataset(path).examples
  assert found.chosen + found.rejected == chosen + rejected and found.prompt == prompt


def test_tool_calls_stand_for_content(tmp_path):
  call = {"role": "assistant", "tool_calls": [{"name": "add"}]}
  row = {"prompt": Q, "completion": [call, {"role": "tool", "content": "4"}, assistant("4")]}
  for write in (jsonl, parquet):
    # Parquet gives every message every key: those that are null come back as absent.
    found = read_dataset(write(tmp_path / "rows", [row]))
    assert found.examples[0].completion == row["completion"]


def test_what_is_accepted_beside_text(tmp_path):
  """Empty where it means something, weights where turns are trained on, tools in either form."""
  rows = [
    {"messages": [{"role": "system", "content": ""}, *Q, *GOOD]},
    {"messages": [*Q, GOOD[0] | {"weight": 0}, *Q, GOOD[0] | {"loss_mask": 1}]},
    {"messages": [Q[0] | {"weight": 0}, GOOD[0] | {"train": True, "weight": None}]},
    {
      "messages": [
        *Q,
        CALL | {"tool_calls": [{"name": "add", "arguments": '{"a": 2}'}]},
        {"role": "tool", "content": ""},
        *GOOD,
      ],
      "tools": '[{"name": "add"}]',
    },
    {"messages": [*Q, assistant("") | {"reasoning_content": "Two and two."}], "tools": []},
  ]
  found = read_dataset(jsonl(tmp_path / "rows.jsonl", rows))
  assert [example.completion for example in found.examples] == [row["messages"] for row in rows]


def test_labels_may_be_numbers(tmp_path):
  rows = [{"prompt": f"q{n}", "completion": "yo", "label": n % 2} for n in range(3)]
  found = read_dataset(jsonl(tmp_path / "kto.jsonl", rows))
  assert [(type(e), e.label) for e in found.examples] == [
    (Unpaired, False),
    (Unpaired, True),
    (Unpaired, False),
  ]


def test_a_prompt_next_to_answers_that_begin_with_it(tmp_path):
  """As UltraFeedback's rows are: the format that the error names takes the prompt from both."""
  row = {"prompt": "2+2?", "chosen": Q + GOOD, "rejected": Q + BAD, "score_chosen": 8.5}
  path = jsonl(tmp_path / "rows.jsonl", [row])
  with pytest.raises(DataError, match="neither all text .*--data_format=implicit_preference"):
    read_dataset(path)
  [found] = read_dataset(path, format="implicit_preference").examples
  assert found == Preference(Q, GOOD, BAD, {"prompt": "2+2?", "score_chosen": 8.5})


PROMPT = "\n\nHuman: Hi.\n\nAssistant: Yes?\n\nHuman: 2+2?\n\nAssistant:"
TALK = [user("Hi."), assistant("Yes?"), user("2+2?")]


@pytest.mark.parametrize(
  "row, example",
  [
    ({"chosen": PROMPT + " 4", "rejected": PROMPT + " 5"}, Preference(TALK, GOOD, BAD, {})),
    ({"prompt": PROMPT, "chosen": " 4", "rejected": " 5"}, Preference(TALK, GOOD, BAD, {})),
    ({"prompt": PROMPT + " ", "completion": "4\n"}, Demonstration(TALK, GOOD, {})),
    ({"prompt": PROMPT}, Prompt(TALK, {})),
    (
      {"prompt": PROMPT.removesuffix("\n\nAssistant:"), "completion": "\n\nAssistant: 4"},
      Demonstration(TALK, GOOD, {}),
    ),
    ({"text": PROMPT + " 4"}, Demonstration([], TALK + GOOD, {})),
  ],
)
def test_transcripts_become_messages(tmp_path, row, example):
  assert read_dataset(jsonl(tmp_path / "rows.jsonl", [row])).examples == (example,)


def test_transcripts_keep_what_only_looks_like_a_turn():
  text = "\n\nHuman: Who said Human: or\nAssistant: first?\n\nAssistant: a\n\nb"
  question, answer = "Who said Human: or\nAssistant: first?", "a\n\nb"
  assert transcript_messages(text) == [user(question), assistant(answer)]
  with pytest.raises(DataError, match="does not begin with a turn"):
    transcript_messages("Hello.\n\nHuman: Hi.")


# The ten ways of breaking a row, and how its drop is counted. Two are not broken: a line may end in
# CRLF, and a byte order mark may begin the file.
PAIR = b'{"prompt": "1+1?", "chosen": "2", "rejected": "3"}'
TEN_WAYS = {
  "bad JSON": (b'{"prompt": "1+1?", "chosen": }', "not JSON"),
  "missing key": (b'{"prompt": "1+1?", "chosen": "2"}', "no key 'rejected'"),
  "null": (PAIR.replace(b'"2"', b"null"), "'chosen' is null"),
  "wrong type": (PAIR.replace(b'"3"', b"3"), "'rejected' is of type int"),
  "lone surrogate": (PAIR.replace(b"1+1", b"\\ud800"), "text contains half a character"),
  "NUL": (PAIR.replace(b"1+1", b"a\\u0000b"), "text contains a NUL character"),
  "10 MB row": (PAIR.replace(b"1+1", b"x" * (10 << 20)), "longer than N bytes"),
  "duplicate keys": (PAIR[:-1] + b', "chosen": "4"}', "the key 'chosen' appears twice"),
  "BOM inside": (b"\xef\xbb\xbf" + PAIR, "not JSON"),
  "CRLF inside": (PAIR.replace(b"1+1", b"1\r1"), "not JSON"),
}


@pytest.fixture(scope="module")
def one_percent(tmp_path_factory):
  path = tmp_path_factory.mktemp("broken") / "rows.jsonl"
  ways = list(TEN_WAYS)
  with open(path, "wb") as file:
    file.write(b"\xef\xbb\xbf")
    for number in range(1, 10_001):
      broken = number % 100 == 37
      row = TEN_WAYS[ways[number // 100 % 10]][0] if broken else PAIR
      file.write(row + (b"\r\n" if number % 3 == 0 else b"\n"))
  yield str(path)
  path.unlink()


def test_one_percent_broken_strict_stops_at_the_first(one_percent):
  with pytest.raises(DataError, match=r"rows.jsonl:37: not JSON: .*at column 30") as error:
    read_dataset(one_percent)
  assert len(str(error.value)) < 500


def test_one_percent_broken_lenient_counts_exactly(one_percent):
  found = read_dataset(one_percent, strict=False)
  assert found.format == "preference"
  assert found.examples == (Preference("1+1?", "2", "3", {}),) * 9_900
  assert found.lines == tuple(n for n in range(1, 10_001) if n % 100 != 37)
  assert [e.removeprefix(one_percent + ":").split(":")[0] for e in found.errors] == [
    str(n) for n in range(37, 10_001, 100)
  ]
  expected = {reason: 10 for _, reason in TEN_WAYS.values()} | {"not JSON": 30}
  assert count_reasons(found.errors) == expected


@pytest.mark.parametrize("way", TEN_WAYS)
def test_each_way_of_breaking_a_row_stops_a_strict_reading(tmp_path, way):
  path = tmp_path / "rows.jsonl"
  path.write_bytes(b"\n".join([PAIR, PAIR, TEN_WAYS[way][0], PAIR]))
  with pytest.raises(DataError, match=f"rows.jsonl:3: {TEN_WAYS[way][1].replace('N b', '.* b')}"):
    read_dataset(str(path))


def test_no_row_is_usable(tmp_path):
  path = jsonl(tmp_path / "rows.jsonl", [{"prompt": ""}, {"prompt": 3}])
  with pytest.raises(DataError, match=r"no usable row \(2 broken; the first: .*:1: 'prompt' is"):
    read_dataset(path, strict=False)
  with pytest.raises(DataError, match="absent.jsonl: no such file"):
    read_dataset(str(tmp_path / "absent.jsonl"))
