"""C2C as a model of lm-evaluation-harness: closed, it is the harness's own `hf`, row by row; open, it is C2C."""

from __future__ import annotations

import importlib
import json
import runpy
import sys
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch

pytest.importorskip("lm_eval")

import datasets
import lm_eval
from lm_eval.api.instance import Instance
from lm_eval.api.registry import get_model
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager

from cache2cache import C2C
from cache2cache.errors import (
    AlignmentError,
    ContextLengthError,
    ConversationError,
    DataError,
    FuserMismatchError,
    GenerationError,
    MissingExtraError,
    ModelError,
    TemplateError,
)
from cache2cache.evaluate.lm_eval import C2CLM
from cache2cache.evaluate.lm_eval.contexts import Reader
from cache2cache.models.load import LanguageModel
from cache2cache.testing import WORDS, random_fuser, tiny_model, tiny_tokenizer

DATA = Path(__file__).parent / "data" / "lm_eval"
TASKS = ["c2c_choice", "c2c_begun", "c2c_write", "c2c_write_begun"]
CLOSE = 1e-4

ASKED = [{"role": "user", "content": "what is the letter?"}]
BEGUN = [*ASKED, {"role": "assistant", "content": "It is"}]
CONVERSATIONS = [
    (ASKED, False),
    (BEGUN, True),
    ([{"role": "system", "content": "answer"}, {"role": "user", "content": "12 == 12? é缓存"}], False),
]
TEXTS = ["Question: what is the color?\nAnswer:", "", "the user ", "A", "a longer text, of the system and the user\n\n"]
CONTEXTS = [text for text in TEXTS if text]
CONTINUATIONS = [" A", " the answer, and more", "é", "\nno"]


@pytest.fixture(autouse=True)
def _harness(monkeypatch: pytest.MonkeyPatch, tmp_path_factory):
    """The tasks name their rows relative to their own folder, and nothing is written into a user's caches."""
    monkeypatch.chdir(DATA)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path_factory.getbasetemp() / "datasets"))
    monkeypatch.setattr("lm_eval.evaluator.add_env_info", lambda storage: None)  # it calls pip, for a second


@pytest.fixture(scope="module")
def tasks() -> TaskManager:
    return TaskManager(include_path=str(DATA), include_defaults=False)


def hf(lm: LanguageModel, batch_size: int = 1) -> HFLM:
    return HFLM(pretrained=lm.model, tokenizer=lm.tokenizer, batch_size=batch_size)  # type: ignore[arg-type]


def answers(model, tasks: TaskManager, names=TASKS, **options) -> dict:
    """Task → answers of the model, row by row."""
    found = lm_eval.simple_evaluate(model, tasks=names, task_manager=tasks, bootstrap_iters=0, **options)
    return {name: [row["resps"] for row in rows] for name, rows in found["samples"].items()}


def likelihoods(lm, contexts, continuations=CONTINUATIONS):
    asked = [Instance("loglikelihood", {}, (c, x), 0) for c in contexts for x in continuations]
    return lm.loglikelihood(asked, disable_tqdm=True)


def texts(lm, contexts, **options):
    asked = [Instance("generate_until", {}, (c, {"until": [], "max_gen_toks": 8} | options), 0) for c in contexts]
    return lm.generate_until(asked, disable_tqdm=True)


def chats(lm, conversations=CONVERSATIONS):
    return [lm.apply_chat_template(messages, add_generation_prompt=not begun) for messages, begun in conversations]


def assert_same(got, wanted):
    """Likelihoods (value and greedy) as close as float32 gives them, texts equal."""
    for a, b in zip(got, wanted, strict=True):
        if isinstance(b, str):
            assert a == b
        elif isinstance(b[0], float):
            assert a == (pytest.approx(b[0], abs=CLOSE), b[1])
        else:
            assert_same(a, b)


# --- closed: the harness's own hf ---------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def wanted(receiver, tasks) -> dict:
    """hf's answers, with and without chat templates."""
    return {}


@pytest.mark.parametrize("chat", [False, True], ids=["text", "chat"])
@pytest.mark.parametrize(("alone", "batch_size"), [(False, 1), (False, 4), (True, 4)])
def test_closed_gates_are_hf_row_by_row(receiver, sharer, tasks, wanted, chat, alone, batch_size):
    if chat not in wanted:
        wanted[chat] = answers(hf(receiver), tasks, apply_chat_template=chat)
    closed = C2C(receiver, [sharer], [random_fuser(receiver, sharer, open_gates=False)])
    got = answers(C2CLM(C2C(receiver) if alone else closed, batch_size), tasks, apply_chat_template=chat)
    assert set(got) == set(wanted[chat]) == set(TASKS)
    for name in TASKS:
        assert_same(got[name], wanted[chat][name])


@pytest.mark.parametrize(("chat", "turns"), [(False, False), (True, False), (True, True)])
def test_few_shots_are_hf_too(receiver, sharer, tasks, chat, turns):
    closed = C2CLM(C2C(receiver, [sharer], [random_fuser(receiver, sharer, open_gates=False)]), 3)
    options = {"apply_chat_template": chat, "fewshot_as_multiturn": turns, "num_fewshot": 1, "limit": 2}
    names = ["c2c_begun"]
    assert_same(
        answers(closed, tasks, names, **options)["c2c_begun"],
        answers(hf(receiver), tasks, names, **options)["c2c_begun"],
    )


@pytest.mark.parametrize(
    ("family", "bos"), [("llama", True), ("gemma3", False), ("mistral", True), ("gpt_neox", False)], ids=str
)
def test_every_family_is_hf(sharer, family, bos):
    """A BOS before plain text, one that hf puts before a template that writes none, windows of 16 positions."""
    lm = tiny_model(family, 3, tokenizer=tiny_tokenizer(merge=WORDS, bos=bos))
    ours = C2CLM(C2C(lm, [sharer], [random_fuser(lm, sharer, "paper", open_gates=False)]), 5)
    theirs = hf(lm)
    assert_same(likelihoods(ours, TEXTS), likelihoods(theirs, TEXTS))
    assert_same(likelihoods(ours, chats(ours)), likelihoods(theirs, chats(theirs)))
    assert_same(texts(ours, TEXTS[0:1]), texts(theirs, TEXTS[0:1]))
    assert_same(texts(ours, chats(ours)), texts(theirs, chats(theirs)))


@pytest.mark.parametrize("written", ["<|bos|>the text", "the text"])
def test_a_bos_that_is_written_already_is_not_added(written):
    lm = tiny_model("llama", tokenizer=tiny_tokenizer(bos=True))
    assert_same(likelihoods(C2CLM(C2C(lm)), [written]), likelihoods(hf(lm), [written]))


def test_greedy_is_what_would_be_written(receiver, sharer, fuser):
    letters = [chr(code) for code in range(32, 127)]
    contexts = ["the answer is " + "A" * i for i in range(1, 13)]
    closed, opened, theirs = C2CLM(C2C(receiver), 95), C2CLM(C2C(receiver, [sharer], [fuser]), 95), hf(receiver, 12)
    assert_same(likelihoods(closed, contexts, letters), likelihoods(theirs, contexts, letters))
    for lm in (closed, opened):
        found = np.array([greedy for _, greedy in likelihoods(lm, contexts, letters)]).reshape(-1, len(letters))
        written = [text if text in letters else "" for text in texts(lm, contexts, max_gen_toks=1)]
        assert ["".join(np.array(letters)[row]) for row in found] == written
        assert any(written), "nothing was tested: no text begins with a letter"


def test_stop_strings_cut_as_hf_does(receiver):
    ours, theirs = C2CLM(C2C(receiver), 4), hf(receiver)
    full = max(texts(ours, CONTEXTS, max_gen_toks=24), key=len)
    stops = [full[9:11], "never written", full[4:6]]
    for until in (stops, stops[0], []):
        options = {"max_gen_toks": 24, "until": until}
        assert texts(ours, CONTEXTS, **options) == texts(theirs, CONTEXTS, **options)
    assert min(map(len, texts(ours, CONTEXTS, max_gen_toks=24, until=stops))) <= 4 < 11 <= len(full)


def test_rows_stop_where_they_stop_alone(receiver, sharer, fuser):
    pair = C2C(receiver, [sharer], [fuser])
    options = {"until": ["!", "e", "the"], "max_gen_toks": 20}
    assert texts(C2CLM(pair, 4), CONTEXTS, **options) == texts(C2CLM(pair, 1), CONTEXTS, **options)


def test_sampling_takes_the_harness_s_options(receiver, sharer, fuser):
    lm = C2CLM(C2C(receiver, [sharer], [fuser]))
    greedy = texts(lm, TEXTS[:1], max_gen_toks=16)
    assert texts(lm, TEXTS[:1], max_gen_toks=16, do_sample=False, temperature=2.0) == greedy
    torch.manual_seed(0)
    assert texts(lm, TEXTS[:1], max_gen_toks=16, do_sample=True, temperature=2.0) != greedy
    assert len(texts(lm, TEXTS[:1], max_new_tokens=3, max_gen_toks=None)[0]) <= 3


# --- open: C2C ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("chat", [False, True], ids=["text", "chat"])
def test_open_gates_change_the_answers_and_batches_do_not(receiver, sharer, fuser, tasks, chat):
    pair = C2C(receiver, [sharer], [fuser])
    one, four = (answers(C2CLM(pair, size), tasks, apply_chat_template=chat) for size in (1, 4))
    alone = answers(C2CLM(C2C(receiver)), tasks, apply_chat_template=chat)
    for name in TASKS:
        assert_same(four[name], one[name])
        for fused, plain in zip(one[name], alone[name], strict=True):
            assert fused != plain


@pytest.mark.parametrize("alignment", ["native", "same-ids", "retokenise-first", "retokenise-longest"])
def test_a_chat_is_answered_as_c2c_answers_it(receiver, sharer, alignment):
    """Texts are those of `generate`, and likelihoods those of its logits: the whole prompt is read and fused."""
    pair = C2C(receiver, [sharer], [random_fuser(receiver, sharer, "paper", alignment=alignment)])
    lm = C2CLM(pair, 3)
    conversations = [messages for messages, begun in CONVERSATIONS if not begun]
    contexts = [lm.apply_chat_template(messages) for messages in conversations]
    own = pair.generate(
        conversations, do_sample=False, max_new_tokens=8, return_dict_in_generate=True, output_logits=True
    )
    assert texts(lm, contexts) == [answer.text for answer in own]  # type: ignore[union-attr]
    logprobs = own[0].raw.logits[0].log_softmax(-1)  # type: ignore[index]  # (B, V)
    a, b = (receiver.tokenizer.encode(letter) for letter in "AB")
    scores = np.array([nats for nats, _ in likelihoods(lm, contexts, ["A", "B"])]).reshape(-1, 2)
    # hf scores the prompt's last line break too; in the difference of two answers it is gone.
    differences = (logprobs[:, a] - logprobs[:, b]).squeeze(1).tolist()
    assert (scores[:, 0] - scores[:, 1]).tolist() == pytest.approx(differences, abs=CLOSE)


@pytest.mark.parametrize("alignment", ["native", "same-ids", "retokenise-first", "retokenise-longest"])
def test_plain_text_crosses_in_every_alignment(receiver, sharer, alignment):
    def lm(open_gates):
        fuser = random_fuser(receiver, sharer, "paper", alignment=alignment, open_gates=open_gates)
        return C2CLM(C2C(receiver, [sharer], [fuser]), 2)

    fused, closed = likelihoods(lm(True), TEXTS[:1]), likelihoods(lm(False), TEXTS[:1])
    assert all(abs(a[0] - b[0]) > 0.01 for a, b in zip(fused, closed, strict=True))
    assert_same(closed, likelihoods(hf(receiver), TEXTS[:1]))


def test_what_the_sharer_knows_crosses(receiver, sharer, fuser):
    """The receiver reads the same; what changes its answer is what only the sharer can tell."""
    other = tiny_model("llama", 7, tokenizer=sharer.tokenizer, name=sharer.card.id)  # type: ignore[arg-type]
    one, two = (C2CLM(C2C(receiver, [lm], [fuser])) for lm in (sharer, other))
    for contexts in (TEXTS[:1], chats(one)):
        assert all(
            abs(a[0] - b[0]) > 0.01 for a, b in zip(likelihoods(one, contexts), likelihoods(two, contexts), strict=True)
        )


def test_plain_text_is_read_as_it_stands(receiver, sharer, fuser):
    """Each side's own special tokens before it, nothing behind, and the sharer's last position is not lost."""
    prompt = Reader(C2C(receiver, [sharer], [fuser])).prompt("the answer is")
    (part,) = prompt.row.sharers
    assert prompt.row.ids.tolist() == receiver.tokenizer.encode("the answer is")
    assert part.ids.tolist() == sharer.tokenizer.encode("the answer is")
    assert part.ids[0] == sharer.tokenizer.bos_token_id
    last = len(prompt.row.ids) - 2
    assert part.alignment[last] == len(part.ids) - 1
    assert (np.diff(part.alignment) >= 0).all()
    assert part.due.tolist() == [last + 1] * (last + 1) + [0]


def test_the_fuser_s_templates_are_used(receiver, sharer):
    fuser = random_fuser(receiver, sharer, receiver_template="plain", sharer_template="completion")
    pair = C2C(receiver, [sharer], [fuser])
    lm = C2CLM(pair)
    assert texts(lm, [lm.apply_chat_template(ASKED)]) == [
        pair.generate(ASKED, do_sample=False, max_new_tokens=8).text  # type: ignore[union-attr]
    ]
    assert "Assistant:" in str(lm.chat_template(True))


def test_the_beginning_of_an_answer_is_read_behind_the_fused_prompt(receiver, sharer, fuser):
    reader = Reader(C2C(receiver, [sharer], [fuser]))
    lm = C2CLM(reader.pair)
    asked, begun = chats(lm, [(ASKED, False), (BEGUN, True)])
    ids = reader.tokens(reader.text(begun))
    row, plain = reader.prompt(begun).fitted(ids), reader.prompt(asked).row
    size = len(plain.ids)
    assert row.ids.tolist() == [*plain.ids, *receiver.tokenizer.encode("It is")]
    assert row.sharers[0].ids.tolist() == plain.sharers[0].ids.tolist()
    assert row.sharers[0].due.tolist() == [size - 1] * (size - 1) + [0] * (len(ids) - size + 1)


def test_a_context_is_read_once_for_all_its_continuations(receiver, sharer, fuser):
    rows = []
    hook = sharer.model.get_decoder().register_forward_hook(
        lambda module, args, kwargs, out: rows.append(len(kwargs["input_ids"])), with_kwargs=True
    )
    try:
        likelihoods(C2CLM(C2C(receiver, [sharer], [fuser]), 2), [TEXTS[0], TEXTS[2], TEXTS[4]])
    finally:
        hook.remove()
    assert rows == [2, 1]


def test_several_sharers(receiver, sharer, fuser):
    other = tiny_model("qwen2", 5, name="other")
    pair = C2C(receiver, [sharer, other], [fuser, random_fuser(receiver, other, seed=1)])
    lm, context = C2CLM(pair), TEXTS[:1]
    found = [likelihoods(lm, context), likelihoods(C2CLM(C2C(receiver, [sharer], [fuser])), context)]
    assert all(abs(a[0] - b[0]) > 0.01 for a, b in zip(*found, strict=True))


def test_answers_are_kept_in_the_harness_s_cache(receiver, sharer, fuser, tasks, tmp_path, monkeypatch):
    cache = {"use_cache": str(tmp_path / "answers"), "apply_chat_template": True}
    lm = C2CLM(C2C(receiver, [sharer], [fuser]), 2)
    first = answers(lm, tasks, **cache)
    monkeypatch.setattr(lm, "pair", None)  # whatever is asked again fails
    assert_same(list(answers(lm, tasks, **cache).values()), list(first.values()))


# --- the command line ---------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folders(tmp_path_factory, receiver, sharer, fuser) -> dict[str, str]:
    """The pair and two fusers on disk."""
    root = tmp_path_factory.mktemp("pair")
    for name, lm in (("receiver", receiver), ("sharer", sharer)):
        lm.model.save_pretrained(root / name)
        lm.tokenizer.save_pretrained(root / name)
    fuser.save_pretrained(root / "fuser")
    random_fuser(receiver, sharer, seed=1).save_pretrained(root / "other")
    return {name: str(root / name) for name in ("receiver", "sharer", "fuser", "other")}


def test_the_command_line(folders, receiver, sharer, fuser, tasks, tmp_path, monkeypatch, capsys):
    arguments = ",".join(f"{name}={folders[name]}" for name in ("receiver", "sharer", "fuser"))
    monkeypatch.setattr(
        sys, "argv",
        ["lm_eval", "--model", "c2c", "--model_args", arguments, "--tasks", "c2c_choice", "--include_path", str(DATA),
         "--device", "cpu", "--batch_size", "2", "--apply_chat_template", "--log_samples", "--output_path", str(tmp_path)],
    )  # fmt: skip
    monkeypatch.setattr("lm_eval.tasks.TaskManager", partial(TaskManager, include_defaults=False))  # 10 s of YAML
    runpy.run_module("cache2cache.evaluate.lm_eval", run_name="__main__")
    assert "|c2c_choice|" in capsys.readouterr().out
    (samples,) = tmp_path.rglob("samples_*.jsonl")
    rows = [json.loads(line) for line in samples.read_text(encoding="utf-8").splitlines()]
    wanted = answers(C2CLM(C2C(receiver, [sharer], [fuser])), tasks, ["c2c_choice"], apply_chat_template=True)
    for row, resps in zip(rows, wanted["c2c_choice"], strict=True):
        for got, (nats, greedy) in zip(row["resps"], (resp for (resp,) in resps), strict=True):
            assert float(got[0][0]) == pytest.approx(nats, abs=CLOSE)
            assert got[0][1] == str(greedy)
    (results,) = tmp_path.rglob("results_*.json")
    assert "<|im_start|>" in json.loads(results.read_text(encoding="utf-8"))["chat_template"]


def test_model_args(folders):
    kind = get_model("c2c")
    alone = kind.create_from_arg_string(f"receiver={folders['receiver']},dtype=bfloat16", {"batch_size": "3"})
    assert (alone.pair.sharers, alone.batch_size, alone.pair.receiver.dtype) == ([], 3, torch.bfloat16)
    several = {name: f"{folders[name]};{folders[other]}" for name, other in (("sharer", "sharer"), ("fuser", "other"))}
    pair = kind.create_from_arg_obj({"receiver": folders["receiver"], **several}, {"device": None}).pair
    assert len(pair.sharers) == len(pair.fusers) == 2
    listed = kind.create_from_arg_obj(
        {"receiver": folders["receiver"], "sharer": [folders["sharer"]], "fuser": [folders["fuser"]]}
    )
    assert len(listed.pair.sharers) == 1


@pytest.mark.parametrize(
    ("arguments", "error", "says"),
    [
        ({"sharers": "x"}, TypeError, "sharers"),
        ({"max_batch_size": 8}, GenerationError, "max_batch_size. Give --batch_size alone"),
        ({"batch_size": "auto"}, GenerationError, "'auto'"),
        ({"batch_size": 0}, GenerationError, "1, 2, 3"),
        ({"sharer": "SHARER"}, FuserMismatchError, "one fuser per sharer"),
        ({"sharer": "SHARER;SHARER", "fuser": "FUSER"}, FuserMismatchError, "1 for 2"),
        ({"sharer": "SHARER", "fuser": "FUSER", "mode": "serial"}, FuserMismatchError, "serial"),
        ({"device": "cuda:99"}, ModelError, "--device cpu"),
        ({"dtype": "float7"}, ModelError, "float7"),
    ],
    ids=str,
)
def test_wrong_model_args(folders, arguments, error, says):
    named = {
        key: value.replace("SHARER", folders["sharer"]).replace("FUSER", folders["fuser"]) if key != "dtype" else value
        for key, value in arguments.items()
        if isinstance(value, str)
    }
    with pytest.raises(error, match=says):
        get_model("c2c").create_from_arg_obj({"receiver": folders["receiver"], **arguments, **named})


# --- what is refused ----------------------------------------------------------------------------------------------


def test_rolling_likelihoods_are_refused(receiver, tasks):
    with pytest.raises(GenerationError, match="no prompt .* --model hf"):
        answers(C2CLM(C2C(receiver)), tasks, ["c2c_rolling"])


def test_nothing_is_cut_to_fit(receiver, sharer, fuser):
    lm = C2CLM(C2C(receiver, [sharer], [fuser]))
    room = receiver.card.geometry.max_positions
    context = "x" * (room - 20)
    likelihoods(lm, [context], ["y" * 21])  # the last token is not read
    too_long = [lm.apply_chat_template([{"role": "user", "content": context + "x" * 9}])]
    for ask in (
        lambda: likelihoods(lm, [context], ["y", "y" * 22]),
        lambda: likelihoods(lm, too_long, ["y"]),
        lambda: texts(lm, [context], max_gen_toks=21),
        lambda: texts(lm, too_long, max_gen_toks=1),
    ):
        with pytest.raises(ContextLengthError, match="does not fit"):
            ask()
    short = tiny_model("llama", 1, tokenizer=tiny_tokenizer(), max_position_embeddings=64)
    with pytest.raises(ContextLengthError, match="tiny-llama"):
        likelihoods(C2CLM(C2C(receiver, [short], [random_fuser(receiver, short)])), ["x" * 100])


def test_requests_without_tokens_are_refused(receiver, sharer, fuser):
    lm = C2CLM(C2C(receiver, [sharer], [fuser]))
    for ask in (
        lambda: likelihoods(lm, [TEXTS[0]], [""]),
        lambda: likelihoods(lm, [" \n"]),
        lambda: texts(lm, [""]),
    ):
        with pytest.raises(DataError, match="must have tokens"):
            ask()


def test_conversations_that_were_tampered_with_are_refused(receiver):
    lm = C2CLM(C2C(receiver))
    with pytest.raises(ConversationError, match="--apply_chat_template"):
        likelihoods(lm, [lm.apply_chat_template(ASKED) + " And?"])
    with pytest.raises(ConversationError, match="'tool'"):
        lm.apply_chat_template([{"role": "tool", "content": "4"}])
    with pytest.raises(TemplateError, match="'rag'"):
        lm.chat_template("rag")


def test_an_answer_that_the_template_begins_otherwise_is_refused(sharer):
    """The fused prompt would not be what the receiver reads; alone it has no prompt to be fused."""
    template = (
        "{% for m in messages %}{{ m['role'] + ': ' + m['content'] + '\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ 'now think, assistant:' }}{% endif %}"
    )
    lm = tiny_model("qwen2", tokenizer=tiny_tokenizer(template=template))
    fused, alone = C2CLM(C2C(lm, [sharer], [random_fuser(lm, sharer)])), C2CLM(C2C(lm))
    assert_same(likelihoods(alone, chats(alone)), likelihoods(hf(lm), chats(hf(lm))))
    likelihoods(fused, chats(fused, [(ASKED, False)]))
    with pytest.raises(AlignmentError, match="tokens in common"):
        likelihoods(fused, chats(fused, [(BEGUN, True)]))


def test_a_harness_that_is_not_there_is_said_to_be_missing(monkeypatch):
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    monkeypatch.delitem(sys.modules, "cache2cache.evaluate.lm_eval")
    with pytest.raises(MissingExtraError, match="pip install"):
        importlib.import_module("cache2cache.evaluate.lm_eval")
