"""Who may ask, how often, and what is written down: API keys, rate limits, response headers, the audit log."""

from __future__ import annotations

import hashlib
import hmac
import json
import math
import os
import secrets
import time
from collections.abc import Callable, Mapping
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from errors import ConfigError, RequestError
from runtime import log

MIN_KEY_LENGTH = 16
SECURITY_HEADERS = {
    "content-security-policy": (
        "default-src 'self'; img-src 'self' blob: data:; object-src 'none'; base-uri 'none'; form-action 'self'; "
        "frame-ancestors 'none'"
    ),
    "x-content-type-options": "nosniff",
    "x-frame-options": "DENY",
    "referrer-policy": "no-referrer",
    "cross-origin-opener-policy": "same-origin",
    "cross-origin-resource-policy": "same-origin",
    "permissions-policy": "camera=(), microphone=(), geolocation=()",
    "cache-control": "no-store",
}


class ApiKeys:
    """Named keys, kept as salted hashes only."""

    def __init__(self, keys: Mapping[str, str]) -> None:
        self._salt = secrets.token_bytes(16)
        self._digests = {name: self._digest(key.encode()) for name, key in keys.items()}

    def __bool__(self) -> bool:
        return bool(self._digests)

    def _digest(self, key: bytes) -> bytes:
        return hashlib.sha256(self._salt + key).digest()

    def name_of(self, headers: Mapping[bytes, bytes]) -> str:
        """Whose key stands in `Authorization: Bearer` or `X-API-Key`; RequestError 401 for none or a wrong one."""
        given = headers.get(b"x-api-key", b"")
        scheme, _, token = headers.get(b"authorization", b"").partition(b" ")
        if not given and scheme.lower() == b"bearer":
            given = token.strip()
        digest = self._digest(given)
        # Every key is compared, whichever fits: the time taken tells nothing.
        names = [name for name, known in self._digests.items() if hmac.compare_digest(digest, known)]
        if not names:
            raise RequestError(401, "a valid API key is needed: send it as `Authorization: Bearer KEY`")
        return names[0]


def read_keys(text: str | None, file: Path | None) -> ApiKeys:
    """The keys of `name:key,name:key` and of a file with one name:key a line, # for comments; ConfigError."""
    entries = [(item.strip(), "MEDIMG_API_KEYS") for item in (text or "").split(",") if item.strip()]
    if file is not None:
        entries += [(line, f"{file}:{number}") for number, line in _lines(file)]
        if not entries:
            raise ConfigError(f"--api-keys-file {file}: holds no key; write one name:key a line")
    keys: dict[str, str] = {}
    for entry, source in entries:
        name, _, key = (part.strip() for part in entry.partition(":"))
        if not name or len(key) < MIN_KEY_LENGTH:
            raise ConfigError(f"{source}: write name:key, the key of at least {MIN_KEY_LENGTH} characters")
        if name in keys:
            raise ConfigError(f"{source}: the name {name!r} occurs twice; give each key its own")
        keys[name] = key
    return ApiKeys(keys)


def _lines(file: Path) -> list[tuple[int, str]]:
    try:
        text = file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "it is not UTF-8 text"
        raise ConfigError(f"--api-keys-file {file}: cannot be read ({reason}); name another file") from None
    lines = ((number, line.strip()) for number, line in enumerate(text.splitlines(), start=1))
    return [(number, line) for number, line in lines if line and not line.startswith("#")]


class RateLimiter:
    """A token bucket for each key: `per_second` on average, `burst` at once."""

    def __init__(self, *, per_second: float, burst: int, clock: Callable[[], float] = time.monotonic) -> None:
        self.per_second, self.burst, self._clock = per_second, burst, clock
        self._buckets: dict[str, tuple[float, float]] = {}

    def take(self, name: str) -> None:
        """Take one token from the bucket of `name`; RequestError 429 when it is empty."""
        if not self.per_second:
            return
        now = self._clock()
        tokens, then = self._buckets.get(name, (float(self.burst), now))
        tokens = min(float(self.burst), tokens + (now - then) * self.per_second)
        if tokens < 1:
            self._buckets[name] = tokens, now
            wait = max(1, math.ceil((1 - tokens) / self.per_second))
            raise RequestError(429, f"more than {self.per_second:g} requests a second; slow down", retry_after=wait)
        self._buckets[name] = tokens - 1, now


class AuditLog:
    """JSON lines: who asked when, the content's keyed hash, what was answered by which model. Never the content."""

    def __init__(self, path: Path) -> None:
        # With a salt of the operator's own the same film has the same hash after a restart; without, it has not.
        self._salt = os.environ.get("MEDIMG_AUDIT_SALT", "").encode() or secrets.token_bytes(32)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._file = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
        except OSError as error:
            raise ConfigError(f"--audit-log {path}: cannot be written ({error.strerror}); name another file") from None

    def write(self, *, key: str, content: bytes | memoryview, result: Mapping[str, Any], model_version: str) -> None:
        """Append one line; RequestError 503 when it cannot be written: what is not on record is not answered."""
        digest = hmac.new(self._salt, content, hashlib.sha256).hexdigest()
        entry = {
            "time": datetime.now(timezone.utc).isoformat(timespec="milliseconds"),
            "key": key,
            "content_hmac": digest,
            **result,
            "model_version": model_version,
        }
        try:
            os.write(self._file, json.dumps(entry, allow_nan=False).encode() + b"\n")
        except OSError as error:
            log.error("the audit log cannot be written: %s", error.strerror)
            raise RequestError(503, "the answer could not be put on record", retry_after=30) from None

    def close(self) -> None:
        """Close the file."""
        os.close(self._file)
