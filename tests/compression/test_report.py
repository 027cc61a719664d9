"""What a report says of a module before and after."""

import copy
import math

import pytest
import torch
from torch import nn

from lightning_memopt.compression.latency import Latency, compare_latencies, compare_latency
from lightning_memopt.compression.report import CompressionReport, compression_report
from lightning_memopt.compression.sizes import measure_sizes


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(64, 32)
        self.head = nn.Linear(32, 64, bias=False)
        self.head.weight = self.embed.weight


def test_bytes_are_those_of_the_tensors_and_a_tied_weight_counts_once():
    sizes = measure_sizes(Tied())
    assert list(sizes) == ["embed"]
    assert sizes["embed"].bytes == 64 * 32 * 4 and sizes["embed"].weights == 64 * 32


def test_buffers_count_in_memory_and_those_that_are_not_saved_do_not_on_disk():
    module = nn.BatchNorm1d(8)
    module.register_buffer("cache", torch.zeros(100), persistent=False)
    size = measure_sizes(module, packed=False)[""]
    assert size.bytes == 4 * 8 * 4 + 8 + 400
    assert size.disk_bytes == size.bytes - 400
    assert size.weights == 16


def test_ratios_and_zeros_are_over_the_whole_module_and_by_module():
    before = nn.Sequential(nn.Linear(32, 32, bias=False), nn.Linear(32, 32, bias=False))
    after = copy.deepcopy(before)
    with torch.no_grad():
        after[0].weight[:16] = 0
    after[1].bfloat16()
    report = compression_report(before, after, skipped={"1.weight": "half"}, eligible_sparsity=0.5)
    assert report.ratio == 0.75 and report.sparsity == 0.25
    assert [module.sparsity for module in report.modules] == [0.5, 0.0]
    assert [module.bytes_after for module in report.modules] == [4096, 2048]
    assert "left alone: 1.weight" in str(report) and "25.0%" in str(report)
    assert report.skipped_bytes == {"1.weight": 2048} and "2.0 KiB" in str(report)


def test_a_module_that_was_changed_in_place_is_compared_with_its_sizes_from_before():
    module = nn.Linear(16, 16)
    sizes = measure_sizes(module, packed=False)
    module.half()
    assert compression_report(sizes, module).ratio == 0.5


def test_a_quantized_tensor_counts_with_its_scales():
    quantization = pytest.importorskip("torchao.quantization")
    before = nn.Sequential(nn.Linear(128, 64))
    after = copy.deepcopy(before)
    quantization.quantize_(after, quantization.Int8WeightOnlyConfig())
    report = compression_report(before, after)
    bias, scales, values = 64 * 4, 64 * 4, 64 * 128
    assert values + bias < report.bytes_after <= values + bias + 2 * scales
    assert report.sparsity < 0.02


def test_a_4_bit_weight_of_bitsandbytes_counts_with_its_scales():
    bitsandbytes = pytest.importorskip("bitsandbytes")
    layer = bitsandbytes.nn.Linear4bit(128, 64, bias=False, quant_type="nf4")
    layer.load_state_dict({"weight": torch.randn(64, 128)})
    layer = layer.to("cpu")
    size = measure_sizes(layer)[""]
    assert 64 * 128 / 2 < size.bytes < 64 * 128 * 0.75
    assert size.weights == 64 * 128


def test_what_is_on_disk_is_what_the_exported_folder_holds(tmp_path):
    (tmp_path / "deep").mkdir()
    (tmp_path / "weights").write_bytes(b"x" * 1000)
    (tmp_path / "deep" / "manifest").write_bytes(b"x" * 24)
    assert compression_report(nn.Linear(2, 2), nn.Linear(2, 2), export_path=tmp_path).disk_bytes_after == 1024


def test_a_report_reads_back_what_it_wrote():
    latency = (compare_latency(nn.Linear(4, 4), nn.Linear(4, 4), torch.ones(2, 4), 2, runs=3),)
    report = compression_report(
        nn.Linear(4, 4),
        nn.Linear(4, 4),
        metrics_before={"val_acc": 0.9},
        metrics_after={"val_acc": 0.8},
        latency=latency,
    )
    assert CompressionReport.from_json(report.to_json()) == report
    assert "val_acc" in str(report) and "0.9000" in str(report) and "batch of 2" in str(report)


def test_it_says_what_takes_longer_than_before():
    times = (Latency(1, 0.001, 0.003, 0.33), Latency(32, 0.02, 0.01, 2.0), Latency(64, 0.02, 0.0201, 1.0))
    shown = str(compression_report(nn.Linear(4, 4), nn.Linear(4, 4), latency=times))
    assert "3.00 slower" in shown and "0.50 faster" in shown
    assert next(line for line in shown.splitlines() if "batch of 64" in line).split()[-2] == "1.00"


def test_both_are_timed_on_one_sample_and_on_all_however_the_example_is_given():
    seen = []

    class Net(nn.Module):
        def forward(self, x, scale, flag=True):
            seen.append((len(x), len(scale), flag, self.training))

    net, x, scale = Net(), torch.ones(3, 2), torch.ones(3)
    for inputs in ((x, scale, False), {"x": x, "scale": scale}):
        seen.clear()
        assert [one.batch_size for one in compare_latencies(net, net, inputs)] == [1, 3]
        flag = not isinstance(inputs, tuple)
        assert set(seen) == {(1, 1, flag, False), (3, 3, flag, False)} and net.training


def test_metrics_that_are_no_numbers_are_written_as_json_that_anything_reads():
    odd = {"loss": float("nan"), "ratio": float("-inf")}
    text = compression_report(nn.Linear(4, 4), nn.Linear(4, 4), metrics_before=odd, metrics_after=odd).to_json()
    assert "NaN" not in text and "Infinity" not in text
    read = CompressionReport.from_json(text).metrics_after
    assert math.isnan(read["loss"]) and read["ratio"] == float("-inf")


def test_names_and_reasons_are_shown_as_they_are_whatever_brackets_they_have():
    net = nn.ModuleDict({"[/red]": nn.Linear(4, 4)})
    reasons = {"[/red].weight": "RuntimeError: [/INST] :smile:"}
    metrics = {"acc[top5]": 0.25, "tiny": 1.25e-7}
    shown = str(compression_report(net, net, skipped=reasons, metrics_before=metrics, metrics_after=metrics))
    assert all(text in shown for text in ("[/red].weight", "[/INST] :smile:", "acc[top5]", "1.2500e-07"))


def test_a_name_that_is_longer_than_its_column_is_shown_to_its_end():
    name = "blocks." * 20 + "end.weight"
    shown = str(compression_report(nn.Linear(4, 4), nn.Linear(4, 4), skipped={name: "why " * 30}))
    rows = (line.split("\u2502")[1].strip() for line in shown.splitlines() if "\u2502" in line)
    assert name in "".join(rows)


def test_what_is_no_report_is_refused():
    for text in ("{}", "[]", "nonsense", '{"modules": [{"name": 1}]}'):
        with pytest.raises(ValueError):
            CompressionReport.from_json(text)


def test_the_picture_is_drawn_for_many_modules_too(tmp_path):
    pytest.importorskip("matplotlib")
    net = nn.Sequential(*(nn.Linear(8, 8) for _ in range(40)))
    path = compression_report(net, net).plot(tmp_path / "new" / "report.png")
    assert path.read_bytes().startswith(b"\x89PNG")


@pytest.mark.filterwarnings("error")  # matplotlib's, of names that leave no room to draw
def test_in_the_picture_long_names_are_shown_by_their_ends_and_no_name_is_a_formula(tmp_path, monkeypatch):
    pytest.importorskip("matplotlib")
    from matplotlib.axis import Axis

    drawn, set_ticks = [], Axis.set_ticks

    def record(axis, ticks, labels=None, **options):
        drawn.append((labels, options))
        return set_ticks(axis, ticks, labels, **options)

    monkeypatch.setattr(Axis, "set_ticks", record)
    net = nn.ModuleDict({"x" * 200 + "_end": nn.Linear(4, 4), "$a$": nn.Linear(2, 2)})
    compression_report(net, net).plot(tmp_path / "report.png")
    ((names, options),) = [call for call in drawn if call[0] is not None]
    assert (
        names[0].endswith("x_end") and len(names[0]) < 60 and names[1] == "$a$" and options == {"parse_math": False}
    )


def test_each_call_is_timed_in_evaluation_without_gradients():
    seen = []
    compare_latency(lambda x: seen.append(torch.is_grad_enabled()), lambda x: None, torch.ones(1), 1, runs=2)
    assert not any(seen) and len(seen) == 5
