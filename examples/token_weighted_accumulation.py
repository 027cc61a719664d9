"""Accumulation over sentences of uneven length that gives the gradient of the one big batch.

Lightning divides each batch's loss by the number of batches, so that a token of a short batch weighs more than one
of a long batch. With ``normalize="tokens"`` each token weighs the same.

python examples/token_weighted_accumulation.py
"""

import lightning.pytorch as pl
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader

import lightning_memopt as memopt

PADDING = -100


class NextToken(pl.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(32, 16)
        self.head = nn.Linear(16, 32)

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        logits = self.head(self.embedding(batch["tokens"]))
        return F.cross_entropy(logits.flatten(0, 1), batch["labels"].flatten(), ignore_index=PADDING)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.5)


def sentences() -> list[dict[str, Tensor]]:
    """Eight sentences of 2 to 16 tokens, padded to 16."""
    generator = torch.Generator().manual_seed(0)
    samples = []
    for length in (16, 2, 9, 3, 16, 2, 5, 12):
        tokens = torch.randint(32, (16,), generator=generator)
        samples.append({"tokens": tokens, "labels": torch.where(torch.arange(16) < length, tokens, PADDING)})
    return samples


def train(batch_size: int, callbacks: list[pl.Callback], **options: int) -> Tensor:
    pl.seed_everything(0, verbose=False)
    module = NextToken()
    trainer = pl.Trainer(
        max_epochs=3, accelerator="cpu", callbacks=callbacks, logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False, **options,
    )  # fmt: skip
    trainer.fit(module, DataLoader(sentences(), batch_size=batch_size))
    return module.head.weight.detach().clone()


def main() -> None:
    big_batch = train(8, [])
    lightning = train(2, [], accumulate_grad_batches=4)
    weighted = train(2, [memopt.GradientAccumulation(4, normalize="tokens", mask_key="labels")])
    print(f"off from one batch of 8: Lightning's accumulation {(lightning - big_batch).abs().max():.1e},", end=" ")
    print(f"token-weighted {(weighted - big_batch).abs().max():.1e}")


if __name__ == "__main__":
    main()
