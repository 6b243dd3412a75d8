"""The command line: what its commands do, that its configs come back, and what it says to those who err."""

import inspect
import os
import re
import shlex
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from jsonargparse import ArgumentParser
from lightning.pytorch import LightningDataModule, Trainer
from lightning.pytorch.cli import LightningCLI

import lightning_clamp
from lightning_clamp import CalibrationModule, NeuralClamping, calibrate
from lightning_clamp._digest import fingerprint
from lightning_clamp.checkpoint import read_result
from lightning_clamp.clamping.options import ClampOptions, PublishedOptions, make_plan, names_of
from lightning_clamp.cli import main
from lightning_clamp.cli.command import ClampCLI
from lightning_clamp.spec import Spec
from tests.scenarios import LitClassifier, Validating, loader

# Lightning 2.6 uses what newer jsonargparse calls deprecated.
pytestmark = pytest.mark.filterwarnings("ignore:(?s).*(JsonargparseDeprecationWarning|was deprecated in v4)")
ROOT = Path(lightning_clamp.__file__).parents[1]
CONFIGS = "examples/configs"
QUIET = ["--trainer.enable_progress_bar=false", "--trainer.enable_model_summary=false"]
PLAIN = [*QUIET, "--trainer.logger=false", "--trainer.enable_checkpointing=false", "--trainer.accelerator=cpu"]
DIGITS = ["--model=examples.digits.DigitsClassifier", "--data=examples.digits.DigitsData"]
SMALL = ["--model.width=4", "--data.n_calibration=200", *QUIET]
OURS = ["--model=tests.scenarios.LitClassifier"]
WITH_DATA = ["--model=tests.test_cli.Trainable", "--trainer.max_epochs=1"]
TWO = ["--trainer.devices=2", "--trainer.strategy=ddp_fork"]


def enter(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Work in a folder that has the examples and nothing else, as if started by the console script."""
    monkeypatch.chdir(folder)
    Path("examples").symlink_to(ROOT / "examples")
    monkeypatch.setattr(sys, "argv", ["lightning-clamp"])
    monkeypatch.setattr(sys, "path", [path for path in sys.path if path])
    return folder


@pytest.fixture
def here(tmp_path, monkeypatch):
    return enter(tmp_path, monkeypatch)


@pytest.fixture(scope="module")
def two_processes(tmp_path_factory):
    """A `fit` in two processes, each of which is started with the command line, and the folder that it runs in."""
    folder = tmp_path_factory.mktemp("two")
    (folder / "examples").symlink_to(ROOT / "examples")
    command = ["fit", "--config", f"{CONFIGS}/ddp.yaml", "--trainer.max_epochs=10", *SMALL]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    with open(folder / "shown", "w") as shown:
        process = subprocess.Popen(
            [sys.executable, "-m", "lightning_clamp", *command], cwd=folder, env=environment, stdout=shown, stderr=shown
        )
        yield process, folder
        process.kill()
        process.wait()


# The two processes take a while to start, and do so while the other tests run.
@pytest.fixture(scope="module")
def trained(tmp_path_factory, two_processes):
    """A folder in which `fit` was run."""
    with pytest.MonkeyPatch.context() as monkeypatch:
        folder = enter(tmp_path_factory.mktemp("trained"), monkeypatch)
        options = ["--trainer.max_epochs=10", "--model.width=8", "--data.n_calibration=300"]
        main(["fit", "--config", f"{CONFIGS}/digits.yaml", *options, *QUIET])
        return folder / "digits"


@pytest.fixture
def checkpoint(trained):
    return str(trained / "checkpoints" / "epoch=9-step=40.ckpt")


@pytest.fixture
def calibrated(checkpoint):
    return checkpoint.replace(".ckpt", "-calibrated.ckpt")


@pytest.mark.slow
def test_fit_trains_calibrates_and_saves(trained, calibrated, here):
    from examples.digits import DigitsClassifier

    module = CalibrationModule.from_checkpoint(calibrated, DigitsClassifier)
    assert module.network.hparams["width"] == 8
    assert module.result.n_samples == 300
    assert module.result.after["nll"] < module.result.before["nll"]
    assert "calibration/after/nll" in (trained / "csv" / "version_0" / "metrics.csv").read_text()
    assert list((trained / "tensorboard" / "version_0").glob("events.out.tfevents.*"))


def held_out_nll(module: torch.nn.Module) -> float:
    from examples.digits import DigitsData

    batches = list(DigitsData(n_calibration=300).test_dataloader())
    with torch.no_grad():
        losses = [torch.nn.functional.cross_entropy(module(x), y, reduction="sum") for x, y in batches]
    return float(sum(losses)) / sum(len(y) for _, y in batches)


# Lightning's own: the callback that saved the checkpoint is not among those of the test.
@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`")
def test_test_and_predict_use_the_clamp_of_a_calibrated_checkpoint(checkpoint, calibrated, here):
    from examples.digits import DigitsClassifier

    options = [*DIGITS, "--data.n_calibration=300", *PLAIN]
    module = CalibrationModule.from_checkpoint(calibrated, DigitsClassifier)
    found = ClampCLI(["test", *options, "--ckpt_path", calibrated]).trainer.callback_metrics["test/nll"]
    assert float(found) == pytest.approx(held_out_nll(module), rel=1e-5)
    with pytest.warns(UserWarning, match="NeuralClamping has calibrated nothing yet"):
        bare = ClampCLI(["test", *options, "--ckpt_path", checkpoint]).trainer.callback_metrics["test/nll"]
    assert float(bare) == pytest.approx(held_out_nll(module.network), rel=1e-5)

    run = ClampCLI(["predict", *options, "--ckpt_path", calibrated])
    x, _ = next(iter(run.datamodule.test_dataloader()))
    torch.testing.assert_close(run.trainer.predict_loop.predictions[0], module(x).softmax(1))


@pytest.mark.slow
def test_calibrate_does_what_the_function_does(checkpoint, here):
    from examples.digits import DigitsClassifier, DigitsData

    options = ["--data.n_calibration=300", *QUIET, "--save_to=one.ckpt"]
    main(["calibrate", "--config", f"{CONFIGS}/calibrate.yaml", "--ckpt_path", checkpoint, *options])
    trainer = Trainer(accelerator="cpu", logger=False, enable_progress_bar=False, enable_checkpointing=False)
    model = DigitsClassifier.load_from_checkpoint(checkpoint)
    chosen = {"grids": [1, 2, 4], "output_maps": ["temperature"]}
    other = calibrate(trainer, model, DigitsData(n_calibration=300), **chosen)
    saved = read_result("one.ckpt")
    assert saved.reason == other.result.reason
    assert saved.fingerprint == fingerprint(model)
    torch.testing.assert_close(saved.clamp.state_dict(), other.clamp.state_dict())


@pytest.fixture
def recorded(monkeypatch):
    """What the command passes to `calibrate`, which is not run."""
    seen = []
    monkeypatch.setattr(
        "lightning_clamp.cli.trainer.calibrate_by_plan", lambda *given, **options: seen.append((*given, options))
    )
    return seen


@pytest.mark.slow
def test_every_option_of_calibrate_is_that_of_the_callback(checkpoint, recorded, here):
    given = {
        "method": "published", "task": "binary", "ignore_index": 7, "cache_bytes": 5, "perturb_at": "net.3",
        "batch_keys": ("image", "label"), "epochs": 3, "gamma": None,
    }  # fmt: skip
    options = [f"--calibration.{name}={'null' if value is None else value}" for name, value in given.items()]
    options[5] = "--calibration.batch_keys=[image,label]"
    main(["calibrate", *DIGITS, *PLAIN, "--ckpt_path", checkpoint, *options])
    ((_, model, loaders, data, plan, passed),) = recorded
    assert passed == {
        "save_to": checkpoint.replace(".ckpt", "-calibrated.ckpt"),
        "cache_bytes": given.pop("cache_bytes"),
    }
    assert plan == make_plan(given.pop("method"), given, calibrate)
    assert loaders is None
    assert model.hparams["width"] == 8
    assert type(data).__name__ == "DigitsData"
    named = {one.name for one in inspect.signature(calibrate).parameters.values() if one.kind is one.KEYWORD_ONLY}
    assert named - {"method"} == set(passed)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("options", "path"),
    [
        (["--calibration.save_to=elsewhere"], "elsewhere/epoch=9-step=40-calibrated.ckpt"),
        (["--calibration.save_to=false"], False),
        (["--calibration.save_to=false", "--save_to=mine.ckpt"], "mine.ckpt"),
    ],
)
def test_where_calibrate_saves(options, path, checkpoint, recorded, here):
    main(["calibrate", *DIGITS, *PLAIN, "--ckpt_path", checkpoint, *options])
    assert recorded[0][-1]["save_to"] == path


def plain_checkpoint(path="plain.ckpt", **options):
    """Of a training without the command line."""
    quiet = {"enable_progress_bar": False, "enable_model_summary": False, "enable_checkpointing": False}
    run = Trainer(accelerator="cpu", max_epochs=1, logger=False, **quiet)
    run.fit(LitClassifier(**options), loader(100, 20))
    run.save_checkpoint(path)
    return str(path)


class OwnData(LitClassifier):
    """Comes with its data."""

    def __init__(self, fails: bool = False, **options) -> None:
        super().__init__(**options)
        self.fails = fails

    def val_dataloader(self):
        return loader(200, 30)

    def validation_step(self, batch, batch_idx):
        if self.fails:
            raise KeyError("a mistake in somebody's model")


class OwnCalibrationData(OwnData):
    def calibration_dataloader(self):
        return loader(1000, 30, shift=False)


class Trainable(OwnCalibrationData):
    def train_dataloader(self):
        return loader(100, 20)


class Told(OwnCalibrationData):
    """Is sent a signal when it is calibrated."""

    def forward(self, x):
        signal.raise_signal(signal.SIGTERM)
        return super().forward(x)


class TestData(LightningDataModule):
    """Images like those of the calibration, or shifted ones."""

    __test__ = False

    def __init__(self, shift: bool = False) -> None:
        super().__init__()
        self.shift = shift

    def test_dataloader(self):
        return loader(1000, 50, shift=self.shift)


@pytest.mark.slow
def test_check_says_whether_a_clamp_still_holds(here, capsys):
    """With exit code 0 either way, unless told otherwise."""
    path = plain_checkpoint(temperature=3.0, lr=0.0)
    own = ["--model=tests.test_cli.OwnCalibrationData", *PLAIN]
    main(["calibrate", *own, "--ckpt_path", path, "--calibration.method=temperature"])
    options = ["check", *own, "--data=tests.test_cli.TestData", "--ckpt_path=plain-calibrated.ckpt"]
    main([*options, "--fail_under=0.001"])
    main([*options, "--data.shift=true"])
    assert "calibrated/p" in capsys.readouterr().out
    with pytest.raises(SystemExit) as ended:
        main([*options, "--data.shift=true", "--fail_under=0.001"])
    assert ended.value.code == 1
    with pytest.raises(SystemExit) as ended:
        main([*options[:-1], "--ckpt_path", path])
    assert ended.value.code == 2
    assert "holds no clamp" in capsys.readouterr().err


@pytest.mark.slow
def test_a_model_trained_elsewhere_is_built_with_its_own_hyperparameters(here):
    path = plain_checkpoint(temperature=3.0, lr=0.0)
    command = ["calibrate", "--model=tests.test_cli.OwnCalibrationData", *PLAIN, "--ckpt_path", path]
    main([*command, "--calibration.method=temperature"])
    saved = read_result("plain-calibrated.ckpt")
    assert saved.n_samples == 1000
    assert float(saved.clamp.temperature) == pytest.approx(3.0, rel=0.1)


@pytest.mark.slow
def test_a_model_may_come_with_its_validation_set(here):
    path = plain_checkpoint()
    command = ["calibrate", "--model=tests.test_cli.OwnData", *PLAIN, "--ckpt_path", path]
    with pytest.warns(UserWarning, match=r"OwnData has no calibration_dataloader\(\), so its validation set serves"):
        main([*command, "--calibration.method=temperature"])
    assert read_result("plain-calibrated.ckpt").n_samples == 200


def test_pictures_are_drawn_into_folders(calibrated, here, capsys):
    Path("taken").write_text("")
    with pytest.raises(SystemExit):
        main(["report", str(calibrated), "--out=taken"])
    assert "--out must be a folder, and 'taken' is a file" in capsys.readouterr().err


@pytest.mark.slow
def test_a_mistake_in_the_users_code_keeps_its_traceback(here):
    with pytest.raises(KeyError, match="somebody's model"):
        main(["validate", "--model=tests.test_cli.OwnData", "--model.fails=true", *PLAIN])


@pytest.mark.slow
def test_report_needs_the_file_alone_and_draws_what_is_in_it(checkpoint, here, capsys):
    options = ["calibrate", *DIGITS, "--data.n_calibration=300", *PLAIN, "--ckpt_path", checkpoint]
    main([*options, "--calibration.method=temperature", "--save_to=temperature.ckpt"])
    main([*options, "--calibration.output_maps=[temperature]", "--save_to=perturbed.ckpt"])
    Path("examples").unlink()
    capsys.readouterr()
    main(["report", "perturbed.ckpt", "--out=pictures"])
    main(["report", "temperature.ckpt"])
    shown = capsys.readouterr().out
    assert shown.startswith("calibration set     before     after    change [95 % interval]\nnll ")
    stem = "pictures/perturbed"
    expected = [f"{stem}-reliability.png", f"{stem}-perturbation.png", "temperature-reliability.png"]
    assert re.findall("drawn: (.*)", shown) == expected
    assert all(Path(path).stat().st_size > 5_000 for path in expected)


def printed(capsys, *args: str) -> str:
    capsys.readouterr()
    with pytest.raises(SystemExit) as ended:
        main([*args, "--print_config"])
    assert ended.value.code == 0
    return capsys.readouterr().out


@pytest.mark.slow
@pytest.mark.parametrize("command", [["fit"], ["calibrate", "--ckpt_path=a.ckpt", "--save_to=b.ckpt"]])
def test_a_printed_config_is_the_same_run(command, here, capsys):
    options = ["--calibration.grids=[1,2]", "--calibration.output_maps=[bias]", "--calibration.batch_keys=[[0,1],2]"]
    options.append("--calibration.views=[hflip]")
    first = printed(capsys, *command, "--config", f"{CONFIGS}/digits.yaml", *options, "--model.width=3")
    Path("mine.yaml").write_text(first)
    assert printed(capsys, command[0], "--config=mine.yaml") == first
    config = yaml.safe_load(first)
    assert type(config["seed_everything"]) is int
    assert config["calibration"]["grids"] == [1, 2]
    assert config["calibration"]["batch_keys"] == [[0, 1], 2]
    assert config["calibration"]["views"] == ["hflip"]
    assert config["model"]["init_args"]["width"] == 3


@pytest.mark.slow
def test_a_saved_config_serves_again(trained, checkpoint, recorded, here, capsys):
    saved = trained / "tensorboard" / "version_0" / "config.yaml"
    again = printed(capsys, "fit", "--config", str(saved))
    assert yaml.safe_load(again) == yaml.safe_load(saved.read_text())
    main(["calibrate", "--config", str(saved), "--ckpt_path", checkpoint])
    assert recorded[0][3].hparams["n_calibration"] == 300


@pytest.mark.slow
def test_a_config_that_is_there_is_not_overwritten(here):
    here_and_now = {"save_dir": ".", "name": "", "version": ""}
    logger = {"class_path": "lightning.pytorch.loggers.TensorBoardLogger", "init_args": here_and_now}
    Path("config.yaml").write_text(yaml.safe_dump({"trainer": {"logger": logger}}))
    before = Path("config.yaml").read_text()
    command = ["validate", "--model=tests.test_cli.OwnData", *QUIET, "--trainer.accelerator=cpu"]
    for _ in range(2):
        main([*command, "--config=config.yaml"])
    assert Path("config.yaml").read_text() == before
    assert yaml.safe_load(Path("config-2.yaml").read_text())["model"]["class_path"] == "tests.test_cli.OwnData"
    assert len(list(Path().glob("config*.yaml"))) == 3


def test_without_a_logger_no_config_is_saved(here):
    main(["validate", "--model=tests.test_cli.OwnData", *PLAIN])
    assert not list(Path().glob("*.yaml"))


def test_command_lines_know_every_setting_and_option():
    parser = ArgumentParser()
    known = {name.removeprefix("it.") for name in parser.add_class_arguments(NeuralClamping, "it", fail_untyped=False)}
    assert {*names_of(Spec), *names_of(ClampOptions), *names_of(PublishedOptions)} <= known


def test_ones_own_command_line_sets_the_options(here):
    config = Path("own.yaml")
    config.write_text(yaml_blocks()["trainer.callbacks"])
    run = LightningCLI(
        Validating, run=False, args=["--config=own.yaml", *PLAIN], save_config_callback=None, seed_everything_default=0
    )
    (clamping,) = (callback for callback in run.trainer.callbacks if isinstance(callback, NeuralClamping))
    assert clamping.plan.options == ClampOptions(grids=[1, 2], output_maps=["temperature"])
    published = {
        "method": "published",
        "epochs": 3,
        "gamma": None,
        "augmentation": "torch.nn.Identity",
        "initial": "data-driven",
    }
    own = {"class_path": "lightning_clamp.NeuralClamping", "init_args": {**published, "batch_keys": [["a", "b"], 1]}}
    config.write_text(yaml.safe_dump({"trainer": {"callbacks": [own]}}))
    run = LightningCLI(
        Validating, run=False, args=["--config=own.yaml", *PLAIN], save_config_callback=None, seed_everything_default=0
    )
    (clamping,) = (callback for callback in run.trainer.callbacks if isinstance(callback, NeuralClamping))
    options = clamping.plan.options
    assert isinstance(options.augmentation, torch.nn.Identity)
    assert options == PublishedOptions(3, gamma=None, initial="data-driven", augmentation=options.augmentation)
    assert clamping.plan.spec.batch_keys == (["a", "b"], 1)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("args", "sentence"),
    [
        ([], "expected .subcommand. to be one of {fit,validate,test,predict,calibrate,"),
        (["fit", "--model=nowhere.Net"], "nowhere"),
        (["fit", *OURS, "--optoin=3"], "(?i)unrecognized arguments: --optoin=3"),
        (["fit", *OURS, "--calibration.epochs=3"], '`epochs` is an option of method="published"'),
        (["fit", *OURS, "--calibration.max_passes=0"], "--calibration: `max_passes` must be a whole number"),
        (["fit", *OURS, "--trainer.callbacks=lightning_clamp.NeuralClamping"], "NeuralClamping is attached already"),
        (["test", *OURS, "--ckpt_path=nowhere.ckpt"], "There is no checkpoint 'nowhere.ckpt'"),
        (["check", *OURS, "--ckpt_path=plain.ckpt"], "`check` needs --data"),
        (["calibrate", *OURS], "ckpt_path.* required|required.*ckpt_path"),
        (["calibrate", *OURS, "--ckpt_path=best"], "'best' cannot be read: No such file"),
        (["calibrate", *OURS, "--ckpt_path=objects.ckpt"], "'objects.ckpt' is damaged, or no checkpoint"),
        (["calibrate", *OURS, "--ckpt_path=tensor.ckpt"], "'tensor.ckpt' is no checkpoint of Lightning"),
        (["calibrate", *DIGITS, "--ckpt_path=plain.ckpt"], "'plain.ckpt' is no checkpoint of this DigitsClassifier"),
        (["calibrate", *OURS, "--ckpt_path=plain.ckpt"], "There is no calibration set: give .* a `calibration_"),
        (["calibrate", *OURS, "--ckpt_path=plain.ckpt", "--calibration.perturb_at=nett"], "no submodule 'nett'"),
        (["fit", *OURS, "--calibration.cache_bytes=-1"], "--calibration: `cache_bytes` must be a whole number"),
        (["fit", *WITH_DATA, "--calibration.perturb_at=nett"], "no submodule 'nett' to perturb at: did you mean 'net'"),
        (["fit", *WITH_DATA, "--calibration.save_to=text.ckpt/x.ckpt"], "cannot be saved as 'text.ckpt/x.ckpt', for"),
        (["fit", *WITH_DATA, "--calibration.method=published", *TWO], 'method="published" takes a step .*one device'),
        (["calibrate", *OURS, "--ckpt_path=plain.ckpt", "--save_to=text.ckpt/x.ckpt"], "cannot be saved as"),
        (["calibrate", *OURS, "--ckpt_path=plain.ckpt", "--calibration.method=published", *TWO], "on one device"),
        (["fit", *OURS, "--ckpt_path=weights.ckpt"], "'weights.ckpt' is a model without its training"),
        (["report", "nowhere.ckpt"], "'nowhere.ckpt' cannot be read: No such file"),
        (["report", "plain.ckpt"], "'plain.ckpt' holds no clamp"),
        (["report", "text.ckpt"], "'text.ckpt' is damaged"),
        (["--config=empty.yaml", "report", "plain.ckpt"], "`report` takes no options before it"),
    ],
)  # fmt: skip
def test_who_errs_is_told_so_in_a_sentence(args, sentence, here, capsys):
    Path("text.ckpt").write_text("no checkpoint")
    Path("empty.yaml").write_text("{}")
    torch.save(Path("objects"), "objects.ckpt")
    torch.save(torch.zeros(3), "tensor.ckpt")
    torch.save({"state_dict": {}}, "weights.ckpt")
    if any("plain.ckpt" in arg for arg in args):
        plain_checkpoint()
    quiet = PLAIN if args[:1] in (["fit"], ["test"], ["calibrate"]) else []
    with pytest.raises(SystemExit) as ended:
        main([*args, *quiet])
    assert ended.value.code == 2
    shown = capsys.readouterr().err
    assert re.search(sentence, shown), shown
    assert len(shown.splitlines()) < 25


def test_without_jsonargparse_one_is_told_how_to_get_it(monkeypatch, capsys):
    monkeypatch.setattr("lightning_clamp.cli.command.RequirementCache", lambda _: False)
    with pytest.raises(SystemExit) as ended:
        main(["report", "x.ckpt"])
    assert ended.value.code == 2
    assert 'pip install "lightning-clamp[cli]"' in capsys.readouterr().err


def test_report_imports_nothing_from_beside_the_checkpoint(here, capsys):
    with pytest.raises(SystemExit):
        main(["report", "nowhere.ckpt"])
    assert str(here) not in sys.path
    with pytest.raises(SystemExit):
        main(["fit", "--help"])
    # Behind all that is installed.
    assert sys.path[-1] == str(here)


def test_a_fit_that_promised_a_calibrated_model_and_has_none_ends_with_an_error(here, capsys):
    with pytest.warns(UserWarning, match="NeuralClamping") as caught, pytest.raises(SystemExit) as ended:
        main(["fit", *WITH_DATA, *PLAIN, "--calibration.task=binary"])
    assert any("tried the network before training" in str(one.message) for one in caught)
    assert ended.value.code == 2
    assert "error: This fit has ended without a calibrated model" in capsys.readouterr().err


@pytest.mark.slow
def test_sigterm_ends_a_calibration_with_its_code(here):
    plain_checkpoint()
    command = ["calibrate", "--model=tests.test_cli.Told", "--ckpt_path=plain.ckpt", *PLAIN]
    with pytest.raises(SystemExit) as ended:
        main(command)
    assert ended.value.code == 143


def test_modules_are_found_in_the_working_directory(here, capsys):
    Path("mine.py").write_text("from tests.scenarios import LitClassifier\n\n\nclass Net(LitClassifier):\n    pass\n")
    assert yaml.safe_load(printed(capsys, "fit", "--model=mine.Net"))["model"]["class_path"] == "mine.Net"


def test_all_commands_are_listed(here, capsys):
    with pytest.raises(SystemExit) as ended:
        main(["--help"])
    assert ended.value.code == 0
    assert "{fit,validate,test,predict,calibrate,check,report}" in capsys.readouterr().out


@pytest.mark.slow
def test_two_processes_calibrate_like_one(two_processes, here):
    process, folder = two_processes
    assert process.wait(timeout=300) == 0, (folder / "shown").read_text()
    checkpoints = folder / "digits" / "ddp-checkpoints"
    (both,) = checkpoints.glob("*-calibrated.ckpt")
    (path,) = set(checkpoints.glob("*.ckpt")) - {both}
    main(["calibrate", "--config", f"{CONFIGS}/digits.yaml", "--ckpt_path", str(path), "--save_to=one.ckpt", *SMALL])
    first, second = (read_result(saved) for saved in (both, "one.ckpt"))
    assert first.n_samples == second.n_samples == 200
    torch.testing.assert_close(first.clamp.state_dict(), second.clamp.state_dict(), rtol=1e-3, atol=1e-4)


# The page


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", (ROOT / "docs" / "cli.md").read_text(), flags=re.DOTALL)


def yaml_blocks() -> dict[str, str]:
    """By what they are about: the first two keys."""
    found = {}
    for block in blocks("yaml"):
        ((key, value), *_) = yaml.safe_load(block).items()
        found[f"{key}.{next(iter(value))}"] = block
    return found


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:NeuralClamping has calibrated nothing yet")
def test_the_page_runs(here, capsys):
    commands = "".join(block for block in blocks("bash") if block.startswith("lightning-clamp")).splitlines()
    assert len(commands) >= 5
    for command in commands:
        args, _, file = command.partition(" > ")
        if file:
            Path(file).write_text(printed(capsys, *shlex.split(args.removesuffix("--print_config"))[1:]))
        else:
            main(shlex.split(args)[1:])
    assert Path("digits/plain-calibrated-reliability.png").exists()
    assert yaml.safe_load(Path("mine.yaml").read_text())["calibration"]["method"] == "temperature"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("command", "content"),
    [
        *(("report", content) for content in (b"a: 1\n", b"a,b\n1,2\n", b"some text", b"", b"IKGLVS", None)),
        *((command, content) for command in ("calibrate", "test") for content in (b"some text", None)),
    ],
)
def test_a_wrong_file_costs_one_sentence(command, content, here, capsys):
    path = here / "wrong.ckpt"
    path.mkdir() if content is None else path.write_bytes(content)
    given = [str(path)] if command == "report" else [*OURS, *PLAIN, "--ckpt_path", str(path)]
    with pytest.raises(SystemExit) as ended:
        main([command, *given])
    assert ended.value.code == 2
    said = capsys.readouterr().err.splitlines()
    assert re.search(r"error: '.*wrong.ckpt' is (damaged, or no checkpoint|a folder: pass the file)", said[-1]), said
