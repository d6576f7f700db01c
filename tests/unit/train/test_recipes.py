"""The recipes of the repository: they are read, and controls differ from the demo in the one thing that they control."""

from pathlib import Path

import pytest

from cache2cache.testing import tiny_tokenizer
from cache2cache.text.chat import render
from cache2cache.train.config import Recipe, read_recipe

FOLDER = Path(__file__).parents[3] / "recipes"
NAMES = sorted(path.parent.name for path in FOLDER.glob("*/recipe.toml"))


def recipe(name: str) -> Recipe:
    return read_recipe(FOLDER / name / "recipe.toml")


@pytest.mark.parametrize("name", NAMES)
def test_templates_render_with_and_without_a_bos(name):
    part = recipe(name).fuser
    messages = [{"role": "user", "content": "Which?"}]
    for template in (part.receiver_template, part.sharer_template):
        for bos in (False, True):
            text = render(tiny_tokenizer(bos=bos), messages, template=template).text
            assert text.count("Which?") == 1


@pytest.mark.parametrize("name", NAMES)
def test_the_last_step_is_evaluated(name):
    """The best of the evaluated steps is kept, so a run that ends between two evaluations loses its last steps."""
    whole = recipe(name)
    rows = [source.limit for source in whole.data.train]
    assert None not in rows
    per_epoch = -(-sum(rows) // whole.optim.batch_size)
    assert per_epoch * whole.optim.epochs % whole.optim.eval_steps == 0


@pytest.mark.parametrize(
    ("name", "like", "change"),
    [
        ("self", "qwen2.5-coder", lambda r: {"receiver": "smollm2-135m", "sharer": "smollm2-135m"}),
        ("without-sharer", "demo", lambda r: {"optim": r.optim.model_copy(update={"sharer_dropout": 1.0})}),
    ],
)
def test_a_control_differs_in_nothing_but_what_it_controls(name, like, change):
    other = recipe(like)
    assert recipe(name) == other.model_copy(update=change(other))


def test_gemmas_prompt_begins_with_bos():
    template = recipe("smollm2-gemma3").fuser.sharer_template
    tokenizer = tiny_tokenizer(bos=True)
    rendering = render(tokenizer, [{"role": "user", "content": "Which?"}], template=template)
    assert rendering.ids[0] == tokenizer.bos_token_id and (rendering.ids == tokenizer.bos_token_id).sum() == 1
