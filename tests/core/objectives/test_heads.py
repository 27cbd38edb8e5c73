"""DINO's head against the public implementation."""

from __future__ import annotations

import pytest
import torch

from fmsuite.core.objectives.heads import DINOHead, WeightNormLinear


def test_outputs_and_gradient_norms_equal_the_reference_under_its_parameter_names(load):
    reference = load("dino_head")
    head = DINOHead(64, 256, hidden=96, bottleneck=32)
    head.load_state_dict(reference["state_dict"])
    out = head(reference["x"])
    torch.testing.assert_close(out, reference["out"], atol=1e-5, rtol=1e-5)
    assert not head.last_layer.weight_g.requires_grad
    out.square().mean().backward()
    for part, module in (("mlp", head.mlp), ("last_layer", head.last_layer), ("total", head)):
        norms = [p.grad.norm() for p in module.parameters() if p.grad is not None]
        assert torch.stack(norms).norm().item() == pytest.approx(reference["grad_norm"][part], rel=1e-5)


def test_logits_are_cosines_while_the_gain_is_frozen():
    head = DINOHead(8, 20, hidden=16, bottleneck=4)
    x = torch.randn(50, 8)
    z = torch.nn.functional.normalize(head.mlp(x), dim=-1)
    w = torch.nn.functional.normalize(head.last_layer.weight_v, dim=-1)
    torch.testing.assert_close(head(x), z @ w.T)
    torch.testing.assert_close(head.embed(x).norm(dim=-1), torch.ones(50))


def test_weight_norm_and_its_gradients_equal_torch_parametrisation():
    torch.manual_seed(0)
    own = WeightNormLinear(6, 5, train_gain=True)
    other = torch.nn.utils.parametrizations.weight_norm(torch.nn.Linear(6, 5, bias=False))
    with torch.no_grad():
        own.weight_g.uniform_(0.5, 2)
        other.parametrizations.weight.original0.copy_(own.weight_g)
        other.parametrizations.weight.original1.copy_(own.weight_v)
    x = torch.randn(7, 6)
    for layer in (own, other):
        layer(x).square().sum().backward()
    torch.testing.assert_close(own(x), other(x))
    torch.testing.assert_close(own.weight_g.grad, other.parametrizations.weight.original0.grad)
    torch.testing.assert_close(own.weight_v.grad, other.parametrizations.weight.original1.grad)


@pytest.mark.parametrize(
    ("layers", "names"), [(1, ["mlp.0"]), (2, ["mlp.0", "mlp.2"]), (3, ["mlp.0", "mlp.2", "mlp.4"])]
)
def test_the_number_of_layers_is_configurable(layers, names):
    head = DINOHead(8, 20, hidden=16, bottleneck=4, layers=layers)
    found = {name.rsplit(".", 1)[0] for name, _ in head.named_parameters()}
    assert found == {*names, "last_layer"}
    assert head(torch.randn(2, 3, 8)).shape == (2, 3, 20)
