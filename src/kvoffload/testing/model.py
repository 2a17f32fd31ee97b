"""Tiny Llama models with random weights, made on the spot: nothing is downloaded, and every run makes the same bytes.

The weights are drawn wide (``initializer_range`` 0.08), so that what a model says depends strongly on every KV block: a wrong block
changes the tokens, which is what the tests need of it. The words it says mean nothing.
"""

from __future__ import annotations

import json
import math
import os
import shutil
import tempfile
from dataclasses import asdict, dataclass
from itertools import islice, product
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from kvoffload.errors import MisuseError

if TYPE_CHECKING:
    from collections.abc import Iterator

    import torch

_FORMAT = 2
"""Goes into the directory's name: raise it when what `make_model` writes changes."""

PAD, UNK, BOS, EOS = 0, 1, 2, 3
_SPECIAL = ("<pad>", "<unk>", "<s>", "</s>")
_WORDS = (  # noqa: SIM905 - a list of this many literals is no clearer
    "the of and to in a is that for it was on are as with they be at one have this from by had not but what all were when "
    "we there can an your which their said if do will each about how up out them then she many some so these would other "
    "into has more her two like him see time could no make than first been its who now people my made over did down only "
    "way find use may water long little very after words called just where most know get through back much before also "
    "around another came come work three word must because does part even place well such here take why things help put "
    "years different away again off went old number great tell men say small every found still between "
).split()
_CHAT_TEMPLATE = "{% for message in messages %}{{ message['role'] }} : {{ message['content'] }} {% endfor %}assistant :"


@dataclass(frozen=True, slots=True)
class ModelShape:
    """What a tiny model is made of; a different shape or seed is a different directory and a different cache namespace."""

    name: str
    hidden_size: int
    layers: int
    heads: int
    kv_heads: int
    intermediate_size: int
    vocab_size: int = 2048
    max_positions: int = 8192
    initializer_range: float = 0.08
    dtype: Literal["bfloat16", "float32"] = "bfloat16"
    seed: int = 20

    @property
    def kv_bytes_per_token(self) -> int:
        """Bytes of K and V of one token, over all layers."""
        return self.layers * 2 * self.kv_heads * (self.hidden_size // self.heads) * (4 if self.dtype == "float32" else 2)


TINY = ModelShape("tiny", hidden_size=128, layers=3, heads=4, kv_heads=2, intermediate_size=256)
"""For most tests: starts in seconds, 768 bytes of KV per token."""
R8 = ModelShape("r8", hidden_size=512, layers=8, heads=8, kv_heads=4, intermediate_size=1024)
"""The model of the notes: 8 KiB of KV per token."""
BENCH = ModelShape("bench", hidden_size=256, layers=4, heads=4, kv_heads=4, intermediate_size=1024, dtype="float32")
"""For figures: 8 KiB of KV per token, and a prefill of 3,000 to 4,000 tokens costs about a second of one older server core.

In float32, as bfloat16 is emulated on CPUs without AMX or AVX512-BF16, and its speed there says nothing.
"""
SHAPES = {shape.name: shape for shape in (TINY, R8, BENCH)}


def make_model(directory: str | os.PathLike[str], shape: ModelShape = TINY) -> Path:
    """Write ``shape`` under ``directory`` unless it is there already; returns the model's own directory.

    It holds config.json, model.safetensors, tokenizer.json and tokenizer_config.json. Several processes may ask at once.
    """
    _check(shape)
    root = Path(directory)
    digest = json.dumps(asdict(shape), sort_keys=True)
    target = root / f"{shape.name}-{_FORMAT}-{_fnv(digest):016x}"
    if target.is_dir():
        return target
    root.mkdir(parents=True, exist_ok=True)
    # Written beside and renamed, so that nobody ever sees half a model.
    scratch = Path(tempfile.mkdtemp(dir=root, prefix=".making-"))
    try:
        _write_config(scratch, shape)
        _write_weights(scratch, shape)
        _write_tokenizer(scratch, shape)
        try:
            scratch.rename(target)
        except OSError:  # somebody else was faster; what they made is the same
            if not target.is_dir():
                raise
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    return target


def _check(shape: ModelShape) -> None:
    if shape.hidden_size % shape.heads or shape.heads % shape.kv_heads:
        raise MisuseError(f"model {shape.name!r}: hidden_size must divide by heads, and heads by kv_heads")
    if shape.vocab_size < len(_SPECIAL) + len(_WORDS):
        raise MisuseError(f"model {shape.name!r}: vocab_size must be at least {len(_SPECIAL) + len(_WORDS)}")


def _fnv(text: str) -> int:
    """64-bit FNV-1a: a short name for a directory, not an identity."""
    value = 0xCBF29CE484222325
    for byte in text.encode():
        value = (value ^ byte) * 0x100000001B3 % 2**64
    return value


def _write_config(directory: Path, shape: ModelShape) -> None:
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": shape.hidden_size,
        "num_hidden_layers": shape.layers,
        "num_attention_heads": shape.heads,
        "num_key_value_heads": shape.kv_heads,
        "head_dim": shape.hidden_size // shape.heads,
        "intermediate_size": shape.intermediate_size,
        "vocab_size": shape.vocab_size,
        "max_position_embeddings": shape.max_positions,
        "initializer_range": shape.initializer_range,
        "hidden_act": "silu",
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "attention_bias": False,
        "mlp_bias": False,
        "tie_word_embeddings": False,
        "pad_token_id": PAD,
        "bos_token_id": BOS,
        "eos_token_id": EOS,
        "torch_dtype": shape.dtype,
    }
    (directory / "config.json").write_text(json.dumps(config, indent=2))


def _write_weights(directory: Path, shape: ModelShape) -> None:
    import torch
    from safetensors.torch import save_file

    dtype: torch.dtype = getattr(torch, shape.dtype)
    generator = torch.Generator().manual_seed(shape.seed)

    def drawn(*size: int) -> torch.Tensor:
        return torch.empty(size, dtype=torch.float32).normal_(0.0, shape.initializer_range, generator=generator).to(dtype)

    head = shape.hidden_size // shape.heads
    tensors = {"model.embed_tokens.weight": drawn(shape.vocab_size, shape.hidden_size)}
    for index in range(shape.layers):
        layer = f"model.layers.{index}."
        tensors[layer + "self_attn.q_proj.weight"] = drawn(shape.hidden_size, shape.hidden_size)
        tensors[layer + "self_attn.k_proj.weight"] = drawn(shape.kv_heads * head, shape.hidden_size)
        tensors[layer + "self_attn.v_proj.weight"] = drawn(shape.kv_heads * head, shape.hidden_size)
        tensors[layer + "self_attn.o_proj.weight"] = drawn(shape.hidden_size, shape.hidden_size)
        tensors[layer + "mlp.gate_proj.weight"] = drawn(shape.intermediate_size, shape.hidden_size)
        tensors[layer + "mlp.up_proj.weight"] = drawn(shape.intermediate_size, shape.hidden_size)
        tensors[layer + "mlp.down_proj.weight"] = drawn(shape.hidden_size, shape.intermediate_size)
        for norm in ("input_layernorm", "post_attention_layernorm"):
            tensors[layer + norm + ".weight"] = torch.ones(shape.hidden_size, dtype=dtype)
    tensors["model.norm.weight"] = torch.ones(shape.hidden_size, dtype=dtype)
    tensors["lm_head.weight"] = drawn(shape.vocab_size, shape.hidden_size)
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})


def vocabulary(size: int) -> list[str]:
    """The words of a tokenizer of ``size`` tokens, by token id: special ones, common English ones, then invented ones."""
    return [*_SPECIAL, *islice(_words(), size - len(_SPECIAL))]


def _words() -> Iterator[str]:
    seen = set(_WORDS)
    yield from _WORDS
    syllables = ["".join(pair) for pair in product("bdfgklmnprstvz", "aeiou")]
    for count in range(2, 2 + math.ceil(math.log(2**20, len(syllables)))):
        for parts in product(syllables, repeat=count):
            word = "".join(parts)
            if word not in seen:
                yield word


def _write_tokenizer(directory: Path, shape: ModelShape) -> None:
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import WhitespaceSplit

    words = {word: index for index, word in enumerate(vocabulary(shape.vocab_size))}
    # One word is one token, so that a reader can count a prompt's tokens; there is nothing to train.
    tokenizer: Any = Tokenizer(WordLevel(words, unk_token=_SPECIAL[UNK]))
    tokenizer.pre_tokenizer = WhitespaceSplit()
    tokenizer.add_special_tokens(list(_SPECIAL))
    tokenizer.save(str(directory / "tokenizer.json"))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": shape.max_positions,
        "pad_token": _SPECIAL[PAD],
        "unk_token": _SPECIAL[UNK],
        "bos_token": _SPECIAL[BOS],
        "eos_token": _SPECIAL[EOS],
        "clean_up_tokenization_spaces": False,
        "chat_template": _CHAT_TEMPLATE,
    }
    (directory / "tokenizer_config.json").write_text(json.dumps(settings, indent=2))
