"""Two learning rates, the poly schedule, and steps that leave no trace."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from raysemi.engine.optim import OptimConfig, Optimizer

YES, NO = torch.tensor(True), torch.tensor(False)


class Network(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Linear(3, 4)
        self.decoder = nn.Linear(4, 2)

    def encoder_parameters(self):
        return self.encoder.parameters()

    def other_parameters(self):
        return self.decoder.parameters()


def gradients(network: nn.Module, value: float) -> None:
    for parameter in network.parameters():
        parameter.grad = torch.full_like(parameter, value)


def weights(network: nn.Module) -> torch.Tensor:
    return torch.cat([p.detach().reshape(-1).clone() for p in network.parameters()])


def test_poly_and_the_two_groups():
    network = Network()
    config = OptimConfig(lr=1e-3, head_multiplier=10, weight_decay=0.0, momentum=0.0)
    optimizer = Optimizer(network, config, steps=100)
    assert [optimizer.learning_rate(i) for i in (1, 50, 99)] == pytest.approx(
        [9.90995e-4, 5.35887e-4, 1.58489e-5], rel=1e-5
    )
    before = weights(network)
    gradients(network, 1.0)
    optimizer.step(50, YES)
    moved = before - weights(network)
    assert moved[:16].tolist() == pytest.approx([5.35887e-4] * 16, rel=1e-3)
    assert moved[16:].tolist() == pytest.approx([5.35887e-3] * 10, rel=1e-3)


@pytest.mark.parametrize("name", ["sgd", "adamw"])
def test_a_step_that_is_not_finite_leaves_weights_and_moments(name):
    """The second network never sees the broken steps; both must end at the same bits."""
    networks = [Network(), Network()]
    networks[1].load_state_dict(networks[0].state_dict())
    optimizers = [Optimizer(n, OptimConfig(name=name, lr=0.01), steps=10) for n in networks]
    for step, value in enumerate((float("nan"), 0.5, float("inf"), -0.25)):
        finite = torch.isfinite(torch.tensor(value))
        for network, optimizer in zip(networks, optimizers, strict=True):
            if optimizer is optimizers[0] or finite:
                gradients(network, value)
                optimizer.step(step, finite)
    assert torch.equal(weights(networks[0]), weights(networks[1]))
    assert torch.isfinite(weights(networks[0])).all()


@pytest.mark.parametrize("name", ["sgd", "adamw"])
def test_state_goes_through_a_checkpoint(name):
    first, second = Network(), Network()
    config = OptimConfig(name=name, lr=0.01)
    before, after = Optimizer(first, config, steps=10), Optimizer(second, config, steps=10)
    for step in range(3):
        gradients(first, step - 0.7)
        before.step(step, YES)
    second.load_state_dict(first.state_dict())
    after.load_tensors({name: value.clone() for name, value in before.tensors().items()})
    for network, optimizer in ((first, before), (second, after)):
        gradients(network, 0.3)
        optimizer.step(3, YES)
    assert torch.equal(weights(first), weights(second))
