"""Trains a plain or a regulated network: the paper's experiments, and yours.

    python examples/train.py --dataset digits --model resnet20 --cell gru
    python examples/train.py --dataset cifar10 --data DIR --recipe short --cell lstm
    torchrun --nproc-per-node 8 examples/train.py --dataset imagefolder --data DIR --model timm/resnet50 --cell lstm

A run is a folder: `checkpoint.pt` after every epoch, from which `--resume` goes on to the same numbers,
`run.json` with everything that was asked and measured, and the trained network.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from experiments.loop import train
from experiments.messages import EXPECTED, one_line
from experiments.options import options_of


def main(arguments: Sequence[str] | None = None) -> int:
    """Run it. Return 0, 130 after Ctrl-C, 2 for an error, which is one line on stderr."""
    options = options_of(arguments, __doc__)
    try:
        train(options)
    except KeyboardInterrupt:
        print(f"\nstopped; the last whole epoch is in {options.out}/checkpoint.pt, --resume goes on", file=sys.stderr)
        return 130
    except EXPECTED as error:
        print(f"train.py: {one_line(error)}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
