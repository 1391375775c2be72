import math

import pytest
import torch

from qncd_cli.errors import QncdError
from qncd_cli.quant.affine import choose_qparams, fake_quantize
from qncd_cli.quant.observers import RangeObserver, choose_range
from qncd_cli.spec import activation_spec


def draws(count, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(2, 6, 4, 4, generator=generator) * (i + 0.1) for i in range(count)]


def observe(tensors, groups=1):
    observer = RangeObserver(6, 1, groups)
    for i, x in enumerate(tensors):
        observer.update(x, i % groups)
    return observer


def same(a, b, names):
    return all(torch.equal(a.state()[n], b.state()[n]) for n in names)


EXACT = (
    "min",
    "max",
    "batch_min",
    "batch_max",
    "histogram",
    "histogram_exponent",
    "channel_absmax",
)


def test_order_does_not_matter():
    tensors = draws(7)
    assert same(observe(tensors), observe(tensors[::-1]), EXACT)


def test_merging_parts_is_observing_everything():
    tensors = draws(8)
    first, second = observe(tensors[:3]), observe(tensors[3:])
    whole = observe(tensors)
    first.merge(second)
    assert same(first, whole, EXACT)
    second.merge(observe(tensors[:3]))
    assert same(second, whole, EXACT)


def test_another_observer_goes_on_from_what_one_remembers():
    tensors = draws(8)
    first, second = observe(tensors[:3], groups=2), RangeObserver(6, 1, 2)
    second.restore(first.memory())
    for i, x in enumerate(tensors[3:], start=3):
        second.update(x, i % 2)
    assert same(second, observe(tensors, groups=2), EXACT)
    assert first.histogram.sum() == observe(tensors[:3]).histogram.sum()  # left as it was


def test_groups_are_kept_apart():
    observer = observe(draws(6), groups=3)
    for group in range(3):
        alone = observe([x for i, x in enumerate(draws(6)) if i % 3 == group])
        assert observer.min[group] == alone.min[0]
        assert torch.equal(observer.histogram[group], alone.histogram[0])


def test_histogram_counts_every_value_where_it_belongs():
    x = torch.tensor([[-3.0, -0.4, 0.0, 0.3, 1.7, 3.99]]).T.reshape(1, 6, 1)
    observer = RangeObserver(6, 1)
    observer.update(x, 0)
    assert observer.histogram.sum() == 6
    assert observer.exponent[0] == 2  # 3.99 < 2^2
    width = 4 / 1024
    occupied = observer.histogram[0].nonzero().flatten()
    low_edges = (occupied - 1024) * width
    for value, edge in zip(sorted(x.flatten().tolist()), low_edges.tolist(), strict=True):
        assert edge <= value < edge + width


def test_minmax_covers_everything_that_was_seen():
    tensors = draws(3)
    state = observe(tensors).state()
    low, high = choose_range(state, "minmax", activation_spec(8))
    assert low[0] == min(x.min() for x in tensors)
    assert high[0] == max(x.max() for x in tensors)


def test_moving_average_is_what_running_means_over_mixed_batches_tend_to():
    """Against the published rule: momentum 0.95 over batches of 16 rows, drawn anew each time."""
    generator = torch.Generator().manual_seed(5)
    x = (
        torch.randn(200, 6, 4, 4, generator=generator)
        * torch.linspace(0.5, 3, 200)[:, None, None, None]
    )
    observer = RangeObserver(6, 1)
    for step in x.split(20):  # along trajectories, one step at a time
        observer.update(step, 0)
    low, high = choose_range(observer.state(), "moving_average", activation_spec(8))
    running, means = None, []
    for _ in range(4000):
        batch = x[torch.randperm(200, generator=generator)[:16]]
        ends = torch.stack([batch.min(), batch.max()])
        running = ends if running is None else 0.95 * running + 0.05 * ends
        means.append(running)
    published = torch.stack(means[100:]).mean(0)
    assert low[0] == pytest.approx(published[0].item(), rel=0.01)
    assert high[0] == pytest.approx(published[1].item(), rel=0.01)


def test_fewer_rows_than_a_batch_are_one_batch():
    x = draws(1)[0]
    state = observe([x]).state()
    assert state["batch_min"][0] == x.min()
    assert state["batch_max"][0] == x.max()


def test_percentile_leaves_the_tails_out():
    x = torch.randn(1, 1, 128, 128, generator=torch.Generator().manual_seed(1))
    observer = RangeObserver(1, 1)
    observer.update(x, 0)
    low, high = choose_range(observer.state(), "percentile", activation_spec(8), 99.0)
    exact = torch.quantile(x.flatten(), torch.tensor([0.005, 0.995]))
    assert low[0] == pytest.approx(exact[0].item(), abs=0.02)
    assert high[0] == pytest.approx(exact[1].item(), abs=0.02)


@pytest.mark.parametrize("bits", [4, 6, 8])
def test_mse_range_beats_minmax_on_data_with_a_tail(bits):
    generator = torch.Generator().manual_seed(0)
    x = torch.nn.functional.silu(torch.randn(1, 4, 50, 50, generator=generator))
    x[0, 0, 0, 0] = 30.0
    observer = RangeObserver(4, 1)
    observer.update(x, 0)
    spec = activation_spec(bits)

    def error(method):
        low, high = choose_range(observer.state(), method, spec)
        return (fake_quantize(x, choose_qparams(low[0], high[0], spec), spec) - x).square().sum()

    # the search sees the histogram, whose bins blur what min-max would lose by a hair at 8 bits
    assert error("mse") < (1.01 if bits == 8 else 0.9) * error("minmax")
    low, _ = choose_range(observer.state(), "mse", spec)
    assert low[0] == pytest.approx(x.min().item(), rel=0.35)  # SiLU's short end is kept


def test_a_group_that_saw_nothing_takes_the_union():
    observer = RangeObserver(6, 1, groups=2)
    x = draws(1)[0]
    observer.update(x, 0)
    low, high = choose_range(observer.state(), "mse", activation_spec(8))
    assert low[1] == x.min()
    assert high[1] == x.max()


@pytest.mark.parametrize("constant", [0.0, -2.0, 1e-30, 1e30])
def test_constants(constant):
    observer = RangeObserver(6, 1)
    observer.update(torch.full((1, 6, 2, 2), constant), 0)
    for method in ("minmax", "moving_average", "percentile", "mse"):
        low, high = choose_range(observer.state(), method, activation_spec(8))
        choose_qparams(low, high, activation_spec(8))


def test_values_that_are_not_finite_are_refused():
    with pytest.raises(QncdError, match="not finite"):
        RangeObserver(6, 1).update(torch.full((1, 6, 2, 2), math.nan), 0)
