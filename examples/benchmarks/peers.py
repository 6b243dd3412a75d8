"""Post-hoc calibrators of other libraries, all made to look alike: logits and labels in, a map of logits out.

Each is used as its documentation says and with its own defaults, and is silent. What it needs besides (probabilities,
float64, NumPy, a loader) is made inside, so that a clock around it counts that too; imports are counted apart. Names
that are missing from ``installed()`` need ``pip install -e . --group peers``.

The recipe of gpleiss/temperature_scaling is written out, since it is no package. That of lightning-uq-box is the same
(``TempScaling``: LBFGS from 1.5, 50 iterations, lr .01), so it has no line of its own.
"""

import io
import logging
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout, suppress
from typing import Any

import numpy as np
import torch
from lightning_utilities.core.imports import RequirementCache
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

# From logits (N, C), float32, and labels (N,) to a function that turns logits (M, C) into calibrated logits or
# log-probabilities (M, C), float64.
Fit = Callable[[Tensor, Tensor], Callable[[Tensor], Tensor]]


def of_torch_uncertainty(name: str) -> Fit:
    """Its scaler of this name, around a network that is the identity."""
    from torch_uncertainty import post_processing

    def fit(logits: Tensor, target: Tensor) -> Callable[[Tensor], Tensor]:
        classes = {"num_classes": logits.shape[1]} if name == "VectorScaler" else {}
        scaler = getattr(post_processing, name)(**classes, model=nn.Identity(), device=logits.device)
        # One batch of all rows, taken as it is: collating them one by one would be clocked too. A loader without a
        # generator of its own would draw from the global one.
        data = TensorDataset(logits[None], target[None])
        scaler.fit(DataLoader(data, batch_size=None, generator=torch.Generator()), progress=False)
        return lambda other: scaler(other).double()

    return fit


def of_netcal() -> Fit:
    """Its temperature scaling, of float64 probabilities: float32 ones it gives back unchanged (its issue 61)."""
    from netcal.scaling import TemperatureScaling

    def fit(logits: Tensor, target: Tensor) -> Callable[[Tensor], Tensor]:
        scaling = TemperatureScaling()
        scaling.fit(_array(logits.double().softmax(1)), _array(target))

        def calibrate(other: Tensor) -> Tensor:
            probs = scaling.transform(_array(other.double().softmax(1)))
            # Of two classes it answers with the second.
            return _log(probs if probs.ndim == 2 else np.stack((1 - probs, probs), 1), other)

        return calibrate

    return fit


def of_probmetrics(name: str) -> Fit:
    """Its calibrator of this name."""
    from probmetrics import calibrators
    from probmetrics.distributions import CategoricalLogits

    def fit(logits: Tensor, target: Tensor) -> Callable[[Tensor], Tensor]:
        calibrator = getattr(calibrators, name)().fit_torch(CategoricalLogits(logits), target)
        return lambda other: calibrator.predict_proba_torch(CategoricalLogits(other)).get_logits().double()

    return fit


def of_sklearn() -> Fit:
    """Its temperature scaling, of a frozen classifier whose decision function gives back the logits.

    One split with all rows on both sides stands for the five folds by default, which are of no use to a frozen
    classifier and refuse labels that lack a class.
    """
    if not RequirementCache("scikit-learn>=1.8"):
        raise ImportError("Temperature scaling needs scikit-learn 1.8 or later.")
    from sklearn.base import BaseEstimator, ClassifierMixin
    from sklearn.calibration import CalibratedClassifierCV
    from sklearn.frozen import FrozenEstimator

    class Network(ClassifierMixin, BaseEstimator):
        """The identity, as a classifier."""

        def fit(self, X: np.ndarray, y: np.ndarray) -> "Network":
            """Count the classes."""
            self.classes_ = np.arange(X.shape[1])
            return self

        def decision_function(self, X: np.ndarray) -> np.ndarray:
            """The logits; of two classes the half difference x, which it reads as (-x, x)."""
            return (X[:, 1] - X[:, 0]) / 2 if X.shape[1] == 2 else X

    def fit(logits: Tensor, target: Tensor) -> Callable[[Tensor], Tensor]:
        rows, inputs, labels = np.arange(len(logits)), _array(logits.double()), _array(target)
        network = FrozenEstimator(Network().fit(inputs, labels))
        whole = CalibratedClassifierCV(network, method="temperature", cv=[(rows, rows)], ensemble=True)
        # The one pair of the ensemble: it alone keeps a column for classes that no label has.
        (fitted,) = whole.fit(inputs, labels).calibrated_classifiers_
        return lambda other: _log(fitted.predict_proba(_array(other.double())), other)

    return fit


def of_gpleiss() -> Fit:
    """The recipe of https://github.com/gpleiss/temperature_scaling."""

    def fit(logits: Tensor, target: Tensor) -> Callable[[Tensor], Tensor]:
        temperature = torch.full((1,), 1.5, device=logits.device, requires_grad=True)
        optimizer = torch.optim.LBFGS([temperature], lr=0.01, max_iter=50)

        def loss() -> float:
            optimizer.zero_grad()
            value = F.cross_entropy(logits / temperature, target)
            value.backward()
            return float(value.detach())

        optimizer.step(loss)
        found = temperature.detach().double()
        return lambda other: other.double() / found

    return fit


def installed() -> dict[str, Fit]:
    """Those of ``PEERS`` whose library imports here."""
    found = {}
    for name, load in PEERS.items():
        with suppress(ImportError):
            found[name] = load()
    return found


def _array(tensor: Tensor) -> np.ndarray:
    return tensor.detach().cpu().numpy()


def _log(probs: np.ndarray, like: Tensor) -> Tensor:
    """Log-probabilities in float64, finite also where a probability is 0, on the device of another tensor."""
    on_device = torch.from_numpy(probs).to(like.device, torch.float64)
    return on_device.clamp_min(torch.finfo(torch.float64).tiny).log()


@contextmanager
def _silence() -> Iterator[None]:
    """No warnings, logs, prints or progress bars; logging is left as it was found."""
    root = logging.getLogger()
    handlers, disabled = list(root.handlers), root.manager.disable
    logging.disable()
    try:
        with warnings.catch_warnings(), redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(disabled)
        # logging.warning gives the root a handler, here one that writes to the buffer above.
        root.handlers[:] = handlers


def _silent(build: Callable[..., Fit], *options: Any) -> Callable[[], Fit]:
    """A loader of an adapter that is silent when it is loaded, fitted and used."""

    def load() -> Fit:
        # Warnings only: handlers made on import would keep a redirected stream.
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            fit = build(*options)
        return _silence()(lambda logits, target: _silence()(fit(logits, target)))

    return load


# Name -> what imports the library and gives its adapter, or raises ImportError.
PEERS: dict[str, Callable[[], Fit]] = {
    "torch-uncertainty temperature": _silent(of_torch_uncertainty, "TemperatureScaler"),
    "torch-uncertainty vector": _silent(of_torch_uncertainty, "VectorScaler"),
    "netcal temperature": _silent(of_netcal),
    "probmetrics bisection": _silent(of_probmetrics, "TemperatureScalingCalibrator"),
    "probmetrics SVS": _silent(of_probmetrics, "SVSCalibrator"),
    "probmetrics SMS": _silent(of_probmetrics, "SMSCalibrator"),
    "scikit-learn temperature": _silent(of_sklearn),
    "gpleiss (LBFGS 50 iterations, lr .01)": _silent(of_gpleiss),
}
