"""conf/ and the configuration classes agree; bad settings are refused in one line; a run's settings survive a file."""

from __future__ import annotations

from copy import deepcopy
from dataclasses import fields, is_dataclass, replace
from functools import cache
from itertools import product
from pathlib import Path
from typing import Any

import pytest
from hydra import compose as hydra_compose
from hydra import initialize_config_dir
from omegaconf import DictConfig, OmegaConf
from pydantic import TypeAdapter

from hstu_dist.commands.prepare import prepare_data
from hstu_dist.config import (
    HARDWARE,
    RunConfig,
    compose,
    compose_dict,
    conf_dir,
    difference,
    from_dict,
    load,
    save,
    to_dict,
)
from hstu_dist.errors import UserError

GROUPS = {
    folder.name: sorted(file.stem for file in folder.glob("*.yaml"))
    for folder in conf_dir().iterdir()
    if folder.is_dir() and folder.name != HARDWARE
}
# an experiment sets others, and composes with its own choices; sizes and sweeps are for the scaling experiments alone
FREE = sorted(GROUPS.keys() - {"experiment", "size", "sweep"})

OPTIONS_OF_ONE_TASK = {
    ("task", "ranking"): "ranking",
    ("loss", "ratings"): "ranking",
    ("loss", "kuairand"): "ranking",
    ("model", "dlrm"): "ranking",
    ("task", "retrieval"): "retrieval",
    ("loss", "sampled_softmax"): "retrieval",
    ("loss", "sampled_softmax_512"): "retrieval",
    ("loss", "full_softmax"): "retrieval",
    ("loss", "plugin"): "retrieval",
}


def needed(group: str, option: str) -> list[str]:
    """What an option leaves open."""
    if option == "plugin":
        return [f"{group}.target=examples.own_parts:X", "plugins=[examples.own_parts]"]
    return ["data.path=x", "data.num_items=9", "trainer.epochs=null"] if option == "stream" else []


@cache
def run_config(*overrides: str) -> RunConfig:
    return compose(["experiment=ml1m", *overrides])


def test_every_yaml_file_is_in_a_group_or_composed_itself() -> None:
    files = {str(file.relative_to(conf_dir())) for file in conf_dir().rglob("*.yaml")}
    files = {file for file in files if not file.startswith(f"{HARDWARE}/")}
    alone = {f"{name}.yaml" for name in ("train", "prepare", "score", "retrieve", "export", "serve")}
    assert files == alone | {f"{g}/{o}.yaml" for g, options in GROUPS.items() for o in options}


def test_a_mapping_may_bring_keys_that_the_yaml_has_not() -> None:
    bits = compose_dict("prepare", ["data=events", "data.action_columns={click: 1, seconds: 20}"])["data"]
    assert bits["action_columns"] == {"click": 1, "seconds": 20}
    assert run_config("published={hr@7: 0.5}").published["hr@7"] == 0.5


def test_a_value_that_hydra_cannot_read_is_to_be_quoted() -> None:
    with pytest.raises(UserError) as caught:
        compose(["name=x", "output=s3://bucket?region=west"])
    assert caught.value.remedy == """quote such a value twice: 'KEY="VALUE"'"""
    assert compose(["experiment=ml1m", 'output="s3://bucket?region=west"']).output == "s3://bucket?region=west"


@pytest.mark.slow
@pytest.mark.parametrize("experiment", GROUPS["experiment"])
def test_every_experiment_composes_alone_and_names_its_run(experiment: str) -> None:
    assert compose([f"experiment={experiment}"]).name == experiment


@cache
def one_of_each_kind() -> list[str]:
    """An experiment of every combination of task, data, model and loss; those of the same differ in values only."""
    # an ablation sets what models of other kinds do not have
    names = [name for name in GROUPS["experiment"] if name != "ml1m_hstu_no_bias"]
    runs = {name: from_dict(resolved(composed(f"experiment={name}"))) for name in names}
    kinds = {(run.task.kind, type(run.data), run.model.kind, run.loss.kind): name for name, run in runs.items()}
    return list(kinds.values())


@cache
def composed(*overrides: str) -> DictConfig:
    """As Hydra gives it, nothing resolved; composing takes a tenth of a second."""
    with initialize_config_dir(config_dir=str(conf_dir()), version_base="1.3"):
        return hydra_compose("train", overrides=list(overrides))


def resolved(config: DictConfig) -> dict[str, Any]:
    values = OmegaConf.to_container(config, resolve=True, throw_on_missing=True)
    assert isinstance(values, dict)
    return {str(key): value for key, value in values.items()}


def with_option(experiment: str, group: str, option: str, *more: str) -> RunConfig:
    """`compose` of an experiment with another option, in less time where it has no settings of its own on top of it."""
    own = OmegaConf.load(conf_dir() / "experiment" / f"{experiment}.yaml")
    written = OmegaConf.load(conf_dir() / group / f"{option}.yaml")
    if group in own or "defaults" in written or more:
        return compose([f"experiment={experiment}", f"{group}={option}", *more])
    config = deepcopy(composed(f"experiment={experiment}"))
    OmegaConf.set_struct(config, False)
    config[group] = written
    return from_dict(resolved(config))


@pytest.mark.slow
@pytest.mark.parametrize(("group", "option"), [("data", "amazon_toys"), ("task", "retrieval"), ("cluster", "slurm")])
def test_an_option_in_its_place_is_what_hydra_composes(group: str, option: str) -> None:
    hydras = compose(["experiment=ml1m", f"{group}={option}"])
    assert replace(with_option("ml1m", group, option), experiment="ml1m") == hydras


@pytest.mark.slow
@pytest.mark.parametrize(("group", "option"), [(g, o) for g in FREE for o in GROUPS[g] if len(GROUPS[g]) > 1])
def test_every_option_composes_with_experiments_of_every_kind(group: str, option: str) -> None:
    task = OPTIONS_OF_ONE_TASK.get((group, option), "")
    for experiment in one_of_each_kind():
        if group in ("model", "loss") and experiment.startswith(("scaling", "appendix_c")):
            # comparisons of given models, which they describe in full
            continue
        more = needed(group, option) if option == "plugin" else []
        own = composed(f"experiment={experiment}")
        # layers and heads of an encoder mean nothing to DLRM
        fits = (own.task.kind == task or not task) and (option != "dlrm" or own.model.kind == "dlrm")
        if group == "data" and (option == "stream") != experiment.endswith("_stream"):
            # a stream has no epochs, and an experiment on a stream sets what prepared data does not have
            more = ["data.path=x", "data.num_items=9"] if option == "stream" else []
            fits = False
        if fits:
            assert with_option(experiment, group, option, *more).name == experiment
        else:
            with pytest.raises(UserError):
                with_option(experiment, group, option, *more)


@pytest.mark.slow
def test_choices_that_meet_in_the_model_compose_in_every_combination() -> None:
    base, choices = composed("experiment=ml1m"), []
    for group in ("model", "loss", "embedding"):
        options = [o for o in GROUPS[group] if OPTIONS_OF_ONE_TASK.get((group, o)) != "ranking"]
        choices.append(
            [(group, composed("experiment=ml1m", f"{group}={o}", *needed(group, o))[group]) for o in options]
        )
    for chosen in product(*choices):
        config = deepcopy(base)
        OmegaConf.set_struct(config, False)
        for group, part in chosen:
            config[group] = part
        run = from_dict({**resolved(config), "plugins": ["examples.own_parts"]})
        assert run.model.max_length == run.data.max_length


@pytest.mark.slow
@pytest.mark.parametrize("option", [option for option in GROUPS["data"] if option != "stream"])
def test_every_data_set_can_be_prepared(option: str) -> None:
    values = compose_dict("prepare", [f"data={option}", *needed("data", option)])
    assert values["data"]["kind"] == {"kuairand": "events", "scaling": "appendix_c"}.get(option, option)


def keys_of(value: Any) -> Any:
    """Names of nested settings, values dropped."""
    if is_dataclass(value):
        value = {field.name: getattr(value, field.name) for field in fields(value)}
    return {name: keys_of(v) for name, v in value.items()} if isinstance(value, dict) else None


@pytest.mark.slow
@pytest.mark.parametrize(("group", "option"), [(g, o) for g in FREE for o in GROUPS[g]])
def test_yaml_and_class_have_the_same_keys_and_the_yaml_states_the_defaults(group: str, option: str) -> None:
    ranking = OPTIONS_OF_ONE_TASK.get((group, option)) == "ranking"
    base = "ml1m_ranking_dlrm" if ranking else "ml1m"
    overrides = [f"experiment={base}", f"{group}={option}", *needed(group, option)]
    values = compose_dict("train", overrides)
    part = getattr(from_dict(values), group)
    written = OmegaConf.load(conf_dir() / group / f"{option}.yaml")
    if "defaults" in written:
        # it states what it changes of another
        return
    assert keys_of(OmegaConf.to_container(written)) == keys_of(part)
    # hstu_n50 and the like state other values, and heads have no defaults
    kind = values[group].get("kind")
    if option.startswith(f"{kind}_") or option == "kuairand" or kind == "multi_task":
        return
    differs = {"sharding": option} if group == "embedding" else {}
    # the experiment's own settings lie on top of the file
    own = OmegaConf.to_container(OmegaConf.load(conf_dir() / "experiment" / f"{base}.yaml"))
    assert isinstance(own, dict)
    required = {"kind": kind} if kind else {}
    required |= {"path": "x", "num_items": 9} if option == "stream" else {}
    required |= {"target": "examples.own_parts:X"} if option == "plugin" else {}
    default = TypeAdapter(type(part)).validate_python({**required, **differs, **own.get(group, {})})
    assert part == default


def test_top_level_keys_agree() -> None:
    config = run_config()
    written = {k for k in OmegaConf.load(conf_dir() / "train.yaml") if k not in ("defaults", "hydra")}
    # the experiment is a group without keys of its own
    assert written | set(FREE) | {"experiment"} == {field.name for field in fields(config)}


@pytest.mark.parametrize(
    ("override", "key", "expected"),
    [
        ("data.action_columns={is_click: 1, is_like: 2}", "action_columns", {"is_click": 1, "is_like": 2}),
        ("data.action_columns.is_click=1", "action_columns", {"is_click": 1}),
    ],
)
def test_names_of_the_users_own_need_no_prefix(override: str, key: str, expected: object) -> None:
    config = run_config("data=events", "data.path=x", override)
    assert getattr(config.data, key) == expected


BAD = [
    ("trainer.epochs=0", "trainer.epochs: Input should be greater than 0 (got 0)"),
    ("trainer.epochs=three", "trainer.epochs: "),
    ("trainer.epoch=3", "trainer.epoch: no such key"),
    ("+trainer.epoch=3", "trainer.epoch: Unexpected keyword argument (got 3)"),
    ("trainer.evaluation.monitor=ndcg@7", "trainer.evaluation: monitor: got ndcg@7, expected one of mrr, hr@1"),
    ("trainer.evaluation.cutoffs=[]", "trainer.evaluation: cutoffs: got (), expected integers >= 1"),
    ("trainer.stop_epoch=13", "trainer: stop_epoch: got 13, expected at most epochs (12)"),
    ("trainer.train_on=test", "trainer.train_on: "),
    ("trainer.logging.wandb=perhaps", "trainer.logging.wandb: "),
    ("trainer.device=tpu", "trainer.device: "),
    ("optimizer.betas=[0.9,1.0]", "optimizer: betas: got (0.9, 1.0), expected two numbers in [0, 1)"),
    ("optimizer.betas=[0.9]", "optimizer.betas"),
    ("optimizer.schedule.kind=step", "optimizer.schedule.kind: "),
    ("optimizer.clip_norm=-1", "optimizer.clip_norm: "),
    ("model=gru", "Could not find 'model/gru'"),
    ("model.dropout=1.0", "model.dropout: Input should be less than 1 (got 1.0)"),
    ("model.num_heads=3", "model: width: got 50, expected a multiple of num_heads (3)"),
    ("model.max_length=100", "model.max_length: got 100, expected at least data.max_length (200)"),
    ("model.backend=cudnn", "model.backend: "),
    ("embedding.sharding=diagonal", "embedding.sharding: "),
    ("embedding.sharding=column_wise", "embedding: sharding: got column_wise, expected another with rowwise_adagrad"),
    ("embedding.dtype=fp8", "embedding.dtype: "),
    ("embedding.cache_load_factor=0.5", "embedding: cache_load_factor: got 0.5, expected null: "),
    ("+embedding.tables.item={}", "embedding: tables.item: got a second one"),
    ("+embedding.tables.city={}", "embedding.tables: got city, expected no further table"),
    ("embedding.optimizer.kind=adam", "embedding.optimizer.kind: "),
    ("embedding.optimizer.eps=0", "embedding.optimizer.eps: Input should be greater than 0 (got 0)"),
    (
        "embedding.optimizer.betas=[0.9,0.98]",
        "embedding.optimizer: betas: got (0.9, 0.98), expected null: rowwise_adagrad has no betas",
    ),
    ("loss.temperature=0", "loss.temperature: "),
    ("loss.num_negatives=null", "loss.num_negatives: "),
    ("data.max_length=0", "data.max_length: "),
    (
        "data.stochastic_length={alpha: 3}",
        "data.stochastic_length.alpha: Input should be less than or equal to 2 (got 3)",
    ),
    ("trainer.batching.by=bytes", "trainer.batching.by: "),
    ("trainer.batching.budget=10", "trainer.batching: budget: got 10, expected null"),
    ("name=a/b", "name: "),
    ("name=.hidden", "name: "),
    ("seed=-1", "seed: "),
    ("nproc=0", "nproc: "),
    ("cluster.kind=cloud", "cluster"),
    ("trainer.epochs", "trainer.epochs"),
    ("experiment=nothing", "experiment/nothing"),
    ("data.path=${nowhere}", "nowhere"),
]


@pytest.mark.slow
@pytest.mark.parametrize(("override", "expected"), BAD, ids=[override for override, _ in BAD])
def test_a_bad_setting_is_one_line_that_names_it(override: str, expected: str) -> None:
    with pytest.raises(UserError) as caught:
        run_config(override)
    problem = caught.value.problem
    assert problem.startswith("configuration: ") and expected in problem, problem
    assert "\n" not in str(caught.value) and caught.value.remedy


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (["embedding.vocabulary.kind=zch", "loss=full_softmax"], "loss: got full_softmax, expected sampled_softmax"),
        (["embedding.vocabulary.kind=zch", "loss.log_q_correction=true"], "loss.log_q_correction: got true, expected"),
        (
            ["embedding.compute_kernel=fused_uvm_caching", "embedding.replicas=2"],
            "got compute_kernel=fused_uvm_caching",
        ),
        (
            ["embedding.compute_kernel=fused_uvm_caching", "optimizer.average_decay=0.9"],
            "averages are written to the table",
        ),
    ],
)
def test_settings_that_would_give_wrong_results_together(overrides: list[str], expected: str) -> None:
    more = ["trainer.device=cuda"] if "fused_uvm_caching" in overrides[0] else ["embedding.vocabulary.rows=4096"]
    with pytest.raises(UserError) as caught:
        run_config(*overrides, *more)
    assert expected in caught.value.problem


@pytest.mark.parametrize("kind", ["hash", "zch"])
def test_whole_sequences_are_predicted_among_items_with_rows_of_their_own(kind: str) -> None:
    with pytest.raises(UserError, match=r"vocabulary.kind: got \w+, expected static for task.split=record"):
        run_config("task.split=record", f"embedding.vocabulary.kind={kind}")


def test_several_bad_settings_are_counted() -> None:
    with pytest.raises(UserError, match=r"seed: .* \(got -1\) \(and 1 more\)"):
        run_config("nproc=0", "seed=-1")


@pytest.mark.slow
@pytest.mark.parametrize("experiment", GROUPS["experiment"])
def test_settings_survive_a_file(experiment: str, tmp_path: Path) -> None:
    config = compose([f"experiment={experiment}", "optimizer.clip_norm=3", "optimizer.betas=[0.5,0.25]"])
    save(config, tmp_path / "config.yaml")
    assert load(tmp_path / "config.yaml") == config
    assert [file.name for file in tmp_path.iterdir()] == ["config.yaml"]
    assert from_dict(to_dict(config)) == config


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (None, "config.yaml: "),
        ("a: [", "config.yaml: "),
        ("[1, 2]", "config.yaml: got no mapping"),
        ("name: x", "config.yaml: data: "),
        ("name: ???", "config.yaml: "),
    ],
    ids=["missing", "not-yaml", "list", "incomplete", "unset"],
)
def test_a_bad_file_is_one_line(content: str | None, expected: str, tmp_path: Path) -> None:
    if content is not None:
        (tmp_path / "config.yaml").write_text(content)
    with pytest.raises(UserError) as caught:
        load(tmp_path / "config.yaml")
    assert expected in caught.value.problem and "\n" not in str(caught.value)


@pytest.mark.slow
@pytest.mark.parametrize(
    "override",
    [
        "nproc=4",
        "output=elsewhere",
        "published={hr@10: 0.5}",
        "trainer.epochs=99",
        "trainer.stop_epoch=9",
        "trainer.threads=2",
        "trainer.batching.balance=counts",
        "trainer.peak_flops=312e12",
        "trainer.timeout_seconds=9",
        "trainer.logging.wandb=offline",
        "trainer.checkpoint.keep=9",
        "trainer.profile.first_step=3",
        "embedding=table_wise",
    ],
)
def test_what_may_change_between_two_starts_of_a_run(override: str) -> None:
    assert difference(run_config(), run_config(override)) == []


@pytest.mark.slow
@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("model.width=52", ["model.width: 50 -> 52"]),
        ("seed=2", ["seed: 1 -> 2"]),
        ("trainer.global_batch_size=64", ["trainer.global_batch_size: 128 -> 64"]),
        ("trainer.batching.by=tokens", ["trainer.batching.by: sequences -> tokens"]),
        ("trainer.train_on=train_validation", ["trainer.train_on: train -> train_validation"]),
        (
            "loss=full_softmax",
            [
                "loss.kind: sampled_softmax -> full_softmax",
                "loss.log_q_correction: False -> None",
                "loss.num_negatives: 128 -> None",
            ],
        ),
        ("optimizer.betas=[0.9,0.9]", ["optimizer.betas: [0.9, 0.98] -> [0.9, 0.9]"]),
    ],
)
def test_what_may_not_change_is_named(override: str, expected: list[str]) -> None:
    assert difference(run_config(), run_config(override)) == expected


def test_models_agree_with_the_data_they_are_given() -> None:
    config = run_config("data.max_length=64")
    assert config.model.max_length == 64
    with pytest.raises(ValueError, match=r"model.max_length: got 64, expected at least data.max_length \(100\)"):
        replace(config, data=replace(config.data, max_length=100))


def test_a_stream_is_not_prepared() -> None:
    values = compose_dict("prepare", ["data=stream", "data.path=x", "data.num_items=9"])
    with pytest.raises(UserError, match="a stream is not prepared"):
        prepare_data(values, lambda line: None)
