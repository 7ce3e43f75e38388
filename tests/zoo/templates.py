"""Chat templates, each in its real family's manner: its order, its whitespace, its oddities."""

from __future__ import annotations

_PARTS = (
    "{% for part in message['content'] %}{% if part['type'] == 'image' %}IMAGE"
    "{% elif part['type'] == 'video' %}VIDEO"
    "{% elif part['type'] == 'text' %}{{ part['text'] }}{% endif %}{% endfor %}"
)


def _string_or_parts(text: str, parts: str) -> str:
    return f"{{% if message['content'] is string %}}{text}{{% else %}}{parts}{{% endif %}}"


def _parts(image: str, video: str) -> str:
    return _PARTS.replace("IMAGE", image).replace("VIDEO", video)


def chatml(
    image: str | None = None, system: bool = False, bos: str = "", video: str = ""
) -> str:
    """ChatML; without `image`, string content only: a list is an error, as in Qwen2's own."""
    content = "{{ '' + message['content'] }}"
    if image is not None:
        content = _string_or_parts("{{ message['content'] }}", _parts(image, video))
    default = (
        "{% if loop.first and message['role'] != 'system' %}"
        "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n{% endif %}"
    )
    return (
        bos + "{% for message in messages %}" + (default if system else "") + "<|im_start|>"
        "{{ message['role'] + '\n' }}" + content + "{{ '<|im_end|>\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
    )


def thinking(
    image: str | None = None, open_thought: bool = False, video: str = ""
) -> str:
    """Qwen3's ChatML: the last answer has its thought in front, an empty one where there is none;
    thoughts of earlier answers are taken out.

    `open_thought`: as Qwen3.5, which begins to think unless it is told not to.
    """
    content = "{{ '' + content }}"
    if image is not None:
        parts = _parts(image, video).replace("message['content']", "content")
        content = "{% if content is string %}{{ content }}{% else %}" + parts + "{% endif %}"
    unless = "{% else %}{{ '<think>\n' }}" if open_thought else ""
    return (
        "{% macro text(content) %}" + content + "{% endmacro %}{% set last = namespace(user=-1) %}"
        "{% for message in messages %}{% if message['role'] == 'user' %}"
        "{% set last.user = loop.index0 %}{% endif %}{% endfor %}"
        "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' }}"
        "{% set content = text(message['content']) %}{% if message['role'] == 'assistant' %}"
        "{% set thought = '' %}{% if '</think>' in content %}"
        r"{% set thought = content.split('</think>')[0].split('<think>')[-1].strip('\n') %}"
        r"{% set content = content.split('</think>')[-1].lstrip('\n') %}{% endif %}"
        "{% if loop.index0 > last.user %}"
        "{{ '<think>\n' + thought + '\n</think>\n\n' }}{% endif %}{% endif %}"
        "{{ content + '<|im_end|>\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}"
        "{% if enable_thinking is defined and enable_thinking is false %}"
        "{{ '<think>\n\n</think>\n\n' }}" + unless + "{% endif %}{% endif %}"
    )


def llava_qwen(after_role: str = "", system: str = "", video: str = "") -> str:
    """Images first, then the texts, each after a newline; with {% generation %}.

    `after_role`: LLaVA-OneVision prints a space behind every role but in the generation prompt.
    """
    text = (
        "{% for part in message['content'] | selectattr('type', 'equalto', 'text') %}"
        "{{ '\n' + part['text'] }}{% endfor %}"
    )
    return (
        system + "{% for message in messages %}{{ '<|im_start|>' + message['role'] }}" + after_role
        + "{% if message['content'] is string %}{{ '\n' + message['content'] }}{% else %}"
        "{% for part in message['content'] | selectattr('type', 'equalto', 'image') %}"
        "{{ '<image>' }}{% endfor %}"
        "{% for part in message['content'] | selectattr('type', 'equalto', 'video') %}"
        + video + "{% endfor %}"
        "{% if message['role'] == 'assistant' %}{% generation %}" + text + "{% endgeneration %}"
        "{% else %}" + text + "{% endif %}{% endif %}{{ '<|im_end|>' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
    )


def idefics(bos: str) -> str:
    """`User: ...<end_of_utterance>`. As upstream, string content renders as nothing, silently."""
    return (
        bos + "{% for message in messages %}{{ message['role'] | capitalize }}"
        "{% if message['content'][0]['type'] == 'image' %}{{ ':' }}{% else %}{{ ': ' }}{% endif %}"
        + _parts("<image>", "")
        + "{{ '<end_of_utterance>\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ 'Assistant:' }}{% endif %}"
    )


def gemma(
    image: str | None = None, turn: tuple[str, str] = ("<start_of_turn>", "<end_of_turn>"),
    opening: str = "", video: str = "",
) -> str:
    """Gemma trims every text, calls the assistant `model` and insists on alternating turns.

    `opening`: what follows the generation prompt alone; Gemma 4 has an empty thought there.
    """
    content = "{{ message['content'] | trim }}"
    if image is not None:
        parts = _parts(image, video).replace("part['text']", "part['text'] | trim")
        content = _string_or_parts(content, parts)
    return (
        "{{ bos_token }}{% for message in messages %}"
        "{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}"
        "{{ raise_exception('Conversation roles must alternate user/assistant/...') }}{% endif %}"
        "{{ '" + turn[0] + "' + message['role'].replace('assistant', 'model') + '\n' }}"
        + content
        + "{{ '" + turn[1] + "\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '" + turn[0] + "model\n" + opening + "' }}{% endif %}"
    )


def llama3(image: str | None = None) -> str:
    """Llama 3's headers; with `image`, the images of a message first and then its texts."""
    content = "{{ message['content'] | trim }}"
    if image is not None:
        parts = (
            "{% for part in message['content'] | selectattr('type', 'equalto', 'image') %}"
            + image + "{% endfor %}"
            "{% for part in message['content'] | selectattr('type', 'equalto', 'text') %}"
            "{{ part['text'] }}{% endfor %}"
        )
        content = _string_or_parts(content, parts)
    header = "<|start_header_id|>{}<|end_header_id|>\n\n"
    return (
        "{% for message in messages %}{% if loop.first %}{{ bos_token }}{% endif %}"
        "{{ '" + header.format("' + message['role'] + '") + "' }}" + content + "{{ '<|eot_id|>' }}"
        "{% endfor %}{% if add_generation_prompt %}"
        "{{ '" + header.format("assistant") + "' }}{% endif %}"
    )


def mistral(image: str | None = None) -> str:
    """`[INST]question[/INST]answer</s>`; the text models (no `image`) put a space before both."""
    space, content = " ", "{{ message['content'] | trim }}"
    if image is not None:
        space = ""
        content = _string_or_parts(content, _parts(image, ""))
    return (
        "{{ bos_token }}{% for message in messages %}{% if message['role'] == 'user' %}"
        "{{ '[INST]" + space + "' }}" + content + "{{ '[/INST]' }}"
        "{% elif message['role'] == 'assistant' %}{{ '" + space + "' }}" + content
        + "{{ eos_token }}{% else %}{{ '[SYSTEM_PROMPT]' }}" + content
        + "{{ '[/SYSTEM_PROMPT]' }}{% endif %}{% endfor %}"
    )


PHI3 = (
    "{% for message in messages %}"
    "{{ '<|' + message['role'] + '|>\n' + message['content'] + '<|end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% else %}{{ eos_token }}{% endif %}"
)
