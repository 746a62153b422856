"""Serve every `user/name` below a folder: `python -m tests.support.hub_server FOLDER [STORE]`."""

import argparse
import json
import sys
from collections import Counter, defaultdict
from pathlib import Path
from threading import Event

from tests.support.hub_server import Hub, User

TOKEN = "hf_tests"  # noqa: S105  it opens nothing but this server


def main() -> None:
    """Print the address and a token that may write everywhere, and serve until interrupted."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("store", type=Path, nargs="?", help="where uploads are kept; in memory if not given")
    parser.add_argument(
        "--unhashed", action="store_true", help="make up the hashes of the files, and believe those of uploads"
    )
    parser.add_argument(
        "--counts",
        action="store_true",
        help="answer every line on stdin with what went over the wire since the last, as JSON, and forget what was "
        "pushed; end with stdin",
    )
    options = parser.parse_args()
    hub = Hub(options.store)
    hub.trusts_uploads = options.unhashed
    for folder in sorted(path for path in options.folder.glob("*/*") if path.is_dir()):
        name = folder.relative_to(options.folder).as_posix()
        hub.add_folder(name, folder, hashed=not options.unhashed)
    served = set(hub.repositories)
    owners = {repository.namespace for repository in hub.repositories.values()}
    hub.users[TOKEN] = User("user", dict.fromkeys(sorted(owners - {"user"}), "admin"))
    with hub.running() as url:
        print(f"HF_ENDPOINT={url} HF_TOKEN={TOKEN} HF_HUB_DISABLE_XET=1", flush=True)
        if not options.counts:
            Event().wait()
        for _ in sys.stdin:
            print(json.dumps(counts(hub)), flush=True)
            hub.reset()
            for repo in hub.repositories.keys() - served:
                hub.remove(repo)


def counts(hub: Hub) -> dict[str, object]:
    """Bytes of each repository's files that were sent, of uploads that arrived, and requests and connections."""
    sent: dict[str, dict[str, int]] = defaultdict(dict)
    for (repo, path), count in hub.sent.items():
        sent[repo][path] = count
    return {
        "sent": sent,
        "received": hub.received_bytes(),
        "requests": Counter(call.host for call in hub.calls),
        "connections": hub.connections,
    }


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        sys.exit(130)
