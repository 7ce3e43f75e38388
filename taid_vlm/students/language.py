"""The language model of a composed student: can it be carried, and room for the image token."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoTokenizer,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from taid_vlm.adapters import TOKENIZER_PROBES, check_reloaded
from taid_vlm.config.model import ModelSpec
from taid_vlm.errors import TaidError
from taid_vlm.models.head import logit_settings
from taid_vlm.models.loading import guarded, load_config, load_model, load_processor, sees_images

ROLE = "language_model"
MULTIPLE = 64  # rows of the embedding


@dataclass(frozen=True)
class Language:
    """A causal language model that was found and can be carried; no weights yet.

    original: its tokenizer as it is; tokenizer: the same with the placeholders.
    tokens: content type -> placeholder token.
    rows: embedding rows before and after.
    tied: whether embedding and head share their weights, before and after.
    """

    name: str
    config: PretrainedConfig
    dtype: torch.dtype
    original: PreTrainedTokenizerBase
    tokenizer: PreTrainedTokenizerBase
    tokens: Mapping[str, str]
    rows: tuple[int, int]
    tied: tuple[bool, bool]

    def token_id(self, kind: str) -> int:
        return int(self.tokenizer.convert_tokens_to_ids(self.tokens[kind]))


def find_language(name: str, dtype: str, kinds: tuple[str, ...]) -> Language:
    """A language model's config and tokenizer, and whether an image-text model can carry it.

    Args:
        dtype: "auto" for the checkpoint's own.
        kinds: content types that need a placeholder token.

    Raises:
        TaidError: nothing there, not a plain causal language model, or one whose logits are not
            its head's product with the last hidden states.
    """
    spec = ModelSpec(model_name_or_path=name)
    config = load_config(spec, ROLE)
    if sees_images(config):
        raise TaidError(f"{ROLE} = '{name}' ({config.model_type}) sees images already; choose a "
                        "language model for text.")
    tied = _check_carried(name, config)
    original = load_processor(spec, ROLE)
    tokenizer, tokens = _with_placeholders(name, original, kinds)
    before = int(config.vocab_size)
    after = -(-max(before, len(tokenizer)) // MULTIPLE) * MULTIPLE
    stored = getattr(config, "dtype", None) or torch.float32
    return Language(name, config, stored if dtype == "auto" else getattr(torch, dtype), original,
                    tokenizer, tokens, (before, after), tied)


def _check_carried(name: str, config: PretrainedConfig) -> tuple[bool, bool]:
    """Whether logits are head(backbone(embeddings)) and nothing more, as LLaVA computes them.

    Returns:
        Whether the head is tied to the embedding, and whether it can stay so: LLaVA ties to
        `embed_tokens` and to nothing else.
    """
    scales, softcaps = logit_settings(config)
    for key, value in (scales | softcaps).items():
        raise TaidError(
            f"{ROLE} = '{name}' ({config.model_type}) changes its logits after the head ({key} = "
            f"{value}); LLaVA, PerceptionLM and FastVLM do not, so they would change what it says.",
            mend="Choose a language model without.")
    with torch.device("meta"):
        model = guarded(ROLE, name, AutoModelForCausalLM.from_config, config)
        backbone = guarded(ROLE, name, AutoModel.from_config, config)
    reason = _misfit(model, backbone)
    if reason:
        raise TaidError(f"{ROLE} = '{name}' ({config.model_type}) cannot be carried: {reason}. "
                        "Choose a language model whose head is one matrix over its last hidden "
                        "states.")
    tied = model.get_output_embeddings().weight is model.get_input_embeddings().weight
    return tied, tied and hasattr(backbone, "embed_tokens")


def _misfit(model: PreTrainedModel, backbone: nn.Module) -> str | None:
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    if type(model.base_model) is not type(backbone):
        return f"AutoModel makes a {type(backbone).__name__} of its config"
    if not isinstance(head, nn.Linear) or head.bias is not None:
        return "its head has a bias or is no matrix"
    width = model.config.hidden_size
    if embedding.weight.shape[1] != width or head.in_features != width:
        return "its embedding is not as wide as its hidden states"
    owned = {id(p) for module in (model.base_model, head) for p in module.parameters()}
    extra = [key for key, p in model.named_parameters() if id(p) not in owned]
    return f"it has more than a backbone and a head ({extra[0]})" if extra else None


def _with_placeholders(
    name: str, original: PreTrainedTokenizerBase, kinds: tuple[str, ...]
) -> tuple[PreTrainedTokenizerBase, dict[str, str]]:
    """The tokenizer again, with a token for each content type; one it has already is used.

    Raises:
        TaidError: the tokenizer's other ids are not what they were.
    """
    tokens = {kind: getattr(original, f"{kind}_token", None) or f"<{kind}>" for kind in kinds}
    named = {f"{kind}_token": token for kind, token in tokens.items()}
    tokenizer = guarded(ROLE, name, AutoTokenizer.from_pretrained, name, **named)
    check_tokenizer(original, tokenizer, tokens, f"{ROLE} = '{name}': adding {tokens['image']}")
    return tokenizer, tokens


def check_tokenizer(
    original: PreTrainedTokenizerBase, tokenizer: PreTrainedTokenizerBase,
    tokens: Mapping[str, str], subject: str,
) -> None:
    """The same vocabulary, special tokens and splitting; placeholders are one new token each.

    Raises:
        TaidError: anything differs.
    """
    check_reloaded(original, tokenizer, subject, "Save the tokenizer with the class that its own "
                   "tokenizer.json was made for, and compose again.", tokens.values())
    for token in tokens.values():
        if tokenizer(f"a{token}b", add_special_tokens=False)["input_ids"].count(
                tokenizer.convert_tokens_to_ids(token)) != 1:
            raise TaidError(f"{subject} does not keep {token} as one token.")


# ----- weights ------------------------------------------------------------------------------


def load_language(language: Language) -> tuple[PreTrainedModel, Tensor]:
    """The language model with its new rows, and its logits on the probe, as wide as they are now.

    Raises:
        TaidError: what is not there; or old logits that changed by more than the rounding that
            another width of the same matrix product brings.
    """
    spec = ModelSpec(model_name_or_path=language.name)
    model = load_model(spec.model_copy(update={"dtype": str(language.dtype)[6:]}), ROLE).eval()
    before = probe_logits(model, language)
    _widen(model, language)
    after = probe_logits(model, language)
    error = (after[..., : language.rows[0]] - before).abs().max()
    if not error <= 32 * torch.finfo(language.dtype).eps * before.abs().max():
        raise TaidError(f"{ROLE} = '{language.name}': new rows of the embedding change the old "
                        f"logits by {float(error):.1e}.")
    return model, after


@torch.no_grad()
def probe_logits(model: nn.Module, language: Language) -> Tensor:
    """[1, T, rows]: logits of a text of at most 64 tokens."""
    ids = language.original("\n".join(TOKENIZER_PROBES), return_tensors="pt")["input_ids"][:, :64]
    return model(input_ids=ids, use_cache=False).logits


@torch.no_grad()
def _widen(model: PreTrainedModel, language: Language) -> None:
    """New rows at the mean of the rows that tokens use, in embedding and head; ties as asked.

    A placeholder's input row is never read (image features stand in its place).
    """
    (before, after), used = language.rows, min(len(language.original), language.rows[0])
    if after != before:
        model.resize_token_embeddings(after, mean_resizing=False)
        both = (model.get_input_embeddings(), model.get_output_embeddings())
        for weight in {id(module.weight): module.weight for module in both}.values():
            weight[before:] = weight[:used].float().mean(0)
    if language.tied == (True, False):
        head = model.get_output_embeddings()
        head.weight = nn.Parameter(head.weight.clone())
