"""A training recipe: one TOML file that says everything about a run."""

from __future__ import annotations

import tomllib
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from cache2cache.errors import RecipeError
from cache2cache.fuser.gate import GateConfig


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class FuserPart(_Part):
    """What to train."""

    kind: Literal["compact", "paper"] = "compact"
    layer_map: Literal["last-aligned", "depth-normalised"] = "last-aligned"
    alignment: Literal["native", "same-ids"] = "native"
    receiver_template: str | None = None
    sharer_template: str | None = None
    """A template's name, Jinja text, or None for the model's own."""
    fuse_last: int | None = Field(default=None, gt=0)
    sizes: dict[str, Any] = {}
    gate: GateConfig = GateConfig(learned=False, initial_logit=1.0)


class Source(_Part):
    """One file of rows: multiple choice (question, choices, answer) or chats (messages)."""

    path: str
    limit: int | None = Field(default=None, gt=0)
    """Take a random sample of this many."""


class DataPart(_Part):
    """Which rows to train on, and which to stay away from."""

    train: tuple[Source, ...] = Field(min_length=1)
    validation: tuple[Source, ...] = Field(min_length=1)
    held_out: tuple[str, ...] = ()
    """Files of evaluation rows; training rows with the same question, or a run of 13 words of one, are dropped."""


class OptimPart(_Part):
    """How to train."""

    learning_rate: float = Field(default=1e-3, gt=0)
    weight_decay: float = Field(default=0.01, ge=0)
    epochs: float = Field(default=2, gt=0)
    batch_size: int = Field(default=16, gt=0)
    warmup_steps: int = Field(default=20, ge=0)
    schedule: Literal["cosine", "linear", "constant_with_warmup"] = "cosine"
    max_grad_norm: float = Field(default=1.0, gt=0)
    eval_steps: int = Field(default=50, gt=0)
    patience: int = Field(default=4, gt=0)
    """Stop after this many evaluations without a better validation loss."""
    sharer_dropout: float = Field(default=0.0, ge=0, le=1)
    """Share of training rows that hear the mean sharer features in place of the sharer's cache. At 1 all rows do, those
    of the validation too: the fuser learns what its parameters alone can bring."""


class Recipe(_Part):
    """A whole run."""

    receiver: str
    sharer: str
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Of both models; the fuser is trained in float32."""
    seed: int = 0
    fuser: FuserPart = FuserPart()
    data: DataPart
    optim: OptimPart = OptimPart()


def read_recipe(path: str | Path) -> Recipe:
    """Read and check a recipe.

    Raises:
        RecipeError: no such file, not TOML, or fields that are wrong; all of them are listed.
    """
    path = Path(path)
    try:
        return Recipe.model_validate(tomllib.loads(path.read_text(encoding="utf-8")))
    except FileNotFoundError as error:
        raise RecipeError("no such recipe", got=path, allowed="a .toml file") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise RecipeError(f"{path} is not TOML", got=str(error)) from error
    except ValidationError as error:
        wrong = "; ".join(f"{'.'.join(map(str, e['loc']))}: {e['msg']} (got {e['input']!r})" for e in error.errors())
        raise RecipeError(f"{path} has {error.error_count()} wrong fields", got=wrong) from error
