"""Have a merged model go on with a text, in OpenVINO: it is converted first, into memory.

python generate_openvino.py OUT TEXT
"""

import sys

from optimum.intel import OVModelForCausalLM
from transformers import AutoTokenizer

out, text = sys.argv[1:]
model = OVModelForCausalLM.from_pretrained(out, export=True)
tokenizer = AutoTokenizer.from_pretrained(out)
inputs = tokenizer(text, return_tensors="pt", return_token_type_ids=False)
print(tokenizer.decode(model.generate(**inputs, max_new_tokens=40)[0], skip_special_tokens=True))
