"""Short runs of the experiments, their figures, and a CIFAR of a handful of images."""

from __future__ import annotations

import json
import pickle
import sys
from pathlib import Path

import numpy as np
import torch
from torchvision.datasets import CIFAR10

sys.path.insert(0, str(Path(__file__).parents[2] / "examples"))

import train
from experiments import data, loop
from experiments.options import options_of
from experiments.place import Place
from torch import nn

ROOT = Path(__file__).parents[2]
HERE = Place(0, 1, torch.device("cpu"))
TINY = ("--subset", "64", "--quiet", "--model", "resnet20")


def run(folder, *arguments):
    assert train.main([*TINY, "--out", str(folder), *arguments]) == 0
    return json.loads((folder / "run.json").read_text())


def fitted(folder, *arguments, model=None):
    """The state after a run of a network that is given, by default a linear layer, on 64 digits."""
    options = options_of(["--quiet", *arguments])
    model = model or nn.Sequential(nn.AvgPool2d(4), nn.Flatten(), nn.Linear(16, 10))
    return loop.fit(model, data.load("digits", subset=64), loop.Job(options, options.plan(), HERE, folder))


def figures(report):
    return [{key: value for key, value in entry.items() if not key.endswith("seconds")} for entry in report["epochs"]]


def cifar_files(root, kind):
    """A CIFAR folder with a handful of images."""
    folder = root / kind.base_folder
    folder.mkdir(parents=True)
    key = "labels" if kind is CIFAR10 else "fine_labels"
    names = [name for name, _ in (*kind.train_list, *kind.test_list)]
    for name in names:
        pixels = np.random.default_rng(0).integers(0, 255, (80, 3072), dtype=np.uint8)
        (folder / name).write_bytes(pickle.dumps({"data": pixels, key: [i % 10 for i in range(80)]}))
    meta = folder / kind.meta["filename"]
    meta.write_bytes(pickle.dumps({kind.meta["key"]: [str(i) for i in range(10)]}))
    return root
