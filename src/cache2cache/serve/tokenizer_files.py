"""A tokenizer as text files, to be had without the model."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from pathlib import Path

from transformers import AutoTokenizer, PreTrainedTokenizerBase

from cache2cache.errors import ModelError
from cache2cache.models.load import fingerprint
from cache2cache.serve.wire import TOKENIZER_FILES


def pack(tokenizer: PreTrainedTokenizerBase) -> dict[str, str]:
    """Its files by name.

    Raises:
        ModelError: read again, they are another tokenizer.
    """
    with tempfile.TemporaryDirectory() as folder:
        tokenizer.save_pretrained(folder)
        there = (Path(folder) / name for name in TOKENIZER_FILES)
        files = {path.name: path.read_text("utf-8") for path in there if path.exists()}
    unpack(files, fingerprint(tokenizer))
    return files


def unpack(files: Mapping[str, str], expected: str | None) -> PreTrainedTokenizerBase:
    """The tokenizer of some files. No code that they name is run.

    Args:
        expected: its fingerprint.

    Raises:
        ModelError: files that are no tokenizer, or another one.
    """
    if unknown := sorted(set(files) - set(TOKENIZER_FILES)):
        raise ModelError("unknown tokenizer files", got=[name[:40] for name in unknown[:5]], allowed=TOKENIZER_FILES)
    with tempfile.TemporaryDirectory() as folder:
        for name, text in files.items():
            (Path(folder) / name).write_text(text, "utf-8")
        try:
            tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
        except Exception as error:  # parsers of four formats, of which one is written in Rust
            raise ModelError("the tokenizer's files cannot be read", got=f"{type(error).__name__}: {error}") from error
    if not tokenizer.is_fast or fingerprint(tokenizer) != expected:
        raise ModelError("the tokenizer is not the one that it should be", got=fingerprint(tokenizer), allowed=expected)
    return tokenizer
