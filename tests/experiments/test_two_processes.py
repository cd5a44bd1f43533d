"""Two processes train one network, each on a half of every batch that the other does not have."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

sys.path.insert(0, str(Path(__file__).parents[2] / "examples"))

from experiments import batches, data
from experiments.images import Images
from experiments.options import Options
from experiments.place import Place

from .runs import HERE, ROOT

# Each process keeps the images of its steps, and its network as it is in the end.
WATCHED = """
import sys
import torch, train
from experiments import loop

fit = loop.fit

def watched(model, data, job):
    seen = []
    model.register_forward_pre_hook(lambda module, args: seen.append(args[0].clone()) if module.training else None)
    run = fit(model, data, job)
    torch.save({"images": seen, "weights": dict(model.named_parameters())}, job.out / f"rank-{job.at.rank}.pt")
    return run

loop.fit = watched
sys.exit(train.main(sys.argv[1:]))
"""


@pytest.mark.gate
def test_two_processes_train_on_the_recipes_batch(tmp_path):
    script = tmp_path / "watched.py"
    script.write_text(WATCHED)
    job = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(script)]
    arguments = ["--subset", "64", "--cell", "gru", "--epochs", "2", "--quiet", "--out", str(tmp_path / "run")]
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT / 'examples'}", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-W", "ignore", *job, *arguments]
    subprocess.run(command, env=environment, check=True, cwd=ROOT, timeout=300)
    report = json.loads((tmp_path / "run" / "run.json").read_text())
    assert report["machine"]["processes"] == 2
    assert report["recipe"]["batch"] == 32
    assert len(report["epochs"]) == 2
    found = [torch.load(tmp_path / "run" / f"rank-{rank}.pt", weights_only=True) for rank in range(2)]
    assert [len(images) for one in found for images in one["images"]] == [16] * 8
    first = torch.cat([images for one in found for images in one["images"][:2]])
    assert len(first.unique(dim=0)) == 64, "an epoch shows each image once"
    kept = load_file(tmp_path / "run" / "model.safetensors")
    for one in found:
        assert all(torch.equal(value, kept[name]) for name, value in one["weights"].items())


@pytest.mark.parametrize(
    "train",
    [Images(torch.arange(64), torch.arange(64)), [(torch.tensor(number), number) for number in range(64)]],
    ids=["in memory", "in files"],
)
def test_processes_divide_the_images(train):
    options = Options(seed=1)
    places = [Place(rank, 2, HERE.device) for rank in range(2)]
    halves = [batches.training(data.Data(train, [], 64, 1, 16), options, at) for at in places]
    found = [[labels.tolist() for _, labels in half] for half in halves]
    assert [[len(labels) for labels in half] for half in found] == [[16, 16], [16, 16]]
    assert [len(half) for half in halves] == [2, 2]
    assert sorted(label for half in found for labels in half for label in labels) == list(range(64))


def test_a_batch_that_does_not_divide_is_refused():
    with pytest.raises(batches.BatchError, match=r"32 does not divide into 3 processes; give another --batch"):
        batches.training(data.load("digits"), Options(), Place(0, 3, HERE.device))
