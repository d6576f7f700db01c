"""The systems and controls: each answers from what it should have read, and from nothing else."""

import time
from dataclasses import replace

import numpy as np
import pytest
import torch

from cache2cache import C2C
from cache2cache.errors import DataError
from cache2cache.evaluate import build, names, scoring, systems, writing
from cache2cache.evaluate.forms import FORMS
from cache2cache.evaluate.heard import Mismatched, Own, Replaced, sharer_statistics
from cache2cache.evaluate.items import Item
from cache2cache.evaluate.prefills import Prefills
from cache2cache.evaluate.routing import Router
from cache2cache.models.prefills import prefill_rows
from cache2cache.testing import random_fuser, tiny_model, tiny_pair

RECEIVER, SHARER = tiny_pair()
QUESTIONS = ["Which one is the largest?", "Who was it?", "Why do the leaves fall in the autumn of the year?", "And?"]
FORM = {"choice": FORMS["completion"], "text": FORMS["completion"]}


def choice(i: int, **changes) -> Item:
    text = f"Question: {QUESTIONS[i]}\nA. one\nB. two\nC. three\nD. four"
    item = Item(
        task="quiz", id=str(i), subject="s", topic=QUESTIONS[i], target="B", letters="ABCD", max_new_tokens=6,
        wordings={
            "plain": [{"role": "user", "content": text + "\nAnswer with the letter."}],
            "bare": [{"role": "user", "content": text}],
        },
    )  # fmt: skip
    return replace(item, **changes)


def text(i: int) -> Item:
    return choice(i, task="texts", letters="", target="two of them", max_new_tokens=0)


ITEMS = [choice(i) for i in range(4)]


def pair(**config) -> C2C:
    config = {"fuse_last": 8, **config}
    return C2C(RECEIVER, [SHARER], [random_fuser(RECEIVER, SHARER, **config)])


def fused(of: C2C, listen=None, prefills: Prefills | None = None) -> systems.Fused:
    prefills = prefills or Prefills()
    return systems.Fused("c2c", of, prefills, listen or Own(of, prefills))


def alone(lm=RECEIVER, *, sharer=False, form="completion") -> systems.Alone:
    forms = {"choice": FORMS[form], "text": FORMS[form]}
    return systems.Alone("x", lm, forms, Prefills(), RECEIVER, sharer=sharer)


def statistics_of(of: C2C, items, prefills: Prefills):
    return sharer_statistics(of, items, prefills, batch_size=16, tell=lambda line: pytest.fail(line))


def same(a, b) -> None:
    assert [x.text for x in a] == [y.text for y in b]
    for x, y in zip(a, b, strict=True):
        assert x.letter_logprobs == pytest.approx(y.letter_logprobs, abs=1e-4)
        if x.target_nats is not None:
            assert x.target_nats == pytest.approx(y.target_nats, abs=1e-3)


# --- C2C and what it hears ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "config", [{}, {"kind": "paper"}, {"kind": "paper", "alignment": "retokenise-first", "fuse_last": None}]
)
def test_c2c_from_shared_prefills_answers_as_generate_does(config):
    """Also where the receiver is fused on its way (retokenise), so that its own prefill cannot be shared."""
    of = pair(**config)
    found = fused(of).answer(ITEMS)
    for item, answer in zip(ITEMS, found, strict=True):
        plain = of.generate(item.messages, do_sample=False, max_new_tokens=6)
        assert answer.text == OPTION.answer(plain.text)
        assert answer.cost.receiver_read == plain.counts.receiver_prompt
        assert answer.cost.sharer_read == plain.counts.sharer_prompt[0]


@pytest.mark.parametrize("items", [ITEMS, [text(i) for i in range(4)]], ids=["choice", "text"])
def test_a_batch_answers_as_its_rows_alone(items):
    of = pair()
    same(fused(of).answer(items), [fused(of).answer([item])[0] for item in items])
    same(alone().answer(items), [alone().answer([item])[0] for item in items])


def test_mismatched_hears_the_other_row_and_not_its_own():
    of = pair()
    turned = {item.id: ITEMS[(i + 1) % 4] for i, item in enumerate(ITEMS)}
    prefills = Prefills()
    crossed = fused(of, Mismatched(of, prefills, {"quiz": turned}), prefills).answer(ITEMS)
    own = fused(of).answer(ITEMS)
    assert all(
        a.letter_logprobs != pytest.approx(b.letter_logprobs, abs=1e-5) for a, b in zip(own, crossed, strict=True)
    )
    # A partner whose text is the same makes it the matched system again: only the cache differs between the two.
    twins = {item.id: replace(item, id=item.id + "'") for item in ITEMS}
    same(fused(of, Mismatched(of, prefills, {"quiz": twins}), prefills).answer(ITEMS), own)


def test_the_mean_and_noise_say_nothing_of_the_row():
    of, prefills = pair(), Prefills()
    statistics = {"quiz": statistics_of(of, ITEMS, prefills)}
    zeroed = Replaced(statistics, noise=False, seed=0)
    one, two = choice(0), choice(0, id="other")
    (a,), (b,) = (fused(of, zeroed).answer([item]) for item in (one, two))
    same([a], [b])
    noise = Replaced(statistics, noise=True, seed=0)
    (a,), (again,), (b,) = (fused(of, noise).answer([item]) for item in (one, one, two))
    same([a], [again])
    assert a.letter_logprobs != pytest.approx(b.letter_logprobs, abs=1e-6)  # drawn anew for every row
    (c,) = fused(of, Replaced(statistics, noise=True, seed=1)).answer([one])
    assert a.letter_logprobs != pytest.approx(c.letter_logprobs, abs=1e-6)  # and for every seed


def test_controls_never_read_the_sharer():
    of, prefills = pair(), Prefills()
    statistics = {"quiz": statistics_of(of, ITEMS, prefills)}
    read = []
    prefills.caches = lambda lm, *rest, _caches=prefills.caches: read.append(lm) or _caches(lm, *rest)  # type: ignore[method-assign]
    fused(of, Replaced(statistics, noise=True, seed=0), prefills).answer(ITEMS)
    assert read == [RECEIVER]


def test_keys_that_do_not_rotate_back_are_averaged_as_they_are():
    rope = {"rope_type": "default", "rope_theta": 10_000.0}
    odd = tiny_model("llama", model_type="cohere", rope_parameters=rope)  # which turns interleaved pairs
    (statistics,) = statistics_of(C2C(RECEIVER, [odd], [random_fuser(RECEIVER, odd, "paper")]), ITEMS, Prefills())
    first, later = (statistics.mean_cache(torch.tensor([position])) for position in (0, 9))
    assert torch.equal(first, later)
    (turned,) = statistics_of(pair(), ITEMS, Prefills())
    assert not torch.equal(*(turned.mean_cache(torch.tensor([position])) for position in (0, 9)))


def test_statistics_need_rows():
    with pytest.raises(DataError, match="rows"):
        statistics_of(pair(), [], Prefills())


def test_bytes_that_cross_are_the_fused_positions_of_the_mapped_layers():
    of = pair(fuse_last=3)
    (answer,) = fused(of).answer(ITEMS[:1])
    (row,) = of.rows([ITEMS[0].messages])
    part, size = row.sharers[0], SHARER.card.geometry
    positions = len(set(part.alignment[part.due > 0].tolist()))
    assert 1 <= positions <= 3
    assert answer.cost.cache_bytes == positions * len(set(of.fusers[0].config.layer_map)) * 2 * size.features * 4


def test_several_sharers_speak_together_and_one_at_a_time():
    third = tiny_pair(seed=5)[1]
    of = C2C(RECEIVER, [SHARER, third], [random_fuser(RECEIVER, lm, seed=i) for i, lm in enumerate([SHARER, third])])
    made = build.build(
        build.Ingredients(of, Prefills(), FORM, [FORM, FORM], message_tokens=4), names.parse("sharer,c2c,t2t")
    )
    assert list(made.by_name) == ["sharer", "sharer-2", "c2c", "c2c-1", "c2c-2", "t2t"]
    found = {name: system.answer(ITEMS) for name, system in made.by_name.items()}
    only = C2C(RECEIVER, [third], [of.fusers[1]])
    same(found["c2c-2"], fused(only).answer(ITEMS))
    assert found["c2c"][0].letter_logprobs != pytest.approx(found["c2c-1"][0].letter_logprobs, abs=1e-6)
    assert found["t2t"][0].message.count("\n\n") >= 1  # one note from each


# --- alone ----------------------------------------------------------------------------------------------------------


def test_a_sharer_alone_reads_its_whole_prompt_once_for_itself_and_for_c2c():
    prefills = Prefills()
    read = []
    keep = prefills.caches

    def caches(lm, prompts, *rest):
        held = len(prefills._held)
        out = keep(lm, prompts, *rest)
        read.append((lm.card.id, len(prefills._held) - held))
        return out

    prefills.caches = caches  # type: ignore[method-assign]
    of = pair(sharer_template=FORMS["completion"].template)
    items = [choice(i, wordings={"plain": ITEMS[i].messages, "bare": ITEMS[i].messages}) for i in range(4)]
    systems.Alone("sharer", SHARER, FORM, prefills, RECEIVER, sharer=True).answer(items)
    fused(of, prefills=prefills).answer(items)
    assert read == [("tiny-sharer", 4), ("tiny-sharer", 0), ("tiny-receiver", 4)]


def test_whole_prompts_and_prompts_without_their_last_token_answer_alike():
    same(alone(sharer=True).answer(ITEMS), alone().answer(ITEMS))


def test_the_letters_are_scored_by_the_logits_at_the_answer_position():
    (answer,) = alone().answer(ITEMS[:1])
    of = C2C(RECEIVER, template=FORMS["completion"].template)
    ids = torch.tensor(of.rows([ITEMS[0].wordings["bare"]])[0].ids)[None]
    logits = RECEIVER.model(ids).logits[0, -1]
    expected = []
    for letter in "ABCD":
        spelled = [RECEIVER.tokenizer(t, add_special_tokens=False)["input_ids"] for t in (letter, " " + letter)]
        expected.append(torch.logsumexp(logits[sorted({s[0] for s in spelled if len(s) == 1})], 0))
    assert answer.letter_logprobs == pytest.approx(torch.stack(expected).log_softmax(0).tolist(), abs=1e-4)
    assert np.exp(answer.letter_logprobs).sum() == pytest.approx(1)


def test_the_likelihood_of_a_target_is_that_of_reading_prompt_and_target_in_one_go():
    item = text(2)
    (answer,) = alone().answer([item])
    of = C2C(RECEIVER, template=FORMS["completion"].template)
    prompt = of.rows([item.wordings["bare"]])[0].ids.tolist()
    target = RECEIVER.tokenizer(" " + item.target, add_special_tokens=False)["input_ids"]
    logprobs = RECEIVER.model(torch.tensor([prompt + target])).logits[0].log_softmax(-1)
    nats = -sum(float(logprobs[len(prompt) - 1 + i, token]) for i, token in enumerate(target))
    assert answer.target_nats == pytest.approx(nats, abs=1e-3)
    assert answer.target_tokens == len(RECEIVER.tokenizer(item.target, add_special_tokens=False)["input_ids"])
    assert (answer.text, answer.letter_logprobs) == ("", ())


LINE, TEXT, OPTION = scoring.Ends(True), scoring.Ends(False), scoring.Ends(True, "ABCD")


@pytest.mark.parametrize(
    ("ends", "text", "answer", "complete"),
    [
        (LINE, "", "", False), (LINE, "A", "A", False), (LINE, "\n\n A \n", "A", True), (LINE, "A\nB", "A", True),
        (LINE, "\n \n", "", False), (LINE, "B. no", "B. no", False),
        (TEXT, "1 + 1\nis 2", "1 + 1\nis 2", False), (TEXT, " so 2.\n\nQuestion: and", "so 2.", True),
        (OPTION, "B", "B", False), (OPTION, " B. the moon", "B.", True), (OPTION, "(C) or", "(C)", True),
        (OPTION, "D) four\nA: one", "D)", True), (OPTION, "A.M. it is", "A.M. it is", False),
        (OPTION, "E. none", "E. none", False), (OPTION, "A cat", "A cat", False), (OPTION, "It is B.", "It is B.", False),
    ],
)  # fmt: skip
def test_where_an_answer_ends(ends, text, answer, complete):
    assert (ends.answer(text), ends.complete(text)) == (answer, complete)


def test_a_row_ends_where_it_would_alone_whatever_options_its_neighbours_have():
    lm = tiny_model("qwen3")
    writes = lm.tokenizer("D. d. Answer: B", add_special_tokens=False)["input_ids"]

    def always(self, prefill, **options):
        def scores(ids, scores):
            at = ids.shape[1] - prefill.ids.shape[1]
            forced = torch.full_like(scores, -1e9)
            forced[:, writes[at] if at < len(writes) else lm.tokenizer.eos_token_id] = 0
            return forced

        return C2C.decode(self, prefill, logits_processor=[scores], **options)

    of = C2C(lm)
    of.decode = always.__get__(of)  # type: ignore[method-assign]
    items = [choice(0, letters="ABC", max_new_tokens=16), choice(1, max_new_tokens=16)]

    def asked(items):
        return scoring.answers(of, of.read(of.prepare([item.messages for item in items])), items, lm.tokenizer)

    (by_itself,), (_, behind) = asked(items[1:]), asked(items)
    assert (behind.text, behind.cost.receiver_wrote) == (by_itself.text, by_itself.cost.receiver_wrote)
    assert by_itself.text == "D."


def test_an_answer_that_runs_into_the_limit_is_marked():
    (answer,) = alone().answer([choice(0, max_new_tokens=2, one_line=False)])
    assert answer.cost.receiver_wrote == 2
    assert not answer.ended


@pytest.mark.parametrize(
    "default", [("repetition_penalty", 5.0), ("no_repeat_ngram_size", 1), ("min_new_tokens", 9), ("num_beams", 3)]
)
def test_answers_are_greedy_whatever_a_model_does_by_default(default, monkeypatch):
    items = [choice(i, one_line=False, max_new_tokens=12) for i in range(4)]
    plain = alone().answer(items)
    texts = writing.write(C2C(RECEIVER), [item.messages for item in items], 12)
    monkeypatch.setattr(RECEIVER.model.generation_config, *default)
    assert [answer.text for answer in alone().answer(items)] == [answer.text for answer in plain]
    assert writing.write(C2C(RECEIVER), [item.messages for item in items], 12) == texts


# --- text-to-text and routing ---------------------------------------------------------------------------------------


def test_the_paper_protocol_hides_the_options_and_the_fair_one_shows_all():
    (paper,), (fair,) = systems.ask_background(ITEMS[0]), systems.ask_all(ITEMS[0])
    assert QUESTIONS[0] in paper["content"]
    assert not any(option in paper["content"] for option in ("two", "three", "four"))
    assert ITEMS[0].messages[-1]["content"] in fair["content"]


def test_text_to_text_records_what_was_written_and_what_it_cost():
    way = systems.TextToText("t2t", alone(), [SHARER], systems.ask_background, 5)
    found = way.answer(ITEMS)
    written = [C2C(SHARER).generate(systems.ask_background(item), do_sample=False, max_new_tokens=5) for item in ITEMS]
    assert [answer.message for answer in found] == [note.text.strip() for note in written]
    for answer, note in zip(found, written, strict=True):
        assert answer.cost.sharer_read == note.counts.receiver_prompt
        assert 0 < answer.cost.sharer_wrote <= 5
        assert answer.cost.text_bytes == len(note.text.strip().encode())
    told = [
        [{"role": "user", "content": f"{a.message}\n\n{i.wordings['bare'][0]['content']}"}]
        for a, i in zip(found, ITEMS, strict=True)
    ]
    same(found, alone().told(ITEMS, told))
    assert found[0].timings.message > 0  # type: ignore[attr-defined]


def test_a_router_learns_who_is_better_and_keeps_to_its_share(tmp_path):
    rng = np.random.default_rng(0)
    embedded = rng.normal(size=(400, 30)).astype(np.float32)
    helps = embedded[:, 0] > 0
    router = Router.fit(embedded[:300], np.zeros(300), np.where(helps[:300], 1, -1), share=0.5)
    sent = np.array(router.to_sharer(embedded[300:]))
    assert (sent == helps[300:]).mean() > 0.8
    assert 0.3 < sent.mean() < 0.7
    quarter = Router.fit(embedded[:300], np.zeros(300), np.where(helps[:300], 1, -1), share=0.25)
    assert np.mean(quarter.to_sharer(embedded[:300])) == pytest.approx(0.25, abs=0.02)
    router.save(tmp_path / "router.safetensors")
    assert Router.load(tmp_path / "router.safetensors").to_sharer(embedded) == router.to_sharer(embedded)


@pytest.mark.parametrize(("receiver", "sharer"), [([0, 0], [0, 0]), ([0, 0], [1, 1]), ([1, 0], [0, 0])])
def test_a_router_with_nothing_to_learn_is_refused(receiver, sharer):
    with pytest.raises(DataError, match="nothing to learn"):
        Router.fit(np.eye(2, dtype=np.float32), receiver, sharer)


@pytest.mark.parametrize("share", [-0.1, 1.5])
def test_a_share_outside_nought_and_one_is_refused(share):
    with pytest.raises(DataError, match="share"):
        Router.fit(np.eye(2, dtype=np.float32), [0, 1], [1, 0], share)


def test_routing_answers_as_the_model_that_it_chose():
    class Half:
        def to_sharer(self, embedded):
            return [i % 2 == 1 for i in range(len(embedded))]

    of = build.Ingredients(pair(), Prefills(), FORM, [FORM], routers={"choice": Half()})  # type: ignore[dict-item]
    made = build.build(of, names.parse("receiver,sharer,routing"))
    receiver, sharer, routed = (system.answer(ITEMS) for system in made.by_name.values())
    assert [answer.route for answer in routed] == ["receiver", "sharer", "receiver", "sharer"]
    assert [a.text for a in routed] == [(sharer if i % 2 else receiver)[i].text for i in range(4)]


@pytest.mark.parametrize("form", ["chat", "completion"])
@pytest.mark.parametrize("to_sharer", [False, True])
def test_routing_counts_what_it_takes_to_decide(to_sharer, form, monkeypatch):
    class All:
        def to_sharer(self, embedded):
            return [to_sharer] * len(embedded)

    def slow(*args):
        time.sleep(0.2)
        return prefill_rows(*args)

    monkeypatch.setattr("cache2cache.evaluate.prefills.prefill_rows", slow)
    forms = {"choice": FORMS[form]}
    of = build.Ingredients(pair(), Prefills(), forms, [forms], routers={"choice": All()})  # type: ignore[dict-item]
    made = build.build(of, names.parse("receiver,sharer,routing"))
    found = {}
    for name, system in made.by_name.items():
        (found[name],) = system.answer(ITEMS[:1])
        made.clear()
    routed, chosen = found["routing"], found["sharer" if to_sharer else "receiver"]
    read_twice = to_sharer or form == "completion"
    assert routed.timings.receiver_prefill > 0.2
    assert routed.seconds > (0.4 if read_twice else 0.2)
    assert routed.cost.sharer_read == chosen.cost.sharer_read
    to_decide = len(C2C(RECEIVER).rows([ITEMS[0].messages])[0].ids) - 1
    assert routed.cost.receiver_read == chosen.cost.receiver_read + (to_decide if read_twice else 0)


# --- names ----------------------------------------------------------------------------------------------------------


def test_names_with_limits_and_fusers():
    asked = names.parse("receiver, t2t:300,c2c", "mismatched,self=runs/self/fuser")
    assert asked == [
        names.Asked("receiver"), names.Asked("t2t", limit=300), names.Asked("c2c"), names.Asked("mismatched"),
        names.Asked("self", fuser="runs/self/fuser"),
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("asked", "controls", "message"),
    [
        ("", "", "no system"),
        ("reciever", "", "Did you mean receiver"),
        ("c2c", "zero", "Did you mean zeroed"),
        ("mismatched", "", "unknown system"),
        ("c2c,c2c", "", "twice"),
        ("t2t:0", "", "positive"),
        ("t2t:many", "", "positive"),
        ("t2t:-3", "", "positive"),
        ("c2c=x", "", "takes no fuser"),
        ("c2c", "self", "needs its own fuser"),
        ("c2c", "self=", "needs its own fuser"),
        ("c2c", "mismatched:10", "no limit"),
    ],
)
def test_wrong_names_are_refused(asked, controls, message):
    with pytest.raises(DataError, match=message):
        names.parse(asked, controls)


# --- writing --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("limit", [1, 5, 31, 32, 33, 70])
def test_texts_of_a_batch_are_those_that_generate_writes_alone(limit, monkeypatch):
    """Also beyond the stride at which rows that have ended leave the batch, and where rows end at different times."""
    lm = C2C(RECEIVER)
    alone = [lm.generate(item.messages, do_sample=False, max_new_tokens=limit) for item in ITEMS]
    texts, read = writing.write(lm, [item.messages for item in ITEMS], limit)
    assert texts == [answer.ids for answer in alone]
    assert read == [answer.counts.receiver_prompt for answer in alone]
    # A token that some texts hold early and others late or never now ends the turn.
    end = alone[0].ids[len(alone[0].ids) // 2]
    monkeypatch.setattr(RECEIVER.model.generation_config, "eos_token_id", [end])
    cut = [answer.ids[: answer.ids.index(end) + 1] if end in answer.ids else answer.ids for answer in alone]
    assert writing.write(lm, [item.messages for item in ITEMS], limit)[0] == cut
