"""Text, two teachers, logits [N, T, C] and a mask: python examples/text.py --with torch|bmtard

Every character of Python source gets a class: space, name, keyword, number, string, comment or
operator. The lines come from the standard library, their labels from its tokenizer.
"""

import inspect
import io
import keyword
import textwrap
import tokenize

import torch
import torch.nn.functional as F
from digits import main
from torch import nn

TEACHERS = ("wide", "recurrent")
TEMPERATURE = 2.0
LENGTH, CLASSES = 80, 7


def classes_of(token):
    if token.type == tokenize.NAME:
        return 2 if keyword.iskeyword(token.string) else 1
    kinds = {tokenize.NUMBER: 3, tokenize.COMMENT: 5, tokenize.OP: 6}
    return kinds.get(token.type, 4)


def lines():
    """Characters [N, T] and labels [N, T]; -100 where a line has ended."""
    source = inspect.getsource(textwrap)
    text = source.splitlines()
    characters = torch.zeros(len(text), LENGTH, dtype=torch.int64)
    labels = torch.full((len(text), LENGTH), -100)
    for row, line in enumerate(text):
        codes = [min(ord(character), 127) for character in line[:LENGTH]]
        characters[row, : len(codes)] = torch.tensor(codes, dtype=torch.int64)
        labels[row, : len(codes)] = 0
    blank = (tokenize.NEWLINE, tokenize.NL, tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER)
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type in blank:
            continue
        (first, start), (last, end) = token.start, token.end
        for row in range(first, last + 1):
            part = labels[row - 1, start if row == first else 0 : end if row == last else LENGTH]
            part[part != -100] = classes_of(token)
    kept = (labels != -100).any(1)
    return characters[kept], labels[kept]


class Tagger(nn.Module):
    """Characters [N, T] to logits [N, T, C]."""

    def __init__(self, width, recurrent=False):
        super().__init__()
        self.embedding = nn.Embedding(128, width)
        self.mix = (
            nn.GRU(width, width // 2, batch_first=True, bidirectional=True)
            if recurrent
            else nn.Conv1d(width, width, 7, padding=3)
        )
        self.head = nn.Linear(width, CLASSES)

    def forward(self, characters):
        x = self.embedding(characters)
        mixed = self.mix(x)[0] if isinstance(self.mix, nn.GRU) else self.mix(x.mT).mT
        return self.head(F.relu(mixed) + x)


def batches(characters, labels):
    while True:
        for index in torch.randperm(len(characters)).split(32):
            yield characters[index], labels[index]


def teacher(kind, steps):
    net = Tagger(64, recurrent=kind == "recurrent")
    optimizer = torch.optim.Adam(net.parameters(), 3e-3)
    data = batches(*lines())
    for _ in range(steps):
        characters, labels = next(data)
        optimizer.zero_grad()
        F.cross_entropy(net(characters).flatten(0, 1), labels.flatten()).backward()
        optimizer.step()
    return net.eval().requires_grad_(False)


def setup(kinds, teacher_steps=150):
    teachers = [teacher(kind, teacher_steps) for kind in kinds]
    return Tagger(16), teachers, batches(*lines())


def report(student):
    characters, labels = lines()
    right = student(characters).argmax(-1) == labels
    return f"accuracy {100 * right[labels != -100].double().mean().item():.1f} %"


def with_torch(student, optimizer, *teachers):
    def step(characters, labels):
        mask = labels != -100
        optimizer.zero_grad()
        logits = student(characters)
        loss = 0.0
        for net in teachers:
            each = F.kl_div(
                F.log_softmax(logits / TEMPERATURE, -1),
                F.softmax(net(characters) / TEMPERATURE, -1),
                reduction="none",
            ).sum(-1)  # [N, T]
            loss = loss + 0.5 * TEMPERATURE**2 * (each * mask).sum() / mask.sum()
        loss.backward()
        optimizer.step()
        return loss.detach()

    return step


def with_bmtard(student, optimizer, *teachers):
    import bmtard

    def step(characters, labels):
        optimizer.zero_grad()
        loss = bmtard.multi_teacher_kl(
            student(characters),
            [net(characters) for net in teachers],
            TEMPERATURE,
            student_temperature="teacher",
            weight=[0.5, 0.5],
            sample_weight=labels != -100,
            reduction="weighted_mean",
            scale_by_temperature=True,
        )
        loss.backward()
        optimizer.step()
        return loss.detach()

    return step


if __name__ == "__main__":
    main(with_torch, with_bmtard, TEACHERS, setup, report)
