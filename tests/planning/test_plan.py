"""Plans fit as they say, are the same each time, and say what would fit where nothing does."""

import json
from dataclasses import replace
from pathlib import Path

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.cli import LightningCLI
from lightning.pytorch.profilers import SimpleProfiler
from torch import nn
from torch.nn import functional as F

import lightning_memopt as memopt
from lightning_memopt.parallel.mesh import MeshSizes
from lightning_memopt.planning.plan import Plan, PlanResult, describe_failure
from lightning_memopt.planning.read_module import read_space
from lightning_memopt.planning.space import Layout
from lightning_memopt.planning.units import parse_bytes
from lightning_memopt.planning.written import result_as_dict
from tests.planning.a_cpu import A_CPU
from tests.zoo import ZOO

KIB = 2**10
TIGHT = 450 * KIB


class Deep(pl.LightningModule):
    """Mostly activations: checkpointing and micro-batches both help."""

    def __init__(self, blocks: int = 2, width: int = 32) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.Linear(width, width), nn.GELU(), nn.Linear(width, width)) for _ in range(blocks)
        )

    def training_step(self, batch, batch_idx):
        x, y = batch
        for block in self.blocks:
            x = x + block(x)
        return F.mse_loss(x, y)

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=1e-3)


def _batch(samples: int = 512, width: int = 32):
    generator = torch.Generator().manual_seed(0)
    return torch.randn(samples, width, generator=generator), torch.randn(samples, width, generator=generator)


def _plan(budget, module=None, batch=None, **options) -> PlanResult:
    return memopt.plan(module or Deep(), batch or _batch(), budget=budget, device=A_CPU, **options)


@pytest.fixture(scope="module")
def tight() -> PlanResult:
    return _plan(TIGHT)


def test_where_there_is_room_nothing_is_switched_on():
    result = _plan("1GiB")
    assert result.best.callbacks() == []
    assert result.best.relative_time == pytest.approx(1.0)
    assert all(plan.fits for plan in result.plans)


def test_the_chosen_plan_fits_when_it_is_measured_and_as_exactly_as_it_says(tight):
    best = tight.best
    measured = memopt.measure_memory(Deep(), _batch(), callbacks=best.callbacks()).peak_bytes
    assert best.fits and measured <= TIGHT
    assert best.peak_bytes == pytest.approx(measured, rel=0.01)
    assert sum(best.by_category.values()) == best.peak_bytes


def test_micro_batches_are_left_out_where_samples_ignore_unequal_numbers_of_labels():
    labels = torch.ones(4, 5, dtype=torch.long)
    assert read_space(Deep(), {"labels": labels}, "32-true", {}).micro_batches
    labels[:, 3:] = -100
    assert read_space(Deep(), {"labels": labels}, "32-true", {}).micro_batches
    labels[0, 2] = -100
    assert not read_space(Deep(), {"labels": labels}, "32-true", {}).micro_batches


def test_plans_are_ranked_by_time_and_those_that_fit_come_first(tight):
    fitting = [plan.relative_time for plan in tight.plans if plan.fits]
    assert tight.chosen == 0 and fitting == sorted(fitting) and len(fitting) > 1
    assert [plan.fits for plan in tight.plans] == sorted((plan.fits for plan in tight.plans), reverse=True)
    for plan in tight.plans:
        assert sum(plan.time_parts.values()) == pytest.approx(plan.relative_time)


def test_a_plan_says_what_each_of_its_techniques_bought(tight):
    assert tight.best.bought
    assert all(sentence.endswith("% time") and "iB for" in sentence for sentence in tight.best.bought)


def test_planning_twice_gives_the_same_plans(tight):
    assert _plan(TIGHT) == tight


@pytest.mark.slow
def test_where_nothing_fits_the_smallest_budget_that_would_is_said_and_is_right():
    result = _plan(200 * KIB)
    assert result.chosen is None and not any(plan.fits for plan in result.plans)
    assert "the smallest budget" in describe_failure(result)
    assert _plan(result.smallest_bytes).best is not None


@pytest.mark.parametrize("count", [4228016, 2**20, 1000, 5 * 2**30 + 1])
def test_the_smallest_budget_is_said_so_that_what_is_said_fits(count):
    nothing = PlanResult((), None, 1000, smallest_bytes=count)
    said = describe_failure(nothing).rpartition(" is ")[2]
    assert count <= parse_bytes(said) <= 1.03 * count


@pytest.mark.slow
def test_what_changes_the_numbers_is_only_taken_where_nothing_else_fits():
    module, batch = Deep(3, 256), _batch(4, 256)
    exact = min(plan.peak_bytes for plan in _plan("1MiB", module, batch, exact=True).plans)
    result = _plan(exact - 1, module, batch)
    assert result.best is not None and (
        result.best.choice.techniques.low_bit or result.best.choice.techniques.precision != "32-true"
    )


def test_a_loss_in_chunks_that_saves_time_as_well_is_part_of_every_plan(monkeypatch):
    monkeypatch.setattr(
        "lightning_memopt.planning.plan.seconds_per_batch",
        lambda trace, choice, *_: {"compute": 1.0 if choice.techniques.chunked_loss else 1.25},
    )
    entry = ZOO["gpt2"]
    best = memopt.plan(entry.build(), entry.batch(64), budget="1GiB", device=A_CPU, exact=True).best
    assert best.choice.techniques.chunked_loss
    assert best.bought[0] == "chunked loss: 0 B for -20% time"


@pytest.mark.slow
def test_batches_are_not_split_where_batch_norm_sees_them_nor_under_manual_optimization():
    for name in ("cnn", "gan"):
        entry = ZOO[name]
        result = _plan("200KiB", entry.build(), entry.batch(), exact=True)
        assert all(plan.choice.techniques.micro_batch is None for plan in result.plans), name


def test_a_gradient_norm_that_is_clipped_leaves_the_optimizer_out_of_the_backward():
    for options, possible in (({}, True), ({"gradient_clip_val": 1.0}, False)):
        assert read_space(Deep(), _batch(), "32-true", options).in_backward == possible


def test_the_plan_as_python_makes_the_trainer_that_was_planned(tight):
    namespace: dict = {}
    exec(tight.best.python(), namespace)
    made = [type(c) for c in namespace["trainer"].callbacks if type(c).__module__.startswith("lightning_memopt")]
    assert made == [type(callback) for callback in tight.best.callbacks()]


@pytest.mark.parametrize("form", ["python", "yaml"])
def test_what_is_pasted_has_the_options_of_the_trainer_that_it_was_planned_with(form, tmp_path):
    options = {"gradient_clip_val": 0.5, "gradient_clip_algorithm": "value", "profiler": SimpleProfiler()}
    best = _plan("1GiB", **options).best
    trainer = _paste(best, form, tmp_path)
    assert (trainer.gradient_clip_val, trainer.gradient_clip_algorithm) == (0.5, "value")


def test_the_plan_as_yaml_configures_lightnings_command_line(tight, tmp_path):
    callbacks = tight.best.callbacks()
    trainer = _paste(tight.best, "yaml", tmp_path)
    assert trainer.num_devices == 1 and callbacks
    assert {type(callback) for callback in callbacks} <= {type(callback) for callback in trainer.callbacks}


def test_a_mesh_as_yaml_configures_lightnings_command_line(tight, tmp_path):
    layout = Layout("memopt_hybrid", MeshSizes(shard=2, tensor=2))
    plan = replace(tight.best, devices=4, choice=replace(tight.best.choice, layout=layout))
    strategy = _paste(plan, "yaml", tmp_path).strategy
    assert isinstance(strategy, memopt.HybridStrategy) and (strategy.sizes.shard, strategy.sizes.tensor) == (2, 2)


def _paste(plan: Plan, form: str, folder: Path) -> pl.Trainer:
    """The trainer that a user has who pastes ``plan``."""
    if form == "python":
        namespace: dict = {}
        exec(plan.python(), namespace)
        return namespace["trainer"]
    (folder / "trainer.yaml").write_text(plan.yaml())
    return LightningCLI(Deep, run=False, args=["--config", str(folder / "trainer.yaml")]).trainer


def test_the_json_has_what_programs_read(tight):
    read = json.loads(json.dumps(result_as_dict(tight)))
    assert read["chosen"] == 0
    assert {"strategy", "callbacks", "peak_bytes", "by_category", "relative_time", "fits"} <= read["plans"][0].keys()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"budget": "24G"}, "two ways"),
        ({"budget": "1GiB", "device": "h1000"}, "h100"),
        ({"budget": "1GiB", "batch": None}, "given None for a batch"),
        ({"budget": "4KB"}, r"one block: `blocks.0` has 4.1 KiB \(4,224 bytes\)"),
        ({"budget": "8KiB", "exact": True}, r"one block: `blocks.0` has 8.2 KiB \(8,448 bytes\)"),
    ],
)
def test_bad_input_is_refused_by_name(options, message):
    with pytest.raises(ValueError, match=message):
        memopt.plan(Deep(), **({"batch": _batch(), "device": A_CPU} | options))


@pytest.mark.slow
def test_a_deep_model_is_predicted_from_few_of_its_blocks_to_the_byte():
    from lightning_memopt.planning.space import Choice, Layout, Techniques
    from lightning_memopt.planning.trace import StepTracer

    module, batch = Deep(9), _batch(64)
    tracer = StepTracer(module, module, batch, {})
    for techniques in (Techniques(), Techniques("full"), Techniques("selective", micro_batch=16)):
        choice = Choice(Layout(), techniques)
        folded, whole = tracer._of_few_blocks(choice), tracer._run(choice)
        assert folded is not None and folded.peak.total_bytes == whole.peak.total_bytes
        assert sum(c.flops * c.times for c in folded.operators) == sum(c.flops * c.times for c in whole.operators)
        assert sum(c.times for c in folded.operators) == sum(c.times for c in whole.operators)
    assert len(module.blocks) == 9


@pytest.mark.slow
def test_a_model_that_counts_on_all_of_its_blocks_is_traced_whole():
    class Counts(Deep):
        def training_step(self, batch, batch_idx):
            return super().training_step(batch, batch_idx) + 0 * self.blocks[8][0].weight.sum()

    batch = _batch(64)
    result = _plan("1GiB", Counts(9), batch)
    assert result.best.peak_bytes == memopt.predict_memory(Counts(9), batch).peak_bytes


class NamesItsRates(Deep):
    """Reads values while it is built, as models with stochastic depth do."""

    def __init__(self, width: int = 32) -> None:
        super().__init__(2, width)
        self.rates = [rate.item() for rate in torch.linspace(0, 0.5, 2)]


class KeepsWhatIsPositive(Deep):
    """A step whose shapes depend on values."""

    def training_step(self, batch, batch_idx):
        x, y = batch
        kept = (x[:, 0] > 0).nonzero().flatten()
        return super().training_step((x[kept], y[kept]), batch_idx)


def test_a_module_that_reads_values_while_it_is_built_is_built_for_real_if_it_is_small():
    result = _plan("1GiB", NamesItsRates)
    assert result.best.peak_bytes == memopt.predict_memory(Deep(), _batch()).peak_bytes


def test_a_large_module_that_reads_values_while_it_is_built_is_refused_with_the_operator_and_the_line():
    with pytest.raises(
        ValueError, match=r"makes the module .*test_plan.py:\d+ runs aten._local_scalar_dense.* 1.00 GiB"
    ):
        memopt.plan(lambda: NamesItsRates(2**15), _batch(), budget="80GB", device=A_CPU)


def test_a_small_step_that_depends_on_values_is_planned_from_runs_on_real_tensors():
    batch = _batch()
    result = _plan("1GiB", KeepsWhatIsPositive(), batch)
    measured = memopt.measure_memory(KeepsWhatIsPositive(), batch)
    assert result.best.peak_bytes == pytest.approx(measured.peak_bytes, rel=0.01)
    assert any("aten.nonzero" in note and "measured" in note for note in result.notes)


def test_so_is_one_that_a_function_makes():
    batch = _batch()
    result = _plan("1GiB", KeepsWhatIsPositive, batch)
    measured = memopt.measure_memory(KeepsWhatIsPositive, batch)
    assert result.best.peak_bytes == pytest.approx(measured.peak_bytes, rel=0.01)


def test_one_whose_parameters_have_no_values_is_refused_with_the_operator_and_the_line():
    with pytest.raises(ValueError, match=r"KeepsWhatIsPositive cannot .*test_plan.py:\d+ runs aten.nonzero"):
        _plan("1GiB", KeepsWhatIsPositive().to("meta"))


def test_a_large_step_that_depends_on_values_is_refused_with_the_operator_and_the_line():
    with pytest.raises(ValueError, match=r"KeepsWhatIsPositive cannot .*test_plan.py:\d+ runs aten.nonzero"):
        memopt.plan(lambda: KeepsWhatIsPositive(2, 2**14), _batch(4, 2**14), budget="80GB", device=A_CPU)
