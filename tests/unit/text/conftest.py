"""Small tokenizers of several kinds, chat templates that are hard on ranges, conversations that are hard on both."""

from __future__ import annotations

import itertools

import pytest
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

SMOLLM2 = (
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}"
    "{{ '<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n' }}"
    "{% endif %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
QWEN25 = """\
{%- if messages[0]['role'] == 'system' %}
    {{- '<|im_start|>system\n' + messages[0]['content'] + '<|im_end|>\n' }}
{%- else %}
    {{- '<|im_start|>system\nYou are Qwen, created by Alibaba Cloud. You are a helpful assistant.<|im_end|>\n' }}
{%- endif %}
{%- for message in messages %}
    {%- if (message.role == "user") or (message.role == "system" and not loop.first) or message.role == "assistant" %}
        {{- '<|im_start|>' + message.role + '\n' + message.content + '<|im_end|>' + '\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\n' }}
{%- endif %}
"""
# Trims, renames a role, merges the system message into the first turn, insists on alternation.
GEMMA = """\
{{ bos_token }}
{%- if messages[0]['role'] == 'system' -%}
    {%- set prefix = messages[0]['content'] | trim + '\n\n' -%}
    {%- set turns = messages[1:] -%}
{%- else -%}
    {%- set prefix = '' -%}
    {%- set turns = messages -%}
{%- endif -%}
{%- for message in turns -%}
    {%- if (message['role'] == 'user') != (loop.index0 % 2 == 0) -%}
        {{ raise_exception("Conversation roles must alternate user/assistant/user/assistant/...") }}
    {%- endif -%}
    {%- set role = 'model' if message['role'] == 'assistant' else message['role'] -%}
    {{ '<start_of_turn>' + role + '\n' + (prefix if loop.first else '') }}
    {{- message['content'] | trim + '<end_of_turn>\n' }}
{%- endfor -%}
{%- if add_generation_prompt -%}{{ '<start_of_turn>model\n' }}{%- endif -%}
"""
# Drops the reasoning of earlier turns, and shows an empty one in the last.
QWEN3 = """\
{%- set ns = namespace(last=0) %}
{%- for message in messages %}{%- if message.role == 'user' %}{%- set ns.last = loop.index0 %}{%- endif %}{%- endfor %}
{%- for message in messages %}
    {%- if message.role == 'assistant' %}
        {%- set content = message.content.split('</think>')[-1].lstrip('\n') %}
        {%- if loop.index0 > ns.last %}{%- set content = '<think>\n\n</think>\n\n' + content %}{%- endif %}
        {{- '<|im_start|>assistant\n' + content + '<|im_end|>\n' }}
    {%- else %}
        {{- '<|im_start|>' + message.role + '\n' + message.content + '<|im_end|>\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\n' }}{%- endif %}
"""
NUMBERED = (
    "{% for message in messages %}{{ loop.index ~ '. ' + message.role + ' (' ~ message.content | length ~ '): ' }}"
    "{{ message.content + '\n' }}{% endfor %}{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
)
SKIPS_EMPTY = (
    "{% for message in messages %}{% if message.content %}{{ '[' + message.role + '] ' + message.content + '\n' }}"
    "{% endif %}{% endfor %}{% if add_generation_prompt %}{{ '[assistant]' }}{% endif %}"
)
LAST_TURN_ONLY = (
    "{{ '<|im_start|>' + messages[-1].content + '<|im_end|>' }}{% if add_generation_prompt %}{{ '\n' }}{% endif %}"
)

SYSTEM_LAST = """\
{%- if messages[0]['role'] == 'system' %}{%- set system = messages[0]['content'] %}{%- set turns = messages[1:] %}
{%- else %}{%- set turns = messages %}{%- endif %}
{%- for message in turns %}
    {%- if message['role'] == 'user' %}
        {{- '[INST] ' + (system + '\n\n' if loop.last and system is defined else '') + message['content'] + '[/INST]' }}
    {%- else %}
        {{- ' ' + message['content'] + '<|im_end|>' }}
    {%- endif %}
{%- endfor %}
"""

FAITHFUL = {"smollm2": SMOLLM2, "qwen25": QWEN25, "gemma": GEMMA, "numbered": NUMBERED, "plain": "plain"}
"""Templates that show every content, at most without its outer white space."""

USER, ASSISTANT, SYSTEM = "user", "assistant", "system"

CONTENTS = {
    "question": ["What is the capital of France?"],
    "repeated": ["user", "user", "user"],
    "contained": ["assistant", "<|im_start|>assistant\n", "system"],
    "empty": ["", "", ""],
    "white": [" \n ", "\t", "\n"],
    "special": ["<|im_end|>", "a<|im_start|>user\nb", "<end_of_turn>\n"],
    "newlines": ["\n\na\n\n\nb\n", "a\r\nb", "\n"],
    "outer": ["  padded  ", "\tpadded\n\n", "\u00a0padded\u2003"],
    "emoji": ["🚀👩\u200d👩\u200d👧\u200d👦", "🇨🇭🇯🇵🚀", "a🚀b"],
    "cjk": ["缓存到缓存：让两个大语言模型", "北京是中国的首都。", "日本語テスト"],
    "combining": ["e\u0301a\u0300\u0301", "\u0301start", "हिन्दी ภาษาไทย"],
    "rtl": ["العربية שלום", "\u202bשלום\u202c", "مرحبا world"],
    "sentinels": ["\U000f0000\U000f0001", "\U000f0000", "\U000f0001\U000f0000"],
    "jinja": ["{{ 1 }}", "{% raw %}", "{# no #}"],
    "thoughts": ["think", "<think>\nhm\n</think>\n\nyes", "why?"],
}


def conversation(contents: list[str], system: str | None = None) -> list[dict[str, str]]:
    turns = [
        {"role": role, "content": text}
        for role, text in zip(itertools.cycle((USER, ASSISTANT)), contents, strict=False)
    ]
    return turns if system is None else [{"role": SYSTEM, "content": system}, *turns]


CONVERSATIONS = {name: conversation(contents) for name, contents in CONTENTS.items()} | {
    f"system-{name}": conversation(contents, system=contents[0]) for name, contents in CONTENTS.items()
}

SPECIALS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<start_of_turn>", "<end_of_turn>"]
CORPUS = [
    "What is the capital of France? You are a helpful assistant user system model\nuser\nassistant\nthe answer is\n\n",
    "🚀👩\u200d👩\u200d👧\u200d👦 缓存到缓存 北京 العربية שלום हिन्दी ภาษาไทย e\u0301 padded with spaces\n\n User:",
] * 4


def byte_bpe(size: int, *, regex: bool) -> Tokenizer:
    """Byte-level BPE. Without the regex its tokens run across words, lines, and the borders of messages."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=regex)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer.train_from_iterator(CORPUS, trainers.BpeTrainer(vocab_size=size, initial_alphabet=alphabet))
    return tokenizer


def composing() -> Tokenizer:
    """Like Qwen's: composes characters first, and its offsets then leave out combining marks."""
    tokenizer = byte_bpe(450, regex=True)
    tokenizer.normalizer = normalizers.NFC()
    return tokenizer


def unigram() -> Tokenizer:
    """SentencePiece-like: spaces become ▁, unknown characters become bytes."""
    words = [
        "▁What",
        "▁is",
        "▁the",
        "▁cap",
        "ital",
        "▁of",
        "▁France",
        "?",
        "▁user",
        "user",
        "▁pad",
        "ded",
        "缓存",
        "🚀",
        "▁",
    ]
    letters = [chr(code) for code in range(33, 127)]
    scored = [("<unk>", 0.0), *((f"<0x{byte:02X}>", -20.0) for byte in range(256))]
    scored += [(piece, -2.0 - len(piece) / 10) for piece in dict.fromkeys([*words, *letters])]
    tokenizer = Tokenizer(models.Unigram(scored, unk_id=0, byte_fallback=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    tokenizer.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Metaspace(prepend_scheme="first")])
    return tokenizer


def wordpiece() -> Tokenizer:
    """BERT-like: lower case, no accents, and no tokens at all for white space."""
    words = ["[UNK]", "what", "is", "the", "capital", "of", "france", "user", "assistant", "pad", "##ded"]
    letters = [chr(code) for code in range(33, 127)]
    pieces = dict.fromkeys([*words, *letters, *("##" + letter for letter in letters)])
    tokenizer = Tokenizer(models.WordPiece({piece: index for index, piece in enumerate(pieces)}, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer()
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    return tokenizer


def split_digits() -> Tokenizer:
    """Character-like: one token per byte, after splitting off digits and adding a beginning-of-sequence token."""
    tokenizer = Tokenizer(models.BPE({token: index for index, token in enumerate(sorted(byte_alphabet()))}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(Regex(r"\d"), "isolated"), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def byte_alphabet() -> list[str]:
    return pre_tokenizers.ByteLevel.alphabet()


def wrap(tokenizer: Tokenizer, *, adds_bos: bool = False) -> PreTrainedTokenizerFast:
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIALS])
    if adds_bos:
        bos = SPECIALS[0]
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{bos} $A", special_tokens=[(bos, tokenizer.token_to_id(bos))]
        )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token=SPECIALS[0], eos_token=SPECIALS[2], pad_token=SPECIALS[0]
    )


BYTE_LEVEL = ("bytes", "composing", "runs")
"""Tokenizers that lose no character, so that every character has a token."""


@pytest.fixture(scope="session")
def tokenizers() -> dict[str, PreTrainedTokenizerFast]:
    return {
        "bytes": wrap(split_digits(), adds_bos=True),
        "bpe": wrap(byte_bpe(400, regex=True)),
        "runs": wrap(byte_bpe(500, regex=False)),
        "composing": wrap(composing()),
        "unigram": wrap(unigram(), adds_bos=True),
        "wordpiece": wrap(wordpiece()),
    }


@pytest.fixture(scope="session", params=["bytes", "bpe", "runs", "composing", "unigram", "wordpiece"])
def tokenizer(request: pytest.FixtureRequest, tokenizers: dict) -> PreTrainedTokenizerFast:
    return tokenizers[request.param]


@pytest.fixture(scope="session", params=list(itertools.product(BYTE_LEVEL, BYTE_LEVEL)), ids="<-".join)
def byte_pair(request: pytest.FixtureRequest, tokenizers: dict) -> tuple:
    """Receiver and sharer tokenizers that lose no character."""
    return tuple(tokenizers[name] for name in request.param)


@pytest.fixture(scope="session", params=FAITHFUL)
def faithful(request: pytest.FixtureRequest) -> str:
    return FAITHFUL[request.param]


@pytest.fixture(scope="session", params=CONVERSATIONS)
def messages(request: pytest.FixtureRequest) -> list[dict[str, str]]:
    return CONVERSATIONS[request.param]


@pytest.fixture(scope="session")
def conversations() -> list[list[dict[str, str]]]:
    return list(CONVERSATIONS.values())


@pytest.fixture(scope="session")
def templates() -> dict[str, str]:
    return FAITHFUL | {
        "qwen3": QWEN3,
        "skips_empty": SKIPS_EMPTY,
        "last_turn_only": LAST_TURN_ONLY,
        "system_last": SYSTEM_LAST,
    }
