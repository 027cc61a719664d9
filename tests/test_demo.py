"""The demo: its text, its model, and a whole small run from the command line."""

import pytest
import torch

from lightning_memopt.demo.data import Windows, standard_library
from lightning_memopt.demo.model import GPT
from lightning_memopt.demo.presets import PRESETS
from lightning_memopt.demo.run import _build


def test_the_text_is_python_source_split_by_file_and_the_same_each_time():
    first, second = standard_library(), standard_library()
    assert torch.equal(first.training, second.training) and torch.equal(first.held_out, second.held_out)
    assert b"def " in bytes(first.training.numpy()) and b"def " in bytes(first.held_out.numpy())
    assert first.files[0] > 8 * first.files[1] > 0


def test_no_held_out_file_is_trained_on(tmp_path):
    for number in range(25):
        (tmp_path / f"m{number:02}.py").write_text(f"<{number:02}>")
    corpus = standard_library(tmp_path)
    assert bytes(corpus.held_out.numpy()) == b"<09>\n<19>"
    assert corpus.files == (23, 2)
    assert b"<09>" not in bytes(corpus.training.numpy())


def test_a_library_without_sources_is_named(tmp_path):
    with pytest.raises(ValueError, match=f"{tmp_path} holds 0 Python source files"):
        standard_library(tmp_path)


def test_windows_are_slices_of_the_text_at_places_set_by_the_seed():
    text = torch.arange(100, dtype=torch.uint8)
    same, again, other = (Windows(text, 10, 50, seed) for seed in (1, 1, 2))
    assert all(torch.equal(a, b) for a, b in zip(same, again, strict=True))
    assert not torch.equal(same.starts, other.starts)
    for index in range(50):
        window = same[index]
        assert window.dtype == torch.int64 and torch.equal(window.diff(), torch.ones(9, dtype=torch.int64))
    with pytest.raises(ValueError, match="5 bytes, and one window needs 10"):
        Windows(text[:5], 10, 1, 0)


def test_the_default_model_has_about_ten_million_parameters_and_a_tied_head():
    model = _build(PRESETS["small"], seed=0)
    assert 9e6 < sum(parameter.numel() for parameter in model.parameters()) < 12e6
    assert model.head.weight is model.embedding.weight


def test_the_model_does_not_look_ahead():
    torch.manual_seed(0)
    model = GPT(layers=2, width=32, heads=2, context=16).eval()
    tokens = torch.randint(256, (1, 16))
    changed = tokens.clone()
    changed[0, 10:] = 7
    assert torch.allclose(model(tokens)[:, :10], model(changed)[:, :10], atol=1e-6)
    assert not torch.allclose(model(tokens)[:, 10:], model(changed)[:, 10:], atol=1e-3)
