from __future__ import annotations

import socket
import subprocess
import sys
import time

import pytest

from moviola.parts.chat import ChatError, ChatServer
from moviola.types import UsageError
from tests.parts.conftest import completion


def server(chat, model="m", **options):
    return ChatServer(chat.url, model, **{"backoff": 0.01, "timeout": 5.0} | options)


def test_asks_what_it_was_given_and_returns_the_words(local_chat):
    local_chat.answers = ["a bench"]
    assert server(local_chat, api_key="secret-key").ask("Be brief.", "What is red?") == "a bench"
    (path, headers, body) = local_chat.requests[0]
    assert path == "/v1/chat/completions"
    assert headers["Authorization"] == "Bearer secret-key"
    assert body == {
        "model": "m",
        "temperature": 0,
        "messages": [
            {"role": "system", "content": "Be brief."},
            {"role": "user", "content": "What is red?"},
        ],
    }


def test_no_key_no_header(local_chat):
    local_chat.answers = ["x"]
    server(local_chat).ask("s", "u")
    assert "Authorization" not in local_chat.requests[0][1]


@pytest.mark.parametrize("ending", ["", "/", "/v1", "/v1/", "/v1/chat/completions"])
def test_the_url_may_end_where_people_end_it(local_chat, ending):
    local_chat.answers = ["x"]
    assert ChatServer(local_chat.url + ending, "m").ask("s", "u") == "x"
    assert local_chat.requests[0][0] == "/v1/chat/completions"


def test_the_only_model_is_taken_and_asked_for_once(local_chat):
    local_chat.answers = ["x"]
    one = server(local_chat, None)
    one.ask("s", "u")
    one.ask("s", "u")
    assert [request[0] for request in local_chat.requests].count("/v1/models") == 1
    assert local_chat.requests[-1][2]["model"] == "tiny-model"


def test_several_models_are_listed_for_the_user(local_chat):
    local_chat.models = {"data": [{"id": "one"}, {"id": "two"}]}
    with pytest.raises(UsageError, match=r"serves 2 models.*one, two"):
        server(local_chat, None).ask("s", "u")
    local_chat.models = {"data": []}
    with pytest.raises(UsageError, match=r"serves 0 models"):
        server(local_chat, None).ask("s", "u")
    local_chat.models = {"models": ["one"]}
    with pytest.raises(ChatError, match="no list of models"):
        server(local_chat, None).ask("s", "u")


@pytest.mark.parametrize("status", [429, 500, 503])
def test_what_may_pass_is_tried_again(local_chat, status):
    local_chat.answers = [(status, {"error": {"message": "busy"}}), (status, b"busy"), "at last"]
    assert server(local_chat, retries=2).ask("s", "u") == "at last"
    assert len(local_chat.requests) == 3


def test_trying_again_ends_and_says_what_the_server_said(local_chat):
    local_chat.answers = [(503, {"error": {"message": "loading the model"}})]
    with pytest.raises(ChatError, match="status 503: loading the model"):
        server(local_chat, retries=1).ask("s", "u")
    assert len(local_chat.requests) == 2


def test_pauses_double_and_heed_retry_after(local_chat):
    local_chat.answers = [(429, b"", {"Retry-After": "1"}), (500, b""), "x"]
    start = time.perf_counter()
    assert server(local_chat, retries=2, backoff=0.1).ask("s", "u") == "x"
    assert 1.2 <= time.perf_counter() - start < 4


@pytest.mark.parametrize(
    ("status", "body", "said"),
    [
        (401, {"error": {"message": "bad key"}}, r"status 401: bad key.*API key"),
        (404, {"error": "no such model"}, r"status 404: no such model.*/v1"),
        (400, {"detail": [1]}, r"status 400: .*detail"),
        (404, b"<html>\x1b[31mnope</html>", r"status 404: <html>\\x1b\[31mnope"),
        (302, b"", r"status 302.*Redirects"),
    ],
)
def test_a_refusal_is_not_tried_again(local_chat, status, body, said):
    local_chat.answers = [(status, body, {"Location": local_chat.url + "/elsewhere"})]
    with pytest.raises(ChatError, match=said):
        server(local_chat, api_key="secret-key").ask("s", "u")
    assert len(local_chat.requests) == 1


@pytest.mark.parametrize(
    ("answer", "said"),
    [
        ((200, b"<html>hello</html>"), "no JSON: <html>hello"),
        ((200, b""), "no JSON: nothing"),
        ((200, b"\xff\xfe"), "no JSON"),
        ((200, {"choices": []}), "without choices"),
        ((200, ["choices"]), "without choices"),
        ((200, {"choices": [{"text": "old style"}]}), "without choices"),
        ((200, {"choices": ["x"]}), "without choices"),
        ((200, completion(None)), "answered nothing"),
        ((200, completion("  ")), "answered nothing"),
        ((200, completion([{"type": "text"}])), "answered nothing"),
        ((200, completion("half a", "length")), "cut off"),
    ],
)
def test_answers_that_are_none(local_chat, answer, said):
    local_chat.answers = [answer]
    with pytest.raises(ChatError, match=said):
        server(local_chat).ask("s", "u")


def test_an_answer_of_no_end_is_stopped(local_chat, monkeypatch):
    monkeypatch.setattr("moviola.parts.chat._LARGEST_ANSWER", 1000)
    local_chat.answers = ["x" * 2000]
    with pytest.raises(ChatError, match="answered more than"):
        server(local_chat).ask("s", "u")


def test_a_slow_server_is_a_timeout_and_not_tried_again(local_chat):
    local_chat.answers = [2.0]
    with pytest.raises(ChatError, match=r"no answer in 0.2 seconds.*longer timeout"):
        server(local_chat, timeout=0.2).ask("s", "u")
    assert len(local_chat.requests) == 1


def test_no_server_there():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with pytest.raises(ChatError, match=rf"127.0.0.1:{port}.*cannot be reached.*Start the server"):
        ChatServer(f"http://127.0.0.1:{port}", "m", backoff=0.01).ask("s", "u")


def test_a_proxy_of_the_environment_is_not_asked_for_a_server_here(local_chat, monkeypatch):
    for name in ("http_proxy", "HTTP_PROXY"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    local_chat.answers = ["x"]
    assert server(local_chat).ask("s", "u") == "x"


def test_a_schema_is_sent_and_left_out_where_the_server_refuses_it(local_chat):
    schema = {"type": "object"}
    local_chat.answers = ["{}"]
    willing = server(local_chat)
    willing.ask("s", "u", json_schema=schema)
    assert local_chat.requests[0][2]["response_format"]["json_schema"]["schema"] == schema
    local_chat.requests.clear()
    local_chat.answers = [(400, {"error": "response_format?"}), "{}"]
    unwilling = server(local_chat)
    assert unwilling.ask("s", "u", json_schema=schema) == "{}"
    assert unwilling.ask("s", "u", json_schema=schema) == "{}"
    assert ["response_format" in request[2] for request in local_chat.requests] == [True, False, False]


def test_a_refusal_for_another_reason_keeps_the_schema(local_chat):
    local_chat.answers = [(400, {"error": "too long"}), (400, {"error": "too long"}), "{}"]
    one = server(local_chat)
    with pytest.raises(ChatError, match="too long"):
        one.ask("s", "u", json_schema={"type": "object"})
    one.ask("s", "u", json_schema={"type": "object"})
    assert "response_format" in local_chat.requests[-1][2]


@pytest.mark.parametrize(
    "url",
    [
        "",
        "localhost:8080",
        "ftp://host",
        "http://",
        "http://host/v1?key=1",
        "file:///etc/passwd",
        "http://[::1",
        "http://h:port",
        "http://h:99999",
        "http://h h",
        "http://h/ü",
    ],
)
def test_urls_that_are_none(url):
    with pytest.raises(UsageError, match="looks like http"):
        ChatServer(url)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"timeout": 0}, "timeout > 0"),
        ({"timeout": float("nan")}, "timeout > 0"),
        ({"retries": -1}, "retries >= 0"),
        ({"backoff": -1}, "backoff >= 0"),
        ({"api_key": "a\nb"}, "printable ASCII"),
    ],
)
def test_options_that_cannot_be_meant(options, said):
    with pytest.raises(UsageError, match=said):
        ChatServer("http://127.0.0.1:1", **options)


def test_secrets_stay_out_of_messages(local_chat):
    with pytest.raises(UsageError) as error:
        ChatServer("http://user:hunter2@host/v1")
    assert "hunter2" not in str(error.value)
    assert "secret-key" not in repr(server(local_chat, api_key="secret-key"))


def test_importing_it_needs_nothing_heavy():
    code = (
        "import sys, moviola.parts.chat, moviola.parts.chat_parser;"
        "print([m for m in ('torch', 'numpy', 'httpx') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
