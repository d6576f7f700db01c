"""The conversion, of a GGUF file of a few kilobytes that is made here."""

import errno
from pathlib import Path

import pytest

from cache2cache.errors import ModelError
from cache2cache.models import convert
from cache2cache.models.catalogue import Model

TINY = Model("tiny", "nobody/tiny", "MIT", "https://example.org/mit", "made by a test")
WITH_BOS = Model("tiny-bos", "nobody/tiny", "MIT", "https://example.org/mit", "made by a test", add_bos=True)


def write_gguf(path: Path, without: str = "") -> None:
    """A Llama of two layers with random weights and a tokenizer of 31 tokens."""
    import gguf
    import numpy as np

    tokens = ["<unk>", "<s>", "</s>", "Ġ", *"abcdefghijklmnopqrstuvwxyz", "hi"]
    writer = gguf.GGUFWriter(str(path), "llama")
    writer.add_context_length(64)
    writer.add_embedding_length(16)
    writer.add_block_count(2)
    writer.add_feed_forward_length(32)
    writer.add_head_count(2)
    writer.add_head_count_kv(1)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_dimension_count(8)
    writer.add_rope_freq_base(10000.0)
    writer.add_vocab_size(len(tokens))
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(tokens)
    writer.add_token_types([3, 3, 3] + [1] * (len(tokens) - 3))
    writer.add_token_merges(["h i"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_unk_token_id(0)
    layer = {"attn_norm": (16,), "ffn_norm": (16,), "attn_q": (16, 16), "attn_k": (8, 16), "attn_v": (8, 16)}
    layer |= {"attn_output": (16, 16), "ffn_gate": (32, 16), "ffn_up": (32, 16), "ffn_down": (16, 32)}
    shapes = {"token_embd": (len(tokens), 16), "output_norm": (16,)}
    shapes |= {f"blk.{i}.{name}": shape for i in range(2) for name, shape in layer.items()}
    random = np.random.default_rng(0)
    for name, shape in shapes.items():
        if name != without:
            writer.add_tensor(f"{name}.weight", random.normal(scale=0.1, size=shape).astype(np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def test_conversion_gives_plain_bf16_and_keeps_quiet(tmp_path, monkeypatch, capfd):
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    (tmp_path / "partial").mkdir()
    write_gguf(tmp_path / "partial" / "weights.gguf")
    (tmp_path / "weights.gguf").write_bytes(b"a file of the same name in the working directory")
    monkeypatch.chdir(tmp_path)
    convert.to_safetensors(TINY, tmp_path / "partial" / "weights.gguf", tmp_path / "made")
    assert capfd.readouterr() == ("", "")

    model = AutoModelForCausalLM.from_pretrained(tmp_path / "made")
    assert {weight.dtype for weight in model.parameters()} == {torch.bfloat16}
    assert not hasattr(model.config, "quantization_config")
    assert str(tmp_path) not in (tmp_path / "made" / "config.json").read_text(), "no trace of where it was made"
    ids = AutoTokenizer.from_pretrained(tmp_path / "made")("hi abc")["input_ids"]
    assert ids == [30, 3, 4, 5, 6], "no BOS unless the catalogue asks for it"

    import gguf

    tensors = {tensor.name: tensor for tensor in gguf.GGUFReader(tmp_path / "partial" / "weights.gguf").tensors}
    stored = torch.tensor(tensors["blk.1.ffn_up.weight"].data).bfloat16()
    assert torch.equal(model.model.layers[1].mlp.up_proj.weight, stored)


def test_conversion_adds_bos_where_the_catalogue_asks_for_it(tmp_path):
    from transformers import AutoTokenizer

    write_gguf(tmp_path / "weights.gguf")
    convert.to_safetensors(WITH_BOS, tmp_path / "weights.gguf", tmp_path / "made")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "made")
    assert tokenizer("hi")["input_ids"] == [1, 30]
    assert tokenizer("hi", add_special_tokens=False)["input_ids"] == [30]


def test_missing_weights_are_an_error_and_not_random(tmp_path):
    write_gguf(tmp_path / "weights.gguf", without="blk.1.ffn_up")
    with pytest.raises(ModelError, match=r"do not fit its architecture.*layers\.1\.mlp\.up_proj"):
        convert.to_safetensors(TINY, tmp_path / "weights.gguf", tmp_path / "made")


def test_a_file_that_is_no_gguf(tmp_path):
    (tmp_path / "weights.gguf").write_bytes(b"not this" * 100)
    with pytest.raises(ModelError, match=r"transformers \d.* could not convert tiny"):
        convert.to_safetensors(TINY, tmp_path / "weights.gguf", tmp_path / "made")


def test_safetensors_on_a_full_disk(tmp_path, monkeypatch):
    from safetensors import SafetensorError

    def fail(*args):
        raise SafetensorError('Error while serializing: I/O error: "No space left on device (os error 28)"')

    write_gguf(tmp_path / "weights.gguf")
    monkeypatch.setattr("transformers.PreTrainedModel.save_pretrained", fail)
    with pytest.raises(OSError, match="No space") as caught:
        convert.to_safetensors(TINY, tmp_path / "weights.gguf", tmp_path / "made")
    assert caught.value.errno == errno.ENOSPC
