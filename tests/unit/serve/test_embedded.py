from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cache2cache.errors import (
    BusyError,
    ContextLengthError,
    ConversationError,
    ModelError,
    RequestError,
    SharerError,
)
from cache2cache.evaluate.scoring import ends_turn
from cache2cache.models.load import LanguageModel
from cache2cache.pipeline import C2C
from cache2cache.serve.admission import Limits
from cache2cache.serve.embedded import TransformersEngine
from cache2cache.serve.engine import Event, Request, Sampling, Usage
from cache2cache.serve.lane import Lane
from cache2cache.testing import random_fuser, tiny_model
from cache2cache.types import SharerPolicy

TEXTS = ("hi", "What is the answer to the question?", "naïve café 缓存 🚀", "a" * 60)


@pytest.fixture(scope="module")
def models(pair):
    """The tiny pair and a second sharer."""
    return (*pair, tiny_model("qwen2", 2, name="tiny-second"))


@pytest.fixture(scope="module")
def c2c(models) -> C2C:
    receiver, *sharers = models
    return C2C(receiver, sharers, [random_fuser(receiver, sharer, seed=i) for i, sharer in enumerate(sharers)])


@pytest.fixture(scope="module")
def closed(models) -> C2C:
    receiver, sharer, _ = models
    return C2C(receiver, [sharer], [random_fuser(receiver, sharer, open_gates=False)])


@dataclass
class Got:
    """Everything that came of a request."""

    events: list[Event]

    @property
    def ids(self) -> list[int]:
        return [token for event in self.events for token in event.tokens]

    @property
    def text(self) -> str:
        return "".join(event.text for event in self.events)

    @property
    def finish(self) -> str | None:
        return self.events[-1].finish

    @property
    def usage(self) -> Usage:
        assert self.events[0].usage is not None
        return self.events[0].usage

    @property
    def logprobs(self) -> list[float]:
        every = [[event.logprob, *event.top] for event in self.events if event.logprob]
        return [one.logprob for step in every for one in step]


def serve(
    pair: C2C,
    body: Callable[[TransformersEngine], Awaitable[Any]],
    grace: float = 0.0,
    *,
    prefix_bytes: int = 0,
    **limits: Any,
) -> Any:
    """Run something against an engine, which must be idle afterwards."""

    async def main() -> Any:
        engine = TransformersEngine(pair, Limits(**limits), prefix_bytes=prefix_bytes)
        await engine.start()
        try:
            result = await body(engine)
            assert engine.load().waiting == 0
            return result
        finally:
            await engine.stop(grace)

    return asyncio.run(main())


async def collect(engine: TransformersEngine, request: Request, cancel_after: int | None = None) -> Got:
    """The events of a request; of the first few tokens if it is cancelled."""
    events = []
    stream = engine.submit(request)
    try:
        async for event in stream:
            events.append(event)
            if len(events) == cancel_after:
                break
    finally:
        await stream.aclose()
    return Got(events)


def answers(pair: C2C, requests: Sequence[Request], **options: Any) -> list[Got]:
    """All at the same moment."""

    async def body(engine: TransformersEngine) -> list[Got]:
        return list(await asyncio.gather(*(collect(engine, request) for request in requests)))

    return serve(pair, body, **options)


def ask(text: str = TEXTS[1], sharers: Sequence[int] = (0,), **sampling: Any) -> Request:
    return Request(
        "r", [{"role": "user", "content": text}], tuple(sharers), sampling=Sampling(**{"max_tokens": 8, **sampling})
    )


# --- the same answer, whatever else is in the batch -----------------------------------------------------------------

messages = st.lists(st.sampled_from(TEXTS), min_size=1, max_size=3).map(
    lambda texts: [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(texts)]
)
speakers = st.sampled_from([(), (0,), (1,), (0, 1)])
samplings = st.builds(
    Sampling,
    max_tokens=st.integers(1, 14),
    temperature=st.sampled_from([0.0, 0.7, 2.0]),
    top_p=st.sampled_from([0.5, 0.9, 1.0]),
    seed=st.integers(-(2**63), 2**63 - 1),
    stop=st.sampled_from([(), ("a",), ("e", "th"), ("\n",)]),
    logprobs=st.sampled_from([None, 0, 3]),
)
requests = st.one_of(
    st.builds(Request, st.just("r"), messages | st.sampled_from(TEXTS), speakers, st.none(), samplings),
    st.builds(
        Request, st.just("r"), messages | st.sampled_from(TEXTS), st.just(()), st.sampled_from([0, 1]), samplings
    ),
)


class TestEveryAnswer:
    @given(
        crowd=st.lists(st.tuples(requests, st.none() | st.integers(1, 6), st.integers(0, 30)), min_size=2, max_size=7),
        max_batch=st.integers(1, 5),
        tight=st.booleans(),
    )
    @settings(max_examples=12)
    def test_is_what_the_request_gets_alone(self, c2c, crowd, max_batch, tight):
        async def one_by_one(engine):
            return [await collect(engine, request) for request, _, _ in crowd]

        async def together(engine):
            async def late(request, cancel_after, steps):
                for _ in range(steps):
                    await asyncio.sleep(0.0005)
                return await collect(engine, request, cancel_after)

            return await asyncio.gather(*(late(*one) for one in crowd))

        alone = serve(c2c, one_by_one, max_batch=1)
        # Tight: room for two or three of them at a time.
        mixed = serve(c2c, together, max_batch=max_batch, memory_bytes=1_200_000 if tight else None)
        for (_, cancel_after, _), expected, got in zip(crowd, alone, mixed, strict=True):
            expected = Got(expected.events[:cancel_after])
            assert (got.ids, got.text, got.finish, got.usage) == (
                expected.ids,
                expected.text,
                expected.finish,
                expected.usage,
            )
            torch.testing.assert_close(got.logprobs, expected.logprobs, rtol=1e-4, atol=1e-4)

    @pytest.mark.parametrize("sharers", [(), (0,), (1,), (0, 1)])
    def test_is_greedily_that_of_the_pipeline(self, c2c, sharers):
        requests = [ask(text, sharers) for text in TEXTS]
        expected = c2c.generate(
            [r.prompt for r in requests], sharers=[list(sharers)] * 4, do_sample=False, max_new_tokens=8
        )
        for got, generation in zip(answers(c2c, requests), expected, strict=True):
            assert got.ids == generation.ids
            assert got.text == generation.text
            assert (got.usage.prompt_tokens, got.usage.sharer_tokens) == (
                generation.counts.receiver_prompt,
                generation.counts.sharer_prompt,
            )

    def test_of_a_sharer_by_itself_is_that_of_its_own_template(self, c2c, models):
        request = replace(ask(sharers=()), alone=0)
        (got,) = answers(c2c, [request])
        assert got.ids == C2C(models[1]).generate(request.prompt, do_sample=False, max_new_tokens=8).ids
        assert got.usage.sharer_tokens == ()

    def test_depends_on_its_prompt_its_sharers_and_who_answers(self, c2c):
        asked = [ask(), ask(TEXTS[2]), ask(sharers=()), ask(sharers=(1,)), replace(ask(sharers=()), alone=0)]
        assert len({tuple(got.ids) for got in answers(c2c, asked)}) == len(asked)

    def test_depends_on_its_seed_alone(self, c2c):
        one, other, again = answers(c2c, [ask(temperature=1.0, seed=seed) for seed in (1, 2, 1)])
        assert one.ids == again.ids != other.ids

    def test_ignores_penalties_of_the_generation_config(self, c2c):
        """They count tokens of padding, so they would make an answer depend on its batch."""
        (plain,) = answers(c2c, [ask()])
        config = c2c.receiver.model.generation_config
        config.repetition_penalty, config.no_repeat_ngram_size, config.min_new_tokens = 5.0, 1, 3
        try:
            assert answers(c2c, [ask()])[0].ids == plain.ids
        finally:
            config.repetition_penalty = config.no_repeat_ngram_size = config.min_new_tokens = None

    def test_does_not_depend_on_how_the_generation_config_would_have_it_read(self, c2c, monkeypatch):
        """Without a cache, or in pieces, transformers would read the prompt twice."""
        (plain,) = answers(c2c, [ask()])
        for name, value in (("use_cache", False), ("prompt_lookup_num_tokens", 3), ("prefill_chunk_size", 4)):
            monkeypatch.setattr(c2c.receiver.model.generation_config, name, value)
            assert answers(c2c, [ask()])[0].ids == plain.ids, name


class TestText:
    def test_is_read_as_it_is(self, closed):
        model, tokenizer = closed.receiver.model, closed.receiver.tokenizer
        ids = tokenizer("the question", return_tensors="pt")["input_ids"]
        expected = model.generate(ids, do_sample=False, max_new_tokens=6)[0, ids.shape[1] :].tolist()
        request = Request("r", "the question", (0,), sampling=Sampling(max_tokens=6))
        (got,) = answers(closed, [request])
        assert got.ids == expected
        assert got.usage.prompt_tokens == ids.shape[1]

    def test_of_one_token_joins_and_is_joined(self, c2c):
        requests = [Request("r", text, (), sampling=Sampling(max_tokens=9)) for text in ("a", "b", "abc")]
        together = answers(c2c, requests)
        assert [got.ids for got in together] == [answers(c2c, [request])[0].ids for request in requests]

    def test_gets_one_beginning_of_sequence(self, c2c, models):
        bos = models[1].tokenizer.bos_token
        asked = [Request("r", text, (), 0, Sampling(max_tokens=4)) for text in ("hi", f"{bos}hi")]
        plain, begun = answers(c2c, asked)
        assert plain.usage.prompt_tokens == begun.usage.prompt_tokens == len(models[1].tokenizer("hi")["input_ids"])


# --- how answers end ------------------------------------------------------------------------------------------------


class TestAnAnswerEnds:
    def test_at_its_limit(self, c2c):
        (got,) = answers(c2c, [ask(max_tokens=3)])
        assert len(got.ids) == 3
        assert got.finish == "length"

    def test_at_the_engines_limit_if_it_has_none(self, c2c):
        (got,) = answers(c2c, [ask(max_tokens=None)], max_new_tokens=5)
        assert len(got.ids) == 5

    def test_at_the_end_of_the_context_if_it_has_no_limit(self, c2c):
        request = ask("a" * 480, sharers=(), max_tokens=None)
        (got,) = answers(c2c, [request], max_new_tokens=400)
        assert got.usage.prompt_tokens + len(got.ids) == 512 or got.finish == "stop"

    def test_at_an_end_token(self, c2c):
        (long,) = answers(c2c, [ask()])
        config = c2c.receiver.model.generation_config
        end, config.eos_token_id = config.eos_token_id, [config.eos_token_id, long.ids[4]]
        try:
            (got,) = answers(c2c, [ask()])
            assert ends_turn(c2c.receiver, got.ids)
        finally:
            config.eos_token_id = end
        assert got.ids == long.ids[: long.ids.index(long.ids[4]) + 1]
        assert got.finish == "stop"

    def test_before_a_stop_text(self, c2c):
        (long,) = answers(c2c, [ask(max_tokens=40)])
        stop = long.text[5:8]
        (got,) = answers(c2c, [ask(max_tokens=40, stop=(stop,))])
        assert got.text == long.text[: long.text.index(stop)]
        assert got.finish == "stop"
        assert len(got.ids) < 40

    def test_with_usage_first_and_finish_last(self, c2c):
        (got,) = answers(c2c, [ask()])
        assert [event.usage is not None for event in got.events] == [True] + [False] * 7
        assert [event.finish is not None for event in got.events] == [False] * 7 + [True]

    def test_with_the_probabilities_that_were_asked_for(self, c2c):
        none, chosen, top = answers(c2c, [ask(logprobs=n) for n in (None, 0, 3)])
        assert none.logprobs == []
        assert [len(event.top) for event in chosen.events] == [0] * 8
        for event in top.events:
            assert event.top[0] == event.logprob  # greedy
            assert event.logprob.id == event.tokens[0]
            assert event.logprob.text == c2c.receiver.tokenizer.decode(list(event.tokens))

    def test_with_the_bytes_that_crossed(self, c2c):
        fused, alone = answers(c2c, [ask(), ask(sharers=())])
        assert fused.usage.cache_bytes > 0
        assert alone.usage.cache_bytes == 0


# --- requests that are refused --------------------------------------------------------------------------------------


class TestRefused:
    @pytest.mark.parametrize(
        ("request_", "error"),
        [
            (ask(sharers=(2,)), RequestError),
            (ask(sharers=(-1,)), RequestError),
            (replace(ask(sharers=()), alone=2), RequestError),
            (replace(ask(sharers=(0,)), alone=0), RequestError),
            (replace(ask(), prompt=""), RequestError),
            (replace(ask(), prompt=[]), ConversationError),
            (replace(ask(), prompt=[{"role": "robot", "content": "hi"}]), ConversationError),
            (replace(ask(), prompt=[{"role": "user", "content": None}]), ConversationError),
            (ask("a" * 600), ContextLengthError),
            (ask("a" * 450, max_tokens=100), ContextLengthError),
            (ask(max_tokens=1025), RequestError),
            (ask(temperature=-1.0), RequestError),
        ],
    )
    def test_and_the_others_are_answered(self, c2c, request_, error):
        async def body(engine):
            good, bad = await asyncio.gather(collect(engine, ask()), collect(engine, request_), return_exceptions=True)
            return good, bad

        good, bad = serve(c2c, body)
        assert isinstance(bad, error), bad
        assert len(good.ids) == 8

    def test_if_it_never_fits_into_memory(self, c2c):
        async def body(engine):
            with pytest.raises(RequestError, match="memory"):
                await collect(engine, ask("a" * 300))
            return await collect(engine, ask("a", max_tokens=2))

        assert len(serve(c2c, body, memory_bytes=100_000).ids) == 2

    def test_when_the_queue_is_full(self, c2c):
        async def body(engine):
            return await asyncio.gather(
                *(collect(engine, ask(max_tokens=30)) for _ in range(8)), return_exceptions=True
            )

        results = serve(c2c, body, max_batch=1, max_waiting=2)
        busy = [r for r in results if isinstance(r, BusyError)]
        assert len(busy) >= 5
        assert all(error.retry_after >= 1 for error in busy)
        assert {len(r.ids) for r in results if isinstance(r, Got)} == {30}

    def test_when_the_engine_stops(self, c2c):
        async def main():
            engine = TransformersEngine(c2c)
            await engine.start()
            await engine.stop(0)
            with pytest.raises(BusyError, match="stop"):
                await collect(engine, ask())

        asyncio.run(main())


# --- failures -------------------------------------------------------------------------------------------------------


class TestAFailure:
    def test_of_one_prompt_leaves_its_batch_mates_alone(self, c2c, monkeypatch):
        original, poison = C2C.read, ask(TEXTS[2])
        ids = c2c.rows([poison.prompt])[0].ids

        def fail(self, prepared, **kwargs):
            if any(ids.tolist() == row[row != 0].tolist()[-len(ids) :] for row in prepared.ids):
                raise MemoryError("too large")
            return original(self, prepared, **kwargs)

        monkeypatch.setattr(C2C, "read", fail)

        async def body(engine):
            return await asyncio.gather(
                *(collect(engine, r) for r in (ask(), poison, ask("hi"))), return_exceptions=True
            )

        one, bad, other = serve(c2c, body)
        assert isinstance(bad, MemoryError)
        assert len(one.ids) == len(other.ids) == 8

    def test_of_a_batch_ends_all_of_it_and_not_the_engine(self, c2c, monkeypatch):
        original, failures = Lane.write, [RuntimeError("the device is lost")]

        def fail(self, enough):
            if failures:
                raise failures.pop()
            original(self, enough)

        monkeypatch.setattr(Lane, "write", fail)

        async def body(engine):
            with pytest.raises(RuntimeError, match="the device is lost"):
                await collect(engine, ask())
            return await collect(engine, ask())

        assert len(serve(c2c, body).ids) == 8

    def test_of_the_arithmetic_is_noticed(self, c2c, monkeypatch):
        monkeypatch.setattr(
            c2c.receiver.model.lm_head, "forward", lambda x: torch.full((*x.shape[:-1], 300), float("nan"))
        )

        async def body(engine):
            with pytest.raises(ModelError, match="not numbers"):
                await collect(engine, ask())

        serve(c2c, body)


class Mute(LanguageModel):
    """A sharer that cannot be heard when it is to read a certain number of tokens, or any with 0."""

    at = 0

    def prefill(self, ids, mask, cache, needed, layers):
        if not self.at or self.at in mask.sum(1):
            raise SharerError("the sharer is gone")
        return super().prefill(ids, mask, cache, needed, layers)


class TestASharerThatCannotBeHeard:
    def pair(self, c2c: C2C, policy: SharerPolicy, at: int = 0) -> C2C:
        lm = c2c.sharers[0]
        mute = Mute(lm.model, lm.tokenizer, lm.card)
        mute.at = at
        return C2C(c2c.receiver, [mute, c2c.sharers[1]], c2c.fusers, on_sharer_failure=policy)

    def test_fails_those_who_listen_to_it(self, c2c):
        async def body(engine):
            asked = (ask(), ask("hi", (1,)), ask("hi", ()))
            return await asyncio.gather(*(collect(engine, r) for r in asked), return_exceptions=True)

        failed, other, alone = serve(self.pair(c2c, "fail"), body)
        assert isinstance(failed, SharerError)
        assert len(other.ids) == len(alone.ids) == 8
        assert other.events[0].degraded == alone.events[0].degraded == ()

    def test_is_left_out_and_named_where_that_is_allowed(self, c2c):
        asked = [ask(), ask(sharers=(0, 1)), ask(sharers=(1,))]
        got = answers(self.pair(c2c, "receiver-alone"), asked)
        expected = answers(c2c, [ask(sharers=()), ask(sharers=(1,)), ask(sharers=(1,))])
        assert [one.ids for one in got] == [one.ids for one in expected]
        assert [one.usage for one in got] == [one.usage for one in expected]
        assert [one.events[0].degraded for one in got] == [(0,), (0,), ()]
        assert not any(event.degraded for one in got for event in one.events[1:])

    def test_for_one_prompt_is_heard_for_the_others(self, c2c):
        first, second = ask(), ask(TEXTS[3])
        at = len(c2c.rows([second.prompt])[0].sharers[0].ids)
        got = answers(self.pair(c2c, "receiver-alone", at), [ask("hi"), first, second])
        assert [one.events[0].degraded for one in got] == [(), (), (0,)]
        assert got[1].ids == answers(c2c, [first])[0].ids

    def test_leaves_nothing_to_go_on_with(self, c2c):
        got = turns(self.pair(c2c, "receiver-alone"), TEXTS[:2], prefix_bytes=10**8)
        assert [one.usage.cached_tokens for one in got] == [0, 0]


# --- order, cancelling, stopping ------------------------------------------------------------------------------------


class TestOrder:
    def test_is_first_come_first_served(self, c2c):
        async def body(engine):
            begun = []

            async def one(name):
                async for event in engine.submit(ask("a" * 5 * name)):
                    if event.usage:
                        begun.append(name)

            await asyncio.gather(*(one(name) for name in range(1, 7)))
            return begun

        assert serve(c2c, body, max_batch=1) == [1, 2, 3, 4, 5, 6]

    def test_lets_nobody_overtake_who_does_not_fit_yet(self, c2c):
        large = ask("a" * 200, max_tokens=4)

        async def body(engine):
            begun = []

            async def one(name, request):
                async for event in engine.submit(request):
                    if event.usage:
                        begun.append(name)

            small = ask("a", max_tokens=30)
            await asyncio.gather(one("first", small), one("large", large), *(one("later", small) for _ in range(3)))
            return begun

        # Enough for the large one, and not for the first beside it.
        assert serve(c2c, body, memory_bytes=300_000)[:2] == ["first", "large"]

    def test_lets_models_take_turns(self, c2c):
        async def body(engine):
            long = asyncio.create_task(collect(engine, ask(max_tokens=400)))
            while not engine.load().running:
                await asyncio.sleep(0.001)
            got = await collect(engine, replace(ask(sharers=()), alone=0))
            assert not long.done()
            long.cancel()
            return got

        assert len(serve(c2c, body).ids) == 8

    def test_lets_who_comes_later_join(self, c2c):
        async def body(engine):
            long = asyncio.create_task(collect(engine, ask(max_tokens=400)))
            while not engine.load().running:
                await asyncio.sleep(0.001)
            got = await collect(engine, ask("hi"))
            assert not long.done()
            long.cancel()
            return got

        assert serve(c2c, body).ids == answers(c2c, [ask("hi")])[0].ids


class TestCancelling:
    def test_frees_its_place(self, c2c):
        async def body(engine):
            await collect(engine, ask(max_tokens=400), cancel_after=2)
            return await collect(engine, ask())

        assert len(serve(c2c, body, max_batch=1).ids) == 8

    def test_who_waits_frees_the_place_in_the_queue(self, c2c):
        async def body(engine):
            long = asyncio.create_task(collect(engine, ask(max_tokens=400)))
            while not engine.load().running:
                await asyncio.sleep(0.001)
            waits = asyncio.create_task(collect(engine, ask()))
            while not engine.load().waiting:
                await asyncio.sleep(0.001)
            waits.cancel()
            await asyncio.gather(waits, return_exceptions=True)
            assert engine.load().waiting == 0
            long.cancel()
            await asyncio.gather(long, return_exceptions=True)
            return await collect(engine, ask())

        assert len(serve(c2c, body, max_batch=1, max_waiting=1).ids) == 8


class TestStopping:
    def test_lets_those_end_who_run_or_wait(self, c2c):
        async def main():
            engine = TransformersEngine(c2c, Limits(max_batch=1))
            await engine.start()
            tasks = [asyncio.create_task(collect(engine, ask())) for _ in range(3)]
            while engine.load().waiting < 2:
                await asyncio.sleep(0)
            await engine.stop(60)
            return await asyncio.gather(*tasks)

        assert [len(got.ids) for got in asyncio.run(main())] == [8, 8, 8]

    def test_cancels_the_rest_after_its_grace(self, c2c):
        async def main():
            engine = TransformersEngine(c2c, Limits(max_batch=1))
            await engine.start()
            tasks = [asyncio.create_task(collect(engine, ask(max_tokens=400))) for _ in range(2)]
            while not engine.load().running:
                await asyncio.sleep(0.001)
            await engine.stop(0)
            return await asyncio.gather(*tasks, return_exceptions=True)

        assert [type(result) for result in asyncio.run(main())] == [BusyError, BusyError]


# --- counting -------------------------------------------------------------------------------------------------------


def test_load_counts(c2c):
    async def body(engine):
        got = await asyncio.gather(*(collect(engine, ask(text)) for text in TEXTS))
        while engine.load().running:
            await asyncio.sleep(0.001)
        return got, engine.load()

    got, load = serve(c2c, body)
    assert load.counters["tokens_generated"] == sum(len(one.ids) for one in got)
    assert load.counters["tokens_prompt"] == sum(one.usage.prompt_tokens for one in got)
    assert load.counters["tokens_sharer"] == sum(sum(one.usage.sharer_tokens) for one in got)
    assert load.counters["sharer_bytes"] == sum(one.usage.cache_bytes for one in got)
    assert load.counters["answers"] == len(TEXTS)
    assert load.cache_bytes == 0
    assert all(
        load.counters[f"seconds_{stage}"] > 0 for stage in ("tokenise", "align", "sharer_prefill", "fuse", "decode")
    )


def test_names(c2c):
    engine = TransformersEngine(c2c)
    assert (engine.receiver, engine.sharers) == ("tiny-receiver", ["tiny-sharer", "tiny-second"])


def test_equal_prompts_are_read_once(c2c, monkeypatch):
    read = []
    original = C2C.read
    monkeypatch.setattr(C2C, "read", lambda self, p, **k: read.append(len(p.ids)) or original(self, p, **k))
    choices = [ask(temperature=1.0, seed=seed) for seed in range(4)]
    got = answers(c2c, choices)
    assert sum(read) < 4
    monkeypatch.undo()
    assert [one.ids for one in got] == [answers(c2c, [choice])[0].ids for choice in choices]


# --- conversations that go on ---------------------------------------------------------------------------------------


def turns(pair: C2C, texts: Sequence[str], *, sharers: Sequence[int] = (0, 1), **options: Any) -> list[Got]:
    """One conversation, request by request."""

    async def body(engine):
        messages, got = [], []
        for text in texts:
            messages = [*messages, {"role": "user", "content": text}]
            request = Request("r", messages, tuple(sharers), sampling=Sampling(max_tokens=6))
            got.append(await collect(engine, request))
            messages = [*messages, {"role": "assistant", "content": got[-1].text}]
        return got

    return serve(pair, body, **options)


class TestAConversationThatGoesOn:
    def test_gets_what_a_chat_would_say(self, c2c):
        chat = c2c.chat()
        expected = [chat.send(text, do_sample=False, max_new_tokens=6).ids for text in TEXTS[:3]]
        got = turns(c2c, TEXTS[:3], prefix_bytes=10**8)
        assert [one.ids for one in got] == expected
        assert got[0].usage.cached_tokens == 0
        assert 0 < got[1].usage.cached_tokens < got[1].usage.prompt_tokens

    def test_is_a_fresh_request_without_a_prefix_cache(self, c2c):
        got = turns(c2c, TEXTS[:3])
        chat = c2c.chat()
        assert [one.usage.cached_tokens for one in got] == [0, 0, 0]
        assert [one.ids for one in got] != [
            chat.send(text, do_sample=False, max_new_tokens=6).ids for text in TEXTS[:3]
        ]

    def test_without_sharers_gets_the_same_with_and_without_a_prefix_cache(self, c2c):
        with_, without = (turns(c2c, TEXTS, sharers=(), prefix_bytes=size) for size in (10**8, 0))
        assert [one.ids for one in with_] == [one.ids for one in without]

    def test_lets_only_new_positions_cross(self, c2c):
        kept, fresh = (turns(c2c, TEXTS[:2], prefix_bytes=size)[1] for size in (10**8, 0))
        assert 0 < kept.usage.cache_bytes < fresh.usage.cache_bytes

    def test_in_a_full_batch_gets_the_same(self, c2c):
        alone = turns(c2c, TEXTS[:2], prefix_bytes=10**8)[1]

        async def body(engine):
            first = ask(TEXTS[0], (0, 1), max_tokens=6)
            got = await asyncio.gather(*(collect(engine, ask(t, (0, 1), max_tokens=6)) for t in TEXTS))
            prompt = [
                *first.prompt,
                {"role": "assistant", "content": got[0].text},
                {"role": "user", "content": TEXTS[1]},
            ]
            going_on = replace(first, prompt=prompt)
            return (await asyncio.gather(collect(engine, ask()), collect(engine, going_on), collect(engine, going_on)))[
                1:
            ]

        assert [one.ids for one in serve(c2c, body, prefix_bytes=10**8)] == [alone.ids] * 2

    @pytest.mark.parametrize("other", [{"sharers": (1,)}, {"sharers": ()}, {"sharers": (), "alone": 0}])
    def test_with_other_speakers_is_read_anew(self, c2c, other):
        async def body(engine):
            first = ask(sharers=(0,))
            got = await collect(engine, first)
            prompt = [*first.prompt, {"role": "assistant", "content": got.text}, {"role": "user", "content": "more"}]
            return await collect(engine, replace(first, prompt=prompt, **other))

        assert serve(c2c, body, prefix_bytes=10**8).usage.cached_tokens == 0

    def test_gives_way_to_others_when_memory_is_full(self, c2c):
        async def body(engine):
            got = [await collect(engine, ask(text)) for text in TEXTS]
            prompts = [
                [*ask(text).prompt, {"role": "assistant", "content": one.text}, {"role": "user", "content": "more"}]
                for text, one in zip(TEXTS, got, strict=True)
            ]
            while engine.load().running:
                await asyncio.sleep(0.001)
            held = engine.load().cache_bytes
            return held, [await collect(engine, replace(ask(), prompt=prompts[i])) for i in (3, 0)]

        held, (latest, oldest) = serve(c2c, body, prefix_bytes=150_000)
        assert 0 < held <= 150_000
        assert latest.usage.cached_tokens > 0
        assert oldest.usage.cached_tokens == 0
