"""Have a merged model go on with a text, in vLLM.

python generate_vllm.py OUT TEXT
"""

import sys

from vllm import LLM, SamplingParams

if __name__ == "__main__":  # vLLM starts processes that import this file
    out, text = sys.argv[1:]
    model = LLM(out)
    print(text + model.generate([text], SamplingParams(temperature=0.0, max_tokens=40))[0].outputs[0].text)
