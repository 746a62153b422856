"""Quantised sources: every number is the one that the library makes which has written them."""

import json
import shutil
import tracemalloc
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from moemerge import load_config, merge, plan_merge
from moemerge.checkpoint.header import read_header
from moemerge.checkpoint.jobs import MAX_THREADS
from moemerge.errors import CheckpointError, IncompatibleError
from moemerge.model_card.card import compare_card
from moemerge.model_card.markdown import as_text
from moemerge.passes.weights import read_into
from moemerge.planning.fingerprint import plan_fingerprint
from moemerge.planning.plan import MergePlan
from moemerge.sources.model_folder import open_model
from moemerge.sources.quantised.table import dequantised
from moemerge.sources.tensor_tables import read_tensor_tables
from tests.sources.test_lora import make_adapter
from tests.support.hub_world import files_of, planned, weights_sent
from tests.support.models import edit_json, load_weights, make_model, save_weights, write_config
from tests.support.quantised import (
    KINDS,
    dequantised_copy,
    differing,
    loaded_by_transformers,
    quantise,
    weights_of,
)

SIZES = {"dtype": torch.bfloat16, "hidden_size": 64, "intermediate_size": 96}


@pytest.mark.parametrize("kind", KINDS)
def test_weights_are_those_that_the_library_makes(tmp_path, kind):
    expected = quantise(make_model(tmp_path / "model", **SIZES), kind)
    assert differing(weights_of(tmp_path / "model"), expected) == []


def test_a_whole_model_is_read_as_transformers_loads_it(tmp_path):
    quantise(make_model(tmp_path / "model", **SIZES), "FP8, blocks")
    assert differing(weights_of(tmp_path / "model"), loaded_by_transformers(tmp_path / "model")) == []


@pytest.mark.skipif(transformers.__version__ < "5", reason="its dequantize() takes no dtype")
@pytest.mark.parametrize("bits", [4, 8])
def test_what_transformers_saves_in_bitsandbytes_is_read_as_it_dequantises_it(tmp_path, bits):
    model = make_model(tmp_path / "model", **SIZES | {"intermediate_size": 128})
    settings = BitsAndBytesConfig(
        load_in_4bit=bits == 4, load_in_8bit=bits == 8, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True
    )
    quantised = AutoModelForCausalLM.from_pretrained(model, quantization_config=settings, torch_dtype="auto")
    quantised.save_pretrained(tmp_path / "quantised")
    found = weights_of(tmp_path / "quantised")
    assert differing(found, dict(quantised.dequantize(dtype=torch.bfloat16).state_dict())) == []
    assert len(differing(found, load_weights(model))) == 21
    edit_json(tmp_path / "quantised/config.json", quantization_config={f"load_in_{bits}bit": True})  # as once written
    assert differing(weights_of(tmp_path / "quantised"), found) == []


@pytest.mark.filterwarnings("ignore")  # of what the libraries import
@pytest.mark.parametrize("kind", ["GPTQ", "GPTQ, ordered by activations", "GPTQ, 8 bits, second format", "AWQ"])
def test_gptqmodel_and_autoawq_make_the_same_of_these_files(tmp_path, kind):
    """With any zero points: one is added to those of the first format, whatever becomes of the words."""
    module = UP.removesuffix(".weight")
    model = make_model(tmp_path / "model", **SIZES)
    quantise(model, kind)
    tensors = load_weights(model)
    zeros = tensors[f"{module}.qzeros"]
    anything = torch.randint(-(2**31), 2**31, zeros.shape, generator=torch.Generator().manual_seed(0)).int()
    save_weights(model, tensors | {f"{module}.qzeros": anything})
    parts = {name: load_weights(model)[f"{module}.{name}"] for name in ("qweight", "qzeros", "scales")}
    if kind == "AWQ":
        library = pytest.importorskip("awq.utils.packing_utils")
        expected = library.dequantize_gemm(*parts.values(), 4, 32).T
    else:
        expected = by_gptqmodel(parts | {"g_idx": tensors[f"{module}.g_idx"]}, kind)
    assert torch.equal(weights_of(model)[UP], expected.bfloat16())


def by_gptqmodel(parts: dict[str, torch.Tensor], kind: str) -> torch.Tensor:
    """What GPTQModel makes of a weight's parts (row, column)."""
    torch_linear = pytest.importorskip("gptqmodel.nn_modules.qlinear.torch")
    from gptqmodel.utils.model import convert_gptq_v1_to_v2_format_module

    bits = 8 if "8 bits" in kind else 4
    layer = torch_linear.TorchLinear(
        bits=bits, group_size=64 // len(parts["scales"]), sym=True, desc_act=True, in_features=64, out_features=96,
        bias=False, pack_dtype=torch.int32, register_buffers=True,
    )  # fmt: skip
    layer.load_state_dict(parts)
    if "second format" not in kind:
        convert_gptq_v1_to_v2_format_module(layer, bits, torch.int32)
    layer.post_init()
    return layer.dequantize_weight().T


def merged(folder: Path, models: list[Path], **keys: Any) -> tuple[MergePlan, dict[str, bytes]]:
    """The plan of a merge, and its files of weights with config.json."""
    plan = plan_merge(load_config(write_config(folder / "merge.yaml", models[0], models[1:], **keys)))
    merge(plan, folder / "out")
    found = files_of(folder / "out")
    return plan, {name: found[name] for name in found if name.startswith("model") or name == "config.json"}


@pytest.fixture
def models(tmp_path) -> list[Path]:
    """A base and two fine-tunes of it in bfloat16, the base and the first of them in FP8."""
    made = [
        make_model(tmp_path / name, seed, tuned_from=0, **SIZES) for seed, name in enumerate(("base", "fox", "code"))
    ]
    for model, kind in zip(made, ("FP8, blocks", "FP8, whole matrices"), strict=False):
        quantise(model, kind)
    return made


def plain_copies(models: list[Path], folder: Path) -> list[Path]:
    """The same models as the library dequantises them, saved as plain weights."""
    copies = [Path(shutil.copytree(model, folder / model.name)) for model in models]
    for copy, model in zip(copies, models, strict=True):
        dequantised_copy(copy, weights_of(model))
    return copies


@pytest.mark.parametrize("keys", [{}, {"shared_weights": "average", "dtype": "float16"}], ids=["hidden", "average"])
def test_a_merge_of_quantised_models_is_that_of_their_dequantised_copies(tmp_path, models, keys):
    for name in ("quantised", "plain"):
        (tmp_path / name).mkdir()
    copies = plain_copies(models, tmp_path / "plain")
    plan, found = merged(tmp_path / "quantised", models, **keys)
    expected, wanted = merged(tmp_path / "plain", copies, **keys)
    assert found == wanted
    assert "quantization_config" not in plan.output_config
    lost = "and dequantised, which does not bring back what the quantisation lost"
    notes = (
        f"base_model: stored as FP8 with a scale per block of 16 x 8, {lost}",
        f"experts[0] (fox): stored as FP8 with a scale per matrix, {lost}",
    )
    assert plan.remarks.quantised == notes
    assert [note for note in plan.notes if note not in expected.notes] == list(notes)
    card = (tmp_path / "quantised/out/README.md").read_text()
    assert all(f"> **Note:** {as_text(note)}." in card for note in notes)
    assert compare_card(tmp_path / "quantised/out", plan) == []


def test_rows_in_the_middle_are_those_of_the_whole(models):
    whole = weights_of(models[0])
    (table,) = read_tensor_tables([open_model(str(models[0]), print)], print, dense=True)
    for name, (first, count) in {"q_proj": (0, 64), "up_proj": (37, 11), "down_proj": (63, 1)}.items():
        ((tensor, numbers),) = [
            (table[key], whole[key]) for key in table if key.endswith(f"layers.1.{_of(name)}.weight")
        ]
        part = torch.empty((count, tensor.shape[1]), dtype=torch.bfloat16)
        read_into(tensor.rows(first, count), part)
        assert torch.equal(part, numbers[first : first + count])


def _of(projection: str) -> str:
    return f"{'self_attn' if projection == 'q_proj' else 'mlp'}.{projection}"


def test_blocks_at_the_border_may_be_smaller(tmp_path):
    model = make_model(tmp_path / "model", **SIZES)
    name = "model.layers.0.mlp.up_proj.weight"
    weights = load_weights(model)
    codes, scales = weights[name].to(torch.float8_e4m3fn), torch.rand(3, 2)
    edit_json(model / "config.json", quantization_config={"quant_method": "fp8", "weight_block_size": [40, 50]})
    save_weights(model, weights | {name: codes, f"{name}_scale_inv": scales})
    factors = scales.repeat_interleave(40, 0).repeat_interleave(50, 1)[:96, :64]
    assert torch.equal(weights_of(model)[name], (codes.float() * factors).bfloat16())


UP = "model.layers.1.mlp.up_proj.weight"


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({f"{UP}_scale_inv": None}, "is stored as F8_E4M3, but has no weight_scale_inv or weight_scale"),
        ({f"{UP}_scale_inv": torch.ones(6, 7)}, "has a weight_scale_inv of shape [6, 7], and [6, 8] is expected"),
        (
            {f"{UP}_scale_inv": torch.ones(6, 8, dtype=torch.int32)},
            "has a weight_scale_inv stored as I32, and F32 or BF16 or F16 or F8_E8M0 or U8 is expected",
        ),
        ({UP: torch.ones(96, 64)}, "has a weight stored as F32, and F8_E4M3 is expected"),
        ({UP: torch.ones(96, dtype=torch.int8)}, "has a weight stored as I8, and F8_E4M3 is expected"),
        (
            {UP: torch.ones(96, dtype=torch.float8_e4m3fn)},
            "is stored in the shape [96], and a matrix is expected",
        ),
    ],
)
def test_a_damaged_weight_is_named_once(tmp_path, models, change, reason):
    tensors = load_weights(models[0]) | change
    save_weights(models[0], {name: tensor for name, tensor in tensors.items() if tensor is not None})
    with pytest.raises(IncompatibleError) as refused:
        merged(tmp_path, [models[2], models[0], models[1]], prompts=False)
    assert refused.value.problems == (f"experts[0] {models[0]}: tensor {UP} {reason}",)


def test_weights_in_fp8_without_their_settings_are_named_once(tmp_path, models):
    edit_json(models[0] / "config.json", quantization_config=None)
    with pytest.raises(IncompatibleError) as refused:
        merged(tmp_path, [models[2], models[0], models[1]], prompts=False)
    first = next(name for name in read_header(models[0] / "model.safetensors") if ".mlp." in name)
    assert refused.value.problems == (
        f"experts[0] {models[0]}: tensor {first.removesuffix('_scale_inv')} is FP8 with scales, but config.json has no "
        "quantization_config, which says what shares a scale: copy it from the model's original config.json (and 8 more)",
    )


def state_of(**changes: Any) -> torch.Tensor:
    state = {"quant_type": "nf4", "blocksize": 64, "dtype": "bfloat16", "shape": [96, 64], "nested_blocksize": 256}
    return torch.frombuffer(bytearray(json.dumps({**state, **changes}).encode()), dtype=torch.uint8)


NF4 = "weight.quant_state.bitsandbytes__nf4"
IN_BITSANDBYTES = [
    ("NF4", {"weight.absmax": None}, "is stored as U8, but has no weight.absmax"),
    ("NF4", {"weight.absmax": torch.ones(97)}, "has a weight.absmax of shape [97], and [96] is expected"),
    ("NF4", {"weight": torch.ones(7, 1, dtype=torch.uint8)}, "has a weight of shape [7], and [3072] is expected"),
    (
        "NF4",
        {NF4: state_of(dtype="float64")},
        "has a quant_state that is not read; JSON on a matrix in float32, float16, bfloat16 is expected",
    ),
    (
        "NF4",
        {NF4: state_of(nested_offset=[])},
        "has a quant_state that is not read; JSON on a matrix in float32, float16, bfloat16 is expected",
    ),
    (
        "NF4",
        {NF4: torch.zeros(4, dtype=torch.uint8)},
        "has a quant_state that is not read; JSON on a matrix in float32, float16, bfloat16 is expected",
    ),
    (
        "NF4",
        {NF4: state_of(blocksize=0)},
        "has a quant_state with sizes that are not read: {'quant_type': 'nf4', 'blocksize': 0, 'dtype': 'bfloat16', "
        "'shape': [96, 64], 'nested_blocksize': 256}",
    ),
    (
        "NF4",
        {NF4: torch.zeros(2**19, dtype=torch.uint8)},
        "has a bitsandbytes__nf4 of 524288 bytes, where some hundred are expected",
    ),
    ("8 bits", {"SCB": None}, "is stored as I8, but has no SCB"),
    (
        "8 bits",
        {"weight_format": torch.ones((), dtype=torch.uint8)},
        "is stored in the order of a GPU's kernels (weight_format), which bitsandbytes no longer reads",
    ),
]


IN_GPTQ = [
    ("GPTQ", {"scales": None}, "is stored as I32, but has no scales"),
    (
        "GPTQ",
        {"qzeros": torch.zeros(2, 11, dtype=torch.int32)},
        "has a qzeros of shape [2, 11], and [2, 12] is expected",
    ),
    ("GPTQ", {"scales": torch.ones(3, 96)}, "has scales for 3 groups of 64 columns"),
    ("GPTQ", {"g_idx": torch.zeros(63, dtype=torch.int32)}, "has a g_idx of shape [63], and [64] is expected"),
    ("GPTQ", {"qweight": torch.ones(8, 96)}, "has a qweight stored as F32, and I32 is expected"),
]


@pytest.mark.parametrize(
    ("kind", "change", "reason"), [*((f"bitsandbytes, {kind}", *rest) for kind, *rest in IN_BITSANDBYTES), *IN_GPTQ]
)
def test_a_damaged_weight_of_other_methods_is_named_once(tmp_path, models, kind, change, reason):
    model = make_model(tmp_path / "again", 3, tuned_from=0, **SIZES)
    quantise(model, kind)
    module = UP.removesuffix("weight")
    tensors = load_weights(model) | {f"{module}{name}": tensor for name, tensor in change.items()}
    save_weights(model, {name: tensor for name, tensor in tensors.items() if tensor is not None})
    with pytest.raises(IncompatibleError) as refused:
        merged(tmp_path, [models[2], model, models[1]], prompts=False)
    assert refused.value.problems == (f"experts[0] {model}: tensor {UP} {reason}",)


DOWN = "tensor model.layers.0.mlp.down_proj.weight"
FORMATS = "float-quantized, int-quantized, naive-quantized, mxfp8-quantized, pack-quantized, nvfp4-pack-quantized, "
FORMATS += "mxfp4-pack-quantized"
ROWS = {"weights": {"num_bits": 8, "type": "float", "strategy": "channel"}}
COMPRESSED = {"quant_method": "compressed-tensors", "format": "float-quantized", "config_groups": {"group_0": ROWS}}


def not_read(what: str) -> str:
    return f"is quantised as {what}, and of the formats of compressed-tensors {FORMATS} with 8 or 4 bits alone are read"


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        (
            {"config_groups": None},
            "is quantised, and the config_groups in config.json do not say how, the same for all weights",
        ),
        (
            {"config_groups": {"a": ROWS, "b": {"weights": {"num_bits": 4}}}},
            "is quantised, and the config_groups in config.json do not say how, the same for all weights",
        ),
        ({"format": "marlin-24"}, not_read("marlin-24 with 8 bits of float")),
        (
            {"sparsity_config": {"format": "sparse-24-bitmask"}},
            not_read("float-quantized, sparse-24-bitmask with 8 bits of float"),
        ),
        (
            {"transform_config": {"config_groups": {}}},
            not_read("float-quantized after a rotation (transform_config) with 8 bits of float"),
        ),
        (
            {"config_groups": {"a": {"weights": {**ROWS["weights"], "num_bits": 6}}}},
            not_read("float-quantized with 6 bits of float"),
        ),
        (
            {"config_groups": {"a": {"weights": {**ROWS["weights"], "strategy": "attn_head"}}}},
            "is quantised with the strategy 'attn_head' of blocks of None, which is not read",
        ),
        (
            {"config_groups": {"a": {"weights": {**ROWS["weights"], "strategy": "group", "group_size": "8"}}}},
            "is quantised with the strategy 'group' of blocks of (1, '8'), which is not read",
        ),
        ({"format": "nvfp4-pack-quantized"}, not_read("nvfp4-pack-quantized with 8 bits of float")),
        (
            {"quant_method": "gptq", "bits": 3, "format": "GPTQ"},
            "is quantised as gptq with 3 bits, and of gptq gptq and gptq_v2 with 4 or 8 bits alone are read",
        ),
        (
            {"quant_method": "awq", "version": "GEMV"},
            "is quantised as gemv with 4 bits, and of awq gemm with 4 bits alone are read",
        ),
    ],
)
def test_settings_that_are_not_read_are_said_once(tmp_path, models, settings, reason):
    tensors = load_weights(models[0])
    ends = {
        "compressed-tensors": ("weight", "weight_scale"),
        "gptq": ("qweight", "scales"),
        "awq": ("qweight", "scales"),
    }
    codes, scales = ends[settings.get("quant_method", "compressed-tensors")]
    for name in [name for name in tensors if "proj" in name]:
        tensor = tensors.pop(name)
        if not name.endswith("scale_inv"):
            module = name.removesuffix("weight")
            tensors |= {f"{module}{codes}": tensor, f"{module}{scales}": torch.ones(len(tensor), 1)}
    save_weights(models[0], tensors)
    edit_json(models[0] / "config.json", quantization_config=COMPRESSED | settings)
    with pytest.raises(IncompatibleError) as refused:
        merged(tmp_path, [models[2], models[0], models[1]], prompts=False)
    assert refused.value.problems == (f"experts[0] {models[0]}: {DOWN} {reason} (and 8 more)",)


def test_groups_that_are_not_there_stop_the_merge(tmp_path, models):
    model = make_model(tmp_path / "again", 3, tuned_from=0, **SIZES)
    quantise(model, "GPTQ")
    save_weights(model, load_weights(model) | {UP.replace("weight", "g_idx"): torch.arange(64).int() // 31})
    with pytest.raises(CheckpointError) as failed:
        merged(tmp_path, [models[2], model, models[1]], prompts=False)
    assert str(failed.value) == (
        f"{model}/model.safetensors: tensor {UP.replace('weight', 'qweight')!r} cannot be dequantised: g_idx names groups "
        "from 0 to 2, and there are 2. Download that file again."
    )


def test_biases_of_zeros_that_gptq_stores_are_left_out(tmp_path, models):
    model = make_model(tmp_path / "again", 3, tuned_from=0, **SIZES)
    quantise(model, "GPTQ")
    biases = {UP.replace("weight", "bias"): torch.zeros(96).half()}
    save_weights(model, load_weights(model) | biases)
    plan, _ = merged(tmp_path, [model, models[2], models[1]], prompts=False)
    note = f"base_model: left out: tensor {UP.replace('weight', 'bias')} holds zeros alone, which GPTQ stores where a layer has no bias"
    assert note in plan.notes
    save_weights(model, load_weights(model) | {name: tensor + 1 for name, tensor in biases.items()})
    with pytest.raises(IncompatibleError, match="bias has no place in a merge"):
        merged(tmp_path, [model, models[2], models[1]], prompts=False)


@pytest.mark.parametrize("size", [None, [128], [0, 128], ["16", 8], 128])
def test_blocks_without_a_size_are_refused(tmp_path, models, size):
    settings = {"quant_method": "fp8", "weight_block_size": size}
    edit_json(models[0] / "config.json", quantization_config=settings)
    with pytest.raises(IncompatibleError) as refused:
        merged(tmp_path, [models[2], models[0], models[1]], prompts=False)
    assert refused.value.problems == (
        f"experts[0] {models[0]}: tensor model.layers.0.mlp.down_proj.weight has scales for blocks, but the "
        f"weight_block_size in config.json is {size!r}; two sizes are expected, such as [128, 128] (and 8 more)",
    )


@pytest.mark.parametrize("tensor", [f"{UP}_scale_inv", UP])
def test_scales_and_numbers_that_are_not_finite_stop_the_merge(tmp_path, models, tensor):
    tensors = load_weights(models[0])
    tensors[tensor].view(-1)[-1] = torch.nan
    save_weights(models[0], tensors)
    with pytest.raises(CheckpointError) as failed:
        merged(tmp_path, [models[2], models[0], models[1]], prompts=False)
    file = models[0] / "model.safetensors"
    place = [size - 1 for size in tensors[tensor].shape]
    assert str(failed.value) == (
        f"{file}: tensor {UP!r} cannot be dequantised, since {tensor} of {file} holds 1 number that is infinite or "
        f"NaN, at {place}. Download that file again."
    )


def test_numbers_beyond_the_models_dtype_stop_the_merge(tmp_path, models):
    edit_json(models[0] / "config.json", dtype="float16")
    save_weights(models[0], load_weights(models[0]) | {f"{UP}_scale_inv": torch.full((6, 8), 1e9)})
    with pytest.raises(CheckpointError) as failed:
        merged(tmp_path, [models[2], models[0], models[1]], prompts=False)
    assert str(failed.value) == (
        f"{models[0]}/model.safetensors: tensor {UP!r} holds numbers times scales that float16, the model's own dtype, "
        "cannot express. Download that file again."
    )


def test_memory_does_not_grow_with_a_matrix(tmp_path):
    rows, width = 3000, 4096
    tensors = {
        "x.weight": torch.zeros(rows, width, dtype=torch.float8_e4m3fn),
        "x.weight_scale_inv": torch.ones(24, 32),
    }
    save_file(tensors, tmp_path / "model.safetensors")
    config = {"quantization_config": {"quant_method": "fp8", "weight_block_size": [128, 128]}}
    tensor = dequantised(config, read_header(tmp_path / "model.safetensors"))["x.weight"]
    assert (tensor.dtype, tensor.nbytes) == ("F32", 4 * rows * width)
    buffer = memoryview(bytearray(2**16))
    tracemalloc.start()
    with tensor.open() as reader:
        done = 0
        while done < tensor.nbytes:
            done += reader.readinto(buffer) or 0
    _, peak_bytes = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert done == tensor.nbytes
    assert peak_bytes < 4 * 10**6


def test_the_estimate_of_memory_counts_packed_numbers_that_are_read_as_a_whole(tmp_path):
    model, other = (make_model(tmp_path / f"m{seed}", seed, **SIZES) for seed in (1, 2))
    config = load_config(write_config(tmp_path / "m.yaml", model, [model, other], prompts=False))
    plain = plan_merge(config).peak_memory_bytes
    quantise(model, "GPTQ")
    stored = read_header(model / "model.safetensors")
    modules = [name.removesuffix("qweight") for name in stored if name.endswith(".qweight")]
    sizes = [sum(tensor.nbytes for name, tensor in stored.items() if name.startswith(module)) for module in modules]
    assert plan_merge(config).peak_memory_bytes - plain == sum(sorted(sizes)[-MAX_THREADS - 1 :])


def test_on_the_hub_each_byte_is_fetched_once(world, machine, models):
    for model in models:
        world.hub.add(f"acme/{model.name}-fp8", files_of(model))
    config = write_config(
        machine.folder / "merge.yaml", *("acme/code-fp8", ["acme/base-fp8", "acme/fox-fp8"]), prompts=False
    )
    world.hub.reset()
    plan = planned(machine, str(config))
    looked_at = weights_sent(world.hub)
    assert plan["compared_bytes"] > 0
    world.hub.reset()
    streamed = machine.moemerge(str(config), "streamed", "--stream", "--quiet")
    assert (streamed.code, streamed.err) == (0, "")
    assert weights_sent(world.hub) == looked_at + plan["download_bytes"]
    (machine.folder / "local").mkdir()
    _, local = merged(machine.folder / "local", [models[2], models[0], models[1]], prompts=False)
    found = files_of(machine.folder / "streamed")
    assert {name: found[name] for name in local} == local


@pytest.mark.filterwarnings("ignore")  # PEFT's own
def test_an_adapter_is_added_to_the_dequantised_weights(tmp_path, models):
    (tmp_path / "plain").mkdir()
    (copy,) = plain_copies(models[:1], tmp_path / "plain")
    make_adapter(tmp_path / "adapter", copy, target_modules=["up_proj"])
    found, expected = (weights_of(f"{model}+{tmp_path}/adapter") for model in (models[0], copy))
    assert differing(found, expected) == []
    assert differing(found, weights_of(models[0])) == [f"model.layers.{layer}.mlp.up_proj.weight" for layer in range(3)]


def test_a_merge_with_other_settings_of_a_source_is_another_one(tmp_path, models):
    # Blocks of which equally many fill each matrix.
    found = []
    for size in ([16, 8], [17, 8]):
        edit_json(models[0] / "config.json", quantization_config={"quant_method": "fp8", "weight_block_size": size})
        config = load_config(write_config(tmp_path / "merge.yaml", models[2], models[:2], prompts=False))
        found.append(plan_fingerprint(plan_merge(config), 0))
    assert [key for key in found[0] if found[0][key] != found[1][key]] == ["what is computed of the sources"]


@pytest.fixture
def mixture(tmp_path, models) -> tuple[Path, Path]:
    """A mixture whose experts are in FP8, as released ones are, and the same one with plain weights."""
    (tmp_path / "made").mkdir()
    (tmp_path / "plain").mkdir()
    copies = plain_copies(models, tmp_path / "plain")
    merged(tmp_path / "made", copies, prompts=False)
    quantised, plain = tmp_path / "made/out", tmp_path / "made/plain"
    shutil.copytree(quantised, plain)
    weights = load_weights(quantised)
    experts = {name: tensor for name, tensor in weights.items() if ".experts." in name}
    stored, settings, read = KINDS["FP8, blocks"](experts)
    save_weights(quantised, weights | stored)
    save_weights(plain, weights | read)
    edit_json(quantised / "config.json", quantization_config=settings)
    return quantised, plain


def test_an_expert_of_a_quantised_mixture_is_a_dense_model(tmp_path, models, mixture, run):
    quantised, plain = mixture
    assert differing(weights_of(f"{quantised}#1"), weights_of(f"{plain}#1")) == []
    assert differing(weights_of(f"{quantised}#1"), weights_of(f"{quantised}#0")) != []
    for folder in mixture:
        assert run("extract", f"{folder}#1", tmp_path / f"{folder.name} 1", "-q") == (0, "", "")
        assert run("densify", folder, tmp_path / f"{folder.name} mean", "--average", "-q")[0] == 0
    found, expected = (files_of(tmp_path / f"{folder.name} 1") for folder in mixture)
    assert all(found[name] == expected[name] for name in ("model.safetensors", "config.json"))
    means = [load_weights(tmp_path / f"{folder.name} mean") for folder in mixture]
    assert differing(*means) == []
    stored = f"{quantised}: stored as FP8 with a scale per block of 16 x 8, and dequantised, which does not bring back"
    assert as_text(stored) in found["README.md"].decode()


def test_a_quantised_model_is_added_to_a_mixture(tmp_path, models, mixture, run):
    _, plain = mixture
    (copy,) = plain_copies(models[:1], tmp_path / "plain again")
    outs = tmp_path / "of quantised", tmp_path / "of plain"
    for model, out in zip((models[0], copy), outs, strict=True):
        assert run("edit", plain, out, "--add", f"more={model}", "-q")[0] == 0
    found, expected = map(files_of, outs)
    assert all(found[name] == expected[name] for name in found if name.startswith("model"))
    note = "stored as FP8 with a scale per block of 16 x 8, and dequantised, which does not bring back"
    assert (note in found["README.md"].decode(), note in expected["README.md"].decode()) == (True, False)
