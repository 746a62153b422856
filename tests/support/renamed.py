"""Tiny models in the layouts of checkpoints that need code of their own, and what that code computes of them.

The arithmetic is the published one in plain torch, under the published names; see the sources of each in
`moemerge.families.dense.renamed.tables`. Nothing here uses transformers or moemerge.
"""

import json
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch.nn.functional import silu

from tests.support.models import SIZES, tokenizer

Tensors = dict[str, torch.Tensor]
Config = dict[str, Any]
Split = Callable[[Tensors, torch.Tensor, Config], tuple[torch.Tensor, torch.Tensor, torch.Tensor]]
"""A function from a layer's tensors and its normed states to queries, keys and values (sequence, position, head, d)."""
Ffn = Callable[[Tensors, torch.Tensor], torch.Tensor]
Shape = tuple[int, ...]


def rotated(states: torch.Tensor, theta: float, longrope: tuple[torch.Tensor, float]) -> torch.Tensor:
    """Rotate the halves of each head (sequence, position, head, d)."""
    width = states.shape[-1]
    angles = torch.arange(states.shape[1])[:, None] / longrope[0] / theta ** (torch.arange(0, width, 2) / width)
    angles = torch.cat((angles, angles), -1)[:, None]
    low, high = states.chunk(2, -1)
    return (states * angles.cos() + torch.cat((-high, low), -1) * angles.sin()) * longrope[1]


@dataclass(frozen=True)
class Release:
    """A released layout: its config, the shapes of its tensors, and what its code does with them."""

    config: Config
    layer_shapes: dict[str, Shape]
    split: Split
    ffn: Ffn
    layers: str = "model.layers.{}."
    norms: tuple[str, str] = ("input_layernorm.weight", "post_attention_layernorm.weight")
    out: str = "self_attn.o_proj"
    outside: tuple[str, str, str] = ("model.embed_tokens.weight", "model.norm.weight", "lm_head.weight")
    eps: str = "rms_norm_eps"
    count: str = "num_hidden_layers"
    theta: Callable[[Config, int], float] = lambda config, _length: float(config["rope_theta"])
    further: dict[str, Shape] = field(default_factory=dict)
    unit_head: bool = False
    rotate: Callable[[torch.Tensor, float, tuple[torch.Tensor, float]], torch.Tensor] = rotated
    scales: tuple[float, float, float] = (1.0, 1.0, 1.0)
    """Factors on embeddings, and on what attention and FFN add; the divisor of what enters the head."""
    longrope: Callable[[Config], tuple[torch.Tensor, float]] = lambda _config: (torch.ones(()), 1.0)
    """Divisors of the frequencies, and the factor on what is rotated."""

    @property
    def shapes(self) -> dict[str, Shape]:
        """Shapes of all tensors by name."""
        embeddings, norm, head = self.outside
        width = (self.config["vocab_size"], self.config["hidden_size"])
        found: dict[str, Shape] = {embeddings: width, norm: width[1:], **self.further}
        if not self.config.get("tie_word_embeddings"):
            found[head] = width
        for layer in range(self.config[self.count]):
            found |= {self.layers.format(layer) + name: shape for name, shape in self.layer_shapes.items()}
        return found


def linear(tensors: Tensors, module: str, states: torch.Tensor) -> torch.Tensor:
    """A linear layer, with its bias if it has one."""
    product = states @ tensors[f"{module}.weight"].T
    return product + tensors[f"{module}.bias"] if f"{module}.bias" in tensors else product


def in_heads(states: torch.Tensor, heads: int) -> torch.Tensor:
    """Divide the last axis into heads (sequence, position, head, d)."""
    return states.reshape(*states.shape[:-1], heads, -1)


def normed(states: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """RMSNorm."""
    return weight * states * torch.rsqrt(states.pow(2).mean(-1, keepdim=True) + eps)


def half_rotated_in_pairs(states: torch.Tensor, theta: float, _longrope: tuple[torch.Tensor, float]) -> torch.Tensor:
    """Rotate pairs of neighbours in the first half of each head (sequence, position, head, d)."""
    turning, rest = states.chunk(2, -1)
    width = turning.shape[-1]
    angles = (torch.arange(states.shape[1])[:, None] / theta ** (torch.arange(0, width, 2) / width))[:, None]
    real, imaginary = turning[..., ::2], turning[..., 1::2]
    turned = (real * angles.cos() - imaginary * angles.sin(), imaginary * angles.cos() + real * angles.sin())
    return torch.cat((torch.stack(turned, -1).flatten(-2), rest), -1)


def attended(queries: torch.Tensor, keys: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    """Causal attention in which each key head serves as many query heads as it has."""
    repeats = queries.shape[2] // keys.shape[2]
    queries, keys, values = (
        states.repeat_interleave(repeat, 2).transpose(1, 2)
        for states, repeat in ((queries, 1), (keys, repeats), (values, repeats))
    )
    scores = queries @ keys.mT / queries.shape[-1] ** 0.5
    length = scores.shape[-1]
    scores = scores.masked_fill(torch.ones(length, length).triu(1).bool(), -torch.inf)
    found: torch.Tensor = (scores.softmax(-1) @ values).transpose(1, 2).flatten(2)
    return found


@torch.no_grad()
def logits_of(
    release: Release,
    tensors: Tensors,
    ids: torch.Tensor,
    ffn: Callable[[int, torch.Tensor], torch.Tensor] | None = None,
) -> torch.Tensor:
    """(sequence, position, vocab) logits as the released code computes them, with other FFNs by layer if given."""
    config = release.config
    embeddings, norm, head = release.outside
    embedded, depth, divisor = release.scales
    states, eps = tensors[embeddings][ids] * embedded, config[release.eps]
    rope = release.theta(config, ids.shape[1]), release.longrope(config)
    for layer in range(config[release.count]):
        own = layer_of(release, tensors, layer)
        queries, keys, values = release.split(own, normed(states, own[release.norms[0]], eps), config)
        heads = attended(release.rotate(queries, *rope), release.rotate(keys, *rope), values)
        states = states + linear(own, release.out, heads) * depth
        entering = normed(states, own[release.norms[1]], eps)
        states = states + (release.ffn(own, entering) if ffn is None else ffn(layer, entering)) * depth
    weights = tensors[embeddings if config.get("tie_word_embeddings") else head]
    weights = torch.nn.functional.normalize(weights) if release.unit_head else weights
    return normed(states, tensors[norm], eps) / divisor @ weights.T


def layer_of(release: Release, tensors: Tensors, layer: int) -> Tensors:
    """A layer's tensors by their names in it."""
    prefix = release.layers.format(layer)
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}


def make_release(folder: Path, release: Release, seed: int = 0) -> Path:
    """Save a random model in a released layout, in two shards, with a tokenizer."""
    folder.mkdir(parents=True)
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for name, shape in release.shapes.items():
        noise = 0.2 * torch.randn(shape, generator=generator)
        tensors[name] = 1 + noise if len(shape) == 1 and name.endswith("weight") else noise
    names = list(tensors)
    shards = {"model-00001-of-00002.safetensors": names[::2], "model-00002-of-00002.safetensors": names[1::2]}
    for shard, own in shards.items():
        save_file({name: tensors[name] for name in own}, folder / shard, {"format": "pt"})
    weight_map = {name: shard for shard, own in shards.items() for name in own}
    index = {"metadata": {"total_size": 4 * sum(map(torch.numel, tensors.values()))}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    (folder / "config.json").write_text(json.dumps(release.config))
    tokenizer().save_pretrained(folder)
    return folder


def read_release(folder: Path) -> Tensors:
    """All tensors of a released model."""
    return {name: tensor for path in folder.glob("*.safetensors") for name, tensor in load_file(path).items()}


# ---- the layouts

HIDDEN, WIDTH, HEADS, KEYS, D = 32, 48, 4, 2, 8
Q, KV = HEADS * D, KEYS * D
_COMMON: Config = {**{key: SIZES[key] for key in SIZES if key != "tie_word_embeddings"}, "rms_norm_eps": 1e-5}
_NORMS: dict[str, Shape] = {"input_layernorm.weight": (HIDDEN,), "post_attention_layernorm.weight": (HIDDEN,)}
_MLP: dict[str, Shape] = {
    "mlp.gate_proj.weight": (WIDTH, HIDDEN), "mlp.up_proj.weight": (WIDTH, HIDDEN),
    "mlp.down_proj.weight": (HIDDEN, WIDTH),
}  # fmt: skip


def _projected(names: str) -> Split:
    """Three projections, called by a pattern."""

    def split(own: Tensors, states: torch.Tensor, config: Config) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        del config
        query, key, value = (linear(own, names.format(one), states).reshape(*states.shape[:-1], -1, D) for one in "qkv")
        return query, key, value

    return split


def _gated(gate: str, up: str, down: str) -> Ffn:
    """`down(silu(gate(x)) * up(x))`."""
    return lambda own, states: linear(own, down, silu(linear(own, gate, states)) * linear(own, up, states))


def _by_group(own: Tensors, states: torch.Tensor, config: Config) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    heads, keys = config["num_attention_heads"], config["num_key_value_heads"]
    fused = in_heads(linear(own, "attention.wqkv", states), keys)
    fused = fused.reshape(*fused.shape[:-1], heads // keys + 2, -1)
    return fused[..., :-2, :].flatten(2, 3), fused[..., -2, :], fused[..., -1, :]


def _in_thirds(module: str) -> Split:
    """One projection to queries, keys and values, of equally many heads."""

    def split(own: Tensors, states: torch.Tensor, config: Config) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        query, key, value = linear(own, module, states).chunk(3, -1)
        heads = config["num_attention_heads"]
        return in_heads(query, heads), in_heads(key, heads), in_heads(value, heads)

    return split


def _one_after_another(
    own: Tensors, states: torch.Tensor, config: Config
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    heads, groups, width = (config[key] for key in ("num_attention_heads", "multi_query_group_num", "kv_channels"))
    fused = linear(own, "self_attention.query_key_value", states)
    query, rest = fused[..., : heads * width], fused[..., heads * width :]
    key, value = rest.chunk(2, -1)
    return in_heads(query, heads), in_heads(key, groups), in_heads(value, groups)


def _first_half_gates(own: Tensors, states: torch.Tensor) -> torch.Tensor:
    gate, up = linear(own, "mlp.dense_h_to_4h", states).chunk(2, -1)
    return linear(own, "mlp.dense_4h_to_h", silu(gate) * up)


def _ntk(config: Config, length: int) -> float:
    """The base of dynamic NTK, from a text's length on that is beyond `max_position_embeddings`."""
    factor, most = config["rope_scaling"]["factor"], config["max_position_embeddings"]
    scale = max(1.0, factor * length / most - (factor - 1))
    return float(config["rope_theta"] * scale ** (D / (D - 2)))


def _qkv(pattern: str, *, bias: bool = False, out: bool = False) -> dict[str, Shape]:
    rows = {"q": Q, "k": KV, "v": KV}
    found: dict[str, Shape] = {f"{pattern.format(one)}.weight": (rows[one], HIDDEN) for one in rows}
    found |= {f"{pattern.format(one)}.bias": (rows[one],) for one in rows if bias}
    return found | ({"self_attn.o_proj.bias": (HIDDEN,)} if out else {})


def _longrope(config: Config) -> tuple[torch.Tensor, float]:
    """MiniCPM's: long factors wherever the context is longer than the original one."""
    rope, context = config["rope_scaling"], config["max_position_embeddings"]
    original = rope["original_max_position_embeddings"]
    factors = torch.tensor(rope["long_factor" if context > original else "short_factor"])
    return factors, math.sqrt(1 + math.log(context / original) / math.log(original))


_LLAMA_OUT: dict[str, Shape] = {"self_attn.o_proj.weight": (HIDDEN, Q)}
_LLAMA_FFN = _gated("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")
_ATTN = "self_attn.{}_proj"

_MINICPM: Config = {"scale_emb": 12, "scale_depth": 1.4, "dim_model_base": 8, "hidden_act": "silu"}
_MINICPM_SCALES = (12.0, 1.4 / math.sqrt(3), HIDDEN / 8)
_MINICPM_ROPE: Config = {
    "rope_type": "longrope",
    "short_factor": [1.0, 1.1, 1.2, 1.3],
    "long_factor": [2.0, 3.0, 4.0, 5.0],
    "original_max_position_embeddings": 64,
}
RELEASES: dict[str, Release] = {
    "internlm": Release(
        {key: value for key, value in _COMMON.items() if key != "num_key_value_heads"}
        | {"model_type": "internlm", "bias": True, "rope_theta": None, "rotary": {"base": 500.0, "type": "dynamic"}},
        {
            **_NORMS, **_MLP, **_LLAMA_OUT, "self_attn.o_proj.bias": (HIDDEN,),
            **{f"self_attn.{one}_proj.{leaf}": shape for one in "qkv" for leaf, shape in {"weight": (Q, HIDDEN), "bias": (Q,)}.items()},
        },
        _projected(_ATTN),
        _LLAMA_FFN,
        theta=lambda config, _length: float(config["rotary"]["base"]),
    ),
    "internlm2": Release(
        _COMMON
        | {
            "model_type": "internlm2", "bias": False, "rope_theta": 5000.0, "max_position_embeddings": 16,
            "rope_scaling": {"type": "dynamic", "factor": 2.0}, "tie_word_embeddings": False,
            "attn_implementation": "eager", "auto_map": {"AutoConfig": "configuration_internlm2.InternLM2Config"},
        },
        {
            "attention.wqkv.weight": (Q + 2 * KV, HIDDEN), "attention.wo.weight": (HIDDEN, Q),
            "feed_forward.w1.weight": (WIDTH, HIDDEN), "feed_forward.w3.weight": (WIDTH, HIDDEN),
            "feed_forward.w2.weight": (HIDDEN, WIDTH), "attention_norm.weight": (HIDDEN,),
            "ffn_norm.weight": (HIDDEN,),
        },
        _by_group,
        _gated("feed_forward.w1", "feed_forward.w3", "feed_forward.w2"),
        norms=("attention_norm.weight", "ffn_norm.weight"),
        out="attention.wo",
        outside=("model.tok_embeddings.weight", "model.norm.weight", "output.weight"),
        theta=_ntk,
    ),
    "exaone": Release(
        {key: value for key, value in _COMMON.items() if key not in {"num_hidden_layers", "rms_norm_eps"}}
        | {
            "model_type": "exaone", "num_layers": 3, "layer_norm_epsilon": 1e-5, "activation_function": "silu",
            "head_dim": D, "rope_theta": 5000.0, "tie_word_embeddings": True, "embed_dropout": 0.0,
        },
        {
            **_qkv("attn.attention.{}_proj"), "attn.attention.out_proj.weight": (HIDDEN, Q),
            "mlp.c_fc_0.weight": (WIDTH, HIDDEN), "mlp.c_fc_1.weight": (WIDTH, HIDDEN),
            "mlp.c_proj.weight": (HIDDEN, WIDTH), "ln_1.weight": (HIDDEN,), "ln_2.weight": (HIDDEN,),
        },
        _projected("attn.attention.{}_proj"),
        _gated("mlp.c_fc_0", "mlp.c_fc_1", "mlp.c_proj"),
        layers="transformer.h.{}.",
        norms=("ln_1.weight", "ln_2.weight"),
        out="attn.attention.out_proj",
        outside=("transformer.wte.weight", "transformer.ln_f.weight", "lm_head.weight"),
        eps="layer_norm_epsilon",
        count="num_layers",
    ),
    "Yi": Release(
        _COMMON | {"model_type": "Yi", "rope_theta": 5000.0, "tie_word_embeddings": False},
        {"ln1.weight": (HIDDEN,), "ln2.weight": (HIDDEN,), **_MLP, **_qkv(_ATTN), **_LLAMA_OUT},
        _projected(_ATTN),
        _LLAMA_FFN,
        norms=("ln1.weight", "ln2.weight"),
    ),
    "mimo": Release(
        _COMMON
        | {
            "model_type": "mimo", "rope_theta": 640000, "attention_bias": True, "head_dim": D, "use_mrope": False,
            "num_nextn_predict_layers": 1, "use_sliding_window": False, "tie_word_embeddings": False,
        },
        {**_NORMS, **_MLP, **_qkv(_ATTN, bias=True), **_LLAMA_OUT},
        _projected(_ATTN),
        _LLAMA_FFN,
        further={"model.mtp_layers.0.input_proj.weight": (HIDDEN, 2 * HIDDEN), "model.mtp_layers.0.mlp.gate_proj.weight": (WIDTH, HIDDEN)},
    ),
    "PanguEmbedded": Release(
        _COMMON | {"model_type": "PanguEmbedded", "rope_theta": 5000.0, "bias": True, "tie_word_embeddings": False},
        {**_NORMS, **_MLP, **_qkv(_ATTN, bias=True, out=True), **_LLAMA_OUT},
        _projected(_ATTN),
        _LLAMA_FFN,
    ),
    "minicpm": Release(
        _COMMON | {"model_type": "minicpm", **_MINICPM, "rope_theta": 5000.0, "tie_word_embeddings": False},
        {**_NORMS, **_MLP, **_qkv(_ATTN), **_LLAMA_OUT},
        _projected(_ATTN),
        _LLAMA_FFN,
        scales=_MINICPM_SCALES,
    ),
    **{
        f"minicpm, {told}": Release(
            _COMMON | {"model_type": "minicpm", **_MINICPM, "max_position_embeddings": context, "rope_theta": 5000.0, "tie_word_embeddings": True, "rope_scaling": _MINICPM_ROPE},
            {**_NORMS, **_MLP, **_qkv(_ATTN), **_LLAMA_OUT},
            _projected(_ATTN),
            _LLAMA_FFN,
            scales=_MINICPM_SCALES,
            longrope=_longrope,
        )
        for told, context in (("tied, longrope", 64), ("tied, longer longrope", 128))
    },
    "baichuan": Release(
        {key: value for key, value in _COMMON.items() if key != "num_key_value_heads"} | {"model_type": "baichuan"},
        {**_NORMS, **_MLP, "self_attn.W_pack.weight": (3 * Q, HIDDEN), **_LLAMA_OUT},
        _in_thirds("self_attn.W_pack"),
        _LLAMA_FFN,
        theta=lambda _config, _length: 10000.0,
    ),
    "baichuan 2": Release(
        {key: value for key, value in _COMMON.items() if key != "num_key_value_heads"}
        | {"model_type": "baichuan", "z_loss_weight": 0, "model_max_length": 128},
        {**_NORMS, **_MLP, "self_attn.W_pack.weight": (3 * Q, HIDDEN), **_LLAMA_OUT},
        _in_thirds("self_attn.W_pack"),
        _LLAMA_FFN,
        theta=lambda _config, _length: 10000.0,
        unit_head=True,
    ),
    "qwen": Release(
        {
            "model_type": "qwen", "vocab_size": _COMMON["vocab_size"], "hidden_size": HIDDEN, "num_hidden_layers": 3,
            "num_attention_heads": HEADS, "intermediate_size": 2 * WIDTH, "kv_channels": D, "rotary_emb_base": 5000.0,
            "rotary_pct": 1.0, "layer_norm_epsilon": 1e-5, "seq_length": 64, "max_position_embeddings": 256,
            "no_bias": True, "use_dynamic_ntk": True, "use_logn_attn": True, "tie_word_embeddings": False,
            "tokenizer_class": "QWenTokenizer", "use_flash_attn": "auto", "bf16": False, "fp16": False, "fp32": False,
        },
        {
            "attn.c_attn.weight": (3 * Q, HIDDEN), "attn.c_attn.bias": (3 * Q,), "attn.c_proj.weight": (HIDDEN, Q),
            "mlp.w1.weight": (WIDTH, HIDDEN), "mlp.w2.weight": (WIDTH, HIDDEN), "mlp.c_proj.weight": (HIDDEN, WIDTH),
            "ln_1.weight": (HIDDEN,), "ln_2.weight": (HIDDEN,),
        },
        _in_thirds("attn.c_attn"),
        _gated("mlp.w2", "mlp.w1", "mlp.c_proj"),
        layers="transformer.h.{}.",
        norms=("ln_1.weight", "ln_2.weight"),
        out="attn.c_proj",
        outside=("transformer.wte.weight", "transformer.ln_f.weight", "lm_head.weight"),
        eps="layer_norm_epsilon",
        theta=lambda config, _length: float(config["rotary_emb_base"]),
    ),
    "chatglm": Release(
        {
            "model_type": "chatglm", "add_bias_linear": False, "add_qkv_bias": True, "ffn_hidden_size": WIDTH,
            "apply_query_key_layer_scaling": True, "apply_residual_connection_post_layernorm": False,
            "attention_dropout": 0.0, "attention_softmax_in_fp32": True, "bias_dropout_fusion": True,
            "fp32_residual_connection": False, "hidden_dropout": 0.0, "hidden_size": HIDDEN, "kv_channels": D,
            "layernorm_epsilon": 1e-5, "multi_query_attention": True, "multi_query_group_num": KEYS,
            "num_attention_heads": HEADS, "num_layers": 3, "original_rope": True, "padded_vocab_size": SIZES["vocab_size"],
            "post_layer_norm": True, "rmsnorm": True, "rope_ratio": 0.5, "seq_length": 128, "tie_word_embeddings": False,
            "use_cache": True, "vocab_size": SIZES["vocab_size"], "eos_token_id": [2, 3, 4], "pad_token_id": 0,
        },
        {
            **_NORMS, "self_attention.query_key_value.weight": (Q + 2 * KV, HIDDEN),
            "self_attention.query_key_value.bias": (Q + 2 * KV,), "self_attention.dense.weight": (HIDDEN, Q),
            "mlp.dense_h_to_4h.weight": (2 * WIDTH, HIDDEN), "mlp.dense_4h_to_h.weight": (HIDDEN, WIDTH),
        },
        _one_after_another,
        _first_half_gates,
        layers="transformer.encoder.layers.{}.",
        out="self_attention.dense",
        outside=(
            "transformer.embedding.word_embeddings.weight", "transformer.encoder.final_layernorm.weight",
            "transformer.output_layer.weight",
        ),
        eps="layernorm_epsilon",
        count="num_layers",
        theta=lambda config, _length: 10000.0 * config["rope_ratio"],
        further={"transformer.rotary_pos_emb.inv_freq": (D // 4,)},
        rotate=half_rotated_in_pairs,
    ),
}  # fmt: skip
