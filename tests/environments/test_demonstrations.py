"""Episodes that a program plays: the form of calls, and that they solve their problems."""

import importlib.util
import json

import pytest

pytest.importorskip("jinja2")

from rl_llm.__main__ import main
from rl_llm.data import Demonstration
from rl_llm.data.encoding import encode
from rl_llm.tasks.environments import EnvironmentError, demonstrations, load, turn_text
from rl_llm.tasks.environments.calls import parse_calls
from rl_llm.tasks.environments.demonstrations import demonstrate, write_call
from rl_llm.tasks.environments.problems import default_task
from rl_llm.text.tokenizers import ByteTokenizer
from tests.test_tokenizer_families import loaded


@pytest.mark.parametrize("protocol", ["text", "hermes", "llama3"])
@pytest.mark.parametrize("name", ["calculator", "wordle", "guess"])
def test_what_is_written_is_what_is_parsed(protocol, name):
  tools = load(name).tools
  function = tools[0]["function"]
  [(key, schema)] = function["parameters"]["properties"].items()
  arguments = {key: 5 if schema["type"] == "integer" else 'a"b é'}
  text = write_call(function["name"], arguments, protocol)
  [call] = parse_calls(text, tools, protocol=protocol)
  assert (call.name, call.arguments, call.fault) == (function["name"], arguments, "")


@pytest.mark.parametrize(
  ("pair", "env"),
  [("qwen chatml", "calculator"), ("qwen3 thinking", "calculator"), ("zephyr", "python")],
)
def test_each_answers_its_problem_with_a_call(pair, env):
  tokenizer = loaded(pair)
  rows = demonstrate(env, tokenizer, count=6, seed=1)
  problems = default_task(load(env)).sample(1, 0, 6)
  for row, problem in zip(rows, problems, strict=True):
    roles = [message["role"] for message in row["messages"]]
    assert roles == ["user", "assistant", "tool", "assistant"]
    assert row["messages"][-1]["content"] == problem.columns["answer"]
    assert row["messages"][0]["content"].endswith(problem.prompt[0]["content"])


def test_a_demonstration_has_the_ids_that_sampling_will_have():
  """Prompt, turn, observation, turn: as SFT encodes them whole, and as an episode puts them."""
  tokenizer = loaded("qwen chatml")
  [row] = demonstrate("calculator", tokenizer, count=1)
  whole = encode(Demonstration([], row["messages"], {}), tokenizer)
  user, call, said, answer = (message["content"] for message in row["messages"])
  end = tokenizer.encode("<|im_end|>")
  prompt = tokenizer.encode(f"<|im_start|>user\n{user}<|im_end|>\n<|im_start|>assistant\n")
  pieces = [*prompt, *tokenizer.encode(call), *end]
  pieces += turn_text.observation_ids(tokenizer, [said])
  pieces += [*tokenizer.encode(answer), *end]
  assert whole.tokens[: len(pieces)] == pieces
  trained = [i for i, mask in zip(whole.tokens, whole.mask, strict=True) if mask]
  assert trained == [*tokenizer.encode(call), *end, *tokenizer.encode(answer), *end]


@pytest.mark.parametrize("env", ["guess", "wordle"])
def test_games_are_won(env):
  rows = demonstrate(env, loaded("qwen chatml"), count=12)
  won = [len(row["messages"]) for row in rows]
  assert max(won) <= 2 * 7 and min(won) >= 2


@pytest.mark.skipif(importlib.util.find_spec("bm25s") is None, reason="pip install bm25s")
def test_questions_need_two_searches():
  rows = demonstrate("search:demo", loaded("qwen chatml"), count=20)
  answers = [p.columns["answer"] for p in default_task(load("search:demo")).sample(0, 0, 20)]
  assert [row["messages"][-1]["content"] for row in rows] == answers
  assert all(len(row["messages"]) == 6 for row in rows)


@pytest.mark.parametrize(
  ("env", "tokenizer", "fix"),
  [
    ("reasoning_gym:leg_counting", "qwen chatml", "must be one of calculator"),
    ("calculator", "byte", "use a model that has, such as --model=smollm2"),
  ],
)
def test_what_cannot_be_played_is_said(env, tokenizer, fix):
  tokenizer = ByteTokenizer() if tokenizer == "byte" else loaded(tokenizer)
  with pytest.raises(EnvironmentError, match=fix):
    demonstrate(env, tokenizer, count=1)


def test_the_command_writes_a_file(tmp_path, capsys, monkeypatch):
  monkeypatch.setattr(demonstrations, "load_tokenizer", lambda name: loaded("qwen chatml"))
  out = tmp_path / "d.jsonl"
  assert main(["demonstrations", "--env=calculator", "--rows=3", f"--out={out}"]) == 0
  assert capsys.readouterr().out == f"demonstrations: {out}, 3 episodes of calculator\n"
  assert len([json.loads(line)["messages"] for line in out.read_text().splitlines()]) == 3
  assert main(["demonstrations", "--env=nothing", f"--out={out}"]) == 2
  assert "must be one of" in capsys.readouterr().err
