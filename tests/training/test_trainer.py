"""Training runs: what they save, log, resume, refuse, and that gates learn."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from recall_rows import recall_rows
from transformers import Qwen3ForCausalLM, TrainerCallback

import trimkv_kernels as tk
from trimkv_kernels import training
from trimkv_kernels.gates import RetentionGates, load_gates
from trimkv_kernels.testing import embedded_model
from trimkv_kernels.training import GateTrainer, TrainingConfig

OPTIONS: dict[str, Any] = {
    "budget": 4,
    "max_steps": 4,
    "save_steps": 2,
    "logging_steps": 1,
    "intermediate_size": 16,
    "learning_rate": 0.01,
    "warmup_steps": 0,
    "per_device_train_batch_size": 2,
    "use_cpu": True,
    "disable_tqdm": True,
    "bias_init": 3.0,
}


@pytest.fixture(scope="module")
def model() -> Qwen3ForCausalLM:
    return embedded_model()[0]


@pytest.fixture(scope="module")
def rows() -> list[dict[str, torch.Tensor]]:
    return recall_rows(8)


def make_trainer(
    model: Any, rows: Any, out: Path, callbacks: Any = None, **changes: Any
) -> GateTrainer:
    config = TrainingConfig(output_dir=str(out), **{**OPTIONS, **changes})
    return GateTrainer(model, config, rows, callbacks=callbacks)


def assert_same_gates(one: RetentionGates, other: RetentionGates) -> None:
    for name, value in one.state_dict().items():
        assert torch.equal(value, other.state_dict()[name]), name


def test_gates_learn_to_fit_the_budget(model: Any, rows: Any, tmp_path: Path) -> None:
    trainer = make_trainer(model, rows, tmp_path, max_steps=40, save_steps=100, bias_init=4.0)
    trainer.train()
    logs = [entry for entry in trainer.state.log_history if "loss" in entry]
    first, last = logs[0], logs[-1]
    assert first["capacity_loss"] > 0.5
    assert last["capacity_loss"] < 0.05
    assert last["occupancy"] < first["occupancy"] / 4
    assert last["base_loss"] < 1.5
    assert logs[0]["loss"] == pytest.approx(first["base_loss"] + first["capacity_loss"], rel=1e-3)
    assert first["base_loss"] == pytest.approx((first["fwkl"] + first["ntp"]) / 2, rel=1e-3)
    beta = 1 / (1 + math.exp(-4))
    assert first["layer_00/beta_p10"] == pytest.approx(beta, abs=0.01)
    assert first["layer_01/beta_p10"] <= first["layer_01/beta_p50"] <= first["layer_01/beta_p90"]
    with torch.no_grad(), tk.patch(model, trainer.policy, budget=4, buffer=1) as handle:
        output = model(rows[0]["input_ids"][None])  # whoever holds it keeps the cache alive
        assert handle.stats() is not None
        assert output.past_key_values is not None


def test_what_is_saved(model: Any, rows: Any, tmp_path: Path) -> None:
    policy = training.train(
        model,
        rows,
        out=tmp_path,
        data_name="recall",
        base_model="owner/tiny",
        **{**OPTIONS, "bias_init": None},
    )
    folders = sorted(path.name for path in tmp_path.iterdir() if path.is_dir())
    assert folders == ["checkpoint-2", "checkpoint-4"]
    config = load_gates(tmp_path).config
    length = max(len(row["input_ids"]) for row in rows)
    recorded = (config.base_model, config.data, config.steps, config.budget, config.context)
    assert recorded == ("owner/tiny", "recall", 4, 4, length)
    assert config.bias_init == pytest.approx(math.log(length))
    assert load_gates(tmp_path / "checkpoint-2").config.steps == 2
    assert_same_gates(policy.gates, load_gates(tmp_path / "checkpoint-4"))
    assert json.loads((tmp_path / "training.json").read_text())["learning_rate"] == 0.01
    names = {path.name for path in (tmp_path / "checkpoint-4").iterdir()}
    assert names == {"trimkv_config.json", "trimkv_gates.safetensors", "training.json",
                     "optimizer.pt", "scheduler.pt", "rng_state.pth",
                     "trainer_state.json"}  # fmt: skip
    size = sum(path.stat().st_size for path in tmp_path.glob("trimkv*"))
    assert size < 100_000  # the base model has 1.4 MB


def test_resuming_is_not_stopping(model: Any, rows: Any, tmp_path: Path) -> None:
    straight = make_trainer(model, rows, tmp_path / "a", max_steps=6)
    straight.train()

    class Stop(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            if state.global_step == 3:
                raise KeyboardInterrupt

    stopped = make_trainer(model, rows, tmp_path / "b", callbacks=[Stop()], max_steps=6)
    with pytest.raises(KeyboardInterrupt):
        stopped.train()
    resumed = make_trainer(model, rows, tmp_path / "b", max_steps=6, bias_init=1.0)
    resumed.train(resume_from_checkpoint=True)
    assert_same_gates(straight.policy.gates, resumed.policy.gates)
    assert [e["step"] for e in resumed.state.log_history if "loss" in e] == [1, 2, 3, 4, 5, 6]
    assert resumed.policy.gates.config.bias_init == 3.0


def test_interrupted_save_leaves_no_half_checkpoint(
    model: Any, rows: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = make_trainer(model, rows, tmp_path, max_steps=6)
    stock = trainer._save_rng_state

    def fail(folder: str) -> None:
        if trainer.state.global_step == 4:
            raise OSError("disk full")
        stock(folder)

    monkeypatch.setattr(trainer, "_save_rng_state", fail)
    with pytest.raises(OSError, match="disk full"):
        trainer.train()
    assert [path.name for path in tmp_path.glob("checkpoint-*")] == ["checkpoint-2"]
    policy = training.train(model, rows, out=tmp_path, resume=True, **{**OPTIONS, "max_steps": 6})
    assert policy.gates.config.steps == 6
    names = sorted(path.name for path in tmp_path.iterdir() if path.is_dir())
    assert names == ["checkpoint-4", "checkpoint-6"]  # two are kept, and nothing half done


def test_global_scope_ties_the_last_layer(model: Any, rows: Any, tmp_path: Path) -> None:
    policy = training.train(model, rows, out=tmp_path, scope="global", **OPTIONS)
    config = policy.gates.config
    assert (config.kind, config.tied, config.shared_budget) == ("rg10", True, True)
    assert policy.gates.layers[0].linear3 is policy.gates.layers[1].linear3


def test_go_on_from_gates(model: Any, rows: Any, tmp_path: Path) -> None:
    first = training.train(model, rows, out=tmp_path / "a", **OPTIONS)
    trainer = GateTrainer(
        model,
        TrainingConfig(output_dir=str(tmp_path / "b"), **{**OPTIONS, "budget": 6}),
        rows,
        gates=first.gates,
    )
    assert_same_gates(trainer.gate_model.gates, first.gates)
    assert trainer.gate_model.gates.config.budget == 6
    trainer.train()
    assert trainer.policy.gates.config.steps == 4


def test_other_base_model_is_refused(model: Any, rows: Any, tmp_path: Path) -> None:
    options = {**OPTIONS, "max_steps": 2}
    gates = training.train(model, rows, out=tmp_path, base_model="o/other", **options).gates
    match = "the gates name the base model 'o/other', and the model is '.*embedded_model'"
    with pytest.raises(ValueError, match=match):
        training.train(model, rows, out=tmp_path / "b", gates=gates, **options)
    # A hub id and a folder of the same name are the same base.
    training.train(
        model, rows, out=tmp_path / "b", gates=gates, base_model="elsewhere/other", **options
    )
    match = "checkpoint-2 cannot be resumed: its gates have base_model 'o/other', and this run has"
    with pytest.raises(ValueError, match=match):
        training.train(model, rows, out=tmp_path, resume=True, **options)
    with pytest.raises(ValueError, match="cannot be resumed: its gates have budget 4, and this"):
        training.train(
            model, rows, out=tmp_path, resume=True, base_model="o/other", **{**options, "budget": 5}
        )


class _Poison(TrainerCallback):
    gates: Any = None

    def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.global_step == 2:
            with torch.no_grad():
                self.gates.layers[1].linear2.weight.fill_(math.nan)


def test_loss_that_is_not_finite_stops(model: Any, rows: Any, tmp_path: Path) -> None:
    poison = _Poison()
    trainer = make_trainer(model, rows, tmp_path, callbacks=[poison])
    poison.gates = trainer.gate_model.gates
    with pytest.raises(FloatingPointError) as error:
        trainer.train()
    message = str(error.value)
    assert "the loss is not finite at step 3" in message
    assert "the first layer with a log beta that is not finite is 1" in message
    assert f"The last good checkpoint is {tmp_path / 'checkpoint-2'}" in message
    assert all(p.requires_grad for p in model.parameters())


def test_gates_that_are_not_finite_are_not_saved(model: Any, rows: Any, tmp_path: Path) -> None:
    trainer = make_trainer(model, rows, tmp_path)
    trainer.gate_model.gates.layers[0].bias.data.fill_(math.inf)
    with pytest.raises(FloatingPointError, match="layer 0 are not finite.* No checkpoint was"):
        trainer.save_model()
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"labels": -100}, "data must have labels to predict, and none of its 8 rows has one"),
        ({"length": 4}, "budget 4 is never exceeded: the longest document has 4 tokens"),
        ({"packed": 4}, "budget 4 is never exceeded: the longest document has 4 tokens"),
        ({"key": "tokens"}, "a training row must be a dictionary with input_ids"),
        ({"extra": [1, 2]}, "labels of a training row must be integers of one dimension, as many"),
    ],
)
def test_bad_data(
    model: Any, rows: Any, tmp_path: Path, change: dict[str, Any], message: str
) -> None:
    bad = []
    for row in rows:
        row = dict(row)
        if "labels" in change:
            row["labels"] = torch.full_like(row["input_ids"], change["labels"])
        if "length" in change:
            row = {"input_ids": row["input_ids"][: change["length"]]}
        if "packed" in change:
            row["position_ids"] = torch.arange(len(row["input_ids"])) % change["packed"]
            row["labels"] = row["input_ids"]
        if "key" in change:
            row = {change["key"]: row["input_ids"]}
        if "extra" in change:
            row["labels"] = change["extra"]
        bad.append(row)
    with pytest.raises(ValueError, match=message):
        make_trainer(model, bad, tmp_path)


def test_dataset_that_cannot_be_indexed_needs_a_context(model: Any, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="context must be given for a dataset that cannot be"):
        make_trainer(model, iter([]), tmp_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"budget": 0}, "budget must be an integer >= 1, got 0"),
        ({"sinks": -1}, "sinks must be an integer >= 0, got -1"),
        ({"sinks": 1, "recent": 3}, "budget must exceed the protected positions, got budget 4"),
        ({"scope": "layer"}, "scope must be one of 'head', 'global'"),
        ({"scope": "global", "gate": "rg"}, "scope 'global' compares heads of all layers"),
        ({"base_loss": "kl"}, "base_loss must be one of"),
        ({"impl": "sdpa"}, "impl must be one of"),
        ({"capacity_weight": -1.0}, "capacity_weight must be a number >= 0"),
        ({"gate": "rg4"}, "gate must be one of 'rg', 'rg10', got 'rg4'"),
        ({"push_to_hub": True}, "push the gates when they are done"),
        ({"eval_strategy": "steps"}, "eval_strategy must be 'no'"),
    ],
)
def test_bad_options(change: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        TrainingConfig(output_dir=str(tmp_path), **{**OPTIONS, **change})


def test_published_defaults(tmp_path: Path) -> None:
    config = TrainingConfig(output_dir=str(tmp_path), budget=8, use_cpu=True)
    assert (config.learning_rate, config.warmup_steps, config.intermediate_size) == (2e-4, 100, 512)
    assert config.lr_scheduler_type == "cosine_with_min_lr"
    assert (config.gate, config.scope, config.base_loss) == ("rg", "head", "fwkl_ntp")
    assert "adamw" in config.optim.value


@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing")  # its name before it was renamed
def test_model_comes_back_as_it_was(model: Any, rows: Any, tmp_path: Path) -> None:
    stock = embedded_model()[0]
    training.train(model, rows, out=tmp_path, gradient_checkpointing=True, bf16=True, **OPTIONS)
    ids = rows[0]["input_ids"][None]
    with torch.no_grad():
        assert torch.equal(model(ids).logits, stock(ids).logits)
    assert all(p.requires_grad for p in model.parameters())
    assert not model.training
