"""The site as a browser shows it, at a phone's width and a screen's: `make test-site`.

Chromium opens every page, in both languages, from a server on this machine. Nothing is wider than
the window, every figure and formula is drawn, no character is an empty box, the language switch
stays on the page, and all that was loaded came from that server. Chromium resolves no other name.
"""

import functools
import http.server
import json
import os
import shutil
import subprocess
import threading

import pytest

from tests.test_site import site  # noqa: F401

pytestmark = pytest.mark.skipif(
  os.environ.get("RL_LLM_SITE") != "1", reason="make test-site runs it; it needs Chromium"
)

# Opens pages one by one in a frame, and posts what is wrong with each.
CHECK = r"""<!doctype html><meta charset="utf-8"><iframe height="800"></iframe><script>
const asked = __ASKED__, frame = document.querySelector("iframe"), drawn = {};
let pen;  // draws with the page's fonts

// A missing glyph looks like that of U+0378, which no script has.
function drawing(font, character) {
  pen.clearRect(0, 0, 48, 48);
  pen.font = `24px ${font}`;
  pen.fillText(character, 8, 32);
  return pen.getImageData(0, 0, 48, 48).data.join();
}
function missing(font, character) {
  const key = font + character;
  if (!(key in drawn)) {
    drawn[font] ??= drawing(font, "\u0378");
    drawn[key] = drawing(font, character) === drawn[font];
  }
  return drawn[key];
}

function* texts(page) {
  const walk = page.createTreeWalker(page.body, NodeFilter.SHOW_TEXT);
  while (walk.nextNode()) {
    const parent = walk.currentNode.parentElement;
    if (parent.closest("script, style, noscript")) continue;
    yield [frame.contentWindow.getComputedStyle(parent).fontFamily, walk.currentNode.data];
  }
  for (const image of page.images) {
    if (!/\.svg$/.test(image.src)) continue;
    const request = new XMLHttpRequest();
    request.open("GET", image.src, false);
    request.send();
    const svg = new DOMParser().parseFromString(request.responseText, "image/svg+xml");
    yield ["sans-serif", svg.documentElement.textContent];
  }
}

function faultsOf(page) {
  const canvas = Object.assign(page.createElement("canvas"), { width: 48, height: 48 });
  pen = canvas.getContext("2d", { willReadFrequently: true });
  const faults = [], width = page.documentElement.scrollWidth;
  if (width > frame.clientWidth) faults.push(`${width} pixels wide`);
  for (const image of page.images)
    if (!image.complete || !image.naturalWidth) faults.push(`no image ${image.src}`);
  for (const entry of frame.contentWindow.performance.getEntriesByType("resource"))
    if (!entry.name.startsWith(location.origin)) faults.push(`asked for ${entry.name}`);
  if (!page.querySelector("article h1")) faults.push("no heading");
  const empty = new Set();
  for (const [font, text] of texts(page))
    for (const character of text)
      if (/[^\s\p{M}\p{Cc}\p{Cf}]/u.test(character) && missing(font, character))
        empty.add(character);
  if (empty.size) faults.push(`no glyph for ${[...empty].join(" ")}`);
  for (const formula of page.querySelectorAll("math")) {
    const box = formula.getBoundingClientRect();
    const hidden = formula.closest("details:not([open])");
    if (!hidden && !(box.width && box.height)) faults.push("a formula takes no room");
    for (const fraction of hidden ? [] : formula.querySelectorAll("mfrac")) {
      const [above, below] = [...fraction.children].map((each) => each.getBoundingClientRect());
      if (above.bottom > below.top + 1) faults.push("a fraction is not drawn as one");
    }
  }
  if (page.querySelector("math"))
    if (![...page.fonts].some(({ family, status }) => /Math/.test(family) && status === "loaded"))
      faults.push("the font of formulas is not loaded");
  const prose = page.querySelector("article")?.cloneNode(true);
  prose?.querySelectorAll("code, pre, script").forEach((each) => each.remove());
  if (/\$|\\[a-z]+[{ ]/.test(prose?.textContent)) faults.push("TeX is left as text");
  const calculator = page.getElementById("calculator");
  if (calculator) {
    const field = calculator.querySelector("input"), before = calculator.textContent;
    field.value = "0.35";
    field.dispatchEvent(new Event("input", { bubbles: true }));
    if (!/0\.35/.test(calculator.textContent) || calculator.textContent === before)
      faults.push("the calculator does not answer");
  }
  return faults;
}

const next = () => new Promise((done) => (frame.onload = done));
async function walk() {
  const found = {};
  frame.width = asked.width;
  for (const name of asked.names) {
    let loaded = next();
    frame.src = name;
    await loaded;
    await frame.contentDocument.fonts.ready;
    found[name] = faultsOf(frame.contentDocument);
    const link = frame.contentDocument.querySelector(`.md-select a[hreflang="${asked.other}"]`);
    if (!link) { found[name].push("no switch"); continue; }
    loaded = next();
    link.click();
    await loaded;
    const page = (path) => path.replace(/^\/(ja\/)?/, "");
    const { pathname } = frame.contentWindow.location;
    if (page(pathname) !== page("/" + name)) found[name].push(`the switch leads to ${pathname}`);
    const lang = frame.contentDocument.documentElement.lang;
    if (lang !== asked.other) found[name].push(`the switch leads to ${lang}`);
  }
  return found;
}
walk()
  .catch((error) => ({ check: [String(error)] }))
  .then((found) => fetch("/found", { method: "POST", body: JSON.stringify(found) }));
</script>"""


# Types a word into the search of a page, and posts the pages that it finds.
SEARCH = """<!doctype html><meta charset="utf-8"><iframe width="1400" height="800"></iframe><script>
const asked = __ASKED__, frame = document.querySelector("iframe");
const every = (wait) => new Promise((done) => setTimeout(done, wait));
async function search() {
  frame.src = asked.page;
  await new Promise((done) => (frame.onload = done));
  const page = frame.contentDocument, field = page.querySelector(".md-search__input");
  for (let tries = 0; tries < 300; tries++) {
    field.focus();
    field.value = asked.word;
    field.dispatchEvent(new KeyboardEvent("keyup", { bubbles: true }));
    await every(100);
    const links = [...page.querySelectorAll(".md-search-result__link")];
    if (links.length) return links.map((link) => link.href);
  }
  return [];
}
search()
  .catch((error) => [String(error)])
  .then((found) => fetch("/found", { method: "POST", body: JSON.stringify(found) }));
</script>"""


class Handler(http.server.SimpleHTTPRequestHandler):
  """Serves the site, and keeps what the checking page posts."""

  def do_POST(self):
    length = int(self.headers["Content-Length"])
    self.server.found = json.loads(self.rfile.read(length))
    self.send_response(204)
    self.end_headers()
    self.server.posted.set()

  def log_message(self, *_):
    pass


@pytest.fixture
def server(site):  # noqa: F811
  handler = functools.partial(Handler, directory=str(site[0]))
  with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
    server.posted = threading.Event()
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()


def found_by_chromium(server, path, profile, check, **asked):
  """What a checking page, put into the site at `path`, posts; it reads what is asked."""
  chromium = shutil.which("chromium") or shutil.which("chromium-browser")
  assert chromium, "no Chromium; on Debian: apt-get install chromium"
  (path / "check.html").write_text(check.replace("__ASKED__", json.dumps(asked)), encoding="utf-8")
  command = [chromium, "--headless", "--no-sandbox", "--disable-gpu", "--no-first-run"]
  command += ["--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1"]
  command += [f"--user-data-dir={profile}", "--window-size=1500,900"]
  command += [f"http://127.0.0.1:{server.server_address[1]}/check.html"]
  with open(profile / "said", "w") as said:
    browser = subprocess.Popen(command, stdout=said, stderr=said)
  try:
    assert server.posted.wait(240), (profile / "said").read_text()[-2000:]
  finally:
    browser.terminate()
    browser.wait(30)
  return server.found


@pytest.mark.parametrize("width", [400, 1400])
@pytest.mark.parametrize("lang, other", [("en", "ja"), ("ja", "en")])
def test_every_page_is_complete(site, server, tmp_path, lang, other, width):  # noqa: F811
  path, pages = site
  names = [each.relative_to(path) for each in pages]
  names = sorted(name.as_posix() for name in names if (name.parts[0] == "ja") == (lang == "ja"))
  found = found_by_chromium(server, path, tmp_path, CHECK, names=names, width=width, other=other)
  assert sorted(found) == names and len(names) > 20
  assert {page: faults for page, faults in found.items() if faults} == {}


@pytest.mark.parametrize(
  "page, word, lesson",
  [
    ("index.html", "baseline", "/guide/reinforce.html"),
    ("ja/index.html", "方策勾配", "/ja/guide/policy_gradient.html"),
  ],
)
def test_the_search_finds_a_lesson(site, server, tmp_path, page, word, lesson):  # noqa: F811
  found = found_by_chromium(server, site[0], tmp_path, SEARCH, page=page, word=word)
  assert any(lesson in address for address in found), found


def test_the_check_finds_faults(site, server, tmp_path):  # noqa: F811
  path, _ = site
  (path / "bad.html").write_text(
    '<meta charset="utf-8"><article>$x$ \ue123 あ</article><div style="width:900px">a</div>'
    '<img src="none.png"><img src="http://elsewhere.example/a.png"><math></math>'
    '<div class="md-select"><a hreflang="ja" href="ja/index.html">b</a></div>',
    encoding="utf-8",
  )
  asked = {"names": ["bad.html"], "width": 400, "other": "ja"}
  (faults,) = found_by_chromium(server, path, tmp_path, CHECK, **asked).values()
  for kind in ("pixels wide", "no image", "asked for http://elsewhere", "no heading"):
    assert any(kind in fault for fault in faults), kind
  assert "TeX is left as text" in faults and "a formula takes no room" in faults
  assert "no glyph for \ue123" in faults and "the switch leads to /ja/index.html" in faults
  assert "the font of formulas is not loaded" in faults
