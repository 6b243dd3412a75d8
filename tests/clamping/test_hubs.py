"""Networks that are not ours: HuggingFace's token models, timm's and torchvision's classifiers and segmentation."""

import pytest
import timm
import torch
import torchvision
from lightning.pytorch import LightningModule
from torch import nn
from torch.utils.data import DataLoader
from transformers import BertConfig, BertForSequenceClassification

from lightning_clamp import CalibrationModule, NeuralClamping, fit_clamp
from lightning_clamp._batch import logits_of, with_logits
from tests.scenarios import batches, sampled, trainer


class LitBert(LightningModule):
    """As HuggingFace's users have it: batches are the model's arguments, and so are the labels."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        config = BertConfig(
            vocab_size=50,
            hidden_size=8,
            num_hidden_layers=1,
            num_attention_heads=2,
            intermediate_size=16,
            initializer_range=0.6,
            num_labels=3,
        )
        self.bert = BertForSequenceClassification(config)
        with torch.no_grad():
            self.bert.classifier.weight.mul_(3)

    def forward(self, **batch):
        return self.bert(**batch)

    def training_step(self, batch, batch_idx):
        return self(**batch).loss

    def test_step(self, batch, batch_idx):
        self.log("nll", nn.functional.cross_entropy(self(**batch).logits, batch["labels"]))

    def predict_step(self, batch, batch_idx):
        return self(**batch).logits

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.0)


def sentences(n: int, seed: int) -> DataLoader:
    """Batches of 50 with padding, and labels for which the model is twice too sure and its embeddings are shifted."""
    truth, generator = LitBert().eval(), torch.Generator().manual_seed(seed)
    truth.bert.bert.encoder.register_forward_pre_hook(lambda _, args: (args[0] + torch.linspace(-1, 1, 8), *args[1:]))
    found = []
    for part in range(0, n, 50):
        tokens = torch.randint(1, 50, (50, 12), generator=generator)
        mask = (torch.arange(12) < torch.randint(4, 13, (50, 1), generator=generator)).long()
        with torch.no_grad():
            logits = truth(input_ids=tokens, attention_mask=mask).logits
        found.append({"input_ids": tokens, "attention_mask": mask, "labels": sampled(logits.double() / 2, seed + part)})
    return DataLoader(found, batch_size=None)


@pytest.mark.slow
def test_a_huggingface_model_is_clamped_at_its_embeddings(tmp_path):
    options = {"batch_keys": (["input_ids", "attention_mask"], "labels"), "perturb_at": "bert.bert.encoder"}
    held_out, test = sentences(1500, 1), sentences(1000, 2)
    callback = NeuralClamping(held_out, **options, save_to=tmp_path, output_maps=("temperature",))
    run, model = trainer(tmp_path, callback), LitBert()
    (before,) = trainer(tmp_path).test(model, test, verbose=False)
    run.fit(model, sentences(50, 3))
    assert callback.result.clamp.perturbation.shape == (8,)
    with pytest.warns(UserWarning, match="LitBert returns a loss beside its logits"):
        (after,) = run.test(model, test, verbose=False)
    assert after["nll"] < before["nll"] - 0.05
    module = CalibrationModule.from_checkpoint(callback.checkpoint_path, LitBert)
    (own,) = run.test(module, test, verbose=False)
    assert own["calibrated/nll"] == pytest.approx(after["nll"], abs=1e-5)
    with pytest.warns(UserWarning, match="LitBert returns a loss beside its logits"):
        predicted = run.predict(model, test)
    torch.testing.assert_close(run.predict(module, test), predicted)


class Amplified(nn.Module):
    """The logits of a network that has not been trained, which says next to nothing, made larger; the rest kept."""

    def __init__(self, network: nn.Module, x: torch.Tensor) -> None:
        super().__init__()
        self.network = network.eval()
        with torch.no_grad():
            logits = logits_of(network(x))
        self.mean, self.spread = logits.mean(0), logits.std(0).mean()

    def forward(self, x):
        output = self.network(x)
        return with_logits(output, 4 * (logits_of(output) - self.mean) / self.spread)


@pytest.mark.slow
@pytest.mark.parametrize(
    "make",
    [
        lambda: timm.create_model("test_resnet.r160_in1k", num_classes=4),
        lambda: timm.create_model("test_vit.r160_in1k", num_classes=4, img_size=32),
        lambda: torchvision.models.resnet18(num_classes=4),
        lambda: torchvision.models.segmentation.lraspp_mobilenet_v3_large(weights_backbone=None, num_classes=4),
    ],
    ids=["timm resnet", "timm vit", "torchvision", "torchvision segmentation"],
)
def test_networks_of_the_hubs_are_calibrated_out_of_the_box(make):
    torch.manual_seed(0)
    x = torch.randn(300, 3, 32, 32)
    network = Amplified(make(), x)
    with torch.no_grad():
        logits = logits_of(network(x))
    target = sampled(logits.double() / 2)
    result = fit_clamp(network, batches(x, target, 100), grids=(), output_maps=("temperature",))
    assert float(result.clamp.temperature) == pytest.approx(2, rel=0.25)
    module = CalibrationModule(network, result.clamp)
    assert nn.functional.cross_entropy(module(x), target) == pytest.approx(result.after["nll"], abs=1e-4)
