"""Each bad argument of a public name is refused at once: what was given, and what is possible."""

import pytest
import torch
from lightning.pytorch.demos.boring_classes import BoringModel
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import nn

import lightning_memopt as memopt
from tests.parity import train
from tests.zoo import ZOO

NAN = float("nan")

REFUSED_WHEN_MADE = [
    ("GradientAccumulation", {}, "neither was given"),
    ("GradientAccumulation", {"schedule": 2, "target_batch_size": 8}, "both were given"),
    ("GradientAccumulation", {"schedule": {}}, "empty.*at least"),
    *(
        ("GradientAccumulation", {"schedule": schedule}, f"{shown}.*1 or more")
        for schedule, shown in (("4", "'4'"), (True, "True"), (2.0, "2.0"), (0, "0"), (-1, "-1"), ({0: NAN}, "nan"))
    ),
    ("GradientAccumulation", {"schedule": {"0": 2}}, "key '0'.*0 or more"),
    *(
        ("GradientAccumulation", {"target_batch_size": size}, f"target_batch_size={shown}.*1 or more")
        for size, shown in (("8", "'8'"), (True, "True"), (NAN, "nan"), (8.5, "8.5"), (0, "0"))
    ),
    ("GradientAccumulation", {"schedule": 2, "by": "batch"}, "by='batch'.*'epoch'.*'step'"),
    ("GradientAccumulation", {"schedule": 2, "normalize": None}, "normalize=None.*'tokens'"),
    ("GradientAccumulation", {"schedule": 2, "normalize": "tokens"}, "`count`.*`mask_key`"),
    ("GradientAccumulation", {"schedule": 2, "normalize": "tokens", "count": 5}, "count=5.*function"),
    ("GradientAccumulation", {"schedule": 2, "normalize": "tokens", "mask_key": 3.5}, "mask_key=3.5.*string"),
    ("GradientAccumulation", {"schedule": 2, "count": len}, "'batch'; use 'tokens'"),
    *(
        ("MicroBatching", {"size": size}, f"size={shown}.*1 or more, or 'auto'")
        for size, shown in ((None, "None"), ("8", "'8'"), (True, "True"), (NAN, "nan"), (0, "0"), (2.0, "2.0"))
    ),
    ("MicroBatching", {"normalize": "batch"}, "normalize='batch'.*'samples'.*'tokens'"),
    ("MicroBatching", {"normalize": "tokens", "count": 5}, "count=5.*function"),
    ("MicroBatching", {"split": 5}, "split=5.*function.*list of micro-batches"),
    *(
        ("ActivationCheckpointing", {"policy": policy}, "unknown.*full, every_k, selective, budget, auto")
        for policy in ("ful", None, ["full"])
    ),
    ("ActivationCheckpointing", {"policy": "every_k"}, "no k; give k="),
    ("ActivationCheckpointing", {"policy": "budget"}, "no budget; give budget="),
    ("ActivationCheckpointing", {"policy": "full", "budget": 0.5}, "budget=0.5.*'full'.*policy='budget'"),
    *(
        ("ActivationCheckpointing", {"policy": "every_k", "k": k}, f"k={shown}.*at least 2")
        for k, shown in ((1, "1"), (0, "0"), (-2, "-2"), (True, "True"), ("2", "'2'"), (1.5, "1.5"), (NAN, "nan"))
    ),
    *(
        ("ActivationCheckpointing", {"policy": "budget", "budget": budget}, rf"budget={shown}.*\(0, 1\]")
        for budget, shown in ((0, "0"), (1.1, "1.1"), (-0.5, "-0.5"), ("0.5", "'0.5'"), (True, "True"), (NAN, "nan"))
    ),
    *(
        ("ActivationCheckpointing", {"modules": modules}, "modules=.*class.*pattern")
        for modules in ([], "", 5, [int], nn.Linear(2, 2), [nn.Linear, None])
    ),
    ("ActivationOffload", {"to": "gpu"}, "to='gpu'.*'cpu' or 'disk'"),
    ("ActivationOffload", {"to": ["cpu"]}, "'cpu' or 'disk'"),
    *(
        ("ActivationOffload", {"to": "disk", "min_bytes": count}, f"min_bytes={shown}.*at least 0")
        for count, shown in ((-1, "-1"), ("1", "'1'"), (True, "True"), (NAN, "nan"), (None, "None"))
    ),
    ("ActivationOffload", {"to": "disk", "directory": 5}, "directory='5'.*folder"),
    ("ActivationOffload", {"to": "disk", "directory": "no/such"}, "directory='no/such'.*folder"),
    ("ActivationOffload", {"to": "cpu", "directory": "."}, "directory='.'.*to='disk'"),
    *(
        ("LowBitOptimizer", {"bits": bits}, "bits=.*8, 4 and 'fp8'")
        for bits in (3, "8", None, True, NAN, 8.0, [8], torch.int8)
    ),
    *(
        ("LowBitOptimizer", {"engine": engine}, "engine=.*'memopt', 'bitsandbytes', 'torchao'")
        for engine in ("cuda", None, 8, ["torchao"])
    ),
    *(
        ("PruneOnFitEnd", {"amount": amount}, "amount=.* no share of the weights.*between 0 and 1")
        for amount in (0, 1, -0.5, 1.5, "0.5", True, None, NAN, [0.5])
    ),
    *(
        ("PruneOnFitEnd", {"amount": 0.5, name: value}, f"{name}=.*class of modules, a pattern")
        for name in ("include", "exclude")
        for value in ([], "", 5, [int], nn.Linear(2, 2))
    ),
    *(("PruneOnFitEnd", {"amount": 0.5, "pattern": p}, "pattern=.*'n:m'") for p in (5, "2x", "a:b", [2, 4])),
    *(("PruneOnFitEnd", {"amount": 0.5, "method": m}, "method=.*'magnitude'") for m in ("l1", None, ["random"])),
    *(("PruneOnFitEnd", {"amount": 0.5, "scope": scope}, "scope=.*'global'") for scope in ("all", None, ["layer"])),
    *(("GradualPruning", {"schedule": s}, "schedule=.*ConstantSparsity") for s in (0.5, None, abs)),
    *(("ClusterWeights", {"n": n}, "n=.*2 to 256") for n in (0, 1, 257, "16", True, None, NAN, 8.0)),
    *(("ClusterWeights", {"n": 16, "init": init}, r"init=.*'kmeans\+\+'") for init in ("k", None, ["random"])),
    *(("ClusterWeights", {"n": 16, "begin_step": s}, "begin_step=.*whole number") for s in (-1, "1", True, 1.5)),
    *(("ChunkedLoss", {"head": head}, "head=.*qualified name") for head in (5, "", True, nn.Linear(2, 2))),
    *(
        ("MemoryMonitor", {"every_n_steps": steps}, "every_n_steps=.*at least 1")
        for steps in (0, -1, "5", True, None, NAN, 1.5)
    ),
    ("MemoryMonitor", {"dirpath": 5}, "5.*folder of this machine"),
    ("MemoryMonitor", {"dirpath": "s3://bucket/x"}, "'s3://bucket/x'.*folder of this machine"),
    ("MemoryMonitor", {"predicted": 5}, "int.*MemoryReport"),
    *(("MixedPrecision", {"dtype": dtype}, "'bf16', 'fp16'") for dtype in ("fp32", None, ["fp16"], torch.float16)),
    *(
        ("MixedPrecision", {"dtype": "fp16", "initial_scale": scale}, "initial_scale=.*above 0")
        for scale in (0, -1.0, "5", NAN, float("inf"), True, None)
    ),
    *(
        ("MixedPrecision", {"dtype": "fp16", "growth_interval": steps}, "growth_interval=.*at least 1")
        for steps in (0, "1", 1.5, NAN, True, None)
    ),
    *(("HalfPrecision", {"dtype": dtype}, "'bf16', 'fp16'") for dtype in ("fp8", None, torch.bfloat16)),
    ("HalfPrecision", {"rounding": "up"}, "'up'.*'nearest', 'stochastic', 'kahan'"),
    ("HalfPrecision", {"dtype": "fp16", "rounding": "stochastic"}, "not possible.*rounding='kahan'"),
    *(
        ("HalfPrecision", {"keep_fp32": entries}, "keep_fp32=.*sequence of names")
        for entries in ("norm", 5, None, [nn.LayerNorm], [""])
    ),
]


@pytest.mark.parametrize(("name", "arguments", "message"), REFUSED_WHEN_MADE, ids=lambda value: str(value)[:50])
def test_a_bad_argument_is_refused_when_given_with_what_is_possible(name, arguments, message):
    with pytest.raises(MisconfigurationException, match=message):
        getattr(memopt, name)(**arguments)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"reduction": "none"}, "'none'.*'mean' and 'sum'"),
        ({"softcap": 0}, "softcap=0.*positive"),
        ({"softcap": NAN}, "softcap=nan.*positive"),
        ({"softcap": "2"}, "softcap='2'.*positive"),
        ({"label_smoothing": NAN}, "label_smoothing=nan.*between 0 and 1"),
        ({"label_smoothing": "0.1"}, "label_smoothing='0.1'.*between 0 and 1"),
        ({"chunk_size": 0}, "chunk_size=0.*'auto' or at least 1"),
        ({"chunk_size": True}, "chunk_size=True.*'auto' or at least 1"),
        ({"chunk_size": "big"}, "chunk_size='big'.*'auto' or at least 1"),
        ({"bias": torch.ones(3)}, r"bias of shape \(3,\).*8 classes"),
        ({"target": torch.zeros(2)}, "float32.*class indices"),
        ({"target": torch.zeros(2, dtype=torch.bool)}, "bool.*class indices"),
        ({"target": torch.zeros(3, dtype=torch.long)}, r"target of shape \(3,\).*one class index for each"),
        ({"hidden": torch.ones(2, 5)}, r"\(2, 5\).*\(8, 4\).*\(vocabulary, features\)"),
    ],
    ids=str,
)
def test_a_bad_argument_of_the_chunked_loss_is_refused_with_what_is_possible(options, message):
    arguments = {"hidden": torch.ones(2, 4), "weight": torch.ones(8, 4), "target": torch.tensor([1, 2])} | options
    with pytest.raises(ValueError, match=message):
        memopt.chunked_cross_entropy(**arguments)


class NeverSteps(BoringModel):
    def training_step(self, batch, batch_idx):
        raise AssertionError("the first step was run")


class Manual(NeverSteps):
    def __init__(self):
        super().__init__()
        self.automatic_optimization = False


class WithLBFGS(NeverSteps):
    def configure_optimizers(self):
        return torch.optim.LBFGS(self.parameters())


@pytest.mark.parametrize(
    ("module", "options", "message"),
    [
        (NeverSteps, {"callbacks": ["ActivationCheckpointing"]}, "NeverSteps has no repeated blocks.*modules="),
        (
            NeverSteps,
            {"callbacks": [("ActivationCheckpointing", {"modules": "head.*"})]},
            "'head.*' matches no submodule of NeverSteps.*layer",
        ),
        (NeverSteps, {"callbacks": ["ActivationOffload"]}, "NeverSteps is on the CPU.*to='disk'"),
        (NeverSteps, {"callbacks": ["ChunkedLoss"]}, "no Hugging Face model.*NeverSteps.*head="),
        (NeverSteps, {"callbacks": [("ChunkedLoss", {"head": "top"})]}, "'top'.*no such submodule.*layer"),
        (
            NeverSteps,
            {"callbacks": [("GradientAccumulation", {"target_batch_size": 1000001})]},
            "target_batch_size=1000001 is no multiple of 8.*1000000 or 1000008",
        ),
        (Manual, {"callbacks": [("GradientAccumulation", {"schedule": 2})]}, "`Manual` optimizes manually"),
        (Manual, {"callbacks": ["MicroBatching"]}, "`Manual` optimizes manually"),
        (Manual, {"callbacks": ["OptimizerInBackward"]}, "`Manual` optimizes manually"),
        (
            NeverSteps,
            {"callbacks": [("GradientAccumulation", {"schedule": 2})], "accumulate_grad_batches": 2},
            "accumulate_grad_batches=2.*Leave it at 1",
        ),
        (
            NeverSteps,
            {"callbacks": ["OptimizerInBackward"], "accumulate_grad_batches": 2},
            "accumulate_grad_batches=2.*Set it to 1",
        ),
        (
            NeverSteps,
            {"callbacks": ["OptimizerInBackward"], "gradient_clip_val": 0.5},
            "gradient_clip_val=0.5.*'value'",
        ),
        (
            NeverSteps,
            {"callbacks": ["OptimizerInBackward", "MicroBatching"]},
            "MicroBatching sums gradients.*Use one of the two",
        ),
        (NeverSteps, {"callbacks": ["LowBitOptimizer"]}, "SGD has momentum=0.*AdamW, Adam, SGD with momentum"),
        (WithLBFGS, {"callbacks": [("GradientAccumulation", {"schedule": 2})]}, "LBFGS.*MicroBatching"),
        (WithLBFGS, {"callbacks": ["LowBitOptimizer"]}, "LBFGS.*AdamW, Adam, SGD"),
        (WithLBFGS, {"callbacks": ["OptimizerInBackward"]}, "LBFGS cannot step one parameter.*AdamW"),
        (WithLBFGS, {"plugins": [("MixedPrecision", {"dtype": "fp16"})]}, "LBFGS.*'bf16'"),
        (WithLBFGS, {"plugins": ["HalfPrecision"]}, "LBFGS.*AdamW"),
        (
            NeverSteps,
            {"plugins": [("HalfPrecision", {"keep_fp32": ["norm", "top.*"]})]},
            r"\['top.\*'\] name no submodule of NeverSteps.*layer",
        ),
    ],
    ids=str,
)
def test_what_cannot_work_with_the_module_is_refused_by_name_before_the_first_step(module, options, message):
    made = {
        key: [_make(entry) for entry in value] if key in ("callbacks", "plugins") else value
        for key, value in options.items()
    }
    with pytest.raises(MisconfigurationException, match=message):
        train(module(), ZOO["mlp"].loader(batches=4), **made)


def _make(entry):
    name, arguments = entry if isinstance(entry, tuple) else (entry, {})
    return getattr(memopt, name)(**arguments)
