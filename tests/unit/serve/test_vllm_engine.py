"""vLLM itself, behind fused caches: what the embedded engine says, whatever else is asked at the same time."""

# pyright: reportMissingImports=false

from __future__ import annotations

import asyncio
import multiprocessing
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch

from cache2cache.errors import ContextLengthError, RequestError
from cache2cache.pipeline import C2C
from cache2cache.serve.admission import Limits
from cache2cache.serve.embedded import TransformersEngine
from cache2cache.serve.engine import Event, Request, Sampling, Usage
from cache2cache.serve.queued import QueuedEngine
from cache2cache.testing import WORDS, random_fuser, tiny_model, tiny_tokenizer

pytest.importorskip("vllm")
from cache2cache.serve.vllm.engine import VllmEngine

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1200)]

BLOCK = 32
TEXTS = (
    "hi",
    "What is the answer to the question?",
    "naïve café 缓存 🚀",
    "a" * 120,
    "the question and the letter " * 4,
)


@pytest.fixture(scope="module")
def c2c() -> C2C:
    """With a head size that vLLM has a kernel for."""
    receiver = tiny_model("qwen3", name="tiny-receiver", head_dim=32)
    sharers = [
        tiny_model("llama", 1, tokenizer=tiny_tokenizer(merge=WORDS, bos=True), name="tiny-sharer"),
        tiny_model("qwen2", 2, name="tiny-second"),
    ]
    return C2C(receiver, sharers, [random_fuser(receiver, sharer, seed=i) for i, sharer in enumerate(sharers)])


@pytest.fixture(scope="module")
def loop() -> Iterator[asyncio.Runner]:
    with asyncio.Runner() as runner:
        yield runner


@pytest.fixture(scope="module")
def engine(c2c: C2C, loop: asyncio.Runner, tmp_path_factory: pytest.TempPathFactory) -> Iterator[VllmEngine]:
    """Whose paged cache is so small that long answers push one another out of it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("C2C_HOME", str(tmp_path_factory.mktemp("home")))
        patch.setenv("VLLM_CPU_KVCACHE_SPACE", "1")
        engine = VllmEngine(
            c2c,
            Limits(max_new_tokens=64),
            options={"enforce_eager": True, "block_size": BLOCK, "num_gpu_blocks_override": 25},
        )
        loop.run(engine.start())
    yield engine
    loop.run(engine.stop(5))
    assert not engine._store.folder.exists()


@pytest.fixture
def ask(engine: VllmEngine, loop: asyncio.Runner) -> Iterator[Any]:
    """Sends requests at the same moment; nothing of them may be left."""

    def together(*requests: Request) -> list[Got]:
        return loop.run(_together(engine, requests))

    yield together
    loop.run(_idle(engine))
    assert [path.name for path in engine._store.folder.iterdir() if path.name != "lock"] == []


class Got:
    def __init__(self, events: Sequence[Event]):
        self.events = events
        self.ids = [token for event in events for token in event.tokens]
        self.text = "".join(event.text for event in events)
        self.finish = events[-1].finish

    @property
    def usage(self) -> Usage:
        assert self.events[0].usage is not None
        return self.events[0].usage

    @property
    def logprobs(self) -> list[float]:
        return [one.logprob for event in self.events if event.logprob for one in (event.logprob, *event.top)]


async def _collect(engine: QueuedEngine, request: Request) -> Got:
    return Got([event async for event in engine.submit(request)])


async def _together(engine: QueuedEngine, requests: Sequence[Request]) -> list[Got]:
    return await asyncio.gather(*(_collect(engine, request) for request in requests))


async def _idle(engine: QueuedEngine) -> None:
    async with asyncio.timeout(60):
        while engine.load().running or engine.load().waiting:
            await asyncio.sleep(0.01)


def request(text: str = TEXTS[1], sharers: Sequence[int] = (0,), **sampling: Any) -> Request:
    options = {"max_tokens": 24, **sampling}
    return Request("r", [{"role": "user", "content": text}], tuple(sharers), sampling=Sampling(**options))


def embedded(c2c: C2C, *requests: Request) -> list[Got]:
    async def main() -> list[Got]:
        engine = TransformersEngine(c2c, Limits(max_new_tokens=64))
        await engine.start()
        try:
            return await _together(engine, requests)
        finally:
            await engine.stop(0)

    return asyncio.run(main())


EVERY = [request(text, sharers) for text in TEXTS for sharers in ((), (0,), (1,), (0, 1))]


def test_greedy_answers_are_those_of_the_embedded_engine(ask: Any, c2c: C2C):
    expected = [(got.ids, got.text, got.finish) for got in embedded(c2c, *EVERY)]
    assert len({tuple(ids) for ids, *_ in expected}) == len(EVERY)
    alone = [ask(one)[0] for one in EVERY]
    assert [(got.ids, got.text, got.finish) for got in alone] == expected
    together = ask(*EVERY, *reversed(EVERY))
    assert [(got.ids, got.text, got.finish) for got in together] == expected + expected[::-1]


def test_usage_says_what_was_read(ask: Any, c2c: C2C):
    texts = ("one more question", "another question")
    requests = [request(texts[i], sharers) for i, sharers in enumerate(((), (0, 1)))]
    for got, expected in zip(ask(*requests), embedded(c2c, *requests), strict=True):
        assert got.usage == expected.usage
        assert [event.usage is not None for event in got.events] == [True] + [False] * (len(got.events) - 1)


def test_fused_blocks_and_others_of_the_same_tokens_are_kept_apart(ask: Any, c2c: C2C):
    """vLLM keeps whole blocks by their tokens; these prompts fill three, and differ in who speaks alone."""
    text = "b" * (3 * BLOCK)
    requests = [request(text, sharers) for sharers in ((), (0,), (), (1,), (0, 1), (0,), ())]
    expected = [got.ids for got in embedded(c2c, *requests)]
    assert len({tuple(ids) for ids in expected}) == 4
    got = [ask(one)[0] for one in requests]
    assert [one.ids for one in got] == expected
    cached = [one.usage.cached_tokens for one in got]
    assert cached[0] == 0
    assert cached[2] >= 2 * BLOCK, "the receiver's own blocks were there to be mixed up"
    assert [cached[i] for i in (1, 3, 4, 5)] == [0] * 4


def test_long_answers_push_one_another_out_and_are_the_same(ask: Any, c2c: C2C):
    """Ten of them need five blocks each in the end, and there are 24: vLLM puts some aside and loads them again."""
    requests = [request(f"{i} " + "c" * 60, (i % 2,), max_tokens=64) for i in range(10)]
    expected = [got.ids for got in embedded(c2c, *requests)]
    assert [got.ids for got in ask(*requests)] == expected


def test_an_answer_ends_before_a_stop_text_and_at_its_limit(ask: Any):
    (long,) = ask(request(max_tokens=40))
    stop = long.text[5:8]
    stopped, short = ask(request(max_tokens=40, stop=(stop,)), request(max_tokens=3))
    assert stopped.text == long.text[: long.text.index(stop)]
    assert stopped.finish == "stop"
    assert (short.ids, short.finish) == (long.ids[:3], "length")


def test_an_answer_ends_at_an_end_token(ask: Any, engine: VllmEngine):
    (long,) = ask(request())
    worker = engine._prefill
    before, worker.ends = worker.ends, worker.ends | {long.ids[4]}
    try:
        (got,) = ask(request())
    finally:
        worker.ends = before
    assert got.finish == "stop"
    assert got.ids == long.ids[: long.ids.index(long.ids[4]) + 1]


def test_probabilities_are_those_of_the_embedded_engine(ask: Any, c2c: C2C):
    for asked in (request(logprobs=0), request(logprobs=3), request(logprobs=3, max_tokens=1, temperature=0.7)):
        (got,), (expected,) = ask(asked), embedded(c2c, asked)
        if asked.sampling.temperature:  # each draws in its own way, among the same
            told = [{one.id: one.logprob for one in step.events[0].top} for step in (got, expected)]
            assert told[0] == pytest.approx(told[1], abs=1e-3)
        else:
            torch.testing.assert_close(got.logprobs, expected.logprobs, rtol=1e-3, atol=1e-3)


def test_a_seed_gives_one_answer_whatever_else_is_asked(ask: Any):
    asked = [request(temperature=1.0, seed=seed) for seed in (1, 2, 1, -1)]
    one, other, again, _ = ask(*asked)
    assert one.ids == again.ids != other.ids
    assert ask(asked[0])[0].ids == one.ids


def test_whoever_leaves_is_forgotten(ask: Any, engine: VllmEngine, loop: asyncio.Runner, c2c: C2C):
    async def leave(after: int) -> None:
        events = engine.submit(request(max_tokens=64))
        for _ in range(after):
            await anext(events)
        await events.aclose()

    async def main() -> list[Got]:
        stays = asyncio.create_task(_collect(engine, request()))
        leaves = [asyncio.create_task(leave(after)) for after in (1, 3, 9)]
        slow = asyncio.create_task(_collect(engine, request()))
        await asyncio.sleep(0)
        slow.cancel()
        await asyncio.gather(*leaves)
        await asyncio.wait([slow])
        return [await stays]

    assert loop.run(main())[0].ids == embedded(c2c, request())[0].ids


@pytest.mark.parametrize(
    ("asked", "error", "said"),
    [
        (replace(request(sharers=()), alone=0), RequestError, "by itself"),
        (request(sharers=(2,)), RequestError, "no such sharer"),
        (request(logprobs=1, top_p=0.5, temperature=1.0), RequestError, "top_p"),
        (request(temperature=0.005), RequestError, "0.01"),
        (request(max_tokens=65), RequestError, "up to 64"),
        (request("a" * 600), ContextLengthError, "context"),
    ],
)
def test_what_is_refused(ask: Any, asked: Request, error: type[Exception], said: str):
    with pytest.raises(error, match=said):
        ask(asked)


@pytest.mark.parametrize(
    ("params", "salt", "options"),
    [
        ({"c2c_cache": "c2c-" + "0" * 32 + "-0"}, None, {}),
        ({"c2c_cache": "c2c-" + "0" * 32 + "-0"}, "c2c-" + "0" * 32, {}),
        ({"c2c_cache": "../../etc/passwd"}, "c2c-" + "0" * 32, {}),
        ({"c2c_cache": 3}, "c2c-" + "0" * 32, {}),
        (None, "c2c-" + "0" * 32, {}),
        ({"c2c_cache": "c2c-" + "0" * 32 + "-0"}, "c2c-" + "0" * 32, {"prompt_logprobs": 1}),
        ({"c2c_cache": "c2c-" + "0" * 32 + "-0"}, "c2c-" + "0" * 32, {"skip_reading_prefix_cache": True}),
    ],
)
def test_vllm_answers_nothing_without_the_cache_that_was_named(
    engine: VllmEngine, loop: asyncio.Runner, ask: Any, params: Any, salt: str | None, options: dict[str, Any]
):
    """Here as under plain `vllm serve`: another answer than the one that was asked for would look like it."""
    from vllm import SamplingParams
    from vllm.inputs import tokens_input

    async def main() -> Any:
        assert engine._llm is not None
        extra = {"kv_transfer_params": params} if params else None
        sampling = SamplingParams(max_tokens=4, temperature=0, detokenize=False, extra_args=extra, **options)
        prompt = tokens_input([5] * (BLOCK + 1), cache_salt=salt)
        async with asyncio.timeout(60):
            outputs = engine._llm.generate(prompt, sampling, f"bad-{params}-{salt}-{options}")
            return [output.outputs[0] async for output in outputs][-1]

    answer = loop.run(main())
    assert (answer.finish_reason, list(answer.token_ids)) == ("error", [])
    ask(request())  # and vLLM lives


def test_options_that_are_the_engines_own(c2c: C2C):
    with pytest.raises(RequestError, match="dtype, model"):
        VllmEngine(c2c, options={"model": "x", "dtype": "float16", "enforce_eager": True})


def test_vllm_dies(engine: VllmEngine, loop: asyncio.Runner):
    """Last, since it does not come back."""

    async def main() -> None:
        running = asyncio.create_task(_collect(engine, request("a" * 120, max_tokens=64)))
        async with asyncio.timeout(60):
            while not engine.load().running:
                await asyncio.sleep(0.01)
            assert engine.alive
            for process in multiprocessing.active_children():
                process.kill()
            with pytest.raises(Exception, match="EngineCore"):
                await running
            while engine.alive:
                await asyncio.sleep(0.01)
            with pytest.raises(Exception, match="EngineCore"):
                await _collect(engine, request())

    loop.run(main())
