"""Serve every `user/name` below a folder: `python -m tests.hub_server FOLDER [STORE]`."""

import argparse
import sys
from pathlib import Path
from threading import Event

from tests.hub_server import Hub, User

TOKEN = "hf_tests"  # noqa: S105  it opens nothing but this server


def main() -> None:
    """Print the address and a token that may write everywhere, and serve until interrupted."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("store", type=Path, nargs="?", help="where uploads are kept; in memory if not given")
    options = parser.parse_args()
    hub = Hub(options.store)
    for folder in sorted(path for path in options.folder.glob("*/*") if path.is_dir()):
        hub.add_folder(folder.relative_to(options.folder).as_posix(), folder)
    owners = {repository.namespace for repository in hub.repositories.values()}
    hub.users[TOKEN] = User("user", dict.fromkeys(sorted(owners - {"user"}), "admin"))
    with hub.running() as url:
        print(f"HF_ENDPOINT={url} HF_TOKEN={TOKEN} HF_HUB_DISABLE_XET=1", flush=True)
        Event().wait()


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        sys.exit(130)
