"""What importing costs, and that every public name is there."""

import subprocess
import sys

import pytest

import lightning_clamp
from lightning_clamp import losses, sharpness

HEAVY = ("torchvision", "matplotlib", "tensorboard", "wandb", "sklearn", "scipy")


def modules_after(code):
    """Names of the modules that a fresh Python has once it ran ``code``."""
    command = [sys.executable, "-c", f"{code}\nimport sys; print(*sys.modules)"]
    return subprocess.check_output(command, text=True).split()


def test_importing_the_package_imports_nothing_heavy():
    assert not set(HEAVY) & set(modules_after("import lightning_clamp"))


@pytest.mark.parametrize("package", [lightning_clamp, losses, sharpness], ids=lambda package: package.__name__)
def test_every_public_name_is_there_and_others_are_not(package):
    for name in package.__all__:
        assert getattr(package, name) is not None
        assert name in dir(package)
    with pytest.raises(AttributeError, match=f"no attribute 'NeuralClamp'; it offers {package.__all__[0]}"):
        _ = package.NeuralClamp
