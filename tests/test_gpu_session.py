"""The run on a GPU, as far as it can be seen without one."""

from __future__ import annotations

import itertools
import json
import math
import os
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

ROOT = Path(__file__).parent.parent
# Appended: an installed triton_rnn is still the one that is tested.
sys.path.append(str(ROOT))

from bench import (  # noqa: E402  (needs the path)
    gpu_checks,
    gpu_correctness,
    gpu_goals,
    gpu_grid,
    gpu_report,
    gpu_session,
)
from bench.gpu_workers import Budget, Pool  # noqa: E402

# The order of the cases ---------------------------------------------------------------------------


def test_a_covering_holds_every_allowed_pair_of_values_once_at_least():
    axes = {"a": (1, 2, 3), "b": "xyz", "c": (True, False), "d": (0, 1)}

    def allowed(values):
        return not (values["a"] == 3 and values["c"])

    found = gpu_grid.covering(axes, 1, allowed)
    assert all(map(allowed, found))
    for one, other in itertools.combinations(axes, 2):
        wanted = set(itertools.product(axes[one], axes[other]))
        if (one, other) == ("a", "c"):
            wanted.remove((3, True))
        assert {(values[one], values[other]) for values in found} == wanted
    assert len(found) < 3 * 3 * 2 * 2
    assert found == gpu_grid.covering(axes, 1, allowed)
    assert found != gpu_grid.covering(axes, 2, allowed)


def test_the_first_timed_cases_are_the_anchors_and_then_every_value_of_every_axis():
    cases = gpu_grid.timing_cases()
    assert tuple(cases[:4]) == gpu_grid.ANCHORS
    assert cases[0].id == "lstm-float16-inference-H768-N16-T1024-D1-L1"
    early = cases[4:24]
    for axis, values in gpu_grid.AXES.items():
        assert {getattr(case, axis) for case in early} == set(values), axis


def test_no_timed_case_comes_twice_or_is_too_large_and_the_order_is_always_the_same():
    cases = gpu_grid.timing_cases()
    assert len(cases) == gpu_grid.TIMING_CASES == len({case.id for case in cases})
    assert cases == gpu_grid.timing_cases()
    assert cases[:10] == gpu_grid.timing_cases(10)
    assert max(case.flops for case in cases) < 1e14
    # Else torch.nn and ours would be timed on a batch that is not packed.
    assert all(len(set(case.lengths())) > 1 for case in cases if case.packed)
    assert all(max(case.lengths()) == case.steps and min(case.lengths()) > 0 for case in cases)
    assert len({point.id for point in gpu_grid.TUNING_POINTS}) == len(gpu_grid.TUNING_POINTS) >= 12


def test_the_order_of_cases_does_not_hang_on_the_hash_seed():
    program = "from bench.gpu_grid import *; from bench.gpu_checks import *\n"
    program += "print([case.id for case in timing_cases()], [case.id for case in check_cases()])"
    printed = {
        subprocess.run(
            [sys.executable, "-c", program],
            cwd=ROOT,
            env={**os.environ, "PYTHONHASHSEED": seed},
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for seed in "12"
    }
    assert len(printed) == 1


def test_checks_cover_cells_dtypes_and_variants_and_begin_with_every_kind_of_check():
    cases = gpu_checks.check_cases()
    assert len({case.id for case in cases}) == len(cases)
    assert {case.check for case in cases[:21]} == set(gpu_checks.CHECKS)
    wanted = set(itertools.product(gpu_checks.CELLS, gpu_checks.DTYPES, gpu_checks.VARIANTS))
    # Which has no plan.
    wanted -= {(cell, "float32", "cluster") for cell in gpu_checks.CELLS}
    assert {(case.cell, case.dtype, case.variant) for case in cases} >= wanted
    made = {*gpu_checks.OWN_CELLS, *gpu_checks.EXTENDED_CELLS}
    assert {case.cell for case in cases[:48]} >= {*gpu_checks.CELLS, *made}
    for case in cases:
        if case.is_packed and case.batch > 1:
            lengths = case.lengths()
            assert len(lengths) == case.batch
            assert max(lengths) == case.steps and min(lengths) >= 1


# What torch.nn runs on ----------------------------------------------------------------------------


def case(cell="lstm", dtype="float16", hidden=768, batch=16, training=False, **options):
    return gpu_grid.TimingCase(cell, dtype, training, hidden, batch, 1024, **options)


@pytest.mark.parametrize(
    ("timed", "backward", "algorithm"),
    [
        (case(), False, "PERSIST_STATIC"),
        (case(batch=128), True, "PERSIST_STATIC"),
        (case(cell="rnn", hidden=1024), False, "PERSIST_STATIC"),
        (case(hidden=192), False, "PERSIST_STATIC_SMALL_H"),
        (case(hidden=192), True, "STANDARD"),
        (case(hidden=128, dtype="bfloat16"), True, "PERSIST_STATIC_SMALL_H"),
        (case(cell="rnn", hidden=384, dtype="float32"), False, "PERSIST_STATIC_SMALL_H"),
        (case(cell="rnn", hidden=384, dtype="float32"), True, "STANDARD"),
        (case(cell="gru"), False, "STANDARD"),
        (case(dtype="bfloat16"), False, "STANDARD"),
        (case(dtype="float32"), False, "STANDARD"),
        (case(hidden=2048), False, "STANDARD"),
        (case(hidden=800), False, "STANDARD"),
        (case(batch=1), False, "STANDARD"),
        (case(batch=256), False, "STANDARD"),
        (case(layers=2), False, "STANDARD"),
        (case(directions=2), False, "STANDARD"),
        (case(hidden=64, packed=True), False, "STANDARD"),
    ],
    ids=str,
)
def test_the_algorithm_is_that_of_torchs_rule(timed, backward, algorithm):
    assert gpu_grid.algorithm(timed, 91900, backward) == algorithm


def test_an_old_cudnn_is_not_credited_with_bfloat16():
    assert gpu_grid.algorithm(case(dtype="bfloat16"), 91200).startswith("torch's own")
    assert gpu_grid.algorithm(case(), 91200) == "PERSIST_STATIC"


# Time and children --------------------------------------------------------------------------------


class Clock:
    def __init__(self):
        self.now = 100.0

    def __call__(self):
        return self.now


def test_a_budget_is_spent_by_its_clock_and_its_parts_are_of_what_is_left():
    clock = Clock()
    budget = Budget(60, clock)
    clock.now += 20
    assert (budget.spent, budget.left, budget.is_over) == (20, 40, False)
    part = budget.part(0.5)
    assert part.seconds == 20
    clock.now += 30
    assert part.is_over and not budget.is_over
    assert budget.part(0.5, keep=20).seconds == 0
    clock.now += 20
    assert budget.is_over and budget.part(1).seconds == 0


def test_every_part_has_its_share_of_what_is_left_and_inherits_what_was_not_used(tmp_path):
    clock, given = Clock(), {}

    class FakeSession:
        budget = Budget(470, clock)
        store = gpu_session.Store(tmp_path / "out", {}, clock)

        def machine(self, part, budget):
            clock.now += 20

        def correctness(self, part, budget):
            given["correctness"] = budget.seconds
            clock.now += 62

        def timing(self, part, budget):
            given["timing"] = budget.seconds
            # Later than it may be: the next part has less.
            clock.now += budget.seconds + 8

        def tuning(self, part, budget):
            given["tuning"] = budget.seconds

    gpu_session.run_parts(FakeSession(), ["tuning", "timing", "correctness"])
    shares = gpu_session.SHARES
    timing = (450 - 62) * shares["timing"] / (1 - shares["correctness"])
    assert given == pytest.approx(
        {
            "correctness": 450 * shares["correctness"],
            "timing": timing,
            "tuning": 450 - 62 - timing - 8,
        }
    )
    assert list(FakeSession.store.data) == ["measured_ceilings", *gpu_session.SHARES]
    # After every part there is something to read.
    assert json.loads((tmp_path / "out" / "gpu.json").read_text())["timing"]["results"] == []


# Squares numbers; some tasks are not survived.
WORKER = """
import os, sys, time
sys.path.append({root!r})
from bench.gpu_workers import serve

def handle(task):
    print("a compiler's chatter")
    if task["what"] == "raise":
        raise ValueError("no such number")
    if task["what"] == "crash":
        print("the last words", file=sys.stderr, flush=True)
        os._exit(7)
    if task["what"] == "slow":
        time.sleep(2)
    if task["what"] == "hang":
        time.sleep(60)
    return {{"status": "ok", "square": task["number"] ** 2, "pid": os.getpid()}}

serve(handle, lambda: {alive}, 60)
"""


def pool(tmp_path, alive=True, jobs=1):
    script = tmp_path / "worker.py"
    script.write_text(WORKER.format(root=str(ROOT), alive=alive))
    return Pool([sys.executable, str(script)], jobs=jobs)


def run_pool(pool, whats, seconds=30.0, task_seconds=20.0):
    tasks = [{"what": what, "number": number} for number, what in enumerate(whats)]
    found: dict[int, Any] = {}

    def done(task, result):
        found[task["number"]] = result

    left = pool.run(tasks, Budget(seconds), done, task_seconds)
    return found, [task["number"] for task in left]


def test_a_crash_and_a_hang_and_an_exception_cost_one_task_each(tmp_path):
    whats = ["good", "crash", "good", "raise", "hang", "good"]
    with pool(tmp_path) as children:
        found, left = run_pool(children, whats, task_seconds=1.5)
    statuses = [found[number]["status"] for number in range(6)]
    assert statuses == ["ok", "crashed", "ok", "error", "hung", "ok"]
    assert left == []
    assert found[2]["square"] == 4
    assert found[1]["returncode"] == 7 and "the last words" in found[1]["traceback"]
    assert found[3]["error"] == "ValueError: no such number"
    # An exception is survived; a crash is not.
    assert found[2]["pid"] != found[0]["pid"]


def test_a_child_whose_device_is_dead_is_given_no_more_tasks(tmp_path):
    with pool(tmp_path, alive=False) as children:
        found, left = run_pool(children, ["good", "raise", "good", "good"])
    assert [found[number]["status"] for number in range(4)] == ["ok", "error", "ok", "ok"]
    assert found[0]["pid"] != found[2]["pid"] == found[3]["pid"]
    assert left == []


def test_when_the_time_is_over_the_rest_is_named_and_nothing_is_waited_for(tmp_path):
    watch = Budget(math.inf)
    with pool(tmp_path) as children:
        found, left = run_pool(children, ["good", "hang", "good", "good"], seconds=1.5)
        assert list(found) == [0]
        assert left == [1, 2, 3]
        assert run_pool(children, ["good"], seconds=0.0) == ({}, [0])
    assert watch.spent < 10


def test_children_stay_for_the_next_tasks_but_not_one_that_hangs(tmp_path):
    with pool(tmp_path) as children:
        first, _ = run_pool(children, ["good"])
        second, _ = run_pool(children, ["good", "hang"], seconds=1.5)
        third, _ = run_pool(children, ["good"])
    assert first[0]["pid"] == second[0]["pid"] != third[0]["pid"]


def test_a_running_task_may_end_within_its_grace(tmp_path):
    with pool(tmp_path) as children:
        children.grace = 20.0
        found, left = run_pool(children, ["slow", "good"], seconds=1.0)
    assert list(found) == [0] and left == [1]


def test_children_that_do_not_start_end_the_part_and_say_why(tmp_path):
    with Pool([sys.executable, "-c", "raise SystemExit('no such library')"], jobs=2) as broken:
        found, left = run_pool(broken, ["good"] * 5)
    assert found == {} and left == [0, 1, 2, 3, 4]
    assert "no such library" in broken.start_failure


def test_tasks_run_side_by_side(tmp_path):
    with pool(tmp_path, jobs=2) as children:
        found, left = run_pool(children, ["hang", *["good"] * 4], seconds=3.0)
    assert sorted(found) == [1, 2, 3, 4] and left == [0]


# Files --------------------------------------------------------------------------------------------


def test_a_file_is_replaced_whole_or_not_at_all(tmp_path, monkeypatch):
    path = tmp_path / "gpu.json"
    gpu_session.write_atomically(path, "old")

    def refuse(*arguments):
        raise OSError("the disk is gone")

    monkeypatch.setattr(os, "replace", refuse)
    with pytest.raises(OSError, match="the disk is gone"):
        gpu_session.write_atomically(path, "new")
    monkeypatch.undo()
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == ["gpu.json"]
    gpu_session.write_atomically(path, "new")
    assert path.read_text() == "new"


def test_a_slip_in_a_table_does_not_cost_the_numbers(tmp_path, monkeypatch):
    monkeypatch.setattr(gpu_report, "markdown", lambda data: 1 / 0)
    gpu_session.Store(tmp_path, {"finished": math.nan}).write()
    assert json.loads((tmp_path / "gpu.json").read_text()) == {"finished": "nan"}
    assert "ZeroDivisionError" in (tmp_path / "gpu.md").read_text()


# The report ---------------------------------------------------------------------------------------


def timed(case, ratio_auto, ratio_triton, us=1.5, **more):
    def side(us_per_step):
        device = us_per_step * case.steps / 1e6
        seconds = dict.fromkeys(("device_s", "wall_s", "host_s"), device)
        return {"us_per_step": us_per_step, **seconds, "spread": 0.01}

    times = {"auto": side(us), "triton": side(us), "cudnn": side(us * ratio_auto)}
    return {
        "id": case.id,
        "case": vars(case),
        "status": "ok",
        "algorithm": gpu_grid.algorithm(case, 91900),
        "backend": "triton",
        "times": times,
        "ratio_auto": ratio_auto,
        "ratio_triton": ratio_triton,
        "wall_ratio_auto": ratio_auto,
        "floor_us": 1.0,
        "floor_share": 1.0 / us,
        **more,
    }


def checked(status, norm, **options):
    found = gpu_checks.CheckCase("numbers", "gru", "float16", "resident", 64, 3, 2, **options)
    worst = {"name": "grad of h_0", "norm": norm, "peak": norm}
    return {"id": found.id, "case": vars(found), "status": status, "worst": worst, "torch": 1e-3}


def tuned():
    plan = {"variant": "cooperative", "exchange": "flag", "block_h": 8, "block_n": 16}
    plan |= {"block_k": 64, "warps": 4, "floor_us": 1.0, "bytes_on_chip": 2048}
    other = {**plan, "warps": 8}
    point = gpu_grid.TUNING_POINTS[0]
    rows = [
        {"plan": other, "status": "ok", "us_per_step": 1.25, "floor_us": 1.0, "chosen": False},
        {"plan": plan, "status": "ok", "us_per_step": 1.75, "floor_us": 1.0, "chosen": True},
        {"plan": plan, "status": "error", "error": "OutOfResources: shared", "chosen": False},
    ]
    return {"id": point.id, "case": vars(point), "status": "ok", "plans": rows}


def made_up() -> dict[str, Any]:
    gru = case(cell="gru", hidden=512, training=True)
    return {
        "finished": True,
        "seconds": 99.0,
        "machine": {"GPU": "an invented one"},
        "measured_ceilings": {"ceilings": {"copy_gb_per_s": 4000.0}},
        "correctness": {
            "results": [
                checked("ok", 2e-3),
                {**checked("wrong", "nan", form="packed"), "error": "output: nan by norm"},
                {**checked("skipped", 0.0, form="strided"), "worst": None},
            ],
            "not_reached": ["numbers-that-had-no-time"],
        },
        "timing": {
            "results": [
                timed(gpu_grid.ANCHORS[0], 1.25, 1.5, us=1.7),
                timed(gpu_grid.ANCHORS[2], 2.0, 2.0, us=0.5),
                timed(gru, 8.0, 8.0),
                timed(case(cell="gru", hidden=1024), 0.5, 0.25),
                {
                    "id": "broken",
                    "case": vars(gru),
                    "status": "error",
                    "error": "GateError: output: relative difference 1.0e+00",
                    "traceback": "Traceback: the gate",
                },
            ],
            "not_reached": ["lstm-that-had-no-time"],
            "phases": {
                "results": [
                    {
                        "id": gru.id,
                        "status": "ok",
                        "seconds": {"step": 2e-3, "project": 1e-4, "other": 1e-5},
                        "products": {"project": {"ours": 1e-4, "cublas": 8e-5}},
                    }
                ],
                "not_reached": ["phases-that-had-no-time"],
            },
            "own": {
                "results": [timed(case(cell="peephole", training=True), 20.0, 20.0)],
                "not_reached": ["own-cell-that-had-no-time"],
            },
            "short": {
                "results": [timed(gpu_grid.SHORT_CASES[0], 9.0, 7.0)],
                "not_reached": ["short-one-that-had-no-time"],
            },
        },
        "tuning": {"results": [tuned()], "not_reached": []},
    }


def test_geometric_means_are_over_the_cases_of_an_axis_value():
    rows = gpu_report.timed(made_up())
    lines = gpu_report.by_axis(rows).splitlines()
    cells = {line.split(" | ")[0].strip("| "): line.strip("| ").split(" | ") for line in lines[2:]}
    # Name, cases; auto and kernels in inference, in training, in both; wall; worst.
    assert cells["cell gru"][1:] == [
        "2",
        "0.50",
        "0.25",
        "8.00",
        "8.00",
        "2.00",
        "1.41",
        "2.00",
        "0.50",
    ]
    assert cells["cell lstm"][1:] == ["2", "1.58", "1.73", "-", "-", "1.58", "1.73", "1.58", "1.25"]
    both = statistics.geometric_mean([1.25, 2.0, 8.0, 0.5])
    assert cells["all"][6] == f"{both:.2f}"
    assert cells["hidden 512"][1] == "1"
    assert "cuDNN PERSIST_STATIC" in cells


def test_goals_are_read_off_the_right_cases():
    rows = gpu_report.timed(made_up())
    found = {goal.name: goal.line(rows)[2:] for goal in gpu_goals.GOALS}
    name = "geometric mean over bfloat16, float32, GRU, two directions, several layers, packed"
    # 2.0 in bfloat16, 8.0 and 0.5 of the GRU; the float16 LSTM does not count.
    assert found[name] == ["2.00", "no"]
    assert found["- bfloat16 alone"] == ["2.00", "no"]
    assert found["- packed alone"] == ["-", "not measured"]
    assert found["LSTM float16 N16 T1024 H768 forward, ratio"] == ["1.25", "yes"]
    assert found["the same, us per step"] == ["1.70", "no"]
    assert found["LSTM bfloat16 N16 T1024 H128 forward, us per step"] == ["0.50", "yes"]
    assert found["worst case on auto"] == ["0.50", "no"]


def test_the_markdown_tells_what_failed_and_what_was_not_reached():
    text = gpu_report.markdown(gpu_session.plain(made_up()))
    for said in (
        "an invented one",
        "output: nan by norm",
        "GateError: output",
        "Traceback: the gate",
        "numbers-that-had-no-time",
        "lstm-that-had-no-time",
        "phases-that-had-no-time",
        "own-cell-that-had-no-time",
        "short-one-that-had-no-time",
        f"| {gpu_grid.SHORT_CASES[0].id} |",
        "plain loop (no cuDNN)",
        "Slower than torch.nn on auto: 1 of 4",
        "OutOfResources",
        "100/80",
    ):
        assert said in text
    row = next(line for line in text.splitlines() if line.startswith("| gru | float16 |"))
    # One right, one wrong, one without a plan; the NaN is the worst.
    assert row.split(" | ")[2:6] == ["1", "1", "1", "nan (6e-03)"]


def test_a_case_that_failed_the_gate_shows_no_speed():
    text = gpu_report.markdown(made_up())
    assert not any(line.startswith("| broken") for line in text.splitlines())
    assert not gpu_report.is_right(made_up())


def test_the_summary_is_short_and_ends_the_run():
    data = made_up()
    text = gpu_report.summary(data)
    assert "1 right, 1 not, 1 without a plan, 1 not reached" in text
    assert "1.75 us/step (floor 1.00); 1.25 with cooperative flag 8x16x64 w8" in text
    assert text.endswith("finished after 99 s; tables in gpu.md")
    data["timing"]["results"] *= 50
    data["correctness"]["results"] *= 50
    assert len(gpu_report.summary(data)) < 12_000


def test_a_run_that_came_to_nothing_can_be_reported():
    for data in ({}, {"finished": False, "correctness": {"results": [], "not_reached": ["a"]}}):
        assert "not finished" in gpu_report.markdown(data)
        assert "NOT FINISHED" in gpu_report.summary(data)
        assert not gpu_report.is_right(data)


# Right and wrong numbers --------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", gpu_checks.DTYPES)
def test_one_wrong_element_among_a_million_is_seen_in_every_dtype(dtype):
    checked = gpu_checks.CheckCase("numbers", "gru", dtype, "resident", 64, 3, 2)
    expected = {"output": torch.randn(1000, 1000, dtype=torch.float64)}
    actual = {"output": expected["output"].clone()}
    found = gpu_correctness.errors(actual, expected)
    assert gpu_correctness.verdict(checked, found)["status"] == "ok"
    actual["output"][500, 500] += 1
    found = gpu_correctness.errors(actual, expected)
    assert gpu_correctness.verdict(checked, found)["status"] == "wrong"


def test_a_nan_is_wrong_and_the_worst():
    checked = gpu_checks.CheckCase("numbers", "gru", "float16", "resident", 64, 3, 2)
    expected = {name: torch.ones(3, dtype=torch.float64) for name in ("output", "h_n")}
    actual = {"output": expected["output"].clone(), "h_n": expected["h_n"] + 1}
    actual["output"][1] = math.nan
    result = gpu_correctness.verdict(checked, gpu_correctness.errors(actual, expected))
    assert result["status"] == "wrong" and result["worst"]["name"] == "output"


def test_roundings_of_bfloat16_pass_and_a_swapped_step_does_not():
    checked = gpu_checks.CheckCase("numbers", "lstm", "bfloat16", "", 16, 3, 9)
    device = torch.device("cpu")
    _, twin, exact = gpu_correctness.modules(checked, device)
    given = gpu_correctness.data(checked, device)
    expected = gpu_correctness.exact_results(checked, exact, given)
    actual = gpu_correctness.run(checked, twin, gpu_correctness.leaves_of(checked, given))
    found = gpu_correctness.errors(actual, expected)
    assert gpu_correctness.verdict(checked, found)["status"] == "ok"
    output = actual["output"]
    output[4], output[5] = output[5].clone(), output[4].clone()
    found = gpu_correctness.errors(actual, expected)
    assert gpu_correctness.verdict(checked, found)["status"] == "wrong"


# The command --------------------------------------------------------------------------------------


def command(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "bench.gpu_session", *arguments],
        cwd=ROOT,
        env={**os.environ, "OPENBLAS_NUM_THREADS": "1", **environment},
        capture_output=True,
        text=True,
        timeout=120,
    )


def test_without_a_gpu_the_command_says_so_and_writes_nothing(tmp_path):
    out = tmp_path / "out"
    ended = command(str(out), CUDA_VISIBLE_DEVICES="", TRITON_INTERPRET="0")
    assert ended.returncode == 2
    assert ended.stderr.strip().endswith(
        "no CUDA device is at hand, so there is nothing to measure"
    )
    assert ended.stdout == "" and not out.exists()


def test_the_checks_run_through_on_the_interpreter(tmp_path):
    """The whole command but for the times: children, checks, files, summary."""
    out = tmp_path / "out"
    ended = command(
        str(out), "--device", "cpu", "--part", "correctness", "--minutes", "2", TRITON_INTERPRET="1"
    )
    assert ended.returncode == 0, ended.stdout + ended.stderr
    assert sorted(os.listdir(out)) == ["gpu.json", "gpu.md"]
    data = json.loads((out / "gpu.json").read_text())
    assert data["finished"] and data["correctness"]["not_reached"] == []
    results = {row["id"]: row for row in data["correctness"]["results"]}
    for wanted in gpu_checks.rehearsal_cases():
        # The interpreter runs one program after the other. Graphs and autocast are a GPU's.
        skipped = wanted.variant == "cooperative" or wanted.check in ("graph", "autocast")
        assert results[wanted.id]["status"] == ("skipped" if skipped else "ok"), wanted.id
        assert skipped or results[wanted.id]["plan"]
    assert "15 right, 0 not, 3 without a plan, 0 not reached" in ended.stdout


TIMES = """
import json
from bench import gpu_grid, gpu_session
handle, is_alive = gpu_session.handler("cpu")
found = {}
for kind, case in [
    ("machine", None),
    ("warm", gpu_grid.REHEARSAL_CASES[0]),
    ("time", gpu_grid.REHEARSAL_CASES[0]),
    ("time", gpu_grid.REHEARSAL_CASES[1]),
    ("time", gpu_grid.REHEARSAL_OWN_CASES[0]),
    ("phases", gpu_grid.REHEARSAL_CASES[0]),
]:
    task = {"kind": kind, "case": case and vars(case)}
    found.setdefault(kind, []).append(handle(json.loads(json.dumps(task))))
point = {"case": vars(gpu_grid.REHEARSAL_POINTS[1])}
plans = handle({"kind": "candidates", **point})["plans"]
found["warm_plan"] = [handle({"kind": "warm_plan", **point, "plan": plans[-1]})]
found["tune"] = [handle({"kind": "tune", **point, "plans": plans[:2]})]
assert is_alive()
print(json.dumps(found))
"""


def test_the_code_that_takes_times_runs_through_on_the_interpreter():
    """The numbers mean nothing; that they come, and in the form that the report reads, does."""
    ended = subprocess.run(
        [sys.executable, "-c", TIMES],
        cwd=ROOT,
        env={**os.environ, "OPENBLAS_NUM_THREADS": "1", "TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert ended.returncode == 0, ended.stdout + ended.stderr
    found = json.loads(ended.stdout.splitlines()[-1])
    assert all(result["status"] == "ok" for results in found.values() for result in results)
    cases = (*gpu_grid.REHEARSAL_CASES, *gpu_grid.REHEARSAL_OWN_CASES)
    for case, result in zip(cases, found["time"], strict=True):
        assert result["ratio_triton"] > 0 and "forward: resident" in result["plan"]
        assert result["difference"] < 1e-2
        row = {"id": case.id, "case": vars(case), **result}
        assert len(gpu_report.case_line(row)) == len(gpu_report.CASE_HEADER)
    phases = found["phases"][0]["seconds"]
    assert {"project", "recurrence forward", "recurrence backward", "grad_weight"} <= phases.keys()
    assert sum(phases.values()) == pytest.approx(2 * phases["step"])
    assert [row["status"] for row in found["tune"][0]["plans"]] == ["ok", "ok"]
