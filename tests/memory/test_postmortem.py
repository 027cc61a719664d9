"""What is said after an out-of-memory error: live tensors, remedies, files."""

import gc
import json
from pathlib import Path

import pytest
import torch
from torch import nn
from torch._subclasses import FakeTensorMode
from torch.utils.checkpoint import checkpoint

from lightning_memopt.memory import postmortem
from lightning_memopt.memory.live import LiveTensor, find_live_tensors, sum_by
from lightning_memopt.memory.postmortem import PostMortem, examine, requested_bytes, write_post_mortem
from lightning_memopt.memory.remedies import Remedy, estimate_remedies
from tests.memory.synthetic import MIB, report_of_a_step

FLOAT = 4


class Block(nn.Module):
    """Tanh saves its output, the linear layers their inputs: two hidden states a block."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.rise, self.fall = nn.Linear(width, width), nn.Linear(width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.fall(torch.tanh(self.rise(x)))


def stack(width: int = 512, depth: int = 4) -> nn.Sequential:
    return nn.Sequential(*(Block(width) for _ in range(depth)))


def only_unusual_widths(live, width):
    """Other tests' tensors may still be alive: keep those of this test, told by their width."""
    return [tensor for tensor in live if width in tensor.shape]


def test_each_tensor_of_a_step_is_found_once_under_its_category_and_its_owner():
    net = nn.Sequential(nn.Linear(301, 303), nn.Tanh(), nn.BatchNorm1d(303))
    optimizer = torch.optim.Adam(net.parameters())
    batch = torch.randn(7, 301)
    net(batch).sum().backward()
    optimizer.step()
    loss = net(batch).sum()
    live = [t for t in find_live_tensors(net, [optimizer]) if {301, 303} & set(t.shape)]
    del loss
    found = {(t.category, t.submodule, t.shape) for t in live}
    assert ("parameters", "0", (303, 301)) in found
    assert ("gradients", "0", (303, 301)) in found
    assert ("buffers", "2", (303,)) in found
    assert ("other", "", (7, 301)) in found
    assert ("activations", "0", (7, 303)) in found
    state = [t for t in live if t.category == "optimizer_state" and t.shape == (303, 301)]
    assert [t.submodule for t in state] == ["0", "0"]
    assert sum(t.size_bytes for t in live if t.category == "parameters") == (303 * 301 + 3 * 303) * FLOAT


def test_activations_belong_to_the_block_that_made_them_also_across_residual_sums():
    net = stack(width=307)
    loss = net(torch.randn(5, 307)).sum()
    live = [t for t in find_live_tensors(net) if t.category == "activations" and t.shape == (5, 307)]
    del loss
    by_submodule = sum_by(live, "submodule")
    assert set(by_submodule) == {f"{i}.{name}" for i in range(4) for name in ("rise", "fall")} - {"3.fall"}


def test_a_dropout_mask_that_only_the_graph_holds_is_an_activation():
    net = nn.Sequential(nn.Linear(311, 311), nn.Dropout(0.5)).train()
    loss = net(torch.randn(5, 311)).sum()
    live = only_unusual_widths(find_live_tensors(net), 311)
    del loss
    assert [t.submodule for t in live if t.category == "activations"] == ["0"]


def test_looking_does_not_recompute_what_checkpointing_dropped():
    net, calls = stack(width=313, depth=2), []
    for block in net:
        block.register_forward_hook(lambda *_: calls.append(1))
    loss = checkpoint(net, torch.randn(5, 313, requires_grad=True), use_reentrant=False).sum()
    before = len(calls)
    find_live_tensors(net)
    assert len(calls) == before == 2
    loss.backward()


def test_a_graph_too_deep_to_recurse_is_walked():
    value = torch.randn(317, requires_grad=True)
    deep = value
    for _ in range(5000):
        deep = deep.tanh()
    live = only_unusual_widths(find_live_tensors(nn.Identity()), 317)
    del deep
    assert sum(t.size_bytes for t in live if t.category == "activations") == 5000 * 317 * FLOAT


def test_memory_of_another_device_is_left_out():
    net = nn.Linear(319, 319)
    assert only_unusual_widths(find_live_tensors(net, device_type="cuda"), 319) == []
    assert only_unusual_widths(find_live_tensors(nn.Linear(319, 319, device="meta"), device_type="cpu"), 319)


def test_fake_tensors_hold_no_memory_and_disturb_nothing():
    with FakeTensorMode():
        kept = nn.Sequential(nn.Linear(317, 317))
        kept(torch.randn(2, 317)).sum().backward()
    assert only_unusual_widths(find_live_tensors(kept), 317) == []


def remedy(remedies, name):
    return next((r.saves_bytes for r in remedies if r.technique.startswith(name)), None)


def live_of(category, size, shape=(1,), submodule="", dtype="float32"):
    return LiveTensor(size, shape, dtype, category, submodule)


def test_full_checkpointing_keeps_the_inputs_and_one_block():
    live = [live_of("activations", MIB, submodule=f"{i}.rise") for i in range(4) for _ in range(6)]
    assert remedy(estimate_remedies(live, stack(8)), "ActivationCheckpointing") == (24 - 6 - 4) * MIB


def test_what_is_already_saved_is_not_offered():
    live = [live_of("activations", MIB, submodule=f"{i}.rise") for i in range(4)]
    assert remedy(estimate_remedies(live, stack(8)), "ActivationCheckpointing") is None
    assert remedy(estimate_remedies([live_of("parameters", MIB)], nn.Linear(1, 1)), "LowBitOptimizer") is None


def test_eight_bit_state_saves_three_quarters_of_32_bit_state_and_nothing_of_8_bit_state():
    live = [live_of("optimizer_state", 8 * MIB), live_of("optimizer_state", 100 * MIB, dtype="uint8")]
    assert remedy(estimate_remedies(live, nn.Linear(1, 1)), "LowBitOptimizer") == 6 * MIB


def test_stepping_in_the_backward_frees_all_gradients_but_the_largest():
    live = [live_of("gradients", size * MIB) for size in (5, 3, 2)]
    assert remedy(estimate_remedies(live, nn.Linear(1, 1)), "OptimizerInBackward") == 5 * MIB


def test_a_chunked_loss_saves_the_tensors_as_wide_as_the_vocabulary():
    net = nn.ModuleList([nn.Embedding(1000, 8), nn.Linear(8, 1000)])
    live = [live_of("activations", 16 * MIB, shape=(4, 1000)), live_of("activations", 7 * MIB, shape=(4, 999))]
    assert remedy(estimate_remedies(live, net), "ChunkedLoss") == 15 * MIB
    assert remedy(estimate_remedies(live, nn.Linear(8, 1000)), "ChunkedLoss") is None


def test_half_the_batch_halves_activations_and_temporaries_and_the_most_helpful_stands_first():
    live = [live_of("activations", 60 * MIB), live_of("temporaries", 20 * MIB), live_of("optimizer_state", MIB)]
    remedies = estimate_remedies(live, nn.Linear(1, 1))
    assert remedy(remedies, "MicroBatching") == 40 * MIB
    assert remedy(estimate_remedies(live, nn.Linear(1, 1), 10 * MIB), "MicroBatching") == 45 * MIB
    assert [r.saves_bytes for r in remedies] == sorted((r.saves_bytes for r in remedies), reverse=True)


@pytest.mark.parametrize(
    ("message", "size"),
    [
        ("DefaultCPUAllocator: can't allocate memory: you tried to allocate 4000000000 bytes. Error", 4_000_000_000),
        ("CUDA out of memory. Tried to allocate 20.50 MiB. GPU 0 has a total capacity", int(20.5 * MIB)),
        ("std::bad_alloc", None),
    ],
)
def test_the_size_asked_for_is_read_from_the_message(message, size):
    assert requested_bytes(message) == size


def test_the_tensors_of_the_failed_step_are_in_the_post_mortem():
    gc.collect()  # what other tests left is larger
    net = stack(width=331)

    def step():
        hidden = net(torch.randn(8192, 331))
        return hidden, torch.empty(2**60)

    try:
        step()
    except RuntimeError as error:
        found = examine(error, net, last_report=report_of_a_step())
    activations = [t for t in found.largest if t.category == "activations" and t.shape == (8192, 331)]
    assert activations
    assert found.requested_bytes == 2**62
    assert found.by_category["activations"] >= 8 * 8192 * 331 * FLOAT
    assert found.found_bytes == sum(found.by_category.values()) == sum(found.by_submodule.values())


def test_an_allocation_that_fails_in_the_optimizer_does_not_count_as_growing_with_the_batch():
    net = nn.Linear(337, 337)

    class Greedy(torch.optim.SGD):
        def step(self, closure=None):
            torch.empty(2**60)

    def fail(action):
        try:
            action()
        except RuntimeError as error:
            return examine(error, net).remedies

    net(torch.randn(3, 337)).sum().backward()
    optimizer = Greedy(net.parameters())
    assert remedy(fail(lambda: torch.empty(2**60)), "MicroBatching") >= 2**61
    assert (remedy(fail(optimizer.step), "MicroBatching") or 0) < 2**40


def test_state_that_could_not_be_made_counts_among_what_fewer_bits_save(monkeypatch):
    net = nn.Linear(337, 337)
    net(torch.randn(3, 337)).sum().backward()

    def fails(*_, **__):
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 40000000 bytes.")

    monkeypatch.setattr(torch, "zeros_like", fails)
    try:
        torch.optim.AdamW(net.parameters()).step()
    except RuntimeError as error:
        remedies = examine(error, net).remedies
    assert remedy(remedies, "LowBitOptimizer") == 30_000_000


def test_what_a_module_that_optimizes_by_itself_or_a_validation_cannot_use_is_not_named():
    live = [live_of("gradients", 4 * MIB), live_of("gradients", 4 * MIB), live_of("activations", 8 * MIB)]
    manual = nn.Linear(1, 1)
    manual.automatic_optimization = False
    found = estimate_remedies(live, manual)
    assert remedy(found, "OptimizerInBackward") is None and remedy(found, "MicroBatching") is None
    assert remedy(found, "techniques.micro_batching.backward_in_micro_batches") == 4 * MIB
    assert remedy(estimate_remedies(live, nn.Linear(1, 1)), "MicroBatching") == 4 * MIB
    validating = estimate_remedies(live, nn.Linear(1, 1), is_training=False)
    assert remedy(validating, "MicroBatching") is None and remedy(validating, "Half the batch_size") == 4 * MIB


def test_the_input_of_the_operation_that_failed_names_the_submodule_that_made_it():
    net = nn.Sequential(nn.Linear(347, 349))
    hidden = net(torch.randn(3, 347))
    live = [t for t in find_live_tensors(net) if t.shape == (3, 349)]
    assert [(t.category, t.submodule) for t in live] == [("activations", "0")]
    del hidden


def a_post_mortem():
    return PostMortem(
        error="RuntimeError: <b>no</b>",
        device="cpu",
        requested_bytes=3 * MIB,
        found_bytes=2 * MIB,
        by_category={"activations": 2 * MIB},
        by_submodule={f"net.{i}": MIB for i in range(30)},
        largest=(live_of("activations", 2 * MIB, (4, 8), "net.0"),),
        remedies=(Remedy("ChunkedLoss()", MIB, "half of it"),),
        last_report=report_of_a_step(),
    )


def test_text_json_and_html_are_written(tmp_path):
    paths = write_post_mortem(a_post_mortem(), tmp_path / "new")
    assert [path.name for path in paths] == ["out_of_memory.txt", "out_of_memory.json", "out_of_memory.html"]
    text, data, html = (path.read_text() for path in paths)
    for words in ("3.0 MiB", "ChunkedLoss()", "4x8", "net.0", "10 others", "879.0 MiB"):
        assert words in text and words in html
    assert "<b>" not in html.split("<body>")[1]
    assert json.loads(data)["largest"][0] == {
        "size_bytes": 2 * MIB,
        "shape": [4, 8],
        "dtype": "float32",
        "category": "activations",
        "submodule": "net.0",
    }


def test_the_text_is_there_even_when_the_page_does_not_fit_in_memory(tmp_path, monkeypatch):
    def no_memory(*_, **__):
        raise MemoryError

    monkeypatch.setattr(postmortem, "page", no_memory)
    assert [path.name for path in write_post_mortem(a_post_mortem(), tmp_path)] == [
        "out_of_memory.txt",
        "out_of_memory.json",
    ]
    assert Path(tmp_path / "out_of_memory.txt").read_text().startswith("Out of memory\n")


def test_a_nested_tensor_that_the_user_holds_is_listed_with_its_elements():
    nested = torch.nested.nested_tensor([torch.ones(311), torch.ones(313)])
    live = find_live_tensors(nn.Linear(2, 2))
    assert [tensor.size_bytes for tensor in live if tensor.shape == (nested.numel(),)] == [4 * 624]
