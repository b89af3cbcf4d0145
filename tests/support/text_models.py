"""Text models of every kind, tiny and random, in folders like those of published weights."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

transformers = pytest.importorskip("transformers")
tokenizers = pytest.importorskip("tokenizers")

CAPTIONS = ["a red kangaroo moves left over a beach", "a violin", ""]
WORDS = sorted({word for caption in CAPTIONS for word in caption.split()})
SMALL = {"vocab_size": 300, "hidden_size": 16, "num_hidden_layers": 3, "num_attention_heads": 2}
T5 = {"vocab_size": 300, "d_model": 16, "d_kv": 8, "d_ff": 32, "num_layers": 3, "num_heads": 2}
LLM = {**SMALL, "intermediate_size": 32, "num_key_value_heads": 1, "max_position_embeddings": 64}
CLIP = {**SMALL, "intermediate_size": 32, "max_position_embeddings": 32, "projection_dim": 12}


def bert() -> Any:
    return transformers.BertModel(transformers.BertConfig(**SMALL, intermediate_size=32))


def masked_bert() -> Any:
    return transformers.BertForMaskedLM(transformers.BertConfig(**SMALL, intermediate_size=32))


def t5() -> Any:
    return transformers.T5EncoderModel(transformers.T5Config(**T5))


def whole_t5() -> Any:
    return transformers.T5ForConditionalGeneration(transformers.T5Config(**T5))


def umt5() -> Any:
    return transformers.UMT5EncoderModel(transformers.UMT5Config(**T5))


def clip() -> Any:
    config = transformers.CLIPTextConfig(**CLIP, bos_token_id=2, eos_token_id=3)
    return transformers.CLIPTextModel(config)


def projected_clip() -> Any:
    config = transformers.CLIPTextConfig(**CLIP, bos_token_id=2, eos_token_id=3)
    return transformers.CLIPTextModelWithProjection(config)


def llama() -> Any:
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**LLM))


def qwen() -> Any:
    return transformers.Qwen2ForCausalLM(transformers.Qwen2Config(**LLM))


# What surrounds a caption, as each family's own tokenizer does it.
MODELS: dict[str, tuple[Callable[[], Any], str]] = {
    "bert": (bert, "<bos> $A <eos>"),
    "masked_bert": (masked_bert, "<bos> $A <eos>"),
    "t5": (t5, "$A <eos>"),
    "whole_t5": (whole_t5, "$A <eos>"),
    "umt5": (umt5, "$A <eos>"),
    "clip": (clip, "<bos> $A <eos>"),
    "projected_clip": (projected_clip, "<bos> $A <eos>"),
    "llama": (llama, "<bos> $A"),
    "qwen": (qwen, "$A"),
}


def save_byte_tokenizer(folder: Path) -> None:
    """As Qwen's: bytes and merges, nothing around a caption."""
    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {letter: index for index, letter in enumerate(alphabet)}
    tokenizer = transformers.Qwen2Tokenizer(vocab=vocabulary, merges=[])
    tokenizer.save_pretrained(folder)


def expected_ids(kind: str, caption: str) -> list[int]:
    if kind == "qwen":
        alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
        return [alphabet.index("Ġ" if letter == " " else letter) for letter in caption]
    template = MODELS[kind][1]
    words = [4 + WORDS.index(word) for word in caption.split()]
    return [2] * ("<bos>" in template) + words + [3] * ("<eos>" in template)


def save_tokenizer(folder: Path, template: str) -> None:
    special = {"<pad>": 0, "<unk>": 1, "<bos>": 2, "<eos>": 3}
    vocabulary = {**special, **{word: 4 + index for index, word in enumerate(WORDS)}}
    core = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="<unk>"))
    core.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    core.post_processor = tokenizers.processors.TemplateProcessing(
        single=template, special_tokens=[(name, special[name]) for name in ("<bos>", "<eos>")]
    )
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=core, unk_token="<unk>", bos_token="<bos>", eos_token="<eos>"
    ).save_pretrained(folder)


def save_model(kind: str, folder: Path) -> None:
    """Weights, config and tokenizer of a kind of model, the same bits each time."""
    build, template = MODELS[kind]
    with torch.random.fork_rng():
        torch.manual_seed(0)
        build().eval().save_pretrained(folder)
    if kind == "qwen":
        save_byte_tokenizer(folder)
    else:
        save_tokenizer(folder, template)
