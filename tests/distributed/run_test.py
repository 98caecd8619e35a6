"""Several real processes on this machine: the same curve, stopped, killed, resumed."""

import itertools
import json
import shutil
import signal
import time

import numpy as np
import pytest
from PIL import Image

from beit_jax.training import metrics
from tests.distributed.processes import (
    Run,
    assert_same_state,
    evaluations,
    finish,
    losses,
    saved_steps,
    values,
)
from tests.tasks import tiny
from tests.weights import examples

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def photographs(tmp_path_factory):
    """61 pictures: not a multiple of anything."""
    folder = tmp_path_factory.mktemp("photographs")
    rng = np.random.default_rng(0)
    for i in range(61):
        small = rng.integers(0, 256, (5, 6, 3)).astype(np.uint8)
        Image.fromarray(small).resize((60, 50)).save(folder / f"{i:02}.png")
    return folder


def test_same_curve_and_every_image_read_once(photographs, tmp_path):
    """Pre-training from a folder with one process and with four, FSDP over pairs of these."""
    config = tiny.pretrain()
    config.run.steps = 7
    config.model.layers = 1
    config.data.source = f"folder:{photographs}"
    config.data.holdout = 13
    config.online.update(every=5, source="embedded:32", holdout=13)
    for count in (1, 4):
        config.run.fsdp, config.run.picture_every = (2, 5) if count == 4 else (1, 0)
        finish(tmp_path / str(count), config.to_dict(), count=count)
    alone = losses(tmp_path / "1")
    assert list(alone) == list(range(1, 8))
    assert alone[7] < alone[1]
    summary = json.loads((tmp_path / "1/summary.json").read_text())
    curve = losses(tmp_path / "4")
    # Only the order of summation differs.
    np.testing.assert_allclose(list(curve.values()), list(alone.values()), rtol=2e-4)
    other = json.loads((tmp_path / "4/summary.json").read_text())
    assert other["loss"] == pytest.approx(summary["loss"], rel=2e-4)
    for name in ("token_entropy", "majority_accuracy", "codes_used", "steps"):
        assert other[name] == summary[name], name
    assert (tmp_path / "4/reconstruction.png").exists()
    found = [
        {line["step"]: line for line in metrics.read(tmp_path / name / "metrics.jsonl")}
        for name in ("1", "4")
    ]
    for step in (5, 7):  # the last line of a step is that of the evaluation between steps
        one, four = (lines[step] for lines in found)
        assert four["online_rankme"] == pytest.approx(one["online_rankme"], rel=0.01)
        # Features that nearly tie may change places.
        for name, of_all in (("online_knn_accuracy", 13), ("online_codes_share", 64)):
            assert four[name] == pytest.approx(one[name], abs=1.1 / of_all), name

    # Step for step, the processes' shares put together are what one process reads.
    def read(count):
        shares = [
            [json.loads(line) for line in (tmp_path / f"{count}.{i}.indices").open()][:7]
            for i in range(count)
        ]
        return [list(itertools.chain(*parts)) for parts in zip(*shares, strict=True)]

    assert read(1) == read(4)
    seen = list(itertools.chain(*read(1)))
    assert len(set(seen[:48])) == 48  # an epoch without overlap and without a gap

    # Process 0 writes; of the others only their part of a checkpoint.
    written = {i: set((tmp_path / f"4.{i}.writes").read_text().split()) for i in range(4)}
    assert {"metrics.jsonl", "summary.json", "config.json", "start.json"} <= written[0]
    for i in (1, 2, 3):
        assert not [path for path in written[i] if not path.startswith("checkpoints/")]


def test_classification_is_the_same_with_two_processes(tmp_path):
    """Mixing in groups across processes, erasing, and every held-out image counted once."""
    config = tiny.classify()
    config.run.steps = 5
    config.data.holdout = 13  # divides by nothing here
    config.optimizer.ema_decay = 0.5
    summaries, curves = [], []
    for count in (1, 2):
        finish(tmp_path / str(count), config.to_dict(), count=count)
        summaries.append(json.loads((tmp_path / str(count) / "summary.json").read_text()))
        curves.append(list(losses(tmp_path / str(count)).values()))
    np.testing.assert_allclose(curves[0], curves[1], rtol=2e-4)
    one, two = summaries
    for name in ("top1", "top5", "ema_top1"):
        assert one[name] == pytest.approx(two[name], abs=1e-6), name
    assert one["loss"] == pytest.approx(two["loss"], rel=2e-4)
    assert one["best"] == pytest.approx(two["best"])
    assert (tmp_path / "2/best/checkpoints/5").exists()


def test_segmentation_is_the_same_with_two_processes(tmp_path):
    """Batch statistics over both processes, and every held-out pixel counted once."""
    config = tiny.segment()
    config.head.update(kind="linear", blocks=(4,), channels=0, auxiliary_channels=0)
    config.run.steps = 4
    config.data.holdout = 5  # divides by nothing here
    summaries, curves = [], []
    for count in (1, 2):
        finish(tmp_path / str(count), config.to_dict(), count=count)
        summaries.append(json.loads((tmp_path / str(count) / "summary.json").read_text()))
        curves.append(list(losses(tmp_path / str(count)).values()))
    np.testing.assert_allclose(curves[0], curves[1], rtol=2e-4)
    one, two = summaries
    for name in ("miou", "macc", "aacc", "iou/background"):
        assert one[name] == pytest.approx(two[name], abs=2e-3), name
    assert one["loss"] == pytest.approx(two["loss"], rel=2e-3)


@pytest.fixture(scope="module")
def straight(tmp_path_factory):
    """An uninterrupted run of two processes, with FSDP; checkpoints at steps 10 and 20."""
    workdir = tmp_path_factory.mktemp("straight") / "run"
    finish(workdir, values(run__fsdp=2, run__eval_every=10, run__checkpoint_every=10), count=2)
    return workdir


def test_sigterm_saves_the_same_step_everywhere_and_resumes_bit_exactly(straight, tmp_path):
    workdir = tmp_path / "run"
    config = values(run__fsdp=2, run__eval_every=10)
    with Run(workdir, config | {"step_seconds": 0.4}, count=2) as run:
        run.wait_for_text("step  4/20")
        run.processes[1].send_signal(signal.SIGTERM)  # process 0 is told by process 1
        assert run.wait() == {0: 75, 1: 75}, run.everything()
        said = [line for i in (0, 1) for line in run.output(i).splitlines() if "saved at" in line]
    assert len(said) == 2
    assert said[0] == said[1]
    (step,) = saved_steps(workdir)
    assert 4 <= step < 20
    assert f"saved at step {step};" in said[0]

    run = finish(workdir, config, count=2)
    assert f"resumed at step {step} of 20" in run.output(0)
    assert losses(workdir) == losses(straight)
    assert evaluations(workdir) == evaluations(straight)
    assert_same_state(workdir, straight)


@pytest.mark.parametrize("damage", ["truncated", "other numbers"])
def test_a_damaged_checkpoint_is_set_aside_by_all_hosts(straight, tmp_path, damage):
    """It is the newest; both hosts take the one before and end in the same state."""
    workdir = tmp_path / "run"
    config = values(run__fsdp=2, run__eval_every=10)
    shutil.copytree(straight, workdir)
    assert saved_steps(workdir) == [10, 20]
    state = workdir / "checkpoints/20/state"
    if damage == "truncated":
        for path in state.rglob("*"):
            if path.is_file() and "/d/" in str(path):
                path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    else:  # whole, and Orbax reads it
        shutil.rmtree(state)
        shutil.copytree(workdir / "checkpoints/10/state", state)
    run = finish(workdir, config, count=2)
    for i in (0, 1):
        assert "checkpoint 20 in" in run.output(i)
        assert "resumed at step 10 of 20" in run.output(i)
    (aside,) = (workdir / "unreadable_checkpoints").iterdir()
    assert aside.name.startswith("20-")
    assert_same_state(workdir, straight)


def test_the_first_hosts_clock_decides_for_all_hosts(tmp_path):
    config = values(run__checkpoint_minutes=1e-9, run__log_every=5)
    finish(tmp_path / "run", config, count=2)
    assert saved_steps(tmp_path / "run") == [10, 15, 20]


def test_sigterm_interrupts_an_evaluation(tmp_path):
    config = values(run__eval_every=5, evaluation_seconds=2.0)
    with Run(tmp_path / "run", config, count=2) as run:
        run.wait_for_text("step  5/20")
        run.processes[0].send_signal(signal.SIGTERM)
        assert run.wait() == {0: 75, 1: 75}, run.everything()
    assert saved_steps(tmp_path / "run") == [5]
    assert "eval_loss" not in (tmp_path / "run/metrics.jsonl").read_text()


def test_sigterm_before_the_first_step_leaves_at_once(tmp_path):
    with Run(tmp_path / "run", values(compile_seconds=120.0), count=2) as run:
        run.wait_for_text("parameters; 2", index=1)
        time.sleep(3)  # "compiling" by now
        began = time.monotonic()
        run.processes[1].send_signal(signal.SIGTERM)
        assert run.wait() == {0: 75, 1: 75}, run.everything()
    assert time.monotonic() - began < 60
    assert "process 1" in run.output(0)
    assert "nothing to save; the same command continues" in run.output(0)


def test_a_single_process_is_stopped_and_resumed_the_same(tmp_path):
    finish(tmp_path / "straight", values(), count=1)
    with Run(tmp_path / "run", values(step_seconds=0.4), count=1) as run:
        run.wait_for_text("step  3/20")
        run.processes[0].send_signal(signal.SIGTERM)
        assert run.wait() == {0: 75}, run.everything()
    finish(tmp_path / "run", values(), count=1)
    assert losses(tmp_path / "run") == losses(tmp_path / "straight")
    assert_same_state(tmp_path / "run", tmp_path / "straight")


def test_a_second_sigterm_leaves_at_once(tmp_path):
    with Run(tmp_path / "run", values(step_seconds=10.0), count=1) as run:
        run.wait_for_text("compiled the train step")
        time.sleep(1)
        run.processes[0].send_signal(signal.SIGTERM)
        run.wait_for_text("saving before the next step")
        began = time.monotonic()
        run.processes[0].send_signal(signal.SIGTERM)
        assert run.wait() == {0: 75}, run.everything()
    assert time.monotonic() - began < 8
    assert "second SIGTERM, leaving without saving" in run.output(0)


def test_killing_one_process_ends_the_others_with_its_name(tmp_path):
    config = values(step_seconds=0.2, run__steps=10_000, run__batch_size=9)
    with Run(tmp_path / "run", config, count=3, heartbeat_timeout=8.0) as run:
        run.wait_for_text("step     3/10000")
        run.processes[2].kill()
        began = time.monotonic()
        assert run.wait() == {0: 69, 1: 69, 2: -9}, run.everything()
    assert time.monotonic() - began < 90
    for i in (0, 1):
        (error,) = run.errors(i)
        assert "lost process 2 (" in error
        assert "not heard of for 8 s" in error


def test_killing_the_coordinator_ends_the_others_too(tmp_path):
    config = values(step_seconds=0.2, run__steps=10_000)
    with Run(tmp_path / "run", config, count=2, heartbeat_timeout=8.0) as run:
        run.wait_for_text("step     3/10000")
        run.processes[0].kill()
        assert run.wait(timeout=90) == {0: -9, 1: 69}, run.everything()
    (error,) = run.errors(1)
    assert "lost process 0 (" in error


def test_unreadable_data_on_one_host_ends_all_hosts(tmp_path):
    """Bad data on one host only; nobody waits for it in a collective."""
    config = values(fail_process=1, fail_step=4)
    with Run(tmp_path / "run", config, count=2) as run:
        assert run.wait() == {0: 2, 1: 2}, run.everything()
    assert run.errors(1) == ["error: half of the images can't be decoded"]
    (error,) = run.errors(0)
    assert "process 1 (" in error
    assert "half of the images can't be decoded" in error


def test_hosts_that_disagree_are_named(tmp_path):
    with Run(
        tmp_path / "run",
        None,
        count=2,
        change=lambda index: values(run__seed=index),
    ) as run:
        assert run.wait() == {0: 2, 1: 2}, run.everything()
    for i in (0, 1):
        (error,) = run.errors(i)
        assert "config.run.seed: 0 on process 0 (" in error
        assert "1 on process 1 (" in error
    assert not (tmp_path / "run").exists()


def test_a_source_that_is_another_function_is_refused_by_every_host(tmp_path):
    examples.saved(tmp_path / "source", examples.PRETRAINED["beit+"])
    config = tiny.classify()
    config.run.init_from = str(tmp_path / "source")
    config.data.normalization = "imagenet"
    with Run(tmp_path / "run", config.to_dict(), count=2) as run:
        assert run.wait() == {0: 2, 1: 2}, run.everything()
    for i in (0, 1):
        (error,) = run.errors(i)
        assert "config.run.init_from: " in error
        assert "has normalization half, this run imagenet" in error
    assert not (tmp_path / "run").exists()


def test_a_process_that_does_not_start_is_named(tmp_path):
    with Run(tmp_path / "run", values(), count=3, only=[0, 2], start_timeout=15.0) as run:
        assert run.wait() == {0: 69, 2: 69}, run.everything()
    for i in (0, 2):
        (error,) = run.errors(i)
        assert "1 of 3 processes did not start within 15 s: process 1" in error
    with Run(tmp_path / "run", values(), count=2, only=[1], start_timeout=3.0) as run:
        assert run.wait() == {1: 69}, run.everything()
    assert "no answer from process 0 at 127.0.0.1" in run.errors(1)[0]


def test_a_run_for_tpus_is_refused_on_a_cpu(tmp_path):
    with Run(tmp_path / "run", values(), count=1, platform="tpu") as run:
        assert run.wait() == {0: 2}, run.everything()
    (error,) = run.errors(0)
    assert "expected tpu (--platform=tpu), but JAX on" in error
    assert not (tmp_path / "run").exists()


def test_a_run_continues_on_another_number_of_hosts(straight, tmp_path):
    """Two processes with FSDP → one → four with FSDP; the curve is the uninterrupted one."""
    workdir = tmp_path / "run"
    for steps, count, fsdp in ((8, 2, 2), (14, 1, 1), (20, 4, 4)):
        # The schedule is that of 20 steps: the run is stopped, not shortened.
        config = values(run__fsdp=fsdp, run__eval_every=10, step_seconds=0.0)
        if steps == 20:
            finish(workdir, config, count=count)
            continue
        with Run(workdir, config | {"step_seconds": 0.5}, count=count) as run:
            run.wait_for_text(f"step {steps - 4:>2}/20")
            run.processes[0].send_signal(signal.SIGTERM)
            assert set(run.wait().values()) == {75}, run.everything()
    assert losses(workdir).keys() == losses(straight).keys()
    np.testing.assert_allclose(
        list(losses(workdir).values()), list(losses(straight).values()), rtol=1e-4
    )
