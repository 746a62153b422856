"""Losses of one engine on windows of tokens, to compare engines on a real mixture.

    ENGINE'S PYTHON losses.py ENGINE MODEL WINDOWS.json

MODEL is a folder, or for llama.cpp a GGUF file; WINDOWS.json holds lists of equally many tokens. What is printed is the
engine's version, and the mean loss of each window in nats per token.
"""

import importlib
import json
import sys
from pathlib import Path

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parent))
    engine, model, windows = sys.argv[1:]
    module = importlib.import_module(f"{engine}_engine")
    found = module.losses(Path(model), json.loads(Path(windows).read_text()))
    sys.stdout.write(json.dumps({"engine": module.version(), "losses": found}) + "\n")
