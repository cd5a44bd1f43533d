"""Where the time of a regulated network goes: torch's profile of it beside that of the plain one.

    python examples/bench_profile.py resnet50 --cell lstm [--train] [--channels-last] [--batch 8] [--size 224]

One line per operation, by how much longer the regulated network spends in it; `_Step`, `_NormReLU` and `_Mix` are
the regulators' own: the cell, a norm with its ReLU, and the 1x1 mix, whose products are torch's. Not seen are the norms
in inference and what Python does between operations.
"""

from __future__ import annotations

import argparse
from collections import Counter
from collections.abc import Callable

from torch.profiler import profile

from regulate import RegulatorConfig
from regulate.tools.bench import Setting, step


def spent(run: Callable[[], None], rounds: int) -> Counter[str]:
    """Milliseconds of each operation itself in one step."""
    for _ in range(3):
        run()
    with profile() as seen:
        for _ in range(rounds):
            run()
    return Counter({event.key: event.self_cpu_time_total / 1e3 / rounds for event in seen.key_averages()})


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--cell", default="lstm", choices=("rnn", "gru", "lstm"))
    parser.add_argument("--train", action="store_true")
    parser.add_argument("--channels-last", action="store_true")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--size", type=int, default=224)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--lines", type=int, default=12)
    args = parser.parse_args()
    config = RegulatorConfig(args.cell)
    setting = Setting(args.model, config, args.train, args.batch, channels_last=args.channels_last)
    plain, regulated = (spent(step(setting, one, args.size), args.rounds) for one in (None, config))
    more = {key: regulated[key] - plain[key] for key in {*plain, *regulated}}
    print(f"{'ms per step':52}{'plain':>10}{'regulated':>11}{'more':>9}")
    for key in sorted(more, key=lambda key: -more[key])[: args.lines]:
        print(f"{key[:50]:52}{plain[key]:10.1f}{regulated[key]:11.1f}{more[key]:9.1f}")
    print(f"{'all':52}{plain.total():10.1f}{regulated.total():11.1f}{sum(more.values()):9.1f}")


if __name__ == "__main__":
    main()
