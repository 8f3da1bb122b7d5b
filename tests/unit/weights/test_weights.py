"""Where weights are: the host store, and what always stays on the device."""

from __future__ import annotations

import pytest
import torch

from selectn_core.device import align_up
from selectn_core.device.emulated import EmulatedDevice
from selectn_core.errors import DeviceMemoryExceeded
from selectn_core.weights.host_store import HostStore
from selectn_core.weights.resident import ResidentWeights, resident_tensors
from selectn_core.weights.units import find_units
from tests.support.tiny_models import FAMILIES, tiny_model


@pytest.fixture
def device():
    with EmulatedDevice(4 << 20, bytes_per_s=50e9) as device:
        yield device


@pytest.mark.parametrize("family", FAMILIES)
def test_parameters_become_views_of_the_store_with_the_same_values(family, device) -> None:
    model = tiny_model(family).model
    before = {name: value.clone() for name, value in model.state_dict().items()}
    units = find_units(model)
    store = HostStore(units, device)
    store.check_integrity()
    assert store.num_bytes == sum(unit.num_bytes for unit in units)
    for unit in units:
        buffer = store.buffer(unit)
        for parameter in unit.parameters:
            assert buffer.data_ptr() <= parameter.data_ptr() < buffer.data_ptr() + buffer.nbytes
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_a_weight_that_changed_is_noticed(device) -> None:
    store = HostStore(find_units(tiny_model().model), device)
    store.buffer(store.units[3])[17] ^= 1
    with pytest.raises(AssertionError, match=r"layers\.3 has changed"):
        store.check_integrity()


@pytest.mark.parametrize("family", FAMILIES)
def test_what_belongs_to_no_unit_moves_to_the_device(family, device) -> None:
    model = tiny_model(family).model
    units = find_units(model)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    resident = ResidentWeights(model, units, device)
    tensors = list(resident_tensors(model, units))
    assert device.allocated_bytes == resident.num_bytes == sum(align_up(tensor.nbytes) for tensor in tensors)
    start = resident.memory.data_ptr()
    assert all(start <= tensor.data_ptr() < start + resident.num_bytes for tensor in tensors)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    in_units = sum(parameter.numel() for unit in units for parameter in unit.parameters)
    everything = sum(parameter.numel() for parameter in model.parameters())
    assert in_units + sum(t.numel() for t in tensors if isinstance(t, torch.nn.Parameter)) == everything


def test_tied_embeddings_move_once(device) -> None:
    model = tiny_model("gemma").model
    assert model.lm_head.weight is model.model.embed_tokens.weight, "the family of this test ties its embeddings"
    ResidentWeights(model, find_units(model), device)
    assert model.lm_head.weight.data_ptr() == model.model.embed_tokens.weight.data_ptr()
    assert device.allocated_bytes < 2 * model.lm_head.weight.nbytes


def test_resident_weights_that_do_not_fit_say_so() -> None:
    model = tiny_model().model
    with (
        EmulatedDevice(4096, bytes_per_s=50e9) as device,
        pytest.raises(DeviceMemoryExceeded, match="embeddings, norms and head wants"),
    ):
        ResidentWeights(model, find_units(model), device)
