"""pyproject.toml, constraints.txt and what the doctor says of the extras tell the same story."""

import re
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.version import Version

import cache2cache
from cache2cache.cli.doctor import OFFERS

ROOT = Path(__file__).parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
PINS = {
    name.lower(): Version(version)
    for name, version in re.findall(r"^([\w-]+)==(\S+)$", (ROOT / "constraints.txt").read_text(encoding="utf-8"), re.M)
}
REQUIREMENTS = [
    Requirement(line)
    for lines in (PROJECT["dependencies"], *PROJECT["optional-dependencies"].values())
    for line in lines
    if not line.startswith("cache2cache[")
]


@pytest.mark.parametrize("requirement", REQUIREMENTS, ids=str)
def test_pins_lie_in_the_ranges(requirement: Requirement):
    name = requirement.name.lower().replace("_", "-")
    assert name in PINS, f"constraints.txt does not pin {requirement.name}"
    assert requirement.specifier.contains(PINS[name])


def test_pins_have_no_local_versions():
    assert not any(version.local for version in PINS.values())


def test_the_doctor_knows_every_extra():
    assert set(OFFERS) == set(PROJECT["optional-dependencies"]) - {"all", "dev"}


def test_the_changelog_has_this_version():
    assert f"## [{cache2cache.__version__}]" in (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
