"""`selectn status` and `selectn explain` against a server that says what it is told to."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from deployments.cli import main
from deployments.commands import status as status_command
from deployments.commands.serve import ready_message
from deployments.commands.serving import free_port
from deployments.commands.status_client import api_key
from deployments.commands.status_report import render_decisions, render_status
from deployments.status.collect import to_json
from deployments.status.words import explanation
from tests.support.statuses import HOSTILE, a_status, admission_decision

KEY = "0123456789abcdefghij"


class Server:
    """Answers with `answers` by path, and notes whose key came."""

    def __init__(self) -> None:
        self.answers: dict[str, tuple[int, Any]] = {
            "/status.json": (200, to_json(a_status())),
            "/decisions/a-in1-3": (200, to_json(explanation(admission_decision()))),
        }
        self.keys: list[str | None] = []
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:  # as http.server calls it
                outer.keys.append(self.headers["Authorization"])
                missing = {"error": {"code": "decision_not_found", "message": "there is no decision"}}
                code, body = outer.answers.get(self.path, (404, missing))
                content = body if isinstance(body, bytes) else json.dumps(body).encode()
                self.send_response(code)
                if code == 302:
                    self.send_header("Location", "/elsewhere")
                self.send_header("Content-Length", str(len(content)))
                self.end_headers()
                self.wfile.write(content)

            def log_message(self, *_: object) -> None:
                """Tests read what is printed."""

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        self._thread = threading.Thread(target=self._server.serve_forever)
        self._thread.start()

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    monkeypatch.delenv("SELECTN_API_KEY", raising=False)
    server = Server()
    yield server
    server.close()


def test_the_tables_have_everything(server, capsys):
    assert main(["status", "--url", f"{server.url}/"]) == 0
    text = capsys.readouterr().out
    for part in ("12/30", "1.4 s/2 s", "210 ms/200 ms", "98.3 %", "12,345 tokens", "r2: no answer for 12 s"):
        assert part in text, part
    for part in ("25 GB/s, pcie link", "gpu_lost: fell off the bus", "its agent does not answer", "record 40 s"):
        assert part in text, part
    for part in ("PROBLEM: ingresses", "PROBLEM: user_config is wrong", "it has just started", "i-r1-7", "a-in1-3"):
        assert part in text, part


def test_a_name_cannot_drive_the_terminal():
    assert "\x1b" in HOSTILE
    text = render_status(to_json(a_status()))
    assert not {each for each in text if not each.isprintable()} - {"\n"}
    assert "<script>" in text


def test_json_is_what_the_server_said(server, capsys):
    assert main(["status", "--json", "--url", server.url]) == 0
    assert json.loads(capsys.readouterr().out) == to_json(a_status())


@pytest.mark.parametrize("as_json", [False, True])
def test_watching_goes_on_until_it_is_interrupted_and_over_a_server_that_is_away(server, capsys, monkeypatch, as_json):
    num_waits = 0

    def sleep(seconds: float) -> None:
        nonlocal num_waits
        num_waits += 1
        assert seconds == 2.0
        server.answers["/status.json"] = (503 if num_waits == 1 else 200, to_json(a_status()))
        if num_waits == 3:
            raise KeyboardInterrupt

    monkeypatch.setattr(status_command.time, "sleep", sleep)
    assert main(["status", "--watch", "--url", server.url, *(["--json"] if as_json else [])]) == 0
    captured = capsys.readouterr()
    assert "answers with 503" in captured.err
    if as_json:
        assert [json.loads(line)["version"] for line in captured.out.splitlines()] == [1, 1]
    else:
        assert captured.out.count("status at ") == 2
    assert "\x1b" not in captured.out, "that is no terminal"


@pytest.mark.parametrize("command", [["status"], ["status", "--watch"], ["explain"], ["explain", "i-a-1"]])
def test_without_a_server_it_says_so(command, capsys):
    url = f"http://127.0.0.1:{free_port('127.0.0.1')}"
    assert main([*command, "--url", url]) == 2
    assert f"no server answers at {url}: Connection refused" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        ((200, b"<html>"), "is not JSON: is http"),
        ((200, {"some": "thing"}), "is no status: is http"),
        ((200, [1]), "is no status: is http"),
        ((404, b"no"), "is it a Select-N server, and its route_prefix in the URL?"),
        ((404, {"error": {"code": "not_found", "message": "unknown URL"}}), "is it a Select-N server"),
        ((500, b""), "answers with 500"),
        ((503, {"error": {"code": "unavailable", "message": "the ingress must stop"}}), "the ingress must stop"),
        ((401, {"error": {"code": "invalid_api_key", "message": "x"}}), "wants an API key: use --api-key-file"),
    ],
)
def test_what_is_no_status_is_an_error_that_says_what_to_look_at(server, capsys, answer, message):
    server.answers["/status.json"] = answer
    assert main(["status", "--url", server.url]) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    "url",
    ["127.0.0.1:8000", "ftp://a", "http://", "http://a:99999", "http://a?b", "http://a b", "http://a\x1b", "http://["],
)
def test_what_is_no_url_is_refused(url, capsys):
    assert main(["status", "--url", url]) == 2
    assert "is not allowed: expected http://HOST:PORT" in capsys.readouterr().err


def test_a_password_in_a_url_is_refused_and_not_shown(capsys):
    assert main(["status", "--url", "http://me:a-secret@localhost"]) == 2
    assert "a-secret" not in capsys.readouterr().err


# -- keys -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("content", [KEY, f"# mine\n\nme {KEY}\nother another-key-of-somebody\n", f"\ufeff{KEY}\n"])
def test_a_key_comes_from_a_file_as_the_servers_own(server, tmp_path, content):
    file = tmp_path / "key"
    file.write_text(content, encoding="utf-8")
    assert main(["status", "--url", server.url, "--api-key-file", str(file)]) == 0
    assert server.keys == [f"Bearer {KEY}"]


def test_a_key_comes_from_the_environment_and_a_file_counts_first(server, tmp_path, monkeypatch):
    monkeypatch.setenv("SELECTN_API_KEY", KEY)
    monkeypatch.setenv("OTHER", "another-key-of-somebody")
    (tmp_path / "key").write_text("a-key-in-a-file-1234", encoding="utf-8")
    assert main(["status", "--url", server.url]) == 0
    assert main(["status", "--url", server.url, "--api-key-env", "OTHER"]) == 0
    assert main(["status", "--url", server.url, "--api-key-file", str(tmp_path / "key")]) == 0
    assert server.keys == [f"Bearer {KEY}", "Bearer another-key-of-somebody", "Bearer a-key-in-a-file-1234"]


def test_a_key_that_is_not_accepted_is_not_shown(server, monkeypatch, capsys):
    monkeypatch.setenv("SELECTN_API_KEY", KEY)
    server.answers["/status.json"] = (401, b"")
    assert main(["status", "--url", server.url]) == 2
    assert "wants another API key than the one it was given" in (error := capsys.readouterr().err)
    assert KEY not in error


def test_a_key_goes_to_no_other_server(server, monkeypatch, capsys):
    monkeypatch.setenv("SELECTN_API_KEY", KEY)
    server.answers["/status.json"] = (302, b"")
    assert main(["status", "--url", server.url]) == 2
    assert "answers with 302" in capsys.readouterr().err
    assert len(server.keys) == 1


def test_a_key_is_no_argument(capsys):
    with pytest.raises(SystemExit):
        main(["status", "--api-key", KEY])


@pytest.mark.parametrize("content", [b"", b"# nothing\n", b"a b c\n", b"\xff\xfe", "schl\u00fcssel-der-tests".encode()])
def test_a_file_without_a_key_is_refused(tmp_path: Path, content: bytes, capsys):
    file = tmp_path / "key"
    file.write_bytes(content)
    assert main(["status", "--api-key-file", str(file)]) == 2
    assert "--api-key-file=" in capsys.readouterr().err


def test_a_file_that_is_not_there_is_named(tmp_path, capsys):
    assert main(["status", "--api-key-file", str(tmp_path / "none")]) == 2
    assert "none' cannot be read: No such file" in capsys.readouterr().err


def test_without_a_key_none_is_sent(server, monkeypatch):
    monkeypatch.setenv("SELECTN_API_KEY", "")
    assert api_key(None, "SELECTN_API_KEY") is None
    assert main(["explain", "--url", server.url]) == 0
    assert server.keys == [None]


# -- decisions ------------------------------------------------------------------------------------------------------


def test_the_latest_decisions_are_listed_with_their_reasons(server, capsys):
    assert main(["explain", "--url", server.url]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "decisions"
    assert "a-in1-3" in lines[1]
    assert "refused 500 tokens: its first token would have come after its TTFT objective" in lines[1]
    assert "i-r1-7" in lines[2]


def test_a_decision_is_explained(server, capsys):
    assert main(["explain", "a-in1-3", "--url", server.url]) == 0
    text = capsys.readouterr().out
    assert text.startswith("a-in1-3: admission decision at ")
    assert "request cmpl-1\n" in text
    for part in (
        "  known: ",
        "  decided: To refuse it",
        "  why: It was refused",
        "  what would have changed it: A looser",
    ):
        assert part in text, part


def test_one_that_is_not_there_says_so(server, capsys):
    assert main(["explain", "i/../x", "--url", server.url]) == 2
    assert "there is no decision" in capsys.readouterr().err


def test_no_decisions_yet():
    assert render_decisions([]) == "decisions: none yet"


def test_a_server_with_keys_is_ready_all_the_same(server):
    """The command that started it has no key to ask for the model's name with."""
    server.answers["/v1/models"] = (401, b"")
    message = ready_message(server.url)
    assert f"status: {server.url}/status" in message
    assert "-H 'Authorization: Bearer KEY'" in message
    server.answers["/v1/models"] = (200, {"data": [{"id": "tiny"}]})
    assert "Authorization" not in (message := ready_message(server.url))
    assert '"model": "tiny"' in message
    server.answers["/v1/models"] = (500, b"")
    with pytest.raises(OSError):
        ready_message(server.url)
