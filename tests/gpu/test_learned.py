"""What losses learn on an accelerator, also after a resume there. Skipped where there is none."""

import pytest
import torch
from torch.utils.data import DataLoader

from lightning_clamp.losses import AdaFocalMixin, CALSMixin, CRLMixin, Indexed
from tests.scenarios import Validating, loader, made, trainer

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]


@pytest.mark.parametrize("mixin", [CRLMixin, AdaFocalMixin, CALSMixin])
def test_the_same_is_learned_on_the_device_and_after_a_resume(mixin, tmp_path, monkeypatch):
    # Its rounding may change which class is predicted.
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    options = {"cals_margin": 1.0} if mixin is CALSMixin else {}
    data, val_data = DataLoader(Indexed(loader(60, 20).dataset), batch_size=20), loader(100, 40)
    found = {}
    for accelerator in ("cpu", "cuda"):
        for epochs in (2, 3):
            torch.manual_seed(0)
            model = made(mixin, Validating, lr=0.01, **options)
            run = trainer(tmp_path, max_epochs=epochs, accelerator=accelerator, devices=1)
            run.fit(model, data, val_data, ckpt_path=None if epochs == 2 else tmp_path / "half.ckpt")
            run.save_checkpoint(tmp_path / "half.ckpt")
        found[accelerator] = {key: value.cpu() for key, value in model.calibrated_loss_state().items()}
    torch.testing.assert_close(found["cuda"], found["cpu"], rtol=1e-3, atol=1e-3)
