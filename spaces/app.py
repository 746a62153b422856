"""A Space of the Hub: names of models and prompts become a mixture in the visitor's own repository."""

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory

import gradio as gr
import yaml

NAME = re.compile(r"\w[\w.-]*/\w[\w.-]*(@[\w./-]+)?", re.ASCII)
"""A repository of the Hub, with a revision or without; folders of the Space are none."""
KEPT = ("PATH", "PYTHONPATH", "LANG", "HF_ENDPOINT", "HF_HUB_DISABLE_XET")
"""What moemerge sees of the Space's environment: none of its secrets."""
EXAMPLE = """\
mlabonne/AlphaMonarch-7B | Can you explain how vaccines work? | I had a bad day.
beowolx/CodeNinja-1.0-OpenChat-7B | Merge two lists in Python. | Why does this promise never resolve?
mlabonne/NeuralDaredevil-7B | What is the derivative of x^3 * sin(x)? | Is 221 a prime number?"""


def read_name(name: str) -> str:
    """The name of a repository, without blanks.

    Raises:
        gr.Error: it is none.
    """
    if not NAME.fullmatch(name.strip()):
        raise gr.Error(f"{name.strip()[:80]!r} is no repository of the Hub: expected user/name.")
    return name.strip()


def read_experts(text: str) -> list[dict[str, object]]:
    """The experts of a config, from lines of a model and its prompts.

    Raises:
        gr.Error: a line has no model, or no prompts.
    """
    experts: list[dict[str, object]] = []
    for line in filter(str.strip, text.splitlines()):
        model, *prompts = (part.strip() for part in line.split("|"))
        if not any(prompts):
            raise gr.Error(f"{model[:80]}: has no prompts; expected: user/name | a prompt | another prompt")
        experts.append({"source_model": read_name(model), "positive_prompts": [*filter(None, prompts)]})
    return experts


def run(arguments: list[str], base: str, experts: str, token: str | None) -> Iterator[str]:
    """What moemerge says while it works on a config, longer with each line; it ends when its reader leaves.

    Each run has a folder of its own, so that no visitor reads what another's token has opened.

    Raises:
        gr.Error: the config cannot be written.
    """
    config = {"base_model": read_name(base), "dtype": "bfloat16", "experts": read_experts(experts)}
    with TemporaryDirectory() as folder:
        Path(folder, "merge.yaml").write_text(yaml.safe_dump(config, sort_keys=False))
        environment = {name: os.environ[name] for name in KEPT if name in os.environ}
        environment |= {"HF_HOME": folder, "HF_HUB_DISABLE_PROGRESS_BARS": "1", "COLUMNS": "120"}
        environment |= {"HF_TOKEN": token} if token else {}
        with subprocess.Popen(
            [sys.executable, "-m", "moemerge", *arguments],
            cwd=folder,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        ) as process:
            try:
                said = ""
                for line in process.stdout or ():
                    said += line
                    yield said
            finally:
                process.terminate()


def plan(base: str, experts: str, token: gr.OAuthToken | None) -> Iterator[str]:
    """What a merge would make, and what it needs; a token opens gated models."""
    yield from run(["plan", "merge.yaml"], base, experts, token.token if token else None)


def merge(base: str, experts: str, repository: str, private: bool, token: gr.OAuthToken | None) -> Iterator[str]:
    """Merge, and send each shard to the visitor's repository when it is complete.

    Raises:
        gr.Error: no one has signed in, or the repository's name is none.
    """
    if token is None:
        raise gr.Error("Sign in first: the mixture goes to a repository of yours.")
    target = read_name(repository)
    push = ["--push", target, "--push-streaming", *["--private"] * private]
    yield from run(["merge.yaml", "mixture", "--stream", *push], base, experts, token.token)


def build() -> gr.Blocks:
    """The page; Gradio asks for the libraries of its sign-in as soon as it is made."""
    with gr.Blocks(title="moemerge") as page:
        gr.Markdown("# Merge fine-tunes of one model into a mixture of experts")
        gr.LoginButton()
        base_box = gr.Textbox("mlabonne/AlphaMonarch-7B", label="Base: attention, embeddings, tokenizer")
        experts_box = gr.Textbox(EXAMPLE, lines=5, label="Experts, one a line: model | prompt | another prompt")
        with gr.Row():
            repository_box = gr.Textbox(placeholder="user/mixture", label="Your repository")
            private_box = gr.Checkbox(label="Private")
        with gr.Row():
            plan_button, merge_button = gr.Button("Plan"), gr.Button("Merge and push", variant="primary")
        said_box = gr.Code(label="moemerge", language=None, lines=20, max_lines=20, interactive=False, wrap_lines=True)
        plan_button.click(plan, [base_box, experts_box], said_box)
        merge_button.click(merge, [base_box, experts_box, repository_box, private_box], said_box, concurrency_limit=1)
    return page


if __name__ == "__main__":
    build().launch()
