"""A receiver as vLLM reads models: a folder with its weights, as they are loaded here, whatever they came from."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
from pathlib import Path

import transformers

from cache2cache.models.load import LanguageModel, weights_fingerprint
from cache2cache.models.pull import home


def export(lm: LanguageModel) -> Path:
    """The folder of a model; it is made once, and shown when it is complete.

    Raises:
        OSError: the disk is full, or the cache folder cannot be written.
    """
    identity = [
        weights_fingerprint(lm.model),
        lm.card.tokenizer,
        lm.model.config.to_json_string(),
        str(lm.dtype),
        transformers.__version__,
    ]
    digest = hashlib.sha256(json.dumps(identity).encode()).hexdigest()[:16]
    folder = home() / "vllm" / f"{Path(lm.card.id).name}-{digest}"
    if folder.exists():
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    made = Path(tempfile.mkdtemp(prefix="partial-", dir=folder.parent))
    try:
        lm.model.save_pretrained(made)
        lm.tokenizer.save_pretrained(made)
        os.replace(made, folder)
    except OSError:
        if not folder.exists():  # unless another process was faster
            raise
    finally:
        shutil.rmtree(made, ignore_errors=True)
    return folder
