"""`c2c doctor`: what this machine has, what is cached, what is missing and how to get it."""

from __future__ import annotations

import json as jsonlib
import os
import platform
import shutil
from pathlib import Path
from typing import Annotated, Any

import typer

from cache2cache import __version__
from cache2cache.cli.console import ExitCode
from cache2cache.models.disk import human

PACKAGES = ("torch", "transformers", "tokenizers", "safetensors", "huggingface_hub", "gguf", "numpy")
OFFERS = {
    "train": "c2c train: data sets, TensorBoard",
    "eval": "c2c eval: tasks, statistics, figures",
    "lm-eval": "the model c2c for lm-evaluation-harness",
    "serve": "c2c serve: a pair behind the OpenAI API; c2c share: a sharer elsewhere",
    "vllm": "c2c serve --engine vllm: answers written by vLLM",
    "test": "this package's own tests",
}
"""Extra → what it is for."""

_CPU_FLAGS = ("avx2", "avx512f", "avx512_bf16", "amx_bf16", "bf16")
"""Flags of /proc/cpuinfo that say how fast float32 and bf16 can be; the last is ARM's."""


def doctor(
    json: Annotated[bool, typer.Option("--json", help="The same for machines.")] = False,
) -> None:
    """Show versions, devices, cached models, disk space, and what each extra offers."""
    report = examine()
    if json:
        typer.echo(jsonlib.dumps(report, indent=1))
    else:
        show(report)
    if report["problems"]:
        raise typer.Exit(ExitCode.ERROR)


def examine() -> dict[str, Any]:
    """Everything that the doctor knows. Needs nothing but this package: a broken torch is a finding, not a crash."""
    problems: list[str] = []
    return {
        "versions": _versions(problems),
        "devices": _devices(problems),
        "cache": _cache(problems),
        "extras": _extras(problems),
        "problems": problems,
    }


def _versions(problems: list[str]) -> dict[str, str | None]:
    from importlib import metadata

    versions: dict[str, str | None] = {
        "cache2cache": __version__,
        "python": platform.python_version(),
        "system": platform.platform(),
    }
    for name in PACKAGES:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            versions[name] = None
            problems.append(f"{name} is not installed: pip install cache2cache")
    return versions


def _devices(problems: list[str]) -> dict[str, Any]:
    devices: dict[str, Any] = {"cpu": {"cores": os.cpu_count(), "flags": cpu_flags(), "threads": None}, "cuda": []}
    try:
        import torch
    except Exception as error:  # a broken installation fails in any way it likes
        problems.append(f"torch cannot be imported: {type(error).__name__}: {error}")
        return devices
    devices["cpu"]["threads"] = torch.get_num_threads()
    devices["cpu"]["products_per_second"] = _products()
    if torch.cuda.is_available():
        for index in range(torch.cuda.device_count()):
            card = torch.cuda.get_device_properties(index)
            devices["cuda"].append(
                {"device": f"cuda:{index}", "name": card.name, "bytes": card.total_memory,
                 "bf16": torch.cuda.is_bf16_supported()}
            )  # fmt: skip
    devices["mps"] = torch.backends.mps.is_available()
    return devices


def _products() -> dict[str, float]:
    """Operations per second by dtype. Flags do not tell: there are processors that have bf16 and are slower in it."""
    import torch

    from cache2cache.models.rate import products_per_second

    dtypes = {"float32": torch.float32, "bfloat16": torch.bfloat16}
    return {name: products_per_second(dtype, torch.device("cpu"), 1024) for name, dtype in dtypes.items()}


def cpu_flags() -> list[str] | None:
    """Which of the flags that matter this processor has; None where the system does not tell."""
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return None
    lines = (line for line in text.splitlines() if line.lower().startswith(("flags", "features")))
    words = set(next(lines, "").split())
    return [flag for flag in _CPU_FLAGS if flag in words]


def _cache(problems: list[str]) -> dict[str, Any]:
    from cache2cache.models.pull import home

    folder = home()
    there = next(parent for parent in (folder, *folder.parents) if parent.exists())
    free = shutil.disk_usage(there).free
    if not there.is_dir():
        problems.append(f"{there} is a file: set C2C_HOME to a folder")
    elif not os.access(there, os.W_OK):
        problems.append(f"{there} cannot be written to: set C2C_HOME to a folder that can")
    models = sorted(path for path in folder.glob("models/*") if path.is_dir()) if folder.is_dir() else []
    return {"folder": str(folder), "free_bytes": free, "models": {path.name: size_of(path) for path in models}}


def size_of(folder: Path) -> int:
    """Bytes of all files below a folder."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def _extras(problems: list[str]) -> dict[str, Any]:
    from importlib import metadata

    from packaging.requirements import Requirement

    try:
        lines = metadata.requires("cache2cache") or []
    except metadata.PackageNotFoundError:
        problems.append("cache2cache runs from a folder, not from an installation: pip install -e .")
        return {}
    wanted = [Requirement(line) for line in lines]
    extras = {}
    for name, offer in OFFERS.items():
        needs = [r for r in wanted if r.marker and r.marker.evaluate({"extra": name})]
        missing = [f"{r.name}{r.specifier}" for r in needs if not _satisfied(r.name, r.specifier)]
        extras[name] = {"offers": offer, "missing": missing, "install": f"pip install 'cache2cache[{name}]'"}
    return extras


def _satisfied(name: str, specifier: Any) -> bool:
    from importlib import metadata

    try:
        return specifier.contains(metadata.version(name), prereleases=True)
    except metadata.PackageNotFoundError:
        return False


def show(report: dict[str, Any]) -> None:
    """Print the report for people."""
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    table = Table(box=None, show_header=False, padding=(0, 2, 0, 0))
    table.add_column(style="bold", no_wrap=True)
    table.add_column(overflow="fold")
    for name, version in report["versions"].items():
        table.add_row(name, version or "[red]not installed[/red]")
    table.add_section()
    for name, text in _device_rows(report["devices"]):
        table.add_row(name, text)
    table.add_section()
    cache = report["cache"]
    table.add_row("cache", f"{escape(cache['folder'])} ({human(cache['free_bytes'])} free)")
    for name, size in cache["models"].items():
        table.add_row("", f"{escape(name)}  {human(size)}")
    if not cache["models"]:
        table.add_row("", "no models yet: c2c pull NAME, or c2c demo")
    table.add_section()
    for name, extra in report["extras"].items():
        missing = ", ".join(extra["missing"])
        state = f"missing {escape(missing)}: {escape(extra['install'])}" if missing else "[green]installed[/green]"
        table.add_row(name, f"{extra['offers']} – {state}")
    console = Console(highlight=False)
    console.print(table)
    for problem in report["problems"]:
        console.print(f"problem: {problem}", style="red", markup=False, soft_wrap=True)


def _device_rows(devices: dict[str, Any]) -> list[tuple[str, str]]:
    cpu = devices["cpu"]
    flags = "unknown" if cpu["flags"] is None else " ".join(cpu["flags"]) or "none"
    rows = [("cpu", f"{cpu['cores']} cores, {cpu['threads'] or '?'} torch threads, flags: {flags}")]
    if rates := cpu.get("products_per_second"):
        said = ", ".join(f"{name} {rate / 1e9:,.0f}" for name, rate in rates.items())
        faster = max(rates, key=lambda name: rates[name])
        rows.append(("", f"products, G operations/s: {said}; --dtype {faster} reads prompts faster here"))
    rows += [
        (card["device"], f"{card['name']}, {human(card['bytes'])}, bf16 {'yes' if card['bf16'] else 'no'}")
        for card in devices["cuda"]
    ]
    if devices.get("mps"):
        rows.append(("mps", "Apple GPU"))
    elif not devices["cuda"] and "mps" in devices:  # a broken torch knows of none
        rows.append(("gpu", "none"))
    return rows
