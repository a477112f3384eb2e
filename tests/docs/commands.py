"""Whether a command of a document would be accepted: its program, arguments and settings exist; nothing is started."""

from __future__ import annotations

import importlib.util
import re
import subprocess
from collections.abc import Callable, Iterator, Mapping, Sequence

from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import OmegaConf
from pydantic import TypeAdapter

from benchmarks.__main__ import BENCHMARKS
from hstu_dist.__main__ import _parser as parser_of_the_package
from hstu_dist.commands.plan import settings_of
from hstu_dist.commands.prepare import PrepareConfig
from hstu_dist.commands.use import USES, Words
from hstu_dist.config import compose, compose_dict, conf_dir
from launch.__main__ import _in_full, _split_dry_run
from launch.__main__ import _parser as parser_of_the_launcher
from tests.docs.pages import ROOT

FOREIGN = frozenset(
    {"cd", "cp", "curl", "git", "kill", "kubectl", "mkdir", "pip", "pre-commit", "rm", "sleep", "source", "wait"}
)
"""Programs of others that documents may use."""


def check(words: Sequence[str]) -> None:
    """Accepts a command or fails: SystemExit of its parser, UserError of its settings, AssertionError."""
    words = [word for word in words if not re.fullmatch(r"[A-Z_]+=\S*|[a-z]+=\$!", word)]
    if not words:
        return
    if words[0] == "nice":
        words = words[3:]
    program = words[0].rpartition("/")[2]
    if program == "torchrun":
        module = words.index("-m")
        program, words = "python", ["python", *words[module:]]
    if program == "make":
        _make(words[1:])
    elif program in ("python", "python3") and words[1:2] == ["-m"]:
        _module(words[2], words[3:])
    elif program in ("python", "python3"):
        assert words[1:2] in (["-"], ["-c"]), f"{words}: neither a module nor a script that is shown"
    else:
        assert program in FOREIGN, f"{words}: no program that is known here"


def _make(words: Sequence[str]) -> None:
    targets = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert not [word for word in words if "=" not in word and word not in targets]
    subprocess.run(["make", "-n", *words], cwd=ROOT, capture_output=True, check=True)


def _module(module: str, words: Sequence[str]) -> None:
    if "--help" in words and module != "benchmarks":
        words = [word for word in words if word != "--help"]
    if module == "hstu_dist":
        if words:
            _package(words[0], words)
    elif module == "launch":
        _launch(words)
    elif module == "benchmarks":
        assert words[0] in ("--help", *BENCHMARKS)
    else:
        assert importlib.util.find_spec(module) is not None, f"{module}: no such module"


def _package(command: str, words: Sequence[str]) -> None:
    options = parser_of_the_package().parse_args(words)
    given = getattr(options, "overrides", None) or getattr(options, "words", None) or []
    if command in USES:
        found = Words.of(command, USES[command], given)  # type: ignore[type-var]
        assert found.run is not None or compose(found.overrides)
    elif command in SETTINGS and not getattr(options, "config", None):
        SETTINGS[command](given)


SETTINGS: Mapping[str, Callable[[list[str]], object]] = {
    "prepare": lambda given: TypeAdapter(PrepareConfig).validate_python(compose_dict("prepare", given)),
    "train": compose,
    "evaluate": compose,
    "plan": settings_of,
    "doctor": lambda given: compose(["name=doctor", *given]),
}


def _launch(words: Sequence[str]) -> None:
    options = parser_of_the_launcher().parse_intermixed_args(words)
    if options.words and options.words[0] in ("status", "logs", "cancel"):
        assert len(options.words) == 2
        return
    overrides, _ = _split_dry_run(options.words)
    if overrides[:1] == ["doctor"]:
        overrides = ["name=doctor", *overrides[1:]]
    full = _in_full(overrides)
    compose(list(_first_cell(full)) if options.multirun else full)


def _first_cell(overrides: Sequence[str]) -> Iterator[str]:
    """Settings of the run that a sweep would begin with."""
    for override in OverridesParser.create().parse_overrides(overrides=list(overrides)):
        key = override.get_key_element()
        if key.startswith("hydra"):
            continue
        if key.lstrip("+") == "sweep":
            file = conf_dir() / "sweep" / f"{override.get_value_element_as_str()}.yaml"
            for name, values in OmegaConf.load(file).hydra.sweeper.params.items():
                yield f"{name}={values.partition(',')[0]}"
            continue
        if override.is_discrete_sweep():
            yield f"{key}={next(iter(override.sweep_string_iterator()))}"
        elif override.is_interval_sweep():
            yield f"{key}={override.value().start}"
        else:
            yield str(override.input_line)
