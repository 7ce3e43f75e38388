"""The chat template of composed students: texts as in the language model, images put in."""

from __future__ import annotations

from pathlib import Path

import pytest
from students.composing import Parts, loaded
from zoo import build

from taid_vlm.adapters.template import content_form
from taid_vlm.errors import TaidError
from taid_vlm.students.compose import compose
from taid_vlm.students.template import simple_template, wrap

LLAMA3_LIKE = (
    "{{- bos_token }}\n{%- if messages[0]['role'] == 'system' %}"
    "{%- set system = messages[0]['content'] %}{%- set messages = messages[1:] %}"
    "{%- else %}{%- set system = 'none' %}{%- endif %}\n[{{ system }}]\n"
    "{%- for message in messages %}\n<{{ message.role }}>{{ message['content'] | trim }}"
    "{%- if message.tool_calls is defined %}{{ message.tool_calls }}{% endif %}{% endfor %}\n"
)
AWKWARD = "\n  {% for m in messages %}\n    {% if m.content %}\n {{ m.content }} {% endif %}\n" \
    "{% endfor %}\n\n"


@pytest.mark.parametrize("template", [LLAMA3_LIKE, AWKWARD, "llama", "gemma2", "qwen3", "phi3"])
def test_wrapping_changes_no_conversation_of_texts(template: str) -> None:
    tokenizer = build("llama").tokenizer
    own = template if "{" in template else build(template).tokenizer.chat_template
    system = [] if template == "gemma2" else [{"role": "system", "content": " Be brief.\n"}]
    talk = [*system, {"role": "user", "content": " two  words "},
            {"role": "assistant", "content": "Yes.\n"}, {"role": "user", "content": "图片?"}]
    calls = [{"role": "user", "content": "x"}, {"role": "assistant", "content": "",
              "tool_calls": [{"name": "f"}]}]
    for messages in (talk, talk[: len(system) + 1], calls):
        for prompt in (False, True):
            wanted = tokenizer.apply_chat_template(
                messages, chat_template=own, tokenize=False, add_generation_prompt=prompt)
            split = [message | {"content": [{"type": "text", "text": piece}
                                            for piece in (message["content"][:3],
                                                          message["content"][3:])]}
                     for message in messages]
            for form in (messages, split):
                found = tokenizer.apply_chat_template(
                    form, chat_template=wrap(own, {"image": "<image>"}), tokenize=False,
                    add_generation_prompt=prompt)
                assert found == wanted


def test_images_stand_where_they_are_said_to(parts: Parts) -> None:
    _, processor = loaded(parts.composed("siglip", "llama"))
    assert content_form(processor, "parts", "student") == "parts"
    assert processor.tokenizer.chat_template == processor.chat_template
    content = [{"type": "text", "text": "compare "}, {"type": "image"},
               {"type": "text", "text": "with"}, {"type": "image"}]
    text = processor.apply_chat_template([{"role": "user", "content": content}])
    assert "compare <image>\nwith<image>" in text
    with pytest.raises(Exception, match="cannot read content of type video"):
        processor.apply_chat_template([{"role": "user", "content": [{"type": "video"}]}])


def test_several_templates_are_wrapped_by_name() -> None:
    made = wrap({"default": "A", "tool_use": "B"}, {"image": "<image>"})
    assert isinstance(made, dict) and made["default"].endswith("\nA")
    assert made["tool_use"].endswith("\nB")


def test_a_base_model_gets_a_simple_template(parts: Parts) -> None:
    _, processor = loaded(parts.composed("siglip", "gpt2"))
    content = [{"type": "image"}, {"type": "text", "text": "What?"}]
    talk = [{"role": "user", "content": content}, {"role": "assistant", "content": "A cat."}]
    assert processor.apply_chat_template(talk) == \
        "User:\n<image>\nWhat?\nAssistant:\nA cat.<|endoftext|>\n"
    assert processor.apply_chat_template(talk[:1], add_generation_prompt=True) == \
        "User:\n<image>\nWhat?\nAssistant:\n"
    adds_bos = build("llama").tokenizer
    assert adds_bos.apply_chat_template(
        [{"role": "user", "content": "Hi"}], chat_template=simple_template(adds_bos),
        tokenize=False, add_generation_prompt=True) == "<|begin_of_text|>User:\nHi\nAssistant:\n"
    adds_bos.eos_token = None
    with pytest.raises(TaidError, match="neither a chat template nor an EOS"):
        simple_template(adds_bos)


def test_a_template_file_takes_the_place(parts: Parts, tmp_path: Path) -> None:
    """One that places images is taken as it is, any other gets them like a language model's."""
    body = "{% for m in messages %}{{ m.role }}={{ m.content }};{% endfor %}"
    (tmp_path / "text.jinja").write_text(body)
    whole = wrap(body, {"image": "<image>"})
    (tmp_path / "whole.jinja").write_text(str(whole))
    for name in ("text", "whole"):
        compose(parts.tower("siglip"), parts.text("gpt2"), tmp_path / name,
                chat_template=str(tmp_path / f"{name}.jinja"))
        assert loaded(tmp_path / name)[1].chat_template == whole
