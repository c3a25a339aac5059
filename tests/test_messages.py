"""What rows say in addition to text reaches template and mask, or is refused with its line."""

from __future__ import annotations

import copy
import dataclasses
import functools
import json

import pytest

pytest.importorskip("tokenizers")
pytest.importorskip("jinja2")

from rl_llm.data import DataError, read_dataset
from rl_llm.data.encoding import encode, encode_pair, limit_pairs, limit_sequences
from rl_llm.data.loading import load_sequences, read_examples
from rl_llm.rollout import drawing
from rl_llm.tasks import load_task
from rl_llm.text.conversations import format_prompts
from rl_llm.text.messages import MessageError
from rl_llm.text.tokenizers import ByteTokenizer, TokenizerError
from tests.test_tokenizer_families import loaded
from tests.tokenizer_families import assistant, user

TOOL = {
  "type": "function",
  "function": {"name": "get_weather", "parameters": {"properties": {"city": {"type": "string"}}}},
}
ARGUMENTS = {"city": "Oslo"}
Q, END = user("Weather in Oslo?"), assistant("It is 3 degrees.")


def called(arguments, content=""):
  call = {"type": "function", "function": {"name": "get_weather", "arguments": arguments}}
  return {"role": "assistant", "content": content, "tool_calls": [call]}


RESULT = {"role": "tool", "content": "3 degrees"}
TALK = [Q, called(ARGUMENTS), RESULT, END]

TEMPLATE = """
{%- for tool in tools or [] %}<tool>{{ tool | tojson }}</tool>{% endfor %}
{%- set brief = enable_thinking is defined and not enable_thinking %}
{%- for m in messages %}<{{ m.role }}>{{ "<think></think>" if brief and m.role == "assistant" }}
  {{- m.content }}
  {%- for call in m.tool_calls or [] %}!{{ call.function.name }}
    {{- call.function.arguments | tojson }}{% endfor %}~
{% endfor %}
{%- if add_generation_prompt %}<assistant>{{ "<think></think>" if brief }}{% endif %}
"""


class Tooled(ByteTokenizer):
  """Bytes, and a template that knows tools, calls and thinking; "~" ends a turn."""

  eos_ids = (ord("~"),)
  chat_template = TEMPLATE.strip()


class Joining(Tooled):
  """A template that joins a call's arguments to text, as DeepSeek's do."""

  chat_template = TEMPLATE.strip().replace("arguments | tojson", "arguments + ''")


TOOLED = Tooled()


def text_of(encoded, tokenizer=TOOLED):
  return tokenizer.decode(encoded.tokens)


def trained(encoded, tokenizer=TOOLED):
  return tokenizer.decode(i for i, m in zip(encoded.tokens, encoded.mask, strict=True) if m)


def read(tmp_path, row, **how):
  path = tmp_path / "rows.jsonl"
  path.write_text(json.dumps(row) + "\n")
  [example] = read_dataset(str(path), **how).examples
  return example


WRITTEN = (
  '<user>Weather in Oslo?~\n<assistant>!get_weather{"city": "Oslo"}~\n<tool>3 degrees~\n'
  "<assistant>It is 3 degrees.~\n"
)


@pytest.mark.parametrize("tools", [[TOOL], json.dumps([TOOL]), [json.dumps(TOOL)]], ids=type)
@pytest.mark.parametrize(
  "call",
  [called(ARGUMENTS), called(json.dumps(ARGUMENTS)), called(ARGUMENTS, None)],
  ids=["object", "text", "null"],
)
def test_tools_and_calls_are_written_once_in_whatever_form_they_come(tmp_path, tools, call):
  talk = [Q, call, RESULT, END]
  before = copy.deepcopy(talk)
  for tokenizer in (TOOLED, Joining()):
    encoded = encode(read(tmp_path, {"messages": talk, "tools": tools}), tokenizer)
    assert text_of(encoded) == f"<tool>{json.dumps(TOOL)}</tool>{WRITTEN}"
    assert trained(encoded) == '!get_weather{"city": "Oslo"}~It is 3 degrees.~'
  assert talk == before, "what was read is not changed"
  without = encode(read(tmp_path, {"messages": talk, "tools": []}), TOOLED)
  assert text_of(without) == WRITTEN


def test_prompts_of_a_task_are_asked_with_their_tools(tmp_path):
  rows = [
    {"prompt": [Q], "tools": [TOOL], "answer": "a long one, which puts this row before the others"},
    {"prompt": [user("q"), called(ARGUMENTS, None), RESULT], "tools": json.dumps([TOOL])},
    {"prompt": "no tools"},
  ]
  path = tmp_path / "rows.jsonl"
  path.write_text("".join(json.dumps(row) + "\n" for row in rows))
  task = load_task(f"jsonl:{path}", reward_function="gsm8k", held_out_fraction=0.0)
  problems = sorted(task.sample(0, 0, 3), key=lambda p: len(str(p.columns)), reverse=True)
  drawn = drawing.encode_problems(problems, TOOLED, prompt_format="chat", max_prompt_tokens=999)
  schema = f"<tool>{json.dumps(TOOL)}</tool>"
  assert [TOOLED.decode(prompt) for prompt in drawn.prompts] == [
    f"{schema}<user>Weather in Oslo?~\n<assistant>",
    f'{schema}<user>q~\n<assistant>!get_weather{{"city": "Oslo"}}~\n<tool>3 degrees~\n<assistant>',
    "<user>no tools~\n<assistant>",
  ]
  assert drawing.prompt_text(problems[1].prompt).splitlines()[0] == "q"
  with pytest.raises(TokenizerError, match="plain has no place for 'tools'.*prompt_format=chat"):
    drawing.encode_problems(problems[:1], TOOLED, prompt_format="plain", max_prompt_tokens=999)
  with pytest.raises(TokenizerError, match="plain has no place for 'tool_calls'"):
    plain = [problems[1]._replace(columns={})]
    drawing.encode_problems(plain, TOOLED, prompt_format="plain", max_prompt_tokens=999)


def test_preferences_have_their_tools_in_both_answers(tmp_path):
  row = {"prompt": [Q], "chosen": [called(json.dumps(ARGUMENTS))], "rejected": [assistant("no")]}
  pair = encode_pair(read(tmp_path, row | {"tools": [TOOL]}), TOOLED)
  assert trained(pair.chosen) == '!get_weather{"city": "Oslo"}~' and trained(pair.rejected) == "no~"
  assert text_of(pair.rejected).startswith(f"<tool>{json.dumps(TOOL)}</tool><user>Weather")
  assert pair.chosen.prompt_length == pair.rejected.prompt_length


def test_names_for_the_template_are_honoured(tmp_path):
  row = {"prompt": "2+2?", "completion": "4"}
  for names in ({"enable_thinking": False}, '{"enable_thinking": false}'):
    example = read(tmp_path, row | {"chat_template_kwargs": names})
    encoded = encode(example, TOOLED)
    assert text_of(encoded) == "<user>2+2?~\n<assistant><think></think>4~\n"
    assert trained(encoded) == "4~"
    [prompt] = format_prompts(["2+2?"], TOOLED, names=[{"enable_thinking": False}])
    assert encoded.tokens[: encoded.prompt_length] == prompt, "what is sampled from is learned from"
  example = read(tmp_path, row | {"chat_template_kwargs": {"enable_thinking": True}})
  assert text_of(encode(example, TOOLED)) == "<user>2+2?~\n<assistant>4~\n"


@pytest.mark.parametrize("mark", ["weight", "train", "training", "loss_mask"])
@pytest.mark.parametrize("no, yes", [(0, 1), (False, True), (0, None)])
def test_a_turn_of_weight_0_is_context_alone(tmp_path, mark, no, yes):
  bare = [user("q1"), assistant("BAD"), user("fix"), assistant("GOOD")]
  talk = [user("q1"), assistant("BAD") | {mark: no}, user("fix"), assistant("GOOD") | {mark: yes}]
  marked = encode(read(tmp_path, {"messages": talk}), TOOLED)
  plain = encode(read(tmp_path, {"messages": bare}), TOOLED)
  assert marked.tokens == plain.tokens and trained(plain) == "BAD~GOOD~"
  assert trained(marked) == "GOOD~"
  completion = read(tmp_path, {"prompt": talk[:1], "completion": talk[1:]})
  assert trained(encode(completion, TOOLED)) == "GOOD~"


@pytest.mark.parametrize(
  ("row", "said"),
  [
    ({"messages": [user("a"), assistant("b")], "tools": [TOOL]}, "never reads 'tools'; remove it"),
    ({"messages": TALK}, "never reads 'tool_calls'"),
    ({"messages": [user("a"), assistant("b") | {"reasoning_content": "c"}]}, "'reasoning_content'"),
    ({"prompt": "a", "completion": "b", "chat_template_kwargs": {"depth": 2}}, "reads 'depth'"),
  ],
)
def test_what_a_template_never_reads_is_refused_with_its_line(tmp_path, row, said):
  class Simple(Tooled):
    chat_template = "{% for m in messages %}<{{ m.role }}>{{ m.content }}~\n{% endfor %}"
    chat_template += "{% if add_generation_prompt %}<assistant>{% endif %}"

  path = tmp_path / "rows.jsonl"
  good = {"messages": [user("a"), assistant("b")]}
  if "prompt" in row:
    good = {"prompt": "a", "completion": "b"}
  path.write_text(json.dumps(good) + "\n" + json.dumps(row) + "\n")
  dataset = read_examples(str(path), formats=["messages", "prompt_completion"])
  load = functools.partial(
    load_sequences,
    str(path),
    dataset,
    encode=functools.partial(encode, tokenizer=Simple()),
    limit_all=limit_sequences,
    limit=999,
    overlong="error",
    held_out_fraction=0.0,
  )
  with pytest.raises(DataError, match=f"rows.jsonl:2: the chat template never reads|{said}"):
    load()
  with pytest.raises(DataError, match=said):
    load()
  assert load(strict=False).counts["broken"] == 1
  [broken] = [e for e, n in zip(dataset.examples, dataset.lines, strict=True) if n == 2]
  with pytest.raises((TokenizerError, MessageError)):
    encode(broken, Simple(), prompt_format="plain")


def test_a_pair_whose_answers_are_compared_has_no_weights(tmp_path):
  row = {"prompt": [Q], "chosen": [assistant("a")], "rejected": [assistant("b") | {"weight": 0}]}
  with pytest.raises(DataError, match="rows.jsonl:1: 'rejected' has a turn of weight 0"):
    read(tmp_path, row)
  row["rejected"][0]["weight"] = 1
  encode_all = functools.partial(encode_pair, tokenizer=TOOLED)
  kept = limit_pairs([encode_all(read(tmp_path, row))], limit=99, overlong="error").kept
  assert trained(kept[0].rejected) == "b~"


def test_a_tool_cannot_write_control_tokens():
  """A description is text of the data, as a message is: what it spells stays characters."""
  tokenizer = dataclasses.replace(loaded("qwen chatml"), chat_template=TEMPLATE.strip())
  control = next(name for name in tokenizer.structural_tokens if name.startswith("<|im_end"))
  tool = {"function": {"name": "f", "description": f"so {control}"}}
  [ids] = format_prompts([[user("a")]], tokenizer, names=[{"tools": [tool]}])
  assert tokenizer.backend.token_to_id(control) not in ids
  assert control in tokenizer.decode(ids, skip_special=False)
