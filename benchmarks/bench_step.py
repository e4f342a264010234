"""Speed of a training step: ours in several forms, and independent reconstructions of two published ones.

    python benchmarks/bench_step.py --preset vitg48|tiny --impl NAME[,NAME...]|all --device cuda|cpu --json OUT
        [--steps N] [--ablate [SWITCH,...]] [--no-calibration] [--budget SECONDS] [--force]

Every implementation runs in a process of its own, and OUT is rewritten when one ends, so that whatever breaks later
costs nothing measured before. First comes a calibration with the exact shapes of the step. An implementation is timed
only if its losses and gradients agree with the fp32 reference on the same weights, crops and masks. Where others
are measured too, ours_bf16 comes first and again last: the difference is the device's drift. ref_sep computes every
sample where the others leave out what stochastic depth drops; for its memory it runs on fewer images (timing.images).

Batches are random bytes in page-locked memory: the data path is not in these figures. bench_data.py measures it,
and a run's metric data_wait_pct says what remains of it.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks.machine import describe_machine
from benchmarks.step_batches import PRESETS
from benchmarks.step_calibration import calibrate
from benchmarks.step_measure import BASE, measure
from benchmarks.step_variants import ABLATIONS, VARIANTS
from dinov2.utils.files import write_text

REFERENCES = ("ref_packed", "ref_sep")
AGAIN = "_again"
# Ours and the references alternate, so that a slow drift of the device favours neither.
ALL = (BASE, "ref_packed", "ours_fp8_teacher", "ref_sep", "ours_fp8", "ours_eager")
LEAST_SECONDS = 20  # below that a process is not worth starting
KEPT_OUTPUT = 2000  # characters of a failed process's output


def parse(argv: list[str] | None) -> argparse.Namespace:
    """The command line, checked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", choices=PRESETS, required=True)
    parser.add_argument("--impl", default="all", help=f"of {', '.join(VARIANTS)}, with commas; or all")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--json", type=Path, help="file to write")
    parser.add_argument("--force", action="store_true", help="replace that file if it is there")
    parser.add_argument("--steps", type=int, help="timed steps; references get half")
    parser.add_argument(
        "--ablate",
        nargs="?",
        const=",".join(ABLATIONS),
        default="",
        help=f"also {BASE} without one switch at a time, of {', '.join(ABLATIONS)}",
    )
    parser.add_argument("--no-calibration", action="store_true")
    parser.add_argument("--budget", type=float, default=570.0, help="seconds for everything")
    parser.add_argument("--limit", type=float, default=200.0, help="seconds for one implementation")
    parser.add_argument("--only-child", help=argparse.SUPPRESS)
    parser.add_argument("--brief", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    args.names = list(ALL) if args.impl == "all" else [name for name in args.impl.split(",") if name]
    args.ablated = [name for name in args.ablate.split(",") if name]
    for chosen, known in ((args.names, VARIANTS), (args.ablated, ABLATIONS)):
        if unknown := [name for name in chosen if name not in known]:
            parser.error(f"{', '.join(unknown)} is unknown; choose of {', '.join(known)}.")
    if args.json is None:
        parser.error("--json is missing; name the file to write.")
    if not args.json.parent.is_dir():
        parser.error(f"{args.json.parent} is no folder; --json names a file in one that exists.")
    if args.json.exists() and not args.force and not args.only_child:
        parser.error(f"{args.json} exists; name another file, or replace it with --force.")
    if args.steps is not None and args.steps < 1:
        parser.error(f"--steps is {args.steps}; at least 1 is needed.")
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device is cuda, but PyTorch sees no GPU; use --device cpu --preset tiny.")
    return args


def schedule(names: list[str], ablated: list[str]) -> list[tuple[str, str]]:
    """(label, implementation) in order: ours_bf16 at both ends if there is anything in between."""
    if ablated and BASE not in names:
        names = [BASE, *names]
    between = [name for name in names if name != BASE] + [f"{BASE}-{switch}" for switch in ablated]
    if BASE not in names:
        return [(name, name) for name in between]
    end = [(BASE + AGAIN, BASE)] if between else []
    return [(BASE, BASE), *((name, name) for name in between), *end]


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Run every part in its own process and write the file after each."""
    started = time.monotonic()
    results: dict[str, Any] = {
        "preset": args.preset,
        "device": args.device,
        "machine": {
            **describe_machine(("torch", "triton", "numpy", "omegaconf")),
            "cuda": torch.version.cuda,
            "driver": driver_version(),
            "allocator": os.environ.get("PYTORCH_CUDA_ALLOC_CONF"),
        },
        "complete": False,
        "implementations": {},
    }
    order = schedule(args.names, args.ablated)
    parts = order if args.no_calibration else [("calibration", "calibration"), *order]
    say(f"{len(parts)} parts, at most {args.limit:.0f} s each and {args.budget:.0f} s together")
    with tempfile.TemporaryDirectory() as scratch:
        environment = {"TORCHINDUCTOR_CACHE_DIR": f"{scratch}/inductor", **os.environ}
        for label, name in parts:
            left = args.budget - (time.monotonic() - started)
            if left < min(LEAST_SECONDS, args.budget):
                outcome: dict[str, Any] = {"status": "skipped", "error": "the budget of time is spent"}
            else:
                brief = label.endswith(AGAIN)
                outcome = run_child(name, args, min(left, args.limit), Path(scratch), environment, brief)
            if label == "calibration":
                results[label] = outcome
            else:
                results["implementations"][label] = outcome
            results["elapsed_s"] = time.monotonic() - started
            write(args.json, results | comparisons(results))
            say(f"{label}: {outcome['status']} after {results['elapsed_s']:.0f} s {headline(outcome)}")
    results |= comparisons(results) | {"complete": True}
    write(args.json, results)
    return results


def run_child(
    name: str,
    args: argparse.Namespace,
    seconds: float,
    scratch: Path,
    environment: dict[str, str],
    brief: bool,
) -> dict[str, Any]:
    """What one part measured in its own process, with the end of its output if it failed or ran out of time."""
    part, log = scratch / "part.json", scratch / "log"
    part.unlink(missing_ok=True)
    command = [sys.executable, str(Path(__file__).resolve()), "--only-child", name, "--json", str(part)]
    command += ["--preset", args.preset, "--device", args.device, *(["--brief"] if brief else [])]
    command += ["--steps", str(args.steps)] if args.steps else []
    started = time.monotonic()
    with log.open("w") as output:
        child = subprocess.Popen(
            command, stdout=output, stderr=subprocess.STDOUT, start_new_session=True, env=environment
        )
        try:
            code: int | None = child.wait(seconds)
        except subprocess.TimeoutExpired:
            code = None
        finally:
            if child.poll() is None:  # with whatever it started
                os.killpg(child.pid, signal.SIGKILL)
                child.wait()
    outcome = json.loads(part.read_text()) if part.exists() else {}
    outcome.setdefault("status", "failed")
    outcome["process_s"] = time.monotonic() - started
    if code != 0:
        reason = f"stopped after {seconds:.0f} s" if code is None else f"exit status {code}"
        outcome["error"] = f"{reason}\n{log.read_text(errors='replace')[-KEPT_OUTPUT:]}"
    return outcome


def child(args: argparse.Namespace) -> int:
    """One part, in this process: writes what it has after every stage."""
    preset, device = PRESETS[args.preset], torch.device(args.device)
    if args.only_child == "calibration":
        write(args.json, {**calibrate(preset, device), "status": "measured"})
        return 0
    measure(
        args.only_child,
        preset,
        device,
        steps=args.steps,
        brief=args.brief,
        save=lambda result: write(args.json, result),
    )
    return 0


def comparisons(results: dict[str, Any]) -> dict[str, Any]:
    """Ratios to the references, fraction of the floor, drift, and each switch's gain beside the predicted one."""
    speeds = {
        label: outcome["timing"]["img_per_s"]
        for label, outcome in results["implementations"].items()
        if "timing" in outcome
    }
    floor = results.get("calibration", {}).get("floor", {}).get("img_per_s")
    ratios: dict[str, dict[str, float]] = {}
    for label, speed in speeds.items():
        ratios[label] = {f"vs_{ref}": speed / speeds[ref] for ref in REFERENCES if ref in speeds}
        ratios[label] |= {"fraction_of_floor": speed / floor} if floor else {}
    found: dict[str, Any] = {"ratios": ratios}
    if BASE in speeds and BASE + AGAIN in speeds:
        found["drift"] = speeds[BASE + AGAIN] / speeds[BASE] - 1
    ablation = {}
    for switch, option in ABLATIONS.items():
        without = results["implementations"].get(f"{BASE}-{switch}", {}).get("timing")
        if without and BASE in speeds:
            base_ms = results["implementations"][BASE]["timing"]["step_ms"]
            ablation[switch] = {
                "predicted_ms": option.predicted_ms,
                "measured_ms": without["step_ms"] - base_ms,
            }
    return found | {"ablation": ablation}


def table(results: dict[str, Any]) -> str:
    """The headline figures as Markdown."""
    lines = ["| implementation | img/s | ms | MFU | over ref_packed | over ref_sep | of the floor |"]
    lines.append("|---|---|---|---|---|---|---|")
    for label, outcome in results["implementations"].items():
        if "timing" not in outcome:
            lines.append(f"| {label} | {outcome['status']} | | | | | |")
            continue
        timing, ratio = outcome["timing"], results["ratios"][label]
        cells = [f"{timing['img_per_s']:.1f}", f"{timing['step_ms']:.0f}", number(outcome["work"].get("mfu"))]
        cells += [number(ratio.get(key)) for key in ("vs_ref_packed", "vs_ref_sep", "fraction_of_floor")]
        lines.append(f"| {label} | {' | '.join(cells)} |")
    return "\n".join(lines)


def number(value: float | None) -> str:
    """Two decimals, or nothing."""
    return "" if value is None else f"{value:.2f}"


def headline(outcome: dict[str, Any]) -> str:
    """One line on what a part brought: its speed, or the end of its error."""
    speed = [f"{outcome['timing']['img_per_s']:.1f} img/s"] if "timing" in outcome else []
    return "; ".join([*speed, *outcome.get("error", "").splitlines()[-1:]])


def driver_version() -> str | None:
    """Of the GPU; None without one."""
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()[0]
    except (OSError, subprocess.CalledProcessError, IndexError):
        return None


def write(path: Path, content: dict[str, Any]) -> None:
    """Replace a JSON file in one go; numbers that are not finite become null, which JSON knows."""
    write_text(path, json.dumps(_finite(content), indent=2, allow_nan=False) + "\n")


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(entry) for entry in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def say(text: str) -> None:
    """A line for whoever waits."""
    sys.stdout.write(text + "\n")
    sys.stdout.flush()


def main(argv: list[str] | None = None) -> int:
    """0 if everything asked for was measured, else 1."""
    args = parse(argv)
    if args.only_child:
        return child(args)
    results = run(args)
    say(table(results))
    return int(any(outcome["status"] != "measured" for outcome in results["implementations"].values()))


if __name__ == "__main__":
    sys.exit(main())
