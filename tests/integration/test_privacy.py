"""What clients write stays out of the logs."""

from __future__ import annotations

from pathlib import Path

import ray

from tests.integration.conftest import MODEL

SECRET = "xyzzy-the-secret-prompt"


def test_no_log_contains_a_prompt(http):
    chat = {"model": MODEL, "messages": [{"role": "user", "content": SECRET}], "max_tokens": 2}
    statuses = [
        http.post(path, json=body).status_code
        for path, body in (
            ("/v1/chat/completions", chat),
            ("/v1/chat/completions", {**chat, "stream": True}),
            ("/v1/chat/completions", {**chat, "temperature": 9}),
            ("/v1/chat/completions", {**chat, "messages": [{"role": SECRET, "content": SECRET}]}),
            ("/v1/completions", {"model": MODEL, "prompt": [SECRET, SECRET]}),
            ("/v1/completions", {"model": SECRET, "prompt": SECRET}),
        )
    ]
    assert statuses == [200, 200, 400, 400, 400, 404]
    logs = Path(ray._private.worker._global_node.get_logs_dir_path())
    texts = [path.read_text(errors="replace") for path in logs.rglob("*") if path.is_file()]
    assert any("/v1/chat/completions" in text for text in texts)
    assert not any(SECRET in text for text in texts)
