"""A finished plan: its figures as plain values for JSON, and as rows of a table for people."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from typing import Any

from hstu_dist.models.flops import count_parameters
from hstu_dist.plan.config import HardwareConfig, PlanConfig
from hstu_dist.plan.fit import smallest_changes
from hstu_dist.plan.job import Job
from hstu_dist.plan.memory import Memory, host_bytes, limit_of, memory_of, shortages
from hstu_dist.plan.step_time import StepTime, step_time

_SWEEP = tuple(2**power for power in range(3, 13))
"""World sizes 8 to 4,096."""

Lines = list[tuple[str, str]]
"""What, and how much."""


@dataclass(frozen=True, kw_only=True)
class Plan:
    """Everything that `plan` says about a run.

    Attributes:
        name: of the run.
        job, hardware, settings: what was asked.
        memory: of the fullest rank.
        time: of a step.
        shortages: what does not fit; empty if all does.
        changes: overrides that would make it fit, the least intrusive first.
        sweep: memory and time at other world sizes, with as many sequences a rank.
    """

    name: str
    job: Job
    hardware: HardwareConfig
    settings: PlanConfig
    memory: Memory
    time: StepTime
    shortages: list[str]
    changes: list[str]
    sweep: dict[int, tuple[Memory, StepTime]]

    @classmethod
    def of(cls, name: str, job: Job, hardware: HardwareConfig, settings: PlanConfig) -> Plan:
        """Plans a run."""
        missing = shortages(job, hardware, settings)
        return cls(
            name=name,
            job=job,
            hardware=hardware,
            settings=settings,
            memory=memory_of(job, hardware.ranks),
            time=step_time(job, hardware, settings),
            shortages=missing,
            changes=smallest_changes(job, hardware, settings) if missing else [],
            sweep=dict(_sweep(job, hardware, settings)),
        )

    @property
    def parameters(self) -> int:
        """Of table and tower."""
        return count_parameters(self.job.model, self.job.num_items).total

    @property
    def assumptions(self) -> list[str]:
        """What the figures rest on beside the settings."""
        job, ranks = self.job, self.hardware.ranks
        found = [
            f"every sequence has {job.mean_length} tokens; the fullest rank has {job.sequences_of(ranks)}",
            f"a rank looks up {job.ids_of(ranks):,} distinct rows: no item, target or negative comes twice",
            "parts of the memory are added up although they do not all exist at once",
            f"{1 - self.settings.usable_memory:.0%} of a chip's memory is left to CUDA, NCCL and fragmentation",
            f"peaks for {self.settings.precision} from data sheets, no latency, no imbalance: times are lower bounds",
        ]
        found += _about_tables(job)
        if job.global_batch_size < ranks:
            found.append(f"{ranks - job.global_batch_size} ranks have no sequence: raise trainer.global_batch_size")
        return found

    def gpu_days(self, seconds: float) -> float | None:
        """Chips times days for `dataset_tokens`, in steps of so many seconds; None without a data set."""
        if self.settings.dataset_tokens is None:
            return None
        return self.settings.dataset_tokens / self.time.tokens_per_day(seconds) * self.hardware.ranks

    def document(self) -> dict[str, Any]:
        """Plain values for JSON; bytes, seconds, FLOPs."""
        time = self.time
        return {
            "name": self.name,
            "parameters": self.parameters,
            "hardware": asdict(self.hardware),
            "settings": asdict(self.settings),
            "num_items": self.job.num_items,
            "global_batch_size": self.job.global_batch_size,
            "mean_length": self.job.mean_length,
            "memory": {**asdict(self.memory), "total": self.memory.total, "limit": self.limit},
            "host_bytes": host_bytes(self.job, self.hardware),
            "time": {**asdict(time), "bound": time.bound, "serial": time.serial, "bounded_by": time.bounded_by},
            "mfu": {"bound": time.mfu(time.bound), "serial": time.mfu(time.serial)},
            "tokens_per_day": {s: time.tokens_per_day(getattr(time, s)) for s in ("bound", "serial")},
            "gpu_days": {s: self.gpu_days(getattr(time, s)) for s in ("bound", "serial")},
            "fits": not self.shortages,
            "shortages": self.shortages,
            "changes": self.changes,
            "assumptions": self.assumptions,
            "sweep": [
                {"ranks": ranks, "memory": asdict(memory), "bound": t.bound, "serial": t.serial, "mfu": t.mfu(t.bound)}
                for ranks, (memory, t) in self.sweep.items()
            ],
        }

    @property
    def limit(self) -> int:
        """Bytes of a chip that tensors may take."""
        return limit_of(self.hardware, self.settings)

    def memory_lines(self) -> Lines:
        """Memory of a rank, part by part."""
        parts = [(name.replace("_", " "), _gb(size)) for name, size in asdict(self.memory).items()]
        host = f"{_gb(host_bytes(self.job, self.hardware))} of {self.hardware.host_memory_gb:.0f} GB"
        total = f"{_gb(self.memory.total)} of {_gb(self.limit)}"
        return [*parts, ("sum", total), ("host memory of a node, checkpoint", host)]

    def time_lines(self) -> Lines:
        """A step, and what follows from it."""
        time = self.time
        lines = [
            ("FLOPs of a step", f"{time.flops:.3g}, {time.attention_share:.0%} attention"),
            ("all-to-all sent by a rank", _gb(time.lookup_bytes)),
            ("all-reduce sent by a rank", _gb(time.reduce_bytes)),
            ("compute / memory", f"{_ms(time.compute)} / {_ms(time.memory)}"),
            ("look-ups / all-reduce", f"{_ms(time.lookups)} / {_ms(time.reduce)}"),
        ]
        for label, seconds in (("all overlapped", time.bound), ("nothing overlapped", time.serial)):
            days = self.gpu_days(seconds)
            lines += [
                (f"step, {label}", f"at least {_ms(seconds)}, MFU at most {time.mfu(seconds):.1%}"),
                ("  tokens a day", f"at most {time.tokens_per_day(seconds):.3g}"),
                *([("  GPU-days of the data set", f"at least {days:,.1f}")] if days is not None else []),
            ]
        return [*lines, ("bounded by", time.bounded_by)]


def _about_tables(job: Job) -> list[str]:
    """What the figures of tables leave open."""
    found, configs = [], [spec.config for spec in job.tables.values()]
    if any(config.sharding == "planner" for config in configs):
        found.append("tables that are left to TorchRec's planner count as split by rows")
    if any(config.compute_kernel == "key_value" for config in configs):
        found.append("tables of kernel key_value lie on SSDs: in no memory, and no time is counted for reading them")
    if any(config.compute_kernel.startswith("fused_uvm") for config in configs):
        found.append("no time is counted for rows that come from host memory")
    if len(configs) > 1:
        found.append("look-ups are counted in the item table only")
    return found


def _sweep(job: Job, hardware: HardwareConfig, settings: PlanConfig) -> list[tuple[int, tuple[Memory, StepTime]]]:
    sequences = job.sequences_of(hardware.ranks)
    found = []
    for ranks in _SWEEP:
        if ranks % hardware.ranks_per_node == 0:
            grown = replace(job, global_batch_size=sequences * ranks)
            there = replace(hardware, ranks=ranks)
            found.append((ranks, (memory_of(grown, ranks), step_time(grown, there, settings))))
    return found


def _gb(size: int) -> str:
    return f"{size / 1e9:,.2f} GB" if size >= 5e6 else f"{size / 1e9:.2g} GB"


def _ms(seconds: float) -> str:
    return f"{seconds * 1e3:,.1f} ms"
