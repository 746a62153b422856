"""Quantise a merged model's linear layers with llm-compressor, experts and all, to a folder that vLLM reads.

python compress.py W8A8|FP8_DYNAMIC|W4A16 OUT COMPRESSED
"""

import sys

from llmcompressor import oneshot
from llmcompressor.modifiers.quantization import QuantizationModifier
from transformers import AutoModelForCausalLM, AutoTokenizer

scheme, out, compressed = sys.argv[1:]
model = AutoModelForCausalLM.from_pretrained(out, dtype="bfloat16")
recipe = QuantizationModifier(targets="Linear", scheme=scheme, ignore=["lm_head", r"re:.*(gate|router)$"])
oneshot(model=model, recipe=recipe)
model.save_pretrained(compressed)
AutoTokenizer.from_pretrained(out).save_pretrained(compressed)
