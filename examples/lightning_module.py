"""B-MTARD as a LightningModule: pip install lightning; python examples/lightning_module.py"""

import contextlib

import lightning
import torch
from digits import EPSILON, STEP_SIZE, STEPS, images, network, report, teacher
from torch.utils.data import DataLoader, TensorDataset

import bmtard
from bmtard.attacks import pgd


class BMTARD(lightning.LightningModule):
    def __init__(self, student, robust, clean):
        super().__init__()
        self.student = student
        # Its state is in every checkpoint of Lightning's.
        self.criterion = bmtard.BMTARDLoss()
        self.teachers = [robust, clean]  # in a list, they stay out of checkpoints and of DDP
        self.window = contextlib.ExitStack()

    def on_fit_start(self):
        for net in self.teachers:
            net.to(self.device).eval().requires_grad_(False)
        if self.trainer.world_size > 1:
            self.criterion.process_group = torch.distributed.group.WORLD

    # accumulate_grad_batches=4 are one step of the balance, which the first of them decides.
    def on_train_batch_start(self, batch, index):
        if index % self.trainer.accumulate_grad_batches == 0:
            self.window.close()
            self.window.enter_context(self.criterion.one_step())

    def on_train_epoch_end(self):
        self.window.close()

    def training_step(self, batch, index):
        x, y = batch
        robust, clean = self.teachers
        x_adv = pgd(self.student, x, y, epsilon=EPSILON, step_size=STEP_SIZE, steps=STEPS)
        with torch.no_grad():
            taught = [robust(x_adv), clean(x)]
        loss = self.criterion([self.student(x_adv), self.student(x)], taught)
        self.log("loss", loss, prog_bar=True)
        return loss

    def configure_optimizers(self):
        return torch.optim.SGD(self.student.parameters(), 0.05, momentum=0.9)


if __name__ == "__main__":
    lightning.seed_everything(0)
    module = BMTARD(network(), teacher("robust"), teacher("clean"))
    x, y = images()
    loader = DataLoader(TensorDataset(x[:1500], y[:1500]), batch_size=64, shuffle=True)
    lightning.Trainer(max_epochs=10, logger=False, enable_checkpointing=False).fit(module, loader)
    print(report(module.student))
