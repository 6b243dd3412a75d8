"""Losses can be part of a CUDA graph: away from the CPU no value is read. Tensors without values fail where one is."""

import pytest
import torch
from torch import nn

from lightning_clamp.losses import margin_aware_loss
from tests.scenarios import every_loss

TARGET = torch.empty(8, dtype=torch.long, device="meta")


@every_loss
def test_a_loss_reads_no_value(loss):
    logits = torch.empty(8, 5, device="meta", requires_grad=True)
    loss(logits, TARGET, log_terms={}).backward()
    assert logits.grad.shape == (8, 5)


@pytest.mark.parametrize("options", [{}, {"lambda_r": 0.0}, {"lambda_s": 0.0}, {"norm": "l2"}], ids=str)
def test_nor_does_the_margin_aware_one_with_its_gradients_of_gradients(options):
    network = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Tanh(), nn.Flatten(), nn.Linear(144, 5))
    network.to("meta")
    inputs = torch.empty(8, 3, 8, 8, device="meta")
    margin_aware_loss(network, inputs, TARGET, clip=None, mean=(0.1, 0.2, 0.3), std=0.5, **options).backward()
    assert network[0].weight.grad.shape == (4, 3, 3, 3)
