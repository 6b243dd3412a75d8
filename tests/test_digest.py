from collections import OrderedDict

import pytest
import torch
from torch import Tensor, nn

from lightning_clamp._digest import digest, fingerprint, weights
from tests.scenarios import SmallNet


class Wrapped(Tensor):
    """Int8 weights with their scale: a tensor without memory of its own, which refuses ``view`` and the like."""

    @staticmethod
    def __new__(cls, values, scale):
        return Tensor._make_wrapper_subclass(cls, values.shape, dtype=torch.float32)

    def __init__(self, values, scale):
        self.values, self.scale = values, scale

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        if func is torch.ops.aten.detach.default:
            return args[0]
        raise NotImplementedError(f"Wrapped has no {func}")


class Flattened(Wrapped):
    """The same as torch.compile wants it."""

    def __tensor_flatten__(self):
        return ["values", "scale"], None


class Refusing(Tensor):
    """Has memory, and refuses every operation."""

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        raise NotImplementedError(f"Refusing has no {func}")


BASE = torch.arange(12.0).reshape(3, 4) - 5
TENSORS = {
    "plain": lambda x: x,
    "scalar": lambda x: x[0, 1],
    "half": lambda x: x.half(),
    "bfloat16": lambda x: x.bfloat16(),
    "float8": lambda x: x.to(torch.float8_e4m3fn),
    "complex": lambda x: torch.complex(x, x).conj(),
    "bool": lambda x: x > 0,
    "expanded": lambda x: x[:, 1:2].expand(3, 9),
    "a part": lambda x: x[:, 1:3],
    "parameter": lambda x: nn.Parameter(x),
    "coo": lambda x: x.to_sparse(),
    "csr": lambda x: x.to_sparse_csr(),
    "csc": lambda x: x.to_sparse_csc(),
    "quantized": lambda x: torch.quantize_per_tensor(x, 0.5, 0, torch.quint8),
    "wrapped": lambda x: Wrapped(x.to(torch.int8), torch.tensor(0.5)),
    "flattened": lambda x: Flattened(x.to(torch.int8), torch.tensor(0.5)),
    "refusing": lambda x: x.as_subclass(Refusing),
}


@pytest.mark.filterwarnings("ignore:Sparse (CSR|CSC) tensor support is in beta")
@pytest.mark.filterwarnings("ignore:torch.quantize_per_tensor")
@pytest.mark.parametrize("make", TENSORS.values(), ids=TENSORS)
def test_every_kind_of_tensor_counts_by_its_values(make):
    other = BASE.clone()
    other[0, 1] = 3
    assert digest(make(BASE)) == digest(make(BASE.clone()))
    assert digest(make(BASE)) != digest(make(other))
    assert digest(make(BASE)) == digest(make(BASE.t().contiguous().t())), "strides"
    with torch.inference_mode():
        assert digest(make(BASE)) == digest(make(BASE.clone()))


def test_what_has_no_values_counts_by_its_shape():
    assert digest(torch.empty(2, 3, device="meta")) == digest(torch.empty(2, 3, device="meta"))
    assert digest(torch.empty(2, 3, device="meta")) != digest(torch.empty(3, 2, device="meta"))
    assert digest(torch.empty(0, 3)) != digest(torch.empty(3, 0))
    assert fingerprint(nn.LazyLinear(3)) == fingerprint(nn.LazyLinear(4))


def test_values_are_told_apart_with_their_kinds_and_where_they_begin():
    values = [
        *(None, True, 1, 1.0, "1", b"1", 1j, torch.float32, torch.tensor(1), torch.tensor(1.0), torch.tensor([1.0])),
        *([], (), {}, set(), [1], (1,), {1: 1}, {1}, [1, 1], [[1], 1], [1, [1]], "1, 1", {"a": 1}, {"b": 1}),
        *(0.0, -0.0, float("nan"), torch.tensor(-0.0)),
    ]
    assert len({digest(value) for value in values}) == len(values)
    assert digest({"a": [1, {"b": 2.5}]}) == digest(OrderedDict(a=[1, {"b": 2.5}]))
    assert digest({"one", "two", "three"}) == digest({"three", "two", "one"})
    assert digest(object()) == digest(object()), "its address is not its value"


@pytest.mark.parametrize(
    ("change", "same"),
    [(lambda n: None, True), (lambda n: n.linear.bias.data.add_(1e-6), False), (lambda n: n.half(), False)],
)
def test_the_fingerprint_changes_with_the_weights_alone(change, same):
    first, second = SmallNet(), SmallNet().eval()
    change(second)
    assert (fingerprint(first) == fingerprint(second)) == same


def test_the_fingerprint_covers_scalars_buffers_and_bfloat16():
    network = nn.BatchNorm1d(3).bfloat16()
    before = fingerprint(network)
    network.num_batches_tracked += 1
    assert fingerprint(network) != before


class Adapter(nn.Module):
    """Saves its head alone, under another name."""

    def __init__(self) -> None:
        super().__init__()
        self.backbone, self.head = nn.BatchNorm1d(3), nn.Linear(3, 2)

    def state_dict(self, *args, **options):
        return {"top.weight": self.head.weight.detach()}


def test_the_fingerprint_covers_what_the_state_dict_leaves_out():
    network = Adapter()
    seen = {fingerprint(network)}
    for tensor in (network.head.bias, network.backbone.weight, network.backbone.running_mean):
        with torch.no_grad():
            tensor += 1
        seen.add(fingerprint(network))
    assert len(seen) == 4


class Packed(nn.Module):
    """Has weights that are no parameters, as a dynamically quantised layer has."""

    def __init__(self, weight: float) -> None:
        super().__init__()
        self.packed = (torch.full((2, 2), weight), None)

    def get_extra_state(self):
        return self.packed


def test_the_fingerprint_covers_what_only_the_state_dict_has():
    assert fingerprint(Packed(1.0)) == fingerprint(Packed(1.0)) != fingerprint(Packed(2.0))


def test_a_cache_that_no_checkpoint_holds_does_not_count():
    """Fails when torch moves the private name that says which buffers are saved."""
    network = nn.Sequential(nn.Linear(2, 2))
    before = fingerprint(network)
    network[0].register_buffer("cache", torch.zeros(3), persistent=False)
    assert fingerprint(network) == before
    network[0].register_buffer("mean", torch.zeros(3))
    assert fingerprint(network) != before
    assert set(weights(network)) == {"0.weight", "0.bias", "0.mean"}


def test_tied_weights_count_as_equal_ones():
    tied, equal = (nn.ModuleList([nn.Linear(2, 2), nn.Linear(2, 2)]) for _ in range(2))
    equal.load_state_dict(tied.state_dict())
    equal[1].load_state_dict(equal[0].state_dict())
    tied[1] = tied[0]
    assert fingerprint(tied) == fingerprint(equal)


def test_a_network_in_another_precision_counts_as_its_file():
    half = nn.Linear(2, 2).bfloat16()
    single = nn.Linear(2, 2)
    single.load_state_dict(half.state_dict())
    assert fingerprint(single) != fingerprint(half) == fingerprint(single, half.state_dict())
    with torch.no_grad():
        single.weight += 1e-6
    assert fingerprint(single, half.state_dict()) != fingerprint(half)
