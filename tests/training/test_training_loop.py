import pytest
import torch
from training_loop import Ema, Progress, cosine


def train(folder, stops):
    """A small regression that is stopped after each of the steps; its weights and their average."""
    for stop in stops:
        torch.manual_seed(0)
        model = torch.nn.Linear(3, 1)
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
        generator = torch.Generator().manual_seed(0)
        ema = Ema(model, 0.9)
        parts = {"model": model, "optimizer": optimizer, "ema": ema}
        progress = Progress(folder / "part.pt", generator, **parts)
        for _step in range(progress.restore(), stop):
            x = torch.randn(4, 3, generator=generator)
            loss = (model(x) - x.sum(1, keepdim=True)).pow(2).mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            ema.update(model)
        progress.keep(stop, now=True)
    return [*model.parameters(), *ema.shadow]


def test_training_that_was_stopped_goes_on_as_if_it_had_not_been(tmp_path):
    (tmp_path / "one").mkdir()
    whole = train(tmp_path / "one", [10])
    parts = train(tmp_path / "two", [4, 7, 10])
    for one, other in zip(whole, parts, strict=True):
        assert torch.equal(one, other)


def test_a_file_is_written_only_when_the_last_one_is_old(tmp_path):
    generator = torch.Generator()
    Progress(tmp_path / "a.pt", generator, every=1000).keep(1)
    Progress(tmp_path / "b.pt", generator, every=0).keep(1)
    assert [path.name for path in tmp_path.iterdir()] == ["b.pt"]


def test_the_learning_rate_rises_and_falls_to_zero():
    rates = [cosine(step, 100, warmup=10) for step in range(101)]
    assert rates[9] == rates[10] == 1
    assert rates[0] == pytest.approx(0.1)
    assert rates[100] == pytest.approx(0)
    assert rates[10:] == sorted(rates[10:], reverse=True)
