"""A server on loopback that speaks as much of the Hugging Face hub's protocol as downloads need."""

import hashlib
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

COMMIT = "c0ffee" + "0" * 34


class Hub(ThreadingHTTPServer):
    """Serves files by (repository, name); a number in place of the bytes is a status to answer."""

    def __init__(self, files: dict[tuple[str, str], bytes | int]) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.files = files
        self.cut_off: set[str] = set()  # repositories whose next download ends half way
        self.asked: list[str] = []
        threading.Thread(target=self.serve_forever, daemon=True).start()

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    def __exit__(self, *error: object) -> None:
        self.shutdown()
        super().__exit__(*error)


class Handler(BaseHTTPRequestHandler):
    server: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, *words: object) -> None:
        pass

    def do_HEAD(self) -> None:
        self.respond()

    def do_GET(self) -> None:
        self.respond()

    def respond(self) -> None:
        repository, _, rest = self.path.lstrip("/").partition("/resolve/")
        if not rest:
            return self.refuse(404, "")
        self.server.asked.append(f"{self.command} {repository}")
        content = self.server.files.get((repository, rest.partition("/")[2]))
        if content is None:
            known = any(repository == name for name, _ in self.server.files)
            return self.refuse(404, "EntryNotFound" if known else "RepoNotFound")
        if isinstance(content, int):
            return self.refuse(content, "GatedRepo" if content == 403 else "")
        first = int(self.headers.get("Range", "bytes=0-").removeprefix("bytes=").partition("-")[0])
        self.send_response(206 if first else 200)
        self.send_header("X-Repo-Commit", COMMIT)
        self.send_header("ETag", f'"{hashlib.sha256(content).hexdigest()}"')
        self.send_header("Content-Length", str(len(content) - first))
        if first:
            self.send_header("Content-Range", f"bytes {first}-{len(content) - 1}/{len(content)}")
        self.end_headers()
        if self.command == "GET":
            part = content[first:]
            if repository in self.server.cut_off:
                self.server.cut_off.discard(repository)
                part, self.close_connection = part[: len(part) // 2], True
            self.wfile.write(part)
        return None

    def refuse(self, status: int, code: str) -> None:
        self.send_response(status)
        if code:
            self.send_header("X-Error-Code", code)
        if code == "EntryNotFound":
            self.send_header("X-Repo-Commit", COMMIT)
        self.send_header("Content-Length", "0")
        self.end_headers()
