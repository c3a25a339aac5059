"""Episodes on the terminal and in the report: who said what, and what is trained on."""

import io
import json

import numpy as np
import pytest

from rl_llm.__main__ import main
from rl_llm.errors import UserError
from rl_llm.runs.console import Console
from rl_llm.runs.metrics import MetricsWriter
from rl_llm.runs.report_figures import curves
from rl_llm.runs.report_samples import samples_section
from rl_llm.runs.transcripts import find, parts, show

TURNS = [
  {"text": "call inc: <b>1", "tokens": 5, "observation": "error: \x1b[2Jno", "read": 9,
   "status": "tool_error", "calls": 1, "reward": 0.5},
  {"text": "call inc: 1", "tokens": 1, "observation": "2", "read": 0, "status": "ok", "calls": 1,
   "reward": None},
  {"text": "It", "tokens": 2},
]  # fmt: skip


def episode(step=3, **changes):
  return {
    "step": step, "split": "train", "problem": "p", "prompt": "1+1?", "response": "It",
    "reward": 1.0, "status": "ok", "advantage": -0.5, "correct": True, "length": 17,
    "stop_reason": "length", "turns": TURNS,
  } | changes  # fmt: skip


def test_both_sides_in_order_with_what_is_trained_on():
  found = [(part.who, part.note, part.trained) for part in parts(episode())]
  assert found == [
    ("prompt", "", False),
    ("model", "5 tokens", True),
    ("environment", "9 tokens, tool error, reward 0.5", False),
    ("model", "1 token", True),
    ("environment", "the episode ends here, unread", False),
    ("model", "2 tokens, cut off", True),
  ]
  assert not any(part.trained for part in parts(episode(split="eval")))


def test_an_episode_on_the_terminal_is_coloured_and_cannot_act():
  text = show(episode())
  assert "\\x1b[2Jno" in text.plain and "\x1b" not in text.plain
  assert text.plain.endswith("reward 1, advantage -0.5\n")
  colours = {str(span.style): text.plain[span.start : span.end] for span in text.spans}
  assert colours["green"] == "It\n\n" and colours["cyan"] == "2\n\n"


def test_the_table_of_samples_has_the_turns():
  stream = io.StringIO()
  with Console(stream, total_steps=3) as console:
    console.samples(3, [episode(), episode(turns=None, response="one turn")])
  shown = stream.getvalue()
  for text in ("call inc: <b>1", "\\x1b[2Jno", "It", "one turn"):
    assert text in shown


def test_the_report_tells_the_sides_apart():
  page = samples_section([episode()])
  assert '<span class="model" title="model, 5 tokens">call inc: &lt;b&gt;1</span>' in page
  assert '<span class="environment" title="environment, 9 tokens, tool error, reward 0.5">' in page
  assert "\x1b" not in page and "which it only reads" in page
  assert "which it only reads" not in samples_section([episode(turns=None)])


@pytest.fixture
def run(tmp_path):
  rows = [episode(1), episode(2), episode(2, prompt="the second")]
  (tmp_path / "samples.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
  return tmp_path


def test_one_episode_is_found(run):
  assert find(run)["step"] == 2 and find(run, step=1)["step"] == 1
  assert find(run, count=2)["prompt"] == "the second"


def test_the_command_shows_it(run, capsys):
  assert main(["episode", str(run), "--count=2"]) == 0
  shown = capsys.readouterr().out
  assert shown.startswith("step 2\nprompt\nthe second\n") and "cut off" in shown


@pytest.mark.parametrize(
  ("arguments", "fix"),
  [
    (["--step=7"], "the nearest is --step=2"),
    (["--count=3"], "--count=3: must be 1 to 2, the episodes of step 2"),
  ],
)
def test_what_is_not_there_is_said(run, capsys, arguments, fix):
  assert main(["episode", str(run), *arguments]) == 2
  assert fix in capsys.readouterr().err


def test_a_run_without_episodes_says_how_to_get_one(tmp_path):
  with pytest.raises(UserError, match="no samples.jsonl"):
    find(tmp_path)
  (tmp_path / "samples.jsonl").write_text(json.dumps(episode(turns=None)) + "\n")
  with pytest.raises(UserError, match="--env=calculator"):
    find(tmp_path)


def test_turns_are_written_and_read(tmp_path):
  with MetricsWriter(tmp_path / "samples.jsonl") as writer:
    writer.write(3, {k: v for k, v in episode(reward=np.float32(0.5)).items() if k != "step"})
    with pytest.raises(TypeError, match="turns, tokens' is a list"):
      writer.write(3, {"turns": [{"tokens": [1]}]})
  found = find(tmp_path)
  assert found["turns"] == TURNS and found["reward"] == 0.5


def test_turns_and_calls_are_drawn_where_there_are_episodes():
  rows = [{"step": step, "episode/turns": 1 + step, "reward_mean": step} for step in range(4)]
  drawn = curves([row | {"episode/malformed": 3 - row["step"]} for row in rows])
  for name in ("Turns and calls", "turns</span>", "malformed calls</span>"):
    assert name in drawn
  assert "tool errors" not in drawn
  assert "Turns" not in curves([{"step": row["step"], "reward_mean": row["step"]} for row in rows])
