"""Bytes that prove to be whole, and with a shared key also whose they are. Knows nothing of caches.

    prelude   magic, format version, signed or not, length of the header, length of the body
    header    at most 64 KiB
    body
    digest    SHA-256 of all before it
    signature HMAC-SHA256 of the digest under the shared key, only if signed

The digest notices accidents; anyone can compute it. The signature covers the digest, and so everything, once.
Nothing is parsed before both are right, and no length is believed before the bytes are there.
"""

from __future__ import annotations

import hashlib
import hmac
import io
import struct

from cache2cache.errors import MissingExtraError, PayloadError

FORMAT_VERSION = 1
MAX_HEADER_BYTES = 1 << 16

_MAGIC = b"C2C\xf0kv"  # not text and not UTF-8, so no proxy's error page passes for a payload
_PRELUDE = struct.Struct("<6sHBIQ")
_DIGEST_BYTES = hashlib.sha256().digest_size
_ZSTD_LEVEL = 3
_ZSTD_WINDOW_BYTES = 1 << 23
"""Largest that a frame may ask for; level 3 asks for at most 2 MiB."""
_CHUNK_BYTES = 1 << 20


def seal(header: bytes, body: bytes, key: bytes | None = None) -> bytes:
    """Header and body with digest, and signature if there is a key.

    Raises:
        PayloadError: the header is too long, or the key is empty.
    """
    _check_key(key)
    if len(header) > MAX_HEADER_BYTES:
        raise PayloadError(
            "the header is too long", got=f"{len(header):,} bytes", allowed=f"up to {MAX_HEADER_BYTES:,}"
        )
    prelude = _PRELUDE.pack(_MAGIC, FORMAT_VERSION, key is not None, len(header), len(body))
    digest = _digest(prelude, header, body)
    return b"".join((prelude, header, body, digest, b"" if key is None else _signature(key, digest)))


def unseal(data: bytes, key: bytes | None = None) -> tuple[bytes, memoryview]:
    """Header and body (a view of `data`), proved whole, and with a key also signed by it.

    Raises:
        PayloadError: not a payload, another version, truncated, continued, damaged, signed by another key; also signed
            without a key to check it with, or with a key and not signed.
    """
    _check_key(key)
    if len(data) < _PRELUDE.size:
        raise PayloadError("not a payload", got=f"{len(data)} bytes", allowed=f"at least {_PRELUDE.size}")
    magic, version, signed, header_bytes, body_bytes = _PRELUDE.unpack_from(data)
    if magic != _MAGIC:
        raise PayloadError("not a payload", got=f"a beginning of {magic!r}", allowed=repr(_MAGIC))
    if version != FORMAT_VERSION:
        raise PayloadError(
            "a payload of another format version", got=version, allowed=FORMAT_VERSION,
            hint="Run the same version of cache2cache on both sides",
        )  # fmt: skip
    if signed != (key is not None):
        raise PayloadError(
            "the payload is not signed, but a key is required" if key else "the payload is signed, but no key is given",
            hint="Give both sides the same key, or none to either",
        )
    end = _PRELUDE.size + header_bytes + body_bytes
    total = end + _DIGEST_BYTES * (1 + signed)
    if header_bytes > MAX_HEADER_BYTES or total != len(data):
        raise PayloadError(
            "the payload's lengths are wrong: it is truncated, continued or damaged",
            got=f"{len(data):,} bytes, a header of {header_bytes:,}",
            allowed=f"{total:,} bytes, a header of up to {MAX_HEADER_BYTES:,}",
        )
    view = memoryview(data)
    digest = _digest(view[:end])
    if not hmac.compare_digest(digest, view[end : end + _DIGEST_BYTES]):
        raise PayloadError("the payload is damaged: its digest is wrong")
    if key is not None and not hmac.compare_digest(_signature(key, digest), view[end + _DIGEST_BYTES :]):
        raise PayloadError("the payload is not signed with this key", hint="Give both sides the same key")
    split = _PRELUDE.size + header_bytes
    return bytes(view[_PRELUDE.size : split]), view[split:end]


def compress(body: bytes) -> bytes:
    """One zstd frame.

    Raises:
        MissingExtraError: zstandard is not installed.
    """
    return _zstandard().ZstdCompressor(level=_ZSTD_LEVEL).compress(body)


def decompress(body: memoryview, size: int) -> bytes:
    """What was compressed; memory grows with what really comes out, never beyond `size` and one chunk.

    Args:
        size: bytes that must come out, no more and no less.

    Raises:
        PayloadError: not zstd, or of another size.
        MissingExtraError: zstandard is not installed.
    """
    zstandard = _zstandard()
    out = io.BytesIO()
    try:
        # All frames, so that nothing behind the first one is left unread.
        frames = zstandard.ZstdDecompressor(max_window_size=_ZSTD_WINDOW_BYTES).stream_reader(
            body, read_across_frames=True
        )
        while chunk := frames.read(min(_CHUNK_BYTES, size + 1 - out.tell())):
            out.write(chunk)
    except zstandard.ZstdError as error:
        raise PayloadError("the payload's body cannot be decompressed", got=str(error)) from error
    if out.tell() != size:
        got = f"more than {size:,} bytes" if out.tell() > size else f"{out.tell():,} bytes"
        raise PayloadError("the payload's body has another size than its header says", got=got, allowed=f"{size:,}")
    return out.getvalue()


def _zstandard():
    try:
        import zstandard
    except ImportError as error:
        raise MissingExtraError(
            "compressed payloads need zstandard", hint="pip install 'cache2cache[serve]'"
        ) from error
    return zstandard


def _check_key(key: bytes | None) -> None:
    if key is not None and not key:
        raise PayloadError("the key is empty, so anyone could sign", hint="Use 32 random bytes, or None for no key")


def _digest(*parts: bytes | memoryview) -> bytes:
    digest = hashlib.sha256()
    for part in parts:
        digest.update(part)
    return digest.digest()


def _signature(key: bytes, digest: bytes) -> bytes:
    return hmac.digest(key, digest, "sha256")
