"""Importing the package and asking for help must not wait for torch."""

import subprocess
import sys

import pytest

HEAVY = {
    *("torch", "transformers", "numpy", "huggingface_hub", "gguf", "scipy", "matplotlib", "accelerate", "datasets"),
    *("fastapi", "httpx2", "uvicorn"),
}


@pytest.mark.parametrize(
    "code",
    [
        "import cache2cache",
        "import cache2cache.cli",
        "from cache2cache.cli import app; app(['--help'], standalone_mode=False)",
        "from cache2cache.cli import app; app(['generate', '--help'], standalone_mode=False)",
        "from cache2cache.cli import app; app(['train', '--help'], standalone_mode=False)",
        "from cache2cache.cli import app; app(['features', '--help'], standalone_mode=False)",
        "from cache2cache.cli import app; app(['serve', '--help'], standalone_mode=False)",
        "from cache2cache.cli import app; app(['share', '--help'], standalone_mode=False)",
    ],
)
def test_imports_nothing_heavy(code: str):
    script = f"import sys\ntry:\n    {code}\nexcept SystemExit:\n    pass\nprint(sorted({HEAVY} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"


def test_module_and_script_are_the_same_program():
    done = subprocess.run(
        [sys.executable, "-m", "cache2cache", "--version"], capture_output=True, text=True, check=True
    )
    import cache2cache

    assert done.stdout.strip() == f"cache2cache {cache2cache.__version__}"


def test_everything_promised_can_be_imported():
    import cache2cache

    for name in cache2cache.__all__:
        assert getattr(cache2cache, name) is not None
    with pytest.raises(AttributeError, match="nonsense"):
        _ = cache2cache.nonsense
