"""Commands of an installed moemerge, run over the demo's models where there are some, else over tiny ones.

python -m tests.support.installed .venv-wheel .cache/dist
"""

import subprocess
import sys
from pathlib import Path

from tests.support.models import make_model, write_config

ROOT = Path(__file__).parents[2]
DEMO = ROOT / ".cache" / "demo"


def config_in(folder: Path) -> Path:
    """The demo's config, or one of tiny models that are made in a folder."""
    if (DEMO / "held_out.json").exists():
        return ROOT / "configs" / "demo.yaml"
    base, *experts = (
        make_model(folder / name, seed, tuned_from=0) for seed, name in enumerate(("base", "fox", "code"))
    )
    return write_config(folder / "merge.yaml", base, experts)


def main(environment: Path, folder: Path) -> None:
    """Merge, verify, inspect, and write the page of routes, each by the environment's own command.

    Raises:
        CalledProcessError: one of them failed.
    """
    python, command = environment / "bin" / "python", environment / "bin" / "moemerge"
    # Isolated: not from the folder that this runs in.
    place = "import moemerge; print(moemerge.__file__, moemerge.__version__)"
    found = subprocess.run([python, "-I", "-c", place], check=True, capture_output=True, text=True).stdout
    if not found.startswith(str(environment.absolute())):
        sys.exit(f"moemerge is imported from {found}, not from {environment}.")
    config, out = config_in(folder), folder / "out"
    commands: tuple[list[str | Path], ...] = (
        [config, out, "--overwrite"],
        ["verify", out, "--against", config],
        ["inspect", out, "--values"],
        ["routes", out, "--text", "def main(argv): return argv", "--html", folder / "routes.html", "-q"],
    )
    for arguments in commands:
        subprocess.run([command, *arguments], check=True, cwd=ROOT)
    print(found.strip())


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]).absolute())
