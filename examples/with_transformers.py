"""transformers: a Trainer whose training_step is the whole step.

python examples/with_transformers.py
"""

import torch
from transformers import BertConfig, BertForSequenceClassification, Trainer, TrainingArguments

from kbfgs_ext import KBFGS


class InTrainer(KBFGS):
    def step(self, closure=None):
        """The Trainer's own call, after `training_step` has made the step: nothing is left."""
        return None if closure is None else super().step(closure)


class KBFGSTrainer(Trainer):
    def __init__(self, *args, kbfgs: dict | None = None, **options) -> None:
        super().__init__(*args, **options)
        if self.args.gradient_accumulation_steps > 1 or self.args.fp16:
            raise ValueError("KBFGSTrainer takes neither gradient_accumulation_steps nor fp16")
        self.kbfgs = kbfgs or {}

    def create_optimizer(self, model=None):
        if self.optimizer is None:
            clip = self.args.max_grad_norm or None
            self.optimizer = InTrainer(self.model, max_grad_norm=clip, **self.kbfgs)
        return self.optimizer

    def training_step(self, model, inputs, num_items_in_batch=None):
        opt = getattr(self.optimizer, "optimizer", self.optimizer)  # in accelerate's wrapper

        def closure():
            opt.zero_grad()
            return super(KBFGSTrainer, self).training_step(model, inputs, num_items_in_batch)

        return opt.step(closure).detach()


def main(epochs: int = 3, folder: str = "build/out/transformers", **options) -> list[float]:
    torch.manual_seed(0)
    tokens = torch.randint(2, 50, (512, 12))
    labels = (tokens < 10).any(1).long()
    rows = [{"input_ids": t, "labels": y} for t, y in zip(tokens, labels, strict=True)]
    size = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = BertConfig(vocab_size=50, intermediate_size=64, num_labels=2, **size)
    quiet = {"report_to": "none", "disable_tqdm": True, "save_strategy": "no", "use_cpu": True}
    quiet |= {"logging_steps": 1, "per_device_train_batch_size": 128, "num_train_epochs": epochs}
    arguments = TrainingArguments(folder, **{**quiet, **options})
    trainer = KBFGSTrainer(BertForSequenceClassification(config), arguments, train_dataset=rows)
    trainer.train()
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


if __name__ == "__main__":
    print(main())
