"""Folders in the Hugging Face layout: config.json, from which timm rebuilds the network, and model.safetensors."""

from __future__ import annotations

import json
import re
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import nn

from .._compat.modules import timm_config_writer
from ..config import OPTIONS, RegulatorConfig
from ..errors import CheckpointError, UnsupportedModelError
from ..rewrite.guard import check_regulated, unwrapped
from ..schema.text import first_line
from ..utils.classes import original
from .archive import replaced
from .card import model_card
from .compatibility import REGULATED, differences, identity
from .save_load import load, options_of, save

CONFIG, WEIGHTS, CARD = "config.json", "model.safetensors", "README.md"

# What create_model takes beside the network's own arguments: where it loads from. Not for a file to say.
_CONTROL = {"model_name", "pretrained", "checkpoint_path", "cache_dir", "features_only"}
# What the card of a network may say of its data; the rest of it, such as addresses of weights, stays timm's.
_DATA = ("input_size", "interpolation", "crop_pct", "crop_mode", "mean", "std", "num_classes", "label_names")


def save_pretrained(
    model: nn.Module,
    folder: str | Path,
    *,
    model_args: Mapping[str, Any] | None = None,
    metrics: Mapping[str, float | str] | None = None,
) -> None:
    """Write a regulated timm network as a folder that `from_pretrained` and the Hugging Face hub take.

    config.json is timm's own, of the architecture that `regulate.timm` registers, with the regulators' options. So timm
    opens the folder where that is imported, and elsewhere says that it does not know the architecture.
    model.safetensors is a file of `save` with everything in it; README.md is a model card, where there is none yet.
    Each appears wholly or not at all.

    Args:
        model: a regulated model of timm; a wrapper around one will do.
        folder: made if it is not there; upload it with `huggingface_hub.upload_folder`.
        model_args: arguments of `timm.create_model` that the network was built with, as JSON values, where
            timm did not keep them itself.
        metrics: what was measured, by name, such as `{"top-1 (%)": 91.2}`; goes into the card; where it
            is there already, a warning says that it stays.

    Raises:
        NotRegulatedError: there are no regulators.
        UnsupportedModelError: timm did not build the network.
        CheckpointError: timm would rebuild another network from this config.json, or `save` raises it.
    """
    check_regulated(model)
    model = unwrapped(model)
    if not identity(model)["timm"]:
        raise UnsupportedModelError(
            f"save_pretrained writes down networks that timm can rebuild, and timm did not build this "
            f"{type(model).__name__}; use save(model, path), and load(network, path) on one that you build"
        )
    write_config = timm_config_writer()
    if write_config is None:
        raise UnsupportedModelError(
            "save_pretrained writes config.json as timm does, and this version of timm has no save_config_for_hf where "
            "others have it; use save(model, path)"
        )
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    with replaced(folder / CONFIG) as temporary:
        write_config(model, temporary, model_args=dict(model_args or {}))
        config = _as_regulated(json.loads(temporary.read_text()), options_of(model))
        temporary.write_text(json.dumps(config, indent=2))
        _check_rebuilt(model, _build(config))
        save(model, folder / WEIGHTS)
    if not (folder / CARD).exists():
        with replaced(folder / CARD) as temporary:
            temporary.write_text(model_card(model, options_of(model), metrics), encoding="utf-8")
    elif metrics:
        note = f"{folder / CARD} is there and stays as it is, without these metrics; remove it to have it written anew"
        warnings.warn(note, stacklevel=2)


def from_pretrained(
    source: str | Path, *, revision: str | None = None, cache_dir: str | Path | None = None, token: str | None = None
) -> nn.Module:
    """Rebuild a network that `save_pretrained` wrote.

    Args:
        source: a folder, or the name of a repository on the Hugging Face hub, `owner/name`.
        revision: branch, tag or commit of the repository.
        cache_dir: where the hub's files are kept.
        token: for private repositories.

    Returns:
        The regulated network, on the CPU, in eval mode.

    Raises:
        FileNotFoundError: there is no such folder, or a file of it is missing.
        CheckpointError: config.json or model.safetensors is damaged, foreign, or does not fit the other.
    """
    of_hub = {"revision": revision, "cache_dir": cache_dir, "token": token}
    config_path, weights = (_located(source, name, of_hub) for name in (CONFIG, WEIGHTS))
    try:
        model = _build(json.loads(config_path.read_text()))
    except (OSError, CheckpointError):
        raise
    except Exception as error:  # whatever timm makes of arguments that anybody may have written
        raise CheckpointError(f"{config_path} describes no network of timm: {first_line(error)}") from error
    return load(model, weights, inplace=True).eval()


def _located(source: str | Path, name: str, of_hub: dict[str, Any]) -> Path:
    folder = Path(source)
    if folder.is_dir():
        return folder / name
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", str(source)) or str(source).startswith("."):
        raise FileNotFoundError(f"there is no folder {source}, and a repository on the hub is named owner/name")
    from huggingface_hub import hf_hub_download

    return Path(hf_hub_download(str(source), name, **of_hub))


def _build(config: Any) -> nn.Module:
    """Return the network that a config.json describes, with random weights; nothing is downloaded or unpickled."""
    import timm

    name, arguments, card = config["architecture"], config.get("model_args", {}), config.get("pretrained_cfg", {})
    if isinstance(name, str) and name.startswith(REGULATED):  # of regulate.timm: the options are with the weights
        name = name.removeprefix(REGULATED)
        arguments = {key: value for key, value in arguments.items() if key not in OPTIONS}
    if not isinstance(name, str) or not re.fullmatch(r"\w+", name) or not timm.is_model(name):
        raise CheckpointError(f"timm {timm.__version__} has no architecture {name!r}; is it of a newer version?")
    refused = sorted(key for key in arguments if key in _CONTROL or key.startswith("pretrained_"))
    if refused:
        raise CheckpointError(f"a config.json describes a network, and {refused} say what to load; remove them")
    model: nn.Module = timm.create_model(
        name,
        pretrained=False,
        pretrained_cfg_overlay={key: card[key] for key in _DATA if key in card},
        **{**arguments, "num_classes": config["num_classes"]},
    )
    return model


def _as_regulated(config: dict[str, Any], options: RegulatorConfig) -> dict[str, Any]:
    """Return a config.json of timm's with the name and the options of the regulated architecture."""
    # Without the options that a namesake was built with: it may have been regulated with others since.
    arguments = {key: value for key, value in (config.get("model_args") or {}).items() if key not in OPTIONS}
    given = {key: value for key, value in options.to_dict().items() if value is not None}
    name = REGULATED + config["architecture"].removeprefix(REGULATED)
    return {**config, "architecture": name, "model_args": {**arguments, **given}}


def _check_rebuilt(model: nn.Module, rebuilt: nn.Module) -> None:
    """Raise CheckpointError unless timm rebuilds the same modules; dropout rates do not count, as in timm."""
    was, now = _parts(model), _parts(rebuilt)
    differing = differences(was, now)
    if differing:
        path = differing[0]
        raise CheckpointError(
            f"timm would rebuild another network from config.json: {path or 'the model'} is "
            f"{was.get(path, 'there not')}, and would be {now.get(path, 'there not')}; pass model_args={{...}}, what "
            "create_model got, and replace classifiers by reset_classifier"
        )


def _parts(model: nn.Module) -> dict[str, str]:
    parts = {}
    for path, module in model.named_modules():
        kind = original(type(module))
        idle = kind is nn.Identity or "drop" in kind.__name__.lower()
        if not idle and "regulator" not in path.split("."):
            parts[path] = f"{kind.__name__}({module.extra_repr()})"
    return parts
