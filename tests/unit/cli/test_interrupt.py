"""Ctrl-C and closed pipes, in a process of its own."""

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from cache2cache.testing import tiny_model

COMMAND = (sys.executable, "-m", "cache2cache")


@pytest.fixture
def endless(tmp_path: Path) -> Path:
    """A saved model that never ends an answer by itself."""
    lm = tiny_model("qwen3", max_position_embeddings=100_000)
    lm.model.generation_config.eos_token_id = None
    lm.model.config.eos_token_id = None
    lm.model.save_pretrained(tmp_path)
    lm.tokenizer.save_pretrained(tmp_path)
    return tmp_path


@contextmanager
def streaming(model: Path) -> Iterator[subprocess.Popen[bytes]]:
    """`c2c generate --stream`, once it has begun to answer."""
    args = (*COMMAND, "generate", "hi", "-r", str(model), "--no-sharer", "--stream", "--max-new-tokens", "90000")

    def hear_ctrl_c() -> None:
        # A shell starts its background jobs, and so a test run in one, with SIGINT ignored; children inherit that.
        signal.signal(signal.SIGINT, signal.SIG_DFL)

    with subprocess.Popen(
        args, stdout=subprocess.PIPE, stderr=subprocess.PIPE, preexec_fn=hear_ctrl_c if os.name == "posix" else None
    ) as process:
        try:
            assert process.stdout is not None
            assert process.stdout.read(1), "it has begun to answer"
            yield process
        finally:
            process.kill()


@pytest.mark.skipif(os.name == "nt", reason="no SIGINT to send there")
def test_ctrl_c_ends_a_stream_without_a_traceback(endless: Path):
    with streaming(endless) as process:
        process.send_signal(signal.SIGINT)
        _, said = process.communicate(timeout=60)
    assert process.returncode == 130
    assert b"Traceback" not in said
    assert said.strip() == b""


@pytest.mark.skipif(os.name == "nt", reason="another kind of pipe")
def test_a_reader_that_leaves_is_no_error(endless: Path):
    with streaming(endless) as process:
        assert process.stdout is not None
        process.stdout.close()
        process.stdout = None
        _, said = process.communicate(timeout=60)
    assert said.strip() == b""
