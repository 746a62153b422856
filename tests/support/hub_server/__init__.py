"""A small Hub on this machine: the parts of the Hub's protocol that reading and publishing a model use.

Read from the sources of two clients, huggingface_hub 0.36.2 and 2.4.0; what an answer holds beyond what they read is as
the Hub's public answers have it. Three hosts, told apart by their ports, as a token may go to the first alone:

hub
- `GET /api/whoami-v2`; tokens that read, write, or are fineGrained; organisations and roles in them
- `POST /api/repos/create`, `/api/validate-yaml`, `/api/models/{repo}/branch/{branch}`, `.../discussions`
- `GET /api/models` by author or a part of the name, `/api/models/{repo}`, `.../revision/{revision}`, `.../refs`,
  `.../commits/{revision}`, `.../discussions/{number}`, `.../auth-check`, `.../tree/{revision}/{folder}` in pages with a
  `Link` to the next; `POST .../paths-info/{revision}`
- `HEAD` and `GET /{repo}/resolve/{revision}/{path}`: `ETag`, `X-Repo-Commit`; files in LFS are redirected to the CDN,
  with `X-Linked-ETag` and `X-Linked-Size`
- `POST .../preupload/{revision}`, `/{repo}.git/info/lfs/objects/batch` and `verify`, `/api/complete_multipart`,
  `.../commit/{revision}` with all operations that the clients send, with `parentCommit`, and with `create_pr`
- errors with `X-Error-Code`: 401 and 404 for a repository that the caller may not see, 404 for a revision or a file
  that there is not, 401 and 403 for files of a gated repository, 403 for what the caller may not write, 409, 412

cdn: files in LFS, whole or a range, by addresses with a signature that expires

uploads: objects for LFS, whole (`basic`) or in parts (`multipart`), by addresses with a signature that expires

Not served: Xet, data sets and Spaces, search, tags, deleting or moving repositories, merging pull requests, compression,
the cache that the Hub redirects files outside LFS to, `git` itself.

What is to go wrong is said by `Hub.fail`, `limit_rate`, `break_off`, `misanswer`, `before` with `rewrite` or `replace`,
`expire_locations`, `corrupts_uploads`, `uploads_end_after`, and `storage_limits`.

Xet is not offered: no answer has `X-Xet-Hash` or `xetHash`, so that both clients download over HTTP. For uploads 0.36.2
asks for one of several transfers, and the answer names another. 2.4.0 does not ask: with hf_xet installed it uploads
paths and bytes by Xet whatever the server says, unless `HF_HUB_DISABLE_XET` is set; only open files go over HTTP anyway.

Guessed, since no client reads it: the status of a failed `verify` (422), and the ETag of a part (no MD5).
"""

from tests.support.hub_server.counting import Call, Request
from tests.support.hub_server.hub import Hub
from tests.support.hub_server.state import Blob, Commit, Content, Files, Repository, User

__all__ = ["Blob", "Call", "Commit", "Content", "Files", "Hub", "Repository", "Request", "User"]
