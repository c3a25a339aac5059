"""The guide answers what its readers asked, and its figures are the library's numbers."""

import json
import math
import re
import runpy
import xml.etree.ElementTree as ElementTree

import pytest

from rl_llm import explain
from tests.test_markdown import ROOT, anchors, blocks

GUIDE = ROOT / "docs" / "guide"
FIGURES = runpy.run_path(str(GUIDE / "make_figures.py"))["FIGURES"]
JAPANESE = sorted(GUIDE.glob("*.ja.md"))
NO_LESSONS = ("index", "glossary", "calculator")
LESSONS = sorted(p for p in GUIDE.glob("*.md") if p.stem.partition(".")[0] not in NO_LESSONS)

# What somebody who began to learn this wrote down or asked -> where the guide answers: a page, and
# its anchor.
ANSWERS = {
  "supervised learning against reinforcement learning": (
    "policy_gradient",
    "supervised-learning-in-one-number",
  ),
  "can a loss with a reward model in it be differentiated?": (
    "policy_gradient",
    "where-the-slope-is-cut",
  ),
  "the gradient of E[R] is E[grad log P * R]": ("policy_gradient", "the-policy-gradient"),
  "good: +, bad: times -1": ("reinforce", "the-size-multiplies-not-the-sign"),
  "try random updates and keep what was good": (
    "reinforce",
    "random-samples-a-deterministic-update",
  ),
  "the ratio as a learning rate per sample; 0.5 -> 0.3": ("ppo", "from-05-to-03"),
  "the ratio is limited to [0.8, 1.2]": ("ppo", "a-brake-not-a-fence"),
  "DPO's loss, written without a reference": ("dpo", "the-reference-is-the-anchor"),
  "GRPO, the comparison table": ("grpo", "the-four-methods-side-by-side"),
  "Nex-N1": ("nex_n1", "what-it-does-not-say"),
  "GRPO's collapse, groups that agree": ("collapse", "first-groups-that-agree"),
  "GRPO's collapse, certainty": ("collapse", "second-certainty"),
  "GRPO's collapse, likelihood": ("collapse", "third-right-responses-lose-likelihood"),
  "the entropy bonus, its optimum": ("entropy", "it-moves-the-optimum"),
  "the entropy bonus, its slope": ("entropy", "its-slope-over-a-vocabulary"),
  "the entropy bonus, groups that agree": ("entropy", "the-only-force-left"),
  "the entropy bonus, alternatives": ("entropy", "where-it-is-put-and-what-replaces-it"),
}

IN_JAPANESE = {
  "supervised-learning-in-one-number": "教師あり学習との違いを一つの数で",
  "where-the-slope-is-cut": "傾きはどこで切れるか",
  "the-policy-gradient": "方策勾配",
  "the-size-multiplies-not-the-sign": "掛けるのは符号ではなく大きさ",
  "random-samples-a-deterministic-update": "ランダムなサンプル決定的な更新",
  "from-05-to-03": "05-から-03-へ",
  "a-brake-not-a-fence": "柵ではなくブレーキ",
  "the-reference-is-the-anchor": "参照方策は錨である",
  "the-four-methods-side-by-side": "四つの手法の比較",
  "what-it-does-not-say": "書かれていないこと",
  "first-groups-that-agree": "第一の原因グループの報酬がそろう",
  "second-certainty": "第二の原因確信",
  "third-right-responses-lose-likelihood": "第三の原因正解の尤度が下がる",
  "it-moves-the-optimum": "最適点が動く",
  "its-slope-over-a-vocabulary": "語彙全体での傾き",
  "the-only-force-left": "残された唯一の力",
  "where-it-is-put-and-what-replaces-it": "どこに入れるか何で置き換えるか",
}


NUMBER = r"-?\d+\.\d"  # of a drawing


def text_of(page):
  return (GUIDE / page).read_text(encoding="utf-8")


def numbers_in(text):
  return [float(x) for x in re.findall(NUMBER, text)]


@pytest.mark.parametrize("question", ANSWERS)
def test_every_question_has_its_answer(question):
  page, anchor = ANSWERS[question]
  assert anchor in anchors(text_of(f"{page}.md"))
  assert IN_JAPANESE[anchor] in anchors(text_of(f"{page}.ja.md"))


@pytest.mark.parametrize("path", JAPANESE, ids=lambda path: path.name)
def test_the_two_editions_share_their_code_and_their_sections(path):
  japanese = path.read_text(encoding="utf-8")
  english = path.with_name(path.name.replace(".ja.md", ".md")).read_text(encoding="utf-8")
  fences = [[(b.info, *b.lines.values()) for b in blocks(t) if b.info] for t in (english, japanese)]
  if path.name == "index.ja.md":  # Its example prints Japanese, and tests/test_docs.py runs it.
    prints, prints_japanese = (page.pop(0) for page in fences)
    assert 'lang="ja"' in "".join(prints_japanese) and "lang" not in "".join(prints)
  assert fences[0] == fences[1]
  for mark in (r"(?m)^## ", r"(?m)^\|", r"<details ", r"!\[", r"(?m)^(?:-|\d+\.) "):
    assert len(re.findall(mark, english)) == len(re.findall(mark, japanese)), mark
  # The numbers of the prose are the same, but for those that one language writes as words.
  numbers = [re.findall(r"\d+\.\d+", t) for t in (english, japanese)]
  assert sorted(set(numbers[0])) == sorted(set(numbers[1]))


def test_every_page_of_the_guide_is_there_in_both_languages():
  names = {path.name for path in GUIDE.glob("*.md")}
  assert {path.name for path in JAPANESE} == {
    name.replace(".md", ".ja.md") for name in names if not name.endswith(".ja.md")
  }


@pytest.mark.parametrize("path", LESSONS, ids=lambda path: path.name)
def test_a_lesson_ends_with_a_quiz_of_three(path):
  text = path.read_text(encoding="utf-8")
  quiz = re.split(r"(?m)^## (?:Quiz|確認問題)$", text)[1].partition("\n## ")[0]
  assert len(re.findall(r"(?m)^\d\. ", quiz)) == 3
  answers = re.findall(r"<details .*?</details>", quiz, flags=re.DOTALL)
  assert len(answers) == quiz.count("</details>") == 3
  assert all(len(re.sub(r"<[^>]*>", "", answer).split()[1:]) for answer in answers)


@pytest.mark.parametrize("path", LESSONS, ids=lambda path: path.name)
def test_a_lesson_judges_what_readers_think(path):
  headings = {block for block in anchors(path.read_text(encoding="utf-8"))}
  assert headings & {"right-or-wrong", "正しいか誤りか"}


def test_prose_is_wrapped():
  # A Japanese character is as wide as two.
  for path in GUIDE.glob("*.md"):
    code = {i for block in blocks(path.read_text(encoding="utf-8")) for i in block.lines}
    for i, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
      width = sum(2 if ord(ch) > 0x2E7F else 1 for ch in line)
      assert width <= 100 or i in code or line.startswith(("|", "[")), f"{path.name}:{i}"


@pytest.mark.slow
@pytest.mark.parametrize("name", FIGURES)
def test_a_figure_is_what_the_library_computes(name, tmp_path):
  example = FIGURES[name]()
  figure = example.figure()
  for lang, ending in (("en", ".svg"), ("ja", ".ja.svg")):
    made = tmp_path / f"{name}{ending}"
    explain.draw(example._replace(figure=lambda: figure), made, lang=lang)
    kept = GUIDE / "figures" / made.name
    elements = [list(ElementTree.parse(path).getroot().iter()) for path in (made, kept)]
    assert len(elements[0]) == len(elements[1])
    for new, old in zip(*elements, strict=True):
      assert (new.tag, new.text, list(new.attrib)) == (old.tag, old.text, list(old.attrib))
      for key, value in new.attrib.items():
        assert numbers_in(value) == pytest.approx(numbers_in(old.attrib[key]), abs=0.2)
        rest, kept_rest = (re.sub(NUMBER, "", text) for text in (value, old.attrib[key]))
        assert rest == kept_rest


@pytest.mark.slow
def test_all_of_an_episode_is_attended_and_what_the_policy_wrote_is_trained_on():
  (parts, ((_, attended), (_, trained))) = FIGURES["agents"]().figure()
  wrote = [name.en.startswith("policy") for name, tokens in parts for _ in tokens]
  assert [name.en for name, _ in parts] == ["prompt", "policy, turn 1", "tool", "policy, turn 2"]
  assert parts[2][1] == ["answer:", str(86 * 67)] and parts[1][1][-1] == parts[3][1][-1] == "</s>"
  assert all(attended) and trained == wrote and len(attended) == len(wrote) == 13


@pytest.mark.slow
def test_the_optimum_is_the_sigmoid_of_the_difference_over_the_coefficient():
  figure = FIGURES["nex_n1"]().figure()
  for curve, coef, point in zip(figure.curves, (1e-4, 1e-3), figure.points, strict=True):
    wanted = [1 / (1 + math.exp(-gap / coef)) for gap in curve.x]
    assert list(curve.y) == pytest.approx(wanted, abs=1e-5) and max(curve.x) == pytest.approx(1e-3)
    assert point == pytest.approx((coef, 1 / (1 + math.exp(-1))), abs=1e-6)


@pytest.mark.parametrize("page", ["collapse.md", "collapse.ja.md"])
def test_the_runs_are_those_of_the_record(page):
  runs = json.loads(text_of("copy_runs.json"))["runs"]
  table = re.findall(r"(?m)^\| [^|]+ \| ([\d., ]+) \| ([\d., ]+) \|$", text_of(page))
  last = {key: lambda run, key=key: run[key][-1] for key in ("entropy", "agree")}
  for said, of_run in zip(table, (lambda run: run["accuracy"], *last.values()), strict=True):
    for numbers, coef in zip(said, (0.1, 0.0), strict=True):
      ours = [of_run(run) for run in runs if run["coef"] == coef]
      assert [float(x) for x in numbers.split(", ")] == pytest.approx(ours, abs=0.006)


def test_every_figure_is_made_and_shown():
  kept = {path.name for path in (GUIDE / "figures").glob("*.svg")}
  assert kept == {f"{name}{ending}" for name in FIGURES for ending in (".svg", ".ja.svg")}
  texts = [path.read_text(encoding="utf-8") for path in GUIDE.glob("*.md")]
  shown = {name for text in texts for name in re.findall(r"figures/(\S+svg)", text)}
  assert shown <= kept and {f"{name}.svg" for name in FIGURES} <= shown
