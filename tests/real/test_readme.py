"""What the README promises, run as it stands there on the demo pair."""

import re
from pathlib import Path

import pytest

pytestmark = pytest.mark.real

README = (Path(__file__).parents[2] / "README.md").read_text(encoding="utf-8")


def test_the_python_example_runs(capsys):
    example = re.search(r"## In Python\n+```python\n(.*?)```", README, re.S)
    names: dict = {}
    exec(compile(example[1], "README.md", "exec"), names)
    assert names["answer"].text.strip()[0] in "ABCD"
    assert names["fused"].cache.get_seq_length() == names["fused"].ids.shape[1] - 1
    assert names["answer"].text in capsys.readouterr().out


def test_paths_and_files_that_the_readme_names_exist():
    for target in re.findall(r"\]\((?!https?:)([^)#]+)\)", README):
        assert (Path(__file__).parents[2] / target).exists(), target
