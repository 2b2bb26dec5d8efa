"""An API server that is simulated: objects by path, lists, watches, logs, and every way in which one does not answer.

Nothing of Kubernetes runs behind it: tests put pods and their states there by hand.
"""

import calendar
import contextlib
import http.server
import json
import threading
import time
import urllib.parse

KINDS = {"pods": "Pod", "events": "Event", "configmaps": "ConfigMap", "pytorchjobs": "PyTorchJob",
         "jobsets": "JobSet", "trainjobs": "TrainJob", "podgroups": "PodGroup"}  # fmt: skip
STORED = (*KINDS, "nodes", "workloads")
BEGAN = "2026-01-01T00:00:00.{:09d}Z"  # of logs that tests give as bytes: a line each nanosecond


def merged(under, top):
    both = isinstance(under, dict) and isinstance(top, dict)
    return {**under, **{key: merged(under.get(key), value) for key, value in top.items()}} if both else top


class Api(http.server.ThreadingHTTPServer):
    """What tests set:

    objects  path -> object; `put` and `drop` also tell those who watch
    script   (method, part of the path) -> the reply to give instead, or a list of them, one for each question:
             (code, body) or (code, body, headers); code 0 closes the connection, "slow" answers after `body` seconds
             and then as if nothing had been, "lost" does what is asked and closes the connection without a word
    logs     pod -> pieces of its output, or (time, line) pairs
    cuts     path -> how many more events or lines its next streams carry before the connection is reset
    token    what `Authorization: Bearer` has to say; None takes everybody
    oldest   watches from an older version are told 410; `gone_as` says whether by "status" or in the "stream"
    groups   API groups of the discovery
    """

    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.objects, self.script, self.logs, self.asked, self.cuts = {}, {}, {}, [], {}
        self.count, self.version, self.oldest, self.gone_as, self.token = 0, 100, 0, "stream", None
        self.told = []  # (version, path, type, object)
        self.news = threading.Condition()
        self.bookmarks = True
        self.groups = {"kubeflow.org": ["v1"]}
        self.closing = False

    def put(self, path, value):
        with self.news:
            self.version += 1
            kind = "MODIFIED" if path in self.objects else "ADDED"
            value["metadata"] = {**value.get("metadata", {}), "resourceVersion": str(self.version)}
            value["metadata"].setdefault("name", path.rpartition("/")[2])
            self.objects[path] = value
            self.told.append((self.version, path, kind, json.loads(json.dumps(value))))
            self.news.notify_all()

    def drop(self, path):
        with self.news:
            self.version += 1
            value = {**self.objects.pop(path)}
            value["metadata"] = {**value["metadata"], "resourceVersion": str(self.version)}
            self.told.append((self.version, path, "DELETED", value))
            self.news.notify_all()
            return value

    def forget(self):
        """The server compacts its history: watches from before now are too old."""
        with self.news:
            self.version += 1
            self.oldest = self.version
            self.news.notify_all()

    def cut_off(self):
        """Whoever watches is cut off at once."""
        with self.news:
            self.closing = True
            self.news.notify_all()
        time.sleep(0.3)
        self.closing = False

    def asks(self, method, part):
        return [query for verb, path, query in self.asked if verb == method and part in path]


class Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *_):
        pass

    def handle_one_request(self):
        with contextlib.suppress(ConnectionError):
            super().handle_one_request()

    def do(self):
        server, method = self.server, self.command
        path, _, query = self.path.partition("?")
        length = int(self.headers.get("Content-Length") or 0)
        body = json.loads(self.rfile.read(length)) if length else {}
        server.asked.append((method, path, query))
        if server.token and self.headers.get("Authorization") != f"Bearer {server.token}":
            return self.refuse(401, "Unauthorized")
        lost = False
        scripted = [(key, reply) for key, reply in server.script.items() if key[0] == method and key[1] in path]
        if scripted:
            key, reply = scripted[0]
            if isinstance(reply, list):
                found = reply.pop(0)
                if not reply:
                    del server.script[key]
                reply = found
            code, answer, *more = reply
            if code == 0:
                self.close_connection = True
                return None
            if code == "slow":
                time.sleep(answer)
            elif code == "lost":
                lost = True
            else:
                return self.answer(code, answer, *more)
        question = {key: values[0] for key, values in urllib.parse.parse_qs(query).items()}
        status, value = self.store(method, path, body, question)
        if lost:
            self.close_connection = True
            return None
        return None if status is None else self.answer(status, value)

    do_GET = do_POST = do_PUT = do_PATCH = do_DELETE = do

    def store(self, method, path, body, question):
        """Status and answer; (None, None) where a stream was the answer."""
        server, name = self.server, path.rpartition("/")[2]
        dry = question.get("dryRun") == "All"
        if name == "log":
            pod = path.split("/")[-2]
            if pod not in server.logs:
                return failure(404, f'pods "{pod}" not found')
            self.log(pod, question)
            return None, None
        if path.rstrip("/") == "/apis":
            groups = [group_of(name, versions) for name, versions in server.groups.items()]
            return 200, {"kind": "APIGroupList", "groups": groups}
        if method == "GET" and name in STORED and path not in server.objects:
            if question.get("watch") in ("true", "True", "1"):
                self.watch(path, question)
                return None, None
            with server.news:
                stored = list(server.objects.items())
                version = {"resourceVersion": str(server.version)}
            items = [value for key, value in stored if self.chosen(path, key, value, question)]
            return 200, {"kind": f"{KINDS.get(name, 'Thing')}List", "metadata": version, "items": items}
        if method == "POST":
            body["metadata"].setdefault("name", f"{body['metadata'].get('generateName', '')}x7k2p")
            path = f"{path}/{body['metadata']['name']}"
            if path in server.objects:
                return failure(409, f'"{body["metadata"]["name"]}" already exists')
            body["metadata"]["uid"] = f"uid-{server.count + 1}"
            if not dry:
                server.count += 1
                server.put(path, body)
            return 201, body
        if path not in server.objects:
            return failure(404, f'"{name}" not found')
        if method == "PATCH":
            server.put(path, merged(server.objects[path], body))
        if method == "PUT" and not dry:
            server.put(path, body)
        return 200, server.drop(path) if method == "DELETE" else server.objects[path]

    def chosen(self, collection, path, value, question):
        labels = value.get("metadata", {}).get("labels") or {}
        wanted = [row.partition("=") for row in question.get("labelSelector", "").split(",") if row]
        fields = [row.partition("=") for row in question.get("fieldSelector", "").split(",") if row]
        return (
            path.rpartition("/")[0] == collection
            and all(labels.get(key) == text for key, _, text in wanted)
            and all(value.get(key) == text for key, _, text in fields)
        )

    def begin_stream(self, kind):
        self.send_response(200)
        self.send_header("Content-Type", kind)
        self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()

    def chunk(self, data):
        self.wfile.write(b"%x\r\n%s\r\n" % (len(data), data))
        self.wfile.flush()

    def allowed(self, path):
        """Whether the connection lives for one more of these."""
        left = self.server.cuts.get(path)
        if left is None:
            return True
        if left == 0:
            del self.server.cuts[path]
            self.close_connection = True
            self.connection.close()
            return False
        self.server.cuts[path] = left - 1
        return True

    def watch(self, path, question):
        server = self.server
        seen = int(question.get("resourceVersion") or 0)
        until = time.monotonic() + min(float(question.get("timeoutSeconds") or 30), 30)
        old = {"kind": "Status", "code": 410, "reason": "Expired", "message": f"too old resource version: {seen}"}
        if seen < server.oldest and server.gone_as == "status":
            return self.answer(410, old)
        self.begin_stream("application/json")
        noted = time.monotonic()
        while True:
            with server.news:
                if server.version == seen and not server.closing:
                    server.news.wait(0.05)
                rows = [row for row in server.told if row[0] > seen and self.chosen(path, row[1], row[3], question)]
                events = [{"type": kind, "object": value} for _, _, kind, value in rows]
                seen_now, closing = server.version, server.closing
            if closing:
                self.close_connection = True
                return self.connection.close()
            if seen < server.oldest:
                self.chunk(json.dumps({"type": "ERROR", "object": old}).encode() + b"\n")
                break
            marks = question.get("allowWatchBookmarks") in ("true", "True") and server.bookmarks
            if not events and marks and time.monotonic() - noted > 0.1 and seen < seen_now:
                noted = time.monotonic()
                events = [{"type": "BOOKMARK", "object": {"metadata": {"resourceVersion": str(seen_now)}}}]
            for event in events:
                if not self.allowed(path):
                    return None
                self.chunk(json.dumps(event).encode() + b"\n")
                seen = int(event["object"]["metadata"]["resourceVersion"])
            if not events:
                time.sleep(0.02)
            if time.monotonic() > until:
                break
        return self.wfile.write(b"0\r\n\r\n")

    def log(self, pod, question):
        rows = self.server.logs[pod]
        follow = question.get("follow") in ("true", "True")
        stamped = question.get("timestamps") in ("true", "True")
        seconds = question.get("sinceSeconds")
        since = time.time() - float(seconds) if seconds else 0.0
        self.begin_stream("text/plain")
        if rows and isinstance(rows[0], bytes):
            text = b"".join(rows)
            if not stamped:
                for part in rows:
                    self.chunk(part)
                return self.wfile.write(b"0\r\n\r\n")
            rows = [(BEGAN.format(number), line) for number, line in enumerate(text.splitlines(keepends=True))]
        told = 0
        while True:
            for at, line in rows[told:]:
                told += 1
                if since and calendar.timegm(time.strptime(at[:19], "%Y-%m-%dT%H:%M:%S")) < since - 1:
                    continue
                if not self.allowed(f"log/{pod}"):
                    return None
                self.chunk((at.encode() + b" " if stamped else b"") + line)
            if not follow or (rows and rows[-1][1] == b"") or isinstance(self.server.logs.get(pod, [b""])[0], bytes):
                break
            time.sleep(0.02)
        return self.wfile.write(b"0\r\n\r\n")

    def refuse(self, code, message):
        self.answer(*failure(code, message))

    def answer(self, code, value, headers=None):
        data = value.encode() if isinstance(value, str) else json.dumps(value).encode()
        self.send_response(code)
        self.send_header("Content-Type", "text/plain" if isinstance(value, str) else "application/json")
        self.send_header("Content-Length", str(len(data)))
        for name, text in (headers or {}).items():
            self.send_header(name, text)
        self.end_headers()
        self.wfile.write(data)


def group_of(name, versions):
    every = [{"groupVersion": f"{name}/{version}", "version": version} for version in versions]
    return {"name": name, "versions": every, "preferredVersion": every[0]}


def failure(code, message):
    return code, {"kind": "Status", "status": "Failure", "message": message, "code": code}


@contextlib.contextmanager
def serving(tmp_path, monkeypatch):
    server = Api()
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
    configure(tmp_path, monkeypatch, server.server_address[1])
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()


def configure(tmp_path, monkeypatch, port, user=None):
    """A kubeconfig with this server. The client library reads the variable once, when it is imported."""
    import kubernetes.config.kube_config

    path = tmp_path / "kubeconfig"
    context = {"cluster": "c", "user": "u", "namespace": "lab"}
    path.write_text(
        json.dumps(
            {
                "apiVersion": "v1",
                "kind": "Config",
                "current-context": "here",
                "clusters": [{"name": "c", "cluster": {"server": f"http://127.0.0.1:{port}"}}],
                "contexts": [{"name": "here", "context": context}],
                "users": [{"name": "u", "user": user or {"token": "none"}}],
            }
        )
    )
    for name in ("HTTP_PROXY", "HTTPS_PROXY", "http_proxy", "https_proxy", "KUBERNETES_SERVICE_HOST"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("KUBECONFIG", str(path))
    monkeypatch.setattr(kubernetes.config.kube_config, "KUBE_CONFIG_DEFAULT_LOCATION", str(path))
