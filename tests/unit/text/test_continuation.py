"""A text behind a prompt has the tokens that it has when both are one text."""

import numpy as np
import pytest
import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from cache2cache.evaluate.scoring import letter_logprobs
from cache2cache.testing import tiny_model, tiny_tokenizer
from cache2cache.text.continuation import continued

LLAMA2 = (
    "{% for m in messages %}{% if m['role'] == 'user' %}{{ '<s>[INST] ' + m['content'] + ' [/INST]' }}"
    "{% else %}{{ ' ' + m['content'] + '</s>' }}{% endif %}{% endfor %}"
)
LINES = (
    "{% for m in messages %}{{ '<|' + m['role'] + '|>\\n' + m['content'] + '</s>\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\\n' }}{% endif %}"
)


def sentence_piece(template, *, prepend):
    """As SentencePiece's are, with a space before a text: written by a normaliser, or by the pre-tokenizer."""
    vocab = {f"<0x{i:02X}>": i for i in range(256)}
    for piece in ["▁", *map(chr, range(33, 127)), *("▁" + letter for letter in "ABCD")]:
        vocab[piece] = len(vocab)
    merges = [("▁", letter) for letter in "ABCD"]
    backend = Tokenizer(models.BPE(vocab=vocab, merges=merges, byte_fallback=True, fuse_unk=True))
    if prepend:
        backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    else:
        backend.pre_tokenizer = pre_tokenizers.Metaspace(replacement="▁", prepend_scheme="first", split=False)
    fallback = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    backend.decoder = decoders.Sequence(fallback)
    backend.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in ("<s>", "</s>")])
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<s>", eos_token="</s>", pad_token="</s>", chat_template=template
    )


TOKENIZERS = {
    "prepended": sentence_piece(LLAMA2, prepend=True),
    "behind a line": sentence_piece(LINES, prepend=False),
    "bytes": tiny_tokenizer(),
}


@pytest.mark.parametrize("text", ["B", "A B", "D. and so on", "né", "\nB", "🙂 B"])
@pytest.mark.parametrize("kind", TOKENIZERS)
def test_a_response_has_the_tokens_that_it_has_in_the_conversation(kind, text):
    tokenizer = TOKENIZERS[kind]
    turns = [{"role": "user", "content": "Which?"}, {"role": "assistant", "content": text}]
    prompt = tokenizer.apply_chat_template(turns[:1], add_generation_prompt=True, return_dict=False)
    whole = tokenizer.apply_chat_template(turns, return_dict=False)
    found = continued(tokenizer, prompt[-1], text)
    assert whole[: len(prompt)] == prompt
    assert whole[len(prompt) : len(prompt) + len(found.ids)] == found.ids.tolist()
    assert found.spaced == (kind == "prepended")
    assert found.starts[0] in (0, -1) and found.ends[-1] == len(text)
    covered = np.zeros(len(text), bool)
    for start, end in zip(found.starts.clip(min=0), found.ends, strict=True):
        covered[start:end] = True
    assert all(covered | [character == " " for character in text])


@pytest.mark.parametrize("kind", ["prepended", "behind a line"])
@pytest.mark.parametrize("text", ["B", "A B", "né"])
def test_a_prompt_that_ends_in_a_space_needs_no_other(kind, text):
    tokenizer = TOKENIZERS[kind]
    last = tokenizer("Answer: ", add_special_tokens=False)["input_ids"][-1]
    assert tokenizer.convert_ids_to_tokens(last) == "▁"
    found = continued(tokenizer, last, text)
    assert tokenizer.convert_ids_to_tokens(found.ids)[0] == text[0]
    assert tokenizer.decode([*tokenizer("x", add_special_tokens=False)["input_ids"], last, *found.ids]) == f"x {text}"
    assert (found.spaced, found.starts[0], found.ends[-1]) == (False, 0, len(text))


def test_a_token_across_the_border_is_not_the_responses():
    joined = tiny_tokenizer(merge=["\n\n"])
    (line,), b = (joined(text, add_special_tokens=False)["input_ids"] for text in ("\n", "\nb"))
    assert len(joined("\n\n", add_special_tokens=False)["input_ids"]) == 1
    assert continued(joined, line, "\nb").ids.tolist() == b


@pytest.mark.parametrize("kind", ["prepended", "behind a line"])
def test_a_letter_counts_as_it_is_written_behind_a_prompt(kind):
    """Behind a space, and behind a line break without one."""
    tokenizer = TOKENIZERS[kind]
    lm = tiny_model("llama", tokenizer=tokenizer)
    logits = torch.zeros(len(tokenizer))
    for spelling in ("▁B", "B"):
        logits[tokenizer.convert_tokens_to_ids(spelling)] = 5.0
        assert letter_logprobs(lm, logits, "AB")[1] > -0.1
        logits[tokenizer.convert_tokens_to_ids(spelling)] = 0.0
