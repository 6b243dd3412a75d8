"""A network that is another one in every call: dropout that stays on, statistics of the batch."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from lightning_clamp import NeuralClamping, calibrate
from tests.scenarios import LitClassifier, loader, train_loader, trainer

HELD_OUT = loader(200, seed=30)
SAID = "returns other logits for the same inputs when they come in another batch"


class Changed(LitClassifier):
    def __init__(self, change):
        super().__init__(lr=0.0)
        self.change = change

    def forward(self, x):
        return self.change(super().forward(x))


class Masking(nn.Module):
    def forward(self, z):
        return F.pad(z, (0, 1), value=-torch.inf)


UNSTEADY = {
    "dropout that stays on": lambda z: F.dropout(z, 0.2, training=True),
    "statistics of the batch": nn.BatchNorm1d(4, track_running_stats=False),
    "noise": lambda z: z + torch.randn_like(z),
}
STEADY = {
    "dropout": nn.Dropout(0.5),
    "running statistics": nn.BatchNorm1d(4),
    "half precision": lambda z: z.bfloat16(),
    "a mask": Masking(),
}
pytestmark = [
    pytest.mark.filterwarnings("ignore:Attribute 'change' removed from hparams"),
    pytest.mark.filterwarnings("ignore:Attribute 'change' is an instance of"),
]


@pytest.mark.filterwarnings("ignore:The outputs say next to nothing of the labels")
@pytest.mark.filterwarnings("ignore:The network was left as it is")
@pytest.mark.parametrize("case", UNSTEADY)
def test_a_network_that_changes_from_call_to_call_is_told(tmp_path, case):
    callback = NeuralClamping(HELD_OUT, method="temperature")
    with pytest.warns(UserWarning, match=SAID):
        trainer(tmp_path, callback).fit(Changed(UNSTEADY[case]), train_loader())
    with pytest.warns(UserWarning, match=SAID):
        module = calibrate(trainer(tmp_path), Changed(UNSTEADY[case]), HELD_OUT, method="temperature")
    assert module.result.n_samples == 200


@pytest.mark.parametrize("case", STEADY)
def test_one_that_does_not_is_not(tmp_path, case):
    model = Changed(STEADY[case])
    calibrate(trainer(tmp_path), model, HELD_OUT, method="temperature")
    one_by_one = DataLoader(TensorDataset(*(part[:20] for part in HELD_OUT.dataset.tensors)))
    calibrate(trainer(tmp_path), model, one_by_one, method="temperature")
