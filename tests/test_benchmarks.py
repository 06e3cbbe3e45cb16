"""Every benchmark runs at tiny sizes and writes its table; nothing is timed here."""

import csv
import importlib

import pytest
import torch

import normdrop
from normdrop.ops.conv2d import HAS_CONV2D


@pytest.fixture
def script():
    """A function that imports a benchmark."""
    return lambda name: importlib.import_module(f"benchmarks.{name}")


def read(path):
    with path.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def test_kernels_writes_rows_of_all_layouts_and_passes(script, tmp_path, capsys):
    kernels = script("kernels")
    arguments = ["--quick", "--threads", "1", "--output", str(tmp_path)]
    assert kernels.main([*arguments, "--filter", "float32"]) == 0
    rows = read(tmp_path / "kernels.csv")
    assert set(rows[0]) == {*kernels.COLUMNS, "processor", "torch"}
    assert {row["operator"] for row in rows} == set(kernels.TITLES)
    for name, values in {
        "provider": {"torch", "normdrop"},
        "layout": {"contiguous", "channels_last"},
        "pass": {"forward", "forward+backward"},
    }.items():
        assert {row[name] for row in rows} == values
    for row in rows:
        assert 0 < float(row["min_ms"]) <= float(row["p25"]) <= float(row["p75"])
        assert float(row["ratio"]) == 1 or row["provider"] != "torch"
    assert (tmp_path / "kernels.png").read_bytes().startswith(b"\x89PNG")
    printed = capsys.readouterr().out
    assert f"torch {torch.__version__}" in printed
    assert "1 thread" in printed


def test_kernels_keeps_rows_that_are_not_measured_again(script, tmp_path):
    kernels = script("kernels")
    arguments = ["--quick", "--threads", "1", "--output", str(tmp_path), "--filter"]
    kernels.main([*arguments, "^dropout 4x3 float32"])
    first = read(tmp_path / "kernels.csv")
    kernels.main([*arguments, "^dropout 4x3 bfloat16"])
    both = read(tmp_path / "kernels.csv")
    assert both[: len(first)] == first
    assert len(both) == 2 * len(first)
    kernels.main([*arguments, "^dropout 4x3"])
    assert len(read(tmp_path / "kernels.csv")) == len(both)


def test_kernels_tables_hold_the_measured_figures(script, tmp_path):
    kernels = script("kernels")
    row = {
        "operator": "batch_norm+relu",
        "shape": "32x64x56x56",
        "layout": "contiguous",
        "dtype": "float32",
        "threads": 2,
        "pass": "forward+backward",
        "copies": 9.0,
        "floor_copies": 2.5,
        "p25": 1.0,
        "p75": 2.0,
        "processor": "a processor",
        "torch": "2.13.0",
    }
    rows = [
        {**row, "provider": "torch", "median_ms": 16.0, "ratio": 1.0, "ratio_best": 1.0},
        {**row, "provider": "normdrop", "median_ms": 6.4, "ratio": 2.5, "ratio_best": 2.0},
    ]
    assert "| BN+ReLU (32, 64, 56, 56) | 16.0 | 6.40 | 2.5 |" in kernels.headline(rows)
    details = kernels.details(rows)
    assert "### float32, 2 threads" in details
    assert "| BN+ReLU | 32×64×56×56 | contiguous | forward + backward | 16.0 | 6.40 |" in details


def test_kernels_filter_that_matches_nothing(script, tmp_path, capsys):
    assert script("kernels").main(["--filter", "nothing", "--output", str(tmp_path)]) == 2
    assert "matches no case" in capsys.readouterr().err


def test_harness_leaves_out_rows_of_another_machine(script, tmp_path):
    harness = script("harness")
    path = tmp_path / "table.csv"
    path.write_text("name,value,processor,torch\na,1,another,2.0\n")
    rows = harness.merge(path, [{"name": "b", "value": 2}], ["name", "value"], ["name"])
    assert [row["name"] for row in rows] == ["b"]
    assert [row["name"] for row in read(path)] == ["b"]


def test_harness_leaves_what_is_not_measured_again_as_it_stands(script, tmp_path):
    harness = script("harness")
    path = tmp_path / "table.csv"
    write = lambda *rows: harness.merge(path, rows, ["name", "value"], ["name"])  # noqa: E731
    write({"name": "rate", "value": f"{0.500002567:.10g}"})
    rows = write({"name": "time", "value": 0.123456789})
    assert [row["value"] for row in rows] == [0.500002567, 0.12346]
    assert [row["value"] for row in read(path)] == ["0.500002567", "0.12346"]


def test_harness_writes_between_markers(script, tmp_path):
    harness = script("harness")
    document = tmp_path / "page.md"
    document.write_text("a\n<!-- benchmark:x -->\nold\n<!-- /benchmark:x -->\nb\n")
    harness.write_section("x", "new", [document, tmp_path / "missing.md"])
    assert document.read_text() == "a\n<!-- benchmark:x -->\nnew\n<!-- /benchmark:x -->\nb\n"
    harness.write_section("y", "no such marker", [document])
    assert "no such marker" not in document.read_text()


@pytest.mark.parametrize(
    "name",
    [
        *("kernels", "memory", "training_step", "training_step_apart", "inference"),
        *("checks.architectures", "checks.tools"),
        "convolution",
    ],
)
def test_documents_show_what_the_results_hold(script, name):
    benchmark, harness = script(name).BENCHMARK, script("harness")
    rows = harness.read_rows(harness.RESULTS / f"{benchmark.stem}.csv")
    for section in benchmark.sections:
        shown = [d for d in section.documents if f"benchmark:{section.name} -->" in d.read_text()]
        assert shown, section.name
        for document in shown:
            assert section.table(rows) in document.read_text(encoding="utf-8"), document.name


def test_harness_takes_providers_in_turn(script):
    harness = script("harness")
    calls = []

    def provider(name):
        def measure(count):
            calls.append(name)
            return {"forward": 1.0}

        return harness.Provider(name, "contiguous", measure)

    samples = harness.run_in_turn([provider("a"), provider("b")], repeats=10)
    rounds = [set(calls[i : i + 2]) for i in range(4, len(calls), 2)]
    assert rounds == [{"a", "b"}] * 10
    assert [len(sample.seconds["forward"]) for sample in samples] == [10, 10]


def test_harness_ends_with_1_where_a_row_does_not_hold(script, tmp_path, capsys):
    harness = script("harness")
    check = harness.Benchmark(
        claim="Say whether a number is odd.",
        stem="odd",
        columns=("number", "odd"),
        keys=1,
        cases=lambda options: [1, 2, 3],
        measure=lambda case, options: [{"number": case, "odd": case % 2}],
        line=lambda row: f"{row['number']}: {row['odd']}",
        finish=lambda rows, folder: print(sum(row["odd"] for row in rows), "are odd"),
        holds=lambda row: row["odd"] == 1,
    )
    output = ["--quick", "--output", str(tmp_path)]
    assert harness.run(check, [*output, "--filter", "1|3"]) == 0
    assert harness.run(check, output) == 1
    assert [row["number"] for row in read(tmp_path / "odd.csv")] == ["1", "3", "2"]
    assert "1 failed" in capsys.readouterr().out
    (tmp_path / "odd.csv").write_text("number,odd,processor,torch\n5,1,any,2.13.0\n")
    assert harness.run(check, [*output, "--tables"]) == 0
    assert "1 are odd" in capsys.readouterr().out


def test_harness_writes_the_sections_of_published_results(script, tmp_path, monkeypatch):
    harness = script("harness")
    page = tmp_path / "page.md"
    page.write_text("<!-- benchmark:odd -->\n<!-- /benchmark:odd -->\n")
    check = harness.Benchmark(
        claim="Say whether a number is odd.",
        stem="odd",
        columns=("number",),
        keys=1,
        cases=lambda options: [7],
        measure=lambda case, options: [{"number": case}],
        line=str,
        sections=[harness.Section("odd", lambda rows: f"{rows[0]['number']} is odd", [page])],
    )
    assert harness.run(check, ["--quick", "--output", str(tmp_path)]) == 0
    assert "7 is odd" not in page.read_text()
    monkeypatch.setattr(harness, "RESULTS", tmp_path)
    assert harness.run(check, ["--quick", "--output", str(tmp_path)]) == 0
    assert "\n7 is odd\n" in page.read_text()


def test_dropout_statistics_finds_a_mask_that_is_not_random(script, tmp_path, monkeypatch):
    statistics = script("checks.dropout_statistics")
    arguments = ["--filter", "seeds|rates, keep 0.5", "--draws", "1", "--output", str(tmp_path)]
    assert statistics.main([*arguments, "--quick"]) == 0
    rows = read(tmp_path / "dropout_statistics.csv")
    assert set(rows[0]) == {*statistics.COLUMNS, "processor", "torch"}
    assert len(rows) == 2 + len(statistics.KEEPS)
    assert max(abs(float(row["z"])) for row in rows) < 4
    monkeypatch.setattr(statistics, "kept", lambda *a, count=1 << 24: torch.ones(count).byte())
    assert statistics.main([*arguments, "--quick"]) == 1


def test_memory_counts_what_is_kept(script, tmp_path):
    memory = script("memory")
    assert memory.main(["--quick", "--output", str(tmp_path)]) == 0
    rows = read(tmp_path / "memory.csv")
    assert set(rows[0]) == {*memory.COLUMNS, "processor", "torch"}
    kept = {
        (row["work"], row["provider"]): int(row["bytes"])
        for row in rows
        if row["dtype"] == "float32"
    }
    elements = 2 * 3 * 4 * 4
    # torch: x, the ReLU's result, dropout's scaled mask.
    assert kept["BN+ReLU+dropout", "torch"] >= 3 * 4 * elements
    assert {provider for work, provider in kept if work == "ResNet-20"} == {
        memory.TORCH,
        memory.OURS,
        memory.LOW,
    }


def test_memory_of_a_large_layer_is_the_input(script):
    memory = script("memory")
    kept = {
        (row["work"], row["provider"]): row["bytes_per_element"]
        for row in memory.layer_rows((8, 16, 32, 32))
        if row["dtype"] == "float32"
    }
    assert kept["BN+ReLU", "torch"] == pytest.approx(8, abs=0.1)
    assert kept["BN+ReLU+dropout", "torch"] == pytest.approx(12, abs=0.1)
    if not normdrop.has_kernels():
        return
    assert kept["BN+ReLU", "normdrop"] == pytest.approx(4, abs=0.1)
    assert kept["BN+ReLU+dropout", "normdrop"] == pytest.approx(4, abs=0.1)
    assert kept["BN+add+ReLU", "normdrop"] == pytest.approx(4 + 1 / 8, abs=0.1)
    assert kept["dropout", "normdrop"] == pytest.approx(0, abs=0.1)


def test_peers_runs_without_them(script, tmp_path, monkeypatch):
    peers = script("peers")
    monkeypatch.setattr(peers, "providers", lambda case: [])
    arguments = ["--quick", "--threads", "1", "--filter", "^dropout 4x3"]
    assert peers.main([*arguments, "--output", str(tmp_path)]) == 0
    rows = read(tmp_path / "peers.csv")
    assert {row["provider"] for row in rows} == {"torch", "normdrop"}


def test_architectures_compares_the_networks_of_torch_alone(script, tmp_path, capsys):
    architectures = script("checks.architectures")
    assert architectures.main(["--quick", "--threads", "1", "--output", str(tmp_path)]) == 0
    rows = {row["architecture"]: row for row in read(tmp_path / "architectures.csv")}
    assert set(rows["residual"]) == {*architectures.COLUMNS, "processor", "torch"}
    counts = {name: (row["layers"], row["converted"], row["fused"]) for name, row in rows.items()}
    assert counts == {"residual": ("5", "5", "5"), "perceptron": ("4", "4", "2")}
    assert {row["result"] for row in rows.values()} == {"equal"}
    assert "| torch | 2 | 2 | 9 | 9 | 7 |" in capsys.readouterr().out


def test_architectures_tells_what_differs(script, monkeypatch):
    """A converted model that is off by a millionth is found; so is one that cannot be made."""
    architectures = script("checks.architectures")
    perceptron = [a for a in architectures.architectures() if a.name == "perceptron"]
    convert = architectures.normdrop.convert

    def convert_wrongly(model):
        converted = convert(model)
        with torch.no_grad():
            converted[-1].weight.mul_(1 + 1e-6)
        return converted

    monkeypatch.setattr(architectures.normdrop, "convert", convert_wrongly)
    monkeypatch.setattr(architectures, "check_it_lives_on", lambda *models: None)
    assert architectures.row_of(perceptron[0], 2)["result"] == "differs"

    def fail():
        raise ValueError("no such network")

    broken = script("checks.zoo").Architecture("torch", "broken", fail)
    assert architectures.row_of(broken, 2)["result"] == "ValueError: no such network"


def test_large_holds_at_small_sizes(script, tmp_path, capsys):
    large = script("checks.large")
    assert large.main(["--quick", "--output", str(tmp_path)]) == 0
    rows = read(tmp_path / "large.csv")
    assert set(rows[0]) == {*large.COLUMNS, "processor", "torch"}
    assert len(rows) == 4
    assert {row["holds"] for row in rows} == {"True"}


def test_large_says_what_it_leaves_out(script, tmp_path, monkeypatch, capsys):
    large = script("checks.large")
    monkeypatch.setattr(large, "available_memory", lambda: 1000.0)
    assert large.main(["--quick", "--output", str(tmp_path)]) == 0
    assert "left out, it needs" in capsys.readouterr().out
    assert read(tmp_path / "large.csv") == []


@pytest.mark.skipif(not HAS_CONV2D, reason="no kernels for this processor")
def test_convolution_measures_times_and_errors(script, tmp_path, capsys):
    convolution = script("convolution")
    arguments = ["--quick", "--threads", "1", "--repeats", "2", "--output", str(tmp_path)]
    assert convolution.main(arguments) == 0
    rows = read(tmp_path / "convolution.csv")
    assert {row["pass"] for row in rows} == set(convolution.PASSES)
    assert {row["data"] for row in rows} == {"normal", "after ReLU"}
    for row in rows:
        assert float(row["min_ms"]) > 0
        assert 0 < float(row["error"]) < 1e-5
        assert float(row["ratio"]) == 1 or row["provider"] == "normdrop"
    assert "<svg" in (tmp_path / "convolution.svg").read_text(encoding="utf-8")
    assert "forward" in capsys.readouterr().out


def test_convolution_tables_hold_the_measured_figures(script):
    convolution = script("convolution")
    row = {"shape": "32x64x64x32", "threads": 1, "data": "normal"}
    rows = [
        {**row, "provider": provider, "pass": name, "min_ms": ms * (i + 1), "error": ms * 1e-6}
        for provider, ms in (("torch", 6.0), ("normdrop", 2.0))
        for i, name in enumerate(convolution.PASSES)
    ]
    speed = "| 32, 64, 64, 32 | 6.00 | 12.0 | 18.0 | 2.00 | 4.00 | 6.00 | 3.00 | 2.5 |"
    assert convolution.speed_table(rows).splitlines()[2:] == [speed]
    errors = "| 32, 64, 64, 32 | normal | 6.00, 2.00 | 6.00, 2.00 | 6.00, 2.00 |"
    assert convolution.error_table(rows).splitlines()[2:] == [errors]


def test_training_step_compares_whole_steps(script, tmp_path, capsys):
    training_step = script("training_step")
    arguments = ["--quick", "--threads", "1", "--fused", "--output", str(tmp_path)]
    assert training_step.main(arguments) == 0
    rows = read(tmp_path / "training_step.csv")
    assert set(rows[0]) == {*training_step.COLUMNS, "processor", "torch"}
    assert {row["network"] for row in rows} == {network.name for network in training_step.QUICK}
    assert {row["provider"] for row in rows} == {
        *("torch", "convert", "convert, convolution", "network"),
        *("torch, fused SGD", "convert, fused SGD"),
    }
    for row in rows:
        assert 0 < float(row["min_ms"]) <= float(row["p75"])
    assert "ResNet-20 (4, 3, 8, 8), 1 thread" in capsys.readouterr().out


def test_training_step_tables_hold_the_measured_figures(script):
    training_step = script("training_step")
    row = {"network": "ResNet-20", "threads": 2, "ratio": 1.0, "ratio_best": 0.8}
    rows = [
        {**row, "provider": "torch", "layout": "contiguous", "median_ms": 150.0},
        {**row, "provider": "torch", "layout": "channels_last", "median_ms": 120.0},
        {**row, "provider": "convert", "layout": "auto", "median_ms": 100.0}
        | {"ratio": 1.5, "ratio_best": 1.2},
        {**row, "provider": "jax", "layout": "channels_last", "median_ms": 99.5},
    ]
    assert (
        "| ResNet-20 (128, 3, 32, 32) | 150 | 120 |  | 99.5 | 100 |  | 1.50 | 1.20 | 1.4 / 1.15 |"
    ) in training_step.table(rows)


def test_training_step_apart_runs_each_way_in_its_own_process(script, tmp_path, capsys):
    apart = script("training_step_apart")
    arguments = ["--quick", "--threads", "1", "--filter", "MLP", "--output", str(tmp_path)]
    assert apart.main(arguments) == 0
    rows = read(tmp_path / "training_step_apart.csv")
    assert set(rows[0]) == {*apart.COLUMNS, "processor", "torch"}
    ways = {(row["provider"], row["layout"], row["memory"]) for row in rows}
    assert ways == {
        (*way, memory)
        for way in (("torch", "contiguous"), ("convert", "auto"))
        for memory in ("as it comes", "kept")
    }
    for row in rows:
        assert 0 < float(row["min_ms"]) <= float(row["p75"])
        assert int(row["page_faults"]) >= 0
    assert "MLP (4, 784), 1 thread\n" in capsys.readouterr().out


def test_training_step_apart_compares_with_torch_as_it_comes(script):
    apart = script("training_step_apart")
    ways = [("torch", "contiguous", 290.0), ("torch", "channels_last", 240.0)]
    ways += [("convert", "auto", 237.0)]
    rows = [
        {"network": "ResNet-20", "threads": 2, "provider": provider, "layout": layout}
        | {"memory": memory, "median_ms": time / (1 if memory == "as it comes" else 2)}
        | {"ratio": 2.44, "ratio_best": 2.02}
        for memory in ("as it comes", "kept")
        for provider, layout, time in ways
    ]
    assert (
        "| ResNet-20 (128, 3, 32, 32) | 290 | 240 | 237 | 145 | 120 | 118 | 2.44 | 2.02 | "
        "1.4 / 1.15 |"
    ) in apart.table(rows)


def test_the_networks_of_the_benchmark_are_ours_written_by_a_user(script):
    training_step = script("training_step")
    for network in training_step.NETWORKS:
        if network.ours is None:
            continue
        with torch.device("meta"):
            theirs, ours = network.theirs(), network.ours()
        shapes = [sorted(tuple(p.shape) for p in m.parameters()) for m in (theirs, ours)]
        assert shapes[0] == shapes[1], network.name


def test_inference_compares_logits_and_writes_its_table(script, tmp_path, monkeypatch):
    inference = script("inference")
    monkeypatch.setattr(inference, "_compiled", lambda model: model)
    monkeypatch.setattr(inference, "_session", lambda model, x, folder: None)
    assert inference.main(["--quick", "--threads", "1", "--output", str(tmp_path)]) == 0
    rows = read(tmp_path / "inference.csv")
    assert set(rows[0]) == {*inference.COLUMNS, "processor", "torch"}
    assert {row["provider"] for row in rows} == set(inference.TITLES) - {"onnxruntime"}
    assert all(0 <= float(row["difference"]) < 1e-5 for row in rows)
    row = {"network": "ResNet-18", "batch": 1, "threads": 2, "median_ms": 20.0, "ratio": 1.0}
    rows = [{**row, "provider": "eager"}, {**row, "provider": "fold", "median_ms": 10, "ratio": 2}]
    assert "| ResNet-18, batch 1, 2 threads | 20.0 | 10.0 (2.00×) |" in inference.table(rows)
    with pytest.raises(RuntimeError, match="other logits"):
        inference._difference(torch.ones(2), torch.zeros(2).double() + 2)
