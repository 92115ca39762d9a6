"""Two teachers in transformers' Trainer: pip install "transformers[torch]"

python examples/huggingface_trainer.py

The student learns the class of every token from both teachers; no labels enter the loss, they only
say which tokens count.
"""

import torch
import transformers
from text import CLASSES, lines, report

import bmtard


class DistillationTrainer(transformers.Trainer):
    def __init__(self, *args, teachers, temperature=2.0, **options):
        super().__init__(*args, **options)
        self.teachers = [net.to(self.args.device).eval() for net in teachers]
        self.temperature = temperature
        # So compute_loss is told how many tokens the micro-batches of a step have together, and
        # divides by that; the Trainer does not divide again.
        self.model_accepts_loss_kwargs = True

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        mask = inputs["labels"] != -100
        inputs = {name: value for name, value in inputs.items() if name != "labels"}
        outputs = model(**inputs)
        with torch.no_grad():
            taught = [net(**inputs).logits for net in self.teachers]
        loss = bmtard.multi_teacher_kl(
            outputs.logits,
            taught,
            self.temperature,
            student_temperature="teacher",
            weight=[1 / len(taught)] * len(taught),
            sample_weight=mask,
            reduction="sum",
            scale_by_temperature=True,
        )
        loss = loss / (mask.sum() if num_items_in_batch is None else num_items_in_batch)
        return (loss, outputs) if return_outputs else loss


class Lines(torch.utils.data.Dataset):
    """Lines of Python source, a character a token; see text.py."""

    def __init__(self):
        self.characters, self.labels = lines()

    def __len__(self):
        return len(self.characters)

    def __getitem__(self, index):
        characters, labels = self.characters[index], self.labels[index]
        mask = (labels != -100).long()
        return {"input_ids": characters, "attention_mask": mask, "labels": labels}


def tagger(width, layers):
    config = transformers.BertConfig(
        vocab_size=128, hidden_size=width, intermediate_size=2 * width, num_hidden_layers=layers,
        num_attention_heads=2, max_position_embeddings=80, num_labels=CLASSES,
    )  # fmt: skip
    return transformers.BertForTokenClassification(config)


def train(trainer_class, model, folder, epochs, **options):
    arguments = transformers.TrainingArguments(
        output_dir=folder, num_train_epochs=epochs, per_device_train_batch_size=32,
        learning_rate=2e-3, report_to=[], save_strategy="no", logging_steps=20,
    )  # fmt: skip
    trainer_class(model=model, args=arguments, train_dataset=Lines(), **options).train()
    return model


if __name__ == "__main__":
    transformers.set_seed(0)
    teachers = [train(transformers.Trainer, tagger(48, n), "runs/teacher", 15) for n in (1, 2)]
    student = train(DistillationTrainer, tagger(24, 1), "runs/student", 15, teachers=teachers)
    student.cpu().eval()
    print(report(lambda ids: student(input_ids=ids, attention_mask=(ids > 0).long()).logits))
