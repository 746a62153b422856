"""Tiny multimodal models of every class whose text model is read, with the names and files of released ones."""

from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoConfig

from tests.support.families import DENSE, GEMMA4, GEMMA4_E
from tests.support.models import SIZES, VOCAB, edit_json, tokenizer

IMAGES_HAVE_TYPES = not transformers.__version__.startswith("4.")
"""Whether models are told which tokens stand for images; transformers 4 finds them by their ids."""
IMAGE = VOCAB - 1
"""The token that stands for a piece of an image."""
VISION: dict[str, Any] = {
    "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 28,
    "patch_size": 14,
}  # fmt: skip
QWEN_VISION = {
    "depth": 1, "hidden_size": 16, "intermediate_size": 24, "num_heads": 2, "patch_size": 4, "spatial_merge_size": 2,
    "temporal_patch_size": 2, "out_hidden_size": 32, "num_position_embeddings": 16,
}  # fmt: skip
_QWEN_TOKENS = {
    "image_token_id": IMAGE, "video_token_id": VOCAB - 2, "vision_start_token_id": VOCAB - 3, "vision_end_token_id": VOCAB - 4
}  # fmt: skip
# Positions on three axes, spelled as both versions of transformers read them.
_AXES = {
    "rope_theta": 5e6,
    "rope_scaling": {"rope_type": "default", "mrope_section": [4, 2, 2], "mrope_interleaved": True},
}
_SMALL_AXES = {
    "rope_theta": 1e6,
    "rope_scaling": {"rope_type": "default", "type": "default", "mrope_section": [2, 1, 1]},
}
_QWEN3_5 = DENSE["qwen3_5_text"][1] | {
    "rope_parameters": {
        "rope_type": "default", "rope_theta": 5e6, "mrope_section": [1, 1, 0], "mrope_interleaved": True,
        "partial_rotary_factor": 0.25,
    }
}  # fmt: skip
_LLAVA = {
    "vision_config": {"model_type": "clip_vision_model", "projection_dim": 16, **VISION},
    "image_token_index": IMAGE,
}
_SIGLIP = {"vision_config": {"model_type": "siglip_vision_model", **VISION}}

# The class's type, the text model's, and what both say.
KINDS: dict[str, tuple[str, str, dict[str, Any], dict[str, Any]]] = {
    "qwen3_5": ("qwen3_5", "qwen3_5_text", _QWEN3_5, {"vision_config": {**QWEN_VISION, "deepstack_visual_indexes": []}, **_QWEN_TOKENS}),
    "gemma4": (
        "gemma4", "gemma4_text", GEMMA4 | {"use_bidirectional_attention": "vision"},
        {
            "vision_config": {"model_type": "gemma4_vision", **VISION, "head_dim": 8, "num_key_value_heads": 2, "position_embedding_size": 64, "pooling_kernel_size": 2, "patch_size": 4},
            "audio_config": None, "image_token_id": IMAGE, "vocab_size": VOCAB,
        },
    ),
    "gemma4, as E2B": (
        "gemma4", "gemma4_text", GEMMA4_E | {"num_hidden_layers": 4, "layer_types": ["sliding_attention", "full_attention"] * 2, "num_kv_shared_layers": 2, "use_double_wide_mlp": True},
        {
            "vision_config": {"model_type": "gemma4_vision", **VISION, "head_dim": 8, "num_key_value_heads": 2, "position_embedding_size": 64, "pooling_kernel_size": 2, "patch_size": 4},
            "audio_config": {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "output_proj_dims": 16, "subsampling_conv_channels": [128, 4]},
            "image_token_id": IMAGE,
        },
    ),
    "gemma4_unified": (
        "gemma4_unified", "gemma4_unified_text", {key: value for key, value in GEMMA4.items() if "per_layer" not in key and key != "enable_moe_block"},
        {"vision_config": {"patch_size": 4, "pooling_kernel_size": 2, "mm_embed_dim": 32, "mm_posemb_size": 16, "output_proj_dims": 32}, "audio_config": None, "image_token_id": IMAGE},
    ),
    "mistral3": (
        "mistral3", "mistral", {"sliding_window": None, "head_dim": 12},
        {"vision_config": {"model_type": "pixtral", **VISION, "head_dim": 8}, "image_token_index": IMAGE},
    ),
    "mistral3, ministral3": (
        "mistral3", "ministral3", DENSE["ministral3"][1],
        {"vision_config": {"model_type": "pixtral", **VISION, "head_dim": 8}, "image_token_index": IMAGE},
    ),
    "qwen3_vl": (
        "qwen3_vl", "qwen3_vl_text", {"head_dim": 16, **_AXES},
        {"vision_config": {**QWEN_VISION, "deepstack_visual_indexes": [0]}, **_QWEN_TOKENS},
    ),
    "qwen2_5_vl": (
        "qwen2_5_vl", "qwen2_5_vl_text", _SMALL_AXES,
        {"vision_config": {**QWEN_VISION, "fullatt_block_indexes": [0], "window_size": 16}, **_QWEN_TOKENS},
    ),
    "qwen2_vl": (
        "qwen2_vl", "qwen2_vl_text", _SMALL_AXES,
        {"vision_config": {"depth": 1, "embed_dim": 16, "hidden_size": 32, "num_heads": 2, "patch_size": 4}, **_QWEN_TOKENS},
    ),
    "llava": ("llava", "llama", {}, _LLAVA),
    "llava, qwen2": ("llava", "qwen2", {}, _LLAVA),
    "llava, qwen3": ("llava", "qwen3", {"head_dim": 16}, _LLAVA),
    "llava, ministral3": ("llava", "ministral3", DENSE["ministral3"][1], _LLAVA),
    "llava_next, mistral": ("llava_next", "mistral", {"sliding_window": None}, _LLAVA),
    "llava_onevision": ("llava_onevision", "qwen2", {}, _SIGLIP),
    "internvl": ("internvl", "qwen2", {}, {"vision_config": {"model_type": "internvl_vision", **VISION, "image_size": [28, 28], "patch_size": [14, 14]}}),
    "internvl, qwen3": ("internvl", "qwen3", {"head_dim": 16}, {"vision_config": {"model_type": "internvl_vision", **VISION, "image_size": [28, 28], "patch_size": [14, 14]}}),
    "lfm2_vl": ("lfm2_vl", "lfm2", DENSE["lfm2"][1], {"vision_config": {"model_type": "siglip2_vision_model", **VISION, "num_patches": 16}}),
    "idefics3": ("idefics3", "llama", {}, {"vision_config": VISION, "image_token_id": IMAGE}),
    "smolvlm": ("smolvlm", "llama", {}, {"vision_config": VISION, "image_token_id": IMAGE}),
    "voxtral": (
        "voxtral", "llama", {},
        {"audio_config": {"hidden_size": 16, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}, "audio_token_id": IMAGE},
    ),
}  # fmt: skip


def multimodal_config(kind: str, *, tied: bool = False, **sizes: Any) -> dict[str, Any]:
    """What the `config.json` of a kind says: the tokens of images are the last ones, whatever the vocabulary's size."""
    model_type, text_type, text, outer = KINDS[kind]
    text = {**SIZES, **text, "model_type": text_type, "tie_word_embeddings": tied, **sizes}
    config = {"model_type": model_type, "text_config": text, "tie_word_embeddings": tied, **outer}
    for key in config:
        if key.endswith(("_token_id", "_token_index", "vocab_size")):
            config[key] += text["vocab_size"] - VOCAB
    if "out_hidden_size" in config.get("vision_config", {}):
        config["vision_config"] = {**config["vision_config"], "out_hidden_size": text["hidden_size"]}
    return config


def make_multimodal(
    folder: Path, kind: str, seed: int = 0, *, tied: bool = False, shard_bytes: int = 10**9, **sizes: Any
) -> Path:
    """Save a random multimodal model with its tokenizer; transformers gives its tensors the names of released ones."""
    config = AutoConfig.for_model(**multimodal_config(kind, tied=tied, **sizes))
    model_type = config.model_type
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = class_of(model_type)(config)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.copy_(1 + 0.2 * noise if "norm" in name else noise * (0.5 if "embed" in name else 0.2))
        for buffer in model.buffers():
            buffer.clamp_(-50, 50)  # bounds of Gemma 4's audio tower, infinite before its training
    model.save_pretrained(folder, max_shard_size=shard_bytes)
    tokenizer().save_pretrained(folder)
    name = "Qwen3_5Tokenizer" if model_type == "qwen3_5" else "PreTrainedTokenizerFast"
    edit_json(folder / "tokenizer_config.json", tokenizer_class=name)
    return folder


def class_of(model_type: str) -> Any:
    """The multimodal class of a model type."""
    if model_type == "voxtral":
        return transformers.VoxtralForConditionalGeneration
    config = transformers.CONFIG_MAPPING[model_type]
    return transformers.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING[config]


def load_multimodal(folder: Path) -> Any:
    """Load a multimodal checkpoint in float32; every tensor has to find its place."""
    config = AutoConfig.from_pretrained(folder)
    model, info = class_of(config.model_type).from_pretrained(
        folder, dtype=torch.float32, output_loading_info=True, attn_implementation="eager"
    )
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    return model.eval()


@torch.no_grad()
def image_logits(model: Any, seed: int = 5) -> torch.Tensor:
    """(1, 14, vocab) logits of a text with an image of 4 x 4 patches in it, which take the places of 4 tokens."""
    numbers = torch.Generator().manual_seed(seed)
    is_image = torch.tensor([[0] * 5 + [1] * 4 + [0] * 5])
    ids = torch.randint(3, VOCAB - 4, (1, 14), generator=numbers).masked_fill(is_image.bool(), IMAGE)
    if model.config.model_type.startswith("gemma4"):
        places = torch.cartesian_prod(torch.arange(4), torch.arange(4)).flip(-1).unsqueeze(0)
        image = {"pixel_values": torch.rand(1, 16, 48, generator=numbers), "image_position_ids": places}
    else:
        grid = torch.tensor([[1, 4, 4]])
        image = {"pixel_values": torch.rand(16, 96, generator=numbers), "image_grid_thw": grid}
    known = {"mm_token_type_ids": is_image} if IMAGES_HAVE_TYPES else {}
    found: torch.Tensor = model(input_ids=ids, use_cache=False, **image, **known).logits.float()
    return found
