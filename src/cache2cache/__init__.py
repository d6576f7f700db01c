"""Cache-to-Cache: language models that talk through their KV-caches instead of text.

>>> from cache2cache import C2C
>>> pair = C2C.from_pretrained("smollm2-135m", sharers=["qwen2.5-coder-1.5b"], fusers=["demo"])
>>> pair.generate([{"role": "user", "content": "…"}], max_new_tokens=8).text
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from cache2cache.chat import Chat
    from cache2cache.errors import C2CError
    from cache2cache.fuser.base import Fuser, FuserConfig
    from cache2cache.models.load import LanguageModel
    from cache2cache.pipeline import C2C

__all__ = ["C2C", "C2CError", "Chat", "Fuser", "FuserConfig", "LanguageModel", "__version__"]

# Imported on use: `import cache2cache` and `c2c --help` must not wait for torch.
_HOME = {
    "C2C": "pipeline",
    "Chat": "chat",
    "C2CError": "errors",
    "Fuser": "fuser.base",
    "FuserConfig": "fuser.base",
    "LanguageModel": "models.load",
}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'cache2cache' has no attribute {name!r}")
    return getattr(import_module(f"cache2cache.{_HOME[name]}"), name)
