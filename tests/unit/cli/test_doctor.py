import builtins
import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from cache2cache.cli import app, doctor


def test_json(monkeypatch: pytest.MonkeyPatch):
    result = CliRunner().invoke(app, ["doctor", "--json"])
    assert result.exit_code == 0, result.output
    report = json.loads(result.stdout)
    assert report["problems"] == []
    assert set(report["versions"]) >= {"cache2cache", "python", "torch", "transformers"}
    assert report["devices"]["cpu"]["threads"] >= 1
    assert all(rate > 1e6 for rate in report["devices"]["cpu"]["products_per_second"].values())
    assert report["cache"]["free_bytes"] > 0
    assert set(report["extras"]) == set(doctor.OFFERS)


def test_text_names_every_section():
    result = CliRunner().invoke(app, ["doctor"])
    assert result.exit_code == 0, result.output
    for word in ("cache2cache", "torch", "cpu", "cache", *doctor.OFFERS):
        assert word in result.stdout


@pytest.mark.parametrize("faster", ["float32", "bfloat16"])
def test_the_dtype_that_is_faster_is_named(monkeypatch: pytest.MonkeyPatch, faster: str):
    rates = {"float32": 3e11, "bfloat16": 2e11, faster: 1e12}
    monkeypatch.setattr(doctor, "_products", lambda: rates)
    said = " ".join(CliRunner().invoke(app, ["doctor"]).stdout.split())
    assert f"{faster} 1,000" in said and f"--dtype {faster}" in said


def test_a_missing_extra_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(doctor, "_satisfied", lambda name, specifier: name != "scipy")
    said = " ".join(CliRunner().invoke(app, ["doctor"]).stdout.split())
    assert "missing scipy>=" in said
    assert "pip install 'cache2cache[eval]'" in said


def test_cached_models_are_listed(monkeypatch: pytest.MonkeyPatch, tmp_path):
    monkeypatch.setenv("C2C_HOME", str(tmp_path))
    (tmp_path / "models" / "some-model").mkdir(parents=True)
    (tmp_path / "models" / "some-model" / "model.safetensors").write_bytes(bytes(2_000_000))
    assert "some-model 2 MB" in " ".join(CliRunner().invoke(app, ["doctor"]).stdout.split())


@pytest.mark.parametrize(
    ("devices", "named"),
    [
        ({"cuda": [], "mps": False}, ["cpu", "", "gpu"]),
        ({"cuda": [], "mps": True}, ["cpu", "", "mps"]),
        ({"cuda": [{"device": "cuda:0", "name": "H", "bytes": 1, "bf16": True}], "mps": False}, ["cpu", "", "cuda:0"]),
    ],
)
def test_no_gpu_is_said(devices: dict[str, Any], named: list[str]):
    cpu = {"cores": 2, "threads": 2, "flags": [], "products_per_second": {"float32": 1e9}}
    rows = doctor._device_rows({"cpu": cpu, **devices})
    assert [name for name, _ in rows] == named


def test_a_cache_that_is_a_file_is_a_finding(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    (tmp_path / "file").touch()
    monkeypatch.setenv("C2C_HOME", str(tmp_path / "file"))
    result = CliRunner().invoke(app, ["doctor", "--json"])
    assert json.loads(result.output)["problems"] == [f"{tmp_path / 'file'} is a file: set C2C_HOME to a folder"]


def test_broken_torch_is_a_finding(monkeypatch: pytest.MonkeyPatch):
    real = builtins.__import__

    def broken(name: str, *args: Any, **kwargs: Any):
        if name == "torch":
            raise OSError("libtorch.so: cannot open shared object file")
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", broken)
    result = CliRunner().invoke(app, ["doctor"])
    assert result.exit_code == 1
    assert "torch cannot be imported: OSError: libtorch.so" in result.output
    assert "gpu" not in result.output, "nobody knows"


@pytest.mark.parametrize(
    ("size", "text"), [(0, "0 B"), (999, "999 B"), (98_362_432, "98 MB"), (3.1e9, "3.1 GB"), (2e12, "2.0 TB")]
)
def test_sizes_for_people(size: float, text: str):
    assert doctor.human(size) == text
