"""One combination of input grid and output map that was considered, with all its figures."""

import math
from dataclasses import dataclass, field
from typing import Literal, NamedTuple, TypeAlias, get_args

from lightning_clamp.clamping.clamp import Clamp
from lightning_clamp.clamping.output_map import OutputMap

# Why a candidate was left out: what is said of a grid, and of an output map.
_GridCode: TypeAlias = Literal[
    "several inputs",
    "integer inputs",
    "inputs differ in shape",
    "no gradient",
    "no such grid",
    "missing classes",
    "too few samples for the grid",
    "costs more than it promises",
    "no step helps",
]
_MapCode: TypeAlias = Literal[
    "no temperature",
    "one class",
    "masked",
    "too few samples for the map",
    "too many passes",
    "no such matrix",
    "no two classes",
    "promises too little",
    "no usable map",
]
RefusalCode: TypeAlias = _GridCode | _MapCode
# What nobody asked for that the data cannot have: not worth a word.
_SILENT: tuple[RefusalCode, ...] = ("no such grid", "no such matrix")


class Refusal(NamedTuple):
    """Why a candidate was left out: a code to decide by, and words to read."""

    code: RefusalCode
    words: str

    @property
    def is_silent(self) -> bool:
        """Whether it goes without saying."""
        return self.code in _SILENT

    @property
    def of_the_map(self) -> bool:
        """Whether the output map is to blame, rather than the grid."""
        return self.code in get_args(_MapCode)


@dataclass(frozen=True)
class Candidate:
    """One combination of input grid and output map that was considered.

    Gains and changes are in nats per row (a sample, or a pixel), against temperature scaling alone.

    Attributes:
        grid: Side r of the coefficient grid; 0 leaves the input alone.
        output_map: ``"temperature"``, ``"bias"``, ``"vector"``, ``"beta"`` or ``"matrix"``.
        n_parameters: Free parameters, the temperature included.
        shrinkage: Strength of the ridge that shrinks the output map towards the temperature; None without such a map.
        effective_parameters: What the parameters are charged for. Class outputs: their number, less what the ridge
            takes off; dense outputs and labels: Takeuchi's trace, which counts images rather than pixels. A grid is
            charged for three more, for having been chosen among several.
        lm_statistic: Score (Lagrange multiplier) test of the grid's coefficients, the best output map without a grid
            profiled out. None without a grid.
        p_value: Its tail probability under chi-squared with as many degrees of freedom as coefficients.
        predicted_gain: Gain on the calibration set that the quadratic model promised before any step of the grid, with
            that output map and including its own gain. None without a grid.
        achieved_gain: Gain on the calibration set that was reached.
        expected_change: Akaike's (dense outputs: Takeuchi's) estimate of the change of the held-out NLL; negative is
            better.
        standard_error: Of that estimate, over draws of the calibration set; those of the steps from temperature scaling
            to an output map, from there to a grid, and to another output map there, added up.
        criterion: Expected change plus its standard error; the lowest is chosen.
        passes: Passes over the calibration set spent on the grid, the first (shared by all grids) included.
        seconds: Time spent.
        refusal: Why it was not fitted or not eligible; None otherwise. The figures above are then None, except what the
            first pass said of a grid.
        clamp: Its fitted clamp, None where there is a refusal.
    """

    grid: int
    output_map: OutputMap
    n_parameters: int
    shrinkage: float | None = None
    effective_parameters: float | None = None
    lm_statistic: float | None = None
    p_value: float | None = None
    predicted_gain: float | None = None
    achieved_gain: float | None = None
    expected_change: float | None = None
    standard_error: float | None = None
    criterion: float | None = None
    passes: int = 0
    seconds: float = 0.0
    refusal: Refusal | None = None
    clamp: Clamp | None = field(default=None, repr=False, compare=False)

    @property
    def name(self) -> str:
        """Short name, such as ``"4×4 grid + vector"``."""
        return f"{self.grid}×{self.grid} grid + {self.output_map}" if self.grid else self.output_map

    @property
    def left_out(self) -> str:
        """Short name of what was refused: the grid, or the output map on it."""
        alone = self.refusal is not None and self.grid and not self.refusal.of_the_map
        return f"{self.grid}×{self.grid} grid" if alone else self.name

    @property
    def rank(self) -> float:
        """The criterion to compare by: infinite where there is none."""
        return math.inf if self.criterion is None or math.isnan(self.criterion) else self.criterion
