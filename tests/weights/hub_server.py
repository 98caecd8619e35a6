"""A hub on loopback that speaks the file protocol of huggingface.co, as far as the tests go.

with HubServer() as server:
    commit = server.add("owner/name", {"config.json": b"{}"})
    run(env={"HF_ENDPOINT": server.url})
"""

import base64
import dataclasses
import hashlib
import http.server
import json
import re
import threading
import urllib.parse


@dataclasses.dataclass
class Repository:
    """Commits (hash → files) and branches (name → hash)."""

    private: bool = False
    commits: dict[str, dict[str, bytes]] = dataclasses.field(default_factory=dict)
    branches: dict[str, str] = dataclasses.field(default_factory=dict)

    def commit(self, files: dict[str, bytes], branch: str = "main") -> str:
        """Adds files to what the branch holds."""
        whole = self.commits.get(self.branches.get(branch, ""), {}) | files
        text = repr([(len(self.commits), n, hashlib.sha1(c).hexdigest()) for n, c in whole.items()])
        name = hashlib.sha1(text.encode()).hexdigest()
        self.commits[name] = whole
        self.branches[branch] = name
        return name


class HubServer:
    """Runs in a thread between `__enter__` and `__exit__`.

    Attributes:
      repositories: "owner/name" → repository.
      requests: every request, "METHOD /path".
      tokens: every Authorization header that was sent.
      url: for HF_ENDPOINT.
    """

    def __init__(self) -> None:
        self.repositories: dict[str, Repository] = {}
        self.requests: list[str] = []
        self.tokens: set[str | None] = set()
        self.blobs: dict[str, bytes] = {}
        server = self

        class Handler(_Handler):
            hub = server

        self._server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_port}"

    def __enter__(self) -> "HubServer":
        self._thread = threading.Thread(target=self._server.serve_forever, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def stop(self) -> None:
        """Refuses connections from now on; a second call does nothing."""
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    def add(self, name: str, files: dict[str, bytes], branch: str = "main") -> str:
        """Commits files to a repository, which is made where it is missing."""
        return self.repositories.setdefault(name, Repository()).commit(files, branch)


class _Handler(http.server.BaseHTTPRequestHandler):
    hub: HubServer
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: object) -> None:
        pass

    def do_HEAD(self) -> None:
        self._answer()

    def do_GET(self) -> None:
        self._answer()

    def do_POST(self) -> None:
        self._answer()

    def do_PUT(self) -> None:
        self._answer()

    def _answer(self) -> None:
        path = urllib.parse.unquote(urllib.parse.urlparse(self.path).path)
        self.hub.requests.append(f"{self.command} {path}")
        self.hub.tokens.add(self.headers.get("Authorization"))
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        for pattern, method in (
            (r"/api/validate-yaml", self._validate),
            (r"/api/repos/create", self._create),
            (r"/api/models/([^/]+/[^/]+)/preupload/(.+)", self._preupload),
            (r"/api/models/([^/]+/[^/]+)/commit/(.+)", self._commit),
            (r"/([^/]+/[^/]+)\.git/info/lfs/objects/batch", self._batch),
            (r"/blobs/(\w+)", self._put),
            (r"/api/models/([^/]+/[^/]+)/tree/([^/]+).*", self._tree),
            (r"/api/models/([^/]+/[^/]+)/revision/(.+)", self._info),
            (r"/api/models/([^/]+/[^/]+)", self._info),
            (r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", self._file),
        ):
            match = re.fullmatch(pattern, path)
            if match:
                method(body, *match.groups())
                return
        self._send(b"", status=404)

    def _send(self, content: bytes, *, status: int = 200, **headers: str) -> None:
        self.send_response(status)
        headers.setdefault("Content_Length", str(len(content)))
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def _json(self, value: object, status: int = 200) -> None:
        self._send(json.dumps(value).encode(), status=status, Content_Type="application/json")

    def _found(self, name: str, revision: str) -> tuple[str, dict[str, bytes]] | None:
        repository = self.hub.repositories.get(name)
        if repository is None:
            self._send(b"{}", status=404, X_Error_Code="RepoNotFound")
            return None
        commit = repository.branches.get(revision, revision)
        if commit not in repository.commits:
            self._send(b"{}", status=404, X_Error_Code="RevisionNotFound")
            return None
        return commit, repository.commits[commit]

    def _validate(self, _: bytes) -> None:
        self._json({"errors": [], "warnings": []})

    def _create(self, body: bytes) -> None:
        asked = json.loads(body)
        name = f"{asked['organization']}/{asked['name']}"
        url = f"{self.hub.url}/{name}"
        if name in self.hub.repositories:
            self._json({"error": "You already created this model repo", "url": url}, status=409)
            return
        private = asked.get("private") or asked.get("visibility") == "private"
        repository = self.hub.repositories[name] = Repository(private=private)
        repository.commit({})
        self._json({"url": url, "name": name, "id": name})

    def _preupload(self, body: bytes, name: str, revision: str) -> None:
        if self._found(name, revision) is None:
            return
        answers = [
            {
                "path": file["path"],
                "uploadMode": "lfs"
                if file["path"].endswith((".safetensors", ".pth"))
                else "regular",
                "shouldIgnore": False,
                "oid": None,
            }
            for file in json.loads(body)["files"]
        ]
        self._json({"files": answers})

    def _batch(self, body: bytes, name: str) -> None:
        objects = [
            {
                "oid": blob["oid"],
                "size": blob["size"],
                "actions": {"upload": {"href": f"{self.hub.url}/blobs/{blob['oid']}"}},
            }
            for blob in json.loads(body)["objects"]
        ]
        self._json({"transfer": "basic", "objects": objects})

    def _put(self, body: bytes, oid: str) -> None:
        assert hashlib.sha256(body).hexdigest() == oid
        self.hub.blobs[oid] = body
        self._send(b"")

    def _commit(self, body: bytes, name: str, revision: str) -> None:
        if self._found(name, revision) is None:
            return
        files = {}
        for line in body.splitlines():
            entry = json.loads(line)
            value = entry["value"]
            if entry["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif entry["key"] == "lfsFile":
                files[value["path"]] = self.hub.blobs[value["oid"]]
        commit = self.hub.repositories[name].commit(files, revision)
        url = f"{self.hub.url}/{name}/commit/{commit}"
        self._json({"success": True, "commitOid": commit, "commitUrl": url})

    def _info(self, _: bytes, name: str, revision: str = "main") -> None:
        found = self._found(name, revision)
        if found is not None:
            commit, files = found
            siblings = [{"rfilename": path} for path in files]
            self._json({"id": name, "modelId": name, "sha": commit, "siblings": siblings})

    def _tree(self, _: bytes, name: str, revision: str) -> None:
        found = self._found(name, revision)
        if found is not None:
            entries = [
                {"type": "file", "path": p, "size": len(c), "oid": hashlib.sha1(c).hexdigest()}
                for p, c in found[1].items()
            ]
            self._json(entries)

    def _file(self, _: bytes, name: str, revision: str, path: str) -> None:
        found = self._found(name, revision)
        if found is None:
            return
        commit, files = found
        if path not in files:
            self._send(b"", status=404, X_Error_Code="EntryNotFound", X_Repo_Commit=commit)
            return
        etag = f'"{hashlib.sha1(files[path]).hexdigest()}"'
        self._send(files[path], X_Repo_Commit=commit, ETag=etag)
