"""Layers side by side."""

from __future__ import annotations

import threading

import pytest
import torch

from qncd_cli.ptq.layer_threads import side_by_side


@pytest.fixture(params=[1, 3])
def threads(request):
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    assert torch.get_num_threads() == request.param
    torch.set_num_threads(before)


def product(seed: int) -> torch.Tensor:
    x = torch.randn(300, 300, generator=torch.Generator().manual_seed(seed))
    return (x @ x.T).sum(1)


def test_layers_come_in_order_with_the_same_bits_however_many_threads_there_are(threads):
    found = list(side_by_side(range(20), product))
    assert [layer for layer, _ in found] == list(range(20))
    one = torch.get_num_threads()
    torch.set_num_threads(1)
    assert all(torch.equal(result, product(layer)) for layer, result in found)
    torch.set_num_threads(one)


def test_a_thread_of_its_own_records_no_gradients(threads):
    weight = torch.ones(3, requires_grad=True)
    for _, result in side_by_side([1.0, 2.0], lambda x: weight * x):
        assert not result.requires_grad


def test_what_is_alone_has_all_threads_and_nothing_beside_it(threads):
    running, seen = set(), []

    def work(layer: int) -> int:
        running.add(layer)
        if layer == 2:
            seen.append((set(running), torch.get_num_threads()))
        running.discard(layer)
        return layer

    results = [result for _, result in side_by_side(range(5), work, lambda layer: layer == 2)]
    assert results == list(range(5))
    assert seen == [({2}, threads)]


def test_an_error_comes_in_its_layers_place_and_ends_the_threads(threads):
    def work(layer: int) -> int:
        if layer == 3:
            raise ValueError("layer 3")
        return layer

    came, before = [], threading.active_count()
    with pytest.raises(ValueError, match="layer 3"):
        came.extend(layer for layer, _ in side_by_side(range(9), work))
    assert threading.active_count() == before


def test_layers_that_nobody_asks_for_are_not_begun(threads):
    begun = []
    layers = side_by_side(range(100), begun.append)
    next(layers)
    layers.close()
    assert len(begun) <= 2 * threads + 1
