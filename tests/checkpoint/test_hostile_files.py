"""Files that are damaged, foreign or hostile: CheckpointError, and the model is untouched."""

from __future__ import annotations

import json
import struct

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from regulate import CheckpointError, is_regulated, load
from regulate.models.by_name import load_model

pytestmark = pytest.mark.slow


def rewritten(path, change):
    """The file with another record."""
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata()
    record = json.loads(metadata["regulate"])
    record = change(record) or record
    text = record if isinstance(record, str) else json.dumps(record)
    save_file(load_file(path), path, metadata={**metadata, "regulate": text})


def set_in(*keys_and_value):
    *keys, last, value = keys_and_value

    def change(record):
        for key in keys:
            record = record[key]
        record[last] = value

    return change


RECORDS = {
    "newer": set_in("format_version", 2),
    "version as text": set_in("format_version", "1"),
    "no version": lambda record: {"config": {}},
    "a list": lambda record: "[]",
    "a number": lambda record: "7",
    "no JSON": lambda record: "{",
    "deep JSON": lambda record: "[" * 100_000,
    "no model": lambda record: {"format_version": 1},
    "unknown option": set_in("config", "shell", "rm"),
    "hostile cell": set_in("config", "cell", "os.system"),
    "cell of a type": set_in("config", "cell", ["lstm"]),
    "other cell": set_in("config", "cell", "gru"),
    "other fusion": set_in("config", "fusion", "residual"),
    "unknown stage": set_in("config", "stages", ["../../etc/passwd"]),
    "fewer stages": set_in("config", "stages", [0]),
    "plan of a type": set_in("plan", 3),
    "plan with a path": set_in("plan", 0, 0, "name", "../layer1"),
    "plan without names": set_in("plan", 0, 0, {}),
    "plan cut short": set_in("plan", []),
    "other kernel": set_in("config", "kernel", "dense"),
    "content": set_in("content", "regulator"),
    "class": set_in("model", "class", "__import__('os')"),
    "class of a type": set_in("model", None),
}


def assert_refused(path, inplace=True):
    model = load_model("resnet18").eval()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    parts = [(name, type(module), set(vars(module))) for name, module in model.named_modules()]
    with pytest.raises(CheckpointError) as caught:
        load(model, path, inplace=inplace)
    assert len(str(caught.value)) < 2000
    assert [(name, type(module), set(vars(module))) for name, module in model.named_modules()] == parts
    assert list(model.state_dict()) == list(before)
    assert all(torch.equal(model.state_dict()[key], value) for key, value in before.items())


@pytest.mark.parametrize("name", RECORDS)
def test_a_hostile_record_is_refused(name, good, tmp_path):
    path = tmp_path / "a"
    path.write_bytes(good.read_bytes())
    rewritten(path, RECORDS[name])
    assert_refused(path)


def with_tensors(change):
    def apply(path):
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata()
        tensors = load_file(path)
        change(tensors)
        save_file(tensors, path, metadata=metadata)

    return apply


def put(key, value):
    return with_tensors(lambda tensors: tensors.__setitem__(key, value(tensors.get(key))))


def with_bytes(change):
    def apply(path):
        path.write_bytes(change(path.read_bytes()))

    return apply


MIX = "layer1.0.regulator.mix.weight"
FILES = {
    "empty": with_bytes(lambda data: b""),
    "short": with_bytes(lambda data: data[: len(data) // 2]),
    "one byte less": with_bytes(lambda data: data[:-1]),
    "one byte more": with_bytes(lambda data: data + b"\0"),
    "huge header": with_bytes(lambda data: struct.pack("<Q", 2**62) + data[8:]),
    "header past the end": with_bytes(lambda data: struct.pack("<Q", len(data) * 2) + data[8:]),
    "zeros": with_bytes(lambda data: bytes(4096)),
    "a pickle": lambda path: torch.save({"a": torch.ones(1)}, path),
    "a foreign archive": lambda path: save_file({"a": torch.ones(1)}, path),
    "overlapping tensors": with_bytes(lambda data: data.replace(b'"data_offsets":[0,', b'"data_offsets":[4,', 1)),
    "wrong shape": put(MIX, lambda x: x[:32].clone()),
    "wrong number of axes": put(MIX, lambda x: x.flatten(1)),
    "wrong dtype": put(MIX, lambda x: x.double()),
    "integers": put(MIX, lambda x: x.int()),
    "shape of the backbone": put("conv1.weight", lambda x: x[:, :1].clone()),
    "a name more": put("layer1.0.regulator.__class__", lambda x: torch.ones(1)),
    "a path as a name": put("../../weight", lambda x: torch.ones(1)),
    "a tensor less": with_tensors(lambda tensors: tensors.pop(MIX)),
    "a tensor of the backbone less": with_tensors(lambda tensors: tensors.pop("bn1.weight")),
}


@pytest.mark.use("save, load, switch", "damaged and hostile files: CheckpointError, model untouched")
@pytest.mark.parametrize("kind", FILES)
def test_a_damaged_or_hostile_file_is_refused(kind, good, tmp_path):
    path = tmp_path / "a"
    path.write_bytes(good.read_bytes())
    FILES[kind](path)
    assert_refused(path, inplace=kind != "wrong shape")


def test_the_good_file_is_not_refused(good):
    """Else the tests of refusal would pass with any file."""
    assert is_regulated(load(load_model("resnet18"), good))
