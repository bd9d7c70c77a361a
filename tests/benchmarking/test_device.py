"""Whole networks on one device, job by job: what a GPU runs, here with the CPU in its place."""

from __future__ import annotations

import itertools
import json
import signal
import subprocess
import sys
from concurrent.futures import Future
from dataclasses import replace

import pytest
import torch

from fusedres import env, select
from fusedres.analysis.devices import DEVICES
from fusedres.benchmarking import device, grouped, kernels
from fusedres.benchmarking.device import AUTOTUNED, COMPILED, Bench, Job, contestants_of, jobs, smoke_jobs
from fusedres.benchmarking.results import Measurement, Results
from fusedres.benchmarking.workloads import INFERENCE_BF16, TRAIN_BF16
from fusedres.testing import Comparison, Entry

pytestmark = pytest.mark.skipif(env.library_missing() is not None, reason=str(env.library_missing()))

CPU = torch.device("cpu")
TRAIN = Job("plain", "cifar_resnet", TRAIN_BF16, 2, 32)
INFER = Job("plain", "cifar_resnet", INFERENCE_BF16, 1, 32)


def settings(path):
    return json.loads(path.read_text())["settings"]


@pytest.fixture
def path(tmp_path):
    return tmp_path / "bench.json"


def test_jobs_are_different_and_the_most_important_comes_first():
    found = jobs()
    assert len(set(map(str, found))) == len(found)
    assert (found[0].network, found[0].workload, found[0].batch) == ("resnet50", TRAIN_BF16, 256)
    assert {job.batch for job in found if job.network == "densenet121" and job.kind == "plain"} == {1, 256}
    order = [job.kind for job in found]
    assert order.index("kernels") < order.index("compiled") < order.index("autotuned")
    assert order.index("kernels") < order.index("grouped") < order.index("compiled")
    assert {job.kind for job in smoke_jobs()} == {"plain", "kernels", "grouped"}


def test_contestants():
    assert contestants_of(TRAIN, "cpu") == ["eager", "fusedres", "eager, captured", "fusedres, captured"]
    assert contestants_of(Job("compiled", "x", TRAIN_BF16), "cpu")[-1] == COMPILED
    assert contestants_of(Job("autotuned", "x", TRAIN_BF16), "cpu")[-1] == AUTOTUNED


def test_peers_are_there_or_say_why_not(path):
    Bench(path, "cpu", 600, smoke=True).run([replace(TRAIN, kind="peers")])
    by_name = {m.contestant: m for m in Results.load(path).measurements}
    assert by_name["TensorRT"].missing == "inference only" and by_name["eager"].seconds


def test_a_backend_that_runs_here_is_a_contestant_where_auto_is_stock(monkeypatch):
    monkeypatch.setattr(device.select, "backend_for", lambda *args: "stock")
    monkeypatch.setattr(device.select, "why_not", lambda name, *args: "no nvcc" if name == "cuda" else None)
    assert device.backends_of("cuda") == {"fusedres (triton)": "triton"}


def test_jobs_are_measured_checked_and_kept(path):
    Bench(path, "cpu", 600, smoke=True).run([TRAIN, INFER])
    results = Results.load(path)
    assert results.settings["done"] == [str(TRAIN), str(INFER)] and results.settings["begun"] == ""
    by_name = {(m.workload, m.contestant): m for m in results.measurements}
    ours = by_name["train step", "fusedres"]
    assert ours.check == "ok" and ours.speedup.keys() == {"eager"} and ours.first_step > 0 and ours.autocast
    assert by_name["inference", "eager"].baseline and by_name["inference", "eager"].shape == (1, 3, 32, 32)
    assert "GPU" in by_name["inference", "eager, captured"].missing


def test_a_second_run_goes_on_and_a_later_job_takes_the_place_of_an_earlier(path, monkeypatch):
    Bench(path, "cpu", 600, smoke=True).run([INFER])
    before = Results.load(path).measurements
    monkeypatch.setattr(torch, "compile", lambda model, options: model)
    Bench(path, "cpu", 600, smoke=True).run([INFER, replace(INFER, kind="compiled")])
    after = Results.load(path).measurements
    assert len(after) == len(before) + 1 and after[-1].contestant == COMPILED and after[-1].seconds


def test_what_does_not_fit_is_left_out(path):
    Bench(path, "cpu", 5, smoke=True).run([TRAIN])
    assert settings(path)["done"] == [] and "needs about" in settings(path)["left_out"][0]


def test_what_the_process_died_of_is_told_and_not_tried_again(path):
    first = Bench(path, "cpu", 600, smoke=True)
    first._save(begun=str(TRAIN))
    Bench(path, "cpu", 600, smoke=True).run([TRAIN])
    found = settings(path)
    assert found["done"] == [str(TRAIN)] and found["begun"] == ""
    assert found["left_out"] == [f"{TRAIN}: the process died in it"]
    assert Results.load(path).measurements == ()


def test_a_contestant_that_the_process_died_in_is_left_out_of_a_second_try(path):
    Bench(path, "cpu", 600, smoke=True)._save(begun=str(INFER), under_way="fusedres")
    Bench(path, "cpu", 600, smoke=True).run([INFER])
    by_name = {m.contestant: m for m in Results.load(path).measurements}
    assert by_name["eager"].seconds and by_name["fusedres"].check == "RED: the process died in it"
    assert by_name["fusedres, captured"].check == "RED: the process died in it"
    found = settings(path)
    assert found["left_out"] == [f"{INFER}, fusedres: the process died in it"] and found["done"] == [str(INFER)]


def test_a_job_is_not_tried_for_ever(path):
    bench = Bench(path, "cpu", 600, smoke=True)
    for name in ("a", "b", "c", "d"):
        assert settings(path)["done"] == [] if path.exists() else True
        bench._save(begun=str(INFER), under_way=name)
        bench = Bench(path, "cpu", 600, smoke=True)
    assert settings(path)["done"] == [str(INFER)] and settings(path)["without"] == {str(INFER): ["a", "b", "c"]}


def test_a_kernel_that_the_process_died_in_is_left_out_of_a_second_try(path):
    Bench(path, "cpu", 600, smoke=True)._save(begun="kernels", under_way="join, cpu")
    Bench(path, "cpu", 600, smoke=True).run([Job("kernels")])
    by_name = {(m.subject, m.contestant): m for m in Results.load(path).measurements}
    assert by_name["join", "cpu"].check == "RED: the process died in it" and by_name["join", "copy"].seconds
    assert by_name["bn_stats", "cpu"].seconds


def broken(*args, **kwargs):
    raise RuntimeError("CUDA driver error\nand more")


def test_a_check_that_raises_is_red_for_its_contestant_alone(path, monkeypatch):
    monkeypatch.setattr(device, "compare", broken)
    Bench(path, "cpu", 600, smoke=True).run([INFER])
    by_name = {m.contestant: m for m in Results.load(path).measurements}
    assert by_name["fusedres"].check == "RED: RuntimeError: CUDA driver error" and not by_name["fusedres"].seconds
    assert by_name["eager"].seconds and settings(path)["failed"] == []


def test_a_contestant_of_ours_that_raises_is_red(path, monkeypatch):
    monkeypatch.setattr(device, "patch", broken)
    Bench(path, "cpu", 600, smoke=True).run([INFER])
    by_name = {m.contestant: m for m in Results.load(path).measurements}
    assert by_name["fusedres"].check == "RED: RuntimeError: CUDA driver error" and by_name["eager"].seconds


def test_a_kernel_that_raises_is_red_and_the_others_are_measured(path, monkeypatch):
    original = kernels._check

    def check(op, backend, arguments):
        return broken() if (op.name, backend) == ("join", "cpu") else original(op, backend, arguments)

    monkeypatch.setattr(kernels, "_check", check)
    Bench(path, "cpu", 600, smoke=True).run([Job("kernels")])
    by_name = {(m.subject, m.contestant): m for m in Results.load(path).measurements}
    assert by_name["join", "cpu"].check == "RED: RuntimeError: CUDA driver error"
    assert by_name["join", "reference"].seconds and by_name["bn_stats", "cpu"].seconds


@pytest.mark.parametrize("both", [False, True], ids=["ours", "the vendor's too"])
def test_a_convolution_that_raises_is_red(monkeypatch, both):
    geometry = kernels._CONVOLUTIONS[0][-1]
    given = ("fprop", (2, 8, 4, 4), 8, (1, 1), geometry, torch.float32, torch.device("cpu"), 1, lambda name: True)
    vendor = broken if both else lambda: torch.ones(2)
    monkeypatch.setattr(kernels, "convolution_contestants", lambda *args: (broken, vendor, lambda: torch.ones(2)))
    found = {m.contestant: m for m in kernels._measure_convolution(*given)}
    assert found["triton"].check == "RED: RuntimeError: CUDA driver error"
    assert list(found) == (["triton"] if both else ["triton", kernels._VENDOR])


def test_a_grouped_convolution_that_raises_is_red(monkeypatch):
    monkeypatch.setattr(grouped.select, "why_not", lambda *args: None)
    monkeypatch.setattr(grouped.Convolved, "call", lambda self, kind, name: broken if name == "cuda" else lambda: None)
    found = {m.contestant: m for m in itertools.islice(grouped.measure(1, (4, 4), torch.float32, CPU, 1), 3)}
    assert found["cuda"].check == "RED: RuntimeError: CUDA driver error" and found["vendor"].seconds


def test_a_job_that_raises_is_told_and_the_next_one_runs(path, monkeypatch):
    monkeypatch.setattr(device, "settle", broken)
    Bench(path, "cpu", 600, smoke=True).run([INFER, Job("kernels")])
    assert settings(path)["failed"] == [f"{INFER}: RuntimeError: CUDA driver error"]
    assert settings(path)["done"] == [str(INFER), "kernels"]


def test_what_was_measured_is_kept_when_the_process_ends(path, monkeypatch):
    original = device._step_of

    def ended(name, *args):
        if name == "fusedres":
            raise KeyboardInterrupt
        return original(name, *args)

    monkeypatch.setattr(device, "_step_of", ended)
    with pytest.raises(KeyboardInterrupt):
        Bench(path, "cpu", 600, smoke=True).run([INFER])
    (eager,) = Results.load(path).measurements
    assert eager.contestant == "eager" and eager.seconds and settings(path)["under_way"] == "fusedres"


def test_a_group_of_kernels_is_kept_as_soon_as_it_is_measured(path, monkeypatch):
    original = kernels._check

    def ended(op, *args):
        if op.name == "join":
            raise KeyboardInterrupt
        return original(op, *args)

    monkeypatch.setattr(kernels, "_check", ended)
    with pytest.raises(KeyboardInterrupt):
        Bench(path, "cpu", 600, smoke=True).run([Job("kernels")])
    assert {m.subject for m in Results.load(path).measurements} == {"bn_stats"}
    assert settings(path)["under_way"] == "join, cpu"


def test_being_out_of_time_is_nobodys_fault(path):
    command = [sys.executable, "-m", "fusedres.benchmarking.device", "--out", str(path), "--device", "cpu", "--smoke"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline().startswith("begin: ")
    process.terminate()
    process.communicate(timeout=300)
    assert process.returncode == 128 + signal.SIGTERM
    assert settings(path)["begun"] == settings(path)["under_way"] == "" and settings(path)["done"] == []


def test_a_job_whose_kernels_are_not_compiled_yet_may_take_the_time_that_is_left(path):
    bench = Bench(path, "cpu", 5000, smoke=True)
    assert bench._limit(TRAIN) > 4000
    bench._deadline = 0.0
    assert bench._limit(TRAIN) == 240
    bench._seen.add((TRAIN.kind, TRAIN.network, TRAIN.workload))
    assert bench._limit(TRAIN) == bench._limit(replace(TRAIN, batch=1)) == 75
    assert bench._limit(INFER) == 240


def measurement(contestant, **more):
    return Measurement("model", "net", "inference", "bfloat16", (1, 3, 32, 32), contestant, **more)


def test_a_later_job_adds_to_what_an_earlier_one_found(path):
    bench, timed = Bench(path, "cpu", 600, smoke=True), {"median": 1.0}
    bench._put(measurement("fusedres", seconds=timed, speedup={"eager": 2.0, "torch.compile": 1.5}, first_step=9.0))
    bench._put(measurement("fusedres", seconds={"median": 2.0}, speedup={"eager": 3.0}, first_step=1.0))
    bench._put(measurement("torch.compile", seconds=timed))
    bench._put(measurement("torch.compile", missing="no memory beside the others"))
    ours, compiled = bench.results.measurements
    assert ours.speedup == {"eager": 3.0, "torch.compile": 1.5} and ours.seconds == {"median": 2.0}
    assert ours.first_step == 9.0 and compiled.seconds == timed and not compiled.missing
    bench._put(measurement("torch.compile", check="RED: wrong"))
    ours, compiled = bench.results.measurements
    assert ours.speedup == {"eager": 3.0} and compiled.check == "RED: wrong" and not compiled.seconds


@pytest.mark.parametrize(("key", "value"), [("sources", "others"), ("smoke", False)])
def test_a_file_of_other_sources_is_not_gone_on_with(path, key, value):
    Bench(path, "cpu", 600, smoke=True)._save(done=["grouped"])
    assert Bench(path, "cpu", 600, smoke=True).results.settings["done"] == ["grouped"]
    Bench(path, "cpu", 600, smoke=True)._save(**{key: value})
    assert Bench(path, "cpu", 600, smoke=True).results.settings["done"] == []


def test_a_file_of_another_machine_is_not_gone_on_with(path):
    bench = Bench(path, "cpu", 600, smoke=True)
    replace(bench.results, machine=replace(bench.results.machine, gpu="another")).save(path)
    assert Bench(path, "cpu", 600, smoke=True).results.machine.gpu == ""
    path.write_text("{}")
    assert Bench(path, "cpu", 600, smoke=True).results.measurements == ()


def test_a_peer_must_say_what_eager_says(path, monkeypatch):
    monkeypatch.setattr(torch, "compile", lambda model, options: lambda images: 2 * model(images))
    Bench(path, "cpu", 600, smoke=True).run([replace(INFER, kind="compiled")])
    by_name = {m.contestant: m for m in Results.load(path).measurements}
    assert by_name[COMPILED].check.startswith("RED: its output is 1 of its size away from eager's")
    assert by_name[COMPILED].seconds is None and COMPILED not in by_name["fusedres"].speedup
    assert by_name["fusedres"].check == "ok" and by_name["eager"].check == ""


def test_our_first_step_finds_nothing_compiled_by_the_check(path, monkeypatch):
    original, order = device._step_of, []
    monkeypatch.setattr(device, "_step_of", lambda name, *args: order.append(name) or original(name, *args))
    monkeypatch.setattr(device, "compare", lambda *args, **kwargs: order.append("check") or Comparison(()))
    Bench(path, "cpu", 600, smoke=True).run([INFER])
    assert order[:3] == ["eager", "fusedres", "check"]


def test_what_is_red_is_not_timed(path, monkeypatch):
    red = Comparison((Entry("output", 3.0, 1.0, 2.0, 1.0),))
    monkeypatch.setattr(device, "compare", lambda *args, **kwargs: red)
    Bench(path, "cpu", 600, smoke=True).run([INFER])
    by_name = {m.contestant: m for m in Results.load(path).measurements}
    assert by_name["fusedres"].check.startswith("RED") and by_name["fusedres"].seconds is None
    assert by_name["eager"].seconds and not by_name["eager"].speedup


def test_too_little_memory_costs_the_last_contestant_alone(path, monkeypatch):
    original, calls = device.interleave, []

    def short_of_memory(steps, **options):
        calls.append(list(steps))
        if "fusedres" in steps:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return original(steps, **options)

    monkeypatch.setattr(device, "interleave", short_of_memory)
    Bench(path, "cpu", 600, smoke=True).run([INFER])
    # Stock PyTorch as soon as it is ready; beside it the other, and again without; all that are left.
    assert calls == [["eager"], ["eager", "fusedres"], ["eager"], ["eager"]]
    by_name = {m.contestant: m for m in Results.load(path).measurements}
    assert "no memory beside the others" in by_name["fusedres"].missing and by_name["eager"].seconds


@pytest.mark.parametrize("job", [TRAIN, INFER], ids=str)
def test_a_known_device_has_a_bound(path, monkeypatch, job):
    monkeypatch.setattr(device, "_known_device", lambda of: DEVICES["H100"])
    Bench(path, "cpu", 600, smoke=True).run([job])
    results = Results.load(path)
    assert results.settings["left_out"] == [] and results.roofline["bandwidth"] == 3.35e12
    eager, ours = (next(m for m in results.measurements if m.contestant == name) for name in ("eager", "fusedres"))
    assert 0 < ours.moved < eager.moved and 0 < ours.of_roofline < 1 and ours.flops == eager.flops > 0


def test_a_count_that_fails_costs_no_measurement(path, monkeypatch):
    monkeypatch.setattr(device, "_known_device", lambda of: DEVICES["H100"])
    bench = Bench(path, "cpu", 600, smoke=True)
    failed = Future()
    failed.set_exception(RuntimeError("died"))
    bench._costs[device._key(INFER)] = failed
    bench.run([INFER])
    assert settings(path)["left_out"] == [f"traffic of {INFER}: RuntimeError: died"]
    assert next(m for m in Results.load(path).measurements if m.contestant == "eager").seconds


def test_the_kernels_are_checked(path):
    Bench(path, "cpu", 600, smoke=True).run([Job("kernels")])
    found = [m for m in Results.load(path).measurements if m.contestant == "cpu"]
    backward = {"join_backward_reduce", "join_backward_apply", "join_pool_backward"}
    assert {m.subject for m in found} == {"bn_stats", "join", "join_pool", *backward}
    assert all(m.check == "ok" and m.bytes_per_second > 0 for m in found)
    assert all(m.speedup["copy"] > 0 for m in found)  # the bandwidth that there is, of as many bytes


def test_grouped_convolutions_stand_beside_the_vendor_s(path):
    Bench(path, "cpu", 600, smoke=True).run([Job("grouped")])
    found = Results.load(path).measurements
    assert {m.subject for m in found} == {"conv fprop", "conv dgrad", "conv wgrad"}
    assert len(found) == 3 * 3 * len(grouped.GROUPED) and len({(m.group, m.contestant) for m in found}) == len(found)
    by_name = {name: [m for m in found if m.contestant == name] for name in grouped.CONTESTANTS}
    assert all(m.seconds and m.baseline for m in by_name["vendor"])
    assert all(m.speedup["vendor"] > 0 for m in by_name["eager"])
    assert all(m.missing == select.why_not("cuda", "cpu", torch.bfloat16) for m in by_name["cuda"])


@pytest.mark.parametrize("kind", grouped.KINDS)
def test_a_grouped_convolution_is_checked_on_a_few_images(kind, monkeypatch):
    convolved = grouped.Convolved((3, 16, 5, 5), 2, 4, torch.float32, "cpu")
    assert grouped.check(convolved, kind, "reference") == "ok"
    original = grouped._results

    def wrong(op, backend, arguments):
        found = original(op, backend, arguments)
        return [2 * t for t in found] if backend == "cuda" else found

    monkeypatch.setattr(grouped, "_results", lambda op, backend, given: wrong(op, backend, given))
    monkeypatch.setattr(type(convolved.op(kind)), "overload", lambda self, backend: self.reference)
    assert grouped.check(convolved, kind, "cuda").startswith("RED: ")
