"""What an interrupted merge and the one that resumes it must have in common."""

import hashlib
from dataclasses import asdict
from importlib.metadata import version
from typing import TYPE_CHECKING, Any, Final

from moemerge.checkpoint.computed import ComputedFile
from moemerge.checkpoint.derived import leaves
from moemerge.checkpoint.header import TensorInfo
from moemerge.planning.plan import MergePlan

if TYPE_CHECKING:
    from moemerge.checkpoint.files import File

CHOSEN: Final = "choice of shared weights"
"""The key of a fingerprint with the choice that was made for `shared_weights: auto`, if there was one."""


def plan_fingerprint(plan: MergePlan, seed: int) -> dict[str, Any]:
    """Values that decide every byte of the shards without routers; a resumed merge keeps them if all are equal."""
    used: dict[File, list[TensorInfo]] = {}
    for output in plan.outputs.values():
        for piece in output.pieces:
            if isinstance(piece.source, TensorInfo):
                for tensor in leaves(piece.source):
                    used.setdefault(tensor.path, []).append(tensor)
    headers = b"".join(shard.header for shard in plan.shards)
    made = [
        (name, piece.head_rows, piece.rotated_rows, _identity(piece.source.path))
        for name, output in plan.outputs.items()
        for piece in output.pieces
        if isinstance(piece.source, TensorInfo) and (isinstance(piece.source.path, ComputedFile) or piece.head_rows)
    ]
    return {
        "moemerge": version("moemerge"),
        "config": plan.config.model_dump(mode="json"),
        "seed": seed,
        "layout of the shards (--max-shard-size)": hashlib.sha256(headers).hexdigest(),
        "what is computed of the sources": hashlib.sha256(repr(made).encode()).hexdigest(),
        **({CHOSEN: asdict(plan.shared_choice)} if plan.shared_choice else {}),
        "sources": {
            str(path): plan.origins.fingerprint_of(path)
            | {"tensors": hashlib.sha256(repr(sorted(map(repr, tensors))).encode()).hexdigest()}
            for path, tensors in used.items()
        },
    }


def _identity(file: "File") -> str:
    return file.identity if isinstance(file, ComputedFile) else ""
