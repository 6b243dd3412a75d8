"""The try before training: what it finds, what it lets pass, and that training notices nothing of it."""

import os
import random
import re
import warnings
from functools import cache, partial

import numpy as np
import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Callback, LightningModule
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader, Dataset, RandomSampler, Sampler, TensorDataset

from lightning_clamp import NeuralClamping, calibrate
from lightning_clamp._trainer.preflight import kept_loaders
from tests.ranks import on_ranks
from tests.scenarios import SmallNet, Validating, images, sampled, trainer

pytestmark = [
    pytest.mark.filterwarnings("ignore:NeuralClamping will calibrate on the validation set"),
    # Training and calibration read one set, so that a try that took something of it would be seen.
    pytest.mark.filterwarnings("ignore:The calibration set shares"),
]
N = 60
X = images(N)
Y = sampled(SmallNet()(X).detach().double())


def held_out(x=X, y=Y, size=30):
    return DataLoader(TensorDataset(x, y), batch_size=size)


class Net(LightningModule):
    """Trains well whatever its forward returns."""

    def __init__(self, forward=lambda net, x: net(x)):
        super().__init__()
        self.net = SmallNet()
        self.net.unused = nn.Linear(2, 2)
        self.way = forward

    def forward(self, x):
        return self.way(self.net, x)

    def training_step(self, batch, batch_idx):
        return F.cross_entropy(self.net(batch[0]), batch[1])

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


class NoForward(Net):
    forward = LightningModule.forward


def dense(net, x):
    """Logits of (N, 4, 2, 2)."""
    return F.avg_pool2d(net.conv(x)[:, :4], 4)


# Model, data, options; error, message.
REFUSED = {
    "softmax": (lambda net, x: net(x).softmax(1), held_out(), {}, ValueError, "returns probabilities"),
    "one logit": (lambda net, x: net(x)[:, :1], held_out(y=Y % 2), {}, ValueError, 'say task="binary"'),
    "one logit without its axis": (
        lambda net, x: net(x)[:, 0], held_out(y=Y % 2), {}, ValueError, 'say task="binary" for a one-logit'
    ),
    "labels of several kinds": (
        None, held_out(y=F.one_hot(Y, 4).float()), {}, ValueError, "for several labels per item"
    ),
    "one-hot": (None, held_out(y=F.one_hot(Y, 4)), {}, ValueError, "one-hot"),
    "labels from 1": (None, held_out(y=Y + 1), {}, ValueError, "start the labels at 0"),
    "a padding label": (None, held_out(y=Y.where(Y > 0, 255)), {}, ValueError, "ignore_index=255"),
    "binary labels of two columns": (None, held_out(), {"task": "binary"}, ValueError, "needs one logit per target"),
    "swapped batch_keys": (
        None, held_out(), {"batch_keys": (1, 0)}, RuntimeError,
        r"fails when it is called with torch.int64 of shape \(30,\)\. .*`batch_keys` says which",
    ),
    "what forward does not take": (
        lambda net, x: net(x["image"]), held_out(), {}, RuntimeError, r"called with torch.float32 of shape \(30, 3, 8"
    ),
    "forward of two inputs": (
        lambda net, x, y: net(x), held_out(), {}, RuntimeError, r"batch_keys=\(\(0, 1\), 2\) for forward\(a, b\)"
    ),
    "a dict without logits": (
        lambda net, x: {"pred": net(x)}, held_out(), {}, TypeError, "got dict of pred: let its .*{'logits': logits"
    ),
    "complex labels": (None, held_out(y=Y.to(torch.complex64)), {}, TypeError, "indices as int64, got torch.complex64"),
    "8 samples": (None, held_out(X[:8], Y[:8]), {}, ValueError, "has 8 samples; a temperature needs at least 10"),
    "8 samples in small batches": (None, held_out(X[:8], Y[:8], 3), {}, ValueError, "has 8 samples"),
    "quarter size": (
        dense, held_out(y=Y[:, None, None].expand(N, 8, 8)), {}, ValueError, r"need a target of shape \(30, 2, 2\)"
    ),
    "swapped axes": (
        lambda net, x: net(x)[:, None].expand(-1, 7, 4), held_out(y=Y[:, None].expand(N, 7)), {}, ValueError,
        r"\(class axis 1\) need a target",
    ),
    "summed over the batch": (lambda net, x: net(x).sum(0), held_out(), {}, ValueError, "first axis must be"),
    "a tuple": (lambda net, x: (net(x), x), held_out(), {}, TypeError, "must return a tensor of logits"),
    "perturb_at that is never called": (
        None, held_out(), {"perturb_at": "net.unused"}, ValueError, "'net.unused' was called 0 times"
    ),
    "published without a gradient": (
        lambda net, x: torch.no_grad()(net)(x), held_out(), {"method": "published"}, RuntimeError,
        "cannot be differentiated in its input",
    ),
    "published on tokens": (
        lambda net, x: net(x.float()), held_out(X.long()), {"method": "published"}, TypeError, "inputs are integers"
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_what_stays_wrong_is_found_before_the_first_step(tmp_path, case, caplog):
    forward, data, options, error, message = REFUSED[case]
    run = trainer(tmp_path, NeuralClamping(data, on_error="raise", **options))
    with caplog.at_level("INFO"), pytest.raises(error, match=message):
        run.fit(Net() if forward is None else Net(forward), held_out())
    assert run.global_step == 0
    assert "trained so far" not in caplog.text


def test_a_module_without_forward_is_refused_in_setup(tmp_path):
    run = trainer(tmp_path, NeuralClamping(held_out()))
    with pytest.raises(MisconfigurationException, match="NoForward has no forward"):
        run.fit(NoForward(), held_out())
    assert run.global_step == 0


@cache
def quantized():
    """Weights of 8 bits, which have no backward."""
    return torch.ao.quantization.quantize_dynamic(nn.Sequential(nn.Flatten(), nn.Linear(192, 4)))


# What only a perturbation would need.
WITHOUT_GRADIENT = {
    "reentrant checkpointing": (partial(checkpoint, use_reentrant=True), "use_reentrant=True"),
    "weights of 8 bits": (lambda _, x: quantized()(x), "cannot be differentiated"),
    "no_grad": (lambda net, x: torch.no_grad()(net)(x), "a forward under `no_grad`"),
    "rounding": (lambda net, x: net(x.round().long().float()), "cannot be differentiated"),
}


@pytest.mark.filterwarnings("ignore:(?s)torch.ao.quantization is deprecated")
@pytest.mark.filterwarnings("ignore:torch.quantize_per_tensor")
@pytest.mark.filterwarnings("ignore:quantized..linear_dynamic. an autograd kernel was not registered")
@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad=True")
@pytest.mark.parametrize("case", WITHOUT_GRADIENT)
def test_without_a_gradient_the_outputs_are_calibrated_and_it_is_said_before(tmp_path, case):
    forward, message = WITHOUT_GRADIENT[case]
    callback = NeuralClamping(held_out(), on_error="raise")
    run = trainer(tmp_path, callback)
    with pytest.warns(UserWarning, match=f"outputs alone, without a perturbation: .*{message}"):
        run.fit(Net(forward), held_out())
    assert callback.result.clamp.perturbation is None
    assert "1×1 grid because the network cannot be differentiated in its input" in callback.result.reason


@pytest.mark.parametrize("method", [{"grids": ()}, {"method": "temperature"}])
def test_where_no_grid_is_wanted_no_gradient_is(tmp_path, method):
    callback = NeuralClamping(held_out(), on_error="raise", **method)
    trainer(tmp_path, callback).fit(Net(WITHOUT_GRADIENT["no_grad"][0]), held_out())
    assert callback.result is not None


def test_by_default_it_warns_and_training_goes_on(tmp_path):
    run = trainer(tmp_path, NeuralClamping(held_out(y=Y + 1)))
    with pytest.warns(UserWarning, match="NeuralClamping") as caught:
        run.fit(Net(), held_out())
    texts = [str(one.message) for one in caught if "NeuralClamping" in str(one.message)]
    assert texts[0].startswith(
        "NeuralClamping tried the network before training, and this fit will not be calibrated. ValueError: The calib"
    )
    assert texts[1].startswith("NeuralClamping failed: the model stays uncalibrated.")
    assert run.global_step == 2


class Logging(Net):
    """Logs whenever it is called, or in training alone."""

    def __init__(self, in_training):
        super().__init__()
        self.in_training = in_training

    def forward(self, x):
        if self.training or not self.in_training:
            self.log("mean", x.mean(), on_step=True, on_epoch=True)
        return super().forward(x)

    def training_step(self, batch, batch_idx):
        return F.cross_entropy(self(batch[0]), batch[1])


def test_a_forward_that_logs_is_found_before_and_logs_nothing_of_the_try(tmp_path):
    run = trainer(tmp_path, NeuralClamping(held_out(), on_error="raise"))
    with pytest.raises(MisconfigurationException, match=r"can't `self.log\(\)` inside .* or `if self.training`"):
        run.fit(Logging(in_training=False), held_out())
    assert run.global_step == 0
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        trainer(tmp_path, NeuralClamping(held_out())).fit(Logging(in_training=False), held_out())
    assert sum("or `if self.training`" in str(warning.message) for warning in told) == 2  # before and at the end
    logged = []
    for more in ([], [NeuralClamping(held_out(), on_error="raise", method="temperature")]):
        end = Ending()
        trainer(tmp_path, end, *more).fit(Logging(in_training=True), held_out())
        logged.append(end.logged)
    assert logged[0] == logged[1]
    assert "mean_epoch" in logged[0]


# What an untrained network may do, and a trained one will not


class Untrained(Net):
    """Its outputs are right once it is trained."""

    def __init__(self, at_first, forward=lambda net, x: net(x)):
        super().__init__(forward)
        self.at_first = at_first

    def forward(self, x):
        return super().forward(x) if self.trainer.global_step else self.at_first(super().forward(x))


class Lazy(Net):
    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Flatten(), nn.LazyLinear(4))


class LateSetup(Net):
    """Is not complete before its own hook."""

    def on_train_start(self):
        self.scale = 2.0

    def forward(self, x):
        return self.scale * super().forward(x)


LET_PASS = {
    "nan": lambda: Untrained(lambda z: z * torch.nan),
    "infinite": lambda: Untrained(lambda z: z * torch.inf),
    "all alike": lambda: Untrained(lambda z: z * 0),
    "lazy": Lazy,
    "made in on_train_start": LateSetup,
}


@pytest.mark.parametrize("case", LET_PASS)
def test_what_may_come_right_is_let_pass(tmp_path, case):
    callback = NeuralClamping(held_out(), on_error="raise", method="temperature")
    trainer(tmp_path, callback).fit(LET_PASS[case](), held_out())
    assert callback.result is not None


def test_a_first_batch_that_is_empty_is_no_empty_set(tmp_path, caplog):
    callback = NeuralClamping([(X[:0], Y[:0]), (X, Y)], on_error="raise", method="temperature")
    with caplog.at_level("INFO"):
        trainer(tmp_path, callback).fit(Net(), held_out())
    assert "does not try the network before training: the first batch is empty" in caplog.text
    assert callback.result.n_samples == N


@pytest.mark.parametrize(("dtype", "precision"), [(torch.bfloat16, "bf16-true"), (torch.float64, "64-true")])
def test_weights_of_another_dtype_are_said_to_need_a_precision(tmp_path, dtype, precision):
    model = Net().to(dtype)
    with pytest.raises(RuntimeError, match=rf"Its weights are {dtype}: Trainer\(precision='{precision}'\) makes"):
        calibrate(trainer(tmp_path), model, held_out(), method="temperature")
    module = calibrate(trainer(tmp_path, precision=precision), model, held_out(), method="temperature")
    assert module.network.net.conv.weight.dtype == dtype


@pytest.mark.filterwarnings("ignore:The network was left as it is")
@pytest.mark.filterwarnings("ignore:The outputs say next to nothing of the labels")
def test_a_binary_network_may_begin_between_0_and_1(tmp_path):
    callback = NeuralClamping(held_out(y=Y % 2), task="binary", on_error="raise", method="temperature")
    trainer(tmp_path, callback).fit(Untrained(torch.sigmoid, lambda net, x: net(x)[:, 0]), held_out())


# Training notices nothing


class Noisy(Validating):
    """Draws and keeps statistics wherever a network can, and logs."""

    def __init__(self):
        super().__init__(lr=0.1)
        self.norm = nn.BatchNorm2d(3)
        self.dropout = nn.Dropout(0.3)

    def forward(self, x):
        return super().forward(self.dropout(self.norm(x + 0.01 * torch.randn_like(x))))

    def on_after_batch_transfer(self, batch, dataloader_idx):
        return [batch[0] + 0.01 * torch.randn_like(batch[0]) + random.random() + np.random.rand(), batch[1]]  # noqa: NPY002

    def training_step(self, batch, batch_idx):
        loss = super().training_step(batch, batch_idx)
        self.log("loss", loss)
        return loss


class Splitting(Noisy):
    """Makes its set at random."""

    def calibration_dataloader(self):
        return DataLoader(torch.utils.data.random_split(held_out().dataset, [40, 20])[0], batch_size=20, shuffle=True)


class Ending(Callback):
    """What training ended with, before anything is calibrated."""

    def on_train_end(self, trainer, pl_module):
        self.weights = {name: value.clone() for name, value in pl_module.state_dict().items()}
        self.drawn = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()  # noqa: NPY002
        self.flags = [(part.training, [p.requires_grad for p in part.parameters()]) for part in pl_module.modules()]
        self.logged = {name: float(value) for name, value in trainer.callback_metrics.items()}


class Turning(Sampler):
    """Goes on where it stopped."""

    def __init__(self, n):
        self.n, self.start, self.generator = n, 0, np.random.default_rng(0)

    def __iter__(self):
        self.start += 1
        return iter([(self.start + i + int(self.generator.integers(9))) % self.n for i in range(self.n)])

    def __len__(self):
        return self.n


class Drawing(Dataset):
    """With a generator of its own."""

    def __init__(self):
        self.random = random.Random(0)

    def __getitem__(self, i):
        return X[i] + self.random.random(), Y[i]

    def __len__(self):
        return N


def global_random_state():
    return DataLoader(TensorDataset(X, Y), batch_size=20, shuffle=True), held_out()


def one_generator():
    generator = torch.Generator().manual_seed(3)
    parts = [DataLoader(TensorDataset(X, Y), batch_size=20, shuffle=True, generator=generator) for _ in range(2)]
    return tuple(parts)


def one_sampler_and_dataset():
    sampler, data = Turning(N), Drawing()
    return DataLoader(data, batch_size=20, sampler=sampler), DataLoader(data, batch_size=20, sampler=sampler)


def a_sampler_inside():
    generator = torch.Generator().manual_seed(3)
    data = TensorDataset(X, Y)
    batches = torch.utils.data.BatchSampler(RandomSampler(data, generator=generator), 20, drop_last=False)
    return DataLoader(data, batch_sampler=batches), DataLoader(data, batch_sampler=batches)


def ended(tmp_path, loaders, callbacks, ckpt_path=None, model=Noisy, **options):
    random.seed(1)
    np.random.seed(1)  # noqa: NPY002
    torch.manual_seed(1)
    end = Ending()
    train, validation = loaders()
    run = trainer(tmp_path, end, *callbacks, max_epochs=2, **options)
    run.fit(model(), train, validation, ckpt_path=ckpt_path)
    return end


def assert_equal(first, second):
    assert all(torch.equal(value, second.weights[name]) for name, value in first.weights.items())
    assert torch.equal(first.drawn[0], second.drawn[0])
    assert first.drawn[1:] == second.drawn[1:]
    assert first.flags == second.flags
    assert first.logged == second.logged
    assert first.logged


LOADERS = (global_random_state, one_generator, one_sampler_and_dataset, a_sampler_inside)
quiet = pytest.mark.filterwarnings(
    "ignore:The network was left as it is",
    "ignore:The calibration set is the training set",
    "ignore:.*does not have many workers",
    "ignore:Your `val_dataloader`'s sampler has shuffling enabled",
)


@quiet
@pytest.mark.parametrize("options", [{}, {"num_sanity_val_steps": 0}, {"precision": "bf16-mixed"}], ids=str)
@pytest.mark.parametrize("loaders", LOADERS)
def test_training_is_bit_identical_with_and_without_the_try(tmp_path, loaders, options):
    bare = ended(tmp_path, loaders, [], **options)
    assert_equal(bare, ended(tmp_path, loaders, [NeuralClamping(method="temperature")], **options))


@quiet
def test_a_hook_that_splits_at_random_changes_nothing_of_the_training(tmp_path):
    bare, tried = (
        ended(tmp_path, global_random_state, callbacks, model=Splitting) for callbacks in ([], [NeuralClamping()])
    )
    assert_equal(bare, tried)


@quiet
@pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty")
@pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`")
def test_a_resumed_training_is_the_same(tmp_path):
    keeper = ModelCheckpoint(tmp_path, filename="{epoch}", save_top_k=-1)
    ended(tmp_path, global_random_state, [keeper])
    path = tmp_path / "epoch=0.ckpt"
    bare, tried = (
        ended(tmp_path, global_random_state, [ModelCheckpoint(tmp_path, filename="again"), *more], path)
        for more in ([], [NeuralClamping()])
    )
    assert_equal(bare, tried)


@quiet
def test_a_second_fit_is_tried_again_and_the_same(tmp_path):
    ends = []
    for more in ([], [NeuralClamping(held_out(), method="temperature")]):
        torch.manual_seed(1)
        random.seed(1)
        np.random.seed(1)  # noqa: NPY002
        end, model = Ending(), Noisy()
        run = trainer(tmp_path, end, *more)
        run.fit(model, *global_random_state())
        run.fit_loop.max_epochs = 2
        run.fit(model, *global_random_state())
        end.logged = {name: value for name, value in end.logged.items() if not name.startswith("calibration/")}
        ends.append(end)
    assert_equal(*ends)


@pytest.mark.slow
@quiet
def test_workers_that_stay_keep_their_random_state(tmp_path):
    """Those of the loader that calibration shares with validation are not the ones that the try reads with."""

    def loaders():
        options = {"num_workers": 1, "persistent_workers": True, "multiprocessing_context": "fork"}
        return held_out(), DataLoader(Drawing(), batch_size=20, **options)

    bare, tried = (
        ended(tmp_path, loaders, more, num_sanity_val_steps=0) for more in ([], [NeuralClamping(method="temperature")])
    )
    assert_equal(bare, tried)


def test_a_loaders_iterator_is_where_it_is_looked_for():
    data = DataLoader(TensorDataset(X, Y), batch_size=20, num_workers=1, persistent_workers=True)
    iter(data)
    kept = data._iterator
    with kept_loaders([data]):
        assert data._iterator is None
    assert data._iterator is kept is not None


# Several ranks


def on_this_rank(case, rank, tmp_path):
    """What one rank is told of a mistake, before any step."""
    forward, data, options, *_ = REFUSED[case]
    run = trainer(tmp_path, NeuralClamping(data, on_error="raise", **options), strategy="ddp", devices=2)
    try:
        run.fit(Net() if forward is None else Net(forward), held_out())
    except (TypeError, ValueError, RuntimeError) as error:
        return run.global_step, f"{type(error).__name__}: {error}"
    return run.global_step, "nothing"


def all_mistakes(tmp_path):
    rank = torch.distributed.get_rank()
    elastic = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 2, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": 1}
    os.environ.update({name: str(value) for name, value in {**elastic, "TORCHELASTIC_RUN_ID": 1}.items()})
    told = {case: on_this_rank(case, rank, tmp_path) for case in REFUSED if "published" not in case}

    class OneRankFails(Net):
        def forward(self, x):
            if rank == 1:
                raise ValueError("only here")
            return super().forward(x)

    run = trainer(tmp_path, NeuralClamping(held_out(), on_error="raise"), strategy="ddp", devices=2)
    with pytest.raises(RuntimeError) as caught:
        run.fit(OneRankFails(), held_out())
    told["one rank"] = run.global_step, str(caught.value)
    runs = []
    for more in ([], [NeuralClamping(held_out(), method="temperature")]):
        end = ended(tmp_path, global_random_state, more, strategy="ddp", devices=2)
        runs.append((end.weights, *end.drawn, end.flags, end.logged))
    return told, runs


@pytest.mark.slow
@pytest.mark.ddp
@quiet
@pytest.mark.filterwarnings("ignore:Using `DistributedSampler` with the dataloaders")
@pytest.mark.filterwarnings("ignore:It is recommended to use `self.log")
@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded, use of fork")
def test_two_ranks_find_all_of_it_together_and_train_the_same(tmp_path):
    first, second = on_ranks(2, tmp_path / "ranks", all_mistakes, tmp_path)
    for told, runs in (first, second):
        for case, (step, words) in told.items():
            assert step == 0, (case, words)
            if case in REFUSED:
                assert re.search(REFUSED[case][4], words), case
        assert re.search("only here", told["one rank"][1])
        bare, tried = runs
        assert all(torch.equal(value, tried[0][name]) for name, value in bare[0].items())
        assert torch.equal(bare[1], tried[1])
        assert bare[2:] == tried[2:]
