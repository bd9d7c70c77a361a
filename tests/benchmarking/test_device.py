"""Whole networks on one device, job by job: what a GPU runs, here with the CPU in its place."""

from __future__ import annotations

import json
from concurrent.futures import Future
from dataclasses import replace

import pytest
import torch

from fusedres import env, select
from fusedres.analysis.devices import DEVICES
from fusedres.benchmarking import device, grouped
from fusedres.benchmarking.device import AUTOTUNED, COMPILED, Bench, Job, contestants_of, jobs, smoke_jobs
from fusedres.benchmarking.results import Results
from fusedres.benchmarking.workloads import INFERENCE_BF16, TRAIN_BF16
from fusedres.testing import Comparison, Entry

pytestmark = pytest.mark.skipif(env.library_missing() is not None, reason=str(env.library_missing()))

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
        if len(calls) == 1:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return original(steps, **options)

    monkeypatch.setattr(device, "interleave", short_of_memory)
    Bench(path, "cpu", 600, smoke=True).run([INFER])
    assert calls == [["eager", "fusedres"], ["eager"]]
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
    assert {m.subject for m in found} == {"bn_stats", "join", "join_backward_reduce", "join_backward_apply"}
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
