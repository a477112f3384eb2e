"""Data configuration: defaults, the union, cross-checks, and agreement with the YAML groups."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import pytest
from omegaconf import OmegaConf
from pydantic import TypeAdapter, ValidationError

from hstu_dist.data.config import (
    AmazonConfig,
    BatchingConfig,
    DataConfig,
    EventsConfig,
    MovieLensConfig,
    SyntheticZipfConfig,
)

CONF = Path(__file__).parents[2] / "conf" / "data"


@pytest.mark.parametrize(
    "kind", ["ml1m", "ml100k", "amazon_beauty", "amazon_sports", "amazon_toys", "events", "synthetic_zipf"]
)
def test_yaml_group_spells_out_the_defaults(kind: str) -> None:
    content = OmegaConf.to_container(OmegaConf.load(CONF / f"{kind}.yaml"))
    config = TypeAdapter(DataConfig).validate_python(content)
    classes = {"synthetic": SyntheticZipfConfig, "events": EventsConfig, "ml": MovieLensConfig, "amazon": AmazonConfig}
    default = next(config for prefix, config in classes.items() if kind.startswith(prefix))(kind=kind)
    assert config == default and config.path == f"data/{kind}"
    assert set(content) == set(asdict(default))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"kind": "ml2m"}, "ml2m"),
        ({"kind": "ml1m", "input": "x"}, "input"),
        ({"kind": "amazon_books"}, "amazon_books"),
        ({"kind": "amazon_toys", "source": ""}, "source"),
        ({"kind": "events", "max_length": 0}, "max_length"),
        ({"kind": "events", "duplicates": "maybe"}, "duplicates"),
        ({"kind": "events", "stochastic_length": {"alpha": 1.0}}, "stochastic_length.alpha"),
        ({"kind": "events", "stochastic_length": {"selection": "best"}}, "stochastic_length.selection"),
        ({"kind": "synthetic_zipf", "min_events": 9, "max_events": 8}, "max_events: got 8, expected at least"),
        ({"kind": "events", "user_column": "item_id"}, "four different names"),
    ],
)
def test_bad_settings_are_named(content: dict[str, object], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        TypeAdapter(DataConfig).validate_python(content)


def test_a_budget_needs_something_to_count() -> None:
    with pytest.raises(ValueError, match="budget: got 8192, expected null: by sequences, global_batch_size decides"):
        BatchingConfig(budget=8192)


def test_configuration_does_not_import_torch() -> None:
    code = "import sys, hstu_dist.data.config; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False, timeout=60).returncode == 0
