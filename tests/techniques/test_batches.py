"""Splitting: each shape of batch that a collate function returns comes out whole, in parts of its own type."""

from collections import OrderedDict, defaultdict, namedtuple
from collections.abc import MutableMapping
from dataclasses import dataclass, field
from functools import cached_property
from types import MappingProxyType
from typing import Any

import pytest
import torch
from torch.nn.utils.rnn import pack_sequence
from transformers import BatchEncoding

from lightning_memopt.techniques.batches import CannotCut, batch_size, detached, merge_outputs, micro_batches, weigh

Pair = namedtuple("Pair", ["x", "y"])


@dataclass(frozen=True)
class Frozen:
    x: torch.Tensor
    name: str = "train"
    nothing: Any = None
    derived: Any = field(init=False)

    def __post_init__(self):
        object.__setattr__(self, "derived", self.x * 2)


def rows(count=5):
    return torch.arange(count * 2).reshape(count, 2)


BATCHES = {
    "tensor": rows(),
    "list": [rows(), rows()[:, 0]],
    "tuple": (rows(), rows()),
    "named tuple": Pair(rows(), rows()),
    "dict": {"x": rows(), "scale": torch.tensor(2.0), "n": 3, "none": None},
    "ordered dict": OrderedDict(x=rows()),
    "default dict": defaultdict(list, {"x": rows()}),
    "batch encoding": BatchEncoding({"input_ids": rows(), "attention_mask": rows()}),
    "dataclass": Frozen(rows()),
    "nested": {"a": [Pair(rows(), {"b": rows()}), (rows(),)], "name": "x"},
    "strings": {"x": rows(), "texts": list("abcde"), "shape": (224, 224)},
    "a dict a sample": (rows(), tuple({"boxes": torch.ones(n, 4)} for n in (1, 5, 0, 2, 5))),
    "loaders": [{"x": rows()}, {"x": rows()}],
    "lists only": {"texts": list("abcde"), "ids": [1, 2, 3, 4, 5]},
}


@pytest.mark.parametrize("name", BATCHES)
def test_the_parts_are_of_the_batchs_type_and_have_each_sample_once_in_order(name):
    batch = BATCHES[name]
    parts = micro_batches(batch, 2)
    assert batch_size(batch) == 5
    assert [batch_size(part) for part in parts] == [2, 2, 1]
    assert all(type(part) is type(batch) for part in parts)
    assert flat(joined(parts)) == flat(batch)


def joined(parts):
    """Put parts back together, knowing nothing of how they were cut."""
    first = parts[0]
    if isinstance(first, torch.Tensor):
        return torch.cat(parts) if first.ndim else first
    if isinstance(first, dict | BatchEncoding):
        return {key: joined([part[key] for part in parts]) for key in first}
    if isinstance(first, Frozen):
        return joined([part.__dict__ for part in parts])
    if isinstance(first, list | tuple):
        per_sample = not isinstance(first[0], torch.Tensor | tuple) and not (
            isinstance(first[0], dict) and "x" in first[0]
        )
        if per_sample and len({len(part) for part in parts}) > 1:
            return [item for part in parts for item in part]
        return first if per_sample else [joined(items) for items in zip(*parts, strict=True)]
    return first


def flat(item):
    if isinstance(item, torch.Tensor):
        return item.tolist()
    if isinstance(item, dict | BatchEncoding):
        return {key: flat(value) for key, value in item.items()}
    if isinstance(item, Frozen):
        return flat(item.__dict__)
    if isinstance(item, list | tuple) and not isinstance(item, str):
        return [flat(value) for value in item]
    return item


def images(count, channels=3, same=False):
    return [torch.ones(channels, 8, 8 if same else 8 + index) for index in range(count)]


def boxes(count):
    return [{"boxes": torch.ones(index, 4), "labels": torch.ones(index)} for index in range(count)]


@pytest.mark.parametrize(
    "batch",
    [
        (images(5), boxes(5)),
        (tuple(images(5)), tuple(boxes(5))),
        (images(5, same=True), boxes(5)),
        (images(5, channels=5), boxes(5)),
        {"images": images(5), "targets": boxes(5), "names": list("abcde")},
        (images(5), torch.arange(5)),
        (images(5), images(5, channels=1)),
    ],
    ids=["lists", "tuples", "one size", "as many channels", "dict", "labels", "masks"],
)
def test_a_list_of_one_image_a_sample_is_cut_by_samples(batch):
    parts = micro_batches(batch, 2)
    fields = [list(part.values()) if isinstance(part, dict) else part for part in parts]
    for index, field_ in enumerate(batch.values() if isinstance(batch, dict) else batch):
        cut = [item for part in fields for item in part[index]]
        assert [len(part[index]) for part in fields] == [2, 2, 1]
        assert all(
            torch.equal(a, b) if isinstance(a, torch.Tensor) else a is b for a, b in zip(cut, field_, strict=True)
        )


def test_two_views_of_each_sample_are_a_container_also_in_a_last_batch_of_two():
    views = [torch.ones(2, 3, 8, 8), torch.ones(2, 3, 4, 4)]
    first, second = micro_batches((views, torch.arange(2)), 1)
    assert [view.shape[0] for view in (*first[0], *second[0])] == [1, 1, 1, 1]


def test_a_list_of_tensors_that_may_be_samples_or_parts_is_refused():
    with pytest.raises(ValueError, match=r"3 dicts.*one tensor a sample or of all samples in each; give `split=`"):
        micro_batches((images(3, same=True), boxes(3)), 1)
    assert batch_size((images(3, same=True), boxes(3))) == 3


@pytest.mark.parametrize(
    ("batch", "kind"),
    [
        ([(image, torch.tensor(1)) for image in images(8)], "tuple"),
        ([[image, image[:, :4]] for image in images(8)], "list"),
        ([{"image": image, "label": 1} for image in images(8)], "dict"),
    ],
    ids=["images and labels", "images and masks", "dicts"],
)
@pytest.mark.parametrize("size", [2, 4])
def test_a_list_of_one_pair_a_sample_is_refused_rather_than_cut_along_channels(batch, kind, size):
    sentence = rf"list of 8 {kind}s, in each of which tensors have 3 rows, .*give `split=`"
    with pytest.raises(ValueError, match=sentence):
        micro_batches(batch, size)


def test_batches_of_several_loaders_that_have_unequally_many_samples_are_refused_by_name():
    batch = {"a": [torch.zeros(8, 16), torch.zeros(8).long()], "b": [torch.zeros(4, 16), torch.zeros(4).long()]}
    with pytest.raises(CannotCut, match=r"disagree .* \(batch\['a'\]\[0\]: 8, .*batch\['b'\]\[0\]: 4"):
        micro_batches(batch, 2)


def test_a_list_of_a_batch_from_each_of_several_loaders_is_cut_in_each():
    parts = micro_batches([(torch.ones(3, 4), torch.ones(3)), (torch.zeros(3, 2), torch.zeros(3))], 2)
    assert [[len(tensor) for pair in part for tensor in pair] for part in parts] == [[2] * 4, [1] * 4]


def test_a_part_of_a_dataclass_has_nothing_cached_of_the_whole():
    @dataclass
    class Batch:
        x: torch.Tensor

        @cached_property
        def total(self):
            return self.x.sum()

    batch = Batch(rows())
    assert batch.total == sum(part.total for part in micro_batches(batch, 2)) == 45
    assert "total" in vars(batch)


def test_a_tensor_beside_the_fields_of_a_dataclass_is_refused():
    batch = Frozen(rows())
    object.__setattr__(batch, "beside", rows())
    with pytest.raises(ValueError, match=r"batch is a Frozen that holds tensors \(beside\).*fields.*give `split=`"):
        micro_batches(batch, 2)


def test_what_is_said_of_the_whole_batch_is_in_each_part():
    first, *_ = micro_batches(BATCHES["dict"] | {"shape": [224, 224]}, 2)
    assert first["scale"] == 2.0
    assert first["n"] == 3
    assert first["none"] is None
    assert first["shape"] == [224, 224]


def test_parts_share_memory_with_the_batch():
    batch = rows()
    micro_batches(batch, 2)[1].fill_(-1)
    assert batch[2:4].eq(-1).all()


def test_the_batch_is_left_as_it_is():
    batch = {"x": rows()}
    micro_batches(batch, 2)[0]["x"] = None
    assert batch["x"].shape == (5, 2)


class Wrapper(MutableMapping):
    """Keeps its items in a dict, which ``copy.copy`` shares."""

    def __init__(self, items):
        self.items_by_key = items

    def __getitem__(self, key):
        return self.items_by_key[key]

    def __setitem__(self, key, value):
        self.items_by_key[key] = value

    def __delitem__(self, key):
        del self.items_by_key[key]

    def __iter__(self):
        return iter(self.items_by_key)

    def __len__(self):
        return len(self.items_by_key)


class NamedWrapper(Wrapper):
    def __init__(self, items, name):
        super().__init__(items)


class EmptyWrapper(Wrapper):
    def __init__(self, items=()):
        super().__init__({})


@pytest.mark.parametrize("kind", [Wrapper, MappingProxyType])
def test_a_mapping_of_unknown_type_is_cut_and_left_as_it_is(kind):
    batch = kind({"x": rows(), "inner": kind({"y": rows()})})
    parts = micro_batches(batch, 2)
    assert all(type(part) is kind and type(part["inner"]) is kind for part in parts)
    assert flat([part["x"] for part in parts]) == [rows()[:2].tolist(), rows()[2:4].tolist(), rows()[4:].tolist()]
    assert flat(torch.cat([part["inner"]["y"] for part in parts])) == rows().tolist()
    assert batch["x"].shape == batch["inner"]["y"].shape == (5, 2)


def test_a_mapping_that_cannot_be_made_from_a_dict_is_refused_and_left_as_it_is():
    empty = EmptyWrapper()
    empty["x"] = rows()
    for batch, problem in ((NamedWrapper({"x": rows()}, "train"), "TypeError.*name"), (empty, "other keys")):
        with pytest.raises(ValueError, match=f"a {type(batch).__name__}, a mapping that.*{problem}.*give `split=`"):
            micro_batches(batch, 2)
        assert batch["x"].shape == (5, 2)


@pytest.mark.parametrize("size", [5, 6, 1000])
def test_a_batch_no_larger_than_a_part_is_itself(size):
    batch = BATCHES["nested"]
    assert micro_batches(batch, size)[0] is batch


class Custom:
    def __init__(self):
        self.x = rows()


@pytest.mark.parametrize(
    ("batch", "sentence"),
    [
        ({"x": rows(), "y": {"z": rows(4)}}, r"batch\['x'\]: 5, batch\['y'\]\['z'\]: 4"),
        (Custom(), "batch is a Custom that holds tensors"),
        ({"a": Custom(), "x": rows()}, r"batch\['a'\] is a Custom that holds tensors \(x\)"),
        (3, "the batch, a int, holds no tensor"),
        ({"x": torch.tensor(1.0)}, "the batch, a dict, holds no tensor"),
        (pack_sequence([rows(3), rows(2)]), "PackedSequence"),
        ([torch.nested.nested_tensor([torch.ones(2), torch.ones(3)])], r"batch\[0\] is a nested tensor"),
    ],
)
def test_a_batch_that_cannot_be_cut_is_refused_with_where_and_what_to_give(batch, sentence):
    with pytest.raises(ValueError, match=sentence) as caught:
        micro_batches(batch, 2)
    assert "split=" in str(caught.value)


def test_a_size_below_one_is_refused():
    with pytest.raises(ValueError, match="of 0 samples"):
        micro_batches(rows(), 0)


def test_outputs_are_concatenated_averaged_or_listed():
    outputs = [
        {
            "logits": torch.ones(size, 2),
            "norm": torch.tensor(norm),
            "all": torch.ones(9, 2),
            "n": size,
            "pair": (rows(size),),
        }
        for size, norm in ((3, 1.0), (1, 5.0))
    ]
    merged = merge_outputs(outputs, [3, 1], [0.75, 0.25])
    assert merged["logits"].shape == (4, 2)
    assert merged["norm"] == 2.0
    assert isinstance(merged["all"], list)
    assert merged["n"] == [3, 1]
    assert merged["pair"][0].shape == (4, 2)


def test_detached_reaches_into_containers():
    leaf = torch.ones(2, requires_grad=True)
    result = detached({"a": [leaf * 2], "b": Pair(leaf, 1)})
    assert not result["a"][0].requires_grad
    assert not result["b"].x.requires_grad


@pytest.mark.parametrize("zero", [0, torch.tensor(0)])
def test_a_mean_over_nothing_that_weighs_nothing_gives_no_gradient_rather_than_nan(zero):
    logits = torch.zeros(2, 3, requires_grad=True)
    loss = torch.nn.functional.cross_entropy(logits, torch.full((2,), -100))
    assert loss.isnan()
    weighed = weigh(loss, zero)
    weighed.backward()
    assert weighed == 0
    assert logits.grad.eq(0).all()
