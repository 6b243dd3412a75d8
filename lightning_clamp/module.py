"""The calibrated model: a frozen network with its clamp, as a LightningModule of its own."""

import os
from collections.abc import Mapping
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, NoReturn, cast

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import LightningModule
from lightning.pytorch.utilities import rank_zero_info
from lightning.pytorch.utilities.model_helpers import is_overridden
from torch import Tensor, nn
from torch.export import ExportedProgram
from typing_extensions import Unpack

from lightning_clamp import export
from lightning_clamp._batch import Inputs, call_network, copied, logits_of
from lightning_clamp._checks import check_made
from lightning_clamp.clamping.by_label import by_log_key
from lightning_clamp.clamping.clamp import Clamp
from lightning_clamp.clamping.options import names_of, unknown_keyword
from lightning_clamp.clamping.result import CalibrationResult
from lightning_clamp.clamping.site import InputHook, PerturbationSite, map_single_tensor
from lightning_clamp.group_report import GroupFindings, GroupReport, Groups
from lightning_clamp.metrics import BootstrapSums, CalibrationEvidence, CalibrationTest
from lightning_clamp.metrics.bootstrap import BlockSums
from lightning_clamp.restore import load_calibrated
from lightning_clamp.spec import Spec, SpecKeywords

if TYPE_CHECKING:
    from torch.onnx import ONNXProgram

_TRANSFER_HOOKS = ("on_before_batch_transfer", "transfer_batch_to_device", "on_after_batch_transfer")


class CalibrationModule(LightningModule):
    """A frozen network and its clamp: ``module(x)`` are calibrated logits.

    ``trainer.test`` logs ``calibrated/nll``, ``calibrated/ece`` and ``calibrated/accuracy`` (of several labels the
    means over them, and NLL and ECE of each), tests whether the clamp still holds (``calibrated/p`` and its parts) and
    says so in a sentence; ``trainer.predict`` returns calibrated logits. The network stays in eval mode, and nothing
    here has a gradient. Of a LightningModule the hooks that change batches on their way to the device run here too.

    Args:
        network: Module from inputs to logits. It is frozen in place: pass a copy to go on training the original.
        clamp: What was fitted to it.
        **settings: Those of :class:`~lightning_clamp.spec.Spec`: ``task``, ``ignore_index``, ``batch_keys``,
            ``perturb_at`` and ``views``, as it was fitted. A hook adds the perturbation inside a network, and stays on
            that submodule: pass a copy to go on using the original. Compile this module, not the network before.

    Raises:
        TypeError: If a keyword is unknown.
        ValueError: If a setting has no such value; when it is called, if the network has one logit per position and
            ``task="binary"`` was not said.

    Attributes:
        spec: How batches are read and what the outputs mean.
        result: What the calibration did; None for a module that was put together by hand.
        groups: A :class:`~.group_report.Groups`, set it for a test that also logs NLL and ECE by group, before and
            after; it costs a second forward. None for none.
    """

    def __init__(self, network: nn.Module, clamp: Clamp, **settings: Unpack[SpecKeywords]) -> None:
        super().__init__()
        check_made(network)
        for name in settings:
            if name not in names_of(Spec):
                raise TypeError(unknown_keyword(name, ["network", "clamp", *names_of(Spec)], CalibrationModule))
        self.network = network.requires_grad_(False)
        self.clamp = clamp
        self.spec = Spec(**settings)
        self._perturbing: InputHook | None = None
        if self.spec.perturb_at is not None and clamp.perturbation is not None:
            self._perturbing = PerturbationSite(network, self.spec.perturb_at).hook(clamp.perturb)
            self._perturbing.installed()
        self.result: CalibrationResult | None = None
        self.groups: Groups | None = None
        self._tested: _Tested | None = None
        self._by_group: GroupReport | None = None
        if isinstance(network, LightningModule):
            self._take_over_hooks(network)
        self.eval()

    def _take_over_hooks(self, network: LightningModule) -> None:
        """Have batches changed as the network's own steps would get them."""
        for hook in _TRANSFER_HOOKS:
            # No methods of this class: where a datamodule has the hook, Lightning would warn that both have it.
            if is_overridden(hook, network):
                setattr(self, hook, getattr(network, hook))

    @classmethod
    def from_result(cls, network: nn.Module, result: CalibrationResult) -> "CalibrationModule":
        """Put a network together with what was fitted to it, on the device of its parameters.

        Args:
            network: The network that ``result`` belongs to. It is frozen in place: pass a copy to go on training it.
            result: What :func:`~lightning_clamp.fit_clamp` returned, or a callback's ``result``.
        """
        settings: Any = {name: getattr(result.spec, name) for name in names_of(Spec)}
        module = cls(network, result.clamp, **settings)
        module.result = result
        device = next((parameter.device for parameter in network.parameters()), None)
        return module if device is None else module.to(device)

    @classmethod
    def load_from_checkpoint(cls, *_: Any, **__: Any) -> NoReturn:
        """Say what to call instead.

        Raises:
            TypeError: Always: a checkpoint does not say of which class the network is.
        """
        raise TypeError(
            "A CalibrationModule is restored with the class of the network that was trained: "
            "CalibrationModule.from_checkpoint(path, YourModule)."
        )

    @classmethod
    def from_checkpoint(
        cls,
        path: str | os.PathLike[str],
        network_class: type[LightningModule],
        *,
        map_location: Any = None,
        **init_arguments: Any,
    ) -> "CalibrationModule":
        """Restore a calibrated model from the file that the callback saved.

        Args:
            path: The ``…-calibrated.ckpt`` file, or a checkpoint that Lightning saved after calibration. It is read
                with ``weights_only=True``: nothing in it is executed.
            network_class: Class of the LightningModule that was trained.
            map_location: Device for the tensors, as in ``torch.load``.
            **init_arguments: Arguments of ``network_class`` that ``save_hyperparameters`` did not save.

        Raises:
            OSError: If there is no such file, or it may not be read.
            ValueError: If the file is no calibrated checkpoint, is of another format, is damaged or was edited; or if
                the network that is built from it does not have the weights that were calibrated.
            TypeError: If ``network_class`` is no such class, or needs arguments that are neither saved nor given.
        """
        _check_class(network_class)
        network, result = load_calibrated(path, network_class, map_location, init_arguments)
        return cls.from_result(network, result)

    def forward(self, inputs: Inputs | None = None, /, *more: Tensor, **named: Tensor) -> Tensor:
        """Calibrated logits, of the network's shape, at least float32.

        Args:
            inputs: A batch; a dict is the network's keyword arguments, a tuple its arguments.
            *more: Its further arguments, as in ``module(images, ages)``.
            **named: Or those arguments themselves, as in ``module(**batch)``. Of a batch with a target ``batch_keys``
                says which entries are inputs; without it all are passed on, and what the network makes of its labels is
                left out.

        Raises:
            TypeError: If there are both, or neither.
            ValueError: If a perturbation was fitted to one input, and there are several; if there are ``views``, and
                the inputs are no images.
        """
        if (inputs is None) == (not named):
            raise TypeError("A CalibrationModule is called with a batch of inputs, module(x), or module(**batch).")
        if inputs is None:
            inputs = cast(Inputs, self.spec.named_inputs(named))
        elif more:
            inputs = (cast(Tensor, inputs), *more)
        # A network may change its input in place, and views are made of it as it was.
        logits = self._logits(copied(inputs) if self.spec.views else inputs)
        self.spec.check_logits(logits)
        if self._perturbing is not None and not self._perturbing.calls and not torch.compiler.is_compiling():
            raise RuntimeError(
                f"The network did not run what adds the perturbation at {self.spec.perturb_at!r}: if it is compiled, "
                "pass the one before torch.compile, and compile the CalibrationModule."
            )
        return self.clamp.scale(self.spec.mean_over_views(logits, inputs, self._logits))

    def _logits(self, inputs: Inputs) -> Tensor:
        """The network's logits of perturbed inputs."""
        # Read first, also where a hook adds it, so that torch.compile knows whether there is a perturbation: hooks it
        # takes no notice of.
        if self.clamp.perturbation is not None and self.spec.perturb_at is None:
            if not isinstance(inputs, Tensor) and len(inputs) > 1:
                names = inputs if isinstance(inputs, Mapping) else range(len(inputs))
                raise ValueError(
                    "The perturbation was fitted to one input, and which of "
                    f"{', '.join(map(repr, names))} is it? Pass that one alone, or say so by `batch_keys`."
                )
            inputs = map_single_tensor(inputs, self.clamp.perturb)
        return logits_of(call_network(self.network, inputs))

    def predict_proba(self, inputs: Inputs | None = None, /, *more: Tensor, **named: Tensor) -> Tensor:
        """Calibrated probabilities: a softmax over axis 1, or for a one-logit head and for labels the sigmoid.

        The arguments are those of :meth:`forward`.
        """
        return self.spec.probs(self(inputs, *more, **named))

    def to_exported_program(self, example: Any = None, **options: Any) -> ExportedProgram:
        """Capture this module for use without this package; see :func:`.export.to_exported_program`."""
        return export.to_exported_program(self, example, **options)

    def to_onnx(
        self, file_path: str | Path | BytesIO | None = None, input_sample: Any = None, **kwargs: Any
    ) -> "ONNXProgram | None":
        """Write this module as ONNX, for batches of any size; see :func:`.export.to_onnx`."""
        return export.to_onnx(self, file_path, input_sample, **kwargs)

    def to_torchscript(
        self, file_path: Any = None, method: str | None = "trace", example_inputs: Any = None, **kwargs: Any
    ) -> Any:
        """As Lightning's, which calls it deprecated; by tracing alone.

        Raises:
            ValueError: If asked for anything but ``method="trace"``.
        """
        if method != "trace":
            raise ValueError(f"A clamp is no TorchScript: use method='trace' or to_exported_program, got {method!r}.")
        # They change batches, and the example is what forward takes.
        hooks = {name: vars(self).pop(name) for name in _TRANSFER_HOOKS if name in vars(self)}
        try:
            return super().to_torchscript(file_path, method, example_inputs, **kwargs)
        finally:
            vars(self).update(hooks)

    def folded(self, example: Any = None) -> export.Folded:
        """The network with the output map in the weights of its last layer; see :func:`.export.fold`."""
        return export.fold(self, example)

    def train(self, mode: bool = True) -> "CalibrationModule":
        """Stay in eval mode: the clamp belongs to the network as it was calibrated."""
        super().train(False)
        return self

    def on_test_start(self) -> None:
        """Refuse several sets, whose figures would be mixed."""
        if (several := len(self.trainer.num_test_batches)) > 1:
            raise MisconfigurationException(
                f"A CalibrationModule is tested on one set at a time, and there are {several} loaders: call "
                "trainer.test(module, loader) for each."
            )

    def on_test_epoch_start(self) -> None:
        """Forget a test that did not end."""
        self._tested = None
        self._by_group = None if self.groups is None else GroupReport(self.groups, self.spec).to(self.device)

    def test_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        """Measure a batch ``(inputs, target)``, or with the entries that ``batch_keys`` names."""
        inputs, target = self.spec.pair(batch)
        # The network is called again where there are groups, and may change its input in place.
        logits = self(inputs if self._by_group is None else copied(inputs))
        if self._tested is None:
            self._tested = self._nothing_tested(self.spec.width(logits))
        for metric in (self._tested.sums, self._tested.test):
            metric.update(logits, target)
        if self._by_group is not None:
            self._by_group.update("after", logits, target, batch)
            self._by_group.update("before", self._bare_logits(inputs), target, batch)

    def _bare_logits(self, inputs: Inputs) -> Tensor:
        # A hook reads it as well, so that this takes off a perturbation inside the network too.
        perturbation, self.clamp.perturbation = self.clamp.perturbation, None
        try:
            return logits_of(call_network(self.network, inputs))
        finally:
            self.clamp.perturbation = perturbation

    def on_test_epoch_end(self) -> None:
        """Log the metrics and whether the clamp still holds, and say that in a sentence."""
        seen = 0 if self._tested is None else self._tested.width
        # A rank without batches has its part in the sums as well.
        width = int(self.trainer.strategy.reduce(torch.tensor(seen, device=self.device), reduce_op="max"))
        if width == 0:
            return
        tested, self._tested = self._tested or self._nothing_tested(width), None
        sums: BlockSums = tested.sums.compute()
        labels = by_log_key(sums.by_label, sums.entries_by_label) if self.spec.task == "multilabel" else {}
        evidence: CalibrationEvidence = tested.test.compute()
        temperature = float(self.clamp.temperature)
        numbers = evidence.scalars()
        if numbers:
            numbers["best_temperature"] = temperature * float(evidence.temperature)
        measured = {**sums.metrics, **labels, **numbers}
        # The prefix is our own: a Trainer refuses a second module that logs a known name in another way.
        self.log_dict({f"calibrated/{name}": value for name, value in measured.items()}, sync_dist=True)
        subject = "the network is" if self.clamp.is_identity and not self.spec.views else "the clamp is"
        rank_zero_info(evidence.describe(temperature=temperature, subject=subject))
        if self._by_group is not None:
            self._report(self._by_group.compute())
            self._by_group = None

    def _report(self, findings: GroupFindings) -> None:
        self.log_dict(findings.scalars(), sync_dist=True)
        rank_zero_info(str(findings))
        findings.log_figures(self.trainer)

    def _nothing_tested(self, width: int) -> "_Tested":
        # Blocks are for intervals, which nobody asks for here.
        sums = BootstrapSums(n_blocks=2, **self.spec.of_means(width))
        test = CalibrationTest(2 if self.spec.sigmoid else width, **self.spec.of_metrics)
        return _Tested(width, sums.to(self.device), test.to(self.device))

    def predict_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> Tensor:
        """Calibrated logits of a batch of inputs, of ``(inputs, …)``, or of the entries that ``batch_keys`` names."""
        logits: Tensor = self(self.spec.inputs(batch))
        return logits


class _Tested(NamedTuple):
    """What a test has measured so far.

    Attributes:
        width: Classes or labels that the outputs have; 1 for one logit.
        sums: NLL, ECE and accuracy, as in a result.
        test: Whether the clamp still holds.
    """

    width: int
    sums: BootstrapSums
    test: CalibrationTest


def _check_class(network_class: object) -> None:
    """Refuse what is not the class of a network that was trained."""
    found = f"an instance of {type(network_class).__name__}"
    if isinstance(network_class, type):
        if issubclass(network_class, LightningModule) and not issubclass(network_class, CalibrationModule):
            return
        found = f"the class {network_class.__name__}"
    raise TypeError(
        "from_checkpoint(path, YourModule) takes the class of the LightningModule that was trained, not an instance, "
        f"and got {found}; for a network that is there already, CalibrationModule.from_result(network, result)."
    )
