"""A chat server on this machine that says what a test tells it to."""

from __future__ import annotations

import json
import threading
import time
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest


@dataclass
class LocalChat:
    """Answers each request with the next of `answers` (the last one stays) and keeps what it was asked.

    An answer is a text (the model's words), or (status, body) or (status, body, headers) as it goes out; a
    number is the seconds to wait before an empty answer.
    """

    url: str = ""
    models: object = None
    answers: list = field(default_factory=list)
    requests: list = field(default_factory=list)

    def next_answer(self):
        answer = self.answers.pop(0) if len(self.answers) > 1 else self.answers[0]
        if isinstance(answer, str):
            answer = (200, completion(answer))
        return answer


def completion(content, reason="stop"):
    return {"choices": [{"message": {"role": "assistant", "content": content}, "finish_reason": reason}]}


@pytest.fixture
def local_chat():
    chat = LocalChat(models={"data": [{"id": "tiny-model"}]})

    class Handler(BaseHTTPRequestHandler):
        def log_message(self, *_):
            pass

        def reply(self, status, body, headers=None):
            data = body if isinstance(body, bytes) else json.dumps(body).encode()
            self.send_response(status)
            for name, value in (headers or {}).items():
                self.send_header(name, value)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def do_GET(self):
            chat.requests.append((self.path, dict(self.headers), None))
            self.reply(200 if self.path == "/v1/models" else 404, chat.models)

        def do_POST(self):
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            chat.requests.append((self.path, dict(self.headers), body))
            answer = chat.next_answer()
            if isinstance(answer, float):
                time.sleep(answer)
            else:
                self.reply(*answer)

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    chat.url = f"http://127.0.0.1:{server.server_address[1]}"
    yield chat
    server.shutdown()
    server.server_close()
    thread.join()
