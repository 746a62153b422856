"""Quantise a merged model in memory, and say how large it is then and what it predicts of a text.

python quantise.py none|nf4|nf4+experts|int8|int8+experts OUT TEXT
"""

import sys
from pathlib import Path

import torch
from bitsandbytes.nn.parametrize import replace_parameter_4bit
from torchao.quantization import FqnToConfig, Int8WeightOnlyConfig
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig, TorchAoConfig

EXPERTS = ("gate_up_proj", "down_proj")  # of a layer, all in one tensor each, under transformers 5
INT8 = Int8WeightOnlyConfig()


def stored(tensor: torch.Tensor) -> dict[int, int]:
    """Bytes that a tensor takes, by address, those of its scales among them."""
    if hasattr(tensor, "__tensor_flatten__"):
        parts = [getattr(tensor, name) for name in tensor.__tensor_flatten__()[0]]
        return {address: size for part in parts for address, size in stored(part).items()}
    return {tensor.data_ptr(): tensor.nbytes}


method, out, text = sys.argv[1:]
settings = {
    "none": {},
    "nf4": {"quantization_config": BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")},
    "int8": {"quantization_config": TorchAoConfig(INT8)},
    "int8+experts": {
        "quantization_config": TorchAoConfig(
            FqnToConfig({"_default": INT8, **{rf"re:.*experts\.{name}": INT8 for name in EXPERTS}})
        ),
        "experts_implementation": "eager",  # the others need operations that torchao's tensors lack
    },
}
settings["nf4+experts"] = settings["nf4"]
model = AutoModelForCausalLM.from_pretrained(out, dtype="bfloat16", **settings[method])
if method == "nf4+experts":
    for name, module in list(model.named_modules()):
        if name.endswith(".experts"):
            for part in EXPERTS:
                replace_parameter_4bit(module, part, quant_type="nf4")

sizes = {address: size for tensor in model.state_dict().values() for address, size in stored(tensor).items()}
tokens = AutoTokenizer.from_pretrained(out)(Path(text).read_text(), return_tensors="pt").input_ids[:, :512]
with torch.no_grad():
    loss = model(tokens, labels=tokens).loss
print(f"{method}: {sum(sizes.values()) / 1e6:.1f} MB, loss {loss:.3f}")
