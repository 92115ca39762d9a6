"""Draws what equal entropy does: docs/equal-entropy.svg (it moves) and the page with a slider.

    python tools/equal_entropy.py          # rewrite both
    python tools/equal_entropy.py --check  # exit 1 if the library computes something else

Two small networks learn the bundled digits, one from clean and one from adversarial images. Then
``EntropyBalance`` brings them to equal entropy on test images, by the published sign rule step by
step, and by "bisect" at once. Everything drawn comes out of that.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import bmtard
from bmtard.attacks import pgd
from bmtard.data import load

DOCS = Path(__file__).resolve().parents[1] / "docs"
PICTURE = DOCS / "equal-entropy.svg"
PAGE = DOCS / "_static" / "equal-entropy.html"
EPSILON, STEPS, EVERY = 0.15, 60, 4  # of the attack, in pixel units; of the rule; steps a frame
TEMPERATURE_LR = 0.05
TEACHERS = ("clean teacher", "robust teacher")
COLOURS = ("#2f6fb4", "#c4572e")


def attack(network: nn.Module, x: Tensor, y: Tensor, generator: torch.Generator) -> Tensor:
    return pgd(network, x, y, epsilon=EPSILON, step_size=EPSILON / 4, steps=6, generator=generator)


def teacher(x: Tensor, y: Tensor, robust: bool) -> nn.Module:
    """A small network, trained on clean images, or on adversarial ones if ``robust``."""
    torch.manual_seed(0)
    generator = torch.Generator().manual_seed(0)
    network = nn.Sequential(nn.Flatten(), nn.Linear(64, 96), nn.ReLU(), nn.Linear(96, 10))
    optimizer = torch.optim.Adam(network.parameters(), lr=3e-3)
    for _ in range(12):
        for rows in torch.randperm(len(x), generator=generator).split(128):
            seen = attack(network, x[rows], y[rows], generator) if robust else x[rows]
            optimizer.zero_grad()
            nn.functional.cross_entropy(network(seen), y[rows]).backward()
            optimizer.step()
    return network.eval()


def states(mode: str, steps: int, logits: list[Tensor], row: int) -> list[dict[str, Any]]:
    """What ``steps`` calls of the balance see: temperatures, entropies, one image's answers."""
    balance = bmtard.EntropyBalance(2, mode=mode, temperature_lr=TEMPERATURE_LR)
    frames = []
    for _ in range(steps):
        temperatures = balance(logits)
        answers = [
            torch.softmax(teacher[row] / t, 0)
            for teacher, t in zip(logits, temperatures, strict=True)
        ]
        frames.append(
            {
                "temperatures": [round(t, 3) for t in temperatures.tolist()],
                "entropies": [round(h, 3) for h in balance.entropies.tolist()],
                "answers": [[round(p, 3) for p in answer.tolist()] for answer in answers],
            }
        )
    return frames


def compute() -> dict[str, Any]:
    data = load("digits")
    scale = float(data.max_value)
    x, y = data.train_images / scale, data.train_labels
    networks = [teacher(x, y, robust) for robust in (False, True)]
    x, y = data.test_images[:256] / scale, data.test_labels[:256]
    x_adv = attack(networks[1], x, y, torch.Generator().manual_seed(1))
    with torch.no_grad():
        logits = [networks[0](x), networks[1](x_adv)]
    # The image whose clean answer has the median entropy under the temperature that it ends with.
    final = bmtard.EntropyBalance(2)(logits)
    row = int(bmtard.softmax_entropy(logits[0], final[0].float()).argsort()[len(x) // 2])
    return {
        "label": int(y[row]),
        "temperature_lr": TEMPERATURE_LR,
        "sign": states("sign", STEPS + 1, logits, row),
        "bisect": states("bisect", 1, logits, row),
    }


def bars(values: list[list[float]], index: int, seconds: int) -> str:
    """The bars of a teacher's answer; each value moves through ``values`` [frame][class]."""
    text = ""
    for digit in range(10):
        heights = [round(150 * frame[digit], 1) for frame in values]
        x = 40 + 360 * index + 30 * digit
        text += (
            f'<rect x="{x}" width="22" y="{210 - heights[-1]:.1f}" height="{heights[-1]}" '
            f'fill="{COLOURS[index]}">'
            f"{animate('height', heights, seconds)}"
            f"{animate('y', [round(210 - h, 1) for h in heights], seconds)}</rect>"
            f'<text x="{x + 11}" y="226" text-anchor="middle">{digit}</text>\n'
        )
    return text


def animate(attribute: str, values: list[float], seconds: int) -> str:
    joined = ";".join(f"{value:g}" for value in values)
    return (
        f'<animate attributeName="{attribute}" dur="{seconds}s" repeatCount="indefinite" '
        f'values="{joined}"/>'
    )


def picture(data: dict[str, Any]) -> str:
    """An SVG that moves through the steps of the sign rule, and rests at their end."""
    frames = data["sign"][::EVERY]
    frames += [frames[-1]] * 6
    seconds = len(frames) // 2
    text = (
        '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 740 330" font-family="sans-serif" '
        'font-size="13" fill="#333">\n<rect width="740" height="330" fill="#fff"/>\n'
    )
    for index, name in enumerate(TEACHERS):
        left = 40 + 360 * index
        text += f'<text x="{left}" y="28" font-size="17" fill="{COLOURS[index]}">{name}</text>\n'
        text += bars([frame["answers"][index] for frame in frames], index, seconds)
        text += f'<line x1="{left}" x2="{left + 292}" y1="210" y2="210" stroke="#333"/>\n'
        widths = [round(110 * frame["entropies"][index], 1) for frame in frames]
        y = 250 + 36 * index
        text += (
            f'<text x="40" y="{y + 15}">mean entropy, {name}</text>'
            f'<rect x="250" y="{y}" height="20" width="{widths[-1]}" fill="{COLOURS[index]}">'
            f"{animate('width', widths, seconds)}</rect>\n"
        )
        for place, frame in enumerate(frames):
            shown = ["hidden"] * len(frames)
            shown[place] = "visible"
            last = place == len(frames) - 1
            step = (
                f'<animate attributeName="visibility" dur="{seconds}s" repeatCount="indefinite" '
                f'calcMode="discrete" values="{";".join(shown)}"/>'
            )
            text += (
                f'<g visibility="{"visible" if last else "hidden"}">{step}'
                f'<text x="{left + 292}" y="28" text-anchor="end">temperature '
                f"{frame['temperatures'][index]:.2f}</text>"
                f'<text x="600" y="{y + 15}">{frame["entropies"][index]:.2f} nats</text></g>\n'
            )
    return text + "</svg>\n"


PAGE_TEXT = """<!doctype html>
<meta charset="utf-8">
<title>Equal entropy</title>
<style>
body { font: 14px sans-serif; color: #333; background: #fff; margin: 8px; max-width: 740px }
input { width: 100% } svg { width: 100%; height: auto }
</style>
<label for="step">Step of the sign rule, @LR@ each: <b id="number"></b></label>
<input id="step" type="range" min="0" max="@LAST@" value="0">
<button id="play">play</button> <button id="bisect">"bisect": one step</button>
<svg viewBox="0 0 740 320" font-size="13"></svg>
<p>Above: the answers of both teachers to one image of the digit @LABEL@. Below: their mean
entropies over 256 images. The sharper teacher's temperature rises until both are equally
uncertain.</p>
<script>
const data = @DATA@, names = @NAMES@, colours = @COLOURS@;
const slider = document.getElementById("step"), svg = document.querySelector("svg");
function draw(state, label) {
  let out = "";
  names.forEach((name, k) => {
    const left = 40 + 360 * k, y = 245 + 36 * k, entropy = state.entropies[k];
    out += `<text x="${left}" y="28" font-size="17" fill="${colours[k]}">${name}</text>
      <text x="${left + 292}" y="28" text-anchor="end">temperature
      ${state.temperatures[k].toFixed(2)}</text>
      <line x1="${left}" x2="${left + 292}" y1="210" y2="210" stroke="#333"/>
      <text x="40" y="${y + 15}">mean entropy, ${name}</text>
      <rect x="250" y="${y}" height="20" width="${110 * entropy}" fill="${colours[k]}"/>
      <text x="600" y="${y + 15}">${entropy.toFixed(2)} nats</text>`;
    state.answers[k].forEach((p, digit) => {
      const x = left + 30 * digit;
      out += `<rect x="${x}" y="${210 - 150 * p}" width="22" height="${150 * p}"
        fill="${colours[k]}"/><text x="${x + 11}" y="226" text-anchor="middle">${digit}</text>`;
    });
  });
  svg.innerHTML = out;
  document.getElementById("number").textContent = label;
}
function show() { draw(data.sign[slider.value], slider.value); }
let timer;
document.getElementById("play").onclick = () => {
  clearInterval(timer);
  slider.value = 0;
  timer = setInterval(() => {
    show();
    if (slider.value === slider.max) clearInterval(timer);
    slider.value = Number(slider.value) + 1;
  }, 120);
};
document.getElementById("bisect").onclick = () => {
  clearInterval(timer);
  draw(data.bisect[0], '"bisect" instead');
};
slider.oninput = () => { clearInterval(timer); show(); };
show();
</script>
"""


def page(data: dict[str, Any]) -> str:
    values = {
        "LR": data["temperature_lr"],
        "LAST": len(data["sign"]) - 1,
        "LABEL": data["label"],
        "DATA": json.dumps({k: data[k] for k in ("sign", "bisect")}, separators=(",", ":")),
        "NAMES": json.dumps(TEACHERS),
        "COLOURS": json.dumps(COLOURS),
    }
    text = PAGE_TEXT
    for name, value in values.items():
        text = text.replace(f"@{name}@", str(value))
    return text


def drawn(text: str) -> list[dict[str, Any]]:
    """The states of the sign rule in the text of the page."""
    data = text.partition("const data = ")[2].partition(", names")[0]
    states: list[dict[str, Any]] = json.loads(data)["sign"]
    return states


def differs(first: list[dict[str, Any]], second: list[dict[str, Any]]) -> bool:
    """Whether temperatures or entropies differ by more than another machine's rounding does."""
    return len(first) != len(second) or any(
        abs(a - b) > 0.05
        for one, two in zip(first, second, strict=True)
        for key in ("temperatures", "entropies")
        for a, b in zip(one[key], two[key], strict=True)
    )


def main() -> None:
    parser = argparse.ArgumentParser(usage=__doc__)
    parser.add_argument("--check", action="store_true")
    check = parser.parse_args().check
    data = compute()
    if check:
        if differs(data["sign"], drawn(PAGE.read_text())):
            raise SystemExit(f"{PAGE} shows other states: run tools/equal_entropy.py")
        return
    PICTURE.write_text(picture(data))
    PAGE.write_text(page(data))
    first, last = data["sign"][0], data["sign"][-1]
    print(f"sign: {first} -> {last}\nbisect: {data['bisect'][0]}")


if __name__ == "__main__":
    main()
