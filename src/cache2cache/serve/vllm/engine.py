"""The engine for load: vLLM writes, from caches that are fused here. See `connector` for how they get there."""

# pyright: reportMissingImports=false
# vLLM is not installed where types are checked.

from __future__ import annotations

import asyncio
import os
import uuid
from collections.abc import Mapping
from contextlib import aclosing
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from cache2cache.errors import ModelError, RequestError
from cache2cache.pipeline import C2C
from cache2cache.serve.admission import DEFAULT, Limits
from cache2cache.serve.engine import Request
from cache2cache.serve.job import Answer, Job
from cache2cache.serve.queued import QueuedEngine
from cache2cache.serve.sampling import MAX_LOGPROBS, Drawn
from cache2cache.serve.vllm import probe, store
from cache2cache.serve.vllm.export import export
from cache2cache.serve.vllm.loading import CACHE_FIELD
from cache2cache.serve.vllm.worker import PrefillWorker

if TYPE_CHECKING:
    from vllm import CompletionOutput, RequestOutput, SamplingParams
    from vllm.v1.engine.async_llm import AsyncLLM

_ENVIRONMENT = {
    # A process that has computed with torch may not be forked.
    "VLLM_WORKER_MULTIPROC_METHOD": "spawn",
    "VLLM_LOGGING_LEVEL": "WARNING",
    "VLLM_NO_USAGE_STATS": "1",
}
"""Of vLLM, unless the environment says something else."""

_PATIENCE = 10.0
"""Seconds that vLLM's processes have to end."""

_COLDEST = 0.01
"""vLLM raises lower temperatures to this one."""


class VllmEngine(QueuedEngine):
    """Answers with vLLM, in processes of its own, behind prefills and fusions in this one. See `Engine`.

    Paging, continuous batching and prefix caching are vLLM's. In float32, greedy answers are those of the embedded
    engine; what is drawn with a seed is not, since vLLM draws in its own way. No sharer answers by itself: that would
    take a second vLLM.

    Args:
        limits: memory is that of fused caches on their way to vLLM, which has its own limit for those that it holds.
        options: of vLLM's `AsyncEngineArgs`, such as tensor_parallel_size.

    Raises:
        RequestError: an option that is not the caller's to choose.
    """

    def __init__(self, pair: C2C, limits: Limits = DEFAULT, *, options: Mapping[str, Any] | None = None):
        self._max_batch, self._options = limits.max_batch, dict(options or {})
        own = {"model", "kv_transfer_config", *_own_options(pair, limits.max_batch)}
        if taken := sorted(self._options.keys() & own):
            raise RequestError("the engine chooses these options of vLLM itself", got=", ".join(taken))
        self._store = store.OwnStore()
        worker = PrefillWorker(pair, self._store, self._hand, limits)
        super().__init__(pair, worker, limits.max_new_tokens)
        self._prefill = worker
        self._llm: AsyncLLM | None = None
        self._writing: dict[Job, tuple[Answer, asyncio.Task[None]]] = {}

    @property
    def alive(self) -> bool:
        """See `Engine`. It dies with vLLM's processes."""
        return super().alive and not self._running_llm.errored

    async def start(self) -> None:
        """See `Engine`.

        Raises:
            ModelError: vLLM cannot serve the receiver, or computes something else with it.
        """
        try:
            await self._start_vllm()
            await probe.check(self._running_llm, self._pair.receiver, self._store)
        except BaseException:
            self._shut()
            raise
        await super().start()

    async def _start_vllm(self) -> None:
        for name, value in _ENVIRONMENT.items():
            os.environ.setdefault(name, value)
        from vllm import AsyncEngineArgs
        from vllm.config import KVTransferConfig
        from vllm.v1.engine.async_llm import AsyncLLM

        transfer = KVTransferConfig(
            kv_connector="C2CConnector",
            kv_connector_module_path="cache2cache.serve.vllm.connector",
            kv_role="kv_consumer",
            kv_connector_extra_config={"folder": str(self._store.folder)},
        )
        folder = await asyncio.to_thread(export, self._pair.receiver)
        try:
            arguments = AsyncEngineArgs(
                model=str(folder),
                kv_transfer_config=transfer,
                **_own_options(self._pair, self._max_batch),
                **self._options,
            )
            self._llm = AsyncLLM.from_engine_args(arguments)
        except Exception as error:  # whatever vLLM's start may raise
            raise ModelError(
                f"vLLM cannot serve {self.receiver}", got=f"{type(error).__name__}: {error}",
                hint="VLLM_LOGGING_LEVEL=INFO shows what it did",
            ) from error  # fmt: skip
        self._prefill.context = self._running_llm.model_config.max_model_len

    @property
    def _running_llm(self) -> AsyncLLM:
        assert self._llm is not None, "started before anything is asked"
        return self._llm

    def _shut(self) -> None:
        if self._llm is not None:
            self._llm.shutdown(timeout=_PATIENCE)
        self._store.close()

    def check(self, request: Request) -> None:
        """Raise RequestError for what no engine does, and for what vLLM does in another way."""
        super().check(request)
        asked = request.sampling
        if 0 < asked.temperature < _COLDEST:
            raise RequestError(
                "temperature is out of vLLM's range",
                got=asked.temperature, allowed=f"0, or {_COLDEST} and more", field="temperature",
            )  # fmt: skip
        if asked.logprobs is not None and asked.top_p < 1:
            raise RequestError(
                "vLLM tells probabilities after top_p, not before it", got=f"top_p {asked.top_p}", field="logprobs"
            )

    def cancel(self, job: Job) -> None:
        """See `QueuedEngine`."""
        super().cancel(job)
        answer, task = self._writing.get(job, (None, None))
        # One that is complete is about to tell vLLM so, where vLLM does not know by itself.
        if answer is not None and task is not None and answer.finish is None:
            task.cancel()

    async def stop(self, grace: float) -> None:
        """See `Engine`."""
        await super().stop(grace)
        await asyncio.gather(*(task for _, task in self._writing.values()), return_exceptions=True)
        self._shut()

    # --- from the prefill worker to vLLM ----------------------------------------------------------------------------

    def _hand(self, answer: Answer, cache: str | None) -> None:
        """Called in the worker's thread."""
        try:
            answer.job.loop.call_soon_threadsafe(self._begin, answer, cache)
        except RuntimeError:  # the loop is closed, and with it whoever asked is gone
            self._leave(answer.job, cache)

    def _begin(self, answer: Answer, cache: str | None) -> None:
        if answer.done:  # cancelled
            self._leave(answer.job, cache)
        else:
            task = asyncio.get_running_loop().create_task(self._write(answer, cache))
            self._writing[answer.job] = answer, task
            task.add_done_callback(lambda _: self._leave(answer.job, cache))

    def _leave(self, job: Job, cache: str | None) -> None:
        self._writing.pop(job, None)
        if cache is not None:
            self._store.discard(cache)
        self._prefill.leave(job)

    # --- vLLM's answers -------------------------------------------------------------------------------------------

    async def _write(self, answer: Answer, cache: str | None) -> None:
        from vllm.inputs import tokens_input

        prompt = tokens_input(answer.job.read.ids.tolist(), cache_salt=None if cache is None else store.salt(cache))
        tally = self._prefill.tally
        try:
            outputs = self._running_llm.generate(prompt, self._params(answer, cache), uuid.uuid4().hex)
            async with aclosing(outputs):
                async for output in outputs:
                    if not answer.written:
                        _count_cached(answer, output, cache)
                        tally.begun(answer)
                    tally.sums["tokens_generated"] += self._take(answer, output.outputs[0])
                    if answer.done and not output.finished:
                        break  # which tells vLLM
        except Exception as error:  # whatever vLLM raises
            answer.fail(error)
        if answer.finish is not None:
            tally.ended(answer)

    def _take(self, answer: Answer, output: CompletionOutput) -> int:
        """Add what is new; returns the number of tokens."""
        before, wanted = len(answer.written), answer.job.request.sampling.logprobs
        for i, token in enumerate(output.token_ids):
            if not answer.done:
                answer.take(_drawn(token, output.logprobs[i] if output.logprobs else {}, wanted))
        if output.finish_reason is not None:
            answer.fail(
                ModelError("vLLM could not write the answer", got=output.finish_reason)
            )  # unless it is complete
        return len(answer.written) - before

    def _params(self, answer: Answer, cache: str | None) -> SamplingParams:
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind

        asked = answer.job.request.sampling
        return SamplingParams(
            max_tokens=answer.job.limit,
            temperature=asked.temperature,
            top_p=asked.top_p,
            seed=asked.seed & (2**63 - 1),  # −1 is no seed to vLLM
            logprobs=asked.logprobs,
            stop_token_ids=sorted(self._prefill.ends),
            ignore_eos=True,  # all end tokens are named
            detokenize=False,
            output_kind=RequestOutputKind.DELTA,
            extra_args=None if cache is None else {"kv_transfer_params": {CACHE_FIELD: cache}},
        )


def _own_options(pair: C2C, max_batch: int) -> dict[str, Any]:
    """What requests and sampling rely on."""
    return {
        "dtype": str(pair.receiver.dtype).removeprefix("torch."),
        "max_num_seqs": max_batch,
        "skip_tokenizer_init": True,
        "generation_config": "vllm",  # which is none: penalties and the like would not be the request's
        "logprobs_mode": "processed_logprobs",
        "max_logprobs": MAX_LOGPROBS,
        "disable_log_stats": True,
    }


def _count_cached(answer: Answer, output: RequestOutput, cache: str | None) -> None:
    """What vLLM had read before for another request; a fused cache is new to it, and read here."""
    if cache is None:
        answer.usage = replace(answer.usage, cached_tokens=output.num_cached_tokens or 0)


def _drawn(token: int, logprobs: Mapping[int, Any], wanted: int | None) -> Drawn:
    """A token as vLLM tells it: the likeliest by rank, and the chosen one wherever it is."""
    if wanted is None:
        return Drawn(token)
    ranked = sorted((one.rank, other, one.logprob) for other, one in logprobs.items())
    return Drawn(token, logprobs[token].logprob, tuple((other, p) for rank, other, p in ranked if rank <= wanted))
