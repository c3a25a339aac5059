"""The site as a browser shows it, at a phone's width and a screen's: `make test-site`.

Chromium opens every page, in both languages, from a server on this machine. Nothing is wider than
the window, every figure is drawn, and all that was loaded came from that server.
"""

import functools
import html
import http.server
import json
import os
import re
import shutil
import subprocess
import threading

import pytest

from tests.test_site import site  # noqa: F401

pytestmark = pytest.mark.skipif(
  os.environ.get("RL_LLM_SITE") != "1", reason="make test-site runs it; it needs Chromium"
)

# Shows pages in frames of one width, and writes what is wrong with each into the page itself.
CHECK = """<!doctype html><meta charset="utf-8"><body>%s<pre id="found"></pre><script>
onload = () => {
  const found = {};
  for (const frame of document.querySelectorAll("iframe")) {
    const page = frame.contentDocument, faults = [];
    const width = page.documentElement.scrollWidth;
    if (width > frame.clientWidth) faults.push(`${width} pixels wide`);
    for (const image of page.images)
      if (!image.complete || !image.naturalWidth) faults.push(`no image ${image.src}`);
    for (const entry of frame.contentWindow.performance.getEntriesByType("resource"))
      if (!entry.name.startsWith(location.origin)) faults.push(`asked for ${entry.name}`);
    if (!page.querySelector("article h1")) faults.push("no heading");
    found[frame.src] = faults;
  }
  document.getElementById("found").textContent = JSON.stringify(found);
};
</script>"""


class Quiet(http.server.SimpleHTTPRequestHandler):
  def log_message(self, *_):
    pass


@pytest.fixture
def address(site):  # noqa: F811
  handler = functools.partial(Quiet, directory=str(site[0]))
  with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_address[1]}"
    server.shutdown()


def found_by_chromium(url, profile):
  """What the checking page at an address found: page -> faults."""
  chromium = shutil.which("chromium") or shutil.which("chromium-browser")
  assert chromium, "no Chromium; on Debian: apt-get install chromium"
  command = [chromium, "--headless", "--no-sandbox", "--disable-gpu", "--dump-dom"]
  command += [f"--user-data-dir={profile}", "--timeout=60000", url]
  done = subprocess.run(command, capture_output=True, text=True, timeout=120)
  said = re.search(r'<pre id="found">(.*?)</pre>', done.stdout, flags=re.DOTALL)
  assert said and said[1], done.stderr[-2000:]
  return json.loads(html.unescape(said[1]))


@pytest.mark.parametrize("width", [400, 1400])
@pytest.mark.parametrize("lang", ["en", "ja"])
def test_every_page_fits_and_is_complete(site, address, tmp_path, lang, width):  # noqa: F811
  path, pages = site
  names = [each.relative_to(path) for each in pages]
  names = sorted(name.as_posix() for name in names if (name.parts[0] == "ja") == (lang == "ja"))
  found = {}
  for some in (names[start : start + 6] for start in range(0, len(names), 6)):
    frames = [f'<iframe src="{name}" width="{width}" height="800"></iframe>' for name in some]
    (path / "check.html").write_text(CHECK % "".join(frames), encoding="utf-8")
    found |= found_by_chromium(f"{address}/check.html", tmp_path)
  assert len(found) == len(names)
  assert {page: faults for page, faults in found.items() if faults} == {}


def test_the_check_finds_faults(address, site, tmp_path):  # noqa: F811
  path, _ = site
  (path / "bad.html").write_text(
    '<article></article><div style="width:900px">a</div><img src="none.png">'
  )
  (path / "check-bad.html").write_text(CHECK % '<iframe src="bad.html" width="400"></iframe>')
  (faults,) = found_by_chromium(f"{address}/check-bad.html", tmp_path).values()
  kinds = {fault.partition(" http")[0] for fault in faults}
  assert "no heading" in kinds and "no image" in kinds
  assert any("pixels wide" in kind for kind in kinds)
