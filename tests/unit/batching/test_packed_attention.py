"""All requests in one call get what each would get by itself, whatever else is in the step."""

from __future__ import annotations

import inspect
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn.attention import varlen

import selectn_core.batching.attention_path as path_module
import tests.support.reference_varlen as reference
from selectn_core.batching import KvShape, packed_attention
from selectn_core.batching.attention_path import attention_path
from tests.support.paged_attention import PagedRequests
from tests.support.reference_varlen import kernel_branch, packing

CPU = torch.device("cpu")
PLAIN = KvShape(num_heads=2, head_dim=8)
REQUESTS = st.lists(st.tuples(st.integers(1, 6), st.integers(0, 9)), min_size=1, max_size=5)
WINDOWS = st.sampled_from([None, 1, 4, 12])


@given(
    requests=REQUESTS,
    window=WINDOWS,
    num_kv_heads=st.sampled_from([1, 2]),
    groups=st.sampled_from([1, 3]),
    dims=st.sampled_from([(8, 8), (8, 4), (8, 16), (24, 16)]),
    scaling=st.sampled_from([None, 0.3]),
    page_size=st.sampled_from([3, 4]),
    seed=st.integers(0, 1000),
)
def test_equals_a_call_for_each_request(requests, window, num_kv_heads, groups, dims, scaling, page_size, seed) -> None:
    """Fresh prompts, chunks with a past, and decodes; and the cache is the same after it."""
    packed = PagedRequests(
        requests=requests,
        num_kv_heads=num_kv_heads,
        head_dim=dims[0],
        value_dim=dims[1],
        page_size=page_size,
        window=window,
        seed=seed,
    )
    query = packed.random(1, num_kv_heads * groups, sum(n for n, _ in requests), dims[0])
    expected, caches = packed.attend_and_write(query, scaling=scaling)
    with packing():
        output, caches_after = packed.attend_and_write(query, is_packed=True, scaling=scaling)
    torch.testing.assert_close(output, expected, rtol=1e-4, atol=1e-5)
    if scaling is None:
        torch.testing.assert_close(output, packed.attend_by_definition(query), rtol=1e-4, atol=1e-5)
    trash = slice(page_size, page_size + 1)  # where what a window does not keep is written, in any order
    for mine, other in zip(caches_after, caches, strict=True):
        mine[trash] = other[trash] = 0
        assert torch.equal(mine.nan_to_num(7), other.nan_to_num(7))


def test_a_step_that_is_packed_and_meets_sinks_is_an_error() -> None:
    packed = PagedRequests(requests=[(2, 3)], num_kv_heads=1, head_dim=8, value_dim=8)
    query = packed.random(1, 1, 2, 8)
    for argument in ({"softcap": 2.0}, {"s_aux": packed.random(1)}):
        with packing(), pytest.raises(RuntimeError, match="layer 0 has soft caps or sinks"):
            packed.attend(query, is_packed=True, **argument)


# -- what is asked of varlen_attn -----------------------------------------------------------------------------------


def called_with(requests: list[tuple[int, int]], window: int | None, groups: int) -> list[dict[str, Any]]:
    calls = []

    def attend(*args: Any, **kwargs: Any) -> Any:
        calls.append(inspect.signature(varlen.varlen_attn).bind(*args, **kwargs).arguments)
        return reference.varlen_attn(*args, **kwargs)

    packed = PagedRequests(requests=requests, num_kv_heads=2, head_dim=8, value_dim=8, window=window)
    with packing(attend):
        packed.attend(packed.random(1, 2 * groups, sum(n for n, _ in requests), 8), is_packed=True)
    return calls


@given(requests=REQUESTS, window=WINDOWS, groups=st.sampled_from([1, 3]))
def test_one_call_that_takes_the_branch_of_every_other_step(requests, window, groups) -> None:
    """A kernel for one query, or without a window, sums in another order: the others in the step would matter."""
    (call,) = called_with(requests, window, groups)
    (longest,) = called_with([(40, 50), (1, 0)], window, groups)
    branches = [kernel_branch(each, 2 * groups, 2) for each in (call, longest)]
    assert branches[0] == branches[1]
    assert call["num_splits"] == 1


def test_the_branch_would_change_by_itself() -> None:
    """Of the test above: were the longest lengths passed on as they are, it would fail."""
    for window_size, small, large in (((-1, 0), (1, 9), (6, 9)), ((3, 0), (4, 4), (4, 9)), ((3, 0), (2, 3), (2, 4))):
        calls = [{"window_size": window_size, "max_q": max_q, "max_k": max_k} for max_q, max_k in (small, large)]
        assert kernel_branch(calls[0], 4, 2) != kernel_branch(calls[1], 4, 2)


def test_the_reference_has_the_signature_of_torch() -> None:
    """Every name, order, kind and default; with the arguments that are passed on among them."""
    ours, theirs = (
        [(each.name, each.kind, each.default) for each in inspect.signature(function).parameters.values()]
        for function in (reference.varlen_attn, varlen.varlen_attn)
    )
    assert ours == theirs
    assert packed_attention.varlen_attn is varlen.varlen_attn


def test_torch_itself_takes_the_call_as_far_as_a_cpu_goes() -> None:
    """Its own checks of heads pass, and its operator is called: there is no kernel for it here."""
    packed = PagedRequests(requests=[(3, 2), (1, 4)], num_kv_heads=2, head_dim=8, value_dim=8, window=3)
    query = packed.random(1, 4, 4, 8)
    with pytest.raises(NotImplementedError, match="_flash_attention_forward.*CPU"):
        packed.attend(query, is_packed=True)


def test_documentation_says_that_one_split_is_batch_invariant() -> None:
    documented = " ".join((varlen.varlen_attn.__doc__ or "").split())
    assert "(W, 0) for causal attention with sliding window of size W" in documented
    assert "bitwise identical outputs are guaranteed for a given sequence" in documented


# -- which path -----------------------------------------------------------------------------------------------------


def test_a_cpu_attends_by_request() -> None:
    path = attention_path(CPU, torch.bfloat16, PLAIN, None)
    assert (path.name, path.reason) == ("by_request", "varlen_attn is for CUDA")


@pytest.mark.parametrize(("capability", "name"), [((7, 5), "by_request"), ((8, 0), "packed"), ((12, 0), "packed")])
def test_an_old_gpu_attends_by_request(capability, name, monkeypatch) -> None:
    """Of a GPU that is only said to be there: what it would be asked for is not tried."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(path_module, "_failed_trial", lambda *_: None)
    path = attention_path(torch.device("cuda", 0), torch.bfloat16, PLAIN, None)
    assert path.name == name
    assert path.reason == (None if name == "packed" else "varlen_attn wants compute capability 8.0")


def test_a_torch_without_splits_to_choose_attends_by_request(monkeypatch) -> None:
    def of_an_older_torch(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, *, scale=None, window_size=(-1, -1)): ...

    monkeypatch.setattr(packed_attention, "varlen_attn", of_an_older_torch)
    path = attention_path(torch.device("cuda", 0), torch.bfloat16, PLAIN, None)
    assert (path.reason or "").endswith("has no enable_gqa, num_splits")


@pytest.mark.parametrize(
    ("dtype", "shape", "reason"),
    [
        (torch.float64, PLAIN, "takes no torch.float64"),
        (torch.bfloat16, KvShape(num_heads=2, head_dim=8, is_plain=False), "sinks or soft caps"),
        (torch.bfloat16, KvShape(num_heads=2, head_dim=20), "multiple of 8, up to 256: not 20"),
        (torch.bfloat16, KvShape(num_heads=2, head_dim=264), "multiple of 8, up to 256: not 264"),
    ],
)
def test_what_is_not_taken_goes_by_request(dtype, shape, reason) -> None:
    with packing():
        path = attention_path(CPU, dtype, shape, None)
    assert path.name == "by_request"
    assert reason in (path.reason or "")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("window", [None, 1, 5, 4096])
@pytest.mark.parametrize("head_dim", [8, 64, 128, 256])
def test_what_is_taken_is_packed(dtype, window, head_dim) -> None:
    with packing():
        path = attention_path(CPU, dtype, KvShape(num_heads=2, head_dim=head_dim), window)
    assert (path.name, path.reason) == ("packed", None)


def aligned_at_the_top(query: torch.Tensor, key: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
    """Masks as of scaled_dot_product_attention with is_causal: the first query is at the first key."""
    starts_q, starts_k = args[1], args[2]
    own = torch.cat(
        [torch.arange(int(k), int(k) + int(n)) for k, n in zip(starts_k, starts_q.diff().tolist(), strict=False)]
    )
    return reference.varlen_attn(query, key[own], args[0][own], starts_q, starts_q, *args[3:], **kwargs)


def with_a_window_too_wide(*args: Any, window_size: tuple[int, int], **kwargs: Any) -> Any:
    left, right = window_size
    return reference.varlen_attn(*args, window_size=(left + 1 if left >= 0 else left, right), **kwargs)


def that_refuses(*args: Any, **kwargs: Any) -> Any:
    raise RuntimeError("num_splits requires FA3\nmore lines")


@pytest.mark.parametrize(
    ("attend", "window", "reason"),
    [
        (aligned_at_the_top, None, "varlen_attn is off by"),
        (with_a_window_too_wide, 2, "varlen_attn is off by"),
        (that_refuses, None, "varlen_attn refuses a trial: num_splits requires FA3"),
    ],
)
def test_a_trial_finds_another_varlen_attn(attend, window, reason) -> None:
    with packing(attend):
        path = attention_path(CPU, torch.bfloat16, PLAIN, window)
    assert path.name == "by_request"
    assert (path.reason or "").startswith(reason)
    assert "\n" not in (path.reason or "")
