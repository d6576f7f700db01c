"""Paper fusers written as thu-nics/C2C publishes them; `published` says how that looks and reads it."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from cache2cache.errors import FuserFormatError
from cache2cache.fuser.base import Fuser, FuserConfig
from cache2cache.fuser.gate import GateConfig
from cache2cache.fuser.layer_map import depth_normalised, last_aligned
from cache2cache.fuser.paper import PaperSizes
from cache2cache.fuser.published import CLASS, MAP, RECIPE, TEMPERATURE, entry, published_names
from cache2cache.fuser.store import destination, staged

_MAPPINGS = {"last_aligned": last_aligned, "k_nearest": depth_normalised}
"""Published names of the layer maps."""


def save_published(fuser: Fuser, folder: str | os.PathLike[str]) -> Path:
    """Write a paper fuser as the published code reads it, all files or none.

    Raises:
        FuserFormatError: the published layout cannot hold the fuser, or there is a file in the folder's place.
    """
    _check_writable(fuser.config)
    folder = destination(folder)
    with staged(folder, last=f"final/{MAP}") as stage:
        final = stage / "final"
        final.mkdir()
        _write_json(stage / RECIPE, _recipe_of(fuser.config))
        card = {"class": CLASS, "init_args": _arguments_of(fuser)}
        for layer, state in enumerate(_unstack(fuser)):
            torch.save(state, final / f"projector_{layer}.pt")
            _write_json(final / f"projector_{layer}.json", card)
        sources = {str(layer): [[source, layer]] for layer, source in enumerate(fuser.config.layer_map)}
        _write_json(final / MAP, {"0": {"1": sources}})
    return folder


def left_out(config: FuserConfig) -> list[str]:
    """What the published layout does not hold of a fuser's gates. It only matters for training on: open gates stay open."""
    told, default = config.gate.model_dump(mode="json"), GateConfig().model_dump(mode="json")
    held = ("initial_temperature", "final_temperature", "anneal_steps")
    return [f"gate.{name} = {json.dumps(x)}" for name, x in told.items() if name not in held and x != default[name]]


def _unstack(fuser: Fuser) -> Iterator[dict[str, torch.Tensor]]:
    """The published state dict of each layer."""
    kept = fuser.config.training.get("published", {}).get(TEMPERATURE)
    for layer in range(fuser.config.receiver.geometry.layers):
        temperature = fuser.gate.temperature if kept is None else torch.tensor(kept[layer])
        state = {TEMPERATURE: temperature.detach().to("cpu", fuser.dtype, copy=True)}
        for name, x in fuser.state_dict().items():
            for kind, part in enumerate(published_names(name)):
                # A copy: torch.save writes the whole storage behind a view.
                state[part] = entry(name, x[kind, layer]).to("cpu", copy=True).contiguous()
        yield state


def _check_writable(config: FuserConfig) -> None:
    surplus = [
        name for name in ("receiver_template", "sharer_template", "fuse_last") if getattr(config, name) is not None
    ]
    if config.kind != "paper" or config.alignment == "native" or surplus:
        raise FuserFormatError(
            "the published layout cannot hold this fuser",
            got=", ".join([f"kind {config.kind}", f"alignment {config.alignment}", *surplus]),
            allowed="kind paper, alignment same-ids or retokenise, no templates, fusion of all positions",
        )
    deepest = config.sharer.geometry.layers - 1
    if max(config.layer_map) != deepest:
        # It does not say how many layers the sharer has, so a reader takes the deepest one for the last.
        raise FuserFormatError(
            "the published layout can only hold layer maps that reach the sharer's last layer",
            got=f"layer {max(config.layer_map)} as the deepest", allowed=f"layer {deepest}",
            hint="Share it in the native layout: save_pretrained",
        )  # fmt: skip


def _recipe_of(config: FuserConfig) -> dict[str, Any]:
    """The training config: the one that was read, or as much of it as is known."""
    sizes, receiver, sharer = config.receiver.geometry, config.receiver, config.sharer
    recipe = dict(config.training.get("published", {}).get("recipe", {}))
    model = {
        "base_model": receiver.id,
        "teacher_model": sharer.id,
        "is_do_alignment": config.alignment != "same-ids",
        "projector": {"type": CLASS, "params": _shared_arguments(config)},
    }
    if config.alignment != "same-ids":
        model["alignment_strategy"] = config.alignment.removeprefix("retokenise-")
    for name, layer_map in _MAPPINGS.items():
        if layer_map(sizes.layers, sharer.geometry.layers) == config.layer_map:
            model.setdefault("mapping", name)
    return recipe | {"model": model | recipe.get("model", {})}


def _shared_arguments(config: FuserConfig) -> dict[str, Any]:
    sizes = PaperSizes.model_validate(config.sizes).model_dump()
    return sizes | config.gate.model_dump(include={"initial_temperature", "final_temperature", "anneal_steps"})


def _arguments_of(fuser: Fuser) -> dict[str, Any]:
    own, other = fuser.config.receiver.geometry, fuser.config.sharer.geometry
    return {
        "source_dim": other.head_dim,
        "target_dim": own.head_dim,
        "source_num_heads": other.kv_heads,
        "target_num_heads": own.kv_heads,
        **_shared_arguments(fuser.config),
        "dtype": {"__type__": "torch.dtype", "value": str(fuser.dtype).removeprefix("torch.")},
    }


def _write_json(path: Path, content: object) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
