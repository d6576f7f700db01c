"""The request path on tiny random models: every way in, every option of generate, nothing depends on the batch."""

import numpy as np
import pytest
import torch
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList, StoppingCriteria, TextStreamer

from cache2cache import C2C, Fuser, plaintext
from cache2cache.errors import AlignmentError, FuserMismatchError, GenerationError, ModelError
from cache2cache.models import kv
from cache2cache.testing import FAMILIES, random_fuser, tiny_model, tiny_pair
from cache2cache.types import Span

TEXTS = (
    "hi",
    "what is the capital of France?",
    "hello world " * 7,
    "缓存 🚀",
    "",
    "a\n\nb",
    "  spaced  ",
    "one two three",
)
CONVERSATIONS = [[{"role": "user", "content": text}] for text in TEXTS]
GREEDY = {"do_sample": False, "max_new_tokens": 10}


@pytest.fixture(scope="module")
def models():
    return tiny_pair()


@pytest.fixture(scope="module")
def pair(models):
    receiver, sharer = models
    return C2C(receiver, [sharer], [random_fuser(receiver, sharer)])


@pytest.fixture(scope="module")
def trio():
    receiver, first = tiny_pair()
    second = tiny_model("qwen2", seed=5, name="second-sharer")
    return C2C(receiver, [first, second], [random_fuser(receiver, first), random_fuser(receiver, second, seed=2)])


def ids(generations):
    return [g.ids for g in generations]


# --- loading ----------------------------------------------------------------------------------------------------------


def test_one_sharer_and_its_fuser_need_no_list(pair, tmp_path):
    folders = [tmp_path / name for name in ("receiver", "sharer", "fuser")]
    for lm, folder in zip((pair.receiver, *pair.sharers), folders, strict=False):
        lm.model.save_pretrained(folder)
        lm.tokenizer.save_pretrained(folder)
    pair.fusers[0].save_pretrained(folders[2])
    receiver, sharer, fuser = folders
    for named in ((str(sharer), str(fuser)), (sharer, Fuser.from_pretrained(fuser)), ([sharer], [fuser])):
        assert len(C2C.from_pretrained(receiver, *named).fusers) == 1
    with pytest.raises(ModelError, match="no device abacus here"):
        C2C.from_pretrained(receiver, sharer, fuser, device="abacus")
    with pytest.raises(TypeError, match=r"got the name .*sharer.*C2C.from_pretrained"):
        C2C(pair.receiver, [str(sharer)], pair.fusers)


# --- batches ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sharers", [None, []], ids=["c2c", "receiver alone"])
def test_every_row_of_a_batch_gets_what_it_gets_alone(pair, sharers):
    alone = [pair.generate(c, sharers=sharers, **GREEDY).ids for c in CONVERSATIONS]
    assert ids(pair.generate(CONVERSATIONS, sharers=sharers, **GREEDY)) == alone


def test_the_sharer_alone_is_batch_invariant_too(models):
    alone = C2C(models[1], template="completion")
    expected = [alone.generate(c, **GREEDY).ids for c in CONVERSATIONS]
    assert ids(alone.generate(CONVERSATIONS, **GREEDY)) == expected


def test_fused_caches_do_not_depend_on_padding(pair):
    batch = pair.prefill(CONVERSATIONS[:3])
    for b, conversation in enumerate(CONVERSATIONS[:3]):
        alone = pair.prefill(conversation)
        size = kv.length(alone.cache)
        padded = kv.stack(batch.cache)[:, :, b : b + 1, :, -size:]
        torch.testing.assert_close(padded, kv.stack(alone.cache), rtol=1e-4, atol=1e-5)


def test_the_sharer_changes_the_answer(pair):
    assert ids(pair.generate(CONVERSATIONS, **GREEDY)) != ids(pair.generate(CONVERSATIONS, sharers=[], **GREEDY))


# --- the receiver alone -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["compact", "paper"])
def test_a_closed_fuser_is_the_receiver_alone_bit_for_bit(models, kind):
    receiver, sharer = models
    closed = C2C(receiver, [sharer], [random_fuser(receiver, sharer, kind, open_gates=False)])
    options = {**GREEDY, "return_dict_in_generate": True, "output_logits": True}
    for conversation in CONVERSATIONS[:4]:
        fused, alone = (closed.generate(conversation, sharers=who, **options) for who in (None, []))
        assert fused.ids == alone.ids
        assert all(torch.equal(a, b) for a, b in zip(fused.raw.logits, alone.raw.logits, strict=True))


def test_the_receiver_alone_is_what_transformers_generates(pair):
    receiver = pair.receiver
    for conversation in CONVERSATIONS[:4]:
        prompt = receiver.tokenizer.apply_chat_template(
            conversation, add_generation_prompt=True, return_tensors="pt", return_dict=True
        )
        expected = receiver.model.generate(**prompt, **GREEDY)[0, prompt["input_ids"].shape[1] :].tolist()
        assert pair.generate(conversation, sharers=[], **GREEDY).ids == expected


def test_a_model_comes_with_its_tokenizer(models):
    receiver, _ = models
    with pytest.raises(TypeError, match="without its tokenizer"):
        C2C(receiver.model)
    for wrong in ((receiver.tokenizer, receiver.model), (receiver.model,)):
        with pytest.raises(TypeError, match=r"takes \(model, tokenizer\), got \("):
            C2C(wrong)


# --- what generate offers -----------------------------------------------------------------------------------------


def test_beams_and_several_answers(pair):
    options = {"max_new_tokens": 6, "num_beams": 3, "num_return_sequences": 2, "do_sample": False}
    alone = [answer for c in CONVERSATIONS[:3] for answer in ids(pair.generate(c, **options))]
    batch = pair.generate(CONVERSATIONS[:3], **options)
    assert ids(batch) == alone and len(batch) == 6
    assert [g.counts.receiver_prompt for g in batch[::2]] == [g.counts.receiver_prompt for g in batch[1::2]]


def test_sampling_follows_the_seed(pair):
    def sample(seed):
        torch.manual_seed(seed)
        answers = pair.generate(
            CONVERSATIONS[0], do_sample=True, temperature=1.5, num_return_sequences=4, max_new_tokens=8
        )
        return ids(answers)

    assert sample(1) == sample(1) != sample(2)


def test_stopping_criteria_logits_processors_and_stop_strings(pair):
    class Only(LogitsProcessor):
        def __call__(self, input_ids, scores):
            forced = torch.full_like(scores, float("-inf"))
            forced[:, ord("x") - ord("!")] = 0
            return forced

    forced = pair.generate(CONVERSATIONS[0], logits_processor=LogitsProcessorList([Only()]), **GREEDY)
    assert len(set(forced.ids)) == 1
    stopped = pair.generate(
        CONVERSATIONS[0], logits_processor=LogitsProcessorList([Only()]), stop_strings=[forced.text[:3]], **GREEDY
    )
    assert stopped.text == forced.text[:3]


def test_transformers_streamers_work(pair, capsys):
    answer = pair.generate(
        CONVERSATIONS[1],
        streamer=TextStreamer(pair.receiver.tokenizer, skip_prompt=True, skip_special_tokens=True),
        **GREEDY,
    )
    assert answer.text.strip() in capsys.readouterr().out


def test_streamed_pieces_make_up_the_answer(pair):
    expected = pair.generate(CONVERSATIONS[1], **GREEDY)
    stream = pair.stream(CONVERSATIONS[1], **GREEDY)
    pieces = []
    while True:
        try:
            pieces.append(next(stream))
        except StopIteration as end:
            answer = end.value
            break
    assert answer.ids == expected.ids and "".join(pieces) == expected.text


def test_an_error_while_streaming_reaches_the_reader(pair):
    with pytest.raises(ValueError):
        list(pair.stream(CONVERSATIONS[1], num_beams=2, max_new_tokens=2))


def test_an_abandoned_stream_stops_decoding(pair):
    stream = pair.stream(CONVERSATIONS[1], do_sample=False, max_new_tokens=400)
    next(stream)
    stream.close()


TWICE = [
    {"prompt_lookup_num_tokens": 3}, {"prefill_chunk_size": 4}, {"assistant_early_exit": 1}, {"use_cache": False},
    {"token_healing": True}, {"use_mtp": True}, {"cache_implementation": "static"}, {"cache_implementation": "dynamic"},
]  # fmt: skip


@pytest.mark.parametrize("option", TWICE)
def test_options_that_would_not_write_from_the_cache_are_refused(pair, option):
    for asked in ({**option, **GREEDY}, {"generation_config": GenerationConfig(**option, **GREEDY)}):
        with pytest.raises(GenerationError, match=f"read the prompt twice; got {next(iter(option))}"):
            pair.generate(CONVERSATIONS[0], **asked)


@pytest.mark.parametrize("option", TWICE)
def test_a_models_own_defaults_for_reading_do_not_change_its_answer(pair, option, monkeypatch):
    expected = pair.generate(CONVERSATIONS[:2], **GREEDY)
    for name, value in option.items():
        monkeypatch.setattr(pair.receiver.model.generation_config, name, value, raising=False)
    for asked in (GREEDY, {"generation_config": GenerationConfig(**GREEDY)}):
        assert ids(pair.generate(CONVERSATIONS[:2], **asked)) == ids(expected)


def test_switches_that_are_off_are_not_refused(pair):
    off = {"token_healing": False, "use_mtp": False}
    assert pair.generate(CONVERSATIONS[0], **off, **GREEDY).ids == pair.generate(CONVERSATIONS[0], **GREEDY).ids


@pytest.mark.parametrize("beams", [1, 2])
def test_where_nobody_says_how_much_a_row_writes_as_much_as_alone(models, beams):
    c2c = C2C(tiny_model("qwen3", max_position_embeddings=64))
    talks = [[{"role": "user", "content": text}] for text in ("x" * 18, "x" * 6)]
    options = {"do_sample": False, "eos_token_id": None, "num_beams": beams}
    alone = [c2c.generate(c, **options) for c in talks]
    assert [len(answer.ids) + answer.counts.receiver_prompt for answer in alone] == [64, 64]
    assert ids(c2c.generate(talks, **options)) == ids(alone)


def test_learned_positions_have_no_room_behind_a_rows_end():
    c2c = C2C(tiny_model("gpt2", n_positions=64))
    answers = c2c.generate(
        [[{"role": "user", "content": "x" * n}] for n in (18, 6)], do_sample=False, eos_token_id=None
    )
    assert len({len(answer.ids) for answer in answers}) == 1


def test_how_much_is_written_may_be_said_in_every_way(pair):
    prompt = pair.generate(CONVERSATIONS[1], do_sample=False, max_new_tokens=1).counts.receiver_prompt
    limits = [{"max_new_tokens": 5}, {"max_length": prompt + 5}]
    for limit in (*limits, *({"generation_config": GenerationConfig(**limit)} for limit in limits)):
        assert len(pair.generate(CONVERSATIONS[1], do_sample=False, eos_token_id=-1, **limit).ids) == 5
    for wrong in (0, -1, 2.5, float("nan"), "5"):
        with pytest.raises(GenerationError, match=f"max_new_tokens {wrong!r}; allowed: an integer, 1 or more"):
            pair.generate(CONVERSATIONS[1], max_new_tokens=wrong)


@pytest.mark.parametrize("kind", [int, np.int64, torch.tensor, lambda end: [end], lambda end: torch.tensor([end])])
def test_end_tokens_may_be_named_in_every_way(pair, kind):
    free = pair.generate(CONVERSATIONS[1], **GREEDY, eos_token_id=None).ids
    end = free[3]
    assert pair.generate(CONVERSATIONS[1], **GREEDY, eos_token_id=kind(end)).ids == free[: free.index(end) + 1]


def test_what_a_given_config_leaves_open_is_the_models_to_say(pair, monkeypatch):
    defaults = pair.receiver.model.generation_config
    free = pair.generate(CONVERSATIONS[1], **GREEDY, eos_token_id=None).ids
    monkeypatch.setattr(defaults, "eos_token_id", [free[3]])
    expected = free[: free.index(free[3]) + 1]
    assert pair.generate(CONVERSATIONS[1], generation_config=GenerationConfig(**GREEDY)).ids == expected
    monkeypatch.setattr(defaults, "num_beams", 3)
    beams = pair.generate(CONVERSATIONS[:2], num_beams=3, **GREEDY)
    assert ids(pair.generate(CONVERSATIONS[:2], generation_config=GenerationConfig(**GREEDY))) == ids(beams)


def test_a_row_that_ends_before_others_of_its_batch_is_as_alone(pair, monkeypatch):
    """Whatever the padding is, and whatever ended it."""
    free = [pair.generate(c, **GREEDY, eos_token_id=None) for c in CONVERSATIONS[:2]]
    stop, first = free[0].text[:3], free[0].ids[1]

    class Second(StoppingCriteria):
        def __call__(self, input_ids, scores, **kwargs):
            return input_ids[:, -1] == first

    ends = {"stop_strings": [stop]}, {"stopping_criteria": [Second()]}, {"stop_strings": [stop], "num_beams": 2}
    for pad, end in ((1, 0), (5, 5), (5, None)):
        monkeypatch.setattr(pair.receiver.model.generation_config, "pad_token_id", pad)
        for by in ends[: 2 if pad == end else 3]:  # beams may have written the end token that fills them up
            options = {**GREEDY, **by, "eos_token_id": end}
            alone = [pair.generate(c, **options) for c in CONVERSATIONS[:2]]
            batch = pair.generate(CONVERSATIONS[:2], **options)
            assert ids(batch) == ids(alone) and [g.text for g in batch] == [g.text for g in alone]
            assert [g.counts.generated for g in batch] == [len(g.ids) for g in alone]
            assert "num_beams" in by or len(alone[0].ids) < len(free[0].ids)


def test_what_generate_refuses_leaves_a_prefill_as_it_was(pair):
    prefill = pair.prefill(CONVERSATIONS[0])
    with pytest.raises(ValueError):
        pair.decode(prefill, num_return_sequences=3, **GREEDY)
    assert pair.decode(prefill, **GREEDY)[0].ids == pair.generate(CONVERSATIONS[0], **GREEDY).ids


def test_a_prefill_is_decoded_once(pair):
    prefill = pair.prefill(CONVERSATIONS[0])
    assert pair.decode(prefill, **GREEDY)[0].ids == pair.generate(CONVERSATIONS[0], **GREEDY).ids
    with pytest.raises(GenerationError, match="decoded once"):
        pair.decode(prefill, **GREEDY)


def test_an_answer_tells_tokens_and_times(pair):
    answer = pair.generate(CONVERSATIONS[1], **GREEDY)
    assert answer.counts.generated == len(answer.ids) <= 10
    assert answer.counts.receiver_prompt > 0 and len(answer.counts.sharer_prompt) == 1
    stages = vars(answer.timings)
    assert set(stages) == {"tokenise", "align", "sharer_prefill", "receiver_prefill", "fuse", "decode"}
    assert all(seconds > 0 for seconds in stages.values())


# --- token ids ----------------------------------------------------------------------------------------------------


def test_from_ids_is_the_same_path(pair):
    prepared = pair.prepare([CONVERSATIONS[1]])
    part = prepared.sharers[0]
    from_text = pair.prefill(CONVERSATIONS[1])
    from_ids = pair.prefill(receiver_ids=prepared.ids, sharer_ids=part.ids, alignments=[part.alignment])
    assert torch.equal(kv.stack(from_text.cache), kv.stack(from_ids.cache))


def test_a_row_of_padded_ids_gets_what_it_gets_alone(models):
    receiver, _ = models
    other = tiny_model("llama", seed=1)  # with the same tokenizer
    c2c = C2C(receiver, [other], [random_fuser(receiver, other)])
    rows = [torch.arange(20, 32), torch.arange(40, 45)]
    alone = [c2c.decode(c2c.prefill(receiver_ids=row[None]), **GREEDY)[0].ids for row in rows]
    padded = torch.zeros((2, 12), dtype=torch.long)
    padded[0], padded[1, 7:] = rows[0], rows[1]
    mask = (torch.arange(12) >= torch.tensor([[0], [7]])).long()
    prefill = c2c.prefill(receiver_ids=padded, receiver_mask=mask)
    assert ids(c2c.decode(prefill, **GREEDY)) == alone
    with pytest.raises(AlignmentError, match="padded on the left"):
        c2c.prefill(receiver_ids=padded.flip(1), receiver_mask=mask.flip(1))
    with pytest.raises(AlignmentError, match="padding of sharer 0"):
        c2c.prefill(receiver_ids=padded, sharer_ids=padded, sharer_masks=[mask])


def test_who_speaks_is_chosen_per_row_of_ids_too(pair):
    rows = torch.arange(20, 32).view(2, 6)
    alone = [
        pair.prefill(receiver_ids=row[None], sharer_ids=row[None], sharers=who)
        for row, who in zip(rows, ([0], []), strict=True)
    ]
    both = pair.prefill(receiver_ids=rows, sharer_ids=rows, sharers=[[0], []])
    expected = torch.cat([kv.stack(one.cache) for one in alone], dim=2)
    torch.testing.assert_close(kv.stack(both.cache), expected)
    assert [a.counts.sharer_prompt for a in pair.decode(both, **GREEDY)] == [(6,), ()]
    with pytest.raises(FuserMismatchError, match="2 lists"):
        pair.prefill(receiver_ids=rows, sharer_ids=rows, sharers=[[0]])


@pytest.mark.parametrize("alignment", ["retokenise-first", "retokenise-longest"])
def test_a_prompt_that_ends_in_content_is_fused(models, alignment):
    receiver, sharer = models
    bare = "{% for m in messages %}<|im_start|>{{ m.content }}{% endfor %}"
    options = {"receiver_template": bare, "sharer_template": bare}
    c2c = C2C(receiver, [sharer], [random_fuser(receiver, sharer, "paper", alignment=alignment, **options)])
    fused, alone = (kv.stack(c2c.prefill(CONVERSATIONS[0], sharers=who).cache) for who in ([0], []))
    changed = (fused != alone).any(-1).any(1).any(0).any(0).any(0).tolist()
    assert changed == [False, True]  # the mark before it stays, and the last token, which is not read yet, is not there
    text = plaintext.row(c2c, "hi there", [0])
    assert set(text.sharers[0].due.tolist()) == {len(text.ids) - 1, 0}


def test_only_fused_spans_differ_from_the_clean_cache(pair):
    prompt = torch.arange(12)[None]
    clean = kv.stack(pair.prefill(receiver_ids=prompt, sharers=[]).cache)
    fused = kv.stack(pair.prefill(receiver_ids=prompt, spans=[Span(0, 3, fuse=False), Span(3, 8)]).cache)
    # In the first layer, since deeper ones see the fused positions before them.
    changed = ((clean[:, 0] - fused[:, 0]).abs() > 1e-4).any(-1).flatten(0, 2).any(0)
    assert changed.tolist() == [False] * 3 + [True] * 5 + [False] * 3


def test_fuse_last_leaves_the_rest_alone(models):
    receiver, sharer = models
    last = C2C(receiver, [sharer], [random_fuser(receiver, sharer, fuse_last=4)])
    clean = kv.stack(last.prefill(CONVERSATIONS[1], sharers=[]).cache)
    fused = kv.stack(last.prefill(CONVERSATIONS[1]).cache)
    changed = (clean != fused).any(-1).flatten(0, 3).any(0)
    assert changed.tolist() == [False] * (len(changed) - 4) + [True] * 4


@pytest.mark.parametrize(
    ("wrong", "got"),
    [
        (torch.arange(5), r"torch.int64 \(5,\)"), (torch.zeros((0, 5), dtype=torch.long), r"torch.int64 \(0, 5\)"),
        (torch.zeros((1, 0), dtype=torch.long), r"torch.int64 \(1, 0\)"), (torch.zeros(1, 3), r"torch.float32 \(1, 3\)"),
        ([[1, 2]], "list"),
    ],
)  # fmt: skip
def test_what_is_no_batch_of_ids_is_refused(pair, wrong, got):
    with pytest.raises(AlignmentError, match=f"receiver_ids is no batch of token ids; got {got}; allowed"):
        pair.prefill(receiver_ids=wrong, sharers=[])
    with pytest.raises(AlignmentError, match=rf"sharer_ids\[0\] is no batch of token ids; got {got}; allowed"):
        pair.prefill(receiver_ids=torch.arange(5)[None], sharer_ids=[wrong])


@pytest.mark.parametrize("unknown", [99_999, -1])
def test_ids_that_a_model_does_not_have_are_refused(pair, unknown):
    known, other = torch.arange(4)[None], torch.tensor([[1, 2, unknown, 4]])
    for options in ({"receiver_ids": other, "sharer_ids": [known]}, {"receiver_ids": known, "sharer_ids": [other]}):
        with pytest.raises(AlignmentError, match=f"token ids that it does not have; got {unknown}; allowed: 0–"):
            pair.prefill(**options)


def test_a_tokenizer_that_knows_more_than_its_model(models):
    """Padding is masked, so any id will do; a token of a text is not."""
    receiver, sharer = tiny_model("qwen3"), models[1]
    plain = C2C(receiver).generate(CONVERSATIONS[:2], **GREEDY)
    receiver.tokenizer.add_special_tokens({"pad_token": "[PAD]"})
    receiver.model.generation_config.pad_token_id = receiver.tokenizer.pad_token_id
    receiver.tokenizer.add_tokens(["<image>"])
    assert ids(C2C(receiver).generate(CONVERSATIONS[:2], **GREEDY)) == ids(plain)
    for c2c in (C2C(receiver), C2C(sharer, [receiver], [random_fuser(sharer, receiver)])):
        with pytest.raises(AlignmentError, match="does not have.*resize_token_embeddings"):
            c2c.generate([{"role": "user", "content": "see <image>"}], **GREEDY)


# --- several sharers ----------------------------------------------------------------------------------------------


def test_who_speaks_is_chosen_per_request_and_per_row(trio):
    who = [[0], [1], [0, 1], []]
    batch = ids(trio.generate(CONVERSATIONS[:4], sharers=who, **GREEDY))
    assert batch == [trio.generate(c, sharers=w, **GREEDY).ids for c, w in zip(CONVERSATIONS, who, strict=False)]
    one = [trio.generate(CONVERSATIONS[2], sharers=w, **GREEDY).ids for w in who]
    assert len({tuple(answer) for answer in one}) == 4
    counts = [g.counts.sharer_prompt for g in trio.generate(CONVERSATIONS[:4], sharers=who, **GREEDY)]
    assert [len(c) for c in counts] == [1, 1, 2, 0]


@pytest.mark.parametrize("wrong", [0, np.array([0]), [None], [[0], 0], [2], [-1], [[0]], "0"])
def test_sharers_are_indices(trio, wrong):
    with pytest.raises(FuserMismatchError, match="sharers must be indices"):
        trio.generate(CONVERSATIONS[:2], sharers=wrong)


def test_sharers_that_are_fused_at_different_places_are_chained(trio):
    """In parallel the second one would be given what the first one had changed."""
    receiver, (first, second) = trio.receiver, trio.sharers
    by_message = random_fuser(receiver, first, alignment="retokenise-first")
    at_the_end = random_fuser(receiver, second, seed=2)
    with pytest.raises(FuserMismatchError, match='got retokenise-first, native; .*mode="sequential"'):
        C2C(receiver, [first, second], [by_message, at_the_end])
    assert C2C(receiver, [first, second], [by_message, at_the_end], mode="sequential").generate(CONVERSATIONS[0])


def test_parallel_adds_deltas_and_sequential_chains_them(trio):
    caches = {}
    for mode in ("parallel", "sequential"):
        c2c = C2C(trio.receiver, trio.sharers, trio.fusers, mode=mode)
        caches[mode] = kv.stack(c2c.prefill(CONVERSATIONS[1]).cache)
    clean, first, second = (kv.stack(trio.prefill(CONVERSATIONS[1], sharers=w).cache) for w in ([], [0], [1]))
    torch.testing.assert_close(caches["parallel"], first + second - clean, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(caches["parallel"], caches["sequential"], atol=1e-3)


# --- chat ---------------------------------------------------------------------------------------------------------


def test_a_chat_reads_only_what_is_new(pair, monkeypatch):
    chat = pair.chat("be brief")
    first = chat.send("hello", **GREEDY)
    read = []
    original = kv.prefill
    monkeypatch.setattr(
        "cache2cache.pipeline.kv.prefill",
        lambda model, ids, *rest: read.append(ids.shape[1]) or original(model, ids, *rest),
    )
    answer = chat.send("and now?", **GREEDY)
    sharer_read, receiver_read = read
    assert receiver_read < answer.counts.receiver_prompt - first.counts.receiver_prompt
    assert sharer_read <= answer.counts.sharer_prompt[0] - first.counts.sharer_prompt[0]
    assert [m["role"] for m in chat.messages] == ["system", "user", "assistant", "user", "assistant"]


def test_the_first_turn_of_a_chat_is_a_plain_request(pair):
    assert pair.chat().send(TEXTS[1], **GREEDY).ids == pair.generate(CONVERSATIONS[1], **GREEDY).ids


def test_a_chat_with_a_closed_fuser_says_what_a_fresh_read_would(models):
    """Nothing is fused, so keeping the cache must change nothing."""
    receiver, sharer = models
    closed = C2C(receiver, [sharer], [random_fuser(receiver, sharer, open_gates=False)])
    chat = closed.chat()
    for text in ("hello", "and now?", "go on"):
        answer = chat.send(text, **GREEDY)
        assert answer.ids == closed.generate(chat.messages[:-1], **GREEDY).ids
    chat.reset()
    assert chat.messages == []


@pytest.mark.parametrize(
    "wrong",
    [
        {"max_new_tokens": 100_000},
        {"no_such_option": 1},
        {"num_beams": 2},
        {"generation_config": GenerationConfig(num_return_sequences=2, num_beams=2)},
    ],
)
def test_a_turn_that_fails_is_taken_back(pair, wrong):
    chat, other = pair.chat(), pair.chat()
    for one in (chat, other):
        one.send("hello", **GREEDY)
    before = list(chat.messages)
    with pytest.raises(ValueError):
        chat.send("go on", **wrong)
    assert chat.messages == before
    assert chat.send("go on", **GREEDY).counts == other.send("go on", **GREEDY).counts


def test_a_streamed_turn_can_be_taken_back(pair):
    chat = pair.chat()
    chat.send("hello", **GREEDY)
    before = list(chat.messages)
    stream = chat.stream("go on", do_sample=False, max_new_tokens=400)
    next(stream)
    stream.close()
    assert chat.messages == before
    assert chat.send("go on", **GREEDY).ids


# --- families -----------------------------------------------------------------------------------------------------

ROTARY = sorted(set(FAMILIES) - {"gpt2"})


@pytest.mark.parametrize("family", ROTARY)
@pytest.mark.parametrize("kind", ["compact", "paper"])
def test_any_decoder_with_a_per_token_cache_can_receive_and_share(family, kind):
    model, other = tiny_model(family), tiny_model("llama" if family != "llama" else "qwen3", seed=1)
    for receiver, sharer in ((model, other), (other, model)):
        c2c = C2C(receiver, [sharer], [random_fuser(receiver, sharer, kind)])
        alone = [c2c.generate(c, **GREEDY).ids for c in CONVERSATIONS[:3]]
        assert ids(c2c.generate(CONVERSATIONS[:3], **GREEDY)) == alone
        assert alone != ids(c2c.generate(CONVERSATIONS[:3], sharers=[], **GREEDY))


def test_learned_positions_work_with_the_paper_fuser():
    receiver, sharer = tiny_model("gpt2"), tiny_model("llama", seed=1)
    c2c = C2C(receiver, [sharer], [random_fuser(receiver, sharer, "paper")])
    alone = [c2c.generate(c, **GREEDY).ids for c in CONVERSATIONS[:3]]
    assert ids(c2c.generate(CONVERSATIONS[:3], **GREEDY)) == alone


def test_sliding_windows_forget_nothing_that_a_fuser_needs():
    """Gemma 3's local layers see 16 positions; their caches must still hold every position of a longer prompt."""
    gemma, other = tiny_model("gemma3"), tiny_model("llama", seed=1)
    long = [{"role": "user", "content": "hello world " * 12}]
    c2c = C2C(other, [gemma], [random_fuser(other, gemma)])
    prefill = c2c.prefill(long)
    sizes = {layer.keys.shape[2] for layer in prefill.sharer_caches[0].layers}
    assert sizes == {prefill.inputs.sharers[0].ids.shape[1]}
    alone = C2C(gemma)
    prompt = gemma.tokenizer.apply_chat_template(
        long, add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    expected = gemma.model.generate(**prompt, **GREEDY)[0, prompt["input_ids"].shape[1] :].tolist()
    assert alone.generate(long, **GREEDY).ids == expected
