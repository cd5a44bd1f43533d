"""Residual networks of other libraries, with random weights: each works whole. Not dependencies: skipped where missing.

The table of docs/other-libraries.md is what these tests and their refusals say.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping

import pytest
import torch
from torch import nn

from regulate import NoBlocksError, plan, regulate, unregulate
from regulate.testing import perturb, verify_pair

pytestmark = pytest.mark.slow


def flat(outputs):
    """Outputs as tuples: the libraries' own classes are mappings of names to tensors."""
    return tuple(flat(v) for v in outputs.values()) if isinstance(outputs, Mapping) else outputs


class Flat(nn.Module):
    """A network as one that takes a tuple of arguments and returns tuples."""

    def __init__(self, model, kwargs):
        super().__init__()
        self.model, self.kwargs = model, kwargs

    def forward(self, *args):
        return flat(self.model(*args, **self.kwargs))


def works_whole(model, *args, blocks, kwargs=None, **options):
    """Identity at the start, gradients of every new weight, the original network back."""
    kwargs = kwargs or {}
    perturb(Flat(model, kwargs), [args, tuple(a.flip(0) if torch.is_tensor(a) and a.dim() else a for a in args)])
    model.eval()
    assert len(plan(model, **options).blocks) == blocks
    keys = list(model.state_dict())
    regulated = regulate(copy.deepcopy(model), inplace=True, **options)
    assert type(model).__name__ == type(regulated).__name__
    assert [key for key in regulated.state_dict() if ".regulator." not in key] == keys
    back = unregulate(copy.deepcopy(regulated))
    with torch.no_grad():
        outputs = [Flat(m, kwargs)(*args) for m in (model, back)]
    assert all(torch.equal(a, b) for a, b in zip(*(torch.utils._pytree.tree_leaves(o) for o in outputs), strict=True))
    verdict = verify_pair(Flat(model, kwargs), Flat(regulated, kwargs), args, blocks)
    assert verdict.lost == ()
    assert verdict.eval_error < 1e-5


X = torch.randn(4, 3, 64, 64, generator=torch.Generator().manual_seed(1))
SMALL = {"embedding_size": 16, "hidden_sizes": [16, 32, 64, 64], "depths": [2, 2, 3, 2], "num_labels": 5}


@pytest.mark.parametrize("family", ["ResNet", "RegNet", "Bit"])
@pytest.mark.parametrize("head", ["ForImageClassification", "Model", "Backbone"])
def test_transformers(family, head):
    transformers = pytest.importorskip("transformers")
    if not hasattr(transformers, family + head):
        pytest.skip(f"transformers {transformers.__version__} has no {family}{head}")
    config = getattr(transformers, f"{family}Config")(**SMALL)
    if head == "Backbone":
        config.out_features = ["stage2", "stage4"]
    if family == "RegNet":
        config.groups_width = 16
    if family == "Bit":  # norms of 32 groups
        config.embedding_size, config.hidden_sizes = 32, [128, 128, 256, 256]
    works_whole(getattr(transformers, family + head)(config), X, blocks=9, input_size=64)


@pytest.mark.parametrize("name", ["resnet20_cifar10", "preresnet20_cifar10", "seresnet20_cifar10"])
@pytest.mark.parametrize("options", [{}, {"input_size": 32}])
def test_pytorchcv(name, options):
    model = pytest.importorskip("pytorchcv.model_provider").get_model(name)
    works_whole(model, X[..., :32, :32], blocks=9, **options)


def test_pytorchcv_borders():
    """Padding in front of convolutions."""
    works_whole(pytest.importorskip("pytorchcv.model_provider").get_model("efficientnet_b0b"), X, blocks=7)


def test_pytorchcv_nothing():
    """Convolutions that return a map and None."""
    model = pytest.importorskip("pytorchcv.model_provider").get_model("octresnet50b_ad2")
    assert len(plan(model).blocks) == 2


def test_pretrainedmodels():
    """Its size ends in the channels, and it runs on no other one."""
    kind = pytest.importorskip("pretrainedmodels.models.inceptionresnetv2").InceptionResNetV2
    found = plan(kind(num_classes=5))
    assert found.input_size == (3, 299, 299)
    assert len(found.blocks) == 40


def test_open_clip():
    kind = pytest.importorskip("open_clip.modified_resnet").ModifiedResNet
    model = kind([2, 2, 3, 2], 32, 4, image_size=64, width=16)
    assert plan(model).input_size == (3, 64, 64)
    works_whole(model, X, blocks=9)


@pytest.mark.parametrize("block", ["basic", "bottleneck"])
def test_monai(block):
    kind = pytest.importorskip("monai.networks.nets").ResNet
    model = kind(block, [2, 2, 2, 2], [8, 16, 16, 16], spatial_dims=3, n_input_channels=1, num_classes=5)
    volume = X[:, :1, :24, :24, None].expand(4, 1, 24, 24, 16).contiguous()
    works_whole(model, volume, blocks=8, input_size=(1, 24, 24, 16))


def test_monai_as_tensor():
    """Blocks that call torch.as_tensor on what they put out."""
    kind = pytest.importorskip("monai.networks.nets").HighResNet
    volume = X[:, :1, :24, :24, None].expand(4, 1, 24, 24, 16).contiguous()
    works_whole(kind(spatial_dims=3, out_channels=2), volume, blocks=9, example_inputs=volume)


def test_monai_borders():
    kind = pytest.importorskip("monai.networks.nets").EfficientNetBN
    works_whole(kind("efficientnet-b0", pretrained=False, num_classes=5), X, blocks=7)


def unet(diffusers):
    sides = {"down": ("DownBlock2D", "AttnDownBlock2D"), "up": ("AttnUpBlock2D", "UpBlock2D")}
    return diffusers.UNet2DModel(
        sample_size=32,
        block_out_channels=(32, 64),
        norm_num_groups=8,
        down_block_types=sides["down"],
        up_block_types=sides["up"],
    )


def test_diffusers():
    model = unet(pytest.importorskip("diffusers"))
    example = (X[..., :32, :32], torch.tensor([1, 2, 3, 4]))
    works_whole(model, *example, blocks=12, example_inputs=example)


def test_diffusers_without_example_inputs():
    with pytest.raises(
        NoBlocksError, match=r"UNet2DModel: its forward needs timestep beside sample; give example_inputs="
    ):
        regulate(unet(pytest.importorskip("diffusers")))


def test_ultralytics():
    """A list of chunks that grows block by block."""
    tasks = pytest.importorskip("ultralytics.nn.tasks")
    works_whole(tasks.ClassificationModel("yolov8n-cls.yaml", verbose=False), X, blocks=4)


def test_denoising_diffusion():
    """Blocks behind code that unpacks shapes, through einops as well."""
    kind = pytest.importorskip("denoising_diffusion_pytorch").Unet
    example = (X[..., :32, :32], torch.tensor([1, 2, 3, 4]))
    works_whole(kind(dim=16, dim_mults=(1, 2)), *example, blocks=11, example_inputs=example)
