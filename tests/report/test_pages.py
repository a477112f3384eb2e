"""Pages are made of the result files alone: short in README.md, whole in docs/results.md, with learning curves."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from hstu_dist.commands.report import report_results
from hstu_dist.errors import UserError
from hstu_dist.report import results
from hstu_dist.report.pages import TOPICS, Checkout, embed, everything, learning_curves, summary, write_pages
from hstu_dist.report.results import Ratio, Results, Row

PAGE = "# Name\n\n<!-- results:begin -->\nold\n<!-- results:end -->\n\nEnd.\n"


def row(case: str, contender: str, metric: str, value: float) -> Row:
    return Row(case=case, contender=contender, metric=metric, value=value, unit="1", n=1, q25=value, q75=value)


def measured(name: str, *rows: Row, ratios: tuple[Ratio, ...] = ()) -> Results:
    return Results(
        name=name,
        command=f"measure {name}",
        date="2000-01-02T00:00:00+00:00",
        commit="c" * 40,
        device="test chip",
        threads=2,
        versions={},
        rows=rows,
        ratios=ratios,
    )


@pytest.fixture
def checkout(tmp_path: Path) -> Checkout:
    (tmp_path / "README.md").write_text(PAGE)
    found = Checkout(tmp_path)
    ratio = Ratio(case="hstu", metric="hr@10", a="refit", b="perfect", value=0.30, target=0.31)
    rows = [
        row("hstu", "refit", "hr@10", 0.30),
        row("hstu", "refit", "mrr", 0.125),
        row("hstu", "popularity", "hr@10", 0.03),
    ]
    study = measured("ml1m", *rows, ratios=(ratio,))
    results.write(study, found.results)
    speed = Ratio(case="all", metric="rate", a="new", b="old", value=1.5, target=None)
    results.write(measured("unknown_thing", row("all", "new", "rate", 7.0), ratios=(speed,)), found.results)
    for seed in (1, 2):
        curve = [row(f"epoch {epoch}", "validation", "ndcg@10", epoch / 10 / seed) for epoch in (1, 2, 3)]
        results.write(measured(f"ml1m/hstu_seed{seed}", *curve), found.results)
    return found


def test_the_short_page_shows_chosen_rows_and_what_was_missed(checkout: Checkout) -> None:
    shown = summary(checkout)
    assert "| hstu | refit | 0.3 |" in shown and "0.125" not in shown and "popularity" not in shown
    missed = "hr@10, refit / perfect: 0.3000 of 0.31 (hstu)"
    assert f"| MovieLens-1M |  | 0 of 1 | {missed} | test chip, 2000-01-02 |" in shown
    # nothing to hold it to
    assert "| unknown thing |  |  |  | test chip, 2000-01-02 |" in shown and "new / old" not in shown
    # cells are what a summary is made of
    assert (
        "Measured in 2 parts, each with its command in `benchmarks/results/ml1m`, on test chip, 2 threads, 2000-01-02, "
        "commit cccccccccccc."
    ) in shown
    assert "hstu_seed" not in shown and "`measure ml1m`" not in shown


def test_what_the_digest_quotes_was_measured() -> None:
    here = Checkout(Path(__file__).parents[2])
    for name, found in here.measured().items():
        ratios = {(ratio.case, ratio.metric, ratio.a, ratio.b) for ratio in found.ratios}
        quoted = TOPICS[name].headlines.values() if name in TOPICS else []
        assert set(quoted) <= ratios, name


def test_the_long_page_shows_everything(checkout: Checkout) -> None:
    write_pages(checkout)
    page = checkout.page.read_text()
    assert page == everything(checkout)
    assert page.index("## MovieLens-1M") < page.index("## unknown thing")
    assert "| hstu | refit | 0.3 | 0.125 |" in page and "new / old" in page and "| all | new | 7 |" in page
    assert "![ml1m learning curves](figures/ml1m_learning_curves.svg)" in page
    measured_whole = "Measured by `measure unknown_thing` on test chip, 2 threads, 2000-01-02, commit cccccccccccc."
    assert measured_whole in page


def test_a_summary_names_every_day_device_and_commit_of_its_parts(checkout: Checkout) -> None:
    later = replace(measured("ml1m/sasrec_seed1"), date="2000-01-04T05:06:07", commit="d" * 40 + "+changes", threads=1)
    results.write(later, checkout.results)
    assert (
        "Measured in 3 parts, each with its command in `benchmarks/results/ml1m`, on test chip, 2 threads and "
        "test chip, 1 thread, 2000-01-02 to 2000-01-04, commits cccccccccccc, dddddddddddd with uncommitted changes."
    ) in summary(checkout)


@pytest.mark.slow
def test_what_was_written_comes_out_the_same_again(checkout: Checkout) -> None:
    written = write_pages(checkout)
    readme = checkout.readme.read_text()
    assert readme.startswith("# Name\n") and readme.endswith("\nEnd.\n") and "old\n<" not in readme
    assert sorted(path.name for path in written) == sorted(
        ["README.md", "results.md", "ml1m_learning_curves.png", "ml1m_learning_curves.svg"]
    )
    before = [path.read_bytes() for path in written]
    assert [path.read_bytes() for path in write_pages(checkout)] == before


def test_curves_come_from_cells(checkout: Checkout) -> None:
    curves = learning_curves(checkout.cells("ml1m"))
    points = {"hstu_seed1": [(1, 0.1), (2, 0.2), (3, 0.3)], "hstu_seed2": [(1, 0.05), (2, 0.1), (3, 0.15)]}
    assert curves == {"validation ndcg@10": points}


def test_tables_of_unlike_rows_are_kept_apart(checkout: Checkout) -> None:
    mixed = measured("mixed", row("a", "x", "rate", 1.0), row("b", "y", "memory", 2.0), row("c", "z", "rate", 3.0))
    results.write(mixed, checkout.results)
    page = everything(checkout)
    assert "| case | contender | rate |\n| --- | --- | ---: |\n| a | x | 1 |\n| c | z | 3 |\n" in page
    assert "| case | contender | memory |\n| --- | --- | ---: |\n| b | y | 2 |\n" in page


def test_a_checkout_without_figures_says_so(tmp_path: Path) -> None:
    (tmp_path / "benchmarks" / "results").mkdir(parents=True)
    assert "No result file is committed yet" in summary(Checkout(tmp_path))


def test_the_command_names_what_it_wrote(checkout: Checkout) -> None:
    said: list[str] = []
    report_results(checkout.root, said.append)
    assert said[:2] == [str(checkout.readme), str(checkout.page)] and checkout.page.exists()


def test_mistakes_are_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="got no markers"):
        embed("no markers", "tables")
    with pytest.raises(UserError, match="no such folder -> run the command at the root of a checkout"):
        report_results(tmp_path, print)
