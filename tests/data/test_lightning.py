"""The data under Lightning's Trainer: epochs, and a run that stops within one."""

import pytest
import pytorch_lightning as pl
import torch

from normdrop.data import load
from normdrop.data.lightning import LightningData


class Watcher(pl.LightningModule):
    """Trains one number and writes down the batches that it sees."""

    def __init__(self, stop_at=None):
        super().__init__()
        self.automatic_optimization = False
        self.weight = torch.nn.Parameter(torch.zeros(1))
        self.seen, self.stop_at = [], stop_at

    def training_step(self, batch, index):
        optimizer = self.optimizers()
        optimizer.zero_grad()
        (batch[0].mean() * self.weight).backward()
        optimizer.step()
        self.seen.append((self.current_epoch, index, batch[1].tolist()))

    def validation_step(self, batch, index):
        pass

    def on_train_batch_end(self, *_):
        if self.stop_at == len(self.seen):
            self.trainer.save_checkpoint(self.path)
            self.trainer.should_stop = True
            raise KeyboardInterrupt

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.1)


def run(tmp_path, model, checkpoint=None):
    trainer = pl.Trainer(
        accelerator="cpu", max_epochs=3, use_distributed_sampler=False, logger=False,
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
        default_root_dir=tmp_path,
    )  # fmt: skip
    data = load("digits", batch_size=300, augment="shift")
    trainer.fit(model, LightningData(data), ckpt_path=checkpoint)
    return model


@pytest.mark.filterwarnings("ignore:.*does not have many workers.*")
@pytest.mark.filterwarnings("ignore:.*log_every_n_steps.*")
@pytest.mark.filterwarnings("ignore:.*weights_only.*")
def test_lightning_run_stopped_within_an_epoch_continues_with_the_next_batch(tmp_path):
    whole = run(tmp_path, Watcher())
    assert len(whole.seen) == 15
    orders = [[y for e, _, y in whole.seen if e == epoch] for epoch in range(3)]
    assert orders[0] != orders[1] != orders[2]
    stopped = Watcher(stop_at=7)
    stopped.path = tmp_path / "stopped.ckpt"
    with pytest.raises((KeyboardInterrupt, SystemExit)):
        run(tmp_path, stopped)
    resumed = run(tmp_path, Watcher(), stopped.path)
    assert stopped.seen + resumed.seen == whole.seen
    assert torch.equal(resumed.weight, whole.weight)
