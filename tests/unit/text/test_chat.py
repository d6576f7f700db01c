from __future__ import annotations

import contextlib
import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cache2cache.errors import C2CError, ConversationError, ModelError, TemplateError
from cache2cache.text.chat import TEMPLATES, render

ASK = [{"role": "user", "content": "What is the capital of France?"}]


def contents(rendering) -> list[str]:
    return [rendering.text[start:end] for start, end in rendering.ranges]


def talk(*contents: str) -> list[dict[str, str]]:
    return [{"role": ("user", "assistant")[index % 2], "content": text} for index, text in enumerate(contents)]


class TestRanges:
    def test_are_the_stripped_contents(self, tokenizers, faithful, messages):
        for ending in (True, False):
            got = render(tokenizers["bpe"], messages, template=faithful, add_generation_prompt=ending)
            assert contents(got) == [message["content"].strip() for message in messages]
            assert list(got.ranges) == sorted(got.ranges)

    def test_may_include_outer_white_space(self, tokenizers, templates, messages):
        for name in ("smollm2", "qwen25", "numbered", "plain"):
            got = render(tokenizers["bpe"], messages, template=templates[name], outer_space=True)
            assert contents(got) == [message["content"] for message in messages]
        got = render(tokenizers["bpe"], messages, template=templates["gemma"], outer_space=True)
        assert contents(got) == [message["content"].strip() for message in messages]

    @given(texts=st.lists(st.text(max_size=12), min_size=1, max_size=4))
    @settings(max_examples=40)
    def test_are_the_stripped_contents_of_any_text(self, tokenizers, faithful, texts):
        messages = talk(*texts)
        got = render(tokenizers["bytes"], messages, template=faithful)
        assert contents(got) == [text.strip() for text in texts]

    @given(texts=st.lists(st.sampled_from(["user", "\n", " ", "a", "<|im_end|>", "assistant"]), min_size=1, max_size=5))
    @settings(max_examples=40)
    def test_are_found_where_contents_look_like_the_template(self, tokenizers, faithful, texts):
        got = render(tokenizers["bpe"], talk(*texts), template=faithful)
        assert contents(got) == [text.strip() for text in texts]

    def test_point_at_the_right_one_of_equal_messages(self, tokenizers, templates):
        got = render(tokenizers["bpe"], talk("user", "assistant", "user"), template=templates["smollm2"])
        head = got.text.index("<|im_start|>user\n") + len("<|im_start|>user\n")
        assert [start for start, _ in got.ranges] == [
            head,
            head + len("user<|im_end|>\n<|im_start|>assistant\n"),
            head + len("user<|im_end|>\n<|im_start|>assistant\nassistant<|im_end|>\n<|im_start|>user\n"),
        ]

    def test_follow_reasoning_that_the_template_drops(self, tokenizers, templates):
        messages = talk("why?", "<think>\nbecause\n</think>\n\nso.", "sure?")
        got = render(tokenizers["bpe"], messages, template=templates["qwen3"])
        assert "because" not in got.text
        assert contents(got) == ["why?", "so.", "sure?"]

    def test_leave_out_reasoning_that_the_template_adds(self, tokenizers, templates):
        got = render(tokenizers["bpe"], talk("why?", "so."), template=templates["qwen3"], add_generation_prompt=False)
        assert "<think>" in got.text
        assert contents(got) == ["why?", "so."]

    def test_of_left_out_messages_are_empty(self, tokenizers, templates):
        got = render(tokenizers["bpe"], talk("a", "", "b"), template=templates["skips_empty"])
        assert contents(got) == ["a", "", "b"]
        got = render(tokenizers["bpe"], talk("old", "older", "new"), template=templates["last_turn_only"])
        assert contents(got) == ["", "", "new"]

    def test_of_repeated_content_are_its_first_place(self, tokenizers):
        twice = "{% for message in messages %}{{ message.content + ' I repeat: ' + message.content }}{% endfor %}"
        got = render(tokenizers["bpe"], ASK, template=twice)
        assert got.ranges == ((0, len(ASK[0]["content"])),)

    def test_stay_ordered_when_the_template_is_not(self, tokenizers):
        backwards = "{% for message in messages | reverse %}{{ '<' + message.content + '>' }}{% endfor %}"
        got = render(tokenizers["bpe"], talk("one", "two", "three"), template=backwards)
        bounds = [bound for pair in got.ranges for bound in pair]
        assert bounds == sorted(bounds)

    @pytest.mark.parametrize("looks_inside", ["", "{% if messages[-1].content | length > 13 %}{{ '?' }}{% endif %}"])
    def test_of_a_message_that_is_moved_is_empty_and_the_others_stay(self, tokenizers, templates, looks_inside):
        """As in Mistral 7B v0.3, whose system message goes into the last turn; also where marks would change the text."""
        template = looks_inside + templates["system_last"]
        messages = [{"role": "system", "content": "Be brief."}, *talk("Capital of France?", "Paris.", "And of Spain?")]
        got = render(tokenizers["bpe"], messages, template=template)
        assert "Paris.<|im_end|>[INST] Be brief.\n\nAnd of Spain?" in got.text
        assert contents(got) == ["", "Capital of France?", "Paris.", "And of Spain?"]

    def test_of_messages_that_the_template_does_not_change_are_found_beside_one_that_it_does(self, tokenizers):
        shouts = "{% for m in messages %}{{ '<' + (m.content if loop.index > 1 else '…') + '>' }}{% endfor %}"
        got = render(tokenizers["bpe"], talk("old", "older", "new"), template=shouts)
        assert contents(got) == ["", "older", "new"]

    def test_know_what_else_a_message_holds(self, tokenizers):
        template = "{% for m in messages %}{{ '(' + m.reasoning_content + ')' + m.content }}{% endfor %}"
        message = {"role": "assistant", "content": "so.", "reasoning_content": "because"}
        got = render(tokenizers["bpe"], [message], template=template)
        assert (got.text, contents(got)) == ("(because)so.", ["so."])

    def test_of_a_single_special_token_hold_it(self, tokenizers, templates):
        got = render(tokenizers["bpe"], talk("<|im_end|>"), template=templates["smollm2"])
        assert contents(got) == ["<|im_end|>"]
        assert got.ids.tolist().count(tokenizers["bpe"].eos_token_id) == 3


class TestTokens:
    def test_are_those_of_apply_chat_template(self, tokenizer, templates, conversations):
        for template, messages in itertools.product(("smollm2", "qwen25", "gemma", "numbered"), conversations):
            got = render(tokenizer, messages, template=templates[template])
            options = {"chat_template": templates[template], "add_generation_prompt": True}
            assert got.ids.tolist() == tokenizer.apply_chat_template(messages, **options, return_dict=False)
            assert got.text == tokenizer.apply_chat_template(messages, **options, tokenize=False)

    def test_have_offsets_in_the_text(self, tokenizer, faithful, conversations):
        for messages in conversations:
            got = render(tokenizer, messages, template=faithful)
            assert got.ids.shape == got.starts.shape == got.ends.shape
            assert all(array.dtype == "int64" for array in (got.ids, got.starts, got.ends))
            assert (got.starts <= got.ends).all()
            assert (got.ends <= len(got.text)).all()

    def test_cover_the_marks_that_were_composed_into_them(self, tokenizers):
        got = render(
            tokenizers["composing"], talk("xe\u0301 \u1112\u1161\u11ab!"), template="{{ messages[0].content }}"
        )
        assert dict(zip(got.starts.tolist(), got.ends.tolist(), strict=True)) == {0: 1, 1: 3, 3: 4, 4: 7, 7: 8}
        spaces = render(tokenizers["wordpiece"], talk("user  user "), template="{{ messages[0].content }}")
        assert (spaces.starts.tolist(), spaces.ends.tolist()) == ([0, 6], [4, 10])

    def test_none(self, tokenizers):
        got = render(tokenizers["wordpiece"], talk(" "), template="{{ messages[0].content }}")
        assert got.ids.shape == got.starts.shape == got.ends.shape == (0,)

    def test_need_a_fast_tokenizer(self, tokenizers, monkeypatch):
        monkeypatch.setattr(type(tokenizers["bpe"]), "is_fast", False)
        with pytest.raises(ModelError, match=r"which characters .* allowed: a fast tokenizer"):
            render(tokenizers["bpe"], ASK)


class TestTemplates:
    def test_plain(self, tokenizers):
        messages = [{"role": "system", "content": "Be terse."}, *talk("Hi", "Hello", "Bye")]
        got = render(tokenizers["bpe"], messages, template="plain")
        assert got.text == "System: Be terse.\n\nUser: Hi\n\nAssistant: Hello\n\nUser: Bye\n\nAssistant:"
        got = render(tokenizers["bpe"], messages[:-1], template="plain", add_generation_prompt=False)
        assert got.text == "System: Be terse.\n\nUser: Hi\n\nAssistant: Hello"

    def test_plain_is_the_default_of_a_model_without_one(self, tokenizers):
        assert tokenizers["bpe"].chat_template is None
        assert render(tokenizers["bpe"], ASK).text == render(tokenizers["bpe"], ASK, template="plain").text

    def test_completion(self, tokenizers):
        messages = [{"role": "system", "content": "Facts."}, *talk("Q1", "A1", "Q2")]
        got = render(tokenizers["bpe"], messages, template="completion")
        assert got.text == "Facts.\n\nQ1\n\nAnswer: A1\n\nQ2\n\nAnswer:"
        assert contents(got) == ["Facts.", "Q1", "A1", "Q2"]
        assert render(tokenizers["bpe"], talk("Q"), template="completion").text == "Q\n\nAnswer:"

    @pytest.mark.parametrize("template", TEMPLATES)
    def test_begin_with_bos_if_the_tokenizer_adds_it(self, tokenizers, template):
        with_bos, without = tokenizers["bytes"], tokenizers["bpe"]
        assert render(with_bos, ASK, template=template).ids.tolist().count(with_bos.bos_token_id) == 1
        assert render(with_bos, ASK, template=template).ids[0] == with_bos.bos_token_id
        assert without.bos_token_id not in render(without, ASK, template=template).ids

    def test_get_variables(self, tokenizers):
        template = "{{ messages[0].content }}{% if enable_thinking %}<think>{% endif %}"
        got = render(tokenizers["bpe"], ASK, template=template, variables={"enable_thinking": True})
        assert got.text.endswith("<think>")

    def test_cannot_change_the_messages(self, tokenizers):
        messages = talk("kept")
        greedy = "{{ messages[0].pop('content') if messages[0].content }}"
        with contextlib.suppress(TemplateError):  # the sandbox may forbid it
            render(tokenizers["bpe"], messages, template=greedy)
        assert messages == talk("kept")


class TestErrors:
    @pytest.mark.parametrize(
        ("messages", "text"),
        [
            ([], "the conversation is empty"),
            ("hello", "a conversation must be a list of messages; got str"),
            (ASK[0], "a conversation must be a list of messages; got dict"),
            (None, "a conversation must be a list of messages; got NoneType"),
            ([*ASK, "hello"], "message 1 is not a dict with role and content; got str"),
            ([{"role": "user"}], r"message 0 is not a dict with role and content; got \['role'\]"),
            ([*ASK, {"role": "robot", "content": ""}], "message 1 has an unknown role; got 'robot'; allowed: .*system"),
            ([{"role": "user", "content": None}], "the content of message 0 is not text; got NoneType; allowed: str"),
            ([{"role": ["user"], "content": ""}], r"message 0 has an unknown role; got \['user'\]"),
        ],
    )
    def test_conversation(self, tokenizers, messages, text):
        with pytest.raises(ConversationError, match=text) as caught:
            render(tokenizers["bpe"], messages)
        assert isinstance(caught.value, C2CError | ValueError)

    def test_template_refuses(self, tokenizers, templates):
        with pytest.raises(TemplateError, match=r"refuses .*\['user', 'user'\].*roles must alternate"):
            render(tokenizers["bpe"], ASK * 2, template=templates["gemma"])

    def test_template_does_not_compile(self, tokenizers):
        with pytest.raises(TemplateError, match="TemplateSyntaxError"):
            render(tokenizers["bpe"], ASK, template="{% for %}")

    def test_template_fails(self, tokenizers):
        with pytest.raises(TemplateError, match="ZeroDivisionError"):
            render(tokenizers["bpe"], ASK, template="{{ 1 // 0 }}")

    def test_unknown_name(self, tokenizers):
        with pytest.raises(TemplateError, match=r"unknown template; got 'plane'; allowed: \['completion', 'plain'\]"):
            render(tokenizers["bpe"], ASK, template="plane")

    def test_template_inspects_the_content(self, tokenizers):
        picky = "{% if messages[0].content != 'yes' %}{{ raise_exception('say yes') }}{% endif %}{{ 'no' }}"
        with pytest.raises(TemplateError, match=r"inspects message 0, so the place of its content .*say yes"):
            render(tokenizers["bpe"], talk("yes"), template=picky)
