"""`config.json` as transformers would have it, made of a GGUF file's settings and tensors."""

from typing import Any, Final

import numpy as np

from moemerge.errors import CheckpointError, NoSuchModelError
from moemerge.sources.gguf.rope import rope_scaling_of
from moemerge.sources.gguf.stored_model import GgufModel

# Keys of the file, with their keys in config.json.
_SIZES: Final = {
    "block_count": "num_hidden_layers",
    "embedding_length": "hidden_size",
    "feed_forward_length": "intermediate_size",
    "attention.head_count": "num_attention_heads",
    "context_length": "max_position_embeddings",
}
_EPSILON: Final = "attention.layer_norm_rms_epsilon"
_KEY_HEADS: Final = "attention.head_count_kv"
_WIDTHS: Final = ("attention.key_length", "attention.value_length", "rope.dimension_count")
_TOKENS: Final = ("bos", "eos", "padding")
# They change nothing of what the model computes for text, or say again what is read elsewhere.
_SILENT: Final = frozenset({"vocab_size", "expert_count", "expert_used_count", "tensor_data_layout", "pooling_type"})
_ROPE: Final = "rope."
_DEFAULT_THETA: Final = 10000.0


def config_of(model: GgufModel) -> dict[str, Any]:
    """Make `config.json`.

    Raises:
        NoSuchModelError: the file says something that no config of its family can.
        CheckpointError: a setting is missing, or is no number.
    """
    settings = _Settings(model)
    family = model.architecture
    sizes = {own: settings.size(key) for key, own in _SIZES.items()}
    heads = sizes["num_attention_heads"]
    head = sizes["hidden_size"] // max(heads, 1)
    config: dict[str, Any] = {
        "architectures": [family.class_name],
        "model_type": family.model_type,
        **sizes,
        "num_key_value_heads": settings.size(_KEY_HEADS, heads),
        "vocab_size": settings.vocabulary(),
        "rms_norm_eps": settings.number(_EPSILON),
        "rope_theta": settings.number("rope.freq_base", _DEFAULT_THETA),
        "hidden_act": "silu",
        "tie_word_embeddings": "output.weight" not in model.stored,
        **settings.token_ids(),
        **{own: settings.number(key) for key, own in family.keys.items() if key in model.own_settings},
    }
    widths = {key: settings.size(key, head) for key in _WIDTHS if key in model.own_settings}
    if len(set(widths.values())) > 1:
        said = ", ".join(f"{key} {width}" for key, width in widths.items())
        raise NoSuchModelError(f"{model.reference}: its heads have several widths, which a config cannot say: {said}.")
    width = next(iter(widths.values()), head)
    if width != head or family.model_type == "qwen3":
        config["head_dim"] = width
    if family.bias:
        config[family.bias] = "blk.0.attn_q.bias" in model.stored
    if scaling := rope_scaling_of(model, config["rope_theta"], width):
        config["rope_scaling"] = scaling
    settings.check_read({*_SIZES, *_WIDTHS, *family.keys, _EPSILON, _KEY_HEADS})
    return config


class _Settings:
    """The settings of a model's GGUF file, each checked when it is read."""

    def __init__(self, model: GgufModel) -> None:
        self._model, self._found = model, model.own_settings

    def size(self, key: str, otherwise: int | None = None) -> int:
        """Read a positive whole number; of a list with one for each layer, all have to be equal."""
        value = self._found.get(key, otherwise)
        if isinstance(value, tuple) and len(set(value)) == 1:
            value = value[0]
        if type(value) is not int or value < 1:
            raise self._wrong(key, value, "a positive whole number")
        return value

    def number(self, key: str, otherwise: float | None = None) -> float:
        """Read a number."""
        value = self._found.get(key, otherwise)
        if type(value) not in {int, float} or not np.isfinite(value):
            raise self._wrong(key, value, "a number")
        return float(value)

    def vocabulary(self) -> int:
        """The number of tokens that have an embedding."""
        embeddings = self._model.stored.get("token_embd.weight")
        if embeddings is None:
            raise CheckpointError(f"{self._model.first.path}: has no tensor 'token_embd.weight', the embeddings.")
        return embeddings.shape[0]

    def token_ids(self) -> dict[str, int]:
        """The numbers of the tokens that begin, end and fill texts, as far as the file names them."""
        named = {f"{'pad' if name == 'padding' else name}_token_id": name for name in _TOKENS}
        found = self._model.first.settings
        ids = {own: found.get(f"tokenizer.ggml.{name}_token_id") for own, name in named.items()}
        return {own: number for own, number in ids.items() if type(number) is int}

    def check_read(self, read: set[str]) -> None:
        """Refuse settings that nothing reads, since they may change what the model computes."""
        unread = [key for key in self._found if key not in read | _SILENT and not key.startswith(_ROPE)]
        if unread:
            raise NoSuchModelError(
                f"{self._model.reference}: its settings {self._model.name}.{unread[0]}"
                f"{f' and {len(unread) - 1} more' if unread[1:] else ''} are not known of this architecture, so what "
                "they change would be lost. Name the model that it was written from."
            )

    def _wrong(self, key: str, value: Any, expected: str) -> CheckpointError:
        found = "nothing" if value is None else f"{value!r:.60}"
        return CheckpointError(
            f"{self._model.first.path}: expected {expected} as {self._model.name}.{key}, found {found}."
        )
