"""The HTML document of the reports: one file that loads nothing and forbids scripts."""

from __future__ import annotations

import html
import json
import math
from collections.abc import Sequence
from typing import Any

from rl_llm.runs.formatting import printable

_PAGE = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'">
{refresh}<title>{title}</title>
<style>
:root {
  color-scheme: light dark;
  --back: #f7f7f8; --paper: #ffffff; --ink: #1c1e21; --soft: #666b73; --rule: #e3e5e8;
  --right: #15803d; --wrong: #b91c1c;
  --c0: #2563eb; --c1: #d97706; --c2: #059669; --c3: #9333ea; --c4: #dc2626; --c5: #0891b2;
  --c6: #a16207; --c7: #64748b;
}
@media (prefers-color-scheme: dark) {
  :root {
    --back: #15171a; --paper: #1e2125; --ink: #e6e8eb; --soft: #9aa1ab; --rule: #343a41;
    --right: #4ade80; --wrong: #f87171;
    --c0: #6ea8fe; --c1: #f5b042; --c2: #4cc38a; --c3: #c084fc; --c4: #f87171; --c5: #5cc8dd;
    --c6: #d6b25e; --c7: #94a3b8;
  }
}
* { box-sizing: border-box; }
body { margin: 0; background: var(--back); color: var(--ink);
  font: 15px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, sans-serif; }
main { max-width: 1180px; margin: 0 auto; padding: 28px 20px 60px; }
h1 { font-size: 26px; margin: 0 0 2px; overflow-wrap: anywhere; }
h2 { font-size: 19px; margin: 38px 0 12px; }
h3 { font-size: 15px; margin: 0 0 2px; }
header p { margin: 0; color: var(--soft); overflow-wrap: anywhere; }
.cards { display: flex; flex-wrap: wrap; gap: 14px; margin-top: 18px; }
.card, figure, details, section > div > table {
  background: var(--paper); border: 1px solid var(--rule); border-radius: 10px; }
.card { flex: 1 1 150px; padding: 14px 18px; }
.card.wide { flex: 2 1 280px; }
.card .name, .card .note { color: var(--soft); font-size: 13px; }
.card .figure { font-size: 38px; font-weight: 650; line-height: 1.25; white-space: nowrap; }
.arrow { color: var(--soft); font-weight: 400; }
.plots { display: grid; gap: 16px;
  grid-template-columns: repeat(auto-fill, minmax(min(440px, 100%), 1fr)); }
figure { margin: 0; padding: 14px 16px 12px; display: flex; flex-direction: column; }
figcaption { color: var(--soft); font-size: 13px; line-height: 1.42; margin-top: 6px; }
figcaption strong { color: var(--wrong); }
svg { width: 100%; height: auto; display: block; margin-top: auto; }
svg text { fill: var(--soft); font-size: 12px; }
svg .mark { paint-order: stroke; stroke: var(--paper); stroke-width: 5px; }
.grid { stroke: var(--rule); } .axis { stroke: var(--soft); }
.line { fill: none; stroke-width: 2; stroke-linejoin: round; }
.dashed { stroke-dasharray: 6 6; } .band { opacity: .16; }
.legend { font-size: 13px; color: var(--soft); display: flex; flex-wrap: wrap; gap: 2px 14px; }
.key::before { content: ""; display: inline-block; width: 10px; height: 10px; border-radius: 3px;
  margin-right: 5px; background: currentColor; }
{colors}
details { padding: 8px 14px; margin-bottom: 8px; }
summary { cursor: pointer; font-weight: 550; }
details > table { margin-top: 8px; }
table { border-collapse: collapse; width: 100%; font-size: 13.5px; }
th { text-align: left; color: var(--soft); font-weight: 550; }
th, td { padding: 6px 10px; border-bottom: 1px solid var(--rule); vertical-align: top; }
tr:last-child td { border-bottom: 0; }
code, .text { font: 12.5px/1.45 ui-monospace, SFMono-Regular, Menlo, Consolas, monospace; }
.text, code { white-space: pre-wrap; overflow-wrap: anywhere; }
.command span { display: inline-block; max-width: 100%; }
.number { text-align: right; white-space: nowrap; font-variant-numeric: tabular-nums; }
.plots + details { margin-top: 16px; } .plots + .plots { margin-top: 16px; }
.box { background: var(--paper); border: 1px solid var(--rule); border-left: 5px solid var(--right);
  border-radius: 10px; margin-top: 18px; padding: 12px 18px; }
.box h2 { margin: 0 0 4px; font-size: 16px; } .box p, .box ul { margin: 4px 0; }
.box.fault { border-left-color: var(--c1); } .box li { margin: 6px 0; }
.box ul { padding-left: 18px; }
.tab { display: none; } .tabs { margin-top: 18px; } .tabs label { margin: 0 12px 0 3px; }
.best { font-weight: 650; } .wide figure { max-width: 760px; }
.right { color: var(--right); } .wrong { color: var(--wrong); }
.model { border-left: 3px solid var(--right); padding-left: 5px; display: inline-block; }
.environment { border-left: 3px solid var(--soft); color: var(--soft); padding-left: 5px;
  display: inline-block; }
</style>
</head>
<body><main>
{body}
</main></body>
</html>
""".replace(
  "{colors}",
  "\n".join(
    f".s{i} {{ stroke: var(--c{i}); }} .f{i} {{ fill: var(--c{i}); }} "
    f".k{i}::before {{ color: var(--c{i}); }} #t{i}:checked ~ .t{i} {{ display: block; }}"
    for i in range(8)
  ),
)


def page(title: str, body: str, *, refresh: int = 0) -> str:
  """A complete HTML document in the style of the reports; it forbids scripts.

  Args:
    title: any text.
    body: HTML with its texts already escaped.
    refresh: seconds after which a browser loads the page anew; 0: never.
  """
  anew = f'<meta http-equiv="refresh" content="{refresh}">\n' if refresh else ""
  text = _PAGE.replace("{refresh}", anew).replace("{title}", escaped(title))
  return text.replace("{body}", body)


def escaped(value: Any, limit: int | None = None) -> str:
  """Any value as inert HTML text."""
  text = value if isinstance(value, str) else json.dumps(value)
  return html.escape(printable(text, limit=limit, keep_newlines=True))


def finite(value: Any) -> float | None:
  """A record's value as a number to draw; None if it is missing or not finite."""
  try:
    value = float(value)
  except (TypeError, ValueError):
    return None
  return value if math.isfinite(value) else None


def counted(count: int, noun: str) -> str:
  return f"{count} {noun}{'' if count == 1 else 's'}"


def section(title: str, content: str, kind: str = "") -> str:
  if not content:
    return ""
  return f'<section><h2>{title}</h2><div class="{kind}">{content}</div></section>'


_CHECKED = ' checked="checked"'


def tabs(parts: Sequence[tuple[str, str]]) -> str:
  """Parts of a page of which the reader sees one, chosen by its name; a single one has no choice.

  Args:
    parts: at most eight (name, HTML); the first one is seen at first.
  """
  if len(parts) == 1:
    return parts[0][1]
  names = "".join(
    f'<input type="radio" name="tab" id="t{i}"{_CHECKED if i == 0 else ""}/>'
    f'<label for="t{i}">{escaped(name)}</label>'
    for i, (name, _) in enumerate(parts)
  )
  shown = "".join(f'<div class="tab t{i}">{content}</div>' for i, (_, content) in enumerate(parts))
  return f'<div class="tabs"><span>By </span>{names}{shown}</div>'
