"""A page to try the weights in a browser: python -m share serve [--port 8000] [--weights ...]

The server listens on 127.0.0.1 only, needs nothing beyond Python's standard library, and the page loads nothing from
elsewhere. Requests and answers:

    GET  /                      the page, page.html, with what the weights cover in the place in double braces
    POST /sample                a form as JSON; the answer is one line of JSON for each event:
                                {"note": "..."}  {"waiting": 1}  {"done": 3, "of": 50}  {"error": "..."}
                                {"image": NAME, "seed": 7, "metadata": {...}}
    GET  /images/NAME.png       an image, and /images/NAME.dcm: the files that sample.py writes, the latest KEPT of them

There is one model, so requests wait in a queue, and each is told its place in it. When a client goes away, its sampling
stops at the next step. Any page that is open in the same browser can send requests here, so a request must name this
host (against DNS rebinding) and, if it has an Origin, that must be this page. Anything else that is wrong is answered
with one line and status 400.
"""
import json
import re
import secrets
import signal
import socket
import socketserver
import sys
import tempfile
import threading
from collections import deque
from contextlib import suppress
from http.server import BaseHTTPRequestHandler
from pathlib import Path

import flow
import sample
from common import cli
from common.cli import InputError, RunError
from radiographs import fields

PAGE = Path(__file__).parent / "page.html"
NAMES = ("127.0.0.1", "localhost")
LIMITS = {"n": (1, 64), "steps": (1, 250), "guidance": (0, 20),
          "seed": (0, 2 ** 53 - 64)}                                 # 2^53: a browser's largest whole numbers
DEFAULTS = {"n": 4, "steps": sample.STEPS, "guidance": sample.GUIDANCE, "seed": 0}
LONGEST_FORM = 10_000  # bytes
BATCH = 4              # images at a time, so that the first appear soon
LONGEST_QUEUE = 16     # requests; more are refused
KEPT = 256             # images


class ClientGone(Exception):
    """The client went away, or the server is closing: stop."""


# ---------------------------------------------------------------------------------------------------------
# What the page is told, and what it asks for

def describe(cfg, weights):
    """What the page needs to know: every field with its values, and which of them the training data held."""
    coded = {}
    for field in fields.CODED:
        values = cfg.datasets if field == "dataset" else fields.VALUES[field]
        coded[field] = [[value, value in cfg.covered.get(field, {})] for value in values]
    labels = {field: label.capitalize() for field, label in fields.FINDINGS.items()}
    return {"weights": weights, "fields": coded, "labels": labels, "age": cfg.covered.get("age"), "limits": LIMITS,
            "defaults": DEFAULTS}


def parse_form(body, cfg):
    """The record that a form asks for ({}: nothing in particular), what was changed in it so that it does not
    contradict itself (a list of sentences), and the numbers of the form. Raises InputError for whatever the page
    would not send."""
    try:
        form = json.loads(body)
    except (ValueError, RecursionError):
        raise InputError("the form is not JSON") from None
    if not isinstance(form, dict) or set(form) != {*LIMITS, "metadata"} or not isinstance(form["metadata"], dict):
        raise InputError(f"a form has {', '.join(LIMITS)} and metadata")
    for name, (low, high) in LIMITS.items():
        kinds = (int, float) if name == "guidance" else (int,)
        if type(form[name]) not in kinds or not low <= form[name] <= high:  # NaN is in no range; true is not a number
            kind = "number" if float in kinds else "whole number"
            text = " ".join(str(form[name]).split())[:40]
            raise InputError(f"{name} {text} is not a {kind} from {low} to {high}")
    if any(type(value) not in (str, int, float) for value in form["metadata"].values()):
        raise InputError("metadata: field to value, each a text or a number")
    record = {field: fields.parse_value(field, value, cfg.datasets) for field, value in form["metadata"].items()}
    record = fields.drop_unknown(record)
    fields.check_covered(record, cfg.covered)
    record, notes = fields.resolve_request(record)
    if apart := fields.never_together(record, cfg.pairs):
        notes.append(f"no training image had {' and '.join(apart)} together")
    return record, notes, {name: form[name] for name in LIMITS}


def hosts_of(port):
    """What a browser may call this server in the headers Host and Origin. Port 80 is the default of http, so browsers
    leave it out."""
    return [*NAMES] if port == 80 else [f"{name}:{port}" for name in NAMES]


# ---------------------------------------------------------------------------------------------------------
# The server: one model, a queue for it, and the latest images

class Queue:
    """The requests that want the model, in the order of their arrival; the first has it."""

    def __init__(self):
        self.tickets, self.changed = [], threading.Condition()

    def join(self):
        """A ticket, or None where the queue is full."""
        with self.changed:
            if len(self.tickets) >= LONGEST_QUEUE:
                return None
            self.tickets.append(ticket := object())
            return ticket

    def wait(self, ticket, tell):
        """Returns when the ticket is the first. `tell(place)` is called every second and when the place changes."""
        while place := self.tickets.index(ticket):
            tell(place)
            with self.changed:
                self.changed.wait_for(lambda: self.tickets.index(ticket) != place, timeout=1)

    def leave(self, ticket):
        with self.changed:
            self.tickets.remove(ticket)
            self.changed.notify_all()


class Server(socketserver.ThreadingTCPServer):
    allow_reuse_address = True

    def __init__(self, port, weights):
        self.model, self.vae = sample.load_weights(weights)
        device, bf16 = cli.pick_device()
        self.model.to(device)
        if self.vae:
            self.vae.to(device)
        self.settings = sample.provenance(weights, solver=sample.SOLVER, interval=[0, 1],
                                          precision="bfloat16" if bf16 else "float32")
        self.queue, self.closing, self.connections = Queue(), False, set()
        self.kept, self.temporary = deque(), tempfile.TemporaryDirectory(prefix="radit-")
        self.folder = Path(self.temporary.name)
        for name in ("images", "dicom"):
            (self.folder / name).mkdir()
        try:
            super().__init__(("127.0.0.1", port), Handler)
        except OSError as error:
            raise InputError(f"--port {port}: {error.strerror}; give another") from None
        self.hosts = hosts_of(self.server_address[1])

    def keep(self, image, record, seed, settings):
        """Writes the files of an image, forgets the oldest beyond KEPT, and returns its name. Only the request that
        has the model calls it."""
        name = secrets.token_hex(8)                                  # another page cannot guess it
        sample.write_image(self.folder, name, image, record, seed, settings, as_dicom=True)
        self.kept.append(name)
        if len(self.kept) > KEPT:
            oldest = self.kept.popleft()
            (self.folder / f"images/{oldest}.png").unlink()
            (self.folder / f"dicom/{oldest}.dcm").unlink()
        return name

    def handle_error(self, request, address):                        # it is no error when a client goes away
        if not isinstance(sys.exception(), OSError):
            super().handle_error(request, address)

    def process_request(self, connection, address):
        self.connections.add(connection)
        super().process_request(connection, address)

    def shutdown_request(self, connection):
        self.connections.discard(connection)
        super().shutdown_request(connection)

    def server_close(self):
        """Ends all threads and waits for them: a thread inside torch when Python ends would abort the process, and
        nothing may be written while the folder goes. The one that samples stops at its next step."""
        self.closing = True
        for connection in list(self.connections):
            with suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)                # who waits for a client to send stops waiting
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
        headers = []
        if status == 501:                                            # a method other than GET and POST
            status, headers = 405, [("Allow", "GET, POST")]
        self.begin(status, "text/plain; charset=utf-8", *headers)
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
        image = re.fullmatch(r"/images/([0-9a-f]{16})\.(png|dcm)", self.path)
        if self.path == "/":
            self.send_page()
        elif image:
            self.send_image(*image.groups())
        else:
            self.send_error(404, "nothing here")

    def send_page(self):
        nonce = secrets.token_urlsafe(16)                            # marks the styles and scripts of this page alone
        about = json.dumps(describe(self.server.model.config, self.server.settings["weights"])).replace("<", "\\u003c")
        page = PAGE.read_text(encoding="utf-8").replace("{{NONCE}}", nonce).replace("{{ABOUT}}", about)
        policy = (f"default-src 'none'; script-src 'nonce-{nonce}'; style-src 'nonce-{nonce}'; img-src 'self' data:; "
                  "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'")
        self.begin(200, "text/html; charset=utf-8", ("Content-Security-Policy", policy))
        self.wfile.write(page.encode())

    def send_image(self, name, suffix):
        folder, kind = {"png": ("images", "image/png"), "dcm": ("dicom", "application/dicom")}[suffix]
        try:
            content = (self.server.folder / folder / f"{name}.{suffix}").read_bytes()
        except FileNotFoundError:
            return self.send_error(404, f"no such image; the latest {KEPT} are kept")
        self.begin(200, kind, ("Content-Length", str(len(content))))
        self.wfile.write(content)

    def do_POST(self):
        length = self.headers.get("Content-Length", "")
        if self.path != "/sample":
            return self.send_error(404, "nothing here")
        if not re.fullmatch("[0-9]{1,9}", length) or "Transfer-Encoding" in self.headers:
            return self.send_error(400, "a form comes with its length")
        body = self.rfile.read(min(int(length), 100 * LONGEST_FORM))  # a client reads no answer before all is sent
        if int(length) > LONGEST_FORM:
            return self.send_error(400, f"{length} bytes are too many for a form")
        if self.headers.get_content_type() != "application/json":
            return self.send_error(400, "a form is application/json")
        try:
            record, notes, numbers = parse_form(body, self.server.model.config)
        except InputError as error:
            return self.send_error(400, str(error))
        ticket = self.server.queue.join()
        if ticket is None:
            return self.send_error(503, f"{LONGEST_QUEUE} requests are waiting already; try again later")
        try:
            self.begin(200, "application/x-ndjson")
            for note in notes:
                self.send_event(note=note)
            self.server.queue.wait(ticket, lambda place: self.send_event(waiting=place))
            self.sample(record, **numbers)
        except ClientGone:
            pass
        except Exception as error:  # a full disk, a GPU out of memory: it ends this request, not the server
            kind = "" if isinstance(error, (InputError, RunError)) else f"{type(error).__name__}: "
            with suppress(ClientGone):
                self.send_event(error=" ".join(f"{kind}{error}".split())[:300])
        finally:
            self.server.queue.leave(ticket)

    def sample(self, record, n, steps, guidance, seed):
        """Samples n images and sends an event for every evaluation and every image."""
        server, seeds = self.server, range(seed, seed + n)
        examples = server.model.config.examples or [{}]              # [{}]: trained without any metadata
        records = [record or examples[seed % len(examples)] for seed in seeds]
        settings = server.settings | {"steps": steps, "guidance": guidance}
        total, done = len(range(0, n, BATCH)) * steps * flow.SOLVERS[sample.SOLVER], 0

        def count_step():
            nonlocal done
            done += 1
            self.send_event(done=done, of=total)

        for start in range(0, n, BATCH):
            part = slice(start, start + BATCH)
            images, _ = sample.generate(server.model, server.vae, records[part], seeds[part], steps=steps,
                                        guidance=guidance, report=count_step)
            for image, metadata, number in zip(images, records[part], seeds[part]):
                self.send_event(image=server.keep(image, metadata, number, settings), seed=number, metadata=metadata)

    def send_event(self, **event):
        if self.server.closing:
            raise ClientGone
        try:
            self.wfile.write(json.dumps(event).encode() + b"\n")
        except OSError as error:
            raise ClientGone from error


# ---------------------------------------------------------------------------------------------------------

def add_arguments(parser):
    parser.add_argument("--port", type=cli.integer(0, 65535), default=8000, help="0 takes a free one")
    parser.add_argument("--weights", type=cli.new_path, default=sample.DEMO,
                        help="a folder that holds radit/ and vae/, or its name on the Hub; the demo by default")


def end_program(number, frame):
    """Ends the program as an error would, so that temporary files are deleted; by default a signal leaves them."""
    sys.exit(128 + number)


def serve_command(args):
    with Server(args.port, args.weights) as server:
        for number in (signal.SIGTERM, signal.SIGHUP):
            signal.signal(number, end_program)
        print(f"http://{server.hosts[0]}/  (Ctrl-C ends it)", flush=True)
        server.serve_forever()
