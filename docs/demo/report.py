"""What the demo's merge gained: held-out loss of base, experts and mixture in each domain, and what the mixture writes.

python docs/demo/report.py MODELS MERGED
"""

import json
import sys
from pathlib import Path
from typing import Final

import torch
from build import HELD_OUT, SEQUENCE, pack
from rich.console import Console
from rich.table import Table
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel
from transformers.utils import logging

SEQUENCES: Final = 128  # of each domain
PROMPTS: Final = {
    "python": "    def read_file(self, path):\n",
    "english": "This function returns the",
    "cpp": "template <typename T>\n",
}


@torch.inference_mode()
def loss(model: PreTrainedModel, sequences: torch.Tensor) -> float:
    """Mean loss in nats per token of sequences (sequence, position)."""
    losses = [model(input_ids=batch, labels=batch, use_cache=False).loss * len(batch) for batch in sequences.split(16)]
    return float(sum(losses)) / len(sequences)


def main(models: Path, merged: Path) -> None:
    """Print the table and the samples."""
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    tokenizer = AutoTokenizer.from_pretrained(merged)
    held_out = {}
    for domain, texts in json.loads((models / HELD_OUT).read_text(encoding="utf-8")).items():
        sequences = pack(tokenizer, texts)
        held_out[domain] = sequences[:: max(1, len(sequences) // SEQUENCES)][:SEQUENCES]  # from all the files
    table = Table("held-out loss", *held_out, "mean", box=None, padding=(0, 2, 0, 0))
    folders = {"base": models / "base", **{f"{name} expert": models / name for name in held_out}, "merged": merged}
    for title, folder in folders.items():
        model = AutoModelForCausalLM.from_pretrained(folder).eval()
        losses = [loss(model, sequences) for sequences in held_out.values()]
        table.add_row(title, *(f"{value:.3f}" for value in losses), f"{sum(losses) / len(losses):.3f}")
    console = Console(highlight=False, markup=False, soft_wrap=True)
    tokens = sum(map(len, held_out.values())) * (SEQUENCE - 1)
    console.print(f"\nNats per token on {tokens} tokens of files that no model was trained on; lower is better.\n")
    console.print(table)
    console.print("\nWhat the merged model writes. Models so small know words, not sense.")
    torch.manual_seed(0)
    for domain, prompt in PROMPTS.items():
        ids = tokenizer(prompt, return_tensors="pt", return_token_type_ids=False)
        written = model.generate(**ids, max_new_tokens=48, do_sample=True, temperature=0.7, top_k=40)
        console.print(f"\n--- {domain}\n{tokenizer.decode(written[0], skip_special_tokens=True)}")


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
