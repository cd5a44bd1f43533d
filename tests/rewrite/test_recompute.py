"""Gradient checkpointing by block, segment and stage: gradients, statistics, and the memory that is held."""

from __future__ import annotations

import pytest
import torch
from timm.models import checkpoint_seq
from torch import nn
from torch.profiler import ProfilerActivity, profile
from torch.utils.checkpoint import checkpoint, set_checkpoint_early_stop

from regulate import BlockCallError, regulate
from regulate.models.cifar import CifarBlock
from regulate.rewrite import recompute
from regulate.rewrite.carrier import THREADS
from regulate.rewrite.lookup import chains

from ..helpers import network, stir

pytestmark = pytest.mark.slow

BLOCKS = 6


def checkpointed(module, x):
    return checkpoint(module, x, use_reentrant=False)


def each(stage, x):
    for block in stage:
        x = checkpointed(block, x)
    return x


def segments(every):
    return lambda stage, x: checkpoint_seq(stage, x, every=every, use_reentrant=False)


WAYS = {
    "by block": each,
    "checkpoint_seq, every=1": segments(1),
    "checkpoint_seq, every=2": segments(2),
    "checkpoint_seq, every=4": segments(4),
    "the last block is not": lambda stage, x: checkpoint_seq(stage, x, skip_last=True, use_reentrant=False),
    "every other block": lambda stage, x: nn.Sequential(
        *(block if i % 2 else Checkpointed(block) for i, block in enumerate(stage))
    )(x),
    "the stage": checkpointed,
}


class Checkpointed(nn.Module):
    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, x):
        return checkpointed(self.inner, x)


class Stage(nn.Sequential):
    """A container with a flag of its own, in the way of many libraries."""

    gradient_checkpointing = False

    def forward(self, x):
        for block in self:
            x = checkpointed(block.__call__, x) if self.gradient_checkpointing and self.training else block(x)
        return x


def dropping():
    """A block with random numbers of its own, which a second run must draw again."""
    block = CifarBlock(8, 8, 1, "B", 0)
    block.se = nn.Dropout2d(0.3)
    return block


def trunk(cell="lstm", blocks=BLOCKS):
    model = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), Stage(*(dropping() for _ in range(blocks))))
    return stir(regulate(model, cell, input_size=(16, 16))).double().train()


def gradients(model, run):
    """Of all parameters and of the input, from one fixed draw of random numbers."""
    torch.manual_seed(1)
    x = torch.randn(3, 3, 16, 16, dtype=torch.float64, requires_grad=True)
    model.zero_grad()
    run(model[1], model[0](x)).square().mean().backward()
    return {"input": x.grad, **{name: p.grad for name, p in model.named_parameters()}}


def assert_equal(found, expected):
    for name, gradient in expected.items():
        assert gradient is not None, name
        assert torch.allclose(found[name], gradient, rtol=1e-10, atol=1e-12), name


@pytest.mark.parametrize("early_stop", [True, False])
@pytest.mark.parametrize("cell", ["rnn", "gru", "lstm"])
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.use("torch", "torch.utils.checkpoint and timm's checkpoint_seq around blocks, segments, stages; dropout")
def test_gradients_are_equal_in_float64_with_dropout_and_batch_statistics(way, cell, early_stop):
    model = trunk(cell)
    expected = gradients(model, lambda stage, x: stage(x))
    with set_checkpoint_early_stop(early_stop):
        found = gradients(model, WAYS[way])
    assert_equal(found, expected)
    assert all(memory.state is None for memory in THREADS.stack.memories if memory.chain in chains(model))


def test_a_containers_own_flag():
    model = trunk()
    expected = gradients(model, lambda stage, x: stage(x))
    runs = []
    model[1][0].regulator.cell.register_forward_hook(lambda *_: runs.append(1))
    model[1].gradient_checkpointing = True
    assert_equal(gradients(model, lambda stage, x: stage(x)), expected)
    assert len(runs) == 2 * BLOCKS


@pytest.mark.parametrize("way", WAYS)
def test_statistics_are_counted_as_often_as_those_of_the_blocks_own_norms(way):
    model = trunk()
    gradients(model, WAYS[way])
    counts = [int(m.num_batches_tracked) for m in model.modules() if isinstance(m, nn.BatchNorm2d)]
    for block in model[1]:
        own = {int(m.num_batches_tracked) for n, m in block.named_modules() if n in ("bn1", "bn2")}
        new = {int(m.num_batches_tracked) for m in block.regulator.modules() if isinstance(m, nn.BatchNorm2d)}
        assert new == own
    assert max(counts) == 2


@pytest.mark.parametrize("every", [1, 2])
def test_reentrant_segments_are_refused_and_the_refusal_says_what_to_do(every):
    model = trunk()

    def run(stage, x):
        return checkpoint_seq(stage, x, every=every, use_reentrant=True)

    with pytest.raises(BlockCallError, match="use_reentrant=False"):
        gradients(model, run)
    # What was refused leaves nothing behind.
    expected = gradients(model, lambda stage, x: stage(x))
    assert_equal(gradients(model, each), expected)


def test_steps_that_are_accumulated_and_a_backward_pass_that_is_run_twice():
    model = trunk()
    expected = gradients(model, lambda stage, x: 2 * stage(x))
    torch.manual_seed(1)
    x = torch.randn(3, 3, 16, 16, dtype=torch.float64, requires_grad=True)
    model.zero_grad()
    with set_checkpoint_early_stop(False):
        loss = each(model[1], model[0](x)).square().mean()
        for _ in range(4):
            loss.backward(retain_graph=True)
    assert torch.allclose(x.grad, expected["input"], rtol=1e-10, atol=1e-12)


def allocated(run):
    """Bytes on torch's CPU allocator that a call leaves in use, and the most it has in use, exactly."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
        result = run()
    steps = [e for e in seen.profiler.kineto_results.events() if e.name() == "[memory]"]
    now = most = 0
    for step in sorted(steps, key=lambda e: e.start_ns()):
        now += step.nbytes()
        most = max(most, now)
    return now, most, result


MAP = 8 * 16 * 48 * 48 * 4  # bytes of one map


def measured(model, way):
    """Maps kept between the passes, and the most that the backward pass adds to them."""
    x = torch.randn(8, 16, 48, 48, requires_grad=True)
    way(model, x).sum().backward()
    kept, _, loss = allocated(lambda: way(model, x).sum())
    _, most, _ = allocated(lambda: loss.backward())
    return kept / MAP, most / MAP


@pytest.fixture(scope="module")
def stages():
    plain = nn.Sequential(*(CifarBlock(16, 16, 1, "B", 0) for _ in range(BLOCKS))).train()
    return plain, {cell: regulate(plain, cell, example_inputs=torch.zeros(1, 16, 48, 48)) for cell in ("rnn", "lstm")}


# How many blocks a segment has, and at how many of them another segment than the first begins.
SEGMENTS = {
    "by block": (1, 5),
    "checkpoint_seq, every=1": (1, 5),
    "checkpoint_seq, every=2": (2, 2),
    "checkpoint_seq, every=4": (4, 1),
    "the stage": (6, 0),
}


@pytest.mark.parametrize("early_stop", [True, False])
@pytest.mark.parametrize("cell", ["rnn", "lstm"])
@pytest.mark.parametrize("way", SEGMENTS)
def test_a_state_is_kept_once_a_segment_and_one_segment_at_a_time_is_computed_again(stages, way, cell, early_stop):
    plain, regulated = stages
    blocks, states = SEGMENTS[way]
    maps = {"rnn": 1, "lstm": 2}[cell]
    with set_checkpoint_early_stop(early_stop):
        before, after = measured(plain, WAYS[way]), measured(regulated[cell], WAYS[way])
    kept, most = after[0] - before[0], after[1] - before[1]
    assert kept < states * maps + 0.1
    # H as the cell made it, and the map before and behind the fusion's norm; C of an LSTM. H behind its norm only where
    # another block of the segment goes on with it.
    assert most < blocks * (3 + maps) - (blocks == 1) + 0.1


class Conditioned(nn.Module):
    """Blocks that a checkpoint is given another tensor first, the same for all."""

    checkpoints = False

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.stage = nn.ModuleList(Conditional() for _ in range(8))
        self.register_buffer("shared", torch.ones(1, 8, 1, 1))

    def forward(self, x):
        x = self.stem(x)
        for block in self.stage:
            x = checkpoint(block, self.shared, x, use_reentrant=False) if self.checkpoints else block(self.shared, x)
        return x


class Conditional(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(8, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1)

    def forward(self, shared, x):
        return x + self.conv2(torch.relu(self.conv1(x) * shared))


def slopes(model, x, run):
    model.zero_grad()
    run(model, x).square().mean().backward()
    return [p.grad.clone() for p in model.parameters()]


def test_blocks_that_share_their_first_tensor():
    model = stir(regulate(Conditioned().double(), "gru"))
    x = torch.randn(2, 3, 8, 8, dtype=torch.float64)
    expected = slopes(model, x, lambda m, x: m(x))
    model.checkpoints = True
    for _ in range(10):
        model(x)
    notes = getattr(recompute._storage((model.shared,)), recompute._NOTES)
    assert len(notes) == 7 * recompute._KEPT, "each block but the first keeps its last notes, and no more"
    found = slopes(model, x, lambda m, x: m(x))
    assert all(torch.allclose(a, b) for a, b in zip(expected, found, strict=True))


def test_notes_that_are_gone_are_missed():
    model = stir(regulate(Conditioned().double(), "gru"))
    model.checkpoints = True
    first = model(torch.randn(2, 3, 8, 8, dtype=torch.float64))
    for _ in range(recompute._KEPT):
        model(torch.randn(2, 3, 8, 8, dtype=torch.float64))
    with pytest.raises(BlockCallError):
        first.sum().backward()


def test_a_checkpoint_within_a_checkpoint():
    model = stir(regulate(network("resnet18").double(), "gru"))
    x = torch.randn(2, 3, 64, 64, dtype=torch.float64)
    expected = slopes(model, x, lambda m, x: m(x))
    model.set_grad_checkpointing()
    assert model.grad_checkpointing
    for run in (lambda m, x: m(x), checkpointed, lambda m, x: checkpointed(Checkpointed(m), x)):
        found = slopes(model, x, run)
        assert all(torch.allclose(a, b) for a, b in zip(expected, found, strict=True))


def test_a_checkpoint_begins_with_the_block():
    model = stir(regulate(network("resnet18").double(), "gru"))
    x = torch.randn(2, 64, 16, 16, dtype=torch.float64, requires_grad=True)
    expected = slopes(model.layer1, x, lambda stage, x: stage(x * 1))
    found = slopes(model.layer1, x, lambda stage, x: checkpointed(lambda x: stage(x * 1), x))
    assert all(torch.allclose(a, b) for a, b in zip(expected, found, strict=True))
    y = each([lambda x, block=block: block(x * 1) for block in model.layer1], x)
    with pytest.raises(BlockCallError, match="begin the checkpoint with the block"):
        y.sum().backward()
