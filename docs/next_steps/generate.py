"""Have a merged model go on with a text.

python generate.py OUT TEXT
"""

import sys

from transformers import AutoModelForCausalLM, AutoTokenizer

out, text = sys.argv[1:]
model = AutoModelForCausalLM.from_pretrained(out, dtype="auto", device_map="auto")
tokenizer = AutoTokenizer.from_pretrained(out)
inputs = tokenizer(text, return_tensors="pt", return_token_type_ids=False).to(model.device)
print(tokenizer.decode(model.generate(**inputs, max_new_tokens=40)[0], skip_special_tokens=True))
