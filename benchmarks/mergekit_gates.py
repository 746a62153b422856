"""The gates that mergekit-moe itself computes for a config, for comparison; run by the Python that has mergekit.

python benchmarks/mergekit_gates.py CONFIG GATES.pt
"""

import sys
from pathlib import Path

import torch
import yaml
from mergekit.common import ModelReference
from mergekit.moe.config import Expert
from mergekit.moe.router import get_gate_params
from transformers import AutoTokenizer

config_path, gates_path = sys.argv[1:]
config = yaml.safe_load(Path(config_path).read_text(encoding="utf-8"))
tokenizer = AutoTokenizer.from_pretrained(config["base_model"])
# As its command does: mergekit/scripts/moe.py.
tokenizer.padding_side = "left"
tokenizer.pad_token_id = tokenizer.bos_token_id
if tokenizer.pad_token_id is None:
    tokenizer.pad_token = tokenizer.eos_token
gates = get_gate_params(
    ModelReference.parse(config["base_model"]),
    tokenizer,
    [Expert.model_validate(expert) for expert in config["experts"]],
    mode="hidden",
    device="cpu",
)
torch.save(gates.float(), gates_path)  # (layer, expert, hidden)
