"""Every kind of broken row, one at a time and among ten thousand."""

import gzip
import json

import pytest

from rl_llm.data import DataError, read_rows

GOOD = b'{"prompt": "1+1?", "answer": "2"}'


def needs_answer(row):
  if "answer" not in row:
    return "no key 'answer'; add it"
  return "" if isinstance(row["answer"], str) else "'answer' is not text; quote it"


BROKEN = {
  "bad JSON": (b'{"prompt": "1+1?", "answer": }', "not JSON: .* at column 30"),
  "cut short": (b'{"prompt": "1+1?", "ans', "not JSON"),
  "missing key": (b'{"prompt": "1+1?"}', "no key 'answer'"),
  "null": (b'{"prompt": "1+1?", "answer": null}', "'answer' is not text"),
  "wrong type": (b'{"prompt": "1+1?", "answer": 2}', "'answer' is not text"),
  "not an object": (b"[1, 2]", "a JSON list; every line must be an object"),
  "lone surrogate": (b'{"prompt": "\\ud800", "answer": "2"}', "lone surrogate"),
  "surrogate in a key": (b'{"answer": "2", "a": [{"\\udfff": 1}]}', "lone surrogate"),
  "escaped NUL": (b'{"prompt": "a\\u0000b", "answer": "2"}', "NUL"),
  "raw NUL": (b'{"prompt": "a\0b", "answer": "2"}', "NUL"),
  "not UTF-8": (b'{"prompt": "\xff", "answer": "2"}', "not UTF-8 at byte 13"),
  "duplicate key": (b'{"answer": "2", "answer": "3"}', "'answer' appears twice"),
  "inner duplicate": (b'{"answer": "2", "m": {"k": 1, "k": 2}}', "'k' appears twice"),
  "NaN": (b'{"prompt": "x", "answer": "2", "w": NaN}', "NaN is not JSON"),
  "huge number": (b'{"answer": "2", "n": [1e400]}', "1e400 is more than a float can hold; write"),
  "huge negative": (b'{"answer": "2", "n": -1.5E+999}', "-1.5E[+]999 is more than"),
  "huge integer": (b'{"answer": "2", "n": ' + b"9" * 5000 + b"}", "write it as text"),
  "deep": (b'{"answer": "2", "n": ' + b"[" * 100_000 + b"]" * 100_000 + b"}", "nested too deeply"),
  "huge row": (b'{"answer": "' + b"x" * (10 << 20) + b'"}', "longer than 4194304 bytes"),
}


@pytest.mark.parametrize("kind", BROKEN)
def test_broken_row_strict_and_lenient(tmp_path, kind):
  line, said = BROKEN[kind]
  path = tmp_path / "rows.jsonl"
  path.write_bytes(b"\n".join([GOOD, line, GOOD]) + b"\n")
  with pytest.raises(DataError, match=rf"rows.jsonl:2: .*{said}") as error:
    read_rows(str(path), check=needs_answer)
  assert "\n" not in str(error.value) and len(str(error.value)) < 500
  found = read_rows(str(path), check=needs_answer, strict=False)
  assert (len(found.rows), found.lines, len(found.errors)) == (2, (1, 3), 1)
  assert f"{path}:2: " in found.errors[0]


def test_one_percent_of_ten_thousand_is_counted_exactly(tmp_path):
  kinds = [kind for kind in BROKEN if kind not in ("huge row", "deep")]
  broken_at = {100 * n + 7: BROKEN[kinds[n % len(kinds)]][0] for n in range(100)}
  path = tmp_path / "rows.jsonl"
  path.write_bytes(b"".join(broken_at.get(n, GOOD) + b"\n" for n in range(1, 10_001)))
  found = read_rows(str(path), check=needs_answer, strict=False)
  assert len(found.rows) == 9_900
  assert [int(message.split(":")[1]) for message in found.errors] == sorted(broken_at)
  assert found.lines == tuple(n for n in range(1, 10_001) if n not in broken_at)


@pytest.mark.parametrize(
  "content",
  [
    GOOD + b"\n" + GOOD + b"\n",
    GOOD + b"\n" + GOOD,
    GOOD + b"\r\n" + GOOD + b"\r\n",
    b"\xef\xbb\xbf" + GOOD + b"\n" + GOOD,
    b"\xef\xbb\xbf" + GOOD + b"\r\n \r\n" + GOOD + b"\r\n\r\n",
    gzip.compress(GOOD + b"\n" + GOOD, mtime=0),
    gzip.compress(b"\xef\xbb\xbf" + GOOD + b"\r\n" + GOOD, mtime=0),
  ],
)
def test_the_same_rows_however_written(tmp_path, content):
  path = tmp_path / "rows.jsonl"
  path.write_bytes(content)
  assert read_rows(str(path)).rows == (json.loads(GOOD),) * 2


def test_blank_lines_count_as_lines(tmp_path):
  path = tmp_path / "rows.jsonl"
  path.write_bytes(b"\n\n" + GOOD + b"\n\n{}}\n")
  with pytest.raises(DataError, match=":5: not JSON"):
    read_rows(str(path))


def test_only_a_line_feed_ends_a_line(tmp_path):
  path = tmp_path / "rows.jsonl"
  text = "a\u2028b\u0085c"
  path.write_text(json.dumps({"prompt": text}, ensure_ascii=False) + "\n", encoding="utf-8")
  assert read_rows(str(path)).rows == ({"prompt": text},)


def test_a_pair_of_surrogates_is_one_character(tmp_path):
  path = tmp_path / "rows.jsonl"
  path.write_bytes(b'{"prompt": "\\ud83d\\ude00"}')
  assert read_rows(str(path)).rows == ({"prompt": "😀"},)


def test_longest_line_is_a_setting(tmp_path):
  path = tmp_path / "rows.jsonl"
  path.write_bytes(GOOD + b"\r\n")
  assert len(read_rows(str(path), max_row_bytes=len(GOOD)).rows) == 1
  with pytest.raises(DataError, match=f":1: longer than {len(GOOD) - 1} bytes"):
    read_rows(str(path), max_row_bytes=len(GOOD) - 1)


def test_files_that_cannot_be_used(tmp_path):
  with pytest.raises(DataError, match="absent.jsonl: no such file"):
    read_rows(str(tmp_path / "absent.jsonl"))
  with pytest.raises(DataError, match="a directory"):
    read_rows(str(tmp_path))
  path = tmp_path / "rows.jsonl"
  for content in (b"", b"\n \n"):
    path.write_bytes(content)
    with pytest.raises(DataError, match="no usable row; write"):
      read_rows(str(path))
  path.write_bytes(b"{\n")
  with pytest.raises(DataError, match=r"no usable row \(1 broken; the first: .*:1: not JSON"):
    read_rows(str(path), strict=False)
  for damaged in (gzip.compress(GOOD * 50)[:-9], gzip.compress(GOOD)[:8] + b"\xff" * 20):
    path.write_bytes(damaged)
    with pytest.raises(DataError, match="damaged gzip stream"):
      read_rows(str(path))
