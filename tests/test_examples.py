"""The examples: both versions of each are one training, to rounding, and the command line runs."""

from __future__ import annotations

import importlib.util
import runpy
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor, nn

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"
PAIRS = [
    "adaad", "ard", "awp", "b_mtard", "distillation", "iad", "mart", "mtard", "rslad", "text",
    "three_teachers", "trades",
]  # fmt: skip
FRAMEWORKS = {"lightning_module": "lightning", "huggingface_trainer": "transformers"}
STEPS, TEACHER_STEPS = 20, 10
WHY = "{} is not installed; CONTRIBUTING.md tells how to run this test in an extra environment"


@pytest.fixture(autouse=True)
def _double_on_one_thread(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """float64, so that rounding tells nothing apart. The networks are too small for two threads."""
    monkeypatch.setattr(sys, "path", [str(EXAMPLES), *sys.path])
    threads, dtype = torch.get_num_threads(), torch.get_default_dtype()
    torch.set_num_threads(1)
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_num_threads(threads)
    torch.set_default_dtype(dtype)
    for name in ("digits", "text"):
        sys.modules.pop(name, None)


def example(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def train(module: ModuleType, version: Callable[..., Any]) -> tuple[nn.Module, list[Any], Tensor]:
    """The student, each step's loss and gradients, and the state of the random numbers."""
    torch.manual_seed(0)
    setup = getattr(module, "setup", None) or example("digits").setup
    student, teachers, data = setup(module.TEACHERS, TEACHER_STEPS)
    assert len(teachers) == len(module.TEACHERS)
    optimizer = torch.optim.SGD(student.parameters(), 0.05, momentum=0.9, weight_decay=2e-4)
    step = version(student, optimizer, *teachers)
    history: list[Any] = []
    for _ in range(STEPS):
        loss = step(*next(data))
        gradients = {name: p.grad.clone() for name, p in student.named_parameters()}
        history.append((loss, gradients))
    return student, history, torch.get_rng_state()


@pytest.mark.parametrize("name", PAIRS)
def test_both_versions_are_one_training(name: str) -> None:
    module = example(name)
    (student, history, drawn), (ours, our_history, we_drew) = (
        train(module, version) for version in (module.with_torch, module.with_bmtard)
    )
    close = {"rtol": 1e-9, "atol": 1e-11}
    for (loss, gradients), (our_loss, our_gradients) in zip(history, our_history, strict=True):
        torch.testing.assert_close(our_loss, loss, **close)
        assert any(gradient.abs().max() > 1e-6 for gradient in gradients.values())
        torch.testing.assert_close(our_gradients, gradients, **close)
    torch.testing.assert_close(ours.state_dict(), student.state_dict(), **close)
    assert torch.equal(we_drew, drawn)
    assert history[-1][0] < history[0][0]


@pytest.mark.parametrize("library", ["torch", "bmtard"])
def test_command_line(
    library: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    file = str(EXAMPLES / "distillation.py")
    monkeypatch.setattr(sys, "argv", [file, "--with", library, "--steps", "40"])
    runpy.run_path(file, run_name="__main__")
    told = capsys.readouterr().out.splitlines()
    assert told[0].startswith("step 20: loss ")
    assert told[1].startswith("step 40: loss ")
    assert float(told[-1].split()[1]) > 80  # per cent of digits


def test_every_example_is_tested() -> None:
    found = {path.stem for path in EXAMPLES.glob("*.py")}
    assert found == {*PAIRS, *FRAMEWORKS, "digits"}


# --- Frameworks -------------------------------------------------------------------------------


@pytest.mark.parametrize("accumulate", [1, 3])
@pytest.mark.filterwarnings("default")  # Lightning's own
def test_lightning(accumulate: int, tmp_path: Path) -> None:
    """Against a loop; the balance moves once per optimizer step and is in the checkpoint."""
    lightning = pytest.importorskip("lightning", reason=WHY.format("lightning"))
    import bmtard
    from bmtard.attacks import pgd

    module, digits = example("lightning_module"), example("digits")
    torch.manual_seed(0)
    teachers = [digits.teacher(kind, TEACHER_STEPS) for kind in ("robust", "clean")]
    x, y = (part[:320] for part in digits.images())
    data = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(x, y), batch_size=32)
    torch.manual_seed(1)
    net, student = digits.network(), digits.network()
    student.load_state_dict(net.state_dict())
    wrapped = module.BMTARD(net, *teachers)
    trainer = lightning.Trainer(
        accelerator="cpu", devices=1, max_epochs=2, logger=False, default_root_dir=tmp_path,
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
        accumulate_grad_batches=accumulate,
    )  # fmt: skip
    torch.manual_seed(2)
    trainer.fit(wrapped, data)

    criterion = bmtard.BMTARDLoss()
    optimizer = torch.optim.SGD(student.parameters(), 0.05, momentum=0.9)
    torch.manual_seed(2)
    steps = 0
    for _ in range(2):
        batches = list(data)
        for begin in range(0, len(batches), accumulate):
            part = batches[begin : begin + accumulate]
            optimizer.zero_grad()
            with criterion.one_step():
                for images, labels in part:
                    x_adv = pgd(
                        student, images, labels, epsilon=digits.EPSILON,
                        step_size=digits.STEP_SIZE, steps=digits.STEPS,
                    )  # fmt: skip
                    with torch.no_grad():
                        taught = [teachers[0](x_adv), teachers[1](images)]
                    loss = criterion([student(x_adv), student(images)], taught)
                    (loss / accumulate).backward()
            optimizer.step()
            steps += 1
    assert wrapped.criterion.step == criterion.step == steps
    torch.testing.assert_close(net.state_dict(), student.state_dict(), rtol=1e-9, atol=1e-11)
    trainer.save_checkpoint(tmp_path / "last.ckpt")
    saved = torch.load(tmp_path / "last.ckpt", weights_only=True)["state_dict"]
    assert saved["criterion.step"] == steps
    assert torch.equal(saved["criterion.temperatures"], criterion.temperatures)


@pytest.mark.filterwarnings("default")  # those of transformers
def test_huggingface(tmp_path: Path) -> None:
    """Micro-batches of unequal lengths are the whole batch, and the whole batch is the equation."""
    transformers = pytest.importorskip("transformers", reason=WHY.format("transformers"))
    pytest.importorskip("accelerate", reason=WHY.format("accelerate"))
    import torch.nn.functional as F

    module = example("huggingface_trainer")
    transformers.set_seed(0)
    teachers = [module.tagger(16, n).double().eval() for n in (1, 2)]
    start = module.tagger(8, 1).double().state_dict()
    data = torch.utils.data.Subset(module.Lines(), range(48))

    def trained(size: int, accumulate: int) -> nn.Module:
        model = module.tagger(8, 1).double()
        model.load_state_dict(start)
        for layer in model.modules():
            if isinstance(layer, nn.Dropout):
                layer.p = 0.0
        arguments = transformers.TrainingArguments(
            output_dir=str(tmp_path), per_device_train_batch_size=size, max_steps=5, optim="sgd",
            gradient_accumulation_steps=accumulate, learning_rate=0.1, max_grad_norm=0.0,
            lr_scheduler_type="constant", use_cpu=True, report_to=[], save_strategy="no",
            disable_tqdm=True, train_sampling_strategy="sequential",
        )  # fmt: skip
        trainer = module.DistillationTrainer(
            model=model, args=arguments, train_dataset=data, teachers=teachers
        )
        trainer.train()
        return model

    whole = trained(8, 1)
    torch.testing.assert_close(trained(2, 4).state_dict(), whole.state_dict())

    model = module.tagger(8, 1).double()
    model.load_state_dict(start)
    model.eval()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for step in range(5):
        rows = [data[(8 * step + i) % 48] for i in range(8)]
        ids, mask = (
            torch.stack([r[name] for r in rows]) for name in ("input_ids", "attention_mask")
        )
        logits = model(input_ids=ids, attention_mask=mask).logits
        loss = torch.zeros(())
        for net in teachers:
            taught = net(input_ids=ids, attention_mask=mask).logits.detach()
            each = F.kl_div(
                F.log_softmax(logits / 2, -1), F.softmax(taught / 2, -1), reduction="none"
            ).sum(-1)
            loss = loss + 0.5 * 4 * (each * mask).sum() / mask.sum()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    torch.testing.assert_close(whole.state_dict(), model.state_dict(), rtol=1e-8, atol=1e-10)
