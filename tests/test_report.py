"""The report of a run: everything on record is in it, and nothing in it acts."""

from __future__ import annotations

import dataclasses
import doctest
import html.parser
import json
import random
import re
import xml.etree.ElementTree as ElementTree

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rl_llm.files import locked
from rl_llm.runs import config as config_lib
from rl_llm.runs import report as report_lib
from rl_llm.runs import report_figures
from rl_llm.runs.config import option
from rl_llm.runs.metrics import MetricsWriter, proportion_interval
from rl_llm.runs.report_samples import before_after, pairs_section, surprising


@dataclasses.dataclass(frozen=True)
class Config:
  model: str = option("smollm2", "the model")
  task: str = option("arithmetic", "the task")
  seed: int = option(0, "seed")
  learning_rate: float = option(1e-5, "step size")
  steps: int = option(30, "steps")


def fake_run(folder, *, steps=30, every=5, extra=(), hostile="", problems=20, reference=True):
  """A run as an experiment writes it: a model that gets better at adding."""
  rng = random.Random(0)
  folder.mkdir(parents=True, exist_ok=True)
  config_lib.write_config(Config(seed=3, steps=steps, learning_rate=1e-4), folder)

  def answer(problem, skill):
    a, b = problem
    right = rng.random() < skill
    return (f"{a + b}" if right else f"The answer is {a * b + 1}, I think."), right

  held_out = [(a, b) for a in range(1, 10) for b in range(1, 10)][:problems]
  with (
    MetricsWriter(folder / "metrics.jsonl") as metrics,
    MetricsWriter(folder / "samples.jsonl") as samples,
  ):
    for step in range(steps + 1):
      skill = 0.2 + 0.7 * step / steps
      row = {"time/eval": 6.0} if step % every == 0 else {}
      rows = []
      if step % every == 0:
        for how, bonus, count in (("sampled", 0.0, 4), ("greedy", 0.08, 1)):
          counts = [sum(rng.random() < skill + bonus for _ in range(count)) for _ in range(100)]
          mean, low, high = proportion_interval(counts, count)
          row |= {f"eval/{how}_accuracy": mean, f"eval/{how}_low": low, f"eval/{how}_high": high}
        for a, b in held_out:
          text, right = answer((a, b), skill)
          rows.append(
            {"split": "eval", "problem": f"{a}+{b}", "prompt": f"What is {a} + {b}?"}
            | {"response": text + hostile, "reward": float(right), "status": "ok"}
            | {"advantage": None, "stop_reason": "eos", "length": 3, "correct": right}
          )
      if step:
        row |= {
          "reward_mean": min(1.0, max(0.0, skill + rng.gauss(0, 0.06))),
          "accuracy": min(1.0, max(0.0, skill + rng.gauss(0, 0.06))),
          "response_length_mean": 12 - 8 * step / steps + rng.gauss(0, 0.5),
          "truncated_fraction": max(0.0, 0.2 - 0.2 * step / steps),
          "entropy": 1.4 * (1 - 0.8 * step / steps) + rng.gauss(0, 0.03),
          "approx_kl": abs(rng.gauss(0, 1e-3)),
          "grad_norm": 1.5 + abs(rng.gauss(0, 0.5)),
          "loss": rng.gauss(0, 0.02),
          "logprob_gap_mean": 2e-6 + abs(rng.gauss(0, 5e-7)),
          "frac_zero_std": 0.3 * abs(2 * step / steps - 1) + 0.05,
          "ratio": 1.0,
          "clip_low_fraction": 0.01 * rng.random(),
          "clip_high_fraction": 0.02 * rng.random(),
          "rewards_ok": 64 - (step == 7),
          "rewards_not_applicable": 0,
          "rewards_raised": 0,
          "rewards_timed_out": int(step == 7),
          "learning_rate": 1e-5 * min(1.0, step / 5),
          "time/rollout": 9 + rng.random() + 8 * (step == 1),
          "time/reward": 0.4,
          "time/logprobs": 1.1,
          "time/update": 7 + rng.random() + 12 * (step == 1),
          "time/checkpoint": 1.5 * (step % 10 == 0),
          "speed/generated_tokens_per_second": 90 + rng.random(),
          "speed/rollout_flops_per_second": 12e9,
          "speed/trained_tokens_per_second": 110 + rng.random(),
          "speed/update_flops_per_second": 50e9,
          "speed/mfu": 0.5,
          "speed/peak_flops": 100e9,
          "speed/peak_measured": True,
          "speed/compile_seconds": 20.0 * (step == 1),
        }
        if reference:
          row["kl_ref"] = 0.02 * step / steps + abs(rng.gauss(0, 1e-3))
        for i in range(8):
          a, b = rng.randrange(1, 10), rng.randrange(1, 10)
          text, right = answer((a, b), skill)
          failed = step == 7 and i == 0
          rows.append(
            {"split": "train", "problem": f"{a}+{b}", "prompt": f"What is {a} + {b}?"}
            | {"response": text + hostile, "reward": None if failed else float(right)}
            | {"status": "timed out" if failed else "ok", "correct": right}
            | {
              "advantage": None if failed else rng.gauss(0, 1),
              "stop_reason": "length" if i == 1 else "eos",
            }
            | {"length": 16 if i == 1 else 3}
          )
      row["time/step"] = sum(value for key, value in row.items() if key.startswith("time/")) + 0.1
      metrics.write(step, row | dict(extra))
      samples.write(step, *rows)
  return folder


class Checker(html.parser.HTMLParser):
  """Tags that open and close, their attributes, and the text a reader sees."""

  def __init__(self, page):
    super().__init__()
    self.open, self.tags, self.attributes, self.text = [], [], [], ""
    self.feed(page)
    self.close()
    assert not self.open

  def handle_starttag(self, tag, attrs):
    self.tags.append(tag)
    self.attributes += attrs
    if tag not in ("meta", "br"):
      self.open.append(tag)

  def handle_startendtag(self, tag, attrs):
    self.tags.append(tag)
    self.attributes += attrs

  def handle_endtag(self, tag):
    assert self.open.pop() == tag

  def handle_data(self, data):
    if self.open and self.open[-1] != "style":
      self.text += data


def report_of(folder):
  return report_lib.write_report(folder).read_text(encoding="utf-8")


def figures(page):
  """title -> the figure's XML; fails where a drawing is not well-formed."""
  return {
    re.search("<h3>(.*?)</h3>", figure).group(1): ElementTree.fromstring(figure)
    for figure in re.findall("<figure>.*?</figure>", page, re.S)
  }


@pytest.fixture(scope="module")
def page(tmp_path_factory):
  return report_of(fake_run(tmp_path_factory.mktemp("runs") / "adding"))


def test_doctests():
  assert doctest.testmod(report_lib).failed == 0


def test_the_report_is_one_file_that_loads_and_runs_nothing(page):
  checker = Checker(page)
  assert not {"script", "link", "img", "iframe", "object", "base", "form"} & set(checker.tags)
  for name, value in checker.attributes:
    assert not name.startswith("on") and name not in ("src", "href", "style")
    assert "http" not in (value or "") or name == "http-equiv"
  assert "url(" not in page and "@import" not in page and "://" not in page


def test_every_curve_of_the_run_is_drawn_with_axes_unit_and_caption(page):
  drawn = figures(page)
  assert list(drawn) == [
    "Held-out accuracy",
    "Reward",
    "Response length",
    "Entropy",
    "KL to the reference",
    "KL of one step's updates",
    "Gradient norm",
    "Sampler-trainer log-prob gap",
    "Groups with no spread, responses cut short",
    "Clipped tokens",
    "Reward failures",
    "Loss",
    "Learning rate",
    "Tokens a second",
    "Time per phase",
    "MFU of the update",  # It never changes in this run, so it is folded.
  ]
  for title, figure in drawn.items():
    texts = [text.text for text in figure.iter("text")]
    assert "step" in texts and len(texts) > 6, title
    assert re.search("[a-z]{4}", texts[-1]), title  # the unit
    assert len(figure.find("figcaption").text) > 20
    shapes = list(figure.iter("polyline")) + list(figure.iter("rect"))
    assert shapes, title


def test_charts_without_change_are_folded_and_named(page):
  (fold,) = re.findall(r"<details><summary>\d+ charts? without change.*?</details>", page, re.S)
  assert "1 chart without change: MFU of the update</summary>" in fold
  assert [*figures(fold)] == ["MFU of the update"]


def test_two_curves_that_are_one_are_both_seen(tmp_path):
  with MetricsWriter(tmp_path / "metrics.jsonl") as writer:
    for step, value in enumerate([0.1, 0.4, 0.3, 0.9]):
      writer.write(step, {"reward_mean": value, "accuracy": value})
  lines = list(figures(report_of(tmp_path))["Reward"].iter("polyline"))
  assert [line.get("class") for line in lines] == ["line s0", "line dashed s1"]
  assert lines[0].get("points") == lines[1].get("points")


@pytest.mark.parametrize("steps", [23, 30, 101, 150])
def test_the_last_step_has_a_tick(steps, tmp_path):
  with MetricsWriter(tmp_path / "metrics.jsonl") as writer:
    for step in range(steps + 1):
      writer.write(step, {"entropy": step * 0.5})
  texts = [t for t in figures(report_of(tmp_path))["Entropy"].iter("text")]
  steps_named = [t for t in texts if t.get("text-anchor") == "middle" and t.text.isdigit()]
  marks = [(float(t.get("x")), int(t.text)) for t in steps_named]
  assert max(marks)[1] == steps
  xs = sorted(x for x, _ in marks)
  assert all(b - a > 25 for a, b in zip(xs, xs[1:], strict=False))  # No two labels touch.


def test_a_live_page_loads_itself_anew_and_a_finished_one_does_not(tmp_path):
  folder = fake_run(tmp_path / "adding", steps=10)
  live = report_lib.write_report(folder, live=True).read_text(encoding="utf-8")
  assert re.search('<meta http-equiv="refresh" content="[0-9]+">', live)
  assert "The run is in progress, at step 10 of 10" in live
  done = report_of(folder)
  assert "refresh" not in done and "in progress" not in done


def test_a_run_is_live_while_its_lock_is_held(tmp_path):
  assert not report_lib.is_live(tmp_path)
  with locked(tmp_path / ".lock") as free:
    assert free and report_lib.is_live(tmp_path)
  assert not report_lib.is_live(tmp_path)


def test_the_box_says_what_the_record_says(tmp_path):
  (tmp_path / "config.json").write_text(json.dumps({"task": "jsonl:<x>", "steps": 40}))
  with MetricsWriter(tmp_path / "metrics.jsonl") as writer:
    for step in range(40):
      writer.write(step, {"reward_mean": 0.0, "frac_zero_std": 1.0})
  page = report_of(tmp_path)
  (box,) = re.findall('<section class="box fault">.*?</section>', page, re.S)
  assert "the reward is 0 in all 40 steps" in box and "--task=jsonl:&lt;x&gt;" in box
  assert box.index("Check") > box.index("reward is 0")
  assert page.index(box) < page.index("<h2>Curves")


def test_what_changed_and_what_is_still_wrong():
  def row(step, problem, right):
    text = {"step": step, "split": "eval", "problem": problem, "prompt": problem}
    return text | {"response": f"{problem}{step}", "correct": right}

  ends = {"a": (False, True), "b": (False, False), "c": (True, False), "d": (True, True)}
  rows = [row(step, name, ends[name][step > 0]) for step in (0, 9) for name in ends]
  folds = re.findall("<details>(.*?)</details>", pairs_section(before_after(rows)), re.S)
  found = {
    re.match("<summary>(.*?):", fold).group(1): set(re.findall("([a-d])9", fold)) for fold in folds
  }
  assert found == {"Learned": {"a"}, "Still wrong": {"b"}, "Forgotten": {"c"}}
  assert all("1 of 4" in fold for fold in folds)


def test_the_largest_advantages_are_shown_once_a_problem_and_step():
  def row(step, problem, advantage, split="train"):
    return {"step": step, "split": split, "problem": problem, "advantage": advantage}

  rows = [
    row(1, "a", 2.0),
    row(1, "a", -3.0),
    row(1, "b", 0.5),
    row(2, "a", 1.0),
    row(2, "b", None),
    row(2, "c", "nan"),
    row(2, "d", 0.0),
    row(2, "e", 9.0, "eval"),
  ]
  found = [(r["step"], r["problem"], r["advantage"]) for r in surprising(rows, count=9)]
  assert found == [(1, "a", -3.0), (2, "a", 1.0), (1, "b", 0.5)]
  assert len(surprising(rows, count=2)) == 2
  # Where nearly all is right, wrong answers pull hardest; those that pull upwards are shown too.
  late = [row(step, "a", -5.0) for step in range(9)] + [row(step, "b", 0.3) for step in range(3)]
  assert [r["advantage"] for r in surprising(late, count=4)] == [-5.0, -5.0, 0.3, 0.3]
  assert [r["advantage"] for r in surprising(late, count=8)] == 5 * [-5.0] + 3 * [0.3]


def pixels(figure, tag="polyline"):
  return [
    [tuple(map(float, pair.split(","))) for pair in shape.get("points").split()]
    for shape in figure.iter(tag)
  ]


def test_labels_of_an_axis_leave_its_name_its_place(tmp_path):
  """Six digits end where the rotated name of the axis begins."""
  with MetricsWriter(tmp_path / "metrics.jsonl") as writer:
    for step in range(3):
      writer.write(step, {"speed/generated_tokens_per_second": 60_000.0 * step})
  figure = figures(report_of(tmp_path))["Tokens a second"]
  labels = [text.text for text in figure.iter("text") if text.get("text-anchor") == "end"]
  assert labels == ["0", "20k", "40k", "60k", "80k", "100k", "120k"]
  assert [report_figures._label(x) for x in (2000, 1.5e6, -3e4)] == ["2000", "1.5M", "-30k"]


def test_a_curve_is_drawn_where_its_axis_says(tmp_path):
  """Ticks and curve are two readings of one scale: a point read off by the ticks is its value."""
  values = [0.3, 0.7, 0.45, 0.9]
  with MetricsWriter(tmp_path / "metrics.jsonl") as writer:
    for step, value in enumerate(values):
      writer.write(step, {"entropy": value})
  figure = figures(report_of(tmp_path))["Entropy"]
  ticks = [t for t in figure.iter("text") if t.get("text-anchor") == "end"]
  (y0, v0), (y1, v1) = ((float(t.get("y")) - 4, float(t.text)) for t in (ticks[0], ticks[-1]))
  marks = [t for t in figure.iter("text") if t.get("text-anchor") == "middle" and t.text.isdigit()]
  (x0, s0), (x1, s1) = ((float(t.get("x")), int(t.text)) for t in (marks[0], marks[-1]))
  (line,) = pixels(figure)
  for step, ((x, y), value) in enumerate(zip(line, values, strict=True)):
    assert v0 + (y - y0) * (v1 - v0) / (y1 - y0) == pytest.approx(value, abs=0.002)
    assert s0 + (x - x0) * (s1 - s0) / (x1 - x0) == pytest.approx(step, abs=0.01)


def test_the_band_lies_around_its_curve(page):
  figure = figures(page)["Held-out accuracy"]
  bands, lines = pixels(figure, "polygon"), pixels(figure)
  assert len(bands) == len(lines) == 2
  for band, line in zip(bands, lines, strict=True):
    upper, lower = band[: len(line)], band[len(line) :][::-1]
    for (x, y), (x_up, y_up), (x_low, y_low) in zip(line, upper, lower, strict=True):
      assert x == x_up == x_low and y_up <= y <= y_low and y_up < y_low


def test_phases_stack_to_the_sum_of_the_step(tmp_path):
  with MetricsWriter(tmp_path / "metrics.jsonl") as writer:
    writer.write(1, {"time/rollout": 3.0, "time/update": 1.0, "time/other": 2.0, "time/step": 6.5})
  figure = figures(report_of(tmp_path))["Time per phase"]
  bars = list(figure.iter("rect"))
  heights = [float(bar.get("height")) for bar in bars]
  assert heights[0] == pytest.approx(3 * heights[1], rel=0.01)
  assert heights[2] == pytest.approx(2 * heights[1], rel=0.01)
  assert heights[3] == pytest.approx(0.5 * heights[1], rel=0.01)  # 6.5 - (3 + 1 + 2)
  assert bars[3].find("title").text == "step 1, idle: 0.5 s"
  for below, above in zip(bars, bars[1:], strict=False):
    assert float(above.get("y")) + float(above.get("height")) == pytest.approx(
      float(below.get("y")), abs=0.02
    )


def test_the_step_table_and_the_rates_are_those_of_the_steps_that_did_not_compile(page):
  section = re.search("<h2>Where the time of a step goes</h2>.*?</section>", page, re.S).group(0)
  rows = re.findall("<tr>(.*?)</tr>", section)
  cells = {row[0]: row[1:] for row in (re.findall("<td.*?>(.*?)</td>", line) for line in rows[1:])}
  names = "rollout reward logprobs update eval checkpoint idle step"
  assert [*cells] == names.split()
  assert cells["reward"][:2] == ["29", "0.400"]  # Steps 2 to 30; step 1 compiled.
  assert cells["eval"][:2] == ["6", "6.000"] and cells["idle"][:2] == ["29", "0.100"]
  shares = [float(row[2].rstrip("%")) for name, row in cells.items() if name != "step"]
  assert sum(shares) == pytest.approx(100, abs=0.5)
  assert "In 29 steps that did not compile." in section
  assert "MFU of the update: 0.5, with a peak of 100 GFLOP/s, measured" in section
  assert "no padding, nothing computed twice" in section


def test_a_record_without_times_has_no_step_table(tmp_path):
  with MetricsWriter(tmp_path / "metrics.jsonl") as writer:
    writer.write(1, {"entropy": 1.0})
  assert "Where the time" not in report_of(tmp_path)


def test_the_header_says_before_and_after(tmp_path):
  with MetricsWriter(tmp_path / "metrics.jsonl") as writer:
    for step, accuracy in ((0, 0.19), (5, 0.5), (10, 0.84)):
      ends = {"eval/sampled_low": accuracy - 0.04, "eval/sampled_high": accuracy + 0.03}
      writer.write(step, {"eval/sampled_accuracy": accuracy, "time/step": 90.0} | ends)
  text = Checker(report_of(tmp_path)).text
  assert "19% → 84%" in text
  assert "95 % interval at step 0: 15 to 22 %" in text and "at step 10: 80 to 87 %" in text
  assert "270" not in text and "4m" in text  # 3 x 90 s = 4.5 minutes


@pytest.mark.parametrize("seconds, shown", [(0.18, "0.18s"), (9.0, "9s"), (42.4, "42s")])
def test_a_quick_step_does_not_take_0_seconds(seconds, shown, tmp_path):
  with MetricsWriter(tmp_path / "metrics.jsonl") as writer:
    writer.write(1, {"entropy": 1.0, "time/step": seconds})
  assert f"{shown} a step on average" in report_of(tmp_path)


def test_a_run_at_its_first_step_has_no_average(tmp_path):
  with MetricsWriter(tmp_path / "metrics.jsonl") as writer:
    writer.write(0, {"reward_mean": 0.5, "time/rollout": 97.0, "time/step": 97.0})
  page = report_of(tmp_path)
  assert "on average" not in page and "the first one is on record" in page


def test_changed_settings_come_first(page):
  rows = re.findall(r"<tr><td><code>(.*?)</code></td><td><code>(.*?)</code></td>(.*?)</tr>", page)
  assert rows[0] == ("seed", "3", "<td><code>0</code></td>")
  assert [row[0] for row in rows] == ["seed", "learning_rate", "model", "task", "steps"]
  assert "5 settings, of which 2 changed from the default (first)" in page


def test_before_and_after_pair_the_same_problem_of_the_first_and_last_evaluation():
  def row(step, problem, response, split="eval"):
    return {"step": step, "split": split, "problem": problem, "response": response}

  rows = [
    row(0, "a", "a0"),
    row(0, "a", "a0 again"),
    row(0, "b", "b0"),
    row(0, "c", "c0"),
    row(5, "a", "a5"),
    row(9, "b", "b9"),
    row(9, "a", "a9"),
    row(9, "a", "a9 again"),
    row(10, "c", "c10", split="train"),
  ]
  pairs = [(x["response"], y["response"]) for x, y in before_after(rows)]
  assert pairs == [("a0", "a9"), ("b0", "b9")]
  assert before_after(rows[:4]) == []


def test_samples_show_reward_status_and_what_was_cut(page):
  text = Checker(page).text
  assert "step 7: 8 samples" in text and "timed out" in text and "16 (cut)" in text
  assert "The first 12 of 20 held-out problems" in text


HOSTILE = (
  "<script>alert(1)</script><img src=x onerror=alert(1)>\"'&amp;\x00\x1b[31m\u202e\ud800</td>"
)


def test_model_text_is_shown_and_never_markup(tmp_path):
  page = report_of(fake_run(tmp_path / "<b>run</b>", steps=4, every=2, hostile=HOSTILE, problems=3))
  checker = Checker(page)
  assert not {"script", "img"} & set(checker.tags) and "<b>run" not in page
  assert "<script>alert(1)</script><img src=x onerror=alert(1)>\"'&amp;" in checker.text
  assert r"\x00\x1b[31m\u202e\ud800</td>" in checker.text
  assert not re.search(r"[\x00-\x09\x0b-\x1f\x7f-\x9f\u202e]", page)


def test_a_phase_whose_name_has_no_encoding_is_drawn(tmp_path):
  with MetricsWriter(tmp_path / "metrics.jsonl") as writer:
    writer.write(1, {"entropy": 1.0, "time/\ud800": 1.0})
  assert r'<span class="key k0">\ud800</span>' in report_of(tmp_path)


@settings(max_examples=20, deadline=None)
@given(texts=st.lists(st.text(st.characters(exclude_categories=())), min_size=4, max_size=4))
def test_no_text_breaks_the_page(texts, tmp_path_factory):
  folder = tmp_path_factory.mktemp("run")
  prompt, response, status, key = texts
  sample = {"split": "train", "problem": "x", "prompt": prompt, "response": response}
  with MetricsWriter(folder / "samples.jsonl") as writer:
    writer.write(1, sample | {"reward": None, "status": status})
    writer.write(2, sample | {"split": "eval"})
    writer.write(2, sample | {"step_": 0})
  with MetricsWriter(folder / "metrics.jsonl") as writer:
    writer.write(1, {"entropy": 1.0, f"time/{key}": 1.0})
  (folder / "config.json").write_text(json.dumps({"model": prompt, key: response}))
  Checker(report_of(folder))


@pytest.mark.parametrize(
  "rows",
  [
    [],
    [{}],
    [{"entropy": 0.0}],
    [{"entropy": 1.0}, {"entropy": 1.0}],
    [{"entropy": None}, {"entropy": "nan"}],
    [{"entropy": 1e-300}, {"entropy": 1e300}],
    [{"entropy": -1e-9}, {"entropy": 5e-324}],
    [{"eval/sampled_accuracy": 1.0}],
    [{"eval/sampled_accuracy": "nan", "eval/sampled_low": None, "eval/sampled_high": 1.0}],
    [{"time/step": 0.0}, {"time/rollout": 0.0}],
  ],
)
def test_degenerate_runs_have_a_report_too(rows, tmp_path):
  with MetricsWriter(tmp_path / "metrics.jsonl") as writer:
    for step, row in enumerate(rows):
      writer.write(step, row)
  page = report_of(tmp_path)
  Checker(page)
  for figure in figures(page).values():
    for line in pixels(figure):
      assert all(0 <= x <= 560 and 0 <= y <= 250 for x, y in line)
  assert "nan" not in page and "inf," not in page


def test_values_that_are_not_finite_break_the_curve_and_are_counted(tmp_path):
  with MetricsWriter(tmp_path / "metrics.jsonl") as writer:
    for step, value in enumerate([1.0, 2.0, float("nan"), 3.0, 4.0, float("inf")]):
      writer.write(step, {"grad_norm": value})
  figure = figures(report_of(tmp_path))["Gradient norm"]
  assert [len(line) for line in pixels(figure)] == [2, 2]
  caption = "".join(figure.find("figcaption").itertext())
  assert "2 values not finite, first at step 2." in caption


def test_a_step_with_nothing_to_measure_breaks_the_curve_and_is_no_fault(tmp_path):
  with MetricsWriter(tmp_path / "metrics.jsonl") as writer:
    for step, value in enumerate([1.0, 2.0, None, 3.0, 4.0]):
      writer.write(step, {"grad_norm": value})
  figure = figures(report_of(tmp_path))["Gradient norm"]
  assert [len(line) for line in pixels(figure)] == [2, 2]
  caption = "".join(figure.find("figcaption").itertext())
  assert "Nothing to measure in 1 step, first in step 2." in caption
  assert "finite" not in caption and figure.find("figcaption/strong") is None


def test_a_long_run_stays_a_small_file(tmp_path):
  page = report_of(fake_run(tmp_path / "long", steps=300, every=50))
  Checker(page)
  assert len(page) < 400_000 and "steps in between are left out" in page
  assert len(list(figures(page)["Time per phase"].iter("rect"))) <= 100 * 7


def test_a_directory_without_a_run_is_refused(tmp_path):
  with pytest.raises(FileNotFoundError, match="holds no metrics.jsonl"):
    report_lib.write_report(tmp_path)
  (tmp_path / "metrics.jsonl").write_text("")
  (tmp_path / "config.json").write_text("[1")
  with pytest.raises(ValueError, match="config.json: not JSON"):
    report_lib.write_report(tmp_path)


@pytest.mark.parametrize(
  ("low", "high"), [(0, 1), (0.13, 0.19), (-3e-6, 8e-6), (0, 12345), (-1, 1)]
)
def test_ticks_are_round_and_inside(low, high):
  ticks = report_figures.ticks(low, high)
  assert 3 <= len(ticks) <= 9 and low <= ticks[0] and ticks[-1] <= high * (1 + 1e-9)
  for tick in ticks:
    assert float(f"{tick:.2g}") == pytest.approx(tick, abs=1e-12 * (high - low))
