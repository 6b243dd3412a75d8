import errno
import os
import threading
import time

import pytest
import torch
from lightning.fabric.utilities.cloud_io import get_filesystem

from lightning_clamp import CalibrationModule, NeuralClamping
from lightning_clamp._files import read_safely, write_atomically
from tests.scenarios import LitClassifier, images, loader, train_loader, trainer


def names(folder):
    return sorted(path.name for path in folder.iterdir())


@pytest.mark.slow
def test_two_writers_and_a_reader_on_one_path_see_whole_files_only(tmp_path):
    path, failed = tmp_path / "it.pt", []
    write_atomically(torch.zeros(2000), path)

    def write(value):
        try:
            for _ in range(100):
                write_atomically(torch.full((2000,), value), path)
        except Exception as error:  # noqa: BLE001 - a thread has nobody to raise it to
            failed.append(error)

    writers = [threading.Thread(target=write, args=(value,)) for value in (1.0, 2.0)]
    for writer in writers:
        writer.start()
    reads = 0
    while any(writer.is_alive() for writer in writers) or reads < 100:
        content = read_safely(path)
        assert len(content) == 2000
        assert content.unique().numel() == 1
        reads += 1
    assert not failed
    assert names(tmp_path) == ["it.pt"]


def test_a_link_stays_one_and_what_it_leads_to_is_written(tmp_path):
    (tmp_path / "there").mkdir()
    (tmp_path / "link.pt").symlink_to(tmp_path / "there" / "it.pt")
    for value in (1, 2):
        write_atomically(value, tmp_path / "link.pt")
        assert (tmp_path / "link.pt").is_symlink()
        assert read_safely(tmp_path / "there" / "it.pt") == value
    assert names(tmp_path / "there") == ["it.pt"]


def test_a_link_under_a_temporary_name_is_not_followed(tmp_path, monkeypatch):
    monkeypatch.setattr("lightning_clamp._files.uuid4", lambda: type("Known", (), {"hex": "0" * 32}))
    victim = tmp_path / "victim"
    victim.write_bytes(b"mine")
    (tmp_path / f"it.pt.{'0' * 12}.tmp").symlink_to(victim)
    with pytest.raises(FileExistsError):
        write_atomically(1, tmp_path / "it.pt")
    assert victim.read_bytes() == b"mine"
    assert len(names(tmp_path)) == 2, "nor removed: it is not ours"


def test_files_have_the_rights_that_others_have(tmp_path):
    (tmp_path / "plain").touch()
    write_atomically(1, tmp_path / "it.pt")
    assert (tmp_path / "it.pt").stat().st_mode == (tmp_path / "plain").stat().st_mode


def test_what_a_killed_process_left_is_removed_a_day_later(tmp_path):
    for name, age in (("it.pt.1.tmp", 2e5), ("it.pt.2.tmp", 100), ("other.pt.1.tmp", 2e5)):
        (tmp_path / name).touch()
        os.utime(tmp_path / name, (time.time() - age,) * 2)
    write_atomically(1, tmp_path / "it.pt")
    assert names(tmp_path) == ["it.pt", "it.pt.2.tmp", "other.pt.1.tmp"]


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT, errno.EIO])
@pytest.mark.parametrize("when", ["write", "fsync"])
def test_a_full_disk_is_said_as_such(tmp_path, monkeypatch, code, when):
    """Torch's own error is one of positions in a file."""
    path = tmp_path / "it.pt"
    write_atomically("before", path)

    def fail(*_):
        raise OSError(code, os.strerror(code))

    if when == "fsync":
        monkeypatch.setattr(os, "fsync", fail)
    else:
        file = type("Full", (), {"write": fail, "flush": lambda self: None})()
        save = torch.save
        monkeypatch.setattr(torch, "save", lambda content, _: save(content, file))
    message = f"{os.strerror(code)}, so it was not saved, and what was there before is untouched: '.*it.pt'"
    with pytest.raises(OSError, match=message) as caught:
        write_atomically(torch.zeros(1000), path)
    assert caught.value.errno == code
    monkeypatch.undo()
    assert read_safely(path) == "before"
    assert names(tmp_path) == ["it.pt"]


def test_an_error_of_ones_own_stays_what_it_is(tmp_path):
    with pytest.raises((AttributeError, TypeError), match="pickle"):
        write_atomically(threading.Lock(), tmp_path / "it.pt")
    assert not names(tmp_path)


@pytest.fixture
def url():
    """A folder that is on no disk."""
    yield "memory://lightning_clamp"
    get_filesystem("memory://lightning_clamp").rm("/lightning_clamp", recursive=True)


def test_what_was_saved_to_a_url_is_read_back(url, tmp_path):
    callback = NeuralClamping(loader(200, 1), save_to=url, output_maps=("temperature",), grids=())
    model = LitClassifier(temperature=3.0)
    trainer(tmp_path, callback).fit(model, train_loader())
    path = callback.checkpoint_path
    assert path == f"{url}/epoch=0-step=2-calibrated.ckpt"
    x = images(5)
    expected = callback.calibrated_module()(x)
    assert torch.equal(CalibrationModule.from_checkpoint(path, LitClassifier)(x), expected)
    with torch.no_grad():
        model.net.linear.bias += 1
    assert torch.equal(callback.calibrated_module()(x), expected), "from the file"
    fresh = NeuralClamping()
    trainer(tmp_path, fresh).test(LitClassifier(), loader(10, 3), ckpt_path=path, weights_only=True, verbose=False)
    assert fresh.result.clamp.temperature == callback.result.clamp.temperature
    with pytest.raises(FileNotFoundError):
        CalibrationModule.from_checkpoint(f"{url}/nothing.ckpt", LitClassifier)
