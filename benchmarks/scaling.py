"""How a step grows with the number of GPUs, on paper: bytes per GPU and step against the speed of the links.

    python -m benchmarks.scaling [--step-ms 500] [--config FILE]

prints the tables of docs/scaling.md. Without ``--step-ms`` the step of one GPU is itself predicted.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from torch import nn

import dinov2
from dinov2.configs import Config, load_config
from dinov2.train.plan.describe import PEAK_FRACTIONS
from dinov2.train.plan.gpus import ASSUMED_GPU, find_gpu
from dinov2.train.plan.measure import StepCosts

GPUS = (1, 8, 16, 32, 64, 128, 256, 512)
PER_NODE = 8
STRATEGIES = ("SHARD_GRAD_OP", "FULL_SHARD", "HYBRID_SHARD", "NO_SHARD")
RECIPE = Path(dinov2.__file__).parent / "configs" / "train" / "vitg14_reg4.yaml"
SINKHORN_ITERATIONS = 3
NODE_LINK = 450e9
"""Bytes per second and direction of an H200 to the other GPUs of its node: half of the data sheet's NVLink."""
NETWORK_LINK = 50e9
"""The same between nodes: one 400 Gb/s InfiniBand port per GPU."""
HOP = 5e-6
"""Seconds of one hop of a ring between nodes, whatever it carries: an assumption."""
HIDDEN = 0.8
"""Share of the step under which weights and gradients can travel: an assumption."""


@dataclass(frozen=True)
class Network:
    """What travels: parameters (16 bit as weights, float32 as gradients), the chunks in which they are gathered and
    reduced (blocks, root, heads), and the prototypes of all heads."""

    parameters: int
    units: int
    prototypes: int

    @classmethod
    def of(cls, student: nn.ModuleDict) -> Network:
        """What networks like this one send."""
        heads = [module for name, module in student.items() if name != "backbone"]
        parameters = sum(p.numel() for p in student.parameters())
        prototypes = sum(head.last_layer.weight_g.numel() for head in heads)
        return cls(parameters, len(student.backbone.blocks) + 1 + len(heads), prototypes)


@dataclass(frozen=True)
class Volume:
    """Bytes that one GPU receives per step: 16-bit weights, gradients, Sinkhorn's sums; and how many of all these
    come from other nodes through its port."""

    weights: float
    gradients: float
    sums: float
    network: float

    @property
    def total(self) -> float:
        """All bytes, from wherever."""
        return self.weights + self.gradients + self.sums


@dataclass(frozen=True)
class Times:
    """Seconds per step: of all bytes at the speed inside a node, of those between nodes at that of the network; what
    the step waits for, and what it would if nothing were hidden."""

    node: float
    network: float
    exposed: float
    serial: float


def volume(net: Network, gpus: int, strategy: str) -> Volume:
    """Bytes per GPU and step.

    A ring of N GPUs brings each (N - 1) / N of what is gathered or reduced and scattered, an all-reduce twice that.
    Over nodes the data enters a node once, shared by the ports of its GPUs. The teacher has no backward and is
    gathered once, the student once more under ``FULL_SHARD``.

    Args:
        net: what travels.
        gpus: N, at most one node, or whole nodes.
        strategy: a value of ``sharding_strategy``.
    """
    nodes, local = math.ceil(gpus / PER_NODE), min(gpus, PER_NODE)
    weights = 2 * net.parameters * (3 if strategy == "FULL_SHARD" else 2)
    gradients = 4 * net.parameters
    sums = 2 * 4 * SINKHORN_ITERATIONS * net.prototypes
    abroad = _others(nodes) / local  # fraction of a whole that one port receives
    if strategy == "NO_SHARD":
        got = Volume(0, 2 * gradients * _others(gpus), sums * _others(gpus), (2 * gradients + sums) * abroad)
    elif strategy == "HYBRID_SHARD":
        between = 2 * gradients * abroad
        inside = _others(local)
        got = Volume(weights * inside, gradients * inside + between, sums * _others(gpus), between + sums * abroad)
    else:
        part = _others(gpus)
        got = Volume(weights * part, gradients * part, sums * part, (weights + gradients + sums) * abroad)
    return got


def times(net: Network, gpus: int, strategy: str, step: float, link: float) -> Times:
    """Time of the communication, and the part that no computation hides.

    The two kinds of link work side by side; the hops of a ring between nodes come on top. `HIDDEN` of the step hides
    weights and gradients but for the first and the last chunk. Nothing hides Sinkhorn's sums, whose all-reduces
    wait for each other.

    Args:
        net: what travels.
        gpus: N.
        strategy: of sharding.
        step: seconds of a step on one GPU.
        link: bytes per second of a GPU inside its node.
    """
    if gpus == 1:
        return Times(0.0, 0.0, 0.0, 0.0)
    got, nodes = volume(net, gpus, strategy), math.ceil(gpus / PER_NODE)
    node, network = got.total / link, got.network / NETWORK_LINK
    rounds = {"NO_SHARD": 2, "HYBRID_SHARD": 2, "SHARD_GRAD_OP": 3, "FULL_SHARD": 4}[strategy] * net.units
    travelling = max(node, network) + HOP * (nodes - 1) * rounds
    ends = 2 * travelling / net.units
    sums = 2 * HOP * (nodes - 1) * (SINKHORN_ITERATIONS + 1) + got.sums / (link if nodes == 1 else NETWORK_LINK)
    exposed = sums + ends + max(0.0, travelling - ends - HIDDEN * step)
    return Times(node, network, exposed, travelling + sums)


def tables(config: Config, measured_ms: float | None = None) -> Iterator[str]:
    """The page's tables, line by line."""
    gpu, hoped = find_gpu(ASSUMED_GPU), PEAK_FRACTIONS[0]
    images = config.train.batch_size_per_gpu
    costs = StepCosts(config)
    flops = costs.flops(images).model
    step = flops / (hoped * gpu.bf16) if measured_ms is None else measured_ms / 1e3
    net = Network.of(costs.student)
    yield f"{net.parameters / 1e6:,.1f} M parameters in {net.units} chunks, {net.prototypes:,} prototypes."
    source = "measured" if measured_ms else f"predicted: {hoped:.0%} of the 16-bit peak"
    yield f"{images} images per GPU; a step of one {gpu.name} takes {1e3 * step:.0f} ms ({source})."
    yield from _table(
        "GB received per GPU and step (of these from other nodes)",
        lambda n, s: f"{volume(net, n, s).total / 1e9:.2f} ({volume(net, n, s).network / 1e9:.2f})",
    )

    def links(n: int, strategy: str) -> str:
        taken = times(net, n, strategy, step, NODE_LINK)
        return f"{1e3 * taken.node:.1f} / {1e3 * taken.network:.1f} / {1e3 * taken.exposed:.1f}"

    def speed(n: int, strategy: str) -> str:
        taken = times(net, n, strategy, step, NODE_LINK)
        fractions = (step / (step + waited) for waited in (taken.exposed, taken.serial))
        best, worst = (f"{n * images / step * part:,.0f} ({part:.0%})" for part in fractions)
        return best if n == 1 else f"{best}; {worst}"

    yield from _table("ms per step: inside the node / between nodes / not hidden", links)
    yield from _table("Predicted images per second (part of N times one GPU); the same if nothing were hidden", speed)


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the tables."""
    parser = argparse.ArgumentParser(description="Communication and speed on 1 to 512 GPUs, on paper.")
    parser.add_argument("--config", default=RECIPE, help="YAML file; the full recipe where left out")
    parser.add_argument("--step-ms", type=float, help="measured step of one GPU; predicted where left out")
    args = parser.parse_args(arguments)
    config = load_config(args.config)
    if config.train.batch_size_per_gpu == "auto":
        parser.error("train.batch_size_per_gpu = auto says nothing about a step; give a configuration with a number.")
    sys.stdout.write("\n".join(tables(config, args.step_ms)) + "\n")
    return 0


def _others(count: int) -> float:
    return (count - 1) / count


def _table(title: str, cell: Callable[[int, str], str]) -> Iterator[str]:
    yield from ("", f"### {title}", "", f"| GPUs | {' | '.join(STRATEGIES)} |", "|---" * 5 + "|")
    for gpus in GPUS:
        yield f"| {gpus} | {' | '.join(cell(gpus, strategy) for strategy in STRATEGIES)} |"


if __name__ == "__main__":
    sys.exit(main())
