"""Writes docs/metrics.md from `rl_llm.runs.metric_keys`: `make docs`."""

from __future__ import annotations

import pathlib
import textwrap

from rl_llm.runs.metric_keys import KEYS, Key

PAGE = pathlib.Path(__file__).parent / "metrics.md"

HEAD = """# The keys of metrics.jsonl

Each line of `metrics.jsonl` is a step. `docs/make_metrics.py` writes this page; tests hold it
against the records of real runs, so a key that is not explained here fails them.

A mean is over all that it is about, not a mean of means: metrics travel as (sum, count) and are
divided once. A value is `null` where there was nothing to measure, and `"nan"`, `"inf"` or `"-inf"`
where it is not finite. A `<word>` stands for a name.

```pycon
>>> from rl_llm.runs.metric_keys import explained
>>> explained("frac_zero_std").unit, explained("time/rollout").name
('fraction', 'time/<phase>')
```
"""


def line(key: Key) -> str:
  """A key's item in a list."""
  unit = f" ({key.unit})" if key.unit else ""
  text = f"- `{key.name}`{unit}: {key.meaning}"
  return textwrap.fill(text, 100, subsequent_indent="  ", break_on_hyphens=False)


def made() -> str:
  """The whole page."""
  parts = [HEAD]
  for title, keys in KEYS.items():
    parts.append(f"## {title}\n\n" + "\n".join(map(line, keys)) + "\n")
  return "\n".join(parts)


if __name__ == "__main__":
  PAGE.write_text(made(), encoding="utf-8")
