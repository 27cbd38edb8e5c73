from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from sklearn.linear_model import LogisticRegression
from torch import Tensor

from fmsuite.core.evaluation import abmil
from fmsuite.core.evaluation.abmil import Abmil, AbmilSettings, fit_abmil, softmax_in_bags
from fmsuite.core.evaluation.bags import Bags

SMALL = AbmilSettings(embedding=8, attention=5, steps=6, batch=3, tiles=4)


def ragged(sizes: list[int], dim: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Bags:
    generator = torch.Generator().manual_seed(seed)
    offsets = torch.tensor([0, *torch.tensor(sizes).cumsum(0).tolist()])
    features = torch.randn(sum(sizes), dim, generator=generator, dtype=dtype)
    return Bags(features, offsets, torch.arange(len(sizes)) % 2, torch.arange(len(sizes)), 2)


def planted(bags: int, tiles: int = 20, dim: int = 32, strength: float = 7.0) -> Bags:
    """Noise; the first tile of every bag of class 1 is moved along the first axis."""
    made = ragged([tiles] * bags, dim)
    made.features.reshape(bags, tiles, dim)[1::2, 0, 0] += strength
    return made


@pytest.fixture
def model() -> Abmil:
    torch.manual_seed(0)
    settings = AbmilSettings(embedding=6, attention=4)
    return Abmil(torch.randn(5), torch.rand(5) + 0.5, 3, settings).double().eval()


def written_out(model: Abmil, features: Tensor, sizes: list[int]) -> tuple[Tensor, Tensor]:
    """Equation 9, bag by bag and vector by vector."""
    linear = model.embed[0]
    assert isinstance(linear, torch.nn.Linear)
    gate, logits, attention = model.attention, [], []
    for bag in features.split(sizes):
        h = [torch.relu(linear.weight @ ((x - model.mean) / model.std) + linear.bias) for x in bag]
        e = [
            gate.w.weight[0]
            @ (torch.tanh(gate.V.weight @ x + gate.V.bias) * torch.sigmoid(gate.U.weight @ x + gate.U.bias))
            for x in h
        ]
        total = sum(torch.exp(value) for value in e)
        a = [torch.exp(value) / total for value in e]
        logits.append(model.head.weight @ sum(w * x for w, x in zip(a, h, strict=True)) + model.head.bias)
        attention += a
    return torch.stack(logits), torch.stack(attention)


def test_forward_and_gradients_equal_the_written_out_equation(model: Abmil) -> None:
    sizes = [1, 4, 2, 7]
    bags = ragged(sizes, 5, dtype=torch.float64)
    found = model(bags.features, bags.bag_of, 4)
    expected = written_out(model, bags.features, sizes)
    torch.testing.assert_close(found, expected)

    parameters = dict(model.named_parameters())
    # The softmax does not feel a constant: its gradient is zero up to rounding.
    del parameters["attention.w.bias"]
    one, other = (
        torch.autograd.grad(logits.square().sum() + (attention**3).sum(), list(parameters.values()))
        for logits, attention in (found, expected)
    )
    torch.testing.assert_close(one, other)


def test_softmax_in_bags_is_that_of_every_bag_and_does_not_overflow() -> None:
    generator = torch.Generator().manual_seed(0)
    scores = torch.randn(12, generator=generator, dtype=torch.float64) * 10
    bag_of = torch.tensor([0, 0, 0, 1, 2, 2, 2, 2, 2, 3, 3, 3])
    expected = torch.cat([scores[bag_of == bag].softmax(0) for bag in range(4)])
    torch.testing.assert_close(softmax_in_bags(scores, bag_of, 4), expected)
    torch.testing.assert_close(softmax_in_bags(scores + 1e5, bag_of, 4), expected)
    assert torch.autograd.gradcheck(lambda x: softmax_in_bags(x, bag_of, 4), scores.requires_grad_())


def test_a_planted_tile_is_learnt_where_mean_pooling_is_weaker() -> None:
    bags = planted(264)
    support, queries = torch.arange(64), torch.arange(64, 264)
    model = fit_abmil(bags, support, seed=0)
    scores, attention = model.predict(bags, queries)
    right = float((scores.argmax(1) == bags.labels[queries]).double().mean())
    pooled = LogisticRegression(max_iter=1000).fit(bags.means[support], bags.labels[support])
    assert right > 0.9
    assert right > pooled.score(bags.means[queries], bags.labels[queries]) + 0.1
    most = attention.reshape(200, 20)[1::2].argmax(1)
    assert float((most == 0).double().mean()) > 0.9


def test_a_seed_gives_the_same_network_and_the_global_random_state_is_left_alone() -> None:
    bags = ragged([3, 9, 1, 5], 4)
    before = torch.random.get_rng_state()
    support = torch.arange(4)
    first, second = fit_abmil(bags, support, 3, SMALL), fit_abmil(bags, support, 3, SMALL)
    assert torch.equal(torch.random.get_rng_state(), before)
    torch.manual_seed(99)
    third, other = fit_abmil(bags, support, 3, SMALL), fit_abmil(bags, support, 4, SMALL)
    for name, value in first.state_dict().items():
        assert torch.equal(value, second.state_dict()[name])
        assert torch.equal(value, third.state_dict()[name])
    assert not torch.equal(first.head.weight, other.head.weight)


def test_only_supports_are_looked_at() -> None:
    bags, changed = ragged([3, 9, 1, 5], 4), ragged([3, 9, 1, 5], 4)
    changed.features[13:] = 100.0
    changed.labels[3] = 0
    support = torch.tensor([0, 1, 2])
    one, other = fit_abmil(bags, support, 0, SMALL), fit_abmil(changed, support, 0, SMALL)
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), other.parameters(), strict=True))


def test_the_scale_of_the_features_does_not_matter_nor_one_that_is_constant() -> None:
    bags = planted(40)
    moved = Bags(bags.features * 1e-3 + 0.5, bags.offsets, bags.labels, bags.groups, 2)
    still = Bags(torch.cat([bags.features, torch.ones(800, 1)], 1), bags.offsets, bags.labels, bags.groups, 2)
    support, queries = torch.arange(20), torch.arange(20, 40)
    plain = fit_abmil(bags, support, 0, SMALL).predict(bags, queries)[0]
    torch.testing.assert_close(fit_abmil(moved, support, 0, SMALL).predict(moved, queries)[0], plain, atol=1e-3, rtol=0)
    model = fit_abmil(still, support, 0, SMALL)
    before = model.predict(still, queries)[0]
    still.features[:, -1] = 1e6
    assert torch.equal(model.predict(still, queries)[0], before)


def test_predictions_in_parts_equal_those_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    bags = ragged([3, 9, 1, 5, 30, 2, 2], 4)
    model = fit_abmil(bags, torch.arange(2), 0, SMALL)
    queries = torch.tensor([6, 4, 2, 3, 5])
    scores, attention = model.predict(bags, queries)
    monkeypatch.setattr(abmil, "_PREDICTED_AT_ONCE", 4)
    parts = model.predict(bags, queries)
    torch.testing.assert_close(parts, (scores, attention), atol=1e-6, rtol=0)
    sums = [float(part.sum()) for part in attention.split(bags.sizes[queries].tolist())]
    assert sums == pytest.approx([1.0] * 5)


def test_large_bags_are_sampled_anew_in_every_step(monkeypatch: pytest.MonkeyPatch) -> None:
    bags = ragged([3, 50, 2], 4)
    seen: list[Tensor] = []
    forward = Abmil.forward

    def spy(self: Abmil, features: Tensor, bag_of: Tensor, count: int) -> tuple[Tensor, Tensor]:
        seen.append(features)
        assert torch.bincount(bag_of, minlength=count).tolist().count(10) == 1
        return forward(self, features, bag_of, count)

    monkeypatch.setattr(Abmil, "forward", spy)
    fit_abmil(bags, torch.arange(3), 0, replace(SMALL, tiles=10, steps=5))
    rows = [{int((bags.features == x).all(1).nonzero()) for x in features} for features in seen]
    assert all(len(row) == 15 and {0, 1, 2, 53, 54} <= row for row in rows)
    assert len(set(map(frozenset, rows))) == 5


def test_every_support_is_used_before_one_comes_again() -> None:
    batches = abmil._batches(7, replace(SMALL, steps=7, batch=3), seed=0)
    assert [len(batch) for batch in batches] == [3] * 7
    together = torch.cat(batches)
    for start in range(0, 21, 7):
        assert sorted(together[start : start + 7].tolist()) == list(range(7))
