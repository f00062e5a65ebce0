"""A page to try the weights in a browser: python -m share serve [--port 8000] [--weights ...]

Bound to 127.0.0.1, by the standard library alone, and nothing on the page comes from elsewhere. What it answers:

    GET  /                      the page, page.html with what the weights cover in the place in double braces
    POST /draw                  a form as JSON; the answer is one line of JSON for each thing that happens:
                                {"waiting": 1}  {"done": 3, "of": 50}  {"image": NAME, "seed": 7, "metadata": {...}}  {"error": "..."}
    GET  /images/NAME.png       a picture, and /images/NAME.dcm: the files that sample.py writes, the last KEPT of them

One model, so whoever comes second waits in a queue and sees his place in it; a client that goes away frees it at the next
step. Any page that is open in the same browser can send requests here, so a request must name this host (no DNS
rebinding) and, if it says where it comes from, come from this page. Everything else that is wrong is one line and status 400.
"""
import json
import re
import secrets
import socketserver
import sys
import tempfile
import threading
from collections import deque
from contextlib import suppress
from http.server import BaseHTTPRequestHandler
from pathlib import Path

import sample
from common import cli
from common.cli import InputError
from radiographs import fields

PAGE = Path(__file__).parent / "page.html"
LIMITS = {"n": (1, 64), "steps": (1, 250), "guidance": (0, 20), "seed": (0, 2 ** 53 - 64)}  # 2^53: a browser's whole numbers
DEFAULTS = {"n": 4, "steps": 25, "guidance": 2, "seed": 0}
LONGEST = 10_000   # bytes of a form
AT_A_TIME = 4      # images a batch, so that the first appear soon
QUEUE = 16         # who comes later is sent away
KEPT = 256         # images


class Gone(Exception):
    """The client went away."""


def describe(cfg, weights):
    """What the page needs to know: every field with its values, and which of them the training data held."""
    coded = {field: [[value, value in cfg.covered.get(field, {})] for value in (cfg.datasets if field == "dataset" else fields.VALUES[field])]
             for field in fields.CODED}
    labels = {field: label.capitalize() for field, label in fields.FINDINGS.items()}
    return {"weights": weights, "fields": coded, "labels": labels, "age": cfg.covered.get("age"), "limits": LIMITS,
            "defaults": DEFAULTS}


def parse_form(body, cfg):
    """The record that a form asks for (empty: none), and its numbers. InputError for whatever is not as the page sends it."""
    try:
        form = json.loads(body)
    except (ValueError, RecursionError):
        raise InputError("the form is not JSON") from None
    if not isinstance(form, dict) or set(form) != {*LIMITS, "metadata"} or not isinstance(form["metadata"], dict):
        raise InputError(f"a form has {', '.join(LIMITS)} and metadata")
    for name, (low, high) in LIMITS.items():
        kind = (int, float) if name == "guidance" else (int,)
        if type(form[name]) not in kind or not low <= form[name] <= high:  # NaN is in no range, and true is no number
            raise InputError(f"{name} {str(form[name])[:40]} is not a {'' if float in kind else 'whole '}number from {low} to {high}")
    if any(type(value) not in (str, int, float) for value in form["metadata"].values()):
        raise InputError("metadata: field to value, each a text or a number")
    record = {field: fields.parse_value(field, value, cfg.datasets) for field, value in form["metadata"].items()}
    record = {field: value for field, value in record.items() if value is not None}
    fields.check_covered(record, cfg.covered)
    record, _ = fields.resolve_request(record)                       # the picture's caption says what was asked for
    return record, {name: form[name] for name in LIMITS}


class Server(socketserver.ThreadingTCPServer):
    allow_reuse_address = daemon_threads = True

    def __init__(self, port, weights):
        self.model, self.decoder = sample.load_weights(weights)
        device, bf16 = cli.pick_device()
        for module in filter(None, (self.model, self.decoder)):
            module.to(device)
        self.how = sample.provenance(weights, solver="euler", interval=[0, 1], precision="bfloat16" if bf16 else "float32")
        self.waiting, self.turn = [], threading.Condition()          # tickets, the first of which draws
        self.kept, self.temporary = deque(), tempfile.TemporaryDirectory()
        self.folder = Path(self.temporary.name)
        for name in ("images", "dicom"):
            (self.folder / name).mkdir()
        try:
            super().__init__(("127.0.0.1", port), Handler)
        except OSError as error:
            raise InputError(f"--port {port}: {error.strerror}; give another") from None
        self.hosts = [f"{name}:{self.server_address[1]}" for name in ("127.0.0.1", "localhost")]

    def keep(self, image, record, seed, how):
        """Writes the files of an image, forgets the oldest beyond KEPT, and returns its name. One thread at a time: whose turn it is."""
        name = secrets.token_hex(8)                                  # not to be guessed by another page
        sample.write_image(self.folder, name, image, record, seed, how, as_dicom=True)
        self.kept.append(name)
        if len(self.kept) > KEPT:
            oldest = self.kept.popleft()
            (self.folder / f"images/{oldest}.png").unlink()
            (self.folder / f"dicom/{oldest}.dcm").unlink()
        return name

    def handle_error(self, request, address):                        # a client that goes away while it is answered is no error
        if not isinstance(sys.exception(), OSError):
            super().handle_error(request, address)

    def server_close(self):
        super().server_close()
        self.temporary.cleanup()


class Handler(BaseHTTPRequestHandler):
    timeout = 20                                                     # seconds that a client may keep a thread waiting
    server_version, sys_version = "RadiT", ""

    def begin(self, status, kind, *headers):
        self.send_response(status)
        for header in (("Content-Type", kind), ("X-Content-Type-Options", "nosniff"), ("Cache-Control", "no-store"),
                       ("Cross-Origin-Resource-Policy", "same-origin"), ("Referrer-Policy", "no-referrer"), *headers):
            self.send_header(*header)
        self.end_headers()

    def send_error(self, status, message=None, explain=None):        # the base class answers with HTML
        status = 405 if status == 501 else status                    # a method that nobody wrote
        self.begin(status, "text/plain; charset=utf-8", *([("Allow", "GET, POST")] if status == 405 else []))
        self.wfile.write((" ".join((message or "refused").split())[:300] + "\n").encode())

    def log_message(self, form, *values):
        pass

    def parse_request(self):
        """Before any method: whether the request is meant for this page."""
        if not super().parse_request():
            return False
        hosts, origins = (self.headers.get_all(name, []) for name in ("Host", "Origin"))
        if len(hosts) != 1 or hosts[0] not in self.server.hosts:
            self.send_error(400, f"this page is at {self.server.hosts[0]}, and the request names another host")
        elif origins and origins != [f"http://{hosts[0]}"]:
            self.send_error(400, "the request comes from another page")
        else:
            return True
        return False

    def do_GET(self):
        found = re.fullmatch(r"/images/([0-9a-f]{16})\.(png|dcm)", self.path)
        if self.path == "/":
            nonce = secrets.token_urlsafe(16)                        # styles and scripts of this page alone
            about = json.dumps(describe(self.server.model.config, self.server.how["weights"])).replace("<", "\\u003c")
            page = PAGE.read_text(encoding="utf-8").replace("{{NONCE}}", nonce).replace("{{ABOUT}}", about)
            policy = (f"default-src 'none'; script-src 'nonce-{nonce}'; style-src 'nonce-{nonce}'; img-src 'self' data:; "
                      "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'")
            self.begin(200, "text/html; charset=utf-8", ("Content-Security-Policy", policy))
            self.wfile.write(page.encode())
        elif found:
            name, kind = found.groups()
            try:
                content = (self.server.folder / {"png": "images", "dcm": "dicom"}[kind] / f"{name}.{kind}").read_bytes()
            except FileNotFoundError:
                return self.send_error(404, "no such picture (any more)")
            self.begin(200, {"png": "image/png", "dcm": "application/dicom"}[kind], ("Content-Length", str(len(content))))
            self.wfile.write(content)
        else:
            self.send_error(404, "nothing here")

    def do_POST(self):
        length = self.headers.get("Content-Length", "")
        if self.path != "/draw":
            return self.send_error(404, "nothing here")
        if not re.fullmatch("[0-9]{1,9}", length) or "Transfer-Encoding" in self.headers:
            return self.send_error(400, "a form comes with its length")
        body = self.rfile.read(min(int(length), 100 * LONGEST))      # read, so that the client reads the answer
        if int(length) > LONGEST:
            return self.send_error(400, f"{length} bytes are too many for a form")
        if self.headers.get_content_type() != "application/json":
            return self.send_error(400, "a form is application/json")
        try:
            record, form = parse_form(body, self.server.model.config)
        except InputError as error:
            return self.send_error(400, str(error))
        self.draw(record, **form)

    def draw(self, record, n, steps, guidance, seed):
        """Waits for its turn, then draws, and tells the client of every step."""
        server, ticket = self.server, object()
        with server.turn:
            if len(server.waiting) >= QUEUE:
                return self.send_error(503, f"{QUEUE} people are waiting already; try again later")
            server.waiting.append(ticket)
        try:
            self.begin(200, "application/x-ndjson")
            while place := server.waiting.index(ticket):
                self.tell(waiting=place)
                with server.turn:
                    server.turn.wait_for(lambda: server.waiting.index(ticket) != place, timeout=1)
            seeds = range(seed, seed + n)
            examples = server.model.config.examples or [{}]          # trained without any metadata
            records = [record or examples[seed % len(examples)] for seed in seeds]
            how = server.how | {"steps": steps, "guidance": guidance}
            done, of = 0, -(-n // AT_A_TIME) * steps
            def step():
                nonlocal done
                done += 1
                self.tell(done=done, of=of)
            for start in range(0, n, AT_A_TIME):
                part = slice(start, start + AT_A_TIME)
                images, _ = sample.generate(server.model, server.decoder, records[part], seeds[part], steps=steps,
                                            guidance=guidance, report=step)
                for image, asked, number in zip(images, records[part], seeds[part]):
                    self.tell(image=server.keep(image, asked, number, how), seed=number, metadata=asked)
        except Gone:
            pass
        except Exception as error:  # a full disk, a GPU out of memory: this picture's trouble, not the page's
            with suppress(Gone):
                self.tell(error=" ".join(f"{type(error).__name__}: {error}".split())[:300])
        finally:
            with server.turn:
                server.waiting.remove(ticket)
                server.turn.notify_all()

    def tell(self, **what):
        try:
            self.wfile.write(json.dumps(what).encode() + b"\n")
        except OSError as error:
            raise Gone from error


def add_arguments(parser):
    parser.add_argument("--port", type=int, default=8000, help="0 takes a free one")
    parser.add_argument("--weights", type=Path, default=sample.DEMO, help="a folder that holds radit/ and vae/, or its name on the Hub")


def serve_command(args):
    if not 0 <= args.port < 65536:
        raise InputError(f"--port {args.port} is not from 0 to 65535")
    with Server(args.port, args.weights) as server:
        print(f"http://{server.hosts[0]}/  (Ctrl-C ends it)", flush=True)
        server.serve_forever()
