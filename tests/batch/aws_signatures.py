"""Checks that a request is signed with the keys of an account.

Source: Amazon S3 API reference, "Authenticating Requests: Using the Authorization Header (AWS
Signature Version 4)". The parts of a body that is sent in signed chunks are not checked.
"""

import hashlib
import hmac
from urllib.parse import parse_qsl, quote, urlsplit


def refusal(command, path, headers, body, keys):
    """The code of S3's error; None if the signature is right.

    Args:
        command: The HTTP method.
        path: As it was sent, with the query.
        headers: By name, whatever its case.
        body: As it was sent, without the framing of chunks by HTTP.
        keys: The id of the access key, and the secret.
    """
    scheme, _, rest = headers.get("Authorization", "").partition(" ")
    if scheme != "AWS4-HMAC-SHA256":
        return "AccessDenied"
    told = dict(part.strip().split("=", 1) for part in rest.split(","))
    key_id, *scope = told["Credential"].split("/")
    if key_id != keys[0]:
        return "InvalidAccessKeyId"
    digest = headers["x-amz-content-sha256"]
    if len(digest) == 64 and digest != hashlib.sha256(body).hexdigest():
        return "XAmzContentSHA256Mismatch"
    request = _canonical_request(command, path, headers, told["SignedHeaders"].split(";"), digest)
    signed = "\n".join(
        [scheme, headers["x-amz-date"], "/".join(scope), hashlib.sha256(request).hexdigest()]
    )
    key = f"AWS4{keys[1]}".encode()
    for part in (*scope, signed):
        key = hmac.digest(key, part.encode(), "sha256")
    return None if hmac.compare_digest(key.hex(), told["Signature"]) else "SignatureDoesNotMatch"


def _canonical_request(command, path, headers, names, digest):
    url = urlsplit(path)
    query = sorted(
        f"{quote(name, safe='~')}={quote(value, safe='~')}"
        for name, value in parse_qsl(url.query, keep_blank_values=True)
    )
    lines = [f"{name}:{' '.join(headers[name].split())}" for name in names]
    return "\n".join(
        [command, url.path, "&".join(query), *lines, "", ";".join(names), digest]
    ).encode()
