"""The encoder benchmark: laws of length, contenders that are right, targets, memory that does not suffice."""

from __future__ import annotations

import json
from argparse import Namespace
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from benchmarks import __main__ as command_line
from benchmarks import encoder, encoder_cases, encoder_stacks, flash
from benchmarks.ceilings import Ceilings
from benchmarks.encoder_cases import Batch, full, hstu_config, ragged, stochastic, transformer_config
from benchmarks.encoder_contenders import Entry, Roster
from benchmarks.encoder_stacks import Baseline, Machine
from benchmarks.environment import RESULTS
from benchmarks.harness import Samples, Timings
from hstu_dist.errors import UserError
from hstu_dist.models.flops import count_flops, count_parameters
from hstu_dist.report.results import load

CPU = torch.device("cpu")
MACHINE = Machine(device=CPU, dtype=torch.float32, layers=1)
SMALL = Batch("small", (5, 16, 1), 16)


@pytest.fixture
def narrow(monkeypatch: pytest.MonkeyPatch) -> None:
    """A width at which everything is quick."""
    for module in ("encoder_cases", "encoder_stacks", "encoder_transformer"):
        monkeypatch.setattr(f"benchmarks.{module}.WIDTH", 16)
    for module in ("encoder_cases", "encoder_transformer"):
        monkeypatch.setattr(f"benchmarks.{module}.HEADS", 2)


def test_ragged_lengths_have_the_stated_mean_and_longest() -> None:
    for longest, count in ((1024, 8), (8192, 8), (8192, 32)):
        lengths = ragged(longest, count).lengths
        assert len(lengths) == count and max(lengths) == longest and min(lengths) >= 1
        assert np.mean(lengths) == pytest.approx(longest / 4, rel=0.01)
    with pytest.raises(ValueError, match="more than 4"):
        ragged(1024, 4)


@pytest.mark.parametrize("longest", encoder_cases.LENGTHS)
@pytest.mark.parametrize("alpha", encoder_cases.ALPHAS)
def test_stochastic_length_keeps_its_share_whole_and_cuts_the_rest(longest: int, alpha: float) -> None:
    batch = stochastic(longest, alpha)
    whole = batch.lengths.count(longest)
    # the paper's law: N^alpha / n^2 at n = N, and T = N^(alpha / 2)
    assert whole / len(batch.lengths) == pytest.approx(longest ** (alpha - 2), rel=0.03) and whole >= 1
    assert set(batch.lengths) == {longest, round(longest ** (alpha / 2))}


def test_the_paper_s_example_of_stochastic_length() -> None:
    assert min(stochastic(4096, 1.6).lengths) == 776


@pytest.mark.usefixtures("narrow")
@pytest.mark.parametrize("bias", [False, True])
def test_hstu_layers_are_checked_against_the_reference(bias: bool) -> None:
    assert encoder_stacks.hstu_error(SMALL, MACHINE, bias=bias) < 5e-6
    timed = encoder_stacks.hstu(SMALL, MACHINE, bias=bias)
    wrong = encoder_stacks.hstu(replace(SMALL, lengths=(6, 15, 1)), MACHINE, bias=bias)
    # another layout of the same tokens is a wrong mask
    assert encoder_stacks.error(timed, wrong.layers, wrong.encode) > 1e-3


@pytest.mark.usefixtures("narrow")
@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("rotary", [False, True])
def test_the_baseline_is_checked_against_plain_softmax(padded: bool, rotary: bool) -> None:
    sdpa = flash.implementation(flash.SDPA, CPU)
    baseline = Baseline(flash=sdpa, padded=padded, rotary=rotary)
    assert encoder_stacks.transformer_error(SMALL, MACHINE, baseline) < 5e-6
    uncausal = replace(sdpa, padded=lambda q, k, v: v, jagged=lambda q, k, v, where: v)
    assert encoder_stacks.transformer_error(SMALL, MACHINE, replace(baseline, flash=uncausal)) > 1e-3


@pytest.mark.usefixtures("narrow")
def test_rotary_positions_depend_on_distance_alone() -> None:
    from benchmarks.encoder_transformer import rotated, rotation

    q, k = torch.randn(2, 1, 2, 8, dtype=torch.float64)
    scores = [
        float(
            (
                rotated(q, rotation(torch.tensor([i]), torch.float64))
                * rotated(k, rotation(torch.tensor([j]), torch.float64))
            ).sum()
        )
        for i, j in ((3, 1), (9, 7), (9, 6))
    ]
    assert scores[0] == pytest.approx(scores[1]) and scores[0] != pytest.approx(scores[2])


@pytest.mark.usefixtures("narrow")
def test_the_configurations_that_count_are_the_stacks_that_run() -> None:
    hstu = encoder_stacks.hstu(SMALL, MACHINE, bias=True).layers
    counted = count_parameters(hstu_config(16, 1, bias=True), 0)
    assert sum(p.numel() for p in hstu.parameters()) == counted.dense - counted.positions
    sdpa = flash.implementation(flash.SDPA, CPU)
    baseline = encoder_stacks.transformer(SMALL, MACHINE, Baseline(flash=sdpa, padded=True, rotary=False)).layers
    products = sum(p.numel() for p in baseline.parameters() if p.dim() == 2)
    tokens = count_flops(transformer_config(16, 1), full(16, 1).work, 0).projections
    assert tokens == 2 * 16 * products


@pytest.mark.usefixtures("narrow")
def test_what_layers_keep_is_counted_in_widths() -> None:
    roster = roster_of(flash.implementation(flash.SDPA, CPU))
    kept = {entry.kind: entry.kept_elements(MACHINE) / 16 for entry in roster.entries(16, training=False)}
    assert kept["HSTU"] == 6
    assert kept["Transformer SDPA flash, padded"] == pytest.approx(16, abs=1)
    findings = encoder._activations(settings_of(roster))
    assert [ratio.met for ratio in findings.ratios] == [True]


def roster_of(*flashes: flash.FlashAttention) -> Roster:
    return Roster(flashes=flashes, rotary=False, alphas=(1.6,), full_count=1, ragged_count=5)


def settings_of(roster: Roster) -> encoder.Settings:
    options = Namespace(device=CPU, layers=None, rounds=2, lengths=[16], quick=True, positions="learned", alphas=None)
    return replace(encoder.settings_for(options, []), roster=roster)


def fixed_timings(monkeypatch: pytest.MonkeyPatch, seconds: dict[str, float], *too_large: str) -> None:
    def compare(steps: dict[str, object], *_: object) -> Timings:
        found = {name: Samples((seconds.get(name, 1.0),)) for name in steps if name not in too_large}
        return Timings(found, tuple(name for name in steps if name in too_large))

    monkeypatch.setattr(encoder, "compare", compare)


@pytest.mark.usefixtures("narrow")
def test_rates_count_original_sequences_and_ratios_are_held_to_their_targets(monkeypatch: pytest.MonkeyPatch) -> None:
    padded = "Transformer SDPA flash, padded"
    monkeypatch.setattr(
        encoder, "TARGETS", {("training", 16, "HSTU, ragged"): 10.0, ("training", 16, "HSTU, full"): 3.0}
    )
    fixed_timings(monkeypatch, {padded: 2.0, "HSTU, ragged": 0.5, "HSTU, full again": 1.05})
    settings = settings_of(roster_of(flash.implementation(flash.SDPA, CPU)))
    sound = {entry.kind for entry in settings.roster.entries(16, training=True)}
    findings = encoder.compared("training", 16, sound, settings)
    ratios = {(ratio.a, ratio.b): ratio for ratio in findings.ratios}
    # 5 sequences in 0.5 s against 1 in 2 s
    assert ratios["HSTU, ragged", padded].value == 20.0 and ratios["HSTU, ragged", padded].met
    assert ratios["HSTU, full", padded].value == 2.0 and ratios["HSTU, full", padded].met is False
    assert ratios["HSTU, ragged", "Transformer SDPA flash, ragged"].target is None
    assert ratios["limit 1.03", "the same twice"].met is False
    figures = {(row.contender, row.metric): row.value for row in findings.rows}
    assert figures["HSTU, ragged", "sequences/s"] == 10.0
    assert figures["HSTU, ragged", "tokens/s"] == sum(ragged(16, 5).lengths) / 0.5
    assert ("HSTU, ragged", "share of gemm rate") in figures and ("copy", "rate") in figures


@pytest.mark.usefixtures("narrow")
def test_what_does_not_fit_is_recorded_and_the_rest_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    fixed_timings(monkeypatch, {}, "Transformer SDPA flash, padded", "HSTU, full again")
    settings = settings_of(roster_of(flash.implementation(flash.SDPA, CPU)))
    sound = {entry.kind for entry in settings.roster.entries(16, training=True)}
    findings = encoder.compared("training", 16, sound, settings)
    lost = [row.contender for row in findings.rows if row.metric == encoder.OUT_OF_MEMORY]
    assert sorted(lost) == ["HSTU, full again", "Transformer SDPA flash, padded"]
    assert [ratio.b for ratio in findings.ratios] == ["Transformer SDPA flash, ragged"] * 2


@pytest.mark.usefixtures("narrow")
def test_a_process_that_memory_does_not_suffice_for_is_recorded(monkeypatch: pytest.MonkeyPatch) -> None:
    def peak(build: partial[object], *_: object) -> float | None:
        entry: Entry = build.func.__self__  # type: ignore[attr-defined]
        return None if entry.name.startswith("HSTU with") else 10.0 * len(entry.batch.lengths) * (1 + entry.padded)

    monkeypatch.setattr(encoder, "peak_extra_mb", peak)
    findings = encoder._weighed(16, settings_of(roster_of(flash.implementation(flash.SDPA, CPU))))
    assert {row.contender for row in findings.rows if row.metric == encoder.OUT_OF_MEMORY} == {
        "HSTU with bias, full",
        "HSTU with bias, ragged",
    }
    assert [(ratio.a, ratio.value) for ratio in findings.ratios] == [("Transformer SDPA flash, padded", 2.0)]


@pytest.mark.usefixtures("narrow")
def test_a_wrong_contender_is_refused() -> None:
    sdpa = flash.implementation(flash.SDPA, CPU)
    broken = replace(sdpa, padded=lambda q, k, v: 1.01 * sdpa.padded(q, k, v))
    sound, refused = encoder._checked(settings_of(roster_of(broken)))
    assert "Transformer SDPA flash, jagged" in sound and "HSTU" in sound
    assert [reason.partition(":")[0] for reason in refused] == ["Transformer SDPA flash, padded"]


ON_GPU = torch.device("cuda")


def test_flash_attn_must_be_installed_and_of_the_right_version(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match="flash-attn is not installed -> pip install"):
        flash.implementation("flash-attn 2", ON_GPU)
    monkeypatch.setattr(flash, "version", lambda _: "1.0.9")
    with pytest.raises(UserError, match=r"got flash-attn 1\.0\.9, expected version 2"):
        flash.implementation("flash-attn 2", ON_GPU)
    monkeypatch.setattr(flash, "version", lambda _: "2.8.3")
    # the metadata are there, the module is not
    with pytest.raises(UserError, match=r"flash-attn 2\.8\.3 cannot be used \(No module"):
        flash.implementation("flash-attn 2", ON_GPU)
    with pytest.raises(UserError, match="runs on GPUs only"):
        flash.implementation("flash-attn 3", CPU)
    found, missing = flash.installed(CPU)
    assert [each.name for each in found] == [flash.SDPA] and set(missing) == set(flash.PACKAGES)


def test_a_package_is_called_as_its_signature_wants(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[dict[str, object]] = []

    def attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, **options: object) -> tuple[torch.Tensor, None]:
        calls.append(options)
        return v, None

    module = SimpleNamespace(flash_attn_func=attention, flash_attn_varlen_func=attention)
    monkeypatch.setattr(flash, "version", lambda _: "4.0.1")
    monkeypatch.setattr(flash.importlib, "import_module", lambda _: module)
    found = flash.implementation("flash-attn 4", ON_GPU)
    x = torch.randn(5, 2, 4)
    where = flash.Sequences((3, 2), torch.tensor([0, 3, 5], dtype=torch.int32))
    assert found.version == "4.0.1" and found.padded(x, x, x) is x and found.jagged(x, x, x, where=where) is x
    assert calls[0] == {"causal": True}
    assert calls[1]["max_seqlen_q"] == 3 and calls[1]["cu_seqlens_k"] is where.offsets and calls[1]["causal"]


def test_flash_attention_2_is_the_first_baseline() -> None:
    sdpa = flash.implementation(flash.SDPA, CPU)
    roster = roster_of(sdpa, replace(sdpa, name="flash-attn 3"), replace(sdpa, name="flash-attn 2"))
    padded = [entry.name for entry in roster.entries(16, training=True) if entry.padded]
    assert padded[0] == "Transformer flash-attn 2, padded" and len(padded) == 3


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        (["--contenders", "flash-attn 5"], "contender: got 'flash-attn 5', expected one of SDPA flash, flash-attn 2"),
        (["--contenders", "flash-attn 2", "--device", "cpu"], "flash-attn 2: runs on GPUs only"),
    ],
)
def test_an_unknown_or_missing_contender_is_one_line(
    arguments: list[str], problem: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert command_line.main(["encoder", "--quick", *arguments]) == 2
    shown = capsys.readouterr().err
    assert problem in shown and shown.count("\n") == 1


@pytest.mark.parametrize(
    ("arguments", "whole"),
    [([], True), (["--rounds", "5"], True), (["--lengths", "64"], False), (["--layers", "2"], False)],
)
def test_a_part_does_not_touch_the_committed_results(arguments: list[str], whole: bool) -> None:
    assert (command_line._options("encoder", arguments, encoder).output == RESULTS) is whole


@pytest.mark.slow
@pytest.mark.usefixtures("narrow")
def test_an_interrupted_run_goes_on_and_writes_a_whole_result(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(encoder, "peak_extra_mb", lambda *_: 100.0)
    arguments = ["encoder", "--quick", "--lengths", "16", "--device", "cpu", "--output", str(tmp_path)]
    measured: list[str] = []
    original = encoder.compared

    def interrupted(mode: str, *rest: object) -> object:
        measured.append(mode)
        if measured == ["training", "inference"]:
            raise KeyboardInterrupt
        return original(mode, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr(encoder, "compared", interrupted)
    assert command_line.main(arguments) == 130
    assert "the same command goes on" in capsys.readouterr().err
    assert command_line.main(arguments) == 0
    assert measured == ["training", "inference", "inference"]
    found = load("encoder_cpu", tmp_path)
    assert {ratio.case for ratio in found.ratios} == {"activations", "N 16, training", "N 16, inference"}
    assert found.versions["flash-attn 2"].endswith("runs on GPUs only, got device cpu")
    assert (tmp_path / "encoder_cpu_speedup.svg").exists() and not (tmp_path / "encoder_cpu_cells").exists()
    assert json.loads((tmp_path / "encoder_cpu.json").read_text())["command"].startswith("python -m benchmarks encoder")


def test_shares_of_the_ceilings_follow_from_work_and_time() -> None:
    ceilings = Ceilings.of(CPU, torch.float32, tiny=True)
    timings = Timings({"x": Samples((2.0,)), "gemm": Samples((1.0,)), "copy": Samples((0.5,))})
    from benchmarks.ceilings import Work

    work = Work(flops=ceilings.gemm.flops, bytes=ceilings.copy.bytes)
    shares = {metric: samples.median for metric, samples in ceilings.shares("x", work, timings)}
    assert shares == {"share of gemm rate": 0.5, "share of copy bandwidth": 0.25}
