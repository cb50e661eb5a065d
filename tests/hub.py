"""A stand-in for the hub on loopback: folders ``models/<name>`` and ``datasets/<name>`` as repositories.

It answers what huggingface_hub, transformers and datasets ask when they read. A changed folder is a new commit, and
older ones are gone, as after a rewritten history. ``name@v1`` is the revision v1 of ``name``.
"""

import hashlib
import json
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit


class Hub:
    """The server, running. ``renamed`` maps old names to new ones; of what is in ``gated`` nothing but the description
    may be read without ``token``."""

    def __init__(self, root: Path) -> None:
        self.root, self.asked = root, list[str]()
        self.renamed: dict[str, str] = {}
        self.gated: set[str] = set()
        self.token = ""
        self.trouble: tuple[str, int] = ("", 0)  # a pattern of addresses; the status that they get, 0: no answer
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), type("Bound", (_Handler,), {"hub": self}))
        self._server.daemon_threads = True
        self.address = f"http://127.0.0.1:{self._server.server_address[1]}"
        self.over = threading.Event()
        threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True).start()

    def folder(self, kind: str, name: str) -> Path:
        """That of a repository, made if need be. ``kind``: "models" or "datasets"."""
        folder = self.root / kind / name
        folder.mkdir(parents=True, exist_ok=True)
        return folder

    def commit(self, kind: str, name: str) -> str:
        """The commit of a repository now."""
        held = [f"{n}:{_sha(path)}" for n, path in self._files(self.root / kind / name).items()]
        return hashlib.sha1("\n".join([kind, name.partition("@")[0], *held]).encode()).hexdigest()

    def close(self) -> None:
        self.over.set()
        self._server.shutdown()
        self._server.server_close()

    def at(self, kind: str, name: str, revision: str) -> tuple[str, dict[str, Path]] | None:
        """The commit and the files of a revision, if there is one."""
        here = self.root / kind / name
        for folder in (here, *here.parent.glob(f"{here.name}@*")):
            commit = self.commit(kind, f"{here.parent.name}/{folder.name}")
            if revision in (folder.name.partition("@")[2] or "main", commit):
                return commit, self._files(folder)
        return None

    @staticmethod
    def _files(folder: Path) -> dict[str, Path]:
        return {p.relative_to(folder).as_posix(): p for p in sorted(folder.rglob("*")) if p.is_file()}


class _Handler(BaseHTTPRequestHandler):
    protocol_version, hub = "HTTP/1.1", None

    def do_GET(self) -> None:
        hub: Any = self.hub
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0)).decode()
        address = urlsplit(self.path)
        path, query = unquote(address.path), parse_qs(address.query)
        hub.asked.append(f"{self.command} {path}")
        pattern, status = hub.trouble
        if pattern and re.search(pattern, path):
            if status:
                return self._say({"error": "trouble"}, status)
            hub.over.wait(60)
            self.close_connection = True
            return None
        api = re.fullmatch(r"/api/(models|datasets)/(.+?)(?:/(revision|tree|paths-info)/([^/]+)(?:/(.*))?)?", path)
        file = re.fullmatch(r"/(datasets/)?(.+?)/resolve/([^/]+)/(.+)", path)
        if not (api or file):
            return self._say({}, 404)
        kind, name = (api[1], api[2]) if api else ("datasets" if file[1] else "models", file[2])
        if name in hub.renamed:
            return self._say(None, 307, Location=self.path.replace(name, hub.renamed[name], 1))
        revision = (api[4] if api else file[3]) or "main"
        if not (hub.root / kind / name).is_dir():
            return self._say({}, 401, code="RepoNotFound")
        if not (found := hub.at(kind, name, revision)):
            return self._say({}, 404, code="RevisionNotFound")
        commit, files = found
        allowed = hub.token and self.headers.get("Authorization") == f"Bearer {hub.token}"
        if name in hub.gated and not allowed and not (api and api[3] in (None, "revision")):
            return self._say({}, 401, code="GatedRepo")
        if file:
            return self._file(files.get(file[4]), commit)
        if api[3] == "tree":
            return self._tree(files, (api[5] or "").strip("/"), query.get("recursive", [""])[0].lower() == "true")
        if api[3] == "paths-info":
            wanted = parse_qs(body).get("paths", [])
            return self._say([_entry(n, p) for n, p in files.items() if n in wanted])
        held = [{"rfilename": n} for n in files]
        facts = {"id": name, "sha": commit, "siblings": held, "gated": "manual" if name in hub.gated else False}
        return self._say(facts | {"private": False, "downloads": 0, "likes": 0, "tags": []})

    do_HEAD = do_POST = do_GET

    def _file(self, path: Path | None, commit: str) -> None:
        if path is None:
            return self._say({}, 404, code="EntryNotFound")
        content, status, more = path.read_bytes(), 200, {}
        if part := re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range") or ""):
            first, last = int(part[1]), int(part[2] or len(content) - 1)
            more = {"Content-Range": f"bytes {first}-{last}/{len(content)}"}
            content, status = content[first : last + 1], 206
        tag = {"ETag": f'"{_sha(path)}"', "X-Repo-Commit": commit, "Accept-Ranges": "bytes"}
        return self._send(content, status, {**tag, **more})

    def _tree(self, files: dict[str, Path], below: str, recursive: bool) -> None:
        inside = {n: p for n, p in files.items() if not below or n.startswith(f"{below}/")}
        if not inside:
            return self._say({}, 404, code="EntryNotFound")
        depth = below.count("/") + 1 if below else 0
        entries = [_entry(n, p) for n, p in inside.items() if recursive or n.count("/") == depth]
        above = {"/".join(n.split("/")[: depth + 1]) for n in inside if n.count("/") > depth}
        return self._say([*({"type": "directory", "oid": "0" * 40, "size": 0, "path": f} for f in above), *entries])

    def _say(self, content: Any, status: int = 200, code: str = "", **headers: str) -> None:
        headers |= {"X-Error-Code": code, "X-Error-Message": code} if code else {}
        self._send(json.dumps(content).encode(), status, headers)

    def _send(self, content: bytes, status: int, headers: dict[str, str]) -> None:
        self.send_response(status)
        for key, value in {**headers, "Content-Length": str(len(content))}.items():
            self.send_header(key, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def log_message(self, *_: Any) -> None:
        pass


def _sha(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _entry(name: str, path: Path) -> dict[str, Any]:
    size, sha = path.stat().st_size, _sha(path)
    return {
        "type": "file",
        "oid": sha[:40],
        "size": size,
        "path": name,
        "lfs": {"oid": sha, "size": size, "pointerSize": 1},
    }
