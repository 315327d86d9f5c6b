"""An object store on the loopback that speaks the part of S3's protocol that jobs use.

Source: Amazon S3 API reference: CreateBucket, HeadBucket, ListObjectsV2, HeadObject, GetObject,
PutObject, DeleteObject and multipart uploads, path-style.
"""

import hashlib
import threading
import uuid
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, unquote, urlsplit
from xml.sax.saxutils import escape

from tests.batch.aws_signatures import refusal


@contextmanager
def s3_server(keys):
    """Yields the address.

    Args:
        keys: The id of the access key, and the secret, that requests must be signed with.
    """
    with _Server(keys) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_port}"
        finally:
            server.shutdown()
            thread.join()


class _Server(ThreadingHTTPServer):
    daemon_threads = True

    def __init__(self, keys):
        super().__init__(("127.0.0.1", 0), _Handler)
        self.keys = keys
        self.buckets = {}  # of objects by key
        self.uploads = {}  # of parts by number


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *_):
        """Tests want no log."""

    def do_HEAD(self):
        self._do(self._get)

    def do_GET(self):
        self._do(self._get)

    def do_PUT(self):
        self._do(self._put)

    def do_POST(self):
        self._do(self._post)

    def do_DELETE(self):
        self._do(self._delete)

    def _do(self, act):
        sent = self._read_body()
        wrong = refusal(self.command, self.path, self.headers, sent, self.server.keys)
        self.body = _unframe(sent) if self._is_framed() else sent
        url = urlsplit(self.path)
        self.query = {key: values[0] for key, values in parse_qs(url.query, True).items()}
        bucket, _, self.key = unquote(url.path).lstrip("/").partition("/")
        if wrong is not None:
            self._refuse(403, wrong)
        elif self.command == "PUT" and not self.key:
            self.server.buckets.setdefault(bucket, {})
            self._answer()
        elif bucket not in self.server.buckets:
            self._refuse(404, "NoSuchBucket")
        else:
            self.objects = self.server.buckets[bucket]
            act()

    def _get(self):
        if not self.key:
            self._answer(self._listing() if self.command == "GET" else b"")
        elif self.key not in self.objects:
            self._refuse(404, "NoSuchKey")
        else:
            content, status, headers = self.objects[self.key], 200, {}
            if wanted := self.headers.get("Range"):
                start, _, end = wanted.removeprefix("bytes=").partition("-")
                part = content[int(start) : int(end) + 1 if end else None]
                place = f"bytes {start}-{int(start) + len(part) - 1}/{len(content)}"
                content, status, headers = part, 206, {"Content-Range": place}
            self._answer(content, status, {**headers, "ETag": _etag(content)})

    def _listing(self):
        prefix, delimiter = self.query.get("prefix", ""), self.query.get("delimiter", "")
        keys = [key for key in sorted(self.objects) if key.startswith(prefix)]
        folders = {}
        if delimiter:
            rests = {key: key[len(prefix) :].partition(delimiter) for key in keys}
            folders = {prefix + head + found: None for head, found, _ in rests.values() if found}
            keys = [key for key, (_, found, _) in rests.items() if not found]
        keys = keys[: int(self.query.get("max-keys", 1000))]
        items = [
            f"<Contents><Key>{escape(key)}</Key><Size>{len(self.objects[key])}</Size>"
            "<LastModified>2026-01-01T00:00:00.000Z</LastModified></Contents>"
            for key in keys
        ] + [
            f"<CommonPrefixes><Prefix>{escape(name)}</Prefix></CommonPrefixes>" for name in folders
        ]
        count = f"<IsTruncated>false</IsTruncated><KeyCount>{len(items)}</KeyCount>"
        return _xml("ListBucketResult", count + "".join(items))

    def _put(self):
        if "uploadId" in self.query:
            parts = self.server.uploads[self.query["uploadId"]]
            parts[int(self.query["partNumber"])] = self.body
        else:
            self.objects[self.key] = self.body
        self._answer(headers={"ETag": _etag(self.body)})

    def _post(self):
        if "uploads" in self.query:
            upload = uuid.uuid4().hex
            self.server.uploads[upload] = {}
            told = f"<UploadId>{upload}</UploadId>"
            self._answer(_xml("InitiateMultipartUploadResult", told))
            return
        parts = self.server.uploads.pop(self.query["uploadId"])
        self.objects[self.key] = b"".join(parts[number] for number in sorted(parts))
        self._answer(_xml("CompleteMultipartUploadResult", '<ETag>"0"</ETag>'))

    def _delete(self):
        if "uploadId" in self.query:
            self.server.uploads.pop(self.query["uploadId"], None)
        else:
            self.objects.pop(self.key, None)
        self._answer(status=204)

    def _answer(self, content=b"", status=200, headers=None):
        self.send_response(status)
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def _refuse(self, status, code):
        self._answer(_xml("Error", f"<Code>{code}</Code><Message>{code}</Message>"), status)

    def _read_body(self):
        if self.headers.get("Transfer-Encoding") == "chunked":
            return self._read_chunks()
        return self.rfile.read(int(self.headers.get("Content-Length", 0)))

    def _is_framed(self):
        return "aws-chunked" in self.headers.get("Content-Encoding", "")

    def _read_chunks(self):
        body = b""
        while size := int(self.rfile.readline(), 16):
            body += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return body


def _unframe(framed):
    """What is in the chunks of S3's own framing, without the checksums that follow them."""
    body = b""
    while framed:
        head, _, framed = framed.partition(b"\r\n")
        if not (size := int(head.partition(b";")[0], 16)):
            break
        body, framed = body + framed[:size], framed[size + 2 :]
    return body


def _etag(content):
    return f'"{hashlib.md5(content, usedforsecurity=False).hexdigest()}"'


def _xml(name, content):
    space = "http://s3.amazonaws.com/doc/2006-03-01/"
    return f'<?xml version="1.0"?><{name} xmlns="{space}">{content}</{name}>'.encode()
