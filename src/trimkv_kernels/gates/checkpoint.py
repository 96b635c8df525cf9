"""Retention-gate checkpoints: read the published layout and ours, write ours.

====================  ==========================  ================================
layout                config                      weights
====================  ==========================  ================================
ours                  ``trimkv_config.json``      ``trimkv_gates.safetensors``
published (trimkv)    ``config.json``             ``trimkv_weights.pth``
====================  ==========================  ================================

Our names never collide with those of a base model, so gates can lie in its folder; where a folder
holds both layouts, ours is read. Config keys and tensor names are the same in both:
``model.layers.{i}.self_attn.retention_gate.{tensor}``, tied tensors once per layer. A published
config holds that of the base model too, and its weights are a pickled dictionary of tensors. Where
the base model reads images, the published names begin with ``model.language_model.layers``, and
what concerns the gates' shapes is in the ``text_config`` of the config.
"""

from __future__ import annotations

import io
import logging
import tempfile
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import HfApi
from safetensors.torch import save
from torch import Tensor

from trimkv_kernels.files import (
    find_folder,
    read_config,
    read_tensors,
    tensor_problems,
    to_json,
    write_files,
)
from trimkv_kernels.gates.loading import build_empty, not_finite, size_problems
from trimkv_kernels.gates.modules import GateConfig, RetentionGates

logger = logging.getLogger("trimkv_kernels")

CONFIG_NAME = "trimkv_config.json"
WEIGHTS_NAME = "trimkv_gates.safetensors"
PUBLISHED_CONFIG_NAME = "config.json"
PUBLISHED_WEIGHTS_NAME = "trimkv_weights.pth"
LAYOUTS = ("safetensors", "published")

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_TIED = ("linear3.weight", "bias")
_TEXT = "text_config"  # of a base model that reads images
# What the published layout keeps there.
_TEXT_KEYS = (
    "retention_gate",
    "retention_gate_bias_init",
    "retention_gate_intermediate_size",
    "tie_retention_gate_layers",
    "max_seq_len",
    "hidden_size",
    "num_hidden_layers",
    "num_key_value_heads",
    "hidden_act",
)


def load_gates(folder_or_hub_id: str | Path, *, revision: str | None = None) -> RetentionGates:
    """Read retention gates, in the dtype they are stored in, onto the CPU.

    Pickled weights are read with ``weights_only=True``: nothing in them is executed.

    Loading from the hub uses ``huggingface_hub`` and then the same code. It is untested.

    Args:
        folder_or_hub_id: Folder of a checkpoint, or ``"owner/name"`` on the Hugging Face hub.
        revision: Branch, tag or commit on the hub; ``None`` is the default branch.

    Returns:
        The gates; ``gates.config`` names their base model, budget and buffer where known.

    Raises:
        ValueError: there is no checkpoint, a file is corrupt or holds more than plain tensors,
            keys, shapes or dtypes differ from the config, or a number is NaN or infinite.
    """
    folder = checkpoint_folder(folder_or_hub_id, revision=revision)
    weights_path = _first_file(folder, "weights", (WEIGHTS_NAME, PUBLISHED_WEIGHTS_NAME))
    config_path = _first_file(folder, "config", (CONFIG_NAME, PUBLISHED_CONFIG_NAME))
    config = read_config(config_path, _gate_config)
    tensors = read_tensors(weights_path)
    if weights_path.name == PUBLISHED_WEIGHTS_NAME:
        tensors = {_own_key(key): tensor for key, tensor in tensors.items()}
    sizes = (config.hidden_size, config.intermediate_size, config.num_kv_heads)
    _raise_problems(size_problems(config.num_layers, sizes, tensors), config, weights_path)
    gates = build_empty(lambda: RetentionGates(config))
    _check_tensors(tensors, gates, weights_path)
    _raise_problems(not_finite(tensors), config, weights_path)
    if config.tied:
        _keep_last_copy(tensors, config.num_layers, weights_path)
    for layer, gate in enumerate(gates.layers):
        stored = {name: tensors[_key(layer, name)] for name in gate.state_dict()}
        gate.load_state_dict(stored, assign=True)
    gates.tie()
    return gates


def save_gates(gates: RetentionGates, folder: str | Path) -> None:
    """Write gates as ``trimkv_gates.safetensors`` and ``trimkv_config.json``.

    Both files are complete before either gets its name, so a failed write changes nothing.

    Args:
        gates: The gates; their dtype is kept.
        folder: Where to write; made when missing.

    Raises:
        TypeError: ``gates`` is not a ``RetentionGates``.
        ValueError: ``folder`` is a file, or the parameters of ``gates`` differ in dtype or no
            longer have the shapes of their config.
    """
    write_files(folder, gate_files(gates))


def gate_files(gates: RetentionGates) -> dict[str, bytes | str]:
    """What :func:`save_gates` writes: contents by file name.

    Raises:
        TypeError: ``gates`` is not a ``RetentionGates``.
        ValueError: its parameters differ in dtype or no longer have the shapes of their config.
    """
    # Not save_file: its files are readable by their owner only, whatever the umask.
    weights = save(_checked_tensors(gates, WEIGHTS_NAME), metadata={"format": "pt"})
    return {WEIGHTS_NAME: weights, CONFIG_NAME: to_json(gates.config.to_dict())}


def save_published(
    gates: RetentionGates, folder: str | Path, *, base_config: Mapping[str, Any]
) -> None:
    """Write gates in the layout that trimkv 0.1.5 reads, all or nothing.

    Args:
        gates: The gates; their dtype is kept.
        folder: Where to write; made when missing.
        base_config: The contents of the base model's ``config.json``. trimkv reads them from here.

    Raises:
        TypeError: ``gates`` is not a ``RetentionGates``.
        ValueError: ``folder`` is a file, the gates name no base model, ``base_config`` is another
            model's, or parameters differ in dtype or have other shapes than in the gates' config.
    """
    tensors = _checked_tensors(gates, PUBLISHED_WEIGHTS_NAME)
    config = _published_config(gates.config, base_config)
    if _TEXT in base_config:
        tensors = {_vision_key(key): tensor for key, tensor in tensors.items()}
    weights = io.BytesIO()
    torch.save(tensors, weights)
    write_files(
        folder, {PUBLISHED_WEIGHTS_NAME: weights.getvalue(), PUBLISHED_CONFIG_NAME: to_json(config)}
    )


def convert_gates(
    folder_or_hub_id: str | Path,
    folder: str | Path,
    *,
    layout: str,
    revision: str | None = None,
) -> None:
    """Read a checkpoint of either layout, and write it in a given one.

    Args:
        folder_or_hub_id: What to read, see :func:`load_gates`.
        folder: Where to write. With ``"published"``, do not use a base model's folder: its config
            would be replaced.
        layout: ``"safetensors"``, our layout, or ``"published"``. The latter needs the base model's
            ``config.json``, from its folder or from the hub.
        revision: Of ``folder_or_hub_id`` on the hub.

    Raises:
        ValueError: the checkpoint is missing or corrupt, ``layout`` is unknown, or the base model's
            config cannot be found.
    """
    if layout not in LAYOUTS:
        raise ValueError(f"layout must be one of {', '.join(map(repr, LAYOUTS))}, got {layout!r}")
    source = checkpoint_folder(folder_or_hub_id, revision=revision)
    gates = load_gates(source)
    base = resolve_base_model(source, gates.config)
    if gates.config.base_model is not None and Path(base).is_dir():
        # A path relative to the source folder would be wrong in another folder.
        gates.config = replace(gates.config, base_model=str(Path(base).absolute()))
    if layout == "safetensors":
        save_gates(gates, folder)
    else:
        save_published(gates, folder, base_config=_base_config(base, gates.config.base_revision))


def push_to_hub(
    gates: RetentionGates,
    repo_id: str,
    *,
    private: bool | None = None,
    token: str | None = None,
    revision: str | None = None,
) -> str:
    """Upload gates with a card that says what they are.

    Args:
        gates: The gates.
        repo_id: ``"owner/name"`` on the Hugging Face hub; made when missing.
        private: Whether a new repository is private; None is the hub's default.
        token: Token of an account that may write; None is the account that is logged in.
        revision: Branch to upload to.

    Returns:
        Address of the commit.
    """
    api = HfApi(token=token)
    api.create_repo(repo_id, private=private, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="trimkv-") as folder:
        save_gates(gates, folder)
        Path(folder, "README.md").write_text(gate_card(gates.config), encoding="utf-8")
        commit = api.upload_folder(repo_id=repo_id, folder_path=folder, revision=revision)
    return str(commit.commit_url)


def gate_card(config: GateConfig) -> str:
    """A model card for the hub: what the gates are for and how they were trained."""
    is_hub_id = config.base_model is not None and not Path(config.base_model).is_absolute()
    head = ["library_name: trimkv-kernels", "tags: [kv-cache, trimkv]"]
    if is_hub_id:
        head.append(f"base_model: {config.base_model}")
    facts = {
        "Base model": config.base_model if is_hub_id else None,
        "Base revision": config.base_revision,
        "Architecture": config.kind,
        "Budget per head": config.budget,
        "First positions never evicted": config.sinks,
        "Last positions never evicted": config.recent,
        "Budget shared by all heads": "yes" if config.shared_budget else None,
        "Steps ahead that a score sums over": config.lookahead,
        "Training data": config.data,
        "Training steps": config.steps,
        "Longest training text (tokens)": config.context,
        "Initial bias": config.bias_init,
    }
    rows = [f"| {name} | {value} |" for name, value in facts.items() if value is not None]
    return "\n".join(
        [
            "---",
            *head,
            "---",
            "",
            "# Retention gates (TRIM-KV)",
            "",
            "| | |",
            "|---|---|",
            *rows,
            "",
        ]
    )


def checkpoint_folder(
    folder_or_hub_id: str | Path, *, revision: str | None = None, local_files_only: bool = False
) -> Path:
    """Find the local folder of a checkpoint, fetching the gate files from the hub if needed.

    The hub path is untested. ``HF_HUB_OFFLINE`` and the other variables of ``huggingface_hub``
    are obeyed.

    Args:
        folder_or_hub_id: An existing folder, or ``"owner/name"`` on the hub.
        revision: Branch, tag or commit on the hub.
        local_files_only: Look in the hub cache only.

    Returns:
        The folder; for a hub id, its snapshot in the hub cache.

    Raises:
        ValueError: there is neither such a folder nor such a repository, or ``revision`` is given
            with a folder.
    """
    files = (CONFIG_NAME, WEIGHTS_NAME, PUBLISHED_CONFIG_NAME, PUBLISHED_WEIGHTS_NAME)
    return find_folder(
        folder_or_hub_id, files=files, revision=revision, local_files_only=local_files_only
    )


def download_wandb(artifact: str, folder: str | Path | None = None) -> Path:
    """Fetch a checkpoint that was logged to Weights & Biases; needs the extra ``wandb``.

    It was only tested with a replacement of the service.

    Args:
        artifact: ``"entity/project/name:alias"``.
        folder: Where to write; None is wandb's own folder for artifacts.

    Returns:
        The folder, to pass as ``folder_or_hub_id`` or ``checkpoint``.

    Raises:
        ImportError: wandb is missing; the message says how to get it.
        ValueError: there is no such artifact, or wandb may not read it.
    """
    try:
        import wandb
    except ImportError as error:
        raise ImportError(
            "fetching from Weights & Biases needs wandb: pip install 'trimkv-kernels[wandb]'"
        ) from error
    root = None if folder is None else str(folder)
    try:
        return Path(wandb.Api().artifact(artifact).download(root=root))
    except (wandb.errors.Error, ValueError) as error:
        raise ValueError(
            f"artifact must be one that wandb can read, 'entity/project/name:alias', got "
            f"{artifact!r}: {error}"
        ) from error


def resolve_base_model(folder: str | Path, config: GateConfig) -> str:
    """Find the base model of a checkpoint.

    Args:
        folder: The checkpoint's folder.
        config: Its config. ``base_model`` is a hub id or a folder: absolute, relative to
            ``folder``, or beside it.

    Returns:
        A folder or a hub id for ``from_pretrained``; ``folder`` itself if no base is named.
    """
    if config.base_model is None:
        return str(folder)
    for start in (Path(folder), Path(folder).absolute().parent):
        if (start / config.base_model).is_dir():
            return str(start / config.base_model)
    return config.base_model


def _key(layer: int, name: str) -> str:
    return f"model.layers.{layer}.self_attn.retention_gate.{name}"


def _vision_key(key: str) -> str:
    """A tensor's name in the published layout, where the base model reads images."""
    return key.replace("model.", "model.language_model.", 1)


def _own_key(key: str) -> str:
    return key.replace("model.language_model.", "model.", 1)


def _gate_config(data: Mapping[str, Any]) -> GateConfig:
    """From a config file; of a base model that reads images, sizes are of the part for text."""
    return GateConfig.from_dict({**data, **_object(data, _TEXT)})


def _object(data: Mapping[str, Any], name: str) -> dict[str, Any]:
    """A JSON object in a config; empty if there is none."""
    found = data.get(name, {})
    if not isinstance(found, dict):
        raise ValueError(f"{name} must be a JSON object, got {type(found).__name__}")
    return found


def _stored(gates: RetentionGates) -> dict[str, Tensor]:
    return {
        _key(layer, name): tensor
        for layer, gate in enumerate(gates.layers)
        for name, tensor in gate.state_dict().items()
    }


def _checked_tensors(gates: RetentionGates, file: str) -> dict[str, Tensor]:
    """The tensors of a file, none sharing memory. Raises as :func:`save_gates` does."""
    if not isinstance(gates, RetentionGates):
        raise TypeError(f"gates must be a RetentionGates, got {type(gates).__name__}")
    with torch.device("meta"):
        expected = RetentionGates(gates.config)
    tensors = _stored(gates)
    _check_tensors(tensors, expected, file)
    # safetensors refuses tensors that share memory, as tied ones do.
    return {key: tensor.detach().cpu().clone().contiguous() for key, tensor in tensors.items()}


def _published_config(config: GateConfig, base_config: Mapping[str, Any]) -> dict[str, Any]:
    if config.base_model is None:
        raise ValueError(
            "the gates name no base model, which the published layout needs: set base_model in "
            "their config"
        )
    ours = {key: value for key, value in config.to_dict().items() if value is not None}
    text = base_config.get(_TEXT, base_config)
    for key in ("hidden_size", "num_hidden_layers", "num_key_value_heads"):
        if text.get(key) != ours[key]:
            raise ValueError(
                f"base_config must be that of {config.base_model}: its {key} must be {ours[key]}, "
                f"got {text.get(key)}"
            )
    if config.context is not None:
        ours["max_seq_len"] = config.context
    trainable = {"trainable_params": "self_attn.retention_gate"}
    if text is base_config:
        return {**_with_rope(base_config), **trainable, **ours}
    shapes = {key: ours.pop(key) for key in _TEXT_KEYS if key in ours}
    return {**base_config, **trainable, **ours, _TEXT: {**_with_rope(text), **shapes}}


def _with_rope(config: Mapping[str, Any]) -> dict[str, Any]:
    """A base model's config with RoPE under the names of transformers 4, which trimkv reads."""
    rope = dict(config.get("rope_parameters") or {})
    if not rope:
        return dict(config)
    theta = rope.pop("rope_theta", config.get("rope_theta"))
    is_plain = rope.get("rope_type") == "default" and "mrope_section" not in rope
    return {**config, "rope_theta": theta, "rope_scaling": None if is_plain else rope}


def _base_config(base: str, revision: str | None) -> dict[str, Any]:
    try:
        # the revision is of the hub's copy, not of a folder
        where = None if Path(base).is_dir() else revision
        folder = find_folder(base, files=(PUBLISHED_CONFIG_NAME,), revision=where)
        return read_config(folder / PUBLISHED_CONFIG_NAME, _base)
    except ValueError as error:
        raise ValueError(
            f"the published layout needs the config of the base model {base!r}, which is neither a "
            f"folder with a {PUBLISHED_CONFIG_NAME} nor available from the hub: {error}"
        ) from error


def _base(data: dict[str, Any]) -> dict[str, Any]:
    """A base model's config, with the types that :func:`save_published` relies on."""
    for part in (data, _object(data, _TEXT)):
        if part.get("rope_parameters") is not None:
            _object(part, "rope_parameters")
    return data


def _first_file(folder: Path, what: str, names: tuple[str, ...]) -> Path:
    for name in names:
        if (folder / name).is_file():
            return folder / name
    raise ValueError(
        f"no retention-gate {what} in {folder}: expected {' or '.join(names)}. "
        "Pass the folder or hub id of a TRIM-KV checkpoint"
    )


def _check_tensors(tensors: Mapping[str, Tensor], gates: RetentionGates, file: Path | str) -> None:
    """Raise ``ValueError`` unless ``tensors`` are what ``gates``, on any device, would store."""
    _raise_problems(tensor_problems(tensors, _stored(gates)), gates.config, file)
    dtypes = {tensor.dtype for tensor in tensors.values()}
    if len(dtypes) != 1 or not dtypes.issubset(_DTYPES):
        raise ValueError(
            f"{file} must hold tensors of one dtype among {', '.join(map(str, _DTYPES))}, "
            f"got {', '.join(sorted(map(str, dtypes)))}"
        )


def _raise_problems(problems: list[str], config: GateConfig, file: Path | str) -> None:
    if problems:
        raise ValueError(
            f"{file} does not hold the tensors of its config ({config.kind!r} gates, "
            f"{config.num_layers} layers, hidden_size {config.hidden_size}, intermediate_size "
            f"{config.intermediate_size}, {config.num_kv_heads} KV heads): {'; '.join(problems)}. "
            "Check that config and weights come from one checkpoint"
        )


def _keep_last_copy(tensors: dict[str, Tensor], num_layers: int, path: Path) -> None:
    """Give all layers the last layer's tied tensors, as loading layer by layer would."""
    for name in _TIED:
        last = tensors[_key(num_layers - 1, name)]
        other = [x for x in range(num_layers) if not torch.equal(tensors[_key(x, name)], last)]
        if other:
            logger.warning(
                "%s: the config ties %s, and its copies differ: layers %s are not equal to the "
                "last layer, whose copy is used for all. Set 'tie_retention_gate_layers' to "
                "false in the config if the layers were trained apart",
                path,
                name,
                ", ".join(map(str, other)),
            )
        for layer in range(num_layers):
            tensors[_key(layer, name)] = last
