"""All that is to be known on a GPU, in one command: are the kernels right, what do they cost, where does time go.

    python examples/bench_gpu.py --out DIR [--minutes 12]

Checks the Triton kernels on the device against the equations (values and gradients, three types, both layouts),
measures networks plain and regulated in turn, the cell's step in each of its forms, and profiles a training step.
Leaves one JSON file each and README.md, a page made from them. What time does not suffice for is left out, and the
page says so.

The exit status is 0, 1 if a check failed or something raised, 2 without a CUDA GPU. Needs torch with Triton, timm and
the tests beside this folder, nothing from the network. `--smoke` tries the script itself, small, on the CPU in
Triton's interpreter; its figures mean nothing.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import statistics
import sys
import time
import traceback
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

if "--smoke" in sys.argv:
    os.environ["TRITON_INTERPRET"] = "1"  # chosen when Triton is imported

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

sys.path.insert(0, str(Path(__file__).parents[1]))

from regulate import RegulatorConfig, kernels
from regulate.kernels.cuda import gpu
from regulate.nn.cells import CELLS
from regulate.tools import bench
from regulate.tools import machine as this
from regulate.tools.bench import Setting

LSTM = RegulatorConfig("lstm")
R50 = Setting("resnet50", LSTM, device="cuda", rounds=20)
MANY = replace(R50, batch=64)
CIFAR = Setting("cifar/20", LSTM, True, 64, 32, device="cuda", rounds=50)


def both(name: str, setting: Setting) -> dict[str, Setting]:
    return {f"{name}-eval": setting, f"{name}-train": replace(setting, train=True)}


# By how much they are wanted, in case time ends.
NETWORKS = {
    **both("resnet50", R50),
    **both("resnet50-64", MANY),
    **{f"resnet20-{cell}-train": replace(CIFAR, config=RegulatorConfig(cell)) for cell in CELLS},
    **both("resnet50-64-amp-last", replace(MANY, amp=True, channels_last=True)),
    **both("resnet50-last", replace(R50, channels_last=True)),
    **both("resnet18", replace(R50, model="resnet18")),
    "resnet50-64-checkpointing-train": replace(MANY, train=True, checkpointing=True),
    **both("resnet50-64-amp", replace(MANY, amp=True)),
    **both("resnet50-compiled", replace(R50, compile=True)),
    **both("resnet50-64-amp-last-compiled", replace(MANY, amp=True, channels_last=True, compile=True)),
}
STAGES = ((8, 64, 56, 56), (8, 128, 28, 28), (8, 256, 14, 14), (8, 512, 7, 7), (64, 64, 56, 56), (64, 16, 32, 32))
TYPES = (torch.float32, torch.bfloat16)
SHAPES = ((3, 5, 7, 6), (2, 64, 14, 14))

Found = dict[str, Any]


def cases(cells: tuple[str, ...], shapes: tuple[tuple[int, ...], ...]) -> Iterator[Found]:
    """Return what to check: in float32 every cell, layout and shape, with and without a state, each compiled anew."""
    for cell, last, zeros, shape in itertools.product(cells, (False, True), (False, True), shapes):
        yield {"cell": cell, "type": "float32", "channels_last": last, "zeros": zeros, "shape": shape}
    for cell, dtype, last in itertools.product(cells, ("bfloat16", "float16"), (False, True)):
        yield {"cell": cell, "type": dtype, "channels_last": last, "zeros": False, "shape": shapes[0]}


def check(device: str, wanted: Iterable[Found]) -> Found:
    """Return the kernels against the equations in double, and whether a process here would trust them."""
    from tests.kernels.triton_job import FLOATS, case, worst

    found = []
    for one in wanted:
        dtype = getattr(torch, one["type"])
        try:
            tensors = [t.to(device) for t in case(one["cell"], one["shape"], one["channels_last"], dtype)]
            error = worst(one["cell"], tensors, one["zeros"])
            found.append({**one, "error": error, "right": error <= FLOATS[dtype]})  # not `not above`: a NaN is wrong
        except Exception as error:
            found.append({**one, "error": f"{type(error).__name__}: {str(error)[:200]}", "right": False})
    trusted = gpu.works(device)
    return {"cases": found, "trusted": trusted, "failed": sum(not one["right"] for one in found) + (not trusted)}


def step_in(form: str, cell: str, maps: list[Tensor], compiled: bool) -> Callable[[], None]:
    """Return a step and its gradients in a form."""
    x, h, c, dh, dc = maps
    module = CELLS[cell](x.shape[1]).to(x)
    run = torch.compile(module) if compiled else module
    state = (h, c) if cell == "lstm" else (h,)

    def step() -> None:
        with kernels.use(form):
            torch.autograd.backward(run(x, state), (dh, dc)[: len(state)])

    return step


def forms(device: str, shapes: tuple[tuple[int, ...], ...], types: Any, rounds: int) -> Found:
    """Seconds of an LSTM's step, forward and backward together, in each form, in turn."""
    found = []
    for dtype, shape in itertools.product(types, shapes):
        maps = [torch.randn(shape, device=device, dtype=dtype, requires_grad=k < 3) for k in range(5)]
        wanted = {"triton": ("triton", False), "aten": ("aten", False), "written out": ("reference", False)}
        steps = {name: step_in(form, "lstm", maps, late) for name, (form, late) in wanted.items()}
        if device == "cuda":
            steps["written out, compiled"] = step_in("reference", "lstm", maps, True)
        times = bench.in_turn(steps, rounds)
        median = {name: statistics.median(own) for name, own in times.items()}
        found.append({"shape": shape, "type": str(dtype), "seconds": median})
    return {"steps": found}


def profiled(setting: Setting, size: int) -> Found:
    """Milliseconds of each operation or kernel in a regulated training step, the longest first."""
    run = bench.step(setting, setting.config, size)
    for _ in range(3):
        run()
    on_gpu = setting.device == "cuda"
    with profile(activities=[ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_gpu else [])]) as seen:
        for _ in range(5):
            run()
    events = {event.key: _own(event, on_gpu) / 5e3 for event in seen.key_averages()}
    longest = sorted(events, key=lambda key: -events[key])[:25]
    return {"model": setting.model, "batch": setting.batch, "ms": {key: events[key] for key in longest}}


def _own(event: Any, on_gpu: bool) -> float:
    if not on_gpu:
        return float(event.self_cpu_time_total)
    # Older versions of torch name the device.
    return float(getattr(event, "self_device_time_total", getattr(event, "self_cuda_time_total", 0.0)))


def plan(smoke: bool) -> dict[str, Callable[[], Found]]:
    """Return what is done, in order, by the name of its file."""
    if smoke:
        small = Setting("cifar/20", RegulatorConfig("rnn"), True, 2, 16, rounds=1)
        return {
            "checks": lambda: check("cpu", cases(("rnn",), ((1, 2, 4, 3),))),
            "resnet20-rnn-train": lambda: bench.measure(small),
            "forms": lambda: forms("cpu", ((1, 2, 4, 3),), TYPES[:1], 1),
            "profile": lambda: profiled(small, 16),
        }
    measured = {name: lambda setting=setting: bench.measure(setting) for name, setting in NETWORKS.items()}
    first, later = list(measured)[:4], list(measured)[4:]
    return {
        "checks": lambda: check("cuda", cases(tuple(CELLS), SHAPES)),
        **{name: measured[name] for name in first},
        "profile": lambda: profiled(replace(MANY, train=True), 224),
        "forms": lambda: forms("cuda", STAGES, TYPES, 20),
        **{name: measured[name] for name in later},
    }


def carry_out(todo: dict[str, Callable[[], Found]], out: Path, seconds: float) -> dict[str, Found]:
    """Do one thing after the other, each with a file; an exception is a result as well, and so is no time."""
    began, found = time.monotonic(), {}
    for name, work in todo.items():
        print(f"{time.monotonic() - began:5.0f} s  {name}", flush=True)
        try:
            found[name] = work() if time.monotonic() - began < seconds else {"left out": "no time was left"}
        except Exception as error:
            trace = traceback.format_exc(limit=-4)
            found[name] = {"raised": f"{type(error).__name__}: {' '.join(str(error).split())[:300]}", "trace": trace}
        (out / f"{name}.json").write_text(json.dumps(found[name], indent=1) + "\n")
    return found


def page(found: dict[str, Found], machine: Found) -> str:
    """Return the results as a page in Markdown."""
    versions = f"{machine['processor']}, torch {machine['torch']}, Python {machine['python']}"
    lines = ["# On a GPU", "", f"{versions}. `python examples/bench_gpu.py --out DIR`.", ""]
    for name, one in found.items():
        lines += [f"- `{name}`: {key}: {one[key]}" for key in ("left out", "raised") if key in one]
    checks = found.get("checks", {}).get("cases", [])
    if checks:
        wrong = [one for one in checks if not one["right"]]
        trusted = "" if found["checks"]["trusted"] else " A process here does NOT trust them."
        lines += ["", f"{len(checks) - len(wrong)} of {len(checks)} checks of the Triton kernels passed.{trusted}", ""]
        lines += [f"- wrong: {one}" for one in wrong]
    lines += ["", "| network | plain, ms | regulated, ms | ratio | peak memory, ratio |", "|---|---|---|---|---|"]
    for name, one in found.items():
        if "ratio" in one:
            ms, memory = [one["seconds"][key] * 1e3 for key in (bench.PLAIN, bench.REGULATED)], one["memory_ratio"]
            ratio = f"{one['ratio'][bench.REGULATED]:.2f} | {f'{memory:.2f}' if memory else ''}"
            lines.append(f"| `{name}` | {ms[0]:.2f} | {ms[1]:.2f} | {ratio} |")
    lines += forms_table(found.get("forms", {}).get("steps", []))
    longest = found.get("profile", {}).get("ms", {})
    lines += ["", "| regulated training step | ms |", "|---|---|"] if longest else []
    return "\n".join([*lines, *(f"| `{key[:80]}` | {ms:.3f} |" for key, ms in longest.items()), ""])


def forms_table(steps: list[Found]) -> list[str]:
    if not steps:
        return []
    names = list(steps[0]["seconds"])
    lines = ["", f"| an LSTM's step and gradients, ms | {' | '.join(names)} |", "|---" * (len(names) + 1) + "|"]
    for one in steps:
        shape = "x".join(str(size) for size in one["shape"])
        cells = " | ".join(f"{one['seconds'][name] * 1e3:.3f}" for name in names)
        lines.append(f"| {shape}, {one['type'].removeprefix('torch.')} | {cells} |")
    return lines


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--minutes", type=float, default=12, help="after these nothing new is begun")
    parser.add_argument("--smoke", action="store_true", help="tries this script on the CPU")
    args = parser.parse_args()
    if not args.smoke and not torch.cuda.is_available():
        print("bench_gpu: torch sees no CUDA GPU here, so there is nothing to measure", file=sys.stderr)
        return 2
    args.out.mkdir(parents=True, exist_ok=True)
    machine = this.machine("cpu" if args.smoke else "cuda")
    found = carry_out(plan(args.smoke), args.out, args.minutes * 60)
    (args.out / "machine.json").write_text(json.dumps(machine, indent=1) + "\n")
    (args.out / "README.md").write_text(page(found, machine))
    failed = found["checks"].get("failed") or any("raised" in one for one in found.values())
    print(f"{'something FAILED' if failed else 'all is right'}; see {args.out / 'README.md'}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
