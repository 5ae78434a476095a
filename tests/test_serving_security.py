"""serving_security.py: keys that are compared and not kept, buckets that refill, an audit line for each answer."""

from __future__ import annotations

import hashlib
import hmac
import json
import stat
from pathlib import Path

import pytest

from errors import ConfigError, RequestError
from serving_security import SECURITY_HEADERS, ApiKeys, AuditLog, RateLimiter, read_keys

KEY = "0123456789abcdef"
OTHER = "fedcba9876543210"


@pytest.mark.parametrize(
    "headers",
    [
        {b"authorization": b"Bearer " + OTHER.encode()},
        {b"authorization": f"bearer  {OTHER}".encode()},
        {b"x-api-key": OTHER.encode()},
    ],
)
def test_a_key_is_known_by_its_name_in_either_header(headers: dict[bytes, bytes]) -> None:
    assert ApiKeys({"ward": KEY, "research": OTHER}).name_of(headers) == "research"


@pytest.mark.parametrize(
    "headers",
    [
        {},
        {b"authorization": b""},
        {b"authorization": b"Basic " + KEY.encode()},
        {b"authorization": b"Bearer " + KEY.encode() + b"x"},
        {b"x-api-key": KEY[:-1].encode()},
        {b"x-api-key": b"\xff\xfe"},
    ],
)
def test_anything_else_is_refused(headers: dict[bytes, bytes]) -> None:
    with pytest.raises(RequestError, match="a valid API key is needed") as caught:
        ApiKeys({"ward": KEY}).name_of(headers)
    assert caught.value.status == 401


def test_no_key_stays_in_memory() -> None:
    assert KEY not in repr(vars(ApiKeys({"ward": KEY})))


def test_keys_come_from_the_environment_and_a_file(tmp_path: Path) -> None:
    file = tmp_path / "keys"
    file.write_text(f"# wards\n\nresearch : {OTHER}\n")
    keys = read_keys(f"ward:{KEY},", file)
    assert keys.name_of({b"x-api-key": OTHER.encode()}) == "research"
    assert keys.name_of({b"x-api-key": KEY.encode()}) == "ward"
    assert not read_keys(None, None)


@pytest.mark.parametrize(
    ("text", "content", "reason"),
    [
        ("ward", None, "MEDIMG_API_KEYS: write name:key"),
        ("ward:short", None, "at least 16 characters"),
        (None, f"a:{KEY}\nb", "keys:2: write name:key"),
        (None, f"a:{KEY}\na:{OTHER}", "keys:2: the name 'a' occurs twice"),
        (None, "# none\n", "holds no key"),
        (None, b"\xff\xfe", "cannot be read .it is not UTF-8"),
    ],
)
def test_malformed_keys_are_refused_without_showing_them(
    tmp_path: Path, text: str | None, content: str | bytes | None, reason: str
) -> None:
    file = None
    if content is not None:
        file = tmp_path / "keys"
        file.write_bytes(content.encode() if isinstance(content, str) else content)
    with pytest.raises(ConfigError, match=reason) as caught:
        read_keys(text, file)
    assert "short" not in str(caught.value).replace("shorter", "") and KEY not in str(caught.value)


def test_a_missing_keys_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="--api-keys-file .*none: cannot be read"):
        read_keys(None, tmp_path / "none")


def test_a_bucket_allows_a_burst_then_the_rate_and_each_key_has_its_own() -> None:
    now = 0.0
    limiter = RateLimiter(per_second=2.0, burst=3, clock=lambda: now)
    for _ in range(3):
        limiter.take("a")
    with pytest.raises(RequestError, match="more than 2 requests a second") as caught:
        limiter.take("a")
    assert (caught.value.status, caught.value.retry_after) == (429, 1)
    limiter.take("b")
    now = 0.5
    limiter.take("a")
    with pytest.raises(RequestError):
        limiter.take("a")
    now = 100.0
    for _ in range(3):
        limiter.take("a")
    with pytest.raises(RequestError):
        limiter.take("a")


def test_no_rate_no_limit() -> None:
    limiter = RateLimiter(per_second=0, burst=1)
    for _ in range(1000):
        limiter.take("a")


def test_an_audit_line_says_who_when_what_and_never_the_content(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MEDIMG_AUDIT_SALT", "salt")
    path = tmp_path / "new" / "audit.jsonl"
    for _ in range(2):
        log = AuditLog(path)
        log.write(key="ward", content=b"film", result={"prediction": "P"}, model_version="m-1")
        log.close()
    first, second = (json.loads(line) for line in path.read_text().splitlines())
    assert first["content_hmac"] == second["content_hmac"] == hmac.new(b"salt", b"film", hashlib.sha256).hexdigest()
    assert {name: first[name] for name in ("key", "prediction", "model_version")} == {
        "key": "ward",
        "prediction": "P",
        "model_version": "m-1",
    }
    assert stat.S_IMODE(path.stat().st_mode) == 0o600 and "film" not in path.read_text()


def test_without_a_salt_of_ones_own_hashes_do_not_outlive_the_process(tmp_path: Path) -> None:
    hashes = set()
    for number in range(2):
        log = AuditLog(tmp_path / f"{number}")
        log.write(key="", content=b"film", result={}, model_version="m")
        hashes.add(json.loads((tmp_path / f"{number}").read_text())["content_hmac"])
    assert len(hashes) == 2


def test_an_audit_log_that_cannot_be_opened_or_written_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="--audit-log .*: cannot be written .Is a directory"):
        AuditLog(tmp_path)
    with pytest.raises(RequestError, match="could not be put on record") as caught:
        AuditLog(Path("/dev/full")).write(key="", content=b"", result={}, model_version="m")
    assert caught.value.status == 503


def test_the_page_may_load_nothing_from_elsewhere() -> None:
    policy = SECURITY_HEADERS["content-security-policy"]
    assert "default-src 'self'" in policy and "unsafe" not in policy and "http" not in policy
