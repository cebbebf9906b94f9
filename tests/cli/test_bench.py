"""`gptoss-jax bench` from end to end on a tiny model; no time is judged."""

import json
from pathlib import Path

import pytest

from gptoss_jax.cli import main
from gptoss_jax.kernels.choose import choose

SMALL = "--model tiny --layers 2 --rows 3 --context 20 --prompt 12 --seconds 0.01 --buffer-bytes 65536 --matrix-size 64"


@pytest.mark.slow
def test_everything_is_measured_beside_its_roof(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    out = tmp_path / "new" / "result.json"
    assert main(["bench", *SMALL.split(), "--out", str(out)]) == 0
    shown = capsys.readouterr().out
    assert all(word in shown for word in ("kernels", "decode", "prefill", "of the roof"))
    result = json.loads(out.read_text(encoding="utf-8"))
    assert {"date", "commit", "device", "versions", "impl", "dtype"} <= result.keys()
    assert (result["model"], result["layers"], result["dense"]) == ("tiny", 2, "bf16")
    products = choose("linear", None, platform="cpu")
    assert result["impl"] == {"attention": products, "linear": products, "moe_matmul": products}
    assert [(step["rows"], step["tokens"]) for step in result["decode"] + result["prefill"]] == [(3, 1), (1, 12)]
    ceilings = result["ceilings"]
    for entry in [*result["kernels"], *result["decode"], *result["prefill"]]:
        nbytes, flops = entry.get("bytes", entry.get("nbytes")), entry["flops"]
        least = max(nbytes / max(ceilings["copied"], ceilings["read"]), flops / ceilings["flops"])
        assert entry["share_of_roof"] == pytest.approx(least / entry["seconds"])
    for step in result["decode"]:
        assert step["tokens_per_second"] == pytest.approx(step["rows"] / step["seconds"])
    assert {entry["op"] for entry in result["kernels"]} == {"attention", "linear", "moe_matmul"}


@pytest.mark.slow
def test_tuning_files_what_it_found(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    words = ["--impl", "moe_matmul=gpu-interpret", "--tune", "--trials", "2", "--tuned-folder", str(tmp_path)]
    assert main(["bench", "kernels", *SMALL.split(), "--rows", "1", *words, "--json"]) == 0
    (found,) = json.loads(capsys.readouterr().out)["tuned"]
    assert (found["op"], found["impl"], len(found["trials"])) == ("moe_matmul", "gpu-interpret", 2 * len(found["best"]))
    table = json.loads((tmp_path / "moe_matmul.gpu.json").read_text(encoding="utf-8"))
    assert table == {"cpu": found["best"]}


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of what matplotlib imports
def test_an_engine_is_measured_under_load(tiny_hf: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    pytest.importorskip("matplotlib")
    load = "--prompt 8 --new 4 --rows 1,3 --concurrency 1,3 --rounds 1 --requests 5 --prefix-tokens 130"
    engine = "--batch-invariant --prefill-tokens 64 --seconds 0.01 --buffer-bytes 65536 --matrix-size 64"
    out, picture = tmp_path / "result.json", tmp_path / "plot.png"
    words = [
        "throughput",
        "latency",
        "prefix",
        "overhead",
        "--checkpoint",
        str(tiny_hf),
        *load.split(),
        *engine.split(),
    ]
    assert main(["bench", *words, "--out", str(out), "--plot", str(picture)]) == 0
    shown = capsys.readouterr().out
    assert all(f"{part}: " in shown for part in ("throughput", "latency", "prefix", "overhead"))
    assert picture.read_bytes().startswith(b"\x89PNG")
    result = json.loads(out.read_text(encoding="utf-8"))
    assert (result["model"], result["layers"], result["experts"]) == (tiny_hf.name, 6, "mxfp4")
    assert result["engine"]["max_rows"] == 3

    points = result["throughput"]["points"]
    assert [(point["concurrent_requests"], point["requests"]) for point in points] == [(1, 1), (3, 3)]
    for point in [*points, result["latency"]["capacity"]]:
        assert point["output_tokens_per_second"] == pytest.approx(point["output_tokens"] / point["seconds"])
        at_best = point["output_tokens"] / (point["share_of_roof"] * point["seconds"])
        assert point["roof_output_tokens_per_second"] == pytest.approx(at_best)
    assert points[1]["ratio_to_one_request"] == pytest.approx(
        points[1]["output_tokens_per_second"] / points[0]["output_tokens_per_second"]
    )
    capacity, rates = result["latency"]["capacity"]["requests_per_second"], result["latency"]["rates"]
    offered = [rate["offered_requests_per_second"] for rate in rates]
    assert offered == pytest.approx([share * capacity for share in (0.25, 0.5, 0.75, 1.0, 1.25)])
    assert all(rate["first_token"]["count"] == rate["requests"] == 5 for rate in rates)
    assert (result["prefix"]["ids_equal"], result["prefix"]["cached_tokens_mean"]) == (True, 128)
    assert [point["running_requests"] for point in result["overhead"]] == [1, 3]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("kernel", "bench knows no 'kernel'; expected one or more of kernels, decode, prefill"),
        ("decode --tune", "--tune looks for block sizes of kernels, which are not measured: add `kernels`"),
        ("--rows 1,0", "--rows is '1,0'; expected counts separated by commas, as in 1,8,64"),
        ("--seconds 0", "--seconds is 0.0; expected more than 0"),
        ("--layers 7", "--layers is 7; tiny has 6"),
        ("--impl gpu", "implementation 'gpu' runs on gpu, the devices here are cpu"),
        ("--impl moe=gpu", "names op 'moe'; expected one of attention, linear, moe_matmul"),
        ("--tune --tuned-folder nowhere", "--tuned-folder nowhere is no folder"),
        ("throughput --concurrency 0", "--concurrency is '0'; expected counts separated by commas"),
        ("latency --rates 1,x", "--rates is '1,x'; expected requests per second separated by commas"),
        ("latency --rates=-1", "--rates is '-1'; expected requests per second"),
        ("latency --requests 0", "--requests is 0; expected more than 0"),
        ("overhead --rows 8 --max-rows 4", "--rows asks for 8 running requests; the engine runs 4"),
        ("throughput --cache-tokens 64", "give a smaller max_context or a greater cache"),
        ("throughput --plot plot.pdf", "plot.pdf ends in '.pdf'; expected .png or .svg"),
        ("decode --plot plot.png", "--plot draws throughput and latency, which are not measured: add one of them"),
        ("throughput --checkpoint nowhere", "nowhere is no folder"),
        ("throughput --checkpoint nowhere --layers 1", "--layers cuts a model with random weights"),
    ],
)
def test_bad_input(words: str, said: str, capsys: pytest.CaptureFixture[str]):
    assert main(["bench", *words.split(), *(() if "--rows" in words else ("--rows", "1")), "--model", "tiny"]) == 2
    assert said in capsys.readouterr().err
