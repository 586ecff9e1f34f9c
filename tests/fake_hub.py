"""A stand-in for the Hugging Face Hub on the loopback interface: what push_to_hub and from_pretrained need, no more.

A repository is a list of commits, each a whole map from path to content; branches and tags name commits. `Faults`
makes requests fail in the ways that networks and servers fail.

    python tests/fake_hub.py 8080
"""

import base64
import hashlib
import json
import re
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit

LARGE = (".safetensors", ".bin")  # files that travel by git-lfs; the others come inside the commit


@dataclass
class Repo:
    """One repository: commits from the oldest on, and names for some of them."""

    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)  # sha -> path -> content
    refs: dict[str, str] = field(default_factory=dict)  # branch or tag -> sha

    def __post_init__(self) -> None:
        self.commit("main", {})

    def commit(self, branch: str, files: dict[str, bytes]) -> str:
        content = [(path, hashlib.sha256(data).hexdigest()) for path, data in sorted(files.items())]
        sha = hashlib.sha1(repr((len(self.commits), content)).encode()).hexdigest()
        self.commits[sha] = files
        self.refs[branch] = sha
        return sha

    def sha(self, revision: str) -> str | None:
        return self.refs.get(revision) or (revision if revision in self.commits else None)


@dataclass
class Faults:
    """What goes wrong.

    Args:
        cut_upload_after (`int`, *optional*): the connection of a large upload ends after that many bytes.
        cut_download_of (`str`, *optional*): of a file with this ending only the first half is sent.
        status (`dict[str, int]`): path prefix to the HTTP status that answers every request below it.
    """

    cut_upload_after: int | None = None
    cut_download_of: str | None = None
    status: dict[str, int] = field(default_factory=dict)


class FakeHub(ThreadingHTTPServer):
    """The server and its state; `url` goes into HF_ENDPOINT."""

    daemon_threads = True

    def __init__(self, port: int = 0) -> None:
        super().__init__(("127.0.0.1", port), Handler)
        self.repos: dict[str, Repo] = {}
        self.blobs: dict[str, bytes] = {}  # sha256 -> content
        self.faults = Faults()
        self.requests: list[str] = []

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    def files(self, name: str, revision: str = "main") -> dict[str, bytes]:
        repo = self.repos[name]
        return repo.commits[repo.sha(revision) or ""]


class Refusal(Exception):
    """An answer that is no success; `code` is what huggingface_hub makes its exception of."""

    def __init__(self, status: int, message: str, code: str = "") -> None:
        super().__init__(message)
        self.status = status
        self.headers = {"X-Error-Code": code, "X-Error-Message": message} if code else {"X-Error-Message": message}


class Handler(BaseHTTPRequestHandler):
    """Answers one request by the first route that fits."""

    protocol_version = "HTTP/1.1"
    server: FakeHub

    def log_message(self, *arguments: object) -> None:
        self.server.requests.append(f"{self.command} {self.path}")

    def answer(self) -> None:
        path = unquote(urlsplit(self.path).path)
        try:
            for prefix, status in self.server.faults.status.items():
                if path.startswith(prefix):
                    self.body()  # or its bytes would be read as the next request
                    raise Refusal(status, f"{status} as asked for")
            for method, pattern, action in ROUTES:
                if self.command in method.split() and (match := re.fullmatch(pattern, path)):
                    return action(self, **match.groupdict())
            raise Refusal(404, f"the stand-in has no {self.command} {path}")
        except Refusal as refusal:
            self.send({"error": str(refusal)}, refusal.status, refusal.headers)
        except ConnectionResetError:
            self.close_connection = True  # without an answer

    do_GET = do_HEAD = do_POST = do_PUT = answer

    def body(self) -> bytes:
        length = int(self.headers.get("Content-Length") or 0)
        limit = self.server.faults.cut_upload_after
        if self.command == "PUT" and limit is not None and limit < length:
            self.rfile.read(limit)
            raise ConnectionResetError("cut as asked for")
        return self.rfile.read(length)

    def send(self, content: object, status: int = 200, headers: dict[str, str] | None = None) -> None:
        data = content if isinstance(content, bytes) else json.dumps(content).encode()
        kind = "application/octet-stream" if isinstance(content, bytes) else "application/json"
        self.send_response(status)
        for name, value in ({"Content-Type": kind, "Content-Length": str(len(data))} | (headers or {})).items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def repo(self, name: str) -> Repo:
        if name not in self.server.repos:
            raise Refusal(404, "Repository not found", "RepoNotFound")
        return self.server.repos[name]

    def files(self, name: str, revision: str) -> tuple[str, dict[str, bytes]]:
        """Return sha and files of a commit, a branch or a tag."""
        repo = self.repo(name)
        if (sha := repo.sha(revision)) is None:
            raise Refusal(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        return sha, repo.commits[sha]

    def who(self) -> None:
        token = {"type": "access_token", "accessToken": {"role": "write"}}
        self.send({"type": "user", "name": "me", "orgs": [], "auth": token})

    def create(self) -> None:
        asked = json.loads(self.body())
        name = f"{asked.get('organization') or 'me'}/{asked['name']}"
        known = name in self.server.repos
        self.server.repos.setdefault(name, Repo())
        self.send({"url": f"{self.server.url}/{name}", "name": name, "id": name}, 409 if known else 200)

    def check_yaml(self) -> None:
        self.body()
        self.send({"errors": [], "warnings": []})

    def branch(self, repo: str, name: str) -> None:
        self.body()
        self.repo(repo).refs.setdefault(name, self.repo(repo).refs["main"])
        self.send({})

    def tag(self, repo: str, revision: str) -> None:
        sha, _ = self.files(repo, revision)
        self.repo(repo).refs[json.loads(self.body())["tag"]] = sha
        self.send({})

    def preupload(self, repo: str, revision: str) -> None:
        asked = [file["path"] for file in json.loads(self.body())["files"]]
        modes = {path: "lfs" if path.endswith(LARGE) else "regular" for path in asked}
        self.send({"files": [{"path": p, "uploadMode": m, "shouldIgnore": False} for p, m in modes.items()]})

    def lfs_batch(self, repo: str) -> None:
        objects = json.loads(self.body())["objects"]
        for item in objects:
            if item["oid"] not in self.server.blobs:
                item["actions"] = {"upload": {"href": f"{self.server.url}/blob/{item['oid']}"}}
        self.send({"transfer": "basic", "objects": objects}, headers={"Content-Type": "application/vnd.git-lfs+json"})

    def put_blob(self, oid: str) -> None:
        data = self.body()
        if hashlib.sha256(data).hexdigest() != oid:
            raise Refusal(400, "content and hash differ")
        self.server.blobs[oid] = data
        self.send({})

    def commit(self, repo: str, revision: str) -> None:
        lines = [json.loads(line) for line in self.body().splitlines()]
        _, old = self.files(repo, revision)
        files = dict(old)
        for line in lines:
            value = line["value"]
            if line["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                files[value["path"]] = self.server.blobs[value["oid"]]
            elif line["key"] == "deletedFile":
                del files[value["path"]]
        sha = self.repo(repo).commit(revision, files)
        self.send({"success": True, "commitOid": sha, "commitUrl": f"{self.server.url}/{repo}/commit/{sha}"})

    def info(self, repo: str, revision: str | None = None) -> None:
        sha, files = self.files(repo, revision or "main")
        siblings = [{"rfilename": path} for path in files]
        self.send({"id": repo, "modelId": repo, "sha": sha, "private": False, "tags": [], "siblings": siblings})

    def tree(self, repo: str, revision: str, folder: str | None = None) -> None:
        _, files = self.files(repo, revision)
        inside = {path: data for path, data in files.items() if path.startswith(f"{folder}/" if folder else "")}
        if folder and not inside:
            raise Refusal(404, f"{folder} does not exist", "EntryNotFound")
        oids = {path: hashlib.sha1(data).hexdigest() for path, data in inside.items()}
        self.send([{"type": "file", "oid": oids[p], "size": len(data), "path": p} for p, data in inside.items()])

    def resolve(self, repo: str, revision: str, path: str) -> None:
        sha, files = self.files(repo, revision)
        if path not in files:
            raise Refusal(404, f"{path} does not exist", "EntryNotFound")
        data = files[path]
        headers = {"ETag": f'"{hashlib.sha256(data).hexdigest()}"', "X-Repo-Commit": sha}
        cut = self.server.faults.cut_download_of
        if cut and path.endswith(cut) and self.command == "GET":
            data = data[: len(data) // 2]
        self.send(data, headers=headers)


REPO = r"(?P<repo>[^/]+/[^/]+)"
REVISION = r"(?P<revision>[^/]+)"
ROUTES: list[tuple[str, str, Callable[..., None]]] = [
    ("GET", "/api/whoami-v2", Handler.who),
    ("POST", "/api/repos/create", Handler.create),
    ("POST", "/api/validate-yaml", Handler.check_yaml),
    ("POST", f"/api/models/{REPO}/branch/(?P<name>.+)", Handler.branch),
    ("POST", f"/api/models/{REPO}/tag/{REVISION}", Handler.tag),
    ("POST", f"/api/models/{REPO}/preupload/{REVISION}", Handler.preupload),
    ("POST", rf"/{REPO}\.git/info/lfs/objects/batch", Handler.lfs_batch),
    ("PUT", r"/blob/(?P<oid>\w+)", Handler.put_blob),
    ("POST", f"/api/models/{REPO}/commit/{REVISION}", Handler.commit),
    ("GET", f"/api/models/{REPO}/tree/{REVISION}(?:/(?P<folder>.*))?", Handler.tree),
    ("GET", f"/api/models/{REPO}(?:/revision/{REVISION})?", Handler.info),
    ("GET HEAD", f"/{REPO}/resolve/{REVISION}/(?P<path>.+)", Handler.resolve),
]


@contextmanager
def serving(port: int = 0) -> Iterator[FakeHub]:
    """Serve in a thread until the block ends."""
    hub = FakeHub(port)
    thread = threading.Thread(target=hub.serve_forever, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        hub.shutdown()
        hub.server_close()
        thread.join()


if __name__ == "__main__":
    with serving(int(sys.argv[1]) if len(sys.argv) > 1 else 0) as started:
        print(started.url, flush=True)
        threading.Event().wait()
