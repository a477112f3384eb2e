"""Command line of the benchmarks: `python -m benchmarks NAME [options]`."""

from __future__ import annotations

import argparse
import importlib
import logging
import shlex
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Protocol, cast

import torch

from benchmarks.environment import RESULTS, ROOT
from benchmarks.options import positive
from hstu_dist.errors import UserError
from hstu_dist.machine import keep_freed_memory

BENCHMARKS: Mapping[str, str] = {
    "attention": "HSTU attention against torch's flash attention and the padded research code",
    "encoder": "HSTU layers against Transformer layers on flash attention: the paper's figure of speed",
    "inference": "M-FALCON against one candidate at a time, cached histories, memory, a server under load",
    "train_step": "a whole training step on MovieLens-1M, and where its time goes",
    "embedding": "embedding tables: lookup with update against nn.Embedding, share of a step, memory of a large table",
    "data": "events/s of reading and batching, Stochastic Length, balance of 64 simulated ranks",
    "stream": "following a stream: events/s and memory in steady state, and MovieLens-1M predicted week by week",
    "vocabulary": "growing vocabularies against hashing on a stream whose items come and go: HR@10 of ids, by memory",
    "vocabulary_step": "what a growing vocabulary costs a step, by rows of the table and policy of eviction",
    "prepare": "event logs to sequences: seconds and memory by size and limit, and reading 100 million events back",
    "checkpoint": "saving and loading 1 GB on two ranks against the disk, and how long training stands still",
    "kernels": "the Triton kernels compiled ahead of time: registers, spills, shared memory, roofline; needs no GPU",
    "plan": "the capacity planner: its time and memory, and its predictions against real ranks and towers",
    "faults": "the fault campaign: real faults at random steps, after which a run must end as if left alone",
    "launch": "seconds to the first step of `python -m launch` over plain torchrun",
    "ranking": "HSTU against DLRM on MovieLens-1M at several seeds, and HSTU with one choice changed; an hour",
    "ml1m": "SASRec and HSTU on MovieLens-1M at several seeds: epoch chosen on validation, then a refit; hours",
    "appendix_c": "the paper's synthetic experiment: the Transformer and two HSTUs, one pass over its stream; hours",
    "scaling": "scaling laws: the ladder and the iso-FLOP sweep, their fits, the largest run told before; hours",
    "external": "any other program beside this package's training step, on the same data and lengths",
    "all": "every benchmark but ml1m, appendix_c, scaling, external and gpu, a process each; continues if interrupted",
    "gpu": "on a machine with a GPU: its tests, tuned kernels, and what depends on it; 20 minutes at most",
}
"""Name of each benchmark, which is the name of its module, and what it measures."""


class Benchmark(Protocol):
    """What a benchmark's module offers; two names beside it are optional.

    `add_options(parser)` adds options; `PARTIAL` names those that, changed, make a run a part of the measurement,
    which does not touch the committed results.
    """

    def run(self, options: argparse.Namespace) -> int:
        """Measures, writes a result file and returns the exit status.

        Args:
            options: `device` (torch.device), `quick` (bool), `output` (folder of result files), `scratch` (folder of
                unfinished ones), `command` (what to type to repeat it), and what `add_options` added.
        """


def main(arguments: Sequence[str]) -> int:
    """Runs one benchmark; returns the exit status."""
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    if not arguments or arguments[0] in ("-h", "--help"):
        sys.stdout.write(_overview())
        return 0
    try:
        name = arguments[0]
        if name not in BENCHMARKS:
            raise UserError(f"benchmark: got {name!r}, expected one of {', '.join(BENCHMARKS)}", "see --help")
        # imported by name, and only this one: each needs other packages
        benchmark = importlib.import_module(f"benchmarks.{name}")
        options = _options(name, arguments[1:], benchmark)
        return cast(Benchmark, benchmark).run(options)
    except UserError as error:
        sys.stderr.write(f"{error}\n")
        return 2
    except KeyboardInterrupt:
        sys.stderr.write("interrupted: the same command goes on with what is not measured yet\n")
        return 130


def _overview() -> str:
    lines = [f"  {name:<17}{summary}" for name, summary in BENCHMARKS.items()]
    usage = "usage: python -m benchmarks NAME [options]"
    return "\n".join([usage, "", *lines, "", "python -m benchmarks NAME --help lists options", ""])


def _options(name: str, arguments: Sequence[str], benchmark: object) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog=f"python -m benchmarks {name}", description=BENCHMARKS[name])
    parser.add_argument("--device", type=_device, default=_default_device(), help="cpu or cuda (default: %(default)s)")
    parser.add_argument("--threads", type=positive, help="CPU threads (default: torch's choice)")
    parser.add_argument("--quick", action="store_true", help="tiny smoke run; does not touch the committed results")
    parser.add_argument("--output", type=Path, help="folder of the result files")
    add_options = getattr(benchmark, "add_options", None)
    if add_options is not None:
        add_options(parser)
    options = parser.parse_args(arguments)
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    restricting = ("quick", "only", *getattr(benchmark, "PARTIAL", ()))
    whole = all(getattr(options, key, None) == parser.get_default(key) for key in restricting)
    # what an interrupted run leaves for its continuation
    options.scratch = options.output or ROOT / "runs" / "benchmarks"
    if options.output is None:
        options.output = RESULTS if whole else options.scratch
    options.command = shlex.join(["python", "-m", "benchmarks", name, *arguments])
    return options


def _default_device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def _device(text: str) -> torch.device:
    if text not in ("cpu", "cuda"):
        raise argparse.ArgumentTypeError(f"got {text!r}, expected cpu or cuda")
    if text == "cuda" and not torch.cuda.is_available():
        raise argparse.ArgumentTypeError("got cuda, but torch finds no GPU: use --device cpu")
    return torch.device(text)


if __name__ == "__main__":
    keep_freed_memory()
    sys.exit(main(sys.argv[1:]))
