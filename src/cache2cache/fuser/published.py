"""Checkpoints as thu-nics/C2C publishes them, read as paper fusers; `export` writes them.

A folder with `config.json` (what was trained) and, in `final/` or right there, for every receiver layer
`projector_{i}.pt` (weights) and `projector_{i}.json` (class and arguments), and `projector_config.json` (layer map).
"""

from __future__ import annotations

import json
import pickle
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, TypeVar

import torch
from pydantic import BaseModel, ConfigDict, Field, RootModel, ValidationError

from cache2cache.errors import FuserFormatError
from cache2cache.fuser.base import Fuser, FuserConfig
from cache2cache.fuser.gate import GateConfig
from cache2cache.fuser.paper import PaperSizes
from cache2cache.fuser.strict import check_weights, in_words
from cache2cache.types import Geometry, ModelCard

MAP = "projector_config.json"
RECIPE = "config.json"
CLASS = "C2CProjector"
TEMPERATURE = "gate_temperature"
_NAMES = {
    "gate.logit": "gate_logit",
    "enter": "in",
    "trunk": "mlp1.blocks.0",
    "weigh_block": "scalar_mlp2.blocks.0",
    "weigh": "scalar_head",
    "blocks": "proj_mlp2.blocks",
    "leave": "proj_out",
}
"""Our name or module → theirs, without the `key_` or `value_` in front."""
_Form = TypeVar("_Form", bound=BaseModel)


class _Dtype(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")

    type: Literal["torch.dtype"] = Field(default="torch.dtype", alias="__type__")
    value: Literal["float32", "bfloat16", "float16"]


class _Arguments(PaperSizes):
    """Arguments of the published class; those that were not passed have its defaults. Dims are per head."""

    source_dim: int
    target_dim: int
    source_num_heads: int = 1
    target_num_heads: int = 1
    initial_temperature: float = 1.0
    final_temperature: float = 1e-3
    anneal_steps: int = 1929
    dtype: _Dtype | None = None


class _Projector(BaseModel):
    class_: str = Field(alias="class")
    init_args: dict[str, Any]


class _LayerMap(RootModel[dict[str, dict[str, dict[int, list[tuple[int, int]]]]]]):
    """Receiver → sharer → receiver layer → [(sharer layer, projector)]."""


class _Trained(BaseModel):
    base_model: str
    teacher_model: str
    is_do_alignment: bool = False
    alignment_strategy: Literal["first", "longest"] = "first"


class _Recipe(BaseModel):
    model: _Trained


def find(folder: Path) -> Path | None:
    """The folder that holds the projectors, if this is a published checkpoint."""
    return next((place for place in (folder, folder / "final") if (place / MAP).is_file()), None)


def read(folder: Path) -> tuple[FuserConfig, dict[str, torch.Tensor]]:
    """Read a published checkpoint as config and weights of a paper fuser, in the stored dtype.

    Where a receiver layer names several sharer layers only the first is read, as the published code uses no other.

    Raises:
        FuserFormatError: files missing or damaged, a pickle with more than tensors in it, another projector class,
            several sharers, or tensors that are missing, unexpected, of another shape or not finite.
    """
    place = find(folder)
    if place is None:
        raise FuserFormatError(f"{folder} is not a published checkpoint", allowed=f"a folder with {MAP}")
    layer_map, projectors = _layer_map(place)
    recipe, trained = _recipe(place)
    arguments = _arguments(place, projectors)
    try:
        config = _config(layer_map, arguments, trained)
    except ValidationError as error:
        raise FuserFormatError(f"{place} contradicts itself", got=in_words(error)) from error
    shapes, states = _shapes(config), []
    for index in projectors:
        states.append(_weights(place / f"projector_{index}.pt"))
        check_weights(place / f"projector_{index}.pt", shapes, states[-1])
    # Kept for the way back: ours is one temperature for all layers, and the recipe has more than our config.
    kept = {"recipe": recipe, TEMPERATURE: [state.pop(TEMPERATURE).item() for state in states]}
    return config.model_copy(update={"training": {"published": kept}}), _stack(config, states)


def published_names(name: str) -> tuple[str, str]:
    """Published names of the keys' and the values' part of one of our stacked tensors."""
    ours = next(ours for ours in _NAMES if name == ours or name.startswith(f"{ours}."))
    theirs = _NAMES[ours] + name.removeprefix(ours) + (".weight" if name.endswith("norm") else "")
    return f"key_{theirs}", f"value_{theirs}"


def entry(name: str, x: torch.Tensor) -> torch.Tensor:
    """One entry of a stacked tensor as the published module holds it: (in, out) → (out, in), (1, n) → (n,)."""
    if x.ndim == 0:
        return x
    return x.T if name.endswith("weight") else x[0]


def _shapes(config: FuserConfig) -> dict[str, torch.Size]:
    """Names and shapes of the published state dict of one layer."""
    shapes = {TEMPERATURE: torch.Size(())}
    for name, x in _blank(config).items():
        shapes |= dict.fromkeys(published_names(name), entry(name, x[0, 0]).shape)
    return shapes


def _stack(config: FuserConfig, states: Sequence[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    """Layers' state dicts → ours; takes the tensors out of them, so that memory holds the weights about once."""
    stacked = {}
    for name, blank in _blank(config).items():
        x = torch.stack([torch.stack([state.pop(part) for state in states]) for part in published_names(name)])
        stacked[name] = x.transpose(2, 3).contiguous() if name.endswith("weight") else x.view(blank.shape)
    return stacked


def _blank(config: FuserConfig) -> dict[str, torch.Tensor]:
    with torch.device("meta"):
        return Fuser.from_config(config).state_dict()


def _weights(path: Path) -> dict[str, torch.Tensor]:
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError as error:
        raise _missing(path) from error
    except pickle.UnpicklingError as error:
        raise FuserFormatError(
            f"{path} is damaged or a pickle with more than tensors in it, which can run code; it was not read",
            got=str(error).strip().splitlines()[0],
            allowed="a state dict of tensors",
        ) from error
    except Exception as error:  # rubbish is a program to the unpickler, and fails in any way that a program can
        raise FuserFormatError(f"{path} is damaged", got=repr(error), hint="Fetch it again") from error
    if not isinstance(state, dict) or not all(isinstance(x, torch.Tensor) for x in state.values()):
        raise FuserFormatError(f"{path} is not a state dict", got=type(state).__name__)
    return state


def _layer_map(place: Path) -> tuple[tuple[int, ...], list[int]]:
    """Sharer layer and projector number of each receiver layer."""
    path = place / MAP
    sharers = [by_layer for by_sharer in _parse(_LayerMap, path).root.values() for by_layer in by_sharer.values()]
    if len(sharers) != 1:
        raise FuserFormatError(
            f"{path} maps {len(sharers)} sharers; a fuser has one",
            hint="Give the checkpoint of each pair on its own, as fusers=[…]",
        )
    by_layer = sharers[0]
    if sorted(by_layer) != list(range(len(by_layer))) or not by_layer or not all(by_layer.values()):
        raise FuserFormatError(
            f"{path} does not map every receiver layer", got=sorted(layer for layer in by_layer if by_layer[layer])
        )
    first = [by_layer[layer][0] for layer in range(len(by_layer))]
    named = {projector for sources in by_layer.values() for _, projector in sources}
    present = {int(n[1]) for p in place.glob("projector_*.pt") if (n := re.fullmatch(r"projector_(\d+)\.pt", p.name))}
    if surplus := sorted(present - named):
        raise FuserFormatError(f"{path} does not name all projectors beside it", got=f"projectors {surplus} not named")
    return tuple(layer for layer, _ in first), [projector for _, projector in first]


def _arguments(place: Path, projectors: Sequence[int]) -> _Arguments:
    """The arguments that all projectors share."""
    seen: dict[_Arguments, int] = {}
    for index in projectors:
        path = place / f"projector_{index}.json"
        projector = _parse(_Projector, path)
        if projector.class_ not in (CLASS, CLASS.lower()):
            raise FuserFormatError(f"{path} is of another class", got=projector.class_, allowed=CLASS)
        try:
            seen.setdefault(_Arguments.model_validate(projector.init_args), index)
        except ValidationError as error:
            raise FuserFormatError(f"{path} has other arguments than {CLASS}", got=in_words(error)) from error
    if len(seen) > 1:
        raise FuserFormatError(
            f"the projectors in {place} differ in their arguments", got=f"projectors {list(seen.values())} differ"
        )
    return next(iter(seen))


def _recipe(place: Path) -> tuple[dict[str, Any], _Trained]:
    """The training config, beside the projectors or one folder up."""
    path = next((x for x in (place / RECIPE, place.parent / RECIPE) if x.is_file()), place.parent / RECIPE)
    trained = _parse(_Recipe, path).model
    return json.loads(_bytes(path)), trained


def _config(layer_map: tuple[int, ...], arguments: _Arguments, trained: _Trained) -> FuserConfig:
    def card(name: str, layers: int, heads: int, dim: int) -> ModelCard:
        size = Geometry(layers=layers, kv_heads=heads, head_dim=dim, vocab_size=None, max_positions=None)
        return ModelCard(id=name, geometry=size)

    # Both published layer maps end at the sharer's last layer; nothing else tells how many it has.
    return FuserConfig(
        kind="paper",
        receiver=card(trained.base_model, len(layer_map), arguments.target_num_heads, arguments.target_dim),
        sharer=card(trained.teacher_model, max(layer_map) + 1, arguments.source_num_heads, arguments.source_dim),
        layer_map=layer_map,
        alignment=f"retokenise-{trained.alignment_strategy}" if trained.is_do_alignment else "same-ids",  # type: ignore[arg-type]
        sizes=arguments.model_dump(include=set(PaperSizes.model_fields)),
        gate=GateConfig(
            initial_temperature=arguments.initial_temperature,
            final_temperature=arguments.final_temperature,
            anneal_steps=arguments.anneal_steps,
        ),
    )


def _parse(form: type[_Form], path: Path) -> _Form:
    try:
        return form.model_validate_json(_bytes(path))
    except ValidationError as error:
        raise FuserFormatError(f"{path} does not have the published form", got=in_words(error)) from error


def _bytes(path: Path) -> bytes:
    if not path.is_file():
        raise _missing(path)
    return path.read_bytes()


def _missing(path: Path) -> FuserFormatError:
    return FuserFormatError("a file of the published checkpoint is missing", got=path, hint="Fetch it again")
