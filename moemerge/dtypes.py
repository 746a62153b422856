"""Names and widths of tensor dtypes, as safetensors files and YAML files spell them."""

from typing import Final, Literal

DType = Literal["float32", "float16", "bfloat16"]
"""A dtype that a merged model can have, as `config.json` spells it."""

ComputeDtype = Literal["auto", "float32", "bfloat16"]
"""What a model is run in: one dtype, or the better one for the device."""

HeaderDType = Literal[
    "BOOL", "U8", "I8", "I16", "U16", "I32", "U32", "I64", "U64",
    "F4", "F6_E2M3", "F6_E3M2", "F8_E4M3", "F8_E5M2", "F8_E8M0", "F8_E4M3FNUZ", "F8_E5M2FNUZ",
    "F16", "BF16", "F32", "F64", "C64",
]  # fmt: skip
"""A dtype that a tensor can be stored in, as a safetensors header spells it."""

# https://github.com/huggingface/safetensors, enum Dtype; sub-byte types count in bits.
BITS: Final[dict[HeaderDType, int]] = {
    "BOOL": 8, "U8": 8, "I8": 8, "I16": 16, "U16": 16, "I32": 32, "U32": 32, "I64": 64, "U64": 64,
    "F4": 4, "F6_E2M3": 6, "F6_E3M2": 6, "F8_E4M3": 8, "F8_E5M2": 8, "F8_E8M0": 8,
    "F8_E4M3FNUZ": 8, "F8_E5M2FNUZ": 8, "F16": 16, "BF16": 16, "F32": 32, "F64": 64, "C64": 64,
}  # fmt: skip

HEADER_DTYPES: Final[dict[DType, HeaderDType]] = {"float32": "F32", "float16": "F16", "bfloat16": "BF16"}
"""Map from the name in `config.json` to the name in a safetensors header."""

CONFIG_DTYPES: Final[dict[HeaderDType, DType]] = {stored: name for name, stored in HEADER_DTYPES.items()}
"""Map from the name in a safetensors header to the name in `config.json`, for floats that can be merged."""

DTYPE_ALIASES: Final[dict[str, DType]] = {
    "bf16": "bfloat16",
    "fp16": "float16",
    "fp32": "float32",
    "half": "float16",
    "float": "float32",
}
"""Other spellings that the YAML key `dtype` and the option `--compute-dtype` accept beside the full names."""


def bytes_of(dtype: HeaderDType, shape: tuple[int, ...]) -> int | None:
    """Bytes that a tensor takes in a file; None where its bits do not fill whole bytes."""
    bits = BITS[dtype]
    for size in shape:
        bits *= size
    return None if bits % 8 else bits // 8
