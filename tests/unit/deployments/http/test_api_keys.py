"""API keys: who is let in, and that no key is ever shown."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from deployments.http.api_keys import ANONYMOUS, ApiKeys, load_api_keys
from selectn_core.errors import ConfigError

ALICE, BOB = "a-key-of-alice-1234", "b-key-of-bob-567890"


@pytest.fixture
def keys(tmp_path) -> ApiKeys:
    path = tmp_path / "keys"
    path.write_text(f"# who may\nalice {ALICE}\n\nbob   {BOB}  # on trial\n", encoding="utf-8")
    return load_api_keys(str(path), None)


def test_the_owner_of_a_key(keys):
    assert keys.owner(f"Bearer {ALICE}") == "alice"
    assert keys.owner(f"bearer  {BOB}") == "bob"


@pytest.mark.parametrize(
    "header", [None, "", "Bearer", f"Basic {ALICE}", ALICE, f"Bearer {ALICE}x", f"Bearer {ALICE[:-1]}"]
)
def test_everybody_else_is_nobody(keys, header):
    assert keys.owner(header) is None


@given(st.text())
def test_no_header_is_an_error(header):
    assert ApiKeys({"a": b"x"}).owner(header) is None
    assert ApiKeys().owner(header) == ANONYMOUS


def test_keys_from_the_environment(monkeypatch):
    monkeypatch.setenv("SOME_KEYS", f"alice {ALICE};bob {BOB}")
    assert load_api_keys(None, "SOME_KEYS").owner(f"Bearer {BOB}") == "bob"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (f"{ALICE}", "line 1: expected a name and a key"),
        ("alice short", "line 1: the key of 'alice' has fewer than 16"),
        (f"alice {ALICE}\nalice {BOB}", "line 2: there is a key of 'alice' already"),
        ("# none", "has no key"),
        (f"alice {ALICE}é", "line 1: the key of 'alice' has a character that clients cannot send"),
        (f"alice {ALICE}\x85{BOB}", "line 1: expected a name and a key"),
        (f"alice {ALICE};bob {BOB}", "line 1: expected a name and a key"),
        (f"alice {ALICE}\n\nbob {ALICE}", "line 3: 'bob' has the same key as 'alice'"),
    ],
)
def test_a_wrong_file_is_named_without_its_keys(tmp_path, text, message):
    path = tmp_path / "keys"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(ConfigError, match=message) as caught:
        load_api_keys(str(path), None)
    assert ALICE not in str(caught.value)
    assert BOB not in str(caught.value)


def test_a_number_sign_within_a_key_is_part_of_it(tmp_path):
    path = tmp_path / "keys"
    path.write_text(f"alice {ALICE}#rest\n#bob {BOB}\ncarol {BOB} # on trial\n\t# nobody\n", encoding="utf-8")
    keys = load_api_keys(str(path), None)
    assert keys.owner(f"Bearer {ALICE}") is None
    assert keys.owner(f"Bearer {ALICE}#rest") == "alice"
    assert keys.owner(f"Bearer {BOB}") == "carol"


def test_a_file_in_another_encoding_is_named_with_its_line(tmp_path):
    path = tmp_path / "keys"
    path.write_bytes(f"# known to all\njosé {ALICE}\n".encode("latin-1"))
    with pytest.raises(ConfigError, match="line 2: is not UTF-8"):
        load_api_keys(str(path), None)


def test_a_byte_order_mark_is_no_part_of_the_first_line(tmp_path):
    path = tmp_path / "keys"
    path.write_bytes(f"# first\r\nalice {ALICE}\r\n".encode("utf-8-sig"))
    assert load_api_keys(str(path), None).owner(f"Bearer {ALICE}") == "alice"


def test_an_empty_source_beside_a_full_one_is_an_error(tmp_path, monkeypatch):
    path = tmp_path / "keys"
    path.write_text(f"alice {ALICE}\n", encoding="utf-8")
    monkeypatch.setenv("SOME_KEYS", "# none")
    with pytest.raises(ConfigError, match="api_keys_env='SOME_KEYS': has no key"):
        load_api_keys(str(path), "SOME_KEYS")


def test_a_missing_source_is_an_error_not_an_open_door(tmp_path, monkeypatch):
    monkeypatch.delenv("NO_KEYS", raising=False)
    with pytest.raises(ConfigError, match="cannot be read"):
        load_api_keys(str(tmp_path / "none"), None)
    with pytest.raises(ConfigError, match="no such environment variable"):
        load_api_keys(None, "NO_KEYS")


def test_keys_are_not_in_any_representation(keys):
    assert ALICE not in repr(keys)
    assert "alice" not in repr(keys)
