"""Reading recipes, and the recipes of the repository."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from cache2cache.errors import RecipeError
from cache2cache.testing import tiny_tokenizer
from cache2cache.text.chat import render
from cache2cache.train.config import Recipe
from cache2cache.train.recipes import differences, read_recipe
from cache2cache.types import Message

FOLDER = Path(__file__).parents[3] / "recipes"
NAMES = sorted(path.parent.name for path in FOLDER.glob("*/recipe.toml"))

ASKED: list[Message] = [{"role": "user", "content": "Which?"}]

PLAIN = """
receiver = "r"
sharer = "s"
[fuser]
fuse_last = 16
[fuser.sizes]
width = 32
[data]
train = [{path = "a.jsonl"}, {path = "b.jsonl", limit = 7}]
validation = [{path = "c.jsonl"}]
"""

Write = Callable[..., Path]


@pytest.fixture
def write(tmp_path: Path) -> Write:
    def write(text: str = PLAIN, name: str = "recipe.toml") -> Path:
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True, parents=True)
        path.write_text(text, encoding="utf-8")
        return path

    return write


def recipe(name: str) -> Recipe:
    return read_recipe(FOLDER / name / "recipe.toml")


def get(whole: Recipe, key: str):
    at: Any = whole.model_dump()
    for part in key.split("."):
        at = at[part] if isinstance(at, dict) else at[int(part)]
    return at


@pytest.mark.parametrize(
    ("override", "key", "value"),
    [
        ("optim.epochs=3", "optim.epochs", 3),
        ("optim.learning_rate = 1e-4", "optim.learning_rate", 1e-4),
        ("receiver=smollm2-135m", "receiver", "smollm2-135m"),
        ("receiver=/models/a=b c", "receiver", "/models/a=b c"),
        ('receiver="12"', "receiver", "12"),
        ("fuser.receiver_template='{{ bos_token }}'", "fuser.receiver_template", "{{ bos_token }}"),
        ("fuser.receiver_template=one {{ x }}\nkey = 2", "fuser.receiver_template", "one {{ x }}\nkey = 2"),
        ("data.train.1.limit=100", "data.train.1.limit", 100),
        ("data.train=[{path = 'x.jsonl'}]", "data.train.0.path", "x.jsonl"),
        ("watch.report_to=[]", "watch.report_to", ()),
        ("fuser.layer_map=[1, 0]", "fuser.layer_map", (1, 0)),
        ("fuser.sizes.width=8", "fuser.sizes.width", 8),
        ("fuser.gate.learned=true", "fuser.gate.learned", True),
        ("fuser.fuse_last=", "fuser.fuse_last", None),
        ("data.train.1.limit=", "data.train.1.limit", None),
    ],
)
def test_one_field_is_set(write: Write, override: str, key: str, value: object):
    changed = read_recipe(write(), [override])
    assert get(changed, key) == value
    table = ".".join(key.split(".")[:2])
    assert all(line.startswith(table) for line in differences(read_recipe(write()), changed))


def test_the_last_of_two_overrides_counts(write: Write):
    assert read_recipe(write(), ["seed=1", "seed=2"]).seed == 2


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("seed", "--set seed: not of the form key=value"),
        ("=1", "not of the form key=value"),
        ("optim..epochs=1", "not of the form key=value"),
        ("data.train.2.limit=1", "2 is none of the entries 0 to 1"),
        ("data.train.-1.limit=1", "-1 is none of the entries"),
        ("data.train.first.limit=1", "first is none of the entries"),
        ("receiver.name=1", "name would lie inside of 'r', which is no table"),
        ("optim.epochs=", "optim is not set"),
        ("data.held_out=", "held_out is not set"),
        ("data.held_out=[1", "the value is not TOML"),
        ("fuser.receiver_template={{ bos_token }}", "the value is not TOML"),
        ("optim.epochs=many", "optim.epochs: "),
        ("optim.epoch=1", "did you mean optim.epochs?"),
        ("receiver=12", "receiver: Input should be a valid string (got 12)"),
        ("fuser.sharer_template=plane", "fuser.sharer_template: 'plane' is no template"),
        ("extends=x.toml", "unknown extends"),
    ],
)
def test_overrides_that_are_refused(write: Write, override: str, words: str):
    with pytest.raises(RecipeError) as error:
        read_recipe(write(), [override])
    assert words in str(error.value)


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["data.response_tokens=4", "objective.distill=1"], "objective.distill follows whole responses"),
        (["data.stream=true", "optim.max_steps=9", "data.train.1.neighbours=2"], "neighbours samples rows"),
        (["data.train.0.learn=receiver", "objective.distill=1"], 'rows with learn = "receiver" need'),
        (["data.train.0.learn=receiver", "objective.contrastive=1"], 'rows with learn = "receiver" need'),
        (["data.train.0.learn=receiver", "objective.fused=everywhere"], 'rows with learn = "receiver" need'),
        (["data.validation.0.learn=receiver"], "validation measures responses"),
        (["objective.contrastive=1", "optim.batch_size=1"], "needs another row in the batch"),
        (["data.stream=true", "optim.max_steps=9", "optim.bucket=true"], "optim.bucket needs the rows' lengths"),
    ],
)
def test_fields_that_exclude_one_another(write: Write, overrides: list[str], words: str):
    with pytest.raises(RecipeError) as error:
        read_recipe(write(), overrides)
    assert words in str(error.value)


def test_all_that_is_wrong_with_overrides_and_file_is_told_at_once(write: Write):
    with pytest.raises(RecipeError) as error:
        read_recipe(write(PLAIN + "[optim]\nepochs = 0\n"), ["nonsense", "data.train.9.limit=1", "seed=x"])
    for words in ("--set nonsense", "--set data.train.9.limit=1", "seed: ", "optim.epochs: "):
        assert words in str(error.value)


def test_a_recipe_extends_another(write: Write):
    write(name="base/recipe.toml")
    write('extends = "../base/recipe.toml"\nsharer = "t"\n[fuser.sizes]\nblocks = 3\n', "middle/recipe.toml")
    top = write(
        'extends = "../middle/recipe.toml"\nunset = ["fuser.fuse_last"]\n[[data.train]]\npath = "z.jsonl"\n',
        "top/recipe.toml",
    )
    whole = read_recipe(top)
    assert (whole.receiver, whole.sharer) == ("r", "t")
    assert whole.fuser.sizes == {"width": 32, "blocks": 3}, "tables are merged"
    assert [source.path for source in whole.data.train] == ["z.jsonl"], "arrays are replaced"
    assert whole.fuser.fuse_last is None
    assert read_recipe(top, ["fuser.sizes.width=64"]).fuser.sizes == {"width": 64, "blocks": 3}


def test_a_table_that_is_unset_is_not_merged_into(write: Write):
    write(name="base.toml")
    path = write('extends = "base.toml"\nunset = ["fuser.sizes"]\n[fuser]\nkind = "paper"\nsizes = {hidden_dim = 8}\n')
    assert read_recipe(path).fuser.sizes == {"hidden_dim": 8}


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ('extends = "absent.toml"', "absent.toml"),
        ('extends = "recipe.toml"', "in a circle"),
        ('extends = "circle.toml"', "recipe.toml → "),
        ("extends = 3", "extends in"),
        ('extends = ["base.toml"]', "extends in"),
        ('extends = "base.toml"\nunset = "fuser"', "unset in"),
        ('extends = "base.toml"\nunset = [3]', "unset in"),
        ('extends = "base.toml"\nunset = ["optim.epochs"]', "optim.epochs: optim is not set"),
        ('unset = ["fuser.fuse_last"]\n' + PLAIN, "extends no recipe"),
        ('extends = "broken.toml"', "broken.toml is not TOML"),
        ("receiver =", "is not TOML"),
    ],
)
def test_files_that_are_refused(write: Write, text: str, words: str):
    write(name="base.toml")
    write('extends = "recipe.toml"', "circle.toml")
    write("=", "broken.toml")
    with pytest.raises(RecipeError) as error:
        read_recipe(write(text))
    assert words in str(error.value)


def test_what_is_no_readable_file_is_refused(tmp_path: Path):
    for path in (tmp_path / "absent.toml", tmp_path):
        with pytest.raises(RecipeError, match="no such recipe"):
            read_recipe(path)
    (tmp_path / "latin.toml").write_bytes(b'receiver = "\xe9"')
    with pytest.raises(RecipeError, match="is not TOML"):
        read_recipe(tmp_path / "latin.toml")


def test_differences_name_the_entry(write: Write):
    was = read_recipe(write())
    now = read_recipe(write(), ["optim.epochs=3", "data.train.1.limit=8", "fuser.sizes.width=64"])
    assert differences(was, was) == []
    assert differences(was, now) == [
        "fuser.sizes.width was 32, is 64",
        "data.train.1.limit was 7, is 8",
        "optim.epochs was 2.0, is 3.0",
    ]


@pytest.mark.parametrize("name", NAMES)
def test_templates_render_with_and_without_a_bos(name: str):
    part = recipe(name).fuser
    for template in (part.receiver_template, part.sharer_template):
        for bos in (False, True):
            text = render(tiny_tokenizer(bos=bos), ASKED, template=template).text
            read_twice = name == "question-first" and template == part.sharer_template
            assert text.count("Which?") == 1 + read_twice


@pytest.mark.parametrize("name", NAMES)
def test_the_last_step_is_evaluated(name: str):
    """The best of the evaluated steps is kept, so a run that ends between two evaluations loses its last steps."""
    whole = recipe(name)
    rows = [source.limit or 0 for source in whole.data.train]
    assert all(rows)
    per_epoch = -(-sum(rows) // whole.optim.batch_size)
    assert per_epoch * whole.optim.epochs % whole.watch.eval_steps == 0


@pytest.mark.parametrize(
    ("name", "like", "change"),
    [
        ("self", "qwen2.5-coder", lambda r: {"receiver": "smollm2-135m", "sharer": "smollm2-135m"}),
        (
            "without-sharer",
            "demo",
            lambda r: {
                "fuser": r.fuser.model_copy(update={"sizes": {**r.fuser.sizes, "width": 128, "inner": 256}}),
                "optim": r.optim.model_copy(update={"sharer_dropout": 1.0}),
            },
        ),
    ],
)
def test_a_control_differs_in_nothing_but_what_it_controls(name: str, like: str, change):
    other = recipe(like)
    assert recipe(name) == other.model_copy(update=change(other))


def test_gemmas_prompt_begins_with_bos():
    template = recipe("smollm2-gemma3").fuser.sharer_template
    tokenizer = tiny_tokenizer(bos=True)
    rendering = render(tokenizer, ASKED, template=template)
    assert rendering.ids[0] == tokenizer.bos_token_id and (rendering.ids == tokenizer.bos_token_id).sum() == 1
