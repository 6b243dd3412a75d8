import logging
import math
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import lightning_clamp
from lightning_clamp import CalibrationModule, Clamp, fit_clamp
from lightning_clamp.metrics import calibration_test
from lightning_clamp.spec import Spec
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


def drifted(n: int, temperature: float):
    """A calibrated network after a clamp of T, and held-out data."""
    return CalibrationModule(LitClassifier(temperature=1.0), Clamp(log_temperature=math.log(temperature))), loader(
        n, 1, shift=False
    )


@pytest.mark.parametrize(("temperature", "words"), [(1.0, "Nothing speaks"), (2.0, "the clamp is off: T would be ")])
def test_a_test_says_whether_the_clamp_still_holds(temperature, words, tmp_path, caplog):
    module, data = drifted(2000, temperature)
    x, y = data.dataset.tensors
    with caplog.at_level(logging.INFO, "lightning.pytorch.utilities.rank_zero"):
        (numbers,) = trainer(tmp_path).test(module, data, verbose=False)
    evidence = calibration_test(module(x), y)
    for name, value in evidence.scalars().items():
        assert numbers[f"calibrated/{name}"] == pytest.approx(value, rel=1e-4, abs=1e-7)
    assert numbers["calibrated/best_temperature"] == pytest.approx(float(evidence.temperature) * temperature, rel=1e-5)
    documented = (Path(lightning_clamp.__file__).parents[1] / "docs" / "loggers.md").read_text()
    assert not [key for key in numbers if f"`{key}`" not in documented]
    (sentence,) = [line for line in caplog.messages if "2,000 samples" in line]
    assert words in sentence
    again = trainer(tmp_path).test(module, data, verbose=False)
    assert again == [numbers], "nothing is left of the first test"


def test_a_one_logit_head_is_tested_too(tmp_path):
    network, x, y = one_column()
    module = CalibrationModule(network, Clamp(), task="binary")
    data = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(x, y), batch_size=90)
    (numbers,) = trainer(tmp_path).test(module, data, verbose=False)
    assert numbers["calibrated/p"] < 0.01
    assert numbers["calibrated/best_temperature"] == pytest.approx(2, abs=0.6)


def test_nothing_in_it_is_trained():
    module = CalibrationModule(torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.Dropout()), Clamp())
    assert not any(parameter.requires_grad for parameter in module.parameters())
    assert not any(part.training for part in module.train().modules())


def test_a_test_batch_that_is_no_pair_is_refused_in_one_sentence(tmp_path):
    module = CalibrationModule(SmallNet(), Clamp())
    data = torch.utils.data.DataLoader(images(20), batch_size=10)
    with pytest.raises(TypeError, match=r"Every batch must be a pair \(inputs, target\), got Tensor"):
        trainer(tmp_path).test(module, data, verbose=False)


def one_column(n: int = 400):
    """A network of one logit, twice too sure, and labels."""
    network = nn.Sequential(nn.Linear(3, 1))
    x = torch.randn(n, 3)
    y = torch.rand(n, 1) < (network(x) / 2).detach().sigmoid()
    return network, x, y.long()


def test_a_result_brings_its_settings_along():
    network, x, y = one_column()
    result = fit_clamp(network, [(x, y)], task="binary", ignore_index=7)
    module = CalibrationModule.from_result(network, result)
    assert module.spec == result.spec == Spec("binary", 7)
    torch.testing.assert_close(module.predict_proba(x), module(x).sigmoid())
    assert module.result is result
    assert not any(parameter.requires_grad for parameter in module.parameters())


@pytest.mark.parametrize("shape", [(-1, 1), (-1,)])
def test_one_logit_is_not_taken_for_a_softmax(shape):
    """Over one column it would be 1 everywhere."""
    network, x, y = one_column()
    clamp = fit_clamp(network, [(x, y)], task="binary").clamp
    module = CalibrationModule(nn.Sequential(network, nn.Flatten(0) if len(shape) == 1 else nn.Identity()), clamp)
    for call in (module, module.predict_proba):
        with pytest.raises(ValueError, match=r'for a one-logit .* say task="binary"'):
            call(x)


def test_a_calibrated_file_is_loaded_with_the_network_s_class():
    with pytest.raises(TypeError, match=r"CalibrationModule.from_checkpoint\(path, YourModule\)"):
        CalibrationModule.load_from_checkpoint("x.ckpt")


def test_an_unknown_setting_names_the_nearest():
    with pytest.raises(TypeError, match="CalibrationModule has no argument `batch_key`: did you mean `batch_keys`"):
        CalibrationModule(SmallNet(), Clamp(), batch_key=(0, 1))


def test_a_result_prints_as_its_table():
    network, x, y = one_column()
    printed = repr(fit_clamp(network, [(x, y)], task="binary"))
    assert printed.startswith("calibration set     before     after    change")
    assert "chosen: " in printed
    assert len(printed) < 1000
