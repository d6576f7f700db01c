"""The embedded engine: one thread, transformers' `generate`, batches that rows join and leave between its calls.

Simple on purpose. Where load outgrows it, vLLM answers.
"""

from __future__ import annotations

from collections.abc import Sequence

from cache2cache.pipeline import C2C
from cache2cache.serve.admission import DEFAULT, Limits
from cache2cache.serve.queued import QueuedEngine
from cache2cache.serve.worker import Worker


class TransformersEngine(QueuedEngine):
    """Answers with the models of a pair, in this process. See `Engine`.

    In float32, an answer is what the same request gets alone, whatever else is in its batch. In bfloat16 the last bits
    of a sum depend on the shape of the batch, and now and then a token with them.

    Of a model's generation config only the end tokens are used: penalties and the like would not be the request's.

    Args:
        limits: memory is that of caches, without the prefix cache.
        prefix_bytes: of conversations that are kept for requests that go on with them; 0 keeps none. With it, a request
            that goes on gets the answer that `Chat` would give, where a fresh one has all turns fused in one go.
    """

    def __init__(self, pair: C2C, limits: Limits = DEFAULT, *, prefix_bytes: int = 0):
        worker = Worker(pair, limits, prefix_bytes)
        super().__init__(pair, worker, limits.max_new_tokens)
        self._lanes = worker.lanes

    @property
    def alone(self) -> Sequence[int]:
        """See `Engine`."""
        return [i for i in self._lanes if i is not None]
