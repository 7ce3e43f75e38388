"""The chat template of a composed model: its language model's own, with images put in."""

from __future__ import annotations

from collections.abc import Mapping

from transformers import PreTrainedTokenizerBase

from taid_vlm.errors import TaidError

# Typed parts become the plain strings that a language model's template expects; strings pass as
# they are. The newline that ends the block is the one that jinja's trim_blocks takes away, so the
# language model's template starts at the start of a line, as it did in its own file.
_FLATTEN = """\
{%- set flat = namespace(messages=[], text='') -%}
{%- for message in messages -%}
{%- if message['content'] is not defined or message['content'] is none
       or message['content'] is string -%}
{%- set flat.messages = flat.messages + [message] -%}
{%- else -%}
{%- set flat.text = '' -%}
{%- for part in message['content'] -%}
{%- if part['type'] == 'text' -%}{%- set flat.text = flat.text + part['text'] -%}
PLACES
{%- else -%}{{- raise_exception('This model cannot read content of type ' + part['type']) -}}
{%- endif -%}
{%- endfor -%}
{%- set flat.messages = flat.messages + [dict(message, content=flat.text)] -%}
{%- endif -%}
{%- endfor -%}
{%- set messages = flat.messages %}
"""

_SIMPLE = """\
BOS{%- for message in messages -%}
{{- message['role'] | capitalize + ':\\n' + message['content'] -}}
{%- if message['role'] == 'assistant' -%}{{- eos_token -}}{%- endif -%}
{{- '\\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- 'Assistant:\\n' -}}{%- endif -%}
"""


def wrap(template: str | Mapping[str, str], tokens: Mapping[str, str]) -> str | dict[str, str]:
    """A text model's chat template as one that takes typed parts.

    Args:
        template: the language model's template, or several by name.
        tokens: content type ("image", "video") -> its placeholder. A newline follows each.

    Returns:
        A template that renders conversations of texts exactly as before, whether their content
        comes as strings or as parts.
    """
    if not isinstance(template, str):
        return {name: _wrapped(one, tokens) for name, one in template.items()}
    return _wrapped(template, tokens)


def _wrapped(template: str, tokens: Mapping[str, str]) -> str:
    places = "\n".join(
        f"{{%- elif part['type'] == '{kind}' -%}}"
        f"{{%- set flat.text = flat.text + '{token}\\n' -%}}"
        for kind, token in tokens.items()
    )
    return _FLATTEN.replace("PLACES", places) + template


def simple_template(tokenizer: PreTrainedTokenizerBase) -> str:
    """For language models without a template: 'User:', the text, 'Assistant:', the answer and EOS.

    Every label and every text stands on lines of its own, so no token straddles a label and an
    answer. A BOS is written where the tokenizer itself would put one.

    Raises:
        TaidError: the tokenizer has no EOS, so that an answer could not end.
    """
    if tokenizer.eos_token is None:
        raise TaidError("language_model: its tokenizer has neither a chat template nor an EOS "
                        "token, so answers could not end; give a chat template.")
    ids = tokenizer("a")["input_ids"]
    adds_bos = tokenizer.bos_token_id is not None and ids[0] == tokenizer.bos_token_id
    return _SIMPLE.replace("BOS", "{{- bos_token -}}" if adds_bos else "", 1)
