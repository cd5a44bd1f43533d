"""The parts of timm's training script train a regulated network, save it and resume."""

from __future__ import annotations

import pytest
import torch
from timm.data import Mixup
from timm.loss import SoftTargetCrossEntropy
from timm.models import resume_checkpoint
from timm.optim import create_optimizer_v2
from timm.utils import CheckpointSaver, ModelEmaV3

from regulate.rewrite.guard import regulators

from .regulated import build, out

pytestmark = pytest.mark.slow


def test_the_parts_of_timms_training_script(tmp_path, original):
    """Optimizer with layer decay, EMA, mixup, checkpointing by block; saved, resumed, validated from the average."""
    options = {"cell": "gru", "num_classes": 3, "drop_path_rate": 0.1}
    model = build(pretrained=True, pretrained_cfg_overlay={"file": original, "num_classes": -1}, **options).train()
    model.set_grad_checkpointing(True)
    optimizer = create_optimizer_v2(model, opt="adamw", lr=1e-2, layer_decay=0.75)
    average = ModelEmaV3(model, decay=0.5)
    mixup = Mixup(mixup_alpha=0.2, num_classes=3)
    begun = next(iter(regulators(model)))[1].mix.weight.clone()
    for _ in range(3):
        images, targets = mixup(torch.randn(4, 3, 32, 32), torch.tensor([0, 1, 2, 0]))
        optimizer.zero_grad()
        SoftTargetCrossEntropy()(model(images), targets).backward()
        optimizer.step()
        average.update(model)
    assert not torch.equal(next(iter(regulators(model)))[1].mix.weight, begun)
    saver = CheckpointSaver(model, optimizer, model_ema=average, checkpoint_dir=str(tmp_path))
    saver.save_checkpoint(epoch=0, metric=1.0)
    path = str(tmp_path / "last.pth.tar")
    resumed = build(**options)
    again = create_optimizer_v2(resumed, opt="adamw", lr=1e-2, layer_decay=0.75)
    assert resume_checkpoint(resumed, path, optimizer=again) == 1
    assert torch.equal(out(resumed), out(model.eval()))
    assert len(again.state_dict()["state"]) == len(optimizer.state_dict()["state"]) > 0
    assert torch.equal(out(build(checkpoint_path=path, **options)), out(average.module.eval()))
