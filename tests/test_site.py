"""The site builds without a warning, in two languages, and asks no other host for anything."""

import html.parser
import os
import re
import subprocess
import sys
import urllib.parse

import pytest

from tests.test_markdown import ROOT

DOCS = ROOT / "docs"


class Page(html.parser.HTMLParser):
  """What a page asks for when it opens, what it links to, its anchors, and its language switch."""

  def __init__(self, path):
    super().__init__()
    self.loads, self.links, self.anchors, self.switch = [], [], set(), {}
    self.feed(path.read_text(encoding="utf-8"))

  def handle_starttag(self, tag, attrs):
    attrs = dict(attrs)
    self.anchors |= {attrs[key] for key in ("id", "name") if attrs.get(key)}
    if tag in ("script", "img", "iframe", "source"):
      self.loads += [attrs["src"]] if "src" in attrs else []
    elif tag == "link" and attrs.get("rel") not in ("alternate", "prev", "next", "canonical"):
      self.loads.append(attrs["href"])
    elif tag == "a" and "href" in attrs:
      self.links.append(attrs["href"])
      if "hreflang" in attrs:
        self.switch[attrs["hreflang"]] = attrs["href"]


@pytest.fixture(scope="module")
def site(tmp_path_factory):
  path = tmp_path_factory.mktemp("site")
  done = subprocess.run(
    [sys.executable, "-m", "mkdocs", "build", "--strict", f"--site-dir={path}"],
    cwd=ROOT,
    env={**os.environ, "NO_MKDOCS_2_WARNING": "1"},
    capture_output=True,
    text=True,
  )
  assert done.returncode == 0, done.stderr
  assert "WARNING" not in done.stderr
  pages = {each: Page(each) for each in path.rglob("*.html") if each.name != "404.html"}
  return path, pages


@pytest.mark.slow
def test_every_page_is_there_in_both_languages(site):
  path, pages = site
  for source in DOCS.rglob("*.md"):
    name = source.relative_to(DOCS).with_suffix("").as_posix()
    made = f"ja/{name.removesuffix('.ja')}.html" if name.endswith(".ja") else f"{name}.html"
    assert path / made in pages
  english = {each.relative_to(path) for each in pages if "ja" not in each.parts}
  assert english == {each.relative_to(path / "ja") for each in pages if "ja" in each.parts}


@pytest.mark.slow
def test_the_switch_stays_on_the_page(site):
  path, pages = site
  for each, page in pages.items():
    name = each.relative_to(path).as_posix().removeprefix("ja/")
    targets = {lang: (each.parent / href).resolve() for lang, href in page.switch.items()}
    assert targets == {"en": path / name, "ja": path / "ja" / name}, each


@pytest.mark.slow
def test_nothing_is_asked_of_another_host(site):
  for each, page in site[1].items():
    hosts = [url for url in page.loads if urllib.parse.urlsplit(url).netloc]
    assert hosts == [], each


@pytest.mark.slow
def test_what_the_style_asks_for_is_there(site):
  style = (site[0] / "site.css").read_text(encoding="utf-8")
  asked = re.findall(r"url\(\"([^\"]+)\"\)", style)
  assert asked and all((site[0] / name).is_file() for name in asked)


@pytest.mark.slow
def test_no_link_or_anchor_is_broken(site):
  for each, page in site[1].items():
    for address in [*page.links, *page.loads]:
      parts = urllib.parse.urlsplit(address)
      if parts.scheme or parts.netloc:
        continue
      local = urllib.parse.unquote(parts.path)
      target = (each.parent / local).resolve() if local else each
      assert target.exists(), (each, address)
      fragment = urllib.parse.unquote(parts.fragment)
      if fragment and target in site[1]:
        assert fragment in site[1][target].anchors, (each, address)


@pytest.mark.slow
def test_a_line_break_is_no_space_in_japanese(site):
  wide = r"[\u3000-\u9fff\uff00-\uffef]"
  texts = [each.read_text(encoding="utf-8") for each in site[1] if "ja" in each.parts]
  prose = [re.sub(r"<code>.*?</code>", "code", text, flags=re.DOTALL) for text in texts]
  assert prose and [found for text in prose for found in re.findall(f"{wide}\n{wide}", text)] == []


def test_what_the_rules_look_at_is_found(tmp_path):
  page = tmp_path / "a.html"
  page.write_text(
    '<link rel="stylesheet" href="https://a.b/c.css"><img src="d.svg"><a href="e.html" '
    'hreflang="ja">f</a><h2 id="g">h</h2><link rel="alternate" href="https://a.b/">'
  )
  found = Page(page)
  assert found.loads == ["https://a.b/c.css", "d.svg"] and found.links == ["e.html"]
  assert found.anchors == {"g"} and found.switch == {"ja": "e.html"}
