"""The answer is in the first sentence, the tables add up, and what cannot be drawn is an error."""

import dataclasses
import json
import sys
from pathlib import Path

import pytest

from gptoss_jax.errors import UserError
from gptoss_jax.plan.compiled import Collective, Compiled
from gptoss_jax.plan.report import Plan, plot, sentences, tables
from tests.plan.test_estimate import plan as estimated


@pytest.fixture(scope="module")
def large() -> Plan:
    return Plan(model="gpt-oss-120b", estimate=estimated("gpt-oss-120b", "v5e-8"), why="because")


@pytest.mark.parametrize(
    ("name", "devices", "answer"),
    [
        ("gpt-oss-120b", "v5e-8", "fits, with "),
        ("gpt-oss-20b", "v5e-1", "tokens would fit"),
        ("gpt-oss-120b", "rtx4090-1", "at any context"),
    ],
)
def test_the_first_sentence_is_the_answer(name: str, devices: str, answer: str) -> None:
    first = sentences(Plan(model=name, estimate=estimated(name, devices)))[0]
    assert first.startswith(f"{name} on {devices} ")
    assert answer in first


def test_rows_have_a_cell_for_every_column(large: Plan) -> None:
    step = Compiled(
        arguments=10**9, temporaries=10**8, outputs=0, peak=1_100_000_000, flops=6e8,
        collectives=(Collective("all-reduce", 11520, 36),), seconds=3.2,
    )  # fmt: skip
    found = tables(dataclasses.replace(large, compiled={"decode": step}))
    assert [each.title.split()[0] for each in found] == ["Memory", "One", "Collectives", "The"]
    for each in found:
        assert {len(row) for row in each.rows} == {len(each.columns)}
    assert "0.6 GFLOP" in found[-1].rows[3]
    assert ("36 × all-reduce", "", "11.5 kB", "") in found[-1].rows


def test_shares_of_the_memory_table_add_up(large: Plan) -> None:
    shares = {row[0]: float(row[2].rstrip("%")) for row in tables(large)[0].rows}
    parts = [share for name, share in shares.items() if name not in ("total", "memory", "spare")]
    assert sum(parts) == pytest.approx(shares["total"], abs=0.05 * len(parts))  # each is rounded to 0.1
    assert shares["total"] + shares["spare"] == pytest.approx(100, abs=0.1)


def test_a_plan_is_json(large: Plan) -> None:
    found = json.loads(json.dumps(large.to_json()))
    assert found["model"] == "gpt-oss-120b"
    assert found["job"]["mesh"] == "data=1,expert=1,tensor=8"
    assert found["fits"] is True


def test_a_picture_of_another_kind_is_an_error(large: Plan, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"ends in '\.pdf'; expected \.png or \.svg"):
        plot(large, tmp_path / "plan.pdf")


def test_without_matplotlib_the_error_says_how_to_get_it(
    large: Plan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(UserError, match=r"gptoss-jax\[plot\]"):
        plot(large, tmp_path / "plan.svg")


@pytest.mark.parametrize("ending", [".png", ".svg"])
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of what matplotlib imports
def test_a_plan_can_be_drawn(large: Plan, tmp_path: Path, ending: str) -> None:
    pytest.importorskip("matplotlib")
    path = tmp_path / f"plan{ending}"
    plot(large, path)
    assert {".png": b"\x89PNG", ".svg": b"<svg"}[ending] in path.read_bytes()
