"""Ctrl-C and closed pipes, in a process of its own."""

import os
import signal
import subprocess
import sys
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


@pytest.mark.skipif(os.name == "nt", reason="no SIGINT to send there")
def test_ctrl_c_ends_a_stream_without_a_traceback(endless: Path):
    args = (*COMMAND, "generate", "hi", "-r", str(endless), "--no-sharer", "--stream", "--max-new-tokens", "90000")
    with subprocess.Popen(args, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stdout.read(1), "it has begun to answer"
        process.send_signal(signal.SIGINT)
        _, said = process.communicate(timeout=120)
    assert process.returncode == 130
    assert b"Traceback" not in said
    assert said.strip() == b""


@pytest.mark.skipif(os.name == "nt", reason="another kind of pipe")
def test_a_reader_that_leaves_is_no_error(endless: Path):
    args = (*COMMAND, "generate", "hi", "-r", str(endless), "--no-sharer", "--stream", "--max-new-tokens", "90000")
    with subprocess.Popen(args, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stdout.read(1)
        process.stdout.close()
        assert process.stderr is not None
        said = process.stderr.read()
        process.wait(timeout=120)
    assert said.strip() == b""
