"""Patched models in the company of PyTorch's other features, and of the libraries that train models."""

from __future__ import annotations

import copy
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn, update_bn
from torch.utils.checkpoint import checkpoint_sequential
from trained import CLASSES, check_training, images, small_resnet, steps

import fusedres
from fusedres.testing import assert_within_budget
from fusedres.vision import import_with_torchvision


def patched_with_stock(training: bool = False) -> tuple[nn.Module, nn.Module]:
    stock = small_resnet().train(training)
    patched = copy.deepcopy(stock)
    assert fusedres.patch(patched).coverage == 1.0
    return patched, stock


def agrees(ours: Tensor, stock: nn.Module, x: Tensor) -> None:
    """The output within its budget; ``stock`` is the model in stock PyTorch."""
    with torch.no_grad():
        exact = copy.deepcopy(stock).double()(x.double())
        assert_within_budget(ours.detach(), stock(x), exact)


# ---------------------------------------------------------------------------------------------------------------------
# Activation checkpointing
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("reentrant", [True, False])
def test_activation_checkpoints_in_training(reentrant):
    """The second forward of a checkpoint updates the running statistics once more, in stock PyTorch too."""

    def forward(model: nn.Module, x: Tensor) -> Tensor:
        stages = nn.Sequential(*list(model.children())[:-1])
        return model.fc(checkpoint_sequential(stages, 2, x.requires_grad_(), use_reentrant=reentrant).flatten(1))

    check_training(partial(steps, forward=forward))


# ---------------------------------------------------------------------------------------------------------------------
# torch.func
# ---------------------------------------------------------------------------------------------------------------------


def test_functional_call_in_training():
    """With parameters from outside, which stay what they are, and gradients to them."""
    patched, stock = patched_with_stock(training=True)
    x, y = images(0)
    found = []
    for model, dtype in ((patched, torch.float32), (stock, torch.float32), (copy.deepcopy(stock), torch.float64)):
        model.to(dtype)
        outside = {name: p.detach().clone().mul_(0.9).requires_grad_() for name, p in model.named_parameters()}
        loss = nn.functional.cross_entropy(torch.func.functional_call(model, outside, (x.to(dtype),)), y)
        found.append(torch.autograd.grad(loss, list(outside.values())))
        assert all(p.grad is None for p in model.parameters())
    for ours, theirs, exact in zip(*found):
        assert_within_budget(ours, theirs, exact)


def test_an_ensemble_under_vmap():
    models = [small_resnet(seed).eval() for seed in range(3)]
    patched = copy.deepcopy(models)
    for model in patched:
        fusedres.patch(model)
    parameters, buffers = torch.func.stack_module_state(patched)
    skeleton = copy.deepcopy(patched[0]).to("meta")
    x = images(0)[0]

    def call(parameters: dict[str, Tensor], buffers: dict[str, Tensor]) -> Tensor:
        return torch.func.functional_call(skeleton, (parameters, buffers), (x,))

    for out, model in zip(torch.vmap(call)(parameters, buffers), models):
        torch.testing.assert_close(out, model(x), rtol=1e-4, atol=1e-4)


def test_second_derivatives_name_the_way_out():
    patched, stock = patched_with_stock()
    x = images(0)[0].requires_grad_()

    def penalty(model: nn.Module) -> Tensor:
        (grad,) = torch.autograd.grad(model(x).sum(), x, create_graph=True)
        return grad.square().sum()

    with pytest.raises(RuntimeError, match=r"differentiable once.*use_backend\('stock'\)"):
        penalty(patched)
    with fusedres.use_backend("stock"):
        ours = torch.autograd.grad(penalty(patched), patched.conv1.weight)[0]
    torch.testing.assert_close(ours, torch.autograd.grad(penalty(stock), stock.conv1.weight)[0], rtol=1e-3, atol=1e-4)


# ---------------------------------------------------------------------------------------------------------------------
# Averages of weights
# ---------------------------------------------------------------------------------------------------------------------


def fused_sites(model: nn.Module) -> int:
    return fusedres.unpatch(copy.deepcopy(model))


def average_by_torch(model: nn.Module, seed: int) -> nn.Module:
    average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.5))
    assert fused_sites(average) == fused_sites(model)
    steps(model, seed)
    average.update_parameters(model)
    steps(model, seed + 1)
    average.update_parameters(model)
    update_bn([images(seed, next(model.parameters()).dtype)[0]], average)
    return average


def average_by_timm(model: nn.Module, seed: int) -> nn.Module:
    average = import_with_torchvision("timm.utils").ModelEmaV3(model, decay=0.5)
    assert fused_sites(average) == fused_sites(model)
    steps(model, seed)
    average.update(model)
    return average.module


@pytest.mark.parametrize("fit", [average_by_torch, average_by_timm])
def test_averaged_weights(fit):
    if fit is average_by_timm:
        pytest.importorskip("timm.version", exc_type=(ImportError, RuntimeError))
    check_training(fit)


def test_averaged_weights_reach_folded_ones():
    """An average that has been called, its weights folded, is called again after an update."""
    patched, stock = patched_with_stock()
    average = AveragedModel(patched, multi_avg_fn=get_ema_multi_avg_fn(0.5)).eval()
    x = images(0)[0]
    with torch.no_grad():
        average(x)
        for model in (patched, stock):
            for p in model.parameters():
                p.mul_(0.5)
        average.update_parameters(patched)  # the first is a copy
        agrees(average(x), stock, x)


# ---------------------------------------------------------------------------------------------------------------------
# Rewriting
# ---------------------------------------------------------------------------------------------------------------------


def test_convolutions_fused_with_their_norms_by_torch():
    patched, stock = patched_with_stock()
    for model in (patched, stock):
        block = model.layer1[0]
        block.conv1, block.bn1 = nn.utils.fusion.fuse_conv_bn_eval(block.conv1, block.bn1), nn.Identity()
    x = images(0)[0]
    with torch.no_grad():
        agrees(patched(x), stock, x)


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")
def test_quantisation_of_an_unpatched_copy():
    quantize_fx = pytest.importorskip("torch.ao.quantization.quantize_fx")
    patched, stock = patched_with_stock()
    copied = copy.deepcopy(patched)
    assert fusedres.unpatch(copied) > 0
    mapping = torch.ao.quantization.get_default_qconfig_mapping("x86")
    x, found = images(0)[0], []
    for model in (copied, stock):
        prepared = quantize_fx.prepare_fx(model, mapping, (x,))
        prepared(x)
        found.append(quantize_fx.convert_fx(prepared)(x))
    assert torch.equal(*found)
    assert fused_sites(patched) > 0


# ---------------------------------------------------------------------------------------------------------------------
# Trainers
# ---------------------------------------------------------------------------------------------------------------------


class Samples(torch.utils.data.Dataset):
    """Images and classes, as a trainer's data."""

    def __init__(self, seed: int, dtype: torch.dtype, names: tuple[str, str] | None = None) -> None:
        self.x, self.y = images(seed, dtype, 8)
        self.names = names

    def __len__(self) -> int:
        return len(self.x)

    def __getitem__(self, i: int) -> tuple | dict:
        sample = self.x[i], self.y[i]
        return sample if self.names is None else dict(zip(self.names, sample))


@pytest.mark.filterwarnings("ignore")
def test_lightning():
    lightning = pytest.importorskip("pytorch_lightning", exc_type=(ImportError, RuntimeError))

    class Task(lightning.LightningModule):
        def __init__(self, model: nn.Module) -> None:
            super().__init__()
            self.model = model

        def training_step(self, batch: list[Tensor], index: int) -> Tensor:
            return nn.functional.cross_entropy(self.model(batch[0]), batch[1])

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.SGD(self.parameters(), 0.01)

    quiet = dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False)

    def fit(model: nn.Module, seed: int) -> None:
        sites = fused_sites(model)
        data = torch.utils.data.DataLoader(Samples(seed, next(model.parameters()).dtype), 4)
        lightning.Trainer(max_epochs=1, accelerator="cpu", devices=1, **quiet).fit(Task(model), data)
        assert fused_sites(model) == sites

    check_training(fit)


@pytest.mark.filterwarnings("ignore")
def test_hugging_face(tmp_path: Path):
    transformers = pytest.importorskip("transformers")

    def build(seed: int) -> nn.Module:
        torch.manual_seed(seed)
        config = transformers.ResNetConfig(
            embedding_size=16, hidden_sizes=[32, 64], depths=[1, 1], layer_type="bottleneck", num_labels=CLASSES
        )
        return transformers.ResNetForImageClassification(config)

    def fit(model: nn.Module, seed: int) -> None:
        options = {"max_steps": 2, "per_device_train_batch_size": 4, "optim": "sgd", "learning_rate": 0.01}
        quiet = {"report_to": [], "save_strategy": "no", "disable_tqdm": True, "use_cpu": True}
        data = Samples(seed, next(model.parameters()).dtype, ("pixel_values", "labels"))
        arguments = transformers.TrainingArguments(str(tmp_path), seed=seed, **options, **quiet)
        transformers.Trainer(model, arguments, train_dataset=data).train()

    check_training(fit, build)
