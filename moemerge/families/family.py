"""The description of an output family: names of tensors, keys of `config.json`, and the facts that it can hold."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final, Literal

from moemerge.dtypes import DType
from moemerge.families.dense import NON_LLAMA_FACTS, Axes, DenseModel, Role
from moemerge.families.mixture_shape import Mixture

Names = Mapping[str, tuple[Role, ...]]
"""Tensors within a layer, each with the FFN projections that it holds, stacked in this order.

A name with `{expert}` stands for one tensor per expert, any other for a stack of all experts.
"""
Scoring = Literal["softmax", "sigmoid"]
"""How a router turns logits into weights; those of the chosen experts are then divided by their sum."""

# Neurons in a shared expert of zeros: k-quants want rows of so many elements, 8 GPUs an eighth each.
_NARROW: Final = 256
_LONGROPE: Final = ("original_max_position_embeddings",)
SWITCHED_OFF: Final = -1e4
"""A selection bias with which no expert is chosen: scores are at most 1, and float16 holds it."""
ROUTER_SCALE: Final = "router.scale"
"""Factors (hidden,) on what enters a router; nothing else reads them."""


@dataclass(frozen=True)
class Extra:
    """A tensor of a layer that the family has and the dense model need not have."""

    name: str
    axes: Axes
    value: float = 0.0
    source: str = ""
    """A tensor of the base's layer that this one is made from, instead of `value`."""
    scale: Literal["one", "sqrt hidden"] = "one"
    """The factor on `source`."""
    when: tuple[str, ...] = ()
    """Facts of the base; the tensor is needed where one of them holds."""


@dataclass(frozen=True)
class Shared:
    """How a family holds shared experts: as one FFN, with the neurons of all of them."""

    names: Names
    width: Literal["any", "multiple", "one expert"]
    """The width in neurons: any number, a multiple of an expert's, or exactly an expert's."""
    absent: Literal["nothing", "zeros"]
    """Whether nothing is stored without a shared expert, or a narrow expert of zeros, where engines need one."""
    gate: str = ""
    """Tensor of shape (1, hidden) whose sigmoid weighs the shared expert, if there is one."""

    def stored_width(self, asked: int, expert_width: int) -> int:
        """The number of neurons that are stored for `asked` ones."""
        if not asked:
            narrow = min(expert_width, _NARROW) if self.width == "any" else expert_width
            return narrow if self.absent == "zeros" else 0
        return asked if self.width == "any" else -(-asked // expert_width) * expert_width


@dataclass(frozen=True)
class MoeFamily:
    """An MoE family as data, in the layout of its released checkpoints; names are those within a layer."""

    model_type: str
    architecture: str
    experts: Names
    router: str
    """Name of the router's tensor (expert, hidden)."""
    named: Mapping[str, str]
    """Map from a key of `config.json` to the name of its value in `DenseModel.values` or `Mixture.values`."""
    fixed: Mapping[str, Any]
    """Keys with fixed values, unless the base's config has its own."""
    carried: tuple[str, ...]
    """Keys of the base's `config.json` that mean the same here."""
    blocks: tuple[str, ...] = ("llama",)
    """Dense blocks whose computation it repeats; see `DenseFamily.block`."""
    interleaved: bool = False
    """Whether rotary positions turn neighbouring elements; for families that do not, the base's rows are regrouped."""
    holds: frozenset[str] = frozenset()
    """The facts of `NON_LLAMA_FACTS` that it can express."""
    norm_offset: float = 0.0
    """The number that norms add to their weights; see `DenseFamily.norm_offset`."""
    needs_qk_norm: bool = False
    """Whether it always normalises queries and keys."""
    scoring: Scoring = "softmax"
    shared: Shared | None = None
    appends_shared: bool = False
    """Whether shared experts can be held as more neurons of every expert: exact, but each expert has a copy."""
    dense_layers: Literal["none", "prefix", "outside", "any"] = "none"
    """The layers that can stay dense: none, the first ones, those before and after a run of MoE layers, or any."""
    dense_ffn: Names | None = None
    """The FFN of a layer that stays dense; None for the usual names."""
    keeps_dense_ffn: bool = False
    """Whether every layer has a dense FFN beside the experts, which is switched off here."""
    selection_bias: str = ""
    """Tensor (expert,) that is added to scores for the choice alone; an expert that it switches off is never chosen."""
    bias_axes: Axes = ("experts",)
    extras: tuple[Extra, ...] = ()
    in_gguf: bool = True
    """Whether `moemerge gguf` writes it; `export.family_tables` says how."""
    read: tuple[str, ...] = ()
    """Keys of `config.json` that its class reads though a merge never writes them."""
    router_defaults: Mapping[str, Any] = field(default_factory=dict)
    """What its class takes for keys of `config.json` that say how routers choose, where they are absent."""
    added_to_sum: float = 0.0
    """A number that routers add to the sum that they divide the chosen experts' scores by."""
    weight_factors: str = ""
    """Tensor (expert,) of factors on the weights of chosen experts, if there is one."""
    kinds: Mapping[str, str] = field(default_factory=dict)
    """Layer types that transformers 5 saves in its own spelling, each with that of released checkpoints."""
    notes: tuple[str, ...] = ()
    """Notes on its peculiarities; what engines get wrong is in `engines`."""

    @property
    def keys(self) -> frozenset[str]:
        """Every key that a merge writes into `config.json` to say something about the model."""
        return frozenset({*self.named, *self.fixed, *self.carried, *_LONGROPE})

    @property
    def read_keys(self) -> frozenset[str]:
        """Every key of `config.json` that says something about the model, whoever wrote it."""
        return self.keys | set(self.read)

    def refusals(self, base: DenseModel, mixture: Mixture) -> list[str]:
        """List why this family cannot hold such a mixture of models that compute like `base`; empty where it can."""
        if base.family.block not in self.blocks:
            return [f"does not compute like {base.family.model_type}"]
        if self.interleaved and not base.family.interleaved:
            return [f"rotates neighbouring elements of a head, {base.family.model_type} its halves"]
        reasons = [f"it has no {words}" for fact, words in NON_LLAMA_FACTS.items() if fact in base.facts - self.holds]
        if self.needs_qk_norm and "qk_norm" not in base.facts:
            reasons.append(f"it always normalises queries and keys, {base.family.model_type} does not")
        return reasons + self._refuse_shared(mixture) + self._refuse_dense_layers(mixture)

    def _refuse_shared(self, mixture: Mixture) -> list[str]:
        if not mixture.shared_widths:
            return []
        if self.shared is None:
            return [] if self.appends_shared else ["it has no shared experts: remove shared_experts"]
        if self.shared.width == "one expert" and sum(mixture.shared_widths) > max(mixture.expert_widths):
            return ["it has one shared expert, no wider than the others"]
        return []

    def _refuse_dense_layers(self, mixture: Mixture) -> list[str]:
        reasons = []
        dense = mixture.dense_layers
        if not self.leaves_dense(dense, mixture.moe_layers):
            what = {
                "none": "all its layers hold experts",
                "prefix": "only its first layers can stay dense",
                "outside": "its layers with experts follow each other",
            }
            reasons.append(f"{what[self.dense_layers]}, but moe_layers leaves {_listed(dense)} dense")
        if mixture.absent and not self.selection_bias:
            reasons.append(
                "its router has no selection bias that could switch an expert off in a layer: remove experts[].layers"
            )
        return reasons

    def leaves_dense(self, dense: Sequence[int], routed: Sequence[int]) -> bool:
        """Whether the family can hold dense layers beside those with experts; both are numbers, ascending."""
        return {
            "none": not dense,
            "prefix": list(dense) == list(range(len(dense))),
            "outside": list(routed) == list(range(routed[0], routed[0] + len(routed))),
            "any": True,
        }[self.dense_layers]

    def expert_width(self, mixture: Mixture) -> int:
        """The neurons that are stored for every expert; narrower experts are padded with zeros."""
        return max(mixture.expert_widths) + (sum(mixture.shared_widths) if self.shared is None else 0)

    def shared_width(self, mixture: Mixture) -> int:
        """The neurons that are stored for the shared experts."""
        if self.shared is None:
            return 0
        return self.shared.stored_width(sum(mixture.shared_widths), self.expert_width(mixture))

    def config(self, base: DenseModel, mixture: Mixture, dtype: DType) -> dict[str, Any]:
        """Write the merged model's `config.json` with every value explicit: class defaults differ between families.

        Rope settings are written in both spellings: with `rope_parameters` alone, transformers 4.57 falls back to
        the class's `rope_theta` without a message.
        """
        values = {
            **{fact: fact in base.facts for fact in NON_LLAMA_FACTS},
            "any_bias": not base.facts.isdisjoint({"qkv_bias", "output_bias"}),
            **base.values,
            **mixture.values(self.expert_width(mixture), self.shared_width(mixture)),
        }
        carried = {key: base.config.get(key) for key in self.carried}
        longrope = (values.get("rope_scaling") or {}).get("rope_type") == "longrope"
        return dict(
            sorted(
                {
                    **self.fixed,
                    **{key: value for key, value in carried.items() if value is not None or key in NULLABLE},
                    **{key: values[name] for key, name in self.named.items()},
                    # transformers 4 reads this key only here.
                    **({key: base.config[key] for key in _LONGROPE if base.config.get(key)} if longrope else {}),
                    "architectures": [self.architecture],
                    "model_type": self.model_type,
                    "torch_dtype": dtype,
                    "dtype": dtype,
                }.items()
            )
        )


def _listed(layers: list[int]) -> str:
    shown = ", ".join(map(str, layers[:4]))
    return f"layer{'s' if len(layers) > 1 else ''} {shown}{' and more' if len(layers) > 4 else ''}"  # noqa: PLR2004


# ---- what most families share

NULLABLE: Final = frozenset({"pad_token_id", "bos_token_id", "eos_token_id"})
COMMON: Final = (
    "vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "head_dim",
    "hidden_act", "max_position_embeddings", "initializer_range", "rms_norm_eps", "use_cache", "pad_token_id",
    "bos_token_id", "eos_token_id", "tie_word_embeddings", "attention_dropout", "rope_theta",
)  # fmt: skip
ROPE: Final = {"rope_parameters": "rope_parameters", "rope_scaling": "rope_scaling"}
SPARSE: Final = {"output_router_logits": False, "router_aux_loss_coef": 0.001}
"""Training settings, as in the classes' defaults."""


def separate(module: str, names: tuple[str, str, str] = ("gate_proj", "up_proj", "down_proj")) -> Names:
    """Name one tensor for each projection of an FFN."""
    gate, up, down = (f"{module}.{name}.weight" for name in names)
    return {gate: ("gate",), up: ("up",), down: ("down",)}


def fused(gate_up: str, down: str) -> Names:
    """Name one tensor for gate and up projections together, and one for down."""
    return {gate_up: ("gate", "up"), down: ("down",)}


def zero_biases(*projections: str, when: tuple[str, ...] = ()) -> tuple[Extra, ...]:
    """Biases of the attention that do nothing, for bases that have none."""
    axes = {"q": "query", "k": "key", "v": "key", "o": "hidden"}
    return tuple(Extra(f"self_attn.{name}_proj.bias", (axes[name],), when=when) for name in projections)
