"""What a regulator costs: time, throughput and memory of a network, plain and regulated in turn."""

from __future__ import annotations

import multiprocessing
import statistics
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.benchmark import timer

from .. import RegulatorConfig, kernels, plan, regulate
from ..testing import example_inputs, loss_of
from . import progress
from .machine import machine, resident_peak
from .open_model import backbone_and_options, open_model

PLAIN, REGULATED = "plain", "regulated"


@dataclass(frozen=True)
class Setting:
    """What is measured, and how.

    Args:
        model: a timm name, torchvision/NAME, cifar/DEPTH, or a folder of `save_pretrained`.
        config: the regulators.
        train: a training step (forward, backward, SGD with momentum) instead of inference.
        batch: N.
        size: H = W of the images; the model's own if None.
        device: `"cpu"` or `"cuda"`.
        amp: under autocast to bfloat16.
        channels_last: weights and images in channels last.
        compile: with torch.compile.
        checkpointing: with gradient checkpointing, of networks that have timm's `set_grad_checkpointing`.
        rounds: measured steps of each network; two more warm up.
        stages: also with one stage regulated at a time.
        weights: a file to load into the network, see `open_model`.
        num_classes: width of the classifier; the library's if None.
        in_chans: channels of the image; the library's if None.
    """

    model: str
    config: RegulatorConfig
    train: bool = False
    batch: int = 8
    size: int | None = None
    device: str = "cpu"
    amp: bool = False
    channels_last: bool = False
    compile: bool = False
    checkpointing: bool = False
    rounds: int = 10
    stages: bool = False
    weights: str | None = None
    num_classes: int | None = None
    in_chans: int | None = None

    def network(self) -> nn.Module:
        """Build the plain network."""
        options: dict[str, Any] = {name: getattr(self, name) for name in ("weights", "num_classes", "in_chans")}
        return backbone_and_options(open_model(self.model, **options, config=self.config), self.config)[0]


def measure(setting: Setting) -> dict[str, Any]:
    """Measure a network, plain and regulated in turn (A B A B), so that a slow minute slows both.

    Args:
        setting: see `Setting`.

    Returns:
        A dict for JSON: `seconds` per step (medians), `throughput` in images per second and `peak_bytes`
        (None where it cannot be measured) of each network, `ratio` of each to the plain one, the
        `arithmetic` ratio of multiply-adds (None where torch does not count them), the setting and the machine.
    """
    config = setting.config
    drawn = plan(setting.network(), config=config, input_size=setting.size or None)
    networks: dict[str, RegulatorConfig | None] = {PLAIN: None, REGULATED: config}
    if setting.stages:
        networks |= {stage.name: replace(config, stages=(stage.name,)) for stage in drawn.stages}
    size = drawn.input_size
    steps = {name: step(setting, one, size) for name, one in networks.items()}
    seconds = {name: statistics.median(own) for name, own in in_turn(steps, setting.rounds).items()}
    with progress.working("measuring memory, in processes of their own"):
        peaks = {name: peak_bytes(setting, networks[name], size) for name in (PLAIN, REGULATED)}
    return {
        "setting": {**asdict(setting), "config": config.to_dict(), "size": size[-1], "input": list(size)},
        "machine": machine(setting.device),
        "seconds": seconds,
        "throughput": {name: setting.batch / value for name, value in seconds.items()},
        "peak_bytes": peaks,
        "ratio": {name: value / seconds[PLAIN] for name, value in seconds.items()},
        "memory_ratio": (peaks[REGULATED] or 0) / (peaks[PLAIN] or 1) or None,
        "arithmetic": 1 + drawn.macs / drawn.base_macs if drawn.base_macs else None,
    }


def step(setting: Setting, config: RegulatorConfig | None, size: int | Sequence[int]) -> Callable[[], None]:
    """One step of a fresh network on random images, see `step_of`; `config` None is the plain one."""
    torch.manual_seed(0)
    model = setting.network()
    _wake(model)
    if config is not None:
        regulate(model, config=config, input_size=size, inplace=True)
    if setting.checkpointing:
        switch = getattr(model, "set_grad_checkpointing", None)
        if switch is None:
            raise ValueError(f"--checkpointing needs a network with set_grad_checkpointing; {setting.model} has none")
        switch(True)
    return step_of(model, setting, size)


def _wake(model: nn.Module) -> None:
    """Give zero-initialised norms a weight: a trained network does not compute with zeros and vanishing gradients."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("weight") and parameter.dim() == 1 and not parameter.any():
                parameter.fill_(0.5)


def step_of(model: nn.Module, setting: Setting, size: int | Sequence[int]) -> Callable[[], None]:
    """One step of a network on random images of H = W = size or of a shape such as (C, H, W), see `example_inputs`."""
    form = torch.channels_last if setting.channels_last else torch.contiguous_format
    model = model.train(setting.train).to(setting.device).to(memory_format=form)  # type: ignore[call-overload]
    if isinstance(size, int):
        channels = next(module.in_channels for module in model.modules() if isinstance(module, nn.Conv2d))
        size = (channels, size, size)
    inputs = example_inputs(model, size, setting.batch)
    if len(inputs) == 1:
        inputs = (inputs[0].to(memory_format=form),)
    run = torch.compile(model) if setting.compile else model
    mixed: Any = torch.autocast(setting.device, torch.bfloat16) if setting.amp else nullcontext()
    optimizer = torch.optim.SGD(model.parameters(), 1e-6, 0.9)

    def inference() -> None:
        with torch.no_grad(), mixed:
            run(*inputs)

    def training() -> None:
        optimizer.zero_grad()
        with mixed:
            loss = loss_of(run(*inputs))
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()

    return training if setting.train else inference


def in_turn(steps: Mapping[str, Callable[[], None]], rounds: int) -> dict[str, list[float]]:
    """Seconds of each step, one after the other, `rounds` times; two rounds before that are not counted."""
    found: dict[str, list[float]] = {name: [] for name in steps}
    for turn in range(rounds + 2):
        progress.step("measuring, round", turn + 1, rounds + 2)
        for name, run in steps.items():
            start = timer()  # which waits for a GPU
            run()
            if turn >= 2:
                found[name].append(timer() - start)
    progress.erase()
    return found


def peak_bytes(setting: Setting, config: RegulatorConfig | None, size: int | Sequence[int]) -> int | None:
    """Return the most memory that building the network and two steps take, weights included.

    On a GPU what torch allocates; on the CPU the resident set of a process of its own, less what it was
    before the network was built. None there if the network is compiled, and where the system does not tell
    (it is read from /proc).
    """
    if setting.device == "cuda":
        torch.cuda.empty_cache()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        _twice(step(setting, config, size))
        return torch.cuda.max_memory_allocated() - before
    # A compiled network's peak is that of the compiler.
    if setting.compile or not Path("/proc/self/clear_refs").exists():
        return None
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(_resident_peak, (setting, config, size, torch.get_num_threads(), kernels.setting()))


def _twice(run: Callable[[], None]) -> None:
    run()
    run()


def _resident_peak(
    setting: Setting, config: RegulatorConfig | None, size: int | Sequence[int], threads: int, form: str
) -> int:
    torch.set_num_threads(threads)
    setting.network()  # imports what there is to import
    with kernels.use(form):
        return resident_peak(lambda: _twice(step(setting, config, size)))


def report(found: Mapping[str, Any]) -> str:
    """Return the figures as text."""
    setting, here = found["setting"], found["machine"]
    config = setting["config"]
    lines = [
        f"{setting['model']}, {config['cell']} {config['kernel']}, {'train step' if setting['train'] else 'eval'}, "
        f"batch {setting['batch']}, {'x'.join(map(str, setting['input'][1:]))}, "
        f"{'bfloat16 autocast' if setting['amp'] else 'float32'}, "
        f"{'channels last' if setting['channels_last'] else 'NCHW'}, {'compiled' if setting['compile'] else 'eager'}"
        f"{', gradient checkpointing' if setting['checkpointing'] else ''}",
        f"{here['processor']}, {here['threads']} threads, torch {here['torch']}, kernels {here['kernels']}, "
        f"native {here['instruction set'] or here['native']}",
        f"{'':24}{'ms':>10}{'images/s':>11}{'ratio':>9}{'peak MiB':>11}",
    ]
    for name, seconds in found["seconds"].items():
        peak = found["peak_bytes"].get(name)
        lines.append(
            f"{name if name in (PLAIN, REGULATED) else 'only ' + name:24}{seconds * 1e3:10.1f}"
            f"{found['throughput'][name]:11.1f}{found['ratio'][name]:9.3f}{f'{peak / 2**20:,.0f}' if peak else '':>11}"
        )
    ratios = {"multiply-adds": found["arithmetic"], "peak memory": found["memory_ratio"]}
    known = [f"{name} {ratio:.3f}" for name, ratio in ratios.items() if ratio]
    return "\n".join([*lines, f"{', '.join(known)} of the plain network's"] if known else lines)
