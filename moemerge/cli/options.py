"""Options that several commands have, single ones and groups of them."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from types import MappingProxyType
from typing import Annotated, Any, ClassVar, Final, Literal, get_args

import typer

from moemerge.chats import COUNTED_ROLES, ROLES
from moemerge.dtypes import DTYPE_ALIASES, ComputeDtype
from moemerge.errors import RefusedError

MODELS: Final = "Models"
MESSAGES: Final = "Messages"
Config = Annotated[
    Path,
    typer.Argument(metavar="CONFIG", help="The merge config, a YAML file; - for standard input.", show_default=False),
]
ShardSize = Annotated[
    str | None,
    typer.Option(metavar="SIZE", help="Largest shard, such as 500MB. [default: 5GB]", show_default=False),
]
CacheDir = Annotated[
    Path | None,
    typer.Option(
        metavar="FOLDER",
        help="Where Hub models are kept, instead of HF_HUB_CACHE.",
        show_default=False,
        rich_help_panel=MODELS,
    ),
]
AllowIdentical = Annotated[
    bool,
    typer.Option(
        "--allow-identical-experts",
        help="Accept experts that are all the same model, to be trained further.",
        rich_help_panel=MODELS,
    ),
]
For = Annotated[
    str | None,
    typer.Option(
        "--for",
        metavar="ENGINE",
        help="Refuse what this engine would get wrong, in place of the config's engine: transformers, vllm, llama.cpp, "
        "llama.cpp-converter, mlx, openvino.",
        show_default=False,
    ),
]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="Print only warnings and errors.", rich_help_panel=MESSAGES)]
Verbose = Annotated[
    int,
    typer.Option(
        "--verbose",
        "-v",
        count=True,
        help="Print more: routing by layer, and what moemerge logs.",
        show_default=False,
        rich_help_panel=MESSAGES,
    ),
]
Debug = Annotated[
    bool,
    typer.Option("--debug", help="Show tracebacks, and what every library logs.", rich_help_panel=MESSAGES),
]
Json = Annotated[
    bool,
    typer.Option("--json", help="Print the result as JSON.", rich_help_panel=MESSAGES),
]
Push = Annotated[
    str | None,
    typer.Option(
        metavar="REPO", help="Send the model to the Hub, to user/name, when it is complete.", show_default=False
    ),
]
PushStreaming = Annotated[
    bool,
    typer.Option(
        "--push-streaming",
        help="Send each shard to the Hub when it is complete, and remove it here: OUT is not written.",
    ),
]
Private = Annotated[bool, typer.Option("--private", help="Make a new repository private.")]
Revision = Annotated[
    str | None,
    typer.Option(metavar="BRANCH", help="Push to a branch, or to a pull request as refs/pr/N.", show_default=False),
]
CreatePr = Annotated[bool, typer.Option("--create-pr", help="Propose the model in a pull request.")]
License = Annotated[
    str | None,
    typer.Option(
        metavar="NAME",
        show_default=False,
        help='The model\'s licence, as the Hub calls it, such as apache-2.0, or "other NAME LINK".',
    ),
]


def _one_device(given: str) -> str:
    if "," in given:
        raise typer.BadParameter(f"{given[:60]!r}: this command runs on one device.")
    return given


Device = Annotated[
    str,
    typer.Option(
        metavar="DEVICE", parser=_one_device, help="Device that runs the model: auto, cpu, cuda, cuda:1 or mps."
    ),
]


def devices_option(runs: str) -> Any:
    """Make the option `--device`, or `--devices`, with what is run at the beginning of its help."""
    return typer.Option(
        "--device",
        "--devices",
        metavar="DEVICE",
        help=f"{runs}: auto, cpu, cuda, cuda:1 or mps; or several that share the text, such as cuda:0,cuda:1.",
    )


Devices = Annotated[str, devices_option("Device that runs the model")]


def ray_option(what: str) -> Any:
    """The option for a Ray cluster; `what` is done in its processes."""
    where = "local begins one on this machine, auto finds the one that it belongs to, HOST:PORT leads to another one"
    return typer.Option(metavar="ADDRESS", show_default=False, help=f"{what}: {where}.")


def workers_option(default: str) -> Any:
    """The option for how many processes; `default` says how many there are without it."""
    return typer.Option(metavar="N", min=1, show_default=False, help=f"How many. [default: {default}]")


Ray = Annotated[str | None, ray_option("Share the text out to processes of a Ray cluster")]
Workers = Annotated[int | None, workers_option("one for each GPU, or CPU")]
_Type = Literal[
    "auto", "f32", "f16", "bf16", "q8_0", "q6_k", "q5_k_m", "q5_k_s", "q5_1", "q5_0", "q4_k_m", "q4_k_s", "q4_1",
    "q4_0", "iq4_nl", "iq4_xs", "q3_k_l", "q3_k_m", "q3_k_s", "iq3_m", "iq3_s", "iq3_xs", "iq3_xxs", "q2_k",
    "q2_k_s", "iq2_m", "iq2_s", "iq2_xs", "iq2_xxs", "iq1_m", "iq1_s", "tq2_0", "tq1_0", "mxfp4_moe",
]  # fmt: skip
GGUF_TYPES: Final[tuple[str, ...]] = get_args(_Type)


ChatRoles = Annotated[
    str, typer.Option(metavar="ROLES", help="Roles whose messages count in chats; the rest of a chat is only read.")
]
ROLES_OF_CHATS: Final = ",".join(COUNTED_ROLES)
"""The default of `ChatRoles`."""


def named_roles(given: str) -> tuple[str, ...]:
    """Roles between commas.

    Raises:
        RefusedError: one of them is none.
    """
    named = tuple(dict.fromkeys(role.strip() for role in given.split(",")))
    for role in named:
        if role not in ROLES:
            raise RefusedError(f"--chat-roles: {role[:60]!r} is not a role; known: {', '.join(ROLES)}.")
    return named


def one_of(names: Sequence[str], aliases: Mapping[str, str] = MappingProxyType({})) -> Callable[[str], str]:
    """Make a parser that accepts one of `names`, in any case, or an alias that stands for one.

    The parser raises typer.BadParameter for any other, with the nearest name, or with all of them.
    """

    def read(given: str) -> str:
        name = aliases.get(given.lower(), given.lower())
        if name in names:
            return name
        near = get_close_matches(name[:60], names, n=1)
        known = f"did you mean {near[0]}?" if near else f"known: {', '.join(names)}."
        raise typer.BadParameter(f"{given[:60]!r} is not known; {known}")

    return read


def compute_option(help_text: str) -> Any:
    """Make the option `--compute-dtype`, with a help text of its own."""
    return typer.Option("--compute-dtype", metavar="DTYPE", parser=_compute_dtype, help=help_text)


def _compute_dtype(given: str) -> str:
    names = get_args(ComputeDtype)
    if DTYPE_ALIASES.get(given.lower(), given.lower()) == "float16":  # far from what bfloat16 is, though alike in name
        raise typer.BadParameter(f"{given!r}: no model is run in float16; known: {', '.join(names)}.")
    return one_of(names, DTYPE_ALIASES)(given)


ComputeIn = Annotated[
    ComputeDtype,
    compute_option(
        "What models are run in: float32, bfloat16, or auto: on a CPU the faster one by a short trial, else bfloat16."
    ),
]
GgufType = Annotated[
    _Type,
    typer.Option(
        "--type",
        metavar="TYPE",
        parser=one_of(GGUF_TYPES),
        help="Type of a GGUF file's matrices: f32, f16, bf16, q8_0, or one that llama.cpp makes, such as q4_k_m; auto "
        "is the merge's own 16-bit floats, else f16.",
    ),
]
LlamaCpp = Annotated[
    Path | None,
    typer.Option(
        metavar="PATH",
        show_default=False,
        help="A checkout of llama.cpp, whose converter reads a tokenizer that moemerge does not know.",
    ),
]


@dataclass(frozen=True)
class ModelOptions:
    """Options for which models may be merged, for which engine, and where they are kept."""

    heading: ClassVar[str] = MODELS

    cache_dir: CacheDir = None
    allow_identical_experts: AllowIdentical = False
    engine: For = None


@dataclass(frozen=True)
class MessageOptions:
    """Options for how much a command prints."""

    heading: ClassVar[str] = MESSAGES

    quiet: Quiet = False
    debug: Debug = False


@dataclass(frozen=True)
class ResultOptions:
    """Options for how a command prints its result, and how much else."""

    heading: ClassVar[str] = MESSAGES

    json: Json = False
    quiet: Quiet = False
    debug: Debug = False


@dataclass(frozen=True)
class VerboseOptions:
    """Options for how a command with `--verbose` prints its result, and how much else."""

    heading: ClassVar[str] = MESSAGES

    json: Json = False
    quiet: Quiet = False
    verbose: Verbose = 0
    debug: Debug = False


def check_processes(ray: str | None, workers: int | None, device: str = "auto") -> None:
    """Refuse options for the processes of a cluster that cannot be followed, before models are opened.

    Raises:
        RefusedError: says what is expected; or Ray is not installed, or no cluster can be at its address.
    """
    if workers and ray is None:
        raise RefusedError("--workers: needs --ray. Add `--ray local` for processes on this machine.")
    if ray and "," in device:
        raise RefusedError(f"--devices {device}: each process of --ray has one device. Name one, or leave out --ray.")
    if ray and device.partition(":")[2] not in {"", "0"}:  # Ray shows each process its own GPU alone
        raise RefusedError(f"--device {device}: each process of --ray sees one GPU. Write {device.partition(':')[0]}.")
    if ray:
        from moemerge.joining import check_address, import_ray

        import_ray()
        check_address(ray)


def check_text(place: str, text: str) -> None:
    """Check a text of the command line, whose bytes Python keeps even if they are not UTF-8.

    Raises:
        RefusedError: they are not.
    """
    if text.encode(errors="replace").decode() != text:
        raise RefusedError(f"{place} holds bytes that are not UTF-8. Write it in UTF-8.")
