"""What training any of the embedded models takes: first weights, the loss, router terms, optimisers, steps, files."""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor, nn

from arriero.graphs.model import Llama4, MoE
from arriero.models.batches import IGNORED, Batch

WEIGHT_DECAY = 0.05
NOT_BY_MUON = ("embed", "lm_head", "router")
BALANCE = 0.03
LOGIT_PULL = 1e-3
SHARPEN = 0.03
SHARPEN_BALANCE = 0.15  # an expert that loses its tokens now would not get them back
SAVE_EVERY = 200  # steps
MARGIN = 0.25  # between the router logits of the best two experts, wanted at least


def initialise(model: Llama4, seed: int) -> None:
    """Draw the weights: fan-in scaled, residual outputs scaled down by depth, routers small, norms one."""
    generator = torch.Generator().manual_seed(seed)
    depth = (2 * len(model.config.text.layers)) ** -0.5
    for name, parameter in model.named_parameters():
        with torch.no_grad():
            if "norm" in name and name.endswith("weight"):
                parameter.fill_(1.0)
            elif name.endswith("bias"):
                parameter.zero_()
            elif parameter.dim() == 1 or ("embed" in name and "patch" not in name):
                parameter.normal_(0.0, 0.02 if parameter.dim() == 1 else 0.1, generator=generator)
            else:
                fan_in = parameter.shape[-2] if parameter.dim() == 3 else parameter.shape[-1]
                std = fan_in**-0.5
                if "router" in name or "lm_head" in name:
                    std *= 0.25
                elif name.endswith(("o_proj.weight", "down_proj.weight", "fc2.weight", "experts.down_proj")):
                    std *= depth
                parameter.normal_(0.0, std, generator=generator)


class RouterTerms:
    """Collects the router logits of a forward pass and gives their load-balance and size terms."""

    def __init__(self, model: Llama4) -> None:
        self.logits: list[Tensor] = []
        for module in model.modules():
            if isinstance(module, MoE):
                module.router.register_forward_hook(lambda _module, _inputs, output: self.logits.append(output))

    def take(self, real: Tensor, sharpen: bool) -> tuple[Tensor, list[Tensor]]:
        """The loss term over tokens where `real` [T], and per layer the tokens per expert [E]; forgets the pass.

        With `sharpen`, a margin below `MARGIN` between a token's best two experts costs too.
        """
        loss, loads = torch.zeros(()), []
        for logits in self.logits:
            kept = logits[real]
            load = F.one_hot(kept.argmax(-1), kept.shape[-1]).float().mean(0)  # [E]
            balance = kept.shape[-1] * (load * kept.softmax(-1).mean(0)).sum()
            loss = loss + (SHARPEN_BALANCE if sharpen else BALANCE) * balance + LOGIT_PULL * kept.square().mean()
            if sharpen:
                best, second = kept.topk(2, dim=-1).values.unbind(-1)
                loss = loss + SHARPEN * F.relu(1 - (best - second) / MARGIN).mean()
            loads.append(load)
        self.logits.clear()
        return loss / max(len(loads), 1), loads


def answer_logits(model: Llama4, batch: Batch) -> Tensor:
    """Logits [A, V] of the A answer tokens of a batch of whole conversations."""
    rows, length = batch.input_ids.shape
    features = torch.zeros(0, model.config.text.hidden_size)
    if batch.pixel_values is not None:
        features = model.image_features(batch.pixel_values)
    embeds = model.embed(batch.input_ids, features)
    positions = torch.arange(length) + batch.starts[:, None]
    nothing = positions[:, :0]
    decoder = model.language_model
    hidden = decoder(embeds, positions, nothing, nothing, nothing[0], decoder.empty_cache(rows)).hiddens[-1]
    return decoder.lm_head(decoder.model.norm(hidden[batch.targets != IGNORED]))


def answer_loss(model: Llama4, routers: RouterTerms, batch: Batch, sharpen: bool) -> tuple[Tensor, dict[str, float]]:
    """The loss of a batch with its router terms; and figures: answer loss, right tokens, an expert's least share."""
    targets = batch.targets[batch.targets != IGNORED]
    logits = answer_logits(model, batch)
    loss = F.cross_entropy(logits, targets)
    terms, loads = routers.take(batch.real.flatten(), sharpen)
    figures = {
        "loss": float(loss.detach()),
        "right": float((logits.argmax(-1) == targets).float().mean()),
        "least": min(float(load.min()) for load in loads),
    }
    return loss + terms, figures


def optimisers(model: Llama4, rate: float) -> tuple[torch.optim.Optimizer, ...]:
    """Muon (Jordan et al. 2024) for the decoder's matrices, AdamW for the rest; gains and embeddings do not decay.

    `rate` is the learning rate that they begin with.
    """
    trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    matrices = [n for n, p in trained.items() if p.dim() == 2 and not any(part in n for part in NOT_BY_MUON)]
    decayed = [n for n, p in trained.items() if p.dim() >= 2 and n not in matrices and "embed" not in n]
    kept = [n for n in trained if n not in matrices and n not in decayed]
    groups = [
        {"params": [trained[name] for name in decayed], "weight_decay": WEIGHT_DECAY},
        {"params": [trained[name] for name in kept], "weight_decay": 0.0},
    ]
    return (
        torch.optim.AdamW(groups, lr=rate, betas=(0.9, 0.98), eps=1e-9, fused=True),
        torch.optim.Muon(
            [trained[name] for name in matrices],
            lr=rate,
            weight_decay=WEIGHT_DECAY,
            adjust_lr_fn="match_rms_adamw",
        ),
    )


def cosine(peak: float, share: float) -> float:
    """A learning rate that falls from `peak` to a hundredth of it while `share` goes from 0 to 1."""
    return peak * (0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * min(share, 1.0))))


def save_weights(model: Llama4, folder: Path) -> None:
    """Write the checkpoint's model.safetensors in bfloat16, by atomic rename."""
    tensors = {name: p.detach().to(torch.bfloat16).contiguous() for name, p in model.named_parameters()}
    partial = folder / "model.safetensors.partial"
    save_file(tensors, partial, metadata={"format": "pt"})
    os.replace(partial, folder / "model.safetensors")


@dataclass(frozen=True)
class Run:
    """A training: weights land in `out`, its state beside it. Modules `beside` the model are of use to it alone."""

    model: Llama4
    out: Path
    steppers: Sequence[torch.optim.Optimizer]
    beside: Mapping[str, nn.Module] = field(default_factory=dict)

    def go(
        self, steps: int, rate: Callable[[int], float], learn: Callable[[int], dict[str, float]], clip: float, log: int
    ) -> None:
        """Go on until `steps`: `learn` adds up a step's gradients, clipped at `clip`, and gives figures to tell.

        They are told every `log` steps, and the state is saved every `SAVE_EVERY`.
        """
        first = self._restore()
        started = time.monotonic()
        for step in range(first, steps):
            for group in [group for stepper in self.steppers for group in stepper.param_groups]:
                group["lr"] = rate(step)
            figures = learn(step)
            nn.utils.clip_grad_norm_(self.model.parameters(), clip)
            for stepper in self.steppers:
                stepper.step()
                stepper.zero_grad(set_to_none=True)
            if step % log == 0 or step == steps - 1:
                seconds = round((time.monotonic() - started) / (step - first + 1), 3)
                told = {"step": step, "s": seconds, **{name: round(value, 4) for name, value in figures.items()}}
                print(json.dumps(told), flush=True)
            if (step + 1) % SAVE_EVERY == 0 or step == steps - 1:
                self._save(step + 1)

    def _restore(self) -> int:
        """Take on what was saved; gives the step to go on with."""
        file = state_file(self.out)
        if not file.exists():
            return 0
        state = torch.load(file)
        for name, module in {"model": self.model, **self.beside}.items():
            module.load_state_dict(state[name])
        for stepper, saved in zip(self.steppers, state["steppers"], strict=True):
            stepper.load_state_dict(saved)
        return int(state["step"])

    def _save(self, step: int) -> None:
        modules = {name: module.state_dict() for name, module in {"model": self.model, **self.beside}.items()}
        file = state_file(self.out)
        partial = file.with_suffix(".partial")
        torch.save({**modules, "steppers": [stepper.state_dict() for stepper in self.steppers], "step": step}, partial)
        os.replace(partial, file)
        save_weights(self.model, self.out)


def state_file(folder: Path) -> Path:
    """Where a run keeps its state."""
    return folder.with_name(folder.name + ".training.pt")
