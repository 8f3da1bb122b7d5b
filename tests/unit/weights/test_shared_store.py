"""The file all processes of a node share: built once, right or refused, and gone when its users are."""

from __future__ import annotations

import logging
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from selectn_core.errors import HostMemoryExceeded, StoreRefused
from selectn_core.weights import shared_store
from selectn_core.weights.shared_store import PAGE_BYTES, find_or_build, stored_bytes
from selectn_core.weights.store_files import distinct_directories, remove_abandoned
from tests.support.paths import ROOT
from tests.support.store_users import NUM_CHUNKS, StoreUser, build, has_the_right_bytes, names, open_here, sections
from tests.support.tmpfs import small_tmpfs_at

FOREIGN_USER = 12345
AS_ROOT = pytest.mark.skipif(os.geteuid() != 0, reason="takes root")
# Processes are real, so examples take milliseconds to tens of them, and a fixture may serve all examples of a test.
REAL = settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


@pytest.fixture
def directory(tmp_path):
    """An empty directory, as it must be again when the test is over."""
    yield tmp_path
    remove_abandoned(tmp_path)
    assert list(names(tmp_path)) == []


@pytest.fixture
def small_tmpfs(tmp_path):
    """A real tmpfs of 32 KiB, less than the store takes."""
    assert stored_bytes(sections()) > 8 * PAGE_BYTES
    with small_tmpfs_at(tmp_path, 8 * PAGE_BYTES):
        yield tmp_path


def store_path(directory: Path, fingerprint: str = "aa") -> Path:
    return directory / f"selectn-store-{os.geteuid()}-{fingerprint}"


def abandoned(directory: Path, fingerprint: str = "aa") -> Path:
    """The path of a store whose only user was killed."""
    user = StoreUser(directory, fingerprint)
    assert user.says() == "built"
    user.kill()
    return store_path(directory, fingerprint)


# -- what is in it ------------------------------------------------------------------------------------------------


def test_what_was_written_is_read(directory) -> None:
    store = open_here(directory)
    assert has_the_right_bytes(store)
    assert store.model == {"of": "aa"}
    specs = [spec for spec, _ in store.tensors()]
    assert specs == [spec for section in sections() for spec in section.tensors]
    for section in store.sections.values():
        assert section.offset % PAGE_BYTES == 0
        assert store.section(section.name).nbytes == section.num_bytes
    store.verify()
    assert store.path.stat().st_mode & 0o777 == 0o600
    store.close()


def test_tensors_outlive_the_store(directory) -> None:
    store = open_here(directory)
    (_, first), *_ = store.tensors()
    before = first.clone()
    store.close()
    store.close()
    del store
    assert torch.equal(first, before)


def test_nobody_can_write_to_it(directory) -> None:
    user = StoreUser(directory)
    user.says()
    user.tell("write")
    user.process.join()
    assert user.process.exitcode == -signal.SIGSEGV


# -- one, whoever comes -------------------------------------------------------------------------------------------


def test_processes_that_start_at_once_build_it_once(directory) -> None:
    users = [StoreUser(directory) for _ in range(5)]
    assert sorted(user.says() for user in users) == ["built", "found", "found", "found", "found"]
    for user in users:
        user.tell("check")
    assert [user.says() for user in users] == ["right"] * 5
    assert list(names(directory)) == ["aa"]
    for user in users:
        assert list(names(directory)) == ["aa"]
        user.close()
    assert list(names(directory)) == []


def test_who_comes_during_a_build_waits_for_it(directory) -> None:
    first = StoreUser(directory, pause_at_chunk=3)
    assert first.says() == "paused"
    second = StoreUser(directory)
    assert second.is_silent()
    assert not store_path(directory).exists()
    first.tell("go on")
    assert (first.says(), second.says()) == ("built", "found")
    first.close()
    second.close()


def test_different_fingerprints_do_not_wait_for_each_other(directory) -> None:
    first = StoreUser(directory, "aa", pause_at_chunk=3)
    assert first.says() == "paused"
    second = StoreUser(directory, "bb")
    assert second.says() == "built"
    second.close()
    first.tell("go on")
    assert first.says() == "built"
    first.close()


def test_of_several_directories_the_one_that_has_it_is_used(tmp_path) -> None:
    from selectn_core.weights.shared_store import find_or_build

    one, two = tmp_path / "one", tmp_path / "two"
    one.mkdir()
    two.mkdir()
    first = find_or_build([one, two], "aa", lambda: build(two, "aa"))
    second = find_or_build([one, two], "aa", lambda: pytest.fail("it is there"))
    assert first.path == second.path == store_path(two)
    first.close()
    second.close()
    assert not [*one.iterdir(), *two.iterdir()]


# -- ends ---------------------------------------------------------------------------------------------------------


def test_a_killed_user_does_not_keep_it(directory) -> None:
    first, second = StoreUser(directory), StoreUser(directory)
    first.says()
    second.says()
    first.kill()
    second.tell("check")
    assert second.says() == "right"
    second.close()
    assert list(names(directory)) == []


def test_a_store_of_killed_users_is_used_again(directory) -> None:
    abandoned(directory)
    assert list(names(directory)) == ["aa"]
    user = StoreUser(directory)
    assert user.says() == "found"
    user.close()
    assert list(names(directory)) == []


def test_a_store_of_killed_users_goes_when_another_model_starts(directory) -> None:
    abandoned(directory, "aa")
    half = StoreUser(directory, "bb", pause_at_chunk=5)
    assert half.says() == "paused"
    half.kill()
    in_use = StoreUser(directory, "cc")
    assert in_use.says() == "built"
    assert list(names(directory)) == ["cc"]
    other = StoreUser(directory, "dd")
    assert other.says() == "built"
    assert list(names(directory)) == ["cc", "dd"]
    in_use.close()
    other.close()


def test_what_a_builder_has_written_goes_with_it_however_it_ends(directory) -> None:
    """Half a store in shared memory is half the memory of a machine, and nobody would look for it."""
    builder = StoreUser(directory, pause_at_chunk=NUM_CHUNKS - 1)
    assert builder.says() == "paused"
    assert [path.name for path in directory.iterdir()] == [f"{store_path(directory).name}.lock"]
    builder.kill()
    assert list(names(directory)) == ["aa.lock"]  # a few bytes, which the next to come removes


@pytest.mark.parametrize("way", ["itself", "a link", "around", "a mount"])
def test_a_directory_that_is_named_twice_is_one(directory, way, tmp_path_factory) -> None:
    elsewhere = tmp_path_factory.mktemp("elsewhere") / "again"
    again = {"itself": directory, "around": directory / ".." / directory.name}.get(way, elsewhere)
    if way == "a link":
        again.symlink_to(directory)
    elif way == "a mount":
        again.mkdir()
        mounted = subprocess.run(["mount", "--bind", directory, again], capture_output=True, check=False)
        if mounted.returncode != 0:
            pytest.skip(f"cannot mount here: {mounted.stderr.decode()}")
    try:
        assert distinct_directories([directory, again]) == [directory]
        find_or_build([again, directory], "aa", lambda: build(again, "aa")).close()
    finally:
        if way == "a mount":
            subprocess.run(["umount", again], check=True)
    assert list(names(directory)) == []


def test_where_files_need_names_a_half_written_one_is_found_and_removed(directory, monkeypatch) -> None:
    monkeypatch.setattr(shared_store, "open_unnamed", lambda directory: None)
    store = open_here(directory)
    assert has_the_right_bytes(store)
    store.close()
    assert list(names(directory)) == []


@REAL
@given(chunk=st.integers(0, NUM_CHUNKS - 1), someone_waits=st.booleans())
def test_a_builder_killed_at_any_chunk_leaves_nothing(directory, chunk, someone_waits) -> None:
    builder = StoreUser(directory, pause_at_chunk=chunk)
    assert builder.says() == "paused"
    second = StoreUser(directory) if someone_waits else None
    builder.kill()
    second = second or StoreUser(directory)
    assert second.says() == "built"
    second.tell("check")
    assert second.says() == "right"
    second.close()
    assert list(names(directory)) == []


@REAL
@given(delays_ms=st.lists(st.integers(0, 30), min_size=1, max_size=4))
def test_kills_at_any_moment_do_no_harm(directory, delays_ms) -> None:
    """Whatever a process was doing: opening, building, publishing, waiting, closing."""
    for delay_ms in delays_ms:
        user = StoreUser(directory)
        user.tell("close")
        user.process.join(delay_ms / 1e3)
        user.kill()
    last = StoreUser(directory)
    assert last.says() in ("built", "found")
    last.tell("check")
    assert last.says() == "right"
    last.close()
    assert list(names(directory)) == []


@REAL
@given(ends=st.lists(st.tuples(st.integers(0, 3), st.sampled_from(["start", "close", "kill"])), max_size=12))
def test_users_come_and_go(directory, ends) -> None:
    """While anyone uses the store nobody builds it again, and its bytes are right."""
    users: dict[int, StoreUser] = {}
    for number, action in ends:
        if action == "start" and number not in users:
            is_used = bool(users)
            users[number] = StoreUser(directory)
            assert users[number].says() in (("found",) if is_used else ("built", "found"))
        elif action != "start" and number in users:
            getattr(users.pop(number), action)()
        for user in users.values():
            user.tell("check")
            assert user.says() == "right"
    for user in users.values():
        user.close()
    open_here(directory).close()
    assert list(names(directory)) == []


def test_a_process_that_ends_without_closing_leaves_nothing(directory) -> None:
    code = f"from tests.support.store_users import *; store = open_here(Path({str(directory)!r}))"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)
    assert list(names(directory)) == []


def test_a_forked_child_does_not_give_up_its_parents_store(directory) -> None:
    user = StoreUser(directory)
    user.says()
    user.tell("fork")
    assert user.says() == "forked"
    second = StoreUser(directory)
    assert second.says() == "found"
    second.close()
    assert list(names(directory)) == ["aa"]
    user.close()


# -- what cannot be trusted ---------------------------------------------------------------------------------------


@REAL
@given(data=st.data())
def test_a_damaged_store_that_nobody_uses_is_built_again(directory, data) -> None:
    path = abandoned(directory)
    content = bytearray(path.read_bytes())
    if data.draw(st.booleans()):
        position = data.draw(st.integers(0, len(content) - 1))
        content[position] ^= 1 << data.draw(st.integers(0, 7))
    else:
        del content[data.draw(st.integers(0, len(content) - 1)) :]
    path.write_bytes(content)
    store = open_here(directory)
    assert has_the_right_bytes(store)
    store.verify()
    store.close()
    assert list(names(directory)) == []


def test_a_damaged_store_is_told(directory, caplog) -> None:
    path = abandoned(directory)
    with path.open("r+b") as file:
        file.seek(PAGE_BYTES + 100)
        file.write(b"!?")
    with caplog.at_level(logging.WARNING):
        open_here(directory).close()
    assert "is damaged, building it again: the bytes of section 0 have changed" in caplog.text


def test_a_damaged_store_in_use_is_an_error(directory) -> None:
    user = StoreUser(directory)
    assert user.says() == "built"
    with store_path(directory).open("r+b") as file:
        file.write(b"not it")
    with pytest.raises(StoreRefused, match=r"is damaged \(its header .*\) and other processes use it: stop them"):
        open_here(directory)
    user.close()


def test_the_store_of_another_fingerprint_is_not_taken(directory) -> None:
    abandoned(directory, "bb").rename(store_path(directory, "aa"))
    store = open_here(directory)
    assert store.fingerprint == "aa"
    store.close()


@pytest.mark.parametrize("suffix", ["", ".lock"])
def test_symbolic_links_are_refused(directory, suffix) -> None:
    target = directory / "precious"
    target.write_bytes(b"precious")
    link = Path(f"{store_path(directory)}{suffix}")
    link.symlink_to(target)
    with pytest.raises(StoreRefused, match="cannot be trusted.*symbolic"):
        open_here(directory)
    assert target.read_bytes() == b"precious"
    link.unlink()
    target.unlink()


def test_a_link_in_the_place_of_a_half_written_file_is_replaced(directory) -> None:
    target = directory / "precious"
    target.write_bytes(b"precious")
    Path(f"{store_path(directory)}.building").symlink_to(target)
    open_here(directory).close()
    assert target.read_bytes() == b"precious"
    target.unlink()


@pytest.mark.parametrize("mode", [0o644, 0o660, 0o602])
def test_files_that_others_can_open_are_refused(directory, mode) -> None:
    path = abandoned(directory)
    path.chmod(mode)
    with pytest.raises(StoreRefused, match="that only this user can open, found -rw"):
        open_here(directory)
    path.unlink()


@AS_ROOT
def test_files_of_other_users_are_refused(directory) -> None:
    path = abandoned(directory)
    os.chown(path, FOREIGN_USER, -1)
    with pytest.raises(StoreRefused, match=f"of user {FOREIGN_USER}; remove it"):
        open_here(directory)
    remove_abandoned(directory)
    assert path.exists(), "somebody else's file was removed"
    path.unlink()


def test_what_is_no_file_is_refused(directory) -> None:
    os.mkfifo(store_path(directory), 0o600)
    with pytest.raises(StoreRefused, match="found prw"):
        open_here(directory)
    store_path(directory).unlink()


def test_a_full_directory_says_so_and_nothing_is_left(small_tmpfs) -> None:
    with pytest.raises(HostMemoryExceeded, match="is full: No space left"):
        open_here(small_tmpfs)
    assert list(names(small_tmpfs)) == []


def test_an_error_while_building_leaves_nothing(directory) -> None:
    from selectn_core.weights.shared_store import find_or_build

    def fail(section):
        raise RuntimeError("the checkpoint ends here")
        yield

    with pytest.raises(RuntimeError, match="ends here"):
        find_or_build([directory], "aa", lambda: build(directory, "aa", fail))
    assert list(names(directory)) == []
