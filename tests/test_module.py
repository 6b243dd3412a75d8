import pytest
import torch
from torch.nn import functional as F

from lightning_clamp import CalibrationModule, Clamp
from tests.scenarios import LitClassifier, SmallNet, images, loader, trainer


def test_forward_is_scale_of_network_of_perturb():
    network, clamp, x = SmallNet(), Clamp(torch.randn(3, 8, 8), 0.4, torch.randn(4)), images(7)
    module = CalibrationModule(network, clamp)
    assert torch.equal(module(x), clamp.scale(network(clamp.perturb(x))))
    assert torch.equal(module.predict_proba(x), module(x).softmax(1))


def test_a_one_logit_head_predicts_sigmoids():
    module = CalibrationModule(torch.nn.Linear(2, 1), Clamp(log_temperature=0.5), task="binary")
    x = torch.randn(4, 2)
    assert torch.equal(module.predict_proba(x), module(x).sigmoid())


def test_test_logs_metrics_and_predict_returns_logits(tmp_path):
    module, data = CalibrationModule(LitClassifier(), Clamp(log_temperature=0.7)), loader(250, 1)
    (metrics,) = trainer(tmp_path).test(module, data, verbose=False)
    x, y = data.dataset.tensors
    assert metrics["calibrated/nll"] == pytest.approx(float(F.cross_entropy(module(x), y)), rel=1e-5)
    assert metrics["calibrated/accuracy"] == pytest.approx(float((module(x).argmax(1) == y).double().mean()))
    assert 0 <= metrics["calibrated/ece"] <= 1
    torch.testing.assert_close(torch.cat(trainer(tmp_path).predict(module, data)), module(x))
    bare = torch.utils.data.DataLoader(x, batch_size=100)
    torch.testing.assert_close(torch.cat(trainer(tmp_path).predict(module, bare)), module(x))


def test_nothing_in_it_is_trained():
    module = CalibrationModule(torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.Dropout()), Clamp())
    assert not any(parameter.requires_grad for parameter in module.parameters())
    assert not any(part.training for part in module.train().modules())


def test_a_test_batch_that_is_no_pair_is_refused_in_one_sentence(tmp_path):
    module = CalibrationModule(SmallNet(), Clamp())
    data = torch.utils.data.DataLoader(images(20), batch_size=10)
    with pytest.raises(TypeError, match=r"Every batch must be a pair \(inputs, target\), got Tensor"):
        trainer(tmp_path).test(module, data, verbose=False)
