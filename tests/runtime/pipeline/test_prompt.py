from __future__ import annotations

import json

import numpy as np
import pytest
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from tango_plugins import TangoError
from tango_runtime.pipeline import chat_template
from tango_runtime.pipeline.chat_template import ChatTemplate
from tango_runtime.pipeline.prompt import Prompt

LLAVA_HF = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + ' ' }}"
    "{% for part in message['content'] if part['type'] == 'video' %}{{ '<video>' }}{% endfor %}"
    "{% for part in message['content'] if part['type'] == 'text' %}"
    "{% if message['role'] == 'assistant' %}{% generation %}{{ '\\n' + part['text'] }}{% endgeneration %}"
    "{% else %}{{ '\\n' + part['text'] }}{% endif %}{% endfor %}{{ '<|im_end|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
QWEN_1_5 = """\
<|im_start|>system
You are a helpful assistant.<|im_end|>
{% for message in messages %}
<|im_start|>{{ message['role'] }}
{% for part in message['content'] %}
    {% if part['type'] == 'video' %}
<image>
    {% else %}
{{ part['text'] }}<|im_end|>
    {% endif %}
{% endfor %}
{% endfor %}
{% if add_generation_prompt %}
<|im_start|>assistant
{% endif %}
"""
NUMBERED = (
    "{% for m in messages %}{{ loop.index }}{% for part in m['content'] %}{{ part['text'] or '<video>' }}{% endfor %}"
    "{% endfor %}"
)
#: A tokenizer.json that knows no token.
EMPTY = json.dumps(
    {"version": "1.0", "added_tokens": [], "model": {"type": "WordLevel", "vocab": {}, "unk_token": "x"}}
)
TEMPLATES = {"<video>": LLAVA_HF, "<image>": QWEN_1_5}
RENDERED = {
    "<video>": "<|im_start|>user <video>\nQ<|im_end|><|im_start|>assistant\n",
    "<image>": "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\n<image>\nQ<|im_end|>\n"
    "<|im_start|>assistant\n",
}
QUESTIONS = [
    "What happens after the door opens?",
    "  deux\n\nlignes ",
    "門が開いた後は？ 🚪",
    "{{ 7 * 7 }} <b>&amp;</b>",
]


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    """A byte-level BPE tokenizer like Qwen2's, trained on a few lines."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<image>", "<video>"]
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([*QUESTIONS, *RENDERED.values()] * 5, trainer)
    tokenizer.enable_truncation(4)
    tokenizer.enable_padding(length=64)
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.json"
    tokenizer.save(str(path))
    return path


def untruncated(path):
    tokenizer = Tokenizer.from_file(str(path))
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer


@pytest.fixture(scope="module")
def transformers_tokenizer(path):
    return PreTrainedTokenizerFast(tokenizer_file=str(path), eos_token="<|im_end|>")


@pytest.fixture(params=TEMPLATES)
def placeholder(request):
    return request.param


@pytest.fixture
def prompt(path, placeholder):
    return Prompt(path.read_text(), TEMPLATES[placeholder], placeholder)


def test_the_text_around_the_video(path, prompt, placeholder):
    plain = untruncated(path)
    before, after = (plain.decode(list(ids), skip_special_tokens=False) for ids in prompt.encode("Q"))
    assert before + placeholder + after == RENDERED[placeholder]


@pytest.mark.parametrize("question", QUESTIONS)
def test_equal_to_transformers(prompt, placeholder, transformers_tokenizer, question):
    messages = [{"role": "user", "content": [{"type": "video"}, {"type": "text", "text": question}]}]
    theirs = transformers_tokenizer.apply_chat_template(
        messages, chat_template=TEMPLATES[placeholder], add_generation_prompt=True, return_dict=False
    )
    before, after = prompt.encode(question)
    assert before.dtype == after.dtype == np.int64
    video = transformers_tokenizer.convert_tokens_to_ids(placeholder)
    assert [*before, video, *after] == theirs


def test_templates_render_as_in_transformers(transformers_tokenizer):
    template = (
        "{%- set seen = 'outer' -%}\n  {% for m in messages %}\n"
        "{% if loop.index > 1 %}{% break %}{% endif %}\n"
        "<video> {{ {'a': '<é>', 'b': [1]} | tojson }} {{ [1] | tojson(indent=2) }}\n"
        "  {% generation %} {% set seen = 'inner' %} {{ m['content'][1]['text'] }}{% endgeneration %}\n"
        "{{ seen }} {{ strftime_now('100%%') }} {{ undefined }} {{ tools is none }}{% endfor %}\n"
    )
    messages = [{"role": "user", "content": [{"type": "video"}, {"type": "text", "text": "Q"}]}]
    theirs = transformers_tokenizer.apply_chat_template(messages, chat_template=template, tokenize=False)
    assert "100%" in theirs
    assert "<video>".join(ChatTemplate(template, "<video>").around_video("Q")) == theirs


@pytest.mark.parametrize("turns", [2, 3, 4])
@pytest.mark.parametrize("placeholder", TEMPLATES)
def test_further_turns_are_what_transformers_renders(transformers_tokenizer, placeholder, turns):
    messages = [{"role": "user", "content": [{"type": "video"}, {"type": "text", "text": "Q"}]}]
    for turn in range(1, turns):
        messages.append({"role": "assistant", "content": [{"type": "text", "text": f"answer {turn}"}]})
        messages.append({"role": "user", "content": [{"type": "text", "text": f"question {turn}"}]})
    theirs = transformers_tokenizer.apply_chat_template(
        messages, chat_template=TEMPLATES[placeholder], tokenize=False, add_generation_prompt=True
    )
    ours = ChatTemplate(TEMPLATES[placeholder], placeholder).follow_up(f"question {turns - 1}")
    assert theirs.endswith(f"answer {turns - 1}{ours}")


@pytest.mark.parametrize("expression", ["text", "text | trim", "text.lstrip()", "text.rstrip() ~ ' '"])
@pytest.mark.parametrize("question", ["Q", "  Q\n", "\u2003Q\u2003"])
def test_a_question_is_stripped_where_the_template_strips_it(transformers_tokenizer, expression, question):
    template = "<video>[{% set text = messages[0]['content'][1]['text'] %}{{ " + expression + " }}]"
    messages = [{"role": "user", "content": [{"type": "video"}, {"type": "text", "text": question}]}]
    theirs = transformers_tokenizer.apply_chat_template(messages, chat_template=template, tokenize=False)
    assert "<video>".join(ChatTemplate(template, "<video>").around_video(question)) == theirs


@pytest.mark.parametrize(
    "template", ["<video>{{ messages[0]['content'][1]['text'] }}", NUMBERED], ids=["first turn only", "numbered turns"]
)
def test_a_template_without_a_constant_turn_has_no_chat(template):
    with pytest.raises(TangoError, match="does not render earlier answers"):
        ChatTemplate(template, "<video>").follow_up("Q")


def test_reserved_text_in_a_question_is_refused_by_name(prompt, placeholder):
    for token in (placeholder, "<|im_end|>"):
        with pytest.raises(TangoError) as error:
            prompt.encode(f"What is {token}?")
        assert token in error.value.message


QUESTION = "{{ messages[0]['content'][1]['text'] }}"


@pytest.mark.parametrize(
    ("template", "words"),
    [
        ("no video", "0 times"),
        ("<video> and <video>", "2 times"),
        ("{% if %}", "has an error"),
        ("<video>{{ raise_exception('only images') }}", "only images"),
        ("<video>{{ messages[0]['content'] + 'x' }}", "cannot be rendered"),
        ("<video>{{ messages.append(1) }}", "cannot be rendered"),
        ("<video>What?", "does not write the question as it is"),
        ("<video>{{ messages | tojson }}", "does not write the question as it is"),
        ("<video>" + QUESTION[:-2] + "| upper }}", "does not write the question as it is"),
        ("{{ messages | string }}<video>" + QUESTION, "does not write the question as it is"),
        ("{{ messages | tojson }}<video>" + QUESTION, "does not write the question as it is"),
        ("x" * (1 << 20) + "<video>" + QUESTION, "characters"),
        # A stranger's program: what leaves the sandbox,
        ("{% include '/etc/passwd' %}<video>", "cannot be rendered"),
        ("{% import 'os' as os %}<video>", "cannot be rendered"),
        ("{% extends 'x' %}<video>", "cannot be rendered"),
        ("{{ ''.__class__.__mro__[1].__subclasses__() }}<video>", "cannot be rendered"),
        ("{{ cycler.__init__.__globals__ }}<video>", "cannot be rendered"),
        ("{{ '{0.__class__.__mro__}'.format(1) }}<video>", "cannot be rendered"),
        # and what is too deep or too large.
        ("{% macro f(n) %}{{ f(n) }}{{ f(n) }}{% endmacro %}{{ f(1) }}<video>", "recursion"),
        ("{{ 'x' * 10 ** 10 }}<video>", "more memory"),
        ("{{ '%9999999999d' % 1 }}<video>", "more memory"),
        ("{{ 'x' | center(10 ** 10) }}<video>", "more memory"),
        (
            "{% set x = namespace(t='x') %}{% for i in range(99) %}{% set x.t = x.t ~ x.t %}{% endfor %}",
            "more memory",
        ),
        ("{{ 'x' * 10 ** 7 }}<video>", "a text of 10000007 characters"),
        ("{{ " + "(" * 3000 + "1" + ")" * 3000 + " }}<video>", "has an error"),
    ],
)
def test_bad_templates_are_refused(template, words):
    with pytest.raises(TangoError, match=words) as caught:
        ChatTemplate(template, "<video>")
    assert "chat template" in caught.value.message
    assert len(caught.value.message) < 500


LOOPS = "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}"
CALLS = "{% macro f(n) %}{% if n %}{{ f(n-1) }}{{ f(n-1) }}{% endif %}{% endmacro %}{{ f(60) }}"


@pytest.mark.parametrize(
    ("template", "seconds", "words"),
    [
        (LOOPS, None, "within 4 s of the processor"),
        (CALLS, 1, "within 1 s of the processor"),
        ("{{ 9 ** (9 ** 9) }}", 1, "within 1 s of the processor|more memory"),
    ],
)
def test_a_template_that_does_not_end_is_refused(monkeypatch, template, seconds, words):
    if seconds:
        monkeypatch.setattr(chat_template, "_PROCESSOR_S", seconds)
    with pytest.raises(TangoError, match=f"chat template .*({words})"):
        ChatTemplate(f"{template}<video>", "<video>")


@pytest.mark.parametrize("tokenizer", ['{"model": 1}', "", EMPTY])
def test_a_bad_tokenizer_is_refused(tokenizer):
    with pytest.raises(TangoError, match=r"tokenizer\.json"):
        Prompt(tokenizer, LLAVA_HF, "<video>")


def with_placeholder(path, **properties):
    """The tokenizer with other properties of <video>."""
    data = json.loads(path.read_text())
    for token in data["added_tokens"]:
        token.update(properties if token["content"] == "<video>" else {})
    return json.dumps(data)


@pytest.mark.parametrize("side", ["lstrip", "rstrip"])
def test_a_placeholder_that_takes_the_spaces_beside_it_is_refused(path, side):
    with pytest.raises(TangoError, match="<video> takes the spaces beside it"):
        Prompt(with_placeholder(path, **{side: True}), LLAVA_HF, "<video>")


def test_the_dropout_of_training_changes_no_prompt(path, prompt, placeholder):
    data = json.loads(path.read_text())
    data["model"]["dropout"] = 0.9
    random = Prompt(json.dumps(data), TEMPLATES[placeholder], placeholder)
    for ours, expected in zip(random.encode(QUESTIONS[0]), prompt.encode(QUESTIONS[0]), strict=True):
        np.testing.assert_array_equal(ours, expected)


def test_special_tokens_are_left_out_of_text(path, prompt):
    ids = untruncated(path).encode("<|im_start|>The door<|im_end|>", add_special_tokens=False).ids
    assert prompt.decode(np.array(ids)) == "The door"
    assert "".join(prompt.stream(ids)) == "The door"


@pytest.mark.parametrize("text", [*QUESTIONS, "👩‍👩‍👧 naïve e\u0301 ½", "\ufffd kept \ufffd", "", " "])
def test_streaming_gives_whole_characters_that_add_up(path, prompt, text):
    ids = untruncated(path).encode(text, add_special_tokens=False).ids
    pieces = list(prompt.stream(iter(ids)))
    assert "".join(pieces) == prompt.decode(ids)
    assert len(ids) <= len(pieces) <= len(ids) + 1
    if "\ufffd" not in text:
        assert not any("\ufffd" in piece for piece in pieces)


def test_any_bytes_add_up_to_what_decoding_all_gives(path, prompt):
    vocabulary = Tokenizer.from_file(str(path)).get_vocab_size()
    rng = np.random.default_rng(0)
    for length in (1, 2, 5, 40):
        for _ in range(50):
            ids = rng.integers(0, vocabulary, length).tolist()
            assert "".join(prompt.stream(ids)) == prompt.decode(ids)


def test_an_incomplete_character_waits_and_shows_at_the_end(path, prompt):
    tokens = untruncated(path)
    letter = tokens.token_to_id("a")
    first = tokens.token_to_id("Ã")  # the byte-level alphabet's name of 0xC3, the first byte of é
    assert list(prompt.stream([letter, first])) == ["a", "", "\ufffd"]
    # With another letter after it the byte cannot become a character any more.
    assert list(prompt.stream(iter([first, letter, letter]))) == ["", "\ufffda", "a"]
