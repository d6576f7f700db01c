"""vLLM's side: fused caches come in through its public KV-connector interface.

Chosen with `--kv-transfer-config`, for vLLM from 0.32 on:

    {"kv_connector": "C2CConnector", "kv_connector_module_path": "cache2cache.serve.vllm.connector",
     "kv_role": "kv_consumer", "kv_connector_extra_config": {"folder": "/dev/shm/…"}}

To the scheduler, all prompt tokens but the last were computed elsewhere and are loaded between its steps; it goes on with
the last, which is where `pipeline.read` stops. A request that cannot be given its cache fails: vLLM would otherwise read
the prompt itself, and answer as the receiver alone.
"""

# pyright: reportMissingImports=false
# vLLM is not installed where types are checked.

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from vllm.config import VllmConfig, get_layers_from_vllm_config
from vllm.distributed import get_tensor_model_parallel_rank, get_tensor_model_parallel_world_size
from vllm.distributed.kv_transfer.kv_connector.v1.base import (
    KVConnectorBase_V1,
    KVConnectorMetadata,
    KVConnectorRole,
    KVConnectorTransferResults,
)
from vllm.logger import init_logger
from vllm.model_executor.layers.attention import Attention
from vllm.model_executor.models.utils import extract_layer_index

from cache2cache.errors import ModelError, PayloadError
from cache2cache.serve.vllm.loading import Asked, Load, asked, heads_of
from cache2cache.serve.vllm.store import Store

if TYPE_CHECKING:
    from vllm.forward_context import ForwardContext
    from vllm.v1.attention.backend import AttentionMetadata
    from vllm.v1.core.kv_cache_manager import KVCacheBlocks
    from vllm.v1.core.sched.output import SchedulerOutput
    from vllm.v1.kv_cache_interface import KVCacheConfig
    from vllm.v1.request import Request

_logger = init_logger("vllm.c2c")


@dataclass
class Loads(KVConnectorMetadata):
    """From the scheduler to the workers, at each step."""

    loads: list[Load] = field(default_factory=list)


class C2CConnector(KVConnectorBase_V1):
    """Loads fused caches into vLLM's blocks. One instance belongs to the scheduler, and one to each worker."""

    def __init__(self, vllm_config: VllmConfig, role: KVConnectorRole, kv_cache_config: KVCacheConfig):
        super().__init__(vllm_config, role, kv_cache_config)
        if self._kv_transfer_config.kv_load_failure_policy != "fail":
            raise ModelError(
                "a request whose fused cache is missing must fail",
                got=f"kv_load_failure_policy {self._kv_transfer_config.kv_load_failure_policy!r}", allowed="'fail'",
            )  # fmt: skip
        folder = self._kv_transfer_config.get_from_extra_config("folder", None)
        if not folder:
            raise ModelError("kv_connector_extra_config must say where fused caches come from", allowed="folder: …")
        self._store = Store(Path(folder))
        if role is KVConnectorRole.SCHEDULER:
            self._store.sweep()
        self._loads: list[Load] = []
        self._layers: list[tuple[int, Attention]] = []
        self._results = KVConnectorTransferResults()

    # --- the scheduler's ------------------------------------------------------------------------------------------

    def on_new_request(self, request: Request) -> None:
        """A cache that was named is used, whatever else the request says about caches."""
        if _asked(request) is not None:
            request.skip_reading_prefix_cache = False

    def get_num_new_matched_tokens(self, request: Request, num_computed_tokens: int) -> tuple[int | None, bool]:
        """Tokens that will be loaded: all of the prompt but the last, less those that are there already."""
        wanted = _asked(request)
        if wanted is None:
            return 0, False
        if wanted.problem is not None:
            return request.num_tokens - num_computed_tokens, True  # a load that fails is how a request is refused
        missing = max(request.num_prompt_tokens - 1 - num_computed_tokens, 0)
        return missing, missing > 0

    def update_state_after_alloc(self, request: Request, blocks: KVCacheBlocks, num_external_tokens: int) -> None:
        """Blocks are there for what will be loaded."""
        wanted = _asked(request)
        if wanted is not None and num_external_tokens:
            ids = request.prompt_token_ids or []
            start = len(ids) - 1 - num_external_tokens
            self._loads.append(Load.of(request.request_id, wanted, ids, start, blocks.get_block_ids()[0]))

    def build_connector_meta(self, scheduler_output: SchedulerOutput) -> KVConnectorMetadata:
        """What the workers load at this step."""
        loads, self._loads = self._loads, []
        return Loads(loads)

    def request_finished(self, request: Request, block_ids: list[int]) -> tuple[bool, dict[str, Any] | None]:
        """Its cache is not needed any more, however it ended."""
        wanted = _asked(request)
        if wanted is not None and wanted.cache is not None:
            self._store.discard(wanted.cache)
        return False, None

    # --- a worker's -----------------------------------------------------------------------------------------------

    def register_kv_caches(self, kv_caches: dict[str, torch.Tensor]) -> None:
        """Find the layers that take keys and values.

        Raises:
            ModelError: layers that keep anything else, or an attention backend that takes no cache from outside.
        """
        layers = get_layers_from_vllm_config(self._vllm_config, Attention, kv_caches)  # type: ignore[type-abstract]
        takers = {name for name, layer in layers.items() if hasattr(layer.impl, "do_kv_cache_update")}
        if others := sorted(set(kv_caches) - takers):
            raise ModelError("vLLM has layers here that take no keys and values from outside", got=", ".join(others))
        self._layers = [(extract_layer_index(name), layer) for name, layer in layers.items()]

    def start_load_kv(self, forward_context: ForwardContext, **kwargs: Any) -> None:
        """Load, in order with what the device computes, so that the next step finds everything in place."""
        metadata = self._get_connector_metadata()
        assert isinstance(metadata, Loads)
        for load in metadata.loads:
            self._results.finished_recving.add(load.request)
            try:
                self._load(load)
            except Exception as error:  # whatever is wrong with a cache is its request's to know
                _logger.error("request %s fails: %s", load.request, error)
                self._results.failed_recving.add(load.request)

    def get_transfer_results(self, finished_req_ids: set[str]) -> KVConnectorTransferResults:
        """Requests whose loads have ended since the last call."""
        results, self._results = self._results, KVConnectorTransferResults()
        return results

    def _load(self, load: Load) -> None:
        if load.asked.problem is not None or load.asked.cache is None:
            raise PayloadError(str(load.asked.problem))
        model = self._vllm_config.model_config
        size = model.get_head_size()
        kv_heads, layers = model.get_total_num_kv_heads(), model.get_total_num_hidden_layers()
        heads = heads_of(get_tensor_model_parallel_rank(), get_tensor_model_parallel_world_size(), kv_heads)
        (group,) = self._kv_cache_config.kv_cache_groups
        slots = load.slots(group.kv_cache_spec.block_size)
        with self._store.open(load.asked.cache) as fused:
            load.check(fused, layers, kv_heads, size)
            for index, layer in self._layers:
                cache = layer.kv_cache
                both = fused.read(index, heads, range(load.start, fused.positions))
                keys, values = (x.to(cache.device, model.dtype) for x in both)
                # The layer's own way of writing: backends lay their blocks out differently, and some pack or scale.
                layer.impl.do_kv_cache_update(layer, keys, values, cache, slots.to(cache.device))  # type: ignore[attr-defined]

    # --- nothing is saved, and layers are not waited for one by one -------------------------------------------------

    def wait_for_layer_load(self, layer_name: str) -> None:
        """Loads have ended when `start_load_kv` returns."""

    def save_kv_layer(
        self, layer_name: str, kv_layer: torch.Tensor, attn_metadata: AttentionMetadata, **kwargs: Any
    ) -> None:
        """Nothing leaves vLLM."""

    def wait_for_save(self) -> None:
        """Nothing leaves vLLM."""


def _asked(request: Request) -> Asked | None:
    sampling = request.sampling_params
    whole = sampling is not None and sampling.prompt_logprobs is not None
    ids: Sequence[int] | None = request.prompt_token_ids
    return asked(request.kv_transfer_params, request.cache_salt, ids, whole=whole)
