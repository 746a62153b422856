"""Fine-tune a merged model's attention, experts or gates, and say the loss on held-out text before and after.

python finetune.py attention|experts|gates OUT TRAIN_TEXT HELD_OUT_TEXT TUNED
"""

import re
import sys

import torch
from datasets import load_dataset
from peft import LoraConfig
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import SFTConfig, SFTTrainer

part, out, train, held_out, tuned = sys.argv[1:]
tokenizer = AutoTokenizer.from_pretrained(out)
model = AutoModelForCausalLM.from_pretrained(out, dtype="float32")
texts = load_dataset("text", data_files={"train": train, "held_out": held_out}, sample_by="paragraph")

adapter = None
if part == "attention":
    adapter = LoraConfig(task_type="CAUSAL_LM", r=16, target_modules=["q_proj", "k_proj", "v_proj", "o_proj"])
elif part == "experts":  # transformers 5 holds them in two tensors of a layer, which are no modules
    adapter = LoraConfig(
        task_type="CAUSAL_LM", r=8, target_modules=[], target_parameters=["experts.gate_up_proj", "experts.down_proj"]
    )
else:  # a few rows of weights: trained as they are
    for name, weight in model.named_parameters():
        weight.requires_grad_(bool(re.search(r"\.(gate|router)(\.wg|\.proj)?\.weight$", name)))

settings = SFTConfig(
    output_dir=f"{tuned}.work",
    learning_rate=1e-3 if adapter else 1e-2,
    max_steps=20,
    per_device_train_batch_size=4,
    max_length=128,
    packing=True,
    packing_strategy="wrapped",
    eval_packing=True,
    router_aux_loss_coef=0.0,  # which would pull all experts towards equal use
    save_strategy="no",
    report_to="none",
    logging_steps=10,
    bf16=torch.cuda.is_available(),
    use_cpu=not torch.cuda.is_available(),
    seed=0,
)
trainer = SFTTrainer(
    model,
    settings,
    train_dataset=texts["train"],
    eval_dataset=texts["held_out"],
    processing_class=tokenizer,
    peft_config=adapter,
)
before = trainer.evaluate()["eval_loss"]
trainer.train()
after = trainer.evaluate()["eval_loss"]
print(f"{part}: held-out loss {before:.3f} -> {after:.3f} nats per token")

model = trainer.model.merge_and_unload() if adapter else trainer.model
model.save_pretrained(tuned)
tokenizer.save_pretrained(tuned)
