"""A client for language models behind an OpenAI-compatible URL: llama.cpp, vLLM, Ollama, a paid service.

It asks one question and returns one text, with temperature 0. It needs no package beyond Python's own; a
server on this machine is asked directly, whatever proxy the environment names. The key goes into the
request's header and into no message.
"""

from __future__ import annotations

import json
import time
import urllib.error
import urllib.request
from collections.abc import Mapping
from http.client import HTTPException
from typing import Any
from urllib.parse import SplitResult, urlsplit

from moviola.types import MoviolaError, UsageError, printable

__all__ = ["ChatError", "ChatServer"]

_TRY_AGAIN = frozenset({408, 429, 500, 502, 503, 504})
_LARGEST_ANSWER = 16 << 20  # bytes
_LONGEST_PAUSE = 30.0  # seconds, whatever the server's Retry-After asks
_LOOPBACK = ("localhost", "127.0.0.1", "::1")


class ChatError(MoviolaError):
    """A language model's server that cannot be reached, refuses, or answers what was not asked for."""


class _Busy(Exception):
    """A failure that may pass: `error` is raised if it does not, `pause` is the seconds the server asks."""

    def __init__(self, error: ChatError, pause: float = 0.0) -> None:
        self.error, self.pause = error, pause


def _address(url: str) -> SplitResult:
    """The parts of a server's URL, checked. A name or password in it stays out of the message."""
    if "@" in url:
        raise UsageError("A chat server's URL may not hold a name or password.", hint="Pass api_key.")
    try:
        parts = urlsplit(url)
        sound = bool(parts.hostname) and parts.port != 0 and not (parts.query or parts.fragment)
    except ValueError:
        sound = False
    if not sound or parts.scheme not in ("http", "https") or not url.isascii() or " " in url:
        raise UsageError(
            f"A chat server's URL looks like http://127.0.0.1:8080/v1, got '{printable(url)}'.",
            hint="Give the scheme, host and port, without a query.",
        )
    return parts


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    """A redirect is an error: following it would hand the key and the text to another host."""

    def redirect_request(self, *_: Any) -> None:
        return None


def _excerpt(body: bytes) -> str:
    text = " ".join(body[:2000].decode("utf-8", "replace").split())
    return printable(text[:160]) or "nothing"


def _message(body: bytes) -> str:
    """What a server says of an error: `{"error": {"message": ...}}` or a variant, else the body's start."""
    try:
        value = json.loads(body)
    except ValueError:
        return _excerpt(body)
    for key in ("error", "message", "detail"):
        if isinstance(value, Mapping) and key in value:
            value = value[key]
    return printable(value[:300]) if isinstance(value, str) else _excerpt(body)


class ChatServer:
    """One model at one URL.

    `url` is the server's root ("http://127.0.0.1:8080", to which "/v1" is added) or its API's ("https://host/v1").
    `model` None takes the only model the server lists. `timeout` is seconds without an answer. Refused
    connections, and statuses 408, 429 and 5xx, are tried `retries` times more, after `backoff`, 2 `backoff`,
    4 `backoff` ... seconds or what the server asks for; a timeout is not tried again.
    """

    def __init__(
        self,
        url: str,
        model: str | None = None,
        *,
        timeout: float = 60.0,
        api_key: str | None = None,
        retries: int = 2,
        backoff: float = 0.5,
    ) -> None:
        parts = _address(url.strip())
        if not timeout > 0 or retries < 0 or backoff < 0:
            raise UsageError(
                "A chat server needs timeout > 0, retries >= 0 and backoff >= 0, "
                f"got {timeout}, {retries} and {backoff}."
            )
        if api_key is not None and not (api_key.isascii() and api_key.isprintable()):
            raise UsageError("An API key may hold printable ASCII characters only.")
        path = parts.path.rstrip("/").removesuffix("/chat/completions") or "/v1"
        self.url = f"{parts.scheme}://{parts.netloc}{path}"
        self.timeout, self.retries, self.backoff = timeout, retries, backoff
        self._model = model
        self._api_key = api_key
        self._takes_schema = True
        direct = (urllib.request.ProxyHandler({}),) if parts.hostname in _LOOPBACK else ()
        self._opener = urllib.request.build_opener(_NoRedirect, *direct)

    def __repr__(self) -> str:
        return f"ChatServer({self.url!r}, model={self._model!r})"

    @property
    def model(self) -> str:
        """The model's name, asked of the server once where none was given."""
        if self._model is None:
            answer = self._request("/models")
            listed = answer.get("data") if isinstance(answer, Mapping) else None
            if not isinstance(listed, list) or not all(isinstance(m, Mapping) and "id" in m for m in listed):
                raise ChatError(f"{self.url}/models answered no list of models.", hint="Name the model.")
            names = [str(m["id"]) for m in listed]
            if len(names) != 1:
                raise UsageError(
                    f"{self.url} serves {len(names)} models, expected one where none is named.",
                    hint=f"Name one of: {printable(', '.join(names[:20]))}"
                    if names
                    else "Load a model there.",
                )
            self._model = names[0]
        return self._model

    def ask(self, system: str, user: str, *, json_schema: Mapping[str, Any] | None = None) -> str:
        """The model's answer to `user` under the instruction `system`.

        With `json_schema` the server is asked to hold the answer to it. One that refuses the request (400 or
        422) is asked again without, then and from there on, so the caller checks the answer in any case.
        """
        body: dict[str, Any] = {
            "model": self.model,
            "messages": [{"role": "system", "content": system}, {"role": "user", "content": user}],
            "temperature": 0,
        }
        if json_schema is not None and self._takes_schema:
            schema = {"name": "answer", "schema": dict(json_schema)}
            held = body | {"response_format": {"type": "json_schema", "json_schema": schema}}
            answer = self._request("/chat/completions", held, may_refuse=True)
            if answer is not None:
                return self._content(answer)
            answer = self._request("/chat/completions", body)
            self._takes_schema = False
            return self._content(answer)
        return self._content(self._request("/chat/completions", body))

    def _content(self, answer: Any) -> str:
        try:
            choice = answer["choices"][0]
            content, reason = choice["message"]["content"], choice.get("finish_reason")
        except (KeyError, IndexError, TypeError, AttributeError):
            start = _excerpt(json.dumps(answer).encode())
            raise ChatError(
                f"{self.url} answered JSON without choices[0].message.content: {start}",
                hint="Is this an OpenAI-compatible chat server?",
            ) from None
        if reason == "length":
            raise ChatError(
                "The model's answer was cut off at its length limit.", hint="Raise the limit there."
            )
        if not isinstance(content, str) or not content.strip():
            raise ChatError(f"The model {self.model} answered nothing.", hint="Try another model.")
        return content

    def _request(self, path: str, body: Mapping[str, Any] | None = None, *, may_refuse: bool = False) -> Any:
        """The JSON answer; None if `may_refuse` and the server calls the request wrong."""
        for attempt in range(self.retries + 1):
            try:
                return self._once(path, body, may_refuse)
            except _Busy as busy:
                if attempt == self.retries:
                    raise busy.error from busy.__cause__
                time.sleep(min(max(self.backoff * 2**attempt, busy.pause), _LONGEST_PAUSE))
        raise AssertionError("the last attempt returns or raises")

    def _once(self, path: str, body: Mapping[str, Any] | None, may_refuse: bool) -> Any:
        where = self.url + path
        headers = {"Content-Type": "application/json", "Accept": "application/json"}
        if self._api_key:
            headers["Authorization"] = f"Bearer {self._api_key}"
        data = None if body is None else json.dumps(body).encode()
        try:
            with self._opener.open(
                urllib.request.Request(where, data, headers), timeout=self.timeout
            ) as response:
                answer = response.read(_LARGEST_ANSWER + 1)
        except urllib.error.HTTPError as error:
            with error:
                said = error.read(_LARGEST_ANSWER)
            if may_refuse and error.code in (400, 422):
                return None
            failure = ChatError(
                f"{where} answered status {error.code}: {_message(said)}", hint=_hint(error.code)
            )
            if error.code in _TRY_AGAIN:
                asked = error.headers.get("Retry-After") or ""
                raise _Busy(failure, float(asked) if asked.isdigit() else 0.0) from error
            raise failure from error
        except (OSError, HTTPException) as error:
            reason = getattr(error, "reason", error)
            if isinstance(reason, TimeoutError):
                raise ChatError(
                    f"{where} gave no answer in {self.timeout:g} seconds.", hint="Give a longer timeout."
                ) from error
            raise _Busy(
                ChatError(
                    f"{where} cannot be reached: {reason}.",
                    hint="Start the server, or check the host and the port.",
                )
            ) from error
        if len(answer) > _LARGEST_ANSWER:
            raise ChatError(f"{where} answered more than {_LARGEST_ANSWER >> 20} MiB.")
        try:
            return json.loads(answer)
        except ValueError as error:
            raise ChatError(
                f"{where} answered no JSON: {_excerpt(answer)}", hint="Does the URL end in /v1?"
            ) from error


def _hint(status: int) -> str:
    if status in (401, 403):
        return "Check the API key."
    if status == 404:
        return "Check the URL (does it end in /v1?) and the model's name."
    if 300 <= status < 400:
        return "Redirects are not followed: give the address it leads to."
    return "See the server's log." if status >= 500 else "The server did not accept the request."
