"""From a file to sequences: which rows come through, which are named or counted."""

import functools
import json

import pytest

from rl_llm.data import DataError
from rl_llm.data.encoding import encode, encode_pair, limit_pairs, limit_sequences
from rl_llm.data.held_out import is_held_out, prompt_key
from rl_llm.data.loading import load_sequences, read_examples, unread_note
from rl_llm.text.tokenizers import ByteTokenizer

PLAIN = functools.partial(encode, tokenizer=ByteTokenizer(), prompt_format="plain")


def load(path, *, strict=True, encode=PLAIN, limit_all=limit_sequences, **changes):
  keywords = {"limit": 100, "overlong": "error", "held_out_fraction": 0.3} | changes
  dataset = read_examples(
    str(path), formats=("prompt_completion", "messages", "preference"), strict=strict
  )
  loaded = load_sequences(
    str(path), dataset, encode=encode, limit_all=limit_all, strict=strict, **keywords
  )
  return dataset, loaded


@pytest.fixture
def rows(tmp_path):
  path = tmp_path / "rows.jsonl"
  lines = [{"prompt": f"{n}?", "completion": "a" * n} for n in range(1, 31)]
  path.write_text("".join(json.dumps(line) + "\n" for line in lines))
  return path


def test_sequences_stand_on_their_prompts_side_in_the_files_order(rows):
  dataset, loaded = load(rows)
  for side, held in ((loaded.training, False), (loaded.held_out, True)):
    wanted = [e for e in dataset.examples if is_held_out(prompt_key(e), fraction=0.3) == held]
    assert side == [PLAIN(example) for example in wanted] and len(side) > 3
  assert loaded.counts == {"rows": 30, "broken": 0, "overlong": 0, "dropped": 0}
  assert load(rows, held_out_fraction=0.0)[1].held_out == []


def test_long_sequences_stop_with_their_line_or_are_counted(rows):
  with pytest.raises(DataError, match=r"rows\.jsonl:\d+: \d+ tokens, over --max_tokens=20; raise"):
    load(rows, limit=20)
  _, loaded = load(rows, limit=20, overlong="drop")  # "1?" to "9?" take n + 3, others n + 4.
  assert loaded.counts == {"rows": 30, "broken": 0, "overlong": 14, "dropped": 14}
  assert len(loaded.training) + len(loaded.held_out) == 16
  _, loaded = load(rows, limit=20, overlong="truncate_right")
  assert loaded.counts == {"rows": 30, "broken": 0, "overlong": 14, "dropped": 0}
  assert "14 over 20 tokens, 0 of them dropped" in loaded.note
  with pytest.raises(DataError, match=r"rows\.jsonl: nothing is left to .*30 over 3 tokens"):
    load(rows, limit=3, overlong="drop")


def test_rows_that_cannot_be_laid_out_stop_with_their_line_or_are_counted(tmp_path):
  text = [json.dumps({"prompt": f"{n}", "completion": "b"}) for n in range(20)]
  talk = [{"role": "user", "content": "2+2?"}]
  text[7] = json.dumps({"prompt": talk, "completion": [{"role": "assistant", "content": "4"}]})
  text[9] = "{"
  path = tmp_path / "mixed.jsonl"
  path.write_text("\n".join(text) + "\n")
  with pytest.raises(DataError, match=r"mixed\.jsonl:10: not JSON"):
    load(path)
  _, loaded = load(path, strict=False)
  assert loaded.counts["broken"] == 2 and "2 broken rows dropped" in loaded.note
  text[9] = text[8]
  path.write_text("\n".join(text) + "\n")
  with pytest.raises(DataError, match=r"mixed\.jsonl:8: prompt_format='plain' needs text"):
    load(path)


def test_pairs_are_limited_together(tmp_path):
  path = tmp_path / "pairs.jsonl"
  lines = [{"prompt": f"{n:02}", "chosen": "a", "rejected": "b" * n} for n in range(1, 21)]
  path.write_text("".join(json.dumps(line) + "\n" for line in lines))
  encode_both = functools.partial(encode_pair, tokenizer=ByteTokenizer(), prompt_format="plain")
  how = {"encode": encode_both, "limit_all": limit_pairs, "overlong": "drop", "limit": 13}
  _, loaded = load(path, **how)
  assert loaded.counts["dropped"] == 10  # 2 + n + 1 tokens, over 13 from 11 on
  assert len(loaded.training) + len(loaded.held_out) == 10


def test_formats_that_are_not_trained_here(tmp_path):
  path = tmp_path / "prompts.jsonl"
  path.write_text('{"prompt": "a"}\n')
  with pytest.raises(DataError, match=r"prompts\.jsonl: rows of the format prompt_only, .* pref"):
    load(path)


def test_columns_that_go_nowhere_are_named_but_those_that_somebody_reads(tmp_path):
  path = tmp_path / "pairs.jsonl"
  rows = [{"prompt": f"{n}", "chosen": "a", "rejected": "b", "margin": 1, "id": n} for n in "xyz"]
  path.write_text("".join(json.dumps(row | {"tools": None}) + "\n" for row in rows))
  dataset = read_examples(str(path), formats=["preference"])
  assert unread_note(dataset) == "; columns that nothing reads: id, margin"
  assert unread_note(dataset, read=["id", "margin"]) == ""


def test_a_format_that_is_said_is_obeyed(tmp_path):
  """What the refusal advises, followed: rows of another format whose columns fit."""
  path = tmp_path / "rows.jsonl"
  path.write_text('{"prompt": "q", "completion": "yo", "label": 0}\n')
  formats = ["prompt_completion", "messages"]
  with pytest.raises(DataError, match="take out the rows whose label is false, and --data_format="):
    read_examples(str(path), formats=formats)
  [found] = read_examples(str(path), formats=formats, format="prompt_completion").examples
  assert (found.completion, found.columns) == ("yo", {"label": 0})
