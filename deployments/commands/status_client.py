"""Asks a running server for its status, and shows it the API key: from a file or the environment, never an argument."""

from __future__ import annotations

import argparse
import json
import os
import urllib.request
from http.client import HTTPException, HTTPMessage
from ipaddress import ip_address
from pathlib import Path
from typing import IO, Any
from urllib.error import HTTPError, URLError
from urllib.parse import quote, urlsplit

from deployments.commands.file_options import file_name
from selectn_core.errors import SelectNError

DEFAULT_URL = "http://127.0.0.1:8000"
DEFAULT_KEY_ENV = "SELECTN_API_KEY"
TIMEOUT_S = 10.0
MAX_ANSWER_BYTES = 64 * 2**20


class NoStatus(SelectNError):
    """There is no server, it does not let us in, or it is another one; the message says which, and what to do."""


def add_options(parser: argparse.ArgumentParser) -> None:
    """The options of commands that ask a server."""
    parser.add_argument("--url", default=DEFAULT_URL, help="where the application is served (default: %(default)s)")
    parser.add_argument(
        "--api-key-file",
        type=file_name,
        help="file with an API key, alone or in a line of 'name key' as the server's own; the first one counts",
    )
    parser.add_argument(
        "--api-key-env",
        default=DEFAULT_KEY_ENV,
        help="environment variable with an API key, read where there is no file (default: %(default)s)",
    )


class StatusClient:
    """Of one server."""

    def __init__(self, url: str, key: str | None = None) -> None:
        """Raises NoStatus for what is no URL of HTTP."""
        self._url, self._key = checked_url(url), key
        handlers: list[Any] = [_NoRedirect()]
        if _is_loopback(self._url):  # a server on this machine: not through $http_proxy
            handlers.append(urllib.request.ProxyHandler({}))
        self._opener = urllib.request.build_opener(*handlers)

    @classmethod
    def of(cls, args: argparse.Namespace) -> StatusClient:
        """From `add_options`. Raises NoStatus, and OSError for a file that cannot be read."""
        return cls(args.url, api_key(args.api_key_file, args.api_key_env))

    def status(self) -> dict[str, Any]:
        """`GET /status.json`. Raises NoStatus."""
        status = self._get("/status.json")
        if not isinstance(status, dict) or "replicas" not in status:
            raise NoStatus(f"{self._url}/status.json is no status: is {self._url} a Select-N server?")
        return status

    def explanation(self, decision_id: str) -> dict[str, Any]:
        """`GET /decisions/{id}`. Raises NoStatus."""
        return self._get(f"/decisions/{quote(decision_id, safe='')}")

    def _get(self, path: str) -> Any:
        headers = {"Accept": "application/json"} | ({"Authorization": f"Bearer {self._key}"} if self._key else {})
        try:
            with self._opener.open(
                urllib.request.Request(self._url + path, headers=headers), timeout=TIMEOUT_S
            ) as answer:
                return json.loads(answer.read(MAX_ANSWER_BYTES))
        except HTTPError as error:
            with error:
                raise NoStatus(self._refusal(path, error)) from None
        except URLError as error:
            raise NoStatus(
                f"no server answers at {self._url}: {_reason(error.reason)}; is one running there?"
            ) from None
        except (OSError, HTTPException) as error:
            raise NoStatus(f"no answer from {self._url}{path}: {_reason(error)}") from None
        except ValueError:
            raise NoStatus(f"{self._url}{path} is not JSON: is {self._url} a Select-N server?") from None

    def _refusal(self, path: str, error: HTTPError) -> str:
        if error.code == 401:
            given = "another API key than the one it was given" if self._key else "an API key"
            return f"the server at {self._url} wants {given}: use --api-key-file, or ${DEFAULT_KEY_ENV}"
        message = _message(error)
        if message is not None:
            return message
        if error.code == 404:
            return f"there is no {path} at {self._url}: is it a Select-N server, and its route_prefix in the URL?"
        return f"{self._url}{path} answers with {error.code}"


def checked_url(url: str) -> str:
    """The URL without a slash at its end. Raises NoStatus."""
    allowed = "expected http://HOST:PORT or https://..., with the application's route_prefix if it has one"
    try:
        parts = urlsplit(url)
        is_good = parts.scheme in ("http", "https") and bool(parts.hostname) and (parts.port is None or parts.port > 0)
    except ValueError:
        is_good = False
    if not is_good or parts.query or parts.fragment or not url.isascii() or not url.isprintable() or " " in url:
        raise NoStatus(f"--url={url!r} is not allowed: {allowed}")
    if parts.username is not None:
        raise NoStatus("--url has a user's name or password: a key comes from --api-key-file or the environment")
    return url.rstrip("/")


def api_key(file: Path | None, environment: str) -> str | None:
    """The first key of the file, else of the variable; None where there is neither. Raises NoStatus; never shows it."""
    text, where = os.environ.get(environment), f"${environment}"
    if file is not None:
        where = f"--api-key-file={str(file)!r}"
        try:
            text = file.read_text(encoding="utf-8-sig")
        except OSError as error:
            raise NoStatus(f"{where} cannot be read: {error.strerror}") from None
        except UnicodeDecodeError:
            raise NoStatus(f"{where} is not UTF-8") from None
    if text is None or not text.strip():
        if file is not None:
            raise NoStatus(f"{where} has no key")
        return None
    lines = [
        line.split() for line in text.replace(";", "\n").splitlines() if line.strip() and line.split()[0][0] != "#"
    ]
    if not lines or len(lines[0]) > 2:
        raise NoStatus(f"{where} has no key: expected a key, or a name and a key")
    key = lines[0][-1]
    if not (key.isascii() and key.isprintable()):
        raise NoStatus(f"{where}: the key has a character that cannot be sent in an HTTP header")
    return key


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    """A key is for the server that was named, and for no other that it may name."""

    def redirect_request(
        self, req: urllib.request.Request, fp: IO[bytes], code: int, msg: str, headers: HTTPMessage, newurl: str
    ) -> None:
        return None


def _is_loopback(url: str) -> bool:
    host = urlsplit(url).hostname or ""
    try:
        return host == "localhost" or ip_address(host).is_loopback
    except ValueError:
        return False


def _reason(error: Any) -> str:
    return str(getattr(error, "strerror", None) or error or type(error).__name__)


def _message(error: HTTPError) -> str | None:
    """What an error in the API's shape says; None for any other, and for an URL that such a server does not know."""
    try:
        said = json.loads(error.read(65_536))["error"]
        return None if said["code"] == "not_found" else str(said["message"])
    except (ValueError, KeyError, TypeError, OSError, HTTPException):
        return None
