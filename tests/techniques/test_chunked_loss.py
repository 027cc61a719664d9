import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional as F

from lightning_memopt import chunked_cross_entropy
from lightning_memopt.techniques.lazy_logits import LogitsNotFormedError, lazy_logits


def _inputs(vocabulary=300, dtype=torch.float32, tied=False):
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(3, 37, 16, generator=generator).to(dtype).requires_grad_()
    weight = torch.randn(vocabulary, 16, generator=generator).to(dtype).requires_grad_()
    bias = torch.randn(vocabulary, generator=generator).to(dtype).requires_grad_()
    target = torch.randint(vocabulary, (3, 37), generator=generator)
    target[0, :5] = -100
    return hidden, weight, bias, target


def _plain(hidden, weight, target, *, bias=None, softcap=None, **options):
    logits = F.linear(hidden, weight, bias).flatten(0, 1)
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    return F.cross_entropy(logits.float(), target.flatten(), **options)


def _relative_error(actual, expected):
    return float((actual - expected).detach().norm() / expected.detach().norm())


@pytest.mark.parametrize("chunk_size", [1, 20, 111, 1000, "auto"])
@pytest.mark.parametrize(
    "options",
    [{}, {"reduction": "sum"}, {"label_smoothing": 0.1}, {"softcap": 3.0}, {"ignore_index": 7}],
    ids=lambda options: next(iter(options), "plain"),
)
def test_loss_and_gradients_are_those_of_linear_and_cross_entropy(chunk_size, options):
    hidden, weight, bias, target = _inputs()
    target = target.where(target != -100, options.get("ignore_index", -100))
    loss = chunked_cross_entropy(hidden, weight, target, bias=bias, chunk_size=chunk_size, **options)
    expected = _plain(hidden, weight, target, bias=bias, **options)
    assert _relative_error(loss, expected) < 1e-6
    gradients = torch.autograd.grad(3 * loss, (hidden, weight, bias))
    for actual, wanted in zip(gradients, torch.autograd.grad(3 * expected, (hidden, weight, bias)), strict=True):
        assert actual.shape == wanted.shape
        assert _relative_error(actual, wanted) < 1e-6


def test_in_float64_the_gradients_pass_the_numerical_check():
    hidden, weight, bias, target = (t.double() if t.is_floating_point() else t for t in _inputs(vocabulary=5))
    inputs = [t.detach().requires_grad_() for t in (hidden[:, :4], weight, bias)]
    target = target[:, 1:5].clamp(-100, 4)
    assert torch.autograd.gradcheck(
        lambda h, w, b: chunked_cross_entropy(h, w, target, bias=b, softcap=2.0, label_smoothing=0.2, chunk_size=5),
        inputs,
    )


@pytest.mark.parametrize("frozen", ["hidden", "weight", "both"])
def test_what_is_frozen_gets_no_gradient_and_the_rest_is_right(frozen):
    hidden, weight, _, target = _inputs()
    hidden.requires_grad_(frozen == "weight")
    weight.requires_grad_(frozen == "hidden")
    loss = chunked_cross_entropy(hidden, weight, target)
    expected = _plain(hidden, weight, target)
    assert _relative_error(loss, expected) < 1e-6
    assert loss.requires_grad == (frozen != "both")
    if frozen != "both":
        inputs = [hidden] if frozen == "weight" else [weight]
        [actual], [wanted] = torch.autograd.grad(loss, inputs), torch.autograd.grad(expected, inputs)
        assert _relative_error(actual, wanted) < 1e-6


def test_a_tied_weight_sums_both_of_its_gradients():
    _, weight, _, target = _inputs()
    ids = target.clamp(min=0)
    loss = chunked_cross_entropy(F.embedding(ids, weight).tanh(), weight, target, chunk_size=9)
    expected = _plain(F.embedding(ids, weight).tanh(), weight, target)
    [actual], [wanted] = torch.autograd.grad(loss, [weight]), torch.autograd.grad(expected, [weight])
    assert _relative_error(actual, wanted) < 1e-6


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_under_autocast_it_errs_from_float32_no_more_than_the_plain_layer(dtype):
    hidden, weight, bias, target = _inputs()
    exact = torch.autograd.grad(_plain(hidden, weight, target, bias=bias), (hidden, weight, bias))
    with torch.autocast("cpu", dtype=dtype):
        ours = torch.autograd.grad(chunked_cross_entropy(hidden, weight, target, bias=bias), (hidden, weight, bias))
        plain = torch.autograd.grad(_plain(hidden, weight, target, bias=bias), (hidden, weight, bias))
    for a, p, e in zip(ours, plain, exact, strict=True):
        assert a.dtype == torch.float32
        assert _relative_error(a, e) < 1.2 * _relative_error(p, e)


def test_float16_gradients_survive_a_vocabulary_where_probabilities_would_underflow():
    generator = torch.Generator().manual_seed(0)
    hidden = (torch.randn(64, 8, generator=generator) / 4).half()
    weight = (torch.randn(50_000, 8, generator=generator) / 4).half().requires_grad_()
    target = torch.randint(50_000, (64,), generator=generator)
    single = weight.detach().float().requires_grad_()
    scale = 1024.0
    [actual] = torch.autograd.grad(chunked_cross_entropy(hidden, weight, target) * scale, [weight])
    [wanted] = torch.autograd.grad(chunked_cross_entropy(hidden.float(), single, target) * scale, [single])
    assert actual.dtype == torch.float16
    unseen = torch.ones(50_000, dtype=torch.bool)
    unseen[target] = False  # these rows get nothing but probabilities of about 2e-5
    assert _relative_error(actual[unseen].float(), wanted[unseen]) < 0.02


def test_a_second_backward_under_retain_graph_gives_the_same_gradients_again():
    hidden, weight, _, target = _inputs()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = chunked_cross_entropy(hidden, weight, target)
    first = torch.autograd.grad(loss, (hidden, weight), grad_outputs=torch.tensor(0.5), retain_graph=True)
    second = torch.autograd.grad(loss, (hidden, weight), grad_outputs=torch.tensor(0.5))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_a_second_derivative_is_refused():
    hidden, weight, _, target = _inputs()
    loss = chunked_cross_entropy(hidden, weight, target)
    with pytest.raises(RuntimeError, match=r"create_graph=True.*use F\.cross_entropy"):
        torch.autograd.grad(loss, [hidden], create_graph=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("options", [{}, {"label_smoothing": 0.1}, {"reduction": "sum"}])
def test_where_every_token_is_ignored_the_gradient_is_zero_as_in_torch(options, dtype):
    hidden, weight, bias, target = _inputs()
    inputs = [tensor.detach().to(dtype).requires_grad_() for tensor in (hidden, weight, bias)]
    target = torch.full_like(target, -100)
    ours = chunked_cross_entropy(*inputs[:2], target, bias=inputs[2], **options)
    plain = _plain(*inputs[:2], target, bias=inputs[2], **options)
    torch.testing.assert_close(ours, plain.to(ours.dtype), equal_nan=True)
    for actual, wanted in zip(torch.autograd.grad(ours, inputs), torch.autograd.grad(plain, inputs), strict=True):
        assert torch.equal(actual, wanted) and not actual.any()


def test_it_runs_on_fake_tensors_and_makes_none_as_large_as_the_logits():
    with FakeTensorMode():
        hidden, weight = torch.empty(4096, 64, requires_grad=True), torch.empty(32768, 64, requires_grad=True)
        chunked_cross_entropy(hidden, weight, torch.zeros(4096, dtype=torch.long)).backward()
        assert weight.grad.shape == weight.shape and hidden.grad.shape == hidden.shape


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"reduction": "none"}, "reduction='none'.*'mean' and 'sum'"),
        ({"chunk_size": 0}, "chunk_size=0 must be 'auto' or at least 1"),
        ({"label_smoothing": 1.5}, "label_smoothing=1.5"),
        ({"softcap": -1.0}, "softcap=-1.0 must be positive"),
        ({"weight": torch.zeros(300, 17)}, r"hidden of shape \(3, 37, 16\) and weight of shape \(300, 17\)"),
        ({"target": torch.zeros(3, 36, dtype=torch.long)}, r"target of shape \(3, 36\)"),
        ({"target": torch.zeros(3, 37)}, "class probabilities"),
        ({"bias": torch.zeros(299)}, r"bias of shape \(299,\) must have one entry for each of 300"),
    ],
)
def test_impossible_arguments_are_refused_with_what_was_given(changes, message):
    hidden, weight, _, target = _inputs()
    with pytest.raises(ValueError, match=message):
        chunked_cross_entropy(**({"hidden": hidden, "weight": weight, "target": target} | changes))


@pytest.mark.parametrize(
    "route",
    [
        lambda logits, target: F.cross_entropy(logits.view(-1, 300), target.view(-1)),
        lambda logits, target: F.cross_entropy(logits.float().reshape(-1, logits.size(-1)), target.reshape(-1)),
        lambda logits, target: nn.CrossEntropyLoss()(logits.flatten(0, -2).contiguous(), target.flatten()),
        lambda logits, target: F.cross_entropy(logits.view(3 * 37, -1), target.view(-1)),
        lambda logits, target: F.cross_entropy(logits.transpose(1, 2), target),
        lambda logits, target: F.cross_entropy(torch.permute(logits, (0, 2, 1)), target),
        lambda logits, target: F.cross_entropy(logits[..., 1:, :].flatten(0, 1), target[..., 1:].flatten()),
        lambda logits, target: F.cross_entropy(logits[:, -1], target[:, -1]),
        lambda logits, target: F.cross_entropy(logits[target >= 0], target[target >= 0]),
        lambda logits, target: F.cross_entropy((5 * torch.tanh(logits / 5)).flatten(0, 1), target.flatten()),
        lambda logits, target: F.cross_entropy((logits + torch.linspace(-1, 1, 300)).flatten(0, 1), target.flatten()),
        lambda logits, target: F.cross_entropy(torch.add(logits * 2, torch.ones(1, 300))[0], target[0]),
        lambda logits, target: F.cross_entropy((logits * 0.5).to(torch.float32).flatten(0, 1), target.flatten()),
    ],
)
def test_each_usual_way_from_the_layer_to_the_loss_gives_the_plain_loss_and_gradients(route):
    hidden, _, _, target = _inputs()
    head = nn.Linear(16, 300)
    inputs = (hidden, *head.parameters())
    expected = route(head(hidden), target)
    with lazy_logits(head):
        loss = route(head(hidden), target)
    torch.testing.assert_close(loss, expected, rtol=1e-6, atol=0)
    for actual, wanted in zip(torch.autograd.grad(loss, inputs), torch.autograd.grad(expected, inputs), strict=True):
        assert _relative_error(actual, wanted) < 1e-6
    assert "forward" not in vars(head)


@pytest.mark.parametrize("has_bias", [True, False])
def test_what_is_added_to_each_class_gets_its_gradient(has_bias):
    hidden, _, _, target = _inputs()
    head, added = nn.Linear(16, 300, bias=has_bias), torch.zeros(1, 1, 300, requires_grad=True)

    def loss():
        return F.cross_entropy((head(hidden) / 2 + added).flatten(0, 1), target.flatten())

    [wanted] = torch.autograd.grad(loss(), [added])
    with lazy_logits(head):
        [actual] = torch.autograd.grad(loss(), [added])
    assert _relative_error(actual, wanted) < 1e-6


@pytest.mark.parametrize(
    ("use", "operation"),
    [
        (lambda logits: logits.argmax(-1), "argmax"),
        (lambda logits: torch.softmax(logits, -1), "softmax"),
        (lambda logits: logits.detach(), "detach"),
        (lambda logits: logits + 1, "addition of a int"),
        (lambda logits: logits + torch.ones(37, 300), r"addition of a Tensor\[37, 300\]"),
        (lambda logits: torch.tanh(logits) + torch.ones(300), "addition"),
        (lambda logits: logits[..., :10], "the index"),
        (lambda logits: logits[..., 0], "the index"),
        (lambda logits: logits[0, 0, 0], "the index"),
        (lambda logits: logits.view(-1), "view"),
        (lambda logits: logits * torch.ones(300), "multiplication by a Tensor"),
        (lambda logits: torch.ones(300) * logits, "mul"),
        (lambda logits: F.cross_entropy(logits[0], torch.zeros(37).long(), torch.ones(300)), "class weights"),
        (lambda logits: F.cross_entropy(logits[0], torch.zeros(37).long(), reduction="none"), "reduction='none'"),
        (lambda logits: F.cross_entropy(logits, torch.zeros(3, 300).long()), "over dimension 1"),
    ],
)
def test_any_other_use_of_the_logits_is_an_error_that_names_the_layer_and_the_use(use, operation):
    head = nn.Linear(16, 300)
    with lazy_logits(head, "model.lm_head"):
        logits = head(torch.randn(3, 37, 16))
        with pytest.raises(LogitsNotFormedError, match=rf"model\.lm_head were used by .*{operation}"):
            use(logits)
    assert not hasattr(logits, "anything_else")


def test_without_gradients_the_layer_computes_as_always():
    head, hidden = nn.Linear(16, 300), torch.randn(2, 16)
    with lazy_logits(head), torch.no_grad():
        assert torch.equal(head(hidden), F.linear(hidden, head.weight, head.bias))
