"""Structured pruning, batch-norm statistics and fine-tuning with a teacher."""

from __future__ import annotations

import copy
import dataclasses
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from timm.models.densenet import DenseNet
from torch import Tensor, nn

import checkpoint
import predictor
import pruning
import train
from config import Config, config_from_dict
from data_preprocessing import Request
from engines import TorchEngine
from errors import CheckpointError, ConfigError, UserError
from models import Classifier, create_model
from narrowing import narrow
from predictor import load_state
from preprocess import PreprocessSpec
from pruning import Distilled, Stage, distillation_loss, prune, prune_and_distil, recalibrate, rounded_width, size_of
from runtime import Interrupted, StopRequest

SPEC = PreprocessSpec(32, "squash", 3, (0.5, 0.5, 0.5), (0.25, 0.25, 0.25))
CPU = torch.device("cpu")


class Plain(nn.Module):
    """Two convolutions and a pool, widths (16, 16): small enough to reason about."""

    num_features = 16

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm = nn.Conv2d(3, 16, 3, padding=1), nn.BatchNorm2d(16)
        self.second = nn.Conv2d(16, 16, 3, padding=1)

    def forward(self, images_BCHW: Tensor) -> Tensor:
        return self.second(self.norm(self.first(images_BCHW)).relu()).relu().mean((2, 3))


def plain(seed: int = 0) -> Classifier:
    torch.manual_seed(seed)
    return Classifier(Plain(), num_classes=2, dropout_rate=0.3, hidden_features=0).eval()


def dense() -> Classifier:
    """A DenseNet, whose layers read the concatenation of all before them."""
    backbone = DenseNet(growth_rate=16, block_config=(2, 2), num_classes=0)
    return Classifier(backbone, num_classes=2, dropout_rate=0.3, hidden_features=16)


# --- pruning ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "side"), [("test_resnet", 32), ("test_efficientnet", 32), ("test_vit", 32), ("test_convnext", 32)]
)
def test_a_pruned_network_is_smaller_and_still_a_classifier(name: str, side: int) -> None:
    model = create_model(name, 3, False, image_size=side).eval()
    original = copy.deepcopy(model.state_dict())
    pruned = prune(model, amount=0.3, image_size=side)
    images_BCHW = torch.randn(2, 3, side, side)
    with torch.no_grad():
        features_BF, logits_BC = pruned.model.features(images_BCHW), pruned.model(images_BCHW)
    assert logits_BC.shape == (2, 3) and torch.isfinite(logits_BC).all()
    assert features_BF.shape[1] < model.features(images_BCHW).shape[1]
    assert pruned.after.parameters < 0.8 * pruned.before.parameters
    assert pruned.after.macs < 0.8 * pruned.before.macs
    assert all(torch.equal(value, original[key]) for key, value in model.state_dict().items())
    named = {name for names in pruned.model.stages() for name in names}
    assert named == set(dict(pruned.model.backbone.named_parameters()))


def test_channels_that_do_nothing_are_those_removed() -> None:
    model = plain()
    with torch.no_grad():
        dead = torch.arange(1, 16, 2)
        for layer in (model.backbone.first, model.backbone.norm, model.backbone.second):
            layer.weight[dead] = 0
            layer.bias[dead] = 0
        model.backbone.second.weight[:, dead] = 0
        model.head[1].weight[:, dead] = 0
    images_BCHW = torch.randn(4, 3, 16, 16)
    pruned = prune(model, amount=0.5, image_size=16).model
    assert pruned.backbone.first.out_channels == pruned.backbone.second.out_channels == 8
    # fp32 sums of the same terms in another order
    torch.testing.assert_close(pruned(images_BCHW), model(images_BCHW), atol=1e-6, rtol=1e-5)


def test_a_small_batch_norm_scale_outweighs_large_kernels() -> None:
    model = plain()
    with torch.no_grad():
        model.backbone.norm.weight[1::2] = 0.01
        model.backbone.first.weight[1::2] *= 10
    pruned = prune(model, amount=0.5, image_size=16).model
    torch.testing.assert_close(pruned.backbone.first.weight, model.backbone.first.weight[::2], atol=0, rtol=0)


def test_macs_are_those_counted_by_hand() -> None:
    assert size_of(plain(), torch.zeros(1, 3, 16, 16)).macs == 16 * 16 * 9 * (3 * 16 + 16 * 16) + 16 * 2


def test_attention_loses_whole_heads() -> None:
    model = create_model("test_vit", 2, False, image_size=32)
    pruned = prune(model, amount=0.5, image_size=32).model
    for before, after in zip(model.backbone.blocks, pruned.backbone.blocks):
        assert after.attn.num_heads == before.attn.num_heads // 2
        assert after.attn.head_dim == before.attn.head_dim
        assert after.attn.qkv.out_features == 3 * after.attn.num_heads * after.attn.head_dim
        assert after.attn.fused_attn == before.attn.fused_attn


@pytest.mark.parametrize("round_to", [4, 16])
def test_widths_are_multiples(round_to: int) -> None:
    pruned = prune(create_model("test_resnet", 2, False), amount=0.4, image_size=32, round_to=round_to).model
    widths = {item.out_channels for item in pruned.modules() if isinstance(item, nn.Conv2d)}
    assert all(width % round_to == 0 for width in widths)


@pytest.mark.parametrize(
    ("wanted", "current", "expected"), [(45, 64, 48), (43, 64, 40), (3, 12, 8), (11, 12, 8), (5, 6, 6), (64, 64, 64)]
)
def test_a_width_is_the_nearest_multiple_never_none_and_never_more(wanted: int, current: int, expected: int) -> None:
    assert rounded_width(wanted, current, 8) == expected


@pytest.mark.parametrize(("current", "expected"), [(16, 8), (24, 16), (32, 16), (64, 48), (128, 96), (256, 176)])
def test_unasked_wide_layers_keep_whole_vectors(current: int, expected: int) -> None:
    assert rounded_width(int(current * 0.7), current, pruning.AUTOMATIC) == expected


@pytest.mark.parametrize("amount", [0.0, -0.1, 0.91, 1.0, float("nan")])
def test_an_amount_out_of_range_is_refused(amount: float) -> None:
    with pytest.raises(ConfigError, match=r"optimization\.pruning_amount: .* above 0 and at most 0\.9"):
        prune(plain(), amount=amount, image_size=16)


def test_an_amount_that_rounds_to_nothing_is_refused() -> None:
    with pytest.raises(ConfigError, match="0.05 of the channels of Plain rounds to none; raise it"):
        prune(plain(), amount=0.05, image_size=16)


def test_the_largest_amount_leaves_a_working_network() -> None:
    pruned = prune(create_model("test_resnet", 2, False).eval(), amount=0.9, image_size=32)
    assert torch.isfinite(pruned.model(torch.randn(1, 3, 32, 32))).all()


@pytest.mark.parametrize("name", ["test_vit_relpos", "test_nfnet"])
def test_a_network_that_cannot_be_pruned_is_named(name: str) -> None:
    with pytest.raises(ConfigError, match=rf"model\.model_type: {name} cannot be pruned \(.*\); optimise it without"):
        prune(create_model(name, 2, False, image_size=64), amount=0.3, image_size=64)


def test_a_frozen_network_is_pruned_into_a_trainable_one() -> None:
    model = create_model("test_resnet", 2, False, freeze_backbone=True)
    pruned = prune(model, amount=0.3, image_size=32).model
    assert all(item.requires_grad for item in pruned.parameters())
    assert not any(item.requires_grad for item in model.backbone.parameters())


# --- batch-norm statistics -------------------------------------------------------------------------------------


def test_recalibrated_statistics_are_those_of_the_films() -> None:
    model = plain()
    films_NBHWC = torch.randint(0, 256, (3, 4, 8, 8, 3), dtype=torch.uint8)
    weights = {name: item.clone() for name, item in model.named_parameters()}
    recalibrate(model, iter(films_NBHWC), spec=SPEC, device=CPU, precision="fp32")
    inputs_NBCHW = ((films_NBHWC.double() / 255 - 0.5) / 0.25).permute(0, 1, 4, 2, 3)
    with torch.no_grad():
        seen = [copy.deepcopy(model.backbone.first).double()(part) for part in inputs_NBCHW]
    norm = model.backbone.norm
    mean, variance = (torch.stack(rows).mean(0) for rows in zip(*[(x.mean((0, 2, 3)), x.var((0, 2, 3))) for x in seen]))
    torch.testing.assert_close(norm.running_mean.double(), mean, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(norm.running_var.double(), variance, atol=1e-5, rtol=1e-4)
    assert norm.momentum == 0.1 and not norm.training
    assert all(torch.equal(item, weights[name]) for name, item in model.named_parameters())


def test_a_network_without_batch_norm_reads_no_films() -> None:
    model = create_model("test_vit", 2, False, image_size=32)
    recalibrate(model, (pytest.fail("read") for _ in range(1)), spec=SPEC, device=CPU, precision="fp32")


# --- fine-tuning -----------------------------------------------------------------------------------------------


def test_the_loss_is_zero_where_student_and_teacher_agree_up_to_a_constant() -> None:
    logits_BC = torch.randn(5, 3)
    assert distillation_loss(logits_BC + 1.5, logits_BC, temperature=2.0).item() == pytest.approx(0, abs=1e-6)


def test_the_loss_is_the_divergence_written_out() -> None:
    student_BC, teacher_BC = torch.randn(6, 3).double(), torch.randn(6, 3).double()
    p, q = (np.exp(x.numpy() / 4.0) for x in (teacher_BC, student_BC))
    p, q = p / p.sum(1, keepdims=True), q / q.sum(1, keepdims=True)
    expected = 16 * (p * np.log(p / q)).sum(1).mean()
    assert distillation_loss(student_BC, teacher_BC, temperature=4.0).item() == pytest.approx(expected, rel=1e-9)


def test_the_teacher_in_its_engine_says_what_torch_says() -> None:
    model = create_model("test_efficientnet", 2, False).eval()
    films_BHWC = np.random.default_rng(0).integers(0, 256, (10, 32, 32, 3), dtype=np.uint8)
    with torch.no_grad():
        expected = model(pruning.InputScaling(SPEC)(torch.from_numpy(films_BHWC))).numpy()
    engine = pruning.teacher_engine(model, SPEC, (32, 32, 3), device=CPU, precision="fp32")
    np.testing.assert_allclose(engine(films_BHWC), expected, atol=1e-4)


@pytest.fixture(scope="module")
def task(trained: Path) -> tuple[train.Prepared, Config]:
    """The trained run's films, model and configuration."""
    content = checkpoint.load(trained / checkpoint.BEST)
    config = config_from_dict(content["config"], source="test")
    prepared = train.prepare(config, random_weights=True)
    load_state(prepared.model, content["model_state_dict"], source="test")
    return prepared, config


def distilled(task: tuple[train.Prepared, Config], *, epochs: int, **changes: float) -> Distilled:
    prepared, config = task
    return prune_and_distil(
        prepared,
        config,
        amount=0.4,
        epochs=epochs,
        device=CPU,
        precision="fp32",
        stop=StopRequest(),
        **changes,
    )


@pytest.fixture(scope="module")
def result(task: tuple[train.Prepared, Config]) -> Distilled:
    return distilled(task, epochs=2)


def test_every_stage_is_measured_and_the_best_is_kept(result: Distilled) -> None:
    assert [stage.name for stage in result.stages] == ["unpruned", "pruned", "recalibrated", "epoch 1", "epoch 2"]
    candidates = {stage.name: stage.validation["auc_roc"] for stage in result.stages[2:]}
    assert candidates[result.best] == max(candidates.values())
    assert result.after.parameters < result.before.parameters
    assert result.stages[-1].films_per_s is not None and result.stages[-1].films_per_s > 0


def test_the_model_is_that_of_the_best_stage(result: Distilled, task: tuple[train.Prepared, Config]) -> None:
    prepared, _ = task
    film_shape = (32, 32, prepared.spec.channels)
    engine = pruning.teacher_engine(result.model, prepared.spec, film_shape, device=CPU, precision="fp32")
    batch = prepared.val_set[Request(0, np.arange(len(prepared.val_set)))]
    figures = pruning.validation_figures(engine(batch.inputs.numpy()), prepared.val_set.labels, positive=1)
    kept: Stage = next(stage for stage in result.stages if stage.name == result.best)
    assert figures["auc_roc"] == pytest.approx(kept.validation["auc_roc"], abs=1e-6)
    assert figures["loss"] == pytest.approx(kept.validation["loss"], abs=1e-4)
    assert not result.model.training


def test_the_teacher_is_left_as_it_was(task: tuple[train.Prepared, Config]) -> None:
    before = copy.deepcopy(task[0].model.state_dict())
    distilled(task, epochs=0)
    assert all(torch.equal(item, before[name]) for name, item in task[0].model.state_dict().items())


def test_the_same_run_gives_the_same_weights(result: Distilled, task: tuple[train.Prepared, Config]) -> None:
    again = distilled(task, epochs=2).model.state_dict()
    assert all(torch.equal(item, again[name]) for name, item in result.model.state_dict().items())


def test_a_student_learns_what_its_teacher_says(
    task: tuple[train.Prepared, Config], monkeypatch: pytest.MonkeyPatch
) -> None:
    prepared, config = task
    monkeypatch.setattr(pruning, "TEACHER_SHARE", 1.0)  # labels have no say
    student = prune(prepared.model, amount=0.4, image_size=32).model
    sure = copy.deepcopy(prepared.model)
    with torch.no_grad():
        sure.head[-1].weight *= 30
    work = pruning.Distillation(
        student,
        dataclasses.replace(prepared, model=sure),
        config,
        epochs=4,
        learning_rate=3e-3,
        device=CPU,
        precision="fp32",
    )
    batch = work.clean_set[Request(0, np.arange(48))]
    teacher_BC = torch.from_numpy(work.teacher(batch.inputs.numpy()))

    def distance() -> float:
        with torch.no_grad():
            return distillation_loss(student.eval()(work.to_input(batch.inputs)), teacher_BC, temperature=2.0).item()

    before = distance()
    average = train.WeightAverage(student, 0.9)
    for epoch in range(1, 5):
        work._train_epoch(epoch, average, StopRequest())
    assert distance() < 0.5 * before


def test_a_signal_ends_fine_tuning_with_nothing_kept(task: tuple[train.Prepared, Config]) -> None:
    prepared, config = task
    stop = StopRequest()
    stop.signal = 15
    with pytest.raises(Interrupted, match="stopped while fine-tuning the pruned model"):
        prune_and_distil(prepared, config, amount=0.4, epochs=1, device=CPU, precision="fp32", stop=stop)


def test_a_loss_that_is_not_finite_stops_with_the_step(task: tuple[train.Prepared, Config]) -> None:
    with pytest.raises(UserError, match=r"loss is (nan|inf) in step \d+ of .*; compute with --precision fp32"):
        distilled(task, epochs=3, learning_rate=1e12)


def test_a_run_with_every_balance_and_loss_goes_through(task: tuple[train.Prepared, Config]) -> None:
    prepared, config = task
    settings = dataclasses.replace(config.training, loss="focal", monitor="loss", monitor_mode="min")
    changed = dataclasses.replace(config, training=settings, data=dataclasses.replace(config.data, balance="sampler"))
    result = distilled((prepared, changed), epochs=1)
    losses = {stage.name: stage.validation["loss"] for stage in result.stages[2:]}
    assert losses[result.best] == min(losses.values())


# --- loading a pruned checkpoint -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name", ["test_resnet", "test_efficientnet", "test_efficientnet_ln", "test_vit", "test_convnext", "dense"]
)
def test_a_pruned_network_is_rebuilt_from_its_weights_alone(name: str) -> None:
    build = dense if name == "dense" else partial(create_model, name, 2, False, image_size=32)
    pruned = prune(build().eval(), amount=0.3, image_size=32).model
    rebuilt = build().eval()
    narrow(rebuilt, pruned.state_dict())
    load_state(rebuilt, pruned.state_dict(), source="test")
    images_BCHW = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        assert torch.equal(rebuilt(images_BCHW), pruned(images_BCHW))
    assert str(rebuilt) == str(pruned)


def test_a_checkpoint_of_a_pruned_network_is_predicted_with(
    result: Distilled, trained: Path, tmp_path: Path, task: tuple[train.Prepared, Config]
) -> None:
    content = {**checkpoint.load(trained / checkpoint.BEST), "model_state_dict": result.model.state_dict()}
    checkpoint.save(tmp_path / "plain.pth", content)
    checkpoint.save(tmp_path / "pruned.pth", {**content, "pruned": {"amount": 0.4}})
    films_BHWC = task[0].val_set[Request(0, np.arange(4))].inputs.numpy()
    loaded = predictor.load(tmp_path / "pruned.pth", device="cpu", precision="fp32")
    expected = TorchEngine(copy.deepcopy(result.model), task[0].spec, device=CPU, precision="fp32")
    np.testing.assert_array_equal(loaded.engine.logits(films_BHWC), expected.logits(films_BHWC))
    with pytest.raises(CheckpointError, match="weights of another architecture"):
        predictor.load(tmp_path / "plain.pth", device="cpu")


def test_foreign_weights_are_still_refused_for_a_pruned_network() -> None:
    model = create_model("test_resnet", 2, False)
    foreign = create_model("test_vit", 2, False, image_size=32).state_dict()
    narrow(model, foreign)
    with pytest.raises(CheckpointError, match="weights of another architecture"):
        load_state(model, foreign, source="test")
