from pathlib import Path
from typing import Any

import pytest

from cache2cache import C2C
from cache2cache.fuser.base import Fuser
from cache2cache.models.load import LanguageModel


@pytest.fixture
def asked(
    monkeypatch: pytest.MonkeyPatch, receiver: LanguageModel, sharer: LanguageModel, fuser: Fuser
) -> dict[str, Any]:
    """Makes `C2C.from_pretrained` return the tiny pair; what it and `generate` were asked for is in the dict."""
    asked: dict[str, Any] = {}
    real_decode = C2C.decode

    def from_pretrained(receiver_name: str, sharers: list[str], fusers: list[str], **options: Any) -> C2C:
        asked.update(receiver=receiver_name, sharers=sharers, fusers=fusers, **options)
        return C2C(receiver, [sharer] * len(sharers), [fuser] * len(fusers))

    def decode(self: C2C, prefill: Any, **kwargs: Any) -> Any:
        asked["kwargs"] = kwargs
        return real_decode(self, prefill, **kwargs)

    monkeypatch.setattr(C2C, "from_pretrained", from_pretrained)
    monkeypatch.setattr(C2C, "decode", decode)
    return asked


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    """The shortest recipe there is, for commands that are kept from running it."""
    path = tmp_path / "recipe.toml"
    path.write_text(
        'receiver = "r"\nsharer = "s"\n[data]\ntrain = [{path = "a.jsonl"}]\nvalidation = [{path = "b.jsonl"}]\n'
    )
    return path
