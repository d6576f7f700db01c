"""The payload benchmark on a tiny pair: what it measures is what it says."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from payload import sizes
from payload_loss import UNSENT, Travelled, compared, loss
from payload_report import markdown
from payload_service import Service, listen, wanted
from payload_tampering import KEY, tamper
from payload_transfer import transfers

from cache2cache import C2C
from cache2cache.errors import DataError
from cache2cache.evaluate.prefills import Prefills
from cache2cache.evaluate.schema import RowRecord
from cache2cache.fuser.base import Fuser
from cache2cache.models.load import LanguageModel
from cache2cache.testing import random_fuser
from cache2cache.types import Timings

QUESTIONS = ["What is the answer?", "the question and the letter", "12 == 12"]


@pytest.fixture(scope="module")
def tiny(receiver: LanguageModel, sharer: LanguageModel, fuser: Fuser) -> C2C:
    return C2C(receiver, [sharer], [fuser])


@pytest.fixture(scope="module")
def rows(tiny: C2C):
    return tiny.rows([[{"role": "user", "content": text}] for text in QUESTIONS])


def test_fewer_bits_weigh_less(tiny: C2C, rows):
    found = sizes(tiny, rows)
    plain = [x["bytes"] for x in found if x["what"] == "what is fused" and not x["zstd"]]
    assert len(plain) == 4
    assert plain == sorted(plain, reverse=True)
    assert all(x["per_position"] * x["positions"] == pytest.approx(x["bytes"]) for x in found)
    assert "bytes per position" in markdown({"size": found})


@pytest.mark.parametrize("key", [None, KEY])
def test_meddling(tiny: C2C, rows, key: bytes | None):
    found = {fared.kind: (fared.noticed, fared.times) for fared in tamper(tiny, rows, key, 40, 0)}
    for kind in ("one bit flipped", "another answer's header", "the answer to another prompt"):
        assert found[kind][0] == found[kind][1] > 0
    if key is not None:
        assert all(noticed == times for noticed, times in found.values())
    else:  # a digest is no signature
        assert found["the answer with fewer bits than asked for"][0] == 0


def test_a_service_without_http_gives_the_same_answers(tiny: C2C):
    asked = [{"role": "user", "content": QUESTIONS[0]}]
    remote = listen(Service(tiny.sharers[0]), tiny.sharers[0])
    apart = C2C(tiny.receiver, [remote], tiny.fusers)
    options = {"max_new_tokens": 8, "do_sample": False}
    assert apart.generate(asked, **options).ids == tiny.generate(asked, **options).ids  # type: ignore[arg-type, union-attr]


def test_every_way_is_measured(tiny: C2C):
    found = transfers(tiny, [{"role": "user", "content": QUESTIONS[0]}], ["float32", "int4"], [3], repeat=2)
    assert [way["way"] for way in found] == ["float32", "float32, zstd", "int4", "int4, zstd", "text, 3 tokens"]
    for way in found:
        stages = {name: value for name, value in way.items() if name not in ("way", "bytes", "total")}
        assert all(value >= 0 for value in stages.values())
        assert way["bytes"] > 0
    assert found[2]["bytes"] < found[0]["bytes"]
    assert markdown({"transfer": found}).count("\n") == 6


# --- what fewer bits cost -----------------------------------------------------------------------------------------


def test_what_travels_is_what_is_fused(tiny: C2C, rows):
    own, sent = (Travelled(tiny, Prefills(), precision).heard(0, rows, Timings()) for precision in (None, "float32"))
    for row, before, after in zip(rows, own, sent, strict=True):
        positions, layers = wanted(tiny, row)
        assert torch.equal(before[:, list(layers)][:, :, :, positions], after[:, list(layers)][:, :, :, positions])
        after[:, list(layers)] = after[:, list(layers)].index_fill(3, torch.tensor(positions), 0)
        assert not after.any()


def test_rows_are_asked_in_every_precision(tiny: C2C, tmp_path: Path):
    data = tmp_path / "quiz.jsonl"
    questions = [
        {"question": text, "choices": ["one", "two", "three"], "answer": i} for i, text in enumerate(QUESTIONS)
    ]
    data.write_text("\n".join(map(json.dumps, questions)))

    def ask(pair: C2C = tiny) -> dict:
        return loss(
            pair, ["float32", "int4"], [str(data)], tmp_path / "rows",
            data_dir=None, limit=None, batch_size=2, prefills=None,
        )  # fmt: skip

    found = ask()
    assert list(found) == ["quiz", "all"]
    same, coarse = found["quiz"]["float32"], found["quiz"]["int4"]
    assert (same["nats_difference"]["value"], same["gained"], same["lost"], same["p"]) == (0, 0, 0, 1)
    assert coarse["nats_difference"]["value"] != 0
    assert found["quiz"][UNSENT]["rows"] == 3
    written = (tmp_path / "rows" / "rows.jsonl").read_text()
    assert ask() == found
    assert (tmp_path / "rows" / "rows.jsonl").read_text() == written
    assert "nats of the right answer" in markdown({"loss": found})
    other = C2C(tiny.receiver, tiny.sharers, [random_fuser(tiny.receiver, tiny.sharers[0], seed=9)])  # type: ignore[arg-type]
    with pytest.raises(DataError, match="fusers was"):
        ask(other)


def test_differences_are_paired():
    def row(system: str, name: str, right: float, nats: float) -> RowRecord:
        metrics = {"likelihood": right, "nats": nats}
        return RowRecord(task="t", id=name, subject="", system=system, target="A", metrics=metrics)

    answers = {"a": (1, 0), "b": (1, 1), "c": (0, 1), "d": (0, 1)}
    rows = [row(UNSENT, name, before, 1.0) for name, (before, _) in answers.items()]
    rows += [row("int4", name, after, 1.5) for name, (_, after) in reversed(answers.items())]
    found = compared(rows)["t"]["int4"]
    assert (found["gained"], found["lost"], found["accuracy"]) == (2, 1, 0.75)
    assert found["accuracy_difference"]["value"] == 0.25
    assert found["nats_difference"]["value"] == 0.5
