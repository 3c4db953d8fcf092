"""Muon for matrices, Adam for the rest, on fp32 master weights; the model holds rounded copies.

Muon (https://kellerjordan.github.io/posts/muon): the momentum of a matrix is replaced by the nearest semi-orthogonal matrix, by five
Newton-Schulz steps. Matrices of one shape are stacked, every expert being a matrix of its own.
"""

import torch

from fp8 import fake_quantise

MOMENTUM, BETAS, EPS = 0.95, (0.9, 0.98), 1e-10
EXPERT_TENSORS = ("expert_gate", "expert_up", "expert_down")
RATE_OF = {"embed_tokens": 1.0, "lm_head": 0.5, "gate": 0.1}  # of Adam's rate, by the tensor's last name; norms: 0.3


def is_fp8(name):
    """Linears whose weights the checkpoint holds as FP8."""
    return name.rsplit(".", 1)[-1] in EXPERT_TENSORS or name.endswith("_proj") and "eh_proj" not in name or name.endswith("_with_mqa")


def orthogonalise(g):
    """g [n, rows, columns] -> about U V^T of each matrix's singular value decomposition."""
    a, b, c = 3.4445, -4.7750, 2.0315
    x = g.bfloat16() if g.is_cuda else g
    tall = x.shape[1] > x.shape[2]
    x = x.mT if tall else x
    x = x / (x.norm(dim=(1, 2), keepdim=True) + 1e-7)
    for _ in range(5):
        xx = x @ x.mT
        x = a * x + (b * xx + c * xx @ xx) @ x
    return (x.mT if tall else x).float()


class Optimizer:
    """rate: Muon's; Adam's is `adam_rate`. Both are multiplied by step()'s factor."""

    def __init__(self, model, rate=0.02, adam_rate=0.01, decay=0.0, expert_width=128, use_muon=True):
        self.rate, self.adam_rate, self.decay, self.steps, self.quantise = rate, adam_rate, decay, 0, False
        by_shape, self.adam = {}, []
        for name, p in model.named_parameters():
            if p.ndim == 2 and use_muon and (is_fp8(name) or "eh_proj" in name):
                shape = (-1, expert_width, p.shape[1]) if name.endswith(EXPERT_TENSORS) else (1, *p.shape)
                by_shape.setdefault((shape[1:], is_fp8(name)), []).append((p, p.detach().view(shape).shape[0]))
            else:
                own = RATE_OF.get(name.rsplit(".", 1)[-1], 0.3 if p.ndim == 1 else 0.1)
                zero = torch.zeros_like(p, dtype=torch.float32)
                self.adam.append((name, p, own, p.detach().float().clone(), zero, zero.clone()))
        self.muon = []
        for (shape, fp8), members in by_shape.items():
            parameters, counts = zip(*members)
            master = torch.cat([p.detach().float().view(-1, *shape) for p in parameters])
            self.muon.append((parameters, counts, shape, fp8, master, torch.zeros_like(master)))

    @torch.no_grad()
    def step(self, factor):
        self.steps += 1
        for parameters, counts, shape, fp8, master, momentum in self.muon:
            gradient = torch.cat([p.grad.view(-1, *shape) for p in parameters]).float()
            momentum.lerp_(gradient, 1 - MOMENTUM)
            update = orthogonalise(gradient.lerp_(momentum, MOMENTUM))
            rate = self.rate * factor
            master.mul_(1 - rate * self.decay).add_(update, alpha=-rate * max(1, shape[0] / shape[1]) ** 0.5)
        _, parameters, own, masters, first, second = zip(*self.adam)
        gradients = [p.grad.float() for p in parameters]
        torch._foreach_lerp_(first, gradients, 1 - BETAS[0])
        torch._foreach_mul_(second, BETAS[1])
        torch._foreach_addcmul_(second, gradients, gradients, 1 - BETAS[1])
        bias1, bias2 = (1 - beta**self.steps for beta in BETAS)
        denominator = torch._foreach_sqrt(torch._foreach_div(second, bias2))
        torch._foreach_add_(denominator, EPS)
        update = torch._foreach_div(first, denominator)
        torch._foreach_mul_(update, [-self.adam_rate * factor * r / bias1 for r in own])
        torch._foreach_add_(masters, update)
        self.write_back()

    @torch.no_grad()
    def write_back(self):
        """Copies the masters into the model; with `quantise`, as the checkpoint will hold them. The gradient passes straight through."""
        for name, p, _, master, _, _ in self.adam:
            p.copy_(fake_quantise(master) if self.quantise and is_fp8(name) else master)
        for parameters, counts, _, fp8, master, _ in self.muon:
            values = fake_quantise(master) if self.quantise and fp8 else master
            for p, value in zip(parameters, values.split(counts)):
                p.copy_(value.view(p.shape))

    def masters(self, model):
        """{parameter name: fp32 master}"""
        names = {p: name for name, p in model.named_parameters()}
        found = {name: master for name, _, _, master, _, _ in self.adam}
        for parameters, counts, _, _, master, _ in self.muon:
            found.update({names[p]: v.reshape(p.shape) for p, v in zip(parameters, master.split(counts))})
        return found

    def state(self):
        return {"steps": self.steps, "muon": [entry[4:] for entry in self.muon], "adam": [entry[3:] for entry in self.adam]}

    @torch.no_grad()
    def load_state(self, state):
        self.steps = state["steps"]
        for mine, theirs in zip([e[4:] for e in self.muon] + [e[3:] for e in self.adam], [*state["muon"], *state["adam"]], strict=True):
            for a, b in zip(mine, theirs, strict=True):
                a.copy_(b)
        self.write_back()
