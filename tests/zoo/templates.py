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


def hermes(thoughts: bool = True, image: str = "", video: str = "") -> str:
    """ChatML with tools as Qwen has them: schemas in the system turn, calls in <tool_call>, results
    as the user's. With `thoughts` as Qwen3: those after the last question are printed, an empty one
    before a last answer without, and those of earlier answers are taken out. With `image` also in
    typed parts."""
    typed = _parts(image, video).replace("message['content']", "content") if image else ""
    thought = (
        "{% set thought = '' %}{% if message.reasoning_content is string %}"
        "{% set thought = message.reasoning_content %}{% elif '</think>' in content %}"
        r"{% set thought = content.split('</think>')[0].rstrip('\n').split('<think>')[-1] %}"
        r"{% set thought = thought.lstrip('\n') %}"
        r"{% set content = content.split('</think>')[-1].lstrip('\n') %}{% endif %}"
        "{% if loop.index0 > last.user and (loop.last or thought) %}"
        r"{{ '<think>\n' + thought.strip('\n') + '\n</think>\n\n' + content.lstrip('\n') }}"
        "{% else %}{{ content }}{% endif %}"
    )
    return (
        "{% macro text(content) %}{% if content is string %}{{ content }}{% else %}" + typed
        + "{% endif %}{% endmacro %}"
        "{% if tools %}{{ '<|im_start|>system\n' }}{% if messages[0].role == 'system' %}"
        "{{ text(messages[0].content) + '\n\n' }}{% endif %}{{ '# Tools\n<tools>' }}"
        "{% for tool in tools %}{{ '\n' + tool | tojson }}{% endfor %}"
        "{{ '\n</tools><|im_end|>\n' }}"
        "{% elif messages[0].role == 'system' %}"
        "{{ '<|im_start|>system\n' + text(messages[0].content) + '<|im_end|>\n' }}{% endif %}"
        "{% set last = namespace(user=-1) %}{% for message in messages %}"
        "{% if message.role == 'user' %}{% set last.user = loop.index0 %}{% endif %}{% endfor %}"
        "{% for message in messages %}"
        "{% set content = text(message.content) %}"
        "{% if message.role == 'user' or (message.role == 'system' and not loop.first) %}"
        "{{ '<|im_start|>' + message.role + '\n' + content + '<|im_end|>\n' }}"
        "{% elif message.role == 'assistant' %}{{ '<|im_start|>assistant\n' }}"
        + (thought if thoughts else "{{ content }}") +
        "{% for call in message.tool_calls or [] %}{% if content or not loop.first %}{{ '\n' }}"
        "{% endif %}{% if call.function %}{% set call = call.function %}{% endif %}"
        """{{ '<tool_call>\n{"name": "' + call.name + '", "arguments": ' }}"""
        "{{ call.arguments if call.arguments is string else call.arguments | tojson }}"
        "{{ '}\n</tool_call>' }}{% endfor %}{{ '<|im_end|>\n' }}"
        "{% elif message.role == 'tool' %}"
        "{% if loop.previtem.role != 'tool' %}{{ '<|im_start|>user' }}{% endif %}"
        "{{ '\n<tool_response>\n' + content + '\n</tool_response>' }}"
        "{% if loop.last or loop.nextitem.role != 'tool' %}{{ '<|im_end|>\n' }}{% endif %}"
        "{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}" + (
            "{% if enable_thinking is defined and enable_thinking is false %}"
            "{{ '<think>\n\n</think>\n\n' }}{% endif %}" if thoughts else "") + "{% endif %}"
    )


def llama31(ends: str = "<|eot_id|>") -> str:
    """Llama 3.1's headers with tools: schemas before the first question, one call per turn under
    `parameters`, results as JSON of the role ipython, a date that can be given.

    `ends`: what a turn with a call ends with.
    """
    header = "<|start_header_id|>{}<|end_header_id|>\n\n"
    return (
        "{{ bos_token }}{% if date_string is not defined %}{% set date_string = '26 Jul 2024' %}"
        "{% endif %}{% if messages[0].role == 'system' %}{% set system = messages[0].content %}"
        "{% set messages = messages[1:] %}{% else %}{% set system = '' %}{% endif %}"
        "{{ '" + header.format("system") + "Today Date: ' + date_string + '\n\n' + system }}"
        "{{ '<|eot_id|>' }}{% for message in messages %}"
        "{% if message.role == 'assistant' and message.tool_calls %}"
        "{% if message.tool_calls | length != 1 %}"
        "{{ raise_exception('This model only supports single tool-calls at once!') }}{% endif %}"
        "{% set call = message.tool_calls[0].function %}"
        "{{ '" + header.format("assistant") + """{"name": "' + call.name + '", "parameters": ' }}"""
        "{{ call.arguments | tojson + '}" + ends + "' }}"
        "{% elif message.role == 'tool' %}{{ '" + header.format("ipython") + "' }}"
        "{{ message.content | tojson + '<|eot_id|>' }}"
        "{% else %}{{ '" + header.format("' + message.role + '") + "' }}"
        "{% if tools and loop.first %}{% for tool in tools %}{{ tool | tojson + '\n\n' }}"
        "{% endfor %}{% endif %}{{ message.content | trim + '<|eot_id|>' }}{% endif %}"
        "{% endfor %}{% if add_generation_prompt %}"
        "{{ '" + header.format("assistant") + "' }}{% endif %}"
    )


def mistral_tools() -> str:
    """Mistral's turns, which must alternate but for calls and their results."""
    return (
        "{{ bos_token }}{% set turn = namespace(index=0) %}{% for message in messages %}"
        "{% if message.role in ('user', 'assistant') and not message.tool_calls %}"
        "{% if (message.role == 'user') != (turn.index % 2 == 0) %}"
        "{{ raise_exception('roles must alternate user/assistant') }}{% endif %}"
        "{% set turn.index = turn.index + 1 %}{% endif %}{% endfor %}"
        "{% for message in messages %}{% if message.role == 'user' %}"
        "{% if loop.first and tools %}{{ '[AVAILABLE_TOOLS]' + tools | tojson }}"
        "{{ '[/AVAILABLE_TOOLS]' }}{% endif %}{{ '[INST]' + message.content + '[/INST]' }}"
        "{% elif message.role == 'tool' %}"
        "{{ '[TOOL_RESULTS]' + message.content + '[/TOOL_RESULTS]' }}"
        "{% elif message.tool_calls %}{{ '[TOOL_CALLS][' }}{% for call in message.tool_calls %}"
        "{{ call.function | tojson }}{% endfor %}{{ ']' + eos_token }}"
        "{% else %}{{ message.content + eos_token }}{% endif %}{% endfor %}"
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

# OLMo 2: roles in plain characters; only the assistant's turns are closed.
OLMO = (
    "{{ bos_token }}{% for message in messages %}{{ '<|' + message['role'] + '|>\n' }}"
    "{{ message['content'] }}"
    "{% if message['role'] == 'assistant' %}{{ eos_token }}{% endif %}"
    "{% if not loop.last %}{{ '\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '\n<|assistant|>\n' }}{% endif %}"
)

GRANITE = (
    "{% for message in messages %}"
    "{{ '<|start_of_role|>' + message['role'] + '<|end_of_role|>' + message['content'] }}"
    "{{ '<|end_of_text|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start_of_role|>assistant<|end_of_role|>' }}{% endif %}"
)

# GLM-4: what closes a turn is the next one's role, or the end of all.
GLM4 = (
    "[gMASK]<sop>{% for message in messages %}"
    "{{ '<|' + message['role'] + '|>\n' + message['content'] }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}"
)

# gpt-oss: every answer names its channel, which the generation prompt leaves to the model; the
# last one ends with <|return|>, all others with <|end|>.
HARMONY = (
    "{% for message in messages %}{{ '<|start|>' + message['role'] }}"
    "{% if message['role'] == 'assistant' %}{{ '<|channel|>final' }}{% endif %}"
    "{{ '<|message|>' + message['content'] }}"
    "{% if loop.last and message['role'] == 'assistant' and not add_generation_prompt %}"
    "{{ '<|return|>' }}{% else %}{{ '<|end|>' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start|>assistant' }}{% endif %}"
)

DEEPSEEK = (
    "{{ bos_token }}{% for message in messages %}"
    "{% if message['role'] == 'user' %}{{ '<｜User｜>' + message['content'] }}"
    "{% elif message['role'] == 'assistant' %}"
    "{{ '<｜Assistant｜>' + message['content'] + eos_token }}"
    "{% else %}{{ message['content'] }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<｜Assistant｜>' }}{% endif %}"
)
