"""A server on this machine that answers as the Hugging Face Hub does: files with ranges, and what it takes to publish.

    root/ORG/NAME/...          the repository's branch main
    root/ORG/NAME@REVISION/... another revision of it
"""
import base64
import hashlib
import http.server
import json
import re


def commit_of(revision):
    return hashlib.sha1(revision.encode()).hexdigest()


def handler(root, requests, drops):
    """requests: a list that every request is added to. drops: file -> how many of its downloads break off."""
    objects = {}

    class Handler(http.server.BaseHTTPRequestHandler):
        def repository(self, name, revision):
            for folder in root.glob(f"{name}*"):
                known = folder.name.partition("@")[2] or "main"
                if folder.name.partition("@")[0] == name.split("/")[1] and revision in (known, commit_of(known)):
                    return folder, commit_of(known)
            return None, None

        def do_HEAD(self):
            match = re.fullmatch(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", self.path)
            name, revision, file = match.groups()
            requests.append(f"{self.command} {file}" + (f" {self.headers['Range']}" if "Range" in self.headers else ""))
            folder, commit = self.repository(name, revision)
            content = (folder / file).read_bytes() if folder and (folder / file).is_file() else None
            if content is None:
                self.send_response(404)
                code = "EntryNotFound" if folder else "RevisionNotFound" if (root / name).is_dir() else "RepoNotFound"
                self.send_header("X-Error-Code", code)
            else:
                first = int(re.match(r"bytes=(\d+)-", self.headers.get("Range") or "bytes=0-")[1])
                self.send_response(206 if first else 200)
                self.send_header("ETag", f'"{hashlib.sha256(content).hexdigest()}"')
                self.send_header("Accept-Ranges", "bytes")
                if first:
                    self.send_header("Content-Range", f"bytes {first}-{len(content) - 1}/{len(content)}")
                content = content[first:]
            self.send_header("X-Repo-Commit", commit or commit_of("main"))
            self.send_header("Content-Length", str(len(content or b"")))
            self.end_headers()
            return content or b"", file

        def do_GET(self):
            if "/resolve/" not in self.path:
                requests.append(f"GET {self.path}")
                return self.answer({"error": "unknown"}, 404)
            content, file = self.do_HEAD()
            if drops.get(file, 0):
                drops[file] -= 1
                content = content[:len(content) // 2]
            self.wfile.write(content)

        def answer(self, value, status=200):
            body = json.dumps(value).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def do_POST(self):
            body = self.rfile.read(int(self.headers["Content-Length"]))
            requests.append(f"POST {self.path}")
            here = f"http://127.0.0.1:{self.server.server_port}"
            if "Authorization" not in self.headers and self.path != "/api/validate-yaml":
                return self.answer({"error": "Invalid username or password."}, 401)
            if self.path == "/api/validate-yaml":
                return self.answer({"warnings": [], "errors": []})
            if self.path == "/api/repos/create":
                asked = json.loads(body)
                folder = root / asked["organization"] / asked["name"]
                if folder.exists():
                    url = f"{here}/{asked['organization']}/{asked['name']}"
                    return self.answer({"error": "You already created this model repo", "url": url}, 409)
                folder.mkdir(parents=True)
                return self.answer({"url": f"{here}/{asked['organization']}/{asked['name']}"})
            if match := re.fullmatch(r"/api/models/(.+)/preupload/main", self.path):
                files = json.loads(body)["files"]
                return self.answer({"files": [{"path": file["path"], "shouldIgnore": False, "uploadMode":
                                               "lfs" if file["path"].endswith(".safetensors") else "regular"}
                                              for file in files]})
            if match := re.fullmatch(r"/(.+)\.git/info/lfs/objects/batch", self.path):
                return self.answer({"objects": [thing | {"actions": {"upload": {
                                                    "href": f"{here}/objects/{thing['oid']}"}}}
                                                for thing in json.loads(body)["objects"]]})
            if match := re.fullmatch(r"/api/models/(.+)/commit/main", self.path):
                for line in map(json.loads, body.splitlines()):
                    value = line["value"]
                    if line["key"] in ("file", "lfsFile"):
                        path = root / match[1] / value["path"]
                        path.parent.mkdir(parents=True, exist_ok=True)
                        content = objects[value["oid"]] if line["key"] != "file" else base64.b64decode(value["content"])
                        path.write_bytes(content)
                return self.answer({"commitUrl": f"{here}/{match[1]}/commit/{commit_of('main')}",
                                    "commitOid": commit_of("main")})
            self.answer({"error": "unknown"}, 404)

        def do_PUT(self):
            content = self.rfile.read(int(self.headers["Content-Length"]))
            objects[hashlib.sha256(content).hexdigest()] = content
            self.answer({})

        def log_message(self, *args):
            pass

    return Handler
