"""An object store on loopback that speaks what S3 and Google Cloud Storage do, in part."""

from __future__ import annotations

import contextlib
import http.server
import json
import re
import threading
import urllib.parse
from xml.sax.saxutils import escape


class Store(http.server.BaseHTTPRequestHandler):
  """Objects by name, of the bucket "mine" alone; `full` refuses to write more than so many."""

  protocol_version = "HTTP/1.1"

  def log_message(self, *unused):
    pass

  def say(self, code, body=b"", kind="application/json", **headers):
    self.send_response(code)
    for name, value in ({"Content-Type": kind, "Content-Length": str(len(body))} | headers).items():
      self.send_header(name, value)
    self.end_headers()
    if self.command != "HEAD":
      self.wfile.write(body)

  def handle_any(self):
    body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
    url = urllib.parse.urlsplit(self.path)
    query = dict(urllib.parse.parse_qsl(url.query, keep_blank_values=True))
    google = re.fullmatch(r"(?:/upload)?/storage/v1/b/mine/o(?:/(.*))?", url.path)
    amazon = re.fullmatch(r"/mine/(.*)", url.path)
    if google:
      self.google(query.get("name") or urllib.parse.unquote(google[1] or ""), query, body)
    elif amazon:
      self.amazon(urllib.parse.unquote(amazon[1]), query, body)
    else:
      self.say(404)

  do_GET = do_HEAD = do_PUT = do_POST = do_DELETE = handle_any

  def put(self, name, body):
    if len(self.server.objects) >= self.server.full:
      return False
    self.server.objects[name] = body
    return True

  def google(self, name, query, body):
    objects = self.server.objects
    if self.command == "POST":
      kept = self.put(name, body)
      self.say(200 if kept else 403, json.dumps(self.of_google(name)).encode() if kept else b"")
    elif self.command == "DELETE":
      self.say(204 if objects.pop(name, None) is not None else 404)
    elif not name:
      start, end = query.get("startOffset", ""), query.get("endOffset", "\uffff")
      items = [self.of_google(n) for n in sorted(objects) if start <= n < end]
      self.say(200, json.dumps({"kind": "storage#objects", "items": items}).encode())
    elif name in objects:
      self.say(200, objects[name], "application/octet-stream", **{"x-goog-generation": "1"})
    else:
      self.say(404)

  def of_google(self, name):
    found = {"name": name, "bucket": "mine", "generation": "1", "metageneration": "1"}
    return found | {"size": str(len(self.server.objects.get(name, b"")))}

  def amazon(self, name, query, body):
    objects = self.server.objects
    tag = {"ETag": '"1"'}
    if self.command == "PUT":
      self.say(200, **tag) if self.put(name, body) else self.say(403)
    elif self.command == "DELETE":
      objects.pop(name, None)
      self.say(204)
    elif not name:
      names = [n for n in sorted(objects) if n.startswith(query.get("prefix", ""))]
      each = "".join(f"<Contents><Key>{escape(n)}</Key><Size>1</Size></Contents>" for n in names)
      head = f"<KeyCount>{len(names)}</KeyCount><IsTruncated>false</IsTruncated>"
      text = f'<?xml version="1.0"?><ListBucketResult>{head}{each}</ListBucketResult>'
      self.say(200, text.encode(), "application/xml")
    elif name in objects:
      self.say(200, objects[name], "application/octet-stream", **tag)
    else:
      self.say(404, kind="application/xml")


@contextlib.contextmanager
def served():
  """A server while the body runs: `objects` by name, `full`, and the `environment` of its users."""
  server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Store)
  server.objects, server.full = {}, 10**6
  address = f"http://127.0.0.1:{server.server_address[1]}"
  server.environment = {"TENSORSTORE_GCS_HTTP_URL": address, "AWS_ENDPOINT_URL": address}
  server.environment |= {"GOOGLE_AUTH_TOKEN_FOR_TESTING": "a-token"}
  server.environment |= {"AWS_ACCESS_KEY_ID": "an-id", "AWS_SECRET_ACCESS_KEY": "a-key"}
  thread = threading.Thread(target=server.serve_forever, daemon=True)
  thread.start()
  try:
    yield server
  finally:
    server.shutdown()
    server.server_close()
    thread.join()
