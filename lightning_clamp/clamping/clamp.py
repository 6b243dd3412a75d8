"""The clamp itself: a perturbation added to every input, and a map applied to every logit."""

from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_clamp._rows import MASKED
from lightning_clamp.clamping.perturbation import shifted

_PARTS = ("perturbation", "log_temperature", "class_bias", "class_scale", "class_matrix", "uniform_share", "skew")


class Clamp(nn.Module):
    r"""What calibration learned: :math:`\mathrm{softmax}(a \circ f(x + \delta) / T + b)`.

    A matrix may take the place of a, two classes may have a skew, and the probabilities may be mixed with a share of
    the uniform distribution. Masked logits (-10,000 and below) stay as they are. The tensors are buffers, so no
    optimizer, average or gradient check ever sees them, and stay float32 at least when a module around them is cast.
    ``Clamp()`` is the identity.

    Args:
        perturbation: :math:`\delta`, the shape of one input, or None for no perturbation.
        log_temperature: Logarithm of the temperature, a scalar; a temperature is thus always positive.
        class_bias: :math:`b`, shape ``(C,)``, or None. One value for a one-logit head.
        class_scale: :math:`a`, shape ``(C,)``, or None. One value for a one-logit head.
        class_matrix: In place of a: :math:`A`, shape ``(C, C)``, or None; class k's logit becomes
            :math:`\sum_j A_{kj} z_j / T + b_k`.
        uniform_share: ε, above 0 and below 1, or None: the probabilities are
            :math:`(1 - ε) \mathrm{softmax} + ε / C`. A scalar; for a one-logit head, shape ``(1,)``.
        skew: Of two classes, w or None: :math:`w \log(p_0 p_1)` is added to the log-odds of class 1, with p those at
            the temperature, softmax(z/T). Where class 1 is ahead the log-odds then grow as fast as (a - w) z/T in the
            end, where class 0 is, as (a + w) z/T. A scalar; for a one-logit head, shape ``(1,)``.

    Reference:
        Tang, Chen and Ho, "Neural Clamping: Joint Input Perturbation and Temperature Scaling for Neural Network
        Calibration", TMLR 2024; with class bias and scale or matrix, vector and matrix scaling of Guo et al., ICML
        2017; with a skew, beta calibration of Kull, Silva Filho and Flach, AISTATS 2017.
    """

    perturbation: Tensor | None
    log_temperature: Tensor
    class_bias: Tensor | None
    class_scale: Tensor | None
    class_matrix: Tensor | None
    uniform_share: Tensor | None
    skew: Tensor | None

    def __init__(
        self,
        perturbation: Tensor | None = None,
        log_temperature: float | Tensor = 0.0,
        class_bias: Tensor | None = None,
        class_scale: Tensor | None = None,
        class_matrix: Tensor | None = None,
        uniform_share: Tensor | None = None,
        skew: Tensor | None = None,
    ) -> None:
        super().__init__()
        log_temperature = torch.as_tensor(log_temperature, dtype=None if _is_float(log_temperature) else torch.float32)
        if log_temperature.ndim != 0 or not bool(torch.isfinite(log_temperature)):
            raise ValueError(f"`log_temperature` must be one finite number, got {log_temperature}.")
        self.register_buffer("perturbation", _copied(perturbation))
        self.register_buffer("log_temperature", _copied(log_temperature))
        self.register_buffer("class_bias", _copied(class_bias))
        if class_scale is not None and class_matrix is not None:
            raise ValueError("A clamp has a `class_scale` or a `class_matrix`: put the scale on its diagonal.")
        self.register_buffer("class_scale", _copied(class_scale))
        self.register_buffer("class_matrix", _copied(class_matrix))
        if uniform_share is not None and not (uniform_share.numel() == 1 and 0 < float(uniform_share) < 1):
            raise ValueError(f"`uniform_share` must be one number between 0 and 1, got {uniform_share}.")
        self.register_buffer("uniform_share", _copied(uniform_share))
        if skew is not None and skew.numel() != 1:
            raise ValueError(f"`skew` must be one number, got {skew}.")
        self.register_buffer("skew", _copied(skew))

    @classmethod
    def from_state(cls, state: Mapping[str, Tensor]) -> "Clamp":
        """Rebuild a clamp from its :meth:`~torch.nn.Module.state_dict`; parts that are absent were not chosen.

        Raises:
            ValueError: If it is another module's state, or has NaN or infinity in it.
        """
        if unknown := set(state) - set(_PARTS):
            raise ValueError(
                f"A clamp has {sorted(_PARTS)}, got also {sorted(unknown)}: is this another module's state?"
            )
        if "log_temperature" not in state:
            raise ValueError("Every clamp has a `log_temperature`, and this state has none: is it all of it?")
        for name, part in state.items():
            if not bool(part.isfinite().all()):
                raise ValueError(f"`{name}` of a clamp must be finite, and this state has NaN or infinity in it.")
        return cls(**state)

    @property
    def temperature(self) -> Tensor:
        """The temperature T > 0, a scalar."""
        return self.log_temperature.exp()

    @property
    def perturbation_norm(self) -> float:
        """Euclidean norm of the perturbation, in units of the network's input; 0.0 without one."""
        return 0.0 if self.perturbation is None else float(self.perturbation.norm())

    @property
    def is_identity(self) -> bool:
        """Whether the clamp changes nothing."""
        return float(self.log_temperature) == 0.0 and set(self.state_dict()) == {"log_temperature"}

    def perturb(self, inputs: Tensor) -> Tensor:
        """Add the perturbation to every input, ``(N, ..., *perturbation.shape)``; the dtype of the input is kept."""
        if self.perturbation is not None and not _fits(self.perturbation.shape, inputs.shape):
            raise ValueError(
                f"The clamp was fitted to inputs of shape {tuple(self.perturbation.shape)}, got a batch of shape "
                f"{tuple(inputs.shape)}: resize the inputs, or fit with grids=() for a clamp that leaves them alone."
            )
        return shifted(inputs, self.perturbation)

    def scale(self, logits: Tensor) -> Tensor:
        """Map logits ``(N, C, ...)`` (or one-logit outputs of any shape) to calibrated logits, at least float32."""
        # Not by torch.promote_types, which torch 2.6 puts into exported programs and then cannot load.
        scores = logits if logits.dtype == torch.float64 else logits.float()
        mapped = self._mapped(scores)
        if self.uniform_share is not None:
            mapped = _with_share(mapped, self.uniform_share.to(mapped))
        # What only a positive factor touches stays masked by itself.
        others = (self.class_scale, self.class_matrix, self.uniform_share, self.skew)
        return mapped if all(part is None for part in others) else mapped.where(scores > MASKED, scores)

    def _mapped(self, scores: Tensor) -> Tensor:
        common = (-self.log_temperature.to(scores)).exp()
        factor = common if self.class_scale is None else common * _per_class(self.class_scale, scores)
        mapped = scores
        if self.class_matrix is not None:
            mapped = _mixed(scores.where(scores > MASKED, 0.0), self.class_matrix)
        mapped = mapped * factor
        if self.class_bias is not None:
            mapped = mapped + _per_class(self.class_bias, scores)
        return mapped if self.skew is None else mapped + _skewed(scores, common, self.skew.to(scores))

    # Private in torch, and where a module's tensors are cast; nothing public comes before. A Trainer with
    # precision="bf16-true" casts all of a module, and would leave log T and δ two or three digits. The tests hold it
    # against such a Trainer and against casts.
    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "Clamp":
        before = dict(self.named_buffers())
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        for name, after in self.named_buffers():
            if torch.finfo(after.dtype).bits < 32:
                setattr(self, name, before[name].to(after.device))
        return self

    def extra_repr(self) -> str:
        """Summary shown by ``print(clamp)``."""
        parts = [f"temperature={float(self.temperature):.4g}"]
        if self.perturbation is not None:
            parts.append(f"perturbation={tuple(self.perturbation.shape)}, norm={self.perturbation_norm:.4g}")
        parts += [name for name in ("class_bias", "class_scale", "class_matrix") if getattr(self, name) is not None]
        if self.skew is not None:
            parts.append(f"skew={float(self.skew):.4g}")
        if self.uniform_share is not None:
            parts.append(f"uniform_share={float(self.uniform_share):.4g}")
        return ", ".join(parts)


def _mixed(logits: Tensor, matrix: Tensor) -> Tensor:
    """``matrix @ logits`` along axis 1; autocast would make it a product of half precision."""
    with torch.autocast(logits.device.type, enabled=False):
        positions = logits.reshape(*logits.shape[:2], -1)
        return (matrix.to(logits) @ positions).reshape(logits.shape)


def _skewed(logits: Tensor, common: Tensor, skew: Tensor) -> Tensor:
    """What a skew adds to logits of which 1/T is ``common``; nothing where one of the two classes is masked."""
    scaled = logits * common
    if skew.ndim == 1:
        return -skew * (F.softplus(scaled) + F.softplus(-scaled))
    half = 0.5 * skew * scaled.log_softmax(1).sum(1, keepdim=True)
    return torch.cat([-half, half], 1).where((logits > MASKED).all(1, keepdim=True), 0.0)


def _with_share(logits: Tensor, share: Tensor) -> Tensor:
    """Logits of probabilities that are mixed with a share of the uniform distribution."""
    own = torch.log1p(-share)
    if share.ndim == 1:
        rest = (share / 2).log()
        positive, negative = (torch.logaddexp(own - F.softplus(-side), rest) for side in (logits, -logits))
        return positive - negative
    return torch.logaddexp(own + logits.log_softmax(1), (share / logits.shape[1]).log())


def _per_class(values: Tensor, logits: Tensor) -> Tensor:
    """Shape one value per class so that it broadcasts along axis 1 of ``logits``."""
    values = values.to(logits)
    return values.reshape(()) if values.numel() == 1 else values.reshape(-1, *[1] * (logits.ndim - 2))


def _fits(perturbation: torch.Size, inputs: torch.Size) -> bool:
    n = len(perturbation)
    return len(inputs) > n and inputs[len(inputs) - n :] == perturbation


def _copied(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.detach().clone()


def _is_float(value: float | Tensor) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point()
